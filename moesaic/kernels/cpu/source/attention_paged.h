// Attention over keys and values that lie in blocks, for serving: one new position of a sequence or many, ragged.
//
// A block holds block_size positions (a multiple of 32) of one layer, and of every head two kinds of panels of 32
// positions, in the form that gemm_panel takes for B, so that nothing is rearranged when they are read:
//   keys    [block][head][block_size / 32][width / 2][32] pairs of channels, a column is a position;
//   values  [block][head][block_size / 32][width / 32][16][32] pairs of positions, a column is a channel.
// width is head_dim rounded up to 32, the rest zero. A number is bf16, or int8 with one fp32 scale for each position and
// head, which is exact in bf16: a panel of int8 is expanded in the first-level cache and goes the same way.
//
// All query heads of a key/value head go over its keys together. A row's positions are worked on in splits of 256 whose
// results are merged in rising order, the same way whether one thread or many had them: what a row gives depends on
// nothing else in the call, but that an infinite value in a position it does not see may reach it as 0 times infinity.
#pragma once

#include <algorithm>
#include <vector>

#include "gemm_bf16.h"
#include "parallel.h"
#include "transpose.h"

namespace moesaic {

constexpr int kSplit = 256;         // positions
constexpr int kAttentionRows = kWholeRows;  // (query, head) of a task: 48 or 64 KiB of scores in a split
constexpr int kPanelPairs = kPanel / 2;

// One layer's storage.
struct PagedCache {
    void* keys;
    void* values;
    float* key_scales;  // [block][head][block_size], null for bf16
    float* value_scales;
    int64_t num_blocks;
    int64_t num_kv_heads;
    int64_t head_dim;
    int64_t block_size;

