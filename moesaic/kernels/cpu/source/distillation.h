// A student's cross-entropy and its forward KL from a teacher, of a block of logits; the gradient in their place.
#pragma once

#include <algorithm>

#include "cross_entropy.h"
#include "elements.h"
#include "parallel.h"

namespace moesaic {

struct DistillationArguments {
    void* logits;  // (T, V), bf16 or fp32; the gradient of cross-entropy + alpha * temperature^2 * KL is left here
    bool is_bf16;
    const float* teacher;    // (T, V) logits
    const int64_t* targets;  // (T,), each in [0, V) or kIgnoredTarget
    int64_t tokens, vocabulary;
    float alpha, temperature;
    float *losses, *distances;  // (T,): the cross-entropy, and KL(teacher || student) at the temperature
};

template <typename T>
inline float largest(const T* row, int64_t size) {
    constexpr int kStreams = 4;
    const int64_t whole = size / (kStreams * W) * (kStreams * W);
    Vf tops[kStreams];
    for (Vf& top : tops) top = set1(-INFINITY);
    for (int64_t i = 0; i < whole; i += kStreams * W)
        for (int s = 0; s < kStreams; ++s) tops[s] = max(tops[s], load_values(row + i + s * W));
    for (int64_t i = whole; i < size; ++i) tops[0] = max(tops[0], set1(load_scalar(row + i)));
    return maximum(max(max(tops[0], tops[1]), max(tops[2], tops[3])));
}

// student, teacher: room for a row of whole vectors each; afterwards exp((logit - largest) / temperature).
template <typename T>
inline void distillation_row(const DistillationArguments& a, int64_t token, float* student, float* teacher) {
    const int64_t size = a.vocabulary, target = a.targets[token];
    T* row = static_cast<T*>(a.logits) + token * size;
    const float* taught = a.teacher + token * size;
    if (target == kIgnoredTarget) {
        a.losses[token] = a.distances[token] = 0.0f;
        std::memset(row, 0, size_t(size) * sizeof(T));
        return;
    }
    const float top = largest(row, size), teacher_top = largest(taught, size), inverse = 1.0f / a.temperature;
    const bool is_plain = a.temperature == 1.0f;
    const Vf shift = set1(top), teacher_shift = set1(teacher_top), factor = set1(inverse);
    constexpr int kStreams = 2;
    Vf plain[kStreams], sums[kStreams], teacher_sums[kStreams], products[kStreams];
    for (int s = 0; s < kStreams; ++s) plain[s] = sums[s] = teacher_sums[s] = products[s] = zero();
    float plain_total = 0.0f, total = 0.0f, teacher_total = 0.0f, product = 0.0f;
    const auto vectors = [&](int64_t i, int64_t left, Vf& once, Vf& own, Vf& theirs, Vf& difference) {
        const Vf x = sub(load_row(row + i, left), shift), y = sub(load_row(taught + i, left), teacher_shift);
        const Vf u = mul(x, factor), v = mul(y, factor);
        own = exp(u);
        theirs = exp(v);
        once = is_plain ? own : exp(x);
        difference = mul(theirs, sub(v, u));
        store(student + i, own);
        store(teacher + i, theirs);
    };
    const int64_t whole = size / (kStreams * W) * (kStreams * W);
    Vf once, own, theirs, difference;
    for (int64_t i = 0; i < whole; i += kStreams * W)
        for (int s = 0; s < kStreams; ++s) {
            vectors(i + s * W, size, once, own, theirs, difference);
            plain[s] = add(plain[s], once);
            sums[s] = add(sums[s], own);
            teacher_sums[s] = add(teacher_sums[s], theirs);
            products[s] = add(products[s], difference);
        }
    for (int64_t i = whole; i < size; i += W) {
        const int64_t left = size - i;
        float values[4][W];
        vectors(i, left, once, own, theirs, difference);
        store(values[0], once), store(values[1], own), store(values[2], theirs), store(values[3], difference);
        for (int64_t k = 0; k < std::min<int64_t>(left, W); ++k) {
            plain_total += values[0][k], total += values[1][k];
            teacher_total += values[2][k], product += values[3][k];
        }
    }
    plain_total += sum(add(plain[0], plain[1]));
    total += sum(add(sums[0], sums[1]));
    teacher_total += sum(add(teacher_sums[0], teacher_sums[1]));
    product += sum(add(products[0], products[1]));
    a.losses[token] = top - load_scalar(row + target) + std::log(plain_total);
    a.distances[token] = product / teacher_total + std::log(total) - std::log(teacher_total);
    // 1 / T of the logits and T^2 of the loss leave one T.
    const float weight = a.alpha * a.temperature;
    const Vf plain_scale = set1(1.0f / plain_total), scale = set1(weight / total);
    const Vf teacher_scale = set1(-weight / teacher_total), both = set1(1.0f / plain_total + weight / total);
    const float at_target = load_scalar(row + target);
    for (int64_t i = 0; i < size; i += W) {
        const int64_t left = size - i;
        const Vf pulled = mul(load(teacher + i), teacher_scale);
        Vf gradient;
        if (is_plain)
            gradient = fma(load(student + i), both, pulled);
        else
            gradient = fma(load(student + i), scale,
                           fma(exp(sub(load_row(row + i, left), shift)), plain_scale, pulled));
        store_row(row + i, gradient, left);
    }
    const float pushed = std::exp(at_target - top) / plain_total - 1.0f + weight * (student[target] / total) -
                         weight * (teacher[target] / teacher_total);
    store_scalar(row + target, pushed);
}

inline void distillation(Team& team, const DistillationArguments& a) {
    constexpr int64_t kRowsPerTask = 4;
    team.tasks((a.tokens + kRowsPerTask - 1) / kRowsPerTask, [&](long task) {
        thread_local Scratch own;
        const size_t width = size_t(a.vocabulary + 4 * W);
        float* student = own.get<float>(2 * width);
        const int64_t first = task * kRowsPerTask, last = std::min(first + kRowsPerTask, a.tokens);
        with_element_type(a.is_bf16, [&](auto kind) {
            for (int64_t token = first; token < last; ++token)
                distillation_row<decltype(kind)>(a, token, student, student + width);
        });
    });
}

}  // namespace moesaic
