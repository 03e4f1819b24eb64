"""Blocked attention equals a plain masked softmax in double and PyTorch's own, values and every gradient."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moesaic.kernels import attention
from moesaic.kernels.attention import cached_attention, causal_attention, document_mask

LENGTHS = (1, 2, 127, 128, 129, 300)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def inputs(
    length: int, heads: int, kv_heads: int, dim: int, dtype: torch.dtype = torch.float32, batch: int = 2
) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = (
        normal(batch, length, count, dim, seed=seed).to(dtype).requires_grad_()
        for seed, count in enumerate((heads, kv_heads, kv_heads))
    )
    return query, key, value


def documents_of(length: int, batch: int = 2) -> Tensor:
    """Documents of different lengths in each row, one number used twice: equal numbers see each other."""
    starts = torch.rand(batch, length, generator=torch.Generator().manual_seed(3)) < 0.05
    documents = starts.long().cumsum(1)
    documents[-1] = documents[-1].clamp_max(2) % 2
    return documents


def plain_attention(query: Tensor, key: Tensor, value: Tensor, documents: Tensor | None = None) -> Tensor:
    """The definition, one query head at a time."""
    length, heads = query.shape[1:3]
    group = heads // key.shape[2]
    hidden_ones = torch.ones(length, length, dtype=torch.bool).triu(1)[None]
    if documents is not None:
        hidden_ones = hidden_ones | (documents[:, :, None] != documents[:, None, :])
    outputs = []
    for head in range(heads):
        scores = query[:, :, head] @ key[:, :, head // group].transpose(1, 2) / query.shape[-1] ** 0.5
        outputs.append(scores.masked_fill(hidden_ones, float("-inf")).softmax(-1) @ value[:, :, head // group])
    return torch.stack(outputs, 2)


def relative_error(got: Tensor, wanted: Tensor) -> float:
    return ((got.double() - wanted.double()).norm() / wanted.double().norm().clamp_min(1e-30)).item()


def compare(query: Tensor, key: Tensor, value: Tensor, documents: Tensor | None) -> None:
    leaves = (query, key, value)
    out = causal_attention(query, key, value, documents=documents)
    assert out.shape == query.shape and out.dtype == query.dtype
    wanted = plain_attention(query.double(), key.double(), value.double(), documents)
    grad = normal(*out.shape, seed=9).to(out.dtype)
    got = torch.autograd.grad(out, leaves, grad)
    expected = torch.autograd.grad(wanted, leaves, grad.double())
    # bf16: scores up to 5 and probabilities are rounded to 2^-9, and so are the products of the backward pass.
    tolerance = 1e-5 if query.dtype == torch.float32 else 1.5e-2
    assert relative_error(out, wanted) < tolerance
    for name, mine, theirs in zip(("query", "key", "value"), got, expected, strict=True):
        # With one key there is no choice: the gradients of query and key are zero, up to rounding.
        assert relative_error(mine, theirs) < tolerance or (mine - theirs).abs().max() < tolerance * 1e-1, name


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 4, 8), (4, 2, 64), (3, 1, 8)])
@pytest.mark.parametrize("has_documents", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_the_plain_masked_softmax(
    length: int, heads: int, kv_heads: int, dim: int, has_documents: bool, dtype: torch.dtype
) -> None:
    compare(*inputs(length, heads, kv_heads, dim, dtype), documents_of(length) if has_documents else None)


@pytest.mark.parametrize("has_documents", [False, True])
@pytest.mark.parametrize("elements", [1, 3 * 2 * 128 * 129])
def test_any_number_of_rows_a_step(has_documents: bool, elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_SCORE_ELEMENTS", elements)
    compare(*inputs(129, 4, 2, 8, batch=4), documents_of(129, batch=4) if has_documents else None)


@pytest.mark.parametrize("has_documents", [False, True])
def test_equals_pytorch(has_documents: bool) -> None:
    query, key, value = inputs(129, 4, 2, 8)
    documents = documents_of(129) if has_documents else None
    out = causal_attention(query, key, value, documents=documents)
    wanted = F.scaled_dot_product_attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        attn_mask=None if documents is None else document_mask(documents),
        is_causal=documents is None,
        enable_gqa=True,
    ).transpose(1, 2)
    torch.testing.assert_close(out, wanted)
    grad = normal(*out.shape, seed=9)
    got = torch.autograd.grad(out, (query, key, value), grad)
    for mine, theirs in zip(got, torch.autograd.grad(wanted, (query, key, value), grad), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_views_give_the_same_bits_as_copies() -> None:
    """One fused projection's output, cut into query, key and value, and a gradient that is a view."""
    fused = normal(2, 8, 131, 8, seed=0).requires_grad_()
    parts = fused.transpose(1, 2).split([4, 2, 2], dim=2)
    grad = normal(2, 4, 131, 8, seed=1).transpose(1, 2)
    out = causal_attention(*parts)
    (got,) = torch.autograd.grad(out, fused, grad)
    copies = [part.detach().contiguous().requires_grad_() for part in parts]
    wanted = causal_attention(*copies)
    assert torch.equal(out, wanted)
    grads = torch.autograd.grad(wanted, copies, grad.contiguous())
    assert torch.equal(got.transpose(1, 2), torch.cat(grads, 2))


def test_the_first_position_sees_itself_alone() -> None:
    query, key, value = inputs(300, 4, 2, 8)
    out = causal_attention(query, key, value)
    torch.testing.assert_close(out[:, 0], value[:, 0].repeat_interleave(2, 1))


def test_a_document_is_as_if_alone() -> None:
    query, key, value = inputs(160, 4, 2, 8)
    documents = torch.tensor([0] * 37 + [1] * 123).expand(2, -1)
    out = causal_attention(query, key, value, documents=documents)
    alone = causal_attention(query[:, 37:], key[:, 37:], value[:, 37:])
    torch.testing.assert_close(out[:, 37:], alone)


def test_large_scores_do_not_overflow() -> None:
    query, key, value = (tensor.detach() * 100 for tensor in inputs(129, 2, 2, 64))
    out = causal_attention(query, key, value)
    # Scores near 10^5 are 10^-2 off in fp32, so a near tie may fall another way; nothing else may.
    assert relative_error(out, plain_attention(query.double(), key.double(), value.double())) < 1e-2


def test_dropout_takes_away_and_scales_up() -> None:
    query, key = torch.zeros(1, 64, 2, 8), torch.zeros(1, 64, 2, 8)
    value = torch.ones(1, 64, 2, 8)
    torch.manual_seed(0)
    out = causal_attention(query, key, value, dropout=0.5)
    assert out.std() > 0.01
    assert abs(out[:, 8:].mean().item() - 1.0) < 0.1  # of 56 * 2 rows with at least 9 keys each


@pytest.mark.parametrize("num_new", [1, 2, 5, 40])
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_cached_equals_the_end_of_uncached(num_new: int, kv_heads: int) -> None:
    query, key, value = (tensor.detach() for tensor in inputs(40, 4, kv_heads, 8))
    wanted = causal_attention(query, key, value)[:, 40 - num_new :]
    torch.testing.assert_close(cached_attention(query[:, 40 - num_new :], key, value), wanted)
