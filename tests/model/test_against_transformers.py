"""With the same weights, Hugging Face's models and ours give the same logits and the same gradients."""

import math
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

# Sequences here are 37 tokens: beyond 16 positions, within them and the factor's.
ROPE: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "linear": ({"rope_type": "linear", "factor": 3.0}, {"kind": "linear", "factor": 3.0}),
    "llama3": (
        {
            "rope_type": "llama3",
            "factor": 4.0,
            "original_max_position_embeddings": 16,
            "low_freq_factor": 0.7,
            "high_freq_factor": 2.5,
        },
        {
            "kind": "llama3",
            "factor": 4.0,
            "original_max_positions": 16,
            "low_frequency_factor": 0.7,
            "high_frequency_factor": 2.5,
        },
    ),
    "yarn": (
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
        {"kind": "yarn", "factor": 4.0, "original_max_positions": 16},
    ),
    "yarn with everything said": (
        {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 16,
            "beta_fast": 3.0,
            "beta_slow": 0.2,
            "truncate": False,
            "attention_factor": 1.3,
        },
        {
            "kind": "yarn",
            "factor": 4.0,
            "original_max_positions": 16,
            "beta_fast": 3.0,
            "beta_slow": 0.2,
            "truncate": False,
            "attention_factor": 1.3,
        },
    ),
}
HEAD, NOPE, TURNED, VALUE = 10, 6, 4, 7
LATENT = {"kv_rank": 10, "nope_head_dim": NOPE, "rope_head_dim": TURNED, "value_head_dim": VALUE}
THEIR_LATENT = {
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-5,
    "kv_lora_rank": 10,
    "qk_nope_head_dim": NOPE,
    "qk_rope_head_dim": TURNED,
    "v_head_dim": VALUE,
    "intermediate_size": 40,
    "moe_intermediate_size": 16,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
    "first_k_dense_replace": 1,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5e4},
}
# As DeepSeek's: a factor on cosines and sines from two numbers, and one on the scores from the second.
THEIR_YARN = {
    "rope_type": "yarn",
    "rope_theta": 5e4,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "mscale": 0.9,
    "mscale_all_dim": 0.7,
}


def mscale(factor: float, share: float) -> float:
    return 0.1 * share * math.log(factor) + 1.0


OUR_YARN = {
    "rope_scaling": {
        "kind": "yarn",
        "factor": 4.0,
        "original_max_positions": 16,
        "attention_factor": mscale(4.0, 0.9) / mscale(4.0, 0.7),
    },
    "attention_scale": mscale(4.0, 0.7) ** 2 / math.sqrt(HEAD),
}


def ours_latent(query_rank: int | None, router: dict[str, Any]) -> dict[str, Any]:
    return {
        "norm_epsilon": 1e-5,
        "rope_theta": 5e4,
        "intermediate_size": 40,
        "tie_embeddings": False,
        "latent_attention": {**LATENT, "query_rank": query_rank},
        "moe": {
            "num_experts": 8,
            "top_k": 3,
            "intermediate_size": 16,
            "layers": [1, 2],
            "residual": "sum",
            "residual_intermediate_size": 32,
            "router": {"scale": 2.5, "num_groups": 4, "top_groups": 2, **router},
        },
    }


