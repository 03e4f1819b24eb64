// AVX-512 (F, BW, DQ, VNNI, and BF16 with MOESAIC_EMULATE_BF16) on a machine with AVX2 alone: the intrinsics that the
// kernels use, each as Intel documents it. Included before everything else by -include; the compiler gets -mavx2 -mfma
// -mf16c. What is not here does not compile ("target specific option mismatch").
#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#define __AVX512F__ 1
#define __AVX512BW__ 1
#define __AVX512DQ__ 1
#define __AVX512VL__ 1
#define __AVX512VNNI__ 1
#if defined(MOESAIC_EMULATE_BF16)
#define __AVX512BF16__ 1
#endif

namespace emulated_avx512 {

#define EMULATED inline __attribute__((always_inline))

// A vector as its halves and as its elements.
union Any {
    __m512 f;
    __m512i i;
    __m256 fh[2];
    __m256i ih[2];
    float f32[16];
    int32_t i32[16];
    uint32_t u32[16];
    uint64_t u64[8];
    uint16_t u16[32];
    int8_t i8[64];
    uint8_t u8[64];
    EMULATED Any() {}
    EMULATED Any(__m512 x) : f(x) {}
    EMULATED Any(__m512i x) : i(x) {}
};

inline void need_aligned(const void* p) {
    if (reinterpret_cast<uintptr_t>(p) % 64) {
        std::fprintf(stderr, "emulated AVX-512: an aligned access to %p\n", p);
        std::abort();
    }
}

// What works within lanes of 128 bits or less: both halves alike.
#define EMULATED_FLOAT2(name)                             \
    EMULATED __m512 name(__m512 a, __m512 b) {            \
        const Any x(a), y(b);                             \
        Any r;                                            \
        for (int h = 0; h < 2; ++h) r.fh[h] = _mm256_##name(x.fh[h], y.fh[h]); \
        return r.f;                                       \
    }
#define EMULATED_INT2(name)                               \
    EMULATED __m512i name(__m512i a, __m512i b) {         \
        const Any x(a), y(b);                             \
        Any r;                                            \
        for (int h = 0; h < 2; ++h) r.ih[h] = _mm256_##name(x.ih[h], y.ih[h]); \
        return r.i;                                       \
    }
#define EMULATED_BITS2(name)                              \
    EMULATED __m512i name##_si512(__m512i a, __m512i b) { \
        const Any x(a), y(b);                             \
        Any r;                                            \
        for (int h = 0; h < 2; ++h) r.ih[h] = _mm256_##name##_si256(x.ih[h], y.ih[h]); \
        return r.i;                                       \
    }
#define EMULATED_SHIFT(name)                              \
    EMULATED __m512i name(__m512i a, unsigned n) {        \
        const Any x(a);                                   \
        Any r;                                            \
        for (int h = 0; h < 2; ++h) r.ih[h] = _mm256_##name(x.ih[h], int(n)); \
        return r.i;                                       \
    }
