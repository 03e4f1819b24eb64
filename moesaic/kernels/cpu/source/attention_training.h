// Causal attention of training, forward and backward, without a matrix of scores in memory.
//
// Everything is transposed: rows are keys and columns are queries, 32 to a block. A vector then holds 16 queries of one
// key, so that the softmax needs no sum across lanes, the probabilities of two keys interleave into the packed operand
// of the next product as they are computed, and no product needs one of its operands transposed in between:
//   forward     S' = K Q'        O' = V' P'
//   backward    S' = K Q'        dP' = V dO'       dV = P' dO       dK = dS' Q        dQ' = K' dS'
// Here ' is transposition. The exponent is of base 2, with the factor folded into the scale of the scores.
//
// A pair is one sequence and one of its KV heads. Where pairs keep all threads busy, a thread does whole pairs, with
// the operands of one pair in its second-level cache. Else threads share a pair: forward by blocks of queries, backward
// by blocks of keys, whose sums into dQ wait for one another and so are added in the order of the keys. Both ways give
// the same bits.
#pragma once

#include <algorithm>
#include <initializer_list>
#include <vector>

#include "gemm_bf16.h"
#include "parallel.h"
#include "transpose.h"

namespace moesaic {

constexpr int kBlock = kPanel;       // queries or keys of a block
constexpr int kForwardQueries = 4;   // blocks of queries that go through the keys together
constexpr int kForwardKeys = 4;      // blocks of keys of one step of the running softmax
constexpr int kBackwardKeys = 4;     // blocks of keys whose gradients are summed together
constexpr int kBackwardQueries = 8;  // blocks of queries of one step
constexpr int kRowPadding = 32;      // keeps rows of equal length out of one set of the first-level cache
constexpr size_t kAlignment = 64;

// (B, S, heads, D) with strides in elements; the last dimension is contiguous.
struct Heads {
    const bf16* data;
    int64_t batch, row, head;
};

struct AttentionShape {
    int batch, length, heads, kv_heads, dim;
    double factor;  // on the scores, 1 / sqrt(dim) for most
    int window;     // the positions that a query sees, its own the last of them

    int group() const { return heads / kv_heads; }
    int blocks() const { return (length + kBlock - 1) / kBlock; }
    int64_t block_pairs() const { return int64_t(blocks()) * (blocks() + 1) / 2; }  // of queries and keys before them
    int padded_length() const { return blocks() * kBlock; }
    int padded_dim() const { return round_up(dim, kPanel); }
    // Numbers from one row of a transposed matrix (padded dim, padded length) to the next.
    size_t transposed_row() const {
        return kExpandsRows ? spread_rows(size_t(padded_length()) * sizeof(RowNumber)) / sizeof(RowNumber)
                            : size_t(padded_length() + kRowPadding);
    }
    size_t block_elements() const { return size_t(padded_length()) * padded_dim(); }
    long pairs() const { return long(batch) * kv_heads; }
    // Where a block's largest scores are in (B, A, 2, S); `length` further on are its log-sums.
    size_t first_normalizer(int64_t batch_index, int head, int block) const {
        return (size_t(batch_index) * heads + head) * 2 * length + size_t(block) * kBlock;
    }
    float scale() const { return float(factor); }
    float scale_log2() const { return float(1.44269504088896341 * factor); }
};

// Consecutive pieces of one buffer; with base null it only counts.
class Pieces {
  public:
    explicit Pieces(void* base) : base_(static_cast<char*>(base)) {}

    template <typename T>
    T* take(size_t count) {
        T* piece = base_ ? reinterpret_cast<T*>(base_ + bytes_) : nullptr;
        bytes_ += (count * sizeof(T) + kAlignment - 1) / kAlignment * kAlignment;
        return piece;
    }
    size_t bytes() const { return bytes_; }

  private:
    char* base_;
    size_t bytes_ = 0;
};

// Which keys the queries of one sequence may see, besides causality: equal ranks, where there are documents.
struct Documents {
    const float* rank = nullptr;  // (padded length)
    const float* low = nullptr;   // (blocks) the least and the greatest rank of a block
    const float* high = nullptr;
};

struct Visibility {
    Documents documents;
    int length, window;

    // False only where no query of the block sees a key of the other.
    bool may_see(int query_block, int key_block) const {
        if (key_block > query_block || (query_block - key_block - 1) * kBlock + 1 >= window) return false;
        return !documents.rank || (documents.low[key_block] <= documents.high[query_block] &&
                                   documents.low[query_block] <= documents.high[key_block]);
    }
    // True only where every query of the block exists and sees every key of the other.
    bool sees_all(int query_block, int key_block) const {
        if (key_block >= query_block || (query_block + 1) * kBlock > length) return false;
        if ((query_block - key_block + 1) * kBlock > window) return false;
        return !documents.rank || (documents.low[key_block] == documents.high[key_block] &&
                                   documents.low[key_block] == documents.low[query_block] &&
                                   documents.low[query_block] == documents.high[query_block]);
    }
    // The blocks of keys in [first, last) from the first to the last that may be seen, cut down in place.
    bool narrow(int query_block, int* first, int* last) const {
        while (*first < *last && !may_see(query_block, *first)) ++*first;
        while (*last > *first && !may_see(query_block, *last - 1)) --*last;
        return *first < *last;
    }
};

// What one vector of queries may see.
struct Sight {
    Vf limit;  // keys below it
    Vf first;  // and not below this one
    Vf rank;
    const float* ranks;  // of the keys, null without documents
    bool has_window;

