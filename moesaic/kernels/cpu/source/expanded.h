// Inner loops of bf16 products for processors without instructions for dot products (AVX2 alone, AVX-512 before its bf16).
//
// There numbers have to be widened to fp32 before they are multiplied. A dword of a panel holds two terms that follow each
// other in K, the even one a shift and the odd one a mask away, so the panel is widened in registers, once for all rows of
// a step. The rows are widened beforehand ("expanded"), where they multiply several panels once for all of them, and
// broadcast from memory.
#pragma once

#include "tiles.h"

namespace moesaic {

// Whether rows that are made for products are made expanded. Tiles, emulated ones too, take them as they are.
#if !defined(__AVX512BF16__) && !defined(MOESAIC_TILES)
#define MOESAIC_EXPANDS_ROWS 1
constexpr bool kExpandsRows = true;
#else
constexpr bool kExpandsRows = false;
#endif

// Bytes from one row to the next, of rows of which six multiply a panel together, 16 lines of each at a time: 11 cache
// lines more than a multiple of 16. Those of rows an odd number of lines apart, which may be one more than 64, lie in 21
// of 64 sets of the first-level cache and push the panel out of it: bf16 at 83 % of the peak instead of 93.
constexpr size_t spread_rows(size_t bytes) { return ((bytes + 63) / 64 + 4) / 16 * 16 * 64 + 11 * 64; }

// Dwords of K that a step of rows multiplies at a time: 16 KiB of a panel, which stay in the first-level cache while both
// halves of its columns are multiplied, and where all rows take them in turn, for all of them.
constexpr int kExpandedDwords = 128;
// Floats from one row of a piece of that many to the next.
constexpr size_t kPieceRow = 2 * kExpandedDwords + 16;

// `dwords` dwords of a row of bf16 numbers, in fp32.
inline void expand_row(int dwords, const bf16* from, float* to) {
    int k = 0;
    for (; k + W <= 2 * dwords; k += W) store(to + k, load_bf16(from + k));
    for (; k < 2 * dwords; ++k) to[k] = bf16_to_float(from[k]);
}

// Where the terms of expanded rows are: floats from one row to the next, from one dword to the next, and from its even term
// to the odd one. Row after row,
struct RowsExpanded {
    static constexpr int kDword = 2, kOdd = 1;
    static constexpr size_t row(size_t apart) { return apart; }
};
// or dword after dword, each with the even terms of up to W rows and then their odd ones.
struct DwordsExpanded {
    static constexpr int kDword = 2 * W, kOdd = W;
    static constexpr size_t row(size_t) { return 1; }
};

struct NothingRead {
    void line() {}
    void lines(int) {}
};

// sums += a row's term times columns. One piece of assembly: a term that the compiler fetched earlier would take a register
// that holds sums, and of intrinsics GCC 12 keeps some sums in memory as well, at half the speed.
#if defined(MOESAIC_EMULATE_AVX512)
template <int V>
inline void add_products(Vf (&sums)[V], const float& term, const Vf (&columns)[V]) {
    for (int v = 0; v < V; ++v) sums[v] = fma(set1(term), columns[v], sums[v]);
}
#else
MOESAIC_INLINE void add_products(Vf (&sums)[1], const float& term, const Vf (&columns)[1]) {
    Vf all;
    asm("vbroadcastss %2, %1\n\tvfmadd231ps %3, %1, %0"
        : "+&v"(sums[0].v), "=&v"(all.v)
        : "m"(term), "v"(columns[0].v));
}
MOESAIC_INLINE void add_products(Vf (&sums)[2], const float& term, const Vf (&columns)[2]) {
    Vf all;
    asm("vbroadcastss %3, %2\n\tvfmadd231ps %4, %2, %0\n\tvfmadd231ps %5, %2, %1"
        : "+&v"(sums[0].v), "+&v"(sums[1].v), "=&v"(all.v)
        : "m"(term), "v"(columns[0].v), "v"(columns[1].v));
}
MOESAIC_INLINE void add_products(Vf (&sums)[3], const float& term, const Vf (&columns)[3]) {
    Vf all;
    asm("vbroadcastss %4, %3\n\tvfmadd231ps %5, %3, %0\n\tvfmadd231ps %6, %3, %1\n\tvfmadd231ps %7, %3, %2"
        : "+&v"(sums[0].v), "+&v"(sums[1].v), "+&v"(sums[2].v), "=&v"(all.v)
        : "m"(term), "v"(columns[0].v), "v"(columns[1].v), "v"(columns[2].v));
}
MOESAIC_INLINE void add_products(Vf (&sums)[4], const float& term, const Vf (&columns)[4]) {
    Vf all;
    asm("vbroadcastss %5, %4\n\tvfmadd231ps %6, %4, %0\n\tvfmadd231ps %7, %4, %1\n\t"
        "vfmadd231ps %8, %4, %2\n\tvfmadd231ps %9, %4, %3"
        : "+&v"(sums[0].v), "+&v"(sums[1].v), "+&v"(sums[2].v), "+&v"(sums[3].v), "=&v"(all.v)
        : "m"(term), "v"(columns[0].v), "v"(columns[1].v), "v"(columns[2].v), "v"(columns[3].v));
}
#endif

// Where R rows are, `apart` from one to the next: a pointer for every three of them, as far as addressing reaches, and no
// relation between those that would make the compiler keep an offset for each: they do not fit the general registers.
template <int R, typename T>
struct ThirdRows {
    const T* third[(R + 2) / 3];
    size_t apart;