    bool is_quantized() const { return key_scales != nullptr; }
    int width() const { return round_up(int(head_dim), kPanel); }
    int panels_per_block() const { return int(block_size) / kPanel; }
    // Elements before a panel, of keys and of values alike.
    size_t panel_offset(int64_t block, int64_t head, int panel) const {
        return size_t((block * num_kv_heads + head) * panels_per_block() + panel) * size_t(width()) * kPanel;
    }
    size_t scale_offset(int64_t block, int64_t head, int panel) const {
        return size_t(block * num_kv_heads + head) * size_t(block_size) + size_t(panel) * kPanel;
    }
};

// The sequences of a call: tokens starts[s] to starts[s + 1] are the last of lengths[s] positions of sequence s.
struct PagedBatch {
    const int32_t* starts;
    const int32_t* lengths;
    const int32_t* tables;  // [num_sequences][table_width] block numbers
    int64_t num_sequences;
    int64_t table_width;
};

// Whether every position of the batch has a block.
inline bool is_valid(const PagedBatch& batch, const PagedCache& cache, int64_t num_tokens) {
    if (batch.starts[0] != 0 || batch.starts[batch.num_sequences] != num_tokens) return false;
    for (int64_t s = 0; s < batch.num_sequences; ++s) {
        const int64_t length = batch.lengths[s], queries = batch.starts[s + 1] - batch.starts[s];
        if (queries < 0 || queries > length || length > batch.table_width * cache.block_size) return false;
        for (int64_t i = 0; i * cache.block_size < length; ++i) {
            const int32_t block = batch.tables[s * batch.table_width + i];
            if (block < 0 || block >= cache.num_blocks) return false;
        }
    }
    return true;
}

// Tokens of one sequence that lie in one panel.
struct WriteItem {
    int first_token, count, block, panel, offset;
};

// Rows of one sequence, a row being a query and one of the heads that share a key/value head, and splits of its
// positions. partial: where its results wait to be merged with those of the splits before and after, else -1.
struct AttentionItem {
    int sequence, first_row, rows, first_split, num_splits;
    int64_t partial;
};

// What a batch is cut into; the same for every layer.
struct PagedPlan {
    std::vector<WriteItem> writes;
    std::vector<AttentionItem> items, merges;
    size_t partial_floats = 0;
    double work = 0;
};

inline PagedPlan plan_paged(const PagedBatch& batch, const PagedCache& cache, int64_t num_heads) {
    PagedPlan plan;
    const int group = int(num_heads / cache.num_kv_heads), width = cache.width(), size = int(cache.block_size);
    for (int s = 0; s < batch.num_sequences; ++s) {
        const int first = batch.starts[s], queries = batch.starts[s + 1] - first, length = batch.lengths[s];
        if (queries == 0) continue;
        for (int position = length - queries; position < length;) {
            const int end = std::min(length, (position / kPanel + 1) * kPanel);
            plan.writes.push_back({first + position - (length - queries), end - position,
                                   batch.tables[s * batch.table_width + position / size], position % size / kPanel,
                                   position % kPanel});
            position = end;
        }
        const int rows = queries * group;
        plan.work += 4.0 * rows * cache.num_kv_heads * double(length) * width;
        if (rows <= kAttentionRows) {
            const int splits = (length + kSplit - 1) / kSplit;
            if (splits == 1) {
                plan.items.push_back({s, 0, rows, 0, 1, -1});
                continue;
            }
            const int64_t partial = int64_t(plan.partial_floats), each = int64_t(rows) * (width + 2);
            for (int split = 0; split < splits; ++split)
                plan.items.push_back({s, 0, rows, split, 1, partial + split * each * cache.num_kv_heads});
            plan.merges.push_back({s, 0, rows, 0, splits, partial});
            plan.partial_floats += size_t(splits * each * cache.num_kv_heads);
            continue;
        }
        // The last rows see the most: they go first, so that the short ones fill the end.
        for (int row = (rows - 1) / kAttentionRows * kAttentionRows; row >= 0; row -= kAttentionRows) {
            const int here = std::min(kAttentionRows, rows - row);
            const int seen = length - queries + (row + here - 1) / group + 1;
            plan.items.push_back({s, row, here, 0, (seen + kSplit - 1) / kSplit, -1});
        }
    }
    return plan;
}

#if defined(__AVX512F__) && !defined(MOESAIC_TILES)

// C[R][16 V] = A[R][count * 2 * pairs] times `count` pieces of two neighbouring panels (of one, where V is 2), reading
// `ahead`: with the four rows of a grouped decode one panel has too few sums to hide a product's latency, and two in
// registers over all pieces also spare the loads and stores between them.
template <int R, int V, bool Prefetch>
inline void multiply_rows(int count, int pairs, const bf16* a, size_t lda, const uint32_t* const* left,
                          const uint32_t* const* right, const uint32_t* const* left_ahead,
                          const uint32_t* const* right_ahead, float* c, size_t ldc) {
    Vf acc[R][V];
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < V; ++v) acc[r][v] = zero();
    for (int i = 0; i < count; ++i) {
        const uint32_t *first = left[i], *second = right[i];
        const char* first_ahead = reinterpret_cast<const char*>(left_ahead[i]);
        const char* second_ahead = reinterpret_cast<const char*>(right_ahead[i]);
        for (int p = 0; p < pairs; ++p) {
            Vi columns[V];
            for (int v = 0; v < V; ++v) columns[v] = loadi((v < 2 ? first : second) + p * kPanel + v % 2 * W);
            if constexpr (Prefetch) {
                _mm_prefetch(first_ahead + p * 128, _MM_HINT_T0);
                _mm_prefetch(first_ahead + p * 128 + 64, _MM_HINT_T0);
                if constexpr (V == 4) {
                    _mm_prefetch(second_ahead + p * 128, _MM_HINT_T0);
                    _mm_prefetch(second_ahead + p * 128 + 64, _MM_HINT_T0);
                }
            }
            for (int r = 0; r < R; ++r) {
                const Vi row = broadcast_dword(a + r * lda + 2 * p);
                for (int v = 0; v < V; ++v) acc[r][v] = dot_bf16(acc[r][v], row, columns[v]);
            }
        }
        a += 2 * pairs;
    }
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < V; ++v) store(c + r * ldc + v * W, acc[r][v]);
}

template <int R, int V, bool Prefetch>
inline void multiply_rows_of(int rows, int count, int pairs, const bf16* a, size_t lda, const uint32_t* const* left,
                             const uint32_t* const* right, const uint32_t* const* left_ahead,
                             const uint32_t* const* right_ahead, float* c, size_t ldc) {
    if constexpr (R > 0) {
        if (rows == R)
            multiply_rows<R, V, Prefetch>(count, pairs, a, lda, left, right, left_ahead, right_ahead, c, ldc);
        else
            multiply_rows_of<R - 1, V, Prefetch>(rows, count, pairs, a, lda, left, right, left_ahead, right_ahead, c,
                                                 ldc);
    }
}

