// The router: fp32 logits, scores, the choice of top_k experts, statistics, and the counting sort of the routes.
//
// A token's result depends on that token alone: its logits are sums in a fixed order (gemm_fp32.h). Statistics are
// summed over blocks of kRouteRows tokens, then over the blocks in order, so that no thread count changes them.
#pragma once

#include <algorithm>

#include "gemm_fp32.h"
#include "parallel.h"
#include "transpose.h"

namespace moesaic {

constexpr int kRouteRows = 48;  // tokens of one task
enum class Scoring : int64_t { softmax = 0, sigmoid = 1 };

struct RouteArguments {
    const void* x;         // (T, H), bf16 or fp32
    bool is_bf16;
    int64_t tokens, hidden, experts, top_k;
    const float* panels;           // the router's weight (E, H) as pack_router left it
    const float* bias;             // (E,), added to the logits; null for none
    const float* correction_bias;  // (E,), added to the scores for the choice only; null for none
    const uint8_t* valid;          // (T,), 0 for tokens that no statistic counts; null for none
    const int64_t* given;          // (T, K), a choice made before; null to choose
    Scoring scoring;
    int64_t groups, top_groups;  // experts are chosen from the best top_groups of so many equal groups
    bool renormalize;            // divide the chosen weights by their sum, where no statistic comes in between
    float scale;                 // factor on the weights
    int64_t* expert_ids;     // (T, K)
    float* routing_weights;  // (T, K)
    float* logits;           // (T, E); null where no backward pass follows
};

// What a block of tokens adds to the statistics: (E,) sums of probabilities and counts of routes, and three sums.
struct RouteSums {
    float* probabilities;
    int32_t* counts;
    float z, entropy;
    int64_t tokens;
};

inline int64_t padded_experts(int64_t experts) { return (experts + W - 1) / W * W; }
inline int64_t route_tasks(int64_t tokens) { return (tokens + kRouteRows - 1) / kRouteRows; }
inline size_t router_panel_floats(int64_t experts, int64_t hidden) { return size_t(padded_experts(experts) * hidden); }
// Scratch of route_rows: the rows in fp32, their logits, and of one token the scores, ranking, keys, and the groups' own.
inline size_t route_scratch_floats(int64_t experts, int64_t hidden) {
    return size_t(kRouteRows * (hidden + padded_experts(experts)) + 5 * padded_experts(experts));
}

// weight (E, H) -> panels of kFp32Columns experts (or W, for the last ones), each [H][width], zeros beyond E.
inline void pack_router(int64_t experts, int64_t hidden, const float* weight, float* panels) {
    for (int64_t first = 0; first < experts; first += kFp32Columns) {
        const int64_t width = std::min<int64_t>(padded_experts(experts) - first, kFp32Columns);
        const int64_t here = std::min<int64_t>(experts - first, width);
        float* panel = panels + first * hidden;
        if (here < width) std::fill_n(panel, width * hidden, 0.0f);
        transpose_dwords(int(here), int(hidden), reinterpret_cast<const uint32_t*>(weight + first * hidden),
                         size_t(hidden), reinterpret_cast<uint32_t*>(panel), size_t(width));
    }
}

#if defined(__AVX512F__)
inline Vi largest_of(Vi a, Vi b) { return {_mm512_max_epi32(a.v, b.v)}; }
inline int32_t largest(Vi a) { return _mm512_reduce_max_epi32(a.v); }
inline uint32_t equal_lanes(Vi a, Vi b) { return _mm512_cmpeq_epi32_mask(a.v, b.v); }
inline Vi and_not(Vi mask, Vi a) { return {_mm512_andnot_si512(mask.v, a.v)}; }
inline Vi minus(Vi a, Vi b) { return {_mm512_sub_epi32(a.v, b.v)}; }
// b where x is NaN, else a.
inline Vi where_nan(Vf x, Vi b, Vi a) {
    return {_mm512_mask_blend_epi32(_mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q), a.v, b.v)};
}
#else
inline Vi largest_of(Vi a, Vi b) { return {_mm256_max_epi32(a.v, b.v)}; }
inline int32_t largest(Vi a) {
    __m128i half = _mm_max_epi32(_mm256_castsi256_si128(a.v), _mm256_extracti128_si256(a.v, 1));
    half = _mm_max_epi32(half, _mm_shuffle_epi32(half, 0x4e));
    return _mm_cvtsi128_si32(_mm_max_epi32(half, _mm_shuffle_epi32(half, 0xb1)));
}
inline uint32_t equal_lanes(Vi a, Vi b) {
    return uint32_t(_mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpeq_epi32(a.v, b.v))));
}
inline Vi and_not(Vi mask, Vi a) { return {_mm256_andnot_si256(mask.v, a.v)}; }
inline Vi minus(Vi a, Vi b) { return {_mm256_sub_epi32(a.v, b.v)}; }
inline Vi where_nan(Vf x, Vi b, Vi a) {
    return {_mm256_blendv_epi8(a.v, b.v, _mm256_castps_si256(_mm256_cmp_ps(x.v, x.v, _CMP_UNORD_Q)))};
}
#endif

