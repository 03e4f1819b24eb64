"""The tables know the configs that are published: no key is unknown, and the parameters are as many as published."""

import json
from math import prod
from types import ModuleType
from typing import Any

import pytest

from moesaic.config.model import ModelConfig
from moesaic.convert.families import FAMILIES, harmless_keys
from moesaic.convert.keys import Keys, differences, read_config, write_config_keys
from moesaic.convert.tensors import own_tensors
from moesaic.errors import ConversionError

USUAL = {"attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "use_cache": True,
         "initializer_range": 0.02, "torch_dtype": "bfloat16", "transformers_version": "4.40.1", "rope_scaling": None,
         "_name_or_path": ""}  # fmt: skip
QWEN = {**USUAL, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "use_sliding_window": False, "vocab_size": 151936}
YARN = {
    "beta_fast": 32,
    "beta_slow": 1,
    "factor": 40,
    "original_max_position_embeddings": 4096,
    "type": "yarn",
}
DEEPSEEK = {**USUAL, "attention_bias": False, "ep_size": 1, "kv_lora_rank": 512, "max_position_embeddings": 163840,
            "moe_layer_freq": 1, "pretraining_tp": 1, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
            "rms_norm_eps": 1e-6, "rope_theta": 10000, "v_head_dim": 128, "tie_word_embeddings": False,
            "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekConfig"}}  # fmt: skip

HUNYUAN = {**USUAL, "add_classification_head": False, "attention_bias": False, "attention_head_dim": 128,
           "cla_share_factor": 2, "class_num": 0, "dense_list": [4096, 0], "hidden_size": 4096, "im_end_id": 5,
           "im_newline_id": 11, "im_start_id": 4, "mask_init_id": 12, "mlp_bias": False, "norm_type": "rms",
           "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8, "org_vocab_size": 128167,
           "pad_id": 127961, "pad_token_id": 127961, "pool_type": "last", "pretraining_tp": 1, "rms_norm_eps": 1e-5,
           "rope_scaling": {"alpha": 1000.0, "beta_fast": 32, "beta_slow": 1, "factor": 1.0, "mscale": 1.0,
                            "mscale_all_dim": 1.0, "type": "dynamic"},
           "rope_theta": 10000.0, "sep_token_id": 127962, "text_end_id": 7, "text_start_id": 6,
           "tie_word_embeddings": True, "use_cla": False, "use_qk_norm": True, "use_rotary_pos_emb": True,
           "vocab_size": 128167}  # fmt: skip

