"""Weights packed once for inference, in bf16, 8 or 4 bits, and what is computed with them: linear layers, embeddings,
and a whole layer of experts in one call.

One copy of a weight serves one token and thousands. On the CPU it lies in panels (panels.py), on CUDA in rows, as it
was quantised.

What integer weights give is quantized.quantized_linear to the bit, for any number of rows and threads; bf16 weights are
multiplied by bf16 activations with fp32 sums, on the CPU in an order that depends on K alone. Where neither the C++ nor
the Triton kernels are in use the same functions work with PyTorch's operations. To torch.compile each is an operator
that calls it; else nothing stands between, since a dispatch takes longer than a small product.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from moesaic.kernels import select
from moesaic.kernels.activation import ACTIVATIONS, activate, is_gated
from moesaic.kernels.addresses import RemembersAddresses, address_of
from moesaic.kernels.huge_pages import empty_on_huge_pages
from moesaic.kernels.panels import (
    PANEL,
    PackedFormat,
    format_of,
    pack_matrix,
    panel_order,
    row_bytes,
    take_rows,
    unpack_bf16_stack,
    unpack_matrix,
)
from moesaic.kernels.quantized import QuantizedWeight, dequantize, quantized_linear

_FORMATS: tuple[PackedFormat, ...] = ("bf16", "int8", "int4", "mxfp4")


class _PackedStruct(ctypes.Structure):
    """`Packed` of cpu/source/packed.h."""

    _fields_ = (
        ("format", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("depth", ctypes.c_int64),
        ("group", ctypes.c_int64),
        ("data", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
    )


class _MlpStruct(ctypes.Structure):
    """`PackedMlp` of cpu/source/moe_inference.h."""

    _fields_ = (
        ("up", _PackedStruct),
        ("down", _PackedStruct),
        ("up_bias", ctypes.c_void_p),
        ("down_bias", ctypes.c_void_p),
        ("activation", ctypes.c_int64),
        ("intermediate", ctypes.c_int64),
    )


class _MoeStruct(ctypes.Structure):
    """`MoeCall` of cpu/source/moe_inference.h."""

    _fields_ = (
        ("experts", _MlpStruct),
        ("num_experts", ctypes.c_int64),
        ("residual", ctypes.c_void_p),
        ("residual_weights", ctypes.c_void_p),
        ("tokens", ctypes.c_int64),
        ("top_k", ctypes.c_int64),
        ("x", ctypes.c_void_p),
        ("x_is_bf16", ctypes.c_int64),
        ("expert_ids", ctypes.c_void_p),
        ("routing_weights", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("out_is_bf16", ctypes.c_int64),
        ("workspace", ctypes.c_void_p),
    )


@dataclass(frozen=True)
class PackedWeight(RemembersAddresses):
    """A matrix (N, K), or num_matrices of them, packed.

    is_gated: the rows are [gate, up] of a SwiGLU MLP. data: uint8, the panels of all matrices one after another, or on
    CUDA their rows. scales: of panels fp32 (matrices, N padded to panels), of integers alone; of rows those of a
    QuantizedWeight. steps: of rows alone, those of a QuantizedWeight.
    """

    format: PackedFormat
    out_size: int
    in_size: int
    num_matrices: int | None
    group_size: int | None
    is_gated: bool
    data: Tensor
    scales: Tensor | None
    steps: Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        """(N, K) or (E, N, K), as of the weight that was packed."""
        matrix = (self.out_size, self.in_size)
        return torch.Size(matrix if self.num_matrices is None else (self.num_matrices, *matrix))

    @property
    def num_panels(self) -> int:
        return -(-self.out_size // PANEL)  # gated too: 16 of each half, both padded alike

    @property
    def num_bytes(self) -> int:
        return sum(part.nbytes for part in (self.data, self.scales, self.steps) if part is not None)

    @property
    def lies_in_rows(self) -> bool:
        return self.data.device.type not in ("cpu", "meta")

    @cached_property
    def rows(self) -> Tensor | QuantizedWeight:
        """What lies in rows, (matrices, N, K) in bf16 or quantised; nothing is copied."""
        assert self.lies_in_rows, self.data.device
        shape = (self.num_matrices or 1, self.out_size)
        if self.scales is None:
            return self.data.view(torch.bfloat16).view(*shape, self.in_size)
        values = self.data.view(*shape, -1)
        if self.group_size is None:
            return QuantizedWeight(values.view(torch.int8), self.scales.view(shape), 8, None)
        if self.steps is None:
            return QuantizedWeight(values, self.scales.view(*shape, -1), 4, self.group_size)
        return QuantizedWeight(values, self.scales.view(shape), 4, self.group_size, self.steps.view(*shape, -1))

    def flatten(self) -> tuple[list[Tensor | None], list[int]]:
        """Return it as an operator of PyTorch takes it, which knows tensors and numbers; `unflatten` turns it back."""
        sizes = [
            _FORMATS.index(self.format), self.out_size, self.in_size, self.num_matrices or 0, self.group_size or 0,
            int(self.is_gated),
        ]  # fmt: skip
        return [self.data, self.scales, self.steps], sizes

    @classmethod
    def unflatten(cls, tensors: Sequence[Tensor | None], sizes: Sequence[int]) -> "PackedWeight":
        format, out_size, in_size, num_matrices, group_size, is_gated = sizes
        data, scales, steps = tensors
        assert data is not None
        return cls(
            _FORMATS[format], out_size, in_size, num_matrices or None, group_size or None, bool(is_gated), data, scales,
            steps,
        )  # fmt: skip

    @cached_property
    def struct(self) -> ctypes.Structure:
        """What C++ code takes; it holds addresses of this object's tensors."""
        columns = self.num_panels * PANEL if self.is_gated else self.out_size
        return _PackedStruct(
            _FORMATS.index(self.format),
            columns,
            self.in_size,
            self.group_size or 0,
            self.data.data_ptr(),
            address_of(self.scales),
        )


