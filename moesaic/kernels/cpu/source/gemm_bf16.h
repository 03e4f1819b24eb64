// Products of bf16 matrices with fp32 sums: C (M, N) = A (M, K) B (K, N).
//
// One form for every instruction set. A is row-major with K contiguous (in gemm_streamed without tiles pair after pair of
// K, as rows come that are contracted over). B is packed in panels of 32 columns: a panel is [K/2][32] dwords, dword
// (p, n) = B[2p][n] in its low half and B[2p+1][n] in its high half, which is a vector of AVX-512's dot product and a row
// of AMX's B tile alike. K is a multiple of 2 * kPairBlock (pad both sides with zeros), so that no kernel has a remainder
// in K; M is any number. The terms of a sum are added in the order of K, by blocks of 32 of them on AMX, whatever M and N
// are.
#pragma once

#include "simd.h"
#include "tiles.h"

namespace moesaic {

constexpr int kPanel = 32;  // columns of a panel
#if defined(MOESAIC_TILES)
constexpr int kPairBlock = 16;  // pairs of K are a multiple of this
constexpr int kWholeRows = 64;  // rows in whole steps of every kernel: tiles take 32, and another shape for fewer
#else
constexpr int kPairBlock = 1;
constexpr int kWholeRows = 48;  // 12 and 6 divide it
#endif

// Rows 4 KiB apart share one set of the first-level cache, of 8 or 12 ways: a step's rows push each other out. Tiles load
// every line once.
inline bool share_cache_sets(size_t bytes_apart) { return !kHasTiles && bytes_apart % 4096 == 0; }

inline int round_up(int x, int multiple) { return (x + multiple - 1) / multiple * multiple; }

// Width fp32 sums to bf16 in memory, past the caches where the address allows.
template <int Width>
inline void stream_bf16(bf16* to, const Vf (&sums)[Width / W]) {
#if defined(__AVX512BF16__)
    // Through registers: a line stored in halves and read at once would wait for both stores.
    if (reinterpret_cast<uintptr_t>(to) % 64 == 0) {
        for (int v = 0; v < Width / W; v += 2)
            _mm512_stream_si512((__m512i*)(to + v * W), (__m512i)_mm512_cvtne2ps_pbh(sums[v + 1].v, sums[v].v));
        return;
    }
#endif
    alignas(64) bf16 line[Width];
    for (int v = 0; v < Width / W; ++v) store_bf16(line + v * W, sums[v]);
    if (reinterpret_cast<uintptr_t>(to) % 64 == 0)
        for (int c = 0; c < Width; c += 2 * W) stream(to + c, loadi(line + c));
    else
        std::memcpy(to, line, sizeof line);
}

#if defined(MOESAIC_TILES)

constexpr int kRowBlock = 32;  // rows that one step works on at best
template <int Width>
constexpr int row_block() {
    return kRowBlock;
}

// What a product by tiles reads ahead while it computes: before each tile that it loads, a quarter of what one block of
// 32 terms is to bring. All at once, the lines would fill the buffers that its own loads need: weights came from memory
// at 55 to 65 % of its rate.
struct NothingAhead {
    void quarter(int, size_t, int) {}
};

// `step` bytes for every block, up to `end`, and behind that what begins at `then`; and cache lines `stride` bytes
// apart, `rate` 256ths of one for every quarter.
struct StreamAhead {
    const char* from;
    size_t step;
    const char *end = nullptr, *then = nullptr;
    const char* line = nullptr;
    size_t stride = 0;
    unsigned rate = 0, due = 0;
    const char* until = from;

    void bring_lines(const char* first, size_t apart, int64_t lines, int blocks) {
        line = first;
        stride = apart;
        rate = unsigned((lines * 64 + blocks - 1) / blocks);
    }
    void quarter(int, size_t, int) {
        until += step / 4;
        if (from == end) {
            until = then + (until - from);
            from = then;
        }
        for (; from < until; from += 64) fetch(from);
        for (due += rate; due >= 256; due -= 256, line += stride) fetch(line);
    }
};

// Rows of A that this or another product reads later: of every row here, the one as far behind `next`.
struct RowsAhead {
    const bf16* next;
    size_t lda;

