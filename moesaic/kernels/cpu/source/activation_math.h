// The MLP activations and their derivatives on fp32 vectors.
#pragma once

#include <type_traits>

#include "simd.h"

namespace moesaic {

// In the order of ACTIVATIONS in kernels/activation.py.
enum Activation : int64_t { kSwiglu = 0, kGelu = 1, kGeluTanh = 2, kSwigluOai = 3 };

// Whether it multiplies two halves of the pre-activation, [gate, up].
constexpr bool is_gated(int64_t activation) { return activation == kSwiglu || activation == kSwigluOai; }

// Call body(activation) with a constant, so that no loop in it asks which one it is.
template <typename Body>
MOESAIC_INLINE void with_activation(int64_t activation, Body&& body) {
    if (activation == kSwiglu)
        body(std::integral_constant<Activation, kSwiglu>{});
    else if (activation == kSwigluOai)
        body(std::integral_constant<Activation, kSwigluOai>{});
    else if (activation == kGelu)
        body(std::integral_constant<Activation, kGelu>{});
    else
        body(std::integral_constant<Activation, kGeluTanh>{});
}

// The normal distribution's cumulative function; error 1e-7 (Abramowitz and Stegun 7.1.26, for the complement).
inline Vf normal_cdf(Vf x) {
    const Vf z = mul(abs(x), set1(0.70710678118654752f));
    const Vf t = div(set1(1.0f), fma(z, set1(0.3275911f), set1(1.0f)));
    Vf p = fma(t, set1(1.061405429f), set1(-1.453152027f));
    p = fma(p, t, set1(1.421413741f));
    p = fma(p, t, set1(-0.284496736f));
    p = fma(p, t, set1(0.254829592f));
    const Vf tail = mul(mul(mul(p, t), exp(sub(zero(), mul(z, z)))), set1(0.5f));
    return select_less(x, zero(), tail, sub(set1(1.0f), tail));
}

// tanh(x) = 1 - 2 / (e^2x + 1)
inline Vf hyperbolic_tangent(Vf x) {
    return sub(set1(1.0f), div(set1(2.0f), add(exp(add(x, x)), set1(1.0f))));
}

constexpr float kGeluScale = 0.79788456080286536f;  // sqrt(2 / pi)
constexpr float kGeluCubic = 0.044715f;

inline Vf gelu(Vf x) { return mul(x, normal_cdf(x)); }
inline Vf gelu_tanh(Vf x) {
    const Vf inner = mul(set1(kGeluScale), mul(x, fma(mul(x, x), set1(kGeluCubic), set1(1.0f))));
    return mul(mul(set1(0.5f), x), add(set1(1.0f), hyperbolic_tangent(inner)));
}
// An activation's value and derivative at the same point.
struct WithDerivative {
    Vf value, derivative;
};

inline WithDerivative gelu_with_derivative(Vf x) {
    const Vf cdf = normal_cdf(x);
    const Vf density = mul(set1(0.3989422804014327f), exp(mul(mul(x, x), set1(-0.5f))));
    return {mul(x, cdf), fma(x, density, cdf)};
}
inline WithDerivative gelu_tanh_with_derivative(Vf x) {
    const Vf square = mul(x, x);
    const Vf inner = mul(set1(kGeluScale), mul(x, fma(square, set1(kGeluCubic), set1(1.0f))));
    const Vf tangent = hyperbolic_tangent(inner);
    const Vf half = mul(set1(0.5f), add(set1(1.0f), tangent));
    const Vf slope = mul(set1(kGeluScale), fma(square, set1(3 * kGeluCubic), set1(1.0f)));
    const Vf bend = mul(mul(set1(0.5f), x), mul(sub(set1(1.0f), mul(tangent, tangent)), slope));
    return {mul(x, half), add(half, bend)};
}

template <Activation A>
inline Vf activate(Vf x) {
    static_assert(!is_gated(A));
    return A == kGelu ? gelu(x) : gelu_tanh(x);
}
template <Activation A>
inline WithDerivative activate_with_derivative(Vf x) {
    static_assert(!is_gated(A));
    return A == kGelu ? gelu_with_derivative(x) : gelu_tanh_with_derivative(x);
}

// Of swiglu_oai. NaN passes through both clamps, since min and max give their second operand then.
constexpr float kOaiLimit = 7.0f, kOaiSlope = 1.702f;
MOESAIC_INLINE Vf bounded_gate(Vf gate) { return min(set1(kOaiLimit), gate); }
MOESAIC_INLINE Vf bounded_up(Vf up) { return max(set1(-kOaiLimit), min(set1(kOaiLimit), up)); }

// Quick: with quick_sigmoid.
template <bool Quick>
MOESAIC_INLINE Vf sigmoid_of(Vf x) {
    return Quick ? quick_sigmoid(x) : sigmoid(x);
}

template <Activation A, bool Quick = false>
MOESAIC_INLINE Vf activate_gated(Vf gate, Vf up) {
    static_assert(is_gated(A));
    if constexpr (A == kSwiglu) return mul(mul(gate, sigmoid_of<Quick>(gate)), up);
    const Vf bounded = bounded_gate(gate);
    const Vf factor = add(bounded_up(up), set1(1.0f));
    return mul(mul(bounded, sigmoid_of<Quick>(mul(set1(kOaiSlope), bounded))), factor);
}

// A gated activation's value, and the gradients of its two inputs.
struct GatedGradients {
    Vf value, gate, up;
};

// grad: of the value.
template <Activation A, bool Quick = false>
MOESAIC_INLINE GatedGradients activate_gated_with_gradients(Vf gate, Vf up, Vf grad) {
    static_assert(is_gated(A));
    const Vf one = set1(1.0f);
    if constexpr (A == kSwiglu) {
        const Vf s = sigmoid_of<Quick>(gate), silu = mul(gate, s);
        const Vf derivative = fma(silu, sub(one, s), s);
        return {mul(silu, up), mul(mul(grad, up), derivative), mul(grad, silu)};
    }
    const Vf limit = set1(kOaiLimit), slope = set1(kOaiSlope);
    const Vf bounded = bounded_gate(gate), factor = add(bounded_up(up), one);
    const Vf s = sigmoid_of<Quick>(mul(slope, bounded)), swish = mul(bounded, s);
    const Vf derivative = fma(mul(slope, swish), sub(one, s), s);
    return {mul(swish, factor), select_less(limit, gate, zero(), mul(mul(grad, factor), derivative)),
            select_less(limit, abs(up), zero(), mul(grad, swish))};
}

}  // namespace moesaic
