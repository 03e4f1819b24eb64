// Vectors of fp32 and the few bf16 operations that the kernels need, for AVX-512 and AVX2.
//
// Which instructions exist is decided by the compiler's flags: build.py compiles these sources once for each instruction
// set that a machine uses. Results of functions of one vector are the same bits on every one of them: only correctly rounded
// operations, fused where fma is written and nowhere else (the build sets -ffp-contract=off).
#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

// For what runs between tile instructions: what it counts is in registers only where it is part of their loop.
#define MOESAIC_INLINE inline __attribute__((always_inline))

namespace moesaic {

using bf16 = uint16_t;

// While it lives, subnormal operands and results are zeros, as they always are to tiles.
class FlushedSubnormals {
  public:
    FlushedSubnormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040); }
    FlushedSubnormals(const FlushedSubnormals&) = delete;
    FlushedSubnormals& operator=(const FlushedSubnormals&) = delete;
    ~FlushedSubnormals() { _mm_setcsr(before_); }

  private:
    unsigned before_;
};

inline float bf16_to_float(bf16 x) {
    uint32_t bits = uint32_t(x) << 16;
    float out;
    std::memcpy(&out, &bits, 4);
    return out;
}

// Round to nearest, ties to even; NaN stays NaN.
inline bf16 float_to_bf16(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return bf16((bits >> 16) | 0x40);
    return bf16((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

#if defined(__AVX512F__)

constexpr int W = 16;  // fp32 lanes of a vector
struct Vf {
    __m512 v;
};
struct Vi {
    __m512i v;
};

inline Vf zero() { return {_mm512_setzero_ps()}; }
inline Vf set1(float x) { return {_mm512_set1_ps(x)}; }
inline Vi set1i(int32_t x) { return {_mm512_set1_epi32(x)}; }
inline Vf load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline Vf load_first(const float* p, int count) { return {_mm512_maskz_loadu_ps(__mmask16((1u << count) - 1), p)}; }
inline void store(float* p, Vf x) { _mm512_storeu_ps(p, x.v); }
inline void store_first(float* p, Vf x, int count) { _mm512_mask_storeu_ps(p, __mmask16((1u << count) - 1), x.v); }
inline Vi loadi(const void* p) { return {_mm512_loadu_si512(p)}; }
inline void storei(void* p, Vi x) { _mm512_storeu_si512(p, x.v); }
inline Vi broadcast_dword(const void* p) {
    int32_t x;
    std::memcpy(&x, p, 4);
    return {_mm512_set1_epi32(x)};
}
inline Vf add(Vf a, Vf b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vf sub(Vf a, Vf b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Vf mul(Vf a, Vf b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Vf div(Vf a, Vf b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Vf sqrt(Vf a) { return {_mm512_sqrt_ps(a.v)}; }
inline Vf fma(Vf a, Vf b, Vf c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
// b where either is NaN.
inline Vf max(Vf a, Vf b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Vf min(Vf a, Vf b) { return {_mm512_min_ps(a.v, b.v)}; }
inline Vf abs(Vf a) { return {_mm512_abs_ps(a.v)}; }
inline Vf round(Vf a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline Vi to_int(Vf a) { return {_mm512_cvtps_epi32(a.v)}; }
inline Vf to_float(Vi a) { return {_mm512_cvtepi32_ps(a.v)}; }
inline Vi addi(Vi a, Vi b) { return {_mm512_add_epi32(a.v, b.v)}; }
inline Vi subi(Vi a, Vi b) { return {_mm512_sub_epi32(a.v, b.v)}; }
inline Vi andi(Vi a, Vi b) { return {_mm512_and_si512(a.v, b.v)}; }
inline Vi ori(Vi a, Vi b) { return {_mm512_or_si512(a.v, b.v)}; }
inline Vi exclusive_or(Vi a, Vi b) { return {_mm512_xor_si512(a.v, b.v)}; }
inline Vi maxi(Vi a, Vi b) { return {_mm512_max_epi32(a.v, b.v)}; }
inline Vi mul_words(Vi a, Vi b) { return {_mm512_mullo_epi16(a.v, b.v)}; }
inline Vi add_words(Vi a, Vi b) { return {_mm512_add_epi16(a.v, b.v)}; }
inline Vi subtract_words_to_zero(Vi a, Vi b) { return {_mm512_subs_epu16(a.v, b.v)}; }  // unsigned, 0 where b is larger
// Words shifted right, 1 to 15 bits. By a product: there are two units for those and one for shifts (Emerald Rapids).
template <int N>
inline Vi shift_words_right(Vi a) {
    Vi power = set1i((1 << (16 - N)) * 0x00010001);
#if !defined(MOESAIC_EMULATE_AVX512)
    asm("" : "+v"(power.v));  // or GCC makes a shift of it
#endif
    return {_mm512_mulhi_epu16(a.v, power.v)};
}
inline Vi high_nibbles(Vi bytes) { return {_mm512_srli_epi16(bytes.v, 4)}; }  // low ones, and others above them
// Of every four bytes the second and the third in each other's place.
inline Vi swap_inner_bytes(Vi a) {
    const __m128i order = _mm_setr_epi8(0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15);
    return {_mm512_shuffle_epi8(a.v, _mm512_broadcast_i32x4(order))};
}
// Of a table of 16 bytes those that bytes, 0 to 15, name.
inline Vi look_up(const void* table, Vi bytes) {
    return {_mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)table)), bytes.v)};
}
// Of 16 words those that the low four bits of words name.
struct WordTable {
    Vi words;
    explicit WordTable(const uint16_t* table) {
        const __m256i once = _mm256_loadu_si256((const __m256i*)table);
        words.v = _mm512_inserti64x4(_mm512_castsi256_si512(once), once, 1);
    }
    Vi look_up(Vi places) const { return {_mm512_permutexvar_epi16(places.v, words.v)}; }
};
// Every dword's, 0 to 255.
inline void store_bytes(uint8_t* to, Vi x) { _mm_storeu_si128((__m128i*)to, _mm512_cvtepi32_epi8(x.v)); }
inline Vi widen_bytes(const uint8_t* p) { return {_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p))}; }
inline Vi widen_words(const void* p) { return {_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p))}; }
inline bool any_negative(Vi x) { return _mm512_movepi32_mask(x.v) != 0; }
template <int N>
inline Vi shift_left(Vi a) {
    return {_mm512_slli_epi32(a.v, N)};
}
template <int N>
inline Vi shift_right_signed(Vi a) {
    return {_mm512_srai_epi32(a.v, N)};
}
inline Vf as_float(Vi a) { return {_mm512_castsi512_ps(a.v)}; }
// Lane i of the result is lane i ^ N.
template <int N>
inline Vf swap_lanes(Vf a) {
    if constexpr (N == 1) return {_mm512_permute_ps(a.v, 0xb1)};
    if constexpr (N == 2) return {_mm512_permute_ps(a.v, 0x4e)};
    if constexpr (N == 4) return {_mm512_shuffle_f32x4(a.v, a.v, 0xb1)};
    if constexpr (N == 8) return {_mm512_shuffle_f32x4(a.v, a.v, 0x4e)};
}
// Of every dword pair, the low (high) word of a as the low word, that of b as the high one.
inline Vi low_words(Vi a, Vi b) {
    return {_mm512_mask_blend_epi16(0xaaaaaaaau, a.v, _mm512_slli_epi32(b.v, 16))};
}
inline Vi high_words(Vi a, Vi b) {
    return {_mm512_mask_blend_epi16(0xaaaaaaaau, _mm512_srli_epi32(a.v, 16), b.v)};
}
inline Vi as_int(Vf a) { return {_mm512_castps_si512(a.v)}; }
// x 2^n, for whole n from -125 to 128.
inline Vf times_power_of_2(Vf x, Vf n) { return {_mm512_scalef_ps(x.v, n.v)}; }
// a where x < y, else b.
inline Vf select_less(Vf x, Vf y, Vf a, Vf b) {
    return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(x.v, y.v, _CMP_LT_OQ), b.v, a.v)};
}
inline Vf load_bf16(const bf16* p) {
    return {_mm512_castsi512_ps(
        _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16))};
}
#if !defined(__AVX512BF16__)
// Dwords whose high halves are the bf16 values; their low ones are anything.
inline Vi bf16_high(Vf x) {
    __m512i bits = _mm512_castps_si512(x.v);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
    __mmask16 is_nan = _mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q);
    return {_mm512_mask_blend_epi32(is_nan, rounded, quiet)};
}
#endif
inline __m256i to_bf16(Vf x) {
#if defined(__AVX512BF16__)
    return (__m256i)_mm512_cvtneps_pbh(x.v);
#else
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(bf16_high(x).v, 16));
#endif
}
inline void store_bf16(bf16* p, Vf x) { _mm256_storeu_si256((__m256i*)p, to_bf16(x)); }
// Two rows rounded to bf16, the first in the low half.
inline Vi to_bf16_rows(Vf even, Vf odd) {
#if defined(__AVX512BF16__)
    return {(__m512i)_mm512_cvtne2ps_pbh(odd.v, even.v)};
#else
    alignas(64) static constexpr uint16_t kHighWords[32] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
                                                            33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
    return {_mm512_permutex2var_epi16(bf16_high(even).v, _mm512_load_si512(kHighWords), bf16_high(odd).v)};
#endif
}
inline void store_rows(bf16* even, bf16* odd, Vi rows) {
    _mm256_storeu_si256((__m256i*)even, _mm512_castsi512_si256(rows.v));
    _mm256_storeu_si256((__m256i*)odd, _mm512_extracti64x4_epi64(rows.v, 1));
}
// Dword i of the result holds element i of the first row in its low half and that of the second in its high half.
inline Vi interleave(Vi rows) {
    alignas(64) static constexpr uint16_t kOrder[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                        8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    return {_mm512_permutexvar_epi16(_mm512_load_si512(kOrder), rows.v)};
}
// acc[i] += a.low * b.low + a.high * b.high of every dword.
inline Vf dot_bf16(Vf acc, Vi a, Vi b) {
#if defined(__AVX512BF16__)
    return {_mm512_dpbf16_ps(acc.v, (__m512bh)a.v, (__m512bh)b.v)};
#else
    const __m512i high = _mm512_set1_epi32(int(0xffff0000u));
    acc.v = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(a.v, 16)),
                            _mm512_castsi512_ps(_mm512_slli_epi32(b.v, 16)), acc.v);
    return {_mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_and_si512(a.v, high)),
                            _mm512_castsi512_ps(_mm512_and_si512(b.v, high)), acc.v)};
