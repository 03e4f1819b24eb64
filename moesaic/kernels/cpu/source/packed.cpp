// Linear layers and embeddings on packed weights, for Python.

#include "packed.h"

#include "export.h"

namespace moesaic {

void packed_linear(Team& team, const LinearCall& call) {
    const Packed& weight = call.weight;
    const size_t row_bytes = weight.row_bytes();
    auto prepare = [&](int64_t row, char* to) {
        with_element_type(call.x_is_bf16, [&](auto kind) {
            using T = decltype(kind);
            prepare_row(weight, static_cast<const T*>(call.x) + row * call.x_stride, to);
        });
    };
    static thread_local Scratch sums, copies;
    char* prepared = call.workspace;
    if (weight.is_integer() && are_private(call.rows)) {
        prepared = copies.get<char>(size_t(kPrivateRows) * row_bytes);
        for (int64_t row = 0; row < call.rows; ++row) prepare(row, prepared + row * row_bytes);
    } else if (weight.is_integer()) {
        const int64_t chunk = std::min<int64_t>(8, (call.rows + team.size() - 1) / team.size());
        team.tasks(long((call.rows + chunk - 1) / chunk), [&](long task) {
            const int64_t end = (task + 1) * chunk < call.rows ? (task + 1) * chunk : call.rows;
            for (int64_t row = task * chunk; row < end; ++row) prepare(row, prepared + row * row_bytes);
        });
    }
    // Tiles take rows of the second-level cache a fifth faster where they are an odd number of lines apart.
    const size_t x_bytes = size_t(call.x_stride) * sizeof(bf16);
    const bool is_even = kHasTiles && call.rows > kPackedRows && x_bytes % 128 != 64;
    const bool is_direct = !weight.changes_rows() && call.x_is_bf16 && weight.depth % 32 == 0 &&
                           !share_cache_sets(x_bytes) && !is_even;
    const int step = weight.is_integer() ? kRowBlock : kPackedRows;
    const int most = rows_at_once(row_bytes), panels = weight.panels();
    // As many runs of rows for every thread where there are enough; else the columns are shared out too.
    int row_parts = int((call.rows + most - 1) / most);
    const bool by_rows = row_parts >= 2 * team.size();
    if (by_rows) row_parts = round_up(row_parts, team.size());
    const Slices slices{panels, team.size(), panels};
    const int column_parts = by_rows ? 1 : slices.count();
    auto first_row = [&](int part) {
        const int64_t row = call.rows * part / row_parts;
        return part == row_parts || call.rows < row_parts * step ? row : row / step * step;
    };
    float* c = sums.get<float>(size_t(kPanelsOfStep) * size_t(most + kPackedRows) * kPanel);
    char* copied = weight.is_integer() || is_direct ? nullptr : copies.get<char>(size_t(most + kPackedRows) * row_bytes);
    // Results that no cache holds until they are read go past it. A line of each row at a time, often a power of two
    // apart, they would push the rows of x out. Not with tiles: beside products they take 3.3 ms so where it was 3.7
    // (4,096 x 512 by 2,048), but 5.2 where a cache still holds what was written to the same place before.
#if defined(MOESAIC_TILES)
    const bool past_caches = false;
#else
    const bool past_caches = weight.format == kPackedBf16 && call.out_is_bf16 && call.out_stride % kPanel == 0 &&
                             reinterpret_cast<uintptr_t>(call.out) % 64 == 0 &&
                             size_t(call.rows) * size_t(weight.columns) * sizeof(bf16) >= (size_t(2) << 20);
#endif
    Waiting<WriteRow> waiting;
    int held = -1;
    team.tasks(long(row_parts) * column_parts, [&](long task) {
        const int part = int(task / column_parts), column = int(task % column_parts);
        const int64_t first = first_row(part), last = first_row(part + 1);
        const int rows = int(last - first);
        const char* a = prepared + size_t(first) * row_bytes + weight.used_part(rows).first;
        size_t stride = row_bytes;
        if (is_direct) {
            a = reinterpret_cast<const char*>(static_cast<const bf16*>(call.x) + first * call.x_stride);
            stride = size_t(call.x_stride) * 2;
        } else if (copied) {
            if (held != part)
                for (int r = 0; r < rows; ++r) prepare(first + r, copied + size_t(r) * row_bytes);
            held = part;
            a = copied;
        }
        const int begin = by_rows ? 0 : slices.begin(column), end = by_rows ? panels : slices.begin(column + 1);
        packed_panels(weight, 0, begin, end, rows, a, stride, c, nullptr, waiting, [&](int index, StoreRounded& rounded) {
            // Where the results go: a line of every row, which would stall the writing of short sums.
            const size_t size = call.out_is_bf16 ? 2 : 4, out_stride = size_t(call.out_stride) * size;
            char* place = static_cast<char*>(call.out) + size_t(first) * out_stride + index * kPanel * size;
            const int64_t left = weight.columns - index * kPanel;
            const WriteRow write{place, out_stride, left, call.bias ? call.bias + index * kPanel : nullptr,
                                 bool(call.out_is_bf16)};
            rounded = {c, write.bias, reinterpret_cast<bf16*>(place), size_t(call.out_stride), past_caches};
            return PanelResult<WriteRow>{write, {nullptr, place, out_stride, past_caches ? 0 : rows},
                                         call.out_is_bf16 && left >= kPanel ? &rounded : nullptr};
        });
        waiting.all();
    });
}

void PackedHeads::run(long task) const {
    const Packed& weight = call_.weight;
    const int column = int(task % columns_), part = int(task / columns_ % row_parts_);
    const int64_t head = task / columns_ / row_parts_;
    const int64_t first = first_row(part), last = first_row(part + 1);
    const int rows = int(last - first);
    static thread_local Scratch sums, copies;
    const size_t row_bytes = weight.row_bytes();
    char* a = copies.get<char>(size_t(rows) * row_bytes);
    for (int r = 0; r < rows; ++r)
        prepare_row(weight, call_.x + (first + r) * call_.x_stride + head * call_.x_head_stride,
                    a + size_t(r) * row_bytes);
    float* c = sums.get<float>(size_t(kPanelsOfStep) * size_t(rows + kPackedRows) * kPanel);
    bf16* out = call_.out + first * call_.out_stride + head * call_.out_head_stride;
    Waiting<WriteRow> waiting;
    const int panels = weight.panels(), end = panels * (column + 1) / columns_;
    const auto result_of = [&](int index, StoreRounded& rounded) {
        bf16* place = out + index * kPanel;
        const int64_t left = weight.columns - index * kPanel;
        const WriteRow write{reinterpret_cast<char*>(place), size_t(call_.out_stride) * sizeof(bf16), left};
        rounded = {c, nullptr, place, size_t(call_.out_stride), false};
        return PanelResult<WriteRow>{write, {nullptr, write.out, write.stride, rows},
                                     left >= kPanel ? &rounded : nullptr};
    };
    packed_panels(weight, head, panels * column / columns_, end, rows, a, row_bytes, c, nullptr, waiting, result_of);
    waiting.all();
}

}  // namespace moesaic

