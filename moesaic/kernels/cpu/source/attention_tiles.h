// Attention of many rows by tiles.
#pragma once

#include "attention_blocks.h"

#if defined(MOESAIC_TILES)

namespace moesaic {

// Many rows by tiles, in blocks of 16 of one split and one head. While tiles multiply a block's queries by keys, and the
// probabilities of the block two before by values, vectors take the exponentials of the block between, some after every
// product; what they become is stored in the place of the scores.
template <bool kQuantized>
class ManyRows {
  public:
    ManyRows(const AttentionCall& call, const AttentionItem& item)
        : call_(call), cache_(call.cache), item_(item), width_(cache_.width()),
          group_(int(call.num_heads / cache_.num_kv_heads)), blocks_((item.rows + kRows - 1) / kRows),
          panel_pairs_(size_t(width_) * kPanelPairs), state_floats_(state_floats(kRows, width_)) {
        const size_t expanded = kQuantized ? kSplitPanels * panel_pairs_ : 0, scales = kQuantized ? kSplit : 0;
        const size_t whole = item.num_splits > 1 ? size_t(item.num_heads * blocks_) : 0;
        float* floats = attention_scratch().get<float>(2 * kRows * kSplit + kRows * size_t(width_) / 2 +
                                                       2 * (expanded + scales) + state_floats_ * (whole + 2));
        const auto take = [&](size_t count) { return floats += count, floats - count; };
        for (float*& scores : scores_) scores = take(kRows * kSplit);
        queries_ = reinterpret_cast<bf16*>(take(kRows * size_t(width_) / 2));
        for (uint32_t*& panels : expanded_) panels = reinterpret_cast<uint32_t*>(take(expanded));
        for (float*& of : scales_) of = take(scales);
        for (AttentionState& own : own_) own = state_at(take(state_floats_), kRows, width_);
        whole_ = take(state_floats_ * whole);
        const PagedBatch& batch = call.batch;
        past_ = batch.lengths[item.sequence] - (batch.starts[item.sequence + 1] - batch.starts[item.sequence]);
        seen_ = positions_seen(call, item);
    }

    void run() {
        configure_tiles(kRows, kRows);
        const int stages = item_.num_splits * item_.num_heads * blocks_;
        for (int stage = 0; stage < stages + 2; ++stage) {
            const Block multiplied = block_at(stage), weighted = block_at(stage - 1), finished = block_at(stage - 2);
            const bool has_keys = stage < stages, has_values = stage > 1;
            if (has_keys) {
                if (multiplied.row == 0) find_panels(multiplied, false);
                gather_queries(multiplied);
            }
            if (has_values && finished.row == 0) find_panels(finished, true);
            Weighing weighing;
            if (stage > 0 && stage <= stages) {
                if (kQuantized && weighted.row == 0) gather_scales(weighted);
                weighing.begin(*this, weighted, stage - 1);
            }
            const int panels_now = (has_keys ? panels(multiplied) : 0) + (has_values ? panels(finished) : 0);
            const int products = panels_now * width_ / 16, pieces = weighing.pieces();
            int due = 0;
            const auto beside = [&]() __attribute__((always_inline)) {
                for (due += pieces; due >= products; due -= products) weighing.take_piece();
            };
            if (has_values) {
                const AttentionState state = state_of(finished, stage - 2);
                multiply_by_values(panels(finished), scores_[stage & 1], state.sums, beside);
                finish(finished, state);
            }
            if (has_keys) multiply_by_keys(panels(multiplied), scores_[stage & 1], beside);
            while (weighing.row < weighing.rows) weighing.take_piece();  // a single block's, which no product is beside
        }
    }

  private:
    static constexpr int kRows = 16;
    struct Block {
        int split, head, row, start;
    };

    Block block_at(int stage) const {
        const int of_head = stage / blocks_, split = item_.first_split + of_head / item_.num_heads;
        return {split, of_head % item_.num_heads, stage % blocks_ * kRows, item_.start_of(split)};
    }
    int panels(const Block& block) const {
        return (std::min(seen_, (block.split + 1) * kSplit) - block.start + kPanel - 1) / kPanel;
    }
    int rows_of(const Block& block) const { return std::min(item_.rows - block.row, kRows); }

    AttentionState whole_state(const Block& block) const {
        return state_at(whole_ + size_t(block.head * blocks_ + block.row / kRows) * state_floats_, kRows, width_);
    }
    // The first split's goes where those of the others will be merged with it.
    AttentionState state_of(const Block& block, int stage) const {
        return item_.num_splits > 1 && block.split == item_.first_split ? whole_state(block) : own_[stage & 1];
    }

