// The check that every loaded library passes before it is used: the building blocks against plain loops.

#include "attention_blocks.h"
#include "export.h"
#include "packed.h"
#include "transpose.h"

#include <vector>

namespace moesaic {
namespace {

// Small whole numbers, so that every sum is exact.
float sample(int i) { return float((i * 2654435761u >> 7) % 9) - 4.0f; }

template <int Width>
bool products_are_right(int rows, int k) {
    std::vector<bf16> a(size_t(rows) * k), b(size_t(k) * Width);
    for (size_t i = 0; i < a.size(); ++i) a[i] = float_to_bf16(sample(int(i)));
    for (size_t i = 0; i < b.size(); ++i) b[i] = float_to_bf16(sample(int(i) + 77));
    std::vector<uint32_t> panel(size_t(k) / 2 * Width);
    for (int p = 0; p < k / 2; ++p)
        for (int n = 0; n < Width; ++n)
            panel[p * Width + n] = b[2 * p * Width + n] | uint32_t(b[(2 * p + 1) * Width + n]) << 16;
    std::vector<float> c(size_t(rows) * Width, 1.0f);
    gemm<Width>(rows, k / 2, a.data(), k, panel.data(), Width, c.data(), Width, false);
    gemm<Width>(rows, k / 2, a.data(), k, panel.data(), Width, c.data(), Width, true);
    leave_tiles();
    for (int m = 0; m < rows; ++m)
        for (int n = 0; n < Width; ++n) {
            float sum = 0;
            for (int i = 0; i < k; ++i) sum += bf16_to_float(a[m * k + i]) * bf16_to_float(b[i * Width + n]);
            if (c[m * Width + n] != 2 * sum) return false;
        }
    return true;
}

#if defined(MOESAIC_TILES)
// One and two rows by vectors have the bits that they have by tiles, with sums that are not exact, and subnormal ones.
bool vectors_are_tiles(int rows, int k, int exponent) {
    const auto number = [exponent](int i) {
        const uint32_t bits = uint32_t(i + 1) * 2654435761u >> 16;
        return bf16((bits & 0x807f) | uint32_t(exponent + int(bits >> 8) % 8) << 7);
    };
    std::vector<bf16> a(size_t(rows) * k);
    std::vector<uint32_t> panel(size_t(k) / 2 * kPanel);
    for (size_t i = 0; i < a.size(); ++i) a[i] = number(int(i));
    for (size_t i = 0; i < panel.size(); ++i) panel[i] = number(int(2 * i) + 7) | uint32_t(number(int(2 * i) + 8)) << 16;
    std::vector<float> by_tiles(size_t(rows) * kPanel), by_vectors(by_tiles);
    gemm<kPanel>(rows, k / 2, a.data(), k, panel.data(), kPanel, by_tiles.data(), kPanel, false);
    leave_tiles();
    multiply_by_vectors(rows, k / 2, a.data(), k, panel.data(), by_vectors.data());
    return std::memcmp(by_tiles.data(), by_vectors.data(), by_tiles.size() * sizeof(float)) == 0;
}
#endif

struct CopyRow {
    float* c = nullptr;
    void operator()(int row, const float* sums) const { std::copy(sums, sums + kPanel, c + row * kPanel); }
};

// What products take together, and one more.
constexpr int kPanels = 3;

// Bytes at the ends of their range, where 16-bit sums would saturate; scales of 1, so that the result is the sum itself, and
// all steps that there are. Every panel has the columns of the one before, one place further to the left.
template <PackedFormat kFormat>
bool integer_products_are_right(int rows, int depth) {
    constexpr bool kIsBytes = kFormat == kPackedInt8, kIsMxfp4 = kFormat == kPackedMxfp4;
    constexpr int kGroup = 32, kHeader = kIsMxfp4 ? Mxfp4::kHeader : kGroup;
    const int bytes = kIsBytes ? depth * kPanel : depth / kHeader * int(kHeaderBytes + kHeader * kPanel / 2);
    const QuantizedRow row = Packed{kFormat, kPanel, depth, kGroup, nullptr, nullptr}.quantized_row();
    const size_t stride = (row.bytes() + 63) / 64 * 64;
    std::vector<char> a(rows * stride);
    std::vector<float> c(size_t(kPanels * rows) * kPanel), room(size_t(kPanelsOfStep) * size_t(rows + 32) * kPanel),
        ones(kPanels * kPanel, 1.0f);
    const auto activation = [](int r, int k) { return k % kGroup == 0 ? 127 : (r * 31 + k * 97) % 255 - 127; };
    const auto weight = [](int k, int n) { return kIsBytes ? (k * 67 + n * 131) % 256 : (k * 5 + n * 3) % 16; };
    const auto step = [](int k, int n) { return int16_t((k / kGroup * 7 + n) % 31 - 15); };
    for (int r = 0; r < rows; ++r) {
        // What is rotated to whole numbers of which 127 is the largest, so that rounding gives them back.
        std::vector<float> x(static_cast<size_t>(depth)), rotated(x);
        for (int k = 0; k < depth; ++k) x[size_t(k)] = float(activation(r, k)) / float(kIsMxfp4 ? 1 : rotation_size(depth));
        rotate(x.data(), depth, rotated.data());
        quantize_row(row, kIsMxfp4 ? x.data() : rotated.data(), depth, a.data() + r * stride);
    }
    std::vector<uint8_t> panels(size_t(kPanels * bytes));
    for (int i = 0; i < kPanels; ++i)
        for (int k = 0; k < depth; ++k) {
            uint8_t* panel = panels.data() + size_t(i * bytes);
            uint8_t* header = panel + k / kHeader * int(kHeaderBytes + kHeader * kPanel / 2);
            for (int n = 0; n < kPanel; ++n) {
                const int column = (n + i) % kPanel;
                if (kIsBytes) {
                    panel[k / 4 * 128 + n * 4 + k % 4] = uint8_t(weight(k, column));
                    continue;
                }
                const int16_t own = step(k, column);
                if (kIsMxfp4)
                    header[k % kHeader / kGroup * kPanel + n] = 127;
                else
                    std::memcpy(header + 2 * n, &own, 2);
                header[kHeaderBytes + k % kHeader / 4 * 64 + n % 16 * 4 + k % 4] |=
                    uint8_t(weight(k, column) << (n < 16 ? 0 : 4));
            }
        }
    Waiting<CopyRow> waiting;
    const Packed packed{kFormat, kPanels * kPanel, depth, kGroup, panels.data(), ones.data()};
    packed_panels(packed, 0, 0, kPanels, rows, a.data() + packed.used_part(rows).first, stride, room.data(), nullptr,
                  waiting, [&](int index, StoreRounded&) {
                      return PanelResult<CopyRow>{{c.data() + size_t(index * rows) * kPanel}, {}};
                  });
    waiting.all();
    leave_tiles();
    for (int r = 0; r < rows; ++r)
        for (int n = 0; n < kPanel; ++n) {
            double sum = 0;
            for (int k = 0; k < depth; ++k)
                sum += float(activation(r, k)) * (kIsMxfp4   ? Mxfp4::number(weight(k, n), 127)
                                                  : kIsBytes ? float(weight(k, n) - 128)
                                                             : float((weight(k, n) - 8) * step(k, n)));
            for (int i = 0; i < kPanels; ++i)
                if (c[size_t(i * rows + r) * kPanel + size_t((n - i + kPanel) % kPanel)] != float(sum)) return false;
        }
    return true;
}

// Many rows of bf16 have the bits of single ones.
bool rows_are_their_own(int rows, int depth) {
    std::vector<bf16> panels(size_t(kPanels * kPanel) * size_t(depth));
    for (size_t i = 0; i < panels.size(); ++i) panels[i] = float_to_bf16(sample(int(i)));
    const Packed packed{kPackedBf16, kPanels * kPanel, depth, 0, reinterpret_cast<const uint8_t*>(panels.data()), nullptr};
    const size_t stride = packed.row_bytes(), count = size_t(kPanels * rows) * kPanel;
    std::vector<char> a(size_t(rows) * stride);
    std::vector<float> x(static_cast<size_t>(depth)), all(count), each(count);
    std::vector<float> room(size_t(kPanelsOfStep) * size_t(rows + 32) * kPanel);
    for (int r = 0; r < rows; ++r) {
        for (int k = 0; k < depth; ++k) x[size_t(k)] = sample(r * depth + k);
        prepare_row(packed, x.data(), a.data() + size_t(r) * stride);
    }
    const auto multiply = [&](int first, int number, std::vector<float>& to) {
        Waiting<CopyRow> waiting;
        packed_panels(packed, 0, 0, kPanels, number, a.data() + size_t(first) * stride, stride, room.data(), nullptr,
                      waiting, [&](int index, StoreRounded&) {
                          return PanelResult<CopyRow>{{to.data() + size_t(index * rows + first) * kPanel}, {}};
                      });
        waiting.all();
    };
    multiply(0, rows, all);
    for (int r = 0; r < rows; ++r) multiply(r, 1, each);
    leave_tiles();
    return std::memcmp(all.data(), each.data(), count * sizeof(float)) == 0;
}

// The Hadamard matrix, whose elements are 1 or -1 by the parity of the bits that row and column share.
bool rotation_is_right(int64_t depth) {
    const size_t count = size_t(depth);
    std::vector<float> x(count), y(count + W);
    for (int64_t k = 0; k < depth; ++k) x[size_t(k)] = sample(int(k));
    rotate(x.data(), depth, y.data());
    const int64_t size = rotation_size(depth);
    for (int64_t k = 0; k < depth; ++k) {
        float sum = 0;
        for (int64_t i = 0; i < size; ++i)
            sum += x[size_t(k / size * size + i)] * (__builtin_parityll((k % size) & i) ? -1.0f : 1.0f);
        if (y[size_t(k)] != sum) return false;
    }
    return true;
}

bool transposition_is_right(int rows, int columns) {
    std::vector<uint32_t> from(size_t(rows) * columns), to(size_t(rows) * columns, 0);
    for (size_t i = 0; i < from.size(); ++i) from[i] = uint32_t(i);
    transpose_dwords(rows, columns, from.data(), columns, to.data(), rows);
    for (int r = 0; r < rows; ++r)
        for (int c = 0; c < columns; ++c)
            if (to[c * rows + r] != from[r * columns + c]) return false;
    return true;
}

bool exponential_is_right() {
    for (float x = -90.0f; x < 90.0f; x += 0.0137f) {
        float values[W];
        store(values, exp(set1(x)));
        const double wanted = std::exp(double(x));
        if (x > -86.9f && x < 88.7f && std::abs(values[0] - wanted) > 2.0e-7 * wanted) return false;
    }
    float values[W];
    store(values, exp(set1(NAN)));
    if (values[0] == values[0]) return false;
    store(values, exp(set1(INFINITY)));
    if (values[0] != INFINITY) return false;
    store(values, exp(set1(-INFINITY)));
    return values[0] == 0.0f;
}

bool score_exponentials_are_right() {
    const float scale = 0.125f, largest = 40.0f;
    Vf out[2];
    for (float x = 0.0f; x < 640.0f; x += 0.0137f) {
        ScoreExponentials row(scale, largest);
        row.take(set1(largest - x), set1(-INFINITY), out);
        float values[2][W];
        for (int i = 0; i < 2; ++i) store(values[i], out[i]);
        const double wanted = std::exp(double(scale) * -x);
        if (std::abs(values[0][0] - wanted) > 1.0e-5 * wanted || values[1][0] != 0.0f) return false;
        if (std::abs(row.total() - W * wanted) > 1.0e-5 * W * wanted) return false;
    }
    for (const float x : {NAN, INFINITY}) {
        ScoreExponentials row(scale, x == INFINITY ? x : largest);
        row.take(set1(largest), set1(x), out);
        if (row.total() == row.total()) return false;
    }
    return true;
}

bool team_does_each_task_once() {
    std::vector<int> done(1000, 0);
    run_team(1e9, [&](Team& team) {
        for (int phase = 0; phase < 8; ++phase) team.tasks(1000, [&](long i) { ++done[i]; });
    });
    for (int count : done)
        if (count != 8) return false;
    return true;
}

}  // namespace
}  // namespace moesaic

