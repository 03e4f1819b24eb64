"""Routing in C++ equals the router's and the plan's definitions in PyTorch, values and every gradient."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from moesaic.config.model import RouterConfig
from moesaic.kernels import routing, select
from moesaic.kernels.routing import Routing
from moesaic.moe.dispatch import plan_dispatch
from moesaic.moe.router import Router

FIELDS = ("routing_weights", "tokens_per_expert", "mean_probabilities", "z", "entropy", "num_tokens")


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make_router(hidden_size: int, num_experts: int, *, top_k: int, **config: Any) -> Router:
    router = Router(hidden_size, num_experts, top_k=top_k, config=RouterConfig(**config))
    with torch.no_grad():
        router.weight.copy_(normal(num_experts, hidden_size, seed=0) * (2 / hidden_size**0.5))
        if router.score_correction_bias is not None:
            router.score_correction_bias.copy_(normal(num_experts, seed=1) * 0.3)
        if router.bias is not None:
            router.bias.copy_(normal(num_experts, seed=6))
    return router


def gradients(routing: Routing, leaves: list[Tensor]) -> tuple[Tensor, ...]:
    """Of an objective in which everything differentiable has a weight of its own."""
    objective = (routing.routing_weights * normal(*routing.routing_weights.shape, seed=2)).sum()
    objective = objective + (routing.mean_probabilities * normal(*routing.mean_probabilities.shape, seed=3)).sum()
    return torch.autograd.grad(objective + 0.3 * routing.z, leaves)


def with_threads(count: int, call: Callable[[], Any]) -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        return call()
    finally:
        torch.set_num_threads(before)


CASES: list[dict[str, Any]] = [
    {"scoring": scoring, **case}
    for scoring in ("softmax", "sigmoid")
    for case in (
        {"num_experts": 1, "top_k": 1},
        {"num_experts": 5, "top_k": 2, "hidden_size": 1, "bias": True},
        {"num_experts": 12, "top_k": 2, "hidden_size": 300},
        {"num_experts": 16, "top_k": 16},
        {"num_experts": 24, "top_k": 3, "num_groups": 6, "top_groups": 2},
        {"num_experts": 33, "top_k": 1, "score_correction_bias": True},
        {"num_experts": 40, "top_k": 8, "num_groups": 8, "top_groups": 3, "score_correction_bias": True, "bias": True},
        {"num_experts": 300, "top_k": 4, "hidden_size": 70, "bias": True},
    )
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['scoring']}-{case['num_experts']}")
@pytest.mark.parametrize("num_tokens", [1, 101])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_the_definition(
    compiled_kernels: str, case: dict[str, Any], num_tokens: int, padded: bool, dtype: torch.dtype
) -> None:
    sizes = {"hidden_size": 24, **case}
    router = make_router(**sizes)
    x = normal(num_tokens, sizes["hidden_size"], seed=4).to(dtype).requires_grad_()
    valid = torch.arange(num_tokens) % 3 != 1 if padded else None
    got = router(x, valid=valid)
    with select.forced("reference"):
        wanted = router(x, valid=valid)
    assert torch.equal(got.expert_ids, wanted.expert_ids)
    for field in FIELDS:
        torch.testing.assert_close(getattr(got, field), getattr(wanted, field), rtol=1e-5, atol=1e-6)
    tolerance = 2e-5 if dtype == torch.float32 else 1e-2
    leaves = [x, *router.parameters()]
    for mine, theirs in zip(gradients(got, leaves), gradients(wanted, leaves), strict=True):
        assert mine.dtype == theirs.dtype
        assert (mine - theirs).norm() <= tolerance * theirs.norm() + 1e-7


def test_views_come_in_as_they_are(compiled_kernels: str) -> None:
    router = make_router(24, 5, top_k=2)
    wide = normal(24, 74, seed=4)
    x = wide.t()[::2]
    torch.testing.assert_close(router(x).routing_weights, router(x.contiguous()).routing_weights, rtol=0, atol=0)
    weights = router(x).routing_weights
    grad = normal(2, 37, seed=5).t()
    (got,) = torch.autograd.grad(weights, router.weight, grad, retain_graph=True)
    (wanted,) = torch.autograd.grad(weights, router.weight, grad.contiguous())
    assert torch.equal(got, wanted)


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize("used", ["routing_weights", "mean_probabilities", "z"])
def test_each_output_has_its_gradient_alone(compiled_kernels: str, used: str, scoring: str) -> None:
    router = make_router(24, 12, top_k=2, scoring=scoring, bias=True)
    x = normal(50, 24, seed=4).requires_grad_()

    def gradient() -> tuple[Tensor, ...]:
        value = getattr(router(x), used)
        return torch.autograd.grad((value * normal(*value.shape, seed=5)).sum(), (x, *router.parameters()))

    got = gradient()
    with select.forced("reference"):
        wanted = gradient()
    for mine, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


def test_a_sum_of_scores_that_underflows_has_the_definition_s_gradient(compiled_kernels: str) -> None:
    router = make_router(4, 3, top_k=1, scoring="sigmoid")
    with torch.no_grad():
        router.weight.fill_(-12.5)
    x = torch.ones(2, 4, requires_grad=True)
    got = gradients(router(x), [x, router.weight])
    with select.forced("reference"):
        wanted = gradients(router(x), [x, router.weight])
    for mine, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-7)


def test_no_tokens_give_no_gradient(compiled_kernels: str) -> None:
    router = make_router(24, 12, top_k=2, bias=True)
    x = torch.zeros(0, 24, requires_grad=True)
    routed = router(x)
    assert routed.num_tokens == routed.z == routed.entropy == 0
    grad_x, grad_weight, grad_bias = gradients(routed, [x, *router.parameters()])
    assert grad_x.shape == (0, 24)
    assert torch.count_nonzero(grad_weight) == torch.count_nonzero(grad_bias) == 0


def test_a_token_s_result_depends_on_that_token_alone(compiled_kernels: str) -> None:
    router = make_router(300, 40, top_k=4)
    x = normal(101, 300, seed=4).to(torch.bfloat16)
    whole = router(x)
    for part in (slice(0, 1), slice(7, 20), slice(50, 101)):
        alone = router(x[part])
        assert torch.equal(alone.expert_ids, whole.expert_ids[part])
        assert torch.equal(alone.routing_weights, whole.routing_weights[part])


def test_results_are_the_same_bits_for_any_number_of_threads(compiled_kernels: str) -> None:
    router = make_router(128, 40, top_k=2, bias=True)
    x = normal(1001, 128, seed=4).to(torch.bfloat16).requires_grad_()

    def everything() -> list[Tensor]:
        routed = router(x)
        return [
            routed.expert_ids,
            *(getattr(routed, field) for field in FIELDS),
            *gradients(routed, [x, *router.parameters()]),
        ]

    one = everything()
    for threads in (2, 3):
        for mine, theirs in zip(with_threads(threads, everything), one, strict=True):
            assert torch.equal(mine, theirs)


@pytest.mark.parametrize("top_k", [1, 3])
def test_equal_scores_go_to_the_lower_expert(compiled_kernels: str, top_k: int) -> None:
    router = make_router(24, 20, top_k=top_k)
    with torch.no_grad():
        router.weight.zero_()
        router.weight[[18, 4]] = 1.0
    routed = router(torch.ones(3, 24))
    assert routed.expert_ids.tolist() == [[4, 18, 0][:top_k]] * 3


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_non_finite_token_spoils_itself_and_the_means_alone(compiled_kernels: str, bad: float, scoring: str) -> None:
    router = make_router(24, 12, top_k=3, scoring=scoring)
    x = normal(60, 24, seed=4)
    clean = router(x)
    x[7, 3] = bad
    got = router(x)
    with select.forced("reference"):
        wanted = router(x)
    assert got.expert_ids.min() >= 0 and got.expert_ids.max() < 12
    assert len(set(got.expert_ids[7].tolist())) == 3
    others = torch.arange(60) != 7
    assert torch.equal(got.expert_ids[others], clean.expert_ids[others])
    assert torch.equal(got.routing_weights[others], clean.routing_weights[others])
    torch.testing.assert_close(got.routing_weights[7], wanted.routing_weights[7], equal_nan=True)
    assert got.z.isfinite() == wanted.z.isfinite()
    torch.testing.assert_close(got.mean_probabilities, wanted.mean_probabilities, equal_nan=True)


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize("num_experts", [1, 7, 8, 33])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_the_z_loss_of_logits_that_are_not_finite(
    compiled_kernels: str, bad: float, num_experts: int, scoring: str
) -> None:
    """All of a token's, one of them, and one beside an infinite one; vectors full and padded."""
    router = make_router(1, num_experts, top_k=1, scoring=scoring)
    for where, other in ((slice(None), 0.0), (0, 0.0), (-1, 0.0), (-1, float("inf")), (0, float("-inf"))):
        with torch.no_grad():
            router.weight.fill_(0.5)
            router.weight[num_experts // 2] = other
            router.weight[where] = bad
        got = router(torch.ones(3, 1)).z
        with select.forced("reference"):
            wanted = router(torch.ones(3, 1)).z
        torch.testing.assert_close(got, wanted, equal_nan=True)


@pytest.mark.parametrize("bad", [float("inf"), float("-inf")])
def test_an_infinite_logit_has_the_definition_s_gradient(compiled_kernels: str, bad: float) -> None:
    """A sigmoid is flat there. Without a z-loss nothing else sees the logit."""
    router = make_router(1, 12, top_k=2, scoring="sigmoid")
    x = torch.tensor([[0.5], [3e38]]).requires_grad_()
    with torch.no_grad():
        router.weight.abs_().mul_(1 if bad > 0 else -1)
        router.weight[3] = bad

    def gradient() -> Tensor:
        routed = router(x)
        objective = (routed.routing_weights * normal(2, 2, seed=2)).sum()
        objective = objective + (routed.mean_probabilities * normal(12, seed=3)).sum()
        return torch.autograd.grad(objective, router.weight)[0]

    got = gradient()
    with select.forced("reference"):
        wanted = gradient()
    assert wanted.isfinite().all()
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)


