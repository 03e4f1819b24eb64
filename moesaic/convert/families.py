"""The families of models in Hugging Face's layout: a table each, of config keys and of tensor names.

A new family is a table more. How keys are read is keys.py's business, how tensors are put together tensors.py's.
"""

from dataclasses import dataclass

import torch

from moesaic.config.model import ModelConfig
from moesaic.convert.keys import (
    Always,
    AttentionScale,
    EqualHeads,
    Fixed,
    Groups,
    HeadDim,
    HunyuanExperts,
    Inverse,
    KeyRule,
    Needed,
    OneOf,
    OnEveryLayer,
    Places,
    PlacesAfter,
    PlacesBetween,
    PlacesListed,
    Rope,
    RotatedLayers,
    RotatedWindow,
    Same,
    SharedExperts,
    SharedSize,
    SlidingWindow,
)
from moesaic.convert.tensors import (
    RowOrder,
    TensorRule,
    latent_key_rows,
    latent_query_rows,
    paired_key_rows,
    paired_query_rows,
    parted_key_norm_rows,
    parted_key_rows,
    parted_query_norm_rows,
    parted_query_rows,
)


@dataclass(frozen=True)
class Family:
    """model_type and architecture as config.json has them. harmless: keys that need no rule, beside HARMLESS. left_out:
    beginnings of names of tensors that the model does not use ({later} stands for a layer behind the last), with the
    reason in `left_out_because`."""

    name: str
    architecture: str
    keys: tuple[KeyRule, ...]
    tensors: tuple[TensorRule, ...]
    harmless: frozenset[str] = frozenset()
    left_out: tuple[str, ...] = ()
    left_out_because: str = ""


# Keys of Hugging Face configs that change nothing of what a model computes when it infers.
HARMLESS = frozenset(
    {
        "_attn_implementation_autoset",
        "_name_or_path",
        "architectures",
        "attention_dropout",
        "auto_map",
        "aux_loss_alpha",
        "bos_token_id",
        "dtype",
        "eos_token_id",
        "ep_size",
        "is_llama_config",
        "model_type",
        "num_mtp_layers",
        "num_nextn_predict_layers",
        "output_router_logits",
        "pad_token_id",
        "pretraining_tp",
        "router_jitter_noise",
        "qk_head_dim",
        "residual_dropout",
        "seq_aux",
        "torch_dtype",
        "transformers.js_config",
        "transformers_version",
        "unsloth_fixed",
        "unsloth_version",
        "use_cache",
    }
)

_SIZES = (
    Same("vocab_size", "vocab_size"),
    Same("hidden_size", "hidden_size"),
    Same("num_hidden_layers", "num_layers"),
    Same("num_attention_heads", "num_heads"),
    Same("max_position_embeddings", "max_positions"),
    Same("initializer_range", "init_std", default=0.02),
    Always("norm", "rmsnorm"),
    Always("positions", "rotary"),
)


def _ties(default: bool) -> Same:
    return Same("tie_word_embeddings", "tie_embeddings", default=default)


_SWIGLU = OneOf("hidden_act", "activation", {"silu": "swiglu"}, default="silu")
_MLP = Same("intermediate_size", "intermediate_size")
_KV_HEADS = Same("num_key_value_heads", "num_kv_heads", default=None)
_ATTENTION_BIAS = OneOf("attention_bias", "attention_bias", {False: "none", True: "all"}, default=False)
_MLP_BIAS = Same("mlp_bias", "mlp_bias", default=False)
_NO_MLP_BIAS = Always("mlp_bias", False)


def _epsilon(default: float) -> Same:
    return Same("rms_norm_eps", "norm_epsilon", default=default)


def _experts(
    count: str, *aliases: str, top_k: str = "num_experts_per_tok", top_k_aliases: tuple[str, ...] = ()
) -> tuple[KeyRule, ...]:
    return (
        Same(count, "moe.num_experts", aliases=aliases),
        Same(top_k, "moe.top_k", aliases=top_k_aliases),
        Same("router_aux_loss_coef", "moe.router.balance_loss", default=0.001),
    )


_EXPERT_SIZE = Same("moe_intermediate_size", "moe.intermediate_size")
_RENORMALIZE = Same("norm_topk_prob", "moe.router.renormalize", default=False)
_CORRECTED_SIGMOID = (Always("moe.router.scoring", "sigmoid"), Always("moe.router.score_correction_bias", True))
_V3_ROUTER = (
    *_CORRECTED_SIGMOID,
    Same("norm_topk_prob", "moe.router.renormalize", default=True),
    Groups(),
)


