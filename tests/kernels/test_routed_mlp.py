"""The experts on routed tokens equal the loop over tokens, values and every gradient, on every set of CPU kernels."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from moesaic.kernels.activation import ACTIVATIONS, is_gated
from moesaic.kernels.cpu import moe_training
from moesaic.kernels.cpu.build import supported_instruction_sets
from moesaic.kernels.grouped_mlp import ExpertWeights, grouped_mlp
from moesaic.kernels.reference import moe as reference
from moesaic.kernels.routed_mlp import routed_mlp
from moesaic.moe.dispatch import DispatchPlan, plan_dispatch

SUPPORTED = supported_instruction_sets()


def leaf(*shape: int, seed: int, scale: float = 1.0, is_whole: bool = False) -> Tensor:
    """is_whole: as is all that comes before swiglu_oai: bf16 changes no such number, and none passes a clamp's edge."""
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return (drawn.round() if is_whole else drawn * scale).bfloat16().requires_grad_()


def weights_of(activation: str, has_bias: bool, hidden: int, inner: int, experts: int) -> ExpertWeights:
    outer = 2 * inner if is_gated(activation) else inner
    is_whole = activation == "swiglu_oai"
    return ExpertWeights(
        leaf(experts, outer, hidden, seed=1, scale=hidden**-0.5, is_whole=is_whole),
        leaf(experts, hidden, inner, seed=2, scale=inner**-0.5),
        leaf(experts, outer, seed=3, is_whole=is_whole) if has_bias else None,
        leaf(experts, hidden, seed=4) if has_bias else None,
        activation,
    )


def leaves_of(weights: ExpertWeights) -> list[Tensor]:
    tensors = (weights.up, weights.down, weights.up_bias, weights.down_bias)
    return [tensor for tensor in tensors if tensor is not None]


def choose(tokens: int, experts: int, top_k: int, seed: int = 6) -> Tensor:
    noise = torch.rand(tokens, experts, generator=torch.Generator().manual_seed(seed))
    return noise.topk(top_k, dim=-1).indices


def weigh(tokens: int, top_k: int) -> Tensor:
    return torch.rand(tokens, top_k, generator=torch.Generator().manual_seed(7))


def run(x: Tensor, weights: ExpertWeights, plan: DispatchPlan, routing_weights: Tensor) -> Tensor:
    return routed_mlp(
        x,
        weights,
        tokens_per_expert=plan.tokens_per_expert,
        token_ids=plan.token_ids,
        slots=plan.slots,
        routing_weights=routing_weights,
    )


def oracle(x: Tensor, weights: ExpertWeights, plan: DispatchPlan, routing_weights: Tensor) -> Tensor:
    """In double precision: every row through its expert, then a weighted sum of each token's rows."""
    wide = weights.to(torch.float64)
    rows = reference.grouped_mlp(x.double()[plan.token_ids], plan.tokens_per_expert.tolist(), wide)
    padded = torch.cat([rows, rows.new_zeros(1, rows.shape[1])])
    return (padded[plan.slots] * routing_weights.double()[..., None]).sum(1)


def relative_error(got: Tensor, wanted: Tensor) -> float:
    return ((got.double() - wanted.double()).norm() / wanted.double().norm().clamp_min(1e-30)).item()


def compare(weights: ExpertWeights, plan: DispatchPlan, tokens: int) -> None:
    x = leaf(tokens, weights.down.shape[1], seed=0, is_whole=weights.activation == "swiglu_oai")
    generator = torch.Generator().manual_seed(5)
    routing_weights = torch.rand(plan.slots.shape, generator=generator).requires_grad_()
    grad = torch.randn(x.shape, generator=generator).bfloat16()
    leaves = [x, routing_weights, *leaves_of(weights)]
    out, wanted = run(x, weights, plan, routing_weights), oracle(x, weights, plan, routing_weights)
    assert out.dtype == x.dtype and out.shape == wanted.shape
    # A chain of about four roundings to bf16, of 2^-9 each at most.
    assert relative_error(out, wanted) < 1e-2
    got = torch.autograd.grad(out, leaves, grad)
    for mine, theirs in zip(got, torch.autograd.grad(wanted, leaves, grad.double()), strict=True):
        assert mine.dtype == theirs.dtype and relative_error(mine, theirs) < 1e-2


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_equals_the_loop(kernels: str, activation: str, has_bias: bool) -> None:
    weights = weights_of(activation, has_bias, hidden=64, inner=96, experts=5)
    compare(weights, plan_dispatch(choose(37, 5, 2), 5), 37)


