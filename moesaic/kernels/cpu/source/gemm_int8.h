// Products of 8-bit activations with 8-bit and 4-bit weights: exact in int32 over all of K, for MXFP4 inside a group of it.
//
// kernels/quantized.py is the definition, to the bit, on every instruction set and for every number of rows. Weights
// are unsigned bytes (value + 128, or a nibble, value + 8) in panels of 32 columns, activations signed bytes; what the
// offset adds to a dot product is the offset times the sum of the activations, which is known from quantising them. (AVX2
// alone takes the offset of 8 bits off the weights instead.) MXFP4 where there are tiles: rows of 9 bits, which tiles take
// as bf16 numbers (tiles_product.h) and few of them vectors as magnitudes and signs, with the same results.
//
// A panel of 8 bits is [K/4][32][4 bytes], K padded to 64. One of 4 bits is, for each group of K, a header of its 32 steps
// in 16 bits and then [group/4][16][4 bytes], each byte with column n in the low nibble and column n + 16 in the high one.
// A step times a weight is what 8 bits would hold. MXFP4 has headers of as many bytes for 64 values of K: 32 scales for the
// first 32 of them and then 32 for the others.
#pragma once

#include <unistd.h>

#include <limits>

#include "gemm_bf16.h"
#include "quantized_row.h"

namespace moesaic {

constexpr int kActivationBlock = QuantizedRow::kBlock;  // columns of a row in one step of the loops over K

#if defined(__AVX512F__)

// sums[i] += the four products of unsigned bytes of weights[i] and signed bytes of activations[i].
inline Vi dot_bytes(Vi sums, Vi weights, Vi activations) {
#if defined(MOESAIC_EMULATE_AVX512)
    sums.v = _mm512_dpbusd_epi32(sums.v, weights.v, activations.v);
#else
    // Not the intrinsic: GCC 12 copies and spills its accumulators, at three quarters of the speed.
    asm("vpdpbusd %2, %1, %0" : "+v"(sums.v) : "v"(weights.v), "v"(activations.v));
#endif
    return sums;
}

// sums += the four products of every dword of columns and the four bytes at `term`. One piece of assembly, as add_products.
#if defined(MOESAIC_EMULATE_AVX512)
template <int V>
inline void add_byte_products(Vi (&sums)[V], const char& term, const Vi (&columns)[V]) {
    for (int v = 0; v < V; ++v) sums[v] = dot_bytes(sums[v], columns[v], broadcast_dword(&term));
}
#else
MOESAIC_INLINE void add_byte_products(Vi (&sums)[2], const char& term, const Vi (&columns)[2]) {
    Vi all;
    asm("vpbroadcastd %3, %2\n\tvpdpbusd %2, %4, %0\n\tvpdpbusd %2, %5, %1"
        : "+&v"(sums[0].v), "+&v"(sums[1].v), "=&v"(all.v)
        : "m"(reinterpret_cast<const int32_t&>(term)), "v"(columns[0].v), "v"(columns[1].v));
}
MOESAIC_INLINE void add_byte_products(Vi (&sums)[4], const char& term, const Vi (&columns)[4]) {
    Vi all;
    asm("vpbroadcastd %5, %4\n\tvpdpbusd %4, %6, %0\n\tvpdpbusd %4, %7, %1\n\t"
        "vpdpbusd %4, %8, %2\n\tvpdpbusd %4, %9, %3"
        : "+&v"(sums[0].v), "+&v"(sums[1].v), "+&v"(sums[2].v), "+&v"(sums[3].v), "=&v"(all.v)
        : "m"(reinterpret_cast<const int32_t&>(term)), "v"(columns[0].v), "v"(columns[1].v), "v"(columns[2].v),
          "v"(columns[3].v));
}
#endif

#endif

// The four products of words of a and b, two to every dword, added to sums.
inline Vi dot_words(Vi sums, Vi a, Vi b) {
#if defined(__AVX512F__)
    return {_mm512_dpwssd_epi32(sums.v, a.v, b.v)};
#else
    return addi(sums, {_mm256_madd_epi16(a.v, b.v)});
#endif
}

constexpr size_t kHeaderBytes = 2 * kPanel;  // of steps or scales, before weights of 4 bits

// What a format of 4 bits is to products. A nibble stands for a weight, or twice the weight, plus an offset: an unsigned
// byte. Where the starts of a row's block of 128 values stand, which take the offset off 32 of them, starts() and start_of()
// say. Sums of 32 products without offset fit 16 bits.
template <int Group>
struct Int4 {
    static constexpr int kGroup = Group;          // values of K that share a step or a scale
    static constexpr int kHeader = Group;         // values of K behind a header
    static constexpr bool kScalesGroups = false;  // whether a group's sums are scaled, in fp32: else they are stepped
    static constexpr size_t kStartBytes = QuantizedRow::kStartsOfBlock;
    using Total = Vi;

