// A whole pass of a packed model over the new tokens of some sequences, from embedding to logits, inside one team.
//
// For a few tokens a layer is some hundred microseconds of reading weights; calling its twenty operations one by one
// costs as much again. Here they follow each other through the team's barriers. Every number is rounded where the same
// operations called one by one round it.
#pragma once

#include <cmath>
#include <limits>

#include "attention_latent.h"
#include "expert_reader.h"
#include "moe_inference.h"
#include "norm.h"
#include "rotary.h"
#include "routing.h"

namespace moesaic {

enum ResidualMix : int64_t { kMixSum = 0, kMixSoftmax = 1, kMixSigmoid = 2 };

struct NormWeights {
    const float* weight;
    const float* bias;  // null for RMSNorm
};

// All members are of 8 bytes: Python fills these structs. Pointers to what a layer does not have are null.
struct DecodeLayer {
    NormWeights attention_norm, feed_forward_norm;
    // Rows of all query heads, key heads, value heads; with latents, of all query heads or the vector that they are made
    // of, the latent, and the key that all heads share.
    const Packed* qkv_proj;
    const float* qkv_bias;
    const float* q_norm;  // with latents: of the vector that queries are made of, and of the latent
    const float* k_norm;
    int64_t norms_all_heads;  // whether they norm all heads of a token as one row, or each head
    int64_t is_rotated;       // whether heads are turned, where the model has cosines; with latents they are
    int64_t norms_rotated;    // whether they norm each head after its rotation, or before it
    const Packed* q_up;      // with latents; null where queries are in qkv_proj
    const Packed* key_up;    // (A, R, N), from a query to the latents' space
    const Packed* value_up;  // (A, C, R), out of it
    const float* sinks;      // (A)
    int64_t has_window;      // whether its tokens see the last DecodeModel::window positions alone
    const Packed* o_proj;
    const float* o_bias;
    const PackedMlp* mlp;      // the dense MLP, or the residual one beside the experts
    const PackedMlp* experts;
    int64_t num_experts, top_k;
    int64_t first_expert, own_experts;  // which of them are here: all, but where others are on other processes
    const float* router;  // as pack_router left it
    const float* router_bias;
    const float* correction_bias;
    Scoring scoring;
    int64_t num_groups, top_groups, renormalize;
    double router_scale;
    int64_t mix;
    const Packed* mix_weight;  // (2, H) or (1, H)
    const float* mix_bias;
};

// What is known from pass to pass of guess_experts: the share of experts that were guessed right of late, and passes.
struct ExpertGuesses {
    double share;
    int64_t num_passes;
};

// Guesses that are right less often cost more than they give: where the disk is what is waited for, what is read for
// nothing doubles the time, and takes the place of what is needed. They are then made in one pass of so many, to see.
constexpr double kWorthReading = 0.8, kShareKept = 0.95;
constexpr int64_t kPassesOfATrial = 16;

struct DecodeModel {
    int64_t num_layers, hidden_size, vocab_size, max_positions, num_heads, num_kv_heads, head_dim;
    int64_t norms_outputs;  // whether norms stand behind attention and feed-forward parts, or before them
    double norm_epsilon, attention_scale, embedding_scale, residual_scale;
    int64_t window;  // 0 where no layer has one
    const DecodeLayer* layers;
    const Packed* tied_embedding;  // else:
    const bf16* embedding;         // (V, H)
    const bf16* position_embedding;
    const float *cosines, *sines;  // (max_positions, D/2)
    NormWeights final_norm;
    const Packed* head;      // (V, H)
    ExpertGuesses* guesses;  // where its experts lie in a mapped file that does not fit into memory, else null
    // Latent attention: its ranks (0: keys and values of their own; queries made in one step) and a head's channels.
    int64_t kv_rank, query_rank, nope_dim, rope_dim, value_dim;
    double latent_epsilon;
    // Adds to (T, H) what the experts of other processes make of the same tokens; null where all experts are here.
    void (*add_others)(float* sums, int64_t tokens);

