// The phases of an MoE layer's training on a machine with tiles, where a core multiplies 16 times as fast as it adds: what
// surrounds a product costs as much as the product, and as much again is lost where operands come from a cache too far
// away. So the vector units work on one block of sums while the tiles make the next, and in the backward pass one task
// takes a chunk of F from the gradient of the hidden state to the gradients of its weights: what it writes on the way
// stays in its core's second-level cache while an expert has some thousand rows or fewer.
#pragma once

#include "moe_training_rows.h"

#if defined(MOESAIC_TILES)

namespace moesaic {
namespace training {

constexpr int kBlock = 32;         // rows and columns of a block of sums
constexpr int kWeightsAhead = 32;  // rows of weights brought nearer before they are used

// Rows of weights from `top` and from `bottom`, the same terms of eight of them in every quarter.
struct WeightsAhead {
    const bf16 *top, *bottom;  // null: none
    size_t ld;

    void quarter(int p, int quarter) const {
        const bf16* from = quarter < 2 ? top : bottom;
        if (!from) return;
        from += size_t(quarter % 2 * 8) * ld + 2 * p;
        for (int r = 0; r < 8; ++r) fetch(from + r * ld);
    }
};

// The up product and the activation of a chunk of F for all rows of a piece.
template <Activation A>
class UpChunk {
  public:
    UpChunk(const MoeTraining& m, const ExpertRows& rows, int64_t first, int count, uint32_t* hidden)
        : m_(m),
          rows_(rows),
          first_(first),
          count_(count),
          bias_(m.up_bias ? m.up_bias + rows.expert * m.pre_width() + first : nullptr),
          hidden_(hidden) {}

    // is_near: the chunk's weights are in the cache. Brings the ones at `next`, of next_count rows, nearer, if not
    // null.
    void work(const Piece& piece, const uint32_t* tokens, bool is_near, const bf16* next, int next_count) {
        const int64_t h = m_.hidden;
        const bf16* weights = m_.up + (rows_.expert * m_.pre_width() + first_) * h;
        BroughtNearer ahead(next, next ? next_count * h * 2 : 0, m_.inner * h * 2, kGated ? 2 : 1,
                            int64_t(piece.blocks) * (count_ / step_rows()) * (h / 32) * 2);
        for (size_t b = piece.block; b < piece.block + piece.blocks; ++b) {
            const LaneBlock& block = rows_.blocks[b];
            const uint32_t* panel = tokens + block.offset * (m_.hidden / 2);
            for (int row = 0; row < count_; row += step_rows())
                block.width == 32 ? multiply<2>(weights, row, block, panel, b == piece.block && !is_near, ahead)
                                  : multiply<1>(weights, row, block, panel, b == piece.block && !is_near, ahead);
        }
        for (int part = 0; part < parts(); ++part) activate(part);
        if (waiting_) finish();
    }

  private:
    static constexpr bool kGated = is_gated(A);

    // Rows of F in one block of sums: with a gated activation the same 16 of both halves.
    static constexpr int step_rows() { return kGated ? 16 : 32; }
    int parts() const { return waiting_ ? step_rows() / 2 * (waiting_->width / W) : 0; }

    template <int Columns>
    void multiply(const bf16* weights, int row, const LaneBlock& block, const uint32_t* panel, bool is_far,
                  BroughtNearer& next) {
        const int64_t h = m_.hidden, f = m_.inner;
        const bf16* top = weights + row * h;
        const bf16* bottom = top + (kGated ? f : 16) * h;
        // The rows behind a chunk are those of the next one.
        const bool ahead = is_far && first_ + row + kWeightsAhead + step_rows() <= f;
        const WeightsAhead fetches{ahead ? top + kWeightsAhead * h : nullptr,
                                   ahead ? bottom + kWeightsAhead * h : nullptr, size_t(h)};
        Beside epilogue([&](int part) { activate(part); }, parts(), int(h / 32) * 2);
        configure_products(16);
        const TileTerms terms[] = {{top, bottom, size_t(h), panel, size_t(block.width), int(h / 2)}};
        // Sums that are stored together may go where those were that have been activated meanwhile.
        const int then = turn_ ^ int(tile_sharing.takes_few());
        const TileSums sums(nullptr, sums_[then], kBlock);
        multiply_tiles<Stays::kPanel, Columns, true>(terms, sums, [&](int p, int quarter) {
            fetches.quarter(p, quarter);
            if (quarter % 2 == 0) return;
            epilogue.call();
            next();
        });
        if (waiting_ && row == 0) finish();
        turn_ = then;
        waiting_ = &block;
        waiting_row_ = row;
    }

