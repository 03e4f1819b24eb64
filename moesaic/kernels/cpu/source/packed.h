// Matrices packed once for inference, in bf16, 8 or 4 bits, or MXFP4, and the linear layer on them.
//
// A weight (N, K) is a run of panels of 32 of its rows, whatever its format; a product reads each panel as one stream.
// Rows of activations are brought into the form that a format wants ("prepared") once, and then every panel multiplies
// them. An element of a result is computed by one thread, in an order that depends on nothing but K: the number of rows
// and of threads does not show in it.
#pragma once

#include <unistd.h>

#include <algorithm>

#include "gemm_int8.h"
#include "panel_pairs.h"
#include "tiles_product.h"

namespace moesaic {

enum PackedFormat : int64_t { kPackedBf16 = 0, kPackedInt8 = 1, kPackedInt4 = 2, kPackedMxfp4 = 3 };

// Part of a prepared row: its first byte, and how far apart copies of that part stand.
struct RowPart {
    size_t first, bytes;
};

// One matrix (N, K), or a stack of them; see kernels/packed.py for how it is laid out.
struct Packed {
    int64_t format;
    int64_t columns;  // N
    int64_t depth;    // K
    int64_t group;    // 4 bits: values of K that share a step or a scale
    const uint8_t* data;
    const float* scales;  // int8 and int4: one for each of the columns, padded to panels

    int panels() const { return int((columns + kPanel - 1) / kPanel); }
    int padded_depth() const {
        return round_up(int(depth), format == kPackedInt8 || format == kPackedMxfp4 ? 64 : 32);
    }
    // 4 bits: values of K whose steps or scales stand together.
    int64_t header_depth() const { return format == kPackedMxfp4 ? Mxfp4::kHeader : group; }
    size_t panel_bytes() const {
        const size_t k = size_t(padded_depth());
        if (format == kPackedBf16) return k * kPanel * 2;
        if (format == kPackedInt8) return k * kPanel;
        return k / size_t(header_depth()) * kHeaderBytes + k * kPanel / 2;
    }
    const uint8_t* panel(int64_t matrix, int64_t index) const {
        return data + size_t(matrix * panels() + index) * panel_bytes();
    }
    bool is_integer() const { return format != kPackedBf16; }  // or MXFP4, which is multiplied as integers are
    // Whether a prepared row is something else than its numbers in bf16.
    bool changes_rows() const { return is_integer() || kExpandsRows; }
    // Bytes of a prepared row, an odd number of cache lines: an even one has rows share the places of few cache sets.
    size_t row_bytes() const {
        const size_t bytes = is_integer() ? quantized_row().bytes() : size_t(padded_depth()) * sizeof(RowNumber);
        return kExpandsRows && !(is_integer() && kHasByteProducts) ? spread_rows(bytes) : odd_lines(bytes);
    }
    static size_t odd_lines(size_t bytes) { return ((bytes + 63) / 64 | 1) * 64; }
    // What products of so many rows take of each prepared one: of MXFP4 its bytes, or its numbers in bf16.
    RowPart used_part(int rows) const {
        if (!kHasTiles || format != kPackedMxfp4 || rows <= kFewMxfp4Rows) return {0, row_bytes()};
        return {quantized_row().numbers(), odd_lines(size_t(padded_depth()) * sizeof(bf16))};
    }
    QuantizedRow quantized_row() const {
        return {depth, format == kPackedInt8   ? RowForm::kBytes
                       : format == kPackedInt4 ? RowForm::kNibbles
                                               : RowForm::kMxfp4};
    }
    // Of the products of rows, prepared, with a panel; none where sums are fp32. Sums of 4 bits by vectors have no offset.
    SumScales sum_scales(int64_t matrix, int64_t index, const char* rows, size_t stride) const {
        if (format != kPackedInt8 && format != kPackedInt4) return {};
        return {rows + quantized_row().tail(), stride, scales + (matrix * panels() + index) * kPanel,
                format == kPackedInt8};
    }
    // Calls with what weights of 4 bits are.
    template <typename Call>
    void with_nibbles(Call&& call) const {
        if (format == kPackedMxfp4)
            call(Mxfp4{});
        else if (group == 32)
            call(Int4<32>{});
        else if (group == 64)
            call(Int4<64>{});
        else
            call(Int4<128>{});
    }
};

template <typename T>
inline void prepare_row(const Packed& weight, const T* x, char* to) {
    if (weight.is_integer()) {
        quantize_row(weight.quantized_row(), x, weight.depth, to);
        return;
    }
    RowNumber* row = reinterpret_cast<RowNumber*>(to);
    const int padded = weight.padded_depth();
    if constexpr (std::is_same_v<T, bf16> && std::is_same_v<RowNumber, bf16>) {
        std::memcpy(row, x, size_t(weight.depth) * sizeof(bf16));
        std::fill(row + weight.depth, row + padded, bf16(0));
    } else {
        for (int k = 0; k < padded; k += W) {
            const int64_t left = weight.depth - k;
            store_number(row + k, left > 0 ? load_row(x + k, left) : zero());
        }
    }
}

// Rows of one step of the bf16 product, and rows that pass a panel together.
#if defined(__AVX512BF16__) && !defined(MOESAIC_TILES)
constexpr int kPackedRows = 14, kFewestRows = 42, kMostRows = 252;  // 28 of 32 registers hold sums
#elif defined(MOESAIC_TILES)
constexpr int kPackedRows = kRowBlock, kFewestRows = kWholeRows, kMostRows = 448;
#else
constexpr int kPackedRows = kRowBlock, kFewestRows = kWholeRows, kMostRows = 192;
#endif
// Of the second-level cache, for rows or for sums: half of the 2 MiB that processors with tiles have. An expert's rows
// may take more: its weights come from memory once more for every run of them, those of a linear layer often from the
// third-level cache.
#if defined(MOESAIC_TILES)
constexpr size_t kRowsCache = size_t(1024) << 10, kExpertRowsCache = size_t(1536) << 10;
#elif defined(__AVX512F__) && defined(MOESAIC_EXPANDS_ROWS)
// Widened rows take twice the room of others, and these processors have 1 to 2 MiB.
inline const size_t kRowsCache =
    std::clamp(size_t(std::max(0L, sysconf(_SC_LEVEL2_CACHE_SIZE))) * 7 / 10, size_t(512) << 10, size_t(1024) << 10);
inline const size_t kExpertRowsCache = kRowsCache;
#else
constexpr size_t kRowsCache = size_t(512) << 10, kExpertRowsCache = kRowsCache;
#endif

// Panels whose sums there is room for.
#if defined(MOESAIC_PAIRS_PANELS)
constexpr int kPanelsOfStep = 2;
#else
constexpr int kPanelsOfStep = 1;
#endif

// What becomes of a row's last sums: as bf16 where they belong, plus the bias.
struct StoreRounded {
    const float* c;     // the sums so far, [rows][32]
    const float* bias;  // of the 32 columns, or null
    bf16* out;
    size_t out_stride;
    bool past_caches;

