// Products of bf16 matrices with fp32 sums: C (M, N) = A (M, K) B (K, N).
//
// One form for every instruction set. A is row-major with K contiguous (in gemm_streamed without tiles pair after pair
// of K, as rows come that are contracted over). B is packed in panels of 32 columns: a panel is [K/2][32] dwords, dword
// (p, n) = B[2p][n] in its low half and B[2p+1][n] in its high half, which is a vector of AVX-512's dot product and a
// row of AMX's B tile alike. K is a multiple of 2 * kPairBlock (pad both sides with zeros), so that no kernel has a
// remainder in K; M is any number. The terms of a sum are added in the order of K, by blocks of 32 of them on AMX,
// whatever M and N are.
#pragma once

#include <cpuid.h>

#include <algorithm>
#include <type_traits>

#include "expanded.h"
#include "parallel.h"
#include "simd.h"
#include "tiles.h"

namespace moesaic {

constexpr int kPanel = 32;  // columns of a panel
constexpr size_t kStayingBytes = 32 << 10;  // of a panel, that stay in the first-level cache while all rows pass
#if defined(MOESAIC_TILES)
constexpr int kPairBlock = 16;  // pairs of K are a multiple of this
constexpr int kWholeRows = 64;  // rows in whole steps of every kernel: tiles take 16, and another shape for fewer
#else
constexpr int kPairBlock = 1;
constexpr int kWholeRows = 48;  // 12 and 6 divide it
#endif

// A number of rows that are made to be left operands: bf16, or where products expand it the same number in fp32.
using RowNumber = std::conditional_t<kExpandsRows, float, bf16>;
inline void store_number(bf16* to, Vf x) { store_bf16(to, x); }
#if defined(MOESAIC_EXPANDS_ROWS)
inline void store_number(float* to, Vf x) { store(to, high_bf16(bf16_high(x))); }
#endif

// Rows as the left operand of several products, ld numbers apart.
struct LeftRows {
    const RowNumber* rows;
    size_t ld;
};

// Rows 4 KiB apart share one set of the first-level cache, of 8 or 12 ways: a step's rows push each other out. Tiles
// load every line once.
inline bool share_cache_sets(size_t bytes_apart) { return !kHasTiles && bytes_apart % 4096 == 0; }

inline int round_up(int x, int multiple) { return (x + multiple - 1) / multiple * multiple; }

// Width fp32 sums to bf16 in memory, past the caches where the address allows.
template <int Width>
inline void stream_bf16(bf16* to, const Vf (&sums)[Width / W]) {
    const bool is_line = reinterpret_cast<uintptr_t>(to) % 64 == 0;
    for (int v = 0; v < Width / W; v += 2) {
        const Vi rows = to_bf16_rows(sums[v], sums[v + 1]);
        if (is_line)
            stream(to + v * W, rows);
        else
            storei(to + v * W, rows);
    }
}

#if defined(MOESAIC_TILES)

constexpr int kRowBlock = 32;  // rows that one step works on at best: two tiles
constexpr int kTileRows = 16;
template <int Width>
constexpr int row_block() {
    return kRowBlock;
}

// What a product by tiles reads ahead while it computes, a little at each of its calls between the tiles that it loads. All
// at once, the lines would fill the buffers that its own loads need: weights came from memory at 55 to 65 % of its rate.
//
// `step` bytes for every call, up to `end`, and behind that what begins at `then`.
struct StreamAhead {
    const char* from;
    size_t step;
    const char *end = nullptr, *then = nullptr;
    const char* until = from;

    StreamAhead(const char* at, size_t bytes, const char* last = nullptr, const char* following = nullptr)
        : from(at), step(bytes), end(last), then(following) {}
    MOESAIC_INLINE void call() {
        until += step;
        if (from == end) {
            until = then + (until - from);
            from = then;
        }
        for (; from < until; from += 64) fetch(from);
    }
};

// `count` cache lines, `stride` bytes apart, within so many calls: as many in every call until all are brought, since a
// branch that is mispredicted holds the tiles up.
struct LinesAhead {
    const char* line = nullptr;
    ptrdiff_t stride = 0;
    int each = 0, left = 0;

    LinesAhead() = default;
    LinesAhead(const char* from, size_t apart, int64_t count, int calls)
        : line(from), stride(ptrdiff_t(apart)), each(int((count + calls - 1) / calls)), left(int(count)) {}
    MOESAIC_INLINE void call() {
        if (left <= 0) return;
        for (int i = 0; i < each; ++i, line += stride) fetch(line);
        left -= each;
    }
};

// A stream, and lines.
struct StreamAndLinesAhead {
    StreamAhead stream;
    LinesAhead lines;
    MOESAIC_INLINE void call() {
        stream.call();
        lines.call();
    }
};

// Lines, and of streams in turn, an even number of them, kEach lines for every call.
template <int kEach>
struct StreamsAndLinesAhead {
    const char* at;
    ptrdiff_t pitch;
    int streams, stream;
    LinesAhead lines;
    MOESAIC_INLINE void call() {
        constexpr int kAtOnce = kEach < 2 ? kEach : 2;
        for (int done = 0; done < kEach; done += kAtOnce) {
            for (int i = 0; i < kAtOnce; ++i) fetch(at + i * pitch);
            stream += kAtOnce;
            at += kAtOnce * pitch;
            if (stream == streams) {
                stream = 0;
                at += 64 - streams * pitch;
            }
        }
        lines.call();
    }
};

// What one product reads ahead in its own panel, and then in the `following` one: lines of four pages of 4 KiB in turn,
// the next 16 KiB (Streams says why): 31.4 GB/s on two cores that read 29 one line after the other.
struct PagesAhead {
    static constexpr size_t kPage = 4096, kPages = 4;
    const char *at, *end, *following;
    int left = int(kPage / 64);  // lines of each page
    LinesAhead lines;

