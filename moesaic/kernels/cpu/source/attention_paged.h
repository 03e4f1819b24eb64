// Attention over keys and values that lie in blocks, for serving: one new position of a sequence or many, ragged.
//
// A block holds block_size positions (a multiple of 32) of one layer, and of every head two kinds of panels of 32
// positions, in the form that gemm_panel takes for B, so that nothing is rearranged when they are read:
//   keys    [block][head][block_size / 32][width / 2][32] pairs of channels, a column is a position;
//   values  [block][head][block_size / 32][width / 32][16][32] pairs of positions, a column is a channel.
// width is head_dim rounded up to 32, the rest zero. A number is bf16, or int8 with one fp32 scale for each position and
// head, which is exact in bf16: a panel of int8 is expanded in the first-level cache and goes the same way.
//
// All query heads of a key/value head go over its keys together, and where they are few, as in a decode, several
// key/value heads take turns: their panels of the same positions lie behind one another, so that one thread reads one
// stream. A row's positions are worked on in splits of 256 whose results are merged in rising order, the same way whether
// one thread or many had them: what a row gives depends on nothing else in the call, but that an infinite value in a
// position it does not see may reach it as 0 times infinity.
#pragma once

#include <algorithm>
#include <functional>
#include <vector>

#include "gemm_bf16.h"
#include "parallel.h"
#include "transpose.h"