    Vf load_sum(int r, int v) const { return load(c + r * kPanel + v * W); }
    void finish(int r, const Vf (&sums)[kPanel / W]) const {
        Vf values[kPanel / W];
        for (int v = 0; v < kPanel / W; ++v) values[v] = bias ? add(sums[v], load(bias + v * W)) : sums[v];
        bf16* to = out + r * out_stride;
        if (past_caches)
            stream_bf16<kPanel>(to, values);
        else
            for (int v = 0; v < kPanel / W; ++v) store_bf16(to + v * W, values[v]);
    }
    StoreRounded rows_further(int rows) const {
        return {c + rows * kPanel, bias, out + rows * out_stride, out_stride, past_caches};
    }
};

#if !defined(MOESAIC_TILES)

constexpr int kAheadPairs = 64;  // pairs of K between two looks at where to read ahead

// As gemm_rows of gemm_bf16.h, the same sums in the same order, reading ahead.
#if !defined(MOESAIC_EXPANDS_ROWS)
template <int R, typename Out, typename Reads>
inline void bf16_rows(int pairs, const bf16* a, size_t lda, const uint32_t* b, Out out, bool accumulate,
                      Reads ahead) {
    constexpr int V = kPanel / W;
    Vf acc[R][V];
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < V; ++v) acc[r][v] = accumulate ? out.load_sum(r, v) : zero();
    // A pointer for every three rows, as far as addressing reaches: one for each does not fit the general registers,
    // which cost 4 % of 14 rows.
    const bf16* third[(R + 2) / 3];
    for (int r = 0; r < R; r += 3) third[r / 3] = a + r * lda;
    for (int first = 0; first < pairs; first += kAheadPairs) {
        if (first == ahead.turn * kAheadPairs) ahead.from = ahead.then;
        const int last = first + kAheadPairs < pairs ? first + kAheadPairs : pairs;
#pragma GCC unroll 2
        for (int p = first; p < last; ++p) {
            Vi columns[V];
            for (int v = 0; v < V; ++v) columns[v] = loadi(b + p * kPanel + v * W);
            ahead.fetch(ahead.from);
            ahead.fetch(ahead.from + 64);
            ahead.from += ahead.step;
            for (int r = 0; r < R; ++r) {
                const Vi row = broadcast_dword(third[r / 3] + r % 3 * lda);
                for (int v = 0; v < V; ++v) acc[r][v] = dot_bf16(acc[r][v], row, columns[v]);
            }
            for (const bf16*& rows : third) rows += 2;
        }
    }
    for (int r = 0; r < R; ++r) out.finish(r, acc[r]);
}
#else
// c[R][32] (+)= R rows times a panel, reading ahead.
template <int R, typename Reads>
inline void bf16_rows(int pairs, const float* a, size_t lda, const uint32_t* b, float* c, bool accumulate, Reads ahead) {
    auto lines = lines_of<2>(ahead);
    lines.passes(pairs, kAheadPairs, [&](int first, int here) {
        multiply_columns<R, kPanel, RowsExpanded>(
            here, a + 2 * first, lda, reinterpret_cast<const char*>(b + first * kPanel), kPanel * 4, c, kPanel,
            accumulate || first > 0, lines);
    });
}
#endif