// x log(x) for x in [0, 1], error below 3e-7; 0 where x is below the smallest normal number.
inline Vf x_log_x(Vf x) {
    const Vi bits = as_int(x);
    const Vi exponent = shift_right_signed<23>(minus(bits, set1i(0x3f3504f3)));
    const Vf m = sub(as_float(minus(bits, shift_left<23>(exponent))), set1(1.0f));  // in [sqrt(1/2), sqrt(2)) - 1
    Vf p = set1(7.0376836292e-2f);
    for (const float coefficient : {-1.1514610310e-1f, 1.1676998740e-1f, -1.2420140846e-1f, 1.4249322787e-1f,
                                    -1.6668057665e-1f, 2.0000714765e-1f, -2.4999993993e-1f, 3.3333331174e-1f})
        p = fma(p, m, set1(coefficient));
    const Vf square = mul(m, m);
    Vf log = fma(square, fma(p, m, set1(-0.5f)), m);
    log = fma(to_float(exponent), set1(0.693147180559945f), log);
    return select_less(x, set1(1.1754944e-38f), mul(x, zero()), mul(x, log));
}

// A number whose order as an integer is x's order, NaN the largest (as in torch.topk), the two zeros equal.
inline Vi order_key(Vf x) {
    const Vi bits = as_int(add(x, zero()));
    const Vi negative = shift_right_signed<31>(bits);
    const Vi key = exclusive_or(bits, and_not(set1i(INT32_MIN), negative));
    return where_nan(x, set1i(INT32_MAX), key);
}
constexpr int32_t kTaken = INT32_MIN, kClosed = INT32_MIN + 1;  // below the key of every number

// The first index with the largest key; count is a multiple of W.
inline int first_largest(const int32_t* keys, int count) {
    Vi best = loadi(keys);
    for (int i = W; i < count; i += W) best = largest_of(best, loadi(keys + i));
    const Vi wanted = set1i(largest(best));
    for (int i = 0;; i += W)
        if (const uint32_t lanes = equal_lanes(loadi(keys + i), wanted)) return i + __builtin_ctz(lanes);
}

inline void fill_keys(const float* values, int count, int padded, int32_t* keys) {
    for (int i = 0; i < padded; i += W) storei(keys + i, order_key(load(values + i)));
    for (int i = count; i < padded; ++i) keys[i] = kTaken;
}

