"""A foreign config is understood whole, or refused with the name of what is not: no size or kind is taken on trust."""

import json
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from moesaic.config.model import ModelConfig
from moesaic.convert import keys
from moesaic.convert.keys import Inexpressible, write_config_keys
from moesaic.convert.opened import open_model
from moesaic.errors import ConversionError

REMOVED = object()

Changed = Callable[..., Path]
Refused = Callable[[Path, str], None]


@pytest.fixture(scope="module")
def changed(saved: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Changed:
    """A function (family, **changes of config.json) that returns the folder of such a model."""
    folders: dict[str, Path] = {}

    def change(family: str, /, **values: Any) -> Path:
        if family not in folders:
            folders[family] = saved(family)
        folder = shutil.copytree(folders[family], tmp_path_factory.mktemp("changed") / "model")
        config = json.loads((folder / "config.json").read_text())
        config = {name: value for name, value in {**config, **values}.items() if value is not REMOVED}
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return change


@pytest.fixture
def refused(bounded_memory: Callable[[], AbstractContextManager[None]]) -> Refused:
    """A function (folder, message) that asserts that a model is refused so, before anything of its size is made."""

    def check(folder: Path, message: str) -> None:
        with bounded_memory():
            _refused(folder, message)

    return check


def _refused(folder: Path, message: str) -> None:
    with pytest.raises(ConversionError, match=message) as caught:
        open_model(folder)
    assert str(caught.value).count(";") >= 2, caught.value
    assert "--set" not in str(caught.value)  # there is no such thing here


SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
         "intermediate_size", "head_dim", "max_position_embeddings")  # fmt: skip
EXPERT_SIZES = ("num_local_experts", "num_experts_per_tok")
LATENT_SIZES = ("kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "n_routed_experts",
                "moe_intermediate_size", "n_shared_experts", "n_group", "topk_group")  # fmt: skip


@pytest.mark.parametrize(
    ("family", "key"),
    [
        *(("llama, mlp biases, wide heads", key) for key in SIZES),
        *(("mixtral", key) for key in EXPERT_SIZES),
        *(("deepseek-v3", key) for key in LATENT_SIZES),
    ],
)
def test_sizes_are_positive_integers_that_the_tensors_can_have(
    family: str, key: str, changed: Changed, refused: Refused
) -> None:
    usual = json.loads((changed(family) / "config.json").read_text())[key]
    # No shared experts, and no groups, are written as 0 too; as text or truth nothing is a size.
    wrong = [-4, str(usual), usual + 0.5, float(usual), True, [usual], {}, "many"]
    wrong += [0] if key not in ("n_shared_experts", "n_group", "topk_group") else []
    for value in wrong:
        refused(changed(family, **{key: value}), key)
    for value in (10**9, 10**30):
        refused(changed(family, **{key: value}), r"config\.json|describes a model of")