template <int R, typename Out, typename Reads>
inline void bf16_rows_of(int rows, int pairs, const RowNumber* a, size_t lda, const uint32_t* b, Out out,
                         bool accumulate, Reads ahead) {
    if constexpr (R > 0) {
        if (rows == R)
            bf16_rows<R>(pairs, a, lda, b, out, accumulate, ahead);
        else
            bf16_rows_of<R - 1>(rows, pairs, a, lda, b, out, accumulate, ahead);
    }
}

#endif

// As packed_product. With `rounded` (whose c is C), results go there at once, but on AMX.
template <typename Each>
inline void bf16_product(const uint8_t* panel, int padded_depth, int rows, const char* a, size_t stride, float* c,
                         const Next& next, const Each& each, Waiting<Each>& waiting,
                         [[maybe_unused]] const StoreRounded* rounded) {
    const int pairs = padded_depth / 2;
#if defined(MOESAIC_TILES)
    if (rows > vector_rows) {
        tiles_product<false>(panel, pairs, rows, a, stride, c, next, {}, each, waiting);
        return;
    }
    float* sums = waiting.place();
    multiply_by_vectors(rows, pairs, reinterpret_cast<const bf16*>(a), stride / 2,
                        reinterpret_cast<const uint32_t*>(panel), sums);
    waiting.put(each, 0, rows, sums);
    waiting.all();
#else
    // Pairs of K whose weights stay in the second-level cache while all rows pass.
    constexpr int kStaying = 1024;
    const RowNumber* left = reinterpret_cast<const RowNumber*>(a);
    const uint32_t* weights = reinterpret_cast<const uint32_t*>(panel);
    const int lda = int(stride / sizeof(RowNumber)), parts = (rows + kPackedRows - 1) / kPackedRows;
    const int pass = parts == 1 ? pairs : kStaying;
    for (int first = 0; first < pairs; first += pass) {
        const int here = pairs - first < pass ? pairs - first : pass;
        const bool is_last = first + here == pairs, is_rounded = rounded && is_last;
        const size_t begin = size_t(first) * kPanel * 4, length = size_t(here) * kPanel * 4;
        for (int part = 0; part < parts; ++part) {
            const int row = int(int64_t(rows) * part / parts), end = int(int64_t(rows) * (part + 1) / parts);
            const Ahead ahead =
                parts > 1 ? ahead_of_share(next.panel ? next.panel : panel, begin, length, part, parts, kPanel * 4)
                          : ahead_of_itself(panel, (pairs + kAheadPairs - 1) / kAheadPairs,
                                            size_t(kAheadPairs) * kPanel * 4, kPanel * 4, next.panel);
            if (is_last) next.prefetch_lines(part, parts);
            const auto multiply = [&](const auto& reads) {
                const RowNumber* from = left + size_t(row) * lda + 2 * first;
                const uint32_t* by = weights + size_t(first) * kPanel;
#if !defined(MOESAIC_EXPANDS_ROWS)
                if (is_rounded)
                    bf16_rows_of<kPackedRows>(end - row, here, from, lda, by, rounded->rows_further(row), first > 0,
                                              reads);
                else
                    bf16_rows_of<kPackedRows>(end - row, here, from, lda, by,
                                              StoreFp32<kPanel>{c + row * kPanel, kPanel}, first > 0, reads);
#else
                bf16_rows_of<kPackedRows>(end - row, here, from, lda, by, c + row * kPanel, first > 0, reads);
                for (int r = row; is_rounded && r < end; ++r) {
                    Vf sums[kPanel / W];
                    for (int v = 0; v < kPanel / W; ++v) sums[v] = load(c + r * kPanel + v * W);
                    rounded->finish(r, sums);
                }
#endif
            };
            const auto multiply_ahead = [&] { rows > 2 && parts <= 2 ? multiply(ahead) : multiply(NearAhead{ahead}); };
            if constexpr (kReadsTwoStreams)
                parts == 1 ? multiply(TwoStreams(panel, size_t(pairs) * kPanel * 4, next.panel)) : multiply_ahead();
            else if constexpr (kMayLeaveRows)
                is_left_to_processor(rows) ? multiply(LeftToProcessor{ahead}) : multiply_ahead();
            else
                multiply_ahead();
            if (!is_last || is_rounded) continue;
            waiting.put(each, row, end, c + row * kPanel);
            waiting.all();
        }
    }
#endif
}