    Sight(const Visibility& visibility, int first_query)
        : rank(zero()), ranks(visibility.documents.rank), has_window(visibility.window < visibility.length) {
        float limits[W];
        for (int i = 0; i < W; ++i) limits[i] = first_query + i < visibility.length ? float(first_query + i + 1) : 0.0f;
        limit = load(limits);
        first = sub(limit, set1(float(visibility.window)));
        if (ranks) rank = load(ranks + first_query);
    }
    // x where the key is seen, else other.
    Vf keep(int key, Vf x, Vf other) const {
        x = select_less(set1(float(key)), limit, x, other);
        if (has_window) x = select_less(set1(float(key)), first, other, x);
        return ranks ? select_less(abs(sub(rank, set1(ranks[key]))), set1(0.5f), x, other) : x;
    }
};

// Ranks of the documents of every sequence: equal where the numbers are, in their order, small enough for fp32.
inline void rank_documents(Team& team, const AttentionShape& shape, const int64_t* numbers, float* ranks, float* low,
                           float* high) {
    team.tasks(shape.batch, [&](long b) {
        const int64_t* row = numbers + b * shape.length;
        float* rank = ranks + size_t(b) * shape.padded_length();
        if (std::is_sorted(row, row + shape.length)) {
            float current = 0.0f;
            for (int s = 0; s < shape.length; ++s) rank[s] = current += s && row[s] != row[s - 1] ? 1.0f : 0.0f;
        } else {
            std::vector<int64_t> sorted(row, row + shape.length);
            std::sort(sorted.begin(), sorted.end());
            for (int s = 0; s < shape.length; ++s)
                rank[s] = float(std::lower_bound(sorted.begin(), sorted.end(), row[s]) - sorted.begin());
        }
        for (int block = 0; block < shape.blocks(); ++block) {
            const int end = std::min(shape.length, (block + 1) * kBlock);
            const auto range = std::minmax_element(rank + block * kBlock, rank + end);
            low[b * shape.blocks() + block] = *range.first;
            high[b * shape.blocks() + block] = *range.second;
        }
        for (int s = shape.length; s < shape.padded_length(); ++s) rank[s] = -1.0f;
    });
}

inline Visibility visibility_of(const AttentionShape& shape, const Documents& all, int batch) {
    Visibility visibility{{}, shape.length, shape.window};
    if (all.rank) {
        const size_t blocks = size_t(batch) * shape.blocks();
        visibility.documents = {all.rank + blocks * kBlock, all.low + blocks, all.high + blocks};
    }
    return visibility;
}

// Rows of one head of one sequence, as to (32, padded dim), zero beyond the sequence and the head.
template <typename T>
inline void copy_block(const AttentionShape& shape, const Heads& from, int batch, int head, int block, T* to) {
    const int padded = shape.padded_dim(), rows = std::min(kBlock, shape.length - block * kBlock);
    const bf16* row = from.data + batch * from.batch + head * from.head + int64_t(block) * kBlock * from.row;
    for (int r = 0; r < kBlock; ++r, row += from.row, to += padded) {
        if (r >= rows) {
            std::memset(to, 0, size_t(padded) * sizeof(T));
            continue;
        }
        for (int d = 0; d < shape.dim; d += 16) {
            if constexpr (std::is_same_v<T, bf16>)
                _mm256_storeu_si256((__m256i*)(to + d), _mm256_loadu_si256((const __m256i*)(row + d)));
            else
                for (int half = 0; half < 16; half += W) store(to + d + half, load_bf16(row + d + half));
        }
        if (padded > shape.dim) std::memset(to + shape.dim, 0, size_t(padded - shape.dim) * sizeof(T));
    }
}

// Rows of the head that this thread will most likely work on next, brought into its cache little by little meanwhile:
// else copying them takes an eighth of the time of short sequences (length 512).
class NextRows {
  public:
    NextRows(const AttentionShape& shape, int64_t steps)
        : shape_(shape), per_step_(int((shape.length + steps - 1) / steps)) {}

    void add(const Heads& heads, long batch, int head) {
        sources_[count_++] = {heads.data + batch * heads.batch + head * heads.head, heads.row};
    }
    void step() {
        if (count_ == 0) return;
        const int end = std::min(shape_.length, next_ + per_step_);
        for (; next_ < end; ++next_)
            for (int i = 0; i < count_; ++i)
                for (int d = 0; d < shape_.dim; d += 32)
                    __builtin_prefetch(sources_[i].data + next_ * sources_[i].row + d, 0, 2);
    }

