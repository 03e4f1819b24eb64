// Drawing tokens for Python: the contract is in kernels/sampling.py, the work in sampling.h.

#include "sampling.h"

#include "export.h"

// Fill in the tokens of rows of `size` scores.
MOESAIC_EXPORT int64_t moesaic_draw(moesaic::RowDraw* draws, int64_t count, int64_t size) try {
    using namespace moesaic;
    const double work = count > 1 ? 20.0 * double(count) * double(size) : 0.0;  // one row is one thread's
    run_team(work, [&](Team& team) { draw_rows(team, draws, count, size); });
    return 0;
} MOESAIC_NO_MEMORY