EMULATED_FLOAT2(add_ps)
EMULATED_FLOAT2(sub_ps)
EMULATED_FLOAT2(mul_ps)
EMULATED_FLOAT2(div_ps)
EMULATED_FLOAT2(max_ps)
EMULATED_FLOAT2(min_ps)
EMULATED_INT2(add_epi32)
EMULATED_INT2(add_epi16)
EMULATED_INT2(mulhi_epu16)
EMULATED_INT2(mullo_epi16)
EMULATED_INT2(sub_epi32)
EMULATED_INT2(subs_epu16)
EMULATED_INT2(max_epi32)
EMULATED_INT2(packs_epi16)
EMULATED_INT2(packs_epi32)
EMULATED_INT2(shuffle_epi8)
EMULATED_INT2(unpacklo_epi32)
EMULATED_INT2(unpackhi_epi32)
EMULATED_INT2(unpacklo_epi64)
EMULATED_INT2(unpackhi_epi64)
EMULATED_BITS2(and)
EMULATED_BITS2(andnot)
EMULATED_BITS2(or)
EMULATED_BITS2(xor)
EMULATED_SHIFT(slli_epi32)
EMULATED_SHIFT(srli_epi32)
EMULATED_SHIFT(srai_epi32)
EMULATED_SHIFT(srli_epi16)
EMULATED __m512 fmadd_ps(__m512 a, __m512 b, __m512 c) {
    const Any x(a), y(b), z(c);
    Any r;
    for (int h = 0; h < 2; ++h) r.fh[h] = _mm256_fmadd_ps(x.fh[h], y.fh[h], z.fh[h]);
    return r.f;
}
EMULATED __m512 sqrt_ps(__m512 a) {
    const Any x(a);
    Any r;
    for (int h = 0; h < 2; ++h) r.fh[h] = _mm256_sqrt_ps(x.fh[h]);
    return r.f;
}
EMULATED __m512i cvtps_epi32(__m512 a) {
    const Any x(a);
    Any r;
    for (int h = 0; h < 2; ++h) r.ih[h] = _mm256_cvtps_epi32(x.fh[h]);
    return r.i;
}
EMULATED __m512 cvtepi32_ps(__m512i a) {
    const Any x(a);
    Any r;
    for (int h = 0; h < 2; ++h) r.fh[h] = _mm256_cvtepi32_ps(x.ih[h]);
    return r.f;
}
template <int Imm>
EMULATED __m512 permute_ps(__m512 a) {
    const Any x(a);
    Any r;
    for (int h = 0; h < 2; ++h) r.fh[h] = _mm256_permute_ps(x.fh[h], Imm);
    return r.f;
}
template <int Imm>
EMULATED __m512 roundscale_ps(__m512 a) {
    static_assert(Imm >> 4 == 0, "no scale");
    const Any x(a);
    Any r;
    for (int h = 0; h < 2; ++h) r.fh[h] = _mm256_round_ps(x.fh[h], Imm);
    return r.f;
}

// Casts and constants.
EMULATED __m512i castps_si512(__m512 a) { return (__m512i)a; }
EMULATED __m512 castsi512_ps(__m512i a) { return (__m512)a; }
EMULATED __m256i castsi512_si256(__m512i a) { return Any(a).ih[0]; }
EMULATED __m256 castps512_ps256(__m512 a) { return Any(a).fh[0]; }
EMULATED __m512i castsi256_si512(__m256i a) {
    Any r;
    r.ih[0] = a;
    r.ih[1] = _mm256_set1_epi32(0x7fa5a5a5);  // undefined
    return r.i;
}
EMULATED __m512 setzero_ps() {
    Any r;
    r.fh[0] = r.fh[1] = _mm256_setzero_ps();
    return r.f;
}
EMULATED __m512 set1_ps(float x) {
    Any r;
    r.fh[0] = r.fh[1] = _mm256_set1_ps(x);
    return r.f;
}
EMULATED __m512i set1_epi32(int x) {
    Any r;
    r.ih[0] = r.ih[1] = _mm256_set1_epi32(x);
    return r.i;
}
EMULATED __m512i set1_epi8(char x) {
    Any r;
    r.ih[0] = r.ih[1] = _mm256_set1_epi8(x);
    return r.i;
}
template <typename... Ints>
EMULATED __m512i setr_epi32(Ints... lanes) {
    static_assert(sizeof...(lanes) == 16);
    const int32_t all[16] = {int32_t(lanes)...};
    Any r;
    std::memcpy(r.i32, all, 64);
    return r.i;
}

