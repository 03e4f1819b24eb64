"""The chunked cross-entropy equals F.cross_entropy of the whole logits, values and every gradient."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moesaic.kernels import cross_entropy
from moesaic.kernels.cross_entropy import linear_cross_entropy

pytestmark = pytest.mark.usefixtures("kernels")

HIDDEN, VOCAB = 24, 101


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def targets_of(num_tokens: int, *, share_ignored: float = 0.3) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    targets = torch.randint(VOCAB, (num_tokens,), generator=generator)
    ignored = torch.rand(num_tokens, generator=generator) < share_ignored
    ignored[0] = False
    return targets.masked_fill(ignored, -100)


def relative_error(got: Tensor, wanted: Tensor) -> float:
    return ((got.double() - wanted.double()).norm() / wanted.double().norm().clamp_min(1e-30)).item()


@pytest.mark.parametrize("chunk", [1, 5, 36, 37, 1000])
@pytest.mark.parametrize("num_tokens", [1, 37])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_the_whole_logits(
    num_tokens: int, chunk: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cross_entropy, "_CHUNK_ELEMENTS", chunk * VOCAB)
    hidden = normal(num_tokens, HIDDEN, seed=0).to(dtype).requires_grad_()
    weight = normal(VOCAB, HIDDEN, seed=1).to(dtype).requires_grad_()
    targets = targets_of(num_tokens)
    loss = linear_cross_entropy(hidden, weight, targets)
    wanted = F.cross_entropy(hidden.double() @ weight.double().t(), targets)
    assert loss.dtype == torch.float32
    got = torch.autograd.grad(loss * 3, (hidden, weight))
    expected = torch.autograd.grad(wanted * 3, (hidden, weight))
    # bf16 logits of size 10 are 0.02 off, and so, relatively, are the probabilities.
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    assert relative_error(loss, wanted) < tolerance
    for mine, theirs in zip(got, expected, strict=True):
        assert mine.dtype == dtype
        assert relative_error(mine, theirs) < tolerance
    with torch.no_grad():
        assert relative_error(linear_cross_entropy(hidden, weight, targets), loss) < 1e-6
    each = linear_cross_entropy(hidden, weight, targets, reduction="none")
    wanted_each = F.cross_entropy(hidden.double() @ weight.double().t(), targets, reduction="none")
    assert relative_error(each, wanted_each) < tolerance
    assert torch.count_nonzero(each[targets == -100]) == 0


@pytest.mark.parametrize(("hidden_size", "vocab_size"), [(HIDDEN, VOCAB), (32, 96)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operands_of_any_strides(
    hidden_size: int, vocab_size: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cross_entropy, "_CHUNK_ELEMENTS", vocab_size)
    monkeypatch.setattr(cross_entropy, "_MIN_CHUNK_TOKENS", 5)
    plain = normal(37, hidden_size, seed=0).to(dtype), normal(vocab_size, hidden_size, seed=1).to(dtype)
    turned = [tensor.t().contiguous().t() for tensor in plain]
    targets = targets_of(37).remainder(vocab_size).masked_fill(targets_of(37) == -100, -100)
    results = []
    for hidden, weight, classes in ((*plain, targets), (*turned, torch.stack([targets, 1 - targets], -1)[:, 0])):
        loss = linear_cross_entropy(hidden.requires_grad_(), weight.requires_grad_(), classes)
        each = linear_cross_entropy(hidden, weight, classes, reduction="none")
        results.append([loss, each, *torch.autograd.grad(loss, (hidden, weight))])
    for mine, wanted in zip(results[1], results[0], strict=True):
        assert relative_error(mine, wanted) < (1e-5 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize(("hidden_size", "vocab_size"), [(HIDDEN, VOCAB), (64, 1024)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_one_side_may_be_frozen(frozen: str, dtype: torch.dtype, hidden_size: int, vocab_size: int) -> None:
    """The other one's gradient is the same to the bit, and of a frozen weight none is kept."""
    hidden, weight = normal(700, hidden_size, seed=0).to(dtype), normal(vocab_size, hidden_size, seed=1).to(dtype)
    targets = targets_of(700)
    results = []
    for both in (True, False):
        one = hidden.clone().requires_grad_(both or frozen != "hidden")
        other = weight.clone().requires_grad_(both or frozen != "weight")
        loss = linear_cross_entropy(one, other, targets)
        assert loss.grad_fn is not None
        kept = max(tensor.numel() for tensor in loss.grad_fn.saved_tensors)  # type: ignore[attr-defined]
        loss.backward()
        results.append((loss, (other if frozen == "hidden" else one).grad, kept))
        if not both:
            assert (one if frozen == "hidden" else other).grad is None
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
    if frozen == "weight":
        assert results[1][2] == hidden.numel() < weight.numel() or vocab_size == VOCAB