@dataclass(frozen=True)
class PackedMlp(RemembersAddresses):
    """One MLP, or a stack of E, with packed weights.

    Shapes: up (F, H), or (2F, H) if gated; down (H, F); up_bias fp32 (E, N padded), in the order of up's panels, or
    (E, N) of its rows; down_bias fp32 (E, H). `pack_mlp` makes them.
    """

    up: PackedWeight
    down: PackedWeight
    up_bias: Tensor | None
    down_bias: Tensor | None
    activation: str

    def __post_init__(self) -> None:
        assert self.activation in ACTIVATIONS, self.activation
        assert self.up.is_gated == is_gated(self.activation) and not self.down.is_gated, (
            self.activation,
            self.up.is_gated,
        )
        inner = self.up.out_size // 2 if self.up.is_gated else self.up.out_size
        assert inner == self.down.in_size, (self.up.shape, self.down.shape)
        assert self.up.in_size == self.down.out_size, (self.up.shape, self.down.shape)
        assert self.up.num_matrices == self.down.num_matrices, (self.up.shape, self.down.shape)

    @property
    def hidden_size(self) -> int:
        return self.up.in_size

    @property
    def intermediate_size(self) -> int:
        return self.down.in_size

    @property
    def num_bytes(self) -> int:
        biases = [bias.nbytes for bias in (self.up_bias, self.down_bias) if bias is not None]
        return self.up.num_bytes + self.down.num_bytes + sum(biases)

    def flatten(self) -> tuple[list[Tensor | None], list[int]]:
        """Return it as an operator of PyTorch takes it; `unflatten` turns it back."""
        (up, up_sizes), (down, down_sizes) = self.up.flatten(), self.down.flatten()
        sizes = [*up_sizes, *down_sizes, ACTIVATIONS.index(self.activation)]
        return [*up, *down, self.up_bias, self.down_bias], sizes

    @classmethod
    def unflatten(cls, tensors: Sequence[Tensor | None], sizes: Sequence[int]) -> "PackedMlp":
        *sizes, activation = sizes
        *weights, up_bias, down_bias = tensors
        up, down = (PackedWeight.unflatten(weights[3 * i : 3 * i + 3], sizes[6 * i : 6 * i + 6]) for i in (0, 1))
        return cls(up, down, up_bias, down_bias, ACTIVATIONS[activation])

    @cached_property
    def struct(self) -> ctypes.Structure:
        """What C++ code takes; it holds addresses of this object's tensors."""
        return _MlpStruct(
            self.up.struct,
            self.down.struct,
            address_of(self.up_bias),
            address_of(self.down_bias),
            ACTIVATIONS.index(self.activation),
            self.intermediate_size,
        )