    bool has_latents() const { return kv_rank > 0; }
    int64_t query_size() const { return num_heads * head_dim; }
    int64_t attended_size() const { return num_heads * (has_latents() ? value_dim : head_dim); }
    int64_t qkv_size() const {
        if (has_latents()) return (query_rank ? query_rank : query_size()) + kv_rank + rope_dim;
        return (num_heads + 2 * num_kv_heads) * head_dim;
    }
};

struct DecodeCall {
    const DecodeModel* model;
    const PagedCache* caches;  // of each layer
    PagedBatch batch;
    const int64_t* tokens;  // (T)
    int64_t num_tokens;
    const int64_t* rows;  // (R), strictly rising: the tokens whose logits are wanted
    int64_t num_rows;
    bf16* hidden;            // (T, H), after the final norm
    int64_t* expert_ids;     // of one MoE layer after the other (T, top_k)
    float* routing_weights;  // likewise
    float* logits;           // (R, V)
    int64_t* likeliest;      // (R), the first of the largest logits, -1 where not all are finite
    PagedPlan plan, window_plan;  // of layers without and with a window
    LatentPlan latent_plan;       // instead of them
    const int32_t* positions;  // (T)
    bool guesses_experts;      // decided once: the team goes one way

    bool is_private() const { return are_private(num_tokens); }
    bool shares_experts() const { return model->add_others != nullptr; }
    int64_t most_routes() const {  // of a layer
        int64_t most = 0;
        for (int64_t i = 0; i < model->num_layers; ++i) most = std::max(most, num_tokens * model->layers[i].top_k);
        return most;
    }
};

// Of some logits the largest, NaN where not all are finite, and the first token that has it.
struct Likeliest {
    float logit;
    int64_t token;
};

// Columns of one row that are searched together.
constexpr int64_t kSearched = 4096;

// Everything between the operations, for T tokens.
struct DecodeWorkspace {
    // Of these every member has its own where tokens are few.
    bf16 *x, *normed;
    float *mean, *inverse, *own_weights;
    int64_t* own_ids;

    bf16 *qkv, *attended, *out;
    bf16 *query, *latent_query, *means;  // with latents; the last two of a part of the tokens
    float *coefficients, *residual_weights, *partials, *guessed_weights, *router_parts;
    float* sums;         // of the experts that are here, where others are not
    int64_t* local_ids;  // counted from the first of them, -1 for others
    int64_t* guessed_ids;
    Likeliest* likeliest;  // of every kSearched columns
    char* operation;
    size_t bytes;

    // What follows is for this member.
    void use_own_of(const DecodeCall& call, int member) { place_own(call, base_ + size_t(member) * own_bytes_); }

    DecodeWorkspace(const DecodeCall& call, char* base) : base_(base) {
        const DecodeModel& model = *call.model;
        const size_t tokens = size_t(call.num_tokens), hidden = size_t(model.hidden_size);
        own_bytes_ = place_own(call, nullptr);
        place_own(call, base);
        size_t used = own_bytes_ * (call.is_private() ? size_t(omp_get_max_threads()) : 1);
        auto take = [&](size_t size) {
            char* place = base ? base + used : nullptr;
            used += (size + 63) / 64 * 64;
            return place;
        };
        int64_t most_parts = 0;
        for (int64_t i = 0; i < model.num_layers && call.is_private(); ++i)
            if (model.layers[i].num_experts)
                most_parts = std::max(most_parts, int64_t(route_parts_floats(
                                                      call.num_tokens, model.layers[i].num_experts, model.hidden_size)));
        out = reinterpret_cast<bf16*>(take(tokens * hidden * sizeof(bf16)));
        qkv = reinterpret_cast<bf16*>(take(tokens * size_t(model.qkv_size()) * sizeof(bf16)));
        attended = reinterpret_cast<bf16*>(take(tokens * size_t(model.attended_size()) * sizeof(bf16)));
        if (model.has_latents()) {
            const size_t rows = size_t(call.latent_plan.most_tokens * model.num_heads);
            const size_t channels = size_t(round_up(int(model.kv_rank), kPanel));
            query = reinterpret_cast<bf16*>(take(tokens * size_t(model.query_rank ? model.query_size() : 0) * sizeof(bf16)));
            latent_query = reinterpret_cast<bf16*>(take(rows * size_t(call.caches[0].width()) * sizeof(bf16)));
            means = reinterpret_cast<bf16*>(take(rows * channels * sizeof(bf16)));
        }
        coefficients = reinterpret_cast<float*>(take(2 * tokens * sizeof(float)));
        residual_weights = reinterpret_cast<float*>(take(tokens * sizeof(float)));
        partials = reinterpret_cast<float*>(
            take(std::max({call.plan.partial_floats, call.window_plan.partial_floats, call.latent_plan.partial_floats}) *
                 sizeof(float)));
        router_parts = reinterpret_cast<float*>(take(size_t(most_parts) * sizeof(float)));
        const int64_t most_routes = call.guesses_experts ? call.most_routes() : 0;
        guessed_ids = reinterpret_cast<int64_t*>(take(size_t(most_routes) * sizeof(int64_t)));
        guessed_weights = reinterpret_cast<float*>(take(size_t(most_routes) * sizeof(float)));
        sums = reinterpret_cast<float*>(take(call.shares_experts() ? tokens * hidden * sizeof(float) : 0));
        local_ids = reinterpret_cast<int64_t*>(
            take(call.shares_experts() ? size_t(call.most_routes()) * sizeof(int64_t) : 0));
        const int64_t searches = call.num_rows * ((model.vocab_size + kSearched - 1) / kSearched);
        likeliest = reinterpret_cast<Likeliest*>(take(size_t(searches) * sizeof(Likeliest)));
        size_t most = 0;
        auto at_least = [&](size_t size) { most = size > most ? size : most; };
        for (int64_t i = 0; i < model.num_layers; ++i) {
            const DecodeLayer& layer = model.layers[i];
            at_least(packed_linear_workspace(*layer.qkv_proj, call.num_tokens));
            at_least(packed_linear_workspace(*layer.o_proj, call.num_tokens));
            if (layer.q_up) at_least(packed_linear_workspace(*layer.q_up, call.num_tokens));
            if (layer.mix_weight) at_least(packed_linear_workspace(*layer.mix_weight, call.num_tokens));
            at_least(packed_moe_workspace(moe_call(call, layer)));
        }
        at_least(packed_linear_workspace(*model.head, call.num_rows));
        operation = take(most);
        bytes = used;
    }

