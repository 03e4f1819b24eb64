// Products of 8-bit activations with 8-bit and 4-bit weights, exact in int32 inside a group and fp32 between groups.
//
// kernels/quantized.py is the definition, to the bit, on every instruction set and for every number of rows. Weights
// are unsigned bytes (value + 128, or a nibble, value + 8) in panels of 32 columns, activations signed bytes; what the
// offset adds to a dot product is the offset times the sum of the activations, which is known from quantising them.
//
// A panel of 8 bits is [K/4][32][4 bytes], K padded to 64. One of 4 bits is, for each group of K, its 32 scales in bf16
// and then [group/4][16][4 bytes], each byte with column n in the low nibble and column n + 16 in the high one.
#pragma once

#include "elements.h"
#include "gemm_bf16.h"
#include "parallel.h"

namespace moesaic {

constexpr int kActivationBlock = 128;  // columns of an activation that share a scale

// What a block has beside its bytes. The weights' offset of 8 adds 8 times the sum of a group's activations to its
// product; `starts`, where the sums of a product begin, takes that off again: of the 4 groups of 32, the 2 of 64 and
// the one of 128. An offset of 128 is 16 times as much.
struct BlockTail {
    float scale;
    int32_t starts[7];

    static constexpr int first_start(int group) { return group == 32 ? 0 : group == 64 ? 4 : 6; }
};

// A quantised row of K activations in memory: bytes, zero up to a whole block, and behind them the blocks' tails.
struct QuantizedRow {
    int blocks;

    explicit QuantizedRow(int64_t depth) : blocks(int((depth + kActivationBlock - 1) / kActivationBlock)) {}
    size_t tails() const { return size_t(blocks) * kActivationBlock; }
    size_t bytes() const { return (tails() + size_t(blocks) * sizeof(BlockTail) + 63) / 64 * 64; }
};

#if defined(__AVX512F__)

inline Vi and_bits(Vi a, Vi b) { return {_mm512_and_si512(a.v, b.v)}; }
inline Vi max_int(Vi a, Vi b) { return {_mm512_max_epi32(a.v, b.v)}; }
inline void store_int8(int8_t* p, Vi x) { _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(x.v)); }

// The weights of four values of K and 32 columns, as unsigned bytes.
template <int Bits>
inline void load_weights(const uint8_t* p, Vi* columns) {
    if constexpr (Bits == 8) {
        columns[0] = loadi(p);
        columns[1] = loadi(p + 64);
    } else {
        const __m512i both = _mm512_loadu_si512(p), low = _mm512_set1_epi8(15);
        columns[0] = {_mm512_and_si512(both, low)};
        columns[1] = {_mm512_and_si512(_mm512_srli_epi16(both, 4), low)};
    }
}
// sums[i] += the four products of unsigned bytes of weights[i] and signed bytes of activations[i].
template <int Bits>
inline Vi dot_bytes(Vi sums, Vi weights, Vi activations) {
    // Not the intrinsic: GCC 12 copies and spills its accumulators, at three quarters of the speed.
    asm("vpdpbusd %2, %1, %0" : "+v"(sums.v) : "v"(weights.v), "v"(activations.v));
    return sums;
}

#else

inline Vi and_bits(Vi a, Vi b) { return {_mm256_and_si256(a.v, b.v)}; }
inline Vi max_int(Vi a, Vi b) { return {_mm256_max_epi32(a.v, b.v)}; }
inline void store_int8(int8_t* p, Vi x) {
    const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(x.v), _mm256_extracti128_si256(x.v, 1));
    _mm_storel_epi64((__m128i*)p, _mm_packs_epi16(words, words));
}

