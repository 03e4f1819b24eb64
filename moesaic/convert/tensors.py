"""How the tensors of a foreign layout correspond to ours: name templates, and the pieces that a tensor is made of.

Ours stack the experts of a layer; elsewhere each matrix of each expert is a tensor of its own, or stacked without the
other. Either way one of our tensors is the rows of some foreign ones, back to back, some of them in another order.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Literal

import torch
from torch import Tensor

from moesaic.checkpoint.stream import TensorLayout
from moesaic.config.model import ModelConfig
from moesaic.errors import CheckpointError, ConversionError
from moesaic.kernels.finite import is_finite
from moesaic.model.transformer import Transformer

RowOrder = Tensor  # (rows,) int64: row i of ours is row order[i] of theirs


@dataclass(frozen=True)
class TensorRule:
    """One of our tensors and those it is made of, as templates.

    {layer} and {rest} stand for what they match; {expert} in theirs for every expert in turn. layers: the rule is for
    these layers only. rows: the order of our rows in theirs. is_stacked: theirs have all experts in one tensor, ours
    takes from each in turn. parts: ours is a stack, of heads, in which each of theirs has so many rows. is_transposed:
    an expert's (a head's) matrix is ours transposed, of all of theirs or of each as it says; `rows` counts its columns.
    is_row: theirs has a first dimension of 1 that ours has not. half: theirs has ours as the first (0) or the second
    (1) half of its rows.
    """

    ours: str
    theirs: tuple[str, ...]
    layers: Literal["all", "moe", "dense"] = "all"
    rows: Callable[[ModelConfig], RowOrder] | None = None
    is_stacked: bool = False
    parts: Callable[[ModelConfig], tuple[int, ...]] | None = None
    is_transposed: bool | tuple[bool, ...] = False
    is_row: bool = False
    half: int | None = None


@dataclass(frozen=True)
class Piece:
    """Numbers of one of ours, from `start` on, that are a foreign tensor, its index-th part, or a half of its rows.

    shape: of the foreign tensor, or of the part or half. order: of our rows in theirs, None where it is the same.
    """

    ours: str
    start: int
    theirs: str
    index: int | None
    shape: tuple[int, ...]
    order: RowOrder | None
    is_transposed: bool = False
    half: int | None = None

    @property
    def stop(self) -> int:
        return self.start + prod(self.shape)

    def to_ours(self, tensor: Tensor) -> Tensor:
        if self.half is not None:
            tensor = tensor.chunk(2)[self.half]
        if self.is_transposed:
            tensor = tensor.t()
        return (tensor if self.order is None else tensor[self.order]).contiguous()

    def to_theirs(self, numbers: Tensor) -> Tensor:
        rows = numbers.reshape(self.shape[::-1] if self.is_transposed else self.shape)
        if self.order is not None:
            rows = torch.empty_like(rows).index_copy_(0, self.order, rows)
        return rows.t() if self.is_transposed else rows


def paired_rows(num_heads: int, head_size: int, *, start: int = 0) -> RowOrder:
    """Return the order for heads whose rotary channels, from `start` on, stand in pairs (0, 1), (2, 3), ...

    Ours are turned in pairs (i, i + half).
    """
    channels = torch.arange(start, head_size)
    head = torch.cat([torch.arange(start), channels[::2], channels[1::2]])
    return (torch.arange(num_heads)[:, None] * head_size + head).flatten()


def paired_query_rows(config: ModelConfig) -> RowOrder:
    """Return the order of the rows of a model's queries, whose rotary channels stand in pairs."""
    return paired_rows(config.num_heads, config.head_dim)


def paired_key_rows(config: ModelConfig) -> RowOrder:
    """Return the order of the rows of a model's keys, whose rotary channels stand in pairs."""
    return paired_rows(config.num_kv_heads, config.head_dim)


