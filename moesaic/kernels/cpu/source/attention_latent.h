// Latent attention over blocks, for serving: every head's keys and values are one vector per token, which is cached once.
//
// A block holds the vectors of block_size positions (a multiple of 32) of one layer, in the panels that attention_blocks.h
// has for keys: [block][block_size / 32][width / 2][32] pairs of channels, a column is a position. The first `rank`
// channels are the latent, which are the values too; behind them is the key that all heads share.
//
// Scores are products with panels as they are. For the values the same panels are turned in the first-level cache to
// rows of one channel, a few of them at a time, and multiplied by the probabilities as columns: the sums stand [channel]
// [row]. A row, a query and one of its heads, is worked on in splits of 256 positions whose results are merged in rising
// order, whoever had them: what it gives depends on nothing else in the call (as in attention_paged.h, but for infinite
// values).
#pragma once

#include <algorithm>

#include "attention_paged.h"

namespace moesaic {

constexpr int kLatentRows = 64;      // (query, head) of a task
constexpr int kLatentChannels = 32;  // turned at a time: 16 KiB, expanded 32
// Of values and of probabilities: one position where products take expanded rows, or a pair of them in bf16.
using LatentNumber = std::conditional_t<kExpandsRows, float, uint32_t>;
constexpr int kPositionsEach = kExpandsRows ? 1 : 2;
constexpr int kSplitNumbers = kSplit / kPositionsEach;
constexpr size_t kTurnedRow = kExpandsRows ? kScoreRow : size_t(kSplitNumbers);
constexpr size_t kMostPartialFloats = size_t(1) << 26;  // that wait to be merged: 256 MiB
#if defined(MOESAIC_TILES)
constexpr int kRowStep = kPanel;  // rows are padded to it
#else
constexpr int kRowStep = 16;
#endif

struct LatentItem {
    int sequence, first_row, rows, first_split, num_splits;
    int64_t partial;  // where the results of its splits wait to be merged, else -1
};

// What is worked on together: tokens [first_token, last_token) of the call.
struct LatentPart {
    int first_token, last_token;
    std::vector<LatentItem> items, merges;
};

// What a batch is cut into; the same for every layer.
struct LatentPlan {
    std::vector<WriteItem> writes;
    std::vector<LatentPart> parts;
    int64_t most_tokens = 0;  // of a part
    size_t partial_floats = 0;
    double work = 0;
};

// Of an item's split: sums [rank padded to 32][rows padded], totals, largest.
inline int padded_rows(int rows) { return round_up(rows, kRowStep); }
inline size_t latent_state_floats(int rows, int channels) { return size_t(padded_rows(rows)) * size_t(channels + 2); }

// `cache.head_dim` is that of the vectors. A part has as many tokens as `most_rows` of queries and heads.
inline LatentPlan plan_latent(const PagedBatch& batch, const PagedCache& cache, int64_t num_heads, int64_t rank,
                              int64_t most_rows) {
    LatentPlan plan;
    plan.writes = plan_writes(batch, cache);
    const int heads = int(num_heads), channels = round_up(int(rank), kPanel), tokens = batch.starts[batch.num_sequences];
    const int step = int(std::max<int64_t>(1, most_rows / heads));
    const int threads = omp_get_max_threads();
    for (int first = 0; first < tokens; first += step) {
        LatentPart part{first, std::min(first + step, tokens), {}, {}};
        plan.most_tokens = std::max<int64_t>(plan.most_tokens, part.last_token - first);
        int64_t whole = 0;  // rows times splits
        for (int s = 0; s < batch.num_sequences; ++s) {
            const int begin = std::max(batch.starts[s], first), end = std::min(batch.starts[s + 1], part.last_token);
            if (begin >= end) continue;
            const int past = batch.lengths[s] - batch.starts[s + 1];  // what a token's index lacks to its position
            // The last rows see the most: they go first, so that the short ones fill the end.
            const int first_row = (begin - batch.starts[s]) * heads, last_row = (end - batch.starts[s]) * heads;
            for (int row = first_row + (last_row - first_row - 1) / kLatentRows * kLatentRows; row >= first_row;
                 row -= kLatentRows) {
                const int here = std::min(kLatentRows, last_row - row);
                const int seen = past + batch.starts[s] + (row + here - 1) / heads + 1;
                const int splits = (seen + kSplit - 1) / kSplit;
                part.items.push_back({s, row, here, 0, splits, -1});
                whole += int64_t(here) * splits;
                plan.work += 4.0 * here * double(seen) * cache.width();
            }
        }
        // What one thread alone would be busy with while the others wait is shared out, a split each, as far as the
        // results have room.
        const bool are_few = int64_t(part.items.size()) < 4 * threads;
        std::vector<LatentItem> items;
        size_t floats = 0;
        for (const LatentItem& item : part.items) {
            const size_t each = latent_state_floats(item.rows, channels);
            if (!are_few || item.num_splits == 1 || int64_t(item.rows) * item.num_splits * 4 * threads <= whole ||
                floats + each * size_t(item.num_splits) > kMostPartialFloats) {
                items.push_back(item);
                continue;
            }
            part.merges.push_back(item);
            part.merges.back().partial = int64_t(floats);
            for (int split = 0; split < item.num_splits; ++split, floats += each)
                items.push_back({item.sequence, item.first_row, item.rows, split, 1, int64_t(floats)});
        }
        std::stable_sort(items.begin(), items.end(), [](const LatentItem& a, const LatentItem& b) {
            return int64_t(a.rows) * a.num_splits > int64_t(b.rows) * b.num_splits;
        });
        part.items = std::move(items);
        plan.partial_floats = std::max(plan.partial_floats, floats);
        plan.parts.push_back(std::move(part));
    }
    return plan;
}

struct LatentCall {
    const bf16* query;  // (tokens of the part, num_heads, width), zeros behind rank + key
    bf16* out;          // (tokens of the part, num_heads, rank), rounded up to 32 channels
    int64_t num_heads, rank;
    float scale;
    PagedCache cache;
    PagedBatch batch;
    const LatentPart* part;
    float* partials;  // of the plan