template <int Bits>
inline void load_weights(const uint8_t* p, Vi* columns) {
    if constexpr (Bits == 8) {
        for (int v = 0; v < 4; ++v) columns[v] = loadi(p + 32 * v);
    } else {
        const __m256i low = _mm256_set1_epi8(15);
        for (int v = 0; v < 2; ++v) {
            const __m256i both = _mm256_loadu_si256((const __m256i*)(p + 32 * v));
            columns[v] = {_mm256_and_si256(both, low)};
            columns[v + 2] = {_mm256_and_si256(_mm256_srli_epi16(both, 4), low)};
        }
    }
}
template <int Bits>
inline Vi dot_bytes(Vi sums, Vi weights, Vi activations) {
    if constexpr (Bits == 4) {
        // Two products of at most 15 * 128 do not saturate 16 bits.
        const __m256i pairs = _mm256_maddubs_epi16(weights.v, activations.v);
        return {_mm256_add_epi32(sums.v, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))};
    } else {
        // Two products of bytes would: even and odd bytes apart, in 16 bits.
        const __m256i even = _mm256_madd_epi16(_mm256_and_si256(weights.v, _mm256_set1_epi16(255)),
                                               _mm256_srai_epi16(_mm256_slli_epi16(activations.v, 8), 8));
        const __m256i odd =
            _mm256_madd_epi16(_mm256_srli_epi16(weights.v, 8), _mm256_srai_epi16(activations.v, 8));
        return {_mm256_add_epi32(sums.v, _mm256_add_epi32(even, odd))};
    }
}

#endif

inline int sum_int(Vi x) {
    int32_t lanes[W], total = 0;
    storei(lanes, x);
    for (int32_t lane : lanes) total += lane;
    return total;
}
inline int maximum_int(Vi x) {
    int32_t lanes[W], largest;
    storei(lanes, x);
    largest = lanes[0];
    for (int32_t lane : lanes) largest = lane > largest ? lane : largest;
    return largest;
}

// One block: its bytes and its tail.
inline void quantize_block(const float* x, int8_t* values, BlockTail* tail) {
    // Magnitudes are ordered as their bits are, infinity and NaN above all numbers.
    Vi largest = set1i(0);
    for (int i = 0; i < kActivationBlock; i += W)
        largest = max_int(largest, and_bits(as_int(load(x + i)), set1i(0x7fffffff)));
    const int32_t bits = maximum_int(largest);
    const bool is_finite = bits < 0x7f800000;
    constexpr int32_t kSmallest = (127 - 120) << 23;  // 2^-120: 127 divided by less would leave fp32
    if (!is_finite || bits < kSmallest) {
        std::memset(values, 0, kActivationBlock);
        *tail = {is_finite ? 0.0f : NAN, {}};
        return;
    }
    float amax;
    std::memcpy(&amax, &bits, 4);
    const Vf factor = set1(127.0f / amax);
    int32_t starts[4];
    for (int part = 0; part < 4; ++part) {
        Vi total = set1i(0);
        for (int i = part * 32; i < (part + 1) * 32; i += W) {
            const Vi rounded = to_int(mul(load(x + i), factor));
            store_int8(values + i, rounded);
            total = addi(total, rounded);
        }
        starts[part] = -8 * sum_int(total);
    }
    const int32_t first = starts[0] + starts[1], second = starts[2] + starts[3];
    *tail = {amax / 127.0f, {starts[0], starts[1], starts[2], starts[3], first, second, first + second}};
}

// A whole row of `depth` fp32 or bf16 numbers.
template <typename T>
inline void quantize_row(const T* x, int64_t depth, char* to) {
    const QuantizedRow row(depth);
    int8_t* values = reinterpret_cast<int8_t*>(to);
    BlockTail* tails = reinterpret_cast<BlockTail*>(to + row.tails());
    alignas(64) float buffer[kActivationBlock];
    for (int block = 0; block < row.blocks; ++block) {
        const int64_t start = int64_t(block) * kActivationBlock;
        for (int i = 0; i < kActivationBlock; i += W) {
            const int64_t left = depth - start - i;
            store(buffer + i, left > 0 ? load_row(x + start + i, left) : zero());
        }
        quantize_block(buffer, values + start, tails + block);
    }
}

// One panel as the products see it, and where its rows of activations keep their tails.
struct IntegerPanel {
    const uint8_t* data;
    const float* scales;  // 8 bits: one a column, applied after the last group
    int depth;            // K, padded
    int group;            // values of K between two roundings
    size_t row_tails;
};

// Where a product reads ahead while it computes: `step` bytes further for every step through K, `group_step` for every
// group's scales, from `then` on when it comes to block `turn`. On 2 Zen 5 cores 4-bit weights stream at 93 % of the
// memory's rate with 8 KiB ahead, at 77 % with 2 KiB.
struct Ahead {
    const char* from;
    size_t step, group_step = 0;
    int turn = -1;
    const char* then = nullptr;