@pytest.mark.parametrize(
    ("family", "values", "message"),
    [
        ("llama", {"rms_norm_eps": -1e-5}, "rms_norm_eps is -1e-05; it has to be greater than 0"),
        ("llama", {"rms_norm_eps": 0}, "rms_norm_eps is 0"),
        ("llama", {"rms_norm_eps": "1e-5"}, "rms_norm_eps is '1e-5'; it has to be a valid number"),
        ("llama", {"rms_norm_eps": True}, "rms_norm_eps"),
        ("llama", {"rms_norm_eps": None}, "rms_norm_eps"),
        ("llama", {"rms_norm_eps": 10**400}, "rms_norm_eps"),
        ("llama", {"initializer_range": -0.1}, "initializer_range"),
        ("llama", {"rope_parameters": REMOVED, "rope_theta": 0}, "rope_theta is 0"),
        (
            "llama",
            {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}, "rope_theta": 1e4},
            "rope_theta is 10000.0, and 500000.0 among the rope_parameters",
        ),
        ("llama", {"rope_parameters": REMOVED, "rope_theta": -1.0}, "rope_theta is -1.0"),
        ("llama", {"rope_parameters": REMOVED, "rope_theta": "10000"}, "rope_theta"),
        ("llama", {"rope_parameters": REMOVED, "rope_theta": [1e4]}, "rope_theta"),
        ("llama", {"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'; it has to be a valid boolean"),
        ("llama", {"tie_word_embeddings": 1}, "tie_word_embeddings"),
        ("llama", {"mlp_bias": "false"}, "mlp_bias"),
        ("llama", {"attention_bias": "none"}, "attention_bias"),
        ("llama", {"attention_bias": [True]}, "attention_bias"),
        ("llama", {"hidden_act": None}, "hidden_act"),
        ("llama", {"hidden_size": REMOVED}, "has no hidden_size; this family of models requires it"),
        ("llama", {"hidden_size": 26, "head_dim": None}, "hidden_size .26. is not a multiple of num_heads"),
        ("llama", {"num_key_value_heads": 3}, "is not a multiple of num_kv_heads"),
        ("llama", {"head_dim": 7}, "head_dim .7. is odd"),
        ("mixtral", {"num_experts_per_tok": 6}, r"moe.top_k \(6\) is more than num_experts"),
        ("mixtral", {"router_aux_loss_coef": "0.1"}, "router_aux_loss_coef"),
        ("qwen2-moe", {"norm_topk_prob": 0}, "norm_topk_prob"),
        ("qwen2-moe", {"decoder_sparse_step": 0}, "decoder_sparse_step"),
        ("qwen2-moe", {"decoder_sparse_step": "2"}, "decoder_sparse_step"),
        ("qwen2-moe", {"mlp_only_layers": 3}, "list of layers"),
        ("qwen2-moe", {"shared_expert_intermediate_size": -1}, "shared_expert_intermediate_size"),
        ("deepseek-v3", {"first_k_dense_replace": -1}, "first_k_dense_replace"),
        ("deepseek-v3", {"first_k_dense_replace": "1"}, "first_k_dense_replace"),
        ("deepseek-v3", {"first_k_dense_replace": True}, "first_k_dense_replace is True; a number from 0"),
        ("deepseek-v3", {"routed_scaling_factor": 0}, "routed_scaling_factor"),
        ("deepseek-v3", {"num_key_value_heads": 2}, "num_key_value_heads is 2; 4, as there are heads"),
        (
            "llama",
            {"model_type": "gpt_neox"},
            "is of model_type 'gpt_neox'; one of llama, .* is required.* a GGUF file .* llama, qwen2, .*families.py",
        ),
        ("llama", {"model_type": REMOVED}, "is of model_type None"),
        ("llama", {"model_type": ["llama"]}, "is of model_type"),
        ("llama", {"model_type": "moesaic"}, "is None; a mapping"),
        ("llama", {"model_type": "moesaic", "model": {"hidden_size": "x"}}, "an integer is required"),
        (
            "llama",
            {"model_type": "qwen2", "attention_bias": REMOVED, "mlp_bias": REMOVED},
            "missing 9: model.layers.0.self_attn.k_proj.bias",
        ),
    ],
)
def test_values_that_cannot_be(
    family: str, values: dict[str, Any], message: str, changed: Changed, refused: Refused
) -> None:
    refused(changed(family, **values), message)


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 24}


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        *(({"rope_type": kind, "factor": 2.0}, f"rope_type is '{kind}'; default, linear, llama3 or yarn is required")
          for kind in ("dynamic", "longrope", "su", "mrope", "proportional", "")),
        ({"rope_type": ["yarn"]}, "rope_type"),
        ({"type": "dynamic", "factor": 2.0}, "rope_type is 'dynamic'"),
        ("linear", "rope_scaling is 'linear'; a section with keys"),
        ([], "rope_scaling"),
        ({"rope_type": "linear"}, "factor is None"),
        ({"rope_type": "linear", "factor": 0.5}, "factor is 0.5; it has to be greater than or equal to 1"),
        ({"rope_type": "linear", "factor": "2"}, "factor is '2'"),
        ({"rope_type": "linear", "factor": -1}, "factor is -1"),
        ({"rope_type": "linear", "factor": 10**400}, "factor"),
        ({"rope_type": "linear", "factor": 2.0, "mscale": 1.0}, "keys that are not understood: mscale"),
        ({"rope_type": "default", "factor": 2.0}, "keys that are not understood: factor"),
        ({**LLAMA3, "low_freq_factor": 4.0}, "high_frequency_factor"),
        ({**LLAMA3, "low_freq_factor": 0}, "low_freq_factor is 0"),
        ({key: value for key, value in LLAMA3.items() if key != "high_freq_factor"}, "has no high_freq_factor"),
        ({**LLAMA3, "original_max_position_embeddings": 0}, "original_max_position_embeddings is 0"),
        ({**LLAMA3, "original_max_position_embeddings": "16"}, "original_max_position"),
        ({**YARN, "beta_fast": -2}, "beta_fast"),
        ({**YARN, "beta_fast": 0.5}, "beta_fast"),
        ({**YARN, "attention_factor": 0}, "attention_factor"),
        ({**YARN, "attention_factor": "1"}, "attention_factor"),
        ({**YARN, "truncate": "no"}, "truncate"),
        ({**YARN, "mscale": "1", "mscale_all_dim": "2"}, "mscale|impossible kind"),
        ({**YARN, "long_factor": [1.0]}, "keys that are not understood: long_factor"),
        ({"rope_type": "yarn", "factor": 4.0}, "has no original_max_position_embeddings"),
    ],
)  # fmt: skip
def test_scalings_of_positions_that_are_not_ours(
    scaling: Any, message: str, changed: Changed, refused: Refused
) -> None:
    refused(changed("llama", rope_parameters=REMOVED, rope_scaling=scaling), message)