    int channels() const { return round_up(int(rank), kPanel); }
    // Where a row stands among those of the part.
    int64_t flat_row(const LatentItem& item) const {
        return (batch.starts[item.sequence] - part->first_token) * num_heads + item.first_row;
    }
};

// Put vectors (count, head_dim), rows `stride` elements apart, into their places of one panel.
inline void write_latent_panel(const PagedCache& cache, const WriteItem& item, const bf16* vectors, int64_t stride,
                               Scratch& scratch) {
    const int width = cache.width(), dim = int(cache.head_dim);
    auto* panel = reinterpret_cast<uint32_t*>(static_cast<bf16*>(cache.keys) +
                                              cache.panel_offset(item.block, 0, item.panel));
    // What no position has written yet is multiplied by a probability of 0, so it must be finite.
    if (item.offset == 0) std::memset(panel, 0, size_t(width) * kPanel * sizeof(bf16));
    if (dim != width || stride % 2 || reinterpret_cast<uintptr_t>(vectors) % 4) {
        auto* padded = scratch.get<bf16>(size_t(kPanel) * width);
        std::memset(padded, 0, size_t(kPanel) * width * sizeof(bf16));
        for (int i = 0; i < item.count; ++i)
            std::memcpy(padded + i * width, vectors + i * stride, size_t(dim) * sizeof(bf16));
        vectors = padded, stride = width;
    }
    transpose_dwords(item.count, width / 2, reinterpret_cast<const uint32_t*>(vectors), size_t(stride / 2),
                     panel + item.offset, kPanel);
}

// Pairs of channels of the 32 positions of a panel to rows of one channel, kTurnedRow apart; pairs of positions are W apart.
inline void turn_channels(int channels, const uint32_t* panel, LatentNumber* to) {
    for (int channel = 0; channel < channels; channel += 2, panel += kPanel, to += 2 * kTurnedRow) {
#if defined(MOESAIC_EXPANDS_ROWS)
        for (int i = 0; i < kPanel; i += W) {
            store(to + i, low_bf16(loadi(panel + i)));
            store(to + kTurnedRow + i, high_bf16(loadi(panel + i)));
        }
#else
        for (int half = 0; half < kPanel; half += 2 * W) {
            const Vi first = loadi(panel + half), second = loadi(panel + half + W);
            storei(to + half / 2, low_words(first, second));
            storei(to + kTurnedRow + half / 2, high_words(first, second));
        }
#endif
    }
}

#if !defined(MOESAIC_TILES)

// C[R][V W] = A[R][count] B[count][V W], rows of A kTurnedRow numbers apart, of B and C ld.
template <int R, int V>
[[gnu::noinline]] void multiply_turned(int count, const LatentNumber* a, const LatentNumber* b, float* c, size_t ld) {
    Vf acc[R][V];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) acc[r][v] = zero();
    ThirdRows<R, LatentNumber> rows(a, kTurnedRow);
    for (int i = 0; i < count; ++i, b += ld) {
#if defined(MOESAIC_EXPANDS_ROWS)
        Vf columns[V];
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) columns[v] = load(b + v * W);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) add_products(acc[r], rows.at(r, 0), columns);
#else
        Vi columns[V];
        for (int v = 0; v < V; ++v) columns[v] = loadi(b + v * W);
        for (int r = 0; r < R; ++r) {
            const Vi row = broadcast_dword(&rows.at(r, 0));
            for (int v = 0; v < V; ++v) acc[r][v] = dot_bf16(acc[r][v], row, columns[v]);
        }