    static void fetch(const char* line) { moesaic::fetch(line); }
};

// As Ahead, but into the first-level cache: many rows are 3 (bf16) to 10 % (4 bits) faster so on Zen 4.
struct NearAhead : Ahead {
    static void fetch(const char* line) { _mm_prefetch(line, _MM_HINT_T0); }
};
constexpr size_t kAheadBytes = 8192;

// Few rows of 8 bits: within the same page on machines with tiles, where the processor's own prefetcher then runs ahead of
// both: 33 to 35 GB/s on two cores that read 30 with 8 KiB ahead, 32 with 4.
constexpr size_t kNearBytes = kHasTiles ? 3072 : kAheadBytes;

// For one pass over `blocks` blocks of a panel: `distance` bytes ahead of itself, and at its end in what follows, if anything
// does.
inline Ahead ahead_of_itself(const uint8_t* panel, int blocks, size_t block_bytes, size_t step, const uint8_t* next,
                             size_t group_step = 0, size_t distance = kAheadBytes) {
    const int turn = blocks - int((distance + block_bytes - 1) / block_bytes);
    const char* own = reinterpret_cast<const char*>(panel);
    const char* following = next ? reinterpret_cast<const char*>(next) : own;
    if (turn <= 0) return {following, step, group_step};
    // Where what follows does not lie behind the panel, the panel's last lines are left to the processor.
    const size_t behind = size_t(blocks - turn) * block_bytes - distance;
    return {own + distance, step, group_step, turn, following - behind};
}

// For one of several passes over `length` bytes of a panel: its share of the same bytes of the next one.
inline Ahead ahead_of_share(const uint8_t* next, size_t begin, size_t length, int part, int parts, size_t step,
                            size_t group_step = 0) {
    const size_t share = length / size_t(parts);
    return {reinterpret_cast<const char*>(next) + begin + share * size_t(part), step / size_t(parts),
            group_step / size_t(parts)};
}

// What comes after a product: the weights of the next one (or null), and `count` cache lines, `stride` bytes apart,
// that will be read or written.
struct Next {
    const uint8_t* panel = nullptr;
    const char* lines = nullptr;
    size_t stride = 64;
    int64_t count = 0;

    // The share of the lines that one of several passes brings nearer.
    void prefetch_lines(int part, int parts) const {
        const int64_t end = count * (part + 1) / parts;
        for (int64_t i = count * part / parts; i < end; ++i) _mm_prefetch(lines + size_t(i) * stride, _MM_HINT_T0);
    }
#if defined(MOESAIC_TILES)
    // What a product by tiles, one of `parts` steps of rows on terms [first, first + here) of `terms`, brings nearer bit by
    // bit: of lines that follow each other its share; of lines far apart, which are written when sums are complete, its
    // rows' in the last pass.
    LinesAhead lines_ahead(int part, int parts, int first, int here, int terms, int blocks) const {
        const bool is_shared = stride == 64;
        if (!is_shared && first + here < terms) return {};
        const int64_t begin = is_shared ? int64_t(first) * parts + int64_t(here) * part : part;
        const int64_t end = begin + (is_shared ? here : 1), all = int64_t(is_shared ? terms : 1) * parts;
        const int64_t line = count * begin / all;
        return {lines + size_t(line) * stride, stride, count * end / all - line, blocks};
    }
#endif
};

// Rows that one step works on: their int32 sums are in registers, with 2 vectors of weights and 1 of activations, and
// of up to kRowsWithTotals the fp32 sums too.
#if defined(__AVX512F__)
constexpr int kIntegerRows = 8, kRowsWithTotals = 6;
#else
constexpr int kIntegerRows = 1, kRowsWithTotals = 1;
#endif

