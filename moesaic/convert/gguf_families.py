"""The architectures of GGUF files: a table each, of metadata keys and of tensor names.

They are read as llama.cpp reads them, and written where it computes the same. Files are gguf.py's business.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from moesaic.config.model import ModelConfig
from moesaic.convert.keys import (
    Always,
    EqualHeads,
    Fixed,
    Inexpressible,
    KeyRule,
    Keys,
    OneOf,
    PlacesAfter,
    Same,
    SharedExperts,
    put,
    yarn_scale,
)
from moesaic.convert.tensors import (
    RowOrder,
    TensorRule,
    latent_key_rows,
    latent_query_rows,
    paired_key_rows,
    paired_query_rows,
    parted_head_rows,
    parted_key_rows,
    parted_query_rows,
)

EMBEDDING, OUTPUT = "token_embd.weight", "output.weight"
# What llama.cpp reads as fp32 whatever the rest is.
ROUTER, BIAS = "ffn_gate_inp.weight", ".bias"
# Of a model whose residual MLP has a gate; older files hold it as a vector.
SHARED_GATE = "ffn_gate_inp_shexp.weight"
# Put beside a file's own keys: what its tensors say.
VOCAB_SIZE, IS_TIED, HAS_BIASES = "vocab_size", "(tied output)", "(biases of queries, keys and values)"
HAS_HEAD_NORMS, HAS_CORRECTION = "(norms of queries and keys)", "(biases on the scores)"
# Layers behind the last, for multi-token prediction.
NEXTN = "nextn_predict_layers"
_WINDOW, _PATTERN = "attention.sliding_window", "attention.sliding_window_pattern"
_YARN_LOG = "rope.scaling.yarn_log_multiplier"
# What llama.cpp computes with, whatever a file says.
_BOUNDS = (("beta_fast", 32.0), ("beta_slow", 1.0))
_SCORING = ("softmax", "sigmoid")


def _shortest(value: Any) -> float:
    """Return the shortest decimal that is this number in fp32: 9.999999747378752e-06 was written as 1e-5."""
    return float(str(np.float32(value))) if abs(value) <= np.finfo(np.float32).max else float(value)


@dataclass(frozen=True)
class GgufLayers:
    """block_count, in which layers for multi-token prediction are counted too."""

    def read(self, keys: Keys, ours: dict[str, Any]) -> None:
        later = keys.take(NEXTN, default=0)
        count = keys.check("block_count", keys.take("block_count"), "num_layers")
        if type(later) is not int or not 0 <= later < count:
            raise keys.refuse(NEXTN, later, f"a number of layers below {count}, as block_count, is required")
        put(ours, "num_layers", count - later)

    def write(self, config: Mapping[str, Any], theirs: dict[str, Any]) -> None:
        theirs["block_count"] = config["num_layers"]


@dataclass(frozen=True)
class GgufHeads:
    """Key and value lengths, and the turned channels, of a head.

    is_parted: some of a head's channels may stay as they are. is_usual: llama.cpp takes hidden_size / num_heads.
    """

    is_parted: bool = False
    is_usual: bool = False

    def read(self, keys: Keys, ours: dict[str, Any]) -> None:
        usual = ours["hidden_size"] // ours["num_heads"]
        length = keys.take("attention.key_length", default=usual)
        for name in ("attention.value_length", "rope.dimension_count"):
            value = keys.take(name, default=length)
            if value != length and not (self.is_parted and name == "rope.dimension_count"):
                raise keys.refuse(name, value, f"{length}, as attention.key_length, is required")
        turned = value
        put(ours, "head_dim", keys.check("attention.key_length", length, "head_dim"))
        if turned != length:
            put(ours, "rope_head_dim", keys.check("rope.dimension_count", turned, "rope_head_dim"))

    def write(self, config: Mapping[str, Any], theirs: dict[str, Any]) -> None:
        if self.is_usual and config["head_dim"] * config["num_heads"] != config["hidden_size"]:
            raise Inexpressible(f"head_dim = {config['head_dim']}")
        for name in ("attention.key_length", "attention.value_length"):
            theirs[name] = config["head_dim"]
        theirs["rope.dimension_count"] = (self.is_parted and config["rope_head_dim"]) or config["head_dim"]


@dataclass(frozen=True)
class GgufLatentHeads:
    """Latent attention. is_split: keys and values each have their own matrix, and one head stands for all.

    Files from before April 2025 are not split, and are only read.
    """

    is_split: bool

    def read(self, keys: Keys, ours: dict[str, Any]) -> None:
        ranks = {"kv_rank": keys.take("attention.kv_lora_rank"), "rope_head_dim": keys.take("rope.dimension_count")}
        given = {name: keys.take(f"attention.{name}") for name in ("head_count_kv", "key_length", "value_length")}
        due = {"head_count_kv": ours["num_heads"]}
        key, value = given["key_length"], given["value_length"]
        if self.is_split:
            key, value = keys.take("attention.key_length_mla"), keys.take("attention.value_length_mla")
            due = {"head_count_kv": 1, "key_length": sum(ranks.values()), "value_length": ranks["kv_rank"]}
        for name, number in due.items():
            if given[name] != number:
                raise keys.refuse(f"attention.{name}", given[name], f"{number} is required with latent attention")
        query = keys.take("attention.q_lora_rank", default=None) or None  # 0 stands for none
        sizes = {**ranks, "query_rank": query, "nope_head_dim": key - ranks["rope_head_dim"], "value_head_dim": value}
        for name, size in sizes.items():
            path = f"latent_attention.{name}"
            put(ours, path, keys.check(f"attention ({name})", size, path))
        put(ours, "head_dim", key)
        put(ours, "latent_attention.norm_epsilon", ours["norm_epsilon"])  # one for all norms

    def write(self, config: Mapping[str, Any], theirs: dict[str, Any]) -> None:
        latent = config["latent_attention"]
        if latent is None:
            raise Inexpressible("no latent attention")
        is_short = config["num_layers"] in (26, 27) or (config["num_layers"], config["vocab_size"]) == (48, 128256)
        if is_short and latent["query_rank"] is not None:
            raise Inexpressible(f"a query rank in {config['num_layers']} layers, which llama.cpp takes to have none,")
        theirs["attention.head_count_kv"] = 1
        theirs["attention.kv_lora_rank"] = theirs["attention.value_length"] = latent["kv_rank"]
        theirs["attention.q_lora_rank"] = latent["query_rank"] or 0
        theirs["attention.key_length"] = latent["kv_rank"] + latent["rope_head_dim"]
        theirs["attention.key_length_mla"] = config["head_dim"]
        theirs["attention.value_length_mla"] = latent["value_head_dim"]
        theirs["rope.dimension_count"] = latent["rope_head_dim"]


@dataclass(frozen=True)
class GgufRope:
    """rope.freq_base, and linear and yarn scaling; other kinds of scaling are refused by name.

    truncate: of yarn, which no key says; gpt-oss's models have it otherwise than others. is_latent: a DeepSeek model,
    whose yarn_log_multiplier enters the softmax scale instead of cosines and sines.
    """

    truncate: bool = True
    is_latent: bool = False

    def read(self, keys: Keys, ours: dict[str, Any]) -> None:
        theta = keys.check("rope.freq_base", keys.take("rope.freq_base", default=10_000.0), "rope_theta")
        put(ours, "rope_theta", _shortest(theta))
        keys.take("rope.scaling.finetuned", default=None)  # how the model came about
        # As llama.cpp reads them: a factor without a type is linear, and the old key is for files without a factor.
        kind, old = keys.take("rope.scaling.type", default="linear"), keys.take("rope.scale_linear", default=None)
        factor = keys.take("rope.scaling.factor", default=old)
        original = keys.take("rope.scaling.original_context_length", default=ours["max_positions"])
        yarn = self._read_yarn(keys)
        if kind == "none" or factor is None or factor == 0:  # 0 stands for no scaling there
            if kind not in ("none", "linear"):
                raise keys.refuse("rope.scaling.type", kind, "none, linear, or yarn with a factor, is required")
            return
        factor = _shortest(keys.check("rope.scaling.factor", factor, "rope_scaling.factor"))
        if kind == "linear":
            if factor != 1:
                put(ours, "rope_scaling", {"kind": "linear", "factor": factor})
            return
        if kind != "yarn":
            raise keys.refuse("rope.scaling.type", kind, "none, linear or yarn is required")
        path = "rope_scaling.original_max_positions"
        original = keys.check("rope.scaling.original_context_length", original, path)
        section = {"kind": "yarn", "factor": factor, "original_max_positions": original, "truncate": self.truncate}
        if self.is_latent:
            if yarn is None:
                raise keys.refuse(_YARN_LOG, yarn, "a number above 0 is required with yarn")
            section["attention_factor"] = 1.0
            put(ours, "attention_scale", yarn_scale(factor, yarn / 0.1) ** 2 / ours["head_dim"] ** 0.5)
        put(ours, "rope_scaling", section)

    def _read_yarn(self, keys: Keys) -> float | None:
        for name, usual in _BOUNDS:
            value = keys.take(f"rope.scaling.yarn_{name}", default=usual)
            if value != usual:
                raise keys.refuse(f"rope.scaling.yarn_{name}", value, f"{usual} is required")
        if not self.is_latent:
            return None
        value = keys.take(_YARN_LOG, default=0.0)
        if not isinstance(value, float) or not 0 <= value < float("inf"):
            raise keys.refuse(_YARN_LOG, value, "a number that is not negative is required")
        return _shortest(value) or None

    def write(self, config: Mapping[str, Any], theirs: dict[str, Any]) -> None:
        theirs["rope.freq_base"] = float(config["rope_theta"])
        scaling = config["rope_scaling"]
        if scaling is None:
            return
        if scaling["kind"] not in ("linear", "yarn"):
            raise Inexpressible(f"rope_scaling.kind = {scaling['kind']}")
        theirs["rope.scaling.type"], theirs["rope.scaling.factor"] = scaling["kind"], float(scaling["factor"])
        if scaling["kind"] == "yarn":
            attention = 1.0 if self.is_latent else None
            for name, value in (*_BOUNDS, ("truncate", self.truncate), ("attention_factor", attention)):
                if scaling[name] != value:
                    raise Inexpressible(f"rope_scaling.{name} = {scaling[name]}")
            theirs["rope.scaling.original_context_length"] = scaling["original_max_positions"]
            if self.is_latent and config["attention_scale"] is not None and scaling["factor"] > 1:
                root = (config["attention_scale"] * config["head_dim"] ** 0.5) ** 0.5
                theirs[_YARN_LOG] = (root - 1) / float(np.log(scaling["factor"]))


@dataclass(frozen=True)
class GgufWindow:
    """attention.sliding_window, and the layers that have it: of every `pattern` layers all but the last, or a list."""

    def read(self, keys: Keys, ours: dict[str, Any]) -> None:
        window = keys.check(_WINDOW, keys.take(_WINDOW), "sliding_window")
        count, pattern = ours["num_layers"], keys.take(_PATTERN, default=2)
        if type(pattern) is int and pattern >= 0:
            pattern = [pattern == 0 or layer % pattern < pattern - 1 for layer in range(count)]
        if not isinstance(pattern, list) or len(pattern) < count or any(type(each) is not bool for each in pattern):
            raise keys.refuse(_PATTERN, pattern, f"true or false for each of {count} layers, or a number, is required")
        layers = [layer for layer in range(count) if pattern[layer]]
        if layers and window < ours["max_positions"]:  # else it has no effect
            put(ours, "sliding_window", window)
            if len(layers) < count:
                put(ours, "sliding_layers", layers)

    def write(self, config: Mapping[str, Any], theirs: dict[str, Any]) -> None:
        window, every = config["sliding_window"], range(config["num_layers"])
        theirs[_WINDOW] = config["max_positions"] if window is None else window
        layers = every if config["sliding_layers"] is None else config["sliding_layers"]
        if window is not None and list(layers) != list(every[::2]):  # what a file without the key means
            theirs[_PATTERN] = [layer in layers for layer in every]


@dataclass(frozen=True)
class GgufEpsilon:
    """The norms' epsilon, which the file holds as fp32."""

    def read(self, keys: Keys, ours: dict[str, Any]) -> None:
        name = "attention.layer_norm_rms_epsilon"
        put(ours, "norm_epsilon", _shortest(keys.check(name, keys.take(name), "norm_epsilon")))

    def write(self, config: Mapping[str, Any], theirs: dict[str, Any]) -> None:
        theirs["attention.layer_norm_rms_epsilon"] = float(config["norm_epsilon"])


