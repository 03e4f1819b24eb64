"""Two models' tensors side by side, by our names, whatever layout each is in; some rows at a time."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from moesaic.checkpoint.store import resolve_checkpoint
from moesaic.checkpoint.stream import TensorReader
from moesaic.convert.opened import open_model
from moesaic.convert.source import is_source
from moesaic.convert.tensors import own_tensors

OnProgress = Callable[[str, float], None]


@dataclass(frozen=True)
class WeightComparison:
    """How many tensors are equal bit by bit, and the largest difference of the others.

    alone: names that only one of the models has, or in another shape.
    """

    equal: int
    different: int
    max_absolute: float
    alone: tuple[str, ...]


def compare_weights(
    first: Path, second: Path, *, on_progress: OnProgress = lambda stage, share: None
) -> WeightComparison:
    """Compare every number of every tensor that both models have; the dtypes may differ."""
    with _tensors(first) as (shapes, parts), _tensors(second) as (other_shapes, other_parts):
        common = [name for name, shape in shapes.items() if other_shapes.get(name) == shape]
        equal, largest = 0, 0.0
        for index, name in enumerate(common):
            differs = False
            for one, other in _side_by_side(parts(name), other_parts(name)):
                if not torch.equal(one.float(), other.float()):
                    differs = True
                    largest = max(largest, float((one.float() - other.float()).abs().max()))
            equal += not differs
            on_progress("comparing the tensors", (index + 1) / len(common))
        alone = sorted({*shapes, *other_shapes} - set(common))
        return WeightComparison(equal, len(common) - equal, largest, tuple(alone))


@contextmanager
def _tensors(path: Path) -> Iterator[tuple[dict[str, tuple[int, ...]], Callable[[str], Iterator[Tensor]]]]:
    """Give the shapes of a model's tensors by our names, and what yields the numbers of one, part by part."""
    if is_source(path):
        with open_model(path) as opened:
            yield (
                own_tensors(opened.config),
                lambda name: (
                    piece.to_ours(opened.source.read(piece.theirs, piece.index)).flatten()
                    for piece in opened.pieces[name]
                ),
            )
    else:
        with TensorReader(resolve_checkpoint(path).path / "model.safetensors") as reader:
            yield {name: each.shape for name, each in reader.layout.items()}, lambda name: _parts(reader, name)


def _parts(reader: TensorReader, name: str) -> Iterator[Tensor]:
    shape = reader.layout[name].shape
    if len(shape) < 3:
        yield reader.read(name).flatten()
    else:
        yield from (reader.read(name, index).flatten() for index in range(shape[0]))


def _side_by_side(first: Iterator[Tensor], second: Iterator[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Cut two streams of equally many numbers, in parts of any sizes, at the same places."""
    one, other = next(first, None), next(second, None)
    while one is not None and other is not None:
        size = min(len(one), len(other))
        yield one[:size], other[:size]
        one = one[size:] if len(one) > size else next(first, None)
        other = other[size:] if len(other) > size else next(second, None)