def pack_weight(weight: Tensor | QuantizedWeight, *, interleave_gate: bool = False) -> PackedWeight:
    """Return weight (N, K) or (E, N, K) packed: a tensor in bf16, a quantised weight as it is.

    interleave_gate: the N rows are [gate, up] of a SwiGLU MLP and are reordered for it. On the meta device nothing is
    computed: the result is the packed form's sizes.
    """
    shape = weight.shape
    assert len(shape) in (2, 3), shape
    out_size, in_size = shape[-2:]
    assert not interleave_gate or out_size % 2 == 0, (shape, interleave_gate)
    format, group_size, device = format_of(weight)
    num_matrices = None if len(shape) == 2 else shape[0]
    if device.type not in ("cpu", "meta"):
        values, row_scales, steps = (
            (weight.detach().to(torch.bfloat16), None, None)
            if isinstance(weight, Tensor)
            else (weight.values, weight.scales.contiguous(), weight.steps)
        )
        data = values.contiguous().view(-1).view(torch.uint8)
        steps = None if steps is None else steps.contiguous()
        return PackedWeight(
            format, out_size, in_size, num_matrices, group_size, interleave_gate, data, row_scales, steps
        )
    order = panel_order(out_size, interleave_gate).to(device)
    matrix_bytes = len(order) * row_bytes(format, in_size, group_size)
    count = 1 if num_matrices is None else num_matrices
    data = empty_on_huge_pages(count * matrix_bytes, device)
    has_scales = format in ("int8", "int4")
    scales = torch.empty(count, len(order), dtype=torch.float32, device=device) if has_scales else None
    packed = PackedWeight(format, out_size, in_size, num_matrices, group_size, interleave_gate, data, scales)
    if device.type == "meta" or not data.numel():
        return packed
    if scales is not None:
        assert isinstance(weight, QuantizedWeight)
        for own, row_scales in zip(scales, weight.scales.reshape(count, out_size), strict=True):
            own.copy_(take_rows(row_scales, order, 0))
    library = select.cpu_library() if device.type == "cpu" else None
    if library is not None:
        _pack_natively(library, weight, packed)
    else:
        for index, out in enumerate(data.view(count, matrix_bytes)):
            pack_matrix(weight, None if num_matrices is None else index, order, out)
    return packed


def pack_mlp(
    up: Tensor | QuantizedWeight,
    down: Tensor | QuantizedWeight,
    *,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    activation: str,
) -> PackedMlp:
    """Return an MLP packed, or a stack of them.

    Shapes: up (F, H), or (2F, H) as [gate, up] if gated; down (H, F); biases (F or 2F) and (H); all with a leading E
    for a stack.
    """
    assert up_bias is None or up_bias.shape == up.shape[:-1], (up_bias.shape, up.shape)
    assert down_bias is None or down_bias.shape == down.shape[:-1], (down_bias.shape, down.shape)
    device = format_of(up)[2]
    if up_bias is not None:
        up_bias = up_bias.detach().float().reshape(-1, up.shape[-2]).to(device)
        if up_bias.device.type in ("cpu", "meta"):
            order = panel_order(up.shape[-2], is_gated(activation)).to(up_bias.device)
            up_bias = F.pad(up_bias, (0, 1)).index_select(1, order)  # for padding order says N
    if down_bias is not None:
        down_bias = down_bias.detach().float().reshape(-1, down.shape[-2]).to(device).contiguous()
    return PackedMlp(
        pack_weight(up, interleave_gate=is_gated(activation)), pack_weight(down), up_bias, down_bias, activation
    )


def unpack_weight(weight: PackedWeight, matrix: int = 0) -> Tensor | QuantizedWeight:
    """Return one matrix (N, K) as it was before packing: in bf16, or quantised."""
    if weight.lies_in_rows:
        rows = weight.rows
        if isinstance(rows, Tensor):
            return rows[matrix]
        return rows.map(lambda tensor: tensor[matrix])
    matrix_bytes = weight.data.numel() // (weight.num_matrices or 1)
    data = weight.data[matrix * matrix_bytes : (matrix + 1) * matrix_bytes]
    scales = None if weight.scales is None else weight.scales[matrix]
    shape = (weight.out_size, weight.in_size)
    return unpack_matrix(data, scales, weight.format, shape, weight.group_size, is_gated=weight.is_gated)


