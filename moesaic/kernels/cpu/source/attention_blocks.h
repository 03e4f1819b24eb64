// Keys and values that lie in blocks, what a call over them is cut into, and the softmax of its rows: attention_paged.h,
// attention_products.h and attention_tiles.h do the rest.
//
// A block holds block_size positions (a multiple of 32) of one layer, and of every head two kinds of panels of 32
// positions, in the form that gemm_panel takes for B, so that nothing is rearranged when they are read:
//   keys    [block][head][block_size / 32][width / 2][32] pairs of channels, a column is a position;
//   values  [block][head][block_size / 32][width / 32][16][32] pairs of positions, a column is a channel.
// width is head_dim rounded up to 32, the rest zero. A number is bf16, or int8 with one fp32 scale for each position and
// head, which is exact in bf16: a panel of int8 is expanded (without tiles in registers where rows are few, else in the
// first-level cache) and goes the same way.
#pragma once

#include <algorithm>
#include <functional>
#include <limits>
#include <vector>

#include "gemm_bf16.h"
#include "parallel.h"
#include "transpose.h"

namespace moesaic {

constexpr int kSplit = 256;         // positions
constexpr int kSplitPanels = kSplit / kPanel;
constexpr int kAttentionRows = kWholeRows;  // (query, head) of a task
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

// What the running softmax of some rows takes (AttentionState), in whole cache lines.
inline size_t state_floats(int rows, int width) { return size_t(round_up(rows * (width + 2), 16)); }

// Tokens of one sequence that lie in one panel.
struct WriteItem {
    int first_token, count, block, panel, offset;
};

// Rows of one sequence, a row being a query and one of the heads that share a key/value head; key/value heads; and
// splits of the sequence's positions. partial: where the first head's results wait to be merged with those of the splits
// before and after, else -1. first_position: of the first panel that one of the rows sees.
struct AttentionItem {
    int sequence, first_row, rows, first_split, num_splits, first_head, num_heads;
    int64_t partial;
    int first_position;