// C[R][32] (+)= R rows times the activation blocks [first, last) of the panel, whose groups are of G values of K.
// Loops over sums are unrolled by order: sums that a loop indexes live in memory, at half the speed. Rows without totals
// in registers come in one pass only, so they never accumulate. Functions of their own: inlined together, those of 4 bits
// were a tenth slower.
template <int Bits, int G, int R, typename Reads>
[[gnu::noinline]] void integer_rows(const IntegerPanel& panel, int first, int last, const char* a, size_t stride,
                                    float* c, bool accumulate, Reads ahead) {
    constexpr int V = kPanel / W;
    constexpr size_t kStepBytes = Bits == 8 ? 128 : 64;
    constexpr size_t kScaleBytes = Bits == 8 ? 0 : 2 * kPanel;
    constexpr int kGroups = kActivationBlock / G, kSteps = G / 4;
    // The sums of one row alone would wait for each other: 4 bits ran at 60 % of the speed.
    constexpr int kChains = R == 1 && W == 16 ? 2 : 1;
    constexpr bool kHasTotals = R <= kRowsWithTotals;
    // One or two rows of 8 bits leave every second line to the processor's own prefetcher: 4 to 10 % faster on Zen 4,
    // but 20 to 35 % slower of more rows, and of bf16. With tiles it has not been tried.
    constexpr bool kFetchesEveryLine = R > 2 || kHasTiles;
    const uint8_t* weights = panel.data + size_t(first) * kGroups * (kSteps * kStepBytes + kScaleBytes);
    Vf total[R][V];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) {
            total[r][v] = kHasTotals && accumulate ? load(c + r * kPanel + v * W) : zero();
            if (!kHasTotals) store(c + r * kPanel + v * W, zero());
        }
    for (int block = first; block < last; ++block) {
        const char* row = a + size_t(block) * kActivationBlock;
        const char* tail = a + panel.row_tails + sizeof(BlockTail) * size_t(block);
        const char* start = tail + offsetof(BlockTail, starts) + 4 * BlockTail::first_start(G);
        int left = panel.depth - block * kActivationBlock;
        if (block == ahead.turn) ahead.from = ahead.then;
        for (int part = 0; part < kGroups && left > 0; ++part, left -= G, start += 4) {
            const bf16* group_scales = reinterpret_cast<const bf16*>(weights);
            weights += kScaleBytes;
            if (Bits == 4) {
                ahead.fetch(ahead.from);
                ahead.from += ahead.group_step;
            }
            Vi acc[kChains][R][V];
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) {
                Vi begin = broadcast_dword(start + r * stride);
                if (Bits == 8) begin = shift_left<4>(begin);
#pragma GCC unroll 4
                for (int v = 0; v < V; ++v) {
                    acc[0][r][v] = begin;
#pragma GCC unroll 4
                    for (int chain = 1; chain < kChains; ++chain) acc[chain][r][v] = set1i(0);
                }
            }
            const int steps = Bits == 8 && left < G ? left / 4 : kSteps;
#pragma GCC unroll 2
            for (int s = 0; s < steps; s += kChains) {
#pragma GCC unroll 4
                for (int chain = 0; chain < kChains; ++chain) {
                    Vi columns[V];
                    load_weights<Bits>(weights + size_t(chain) * kStepBytes, columns);
                    const char* line = ahead.from + size_t(chain) * ahead.step;
                    ahead.fetch(line);
                    if (Bits == 8 && kFetchesEveryLine) ahead.fetch(line + 64);
#pragma GCC unroll 8
                    for (int r = 0; r < R; ++r) {
                        const Vi activations = broadcast_dword(row + r * stride + 4 * (s + chain));
#pragma GCC unroll 4
                        for (int v = 0; v < V; ++v)
                            acc[chain][r][v] = dot_bytes<Bits>(acc[chain][r][v], columns[v], activations);
                    }
                }
                weights += size_t(kChains) * kStepBytes;
                ahead.from += size_t(kChains) * ahead.step;
            }
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
                for (int v = 0; v < V; ++v)
#pragma GCC unroll 4
                    for (int chain = 1; chain < kChains; ++chain)
                        acc[0][r][v] = addi(acc[0][r][v], acc[chain][r][v]);
            row += G;
            // Held in registers from group to group, the scales would push sums out of them: 5 % of the time.
            asm("" : "+r"(tail));
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) {
                float scale;
                std::memcpy(&scale, tail + r * stride + offsetof(BlockTail, scale), 4);
#pragma GCC unroll 4
                for (int v = 0; v < V; ++v) {
                    const Vf factor = Bits == 8 ? set1(scale) : mul(set1(scale), load_bf16(group_scales + v * W));
                    const Vf sum = mul(to_float(acc[0][r][v]), factor);
                    float* place = c + r * kPanel + v * W;
                    if constexpr (kHasTotals)
                        total[r][v] = add(total[r][v], sum);
                    else
                        store(place, add(load(place), sum));
                }
            }
        }
    }
    const bool is_end = Bits == 8 && last * kActivationBlock >= panel.depth;
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) {
            float* place = c + r * kPanel + v * W;
            const Vf sum = kHasTotals ? total[r][v] : load(place);
            store(place, is_end ? mul(sum, load(panel.scales + v * W)) : sum);
        }
}

