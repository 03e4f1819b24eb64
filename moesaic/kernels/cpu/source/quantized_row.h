// Rows of activations, rotated (but for MXFP4) and rounded to 8 bits as kernels/quantized.py defines it, to the bit.
#pragma once

#include <algorithm>
#include <type_traits>

#include "elements.h"
#include "parallel.h"
#include "expanded.h"
#include "tiles.h"

namespace moesaic {

// Columns that are rotated together: the largest power of two that divides K.
inline int64_t rotation_size(int64_t depth) { return depth & -depth; }

template <int H>
constexpr float sign(int lane) {
    return lane & H ? -1.0f : 1.0f;
}
// Lane i: the sum with lane i ^ H, or in the upper one of the two the lower minus itself.
template <int H>
inline Vf lane_butterfly(Vf x) {
    alignas(64) static constexpr float kSigns[16] = {
        sign<H>(0), sign<H>(1), sign<H>(2),  sign<H>(3),  sign<H>(4),  sign<H>(5),  sign<H>(6),  sign<H>(7),
        sign<H>(8), sign<H>(9), sign<H>(10), sign<H>(11), sign<H>(12), sign<H>(13), sign<H>(14), sign<H>(15)};
    return fma(x, load(kSigns), swap_lanes<H>(x));  // one rounding, that of the sum
}

// The butterflies of vectors 1, 2, 4 .. apart.
template <int N>
inline void vector_butterflies(Vf (&x)[N]) {
#pragma GCC unroll 4
    for (int h = 1; h < N; h *= 2)
#pragma GCC unroll 16
        for (int i = 0; i < N; ++i)
            if (!(i & h)) {
                const Vf a = x[i], b = x[i + h];
                x[i] = add(a, b);
                x[i + h] = sub(a, b);
            }
}

// Size neighbouring numbers, at most what registers hold; load(i) is vector i of them.
template <int Size, typename Load>
inline void rotate_neighbours(float* x, Load&& load) {
    constexpr int N = Size < W ? 1 : Size / W;
    Vf v[N];
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i) {
        v[i] = load(i);
        if constexpr (Size > 1) v[i] = lane_butterfly<1>(v[i]);
        if constexpr (Size > 2) v[i] = lane_butterfly<2>(v[i]);
        if constexpr (Size > 4) v[i] = lane_butterfly<4>(v[i]);
        if constexpr (Size > 8 && W > 8) v[i] = lane_butterfly<8>(v[i]);
    }
    vector_butterflies(v);
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i) store(x + i * W, v[i]);
}

// Rows of N numbers `apart`, of `size` numbers in all.
template <int N>
inline void rotate_apart(float* x, int64_t apart, int64_t size) {
    for (int64_t first = 0; first < size; first += N * apart)
        for (int64_t j = 0; j < apart; j += W) {
            Vf v[N];
#pragma GCC unroll 8
            for (int i = 0; i < N; ++i) v[i] = load(x + first + i * apart + j);
            vector_butterflies(v);
#pragma GCC unroll 8
            for (int i = 0; i < N; ++i) store(x + first + i * apart + j, v[i]);
        }
}

// Blocks of `size` numbers, or where that is more than registers hold, of as many as they do.
template <int Most, typename T>
inline void rotate_blocks(const T* x, int64_t depth, int64_t size, float* to) {
    if (size < Most) {
        if constexpr (Most > 1) rotate_blocks<Most / 2>(x, depth, size, to);
        return;
    }
    for (int64_t k = 0; k < depth; k += std::max(Most, W))
        rotate_neighbours<Most>(to + k, [&](int i) {
            if constexpr (Most >= W) return load_values(x + k + i * W);
            return load_row(x + k, depth - k);
        });
}

// `depth` numbers x times the Hadamard matrix of rotation_size, block by block, to fp32; there is room for whole vectors.
template <typename T>
inline void rotate(const T* x, int64_t depth, float* to) {
    constexpr int kMost = W == 16 ? 256 : 64;
    const int64_t size = rotation_size(depth);
    rotate_blocks<kMost>(x, depth, size, to);
    for (int64_t apart = kMost; apart < size;) {
        const int64_t left = size / apart;
        if (left >= 8) {
            rotate_apart<8>(to, apart, depth);
            apart *= 8;
        } else if (left == 4) {
            rotate_apart<4>(to, apart, depth);
            apart *= 4;
        } else {
            rotate_apart<2>(to, apart, depth);
            apart *= 2;
        }
    }
}

