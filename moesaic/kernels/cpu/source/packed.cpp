// Linear layers and embeddings on packed weights, for Python.

#include "packed.h"

#include "export.h"

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
