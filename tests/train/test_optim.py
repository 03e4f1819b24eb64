import copy

import pytest
import torch
from torch import Tensor, nn

from moesaic.config.model import ModelConfig
from moesaic.config.train import OptimizerConfig
from moesaic.model.transformer import Transformer
from moesaic.train.optim import OUTPUT_SCALE_RATE, Muon, Optimizers, clip_gradients, orthogonalize

MODEL = ModelConfig.from_dict(
    {
        "vocab_size": 50,
        "hidden_size": 16,
        "num_layers": 2,
        "num_heads": 2,
        "intermediate_size": 24,
        "max_positions": 8,
        "positions": "learned",
        "attention_bias": "all",
        "mlp_bias": True,
        "norm": "layernorm",
        "tie_embeddings": False,
        "moe": {"output_scale": True, "num_experts": 4, "every": 2, "residual": "softmax", "router": {"bias": True}},
    }
)


def make_model() -> Transformer:
    return Transformer(MODEL).initialize(0)


def loss_of(model: Transformer, seed: int = 0) -> Tensor:
    tokens = torch.randint(50, (3, 8), generator=torch.Generator().manual_seed(seed))
    return model.logits(model(tokens).hidden).square().mean()


def groups_by_name(optimizers: Optimizers, model: Transformer) -> dict[str, tuple[str, float]]:
    names = {parameter: name for name, parameter in model.named_parameters()}
    listed = [
        (names[parameter], (type(optimizer).__name__, group["weight_decay"]))
        for optimizer in optimizers._optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
    ]
    assert len(listed) == len(dict(listed)), "a parameter is in two groups"
    return dict(listed)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_every_parameter_is_in_the_group_that_its_kind_asks_for(name: str) -> None:
    model = make_model()
    config = OptimizerConfig(name=name, weight_decay=0.1, router_weight_decay=0.01)
    groups = groups_by_name(Optimizers(model, config), model)
    assert groups.keys() == dict(model.named_parameters()).keys()
    hidden = "Muon" if name == "muon" else "AdamW"
    expected = {
        "embedding": ("AdamW", 0.1),
        "position_embedding": ("AdamW", 0.1),
        "lm_head": ("AdamW", 0.1),
        "blocks.0.attention.q_proj.weight": (hidden, 0.1),
        "blocks.0.attention.q_proj.bias": ("AdamW", 0.0),
        "blocks.0.feed_forward.mlp.gate_proj.weight": (hidden, 0.1),
        "blocks.0.attention_norm.weight": ("AdamW", 0.0),
        "blocks.0.attention_norm.bias": ("AdamW", 0.0),
        "blocks.1.feed_forward.mix.weight": ("AdamW", 0.1),
        "blocks.1.feed_forward.moe.router.weight": ("AdamW", 0.01),
        "blocks.1.feed_forward.moe.router.bias": ("AdamW", 0.0),
        "blocks.1.feed_forward.moe.experts.gate_up_proj": (hidden, 0.1),
        "blocks.1.feed_forward.moe.experts.down_proj": (hidden, 0.1),
        "blocks.1.feed_forward.moe.experts.gate_up_bias": ("AdamW", 0.0),  # (E, 2F), and no matrix all the same
        "blocks.1.feed_forward.moe.experts.down_bias": ("AdamW", 0.0),
        "blocks.1.feed_forward.moe.output_scale": ("AdamW", 0.0),
        "final_norm.weight": ("AdamW", 0.0),
    }
    assert {key: groups[key] for key in expected} == expected


@pytest.mark.parametrize("shape", [(48, 16), (16, 48), (32, 32), (5, 48, 16), (3, 2, 16, 48)])
def test_orthogonalized_matrices_have_singular_values_near_one(shape: tuple[int, ...]) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    result = orthogonalize(matrices)
    assert result.shape == matrices.shape
    # The quintic's values end between 0.68 and 1.13 (Jordan, 2024); a square one also has singular values near 0.
    values = torch.linalg.svdvals(result.float())
    assert values.max() < 1.25
    assert values[..., :-1].min() > (0.3 if shape[-1] == shape[-2] else 0.6)
    # The singular vectors stay: U^T X V of the result is nearly diagonal.
    u, _, vt = torch.linalg.svd(matrices, full_matrices=False)
    core = u.mT @ result.float() @ vt.mT
    off = core - torch.diag_embed(core.diagonal(dim1=-2, dim2=-1))
    assert off.abs().max() < 0.1


def test_orthogonalizing_zero_gives_zero() -> None:
    assert orthogonalize(torch.zeros(3, 8, 4)).abs().max() == 0