// Close the experts of groups that are not among the best. A group's score is its best ranking for softmax (as in
// DeepSeek-V2), the sum of its best two for sigmoid (V3).
inline void close_groups(const RouteArguments& a, const float* ranking, int32_t* keys, float* group_scores,
                         int32_t* group_keys) {
    const int groups = int(a.groups), size = int(a.experts / a.groups), padded = int(padded_experts(groups));
    const auto above = [](float x, float y) { return x > y || (x != x && y == y); };
    for (int group = 0; group < groups; ++group) {
        float best = -INFINITY, second = -INFINITY;
        for (int i = group * size; i < (group + 1) * size; ++i) {
            if (above(ranking[i], best)) {
                second = best;
                best = ranking[i];
            } else if (above(ranking[i], second)) {
                second = ranking[i];
            }
        }
        group_scores[group] = a.scoring == Scoring::sigmoid && size > 1 ? best + second : best;
    }
    std::fill(group_scores + groups, group_scores + padded, 0.0f);
    fill_keys(group_scores, groups, padded, group_keys);
    for (int64_t open = 0; open < a.top_groups; ++open) group_keys[first_largest(group_keys, padded)] = kTaken;
    for (int group = 0; group < groups; ++group)
        if (group_keys[group] != kTaken) std::fill_n(keys + group * size, size, kClosed);
}

// The log-sum-exp of a row with its parts, as PyTorch has it for infinite rows too.
struct RowExponentials {
    float maximum, sum;
    float log_sum() const { return std::isinf(maximum) ? maximum : maximum + std::log(sum); }
};

// exponentials (or nothing, if null) = exp(logits - max); both padded to whole vectors, the logits with -infinity.
inline RowExponentials exponentials_of(const float* logits, int padded, float* exponentials) {
    Vf top = load(logits);
    for (int i = W; i < padded; i += W) top = max(top, load(logits + i));
    float maximum_here = maximum(top);
    // A comparison with the padding, or with another logit, may have lost a NaN.
    if (std::isinf(maximum_here) && std::any_of(logits, logits + padded, [](float x) { return x != x; }))
        maximum_here = NAN;
    Vf total = zero();
    for (int i = 0; i < padded; i += W) {
        const Vf value = exp(sub(load(logits + i), set1(maximum_here)));
        if (exponentials) store(exponentials + i, value);
        total = add(total, value);
    }
    return {maximum_here, sum(total)};
}

// Scores of one token, and its part of the statistics.
inline void score_row(const RouteArguments& a, const float* logits, float* scores, RouteSums* sums) {
    const int padded = int(padded_experts(a.experts));
    if (a.scoring == Scoring::softmax) {
        const RowExponentials row = exponentials_of(logits, padded, scores);
        const Vf total = set1(row.sum), top = set1(row.maximum);
        Vf dot = zero();
        for (int i = 0; i < padded; i += W) {
            const Vf p = div(load(scores + i), total);
            store(scores + i, p);
            // Where p is 0 the logit may be -infinity. -log(p) = log(sum) - (logit - max).
            dot = fma(p, max(sub(load(logits + i), top), set1(-200.0f)), dot);
            if (sums) store(sums->probabilities + i, add(load(sums->probabilities + i), p));
        }
        if (!sums) return;
        const float log_sum = row.log_sum();
        sums->z += log_sum * log_sum;
        sums->entropy += std::log(row.sum) - sum(dot);
        return;
    }
    Vf total = zero();
    for (int i = 0; i < padded; i += W) {
        const Vf score = sigmoid(load(logits + i));
        store(scores + i, score);
        total = add(total, score);
    }
    if (!sums) return;
    const float whole = sum(total);
    const Vf divisor = set1(whole < 1e-20f ? 1e-20f : whole);  // all may underflow; NaN stays NaN
    Vf negative_entropy = zero();
    for (int i = 0; i < padded; i += W) {
        const Vf p = div(load(scores + i), divisor);
        store(sums->probabilities + i, add(load(sums->probabilities + i), p));
        negative_entropy = add(negative_entropy, x_log_x(p));
    }
    const float log_sum = exponentials_of(logits, padded, nullptr).log_sum();
    sums->z += log_sum * log_sum;
    sums->entropy -= sum(negative_entropy);
}