// All rows, six at a time; the first six bring what comes next into the cache.
template <int V>
inline void multiply_panels(int rows, int count, int pairs, const bf16* a, size_t lda, const uint32_t* const* left,
                            const uint32_t* const* right, const uint32_t* const* left_ahead,
                            const uint32_t* const* right_ahead, float* c, size_t ldc) {
    constexpr int R = 6;
    multiply_rows_of<R, V, true>(std::min(rows, R), count, pairs, a, lda, left, right, left_ahead, right_ahead, c, ldc);
    for (int row = R; row < rows; row += R)
        multiply_rows_of<R, V, false>(std::min(rows - row, R), count, pairs, a + row * lda, lda, left, right, left_ahead,
                                      right_ahead, c + row * ldc, ldc);
}

#endif

// The panels of one head in a split of positions: where they are, and where the next ones to be read are.
struct SplitPanels {
    static constexpr int kMost = kSplit / kPanel;
    static constexpr int kAhead = 4;
    int count;
    const uint32_t* at[kMost + kAhead];

    void follow_with(const SplitPanels& next) {
        for (int i = 0; i < kAhead; ++i) at[count + i] = next.at[std::min(i, next.count - 1)];
    }
};

// scores[rows][256], the first 32 * keys.count of each row: queries[rows][width] times keys.
inline void multiply_keys(int rows, int width, const bf16* queries, const SplitPanels& keys, float* scores) {
#if defined(__AVX512F__) && !defined(MOESAIC_TILES)
    for (int p = 0; p < keys.count; p += 2) {
        const uint32_t* const* here = keys.at + p;
        float* c = scores + p * kPanel;
        if (p + 1 < keys.count)
            multiply_panels<4>(rows, 1, width / 2, queries, size_t(width), here, here + 1, here + 4,
                               here + 5, c, kSplit);
        else
            multiply_panels<2>(rows, 1, width / 2, queries, size_t(width), here, here, here + 4, here + 4, c, kSplit);
    }
#else
    for (int p = 0; p < keys.count; ++p)
        gemm_panel(rows, width / 2, queries, size_t(width), keys.at[p], kPanel, scores + p * kPanel, kSplit, false);
#endif
}

// sums[rows][width] = probabilities[rows][256] times values.
inline void multiply_values(int rows, int width, const bf16* probabilities, const SplitPanels& values, float* sums) {
    constexpr int kChunk = kPanel * kPanelPairs;
#if defined(__AVX512F__) && !defined(MOESAIC_TILES)
    const uint32_t *left[SplitPanels::kMost + SplitPanels::kAhead], *right[SplitPanels::kMost + SplitPanels::kAhead];
    for (int chunk = 0; chunk < width; chunk += 2 * kPanel) {
        const int offset = chunk * kPanelPairs;
        for (int i = 0; i < values.count + SplitPanels::kAhead; ++i) {
            left[i] = values.at[i] + offset;
            right[i] = values.at[i] + offset + kChunk;
        }
        if (chunk + kPanel < width)
            multiply_panels<4>(rows, values.count, kPanelPairs, probabilities, kSplit, left, right, left + 2, right + 2,
                               sums + chunk, size_t(width));
        else
            multiply_panels<2>(rows, values.count, kPanelPairs, probabilities, kSplit, left, left, left + 2, left + 2,
                               sums + chunk, size_t(width));
    }
#else
    for (int i = 0; i < values.count; ++i)
        for (int chunk = 0; chunk < width; chunk += kPanel)
            gemm_panel(rows, kPanelPairs, probabilities + i * kPanel, kSplit, values.at[i] + chunk / kPanel * kChunk,
                       kPanel, sums + chunk, size_t(width), i > 0);
#endif
}

