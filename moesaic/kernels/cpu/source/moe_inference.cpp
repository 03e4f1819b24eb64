// The layer of experts on packed weights, for Python.

#include "moe_inference.h"

#include "export.h"

// `call` as Python fills it, without a workspace.
MOESAIC_EXPORT int64_t moesaic_packed_moe(const void* arguments) {
    using namespace moesaic;
    MoeCall call = *static_cast<const MoeCall*>(arguments);
    static thread_local Scratch workspace;
    call.workspace = workspace.get<char>(packed_moe_workspace(call) + 64);
    const double inner = double(call.experts.up.columns + call.experts.down.depth);
    double work = double(call.tokens * call.top_k) * double(call.experts.up.depth) * inner;
    if (call.residual)
        work += double(call.tokens) * double(call.residual->up.depth) *
                double(call.residual->up.columns + call.residual->down.depth);
    run_team(2.0 * work, [&](Team& team) { packed_moe(team, call); });
    return 0;
}