    static bool suits(size_t panel_bytes) { return panel_bytes % (kPages * kPage) == 0; }
    PagesAhead(const char* panel, size_t bytes, const char* next, const LinesAhead& other)
        : at(panel), end(panel + bytes), following(next ? next : panel), lines(other) {
        go_on();
    }
    void go_on() {
        at += kPages * kPage;
        if (at == end) at = following;
    }
    MOESAIC_INLINE void call() {
        for (int line = 0; line < 2; ++line, at += 64)
            for (size_t page = 0; page < kPages; ++page) fetch(at + page * kPage);
        left -= 2;
        if (left == 0) {
            left = int(kPage / 64);
            at -= kPage;
            go_on();
        }
        lines.call();
    }
};

// Memory that several products in turn bring nearer, in streams of 4 KiB. The processor's own prefetcher follows each and
// is ahead of it, so that a line is there almost at once and does not hold a buffer for as long as memory takes: products
// of 128 rows with a panel's 128 KiB beside them take 13.4 us; with one stream 17.5.
class Streams {
  public:
    Streams(const char* from, size_t bytes)
        : from_(from), streams_(streams_of(bytes)),
          pitch_((int64_t(bytes) + streams_ * 64 - 1) / (streams_ * 64) * 64), lines_(pitch_ / 64 * streams_) {}

    // Calls body(what to read ahead) for the product that brings its share, the last one up to `share` of `shares`, within
    // so many calls.
    template <typename Body>
    void ahead(int share, int shares, int calls, const LinesAhead& lines, Body&& body) {
        const int64_t wanted = lines_ * (share + 1) / shares - brought_;
        const auto bring = [&](auto each) {
            const StreamsAndLinesAhead<decltype(each)::value> what{
                from_ + brought_ / streams_ * 64 + brought_ % streams_ * pitch_, pitch_, streams_, int(brought_ % streams_),
                lines};
            brought_ += int64_t(calls) * decltype(each)::value;
            body(what);
        };
        if (wanted <= 0)
            bring(std::integral_constant<int, 0>{});
        else if (wanted <= calls)
            bring(std::integral_constant<int, 1>{});
        else if (wanted <= 2 * calls)
            bring(std::integral_constant<int, 2>{});
        else if (wanted <= 4 * calls)
            bring(std::integral_constant<int, 4>{});
        else
            bring(std::integral_constant<int, 8>{});
    }

  private:
    // Whole pages where there is an even number of them: in a shorter stream the processor's prefetcher has hardly begun.
    static int streams_of(size_t bytes) {
        constexpr size_t kPage = 4096;
        if (bytes > 0 && bytes % (2 * kPage) == 0) return int(bytes / kPage);
        return std::max(4, int((bytes + 4 * kPage - 1) / (4 * kPage) * 4));
    }

    const char* from_;
    int streams_;
    int64_t pitch_, lines_, brought_ = 0;
};

// The rows of one of several tiles of up to 16: as many in each, the last beginning with some of those before it, since a
// change of the tiles' shape takes as long as several products.
struct RowBlock {
    int size, row, first;  // rows; the first one; the first one that no step before has

    RowBlock(int rows, int steps, int step)
        : size((rows + steps - 1) / steps), row(std::min(step * size, rows - size)), first(step * size) {}
};

// The operand of a product that the next product has too, and that is to stay in the first-level cache: the other one
// goes past it. Both would push each other out, and a block's tiles would all come from the second level, at two thirds
// of the rate.
enum class Stays { kRows, kPanel };

// A part of K of a block's products: 16 rows from `top` and, where the block has 32, 16 from `bottom`, lda apart, times
// one or two tiles of columns.
struct TileTerms {
    const bf16 *top, *bottom;
    size_t lda;
    const uint32_t* b;
    size_t ldb;
    int pairs;
};

// A block's sums, rows ld apart: where the 16 upper rows and the lower ones come from (null: zero) and go to.
struct TileSums {
    const float *from_top, *from_bottom;
    float *top, *bottom;
    size_t ld;