    int start_of(int split) const { return std::max(split * kSplit, first_position); }
};

constexpr int kNoWindow = std::numeric_limits<int>::max() / 2;

// As Python says it, where 0 is none.
inline int window_of(int64_t window) { return window ? int(std::min<int64_t>(window, kNoWindow)) : kNoWindow; }

// The panel with the first position that a query at `position` sees.
inline int first_panel_seen(int position, int window) { return std::max(position - window + 1, 0) / kPanel * kPanel; }

// What a batch is cut into; the same for every layer with the same window.
struct PagedPlan {
    int window;                            // the positions that a query sees, its own the last of them
    std::vector<WriteItem> writes;
    std::vector<AttentionItem> many_rows;  // one key/value head each
    std::vector<AttentionItem> few_rows;   // one split each, in the order in which they are best read
    std::vector<AttentionItem> merges;
    size_t partial_floats = 0;
    double work = 0;
};

// Into how many runs of key/value heads the rows of sequences with few of them are cut: into as few as keep all threads
// busy. A run of half as many heads reads about a tenth slower.
inline int head_runs(const PagedBatch& batch, int group, int kv_heads, int window) {
    const int threads = omp_get_max_threads();
    std::vector<int> lengths;  // of splits, in panels
    for (int s = 0; s < batch.num_sequences; ++s) {
        const int queries = batch.starts[s + 1] - batch.starts[s];
        if (queries == 0 || queries * group > kAttentionRows) continue;
        for (int at = first_panel_seen(batch.lengths[s] - queries, window); at < batch.lengths[s];) {
            const int end = std::min((at / kSplit + 1) * kSplit, batch.lengths[s]);
            lengths.push_back((end - at + kPanel - 1) / kPanel);
            at = end;
        }
    }
    int best = 1;
    double least = INFINITY, slower = 1;
    for (int runs = 1; runs < 2 * kv_heads && int(lengths.size()) < 4 * threads; runs *= 2, slower *= 1.1) {
        const int here = std::min(runs, kv_heads), heads = (kv_heads + here - 1) / here;
        // Each takes the next when it is free, the one that is first in front.
        std::vector<int> busy(size_t(threads), 0);
        int last = 0;
        for (const int length : lengths)
            for (int head = 0; head < kv_heads; head += heads) {
                std::pop_heap(busy.begin(), busy.end(), std::greater<int>());
                last = std::max(last, busy.back() += length * std::min(heads, kv_heads - head));
                std::push_heap(busy.begin(), busy.end(), std::greater<int>());
            }
        const double time = slower * last;
        if (time < least) least = time, best = here;
    }
    return best;
}

// Where the new tokens of a batch go.
inline std::vector<WriteItem> plan_writes(const PagedBatch& batch, const PagedCache& cache) {
    std::vector<WriteItem> writes;
    const int size = int(cache.block_size);
    for (int s = 0; s < batch.num_sequences; ++s) {
        const int first = batch.starts[s], queries = batch.starts[s + 1] - first, length = batch.lengths[s];
        for (int position = length - queries; position < length;) {
            const int end = std::min(length, (position / kPanel + 1) * kPanel);
            writes.push_back({first + position - (length - queries), end - position,
                              batch.tables[s * batch.table_width + position / size], position % size / kPanel,
                              position % kPanel});
            position = end;
        }
    }
    return writes;
}

inline PagedPlan plan_paged(const PagedBatch& batch, const PagedCache& cache, int64_t num_heads, int window) {
    PagedPlan plan;
    plan.window = window;
    plan.writes = plan_writes(batch, cache);
    const int kv_heads = int(cache.num_kv_heads), group = int(num_heads) / kv_heads;
    const int width = cache.width();
    const int runs = head_runs(batch, group, kv_heads, window);
    for (int s = 0; s < batch.num_sequences; ++s) {
        const int queries = batch.starts[s + 1] - batch.starts[s], length = batch.lengths[s];
        if (queries == 0) continue;
        const int rows = queries * group;
        plan.work += 4.0 * rows * cache.num_kv_heads * double(std::min(length, window)) * width;
        if (rows <= kAttentionRows) {
            const int heads_each = std::max(1, std::min((kv_heads + runs - 1) / runs, kAttentionRows / rows));
            const int start = first_panel_seen(length - queries, window), first_split = start / kSplit;
            const int splits = (length + kSplit - 1) / kSplit - first_split;
            const int64_t each = int64_t(state_floats(rows, width));
            const int64_t partial = splits == 1 ? -1 : int64_t(plan.partial_floats);
            for (int split = 0; split < splits; ++split)
                for (int head = 0; head < kv_heads; head += heads_each)
                    plan.few_rows.push_back({s, 0, rows, first_split + split, 1, head,
                                             std::min(heads_each, kv_heads - head),
                                             splits == 1 ? -1 : partial + (split * kv_heads + head) * each, start});
            if (splits == 1) continue;
            for (int head = 0; head < kv_heads; ++head)
                plan.merges.push_back({s, 0, rows, first_split, splits, head, 1, partial + head * each, start});
            plan.partial_floats += size_t(splits * each * kv_heads);
            continue;
        }
        // The last rows see the most: they go first, so that the short ones fill the end.
        for (int row = (rows - 1) / kAttentionRows * kAttentionRows; row >= 0; row -= kAttentionRows) {
            const int here = std::min(kAttentionRows, rows - row);
            const int seen = length - queries + (row + here - 1) / group + 1;
            const int start = first_panel_seen(length - queries + row / group, window), first_split = start / kSplit;
            const int splits = (seen + kSplit - 1) / kSplit - first_split;
            for (int head = 0; head < kv_heads; ++head)
                plan.many_rows.push_back({s, row, here, first_split, splits, head, 1, -1, start});
        }
    }
    return plan;
}

// W pairs of int8 to pairs of bf16.
MOESAIC_INLINE Vi expand_pairs(const uint16_t* pairs) {
#if defined(__AVX512BF16__)
    // Whose instruction keeps the order of its 32 numbers: 7 operations instead of 9, of which one unit has 5.
    const auto numbers = [](const uint16_t* half) {
        return Vf{_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)half)))};
    };
    return to_bf16_rows(numbers(pairs), numbers(pairs + 8));
#elif defined(__AVX512F__)
    const __m512i x = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)pairs));
    const __m512 low = _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(x, 24), 24));
    const __m512 high = _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(x, 16), 24));
    return {_mm512_or_si512(_mm512_srli_epi32(_mm512_castps_si512(low), 16), _mm512_castps_si512(high))};
#else
    const __m256i x = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)pairs));
    const __m256 low = _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(x, 24), 24));
    const __m256 high = _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(x, 16), 24));
    return {_mm256_or_si256(_mm256_srli_epi32(_mm256_castps_si256(low), 16), _mm256_castps_si256(high))};
#endif
}

