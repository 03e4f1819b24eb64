// Rows times a panel by tiles, and rows of complete sums that wait for what becomes of them.
#pragma once

#include "gemm_int8.h"

namespace moesaic {

// Rows of complete sums that each(row, 32 sums) is called for, one after the other. Those of products of 8 bits are int32
// still, and have scales.
template <typename Each>
struct CompleteRows {
    Each each;
    const float* sums = nullptr;
    int row = 0, last = 0;
    SumScales scales;

    bool are_bytes() const { return scales.tails; }
    template <bool kBytes>
    MOESAIC_INLINE void one() {
        if (row >= last) return;
        if constexpr (kBytes) {
            alignas(64) float scaled[kPanel];
            scales.scale(row, sums, scaled);
            each(row++, scaled);
        } else {
            each(row++, sums);
        }
        sums += kPanel;
    }
    void all() {
        if (are_bytes())
            while (row < last) one<true>();
        else
            while (row < last) one<false>();
    }
};

// The rows that a product has completed last. Those of tiles wait for the next product of their kind, which calls each()
// between its tile instructions: tiles take long to be stored and read again, and vectors work beside them. (Products of
// MXFP4, which scale sums beside their tiles as it is, have no room for that.)
template <typename Each>
class Waiting {
  public:
    void all() { rows_.all(); }
    void put(const Each& each, int first, int last, const float* sums, const SumScales& scales = {}) {
        all();
        rows_ = {each, sums, first, last, scales};
    }
#if defined(MOESAIC_TILES)
    // Sums of rows that do not wait.
    float* place() { return places_[turn_ ^= 1]; }
    // Takes the rows, to be called for by whoever takes them, who works with terms of this kind.
    template <bool kBytes>
    CompleteRows<Each> take() {
        if (rows_.are_bytes() != kBytes) all();
        const CompleteRows<Each> rows = rows_;
        rows_.row = rows_.last;
        return rows;
    }

  private:
    alignas(64) float places_[2][kRowBlock * kPanel];
    int turn_ = 0;
#endif

