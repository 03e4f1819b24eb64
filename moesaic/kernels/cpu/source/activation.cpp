// Activations for PyTorch: the contract is in kernels/activation.py, the work in activation.h.

#include "activation.h"

#include "export.h"

using namespace moesaic;

// grad and grad_pre are null for the forward pass.
MOESAIC_EXPORT int64_t moesaic_activate(const void* pre, int64_t is_bf16, int64_t rows, int64_t size,
                                        int64_t activation, void* activated, const void* grad, void* grad_pre) {
    const ActivationArguments arguments{pre, is_bf16 != 0, rows, size, activation, activated, grad, grad_pre};
    run_team(20.0 * double(rows) * double(size), [&](Team& team) { activate_rows(team, arguments); });
    return 0;
}