// Choose experts for `rows` tokens from `first` on, by their logits (rows, padded), to which the bias is added here; sums
// may be null. scratch: five times padded floats.
inline void choose_rows(const RouteArguments& a, int64_t first, int rows, float* logits, float* scratch,
                        RouteSums* sums) {
    const int experts = int(a.experts), padded = int(padded_experts(experts)), top_k = int(a.top_k);
    float* scores = scratch;
    float* ranking = scores + padded;
    int32_t* keys = reinterpret_cast<int32_t*>(ranking + padded);
    float* group_scores = reinterpret_cast<float*>(keys + padded);
    int32_t* group_keys = reinterpret_cast<int32_t*>(group_scores + padded);
    const auto add_experts = [&](const float* values, const float* to_all, float* sums_of_both) {
        for (int i = 0; i < padded; i += W)
            store(sums_of_both + i, add(load(values + i), load_row(to_all + i, std::max(experts - i, 0))));
    };
    for (int row = 0; row < rows; ++row) {
        const int64_t token = first + row;
        float* own = logits + row * padded;
        if (a.bias) add_experts(own, a.bias, own);
        if (a.logits) std::copy_n(own, experts, a.logits + token * experts);
        std::fill(own + experts, own + padded, -INFINITY);
        const bool counts = sums && (!a.valid || a.valid[token]);
        score_row(a, own, scores, counts ? sums : nullptr);
        int64_t* chosen = a.expert_ids + token * top_k;
        if (a.given) {
            std::copy_n(a.given + token * top_k, top_k, chosen);
        } else {
            const float* by = scores;
            if (a.correction_bias) {
                add_experts(scores, a.correction_bias, ranking);
                by = ranking;
            }
            fill_keys(by, experts, padded, keys);
            if (a.top_groups < a.groups) close_groups(a, by, keys, group_scores, group_keys);
            for (int choice = 0; choice < top_k; ++choice) {
                const int best = first_largest(keys, padded);
                keys[best] = kTaken;
                chosen[choice] = best;
            }
        }
        float* weights = a.routing_weights + token * top_k;
        float weight_sum = 0.0f;
        for (int choice = 0; choice < top_k; ++choice) {
            weights[choice] = scores[chosen[choice]];
            weight_sum += weights[choice];
            if (counts) ++sums->counts[chosen[choice]];
        }
        const float divisor = !a.renormalize ? 1.0f : weight_sum < 1e-20f ? 1e-20f : weight_sum;
        for (int choice = 0; choice < top_k; ++choice) weights[choice] = weights[choice] / divisor * a.scale;
        if (counts) ++sums->tokens;
    }
}

// Tokens [first, first + rows) in fp32.
inline void widen_rows(const RouteArguments& a, int64_t first, int rows, float* wide) {
    with_element_type(a.is_bf16, [&](auto kind) {
        const auto* x = static_cast<const decltype(kind)*>(a.x) + first * a.hidden;
        const int64_t total = rows * a.hidden;
        for (int64_t i = 0; i < total; i += W) store_row(wide + i, load_row(x + i, total - i), total - i);
    });
}

// What the kFp32Depth channels from k on add to the logits (rows, padded) of the kFp32Columns experts from e on.
inline void multiply_router(const RouteArguments& a, int rows, const float* wide, int k, int e, float* logits,
                            bool accumulate) {
    const int hidden = int(a.hidden), padded = int(padded_experts(a.experts));
    const int width = std::min(padded - e, kFp32Columns);
    gemm_fp32<Layout::rows>(rows, std::min(hidden - k, kFp32Depth), wide + k, size_t(hidden),
                            a.panels + size_t(e) * hidden + size_t(k) * width, size_t(width), logits + e,
                            size_t(padded), width, accumulate);
}

// Route tokens [first, last), at most kRouteRows of them; sums may be null.
inline void route_rows(const RouteArguments& a, int64_t first, int64_t last, float* scratch, RouteSums* sums) {
    const int rows = int(last - first), padded = int(padded_experts(a.experts));
    float* wide = scratch;
    float* logits = wide + size_t(kRouteRows) * a.hidden;
    widen_rows(a, first, rows, wide);
    for (int k = 0; k < int(a.hidden); k += kFp32Depth)
        for (int e = 0; e < padded; e += kFp32Columns) multiply_router(a, rows, wide, k, e, logits, k > 0);
    choose_rows(a, first, rows, logits, logits + size_t(kRouteRows) * padded, sums);
}