    // Two rows of F of the block of sums that waits, W lanes of them.
    void activate(int part) {
        const int width = waiting_->width, column_parts = width / W, lane = part % column_parts * W;
        const int row = part / column_parts * 2, r = waiting_row_ + row;  // within the block, the chunk
        const float* sums = sums_[turn_] + row * kBlock + lane;
        Vf a[2] = {load(sums), load(sums + kBlock)};
        uint32_t* hidden = hidden_ + waiting_->offset * (m_.inner / 2) + (first_ + r) / 2 * width + lane;
        uint32_t* pairs = pairs_[0] + r / 2 * width + lane;
        if (bias_) {
            a[0] = add(a[0], set1(bf16_to_float(bias_[r])));
            a[1] = add(a[1], set1(bf16_to_float(bias_[r + 1])));
        }
        storei(pairs, interleave_bf16(a[0], a[1]));
        if constexpr (kGated) {
            Vf b[2] = {load(sums + 16 * kBlock), load(sums + 17 * kBlock)};
            if (bias_) {
                b[0] = add(b[0], set1(bf16_to_float(bias_[m_.inner + r])));
                b[1] = add(b[1], set1(bf16_to_float(bias_[m_.inner + r + 1])));
            }
            storei(pairs + kHalf, interleave_bf16(b[0], b[1]));
            storei(hidden, interleave_bf16(activate_gated<A, true>(a[0], b[0]), activate_gated<A, true>(a[1], b[1])));
        } else {
            storei(hidden, interleave_bf16(moesaic::activate<A>(a[0]), moesaic::activate<A>(a[1])));
        }
    }

    // The pre-activation of the lane block that waits, all of whose rows of F are done: in the layout of ChunkedRows,
    // and in one stream, which memory takes several times as fast as lines here and there.
    void finish() {
        const auto pre = chunked_rows(m_.pre + rows_.start * m_.pre_width(), rows_.count, first_, count_, kGated);
        const size_t stride = size_t(pre.stride) / 2;
        for (int half = 0; half < (kGated ? 2 : 1); ++half)
            transpose_dwords(count_ / 2, waiting_->valid, pairs_[half], waiting_->width, turned_ + half * pre.half / 2,
                             stride);
        char* to = reinterpret_cast<char*>(pre.row(waiting_->first));
        const char* from = reinterpret_cast<const char*>(turned_);
        const size_t bytes = size_t(waiting_->valid) * stride * 4;
        if (reinterpret_cast<uintptr_t>(to) % 64 == 0)
            for (size_t i = 0; i < bytes; i += W * 4) stream(to + i, loadi(from + i));
        else
            std::memcpy(to, from, bytes);
    }