    static size_t starts(const QuantizedRow& row) { return row.starts(); }
    static constexpr int start_of(int run) { return run * int(sizeof(int32_t)); }
    // Of W columns in run `run` of 32 values of K behind a header: their steps, as low words.
    static Vi factors(const uint8_t* header, int, int column) { return widen_words(header + 2 * column); }
    // A total plus the sums of 32 products times their steps.
    static Vi add_run(Vi total, Vi sums, const char*, Vi steps) { return dot_words(total, sums, steps); }
    static Vi load_total(const float* p) { return loadi(p); }
    static void store_total(float* p, Vi total) { storei(p, total); }
    static Vi bytes_of(Vi nibbles) { return nibbles; }
};

struct Mxfp4 {
    static constexpr int kGroup = QuantizedRow::kRun, kHeader = 64;
    static constexpr int kLargestScale = 252;
    static constexpr bool kScalesGroups = true;
    static constexpr size_t kStartBytes = QuantizedRow::kTailsOfBlock;
    using Total = Vf;
    // Twice 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives.
    alignas(16) static constexpr int8_t kTwice[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
    // With an offset of 12.
    alignas(16) static constexpr uint8_t kBytes[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};

    static size_t starts(const QuantizedRow& row) { return row.tail() + offsetof(RowTail, start); }
    static constexpr int start_of(int run) { return run * int(sizeof(RowTail)); }
    static Vf row_scale(const char* start) {
        return as_float(broadcast_dword(start - offsetof(RowTail, start) + offsetof(RowTail, scale)));
    }
    // 2^(byte - 127): the exponent's bits, but for the smallest, which is subnormal. Where there are tiles, no less than 2^-60.
    static Vf factors(const uint8_t* header, int run, int column) {
        const Vi bytes = widen_bytes(header + run * kPanel + column);
        if (kHasTiles) return as_float(shift_left<23>(maxi(bytes, set1i(kSmallestPower))));
        return as_float(maxi(shift_left<23>(bytes), set1i(1 << 22)));
    }
    // A total plus a run's sums scaled. A product with a power of two is exact: one rounding fewer is no other one.
    static Vf add_run(Vf total, Vi sums, const char* start, Vf column_scales) {
        if (kHasTiles) return fma(mul(to_float(sums), column_scales), row_scale(start), total);
        return fma(mul(to_float(sums), row_scale(start)), column_scales, total);
    }
    static Vf load_total(const float* p) { return load(p); }
    static void store_total(float* p, Vf total) { store(p, total); }
    static Vi bytes_of(Vi nibbles) { return look_up(kBytes, nibbles); }
    // Of bytes whose low nibbles are numbers: twice these, negated where a byte of signs is 0x88.
    static Vi signed_by(Vi bytes, Vi signs) {
        return look_up(kTwice, andi(exclusive_or(bytes, signs), set1i(0x0f0f0f0f)));
    }
    static float number(int nibble, int scale) { return std::ldexp(float(kTwice[nibble]), scale - 128); }
};

// The weights of four values of K and 32 columns, as unsigned bytes.
template <typename F>
inline void load_nibbles(const uint8_t* p, Vi (&columns)[kPanel / W]) {
    constexpr int V = kPanel / W;
    const Vi low = set1i(0x0f0f0f0f);
    for (int v = 0; v < V / 2; ++v) {
        const Vi both = loadi(p + v * W * 4);
        columns[v] = F::bytes_of(andi(both, low));
        columns[v + V / 2] = F::bytes_of(andi(high_nibbles(both), low));
    }
}

// What sums of 32 bits of a run begin with, broadcast.
inline Vi first_sums(const char* start) {
    const Vi begin = broadcast_dword(start);
#if !defined(__AVX512F__)
    return {_mm256_madd_epi16(begin.v, _mm256_set1_epi16(1))};  // of its two halves
#endif
    return begin;
}

// One panel of 4 bits as the products see it.
template <typename F>
struct NibblePanel {
    static constexpr int kGroupsOfHeader = F::kHeader / F::kGroup;
    static constexpr size_t kBytes = kHeaderBytes + size_t(F::kHeader * kPanel / 2);  // behind a header, and its own
    static constexpr size_t kBlockBytes = kActivationBlock / F::kHeader * kBytes;

    const uint8_t* data;
    int depth;  // K, in whole headers
    QuantizedRow row;

    int groups() const { return depth / F::kGroup; }
    size_t bytes() const { return size_t(depth / F::kHeader) * kBytes; }
    const uint8_t* header(int group) const { return data + size_t(group / kGroupsOfHeader) * kBytes; }
    const uint8_t* weights(int group) const {
        return header(group) + kHeaderBytes + group % kGroupsOfHeader * (F::kGroup * kPanel / 2);
    }
};

// How int32 sums become fp32: the row's start taken on, where they are of bytes with an offset of 128, times the row's
// scale, times the column's.
struct SumScales {
    const char* tails = nullptr;  // of row 0
    size_t stride = 0;
    const float* columns = nullptr;
    bool has_offset = true;

    MOESAIC_INLINE void scale(int row, const float* sums, float* to) const {
        const char* tail = tails + size_t(row) * stride;
        const Vi start = has_offset ? broadcast_dword(tail + offsetof(RowTail, start)) : set1i(0);
        const Vf scale = as_float(broadcast_dword(tail + offsetof(RowTail, scale)));
        for (int v = 0; v < kPanel; v += W)
            store(to + v, mul(mul(to_float(addi(loadi(sums + v), start)), scale), load(columns + v)));
    }
};

// Where a product reads ahead while it computes: `step` bytes further for every step through K, `group_step` for every
// group's scales, from `then` on when it comes to block `turn`. On 2 Zen 5 cores 4-bit weights stream at 93 % of the
// memory's rate with 8 KiB ahead, at 77 % with 2 KiB.
struct Ahead {
    const char* from;
    size_t step, group_step = 0;
    int turn = -1;
    const char* then = nullptr;