# Name: its parameters, and its config.json.
PUBLISHED: dict[str, tuple[int, dict[str, Any]]] = {
    "SmolLM2-135M": (134_515_008, {
        **USUAL, "model_type": "llama", "attention_bias": False, "hidden_size": 576, "intermediate_size": 1536,
        "is_llama_config": True, "max_position_embeddings": 8192, "mlp_bias": False, "num_attention_heads": 9,
        "num_hidden_layers": 30, "num_key_value_heads": 3, "pretraining_tp": 1, "rms_norm_eps": 1e-5,
        "rope_interleaved": False, "rope_theta": 100000, "tie_word_embeddings": True, "vocab_size": 49152,
        "transformers.js_config": {"dtype": "q4"}}),
    "Llama-3.2-1B": (1_235_814_400, {
        **USUAL, "model_type": "llama", "attention_bias": False, "head_dim": 64, "hidden_size": 2048,
        "intermediate_size": 8192, "max_position_embeddings": 131072, "mlp_bias": False, "num_attention_heads": 32,
        "num_hidden_layers": 16, "num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-5,
        "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                         "original_max_position_embeddings": 8192, "rope_type": "llama3"},
        "rope_theta": 500000.0, "tie_word_embeddings": True, "vocab_size": 128256}),
    "Mistral-7B-v0.3": (7_248_023_552, {
        **USUAL, "model_type": "mistral", "hidden_size": 4096, "intermediate_size": 14336,
        "max_position_embeddings": 32768, "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5, "rope_theta": 1e6, "sliding_window": None, "tie_word_embeddings": False,
        "vocab_size": 32768}),
    "Qwen2.5-0.5B": (494_032_768, {
        **QWEN, "model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864, "max_position_embeddings": 32768,
        "max_window_layers": 24, "num_attention_heads": 14, "num_hidden_layers": 24, "num_key_value_heads": 2,
        "sliding_window": 32768, "tie_word_embeddings": True, "use_mrope": False}),
    "Qwen3-0.6B": (596_049_920, {
        **QWEN, "model_type": "qwen3", "attention_bias": False, "head_dim": 128, "hidden_size": 1024,
        "intermediate_size": 3072, "max_position_embeddings": 40960, "max_window_layers": 28, "num_attention_heads": 16,
        "num_hidden_layers": 28, "num_key_value_heads": 8, "sliding_window": None, "tie_word_embeddings": True}),
    "Mixtral-8x7B": (46_702_792_704, {
        **USUAL, "model_type": "mixtral", "hidden_size": 4096, "intermediate_size": 14336,
        "max_position_embeddings": 32768, "num_attention_heads": 32, "num_experts_per_tok": 2, "num_hidden_layers": 32,
        "num_key_value_heads": 8, "num_local_experts": 8, "output_router_logits": False, "rms_norm_eps": 1e-5,
        "rope_theta": 1e6, "router_aux_loss_coef": 0.02, "sliding_window": None, "tie_word_embeddings": False,
        "vocab_size": 32000}),
    "OLMoE-1B-7B": (6_919_161_856, {
        **USUAL, "model_type": "olmoe", "attention_bias": False, "clip_qkv": None, "hidden_size": 2048,
        "intermediate_size": 1024, "max_position_embeddings": 4096, "norm_topk_prob": False, "num_attention_heads": 16,
        "num_experts": 64, "num_experts_per_tok": 8, "num_hidden_layers": 16, "num_key_value_heads": 16,
        "output_router_logits": False, "pad_token_id": 1, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "router_aux_loss_coef": 0.01, "tie_word_embeddings": False, "vocab_size": 50304}),
    "Qwen1.5-MoE-A2.7B": (14_315_784_192, {
        **QWEN, "model_type": "qwen2_moe", "decoder_sparse_step": 1, "hidden_size": 2048, "intermediate_size": 5632,
        "max_position_embeddings": 8192, "max_window_layers": 21, "moe_intermediate_size": 1408,
        "norm_topk_prob": False, "num_attention_heads": 16, "num_experts": 60, "num_experts_per_tok": 4,
        "num_hidden_layers": 24, "num_key_value_heads": 16, "output_router_logits": False,
        "router_aux_loss_coef": 0.001, "shared_expert_intermediate_size": 5632, "sliding_window": 32768,
        "tie_word_embeddings": False}),
    "Qwen3-30B-A3B": (30_532_122_624, {
        **QWEN, "model_type": "qwen3_moe", "attention_bias": False, "decoder_sparse_step": 1, "head_dim": 128,
        "hidden_size": 2048, "intermediate_size": 6144, "max_position_embeddings": 40960, "max_window_layers": 48,
        "mlp_only_layers": [], "moe_intermediate_size": 768, "norm_topk_prob": True, "num_attention_heads": 32,
        "num_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": 48, "num_key_value_heads": 4,
        "output_router_logits": False, "router_aux_loss_coef": 0.001, "sliding_window": None,
        "tie_word_embeddings": False}),
    "DeepSeek-V2-Lite": (15_706_484_224, {
        **DEEPSEEK, "model_type": "deepseek_v2", "aux_loss_alpha": 0.001, "first_k_dense_replace": 1,
        "hidden_size": 2048, "intermediate_size": 10944, "moe_intermediate_size": 1408, "n_group": 1,
        "n_routed_experts": 64, "n_shared_experts": 2, "norm_topk_prob": False, "num_attention_heads": 16,
        "num_experts_per_tok": 6, "num_hidden_layers": 27, "num_key_value_heads": 16, "q_lora_rank": None,
        "rope_scaling": {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707}, "routed_scaling_factor": 1.0,
        "scoring_func": "softmax", "seq_aux": True, "topk_group": 1, "topk_method": "greedy", "vocab_size": 102400}),
    "DeepSeek-V3": (671_026_419_200, {
        **DEEPSEEK, "model_type": "deepseek_v3", "first_k_dense_replace": 3, "hidden_size": 7168,
        "intermediate_size": 18432, "moe_intermediate_size": 2048, "n_group": 8, "n_routed_experts": 256,
        "n_shared_experts": 1, "norm_topk_prob": True, "num_attention_heads": 128, "num_experts_per_tok": 8,
        "num_hidden_layers": 61, "num_key_value_heads": 128, "num_nextn_predict_layers": 1, "q_lora_rank": 1536,
        "rope_scaling": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}, "routed_scaling_factor": 2.5,
        "scoring_func": "sigmoid", "topk_group": 4, "topk_method": "noaux_tc", "vocab_size": 129280}),
    "GLM-4.5-Air": (106_852_251_264, {  # 5,760 of them are the correction biases
        **USUAL, "model_type": "glm4_moe", "attention_bias": True, "first_k_dense_replace": 1, "head_dim": 128,
        "hidden_size": 4096, "intermediate_size": 10944, "max_position_embeddings": 131072,
        "moe_intermediate_size": 1408, "n_group": 1, "n_routed_experts": 128, "n_shared_experts": 1,
        "norm_topk_prob": True, "num_attention_heads": 96, "num_experts_per_tok": 8, "num_hidden_layers": 46,
        "num_key_value_heads": 8, "num_nextn_predict_layers": 1, "partial_rotary_factor": 0.5, "rms_norm_eps": 1e-5,
        "rope_theta": 1000000, "routed_scaling_factor": 1.0, "tie_word_embeddings": False, "topk_group": 1,
        "use_qk_norm": False, "vocab_size": 151552}),
    "dots.llm1": (142_774_381_696, {  # 7,808 of them are the correction biases
        **USUAL, "model_type": "dots1", "attention_bias": False, "first_k_dense_replace": 1, "hidden_size": 4096,
        "intermediate_size": 10944, "max_position_embeddings": 32768, "moe_intermediate_size": 1408, "n_group": 1,
        "n_routed_experts": 128, "n_shared_experts": 2, "norm_topk_prob": True, "num_attention_heads": 32,
        "num_experts_per_tok": 6, "num_hidden_layers": 62, "num_key_value_heads": 32, "rms_norm_eps": 1e-5,
        "rope_theta": 10000000, "routed_scaling_factor": 2.5, "scoring_func": "noaux_tc", "sliding_window": None,
        "tie_word_embeddings": False, "topk_group": 1, "vocab_size": 152064}),
    **{name: (parameters, {
        **USUAL, "model_type": "gpt_oss", "attention_bias": True, "eos_token_id": 200002, "experts_per_token": 4,
        "head_dim": 64, "hidden_size": 2880, "initial_context_length": 4096, "intermediate_size": 2880,
        "layer_types": ["sliding_attention", "full_attention"] * (layers // 2), "max_position_embeddings": 131072,
        "num_attention_heads": 64, "num_experts_per_tok": 4, "num_hidden_layers": layers, "num_key_value_heads": 8,
        "num_local_experts": experts, "output_router_logits": False, "pad_token_id": 199999, "rms_norm_eps": 1e-5,
        "rope_scaling": {"beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "original_max_position_embeddings": 4096,
                         "rope_type": "yarn", "truncate": False},
        "rope_theta": 150000, "router_aux_loss_coef": 0.9, "sliding_window": 128, "swiglu_limit": 7.0,
        "tie_word_embeddings": False, "vocab_size": 201088})
        for name, parameters, layers, experts in (
            ("gpt-oss-20b", 20_914_757_184, 24, 32), ("gpt-oss-120b", 116_829_156_672, 36, 128))},
    "Seed-OSS-36B": (36_151_104_512, {
        **USUAL, "model_type": "seed_oss", "attention_bias": True, "attention_dropout": 0.1,
        "attention_out_bias": False, "head_dim": 128, "hidden_size": 5120, "intermediate_size": 27648,
        "max_position_embeddings": 524288, "mlp_bias": False, "num_attention_heads": 80, "num_hidden_layers": 64,
        "num_key_value_heads": 8, "residual_dropout": 0.1, "rms_norm_eps": 1e-6,
        "rope_scaling": {"rope_type": "default"}, "rope_theta": 10000000.0, "tie_word_embeddings": False,
        "vocab_size": 155136}),
    "ERNIE-4.5-0.3B": (360_748_032, {
        **USUAL, "model_type": "ernie4_5", "head_dim": 128, "hidden_size": 1024, "intermediate_size": 3072,
        "max_position_embeddings": 131072, "num_attention_heads": 16, "num_hidden_layers": 18, "num_key_value_heads": 2,
        "pad_token_id": 0, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "tie_word_embeddings": True, "use_bias": False,
        "vocab_size": 103424}),
    "ERNIE-4.5-21B-A3B": (21_825_437_888, {  # 1,728 of them are the correction biases
        **USUAL, "model_type": "ernie4_5_moe", "head_dim": 128, "hidden_size": 2560, "intermediate_size": 12288,
        "max_position_embeddings": 131072, "moe_capacity": [64, 64, 64], "moe_gate": "topk",
        "moe_intermediate_size": 1536, "moe_k": 6, "moe_layer_end_index": 27, "moe_layer_interval": 1,
        "moe_layer_start_index": 1, "moe_num_experts": 64, "moe_num_shared_experts": 2, "moe_use_aux_free": True,
        "num_attention_heads": 20, "num_hidden_layers": 28, "num_key_value_heads": 4, "num_nextn_predict_layers": 1,
        "pad_token_id": 0, "rms_norm_eps": 1e-5, "rope_theta": 500000, "tie_word_embeddings": True, "use_bias": False,
        "vocab_size": 103424}),
    "granite-3.3-2b": (2_533_539_840, {
        **USUAL, "model_type": "granite", "attention_bias": False, "attention_multiplier": 0.015625,
        "embedding_multiplier": 12.0, "hidden_size": 2048, "intermediate_size": 8192, "logits_scaling": 8.0,
        "max_position_embeddings": 131072, "mlp_bias": False, "num_attention_heads": 32, "num_hidden_layers": 40,
        "num_key_value_heads": 8, "residual_multiplier": 0.22, "rms_norm_eps": 1e-5, "rope_theta": 10000000.0,
        "tie_word_embeddings": True, "vocab_size": 49159}),
    "granite-3.1-3b-a800m": (3_298_793_472, {
        **USUAL, "model_type": "granitemoe", "attention_bias": False, "attention_multiplier": 0.015625,
        "embedding_multiplier": 12.0, "hidden_size": 1536, "intermediate_size": 512, "logits_scaling": 6.0,
        "max_position_embeddings": 131072, "num_attention_heads": 24, "num_experts_per_tok": 8,
        "num_hidden_layers": 32, "num_key_value_heads": 8, "num_local_experts": 40, "output_router_logits": False,
        "residual_multiplier": 0.22, "rms_norm_eps": 1e-6, "rope_theta": 5000000.0, "router_aux_loss_coef": 0.001,
        "tie_word_embeddings": True, "vocab_size": 49155}),
    "MiniMax-M2": (228_689_764_864, {  # 15,872 of them are the correction biases
        **USUAL, "model_type": "minimax_m2", "attn_type_list": [1] * 62, "head_dim": 128, "hidden_size": 3072,
        "intermediate_size": 1536, "layernorm_full_attention_beta": 1.0, "layernorm_linear_attention_beta": 1.0,
        "layernorm_mlp_beta": 1.0, "max_position_embeddings": 196608, "mlp_intermediate_size": 8192,
        "mtp_transformer_layers": 1, "num_attention_heads": 48, "num_experts_per_tok": 8, "num_hidden_layers": 62,
        "num_key_value_heads": 8, "num_local_experts": 256, "num_mtp_modules": 3, "output_router_logits": False,
        "qk_norm_type": "per_layer", "rms_norm_eps": 1e-6, "rope_theta": 5000000, "rotary_dim": 64,
        "router_aux_loss_coef": 0.001, "router_jitter_noise": 0.0, "scoring_func": "sigmoid",
        "shared_intermediate_size": 0, "shared_moe_mode": "sigmoid", "sliding_window": None,
        "tie_word_embeddings": False, "use_mtp": True, "use_qk_norm": True, "use_routing_bias": True,
        "vocab_size": 200064}),
    "GLM-4.7-Flash": (29_943_393_920, {  # 2,944 of them are the correction biases
        **USUAL, "model_type": "glm4_moe_lite", "attention_bias": False, "first_k_dense_replace": 1,
        "hidden_size": 2048, "intermediate_size": 10240, "kv_lora_rank": 512, "max_position_embeddings": 202752,
        "moe_intermediate_size": 1536, "n_group": 1, "n_routed_experts": 64, "n_shared_experts": 1,
        "norm_topk_prob": True, "num_attention_heads": 20, "num_experts_per_tok": 4, "num_hidden_layers": 47,
        "num_key_value_heads": 20, "num_nextn_predict_layers": 1, "partial_rotary_factor": 1.0, "q_lora_rank": 768,
        "qk_nope_head_dim": 192, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-5, "rope_theta": 1000000,
        "routed_scaling_factor": 1.8, "tie_word_embeddings": False, "topk_group": 1, "topk_method": "noaux_tc",
        "v_head_dim": 256, "vocab_size": 154880}),
    "Solar-Open-100B": (102_651_799_552, {  # 6,144 of them are the correction biases
        **USUAL, "model_type": "solar_open", "attention_bias": False, "head_dim": 128, "hidden_size": 4096,
        "intermediate_size": 10240, "first_k_dense_replace": 0, "max_position_embeddings": 131072,
        "moe_intermediate_size": 1280, "n_group": 1, "n_routed_experts": 128, "n_shared_experts": 1,
        "norm_topk_prob": True, "num_attention_heads": 64, "num_experts_per_tok": 8, "num_hidden_layers": 48,
        "num_key_value_heads": 8, "partial_rotary_factor": 1.0, "rms_norm_eps": 1e-5, "rope_theta": 1000000,
        "routed_scaling_factor": 1.0, "tie_word_embeddings": False, "topk_group": 1, "use_qk_norm": False,
        "vocab_size": 196608}),
    "SmolLM3-3B": (3_075_098_624, {
        **USUAL, "model_type": "smollm3", "attention_bias": False, "hidden_size": 2048, "intermediate_size": 11008,
        "layer_types": ["full_attention"] * 36, "max_position_embeddings": 65536, "max_window_layers": 28,
        "mlp_bias": False, "no_rope_layer_interval": 4, "no_rope_layers": [1, 1, 1, 0] * 9, "num_attention_heads": 16,
        "num_hidden_layers": 36, "num_key_value_heads": 4, "pad_token_id": 128004, "pretraining_tp": 2,
        "rms_norm_eps": 1e-6, "rope_theta": 5000000.0, "sliding_window": None, "tie_word_embeddings": True,
        "use_sliding_window": False, "vocab_size": 128256}),
    "K-EXAONE-236B": (236_571_156_352, {  # 6,016 of them are the correction biases
        **USUAL, "model_type": "exaone_moe", "first_k_dense_replace": 1, "head_dim": 128, "hidden_size": 6144,
        "intermediate_size": 18432, "layer_types": [*["sliding_attention"] * 3, "full_attention"] * 12,
        "max_position_embeddings": 262144, "mlp_layer_types": ["dense", *["sparse"] * 47],
        "moe_intermediate_size": 2048, "n_group": 1, "norm_topk_prob": True, "num_attention_heads": 64,
        "num_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": 48, "num_key_value_heads": 8,
        "num_nextn_predict_layers": 1, "num_shared_experts": 1, "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_theta": 1000000, "rope_type": "default"}, "routed_scaling_factor": 2.5,
        "scoring_func": "sigmoid", "sliding_window": 128, "sliding_window_pattern": "LLLG",
        "tie_word_embeddings": False, "topk_group": 1, "topk_method": "noaux_tc", "vocab_size": 153600}),
    "EXAONE-4.0-1.2B": (1_279_391_488, {
        **USUAL, "model_type": "exaone4", "head_dim": 64, "hidden_size": 2048, "intermediate_size": 4096,
        "layer_types": ["full_attention"] * 30, "max_position_embeddings": 65536, "num_attention_heads": 32,
        "num_hidden_layers": 30, "num_key_value_heads": 8, "rms_norm_eps": 1e-5,
        "rope_scaling": {"factor": 16.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                         "original_max_position_embeddings": 8192, "rope_type": "llama3"},
        "rope_theta": 1000000, "sliding_window": None, "sliding_window_pattern": None, "tie_word_embeddings": True,
        "vocab_size": 102400}),
    "OLMo-2-7B": (7_298_617_344, {
        **USUAL, "model_type": "olmo2", "attention_bias": False, "hidden_size": 4096, "intermediate_size": 11008,
        "max_position_embeddings": 4096, "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32,
        "pad_token_id": 100277, "rms_norm_eps": 1e-6, "rope_theta": 500000, "tie_word_embeddings": False,
        "vocab_size": 100352}),
    "FlexOlmo-7x7B": (33_270_665_216, {
        **USUAL, "model_type": "flex_olmo", "attention_bias": False, "hidden_size": 4096, "intermediate_size": 11008,
        "max_position_embeddings": 4096, "norm_topk_prob": False, "num_attention_heads": 32, "num_experts": 7,
        "num_experts_per_tok": 5, "num_hidden_layers": 32, "num_key_value_heads": 32, "output_router_logits": False,
        "pad_token_id": 100277, "rms_norm_eps": 1e-6, "rope_theta": 500000, "router_aux_loss_coef": 0.01,
        "tie_word_embeddings": False, "vocab_size": 100352}),
    "Hunyuan-7B": (7_504_568_320, {
        **HUNYUAN, "model_type": "hunyuan_v1_dense", "head_dim": 128, "intermediate_size": 14336,
        "max_position_embeddings": 262144}),
    "Hunyuan-A13B": (80_393_183_232, {
        **HUNYUAN, "model_type": "hunyuan_v1_moe", "intermediate_size": 3072, "max_position_embeddings": 32768,
        "head_dim": 128, "moe_drop_tokens": False, "moe_intermediate_size": [3072] * 32, "moe_layer_num_skipped": 0,
        "moe_random_routing_dropped_token": False, "moe_topk": [8] * 32, "norm_topk_prob": True, "num_experts": 64,
        "num_shared_expert": [1] * 32, "routed_scaling_factor": 1.0, "use_mixed_mlp_moe": True}),
}  # fmt: skip