// Memory. Masked lanes are not touched.
EMULATED __m512 loadu_ps(const void* p) {
    Any r;
    for (int h = 0; h < 2; ++h) r.fh[h] = _mm256_loadu_ps(static_cast<const float*>(p) + 8 * h);
    return r.f;
}
EMULATED __m512i loadu_si512(const void* p) {
    Any r;
    for (int h = 0; h < 2; ++h) r.ih[h] = _mm256_loadu_si256(static_cast<const __m256i*>(p) + h);
    return r.i;
}
EMULATED __m512i load_si512(const void* p) {
    need_aligned(p);
    return loadu_si512(p);
}
EMULATED void storeu_ps(void* p, __m512 a) {
    const Any x(a);
    for (int h = 0; h < 2; ++h) _mm256_storeu_ps(static_cast<float*>(p) + 8 * h, x.fh[h]);
}
EMULATED void storeu_si512(void* p, __m512i a) {
    const Any x(a);
    for (int h = 0; h < 2; ++h) _mm256_storeu_si256(static_cast<__m256i*>(p) + h, x.ih[h]);
}
EMULATED void stream_si512(void* p, __m512i a) {
    need_aligned(p);
    storeu_si512(p, a);
}
inline __m512i maskz_loadu_epi32(__mmask16 k, const void* p) {
    Any r;
    for (int i = 0; i < 16; ++i) {
        r.i32[i] = 0;
        if (k >> i & 1) std::memcpy(&r.i32[i], static_cast<const char*>(p) + 4 * i, 4);
    }
    return r.i;
}
inline __m512 maskz_loadu_ps(__mmask16 k, const void* p) { return castsi512_ps(maskz_loadu_epi32(k, p)); }
inline void mask_storeu_epi32(void* p, __mmask16 k, __m512i a) {
    const Any x(a);
    for (int i = 0; i < 16; ++i)
        if (k >> i & 1) std::memcpy(static_cast<char*>(p) + 4 * i, &x.i32[i], 4);
}
inline void mask_storeu_ps(void* p, __mmask16 k, __m512 a) { mask_storeu_epi32(p, k, castps_si512(a)); }

// Masks.
template <int Imm>
EMULATED __mmask16 cmp_ps_mask(__m512 a, __m512 b) {
    const Any x(a), y(b);
    return __mmask16(_mm256_movemask_ps(_mm256_cmp_ps(x.fh[0], y.fh[0], Imm)) |
                     _mm256_movemask_ps(_mm256_cmp_ps(x.fh[1], y.fh[1], Imm)) << 8);
}
EMULATED __mmask16 movepi32_mask(__m512i a) {
    const Any x(a);
    return __mmask16(_mm256_movemask_ps(x.fh[0]) | _mm256_movemask_ps(x.fh[1]) << 8);
}
EMULATED __mmask16 cmpeq_epi32_mask(__m512i a, __m512i b) {
    const Any x(a), y(b);
    Any r;
    for (int h = 0; h < 2; ++h) r.ih[h] = _mm256_cmpeq_epi32(x.ih[h], y.ih[h]);
    return movepi32_mask(r.i);
}
EMULATED __m512i mask_blend_epi32(__mmask16 k, __m512i a, __m512i b) {  // b where the bit is 1
    const Any x(a), y(b);
    const __m256i bits = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    Any r;
    for (int h = 0; h < 2; ++h) {
        const __m256i set = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(k >> 8 * h), bits), bits);
        r.ih[h] = _mm256_blendv_epi8(x.ih[h], y.ih[h], set);
    }
    return r.i;
}
EMULATED __m512 mask_blend_ps(__mmask16 k, __m512 a, __m512 b) {
    return castsi512_ps(mask_blend_epi32(k, castps_si512(a), castps_si512(b)));
}
EMULATED __m512i mask_blend_epi16(__mmask32 k, __m512i a, __m512i b) {
    const Any x(a), y(b);
    Any r;
    for (int i = 0; i < 32; ++i) r.u16[i] = k >> i & 1 ? y.u16[i] : x.u16[i];
    return r.i;
}