    static void fetch(const char* line) { moesaic::fetch(line); }
};

// As Ahead, but into the first-level cache: many rows are 3 (bf16) to 10 % (4 bits) faster so on Zen 4.
struct NearAhead : Ahead {
    static void fetch(const char* line) { _mm_prefetch(line, _MM_HINT_T0); }
};

// Nothing is read ahead.
struct LeftToProcessor : Ahead {
    static void fetch(const char*) {}
};

// With AVX2 alone (Zen 3) and into the first-level cache: 1.5 KiB ahead streams weights 1 to 8 % faster than 8 KiB into the
// second-level one; 1 and 2 KiB gain less, 0.5, 4 and 8 KiB nothing, and without reading ahead 8 rows are 10 % slower.
constexpr size_t kAheadBytes = kHasByteProducts ? 8192 : 1536;

// Few rows of 8 bits: within the same page on machines with tiles, where the processor's own prefetcher then runs ahead of
// both: 33 to 35 GB/s on two cores that read 30 with 8 KiB ahead, 32 with 4.
constexpr size_t kNearBytes = kHasTiles ? 3072 : kAheadBytes;

// Reads ahead line by line, of a panel that has kLines of them for every step.
template <int kLines, typename Reads>
struct LinesOf {
    Reads ahead;

    void line() {
        ahead.fetch(ahead.from);
        ahead.from += ahead.step / kLines;
    }
    void lines(int count) {
        for (int i = 0; i < count; ++i) line();
    }
    // The two lines of a dword of K.
    void dword() {
        ahead.fetch(ahead.from);
        ahead.fetch(ahead.from + 64);
        ahead.from += ahead.step;
    }
    void scales() {
        ahead.fetch(ahead.from);
        ahead.from += ahead.group_step;
    }
    void at(int block) {
        if (block == ahead.turn) ahead.from = ahead.then;
    }
    // Calls pass(first, count) for runs of `dwords` dwords, none across where the reading turns, which is said in blocks of
    // `block` dwords, nor (AVX2) longer than stay in the cache while some columns after the others are multiplied.
    template <typename Pass>
    void passes(int dwords, int block, Pass&& pass) {
        const int turn = ahead.turn * block, most = W == 16 ? dwords : kExpandedDwords;
        for (int first = 0, here; first < dwords; first += here) {
            here = std::min(most, dwords - first);
            if (first == turn) ahead.from = ahead.then;
            if (first < turn) here = std::min(here, turn - first);
            pass(first, here);
        }
    }
};

// Reads ahead in several panels at once: the first line of each, then the second of each and so on, scales like weights.
class PanelsInTurn {
  public:
    // `panels` panels, `apart` bytes from one to the next, the first at `start`; the first `line` of the lines are left out.
    PanelsInTurn(const uint8_t* start, size_t apart, int panels, int line)
        : from_(reinterpret_cast<const char*>(start) + size_t(line % panels) * apart + size_t(line / panels) * 64),
          apart_(apart), panels_(panels), panel_(line % panels) {}

    void line() {
        fetch(from_);
        from_ += apart_;
        if (++panel_ < panels_) return;
        panel_ = 0;
        from_ -= size_t(panels_) * apart_ - 64;
    }
    void lines(int count) {
        for (int i = 0; i < count; ++i) line();
    }
    void scales() { line(); }
    void at(int) {}
    template <typename Pass>
    void passes(int dwords, int, Pass&& pass) {
        pass(0, dwords);
    }

  private:
    const char* from_;
    size_t apart_;
    int panels_, panel_;
};

// Few rows of bf16 or 8 bits read ahead in TwoStreams where this holds. On Emerald Rapids without AMX one to twelve rows of
// bf16 are 5 to 10 % faster than with 8 KiB ahead in one stream, of 8 bits up to 5 %, and two steps of rows of 8 bits, which
// read shares of the next panel, 5 to 10 %. Not 4 bits, three steps, nor more rows of bf16, which are bound by products.
#if defined(__AVX512F__) && defined(MOESAIC_EXPANDS_ROWS)
constexpr bool kReadsTwoStreams = true;
#else
constexpr bool kReadsTwoStreams = false;
#endif

// Reads ahead, a line of each of two streams in turn, at most 4 KiB long, which follow each other: those of a panel and then
// the first two of the next one. The processor's own prefetcher follows both.
class TwoStreams {
  public:
    // For one pass over a panel.
    TwoStreams(const uint8_t* panel, size_t bytes, const uint8_t* next)
        : end_(reinterpret_cast<const char*>(panel) + bytes), next_(reinterpret_cast<const char*>(next ? next : panel)) {
        constexpr size_t kMost = 64;
        const size_t lines = (bytes + 63) / 64, streams = (lines + 2 * kMost - 1) / (2 * kMost) * 2;
        length_ = (lines + streams - 1) / streams;
        begin(reinterpret_cast<const char*>(panel) + 2 * length_ * 64);
    }
    // As ahead_of_share.
    static TwoStreams of_share(const uint8_t* next, size_t begin, size_t length, int part, int parts) {
        const size_t share = length / size_t(parts);
        return TwoStreams(reinterpret_cast<const char*>(next) + begin + share * size_t(part), share / 128,
                          64 / size_t(parts));
    }
    // The two lines of a dword of K.
    void dword() {
        fetch(from_);
        fetch(from_ + length_ * 64);
        from_ += step_;
        if (--left_ == 0) begin(from_ + length_ * 64);
    }
    void lines(int count) {
        for (int line = 0; line < count; line += 2) dword();
    }
    void at(int) {}
    template <typename Pass>
    void passes(int dwords, int, Pass&& pass) {
        pass(0, dwords);
    }