def test_muon_treats_stacked_experts_and_fused_halves_as_matrices_of_their_own() -> None:
    generator = torch.Generator().manual_seed(2)
    stacked = nn.Parameter(torch.randn(3, 8, 4, generator=generator))  # (E, 2F, H), [gate, up]
    single = [nn.Parameter(half.clone()) for expert in stacked.detach() for half in expert.chunk(2)]
    fused = Muon([{"params": [stacked], "num_fused": 2, "weight_decay": 0.1}], lr=0.05, momentum=0.9)
    plain = Muon([{"params": single, "weight_decay": 0.1}], lr=0.05, momentum=0.9)
    for _ in range(3):
        gradient = torch.randn(3, 8, 4, generator=generator)
        stacked.grad = gradient
        for parameter, part in zip(single, [half for e in gradient for half in e.chunk(2)], strict=True):
            parameter.grad = part.clone()
        fused.step()
        plain.step()
    expected = torch.stack([torch.cat([single[2 * e], single[2 * e + 1]]) for e in range(3)])
    # A batched bf16 product may round otherwise than a single one; an update is 0.05 * 0.2 * 2 in size.
    torch.testing.assert_close(stacked.detach(), expected.detach(), rtol=0, atol=1e-3)


def test_muons_update_has_adamws_size() -> None:
    for shape in ((64, 16), (16, 64), (4, 32, 64)):
        parameter = nn.Parameter(torch.zeros(shape))
        parameter.grad = torch.randn(shape, generator=torch.Generator().manual_seed(3))
        Muon([{"params": [parameter]}], lr=1.0, momentum=0.95).step()
        rms = parameter.detach().square().mean().sqrt()
        assert 0.12 < rms < 0.25  # 0.2 with exact singular values


def test_momentum_is_nesterovs() -> None:
    parameter = nn.Parameter(torch.zeros(4, 4))
    muon = Muon([{"params": [parameter]}], lr=1.0, momentum=0.5)
    first, second = torch.randn(2, 4, 4, generator=torch.Generator().manual_seed(4))
    parameter.grad = first
    muon.step()
    before = parameter.detach().clone()
    parameter.grad = second
    muon.step()
    buffer = 0.5 * (0.5 * first) + 0.5 * second
    direction = orthogonalize(0.5 * second + 0.5 * buffer).float()
    torch.testing.assert_close(parameter.detach() - before, -0.2 * 2 * direction, rtol=0, atol=2e-2)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_the_state_by_name_makes_another_models_optimizers_equal(name: str) -> None:
    config = OptimizerConfig(name=name)
    model = make_model()
    optimizers = Optimizers(model, config)

    def step(model: Transformer, optimizers: Optimizers, seed: int) -> None:
        loss_of(model, seed).backward()
        optimizers.step(0.01)
        optimizers.zero_grad()

    for seed in range(2):
        step(model, optimizers, seed)
    other = copy.deepcopy(model)
    others = Optimizers(other, config)
    state = {key: value.clone() for key, value in optimizers.named_state().items()}
    others.load_named_state(state)
    assert others.named_state().keys() == state.keys()
    step(model, optimizers, 7)
    step(other, others, 7)
    for (name_, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name_


@pytest.mark.parametrize("max_norm", [None, 1e-3, 1e6])
def test_clipping_is_pytorchs(max_norm: float | None) -> None:
    ours, reference = make_model(), make_model()
    for model in (ours, reference):
        (100 * loss_of(model)).backward()
    norm = clip_gradients(ours, max_norm)
    expected = torch.nn.utils.clip_grad_norm_(reference.parameters(), float("inf") if max_norm is None else max_norm)
    assert norm == pytest.approx(float(expected))
    for a, b in zip(ours.parameters(), reference.parameters(), strict=True):
        assert a.grad is not None and b.grad is not None
        # PyTorch adds 1e-6 to the norm it divides by.
        torch.testing.assert_close(a.grad, b.grad, rtol=2e-6 / norm + 1e-6, atol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_clipping_leaves_gradients_that_are_not_finite_alone(bad: float) -> None:
    model = make_model()
    loss_of(model).backward()
    assert model.embedding.grad is not None
    model.embedding.grad[0, 0] = bad
    before = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}  # type: ignore[union-attr]
    assert not torch.isfinite(torch.tensor(clip_gradients(model, 1e-3)))
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, before[name], rtol=0, atol=0, equal_nan=True)


def test_the_norm_of_many_gradients_is_not_too_small() -> None:
    """PyTorch's own norm of 2^26 numbers is half a percent too small on a CPU."""
    model = nn.Linear(1 << 13, 1 << 13, bias=False)
    part = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0))
    model.weight.grad = part.repeat(64).view_as(model.weight)
    expected = 8 * float(part.double().norm())
    assert clip_gradients(model, 1.0) == pytest.approx(expected, rel=1e-4)
    assert float(model.weight.grad.double().norm()) == pytest.approx(1.0, rel=1e-4)


def test_the_factor_of_the_experts_moves_faster_than_the_rest() -> None:
    model = make_model()
    optimizers = Optimizers(model, OptimizerConfig())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizers.step(1e-3)
    moved = {
        name: float((before[name] - parameter.detach()).abs().max()) for name, parameter in model.named_parameters()
    }
    # Adam's first step is the rate itself.
    assert moved["blocks.1.feed_forward.moe.output_scale"] == pytest.approx(1e-3 * OUTPUT_SCALE_RATE, rel=1e-3)
    assert moved["blocks.0.attention_norm.weight"] == pytest.approx(1e-3, rel=1e-3)
