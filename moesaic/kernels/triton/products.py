"""Products with packed weights, and a whole layer of experts.

Weights lie as they were quantised: rows (N, K) of one matrix after the other. Routes are sorted by expert, and a
program takes up to a tile's rows of one expert times a tile's columns: it finds its expert in the runs' ends, so that
nothing is copied to the processor. Integer products are exact and what follows them is quantized.quantized_linear's
order of roundings; bf16 products are summed in fp32. 4-bit integers become bytes, value * step, on the way, and from
there on are 8-bit ones; MXFP4 is added up group by group, each of which has scales.
"""

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from moesaic.kernels.activation import OAI_LIMIT, OAI_SLOPE, is_gated
from moesaic.kernels.panels import PackedFormat, format_of
from moesaic.kernels.quantized import QuantizedWeight
from moesaic.kernels.triton.activations import quantize_activations, quantize_activations_by_group
from moesaic.kernels.triton.launch import multiprocessors, on_device_of, power_of_two, stages

_OAI_LIMIT: tl.constexpr = tl.constexpr(OAI_LIMIT)
_OAI_SLOPE: tl.constexpr = tl.constexpr(OAI_SLOPE)
_BF16: tl.constexpr = tl.constexpr("bf16")
_INT4: tl.constexpr = tl.constexpr("int4")
_MXFP4: tl.constexpr = tl.constexpr("mxfp4")
_SQRT_HALF: tl.constexpr = tl.constexpr(0.5**0.5)
_GELU_SLOPE: tl.constexpr = tl.constexpr(2 * (2 / torch.pi) ** 0.5)
# Columns of a tile of routes that are combined at once.
_COMBINED = 1024


@triton.jit
def _doubled_mxfp4(nibbles):
    """Twice the number that 4 bits of MXFP4 stand for, -12 to 12."""
    low = nibbles & 7
    magnitude = tl.where(low < 4, low, (2 + (low & 1)) << ((low >> 1) - 1).to(tl.uint8))
    return tl.where(nibbles < 8, magnitude.to(tl.int8), -magnitude.to(tl.int8))