  private:
    TwoStreams(const char* from, size_t length, size_t step)
        : from_(from), end_(from), next_(from), length_(length), step_(step), left_(std::numeric_limits<int>::max()) {}
    void begin(const char* block) {
        from_ = block < end_ ? block : next_;
        left_ = int(length_);
    }

    const char *from_ = nullptr, *end_, *next_;
    size_t length_, step_ = 64;  // of a stream, in lines; bytes for every dword
    int left_ = 0;               // of the streams' dwords
};

// Rows of bf16 or 8 bits of which one step leaves reading ahead to the processor, on Zen 4: a layer of experts of 4 to 32
// tokens is 2 to 8 % faster so in bf16, one of 8 to 32 in int8; more rows are slower (64 tokens of int8 5 %, 128 of bf16
// 16), and so is any number of 4 bits (17 to 41 %).
constexpr int kFewLeftRows = 6;
#if defined(__AVX512BF16__) && !defined(MOESAIC_TILES)
constexpr bool kMayLeaveRows = true;
#else
constexpr bool kMayLeaveRows = false;
#endif
inline bool is_left_to_processor(int rows) {
    static const bool is_zen_4 = sysconf(_SC_LEVEL1_DCACHE_SIZE) == 32 << 10;  // Zen 5 has 48 KiB
    return rows <= kFewLeftRows && is_zen_4;
}

template <int kLines, typename Reads>
inline LinesOf<kLines, Reads> lines_of(const Reads& ahead) {
    return {ahead};
}
template <int>
inline PanelsInTurn lines_of(const PanelsInTurn& ahead) {
    return ahead;
}
template <int>
inline TwoStreams lines_of(const TwoStreams& ahead) {
    return ahead;
}

// For one pass over `blocks` blocks of a panel: `distance` bytes ahead of itself, and at its end in what follows, if anything
// does.
inline Ahead ahead_of_itself(const uint8_t* panel, int blocks, size_t block_bytes, size_t step, const uint8_t* next,
                             size_t group_step = 0, size_t distance = kAheadBytes) {
    const int turn = blocks - int((distance + block_bytes - 1) / block_bytes);
    const char* own = reinterpret_cast<const char*>(panel);
    const char* following = next ? reinterpret_cast<const char*>(next) : own;
    if (turn <= 0) return {following, step, group_step};
    // Where what follows does not lie behind the panel, the panel's last lines are left to the processor.
    const size_t behind = size_t(blocks - turn) * block_bytes - distance;
    return {own + distance, step, group_step, turn, following - behind};
}

// For one of several passes over `length` bytes of a panel: its share of the same bytes of the next one.
inline Ahead ahead_of_share(const uint8_t* next, size_t begin, size_t length, int part, int parts, size_t step,
                            size_t group_step = 0) {
    const size_t share = length / size_t(parts);
    return {reinterpret_cast<const char*>(next) + begin + share * size_t(part), step / size_t(parts),
            group_step / size_t(parts)};
}

// What comes after a product: the weights of the next one (or null), and `count` cache lines, `stride` bytes apart,
// that will be read or written.
struct Next {
    const uint8_t* panel = nullptr;
    const char* lines = nullptr;
    size_t stride = 64;
    int64_t count = 0;