// Few tokens, without statistics: the members share the reading of the router's weights, and then everyone chooses for
// itself, from its own x into its own expert_ids and routing_weights. The sums are those of route, in the same order.
// parts: route_parts_floats.
inline size_t route_parts_floats(int64_t tokens, int64_t experts, int64_t hidden) {
    return size_t((hidden + kFp32Depth - 1) / kFp32Depth * tokens * padded_experts(experts));
}

inline void route_privately(Team& team, const RouteArguments& a, float* parts) {
    static thread_local Scratch own;
    const int rows = int(a.tokens), hidden = int(a.hidden), padded = int(padded_experts(a.experts));
    const int blocks = (hidden + kFp32Depth - 1) / kFp32Depth, groups = (padded + kFp32Columns - 1) / kFp32Columns;
    const size_t floats = size_t(rows) * padded;
    float* wide = own.get<float>(route_scratch_floats(a.experts, a.hidden));
    float* logits = wide + size_t(rows) * hidden;
    widen_rows(a, 0, rows, wide);
    team.tasks(long(blocks) * groups, [&](long task) {
        const int block = int(task / groups), group = int(task % groups);
        // All at once, since so little is over before the processor's own reading ahead has begun.
        const int width = std::min(padded - group * kFp32Columns, kFp32Columns);
        const float* from = a.panels + size_t(group) * kFp32Columns * hidden + size_t(block) * kFp32Depth * width;
        const int numbers = std::min(hidden - block * kFp32Depth, kFp32Depth) * width;
        for (int i = 0; i < numbers; i += 16) _mm_prefetch(reinterpret_cast<const char*>(from + i), _MM_HINT_T0);
        multiply_router(a, rows, wide, block * kFp32Depth, group * kFp32Columns, parts + block * floats, false);
    });
    for (size_t i = 0; i < floats; i += W) {
        Vf sum = load(parts + i);
        for (int block = 1; block < blocks; ++block) sum = add(sum, load(parts + block * floats + i));
        store(logits + i, sum);
    }
    choose_rows(a, 0, rows, logits, logits + floats, nullptr);
}

// Route all tokens. `blocks` holds route_tasks(T) times 2 * padded + 3 floats if statistics are wanted, else null, and
// totals (E,) the sums of probabilities, counts (E,), and three more numbers: z, entropy and the number of tokens.
struct RouteTotals {
    float* mean_probabilities;
    int64_t* tokens_per_expert;
    float *z, *entropy;
    int64_t* num_tokens;
};

inline size_t route_block_floats(int64_t experts) { return size_t(2 * padded_experts(experts) + W); }

void route(Team& team, const RouteArguments& a, float* blocks, const RouteTotals* totals);

struct RouteBackwardArguments {
    const void* x;  // (T, H)
    bool is_bf16;
    int64_t tokens, hidden, experts, top_k;
    const float* weight;  // (E, H)
    const float* logits;  // (T, E)
    const int64_t* expert_ids;
    const uint8_t* valid;  // or null
    Scoring scoring;
    int64_t num_tokens;           // valid ones
    const float* grad_weights;    // (T, K), of the routing weights; null: none
    const float* grad_mean;       // (E,), of the mean probabilities; null: none
    float grad_z;
    float* grad_logits;  // (T, E), always written
    void* grad_x;        // (T, H) in x's type; null: not wanted
    float* grad_weight;  // (E, H); null: not wanted
    float* grad_bias;    // (E,); null: not wanted
};