// As packed_product.
template <typename Each>
inline void int8_product(const uint8_t* panel, int padded_depth, int rows, const char* a, size_t stride, float* c,
                         const Next& next, const SumScales& scales, const Each& each, Waiting<Each>& waiting) {
#if defined(MOESAIC_TILES)
    // Fewer rows leave tiles mostly empty, but where vectors read more slowly; integers are exact either way.
    if (rows > few_byte_rows) {
        tiles_product<true>(panel, padded_depth / 4, rows, a, stride, c, next, scales, each, waiting);
        return;
    }
#endif
    byte_product(panel, padded_depth, rows, a, stride, c, next, [&](int first, int last) {
        waiting.put(each, first, last, c + first * kPanel, scales);
        waiting.all();
    });
}

// Prepared rows, of each its used_part, times a panel. each(row, its 32 sums) is called for every row, now or, for those
// that wait, by the next product or waiting.all(); not where the product brings the results to where `rounded` says itself.
// c: room for the sums of all steps of rows.
template <typename Each>
inline void packed_product(const Packed& weight, int64_t matrix, int64_t index, int rows, const char* a, size_t stride,
                           float* c, const Next& next, const Each& each, Waiting<Each>& waiting,
                           const StoreRounded* rounded = nullptr) {
    const uint8_t* data = weight.panel(matrix, index);
    if (weight.format == kPackedBf16) {
        bf16_product(data, weight.padded_depth(), rows, a, stride, c, next, each, waiting, rounded);
        return;
    }
    SumScales scales = weight.sum_scales(matrix, index, a, stride);
    // They are read at the panel's end, and would be missed there.
    for (int v = 0; scales.columns && v < kPanel; v += 16)
        _mm_prefetch(reinterpret_cast<const char*>(scales.columns + v), _MM_HINT_T0);
    if (weight.format == kPackedInt8) {
        int8_product(data, weight.padded_depth(), rows, a, stride, c, next, scales, each, waiting);
        return;
    }
    const auto done = [&](int first, int last, const float* sums) {
        waiting.put(each, first, last, sums, scales);
        waiting.all();
    };
    weight.with_nibbles([&](auto format) {
        using F = decltype(format);
        const NibblePanel<F> panel{data, weight.padded_depth(), weight.quantized_row()};
#if defined(MOESAIC_TILES)
        // Fewer rows leave tiles mostly empty, and panels have to be unpacked for them; the results are the same bits.
        if (rows > NibbleLines<F>::kFewRows) {
            scales.has_offset = true;  // of the bytes that nibbles become
            nibble_tiles_product(panel, rows, a, stride, c, next, scales, each, waiting);
            return;
        }
#endif
#if defined(__AVX512F__) && !defined(MOESAIC_TILES)
        if constexpr (!F::kScalesGroups)
            if (rows >= kFewestUnpacked) {
                scales.has_offset = true;
                unpacked_product(panel, rows, a, stride, c, next, done);
                return;
            }
#endif
        nibble_product(panel, rows, a, stride, c, next, done);
    });
}