MOESAIC_EXPORT int64_t moesaic_packed_linear(const moesaic::Packed* weight, int64_t rows, const void* x,
                                             int64_t x_is_bf16, const float* bias, void* out, int64_t out_is_bf16) try {
    using namespace moesaic;
    static thread_local Scratch workspace;
    LinearCall call{*weight, rows, x, weight->depth, x_is_bf16, bias, out, weight->columns, out_is_bf16, nullptr};
    call.workspace = workspace.get<char>(packed_linear_workspace(*weight, rows) + 64);
    const double work = 2.0 * double(rows) * double(weight->columns) * double(weight->depth);
    run_team(work, [&](Team& team) { packed_linear(team, call); });
    return 0;
} MOESAIC_NO_MEMORY

// x (rows, num_heads, K) with strides in elements, out (rows, num_heads, N).
MOESAIC_EXPORT int64_t moesaic_packed_heads(const moesaic::Packed* weight, int64_t num_heads, int64_t rows,
                                            const moesaic::bf16* x, int64_t x_stride, int64_t x_head_stride,
                                            moesaic::bf16* out) try {
    using namespace moesaic;
    const int64_t size = weight->columns;
    const HeadsCall call{*weight, num_heads, rows, x, x_stride, x_head_stride, out, num_heads * size, size};
    const double work = 2.0 * double(rows) * double(num_heads) * double(size) * double(weight->depth);
    run_team(work, [&](Team& team) {
        const PackedHeads heads(call, team.size());
        team.tasks(heads.count(), [&](long task) { heads.run(task); });
    });
    return 0;
} MOESAIC_NO_MEMORY

// 1 when an id names no row.
MOESAIC_EXPORT int64_t moesaic_packed_rows(const moesaic::Packed* weight, int64_t count, const int64_t* ids,
                                           moesaic::bf16* out) try {
    using namespace moesaic;
    for (int64_t i = 0; i < count; ++i)
        if (ids[i] < 0 || ids[i] >= weight->columns) return 1;
    run_team(20.0 * double(count) * double(weight->depth), [&](Team& team) {
        team.tasks(long(count), [&](long i) { packed_row(*weight, ids[i], out + i * weight->depth); });
    });
    return 0;
} MOESAIC_NO_MEMORY
