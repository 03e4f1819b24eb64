"""Both norms equal PyTorch's in double precision, values and every gradient."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moesaic.kernels import norm
from moesaic.kernels.norm import layer_norm, rms_norm

pytestmark = pytest.mark.usefixtures("kernels")

EPSILON = 1e-5
# bf16: the statistics are fp32; the output is rounded once, the gradient of x twice.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


@pytest.fixture(autouse=True)
def small_inputs_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norm, "_LAYER_NORM_SIZE", 0)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def relative_error(got: Tensor, wanted: Tensor) -> float:
    return ((got.double() - wanted.double()).norm() / wanted.double().norm().clamp_min(1e-30)).item()


def both(kind: str, x: Tensor, grad: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Our value and gradients, and PyTorch's in double."""
    size = x.shape[-1]
    weight, bias = (1 + normal(size, seed=1)).requires_grad_(), normal(size, seed=2).requires_grad_()
    if kind == "layer":
        leaves = [x, weight, bias]
        out = layer_norm(x, weight, bias, EPSILON)
        wanted = F.layer_norm(x.double(), weight.shape, weight.double(), bias.double(), EPSILON)
    else:
        leaves = [x, weight]
        out = rms_norm(x, weight, EPSILON)
        wanted = F.rms_norm(x.double(), weight.shape, weight.double(), EPSILON)
    return (
        [out, *torch.autograd.grad(out, leaves, grad)],
        [wanted, *torch.autograd.grad(wanted, leaves, grad.double())],
    )