// Whether products of 8 bits multiply the weights with their offset. Those of AVX2 alone take it off first, so that two
// products fit 16 bits.
constexpr bool kMultipliesOffset = kHasByteProducts;

// A row of K activations as integer weights multiply it: bytes, zero up to a whole block of 128, and behind them what
// takes the weights' offset off again. An offset of 128 adds 128 times the sum of the row to every sum; `start` is minus
// that. For 4 bits, whose offset is 8, every 32 columns have a start of their own besides; for MXFP4, whose offset is 12,
// they have a tail of their own instead. Where there are tiles, a row of MXFP4 has whole numbers up to 255, of which vectors
// multiply a byte, the magnitude, with weights whose signs are turned where another byte says so, and tiles the bf16 number
// that each is times its scale, a power of two.
struct RowTail {
    float scale;
    int32_t start;
};
enum class RowForm { kBytes, kNibbles, kMxfp4 };
struct QuantizedRow {
    static constexpr int kBlock = 128, kRun = 32, kRuns = kBlock / kRun;
    static constexpr size_t kStartsOfBlock = kRuns * sizeof(int32_t), kTailsOfBlock = kRuns * sizeof(RowTail);
    int blocks;
    RowForm form;

    QuantizedRow(int64_t depth, RowForm of_form) : blocks(int((depth + kBlock - 1) / kBlock)), form(of_form) {}
    bool has_signs() const { return kHasTiles && form == RowForm::kMxfp4; }
    size_t signs() const { return size_t(blocks) * kBlock; }  // where has_signs(): 0x88 for those below 0
    size_t tail() const { return size_t(blocks) * kBlock * (has_signs() ? 2 : 1); }
    size_t starts() const { return tail() + sizeof(RowTail); }
    size_t numbers() const { return (tail() + size_t(blocks) * kTailsOfBlock + 63) / 64 * 64; }  // in bf16, likewise
    size_t bytes() const {
        if (has_signs()) return numbers() + size_t(blocks) * kBlock * sizeof(bf16);
        if (form == RowForm::kMxfp4) return tail() + size_t(blocks) * kTailsOfBlock;
        return starts() + (form == RowForm::kNibbles ? size_t(blocks) * kStartsOfBlock : 0);
    }
};

#if defined(__AVX512F__)

inline Vf largest_magnitude(Vf a, Vf b) {  // of bits, so that NaN is above all
    return {_mm512_castsi512_ps(_mm512_max_epi32(_mm512_castps_si512(a.v),
                                                 _mm512_castps_si512(_mm512_abs_ps(b.v))))};
}
inline int32_t largest_bits(Vf x) { return _mm512_reduce_max_epi32(_mm512_castps_si512(x.v)); }

// 32 numbers times the factor, rounded, and their sum.
inline int32_t round_to_bytes(const float* x, Vf factor, int8_t* to) {
    const __m512i low = to_int(mul(load(x), factor)).v, high = to_int(mul(load(x + 16), factor)).v;
    _mm_storeu_si128((__m128i*)to, _mm512_cvtepi32_epi8(low));
    _mm_storeu_si128((__m128i*)(to + 16), _mm512_cvtepi32_epi8(high));
    return _mm512_reduce_add_epi32(_mm512_add_epi32(low, high));
}
// 128 numbers likewise; their sums are added to those in `total`, whichever lane.
inline Vi round_to_bytes(const float* x, Vf factor, int8_t* to, Vi total) {
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    for (int half = 0; half < 128; half += 64) {
        __m512i v[4];
        for (int i = 0; i < 4; ++i) v[i] = to_int(mul(load(x + half + 16 * i), factor)).v;
        const __m512i words[2] = {_mm512_packs_epi32(v[0], v[1]), _mm512_packs_epi32(v[2], v[3])};
        const __m512i bytes = _mm512_permutexvar_epi32(order, _mm512_packs_epi16(words[0], words[1]));
        _mm512_storeu_si512(to + half, bytes);
        total.v = _mm512_dpbusd_epi32(total.v, _mm512_set1_epi8(1), bytes);
    }
    return total;
}
inline int32_t sum_lanes(Vi x) { return _mm512_reduce_add_epi32(x.v); }

#else

