// The experts of one MoE layer in training: gather, up product, activation, down product, weighted combine; and backward.
//
// Rows are routes, sorted by expert. In the forward pass the lanes of a vector are rows, so that the weights, which
// change in every step, are read as they lie (they are the row-major operand A) and only the rows are packed; the hidden
// state leaves the first product in the layout that the second one takes. In the backward pass the lanes are columns of
// weights: contracting over a weight's rows needs no more than neighbouring rows interleaved. Experts are worked on in
// groups of some thousand rows, whose scratch stays in the caches.
//
// Every element of a result is the sum of one task, in an order that does not depend on the number of threads.
#pragma once

#include <algorithm>
#include <type_traits>
#include <vector>

#include "activation_math.h"
#include "gemm_bf16.h"
#include "parallel.h"
#include "transpose.h"

namespace moesaic {

struct MoeTraining {
    int64_t tokens;   // T
    int64_t routes;   // K of every token; 0: row n of x and of the result is row n, without weights
    int64_t rows;     // N
    int64_t hidden;   // H, a multiple of 32
    int64_t inner;    // F, a multiple of 32
    int64_t experts;  // E
    int64_t activation;
    const int64_t* tokens_per_expert;  // (E,)
    const int64_t* token_ids;          // (N,), null without routes
    const int64_t* slots;              // (T, K), N for a dropped route, null without routes
    const float* routing_weights;      // (T, K), null without routes
    const bf16* x;                     // (T, H)
    const bf16* up;                    // (E, F, H), or (E, 2F, H) as [gate, up]
    const bf16* up_bias;               // (E, F or 2F) or null
    const bf16* down;                  // (E, H, F)
    const bf16* down_bias;             // (E, H) or null
    bf16* pre;  // N * (F or 2F) numbers, written by forward and read by backward; see ChunkedRows
    bf16* out;                         // (T, H)
    // Backward only.
    const bf16* grad_out;         // (T, H)
    bf16* grad_x;                 // (T, H) or null
    float* grad_routing_weights;  // (T, K), null without routes
    bf16* grad_up;
    bf16* grad_up_bias;
    bf16* grad_down;
    bf16* grad_down_bias;

    bool gated() const { return activation == kSwiglu; }
    int64_t pre_width() const { return gated() ? 2 * inner : inner; }
    bool combines() const { return routes > 0; }
};

namespace training {

constexpr int kChunk = 96;          // rows or columns that one product works on: whole row blocks and panels everywhere
constexpr int kGradXColumns = 128;  // columns of the up weights packed at once for the gradient of the rows
constexpr int kAhead = 16;          // rows of weights fetched before they are packed: pieces of rows are no stream
constexpr size_t kFewestUses = 3;   // products with the same rows of weights that make up for a copy of them
constexpr int64_t kGroupRows = 2048;

// A matrix of an expert's rows and F columns, cut into chunks of 96 columns, each chunk's rows one after the other: what a
// task reads and writes is one stream. A gated activation has both halves of a chunk in a row, first gate, then up.
template <typename T>
struct ChunkedRows {
    T* chunk;        // its first row
    int64_t stride;  // elements of a row
    int64_t half;    // where the up half begins

    T* row(int64_t r) const { return chunk + r * stride; }
};

template <typename T>
inline ChunkedRows<T> chunked_rows(T* expert, int64_t rows, int64_t first, int columns, bool gated) {
    const int64_t halves = gated ? 2 : 1;
    return {expert + rows * first * halves, columns * halves, columns};
}

// An expert's rows as the left operand of a weight's gradient, which is contracted over them: pairs of rows, for a chunk of
// 96 columns pair after pair; with tiles, which take rows, column after column.
struct ContractedRows {
    uint32_t* chunk;
    size_t ld;  // dwords from one column, or pair, to the next