  private:
    CompleteRows<Each> rows_{};
};

#if defined(MOESAIC_TILES)

// Up to 32 rows times a panel by tiles: sums that begin with those of `from`, or with zero where that is null, go to
// `to`. Meanwhile `ahead` is read ahead, and rows that wait are done. A pair is two terms, or with kBytes four.
template <bool kBytes, Stays stays, typename Fetch, typename Each>
inline void block_by_tiles(int rows, int pairs, const bf16* a, size_t lda, const uint32_t* b, const float* from,
                           float* to, Fetch ahead, Waiting<Each>& waiting) {
    const int top = rows < 16 ? rows : 16, bottom = rows - top;
    configure_tiles(top, bottom);
    const auto multiply = [&](auto has_bottom, auto every) {
        constexpr bool kBottom = decltype(has_bottom)::value;
        constexpr int kEvery = decltype(every)::value;  // quarters for every row that waits
        if (pairs / kPairBlock * 4 / kEvery < kRowBlock) waiting.all();
        from ? load_sums<2, kBottom>(from, kPanel) : clear_sums<2, kBottom>();
        multiply_tiles<stays, 2, kBottom, kBytes>(
            a, a + 16 * lda, lda, b, kPanel, pairs,
            [ahead, complete = waiting.template take<kBytes>()](int, int quarter) mutable __attribute__((always_inline)) {
                ahead.quarter();
                if (quarter % kEvery == kEvery - 1) complete.template one<kBytes>();
            });
        store_sums<2, kBottom>(to, kPanel);
    };
    using One = std::integral_constant<int, 1>;
    using Two = std::integral_constant<int, 2>;
    if (kBytes && pairs / kPairBlock * 2 < kRowBlock)
        bottom ? multiply(std::true_type{}, One{}) : multiply(std::false_type{}, One{});
    else
        bottom ? multiply(std::true_type{}, Two{}) : multiply(std::false_type{}, Two{});
}

// Rows, step by step, times some terms of a panel, [first, first + here) of `terms`, at `weights`.
// ahead_of(step, steps, blocks of a step, lines to be read ahead, multiply) calls multiply(all that is to be read ahead, which
// operand stays in the first-level cache).
template <bool kBytes, typename Each, typename AheadOf>
inline void tiles_pass(const uint8_t* weights, int first, int here, int terms, int rows, const char* a, size_t stride,
                       float* c, const Next& next, const SumScales& scales, const Each& each, Waiting<Each>& waiting,
                       AheadOf&& ahead_of) {
    const bf16* left = reinterpret_cast<const bf16*>(a);
    const int lda = int(stride / 2), parts = (rows + kRowBlock - 1) / kRowBlock, blocks = here / kPairBlock;
    const bool is_last = first + here == terms;
    for (int part = 0; part < parts; ++part) {
        const RowBlock block(rows, parts, part);
        const int row = block.row;
        float *sums = c + part * kRowBlock * kPanel, *to = is_last ? waiting.place() : sums;
        ahead_of(part, parts, blocks, next.lines_ahead(part, parts, first, here, terms, blocks),
                 [&](const auto& ahead, auto stays) {
                     block_by_tiles<kBytes, decltype(stays)::value>(
                         block.size, here, left + size_t(row) * lda + 2 * first, lda,
                         reinterpret_cast<const uint32_t*>(weights), first > 0 ? sums : nullptr, to, ahead, waiting);
                 });
        if (is_last) waiting.put(each, block.first, row + block.size, to + (block.first - row) * kPanel, scales);
    }
}

// Pairs of K whose weights stay in the first-level cache while all rows pass.
constexpr int kStayingPairs = int(kStayingBytes) / (kPanel * 4);

// Rows times a panel by tiles: of bf16, or of 8 bits, whose sums are int32 and have `scales`.
template <bool kBytes, typename Each>
inline void tiles_product(const uint8_t* panel, int pairs, int rows, const char* a, size_t stride, float* c,
                          const Next& next, const SumScales& scales, const Each& each, Waiting<Each>& waiting) {
    const bool is_one = rows <= kRowBlock;
    const char* following = reinterpret_cast<const char*>(next.panel);
    for (int first = 0; first < pairs;) {
        const int here = is_one ? pairs : std::min(pairs - first, kStayingPairs), behind = first + here;
        const size_t length = size_t(here) * kPanel * 4;
        const char* own = reinterpret_cast<const char*>(panel) + size_t(first) * kPanel * 4;
        // One step reads ahead in its own panel; several bring what stays next.
        const int wanted = behind < pairs ? pairs - behind : following ? pairs : 0;
        const int most = is_one ? pairs : kStayingPairs;
        Streams streams(behind < pairs ? own + length : following, size_t(std::min(wanted, most)) * kPanel * 4);
        tiles_pass<kBytes>(
            reinterpret_cast<const uint8_t*>(own), first, here, pairs, rows, a, stride, c, next, scales, each, waiting,
            [&](int part, int parts, int blocks, const LinesAhead& lines, auto&& multiply) {
                using Rows = std::integral_constant<Stays, Stays::kRows>;
                using Panel = std::integral_constant<Stays, Stays::kPanel>;
                if (parts == 1 && PagesAhead::suits(length))
                    multiply(PagesAhead(own, length, following, lines), Rows{});
                else if (parts == 1)
                    multiply(StreamAndLinesAhead{StreamAhead(own + std::min(kAheadBytes, length), 16 * kPanel * 4,
                                                             following ? own + length : nullptr, following),
                                                 lines},
                             Rows{});
                else
                    streams.ahead(part, parts, blocks, lines, [&](const auto& ahead) { multiply(ahead, Panel{}); });
            });
        first = behind;
    }
}

// The steps of a header as unpacking takes them, in both words of a dword. A weight, 0 to 15, times its step plus 128 - 8
// steps is what 8 bits have: never below 8 nor above 248, so that the two bytes of a word are made by one product.
struct StepWords {
    static constexpr int V = kPanel / W;
    Vi steps[V], offsets[V];