inline Vf largest_magnitude(Vf a, Vf b) {
    return {_mm256_castsi256_ps(_mm256_max_epi32(_mm256_castps_si256(a.v), _mm256_castps_si256(abs(b).v)))};
}
inline int32_t sum_lanes(Vi x) {
    int32_t lanes[W], total = 0;
    storei(lanes, x);
    for (int32_t lane : lanes) total += lane;
    return total;
}
inline int32_t largest_bits(Vf x) {
    const __m256i all = _mm256_castps_si256(x.v);
    __m128i most = _mm_max_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
    most = _mm_max_epi32(most, _mm_shuffle_epi32(most, 0x4e));
    return _mm_cvtsi128_si32(_mm_max_epi32(most, _mm_shuffle_epi32(most, 0xb1)));
}
inline int32_t round_to_bytes(const float* x, Vf factor, int8_t* to) {
    Vi total = set1i(0);
    for (int i = 0; i < 32; i += W) {
        const Vi rounded = to_int(mul(load(x + i), factor));
        const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(rounded.v), _mm256_extracti128_si256(rounded.v, 1));
        _mm_storel_epi64((__m128i*)(to + i), _mm_packs_epi16(words, words));
        total = addi(total, rounded);
    }
    return sum_lanes(total);
}
inline Vi round_to_bytes(const float* x, Vf factor, int8_t* to, Vi total) {
    int32_t sum = 0;
    for (int i = 0; i < 128; i += 32) sum += round_to_bytes(x + i, factor, to + i);
    int32_t lanes[W] = {sum};
    return addi(total, loadi(lanes));
}

#endif

// The largest magnitude of numbers in whole vectors; NaN where there is one.
inline float largest_of(const float* numbers, int64_t count) {
    Vf largest = zero();
    for (int64_t k = 0; k < count; k += W) largest = largest_magnitude(largest, load(numbers + k));
    const int32_t bits = largest_bits(largest);
    float amax;
    std::memcpy(&amax, &bits, 4);
    return amax;
}

constexpr float kSmallestMagnitude = 0x1p-120f;  // 127 divided by less would leave fp32

// What takes an offset off the products of 32 bytes with nibbles. AVX-512 begins sums of 32 bits with it; without, sums of
// 16 bits do: the low half those of columns 0 and 1 of every four, the high half those of columns 2 and 3.
inline int32_t nibble_start(const int8_t* bytes, int16_t offset) {
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_set1_epi8(1), _mm256_loadu_si256((const __m256i*)bytes));
    __m128i sums = _mm_add_epi16(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
    sums = _mm_add_epi16(sums, _mm_shuffle_epi32(sums, 0x4e));
    sums = _mm_add_epi16(sums, _mm_shuffle_epi32(sums, 0xb1));
    const __m128i words = _mm_mullo_epi16(sums, _mm_set1_epi16(int16_t(-offset)));
    return _mm_cvtsi128_si32(W == 16 ? _mm_madd_epi16(words, _mm_set1_epi16(1)) : words);
}

// As quantize_row, of which every 32 columns are a row and nothing is rotated. The scales are halved, since twice the
// weights are multiplied.
template <typename T>
inline void quantize_mxfp4_row(const QuantizedRow& row, const T* x, int64_t depth, char* to) {
    constexpr int kGroup = QuantizedRow::kRun;
    std::memset(to + depth, 0, row.bytes() - size_t(depth));
    for (int64_t k = 0; k < depth; k += kGroup) {
        alignas(64) float numbers[kGroup];
        for (int i = 0; i < kGroup; i += W) store(numbers + i, load_values(x + k + i));
        const float amax = largest_of(numbers, kGroup);
        const bool is_finite = std::isfinite(amax);
        RowTail tail{is_finite ? 0.0f : NAN, 0};
        int8_t* bytes = reinterpret_cast<int8_t*>(to) + k;
        if (is_finite && amax >= kSmallestMagnitude) {
            tail.scale = amax / 127.0f / 2.0f;
            round_to_bytes(numbers, set1(127.0f / amax), bytes);
            tail.start = nibble_start(bytes, 12);
        } else {
            std::memset(bytes, 0, kGroup);
        }
        std::memcpy(to + row.tail() + size_t(k / kGroup) * sizeof tail, &tail, sizeof tail);
    }
}

// No scale with which tiles multiply MXFP4 is smaller, of rows or of weights, so that no product of two is subnormal.
constexpr int kSmallestPower = 127 - 60;

