// Products of bf16 matrices with fp32 sums: C (M, N) = A (M, K) B (K, N).
//
// One form for every instruction set. A is row-major with K contiguous. B is packed in panels of 32 columns: a panel is
// [K/2][32] dwords, dword (p, n) = B[2p][n] in its low half and B[2p+1][n] in its high half, which is a vector of
// AVX-512's dot product and a row of AMX's B tile alike. K is a multiple of 32 (pad both sides with zeros), so that no
// kernel has a remainder in K; M is any number. The terms of a sum are added in the order of K, whatever M and N are.
#pragma once

#include "simd.h"
#include "tiles.h"

namespace moesaic {

constexpr int kPanel = 32;      // columns of a panel
constexpr int kPairBlock = 16;  // K is a multiple of twice this

inline int round_up(int x, int multiple) { return (x + multiple - 1) / multiple * multiple; }

#if defined(MOESAIC_TILES)

constexpr int kRowBlock = 32;  // rows that one step of gemm_panel works on at best

// C[rows][32] (+)= A[rows][2 * pairs] * panel; lda in elements, ldb in dwords, ldc in floats.
inline void gemm_panel(int rows, int pairs, const bf16* a, size_t lda, const uint32_t* b, size_t ldb, float* c,
                       size_t ldc, bool accumulate) {
    int row = 0;
    for (; row < rows; row += 32) {
        const int here = rows - row < 32 ? rows - row : 32;
        const int top = here < 16 ? here : 16, bottom = here - top;
        configure_tiles(top, bottom);
        const bf16* a0 = a + size_t(row) * lda;
        float* c0 = c + size_t(row) * ldc;
        const size_t stride_a = lda * 2, stride_b = ldb * 4, stride_c = ldc * 4;
        if (accumulate) {
            tile_load(0, c0, stride_c);
            tile_load(1, c0 + 16, stride_c);
        } else {
            tile_zero(0);
            tile_zero(1);
        }
        if (bottom) {
            if (accumulate) {
                tile_load(2, c0 + 16 * ldc, stride_c);
                tile_load(3, c0 + 16 * ldc + 16, stride_c);
            } else {
                tile_zero(2);
                tile_zero(3);
            }
            for (int p = 0; p < pairs; p += 16) {
                tile_load(4, a0 + 2 * p, stride_a);
                tile_load(6, b + p * ldb, stride_b);
                tile_load(7, b + p * ldb + 16, stride_b);
                tile_load(5, a0 + 16 * lda + 2 * p, stride_a);
                tile_dot_bf16(0, 4, 6);
                tile_dot_bf16(1, 4, 7);
                tile_dot_bf16(2, 5, 6);
                tile_dot_bf16(3, 5, 7);
            }
            tile_store(2, c0 + 16 * ldc, stride_c);
            tile_store(3, c0 + 16 * ldc + 16, stride_c);
        } else {
            for (int p = 0; p < pairs; p += 16) {
                tile_load(4, a0 + 2 * p, stride_a);
                tile_load(6, b + p * ldb, stride_b);
                tile_load(7, b + p * ldb + 16, stride_b);
                tile_dot_bf16(0, 4, 6);
                tile_dot_bf16(1, 4, 7);
            }
        }
        tile_store(0, c0, stride_c);
        tile_store(1, c0 + 16, stride_c);
    }
}

#else

#if defined(__AVX512F__)
constexpr int kRowBlock = 12;  // 12 rows x 2 vectors of sums, 2 of B, 1 of A: 27 of 32 registers
#else
constexpr int kRowBlock = 2;  // 2 rows x 4 vectors of sums, 4 registers of B in halves, 2 of A
#endif

template <int R>
inline void gemm_rows(int pairs, const bf16* a, size_t lda, const uint32_t* b, size_t ldb, float* c, size_t ldc,
                      bool accumulate) {
    constexpr int V = kPanel / W;
    Vf acc[R][V];
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < V; ++v) acc[r][v] = accumulate ? load(c + r * ldc + v * W) : zero();
#pragma GCC unroll 2
    for (int p = 0; p < pairs; ++p) {
        Vi columns[V];
        for (int v = 0; v < V; ++v) columns[v] = loadi(b + p * ldb + v * W);
        for (int r = 0; r < R; ++r) {
            const Vi row = broadcast_dword(a + r * lda + 2 * p);
            for (int v = 0; v < V; ++v) acc[r][v] = dot_bf16(acc[r][v], row, columns[v]);
        }
    }
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < V; ++v) store(c + r * ldc + v * W, acc[r][v]);
}

template <int R>
inline void gemm_remainder(int rows, int pairs, const bf16* a, size_t lda, const uint32_t* b, size_t ldb, float* c,
                           size_t ldc, bool accumulate) {
    if constexpr (R > 0) {
        if (rows == R)
            gemm_rows<R>(pairs, a, lda, b, ldb, c, ldc, accumulate);
        else
            gemm_remainder<R - 1>(rows, pairs, a, lda, b, ldb, c, ldc, accumulate);
    }
}

// C[rows][32] (+)= A[rows][2 * pairs] * panel; lda in elements, ldb in dwords, ldc in floats.
inline void gemm_panel(int rows, int pairs, const bf16* a, size_t lda, const uint32_t* b, size_t ldb, float* c,
                       size_t ldc, bool accumulate) {
    int row = 0;
    for (; row + kRowBlock <= rows; row += kRowBlock)
        gemm_rows<kRowBlock>(pairs, a + row * lda, lda, b, ldb, c + row * ldc, ldc, accumulate);
    gemm_remainder<kRowBlock - 1>(rows - row, pairs, a + row * lda, lda, b, ldb, c + row * ldc, ldc, accumulate);
}

#endif

}  // namespace moesaic
