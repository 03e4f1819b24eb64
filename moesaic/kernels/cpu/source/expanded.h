// Inner loops of products for processors without instructions for dot products (AVX2 alone).
//
// There numbers have to be widened before they are multiplied: bf16 to fp32, bytes to 16 bits. A dword of a panel holds
// terms that follow each other in K (two of bf16, four bytes), and its even and odd terms are a shift or a mask away, so
// the panel is widened in registers, once for all rows of a step. The rows are widened beforehand ("expanded"), where
// they multiply several panels once for all of them, and broadcast from memory.
#pragma once

#include "tiles.h"

namespace moesaic {

// Whether rows of activations are expanded when they are prepared for products. Tiles, emulated ones too, take them as they
// are.
#if defined(__AVX512F__) || defined(MOESAIC_TILES)
constexpr bool kExpandsRows = false;
#else
constexpr bool kExpandsRows = true;
#endif

// Bytes from one row to the next, of rows of which six multiply a piece of a panel together: 11 cache lines more than a
// multiple of 16. The pieces of rows an odd number of lines apart, which may be one more than 64, meet in few sets of the
// first-level cache and push the panel out of it: bf16 at 83 % of the peak instead of 93.
constexpr size_t spread_rows(size_t bytes) { return ((bytes + 63) / 64 + 4) / 16 * 16 * 64 + 11 * 64; }

#if !defined(__AVX512F__)

// Dwords of K that all rows multiply in turn: 16 KiB of a panel, which stay in the first-level cache.
constexpr int kExpandedDwords = 128;
// Floats from one row of a piece of that many to the next.
constexpr size_t kPieceRow = 2 * kExpandedDwords + 16;

// Multiplications and additions are not intrinsics: GCC 12 would keep some sums in memory, at half the speed, those of
// whole numbers because it first makes all products of a loop and adds them up afterwards.

// Products of two bf16 numbers, summed in the order of K.
struct Bf16Terms {
    using Sum = Vf;
    // Where the terms of an expanded row are: floats from one dword to the next, from its even term to the odd one, and more
    // after each W dwords. A row of bf16 numbers is the same row in fp32.
    static constexpr int kDword = 2, kOdd = 1, kBlock = 0;
    static void expand(Vi from, float* to) {
        storei(to, {_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm256_castsi256_si128(from.v)), 16)});
        storei(to + W, {_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm256_extracti128_si256(from.v, 1)), 16)});
    }
    static Sum none() { return zero(); }
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
    static constexpr int kDword = 1, kOdd = W, kBlock = W;
    static void expand(Vi from, float* to) {
        storei(to, {_mm256_srai_epi16(_mm256_slli_epi16(from.v, 8), 8)});
        storei(to + W, {_mm256_srai_epi16(from.v, 8)});
    }
    static Sum none() { return set1i(0); }
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
    for (; first + W <= dwords; first += W)
        Terms::expand(loadi(at + 4 * first), to + 2 * first);
    if (first == dwords) return;
    uint32_t rest[W] = {};
    std::memcpy(rest, at + 4 * first, size_t(dwords - first) * 4);
    Terms::expand(loadi(rest), to + 2 * first);
}

// Rows expanded one by one, some floats apart.
template <typename Terms>
struct RowsExpanded {
    static constexpr int kDword = Terms::kDword, kOdd = Terms::kOdd, kBlock = Terms::kBlock;
    static constexpr size_t row(size_t apart) { return apart; }
};
// Dword after dword, each with the even terms of up to W rows and then their odd ones.
struct DwordsExpanded {
    static constexpr int kDword = 2 * W, kOdd = W, kBlock = 0;
    static constexpr size_t row(size_t) { return 1; }
};

struct NothingRead {
    void line() {}
};

// sums[R][V vectors], ld floats apart, (+)= R expanded rows, ldx apart, times V vectors of columns, rows of the panel
// row_bytes apart. reads.line() is called for every cache line of the panel. A function of its own, or not all sums would
// be in registers.
template <int R, int V, typename Terms, typename Place, typename Reads>
[[gnu::noinline]] void multiply_expanded(int dwords, const float* x, size_t ldx, const char* panel, size_t row_bytes,
                                         float* sums, size_t ld, bool accumulate, Reads& outside) {
    Reads reads = outside;  // of its own, so that what it counts is in registers
    typename Terms::Sum acc[R][V];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) acc[r][v] = accumulate ? Terms::read(sums + r * ld + v * W) : Terms::none();
    Vi mask = Terms::mask();
    asm("" : "+x"(mask.v));  // in a register
    // A pointer for every three rows, as far as addressing reaches, and no relation between them that would make the
    // compiler keep an offset for each: those do not fit the general registers.
    const float* third[(R + 2) / 3];
    const size_t apart = Place::row(ldx);
#pragma GCC unroll 8
    for (int r = 0; r < R; r += 3) {
        third[r / 3] = x + r * apart;
        asm("" : "+r"(third[r / 3]));
    }
    const auto row = [&](int r, int odd) __attribute__((always_inline)) {
        return broadcast_dword(third[r / 3] + r % 3 * apart + odd * Place::kOdd);
    };
    const auto go_on = [&](int floats) __attribute__((always_inline)) {
#pragma GCC unroll 8
        for (int r = 0; r < R; r += 3) third[r / 3] += floats;
    };
    constexpr int kTurn = Place::kBlock ? W : kExpandedDwords;  // dwords between two blocks
    for (int first = 0; first < dwords; first += kTurn, go_on(Place::kBlock)) {
        const int here = dwords - first < kTurn ? dwords - first : kTurn;
        for (int i = 0; i < here; ++i, go_on(Place::kDword), panel += row_bytes) {
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
inline void multiply_columns(int dwords, const float* x, size_t ldx, const char* panel, size_t row_bytes, float* sums,
                             size_t ld, bool accumulate, Reads& reads) {
    constexpr int V = R <= 2 && Width % (4 * W) == 0 ? 4 : 2;  // 8 to 12 of 16 registers hold sums
    for (int column = 0; column < Width; column += V * W)
        multiply_expanded<R, V, Terms, Place>(dwords, x, ldx, panel + column * 4, row_bytes, sums + column, ld, accumulate,
                                              reads);
}

#endif

}  // namespace moesaic
