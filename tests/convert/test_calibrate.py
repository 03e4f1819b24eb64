"""What reaches each matrix: the inputs of the model itself, with the layers before it already quantised."""

from typing import Any

import pytest
import torch
from torch import Tensor

from moesaic.checkpoint.quantized import Scheme
from moesaic.config.model import ModelConfig
from moesaic.convert import calibrate
from moesaic.convert.calibrate import _tokens_of, calibrated_weights
from moesaic.kernels.quantized import QuantizedWeight, dequantize
from moesaic.model.linear import Linear
from moesaic.model.transformer import Transformer

MODELS: dict[str, dict[str, Any]] = {
    "dense": {"tie_embeddings": False, "positions": "learned", "mlp_bias": True, "attention_bias": "all"},
    "moe": {
        "activation": "swiglu_oai",
        "moe": {"num_experts": 4, "top_k": 2, "every": 1, "router": {"bias": True}},
        "tie_embeddings": False,
    },
    "latent": {
        "latent_attention": {
            "query_rank": 32,
            "kv_rank": 64,
            "nope_head_dim": 20,
            "rope_head_dim": 12,
            "value_head_dim": 16,
        },
        "moe": {"num_experts": 4, "top_k": 2, "layers": [1], "residual": "sum"},
        "tie_embeddings": False,
    },
    "pr-moe": {"mlp_bias": True, "moe": {"num_experts": [2, 6], "every": 1, "residual": "softmax"}},
}


def make_model(kind: str) -> Transformer:
    values = {
        "vocab_size": 60, "hidden_size": 64, "num_layers": 2, "num_heads": 2, "intermediate_size": 32,
        "max_positions": 16, "init_std": 0.2,
    }  # fmt: skip
    return Transformer(ModelConfig.from_dict({**values, **MODELS[kind]})).initialize(0).eval()


def all_schemes(model: Transformer, scheme: Scheme) -> dict[str, Scheme]:
    names = [name for name in model.state_dict() if name.endswith(("_proj", "_proj.weight"))]
    head = "embedding" if model.lm_head is None else "lm_head"
    return dict.fromkeys([*names, head], scheme)


def batches() -> list[Tensor]:
    return list(torch.randint(60, (6, 16), generator=torch.Generator().manual_seed(0)).split(4))


def run(model: Transformer, schemes: dict[str, Scheme]) -> dict[str, list[QuantizedWeight]]:
    state = model.state_dict()
    found: dict[str, list[QuantizedWeight]] = {}
    pairs = calibrated_weights(model.config, schemes, state.__getitem__, batches(), compute_dtype=torch.float32)
    for name, quantized in pairs:
        found.setdefault(name, []).append(quantized)
    return found


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("scheme", [Scheme(8, None), Scheme(4, 32), Scheme(4, 32, is_mxfp4=True)])
def test_every_matrix_comes_once_and_every_expert_in_its_place(kind: str, scheme: Scheme) -> None:
    model = make_model(kind)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    schemes = all_schemes(model, scheme)
    found = run(model, schemes)
    assert found.keys() == schemes.keys()
    for name, pieces in found.items():
        whole = dequantize(pieces[0]) if before[name].dim() == 2 else torch.stack([dequantize(each) for each in pieces])
        assert whole.shape == before[name].shape
        error = (whole - before[name]).norm() / before[name].norm()
        assert error < (0.02 if scheme.bits == 8 else 0.3), (name, error)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_only_what_is_named_is_quantised() -> None:
    model = make_model("pr-moe")
    experts = [name for name in model.state_dict() if ".experts." in name and name.endswith("_proj")]
    assert run(model, dict.fromkeys(experts, Scheme(4, 32))).keys() == set(experts)
    attention = [name for name in model.state_dict() if ".attention." in name and name.endswith("_proj.weight")]
    assert run(model, dict.fromkeys(attention, Scheme(8, None))).keys() == set(attention)