def test_a_choice_made_before_is_taken_again(compiled_kernels: str) -> None:
    router = make_router(24, 12, top_k=2)
    x = normal(60, 24, seed=4).requires_grad_()
    expert_ids = torch.stack([torch.arange(60) % 12, (torch.arange(60) + 5) % 12], 1)
    got = router(x, expert_ids=expert_ids)
    with select.forced("reference"):
        wanted = router(x, expert_ids=expert_ids)
    assert torch.equal(got.expert_ids, expert_ids)
    for mine, theirs in zip(gradients(got, [x]), gradients(wanted, [x]), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
    for wrong in (-1, 12):
        with pytest.raises(AssertionError, match="outside"):
            router(x, expert_ids=torch.full((60, 2), wrong))


def test_weights_renormalised_and_scaled_in_the_same_call(compiled_kernels: str) -> None:
    """What inference takes: no route is dropped, so nothing comes between the choice and the final weights."""
    library = select.cpu_library()
    assert library is not None
    x, weight = normal(50, 24, seed=4), normal(12, 24, seed=5)
    expert_ids, weights = torch.empty(50, 3, dtype=torch.int64), torch.empty(50, 3)
    floats, counts = torch.empty(14), torch.empty(13, dtype=torch.int64)
    library.function("moesaic_route", "pippppp" + "i" * 8 + "f" + "p" * 5)(
        *(x.data_ptr(), False, weight.data_ptr(), *[None] * 4, 50, 24, 12, 3, 0, 1, 1, True, 2.5),
        *(expert_ids.data_ptr(), weights.data_ptr(), None, floats.data_ptr(), counts.data_ptr()),
    )
    chosen = (x @ weight.t()).softmax(-1).topk(3)
    assert torch.equal(expert_ids, chosen.indices)
    torch.testing.assert_close(weights, chosen.values / chosen.values.sum(-1, keepdim=True) * 2.5)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("capacity", [None, 0, 500, 3000])
@pytest.mark.parametrize("padded", [False, True])
def test_a_plan_of_many_tokens_equals_the_definition(
    compiled_kernels: str, capacity: int | None, padded: bool, threads: int
) -> None:
    """More tokens than one task of the counting sort takes, an expert that nobody chose, and one that most did."""
    generator = torch.Generator().manual_seed(0)
    expert_ids = torch.randint(0, 7, (20_001, 2), generator=generator).clamp_max(4)
    valid = torch.rand(20_001, generator=generator) < 0.8 if padded else None
    got = with_threads(threads, lambda: plan_dispatch(expert_ids, 6, valid=valid, capacity=capacity))
    with select.forced("reference"):
        wanted = plan_dispatch(expert_ids, 6, valid=valid, capacity=capacity)
    for field in ("token_ids", "slots", "tokens_per_expert"):
        assert torch.equal(getattr(got, field), getattr(wanted, field)), field


@pytest.mark.parametrize("wrong", [-1, 5])
def test_an_expert_out_of_range_is_refused(compiled_kernels: str, wrong: int) -> None:
    expert_ids = torch.tensor([[0, 1], [2, wrong]])
    with pytest.raises(AssertionError, match="outside"):
        routing.plan_dispatch(expert_ids, 5)


@pytest.mark.parametrize(("scoring", "has_bias"), [("softmax", True), ("sigmoid", False)])
def test_the_operators_are_ordinary_ones(compiled_kernels: str, scoring: str, has_bias: bool) -> None:
    x, weight = normal(9, 24, seed=4).requires_grad_(), normal(12, 24, seed=5).requires_grad_()
    bias = normal(12, seed=6).requires_grad_() if has_bias else None
    valid = torch.arange(9) != 4
    arguments = (x, weight, bias, None, valid, None, 2, scoring, 1, 1)
    torch.library.opcheck(torch.ops.moesaic.route.default, arguments)
    expert_ids = torch.ops.moesaic.route(*arguments)[4]
    torch.library.opcheck(torch.ops.moesaic.plan_dispatch.default, (expert_ids, None, 12, -1))
    torch.library.opcheck(torch.ops.moesaic.plan_dispatch.default, (expert_ids, valid, 12, 1))