    TileSums(const float* from, float* to, size_t apart)
        : from_top(from), from_bottom(from ? from + 16 * apart : nullptr), top(to), bottom(to + 16 * apart), ld(apart) {}
    TileSums(const float* from, const float* from_below, float* to, float* below, size_t apart)
        : from_top(from), from_bottom(from_below), top(to), bottom(below), ld(apart) {}
};

// Two tiles of sums, which share one operand: the columns of one tile of rows, or (kTall) the rows of one tile of
// columns. Calls beside(p, kFirst), then with the numbers that follow up to kCalls of them, for every 16 pairs.
template <Stays stays, bool kTall, int kSums, bool kBytes, int kFirst, int kCalls, typename Beside>
MOESAIC_INLINE void multiply_pair_of_tiles(const TileTerms& terms, Beside& beside) {
    constexpr bool kRowsStay = stays == Stays::kRows;
    const bf16 *top = terms.top, *bottom = terms.bottom;
    const uint32_t* b = terms.b;
    const size_t stride_a = terms.lda * 2, ldb = terms.ldb, stride_b = ldb * 4;
    for (int p = 0; p < terms.pairs; p += 16) {
        beside(p, kFirst);
        if constexpr (kTall)
            tile_load_stays(!kRowsStay, 6, b + p * ldb, stride_b);
        else
            tile_load_stays(kRowsStay, 4, top + 2 * p, stride_a);
        if constexpr (kCalls == 4) beside(p, kFirst + 1);
        if constexpr (kTall)
            tile_load_stays(kRowsStay, 4, top + 2 * p, stride_a);
        else
            tile_load_stays(!kRowsStay, 6, b + p * ldb, stride_b);
        tile_dot(kBytes, 0, 4, 6);
        beside(p, kFirst + kCalls / 2);
        if constexpr (kSums == 2) {
            if constexpr (kTall)
                tile_load_stays(kRowsStay, 4, bottom + 2 * p, stride_a);
            else
                tile_load_stays(!kRowsStay, 6, b + p * ldb + 16, stride_b);
            tile_dot(kBytes, 1, 4, 6);
        }
        if constexpr (kCalls == 4) beside(p, kFirst + 3);
    }
}

// A block of 2 x 2 tiles of sums in tiles 0 to 3, with 4 and 5 for rows and 6 for columns; calls beside(p, 0) to
// beside(p, 3) for every 16 pairs.
template <Stays stays, bool kBytes, typename Beside>
MOESAIC_INLINE void multiply_four_tiles(const TileTerms& terms, Beside& beside) {
    constexpr bool kRowsStay = stays == Stays::kRows;
    const size_t stride_a = terms.lda * 2, ldb = terms.ldb, stride_b = ldb * 4;
    const bf16 *top = terms.top, *bottom = terms.bottom;
    const uint32_t* b = terms.b;
    for (int p = 0; p < terms.pairs; p += 16) {
        beside(p, 0);
        tile_load_stays(kRowsStay, 4, top + 2 * p, stride_a);
        beside(p, 1);
        tile_load_stays(!kRowsStay, 6, b + p * ldb, stride_b);
        tile_dot(kBytes, 0, 4, 6);
        beside(p, 2);
        tile_load_stays(kRowsStay, 5, bottom + 2 * p, stride_a);
        tile_dot(kBytes, 2, 5, 6);
        beside(p, 3);
        tile_load_stays(!kRowsStay, 6, b + p * ldb + 16, stride_b);
        tile_dot(kBytes, 1, 4, 6);
        tile_dot(kBytes, 3, 5, 6);
    }
}

// For products of tiles of so many rows.
inline void configure_products(int rows) { configure_tiles(rows, tile_sharing.takes_few() ? 0 : rows); }

// Sums of a block, += the products of all `terms`: of 32 rows and two tiles of columns, four tiles of sums at once.
template <Stays stays, bool kBytes, size_t kParts, typename Beside>
MOESAIC_INLINE void multiply_four_at_once(const TileTerms (&terms)[kParts], const TileSums& sums, Beside what) {
    Beside beside = what;  // of its own, so that what it counts is in registers
    const size_t stride = sums.ld * 4;
    if (sums.from_top) {
        tile_load(0, sums.from_top, stride);
        tile_load(1, sums.from_top + 16, stride);
        tile_load(2, sums.from_bottom, stride);
        tile_load(3, sums.from_bottom + 16, stride);
    } else {
        tile_zero(0);
        tile_zero(1);
        tile_zero(2);
        tile_zero(3);
    }
    for (const TileTerms& part : terms) multiply_four_tiles<stays, kBytes>(part, beside);
    tile_store(0, sums.top, stride);
    tile_store(1, sums.top + 16, stride);
    tile_store(2, sums.bottom, stride);
    tile_store(3, sums.bottom + 16, stride);
}

// The same two tiles of sums at a time, or (not kBottom) of 16 rows, or of one tile of columns.
template <Stays stays, int Columns, bool kBottom, bool kBytes, size_t kParts, typename Beside>
MOESAIC_INLINE void multiply_two_at_a_time(const TileTerms (&terms)[kParts], const TileSums& sums, Beside what) {
    const size_t stride = sums.ld * 4;
    Beside beside = what;
    // Two tiles of sums, the first ones at from and to.
    const auto pass = [&](auto tall, auto count, auto first_call, auto calls, bool is_lower,
                          int column) __attribute__((always_inline)) {
        constexpr bool kTall = decltype(tall)::value, kTwo = decltype(count)::value == 2;
        const float* from = is_lower ? sums.from_bottom : sums.from_top + column;
        float* to = is_lower ? sums.bottom : sums.top + column;
        if (sums.from_top) {
            tile_load(0, from, stride);
            if constexpr (kTwo) tile_load(1, kTall ? sums.from_bottom + column : from + 16, stride);
        } else {
            tile_zero(0);
            if constexpr (kTwo) tile_zero(1);
        }
        for (size_t part = 0; part < kParts; ++part) {
            TileTerms own = terms[part];
            if (is_lower) own.top = own.bottom;
            own.b += column;
            multiply_pair_of_tiles<stays, kTall, decltype(count)::value, kBytes, decltype(first_call)::value,
                                   decltype(calls)::value>(own, beside);
        }
        tile_store(0, to, stride);
        if constexpr (kTwo) tile_store(1, kTall ? sums.bottom + column : to + 16, stride);
    };
    using std::integral_constant;
    using Wide = std::false_type;
    using Tall = std::true_type;
    constexpr integral_constant<int, 0> kZero{};
    constexpr integral_constant<int, 2> kTwo{};
    constexpr integral_constant<int, 4> kFour{};
    if constexpr (!kBottom) {
        pass(Wide{}, integral_constant<int, Columns>{}, kZero, kFour, false, 0);
    } else if constexpr (Columns == 1) {
        pass(Tall{}, kTwo, kZero, kFour, false, 0);
    } else if constexpr (stays == Stays::kPanel) {
        pass(Wide{}, kTwo, kZero, kTwo, false, 0);
        pass(Wide{}, kTwo, kTwo, kTwo, true, 0);
    } else {
        pass(Tall{}, kTwo, kZero, kTwo, false, 0);
        pass(Tall{}, kTwo, kTwo, kTwo, false, 16);
    }
}

// Sums of a block of 16 or (kBottom) 32 rows and one or two tiles of columns, += the products of all `terms`. Calls
// beside(p, quarter) four times for every 16 pairs: what other work it does runs while the tiles are multiplied. With kBytes
// a pair of terms is four terms of 8 bits, signed in rows and unsigned in columns, and sums are int32.
//
// Four tiles of sums at once, or two at a time (TileSharing says when): then the operand that stays is loaded twice as often,
// from the first-level cache, and the other one once, as before. A sum's terms come in the same order either way.
template <Stays stays, int Columns, bool kBottom, bool kBytes = false, size_t kParts, typename Beside>
MOESAIC_INLINE void multiply_tiles(const TileTerms (&terms)[kParts], const TileSums& sums, const Beside& beside) {
    if constexpr (kBottom && Columns == 2)
        if (!tile_sharing.takes_few()) {
            multiply_four_at_once<stays, kBytes>(terms, sums, beside);
            return;
        }
    multiply_two_at_a_time<stays, Columns, kBottom, kBytes>(terms, sums, beside);
}

// One or two tiles of columns; see gemm.
template <int Columns, Stays stays>
inline void gemm_tiles(int rows, int pairs, const bf16* a, size_t lda, const uint32_t* b, size_t ldb, float* c, size_t ldc,
                       bool accumulate) {
    for (int row = 0; row < rows;) {
        const bf16* top = a + size_t(row) * lda;
        const TileTerms terms[] = {{top, top + 16 * lda, lda, b, ldb, pairs}};
        float* to = c + size_t(row) * ldc;
        const TileSums sums(accumulate ? to : nullptr, to, ldc);
        if (rows - row >= 32) {
            configure_products(16);
            multiply_tiles<stays, Columns, true>(terms, sums, [](int, int) {});
            row += 32;
        } else {
            configure_products(std::min(16, rows - row));
            multiply_tiles<stays, Columns, false>(terms, sums, [](int, int) {});
            row += 16;
        }
    }
}

// Rows that vectors multiply with a panel faster than tiles, which load 16 lines at once: plain loads from two places in
// turn come at 29 to 34 GB/s on two cores, tiles' at 28 to 29. With three rows vectors are no faster. Sapphire and Emerald
// Rapids are another core, which seems to read less ahead by itself: there one row comes at 22 GB/s by vectors (5 to
// 16 % more with lines fetched ahead) and at 27 to 33 by tiles. (Measured on the second.)
constexpr int kVectorRows = 2;
constexpr int kVectorPairs = 1024;  // of K multiplied at once
inline bool vectors_are_faster() {
#if defined(MOESAIC_EMULATE_TILES)
    return true;
#else
    unsigned version = 0, other = 0;
    if (!__get_cpuid(1, &version, &other, &other, &other)) return true;
    const unsigned family = version >> 8 & 15, model = (version >> 4 & 15) | (version >> 12 & 0xf0);
    return family != 6 || (model != 143 && model != 207);
#endif
}
inline const int vector_rows = vectors_are_faster() ? kVectorRows : 0;

// Blocks of 32 terms of R rows times a panel, one each from kPlaces places, `apart` pairs apart in K: a place's sums of
// block t go to sums[place] + t * R * 32.
template <int R, int kPlaces>
MOESAIC_INLINE void vector_blocks(int blocks, int apart, const bf16* a, size_t lda, const uint32_t* b,
                                  float* const (&sums)[kPlaces]) {
    constexpr int V = kPanel / W, kTurn = 2;  // pairs of one place before the other has its turn
    for (int block = 0; block < blocks; ++block) {
        Vf even[kPlaces][R][V], odd[kPlaces][R][V];
        for (int place = 0; place < kPlaces; ++place)
            for (int r = 0; r < R; ++r)
                for (int v = 0; v < V; ++v) even[place][r][v] = odd[place][r][v] = zero();
        for (int first = block * kPairBlock; first < (block + 1) * kPairBlock; first += kTurn)
            for (int place = 0; place < kPlaces; ++place)
                for (int p = place * apart + first; p < place * apart + first + kTurn; ++p)
                    for (int v = 0; v < V; ++v) {
                        const Vi columns = loadi(b + p * kPanel + v * W);
                        for (int r = 0; r < R; ++r) {
                            const Vi row = broadcast_dword(a + r * lda + 2 * p);
                            even[place][r][v] = fma(low_bf16(row), low_bf16(columns), even[place][r][v]);
                            odd[place][r][v] = fma(high_bf16(row), high_bf16(columns), odd[place][r][v]);
                        }
                    }
        for (int place = 0; place < kPlaces; ++place)
            for (int r = 0; r < R; ++r)
                for (int v = 0; v < V; ++v)
                    store(sums[place] + (block * R + r) * kPanel + v * W, add(even[place][r][v], odd[place][r][v]));
    }
}

// C[R][32] = A[R][2 * pairs] * panel by vectors, bit for bit what tiles make of it: the sums of even and of odd terms of
// 32 apart, then both to the sum so far.
template <int R>
inline void multiply_by_vectors(int pairs, const bf16* a, size_t lda, const uint32_t* b, float* c) {
    const FlushedSubnormals flushed;
    alignas(64) float sums[kVectorPairs / kPairBlock * R * kPanel];
    for (int n = 0; n < R * kPanel; n += W) store(c + n, zero());
    for (int first = 0; first < pairs; first += kVectorPairs) {
        const int here = std::min(kVectorPairs, pairs - first) / kPairBlock, half = here / 2;
        const bf16* left = a + 2 * first;
        const uint32_t* panel = b + size_t(first) * kPanel;
        float* const upper = sums + (here - half) * R * kPanel;
        vector_blocks<R, 2>(half, (here - half) * kPairBlock, left, lda, panel, {sums, upper});
        if (here % 2)
            vector_blocks<R, 1>(1, 0, left + half * 2 * kPairBlock, lda, panel + half * kPairBlock * kPanel,
                                {sums + half * R * kPanel});
        for (int block = 0; block < here; ++block)
            for (int n = 0; n < R * kPanel; n += W) store(c + n, add(load(c + n), load(sums + block * R * kPanel + n)));
    }
}
inline void multiply_by_vectors(int rows, int pairs, const bf16* a, size_t lda, const uint32_t* b, float* c) {
    static_assert(kVectorRows == 2);
    rows == 1 ? multiply_by_vectors<1>(pairs, a, lda, b, c) : multiply_by_vectors<2>(pairs, a, lda, b, c);
}

// C[rows][Width] (+)= A[rows][2 * pairs] * B; Width 16 or 32; lda in elements, ldb in dwords, ldc in floats.
template <int Width>
inline void gemm(int rows, int pairs, const bf16* a, size_t lda, const uint32_t* b, size_t ldb, float* c, size_t ldc,
                 bool accumulate) {
    static_assert(Width == 16 || Width == 32);
    // A panel stays while several blocks of rows pass, and few rows while panels do.
    rows > 32 ? gemm_tiles<Width / 16, Stays::kPanel>(rows, pairs, a, lda, b, ldb, c, ldc, accumulate)
              : gemm_tiles<Width / 16, Stays::kRows>(rows, pairs, a, lda, b, ldb, c, ldc, accumulate);
}

// Equal parts of other work, done between the tile instructions of a product.
template <typename Part>
struct Beside {
    Part part;
    int parts, calls;  // calls: how often the product calls
    int done = 0, due = 0;

