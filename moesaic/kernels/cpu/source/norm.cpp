// Norms for PyTorch: the contract is in kernels/norm.py, the work in norm.h.

#include "norm.h"

#include "export.h"

using namespace moesaic;

// bias and mean are null for RMSNorm.
MOESAIC_EXPORT int64_t moesaic_norm(const void* x, int64_t is_bf16, int64_t rows, int64_t size, const float* weight,
                                    const float* bias, float epsilon, void* y, float* mean, float* inverse) try {
    const NormArguments arguments{x, is_bf16 != 0, rows, size, weight, bias, epsilon, y, mean, inverse};
    run_team(8.0 * double(rows) * double(size), [&](Team& team) { norm(team, arguments); });
    return 0;
} MOESAIC_NO_MEMORY

// mean and grad_bias are null for RMSNorm.
MOESAIC_EXPORT int64_t moesaic_norm_backward(const void* grad, const void* x, int64_t is_bf16, int64_t rows,
                                             int64_t size, const float* weight, const float* mean,
                                             const float* inverse, void* grad_x, float* grad_weight,
                                             float* grad_bias) try {
    thread_local Scratch shared;
    float* blocks = shared.get<float>(size_t(norm_tasks(rows, size) * size * (grad_bias ? 2 : 1)));
    const NormBackwardArguments arguments{grad, x,       is_bf16 != 0, rows,        size,     weight,
                                          mean, inverse, grad_x,       grad_weight, grad_bias};
    run_team(16.0 * double(rows) * double(size), [&](Team& team) { norm_backward(team, arguments, blocks); });
    return 0;
} MOESAIC_NO_MEMORY
