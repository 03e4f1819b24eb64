// Drawing and scoring tokens for Python: the contract is in kernels/sampling.py, the work in sampling.h.

#include "sampling.h"

#include "export.h"

using namespace moesaic;

// Fill in the tokens of rows of `size` scores.
MOESAIC_EXPORT int64_t moesaic_draw(RowDraw* draws, int64_t count, int64_t size) try {
    const double work = count > 1 ? 20.0 * double(count) * double(size) : 0.0;  // one row is one thread's
    run_team(work, [&](Team& team) { draw_rows(team, draws, count, size); });
    return 0;
} MOESAIC_NO_MEMORY

MOESAIC_EXPORT int64_t moesaic_log_totals(const float* scores, int64_t rows, int64_t size, int64_t top, double* totals,
                                          int64_t* likeliest) try {
    const double work = rows > 1 ? 20.0 * double(rows) * double(size) : 0.0;
    run_team(work, [&](Team& team) { total_rows(team, scores, rows, size, top, totals, likeliest); });
    return 0;
} MOESAIC_NO_MEMORY