    Beside(Part what, int count, int times) : part(what), parts(count), calls(times) {}
    void call() {
        for (due += parts; due >= calls; due -= calls) part(done++);
    }
};

// Pieces of memory, `pitch` bytes apart, brought into the second-level cache bit by bit, by as many calls, before they
// are needed; more than its share of the cache is not.
class BroughtNearer {
  public:
    BroughtNearer(const void* from, int64_t bytes, int64_t pitch, int64_t pieces, int64_t calls)
        : piece_(static_cast<const char*>(from)), bytes_(bytes), pitch_(pitch), pieces_(pieces) {
        if (!fits(bytes * pieces) || bytes <= 0 || calls <= 0) pieces_ = 0;
        if (pieces_ > 0) rate_ = unsigned(std::min<int64_t>((bytes * pieces * 4 + calls - 1) / calls, 1 << 14));
    }
    BroughtNearer(const void* from, int64_t bytes, int64_t calls) : BroughtNearer(from, bytes, 0, 1, calls) {}
    static bool fits(int64_t bytes) { return bytes <= kMostBytes; }
    void operator()() {
        for (due_ += rate_; due_ >= 256 && pieces_ > 0; due_ -= 256) {
            fetch(piece_ + at_);
            if ((at_ += 64) < bytes_) continue;
            at_ = 0;
            piece_ += pitch_;
            --pieces_;
        }
    }

