// The MLP activations of whole rows, SwiGLU and tanh's GELU: forward, and forward once more with the gradient.
#pragma once

#include <algorithm>

#include "activation_math.h"
#include "elements.h"
#include "parallel.h"

namespace moesaic {

struct ActivationArguments {
    const bf16* pre;     // (N, F), or (N, 2F) as [gate, up] for SwiGLU
    int64_t rows, size;  // N, F
    bool is_gated;       // SwiGLU
    bf16* activated;     // (N, F)
    const bf16* grad;    // (N, F), of the activation; null: forward only
    bf16* grad_pre;      // as pre
};

// Vectors at i of one row; left: values until the row's end.
template <bool Gated, bool Backward>
inline void activate_at(const ActivationArguments& a, int64_t row, int64_t i, int64_t left) {
    const int64_t width = Gated ? 2 * a.size : a.size;
    const bf16* pre = a.pre + row * width + i;
    bf16* out = a.activated + row * a.size + i;
    const Vf x = load_row(pre, left);
    if constexpr (!Backward) {
        store_row(out, Gated ? mul(silu(x), load_row(pre + a.size, left)) : gelu_tanh(x), left);
    } else {
        const Vf given = load_row(a.grad + row * a.size + i, left);
        bf16* grad_pre = a.grad_pre + row * width + i;
        const WithDerivative both = Gated ? silu_with_derivative(x) : gelu_tanh_with_derivative(x);
        if constexpr (Gated) {
            const Vf up = load_row(pre + a.size, left);
            store_row(out, mul(both.value, up), left);
            store_row(grad_pre, mul(mul(given, up), both.derivative), left);
            store_row(grad_pre + a.size, mul(given, both.value), left);
        } else {
            store_row(out, both.value, left);
            store_row(grad_pre, mul(given, both.derivative), left);
        }
    }
}

template <bool Gated, bool Backward>
inline void activate_row(const ActivationArguments& a, int64_t row) {
    int64_t i = 0;
    for (; i + W <= a.size; i += W) activate_at<Gated, Backward>(a, row, i, W);
    if (i < a.size) activate_at<Gated, Backward>(a, row, i, a.size - i);
}

inline void activate_rows(Team& team, const ActivationArguments& a) {
    const int64_t block = std::clamp<int64_t>(16384 / std::max<int64_t>(a.size, 1), 1, 256);
    team.tasks((a.rows + block - 1) / block, [&](long task) {
        for (int64_t row = task * block; row < std::min((task + 1) * block, a.rows); ++row)
            if (a.is_gated)
                a.grad ? activate_row<true, true>(a, row) : activate_row<true, false>(a, row);
            else
                a.grad ? activate_row<false, true>(a, row) : activate_row<false, false>(a, row);
    });
}

}  // namespace moesaic