template <int Bits, int G, int R, typename Reads>
inline void integer_rows_of(int rows, const IntegerPanel& panel, int first, int last, const char* a, size_t stride,
                            float* c, bool accumulate, Reads ahead) {
    if constexpr (R > 0) {
        if (rows == R)
            integer_rows<Bits, G, R>(panel, first, last, a, stride, c, accumulate, ahead);
        else
            integer_rows_of<Bits, G, R - 1>(rows, panel, first, last, a, stride, c, accumulate, ahead);
    }
}

#if defined(MOESAIC_TILES)

// Four values of K and 32 columns of 4 bits as bytes for tiles, 128 of them.
inline void unpack_line(const uint8_t* from, uint8_t* to) {
    Vi columns[kPanel / W];
    load_weights<4>(from, columns);
    for (int v = 0; v < kPanel / W; ++v) storei(to + v * W * 4, columns[v]);
}

// A 4-bit panel as bytes for tiles: [groups][64 or 128 values of K / 4][32][4]. A group of 32 is followed by as many
// zeros, so that a tile never mixes two groups.
inline void unpack_for_tiles(const IntegerPanel& panel, uint8_t* to) {
    const int groups = panel.depth / panel.group, steps = panel.group / 4;
    const uint8_t* from = panel.data;
    for (int g = 0; g < groups; ++g) {
        from += 2 * kPanel;
        for (int s = 0; s < steps; ++s, from += 64, to += 128) unpack_line(from, to);
        if (steps < 16) {
            std::memset(to, 0, size_t(16 - steps) * 128);
            to += size_t(16 - steps) * 128;
        }
    }
}

// What the int32 dot products [rows][32] of group g add to c.
template <int Bits, bool First>
inline void finish_group(const IntegerPanel& panel, int g, const int32_t* dots, int rows, const char* a, size_t stride,
                         float* c) {
    const int block = g * panel.group / kActivationBlock, part = g * panel.group % kActivationBlock / panel.group;
    const char* tail = a + panel.row_tails + sizeof(BlockTail) * size_t(block);
    const size_t start = offsetof(BlockTail, starts) + 4 * size_t(BlockTail::first_start(panel.group) + part);
    const bf16* scales =
        reinterpret_cast<const bf16*>(panel.data + size_t(g) * (2 * kPanel + size_t(panel.group) * kPanel / 2));
    Vf column_scales[kPanel / W];
    for (int v = 0; v < kPanel / W; ++v) column_scales[v] = Bits == 8 ? zero() : load_bf16(scales + v * W);
    for (int r = 0; r < rows; ++r, tail += stride) {
        Vi begin = broadcast_dword(tail + start);
        if (Bits == 8) begin = shift_left<4>(begin);
        const Vf scale = as_float(broadcast_dword(tail + offsetof(BlockTail, scale)));
        for (int v = 0; v < kPanel / W; ++v) {
            float* place = c + r * kPanel + v * W;
            const Vf factor = Bits == 8 ? scale : mul(scale, column_scales[v]);
            const Vf sum = mul(to_float(addi(loadi(dots + r * kPanel + v * W), begin)), factor);
            store(place, add(First ? zero() : load(place), sum));
        }
    }
}