  private:
    struct Source {
        const bf16* data;
        int64_t row;
    };
    const AttentionShape& shape_;
    const int per_step_;
    int next_ = 0, count_ = 0;
    Source sources_[5];
};

// For a thread that does whole pairs: after this member, the next one of the pair, or the first of another pair.
inline NextRows rows_after(const AttentionShape& shape, long pair, int member, int threads, int64_t steps,
                           std::initializer_list<Heads> of_pairs, std::initializer_list<Heads> of_heads) {
    NextRows rows(shape, std::max<int64_t>(1, steps));
    const int next_member = (member + 1) % shape.group();
    const long next = next_member ? pair : pair + threads;
    if (next >= shape.pairs()) return rows;
    const long batch = next / shape.kv_heads;
    const int kv_head = int(next % shape.kv_heads);
    if (next_member == 0)
        for (const Heads& heads : of_pairs) rows.add(heads, batch, kv_head);
    for (const Heads& heads : of_heads) rows.add(heads, batch, kv_head * shape.group() + next_member);
    return rows;
}

// (32, padded dim) -> panel [padded dim / 2][32]: the operand B whose columns are these rows.
inline void transpose_block_to_panel(const bf16* block, int padded_dim, uint32_t* panel) {
    transpose_dwords(kBlock, padded_dim / 2, reinterpret_cast<const uint32_t*>(block), padded_dim / 2, panel, kPanel);
}

// (32, padded dim) -> 16 rows of each of the panels [padded length / 2][32]: the operand B whose rows are these rows.
inline void interleave_block(const bf16* block, int padded_dim, uint32_t* panels, size_t panel_dwords) {
    for (int p = 0; p < kBlock / 2; ++p)
        for (int d = 0; d < padded_dim; d += kPanel)
            interleave_rows(kPanel, block + 2 * p * padded_dim + d, block + (2 * p + 1) * padded_dim + d,
                            panels + d / kPanel * panel_dwords + p * kPanel);
}

// (32, padded dim) -> 32 columns of (padded dim, row_length): the operand A that is the transposed matrix. work: room for
// as many numbers, and where rows are expanded for as many again.
inline void transpose_block_to_rows(const bf16* block, int padded_dim, RowNumber* to, size_t row_length, uint32_t* work) {
    for (int p = 0; p < kBlock / 2; ++p)
        interleave_rows(padded_dim, block + 2 * p * padded_dim, block + (2 * p + 1) * padded_dim,
                        work + p * padded_dim);
    if constexpr (std::is_same_v<RowNumber, bf16>) {
        transpose_dwords(kBlock / 2, padded_dim, work, padded_dim, reinterpret_cast<uint32_t*>(to), row_length / 2);
    } else {
        uint32_t* turned = work + kBlock / 2 * padded_dim;
        transpose_dwords(kBlock / 2, padded_dim, work, padded_dim, turned, kBlock / 2);
        const bf16* rows = reinterpret_cast<const bf16*>(turned);
        for (int d = 0; d < padded_dim; ++d)
            for (int i = 0; i < kBlock; i += W) store_number(to + d * row_length + i, load_bf16(rows + d * kBlock + i));
    }
}

// C (rows, 32) (+)= A B, where rows are not expanded by 32 of them at a time: 12 + 12 + 8 where 64 rows at once would leave
// 4, which are too few sums in flight to keep the multipliers busy.
inline void product(int rows, int pairs, const RowNumber* a, size_t lda, const uint32_t* b, float* c, size_t ldc,
                    bool accumulate) {
    const int step = kExpandsRows ? rows : kBlock;
    for (int row = 0; row < rows; row += step)
        gemm<kPanel>(step, pairs, a + row * lda, lda, b, kPanel, c + row * ldc, ldc, accumulate);
}

// Sums of a block, transposed (padded dim, 32), times factors of the queries -> rows of (B, S, heads, D).
inline void store_transposed(const AttentionShape& shape, const float* sums, const float* factors, int rows,
                             float* work, bf16* to, size_t row_stride) {
    transpose_dwords(shape.padded_dim(), kBlock, reinterpret_cast<const uint32_t*>(sums), kBlock,
                     reinterpret_cast<uint32_t*>(work), shape.padded_dim());
    for (int r = 0; r < rows; ++r) {
        const Vf factor = set1(factors[r]);
        const float* row = work + size_t(r) * shape.padded_dim();
        for (int d = 0; d < shape.dim; d += W) store_bf16(to + r * row_stride + d, mul(load(row + d), factor));
    }
}

// Whether pairs, each done by one thread, keep at least seven eighths of the threads busy.
inline bool whole_pairs(const AttentionShape& shape, int threads) {
    const long rounds = (shape.pairs() + threads - 1) / threads;
    return 8 * shape.pairs() >= 7 * rounds * threads;
}

// Pairs whose operands are in memory together when threads share pairs: enough tasks for a good balance, no more.
inline int pairs_together(const AttentionShape& shape, int threads, int tasks_per_pair) {
    const long wanted = (8L * threads + tasks_per_pair - 1) / std::max(1, tasks_per_pair);
    return int(std::min(shape.pairs(), wanted));
}

struct ForwardArguments {
    AttentionShape shape;
    Heads query, key, value;
    Documents documents;
    const float* sinks;  // (A), scores that take part in the softmax, as they are, and have no value; or null
    bf16* out;           // (B, S, A, D)
    // (B, A, 2, S): the largest score, and log2 of the sum of 2^((score - largest) * scale_log2), over the keys seen, and
    // of the sink's part. One number, their sum, would lose the second part where the first is large.
    float* normalizers;
};

struct ForwardPair {
    RowNumber* keys;      // (padded length, padded dim)
    RowNumber* values_t;  // (padded dim, transposed_row)

    ForwardPair(Pieces& pieces, const AttentionShape& shape)
        : keys(pieces.take<RowNumber>(shape.block_elements())),
          values_t(pieces.take<RowNumber>(shape.transposed_row() * shape.padded_dim())) {}
};

struct ForwardWork {
    bf16* block;
    uint32_t* dwords;
    uint32_t* queries;        // [kForwardQueries] panels [padded dim / 2][32]
    float* scores;            // (kForwardKeys * 32, 32)
    uint32_t* probabilities;  // [kForwardKeys * 16][32]
    float* sums;              // [kForwardQueries] (padded dim, 32)
    float* maxima;            // [kForwardQueries][32]
    float* totals;
    float* turned;  // (32, padded dim)

