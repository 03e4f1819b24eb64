// Changes of layout: transposition of dwords (pairs of bf16), and pairs of rows interleaved.
#pragma once

#include "simd.h"

namespace moesaic {

#if defined(__AVX512F__)

using Row = __m512i;
inline Row load_row(const uint32_t* p, int count) {
    return count >= W ? _mm512_loadu_si512(p) : _mm512_maskz_loadu_epi32(__mmask16((1u << count) - 1), p);
}
inline void store_row(uint32_t* p, Row x, int count) {
    if (count >= W)
        _mm512_storeu_si512(p, x);
    else
        _mm512_mask_storeu_epi32(p, __mmask16((1u << count) - 1), x);
}

inline void transpose_registers(Row (&r)[16]) {
    Row t[16];
    for (int i = 0; i < 8; ++i) {
        t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
    for (int i = 0; i < 4; ++i) {
        r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
        r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
    }
    for (int i = 0; i < 4; ++i) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; ++i) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
        r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
        r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
    }
}

#else

using Row = __m256i;
inline Row load_row(const uint32_t* p, int count) {
    return count >= W ? _mm256_loadu_si256((const __m256i*)p) : _mm256_maskload_epi32((const int*)p, first_mask(count));
}
inline void store_row(uint32_t* p, Row x, int count) {
    if (count >= W)
        _mm256_storeu_si256((__m256i*)p, x);
    else
        _mm256_maskstore_epi32((int*)p, first_mask(count), x);
}

inline void transpose_registers(Row (&r)[8]) {
    Row t[8];
    for (int i = 0; i < 4; ++i) {
        t[2 * i] = _mm256_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm256_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
    for (int i = 0; i < 2; ++i) {
        r[4 * i] = _mm256_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 1] = _mm256_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 2] = _mm256_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
        r[4 * i + 3] = _mm256_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
    }
    for (int i = 0; i < 4; ++i) {
        t[i] = _mm256_permute2x128_si256(r[i], r[i + 4], 0x20);
        t[i + 4] = _mm256_permute2x128_si256(r[i], r[i + 4], 0x31);
    }
    for (int i = 0; i < 8; ++i) r[i] = t[i];
}

#endif

// to[column][row] = from[row][column]; leading dimensions in dwords. Nothing beyond rows and columns is touched.
// Streamed: past the caches where whole aligned vectors are written.
template <bool Streamed = false>
inline void transpose_dwords(int rows, int columns, const uint32_t* from, size_t ld_from, uint32_t* to, size_t ld_to) {
    for (int row = 0; row < rows; row += W) {
        const int rows_here = rows - row < W ? rows - row : W;
        for (int column = 0; column < columns; column += W) {
            const int columns_here = columns - column < W ? columns - column : W;
            const uint32_t* source = from + size_t(row) * ld_from + column;
            uint32_t* target = to + size_t(column) * ld_to + row;
            Row block[W] = {};
            for (int i = 0; i < rows_here; ++i) block[i] = load_row(source + i * ld_from, columns_here);
            transpose_registers(block);
            for (int i = 0; i < columns_here; ++i) {
                if (Streamed && rows_here == W && reinterpret_cast<uintptr_t>(target + i * ld_to) % (4 * W) == 0)
                    stream(target + i * ld_to, {block[i]});
                else
                    store_row(target + i * ld_to, block[i], rows_here);
            }
        }
    }
}

// Dword n of the result: even[n] in its low half, odd[n] in its high half; count a multiple of 16.
inline void interleave_rows(int count, const bf16* even, const bf16* odd, uint32_t* to) {
    for (int n = 0; n < count; n += 16) {
        const __m256i low = _mm256_loadu_si256((const __m256i*)(even + n));
        const __m256i high = _mm256_loadu_si256((const __m256i*)(odd + n));
        const __m256i first = _mm256_unpacklo_epi16(low, high), second = _mm256_unpackhi_epi16(low, high);
        _mm256_storeu_si256((__m256i*)(to + n), _mm256_permute2x128_si256(first, second, 0x20));
        _mm256_storeu_si256((__m256i*)(to + n + 8), _mm256_permute2x128_si256(first, second, 0x31));
    }
}

}  // namespace moesaic