#endif
}
inline float sum(Vf x) {
    // Halves, quarters, eighths, pairs: the same order as on AVX2 after its two halves are added.
    __m256 half = _mm256_add_ps(_mm512_castps512_ps256(x.v), _mm512_extractf32x8_ps(x.v, 1));
    __m128 quarter = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    quarter = _mm_add_ps(quarter, _mm_movehl_ps(quarter, quarter));
    return _mm_cvtss_f32(_mm_add_ss(quarter, _mm_shuffle_ps(quarter, quarter, 1)));
}
inline float maximum(Vf x) { return _mm512_reduce_max_ps(x.v); }
inline void stream(void* p, Vi x) { _mm512_stream_si512((__m512i*)p, x.v); }

#elif defined(__AVX2__)

constexpr int W = 8;
struct Vf {
    __m256 v;
};
struct Vi {
    __m256i v;
};

inline __m256i first_mask(int count) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
inline Vf zero() { return {_mm256_setzero_ps()}; }
inline Vf set1(float x) { return {_mm256_set1_ps(x)}; }
inline Vi set1i(int32_t x) { return {_mm256_set1_epi32(x)}; }
inline Vf load(const float* p) { return {_mm256_loadu_ps(p)}; }
inline Vf load_first(const float* p, int count) { return {_mm256_maskload_ps(p, first_mask(count))}; }
inline void store(float* p, Vf x) { _mm256_storeu_ps(p, x.v); }
inline void store_first(float* p, Vf x, int count) { _mm256_maskstore_ps(p, first_mask(count), x.v); }
inline Vi loadi(const void* p) { return {_mm256_loadu_si256((const __m256i*)p)}; }
inline void storei(void* p, Vi x) { _mm256_storeu_si256((__m256i*)p, x.v); }
inline Vi broadcast_dword(const void* p) {
    int32_t x;
    std::memcpy(&x, p, 4);
    return {_mm256_set1_epi32(x)};
}
inline Vf add(Vf a, Vf b) { return {_mm256_add_ps(a.v, b.v)}; }
inline Vf sub(Vf a, Vf b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline Vf mul(Vf a, Vf b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline Vf div(Vf a, Vf b) { return {_mm256_div_ps(a.v, b.v)}; }
inline Vf sqrt(Vf a) { return {_mm256_sqrt_ps(a.v)}; }
inline Vf fma(Vf a, Vf b, Vf c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline Vf max(Vf a, Vf b) { return {_mm256_max_ps(a.v, b.v)}; }
inline Vf min(Vf a, Vf b) { return {_mm256_min_ps(a.v, b.v)}; }
inline Vf abs(Vf a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }
inline Vf round(Vf a) { return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline Vi to_int(Vf a) { return {_mm256_cvtps_epi32(a.v)}; }
inline Vf to_float(Vi a) { return {_mm256_cvtepi32_ps(a.v)}; }
inline Vi addi(Vi a, Vi b) { return {_mm256_add_epi32(a.v, b.v)}; }
inline Vi subi(Vi a, Vi b) { return {_mm256_sub_epi32(a.v, b.v)}; }
inline Vi andi(Vi a, Vi b) { return {_mm256_and_si256(a.v, b.v)}; }
inline Vi ori(Vi a, Vi b) { return {_mm256_or_si256(a.v, b.v)}; }
inline Vi exclusive_or(Vi a, Vi b) { return {_mm256_xor_si256(a.v, b.v)}; }
inline Vi maxi(Vi a, Vi b) { return {_mm256_max_epi32(a.v, b.v)}; }
inline Vi mul_words(Vi a, Vi b) { return {_mm256_mullo_epi16(a.v, b.v)}; }
inline Vi add_words(Vi a, Vi b) { return {_mm256_add_epi16(a.v, b.v)}; }
inline Vi subtract_words_to_zero(Vi a, Vi b) { return {_mm256_subs_epu16(a.v, b.v)}; }
template <int N>
inline Vi shift_words_right(Vi a) {
    return {_mm256_srli_epi16(a.v, N)};
}
inline Vi high_nibbles(Vi bytes) { return {_mm256_srli_epi16(bytes.v, 4)}; }
inline Vi swap_inner_bytes(Vi a) {
    const __m128i order = _mm_setr_epi8(0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15);
    return {_mm256_shuffle_epi8(a.v, _mm256_broadcastsi128_si256(order))};
}
inline Vi look_up(const void* table, Vi bytes) {
    return {_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)table)), bytes.v)};
}
struct WordTable {
    __m256i low, high;  // bytes of the words
    explicit WordTable(const uint16_t* table) {
        const __m256i words = _mm256_loadu_si256((const __m256i*)table);
        const __m128i order = _mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15);
        const __m256i halves = _mm256_shuffle_epi8(words, _mm256_broadcastsi128_si256(order));
        const __m256i bytes = _mm256_permute4x64_epi64(halves, 0xd8);
        low = _mm256_permute2x128_si256(bytes, bytes, 0x00);
        high = _mm256_permute2x128_si256(bytes, bytes, 0x11);
    }
    Vi look_up(Vi places) const {
        // A byte of 128 names nothing: 0.
        const __m256i own = _mm256_and_si256(places.v, _mm256_set1_epi16(15));
        const __m256i at_low = _mm256_or_si256(own, _mm256_set1_epi16(int16_t(0x8000)));
        const __m256i at_high = _mm256_or_si256(_mm256_slli_epi16(own, 8), _mm256_set1_epi16(0x80));
        return {_mm256_or_si256(_mm256_shuffle_epi8(low, at_low), _mm256_shuffle_epi8(high, at_high))};
    }
};
inline void store_bytes(uint8_t* to, Vi x) {
    const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(x.v), _mm256_extracti128_si256(x.v, 1));
    _mm_storel_epi64((__m128i*)to, _mm_packus_epi16(words, words));
}
inline Vi widen_bytes(const uint8_t* p) { return {_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p))}; }
inline Vi widen_words(const void* p) { return {_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p))}; }
inline bool any_negative(Vi x) { return _mm256_movemask_ps(_mm256_castsi256_ps(x.v)) != 0; }
template <int N>
inline Vi shift_left(Vi a) {
    return {_mm256_slli_epi32(a.v, N)};
}
template <int N>
inline Vi shift_right_signed(Vi a) {
    return {_mm256_srai_epi32(a.v, N)};
}
inline Vf as_float(Vi a) { return {_mm256_castsi256_ps(a.v)}; }
template <int N>
inline Vf swap_lanes(Vf a) {
    if constexpr (N == 1) return {_mm256_permute_ps(a.v, 0xb1)};
    if constexpr (N == 2) return {_mm256_permute_ps(a.v, 0x4e)};
    if constexpr (N == 4) return {_mm256_permute2f128_ps(a.v, a.v, 1)};
}
inline Vi low_words(Vi a, Vi b) { return {_mm256_blend_epi16(a.v, _mm256_slli_epi32(b.v, 16), 0xaa)}; }
inline Vi high_words(Vi a, Vi b) { return {_mm256_blend_epi16(_mm256_srli_epi32(a.v, 16), b.v, 0xaa)}; }
inline Vi as_int(Vf a) { return {_mm256_castps_si256(a.v)}; }
inline Vf times_power_of_2(Vf x, Vf n) {
    // In two steps, since 2^128 is no number.
    const Vf half = as_float(shift_left<23>(addi(to_int(n), set1i(126))));
    return mul(mul(x, set1(2.0f)), half);  // this way round: x * half may be subnormal, and lose a bit
}
inline Vf select_less(Vf x, Vf y, Vf a, Vf b) {
    return {_mm256_blendv_ps(b.v, a.v, _mm256_cmp_ps(x.v, y.v, _CMP_LT_OQ))};
}
inline Vf load_bf16(const bf16* p) {
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16))};
}
inline Vi bf16_high(Vf x) {
    __m256i bits = _mm256_castps_si256(x.v);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    __m256 is_nan = _mm256_cmp_ps(x.v, x.v, _CMP_UNORD_Q);
    return {_mm256_blendv_epi8(rounded, quiet, _mm256_castps_si256(is_nan))};
}
inline void store_bf16(bf16* p, Vf x) {
    __m256i dwords = _mm256_srli_epi32(bf16_high(x).v, 16);
    _mm_storeu_si128((__m128i*)p,
                     _mm_packus_epi32(_mm256_castsi256_si128(dwords), _mm256_extracti128_si256(dwords, 1)));
}
inline Vi to_bf16_rows(Vf even, Vf odd) {
    const __m256i low = _mm256_srli_epi32(bf16_high(even).v, 16), high = _mm256_srli_epi32(bf16_high(odd).v, 16);
    return {_mm256_permute4x64_epi64(_mm256_packus_epi32(low, high), 0xd8)};
}
inline void store_rows(bf16* even, bf16* odd, Vi rows) {
    _mm_storeu_si128((__m128i*)even, _mm256_castsi256_si128(rows.v));
    _mm_storeu_si128((__m128i*)odd, _mm256_extracti128_si256(rows.v, 1));
}
inline Vi interleave(Vi rows) {
    const __m128i even = _mm256_castsi256_si128(rows.v), odd = _mm256_extracti128_si256(rows.v, 1);
    return {_mm256_set_m128i(_mm_unpackhi_epi16(even, odd), _mm_unpacklo_epi16(even, odd))};
}
inline Vf dot_bf16(Vf acc, Vi a, Vi b) {
    const __m256i high = _mm256_set1_epi32(int(0xffff0000u));
    acc.v = _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_slli_epi32(a.v, 16)),
                            _mm256_castsi256_ps(_mm256_slli_epi32(b.v, 16)), acc.v);
    return {_mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_and_si256(a.v, high)),
                            _mm256_castsi256_ps(_mm256_and_si256(b.v, high)), acc.v)};
}
inline float sum(Vf x) {
    __m128 quarter = _mm_add_ps(_mm256_castps256_ps128(x.v), _mm256_extractf128_ps(x.v, 1));
    quarter = _mm_add_ps(quarter, _mm_movehl_ps(quarter, quarter));
    return _mm_cvtss_f32(_mm_add_ss(quarter, _mm_shuffle_ps(quarter, quarter, 1)));
}
inline float maximum(Vf x) {
    __m128 quarter = _mm_max_ps(_mm256_castps256_ps128(x.v), _mm256_extractf128_ps(x.v, 1));
    quarter = _mm_max_ps(quarter, _mm_movehl_ps(quarter, quarter));
    return _mm_cvtss_f32(_mm_max_ss(quarter, _mm_shuffle_ps(quarter, quarter, 1)));
}
inline void stream(void* p, Vi x) { _mm256_stream_si256((__m256i*)p, x.v); }

