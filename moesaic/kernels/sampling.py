"""Drawing tokens from rows of scores, and what else is asked of rows: the log of their sums, and their largest.

Rows are NumPy vectors on the CPU. C++ does several side by side, and takes half to a seventh of the time; those of
which too many tokens are left are NumPy's, which defines all of them. The two round weights differently: a draw on the
border between two tokens may give one here and the other there, and with the same kernels always the same.
"""

import ctypes
import struct
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from moesaic.errors import NotFiniteError
from moesaic.kernels import select

Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]

_BLOCK = 128
# So few are sorted whole rather than searched.
_SORTED_WHOLE = 2048
# Of the search for a nucleus: weights below e^-40 share a bin.
_BINS, _DEPTH = 2048, 40.0
_STRUCT = struct.Struct("=qqqddddq")  # RowDraw of sampling.h


class RowDraw(NamedTuple):
    """A token to be drawn from a row of scores: from the softmax of scores / temperature, among those that top_k, top_p
    and min_p leave, in this order.

    best: the first of the row's largest scores, which is finite. top_k: None for all. top_p: the fewest largest that
    have this share of the softmax; min_p: those with at least this share of the largest's. uniform: the random number
    in [0, 1) that decides.
    """

    row: int
    best: int
    temperature: float
    top_k: int | None
    top_p: float
    min_p: float
    uniform: float


def draw_rows(scores: Floats, draws: Sequence[RowDraw]) -> list[int]:
    """Return the token of each draw from scores (R, V), which do not depend on each other."""
    library = select.cpu_library()
    if library is None:
        return [_draw(scores[each.row], each) for each in draws]
    rows = np.ascontiguousarray(scores)
    assert rows.dtype == np.float32 and rows.ndim == 2, (rows.dtype, rows.shape)
    size, first = rows.shape[1], rows.ctypes.data
    given = bytearray(_STRUCT.size * len(draws))
    for place, each in enumerate(draws):
        _STRUCT.pack_into(
            given, place * _STRUCT.size, first + 4 * size * each.row, each.best, min(each.top_k or 0, size),
            each.temperature, each.top_p, each.min_p, each.uniform, -1,
        )  # fmt: skip
    library.function("moesaic_draw", "pii")((ctypes.c_char * len(given)).from_buffer(given), len(draws), size)
    tokens = [values[-1] for values in _STRUCT.iter_unpack(given)]
    return [_draw(scores[each.row], each) if token < 0 else token for token, each in zip(tokens, draws, strict=True)]


def not_finite(largest: np.float32 | float) -> NotFiniteError:
    """Return what is raised for a row whose largest logit is no number."""
    return NotFiniteError(f"the largest logit is {largest}; a finite one is required; {NotFiniteError.REMEDY}.")


def log_totals(scores: Floats, top: int = 0) -> tuple[list[float], Ids]:
    """Return of each row (R, V) the log of the sum of e to its scores, and its `top` largest places (R, top).

    The largest come first, of equals the first ones; top: at most V. Of a row whose largest score is not finite the log
    is NaN, and the places are all 0.
    """
    rows, size = scores.shape
    totals, likeliest = np.empty(rows, np.float64), np.empty((rows, top), np.int64)
    library = select.cpu_library()
    if library is None:
        totals.fill(np.nan)
    else:
        scores = np.ascontiguousarray(scores)
        assert scores.dtype == np.float32, scores.dtype
        library.function("moesaic_log_totals", "piiipp")(
            scores.ctypes.data, rows, size, top, totals.ctypes.data, likeliest.ctypes.data
        )
    for row in np.flatnonzero(np.isnan(totals)):
        largest = scores[row].max()
        if np.isfinite(largest):
            totals[row] = float(largest) + np.log(_block_sums(_weights(scores[row], largest, 1.0)).sum())
            likeliest[row] = _places_of_largest(scores[row], top) if top else ()
        else:
            likeliest[row] = 0
    return totals.tolist(), likeliest


def _places_of_largest(scores: Floats, count: int) -> Ids:
    """Return the places of the count largest, largest first, the first of equals first."""
    blocks = len(scores) // _BLOCK
    if 2 * count <= blocks:
        # Every one of these blocks holds one that is at least as large, so count largest lie above the bound.
        tops = scores[: blocks * _BLOCK].reshape(-1, _BLOCK).max(1)
        bound = np.partition(tops, blocks - count)[blocks - count]
    elif count < len(scores):
        bound = np.partition(scores, len(scores) - count)[len(scores) - count]
    else:
        bound = np.float32(-np.inf)
    return _falling(scores, np.flatnonzero(scores >= bound))[:count]


