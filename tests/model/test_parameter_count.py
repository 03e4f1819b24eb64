"""The planner's counts are those of the model that is built, its activations what autograd keeps of a step."""

from typing import Any

import pytest
import torch

from moesaic.config.load import load_model_config
from moesaic.config.model import ModelConfig
from moesaic.config.presets import preset_names
from moesaic.kernels.cross_entropy import linear_cross_entropy
from moesaic.model.transformer import Transformer
from moesaic.plan.cost import count_parameters, memory

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
        "moe": {"num_experts": 5, "top_k": 3, "intermediate_size": 11, "router": {"score_correction_bias": True}},
    },
    "pyramid with shared expert": {
        "mlp_bias": True,
        "moe": {
            "num_experts": [2, 7],
            "top_k": [1, 2],
            "intermediate_size": [13, 8],
            "layers": [1, 4],
            "residual": "sigmoid",
            "residual_intermediate_size": 9,
        },
    },
    "experts scaled": {"moe": {"num_experts": 3, "every": 2, "output_scale": True}},
    "heads normed after their rotation": {"num_kv_heads": 2, "head_dim": 10, "qk_norm": "rotated_head"},
    "norms behind": {"norm_place": "behind", "moe": {"num_experts": 3}},
    "heads normed together": {"num_kv_heads": 2, "head_dim": 10, "qk_norm": "full", "moe": {"num_experts": 3}},
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


# Of dense-tiny, whose positions are learned.
LATENT = [
    "model.positions=rotary", "model.attention_bias=none", "model.norm=rmsnorm", "model.head_dim=null",
    "model.latent_attention.kv_rank=40", "model.latent_attention.nope_head_dim=20",
    "model.latent_attention.rope_head_dim=12", "model.latent_attention.value_head_dim=24",
]  # fmt: skip


@pytest.mark.parametrize("name", [*preset_names(), *ODD])
def test_the_built_model_has_the_counted_parameters(name: str) -> None:
    config = ModelConfig(**{**BASE, **ODD[name]}) if name in ODD else load_model_config(name)
    with torch.device("meta"):
        model = Transformer(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == count_parameters(config).total


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("dense-tiny", []),
        ("dense-tiny", ["model.activation=swiglu", "model.norm=rmsnorm", "model.qk_norm=head", "model.num_kv_heads=1"]),
        ("dense-tiny", ["model.activation=swiglu", "model.norm=rmsnorm", "model.qk_norm=full", "model.num_kv_heads=1"]),
        ("dense-tiny", LATENT),
        ("dense-tiny", [*LATENT, "model.latent_attention.query_rank=24", "model.latent_attention.value_head_dim=32"]),
        ("moe-tiny-16", []),
        ("moe-tiny-16", ["model.moe.top_k=3", "model.activation=swiglu"]),
        ("pr-moe-tiny-8-16", []),
        ("pr-moe-tiny-8-16", ["model.moe.residual=softmax", "model.moe.intermediate_size=96"]),
    ],
)
def test_the_estimated_activations_are_what_autograd_keeps(name: str, changes: list[str]) -> None:
    """An estimate for choosing a micro-batch: a tenth off is as good as right."""
    config = load_model_config(name, changes)
    batch, length = 2, 250
    model = Transformer(config, compute_dtype=torch.bfloat16).initialize(0).train()
    weight_shapes = {tuple(parameter.shape) for parameter in model.parameters()}
    weight_shapes.add((2 * config.intermediate_size, config.hidden_size))  # SwiGLU's two matrices, joined for the step
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tuple(tensor.shape) not in weight_shapes:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    tokens = torch.randint(0, config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(0))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = model(tokens).hidden.flatten(0, 1)
        loss = linear_cross_entropy(hidden, model.output_weight(), tokens.flatten())
    assert loss.requires_grad
    measured = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    estimate = memory(config, micro_batch_size=batch, sequence_length=length)
    assert estimate.activation_bytes == pytest.approx(measured, rel=0.1)