    // Where a block's keys or values are: in the cache, or expanded.
    void find_panels(const Block& block, bool are_values) {
        for (int p = 0; p < panels(block); ++p) {
            const PanelPlace place = panel_place(call_, item_, block.start + p * kPanel, block.head);
            const void* from = are_values ? cache_.values : cache_.keys;
            if constexpr (!kQuantized) {
                panels_[are_values][p] =
                    reinterpret_cast<const uint32_t*>(static_cast<const bf16*>(from) + place.offset);
            } else {
                uint32_t* to = expanded_[are_values] + size_t(p) * panel_pairs_;
                const auto pairs_at = [&](size_t offset) {
                    return reinterpret_cast<const uint16_t*>(static_cast<const int8_t*>(from) + offset);
                };
                const int next = block.start + std::min(p + 1, panels(block) - 1) * kPanel;
                expand_pairs(int(panel_pairs_), pairs_at(place.offset),
                             pairs_at(panel_place(call_, item_, next, block.head).offset), to);
                panels_[are_values][p] = to;
            }
        }
    }

    void gather_scales(const Block& block) {
        for (int p = 0; p < panels(block); ++p) {
            const PanelPlace place = panel_place(call_, item_, block.start + p * kPanel, block.head);
            std::memcpy(scales_[0] + p * kPanel, cache_.key_scales + place.scales, kPanel * sizeof(float));
            std::memcpy(scales_[1] + p * kPanel, cache_.value_scales + place.scales, kPanel * sizeof(float));
        }
    }

    void gather_queries(const Block& block) {
        const int dim = int(cache_.head_dim), flat = item_.first_row + block.row;
        const bf16* token = call_.query + (call_.batch.starts[item_.sequence] + flat / group_) * call_.query_stride +
                            (item_.first_head + block.head) * group_ * dim;
        bf16* to = queries_;
        int member = flat % group_;
        for (int row = 0; row < rows_of(block); ++row) {
            const bf16* own = token + member * dim;
            int i = 0;
            for (; i + 2 * W <= dim; i += 2 * W) storei(to + i, loadi(own + i));
            for (; i < width_; ++i) to[i] = i < dim ? own[i] : bf16(0);
            to += width_;
            if (++member == group_) member = 0, token += call_.query_stride;
        }
    }

    // A block's exponentials, by pieces of 32 positions of a row.
    struct Weighing {
        int row = 0, rows = 0;

        void begin(const ManyRows& work, const Block& block, int stage) {
            work_ = &work;
            scores_ = work.scores_[stage & 1];
            state_ = work.state_of(block, stage);
            rows = work.rows_of(block), count_ = work.panels(block) * kPanel;
            const int flat = work.item_.first_row + block.row;
            int member = flat % work.group_, position = work.past_ + flat / work.group_ - block.start;
            for (int i = 0; i < rows; ++i) {
                seen_[i] = Seen(position, count_, work.call_.plan->window);
                if (++member == work.group_) member = 0, ++position;
            }
            look_for_largest(0);
            begin_row();
        }
        int pieces() const { return rows * (count_ / kPanel); }
        MOESAIC_INLINE void take_piece() {
            for (const int end = at_ + kPanel; at_ < end; at_ += 2 * W) {
                Vf e[2];
                exponentials_.take(load(scores_ + at_), load(scores_ + at_ + W), e);
                if constexpr (kQuantized)
                    for (int i = 0; i < 2; ++i) e[i] = mul(e[i], load(work_->scales_[1] + at_ + i * W));
                storei(reinterpret_cast<bf16*>(scores_) + at_, to_bf16_rows(e[0], e[1]));
            }
            if (at_ < count_) return;
            state_.totals[row] = exponentials_.total();
            scores_ += kSplit;
            if (++row < rows) begin_row();
        }

      private:
        // Of the row `next` rows further: a row's is looked for before the exponentials of the one in front of it, which
        // so wait for nothing. What the row does not see becomes -infinity.
        MOESAIC_INLINE void look_for_largest(int next) {
            float* scores = scores_ + next * kSplit;
            const auto [first, visible] = seen_[row + next];
            if constexpr (kQuantized)
                for (int i = 0; i < visible; i += W)
                    store(scores + i, mul(load(scores + i), load(work_->scales_[0] + i)));
            hide_before(scores, first);
            state_.largest[row + next] = visible ? largest_score(scores, visible) : -INFINITY;
            for (int i = round_up(visible, kPanel); i < count_; i += W) store(scores + i, set1(-INFINITY));
        }
        MOESAIC_INLINE void begin_row() {
            at_ = 0;
            exponentials_ = ScoreExponentials(work_->call_.scale, seen_[row].end ? state_.largest[row] : 0.0f);
            if (row + 1 < rows) look_for_largest(1);
        }

