"""The MoE layer equals the naive loop over tokens: output, both losses, the gradient of x and of every parameter."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from moesaic.config.model import CapacityConfig, FeedForwardConfig, RouterConfig
from moesaic.errors import ConfigError
from moesaic.kernels.grouped_mlp import ExpertWeights
from moesaic.kernels.reference import moe as reference
from moesaic.model.norm import make_norm
from moesaic.moe.balance import balance_loss
from moesaic.moe.dispatch import expert_capacity
from moesaic.moe.layer import MoELayer, MoEStatistics
from moesaic.moe.seeds import generator, mix_seeds

NUM_TOKENS, HIDDEN, INNER, NUM_EXPERTS = 37, 24, 40, 5
CPU = torch.device("cpu")


def make_layer(
    *,
    top_k: int = 2,
    num_experts: int = NUM_EXPERTS,
    activation: str = "swiglu",
    has_bias: bool = True,
    router: dict[str, Any] | None = None,
    capacity: dict[str, Any] | None = None,
    output_scale: bool = False,
) -> MoELayer:
    config = FeedForwardConfig(
        intermediate_size=0,
        num_experts=num_experts,
        top_k=top_k,
        expert_intermediate_size=INNER,
        router=RouterConfig(**(router or {})),
        capacity=CapacityConfig(**(capacity or {})),
        output_scale=output_scale,
    )
    layer = MoELayer(HIDDEN, config, activation=activation, has_bias=has_bias)
    drawn = torch.Generator().manual_seed(0)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=drawn)
    return layer


def tokens(num_tokens: int = NUM_TOKENS, dtype: torch.dtype = torch.float32) -> Tensor:
    drawn = torch.randn(num_tokens, HIDDEN, generator=torch.Generator().manual_seed(1))
    return drawn.to(dtype).requires_grad_()


@dataclass(frozen=True)
class Naive:
    out: Tensor
    balance_loss: Tensor
    z: Tensor
    kept: Tensor
    expert_ids: Tensor


def naive_layer(layer: MoELayer, x: Tensor, valid: Tensor | None, seed: int, dtype: torch.dtype) -> Naive:
    """The definition, in fp32 arithmetic on what `dtype` holds of x and of the experts' weights."""
    config, num_tokens = layer.config, x.shape[0]
    is_valid = torch.ones(num_tokens, dtype=torch.bool) if valid is None else valid
    logits = x.float() @ layer.router.weight.t()
    scores = logits.softmax(-1) if config.router.scoring == "softmax" else logits.sigmoid()
    expert_ids = scores.topk(config.top_k, dim=-1).indices
    kept = torch.zeros(num_tokens, config.top_k, dtype=torch.bool)
    if layer.training and config.capacity.factor is not None:
        capacity = expert_capacity(int(is_valid.sum()), config.num_experts, top_k=config.top_k, config=config.capacity)
    else:
        capacity = None
    priority = {
        "position": torch.zeros(num_tokens, config.top_k),
        "probability": scores.detach().gather(1, expert_ids),
        "random": torch.rand(num_tokens, config.top_k, generator=generator(CPU, mix_seeds(seed, 1))),
    }[config.capacity.drop_policy]
    for expert in range(config.num_experts):
        routes = [
            (-priority[token, choice].item(), choice, token)
            for choice in range(config.top_k)
            for token in range(num_tokens)
            if is_valid[token] and expert_ids[token, choice] == expert
        ]
        for _, choice, token in sorted(routes)[:capacity]:
            kept[token, choice] = True
    weights = scores.gather(1, expert_ids) * kept
    if config.router.renormalize:
        weights = weights / weights.sum(-1, keepdim=True).clamp_min(1e-20)
    weights = weights * config.router.scale
    if layer.output_scale is not None:
        weights = weights * layer.output_scale
    stacked = layer.experts.weights().to(dtype).to(torch.float32)
    out = reference.moe_per_token(x.float(), expert_ids, weights, kept, stacked)

    count = max(int(is_valid.sum()), 1)
    probabilities = (scores / scores.sum(-1, keepdim=True))[is_valid].sum(0) / count
    share = torch.zeros(config.num_experts)
    for token in range(num_tokens):
        for expert in expert_ids[token].tolist():
            share[expert] += is_valid[token] / (count * config.top_k)
    balance = config.num_experts * (probabilities * share).sum()
    z = logits[is_valid].logsumexp(-1).square().sum() / count
    return Naive(out, balance, z, kept, expert_ids)