  private:
    static constexpr int64_t kMostBytes = 5 << 17;
    const char* piece_;
    int64_t bytes_, pitch_, pieces_, at_ = 0;
    unsigned rate_ = 0, due_ = 0;  // lines for every call, in 256ths
};

// C[rows][columns] = A * the panels that begin at b, rounded to bf16 and written past the caches: two lines of a row at
// a time, which memory takes at 43 GB/s; one line of each of 32 rows at 25. A is row after row, lda dwords apart; rows
// are a multiple of 32.
inline void gemm_streamed(int rows, int pairs, const uint32_t* a, size_t lda, const uint32_t* b, int64_t columns,
                          bf16* c, size_t ldc) {
    constexpr int kBlock = 32;
    // Blocks of sums that wait to be written, one or two side by side, and the ones that are being made: in the same place
    // where they are stored together, when all that waited is written.
    alignas(64) float blocks[2][2][kBlock * kPanel];
    const int step = tile_sharing.takes_few();
    int lines = 0, turn = 0;  // of a row of what waits; which blocks those are
    bf16* to = nullptr;       // where
    auto write = [&](int row) {
        for (int side = 0; side < lines; ++side) {
            Vf line[kPanel / W];
            for (int v = 0; v < kPanel / W; ++v) line[v] = load(blocks[turn][side] + row * kPanel + v * W);
            stream_bf16<kPanel>(to + row * ldc + side * kPanel, line);
        }
    };
    const int calls = pairs / 16 * 2;
    configure_products(16);
    auto block = [&](int row, int64_t column, int side, BroughtNearer& next, auto stays) {
        Beside writing(write, lines ? kBlock : 0, calls);
        const bf16* top = reinterpret_cast<const bf16*>(a + row * lda);
        const TileTerms terms[] = {{top, top + 32 * lda, 2 * lda, b + column * pairs, kPanel, pairs}};
        multiply_tiles<decltype(stays)::value, 2, true>(terms, TileSums(nullptr, blocks[turn ^ step][side], kPanel),
                                                        [&](int, int quarter) {
                                                            if (quarter % 2 == 0) return;
                                                            writing.call();
                                                            next();
                                                        });
        lines = 0;
    };
    auto wait = [&](int row, int64_t column, int count) {
        lines = count;
        turn ^= step;
        to = c + row * ldc + column;
    };
    using Rows = std::integral_constant<Stays, Stays::kRows>;
    using Panel = std::integral_constant<Stays, Stays::kPanel>;
    // Few pairs: all panels stay in the first-level cache, and need no line buffer beside the writing.
    const bool panels_stay = int64_t(pairs) * columns * 4 <= int64_t(kStayingBytes);
    if (int64_t(pairs) * columns <= (1 << 18)) {
        for (int row = 0; row < rows; row += kBlock) {
            BroughtNearer next(a + (row + kBlock) * lda, row + kBlock < rows ? int64_t(kBlock * lda * 4) : 0,
                               columns / kPanel * calls);
            for (int64_t column = 0; column < columns; column += 2 * kPanel) {
                const int sides = columns - column > kPanel ? 2 : 1;
                for (int side = 0; side < sides; ++side)
                    panels_stay ? block(row, column + side * kPanel, side, next, Panel{})
                                : block(row, column + side * kPanel, side, next, Rows{});
                wait(row, column, sides);
            }
        }
    } else {
        // Panels that do not stay in the cache are read once for all rows.
        for (int64_t column = 0; column < columns; column += kPanel) {
            BroughtNearer next(b + (column + kPanel) * pairs,
                               column + kPanel < columns ? int64_t(pairs) * kPanel * 4 : 0, rows / kBlock * calls);
            for (int row = 0; row < rows; row += kBlock) {
                block(row, column, 0, next, Panel{});
                wait(row, column, 1);
            }
        }
    }
    for (int row = 0; row < kBlock; ++row) write(row);
}

#else

// Rows of one step: what fits the registers beside a row of B and one element of A.
template <int Width>
constexpr int row_block() {
#if defined(__AVX512F__)
    return Width == 48 ? 8 : 12;  // 24 of 32 registers hold sums
#else
    return 6;
#endif
}
constexpr int kRowBlock = row_block<kPanel>();

#if !defined(MOESAIC_EXPANDS_ROWS)

// What becomes of a row's sums: stored as fp32.
template <int Width>
struct StoreFp32 {
    float* c;
    size_t ldc;
    static constexpr bool kLoads = true;
    Vf load_sum(int r, int v) const { return load(c + r * ldc + v * W); }
    void finish(int r, const Vf (&sums)[Width / W]) const {
        for (int v = 0; v < Width / W; ++v) store(c + r * ldc + v * W, sums[v]);
    }
    StoreFp32 rows_further(int rows) const { return {c + rows * ldc, ldc}; }
};

// Stored as bf16, past the caches.
template <int Width>
struct StreamBf16 {
    bf16* c;
    size_t ldc;
    static constexpr bool kLoads = false;
    Vf load_sum(int, int) const { return zero(); }
    void finish(int r, const Vf (&sums)[Width / W]) const { stream_bf16<Width>(c + r * ldc, sums); }
    StreamBf16 rows_further(int rows) const { return {c + rows * ldc, ldc}; }
};

// The left operand, row after row.
template <bool Prefetch>
struct RowMajor {
    const bf16* a;
    size_t lda;      // in elements
    size_t block;    // from one block of K to the next
    ptrdiff_t next;  // to the rows that are brought nearer