_LAYER = "model.layers.{layer}"
_MODEL_TENSORS = (
    TensorRule("embedding", ("model.embed_tokens.weight",)),
    TensorRule("lm_head", ("lm_head.weight",)),
    TensorRule("final_norm.weight", ("model.norm.weight",)),
    TensorRule("blocks.{layer}.attention_norm.weight", (f"{_LAYER}.input_layernorm.weight",)),
    TensorRule("blocks.{layer}.feed_forward_norm.weight", (f"{_LAYER}.post_attention_layernorm.weight",)),
)
_BEHIND_TENSORS = (
    TensorRule("blocks.{layer}.attention_norm.weight", (f"{_LAYER}.post_attention_layernorm.weight",)),
    TensorRule("blocks.{layer}.feed_forward_norm.weight", (f"{_LAYER}.post_feedforward_layernorm.weight",)),
    *_MODEL_TENSORS,
)
_ATTENTION_TENSORS = (TensorRule("blocks.{layer}.attention.{rest}", (f"{_LAYER}.self_attn.{{rest}}",)),)
_MLP_TENSORS = (TensorRule("blocks.{layer}.feed_forward.mlp.{rest}", (f"{_LAYER}.mlp.{{rest}}",), layers="dense"),)


def _moe_tensors(
    part: str,
    *,
    gate: str = "gate_proj",
    up: str = "up_proj",
    down: str = "down_proj",
    router: str = "gate",
    shared: str = "shared_expert",
    correction: str = "gate.e_score_correction_bias",
    corrects_rows: bool = False,
) -> tuple[TensorRule, ...]:
    """The tensors of a MoE layer that calls itself `part` and its parts so; corrects_rows: TensorRule's is_row."""
    moe, experts = "blocks.{layer}.feed_forward.moe", f"{_LAYER}.{part}.experts.{{expert}}"
    return (
        TensorRule(f"{moe}.router.weight", (f"{_LAYER}.{part}.{router}.weight",)),
        TensorRule(f"{moe}.router.score_correction_bias", (f"{_LAYER}.{part}.{correction}",), is_row=corrects_rows),
        TensorRule(f"{moe}.experts.gate_up_proj", (f"{experts}.{gate}.weight", f"{experts}.{up}.weight")),
        TensorRule(f"{moe}.experts.down_proj", (f"{experts}.{down}.weight",)),
        TensorRule("blocks.{layer}.feed_forward.mlp.{rest}", (f"{_LAYER}.{part}.{shared}.{{rest}}",), layers="moe"),
        TensorRule("blocks.{layer}.feed_forward.mix.weight", (f"{_LAYER}.{part}.{shared}_gate.weight",)),
    )


def _interleaved(config: ModelConfig) -> RowOrder:
    """Gate and up row by row, of ours one after the other."""
    rows = 2 * config.layers[config.moe_layers[0]].expert_intermediate_size
    return torch.arange(rows).view(-1, 2).t().flatten()


_MOE, _OSS_EXPERTS = "blocks.{layer}.feed_forward.moe", f"{_LAYER}.mlp.experts"
_OSS_TENSORS = (
    TensorRule(f"{_MOE}.router.{{rest}}", (f"{_LAYER}.mlp.router.{{rest}}",)),
    TensorRule(
        f"{_MOE}.experts.gate_up_proj",
        (f"{_OSS_EXPERTS}.gate_up_proj",),
        rows=_interleaved,
        is_stacked=True,
        is_transposed=True,
    ),
    TensorRule(
        f"{_MOE}.experts.gate_up_bias", (f"{_OSS_EXPERTS}.gate_up_proj_bias",), rows=_interleaved, is_stacked=True
    ),
    TensorRule(f"{_MOE}.experts.down_proj", (f"{_OSS_EXPERTS}.down_proj",), is_stacked=True, is_transposed=True),
    TensorRule(f"{_MOE}.experts.down_bias", (f"{_OSS_EXPERTS}.down_proj_bias",), is_stacked=True),
)


_GRANITE_MOE = f"{_LAYER}.block_sparse_moe"
_GRANITE_MOE_TENSORS = (
    TensorRule(f"{_MOE}.router.weight", (f"{_GRANITE_MOE}.router.layer.weight",)),
    TensorRule(f"{_MOE}.experts.gate_up_proj", (f"{_GRANITE_MOE}.input_linear.weight",), is_stacked=True),
    TensorRule(f"{_MOE}.experts.down_proj", (f"{_GRANITE_MOE}.output_linear.weight",), is_stacked=True),
)
_SHARED_MLP, _GRANITE_MLP = "blocks.{layer}.feed_forward.mlp", f"{_LAYER}.shared_mlp"
_GRANITE_SHARED_TENSORS = (
    TensorRule(f"{_SHARED_MLP}.gate_proj.weight", (f"{_GRANITE_MLP}.input_linear.weight",), half=0),
    TensorRule(f"{_SHARED_MLP}.up_proj.weight", (f"{_GRANITE_MLP}.input_linear.weight",), half=1),
    TensorRule(f"{_SHARED_MLP}.down_proj.weight", (f"{_GRANITE_MLP}.output_linear.weight",)),
)