// As integer_rows for up to 32 rows; `bytes` is the panel, unpacked where it has 4 bits. A group's dot products are
// scaled and added up while the tiles work on the next one.
template <int Bits, Stays stays, typename Fetch>
inline void integer_tiles(const IntegerPanel& panel, const uint8_t* bytes, int first, int last, int rows, const char* a,
                          size_t stride, float* c, const Fetch& reads) {
    constexpr bool kRowsStay = stays == Stays::kRows;
    Fetch ahead = reads;  // of its own, so that what it counts is in registers
    alignas(64) int32_t dots[2][32 * kPanel];
    const int top = rows < 16 ? rows : 16, bottom = rows - top;
    const int tile_depth = panel.group < 64 ? 64 : panel.group;
    configure_tiles(top, bottom);
    auto finish = [&](int g) {
        if (g == 0)
            finish_group<Bits, true>(panel, g, dots[g % 2], rows, a, stride, c);
        else
            finish_group<Bits, false>(panel, g, dots[g % 2], rows, a, stride, c);
    };
    for (int g = first; g < last; ++g) {
        const uint8_t* weights = bytes + size_t(g) * tile_depth * kPanel;
        const char* row = a + size_t(g) * panel.group;
        const int left = panel.depth - g * panel.group;
        const int here = left < tile_depth && Bits == 8 ? left : tile_depth;
        tile_zero(0);
        tile_zero(1);
        if (bottom) {
            tile_zero(2);
            tile_zero(3);
        }
        for (int k = 0; k < here; k += 64) {
            const uint8_t* columns = weights + size_t(k) * kPanel;
            ahead.quarter();
            tile_load_stays(kRowsStay, 4, row + k, stride);
            ahead.quarter();
            tile_load_stays(!kRowsStay, 6, columns, 128);
            tile_dot_s8u8(0, 4, 6);
            ahead.quarter();
            tile_load_stays(!kRowsStay, 7, columns + 64, 128);
            tile_dot_s8u8(1, 4, 7);
            ahead.quarter();
            if (bottom) {
                tile_load_stays(kRowsStay, 5, row + 16 * stride + k, stride);
                tile_dot_s8u8(2, 5, 6);
                tile_dot_s8u8(3, 5, 7);
            }
        }
        if (g > first) finish(g - 1);
        int32_t* to = dots[g % 2];
        tile_store(0, to, kPanel * 4);
        tile_store(1, to + 16, kPanel * 4);
        if (bottom) {
            tile_store(2, to + 16 * kPanel, kPanel * 4);
            tile_store(3, to + 16 * kPanel + 16, kPanel * 4);
        }
    }
    finish(last - 1);
    if (Bits == 8 && last * panel.group >= panel.depth)
        for (int r = 0; r < rows; ++r)
            for (int v = 0; v < kPanel / W; ++v) {
                float* place = c + r * kPanel + v * W;
                store(place, mul(load(place), load(panel.scales + v * W)));
            }
}