def test_a_target_whose_probability_underflows_has_its_exact_loss() -> None:
    hidden = torch.eye(3, requires_grad=True)
    weight = torch.tensor([[500.0, 0.0, 300.0], [-500.0, 0.0, 0.0], [0.0, 0.0, 299.0]], requires_grad=True)
    targets = torch.tensor([1, 2, 2])
    logits = hidden @ weight.t()
    each = linear_cross_entropy(hidden, weight, targets, reduction="none")
    assert each[0] == 1000.0
    torch.testing.assert_close(each, F.cross_entropy(logits, targets, reduction="none"))
    got = torch.autograd.grad(linear_cross_entropy(hidden, weight, targets), (hidden, weight))
    wanted = torch.autograd.grad(F.cross_entropy(logits, targets), (hidden, weight))
    for mine, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_non_finite_token_makes_the_loss_non_finite(bad: float) -> None:
    hidden = normal(9, HIDDEN, seed=0)
    hidden[4] = bad
    hidden.requires_grad_()
    weight = normal(VOCAB, HIDDEN, seed=1).requires_grad_()
    targets = targets_of(9, share_ignored=0.0)
    loss = linear_cross_entropy(hidden, weight, targets)
    assert not loss.isfinite()
    assert not torch.autograd.grad(loss, weight)[0].isfinite().all()
    each = linear_cross_entropy(hidden, weight, targets, reduction="none")
    assert each.isfinite().tolist() == [token != 4 for token in range(9)]


def test_an_impossible_target_has_an_infinite_loss() -> None:
    hidden, weight = torch.ones(1, 1), torch.tensor([[0.0], [float("-inf")]])
    assert linear_cross_entropy(hidden, weight, torch.tensor([1])) == float("inf")
    assert linear_cross_entropy(hidden, weight, torch.tensor([0])) == 0.0


def test_nothing_to_predict_is_a_loss_of_zero_without_a_gradient() -> None:
    hidden = normal(4, HIDDEN, seed=0).requires_grad_()
    weight = normal(VOCAB, HIDDEN, seed=1).requires_grad_()
    targets = torch.full((4,), -100)
    loss = linear_cross_entropy(hidden, weight, targets)
    assert loss == 0
    for grad in torch.autograd.grad(loss, (hidden, weight)):
        assert torch.count_nonzero(grad) == 0
    with torch.no_grad():
        assert linear_cross_entropy(hidden, weight, targets) == 0
    empty = linear_cross_entropy(hidden[:0], weight, targets[:0])
    assert empty == 0


@pytest.mark.parametrize("wrong", [-1, VOCAB])
def test_a_target_outside_the_vocabulary_is_refused(wrong: int) -> None:
    hidden, weight = normal(2, HIDDEN, seed=0), normal(VOCAB, HIDDEN, seed=1)
    with pytest.raises((IndexError, RuntimeError)):
        linear_cross_entropy(hidden.requires_grad_(), weight, torch.tensor([3, wrong]))