namespace moesaic {

constexpr int kSplit = 256;         // positions
constexpr int kSplitPanels = kSplit / kPanel;
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

// What the running softmax of some rows takes (AttentionState), in whole cache lines.
inline size_t state_floats(int rows, int width) { return size_t(round_up(rows * (width + 2), 16)); }

// Tokens of one sequence that lie in one panel.
struct WriteItem {
    int first_token, count, block, panel, offset;
};

// Rows of one sequence, a row being a query and one of the heads that share a key/value head; key/value heads; and
// splits of the sequence's positions. partial: where the first head's results wait to be merged with those of the splits
// before and after, else -1.
struct AttentionItem {
    int sequence, first_row, rows, first_split, num_splits, first_head, num_heads;
    int64_t partial;
};

// What a batch is cut into; the same for every layer.
struct PagedPlan {
    std::vector<WriteItem> writes;
    std::vector<AttentionItem> many_rows;  // one key/value head each
    std::vector<AttentionItem> few_rows;   // one split each, in the order in which they are best read
    std::vector<AttentionItem> merges;
    size_t partial_floats = 0;
    double work = 0;
};

// Into how many runs of key/value heads the rows of sequences with few of them are cut: into as few as keep all threads
// busy. A run of half as many heads reads about a tenth slower.
inline int head_runs(const PagedBatch& batch, int group, int kv_heads) {
    const int threads = omp_get_max_threads();
    std::vector<int> lengths;  // of splits, in panels
    for (int s = 0; s < batch.num_sequences; ++s) {
        const int queries = batch.starts[s + 1] - batch.starts[s];
        if (queries == 0 || queries * group > kAttentionRows) continue;
        for (int at = 0; at < batch.lengths[s]; at += kSplit)
            lengths.push_back((std::min(kSplit, batch.lengths[s] - at) + kPanel - 1) / kPanel);
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

inline PagedPlan plan_paged(const PagedBatch& batch, const PagedCache& cache, int64_t num_heads) {
    PagedPlan plan;
    plan.writes = plan_writes(batch, cache);
    const int kv_heads = int(cache.num_kv_heads), group = int(num_heads) / kv_heads;
    const int width = cache.width();
    const int runs = head_runs(batch, group, kv_heads);
    for (int s = 0; s < batch.num_sequences; ++s) {
        const int queries = batch.starts[s + 1] - batch.starts[s], length = batch.lengths[s];
        if (queries == 0) continue;
        const int rows = queries * group;
        plan.work += 4.0 * rows * cache.num_kv_heads * double(length) * width;
        if (rows <= kAttentionRows) {
            const int heads_each = std::max(1, std::min((kv_heads + runs - 1) / runs, kAttentionRows / rows));
            const int splits = (length + kSplit - 1) / kSplit;
            const int64_t each = int64_t(state_floats(rows, width));
            const int64_t partial = splits == 1 ? -1 : int64_t(plan.partial_floats);
            for (int split = 0; split < splits; ++split)
                for (int head = 0; head < kv_heads; head += heads_each)
                    plan.few_rows.push_back({s, 0, rows, split, 1, head, std::min(heads_each, kv_heads - head),
                                             splits == 1 ? -1 : partial + (split * kv_heads + head) * each});
            if (splits == 1) continue;
            for (int head = 0; head < kv_heads; ++head)
                plan.merges.push_back({s, 0, rows, 0, splits, head, 1, partial + head * each});
            plan.partial_floats += size_t(splits * each * kv_heads);
            continue;
        }
        // The last rows see the most: they go first, so that the short ones fill the end.
        for (int row = (rows - 1) / kAttentionRows * kAttentionRows; row >= 0; row -= kAttentionRows) {
            const int here = std::min(kAttentionRows, rows - row);
            const int seen = length - queries + (row + here - 1) / group + 1;
            for (int head = 0; head < kv_heads; ++head)
                plan.many_rows.push_back({s, row, here, 0, (seen + kSplit - 1) / kSplit, head, 1, -1});
        }
    }
    return plan;
}

#if defined(__AVX512F__) && !defined(MOESAIC_TILES)

// Many rows of one head. C[R][16 V] = A[R][count * 2 * pairs] times `count` pieces of two neighbouring panels (of one,
// where V is 2), reading `ahead`: two in registers over all pieces spare loads and stores, a third of the time.
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
                fetch(first_ahead + p * 128);
                fetch(first_ahead + p * 128 + 64);
                if constexpr (V == 4) {
                    fetch(second_ahead + p * 128);
                    fetch(second_ahead + p * 128 + 64);
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

// The panels of one head in a split of positions, and the next ones to be read.
struct HeadPanels {
    static constexpr int kAhead = 4;
    int count;
    const uint32_t* at[kSplitPanels + kAhead];
};

#if defined(MOESAIC_TILES)

// As multiply_keys, of 64 channels and whole blocks of 16 rows: a panel's keys stay in tiles while all rows pass.
inline void multiply_keys_by_tiles(int rows, const bf16* queries, const HeadPanels& keys, float* scores) {
    constexpr int kWidth = 64;
    configure_tiles(16, 16);
    for (int p = 0; p < keys.count; ++p) {
        const uint32_t *first = keys.at[p], *second = first + 16 * kPanel;  // of 32 channels each
        tile_load(4, first, kPanel * 4);
        tile_load(5, first + 16, kPanel * 4);
        tile_load(6, second, kPanel * 4);
        tile_load(7, second + 16, kPanel * 4);
        for (int row = 0; row < rows; row += 16) {
            const bf16* a = queries + row * kWidth;
            float* to = scores + row * kSplit + p * kPanel;
            tile_zero(0);
            tile_zero(1);
            tile_load(2, a, kWidth * 2);
            tile_dot_bf16(0, 2, 4);
            tile_dot_bf16(1, 2, 5);
            tile_load(3, a + 32, kWidth * 2);
            tile_dot_bf16(0, 3, 6);
            tile_dot_bf16(1, 3, 7);
            tile_store(0, to, kSplit * 4);
            tile_store(1, to + 16, kSplit * 4);
        }
    }
}

// As multiply_values, of 32 channels and up to 32 rows: sums stay in tiles while all values pass.
template <bool kBottom>
inline void multiply_values_by_tiles(int width, const bf16* probabilities, const HeadPanels& values, int chunk,
                                     float* sums) {
    constexpr size_t kRow = kSplit * sizeof(bf16), kColumns = kPanel * 4;
    clear_sums<2, kBottom>();
    for (int i = 0; i < values.count; ++i) {
        const bf16* a = probabilities + i * kPanel;
        const uint32_t* b = values.at[i] + chunk * kPanelPairs;
        tile_load_once(4, a, kRow);
        tile_load(6, b, kColumns);
        tile_dot_bf16(0, 4, 6);
        tile_load(7, b + 16, kColumns);
        tile_dot_bf16(1, 4, 7);
        if constexpr (kBottom) {
            tile_load_once(5, a + 16 * kSplit, kRow);
            tile_dot_bf16(2, 5, 6);
            tile_dot_bf16(3, 5, 7);
        }
    }
    store_sums<2, kBottom>(sums + chunk, size_t(width));
}

#endif

// scores[rows][256], the first 32 * keys.count of each row: queries[rows][width] times keys.
inline void multiply_keys(int rows, int width, const bf16* queries, const HeadPanels& keys, float* scores) {
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
    int row = 0;
#if defined(MOESAIC_TILES)
    if (width == 64) multiply_keys_by_tiles(row = rows / 16 * 16, queries, keys, scores);
#endif
    for (int p = 0; row < rows && p < keys.count; ++p)
        gemm_panel(rows - row, width / 2, queries + size_t(row) * width, size_t(width), keys.at[p], kPanel,
                   scores + row * kSplit + p * kPanel, kSplit, false);
#endif
}

// sums[rows][width] = probabilities[rows][256] times values.
inline void multiply_values(int rows, int width, const bf16* probabilities, const HeadPanels& values, float* sums) {
#if defined(__AVX512F__) && !defined(MOESAIC_TILES)
    constexpr int kChunk = kPanel * kPanelPairs;
    const uint32_t *left[kSplitPanels + HeadPanels::kAhead], *right[kSplitPanels + HeadPanels::kAhead];
    for (int chunk = 0; chunk < width; chunk += 2 * kPanel) {
        const int offset = chunk * kPanelPairs;
        for (int i = 0; i < values.count + HeadPanels::kAhead; ++i) {
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
#elif defined(MOESAIC_TILES)
    // A chunk's values stay in the first-level cache while all rows pass.
    const int steps = (rows + 31) / 32;
    for (int chunk = 0; chunk < width; chunk += kPanel)
        for (int step = 0; step < steps; ++step) {
            const RowBlock block(rows, steps, step);
            const bf16* a = probabilities + block.row * kSplit;
            float* c = sums + size_t(block.row) * width;
            configure_tiles(std::min(block.size, 16), std::max(block.size - 16, 0));
            if (block.size > 16)
                multiply_values_by_tiles<true>(width, a, values, chunk, c);
            else
                multiply_values_by_tiles<false>(width, a, values, chunk, c);
        }
#else
    for (int i = 0; i < values.count; ++i)
        for (int chunk = 0; chunk < width; chunk += kPanel)
            gemm_panel(rows, kPanelPairs, probabilities + i * kPanel, kSplit, values.at[i] + chunk * kPanelPairs,
                       kPanel, sums + chunk, size_t(width), i > 0);
#endif
}

// Few rows of several heads: panels of the same positions, of one head after the other, and those that are read later.
struct PanelReads {
    const char* const* at;
    const char* const* ahead;  // null: nothing is brought nearer
    size_t offset;             // bytes into each
    size_t bytes;              // of each
    int index;                 // of the first one among all that are read in turn
};

// Rows of one head after the other: head i's begin i * step elements behind the first one's, rows are ld apart.
template <typename T>
struct HeadRows {
    T* first;
    size_t ld, step;
};

constexpr int kFewAttentionRows = 6;

#if defined(__AVX512F__) && !defined(MOESAIC_TILES)

// Of each head: C[R][32 N] (+)= A[R][2 * pairs] times N times 32 columns, which lie behind one another: a panel of keys,
// or 64 channels of one of values, since the four rows of a grouped decode have too few sums for half of them to hide a
// product's latency.
template <int R, int N, bool Prefetch>
inline void multiply_heads(int heads, int pairs, HeadRows<const bf16> a, PanelReads reads, HeadRows<float> c,
                           bool accumulate) {
    constexpr int V = N * kPanel / W;
    for (int head = 0; head < heads; ++head, a.first += a.step, c.first += c.step) {
        const auto* panel = reinterpret_cast<const uint32_t*>(reads.at[head] + reads.offset);
        const char* ahead = Prefetch ? reads.ahead[head] + reads.offset : nullptr;
        Vf acc[R][V];
        for (int r = 0; r < R; ++r)
            for (int v = 0; v < V; ++v) acc[r][v] = accumulate ? load(c.first + r * c.ld + v * W) : zero();
        for (int p = 0; p < pairs; ++p) {
            Vi columns[V];
            for (int v = 0; v < V; ++v) {
                const int place = (v / 2 * pairs + p) * kPanel + v % 2 * W;
                columns[v] = loadi(panel + place);
                if constexpr (Prefetch) fetch(ahead + place * 4);
            }
            for (int r = 0; r < R; ++r) {
                const Vi row = broadcast_dword(a.first + r * a.ld + 2 * p);
                for (int v = 0; v < V; ++v) acc[r][v] = dot_bf16(acc[r][v], row, columns[v]);
            }
        }
        for (int r = 0; r < R; ++r)
            for (int v = 0; v < V; ++v) store(c.first + r * c.ld + v * W, acc[r][v]);
    }
}

template <int N, int R = kFewAttentionRows>
inline void multiply_heads_of(int rows, int heads, int pairs, HeadRows<const bf16> a, PanelReads reads,
                              HeadRows<float> c, bool accumulate) {
    if constexpr (R > 0) {
        if (rows < R)
            multiply_heads_of<N, R - 1>(rows, heads, pairs, a, reads, c, accumulate);
        else if (reads.ahead)
            multiply_heads<R, N, true>(heads, pairs, a, reads, c, accumulate);
        else
            multiply_heads<R, N, false>(heads, pairs, a, reads, c, accumulate);
    }
}

#else

#if defined(MOESAIC_TILES)

// What a product reads ahead of the next four panels, lines of each in turn (Streams says why); four panels' products
// bring them all.
struct PanelsAhead {
    static constexpr int kPanels = 4;
    const char* const* panels;
    size_t at;  // bytes into each

    PanelsAhead(const PanelReads& reads, int panel, size_t place)
        : panels(reads.at + panel + kPanels - (reads.index + panel) % kPanels),
          at((size_t((reads.index + panel) % kPanels) * reads.bytes + place) / kPanels) {}
    MOESAIC_INLINE void quarter() {
        for (int line = 0; line < 2; ++line, at += 64)
            for (int i = 0; i < kPanels; ++i) fetch(panels[i] + at);
    }
};

#endif

template <int N>
inline void multiply_heads_of(int rows, int heads, int pairs, HeadRows<const bf16> a, PanelReads reads,
                              HeadRows<float> c, bool accumulate) {
    for (int head = 0; head < heads; ++head)
        for (int i = 0; i < N; ++i) {
            const size_t place = reads.offset + size_t(i * pairs * kPanel) * 4;
            const uint32_t* panel = reinterpret_cast<const uint32_t*>(reads.at[head] + place);
            const bf16* left = a.first + head * a.step;
            float* sums = c.first + head * c.step + i * kPanel;
#if defined(MOESAIC_TILES)
            if (reads.ahead) {
                gemm_tiles<2, Stays::kRows>(rows, pairs, left, a.ld, panel, kPanel, sums, c.ld, accumulate,
                                            PanelsAhead(reads, head, place));
                continue;
            }
#endif
            gemm_panel(rows, pairs, left, a.ld, panel, kPanel, sums, c.ld, accumulate,
                       reads.ahead ? reads.ahead[head] + place : nullptr);
        }
}

#endif

// Pairs of int8 to pairs of bf16; count a multiple of 16. What stands at `ahead` will be read soon.
inline void expand_pairs(int count, const uint16_t* from, const uint16_t* ahead, uint32_t* to) {
#if defined(__AVX512F__)
    for (int i = 0; i < count; i += 16) {
        fetch(ahead + i);
        const __m512i x = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(from + i)));
        const __m512 low = _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(x, 24), 24));
        const __m512 high = _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(x, 16), 24));
        _mm512_storeu_si512(
            to + i, _mm512_or_si512(_mm512_srli_epi32(_mm512_castps_si512(low), 16), _mm512_castps_si512(high)));
    }
#else
    for (int i = 0; i < count; i += 8) {
        fetch(ahead + i);
        const __m256i x = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)(from + i)));
        const __m256 low = _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(x, 24), 24));
        const __m256 high = _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(x, 16), 24));
        _mm256_storeu_si256((__m256i*)(to + i), _mm256_or_si256(_mm256_srli_epi32(_mm256_castps_si256(low), 16),
                                                                _mm256_castps_si256(high)));
    }