// Pairs of int8 to pairs of bf16; count a multiple of 16. What stands at `ahead` will be read soon.
inline void expand_pairs(int count, const uint16_t* from, const uint16_t* ahead, uint32_t* to) {
#if defined(__AVX512F__)
    for (int i = 0; i < count; i += 16) {
        _mm_prefetch(reinterpret_cast<const char*>(ahead + i), _MM_HINT_T0);
        const __m512i x = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(from + i)));
        const __m512 low = _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(x, 24), 24));
        const __m512 high = _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(x, 16), 24));
        _mm512_storeu_si512(
            to + i, _mm512_or_si512(_mm512_srli_epi32(_mm512_castps_si512(low), 16), _mm512_castps_si512(high)));
    }
#else
    for (int i = 0; i < count; i += 8) {
        _mm_prefetch(reinterpret_cast<const char*>(ahead + i), _MM_HINT_T0);
        const __m256i x = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)(from + i)));
        const __m256 low = _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(x, 24), 24));
        const __m256 high = _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(x, 16), 24));
        _mm256_storeu_si256((__m256i*)(to + i), _mm256_or_si256(_mm256_srli_epi32(_mm256_castps_si256(low), 16),
                                                                _mm256_castps_si256(high)));
    }
#endif
}

// `count` panels of `pairs` dwords each, one behind the other.
inline void expand_panels(int count, const void* numbers, const size_t* places, size_t pairs, uint32_t* to) {
    auto panel = [&](int i) {
        return reinterpret_cast<const uint16_t*>(static_cast<const int8_t*>(numbers) + places[std::min(i, count - 1)]);
    };
    for (int i = 0; i < count; ++i) expand_pairs(int(pairs), panel(i), panel(i + 2), to + size_t(i) * pairs);
}

// values = round(x * (127 / max|x|)); returns max|x| / 127. Next to 0: zeros and 0. Not finite: zeros and NaN.
inline float quantize_kv_row(int count, const bf16* x, int8_t* values) {
    float largest = 0;
    bool is_finite = true;
    for (int i = 0; i < count; ++i) {
        const float magnitude = std::fabs(bf16_to_float(x[i]));
        is_finite = is_finite && magnitude < INFINITY;
        largest = magnitude > largest ? magnitude : largest;
    }
    if (!is_finite || largest < 0x1p-120f) {
        std::memset(values, 0, size_t(count));
        return is_finite ? 0.0f : NAN;
    }
    const float inverse = 127.0f / largest;
    for (int i = 0; i < count; ++i) values[i] = int8_t(std::nearbyintf(bf16_to_float(x[i]) * inverse));
    return largest / 127.0f;
}

inline Scratch& attention_scratch() {
    static thread_local Scratch scratch;
    return scratch;
}