@pytest.mark.parametrize("shape", [(1, 3), (1, 24), (37, 24), (2, 5, 3, 8), (2, 7, 513), (0, 24)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_equals_pytorch_in_double(kind: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = (normal(*shape, seed=0) * 3 + 1).to(dtype).requires_grad_()
    got, wanted = both(kind, x, normal(*shape, seed=3).to(dtype))
    assert got[0].dtype == dtype
    for mine, theirs in zip(got, wanted, strict=True):
        assert mine.dtype in (dtype, torch.float32)
        assert relative_error(mine, theirs) < TOLERANCE[dtype]


def test_rms_norm_of_a_row_with_a_large_mean_gradient() -> None:
    """The term that LayerNorm's kernel subtracts is the largest part here; adding it back must not lose the rest."""
    x = (100 + normal(11, 64, seed=0)).requires_grad_()
    weight = (1 + normal(64, seed=1)).requires_grad_()
    grad = 10 + normal(11, 64, seed=2)
    got = torch.autograd.grad(rms_norm(x, weight, EPSILON), (x, weight), grad)
    wanted = torch.autograd.grad(
        F.rms_norm(x.double(), weight.shape, weight.double(), EPSILON), (x, weight), grad.double()
    )
    for mine, theirs in zip(got, wanted, strict=True):
        assert relative_error(mine, theirs) < 1e-4


def test_rms_norm_of_a_view() -> None:
    weight = 1 + normal(8, seed=1)
    x = normal(8, 5, 6, seed=0).requires_grad_()
    view = x.permute(2, 1, 0)
    grad = normal(5, 6, 8, seed=2).transpose(0, 1)
    (got,) = torch.autograd.grad(rms_norm(view, weight.requires_grad_(), EPSILON), x, grad)
    (wanted,) = torch.autograd.grad(F.rms_norm(view, (8,), weight, EPSILON), x, grad)
    torch.testing.assert_close(got, wanted)


def test_rms_norm_of_a_row_of_zeros_is_zero_with_a_finite_gradient() -> None:
    x = torch.zeros(2, 8, requires_grad=True)
    out = rms_norm(x, torch.ones(8), EPSILON)
    (grad,) = torch.autograd.grad(out.sum(), x)
    assert torch.equal(out, torch.zeros(2, 8))
    torch.testing.assert_close(grad, torch.full((2, 8), EPSILON**-0.5))


def test_a_gradients_gradient_is_refused() -> None:
    x, weight = normal(3, 8, seed=0).requires_grad_(), torch.ones(8)
    with pytest.raises(RuntimeError, match=r"once_differentiable|no autograd formula"):
        (grad,) = torch.autograd.grad(rms_norm(x, weight, EPSILON).sum(), x, create_graph=True)
        torch.autograd.grad(grad.square().sum(), x)


def test_forward_mode_is_refused(compiled_kernels: str) -> None:
    x, weight = normal(3, 8, seed=0), torch.ones(8)
    with pytest.raises(RuntimeError, match=r"forward-mode differentiation .* reverse mode is required"):
        torch.func.jvp(lambda x: rms_norm(x, weight, EPSILON), (x,), (torch.ones(3, 8),))
    with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError, match="forward-mode differentiation"):
        rms_norm(torch.autograd.forward_ad.make_dual(x, torch.ones(3, 8)), weight, EPSILON)
    assert rms_norm(x, weight, EPSILON).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["x", "gradient"])
@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_what_is_not_finite_reaches_what_it_reaches_in_pytorch(
    kind: str, where: str, bad: float, dtype: torch.dtype
) -> None:
    for size in (8, 70):
        x, grad = normal(3, size, seed=0).to(dtype), normal(3, size, seed=3).to(dtype)
        (x if where == "x" else grad)[1, size - 3] = bad
        got, wanted = both(kind, x.requires_grad_(), grad)
        for mine, theirs in zip(got, wanted, strict=True):
            is_finite = theirs.isfinite()
            assert torch.equal(mine.isfinite(), is_finite)
            assert relative_error(mine[is_finite], theirs[is_finite]) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_results_are_the_same_bits_for_any_number_of_threads(
    compiled_kernels: str, kind: str, dtype: torch.dtype
) -> None:
    x = normal(1003, 520, seed=0).to(dtype).requires_grad_()
    weight, bias = (1 + normal(520, seed=1)).requires_grad_(), normal(520, seed=2).requires_grad_()
    grad = normal(1003, 520, seed=3).to(dtype)
    before = torch.get_num_threads()

    def everything(threads: int) -> list[Tensor]:
        torch.set_num_threads(threads)
        out = rms_norm(x, weight, EPSILON) if kind == "rms" else layer_norm(x, weight, bias, EPSILON)
        return [out, *torch.autograd.grad(out, (x, weight) if kind == "rms" else (x, weight, bias), grad)]

    try:
        one = everything(1)
        for threads in (2, 3):
            for mine, theirs in zip(everything(threads), one, strict=True):
                assert torch.equal(mine, theirs)
    finally:
        torch.set_num_threads(before)


def test_a_bias_that_is_not_fp32_is_refused(compiled_kernels: str) -> None:
    with pytest.raises(AssertionError, match="bfloat16"):
        layer_norm(normal(1024, 512, seed=0).bfloat16(), torch.ones(512), torch.zeros(512).bfloat16(), EPSILON)


@pytest.mark.parametrize("has_bias", [False, True])
def test_the_operator_is_an_ordinary_one(compiled_kernels: str, has_bias: bool) -> None:
    x = normal(3, 5, 24, seed=0).requires_grad_()
    weight, bias = (1 + normal(24, seed=1)).requires_grad_(), normal(24, seed=2).requires_grad_()
    torch.library.opcheck(torch.ops.moesaic.norm.default, (x, weight, bias if has_bias else None, EPSILON))


@pytest.mark.parametrize("flushes", [False, True])
def test_every_thread_takes_subnormals_as_the_caller_does(compiled_kernels: str, flushes: bool) -> None:
    """A processor's setting belongs to a thread: others of the same call would give bits of their own."""
    x, tiny = normal(1024, 64, seed=0), torch.full((64,), 1e-39)
    before = torch.get_num_threads()
    torch.set_flush_denormal(flushes)
    try:
        torch.set_num_threads(3)
        out = rms_norm(x, tiny, EPSILON)
    finally:
        torch.set_flush_denormal(False)
        torch.set_num_threads(before)
    is_zero = out.view(torch.int32) & 0x7FFFFFFF == 0  # as bits: a comparison may flush as well
    assert is_zero.all() if flushes else not is_zero[:, 0].any()
