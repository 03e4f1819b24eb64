"""Small random models of every family in transformers' own words, saved as a user has them, with a tokenizer."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from moesaic.data.tokenizer import Tokenizer

if TYPE_CHECKING:
    import transformers

BASE = {
    "vocab_size": 301,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 20,
    "max_position_embeddings": 96,
    # Ten times the usual: with tiny weights every model says the same.
    "initializer_range": 0.2,
}
EXPERTS = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
LATENT = {
    **BASE, "num_key_value_heads": 4, "moe_intermediate_size": 12, "n_routed_experts": 6, "num_experts_per_tok": 2,
    "n_group": 3, "topk_group": 2, "kv_lora_rank": 9, "qk_rope_head_dim": 4, "qk_nope_head_dim": 6, "v_head_dim": 5,
    "first_k_dense_replace": 1,
}  # fmt: skip
SIGMOID = {**BASE, "moe_intermediate_size": 12, "n_routed_experts": 6, "num_experts_per_tok": 2,
       "first_k_dense_replace": 1}  # fmt: skip
OSS = {**BASE, "head_dim": 8, "num_local_experts": 5, "num_experts_per_tok": 2}
GRANITE = {"embedding_multiplier": 2.5, "residual_multiplier": 0.6, "attention_multiplier": 0.3, "logits_scaling": 1.7}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 24}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16}  # fmt: skip

# Name: transformers' config class and its values.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {**BASE, "rms_norm_eps": 1e-5}),
    "llama, tied, one key head, biases": (
        "LlamaConfig",
        {**BASE, "num_key_value_heads": 1, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": False},
    ),
    "llama, mlp biases, wide heads": ("LlamaConfig", {**BASE, "head_dim": 10, "mlp_bias": True}),
    "llama, linear rope": ("LlamaConfig", {**BASE, "rope_scaling": {"rope_type": "linear", "factor": 3.0}}),
    "llama, llama3 rope": ("LlamaConfig", {**BASE, "rope_theta": 500.0, "rope_scaling": LLAMA3}),
    "llama, yarn rope": ("LlamaConfig", {**BASE, "rope_scaling": YARN}),
    "llama, yarn with its own factor": (
        "LlamaConfig",
        {**BASE, "rope_scaling": {**YARN, "attention_factor": 0.9, "beta_fast": 16.0, "beta_slow": 2.0}},
    ),
    "mistral": ("MistralConfig", {**BASE, "sliding_window": None, "rms_norm_eps": 1e-5}),
    "mistral, wide heads, a window over all positions": (
        "MistralConfig",
        {**BASE, "head_dim": 10, "sliding_window": 96, "tie_word_embeddings": True, "rope_theta": 1e6},
    ),
    "mistral, sliding": ("MistralConfig", {**BASE, "sliding_window": 7}),
    "qwen2": ("Qwen2Config", BASE),
    "qwen2, sliding from layer 1 on": (
        "Qwen2Config",
        {**BASE, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    ),
    "qwen2, tied": ("Qwen2Config", {**BASE, "tie_word_embeddings": True, "rope_theta": 1e6}),
    "qwen3": ("Qwen3Config", {**BASE, "head_dim": 8}),
    "qwen3, sliding in one layer": (
        "Qwen3Config",
        {**BASE, "head_dim": 8, "use_sliding_window": True, "sliding_window": 2,
         "layer_types": ["full_attention", "sliding_attention", "full_attention"]},
    ),
    "mixtral": ("MixtralConfig", {**BASE, "num_local_experts": 5, "num_experts_per_tok": 2}),
    "mixtral, sliding": (
        "MixtralConfig",
        {**BASE, "num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": 5},
    ),
    "olmoe": ("OlmoeConfig", {**BASE, "num_experts": 5, "num_experts_per_tok": 3}),
    "olmoe, renormalised": (
        "OlmoeConfig",
        {**BASE, "num_experts": 5, "num_experts_per_tok": 2, "norm_topk_prob": True, "tie_word_embeddings": True},
    ),
    "qwen2-moe": (
        "Qwen2MoeConfig",
        {**BASE, **EXPERTS, "shared_expert_intermediate_size": 16, "decoder_sparse_step": 2},
    ),
    "qwen2-moe, dense at both ends": (
        "Qwen2MoeConfig",
        {**BASE, **EXPERTS, "num_key_value_heads": 1, "shared_expert_intermediate_size": 9, "mlp_only_layers": [0, 2],
         "tie_word_embeddings": True},
    ),
    "qwen2-moe, no biases, renormalised": (
        "Qwen2MoeConfig",
        {**BASE, **EXPERTS, "shared_expert_intermediate_size": 7, "qkv_bias": False, "norm_topk_prob": True},
    ),
    "qwen2-moe, sliding": (
        "Qwen2MoeConfig",
        {**BASE, **EXPERTS, "shared_expert_intermediate_size": 9, "use_sliding_window": True, "sliding_window": 6},
    ),
    "qwen3-moe": ("Qwen3MoeConfig", {**BASE, **EXPERTS, "head_dim": 8, "mlp_only_layers": [1]}),
    "qwen3-moe, every second layer": (
        "Qwen3MoeConfig",
        {**BASE, **EXPERTS, "num_hidden_layers": 4, "decoder_sparse_step": 2, "mlp_only_layers": [3], "head_dim": 6,
         "attention_bias": True},
    ),
    "qwen3-moe, sizes that nothing divides": (
        "Qwen3MoeConfig",
        {**BASE, **EXPERTS, "hidden_size": 22, "head_dim": 6, "moe_intermediate_size": 11, "num_experts": 7},
    ),
    "qwen3-moe, renormalised, yarn": (
        "Qwen3MoeConfig",
        {**BASE, **EXPERTS, "head_dim": 8, "norm_topk_prob": True, "rope_scaling": YARN},
    ),
    "qwen3-moe, sliding": (
        "Qwen3MoeConfig",
        {**BASE, **EXPERTS, "head_dim": 8, "use_sliding_window": True, "sliding_window": 9},
    ),
    "deepseek-v2": (
        "DeepseekV2Config",
        {**LATENT, "topk_method": "group_limited_greedy", "q_lora_rank": 10, "kv_lora_rank": 8, "n_shared_experts": 2},
    ),
    "deepseek-v2, lite": (
        "DeepseekV2Config",
        {**LATENT, "topk_method": "greedy", "n_group": None, "topk_group": None, "q_lora_rank": None, "kv_lora_rank": 8,
         "routed_scaling_factor": 1.5},
    ),
    "deepseek-v3": ("DeepseekV3Config", {**LATENT, "q_lora_rank": 10}),
    "deepseek-v3, not renormalised, all layers with experts": (
        "DeepseekV3Config",
        {**LATENT, "q_lora_rank": 7, "n_group": 1, "topk_group": 1, "norm_topk_prob": False, "n_shared_experts": 2,
         "first_k_dense_replace": 0, "routed_scaling_factor": 0.7, "tie_word_embeddings": True},
    ),
    "deepseek-v3, yarn": (
        "DeepseekV3Config",
        {**LATENT, "q_lora_rank": None, "rope_scaling": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.3}},
    ),
    "glm4-moe, as GLM-4.5-Air": (
        "Glm4MoeConfig",
        {**SIGMOID, "attention_bias": True, "head_dim": 8, "partial_rotary_factor": 0.5, "num_nextn_predict_layers": 1},
    ),
    "glm4-moe, as GLM-4.5": (
        "Glm4MoeConfig",
        {**SIGMOID, "attention_bias": True, "head_dim": 12, "use_qk_norm": True, "routed_scaling_factor": 2.5,
         "n_group": 3, "topk_group": 2, "n_shared_experts": 2},
    ),
    "glm4-moe, an odd share, yarn, one key head, not renormalised": (
        "Glm4MoeConfig",
        {**SIGMOID, "num_key_value_heads": 1, "head_dim": 12, "use_qk_norm": True, "norm_topk_prob": False,
         "rope_parameters": {**YARN, "rope_theta": 500.0, "partial_rotary_factor": 0.35},
         "first_k_dense_replace": 0, "tie_word_embeddings": True},
    ),
    "dots1": ("Dots1Config", {**SIGMOID, "n_shared_experts": 2, "norm_topk_prob": True, "sliding_window": None}),
    "dots1, groups, all layers with experts, biases, wide heads, yarn": (
        "Dots1Config",
        {**SIGMOID, "head_dim": 10, "n_group": 3, "topk_group": 2, "n_shared_experts": 1, "first_k_dense_replace": 0,
         "routed_scaling_factor": 2.5, "attention_bias": True, "rope_scaling": YARN, "tie_word_embeddings": True,
         "sliding_window": None},
    ),
    "dots1, sliding from layer 2 on": (
        "Dots1Config",
        {**SIGMOID, "n_shared_experts": 1, "sliding_window": 4, "max_window_layers": 2},
    ),
    "gpt-oss": (
        "GptOssConfig",
        {**OSS, "sliding_window": 8, "rope_parameters": {**YARN, "rope_theta": 500.0, "truncate": False}},
    ),
    "gpt-oss, sliding in one layer, no biases of attention, tied, plain rope": (
        "GptOssConfig",
        {**OSS, "num_key_value_heads": 4, "attention_bias": False, "tie_word_embeddings": True, "sliding_window": 5,
         "layer_types": ["full_attention", "full_attention", "sliding_attention"],
         "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    ),
    "gpt-oss, no window, usual rope": ("GptOssConfig", {**OSS, "intermediate_size": 19, "head_dim": 10}),
    "seed-oss": ("SeedOssConfig", {**BASE, "head_dim": 10, "mlp_bias": True}),
    "seed-oss, one key head, tied": (
        "SeedOssConfig",
        {**BASE, "head_dim": 10, "num_key_value_heads": 1, "tie_word_embeddings": True, "rope_theta": 1e7},
    ),
    "ernie4.5": ("Ernie4_5Config", {**BASE, "head_dim": 10}),
    "ernie4.5, one key head, not tied, linear rope": (
        "Ernie4_5Config",
        {**BASE, "head_dim": 8, "num_key_value_heads": 1, "tie_word_embeddings": False, "rms_norm_eps": 1e-6,
         "rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 1e4}},
    ),
    "ernie4.5-moe": (
        "Ernie4_5_MoeConfig",
        {**BASE, "moe_num_experts": 5, "moe_k": 2, "moe_intermediate_size": 12, "moe_num_shared_experts": 2},
    ),
    "ernie4.5-moe, no shared experts, every second layer but the last, not tied": (
        "Ernie4_5_MoeConfig",
        {**BASE, "num_hidden_layers": 6, "moe_num_experts": 5, "moe_k": 3, "moe_intermediate_size": 12,
         "moe_num_shared_experts": 0, "moe_layer_interval": 2, "moe_layer_end_index": 3, "tie_word_embeddings": False},
    ),
    "minimax-m2": ("MiniMaxM2Config", {**OSS, "head_dim": 8, "rotary_dim": 4}),
    "minimax-m2, all channels turned, one key head, tied, yarn": (
        "MiniMaxM2Config",
        {**OSS, "num_key_value_heads": 1, "tie_word_embeddings": True,
         "rope_parameters": {**YARN, "rope_theta": 500.0}},
    ),
    "glm4-moe-lite": ("Glm4MoeLiteConfig", {**LATENT, "q_lora_rank": 10}),
    "glm4-moe-lite, listed layers, not renormalised, yarn": (
        "Glm4MoeLiteConfig",
        {**{name: value for name, value in LATENT.items() if name != "first_k_dense_replace"},
         "q_lora_rank": None, "n_group": 1, "topk_group": 1, "n_shared_experts": 2, "norm_topk_prob": False,
         "mlp_layer_types": ["sparse", "dense", "sparse"], "tie_word_embeddings": True,
         "rope_parameters": {**YARN, "rope_theta": 1e4, "mscale": 0.7, "mscale_all_dim": 1.3}},
    ),
    "solar-open": ("SolarOpenConfig", {**SIGMOID, "head_dim": 8, "first_k_dense_replace": 0}),
    "solar-open, biases, groups, wide heads, yarn": (
        "SolarOpenConfig",
        {**SIGMOID, "head_dim": 12, "first_k_dense_replace": 0, "attention_bias": True, "n_group": 3, "topk_group": 2,
         "n_shared_experts": 2, "routed_scaling_factor": 1.5, "rope_parameters": {**YARN, "rope_theta": 500.0}},
    ),
    "granite": ("GraniteConfig", {**BASE, **GRANITE}),
    "granite, biases, tied, yarn": (
        "GraniteConfig",
        {**BASE, **GRANITE, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True,
         "rope_scaling": YARN, "rms_norm_eps": 1e-5},
    ),
    "granite-moe": ("GraniteMoeConfig", {**BASE, **GRANITE, "num_local_experts": 5, "num_experts_per_tok": 2}),
    "granite-moe, biases, one key head, tied": (
        "GraniteMoeConfig",
        {**BASE, **GRANITE, "num_local_experts": 6, "num_experts_per_tok": 3, "num_key_value_heads": 1,
         "attention_bias": True, "tie_word_embeddings": True, "logits_scaling": 3},
    ),
    "granite-moe-shared": (
        "GraniteMoeSharedConfig",
        {**BASE, **GRANITE, "num_local_experts": 5, "num_experts_per_tok": 2, "shared_intermediate_size": 9,
         "tie_word_embeddings": True},
    ),
    "granite-moe-shared, of no size": (
        "GraniteMoeSharedConfig",
        {**BASE, **GRANITE, "num_local_experts": 5, "num_experts_per_tok": 2, "shared_intermediate_size": 0},
    ),
    "hunyuan-dense": ("HunYuanDenseV1Config", {**BASE, "head_dim": 10, "tie_word_embeddings": True}),
    "hunyuan-dense, biases, a stretched base": (
        "HunYuanDenseV1Config",
        {**BASE, "head_dim": 6, "attention_bias": True,
         "rope_scaling": {"type": "dynamic", "alpha": 100.0, "factor": 1.0, "beta_fast": 32, "mscale": 1.0}},
    ),
    "hunyuan-moe": ("HunYuanMoEV1Config", {**BASE, "head_dim": 8, "num_experts": 5, "moe_topk": 2}),
    "hunyuan-moe, lists, tied, one key head, a stretched base": (
        "HunYuanMoEV1Config",
        {**BASE, "head_dim": 6, "num_experts": 7, "moe_topk": [3, 3, 3], "num_key_value_heads": 1,
         "tie_word_embeddings": True, "moe_intermediate_size": [20, 20, 20], "num_shared_expert": [1, 1, 1],
         "rope_scaling": {"type": "dynamic", "alpha": 1000.0, "factor": 1.0}},
    ),
    "hunyuan-moe, biases, linear rope": (
        "HunYuanMoEV1Config",
        {**BASE, "head_dim": 10, "num_experts": 5, "moe_topk": 2, "attention_bias": True,
         "rope_scaling": {"rope_type": "linear", "factor": 3.0}},
    ),
    "smollm3": ("SmolLM3Config", {**BASE, "num_hidden_layers": 5, "no_rope_layer_interval": 2}),
    "smollm3, listed, biases, not tied": (
        "SmolLM3Config",
        {**BASE, "head_dim": 8, "no_rope_layers": [0, 1, 0], "attention_bias": True, "mlp_bias": True,
         "tie_word_embeddings": False, "rope_theta": 5e6},
    ),
    "smollm3, no layer turned": ("SmolLM3Config", {**BASE, "no_rope_layers": [0, 0, 0]}),
    "smollm3, sliding in one layer": (
        "SmolLM3Config",
        {**BASE, "no_rope_layers": [1, 0, 1], "use_sliding_window": True, "sliding_window": 6,
         "layer_types": ["full_attention", "full_attention", "sliding_attention"]},
    ),
    "exaone-moe": (
        "ExaoneMoeConfig",
        {**BASE, **EXPERTS, "num_hidden_layers": 4, "head_dim": 8, "sliding_window": 7, "sliding_window_pattern": 2},
    ),
    "exaone-moe, listed layers, not renormalised, groups, tied, yarn": (
        "ExaoneMoeConfig",
        {**BASE, **EXPERTS, "head_dim": 10, "num_experts": 6, "n_group": 3, "topk_group": 2, "num_shared_experts": 2,
         "norm_topk_prob": False, "mlp_layer_types": ["sparse", "dense", "sparse"], "sliding_window": 5,
         "layer_types": ["sliding_attention", "full_attention", "full_attention"], "sliding_window_pattern": "LGG",
         "tie_word_embeddings": True, "rope_parameters": {**YARN, "rope_theta": 500.0}},
    ),
    "exaone-moe, a window over all positions": (
        "ExaoneMoeConfig",
        {**BASE, **EXPERTS, "num_key_value_heads": 1, "sliding_window": 96, "first_k_dense_replace": 0,
         "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    ),
    "exaone-moe, no layer turned": (
        "ExaoneMoeConfig",
        {**BASE, **EXPERTS, "sliding_window": 96, "layer_types": ["full_attention"] * 3},
    ),
    "exaone4": (
        "Exaone4Config",
        {**BASE, "num_hidden_layers": 4, "head_dim": 8, "sliding_window": 7, "sliding_window_pattern": 4},
    ),
    "exaone4, no window, tied, llama3 rope": (
        "Exaone4Config",
        {**BASE, "head_dim": 10, "num_key_value_heads": 1, "sliding_window": None, "tie_word_embeddings": True,
         "layer_types": ["full_attention"] * 3, "rope_parameters": {**LLAMA3, "rope_theta": 1e6}},
    ),
    "olmo2": ("Olmo2Config", {**BASE, "num_key_value_heads": 4}),
    "olmo2, biases, tied, linear rope": (
        "Olmo2Config",
        {**BASE, "attention_bias": True, "tie_word_embeddings": True, "head_dim": 10,
         "rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 1e4}},
    ),
    "flex-olmo": ("FlexOlmoConfig", {**BASE, "num_experts": 5, "num_experts_per_tok": 3}),
    "flex-olmo, renormalised, one key head, biases, tied": (
        "FlexOlmoConfig",
        {**BASE, "num_experts": 6, "num_experts_per_tok": 2, "norm_topk_prob": True, "num_key_value_heads": 1,
         "attention_bias": True, "tie_word_embeddings": True, "rms_norm_eps": 1e-5},
    ),
}  # fmt: skip

# Name: the family that describes it too, and comes first.
WRITTEN_AS = {
    **{name: "llama" for name in FAMILIES if name.startswith("mistral") and not name.endswith("sliding")},
    **{name: "llama" for name in FAMILIES if name.startswith("ernie4.5") and "moe" not in name},
    **{name: "glm4_moe" for name in FAMILIES if name.startswith("solar-open")},
    "glm4-moe-lite": "deepseek_v3",
    "granite-moe-shared, of no size": "granitemoe",
}
# Of these, the names of those in which rotary channels stand in another order.
REORDERED = {name for name in WRITTEN_AS if name.startswith("ernie4.5")}


def build(name: str, *, seed: int = 0) -> "transformers.PreTrainedModel":
    """Return a random model whose every tensor matters: norms and biases are not 1 and 0 either."""
    import transformers

    config_class, values = FAMILIES[name]
    config = getattr(transformers, config_class)(**values, bos_token_id=None, eos_token_id=256, pad_token_id=None)
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    model.set_experts_implementation("eager")  # its grouped products want sizes that are multiples of 16 bytes
    with torch.no_grad():
        for tensor_name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if "inv_freq" in tensor_name:
                continue
            if "norm" in tensor_name or tensor_name.endswith(("bias", "sinks")):
                tensor.add_(torch.randn_like(tensor) * 0.1)
            elif tensor_name.endswith(("gate.weight", "router.weight", "wg.weight")):
                tensor.copy_(torch.randn_like(tensor))  # a router that is sure, so that rounding changes no choice
            elif config_class == "GptOssConfig" and tensor_name.endswith(("gate_up_proj", "down_proj")):
                tensor.mul_(5 if "gate" in tensor_name else 0.1)  # beyond the limits of their activation
    return model


def save(model: "transformers.PreTrainedModel", folder: Path, *, dtype: torch.dtype = torch.float32) -> Path:
    """Save a model and a tokenizer that has a chat template, as a user gets them."""
    model.to(dtype).save_pretrained(folder)
    Tokenizer.train(["the quick brown fox jumps over the lazy dog. " * 20], vocab_size=290).save(folder)
    config = (folder / "tokenizer_config.json").read_text()
    (folder / "tokenizer_config.json").write_text(config.replace("{", '{"model_max_length": 96,', 1))
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    return folder
