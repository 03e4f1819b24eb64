// Rotary positions: channels i and i + D/2 of a head turned by its position's angle, in fp32, rounded once.
#pragma once

#include <algorithm>

#include "elements.h"
#include "parallel.h"

namespace moesaic {

struct RotaryArguments {
    const void* x;  // (B, S, A, D): batch and position with strides, heads behind one another
    bool is_bf16;
    int64_t batch, length, heads, head_dim;
    int64_t batch_stride, length_stride;  // of x, in elements
    const float *cosines, *sines;         // (S, D/2)
    bool backwards;                       // turn back: the gradient of turning
    void* out;                            // (B, S, A, D), contiguous
};

template <typename T>
inline void rotate_head(const T* x, const float* cosines, const float* sines, float sign, int64_t half, T* out) {
    for (int64_t i = 0; i < half; i += W) {
        const int64_t left = half - i;
        const Vf first = load_row(x + i, left), second = load_row(x + half + i, left);
        const Vf c = load_row(cosines + i, left), s = mul(load_row(sines + i, left), set1(sign));
        store_row(out + i, sub(mul(first, c), mul(second, s)), left);
        store_row(out + half + i, add(mul(second, c), mul(first, s)), left);
    }
}

inline void rotate(Team& team, const RotaryArguments& a) {
    constexpr int64_t kPositions = 16;  // of one task
    const int64_t rows = a.batch * a.length, half = a.head_dim / 2;
    const float sign = a.backwards ? -1.0f : 1.0f;
    team.tasks((rows + kPositions - 1) / kPositions, [&](long task) {
        with_element_type(a.is_bf16, [&](auto kind) {
            using T = decltype(kind);
            const int64_t last = std::min((task + 1) * kPositions, rows);
            for (int64_t row = task * kPositions; row < last; ++row) {
                const int64_t position = row % a.length;
                const T* x = static_cast<const T*>(a.x) + row / a.length * a.batch_stride + position * a.length_stride;
                T* out = static_cast<T*>(a.out) + row * a.heads * a.head_dim;
                for (int64_t head = 0; head < a.heads; ++head)
                    rotate_head(x + head * a.head_dim, a.cosines + position * half, a.sines + position * half, sign,
                                half, out + head * a.head_dim);
            }
        });
    });
}

}  // namespace moesaic
