// Attention over keys and values that lie in blocks, for serving: one new position of a sequence or many, ragged.
//
// All query heads of a key/value head go over its keys together, and where they are few, as in a decode, several
// key/value heads take turns: their panels of the same positions lie behind one another, so that one thread reads one
// stream; tiles take one head after the other, whose sums they keep. A row's positions are worked on in splits of 256
// whose results are merged in rising order, the same way whether one thread or many had them: what a row gives depends on
// nothing else in the call, but that a value that is not finite may reach rows that do not see its position, as 0 times
// infinity.
#pragma once

#include "attention_products.h"
#include "attention_tiles.h"

namespace moesaic {

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
// and probabilities are [heads][rows][kScoreRow], expanded ones in place of the scores, queries [heads][rows][query_row_].
class ItemWork {
  public:
    ItemWork(const AttentionCall& call, const AttentionItem& item)
        : call_(call), cache_(call.cache), item_(item), width_(cache_.width()), rows_(item.rows), heads_(item.num_heads),
          group_(int(call.num_heads / cache_.num_kv_heads)), panel_pairs_(size_t(width_) * kPanelPairs),
          query_row_(kExpandsRows ? spread_rows(size_t(width_) * sizeof(float)) / sizeof(float) : size_t(width_)),
          floats_each_(state_floats(rows_, width_)), is_quantized_(cache_.is_quantized()) {
        const size_t all_rows = size_t(rows_) * heads_, number = sizeof(RowNumber);
        const size_t panels = kHasTiles ? 1 : rows_ > kFewAttentionRows ? kSplitPanels : 0;
        const size_t expanded = is_quantized_ ? panels * panel_pairs_ : 0;
        const size_t probabilities = kExpandsRows ? 0 : all_rows * kScoreRow;
        scores_ = attention_scratch().get<float>(all_rows * kScoreRow + 2 * heads_ * floats_each_ + kSplit + expanded +
                                                 (probabilities + all_rows * query_row_) * number / sizeof(float));
        value_scales_ = scores_ + all_rows * kScoreRow;
        expanded_ = reinterpret_cast<uint32_t*>(value_scales_ + kSplit);
        auto* rows = reinterpret_cast<RowNumber*>(expanded_ + expanded);
        probabilities_ = kExpandsRows ? reinterpret_cast<RowNumber*>(scores_) : rows;
        queries_ = rows + probabilities;
        states_ = reinterpret_cast<float*>(queries_ + all_rows * query_row_);
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

    size_t score_place(int head, int row) const { return size_t(head * rows_ + row) * kScoreRow; }
    RowNumber* queries_of(int head) const { return queries_ + size_t(head * rows_) * query_row_; }

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
                copy_numbers(dim, width_, own, queries_of(head) + row * query_row_);
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
            const bf16* queries = queries_of(head);
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

    // Few rows: body(p, every head's panel of positions 32 p on), of those from `first` of the list on.
    template <typename Body>
    void by_panel(int first, Body&& body) {
        for (int p = 0; p < panels_; ++p) {
            const char* const* at = list_.at + first + p * heads_;
            body(p, PanelReads{at, at + SplitPanels::kNear, 0});
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
        if (rows_ > kFewAttentionRows)
            by_head(0, [&](int head, const HeadPanels& keys) {
                multiply_keys(rows_, width_, {queries_of(head), query_row_}, keys, scores_ + score_place(head, 0));
            });
        else if (is_quantized_)
            multiply_few_by_keys<PairsOfInt8>();
        else
            multiply_few_by_keys<PairsOfBf16>();
    }

    template <typename Pairs>
    void multiply_few_by_keys() {
        const HeadRows<const RowNumber> a{queries_, query_row_, rows_ * query_row_};
        HeadRows<float> c{scores_, kScoreRow, rows_ * kScoreRow};
        by_panel(0, [&](int, PanelReads reads) {
            multiply_heads_of<Pairs, 1>(rows_, heads_, width_ / 2, a, reads, c, false);
            c.first += kPanel;
        });
    }

    void multiply_by_values() {
        if (rows_ > kFewAttentionRows)
            by_head(panels_ * heads_, [&](int head, const HeadPanels& values) {
                multiply_values(rows_, width_, {probabilities_ + score_place(head, 0), kScoreRow}, values, part(head).sums);
            });
        else if (is_quantized_)
            multiply_few_by_values<PairsOfInt8>();
        else
            multiply_few_by_values<PairsOfBf16>();
    }

    template <typename Pairs>
    void multiply_few_by_values() {
        HeadRows<const RowNumber> a{probabilities_, kScoreRow, rows_ * kScoreRow};
        by_panel(panels_ * heads_, [&](int p, PanelReads reads) {
            HeadRows<float> c{part(0).sums, size_t(width_), floats_each_};
            for (int channel = 0, here; channel < width_; channel += here, c.first += here) {
                reads.offset = size_t(channel) * kPanelPairs * Pairs::kBytes;
                here = std::min(width_ - channel, channels_together<Pairs>(rows_));
                if constexpr (kTakesTwo<Pairs>) {
                    if (here == 2 * kPanel) {
                        multiply_heads_of<Pairs, 2>(rows_, heads_, kPanelPairs, a, reads, c, p > 0);
                        continue;
                    }
                }
                multiply_heads_of<Pairs, 1>(rows_, heads_, kPanelPairs, a, reads, c, p > 0);
            }
            a.first += kPanel;
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
                    store_probabilities(probabilities_ + at + i, first, second);
                });
        }
    }

    const AttentionCall& call_;
    const PagedCache& cache_;
    const AttentionItem& item_;
    const int width_, rows_, heads_, group_;
    const size_t panel_pairs_, query_row_, floats_each_;
    const bool is_quantized_;
    int past_ = 0, start_ = 0, panels_ = 0;  // positions before the new ones; of the split
    float *scores_, *value_scales_, *states_;
    uint32_t* expanded_;
    RowNumber *probabilities_, *queries_;
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