#else
#error "these kernels need AVX2 or AVX-512"
#endif

// The bf16 numbers in the low and in the high half of every dword.
inline Vf low_bf16(Vi x) { return as_float(shift_left<16>(x)); }
inline Vf high_bf16(Vi x) { return as_float(andi(x, set1i(int32_t(0xffff0000u)))); }

inline Vi interleave_bf16(Vf even, Vf odd) {
#if defined(__AVX512BF16__)
    return interleave(to_bf16_rows(even, odd));
#else
    return high_words(bf16_high(even), bf16_high(odd));
#endif
}

// e^x, error below 1.5 units in the last place; NaN stays NaN, overflow gives infinity, underflow 0.
MOESAIC_INLINE Vf exp(Vf x) {
    // Below the first bound the result would be next to subnormal and is 0; at the second it is infinite.
    const Vf low = set1(-86.98f), high = set1(89.0f);
    Vf clamped = min(high, max(low, x));
    Vf n = round(mul(clamped, set1(1.44269504088896341f)));
    Vf r = fma(n, set1(-0.693145751953125f), clamped);
    r = fma(n, set1(-1.42860677e-6f), r);
    Vf p = set1(1.9875691500e-4f);
    p = fma(p, r, set1(1.3981999507e-3f));
    p = fma(p, r, set1(8.3334519073e-3f));
    p = fma(p, r, set1(4.1665795894e-2f));
    p = fma(p, r, set1(1.6666665459e-1f));
    p = fma(p, r, set1(5.0000001201e-1f));
    p = add(fma(mul(r, r), p, r), set1(1.0f));
    return select_less(x, low, zero(), times_power_of_2(p, n));
}

