// Activations for PyTorch: the contract is in kernels/activation.py, the work in activation.h.

#include "activation.h"

#include "export.h"

using namespace moesaic;

// grad and grad_pre are null for the forward pass.
MOESAIC_EXPORT int64_t moesaic_activate(const bf16* pre, int64_t rows, int64_t size, int64_t activation,
                                        bf16* activated, const bf16* grad, bf16* grad_pre) try {
    const ActivationArguments arguments{pre, rows, size, activation, activated, grad, grad_pre};
    run_team(20.0 * double(rows) * double(size), [&](Team& team) { activate_rows(team, arguments); });
    return 0;
} MOESAIC_NO_MEMORY