@triton.jit
def _weights(
    ptr, steps, rows, mask, columns, start,
    FORMAT: tl.constexpr, IS_EVEN: tl.constexpr, GROUP: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """DEPTH columns from start of rows (R,) as they are multiplied, (R, DEPTH); steps (R, DEPTH // GROUP): of int4."""
    if FORMAT == _INT4:
        w = _int4_bytes(ptr, steps, rows, mask, columns, start, IS_EVEN, GROUP, DEPTH)
    else:
        k = tl.arange(0, DEPTH)
        mask = mask[:, None]
        if not IS_EVEN:
            mask = mask & (k < columns - start)[None, :]
        w = tl.load(ptr + rows[:, None] * columns + (start + k)[None, :], mask=mask, other=0)
    return w


@triton.jit
def _int4_bytes(
    ptr, steps, rows, mask, columns, start, IS_EVEN: tl.constexpr, GROUP: tl.constexpr, DEPTH: tl.constexpr
):
    """value * step (R, DEPTH) int8, of every eight columns the even ones first; steps (R, DEPTH // GROUP) int8.

    Four values of a word are multiplied at once. Each product plus 128 is 8 to 248, so that in the sum nothing is
    carried from one byte into the next, and the other highest bit makes it the product. That takes even columns of a
    word together, and odd ones.
    """
    WORDS: tl.constexpr = GROUP // 8
    at = tl.arange(0, DEPTH // GROUP)[:, None] * WORDS + tl.arange(0, WORDS)[None, :]
    mask = mask[:, None, None]
    if not IS_EVEN:
        mask = mask & (at < (columns - start) // 8)[None, :, :]
    # A row begins at a multiple of 16 bytes, which the compiler sees in a factor of 4.
    first = rows * (columns // 32 * 4) + start // 8
    words = tl.load(ptr.to(tl.pointer_type(tl.uint32)) + first[:, None, None] + at[None, :, :], mask=mask, other=0)
    steps = steps.to(tl.int32).to(tl.uint32)[:, :, None]
    even = ((words & 0x0F0F0F0F) - 0x08080808) * steps
    odd = ((words >> 4 & 0x0F0F0F0F) - 0x08080808) * steps
    w = (tl.join(even, odd) + 0x80808080) ^ 0x80808080
    w = tl.join(tl.join(w, w >> 16).to(tl.int8), tl.join(w >> 8, w >> 24).to(tl.int8))
    return tl.reshape(w, (rows.shape[0], DEPTH))


@triton.jit
def _steps(ptr, rows, mask, columns, start, GROUP: tl.constexpr, DEPTH: tl.constexpr):
    """Those of int4 for DEPTH columns from start, (R, DEPTH // GROUP) int8; behind the last ones 0."""
    group, groups = start // GROUP + tl.arange(0, DEPTH // GROUP), columns // GROUP
    mask = mask[:, None] & (group < groups)[None, :]
    return tl.load(ptr + rows[:, None] * groups + group[None, :], mask=mask, other=0)


@triton.jit
def _mxfp4_scales(ptr, rows, mask, groups, group):
    """Of one group of each row; behind the last one comes the first."""
    return tl.load(ptr + rows * groups + group % groups, mask=mask, other=0)


@triton.jit
def _add_mxfp4_group(total, x, x_scale, w_ptr, w_rows, w_mask, w_scale, columns, start, GROUP: tl.constexpr):
    """Add the product of one group's columns to total (M, N); x (M, GROUP) int8, x_scale (M,) the group's."""
    at = start // 2 + tl.arange(0, GROUP // 2)
    both = tl.load(w_ptr + w_rows[:, None] * (columns // 2) + at[None, :], mask=w_mask[:, None], other=0)
    w = tl.reshape(tl.join(_doubled_mxfp4(both & 15), _doubled_mxfp4(both >> 4)), (w_rows.shape[0], GROUP))
    dot = tl.dot(x, tl.trans(w), out_dtype=tl.int32).to(tl.float32)
    # A power of two is its exponent's bits, but for the smallest, 2**-127, which has none.
    power = tl.maximum(w_scale.to(tl.int32) << 23, 1 << 22).to(tl.float32, bitcast=True)
    return tl.fma(dot * (x_scale * 0.5)[:, None], tl.broadcast_to(power[None, :], dot.shape), total)


@triton.jit
def _activated(gate, up, ACTIVATION: tl.constexpr):
    """up: of gated activations alone."""
    if ACTIVATION == "swiglu":
        return gate * tl.sigmoid(gate) * up
    if ACTIVATION == "swiglu_oai":
        # Comparisons that a NaN fails, so that it stays.
        gate = tl.where(gate > _OAI_LIMIT, _OAI_LIMIT, gate)
        up = tl.where(up > _OAI_LIMIT, _OAI_LIMIT, tl.where(up < -_OAI_LIMIT, -_OAI_LIMIT, up))
        return gate * tl.sigmoid(gate * _OAI_SLOPE) * (up + 1.0)
    if ACTIVATION == "gelu_tanh":
        # tanh(z) = 2 sigmoid(2 z) - 1
        return gate * tl.sigmoid((gate + 0.044715 * gate * gate * gate) * _GELU_SLOPE)
    return 0.5 * gate * (1.0 + tl.erf(gate * _SQRT_HALF))


@triton.jit(do_not_specialize=["num_rows", "num_experts", "routes_per_row"])
def _product_kernel(
    x_ptr,
    x_scales_ptr,
    w_ptr,
    w_scales_ptr,
    steps_ptr,
    bias_ptr,
    routes_ptr,
    starts_ptr,
    out_ptr,
    num_rows,
    columns,
    out_columns,
    num_experts,
    routes_per_row,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    ACTIVATION: tl.constexpr,
    IS_GATED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    IS_ROUTED: tl.constexpr,
    EXPERTS: tl.constexpr,
    IS_EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Write out (rows, out_columns): of each row of x (rows, columns) its product with its expert's matrix.

    Matrices are (out_columns, columns), or gated [gate, up] of twice the rows. IS_ROUTED: row r of the output is route
    r, whose x is row r // routes_per_row; routes (R,) are sorted by expert, starts (num_experts + 1,) say where each
    one's begin. EXPERTS: a power of two from num_experts on. IS_EVEN: columns is a multiple of BLOCK_K. For
    int4, x has of every eight columns the even ones first.
    """
    tiles_n = tl.cdiv(out_columns, BLOCK_N)
    tile_m, tile_n = tl.program_id(0) // tiles_n, tl.program_id(0) % tiles_n
    if IS_ROUTED:
        experts = tl.arange(0, EXPERTS)
        begins = tl.load(starts_ptr + experts, mask=experts < num_experts, other=0)
        ends = tl.load(starts_ptr + experts + 1, mask=experts < num_experts, other=0)
        tiles = (ends - begins + BLOCK_M - 1) // BLOCK_M
        behind = tl.cumsum(tiles, 0)
        expert = tl.sum((behind <= tile_m).to(tl.int32), 0)
        if expert >= num_experts:
            return
        is_own = experts == expert
        first = tl.sum(tl.where(is_own, begins + (tile_m - behind + tiles) * BLOCK_M, 0), 0)
        last = tl.sum(tl.where(is_own, ends, 0), 0)
        sorted_rows = first + tl.arange(0, BLOCK_M)
        m_mask = sorted_rows < last
        rows = tl.load(routes_ptr + sorted_rows, mask=m_mask, other=0).to(tl.int64)
        x_rows = rows // routes_per_row
        matrix = expert.to(tl.int64)
    else:
        rows = (tile_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
        m_mask = rows < num_rows
        x_rows = rows
        matrix = tl.full((), 0, tl.int64)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    n_mask = n < out_columns
    first_row = matrix * out_columns * (2 if IS_GATED else 1)
    w_rows = first_row + n  # of a gated matrix its gate, whose up lies out_columns further
    k = tl.arange(0, BLOCK_K)
    x_at = x_ptr + x_rows[:, None] * columns + k[None, :]
    other_rows = w_rows + out_columns
    if FORMAT != _MXFP4:
        kind: tl.constexpr = tl.float32 if FORMAT == _BF16 else tl.int32
        total = tl.zeros((BLOCK_M, BLOCK_N), kind)
        other_total = total  # of up, where the matrix is [gate, up]
        steps, other_steps = None, None
        if FORMAT == _INT4:
            steps = _steps(steps_ptr, w_rows, n_mask, columns, 0, GROUP, BLOCK_K)
            if IS_GATED:
                other_steps = _steps(steps_ptr, other_rows, n_mask, columns, 0, GROUP, BLOCK_K)
        for start in range(0, columns, BLOCK_K):
            own_steps, own_other_steps = steps, other_steps
            if FORMAT == _INT4:
                # They are small, and read a block ahead: nothing else would hide how long they take.
                steps = _steps(steps_ptr, w_rows, n_mask, columns, start + BLOCK_K, GROUP, BLOCK_K)
                if IS_GATED:
                    other_steps = _steps(steps_ptr, other_rows, n_mask, columns, start + BLOCK_K, GROUP, BLOCK_K)
            x_mask = m_mask[:, None]
            if not IS_EVEN:
                x_mask = x_mask & (k < columns - start)[None, :]
            x = tl.load(x_at + start, mask=x_mask, other=0)
            w = _weights(w_ptr, own_steps, w_rows, n_mask, columns, start, FORMAT, IS_EVEN, GROUP, BLOCK_K)
            total = tl.dot(x, tl.trans(w), total, out_dtype=kind)
            if IS_GATED:
                w = _weights(
                    w_ptr, own_other_steps, other_rows, n_mask, columns, start, FORMAT, IS_EVEN, GROUP, BLOCK_K
                )
                other_total = tl.dot(x, tl.trans(w), other_total, out_dtype=kind)
        if FORMAT != _BF16:
            x_scales = tl.load(x_scales_ptr + x_rows, mask=m_mask, other=0.0)
            w_scales = tl.load(w_scales_ptr + w_rows, mask=n_mask, other=0.0)
            total = total.to(tl.float32) * x_scales[:, None] * w_scales[None, :]
            if IS_GATED:
                w_scales = tl.load(w_scales_ptr + other_rows, mask=n_mask, other=0.0)
                other_total = other_total.to(tl.float32) * x_scales[:, None] * w_scales[None, :]
    else:
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        other_total = total
        groups = columns // GROUP
        x_scales = _mxfp4_scales(x_scales_ptr, x_rows, m_mask, groups, 0)
        scales = _mxfp4_scales(w_scales_ptr, w_rows, n_mask, groups, 0)
        other_scales = scales
        if IS_GATED:
            other_scales = _mxfp4_scales(w_scales_ptr, other_rows, n_mask, groups, 0)
        # A step is a group, since each has a scale: BLOCK_K is GROUP, which divides columns.
        for group in range(groups):
            # Scales are small, and read a step ahead: nothing else would hide how long they take.
            next_scales = _mxfp4_scales(w_scales_ptr, w_rows, n_mask, groups, group + 1)
            x = tl.load(x_at + group * GROUP, mask=m_mask[:, None], other=0)
            total = _add_mxfp4_group(total, x, x_scales, w_ptr, w_rows, n_mask, scales, columns, group * GROUP, GROUP)
            scales = next_scales
            if IS_GATED:
                next_scales = _mxfp4_scales(w_scales_ptr, other_rows, n_mask, groups, group + 1)
                other_total = _add_mxfp4_group(
                    other_total, x, x_scales, w_ptr, other_rows, n_mask, other_scales, columns, group * GROUP, GROUP
                )
                other_scales = next_scales
            x_scales = _mxfp4_scales(x_scales_ptr, x_rows, m_mask, groups, group + 1)
    if HAS_BIAS:
        total += tl.load(bias_ptr + w_rows, mask=n_mask, other=0.0)[None, :]
        if IS_GATED:
            other_total += tl.load(bias_ptr + other_rows, mask=n_mask, other=0.0)[None, :]
    if ACTIVATION is not None:
        total = _activated(total, other_total, ACTIVATION)
    out_at = out_ptr + rows[:, None] * out_columns + n[None, :]
    tl.store(out_at, total.to(out_ptr.dtype.element_ty), mask=m_mask[:, None] & n_mask[None, :])


@triton.jit(do_not_specialize=["num_experts", "top_k"])
def _combine_kernel(
    y_ptr,
    ids_ptr,
    weights_ptr,
    residual_ptr,
    residual_weights_ptr,
    out_ptr,
    columns,
    num_experts,
    top_k,
    ROUTES: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_RESIDUAL_WEIGHTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A token's sum over its routes, experts in rising order, and its residual's. ROUTES: a power of two from K on."""
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = at < columns
    choice = tl.arange(0, ROUTES)
    ids = tl.load(ids_ptr + token * top_k + choice, mask=choice < top_k, other=-1)
    is_kept = (ids >= 0) & (ids < num_experts)
    # A route's place among the token's: experts before it, and of one expert, named twice, earlier choices.
    other_ids, other_choice = ids[None, :], choice[None, :]
    precedes = (other_ids < ids[:, None]) | ((other_ids == ids[:, None]) & (other_choice < choice[:, None]))
    place = tl.sum((precedes & is_kept[None, :]).to(tl.int32), 1)
    weights = tl.load(weights_ptr + token * top_k + choice, mask=choice < top_k, other=0.0)
    total = tl.zeros((BLOCK,), tl.float32)
    for turn in range(tl.sum(is_kept.to(tl.int32), 0)):
        is_own = is_kept & (place == turn)
        route = token * top_k + tl.sum(tl.where(is_own, choice, 0), 0)
        weight = tl.sum(tl.where(is_own, weights, 0.0), 0)
        total += weight * tl.load(y_ptr + route * columns + at, mask=mask, other=0.0)
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + token * columns + at, mask=mask, other=0.0)
        if HAS_RESIDUAL_WEIGHTS:
            residual = residual * tl.load(residual_weights_ptr + token)
        total += residual
    tl.store(out_ptr + token * columns + at, total.to(out_ptr.dtype.element_ty), mask=mask)


@dataclass(frozen=True)
class Mlp:
    """E MLPs. up: (E, F, H), or (E, 2F, H) as [gate, up]; down (E, H, F); biases (E, F or 2F) and (E, H) fp32."""

    up: Tensor | QuantizedWeight
    down: Tensor | QuantizedWeight
    up_bias: Tensor | None
    down_bias: Tensor | None
    activation: str


@dataclass(frozen=True)
class Routes:
    """routes (R,): the routes of T tokens of K each, token by token, in order of their experts; starts (E + 1,): where
    each expert's begin and the last one's end. Those of no expert stand before or behind them."""

    routes: Tensor
    starts: Tensor

    @classmethod
    def of(cls, expert_ids: Tensor, num_experts: int) -> "Routes":
        ordered, routes = torch.sort(expert_ids.flatten(), stable=True)
        numbers = _numbers(num_experts + 1, expert_ids.device)
        return cls(routes, torch.searchsorted(ordered, numbers, out_int32=True))

    @property
    def num_experts(self) -> int:
        return self.starts.shape[0] - 1


@functools.cache
def _numbers(count: int, device: torch.device) -> Tensor:
    return torch.arange(count, device=device)


def linear(x: Tensor, weight: Tensor | QuantizedWeight, bias: Tensor | None, *, out_dtype: torch.dtype) -> Tensor:
    """Return (M, N): x (M, K) fp32 or bf16 times weight (1, N, K) transposed, plus bias (N,)."""
    return _product(x, weight, None if bias is None else bias.float(), out_dtype=out_dtype)


def moe(
    x: Tensor,
    expert_ids: Tensor,
    routing_weights: Tensor,
    experts: Mlp | None,
    *,
    residual: Mlp | None,
    residual_weights: Tensor | None,
) -> Tensor:
    """Return (T, H), in x's dtype: packed.packed_moe; without experts the residual alone."""
    tokens, top_k = expert_ids.shape
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if not x.numel():
        return out
    routed, num_experts = x, 0
    if experts is not None and top_k:
        num_experts = experts.up.shape[0]
        routed = _mlp(x, experts, Routes.of(expert_ids, num_experts), top_k)
    beside = None if residual is None else _mlp(x, residual, None, 1)
    columns = x.shape[1]
    block = min(_COMBINED, power_of_two(columns))
    with on_device_of(x):
        _combine_kernel[(tokens, triton.cdiv(columns, block))](
            routed, expert_ids.contiguous(), routing_weights.contiguous(), beside,
            None if residual_weights is None else residual_weights.contiguous(), out, columns, num_experts, top_k,
            power_of_two(top_k), beside is not None, residual_weights is not None, block,
            num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return out


def _mlp(x: Tensor, mlp: Mlp, routes: Routes | None, top_k: int) -> Tensor:
    """Return fp32 (T * K, H) of x (T, H): every route's MLP; without routes (T, H)."""
    hidden = _product(
        x, mlp.up, mlp.up_bias, routes=routes, routes_per_row=top_k, activation=mlp.activation, out_dtype=torch.bfloat16
    )
    return _product(hidden, mlp.down, mlp.down_bias, routes=routes, out_dtype=torch.float32)


def _product(
    x: Tensor,
    weight: Tensor | QuantizedWeight,
    bias: Tensor | None,
    *,
    out_dtype: torch.dtype,
    routes: Routes | None = None,
    routes_per_row: int = 1,
    activation: str | None = None,
) -> Tensor:
    _, out_columns, columns = weight.shape
    format, group_size, _ = format_of(weight)
    gated = activation is not None and is_gated(activation)
    out_columns = out_columns // 2 if gated else out_columns
    num_rows, num_experts = x.shape[0] * routes_per_row, 1 if routes is None else routes.num_experts
    out = torch.empty(num_rows, out_columns, dtype=out_dtype, device=x.device)
    if not out.numel():
        return out
    if isinstance(weight, Tensor):
        numbers, scales, steps, x_scales = weight, None, None, None
        values = x.to(torch.bfloat16).contiguous()
    else:
        numbers, scales, steps = weight.values, weight.scales, weight.steps
        values, x_scales = (
            quantize_activations_by_group(x)
            if weight.is_mxfp4
            else quantize_activations(x, even_first=weight.bits == 4)
        )
    tiling = _Tiling.of(
        format, group_size, num_rows, num_experts, out_columns, columns, gated=gated, is_routed=routes is not None,
        device=x.device,
    )  # fmt: skip
    with on_device_of(x):
        _product_kernel[(tiling.count,)](
            values, x_scales, numbers, scales, steps, bias,
            None if routes is None else routes.routes, None if routes is None else routes.starts, out,
            num_rows, columns, out_columns, num_experts, routes_per_row,
            format, group_size or 0, activation, gated, bias is not None, routes is not None,
            power_of_two(num_experts), columns % tiling.depth == 0, tiling.rows, tiling.columns, tiling.depth,
            num_warps=tiling.warps, num_stages=tiling.stages, enable_fp_fusion=False,
        )  # fmt: skip
    return out


@dataclass(frozen=True)
class _Tiling:
    """How a product is cut: count programs, each of rows by columns, in steps of depth."""

    rows: int
    columns: int
    depth: int
    count: int
    warps: int
    stages: int

    @classmethod
    def of(
        cls,
        format: PackedFormat,
        group_size: int | None,
        num_rows: int,
        num_experts: int,
        out_columns: int,
        columns: int,
        *,
        gated: bool,
        is_routed: bool,
        device: torch.device,
    ) -> "_Tiling":
        each = num_rows / num_experts
        rows = 16 if each <= 16 else 32 if each <= 32 else 64 if each <= 96 else 128
        # Its groups are added up in fp32 beside a product of their own: larger tiles have no registers left for it.
        is_mxfp4 = format == "mxfp4"
        if is_mxfp4:
            rows = min(rows, 64)
        widest = 64 if rows == 16 or (is_mxfp4 and gated) else 128
        tiles = -(-num_rows // rows)
        if is_routed:  # every expert's last tile may be a part of one
            tiles = num_rows // rows + min(num_experts, num_rows)
        # Narrower where the wide ones would leave multiprocessors without work.
        width = min(widest, max(16, power_of_two(out_columns)))
        while width > 16 and tiles * -(-out_columns // width) < multiprocessors(device):
            width //= 2
        size, halves = (2 if format == "bf16" else 1), (2 if gated else 1)
        if group_size is not None and is_mxfp4:
            depth = group_size
        else:  # group sizes of int4 divide it, since they are smaller powers of two, and divide columns
            depth = min((256 if rows == 16 else 128) // size, max(32, power_of_two(columns)))
        row_bytes = depth * size if group_size is None else depth // 2
        warps = 8 if rows * width * halves >= (64 if is_mxfp4 else 128) * 128 else 4
        tile_bytes = rows * depth * size + width * halves * row_bytes
        return cls(rows, width, depth, tiles * -(-out_columns // width), warps, stages(tile_bytes, device))