    // The share of the lines that one of several passes brings nearer.
    void prefetch_lines(int part, int parts) const {
        const int64_t end = count * (part + 1) / parts;
        for (int64_t i = count * part / parts; i < end; ++i) _mm_prefetch(lines + size_t(i) * stride, _MM_HINT_T0);
    }
#if defined(MOESAIC_TILES)
    // What a product by tiles, one of `parts` steps of rows on terms [first, first + here) of `terms`, brings nearer bit by
    // bit: of lines that follow each other its share; of lines far apart, which are written when sums are complete, its
    // rows' in the last pass.
    LinesAhead lines_ahead(int part, int parts, int first, int here, int terms, int calls) const {
        const bool is_shared = stride == 64;
        if (!is_shared && first + here < terms) return {};
        const int64_t begin = is_shared ? int64_t(first) * parts + int64_t(here) * part : part;
        const int64_t end = begin + (is_shared ? here : 1), all = int64_t(is_shared ? terms : 1) * parts;
        const int64_t line = count * begin / all;
        return {lines + size_t(line) * stride, stride, count * end / all - line, calls};
    }
#endif
};

// Rows that one step by vectors works on. With AVX-512 their int32 sums are in registers, with 2 vectors of weights and 1
// of activations, and in products of 4 bits of up to kRowsWithTotals their totals too; without, multiply_bytes and
// add_nibbles have their own. Up to kFewByteRows rows of integers go by vectors where there are tiles: none by AVX2's, which
// take off the weights the offset that tiles multiply and rows make up for.
#if defined(__AVX512F__)
constexpr int kByteRows = 12, kNibbleRows = 8, kRowsWithTotals = 6, kFewByteRows = 4, kFewMxfp4Rows = 4;
#else
constexpr int kByteRows = 5, kNibbleRows = 6, kRowsWithTotals = 6, kFewByteRows = 0, kFewMxfp4Rows = 0;
#endif
#if defined(MOESAIC_TILES)
// Of 8 bits. On Emerald Rapids a layer of experts of 8 to 32 tokens takes 3 to 6 % less time by tiles.
inline const int few_byte_rows = vectors_are_faster() ? kFewByteRows : 0;
#endif

#if defined(__AVX512F__)

// The int32 sums of R rows times the activation blocks [first, last) of a panel of 8 bits, [R][32], which begin with those
// in c or with 0. Loops over sums are unrolled by order: sums that a loop indexes live in memory, at half the speed.
template <int R, typename Reads>
[[gnu::noinline]] void byte_rows(const uint8_t* panel, int depth, int first, int last, const char* a, size_t stride,
                                 float* c, bool accumulate, Reads ahead) {
    constexpr int V = kPanel / W, kStepBytes = 4 * kPanel;
    // The sums of one row alone would wait for each other.
    constexpr int kChains = R == 1 && W == 16 ? 2 : 1;
    const uint8_t* weights = panel + size_t(first) * kActivationBlock * kPanel;
    Vi acc[kChains][R][V];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) {
            acc[0][r][v] = accumulate ? loadi(c + r * kPanel + v * W) : set1i(0);
#pragma GCC unroll 4
            for (int chain = 1; chain < kChains; ++chain) acc[chain][r][v] = set1i(0);
        }
    ThirdRows<R, char> rows(a + size_t(first) * kActivationBlock, stride);
    auto lines = lines_of<2>(ahead);
    for (int block = first; block < last; ++block) {
        const int steps = std::min(kActivationBlock, depth - block * kActivationBlock) / 4;
        lines.at(block);
#pragma GCC unroll 1  // of two steps GCC 12 keeps the sums of 12 rows in memory
        for (int s = 0; s < steps; s += kChains) {
#pragma GCC unroll 4
            for (int chain = 0; chain < kChains; ++chain) {
                Vi columns[V];
                for (int v = 0; v < V; ++v) columns[v] = loadi(weights + size_t(chain) * kStepBytes + v * W * 4);
                lines.dword();
#pragma GCC unroll 16
                for (int r = 0; r < R; ++r) add_byte_products(acc[chain][r], rows.at(r, 4 * chain), columns);
            }
            weights += size_t(kChains) * kStepBytes;
            rows.go_on(4 * kChains);
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) {
#pragma GCC unroll 4
            for (int chain = 1; chain < kChains; ++chain) acc[0][r][v] = addi(acc[0][r][v], acc[chain][r][v]);
            storei(c + r * kPanel + v * W, acc[0][r][v]);
        }
}

#else

// Signed bytes of a panel for products in 16 bits: of the magnitudes, unsigned, and the row's bytes with the weights' signs.
// Two of them fit, since a row's bytes are at least -127: 2 * 128 * 127.
struct SignedWeights {
    Vi values, magnitudes;

    static SignedWeights at(const char* panel, Vi offset) {
        const __m256i values = _mm256_xor_si256(loadi(panel).v, offset.v);
        return {{values}, {_mm256_abs_epi8(values)}};
    }
    // sums += the four products of every dword.
    void add_to(Vi& sums, Vi row, Vi ones) const {
        __m256i products;
        asm("vpsignb %3, %2, %1\n\tvpmaddubsw %1, %4, %1\n\tvpmaddwd %5, %1, %1\n\tvpaddd %1, %0, %0"
            : "+x"(sums.v), "=&x"(products)
            : "x"(row.v), "x"(values.v), "x"(magnitudes.v), "xm"(ones.v));
    }
};

// sums[R][V vectors], 32 apart, (+)= R rows, `stride` apart, times V vectors of a panel's columns. reads.lines() is called
// with the cache lines of each dword.
template <int R, int V, typename Reads>
[[gnu::noinline]] void multiply_bytes(int dwords, const char* row, size_t stride, const char* panel, float* sums,
                                      bool accumulate, Reads& outside) {
    Reads reads = outside;  // of its own, so that what it counts is in registers
    const Vi offset = set1i(int32_t(0x80808080)), ones = set1i(0x00010001);
    Vi acc[R][V];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) acc[r][v] = accumulate ? loadi(sums + r * kPanel + v * W) : set1i(0);
    for (int i = 0; i < dwords; ++i, row += 4, panel += 4 * kPanel) {
        reads.lines(V * W * 4 / 64);
        if constexpr (V > 2) {  // few rows: their bytes stay in registers
            Vi terms[R];
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) terms[r] = broadcast_dword(row + r * stride);
#pragma GCC unroll 4
            for (int v = 0; v < V; ++v) {
                const SignedWeights columns = SignedWeights::at(panel + v * W * 4, offset);
#pragma GCC unroll 8
                for (int r = 0; r < R; ++r) columns.add_to(acc[r][v], terms[r], ones);
            }
        } else {
            const SignedWeights left = SignedWeights::at(panel, offset), right = SignedWeights::at(panel + W * 4, offset);
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) {
                const Vi terms = broadcast_dword(row + r * stride);
                left.add_to(acc[r][0], terms, ones);
                right.add_to(acc[r][1], terms, ones);
            }
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) storei(sums + r * kPanel + v * W, acc[r][v]);
    outside = reads;
}