// Lanes that go elsewhere.
template <int Imm>
EMULATED __m512i shuffle_i32x4(__m512i a, __m512i b) {
    const Any x(a), y(b);
    Any r;
    for (int lane = 0; lane < 4; ++lane) {
        const int from = Imm >> 2 * lane & 3;
        for (int i = 0; i < 2; ++i) r.u64[2 * lane + i] = (lane < 2 ? x : y).u64[2 * from + i];
    }
    return r.i;
}
template <int Imm>
EMULATED __m512 shuffle_f32x4(__m512 a, __m512 b) {
    return castsi512_ps(shuffle_i32x4<Imm>(castps_si512(a), castps_si512(b)));
}
EMULATED __m512i permutexvar_epi32(__m512i index, __m512i a) {
    const Any x(a), n(index);
    Any r;
    for (int i = 0; i < 16; ++i) r.u32[i] = x.u32[n.u32[i] & 15];
    return r.i;
}
EMULATED __m512i permutexvar_epi16(__m512i index, __m512i a) {
    const Any x(a), n(index);
    Any r;
    for (int i = 0; i < 32; ++i) r.u16[i] = x.u16[n.u16[i] & 31];
    return r.i;
}
EMULATED __m512i permutex2var_epi16(__m512i a, __m512i index, __m512i b) {
    const Any x(a), y(b), n(index);
    Any r;
    for (int i = 0; i < 32; ++i) r.u16[i] = (n.u16[i] & 32 ? y : x).u16[n.u16[i] & 31];
    return r.i;
}
template <int Half>
EMULATED __m512i inserti64x4(__m512i a, __m256i b) {
    Any r(a);
    r.ih[Half] = b;
    return r.i;
}
template <int Half>
EMULATED __m256i extracti64x4_epi64(__m512i a) {
    return Any(a).ih[Half];
}
template <int Half>
EMULATED __m256 extractf32x8_ps(__m512 a) {
    return Any(a).fh[Half];
}

// Other widths.
EMULATED __m512i broadcast_i32x4(__m128i a) {
    Any r;
    r.ih[0] = r.ih[1] = _mm256_broadcastsi128_si256(a);
    return r.i;
}
EMULATED __m512i cvtepi8_epi32(__m128i a) {
    Any r;
    r.ih[0] = _mm256_cvtepi8_epi32(a);
    r.ih[1] = _mm256_cvtepi8_epi32(_mm_srli_si128(a, 8));
    return r.i;
}
EMULATED __m512i cvtepu8_epi32(__m128i a) {
    Any r;
    r.ih[0] = _mm256_cvtepu8_epi32(a);
    r.ih[1] = _mm256_cvtepu8_epi32(_mm_srli_si128(a, 8));
    return r.i;
}
EMULATED __m512i cvtepu16_epi32(__m256i a) {
    Any r;
    r.ih[0] = _mm256_cvtepu16_epi32(_mm256_castsi256_si128(a));
    r.ih[1] = _mm256_cvtepu16_epi32(_mm256_extracti128_si256(a, 1));
    return r.i;
}
EMULATED __m256i cvtepi32_epi16(__m512i a) {  // truncates
    const Any x(a);
    union {
        uint16_t u16[16];
        __m256i v;
    } r;
    for (int i = 0; i < 16; ++i) r.u16[i] = uint16_t(x.u32[i]);
    return r.v;
}
EMULATED __m128i cvtepi32_epi8(__m512i a) {
    const Any x(a);
    union {
        uint8_t u8[16];
        __m128i v;
    } r;
    for (int i = 0; i < 16; ++i) r.u8[i] = uint8_t(x.u32[i]);
    return r.v;
}

EMULATED __m512 abs_ps(__m512 a) { return castsi512_ps(and_si512(castps_si512(a), set1_epi32(0x7fffffff))); }

// Of all lanes; the order is that of GCC's header.
EMULATED int reduce_add_epi32(__m512i a) {
    const Any x(a);
    uint32_t sum = 0;
    for (int i = 0; i < 16; ++i) sum += x.u32[i];
    return int(sum);
}
EMULATED int reduce_max_epi32(__m512i a) {
    const Any x(a);
    int32_t most = x.i32[0];
    for (int i = 1; i < 16; ++i) most = x.i32[i] > most ? x.i32[i] : most;
    return most;
}
EMULATED float reduce_max_ps(__m512 a) {
    const Any x(a);
    const __m256 half = _mm256_max_ps(x.fh[1], x.fh[0]);
    const __m128 quarter = _mm_max_ps(_mm256_extractf128_ps(half, 1), _mm256_castps256_ps128(half));
    const __m128 pair = _mm_max_ps(quarter, _mm_shuffle_ps(quarter, quarter, 0x4e));
    return _mm_cvtss_f32(_mm_max_ps(pair, _mm_shuffle_ps(pair, pair, 0xb1)));
}

