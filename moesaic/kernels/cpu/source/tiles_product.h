// Rows times a panel by tiles, and rows of complete sums that wait for what becomes of them.
#pragma once

#include "unpacked_nibbles.h"

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
// between its tile instructions: tiles take long to be stored and read again, and vectors work beside them.
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

// The tiles of rows of a block that a product takes, and whether all of its sums at once.
enum class Ways { kOneTile, kTwoInTurn, kTwoAtOnce };

// One or two tiles of rows times a panel. A pair is two terms, or with kBytes four. Meanwhile `fetch` reads ahead, and of
// `rows`, which wait, one is done at every kEvery-th call.
template <bool kBytes, Stays stays, Ways ways, int kEvery, typename Fetch, typename Each>
[[gnu::noinline]] void block_by_tiles(const TileTerms (&terms)[1], const TileSums& sums, const Fetch& fetch,
                                      const CompleteRows<Each>& rows) {
    const auto beside = [ahead = fetch, complete = rows](int, int call) mutable __attribute__((always_inline)) {
        ahead.call();
        if (call % kEvery == kEvery - 1) complete.template one<kBytes>();
    };
    if constexpr (ways == Ways::kTwoAtOnce)
        multiply_four_at_once<stays, kBytes>(terms, sums, beside);
    else
        multiply_two_at_a_time<stays, 2, ways == Ways::kTwoInTurn, kBytes>(terms, sums, beside);
}
template <bool kBytes, Stays stays, Ways ways, typename Fetch, typename Each>
inline void block_by_tiles(const TileTerms (&terms)[1], const TileSums& sums, const Fetch& ahead, Waiting<Each>& waiting) {
    const int calls = terms[0].pairs / kPairBlock * 4;
    if (calls < kRowBlock) waiting.all();
    const CompleteRows<Each> rows = waiting.template take<kBytes>();
    if (calls / 2 < kRowBlock)
        block_by_tiles<kBytes, stays, ways, 1>(terms, sums, ahead, rows);
    else
        block_by_tiles<kBytes, stays, ways, 2>(terms, sums, ahead, rows);
}

// Rows, two tiles of them at a time, times some terms of a panel, [first, first + here) of `terms`, at `weights`.
// ahead_of(step, steps, calls of a step, lines to be read ahead, multiply) calls multiply(all that is to be read ahead).
template <bool kBytes, Stays stays, typename Each, typename AheadOf>
inline void tiles_pass(const uint8_t* weights, int first, int here, int terms, int rows, const char* a, size_t stride,
                       float* c, const Next& next, const SumScales& scales, const Each& each, Waiting<Each>& waiting,
                       AheadOf&& ahead_of) {
    const size_t lda = stride / 2;
    const bf16* left = reinterpret_cast<const bf16*>(a) + 2 * first;
    const int tiles = (rows + kTileRows - 1) / kTileRows, parts = (tiles + 1) / 2, calls = here / kPairBlock * 4;
    const bool is_last = first + here == terms;
    for (int part = 0; part < parts; ++part) {
        const bool has_two = 2 * part + 1 < tiles;
        const RowBlock top(rows, tiles, 2 * part), bottom(rows, tiles, 2 * part + has_two);
        const TileTerms operands[] = {{left + size_t(top.row) * lda, left + size_t(bottom.row) * lda, lda,
                                       reinterpret_cast<const uint32_t*>(weights), kPanel, here}};
        // Each tile's own place, since rows that two of them have must not be added to twice; complete sums lie together.
        float* upper = c + 2 * part * kTileRows * kPanel;
        float* lower = upper + kTileRows * kPanel;
        float* complete = is_last ? waiting.place() : nullptr;
        const TileSums sums(first > 0 ? upper : nullptr, first > 0 ? lower : nullptr, complete ? complete : upper,
                            complete ? complete + (bottom.row - top.row) * kPanel : lower, kPanel);
        has_two ? configure_products(top.size) : configure_top(top.size);
        ahead_of(part, parts, calls, next.lines_ahead(part, parts, first, here, terms, calls), [&](const auto& ahead) {
            if (!has_two)
                block_by_tiles<kBytes, stays, Ways::kOneTile>(operands, sums, ahead, waiting);
            else if (tile_sharing.takes_few())
                block_by_tiles<kBytes, stays, Ways::kTwoInTurn>(operands, sums, ahead, waiting);
            else
                block_by_tiles<kBytes, stays, Ways::kTwoAtOnce>(operands, sums, ahead, waiting);
        });
        if (is_last)
            waiting.put(each, top.first, bottom.row + bottom.size, complete + (top.first - top.row) * kPanel, scales);
    }
}