// Put keys and values (count, head_dim) of one head, rows `stride` elements apart, into their places of one panel.
inline void write_kv_panel(const PagedCache& cache, const WriteItem& item, int64_t head, const bf16* key,
                        int64_t key_stride, const bf16* value, int64_t value_stride, Scratch& scratch) {
    const int width = cache.width(), dim = int(cache.head_dim);
    const size_t at = cache.panel_offset(item.block, head, item.panel);
    const size_t scales_at = cache.scale_offset(item.block, head, item.panel);
    if (item.offset == 0) {
        // What no position has written yet is multiplied by a probability of 0, so it must be finite.
        std::memset(static_cast<char*>(cache.values) + at * (cache.is_quantized() ? 1 : 2), 0,
                    size_t(width) * kPanel * (cache.is_quantized() ? 1 : 2));
        if (cache.is_quantized()) std::memset(cache.value_scales + scales_at, 0, kPanel * sizeof(float));
    }
    if (cache.is_quantized()) {
        auto* row = scratch.get<int8_t>(size_t(width));
        std::memset(row, 0, size_t(width));
        auto* keys = static_cast<int8_t*>(cache.keys) + at;
        auto* values = static_cast<int8_t*>(cache.values) + at;
        for (int i = 0; i < item.count; ++i) {
            const int position = item.offset + i;
            cache.key_scales[scales_at + position] = quantize_kv_row(dim, key + i * key_stride, row);
            for (int p = 0; p < width / 2; ++p) std::memcpy(keys + (p * kPanel + position) * 2, row + 2 * p, 2);
            cache.value_scales[scales_at + position] = quantize_kv_row(dim, value + i * value_stride, row);
            for (int chunk = 0; chunk < width; chunk += kPanel) {
                int8_t* pairs = values + size_t(chunk) * kPanel + position / 2 * kPanel * 2 + position % 2;
                for (int n = 0; n < kPanel; ++n) pairs[2 * n] = row[chunk + n];
            }
        }
        return;
    }
    auto* keys = reinterpret_cast<uint32_t*>(static_cast<bf16*>(cache.keys) + at);
    auto* values = reinterpret_cast<uint32_t*>(static_cast<bf16*>(cache.values) + at);
    if (dim != width || key_stride % 2) {
        auto* padded = scratch.get<bf16>(2 * size_t(kPanel) * width);
        std::memset(padded, 0, 2 * size_t(kPanel) * width * sizeof(bf16));
        for (int i = 0; i < item.count; ++i) {
            std::memcpy(padded + i * width, key + i * key_stride, size_t(dim) * sizeof(bf16));
            std::memcpy(padded + (kPanel + i) * width, value + i * value_stride, size_t(dim) * sizeof(bf16));
        }
        key = padded, value = padded + kPanel * width;
        key_stride = value_stride = width;
    }
    transpose_dwords(item.count, width / 2, reinterpret_cast<const uint32_t*>(key), size_t(key_stride / 2),
                     keys + item.offset, kPanel);
    for (int i = 0; i < item.count;) {
        const int position = item.offset + i;
        const bf16* row = value + i * value_stride;
        const bool is_pair = position % 2 == 0 && i + 1 < item.count;
        for (int chunk = 0; chunk < width; chunk += kPanel) {
            uint32_t* pairs = values + chunk * kPanelPairs + position / 2 * kPanel;
            if (is_pair) {
                interleave_rows(kPanel, row + chunk, row + value_stride + chunk, pairs);
            } else {
                auto* half = reinterpret_cast<bf16*>(pairs) + position % 2;
                for (int n = 0; n < kPanel; ++n) half[2 * n] = row[chunk + n];
            }
        }
        i += is_pair ? 2 : 1;
    }
}

struct AttentionCall {
    const bf16* query;  // (T, num_heads, head_dim), tokens query_stride elements apart
    int64_t query_stride;
    bf16* out;
    int64_t out_stride;
    int64_t num_heads;
    float scale;  // on the scores, 1 / sqrt(head_dim) for most
    PagedCache cache;
    PagedBatch batch;
    const PagedPlan* plan;
    float* partials;  // plan->partial_floats
};

// The running softmax of some rows: sums of exp(scale * (score - largest)) * value, of the exponentials, and largest.
struct AttentionState {
    float* sums;  // [rows][width]
    float* totals;
    float* largest;
};

inline AttentionState state_at(float* floats, int rows, int width) {
    return {floats, floats + size_t(rows) * width, floats + size_t(rows) * (width + 1)};
}

// Take one row of `from` into `to`; a row that saw nothing has a total of 0.
inline void merge_row(const AttentionState& to, const AttentionState& from, int row, int width, float scale) {
    if (from.totals[row] == 0.0f) return;
    const float before = to.largest[row], other = from.largest[row];
    const float largest = before > other ? before : other;
    float factors[W];
    store(factors, exp(set1((before - largest) * scale)));
    const float keep = to.totals[row] == 0.0f ? 0.0f : factors[0];
    store(factors, exp(set1((other - largest) * scale)));
    const float take = factors[0];
    float* sums = to.sums + size_t(row) * width;
    const float* more = from.sums + size_t(row) * width;
    for (int i = 0; i < width; i += W)
        store(sums + i, fma(load(more + i), set1(take), mul(load(sums + i), set1(keep))));
    to.totals[row] = std::fmaf(from.totals[row], take, to.totals[row] * keep);
    to.largest[row] = largest;
}

inline void clear_state(const AttentionState& state, int rows, int width) {
    std::memset(state.sums, 0, size_t(rows) * width * sizeof(float));
    for (int row = 0; row < rows; ++row) state.totals[row] = 0.0f, state.largest[row] = -INFINITY;
}

