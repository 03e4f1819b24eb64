"""GGUF files, read and written: metadata keys and tensor names as tables, the tensors through the `gguf` package.

Quantised tensors are dequantised to fp32 as they are read. What the byte-level BPE in a file's metadata becomes, and
what becomes of ours, is gguf_tokenizer.py's business.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moesaic.checkpoint.stream import TensorLayout, fill
from moesaic.config.model import ModelConfig
from moesaic.convert.gguf_file import read_contents
from moesaic.convert.gguf_tokenizer import read_tokenizer
from moesaic.convert.keys import Always, Fixed, Inexpressible, KeyRule, Keys, Same, put, read_config
from moesaic.convert.tensors import RowOrder, TensorRule, paired_rows
from moesaic.data.tokenizer import Tokenizer
from moesaic.errors import ConversionError

_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
EMBEDDING, OUTPUT = "token_embd.weight", "output.weight"
# What llama.cpp reads as fp32 whatever the rest is.
ROUTER = "ffn_gate_inp.weight"


@dataclass(frozen=True)
class GgufHeads:
    """Key and value lengths, and the turned channels, of a head."""

    def read(self, keys: Keys, ours: dict[str, Any]) -> None:
        usual = ours["hidden_size"] // ours["num_heads"]
        length = keys.take("attention.key_length", default=usual)
        for name in ("attention.value_length", "rope.dimension_count"):
            value = keys.take(name, default=length)
            if value != length:
                raise keys.refuse(name, value, f"{length}, as attention.key_length, is required")
        put(ours, "head_dim", keys.check("attention.key_length", length, "head_dim"))

    def write(self, config: Mapping[str, Any], theirs: dict[str, Any]) -> None:
        for name in ("attention.key_length", "attention.value_length", "rope.dimension_count"):
            theirs[name] = config["head_dim"]


@dataclass(frozen=True)
class GgufRope:
    """rope.freq_base, and linear scaling; other kinds of scaling are refused by name."""

    def read(self, keys: Keys, ours: dict[str, Any]) -> None:
        theta = keys.check("rope.freq_base", keys.take("rope.freq_base", default=10_000.0), "rope_theta")
        put(ours, "rope_theta", _shortest(theta))
        # As llama.cpp reads them: a factor without a type is linear, and the old key is for files without a factor.
        kind, old = keys.take("rope.scaling.type", default="linear"), keys.take("rope.scale_linear", default=None)
        factor = keys.take("rope.scaling.factor", default=old)
        if kind == "linear" and factor is not None and factor != 0:  # 0 stands for no scaling there
            keys.check("rope.scaling.factor", factor, "rope_scaling.factor")
            if factor != 1:
                put(ours, "rope_scaling", {"kind": "linear", "factor": _shortest(factor)})
        elif kind not in ("linear", "none"):
            raise keys.refuse("rope.scaling.type", kind, "none or linear is required")

    def write(self, config: Mapping[str, Any], theirs: dict[str, Any]) -> None:
        theirs["rope.freq_base"] = float(config["rope_theta"])
        scaling = config["rope_scaling"]
        if scaling is None:
            return
        if scaling["kind"] != "linear":
            raise Inexpressible(f"rope_scaling.kind = {scaling['kind']}")
        theirs["rope.scaling.type"], theirs["rope.scaling.factor"] = "linear", float(scaling["factor"])


@dataclass(frozen=True)
class GgufEpsilon:
    """The norms' epsilon, which the file holds as fp32."""

    def read(self, keys: Keys, ours: dict[str, Any]) -> None:
        name = "attention.layer_norm_rms_epsilon"
        put(ours, "norm_epsilon", _shortest(keys.check(name, keys.take(name), "norm_epsilon")))

    def write(self, config: Mapping[str, Any], theirs: dict[str, Any]) -> None:
        theirs["attention.layer_norm_rms_epsilon"] = float(config["norm_epsilon"])


def _shortest(value: Any) -> float:
    """Return the shortest decimal that is this number in fp32: 9.999999747378752e-06 was written as 1e-5."""
    return float(str(np.float32(value)))


@dataclass(frozen=True)
class GgufFamily:
    """architecture: as general.architecture has it. is_moe: whether this is the family's form with experts."""

    architecture: str
    is_moe: bool
    keys: tuple[KeyRule, ...]
    tensors: tuple[TensorRule, ...]

    @property
    def name(self) -> str:
        return f"gguf {self.architecture}" + (" with experts" if self.is_moe else "")


# Put beside a file's own keys: what its tensors say.
_VOCAB_SIZE, _IS_TIED = "vocab_size", "(tied output)"