@pytest.mark.parametrize("kind", ["dense", "moe", "pr-moe", "latent"])
def test_inputs_are_the_models_own_with_the_layers_before_quantised(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(kind)
    seen: list[Tensor] = []
    factor = calibrate.feedback_factor

    def recording(moments: Tensor, *, is_mxfp4: bool) -> Tensor:
        seen.append(moments.clone())
        return factor(moments, is_mxfp4=is_mxfp4)

    monkeypatch.setattr(calibrate, "feedback_factor", recording)
    with torch.no_grad():
        hidden = torch.cat([model(tokens).hidden for tokens in batches()]).flatten(0, 1)
    of_the_unquantised = (hidden.t() @ hidden).double()
    found = run(model, all_schemes(model, Scheme(4, 32)))

    def moments_at(module: torch.nn.Module) -> Tensor:
        inputs: list[Tensor] = []
        handle = module.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0].flatten(0, 1)))
        with torch.no_grad():
            for tokens in batches():
                model(tokens)
        handle.remove()
        x = torch.cat(inputs)
        return (x.t() @ x).double()

    def matches(found: Tensor, expected: Tensor) -> None:
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))

    def put(prefix: str) -> None:
        with torch.no_grad():
            for name, pieces in found.items():
                if name.startswith(prefix):
                    whole = [dequantize(each) for each in pieces]
                    target = model.get_parameter(name)
                    target.copy_(torch.stack(whole) if target.dim() == 3 else whole[0])

    first, second = model.blocks
    is_tied = model.lm_head is None
    if is_tied:
        matches(seen.pop(0), of_the_unquantised)
        put("embedding")
    groups = first.attention.inputs_shared
    assert sorted(name for names in groups for name in names) == sorted(
        name for name, module in first.attention.named_children() if isinstance(module, Linear)
    )
    for moments, names in zip(seen, groups, strict=False):
        for name in names:
            matches(moments, moments_at(first.attention.get_submodule(name)))
        for name in names:
            put(f"blocks.0.attention.{name}")
    put("blocks.0.")
    reached = moments_at(second.attention.get_submodule(groups[0][0]))
    matches(min(seen, key=lambda each: float((each - reached).norm()) if each.shape == reached.shape else 1e9), reached)
    put("blocks.1.")
    if is_tied:
        return
    with torch.no_grad():
        hidden = torch.cat([model(tokens).hidden for tokens in batches()]).flatten(0, 1)
    matches(seen[-1], (hidden.t() @ hidden).double())


def test_an_expert_has_its_own_tokens_weighed_by_their_routing_weights() -> None:
    expert_ids = torch.tensor([[0, 1], [1, 2], [0, 2], [2, 1]])
    weights = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.3, 0.7], [0.5, 0.5]])
    rows, shares = _tokens_of(0, expert_ids, weights, needed=1)
    assert rows.tolist() == [0, 2]
    torch.testing.assert_close(shares, torch.tensor([1.5, 0.5]))


@pytest.mark.parametrize(("needed", "expected"), [(2, 2), (3, 3), (50, 50), (1000, 100)])
def test_an_expert_with_few_tokens_borrows_the_layers(needed: int, expected: int) -> None:
    expert_ids = torch.ones(100, 1, dtype=torch.int64)
    expert_ids[40] = expert_ids[60] = 0
    rows, shares = _tokens_of(0, expert_ids, torch.full((100, 1), 0.25), needed=needed)
    assert len(rows) == len(shares) == expected and rows[:2].tolist() == [40, 60]
    assert len(set(rows.tolist())) == expected and shares.eq(1).all()
    nobody, shares = _tokens_of(5, expert_ids, torch.full((100, 1), 0.25), needed=10)
    assert len(nobody) == 10 and int(nobody.max()) >= 90 and shares.eq(1).all()


def test_experts_that_no_token_chooses_are_quantised_all_the_same() -> None:
    model = make_model("moe")
    for block in model.blocks:
        with torch.no_grad():
            block.feed_forward.moe.router.weight[2:] = 0
            block.feed_forward.moe.router.weight[:2] *= 100
    found = run(model, all_schemes(model, Scheme(4, 32)))
    assert all(dequantize(each).isfinite().all() for pieces in found.values() for each in pieces)


def test_progress_is_told_layer_by_layer() -> None:
    model = make_model("dense")
    state, layers = model.state_dict(), []
    pairs = calibrated_weights(
        model.config,
        all_schemes(model, Scheme(8, None)),
        state.__getitem__,
        batches(),
        compute_dtype=torch.float32,
        on_layer=layers.append,
    )
    assert len(list(pairs)) == 2 * 7 + 1 and layers == [0, 1]
