"""The Transformer's laws, over every family of configs: causal, blind to padding and batch, repeatable."""

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moesaic.config.model import ModelConfig
from moesaic.errors import ConfigError
from moesaic.kernels import select
from moesaic.kernels.cross_entropy import linear_cross_entropy
from moesaic.kernels.routing import Routing
from moesaic.model.kv_cache import BatchCache
from moesaic.model.pack import pack_transformer
from moesaic.model.transformer import ModelOutput, Transformer
from moesaic.moe.balance import balance_loss
from moesaic.moe.experts import Experts
from moesaic.moe.router import Router

SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 24,
    "num_layers": 4,
    "num_heads": 4,
    "intermediate_size": 40,
    "max_positions": 48,
}
GPT: dict[str, Any] = {
    "positions": "learned",
    "norm": "layernorm",
    "attention_bias": "all",
    "mlp_bias": True,
    "activation": "gelu",
}
FAMILIES: dict[str, dict[str, Any]] = {
    "dense, llama-like": {"num_kv_heads": 2, "tie_embeddings": False},
    "dense, gpt-like": GPT,
    "dense, qwen-like": {"num_kv_heads": 1, "qk_norm": "head", "head_dim": 8, "attention_bias": "qkv"},
    "learned positions, rmsnorm, gelu_tanh": {"positions": "learned", "activation": "gelu_tanh"},
    "rotary, layernorm, untied": {"norm": "layernorm", "tie_embeddings": False},
    "moe, mixtral-like": {
        "num_kv_heads": 2,
        "moe": {"num_experts": 5, "top_k": 2, "router": {"renormalize": True}},
    },
    "moe, top-1 on every second layer": GPT | {"moe": {"num_experts": 5, "every": 2}},
    "pyramid, residual softmax": GPT
    | {"moe": {"num_experts": [2, 7], "every": 2, "residual": "softmax", "intermediate_size": [24, 16]}},
    "residual sum, explicit layers": {"moe": {"num_experts": 3, "layers": [0, 3], "residual": "sum"}},
    "residual sigmoid, sizes of its own": {
        "moe": {
            "num_experts": 6,
            "top_k": 3,
            "intermediate_size": 10,
            "residual": "sigmoid",
            "residual_intermediate_size": 17,
        }
    },
    "experts scaled": {"moe": {"num_experts": 5, "top_k": 2, "residual": "sum", "output_scale": True}},
    "moe, olmoe-like": {"num_kv_heads": 2, "qk_norm": "full", "moe": {"num_experts": 5, "top_k": 2}},
    "moe, hunyuan-like": {
        "num_kv_heads": 2,
        "qk_norm": "rotated_head",
        "moe": {"num_experts": 5, "top_k": 2, "residual": "sum", "router": {"renormalize": True}},
    },
    "moe, norms behind": {
        "num_kv_heads": 2,
        "qk_norm": "full",
        "norm_place": "behind",
        "moe": {"num_experts": 5, "top_k": 2, "residual": "sum"},
    },
    "gpt-like, norms behind, scaled": GPT | {"norm_place": "behind", "residual_scale": 0.4},
    "turned in some layers, windows in these": {
        "num_kv_heads": 2,
        "qk_norm": "head",
        "rope_layers": [0, 2],
        "sliding_window": 7,
        "sliding_layers": [0, 2],
        "moe": {"num_experts": 5, "top_k": 2},
    },
    "scores and positions scaled": {
        "num_kv_heads": 2,
        "attention_scale": 0.6,
        "rope_scaling": {"kind": "yarn", "factor": 3.0, "original_max_positions": 16},
    },
    "moe, granite-like": {
        "num_kv_heads": 2,
        "attention_scale": 0.6,
        "embedding_scale": 2.5,
        "residual_scale": 0.4,
        "logits_scale": 0.7,
        "moe": {"num_experts": 5, "top_k": 2, "residual": "sum", "router": {"renormalize": True}},
    },
    "windows on every second layer, sinks": {
        "num_kv_heads": 2,
        "attention_sinks": True,
        "sliding_window": 7,
        "sliding_layers": [0, 2],
    },
    "moe, latent attention": {
        "latent_attention": {
            "query_rank": 20,
            "kv_rank": 18,
            "nope_head_dim": 6,
            "rope_head_dim": 4,
            "value_head_dim": 9,
        },
        "moe": {"num_experts": 4, "top_k": 2, "layers": [1, 2, 3], "residual": "sum"},
    },
    "moe, deepseek-like": {
        "moe": {
            "num_experts": 8,
            "top_k": 2,
            "residual": "sum",
            "router": {
                "scoring": "sigmoid",
                "renormalize": True,
                "scale": 2.5,
                "num_groups": 4,
                "top_groups": 2,
                "score_correction_bias": True,
            },
        }
    },
}
MOE_FAMILIES = [name for name, values in FAMILIES.items() if "moe" in values]


