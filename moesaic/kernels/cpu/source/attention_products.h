// Products of attention over blocks: of rows that stand for queries, or for probabilities, with panels of keys and values.
//
// Rows are RowNumbers: bf16, or the same numbers in fp32 where products would have to widen them. Many rows go over the
// panels of one head by as many as registers hold; few go over those of several heads in turn, each of which is read once
// and, if it is of int8, expanded in registers. Both add what a sum has in the same order, so that a row gives the same among
// few and among many.
#pragma once

#include "attention_blocks.h"

namespace moesaic {

// Floats from one row of scores to the next. Where they become expanded probabilities, which stay in their place, they are
// as far apart as rows that multiply a panel together.
constexpr size_t kScoreRow = kExpandsRows ? spread_rows(kSplit * sizeof(float)) / sizeof(float) : size_t(kSplit);

// `dim` numbers of a row, and zeros up to `width`.
inline void copy_numbers(int dim, int width, const bf16* from, bf16* to) {
    int i = 0;
    for (; i + 2 * W <= dim; i += 2 * W) storei(to + i, loadi(from + i));
    for (; i < width; ++i) to[i] = i < dim ? from[i] : bf16(0);
}
inline void store_probabilities(bf16* to, Vf first, Vf second) { storei(to, to_bf16_rows(first, second)); }
#if defined(MOESAIC_EXPANDS_ROWS)
inline void copy_numbers(int dim, int width, const bf16* from, float* to) {
    int i = 0;
    for (; i + W <= dim; i += W) store(to + i, load_bf16(from + i));
    for (; i < width; ++i) to[i] = i < dim ? bf16_to_float(from[i]) : 0.0f;
}
// Rounded to bf16, as RowNumbers are: numbers from 0 on, or the NaN of a scale, by five operations instead of eight.
inline void store_probabilities(float* to, Vf first, Vf second) {
    const auto rounded = [](Vf x) {
        const Vi odd = andi(shift_right_signed<16>(as_int(x)), set1i(1));
        return high_bf16(addi(as_int(x), addi(odd, set1i(0x7fff))));
    };
    store(to, rounded(first)), store(to + W, rounded(second));
}

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
            const char* dword = reinterpret_cast<const char*>(panels[i] + offset + column);
            const char* next = ahead ? reinterpret_cast<const char*>(ahead[i] + offset + column) : nullptr;
            for (int p = 0; p < pairs; ++p, dword += kPanel * 4) {
                if (next)
                    for (int line = 0; line < V * W * 4; line += 64) fetch(next + p * kPanel * 4 + line);
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

// scores[rows][kScoreRow], the first 32 * keys.count of each row: queries[rows][width] times keys.
inline void multiply_keys(int rows, int width, const LeftRows& queries, const HeadPanels& keys, float* scores) {
#if defined(MOESAIC_EXPANDS_ROWS)
    for (int p = 0; p < keys.count; ++p)
        multiply_all_pieces(rows, 1, width / 2, queries, keys.at + p, keys.at + p + HeadPanels::kAhead, 0,
                            scores + p * kPanel, kScoreRow);
#elif !defined(MOESAIC_TILES)
    for (int p = 0; p < keys.count; p += 2) {
        const uint32_t* const* here = keys.at + p;
        float* c = scores + p * kPanel;
        if (p + 1 < keys.count)
            multiply_panels<4>(rows, 1, width / 2, queries.rows, queries.ld, here, here + 1, here + 4, here + 5, c,
                               kScoreRow);
        else
            multiply_panels<2>(rows, 1, width / 2, queries.rows, queries.ld, here, here, here + 4, here + 4, c, kScoreRow);
    }
#else
    for (int p = 0; p < keys.count; ++p)
        gemm_panel(rows, width / 2, queries.rows, queries.ld, keys.at[p], kPanel, scores + p * kPanel, kScoreRow, false);
#endif
}

#if !defined(MOESAIC_TILES)

// sums[rows][width] = probabilities[rows][32 * values.count] times values.
inline void multiply_values(int rows, int width, const LeftRows& probabilities, const HeadPanels& values, float* sums) {
#if defined(MOESAIC_EXPANDS_ROWS)
    for (int chunk = 0; chunk < width; chunk += kPanel)
        multiply_all_pieces(rows, values.count, kPanelPairs, probabilities, values.at, values.at + 2, chunk * kPanelPairs,
                            sums + chunk, size_t(width));
#else
    constexpr int kChunk = kPanel * kPanelPairs;
    const uint32_t *left[kSplitPanels + HeadPanels::kAhead], *right[kSplitPanels + HeadPanels::kAhead];
    for (int chunk = 0; chunk < width; chunk += 2 * kPanel) {
        const int offset = chunk * kPanelPairs;
        for (int i = 0; i < values.count + HeadPanels::kAhead; ++i) {
            left[i] = values.at[i] + offset;
            right[i] = values.at[i] + offset + kChunk;
        }
        if (chunk + kPanel < width)
            multiply_panels<4>(rows, values.count, kPanelPairs, probabilities.rows, probabilities.ld, left, right, left + 2,
                               right + 2, sums + chunk, size_t(width));
        else
            multiply_panels<2>(rows, values.count, kPanelPairs, probabilities.rows, probabilities.ld, left, left, left + 2,
                               left + 2, sums + chunk, size_t(width));
    }
#endif
}

// Few rows of several heads: panels of the same positions, of one head after the other, and those that are read later.
struct PanelReads {
    const char* const* at;
    const char* const* ahead;
    size_t offset;  // bytes into each
};

// Rows of one head after the other: head i's begin i * step elements behind the first one's, rows are ld apart.
template <typename T>
struct HeadRows {
    T* first;
    size_t ld, step;
};

// W pairs of a panel, of bf16 or int8, as products take them.
struct PairsOfBf16 {
    static constexpr int kBytes = 4;
    MOESAIC_INLINE static Vi load(const char* at) { return loadi(at); }
#if defined(MOESAIC_EXPANDS_ROWS)
    MOESAIC_INLINE static Vf even(Vi pairs) { return low_bf16(pairs); }
    MOESAIC_INLINE static Vf odd(Vi pairs) { return high_bf16(pairs); }
#endif
};
struct PairsOfInt8 {
    static constexpr int kBytes = 2;
#if defined(MOESAIC_EXPANDS_ROWS)
    // A byte with its highest bit turned over, a number from 0 to 255 in the lowest bits of 2^23, or the next byte in those
    // of 2^15: two operations to fp32 (three with AVX2), where shifting by as much as it takes to keep the sign and
    // converting are up to three, of which one unit has two.
    MOESAIC_INLINE static Vi load(const char* at) { return widen_words(at); }
    MOESAIC_INLINE static Vf even(Vi words) {
        return sub(as_float(exclusive_or(andi(words, set1i(0xff)), set1i(0x4b000080))), set1(0x1p23f + 128));
    }
    MOESAIC_INLINE static Vf odd(Vi words) {
        return sub(as_float(exclusive_or(andi(words, set1i(0xff00)), set1i(0x47008000))), set1(0x1p15f + 128));
    }
#else
    MOESAIC_INLINE static Vi load(const char* at) { return expand_pairs(reinterpret_cast<const uint16_t*>(at)); }
#endif
};

// sums += the rows' pairs of numbers times V vectors of pairs, the even ones and then the odd ones.
#if defined(MOESAIC_EXPANDS_ROWS)
template <typename Pairs, int R, int V>
MOESAIC_INLINE void add_pairs(Vf (&sums)[R][V], const ThirdRows<R, float>& rows, const Vi (&pairs)[V]) {
    Vf columns[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) columns[v] = Pairs::even(pairs[v]);
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) add_products(sums[r], rows.at(r, 0), columns);
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) columns[v] = Pairs::odd(pairs[v]);
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) add_products(sums[r], rows.at(r, 1), columns);
}
#else
template <typename Pairs, int R, int V>
MOESAIC_INLINE void add_pairs(Vf (&sums)[R][V], const ThirdRows<R, bf16>& rows, const Vi (&pairs)[V]) {
    for (int r = 0; r < R; ++r) {
        const Vi row = broadcast_dword(&rows.at(r, 0));
        for (int v = 0; v < V; ++v) sums[r][v] = dot_bf16(sums[r][v], row, pairs[v]);
    }
}
#endif