def read(values: dict[str, Any]) -> ModelConfig:
    family = FAMILIES[values["model_type"]]
    return read_config(family.keys, Keys(values, "config.json"), harmless_keys(family))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_understood_to_the_last_parameter(name: str) -> None:
    parameters, values = PUBLISHED[name]
    assert sum(prod(shape) for shape in own_tensors(read(values)).values()) == parameters


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_can_be_written_as_what_they_are(name: str) -> None:
    values = PUBLISHED[name][1]
    family = FAMILIES[values["model_type"]]
    config = read(values)
    written = write_config_keys(family.keys, config, harmless_keys(family))
    assert differences(config, read({"model_type": family.name, **written})) == []


def test_a_missing_key_means_what_transformers_takes_or_is_asked_for(family: str, families: ModuleType) -> None:
    """transformers' classes have the sizes of one model for what is missing; a tensor's shape tells, or we ask."""
    import transformers

    config_class, values = families.FAMILIES[family]
    make = getattr(transformers, config_class)
    general = transformers.PretrainedConfig().to_dict().keys() - {"tie_word_embeddings"}

    def full(given: dict[str, Any]) -> dict[str, Any]:
        found = json.loads(json.dumps(make(**given).to_dict()))
        return {"model_type": make.model_type} | {key: each for key, each in found.items() if key not in general}

    # Their number says what tensors there are and of which shapes.
    shape_tells = {
        "head_dim", "num_key_value_heads", "q_lora_rank", "n_shared_experts", "first_k_dense_replace",
        "moe_num_shared_experts", "num_shared_experts",
    }  # fmt: skip
    everything = full(values)
    for key in everything.keys() - shape_tells - {"model_type"}:
        rest = {name: each for name, each in everything.items() if name != key}
        try:
            ours = read(rest)
        except ConversionError as error:
            asked = ("requires it", "top_groups (2) is more", "a sliding_window that is on is required")
            assert any(each in str(error) for each in asked), (key, error)
            continue
        theirs = read(full({name: each for name, each in rest.items() if name != "model_type"}))
        assert differences(ours, theirs) == [], key