_HEADS, _THEIR_HEADS = "blocks.{layer}.attention", f"{_LAYER}.self_attn"
_PARTED_TENSORS = (
    TensorRule(f"{_HEADS}.q_proj.{{rest}}", (f"{_THEIR_HEADS}.q_proj.{{rest}}",), rows=parted_query_rows),
    TensorRule(f"{_HEADS}.k_proj.{{rest}}", (f"{_THEIR_HEADS}.k_proj.{{rest}}",), rows=parted_key_rows),
    TensorRule(f"{_HEADS}.q_norm.weight", (f"{_THEIR_HEADS}.q_norm.weight",), rows=parted_query_norm_rows),
    TensorRule(f"{_HEADS}.k_norm.weight", (f"{_THEIR_HEADS}.k_norm.weight",), rows=parted_key_norm_rows),
    *_ATTENTION_TENSORS,
)
_PAIRED_TENSORS = (
    TensorRule(f"{_HEADS}.q_proj.{{rest}}", (f"{_THEIR_HEADS}.q_proj.{{rest}}",), rows=paired_query_rows),
    TensorRule(f"{_HEADS}.k_proj.{{rest}}", (f"{_THEIR_HEADS}.k_proj.{{rest}}",), rows=paired_key_rows),
    *_ATTENTION_TENSORS,
)


_HUNYUAN_TENSORS = (
    *_MODEL_TENSORS,
    TensorRule(f"{_HEADS}.q_norm.weight", (f"{_THEIR_HEADS}.query_layernorm.weight",)),
    TensorRule(f"{_HEADS}.k_norm.weight", (f"{_THEIR_HEADS}.key_layernorm.weight",)),
    *_ATTENTION_TENSORS,
)


_LATENT_TENSORS = (
    TensorRule(f"{_HEADS}.q_proj.weight", (f"{_LAYER}.self_attn.q_proj.weight",), rows=latent_query_rows),
    TensorRule(f"{_HEADS}.q_down_proj.weight", (f"{_LAYER}.self_attn.q_a_proj.weight",)),
    TensorRule(f"{_HEADS}.q_down_norm.weight", (f"{_LAYER}.self_attn.q_a_layernorm.weight",)),
    TensorRule(f"{_HEADS}.q_up_proj.weight", (f"{_LAYER}.self_attn.q_b_proj.weight",), rows=latent_query_rows),
    TensorRule(
        f"{_HEADS}.kv_down_proj.weight", (f"{_LAYER}.self_attn.kv_a_proj_with_mqa.weight",), rows=latent_key_rows
    ),
    TensorRule(f"{_HEADS}.kv_down_norm.weight", (f"{_LAYER}.self_attn.kv_a_layernorm.weight",)),
    TensorRule(f"{_HEADS}.kv_up_proj.weight", (f"{_LAYER}.self_attn.kv_b_proj.weight",)),
    TensorRule(f"{_HEADS}.o_proj.weight", (f"{_LAYER}.self_attn.o_proj.weight",)),
)
_LATENT_KEYS = (
    Same("kv_lora_rank", "latent_attention.kv_rank"),
    Same("q_lora_rank", "latent_attention.query_rank", default=None),
    Same("qk_nope_head_dim", "latent_attention.nope_head_dim"),
    Same("qk_rope_head_dim", "latent_attention.rope_head_dim"),
    Same("v_head_dim", "latent_attention.value_head_dim"),
    # Their classes give the small norms 1e-6 whatever the config says.
    Always("latent_attention.norm_epsilon", 1e-6),
    EqualHeads(),
    Fixed("attention_bias", False),
    Rope(is_latent=True),
)


_ROPE = Rope()


def _llama_like(
    *rules: KeyRule,
    has_head_dim: bool,
    epsilon: float = 1e-6,
    rope: Rope = _ROPE,
    activation: KeyRule = _SWIGLU,
    mlp: KeyRule = _MLP,
    ties: bool = False,
) -> tuple[KeyRule, ...]:
    heads = (_KV_HEADS, HeadDim(has_key=has_head_dim))
    return (*_SIZES, _ties(ties), activation, mlp, _epsilon(epsilon), *heads, rope, *rules)