#if !defined(__AVX512F__) && !defined(MOESAIC_TILES)

// Panels that few rows pass together, some 4 KiB of each in turn, while the same of what follows is read ahead, line by
// line in turn. Memory that is read in four places at once comes faster than in one: on two Zen 3 cores few rows are 2 to
// 16 % faster so than panel by panel (with two panels 0 to 9 %, with eight -10 to 6, with 8 KiB of each 1 to 10).
constexpr int kPanelsTogether = 4;

// Rows of which one step multiplies a panel.
inline int rows_together(const Packed& weight) {
    if (weight.format == kPackedBf16) return kPackedRows;
    return weight.format == kPackedInt8 ? kByteRows : kNibbleRows;
}

// c[count][rows][32] = up to rows_together rows times `count` panels that follow each other, the first at `data`. Meanwhile
// the beginnings of `next_count` panels are read ahead, the first at `next`.
inline void together_product(const Packed& weight, const uint8_t* data, int count, int rows, const char* a, size_t stride,
                             float* c, const uint8_t* next, int next_count) {
    const size_t bytes = weight.panel_bytes();
    // multiply(panel, its sums, first, last, ahead) for runs of `run` of a panel's `steps` steps through K; lines(steps):
    // how many cache lines those are.
    const auto take_turns = [&](int steps, int run, auto&& lines, auto&& multiply) {
        for (int first = 0; first < steps; first += run) {
            const int last = std::min(first + run, steps), here = lines(last) - lines(first);
            for (int n = 0; n < count; ++n)
                multiply(data + size_t(n) * bytes, c + size_t(n) * size_t(rows) * kPanel, first, last,
                         last == steps ? PanelsInTurn(next, bytes, next_count, n * here)
                                       : PanelsInTurn(data + size_t(lines(last)) * 64, bytes, count, n * here));
        }
    };
    const int depth = weight.padded_depth(), blocks = (depth + kActivationBlock - 1) / kActivationBlock;
    if (weight.format == kPackedBf16) {
        const RowNumber* left = reinterpret_cast<const RowNumber*>(a);
        take_turns(depth / 2, 32, [](int pairs) { return pairs * kPanel * 4 / 64; },
                   [&](const uint8_t* panel, float* sums, int first, int last, const PanelsInTurn& ahead) {
                       const uint32_t* weights = reinterpret_cast<const uint32_t*>(panel) + size_t(first) * kPanel;
                       bf16_rows_of<kPackedRows>(rows, last - first, left + 2 * first, stride / sizeof(RowNumber), weights,
                                                 sums, first > 0, ahead);
                   });
    } else if (weight.format == kPackedInt8) {
        take_turns(blocks, 1, [](int blocks) { return blocks * kActivationBlock * kPanel / 64; },
                   [&](const uint8_t* panel, float* sums, int first, int last, const PanelsInTurn& ahead) {
                       byte_rows_of<kByteRows>(rows, panel, depth, first, last, a, stride, sums, first > 0, ahead);
                   });
    } else {
        weight.with_nibbles([&](auto format) {
            using F = decltype(format);
            using Panel = NibblePanel<F>;
            take_turns(blocks, 2, [](int blocks) { return blocks * int(Panel::kBlockBytes / 64); },
                       [&](const uint8_t* panel, float* sums, int first, int last, const PanelsInTurn& ahead) {
                           nibble_rows_of<F, kNibbleRows>(rows, Panel{panel, depth, weight.quantized_row()}, first, last,
                                                          a, stride, sums, first > 0, ahead);
                       });
        });
    }
}

#endif

// What becomes of the rows' sums of one panel: see packed_product. Of `next` the lines alone.
template <typename Each>
struct PanelResult {
    Each each;
    Next next;
    const StoreRounded* rounded = nullptr;
};

#if defined(MOESAIC_PAIRS_PANELS)

// Whether so many rows take panels two at a time. Up to 36, three steps of twelve, would be no faster so (int8 4 % slower).
inline bool takes_pairs(const Packed& weight, int rows) {
    return rows > 3 * kRowBlock && weight.format != kPackedMxfp4;
}