    static constexpr int kPass = Prefetch ? 16 : 1 << 20;  // pairs between two looks ahead: a line of every row
    template <int R>
    void read_ahead(int p) const {
        if constexpr (Prefetch)
            for (int r = 0; r < R; ++r) fetch(a + next + r * lda + 2 * p);
    }
    Vi pair(int r, int p) const { return broadcast_dword(a + r * lda + 2 * p); }
    RowMajor rows_further(int rows) const { return {a + rows * lda, lda, block, next}; }
    void go_on() { a += block; }
};

// Pair after pair of K, each with all rows, in one block.
struct PairMajor {
    const uint32_t* a;
    size_t lda;  // in dwords

    static constexpr int kPass = 1 << 20;
    template <int R>
    void read_ahead(int) const {}
    Vi pair(int r, int p) const { return broadcast_dword(a + p * lda + r); }
    PairMajor rows_further(int rows) const { return {a + rows, lda}; }
    void go_on() {}
};

template <int R, int Width, typename Left, typename Out>
inline void gemm_rows(int pairs, Left left, const uint32_t* b, size_t ldb, Out out, bool accumulate, int blocks) {
    constexpr int V = Width / W;
    Vf acc[R][V];
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < V; ++v) acc[r][v] = Out::kLoads && accumulate ? out.load_sum(r, v) : zero();
    for (int block = 0; block < blocks; ++block) {
        for (int first = 0; first < pairs; first += Left::kPass) {
            const int end = pairs - first < Left::kPass ? pairs : first + Left::kPass;
            left.template read_ahead<R>(first);
#pragma GCC unroll 2
            for (int p = first; p < end; ++p) {
                Vi columns[V];
                for (int v = 0; v < V; ++v) columns[v] = loadi(b + p * ldb + v * W);
                for (int r = 0; r < R; ++r) {
                    const Vi row = left.pair(r, p);
                    for (int v = 0; v < V; ++v) acc[r][v] = dot_bf16(acc[r][v], row, columns[v]);
                }
            }
        }
        left.go_on();
        b += size_t(pairs) * ldb;
    }
    for (int r = 0; r < R; ++r) out.finish(r, acc[r]);
}

template <int R, int Width, typename Left, typename Out>
inline void gemm_remainder(int rows, int pairs, Left left, const uint32_t* b, size_t ldb, Out out, bool accumulate,
                           int blocks) {
    if constexpr (R > 0) {
        if (rows == R)
            gemm_rows<R, Width>(pairs, left, b, ldb, out, accumulate, blocks);
        else
            gemm_remainder<R - 1, Width>(rows, pairs, left, b, ldb, out, accumulate, blocks);
    }
}

