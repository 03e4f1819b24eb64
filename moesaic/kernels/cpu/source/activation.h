// The MLP activations of whole rows, forward, and forward once more with the gradient.
#pragma once

#include <algorithm>

#include "activation_math.h"
#include "elements.h"
#include "parallel.h"

namespace moesaic {

struct ActivationArguments {
    const void* pre;  // (N, F), or (N, 2F) as [gate, up] for swiglu; bf16 or fp32, as all others
    bool is_bf16;
    int64_t rows, size;  // N, F
    int64_t activation;
    void* activated;   // (N, F)
    const void* grad;  // (N, F), of the activation; null: forward only
    void* grad_pre;    // as pre
};

template <typename T>
inline void activate_row(const ActivationArguments& a, int64_t row) {
    const bool is_gated = a.activation == kSwiglu;
    const int64_t width = is_gated ? 2 * a.size : a.size;
    const T* pre = static_cast<const T*>(a.pre) + row * width;
    T* out = static_cast<T*>(a.activated) + row * a.size;
    const T* grad = a.grad ? static_cast<const T*>(a.grad) + row * a.size : nullptr;
    T* grad_pre = a.grad ? static_cast<T*>(a.grad_pre) + row * width : nullptr;
    for (int64_t i = 0; i < a.size; i += W) {
        const int64_t left = a.size - i;
        const Vf x = load_row(pre + i, left);
        if (!grad) {
            store_row(out + i, is_gated ? mul(silu(x), load_row(pre + a.size + i, left)) : activate(x, a.activation),
                      left);
        } else if (is_gated) {
            const Vf up = load_row(pre + a.size + i, left), given = load_row(grad + i, left);
            const WithDerivative gate = silu_with_derivative(x);
            store_row(out + i, mul(gate.value, up), left);
            store_row(grad_pre + i, mul(mul(given, up), gate.derivative), left);
            store_row(grad_pre + a.size + i, mul(given, gate.value), left);
        } else {
            const WithDerivative both = activate_with_derivative(x, a.activation);
            store_row(out + i, both.value, left);
            store_row(grad_pre + i, mul(load_row(grad + i, left), both.derivative), left);
        }
    }
}

inline void activate_rows(Team& team, const ActivationArguments& a) {
    const int64_t block = std::clamp<int64_t>(16384 / std::max<int64_t>(a.size, 1), 1, 256);
    team.tasks((a.rows + block - 1) / block, [&](long task) {
        with_element_type(a.is_bf16, [&](auto kind) {
            for (int64_t row = task * block; row < std::min((task + 1) * block, a.rows); ++row)
                activate_row<decltype(kind)>(a, row);
        });
    });
}

}  // namespace moesaic