def test_what_deepseek_v3_takes_for_missing_groups_is_asked_for() -> None:
    for missing in (("n_group",), ("topk_group",), ("n_group", "topk_group")):
        values = {name: each for name, each in PUBLISHED["DeepSeek-V3"][1].items() if name not in missing}
        with pytest.raises(ConversionError, match=rf"config.json has no {missing[0]}; .*complete the file"):
            read(values)


@pytest.mark.parametrize(
    ("name", "keys", "message"),
    [
        ("OLMoE-1B-7B", {"num_local_experts": 32}, r"num_experts is 64 and num_local_experts is 32; .*remove one"),
        ("Llama-3.2-1B", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
         r"rope_scaling and rope_parameters are both given and say something else; .*remove one"),
        ("Llama-3.2-1B", {"rope_scaling": {"type": "linear", "rope_type": "yarn", "factor": 2.0}},
         r"rope_type is 'yarn' and type is 'linear'"),
        ("gpt-oss-20b", {"experts_per_token": 2}, r"num_experts_per_tok is 4 and experts_per_token is 2"),
        ("Qwen2.5-0.5B", {"use_mrope": True}, r"use_mrope is True; False is required"),
    ],
)  # fmt: skip
def test_keys_that_contradict_one_another_are_refused(name: str, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConversionError, match=message):
        read({**PUBLISHED[name][1], **keys})


def test_a_key_that_stands_twice_and_says_the_same_is_read() -> None:
    values = PUBLISHED["Llama-3.2-1B"][1]
    scaling = {**values["rope_scaling"], "type": "llama3", "rope_theta": 500000.0}
    assert read({**values, "rope_scaling": scaling, "rope_parameters": scaling}) == read(values)
    olmoe = PUBLISHED["OLMoE-1B-7B"][1]
    assert read({**olmoe, "num_local_experts": 64}) == read(olmoe)
