"""Costs reproduce the published sizes by the formula, and a naive listing of every matrix for any model."""

from math import prod
from typing import Any

import pytest

from moesaic.config.load import load_model_config
from moesaic.config.model import FeedForwardConfig, ModelConfig
from moesaic.config.presets import preset_names
from moesaic.plan.cost import (
    count_parameters,
    flops_per_token,
    memory,
    paper_parameters,
    training_flops_per_token,
)

# Preset and changes, with embeddings or without, and the size in billions as printed: DeepSpeed-MoE, tables 2 and 6,
# figure 4, and the arithmetic that ties them together.
PUBLISHED: dict[str, tuple[str, list[str], bool, str]] = {
    "350M+MoE-128": ("moe-350m-128", [], True, "13.14"),
    "1.3B+MoE-128": ("moe-1.3b-128", [], True, "52.46"),
    "1.3B+MoE-128 without embeddings": ("moe-1.3b-128", [], False, "52.35"),
    "350M+PR-MoE-32/64": ("pr-moe-350m-32-64", [], True, "4.11"),
    "1.3B+PR-MoE-64/128": ("pr-moe-1.3b-64-128", [], True, "31.38"),
    "350M MoS": ("mos-350m", [], True, "3.54"),
    "1.3B MoS": ("mos-1.3b", [], True, "26.94"),
    "350M+MoE-32": ("moe-350m-128", ["model.moe.num_experts=32"], True, "3.48"),
    "350M+Pyramid-32/64": ("pr-moe-350m-32-64", ["model.moe.residual=null"], True, "4.01"),
    "350M+Residual-32": ("pr-moe-350m-32-64", ["model.moe.num_experts=32"], True, "3.58"),
    "125M+MoE-64": (
        "moe-350m-128",
        ["model.num_layers=12", "model.hidden_size=768", "model.num_heads=12", "model.moe.num_experts=64"],
        True,
        "1.91",
    ),
    "2.4B+MoE-128": ("moe-2.4b-128", [], True, "107.06"),
    "2.4B+MoE-128 without embeddings": ("moe-2.4b-128", [], False, "106.87"),
    "8B+MoE-128": ("moe-8b-128", [], False, "348.98"),
    "24B+MoE-128": ("moe-24b-128", [], False, "1046.91"),
    "47B+MoE-128": ("moe-47b-128", [], False, "2024.03"),
}


@pytest.mark.parametrize("model", PUBLISHED)
def test_published_sizes_to_the_printed_digits(model: str) -> None:
    name, changes, with_embeddings, printed = PUBLISHED[model]
    count = paper_parameters(load_model_config(name, changes), with_embeddings=with_embeddings)
    assert f"{count / 1e9:.2f}" == printed


@pytest.mark.parametrize("name", preset_names())
def test_real_models_are_within_half_a_percent_of_the_formula(name: str) -> None:
    config = load_model_config(name)
    assert count_parameters(config).total == pytest.approx(paper_parameters(config), rel=0.005)


def test_moe_adds_parameters_and_next_to_no_work() -> None:
    """Top-1 over experts the size of the dense MLP: the same active parameters but for the routers."""
    dense = count_parameters(load_model_config("dense-1.3b"))
    moe = count_parameters(load_model_config("moe-1.3b-128"))
    assert moe.active - dense.active == moe.router == 12 * 128 * 2048
    assert moe.total > 39 * dense.total


def shapes_of_mlp(config: ModelConfig, width: int) -> list[tuple[int, ...]]:
    hidden = config.hidden_size
    inputs = 2 if config.activation.startswith("swiglu") else 1
    shapes: list[tuple[int, ...]] = [(width, hidden)] * inputs + [(hidden, width)]
    return shapes + ([(width,)] * inputs + [(hidden,)] if config.mlp_bias else [])