@pytest.mark.parametrize("targets", [torch.tensor([1]), torch.tensor([1, 2], dtype=torch.int32)])
def test_targets_of_another_length_or_type_are_refused(targets: torch.Tensor) -> None:
    hidden, weight = normal(2, HIDDEN, seed=0), normal(VOCAB, HIDDEN, seed=1)
    for reduction in ("mean", "none"):
        with pytest.raises(AssertionError):
            linear_cross_entropy(hidden, weight, targets, reduction=reduction)


@pytest.mark.parametrize(
    ("hidden", "weight"),
    [((6, 32), (64, 64)), ((6, 64), (64, 32)), ((6, 32, 64), (64, 64)), ((6, 32), (32,)), ((6, 32), (0, 32))],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shapes_that_do_not_fit_are_refused(
    kernels: str, hidden: tuple[int, ...], weight: tuple[int, ...], dtype: torch.dtype
) -> None:
    """The kernel would read and write past the ends, or divide by a vocabulary of 0."""
    operands = torch.ones(hidden, dtype=dtype), torch.ones(weight, dtype=dtype).requires_grad_()
    targets = torch.full((6,), 3)
    for reduction in ("mean", "none"):
        with pytest.raises(AssertionError):
            linear_cross_entropy(*operands, targets, reduction=reduction)
    if kernels != "reference":
        with pytest.raises(AssertionError):
            torch.ops.moesaic.linear_cross_entropy(*operands, targets, False, False)


def test_what_the_operator_cannot_take_is_refused(compiled_kernels: str) -> None:
    hidden, weight = torch.ones(6, 32, dtype=torch.bfloat16), torch.ones(64, 32, dtype=torch.bfloat16)
    targets = torch.full((6,), 3)
    for wrong in (
        (hidden, weight[:63], targets),
        (hidden[:, :0], weight[:, :0], targets),
        (hidden.float(), weight.float(), targets),
        (hidden, weight, targets[:5]),
        (hidden, weight, targets.int()),
    ):
        with pytest.raises(AssertionError):
            torch.ops.moesaic.linear_cross_entropy(*wrong, True, True)
    turned = torch.ones(32, 6, dtype=torch.bfloat16).t()  # its gradient takes its place, row by row
    for logits, classes in (
        (hidden, targets[:5]),
        (hidden.double(), targets),
        (hidden, targets.int()),
        (turned, targets),
    ):
        with pytest.raises(AssertionError):
            torch.ops.moesaic.cross_entropy(logits, classes, False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_channels_every_class_is_as_likely(dtype: torch.dtype) -> None:
    hidden, weight = torch.ones(6, 0, dtype=dtype), torch.ones(64, 0, dtype=dtype)
    for requires_grad in (False, True):
        loss = linear_cross_entropy(hidden.requires_grad_(requires_grad), weight, torch.full((6,), 3))
        torch.testing.assert_close(loss.detach(), torch.tensor(64.0).log(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("vocab_size", [64, 63])
@pytest.mark.parametrize("dtypes", [("float32", "float32"), ("bfloat16", "float32"), ("float32", "bfloat16")])
def test_autocast_casts_with_and_without_a_gradient(dtypes: tuple[str, str], vocab_size: int) -> None:
    operands = (normal(6, 32, seed=0), normal(vocab_size, 32, seed=1))
    hidden, weight = (x.to(getattr(torch, dtype)).requires_grad_() for x, dtype in zip(operands, dtypes, strict=True))
    targets = targets_of(6).remainder(vocab_size)
    wanted = linear_cross_entropy(hidden.bfloat16(), weight.bfloat16(), targets)
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, targets)
        with torch.no_grad():
            assert torch.equal(linear_cross_entropy(hidden, weight, targets), wanted)
        each = linear_cross_entropy(hidden, weight, targets, reduction="none")
        double = linear_cross_entropy(hidden.double(), weight.double(), targets)
    assert torch.equal(loss, wanted)
    torch.testing.assert_close(each.mean(), wanted.detach())
    for mine, theirs in zip(
        torch.autograd.grad(loss, (hidden, weight)), torch.autograd.grad(wanted, (hidden, weight)), strict=True
    ):
        assert torch.equal(mine, theirs)
    exact = F.cross_entropy(hidden.double() @ weight.double().t(), targets)
    torch.testing.assert_close(double.double(), exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("vocab_size", [64, 63])
def test_a_mean_divides_bf16_gradients_by_the_number_of_tokens_itself(vocab_size: int) -> None:
    """1/37 rounded to bf16 is 0.1 % more: every gradient was."""
    hidden = normal(37, 32, seed=0).bfloat16().requires_grad_()
    weight = normal(vocab_size, 32, seed=1).bfloat16()
    targets = targets_of(37, share_ignored=0.0).remainder(vocab_size)
    loss = linear_cross_entropy(hidden, weight, targets)
    (total,) = torch.autograd.grad(loss * 37, hidden, retain_graph=True)
    (mean,) = torch.autograd.grad(loss, hidden)
    assert mean.dtype == torch.bfloat16
    assert (mean.double().norm() * 37 / total.double().norm()).item() == pytest.approx(1.0, abs=2e-4)


def test_a_gradients_gradient_is_refused() -> None:
    hidden, weight = normal(9, HIDDEN, seed=0).requires_grad_(), normal(VOCAB, HIDDEN, seed=1)
    loss = linear_cross_entropy(hidden, weight, targets_of(9))
    with pytest.raises(RuntimeError, match=r"_LinearCrossEntropy\.backward is once_differentiable"):
        torch.autograd.grad(loss, hidden, create_graph=True)


def test_the_weight_gradient_of_many_chunks_is_summed_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Summed in bf16, 512 chunks would lose most of the later ones."""
    hidden = normal(512, HIDDEN, seed=0).to(torch.bfloat16)
    weight = (normal(VOCAB, HIDDEN, seed=1) * 0.1).to(torch.bfloat16).requires_grad_()
    targets = targets_of(512)
    wide = weight.detach().double().requires_grad_()
    (wanted,) = torch.autograd.grad(F.cross_entropy(hidden.double() @ wide.t(), targets), wide)
    monkeypatch.setattr(cross_entropy, "_CHUNK_ELEMENTS", VOCAB)
    (got,) = torch.autograd.grad(linear_cross_entropy(hidden, weight, targets), weight)
    assert relative_error(got, wanted) < 1e-2


@pytest.mark.parametrize(("hidden_size", "vocab_size"), [(32, 32), (64, 128), (96, 224)])
@pytest.mark.parametrize("num_tokens", [1, 33, 1100])
def test_the_products_in_the_same_operator(
    compiled_kernels: str, num_tokens: int, hidden_size: int, vocab_size: int
) -> None:
    """Sizes without remainders, in bf16; 1100 tokens are more than one group."""
    hidden = normal(num_tokens, hidden_size, seed=0).to(torch.bfloat16).requires_grad_()
    weight = (normal(vocab_size, hidden_size, seed=1) * 0.3).to(torch.bfloat16).requires_grad_()
    targets = targets_of(num_tokens).remainder(vocab_size).masked_fill(targets_of(num_tokens) == -100, -100)
    wide_hidden, wide_weight = (tensor.detach().double().requires_grad_() for tensor in (hidden, weight))
    logits = wide_hidden @ wide_weight.t()
    each = linear_cross_entropy(hidden, weight, targets, reduction="none")
    torch.testing.assert_close(each.double(), F.cross_entropy(logits, targets, reduction="none"), rtol=1e-5, atol=1e-5)
    loss, wanted = linear_cross_entropy(hidden, weight, targets), F.cross_entropy(logits, targets)
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-5, atol=1e-5)
    expected = torch.autograd.grad(wanted, (wide_hidden, wide_weight))
    for mine, theirs in zip(torch.autograd.grad(loss, (hidden, weight)), expected, strict=True):
        assert relative_error(mine, theirs) < 1e-2


def test_the_same_bits_for_any_number_of_threads(compiled_kernels: str) -> None:
    hidden = normal(300, 64, seed=0).to(torch.bfloat16)
    weight = normal(128, 64, seed=1).to(torch.bfloat16)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(torch.ops.moesaic.linear_cross_entropy(hidden, weight, targets_of(300), True, True))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for mine, theirs in zip(other, results[0], strict=True):
            assert torch.equal(mine, theirs)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_in_one_operator_a_non_finite_token_spoils_itself_alone(compiled_kernels: str, bad: float) -> None:
    hidden = normal(40, 32, seed=0).to(torch.bfloat16)
    hidden[[4, 5], 3] = bad
    weight = normal(128, 32, seed=1).to(torch.bfloat16)
    targets = targets_of(40, share_ignored=0.0)
    targets[5] = -100
    losses, grad_hidden, _ = torch.ops.moesaic.linear_cross_entropy(hidden, weight, targets, True, True)
    assert losses.isfinite().tolist() == [token != 4 for token in range(40)]
    assert grad_hidden.isfinite().all(1).tolist() == [token != 4 for token in range(40)]
    assert losses[5] == torch.count_nonzero(grad_hidden[5]) == 0


def test_in_one_operator_impossible_classes_and_likely_targets_are_exact(compiled_kernels: str) -> None:
    """A chunk of classes of -infinity, an infinite loss, and a target whose gradient is a small difference."""
    weight = torch.zeros(224, 32)
    weight[:130] = float("-inf")
    weight[200] = 12.0
    hidden = torch.zeros(2, 32)
    hidden[:, 0] = 1.0
    weight[:, 1:] = 0.0
    targets = torch.tensor([200, 3])
    operands = hidden.to(torch.bfloat16), weight.to(torch.bfloat16)
    losses, grad_hidden, grad_weight = torch.ops.moesaic.linear_cross_entropy(*operands, targets, True, True)
    assert losses[1] == float("inf")
    rest = 93 * math.exp(-12.0)
    assert losses[0].item() == pytest.approx(math.log1p(rest), abs=1e-6)  # of a sum near 1 in fp32
    alone = torch.ops.moesaic.linear_cross_entropy(operands[0][:1], operands[1], targets[:1], True, True)[2]
    assert alone[200, 0].item() == pytest.approx(-rest / (1 + rest), rel=1e-2)
    assert grad_hidden.shape == (2, 32) and grad_weight.shape == (224, 32)


@pytest.mark.parametrize("wants", [(False, False), (True, False), (True, True)])
def test_the_operators_are_ordinary_ones(compiled_kernels: str, wants: tuple[bool, bool]) -> None:
    hidden, weight = normal(9, 32, seed=0).to(torch.bfloat16), normal(128, 32, seed=1).to(torch.bfloat16)
    torch.library.opcheck(torch.ops.moesaic.linear_cross_entropy.default, (hidden, weight, targets_of(9), *wants))
    torch.library.opcheck(torch.ops.moesaic.cross_entropy.default, (hidden @ weight.t(), targets_of(9), wants[0]))
    with pytest.raises(IndexError, match="outside the vocabulary"):
        torch.ops.moesaic.linear_cross_entropy(hidden, weight, targets_of(9).clamp_max(-1), *wants)


@pytest.mark.parametrize(("dtype", "sizes"), [(torch.bfloat16, (64, 61)), (torch.float32, (64, 96))])
def test_it_is_one_graph_of_any_vocabulary(dtype: torch.dtype, sizes: tuple[int, int]) -> None:
    import torch._dynamo

    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(40, sizes[0], generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(sizes[1], sizes[0], generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(0, sizes[1], (40,), generator=generator)
    wanted = torch.autograd.grad(linear_cross_entropy(hidden, weight, targets), (hidden, weight))
    compiled = torch.compile(linear_cross_entropy, backend="aot_eager", fullgraph=True)
    got = torch.autograd.grad(compiled(hidden, weight, targets), (hidden, weight))
    torch._dynamo.reset()
    assert all(torch.equal(one, other) for one, other in zip(got, wanted, strict=True))