    const MoeTraining& m_;
    const ExpertRows& rows_;
    const int64_t first_;
    const int count_;
    const bf16* const bias_;  // null: none
    uint32_t* const hidden_;
    const LaneBlock* waiting_ = nullptr;  // whose sums are not activated yet
    int waiting_row_ = 0, turn_ = 0;  // which sums wait
    alignas(64) float sums_[2][kBlock * kBlock];
    static constexpr int kHalf = kChunk / 2 * 32;
    alignas(64) uint32_t pairs_[2][kHalf];
    alignas(64) uint32_t turned_[2 * kChunk / 2 * 32];
};

constexpr int kDownRows = 192;   // rows of H that a task of the down product takes
constexpr int kDownPairs = 256;  // of F multiplied at once: 32 KiB of a panel, which stay in the first-level cache

// The down product for some rows of H and all rows of a piece, and what becomes of it: see down_block.
inline void down_piece(const MoeTraining& m, const ExpertRows& rows, const Piece& piece, int64_t first, int count,
                       const uint32_t* hidden, const float* row_weights, float* sums) {
    const int64_t h = m.hidden, f = m.inner;
    const bf16* weights = m.down + (rows.expert * h + first) * f;
    alignas(64) float y[kDownRows * kBlock], turned[kBlock * kDownRows];
    configure_products(16);
    for (size_t b = piece.block; b < piece.block + piece.blocks; ++b) {
        const LaneBlock& block = rows.blocks[b];
        const uint32_t* panel = hidden + block.offset * (f / 2);
        const bool is_last = b + 1 == piece.block + piece.blocks;
        BroughtNearer next(panel + block.width * (f / 2), is_last ? 0 : rows.blocks[b + 1].width * (f / 2) * 4,
                           count / kBlock * (f / 32) * 2);
        for (int from = 0; from < f / 2; from += kDownPairs)
            for (int row = 0; row < count; row += kBlock) {
                const int pairs = int(std::min<int64_t>(kDownPairs, f / 2 - from));
                const bf16* top = weights + row * f + 2 * from;
                auto multiply = [&](auto columns) {
                    constexpr int kColumns = decltype(columns)::value;
                    float* sums = y + row * kBlock;
                    const TileTerms terms[] = {{top, top + 16 * f, size_t(f), panel + int64_t(from) * block.width,
                                                size_t(block.width), pairs}};
                    multiply_tiles<Stays::kPanel, kColumns, true>(terms, TileSums(from > 0 ? sums : nullptr, sums, kBlock),
                                                                  [&](int, int quarter) {
                                                                      if (quarter % 2) next();
                                                                  });
                };
                block.width == 32 ? multiply(std::integral_constant<int, 2>{})
                                  : multiply(std::integral_constant<int, 1>{});
            }
        transpose_dwords(count, block.valid, reinterpret_cast<uint32_t*>(y), kBlock,
                         reinterpret_cast<uint32_t*>(turned), kDownRows);
        finish_down(m, rows, block, first, count, turned, kDownRows, row_weights, sums);
    }
}

// A bias's gradient: of every row of pairs the sum.
inline void bias_gradient(const uint32_t* left, size_t ld, int64_t pairs, int rows, bf16* grad) {
    const Vi ones = set1i(0x3f803f80);  // the sum of a pair is its product with two ones
    for (int r = 0; r < rows; ++r) {
        Vf total = zero();
        for (int64_t p = 0; p < pairs; p += W) total = dot_bf16(total, loadi(left + r * ld + p), ones);
        grad[r] = float_to_bf16(sum(total));
    }
}

// What a task of the backward pass keeps to itself.
struct GradientScratch {
    uint32_t* down;        // the chunk's columns of the down weights: panels (columns / 32, H / 2, 32)
    uint32_t* hidden;      // panels (columns / 32, pairs, 32)
    uint32_t* contracted;  // the gradient of the pre-activation: columns of F, gate and up, by pairs of rows
    float* sums;           // two blocks
    uint32_t* paired;      // (2, 16, 32): a block's gradients by pairs of rows
    float* dots;           // (32, W): parts of the products of hidden states and their gradients
};

// Columns of F that one task takes: two chunks, or less where that makes too few tasks.
inline int64_t gradient_columns(const MoeTraining& m, const Group& group, int threads) {
    int64_t columns = 2 * kChunk;
    while (columns > kPanel && int64_t(group.experts.size()) * chunks(m.inner, columns) < 8 * threads)
        columns = columns > kChunk ? kChunk : kPanel;
    return columns;
}

// From the gradient of an expert's output to those of its weights, for one or two chunks of F, or a part of one.
class GradientChunk {
  public:
    GradientChunk(const MoeTraining& m, const ExpertRows& rows, int64_t first, int columns, const MoeTrainingScratch& s)
        : m_(m),
          rows_(rows),
          s_(s),
          first_(first),
          columns_(columns),
          pairs_(rows.padded / 2),
          ld_(contracted_pairs(rows.padded)),
          pre_{chunk_of<const bf16>(m.pre + rows.start * m.pre_width(), rows.count, 0),
               chunk_of<const bf16>(m.pre + rows.start * m.pre_width(), rows.count, 1)},
          grad_pre_{chunk_of<bf16>(s.grad_pre + rows.row_offset * m.pre_width(), rows.padded, 0),
                    chunk_of<bf16>(s.grad_pre + rows.row_offset * m.pre_width(), rows.padded, 1)} {}