def shapes_of_layer(config: ModelConfig, layer: FeedForwardConfig, num_experts: int) -> list[tuple[int, ...]]:
    hidden, q, kv = config.hidden_size, config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    shapes: list[tuple[int, ...]] = [(hidden,)] * (4 if config.norm == "layernorm" else 2)
    latent = config.latent_attention
    if latent is None:
        shapes += [(q, hidden), (kv, hidden), (kv, hidden), (hidden, q)]
    else:
        heads, rank = config.num_heads, latent.kv_rank
        shapes += [(rank + latent.rope_head_dim, hidden), (rank,)]
        shapes += [(latent.nope_head_dim + latent.value_head_dim, rank)] * heads
        shapes += [(hidden, latent.value_head_dim)] * heads
        down = latent.query_rank
        shapes += [(q, hidden)] if down is None else [(down, hidden), (down,), (q, down)]
    if config.attention_bias in ("qkv", "all"):
        shapes += [(q,), (kv,), (kv,)]
    if config.attention_bias == "all":
        shapes += [(hidden,)]
    if config.qk_norm in ("head", "rotated_head"):
        shapes += [(config.head_dim,)] * 2
    if config.qk_norm == "full":
        shapes += [(q,), (kv,)]
    if config.attention_sinks:
        shapes += [(config.num_heads,)]
    if layer.router.bias:
        shapes += [(layer.num_experts,)]
    if not layer.is_moe or layer.residual:
        shapes += shapes_of_mlp(config, layer.intermediate_size)
    for _ in range(num_experts):
        shapes += shapes_of_mlp(config, layer.expert_intermediate_size)
    if layer.is_moe:
        shapes += [(layer.num_experts, hidden)]
    if layer.residual == "softmax":
        shapes += [(2, hidden), (2,)]
    if layer.residual == "sigmoid":
        shapes += [(1, hidden)]
    return shapes


def numel(shapes: list[tuple[int, ...]]) -> int:
    return sum(prod(shape) for shape in shapes)


BASE: dict[str, Any] = {"vocab_size": 101, "hidden_size": 24, "num_layers": 5, "num_heads": 4, "max_positions": 33}
ODD: dict[str, dict[str, Any]] = {
    "dense": {},
    "everything with a bias": {
        "positions": "learned",
        "norm": "layernorm",
        "attention_bias": "all",
        "mlp_bias": True,
        "activation": "gelu",
        "tie_embeddings": False,
        "moe": {"num_experts": 3, "residual": "softmax"},
    },
    "grouped queries, odd widths": {
        "num_heads": 6,
        "num_kv_heads": 2,
        "head_dim": 10,
        "intermediate_size": 37,
        "qk_norm": "head",
        "attention_bias": "qkv",
        "moe": {"num_experts": 5, "top_k": 3, "intermediate_size": 11},
    },
    "pyramid with shared expert": {
        "mlp_bias": True,
        "dropout": 0.1,
        "moe": {
            "num_experts": [2, 7],
            "top_k": [1, 2],
            "intermediate_size": [13, 8],
            "layers": [1, 4],
            "residual": "sigmoid",
            "residual_intermediate_size": 9,
        },
    },
    "heads normed after their rotation": {"num_kv_heads": 2, "head_dim": 10, "qk_norm": "rotated_head"},
    "heads normed together": {"num_kv_heads": 2, "head_dim": 10, "qk_norm": "full", "moe": {"num_experts": 3}},
    # A window whose mean over 33 positions is a whole number.
    "windows, sinks and a router's bias": {
        "attention_sinks": True,
        "sliding_window": 12,
        "sliding_layers": [0, 2],
        "activation": "swiglu_oai",
        "mlp_bias": True,
        "moe": {"num_experts": 3, "router": {"bias": True}},
    },
    "latent attention": {
        "latent_attention": {"kv_rank": 9, "nope_head_dim": 6, "rope_head_dim": 4, "value_head_dim": 7},
        "moe": {"num_experts": 3, "layers": [1, 2], "residual": "sum", "residual_intermediate_size": 9},
    },
    "latent attention, query rank": {
        "latent_attention": {
            "query_rank": 11,
            "kv_rank": 9,
            "nope_head_dim": 6,
            "rope_head_dim": 4,
            "value_head_dim": 13,
        },
    },
    "one expert, summed": {"activation": "gelu_tanh", "moe": {"num_experts": 1, "every": 5, "residual": "sum"}},
}


