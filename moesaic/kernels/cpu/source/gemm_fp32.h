// Products of small fp32 matrices with fp32 sums, for the router: C (M, N) = A (M, K) B (K, N).
//
// On two Zen 5 cores MKL's fp32 product reaches 0.21 TFLOP/s and these loops about 0.35, of 0.5 that the cores have;
// products of bf16 would be faster and would let tokens change their expert. The terms of a sum are added in the order of
// K, in blocks of kFp32Depth whose sums are then added in order, whatever M and N are.
#pragma once

#include "elements.h"

namespace moesaic {

constexpr int kFp32Depth = 256;         // terms summed before they are added to what is there
constexpr int kFp32Columns = 2 * W;     // columns of B that one step works on
#if defined(__AVX512F__)
constexpr int kFp32Rows = 12;  // 12 rows x 2 vectors of sums, 2 of B: 26 of 32 registers
#else
constexpr int kFp32Rows = 6;  // 12 sums, 2 of B, 1 of A: 15 of 16 registers
#endif

// Where element (row, k) of A is: a[row * stride + k], or, transposed, a[k * stride + row].
enum class Layout { rows, transposed };

template <int R, int V, Layout L, bool Whole, typename B>
inline void fp32_rows(int depth, const float* a, size_t stride, const B* b, size_t ldb, float* c, size_t ldc,
                      int columns, bool accumulate) {
    Vf acc[R][V];
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < V; ++v) acc[r][v] = zero();
    for (int k = 0; k < depth; ++k) {
        Vf column[V];
        for (int v = 0; v < V; ++v) {
            const B* from = b + k * ldb + v * W;
            column[v] = Whole ? load_values(from) : columns > v * W ? load_row(from, columns - v * W) : zero();
        }
        for (int r = 0; r < R; ++r) {
            const Vf row = set1(L == Layout::rows ? a[r * stride + k] : a[k * stride + r]);
            for (int v = 0; v < V; ++v) acc[r][v] = fma(row, column[v], acc[r][v]);
        }
    }
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < V; ++v) {
            float* to = c + r * ldc + v * W;
            const int left = Whole ? W : columns - v * W;
            if (left > 0) store_row(to, accumulate ? add(load_row(to, left), acc[r][v]) : acc[r][v], left);
        }
}

template <int R, int V, Layout L, typename B>
inline void fp32_remainder(int rows, int depth, const float* a, size_t stride, const B* b, size_t ldb, float* c,
                           size_t ldc, int columns, bool accumulate) {
    if constexpr (R > 0) {
        if (rows != R)
            fp32_remainder<R - 1, V, L>(rows, depth, a, stride, b, ldb, c, ldc, columns, accumulate);
        else if (columns == V * W)
            fp32_rows<R, V, L, true>(depth, a, stride, b, ldb, c, ldc, columns, accumulate);
        else
            fp32_rows<R, V, L, false>(depth, a, stride, b, ldb, c, ldc, columns, accumulate);
    }
}

// C[rows][columns] (+)= A[rows][depth] B[depth][columns] for at most kFp32Columns columns.
template <Layout L, typename B>
inline void gemm_fp32(int rows, int depth, const float* a, size_t stride, const B* b, size_t ldb, float* c, size_t ldc,
                      int columns, bool accumulate) {
    const size_t step = L == Layout::rows ? stride : 1;
    for (int row = 0; row < rows; row += kFp32Rows) {
        const int here = rows - row < kFp32Rows ? rows - row : kFp32Rows;
        if (columns <= W)
            fp32_remainder<kFp32Rows, 1, L>(here, depth, a + row * step, stride, b, ldb, c + row * ldc, ldc, columns,
                                        accumulate);
        else
            fp32_remainder<kFp32Rows, 2, L>(here, depth, a + row * step, stride, b, ldb, c + row * ldc, ldc, columns,
                                        accumulate);
    }
}

}  // namespace moesaic
