// Weights on their way into the packed form: rounded to 8 or 4 bits, and brought into panels. kernels/quantized.py,
// kernels/mxfp4.py and kernels/packed.py are the definitions, to the bit.
#pragma once

#include <algorithm>

#include "elements.h"
#include "packed.h"
#include "parallel.h"
#include "quantized_row.h"
#include "transpose.h"

namespace moesaic {

// `rows` rows (rows, depth), one after the other.
struct WeightRows {
    const void* numbers;
    bool is_bf16;
    int64_t rows, depth;
};

// A row times the Hadamard matrix and a scale, a power of two, to fp32; there is room for whole vectors, with zeros behind
// the row.
inline void rotated_row(const WeightRows& weight, int64_t row, float scale, float* to) {
    const int64_t depth = weight.depth;
    with_element_type(weight.is_bf16, [&](auto kind) {
        using T = decltype(kind);
        rotate(static_cast<const T*>(weight.numbers) + row * depth, depth, to);
    });
    for (int64_t k = 0; k < depth; k += W) store(to + k, mul(load(to + k), set1(scale)));
    std::fill(to + depth, to + (depth + W - 1) / W * W, 0.0f);
}

constexpr int64_t kRowsOfTask = 16;

// Calls each(row, room for its numbers) for every row.
template <typename Each>
inline void for_weight_rows(Team& team, const WeightRows& weight, Each&& each) {
    static thread_local Scratch scratch;
    float* numbers = scratch.get<float>(size_t(weight.depth + W));
    team.tasks(long((weight.rows + kRowsOfTask - 1) / kRowsOfTask), [&](long task) {
        const int64_t first = task * kRowsOfTask, last = std::min(first + kRowsOfTask, weight.rows);
        for (int64_t row = first; row < last; ++row) each(row, numbers);
    });
}

// out (rows, depth): every row rotated, times scale.
inline void rotate_rows(Team& team, const WeightRows& weight, float scale, float* out) {
    for_weight_rows(team, weight, [&](int64_t row, float* numbers) {
        rotated_row(weight, row, scale, numbers);
        std::memcpy(out + row * weight.depth, numbers, size_t(weight.depth) * sizeof(float));
    });
}

// Numbers in whole multiples of a scale (of 1 where it is 0), clamped, in place.
inline void round_to_scale(float* numbers, int64_t count, float scale, float lowest, float highest) {
    const Vf divisor = set1(scale == 0.0f ? 1.0f : scale), low = set1(lowest), high = set1(highest);
    for (int64_t k = 0; k < count; k += W)
        store(numbers + k, round(min(max(div(load(numbers + k), divisor), low), high)));
}

// values (rows, depth) and a scale for each row: the largest magnitude becomes 127.
inline void quantize_to_bytes(Team& team, const WeightRows& weight, int8_t* values, float* scales) {
    const float by_size = 1.0f / float(rotation_size(weight.depth));
    for_weight_rows(team, weight, [&](int64_t row, float* numbers) {
        rotated_row(weight, row, by_size, numbers);
        scales[row] = largest_of(numbers, weight.depth) / 127.0f;
        round_to_scale(numbers, weight.depth, scales[row], -127.0f, 127.0f);
        int8_t* to = values + row * weight.depth;
        for (int64_t k = 0; k < weight.depth; ++k) to[k] = int8_t(numbers[k]);
    });
}

// The sum of `count` numbers, a power of two and whole vectors: of halves added up until one is left.
inline float tree_sum(float* numbers, int64_t count) {
    for (count /= 2; count >= W; count /= 2)
        for (int64_t k = 0; k < count; k += W) store(numbers + k, add(load(numbers + k), load(numbers + count + k)));
    for (; count > 0; count /= 2)
        for (int64_t k = 0; k < count; ++k) numbers[k] += numbers[k + count];
    return numbers[0];
}

// A group's numbers in whole multiples of a step times the row's scale, -8 to 7, and the sum of their squared errors.
inline float round_to_level(const float* numbers, int64_t group, float level, float* rounded) {
    alignas(64) float errors[128];
    std::copy(numbers, numbers + group, rounded);
    round_to_scale(rounded, group, level, -8.0f, 7.0f);
    for (int64_t k = 0; k < group; k += W) {
        const Vf error = sub(mul(load(rounded + k), set1(level)), load(numbers + k));
        store(errors + k, mul(error, error));
    }
    return tree_sum(errors, group);
}

// values (rows, depth / 2) of two nibbles, the first in the low one, steps (rows, depth / group) and a scale for each row,
// of which 120 are its largest magnitude. A group's step is the one of three, about where its number of largest magnitude,
// the first of them, becomes -8, that has the smallest error.
inline void quantize_to_nibbles(Team& team, const WeightRows& weight, int64_t group, uint8_t* values, int8_t* steps,
                                float* scales) {
    const float by_size = 1.0f / float(rotation_size(weight.depth));
    for_weight_rows(team, weight, [&](int64_t row, float* numbers) {
        rotated_row(weight, row, by_size, numbers);
        const float scale = scales[row] = largest_of(numbers, weight.depth) / 120.0f;
        int8_t* own = steps + row * (weight.depth / group);
        for (int64_t first = 0; first < weight.depth; first += group) {
            float* of_group = numbers + first;
            const float amax = largest_of(of_group, group);
            const float* extreme = std::find_if(of_group, of_group + group - 1, [&](float x) { return std::fabs(x) == amax; });
            const float reach = scale == 0.0f ? 0.0f : *extreme / (-8.0f * scale), above = std::ceil(std::fabs(reach)),
                        below = std::floor(std::fabs(reach));
            alignas(64) float rounded[2][128];
            int best = 0;
            float least = 0.0f;
            for (const float magnitude : {above, below, below - 1.0f}) {
                const float step = std::copysign(std::clamp(magnitude, 1.0f, 15.0f), reach < 0.0f ? -1.0f : 1.0f);
                const float error = round_to_level(of_group, group, step * scale, rounded[!best]);
                if (magnitude != above && !(error < least)) continue;
                least = error;
                best = !best;
                *own = int8_t(step);
            }
            ++own;
            std::copy(rounded[best], rounded[best] + group, of_group);
        }
        uint8_t* to = values + row * (weight.depth / 2);
        for (int64_t k = 0; k < weight.depth; k += 2)
            to[k / 2] = uint8_t((int(numbers[k]) + 8) | (int(numbers[k + 1]) + 8) << 4);
    });
}

// values (rows, depth / 2) as quantize_to_nibbles and scales (rows, depth / 32) in MXFP4; nothing is rotated.
inline void quantize_to_mxfp4(Team& team, const WeightRows& weight, uint8_t* values, uint8_t* scales) {
    constexpr int kGroup = Mxfp4::kGroup;
    // Lifts the bits of 7.25 and of none below to the next exponent: mxfp4.py says why.
    constexpr int32_t kToNextPower = (1 << 23) - 0x680000;
    for_weight_rows(team, weight, [&](int64_t row, float* numbers) {
        uint8_t* to = values + row * (weight.depth / 2);
        for (int64_t first = 0; first < weight.depth; first += kGroup) {
            with_element_type(weight.is_bf16, [&](auto kind) {
                const auto* from = static_cast<const decltype(kind)*>(weight.numbers) + row * weight.depth + first;
                for (int k = 0; k < kGroup; k += W) store(numbers + k, load_values(from + k));
            });
            const float amax = largest_of(numbers, kGroup);
            int32_t bits;
            std::memcpy(&bits, &amax, 4);
            const int scale = std::clamp(((bits + kToNextPower) >> 23) - 2, 0, Mxfp4::kLargestScale);
            scales[(row * weight.depth + first) / kGroup] = uint8_t(scale);
            const Vf power = set1(std::ldexp(1.0f, scale - 127));
            float codes[kGroup];
            for (int k = 0; k < kGroup; k += W) {
                const Vf x = abs(div(load(numbers + k), power)), two = set1(2.0f), four = set1(4.0f);
                // In steps of a half up to 2, of 1 up to 4, then of 2: 4 codes each, the first of which is the border.
                const Vf of_halves = round(mul(x, two)), of_ones = add(round(x), two);
                const Vf of_twos = min(add(round(mul(x, set1(0.5f))), four), set1(7.0f));
                store(codes + k, select_less(x, two, of_halves, select_less(x, four, of_ones, of_twos)));
            }
            const auto nibble = [&](int k) { return int(codes[k]) | int(std::signbit(numbers[k])) << 3; };
            for (int k = 0; k < kGroup; k += 2) *to++ = uint8_t(nibble(k) | nibble(k + 1) << 4);
        }
    });
}

// A stack of matrices (count, rows, depth) as it is before packing: bf16 or fp32 numbers, signed bytes, or two nibbles a
// byte and a byte (count, rows, depth / group) for every group: its step, or in MXFP4 its scale.
struct Unpacked {
    const char* numbers;
    bool is_fp32;
    const uint8_t* groups;
    bool is_gated;  // the rows are [gate, up]: 16 of the one and 16 of the other in turn