def unpack_stack(weight: PackedWeight) -> Tensor:
    """Return all matrices (E, N, K) of a stack in bf16 as they were before packing."""
    assert weight.format == "bf16" and weight.num_matrices is not None and not weight.is_gated, weight.shape
    if weight.lies_in_rows:
        assert isinstance(weight.rows, Tensor)
        return weight.rows
    return unpack_bf16_stack(weight.data, (weight.num_matrices, weight.out_size, weight.in_size))


def packed_linear(
    x: Tensor, weight: PackedWeight, bias: Tensor | None = None, *, out_dtype: torch.dtype | None = None
) -> Tensor:
    """Return (M, N): x (M, K) fp32 or bf16 times the weight transposed, plus bias (N,) in fp32; in x's dtype if None.

    A bf16 weight multiplies x rounded to bf16, an integer one x rotated and quantised by token, MXFP4 x quantised by
    32 columns: to 8 bits, by the kernels for AMX to 9.
    """
    out_dtype = out_dtype or x.dtype
    _check_no_gradient(x, bias)
    assert x.dim() == 2 and x.shape[1] == weight.in_size, (x.shape, weight.shape)
    assert weight.num_matrices is None and not weight.is_gated, (weight.shape, weight.is_gated)
    assert bias is None or bias.shape == (weight.out_size,), (bias.shape, weight.shape)
    _check_dtypes(x.dtype, out_dtype)
    if is_dynamo_compiling():
        return torch.ops.moesaic.packed_linear(x, *weight.flatten(), bias, out_dtype)
    _check_device(x, weight)
    if select.uses_triton(x.device):
        return _linear_on_cuda(x, weight, bias, out_dtype)
    # A product over no columns has no panel for the kernels to read.
    library = select.cpu_library() if x.device.type == "cpu" and weight.in_size else None
    if library is None:
        return _linear(x, weight, 0, bias).to(out_dtype)
    x = x.contiguous()
    bias = None if bias is None else bias.float().contiguous()
    out = torch.empty(x.shape[0], weight.out_size, dtype=out_dtype, device="cpu")
    if out.numel():
        library.function("moesaic_packed_linear", "pipippi")(
            ctypes.addressof(weight.struct),
            x.shape[0],
            x.data_ptr(),
            x.dtype == torch.bfloat16,
            address_of(bias),
            out.data_ptr(),
            out_dtype == torch.bfloat16,
        )
    return out


@torch.library.custom_op("moesaic::packed_linear", mutates_args=())
def _linear_operator(
    x: Tensor, tensors: Sequence[Tensor | None], sizes: Sequence[int], bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    return packed_linear(x, PackedWeight.unflatten(tensors, sizes), bias, out_dtype=out_dtype)


@_linear_operator.register_fake
def _(x, tensors, sizes, bias, out_dtype):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape[0], PackedWeight.unflatten(tensors, sizes).out_size, dtype=out_dtype)