    ForwardWork(Pieces& pieces, const AttentionShape& shape)
        : block(pieces.take<bf16>(size_t(kBlock) * shape.padded_dim())),
          dwords(pieces.take<uint32_t>(size_t(kBlock) / (kExpandsRows ? 1 : 2) * shape.padded_dim())),
          queries(pieces.take<uint32_t>(size_t(kForwardQueries) * shape.padded_dim() / 2 * kPanel)),
          scores(pieces.take<float>(size_t(kForwardKeys) * kBlock * kBlock)),
          probabilities(pieces.take<uint32_t>(size_t(kForwardKeys) * kBlock / 2 * kBlock)),
          sums(pieces.take<float>(size_t(kForwardQueries) * shape.padded_dim() * kBlock)),
          maxima(pieces.take<float>(kForwardQueries * kBlock)),
          totals(pieces.take<float>(kForwardQueries * kBlock)),
          turned(pieces.take<float>(size_t(kBlock) * shape.padded_dim())) {}
};

inline void pack_forward(const ForwardArguments& arguments, long pair, int block, const ForwardPair& to,
                         const ForwardWork& work) {
    const AttentionShape& shape = arguments.shape;
    const int batch = int(pair / shape.kv_heads), head = int(pair % shape.kv_heads), padded = shape.padded_dim();
    copy_block(shape, arguments.key, batch, head, block, to.keys + size_t(block) * kBlock * padded);
    copy_block(shape, arguments.value, batch, head, block, work.block);
    transpose_block_to_rows(work.block, padded, to.values_t + block * kBlock, shape.transposed_row(),
                            work.dwords);
}

// One step of the running softmax: scores (rows, 32) become probabilities [rows / 2][32], to be divided by the totals
// at the end.
inline void softmax_step(const Visibility& visibility, int query_block, int first_key_block, int rows, Vf scale,
                         bool is_first, float* scores, uint32_t* probabilities, float* maxima, float* totals,
                         float* sums, int padded_dim) {
    for (int column = 0; column < kBlock; column += W) {
        float* here = scores + column;
        for (int block = 0; block < rows / kBlock; ++block) {
            if (visibility.sees_all(query_block, first_key_block + block)) continue;
            const Sight sight(visibility, query_block * kBlock + column);
            const int first_key = (first_key_block + block) * kBlock;
            for (int r = 0; r < kBlock; ++r) {
                float* score = here + (block * kBlock + r) * kBlock;
                store(score, sight.keep(first_key + r, load(score), set1(-INFINITY)));
            }
        }
        const Vf before = load(maxima + column);
        Vf highest[4] = {before, before, before, before};
        for (int r = 0; r < rows; r += 4)
            for (int i = 0; i < 4; ++i) highest[i] = max(highest[i], load(here + (r + i) * kBlock));
        const Vf after = max(max(highest[0], highest[1]), max(highest[2], highest[3]));
        store(maxima + column, after);
        // First the difference, which is exact near the largest score: half a unit in the last place of after * scale
        // would be whole powers of two where scores are large.
        Vf even_sum = zero(), odd_sum = zero();
        for (int p = 0; p < rows / 2; ++p) {
            const Vf even = exp2_of_negative(mul(sub(load(here + 2 * p * kBlock), after), scale));
            const Vf odd = exp2_of_negative(mul(sub(load(here + (2 * p + 1) * kBlock), after), scale));
            even_sum = add(even_sum, even);
            odd_sum = add(odd_sum, odd);
            storei(probabilities + p * kBlock + column, interleave_bf16(even, odd));
        }
        const Vf total = add(even_sum, odd_sum);
        if (is_first) {
            store(totals + column, total);
            continue;
        }
        const Vf shrink = exp2_of_negative(mul(sub(before, after), scale));
        store(totals + column, fma(load(totals + column), shrink, total));
        for (int d = 0; d < padded_dim; ++d)
            store(sums + d * kBlock + column, mul(load(sums + d * kBlock + column), shrink));
    }
}

// kForwardQueries blocks of queries of one head, from `first`.
inline void forward_queries(const ForwardArguments& arguments, long pair, int member, int first,
                            const ForwardPair& packed, const ForwardWork& work, NextRows& next_rows) {
    const AttentionShape& shape = arguments.shape;
    const int batch = int(pair / shape.kv_heads), head = int(pair % shape.kv_heads) * shape.group() + member;
    const int padded = shape.padded_dim(), last = std::min(first + kForwardQueries, shape.blocks());
    const size_t panel = size_t(padded) / 2 * kPanel, block_sums = size_t(padded) * kBlock;
    const Visibility visibility = visibility_of(shape, arguments.documents, batch);
    const Vf scale = set1(shape.scale_log2());
    bool has_sums[kForwardQueries] = {};
    for (int block = first; block < last; ++block) {
        copy_block(shape, arguments.query, batch, head, block, work.block);
        transpose_block_to_panel(work.block, padded, work.queries + (block - first) * panel);
        for (int i = 0; i < kBlock; ++i) work.maxima[(block - first) * kBlock + i] = -3.4e38f;
    }
    for (int keys = 0; keys < last; keys += kForwardKeys) {
        for (int block = first; block < last; ++block) {
            int from = keys, to = keys + kForwardKeys;
            if (!visibility.narrow(block, &from, &to)) continue;
            const int i = block - first, rows = (to - from) * kBlock;
            next_rows.step();
            product(rows, padded / 2, packed.keys + size_t(from) * kBlock * padded, padded, work.queries + i * panel,
                    work.scores, kBlock, false);
            softmax_step(visibility, block, from, rows, scale, !has_sums[i], work.scores, work.probabilities,
                         work.maxima + i * kBlock, work.totals + i * kBlock, work.sums + i * block_sums, padded);
            product(padded, rows / 2, packed.values_t + from * kBlock, shape.transposed_row(),
                    work.probabilities, work.sums + i * block_sums, kBlock, has_sums[i]);
            has_sums[i] = true;
        }
    }
    const size_t row_stride = size_t(shape.heads) * shape.dim;
    for (int block = first; block < last; ++block) {
        const int i = block - first, rows = std::min(kBlock, shape.length - block * kBlock);
        float* largest = arguments.normalizers + shape.first_normalizer(batch, head, block);
        float* log_sums = largest + shape.length;
        float factors[kBlock];
        for (int r = 0; r < rows; ++r) {
            float total = work.totals[i * kBlock + r];
            largest[r] = work.maxima[i * kBlock + r];
            if (arguments.sinks) total += sink_weight(arguments.sinks[head], shape.scale_log2(), largest[r]);
            factors[r] = 1.0f / total;
            log_sums[r] = std::log2(total);
        }
        bf16* out = arguments.out + (size_t(batch) * shape.length + block * kBlock) * row_stride + head * shape.dim;
        store_transposed(shape, work.sums + i * block_sums, factors, rows, work.turned, out, row_stride);
    }
}

inline int forward_pairs_together(const AttentionShape& shape, int threads) {
    const int steps = (shape.blocks() + kForwardQueries - 1) / kForwardQueries;
    return pairs_together(shape, threads, steps * shape.group());
}

inline size_t forward_shared_bytes(const AttentionShape& shape, int threads) {
    if (whole_pairs(shape, threads)) return 0;
    Pieces pieces(nullptr);
    for (int i = forward_pairs_together(shape, threads); i > 0; --i) ForwardPair(pieces, shape);
    return pieces.bytes();
}

// shared: forward_shared_bytes(shape, team.size()) bytes.
inline void attention_forward(Team& team, const ForwardArguments& arguments, void* shared) {
    const AttentionShape& shape = arguments.shape;
    const int steps = (shape.blocks() + kForwardQueries - 1) / kForwardQueries, group = shape.group();
    const bool is_whole = whole_pairs(shape, team.size());
    thread_local Scratch scratch;
    Pieces count(nullptr);
    ForwardWork(count, shape);
    if (is_whole) ForwardPair(count, shape);
    Pieces pieces(scratch.get<char>(count.bytes()));
    const ForwardWork work(pieces, shape);
    if (is_whole) {
        const ForwardPair packed(pieces, shape);
        team.tasks(shape.pairs(), [&](long pair) {
            for (int block = 0; block < shape.blocks(); ++block) pack_forward(arguments, pair, block, packed, work);
            for (int member = 0; member < group; ++member) {
                const int64_t key_steps = shape.block_pairs() / kForwardKeys;
                NextRows next_rows = rows_after(shape, pair, member, team.size(), key_steps,
                                                {arguments.key, arguments.value}, {arguments.query});
                for (int step = 0; step < steps; ++step)
                    forward_queries(arguments, pair, member, step * kForwardQueries, packed, work, next_rows);
            }
        });
        return;
    }
    const int together = forward_pairs_together(shape, team.size());
    Pieces shared_pieces(shared);
    std::vector<ForwardPair> packed;
    for (int i = 0; i < together; ++i) packed.emplace_back(shared_pieces, shape);
    for (long base = 0; base < shape.pairs(); base += together) {
        const int here = int(std::min<long>(together, shape.pairs() - base));
        team.tasks(long(here) * shape.blocks(), [&](long i) {
            pack_forward(arguments, base + i / shape.blocks(), int(i % shape.blocks()), packed[i / shape.blocks()],
                         work);
        });
        // The last queries see the most keys: they go first, so that the end is short.
        team.tasks(long(steps) * here * group, [&](long i) {
            const int step = steps - 1 - int(i / (here * group)), which = int(i % (here * group));
            NextRows none(shape, 1);
            forward_queries(arguments, base + which / group, which % group, step * kForwardQueries,
                            packed[which / group], work, none);
        });
    }
}

struct BackwardArguments {
    AttentionShape shape;
    Heads query, key, value, out, grad;
    Documents documents;
    const float* normalizers;  // (B, A, 2, S), the forward pass's
    const float* sinks;        // (A) or null
    bf16* grad_query;          // (B, S, A, D)
    bf16* grad_key;            // (B, S, KV, D)
    bf16* grad_value;
    float* grad_sinks;  // (B, A, blocks), to be summed over the first and the last; null without sinks
};

struct BackwardPair {
    RowNumber* keys;  // (padded length, padded dim)
    RowNumber* values;
    RowNumber* keys_t;  // (padded dim, transposed_row)
    float* grad_keys;  // (padded length, padded dim)
    float* grad_values;

