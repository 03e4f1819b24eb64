"""Models of a few thousand weights, and a tokenizer for them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from moesaic.config.model import ModelConfig
from moesaic.data.tokenizer import Tokenizer
from moesaic.kernels.quantized import quantize_weight
from moesaic.model.pack import pack_transformer, packed_shapes
from moesaic.model.transformer import Transformer

TEXT = (
    "The state of the Union is strong, and the people of the Union are free. Whatever the experts say, a router "
    "chooses two of them; what they give is weighed and added. Grüße aus Köln, naïve café, 東京 and \U0001f600."
)
VOCAB_SIZE = 320
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE, "hidden_size": 64, "num_layers": 3, "num_heads": 4, "num_kv_heads": 2,
    "intermediate_size": 96, "max_positions": 192, "init_std": 0.2, "tie_embeddings": False,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "dense": {},
    "mixtral": {"moe": {"num_experts": 5, "top_k": 2, "router": {"renormalize": True}}},
    "pr-moe": {"moe": {"num_experts": [2, 7, 3], "residual": "softmax"}, "norm": "layernorm", "positions": "learned"},
    "latent": {
        "num_kv_heads": 4,
        "latent_attention": {
            "query_rank": 32, "kv_rank": 32, "nope_head_dim": 12, "rope_head_dim": 4, "value_head_dim": 24,
        },
        "moe": {"num_experts": 4, "top_k": 2, "layers": [1, 2], "residual": "sum"},
    },
}  # fmt: skip


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([TEXT * 4], vocab_size=VOCAB_SIZE)


def build_model(family: str, form: str = "fp32", *, seed: int = 0) -> Transformer:
    """form: fp32, bf16 (both as they are), or packed-bf16, packed-int8, packed-int4."""
    config = ModelConfig.from_dict({**SIZES, **FAMILIES[family]})
    dtype = torch.float32 if form == "fp32" else torch.bfloat16
    model = Transformer(config, compute_dtype=dtype).initialize(seed)
    if form in ("fp32", "bf16"):
        return model.eval()
    if form == "packed-bf16":
        return pack_transformer(model)
    names = packed_shapes(model)
    bits = 8 if form == "packed-int8" else 4
    group = None if bits == 8 else 32
    return pack_transformer(
        model,
        {name: quantize_weight(model.get_parameter(name).detach(), bits=bits, group_size=group) for name in names},
    )


@pytest.fixture(scope="session")
def make_model() -> Callable[..., Transformer]:
    """Models, made once each."""
    made: dict[tuple[Any, ...], Transformer] = {}

    def make(family: str = "mixtral", form: str = "fp32", *, seed: int = 0) -> Transformer:
        key = (family, form, seed)
        if key not in made:
            made[key] = build_model(family, form, seed=seed)
        return made[key]

    return make
