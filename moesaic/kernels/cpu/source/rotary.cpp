// Rotary positions for PyTorch: the contract is in kernels/rotary.py, the work in rotary.h.

#include "rotary.h"

#include "export.h"

using namespace moesaic;

MOESAIC_EXPORT int64_t moesaic_rotate(const void* x, int64_t is_bf16, int64_t batch, int64_t length, int64_t heads,
                                      int64_t head_dim, int64_t batch_stride, int64_t length_stride,
                                      const float* cosines, const float* sines, int64_t backwards, void* out) try {
    const RotaryArguments arguments{x,        is_bf16 != 0, batch,          length, heads, head_dim, batch_stride,
                                    length_stride, cosines, sines, backwards != 0, out};
    run_team(8.0 * double(batch * length) * double(heads * head_dim),
             [&](Team& team) { rotate(team, arguments); });
    return 0;
} MOESAIC_NO_MEMORY