// a 2^floor(b), rounded once; subnormal operands and results as MXCSR says.
inline __m512 scalef_ps(__m512 a, __m512 b) {
    const bool daz = _mm_getcsr() & 0x40, ftz = _mm_getcsr() & 0x8000;
    const Any x(a), y(b);
    Any r;
    for (int i = 0; i < 16; ++i) {
        float number = x.f32[i];
        const float power = std::floor(y.f32[i]);
        if (daz && std::fpclassify(number) == FP_SUBNORMAL) number = std::copysign(0.0f, number);
        if (number != number || power != power)
            r.f32[i] = number + power;
        else if (std::isinf(power))
            r.f32[i] = power > 0 ? number * INFINITY : std::isinf(number) ? NAN : std::copysign(0.0f, number);
        else
            r.f32[i] = float(std::ldexp(double(number), int(std::fmin(std::fmax(power, -600.0f), 600.0f))));
        if (ftz && std::fpclassify(r.f32[i]) == FP_SUBNORMAL) r.f32[i] = std::copysign(0.0f, r.f32[i]);
    }
    return r.f;
}

// Within 2^-14 of 1 / a: as wrong as it may be, one way in even lanes and the other in odd ones; exact for powers of 2.
inline __m512 rcp14_ps(__m512 a) {
    const Any x(a);
    Any r;
    for (int i = 0; i < 16; ++i) {
        const double exact = 1.0 / double(x.f32[i]);
        const bool is_exact = (x.u32[i] & 0x7fffff) == 0;
        r.f32[i] = float(is_exact ? exact : exact * (1.0 + (i % 2 ? 0.99 : -0.99) * 0x1p-14));
    }
    return r.f;
}

// c + two products of words.
EMULATED __m512i dpwssd_epi32(__m512i c, __m512i a, __m512i b) {
    const Any x(a), y(b);
    Any r(c);
    for (int h = 0; h < 2; ++h) r.ih[h] = _mm256_add_epi32(r.ih[h], _mm256_madd_epi16(x.ih[h], y.ih[h]));
    return r.i;
}
// c + four products of an unsigned byte of a and a signed one of b; sums wrap.
EMULATED __m512i dpbusd_epi32(__m512i c, __m512i a, __m512i b) {
    const Any x(a), y(b);
    Any r(c);
    const __m256i low = _mm256_set1_epi16(255), ones = _mm256_set1_epi16(1);
    (void)ones;
    for (int h = 0; h < 2; ++h) {
        // Even and odd bytes as words: a product of one pair fits 16 bits with its sign, and madd sums two in 32.
        const __m256i ue = _mm256_and_si256(x.ih[h], low), uo = _mm256_srli_epi16(x.ih[h], 8);
        const __m256i se = _mm256_srai_epi16(_mm256_slli_epi16(y.ih[h], 8), 8), so = _mm256_srai_epi16(y.ih[h], 8);
        r.ih[h] = _mm256_add_epi32(r.ih[h], _mm256_add_epi32(_mm256_madd_epi16(ue, se), _mm256_madd_epi16(uo, so)));
    }
    return r.i;
}

