// A pass of a packed model over the new tokens of some sequences, for Python: see decode.h.

#include "decode.h"

#include "export.h"

// The router's weight (E, H) in the form that a DecodeLayer takes; the number of floats in it where panels is null.
MOESAIC_EXPORT int64_t moesaic_decode_router(int64_t experts, int64_t hidden, const float* weight, float* panels) try {
    using namespace moesaic;
    if (panels) pack_router(experts, hidden, weight, panels);
    return int64_t(router_panel_floats(experts, hidden));
} MOESAIC_NO_MEMORY

// Have pages read as a pass has those of likely experts read, without waiting for them: so that tests reach the reader.
MOESAIC_EXPORT int64_t moesaic_want_pages(const uint8_t* from, int64_t bytes) try {
    using namespace moesaic;
    ExpertReader& reader = ExpertReader::instance();
    reader.want(reader.reach_next() + 1, {{from, size_t(bytes)}});
    return 0;
} MOESAIC_NO_MEMORY

// `caches` holds one PagedCache for each layer, `rows` the tokens (strictly rising) whose logits are wanted. Returns 1
// when positions of the batch have no block or are more than the model has, or rows name no tokens, 2 for a token outside
// the vocabulary.
MOESAIC_EXPORT int64_t moesaic_decode(const moesaic::DecodeModel* model, double work_per_token, const void* caches,
                                      const int32_t* starts, const int32_t* lengths, const int32_t* tables,
                                      int64_t num_sequences, int64_t table_width, const int64_t* tokens,
                                      int64_t num_tokens, const int64_t* rows, int64_t num_rows, uint16_t* hidden,
                                      int64_t* expert_ids, float* routing_weights, float* logits,
                                      int64_t* likeliest) try {
    using namespace moesaic;
    static thread_local Scratch workspace, places;
    DecodeCall call{model,
                    static_cast<const PagedCache*>(caches),
                    {starts, lengths, tables, num_sequences, table_width},
                    tokens,
                    num_tokens,
                    rows,
                    num_rows,
                    hidden,
                    expert_ids,
                    routing_weights,
                    logits,
                    likeliest,
                    {},
                    {},
                    {},
                    nullptr,
                    should_guess(*model, num_tokens)};
    if (!is_valid(call.batch, call.caches[0], num_tokens)) return 1;
    auto* positions = places.get<int32_t>(size_t(num_tokens));
    for (int64_t s = 0; s < num_sequences; ++s) {
        if (lengths[s] > model->max_positions) return 1;
        for (int32_t token = starts[s]; token < starts[s + 1]; ++token)
            positions[token] = lengths[s] - starts[s + 1] + token;
    }
    for (int64_t token = 0; token < num_tokens; ++token)
        if (tokens[token] < 0 || tokens[token] >= model->vocab_size) return 2;
    for (int64_t i = 0; i < num_rows; ++i)
        if (rows[i] < (i ? rows[i - 1] + 1 : 0) || rows[i] >= num_tokens) return 1;
    call.positions = positions;
    // Of latents, so many rows of queries at a time that what stands between the products stays in a cache.
    constexpr int64_t kRowsAtOnce = 8192;
    if (model->has_latents())
        call.latent_plan = plan_latent(call.batch, call.caches[0], model->num_heads, model->kv_rank, kRowsAtOnce);
    else
        call.plan = plan_paged(call.batch, call.caches[0], model->num_heads, kNoWindow);
    if (model->window)
        call.window_plan = plan_paged(call.batch, call.caches[0], model->num_heads, window_of(model->window));
    const size_t bytes = DecodeWorkspace(call, nullptr).bytes;
    const DecodeWorkspace work(call, workspace.get<char>(bytes));
    const double attention = (call.plan.work + call.latent_plan.work) * double(model->num_layers);
    const double head = 2.0 * double(model->vocab_size * model->hidden_size) * double(num_rows);
    run_team(work_per_token * double(num_tokens) + attention + head, [&](Team& team) { decode(team, call, work); });
    if (model->guesses) ++model->guesses->num_passes;
    return 0;
} MOESAIC_NO_MEMORY
