"""The router's choice, weights and statistics equal their definitions, written as loops."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from moesaic.config.model import RouterConfig
from moesaic.moe.router import Router, finish_weights

NUM_TOKENS, HIDDEN = 37, 24


def router(num_experts: int = 5, top_k: int = 2, seed: int = 0, **config: Any) -> Router:
    module = Router(HIDDEN, num_experts, top_k=top_k, config=RouterConfig(**config))
    drawn = torch.Generator().manual_seed(seed)
    torch.nn.init.normal_(module.weight, std=0.3, generator=drawn)
    if module.bias is not None:
        torch.nn.init.normal_(module.bias, generator=drawn)
    return module


def tokens(num_tokens: int = NUM_TOKENS, seed: int = 1) -> Tensor:
    return torch.randn(num_tokens, HIDDEN, generator=torch.Generator().manual_seed(seed))


def scores_of(module: Router, x: Tensor) -> Tensor:
    logits = x @ module.weight.t()
    if module.bias is not None:
        logits = logits + module.bias
    return logits.softmax(-1) if module.config.scoring == "softmax" else logits.sigmoid()


def best(values: list[float], count: int) -> list[int]:
    return sorted(range(len(values)), key=lambda index: -values[index])[:count]


def chosen_by_definition(scores: Tensor, bias: Tensor, top_k: int, config: RouterConfig) -> list[list[int]]:
    choices = []
    for row in (scores + bias).tolist():
        size = len(row) // config.num_groups
        groups = [range(group * size, (group + 1) * size) for group in range(config.num_groups)]
        counted = 1 if config.scoring == "softmax" else 2
        group_scores = [sum(sorted((row[index] for index in group), reverse=True)[:counted]) for group in groups]
        is_open = set(best(group_scores, config.top_groups)) if config.num_groups > 1 else {0}
        row = [value if index // size in is_open else -math.inf for index, value in enumerate(row)]
        choices.append(best(row, top_k))
    return choices


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize(
    ("num_experts", "groups"), [(5, (1, 1)), (12, (4, 2)), (12, (3, 1)), (12, (4, 4)), (12, (12, 3)), (3, (1, 1))]
)
@pytest.mark.parametrize("has_biases", [False, True])
def test_the_choice_and_its_weights(
    num_experts: int, groups: tuple[int, int], top_k: int, scoring: str, has_biases: bool
) -> None:
    config = {"num_groups": groups[0], "top_groups": groups[1], "score_correction_bias": has_biases, "bias": has_biases}
    module = router(num_experts, top_k, scoring=scoring, **config)
    bias = torch.zeros(num_experts)
    if module.score_correction_bias is not None:
        bias = torch.randn(num_experts, generator=torch.Generator().manual_seed(2)) * 0.3
        module.score_correction_bias.copy_(bias)
    x = tokens()
    routing = module(x)
    scores = scores_of(module, x)
    assert routing.expert_ids.tolist() == chosen_by_definition(scores, bias, top_k, module.config)
    torch.testing.assert_close(routing.routing_weights, scores.gather(1, routing.expert_ids))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_in_fp32_whatever_comes_in(dtype: torch.dtype) -> None:
    module = router()
    x = tokens().to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        routing = module(x)
    torch.testing.assert_close(routing.routing_weights, scores_of(module, x.float()).gather(1, routing.expert_ids))
    for value in (routing.routing_weights, routing.mean_probabilities, routing.z, routing.entropy):
        assert value.dtype == torch.float32
    assert routing.expert_ids.dtype == routing.tokens_per_expert.dtype == torch.int64


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize("padded", [False, True])
def test_the_statistics_are_those_of_the_valid_tokens(scoring: str, padded: bool) -> None:
    module = router(scoring=scoring)
    x = tokens()
    valid = torch.rand(NUM_TOKENS, generator=torch.Generator().manual_seed(3)) < 0.6 if padded else None
    routing = module(x, valid=valid)
    kept = x if valid is None else x[valid]
    scores = scores_of(module, kept)
    probabilities = scores / scores.sum(-1, keepdim=True)
    chosen = routing.expert_ids if valid is None else routing.expert_ids[valid]
    assert routing.num_tokens == len(kept)
    assert routing.tokens_per_expert.tolist() == [(chosen == expert).sum().item() for expert in range(5)]
    torch.testing.assert_close(routing.mean_probabilities, probabilities.mean(0))
    torch.testing.assert_close(routing.mean_probabilities.sum(), torch.tensor(1.0))
    torch.testing.assert_close(routing.z, (kept @ module.weight.t()).logsumexp(-1).square().mean())
    entropy = -(probabilities * probabilities.log()).sum(-1).mean() / math.log(5)
    torch.testing.assert_close(routing.entropy, entropy)


def test_padding_gives_the_router_no_gradient() -> None:
    module = router()
    x = tokens().requires_grad_()
    valid = torch.arange(NUM_TOKENS) < 20
    routing = module(x, valid=valid)
    objective = routing.z + (routing.mean_probabilities * torch.arange(5)).sum()
    grad_x, grad_weight = torch.autograd.grad(objective, (x, module.weight))
    assert torch.count_nonzero(grad_x[20:]) == 0
    alone = module(x[:20])
    (wanted,) = torch.autograd.grad(alone.z + (alone.mean_probabilities * torch.arange(5)).sum(), module.weight)
    torch.testing.assert_close(grad_weight, wanted)


def test_entropy_is_between_zero_and_one() -> None:
    module = router()
    with torch.no_grad():
        module.weight.zero_()
        assert module(tokens()).entropy == pytest.approx(1.0)
        module.weight[2] = 100.0
        assert module(torch.ones(3, HIDDEN)).entropy == pytest.approx(0.0)
    assert router(1, 1)(tokens()).entropy == 0.0


def test_sigmoid_scores_that_all_underflow_stay_finite() -> None:
    module = router(scoring="sigmoid")
    with torch.no_grad():
        module.weight.fill_(-100.0)
    routing = module(torch.ones(2, HIDDEN))
    for value in (
        routing.mean_probabilities,
        routing.entropy,
        finish_weights(routing.routing_weights, None, module.config),
    ):
        assert value.isfinite().all()


@pytest.mark.parametrize("num_groups", [1, 2])
def test_no_tokens(num_groups: int) -> None:
    routing = router(4, 2, num_groups=num_groups)(tokens(0))
    assert routing.expert_ids.shape == (0, 2)
    assert routing.num_tokens == routing.z == routing.entropy == 0
    assert routing.tokens_per_expert.tolist() == [0, 0, 0, 0]


def test_the_bias_changes_the_choice_and_never_the_weights() -> None:
    module = router(score_correction_bias=True)
    assert module.score_correction_bias is not None
    x = tokens()
    before = module(x)
    module.score_correction_bias[4] = 10.0
    after = module(x)
    assert (after.expert_ids[:, 0] == 4).all()
    torch.testing.assert_close(after.routing_weights[:, 0], scores_of(module, x)[:, 4])
    torch.testing.assert_close(after.mean_probabilities, before.mean_probabilities)


def test_the_bias_is_saved_and_is_no_parameter() -> None:
    module = router(score_correction_bias=True)
    assert "score_correction_bias" in module.state_dict()
    assert [name for name, _ in module.named_parameters()] == ["weight"]
    assert "score_correction_bias" not in router().state_dict()


def test_one_update_of_the_bias_is_its_definition() -> None:
    module = router(4, score_correction_bias=True, score_correction_rate=0.1)
    assert module.score_correction_bias is not None
    module.update_score_correction(torch.tensor([10, 2, 3, 5]))  # mean 5: -, +, +, 0, then centred by 0.025
    torch.testing.assert_close(module.score_correction_bias, torch.tensor([-0.125, 0.075, 0.075, -0.025]))
    before = module.score_correction_bias.clone()
    module.update_score_correction(torch.full((4,), 2**30 + 1))
    torch.testing.assert_close(module.score_correction_bias, before)


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_updates_of_the_bias_lead_to_balance(scoring: str) -> None:
    module = router(8, 2, scoring=scoring, score_correction_bias=True, score_correction_rate=0.01)
    with torch.no_grad():
        module.weight[0] += 0.2
        x = tokens(512).add_(0.3)
        before = module(x).tokens_per_expert
        for _ in range(150):
            module.update_score_correction(module(x).tokens_per_expert)
            assert module.score_correction_bias is not None
            assert abs(module.score_correction_bias.mean().item()) < 1e-6
        after = module(x).tokens_per_expert
    mean = 512 * 2 / 8
    assert before.max() > 1.8 * mean
    assert after.max() < 1.2 * mean and after.min() > 0.8 * mean


def test_jitter_is_a_factor_near_one_in_training_only() -> None:
    module = router(noise="jitter", jitter_epsilon=0.1)
    x = tokens()
    draw = torch.rand(x.shape, generator=torch.Generator().manual_seed(5))
    jittered = module(x, seed=5)
    wanted = scores_of(module, x * (0.9 + 0.2 * draw))
    torch.testing.assert_close(jittered.routing_weights, wanted.gather(1, jittered.expert_ids))
    assert torch.equal(module(x, seed=5).routing_weights, jittered.routing_weights)
    assert not torch.equal(module(x, seed=6).routing_weights, jittered.routing_weights)
    quiet = module.eval()(x, seed=5)
    torch.testing.assert_close(quiet.routing_weights, scores_of(module, x).gather(1, quiet.expert_ids))


def test_noise_leaves_the_global_generator_alone() -> None:
    modules = [router(noise=noise) for noise in ("jitter", "rsample")]
    torch.manual_seed(0)
    state = torch.get_rng_state()
    for module in modules:
        module(tokens(), seed=1)
    assert torch.equal(torch.get_rng_state(), state)


def test_rsample_draws_from_the_softmax() -> None:
    module = router(5, 1, noise="rsample")
    x = tokens(1).expand(40_000, -1)
    routing = module(x, seed=3)
    probabilities = scores_of(module, x[:1])[0]
    frequencies = routing.tokens_per_expert / 40_000
    # Four standard deviations of a frequency over 40,000 draws: at most 4 * sqrt(0.25 / 40,000).
    assert (frequencies - probabilities).abs().max() < 0.01
    torch.testing.assert_close(routing.routing_weights[:, 0], probabilities[routing.expert_ids[:, 0]])
    assert torch.equal(module(x, seed=3).expert_ids, routing.expert_ids)
    assert not torch.equal(module(x, seed=4).expert_ids, routing.expert_ids)
    assert (module.eval()(x, seed=3).expert_ids == probabilities.argmax()).all()


def test_rsample_of_several_is_a_draw_without_replacement() -> None:
    module = router(3, 2, noise="rsample")
    x = tokens(1).expand(40_000, -1)
    expert_ids = module(x, seed=3).expert_ids
    p = scores_of(module, x[:1])[0].tolist()
    for first in range(3):
        for second in range(3):
            share = ((expert_ids[:, 0] == first) & (expert_ids[:, 1] == second)).float().mean().item()
            wanted = 0.0 if first == second else p[first] * p[second] / (1 - p[first])
            assert abs(share - wanted) < 0.01


def test_a_replayed_choice_gets_this_pass_s_weights() -> None:
    module = router()
    x = tokens()
    expert_ids = torch.stack([torch.arange(NUM_TOKENS) % 5, (torch.arange(NUM_TOKENS) + 2) % 5], 1)
    routing = module(x, expert_ids=expert_ids)
    assert torch.equal(routing.expert_ids, expert_ids)
    torch.testing.assert_close(routing.routing_weights, scores_of(module, x).gather(1, expert_ids))


def test_weights_are_renormalised_over_the_kept_then_scaled() -> None:
    weights = torch.tensor([[0.5, 0.3], [0.4, 0.1], [0.2, 0.2]])
    kept = torch.tensor([[True, True], [False, True], [False, False]])
    plain, renormalised = RouterConfig(), RouterConfig(renormalize=True, scale=2.5)
    torch.testing.assert_close(finish_weights(weights, None, plain), weights)
    torch.testing.assert_close(finish_weights(weights, kept, plain), weights * kept)
    got = finish_weights(weights, kept, renormalised)
    torch.testing.assert_close(got, torch.tensor([[1.5625, 0.9375], [0.0, 2.5], [0.0, 0.0]]))
    torch.testing.assert_close(finish_weights(weights, None, renormalised).sum(-1), torch.full((3,), 2.5))


def test_a_token_that_lost_every_route_has_a_finite_gradient() -> None:
    weights = torch.tensor([[0.5, 0.3]], requires_grad=True)
    out = finish_weights(weights, torch.tensor([[False, False]]), RouterConfig(renormalize=True))
    (grad,) = torch.autograd.grad(out.sum(), weights)
    assert torch.equal(grad, torch.zeros(1, 2))