def _linear_on_cuda(x: Tensor, weight: PackedWeight, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    rows = weight.rows
    if not isinstance(rows, Tensor):
        from moesaic.kernels.triton import products

        return products.linear(x, rows, bias, out_dtype=out_dtype)
    x = x.to(torch.bfloat16)
    if bias is None and out_dtype is torch.bfloat16:
        return F.linear(x, rows[0])
    y = torch.mm(x, rows[0].t(), out_dtype=torch.float32)
    return (y if bias is None else y.add_(bias.float())).to(out_dtype)


def packed_heads(x: Tensor, weight: PackedWeight) -> Tensor:
    """Return (T, A, N) in x's dtype: every row of x (T, A, K) times the transposed matrix of its head.

    weight: (A, N, K) in bf16; x is rounded to bf16, sums are fp32.
    """
    tokens, num_heads, in_size = x.shape
    _check_no_gradient(x)
    assert weight.shape == (num_heads, weight.out_size, in_size), (x.shape, weight.shape)
    assert weight.format == "bf16" and not weight.is_gated, (weight.format, weight.is_gated)
    _check_dtypes(x.dtype)
    if is_dynamo_compiling():
        return torch.ops.moesaic.packed_heads(x, *weight.flatten())
    _check_device(x, weight)
    library = select.cpu_library() if x.device.type == "cpu" else None
    if weight.lies_in_rows:
        heads = x.to(torch.bfloat16).transpose(0, 1)
        return torch.bmm(heads, unpack_stack(weight).transpose(1, 2)).transpose(0, 1).to(x.dtype)
    if library is None:
        rows = x.to(torch.bfloat16).float().transpose(0, 1)
        return torch.bmm(rows, unpack_stack(weight).float().transpose(1, 2)).transpose(0, 1).to(x.dtype)
    rows = x.to(torch.bfloat16)
    rows = rows if rows.stride(2) == 1 else rows.contiguous()
    out = torch.empty(tokens, num_heads, weight.out_size, dtype=torch.bfloat16, device="cpu")
    library.function("moesaic_packed_heads", "piipiip")(
        ctypes.addressof(weight.struct), num_heads, tokens, rows.data_ptr(), rows.stride(0), rows.stride(1),
        out.data_ptr(),
    )  # fmt: skip
    return out.to(x.dtype)


@torch.library.custom_op("moesaic::packed_heads", mutates_args=())
def _heads_operator(x: Tensor, tensors: Sequence[Tensor | None], sizes: Sequence[int]) -> Tensor:
    return packed_heads(x, PackedWeight.unflatten(tensors, sizes)).contiguous()


@_heads_operator.register_fake
def _(x, tensors, sizes):  # type: ignore[no-untyped-def]
    return x.new_empty(*x.shape[:2], PackedWeight.unflatten(tensors, sizes).out_size)


def packed_rows(weight: PackedWeight, ids: Tensor) -> Tensor:
    """Return the rows (T, K) in bf16 of a weight (N, K) that ids (T,) int64 name: an embedding that shares lm_head."""
    assert weight.num_matrices is None and not weight.is_gated, (weight.shape, weight.is_gated)
    assert ids.dim() == 1 and ids.dtype == torch.int64, (ids.shape, ids.dtype)
    if is_dynamo_compiling():
        return torch.ops.moesaic.packed_rows(*weight.flatten(), ids)
    _check_device(ids, weight)
    if weight.lies_in_rows:
        return _rows_on_cuda(weight, ids)
    library = select.cpu_library() if ids.device.type == "cpu" else None
    if library is None:
        assert bool(((ids >= 0) & (ids < weight.out_size)).all()), _not_rows(ids, weight)
        return _dense(weight, 0).to(torch.bfloat16)[ids]
    ids = ids.contiguous()
    out = torch.empty(len(ids), weight.in_size, dtype=torch.bfloat16, device="cpu")
    failed = library.function("moesaic_packed_rows", "pipp")(
        ctypes.addressof(weight.struct), len(ids), ids.data_ptr(), out.data_ptr()
    )
    assert not failed, _not_rows(ids, weight)
    return out


@torch.library.custom_op("moesaic::packed_rows", mutates_args=())
def _rows_operator(tensors: Sequence[Tensor | None], sizes: Sequence[int], ids: Tensor) -> Tensor:
    return packed_rows(PackedWeight.unflatten(tensors, sizes), ids)


@_rows_operator.register_fake
def _(tensors, sizes, ids):  # type: ignore[no-untyped-def]
    return ids.new_empty(len(ids), PackedWeight.unflatten(tensors, sizes).in_size, dtype=torch.bfloat16)


def _rows_on_cuda(weight: PackedWeight, ids: Tensor) -> Tensor:
    rows = weight.rows
    if isinstance(rows, Tensor):
        return F.embedding(ids, rows[0])
    return dequantize(rows.map(lambda tensor: tensor[0].index_select(0, ids))).to(torch.bfloat16)


def _not_rows(ids: Tensor, weight: PackedWeight) -> str:
    return f"ids ({int(ids.min())} to {int(ids.max())}) must be rows of a matrix with {weight.out_size}"


def packed_mlp(x: Tensor, mlp: PackedMlp) -> Tensor:
    """Return the MLP (T, H) of x (T, H), in x's dtype."""
    assert mlp.up.num_matrices is None, mlp.up.shape
    none = torch.empty(x.shape[0], 0, dtype=torch.int64, device=x.device)
    return _moe(x, none, none.float(), mlp, mlp, None)


def packed_moe(
    x: Tensor,
    expert_ids: Tensor,
    routing_weights: Tensor,
    experts: PackedMlp,
    *,
    residual: PackedMlp | None = None,
    residual_weights: Tensor | None = None,
) -> Tensor:
    """Return (T, H), in x's dtype: the sum over each token's routes of routing_weight * expert(x), experts in rising
    order, plus residual_weight * residual(x), summed in fp32.

    Shapes: x (T, H) fp32 or bf16; expert_ids (T, K) int64, negative for no route; routing_weights (T, K) fp32;
    residual_weights (T,) fp32, None for 1. Pre-activations and activations are fp32, hidden rows are rounded to bf16.
    """
    assert experts.up.num_matrices is not None, experts.up.shape
    return _moe(x, expert_ids, routing_weights, experts, residual, residual_weights)


def _moe(
    x: Tensor,
    expert_ids: Tensor,
    routing_weights: Tensor,
    experts: PackedMlp,
    residual: PackedMlp | None,
    residual_weights: Tensor | None,
) -> Tensor:
    """experts: a single MLP where there are none."""
    tokens, top_k = expert_ids.shape
    num_experts = experts.up.num_matrices or 0
    _check_no_gradient(x, routing_weights, residual_weights)
    assert x.shape == (tokens, experts.hidden_size), (x.shape, expert_ids.shape, experts.hidden_size)
    assert expert_ids.dtype == torch.int64, expert_ids.dtype
    assert routing_weights.shape == expert_ids.shape, (routing_weights.shape, expert_ids.shape)
    assert routing_weights.dtype == torch.float32, routing_weights.dtype
    if residual is not None:
        assert residual.up.num_matrices is None, residual.up.shape
        assert residual.hidden_size == experts.hidden_size, (residual.hidden_size, experts.hidden_size)
    if residual_weights is not None:
        assert residual is not None, "residual_weights without a residual"
        assert residual_weights.shape == (tokens,), (residual_weights.shape, tokens)
        assert residual_weights.dtype == torch.float32, residual_weights.dtype
    _check_dtypes(x.dtype, x.dtype)
    if is_dynamo_compiling():
        no_residual: tuple[list[Tensor | None], list[int]] = ([], [])
        of_residual = no_residual if residual is None else residual.flatten()
        return torch.ops.moesaic.packed_moe(
            x, expert_ids, routing_weights, *experts.flatten(), *of_residual, residual_weights
        )
    _check_device(x, experts.up, experts.down, *(() if residual is None else (residual.up, residual.down)))
    if select.uses_triton(x.device):
        return _moe_on_cuda(x, expert_ids, routing_weights, experts, num_experts, residual, residual_weights)
    library = select.cpu_library() if x.device.type == "cpu" else None
    if library is None:
        return _moe_by_expert(x, expert_ids, routing_weights, experts, num_experts, residual, residual_weights)
    x, expert_ids, routing_weights = x.contiguous(), expert_ids.contiguous(), routing_weights.contiguous()
    residual_weights = None if residual_weights is None else residual_weights.contiguous()
    out = torch.empty_like(x)
    if not out.numel():
        return out
    is_bf16 = x.dtype == torch.bfloat16
    call = _MoeStruct(
        experts.struct,
        num_experts,
        None if residual is None else ctypes.addressof(residual.struct),
        address_of(residual_weights),
        tokens,
        top_k,
        x.data_ptr(),
        is_bf16,
        expert_ids.data_ptr(),
        routing_weights.data_ptr(),
        out.data_ptr(),
        is_bf16,
        None,
    )
    failed = library.function("moesaic_packed_moe", "p")(ctypes.addressof(call))
    assert not failed, _not_experts(expert_ids, num_experts)
    return out


@torch.library.custom_op("moesaic::packed_moe", mutates_args=())
def _moe_operator(
    x: Tensor,
    expert_ids: Tensor,
    routing_weights: Tensor,
    experts: Sequence[Tensor | None],
    expert_sizes: Sequence[int],
    residual: Sequence[Tensor | None],
    residual_sizes: Sequence[int],
    residual_weights: Tensor | None,
) -> Tensor:
    of_residual = PackedMlp.unflatten(residual, residual_sizes) if residual else None
    of_experts = PackedMlp.unflatten(experts, expert_sizes)
    return _moe(x, expert_ids, routing_weights, of_experts, of_residual, residual_weights)


@_moe_operator.register_fake
def _(x, *others):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape)