@dataclass(frozen=True)
class GgufRouter:
    """How the experts' scores become weights. usual: the scoring of a file that says none, of a vocabulary's size."""

    usual: Callable[[Mapping[str, Any]], str]

    def read(self, keys: Keys, ours: dict[str, Any]) -> None:
        number = keys.take("expert_gating_func", default=0)
        if type(number) is not int or number not in (0, 1, 2):
            raise keys.refuse("expert_gating_func", number, "1 (softmax) or 2 (sigmoid) is required")
        scoring = self.usual(ours) if number == 0 else _SCORING[number - 1]
        put(ours, "moe.router.scoring", scoring)
        scale = keys.take("expert_weights_scale", default=1.0)
        scale = 1.0 if scale == 0 else scale  # stands for none
        put(ours, "moe.router.scale", _shortest(keys.check("expert_weights_scale", scale, "moe.router.scale")))
        for name, ours_name in (("expert_group_count", "num_groups"), ("expert_group_used_count", "top_groups")):
            path = f"moe.router.{ours_name}"
            put(ours, path, keys.check(name, keys.take(name, default=None) or 1, path))

    def write(self, config: Mapping[str, Any], theirs: dict[str, Any]) -> None:
        theirs["expert_gating_func"] = 1 + _SCORING.index(config["moe.router.scoring"])
        theirs["expert_weights_scale"] = float(config["moe.router.scale"])
        groups, top = config["moe.router.num_groups"], config["moe.router.top_groups"]
        if top == groups:
            return
        theirs["expert_group_count"], theirs["expert_group_used_count"] = groups, top
        # llama.cpp knows a group by its best two, as sigmoid's groups are known.
        if config["moe.router.scoring"] == "softmax":
            raise Inexpressible("groups of experts that softmax scores")
        if groups == config["moe.num_experts"]:
            raise Inexpressible("groups of one expert")