    void quarter(int row, size_t column, int quarter) {
        const bf16* from = next + size_t(row + 8 * quarter) * lda + column;
        for (int r = 0; r < 8; ++r) fetch(from + r * lda);
    }
};

// One or two tiles of columns; see gemm.
template <int Columns, typename Fetch>
inline void gemm_tiles(int rows, int pairs, const bf16* a, size_t lda, const uint32_t* b, size_t ldb, float* c,
                       size_t ldc, bool accumulate, int blocks, size_t a_block, Fetch ahead) {
    const size_t stride_a = lda * 2, stride_b = ldb * 4, stride_c = ldc * 4;
    for (int row = 0; row < rows; row += 32) {
        const int here = rows - row < 32 ? rows - row : 32;
        const int top = here < 16 ? here : 16, bottom = here - top;
        configure_tiles(top, bottom);
        const bf16* top_a = a + size_t(row) * lda;
        float* top_c = c + size_t(row) * ldc;
        float* bottom_c = top_c + 16 * ldc;
        if (accumulate) {
            tile_load(0, top_c, stride_c);
            if constexpr (Columns == 2) tile_load(1, top_c + 16, stride_c);
            if (bottom) {
                tile_load(2, bottom_c, stride_c);
                if constexpr (Columns == 2) tile_load(3, bottom_c + 16, stride_c);
            }
        } else {
            tile_zero(0);
            if constexpr (Columns == 2) tile_zero(1);
            if (bottom) {
                tile_zero(2);
                if constexpr (Columns == 2) tile_zero(3);
            }
        }
        for (int block = 0; block < blocks; ++block) {
            const bf16* block_a = top_a + block * a_block;
            const uint32_t* block_b = b + size_t(block) * pairs * ldb;
            if (bottom) {
                for (int p = 0; p < pairs; p += 16) {
                    ahead.quarter(row, block * a_block + 2 * p, 0);
                    tile_load(4, block_a + 2 * p, stride_a);
                    ahead.quarter(row, block * a_block + 2 * p, 1);
                    tile_load(6, block_b + p * ldb, stride_b);
                    tile_dot_bf16(0, 4, 6);
                    ahead.quarter(row, block * a_block + 2 * p, 2);
                    if constexpr (Columns == 2) {
                        tile_load(7, block_b + p * ldb + 16, stride_b);
                        tile_dot_bf16(1, 4, 7);
                    }
                    ahead.quarter(row, block * a_block + 2 * p, 3);
                    tile_load(5, block_a + 16 * lda + 2 * p, stride_a);
                    tile_dot_bf16(2, 5, 6);
                    if constexpr (Columns == 2) tile_dot_bf16(3, 5, 7);
                }
            } else {
                for (int p = 0; p < pairs; p += 16) {
                    ahead.quarter(row, block * a_block + 2 * p, 0);
                    tile_load(4, block_a + 2 * p, stride_a);
                    ahead.quarter(row, block * a_block + 2 * p, 1);
                    tile_load(6, block_b + p * ldb, stride_b);
                    tile_dot_bf16(0, 4, 6);
                    ahead.quarter(row, block * a_block + 2 * p, 2);
                    if constexpr (Columns == 2) {
                        tile_load(7, block_b + p * ldb + 16, stride_b);
                        tile_dot_bf16(1, 4, 7);
                    }
                    ahead.quarter(row, block * a_block + 2 * p, 3);
                }
            }
        }
        if (bottom) {
            tile_store(2, bottom_c, stride_c);
            if constexpr (Columns == 2) tile_store(3, bottom_c + 16, stride_c);
        }
        tile_store(0, top_c, stride_c);
        if constexpr (Columns == 2) tile_store(1, top_c + 16, stride_c);
    }
}

// C[rows][Width] (+)= A[rows][2 * pairs] * B; Width 16, 32 or 48; lda in elements, ldb in dwords, ldc in floats.
// With blocks > 1, K is that many times 2 * pairs: A goes on a_block elements further for each, B where it stopped.
// With `next`, the rows that begin there, lda apart as well, are brought nearer meanwhile.
template <int Width>
inline void gemm(int rows, int pairs, const bf16* a, size_t lda, const uint32_t* b, size_t ldb, float* c, size_t ldc,
                 bool accumulate, int blocks = 1, size_t a_block = 0, const bf16* next = nullptr) {
    auto with = [&](auto ahead) {
        if constexpr (Width >= 32)
            gemm_tiles<2>(rows, pairs, a, lda, b, ldb, c, ldc, accumulate, blocks, a_block, ahead);
        if constexpr (Width == 16)
            gemm_tiles<1>(rows, pairs, a, lda, b, ldb, c, ldc, accumulate, blocks, a_block, ahead);
    };
    next ? with(RowsAhead{next, lda}) : with(NothingAhead{});
    if constexpr (Width == 48)
        gemm_tiles<1>(rows, pairs, a, lda, b + 32, ldb, c + 32, ldc, accumulate, blocks, a_block, NothingAhead{});
}

// C[rows][columns] = A * the panels that begin at b, rounded to bf16 and written past the caches: two lines of a row at a
// time, which memory takes at 43 GB/s; one line of each of 32 rows at 25. A is row after row, lda dwords apart.
inline void gemm_streamed(int rows, int pairs, const uint32_t* a, size_t lda, const uint32_t* b, int64_t columns,
                          bf16* c, size_t ldc) {
    constexpr int kColumns = 2 * kPanel;
    alignas(64) float sums[kRowBlock * kColumns];
    // Panels that do not stay in the cache are read once for all rows.
    const int step = int64_t(pairs) * columns <= (1 << 18) ? kRowBlock : rows;
    for (int from = 0; from < rows; from += step)
        for (int64_t first = 0; first < columns; first += kColumns)
            for (int row = from; row < rows && row < from + step; row += kRowBlock) {
                const int here = rows - row < kRowBlock ? rows - row : kRowBlock;
                const int wide = columns - first < kColumns ? kPanel : kColumns;
                for (int column = 0; column < wide; column += kPanel)
                    gemm<kPanel>(here, pairs, reinterpret_cast<const bf16*>(a + row * lda), 2 * lda,
                                 b + (first + column) * pairs, kPanel, sums + column, kColumns, false);
                for (int r = 0; r < here; ++r)
                    for (int column = 0; column < wide; column += kPanel) {
                        Vf line[kPanel / W];
                        for (int v = 0; v < kPanel / W; ++v) line[v] = load(sums + r * kColumns + column + v * W);
                        stream_bf16<kPanel>(c + (row + r) * ldc + first + column, line);
                    }
            }
}

#else

// Rows of one step: what fits the registers beside a row of B and one element of A.
template <int Width>
constexpr int row_block() {
#if defined(__AVX512F__)
    return Width == 48 ? 8 : 12;  // 24 of 32 registers hold sums
#else
    return Width == 48 ? 1 : 64 / Width;  // 8 of 16 (at 48 columns 6), since halves of B take two registers each
#endif
}
constexpr int kRowBlock = row_block<kPanel>();

// What becomes of a row's sums: stored as fp32.
template <int Width>
struct StoreFp32 {
    float* c;
    size_t ldc;
    static constexpr bool kLoads = true;
    Vf load_sum(int r, int v) const { return load(c + r * ldc + v * W); }
    void finish(int r, const Vf (&sums)[Width / W]) const {
        for (int v = 0; v < Width / W; ++v) store(c + r * ldc + v * W, sums[v]);
    }
    StoreFp32 rows_further(int rows) const { return {c + rows * ldc, ldc}; }
};

// Stored as bf16, past the caches.
template <int Width>
struct StreamBf16 {
    bf16* c;
    size_t ldc;
    static constexpr bool kLoads = false;
    Vf load_sum(int, int) const { return zero(); }
    void finish(int r, const Vf (&sums)[Width / W]) const { stream_bf16<Width>(c + r * ldc, sums); }
    StreamBf16 rows_further(int rows) const { return {c + rows * ldc, ldc}; }
};

// The left operand, row after row.
template <bool Prefetch>
struct RowMajor {
    const bf16* a;
    size_t lda;      // in elements
    size_t block;    // from one block of K to the next
    ptrdiff_t next;  // to the rows that are brought nearer