    BackwardPair(Pieces& pieces, const AttentionShape& shape)
        : keys(pieces.take<RowNumber>(shape.block_elements())),
          values(pieces.take<RowNumber>(shape.block_elements())),
          keys_t(pieces.take<RowNumber>(shape.transposed_row() * shape.padded_dim())),
          grad_keys(pieces.take<float>(shape.block_elements())),
          grad_values(pieces.take<float>(shape.block_elements())) {}
};

struct BackwardHead {
    uint32_t* query_panels;  // [blocks][padded dim / 2][32]
    uint32_t* grad_panels;
    uint32_t* query_rows;  // [padded dim / 32][padded length / 2][32]
    uint32_t* grad_rows;
    float* maxima;  // (padded length)
    float* log_sums;
    float* deltas;
    float* grad_query;  // [blocks] (padded dim, 32)

    BackwardHead(Pieces& pieces, const AttentionShape& shape)
        : query_panels(pieces.take<uint32_t>(shape.block_elements() / 2)),
          grad_panels(pieces.take<uint32_t>(shape.block_elements() / 2)),
          query_rows(pieces.take<uint32_t>(shape.block_elements() / 2)),
          grad_rows(pieces.take<uint32_t>(shape.block_elements() / 2)),
          maxima(pieces.take<float>(shape.padded_length())),
          log_sums(pieces.take<float>(shape.padded_length())),
          deltas(pieces.take<float>(shape.padded_length())),
          grad_query(pieces.take<float>(shape.block_elements())) {}
};

constexpr int kProbabilityRow = kBackwardQueries * kBlock + kRowPadding;

struct BackwardWork {
    bf16* block;
    uint32_t* dwords;
    float* scores;        // (32, 32)
    float* grads;         // (32, 32)
    RowNumber* probabilities;  // (kBackwardKeys * 32, kProbabilityRow)
    RowNumber* grad_scores;
    uint32_t* grad_score_panels;  // [kBackwardQueries][kBackwardKeys * 16][32]
    float* turned;                // (32, padded dim)

