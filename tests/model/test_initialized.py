"""No module starts with whatever was in memory: each draws its weights where it is made, as torch's own modules do."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from moesaic.config.model import FeedForwardConfig, ModelConfig, RouterConfig
from moesaic.model.attention import Attention
from moesaic.model.feed_forward import FeedForward, Mlp
from moesaic.model.latent_attention import LatentAttention
from moesaic.model.linear import Linear
from moesaic.model.norm import LayerNorm, RmsNorm
from moesaic.model.transformer import Block, Transformer
from moesaic.moe.experts import Experts
from moesaic.moe.layer import MoELayer
from moesaic.moe.router import Router

SIZES: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "num_layers": 2, "num_heads": 2, "mlp_bias": True}
MODEL = ModelConfig(
    **SIZES, positions="learned", norm="layernorm", attention_bias="all", activation="gelu", tie_embeddings=False,
    moe={"num_experts": 4, "residual": "softmax", "output_scale": True, "router": {"score_correction_bias": True}},
)  # fmt: skip
LATENT = ModelConfig(
    **SIZES,
    latent_attention={
        "query_rank": 16, "kv_rank": 16, "nope_head_dim": 8, "rope_head_dim": 4, "value_head_dim": 8
    },
)  # fmt: skip
LAYER = FeedForwardConfig(
    intermediate_size=0,
    num_experts=4,
    top_k=2,
    expert_intermediate_size=48,
    output_scale=True,
    router=RouterConfig(score_correction_bias=True, bias=True),
)
MODULES: dict[str, Callable[[], nn.Module]] = {
    "Linear": lambda: Linear(32, 16, has_bias=True),
    "RmsNorm": lambda: RmsNorm(32, epsilon=1e-5),
    "LayerNorm": lambda: LayerNorm(32, epsilon=1e-5),
    "Router": lambda: Router(32, 4, top_k=2, config=LAYER.router),
    "Experts, gelu": lambda: Experts(32, 48, 4, activation="gelu", has_bias=True),
    "Experts, swiglu": lambda: Experts(32, 48, 4, activation="swiglu", has_bias=True),
    "MoELayer": lambda: MoELayer(32, LAYER, activation="swiglu", has_bias=False),
    "Mlp": lambda: Mlp(32, 48, activation="swiglu", has_bias=True),
    "Attention": lambda: Attention(MODEL),
    "LatentAttention": lambda: LatentAttention(LATENT),
    "FeedForward": lambda: FeedForward(MODEL, MODEL.layers[0]),
    "Block": lambda: Block(MODEL, 0),
    "Transformer": lambda: Transformer(MODEL),
    "Transformer, latent": lambda: Transformer(LATENT),
}


@pytest.fixture(autouse=True)
def fresh_memory_is_nan() -> Iterator[None]:
    """PyTorch fills new memory with NaN while its deterministic mode is on."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def drawn(name: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return MODULES[name]()


@pytest.mark.parametrize("name", MODULES)
def test_a_module_begins_with_weights_of_the_global_generator(name: str) -> None:
    first, again, other = drawn(name, 1), drawn(name, 1), drawn(name, 2)
    assert torch.isnan(torch.empty(3)).all()
    for key, tensor in first.state_dict().items():
        assert torch.isfinite(tensor).all(), key
        assert torch.equal(tensor, again.state_dict()[key]), key
        is_constant = tensor.dim() < 2 or key.endswith("_bias")
        assert torch.equal(tensor, other.state_dict()[key]) == is_constant, key


def test_every_expert_is_drawn_on_its_own_with_the_deviation_of_a_torch_linear() -> None:
    experts = MoELayer(64, LAYER, activation="swiglu", has_bias=False).experts
    for weight in (experts.gate_up_proj, experts.down_proj):
        assert not torch.equal(weight[0], weight[1])
        wanted = nn.Linear(weight.shape[2], weight.shape[1]).weight.detach().std()
        assert abs(float(weight.detach().std() / wanted) - 1) < 0.1


def test_a_layer_made_without_memory_is_drawn_by_reset_parameters() -> None:
    with torch.device("meta"):
        layer = MODULES["MoELayer"]()
    layer.to_empty(device="cpu")
    torch.manual_seed(1)
    layer.reset_parameters()
    for key, tensor in drawn("MoELayer", 1).state_dict().items():
        assert torch.equal(layer.state_dict()[key], tensor), key


def test_a_transformer_begins_as_initialize_defines_it() -> None:
    torch.manual_seed(3)
    model, seeded = Transformer(MODEL), Transformer(MODEL).initialize(0)
    for (key, mine), wanted in zip(model.named_parameters(), seeded.parameters(), strict=True):
        if wanted.min() == wanted.max():
            assert torch.equal(mine, wanted), key
        elif wanted.numel() > 2000:
            assert abs(float(mine.detach().std() / wanted.detach().std()) - 1) < 0.1, key


def test_what_fills_every_weight_itself_need_not_have_them_drawn() -> None:
    state = torch.get_rng_state()
    model = Transformer.uninitialized(MODEL, compute_dtype=torch.bfloat16)
    assert torch.equal(torch.get_rng_state(), state) and model.compute_dtype is torch.bfloat16
    assert all(tensor.isnan().all() for tensor in model.state_dict().values())
    for key, tensor in Transformer(MODEL).initialize(0).state_dict().items():
        assert torch.equal(model.initialize(0).state_dict()[key], tensor), key
    with torch.device("meta"):
        assert Transformer.uninitialized(MODEL).device.type == "meta"


def test_a_model_to_be_filled_does_not_wait_for_torchs_compiler() -> None:
    code = """
import sys, torch
from moesaic.config.load import load_model_config
from moesaic.model.transformer import Transformer
Transformer.uninitialized(load_model_config("pr-moe-tiny-8-16"))
assert not {"torch._dynamo", "sympy"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