    void work() {
        if (rows_.count == 0) {
            clear();
            return;
        }
        const int64_t h = m_.hidden, f = m_.inner, e = rows_.expert, width = m_.pre_width();
        static thread_local Scratch buffer;
        uint32_t* at = buffer.get<uint32_t>(size_t(columns_) * size_t(h / 2 + pairs_ + 2 * ld_) + 2 * kBlock * kBlock +
                                            2 * 16 * kBlock + kBlock * W);
        auto take = [&](auto*& part, size_t count) {
            part = reinterpret_cast<std::remove_reference_t<decltype(part)>>(at);
            at += count;
        };
        take(mine_.sums, 2 * kBlock * kBlock);
        take(mine_.paired, 2 * 16 * kBlock);
        take(mine_.dots, kBlock * W);
        take(mine_.down, size_t(columns_) * size_t(h / 2));
        take(mine_.hidden, size_t(columns_) * size_t(pairs_));
        take(mine_.contracted, 2 * size_t(columns_) * size_t(ld_));
        pack_down();
        with_activation(m_.activation, [&](auto activation) { rows_to_pre<activation>(); });
        const uint32_t* gradients = s_.contracted_gradients + rows_.contracted_offset * h;
        for (int half = 0; m_.grad_up && half < (m_.gated() ? 2 : 1); ++half) {
            const uint32_t* left = mine_.contracted + half * columns_ * ld_;
            gemm_streamed(columns_, int(pairs_), left, size_t(ld_), s_.tokens_paired + rows_.row_offset / 2 * h, h,
                          m_.grad_up + (e * width + half * f + first_) * h, size_t(h));
            if (m_.grad_up_bias)
                bias_gradient(left, size_t(ld_), pairs_, columns_, m_.grad_up_bias + e * width + half * f + first_);
        }
        if (m_.grad_down)
            gemm_streamed(int(h), int(pairs_), gradients, size_t(ld_), mine_.hidden, columns_,
                          m_.grad_down + e * h * f + first_, size_t(f));
    }

  private:
    // The chunk that the first column is in, or the next one, at the column where ours begin there.
    template <typename T>
    ChunkedRows<T> chunk_of(T* expert, int64_t rows, int further) const {
        const int64_t chunk = (first_ / kChunk + further) * kChunk;
        const int columns = int(std::min<int64_t>(kChunk, m_.inner - chunk));
        auto all = chunked_rows(expert, rows, chunk, columns, m_.gated());
        if (further == 0) all.chunk += first_ - chunk;
        return all;
    }
    // Where column c of ours is: which of the two chunks, and the column there.
    int chunk_at(int c) const { return first_ % kChunk + c >= kChunk; }
    int within_chunk(int c) const { return chunk_at(c) ? int(first_ % kChunk) + c - kChunk : c; }