// scratch: 2 * padded floats.
inline void grad_logits_row(const RouteBackwardArguments& a, int64_t token, float* scratch) {
    const int experts = int(a.experts), padded = int(padded_experts(experts));
    float *values = scratch, *p = scratch + padded;
    const bool counts = !a.valid || a.valid[token];
    const float share = 1.0f / float(std::max<int64_t>(a.num_tokens, 1));
    std::copy_n(a.logits + token * experts, experts, values);
    std::fill(values + experts, values + padded, -INFINITY);
    const RowExponentials row = exponentials_of(values, padded, p);
    const bool has_z = counts && a.grad_z != 0.0f;
    const float for_z = has_z ? a.grad_z * 2.0f * row.log_sum() * share : 0.0f;
    const float for_mean = counts ? share : 0.0f;
    float* out = a.grad_logits + token * experts;
    const int64_t* chosen = a.expert_ids + token * a.top_k;
    const float* grad_chosen = a.grad_weights ? a.grad_weights + token * a.top_k : nullptr;
    for (int i = 0; i < padded; i += W) store(p + i, div(load(p + i), set1(row.sum)));
    const auto grad_mean = [&](int i) {
        return a.grad_mean ? mul(load_row(a.grad_mean + i, std::max(experts - i, 0)), set1(for_mean)) : zero();
    };
    if (a.scoring == Scoring::softmax) {
        // d logit = p (g - sum p g), g the gradient of the probabilities.
        Vf dots = zero();
        for (int i = 0; i < padded; i += W) dots = fma(load(p + i), grad_mean(i), dots);
        float dot = sum(dots);
        if (grad_chosen)
            for (int64_t k = 0; k < a.top_k; ++k) dot += p[chosen[k]] * grad_chosen[k];
        for (int i = 0; i < padded; i += W)
            store(values + i, mul(load(p + i), add(sub(grad_mean(i), set1(dot)), set1(for_z))));
        if (grad_chosen)
            for (int64_t k = 0; k < a.top_k; ++k) values[chosen[k]] += p[chosen[k]] * grad_chosen[k];
    } else {
        // Probabilities are scores divided by their sum, which a clamp may hold.
        Vf total = zero();
        for (int i = 0; i < padded; i += W) {
            const Vf score = sigmoid(load(values + i));
            store(values + i, score);
            total = add(total, score);
        }
        const float whole = sum(total);
        const bool is_clamped = whole < 1e-20f;
        const float inverse = 1.0f / (is_clamped ? 1e-20f : whole);
        Vf dots = zero();
        for (int i = 0; i < padded; i += W) dots = fma(mul(load(values + i), set1(inverse)), grad_mean(i), dots);
        const Vf dot = set1(is_clamped ? 0.0f : sum(dots));
        // The scatter of the chosen needs the scores after they are overwritten: first their share.
        thread_local Scratch own;
        float* of_chosen = own.get<float>(size_t(std::max<int64_t>(a.top_k, 1)));
        if (grad_chosen)
            for (int64_t k = 0; k < a.top_k; ++k) {
                const float score = values[chosen[k]];
                of_chosen[k] = grad_chosen[k] * score * (1.0f - score);
            }
        for (int i = 0; i < padded; i += W) {
            const Vf score = load(values + i);
            const Vf grad = mul(sub(grad_mean(i), dot), set1(inverse));
            const Vf slope = mul(score, sub(set1(1.0f), score));
            // Of an infinite logit p is NaN, which only the z-loss has to do with.
            const Vf of_mean = mul(grad, slope);
            store(values + i, has_z ? fma(load(p + i), set1(for_z), of_mean) : of_mean);
        }
        if (grad_chosen)
            for (int64_t k = 0; k < a.top_k; ++k) values[chosen[k]] += of_chosen[k];
    }
    std::copy_n(values, experts, out);
}