def _granite(*rules: KeyRule) -> tuple[KeyRule, ...]:
    return _llama_like(
        Same("embedding_multiplier", "embedding_scale", default=1.0),
        Same("residual_multiplier", "residual_scale", default=1.0),
        AttentionScale("attention_multiplier", default=1.0),
        Inverse("logits_scaling", "logits_scale"),
        _ATTENTION_BIAS,
        *rules,
        has_head_dim=False,
    )


_GRANITE_EXPERTS = (
    _NO_MLP_BIAS,
    *_experts("num_local_experts", "num_experts"),
    Always("moe.router.renormalize", True),
)


# Of tokens, of images and of other tasks, and of parts that the keys of _hunyuan turn off.
_HUNYUAN_HARMLESS = frozenset(
    {
        "add_classification_head",
        "attention_head_dim",
        "class_num",
        "cla_share_factor",
        "dense_list",
        "eod_token_id",
        "im_end_id",
        "im_newline_id",
        "im_start_id",
        "image_token_id",
        "kv_lora_rank",
        "mask_init_id",
        "moe_drop_tokens",
        "moe_random_routing_dropped_token",
        "n_group",
        "num_media_embeds",
        "org_vocab_size",
        "pad_id",
        "pool_type",
        "q_lora_rank",
        "qk_nope_head_dim",
        "qk_rope_head_dim",
        "sep_token_id",
        "skip_cls_token",
        "text_end_id",
        "text_start_id",
        "topk_group",
        "v_head_dim",
        "video_end_id",
        "video_start_id",
    }
)


def _hunyuan(*rules: KeyRule) -> tuple[KeyRule, ...]:
    return _llama_like(
        Always("qk_norm", "rotated_head"),
        Fixed("use_qk_norm", True),
        Fixed("use_cla", False),
        Fixed("use_mla", False, is_written=False),
        Fixed("use_rotary_pos_emb", True, is_written=False),
        Fixed("position_embedding_xdrope", False, is_written=False),
        Fixed("norm_type", "rms", is_written=False),
        Fixed("mlp_bias", False, is_written=False),
        _ATTENTION_BIAS,
        _NO_MLP_BIAS,
        *rules,
        has_head_dim=True,
        epsilon=1e-5,
        rope=Rope(stretches_base=True),
    )


def _deepseek(scoring: str, *rules: KeyRule, epsilon: float = 1e-6, places: KeyRule) -> tuple[KeyRule, ...]:
    return (
        *_SIZES,
        _ties(False),
        _SWIGLU,
        _MLP,
        _epsilon(epsilon),
        *_LATENT_KEYS,
        _NO_MLP_BIAS,
        *_experts("n_routed_experts", "num_experts"),
        _EXPERT_SIZE,
        Always("moe.router.scoring", scoring),
        Fixed("scoring_func", scoring),
        SharedExperts(),
        *rules,
        Fixed("moe_layer_freq", 1),
        places,
    )


def _from_bound(layer: int, bound: int) -> bool:
    return layer >= bound


def _every_second(layer: int, bound: int) -> bool:
    return layer % 2 == 0 and layer < bound


_LATER_LAYERS = ("model.layers.{later}.",)
MULTI_TOKEN = "multi-token prediction, which is no part of the model itself"
# Their `head_dim` is the number of turned channels, which qk_rope_head_dim says already.
_DEEPSEEK_HARMLESS = frozenset({"head_dim"})

_OSS_YARN = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}