    void clear() const {
        const int64_t h = m_.hidden, f = m_.inner, e = rows_.expert, width = m_.pre_width();
        for (int64_t half = 0; m_.grad_up && half < width / f; ++half) {
            clear_row(m_.grad_up + (e * width + half * f + first_) * h, columns_ * h);
            if (m_.grad_up_bias) clear_row(m_.grad_up_bias + e * width + half * f + first_, columns_);
        }
        for (int64_t r = 0; m_.grad_down && r < h; ++r) clear_row(m_.grad_down + (e * h + r) * f + first_, columns_);
    }

    void pack_down() const {
        const int64_t h = m_.hidden, f = m_.inner;
        for (int64_t p = 0; p < h / 2; ++p) {
            const bf16* even = m_.down + (rows_.expert * h + 2 * p) * f + first_;
            for (int c = 0; c < columns_; c += kPanel) {
                fetch(even + kAhead * f + c);
                fetch(even + (kAhead + 1) * f + c);
            }
            for (int c = 0; c < columns_; c += kPanel)
                interleave_rows(kPanel, even + c, even + f + c, mine_.down + (c * (h / 2) + p * kPanel));
        }
    }

    // grad_hidden = grad_out * down and through the activation, block by block of rows and columns.
    template <Activation A>
    void rows_to_pre() {
        const int64_t h = m_.hidden;
        const size_t stride = size_t(row_stride(h));
        const bf16* gradients = s_.gradients + rows_.row_offset * int64_t(stride);
        const int calls = int(h / 32) * 2, halves = is_gated(A) ? 2 : 1;
        configure_products(16);
        for (int64_t row = 0; row < rows_.padded; row += kBlock) {
            BroughtNearer next_rows(gradients + (row + kBlock) * int64_t(stride),
                                    row + kBlock < rows_.padded ? kBlock * int64_t(stride) * 2 : 0,
                                    columns_ / kBlock * calls);
            for (int c = 0; c < columns_; c += kPanel) {
                const bf16* top = gradients + row * int64_t(stride);
                const auto& pre = pre_[chunk_at(c)];
                const bool is_whole = waiting_.rows == kBlock;
                Beside epilogue(
                    [&](int part) { is_whole ? part_to_pre<A, true>(part) : part_to_pre<A, false>(part); },
                    waiting_.rows ? kParts : 0, calls);
                // What the next rows read of the pre-activation.
                Beside ahead(
                    [&](int part) {
                        const int64_t then = row + kBlock + part / halves;
                        if (then < rows_.count) fetch(pre.row(then) + within_chunk(c) + part % halves * pre.half);
                    },
                    kBlock * halves, calls);
                float* sums = mine_.sums + (tile_sharing.takes_few() && sums_ == mine_.sums ? kBlock * kBlock : 0);
                const TileTerms terms[] = {
                    {top, top + 16 * stride, stride, mine_.down + c * (h / 2), kPanel, int(h / 2)}};
                multiply_tiles<Stays::kRows, 2, true>(terms, TileSums(nullptr, sums, kBlock), [&](int, int quarter) {
                    if (quarter % 2 == 0) return;
                    epilogue.call();
                    ahead.call();
                    next_rows();
                });
                finish_block();
                sums_ = sums;
                row_ = row;
                column_ = c;
                const auto& grad_pre = grad_pre_[chunk_at(c)];
                const int column = within_chunk(c);
                waiting_ = {int(std::min<int64_t>(kBlock, rows_.count - row)),
                            pre.row(row) + column,
                            grad_pre.row(row) + column,
                            pre.stride,
                            pre.half,
                            m_.combines() ? s_.row_weights + rows_.start + row : nullptr,
                            mine_.hidden + c * pairs_ + row / 2 * kPanel};
            }
        }
        for (int part = 0; part < kParts; ++part) part_to_pre<A, false>(part);
        finish_block();
    }

    // Parts of a block: pairs of rows, W columns of each.
    static constexpr int kColumnParts = kBlock / W, kParts = kBlock / 2 * kColumnParts;

