"""Two models' tensors side by side, by our names, whatever layout each is in; some rows at a time."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from moesaic.checkpoint.store import checked_file, resolve_checkpoint
from moesaic.checkpoint.stream import TensorReader
from moesaic.config.model import ModelConfig
from moesaic.convert.keys import differences
from moesaic.convert.opened import open_model
from moesaic.convert.rewriting import Rewriting, rewritings
from moesaic.convert.source import is_source
from moesaic.convert.tensors import own_tensors
from moesaic.logs import OnProgress, no_progress
from moesaic.model.load import load_run_config

# Numbers that are compared at a time: what comparing takes beside the two tensors is some times as many bytes.
_CHUNK = 1 << 20


@dataclass(frozen=True)
class WeightComparison:
    """How the configs and the tensors of two models differ, whatever layout each is in.

    equal: tensors that are equal bit by bit. rounded: of the first and of the second, those that are equal when cast to
    the dtype that the other has them in, and that dtype. different: all others, with the largest difference. alone:
    names that only one of the models has, or in another shape. configs: what the configs say differently. A form that
    computes the same (rewriting.py) is taken for what it is a form of; scaled: its tensors that have a factor of the
    other's in them.
    """

    equal: int
    rounded: tuple[Mapping[str, str], Mapping[str, str]]
    different: tuple[str, ...]
    max_absolute: float
    alone: tuple[str, ...]
    configs: tuple[str, ...]
    scaled: tuple[Mapping[str, str], Mapping[str, str]]

    @property
    def failure(self) -> str | None:
        """What more than rounding there is between the two, None where nothing is."""
        if self.configs:
            return f"the configs differ in {'; '.join(self.configs[:3])}"
        if self.alone:
            return f"tensors that only one of them has: {len(self.alone)} ({', '.join(self.alone[:3])})"
        if self.different:
            total = self.equal + sum(map(len, self.rounded)) + len(self.different)
            return (
                f"{len(self.different)} of {total} tensors differ by more than rounding "
                f"({', '.join(self.different[:3])}), by {self.max_absolute:.3g} at most"
            )
        return None


@dataclass(frozen=True)
class _Tensors:
    """A model's tensors by our names: parts yields the numbers of one, part by part."""

    config: ModelConfig
    shapes: dict[str, tuple[int, ...]]
    parts: Callable[[str], Iterator[Tensor]]


def compare_weights(first: Path, second: Path, *, on_progress: OnProgress = no_progress) -> WeightComparison:
    """Compare every number of every tensor that both models have; the dtypes may differ."""
    with _tensors(first) as given, _tensors(second) as other_given:
        one, other, scaled = _in_one_form(given, other_given)
        common = [name for name, shape in one.shapes.items() if other.shapes.get(name) == shape]
        equal, different, largest = 0, list[str](), 0.0
        rounded: tuple[dict[str, str], dict[str, str]] = ({}, {})
        for index, name in enumerate(common):
            found = [_compare(*pair) for pair in _side_by_side(one.parts(name), other.parts(name))]
            largest = max(largest, *(each.largest for each in found), 0.0)
            kinds = {each.kind for each in found if each.kind != "equal"}
            if not kinds:
                equal += 1
            elif len(kinds) == 1 and isinstance(kind := kinds.pop(), tuple):
                rounded[kind[0]][name] = kind[1]
            else:
                different.append(name)
            on_progress("comparing the tensors", (index + 1) / len(common))
        return WeightComparison(
            equal=equal,
            rounded=rounded,
            different=tuple(different),
            max_absolute=largest,
            alone=tuple(sorted({*one.shapes, *other.shapes} - set(common))),
            configs=tuple(differences(one.config, other.config)),
            scaled=scaled,
        )


@dataclass(frozen=True)
class _Found:
    """kind: "equal", "different", or which of two is rounded to which dtype to be the other."""

    kind: Literal["equal", "different"] | tuple[int, str]
    largest: float


def _compare(one: Tensor, other: Tensor) -> _Found:
    if torch.equal(one.float(), other.float()):
        return _Found("equal", 0.0)
    largest = float((one.float() - other.float()).abs().max())
    if one.dtype is not other.dtype:
        for side, (wide, narrow) in enumerate(((one, other), (other, one))):
            cast = wide.to(narrow.dtype)
            # A number that has become infinite is not rounded but lost.
            if torch.equal(cast, narrow) and torch.equal(cast.isfinite(), wide.isfinite()):
                return _Found((side, str(narrow.dtype).removeprefix("torch.")), largest)
    return _Found("different", largest)


def _in_one_form(first: _Tensors, second: _Tensors) -> tuple[_Tensors, _Tensors, tuple[dict[str, str], dict[str, str]]]:
    """Return both, one of them rewritten where that makes it a form of the other, and the factors in its tensors."""
    if differences(first.config, second.config):
        for form in rewritings(first.config):
            if not differences(form.config, second.config):
                return _rewrite(first, form), second, (form.scales, {})
        for form in rewritings(second.config):
            if not differences(first.config, form.config):
                return first, _rewrite(second, form), ({}, form.scales)
    return first, second, ({}, {})


def _rewrite(tensors: _Tensors, form: Rewriting) -> _Tensors:
    shapes = own_tensors(form.config)

    def parts(name: str) -> Iterator[Tensor]:
        if name in form.zeros:
            yield torch.zeros(prod(shapes[name]))
            return
        factor = form.factors.get(name)
        if isinstance(factor, str):
            factor = float(next(tensors.parts(factor)))
        yield from (part if factor is None else part.float() * factor for part in tensors.parts(name))

    return _Tensors(form.config, shapes, parts)


@contextmanager
def _tensors(path: Path) -> Iterator[_Tensors]:
    if is_source(path):
        with open_model(path) as opened:
            yield _Tensors(
                opened.config,
                own_tensors(opened.config),
                lambda name: (
                    piece.to_ours(opened.source.read(piece.theirs, piece.index)).flatten()
                    for piece in opened.pieces[name]
                ),
            )
    else:
        info = resolve_checkpoint(path)
        with checked_file(info, "model") as file, TensorReader(file) as reader:
            yield _Tensors(
                load_run_config(info.run_folder).model,
                {name: each.shape for name, each in reader.layout.items()},
                lambda name: _parts(reader, name),
            )


def _parts(reader: TensorReader, name: str) -> Iterator[Tensor]:
    shape = reader.layout[name].shape
    if len(shape) < 3:
        yield reader.read(name).flatten()
    else:
        yield from (reader.read(name, index).flatten() for index in range(shape[0]))


def _side_by_side(first: Iterator[Tensor], second: Iterator[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Cut two streams of equally many numbers, in parts of any sizes, at the same places, into small pieces."""
    one, other = next(first, None), next(second, None)
    while one is not None and other is not None:
        size = min(len(one), len(other), _CHUNK)
        yield one[:size], other[:size]
        one = one[size:] if len(one) > size else next(first, None)
        other = other[size:] if len(other) > size else next(second, None)