    Vi pair(int r, int p) const { return broadcast_dword(a + r * lda + 2 * p); }
    template <int R>
    void read_ahead(int p) const {
        if constexpr (Prefetch)
            for (int r = 0; r < R; ++r) fetch(a + next + r * lda + 2 * p);
    }
    RowMajor rows_further(int rows) const { return {a + rows * lda, lda, block, next}; }
    void go_on() { a += block; }
};

// Pair after pair of K, each with all rows, in one block.
struct PairMajor {
    const uint32_t* a;
    size_t lda;  // in dwords

    Vi pair(int r, int p) const { return broadcast_dword(a + p * lda + r); }
    template <int R>
    void read_ahead(int) const {}
    PairMajor rows_further(int rows) const { return {a + rows, lda}; }
    void go_on() {}
};

template <int R, int Width, typename Left, typename Out>
inline void gemm_rows(int pairs, Left left, const uint32_t* b, size_t ldb, Out out, bool accumulate, int blocks) {
    constexpr int V = Width / W;
    Vf acc[R][V];
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < V; ++v) acc[r][v] = Out::kLoads && accumulate ? out.load_sum(r, v) : zero();
    for (int block = 0; block < blocks; ++block) {
        for (int line = 0; line < pairs; line += 16) {
            const int end = pairs - line < 16 ? pairs : line + 16;
            left.template read_ahead<R>(line);
#pragma GCC unroll 2
            for (int p = line; p < end; ++p) {
                Vi columns[V];
                for (int v = 0; v < V; ++v) columns[v] = loadi(b + p * ldb + v * W);
                for (int r = 0; r < R; ++r) {
                    const Vi row = left.pair(r, p);
                    for (int v = 0; v < V; ++v) acc[r][v] = dot_bf16(acc[r][v], row, columns[v]);
                }
            }
        }
        left.go_on();
        b += size_t(pairs) * ldb;
    }
    for (int r = 0; r < R; ++r) out.finish(r, acc[r]);
}

