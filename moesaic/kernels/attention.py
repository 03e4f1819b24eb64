"""Causal attention for training and for passes without a cache.

For bf16 on the CPU the training one is a C++ kernel (source/attention_training.h) behind two torch operators; it saves
its arguments, its result and two numbers per query and head. Anything else (other types and devices, dropout, odd head
dimensions, no kernels) is PyTorch's scaled_dot_product_attention, which is also the oracle of the tests.
"""

import ctypes
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from moesaic.kernels import products
from moesaic.kernels.addresses import address_of
from moesaic.kernels.select import cpu_library

_HEAD_DIM_MULTIPLE = 16
_BLOCK = 32  # positions that the kernels take together
_MAX_HEAD_DIM = 256


def causal_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    documents: Tensor | None = None,
    dropout: float = 0.0,
    scale: float | None = None,
    window: int | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Return the attention output (B, S, A, C); position s sees positions 0..s, of its own document only if given.

    scale: on the products of queries and keys, None for 1 / sqrt(D). window: position s sees the last `window` of them,
    None for all. sinks: scores that take part in each head's softmax and have no value.

    Shapes: query (B, S, A, D); key (B, S, KV, D) and value (B, S, KV, C) with A a multiple of KV, and C often D;
    documents (B, S) integers; sinks (A,).
    """
    assert query.shape[:2] == key.shape[:2] == value.shape[:2], (query.shape, key.shape, value.shape)
    assert key.shape[2] == value.shape[2] and query.shape[3] == key.shape[3], (query.shape, key.shape, value.shape)
    assert query.shape[2] % key.shape[2] == 0, (query.shape, key.shape)
    assert documents is None or documents.shape == query.shape[:2], (documents.shape, query.shape)
    assert scale is None or scale > 0, scale
    assert window is None or window > 0, window
    assert sinks is None or sinks.shape == query.shape[2:3], (sinks, query.shape)
    window = None if window is None or window >= query.shape[1] else window
    scale = query.shape[3] ** -0.5 if scale is None else scale
    value_dim = value.shape[3]
    if value_dim != key.shape[3]:
        # Kernels want one width; channels of zeros change no product and give zeros.
        width = -(-max(value_dim, key.shape[3]) // _HEAD_DIM_MULTIPLE) * _HEAD_DIM_MULTIPLE
        query, key, value = (F.pad(part, (0, width - part.shape[3])) for part in (query, key, value))
        return _attend(query, key, value, documents, dropout, scale, window, sinks)[..., :value_dim]
    return _attend(query, key, value, documents, dropout, scale, window, sinks)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    documents: Tensor | None,
    dropout: float,
    scale: float,
    window: int | None,
    sinks: Tensor | None,
) -> Tensor:
    if dropout == 0.0 and _has_kernel(query, key, value):
        return torch.ops.moesaic.causal_attention(query, key, value, documents, sinks, scale, window)[0]
    mask = None
    if documents is not None or window is not None or sinks is not None:
        mask = attention_mask(query.shape[1], query.device, documents=documents, window=window)
    is_widened = products.is_widened(query.device, query.dtype)
    if is_widened:
        query, key, value = query.float(), key.float(), value.float()
    if sinks is not None:
        assert mask is not None
        # One more key, of zeros, whose score is the mask's.
        key, value = (F.pad(part, (0, 0, 0, 0, 0, 1)) for part in (key, value))
        scores = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, float("-inf"))
        column = sinks.to(query.dtype)[:, None, None].expand(mask.shape[0], -1, mask.shape[2], 1)
        mask = torch.cat([scores.expand(-1, sinks.shape[0], -1, -1), column], -1)
    out = F.scaled_dot_product_attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=query.shape[2] != key.shape[2],
    )
    return out.transpose(1, 2).bfloat16() if is_widened else out.transpose(1, 2)


def attention_mask(
    length: int, device: torch.device, *, documents: Tensor | None = None, window: int | None = None
) -> Tensor:
    """Return the (B or 1, 1, S, S) boolean mask of what each position sees, as causal_attention says."""
    mask = torch.ones(1, length, length, dtype=torch.bool, device=device).tril_()
    if window is not None:
        mask = mask.triu_(1 - window)
    if documents is not None:
        mask = mask & (documents[:, :, None] == documents[:, None, :])
    return mask[:, None]


def _has_kernel(query: Tensor, key: Tensor, value: Tensor) -> bool:
    if any(tensor.device.type != "cpu" for tensor in (query, key, value)):
        return False
    head_dim = query.shape[3]
    if head_dim % _HEAD_DIM_MULTIPLE or head_dim > _MAX_HEAD_DIM or not query.numel():
        return False
    if any(products.autocast_dtype(tensor) != torch.bfloat16 for tensor in (query, key, value)):
        return False
    return cpu_library() is not None


def _operands(*tensors: Tensor) -> list[Tensor]:
    """What the kernel can read: any strides but the last."""
    assert all(tensor.dtype == torch.bfloat16 for tensor in tensors), [tensor.dtype for tensor in tensors]
    return [tensor if tensor.stride(3) == 1 else tensor.contiguous() for tensor in tensors]


def _integers(values: Sequence[int]) -> "ctypes.Array[ctypes.c_int64]":
    return (ctypes.c_int64 * len(values))(*values)


def _sizes(query: Tensor, key: Tensor, window: int | None) -> "ctypes.Array[ctypes.c_int64]":
    length = query.shape[1]
    return _integers([*query.shape[:3], key.shape[2], query.shape[3], length if window is None else window])


def _strides(operands: Sequence[Tensor]) -> "ctypes.Array[ctypes.c_int64]":
    return _integers([step for tensor in operands for step in tensor.stride()[:3]])


@torch.library.custom_op("moesaic::causal_attention", mutates_args=(), device_types="cpu")
def _causal_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    documents: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    window: int | None,
) -> tuple[Tensor, Tensor]:
    """Return the output (B, S, A, D) and, for the backward pass, (B, A, 2, S): a query's largest score, and log2 of the
    sum of its weights where that of the largest score is 1."""
    library = cpu_library()
    assert library is not None
    operands = _operands(query, key, value)
    numbers = None if documents is None else documents.to(torch.int64).contiguous()
    sinks = None if sinks is None else sinks.float().contiguous()
    batch, length, heads, _ = query.shape
    out = query.new_empty(query.shape)
    normalizers = query.new_empty(batch, heads, 2, length, dtype=torch.float32)
    library.function("moesaic_attention_forward", "pdpppppppp")(
        _sizes(query, key, window),
        scale,
        _strides(operands),
        *(tensor.data_ptr() for tensor in operands),
        address_of(numbers),
        address_of(sinks),
        out.data_ptr(),
        normalizers.data_ptr(),
    )
    return out, normalizers


@_causal_attention.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    documents: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    window: int | None,
) -> tuple[Tensor, Tensor]:
    batch, length, heads, _ = query.shape
    return query.new_empty(query.shape), query.new_empty(batch, heads, 2, length, dtype=torch.float32)


@torch.library.custom_op("moesaic::causal_attention_backward", mutates_args=(), device_types="cpu")
def _causal_attention_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    normalizers: Tensor,
    documents: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of query, key, value and sinks; without sinks the last is empty."""
    library = cpu_library()
    assert library is not None
    operands = _operands(query, key, value, out, grad)
    numbers = None if documents is None else documents.to(torch.int64).contiguous()
    normalizers = normalizers.contiguous()
    grads = [tensor.new_empty(tensor.shape) for tensor in (query, key, value)]
    batch, length, heads, _ = query.shape
    numbers_of_sinks = None if sinks is None else sinks.float().contiguous()
    parts = (batch, heads, -(-length // _BLOCK))
    sink_parts = None if sinks is None else torch.empty(parts, dtype=torch.float32, device="cpu")
    library.function("moesaic_attention_backward", "pdppppppppppppp")(
        _sizes(query, key, window),
        scale,
        _strides(operands),
        *(tensor.data_ptr() for tensor in operands),
        address_of(numbers),
        normalizers.data_ptr(),
        address_of(numbers_of_sinks),
        *(tensor.data_ptr() for tensor in grads),
        address_of(sink_parts),
    )
    if sinks is None or sink_parts is None:
        return grads[0], grads[1], grads[2], query.new_empty(0)
    return grads[0], grads[1], grads[2], sink_parts.sum((0, 2)).to(sinks.dtype)


@_causal_attention_backward.register_fake
def _(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    normalizers: Tensor,
    documents: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_sinks = query.new_empty(0) if sinks is None else sinks.new_empty(sinks.shape)
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape), grad_sinks


def _save_for_backward(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    query, key, value, documents, sinks, ctx.scale, ctx.window = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(query, key, value, *output, documents, sinks)


def _backward(ctx, grad, _):  # type: ignore[no-untyped-def]
    saved = ctx.saved_tensors
    *grads, grad_sinks = torch.ops.moesaic.causal_attention_backward(grad, *saved, ctx.scale, ctx.window)
    return *grads, None, None if saved[-1] is None else grad_sinks, None, None


_causal_attention.register_autograd(_backward, setup_context=_save_for_backward)
_causal_attention.register_autocast("cpu", torch.bfloat16)