// Pairs of K whose weights stay in the first-level cache while all rows pass.
constexpr int kStayingPairs = int(kStayingBytes) / (kPanel * 4);

// Rows times a panel by tiles: of bf16, or of 8 bits, whose sums are int32 and have `scales`.
template <bool kBytes, typename Each>
inline void tiles_product(const uint8_t* panel, int pairs, int rows, const char* a, size_t stride, float* c,
                          const Next& next, const SumScales& scales, const Each& each, Waiting<Each>& waiting) {
    const bool is_one = rows <= kTileRows;
    const char* following = reinterpret_cast<const char*>(next.panel);
    for (int first = 0; first < pairs;) {
        const int here = is_one ? pairs : std::min(pairs - first, kStayingPairs), behind = first + here;
        const size_t length = size_t(here) * kPanel * 4;
        const char* own = reinterpret_cast<const char*>(panel) + size_t(first) * kPanel * 4;
        // One step reads ahead in its own panel; several bring what stays next.
        const int wanted = behind < pairs ? pairs - behind : following ? pairs : 0;
        const int most = is_one ? pairs : kStayingPairs;
        Streams streams(behind < pairs ? own + length : following, size_t(std::min(wanted, most)) * kPanel * 4);
        const auto pass = [&](auto stays, auto&& ahead_of) {
            tiles_pass<kBytes, decltype(stays)::value>(reinterpret_cast<const uint8_t*>(own), first, here, pairs, rows, a,
                                                       stride, c, next, scales, each, waiting, ahead_of);
        };
        if (is_one)
            pass(std::integral_constant<Stays, Stays::kRows>{},
                 [&](int, int, int, const LinesAhead& lines, auto&& multiply) {
                     if (PagesAhead::suits(length))
                         multiply(PagesAhead(own, length, following, lines));
                     else
                         multiply(StreamAndLinesAhead{StreamAhead(own + std::min(kAheadBytes, length), 4 * kPanel * 4,
                                                                  following ? own + length : nullptr, following),
                                                      lines});
                 });
        else
            pass(std::integral_constant<Stays, Stays::kPanel>{},
                 [&](int part, int parts, int calls, const LinesAhead& lines, auto&& multiply) {
                     streams.ahead(part, parts, calls, lines, [&](const auto& ahead) { multiply(ahead); });
                 });
        first = behind;
    }
}

// Up to 16 rows times a panel of 4 bits by tiles; the sums go to `to`. The panel is unpacked between the tile instructions
// into a few pieces of 2 KiB: pieces of 16 KiB unpacked before took 10 to 25 % longer (int4).
template <typename F, typename Each>
[[gnu::noinline]] void nibble_block(const NibblePanel<F>& panel, int rows, const char* a, size_t stride, float* to,
                                    const char* following, LinesAhead lines, Waiting<Each>& waiting) {
    using Lines = NibbleLines<F>;
    constexpr int kPieces = 4, kLead = 2, kLines = 16;  // kept; unpacked ahead; lines of each
    constexpr int kPacked = kLines * Lines::kDepth / 4;  // cache lines of nibbles of a piece
    constexpr int kHalf = Unpacking<F>::kMost;           // or all of a piece
    alignas(64) uint8_t ring[kPieces][2 * kLines * 64];
    const int count = unpacked_lines(panel) / kLines;
    const size_t size = panel.bytes(), step_bytes = size / size_t(count);
    const char* own = reinterpret_cast<const char*>(panel.data);
    configure_top(rows);
    if (count * 4 < kRowBlock) waiting.all();
    CompleteRows<Each> complete = waiting.template take<Lines::kIsBytes>();
    for (int piece = 0; piece < std::min(kLead, count); ++piece)
        for (int line = 0; line < kLines; line += kHalf)
            Unpacking<F>(panel, piece * kLines + line).unpack(0, kHalf, ring[piece] + 128 * line);
    tile_zero(0);
    tile_zero(1);
    for (int piece = 0; piece < count; ++piece) {
        const uint8_t* columns = ring[piece % kPieces];
        const int then = std::min(piece + kLead, count - 1) * kLines;
        [[maybe_unused]] const Unpacking<F> whole(panel, then);  // kHalf == kLines
        uint8_t* unpacked = ring[(piece + kLead) % kPieces];
        const char* row = a + size_t(piece) * 64;
        const size_t place = size_t(piece) * step_bytes + kAheadBytes;
        const char* ahead = place < size ? own + place : following + (place - size);
        const auto quarter = [&](int index) __attribute__((always_inline)) {
            constexpr int kEach = kPacked / 4, kFirst = kLines / 4;
            for (int i = index * kEach; i < (index + 1) * kEach; ++i) fetch(ahead + 64 * i);
            if (index == 0)  // the headers
                for (int i = 0; i < std::max(1, kLines / Lines::kOfSteps); ++i) fetch(ahead + 64 * (kPacked + i));
            if constexpr (kHalf == kLines)
                whole.unpack(index * kFirst, kFirst, unpacked + 128 * index * kFirst);
            else
                Unpacking<F>(panel, then + index * kFirst / kHalf * kHalf)
                    .unpack(index * kFirst % kHalf, kFirst, unpacked + 128 * index * kFirst);
            lines.call();
            complete.template one<Lines::kIsBytes>();
        };
        tile_load(4, row, stride);
        quarter(0);
        tile_load(6, columns, 128);
        tile_dot(Lines::kIsBytes, 0, 4, 6);
        quarter(1);
        quarter(2);
        tile_load(6, columns + 64, 128);
        tile_dot(Lines::kIsBytes, 1, 4, 6);
        quarter(3);
    }
    tile_store(0, to, kPanel * 4);
    tile_store(1, to + 16, kPanel * 4);
}

