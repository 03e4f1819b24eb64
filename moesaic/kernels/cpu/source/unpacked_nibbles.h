// Weights of 4 bits as products of many rows take them: unpacked, a piece of K at a time.
#pragma once

#include "gemm_int8.h"

namespace moesaic {

// A panel of 4 bits as tiles and many rows take it: lines of 128 bytes, [32][4 bytes]. Four values of K, a cache line of
// nibbles, become one line of bytes of int4, as int8 has them, or two of bf16 of MXFP4. Made for one group, whose steps or
// scales it knows.
template <typename F>
struct NibbleLines {
    static constexpr bool kIsBytes = true;
    static constexpr int kFewRows = kFewByteRows;
    static constexpr int kDepth = 4, kOfSteps = F::kGroup / kDepth;  // values of K of a line; lines of a group
    static constexpr int V = kPanel / W;
    Vi steps[V], offsets[V];

    // A weight, 0 to 15, times its step plus 128 - 8 steps is what 8 bits have: never below 8 nor above 248, so that the two
    // bytes of a word are made by one product.
    NibbleLines(const NibblePanel<F>& panel, int group) {
        constexpr uint32_t kPerStep = uint16_t(-8 * 0x0101), kOffset = 0x80808080;
        for (int v = 0; v < V; ++v) {
            const Vi words = widen_words(panel.header(group) + 2 * v * W);
            steps[v] = low_words(words, words);
            offsets[v] = add_words(mul_words(steps[v], set1i(int32_t(kPerStep << 16 | kPerStep))), set1i(int32_t(kOffset)));
        }
    }
    MOESAIC_INLINE void unpack(const uint8_t* from, uint8_t* to) const {
        Vi columns[V];
        load_nibbles<F>(from, columns);
        for (int v = 0; v < V; ++v) storei(to + v * W * 4, add_words(mul_words(columns[v], steps[v]), offsets[v]));
    }
};

template <>
struct NibbleLines<Mxfp4> {
    static constexpr bool kIsBytes = false;
    static constexpr int kFewRows = kFewMxfp4Rows;
    static constexpr int kDepth = 2, kOfSteps = Mxfp4::kGroup / kDepth;
    static constexpr int V = kPanel / W;
    // The numbers of Mxfp4::kTwice, halved, in bf16, with kLift added to the bits, but for 0. What a scale takes off again
    // is never below 0, and 0 stays 0.
    static constexpr int kLift = (Mxfp4::kLargestScale + 1 - 127) << 7;
    alignas(32) static constexpr uint16_t kLifted[16] = {
        0, kLift + 0x3f00, kLift + 0x3f80, kLift + 0x3fc0, kLift + 0x4000, kLift + 0x4040, kLift + 0x4080, kLift + 0x40c0,
        0, kLift + 0xbf00, kLift + 0xbf80, kLift + 0xbfc0, kLift + 0xc000, kLift + 0xc040, kLift + 0xc080, kLift + 0xc0c0};
    static_assert(kLift + 0x40c0 < 0x8000);
    const WordTable table{kLifted};
    Vi taken[V];  // off the bits of each column

    NibbleLines(const NibblePanel<Mxfp4>& panel, int group) {
        const uint8_t* scales = panel.header(group) + group % panel.kGroupsOfHeader * kPanel;
        for (int v = 0; v < V; ++v) {
            const Vi bytes = maxi(widen_bytes(scales + v * W), set1i(kSmallestPower));
            const Vi words = subi(set1i(kLift + (127 << 7)), shift_left<7>(bytes));
            taken[v] = low_words(words, words);
        }
    }
    MOESAIC_INLINE void unpack(const uint8_t* from, uint8_t* to) const {
        for (int v = 0; v < V / 2; ++v) {
            // Nibbles 0 to 3 of a word are of columns n and n + 16 and then of the same of the next pair; its neighbour has
            // the pair's other numbers.
            const Vi four = swap_inner_bytes(loadi(from + v * W * 4));
            const auto numbers = [&](Vi nibbles, int column) {
                return subtract_words_to_zero(table.look_up(nibbles), taken[column]);
            };
            uint8_t* own = to + v * W * 4;
            storei(own, numbers(four, v));
            storei(own + 64, numbers(shift_words_right<4>(four), v + V / 2));
            storei(own + 128, numbers(shift_words_right<8>(four), v));
            storei(own + 192, numbers(shift_words_right<12>(four), v + V / 2));
        }
    }
};

// Up to kMost lines of a panel from `line` on, all of one step or scale. Behind the last ones those stand again: rows are
// zero there.
template <typename F>
class Unpacking {
    using Lines = NibbleLines<F>;
    static constexpr int kOfFour = 4 / Lines::kDepth;  // lines of a cache line of nibbles