@dataclass(frozen=True)
class GgufEveryLayer:
    """Experts in all layers."""

    def read(self, keys: Keys, ours: dict[str, Any]) -> None:
        return

    def write(self, config: Mapping[str, Any], theirs: dict[str, Any]) -> None:
        every, places = config["num_layers"], config["moe_layers"]
        if places and len(places) < every:
            raise Inexpressible(f"{every - len(places)} of {every} layers without experts")


@dataclass(frozen=True)
class Ignored:
    """What needs no key."""

    theirs: str

    def read(self, keys: Keys, ours: dict[str, Any]) -> None:
        keys.take(self.theirs, default=None)

    def write(self, config: Mapping[str, Any], theirs: dict[str, Any]) -> None:
        return


@dataclass(frozen=True)
class GgufFamily:
    """architecture: as general.architecture has it. is_moe: whether this is the family's form with experts.

    without: a key that files of this form do not have; such a form is read, and not written.
    """

    architecture: str
    is_moe: bool
    keys: tuple[KeyRule, ...]
    tensors: tuple[TensorRule, ...]
    without: str | None = None

    @property
    def name(self) -> str:
        return f"gguf {self.architecture}" + (" with experts" if self.is_moe else "")

    def is_form_of(self, architecture: Any, keys: Mapping[str, Any]) -> bool:
        """Whether a file with this architecture and these keys is of this form."""
        is_moe = bool(keys.get("expert_count", 0))
        return (self.architecture, self.is_moe) == (architecture, is_moe) and self.without not in keys


