"""What a layer does beside products and attention, one kernel each: norms, the choice of experts, and new heads.

Computed in fp32 and rounded once to what comes out.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moesaic.kernels.triton.activations import bytes_of
from moesaic.kernels.triton.launch import on_device_of, power_of_two

_LOWEST: tl.constexpr = tl.constexpr(-3.0e38)


@triton.jit
def _norm_kernel(
    x_ptr, weight_ptr, bias_ptr, out_ptr, stride, columns, epsilon, IS_LAYER_NORM: tl.constexpr, BLOCK: tl.constexpr
):
    """A row each."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    mask = at < columns
    x = tl.load(x_ptr + row * stride + at, mask=mask, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + at, mask=mask, other=0.0)
    if IS_LAYER_NORM:
        x = tl.where(mask, x - tl.sum(x, 0) / columns, 0.0)
    y = x * tl.rsqrt(tl.sum(x * x, 0) / columns + epsilon) * weight
    if IS_LAYER_NORM:
        y += tl.load(bias_ptr + at, mask=mask, other=0.0)
    tl.store(out_ptr + row * columns + at, y.to(out_ptr.dtype.element_ty), mask=mask)


def norm(x: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float) -> Tensor:
    """Return RMSNorm of x (..., H), or with a bias LayerNorm, in x's dtype; weight and bias (H,) are fp32."""
    columns = x.shape[-1]
    rows = x.reshape(-1, columns)
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    block = power_of_two(columns)
    if rows.shape[0]:
        with on_device_of(x):
            _norm_kernel[(rows.shape[0],)](
                rows, weight, bias, out, rows.stride(0), columns, epsilon, bias is not None, block,
                num_warps=max(1, min(16, block // 512)), enable_fp_fusion=True,
            )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["num_experts", "top_k"])
def _choose_kernel(
    logits_ptr,
    bias_ptr,
    correction_ptr,
    factor_ptr,
    ids_ptr,
    weights_ptr,
    num_experts,
    top_k,
    factor,
    IS_SIGMOID: tl.constexpr,
    RENORMALIZES: tl.constexpr,
    EXPERTS: tl.constexpr,
    ROUTES: tl.constexpr,
):
    """A token each: its top_k experts, the lower of equal ones first, and their weights."""
    token = tl.program_id(0).to(tl.int64)
    expert, choice = tl.arange(0, EXPERTS), tl.arange(0, ROUTES)
    mask = expert < num_experts
    logits = tl.load(logits_ptr + token * num_experts + expert, mask=mask, other=float("-inf"))
    if bias_ptr is not None:
        logits += tl.load(bias_ptr + expert, mask=mask, other=0.0)
    if IS_SIGMOID:
        scores = tl.sigmoid(logits)
    else:
        scores = tl.exp(logits - tl.max(logits, 0))
        scores = scores / tl.sum(scores, 0)
    ranking = scores
    if correction_ptr is not None:
        ranking += tl.load(correction_ptr + expert, mask=mask, other=0.0)
    # Of a NaN every comparison is false, and what pads the experts would be chosen.
    ranking = tl.where(ranking == ranking, ranking, _LOWEST)
    ranking = tl.where(mask, ranking, float("-inf"))
    ids, weights = tl.full((ROUTES,), -1, tl.int32), tl.zeros((ROUTES,), tl.float32)
    for turn in range(top_k):
        best = tl.argmax(ranking, 0)
        score = tl.sum(tl.where(expert == best, scores, 0.0), 0)
        ids = tl.where(choice == turn, best, ids)
        weights = tl.where(choice == turn, score, weights)
        ranking = tl.where(expert == best, float("-inf"), ranking)
    if RENORMALIZES:
        weights = weights / tl.maximum(tl.sum(weights, 0), 1e-20)
    if factor_ptr is not None:
        factor = factor * tl.load(factor_ptr)
    at = token * top_k + choice
    tl.store(ids_ptr + at, ids.to(tl.int64), mask=choice < top_k)
    tl.store(weights_ptr + at, weights * factor, mask=choice < top_k)


def choose(
    logits: Tensor,
    bias: Tensor | None,
    correction_bias: Tensor | None,
    *,
    top_k: int,
    scoring: str,
    renormalize: bool,
    scale: float,
    output_scale: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return expert_ids (T, K) int64 and routing_weights (T, K) fp32 of router logits (T, E) fp32."""
    tokens, num_experts = logits.shape
    ids = torch.empty(tokens, top_k, dtype=torch.int64, device=logits.device)
    weights = torch.empty(tokens, top_k, dtype=torch.float32, device=logits.device)
    if tokens:
        with on_device_of(logits):
            _choose_kernel[(tokens,)](
                logits, bias, correction_bias, output_scale, ids, weights, num_experts, top_k, scale,
                scoring == "sigmoid", renormalize, power_of_two(num_experts), power_of_two(top_k),
                num_warps=1 if num_experts <= 128 else 4, enable_fp_fusion=True,
            )  # fmt: skip
    return ids, weights


@triton.jit
def _rotate_kernel(
    x_ptr, cosines_ptr, sines_ptr, out_ptr, token_stride, head_stride, length, heads, half, BLOCK: tl.constexpr
):
    """A head of a token each; BLOCK: a power of two from half on."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    pair = tl.arange(0, BLOCK)
    mask = pair < half
    x_at = x_ptr + row * token_stride + head * head_stride + pair
    first = tl.load(x_at, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(x_at + half, mask=mask, other=0.0).to(tl.float32)
    table = (row % length) * half + pair
    cosine, sine = tl.load(cosines_ptr + table, mask=mask, other=0.0), tl.load(sines_ptr + table, mask=mask, other=0.0)
    out_at = out_ptr + (row * heads + head) * (2 * half) + pair
    tl.store(out_at, (first * cosine - second * sine).to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(out_at + half, (second * cosine + first * sine).to(out_ptr.dtype.element_ty), mask=mask)


def rotate(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Return x (B, S, A, D) turned by tables (S, D/2) fp32, in x's dtype."""
    batch, length, heads, dim = x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.stride(3) != 1 or (batch > 1 and x.stride(0) != length * x.stride(1)):
        x = x.contiguous()
    if out.numel():
        with on_device_of(x):
            _rotate_kernel[(batch * length, heads)](
                x, cosines.contiguous(), sines.contiguous(), out, x.stride(1), x.stride(2), length, heads, dim // 2,
                power_of_two(dim // 2), num_warps=1, enable_fp_fusion=True,
            )  # fmt: skip
    return out


@triton.jit
def _place_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    query_norm_ptr,
    key_norm_ptr,
    cosines_ptr,
    sines_ptr,
    slots_ptr,
    out_ptr,
    keys_ptr,
    values_ptr,
    key_scales_ptr,
    value_scales_ptr,
    query_stride,
    key_stride,
    value_stride,
    heads,
    kv_heads,
    dim,
    epsilon,
    IS_ROTATED: tl.constexpr,
    NORMS_ROTATED: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    DIM: tl.constexpr,
):
    """A head of a token each, queries first, then keys, then values."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    channel = tl.arange(0, DIM)
    is_channel = channel < dim
    slot = tl.load(slots_ptr + token).to(tl.int64)
    if head >= heads + kv_heads:
        own = head - heads - kv_heads
        value = tl.load(value_ptr + token * value_stride + own * dim + channel, mask=is_channel, other=0.0)
        there = slot * kv_heads + own
        if HAS_SCALES:
            numbers, scale = bytes_of(value.to(tl.float32)[None, :], 1)
            tl.store(values_ptr + there * dim + channel, tl.reshape(numbers, (DIM,)).to(tl.int8), mask=is_channel)
            tl.store(value_scales_ptr + there + tl.arange(0, 1), scale)
        else:
            tl.store(values_ptr + there * dim + channel, value.to(values_ptr.dtype.element_ty), mask=is_channel)
    else:
        is_key = head >= heads
        own = tl.where(is_key, head - heads, head)
        x_ptr = query_ptr + token * query_stride + own * dim
        if is_key:
            x_ptr = key_ptr + token * key_stride + own * dim
        weight = tl.full((DIM,), 1.0, tl.float32)
        other_weight = weight
        half = dim // 2
        partner = tl.where(channel < half, channel + half, channel - half)
        if query_norm_ptr is not None:
            if is_key:
                weight = tl.load(key_norm_ptr + channel, mask=is_channel, other=0.0)
                other_weight = tl.load(key_norm_ptr + partner, mask=is_channel, other=0.0)
            else:
                weight = tl.load(query_norm_ptr + channel, mask=is_channel, other=0.0)
                other_weight = tl.load(query_norm_ptr + partner, mask=is_channel, other=0.0)
        x = tl.load(x_ptr + channel, mask=is_channel, other=0.0).to(tl.float32)
        if query_norm_ptr is not None and not NORMS_ROTATED:
            inverse = tl.rsqrt(tl.sum(x * x, 0) / dim + epsilon)
            x = x * inverse * weight
        if IS_ROTATED:
            other = tl.load(x_ptr + partner, mask=is_channel, other=0.0).to(tl.float32)
            if query_norm_ptr is not None and not NORMS_ROTATED:
                other = other * inverse * other_weight
            pair = token * half + tl.where(channel < half, channel, channel - half)
            cosine = tl.load(cosines_ptr + pair, mask=is_channel, other=1.0)
            sine = tl.load(sines_ptr + pair, mask=is_channel, other=0.0)
            x = x * cosine + other * tl.where(channel < half, -sine, sine)
        if query_norm_ptr is not None and NORMS_ROTATED:
            x = x * tl.rsqrt(tl.sum(x * x, 0) / dim + epsilon) * weight
        if is_key:
            there = slot * kv_heads + own
            if HAS_SCALES:
                numbers, scale = bytes_of(x[None, :], 1)
                tl.store(keys_ptr + there * dim + channel, tl.reshape(numbers, (DIM,)).to(tl.int8), mask=is_channel)
                tl.store(key_scales_ptr + there + tl.arange(0, 1), scale)
            else:
                tl.store(keys_ptr + there * dim + channel, x.to(keys_ptr.dtype.element_ty), mask=is_channel)
        else:
            out_at = out_ptr + (token * heads + own) * dim + channel
            tl.store(out_at, x.to(out_ptr.dtype.element_ty), mask=is_channel)


def place_heads(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    slots: Tensor,
    keys: Tensor,
    values: Tensor,
    scales: tuple[Tensor, Tensor] | None,
    *,
    rotary: tuple[Tensor, Tensor] | None,
    norms: tuple[Tensor, Tensor] | None,
    epsilon: float,
    norms_rotated: bool,
) -> Tensor:
    """Norm and turn the heads of new tokens, put keys and values into their slots (T,), and return queries (T, A, D).

    Shapes: query (T, A, D), key and value (T, KV, D), heads side by side; rotary (T, D/2) each, fp32, of the tokens'
    positions; norms (D,) fp32 of queries and keys.
    """
    tokens, heads, dim = query.shape
    kv_heads = key.shape[1]
    out = torch.empty(tokens, heads, dim, dtype=query.dtype, device=query.device)
    cosines, sines = rotary or (None, None)
    query_norm, key_norm = norms or (None, None)
    key_scales, value_scales = scales or (None, None)
    if tokens:
        with on_device_of(query):
            _place_kernel[(tokens, heads + 2 * kv_heads)](
                query, key, value, query_norm, key_norm, cosines, sines, slots, out, keys, values, key_scales,
                value_scales, query.stride(0), key.stride(0), value.stride(0), heads, kv_heads, dim, epsilon,
                rotary is not None, norms_rotated, scales is not None, power_of_two(dim),
                num_warps=1, enable_fp_fusion=True,
            )  # fmt: skip
    return out