_SIZES: tuple[KeyRule, ...] = (
    Same(_VOCAB_SIZE, "vocab_size"),
    Same(_IS_TIED, "tie_embeddings"),
    Same("embedding_length", "hidden_size"),
    Same("block_count", "num_layers"),
    Same("attention.head_count", "num_heads"),
    Same("attention.head_count_kv", "num_kv_heads", default=None),
    Same("context_length", "max_positions"),
    Same("feed_forward_length", "intermediate_size"),
    GgufHeads(),
    GgufRope(),
    GgufEpsilon(),
    Always("norm", "rmsnorm"),
    Always("positions", "rotary"),
    Always("activation", "swiglu"),
)
_DENSE: tuple[KeyRule, ...] = (
    Fixed("expert_count", 0, is_written=False),
    Fixed("expert_used_count", 0, is_written=False),
)
_EXPERTS: tuple[KeyRule, ...] = (
    Same("expert_count", "moe.num_experts"),
    Same("expert_used_count", "moe.top_k"),
    Always("moe.router.renormalize", True),
)
_NO_BIAS, _QKV_BIAS = Always("attention_bias", "none"), Always("attention_bias", "qkv")


def _queries(config: ModelConfig) -> RowOrder:
    return paired_rows(config.num_heads, config.head_dim)


def _keys(config: ModelConfig) -> RowOrder:
    return paired_rows(config.num_kv_heads, config.head_dim)


def _tensors(*, is_paired: bool, is_moe: bool) -> tuple[TensorRule, ...]:
    """is_paired: llama.cpp turns neighbouring channels of this architecture's heads."""
    blk, attention = "blk.{layer}", "blocks.{layer}.attention"
    orders: dict[str, Callable[[ModelConfig], RowOrder]] = {"q": _queries, "k": _keys} if is_paired else {}
    moe = "blocks.{layer}.feed_forward.moe"
    mlp = "blocks.{layer}.feed_forward.mlp"
    return (
        TensorRule("embedding", (EMBEDDING,)),
        TensorRule("lm_head", (OUTPUT,)),
        TensorRule("final_norm.weight", ("output_norm.weight",)),
        TensorRule("blocks.{layer}.attention_norm.weight", (f"{blk}.attn_norm.weight",)),
        TensorRule("blocks.{layer}.feed_forward_norm.weight", (f"{blk}.ffn_norm.weight",)),
        *(
            TensorRule(f"{attention}.{each}_proj.{{rest}}", (f"{blk}.attn_{each}.{{rest}}",), rows=orders.get(each))
            for each in ("q", "k", "v")
        ),
        TensorRule(f"{attention}.o_proj.{{rest}}", (f"{blk}.attn_output.{{rest}}",)),
        TensorRule(f"{attention}.q_norm.weight", (f"{blk}.attn_q_norm.weight",)),
        TensorRule(f"{attention}.k_norm.weight", (f"{blk}.attn_k_norm.weight",)),
        *(
            (
                TensorRule(f"{moe}.router.weight", (f"{blk}.{ROUTER}",)),
                TensorRule(
                    f"{moe}.experts.gate_up_proj",
                    (f"{blk}.ffn_gate_exps.weight", f"{blk}.ffn_up_exps.weight"),
                    is_stacked=True,
                ),
                TensorRule(f"{moe}.experts.down_proj", (f"{blk}.ffn_down_exps.weight",), is_stacked=True),
            )
            if is_moe
            else tuple(
                TensorRule(f"{mlp}.{each}_proj.weight", (f"{blk}.ffn_{each}.weight",))
                for each in ("gate", "up", "down")
            )
        ),
    )


GGUF_FAMILIES = (
    GgufFamily("llama", False, (*_SIZES, *_DENSE, _NO_BIAS), _tensors(is_paired=True, is_moe=False)),
    GgufFamily("llama", True, (*_SIZES, *_EXPERTS, _NO_BIAS), _tensors(is_paired=True, is_moe=True)),
    GgufFamily("qwen2", False, (*_SIZES, *_DENSE, _QKV_BIAS), _tensors(is_paired=False, is_moe=False)),
    GgufFamily(
        "qwen3",
        False,
        (*_SIZES, *_DENSE, _NO_BIAS, Always("qk_norm", "head")),
        _tensors(is_paired=False, is_moe=False),
    ),
    GgufFamily(
        "qwen3moe",
        True,
        (
            *_SIZES,
            *_EXPERTS,
            Same("expert_feed_forward_length", "moe.intermediate_size"),
            _NO_BIAS,
            Always("qk_norm", "head"),
        ),
        _tensors(is_paired=False, is_moe=True),
    ),
)