template <int Width, typename Left, typename Out>
inline void gemm_into(int rows, int pairs, Left left, const uint32_t* b, size_t ldb, Out out, bool accumulate = false,
                      int blocks = 1) {
    constexpr int R = row_block<Width>();
    int row = 0;
    for (; row + R <= rows; row += R)
        gemm_rows<R, Width>(pairs, left.rows_further(row), b, ldb, out.rows_further(row), accumulate, blocks);
    gemm_remainder<R - 1, Width>(rows - row, pairs, left.rows_further(row), b, ldb, out.rows_further(row), accumulate,
                                 blocks);
}

// C[rows][Width] (+)= A[rows][2 * pairs] * B; Width 16, 32 or 48; lda in elements, ldb in dwords, ldc in floats.
// With `next`, the rows that begin there, lda apart as well, are brought nearer meanwhile. With blocks > 1, K is that many
// times 2 * pairs: A goes on a_block elements further for each, B where it stopped.
template <int Width>
inline void gemm(int rows, int pairs, const bf16* a, size_t lda, const uint32_t* b, size_t ldb, float* c, size_t ldc,
                 bool accumulate, const bf16* next = nullptr, int blocks = 1, size_t a_block = 0) {
    const StoreFp32<Width> out{c, ldc};
    if (next)
        gemm_into<Width>(rows, pairs, RowMajor<true>{a, lda, a_block, next - a}, b, ldb, out, accumulate, blocks);
    else
        gemm_into<Width>(rows, pairs, RowMajor<false>{a, lda, a_block, 0}, b, ldb, out, accumulate, blocks);
}

// C[rows][panels * 32] (+)= A * panels, each panel_dwords after the one before; the rest as above.
inline void gemm_panels(int rows, int pairs, const bf16* a, size_t lda, const uint32_t* b, size_t panel_dwords, int panels,
                        float* c, size_t ldc, bool accumulate, int blocks = 1, size_t a_block = 0,
                        const bf16* next = nullptr) {
    for (int j = 0; j < panels; ++j)
        gemm<kPanel>(rows, pairs, a, lda, b + j * panel_dwords, kPanel, c + j * kPanel, ldc, accumulate,
                     j == 0 ? next : nullptr, blocks, a_block);
}

// C[rows][columns] = A * the panels that begin at b, rounded to bf16 and written past the caches. A is pair after pair,
// lda dwords apart.
inline void gemm_streamed(int rows, int pairs, const uint32_t* a, size_t lda, const uint32_t* b, int64_t columns,
                          bf16* c, size_t ldc) {
    // Whole rows at a time while all panels stay in the cache, since memory is written fastest in long pieces.
    const int step = int64_t(pairs) * columns <= (1 << 17) ? kRowBlock : rows;
    for (int row = 0; row < rows; row += step)
        for (int64_t column = 0; column < columns; column += kPanel)
            gemm_into<kPanel>(rows - row < step ? rows - row : step, pairs, PairMajor{a + row, lda}, b + column * pairs,
                              kPanel, StreamBf16<kPanel>{c + row * ldc + column, ldc});
}

#else

constexpr int kTogether = 8 * kRowBlock;  // rows that pass a piece of a panel one step after the other

// As multiply_columns, for the number of rows that there is.
template <int R, int Width, typename Place>
inline void multiply_up_to(int rows, int dwords, const float* x, size_t ldx, const uint32_t* b, size_t ldb, float* sums,
                           size_t ld, bool accumulate) {
    if constexpr (R > 0) {
        NothingRead nothing;
        if (rows == R)
            multiply_columns<R, Width, Place>(dwords, x, ldx, reinterpret_cast<const char*>(b), ldb * 4, sums, ld,
                                              accumulate, nothing);
        else
            multiply_up_to<R - 1, Width, Place>(rows, dwords, x, ldx, b, ldb, sums, ld, accumulate);
    }
}

// C[rows][Width] (+)= A[rows][2 * pairs] * B, of rows that are expanded; lda in floats, the rest as below.
template <int Width>
inline void gemm(int rows, int pairs, const float* a, size_t lda, const uint32_t* b, size_t ldb, float* c, size_t ldc,
                 bool accumulate) {
    constexpr int R = row_block<Width>();
    const int steps = (rows + R - 1) / R;
    for (int first = 0; first < pairs; first += kExpandedDwords)
        for (int step = 0; step < steps; ++step) {
            const int row = rows * step / steps, end = rows * (step + 1) / steps;  // equal ones, or 32 would leave 2
            multiply_up_to<R, Width, RowsExpanded>(
                end - row, std::min(kExpandedDwords, pairs - first), a + row * lda + 2 * first, lda, b + first * ldb, ldb,
                c + row * ldc, ldc, accumulate || first > 0);
        }
}

// Rows of a left operand for several products: expanded once for all of them.
inline LeftRows left_rows(const bf16* rows, size_t ld, int count, int64_t width, Scratch& scratch) {
    const size_t apart = spread_rows(size_t(width) * sizeof(float)) / sizeof(float);
    float* to = scratch.get<float>(size_t(count) * apart);
    for (int r = 0; r < count; ++r) expand_row(int(width / 2), rows + r * ld, to + r * apart);
    return {to, apart};
}