def keys_of_tensors(names: Mapping[str, Any]) -> dict[str, bool]:
    """Return what the names of a file's tensors say, as keys."""
    ends = {name.partition(".")[2].partition(".")[2] if name.startswith("blk.") else name for name in names}
    return {
        IS_TIED: OUTPUT not in ends,
        HAS_BIASES: "attn_q.bias" in ends,
        HAS_HEAD_NORMS: "attn_q_norm.weight" in ends,
        HAS_CORRECTION: "exp_probs_b.bias" in ends,
    }


def _said_by_tensors(*names: str) -> tuple[KeyRule, ...]:
    """Rules for those of keys_of_tensors that may be either way, and none for the others: each tensor has its place."""
    rules: dict[str, KeyRule] = {
        IS_TIED: Same(IS_TIED, "tie_embeddings"),
        HAS_BIASES: OneOf(HAS_BIASES, "attention_bias", {False: "none", True: "qkv"}),
        HAS_HEAD_NORMS: OneOf(HAS_HEAD_NORMS, "qk_norm", {False: "none", True: "head"}),
        HAS_CORRECTION: Same(HAS_CORRECTION, "moe.router.score_correction_bias"),
    }
    return tuple(rules[name] if name in names else Ignored(name) for name in rules)


_KEY_HEADS = Same("attention.head_count_kv", "num_kv_heads", default=None)
_USUAL_HEADS = (_KEY_HEADS, GgufHeads(is_usual=True))