// Of each head: C[R][32 N] (+)= A[R][2 * count] times N times 32 columns, which lie behind one another: a panel of keys,
// or 64 channels of one of values, since the four rows of a grouped decode have too few sums for half of them to hide a
// product's latency. A function of its own, or not all sums would be in registers.
template <typename Pairs, int R, int N>
[[gnu::noinline]] void multiply_heads(int heads, int count, HeadRows<const RowNumber> a, PanelReads reads,
                                      HeadRows<float> c, bool accumulate) {
    static_assert(N == 1 || W == 16);
    constexpr int kVectors = kPanel / W;  // of a row of a panel; of which AVX2 takes as many as it has registers for sums
    constexpr int V = W == 16 ? N * kVectors : R <= 2 ? kVectors : R <= 6 ? kVectors / 2 : kVectors / 4;
    constexpr int kRow = kPanel * Pairs::kBytes;
    for (int head = 0; head < heads; ++head, a.first += a.step, c.first += c.step)
        for (int column = 0; column < kPanel; column += V * W) {
            const char* panel = reads.at[head] + reads.offset + column * Pairs::kBytes;
            const char* ahead = reads.ahead[head] + reads.offset + column * Pairs::kBytes;
            const bool is_line = column * Pairs::kBytes % 64 == 0;
            const auto place = [&](int v) { return v / kVectors * count * kRow + v % kVectors * W * Pairs::kBytes; };
            float* sums = c.first + column;
            Vf acc[R][V];
#pragma GCC unroll 12
            for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
                for (int v = 0; v < V; ++v) acc[r][v] = accumulate ? load(sums + r * c.ld + v * W) : zero();
            ThirdRows<R, RowNumber> rows(a.first, a.ld);
            for (int p = 0; p < count; ++p, panel += kRow, ahead += kRow) {
                Vi pairs[V];
#pragma GCC unroll 4
                for (int v = 0; v < V; ++v) {
                    pairs[v] = Pairs::load(panel + place(v));
                    if (v * W * Pairs::kBytes % 64 == 0 && is_line) fetch(ahead + place(v));
                }
                add_pairs<Pairs>(acc, rows, pairs);
                rows.go_on(2);
            }
#pragma GCC unroll 12
            for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
                for (int v = 0; v < V; ++v) store(sums + r * c.ld + v * W, acc[r][v]);
        }
}

