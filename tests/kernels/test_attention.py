"""Causal attention equals PyTorch's in fp32, values and every gradient, on every instruction set."""

from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moesaic.kernels import select
from moesaic.kernels.attention import attention_mask, causal_attention
from moesaic.kernels.cpu.build import EMULATED_TILES

LENGTHS = (1, 2, 17, 63, 65, 130)
# Heads, KV heads, head_dim: padded to 32 (16, 48) or not, one panel, two, and many.
HEADS = ((4, 4, 16), (4, 2, 64), (3, 1, 48), (2, 1, 256))
HAS_KERNELS = bool(select.supported_instruction_sets()) and select.find_compiler() is not None
needs_kernels = pytest.mark.skipif(not HAS_KERNELS, reason="needs an x86 processor with AVX2 and a C++ compiler")
# Operands, probabilities and results are rounded to 8 bits (2^-9 relative); errors of many terms are independent and
# come to 2.5e-3 of the norm. With two positions nothing averages, and a gradient of scores is the small difference of
# two numbers that have such an error.
TOLERANCE = 2**-7


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def inputs(
    length: int, heads: int, kv_heads: int, dim: int, dtype: torch.dtype = torch.bfloat16, batch: int = 2
) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = (
        normal(batch, length, count, dim, seed=seed).to(dtype).requires_grad_()
        for seed, count in enumerate((heads, kv_heads, kv_heads))
    )
    return query, key, value


def documents_of(kind: str, length: int, batch: int = 2) -> Tensor | None:
    """Packed documents in rising order, or numbers that come again later: equal numbers see each other."""
    starts = torch.rand(batch, length, generator=torch.Generator().manual_seed(3)) < 0.05
    if kind == "packed":
        return starts.long().cumsum(1) + 2**40
    return None if kind == "none" else (starts.cumsum(1) % 3 - 1).int()


def plain_attention(query: Tensor, key: Tensor, value: Tensor, documents: Tensor | None = None) -> Tensor:
    """The oracle: PyTorch's, of copies in fp32."""
    out = F.scaled_dot_product_attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        attn_mask=None
        if documents is None
        else attention_mask(documents.shape[1], documents.device, documents=documents),
        is_causal=documents is None,
        enable_gqa=True,
    )
    return out.transpose(1, 2)


def relative_error(got: Tensor, wanted: Tensor) -> float:
    return ((got.double() - wanted.double()).norm() / wanted.double().norm().clamp_min(1e-30)).item()


def values_and_gradients(attend: Callable[..., Tensor], leaves: Sequence[Tensor], grad: Tensor) -> list[Tensor]:
    out = attend(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))]


def compare(leaves: Sequence[Tensor], documents: Tensor | None, tolerance: float = TOLERANCE) -> None:
    grad = normal(*leaves[0].shape, seed=9).bfloat16()
    got = values_and_gradients(lambda *x: causal_attention(*x, documents=documents), leaves, grad)
    wide = tuple(leaf.detach().float().requires_grad_() for leaf in leaves)
    wanted = values_and_gradients(lambda *x: plain_attention(x[0], x[1], x[2], documents), wide, grad)
    for name, mine, theirs, like in zip(
        ("out", "query", "key", "value"), got, wanted, (leaves[0], *leaves), strict=True
    ):
        assert mine.shape == like.shape and mine.dtype == like.dtype, name
        # With one key there is no choice: the gradients of query and key are zero, up to rounding.
        assert relative_error(mine, theirs) < tolerance or (mine - theirs).abs().max() < 1e-3, name


@needs_kernels
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), HEADS)
@pytest.mark.parametrize("documents", ["none", "packed", "mixed"])
def test_equals_pytorch_in_fp32(
    compiled_kernels: str, length: int, heads: int, kv_heads: int, dim: int, documents: str
) -> None:
    if compiled_kernels == EMULATED_TILES and length == 130 and dim > 16:
        pytest.skip("emulated tiles are slow")
    tolerance = TOLERANCE if length > 2 else 4 * TOLERANCE
    compare(inputs(length, heads, kv_heads, dim), documents_of(documents, length), tolerance)


@needs_kernels
@pytest.mark.parametrize("documents", ["none", "packed", "mixed"])
def test_equals_pytorch_over_many_blocks(documents: str) -> None:
    """More keys and queries than one step of either pass takes, and documents that leave whole blocks out."""
    compare(inputs(701, 2, 1, 32, batch=1), documents_of(documents, 701, batch=1))


