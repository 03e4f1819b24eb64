// Attention over keys and values that lie in blocks, for serving: one new position of a sequence or many, ragged.
//
// All query heads of a key/value head go over its keys together, and where they are few, as in a decode, several
// key/value heads take turns: their panels of the same positions lie behind one another, so that one thread reads one
// stream; tiles take one head after the other, whose sums they keep. A row's positions are worked on in splits of 256
// whose results are merged in rising order, the same way whether one thread or many had them: what a row gives depends on
// nothing else in the call, but that a value that is not finite may reach rows that do not see its position, as 0 times
// infinity.
#pragma once

#include "attention_tiles.h"

namespace moesaic {

#if defined(MOESAIC_EXPANDS_ROWS)

// Many rows of one head. C[R][32] = R expanded rows times `count` pieces of a panel, each `offset` dwords into its own,
// whose sums stay in registers; what stands `offset` into those in `ahead` will be read soon (null: nothing).
template <int R>
[[gnu::noinline]] void multiply_pieces(int count, int pairs, const float* a, size_t lda, const uint32_t* const* panels,
                                       const uint32_t* const* ahead, int offset, float* c, size_t ldc) {
    constexpr int V = 2;
    const Vi mask = mask_of_high_halves();
    for (int column = 0; column < kPanel; column += V * W) {
        Vf acc[R][V];
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
            for (int v = 0; v < V; ++v) acc[r][v] = zero();
        ThirdRows<R, float> rows(a, lda);
        for (int i = 0; i < count; ++i) {
            for (int p = 0; ahead && column == 0 && p < pairs; ++p)
                for (int line = 0; line < kPanel; line += 16) fetch(ahead[i] + offset + p * kPanel + line);
            const char* dword = reinterpret_cast<const char*>(panels[i] + offset + column);
            for (int p = 0; p < pairs; ++p, dword += kPanel * 4) {
                add_dword<R, V, 1>(acc, rows, dword, mask);
                rows.go_on(2);
            }
        }
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
            for (int v = 0; v < V; ++v) store(c + r * ldc + column + v * W, acc[r][v]);
    }
}

template <int R>
inline void multiply_pieces_of(int rows, int count, int pairs, const float* a, size_t lda, const uint32_t* const* panels,
                               const uint32_t* const* ahead, int offset, float* c, size_t ldc) {
    if constexpr (R > 0) {
        if (rows == R)
            multiply_pieces<R>(count, pairs, a, lda, panels, ahead, offset, c, ldc);
        else
            multiply_pieces_of<R - 1>(rows, count, pairs, a, lda, panels, ahead, offset, c, ldc);
    }
}

// All rows, in equal steps, of which the first brings nearer what is read later.
inline void multiply_all_pieces(int rows, int count, int pairs, const LeftRows& a, const uint32_t* const* panels,
                                const uint32_t* const* ahead, int offset, float* c, size_t ldc) {
    const int steps = (rows + kRowBlock - 1) / kRowBlock;
    for (int step = 0; step < steps; ++step) {
        const int row = rows * step / steps, end = rows * (step + 1) / steps;
        multiply_pieces_of<kRowBlock>(end - row, count, pairs, a.rows + row * a.ld, a.ld, panels, step == 0 ? ahead : nullptr,
                                      offset, c + row * ldc, ldc);
    }
}

inline Scratch& expanded_attention_rows() {
    static thread_local Scratch scratch;
    return scratch;
}

#elif defined(__AVX512F__) && !defined(MOESAIC_TILES)

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

// scores[rows][256], the first 32 * keys.count of each row: queries[rows][width] times keys.
inline void multiply_keys(int rows, int width, const bf16* queries, const HeadPanels& keys, float* scores) {
#if defined(MOESAIC_EXPANDS_ROWS)
    const LeftRows left = left_rows(queries, size_t(width), rows, width, expanded_attention_rows());
    for (int p = 0; p < keys.count; ++p)
        multiply_all_pieces(rows, 1, width / 2, left, keys.at + p, keys.at + p + HeadPanels::kAhead, 0, scores + p * kPanel,
                            kSplit);
#elif defined(__AVX512F__) && !defined(MOESAIC_TILES)
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
inline void multiply_values(int rows, int width, const bf16* probabilities, const HeadPanels& values, float* sums) {
#if defined(MOESAIC_EXPANDS_ROWS)
    const LeftRows left = left_rows(probabilities, kSplit, rows, values.count * kPanel, expanded_attention_rows());
    for (int chunk = 0; chunk < width; chunk += kPanel)
        multiply_all_pieces(rows, values.count, kPanelPairs, left, values.at, values.at + 2, chunk * kPanelPairs,
                            sums + chunk, size_t(width));
#elif defined(__AVX512F__) && !defined(MOESAIC_TILES)
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
#else
    for (int i = 0; i < values.count; ++i)
        for (int chunk = 0; chunk < width; chunk += kPanel)
            gemm_panel(rows, kPanelPairs, probabilities + i * kPanel, kSplit, values.at[i] + chunk * kPanelPairs,
                       kPanel, sums + chunk, size_t(width), i > 0);
#endif
}

constexpr int kFewAttentionRows = 6;  // all heads of a panel are multiplied in turn; with tiles, one head's panels

#if !defined(MOESAIC_TILES)

// Few rows of several heads: panels of the same positions, of one head after the other, and those that are read later.
struct PanelReads {
    const char* const* at;
    const char* const* ahead;  // null: nothing is brought nearer
    size_t offset;             // bytes into each
};

// Rows of one head after the other: head i's begin i * step elements behind the first one's, rows are ld apart.
template <typename T>
struct HeadRows {
    T* first;
    size_t ld, step;
};

#if defined(__AVX512F__)

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

template <int N>
inline void multiply_heads_of(int rows, int heads, int pairs, HeadRows<const bf16> a, PanelReads reads,
                              HeadRows<float> c, bool accumulate) {
    for (int head = 0; head < heads; ++head)
        for (int i = 0; i < N; ++i) {
            const size_t place = reads.offset + size_t(i * pairs * kPanel) * 4;
            gemm_panel(rows, pairs, a.first + head * a.step, a.ld, reinterpret_cast<const uint32_t*>(reads.at[head] + place),
                       kPanel, c.first + head * c.step + i * kPanel, c.ld, accumulate,
                       reads.ahead ? reads.ahead[head] + place : nullptr);
        }
}

#endif

#endif

// The panels of a split in the order in which they are read, keys and then values, each by position and head or, with
// tiles, by head and position; and the first ones of what is read after them.
struct SplitPanels {
    static constexpr int kNear = 2;                   // panels between reading ahead and reading
    static constexpr int kAhead = kHasTiles ? 7 : 2;  // panels behind the last one that are read ahead
    PanelPlace places[kSplitPanels * kAttentionRows];
    const char* at[2 * kSplitPanels * kAttentionRows + kAhead];

    static int number(int p, int head, int panels, int heads) {
        return kHasTiles ? head * panels + p : p * heads + head;
    }
    void list(const AttentionCall& call, const AttentionItem& item, int split, int panels) {
        const size_t size = call.cache.is_quantized() ? 1 : sizeof(bf16);
        const char* keys = static_cast<const char*>(call.cache.keys);
        const char* values = static_cast<const char*>(call.cache.values);
        const int count = panels * item.num_heads;
        const size_t head_step = size_t(call.cache.block_size) * call.cache.width();
        for (int p = 0; p < panels; ++p) {
            PanelPlace place = panel_place(call, item, item.start_of(split) + p * kPanel, 0);
            for (int head = 0; head < item.num_heads; ++head) {
                const int n = number(p, head, panels, item.num_heads);
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
        const int start = next.start_of(split), seen = std::min(positions_seen(call, next), (split + 1) * kSplit);
        const int panels = (seen - start + kPanel - 1) / kPanel, last = panels * next.num_heads - 1;
        for (int i = 0; i < kAhead; ++i) {
            const int n = std::min(i, last), each = kHasTiles ? panels : next.num_heads;
            const int p = kHasTiles ? n % each : n / each, head = kHasTiles ? n / each : n % each;
            const PanelPlace place = panel_place(call, next, start + p * kPanel, head);
            at[2 * count + i] = static_cast<const char*>(call.cache.keys) + place.offset * size;
        }
    }
};

// A thread at work on one item; with tiles, on one of up to kFewAttentionRows rows, since ManyRows has the others. scores
// and probabilities are [heads][rows][256], queries [heads][rows][width].
class ItemWork {
  public:
    ItemWork(const AttentionCall& call, const AttentionItem& item)
        : call_(call), cache_(call.cache), item_(item), width_(cache_.width()), rows_(item.rows), heads_(item.num_heads),
          group_(int(call.num_heads / cache_.num_kv_heads)), panel_pairs_(size_t(width_) * kPanelPairs),
          floats_each_(state_floats(rows_, width_)), is_quantized_(cache_.is_quantized()) {
        const size_t all_rows = size_t(rows_) * heads_;
        const size_t expanded = !is_quantized_ ? 0 : kHasTiles ? panel_pairs_ : kSplitPanels * panel_pairs_;
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
#if defined(MOESAIC_TILES)
        configure_tiles(rows_, rows_);
#endif
        gather_queries();
        const int seen = positions_seen(call_, item_), last = item_.first_split + item_.num_splits - 1;
        for (int split = item_.first_split; split <= last; ++split) {
            start_ = item_.start_of(split);
            panels_ = (std::min(seen, (split + 1) * kSplit) - start_ + kPanel - 1) / kPanel;
            list_.list(call_, item_, split, panels_);
            if (split < last)
                list_.follow_with(call_, item_, split + 1, panels_ * heads_);
            else if (next)
                list_.follow_with(call_, *next, next->first_split, panels_ * heads_);
            multiply_by_keys();
            scale_scores();
            for (int head = 0; head < heads_; ++head) softmax(head);
            multiply_by_values();
            for (int head = 0; item_.num_splits > 1 && head < heads_; ++head)
                merge_rows(whole(head), part(head), rows_, width_, call_.scale);
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

#if defined(MOESAIC_TILES)

    // The sums of a head stay in tiles while its panels pass, unit by unit of 64 channels, and so do its queries.

    // What is read ahead while a unit is multiplied: of the next four, lines of each in turn (Streams says why), as many as
    // it has itself.
    struct UnitsAhead {
        static constexpr int kUnits = 4;
        const char* units[kUnits];
        size_t at;  // bytes into each
        int lines;  // of each with every product; none where units were brought nearer before

        MOESAIC_INLINE void take() {
            for (int line = 0; line < lines; ++line, at += 64)
                for (const char* unit : units) fetch(unit + at);
        }
    };

    int units() const { return (width_ + 2 * kPanel - 1) / (2 * kPanel); }  // of a panel
    // Number n of those of a split in the order in which they are read: keys panel by panel, values of 64 channels after
    // the other.
    const char* unit_at(int n) const {
        const int each = units(), count = panels_ * heads_;
        if (each == 1) return list_.at[n];
        int panel = n / each, unit = n % each;
        if (panel >= count && panel < 2 * count) {
            const int inside = n % (each * panels_);
            panel = panel / panels_ * panels_ + inside % panels_, unit = inside / panels_;
        }
        return list_.at[std::min(panel, 2 * count + SplitPanels::kAhead - 1)] +
               size_t(unit) * 2 * kPanel * kPanel * (is_quantized_ ? 1 : sizeof(bf16));
    }
    // multiply(the unit's columns, what is read ahead meanwhile), of unit number n with so many channels.
    template <typename Multiply>
    MOESAIC_INLINE void with_unit(int n, int channels, Multiply&& multiply) {
        constexpr int kUnits = UnitsAhead::kUnits;
        if (n % kUnits == 0)
            for (int i = 0; i < kUnits; ++i) ahead_[i] = unit_at(n + kUnits + i);
        const int whole = std::min(width_, 2 * kPanel);
        const size_t at = size_t(n % kUnits) * size_t(whole * kPanel) / kUnits;  // numbers into each
        if (is_quantized_) {
            expand_pairs(channels * kPanelPairs, reinterpret_cast<const uint16_t*>(unit_at(n)), expanded_, [&](int line) {
                fetch(ahead_[line % kUnits] + at + line / kUnits * 64);
            });
            multiply(expanded_, UnitsAhead{});
        } else {
            multiply(reinterpret_cast<const uint32_t*>(unit_at(n)),
                     UnitsAhead{{ahead_[0], ahead_[1], ahead_[2], ahead_[3]}, at * sizeof(bf16), 4 * whole / channels});
        }
    }

    // sums (tiles 0 and 1) += queries (tile `a`) times the keys of 32 channels.
    template <int a>
    MOESAIC_INLINE static void multiply_chunk(const uint32_t* keys, UnitsAhead& ahead) {
        tile_load_once(6, keys, kPanel * 4);
        if constexpr (a == 2) tile_dot_bf16(0, 2, 6);
        if constexpr (a == 3) tile_dot_bf16(0, 3, 6);
        if constexpr (a == 4) tile_dot_bf16(0, 4, 6);
        if constexpr (a == 5) tile_dot_bf16(0, 5, 6);
        ahead.take();
        tile_load_once(6, keys + 16, kPanel * 4);
        if constexpr (a == 2) tile_dot_bf16(1, 2, 6);
        if constexpr (a == 3) tile_dot_bf16(1, 3, 6);
        if constexpr (a == 4) tile_dot_bf16(1, 4, 6);
        if constexpr (a == 5) tile_dot_bf16(1, 5, 6);
        ahead.take();
    }

    void multiply_by_keys() {
        const int each = units(), chunks = width_ / kPanel;
        for (int head = 0; head < heads_; ++head) {
            const bf16* queries = queries_ + size_t(head * rows_) * width_;
            const size_t stride = size_t(width_) * sizeof(bf16);
            tile_load(2, queries, stride);
            if (chunks > 1) tile_load(3, queries + kPanel, stride);
            if (chunks > 2) tile_load(4, queries + 2 * kPanel, stride);
            if (chunks > 3) tile_load(5, queries + 3 * kPanel, stride);
            for (int p = 0; p < panels_; ++p) {
                tile_zero(0);
                tile_zero(1);
                for (int unit = 0; unit < each; ++unit) {
                    const int chunk = 2 * unit, channels = std::min(chunks - chunk, 2) * kPanel;
                    if (chunk >= 4) {  // those of more than 128 channels come and go
                        tile_load(4, queries + chunk * kPanel, stride);
                        if (channels > kPanel) tile_load(5, queries + (chunk + 1) * kPanel, stride);
                    } else if (chunk == 2 && chunks > 4) {
                        tile_load(4, queries + 2 * kPanel, stride);
                        tile_load(5, queries + 3 * kPanel, stride);
                    }
                    with_unit((head * panels_ + p) * each + unit, channels, [&](const uint32_t* keys, UnitsAhead ahead) {
                        chunk == 0 ? multiply_chunk<2>(keys, ahead) : multiply_chunk<4>(keys, ahead);
                        keys += kPanelPairs * kPanel;
                        if (channels > kPanel)
                            chunk == 0 ? multiply_chunk<3>(keys, ahead) : multiply_chunk<5>(keys, ahead);
                    });
                }
                float* scores = scores_ + score_place(head, 0) + p * kPanel;
                tile_store(0, scores, kSplit * 4);
                tile_store(1, scores + 16, kSplit * 4);
            }
        }
    }

    void multiply_by_values() {
        const int each = units();
        for (int head = 0; head < heads_; ++head) {
            const bf16* probabilities = probabilities_ + score_place(head, 0);
            for (int unit = 0; unit < each; ++unit) {
                const int channel = unit * 2 * kPanel, channels = std::min(width_ - channel, 2 * kPanel);
                tile_zero(0);
                tile_zero(1);
                tile_zero(2);
                tile_zero(3);
                for (int p = 0; p < panels_; ++p) {
                    tile_load(4, probabilities + p * kPanel, kSplit * sizeof(bf16));
                    const int n = (panels_ * heads_ + head * panels_) * each + unit * panels_ + p;
                    with_unit(n, channels, [&](const uint32_t* values, UnitsAhead ahead) {
                        tile_load_once(6, values, kPanel * 4);
                        tile_dot_bf16(0, 4, 6);
                        ahead.take();
                        tile_load_once(6, values + 16, kPanel * 4);
                        tile_dot_bf16(1, 4, 6);
                        ahead.take();
                        if (channels == kPanel) return;
                        tile_load_once(6, values + kPanelPairs * kPanel, kPanel * 4);
                        tile_dot_bf16(2, 4, 6);
                        ahead.take();
                        tile_load_once(6, values + kPanelPairs * kPanel + 16, kPanel * 4);
                        tile_dot_bf16(3, 4, 6);
                        ahead.take();
                    });
                }
                float* to = part(head).sums + channel;
                const size_t stride = size_t(width_) * sizeof(float);
                tile_store(0, to, stride);
                tile_store(1, to + 16, stride);
                if (channels == kPanel) continue;
                tile_store(2, to + 32, stride);
                tile_store(3, to + 48, stride);
            }
        }
    }

#else

    // Few rows: body(p, head, heads, reads) for the panels from `first` of the list on, all heads of a panel together,
    // or, where it has to be expanded before, one by one.
    template <typename Body>
    void by_panel(int first, Body&& body) {
        for (int p = 0; p < panels_; ++p) {
            const int index = first + p * heads_;
            const char* const* at = list_.at + index;
            const char* const* ahead = at + SplitPanels::kNear;
            if (!is_quantized_) {
                body(p, 0, heads_, PanelReads{at, ahead, 0});
                continue;
            }
            const char* own = reinterpret_cast<const char*>(expanded_);
            for (int head = 0; head < heads_; ++head) {
                expand_pairs(int(panel_pairs_), reinterpret_cast<const uint16_t*>(at[head]),
                             reinterpret_cast<const uint16_t*>(ahead[head]), expanded_);
                body(p, head, 1, PanelReads{&own, nullptr, 0});
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

#endif

    // After the scores were made of keys without their scales.
    void scale_scores() {
        if (!is_quantized_) return;
        for (int head = 0; head < heads_; ++head)
            for (int p = 0; p < panels_; ++p) {
                const float* scales = cache_.key_scales + list_.places[list_.number(p, head, panels_, heads_)].scales;
                for (int row = 0; row < rows_; ++row)
                    for (int i = 0; i < kPanel; i += W) {
                        float* score = scores_ + score_place(head, row) + p * kPanel + i;
                        store(score, mul(load(score), load(scales + i)));
                    }
            }
    }

    void softmax(int head) {
        for (int p = 0; is_quantized_ && p < panels_; ++p)
            std::memcpy(value_scales_ + p * kPanel,
                        cache_.value_scales + list_.places[list_.number(p, head, panels_, heads_)].scales,
                        kPanel * sizeof(float));
        const AttentionState state = part(head);
        const int count = panels_ * kPanel;
        const auto seen_by = [&](int row) {
            return Seen(past_ + (item_.first_row + row) / group_ - start_, count, call_.plan->window);
        };
        for (int row = 0; row < rows_; ++row) {
            const Seen seen = seen_by(row);
            float* scores = scores_ + score_place(head, row);
            hide_before(scores, seen.first);
            state.largest[row] = seen.end ? largest_score(scores, seen.end) : -INFINITY;
        }
        for (int row = 0; row < rows_; ++row) {
            const size_t at = score_place(head, row);
            state.totals[row] = exponentials(
                scores_ + at, seen_by(row).end, count, call_.scale, state.largest[row], [&](int i, Vf first, Vf second) {
                    if (is_quantized_) {
                        first = mul(first, load(value_scales_ + i));
                        second = mul(second, load(value_scales_ + i + W));
                    }
                    storei(probabilities_ + at + i, to_bf16_rows(first, second));
                });
        }
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
#if defined(MOESAIC_TILES)
    const char* ahead_[UnitsAhead::kUnits] = {};
#endif
};

inline void merge_splits(const AttentionCall& call, const AttentionItem& item) {
    const int width = call.cache.width(), rows = item.rows;
    const int64_t each = int64_t(state_floats(rows, width));
    const AttentionState whole = state_at(attention_scratch().get<float>(size_t(each)), rows, width);
    clear_state(whole, rows, width);
    for (int split = 0; split < item.num_splits; ++split) {
        float* floats = call.partials + item.partial + split * call.cache.num_kv_heads * each;
        const AttentionState part = state_at(floats, rows, width);
        merge_rows(whole, part, rows, width, call.scale);
    }
    write_rows(call, item, item.first_head, whole);
}

// Every row's attention; what the batch's own tokens add to the cache is there already.
void paged_attention(Team& team, const AttentionCall& call);

}  // namespace moesaic