ON = {"use_sliding_window": True, "sliding_window": 16, "layer_types": REMOVED}


@pytest.mark.parametrize(
    ("family", "values", "message"),
    [
        ("llama", {"hidden_act": "gelu"}, "hidden_act is 'gelu'; 'silu' is required"),
        ("llama", {"sliding_window": 16}, "keys that are not understood: sliding_window"),
        ("llama", {"attn_logit_softcapping": 50.0}, "not understood: attn_logit_softcapping"),
        ("llama", {"logits_scaling": 8.0, "embedding_multiplier": 12}, "embedding_multiplier, logits_scaling"),
        ("llama", {"rope_interleaved": True}, "rope_interleaved is True"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ("llama", {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "is said to be quantised .gptq. and"),
        ("llama", {"quantization_config": "awq"}, r"is quantised \(awq\)"),
        ("mixtral", {"sliding_window": "16"}, "sliding_window is '16'; a number of positions, or null, is required"),
        ("mixtral", {"sliding_window": True}, "sliding_window is True; it has to be a valid integer"),
        ("mixtral", {"sliding_window": [16, 8, 16]}, r"sliding_window is \[16, 8, 16\]; a number of positions"),
        ("mistral", {"sliding_window": 0}, "sliding_window is 0; it has to be greater than or equal to 1"),
        (
            "mistral",
            {"sliding_window": 16, "layer_types": ["full_attention", "sliding_attention", "full_attention"]},
            "layer_types is .*; sliding_attention for all layers is required, since sliding_window is 16",
        ),
        ("mistral", {"attention_bias": True}, "not understood: attention_bias"),
        (
            "qwen2",
            {"layer_types": ["full_attention", "sliding_attention", "full_attention"]},
            "layer_types is .*; a sliding_window that is on is required for sliding_attention",
        ),
        ("qwen2", {"layer_types": 3}, "layer_types is 3; full_attention or sliding_attention for each of 3 layers"),
        ("qwen2", {"layer_types": ["full_attention"] * 2}, "layer_types is .* for each of 3 layers"),
        ("qwen2", {"layer_types": ["full_attention", "chunked_attention", [1]]}, "layer_types is .*chunked_attention"),
        ("qwen2", {"use_sliding_window": "no"}, "use_sliding_window is 'no'; true or false is required"),
        (
            "qwen2",
            {**ON, "max_window_layers": None},
            "max_window_layers is None; a number of layers is required",
        ),
        ("olmoe", {"clip_qkv": 8.0}, "clip_qkv is 8.0; None is required"),
        ("deepseek-v3", {"scoring_func": "softmax"}, "scoring_func"),
        ("deepseek-v3", {"topk_method": "greedy"}, "topk_method"),
        ("deepseek-v3", {"moe_layer_freq": 2}, "moe_layer_freq"),
        ("deepseek-v3", {"attention_bias": True}, "attention_bias"),
        ("deepseek-v2", {"topk_method": "noaux_tc"}, "topk_method"),
        ("gpt-oss", {"swiglu_limit": 5.0}, "swiglu_limit is 5.0; 7.0 is required"),
        ("gpt-oss", {"swiglu_limit": None}, "swiglu_limit is None; 7.0 is required"),
        ("gpt-oss", {"swiglu_alpha": 1.0}, "swiglu_alpha is 1.0; 1.702 is required"),
        ("gpt-oss", {"hidden_act": "gelu"}, "hidden_act is 'gelu'; 'silu' is required"),
        ("gpt-oss", {"attention_bias": "qkv"}, "attention_bias is 'qkv'; True or False is required"),
        ("gpt-oss", {"sliding_window": None}, "layer_types is .*; a sliding_window that is on is required"),
        ("gpt-oss", {"layer_types": ["chunked_attention"] * 3}, "layer_types is .*chunked_attention"),
        ("gpt-oss", {"quantization_config": {"quant_method": "mxfp4"}}, "is said to be quantised .* no tensor blocks"),
        (
            "gpt-oss",
            {"quantization_config": {"quant_method": "mxfp4", "group_size": 16}},
            "quantization_config has keys that are not understood: group_size",
        ),
        ("gpt-oss", {"quantization_config": "mxfp4"}, r"is quantised \(mxfp4\); weights in .* MXFP4, or as GPTQ"),
        ("gpt-oss", {"quantization_config": {"quant_method": "quark"}}, r"is quantised \(quark\)"),
        ("seed-oss", {"attention_out_bias": True}, "attention_out_bias is True; False is required"),
        ("dots1", {"scoring_func": "softmax"}, "scoring_func is 'softmax'"),
        ("dots1", {"layer_types": ["full_attention", "full_attention", "sliding_attention"]}, "sliding_window"),
        ("dots1", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ("glm4-moe, as GLM-4.5-Air", {"use_qk_norm": None}, "use_qk_norm is None; False or True is required"),
        ("glm4-moe, as GLM-4.5-Air", {"hidden_act": "gelu"}, "hidden_act"),
        ("glm4-moe, as GLM-4.5-Air", {"scoring_func": "softmax"}, "not understood: scoring_func"),
        *(
            ("glm4-moe, as GLM-4.5-Air", {"rope_parameters": {"partial_rotary_factor": share}}, message)
            for share, message in (
                (0, "partial_rotary_factor is 0; a number above 0, and up to 1, is required"),
                (1.5, "partial_rotary_factor is 1.5"),
                ("0.5", "partial_rotary_factor is '0.5'"),
                ([0.5], r"partial_rotary_factor is \[0.5\]"),
                (0.4, r"rope_head_dim \(3\) is not an even number from 2 to head_dim \(8\)"),
                (0.1, r"rope_head_dim \(0\)"),
            )
        ),
        (
            "glm4-moe, as GLM-4.5-Air",
            {"rope_parameters": {"partial_rotary_factor": 0.5}, "partial_rotary_factor": 1.0},
            r"partial_rotary_factor is \[1.0, 0.5\]; one value is required",
        ),
        ("deepseek-v2", {"norm_topk_prob": True}, "norm_topk_prob"),
        ("ernie4.5", {"use_bias": True}, "use_bias is True; False is required"),
        ("ernie4.5-moe", {"use_bias": True}, "use_bias is True; False is required"),
        ("ernie4.5-moe", {"moe_norm_min": 1e-3}, "moe_norm_min is 0.001; 1e-12 is required"),
        ("ernie4.5-moe", {"moe_gate_act": "sigmoid"}, "moe_gate_act is 'sigmoid'; 'softmax' is required"),
        ("ernie4.5-moe", {"moe_use_aux_free": False}, "moe_use_aux_free is False; True is required"),
        ("ernie4.5-moe", {"moe_num_shared_experts": "2"}, "moe_num_shared_experts is '2'; it has to be"),
        ("ernie4.5-moe", {"moe_layer_start_index": -1}, "moe_layer_start_index is -1; a number from 0 is required"),
        ("ernie4.5-moe", {"moe_layer_end_index": [2]}, r"moe_layer_end_index is \[2\]; a number from -1 is required"),
        ("ernie4.5-moe", {"moe_layer_interval": 0}, "moe_layer_interval is 0; a number from 1 is required"),
        ("ernie4.5-moe", {"moe_layer_interval": True}, "moe_layer_interval is True"),
        ("minimax-m2", {"scoring_func": "softmax"}, "scoring_func is 'softmax'; 'sigmoid' is required"),
        ("minimax-m2", {"use_routing_bias": False}, "use_routing_bias is False; True is required"),
        ("minimax-m2", {"use_qk_norm": False}, "use_qk_norm is False; True is required"),
        ("minimax-m2", {"qk_norm_type": "per_head"}, "qk_norm_type is 'per_head'; 'per_layer' is required"),
        ("minimax-m2", {"shared_intermediate_size": 8}, "shared_intermediate_size is 8; 0 is required"),
        ("minimax-m2", {"attn_type_list": [1, 0, 1]}, r"attn_type_list is \[1, 0, 1\]; 1 for each of 3 layers"),
        ("minimax-m2", {"rotary_dim": 8}, r"partial_rotary_factor is \[0.5, 1.0\]; one value is required"),
        ("minimax-m2", {"rotary_dim": "4"}, "rotary_dim is '4'; it has to be a valid integer"),
        ("minimax-m2", {"rope_parameters": REMOVED, "rotary_dim": 10}, "partial_rotary_factor is 1.25"),
        ("minimax-m2", {"rope_parameters": REMOVED, "rotary_dim": 3}, r"rope_head_dim \(3\) is not an even number"),
        ("glm4-moe-lite", {"mlp_layer_types": ["sparse"]}, "mlp_layer_types is .* for each of 3 layers is required"),
        ("glm4-moe-lite", {"mlp_layer_types": ["dense", "sparse", ["x"]]}, "mlp_layer_types is .*dense or sparse"),
        ("glm4-moe-lite", {"mlp_layer_types": "dense"}, "mlp_layer_types is 'dense'"),
        ("glm4-moe-lite", {"first_k_dense_replace": -1}, "first_k_dense_replace is -1; a number from 0 is required"),
        ("glm4-moe-lite", {"attention_bias": True}, "attention_bias"),
        ("granite", {"attention_multiplier": 0}, "attention_multiplier is 0; it has to be greater than 0"),
        ("granite", {"attention_multiplier": None}, "attention_multiplier is None; it has to be a valid number"),
        ("granite", {"embedding_multiplier": "12"}, "embedding_multiplier is '12'; it has to be a valid number"),
        ("granite", {"residual_multiplier": -0.2}, "residual_multiplier is -0.2"),
        ("granite-moe", {"logits_scaling": 0}, "logits_scaling is 0"),
        ("granite-moe", {"logits_scaling": 1e-320}, "logits_scaling is .*; a number that can be divided by"),
        ("granite-moe-shared", {"shared_intermediate_size": -9}, "shared_intermediate_size is -9"),
        ("granite-moe-shared", {"shared_intermediate_size": False}, "shared_intermediate_size is False"),
        ("granite-moe-shared", {"shared_intermediate_size": REMOVED}, "has no shared_intermediate_size"),
        ("hunyuan-dense", {"use_qk_norm": False}, "use_qk_norm is False; True is required"),
        ("hunyuan-dense", {"use_cla": True}, "use_cla is True; False is required"),
        *(
            ("hunyuan-moe", {"rope_parameters": {"rope_type": "dynamic", **values}}, message)
            for values, message in (
                ({"factor": 2.0}, "rope_scaling has no alpha"),
                ({"alpha": 0}, "alpha is 0; it has to be greater than 0"),
                ({"alpha": "9"}, "alpha is '9'; it has to be a valid number"),
                ({"alpha": 1e300}, "impossible kind"),
                ({"alpha": 2.0, "original_max_position_embeddings": 9}, "not understood: original_max_position"),
            )
        ),
        ("hunyuan-moe", {"moe_topk": [2, 3, 2]}, r"moe_topk is \[2, 3, 2\]; one value, 3 times, is required"),
        ("hunyuan-moe", {"moe_topk": [2, 2]}, r"moe_topk is \[2, 2\]"),
        ("hunyuan-moe", {"moe_topk": []}, r"moe_topk is \[\]"),
        ("hunyuan-moe", {"moe_topk": ["2"] * 3}, "moe_topk is '2'; it has to be a valid integer"),
        ("hunyuan-moe", {"moe_topk": REMOVED}, "has no moe_topk"),
        ("hunyuan-moe", {"num_shared_expert": 2}, "num_shared_expert is 2; 1, for every layer, is required"),
        ("hunyuan-moe", {"moe_intermediate_size": [12] * 3}, "moe_intermediate_size is 12; 20, for every layer"),
        ("hunyuan-moe", {"use_mixed_mlp_moe": False}, "use_mixed_mlp_moe is False; True is required"),
        ("hunyuan-moe", {"use_mla": True}, "use_mla is True; False is required"),
        ("hunyuan-moe", {"group_limited_greedy": True}, "group_limited_greedy is True; False is required"),
        (
            "smollm3",
            {"no_rope_layers": None, "no_rope_layer_interval": 0},
            "no_rope_layer_interval is 0; a number from 1",
        ),
        ("smollm3", {"no_rope_layers": [1, 0]}, r"no_rope_layers is \[1, 0\]; 1 \(turned\) or 0 for each of 5 layers"),
        ("smollm3", {"no_rope_layers": [1, 0, 1, 2, 1]}, r"no_rope_layers is \[1, 0, 1, 2, 1\]"),
        ("smollm3", {"no_rope_layers": "1"}, "no_rope_layers is '1'"),
        ("exaone-moe", {"sliding_window": None}, "sliding_window is None; it has to be a valid integer"),
        ("exaone-moe", {"sliding_window": 0}, "sliding_window is 0; it has to be greater than or equal to 1"),
        (
            "exaone-moe",
            {"layer_types": None, "sliding_window_pattern": "LLLG"},
            "layer_types is None; full_attention or",
        ),
        ("exaone-moe", {"layer_types": None, "sliding_window_pattern": 0}, "layer_types is None"),
        ("exaone-moe", {"layer_types": ["chunked_attention"] * 4}, "layer_types is .*chunked_attention"),
        ("exaone-moe", {"num_shared_experts": 0}, "tensors of .* are not those of the model"),
        ("exaone-moe", {"scoring_func": "softmax"}, "scoring_func is 'softmax'; 'sigmoid' is required"),
        ("exaone4", {"sliding_window": None, "layer_types": ["sliding_attention"] * 4}, "a sliding_window is required"),
        ("exaone4", {"sliding_window": None, "layer_types": None}, "layer_types is None"),
        ("olmo2", {"clip_qkv": 8.0}, "not understood: clip_qkv"),
        ("flex-olmo", {"sliding_window": 8}, "not understood: sliding_window"),
        ("solar-open", {"use_qk_norm": True}, "use_qk_norm is True; False is required"),
        ("solar-open", {"first_k_dense_replace": 1}, "first_k_dense_replace is 1; 0 is required"),
        ("solar-open", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ],
)
def test_what_changes_the_mathematics_is_refused_by_name(
    family: str, values: dict[str, Any], message: str, changed: Changed, refused: Refused
) -> None:
    refused(changed(family, **values), message)


@pytest.mark.parametrize(
    ("family", "values"),
    [
        ("llama", {"attention_dropout": 0.3, "use_cache": False, "pretraining_tp": 1, "_name_or_path": "x"}),
        ("llama", {"rope_parameters": REMOVED, "rope_scaling": {"type": "linear", "factor": 2}}),
        ("llama", {"head_dim": None, "num_key_value_heads": 2}),
        ("mixtral", {"sliding_window": 4096}),
        ("mixtral", {"sliding_window": None}),
        ("mistral", {"sliding_window": REMOVED}),
        ("qwen2", {"use_sliding_window": False, "sliding_window": 16, "max_window_layers": 1, "layer_types": None}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": None, "layer_types": REMOVED}),
        ("qwen2", {"layer_types": ["full_attention"] * 3}),
        ("qwen2", {**ON, "sliding_window": 96, "max_window_layers": 0}),
        ("qwen2", {**ON, "max_window_layers": REMOVED}),  # 28
        ("qwen2-moe", {**ON, "max_window_layers": 0}),
        ("mistral", {"layer_types": ["full_attention"] * 3}),
        ("dots1", {"sliding_window": 16, "layer_types": ["full_attention"] * 3}),
        ("dots1", {"sliding_window": 16, "layer_types": REMOVED}),
        ("qwen2-moe", {"mlp_only_layers": None}),
        ("glm4-moe, as GLM-4.5-Air", {"partial_rotary_factor": 0.5}),
        ("glm4-moe, as GLM-4.5-Air", {"rope_parameters": REMOVED}),
        ("gpt-oss", {"layer_types": ["full_attention"] * 3, "initial_context_length": 4096, "experts_per_token": 2}),
        ("gpt-oss", {"layer_types": REMOVED, "sliding_window": 96}),
        ("gpt-oss", {"layer_types": REMOVED, "sliding_window": None}),
        ("gpt-oss", {"sliding_window": REMOVED}),  # 128
        ("deepseek-v3", {"n_group": 3, "num_nextn_predict_layers": 1}),
        ("ernie4.5-moe", {"moe_capacity": [5, 5, 5], "moe_gate": "topk", "moe_use_aux_free": True}),
        ("ernie4.5-moe", {"moe_layer_end_index": None, "moe_gate_act": None}),
        ("ernie4.5-moe", {"moe_layer_end_index": -1}),
        ("minimax-m2", {"attn_type_list": [1, 1, 1], "use_mtp": True, "num_mtp_modules": 3, "sliding_window": None}),
        ("minimax-m2", {"rope_parameters": REMOVED, "rope_theta": 5e6}),
        ("minimax-m2", {"rotary_dim": REMOVED}),
        ("glm4-moe-lite", {"mlp_layer_types": REMOVED, "first_k_dense_replace": 1, "num_nextn_predict_layers": 1}),
        ("glm4-moe-lite", {"mlp_layer_types": None, "partial_rotary_factor": 1.0}),
        ("solar-open", {"partial_rotary_factor": 1.0, "intermediate_size": REMOVED}),
    ],
)
def test_what_changes_nothing_is_accepted(family: str, values: dict[str, Any], changed: Changed) -> None:
    with open_model(changed(family, **values)) as opened:
        assert opened.config.num_layers == 3 and opened.config.sliding_window is None


@pytest.mark.parametrize(
    ("family", "values", "layers"),
    [
        ("mistral", {"sliding_window": 16}, None),
        ("mistral", {"sliding_window": 16, "layer_types": ["sliding_attention"] * 3}, None),
        ("mistral", {"sliding_window": 16, "max_position_embeddings": 17}, None),
        ("mixtral", {"sliding_window": 16}, None),
        ("qwen2", {**ON, "max_window_layers": 0}, None),
        ("qwen2", {**ON, "max_window_layers": 2}, (2,)),
        ("qwen3", {**ON, "max_window_layers": 1}, (1, 2)),
        ("qwen3", {**ON, "max_window_layers": 1, "layer_types": ["sliding_attention", *["full_attention"] * 2]}, (0,)),
        ("qwen2-moe", {**ON}, (0, 2)),
        ("qwen2-moe", {**ON, "max_window_layers": 2}, (0,)),
        ("qwen3-moe", {**ON, "max_window_layers": 2}, None),  # which this class does not read
        ("dots1", {"sliding_window": 16, "max_window_layers": 1, "layer_types": REMOVED}, (1, 2)),
        ("gpt-oss", {"sliding_window": 16, "layer_types": REMOVED}, (0, 2)),
        ("gpt-oss", {"sliding_window": 16, "layer_types": ["sliding_attention"] * 3}, None),
        ("smollm3", {**ON}, (1, 3)),  # those that are not turned
        ("smollm3", {**ON, "layer_types": None, "no_rope_layers": [0, 1, 1, 0, 1]}, (0, 3)),
        ("smollm3", {**ON, "no_rope_layers": [0] * 5}, None),
    ],
)
def test_windows_are_in_the_layers_that_the_class_gives_them_to(
    family: str, values: dict[str, Any], layers: tuple[int, ...] | None, changed: Changed
) -> None:
    from transformers import AutoConfig

    folder = changed(family, **values)
    with open_model(folder) as opened:
        assert (opened.config.sliding_window, opened.config.sliding_layers) == (16, layers)
    theirs = getattr(AutoConfig.from_pretrained(folder), "layer_types", None)
    if theirs is not None:
        sliding = tuple(layer for layer, kind in enumerate(theirs) if kind == "sliding_attention")
        assert sliding == (layers if layers is not None else tuple(range(len(theirs))))


def test_a_window_without_a_layer_to_have_it_is_none(changed: Changed) -> None:
    with open_model(changed("smollm3", **ON, no_rope_layers=[1] * 5)) as opened:
        assert (opened.config.sliding_window, opened.config.sliding_layers) == (None, None)


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3-moe"])
def test_a_window_that_no_key_gives_is_of_4096_positions(family: str, changed: Changed) -> None:
    values = {**ON, "sliding_window": REMOVED, "max_window_layers": 0, "max_position_embeddings": 4097}
    if family == "mistral":
        del values["use_sliding_window"]
    with open_model(changed(family, **values)) as opened:
        assert (opened.config.sliding_window, opened.config.sliding_layers) == (4096, None)


def test_what_cannot_be_read_back_is_a_reason_without_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise ConversionError("the config written has act = tanh; silu is required; this model cannot be converted.")

    monkeypatch.setattr(keys, "read_config", refuse)
    with pytest.raises(Inexpressible) as caught:
        write_config_keys((), ModelConfig(vocab_size=8, hidden_size=8, num_layers=1, num_heads=1), frozenset())
    assert str(caught.value) == "the config written has act = tanh"
