"""Causal attention for training and prefill: blocks of queries against the keys they may see, with batched products.

On the CPU PyTorch's flash attention spends most of its time outside its matrix products (0.14 TFLOP/s forward and
backward at sequence 512 where batched products reach 0.8); going through blocks of queries with bmm, and recomputing
the probabilities in the backward pass, is 1.8 to 2.4 times as fast and keeps no more. Elsewhere, with dropout, and for
a query that continues a cache, it is PyTorch's scaled_dot_product_attention, which is also the oracle of the tests.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

_QUERY_BLOCK = 128
# Scores of one step of the loop, in elements: 2 MiB in bf16 stays in the second-level caches of two cores.
_SCORE_ELEMENTS = 1 << 20


def causal_attention(
    query: Tensor, key: Tensor, value: Tensor, *, documents: Tensor | None = None, dropout: float = 0.0
) -> Tensor:
    """Return the attention output (B, S, A, D); position s sees positions 0..s, of its own document only if given.

    Shapes: query (B, S, A, D); key, value (B, S, KV, D) with A a multiple of KV; documents (B, S) integers.
    """
    assert query.shape[:2] == key.shape[:2] == value.shape[:2], (query.shape, key.shape, value.shape)
    if query.device.type == "cpu" and dropout == 0.0 and query.shape[1] > 1:
        return _BlockedAttention.apply(query, key, value, documents)
    mask = None if documents is None else document_mask(documents)
    out = F.scaled_dot_product_attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=mask is None,
        enable_gqa=query.shape[2] != key.shape[2],
    )
    return out.transpose(1, 2)


def cached_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Return (B, S, A, D) for the last S positions of a sequence whose keys and values (B, L, KV, D) are all there."""
    num_queries, num_keys = query.shape[1], key.shape[1]
    mask = None
    if num_queries > 1:
        mask = torch.ones(num_queries, num_keys, dtype=torch.bool, device=query.device).tril_(num_keys - num_queries)
    out = F.scaled_dot_product_attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        attn_mask=mask,
        enable_gqa=query.shape[2] != key.shape[2],
    )
    return out.transpose(1, 2)


def document_mask(documents: Tensor) -> Tensor:
    """Return the (B, 1, S, S) boolean mask that is causal and keeps attention inside documents."""
    length = documents.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=documents.device).tril_()
    return ((documents[:, :, None] == documents[:, None, :]) & causal)[:, None]


def _grouped(x: Tensor, num_groups: int) -> Tensor:
    """(B, S, A, D) -> (B*KV, G, S, D), G = A / KV query heads of each key/value head."""
    batch, length, heads, dim = x.shape
    return x.permute(0, 2, 1, 3).reshape(batch * num_groups, heads // num_groups, length, dim)


def _ungrouped(x: Tensor, batch: int) -> Tensor:
    """The inverse of _grouped."""
    rows, group, length, dim = x.shape
    return x.view(batch, rows // batch * group, length, dim).permute(0, 2, 1, 3)


def _block_mask(documents: Tensor | None, rows: slice, start: int, end: int, like: Tensor) -> Tensor:
    """Additive mask: (1, 1, b, b) for the diagonal block, or (rows, 1, b, end) with documents; b = end - start."""
    size = end - start
    blocked = torch.ones(size, size, dtype=torch.bool, device=like.device).triu_(1)
    if documents is None:
        return like.new_zeros(size, size).masked_fill_(blocked, float("-inf"))[None, None]
    part = documents[rows]
    mask = part[:, start:end, None] != part[:, None, :end]
    mask[:, :, start:] |= blocked
    return like.new_zeros(mask.shape).masked_fill_(mask, float("-inf"))[:, None]


class _BlockedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, documents):  # type: ignore[no-untyped-def]
        batch, _, _, dim = query.shape
        groups = key.shape[2]
        scaled = _grouped(query, groups) * dim**-0.5  # (B*KV, G, S, D)
        keys, values = _grouped(key, groups)[:, 0], _grouped(value, groups)[:, 0]  # (B*KV, S, D)
        row_documents = None if documents is None else documents.repeat_interleave(groups, 0)
        out = torch.empty_like(scaled)
        for rows, start, end in _blocks(scaled):
            block = scaled[rows, :, start:end]
            probabilities = _probabilities(block, keys[rows, :end], row_documents, rows, start, end)
            out[rows, :, start:end] = torch.bmm(probabilities, values[rows, :end]).view_as(block)
        ctx.save_for_backward(scaled, keys, values, row_documents)
        ctx.batch = batch
        return _ungrouped(out, batch)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        scaled, keys, values, row_documents = ctx.saved_tensors
        grads = _grouped(grad, keys.shape[0] // ctx.batch)
        grad_query = torch.empty_like(scaled)
        # fp32: a key's gradient is summed over all blocks of queries.
        grad_key = torch.zeros_like(keys, dtype=torch.float32)
        grad_value = torch.zeros_like(values, dtype=torch.float32)
        for rows, start, end in _blocks(scaled):
            block = scaled[rows, :, start:end]
            flat = block.flatten(1, 2)
            grad_block = grads[rows, :, start:end].flatten(1, 2)
            keys_seen = keys[rows, :end]
            probabilities = _probabilities(block, keys_seen, row_documents, rows, start, end)
            grad_value[rows, :end] += torch.bmm(probabilities.transpose(1, 2), grad_block)
            grad_probabilities = torch.bmm(grad_block, values[rows, :end].transpose(1, 2))
            grad_scores = torch._softmax_backward_data(grad_probabilities, probabilities, -1, probabilities.dtype)
            grad_query[rows, :, start:end] = torch.bmm(grad_scores, keys_seen).view_as(block)
            grad_key[rows, :end] += torch.bmm(grad_scores.transpose(1, 2), flat)
        grad_query *= scaled.shape[-1] ** -0.5
        return (
            _ungrouped(grad_query, ctx.batch),
            _ungrouped(grad_key.to(keys.dtype)[:, None], ctx.batch),
            _ungrouped(grad_value.to(values.dtype)[:, None], ctx.batch),
            None,
        )


def _blocks(scaled: Tensor) -> list[tuple[slice, int, int]]:
    """Steps of the loop: which of the B*KV rows, and which queries."""
    num_rows, group, length, _ = scaled.shape
    steps = []
    rows_per_step = max(1, _SCORE_ELEMENTS // (group * min(_QUERY_BLOCK, length) * length))
    for first in range(0, num_rows, rows_per_step):
        rows = slice(first, min(first + rows_per_step, num_rows))
        steps += [(rows, start, min(start + _QUERY_BLOCK, length)) for start in range(0, length, _QUERY_BLOCK)]
    return steps


def _probabilities(block: Tensor, keys: Tensor, documents: Tensor | None, rows: slice, start: int, end: int) -> Tensor:
    """(rows, G, b, D), (rows, end, D) -> (rows, G*b, end)."""
    scores = torch.bmm(block.flatten(1, 2), keys.transpose(1, 2))
    mask = _block_mask(documents, rows, start, end, scores)
    view = scores.view(*block.shape[:3], keys.shape[1])
    if documents is None:
        view[..., start:] += mask
    else:
        view += mask
    return torch.softmax(scores, -1)
