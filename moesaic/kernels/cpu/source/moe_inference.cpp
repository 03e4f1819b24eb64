// The layer of experts on packed weights, for Python.

#include "moe_inference.h"

#include "export.h"

// `arguments` has no workspace. 1 when an id names no expert.
MOESAIC_EXPORT int64_t moesaic_packed_moe(const moesaic::MoeCall* arguments) try {
    using namespace moesaic;
    MoeCall call = *arguments;
    for (int64_t i = 0; i < call.tokens * call.top_k; ++i)
        if (call.expert_ids[i] >= call.num_experts) return 1;
    static thread_local Scratch workspace;
    call.workspace = workspace.get<char>(packed_moe_workspace(call) + 64);
    auto work_of = [&](const PackedMlp& mlp, int64_t rows) {
        return 2.0 * double(rows) * double(mlp.up.depth) * double(mlp.up.columns + mlp.down.depth);
    };
    double work = work_of(call.experts, call.tokens * call.top_k);
    if (call.residual) work += work_of(*call.residual, call.tokens);
    run_team(work, [&](Team& team) { packed_moe(team, call); });
    return 0;
} MOESAIC_NO_MEMORY