    MOESAIC_INLINE ThirdRows(const T* x, size_t distance) : apart(distance) {
#pragma GCC unroll 16
        for (int r = 0; r < R; r += 3) {
            third[r / 3] = x + r * apart;
            asm("" : "+r"(third[r / 3]));
        }
    }
    MOESAIC_INLINE void go_on(int count) {
#pragma GCC unroll 16
        for (int r = 0; r < R; r += 3) third[r / 3] += count;
    }
    MOESAIC_INLINE const T& at(int r, int place) const { return third[r / 3][r % 3 * apart + place]; }
};

// sums += the rows' terms times V vectors of columns of a dword of a panel, the even ones and then the odd ones; mask: of
// high halves.
template <int R, int V, int kOdd>
MOESAIC_INLINE void add_dword(Vf (&sums)[R][V], const ThirdRows<R, float>& rows, const char* dword, Vi mask) {
#pragma GCC unroll 2
    for (int odd = 0; odd < 2; ++odd) {
        Vf columns[V];
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) {
            const Vi both = loadi(dword + v * W * 4);
            columns[v] = odd ? as_float(andi(both, mask)) : low_bf16(both);
        }
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) add_products(sums[r], rows.at(r, odd * kOdd), columns);
    }
}

// Kept in a register, where the compiler would read it from memory for every use.
MOESAIC_INLINE Vi mask_of_high_halves() {
    Vi mask = set1i(int32_t(0xffff0000u));
#if !defined(MOESAIC_EMULATE_AVX512)
    asm("" : "+v"(mask.v));
#endif
    return mask;
}

// sums[R][V vectors], ld floats apart, (+)= R expanded rows, ldx apart, times V vectors of columns, rows of the panel
// row_bytes apart; the terms of a sum are added in the order of K. reads.lines() is called with the cache lines of each dword.
// A function of its own, or not all sums would be in registers.
template <int R, int V, typename Place, typename Reads>
[[gnu::noinline]] void multiply_expanded(int dwords, const float* x, size_t ldx, const char* panel, size_t row_bytes,
                                         float* sums, size_t ld, bool accumulate, Reads& outside) {
    Reads reads = outside;  // of its own, so that what it counts is in registers
    Vf acc[R][V];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) acc[r][v] = accumulate ? load(sums + r * ld + v * W) : zero();
    const Vi mask = mask_of_high_halves();
    ThirdRows<R, float> rows(x, Place::row(ldx));
    for (int i = 0; i < dwords; ++i, panel += row_bytes) {
        reads.lines(V * W * 4 / 64);
        add_dword<R, V, Place::kOdd>(acc, rows, panel, mask);
        rows.go_on(Place::kDword);
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) store(sums + r * ld + v * W, acc[r][v]);
    outside = reads;
}

// As multiply_expanded, for Width columns, some vectors at a time. Lines are read ahead evenly: all of them with the first
// vectors, whose distance would not shrink then, streams came at 23 GB/s instead of 28 (three rows, two Zen 3 cores).
template <int R, int Width, typename Place, typename Reads>
inline void multiply_columns(int dwords, const float* x, size_t ldx, const char* panel, size_t row_bytes, float* sums,
                             size_t ld, bool accumulate, Reads& reads) {
    // Three quarters of the registers hold sums, or half.
    constexpr int V = W == 16 ? Width / W : R <= 2 && Width % (4 * W) == 0 ? 4 : 2;
    for (int column = 0; column < Width; column += V * W)
        multiply_expanded<R, V, Place>(dwords, x, ldx, panel + column * 4, row_bytes, sums + column, ld, accumulate, reads);
}

}  // namespace moesaic
