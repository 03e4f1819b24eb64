// The MLP activations and their derivatives on fp32 vectors.
#pragma once

#include "simd.h"

namespace moesaic {

enum Activation : int64_t { kSwiglu = 0, kGelu = 1, kGeluTanh = 2 };

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
inline Vf silu(Vf x) { return mul(x, sigmoid(x)); }
inline Vf quick_silu(Vf x) { return mul(x, quick_sigmoid(x)); }

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
inline WithDerivative silu_with_derivative(Vf x) {
    const Vf s = sigmoid(x);
    const Vf value = mul(x, s);
    return {value, fma(value, sub(set1(1.0f), s), s)};
}

inline WithDerivative quick_silu_with_derivative(Vf x) {
    const Vf s = quick_sigmoid(x);
    const Vf value = mul(x, s);
    return {value, fma(value, sub(set1(1.0f), s), s)};
}

inline Vf activate(Vf x, int64_t activation) { return activation == kGelu ? gelu(x) : gelu_tanh(x); }
inline WithDerivative activate_with_derivative(Vf x, int64_t activation) {
    return activation == kGelu ? gelu_with_derivative(x) : gelu_tanh_with_derivative(x);
}

}  // namespace moesaic