template <int R, typename Reads>
inline void byte_rows(const uint8_t* panel, int depth, int first, int last, const char* a, size_t stride, float* c,
                      bool accumulate, Reads ahead) {
    constexpr int V = R <= 2 ? 4 : 2;  // up to 10 of 16 registers hold sums
    const int begin = first * kActivationBlock, end = std::min(last * kActivationBlock, depth);
    const char* weights = reinterpret_cast<const char*>(panel) + size_t(begin) * kPanel;
    auto lines = lines_of<2>(ahead);  // turns in a pass over all blocks only
    lines.passes((end - begin) / 4, kActivationBlock / 4, [&](int dword, int here) {
        for (int column = 0; column < kPanel; column += V * W)
            multiply_bytes<R, V>(here, a + begin + 4 * dword, stride, weights + (dword * kPanel + column) * 4, c + column,
                                 accumulate || dword > 0, lines);
    });
}

#endif

template <int R, typename Reads>
inline void byte_rows_of(int rows, const uint8_t* panel, int depth, int first, int last, const char* a, size_t stride,
                         float* c, bool accumulate, Reads ahead) {
    if constexpr (R > 0) {
        if (rows == R)
            byte_rows<R>(panel, depth, first, last, a, stride, c, accumulate, ahead);
        else
            byte_rows_of<R - 1>(rows, panel, depth, first, last, a, stride, c, accumulate, ahead);
    }
}

// Rows times a panel of 8 bits by vectors; done(first, last) is called as soon as the sums of those rows are in c.
template <typename Done>
inline void byte_product(const uint8_t* panel, int depth, int rows, const char* a, size_t stride, float* c,
                         const Next& next, Done&& done) {
    // Activation blocks whose weights, 16 KiB, stay in the first-level cache while all rows pass.
    constexpr int kDeep = 4;
    constexpr size_t kStepBytes = 4 * kPanel, kBlockBytes = kActivationBlock * kPanel;
    const int blocks = (depth + kActivationBlock - 1) / kActivationBlock;
    const int parts = (rows + kByteRows - 1) / kByteRows;
    const int pass = parts > 1 ? kDeep : blocks;
    for (int first = 0; first < blocks; first += pass) {
        const int last = std::min(first + pass, blocks);
        const size_t begin = size_t(first) * kBlockBytes, length = size_t(last - first) * kBlockBytes;
        for (int part = 0; part < parts; ++part) {
            const int row = int(int64_t(rows) * part / parts), end = int(int64_t(rows) * (part + 1) / parts);
            const Ahead ahead =
                parts > 1 ? ahead_of_share(next.panel ? next.panel : panel, begin, length, part, parts, kStepBytes)
                          : ahead_of_itself(panel, blocks, kBlockBytes, kStepBytes, next.panel, 0, kNearBytes);
            if (last == blocks) next.prefetch_lines(part, parts);
            const auto multiply = [&](const auto& reads) {
                byte_rows_of<kByteRows>(end - row, panel, depth, first, last, a + row * stride, stride, c + row * kPanel,
                                        first > 0, reads);
            };
            const auto multiply_ahead = [&] { kHasTiles || parts <= 4 ? multiply(ahead) : multiply(NearAhead{ahead}); };
            if constexpr (kReadsTwoStreams)
                parts == 1   ? multiply(TwoStreams(panel, size_t(depth) * kPanel, next.panel))
                : parts == 2 ? multiply(TwoStreams::of_share(next.panel ? next.panel : panel, begin, length, part, parts))
                             : multiply_ahead();
            else if constexpr (kMayLeaveRows)
                is_left_to_processor(rows) ? multiply(LeftToProcessor{ahead}) : multiply_ahead();
            else
                multiply_ahead();
            if (last == blocks) done(row, end);
        }
    }
}