def _draw(scores: Floats, given: RowDraw) -> int:
    largest, temperature = scores[given.best], given.temperature
    ids: Ids | None = None
    if given.top_k is not None and given.top_k < len(scores):
        if given.top_k == 1:
            return given.best
        ids = _places_of_largest(scores, given.top_k)
    weights = _weights(scores if ids is None else scores[ids], largest, temperature)
    if given.top_p < 1:
        kept = _nucleus(scores if ids is None else scores[ids], weights, given.top_p, largest, temperature)
        ids, weights = kept if ids is None else ids[kept], weights[kept]
    if given.min_p > 0:
        kept = np.flatnonzero(weights >= given.min_p)  # the largest has weight 1
        ids, weights = kept if ids is None else ids[kept], weights[kept]
    place = _pick(weights, given.uniform)
    return place if ids is None else int(ids[place])


def _weights(scores: Floats, largest: np.float32, temperature: float) -> Floats:
    """Return exp((scores - largest) / temperature): 1 for the largest."""
    weights = scores - largest
    with np.errstate(over="ignore", under="ignore"):
        if not 1e-30 < temperature < 1e30:  # beyond what fp32 can divide by
            return np.exp(weights.astype(np.float64) / temperature).astype(np.float32)
        return np.exp(weights if temperature == 1 else weights / np.float32(temperature))


def _pick(weights: Floats, uniform: float) -> int:
    """Return the place at which the running sum of weights passes the share uniform of the total."""
    if len(weights) > 4 * _BLOCK:
        # A running sum of everything would take longer than all else: first find the block.
        sums = _block_sums(weights).cumsum()
        goal = uniform * sums[-1]
        block = int(sums.searchsorted(goal, side="right"))
        if block == len(sums):  # rounded up to the total
            block = int(np.flatnonzero(np.diff(sums, prepend=0.0))[-1])
        start = block * _BLOCK
        within = weights[start : start + _BLOCK].cumsum(dtype=np.float64)
        goal -= sums[block - 1] if block else 0.0
    else:
        start, within = 0, weights.cumsum(dtype=np.float64)
        goal = uniform * within[-1]
    place = int(within.searchsorted(goal, side="right"))
    # At the end by rounding: the last that has any weight.
    return start + (place if place < len(within) else int(np.searchsorted(within, within[-1])))


def _block_sums(weights: Floats) -> npt.NDArray[np.float64]:
    whole = len(weights) // _BLOCK * _BLOCK
    sums = weights[:whole].reshape(-1, _BLOCK).sum(1).astype(np.float64)
    return np.append(sums, weights[whole:].sum(dtype=np.float64))


def _falling(scores: Floats, places: Ids) -> Ids:
    """Return places from the largest score down, of equal ones the smaller place first.

    One sort of whole numbers, ten times as fast as a stable sort of scores.
    """
    bits = (scores[places] + np.float32(0)).view(np.uint32)  # -0 becomes 0, its equal
    falling = np.where(bits >> 31, bits, bits ^ np.uint32(0x7FFFFFFF)).astype(np.uint64)
    keys = np.sort(falling << np.uint64(32) | places.astype(np.uint64))
    return (keys & np.uint64(0xFFFFFFFF)).astype(np.int64)


def _nucleus(scores: Floats, weights: Floats, top_p: float, largest: np.float32, temperature: float) -> Ids:
    """Return the places, rising, of the fewest largest scores whose weights reach the share top_p, the first of equals.

    The vocabulary is not sorted: only the few among which the last one must be are.
    """
    goal = top_p * float(_block_sums(weights).sum())
    above = 0.0  # the weight of what is larger than all places that are sorted
    with np.errstate(over="ignore"):
        places = np.flatnonzero(scores >= largest - np.float32(8 * temperature))  # a sure model's 0.95 lies far above
    if len(places) > _SORTED_WHOLE or weights[places].sum(dtype=np.float64) < goal:
        # Bins of equal width from the largest down, the last one without an end: their order is that of the scores.
        width = min(max(_DEPTH / _BINS * temperature, 1e-30), 1e30)
        with np.errstate(over="ignore"):
            depths = (largest - scores) / np.float32(width)
        bins = np.minimum(depths, np.float32(_BINS)).astype(np.int64)
        sums = np.bincount(bins, weights=weights, minlength=_BINS + 1).cumsum()
        bin_of_last = min(int(sums.searchsorted(goal)), _BINS)
        above = float(sums[bin_of_last - 1]) if bin_of_last else 0.0
        places = np.flatnonzero(bins == bin_of_last)
    falling = _falling(scores, places)
    through = above + weights[falling].cumsum(dtype=np.float64)
    falling = falling[: 1 + int(through[:-1].searchsorted(goal))]
    if not above:
        return np.sort(falling)
    kept = bins < bin_of_last
    kept[falling] = True
    return np.flatnonzero(kept)