// Rows of which every head's panel is multiplied in turn, rather than all panels of one head and then of the next: as many
// as registers hold sums of. A decode of 8 to 12 expanded rows for each key/value head takes 0.7 to 0.95 of the time so;
// with instructions for bf16 more than six were not timed.
constexpr int kFewAttentionRows = kExpandsRows ? 12 : 6;

// Channels of values that multiply_heads takes together: int8's numbers stay in more registers until they are used.
constexpr int kRowsOfTwo = 6;  // with twice 32
template <typename Pairs>
constexpr bool kTakesTwo = W == 16 && !(kExpandsRows && Pairs::kBytes == 2);
template <typename Pairs>
inline int channels_together(int rows) {
    return kTakesTwo<Pairs> && rows <= kRowsOfTwo ? 2 * kPanel : kPanel;
}

template <typename Pairs, int N, int R = kFewAttentionRows>
inline void multiply_heads_of(int rows, int heads, int count, HeadRows<const RowNumber> a, PanelReads reads,
                              HeadRows<float> c, bool accumulate) {
    if constexpr (N == 2 && R > kRowsOfTwo) {
        multiply_heads_of<Pairs, N, kRowsOfTwo>(rows, heads, count, a, reads, c, accumulate);
    } else if constexpr (R > 0) {
        if (rows < R)
            multiply_heads_of<Pairs, N, R - 1>(rows, heads, count, a, reads, c, accumulate);
        else
            multiply_heads<Pairs, R, N>(heads, count, a, reads, c, accumulate);
    }
}

#else

constexpr int kFewAttentionRows = 6;  // one head's panels after the other's

#endif

}  // namespace moesaic
