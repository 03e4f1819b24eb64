// The MLP activations of whole rows: forward, and forward once more with the gradient.
#pragma once

#include <algorithm>

#include "activation_math.h"
#include "elements.h"
#include "parallel.h"

namespace moesaic {

struct ActivationArguments {
    const bf16* pre;     // (N, F), or (N, 2F) as [gate, up] for gated ones
    int64_t rows, size;  // N, F
    int64_t activation;
    bf16* activated;   // (N, F)
    const bf16* grad;  // (N, F), of the activation; null: forward only
    bf16* grad_pre;    // as pre
};

// Vectors at i of one row; left: values until the row's end.
template <Activation A, bool Backward>
inline void activate_at(const ActivationArguments& a, int64_t row, int64_t i, int64_t left) {
    const int64_t width = is_gated(A) ? 2 * a.size : a.size;
    const bf16* pre = a.pre + row * width + i;
    bf16* out = a.activated + row * a.size + i;
    const Vf x = load_row(pre, left);
    if constexpr (!Backward) {
        if constexpr (is_gated(A))
            store_row(out, activate_gated<A>(x, load_row(pre + a.size, left)), left);
        else
            store_row(out, activate<A>(x), left);
    } else {
        const Vf given = load_row(a.grad + row * a.size + i, left);
        bf16* grad_pre = a.grad_pre + row * width + i;
        if constexpr (is_gated(A)) {
            const GatedGradients all = activate_gated_with_gradients<A>(x, load_row(pre + a.size, left), given);
            store_row(out, all.value, left);
            store_row(grad_pre, all.gate, left);
            store_row(grad_pre + a.size, all.up, left);
        } else {
            const WithDerivative both = activate_with_derivative<A>(x);
            store_row(out, both.value, left);
            store_row(grad_pre, mul(given, both.derivative), left);
        }
    }
}

template <Activation A, bool Backward>
inline void activate_row(const ActivationArguments& a, int64_t row) {
    int64_t i = 0;
    for (; i + W <= a.size; i += W) activate_at<A, Backward>(a, row, i, W);
    if (i < a.size) activate_at<A, Backward>(a, row, i, a.size - i);
}

inline void activate_rows(Team& team, const ActivationArguments& a) {
    const int64_t block = std::clamp<int64_t>(16384 / std::max<int64_t>(a.size, 1), 1, 256);
    team.tasks((a.rows + block - 1) / block, [&](long task) {
        with_activation(a.activation, [&](auto activation) {
            for (int64_t row = task * block; row < std::min((task + 1) * block, a.rows); ++row)
                a.grad ? activate_row<activation, true>(a, row) : activate_row<activation, false>(a, row);
        });
    });
}

}  // namespace moesaic