#endif
        rows.go_on(1);
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) store(c + r * ld + v * W, acc[r][v]);
}

template <int R, int V>
inline void multiply_all_turned(int count, const LatentNumber* a, const LatentNumber* b, float* c, size_t ld) {
    for (int row = 0; row < kLatentChannels; row += R)
        multiply_turned<R, V>(count, a + row * kTurnedRow, b, c + row * ld, ld);
}

#endif

// sums[32 channels][rows] = turned[32 channels][count] times probabilities[count][rows], `rows` padded.
inline void multiply_latents(int rows, int count, const LatentNumber* turned, const LatentNumber* probabilities,
                             float* sums) {
#if defined(MOESAIC_TILES)
    for (int row = 0; row < rows; row += kPanel)
        gemm_panel(kLatentChannels, count, reinterpret_cast<const bf16*>(turned), 2 * kTurnedRow, probabilities + row,
                   size_t(rows), sums + row, size_t(rows), false);
#elif defined(__AVX512F__)
    // Enough sums of their own to hide a product's latency.
    if (rows == 16) {
        multiply_all_turned<16, 1>(count, turned, probabilities, sums, size_t(rows));
    } else if (rows == 48) {
        multiply_all_turned<8, 3>(count, turned, probabilities, sums, size_t(rows));
    } else if (rows == 32 || kExpandsRows) {  // 64 of expanded probabilities do not fit the first-level cache
        for (int row = 0; row < rows; row += 2 * W)
            multiply_all_turned<8, 2>(count, turned, probabilities + row, sums + row, size_t(rows));
    } else {
        multiply_all_turned<4, 4>(count, turned, probabilities, sums, size_t(rows));
    }
#else
    for (int row = 0; row < rows; row += 2 * W)
        multiply_all_turned<4, 2>(count, turned, probabilities + row, sums + row, size_t(rows));
#endif
}

// The running softmax of an item's rows: as AttentionState, sums [channels][rows padded].
struct LatentState {
    float *sums, *totals, *largest;

    LatentState(float* floats, int rows, int channels)
        : sums(floats), totals(floats + size_t(rows) * channels), largest(totals + rows) {}
};

// By what the sums of some rows so far, and those of the next split, go into those of both; `to` takes the others.
inline void merge_totals(int rows, LatentState to, LatentState from, float scale, float* keep, float* take) {
    for (int row = 0; row < rows; row += W) {
        const Vf before = load(to.largest + row), other = load(from.largest + row), largest = max(before, other);
        store(keep + row, exp(mul(sub(before, largest), set1(scale))));
        store(take + row, exp(mul(sub(other, largest), set1(scale))));
        store(to.largest + row, largest);
    }
    for (int row = 0; row < rows; ++row) {
        if (from.totals[row] == 0.0f) keep[row] = 1.0f, take[row] = 0.0f;
        if (to.totals[row] == 0.0f) keep[row] = 0.0f;
        to.totals[row] = std::fmaf(from.totals[row], take[row], to.totals[row] * keep[row]);
    }
}