        const ManyRows* work_ = nullptr;
        float* scores_ = nullptr;  // the row's
        AttentionState state_{};
        int at_ = 0, count_ = 0;
        ScoreExponentials exponentials_{};
        Seen seen_[kRows];
    };

    template <typename Beside>
    MOESAIC_INLINE void multiply_by_keys(int count, float* scores, Beside&& beside) {
        for (int p = 0; p < count; ++p) {
            const uint32_t* keys = panels_[0][p];
            const bf16* a = queries_;
            tile_zero(0);
            tile_zero(1);
            for (int left = width_; left > 0; left -= kPanel, a += kPanel, keys += kPanelPairs * kPanel) {
                tile_load(4, a, width_ * 2);
                tile_load_once(6, keys, kPanel * 4);
                tile_dot_bf16(0, 4, 6);
                beside();
                tile_load_once(6, keys + 16, kPanel * 4);
                tile_dot_bf16(1, 4, 6);
                beside();
            }
            tile_store(0, scores + p * kPanel, kSplit * 4);
            tile_store(1, scores + p * kPanel + 16, kSplit * 4);
        }
    }

    template <typename Beside>
    MOESAIC_INLINE void multiply_by_values(int count, const float* probabilities, float* sums, Beside&& beside) {
        for (int channel = 0; channel < width_; channel += 2 * kPanel) {
            const bool is_pair = channel + kPanel < width_;
            tile_zero(0);
            tile_zero(1);
            tile_zero(2);
            tile_zero(3);
            for (int p = 0; p < count; ++p) {
                const uint32_t* values = panels_[1][p] + channel * kPanelPairs;
                tile_load(4, reinterpret_cast<const bf16*>(probabilities) + p * kPanel, kSplit * 4);
                tile_load_once(6, values, kPanel * 4);
                tile_dot_bf16(0, 4, 6);
                beside();
                tile_load_once(6, values + 16, kPanel * 4);
                tile_dot_bf16(1, 4, 6);
                beside();
                if (!is_pair) continue;
                tile_load_once(6, values + kPanelPairs * kPanel, kPanel * 4);
                tile_dot_bf16(2, 4, 6);
                beside();
                tile_load_once(6, values + kPanelPairs * kPanel + 16, kPanel * 4);
                tile_dot_bf16(3, 4, 6);
                beside();
            }
            float* to = sums + channel;
            tile_store(0, to, width_ * 4);
            tile_store(1, to + 16, width_ * 4);
            if (is_pair) {
                tile_store(2, to + 32, width_ * 4);
                tile_store(3, to + 48, width_ * 4);
            }
        }
    }

    // What a block gives: to be merged, by this thread or after all, or to be written.
    void finish(const Block& block, AttentionState state) {
        const int rows = rows_of(block);
        if (item_.partial >= 0) {
            const int64_t each = int64_t(state_floats(item_.rows, width_));
            const AttentionState to =
                state_at(call_.partials + item_.partial + block.head * each, item_.rows, width_);
            std::memcpy(to.sums + size_t(block.row) * width_, state.sums, size_t(rows) * width_ * sizeof(float));
            std::memcpy(to.totals + block.row, state.totals, size_t(rows) * sizeof(float));
            std::memcpy(to.largest + block.row, state.largest, size_t(rows) * sizeof(float));
            return;
        }
        if (block.split > item_.first_split) {
            const AttentionState whole = whole_state(block);
            merge_rows(whole, state, rows, width_, call_.scale);
            state = whole;
        }
        if (block.split + 1 < item_.first_split + item_.num_splits) return;
        AttentionItem rows_here = item_;
        rows_here.first_row += block.row, rows_here.rows = rows;
        write_rows(call_, rows_here, item_.first_head + block.head, state);
    }

    const AttentionCall& call_;
    const PagedCache& cache_;
    const AttentionItem& item_;
    const int width_, group_, blocks_;
    const size_t panel_pairs_, state_floats_;
    int past_, seen_;
    float *scores_[2], *scales_[2], *whole_;  // scales of keys and of values
    AttentionState own_[2];
    uint32_t* expanded_[2];
    const uint32_t* panels_[2][kSplitPanels];
    bf16* queries_;
};

}  // namespace moesaic

#endif