// 2^x for x up to about 0, error below 2e-7; exactly 0 from -127 down; NaN stays NaN when it came from bf16 numbers or
// from an operation on infinities, since only then its low bits are 0. A third of the work of exp of any number.
MOESAIC_INLINE Vf exp2_of_negative(Vf x) {
    const Vf shift = set1(12582912.0f);  // 1.5 * 2^23: adding it rounds to a whole number, kept in the low bits
    const Vf clamped = max(set1(-127.0f), x);
    const Vf shifted = add(clamped, shift);
    const Vf r = sub(clamped, sub(shifted, shift));
    Vf p = set1(1.3264720215e-3f);
    p = fma(p, r, set1(9.6715131391e-3f));
    p = fma(p, r, set1(5.5507337664e-2f));
    p = fma(p, r, set1(2.4022242074e-1f));
    p = fma(p, r, set1(6.9314697758e-1f));
    p = fma(p, r, set1(1.0f));
    return as_float(addi(as_int(p), shift_left<23>(as_int(shifted))));
}

// Error below 4e-7, for what is rounded to bf16: half of the work, but not the same bits on every instruction set.
MOESAIC_INLINE Vf quick_sigmoid(Vf x) {
    const Vf one = set1(1.0f);
    const Vf e = exp2_of_negative(mul(abs(x), set1(-1.44269504088896341f)));
    const Vf d = add(one, e);
#if defined(__AVX512F__)
    const Vf estimate = {_mm512_rcp14_ps(d.v)};
    const Vf s = mul(estimate, sub(set1(2.0f), mul(d, estimate)));
#else
    const Vf s = div(one, d);
#endif
    return select_less(x, zero(), mul(e, s), s);
}

MOESAIC_INLINE Vf sigmoid(Vf x) { return div(set1(1.0f), add(set1(1.0f), exp(sub(zero(), x)))); }

// What a sink adds to a sum of weights where that of the largest score is 1; scale: on that score, the exponent's base 2.
// As much as leaves the sum finite: the others are then nothing beside it.
inline float sink_weight(float sink, float scale, float largest) {
    return std::exp2(std::min(1.44269504f * sink - scale * largest, 126.0f));
}

}  // namespace moesaic