// As tiles_product, of a panel of 4 bits and more rows than one step takes, piece by piece of K: each is unpacked and then
// multiplied, while the packed one behind it comes nearer. (Unpacking the next one meanwhile took 10 to 30 % longer: two of
// them do not stay in the first-level cache.)
template <typename F, typename Each>
inline void nibble_pieces(const NibblePanel<F>& panel, int rows, const char* a, size_t stride, float* c, const Next& next,
                          const SumScales& scales, const Each& each, Waiting<Each>& waiting) {
    constexpr int kAtOnce = Unpacking<F>::kMost;
    alignas(64) uint8_t unpacked[kStayingBytes];
    const int lines = unpacked_lines(panel), most = rows > 128 ? kStayingPairs : kStayingPairs / 2;
    const int pieces = (lines + most - 1) / most, size = round_up((lines + pieces - 1) / pieces, 16);
    const auto place = [&](int line) { return panel.bytes() * size_t(line) / size_t(lines) / 64 * 64; };
    for (int first = 0; first < lines; first += size) {
        const int here = std::min(size, lines - first), behind = first + here;
        for (int line = 0; line < here; line += kAtOnce)
            Unpacking<F>(panel, first + line).unpack(0, kAtOnce, unpacked + 128 * line);
        const bool is_last = behind == lines;
        const uint8_t* from = !is_last ? panel.data + place(behind) : next.panel ? next.panel : panel.data;
        const size_t length = is_last ? place(size) : place(std::min(behind + size, lines)) - place(behind);
        tiles_pass<NibbleLines<F>::kIsBytes, Stays::kPanel>(
            unpacked, first, here, lines, rows, a, stride, c, next, scales, each, waiting,
            [&](int part, int parts, int calls, const LinesAhead& others, auto&& multiply) {
                // A line after the other: lines of each page in turn are 3 to 5 % slower here.
                const size_t share = length / size_t(parts) / 64 * 64;
                const StreamAhead stream(reinterpret_cast<const char*>(from) + share * size_t(part),
                                         (share + size_t(calls) - 1) / size_t(calls));
                multiply(StreamAndLinesAhead{stream, others});
            });
    }
}

// As tiles_product, of a panel of 4 bits.
template <typename F, typename Each>
inline void nibble_tiles_product(const NibblePanel<F>& panel, int rows, const char* a, size_t stride, float* c,
                                 const Next& next, const SumScales& scales, const Each& each, Waiting<Each>& waiting) {
    if (rows > kTileRows) {
        nibble_pieces(panel, rows, a, stride, c, next, scales, each, waiting);
        return;
    }
    const char* following = reinterpret_cast<const char*>(next.panel ? next.panel : panel.data);
    float* to = waiting.place();
    const int count = unpacked_lines(panel) / 16;
    const LinesAhead lines = next.lines_ahead(0, 1, 0, count, count, 4 * count);
    nibble_block(panel, rows, a, stride, to, following, lines, waiting);
    waiting.put(each, 0, rows, to, scales);
}

#endif

}  // namespace moesaic