// As integer_tiles for up to 32 rows of a panel of 4 bits in groups of 64 or 128. It is unpacked between the tile
// instructions, 64 values of K at a time, into a few pieces that stay in the first-level cache: a whole panel unpacked
// first took 1.2 to 1.7 times as long.
template <bool kBottom>
[[gnu::noinline]] void nibble_tiles(const IntegerPanel& panel, int rows, const char* a, size_t stride, float* c,
                                    const char* following, LinesAhead lines) {
    constexpr int kPieces = 4, kLead = 2, kLines = 16;  // kept; unpacked ahead; packed cache lines of each
    alignas(64) uint8_t pieces[kPieces][2 * kLines * 64];
    alignas(64) int32_t dots[2][32 * kPanel];
    const int steps = panel.depth / 64, of_group = panel.group / 64;
    const size_t scales = 2 * kPanel, group_bytes = scales + size_t(of_group) * kLines * 64;
    const size_t size = size_t(steps / of_group) * group_bytes;
    const char* own = reinterpret_cast<const char*>(panel.data);
    configure_tiles(rows < 16 ? rows : 16, rows < 16 ? 0 : rows - 16);
    const auto packed = [&](int step) {
        return panel.data + size_t(step / of_group) * group_bytes + scales + size_t(step % of_group) * kLines * 64;
    };
    const auto finish = [&](int g) {
        if (g == 0)
            finish_group<4, true>(panel, g, dots[g % 2], rows, a, stride, c);
        else
            finish_group<4, false>(panel, g, dots[g % 2], rows, a, stride, c);
    };
    for (int step = 0; step < std::min(kLead, steps); ++step)
        for (int i = 0; i < kLines; ++i) unpack_line(packed(step) + 64 * i, pieces[step] + 128 * i);
    for (int step = 0; step < steps; ++step) {
        const uint8_t *columns = pieces[step % kPieces], *from = packed(std::min(step + kLead, steps - 1));
        uint8_t* to = pieces[(step + kLead) % kPieces];
        const char* row = a + size_t(step) * 64;
        const size_t place = size_t(step) * (size / size_t(steps)) + kAheadBytes;
        const char* ahead = place < size ? own + place : following + (place - size);
        const auto quarter = [&](int index) {
            for (int i = index * kLines / 4; i < (index + 1) * kLines / 4; ++i) {
                fetch(ahead + 64 * i);
                unpack_line(from + 64 * i, to + 128 * i);
            }
            lines.quarter();
        };
        if (step % of_group == 0) {
            fetch(ahead + 64 * kLines);
            tile_zero(0);
            tile_zero(1);
            if (kBottom) {
                tile_zero(2);
                tile_zero(3);
            }
        }
        tile_load(4, row, stride);
        quarter(0);
        tile_load(6, columns, 128);
        tile_dot_s8u8(0, 4, 6);
        quarter(1);
        tile_load(7, columns + 64, 128);
        tile_dot_s8u8(1, 4, 7);
        quarter(2);
        if (kBottom) {
            tile_load(5, row + 16 * stride, stride);
            tile_dot_s8u8(2, 5, 6);
            tile_dot_s8u8(3, 5, 7);
        }
        quarter(3);
        if ((step + 1) % of_group != 0) continue;
        const int g = step / of_group;
        if (g > 0) finish(g - 1);
        int32_t* sums = dots[g % 2];
        tile_store(0, sums, kPanel * 4);
        tile_store(1, sums + 16, kPanel * 4);
        if (kBottom) {
            tile_store(2, sums + 16 * kPanel, kPanel * 4);
            tile_store(3, sums + 16 * kPanel + 16, kPanel * 4);
        }
    }
    finish(steps / of_group - 1);
}

// As integer_product; of 8 bits a pass over K is one whose weights stay in the first-level cache while all rows pass. On
// 4 bits that gains nothing.
template <int Bits, typename Done>
inline void integer_tiles_product(const IntegerPanel& panel, int rows, const char* a, size_t stride, float* c,
                                  const Next& next, Done&& done) {
    static thread_local Scratch scratch;
    const int tile_depth = panel.group < 64 ? 64 : panel.group, parts = (rows + 31) / 32;
    const int groups = (panel.depth + panel.group - 1) / panel.group;
    const int pass = Bits == 4 || parts == 1 ? groups : int(kStayingBytes) / kPanel / tile_depth;
    if (Bits == 4 && parts == 1 && panel.group >= 64) {
        const char* following = reinterpret_cast<const char*>(next.panel ? next.panel : panel.data);
        const LinesAhead lines = next.lines_ahead(0, 1, 0, groups, groups, panel.depth / 64);
        rows > 16 ? nibble_tiles<true>(panel, rows, a, stride, c, following, lines)
                  : nibble_tiles<false>(panel, rows, a, stride, c, following, lines);
        done(0, rows, c);
        return;
    }
    const uint8_t* bytes = panel.data;
    if (Bits == 4) {
        uint8_t* unpacked = scratch.get<uint8_t>(size_t(groups) * tile_depth * kPanel);
        unpack_for_tiles(panel, unpacked);
        bytes = unpacked;
    }
    const size_t size = Bits == 8 ? size_t(panel.depth) * kPanel
                                  : size_t(groups) * (2 * kPanel + size_t(panel.group) * kPanel / 2);
    const char *own = reinterpret_cast<const char*>(panel.data), *following = reinterpret_cast<const char*>(next.panel);
    for (int first = 0; first < groups; first += pass) {
        const int last = first + pass < groups ? first + pass : groups, blocks = (last - first) * tile_depth / 64;
        // Several steps of rows on 8 bits bring what stays next.
        const size_t behind = std::min(size, size_t(last) * kActivationBlock * kPanel);
        Streams streams(behind < size ? own + behind : following,
                        std::min(behind < size ? size - behind : following ? size : 0, kStayingBytes));
        for (int part = 0; part < parts; ++part) {
            const RowBlock block(rows, parts, part);
            const int row = block.row;
            float* sums = c + part * kRowBlock * kPanel;
            const LinesAhead lines = next.lines_ahead(part, parts, first, last - first, groups, blocks);
            const auto multiply = [&](auto stays, const auto& ahead) {
                integer_tiles<Bits, decltype(stays)::value>(panel, bytes, first, last, block.size, a + row * stride,
                                                            stride, sums, ahead);
            };
            using Rows = std::integral_constant<Stays, Stays::kRows>;
            using Panel = std::integral_constant<Stays, Stays::kPanel>;
            if constexpr (Bits == 4) {
                // 4 bits are used unpacked, and each step brings its share of the next panel.
                const char* share = (following ? following : own) + size / size_t(parts) * size_t(part) / 64 * 64;
                multiply(Rows{}, StreamAndLinesAhead{StreamAhead(share, size / size_t(parts * blocks)), lines});
            } else if (parts == 1 && PagesAhead::suits(size)) {
                multiply(Rows{}, PagesAhead(own, size, following, lines));
            } else if (parts == 1) {
                // One step reads ahead in its own panel.
                multiply(Rows{}, StreamAndLinesAhead{StreamAhead(own + std::min(kAheadBytes, size), 64 * kPanel,
                                                                 following ? own + size : nullptr, following),
                                                     lines});
            } else {
                streams.ahead(part, parts, blocks, lines, [&](const auto& ahead) { multiply(Panel{}, ahead); });
            }
            if (last == groups) done(block.first, row + block.size, sums + (block.first - row) * kPanel);
        }
    }
}