  public:
    static constexpr int kMost = std::min(16, Lines::kOfSteps);

    Unpacking(const NibblePanel<F>& panel, int line)
        : k_(std::min(line * Lines::kDepth, panel.depth - kMost * Lines::kDepth)), lines_(panel, k_ / F::kGroup),
          from_(panel.weights(k_ / F::kGroup) + k_ % F::kGroup / 4 * 64) {}
    // `count` of them, from number `first` on.
    MOESAIC_INLINE void unpack(int first, int count, uint8_t* to) const {
        for (int i = 0; i < count / kOfFour; ++i) lines_.unpack(from_ + 64 * (first / kOfFour + i), to + 128 * kOfFour * i);
    }

  private:
    int k_;  // of the first one
    Lines lines_;
    const uint8_t* from_;
};

// Lines of a panel, in whole tiles.
template <typename F>
inline int unpacked_lines(const NibblePanel<F>& panel) {
    return round_up(panel.depth / NibbleLines<F>::kDepth, 16);
}

#if defined(__AVX512F__) && !defined(MOESAIC_TILES)

// Rows of int4 from which on panels are unpacked, to be multiplied as int8's are: of fewer it takes more time than products
// of nibbles lose (9 to 16 rows were 5 % slower with it, 32 and 128 are 8 to 18 % faster).
constexpr int kFewestUnpacked = 17;

// `count` values of K of a panel from `first` on, as int8 has them.
template <typename F>
inline void unpack_piece(const NibblePanel<F>& panel, int first, int count, uint8_t* to) {
    constexpr int kAtOnce = Unpacking<F>::kMost;
    for (int line = 0; line < count / 4; line += kAtOnce)
        Unpacking<F>(panel, first / 4 + line).unpack(0, kAtOnce, to + 128 * line);
}

// As nibble_product, of int4, a piece of K after the other.
template <int Group, typename Done>
inline void unpacked_product(const NibblePanel<Int4<Group>>& panel, int rows, const char* a, size_t stride, float* c,
                             const Next& next, Done&& done) {
    constexpr int kDeep = 4 * kActivationBlock;  // values of K of a piece, 16 KiB
    alignas(64) uint8_t unpacked[kDeep * kPanel];
    const int parts = (rows + kByteRows - 1) / kByteRows;
    const auto place = [&](int k) { return panel.bytes() / size_t(panel.depth / 32) * size_t(k / 32); };
    for (int first = 0; first < panel.depth; first += kDeep) {
        const int here = std::min(kDeep, panel.depth - first), behind = first + here;
        const bool is_last = behind == panel.depth;
        unpack_piece(panel, first, here, unpacked);
        // What is unpacked next, which comes nearer.
        const uint8_t* then = !is_last ? panel.data + place(behind) : next.panel ? next.panel : panel.data;
        const size_t length = place(std::min(kDeep, is_last ? panel.depth : panel.depth - behind));
        for (int part = 0; part < parts; ++part) {
            const int row = int(int64_t(rows) * part / parts), end = int(int64_t(rows) * (part + 1) / parts);
            const Ahead ahead = ahead_of_share(then, 0, length, part, parts, length / size_t(here / 4));
            if (is_last) next.prefetch_lines(part, parts);
            byte_rows_of<kByteRows>(end - row, unpacked, here, 0, (here + kActivationBlock - 1) / kActivationBlock,
                                    a + row * stride + first, stride, c + row * kPanel, first > 0, ahead);
            if (is_last) done(row, end, c + row * kPanel);
        }
    }
}

#endif

}  // namespace moesaic
