"""Products through fp32, which processors without bf16 products take, against the same in fp64."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from moesaic.kernels import products


@pytest.fixture(autouse=True, params=[False, True], ids=["widened", "as torch does"])
def is_native(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(products, "_HAS_BF16_PRODUCTS", request.param)
    native: bool = request.param
    return native


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def close(actual: Tensor, expected: Tensor) -> None:
    assert actual.dtype == torch.bfloat16 and actual.shape == expected.shape
    torch.testing.assert_close(actual.double(), expected.double(), rtol=2**-7, atol=0.01)


@pytest.mark.parametrize(("rows", "inner", "columns"), [(5, 7, 3), (1, 64, 33), (130, 1, 16)])
@pytest.mark.parametrize("has_bias", [False, True])
def test_products_are_those_of_fp64_rounded(rows: int, inner: int, columns: int, has_bias: bool) -> None:
    a, b = draw(rows, inner).bfloat16(), draw(columns, inner).bfloat16().t()  # b is not contiguous
    bias = draw(columns).bfloat16() if has_bias else None
    expected = a.double() @ b.double() + (0 if bias is None else bias.double())
    close(products.mm(a, b, bias=bias), expected)
    out = torch.empty(rows, columns, dtype=torch.bfloat16)
    assert products.mm(a, b, bias=bias, out=out).data_ptr() == out.data_ptr()
    close(out, expected)


@pytest.mark.parametrize("shape", [(6,), (4, 6), (2, 3, 6), (0, 6)])
@pytest.mark.parametrize("has_bias", [False, True])
def test_linear_and_its_gradients(shape: tuple[int, ...], has_bias: bool) -> None:
    x, weight = draw(*shape).bfloat16().requires_grad_(), draw(5, 6).bfloat16().requires_grad_()
    bias = draw(5).bfloat16().requires_grad_() if has_bias else None
    wide = [each.detach().double().requires_grad_() for each in (x, weight, bias) if each is not None]
    y, expected = products.linear(x, weight, bias), torch.nn.functional.linear(*wide)
    close(y, expected.detach())
    grad = draw(*y.shape, 1)[..., 0].bfloat16()
    y.backward(grad)
    expected.backward(grad.double())
    for each, reference in zip((x, weight, bias), wide, strict=False):
        assert each is not None and each.grad is not None and reference.grad is not None
        close(each.grad, reference.grad)


@pytest.mark.parametrize(("has_x", "has_weight"), [(True, False), (False, True)])
def test_what_needs_no_gradient_gets_none_and_is_not_kept(has_x: bool, has_weight: bool) -> None:
    x, weight = draw(3, 6).bfloat16().requires_grad_(has_x), draw(5, 6).bfloat16().requires_grad_(has_weight)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        y = products.linear(x, weight)
    assert sum(each.numel() for each in kept) == (weight if has_x else x).numel()
    y.sum().backward()
    assert (x.grad is not None, weight.grad is not None) == (has_x, has_weight)


def test_only_bf16_is_widened_and_only_where_it_must_be(is_native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    multiplied: list[torch.dtype] = []
    multiply = torch.mm

    def watched(a: Tensor, b: Tensor, *, out: Tensor | None = None) -> Tensor:
        multiplied.append(a.dtype)
        return multiply(a, b, out=out)

    monkeypatch.setattr(torch, "mm", watched)
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        x, weight = draw(3, 6).to(dtype), draw(5, 6).to(dtype).requires_grad_()
        y = products.linear(x, weight)
        is_widened = dtype == torch.bfloat16 and not is_native
        assert ("_WidenedLinear" in str(y.grad_fn.next_functions)) is is_widened, dtype
        products.mm(x, weight.detach().t())
    assert multiplied == [torch.bfloat16 if is_native else torch.float32, torch.float32, torch.float64]


def test_dtypes_do_not_mix() -> None:
    x, weight = draw(3, 6).bfloat16(), draw(5, 6)
    with pytest.raises((RuntimeError, AssertionError)):
        products.linear(x, weight)
    with pytest.raises((RuntimeError, AssertionError)):
        products.mm(x, weight.t())


def test_autocast_casts_as_it_does_for_torch() -> None:
    x, weight = draw(3, 6), draw(5, 6).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = products.linear(x, weight)
        assert products.linear(x.double(), weight.double()).dtype == torch.float64
    close(y.detach(), x.double() @ weight.detach().double().t())
    y.sum().backward()
    assert weight.grad is not None and weight.grad.dtype == torch.float32


def test_a_gradients_gradient_under_autocast_is_that_of_torch() -> None:
    x, weight = draw(3, 6).requires_grad_(), draw(5, 6).requires_grad_()

    def penalised(linear: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, ...]:
        with torch.autocast("cpu", torch.bfloat16):
            loss = linear(x, weight).float().square().sum()
        (grad,) = torch.autograd.grad(loss, x, create_graph=True)
        return torch.autograd.grad(loss + grad.square().sum(), (x, weight))

    for mine, theirs in zip(penalised(products.linear), penalised(torch.nn.functional.linear), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2**-6, atol=0.1)


@pytest.mark.parametrize(
    "by_onednn, avx512, avx512_bf16, is_native",
    [
        (True, True, True, True),
        (True, True, False, False),
        (True, False, False, True),  # Arm, or AVX2 with conversions
        (False, False, False, False),
    ],
)
def test_products_are_native_only_with_instructions_for_them(
    by_onednn: bool, avx512: bool, avx512_bf16: bool, is_native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: by_onednn)
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    assert products._has_bf16_products() is is_native
