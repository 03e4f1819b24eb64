// Products of many rows with two panels that follow each other: inner loops of AVX-512 without tiles and without
// instructions for bf16.
//
// Six rows and four vectors of columns to a step instead of twelve and two: as many sums in registers, but a term of a row,
// once it is broadcast, multiplies twice as much, so that the same products are a tenth fewer instructions. To a core of our
// own, whose units are busy all the time either way, that is next to nothing; where the core's other thread is at work too,
// these loops are 7 to 11 % faster (Emerald Rapids). Zen 4, which multiplies one vector a cycle, has instructions to
// spare, and loads more of a panel so: products of 8 and 4 bits were 2 to 4 % slower.
#pragma once

#include "expanded.h"
#include "unpacked_nibbles.h"

#if defined(__AVX512F__) && defined(MOESAIC_EXPANDS_ROWS)
#define MOESAIC_PAIRS_PANELS 1

namespace moesaic {

constexpr int kPairRows = 6;

// What comes next of two panels, brought nearer by one line a dword of K: `step` bytes further each.
struct PairAhead {
    const char* from;
    size_t step;

    // Of both panels `length` bytes, the first at `panel`, the second `apart` bytes behind: the share of one of `parts`
    // passes of `dwords` dwords.
    PairAhead(const uint8_t* panel, size_t apart, size_t length, int part, int parts, int dwords)
        : step(2 * length / (size_t(parts) * size_t(dwords))) {
        const size_t at = 2 * length * size_t(part) / size_t(parts);
        from = reinterpret_cast<const char*>(panel) + (at < length ? at : apart + at - length);
    }
    void line() {
        _mm_prefetch(from, _MM_HINT_T0);
        from += step;
    }
};

// Where the sums of R rows are: rows of 32, those of the second panel `apart` floats behind those of the first.
template <int R, typename Vector>
MOESAIC_INLINE void load_sums(Vector (&acc)[R][4], const float* sums, size_t apart, bool accumulate) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < 4; ++v) {
            const Vf sum = accumulate ? load(sums + r * kPanel + v / 2 * apart + v % 2 * W) : zero();
            if constexpr (std::is_same_v<Vector, Vi>)
                acc[r][v] = as_int(sum);
            else
                acc[r][v] = sum;
        }
}
template <int R, typename Vector>
MOESAIC_INLINE void store_sums(const Vector (&acc)[R][4], float* sums, size_t apart) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < 4; ++v) {
            float* to = sums + r * kPanel + v / 2 * apart + v % 2 * W;
            if constexpr (std::is_same_v<Vector, Vi>)
                storei(to, acc[r][v]);
            else
                store(to, acc[r][v]);
        }
}

// sums (+)= R rows of bytes, `stride` apart, times dwords of two panels of 8 bits, in int32.
template <int R>
[[gnu::noinline]] void multiply_byte_pair(int dwords, const char* a, size_t stride, const uint8_t* first,
                                          const uint8_t* second, float* sums, size_t apart, bool accumulate,
                                          PairAhead ahead) {
    Vi acc[R][4];
    load_sums(acc, sums, apart, accumulate);
    ThirdRows<R, char> rows(a, stride);
#pragma GCC unroll 1
    for (int i = 0; i < dwords; ++i, first += 4 * kPanel, second += 4 * kPanel) {
        const Vi columns[4] = {loadi(first), loadi(first + 4 * W), loadi(second), loadi(second + 4 * W)};
        ahead.line();
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) add_byte_products(acc[r], rows.at(r, 0), columns);
        rows.go_on(4);
    }
    store_sums(acc, sums, apart);
}
template <int R = kPairRows>
inline void multiply_byte_pair_of(int rows, int dwords, const char* a, size_t stride, const uint8_t* first,
                                  const uint8_t* second, float* sums, size_t apart, bool accumulate, PairAhead ahead) {
    if constexpr (R > 0) {
        if (rows == R)
            multiply_byte_pair<R>(dwords, a, stride, first, second, sums, apart, accumulate, ahead);
        else
            multiply_byte_pair_of<R - 1>(rows, dwords, a, stride, first, second, sums, apart, accumulate, ahead);
    }
}

// Dwords of two panels of bf16, widened: of each the even terms of four vectors of columns and then their odd ones.
inline void widen_columns(int dwords, const uint32_t* first, const uint32_t* second, float* to) {
    const Vi mask = mask_of_high_halves();
    for (int i = 0; i < dwords; ++i, first += kPanel, second += kPanel, to += 8 * W)
#pragma GCC unroll 4
        for (int v = 0; v < 4; ++v) {
            const Vi both = loadi((v < 2 ? first : second) + v % 2 * W);
            store(to + v * W, low_bf16(both));
            store(to + (4 + v) * W, as_float(andi(both, mask)));
        }
}

// sums (+)= R expanded rows, ldx floats apart, times dwords of two panels, widened.
template <int R>
[[gnu::noinline]] void multiply_widened(int dwords, const float* x, size_t ldx, const float* columns, float* sums,
                                        size_t apart, bool accumulate, PairAhead ahead) {
    Vf acc[R][4];
    load_sums(acc, sums, apart, accumulate);
    ThirdRows<R, float> rows(x, ldx);
#pragma GCC unroll 1
    for (int i = 0; i < dwords; ++i, columns += 8 * W) {
        ahead.line();
#pragma GCC unroll 2
        for (int odd = 0; odd < 2; ++odd) {
            Vf own[4];
#pragma GCC unroll 4
            for (int v = 0; v < 4; ++v) own[v] = load(columns + (4 * odd + v) * W);
#pragma GCC unroll 16
            for (int r = 0; r < R; ++r) add_products(acc[r], rows.at(r, odd), own);
        }
        rows.go_on(2);
    }
    store_sums(acc, sums, apart);
}
template <int R = kPairRows>
inline void multiply_widened_of(int rows, int dwords, const float* x, size_t ldx, const float* columns, float* sums,
                                size_t apart, bool accumulate, PairAhead ahead) {
    if constexpr (R > 0) {
        if (rows == R)
            multiply_widened<R>(dwords, x, ldx, columns, sums, apart, accumulate, ahead);
        else
            multiply_widened_of<R - 1>(rows, dwords, x, ldx, columns, sums, apart, accumulate, ahead);
    }
}

}  // namespace moesaic

#endif
