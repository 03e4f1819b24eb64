// Changes of layout: transposition of dwords (pairs of bf16), and pairs of rows interleaved.
#pragma once

#include "simd.h"

namespace moesaic {

#if defined(__AVX512F__)

inline void transpose_block(const uint32_t* from, size_t ld_from, uint32_t* to, size_t ld_to) {
    __m512i r[16], t[16];
    for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_si512(from + i * ld_from);
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
        _mm512_storeu_si512(to + (i + 0) * ld_to, _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88));
        _mm512_storeu_si512(to + (i + 8) * ld_to, _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd));
        _mm512_storeu_si512(to + (i + 4) * ld_to, _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88));
        _mm512_storeu_si512(to + (i + 12) * ld_to, _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd));
    }
}

#else

inline void transpose_block(const uint32_t* from, size_t ld_from, uint32_t* to, size_t ld_to) {
    __m256 r[8], t[8];
    for (int i = 0; i < 8; ++i) r[i] = _mm256_loadu_ps(reinterpret_cast<const float*>(from + i * ld_from));
    for (int i = 0; i < 4; ++i) {
        t[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
    }
    for (int i = 0; i < 2; ++i) {
        r[4 * i] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0x44);
        r[4 * i + 1] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0xee);
        r[4 * i + 2] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0x44);
        r[4 * i + 3] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0xee);
    }
    for (int i = 0; i < 4; ++i) {
        _mm256_storeu_ps(reinterpret_cast<float*>(to + i * ld_to), _mm256_permute2f128_ps(r[i], r[i + 4], 0x20));
        _mm256_storeu_ps(reinterpret_cast<float*>(to + (i + 4) * ld_to), _mm256_permute2f128_ps(r[i], r[i + 4], 0x31));
    }
}

#endif

// to[column][row] = from[row][column]; leading dimensions in dwords.
inline void transpose_dwords(int rows, int columns, const uint32_t* from, size_t ld_from, uint32_t* to, size_t ld_to) {
    int row = 0;
    for (; row + W <= rows; row += W) {
        int column = 0;
        for (; column + W <= columns; column += W)
            transpose_block(from + row * ld_from + column, ld_from, to + column * ld_to + row, ld_to);
        for (; column < columns; ++column)
            for (int r = row; r < row + W; ++r) to[column * ld_to + r] = from[r * ld_from + column];
    }
    for (; row < rows; ++row)
        for (int column = 0; column < columns; ++column) to[column * ld_to + row] = from[row * ld_from + column];
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
