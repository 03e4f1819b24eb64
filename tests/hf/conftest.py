"""Small models of every kind, as transformers' models."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from moesaic.config.model import ModelConfig
from moesaic.hf import MoesaicConfig, MoesaicForCausalLM

VOCAB_SIZE = 97
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "num_layers": 4,
    "num_heads": 4,
    "intermediate_size": 64,
    "max_positions": 128,
    "init_std": 0.2,  # far from uniform, so that a wrong token shows
}
MODELS: dict[str, dict[str, Any]] = {
    "dense": {**SIZES, "num_kv_heads": 2, "qk_norm": "head"},
    "paper": {
        **SIZES,
        "norm": "layernorm",
        "positions": "learned",
        "attention_bias": "all",
        "mlp_bias": True,
        "activation": "gelu",
        "moe": {"num_experts": [4, 8], "every": 2, "residual": "softmax", "router": {"z_loss": 1e-3}},
    },
    "shared expert": {
        **SIZES,
        "tie_embeddings": False,
        "attention_sinks": True,
        "sliding_window": 12,
        "sliding_layers": [0, 2],
        "moe": {
            "num_experts": [4, 6, 8, 8],
            "top_k": 2,
            "residual": "sigmoid",
            "router": {"scoring": "sigmoid", "renormalize": True, "score_correction_bias": True, "bias": True},
        },
    },
    "latent": {
        **SIZES,
        "latent_attention": {"kv_rank": 16, "nope_head_dim": 6, "rope_head_dim": 4, "value_head_dim": 10},
        "rope_scaling": {"kind": "yarn", "factor": 4.0, "original_max_positions": 32},
        "moe": {"num_experts": 4, "every": 2, "residual": "sum", "output_scale": True},
    },
    "pyramid": {**SIZES, "num_kv_heads": 1, "moe": {"num_experts": [4, 8], "top_k": 2, "every": 2, "residual": "sum"}},
}


@pytest.fixture
def make() -> Callable[..., MoesaicForCausalLM]:
    """A function (kind="pyramid", **changes) that returns a model in evaluation mode, the same every time."""

    def build(kind: str = "pyramid", /, **changes: Any) -> MoesaicForCausalLM:
        torch.manual_seed(0)
        return MoesaicForCausalLM(MoesaicConfig(ModelConfig(**{**MODELS[kind], **changes}))).eval()

    return build


@pytest.fixture(params=MODELS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def prompts() -> list[list[int]]:
    """Of lengths 1, 25, 32 and 40: one token, and before, at and behind the end of a block of the cache."""
    generator = torch.Generator().manual_seed(4)
    return [torch.randint(VOCAB_SIZE, (length,), generator=generator).tolist() for length in (1, 25, 32, 40)]


@pytest.fixture
def pad() -> Callable[..., dict[str, torch.Tensor]]:
    """A function (prompts, side="left") that returns input_ids and attention_mask."""

    def build(prompts: list[list[int]], side: str = "left") -> dict[str, torch.Tensor]:
        width = max(map(len, prompts))
        ids, mask = torch.full((len(prompts), width), 7), torch.zeros(len(prompts), width, dtype=torch.int64)
        for row, prompt in enumerate(prompts):
            place = slice(width - len(prompt), width) if side == "left" else slice(0, len(prompt))
            ids[row, place], mask[row, place] = torch.tensor(prompt), 1
        return {"input_ids": ids, "attention_mask": mask}

    return build