    BackwardWork(Pieces& pieces, const AttentionShape& shape)
        : block(pieces.take<bf16>(size_t(kBlock) * shape.padded_dim())),
          dwords(pieces.take<uint32_t>(size_t(kBlock) / (kExpandsRows ? 1 : 2) * shape.padded_dim())),
          scores(pieces.take<float>(kBlock * kBlock)),
          grads(pieces.take<float>(kBlock * kBlock)),
          probabilities(pieces.take<RowNumber>(size_t(kBackwardKeys) * kBlock * kProbabilityRow)),
          grad_scores(pieces.take<RowNumber>(size_t(kBackwardKeys) * kBlock * kProbabilityRow)),
          grad_score_panels(pieces.take<uint32_t>(size_t(kBackwardQueries) * kBackwardKeys * kBlock / 2 * kBlock)),
          turned(pieces.take<float>(size_t(kBlock) * shape.padded_dim())) {}
};

inline void pack_backward_pair(const BackwardArguments& arguments, long pair, int block, const BackwardPair& to,
                               const BackwardWork& work) {
    const AttentionShape& shape = arguments.shape;
    const int batch = int(pair / shape.kv_heads), head = int(pair % shape.kv_heads), padded = shape.padded_dim();
    const size_t first = size_t(block) * kBlock * padded;
    copy_block(shape, arguments.key, batch, head, block, to.keys + first);
    copy_block(shape, arguments.value, batch, head, block, to.values + first);
    const bf16* keys = reinterpret_cast<const bf16*>(to.keys + first);
    if constexpr (kExpandsRows) {
        copy_block(shape, arguments.key, batch, head, block, work.block);
        keys = work.block;
    }
    transpose_block_to_rows(keys, padded, to.keys_t + block * kBlock, shape.transposed_row(), work.dwords);
    std::memset(to.grad_keys + first, 0, size_t(kBlock) * padded * sizeof(float));
    std::memset(to.grad_values + first, 0, size_t(kBlock) * padded * sizeof(float));
}

inline void pack_backward_head(const BackwardArguments& arguments, long pair, int member, int block,
                               const BackwardHead& to, const BackwardWork& work) {
    const AttentionShape& shape = arguments.shape;
    const int batch = int(pair / shape.kv_heads), head = int(pair % shape.kv_heads) * shape.group() + member;
    const int padded = shape.padded_dim(), rows = std::min(kBlock, shape.length - block * kBlock);
    const size_t panel = size_t(padded) / 2 * kPanel, row_panel = size_t(shape.padded_length()) / 2 * kPanel;
    const size_t first_row = size_t(block) * kBlock / 2 * kPanel;
    copy_block(shape, arguments.query, batch, head, block, work.block);
    transpose_block_to_panel(work.block, padded, to.query_panels + block * panel);
    interleave_block(work.block, padded, to.query_rows + first_row, row_panel);
    copy_block(shape, arguments.grad, batch, head, block, work.block);
    transpose_block_to_panel(work.block, padded, to.grad_panels + block * panel);
    interleave_block(work.block, padded, to.grad_rows + first_row, row_panel);
    const bf16* out = arguments.out.data + batch * arguments.out.batch + head * arguments.out.head +
                      int64_t(block) * kBlock * arguments.out.row;
    const float* largest = arguments.normalizers + shape.first_normalizer(batch, head, block);
    const float* log_sums = largest + shape.length;
    for (int r = 0; r < kBlock; ++r) {
        Vf delta = zero();
        if (r < rows)
            for (int d = 0; d < shape.dim; d += W)
                delta = fma(load_bf16(out + r * arguments.out.row + d), load_bf16(work.block + r * padded + d), delta);
        to.deltas[block * kBlock + r] = sum(delta);
        to.maxima[block * kBlock + r] = r < rows ? largest[r] : 0.0f;
        to.log_sums[block * kBlock + r] = r < rows ? log_sums[r] : 0.0f;
    }
    if (arguments.sinks) {
        float grad_sink = 0.0f;
        for (int r = 0; r < rows; ++r)
            grad_sink -= to.deltas[block * kBlock + r] * std::exp2(-log_sums[r]) *
                         sink_weight(arguments.sinks[head], shape.scale_log2(), largest[r]);
        arguments.grad_sinks[(size_t(batch) * shape.heads + head) * shape.blocks() + block] = grad_sink;
    }
    std::memset(to.grad_query + size_t(block) * padded * kBlock, 0, size_t(kBlock) * padded * sizeof(float));
}

// Probabilities and the gradients of scores of 32 keys and 32 queries, both as rows of keys, the gradients also in
// pairs of keys.
template <bool kMasked>
inline void backward_block(const Visibility& visibility, int query_block, int key_block, Vf scale,
                           const BackwardHead& head, const float* scores, const float* grads,
                           RowNumber* probabilities, RowNumber* grad_scores, uint32_t* grad_score_panel) {
    for (int column = 0; column < kBlock; column += W) {
        const int query = query_block * kBlock + column;
        const Sight sight(visibility, query);
        const Vf largest = load(head.maxima + query), delta = load(head.deltas + query);
        const Vf offset = sub(zero(), load(head.log_sums + query));
        for (int p = 0; p < kBlock / 2; ++p) {
            Vf grad[2];
            for (int half = 0; half < 2; ++half) {
                const int r = 2 * p + half, key = key_block * kBlock + r;
                const Vf score = load(scores + r * kBlock + column);
                Vf probability = exp2_of_negative(fma(sub(score, largest), scale, offset));
                grad[half] = mul(probability, sub(load(grads + r * kBlock + column), delta));
                if constexpr (kMasked) {
                    probability = sight.keep(key, probability, zero());
                    grad[half] = sight.keep(key, grad[half], zero());
                }
                store_number(probabilities + r * kProbabilityRow + column, probability);
                store_number(grad_scores + r * kProbabilityRow + column, grad[half]);
            }
            storei(grad_score_panel + p * kBlock + column, interleave_bf16(grad[0], grad[1]));
        }
    }
}

// kBackwardKeys blocks of keys from `first` against kBackwardQueries blocks of queries from `queries`, of one head:
// adds to the gradients of these keys and values at once, and to those of the queries after in_turn().
template <typename InTurn>
inline void backward_step(const BackwardArguments& arguments, const Visibility& visibility, int first, int queries,
                          const BackwardPair& pair, const BackwardHead& head, const BackwardWork& work,
                          NextRows& next_rows, InTurn&& in_turn) {
    const AttentionShape& shape = arguments.shape;
    const int padded = shape.padded_dim(), last = std::min(first + kBackwardKeys, shape.blocks());
    const int end = std::min(queries + kBackwardQueries, shape.blocks());
    const size_t panel = size_t(padded) / 2 * kPanel, row_panel = size_t(shape.padded_length()) / 2 * kPanel;
    const size_t score_panel = size_t(kBackwardKeys) * kBlock / 2 * kBlock;
    const Vf scale = set1(shape.scale_log2());
    int from[kBackwardQueries], to[kBackwardQueries];
    for (int block = queries; block < end; ++block) {
        const int q = block - queries;
        from[q] = first, to[q] = last;
        visibility.narrow(block, &from[q], &to[q]);
        for (int key_block = from[q]; key_block < to[q]; ++key_block) {
            next_rows.step();
            const size_t rows = size_t(key_block) * kBlock * padded;
            const int k = key_block - first;
            product(kBlock, padded / 2, pair.keys + rows, padded, head.query_panels + block * panel, work.scores,
                    kBlock, false);
            product(kBlock, padded / 2, pair.values + rows, padded, head.grad_panels + block * panel, work.grads,
                    kBlock, false);
            const size_t place = size_t(k) * kBlock * kProbabilityRow + q * kBlock;
            uint32_t* grad_score_panel = work.grad_score_panels + q * score_panel + k * (kBlock / 2) * kBlock;
            if (visibility.sees_all(block, key_block))
                backward_block<false>(visibility, block, key_block, scale, head, work.scores, work.grads,
                                      work.probabilities + place, work.grad_scores + place, grad_score_panel);
            else
                backward_block<true>(visibility, block, key_block, scale, head, work.scores, work.grads,
                                     work.probabilities + place, work.grad_scores + place, grad_score_panel);
        }
    }
    // Every run of blocks of queries that these keys take part in is one product.
    for (int key_block = first; key_block < last; ++key_block) {
        const auto takes_part = [&](int q) { return from[q] <= key_block && key_block < to[q]; };
        for (int q = 0; q < end - queries;) {
            if (!takes_part(q)) {
                ++q;
                continue;
            }
            const int run = q;
            while (q < end - queries && takes_part(q)) ++q;
            const size_t place = size_t(key_block - first) * kBlock * kProbabilityRow + run * kBlock;
            const size_t row = size_t(queries + run) * kBlock / 2 * kPanel, pairs = size_t(q - run) * kBlock / 2;
            for (int d = 0; d < padded; d += kPanel) {
                const size_t sums = size_t(key_block) * kBlock * padded + d, rows = d / kPanel * row_panel + row;
                product(kBlock, int(pairs), work.probabilities + place, kProbabilityRow, head.grad_rows + rows,
                        pair.grad_values + sums, padded, true);
                product(kBlock, int(pairs), work.grad_scores + place, kProbabilityRow, head.query_rows + rows,
                        pair.grad_keys + sums, padded, true);
            }
        }
    }
    in_turn();
    for (int block = queries; block < end; ++block) {
        const int q = block - queries, pairs = (to[q] - from[q]) * kBlock / 2;
        if (pairs > 0)
            product(padded, pairs, pair.keys_t + from[q] * kBlock, shape.transposed_row(),
                    work.grad_score_panels + q * score_panel + (from[q] - first) * (kBlock / 2) * kBlock,
                    head.grad_query + size_t(block) * padded * kBlock, kBlock, true);
    }
}

inline void finish_backward_pair(const BackwardArguments& arguments, long pair, int block, const BackwardPair& from) {
    const AttentionShape& shape = arguments.shape;
    const int batch = int(pair / shape.kv_heads), head = int(pair % shape.kv_heads), padded = shape.padded_dim();
    const Vf scale = set1(shape.scale());
    for (int s = block * kBlock; s < std::min(shape.length, (block + 1) * kBlock); ++s) {
        const size_t to = ((size_t(batch) * shape.length + s) * shape.kv_heads + head) * shape.dim;
        const float* grad_key = from.grad_keys + size_t(s) * padded;
        const float* grad_value = from.grad_values + size_t(s) * padded;
        for (int d = 0; d < shape.dim; d += W) {
            store_bf16(arguments.grad_key + to + d, mul(load(grad_key + d), scale));
            store_bf16(arguments.grad_value + to + d, load(grad_value + d));
        }
    }
}

inline void finish_backward_head(const BackwardArguments& arguments, long pair, int member, int block,
                                 const BackwardHead& from, const BackwardWork& work) {
    const AttentionShape& shape = arguments.shape;
    const int batch = int(pair / shape.kv_heads), head = int(pair % shape.kv_heads) * shape.group() + member;
    const size_t row_stride = size_t(shape.heads) * shape.dim;
    float factors[kBlock];
    std::fill_n(factors, kBlock, shape.scale());
    store_transposed(shape, from.grad_query + size_t(block) * shape.padded_dim() * kBlock, factors,
                     std::min(kBlock, shape.length - block * kBlock), work.turned,
                     arguments.grad_query + (size_t(batch) * shape.length + block * kBlock) * row_stride +
                         head * shape.dim,
                     row_stride);
}

inline int backward_key_steps(const AttentionShape& shape) {
    return (shape.blocks() + kBackwardKeys - 1) / kBackwardKeys;
}
inline int backward_query_steps(const AttentionShape& shape) {
    return (shape.blocks() + kBackwardQueries - 1) / kBackwardQueries;
}

// Operands of the pairs that threads work on together, and how far each of their blocks of keys has come.
struct BackwardShared {
    std::vector<BackwardPair> pairs;
    std::vector<BackwardHead> heads;
    std::atomic<long>* progress;  // [pairs][key steps]