// The gradient of the bias for the W experts from e on: the sum over all tokens, block by block as the weight's.
inline void grad_bias_of(const RouteBackwardArguments& a, int64_t e) {
    const int64_t left = std::min<int64_t>(a.experts - e, W);
    Vf total = zero();
    for (int64_t t = 0; t < a.tokens; t += kFp32Depth) {
        const int64_t end = std::min<int64_t>(t + kFp32Depth, a.tokens);
        Vf block = zero();
        for (int64_t token = t; token < end; ++token)
            block = add(block, load_row(a.grad_logits + token * a.experts + e, left));
        total = add(total, block);
    }
    store_row(a.grad_bias + e, total, left);
}

template <typename T>
inline void route_backward_as(Team& team, const RouteBackwardArguments& a) {
    const int hidden = int(a.hidden), experts = int(a.experts);
    const int64_t padded = padded_experts(experts);
    team.tasks(route_tasks(a.tokens), [&](long task) {
        thread_local Scratch own;
        float* scratch = own.get<float>(size_t(2 * padded + kRouteRows * kFp32Columns));
        float* sums = scratch + 2 * padded;
        const int64_t first = task * kRouteRows, last = std::min<int64_t>(first + kRouteRows, a.tokens);
        for (int64_t token = first; token < last; ++token) grad_logits_row(a, token, scratch);
        if (!a.grad_x) return;
        for (int h = 0; h < hidden; h += kFp32Columns) {
            const int columns = std::min(hidden - h, kFp32Columns);
            for (int e = 0; e < experts; e += kFp32Depth)
                gemm_fp32<Layout::rows>(int(last - first), std::min(experts - e, kFp32Depth),
                                        a.grad_logits + first * experts + e, size_t(experts),
                                        a.weight + size_t(e) * hidden + h, size_t(hidden), sums, kFp32Columns, columns,
                                        e > 0);
            for (int row = 0; row < int(last - first); ++row) {
                T* to = static_cast<T*>(a.grad_x) + (first + row) * hidden + h;
                for (int i = 0; i < columns; i += W)
                    store_row(to + i, load(sums + row * kFp32Columns + i), columns - i);
            }
        }
    });
    if (a.grad_bias) team.tasks(padded / W, [&](long task) { grad_bias_of(a, task * W); });
    if (!a.grad_weight) return;
    const int64_t panels = (hidden + kFp32Columns - 1) / kFp32Columns, blocks = (experts + kRouteRows - 1) / kRouteRows;
    const T* x = static_cast<const T*>(a.x);
    team.tasks(panels * blocks, [&](long task) {
        const int h = int(task % panels) * kFp32Columns, e = int(task / panels) * kRouteRows;
        const int columns = std::min(hidden - h, kFp32Columns), rows = std::min(experts - e, kRouteRows);
        float* to = a.grad_weight + size_t(e) * hidden + h;
        if (!a.tokens)
            for (int row = 0; row < rows; ++row) std::fill_n(to + size_t(row) * hidden, columns, 0.0f);
        // A panel of x in fp32 within the first-level cache serves all experts of this task.
        thread_local Scratch own;
        float* panel = own.get<float>(size_t(kFp32Depth) * kFp32Columns);
        for (int64_t t = 0; t < a.tokens; t += kFp32Depth) {
            const int depth = int(std::min<int64_t>(a.tokens - t, kFp32Depth));
            for (int k = 0; k < depth; ++k)
                for (int i = 0; i < columns; i += W)
                    store(panel + k * kFp32Columns + i, load_row(x + (t + k) * hidden + h + i, columns - i));
            gemm_fp32<Layout::transposed>(rows, depth, a.grad_logits + t * experts + e, size_t(experts), panel,
                                          size_t(kFp32Columns), to, size_t(hidden), columns, t > 0);
        }
    });
}

inline void route_backward(Team& team, const RouteBackwardArguments& a) {
    with_element_type(a.is_bf16, [&](auto kind) { route_backward_as<decltype(kind)>(team, a); });
}