def _rules(
    *rules: KeyRule,
    heads: tuple[KeyRule, ...] = (_KEY_HEADS, GgufHeads()),
    rope: KeyRule = GgufRope(),
    said: tuple[str, ...] = (IS_TIED,),
    activation: str = "swiglu",
) -> tuple[KeyRule, ...]:
    return (
        Same(VOCAB_SIZE, "vocab_size"),
        Same("embedding_length", "hidden_size"),
        GgufLayers(),
        Same("attention.head_count", "num_heads"),
        Same("context_length", "max_positions"),
        Same("feed_forward_length", "intermediate_size"),
        GgufEpsilon(),
        *heads,
        *((Always("tie_embeddings", False),) if IS_TIED not in said else ()),
        Always("norm", "rmsnorm"),
        Always("positions", "rotary"),
        Always("activation", activation),
        *rules,
        *_said_by_tensors(*said),
        rope,
    )


_EQUAL_HEADS = (EqualHeads("attention.head_count_kv"), GgufHeads(is_usual=True))
_DENSE: tuple[KeyRule, ...] = (
    Fixed("expert_count", 0, is_written=False),
    Fixed("expert_used_count", 0, is_written=False),
)
_EXPERTS: tuple[KeyRule, ...] = (Same("expert_count", "moe.num_experts"), Same("expert_used_count", "moe.top_k"))
_EXPERT_SIZE = Same("expert_feed_forward_length", "moe.intermediate_size")
_RENORMALIZED, _NOT_RENORMALIZED = (Always("moe.router.renormalize", each) for each in (True, False))


def _always_sigmoid(_: Mapping[str, Any]) -> str:
    return "sigmoid"


def _deepseek_scoring(ours: Mapping[str, Any]) -> str:
    """As llama.cpp tells GLM-4.7-Flash from models of before there was a key."""
    return "sigmoid" if ours["num_layers"] in (47, 48) and ours["vocab_size"] == 154_880 else "softmax"


def _shared(usual: Callable[[Mapping[str, Any]], str]) -> tuple[KeyRule, ...]:
    """Experts as DeepSeek's: some shared ones beside them, behind some layers without."""
    return (
        *_EXPERTS,
        _EXPERT_SIZE,
        GgufRouter(usual),
        Same("expert_weights_norm", "moe.router.renormalize", default=False),
        SharedExperts("expert_shared_count"),
        PlacesAfter("leading_dense_block_count"),
    )


_NO_BIAS, _QKV_BIAS = Always("attention_bias", "none"), Always("attention_bias", "qkv")
_HEAD_NORMS = Always("qk_norm", "head")


_BLK, _ATTENTION, _FEED_FORWARD = "blk.{layer}", "blocks.{layer}.attention", "blocks.{layer}.feed_forward"


def _attention(
    *,
    queries: Callable[[ModelConfig], RowOrder] | None = None,
    keys: Callable[[ModelConfig], RowOrder] | None = None,
    head: Callable[[ModelConfig], RowOrder] | None = None,
) -> tuple[TensorRule, ...]:
    return (
        TensorRule(f"{_ATTENTION}.q_proj.{{rest}}", (f"{_BLK}.attn_q.{{rest}}",), rows=queries),
        TensorRule(f"{_ATTENTION}.k_proj.{{rest}}", (f"{_BLK}.attn_k.{{rest}}",), rows=keys),
        TensorRule(f"{_ATTENTION}.v_proj.{{rest}}", (f"{_BLK}.attn_v.{{rest}}",)),
        TensorRule(f"{_ATTENTION}.o_proj.{{rest}}", (f"{_BLK}.attn_output.{{rest}}",)),
        TensorRule(f"{_ATTENTION}.q_norm.weight", (f"{_BLK}.attn_q_norm.weight",), rows=head),
        TensorRule(f"{_ATTENTION}.k_norm.weight", (f"{_BLK}.attn_k_norm.weight",), rows=head),
        TensorRule(f"{_ATTENTION}.sinks", (f"{_BLK}.attn_sinks.weight",)),
    )