@pytest.mark.parametrize(
    ("tokens", "experts", "top_k", "hidden", "inner"),
    [
        (1, 4, 1, 32, 32),  # one token
        (20, 64, 1, 32, 64),  # most experts empty
        (130, 3, 3, 160, 224),  # all tokens to all experts; columns that no chunk of 96 divides
        (300, 2, 1, 64, 128),  # many rows an expert
        (97, 1, 1, 96, 32),
        (40, 3, 1, 640, 96),  # few rows, whose gradient takes several panels at once, and not all of them
        (1100, 1, 1, 544, 32),  # more rows than one task takes; panels that do not stay in a cache
        (130, 1, 1, 2048, 32),  # rows 4 KiB apart, which are copied
        (130, 1, 1, 32, 2048),
        (500, 1, 1, 32, 32),  # two pieces, one with tiles
        (1921, 1, 1, 32, 32),  # five pieces, whose rows are no whole chunks
    ],
)
def test_awkward_sizes(kernels: str, tokens: int, experts: int, top_k: int, hidden: int, inner: int) -> None:
    weights = weights_of("swiglu", True, hidden=hidden, inner=inner, experts=experts)
    compare(weights, plan_dispatch(choose(tokens, experts, top_k), experts), tokens)


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize(
    ("tokens", "experts", "hidden", "inner"),
    [
        (200, 8, 96, 416),  # with tiles, on one thread: tasks of two chunks of the hidden columns, the last of a third
        (150, 2, 64, 416),  # of one chunk
        (70, 1, 64, 416),  # of a third, two of which are of no first chunk
        (40, 1, 2048, 224),  # weights of a task that are too much to be brought nearer beforehand, with both halves
    ],
)
def test_every_width_of_a_task(
    kernels: str, tokens: int, experts: int, hidden: int, inner: int, activation: str
) -> None:
    weights = weights_of(activation, True, hidden=hidden, inner=inner, experts=experts)
    top_k = min(2, experts)
    compare(weights, plan_dispatch(choose(tokens, experts, top_k), experts), tokens)


@pytest.mark.parametrize("top_k", [1, 2])
def test_dropped_routes_and_padding(kernels: str, top_k: int) -> None:
    weights = weights_of("swiglu", True, hidden=64, inner=32, experts=4)
    valid = torch.arange(50) % 7 != 3
    plan = plan_dispatch(choose(50, 4, top_k), 4, valid=valid, capacity=6)
    assert not plan.is_complete
    compare(weights, plan, 50)
    out = run(leaf(50, 64, seed=0), weights, plan, weigh(50, top_k))
    assert (out[~valid] == 0).all()


def test_no_token_at_all(kernels: str) -> None:
    weights = weights_of("swiglu", True, hidden=64, inner=32, experts=4)
    x = torch.zeros(0, 64, dtype=torch.bfloat16, requires_grad=True)
    plan = plan_dispatch(torch.zeros(0, 1, dtype=torch.int64), 4)
    out = run(x, weights, plan, torch.zeros(0, 1))
    for gradient in torch.autograd.grad(out.sum(), leaves_of(weights)):
        assert (gradient == 0).all()