// Have a member of a team ask for more memory than there can be, while the others wait: so that tests see what follows.
MOESAIC_EXPORT int64_t moesaic_lack_memory(int64_t member) try {
    using namespace moesaic;
    run_team(1e9, [&](Team& team) {
        team.barrier();
        Scratch scratch;
        if (team.member() == member) scratch.get<char>(size_t(1) << 62);
        team.barrier();
    });
    return 0;
} MOESAIC_NO_MEMORY

// 0, or the number of the first step that went wrong.
MOESAIC_EXPORT int64_t moesaic_self_test() try {
    using namespace moesaic;
    for (int rows : {1, 2, 7, 16, 17, 31, 32, 33, 70})
        for (int k : {32, 96}) {
            if (!products_are_right<16>(rows, k) || !products_are_right<32>(rows, k)) return 1;
#if !defined(MOESAIC_TILES)
            if (!products_are_right<48>(rows, k) || !products_are_right<32>(rows, k + 194)) return 1;
#endif
        }
    for (int rows : {1, 5, 16, 40})
        for (int columns : {1, 16, 23})
            if (!transposition_is_right(rows, columns)) return 2;
    if (!exponential_is_right() || !score_exponentials_are_right()) return 3;
    if (!team_does_each_task_once()) return 4;
    for (int rows : {1, 3, 5, 8, 20, 33})
        for (int depth : {256, 1280})
            if (!integer_products_are_right<kPackedInt8>(rows, depth) ||
                !integer_products_are_right<kPackedInt4>(rows, depth) ||
                !integer_products_are_right<kPackedMxfp4>(rows, depth))
                return 5;
    // Panels taken two at a time, in several pieces of K.
    if (!integer_products_are_right<kPackedInt8>(41, 320) || !integer_products_are_right<kPackedInt4>(41, 320)) return 5;
    if (!rows_are_their_own(41, 160)) return 8;
    for (int64_t depth : {1, 6, 20, 24, 48, 96, 128, 192, 512, 768, 1024, 2048, 4096, 8192})
        if (!rotation_is_right(depth)) return 7;
#if defined(MOESAIC_TILES)
    for (int rows = 1; rows <= kVectorRows; ++rows)
        for (int k : {32, 96, 2176})
            for (int exponent : {0, 56, 120})
                if (!vectors_are_tiles(rows, k, exponent)) return 6;
#endif
    return 0;
} MOESAIC_NO_MEMORY
