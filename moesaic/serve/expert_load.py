"""What the experts of a model do while it serves: counts per layer and expert, and of the last step."""

from array import array
from pathlib import Path

import numpy as np

from moesaic.checkpoint.mapped import reads_by_huge_pages
from moesaic.kernels.decode import Decoded
from moesaic.kernels.huge_pages import HUGE_PAGE_BYTES
from moesaic.model.feed_forward import FeedForward
from moesaic.model.transformer import Transformer
from moesaic.moe.experts import Experts
from moesaic.serve.outputs import LayerLoad, TokenExperts

# How often what was read from the disk is looked at, at most, and of the earlier looks, what is left at the next.
_STEPS_A_LOOK, _KEPT = 16, 0.9
_PIECES = 2  # of a packed expert in its file: up and down
# Routes are counted when somebody asks, or so many wait.
_MOST_PENDING_STEPS, _MOST_PENDING_TOKENS = 64, 4096
_PROCESS_COUNTERS = Path("/proc/self/io")
# Recent counts lose half their weight in so many tokens.
_HALF_LIFE_TOKENS = 2048.0


class ExpertLoad:
    """Counts routes, of some steps together: a step alone would pay more for the counting than for its sums.

    hit_rate: of the bytes of experts that the last steps used, the share that did not come from the disk; 1 where all
    is in memory, None before anything is known. A model that is mapped from its file and is larger than memory reads
    its experts when they are chosen (checkpoint/mapped.py), as whole huge pages: of an expert that lies in so many
    pieces, one more for each than they fill, since pieces begin and end anywhere, but of a layer never more than all of
    it. The process reads little else where it runs no other model.
    """

    def __init__(self, model: Transformer, *, is_alone: bool = True) -> None:
        """is_alone: no other model runs in the process; where one does, hit_rate stays None: what it reads from the
        disk cannot be told from what this one does.
        """
        config = model.config
        moe = [(index, layer) for index, layer in enumerate(config.layers) if layer.is_moe]
        self.layer_numbers = tuple(index for index, _ in moe)
        self._num_experts = [layer.num_experts for _, layer in moe]
        self._top_k = np.array([layer.top_k for _, layer in moe], dtype=np.int64)
        self._starts = np.cumsum([0, *self._num_experts])[:-1]
        self._total = np.zeros(sum(self._num_experts), dtype=np.int64)
        self._recent = np.zeros(len(self._total))
        self._bytes = np.repeat([_expert_bytes(model, layer) for layer in self.layer_numbers], self._num_experts)
        spare = _PIECES * HUGE_PAGE_BYTES if model.reads_ahead and reads_by_huge_pages() else 0
        self._bytes_missed = self._bytes + spare  # what is read of an expert that is not in memory
        self._layer_bytes = np.add.reduceat(self._bytes, self._starts) if moe else self._bytes
        # Of steps that are not counted yet: how many tokens each had, and their routes.
        self._pending: list[int] = []
        self._pending_ids = array("q")
        self._pending_tokens = 0
        self._distinct_experts_per_step = 0.0
        self._num_distinct = 0  # of all steps and layers
        self._bytes_used = 0
        self._most_read = 0  # had none of those bytes been in memory
        self._hit_rate: float | None = None
        self._is_alone = is_alone
        self._steps_since_look = 0
        self._last_look = (0, disk_bytes_read())
        self._recent_most = self._recent_read = 0.0

    def add(self, decoded: Decoded) -> None:
        """Count a step's routes."""
        num_tokens, _ = decoded.sizes
        if not self._num_experts or not num_tokens:
            return
        self._pending.append(num_tokens)
        self._pending_ids.frombytes(decoded.expert_id_bytes)  # copied: the next step may write there
        self._pending_tokens += num_tokens
        if len(self._pending) >= _MOST_PENDING_STEPS or self._pending_tokens >= _MOST_PENDING_TOKENS:
            self._count()

    @property
    def distinct_experts_per_step(self) -> float:
        """Of the last step, the mean over the layers."""
        self._count()
        return self._distinct_experts_per_step

    @property
    def distinct_experts(self) -> float:
        """The same, summed over the steps."""
        self._count()
        return self._num_distinct / max(1, len(self._num_experts))

    @property
    def bytes_used(self) -> int:
        """Of experts, each step's distinct ones."""
        self._count()
        return self._bytes_used

    @property
    def hit_rate(self) -> float | None:
        self._count()
        return self._hit_rate

    def _count(self) -> None:
        """Count what waits."""
        steps, self._pending, self._pending_tokens = self._pending, [], 0
        ids, self._pending_ids = np.array(self._pending_ids), array("q")
        if not steps:
            return
        size, num_layers = len(self._total), len(self._num_experts)
        num_tokens = np.array(steps)
        # A step's routes are one layer's after the other: where in the counts of all steps each run of them begins.
        starts = np.add.outer(np.arange(len(steps)) * size, self._starts).ravel()
        flat = ids + np.repeat(starts, np.outer(num_tokens, self._top_k).ravel())
        counts = np.bincount(flat, minlength=len(steps) * size).reshape(len(steps), size)
        self._total += counts.sum(0)
        # What is left of each step's counts after the tokens of the later ones.
        later = num_tokens[::-1].cumsum()[::-1]
        kept = 0.5 ** (np.append(later, 0) / _HALF_LIFE_TOKENS)
        self._recent = kept[0] * self._recent + kept[1:] @ counts
        used = counts > 0
        self._distinct_experts_per_step = float(np.count_nonzero(used[-1])) / num_layers
        self._num_distinct += int(np.count_nonzero(used))
        self._bytes_used += int((used @ self._bytes).sum())
        missed = np.add.reduceat(used * self._bytes_missed, self._starts, axis=1)
        self._most_read += int(np.minimum(missed, self._layer_bytes).sum())
        self._steps_since_look += len(steps)
        if self._is_alone and self._steps_since_look >= _STEPS_A_LOOK:
            self._steps_since_look = 0
            self._look()

    def _look(self) -> None:
        most, read = self._last_look
        self._last_look = (self._most_read, disk_bytes_read())
        if read is not None and self._last_look[1] is not None:
            self._recent_most = self._recent_most * _KEPT + self._most_read - most
            self._recent_read = self._recent_read * _KEPT + self._last_look[1] - read
            # Rounded: what else the process reads is no miss.
            self._hit_rate = round(max(0.0, 1.0 - self._recent_read / self._recent_most), 6)

    def layers(self) -> tuple[LayerLoad, ...]:
        self._count()
        ends = self._starts + self._num_experts
        return tuple(
            LayerLoad(
                layer=layer,
                num_experts=count,
                top_k=int(top_k),
                tokens_per_expert=tuple(self._total[start:end].tolist()),
                recent_tokens_per_expert=tuple(self._recent[start:end].tolist()),
            )
            for layer, count, top_k, start, end in zip(
                self.layer_numbers, self._num_experts, self._top_k, self._starts, ends, strict=True
            )
        )


def disk_bytes_read() -> int | None:
    """Return the bytes that this process has had read from disks, pages of mapped files included; None: not known."""
    try:
        lines = _PROCESS_COUNTERS.read_text(encoding="ascii").splitlines()
    except OSError:  # not Linux, or not allowed
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith("read_bytes:")), None)


def _expert_bytes(model: Transformer, layer: int) -> int:
    """Return the memory of one expert of a layer."""
    feed_forward = model.blocks[layer].feed_forward
    assert isinstance(feed_forward, FeedForward) and feed_forward.moe is not None
    experts = feed_forward.moe.experts
    assert isinstance(experts, Experts)
    if experts.packed is not None:
        whole = experts.packed.num_bytes
    else:
        whole = sum(parameter.nbytes for parameter in experts.parameters())
    return whole // experts.num_experts


def token_experts(decoded: Decoded, row: int) -> TokenExperts:
    """Return what one token of a step chose."""
    return TokenExperts(
        tuple(tuple(each[row].tolist()) for each in decoded.expert_ids),
        tuple(tuple(each[row].tolist()) for each in decoded.routing_weights),
    )