def _latent_parts(config: ModelConfig) -> tuple[int, ...]:
    assert config.latent_attention is not None
    return (config.latent_attention.nope_head_dim, config.latent_attention.value_head_dim)


def _latent_attention(*, is_split: bool) -> tuple[TensorRule, ...]:
    up = f"{_ATTENTION}.kv_up_proj.weight"
    return (
        TensorRule(f"{_ATTENTION}.q_proj.weight", (f"{_BLK}.attn_q.weight",), rows=latent_query_rows),
        TensorRule(f"{_ATTENTION}.q_down_proj.weight", (f"{_BLK}.attn_q_a.weight",)),
        TensorRule(f"{_ATTENTION}.q_down_norm.weight", (f"{_BLK}.attn_q_a_norm.weight",)),
        TensorRule(f"{_ATTENTION}.q_up_proj.weight", (f"{_BLK}.attn_q_b.weight",), rows=latent_query_rows),
        TensorRule(f"{_ATTENTION}.kv_down_proj.weight", (f"{_BLK}.attn_kv_a_mqa.weight",), rows=latent_key_rows),
        TensorRule(f"{_ATTENTION}.kv_down_norm.weight", (f"{_BLK}.attn_kv_a_norm.weight",)),
        TensorRule(
            up,
            (f"{_BLK}.attn_k_b.weight", f"{_BLK}.attn_v_b.weight"),
            parts=_latent_parts,
            is_stacked=True,
            is_transposed=(True, False),
        )
        if is_split
        else TensorRule(up, (f"{_BLK}.attn_kv_b.weight",)),
        TensorRule(f"{_ATTENTION}.o_proj.weight", (f"{_BLK}.attn_output.weight",)),
    )


def _tensors(attention: tuple[TensorRule, ...], *, norm: str = "ffn_norm") -> tuple[TensorRule, ...]:
    """norm: what the norm before the feed-forward part is called."""
    moe, mlp = f"{_FEED_FORWARD}.moe", f"{_FEED_FORWARD}.mlp"
    pair = (f"{_BLK}.ffn_gate_exps", f"{_BLK}.ffn_up_exps")
    return (
        TensorRule("embedding", (EMBEDDING,)),
        TensorRule("lm_head", (OUTPUT,)),
        TensorRule("final_norm.weight", ("output_norm.weight",)),
        TensorRule("blocks.{layer}.attention_norm.weight", (f"{_BLK}.attn_norm.weight",)),
        TensorRule("blocks.{layer}.feed_forward_norm.weight", (f"{_BLK}.{norm}.weight",)),
        *attention,
        TensorRule(f"{moe}.router.score_correction_bias", (f"{_BLK}.exp_probs_b.bias",)),
        TensorRule(f"{moe}.router.{{rest}}", (f"{_BLK}.ffn_gate_inp.{{rest}}",)),
        *(
            TensorRule(f"{moe}.experts.{ours}", tuple(f"{each}.{kind}" for each in theirs), is_stacked=True)
            for part, theirs in (("gate_up", pair), ("down", (f"{_BLK}.ffn_down_exps",)))
            for ours, kind in ((f"{part}_proj", "weight"), (f"{part}_bias", "bias"))
        ),
        *(
            rule
            for each in ("gate", "up", "down")
            for rule in (
                TensorRule(f"{mlp}.{each}_proj.weight", (f"{_BLK}.ffn_{each}.weight",), layers="dense"),
                TensorRule(f"{mlp}.{each}_proj.weight", (f"{_BLK}.ffn_{each}_shexp.weight",), layers="moe"),
            )
        ),
        TensorRule(f"{_FEED_FORWARD}.mix.weight", (f"{_BLK}.{SHARED_GATE}",)),
    )


# llama.cpp turns neighbouring channels of llama's heads.
_PAIRED = _tensors(_attention(queries=paired_query_rows, keys=paired_key_rows))
_HALVED = _tensors(_attention())
_POST_NORM = "post_attention_norm"