    explicit StepWords(const uint8_t* header) {
        constexpr uint32_t kPerStep = uint16_t(-8 * 0x0101), kOffset = 0x80808080;
        for (int v = 0; v < V; ++v) {
            const Vi words = widen_words(header + 2 * v * W);
            steps[v] = low_words(words, words);
            offsets[v] = add_words(mul_words(steps[v], set1i(int32_t(kPerStep << 16 | kPerStep))), set1i(int32_t(kOffset)));
        }
    }
    // Four values of K: a line of nibbles to two of bytes.
    MOESAIC_INLINE void unpack(const uint8_t* from, uint8_t* to) const {
        Vi columns[V];
        load_nibbles<Int4<32>>(from, columns);
        for (int v = 0; v < V; ++v) storei(to + v * W * 4, add_words(mul_words(columns[v], steps[v]), offsets[v]));
    }
};

// `count` lines of an int4 panel, of four values of K each, from `line` on and all behind one header, as tiles take them:
// [K/4][32][4 bytes] as int8 has. Behind the last group nothing is written: rows are zero there.
template <typename F>
MOESAIC_INLINE void unpack_lines(const NibblePanel<F>& panel, int line, int count, uint8_t* to) {
    const int k = 4 * line;
    if (F::kGroup < 64 && k >= panel.depth) return;
    const StepWords steps(panel.header(k / F::kGroup));
    const uint8_t* from = panel.weights(k / F::kGroup) + k % F::kGroup / 4 * 64;
    for (int i = 0; i < count; ++i) steps.unpack(from + 64 * i, to + 128 * i);
}
template <typename F>
constexpr int kLinesOfHeader = F::kGroup / 4;

// Up to 32 rows times an int4 panel by tiles; the sums go to `to`. The panel is unpacked between the tile instructions into
// a few pieces of 2 KiB: pieces of 16 KiB unpacked before took 10 to 25 % longer.
template <bool kBottom, typename F, typename Each>
[[gnu::noinline]] void int4_block(const NibblePanel<F>& panel, int rows, const char* a, size_t stride, float* to,
                                  const char* following, LinesAhead lines, Waiting<Each>& waiting) {
    constexpr int kPieces = 4, kLead = 2, kLines = 16;  // kept; unpacked ahead; packed cache lines of each
    constexpr int kAtOnce = std::min(kLines, kLinesOfHeader<F>);
    alignas(64) uint8_t ring[kPieces][2 * kLines * 64];
    const int count = (panel.depth + 63) / 64;
    const size_t size = panel.bytes(), step_bytes = size / size_t(count);
    const char* own = reinterpret_cast<const char*>(panel.data);
    configure_tiles(rows < 16 ? rows : 16, rows < 16 ? 0 : rows - 16);
    if (count * 4 < kRowBlock) waiting.all();
    CompleteRows<Each> complete = waiting.template take<true>();
    for (int piece = 0; piece < std::min(kLead, count); ++piece)
        for (int line = 0; line < kLines; line += kAtOnce)
            unpack_lines(panel, piece * kLines + line, kAtOnce, ring[piece] + 128 * line);
    clear_sums<2, kBottom>();
    for (int piece = 0; piece < count; ++piece) {
        const uint8_t* columns = ring[piece % kPieces];
        const int then = std::min(piece + kLead, count - 1);
        uint8_t* unpacked = ring[(piece + kLead) % kPieces];
        const char* row = a + size_t(piece) * 64;
        const size_t place = size_t(piece) * step_bytes + kAheadBytes;
        const char* ahead = place < size ? own + place : following + (place - size);
        const auto quarter = [&](int index) __attribute__((always_inline)) {
            constexpr int kEach = kLines / 4;
            for (int i = index * kEach; i < (index + 1) * kEach; ++i) fetch(ahead + 64 * i);
            if (index == 0)  // the headers
                for (int i = 0; i < std::max(1, kLines / kLinesOfHeader<F>); ++i) fetch(ahead + 64 * (kLines + i));
            unpack_lines(panel, then * kLines + index * kEach, kEach, unpacked + 128 * index * kEach);
            lines.quarter();
            complete.template one<true>();
        };
        tile_load(4, row, stride);
        quarter(0);
        tile_load(6, columns, 128);
        tile_dot_s8u8(0, 4, 6);
        quarter(1);
        tile_load(7, columns + 64, 128);
        tile_dot_s8u8(1, 4, 7);
        quarter(2);
        if constexpr (kBottom) {
            tile_load(5, row + 16 * stride, stride);
            tile_dot_s8u8(2, 5, 6);
            tile_dot_s8u8(3, 5, 7);
        }
        quarter(3);
    }
    store_sums<2, kBottom>(to, kPanel);
}

// As tiles_product, of an int4 panel and more rows than one step takes, piece by piece of K: each is unpacked and then
// multiplied, while the packed one behind it comes nearer. (Unpacking the next one meanwhile took 10 to 30 % longer: two of
// them do not stay in the first-level cache.)
template <typename F, typename Each>
inline void int4_pieces(const NibblePanel<F>& panel, int rows, const char* a, size_t stride, float* c, const Next& next,
                        const SumScales& scales, const Each& each, Waiting<Each>& waiting) {
    constexpr int kAtOnce = std::min(16, kLinesOfHeader<F>);
    alignas(64) uint8_t bytes[kStayingBytes];
    const int lines = (panel.depth + 63) / 64 * 16, most = rows > 4 * kRowBlock ? kStayingPairs : kStayingPairs / 2;
    const int pieces = (lines + most - 1) / most, size = round_up((lines + pieces - 1) / pieces, 16);
    const auto place = [&](int line) { return panel.bytes() * size_t(line) / size_t(lines) / 64 * 64; };
    for (int first = 0; first < lines; first += size) {
        const int here = std::min(size, lines - first), behind = first + here;
        for (int line = 0; line < here; line += kAtOnce) unpack_lines(panel, first + line, kAtOnce, bytes + 128 * line);
        const bool is_last = behind == lines;
        const uint8_t* from = !is_last ? panel.data + place(behind) : next.panel ? next.panel : panel.data;
        const size_t length = is_last ? place(size) : place(std::min(behind + size, lines)) - place(behind);
        tiles_pass<true>(bytes, first, here, lines, rows, a, stride, c, next, scales, each, waiting,
                         [&](int part, int parts, int blocks, const LinesAhead& others, auto&& multiply) {
                             // A line after the other: lines of each page in turn are 3 to 5 % slower here.
                             const size_t share = length / size_t(parts) / 64 * 64;
                             const StreamAhead stream(reinterpret_cast<const char*>(from) + share * size_t(part),
                                                      share / size_t(blocks));
                             multiply(StreamAndLinesAhead{stream, others}, std::integral_constant<Stays, Stays::kPanel>{});
                         });
    }
}

// As tiles_product, of an int4 panel.
template <typename F, typename Each>
inline void int4_tiles_product(const NibblePanel<F>& panel, int rows, const char* a, size_t stride, float* c,
                               const Next& next, const SumScales& scales, const Each& each, Waiting<Each>& waiting) {
    if (rows > kRowBlock) {
        int4_pieces(panel, rows, a, stride, c, next, scales, each, waiting);
        return;
    }
    const char* following = reinterpret_cast<const char*>(next.panel ? next.panel : panel.data);
    float* to = waiting.place();
    const int count = (panel.depth + 63) / 64;
    const LinesAhead lines = next.lines_ahead(0, 1, 0, count, count, count);
    rows > 16 ? int4_block<true>(panel, rows, a, stride, to, following, lines, waiting)
              : int4_block<false>(panel, rows, a, stride, to, following, lines, waiting);
    waiting.put(each, 0, rows, to, scales);
}

#endif

}  // namespace moesaic