// Pairs of int8 to pairs of bf16; count a multiple of 32. each_line(number) is called for every cache line of them.
template <typename EachLine>
MOESAIC_INLINE void expand_pairs(int count, const uint16_t* from, uint32_t* to, EachLine&& each_line) {
    for (int i = 0; i < count; i += 32) {
        each_line(i / 32);
        for (int v = 0; v < 32; v += W) storei(to + i + v, expand_pairs(from + i + v));
    }
}
// The same; what stands at `ahead` will be read soon.
inline void expand_pairs(int count, const uint16_t* from, const uint16_t* ahead, uint32_t* to) {
    expand_pairs(count, from, to, [ahead](int line) { fetch(ahead + line * 32); });
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
    if (item.offset == 0 && item.count < kPanel) {
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
    float scale;         // on the scores, 1 / sqrt(head_dim) for most
    const float* sinks;  // (num_heads), scores that take part in the softmax, as they are, and have no value; or null
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

// Take rows of `from` into `to`; a row that saw nothing has a total of 0.
inline void merge_rows(const AttentionState& to, const AttentionState& from, int rows, int width, float scale) {
    const Vf factor = set1(scale * 1.44269504088896341f);
    for (int first = 0; first < rows; first += W) {
        const int here = std::min(rows - first, W);
        float before[W] = {}, other[W] = {}, keep[W], take[W];
        std::memcpy(before, to.largest + first, size_t(here) * sizeof(float));
        std::memcpy(other, from.largest + first, size_t(here) * sizeof(float));
        const Vf largest = max(load(before), load(other));
        store(keep, exp2_of_negative(mul(sub(load(before), largest), factor)));
        store(take, exp2_of_negative(mul(sub(load(other), largest), factor)));
        for (int i = 0, row = first; i < here; ++i, ++row) {
            if (from.totals[row] == 0.0f) continue;
            const float kept = to.totals[row] == 0.0f ? 0.0f : keep[i];
            float* sums = to.sums + size_t(row) * width;
            const float* more = from.sums + size_t(row) * width;
            for (int j = 0; j < width; j += W)
                store(sums + j, fma(load(more + j), set1(take[i]), mul(load(sums + j), set1(kept))));
            to.totals[row] = std::fmaf(from.totals[row], take[i], to.totals[row] * kept);
            to.largest[row] = before[i] > other[i] ? before[i] : other[i];
        }
    }
}

inline void clear_state(const AttentionState& state, int rows, int width) {
    std::memset(state.sums, 0, size_t(rows) * width * sizeof(float));
    for (int row = 0; row < rows; ++row) state.totals[row] = 0.0f, state.largest[row] = -INFINITY;
}

inline void write_rows(const AttentionCall& call, const AttentionItem& item, int64_t head,
                       const AttentionState& state) {
    const int group = int(call.num_heads / call.cache.num_kv_heads), dim = int(call.cache.head_dim);
    const int width = call.cache.width();
    int member = item.first_row % group;
    bf16* token = call.out + (call.batch.starts[item.sequence] + item.first_row / group) * call.out_stride +
                  head * group * dim;
    for (int row = 0; row < item.rows; ++row) {
        bf16* out = token + member * dim;
        float total = state.totals[row];
        if (call.sinks)
            total += sink_weight(call.sinks[head * group + member], 1.44269504f * call.scale, state.largest[row]);
        const float share = 1.0f / total;
        const float* sums = state.sums + size_t(row) * width;
        int i = 0;
        for (; i + W <= dim; i += W) store_bf16(out + i, mul(load(sums + i), set1(share)));
        for (; i < dim; ++i) out[i] = float_to_bf16(sums[i] * share);
        if (++member == group) member = 0, token += call.out_stride;
    }
}

alignas(64) inline constexpr float kLanes[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

// The largest of a row's first `visible` scores, at least one; NaN has no part in it. The scores behind them, to a
// multiple of 32, become -infinity.
inline float largest_score(float* scores, int visible) {
    const Vf none = set1(-INFINITY);
    for (int i = visible / W * W; i % kPanel || i < visible; i += W)
        store(scores + i, select_less(load(kLanes), set1(float(visible - i)), load(scores + i), none));
    Vf highest[2] = {none, none};
    for (int i = 0; i < visible; i += 2 * W)
        for (int half = 0; half < 2; ++half) highest[half] = max(load(scores + i + half * W), highest[half]);
    return maximum(max(highest[0], highest[1]));
}

// Of a row's scores of consecutive positions, those that it sees: [first, end). Nothing where end is 0.
struct Seen {
    int first, end;

    // position: the row's own, counted from the first score's.
    Seen(int position, int count, int window)
        : first(std::max(position - window + 1, 0)), end(std::min(position + 1, count)) {
        if (first >= end) first = end = 0;
    }
    Seen() : Seen(-1, 0, 1) {}
};

// The scores before the first one that is seen become -infinity.
inline void hide_before(float* scores, int first) {
    for (int i = 0; i < first; i += W)
        store(scores + i, select_less(load(kLanes), set1(float(first - i)), set1(-INFINITY), load(scores + i)));
}

// Exponentials of a row's scores, exp(scale * (score - largest)), to a part in 10^5, since they are rounded to bf16, and
// their sum. 2^x from x as a whole number of 2^-23: its upper bits are the result's exponent, and its lower ones a number
// from 1 to 2 that a polynomial takes to the result's mantissa. That is 9 floating-point operations instead of 13: while
// tiles are in use, one unit of two takes them, and both take the integer ones.
struct ScoreExponentials {
    Vf top, factor;
    Vf sums[2];
    Vi seen;  // all bits of the numbers that were taken; only a NaN has the highest

    ScoreExponentials() = default;
    ScoreExponentials(float scale, float largest)
        : top(set1(largest)), factor(set1(scale * (1.44269504088896341f * 0x1p23f))), sums{zero(), zero()},
          seen(set1i(0)) {}
    // Of two neighbouring vectors.
    MOESAIC_INLINE void take(Vf first, Vf second, Vf out[2]) {
        const Vf scores[2] = {first, second};
        Vi steps[2];
        for (int i = 0; i < 2; ++i) {
            steps[i] = to_int(max(zero(), fma(sub(scores[i], top), factor, set1(127 * 0x1p23f))));
            const Vi low = ori(andi(steps[i], set1i(0x7fffff)), set1i(0x3f800000));
            const Vf m = as_float(low);
            Vf p = set1(0x1.b7f768p-7f);
            p = fma(p, m, set1(-0x1.7fe292p-10f));
            p = fma(p, m, set1(0x1.5226dcp-3f));
            p = fma(p, m, set1(0x1.41076ap-2f));
            p = fma(p, m, set1(0x1.04d2a8p-1f));  // 1 at m = 1
            out[i] = as_float(addi(as_int(p), subi(steps[i], low)));
            sums[i] = add(sums[i], out[i]);
        }
        seen = ori(seen, ori(steps[0], steps[1]));
    }
    float total() const { return any_negative(seen) ? NAN : sum(add(sums[0], sums[1])); }
};

// Exponentials of a row's first `visible` scores, which write(position, vector, next vector) takes, and zeros up to
// `count`, a multiple of 32. Returns their sum. Where one loop over the rows looks for the largest scores and another one
// does this, no row waits for the one before: a third faster.
template <typename Write>
inline float exponentials(const float* scores, int visible, int count, float scale, float largest, Write&& write) {
    ScoreExponentials row(scale, largest);
    int i = 0;
    for (; i < visible; i += 2 * W) {
        Vf e[2];
        row.take(load(scores + i), load(scores + i + W), e);
        write(i, e[0], e[1]);
    }
    for (; i < count; i += 2 * W) write(i, zero(), zero());
    return row.total();
}

// Positions that the last row of an item sees.
inline int positions_seen(const AttentionCall& call, const AttentionItem& item) {
    const PagedBatch& batch = call.batch;
    const int queries = batch.starts[item.sequence + 1] - batch.starts[item.sequence];
    const int group = int(call.num_heads / call.cache.num_kv_heads);
    return batch.lengths[item.sequence] - queries + (item.first_row + item.rows - 1) / group + 1;
}

// A panel of an item's split: of 32 positions and one head, where its keys, its values and their scales are.
struct PanelPlace {
    size_t offset, scales;
};

inline PanelPlace panel_place(const AttentionCall& call, const AttentionItem& item, int position, int head) {
    const PagedCache& cache = call.cache;
    const int size = int(cache.block_size);
    const int32_t block = call.batch.tables[item.sequence * call.batch.table_width + position / size];
    const int inside = position % size / kPanel;
    return {cache.panel_offset(block, item.first_head + head, inside),
            cache.scale_offset(block, item.first_head + head, inside)};
}

}  // namespace moesaic