    // kWhole: all rows of the block exist.
    template <Activation A, bool kWhole>
    void part_to_pre(int part) {
        const Waiting& w = waiting_;
        const int column = part / (kBlock / 2) * W, r = part % (kBlock / 2) * 2;
        const float* raw_sums = sums_ + r * kBlock + column;
        const bf16* values = w.pre + r * w.stride + column;
        float* dots = mine_.dots + r * W;
        Vf hidden[2], grad_gate[2], grad_up[2];
#pragma GCC unroll 2
        for (int side = 0; side < 2; ++side) {
            if (!kWhole && r + side >= w.rows) {
                hidden[side] = grad_gate[side] = grad_up[side] = zero();
                if (column == 0) store(dots + side * W, zero());
                continue;
            }
            const Vf raw = load(raw_sums + side * kBlock);
            const Vf grad = w.weights ? mul(raw, set1(w.weights[r + side])) : raw;
            const Vf a = load_bf16(values + side * w.stride);
            if constexpr (is_gated(A)) {
                const Vf b = load_bf16(values + side * w.stride + w.half);
                const GatedGradients all = activate_gated_with_gradients<A, true>(a, b, grad);
                hidden[side] = all.value;
                grad_gate[side] = all.gate;
                grad_up[side] = all.up;
            } else {
                const WithDerivative value = activate_with_derivative<A>(a);
                hidden[side] = value.value;
                grad_gate[side] = mul(grad, value.derivative);
            }
            const Vf before = column == 0 ? zero() : load(dots + side * W);
            store(dots + side * W, fma(hidden[side], raw, before));
        }
        bf16* to = w.grad_pre + r * w.stride + column;
        uint32_t* paired = mine_.paired + r / 2 * kBlock + column;
        const Vi gate_rows = to_bf16_rows(grad_gate[0], grad_gate[1]);
        store_rows(to, to + w.stride, gate_rows);
        storei(paired, interleave(gate_rows));
        if constexpr (is_gated(A)) {
            const Vi up_rows = to_bf16_rows(grad_up[0], grad_up[1]);
            store_rows(to + w.half, to + w.stride + w.half, up_rows);
            storei(paired + 16 * kBlock, interleave(up_rows));
        }
        storei(w.hidden + r / 2 * kPanel + column, interleave_bf16(hidden[0], hidden[1]));
    }

    // What a whole block is needed for.
    void finish_block() {
        if (waiting_.rows == 0) return;
        for (int half = 0; half < (m_.gated() ? 2 : 1); ++half)
            transpose_dwords(16, kBlock, mine_.paired + half * 16 * kBlock, kBlock,
                             mine_.contracted + (half * columns_ + column_) * ld_ + row_ / 2, size_t(ld_));
        if (!m_.combines()) return;
        const int64_t panel = (first_ + column_) / kPanel, h = m_.hidden;
        const bf16* bias = panel == 0 && m_.down_bias ? m_.down_bias + rows_.expert * h : nullptr;
        for (int r = 0; r < kBlock && row_ + r < rows_.count; ++r) {
            float total = sum(load(mine_.dots + r * W));
            // The down product's bias belongs to the row's output too; the first panel brings it.
            if (bias) {
                const bf16* gradients = s_.gradients + (rows_.row_offset + row_ + r) * row_stride(h);
                Vf dot = zero();
                for (int64_t c = 0; c < h; c += W) dot = fma(load_bf16(bias + c), load_bf16(gradients + c), dot);
                total += sum(dot);
            }
            s_.partial_weights[panel * m_.rows + rows_.start + row_ + r] = total;
        }
    }

