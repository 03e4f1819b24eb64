// The phases of an MoE layer's training by vectors. In the forward pass the lanes of a vector are rows, so that the
// weights, which change in every step, are read as they lie (they are the row-major operand A) and only the rows are
// packed; the hidden state leaves the first product in the layout that the second one takes. In the backward pass the
// lanes are columns of weights: contracting over a weight's rows needs no more than neighbouring rows interleaved.
#pragma once

#include "moe_training_rows.h"

#if !defined(MOESAIC_TILES)

namespace moesaic {
namespace training {

constexpr int64_t kGradXColumns = 128;  // columns of the up weights packed at once for the gradient of the rows
// Products with the same rows of weights that make up for a copy of them.
constexpr size_t kFewestUses = 3;

// A chunk's rows of weights as the left operand of `uses` products.
inline LeftRows weight_rows(const bf16* weights, int count, int64_t width, [[maybe_unused]] size_t uses,
                            Scratch& scratch) {
#if !defined(MOESAIC_EXPANDS_ROWS)
    const int64_t stride = row_stride(width);
    if (stride != width && uses >= kFewestUses) {
        bf16* copy = scratch.get<bf16>(size_t(count) * stride);
        for (int r = 0; r < count; ++r) std::memcpy(copy + r * stride, weights + r * width, width * sizeof(bf16));
        return {copy, size_t(stride)};
    }
#endif
    return left_rows(weights, size_t(width), count, width, scratch);
}

// c[count][Width] = rows of weights times a panel. is_first: of the products with them, which may not be in the cache yet.
template <int Width>
inline void multiply_weights(const LeftRows& weights, int count, int64_t width, const uint32_t* panel, float* c,
                             [[maybe_unused]] bool is_first) {
#if !defined(MOESAIC_EXPANDS_ROWS)
    gemm<Width>(count, int(width / 2), weights.rows, weights.ld, panel, Width, c, Width, false,
                is_first ? weights.rows + row_block<Width>() * weights.ld : nullptr);
#else
    gemm<Width>(count, int(width / 2), weights.rows, weights.ld, panel, Width, c, Width, false);
#endif
}

template <int Width, Activation A>
inline void up_block(const MoeTraining& m, const ExpertRows& rows, const LaneBlock& block, int64_t first, int count,
                     const LeftRows& weights, const LeftRows& up_weights, bool is_first, const uint32_t* tokens,
                     uint32_t* hidden, uint32_t* pairs) {
    const int64_t h = m.hidden, f = m.inner, e = rows.expert;
    alignas(64) float gate[kChunk * Width], up[kChunk * Width];
    const uint32_t* panel = tokens + block.offset * (h / 2);
    const bf16* bias = m.up_bias ? m.up_bias + e * m.pre_width() + first : nullptr;
    multiply_weights<Width>(weights, count, h, panel, gate, is_first);
    if constexpr (is_gated(A)) multiply_weights<Width>(up_weights, count, h, panel, up, is_first);
    uint32_t* hidden_rows = hidden + block.offset * (f / 2) + first / 2 * Width;
    for (int r = 0; r < count; r += 2) {
        for (int lane = 0; lane < Width; lane += W) {
            Vf a0 = load(gate + r * Width + lane), a1 = load(gate + (r + 1) * Width + lane);
            if (bias) {
                a0 = add(a0, set1(bf16_to_float(bias[r])));
                a1 = add(a1, set1(bf16_to_float(bias[r + 1])));
            }
            storei(pairs + r / 2 * Width + lane, interleave_bf16(a0, a1));
            Vf h0, h1;
            if constexpr (is_gated(A)) {
                Vf b0 = load(up + r * Width + lane), b1 = load(up + (r + 1) * Width + lane);
                if (bias) {
                    b0 = add(b0, set1(bf16_to_float(bias[f + r])));
                    b1 = add(b1, set1(bf16_to_float(bias[f + r + 1])));
                }
                storei(pairs + (kChunk / 2 + r / 2) * Width + lane, interleave_bf16(b0, b1));
                h0 = activate_gated<A>(a0, b0);
                h1 = activate_gated<A>(a1, b1);
            } else {
                h0 = activate<A>(a0);
                h1 = activate<A>(a1);
            }
            storei(hidden_rows + r / 2 * Width + lane, interleave_bf16(h0, h1));
        }
    }
    const auto pre = chunked_rows(m.pre + rows.start * m.pre_width(), rows.count, first, count, is_gated(A));
    uint32_t* target = reinterpret_cast<uint32_t*>(pre.row(block.first));
    transpose_dwords<true>(count / 2, block.valid, pairs, Width, target, pre.stride / 2);
    if constexpr (is_gated(A))
        transpose_dwords<true>(count / 2, block.valid, pairs + kChunk / 2 * Width, Width, target + pre.half / 2,
                               pre.stride / 2);
}

template <int Width>
inline void down_block(const MoeTraining& m, const ExpertRows& rows, const LaneBlock& block, int64_t first, int count,
                       const LeftRows& weights, bool is_first, const uint32_t* hidden, const float* row_weights,
                       float* sums) {
    const int64_t f = m.inner;
    alignas(64) float y[kChunk * Width], turned[Width * kChunk];
    multiply_weights<Width>(weights, count, f, hidden + block.offset * (f / 2), y, is_first);
    transpose_dwords(count, block.valid, reinterpret_cast<uint32_t*>(y), Width, reinterpret_cast<uint32_t*>(turned),
                     kChunk);
    finish_down(m, rows, block, first, count, turned, kChunk, row_weights, sums);
}

// Call body(width) with a constant.
template <typename Body>
inline void with_width(int width, Body&& body) {
    if (width == 16)
        body(std::integral_constant<int, 16>{});
    else if (width == 32)
        body(std::integral_constant<int, 32>{});
    else
        body(std::integral_constant<int, 48>{});
}

// The up product and the activation of a group's rows.
inline void multiply_up(Team& team, const MoeTraining& m, const Group& group, const MoeTrainingScratch& s) {
    const int64_t h = m.hidden, f = m.inner, up_chunks = chunks(f, kChunk);
    neighbouring_tasks(team, long(group.pieces.size()) * up_chunks, [&](long i, bool, bool) {
        const Piece& piece = group.pieces[i / up_chunks];
        const ExpertRows& rows = group.experts[piece.expert];
        const int64_t first = i % up_chunks * kChunk;
        const int count = int(std::min<int64_t>(kChunk, f - first));
        alignas(64) uint32_t pairs[kChunk * 48];
        static thread_local Scratch copies, up_copies;
        const bf16* from = m.up + (rows.expert * m.pre_width() + first) * h;
        const LeftRows weights = weight_rows(from, count, h, piece.blocks, copies);
        const LeftRows up_weights = m.gated() ? weight_rows(from + f * h, count, h, piece.blocks, up_copies) : weights;
        with_activation(m.activation, [&](auto activation) {
            for (size_t b = piece.block; b < piece.block + piece.blocks; ++b) {
                const LaneBlock& block = rows.blocks[b];
                with_width(block.width, [&](auto width) {
                    up_block<width, activation>(m, rows, block, first, count, weights, up_weights, b == piece.block,
                                                s.tokens, s.hidden, pairs);
                });
            }
        });
    });
}

// The down product of a group's rows, and what becomes of it.
inline void multiply_down(Team& team, const MoeTraining& m, const Group& group, const MoeTrainingScratch& s) {
    const int64_t h = m.hidden, f = m.inner, down_chunks = chunks(h, kChunk);
    neighbouring_tasks(team, long(group.pieces.size()) * down_chunks, [&](long i, bool, bool) {
        const Piece& piece = group.pieces[i / down_chunks];
        const ExpertRows& rows = group.experts[piece.expert];
        const int64_t first = i % down_chunks * kChunk;
        const int count = int(std::min<int64_t>(kChunk, h - first));
        static thread_local Scratch copies;
        const LeftRows weights = weight_rows(m.down + (rows.expert * h + first) * f, count, f, piece.blocks, copies);
        for (size_t b = piece.block; b < piece.block + piece.blocks; ++b) {
            const LaneBlock& block = rows.blocks[b];
            with_width(block.width, [&](auto width) {
                down_block<width>(m, rows, block, first, count, weights, b == piece.block, s.hidden, s.row_weights,
                                  s.sums);
            });
        }
    });
}

// The gradient of the pre-activation for 96 columns of F: grad_hidden = grad_out * down, then through the activation.
template <Activation A>
inline void grad_pre_columns(const MoeTraining& m, const ExpertRows& rows, const Piece& piece, int64_t chunk,
                             const MoeTrainingScratch& s) {
    const int64_t first = chunk * kChunk, end = piece.first + piece.count;
    const int64_t h = m.hidden, f = m.inner, width = m.pre_width(), pairs = rows.padded / 2, stride = row_stride(h);
    const int columns = int(std::min<int64_t>(kChunk, f - first)), panels = columns / kPanel;
    static thread_local Scratch buffer;
    uint32_t* packed = buffer.get<uint32_t>(h / 2 * kChunk + kChunk * kChunk);
    float* grad_hidden = reinterpret_cast<float*>(packed + h / 2 * kChunk);
    for (int64_t p = 0; p < h / 2; ++p) {
        const bf16* even = m.down + (rows.expert * h + 2 * p) * f + first;
        for (int j = 0; j < panels; ++j) {
            fetch(even + kAhead * f + j * kPanel);
            fetch(even + (kAhead + 1) * f + j * kPanel);
        }
        for (int j = 0; j < panels; ++j)
            interleave_rows(kPanel, even + j * kPanel, even + f + j * kPanel, packed + (j * (h / 2) + p) * kPanel);
    }
    const bf16* down_bias = m.down_bias ? m.down_bias + rows.expert * h : nullptr;
    const auto pre = chunked_rows<const bf16>(m.pre + rows.start * width, rows.count, first, columns, is_gated(A));
    const auto grad_pre = chunked_rows(s.grad_pre + rows.row_offset * width, rows.padded, first, columns, is_gated(A));
    uint32_t* contracted = s.contracted_grad_pre + rows.contracted_offset * width;
    const ContractedRows gate_rows(contracted, pairs, first, columns), up_rows(contracted, pairs, f + first, columns);
    for (int64_t row = piece.first; row < end; row += kChunk) {
        const int count = int(std::min<int64_t>(kChunk, end - row));
        const bf16* gradients = s.gradients + (rows.row_offset + row) * stride;
        gemm_panels(count, int(h / 2), gradients, size_t(stride), packed, size_t(h / 2) * kPanel, panels, grad_hidden,
                    kChunk, false);
        for (int r = 0; r < count; r += 2) {
            const int64_t local = row + r;
            const bool exists[2] = {local < rows.count, local + 1 < rows.count};
            Vf dot[2] = {zero(), zero()}, weight[2];
            for (int side = 0; side < 2; ++side)
                weight[side] = set1(m.combines() && exists[side] ? s.row_weights[rows.start + local + side] : 1.0f);
            uint32_t* gate_to = gate_rows.pair(local / 2);
            uint32_t* up_to = up_rows.pair(local / 2);
            for (int c = 0; c < columns; c += W) {
                Vf hidden[2], grad_gate[2], grad_up[2];
                for (int side = 0; side < 2; ++side) {
                    if (!exists[side]) {
                        hidden[side] = grad_gate[side] = grad_up[side] = zero();
                        continue;
                    }
                    const bf16* values = pre.row(local + side) + c;
                    const Vf raw = load(grad_hidden + (r + side) * kChunk + c);
                    const Vf grad = mul(raw, weight[side]);
                    const Vf a = load_bf16(values);
                    if constexpr (is_gated(A)) {
                        const Vf b = load_bf16(values + pre.half);
                        const GatedGradients all = activate_gated_with_gradients<A>(a, b, grad);
                        hidden[side] = all.value;
                        grad_gate[side] = all.gate;
                        grad_up[side] = all.up;
                    } else {
                        const WithDerivative value = activate_with_derivative<A>(a);
                        hidden[side] = value.value;
                        grad_gate[side] = mul(grad, value.derivative);
                        grad_up[side] = zero();
                    }
                    dot[side] = fma(hidden[side], raw, dot[side]);
                }
                bf16 *even = grad_pre.row(local) + c, *odd = grad_pre.row(local + 1) + c;
                store_bf16(even, grad_gate[0]);
                store_bf16(odd, grad_gate[1]);
                storei(gate_to + c, interleave_bf16(grad_gate[0], grad_gate[1]));
                if (is_gated(A)) {
                    store_bf16(even + grad_pre.half, grad_up[0]);
                    store_bf16(odd + grad_pre.half, grad_up[1]);
                    storei(up_to + c, interleave_bf16(grad_up[0], grad_up[1]));
                }
                uint32_t* hidden_panel = s.hidden_paired + rows.row_offset / 2 * f +
                                         ((first + c) / kPanel * pairs + local / 2) * kPanel + c % kPanel;
                storei(hidden_panel, interleave_bf16(hidden[0], hidden[1]));
            }
            for (int side = 0; side < 2 && m.combines(); ++side) {
                if (!exists[side]) continue;
                float part = sum(dot[side]);
                // The down product's bias belongs to the row's output too; the first chunk brings it.
                if (chunk == 0 && down_bias) {
                    Vf bias_dot = zero();
                    for (int64_t c = 0; c < h; c += W)
                        bias_dot =
                            fma(load_bf16(down_bias + c), load_bf16(gradients + (r + side) * stride + c), bias_dot);
                    part += sum(bias_dot);
                }
                s.partial_weights[chunk * m.rows + rows.start + local + side] = part;
            }
        }
    }
}

// Columns first .. first + most of the gradient of the rows: grad_pre * up.
inline void grad_x_columns(const MoeTraining& m, const ExpertRows& rows, const Piece& piece, int64_t first,
                           int64_t most, const MoeTrainingScratch& s) {
    // Of the rows of up packed at once: 240 KiB at 128 columns; the sums of all rows wait meanwhile.
    constexpr int64_t kChunks = 5;
    const int64_t h = m.hidden, f = m.inner, width = m.pre_width();
    const int columns = int(std::min<int64_t>(most, h - first)), panels = columns / kPanel;
    static thread_local Scratch buffer;
    uint32_t* packed = buffer.get<uint32_t>(size_t((kChunks * kChunk + piece.count) * most));
    float* sums = reinterpret_cast<float*>(packed + kChunks * kChunk * most);
    const bf16* weights = m.up + rows.expert * width * h + first;
    const int64_t row = piece.first;
    const int count = int(std::min(piece.count, rows.count - row));
    for (int64_t start = 0; start < f;) {
        // Whole chunks, since those are as far apart as each other; a narrower last one on its own.
        int64_t whole = std::min(kChunks, (f - start) / kChunk);
        const int wide = int(whole ? kChunk : f - start);
        if (whole == 0) whole = 1;
        const int pairs = m.gated() ? wide : wide / 2;
        for (int64_t block = 0; block < whole; ++block)
            for (int p = 0; p < pairs; ++p) {
                const bool is_up = p >= wide / 2;
                const int64_t weight_row = start + block * wide + 2 * (is_up ? p - wide / 2 : p) + (is_up ? f : 0);
                const bf16* even = weights + weight_row * h;
                for (int j = 0; j < panels; ++j) {
                    fetch(even + kAhead * h + j * kPanel);
                    fetch(even + (kAhead + 1) * h + j * kPanel);
                }
                for (int j = 0; j < panels; ++j)
                    interleave_rows(kPanel, even + j * kPanel, even + h + j * kPanel,
                                    packed + ((j * whole + block) * pairs + p) * kPanel);
            }
        const auto grad_pre =
            chunked_rows<const bf16>(s.grad_pre + rows.row_offset * width, rows.padded, start, wide, m.gated());
        for (int r = 0; r < count; r += kChunk)
            gemm_panels(std::min(kChunk, count - r), pairs, grad_pre.row(row + r), grad_pre.stride, packed,
                        size_t(whole) * pairs * kPanel, panels, sums + r * most, most, start > 0, int(whole),
                        rows.padded * grad_pre.stride, grad_pre.row(row + r + kRowBlock));
        start += whole * wide;
    }
    for (int r = 0; r < count; ++r) {
        const int64_t n = rows.start + row + r;
        for (int c = 0; c < columns; c += W) {
            const Vf value = load(sums + r * most + c);
            if (m.routes > 1)
                store(s.sums + n * h + first + c, value);
            else
                store_bf16(m.grad_x + (m.combines() ? m.token_ids[n] : n) * h + first + c, value);
        }
    }
}

// A bias's gradient for one chunk: the sums over an expert's rows.
inline void bias_gradient(const ContractedRows& left, int64_t pairs, int columns, bf16* grad) {
    const Vi ones = set1i(0x3f803f80);  // the sum of a pair is its product with two ones
    for (int c = 0; c < columns; c += W) {
        Vf total = zero();
        for (int64_t p = 0; p < pairs; ++p) total = dot_bf16(total, loadi(left.pair(p) + c), ones);
        store_bf16(grad + c, total);
    }
}

// All gradients of a group whose rows are prepared.
inline void find_gradients(Team& team, const MoeTraining& m, const Group& group, const MoeTrainingScratch& s) {
    const int64_t h = m.hidden, f = m.inner, width = m.pre_width(), hidden_chunks = chunks(f, kChunk);
    const long experts = long(group.experts.size()), pieces = long(group.pieces.size());
    team.tasks(pieces * hidden_chunks, [&](long i) {
        const Piece& piece = group.pieces[i / hidden_chunks];
        with_activation(m.activation, [&](auto activation) {
            grad_pre_columns<activation>(m, group.experts[piece.expert], piece, i % hidden_chunks, s);
        });
    });
    // Few rows take up to 512 columns at once, so that weights are read in long pieces.
    int64_t x_columns = kGradXColumns;
    while (x_columns < 512 && x_columns < h && group.longest * x_columns <= 256 * kGradXColumns) x_columns *= 2;
    const int64_t x_tasks = m.grad_x ? pieces * chunks(h, x_columns) : 0;
    const int64_t up_tasks = m.grad_up ? width / f * hidden_chunks : 0;
    const int64_t down_tasks = m.grad_down ? chunks(h, kChunk) : 0;
    const int64_t weight_tasks = up_tasks + down_tasks;
    team.tasks(x_tasks + experts * weight_tasks, [&](long i) {
        if (i < x_tasks) {
            const Piece& piece = group.pieces[i % pieces];
            grad_x_columns(m, group.experts[piece.expert], piece, i / pieces * x_columns, x_columns, s);
            return;
        }
        const ExpertRows& rows = group.experts[(i - x_tasks) / weight_tasks];
        const int64_t e = rows.expert, pairs = rows.padded / 2, task = (i - x_tasks) % weight_tasks;
        const bool is_up = task < up_tasks;
        const int64_t half = is_up ? task / hidden_chunks * f : 0, end = is_up ? half + f : h;
        const int64_t first = half + (is_up ? task % hidden_chunks : task - up_tasks) * kChunk;
        const int count = int(std::min<int64_t>(kChunk, end - first));
        bf16* grad = is_up ? m.grad_up + e * width * h : m.grad_down + e * h * f;
        bf16* grad_bias = is_up ? m.grad_up_bias : m.grad_down_bias;
        const int64_t columns = is_up ? h : f;
        uint32_t* contracted = is_up ? s.contracted_grad_pre + rows.contracted_offset * width
                                     : s.contracted_gradients + rows.contracted_offset * h;
        const uint32_t* paired =
            is_up ? s.tokens_paired + rows.row_offset / 2 * h : s.hidden_paired + rows.row_offset / 2 * f;
        const ContractedRows left(contracted, pairs, first, count);
        if (rows.count)
            gemm_streamed(count, int(pairs), left.chunk, left.ld, paired, columns, grad + first * columns, columns);
        else
            clear_row(grad + first * columns, count * columns);
        if (grad_bias) bias_gradient(left, pairs, count, grad_bias + e * (is_up ? width : h) + first);
    });
}

}  // namespace training
}  // namespace moesaic

#endif