#if defined(MOESAIC_EMULATE_BF16)
// Subnormals are zeros, whatever MXCSR says; NaN becomes quiet; to nearest, ties to even.
EMULATED __m256i rounded_bf16(__m512 a) {
    const Any x(a);
    union {
        uint16_t u16[16];
        __m256i v;
    } r;
    for (int i = 0; i < 16; ++i) {
        const uint32_t bits = x.u32[i], size = bits & 0x7fffffff;
        const uint32_t normal = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
        r.u16[i] = uint16_t(size < 0x00800000     ? bits >> 16 & 0x8000
                            : size > 0x7f800000 ? bits >> 16 | 0x40
                                                : normal);
    }
    return r.v;
}
EMULATED __m256bh cvtneps_pbh(__m512 a) { return (__m256bh)rounded_bf16(a); }
EMULATED __m512bh cvtne2ps_pbh(__m512 high, __m512 low) {
    Any r;
    r.ih[0] = rounded_bf16(low);
    r.ih[1] = rounded_bf16(high);
    return (__m512bh)r.i;
}
// c + the product of the high halves, then + that of the low ones: two fused operations, whose subnormal operands and
// results are zeros and whose rounding is to nearest, whatever MXCSR says.
inline __m512 dpbf16_ps(__m512 c, __m512bh a, __m512bh b) {
    const Any x((__m512i)a), y((__m512i)b);
    Any r(c);
    const __m256i high = _mm256_set1_epi32(int(0xffff0000u));
    const unsigned before = _mm_getcsr();
    _mm_setcsr(0x9fc0);
    for (int h = 0; h < 2; ++h) {
        const __m256 low_x = _mm256_castsi256_ps(_mm256_slli_epi32(x.ih[h], 16));
        const __m256 low_y = _mm256_castsi256_ps(_mm256_slli_epi32(y.ih[h], 16));
        const __m256 high_x = _mm256_castsi256_ps(_mm256_and_si256(x.ih[h], high));
        const __m256 high_y = _mm256_castsi256_ps(_mm256_and_si256(y.ih[h], high));
        __m256 sum = r.fh[h];
        asm volatile("vfmadd231ps %1, %2, %0" : "+x"(sum) : "x"(high_x), "x"(high_y));
        asm volatile("vfmadd231ps %1, %2, %0" : "+x"(sum) : "x"(low_x), "x"(low_y));
        r.fh[h] = sum;
    }
    _mm_setcsr(before);
    return r.f;
}
#endif

#undef EMULATED_FLOAT2
#undef EMULATED_INT2
#undef EMULATED_BITS2
#undef EMULATED_SHIFT
#undef EMULATED

}  // namespace emulated_avx512