    // The members' own from `at` on; returns how many bytes that is.
    size_t place_own(const DecodeCall& call, char* at) {
        const size_t tokens = size_t(call.num_tokens), hidden = size_t(call.model->hidden_size);
        const size_t routes = call.is_private() ? size_t(call.most_routes()) : 0;
        size_t used = 0;
        auto take = [&](auto*& pointer, size_t count) {
            using T = std::remove_reference_t<decltype(*pointer)>;
            pointer = at ? reinterpret_cast<T*>(at + used) : nullptr;
            used += (count * sizeof(T) + 63) / 64 * 64;
        };
        take(x, tokens * hidden), take(normed, tokens * hidden), take(mean, tokens), take(inverse, tokens);
        take(own_ids, routes), take(own_weights, routes);
        return used;
    }

    MoeCall moe_call(const DecodeCall& call, const DecodeLayer& layer) const {
        MoeCall moe{};
        moe.experts = layer.experts ? *layer.experts : *layer.mlp;
        moe.num_experts = layer.own_experts;
        const bool has_residual = layer.first_expert == 0;  // else another process adds it
        moe.residual = has_residual ? layer.mlp : nullptr;
        moe.residual_weights = layer.mix == kMixSum || !has_residual ? nullptr : residual_weights;
        moe.tokens = call.num_tokens;
        moe.top_k = layer.top_k;
        moe.x = normed;
        moe.x_is_bf16 = moe.out_is_bf16 = 1;
        moe.out = out;
        if (call.shares_experts() && layer.num_experts) moe.out = sums, moe.out_is_bf16 = 0;
        moe.workspace = operation;
        return moe;
    }

