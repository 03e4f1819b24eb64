"""With the same weights, Hugging Face's models and ours give the same logits and the same gradients."""

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moesaic.config.model import ModelConfig
from moesaic.kernels.cross_entropy import linear_cross_entropy
from moesaic.model.feed_forward import FeedForward
from moesaic.model.transformer import Transformer

transformers = pytest.importorskip("transformers", reason="the peer that is compared with is in the dev extra")

SIZES: dict[str, Any] = {"vocab_size": 61, "hidden_size": 24, "num_heads": 4, "max_positions": 64}
THEIR_SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "attn_implementation": "eager",
}
GROUPED = {
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5e4},
}
OURS_GROUPED = {"num_kv_heads": 2, "norm_epsilon": 1e-6, "rope_theta": 5e4}

CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama": (
        "Llama",
        {**GROUPED, "intermediate_size": 40},
        {**OURS_GROUPED, "intermediate_size": 40, "tie_embeddings": False},
    ),
    "llama with biases and tied embeddings": (
        "Llama",
        {**GROUPED, "intermediate_size": 40, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
        {**OURS_GROUPED, "intermediate_size": 40, "attention_bias": "all", "mlp_bias": True},
    ),
    "qwen3": (
        "Qwen3",
        {**GROUPED, "intermediate_size": 40, "head_dim": 8},
        {**OURS_GROUPED, "intermediate_size": 40, "head_dim": 8, "qk_norm": "head", "tie_embeddings": False},
    ),
    "mixtral": (
        "Mixtral",
        {**GROUPED, "intermediate_size": 40, "num_local_experts": 5, "num_experts_per_tok": 2},
        {
            **OURS_GROUPED,
            "intermediate_size": 40,
            "tie_embeddings": False,
            "moe": {"num_experts": 5, "top_k": 2, "router": {"renormalize": True}},
        },
    ),
    "qwen3-moe": (
        "Qwen3Moe",
        {
            **GROUPED,
            "intermediate_size": 40,
            "moe_intermediate_size": 16,
            "head_dim": 8,
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "norm_topk_prob": True,
            "decoder_sparse_step": 2,
        },
        {
            **OURS_GROUPED,
            "intermediate_size": 40,
            "head_dim": 8,
            "qk_norm": "head",
            "tie_embeddings": False,
            "moe": {
                "num_experts": 6,
                "top_k": 3,
                "intermediate_size": 16,
                "every": 2,
                "router": {"renormalize": True},
            },
        },
    ),
    "qwen2-moe, whose shared expert is our sigmoid residual": (
        "Qwen2Moe",
        {
            **GROUPED,
            "intermediate_size": 40,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 28,
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "norm_topk_prob": False,
        },
        {
            **OURS_GROUPED,
            "intermediate_size": 40,
            "attention_bias": "qkv",
            "tie_embeddings": False,
            "moe": {
                "num_experts": 6,
                "top_k": 3,
                "intermediate_size": 16,
                "residual": "sigmoid",
                "residual_intermediate_size": 28,
            },
        },
    ),
    "gpt2": (
        "GPT2",
        {"n_inner": 40, "attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0},
        {
            "intermediate_size": 40,
            "positions": "learned",
            "norm": "layernorm",
            "attention_bias": "all",
            "mlp_bias": True,
            "activation": "gelu_tanh",
        },
    ),
}

# Their name, once "model." or "transformer." is gone, and ours; the first that matches.
RENAMES = [
    (r"^embed_tokens\.weight$|^wte\.weight$", "embedding"),
    (r"^wpe\.weight$", "position_embedding"),
    (r"^(norm|ln_f)\.", "final_norm."),
    (r"^lm_head\.weight$", "lm_head"),
    (r"^(?:layers|h)\.(\d+)\.(?:input_layernorm|ln_1)\.", r"blocks.\1.attention_norm."),
    (r"^(?:layers|h)\.(\d+)\.(?:post_attention_layernorm|ln_2)\.", r"blocks.\1.feed_forward_norm."),
    (r"^(?:layers|h)\.(\d+)\.self_attn\.", r"blocks.\1.attention."),
    (r"^h\.(\d+)\.attn\.c_proj\.", r"blocks.\1.attention.o_proj."),
    (r"^h\.(\d+)\.mlp\.c_fc\.", r"blocks.\1.feed_forward.mlp.up_proj."),
    (r"^h\.(\d+)\.mlp\.c_proj\.", r"blocks.\1.feed_forward.mlp.down_proj."),
    (r"^layers\.(\d+)\.mlp\.gate\.", r"blocks.\1.feed_forward.moe.router."),
    (r"^layers\.(\d+)\.mlp\.experts\.", r"blocks.\1.feed_forward.moe.experts."),
    (r"^layers\.(\d+)\.mlp\.shared_experts?\.", r"blocks.\1.feed_forward.mlp."),
    (r"^layers\.(\d+)\.mlp\.shared_expert_gate\.", r"blocks.\1.feed_forward.mix."),
    (r"^layers\.(\d+)\.mlp\.", r"blocks.\1.feed_forward.mlp."),
]


def ours_of(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """One of their tensors under our names: a Conv1D turned round, GPT-2's fused projection cut in three."""
    name = re.sub(r"^(model|transformer)\.", "", name)
    if re.search(r"c_(attn|proj|fc)\.weight$", name):
        tensor = tensor.t()
    fused = re.match(r"^h\.(\d+)\.attn\.c_attn\.(\w+)$", name)
    if fused:
        parts = zip("qkv", tensor.chunk(3), strict=True)
        return {f"blocks.{fused[1]}.attention.{part}_proj.{fused[2]}": values for part, values in parts}
    for pattern, replacement in RENAMES:
        renamed, count = re.subn(pattern, replacement, name)
        if count:
            return {renamed: tensor}
    raise AssertionError(f"no place for {name}")


def randomize(module: nn.Module) -> None:
    """Norms and biases too: at 1 and 0 a mistake in them would not show."""
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        mean = 1.0 if parameter.dim() == 1 and parameter.mean() > 0.5 else 0.0
        torch.nn.init.normal_(parameter, mean=mean, std=0.15, generator=generator)


@pytest.mark.parametrize("case", CASES)
def test_the_same_logits_and_gradients(case: str) -> None:
    family, their_values, our_values = CASES[case]
    their_config = getattr(transformers, f"{family}Config")(**{**THEIR_SIZES, **their_values})
    theirs = getattr(transformers, "GPT2LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM")(their_config)
    theirs.eval()
    randomize(theirs)
    ours = Transformer(ModelConfig(num_layers=3, **{**SIZES, **our_values})).eval()
    state: dict[str, Tensor] = {}
    for name, parameter in theirs.named_parameters():
        state |= ours_of(name, parameter.detach())
    ours.load_state_dict(state)  # strict: every tensor has its place, and no place stays empty

    inputs = torch.randint(61, (2, 37), generator=torch.Generator().manual_seed(1))
    output = ours(inputs)
    wanted = theirs(inputs).logits
    torch.testing.assert_close(ours.logits(output.hidden), wanted, rtol=1e-4, atol=1e-4)

    hidden, targets = output.hidden[:, :-1].flatten(0, 1), inputs[:, 1:].flatten()
    linear_cross_entropy(hidden, ours.output_weight(), targets).backward()
    F.cross_entropy(wanted[:, :-1].flatten(0, 1), targets).backward()
    got = dict(ours.named_parameters())
    for name, parameter in theirs.named_parameters():
        assert parameter.grad is not None, name
        for ours_name, grad in ours_of(name, parameter.grad).items():
            mine = got[ours_name].grad
            assert mine is not None, ours_name
            # A key's bias moves every score of a query alike: its gradient is zero, up to rounding.
            assert (mine - grad).norm() < 1e-4 * grad.norm() + 1e-6, ours_name


def test_the_same_moe_layer_as_deepseek_v3() -> None:
    """Sigmoid scores, groups, a correction bias on the choice, renormalised, scaled, and a shared expert."""
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

    their_config = transformers.DeepseekV3Config(
        hidden_size=24,
        intermediate_size=40,
        moe_intermediate_size=16,
        n_routed_experts=8,
        n_shared_experts=1,
        num_experts_per_tok=3,
        n_group=4,
        topk_group=2,
        norm_topk_prob=True,
        routed_scaling_factor=2.5,
    )
    theirs = DeepseekV3MoE(their_config)
    randomize(theirs)
    bias = torch.randn(8, generator=torch.Generator().manual_seed(2)) * 0.3
    theirs.gate.e_score_correction_bias.copy_(bias)
    router = {
        "scoring": "sigmoid",
        "renormalize": True,
        "scale": 2.5,
        "num_groups": 4,
        "top_groups": 2,
        "score_correction_bias": True,
    }
    moe = {"num_experts": 8, "top_k": 3, "intermediate_size": 16, "residual": "sum", "residual_intermediate_size": 16}
    config = ModelConfig(num_layers=1, **SIZES, moe={**moe, "router": router})
    ours = FeedForward(config, config.layers[0])
    state = {"moe.router.score_correction_bias": bias}
    prefix = "blocks.0.feed_forward."
    for name, parameter in theirs.named_parameters():
        for renamed, tensor in ours_of(f"layers.0.mlp.{name}", parameter.detach()).items():
            state[renamed.removeprefix(prefix)] = tensor
    ours.load_state_dict(state)

    x = torch.randn(37, 24, generator=torch.Generator().manual_seed(3)).requires_grad_()
    out, wanted = ours(x)[0], theirs(x[None])[0]
    torch.testing.assert_close(out, wanted, rtol=1e-4, atol=1e-5)
    grads = torch.autograd.grad(out.square().sum(), [x, ours.moe.router.weight])  # type: ignore[union-attr,list-item]
    for mine, grad in zip(grads, torch.autograd.grad(wanted.square().sum(), [x, theirs.gate.weight]), strict=True):
        torch.testing.assert_close(mine, grad, rtol=1e-3, atol=1e-3)
