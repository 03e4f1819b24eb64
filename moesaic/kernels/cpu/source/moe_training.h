// The experts of one MoE layer in training: gather, up product, activation, down product, weighted combine; and
// backward.
//
// Rows are routes, sorted by expert. Experts are worked on in groups of some thousand rows, whose scratch stays in the
// caches; what a group's phases do is in moe_training_vectors.h, and with tiles in moe_training_tiles.h.
//
// Every element of a result is the sum of one task, in an order that does not depend on the number of threads.
#pragma once

#include "moe_training_rows.h"
#include "moe_training_tiles.h"
#include "moe_training_vectors.h"

namespace moesaic {
namespace training {

// out[t] = the sum of its routes' rows; null rows are dropped routes.
inline void sum_routes(const MoeTraining& m, int64_t token, const float* sums, bf16* out) {
    const int64_t h = m.hidden;
    const int64_t* slots = m.slots + token * m.routes;
    for (int64_t c = 0; c < h; c += W) {
        Vf total = zero();
        for (int64_t k = 0; k < m.routes; ++k)
            if (slots[k] < m.rows) total = add(total, load(sums + slots[k] * h + c));
        store_bf16(out + token * h + c, total);
    }
}

// A lane block's tokens, gathered and turned: pair after pair of H, each with all lanes.
inline void pack_tokens(const MoeTraining& m, const ExpertRows& rows, const LaneBlock& block, uint32_t* panel) {
    const int64_t h = m.hidden;
    for (int lane = 0; lane < block.width; lane += W) {
        const int here = std::min(W, block.valid - lane);
        for (int64_t c = 0; c < h / 2; c += W) {
            Row values[W] = {};
            for (int r = 0; r < here; ++r) {
                const int64_t row = rows.start + block.first + lane + r;
                const int64_t token = m.combines() ? m.token_ids[row] : row;
                values[r] = load_row(reinterpret_cast<const uint32_t*>(m.x + token * h) + c, W);
            }
            transpose_registers(values);
            for (int r = 0; r < W; ++r) store_row(panel + (c + r) * block.width + lane, values[r], W);
        }
    }
}

// Sixteen pairs of an expert's rows: gathered gradients, the same weighted as ContractedRows, and the inputs in pairs.
inline void prepare_rows(const MoeTraining& m, const ExpertRows& rows, int64_t first_pair,
                         const MoeTrainingScratch& s) {
    const int64_t h = m.hidden, pairs = rows.padded / 2;
    const int count = int(std::min<int64_t>(16, pairs - first_pair));
    static thread_local Scratch buffer;
    uint32_t* weighted = buffer.get<uint32_t>(16 * h + h);
    bf16* zeros = reinterpret_cast<bf16*>(weighted + 16 * h);
    clear_row(zeros, h);
    for (int p = 0; p < count; ++p) {
        const bf16 *x[2], *g[2];
        Vf weight[2];
        for (int side = 0; side < 2; ++side) {
            const int64_t local = 2 * (first_pair + p) + side, row = rows.start + local;
            bf16* copy = s.gradients + (rows.row_offset + local) * row_stride(h);
            if (local < rows.count) {
                const int64_t token = m.combines() ? m.token_ids[row] : row;
                x[side] = m.x + token * h;
                g[side] = m.grad_out + token * h;
                weight[side] = set1(m.combines() ? s.row_weights[row] : 1.0f);
                std::memcpy(copy, g[side], h * sizeof(bf16));
            } else {
                x[side] = g[side] = zeros;
                weight[side] = zero();
                clear_row(copy, h);
            }
        }
        for (int64_t c = 0; c < h; c += W)
            storei(weighted + p * h + c,
                   interleave_bf16(mul(weight[0], load_bf16(g[0] + c)), mul(weight[1], load_bf16(g[1] + c))));
        uint32_t* panels = s.tokens_paired + rows.row_offset / 2 * h;
        for (int64_t c = 0; c < h; c += kPanel)
            interleave_rows(kPanel, x[0] + c, x[1] + c, panels + (c / kPanel * pairs + first_pair + p) * kPanel);
    }
    for (int64_t c = 0; c < h; c += kChunk) {
        const int columns = int(std::min<int64_t>(kChunk, h - c));
        const ContractedRows contracted(s.contracted_gradients + rows.contracted_offset * h, pairs, c, columns);
        contracted.copy(first_pair, count, columns, weighted + c, h);
    }
}

}  // namespace training

inline void moe_training_forward(Team& team, const MoeTraining& m, const MoeTrainingScratch& s) {
    using namespace training;
    const int64_t h = m.hidden;
    if (m.combines())
        for_tokens(team, m.tokens, [&](int64_t t) {
            find_row_weights(m, t, s.row_weights);
            if (m.routes == 1 && m.slots[t] >= m.rows) clear_row(m.out + t * h, h);
        });
    for (const Group& group : s.groups) {
        team.tasks(long(group.pieces.size()) * kParts, [&](long i) {
            const Piece& piece = group.pieces[i / kParts];
            const ExpertRows& rows = group.experts[piece.expert];
            for (size_t b = piece.block + i % kParts; b < piece.block + piece.blocks; b += kParts)
                pack_tokens(m, rows, rows.blocks[b], s.tokens + rows.blocks[b].offset * (h / 2));
        });
        multiply_up(team, m, group, s);
        multiply_down(team, m, group, s);
    }
    if (m.routes > 1) for_tokens(team, m.tokens, [&](int64_t t) { sum_routes(m, t, s.sums, m.out); });
}

inline void moe_training_backward(Team& team, const MoeTraining& m, const MoeTrainingScratch& s) {
    using namespace training;
    const int64_t h = m.hidden;
    if (m.combines())
        for_tokens(team, m.tokens, [&](int64_t t) {
            find_row_weights(m, t, s.row_weights);
            if (m.grad_x && m.routes == 1 && m.slots[t] >= m.rows) clear_row(m.grad_x + t * h, h);
        });
    for (const Group& group : s.groups) {
        team.tasks(long(group.pieces.size()) * kParts, [&](long i) {
            const Piece& piece = group.pieces[i / kParts];
            const int64_t end = (piece.first + piece.count) / 2;
            for (int64_t pair = piece.first / 2 + i % kParts * 16; pair < end; pair += kParts * 16)
                prepare_rows(m, group.experts[piece.expert], pair, s);
        });
        find_gradients(team, m, group, s);
    }
    if (!m.combines()) return;
    for_tokens(team, m.tokens, [&](int64_t t) {
        if (m.grad_x && m.routes > 1) sum_routes(m, t, s.sums, m.grad_x);
        for (int64_t k = 0; k < m.routes; ++k) {
            const int64_t row = m.slots[t * m.routes + k];
            float total = 0.0f;
            if (row < m.rows)
                for (int64_t part = 0; part < parts_of_weights(m.inner); ++part)
                    total += s.partial_weights[part * m.rows + row];
            m.grad_routing_weights[t * m.routes + k] = total;
        }
    });
}

}  // namespace moesaic