  private:
    char* base_;
    size_t own_bytes_;
};

// out = norm(x) of one row.
inline void norm_token(const DecodeModel& model, const NormWeights& weights, int64_t row, const bf16* x, bf16* out,
                       const DecodeWorkspace& work) {
    NormArguments norm{x, true, row + 1, model.hidden_size, weights.weight, weights.bias, float(model.norm_epsilon), out,
                       weights.bias ? work.mean : nullptr, work.inverse};
    weights.bias ? norm_row<bf16, true>(norm, row) : norm_row<bf16, false>(norm, row);
}

// x (+= added * residual_scale, rounded), and out = norm(x), for rows [first, last). behind: the norm of what is added,
// before: that of x, null where there is none. Rows of a prompt come from the third-level cache: each is asked for while
// the one before is worked on.
inline void add_and_norm(const DecodeModel& model, const NormWeights* behind, const NormWeights* before, int64_t first,
                         int64_t last, const bf16* added, bf16* x, bf16* out, const DecodeWorkspace& work) {
    const int64_t size = model.hidden_size;
    const Vf scale = set1(float(model.residual_scale));
    for (int64_t row = first; row < last; ++row) {
        if (added) {
            // What is added belongs to all members; out is this one's own.
            if (behind) norm_token(model, *behind, row, added, out, work);
            bf16* own = x + row * size;
            const bf16* more = (behind ? out : added) + row * size;
            for (int64_t i = 0; i < size; i += W) {
                if (i % 32 == 0 && row + 1 < last) {
                    _mm_prefetch(reinterpret_cast<const char*>(own + size + i), _MM_HINT_T0);
                    _mm_prefetch(reinterpret_cast<const char*>(more + size + i), _MM_HINT_T0);
                }
                const Vf scaled = mul(load_row(more + i, size - i), scale);
                store_row(own + i, add(load_row(own + i, size - i), scaled), size - i);
            }
        }
        if (before)
            norm_token(model, *before, row, x, out, work);
        else
            std::memcpy(out + row * size, x + row * size, size_t(size) * sizeof(bf16));
    }
}

inline void embed_token(const DecodeCall& call, int64_t token, bf16* x) {
    const DecodeModel& model = *call.model;
    const int64_t size = model.hidden_size, id = call.tokens[token];
    if (model.tied_embedding)
        packed_row(*model.tied_embedding, id, x);
    else
        std::memcpy(x, model.embedding + id * size, size_t(size) * sizeof(bf16));
    if (model.embedding_scale != 1.0) {
        const Vf scale = set1(float(model.embedding_scale));
        for (int64_t i = 0; i < size; i += W) store_row(x + i, mul(load_row(x + i, size - i), scale), size - i);
    }
    if (!model.position_embedding) return;
    const bf16* position = model.position_embedding + call.positions[token] * size;
    for (int64_t i = 0; i < size; i += W)
        store_row(x + i, add(load_row(x + i, size - i), load_row(position + i, size - i)), size - i);
}

inline void rms_norm_in_place(double epsilon, const float* weight, int64_t size, bf16* row) {
    float inverse;
    norm_row<bf16, false>({row, true, 1, size, weight, nullptr, float(epsilon), row, nullptr, &inverse}, 0);
}

// Norm, if there is one, and rotation, if the layer has any, of one head of one token, in place.
inline void place_head(const DecodeModel& model, const DecodeLayer& layer, const float* norm_weight, int64_t position,
                       bf16* head) {
    const auto norm = [&] {
        if (norm_weight) rms_norm_in_place(model.norm_epsilon, norm_weight, model.head_dim, head);
    };
    if (!layer.norms_rotated) norm();
    const int64_t half = model.head_dim / 2;
    if (model.cosines && layer.is_rotated)
        rotate_head<bf16>(head, model.cosines + position * half, model.sines + position * half, 1.0f, half, head);
    if (layer.norms_rotated) norm();
}

inline void decode_attention(Team& team, const DecodeCall& call, const DecodeLayer& layer, const PagedCache& cache,
                             const DecodeWorkspace& work) {
    const DecodeModel& model = *call.model;
    const int64_t width = model.qkv_size(), dim = model.head_dim, kv_heads = model.num_kv_heads;
    const int64_t group = model.num_heads / kv_heads;
    packed_linear(team, {*layer.qkv_proj, call.num_tokens, work.normed, model.hidden_size, 1, layer.qkv_bias, work.qkv,
                         width, 1, work.operation});
    const bool norms_all = layer.q_norm && layer.norms_all_heads;
    if (norms_all)
        team.tasks(long(call.num_tokens), [&](long token) {
            bf16* row = work.qkv + token * width;
            rms_norm_in_place(model.norm_epsilon, layer.q_norm, model.num_heads * dim, row);
            rms_norm_in_place(model.norm_epsilon, layer.k_norm, kv_heads * dim, row + model.num_heads * dim);
        });
    const float *q_norm = norms_all ? nullptr : layer.q_norm, *k_norm = norms_all ? nullptr : layer.k_norm;
    // A task takes the queries of the heads that share a key/value head along with it, and where there are tasks enough
    // whole tokens, which is one stream.
    const PagedPlan& plan = layer.has_window ? call.window_plan : call.plan;
    const long writes = long(plan.writes.size());
    const int64_t heads = writes >= 4 * team.size() ? kv_heads : 1;
    team.tasks(writes * (kv_heads / heads), [&](long i) {
        const WriteItem& item = plan.writes[size_t(i / (kv_heads / heads))];
        const int64_t first_head = i % (kv_heads / heads) * heads, last_head = first_head + heads;
        bf16* first = work.qkv + item.first_token * width;
        for (int64_t token = 0; token < item.count; ++token) {
            const int64_t position = call.positions[item.first_token + token];
            bf16* row = first + token * width;
            for (int64_t query = first_head * group; query < last_head * group; ++query)
                place_head(model, layer, q_norm, position, row + query * dim);
            for (int64_t head = first_head; head < last_head; ++head)
                place_head(model, layer, k_norm, position, row + (model.num_heads + head) * dim);
        }
        for (int64_t head = first_head; head < last_head; ++head)
            write_kv_panel(cache, item, head, first + (model.num_heads + head) * dim, width,
                           first + (model.num_heads + kv_heads + head) * dim, width, attention_scratch());
    });
    paged_attention(team, {work.qkv, width, work.attended, model.num_heads * dim, model.num_heads,
                           float(model.attention_scale), layer.sinks, cache, call.batch, &plan, work.partials});
    packed_linear(team, {*layer.o_proj, call.num_tokens, work.attended, model.num_heads * dim, 1, layer.o_bias,
                         work.out, model.hidden_size, 1, work.operation});
}

// Every head's keys and values as products of one cached vector, the products moved to the side of the queries.
inline void decode_latent_attention(Team& team, const DecodeCall& call, const DecodeLayer& layer,
                                    const PagedCache& cache, const DecodeWorkspace& work) {
    const DecodeModel& model = *call.model;
    const int64_t tokens = call.num_tokens, heads = model.num_heads, rank = model.kv_rank, half = model.rope_dim / 2;
    const int64_t width = model.qkv_size(), vector = width - rank - model.rope_dim;  // where a token's begins
    packed_linear(team, {*layer.qkv_proj, tokens, work.normed, model.hidden_size, 1, nullptr, work.qkv, width, 1,
                         work.operation});
    const auto rotated = [&](const bf16* x, int64_t token, bf16* out) {
        const int64_t at = call.positions[token] * half;
        rotate_head<bf16>(x, model.cosines + at, model.sines + at, 1.0f, half, out);
    };
    const auto write = [&](long i) {
        const WriteItem& item = call.latent_plan.writes[size_t(i)];
        bf16* first = work.qkv + item.first_token * width + vector;
        for (int token = 0; token < item.count; ++token) {
            bf16* row = first + token * width;
            rms_norm_in_place(model.latent_epsilon, layer.k_norm, rank, row);
            rotated(row + rank, item.first_token + token, row + rank);
        }
        write_latent_panel(cache, item, first, width, attention_scratch());
    };
    long writes = long(call.latent_plan.writes.size());
    const bf16* query = work.qkv;
    int64_t query_stride = width;
    if (layer.q_up) {
        team.tasks(writes + long(tokens), [&](long i) {
            if (i < writes)
                write(i);
            else
                rms_norm_in_place(model.latent_epsilon, layer.q_norm, model.query_rank, work.qkv + (i - writes) * width);
        });
        writes = 0;
        query = work.query, query_stride = model.query_size();
        packed_linear(team, {*layer.q_up, tokens, work.qkv, width, 1, nullptr, work.query, query_stride, 1,
                             work.operation});
    }
    const int64_t query_width = cache.width(), channels = round_up(int(rank), kPanel);
    for (const LatentPart& part : call.latent_plan.parts) {
        const int64_t here = part.last_token - part.first_token;
        const bf16* own = query + part.first_token * query_stride;
        const PackedHeads inwards({*layer.key_up, heads, here, own, query_stride, model.head_dim, work.latent_query,
                                   heads * query_width, query_width},
                                  team.size());
        team.tasks(writes + inwards.count(), [&](long i) {
            if (i < writes) {
                write(i);
                return;
            }
            inwards.run(i - writes, [&](int64_t head, int64_t first, int64_t last) {
                for (int64_t token = first; token < last; ++token) {
                    bf16* row = work.latent_query + (token * heads + head) * query_width;
                    rotated(own + token * query_stride + head * model.head_dim + model.nope_dim,
                            part.first_token + token, row + rank);
                    std::fill(row + cache.head_dim, row + query_width, bf16(0));
                }
            });
        });
        writes = 0;
        latent_attention(team, {work.latent_query, work.means, heads, rank, float(model.attention_scale), cache,
                                call.batch, &part, work.partials});
        const PackedHeads outwards({*layer.value_up, heads, here, work.means, heads * channels, channels,
                                    work.attended + part.first_token * model.attended_size(), model.attended_size(),
                                    model.value_dim},
                                   team.size());
        team.tasks(outwards.count(), [&](long i) { outwards.run(i); });
    }
    packed_linear(team, {*layer.o_proj, tokens, work.attended, model.attended_size(), 1, layer.o_bias, work.out,
                         model.hidden_size, 1, work.operation});
}

inline RouteArguments route_arguments(const DecodeCall& call, const DecodeLayer& layer, const bf16* x,
                                      int64_t* expert_ids, float* routing_weights) {
    RouteArguments arguments{};
    arguments.x = x;
    arguments.is_bf16 = true;
    arguments.tokens = call.num_tokens;
    arguments.hidden = call.model->hidden_size;
    arguments.experts = layer.num_experts;
    arguments.top_k = layer.top_k;
    arguments.panels = layer.router;
    arguments.bias = layer.router_bias;
    arguments.correction_bias = layer.correction_bias;
    arguments.scoring = layer.scoring;
    arguments.groups = layer.num_groups;
    arguments.top_groups = layer.top_groups;
    arguments.renormalize = layer.renormalize != 0;
    arguments.scale = float(layer.router_scale);
    arguments.expert_ids = expert_ids;
    arguments.routing_weights = routing_weights;
    return arguments;
}

inline bool should_guess(const DecodeModel& model, int64_t num_tokens) {
    // More tokens choose nearly all experts, and what they compute takes longer than reading them.
    return model.guesses && num_tokens > 0 && num_tokens <= 8 &&
           (model.guesses->share >= kWorthReading || model.guesses->num_passes % kPassesOfATrial == 0);
}

// The experts that the next layer's router chooses from this layer's hidden state, whether this one has experts or not:
// compared with what that layer then chooses, and, where they have been right often enough, read while this layer computes.
inline void guess_experts(Team& team, const DecodeCall& call, int64_t index, const DecodeWorkspace& work,
                          const int64_t* expert_ids) {
    const DecodeModel& model = *call.model;
    const DecodeLayer &layer = model.layers[index], *next = index + 1 < model.num_layers ? &layer + 1 : nullptr;
    const bool is_first = team.member() == 0;
    static thread_local uint64_t turn = 0;
    if (is_first) {
        turn = ExpertReader::instance().reach_next();
        if (index > 0 && layer.num_experts) {
            const int64_t routes = call.num_tokens * layer.top_k;
            int64_t right = 0;
            for (int64_t i = 0; i < routes; ++i) {
                const int64_t* guessed = work.guessed_ids + i / layer.top_k * layer.top_k;
                right += std::find(guessed, guessed + layer.top_k, expert_ids[i]) != guessed + layer.top_k;
            }
            double& share = model.guesses->share;
            share += (1 - kShareKept) * (double(right) / double(routes) - share);
        }
    }
    if (!next || !next->num_experts) return;
    team.barrier();  // the guesses before are done with
    bf16* inputs = model.norms_outputs ? work.x : work.out;  // the latter is free until the experts' results come
    if (!model.norms_outputs)
        team.tasks(long(call.num_tokens),
                   [&](long token) { norm_token(model, next->feed_forward_norm, token, work.x, inputs, work); });
    route(team, route_arguments(call, *next, inputs, work.guessed_ids, work.guessed_weights), nullptr, nullptr);
    if (!is_first || model.guesses->share < kWorthReading) return;
    std::vector<int64_t> experts(work.guessed_ids, work.guessed_ids + call.num_tokens * next->top_k);
    std::sort(experts.begin(), experts.end());
    experts.erase(std::unique(experts.begin(), experts.end()), experts.end());
    std::vector<ExpertReader::Region> regions;
    for (const Packed* matrices : {&next->experts->up, &next->experts->down})
        for (const int64_t expert : experts)
            if (expert >= 0)
                regions.push_back({matrices->panel(expert, 0), size_t(matrices->panels()) * matrices->panel_bytes()});
    ExpertReader::instance().want(turn + 1, regions);
}

// What the experts that are here make of the tokens, and those on other processes, which all come here at one time.
inline void add_shared_experts(Team& team, const DecodeCall& call, const DecodeLayer& layer, const DecodeWorkspace& work,
                               MoeCall moe) {
    constexpr int64_t kBlock = 64;
    const int64_t hidden = call.model->hidden_size;
    const long blocks = long((moe.tokens + kBlock - 1) / kBlock);
    team.tasks(blocks, [&](long task) {
        for (int64_t i = task * kBlock * moe.top_k; i < std::min((task + 1) * kBlock, moe.tokens) * moe.top_k; ++i) {
            const int64_t own = moe.expert_ids[i] - layer.first_expert;
            work.local_ids[i] = own >= 0 && own < layer.own_experts ? own : -1;
        }
    });
    moe.expert_ids = work.local_ids;
    packed_moe(team, moe);
    if (team.member() == 0) call.model->add_others(work.sums, moe.tokens);
    team.barrier();
    team.tasks(blocks, [&](long task) {
        const int64_t begin = task * kBlock * hidden, end = std::min((task + 1) * kBlock, moe.tokens) * hidden;
        for (int64_t i = begin; i < end; i += W) store_bf16(work.out + i, load(work.sums + i));
    });
}

inline void decode_feed_forward(Team& team, const DecodeCall& call, int64_t index, const DecodeWorkspace& work,
                                int64_t* expert_ids, float* routing_weights) {
    const DecodeLayer& layer = call.model->layers[index];
    const int64_t tokens = call.num_tokens, hidden = call.model->hidden_size;
    MoeCall moe = work.moe_call(call, layer);
    moe.expert_ids = expert_ids;
    moe.routing_weights = routing_weights;
    if (layer.num_experts && call.is_private() && !layer.mix_weight) {
        route_privately(team, route_arguments(call, layer, work.normed, work.own_ids, work.own_weights),
                        work.router_parts);
        moe.expert_ids = work.own_ids;
        moe.routing_weights = work.own_weights;
        if (team.member() == 0) {
            std::copy_n(work.own_ids, tokens * layer.top_k, expert_ids);
            std::copy_n(work.own_weights, tokens * layer.top_k, routing_weights);
        }
    } else if (layer.num_experts) {
        route(team, route_arguments(call, layer, work.normed, expert_ids, routing_weights), nullptr, nullptr);
    }
    if (call.guesses_experts) guess_experts(team, call, index, work, expert_ids);
    if (layer.mix_weight) {
        const int64_t outputs = layer.mix_weight->columns;
        packed_linear(team, {*layer.mix_weight, tokens, work.normed, hidden, 1, layer.mix_bias, work.coefficients,
                             outputs, 0, work.operation});
        constexpr int64_t kBlock = 64;
        team.tasks(long((tokens + kBlock - 1) / kBlock), [&](long task) {
            for (int64_t token = task * kBlock; token < std::min((task + 1) * kBlock, tokens); ++token) {
                const float* own = work.coefficients + token * outputs;
                if (layer.mix == kMixSigmoid) {
                    work.residual_weights[token] = 1.0f / (1.0f + std::exp(-own[0]));
                    continue;
                }
                const float largest = std::max(own[0], own[1]);
                const float routed = std::exp(own[0] - largest), dense = std::exp(own[1] - largest);
                work.residual_weights[token] = dense / (routed + dense);
                for (int64_t k = 0; k < layer.top_k; ++k)
                    routing_weights[token * layer.top_k + k] *= routed / (routed + dense);
            }
        });
    }
    if (call.shares_experts() && layer.num_experts)
        add_shared_experts(team, call, layer, work, moe);
    else
        packed_moe(team, moe);
}

// The logits of the wanted tokens, from hidden states after the final norm.
inline void compute_logits(Team& team, const DecodeCall& call, const DecodeWorkspace& work) {
    if (call.num_rows == 0) return;
    const int64_t hidden = call.model->hidden_size, first = call.rows[0];
    const bool is_run = call.rows[call.num_rows - 1] - first + 1 == call.num_rows;
    const bf16* x = (call.is_private() ? work.normed : call.hidden) + first * hidden;
    if (!is_run) {
        team.tasks(long(call.num_rows), [&](long row) {
            std::memcpy(work.normed + row * hidden, call.hidden + call.rows[row] * hidden, size_t(hidden) * sizeof(bf16));
        });
        x = work.normed;
    }
    packed_linear(team, {*call.model->head, call.num_rows, x, hidden, 1, nullptr, call.logits, call.model->vocab_size,
                         0, work.operation});
}

// Among the columns [first, last) of a row.
inline Likeliest search_logits(const float* row, int64_t first, int64_t last) {
    constexpr int64_t kBlock = 16 * W;  // only the block of the largest is gone through one by one
    Likeliest best{-std::numeric_limits<float>::infinity(), first};
    Vf broken = zero();  // NaN where a logit is infinite or NaN
    for (int64_t begin = first; begin < last; begin += kBlock) {
        const int64_t end = std::min(begin + kBlock, last);
        Vf top = set1(row[begin]);
        int64_t i = begin;
        for (; i + W <= end; i += W) {
            const Vf x = load(row + i);
            top = max(top, x);
            broken = fma(x, zero(), broken);
        }
        float largest = maximum(top);
        for (; i < end; ++i) {
            largest = std::max(largest, row[i]);
            broken = fma(set1(row[i]), zero(), broken);
        }
        if (largest > best.logit) best = {largest, begin};
    }
    while (best.token + 1 < last && row[best.token] != best.logit) ++best.token;
    if (std::isnan(sum(broken))) best.logit = std::numeric_limits<float>::quiet_NaN();
    return best;
}

inline void find_likeliest(Team& team, const DecodeCall& call, const DecodeWorkspace& work) {
    if (call.num_rows == 0) return;
    const int64_t columns = call.model->vocab_size, pieces = (columns + kSearched - 1) / kSearched;
    team.tasks(long(call.num_rows * pieces), [&](long task) {
        const int64_t first = task % pieces * kSearched;
        const int64_t last = std::min(first + kSearched, columns);
        work.likeliest[task] = search_logits(call.logits + task / pieces * columns, first, last);
    });
    if (team.member() != 0) return;
    for (int64_t row = 0; row < call.num_rows; ++row) {
        Likeliest best{-std::numeric_limits<float>::infinity(), 0};
        for (const Likeliest* own = work.likeliest + row * pieces; own < work.likeliest + (row + 1) * pieces; ++own)
            if (!(own->logit <= best.logit) && !std::isnan(best.logit)) best = *own;
        call.likeliest[row] = std::isnan(best.logit) ? -1 : best.token;
    }
}

// Every thread of the team calls this, with equal arguments.
inline void decode(Team& team, const DecodeCall& call, const DecodeWorkspace& shared) {
    const DecodeModel& model = *call.model;
    const bool is_private = call.is_private();
    DecodeWorkspace work = shared;
    if (is_private) work.use_own_of(call, team.member());
    const int64_t rows_each = std::clamp(call.num_tokens / (8 * team.size()), int64_t(4), int64_t(16));
    const long row_tasks = long((call.num_tokens + rows_each - 1) / rows_each);
    auto rows = [&](auto&& body) {
        if (is_private)
            body(0, call.num_tokens);
        else
            team.tasks(row_tasks, [&](long task) {
                body(task * rows_each, std::min((task + 1) * rows_each, call.num_tokens));
            });
    };
    const auto before = [&](const NormWeights& norm) { return model.norms_outputs ? nullptr : &norm; };
    const auto behind = [&](const NormWeights& norm) { return model.norms_outputs ? &norm : nullptr; };
    rows([&](int64_t first, int64_t last) {
        for (int64_t token = first; token < last; ++token)
            embed_token(call, token, work.x + token * model.hidden_size);
        add_and_norm(model, nullptr, before(model.layers[0].attention_norm), first, last, nullptr, work.x, work.normed,
                     work);
    });
    int64_t routes = 0;
    for (int64_t i = 0; i < model.num_layers; ++i) {
        const DecodeLayer& layer = model.layers[i];
        if (model.has_latents())
            decode_latent_attention(team, call, layer, call.caches[i], work);
        else
            decode_attention(team, call, layer, call.caches[i], work);
        rows([&](int64_t first, int64_t last) {
            add_and_norm(model, behind(layer.attention_norm), before(layer.feed_forward_norm), first, last, work.out,
                         work.x, work.normed, work);
        });
        decode_feed_forward(team, call, i, work, call.expert_ids + routes, call.routing_weights + routes);
        routes += call.num_tokens * layer.top_k;
        const bool is_last = i + 1 == model.num_layers;
        const NormWeights* next = is_last ? &model.final_norm : before(model.layers[i + 1].attention_norm);
        bf16* to = is_last && !is_private ? call.hidden : work.normed;
        rows([&](int64_t first, int64_t last) {
            add_and_norm(model, behind(layer.feed_forward_norm), next, first, last, work.out, work.x, to, work);
        });
    }
    if (is_private && team.member() == 0)
        std::memcpy(call.hidden, work.normed, size_t(call.num_tokens * model.hidden_size) * sizeof(bf16));
    compute_logits(team, call, work);
    find_likeliest(team, call, work);
}

}  // namespace moesaic