// As packed_product for panel `index` and the one behind it, where it takes_pairs, piece by piece of K. following: the
// weights that come after them, or null. c: room for the sums of both.
template <typename Each>
inline void paired_product(const Packed& weight, int64_t matrix, int index, int rows, const char* a, size_t stride,
                           float* c, const uint8_t* following, const PanelResult<Each>& first,
                           const PanelResult<Each>& second, Waiting<Each>& waiting) {
    const PanelResult<Each>* const results[] = {&first, &second};
    const uint8_t* panel = weight.panel(matrix, index);
    const size_t bytes = weight.panel_bytes(), apart = size_t(rows) * kPanel;
    const int parts = (rows + kPairRows - 1) / kPairRows;
    // `deep` values of K at a time. length(k): bytes of the first k values of a panel; prepare(first, count) a piece's
    // values; multiply(rows, first row, first, count, ahead).
    const int depth = weight.padded_depth(), of_dword = weight.format == kPackedBf16 ? 2 : 4;
    const auto in_pieces = [&](int deep, auto&& length, auto&& prepare, auto&& multiply) {
        for (int begin = 0; begin < depth; begin += deep) {
            const int here = std::min(deep, depth - begin), behind = begin + here;
            const bool is_last = behind == depth;
            prepare(begin, here);
            const uint8_t* then = !is_last ? panel + length(behind) : following ? following : panel;
            const size_t piece = length(is_last ? std::min(deep, depth) : std::min(deep, depth - behind));
            for (int part = 0; part < parts; ++part) {
                const int row = int(int64_t(rows) * part / parts), end = int(int64_t(rows) * (part + 1) / parts);
                if (is_last)
                    for (const PanelResult<Each>* result : results) result->next.prefetch_lines(part, parts);
                multiply(end - row, row, begin, here, PairAhead(then, bytes, piece, part, parts, here / of_dword));
                if (!is_last) continue;
                for (int side = 0; side < 2; ++side) {
                    const PanelResult<Each>& result = *results[side];
                    float* sums = c + side * apart + row * kPanel;
                    if (result.rounded && !weight.is_integer()) {
                        for (int r = row; r < end; ++r, sums += kPanel)
                            result.rounded->finish(r, {load(sums), load(sums + W)});
                        continue;
                    }
                    SumScales scales = weight.sum_scales(matrix, index + side, a, stride);
                    scales.has_offset = true;  // of 4 bits too, once they are bytes
                    waiting.put(result.each, row, end, sums, scales);
                    waiting.all();
                }
            }
        }
    };
    const auto by_bytes = [&](int count, int row, int begin, int here, const uint8_t* left, const uint8_t* right,
                              const PairAhead& ahead) {
        multiply_byte_pair_of(count, here / 4, a + size_t(row) * stride + begin, stride, left, right, c + row * kPanel,
                              apart, begin > 0, ahead);
    };
    if (weight.format == kPackedInt8) {
        in_pieces(256, [](int k) { return size_t(k) * kPanel; }, [](int, int) {},
                  [&](int count, int row, int begin, int here, const PairAhead& ahead) {
                      const uint8_t* left = panel + size_t(begin) * kPanel;
                      by_bytes(count, row, begin, here, left, left + bytes, ahead);
                  });
    } else if (weight.format == kPackedInt4) {
        constexpr int kDeep = 256;
        alignas(64) uint8_t unpacked[2][kDeep * kPanel];
        weight.with_nibbles([&](auto format) {
            using F = decltype(format);
            if constexpr (!F::kScalesGroups) {
                const QuantizedRow form = weight.quantized_row();
                const NibblePanel<F> both[] = {{panel, depth, form}, {panel + bytes, depth, form}};
                in_pieces(kDeep, [&](int k) { return bytes / size_t(depth / 32) * size_t(k / 32); },
                          [&](int begin, int here) {
                              for (int side = 0; side < 2; ++side) unpack_piece(both[side], begin, here, unpacked[side]);
                          },
                          [&](int count, int row, int begin, int here, const PairAhead& ahead) {
                              by_bytes(count, row, begin, here, unpacked[0], unpacked[1], ahead);
                          });
            }
        });
    } else {
        constexpr int kDeep = 64;
        alignas(64) float widened[kDeep * 2 * kPanel];
        const uint32_t* left = reinterpret_cast<const uint32_t*>(panel);
        const size_t lda = stride / sizeof(RowNumber);
        in_pieces(kDeep, [](int k) { return size_t(k) * kPanel * 2; },
                  [&](int begin, int here) {
                      const uint32_t* from = left + begin / 2 * kPanel;
                      widen_columns(here / 2, from, from + bytes / 4, widened);
                  },
                  [&](int count, int row, int begin, int here, const PairAhead& ahead) {
                      multiply_widened_of(
                          count, here / 2, reinterpret_cast<const RowNumber*>(a) + size_t(row) * lda + begin, lda, widened,
                          c + row * kPanel, apart, begin > 0, ahead);
                  });
    }
}