inline void write_rows(const AttentionCall& call, const AttentionItem& item, int64_t head,
                       const AttentionState& state) {
    const int group = int(call.num_heads / call.cache.num_kv_heads), dim = int(call.cache.head_dim);
    const int width = call.cache.width();
    for (int row = 0; row < item.rows; ++row) {
        const int flat = item.first_row + row;
        bf16* out = call.out + (call.batch.starts[item.sequence] + flat / group) * call.out_stride +
                    (head * group + flat % group) * dim;
        const Vf total = set1(state.totals[row]);
        const float* sums = state.sums + size_t(row) * width;
        int i = 0;
        for (; i + W <= dim; i += W) store_bf16(out + i, div(load(sums + i), total));
        for (; i < dim; ++i) out[i] = float_to_bf16(sums[i] / state.totals[row]);
    }
}

// One row of a split: scores to exp(scale * (score - largest)) as bf16, times value_scales where they are given. Scores
// from visible on are nobody's.
inline void split_softmax(float* scores, bf16* probabilities, int visible, int count, float scale,
                          const float* value_scales, float* total, float* largest) {
    for (int i = visible; i < count; ++i) scores[i] = -INFINITY;
    Vf highest[2] = {set1(-INFINITY), set1(-INFINITY)};
    for (int i = 0; i < count; i += 2 * W)
        for (int half = 0; half < 2; ++half)
            highest[half] = max(load(scores + i + half * W), highest[half]);  // NaN has no part in it
    *largest = maximum(max(highest[0], highest[1]));
    const Vf top = set1(*largest), factor = set1(scale * 1.44269504088896341f);
    Vf sums[2] = {zero(), zero()};
    for (int i = 0; i < count; i += 2 * W)
        for (int half = 0; half < 2; ++half) {
            const int at = i + half * W;
            Vf e = exp2_of_negative(mul(sub(load(scores + at), top), factor));
            sums[half] = add(sums[half], e);
            if (value_scales) e = mul(e, load(value_scales + at));
            store_bf16(probabilities + at, e);
        }
    *total = sum(add(sums[0], sums[1]));
}