@pytest.mark.parametrize("documents", ["none", "mixed"])
@pytest.mark.parametrize(("dtype", "dim"), [(torch.float32, 16), (torch.bfloat16, 24), (torch.bfloat16, 272)])
def test_other_types_and_head_dims_work(dtype: torch.dtype, dim: int, documents: str) -> None:
    tolerance = 1e-5 if dtype == torch.float32 else 2 * TOLERANCE  # PyTorch's, which rounds scores and sums too
    compare(inputs(33, 4, 2, dim, dtype), documents_of(documents, 33), tolerance)


@pytest.mark.parametrize("documents", ["none", "mixed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("dim", "value_dim"), [(16, 16), (10, 7), (24, 40), (48, 32)])
def test_values_of_another_width_and_a_scale(
    kernels: str, dim: int, value_dim: int, dtype: torch.dtype, documents: str
) -> None:
    query, key, _ = inputs(37, 4, 2, dim, dtype)
    value = normal(2, 37, 2, value_dim, seed=5).to(dtype).requires_grad_()
    leaves, numbers = (query, key, value), documents_of(documents, 37)
    grad = normal(2, 37, 4, value_dim, seed=9)
    got = values_and_gradients(lambda *x: causal_attention(*x, documents=numbers, scale=0.4), leaves, grad)
    wide = tuple(leaf.detach().float().requires_grad_() for leaf in leaves)
    factor = 0.4 * dim**0.5
    wanted = values_and_gradients(lambda q, k, v: plain_attention(q * factor, k, v, numbers), wide, grad)
    assert got[0].shape == (2, 37, 4, value_dim)
    for mine, theirs in zip(got, wanted, strict=True):
        assert relative_error(mine, theirs) < (1e-5 if dtype == torch.float32 else 2 * TOLERANCE)


def softmax_attention(
    query: Tensor, key: Tensor, value: Tensor, documents: Tensor | None, window: int, sinks: Tensor | None
) -> Tensor:
    """The definition, written out: a position sees the last `window` up to its own, a sink takes its share."""
    length, group = query.shape[1], query.shape[2] // key.shape[2]
    key, value = (part.repeat_interleave(group, 2) for part in (key, value))
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key) * query.shape[3] ** -0.5
    distance = torch.arange(length)[:, None] - torch.arange(length)
    seen = ((distance >= 0) & (distance < window)).expand(query.shape[0], 1, -1, -1)
    if documents is not None:
        seen = seen & (documents[:, None, :, None] == documents[:, None, None, :])
    weights = scores.masked_fill(~seen, float("-inf")).exp()
    total = weights.sum(-1, keepdim=True) + (0.0 if sinks is None else sinks[:, None, None].exp())
    return torch.einsum("bhqk,bkhd->bqhd", weights / total, value)


# Inside a block of 32, exactly one, one and a key more, over many; one that is longer than the sequence.
@pytest.mark.parametrize("window", [2, 31, 32, 33, 64, 100, 500])
@pytest.mark.parametrize("documents", ["none", "mixed"])
@pytest.mark.parametrize("has_sinks", [False, True])
def test_windows_and_sinks(kernels: str, window: int, documents: str, has_sinks: bool) -> None:
    length = 130 if kernels == EMULATED_TILES else 300
    leaves = [*inputs(length, 4, 2, 32, batch=2)]
    if has_sinks:
        leaves.append((4 * normal(4, seed=7)).requires_grad_())
    numbers = documents_of(documents, length)
    grad = normal(*leaves[0].shape, seed=9).bfloat16()
    got = values_and_gradients(
        lambda *x: causal_attention(*x[:3], documents=numbers, window=window, sinks=x[3] if has_sinks else None),
        leaves,
        grad,
    )
    wide = tuple(leaf.detach().double().requires_grad_() for leaf in leaves)
    wanted = values_and_gradients(
        lambda *x: softmax_attention(*x[:3], numbers, window, x[3] if has_sinks else None), wide, grad
    )
    for name, mine, theirs in zip(("out", "query", "key", "value", "sinks"), got, wanted, strict=False):
        assert mine.shape == theirs.shape, name
        assert relative_error(mine, theirs) < 2 * TOLERANCE, name


@pytest.mark.parametrize("sink", [-1e4, -60.0, 60.0, 200.0, 1e4])
def test_sinks_of_any_size(kernels: str, sink: float) -> None:
    leaves = [*inputs(40, 2, 2, 16), torch.tensor([sink, 0.0], requires_grad=True)]
    grad = torch.ones_like(leaves[0])
    got = values_and_gradients(lambda *x: causal_attention(*x[:3], sinks=x[3]), leaves, grad)
    assert all(part.isfinite().all() for part in got)
    without = causal_attention(*leaves[:3]).detach()
    if sink < 0:  # far below every score
        torch.testing.assert_close(got[0][:, :, 0], without[:, :, 0], rtol=8e-3, atol=8e-3)
    else:  # it takes all
        assert got[0][:, :, 0].abs().max() < 1e-20
    assert got[4][0].abs() < 1e-6 < got[4][1].abs()


@needs_kernels
def test_windows_and_sinks_under_checkpointing_and_autocast() -> None:
    query, key, value = inputs(70, 4, 2, 32)
    sinks = normal(4, seed=7).requires_grad_()
    leaves, grad = (query, key, value, sinks), normal(*query.shape, seed=9).bfloat16()

    def attend(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor) -> Tensor:
        return causal_attention(query, key, value, window=40, sinks=sinks)

    wanted = values_and_gradients(attend, leaves, grad)
    again = values_and_gradients(lambda *x: checkpoint(attend, *x, use_reentrant=False), leaves, grad)
    assert all(torch.equal(one, other) for one, other in zip(wanted, again, strict=True))
    with torch.autocast("cpu", torch.bfloat16):
        cast = values_and_gradients(attend, leaves, grad)
    assert cast[4].dtype == torch.float32
    for one, other in zip(wanted, cast, strict=True):
        assert relative_error(other, one) < TOLERANCE  # sinks are rounded to bf16


def test_without_kernels() -> None:
    with select.forced(select.REFERENCE):
        compare(inputs(33, 4, 2, 16), documents_of("packed", 33), 2 * TOLERANCE)


@needs_kernels
@pytest.mark.parametrize("documents", ["none", "mixed"])
@pytest.mark.parametrize(("batch", "heads", "kv_heads", "length"), [(1, 4, 1, 700), (3, 2, 1, 300), (6, 2, 2, 70)])
def test_any_number_of_threads_gives_the_same_bits(
    batch: int, heads: int, kv_heads: int, length: int, documents: str
) -> None:
    """Fewer pairs than threads, a number that they do not divide, and more."""
    leaves = inputs(length, heads, kv_heads, 32, batch=batch)
    numbers = documents_of(documents, length, batch)
    grad = normal(*leaves[0].shape, seed=9)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append(values_and_gradients(lambda *x: causal_attention(*x, documents=numbers), leaves, grad))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@needs_kernels
def test_a_sequence_does_not_depend_on_the_batch() -> None:
    leaves = inputs(130, 4, 2, 32, batch=3)
    grad = normal(*leaves[0].shape, seed=9)
    together = values_and_gradients(causal_attention, leaves, grad)
    alone = values_and_gradients(
        causal_attention, tuple(leaf.detach()[1:2].requires_grad_() for leaf in leaves), grad[1:2]
    )
    assert all(torch.equal(a[1:2], b) for a, b in zip(together, alone, strict=True))


@needs_kernels
def test_views_give_the_same_bits_as_copies() -> None:
    """One fused projection's output, cut into query, key and value, and gradients that are views."""
    fused = normal(2, 131, 8 * 16, seed=0).bfloat16().requires_grad_()
    parts = fused.view(2, 131, 8, 16).split([4, 2, 2], dim=2)
    copies = tuple(part.detach().contiguous().requires_grad_() for part in parts)
    for grad in (normal(2, 4, 131, 16, seed=1).transpose(1, 2), torch.ones(1, 1, 1, 1).expand(2, 131, 4, 16)):
        out = causal_attention(*parts)
        (got,) = torch.autograd.grad(out, fused, grad.bfloat16())
        wanted = values_and_gradients(causal_attention, copies, grad.contiguous())
        assert torch.equal(out, wanted[0])
        assert torch.equal(got, torch.cat(wanted[1:], 2).flatten(2))
    # Heads before positions, and a last dimension that is not contiguous.
    turned = [copy.detach().transpose(1, 2).contiguous().transpose(1, 2) for copy in copies]
    across = [copy.detach().transpose(2, 3).contiguous().transpose(2, 3) for copy in copies]
    wanted_out = causal_attention(*copies)
    assert torch.equal(causal_attention(*turned), wanted_out)
    assert torch.equal(causal_attention(*across), wanted_out)


@needs_kernels
def test_the_first_position_sees_itself_alone() -> None:
    query, key, value = inputs(300, 4, 2, 16)
    assert torch.equal(causal_attention(query, key, value)[:, 0], value[:, 0].repeat_interleave(2, 1))


@needs_kernels
def test_a_document_is_as_if_alone() -> None:
    query, key, value = inputs(160, 4, 2, 16)
    documents = torch.tensor([0] * 37 + [1] * 123).expand(2, -1)
    out = causal_attention(query, key, value, documents=documents)
    alone = causal_attention(query[:, 37:], key[:, 37:], value[:, 37:])
    # Other blocks of keys round the running sums elsewhere.
    torch.testing.assert_close(out[:, 37:], alone, rtol=2**-7, atol=1e-3)


@needs_kernels
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_bad_number_stays_in_its_sequence_and_head(bad: float, which: int) -> None:
    leaves = inputs(70, 4, 2, 32, batch=3)
    grad = normal(*leaves[0].shape, seed=9)
    clean = values_and_gradients(causal_attention, leaves, grad)
    with torch.no_grad():
        leaves[which][1, 40, -1, 5] = bad
    spoilt = values_and_gradients(causal_attention, leaves, grad)
    for mine, before in zip(spoilt, clean, strict=True):
        assert torch.equal(mine[[0, 2]], before[[0, 2]])
        others = mine.shape[2] // 2  # heads of the other group
        assert torch.equal(mine[1, :, :others], before[1, :, :others])
    # Queries of earlier blocks do not see it, this one does.
    assert torch.equal(spoilt[0][1, :32], clean[0][1, :32])
    assert not spoilt[0][1, 40:, -1].isfinite().all()


@needs_kernels
def test_large_scores_do_not_overflow() -> None:
    leaves = tuple(leaf.detach().mul(100).requires_grad_() for leaf in inputs(129, 2, 2, 64))
    # Scores near 10^5: nearly one-hot, and a near tie may fall another way.
    wide = [leaf.detach().float() for leaf in leaves]
    assert relative_error(causal_attention(*leaves), plain_attention(*wide)) < TOLERANCE


@needs_kernels
@pytest.mark.parametrize("exponent", [11, 16, 32, 48])
def test_gradients_stay_right_however_large_the_scores(compiled_kernels: str, exponent: int) -> None:
    """Scores up to 2^95, many of a query's equal and the others far below."""
    size, dim = 2.0**exponent, 16
    which = torch.randint(0, dim, (2, 70, 4), generator=torch.Generator().manual_seed(1))
    query = F.one_hot(which, dim) * size * 1.25
    key = torch.where(normal(2, 70, 2, dim, seed=2) < 0.8, -size, size * 1.75)
    leaves = tuple(leaf.bfloat16().requires_grad_() for leaf in (query, key, normal(2, 70, 2, dim, seed=3)))
    grad = normal(2, 70, 4, dim, seed=9).bfloat16()

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """PyTorch's own keeps one number per query, in which such scores leave no room for how many are the largest."""
        key, value = key.repeat_interleave(2, 2), value.repeat_interleave(2, 2)
        scores = torch.einsum("bsad,btad->bast", query, key) / dim**0.5
        is_hidden = torch.ones(70, 70, dtype=torch.bool).triu(1)
        return torch.einsum("bast,btad->bsad", scores.masked_fill(is_hidden, -torch.inf).softmax(-1), value)

    got = values_and_gradients(causal_attention, leaves, grad)
    wanted = values_and_gradients(attend, tuple(leaf.detach().float().requires_grad_() for leaf in leaves), grad)
    for name, mine, theirs in zip(("out", "query", "key", "value"), got, wanted, strict=True):
        assert relative_error(mine, theirs) < TOLERANCE, name


@needs_kernels
@pytest.mark.parametrize("documents", ["none", "packed"])
def test_is_an_ordinary_operator(documents: str) -> None:
    leaves, numbers = inputs(40, 4, 2, 16), documents_of(documents, 40)
    rest = (numbers, None, 0.2, None) if documents == "none" else (numbers, normal(4, seed=7), 0.2, 20)
    operator = torch.ops.moesaic.causal_attention
    # Tracing with dynamic shapes takes seconds; once is enough.
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(operator, (*leaves, *rest), test_utils=checks[: 4 if documents == "packed" else 3])
    out, normalizers = operator(*leaves, *rest)
    saved = (*(leaf.detach() for leaf in leaves), out.detach(), normalizers, *rest)
    backward = torch.ops.moesaic.causal_attention_backward
    torch.library.opcheck(backward, (torch.ones_like(out), *saved), test_utils=checks[:3])


@needs_kernels
def test_saves_its_arguments_its_result_and_two_numbers_per_query_and_head() -> None:
    leaves = inputs(64, 4, 2, 32)
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = causal_attention(*leaves)
    num_bytes = {tensor.data_ptr(): tensor.nbytes for tensor in saved}
    assert sum(num_bytes.values()) == sum(leaf.nbytes for leaf in leaves) + out.nbytes + 2 * 4 * 2 * 64 * 4


@needs_kernels
def test_autocast_casts() -> None:
    leaves = inputs(33, 4, 2, 16, torch.float32)
    grad = normal(*leaves[0].shape, seed=9)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return causal_attention(query, key, value)

    got = values_and_gradients(attend, leaves, grad)
    wanted = values_and_gradients(
        causal_attention, tuple(leaf.detach().bfloat16().requires_grad_() for leaf in leaves), grad
    )
    assert got[0].dtype == torch.bfloat16 and got[1].dtype == torch.float32
    assert all(torch.equal(mine.bfloat16(), theirs) for mine, theirs in zip(got, wanted, strict=True))


def test_autocast_leaves_double_precision_alone() -> None:
    leaves = inputs(33, 4, 2, 16, torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        out = causal_attention(*leaves)
    assert out.dtype == torch.float64 and torch.equal(out, causal_attention(*leaves))


@needs_kernels
def test_under_activation_checkpointing() -> None:
    leaves = inputs(65, 4, 2, 16)
    grad = normal(*leaves[0].shape, seed=9)
    again = values_and_gradients(lambda *x: checkpoint(causal_attention, *x, use_reentrant=False), leaves, grad)
    wanted = values_and_gradients(causal_attention, leaves, grad)
    assert all(torch.equal(a, b) for a, b in zip(again, wanted, strict=True))


@needs_kernels
def test_under_compile() -> None:
    """Traced forward and backward without a graph break; generating code for the rest is not attention's concern."""
    leaves = inputs(33, 4, 2, 16)
    grad = normal(*leaves[0].shape, seed=9)
    compiled = torch.compile(causal_attention, backend="aot_eager", fullgraph=True)
    got = values_and_gradients(compiled, leaves, grad)
    wanted = values_and_gradients(causal_attention, leaves, grad)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_dropout_takes_away_and_scales_up() -> None:
    query, key = torch.zeros(1, 64, 2, 16), torch.zeros(1, 64, 2, 16)
    value = torch.ones(1, 64, 2, 16)
    torch.manual_seed(0)
    out = causal_attention(query, key, value, dropout=0.5)
    assert out.std() > 0.01
    assert abs(out[:, 8:].mean().item() - 1.0) < 0.1  # of 56 * 2 rows with at least 9 keys each


def test_refuses_shapes_that_do_not_fit() -> None:
    query, key, value = inputs(8, 4, 3, 16)
    with pytest.raises(AssertionError, match="3"):
        causal_attention(query, key, value)
    with pytest.raises(AssertionError):
        causal_attention(key, key, value, documents=torch.zeros(2, 7, dtype=torch.long))
    with pytest.raises(AssertionError, match=r"-1\.0"):
        causal_attention(key, key, value, scale=-1.0)
    with pytest.raises(AssertionError):
        causal_attention(key, key, value, sinks=torch.zeros(5))
    with pytest.raises(AssertionError, match="0"):
        causal_attention(key, key, value, window=0)