GGUF_FAMILIES = (
    GgufFamily("llama", False, _rules(*_DENSE, _NO_BIAS), _PAIRED),
    GgufFamily("llama", True, _rules(*_EXPERTS, GgufEveryLayer(), _RENORMALIZED, _NO_BIAS), _PAIRED),
    GgufFamily("qwen2", False, _rules(*_DENSE, _QKV_BIAS, heads=_USUAL_HEADS), _HALVED),
    GgufFamily("qwen3", False, _rules(*_DENSE, _NO_BIAS, _HEAD_NORMS), _HALVED),
    GgufFamily(
        "qwen3moe",
        True,
        _rules(*_EXPERTS, GgufEveryLayer(), _RENORMALIZED, _EXPERT_SIZE, _NO_BIAS, _HEAD_NORMS),
        _HALVED,
    ),
    GgufFamily(
        "gpt-oss",
        True,
        _rules(
            *_EXPERTS,
            GgufEveryLayer(),
            _EXPERT_SIZE,
            _RENORMALIZED,
            Always("moe.router.bias", True),
            Always("attention_bias", "all"),
            Always("attention_sinks", True),
            Always("mlp_bias", True),
            GgufWindow(),
            rope=GgufRope(truncate=False),
            said=(),
            activation="swiglu_oai",
        ),
        _tensors(_attention(), norm=_POST_NORM),
    ),
    GgufFamily(
        "qwen2moe",
        True,
        _rules(
            *_EXPERTS,
            GgufEveryLayer(),
            _EXPERT_SIZE,
            _NOT_RENORMALIZED,
            Always("moe.residual", "sigmoid"),
            Same("expert_shared_feed_forward_length", "moe.residual_intermediate_size"),
            heads=_USUAL_HEADS,
            said=(HAS_BIASES,),
        ),
        _HALVED,
    ),
    GgufFamily(
        "olmoe",
        True,
        _rules(
            *_EXPERTS,
            GgufEveryLayer(),
            _NOT_RENORMALIZED,
            _NO_BIAS,
            Always("qk_norm", "full"),
            heads=_EQUAL_HEADS,
            said=(),
        ),
        _HALVED,
    ),
    *(
        GgufFamily(
            "deepseek2",
            True,
            _rules(
                *_shared(_deepseek_scoring),
                _NO_BIAS,
                heads=(GgufLatentHeads(is_split),),
                rope=GgufRope(is_latent=True),
                said=(IS_TIED, HAS_CORRECTION),
            ),
            _tensors(_latent_attention(is_split=is_split)),
            without=None if is_split else "attention.key_length_mla",
        )
        for is_split in (False, True)
    ),
    GgufFamily(
        "dots1",
        True,
        _rules(
            *_shared(_always_sigmoid),
            _HEAD_NORMS,
            heads=(EqualHeads("attention.head_count_kv"), GgufHeads()),
            said=(HAS_BIASES, HAS_CORRECTION),
        ),
        _HALVED,
    ),
    GgufFamily(
        "glm4moe",
        True,
        _rules(
            *_shared(_always_sigmoid),
            Always("moe.router.score_correction_bias", True),
            heads=(_KEY_HEADS, GgufHeads(is_parted=True)),
            said=(IS_TIED, HAS_BIASES, HAS_HEAD_NORMS),
        ),
        _tensors(_attention(queries=parted_query_rows, keys=parted_key_rows, head=parted_head_rows), norm=_POST_NORM),
    ),
    GgufFamily(
        "seed_oss",
        False,
        _rules(*_DENSE, said=(IS_TIED, HAS_BIASES)),
        _tensors(_attention(), norm=_POST_NORM),
    ),
)


def beyond_gguf(config: ModelConfig) -> list[str]:
    """Return what of a model's experts no family of GGUF_FAMILIES has a place for, in words."""
    experts = [layer for layer in config.layers if layer.is_moe]
    if not experts:
        return []
    found = []
    if not all(layer.is_moe for layer in config.layers[config.moe_layers[0] :]):
        found.append(
            f"{config.num_layers - len(experts)} of {config.num_layers} layers without experts, between others"
        )
    if any(layer.residual == "softmax" for layer in experts):
        found.append("a residual MLP beside the experts (moe.residual = softmax)")
    for what, sizes in (
        ("num_experts", [layer.num_experts for layer in experts]),
        ("top_k", [layer.top_k for layer in experts]),
        ("intermediate_size", [layer.expert_intermediate_size for layer in experts]),
    ):
        if len(set(sizes)) > 1:
            found.append(f"another {what} from layer to layer ({', '.join(map(str, dict.fromkeys(sizes)))})")
    return found