// Calls body(row, count, first pair, pairs, x, floats between its rows) with expanded pieces of A, in the order of K, and
// fetches the rows that begin at `next` meanwhile.
template <typename Body>
inline void for_expanded(int rows, int pairs, const bf16* a, size_t lda, const bf16* next, Body&& body) {
    alignas(64) float x[kTogether * kPieceRow];
    for (int row = 0; row < rows; row += kTogether) {
        const int count = std::min(kTogether, rows - row);
        for (int first = 0; first < pairs; first += kExpandedDwords) {
            const int here = std::min(kExpandedDwords, pairs - first);
            for (int r = 0; r < count; ++r) {
                const size_t at = size_t(row + r) * lda + 2 * first;
                for (int p = 0; next && p < here; p += 16) fetch(next + at + 2 * p);
                expand_row(here, a + at, x + r * kPieceRow);
            }
            body(row, count, first, here, x, kPieceRow);
        }
    }
}

// C[rows][Width] (+)= A[rows][2 * pairs] * B; Width 16, 32 or 48; lda in elements, ldb in dwords, ldc in floats.
template <int Width>
inline void gemm(int rows, int pairs, const bf16* a, size_t lda, const uint32_t* b, size_t ldb, float* c, size_t ldc,
                 bool accumulate) {
    for_expanded(rows, pairs, a, lda, nullptr, [&](int row, int count, int first, int here, const float* x, size_t ldx) {
        gemm<Width>(count, here, x, ldx, b + first * ldb, ldb, c + row * ldc, ldc, accumulate || first > 0);
    });
}

// C[rows][panels * 32] (+)= A * panels, each panel_dwords after the one before. With blocks > 1, K is that many times
// 2 * pairs: A goes on a_block elements further for each, B where it stopped. With `next`, the rows that begin there, lda
// apart as well, are brought nearer meanwhile.
inline void gemm_panels(int rows, int pairs, const bf16* a, size_t lda, const uint32_t* b, size_t panel_dwords, int panels,
                        float* c, size_t ldc, bool accumulate, int blocks = 1, size_t a_block = 0,
                        const bf16* next = nullptr) {
    for (int block = 0; block < blocks; ++block, a += a_block, b += size_t(pairs) * kPanel)
        for_expanded(rows, pairs, a, lda, block == 0 ? next : nullptr,
                     [&](int row, int count, int first, int here, const float* x, size_t ldx) {
                         for (int j = 0; j < panels; ++j)
                             gemm<kPanel>(count, here, x, ldx, b + j * panel_dwords + first * kPanel, kPanel,
                                          c + row * ldc + j * kPanel, ldc, accumulate || block > 0 || first > 0);
                     });
}

// C[rows][columns] = A * the panels that begin at b, rounded to bf16 and written past the caches. A is pair after pair,
// lda dwords apart. Rows are expanded once for all panels, as many together as stay in the second-level cache; of long K a
// slice at a time, whose sums wait, or the panels, which no cache holds then, would be read for every six rows.
inline void gemm_streamed(int rows, int pairs, const uint32_t* a, size_t lda, const uint32_t* b, int64_t columns,
                          bf16* c, size_t ldc) {
    constexpr int kSlicePairs = 512, kExpandedBytes = 128 << 10, R = kRowBlock;
    static_assert(R <= W);
    const int slice = std::min(pairs, kSlicePairs);
    const size_t step_floats = size_t(slice) * 2 * W;
    const int together = std::min(int(kExpandedBytes / (step_floats * sizeof(float))) * R, kTogether);
    static thread_local Scratch expanded, waiting;
    float* x = expanded.get<float>(size_t(together / R) * step_floats);
    // Sums of a row from one panel to the next: their own places only where they wait for the next slice.
    const size_t ld = pairs > slice ? size_t(columns) : kPanel;
    float* sums = waiting.get<float>(size_t(together) * ld);
    for (int row = 0; row < rows; row += together) {
        const int here = std::min(together, rows - row);
        for (int start = 0; start < pairs; start += slice) {
            const int end = std::min(start + slice, pairs);
            for (int r = 0; r < here; r += R)
                for (int p = start; p < end; ++p) {
                    const float* terms = reinterpret_cast<const float*>(a + p * lda + row + r);
                    const Vi both = as_int(load_first(terms, std::min(R, here - r)));
                    float* to = x + r / R * step_floats + (p - start) * 2 * W;
                    store(to, low_bf16(both));
                    store(to + W, high_bf16(both));
                }
            for (int64_t column = 0; column < columns; column += kPanel) {
                float* place = pairs > slice ? sums + column : sums;
                for (int first = start; first < end; first += kExpandedDwords)
                    for (int r = 0; r < here; r += R)
                        multiply_up_to<R, kPanel, DwordsExpanded>(
                            std::min(R, here - r), std::min(kExpandedDwords, end - first),
                            x + r / R * step_floats + (first - start) * 2 * W, 0, b + column * pairs + first * kPanel,
                            kPanel, place + r * ld, ld, first > 0);
                for (int r = 0; end == pairs && r < here; ++r) {
                    Vf line[kPanel / W];
                    for (int v = 0; v < kPanel / W; ++v) line[v] = load(place + r * ld + v * W);
                    stream_bf16<kPanel>(c + (row + r) * ldc + column, line);
                }
            }
        }
    }
}

#endif

#endif

#if !defined(MOESAIC_EXPANDS_ROWS)
// Rows of a left operand for several products: as they lie.
inline LeftRows left_rows(const bf16* rows, size_t ld, int, int64_t, Scratch&) { return {rows, ld}; }
#endif

// C[rows][32] (+)= A[rows][2 * pairs] * panel.
inline void gemm_panel(int rows, int pairs, const bf16* a, size_t lda, const uint32_t* b, size_t ldb, float* c,
                       size_t ldc, bool accumulate) {
    gemm<kPanel>(rows, pairs, a, lda, b, ldb, c, ldc, accumulate);
}

}  // namespace moesaic