# What other readers of MiniMax-M2 want to see, and what stands in its config for nobody.
_M2_FIXED = {
    "scoring_func": "sigmoid",
    "use_routing_bias": True,
    "use_qk_norm": True,
    "qk_norm_type": "per_layer",
}
_M2_FIXED_AND_NOT_READ = {
    "attention_bias": False,
    "sliding_window": None,
    "shared_intermediate_size": 0,
    "layernorm_full_attention_beta": 1.0,
    "layernorm_linear_attention_beta": 1.0,
    "layernorm_mlp_beta": 1.0,
}

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family(
            "llama",
            "LlamaForCausalLM",
            _llama_like(
                Fixed("rope_interleaved", False, is_written=False),
                _ATTENTION_BIAS,
                _MLP_BIAS,
                has_head_dim=True,
            ),
            (*_MODEL_TENSORS, *_ATTENTION_TENSORS, *_MLP_TENSORS),
        ),
        Family(
            "mistral",
            "MistralForCausalLM",
            _llama_like(
                SlidingWindow(usual=4096),
                Always("attention_bias", "none"),
                _NO_MLP_BIAS,
                has_head_dim=True,
            ),
            (*_MODEL_TENSORS, *_ATTENTION_TENSORS, *_MLP_TENSORS),
        ),
        Family(
            "qwen2",
            "Qwen2ForCausalLM",
            _llama_like(
                SlidingWindow(flag="use_sliding_window", usual=4096, slides=_from_bound, bound=28),
                Fixed("use_mrope", False, is_written=False),
                Always("attention_bias", "qkv"),
                _NO_MLP_BIAS,
                has_head_dim=False,
            ),
            (*_MODEL_TENSORS, *_ATTENTION_TENSORS, *_MLP_TENSORS),
        ),
        Family(
            "qwen3",
            "Qwen3ForCausalLM",
            _llama_like(
                SlidingWindow(flag="use_sliding_window", usual=4096, slides=_from_bound, bound=28),
                Always("qk_norm", "head"),
                _ATTENTION_BIAS,
                _NO_MLP_BIAS,
                has_head_dim=True,
            ),
            (*_MODEL_TENSORS, *_ATTENTION_TENSORS, *_MLP_TENSORS),
        ),
        Family(
            "mixtral",
            "MixtralForCausalLM",
            _llama_like(
                SlidingWindow(),
                Always("attention_bias", "none"),
                _NO_MLP_BIAS,
                *_experts("num_local_experts"),
                Always("moe.router.renormalize", True),
                epsilon=1e-5,
                has_head_dim=True,
                rope=Rope(theta=1e6),
            ),
            (
                *_MODEL_TENSORS,
                *_ATTENTION_TENSORS,
                *_moe_tensors("block_sparse_moe", gate="w1", up="w3", down="w2"),
            ),
        ),
        Family(
            "olmoe",
            "OlmoeForCausalLM",
            _llama_like(
                Fixed("clip_qkv", None),
                Always("qk_norm", "full"),
                _ATTENTION_BIAS,
                _NO_MLP_BIAS,
                *_experts("num_experts", "num_local_experts"),
                _RENORMALIZE,
                epsilon=1e-5,
                has_head_dim=False,
            ),
            (*_MODEL_TENSORS, *_ATTENTION_TENSORS, *_moe_tensors("mlp")),
        ),
        Family(
            "qwen2_moe",
            "Qwen2MoeForCausalLM",
            _llama_like(
                SlidingWindow(flag="use_sliding_window", usual=4096, slides=_every_second, bound=28),
                OneOf("qkv_bias", "attention_bias", {True: "qkv", False: "none"}, default=True),
                _NO_MLP_BIAS,
                *_experts("num_experts", "num_local_experts"),
                _EXPERT_SIZE,
                _RENORMALIZE,
                Always("moe.residual", "sigmoid"),
                Same("shared_expert_intermediate_size", "moe.residual_intermediate_size"),
                Places(),
                has_head_dim=False,
            ),
            (*_MODEL_TENSORS, *_ATTENTION_TENSORS, *_MLP_TENSORS, *_moe_tensors("mlp")),
        ),
        Family(
            "qwen3_moe",
            "Qwen3MoeForCausalLM",
            _llama_like(
                SlidingWindow(flag="use_sliding_window", usual=4096),
                Always("qk_norm", "head"),
                _ATTENTION_BIAS,
                _NO_MLP_BIAS,
                *_experts("num_experts", "num_local_experts"),
                _EXPERT_SIZE,
                _RENORMALIZE,
                Places(),
                has_head_dim=True,
            ),
            (*_MODEL_TENSORS, *_ATTENTION_TENSORS, *_MLP_TENSORS, *_moe_tensors("mlp")),
        ),
        Family(
            "deepseek_v2",
            "DeepseekV2ForCausalLM",
            _deepseek(
                "softmax",
                Same("routed_scaling_factor", "moe.router.scale", default=1.0),
                Fixed("norm_topk_prob", False),
                Fixed("mlp_bias", False),
                Groups(method=True),
                places=PlacesAfter(),
            ),
            (*_MODEL_TENSORS, *_LATENT_TENSORS, *_MLP_TENSORS, *_moe_tensors("mlp", shared="shared_experts")),
            harmless=_DEEPSEEK_HARMLESS,
        ),
        Family(
            "deepseek_v3",
            "DeepseekV3ForCausalLM",
            _deepseek(
                "sigmoid",
                Same("routed_scaling_factor", "moe.router.scale", default=2.5),
                *_V3_ROUTER,
                Fixed("topk_method", "noaux_tc"),
                Fixed("rope_interleave", True),
                Needed(("n_group", "topk_group")),
                places=PlacesAfter(),
            ),
            (*_MODEL_TENSORS, *_LATENT_TENSORS, *_MLP_TENSORS, *_moe_tensors("mlp", shared="shared_experts")),
            harmless=_DEEPSEEK_HARMLESS,
            left_out=_LATER_LAYERS,
            left_out_because=MULTI_TOKEN,
        ),
        Family(
            "dots1",
            "Dots1ForCausalLM",
            _llama_like(
                SlidingWindow(usual=4096, slides=_from_bound, bound=62),
                Always("qk_norm", "head"),
                _ATTENTION_BIAS,
                _NO_MLP_BIAS,
                *_experts("n_routed_experts", "num_local_experts"),
                _EXPERT_SIZE,
                *_CORRECTED_SIGMOID,
                Fixed("scoring_func", "noaux_tc", also=("sigmoid",), is_written=False),  # as published; never read
                Same("routed_scaling_factor", "moe.router.scale", default=1.0),
                _RENORMALIZE,
                Groups(),
                SharedExperts(),
                PlacesAfter(),
                has_head_dim=True,
            ),
            (
                *_MODEL_TENSORS,
                *_ATTENTION_TENSORS,
                *_MLP_TENSORS,
                *_moe_tensors("mlp", shared="shared_experts"),
            ),
        ),
        Family(
            "glm4_moe",
            "Glm4MoeForCausalLM",
            _llama_like(
                OneOf("attention_bias", "attention_bias", {False: "none", True: "qkv"}, default=False),
                OneOf("use_qk_norm", "qk_norm", {False: "none", True: "head"}, default=False),
                _NO_MLP_BIAS,
                *_experts("n_routed_experts", "num_local_experts"),
                _EXPERT_SIZE,
                *_V3_ROUTER,
                Same("routed_scaling_factor", "moe.router.scale", default=1.0),
                SharedExperts(),
                PlacesAfter(),
                epsilon=1e-5,
                has_head_dim=True,
                rope=Rope(turned=0.5),
            ),
            (*_MODEL_TENSORS, *_PARTED_TENSORS, *_MLP_TENSORS, *_moe_tensors("mlp", shared="shared_experts")),
            left_out=_LATER_LAYERS,
            left_out_because=MULTI_TOKEN,
        ),
        Family(
            "gpt_oss",
            "GptOssForCausalLM",
            _llama_like(
                SlidingWindow(usual=128, slides=_every_second, is_nullable=False),
                OneOf("attention_bias", "attention_bias", {True: "all", False: "none"}, default=True),
                Always("attention_sinks", True),
                Always("mlp_bias", True),
                Fixed("swiglu_limit", 7.0),
                Fixed("swiglu_alpha", 1.702, is_written=False),
                *_experts("num_local_experts", top_k_aliases=("experts_per_token",)),
                Always("moe.router.renormalize", True),
                Always("moe.router.bias", True),
                epsilon=1e-5,
                has_head_dim=True,
                rope=Rope(theta=150_000.0, usual=_OSS_YARN),
                # Their name for it is that of the function that it is like.
                activation=OneOf("hidden_act", "activation", {"silu": "swiglu_oai"}, default="silu"),
            ),
            (*_MODEL_TENSORS, *_ATTENTION_TENSORS, *_OSS_TENSORS),
            harmless=frozenset({"initial_context_length"}),  # what the scaling of positions says too
        ),
        Family(
            "seed_oss",
            "SeedOssForCausalLM",
            _llama_like(
                OneOf("attention_bias", "attention_bias", {True: "qkv", False: "none"}, default=True),
                Fixed("attention_out_bias", False),
                _MLP_BIAS,
                has_head_dim=True,
            ),
            (*_MODEL_TENSORS, *_ATTENTION_TENSORS, *_MLP_TENSORS),
        ),
        Family(
            "ernie4_5",
            "Ernie4_5ForCausalLM",
            _llama_like(
                Fixed("use_bias", False),
                Always("attention_bias", "none"),
                _NO_MLP_BIAS,
                epsilon=1e-5,
                has_head_dim=True,
                rope=Rope(theta=500_000.0),
                ties=True,
            ),
            (*_MODEL_TENSORS, *_PAIRED_TENSORS, *_MLP_TENSORS),
        ),
        Family(
            "ernie4_5_moe",
            "Ernie4_5_MoeForCausalLM",
            _llama_like(
                Fixed("use_bias", False),
                Always("attention_bias", "none"),
                _NO_MLP_BIAS,
                *_experts("moe_num_experts", "num_experts", top_k="moe_k", top_k_aliases=("num_experts_per_tok",)),
                _EXPERT_SIZE,
                Always("moe.router.renormalize", True),
                Always("moe.router.score_correction_bias", True),
                Fixed("moe_norm_min", 1e-12),
                Fixed("moe_gate", "topk", is_written=False),
                Fixed("moe_gate_act", "softmax", also=(None,), is_written=False),
                Fixed("moe_use_aux_free", True),
                SharedExperts("moe_num_shared_experts", is_optional=True),
                PlacesBetween(),
                epsilon=1e-5,
                has_head_dim=False,
                rope=Rope(theta=500_000.0),
                ties=True,
            ),
            (
                *_MODEL_TENSORS,
                *_PAIRED_TENSORS,
                *_MLP_TENSORS,
                *_moe_tensors(
                    "mlp",
                    shared="shared_experts",
                    correction="moe_statics.e_score_correction_bias",
                    corrects_rows=True,
                ),
            ),
            harmless=frozenset({"moe_capacity"}),  # of training
            left_out=("model.mtp_",),
            left_out_because=MULTI_TOKEN,
        ),
        Family(
            "minimax_m2",
            "MiniMaxM2ForCausalLM",
            _llama_like(
                *(Fixed(key, value) for key, value in _M2_FIXED.items()),
                *(Fixed(key, value, is_written=False) for key, value in _M2_FIXED_AND_NOT_READ.items()),
                OnEveryLayer("attn_type_list", 1),
                Always("qk_norm", "full"),
                Always("attention_bias", "none"),
                _NO_MLP_BIAS,
                *_experts("num_local_experts", "num_experts"),
                *_CORRECTED_SIGMOID,
                Always("moe.router.renormalize", True),
                has_head_dim=True,
                rope=Rope(theta=5e6, turned=1.0, channels="rotary_dim"),
            ),
            (
                *_MODEL_TENSORS,
                *_PARTED_TENSORS,
                *_moe_tensors("block_sparse_moe", gate="w1", up="w3", down="w2", correction="e_score_correction_bias"),
            ),
            # Of multi-token prediction; of an MLP beside the experts, whose size is 0; of one that no layer has.
            harmless=frozenset(
                {"use_mtp", "num_mtp_modules", "mtp_transformer_layers", "shared_moe_mode", "mlp_intermediate_size"}
            ),
        ),
        Family(
            "glm4_moe_lite",
            "Glm4MoeLiteForCausalLM",
            _deepseek(
                "sigmoid",
                Same("routed_scaling_factor", "moe.router.scale", default=1.8),
                *_V3_ROUTER,
                Fixed("topk_method", "noaux_tc"),
                Fixed("rope_interleave", True),
                epsilon=1e-5,
                places=PlacesListed(),
            ),
            (*_MODEL_TENSORS, *_LATENT_TENSORS, *_MLP_TENSORS, *_moe_tensors("mlp", shared="shared_experts")),
            harmless=_DEEPSEEK_HARMLESS,
            left_out=_LATER_LAYERS,
            left_out_because=MULTI_TOKEN,
        ),
        Family(
            "solar_open",
            "SolarOpenForCausalLM",
            _llama_like(
                OneOf("attention_bias", "attention_bias", {False: "none", True: "qkv"}, default=False),
                Fixed("use_qk_norm", False, is_written=False),
                _NO_MLP_BIAS,
                *_experts("n_routed_experts", "num_local_experts"),
                _EXPERT_SIZE,
                *_V3_ROUTER,
                Same("routed_scaling_factor", "moe.router.scale", default=1.0),
                SharedExperts(),
                PlacesAfter(has_dense=False),
                epsilon=1e-5,
                has_head_dim=True,
                rope=Rope(theta=1e6),
                # Of no layer: all have experts.
                mlp=Same("intermediate_size", "intermediate_size", default=None),
            ),
            (*_MODEL_TENSORS, *_ATTENTION_TENSORS, *_moe_tensors("mlp", shared="shared_experts")),
        ),
        Family(
            "granite",
            "GraniteForCausalLM",
            _granite(_MLP_BIAS),
            (*_MODEL_TENSORS, *_ATTENTION_TENSORS, *_MLP_TENSORS),
        ),
        Family(
            "granitemoe",
            "GraniteMoeForCausalLM",
            _granite(*_GRANITE_EXPERTS),
            (*_MODEL_TENSORS, *_ATTENTION_TENSORS, *_GRANITE_MOE_TENSORS),
        ),
        Family(
            "granitemoeshared",
            "GraniteMoeSharedForCausalLM",
            _granite(*_GRANITE_EXPERTS, SharedSize()),
            (*_MODEL_TENSORS, *_ATTENTION_TENSORS, *_GRANITE_MOE_TENSORS, *_GRANITE_SHARED_TENSORS),
        ),
        Family(
            "hunyuan_v1_dense",
            "HunYuanDenseV1ForCausalLM",
            _hunyuan(),
            (*_HUNYUAN_TENSORS, *_MLP_TENSORS),
            harmless=_HUNYUAN_HARMLESS,
        ),
        Family(
            "hunyuan_v1_moe",
            "HunYuanMoEV1ForCausalLM",
            _hunyuan(
                Same("num_experts", "moe.num_experts", aliases=("num_local_experts",)),
                HunyuanExperts(),
                Fixed("use_mixed_mlp_moe", True),
                Fixed("moe_layer_num_skipped", 0, is_written=False),
                Fixed("norm_topk_prob", True, is_written=False),
                Fixed("group_limited_greedy", False, is_written=False),
                Fixed("routed_scaling_factor", 1.0, is_written=False),
                Always("moe.router.renormalize", True),
            ),
            (*_HUNYUAN_TENSORS, *_moe_tensors("mlp", router="gate.wg", shared="shared_mlp")),
            harmless=_HUNYUAN_HARMLESS,
        ),
        Family(
            "smollm3",
            "SmolLM3ForCausalLM",
            _llama_like(
                RotatedLayers(),
                SlidingWindow(flag="use_sliding_window", in_unrotated=True),
                _ATTENTION_BIAS,
                _MLP_BIAS,
                has_head_dim=True,
                rope=Rope(theta=2e6),
                ties=True,
            ),
            (*_MODEL_TENSORS, *_ATTENTION_TENSORS, *_MLP_TENSORS),
        ),
        Family(
            "exaone_moe",
            "ExaoneMoeForCausalLM",
            _llama_like(
                RotatedWindow(is_nullable=False),
                Always("qk_norm", "head"),
                Always("attention_bias", "none"),
                _NO_MLP_BIAS,
                *_experts("num_experts", "num_local_experts"),
                _EXPERT_SIZE,
                *_V3_ROUTER,
                Fixed("scoring_func", "sigmoid", is_written=False),
                Fixed("topk_method", "noaux_tc", is_written=False),
                Same("routed_scaling_factor", "moe.router.scale", default=2.5),
                SharedExperts("num_shared_experts"),
                PlacesListed(),
                epsilon=1e-5,
                has_head_dim=True,
            ),
            (
                *_MODEL_TENSORS,
                *_ATTENTION_TENSORS,
                *_MLP_TENSORS,
                *_moe_tensors("mlp", shared="shared_experts", correction="e_score_correction_bias"),
            ),
            left_out=("mtp.",),
            left_out_because=MULTI_TOKEN,
        ),
        Family(
            "exaone4",
            "Exaone4ForCausalLM",
            _llama_like(
                RotatedWindow(),
                Always("norm_place", "behind"),
                Always("qk_norm", "head"),
                Always("attention_bias", "none"),
                _NO_MLP_BIAS,
                epsilon=1e-5,
                has_head_dim=True,
            ),
            (*_BEHIND_TENSORS, *_ATTENTION_TENSORS, *_MLP_TENSORS),
        ),
        Family(
            "olmo2",
            "Olmo2ForCausalLM",
            _llama_like(
                Always("norm_place", "behind"),
                Always("qk_norm", "full"),
                _ATTENTION_BIAS,
                _NO_MLP_BIAS,
                epsilon=1e-5,
                has_head_dim=True,
            ),
            (*_BEHIND_TENSORS, *_ATTENTION_TENSORS, *_MLP_TENSORS),
        ),
        Family(
            "flex_olmo",
            "FlexOlmoForCausalLM",
            _llama_like(
                Always("norm_place", "behind"),
                Always("qk_norm", "full"),
                _ATTENTION_BIAS,
                _NO_MLP_BIAS,
                *_experts("num_experts", "num_local_experts"),
                _RENORMALIZE,
                has_head_dim=True,
                rope=Rope(theta=500_000.0),
            ),
            (*_BEHIND_TENSORS, *_ATTENTION_TENSORS, *_moe_tensors("mlp")),
        ),
    )
}


def harmless_keys(family: Family) -> frozenset[str]:
    """Return the keys of a family's config that need no rule."""
    return HARMLESS | family.harmless


# The layout of our own classes for transformers (moesaic.hf), whose config holds our ModelConfig as it is.
OWN_NAME = "moesaic"
OWN_TENSORS = (TensorRule("{rest}", ("model.{rest}",)),)
