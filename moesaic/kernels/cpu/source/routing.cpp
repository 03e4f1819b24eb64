// Routing for PyTorch, and for a whole pass: the contract is in kernels/routing.py, the work on rows in routing.h.

#include "routing.h"

#include "export.h"

void moesaic::route(Team& team, const RouteArguments& a, float* blocks, const RouteTotals* totals) {
    const int64_t tasks = route_tasks(a.tokens), padded = padded_experts(a.experts);
    const size_t stride = route_block_floats(a.experts);
    team.tasks(tasks, [&](long task) {
        thread_local Scratch own;
        float* scratch = own.get<float>(route_scratch_floats(a.experts, a.hidden));
        const int64_t first = task * kRouteRows, last = std::min<int64_t>(first + kRouteRows, a.tokens);
        RouteSums sums{}, *wanted = nullptr;
        float* block = nullptr;
        if (totals) {
            block = blocks + size_t(task) * stride;
            std::fill_n(block, stride, 0.0f);
            sums.probabilities = block;
            sums.counts = reinterpret_cast<int32_t*>(block + padded);
            wanted = &sums;
        }
        route_rows(a, first, last, scratch, wanted);
        if (totals) {
            float* rest = block + 2 * padded;
            rest[0] = sums.z;
            rest[1] = sums.entropy;
            rest[2] = float(sums.tokens);
        }
    });
    if (!totals) return;
    team.tasks(1, [&](long) {
        double z = 0, entropy = 0;
        int64_t tokens = 0;
        for (int64_t task = 0; task < tasks; ++task) {
            const float* rest = blocks + size_t(task) * stride + 2 * padded;
            z += rest[0];
            entropy += rest[1];
            tokens += int64_t(rest[2]);
        }
        const double share = 1.0 / double(std::max<int64_t>(tokens, 1));
        *totals->z = float(z * share);
        *totals->entropy = float(entropy * share / std::log(double(std::max<int64_t>(a.experts, 2))));
        *totals->num_tokens = tokens;
        for (int64_t e = 0; e < a.experts; ++e) {
            double sum = 0;
            int64_t count = 0;
            for (int64_t task = 0; task < tasks; ++task) {
                const float* block = blocks + size_t(task) * stride;
                sum += block[e];
                count += reinterpret_cast<const int32_t*>(block + padded)[e];
            }
            totals->mean_probabilities[e] = float(sum * share);
            totals->tokens_per_expert[e] = count;
        }
    });
}

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
