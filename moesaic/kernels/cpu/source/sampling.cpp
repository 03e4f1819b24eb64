// Drawing tokens for Python: the contract is in kernels/sampling.py, the work in sampling.h.

#include "sampling.h"

#include "export.h"

// A token, or -1 where the definition in Python has to decide.
MOESAIC_EXPORT int64_t moesaic_draw(const float* scores, int64_t size, int64_t best, float temperature, int64_t top_k,
                                    double top_p, float min_p, double uniform) try {
    using namespace moesaic;
    static thread_local Scratch scratch;
    const DrawArguments arguments{scores, size, scores[best], temperature, top_k, top_p, uniform, min_p};
    return Draw(arguments, scratch).token();
} MOESAIC_NO_MEMORY