    ContractedRows(uint32_t* expert, int64_t pairs, int64_t first, int columns)
        : chunk(expert + first * pairs), ld(size_t(kHasTiles ? pairs : columns)) {}
    // Where pair p begins.
    uint32_t* pair(int64_t p) const { return chunk + (kHasTiles ? p : p * int64_t(ld)); }
    // Bring pairs p .. p + count here, which lie one after the other elsewhere.
    void copy(int64_t p, int count, int columns, const uint32_t* from, size_t ld_from) const {
        if constexpr (kHasTiles)
            transpose_dwords(count, columns, from, ld_from, pair(p), ld);
        else
            for (int i = 0; i < count; ++i) std::memcpy(pair(p + i), from + i * ld_from, columns * sizeof(uint32_t));
    }
};

// Lanes of rows that share one packed panel in the forward pass.
struct LaneBlock {
    int first;       // row within the expert
    int valid;       // rows; the lanes beyond hold zeros
    int width;       // 16, 32 or 48
    int64_t offset;  // lanes before it in the group
};

struct ExpertRows {
    int64_t expert, start, count;  // rows start .. start + count of all N
    int64_t lane_offset;           // lanes of the group before it
    int64_t row_offset;            // rows of the group before it, each expert rounded up to whole pair blocks
    int64_t padded;                // count rounded up to whole pair blocks
    std::vector<LaneBlock> blocks;
};

// Some of an expert's rows: what one task takes, so that one expert with many rows keeps all threads busy.
struct Piece {
    int expert;             // of the group
    int64_t first, count;   // rows within the expert, padding included
    size_t block, blocks;   // the lane blocks that begin in them
};

struct Group {
    std::vector<ExpertRows> experts;
    std::vector<Piece> pieces;
    int64_t lanes = 0, rows = 0;
    int64_t longest = 0;  // rows of a piece
};

// Whole lane blocks and whole row blocks. A machine with tiles has a second-level cache of 2 MiB.
#if defined(MOESAIC_TILES)
constexpr int64_t kPieceRows = 10 * kChunk;
#else
constexpr int64_t kPieceRows = 5 * kChunk;
#endif
constexpr int kParts = 5;  // tasks of a piece where its rows are only moved

inline std::vector<Group> make_groups(const MoeTraining& m, int threads) {
    const int64_t wanted = std::max<int64_t>(kGroupRows, 512 * threads);
    std::vector<Group> groups;
    int64_t start = 0;
    for (int64_t e = 0; e < m.experts; ++e) {
        if (groups.empty() || groups.back().rows >= wanted) groups.emplace_back();
        Group& group = groups.back();
        const int64_t count = m.tokens_per_expert[e];
        ExpertRows rows{e, start, count, group.lanes, group.rows, 0, {}};
        rows.padded = (count + 2 * kPairBlock - 1) / (2 * kPairBlock) * (2 * kPairBlock);
        for (int64_t first = 0; first < count;) {
            const int64_t left = (count - first + 15) / 16;  // in 16 lanes
            const int width = left == 1 ? 16 : left == 3 ? 48 : 32;
            const int valid = int(std::min<int64_t>(width, count - first));
            rows.blocks.push_back({int(first), valid, width, group.lanes});
            group.lanes += width;
            first += width;
        }
        group.rows += rows.padded;
        start += count;
        size_t block = 0;
        // As equal as whole chunks allow, since a short one at the end leaves a thread without work.
        const int64_t parts = (count + kPieceRows - 1) / kPieceRows, steps = (count + kChunk - 1) / kChunk;
        for (int64_t part = 0; part < parts; ++part) {
            const int64_t first = steps * part / parts * kChunk, most = steps * (part + 1) / parts * kChunk - first;
            const size_t begin = block;
            while (block < rows.blocks.size() && rows.blocks[block].first < first + most) ++block;
            const int64_t here = std::min(most, rows.padded - first);
            group.pieces.push_back({int(group.experts.size()), first, here, begin, block - begin});
            group.longest = std::max(group.longest, here);
        }
        group.experts.push_back(std::move(rows));
    }
    return groups;
}

// The weight that each row's output is multiplied with; rows of dropped routes do not exist.
inline void find_row_weights(const MoeTraining& m, int64_t token, float* row_weights) {
    for (int64_t k = 0; k < m.routes; ++k) {
        const int64_t row = m.slots[token * m.routes + k];
        if (row < m.rows) row_weights[row] = m.routing_weights[token * m.routes + k];
    }
}

// Elements from one row of `width` bf16 numbers to the next, where we choose it.
inline int64_t row_stride(int64_t width) { return share_cache_sets(width * sizeof(bf16)) ? width + kPanel : width; }

// A chunk's rows of weights as a product's left operand.
struct WeightRows {
    const bf16* rows;
    size_t ld;