// After the compiler's own headers, whose names these are.
#undef _mm512_abs_ps
#define _mm512_abs_ps emulated_avx512::abs_ps
#undef _mm512_add_epi16
#define _mm512_add_epi16 emulated_avx512::add_epi16
#undef _mm512_mulhi_epu16
#define _mm512_mulhi_epu16 emulated_avx512::mulhi_epu16
#undef _mm512_mullo_epi16
#define _mm512_mullo_epi16 emulated_avx512::mullo_epi16
#undef _mm512_add_epi32
#define _mm512_add_epi32 emulated_avx512::add_epi32
#undef _mm512_add_ps
#define _mm512_add_ps emulated_avx512::add_ps
#undef _mm512_and_si512
#define _mm512_and_si512 emulated_avx512::and_si512
#undef _mm512_andnot_si512
#define _mm512_andnot_si512 emulated_avx512::andnot_si512
#undef _mm512_broadcast_i32x4
#define _mm512_broadcast_i32x4 emulated_avx512::broadcast_i32x4
#undef _mm512_castps512_ps256
#define _mm512_castps512_ps256 emulated_avx512::castps512_ps256
#undef _mm512_castps_si512
#define _mm512_castps_si512 emulated_avx512::castps_si512
#undef _mm512_castsi256_si512
#define _mm512_castsi256_si512 emulated_avx512::castsi256_si512
#undef _mm512_castsi512_ps
#define _mm512_castsi512_ps emulated_avx512::castsi512_ps
#undef _mm512_castsi512_si256
#define _mm512_castsi512_si256 emulated_avx512::castsi512_si256
#undef _mm512_cmp_ps_mask
#define _mm512_cmp_ps_mask(a, b, imm) emulated_avx512::cmp_ps_mask<(imm)>(a, b)
#undef _mm512_cmpeq_epi32_mask
#define _mm512_cmpeq_epi32_mask emulated_avx512::cmpeq_epi32_mask
#undef _mm512_cvtepi32_epi16
#define _mm512_cvtepi32_epi16 emulated_avx512::cvtepi32_epi16
#undef _mm512_cvtepi32_epi8
#define _mm512_cvtepi32_epi8 emulated_avx512::cvtepi32_epi8
#undef _mm512_cvtepi32_ps
#define _mm512_cvtepi32_ps emulated_avx512::cvtepi32_ps
#undef _mm512_cvtepi8_epi32
#define _mm512_cvtepi8_epi32 emulated_avx512::cvtepi8_epi32
#undef _mm512_cvtepu8_epi32
#define _mm512_cvtepu8_epi32 emulated_avx512::cvtepu8_epi32
#undef _mm512_cvtepu16_epi32
#define _mm512_cvtepu16_epi32 emulated_avx512::cvtepu16_epi32
#undef _mm512_cvtne2ps_pbh
#define _mm512_cvtne2ps_pbh emulated_avx512::cvtne2ps_pbh
#undef _mm512_cvtneps_pbh
#define _mm512_cvtneps_pbh emulated_avx512::cvtneps_pbh
#undef _mm512_cvtps_epi32
#define _mm512_cvtps_epi32 emulated_avx512::cvtps_epi32
#undef _mm512_div_ps
#define _mm512_div_ps emulated_avx512::div_ps
#undef _mm512_dpbf16_ps
#define _mm512_dpbf16_ps emulated_avx512::dpbf16_ps
#undef _mm512_dpwssd_epi32
#define _mm512_dpwssd_epi32 emulated_avx512::dpwssd_epi32
#undef _mm512_dpbusd_epi32
#define _mm512_dpbusd_epi32 emulated_avx512::dpbusd_epi32
#undef _mm512_extractf32x8_ps
#define _mm512_extractf32x8_ps(a, imm) emulated_avx512::extractf32x8_ps<(imm)>(a)
#undef _mm512_extracti64x4_epi64
#define _mm512_extracti64x4_epi64(a, imm) emulated_avx512::extracti64x4_epi64<(imm)>(a)
#undef _mm512_fmadd_ps
#define _mm512_fmadd_ps emulated_avx512::fmadd_ps
#undef _mm512_inserti64x4
#define _mm512_inserti64x4(a, b, imm) emulated_avx512::inserti64x4<(imm)>(a, b)
#undef _mm512_load_si512
#define _mm512_load_si512 emulated_avx512::load_si512
#undef _mm512_loadu_ps
#define _mm512_loadu_ps emulated_avx512::loadu_ps
#undef _mm512_loadu_si512
#define _mm512_loadu_si512 emulated_avx512::loadu_si512
#undef _mm512_mask_blend_epi16
#define _mm512_mask_blend_epi16 emulated_avx512::mask_blend_epi16
#undef _mm512_mask_blend_epi32
#define _mm512_mask_blend_epi32 emulated_avx512::mask_blend_epi32
#undef _mm512_mask_blend_ps
#define _mm512_mask_blend_ps emulated_avx512::mask_blend_ps
#undef _mm512_mask_storeu_epi32
#define _mm512_mask_storeu_epi32 emulated_avx512::mask_storeu_epi32
#undef _mm512_mask_storeu_ps
#define _mm512_mask_storeu_ps emulated_avx512::mask_storeu_ps
#undef _mm512_maskz_loadu_epi32
#define _mm512_maskz_loadu_epi32 emulated_avx512::maskz_loadu_epi32
#undef _mm512_maskz_loadu_ps
#define _mm512_maskz_loadu_ps emulated_avx512::maskz_loadu_ps
#undef _mm512_max_epi32
#define _mm512_max_epi32 emulated_avx512::max_epi32
#undef _mm512_max_ps
#define _mm512_max_ps emulated_avx512::max_ps
#undef _mm512_min_ps
#define _mm512_min_ps emulated_avx512::min_ps
#undef _mm512_movepi32_mask
#define _mm512_movepi32_mask emulated_avx512::movepi32_mask
#undef _mm512_mul_ps
#define _mm512_mul_ps emulated_avx512::mul_ps
#undef _mm512_or_si512
#define _mm512_or_si512 emulated_avx512::or_si512
#undef _mm512_packs_epi16
#define _mm512_packs_epi16 emulated_avx512::packs_epi16
#undef _mm512_packs_epi32
#define _mm512_packs_epi32 emulated_avx512::packs_epi32
#undef _mm512_permute_ps
#define _mm512_permute_ps(a, imm) emulated_avx512::permute_ps<(imm)>(a)
#undef _mm512_permutex2var_epi16
#define _mm512_permutex2var_epi16 emulated_avx512::permutex2var_epi16
#undef _mm512_permutexvar_epi16
#define _mm512_permutexvar_epi16 emulated_avx512::permutexvar_epi16
#undef _mm512_permutexvar_epi32
#define _mm512_permutexvar_epi32 emulated_avx512::permutexvar_epi32
#undef _mm512_rcp14_ps
#define _mm512_rcp14_ps emulated_avx512::rcp14_ps
#undef _mm512_reduce_add_epi32
#define _mm512_reduce_add_epi32 emulated_avx512::reduce_add_epi32
#undef _mm512_reduce_max_epi32
#define _mm512_reduce_max_epi32 emulated_avx512::reduce_max_epi32
#undef _mm512_reduce_max_ps
#define _mm512_reduce_max_ps emulated_avx512::reduce_max_ps
#undef _mm512_roundscale_ps
#define _mm512_roundscale_ps(a, imm) emulated_avx512::roundscale_ps<(imm)>(a)
#undef _mm512_scalef_ps
#define _mm512_scalef_ps emulated_avx512::scalef_ps
#undef _mm512_set1_epi32
#define _mm512_set1_epi32 emulated_avx512::set1_epi32
#undef _mm512_set1_epi8
#define _mm512_set1_epi8 emulated_avx512::set1_epi8
#undef _mm512_set1_ps
#define _mm512_set1_ps emulated_avx512::set1_ps
#undef _mm512_setr_epi32
#define _mm512_setr_epi32 emulated_avx512::setr_epi32
#undef _mm512_setzero_ps
#define _mm512_setzero_ps emulated_avx512::setzero_ps
#undef _mm512_shuffle_epi8
#define _mm512_shuffle_epi8 emulated_avx512::shuffle_epi8
#undef _mm512_shuffle_f32x4
#define _mm512_shuffle_f32x4(a, b, imm) emulated_avx512::shuffle_f32x4<(imm)>(a, b)
#undef _mm512_shuffle_i32x4
#define _mm512_shuffle_i32x4(a, b, imm) emulated_avx512::shuffle_i32x4<(imm)>(a, b)
#undef _mm512_slli_epi32
#define _mm512_slli_epi32 emulated_avx512::slli_epi32
#undef _mm512_sqrt_ps
#define _mm512_sqrt_ps emulated_avx512::sqrt_ps
#undef _mm512_srai_epi32
#define _mm512_srai_epi32 emulated_avx512::srai_epi32
#undef _mm512_srli_epi16
#define _mm512_srli_epi16 emulated_avx512::srli_epi16
#undef _mm512_srli_epi32
#define _mm512_srli_epi32 emulated_avx512::srli_epi32
#undef _mm512_storeu_ps
#define _mm512_storeu_ps emulated_avx512::storeu_ps
#undef _mm512_storeu_si512
#define _mm512_storeu_si512 emulated_avx512::storeu_si512
#undef _mm512_stream_si512
#define _mm512_stream_si512 emulated_avx512::stream_si512
#undef _mm512_sub_epi32
#define _mm512_sub_epi32 emulated_avx512::sub_epi32
#undef _mm512_subs_epu16
#define _mm512_subs_epu16 emulated_avx512::subs_epu16
#undef _mm512_sub_ps
#define _mm512_sub_ps emulated_avx512::sub_ps
#undef _mm512_unpackhi_epi32
#define _mm512_unpackhi_epi32 emulated_avx512::unpackhi_epi32
#undef _mm512_unpackhi_epi64
#define _mm512_unpackhi_epi64 emulated_avx512::unpackhi_epi64
#undef _mm512_unpacklo_epi32
#define _mm512_unpacklo_epi32 emulated_avx512::unpacklo_epi32
#undef _mm512_unpacklo_epi64
#define _mm512_unpacklo_epi64 emulated_avx512::unpacklo_epi64
#undef _mm512_xor_si512
#define _mm512_xor_si512 emulated_avx512::xor_si512