def _not_experts(expert_ids: Tensor, num_experts: int) -> str:
    return f"expert_ids (up to {int(expert_ids.max())}) must be below num_experts ({num_experts})"


def _moe_on_cuda(
    x: Tensor,
    expert_ids: Tensor,
    routing_weights: Tensor,
    experts: PackedMlp,
    num_experts: int,
    residual: PackedMlp | None,
    residual_weights: Tensor | None,
) -> Tensor:
    from moesaic.kernels.triton import products

    def parts(mlp: PackedMlp) -> products.Mlp:
        return products.Mlp(mlp.up.rows, mlp.down.rows, mlp.up_bias, mlp.down_bias, mlp.activation)

    return products.moe(
        x, expert_ids, routing_weights, parts(experts) if num_experts else None,
        residual=None if residual is None else parts(residual), residual_weights=residual_weights,
    )  # fmt: skip


def _moe_by_expert(
    x: Tensor,
    expert_ids: Tensor,
    routing_weights: Tensor,
    experts: PackedMlp,
    num_experts: int,
    residual: PackedMlp | None,
    residual_weights: Tensor | None,
) -> Tensor:
    """The same with PyTorch's operations, expert by expert: the definition."""
    assert bool((expert_ids < num_experts).all()), _not_experts(expert_ids, num_experts)
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for expert in range(num_experts):
        tokens, choices = (expert_ids == expert).nonzero(as_tuple=True)
        if len(tokens):
            y = _mlp(x[tokens], experts, expert)
            out.index_add_(0, tokens, routing_weights[tokens, choices, None] * y)
    if residual is not None:
        y = _mlp(x, residual, 0)
        out += y if residual_weights is None else residual_weights[:, None] * y
    return out.to(x.dtype)