    // As they lie, or where that would slow `uses` products down, in a copy of count * row_stride(width) numbers.
    WeightRows(const bf16* weights, int count, int64_t width, size_t uses, bf16* copy) : rows(weights), ld(width) {
        if (row_stride(width) == width || uses < kFewestUses) return;
        rows = copy;
        ld = size_t(row_stride(width));
        for (int r = 0; r < count; ++r) std::memcpy(copy + r * ld, weights + r * width, width * sizeof(bf16));
    }
};

// is_first: of the blocks that use these weights, which may not be in the cache yet.
template <int Width>
inline void up_block(const MoeTraining& m, const ExpertRows& rows, const LaneBlock& block, int64_t first, int count,
                     const WeightRows& weights, const WeightRows& up_weights, bool is_first, const uint32_t* tokens,
                     uint32_t* hidden, uint32_t* pairs) {
    const int64_t h = m.hidden, f = m.inner, e = rows.expert;
    alignas(64) float gate[kChunk * Width], up[kChunk * Width];
    const uint32_t* panel = tokens + block.offset * (h / 2);
    const bf16* bias = m.up_bias ? m.up_bias + e * m.pre_width() + first : nullptr;
#if defined(MOESAIC_TILES)
    // While one half of a chunk is multiplied, the other, or the next chunk's first one, is on its way.
    const bf16* following = first + kChunk < f ? weights.rows + kChunk * h : nullptr;
    const bf16 *after_gate = m.gated() ? up_weights.rows : following, *after_up = following;
#else
    const bf16* after_gate = weights.rows + row_block<Width>() * weights.ld;
    const bf16* after_up = up_weights.rows + row_block<Width>() * up_weights.ld;
#endif
    gemm<Width>(count, int(h / 2), weights.rows, weights.ld, panel, Width, gate, Width, false, 1, 0,
                is_first ? after_gate : nullptr);
    if (m.gated())
        gemm<Width>(count, int(h / 2), up_weights.rows, up_weights.ld, panel, Width, up, Width, false, 1, 0,
                    is_first ? after_up : nullptr);
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
            if (m.gated()) {
                Vf b0 = load(up + r * Width + lane), b1 = load(up + (r + 1) * Width + lane);
                if (bias) {
                    b0 = add(b0, set1(bf16_to_float(bias[f + r])));
                    b1 = add(b1, set1(bf16_to_float(bias[f + r + 1])));
                }
                storei(pairs + (kChunk / 2 + r / 2) * Width + lane, interleave_bf16(b0, b1));
                h0 = mul(silu(a0), b0);
                h1 = mul(silu(a1), b1);
            } else {
                h0 = activate(a0, m.activation);
                h1 = activate(a1, m.activation);
            }
            storei(hidden_rows + r / 2 * Width + lane, interleave_bf16(h0, h1));
        }
    }
    const auto pre = chunked_rows(m.pre + rows.start * m.pre_width(), rows.count, first, count, m.gated());
    uint32_t* target = reinterpret_cast<uint32_t*>(pre.row(block.first));
    transpose_dwords<true>(count / 2, block.valid, pairs, Width, target, pre.stride / 2);
    if (m.gated())
        transpose_dwords<true>(count / 2, block.valid, pairs + kChunk / 2 * Width, Width, target + pre.half / 2,
                               pre.stride / 2);
}