    const MoeTraining& m_;
    const ExpertRows& rows_;
    const MoeTrainingScratch& s_;
    const int64_t first_;
    const int columns_;
    const int64_t pairs_, ld_;
    const ChunkedRows<const bf16> pre_[2];
    const ChunkedRows<bf16> grad_pre_[2];
    GradientScratch mine_{};
    // The block of sums that waits, where its rows and columns begin.
    struct Waiting {
        int rows;  // that exist; 0: no block waits
        const bf16* pre;
        bf16* grad_pre;
        int64_t stride, half;  // as in ChunkedRows
        const float* weights;  // null: all 1
        uint32_t* hidden;
    };
    Waiting waiting_{};
    const float* sums_ = nullptr;
    int64_t row_ = 0;
    int column_ = 0;
};

// Columns of the gradient of the rows that one task takes: so many that their sums stay in the second-level cache.
inline int64_t grad_x_width(int64_t longest) { return longest <= 320 ? 512 : longest <= 704 ? 256 : 128; }

// Columns first .. first + columns of the gradient of a piece's rows: grad_pre * up, two chunks of F at a time.
inline void grad_x_piece(const MoeTraining& m, const ExpertRows& rows, const Piece& piece, int64_t first, int columns,
                         const MoeTrainingScratch& s) {
    const int64_t h = m.hidden, f = m.inner, width = m.pre_width(), row = piece.first;
    const int count = int(std::min(piece.count, rows.count - row)), blocks = (count + kBlock - 1) / kBlock;
    const int panels = columns / kPanel, halves = m.gated() ? 2 : 1;
    static thread_local Scratch buffer;
    uint32_t* packed = buffer.get<uint32_t>(size_t(kChunk * halves + int64_t(blocks) * kBlock) * size_t(columns));
    float* sums = reinterpret_cast<float*>(packed + kChunk * halves * columns);
    const bf16* weights = m.up + rows.expert * width * h + first;
    configure_products(16);
    for (int64_t start = 0; start < f; start += 2 * kChunk) {
        const int wide = int(std::min<int64_t>(2 * kChunk, f - start)), all_pairs = wide / 2 * halves;
        int pairs = 0;  // packed
        for (int from = 0; from < wide; from += kChunk)
            for (int half = 0; half < halves; ++half)
                for (int r = from; r < wide && r < from + kChunk; r += 2, ++pairs) {
                    const bf16* even = weights + (half * f + start + r) * h;
                    for (int j = 0; j < panels; ++j) {
                        fetch(even + kAhead * h + j * kPanel);
                        fetch(even + (kAhead + 1) * h + j * kPanel);
                    }
                    for (int j = 0; j < panels; ++j)
                        interleave_rows(kPanel, even + j * kPanel, even + h + j * kPanel,
                                        packed + (j * all_pairs + pairs) * kPanel);
                }
        const bf16* grad_pre = s.grad_pre + rows.row_offset * width;
        auto chunk_at = [&](int from) {
            return chunked_rows<const bf16>(grad_pre, rows.padded, start + from, std::min(kChunk, wide - from),
                                            m.gated());
        };
        for (int block = 0; block < blocks; ++block) {
            const auto chunk = chunk_at(0);
            // Of two whole chunks; a narrower one comes as it is read.
            BroughtNearer next(chunk.row(row + (block + 1) * kBlock), kBlock * chunk.stride * 2,
                               rows.padded * chunk.stride * 2, block + 1 < blocks ? wide / kChunk : 0,
                               panels * (all_pairs / 16) * 2);
            for (int j = 0; j < panels; ++j) {
                float* c = sums + (block * panels + j) * kBlock * kBlock;
                TileTerms terms[2];
                int done = 0;
                for (int part = 0; part < 2; ++part) {
                    const int from = part * kChunk, these = std::clamp(wide - from, 0, kChunk) / 2 * halves;
                    const auto here = chunk_at(these > 0 ? from : 0);
                    const bf16* top = here.row(row + block * kBlock);
                    const uint32_t* panel = packed + (j * all_pairs + done) * kPanel;
                    terms[part] = {top, top + 16 * here.stride, size_t(here.stride), panel, kPanel, these};
                    done += these;
                }
                const TileSums added(start > 0 ? c : nullptr, c, kBlock);
                multiply_tiles<Stays::kRows, 2, true>(terms, added, [&](int, int quarter) {
                    if (quarter % 2) next();
                });
            }
        }
    }
    for (int r = 0; r < count; ++r) {
        const int64_t n = rows.start + row + r;
        for (int c = 0; c < columns; c += W) {
            const float* block = sums + (r / kBlock * panels + c / kPanel) * kBlock * kBlock;
            const Vf value = load(block + r % kBlock * kBlock + c % kPanel);
            if (m.routes > 1)
                store(s.sums + n * h + first + c, value);
            else
                store_bf16(m.grad_x + (m.combines() ? m.token_ids[n] : n) * h + first + c, value);
        }
    }
}

// The up product and the activation of a group's rows.
inline void multiply_up(Team& team, const MoeTraining& m, const Group& group, const MoeTrainingScratch& s) {
    const int64_t h = m.hidden, f = m.inner, up_chunks = chunks(f, kChunk);
    auto weights_of = [&](long i) {
        const ExpertRows& rows = group.experts[group.pieces[i / up_chunks].expert];
        return m.up + (rows.expert * m.pre_width() + i % up_chunks * kChunk) * h;
    };
    auto count_of = [&](long i) { return int(std::min<int64_t>(kChunk, f - i % up_chunks * kChunk)); };
    neighbouring_tasks(team, long(group.pieces.size()) * up_chunks, [&](long i, bool follows, bool goes_on) {
        const Piece& piece = group.pieces[i / up_chunks];
        const int64_t first = i % up_chunks * kChunk, bytes = count_of(i) * h * m.pre_width() / f * 2;
        with_activation(m.activation, [&](auto activation) {
            UpChunk<activation>(m, group.experts[piece.expert], first, count_of(i), s.hidden)
                .work(piece, s.tokens, follows && BroughtNearer::fits(bytes), goes_on ? weights_of(i + 1) : nullptr,
                      goes_on ? count_of(i + 1) : 0);
        });
    });
}

// The down product of a group's rows, and what becomes of it.
inline void multiply_down(Team& team, const MoeTraining& m, const Group& group, const MoeTrainingScratch& s) {
    const int64_t tasks = chunks(m.hidden, kDownRows);
    team.tasks(long(group.pieces.size()) * tasks, [&](long i) {
        const Piece& piece = group.pieces[i / tasks];
        const int64_t first = i % tasks * kDownRows;
        down_piece(m, group.experts[piece.expert], piece, first, int(std::min<int64_t>(kDownRows, m.hidden - first)),
                   s.hidden, s.row_weights, s.sums);
    });
}

// All gradients of a group whose rows are prepared.
inline void find_gradients(Team& team, const MoeTraining& m, const Group& group, const MoeTrainingScratch& s) {
    const int64_t h = m.hidden, f = m.inner;
    const long experts = long(group.experts.size()), pieces = long(group.pieces.size());
    const int64_t columns = gradient_columns(m, group, team.size()), tasks = chunks(f, columns);
    team.tasks(experts * tasks, [&](long i) {
        const int64_t first = i % tasks * columns;
        GradientChunk(m, group.experts[i / tasks], first, int(std::min(columns, f - first)), s).work();
    });
    const int64_t x_columns = grad_x_width(group.longest), x_tasks = m.grad_x ? pieces * chunks(h, x_columns) : 0;
    const int64_t bias_tasks = m.grad_down_bias ? experts : 0;
    team.tasks(x_tasks + bias_tasks, [&](long i) {
        if (i < x_tasks) {
            const Piece& piece = group.pieces[i % pieces];
            const int64_t first = i / pieces * x_columns;
            grad_x_piece(m, group.experts[piece.expert], piece, first, int(std::min(x_columns, h - first)), s);
            return;
        }
        const ExpertRows& rows = group.experts[i - x_tasks];
        bias_gradient(s.contracted_gradients + rows.contracted_offset * h, size_t(contracted_pairs(rows.padded)),
                      rows.padded / 2, int(h), m.grad_down_bias + rows.expert * h);
    });
}

}  // namespace training
}  // namespace moesaic

#endif