def common_dtype(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """Return the one dtype of several tensors, or what holds them all."""
    found = set(dtypes)
    return found.pop() if len(found) == 1 else torch.float32


def is_finite_weight(tensor: Tensor) -> bool:
    """Whether all of a weight's numbers are finite, in fp64 as the fp32 that they are computed in."""
    return is_finite(tensor.float() if tensor.dtype is torch.float64 else tensor)


def require_finite(name: str, tensor: Tensor) -> Tensor:
    """Return a checkpoint's tensor. Raises: CheckpointError where something in it is not finite."""
    if not is_finite_weight(tensor):
        raise CheckpointError(
            f"{name} holds numbers that are not finite; finite weights are required; use another step."
        )
    return tensor


def cast_weight(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a finite weight in another dtype. Raises: ConversionError where that makes a number infinite."""
    out = tensor.to(dtype)
    if tensor.dtype is not dtype and not is_finite(out):
        largest, short = torch.finfo(dtype).max, {torch.float16: "fp16", torch.bfloat16: "bf16"}.get(dtype, "fp32")
        raise ConversionError(
            f"{name} holds numbers beyond {largest:g}, the largest of {short}, which would become infinite; a dtype "
            f"with room for them is required; use {'bf16 or fp32' if dtype is torch.float16 else 'fp32'}."
        )
    return out


def parted_rows(num_heads: int, head_size: int, *, turned: int) -> RowOrder:
    """Return the order for heads of which the first `turned` channels are turned, in pairs (i, i + turned / 2).

    Ours have half of them in each half of the head.
    """
    channels = torch.arange(head_size).split([turned, head_size - turned])
    head = torch.cat([each.tensor_split(2)[half] for half in range(2) for each in channels])
    return (torch.arange(num_heads)[:, None] * head_size + head).flatten()


def parted_query_rows(config: ModelConfig) -> RowOrder:
    """Return the order of the rows of a model's queries, of whose heads some channels are turned."""
    return _parted(config, config.num_heads)


def parted_key_rows(config: ModelConfig) -> RowOrder:
    """Return the order of the rows of a model's keys, of whose heads some channels are turned."""
    return _parted(config, config.num_kv_heads)


def parted_query_norm_rows(config: ModelConfig) -> RowOrder:
    """Return the order of the weights of the norm of a model's queries, of one head or of all together."""
    return _parted(config, config.num_heads if config.qk_norm == "full" else 1)


def parted_key_norm_rows(config: ModelConfig) -> RowOrder:
    """Return the order of the weights of the norm of a model's keys, of one head or of all together."""
    return _parted(config, config.num_kv_heads if config.qk_norm == "full" else 1)


def parted_head_rows(config: ModelConfig) -> RowOrder:
    """Return the order of the channels of one head, some of which are turned."""
    return _parted(config, 1)


def _parted(config: ModelConfig, num_heads: int) -> RowOrder:
    return parted_rows(num_heads, config.head_dim, turned=config.rope_head_dim or config.head_dim)


def latent_query_rows(config: ModelConfig) -> RowOrder:
    """Return the order of the rows of latent attention's queries."""
    assert config.latent_attention is not None
    return paired_rows(config.num_heads, config.head_dim, start=config.latent_attention.nope_head_dim)


def latent_key_rows(config: ModelConfig) -> RowOrder:
    """Return the order of the rows of what latent attention's keys are made from."""
    assert config.latent_attention is not None
    rank = config.latent_attention.kv_rank
    return paired_rows(1, rank + config.latent_attention.rope_head_dim, start=rank)


def own_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a model's tensors by name."""
    with torch.device("meta"):
        state = Transformer(config).state_dict()
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def pieces_of(config: ModelConfig, rules: tuple[TensorRule, ...]) -> dict[str, list[Piece]]:
    """Return what each tensor of a model is made of, in the order of its rows.

    Raises: ConversionError for a tensor of ours that the layout has no place for.
    """
    pieces = {}
    for name, shape in own_tensors(config).items():
        found = next(filter(None, (_match(rule, name, config) for rule in rules)), None)
        if found is None:
            raise ConversionError(
                f"{name} has no place in this layout of tensors; a layout that has one is required; use another format."
            )
        pieces[name] = list(_cut(name, shape, *found, config))
    return pieces


def _match(rule: TensorRule, name: str, config: ModelConfig) -> tuple[TensorRule, Mapping[str, str]] | None:
    match = _pattern(rule.ours).fullmatch(name)
    if match is None:
        return None
    parts = match.groupdict()
    if rule.layers != "all" and config.layers[int(parts["layer"])].is_moe != (rule.layers == "moe"):
        return None
    return rule, parts


@cache
def _pattern(template: str) -> re.Pattern[str]:
    text = re.escape(template).replace(r"\{layer\}", r"(?P<layer>\d+)").replace(r"\{rest\}", r"(?P<rest>.+)")
    return re.compile(text)


def _cut(
    name: str, shape: tuple[int, ...], rule: TensorRule, parts: Mapping[str, str], config: ModelConfig
) -> Iterator[Piece]:
    count = len(rule.theirs)
    is_each = rule.is_stacked or "{expert}" in rule.theirs[0]
    if rule.parts is None:
        inner = shape[1:] if is_each else shape
        each_rows = [inner[:1]] if count == 1 else [(inner[0] // count,)] * count
    else:
        sizes = rule.parts(config)
        shape = (shape[0] // sum(sizes), *shape)
        inner, each_rows = shape[1:], [(size,) for size in sizes]
    order = None if rule.rows is None else rule.rows(config)
    is_transposed = rule.is_transposed if isinstance(rule.is_transposed, tuple) else (rule.is_transposed,) * count
    start = 0
    for expert in range(shape[0]) if is_each else [None]:
        for template, rows, is_turned in zip(rule.theirs, each_rows, is_transposed, strict=True):
            theirs = template.format(expert=expert, **parts)
            part = (*rows, *inner[1:])
            index = expert if rule.is_stacked else None
            whole = (1, *part) if rule.is_row else part[::-1] if is_turned else part
            yield Piece(name, start, theirs, index, whole, order, is_turned, rule.half)
            start += prod(part)


def foreign_tensors(pieces: Mapping[str, list[Piece]]) -> dict[str, list[Piece]]:
    """Return the pieces by foreign tensor, in the order of its rows."""
    foreign: dict[str, list[Piece]] = {}
    for each in pieces.values():
        for piece in each:
            foreign.setdefault(piece.theirs, []).append(piece)
    return {name: sorted(each, key=lambda piece: piece.index or piece.half or 0) for name, each in foreign.items()}


def foreign_shape(pieces: list[Piece]) -> tuple[int, ...]:
    """Return the shape of the foreign tensor that these are all the pieces of."""
    first = pieces[0]
    if first.half is not None:
        return (2 * first.shape[0], *first.shape[1:])
    return first.shape if first.index is None else (len(pieces), *first.shape)


def check_sources(
    foreign: Mapping[str, list[Piece]], source: Mapping[str, TensorLayout], where: str, *, left_out: frozenset[str]
) -> None:
    """Raise ConversionError unless every tensor of the source is used exactly once, and has the shape that is due."""
    missing = sorted(foreign.keys() - source.keys())
    extra = sorted(source.keys() - foreign.keys() - left_out)
    shapes = [
        f"{name} is {list(source[name].shape)}, {list(foreign_shape(pieces))} is required"
        for name, pieces in foreign.items()
        if name in source and source[name].shape != foreign_shape(pieces)
    ]
    dtypes = [
        f"{name} is {str(source[name].dtype).removeprefix('torch.')}"
        for name in foreign
        if name in source and not source[name].dtype.is_floating_point
    ]
    if missing or extra or shapes or dtypes:
        parts = [
            f"{title} {len(names)}: {', '.join(names[:4])}{', ...' if len(names) > 4 else ''}"
            for title, names in (
                ("missing", missing),
                ("not used by any part", extra),
                ("of another shape", shapes),
                ("no floating-point numbers", dtypes),
            )
            if names
        ]
        raise ConversionError(
            f"the tensors of {where} are not those of the model that its config describes: {'; '.join(parts)}; every "
            f"tensor has to be used exactly once; complete the files, or mend the config."
        )
