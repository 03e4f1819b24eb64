// Rows of fp32 or bf16 read and written as vectors of fp32, the last one of a row possibly partial.
#pragma once

#include "simd.h"

namespace moesaic {

inline Vf load_values(const float* p) { return load(p); }
inline Vf load_values(const bf16* p) { return load_bf16(p); }
inline void store_values(float* p, Vf x) { store(p, x); }
inline void store_values(bf16* p, Vf x) { store_bf16(p, x); }

// The first count values (fewer than W), zeros after them; nothing behind them is read or written.
inline Vf load_part(const float* p, int count) { return load_first(p, count); }
inline void store_part(float* p, Vf x, int count) { store_first(p, x, count); }
inline Vf load_part(const bf16* p, int count) {
    bf16 values[W] = {};
    std::memcpy(values, p, size_t(count) * sizeof(bf16));
    return load_bf16(values);
}
inline void store_part(bf16* p, Vf x, int count) {
    bf16 values[W];
    store_bf16(values, x);
    std::memcpy(p, values, size_t(count) * sizeof(bf16));
}

// Values at p of a row that ends after `left` more of them.
template <typename T>
inline Vf load_row(const T* p, int64_t left) {
    return left >= W ? load_values(p) : load_part(p, int(left));
}
template <typename T>
inline void store_row(T* p, Vf x, int64_t left) {
    if (left >= W)
        store_values(p, x);
    else
        store_part(p, x, int(left));
}

inline float load_scalar(const float* p) { return *p; }
inline float load_scalar(const bf16* p) { return bf16_to_float(*p); }
inline void store_scalar(float* p, float x) { *p = x; }
inline void store_scalar(bf16* p, float x) { *p = float_to_bf16(x); }

// Call body(T()) with the C++ type of the elements.
template <typename Body>
inline void with_element_type(bool is_bf16, Body&& body) {
    if (is_bf16)
        body(bf16());
    else
        body(float());
}

}  // namespace moesaic