// whole = whole * keep + part * take, of `channels` channels.
inline void merge_sums(int channels, int rows, const float* keep, const float* take, const float* part, float* whole) {
    for (int channel = 0; channel < channels; ++channel, part += rows, whole += rows)
        for (int row = 0; row < rows; row += W)
            store(whole + row, fma(load(part + row), load(take + row), mul(load(whole + row), load(keep + row))));
}

// The weighed means of an item's rows, rounded, to where they belong; `pairs` has room for [channels / 2][rows].
inline void write_means(const LatentCall& call, const LatentItem& item, LatentState state, int rows, uint32_t* pairs) {
    const int channels = call.channels();
    for (int channel = 0; channel < channels; channel += 2)
        for (int row = 0; row < rows; row += W) {
            const Vf total = load(state.totals + row);
            const float* sums = state.sums + size_t(channel) * rows + row;
            storei(pairs + size_t(channel / 2) * rows + row,
                   interleave_bf16(div(load(sums), total), div(load(sums + rows), total)));
        }
    auto* out = reinterpret_cast<uint32_t*>(call.out + call.flat_row(item) * channels);
    for (int row = 0; row < item.rows; row += W)
        transpose_dwords(channels / 2, std::min(W, item.rows - row), pairs + row, size_t(rows),
                         out + size_t(row) * (channels / 2), size_t(channels / 2));
}

// From one row of probabilities to the next, and what a row takes beside its scores, whose place expanded ones take.
constexpr size_t kNumbersRow = kExpandsRows ? kScoreRow : size_t(kSplitNumbers);
constexpr size_t kNumbersBeside = kExpandsRows ? 0 : kNumbersRow;

inline void store_probabilities(uint32_t* pairs, Vf first, Vf second) { storei(pairs, interleave_bf16(first, second)); }

inline Scratch& expanded_queries() {
    static thread_local Scratch scratch;
    return scratch;
}

