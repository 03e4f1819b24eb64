"""The planner's counts are those of the model that is built; nothing is allocated for the larger ones."""

from typing import Any

import pytest
import torch

from moesaic.config.load import load_model_config
from moesaic.config.model import ModelConfig
from moesaic.config.presets import preset_names
from moesaic.model.transformer import Transformer
from moesaic.plan.cost import count_parameters

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
        "qk_norm": True,
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
    "one expert, summed": {"activation": "gelu_tanh", "moe": {"num_experts": 1, "every": 5, "residual": "sum"}},
}


@pytest.mark.parametrize("name", [*preset_names(), *ODD])
def test_the_built_model_has_the_counted_parameters(name: str) -> None:
    config = ModelConfig(**{**BASE, **ODD[name]}) if name in ODD else load_model_config(name)
    with torch.device("meta"):
        model = Transformer(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == count_parameters(config).total