// Sort the routes of expert_ids (T, K) by expert; within one, first choices before second ones, then tokens in order.
struct PlanArguments {
    const int64_t* expert_ids;  // (T, K)
    const uint8_t* valid;       // (T,), 0 for tokens that go nowhere; null: all go
    int64_t tokens, top_k, experts;
    int64_t capacity;            // routes that an expert takes at most; below 0: all
    int64_t* token_ids;          // (T * K,), of which the first N are written
    int64_t* slots;              // (T, K): the row of a route, N where it is dropped
    int64_t* tokens_per_expert;  // (E,), their sum N
};

constexpr int64_t kPlanChunk = 8192;  // routes of one task
inline int64_t plan_chunks(const PlanArguments& a) { return (a.tokens + kPlanChunk - 1) / kPlanChunk * a.top_k; }

// counts: plan_chunks * E numbers. Returns N, or -1 if an expert's number is out of range (then nothing is right).
inline int64_t plan_dispatch(Team& team, const PlanArguments& a, int64_t* counts) {
    const int64_t per_choice = (a.tokens + kPlanChunk - 1) / kPlanChunk, chunks = plan_chunks(a);
    const auto each = [&](int64_t chunk, auto&& visit) {
        const int64_t choice = chunk / per_choice, first = chunk % per_choice * kPlanChunk;
        const int64_t last = std::min(first + kPlanChunk, a.tokens);
        for (int64_t token = first; token < last; ++token)
            if (!a.valid || a.valid[token]) visit(token, token * a.top_k + choice);
    };
    team.tasks(chunks, [&](long chunk) {
        int64_t* own = counts + chunk * a.experts;
        std::fill_n(own, a.experts, 0);
        bool is_right = true;
        each(chunk, [&](int64_t, int64_t route) {
            const int64_t expert = a.expert_ids[route];
            if (uint64_t(expert) < uint64_t(a.experts))
                ++own[expert];
            else
                is_right = false;
        });
        if (!is_right) own[0] = -1;
    });
    // Every thread sees the same counts, before any of them turns its chunks' counts into ranks.
    bool is_right = true;
    int64_t kept = 0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) is_right &= counts[chunk * a.experts] >= 0;
    if (is_right)
        for (int64_t expert = 0; expert < a.experts; ++expert) {
            int64_t routes = 0;
            for (int64_t chunk = 0; chunk < chunks; ++chunk) routes += counts[chunk * a.experts + expert];
            kept += a.capacity < 0 ? routes : std::min(routes, a.capacity);
        }
    team.barrier();
    if (!is_right) return -1;
    team.tasks(1, [&](long) {
        for (int64_t expert = 0; expert < a.experts; ++expert) {
            int64_t rank = 0;
            for (int64_t chunk = 0; chunk < chunks; ++chunk) {
                int64_t& count = counts[chunk * a.experts + expert];
                const int64_t here = count;
                count = rank;
                rank += here;
            }
            a.tokens_per_expert[expert] = a.capacity < 0 ? rank : std::min(rank, a.capacity);
        }
    });
    team.tasks(chunks, [&](long chunk) {
        thread_local Scratch own;
        int64_t* starts = own.get<int64_t>(size_t(2 * a.experts));
        int64_t* ranks = starts + a.experts;
        int64_t start = 0;
        for (int64_t expert = 0; expert < a.experts; ++expert) {
            starts[expert] = start;
            start += a.tokens_per_expert[expert];
            ranks[expert] = counts[chunk * a.experts + expert];
        }
        if (a.valid) {
            const int64_t choice = chunk / per_choice, first = chunk % per_choice * kPlanChunk;
            const int64_t last = std::min(first + kPlanChunk, a.tokens);
            for (int64_t token = first; token < last; ++token)
                if (!a.valid[token]) a.slots[token * a.top_k + choice] = kept;
        }
        each(chunk, [&](int64_t token, int64_t route) {
            const int64_t expert = a.expert_ids[route], rank = ranks[expert]++;
            if (a.capacity >= 0 && rank >= a.capacity) {
                a.slots[route] = kept;
            } else {
                const int64_t row = starts[expert] + rank;
                a.slots[route] = row;
                a.token_ids[row] = token;
            }
        });
    });
    return kept;
}

}  // namespace moesaic