template <int R, int Width, typename Left, typename Out>
inline void gemm_remainder(int rows, int pairs, Left left, const uint32_t* b, size_t ldb, Out out, bool accumulate,
                           int blocks) {
    if constexpr (R > 0) {
        if (rows == R)
            gemm_rows<R, Width>(pairs, left, b, ldb, out, accumulate, blocks);
        else
            gemm_remainder<R - 1, Width>(rows, pairs, left, b, ldb, out, accumulate, blocks);
    }
}

template <int Width, typename Left, typename Out>
inline void gemm_into(int rows, int pairs, Left left, const uint32_t* b, size_t ldb, Out out, bool accumulate = false,
                      int blocks = 1) {
    constexpr int R = row_block<Width>();
    int row = 0;
    for (; row + R <= rows; row += R)
        gemm_rows<R, Width>(pairs, left.rows_further(row), b, ldb, out.rows_further(row), accumulate, blocks);
    gemm_remainder<R - 1, Width>(rows - row, pairs, left.rows_further(row), b, ldb, out.rows_further(row), accumulate,
                                 blocks);
}

// C[rows][Width] (+)= A[rows][2 * pairs] * B; Width 16, 32 or 48; lda in elements, ldb in dwords, ldc in floats.
// With blocks > 1, K is that many times 2 * pairs: A goes on a_block elements further for each, B where it stopped.
// With `next`, the rows that begin there, lda apart as well, are brought nearer meanwhile.
template <int Width>
inline void gemm(int rows, int pairs, const bf16* a, size_t lda, const uint32_t* b, size_t ldb, float* c, size_t ldc,
                 bool accumulate, int blocks = 1, size_t a_block = 0, const bf16* next = nullptr) {
    const StoreFp32<Width> out{c, ldc};
    if (next)
        gemm_into<Width>(rows, pairs, RowMajor<true>{a, lda, a_block, next - a}, b, ldb, out, accumulate, blocks);
    else
        gemm_into<Width>(rows, pairs, RowMajor<false>{a, lda, a_block, 0}, b, ldb, out, accumulate, blocks);
}

// C[rows][columns] = A * the panels that begin at b, rounded to bf16 and written past the caches. A is pair after pair,
// lda dwords apart.
inline void gemm_streamed(int rows, int pairs, const uint32_t* a, size_t lda, const uint32_t* b, int64_t columns,
                          bf16* c, size_t ldc) {
    // Whole rows at a time while all panels stay in the cache, since memory is written fastest in long pieces.
    const int step = int64_t(pairs) * columns <= (1 << 17) ? kRowBlock : rows;
    for (int row = 0; row < rows; row += step)
        for (int64_t column = 0; column < columns; column += kPanel)
            gemm_into<kPanel>(rows - row < step ? rows - row : step, pairs, PairMajor{a + row, lda}, b + column * pairs,
                              kPanel, StreamBf16<kPanel>{c + row * ldc + column, ldc});
}

#endif

// C[rows][32] (+)= A[rows][2 * pairs] * panel. What stands at `ahead`, as long as the panel, will be read soon.
inline void gemm_panel(int rows, int pairs, const bf16* a, size_t lda, const uint32_t* b, size_t ldb, float* c,
                       size_t ldc, bool accumulate, const char* ahead = nullptr) {
#if defined(MOESAIC_TILES)
    if (ahead) {
        gemm_tiles<2>(rows, pairs, a, lda, b, ldb, c, ldc, accumulate, 1, 0,
                      StreamAhead{ahead, kPairBlock * kPanel * 4});
        return;
    }
#else
    for (int line = 0; ahead && line < pairs * kPanel * 4; line += 64) fetch(ahead + line);
#endif
    gemm<kPanel>(rows, pairs, a, lda, b, ldb, c, ldc, accumulate);
}

}  // namespace moesaic