// A thread at work on one item.
inline void attend_item(const LatentCall& call, const LatentItem& item) {
    const PagedCache& cache = call.cache;
    const int width = cache.width(), channels = call.channels(), rows = padded_rows(item.rows);
    const size_t state_floats = latent_state_floats(item.rows, channels);
    const bool is_partial = item.partial >= 0;
    float* scores = attention_scratch().get<float>(size_t(item.rows) * (kScoreRow + kNumbersBeside) + 2 * kLatentRows +
                                                   size_t(kSplitNumbers) * rows + kLatentChannels * (kTurnedRow + rows) +
                                                   2 * state_floats + size_t(channels / 2) * rows + 16 * 16);
    float* next = scores;
    auto take = [&](size_t floats) {
        float* here = next;
        next += (floats + 15) / 16 * 16;
        return here;
    };
    take(size_t(item.rows) * kScoreRow);
    // Probabilities, and the same turned.
    auto* by_row = reinterpret_cast<LatentNumber*>(kExpandsRows ? scores : take(size_t(item.rows) * kNumbersBeside));
    auto* by_number = reinterpret_cast<LatentNumber*>(take(size_t(kSplitNumbers) * rows));
    auto* turned = reinterpret_cast<LatentNumber*>(take(kLatentChannels * kTurnedRow));
    float *sums = take(size_t(kLatentChannels) * rows), *keep = take(kLatentRows), *taken = take(kLatentRows);
    LatentState part(take(state_floats), rows, channels), whole(take(state_floats), rows, channels);
    if (is_partial) whole = LatentState(call.partials + item.partial, rows, channels);
    auto* means = reinterpret_cast<uint32_t*>(take(size_t(channels / 2) * rows));

    const PagedBatch& batch = call.batch;
    const int queries = batch.starts[item.sequence + 1] - batch.starts[item.sequence];
    const int past = batch.lengths[item.sequence] - queries, heads = int(call.num_heads);
    const int seen = past + (item.first_row + item.rows - 1) / heads + 1;
    const LeftRows query = left_rows(call.query + call.flat_row(item) * width, size_t(width), item.rows, width,
                                     expanded_queries());
    const int32_t* table = batch.tables + item.sequence * batch.table_width;
    for (int split = item.first_split; split < item.first_split + item.num_splits; ++split) {
        const int start = split * kSplit;
        HeadPanels panels{(std::min(seen, start + kSplit) - start + kPanel - 1) / kPanel, {}};
        for (int p = 0; p < panels.count + HeadPanels::kAhead; ++p) {
            const int position = std::min(start + p * kPanel, (seen - 1) / kPanel * kPanel);
            const int inside = int(position % cache.block_size) / kPanel;
            panels.at[p] = reinterpret_cast<const uint32_t*>(
                static_cast<const bf16*>(cache.keys) + cache.panel_offset(table[position / cache.block_size], 0, inside));
        }
        multiply_keys(item.rows, width, query, panels, scores);
        const int count = panels.count * kPanel, numbers = count / kPositionsEach;
        const auto visible = [&](int row) {
            return std::min(past + (item.first_row + row) / heads + 1 - start, count);
        };
        for (int row = 0; row < item.rows; ++row) {
            const int here = visible(row);
            part.largest[row] = here > 0 ? largest_score(scores + size_t(row) * kScoreRow, here) : -INFINITY;
        }
        for (int row = 0; row < item.rows; ++row) {
            LatentNumber* to = by_row + size_t(row) * kNumbersRow;
            part.totals[row] = exponentials(
                scores + size_t(row) * kScoreRow, visible(row), count, call.scale, part.largest[row],
                [&](int at, Vf first, Vf second) { store_probabilities(to + at / kPositionsEach, first, second); });
        }
        for (int row = item.rows; row < rows; ++row) part.totals[row] = 0.0f, part.largest[row] = -INFINITY;
        transpose_dwords(item.rows, numbers, reinterpret_cast<const uint32_t*>(by_row), kNumbersRow,
                         reinterpret_cast<uint32_t*>(by_number), size_t(rows));
        for (int row = item.rows; row < rows; ++row)
            for (int i = 0; i < numbers; ++i) by_number[size_t(i) * rows + row] = 0;
        const bool is_first = split == item.first_split;
        if (is_first) {
            std::memcpy(whole.totals, part.totals, size_t(rows) * sizeof(float));
            std::memcpy(whole.largest, part.largest, size_t(rows) * sizeof(float));
        } else {
            merge_totals(rows, whole, part, call.scale, keep, taken);
        }
        for (int channel = 0; channel < channels; channel += kLatentChannels) {
            for (int p = 0; p < panels.count; ++p)
                turn_channels(kLatentChannels, panels.at[p] + channel / 2 * kPanel, turned + p * kPanel / kPositionsEach);
            float* to = whole.sums + size_t(channel) * rows;
            multiply_latents(rows, numbers, turned, by_number, is_first ? to : sums);
            if (!is_first) merge_sums(kLatentChannels, rows, keep, taken, sums, to);
        }
    }
    if (!is_partial) write_means(call, item, whole, rows, means);
}

inline void merge_latent_splits(const LatentCall& call, const LatentItem& item) {
    const int channels = call.channels(), rows = padded_rows(item.rows);
    float* keep = attention_scratch().get<float>(2 * kLatentRows + size_t(channels / 2) * rows);
    float *taken = keep + kLatentRows, *floats = call.partials + item.partial;
    const LatentState whole(floats, rows, channels);
    for (int split = 1; split < item.num_splits; ++split) {
        floats += latent_state_floats(item.rows, channels);
        const LatentState part(floats, rows, channels);
        merge_totals(rows, whole, part, call.scale, keep, taken);
        merge_sums(channels, rows, keep, taken, part.sums, whole.sums);
    }
    write_means(call, item, whole, rows, reinterpret_cast<uint32_t*>(taken + kLatentRows));
}

// The rows of one part; what the batch's own tokens add to the cache is there already.
void latent_attention(Team& team, const LatentCall& call);

}  // namespace moesaic