def relative_error(got: Tensor, wanted: Tensor) -> float:
    return ((got.double() - wanted.double()).norm() / wanted.double().norm().clamp_min(1e-30)).item()


def compare(
    layer: MoELayer, x: Tensor, *, valid: Tensor | None = None, seed: int = 3
) -> tuple[Tensor, MoEStatistics, Naive]:
    out, statistics = layer(x, valid=valid, seed=seed)
    naive = naive_layer(layer, x, valid, seed, x.dtype)
    assert out.dtype == x.dtype and out.shape == x.shape
    balance = balance_loss(statistics.mean_probabilities, statistics.tokens_per_expert)
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(2)).to(x.dtype)
    leaves = {"x": x, **dict(layer.named_parameters())}
    objective = (out * grad).float().sum() + 3 * balance + 0.5 * statistics.z
    wanted_objective = (naive.out * grad.float()).sum() + 3 * naive.balance_loss + 0.5 * naive.z
    got = torch.autograd.grad(objective, leaves.values(), allow_unused=True)
    wanted = torch.autograd.grad(wanted_objective, leaves.values(), allow_unused=True)
    # fp32: sums of 40 to 80 products. bf16: the router is fp32 and chooses the same; the experts round about five times
    # on the way, 2^-9 each.
    tolerance = 1e-5 if x.dtype == torch.float32 else 1.5e-2
    assert relative_error(out, naive.out) < tolerance
    assert relative_error(balance, naive.balance_loss) < 1e-5
    assert relative_error(statistics.z, naive.z) < 1e-5
    for name, mine, theirs in zip(leaves, got, wanted, strict=True):
        assert mine is not None, name
        assert relative_error(mine, torch.zeros_like(mine) if theirs is None else theirs) < tolerance, name
    kept = naive.kept.sum().item()
    routes = (x.shape[0] if valid is None else int(valid.sum())) * layer.config.top_k
    assert statistics.drop_rate == pytest.approx((routes - kept) / max(routes, 1), abs=1e-6)
    assert statistics.decision is not None
    plan = statistics.decision.plan
    assert torch.equal(naive.kept, torch.ones_like(naive.kept) if plan.kept is None else plan.kept)
    return out, statistics, naive


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "swiglu", "swiglu_oai"])
def test_dropless(activation: str, has_bias: bool, top_k: int, dtype: torch.dtype) -> None:
    compare(make_layer(top_k=top_k, activation=activation, has_bias=has_bias), tokens(dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("policy", ["position", "probability", "random"])
@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("padded", [False, True])
def test_each_drop_policy(policy: str, top_k: int, padded: bool, dtype: torch.dtype) -> None:
    layer = make_layer(top_k=top_k, capacity={"factor": 0.7, "drop_policy": policy})
    valid = torch.rand(NUM_TOKENS, generator=torch.Generator().manual_seed(4)) < 0.6 if padded else None
    _, statistics, _ = compare(layer, tokens(dtype=dtype), valid=valid)
    assert 0 < statistics.drop_rate < 1


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize("factor", [None, 0.7])
@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_renormalised_over_the_kept_and_scaled(scoring: str, factor: float | None, scale: float) -> None:
    capacity = {} if factor is None else {"factor": factor}
    layer = make_layer(router={"scoring": scoring, "renormalize": True, "scale": scale}, capacity=capacity)
    compare(layer, tokens())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("factor", [None, 0.7])
@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("value", [0.0, 0.6, -1.5])
def test_a_learned_factor_on_the_output(value: float, top_k: int, factor: float | None, dtype: torch.dtype) -> None:
    """At 0 too the factor has its gradient, and x, router and experts have none of the output's."""
    router = {"scale": 2.5, "renormalize": top_k > 1}
    layer = make_layer(
        top_k=top_k, router=router, capacity={} if factor is None else {"factor": factor}, output_scale=True
    )
    assert layer.output_scale is not None and layer.output_scale.shape == ()
    with torch.no_grad():
        layer.output_scale.fill_(value)
    x = tokens(dtype=dtype)
    out, _, _ = compare(layer, x)
    if value == 0.0:
        assert torch.count_nonzero(out) == 0
        grad, *others = torch.autograd.grad(layer(x)[0].sum(), [layer.output_scale, x, *layer.experts.parameters()])
        assert grad != 0 and not any(torch.count_nonzero(each) for each in others)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("factor", [None, 0.5, 1000.0])
@pytest.mark.parametrize("num_tokens", [1, 2])
def test_one_token_and_two(num_tokens: int, factor: float | None, dtype: torch.dtype) -> None:
    layer = make_layer(capacity={} if factor is None else {"factor": factor})
    _, statistics, _ = compare(layer, tokens(num_tokens, dtype))
    assert statistics.drop_rate == 0.0


@pytest.mark.parametrize("factor", [None, 1.0])
def test_an_empty_expert_has_a_gradient_of_exact_zeros(factor: float | None) -> None:
    layer = make_layer(capacity={} if factor is None else {"factor": factor})
    x = (tokens().detach().abs()).requires_grad_()
    with torch.no_grad():
        layer.router.weight[2] = -5.0
    _, statistics, _ = compare(layer, x)
    assert statistics.tokens_per_expert[2] == 0
    for grad in torch.autograd.grad(layer(x)[0].sum(), list(layer.experts.parameters())):
        assert torch.count_nonzero(grad[2]) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("factor", [None, 1.0])
def test_all_tokens_to_one_expert(factor: float | None, top_k: int, dtype: torch.dtype) -> None:
    layer = make_layer(top_k=top_k, capacity={} if factor is None else {"factor": factor})
    x = (tokens().detach().abs() * 0.3).to(dtype).requires_grad_()
    with torch.no_grad():
        layer.router.weight[2] = 0.5
    _, statistics, naive = compare(layer, x)
    assert statistics.tokens_per_expert[2] == NUM_TOKENS
    if factor is not None and top_k == 1:
        assert statistics.drop_rate == pytest.approx(1 - math.ceil(NUM_TOKENS / NUM_EXPERTS) / NUM_TOKENS)
        assert torch.count_nonzero(naive.out[math.ceil(NUM_TOKENS / NUM_EXPERTS) :]) == 0


def test_more_capacity_than_tokens_is_dropless_bit_for_bit() -> None:
    roomy, dropless = make_layer(capacity={"factor": 1000.0}), make_layer()
    x = tokens()
    out, statistics, _ = compare(roomy, x)
    assert statistics.drop_rate == 0.0
    assert torch.equal(out, dropless(x)[0])


def test_one_expert() -> None:
    compare(make_layer(num_experts=1, top_k=1), tokens())


@pytest.mark.parametrize("num_tokens", [0, 3])
@pytest.mark.parametrize("factor", [None, 1.0])
@pytest.mark.parametrize("policy", ["position", "probability", "random"])
def test_no_tokens_and_nothing_but_padding(num_tokens: int, factor: float | None, policy: str) -> None:
    layer = make_layer(capacity={} if factor is None else {"factor": factor, "drop_policy": policy})
    x = tokens(num_tokens)
    out, statistics = layer(x, valid=torch.zeros(num_tokens, dtype=torch.bool))
    assert torch.equal(out, torch.zeros(num_tokens, HIDDEN))
    assert statistics.num_tokens == statistics.drop_rate == statistics.z == statistics.entropy == 0
    objective = out.sum() + balance_loss(statistics.mean_probabilities, statistics.tokens_per_expert)
    for grad in torch.autograd.grad(objective, [x, *layer.parameters()]):
        assert torch.count_nonzero(grad) == 0


@pytest.mark.parametrize("policy", ["position", "probability"])
def test_padding_changes_nothing_for_the_others(policy: str) -> None:
    """Not the output, no statistic, no gradient; and the padding's own rows are exact zeros."""
    layer = make_layer(capacity={"factor": 0.7, "drop_policy": policy})
    short = tokens(23)
    padded = torch.cat([short.detach(), 100 * torch.ones(14, HIDDEN)]).requires_grad_()
    valid = torch.arange(37) < 23
    wanted, alone = layer(short)
    out, statistics = layer(padded, valid=valid)
    torch.testing.assert_close(out[:23], wanted)
    assert torch.count_nonzero(out[23:]) == 0
    assert torch.equal(statistics.tokens_per_expert, alone.tokens_per_expert)
    for name in ("mean_probabilities", "z", "entropy", "drop_rate", "num_tokens"):
        torch.testing.assert_close(getattr(statistics, name), getattr(alone, name))

    def objective(output: Tensor, of: MoEStatistics) -> Tensor:
        return output.square().sum() + balance_loss(of.mean_probabilities, of.tokens_per_expert) + of.z

    parameters = list(layer.parameters())
    grad_x, *got = torch.autograd.grad(objective(out, statistics), [padded, *parameters])
    expected_x, *expected = torch.autograd.grad(objective(wanted, alone), [short, *parameters])
    torch.testing.assert_close(grad_x[:23], expected_x)
    assert torch.count_nonzero(grad_x[23:]) == 0
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("policy", ["position", "probability", "random"])
def test_evaluation_never_drops_and_has_no_noise(policy: str) -> None:
    capacity = {"factor": 0.3, "min_capacity": 1, "drop_policy": policy}
    layer = make_layer(capacity=capacity, router={"noise": "rsample"})
    x = tokens()
    assert layer(x, seed=1)[1].drop_rate > 0.3
    layer.eval()
    out, statistics, _ = compare(layer, x)
    assert statistics.drop_rate == 0.0
    assert torch.equal(layer(x, seed=99)[0], out)
    assert torch.equal(make_layer().eval()(x)[0], out), "the same weights without noise and capacity"


def test_random_dropping_is_fair_and_repeatable() -> None:
    layer = make_layer(top_k=1, capacity={"factor": 0.5, "drop_policy": "random"})
    x = torch.ones(40, HIDDEN)  # all to one expert, of capacity 4
    kept = torch.zeros(40)
    rounds = 600
    for seed in range(rounds):
        _, statistics = layer(x, seed=seed)
        assert statistics.decision is not None and statistics.decision.plan.kept is not None
        kept += statistics.decision.plan.kept[:, 0]
    assert kept.sum() == 4 * rounds
    # Each is kept in a tenth of the rounds: 60, with a standard deviation of 7.3; five of them.
    assert (kept - 60).abs().max() < 37
    assert torch.equal(layer(x, seed=5)[0], layer(x, seed=5)[0])
    assert not torch.equal(layer(x, seed=5)[0], layer(x, seed=6)[0])


@pytest.mark.parametrize("noise", ["none", "jitter", "rsample"])
@pytest.mark.parametrize("capacity", [{}, {"factor": 0.7, "drop_policy": "random"}])
def test_a_replay_is_the_same_pass_bit_for_bit(noise: str, capacity: dict[str, Any]) -> None:
    layer = make_layer(router={"noise": noise, "renormalize": True}, capacity=capacity)
    x = tokens()

    def run(seed: int, replay: Any) -> tuple[Tensor, MoEStatistics, tuple[Tensor, ...]]:
        out, statistics = layer(x, seed=seed, replay=replay)
        objective = out.square().sum() + statistics.z
        return out, statistics, torch.autograd.grad(objective, [x, *layer.parameters()])

    out, statistics, grads = run(7, None)
    again, replayed, same_grads = run(7, statistics.decision)
    assert torch.equal(out, again)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(grads, same_grads, strict=True))
    assert torch.equal(statistics.tokens_per_expert, replayed.tokens_per_expert)
    assert torch.equal(statistics.drop_rate, replayed.drop_rate)


def test_a_replay_holds_where_the_router_would_choose_anew() -> None:
    layer = make_layer(capacity={"factor": 0.7})
    x = tokens()
    _, statistics = layer(x)
    with torch.no_grad():
        layer.router.weight.neg_()
    assert statistics.decision is not None
    _, replayed = layer(x, replay=statistics.decision)
    _, anew = layer(x)
    assert torch.equal(replayed.tokens_per_expert, statistics.tokens_per_expert)
    assert not torch.equal(anew.tokens_per_expert, statistics.tokens_per_expert)


def test_a_forward_pass_changes_no_state() -> None:
    layer = make_layer(router={"score_correction_bias": True, "noise": "jitter"}, capacity={"factor": 1.0})
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    layer(tokens(), seed=1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())


def test_equals_the_one_hot_einsum_of_2022() -> None:
    layer = make_layer(capacity={"factor": 0.7})
    x = tokens()
    out, statistics = layer(x)
    assert statistics.decision is not None
    expert_ids = statistics.decision.expert_ids
    weights = (x @ layer.router.weight.t()).softmax(-1).gather(1, expert_ids)
    capacity = expert_capacity(NUM_TOKENS, NUM_EXPERTS, top_k=2, config=layer.config.capacity)
    assert capacity is not None
    mask, combine = reference.one_hot_masks(expert_ids, weights, NUM_EXPERTS, capacity)
    expert_inputs = reference.one_hot_dispatch(x, mask)
    stacked: ExpertWeights = layer.experts.weights()
    outputs = torch.stack([reference.mlp(rows, stacked, expert) for expert, rows in enumerate(expert_inputs)])
    wanted = reference.one_hot_combine(outputs, combine)
    torch.testing.assert_close(out, wanted)
    leaves = [x, *layer.parameters()]
    got = torch.autograd.grad(out.square().sum(), leaves)
    for mine, theirs in zip(got, torch.autograd.grad(wanted.square().sum(), leaves), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(1, HIDDEN), (2, 3, HIDDEN), (2, 1, 3, HIDDEN), (0, HIDDEN), (2, 0, HIDDEN)])