// 2^(exponent - 127), by its bits.
inline float power_of_2(int32_t exponent) {
    const int32_t bits = exponent << 23;
    float power;
    std::memcpy(&power, &bits, 4);
    return power;
}

// As quantize_mxfp4_row, where there are tiles: whole numbers up to 255, of 32 columns times the smallest power of two of
// which their largest magnitude is less than 255.5.
template <typename T>
inline void quantize_tiles_row(const QuantizedRow& row, const T* x, int64_t depth, char* to) {
    constexpr int kGroup = QuantizedRow::kRun;
    constexpr int32_t kToNextPower = 0x800000 - 0x7f8000;  // lifts the bits of 255.5 = 1.99609375 * 128 to the next exponent
    uint8_t *magnitudes = reinterpret_cast<uint8_t*>(to), *signs = magnitudes + row.signs();
    bf16* own = reinterpret_cast<bf16*>(to + row.numbers());
    std::memset(magnitudes + depth, 0, row.signs() - size_t(depth));
    std::memset(signs + depth, 0, row.numbers() - row.signs() - size_t(depth));
    std::fill(own + depth, own + row.blocks * QuantizedRow::kBlock, bf16(0));
    for (int64_t k = 0; k < depth; k += kGroup) {
        Vf numbers[kGroup / W], largest = zero();
        for (int v = 0; v < kGroup / W; ++v) largest = largest_magnitude(largest, numbers[v] = load_values(x + k + v * W));
        const int32_t bits = largest_bits(largest);
        const bool is_finite = bits < 0x7f800000;
        const int32_t power = is_finite ? std::max(((bits + kToNextPower) >> 23) - 7, kSmallestPower) : 127;
        const Vf factor = set1(power_of_2(254 - power)), scale = set1(is_finite ? power_of_2(power) : NAN);
        for (int v = 0; v < kGroup / W; ++v) {
            const Vi whole = to_int(is_finite ? mul(numbers[v], factor) : zero()), below = shift_right_signed<31>(whole);
            store_bytes(magnitudes + k + v * W, subi(exclusive_or(whole, below), below));
            store_bytes(signs + k + v * W, andi(below, set1i(0x88)));
            store_bf16(own + k + v * W, mul(to_float(whole), scale));
        }
        const RowTail tail{is_finite ? power_of_2(power) / 2.0f : NAN, 0};
        std::memcpy(to + row.tail() + size_t(k / kGroup) * sizeof tail, &tail, sizeof tail);
    }
}

// A row of `depth` fp32 or bf16 numbers.
template <typename T>
inline void quantize_row(const QuantizedRow& row, const T* x, int64_t depth, char* to) {
    if (row.form == RowForm::kMxfp4) {
        row.has_signs() ? quantize_tiles_row(row, x, depth, to) : quantize_mxfp4_row(row, x, depth, to);
        return;
    }
    static thread_local Scratch scratch;
    constexpr int kBlock = QuantizedRow::kBlock;
    const int64_t padded = int64_t(row.blocks) * kBlock;
    float* numbers = scratch.get<float>(size_t(padded));
    rotate(x, depth, numbers);
    std::fill(numbers + depth, numbers + padded, 0.0f);
    const float amax = largest_of(numbers, padded);
    const bool is_finite = std::isfinite(amax);
    if (!(is_finite && amax >= kSmallestMagnitude)) {
        std::memset(to, 0, row.bytes());
        const RowTail tail{is_finite ? 0.0f : NAN, 0};
        std::memcpy(to + row.tail(), &tail, sizeof tail);
        return;
    }
    const Vf factor = set1(127.0f / amax);
    int8_t* values = reinterpret_cast<int8_t*>(to);
    Vi total = set1i(0);
    for (int64_t block = 0; block < padded; block += kBlock)
        total = round_to_bytes(numbers + block, factor, values + block, total);
    const RowTail tail{amax / 127.0f, kMultipliesOffset ? -128 * sum_lanes(total) : 0};
    if (row.form == RowForm::kNibbles) {
        char* to_start = to + row.starts();
        for (int64_t k = 0; k < padded; k += QuantizedRow::kRun, to_start += sizeof(int32_t)) {
            const int32_t start = nibble_start(values + k, 8);
            std::memcpy(to_start, &start, sizeof start);
        }
    }
    std::memcpy(to + row.tail(), &tail, sizeof tail);
}

}  // namespace moesaic
