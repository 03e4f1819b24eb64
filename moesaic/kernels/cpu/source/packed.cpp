// Linear layers and embeddings on packed weights, for Python.

#include "packed.h"

#include "export.h"

MOESAIC_EXPORT int64_t moesaic_packed_linear(int64_t format, int64_t columns, int64_t depth, int64_t group,
                                             const uint8_t* data, const float* scales, int64_t rows, const void* x,
                                             int64_t x_is_bf16, const float* bias, void* out, int64_t out_is_bf16) {
    using namespace moesaic;
    const Packed weight{format, columns, depth, group, data, scales};
    static thread_local Scratch workspace;
    const LinearCall call{weight, rows, x, depth, x_is_bf16, bias, out, columns, out_is_bf16,
                          workspace.get<char>(packed_linear_workspace(weight, rows) + 64)};
    run_team(2.0 * double(rows) * double(columns) * double(depth), [&](Team& team) { packed_linear(team, call); });
    return 0;
}

MOESAIC_EXPORT int64_t moesaic_packed_rows(int64_t format, int64_t columns, int64_t depth, int64_t group,
                                           const uint8_t* data, const float* scales, int64_t count, const int64_t* ids,
                                           uint16_t* out) {
    using namespace moesaic;
    const Packed weight{format, columns, depth, group, data, scales};
    run_team(20.0 * double(count) * double(depth), [&](Team& team) {
        team.tasks(long(count), [&](long i) { packed_row(weight, ids[i], out + i * depth); });
    });
    return 0;
}