@pytest.fixture(params=[*preset_names(), *ODD])
def config(request: pytest.FixtureRequest) -> ModelConfig:
    return ModelConfig(**{**BASE, **ODD[request.param]}) if request.param in ODD else load_model_config(request.param)


def test_counts_equal_the_naive_listing(config: ModelConfig) -> None:
    count = count_parameters(config)
    assert len(count.layers) == config.num_layers
    for layer, counted in zip(config.layers, count.layers, strict=True):
        assert counted.total == numel(shapes_of_layer(config, layer, layer.num_experts))
        assert counted.active == numel(shapes_of_layer(config, layer, layer.top_k))
    table = config.vocab_size * config.hidden_size
    positions = config.max_positions * config.hidden_size if config.positions == "learned" else 0
    final_norm = config.hidden_size * (2 if config.norm == "layernorm" else 1)
    layers = sum(layer.total for layer in count.layers)
    assert count.total == table + positions + (0 if config.tie_embeddings else table) + final_norm + layers
    assert count.active == table + final_norm + sum(layer.active for layer in count.layers)


def test_the_parts_add_up_to_the_whole(config: ModelConfig) -> None:
    count = count_parameters(config)
    parts = count.embedding + count.attention + count.dense_mlp + count.experts + count.router + count.norms
    assert parts + (0 if config.tie_embeddings else count.output) == count.total


def test_flops_are_two_per_multiplied_weight_and_the_attention(config: ModelConfig) -> None:
    matrices = [shape for layer in config.layers for shape in shapes_of_layer(config, layer, layer.top_k)]
    multiplied = sum(prod(shape) for shape in matrices if len(shape) == 2) + config.vocab_size * config.hidden_size
    latent = config.latent_attention
    values = config.head_dim if latent is None else latent.value_head_dim
    assert flops_per_token(config, context=0) == 2 * multiplied
    seen = sum(min(config.window_of(layer) or 17, 17) for layer in range(config.num_layers))
    attention = 2 * seen * config.num_heads * (config.head_dim + values)
    assert flops_per_token(config, context=17) == 2 * multiplied + attention


@pytest.mark.parametrize("length", [1, 2, 33])
def test_training_flops_are_three_forwards_averaged_over_the_sequence(config: ModelConfig, length: int) -> None:
    over_the_sequence = sum(flops_per_token(config, context=position) for position in range(1, length + 1))
    assert training_flops_per_token(config, length) * length == 3 * over_the_sequence


def test_memory_of_weights_state_and_cache() -> None:
    config = ModelConfig(**{**BASE, **ODD["grouped queries, odd widths"]})
    total = count_parameters(config).total
    estimate = memory(config)
    assert estimate.weights_bytes == 2 * total
    assert estimate.training_state_bytes == 16 * total
    count = count_parameters(config)
    in_blocks = total - count.embedding - (0 if count.is_tied else count.output)
    assert memory(config, optimizer="muon").training_state_bytes == 16 * total - 4 * in_blocks, "one moment there"
    assert estimate.kv_cache_bytes_per_token == 5 * 2 * (2 * 32) * 2, "layers, keys and values, kv heads, bf16"
    assert (estimate.micro_batch_size, estimate.sequence_length) == (1, 33)
    latent = memory(ModelConfig(**{**BASE, **ODD["latent attention"]}))
    assert latent.kv_cache_bytes_per_token == 5 * 32 * 2, "layers, latent and rotary key, bf16"


def test_activations_grow_with_the_tokens_and_shrink_with_checkpointing(config: ModelConfig) -> None:
    one = memory(config, micro_batch_size=1, sequence_length=8)
    many = memory(config, micro_batch_size=3, sequence_length=16)
    assert many.activation_bytes == 6 * one.activation_bytes
    assert many.checkpointed_activation_bytes == 6 * one.checkpointed_activation_bytes
    assert one.checkpointed_activation_bytes < one.activation_bytes
    assert one.weights_bytes == many.weights_bytes