#endif

// Prepared rows times the panels [begin, end) of a matrix; result_of(panel, StoreRounded&) says what becomes of each's
// sums, and may make use of the room. following: the weights that come after them, or null. c as in packed_product.
template <typename Each, typename ResultOf>
inline void packed_panels(const Packed& weight, int64_t matrix, int begin, int end, int rows, const char* a, size_t stride,
                          float* c, const uint8_t* following, Waiting<Each>& waiting, ResultOf&& result_of) {
    StoreRounded room{};
    int index = begin;
#if !defined(__AVX512F__) && !defined(MOESAIC_TILES)
    static thread_local Scratch scratch;
    while (rows <= rows_together(weight) && end - index > 1) {
        const int count = std::min(kPanelsTogether, end - index), left = end - index - count;
        float* sums = scratch.get<float>(size_t(kPanelsTogether) * size_t(rows) * kPanel);
        const uint8_t* data = weight.panel(matrix, index);
        together_product(weight, data, count, rows, a, stride, sums,
                         left > 0     ? weight.panel(matrix, index + count)
                         : following ? following
                                     : data,
                         left > 0 ? std::min(left, kPanelsTogether) : kPanelsTogether);
        for (const int last = index + count; index < last; ++index, sums += rows * kPanel) {
            const PanelResult<Each> result = result_of(index, room);
            result.next.prefetch_lines(0, 1);
            waiting.put(result.each, 0, rows, sums, weight.sum_scales(matrix, index, a, stride));
            waiting.all();
        }
    }
#endif
#if defined(MOESAIC_PAIRS_PANELS)
    for (; takes_pairs(weight, rows) && end - index > 1; index += 2) {
        StoreRounded other_room{};
        const PanelResult<Each> first = result_of(index, room), second = result_of(index + 1, other_room);
        paired_product(weight, matrix, index, rows, a, stride, c,
                       index + 2 < end ? weight.panel(matrix, index + 2) : following, first, second, waiting);
    }
#endif
    for (; index < end; ++index) {
        PanelResult<Each> result = result_of(index, room);
        result.next.panel = index + 1 < end ? weight.panel(matrix, index + 1) : following;
        packed_product(weight, matrix, index, rows, a, stride, c, result.next, result.each, waiting, result.rounded);
    }
}

// As many rows as stay in the second-level cache beside a panel, in whole steps.
inline int rows_at_once(size_t row_bytes, size_t cache = kRowsCache) {
    const int fit = int(std::min(cache / row_bytes, size_t(kMostRows)));
    return std::max(kFewestRows, fit / kFewestRows * kFewestRows);
}

// y (M, N) = x (M, K) weight^T + bias.
struct LinearCall {
    Packed weight;
    int64_t rows;  // M
    const void* x;
    int64_t x_stride;  // elements between rows
    int64_t x_is_bf16;
    const float* bias;  // N, or null
    void* out;
    int64_t out_stride;
    int64_t out_is_bf16;
    char* workspace;  // packed_linear_workspace bytes, aligned to 64
};

// Rows are prepared once for everybody, but for few ones, and for bf16 ones, which every thread uses as they are or
// prepares block by block.
inline size_t packed_linear_workspace(const Packed& weight, int64_t rows) {
    return weight.is_integer() && !are_private(rows) ? size_t(rows) * weight.row_bytes() : 0;
}

// Brings the 32 sums of a row, plus the bias, to where they belong.
struct WriteRow {
    char* out = nullptr;  // of row 0
    size_t stride = 0;    // in bytes
    int64_t columns = 0;  // that are left, from this panel's first
    const float* bias = nullptr;
    bool is_bf16 = true;