template <int Width>
inline void down_block(const MoeTraining& m, const ExpertRows& rows, const LaneBlock& block, int64_t first, int count,
                       const WeightRows& weights, bool is_first, const uint32_t* hidden, const float* row_weights,
                       float* sums) {
    const int64_t h = m.hidden, f = m.inner, e = rows.expert;
    alignas(64) float y[kChunk * Width], turned[Width * kChunk];
    gemm<Width>(count, int(f / 2), weights.rows, weights.ld, hidden + block.offset * (f / 2), Width, y, Width, false, 1,
                0, is_first ? weights.rows + row_block<Width>() * weights.ld : nullptr);
    transpose_dwords(count, block.valid, reinterpret_cast<uint32_t*>(y), Width, reinterpret_cast<uint32_t*>(turned),
                     kChunk);
    const bf16* bias = m.down_bias ? m.down_bias + e * h + first : nullptr;
    for (int lane = 0; lane < block.valid; ++lane) {
        const int64_t row = rows.start + block.first + lane;
        const Vf weight = set1(m.combines() ? row_weights[row] : 1.0f);
        // With one route a row is its token's result; with more, rows wait for their sum.
        bf16* out = m.routes > 1 ? nullptr : m.out + (m.combines() ? m.token_ids[row] : row) * h + first;
        for (int c = 0; c < count; c += W) {
            Vf value = load(turned + lane * kChunk + c);
            if (bias) value = add(value, load_bf16(bias + c));
            if (m.combines()) value = mul(value, weight);
            if (out)
                store_bf16(out + c, value);
            else
                store(sums + row * h + first + c, value);
        }
    }
}

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

// Call task(i) for i in [0, count) as team.tasks does, but some neighbours on one thread: they read ahead for each
// other.
template <typename Task>
inline void neighbouring_tasks(Team& team, long count, Task&& task) {
    const Slices slices{int(count), team.size(), 4};
    team.tasks(slices.count(), [&](long slice) {
        for (int i = slices.begin(int(slice)), end = slices.begin(int(slice) + 1); i < end; ++i) task(long(i));
    });
}

constexpr int64_t kTokensPerTask = 64;
inline int64_t chunks(int64_t total, int64_t size) { return (total + size - 1) / size; }

// Call work(token) for every token; ends with a barrier.
template <typename Work>
inline void for_tokens(Team& team, int64_t tokens, Work&& work) {
    team.tasks(chunks(tokens, kTokensPerTask), [&](long task) {
        const int64_t end = std::min(tokens, (task + 1) * kTokensPerTask);
        for (int64_t t = task * kTokensPerTask; t < end; ++t) work(t);
    });
}

inline void clear_row(bf16* row, int64_t size) { std::memset(row, 0, size * sizeof(bf16)); }

}  // namespace training

// What the threads of a call share; made by the caller before the team starts.
struct MoeTrainingScratch {
    std::vector<training::Group> groups;
    float* row_weights = nullptr;  // (N,)
    float* sums = nullptr;         // (N, H) fp32, with more than one route
    // Forward, of the largest group: (lanes, H) and (lanes, F), packed.
    uint32_t* tokens = nullptr;
    uint32_t* hidden = nullptr;
    // Backward, of the largest group.
    bf16* gradients = nullptr;                 // (rows, row_stride(H))
    uint32_t* contracted_gradients = nullptr;  // per expert and chunk of H: ContractedRows
    uint32_t* tokens_paired = nullptr;         // per expert panels (H / 32, rows / 2, 32)
    bf16* grad_pre = nullptr;                  // (rows, F or 2F)
    uint32_t* contracted_grad_pre = nullptr;   // per expert and chunk of F or of each half of 2F
    uint32_t* hidden_paired = nullptr;         // per expert panels (F / 32, rows / 2, 32)
    float* partial_weights = nullptr;          // (chunks of F, N): parts of the routing weights' gradient
};