def build(family: str, *, seed: int = 0, moe: dict[str, Any] | None = None, **values: Any) -> Transformer:
    merged = {**SIZES, **FAMILIES[family], **values}
    if moe is not None:
        merged["moe"] = {**merged["moe"], **moe}
    # Larger than the default, so that at width 24 attention and experts weigh against the residual stream.
    return Transformer(ModelConfig(**{"init_std": 0.15, **merged})).initialize(seed)


def tokens(batch: int = 2, length: int = 37, seed: int = 0) -> Tensor:
    return torch.randint(61, (batch, length), generator=torch.Generator().manual_seed(seed))


def objective(model: Transformer, output: ModelOutput, inputs: Tensor) -> Tensor:
    loss = linear_cross_entropy(output.hidden[:, :-1].flatten(0, 1), model.output_weight(), inputs[:, 1:].flatten())
    for statistics in output.moe:
        loss = loss + 0.1 * balance_loss(statistics.mean_probabilities, statistics.tokens_per_expert)
        loss = loss + 0.01 * statistics.z
    return loss


def gradients(model: Transformer, inputs: Tensor, **arguments: Any) -> dict[str, Tensor | None]:
    model.zero_grad()
    objective(model, model(inputs, **arguments), inputs).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_close(got: Tensor, wanted: Tensor) -> None:
    # Matrix products of other shapes sum in another order; what comes out of the final norm is of size 1.
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_printed_model_shows_the_sizes_of_its_parameters(family: str) -> None:
    for model in (build(family), pack_transformer(build(family))):
        for name, module in model.named_modules():
            shown = re.findall(r"\b\d+\b", module.extra_repr())
            for parameter in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                for size in parameter.shape:  # of gate_up_proj the size of a half is shown
                    assert {str(size), str(size // 2)} & set(shown), (name, module.extra_repr(), parameter.shape)


def test_a_printed_model_tells_layers_apart_that_compute_otherwise() -> None:
    config = ModelConfig(
        vocab_size=9, hidden_size=8, num_layers=3, num_heads=2, max_positions=8, intermediate_size=8, rope_layers=[0, 1]
    )
    shown = str(Transformer(config))
    assert "(0-1): 2 x Block(\n" in shown and "(2): Block(\n" in shown and shown.count("is_rotated=False") == 1
    behind = str(Transformer(config.replace(norm_place="behind")))
    assert behind.count("norms_outputs=True") == 2 and "norms_outputs" not in shown


def test_a_printed_packed_model_says_how_it_is_packed() -> None:
    shown = str(pack_transformer(build("moe, mixtral-like")))
    assert "(qkv_proj): Linear(in_features=24, out_features=48, bias=False, packed=bf16)" in shown
    assert (
        "Experts(num_experts=5, hidden_size=24, intermediate_size=40, activation=swiglu, bias=False, packed=" in shown
    )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_finite_output_and_every_parameter_learns(family: str, dtype: torch.dtype) -> None:
    model = build(family)
    model.compute_dtype = dtype
    inputs = tokens()
    output = model(inputs)
    assert output.hidden.shape == (2, 37, 24) and output.hidden.dtype == dtype
    assert len(output.moe) == len(model.config.moe_layers)
    logits = model.logits(output.hidden)
    assert logits.shape == (2, 37, 61) and logits.dtype == torch.float32 and logits.isfinite().all()
    for name, grad in gradients(model, inputs).items():
        assert grad is not None and grad.isfinite().all(), name
        assert grad.dtype == torch.float32 and torch.count_nonzero(grad) > 0, name


@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_is_near_fp32(family: str) -> None:
    model = build(family).eval()
    wide = model(tokens())
    model.compute_dtype = torch.bfloat16
    # The same experts, or a near tie would send a token elsewhere.
    narrow = model(tokens(), replay=tuple(each.decision for each in wide.moe))
    assert (narrow.hidden - wide.hidden).norm() < 0.05 * wide.hidden.norm()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_later_token_changes_nothing_before_it(family: str) -> None:
    model = build(family).eval()
    inputs = tokens()
    changed = inputs.clone()
    changed[:, 20:] = tokens(seed=1)[:, 20:]
    before, after = model(inputs).hidden, model(changed).hidden
    assert_close(after[:, :20], before[:, :20])
    assert (after[:, 20:] - before[:, 20:]).abs().max() > 0.1


@pytest.mark.parametrize("family", FAMILIES)
def test_an_earlier_token_changes_what_comes_after(family: str) -> None:
    model = build(family).eval()
    changed = tokens()
    changed[:, 3] = (changed[:, 3] + 1) % 61
    difference = (model(changed).hidden - model(tokens()).hidden).abs().amax((0, 2))
    assert torch.count_nonzero(difference[:3] > 1e-4) == 0
    assert (difference[3:] > 1e-4).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_sequence_does_not_know_its_batch(family: str) -> None:
    model = build(family).eval()
    together = model(tokens(batch=3)).hidden
    for row in range(3):
        assert_close(model(tokens(batch=3)[row : row + 1]).hidden[0], together[row])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("is_training", [False, True])
def test_padding_changes_nothing_for_the_valid_part(family: str, is_training: bool) -> None:
    """In training too, with capacity: it counts unpadded tokens, and padding takes no place."""
    moe = None
    if is_training and "moe" in FAMILIES[family]:
        moe = {"capacity": {"factor": 0.8, "min_capacity": 1}}
    model = build(family, moe=moe).train(is_training)
    short = tokens(batch=1, length=23)
    padded = F.pad(short, (0, 9), value=5)
    valid = (torch.arange(32) < 23)[None]
    wanted, got = model(short), model(padded, valid=valid)
    assert_close(got.hidden[:, :23], wanted.hidden)
    for mine, theirs in zip(got.moe, wanted.moe, strict=True):
        for name in ("tokens_per_expert", "mean_probabilities", "z", "entropy", "drop_rate", "num_tokens"):
            torch.testing.assert_close(getattr(mine, name), getattr(theirs, name))
    if moe is not None:
        assert max(each.drop_rate for each in got.moe) > 0

    def loss(output: ModelOutput) -> Tensor:
        return output.hidden[:, :23].square().flatten(1)[:, ::7].sum() + sum(each.z for each in output.moe)

    parameters = [parameter for name, parameter in model.named_parameters() if name != "lm_head"]
    expected = torch.autograd.grad(loss(wanted), parameters)
    for mine, theirs in zip(torch.autograd.grad(loss(got), parameters), expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", [name for name, values in FAMILIES.items() if values.get("positions") != "learned"])
def test_a_masked_document_is_as_if_alone(family: str) -> None:
    """Rotary positions know distances alone, so a document's place in the sequence does not matter either."""
    model = build(family).eval()
    inputs = tokens(batch=1)
    documents = torch.tensor([[0] * 9 + [1] * 20 + [2] * 8])
    together = model(inputs, documents=documents).hidden
    alone = [model(part).hidden for part in inputs.split([9, 20, 8], 1)]
    assert_close(together, torch.cat(alone, 1))
    assert not torch.allclose(together[:, 9:], model(inputs).hidden[:, 9:], atol=1e-2)


@pytest.mark.parametrize("family", FAMILIES)
def test_documents_are_separate_from_their_past(family: str) -> None:
    model = build(family).eval()
    documents = torch.tensor([[0] * 9 + [1] * 28]).expand(2, -1)
    changed = tokens()
    changed[:, :9] = tokens(seed=1)[:, :9]
    before, after = (model(inputs, documents=documents).hidden for inputs in (tokens(), changed))
    assert_close(after[:, 9:], before[:, 9:])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("pieces", [[1] * 12, [11, 1], [5, 4, 3]])
def test_with_a_cache_equals_without(family: str, pieces: list[int]) -> None:
    model = build(family).eval()
    config = model.config
    inputs = tokens(length=12)
    cache = BatchCache(config, 2, 12, dtype=torch.float32, device=torch.device("cpu"))
    with torch.no_grad():
        outputs = [model(part, cache=cache).hidden for part in inputs.split(pieces, 1)]
        assert cache.length == 12
        assert_close(torch.cat(outputs, 1), model(inputs).hidden)


NOISY: dict[str, dict[str, Any]] = {
    "plain": {},
    "dropout": {"dropout": 0.2},
    "jitter and random drops": {
        "moe": {"router": {"noise": "jitter"}, "capacity": {"factor": 0.8, "drop_policy": "random"}}
    },
    "samples and drops by probability": {
        "dropout": 0.1,
        "moe": {"router": {"noise": "rsample"}, "capacity": {"factor": 0.8, "drop_policy": "probability"}},
    },
}


@pytest.fixture
def choices(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Tensor]]:
    """Every choice that a router makes while the test runs."""
    made: list[Tensor] = []
    forward = Router.forward

    def recording(self: Router, x: Tensor, *, expert_ids: Tensor | None = None, **others: Any) -> Routing:
        routing = forward(self, x, expert_ids=expert_ids, **others)
        if expert_ids is None:
            made.append(routing.expert_ids)
        return routing

    monkeypatch.setattr(Router, "forward", recording)
    yield made


@pytest.mark.parametrize(
    ("family", "noisy"),
    [
        *(("dense, llama-like", noisy) for noisy in ("plain", "dropout")),
        *(
            (family, noisy)
            for family in ("moe, mixtral-like", "pyramid, residual softmax", "experts scaled")
            for noisy in NOISY
        ),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activation_checkpointing_gives_the_same_bits(
    family: str, noisy: str, dtype: torch.dtype, choices: list[Tensor]
) -> None:
    values = dict(NOISY[noisy])
    moe = values.pop("moe", None)
    model = build(family, moe=moe, **values)
    model.compute_dtype = dtype
    results = []
    for is_checkpointing in (False, True):
        model.activation_checkpointing = is_checkpointing
        torch.manual_seed(3)
        choices.clear()
        results.append(gradients(model, tokens(), seed=11))
        assert len(choices) == len(model.config.moe_layers), "one choice a layer, the recomputation makes none"
    for name, grad in results[0].items():
        other = results[1][name]
        assert grad is not None and other is not None and torch.equal(grad, other), name


@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_the_recomputation_keeps_the_choice_where_the_router_would_change_it(
    family: str, choices: list[Tensor]
) -> None:
    """With other router weights at the time of the backward pass, a new choice would have other numbers of rows."""
    model = build(family, moe={"capacity": {"factor": 0.7, "min_capacity": 1}})
    model.activation_checkpointing = True
    inputs = tokens()
    loss = objective(model, model(inputs), inputs)
    made = len(choices)
    for module in model.modules():
        if isinstance(module, Router):
            module.weight.data.neg_()
    loss.backward()
    assert len(choices) == made == len(model.config.moe_layers)


@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_a_replayed_pass_gives_the_same_bits(family: str, choices: list[Tensor]) -> None:
    model = build(family, moe={"capacity": {"factor": 0.7, "drop_policy": "random"}})
    inputs = tokens()
    output = model(inputs, seed=5)
    decisions = tuple(each.decision for each in output.moe)
    wanted = gradients(model, inputs, seed=5)
    choices.clear()
    for is_checkpointing in (False, True):
        model.activation_checkpointing = is_checkpointing
        assert torch.equal(model(inputs, replay=decisions).hidden, output.hidden)
        for name, grad in gradients(model, inputs, replay=decisions).items():
            expected = wanted[name]
            assert grad is not None and expected is not None and torch.equal(grad, expected), name
    assert choices == []


@pytest.mark.parametrize("noise", ["jitter", "rsample"])
def test_noise_follows_the_seed_and_differs_by_layer(noise: str, choices: list[Tensor]) -> None:
    model = build("moe, mixtral-like", moe={"router": {"noise": noise}})
    first = model(tokens(), seed=1).hidden
    assert torch.equal(model(tokens(), seed=1).hidden, first)
    assert not torch.equal(model(tokens(), seed=2).hidden, first)
    model.eval()
    assert torch.equal(model(tokens(), seed=1).hidden, model(tokens(), seed=2).hidden)
    if noise == "rsample":
        with torch.no_grad():
            for module in model.modules():
                if isinstance(module, Router):
                    module.weight.zero_()  # the choice is noise alone
        model.train()
        choices.clear()
        model(tokens(), seed=1)
        assert not any(torch.equal(choices[0], other) for other in choices[1:])


def test_dropout_is_of_training_only() -> None:
    model = build("dense, gpt-like", dropout=0.5)
    assert not torch.equal(model(tokens()).hidden, model(tokens()).hidden)
    model.eval()
    wanted = build("dense, gpt-like").eval()
    assert torch.equal(model(tokens()).hidden, wanted(tokens()).hidden)


@pytest.mark.parametrize("family", FAMILIES)
def test_initialize_is_a_function_of_the_seed(family: str) -> None:
    first, again, other = build(family, seed=1), build(family, seed=1), build(family, seed=2)
    torch.manual_seed(0)
    again.initialize(1)  # whatever was there before, and whatever the global generator says
    for (name, mine), same, different in zip(
        first.named_parameters(), again.parameters(), other.parameters(), strict=True
    ):
        assert torch.equal(mine, same), name
        is_constant = mine.dim() < 2 or name.endswith("_bias")
        assert torch.equal(mine, different) == is_constant, name


@pytest.mark.parametrize("family", FAMILIES)
def test_initialize_defines_a_model_built_without_memory(family: str) -> None:
    wanted = build(family)
    with torch.device("meta"):
        model = Transformer(wanted.config)
    model = model.to_empty(device="cpu")
    for tensor in model.state_dict().values():
        tensor.fill_(float("nan"))
    model.initialize(0)
    for name, tensor in wanted.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_initialize_has_the_scale_that_it_says() -> None:
    config = ModelConfig(
        vocab_size=512,
        hidden_size=128,
        num_layers=8,
        num_heads=4,
        tie_embeddings=False,
        moe={"num_experts": 4, "every": 2, "residual": "softmax"},
    )
    model = Transformer(config).initialize(0)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1 or name.endswith("_bias"):
            assert torch.equal(parameter, torch.full_like(parameter, float(name.endswith("norm.weight")))), name
            continue
        is_output = "o_proj" in name or "down_proj" in name
        wanted = 0.02 / 4 if is_output else 0.02  # 4 = sqrt(2 * 8)
        # A standard deviation over n numbers is off by 1/sqrt(2n); five of these.
        assert abs(parameter.std().item() / wanted - 1) < 5 / (2 * parameter.numel()) ** 0.5, name
        assert abs(parameter.mean().item()) < 5 * wanted / parameter.numel() ** 0.5, name


@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_experts_start_different_from_one_another_and_from_the_fixed_mlp(family: str) -> None:
    model = build(family)
    for block in model.blocks:
        if block.feed_forward.moe is None:
            continue
        experts: Experts = block.feed_forward.moe.experts
        for stacked in (experts.weights().up, experts.weights().down):
            flat = F.normalize(stacked.flatten(1), dim=1)
            similarity = (flat @ flat.t()).fill_diagonal_(0.0)
            # Of independent draws it is 1/sqrt(n) in size; six of these.
            assert similarity.abs().max() < 6 / flat.shape[1] ** 0.5
            deviations = stacked.flatten(1).std(1)
            assert (deviations / stacked.std() - 1).abs().max() < 0.2


def test_the_embedding_is_tied_by_being_the_same_tensor() -> None:
    tied, untied = build("dense, gpt-like"), build("dense, llama-like")
    assert tied.lm_head is None and tied.output_weight() is tied.embedding
    assert untied.lm_head is not None and not torch.equal(untied.lm_head, untied.embedding)
    assert "lm_head" not in tied.state_dict()


def test_a_longer_sequence_than_the_positions_is_refused() -> None:
    with pytest.raises(ConfigError, match="sequences of 49 tokens were given; the model has 48 positions"):
        build("dense, gpt-like")(tokens(length=49))


def test_tensors_of_other_shapes_are_refused() -> None:
    model, inputs = build("moe, mixtral-like"), tokens(length=8)
    with pytest.raises(ConfigError, match=r"tokens of shape \(8,\) were given; \(batch, length\) is required"):
        model(inputs[0])
    for given in ({"documents": torch.zeros(8)}, {"valid": torch.ones(2, 9, dtype=torch.bool)}):
        with pytest.raises(ConfigError, match="one value for each token is required"):
            model(inputs, **given)


def test_documents_beside_a_cache_are_refused() -> None:
    cache = BatchCache(ModelConfig(**SIZES), 1, 8, dtype=torch.float32, device=torch.device("cpu"))
    with pytest.raises(AssertionError, match="one document"):
        build("dense, gpt-like")(tokens(1, 4), cache=cache, documents=torch.zeros(1, 4, dtype=torch.int64))


@pytest.mark.parametrize("family", FAMILIES)
def test_one_token(family: str) -> None:
    model = build(family)
    inputs = tokens(1, 1)
    hidden = model(inputs).hidden
    assert hidden.shape == (1, 1, 24) and hidden.isfinite().all()
    hidden.sum().backward()


def test_a_loss_goes_down() -> None:
    """A few plain steps on one batch, MoE with capacity and noise: everything above works together."""
    model = build("pyramid, residual softmax", moe={"capacity": {"factor": 1.2}, "router": {"noise": "jitter"}})
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for step in range(30):
        optimizer.zero_grad()
        loss = objective(model, model(tokens(), seed=step), tokens())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


LATENT = {"kv_rank": 24, "nope_head_dim": 12, "rope_head_dim": 4, "value_head_dim": 20}


@pytest.mark.parametrize(
    ("attention", "kernels"),
    [
        ({"num_kv_heads": 1}, "auto"),
        ({"num_kv_heads": 1}, "reference"),
        ({"latent_attention": LATENT}, "auto"),
        ({"qk_norm": "full", "attention_scale": 0.3}, "auto"),
    ],
)
def test_compiles_into_one_graph(attention: dict[str, Any], kernels: str) -> None:
    """The operators are ordinary ones to torch.compile: the same numbers, and no break in the graph.

    PyTorch's definitions write into parts of a tensor, where the graph may break, and round their sums elsewhere.
    """
    import torch._dynamo

    values = {"vocab_size": 64, "hidden_size": 64, "num_layers": 1, "num_heads": 2, "intermediate_size": 64}
    config = ModelConfig.from_dict({**values, "moe": {"num_experts": 4, "top_k": 2, "residual": "sum"}, **attention})
    model = Transformer(config, compute_dtype=torch.bfloat16).initialize(0).train()
    tokens = torch.randint(0, 64, (2, 24), generator=torch.Generator().manual_seed(0))

    def loss(tokens: torch.Tensor) -> torch.Tensor:
        return model(tokens).hidden.float().square().mean()

    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with select.forced(kernels):
        wanted = torch.autograd.grad(loss(tokens), parameters)
        compiled = torch.compile(loss, backend="aot_eager", fullgraph=kernels == "auto")
        got = torch.autograd.grad(compiled(tokens), parameters)
    torch._dynamo.reset()
    for one, other in zip(got, wanted, strict=True):
        assert float((one - other).norm()) <= (0.0 if kernels == "auto" else 0.02) * float(other.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_a_dense_model_compiles_into_one_graph(kernels: str, dtype: torch.dtype) -> None:
    """SwiGLU's backward pass in PyTorch's operations wrote into halves of a tensor, which broke it at every MLP."""
    import torch._dynamo

    values = {"vocab_size": 64, "hidden_size": 64, "num_layers": 1, "num_heads": 2, "intermediate_size": 64}
    model = Transformer(ModelConfig.from_dict(values), compute_dtype=dtype).initialize(0).train()
    tokens = torch.randint(0, 64, (2, 24), generator=torch.Generator().manual_seed(0))
    found = []
    with select.forced(kernels):
        for each in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
            loss = each(tokens).hidden.float().square().mean()
            found.append(torch.autograd.grad(loss, list(model.parameters())))
    torch._dynamo.reset()
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_what_is_compiled_serves_other_counts_of_tokens() -> None:
    """In fp32 the experts' loop depends on how many tokens each has; no such list of counts is compiled for itself."""
    import torch._dynamo
    from torch._dynamo.utils import counters

    values = {"vocab_size": 64, "hidden_size": 32, "num_layers": 1, "num_heads": 2, "intermediate_size": 32}
    config = ModelConfig.from_dict({**values, "moe": {"num_experts": 4, "top_k": 1}})
    model = Transformer(config).initialize(0).train()
    compiled = torch.compile(model, backend="aot_eager", dynamic=False)
    parameters = list(model.parameters())
    torch._dynamo.reset()
    graphs, counts = [], set()
    for seed in range(3):
        tokens = torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(seed))
        found = []
        for each in (model, compiled):
            output = each(tokens)
            found.append(torch.autograd.grad(output.hidden.square().mean(), parameters, allow_unused=True))
        counts.add(tuple(output.moe[0].tokens_per_expert.tolist()))
        graphs.append(counters["stats"]["unique_graphs"])
        for one, other in zip(*found, strict=True):
            assert (one is None) == (other is None)
            assert one is None or torch.equal(one, other)
    torch._dynamo.reset()
    assert len(counts) == 3
    assert graphs[0] == graphs[1] == graphs[2], graphs


def test_one_token_compiled_has_its_own_gradients() -> None:
    """Experts in fp32: traced, their loop left gradients of those that have the token at 0."""
    import torch._dynamo

    values = {"vocab_size": 64, "hidden_size": 64, "num_layers": 2, "num_heads": 2, "intermediate_size": 64}
    config = ModelConfig.from_dict({**values, "activation": "swiglu", "moe": {"num_experts": 4, "top_k": 2}})
    model = Transformer(config).initialize(0).train()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    parameters = list(model.parameters())
    for shape in ((2, 12), (1, 1)):
        tokens = torch.randint(0, 64, shape, generator=torch.Generator().manual_seed(0))
        losses = (each(tokens).hidden.square().mean() for each in (model, compiled))
        found = [torch.autograd.grad(loss, parameters, allow_unused=True) for loss in losses]
        for one, other in zip(*found, strict=True):
            assert (one is None) == (other is None)
            assert one is None or torch.equal(one, other)
    torch._dynamo.reset()


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64, torch.device("meta")])
@pytest.mark.parametrize("attention", [{"num_kv_heads": 1}, {"latent_attention": LATENT}], ids=["grouped", "latent"])
def test_torch_s_default_dtype_and_device_are_its_user_s(
    attention: dict[str, Any], default: torch.dtype | torch.device
) -> None:
    values = {"vocab_size": 64, "hidden_size": 64, "num_layers": 2, "num_heads": 2, "intermediate_size": 64}
    moe = {"num_experts": 4, "top_k": 2, "residual": "sum", "router": {"noise": "jitter"}}
    config = ModelConfig.from_dict({**values, "moe": moe, **attention})
    tokens = torch.randint(0, 64, (2, 24), generator=torch.Generator().manual_seed(0))
    model = Transformer(config, compute_dtype=torch.bfloat16).initialize(0).train()
    packed = pack_transformer(Transformer(config, compute_dtype=torch.bfloat16).initialize(0).eval())

    def results() -> list[Tensor]:
        output = model(tokens, seed=3)
        loss = linear_cross_entropy(output.hidden.flatten(0, 1), model.output_weight(), tokens.flatten())
        gradients = torch.autograd.grad(loss, model.parameters())
        with torch.no_grad():
            cache = BatchCache(config, 2, 24, dtype=torch.bfloat16, device=torch.device("cpu"))
            hidden = [packed(part, cache=cache).hidden for part in tokens.split([20, 1, 3], 1)]
        return [loss, *gradients, packed.logits(torch.cat(hidden, 1))]

    wanted = results()
    is_device = isinstance(default, torch.device)
    torch.set_default_device(default) if is_device else torch.set_default_dtype(default)
    try:
        got = results()
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    assert all(torch.equal(one, other) for one, other in zip(got, wanted, strict=True))


@pytest.mark.parametrize("norm", ["rmsnorm", "layernorm"])
def test_fp64_gives_what_fp32_gives_more_exactly(norm: str) -> None:
    values = {"vocab_size": 64, "hidden_size": 64, "num_layers": 2, "num_heads": 2, "intermediate_size": 64}
    moe = {"num_experts": 4, "top_k": 2, "residual": "sum"}
    model = Transformer(ModelConfig.from_dict({**values, "norm": norm, "moe": moe})).initialize(0).eval()
    tokens = torch.randint(0, 64, (2, 24), generator=torch.Generator().manual_seed(0))
    found = []
    for dtype in (torch.float32, torch.float64):
        model.compute_dtype = dtype
        hidden = model(tokens).hidden
        assert hidden.dtype is dtype
        found.append([hidden, *torch.autograd.grad(hidden.square().mean(), model.blocks.parameters())])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one.double(), other.double(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("moe", [None, {"num_experts": 4, "top_k": 2, "residual": "sum"}])
def test_trains_under_autocast(moe: dict[str, Any] | None, dtype: torch.dtype) -> None:
    """fp32 weights under autocast, as other people's training loops do it: gradients near those of fp32."""
    values = {"vocab_size": 64, "hidden_size": 64, "num_layers": 2, "num_heads": 2, "intermediate_size": 64, "moe": moe}
    model = Transformer(ModelConfig.from_dict(values)).initialize(0).train()
    tokens = torch.randint(0, 64, (2, 24), generator=torch.Generator().manual_seed(0))

    def gradients() -> list[torch.Tensor]:
        hidden = model(tokens).hidden.flatten(0, 1)
        loss = linear_cross_entropy(hidden, model.output_weight(), tokens.flatten())
        return list(torch.autograd.grad(loss, list(model.parameters())))

    wanted = gradients()
    with torch.autocast("cpu", dtype=dtype):
        got = gradients()
    for mine, theirs in zip(got, wanted, strict=True):
        assert mine.dtype == theirs.dtype == torch.float32
        # Activations are in dtype throughout two layers; a token near a tie may choose another expert.
        assert (mine - theirs).norm() < 0.1 * theirs.norm() + 1e-6


def test_a_model_of_one_half_precision_runs_under_autocast_to_the_other() -> None:
    """A residual stream that is scaled stays in the model's own dtype; layers take it as autocast has it."""
    values = {"vocab_size": 64, "hidden_size": 64, "num_layers": 2, "num_heads": 2, "intermediate_size": 64}
    model = Transformer(ModelConfig.from_dict({**values, "residual_scale": 0.5})).initialize(0)
    tokens = torch.randint(0, 64, (2, 24), generator=torch.Generator().manual_seed(0))
    wanted = model(tokens).hidden
    for own, other in ((torch.bfloat16, torch.float16), (torch.float16, torch.bfloat16)):
        model.compute_dtype = own
        with torch.autocast("cpu", dtype=other):
            assert (model(tokens).hidden.float() - wanted).norm() < 0.02 * wanted.norm()


def test_positions_that_it_cannot_have_are_refused() -> None:
    model = Transformer(ModelConfig(vocab_size=16, hidden_size=8, num_layers=1, num_heads=2, max_positions=4))
    tokens, documents = torch.zeros(1, 6, dtype=torch.int64), torch.tensor([[0, 0, 0, 1, 1, 1]])
    model(tokens, documents=documents, positions=torch.tensor([0, 1, 2, 0, 1, 2]))  # 6 tokens, of 3 positions each
    with pytest.raises(ConfigError, match=r"sequences of 5 positions were given; the model has 4"):
        model(tokens, documents=documents, positions=torch.tensor([0, 1, 2, 0, 1, 4]))
    for positions in (torch.tensor([[0, 1, 2, 0, 1, 2]]), torch.arange(5), torch.arange(-1, 5)):
        with pytest.raises(ConfigError, match=r"positions of shape .* for each column, \(S,\) and none below 0"):
            model(tokens, positions=positions)
