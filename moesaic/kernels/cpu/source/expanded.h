// Inner loops of products for processors without instructions for dot products (AVX2 alone).
//
// There numbers have to be widened before they are multiplied: bf16 to fp32, bytes to 16 bits. A dword of a panel holds
// terms that follow each other in K (two of bf16, four bytes), and its even and odd terms are a shift or a mask away, so
// the panel is widened in registers, once for all rows of a step. The rows are widened beforehand, a few hundred
// terms at a time ("expanded"), and broadcast from memory.
#pragma once

#include "tiles.h"

#if !defined(__AVX512F__)

namespace moesaic {

// Dwords of a row that are expanded at once, and floats from one expanded row to the next: rows a power of two apart
// would share few cache sets.
constexpr int kExpandedDwords = 128;
constexpr int kExpandedRow = 2 * kExpandedDwords + 16;
// An expanded block: eight dwords' even terms, then their odd ones.
constexpr int kBlockDwords = W;

// Multiplications and additions are not intrinsics: GCC 12 would keep some sums in memory, at half the speed, those of
// whole numbers because it first makes all products of a loop and adds them up afterwards.

// Products of two bf16 numbers, summed in the order of K.
struct Bf16Terms {
    using Sum = Vf;
    static void expand(Vi from, float* to) {
        store(to, low_bf16(from));
        store(to + W, high_bf16(from));
    }
    static Sum read(const float* from) { return load(from); }
    static void write(float* to, Sum sums) { store(to, sums); }
    static Vi mask() { return set1i(int32_t(0xffff0000u)); }
    static Vi even(Vi columns, Vi) { return as_int(low_bf16(columns)); }
    static Vi odd(Vi columns, Vi mask) { return andi(columns, mask); }
    static Sum multiply(Sum sums, Vi row, Vi columns) {
        asm("vfmadd231ps %2, %1, %0" : "+x"(sums.v) : "x"(row.v), "x"(columns.v));
        return sums;
    }
};

// Products of a signed byte of a row and an unsigned one of a panel, four of every dword summed in int32.
struct ByteTerms {
    using Sum = Vi;
    static void expand(Vi from, float* to) {
        storei(to, {_mm256_srai_epi16(_mm256_slli_epi16(from.v, 8), 8)});
        storei(to + W, {_mm256_srai_epi16(from.v, 8)});
    }
    static Sum read(const float* from) { return loadi(from); }
    static void write(float* to, Sum sums) { storei(to, sums); }
    static Vi mask() { return set1i(0x00ff00ff); }
    static Vi even(Vi columns, Vi mask) { return andi(columns, mask); }
    static Vi odd(Vi columns, Vi) { return {_mm256_srli_epi16(columns.v, 8)}; }
    static Sum multiply(Sum sums, Vi row, Vi columns) {
        __m256i products;
        asm("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0" : "+x"(sums.v), "=&x"(products) : "x"(row.v), "x"(columns.v));
        return sums;
    }
};

// `dwords` dwords of a row.
template <typename Terms>
inline void expand_row(int dwords, const void* from, float* to) {
    const char* at = static_cast<const char*>(from);
    int first = 0;
    for (; first + kBlockDwords <= dwords; first += kBlockDwords)
        Terms::expand(loadi(at + 4 * first), to + 2 * first);
    if (first == dwords) return;
    uint32_t rest[kBlockDwords] = {};
    std::memcpy(rest, at + 4 * first, size_t(dwords - first) * 4);
    Terms::expand(loadi(rest), to + 2 * first);
}

// Where the terms of expanded rows are: floats from one row to the next, from one dword to the next, and more after each
// block of dwords. The odd term follows the even one W floats later.
struct RowsExpanded {
    static constexpr int kRow = kExpandedRow, kDword = 1, kBlock = kBlockDwords;
};
struct DwordsExpanded {
    static constexpr int kRow = 1, kDword = 2 * W, kBlock = 0;
};

struct NothingRead {
    void line() {}
};

// sums[R][V vectors], ld floats apart, += R expanded rows times V vectors of columns, rows of the panel row_bytes apart.
// reads.line() is called for every cache line of the panel. A function of its own, or not all sums would be in registers.
template <int R, int V, typename Terms, typename Place, typename Reads>
[[gnu::noinline]] void multiply_expanded(int dwords, const float* x, const char* panel, size_t row_bytes, float* sums,
                                         size_t ld, Reads& outside) {
    Reads reads = outside;  // of its own, so that what it counts is in registers
    typename Terms::Sum acc[R][V];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) acc[r][v] = Terms::read(sums + r * ld + v * W);
    Vi mask = Terms::mask();
    asm("" : "+x"(mask.v));  // in a register
    const auto row = [&](int r, int odd) __attribute__((always_inline)) {
        return broadcast_dword(x + r * Place::kRow + odd * W);
    };
    for (int first = 0; first < dwords; first += kBlockDwords, x += Place::kBlock) {
        const int here = dwords - first < kBlockDwords ? dwords - first : kBlockDwords;
        for (int i = 0; i < here; ++i, x += Place::kDword, panel += row_bytes) {
            for (int line = 0; line < V * W * 4; line += 64) reads.line();
            if constexpr (V > 2) {  // few rows: their terms stay in registers
                Vi even[R], odd[R];
#pragma GCC unroll 8
                for (int r = 0; r < R; ++r) {
                    even[r] = row(r, 0);
                    odd[r] = row(r, 1);
                }
#pragma GCC unroll 4
                for (int v = 0; v < V; ++v) {
                    const Vi columns = Terms::even(loadi(panel + v * W * 4), mask);
#pragma GCC unroll 8
                    for (int r = 0; r < R; ++r) acc[r][v] = Terms::multiply(acc[r][v], even[r], columns);
                }
#pragma GCC unroll 4
                for (int v = 0; v < V; ++v) {
                    const Vi columns = Terms::odd(loadi(panel + v * W * 4), mask);
#pragma GCC unroll 8
                    for (int r = 0; r < R; ++r) acc[r][v] = Terms::multiply(acc[r][v], odd[r], columns);
                }
            } else {
                Vi columns[V];
#pragma GCC unroll 4
                for (int v = 0; v < V; ++v) columns[v] = Terms::even(loadi(panel + v * W * 4), mask);
#pragma GCC unroll 8
                for (int r = 0; r < R; ++r) {
                    const Vi terms = row(r, 0);
#pragma GCC unroll 4
                    for (int v = 0; v < V; ++v) acc[r][v] = Terms::multiply(acc[r][v], terms, columns[v]);
                }
#pragma GCC unroll 4
                for (int v = 0; v < V; ++v) columns[v] = Terms::odd(loadi(panel + v * W * 4), mask);
#pragma GCC unroll 8
                for (int r = 0; r < R; ++r) {
                    const Vi terms = row(r, 1);
#pragma GCC unroll 4
                    for (int v = 0; v < V; ++v) acc[r][v] = Terms::multiply(acc[r][v], terms, columns[v]);
                }
            }
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) Terms::write(sums + r * ld + v * W, acc[r][v]);
    outside = reads;
}

// As multiply_expanded, for Width columns, some vectors at a time. Lines are read ahead evenly: all of them with the first
// vectors, whose distance would not shrink then, streams came at 23 GB/s instead of 28 (three rows, two Zen 3 cores).
template <int R, int Width, typename Terms, typename Place, typename Reads>
inline void multiply_columns(int dwords, const float* x, const char* panel, size_t row_bytes, float* sums, size_t ld,
                             Reads& reads) {
    constexpr int V = R <= 2 && Width % (4 * W) == 0 ? 4 : 2;  // 8 to 12 of 16 registers hold sums
    for (int column = 0; column < Width; column += V * W)
        multiply_expanded<R, V, Terms, Place>(dwords, x, panel + column * 4, row_bytes, sums + column, ld, reads);
}

}  // namespace moesaic

#endif