    BackwardShared(Pieces& pieces, const AttentionShape& shape, int threads) {
        const int together = pairs_together(shape, threads, backward_key_steps(shape));
        for (int i = 0; i < together; ++i) pairs.emplace_back(pieces, shape);
        for (int i = 0; i < together * shape.group(); ++i) heads.emplace_back(pieces, shape);
        progress = pieces.take<std::atomic<long>>(size_t(together) * backward_key_steps(shape));
    }
};

inline size_t backward_shared_bytes(const AttentionShape& shape, int threads) {
    if (whole_pairs(shape, threads)) return 0;
    Pieces pieces(nullptr);
    BackwardShared(pieces, shape, threads);
    return pieces.bytes();
}

// shared: backward_shared_bytes(shape, team.size()) bytes.
inline void attention_backward(Team& team, const BackwardArguments& arguments, void* shared) {
    const AttentionShape& shape = arguments.shape;
    const int blocks = shape.blocks(), group = shape.group();
    const int key_steps = backward_key_steps(shape), query_steps = backward_query_steps(shape);
    const bool is_whole = whole_pairs(shape, team.size());
    thread_local Scratch scratch;
    Pieces count(nullptr);
    BackwardWork(count, shape);
    if (is_whole) {
        BackwardPair(count, shape);
        BackwardHead(count, shape);
    }
    Pieces pieces(scratch.get<char>(count.bytes()));
    const BackwardWork work(pieces, shape);
    if (is_whole) {
        const BackwardPair packed(pieces, shape);
        const BackwardHead head(pieces, shape);
        team.tasks(shape.pairs(), [&](long pair) {
            const Visibility visibility = visibility_of(shape, arguments.documents, int(pair / shape.kv_heads));
            for (int block = 0; block < blocks; ++block) pack_backward_pair(arguments, pair, block, packed, work);
            for (int member = 0; member < group; ++member) {
                for (int block = 0; block < blocks; ++block)
                    pack_backward_head(arguments, pair, member, block, head, work);
                NextRows next_rows =
                    rows_after(shape, pair, member, team.size(), shape.block_pairs(),
                               {arguments.key, arguments.value}, {arguments.query, arguments.out, arguments.grad});
                for (int step = 0; step < key_steps; ++step)
                    for (int queries = query_steps - 1; queries >= step * kBackwardKeys / kBackwardQueries; --queries)
                        backward_step(arguments, visibility, step * kBackwardKeys, queries * kBackwardQueries, packed,
                                      head, work, next_rows, [] {});
                for (int block = 0; block < blocks; ++block)
                    finish_backward_head(arguments, pair, member, block, head, work);
            }
            for (int block = 0; block < blocks; ++block) finish_backward_pair(arguments, pair, block, packed);
        });
        return;
    }
    Pieces shared_pieces(shared);
    const BackwardShared together(shared_pieces, shape, team.size());
    const int limit = int(together.pairs.size());
    for (long base = 0; base < shape.pairs(); base += limit) {
        const int here = int(std::min<long>(limit, shape.pairs() - base));
        team.tasks(long(here) * blocks, [&](long i) {
            const int slot = int(i / blocks), block = int(i % blocks);
            pack_backward_pair(arguments, base + slot, block, together.pairs[slot], work);
            for (int member = 0; member < group; ++member)
                pack_backward_head(arguments, base + slot, member, block, together.heads[slot * group + member], work);
            for (int step = block; step < key_steps; step += blocks)
                new (&together.progress[slot * key_steps + step]) std::atomic<long>(0);
        });
        // Tasks are taken in this order, so the one that a task waits for has been taken before it.
        team.tasks(long(key_steps) * here, [&](long i) {
            const int step = int(i / here), slot = int(i % here);
            NextRows none(shape, 1);
            std::atomic<long>* progress = &together.progress[slot * key_steps + step];
            const Visibility visibility =
                visibility_of(shape, arguments.documents, int((base + slot) / shape.kv_heads));
            for (int member = 0; member < group; ++member)
                for (int queries = query_steps - 1; queries >= step * kBackwardKeys / kBackwardQueries; --queries) {
                    const long turn = long(member) * query_steps + query_steps - 1 - queries;
                    backward_step(arguments, visibility, step * kBackwardKeys, queries * kBackwardQueries,
                                  together.pairs[slot], together.heads[slot * group + member], work, none, [&] {
                                      if (step > 0) team.wait_for(progress[-1], turn + 1);
                                  });
                    progress->store(turn + 1, std::memory_order_release);
                }
        });
        team.tasks(long(here) * blocks, [&](long i) {
            const int slot = int(i / blocks), block = int(i % blocks);
            finish_backward_pair(arguments, base + slot, block, together.pairs[slot]);
            for (int member = 0; member < group; ++member)
                finish_backward_head(arguments, base + slot, member, block, together.heads[slot * group + member],
                                     work);
        });
    }
}

}  // namespace moesaic
