// RMSNorm and LayerNorm of rows of bf16 or fp32, with fp32 weights and sums, forward and backward.
//
// Sums over rows (the gradients of weight and bias) are made by block of rows, then over the blocks in order, so that
// no thread count changes them.
#pragma once

#include <algorithm>

#include "elements.h"
#include "parallel.h"

namespace moesaic {

struct NormArguments {
    const void* x;  // (R, H), bf16 or fp32; as y, grad and grad_x
    bool is_bf16;
    int64_t rows, size;
    const float* weight;  // (H,)
    const float* bias;    // (H,) for LayerNorm, null for RMSNorm
    float epsilon;
    void* y;
    float* mean;     // (R,) for LayerNorm, null for RMSNorm
    float* inverse;  // (R,), 1 / sqrt(mean square or variance + epsilon)
};

struct NormBackwardArguments {
    const void *grad, *x;  // (R, H)
    bool is_bf16;
    int64_t rows, size;
    const float* weight;
    const float *mean, *inverse;
    void* grad_x;
    float *grad_weight, *grad_bias;  // (H,); grad_bias null for RMSNorm
};

// Rows of one task: enough to be worth a task, few enough for many of them.
inline int64_t norm_block(int64_t size) { return std::clamp<int64_t>(32768 / std::max<int64_t>(size, 1), 8, 512); }
inline int64_t norm_tasks(int64_t rows, int64_t size) { return (rows + norm_block(size) - 1) / norm_block(size); }

constexpr int kNormStreams = 4;  // sums of their own, since an addition waits for the one before it

// sum over i of term(i, left), for term's vectors at i = 0, W, 2 W, ... of a row.
template <typename Term>
inline float sum_row(int64_t size, Term&& term) {
    Vf sums[kNormStreams];
    for (Vf& part : sums) part = zero();
    int64_t i = 0;
    for (; i + kNormStreams * W <= size; i += kNormStreams * W)
        for (int s = 0; s < kNormStreams; ++s) sums[s] = add(sums[s], term(i + s * W, int64_t(W)));
    for (; i < size; i += W) sums[0] = add(sums[0], term(i, size - i));
    return sum(add(add(sums[0], sums[1]), add(sums[2], sums[3])));
}

template <typename T, bool Centred>
inline void norm_row(const NormArguments& a, int64_t row) {
    const T* x = static_cast<const T*>(a.x) + row * a.size;
    T* y = static_cast<T*>(a.y) + row * a.size;
    const float share = 1.0f / float(a.size);
    float mean = 0.0f;
    if (Centred) {
        mean = sum_row(a.size, [&](int64_t i, int64_t left) { return load_row(x + i, left); }) * share;
        a.mean[row] = mean;
    }
    const Vf centre = set1(mean);
    const float squares = sum_row(a.size, [&](int64_t i, int64_t left) {
        Vf value = load_row(x + i, left);
        if (Centred) {
            value = sub(value, centre);
            if (left < W) {  // zeros behind the row's end are no deviations
                float values[W];
                store(values, value);
                value = load_part(values, int(left));
            }
        }
        return mul(value, value);
    });
    const float inverse = 1.0f / std::sqrt(squares * share + a.epsilon);
    a.inverse[row] = inverse;
    const Vf scale = set1(inverse);
    for (int64_t i = 0; i < a.size; i += W) {
        const int64_t left = a.size - i;
        Vf value = load_row(x + i, left);
        if (Centred) value = sub(value, centre);
        value = mul(mul(value, scale), load_row(a.weight + i, left));
        if (Centred) value = add(value, load_row(a.bias + i, left));
        store_row(y + i, value, left);
    }
}

inline void norm(Team& team, const NormArguments& a) {
    const int64_t block = norm_block(a.size);
    team.tasks(norm_tasks(a.rows, a.size), [&](long task) {
        with_element_type(a.is_bf16, [&](auto kind) {
            using T = decltype(kind);
            for (int64_t row = task * block; row < std::min((task + 1) * block, a.rows); ++row)
                a.bias ? norm_row<T, true>(a, row) : norm_row<T, false>(a, row);
        });
    });
}

// With n the normalised row and g = grad * weight: grad_x = inverse * (g - n mean(g n) [- mean(g)]).
// of_weight and of_bias: this block's sums (H,).
template <typename T, bool Centred>
inline void norm_backward_row(const NormBackwardArguments& a, int64_t row, float* of_weight, float* of_bias) {
    const T* x = static_cast<const T*>(a.x) + row * a.size;
    const T* grad = static_cast<const T*>(a.grad) + row * a.size;
    T* grad_x = static_cast<T*>(a.grad_x) + row * a.size;
    const float share = 1.0f / float(a.size);
    const Vf inverse = set1(a.inverse[row]), centre = set1(Centred ? a.mean[row] : 0.0f);
    float sum_of_grad = 0.0f;
    if (Centred)
        sum_of_grad = sum_row(a.size, [&](int64_t i, int64_t left) {
            return mul(load_row(grad + i, left), load_row(a.weight + i, left));
        });
    const float dot = sum_row(a.size, [&](int64_t i, int64_t left) {
        Vf value = load_row(x + i, left);
        if (Centred) value = sub(value, centre);
        const Vf given = load_row(grad + i, left), normed = mul(value, inverse), product = mul(given, normed);
        store_row(of_weight + i, add(load_row(of_weight + i, left), product), left);
        if (Centred) store_row(of_bias + i, add(load_row(of_bias + i, left), given), left);
        return mul(product, load_row(a.weight + i, left));
    });
    const Vf along = set1(dot * share), offset = set1(sum_of_grad * share);
    for (int64_t i = 0; i < a.size; i += W) {
        const int64_t left = a.size - i;
        Vf value = load_row(x + i, left);
        if (Centred) value = sub(value, centre);
        Vf result = sub(mul(load_row(grad + i, left), load_row(a.weight + i, left)), mul(mul(value, inverse), along));
        if (Centred) result = sub(result, offset);
        store_row(grad_x + i, mul(result, inverse), left);
    }
}

// blocks: norm_tasks * H numbers, twice that for LayerNorm.
inline void norm_backward(Team& team, const NormBackwardArguments& a, float* blocks) {
    const int64_t block = norm_block(a.size), tasks = norm_tasks(a.rows, a.size);
    float* bias_blocks = blocks + tasks * a.size;
    team.tasks(tasks, [&](long task) {
        float *of_weight = blocks + task * a.size, *of_bias = bias_blocks + task * a.size;
        std::fill_n(of_weight, a.size, 0.0f);
        if (a.grad_bias) std::fill_n(of_bias, a.size, 0.0f);
        with_element_type(a.is_bf16, [&](auto kind) {
            using T = decltype(kind);
            for (int64_t row = task * block; row < std::min((task + 1) * block, a.rows); ++row)
                a.grad_bias ? norm_backward_row<T, true>(a, row, of_weight, of_bias)
                       : norm_backward_row<T, false>(a, row, of_weight, nullptr);
        });
    });
    constexpr int64_t kSlice = 128;
    const int64_t slices = (a.size + kSlice - 1) / kSlice;
    team.tasks(slices * (a.grad_bias ? 2 : 1), [&](long task) {
        const int64_t first = task % slices * kSlice, last = std::min(first + kSlice, a.size);
        const float* from = task < slices ? blocks : bias_blocks;
        float* to = task < slices ? a.grad_weight : a.grad_bias;
        std::fill(to + first, to + last, 0.0f);
        for (int64_t each = 0; each < tasks; ++each)
            for (int64_t i = first; i < last; ++i) to[i] += from[each * a.size + i];
    });
}

}  // namespace moesaic