def _mlp(x: Tensor, mlp: PackedMlp, expert: int) -> Tensor:
    """Return expert's MLP (T, H) of x (T, H) in fp32."""
    up_bias = None
    if mlp.up_bias is not None and mlp.up.lies_in_rows:
        up_bias = mlp.up_bias[expert]
    elif mlp.up_bias is not None:
        order = panel_order(mlp.up.out_size, mlp.up.is_gated)
        kept = order < mlp.up.out_size
        up_bias = torch.empty(mlp.up.out_size, dtype=torch.float32, device=x.device)
        up_bias[order[kept]] = mlp.up_bias[expert, kept]
    hidden = activate(_linear(x, mlp.up, expert, up_bias), mlp.activation).to(torch.bfloat16)
    return _linear(hidden, mlp.down, expert, None if mlp.down_bias is None else mlp.down_bias[expert])


def _linear(x: Tensor, weight: PackedWeight, matrix: int, bias: Tensor | None) -> Tensor:
    dense = unpack_weight(weight, matrix)
    if isinstance(dense, QuantizedWeight):
        y = quantized_linear(x, dense)
    else:
        y = F.linear(x.to(torch.bfloat16).float(), dense.float())
    return y if bias is None else y + bias.float()


def _dense(weight: PackedWeight, matrix: int) -> Tensor:
    unpacked = unpack_weight(weight, matrix)
    return dequantize(unpacked) if isinstance(unpacked, QuantizedWeight) else unpacked


def _check_no_gradient(*inputs: Tensor | None) -> None:
    wants = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in inputs)
    assert not wants, (
        "packed weights are for inference, they have no gradient, and one is asked for; call the model under "
        "torch.inference_mode() or torch.no_grad(), or load it with pack=False"
    )


def _check_device(x: Tensor, *weights: PackedWeight) -> None:
    """Before the kernels are given addresses: of weights on the meta device there are none."""
    devices = {weight.data.device for weight in weights}
    assert devices == {x.device}, f"input on {x.device} and packed weights on {', '.join(sorted(map(str, devices)))}"


def _check_dtypes(*dtypes: torch.dtype) -> None:
    assert all(dtype in (torch.float32, torch.bfloat16) for dtype in dtypes), dtypes


def _pack_natively(library: select.Library, weight: Tensor | QuantizedWeight, packed: PackedWeight) -> None:
    """Fill packed.data."""
    of_groups = None
    if isinstance(weight, Tensor):
        numbers = weight.detach()
        numbers = (numbers if numbers.dtype == torch.float32 else numbers.to(torch.bfloat16)).contiguous()
    else:
        numbers = weight.values.contiguous()
        of_groups = None if weight.of_groups is None else weight.of_groups.contiguous()
    library.function("moesaic_pack_weight", "piipipi")(
        ctypes.addressof(packed.struct), packed.num_matrices or 1, packed.out_size, numbers.data_ptr(),
        numbers.dtype == torch.float32, address_of(of_groups), packed.is_gated,
    )  # fmt: skip