    Vf value(const float* sums, int v) const {
        const Vf sum = load(sums + v);
        return bias ? add(sum, load_row(bias + v, columns - v)) : sum;
    }
    MOESAIC_INLINE void operator()(int row, const float* sums) const {
        char* to = out + size_t(row) * stride;
        if (is_bf16 && columns >= kPanel) {
            Vf values[kPanel / W];
            for (int v = 0; v < kPanel / W; ++v) values[v] = value(sums, v * W);
            for (int v = 0; v < kPanel / W; v += 2)
                storei(reinterpret_cast<bf16*>(to) + v * W, to_bf16_rows(values[v], values[v + 1]));
            return;
        }
        with_element_type(is_bf16, [&](auto kind) {
            using T = decltype(kind);
            for (int v = 0; v < kPanel && v < columns; v += W)
                store_row(reinterpret_cast<T*>(to) + v, value(sums, v), columns - v);
        });
    }
};

// Every thread of the team calls this, with equal arguments; complete when it returns.
void packed_linear(Team& team, const LinearCall& call);

// y (T, heads, N): every row of x (T, heads, K) times the bf16 matrix (N, K) of its head. Strides in elements.
struct HeadsCall {
    Packed weight;  // a matrix for each head
    int64_t num_heads;
    int64_t rows;  // T
    const bf16* x;
    int64_t x_stride, x_head_stride;
    bf16* out;
    int64_t out_stride, out_head_stride;
};

// Such products cut into tasks, which may stand among others of a phase.
class PackedHeads {
  public:
    PackedHeads(const HeadsCall& call, int threads) : call_(call) {
        const int most = rows_at_once(call.weight.row_bytes());
        row_parts_ = int((call.rows + most - 1) / most);
        const int64_t whole = std::max<int64_t>(1, call.num_heads * row_parts_);
        columns_ = int(std::clamp<int64_t>((4 * threads + whole - 1) / whole, 1, call.weight.panels()));
    }

    long count() const { return long(call_.num_heads) * row_parts_ * columns_; }

    // before(head, first row, last row) is called for each rows of a head once.
    template <typename Before>
    void run(long task, Before&& before) const {
        const int part = int(task / columns_ % row_parts_);
        if (task % columns_ == 0) before(task / columns_ / row_parts_, first_row(part), first_row(part + 1));
        run(task);
    }
    void run(long task) const;

  private:
    int64_t first_row(int part) const { return call_.rows * part / row_parts_; }

    HeadsCall call_;
    int row_parts_, columns_;
};

// Row `row` of the matrix (N, K), in bf16: an embedding.
inline void packed_row(const Packed& weight, int64_t row, bf16* out) {
    const uint8_t* panel = weight.panel(0, row / kPanel);
    const int column = int(row % kPanel);
    if (weight.format == kPackedBf16) {
        for (int64_t k = 0; k < weight.depth; ++k)
            std::memcpy(out + k, panel + (k / 2 * kPanel + column) * 4 + k % 2 * 2, 2);
        return;
    }
    static thread_local Scratch scratch;
    float* numbers = scratch.get<float>(2 * size_t(weight.depth + W));
    float* rotated = numbers + weight.depth + W;
    const bool is_mxfp4 = weight.format == kPackedMxfp4;
    if (weight.format == kPackedInt8) {
        const float scale = weight.scales[row];
        for (int64_t k = 0; k < weight.depth; ++k)
            numbers[k] = float(int(panel[(k / 4 * kPanel + column) * 4 + k % 4]) - 128) * scale;
    } else {
        const int64_t depth = weight.header_depth();
        for (int64_t k = 0; k < weight.depth; ++k) {
            const uint8_t* header = panel + size_t(k / depth) * (kHeaderBytes + size_t(depth) * kPanel / 2);
            const int64_t within = k % depth;
            const uint8_t both = header[kHeaderBytes + (within / 4 * 16 + column % 16) * 4 + within % 4];
            const int nibble = column < 16 ? both & 15 : both >> 4;
            if (is_mxfp4) {
                numbers[k] = Mxfp4::number(nibble, header[within / Mxfp4::kGroup * kPanel + column]);
            } else {
                int16_t step;
                std::memcpy(&step, header + column * 2, 2);
                numbers[k] = float((nibble - 8) * step) * weight.scales[row];
            }
        }
    }
    if (!is_mxfp4) rotate(numbers, weight.depth, rotated);
    for (int64_t k = 0; k < weight.depth; ++k) out[k] = float_to_bf16((is_mxfp4 ? numbers : rotated)[k]);
}

}  // namespace moesaic