#endif
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
    store(factors, exp2_of_negative(set1((before - largest) * (scale * 1.44269504088896341f))));
    const float keep = to.totals[row] == 0.0f ? 0.0f : factors[0];
    store(factors, exp2_of_negative(set1((other - largest) * (scale * 1.44269504088896341f))));
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
        const float share = 1.0f / state.totals[row];
        const float* sums = state.sums + size_t(row) * width;
        int i = 0;
        for (; i + W <= dim; i += W) store_bf16(out + i, mul(load(sums + i), set1(share)));
        for (; i < dim; ++i) out[i] = float_to_bf16(sums[i] * share);
    }
}

// The largest of a row's first `visible` scores, at least one; NaN has no part in it. The scores behind them, to a
// multiple of 32, become -infinity.
inline float largest_score(float* scores, int visible) {
    alignas(64) static constexpr float kLanes[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const Vf none = set1(-INFINITY);
    for (int i = visible / W * W; i % kPanel || i < visible; i += W)
        store(scores + i, select_less(load(kLanes), set1(float(visible - i)), load(scores + i), none));
    Vf highest[2] = {none, none};
    for (int i = 0; i < visible; i += 2 * W)
        for (int half = 0; half < 2; ++half) highest[half] = max(load(scores + i + half * W), highest[half]);
    return maximum(max(highest[0], highest[1]));
}

// exp(scale * (score - largest)) of those scores, which write(position, vector, next vector) takes, and zeros up to
// `count`, a multiple of 32. Returns their sum. Where one loop over the rows looks for the largest scores and another one
// does this, no row waits for the one before: a third faster.
template <typename Write>
inline float exponentials(const float* scores, int visible, int count, float scale, float largest, Write&& write) {
    const Vf top = set1(largest), factor = set1(scale * 1.44269504088896341f);
    Vf sums[2] = {zero(), zero()};
    int i = 0;
    for (; i < visible; i += 2 * W) {
        Vf e[2];
        for (int half = 0; half < 2; ++half) {
            e[half] = exp2_of_negative(mul(sub(load(scores + i + half * W), top), factor));
            sums[half] = add(sums[half], e[half]);
        }
        write(i, e[0], e[1]);
    }
    for (; i < count; i += 2 * W) write(i, zero(), zero());
    return sum(add(sums[0], sums[1]));
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

// The panels of a split in the order in which they are read: keys by position and head, values likewise, and the first
// ones of what is read after them.
struct SplitPanels {
    static constexpr int kNear = 2;                   // panels between reading ahead and reading
    static constexpr int kAhead = kHasTiles ? 7 : 2;  // panels behind the last one that are read ahead
    PanelPlace places[kSplitPanels * kAttentionRows];
    const char* at[2 * kSplitPanels * kAttentionRows + kAhead];

    void list(const AttentionCall& call, const AttentionItem& item, int split, int panels) {
        const size_t size = call.cache.is_quantized() ? 1 : sizeof(bf16);
        const char* keys = static_cast<const char*>(call.cache.keys);
        const char* values = static_cast<const char*>(call.cache.values);
        const int count = panels * item.num_heads;
        const size_t head_step = size_t(call.cache.block_size) * call.cache.width();
        for (int p = 0, n = 0; p < panels; ++p) {
            PanelPlace place = panel_place(call, item, split * kSplit + p * kPanel, 0);
            for (int head = 0; head < item.num_heads; ++head, ++n) {
                places[n] = place;
                at[n] = keys + place.offset * size;
                at[count + n] = values + place.offset * size;
                place.offset += head_step, place.scales += size_t(call.cache.block_size);
            }
        }
        for (int i = 0; i < kAhead; ++i) at[2 * count + i] = at[2 * count - 1];
    }
    void follow_with(const AttentionCall& call, const AttentionItem& next, int split, int count) {
        const size_t size = call.cache.is_quantized() ? 1 : sizeof(bf16);
        const int start = split * kSplit, seen = positions_seen(call, next);
        for (int i = 0; i < kAhead; ++i) {
            const int position = std::min(start + i / next.num_heads * kPanel, (seen - 1) / kPanel * kPanel);
            const PanelPlace place = panel_place(call, next, position, i % next.num_heads);
            at[2 * count + i] = static_cast<const char*>(call.cache.keys) + place.offset * size;
        }
    }
};

// A thread at work on one item. scores and probabilities are [heads][rows][256], queries [heads][rows][width].
class ItemWork {
  public:
    ItemWork(const AttentionCall& call, const AttentionItem& item)
        : call_(call), cache_(call.cache), item_(item), width_(cache_.width()), rows_(item.rows), heads_(item.num_heads),
          group_(int(call.num_heads / cache_.num_kv_heads)), panel_pairs_(size_t(width_) * kPanelPairs),
          floats_each_(state_floats(rows_, width_)), is_quantized_(cache_.is_quantized()) {
        const size_t all_rows = size_t(rows_) * heads_, expanded = is_quantized_ ? kSplitPanels * panel_pairs_ : 0;
        scores_ = attention_scratch().get<float>(all_rows * kSplit + 2 * heads_ * floats_each_ + kSplit + expanded +
                                                 all_rows * (kSplit + width_) / 2);
        value_scales_ = scores_ + all_rows * kSplit;
        expanded_ = reinterpret_cast<uint32_t*>(value_scales_ + kSplit);
        probabilities_ = reinterpret_cast<bf16*>(expanded_ + expanded);
        queries_ = probabilities_ + all_rows * kSplit;
        states_ = reinterpret_cast<float*>(queries_ + all_rows * width_);
    }

    // All of it, and the first look at the `next` item, or null.
    void run(const AttentionItem* next) {
        gather_queries();
        const int seen = positions_seen(call_, item_), last = item_.first_split + item_.num_splits - 1;
        for (int split = item_.first_split; split <= last; ++split) {
            start_ = split * kSplit;
            panels_ = (std::min(seen, start_ + kSplit) - start_ + kPanel - 1) / kPanel;
            list_.list(call_, item_, split, panels_);
            if (split < last)
                list_.follow_with(call_, item_, split + 1, panels_ * heads_);
            else if (next)
                list_.follow_with(call_, *next, next->first_split, panels_ * heads_);
            multiply_by_keys();
            for (int head = 0; head < heads_; ++head) softmax(head);
            multiply_by_values();
            for (int head = 0; item_.num_splits > 1 && head < heads_; ++head)
                for (int row = 0; row < rows_; ++row) merge_row(whole(head), part(head), row, width_, call_.scale);
        }
        for (int head = 0; item_.partial < 0 && head < heads_; ++head)
            write_rows(call_, item_, item_.first_head + head, item_.num_splits > 1 ? whole(head) : part(head));
    }

  private:
    // Of a split, and of all splits.
    AttentionState part(int head) const {
        float* first = item_.partial < 0 ? states_ : call_.partials + item_.partial;
        return state_at(first + head * floats_each_, rows_, width_);
    }
    AttentionState whole(int head) const { return state_at(states_ + (heads_ + head) * floats_each_, rows_, width_); }

    size_t score_place(int head, int row) const { return size_t(head * rows_ + row) * kSplit; }

    void gather_queries() {
        const PagedBatch& batch = call_.batch;
        const int first_query = batch.starts[item_.sequence], dim = int(cache_.head_dim);
        past_ = batch.lengths[item_.sequence] - (batch.starts[item_.sequence + 1] - first_query);
        for (int head = 0; head < heads_; ++head) {
            if (item_.num_splits > 1) clear_state(whole(head), rows_, width_);
            const bf16* from = call_.query + (first_query + item_.first_row / group_) * call_.query_stride +
                               (item_.first_head + head) * group_ * dim;
            int member = item_.first_row % group_;
            for (int row = 0; row < rows_; ++row) {
                const bf16* own = from + member * dim;
                bf16* to = queries_ + (head * rows_ + row) * width_;
                int i = 0;
                for (; i + 2 * W <= dim; i += 2 * W) storei(to + i, loadi(own + i));
                for (; i < width_; ++i) to[i] = i < dim ? own[i] : bf16(0);
                if (++member == group_) member = 0, from += call_.query_stride;
            }
        }
    }

    // Few rows: body(p, head, heads, reads) for the panels from `first` of the list on, all heads of a panel together,
    // or, where it has to be expanded before, one by one.
    template <typename Body>
    void by_panel(int first, Body&& body) {
        for (int p = 0; p < panels_; ++p) {
            const int index = first + p * heads_;
            const char* const* at = list_.at + index;
            const char* const* ahead = at + SplitPanels::kNear;
            if (!is_quantized_) {
                body(p, 0, heads_, PanelReads{at, ahead, 0, panel_pairs_ * 4, index});
                continue;
            }
            const char* own = reinterpret_cast<const char*>(expanded_);
            for (int head = 0; head < heads_; ++head) {
                expand_pairs(int(panel_pairs_), reinterpret_cast<const uint16_t*>(at[head]),
                             reinterpret_cast<const uint16_t*>(ahead[head]), expanded_);
                body(p, head, 1, PanelReads{&own, nullptr, 0, panel_pairs_ * 4, index + head});
            }
        }
    }

    // Many: body(head, its panels), of those from `first` of the list on.
    template <typename Body>
    void by_head(int first, Body&& body) {
        const int end = 2 * panels_ * heads_ + SplitPanels::kAhead - 1;
        for (int head = 0; head < heads_; ++head) {
            HeadPanels own{panels_, {}};
            for (int p = 0; p < panels_ + HeadPanels::kAhead; ++p) {
                const int n = first + p * heads_ + head;
                const char* at = list_.at[std::min(n, end)];
                own.at[p] = reinterpret_cast<const uint32_t*>(at);
                if (!is_quantized_) continue;
                own.at[p] = expanded_ + std::min(p, panels_ - 1) * panel_pairs_;
                if (p < panels_)
                    expand_pairs(int(panel_pairs_), reinterpret_cast<const uint16_t*>(at),
                                 reinterpret_cast<const uint16_t*>(list_.at[std::min(n + 2 * heads_, end)]),
                                 expanded_ + p * panel_pairs_);
            }
            body(head, own);
        }
    }

    void multiply_by_keys() {
        if (rows_ <= kFewAttentionRows)
            by_panel(0, [&](int p, int head, int heads, PanelReads reads) {
                const HeadRows<const bf16> a{queries_ + size_t(head * rows_) * width_, size_t(width_),
                                             size_t(rows_) * width_};
                const HeadRows<float> c{scores_ + score_place(head, 0) + p * kPanel, kSplit, size_t(rows_) * kSplit};
                multiply_heads_of<1>(rows_, heads, width_ / 2, a, reads, c, false);
            });
        else
            by_head(0, [&](int head, const HeadPanels& keys) {
                multiply_keys(rows_, width_, queries_ + size_t(head * rows_) * width_, keys,
                              scores_ + score_place(head, 0));
            });
        if (!is_quantized_) return;
        for (int head = 0; head < heads_; ++head)
            for (int p = 0; p < panels_; ++p) {
                const float* scales = cache_.key_scales + list_.places[p * heads_ + head].scales;
                for (int row = 0; row < rows_; ++row)
                    for (int i = 0; i < kPanel; i += W) {
                        float* score = scores_ + score_place(head, row) + p * kPanel + i;
                        store(score, mul(load(score), load(scales + i)));
                    }
            }
    }

    void softmax(int head) {
        for (int p = 0; is_quantized_ && p < panels_; ++p)
            std::memcpy(value_scales_ + p * kPanel, cache_.value_scales + list_.places[p * heads_ + head].scales,
                        kPanel * sizeof(float));
        const AttentionState state = part(head);
        const int count = panels_ * kPanel;
        const auto visible = [&](int row) {
            return std::min(past_ + (item_.first_row + row) / group_ + 1 - start_, count);
        };
        for (int row = 0; row < rows_; ++row) {
            const int seen = visible(row);
            state.largest[row] = seen > 0 ? largest_score(scores_ + score_place(head, row), seen) : -INFINITY;
        }
        for (int row = 0; row < rows_; ++row) {
            const size_t at = score_place(head, row);
            state.totals[row] = exponentials(
                scores_ + at, visible(row), count, call_.scale, state.largest[row], [&](int i, Vf first, Vf second) {
                    if (is_quantized_) {
                        first = mul(first, load(value_scales_ + i));
                        second = mul(second, load(value_scales_ + i + W));
                    }
                    storei(probabilities_ + at + i, to_bf16_rows(first, second));
                });
        }
    }

    void multiply_by_values() {
        const int first = panels_ * heads_;
        if (rows_ > kFewAttentionRows) {
            by_head(first, [&](int head, const HeadPanels& values) {
                multiply_values(rows_, width_, probabilities_ + score_place(head, 0), values, part(head).sums);
            });
            return;
        }
        by_panel(first, [&](int p, int head, int heads, PanelReads reads) {
            const HeadRows<const bf16> a{probabilities_ + score_place(head, 0) + p * kPanel, kSplit,
                                         size_t(rows_) * kSplit};
            HeadRows<float> c{part(head).sums, size_t(width_), floats_each_};
            for (int channel = 0; channel < width_; channel += 2 * kPanel, c.first += 2 * kPanel) {
                reads.offset = size_t(channel) * kPanelPairs * 4;
                if (channel + kPanel < width_)
                    multiply_heads_of<2>(rows_, heads, kPanelPairs, a, reads, c, p > 0);
                else
                    multiply_heads_of<1>(rows_, heads, kPanelPairs, a, reads, c, p > 0);
            }
        });
    }

    const AttentionCall& call_;
    const PagedCache& cache_;
    const AttentionItem& item_;
    const int width_, rows_, heads_, group_;
    const size_t panel_pairs_, floats_each_;
    const bool is_quantized_;
    int past_ = 0, start_ = 0, panels_ = 0;  // positions before the new ones; of the split
    float *scores_, *value_scales_, *states_;
    uint32_t* expanded_;
    bf16 *probabilities_, *queries_;
    SplitPanels list_;
};

inline void merge_splits(const AttentionCall& call, const AttentionItem& item) {
    const int width = call.cache.width(), rows = item.rows;
    const int64_t each = int64_t(state_floats(rows, width));
    const AttentionState whole = state_at(attention_scratch().get<float>(size_t(each)), rows, width);
    clear_state(whole, rows, width);
    for (int split = 0; split < item.num_splits; ++split) {
        float* floats = call.partials + item.partial + split * call.cache.num_kv_heads * each;
        const AttentionState part = state_at(floats, rows, width);
        for (int row = 0; row < rows; ++row) merge_row(whole, part, row, width, call.scale);
    }
    write_rows(call, item, item.first_head, whole);
}

// Every row's attention; what the batch's own tokens add to the cache is there already.
inline void paged_attention(Team& team, const AttentionCall& call) {
    const PagedPlan& plan = *call.plan;
    const long many = long(plan.many_rows.size());
    const int num_few = int(plan.few_rows.size());
    const Slices few{num_few, team.size(), std::clamp(num_few / (4 * team.size()), 1, 4)};
    team.tasks(many + few.count(), [&](long task) {
        if (task < many) {
            ItemWork(call, plan.many_rows[size_t(task)]).run(nullptr);
            return;
        }
        const int end = few.begin(int(task - many) + 1);
        for (int i = few.begin(int(task - many)); i < end; ++i)
            ItemWork(call, plan.few_rows[size_t(i)]).run(i + 1 < end ? &plan.few_rows[size_t(i) + 1] : nullptr);
    });
    if (plan.merges.empty()) return;
    team.tasks(long(plan.merges.size()), [&](long i) { merge_splits(call, plan.merges[size_t(i)]); });
}

}  // namespace moesaic