inline void attend(const AttentionCall& call, const AttentionItem& item, int64_t head) {
    const PagedCache& cache = call.cache;
    const PagedBatch& batch = call.batch;
    const int width = cache.width(), dim = int(cache.head_dim), rows = item.rows;
    const int group = int(call.num_heads / cache.num_kv_heads);
    const size_t panel_pairs = size_t(width) * kPanelPairs;
    const size_t expanded_pairs = cache.is_quantized() ? SplitPanels::kMost * panel_pairs : 0;
    const size_t state_floats = size_t(rows) * (width + 2);
    float* floats = attention_scratch().get<float>(size_t(rows) * kSplit + 2 * state_floats + 2 * kSplit +
                                                   expanded_pairs + size_t(rows) * (kSplit + width) / 2);
    float* scores = floats;
    float* key_scales = scores + size_t(rows) * kSplit;
    float* value_scales = key_scales + kSplit;
    auto* expanded = reinterpret_cast<uint32_t*>(value_scales + kSplit);
    auto* probabilities = reinterpret_cast<bf16*>(expanded + expanded_pairs);
    bf16* queries = probabilities + size_t(rows) * kSplit;
    float* states = reinterpret_cast<float*>(queries + size_t(rows) * width);
    const bool is_partial = item.partial >= 0;
    const AttentionState part =
        state_at(is_partial ? call.partials + item.partial + head * int64_t(state_floats) : states, rows, width);
    const AttentionState whole = state_at(states + state_floats, rows, width);
    if (item.num_splits > 1) clear_state(whole, rows, width);

    const int first_query = batch.starts[item.sequence];
    const int past = batch.lengths[item.sequence] - (batch.starts[item.sequence + 1] - first_query);
    for (int row = 0; row < rows; ++row) {
        const int flat = item.first_row + row;
        const bf16* from =
            call.query + (first_query + flat / group) * call.query_stride + (head * group + flat % group) * dim;
        std::memcpy(queries + row * width, from, size_t(dim) * sizeof(bf16));
        std::memset(queries + row * width + dim, 0, size_t(width - dim) * sizeof(bf16));
    }
    const int seen = past + (item.first_row + rows - 1) / group + 1;  // positions that the last row sees
    const int32_t* table = batch.tables + item.sequence * batch.table_width;
    for (int split = item.first_split; split < item.first_split + item.num_splits; ++split) {
        const int start = split * kSplit, end = std::min(seen, start + kSplit);
        const int panels = (end - start + kPanel - 1) / kPanel;
        SplitPanels keys{panels, {}}, values{panels, {}};
        size_t places[SplitPanels::kMost];
        for (int p = 0; p < panels; ++p) {
            const int position = start + p * kPanel;
            const int32_t block = table[position / cache.block_size];
            const int inside = int(position % cache.block_size) / kPanel;
            places[p] = cache.panel_offset(block, head, inside);
            if (cache.is_quantized()) {
                keys.at[p] = values.at[p] = expanded + size_t(p) * panel_pairs;
                const size_t scales_at = cache.scale_offset(block, head, inside);
                std::memcpy(key_scales + p * kPanel, cache.key_scales + scales_at, kPanel * sizeof(float));
                std::memcpy(value_scales + p * kPanel, cache.value_scales + scales_at, kPanel * sizeof(float));
            } else {
                keys.at[p] = reinterpret_cast<const uint32_t*>(static_cast<const bf16*>(cache.keys) + places[p]);
                values.at[p] = reinterpret_cast<const uint32_t*>(static_cast<const bf16*>(cache.values) + places[p]);
            }
        }
        if (cache.is_quantized()) expand_panels(panels, cache.keys, places, panel_pairs, expanded);
        keys.follow_with(values);
        values.follow_with(values);
        multiply_keys(rows, width, queries, keys, scores);
        if (cache.is_quantized()) {
            for (int row = 0; row < rows; ++row)
                for (int i = 0; i < panels * kPanel; i += W) {
                    float* score = scores + size_t(row) * kSplit + i;
                    store(score, mul(load(score), load(key_scales + i)));
                }
            expand_panels(panels, cache.values, places, panel_pairs, expanded);
        }
        for (int row = 0; row < rows; ++row) {
            const int visible = std::min(past + (item.first_row + row) / group + 1 - start, panels * kPanel);
            bf16* row_probabilities = probabilities + size_t(row) * kSplit;
            if (visible <= 0) {
                std::memset(row_probabilities, 0, size_t(panels) * kPanel * sizeof(bf16));
                part.totals[row] = 0.0f, part.largest[row] = -INFINITY;
                continue;
            }
            split_softmax(scores + size_t(row) * kSplit, row_probabilities, visible, panels * kPanel, call.scale,
                          cache.is_quantized() ? value_scales : nullptr, part.totals + row, part.largest + row);
        }
        multiply_values(rows, width, probabilities, values, part.sums);
        if (item.num_splits > 1)
            for (int row = 0; row < rows; ++row) merge_row(whole, part, row, width, call.scale);
    }
    if (!is_partial) write_rows(call, item, head, item.num_splits > 1 ? whole : part);
}

inline void merge_splits(const AttentionCall& call, const AttentionItem& item, int64_t head) {
    const int width = call.cache.width(), rows = item.rows;
    const int64_t each = int64_t(rows) * (width + 2);
    const AttentionState whole = state_at(attention_scratch().get<float>(size_t(each)), rows, width);
    clear_state(whole, rows, width);
    for (int split = 0; split < item.num_splits; ++split) {
        float* floats = call.partials + item.partial + (split * call.cache.num_kv_heads + head) * each;
        const AttentionState part = state_at(floats, rows, width);
        for (int row = 0; row < rows; ++row) merge_row(whole, part, row, width, call.scale);
    }
    write_rows(call, item, head, whole);
}

// Every row's attention; what the batch's own tokens add to the cache is there already.
inline void paged_attention(Team& team, const AttentionCall& call) {
    const long heads = long(call.cache.num_kv_heads);
    team.tasks(long(call.plan->items.size()) * heads,
               [&](long i) { attend(call, call.plan->items[size_t(i / heads)], i % heads); });
    if (call.plan->merges.empty()) return;
    team.tasks(long(call.plan->merges.size()) * heads,
               [&](long i) { merge_splits(call, call.plan->merges[size_t(i / heads)], i % heads); });
}

}  // namespace moesaic