// C[R][32] = R rows times a panel of 4 bits. Functions of their own: inlined together they were a tenth
// slower. With more than kRowsWithTotals rows the totals are in memory, without AVX-512 always.
#if defined(__AVX512F__)
template <typename F, int R, typename Reads>
[[gnu::noinline]] void nibble_rows(const NibblePanel<F>& panel, int first, int last, const char* a, size_t stride,
                                   float* c, bool accumulate, Reads ahead) {
    constexpr int V = kPanel / W, kRun = QuantizedRow::kRun, kSteps = kRun / 4, kRunsOfHeader = F::kHeader / kRun;
    constexpr size_t kStepBytes = 64;
    // Runs behind one header at a time: the sums of one row and one run would wait for each other.
    constexpr int kTogether = R == 1 && kRunsOfHeader > 1 ? 2 : 1;
    constexpr bool kHasTotals = R <= kRowsWithTotals, kHasSigns = kHasTiles && F::kScalesGroups;
    const uint8_t *weights = panel.data + size_t(first) * panel.kBlockBytes, *header = weights;
    [[maybe_unused]] const size_t signs = panel.row.signs();
    using Total = typename F::Total;
    Total total[R][V];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) {
            total[r][v] = kHasTotals && accumulate ? F::load_total(c + r * kPanel + v * W) : Total{};
            if (!kHasTotals && !accumulate) store(c + r * kPanel + v * W, zero());
        }
    const char* start = a + F::starts(panel.row) + size_t(first) * F::kStartBytes;
    const char* row = a + size_t(first) * kActivationBlock;
    for (int block = first; block < last; ++block, start += F::kStartBytes) {
        const int runs = std::min(kActivationBlock, panel.depth - block * kActivationBlock) / kRun;
        if (block == ahead.turn) ahead.from = ahead.then;
        for (int first_run = 0; first_run < runs; first_run += kTogether) {
            if (first_run % kRunsOfHeader == 0) {
                header = weights;
                weights += kHeaderBytes;
                ahead.fetch(ahead.from);
                ahead.from += ahead.group_step;
            }
            Vi acc[kTogether][R][V];
#pragma GCC unroll 2
            for (int i = 0; i < kTogether; ++i)
#pragma GCC unroll 8
                for (int r = 0; r < R; ++r) {
                    const Vi begin = first_sums(start + r * stride + F::start_of(first_run + i));
#pragma GCC unroll 4
                    for (int v = 0; v < V; ++v) acc[i][r][v] = begin;
                }
#pragma GCC unroll 2
            for (int s = 0; s < kSteps; ++s) {
#pragma GCC unroll 2
                for (int i = 0; i < kTogether; ++i) {
                    const uint8_t* own = weights + size_t(i * kSteps) * kStepBytes;
                    Vi columns[V];
                    if constexpr (kHasSigns)
                        columns[0] = loadi(own), columns[1] = high_nibbles(columns[0]);
                    else
                        load_nibbles<F>(own, columns);
                    ahead.fetch(ahead.from + size_t(i) * ahead.step);
#pragma GCC unroll 8
                    for (int r = 0; r < R; ++r) {
                        const char* left = row + r * stride + i * kRun + 4 * s;
                        const Vi activations = broadcast_dword(left);
                        [[maybe_unused]] Vi row_signs;
                        if constexpr (kHasSigns) row_signs = broadcast_dword(left + signs);
#pragma GCC unroll 4
                        for (int v = 0; v < V; ++v)
                            if constexpr (kHasSigns)
                                acc[i][r][v] = dot_bytes(acc[i][r][v], activations, F::signed_by(columns[v], row_signs));
                            else
                                acc[i][r][v] = dot_bytes(acc[i][r][v], columns[v], activations);
                    }
                }
                weights += kStepBytes;
                ahead.from += size_t(kTogether) * ahead.step;
            }
            weights += size_t((kTogether - 1) * kSteps) * kStepBytes;
            row += kTogether * kRun;
#pragma GCC unroll 2
            for (int i = 0; i < kTogether; ++i) {
                const int run = first_run + i;
                Total factors[V];
                for (int v = 0; v < V; ++v) factors[v] = F::factors(header, run % kRunsOfHeader, v * W);
#pragma GCC unroll 8
                for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
                    for (int v = 0; v < V; ++v) {
                        const char* own = start + r * stride + F::start_of(run);
                        float* place = c + r * kPanel + v * W;
                        if constexpr (kHasTotals)
                            total[r][v] = F::add_run(total[r][v], acc[i][r][v], own, factors[v]);
                        else
                            F::store_total(place, F::add_run(F::load_total(place), acc[i][r][v], own, factors[v]));
                    }
            }
        }
    }
#pragma GCC unroll 8
    for (int r = 0; kHasTotals && r < R; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) F::store_total(c + r * kPanel + v * W, total[r][v]);
}

#else
// Sums of 16 bits += the products of signed bytes of a row and nibbles of a panel, two for every word.
inline Vi add_nibble_products(Vi sums, Vi row, Vi columns) {
    __m256i products;
    asm("vpmaddubsw %3, %2, %1\n\tvpaddw %1, %0, %0" : "+x"(sums.v), "=&x"(products) : "x"(columns.v), "x"(row.v));
    return sums;
}

// 32-bit sums of R rows += their products with 32 values of K and `Vectors` vectors of bytes, times factors of 16 bits,
// one after the other the sums of their low and of their high nibbles. They begin with what takes the offset off and may
// pass through more than 16 bits hold, but end with 8 steps of two products, of 8 * 127 or in MXFP4 of 12 * 127.
template <typename F, int R, int Vectors, typename Reads>
MOESAIC_INLINE void add_nibbles(const uint8_t* weights, const char* row, const char* start, size_t stride,
                                const Vi (&factors)[2 * Vectors], Vi (&sums)[R][2 * Vectors], Reads& reads) {
    constexpr int kSteps = 8;
    static_assert(kSteps * 2 * 12 * 127 < 1 << 15);
    Vi low = set1i(0x0f0f0f0f), words[R][2 * Vectors];
    asm("" : "+x"(low.v));  // made once
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < 2 * Vectors; ++v)
            words[r][v] = broadcast_dword(start + r * stride);
#pragma GCC unroll 4
    for (int s = 0; s < kSteps; ++s, weights += 2 * kPanel, row += 4) {
        reads.line();
#pragma GCC unroll 2
        for (int v = 0; v < Vectors; ++v) {
            const Vi both = loadi(weights + v * W * 4), first = F::bytes_of(andi(both, low)),
                     second = F::bytes_of(andi(high_nibbles(both), low));
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) {
                const Vi terms = broadcast_dword(row + r * stride);
                words[r][2 * v] = add_nibble_products(words[r][2 * v], terms, first);
                words[r][2 * v + 1] = add_nibble_products(words[r][2 * v + 1], terms, second);
            }
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < 2 * Vectors; ++v)
            sums[r][v] = dot_words(sums[r][v], words[r][v], factors[v]);
}