V2_ROUTER = {"scoring": "softmax"}
V3_ROUTER = {"scoring": "sigmoid", "renormalize": True, "score_correction_bias": True}

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
    "olmoe, whose heads are normed together": (
        "Olmoe",
        {
            **GROUPED,
            "intermediate_size": 16,
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "norm_topk_prob": False,
            # Theirs has no gradient in the row of the padding token, nor does it fit this vocabulary's end.
            "pad_token_id": None,
            "eos_token_id": None,
        },
        {
            **OURS_GROUPED,
            "intermediate_size": 16,
            "qk_norm": "full",
            "tie_embeddings": False,
            "moe": {"num_experts": 6, "top_k": 3},
        },
    ),
    **{
        f"llama, {name}, heads of {dim}": (
            "Llama",
            {**GROUPED, "rope_parameters": {"rope_theta": 5e4, **theirs}, "intermediate_size": 40, "head_dim": dim},
            {
                **OURS_GROUPED,
                "rope_scaling": ours,
                "intermediate_size": 40,
                "head_dim": dim,
                "tie_embeddings": False,
            },
        )
        for name, (theirs, ours) in ROPE.items()
        for dim in (8, 12)
    },
    "deepseek-v2 without a query rank": (
        "DeepseekV2",
        {**THEIR_LATENT, "q_lora_rank": None, "topk_method": "group_limited_greedy"},
        ours_latent(None, V2_ROUTER),
    ),
    "deepseek-v2, yarn": (
        "DeepseekV2",
        {
            **THEIR_LATENT,
            "q_lora_rank": 11,
            "topk_method": "group_limited_greedy",
            "rope_parameters": THEIR_YARN,
        },
        {**ours_latent(11, V2_ROUTER), **OUR_YARN},
    ),
    "deepseek-v3": (
        "DeepseekV3",
        {**THEIR_LATENT, "q_lora_rank": 11, "norm_topk_prob": True, "num_mtp_layers": 0},
        ours_latent(11, V3_ROUTER),
    ),
    "deepseek-v3 without a query rank, yarn": (
        "DeepseekV3",
        {
            **THEIR_LATENT,
            "q_lora_rank": None,
            "norm_topk_prob": True,
            "num_mtp_layers": 0,
            "rope_parameters": THEIR_YARN,
        },
        {**ours_latent(None, V3_ROUTER), **OUR_YARN},
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
    (r"^layers\.(\d+)\.self_attn\.q_a_proj\.", r"blocks.\1.attention.q_down_proj."),
    (r"^layers\.(\d+)\.self_attn\.q_a_layernorm\.", r"blocks.\1.attention.q_down_norm."),
    (r"^layers\.(\d+)\.self_attn\.q_b_proj\.", r"blocks.\1.attention.q_up_proj."),
    (r"^layers\.(\d+)\.self_attn\.kv_a_proj_with_mqa\.", r"blocks.\1.attention.kv_down_proj."),
    (r"^layers\.(\d+)\.self_attn\.kv_a_layernorm\.", r"blocks.\1.attention.kv_down_norm."),
    (r"^layers\.(\d+)\.self_attn\.kv_b_proj\.", r"blocks.\1.attention.kv_up_proj."),
    (r"^(?:layers|h)\.(\d+)\.self_attn\.", r"blocks.\1.attention."),
    (r"^h\.(\d+)\.attn\.c_proj\.", r"blocks.\1.attention.o_proj."),
    (r"^h\.(\d+)\.mlp\.c_fc\.", r"blocks.\1.feed_forward.mlp.up_proj."),
    (r"^h\.(\d+)\.mlp\.c_proj\.", r"blocks.\1.feed_forward.mlp.down_proj."),
    (r"^layers\.(\d+)\.mlp\.gate\.e_", r"blocks.\1.feed_forward.moe.router."),
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


def halves(name: str, tensor: Tensor) -> Tensor:
    """DeepSeek turns neighbouring channels, we those half a head apart: the rows of each head's turned part, sorted."""
    own = torch.arange(TURNED)
    order = torch.cat([own[::2], own[1::2]])
    if re.search(r"\.q(_b)?_proj\.weight$", name):
        nope, turned = tensor.unflatten(0, (-1, HEAD)).split([NOPE, TURNED], 1)
        return torch.cat([nope, turned[:, order]], 1).flatten(0, 1)
    if name.endswith("kv_a_proj_with_mqa.weight"):
        return torch.cat([tensor[:-TURNED], tensor[-TURNED:][order]])
    return tensor


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

    def renamed(name: str, tensor: Tensor) -> dict[str, Tensor]:
        return ours_of(name, halves(name, tensor) if family.startswith("Deepseek") else tensor)

    ours = Transformer(ModelConfig(num_layers=3, **{**SIZES, **our_values})).eval()
    state: dict[str, Tensor] = {}
    for name, buffer in theirs.named_buffers():
        if name.endswith("score_correction_bias"):
            buffer.normal_(0.0, 0.3, generator=torch.Generator().manual_seed(2))
            state |= ours_of(name, buffer)
    for name, parameter in theirs.named_parameters():
        state |= renamed(name, parameter.detach())
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
        for ours_name, grad in renamed(name, parameter.grad).items():
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