def test_rows_already_sorted(kernels: str) -> None:
    """grouped_mlp, which expert parallelism calls, is the same without gather and combine."""
    counts = torch.tensor([7, 0, 33, 16, 1])
    weights = weights_of("gelu", True, hidden=64, inner=96, experts=5)
    x = leaf(57, 64, seed=0)
    grad = leaf(57, 64, seed=9).detach()
    out = grouped_mlp(x, counts, weights)
    wanted = reference.grouped_mlp(x.double(), counts.tolist(), weights.to(torch.float64))
    assert relative_error(out, wanted) < 1e-2
    leaves = [x, *leaves_of(weights)]
    got = torch.autograd.grad(out, leaves, grad)
    for mine, theirs in zip(got, torch.autograd.grad(wanted, leaves, grad.double()), strict=True):
        assert relative_error(mine, theirs) < 1e-2


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("activation", ["swiglu", "swiglu_oai"])
def test_bad_values_stay_with_their_token(kernels: str, activation: str, value: float) -> None:
    weights = weights_of(activation, False, hidden=64, inner=32, experts=4)
    x = leaf(40, 64, seed=0).detach()
    plan, routing_weights = plan_dispatch(choose(40, 4, 2), 4), weigh(40, 2)
    clean = run(x, weights, plan, routing_weights)
    x[11, 5] = value
    out = run(x, weights, plan, routing_weights)
    assert not out[11].isfinite().any()
    others = torch.arange(40) != 11
    assert torch.equal(out[others], clean[others])


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("where", ["x", "gradient", "routing weight"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_are_not_finite_where_the_loop_s_are_not(
    kernels: str, activation: str, where: str, value: float
) -> None:
    weights = weights_of(activation, True, hidden=64, inner=32, experts=4)
    plan, routing_weights = plan_dispatch(choose(40, 4, 2), 4), weigh(40, 2)
    x, grad = leaf(40, 64, seed=0, is_whole=activation == "swiglu_oai").detach(), leaf(40, 64, seed=9).detach()
    if where == "routing weight":
        routing_weights[11, 1] = value
    else:
        (x if where == "x" else grad)[11, 5] = value
    leaves = [x.requires_grad_(), routing_weights.requires_grad_(), *leaves_of(weights)]
    got = torch.autograd.grad(run(x, weights, plan, routing_weights), leaves, grad)
    wanted = torch.autograd.grad(oracle(x, weights, plan, routing_weights), leaves, grad.double())
    others = torch.arange(40) != 11
    for mine, theirs in zip(got, wanted, strict=True):
        is_finite = mine.isfinite()
        if activation == "swiglu_oai" and where == "x":
            # Autograd's clamp takes NaN for clamped and gives it a gradient of 0.
            assert (theirs.isfinite() | ~is_finite).all()
            continue
        assert torch.equal(is_finite, theirs.isfinite())
        assert relative_error(mine[is_finite], theirs[is_finite]) < 1e-2
    assert not got[0][11].isfinite().any() and got[0][others].isfinite().all()
    assert not got[2].isfinite().all()


def test_non_contiguous_input(kernels: str) -> None:
    weights = weights_of("swiglu", False, hidden=64, inner=32, experts=4)
    plan, routing_weights = plan_dispatch(choose(40, 4, 2), 4), weigh(40, 2)
    x = leaf(64, 40, seed=0)
    out = run(x.t(), weights, plan, routing_weights)
    assert torch.equal(out, run(x.t().contiguous(), weights, plan, routing_weights))
    (got,) = torch.autograd.grad(out, x, torch.ones(64, 40).bfloat16().t())
    assert got.shape == x.shape and got.isfinite().all()


needs_kernels = pytest.mark.skipif(not SUPPORTED, reason="the C++ kernels need an x86 processor with AVX2")


@needs_kernels
@pytest.mark.parametrize("threads", [2, 3])
def test_any_number_of_threads_gives_the_same_bits(threads: int) -> None:
    weights = weights_of("swiglu", True, hidden=64, inner=2048, experts=2)  # rows that are copied
    plan = plan_dispatch(choose(700, 2, 2), 2)  # two pieces of each expert
    x, routing_weights = leaf(700, 64, seed=0), weigh(700, 2).requires_grad_()
    leaves = [x, routing_weights, *leaves_of(weights)]

    def results() -> list[Tensor]:
        out = run(x, weights, plan, routing_weights)
        return [out, *torch.autograd.grad(out, leaves, torch.ones_like(out))]

    before = torch.get_num_threads()
    one = results()
    try:
        torch.set_num_threads(threads)
        several = results()
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(one, several, strict=True))


@needs_kernels
@pytest.mark.parametrize(
    ("name", "values", "said"),
    [
        ("token_ids", [0, 1, 2, 3, 4, 5, 6, 8], r"token_ids \(0 to 8\) must be in \[0, 8\)"),
        ("token_ids", [0, 1, 2, 3, 4, 5, 6, -1], r"token_ids \(-1 to 6\)"),
        ("slots", [[0], [1], [2], [3], [4], [5], [6], [9]], r"slots \(0 to 9\) must be in \[0, 9\)"),
        ("slots", [[-1]] * 8, "slots"),
        ("tokens_per_expert", [100, -96, 2, 2], "-96"),
        ("tokens_per_expert", [2, 2, 2, 3], r"\[2, 2, 2, 3\], 8"),
    ],
)
def test_a_routing_table_that_points_nowhere_is_refused(name: str, values: list[int], said: str) -> None:
    weights = weights_of("swiglu", False, hidden=64, inner=32, experts=4)
    table = {
        "tokens_per_expert": torch.tensor([2, 2, 2, 2]),
        "token_ids": torch.arange(8),
        "slots": torch.arange(8)[:, None],
    }
    routed_mlp(leaf(8, 64, seed=0), weights, **table, routing_weights=torch.ones(8, 1))
    table[name] = torch.tensor(values)
    with pytest.raises(AssertionError, match=said):
        routed_mlp(leaf(8, 64, seed=0), weights, **table, routing_weights=torch.ones(8, 1))


@needs_kernels
@pytest.mark.parametrize("name", ["up_bias", "down_bias"])
def test_a_bias_for_one_expert_is_refused_for_several(name: str) -> None:
    weights = weights_of("gelu", True, hidden=32, inner=32, experts=3)
    plan = plan_dispatch(choose(9, 3, 2), 3)
    alone = replace(weights, **{name: leaf(1, 32, seed=0)})
    with pytest.raises(AssertionError, match=r"torch.Size\(\[1, 32\]\)"):
        run(leaf(9, 32, seed=0), alone, plan, weigh(9, 2))


@needs_kernels
def test_keeps_input_pre_activation_and_routing_only() -> None:
    weights = weights_of("swiglu", False, hidden=64, inner=96, experts=5)
    plan = plan_dispatch(choose(64, 5, 2), 5)
    x, routing_weights = leaf(64, 64, seed=0), weigh(64, 2).requires_grad_()
    saved: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        saved[tensor.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run(x, weights, plan, routing_weights)
    parameters = {weights.up.data_ptr(), weights.down.data_ptr()}
    kept = sum(tensor.nbytes for address, tensor in saved.items() if address not in parameters)
    routing = routing_weights.nbytes + plan.slots.nbytes + plan.token_ids.nbytes + plan.tokens_per_expert.nbytes
    assert kept == x.nbytes + 128 * 2 * 96 * 2 + routing


@pytest.mark.parametrize("trained", ["x", "up", "down", "up_bias", "down_bias", "routing_weights"])
@pytest.mark.parametrize("has_bias", [True, False])
def test_what_is_frozen_has_no_gradient_and_the_others_have_theirs(kernels: str, trained: str, has_bias: bool) -> None:
    if not has_bias and trained.endswith("bias"):
        pytest.skip("there is none")
    plan = plan_dispatch(choose(150, 5, 2), 6)  # the last one has no token
    grad = torch.randn(150, 64, generator=torch.Generator().manual_seed(5)).bfloat16()
    found = []
    for is_alone in (False, True):
        weights = weights_of("swiglu", has_bias, hidden=64, inner=224, experts=6)
        leaves = {"x": leaf(150, 64, seed=0), "routing_weights": weigh(150, 2).requires_grad_()}
        leaves |= {name: getattr(weights, name) for name in ("up", "down", "up_bias", "down_bias")}
        for name, tensor in leaves.items():
            if tensor is not None:
                tensor.requires_grad_(name == trained or not is_alone)
        run(leaves["x"], weights, plan, leaves["routing_weights"]).backward(grad)
        found.append({name: tensor.grad for name, tensor in leaves.items() if tensor is not None})
    assert torch.equal(found[1].pop(trained), found[0][trained])
    assert set(found[1].values()) == {None}


@needs_kernels
def test_is_an_ordinary_operator() -> None:
    weights = weights_of("swiglu", True, hidden=32, inner=32, experts=3)
    plan = plan_dispatch(choose(9, 3, 2), 3)
    arguments = (
        leaf(9, 32, seed=0), plan.tokens_per_expert, plan.token_ids, plan.slots,
        weigh(9, 2).requires_grad_(), weights.up, weights.up_bias, weights.down, weights.down_bias, "swiglu",
    )  # fmt: skip
    torch.library.opcheck(moe_training.routed_mlp, arguments, test_utils=("test_schema", "test_faketensor"))
    torch.library.opcheck(moe_training.routed_mlp, arguments, test_utils="test_autograd_registration")


@needs_kernels
def test_autocast_computes_in_bf16() -> None:
    weights = weights_of("swiglu", True, hidden=64, inner=32, experts=4)
    plan, routing_weights = plan_dispatch(choose(40, 4, 2), 4), weigh(40, 2)
    x = leaf(40, 64, seed=0).detach()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = run(x.float(), weights.to(torch.float32), plan, routing_weights)
    assert torch.equal(out, run(x, weights, plan, routing_weights))


@needs_kernels
def test_autocast_leaves_double_precision_alone() -> None:
    weights = weights_of("swiglu", True, hidden=64, inner=32, experts=4).to(torch.float64)
    plan, routing_weights = plan_dispatch(choose(40, 4, 1), 4), weigh(40, 1)
    x = leaf(40, 64, seed=0).double()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, rows = run(x, weights, plan, routing_weights), grouped_mlp(x, torch.tensor([40, 0, 0, 0]), weights)
    assert out.dtype == rows.dtype == torch.float64
    torch.testing.assert_close(out, oracle(x, weights, plan, routing_weights))
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(AssertionError, match="float64"):
        torch.ops.moesaic.routed_mlp(
            x, plan.tokens_per_expert, plan.token_ids, plan.slots, routing_weights, weights.up, weights.up_bias,
            weights.down, weights.down_bias, weights.activation,
        )  # fmt: skip


@needs_kernels
def test_checkpointing_recomputes_the_same() -> None:
    from torch.utils.checkpoint import checkpoint

    weights = weights_of("swiglu", False, hidden=64, inner=32, experts=4)
    plan, routing_weights = plan_dispatch(choose(40, 4, 2), 4), weigh(40, 2)
    x = leaf(40, 64, seed=0)

    def gradients(function: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(function(x).float().square().sum(), [x, *leaves_of(weights)])

    def layer(rows: Tensor) -> Tensor:
        return run(rows, weights, plan, routing_weights)

    plain = gradients(layer)
    again = gradients(lambda rows: checkpoint(layer, rows, use_reentrant=False))
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