template <typename F, int R, typename Reads>
[[gnu::noinline]] void nibble_rows(const NibblePanel<F>& panel, int first, int last, const char* a, size_t stride,
                                   float* c, bool accumulate, Reads ahead) {
    constexpr int kVectors = R <= 2 ? 2 : 1, G = F::kGroup, kGroups = kActivationBlock / G, kWords = 32;
    const uint8_t *weights = panel.data + size_t(first) * panel.kBlockBytes, *header = weights;
    for (int n = 0; !accumulate && n < R * kPanel; n += W) store(c + n, zero());
    const char* start = a + F::starts(panel.row) + size_t(first) * F::kStartBytes;
    const char* row = a + size_t(first) * kActivationBlock;
    auto lines = lines_of<1>(ahead);
    NothingRead nothing;
    for (int block = first; block < last; ++block, start += F::kStartBytes) {
        const int here = std::min(kActivationBlock, panel.depth - block * kActivationBlock) / G;
        lines.at(block);
        for (int part = 0; part < kGroups && part < here; ++part, row += G, weights += G * kPanel / 2) {
            if (part % panel.kGroupsOfHeader == 0) {
                header = weights;
                weights += kHeaderBytes;
                lines.scales();
            }
            const char* own = start + F::start_of(part * (G / kWords));
            const auto multiply = [&](int column, auto& reads) {
                const auto column_of = [&](int v) { return column + v / 2 * W + v % 2 * kPanel / 2; };
                Vi sums[R][2 * kVectors], words[2 * kVectors];
                typename F::Total factors[2 * kVectors];
#pragma GCC unroll 4
                for (int v = 0; v < 2 * kVectors; ++v) {
                    factors[v] = F::factors(header, part % panel.kGroupsOfHeader, column_of(v));
                    if constexpr (F::kScalesGroups)
                        words[v] = set1i(0x00010001);
                    else
                        words[v] = low_words(factors[v], factors[v]);
                }
#pragma GCC unroll 8
                for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
                    for (int v = 0; v < 2 * kVectors; ++v) sums[r][v] = set1i(0);
#pragma GCC unroll 1
                for (int k = 0; k < G; k += kWords)
                    add_nibbles<F, R, kVectors>(weights + k * kPanel / 2 + column * 4, row + k, own + F::start_of(k / kWords),
                                                stride, words, sums, reads);
                float* totals = c;
                asm("" : "+r"(totals));  // or GCC 12 keeps copies of them, which it stores as well
#pragma GCC unroll 8
                for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
                    for (int v = 0; v < 2 * kVectors; ++v) {
                        float* place = totals + r * kPanel + column_of(v);
                        if constexpr (F::kScalesGroups)
                            F::store_total(place,
                                           F::add_run(F::load_total(place), sums[r][v], own + r * stride, factors[v]));
                        else
                            storei(place, addi(loadi(place), sums[r][v]));
                    }
            };
            // Half of the columns at a time, but for one or two rows; the lines of both are read ahead with the first half.
            multiply(0, lines);
            if constexpr (kVectors * W < kPanel / 2) multiply(W, nothing);
        }
    }
}
#endif

template <typename F, int R, typename Reads>
inline void nibble_rows_of(int rows, const NibblePanel<F>& panel, int first, int last, const char* a, size_t stride,
                           float* c, bool accumulate, Reads ahead) {
    if constexpr (R > 0) {
        if (rows == R)
            nibble_rows<F, R>(panel, first, last, a, stride, c, accumulate, ahead);
        else
            nibble_rows_of<F, R - 1>(rows, panel, first, last, a, stride, c, accumulate, ahead);
    }
}

// Rows times a panel of 4 bits by vectors; done(first, last, sums) is called as soon as those rows' sums, 32 of each, are
// complete, while they are in the first-level cache. c: room for the sums of all steps of rows.
template <typename F, typename Done>
inline void nibble_product(const NibblePanel<F>& panel, int rows, const char* a, size_t stride, float* c,
                           const Next& next, Done&& done) {
    // Activation blocks whose weights, 16 KiB, stay in the first-level cache while all rows pass. A single step of rows
    // comes in one pass.
    constexpr int kDeep = 8;
    const int blocks = (panel.depth + kActivationBlock - 1) / kActivationBlock;
    const int parts = rows <= kNibbleRows ? 1 : (rows + kRowsWithTotals - 1) / kRowsWithTotals;
    const int pass = parts > 1 ? kDeep : blocks;
    constexpr size_t kStepBytes = 64, kBlockBytes = NibblePanel<F>::kBlockBytes;
    for (int first = 0; first < blocks; first += pass) {
        const int last = std::min(first + pass, blocks);
        const size_t begin = size_t(first) * kBlockBytes, length = size_t(last - first) * kBlockBytes;
        for (int part = 0; part < parts; ++part) {
            const int row = int(int64_t(rows) * part / parts), end = int(int64_t(rows) * (part + 1) / parts);
            const Ahead ahead =
                parts > 1 ? ahead_of_share(next.panel ? next.panel : panel.data, begin, length, part, parts, kStepBytes,
                                           kHeaderBytes)
                          : ahead_of_itself(panel.data, blocks, kBlockBytes, kStepBytes, next.panel, kHeaderBytes);
            if (last == blocks) next.prefetch_lines(part, parts);
            const auto multiply = [&](const auto& reads) {
                nibble_rows_of<F, kNibbleRows>(end - row, panel, first, last, a + row * stride, stride, c + row * kPanel,
                                               first > 0, reads);
            };
            if (kHasTiles || parts == 1)
                multiply(ahead);
            else
                multiply(NearAhead{ahead});
            if (last == blocks) done(row, end, c + row * kPanel);
        }
    }
}

}  // namespace moesaic