def beyond_gguf(config: ModelConfig) -> list[str]:
    """Return what of a model's experts no family of GGUF_FAMILIES has a place for, in words."""
    experts = [layer for layer in config.layers if layer.is_moe]
    if not experts:
        return []
    found = []
    if len(experts) < config.num_layers:
        found.append(f"{config.num_layers - len(experts)} of {config.num_layers} layers without experts")
    if kinds := sorted({layer.residual for layer in experts if layer.residual}):
        found.append(f"a residual MLP beside the experts (moe.residual = {kinds[0]})")
    for what, sizes in (
        ("num_experts", [layer.num_experts for layer in experts]),
        ("top_k", [layer.top_k for layer in experts]),
        ("intermediate_size", [layer.expert_intermediate_size for layer in experts]),
    ):
        if len(set(sizes)) > 1:
            found.append(f"another {what} from layer to layer ({', '.join(map(str, dict.fromkeys(sizes)))})")
    if not all(layer.router.renormalize for layer in experts):
        found.append("routing weights that do not sum to 1 (moe.router.renormalize = false)")
    return found


@dataclass
class GgufFile:
    """A GGUF file as a source of tensors; quantised ones come as fp32.

    Raises: ConversionError for a file that is none, or is truncated.
    """

    path: Path
    metadata: dict[str, Any] = field(init=False)
    layout: Mapping[str, TensorLayout] = field(init=False)

    def __post_init__(self) -> None:
        self._gguf = require_gguf()
        self._kinds = {each.value: each for each in self._gguf.GGMLQuantizationType}
        sizes = {each.value: self._gguf.GGML_QUANT_SIZES[each] for each in self._kinds.values()}
        try:
            contents = read_contents(self.path, sizes)
            self._file = self.path.open("rb", buffering=0)
        except (OSError, ValueError) as error:
            raise ConversionError(
                f"{self.path} cannot be read as GGUF ({error}); a whole GGUF file of version 2 or 3 is required; fetch "
                f"it again."
            ) from None
        self.metadata, self._tensors = contents.metadata, contents.tensors
        self.layout = {
            name: TensorLayout(_PLAIN.get(self._kinds[each.kind].name, torch.float32), each.shape)
            for name, each in self._tensors.items()
        }

    def read(self, name: str, index: int | None = None) -> Tensor:
        tensor = self._tensors[name]
        kind, shape, start = self._kinds[tensor.kind], tensor.shape, tensor.start
        num_bytes = tensor.num_bytes
        if index is not None:
            shape, num_bytes = shape[1:], num_bytes // shape[0]
            start += index * num_bytes
        data = torch.empty(num_bytes, dtype=torch.uint8)
        self._file.seek(start)
        if not fill(data.numpy().data, self._file):
            raise ConversionError(
                f"{self.path} ends before {name} does; the file as it was opened is required; fetch it again."
            )
        if kind.name in _PLAIN:
            return data.view(_PLAIN[kind.name]).view(shape)
        rows = data.numpy().reshape(*shape[:-1], shape[-1] // tensor.block * tensor.block_bytes)
        try:
            return torch.from_numpy(self._gguf.quants.dequantize(rows, kind))
        except NotImplementedError:
            raise ConversionError(
                f"{self.path}: {name} is of type {kind.name}, which the gguf package does not dequantise; F32, F16, "
                f"BF16, Q4_0 to Q8_0 or a K type is required; take another file of the model."
            ) from None

    def tokenizer(self) -> Tokenizer:
        return read_tokenizer(self.metadata, str(self.path))

    def __enter__(self) -> "GgufFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def read_gguf_config(source: GgufFile) -> tuple[str, ModelConfig, tuple[TensorRule, ...]]:
    """Return the family's name, the model, and the table of its tensors.

    Raises: ConversionError for an architecture or a value that has no table here.
    """
    architecture = source.metadata.get("general.architecture")
    keys = {
        name.removeprefix(f"{architecture}."): value
        for name, value in source.metadata.items()
        if name.startswith(f"{architecture}.")
    }
    is_moe = bool(keys.get("expert_count", 0))
    family = next((each for each in GGUF_FAMILIES if each.architecture == architecture and each.is_moe == is_moe), None)
    if family is None or EMBEDDING not in source.layout:
        known = ", ".join(dict.fromkeys(each.architecture for each in GGUF_FAMILIES))
        raise ConversionError(
            f"{source.path} is of architecture {architecture!r}{' with experts' if is_moe else ''}; one of {known} is "
            f"required; import the model's Hugging Face folder instead."
        )
    if "rope_freqs.weight" in source.layout:
        raise ConversionError(
            f"{source.path} holds rope_freqs.weight, llama3 scaling worked into numbers; which scaling that was cannot "
            f"be told from them; import the model's Hugging Face folder instead."
        )
    keys[_VOCAB_SIZE] = source.layout[EMBEDDING].shape[0]
    keys[_IS_TIED] = OUTPUT not in source.layout
    config = read_config(family.keys, Keys(keys, f"{source.path} ({architecture})"), frozenset())
    return family.name, config, family.tensors


def require_gguf() -> Any:
    """Return the gguf package. Raises: ConversionError when it is not installed."""
    try:
        import gguf
        import gguf.quants
    except ImportError:
        raise ConversionError(
            "GGUF files are read and written through the gguf package, which is not installed; run pip install "
            "'moesaic[gguf]'."
        ) from None
    return gguf
