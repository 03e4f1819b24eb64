// What the two directions of an MoE layer's training share: the arguments, rows cut into groups, pieces and blocks, and
// scratch.
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
    bf16* out;  // (T, H)
    // Backward only.
    const bf16* grad_out;         // (T, H)
    bf16* grad_x;                 // (T, H) or null
    float* grad_routing_weights;  // (T, K), null without routes
    bf16* grad_up;                // of the weights, null where they are frozen
    bf16* grad_up_bias;
    bf16* grad_down;
    bf16* grad_down_bias;

    bool gated() const { return is_gated(activation); }
    int64_t pre_width() const { return gated() ? 2 * inner : inner; }
    bool combines() const { return routes > 0; }
};

namespace training {

constexpr int kChunk = 96;  // rows or columns that one product works on: whole row blocks and panels everywhere
constexpr int kAhead = 16;  // rows of weights fetched before they are packed: pieces of rows are no stream
constexpr int64_t kGroupRows = 2048;

// A matrix of an expert's rows and F columns, cut into chunks of 96 columns, each chunk's rows one after the other:
// what a task reads and writes is one stream. A gated activation has both halves of a chunk in a row, first gate, then
// up.
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

// Dwords from one column to the next of an expert's ContractedRows with tiles: an odd number of cache lines, since
// tiles whose rows are a power of two apart come slowly.
inline int64_t contracted_pairs(int64_t padded_rows) {
    return padded_rows / 2 / 16 % 2 ? padded_rows / 2 : padded_rows / 2 + 16;
}

// An expert's rows as the left operand of a weight's gradient, which is contracted over them: pairs of rows, for a
// chunk of 96 columns pair after pair; with tiles, which take rows, column after column.
struct ContractedRows {
    uint32_t* chunk;
    size_t ld;  // dwords from one column, or pair, to the next

    ContractedRows(uint32_t* expert, int64_t pairs, int64_t first, int columns)
        : chunk(expert + first * (kHasTiles ? contracted_pairs(2 * pairs) : pairs)),
          ld(size_t(kHasTiles ? contracted_pairs(2 * pairs) : columns)) {}
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
    int width;       // 16, 32 or, without tiles, 48
    int64_t offset;  // lanes before it in the group
};

struct ExpertRows {
    int64_t expert, start, count;  // rows start .. start + count of all N
    int64_t row_offset;            // rows of the group before it, each expert rounded up to whole pair blocks
    int64_t padded;                // count rounded up to whole pair blocks
    int64_t contracted_offset;     // pairs of the group before it as ContractedRows
    std::vector<LaneBlock> blocks;
};

// Some of an expert's rows: what one task takes, so that one expert with many rows keeps all threads busy.
struct Piece {
    int expert;            // of the group
    int64_t first, count;  // rows within the expert, padding included
    size_t block, blocks;  // the lane blocks that begin in them
};

struct Group {
    std::vector<ExpertRows> experts;
    std::vector<Piece> pieces;
    int64_t lanes = 0, rows = 0, contracted = 0;
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
        ExpertRows rows{e, start, count, group.rows, 0, group.contracted, {}};
        rows.padded = (count + 2 * kPairBlock - 1) / (2 * kPairBlock) * (2 * kPairBlock);
        group.contracted += kHasTiles ? contracted_pairs(rows.padded) : rows.padded / 2;
        for (int64_t first = 0; first < count;) {
            const int64_t left = (count - first + 15) / 16;  // in 16 lanes
            const int width = left == 1 ? 16 : left == 3 && !kHasTiles ? 48 : 32;
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

// A lane block's results of the down product, lane after lane, `count` columns from `first` on: to the tokens, or where
// they wait for the other routes.
inline void finish_down(const MoeTraining& m, const ExpertRows& rows, const LaneBlock& block, int64_t first, int count,
                        const float* turned, int ld, const float* row_weights, float* sums) {
    const int64_t h = m.hidden;
    const bf16* bias = m.down_bias ? m.down_bias + rows.expert * h + first : nullptr;
    for (int lane = 0; lane < block.valid; ++lane) {
        const int64_t row = rows.start + block.first + lane;
        const Vf weight = set1(m.combines() ? row_weights[row] : 1.0f);
        // With one route a row is its token's result; with more, rows wait for their sum.
        bf16* out = m.routes > 1 ? nullptr : m.out + (m.combines() ? m.token_ids[row] : row) * h + first;
        for (int c = 0; c < count; c += W) {
            Vf value = load(turned + lane * ld + c);
            if (bias) value = add(value, load_bf16(bias + c));
            if (m.combines()) value = mul(value, weight);
            if (out)
                store_bf16(out + c, value);
            else
                store(sums + row * h + first + c, value);
        }
    }
}

// Call task(i, follows, goes_on) for i in [0, count) as team.tasks does, but some neighbours on one thread, one after
// the other: they read ahead for each other. `follows`: i - 1 came before it on this thread; `goes_on`: i + 1 comes
// next.
template <typename Task>
inline void neighbouring_tasks(Team& team, long count, Task&& task) {
    const Slices slices{int(count), team.size(), kHasTiles ? 8 : 4};
    team.tasks(slices.count(), [&](long slice) {
        const int begin = slices.begin(int(slice)), end = slices.begin(int(slice) + 1);
        for (int i = begin; i < end; ++i) task(long(i), i > begin, i + 1 < end);
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

// Parts of a routing weight's gradient: with tiles one for every panel of F, without for every chunk.
inline int64_t parts_of_weights(int64_t inner) { return chunks(inner, kHasTiles ? kPanel : kChunk); }

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
    uint32_t* contracted_grad_pre = nullptr;   // without tiles: per expert and chunk of F or of each half of 2F
    uint32_t* hidden_paired = nullptr;         // without tiles: per expert panels (F / 32, rows / 2, 32)
    float* partial_weights = nullptr;          // (parts_of_weights, N): parts of the routing weights' gradient
};

}  // namespace moesaic