#endif

// Rows of quantised activations times the panel; done(first, last, sums) is called as soon as those rows' sums, 32 of
// each, are complete, while they are in the first-level cache. c: room for the sums of all steps of rows.
template <int Bits, int G, typename Done>
inline void integer_product(const IntegerPanel& panel, int rows, const char* a, size_t stride, float* c,
                            const Next& next, Done&& done) {
#if defined(MOESAIC_TILES)
    // Fewer rows leave tiles mostly empty, and 4 bits have to be unpacked for them; integers are exact either way.
    if (rows > (Bits == 8 ? 4 : G == 32 ? 12 : 8)) {
        integer_tiles_product<Bits>(panel, rows, a, stride, c, next, done);
        return;
    }
#endif
    // Activation blocks whose weights, 16 KiB, stay in the first-level cache while all rows pass.
    constexpr int kDeep = Bits == 8 ? 4 : 8;
    const int blocks = (panel.depth + kActivationBlock - 1) / kActivationBlock;
    const int parts = rows <= kIntegerRows ? 1 : (rows + kRowsWithTotals - 1) / kRowsWithTotals;
    const int pass = parts > 1 ? kDeep : blocks;
    const size_t step_bytes = Bits == 8 ? 128 : 64, scale_bytes = Bits == 8 ? 0 : 2 * kPanel;
    const size_t block_bytes = kActivationBlock / 4 * step_bytes + kActivationBlock / G * scale_bytes;
    for (int first = 0; first < blocks; first += pass) {
        const int last = first + pass < blocks ? first + pass : blocks;
        const size_t begin = size_t(first) * block_bytes, length = size_t(last - first) * block_bytes;
        for (int part = 0; part < parts; ++part) {
            const int row = int(int64_t(rows) * part / parts), end = int(int64_t(rows) * (part + 1) / parts);
            const Ahead ahead =
                parts > 1 ? ahead_of_share(next.panel ? next.panel : panel.data, begin, length, part, parts, step_bytes,
                                            scale_bytes)
                          : ahead_of_itself(panel.data, blocks, block_bytes, step_bytes, next.panel, scale_bytes,
                                            Bits == 8 ? kNearBytes : kAheadBytes);
            if (last == blocks) next.prefetch_lines(part, parts);
            const auto multiply = [&](const auto& reads) {
                integer_rows_of<Bits, G, kIntegerRows>(end - row, panel, first, last, a + row * stride, stride,
                                                       c + row * kPanel, first > 0, reads);
            };
            if (kHasTiles || parts <= (Bits == 8 ? 4 : 1))
                multiply(ahead);
            else
                multiply(NearAhead{ahead});
            if (last == blocks) done(row, end, c + row * kPanel);
        }
    }
}

}  // namespace moesaic
