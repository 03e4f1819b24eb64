// Softmax cross-entropy of a block of logits: the losses, and the gradient in place of the logits.
#pragma once

#include <algorithm>

#include "elements.h"
#include "parallel.h"

namespace moesaic {

constexpr int64_t kIgnoredTarget = -100;  // nothing to predict: loss 0, gradient 0

struct CrossEntropyArguments {
    void* logits;  // (T, V), bf16 or fp32; where a gradient is wanted it is left here: softmax, minus 1 at the target
    bool is_bf16;
    const int64_t* targets;  // (T,), each in [0, V) or kIgnoredTarget
    int64_t tokens, vocabulary;
    float* losses;  // (T,)
    bool wants_gradient;
};

// exponentials: room for a row of whole vectors.
template <typename T>
inline void cross_entropy_row(const CrossEntropyArguments& a, int64_t token, float* exponentials) {
    const int64_t size = a.vocabulary, target = a.targets[token];
    T* row = static_cast<T*>(a.logits) + token * size;
    if (target == kIgnoredTarget) {
        a.losses[token] = 0.0f;
        if (a.wants_gradient) std::memset(row, 0, size_t(size) * sizeof(T));
        return;
    }
    constexpr int kStreams = 4;  // sums of their own, since an addition waits for the one before it
    const int64_t whole = size / (kStreams * W) * (kStreams * W);
    Vf tops[kStreams], sums[kStreams];
    for (Vf& top : tops) top = set1(-INFINITY);
    for (Vf& part : sums) part = zero();
    for (int64_t i = 0; i < whole; i += kStreams * W)
        for (int s = 0; s < kStreams; ++s) tops[s] = max(tops[s], load_values(row + i + s * W));
    for (int64_t i = whole; i < size; ++i) tops[0] = max(tops[0], set1(load_scalar(row + i)));
    // A NaN may get lost among the maxima; it is in the sum.
    const float top = maximum(max(max(tops[0], tops[1]), max(tops[2], tops[3])));
    const Vf shift = set1(top);
    for (int64_t i = 0; i < whole; i += kStreams * W)
        for (int s = 0; s < kStreams; ++s) {
            const Vf value = exp(sub(load_values(row + i + s * W), shift));
            store(exponentials + i + s * W, value);
            sums[s] = add(sums[s], value);
        }
    float total = sum(add(add(sums[0], sums[1]), add(sums[2], sums[3])));
    for (int64_t i = whole; i < size; i += W) {
        const int64_t left = size - i;
        store(exponentials + i, exp(sub(load_row(row + i, left), shift)));
        for (int64_t k = i; k < i + std::min<int64_t>(left, W); ++k) total += exponentials[k];
    }
    a.losses[token] = top - load_scalar(row + target) + std::log(total);
    if (!a.wants_gradient) return;
    exponentials[target] -= total;  // exp / total - 1, before the division
    const Vf scale = set1(1.0f / total);
    for (int64_t i = 0; i < size; i += W) store_row(row + i, mul(load(exponentials + i), scale), size - i);
}

inline void cross_entropy(Team& team, const CrossEntropyArguments& a) {
    constexpr int64_t kRowsPerTask = 8;
    team.tasks((a.tokens + kRowsPerTask - 1) / kRowsPerTask, [&](long task) {
        thread_local Scratch own;
        float* exponentials = own.get<float>(size_t(a.vocabulary + 4 * W));
        const int64_t first = task * kRowsPerTask, last = std::min(first + kRowsPerTask, a.tokens);
        with_element_type(a.is_bf16, [&](auto kind) {
            for (int64_t token = first; token < last; ++token) cross_entropy_row<decltype(kind)>(a, token, exponentials);
        });
    });
}

}  // namespace moesaic
