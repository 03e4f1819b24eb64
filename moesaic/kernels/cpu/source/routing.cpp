// Routing for PyTorch: the contract is in kernels/routing.py, the work in routing.h.

#include "routing.h"

#include "export.h"

using namespace moesaic;

// 0, or -1 for a given expert out of range. totals: mean_probabilities (E,), z, entropy as fp32; whole: tokens_per_expert (E,), num_tokens as int64.
MOESAIC_EXPORT int64_t moesaic_route(const void* x, int64_t is_bf16, const float* weight, const float* bias,
                                     const float* correction_bias, const uint8_t* valid, const int64_t* given,
                                     int64_t tokens, int64_t hidden, int64_t experts, int64_t top_k, int64_t scoring,
                                     int64_t groups, int64_t top_groups, int64_t renormalize, float scale,
                                     int64_t* expert_ids, float* routing_weights, float* logits, float* totals,
                                     int64_t* whole) try {
    for (int64_t i = 0; given && i < tokens * top_k; ++i)
        if (uint64_t(given[i]) >= uint64_t(experts)) return -1;
    thread_local Scratch shared;
    const size_t panels = router_panel_floats(experts, hidden);
    float* scratch = shared.get<float>(panels + size_t(route_tasks(tokens)) * route_block_floats(experts));
    const RouteArguments arguments{x,
                                   is_bf16 != 0,
                                   tokens,
                                   hidden,
                                   experts,
                                   top_k,
                                   scratch,
                                   bias,
                                   correction_bias,
                                   valid,
                                   given,
                                   Scoring(scoring),
                                   groups,
                                   top_groups,
                                   renormalize != 0,
                                   scale,
                                   expert_ids,
                                   routing_weights,
                                   logits};
    const RouteTotals wanted{totals, whole, totals + experts, totals + experts + 1, whole + experts};
    pack_router(experts, hidden, weight, scratch);
    run_team(2.0 * double(tokens) * double(hidden) * double(experts),
             [&](Team& team) { route(team, arguments, scratch + panels, &wanted); });
    return 0;
} MOESAIC_NO_MEMORY

MOESAIC_EXPORT int64_t moesaic_route_backward(const void* x, int64_t is_bf16, const float* weight,
                                              const float* logits, const int64_t* expert_ids, const uint8_t* valid,
                                              int64_t tokens, int64_t hidden, int64_t experts, int64_t top_k,
                                              int64_t scoring, int64_t num_tokens, const float* grad_weights,
                                              const float* grad_mean, float grad_z, void* grad_x,
                                              float* grad_weight, float* grad_bias) try {
    thread_local Scratch shared;
    const RouteBackwardArguments arguments{x,
                                           is_bf16 != 0,
                                           tokens,
                                           hidden,
                                           experts,
                                           top_k,
                                           weight,
                                           logits,
                                           expert_ids,
                                           valid,
                                           Scoring(scoring),
                                           num_tokens,
                                           grad_weights,
                                           grad_mean,
                                           grad_z,
                                           shared.get<float>(size_t(tokens * experts)),
                                           grad_x,
                                           grad_weight,
                                           grad_bias};
    run_team(4.0 * double(tokens) * double(hidden) * double(experts),
             [&](Team& team) { route_backward(team, arguments); });
    return 0;
} MOESAIC_NO_MEMORY

// The number of rows, or -1 for an expert out of range.
MOESAIC_EXPORT int64_t moesaic_plan_dispatch(const int64_t* expert_ids, const uint8_t* valid, int64_t tokens,
                                             int64_t top_k, int64_t experts, int64_t capacity, int64_t* token_ids,
                                             int64_t* slots, int64_t* tokens_per_expert) try {
    thread_local Scratch shared;
    const PlanArguments arguments{expert_ids, valid,     tokens, top_k,            experts,
                                  capacity,   token_ids, slots,  tokens_per_expert};
    int64_t* counts = shared.get<int64_t>(size_t(plan_chunks(arguments) * experts));
    std::atomic<int64_t> rows{0};
    run_team(8.0 * double(tokens * top_k), [&](Team& team) { rows = plan_dispatch(team, arguments, counts); });
    return rows;
} MOESAIC_NO_MEMORY