    // The row of a matrix that is row `index` of a panel, -1 for none.
    int64_t row(int64_t rows, int64_t panel, int index) const {
        if (!is_gated) {
            const int64_t row = panel * kPanel + index;
            return row < rows ? row : -1;
        }
        const int64_t row = panel * (kPanel / 2) + index % (kPanel / 2);
        return row < rows / 2 ? row + (index < kPanel / 2 ? 0 : rows / 2) : -1;
    }
};

// Nibbles of two rows as bytes (depth), those of the first one low.
inline void merge_nibbles(const uint8_t* low, const uint8_t* high, int64_t depth, uint8_t* to) {
    for (int64_t k = 0; k < depth / 2; ++k) {
        to[2 * k] = uint8_t((low[k] & 15) | (high[k] & 15) << 4);
        to[2 * k + 1] = uint8_t(low[k] >> 4 | (high[k] & 0xf0));
    }
}

// Panel `index` of all those of a stack. `packed` says how a matrix of it is laid out.
inline void pack_panel(const Packed& packed, int64_t rows, const Unpacked& weight, int64_t index, uint8_t* to) {
    static thread_local Scratch scratch;
    const int64_t panels = packed.panels(), matrix = index / panels, panel = index % panels;
    const int64_t depth = packed.depth, padded = packed.padded_depth();
    const bool is_mxfp4 = packed.format == kPackedMxfp4, is_nibbles = packed.format == kPackedInt4 || is_mxfp4;
    const int64_t row_bytes = packed.format == kPackedBf16 ? depth * (weight.is_fp32 ? 4 : 2)
                              : is_nibbles                 ? depth / 2
                                                           : depth;
    const char* own = weight.numbers + matrix * rows * row_bytes;
    const auto source = [&](int n) {
        const int64_t row = weight.row(rows, panel, n);
        return row < 0 ? nullptr : own + row * row_bytes;
    };
    uint32_t* dwords = reinterpret_cast<uint32_t*>(to);
    if (packed.format == kPackedBf16) {
        bf16* copies = scratch.get<bf16>(size_t(kPanel * padded));
        for (int n = 0; n < kPanel; ++n) {
            bf16* copy = copies + n * padded;
            const char* from = source(n);
            std::fill(copy + (from ? depth : 0), copy + padded, bf16(0));
            if (from && weight.is_fp32)  // not by vectors: AVX-512's conversion makes subnormal numbers 0
                std::transform(reinterpret_cast<const float*>(from), reinterpret_cast<const float*>(from) + depth, copy,
                               float_to_bf16);
            else if (from)
                std::memcpy(copy, from, size_t(row_bytes));
        }
        transpose_dwords(kPanel, int(padded / 2), reinterpret_cast<uint32_t*>(copies), size_t(padded / 2), dwords, kPanel);
    } else if (!is_nibbles) {
        uint8_t* copies = scratch.get<uint8_t>(size_t(kPanel * padded));
        for (int n = 0; n < kPanel; ++n) {
            uint8_t* copy = copies + n * padded;
            const char* from = source(n);
            std::fill(copy + (from ? depth : 0), copy + padded, uint8_t(128));
            for (int64_t k = 0; from && k < depth; ++k) copy[k] = uint8_t(from[k]) ^ 128;
        }
        transpose_dwords(kPanel, int(padded / 4), reinterpret_cast<uint32_t*>(copies), size_t(padded / 4), dwords, kPanel);
    } else {
        constexpr int kHalf = kPanel / 2;
        uint8_t* copies = scratch.get<uint8_t>(size_t(kHalf * padded + depth / 2));
        uint8_t* none = copies + kHalf * padded;  // a row of zeros
        std::fill(none, none + depth / 2, uint8_t(is_mxfp4 ? 0 : 0x88));
        const auto nibbles = [&](int n) {
            const char* from = source(n);
            return from ? reinterpret_cast<const uint8_t*>(from) : none;
        };
        for (int n = 0; n < kHalf; ++n) {
            uint8_t* copy = copies + n * padded;
            merge_nibbles(nibbles(n), nibbles(n + kHalf), depth, copy);
            std::fill(copy + depth, copy + padded, uint8_t(0));
        }
        const int64_t groups = depth / packed.group, header_depth = packed.header_depth();
        for (int64_t k = 0; k < padded; k += header_depth, to += kHeaderBytes + size_t(header_depth) * kHalf) {
            std::memset(to, 0, kHeaderBytes);
            for (int64_t first = k; first < std::min(k + header_depth, depth); first += packed.group)
                for (int n = 0; n < kPanel; ++n) {
                    const int64_t row = weight.row(rows, panel, n), g = first / packed.group;
                    if (row < 0) continue;
                    const uint8_t byte = weight.groups[(matrix * rows + row) * groups + g];
                    const int16_t step = int8_t(byte);
                    if (is_mxfp4)
                        to[(first - k) / packed.group * kPanel + n] = byte;
                    else
                        std::memcpy(to + 2 * n, &step, sizeof step);
                }
            transpose_dwords(kHalf, int(header_depth / 4), reinterpret_cast<uint32_t*>(copies + k), size_t(padded / 4),
                             reinterpret_cast<uint32_t*>(to + kHeaderBytes), kHalf);
        }
    }
}

}  // namespace moesaic