@pytest.mark.parametrize("is_padded", [False, True])
def test_any_shape_of_tokens_is_their_rows(shape: tuple[int, ...], is_padded: bool) -> None:
    layer, x = make_layer(), torch.randn(shape, generator=torch.Generator().manual_seed(1))
    valid = torch.arange(x[..., 0].numel()).view(shape[:-1]) % 3 > 0 if is_padded else None
    out, statistics = layer(x, valid=valid)
    wanted, wanted_statistics = layer(x.reshape(-1, HIDDEN), valid=None if valid is None else valid.flatten())
    assert out.shape == shape and torch.equal(out.view(-1, HIDDEN), wanted)
    assert torch.equal(statistics.tokens_per_expert, wanted_statistics.tokens_per_expert)
    transposed = x.transpose(0, -2).contiguous().transpose(0, -2)
    assert torch.equal(layer(transposed, valid=valid)[0], out)


@pytest.mark.parametrize(
    ("x", "valid", "message"),
    [
        (torch.zeros(3, 5), None, r"x of shape \(3, 5\) .*; \(\.\.\., 24\) of floating point, .* is required; make"),
        (torch.zeros(HIDDEN), None, r"x of shape \(24,\)"),
        (torch.zeros(3, HIDDEN, dtype=torch.int64), None, "torch.int64 was given"),
        (torch.zeros(3, HIDDEN), torch.ones(2, dtype=torch.bool), r"valid of shape \(2,\) .*; \(3,\) of torch.bool"),
        (torch.zeros(2, 3, HIDDEN), torch.ones(6, dtype=torch.bool), r"valid of shape \(6,\) .*; \(2, 3\)"),
        (torch.zeros(3, HIDDEN), torch.ones(3), r"and torch.float32 was given .*mask.bool\(\)"),
    ],
)
def test_what_it_cannot_take_is_refused(x: Tensor, valid: Tensor | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_layer()(x, valid=valid)


def test_a_layer_that_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"num_experts \(0\) .* is that of a dense layer; .*; give num_experts"):
        MoELayer(HIDDEN, FeedForwardConfig(intermediate_size=8), activation="gelu", has_bias=False)
    with pytest.raises(ConfigError, match=r"activation \('relu'\) is not known; one of gelu, gelu_tanh, swiglu"):
        make_layer(activation="relu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_what_a_hook_keeps_in_another_layout_gives_the_same_gradients(dtype: torch.dtype, activation: str) -> None:
    """As offloading and compressing hooks may: equal numbers, whatever their strides."""

    def turned(kept: Tensor) -> Tensor:
        return kept.transpose(-1, -2).contiguous().transpose(-1, -2) if kept.dim() >= 2 else kept

    def gradients(unpack: Callable[[Tensor], Tensor]) -> list[Tensor]:
        config = FeedForwardConfig(intermediate_size=0, num_experts=4, top_k=2, expert_intermediate_size=64)
        layer, norm = MoELayer(32, config, activation=activation, has_bias=False), make_norm("layernorm", 32, 1e-5)
        drawn = torch.Generator().manual_seed(0)
        for parameter in layer.parameters():
            torch.nn.init.normal_(parameter, std=0.2, generator=drawn)
        x = torch.randn(37, 32, generator=drawn).to(dtype).requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(lambda kept: kept.detach(), unpack):
            out, statistics = layer(norm(x))
        loss = out.float().square().sum() + balance_loss(statistics.mean_probabilities, statistics.tokens_per_expert)
        return list(torch.autograd.grad(loss, [x, *layer.parameters(), *norm.parameters()]))

    for got, wanted in zip(gradients(turned), gradients(lambda kept: kept), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))