inline void moe_training_forward(Team& team, const MoeTraining& m, const MoeTrainingScratch& s) {
    using namespace training;
    const int64_t h = m.hidden, f = m.inner;
    if (m.combines())
        for_tokens(team, m.tokens, [&](int64_t t) {
            find_row_weights(m, t, s.row_weights);
            if (m.routes == 1 && m.slots[t] >= m.rows) clear_row(m.out + t * h, h);
        });
    for (const Group& group : s.groups) {
        const long pieces = long(group.pieces.size());
        team.tasks(pieces * kParts, [&](long i) {
            const Piece& piece = group.pieces[i / kParts];
            const ExpertRows& rows = group.experts[piece.expert];
            for (size_t b = piece.block + i % kParts; b < piece.block + piece.blocks; b += kParts) {
                const LaneBlock& block = rows.blocks[b];
                uint32_t* panel = s.tokens + block.offset * (h / 2);
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
        });
        const int64_t up_chunks = chunks(f, kChunk), down_chunks = chunks(h, kChunk);
        neighbouring_tasks(team, pieces * up_chunks, [&](long i) {
            const Piece& piece = group.pieces[i / up_chunks];
            const ExpertRows& rows = group.experts[piece.expert];
            const int64_t first = i % up_chunks * kChunk;
            const int count = int(std::min<int64_t>(kChunk, f - first));
            alignas(64) uint32_t pairs[kChunk * 48];
            static thread_local Scratch copies;
            bf16* copy = copies.get<bf16>(2 * kChunk * size_t(row_stride(h)));
            const bf16* from = m.up + (rows.expert * m.pre_width() + first) * h;
            const WeightRows weights(from, count, h, piece.blocks, copy);
            const WeightRows up_weights = m.gated() ? WeightRows(from + f * h, count, h, piece.blocks,
                                                                 copy + kChunk * row_stride(h))
                                                    : weights;
            for (size_t b = piece.block; b < piece.block + piece.blocks; ++b) {
                const LaneBlock& block = rows.blocks[b];
                with_width(block.width, [&](auto width) {
                    up_block<width>(m, rows, block, first, count, weights, up_weights, b == piece.block, s.tokens,
                                    s.hidden, pairs);
                });
            }
        });
        neighbouring_tasks(team, pieces * down_chunks, [&](long i) {
            const Piece& piece = group.pieces[i / down_chunks];
            const ExpertRows& rows = group.experts[piece.expert];
            const int64_t first = i % down_chunks * kChunk;
            const int count = int(std::min<int64_t>(kChunk, h - first));
            static thread_local Scratch copies;
            const WeightRows weights(m.down + (rows.expert * h + first) * f, count, f, piece.blocks,
                                     copies.get<bf16>(kChunk * size_t(row_stride(f))));
            for (size_t b = piece.block; b < piece.block + piece.blocks; ++b) {
                const LaneBlock& block = rows.blocks[b];
                with_width(block.width, [&](auto width) {
                    down_block<width>(m, rows, block, first, count, weights, b == piece.block, s.hidden,
                                      s.row_weights, s.sums);
                });
            }
        });
    }
    if (m.routes > 1) for_tokens(team, m.tokens, [&](int64_t t) { sum_routes(m, t, s.sums, m.out); });
}

namespace training {

// Sixteen pairs of an expert's rows: gathered gradients, the same weighted as ContractedRows, and the inputs in pairs.
inline void prepare_rows(const MoeTraining& m, const ExpertRows& rows, int64_t first_pair, const MoeTrainingScratch& s) {
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
            storei(weighted + p * h + c, interleave_bf16(mul(weight[0], load_bf16(g[0] + c)),
                                                         mul(weight[1], load_bf16(g[1] + c))));
        uint32_t* panels = s.tokens_paired + rows.row_offset / 2 * h;
        for (int64_t c = 0; c < h; c += kPanel)
            interleave_rows(kPanel, x[0] + c, x[1] + c, panels + (c / kPanel * pairs + first_pair + p) * kPanel);
    }
    for (int64_t c = 0; c < h; c += kChunk) {
        const int columns = int(std::min<int64_t>(kChunk, h - c));
        const ContractedRows contracted(s.contracted_gradients + rows.row_offset / 2 * h, pairs, c, columns);
        contracted.copy(first_pair, count, columns, weighted + c, h);
    }
}

// The gradient of the pre-activation for 96 columns of F: grad_hidden = grad_out * down, then through the activation.
inline void grad_pre_columns(const MoeTraining& m, const ExpertRows& rows, const Piece& piece, int64_t chunk,
                             const MoeTrainingScratch& s) {
    const int64_t first = chunk * kChunk, end = piece.first + piece.count;
    const int64_t h = m.hidden, f = m.inner, width = m.pre_width(), pairs = rows.padded / 2, stride = row_stride(h);
    const int columns = int(std::min<int64_t>(kChunk, f - first)), panels = columns / kPanel;
    static thread_local Scratch buffer;
    uint32_t* packed = buffer.get<uint32_t>(h / 2 * kChunk + 2 * kChunk * kChunk);
    float* grad_hidden = reinterpret_cast<float*>(packed + h / 2 * kChunk);
    uint32_t* paired = packed + h / 2 * kChunk + kChunk * kChunk;  // (2, 48, 96), with tiles
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
    const auto pre = chunked_rows<const bf16>(m.pre + rows.start * width, rows.count, first, columns, m.gated());
    const auto grad_pre = chunked_rows(s.grad_pre + rows.row_offset * width, rows.padded, first, columns, m.gated());
    uint32_t* contracted = s.contracted_grad_pre + rows.row_offset / 2 * width;
    const ContractedRows gate_rows(contracted, pairs, first, columns), up_rows(contracted, pairs, f + first, columns);
    for (int64_t row = piece.first; row < end; row += kChunk) {
        const int count = int(std::min<int64_t>(kChunk, end - row));
        const bf16* gradients = s.gradients + (rows.row_offset + row) * stride;
        for (int j = 0; j < panels; ++j)
            gemm_panel(count, int(h / 2), gradients, size_t(stride), packed + j * (h / 2) * kPanel, kPanel,
                       grad_hidden + j * kPanel, kChunk, false);
        for (int r = 0; r < count; r += 2) {
            const int64_t local = row + r;
            const bool exists[2] = {local < rows.count, local + 1 < rows.count};
            Vf dot[2] = {zero(), zero()}, weight[2];
            for (int side = 0; side < 2; ++side)
                weight[side] = set1(m.combines() && exists[side] ? s.row_weights[rows.start + local + side] : 1.0f);
            uint32_t* gate_to = kHasTiles ? paired + r / 2 * kChunk : gate_rows.pair(local / 2);
            uint32_t* up_to = kHasTiles ? paired + (kChunk / 2 + r / 2) * kChunk : up_rows.pair(local / 2);
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
                    if (m.gated()) {
                        const Vf b = load_bf16(values + pre.half);
                        const WithDerivative gate = silu_with_derivative(a);
                        hidden[side] = mul(gate.value, b);
                        grad_gate[side] = mul(mul(grad, b), gate.derivative);
                        grad_up[side] = mul(grad, gate.value);
                    } else {
                        const WithDerivative value = activate_with_derivative(a, m.activation);
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
                if (m.gated()) {
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
                        bias_dot = fma(load_bf16(down_bias + c), load_bf16(gradients + (r + side) * stride + c),
                                       bias_dot);
                    part += sum(bias_dot);
                }
                s.partial_weights[chunk * m.rows + rows.start + local + side] = part;
            }
        }
        if constexpr (kHasTiles) {
            gate_rows.copy(row / 2, count / 2, columns, paired, kChunk);
            if (m.gated()) up_rows.copy(row / 2, count / 2, columns, paired + kChunk / 2 * kChunk, kChunk);
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
            for (int j = 0; j < panels; ++j)
                gemm<kPanel>(std::min(kChunk, count - r), pairs, grad_pre.row(row + r), grad_pre.stride,
                             packed + j * whole * pairs * kPanel, kPanel, sums + r * most + j * kPanel, most,
                             start > 0, int(whole), rows.padded * grad_pre.stride,
                             j == 0 ? grad_pre.row(row + r + kRowBlock) : nullptr);
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
    if constexpr (kHasTiles) {
        for (int c = 0; c < columns; ++c) {
            Vf total = zero();
            for (int64_t p = 0; p < pairs; p += W) total = dot_bf16(total, loadi(left.chunk + c * left.ld + p), ones);
            grad[c] = float_to_bf16(sum(total));
        }
    } else {
        for (int c = 0; c < columns; c += W) {
            Vf total = zero();
            for (int64_t p = 0; p < pairs; ++p) total = dot_bf16(total, loadi(left.pair(p) + c), ones);
            store_bf16(grad + c, total);
        }
    }
}

}  // namespace training

inline void moe_training_backward(Team& team, const MoeTraining& m, const MoeTrainingScratch& s) {
    using namespace training;
    const int64_t h = m.hidden, f = m.inner, width = m.pre_width();
    if (m.combines())
        for_tokens(team, m.tokens, [&](int64_t t) {
            find_row_weights(m, t, s.row_weights);
            if (m.grad_x && m.routes == 1 && m.slots[t] >= m.rows) clear_row(m.grad_x + t * h, h);
        });
    const int64_t hidden_chunks = chunks(f, kChunk);
    for (const Group& group : s.groups) {
        const long experts = long(group.experts.size());
        const long pieces = long(group.pieces.size());
        team.tasks(pieces * kParts, [&](long i) {
            const Piece& piece = group.pieces[i / kParts];
            const int64_t end = (piece.first + piece.count) / 2;
            for (int64_t pair = piece.first / 2 + i % kParts * 16; pair < end; pair += kParts * 16)
                prepare_rows(m, group.experts[piece.expert], pair, s);
        });
        team.tasks(pieces * hidden_chunks, [&](long i) {
            const Piece& piece = group.pieces[i / hidden_chunks];
            grad_pre_columns(m, group.experts[piece.expert], piece, i % hidden_chunks, s);
        });
        // Few rows take up to 512 columns at once, so that weights are read in long pieces.
        int64_t x_columns = kGradXColumns;
        while (x_columns < 512 && x_columns < h && group.longest * x_columns <= 256 * kGradXColumns) x_columns *= 2;
        const int64_t x_tasks = m.grad_x ? pieces * chunks(h, x_columns) : 0;
        const int64_t up_tasks = width / f * hidden_chunks, down_tasks = chunks(h, kChunk);
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
            uint32_t* contracted = is_up ? s.contracted_grad_pre + rows.row_offset / 2 * width
                                         : s.contracted_gradients + rows.row_offset / 2 * h;
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
    if (!m.combines()) return;
    for_tokens(team, m.tokens, [&](int64_t t) {
        if (m.grad_x && m.routes > 1) sum_routes(m, t, s.sums, m.grad_x);
        for (int64_t k = 0; k < m.routes; ++k) {
            const int64_t row = m.slots[t * m.routes + k];
            float total = 0.0f;
            if (row < m.rows)
                for (int64_t chunk = 0; chunk < hidden_chunks; ++chunk)
                    total += s.partial_weights[chunk * m.rows + row];
            m.grad_routing_weights[t * m.routes + k] = total;
        }
    });
}

}  // namespace moesaic
