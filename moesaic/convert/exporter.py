"""A run into the layout of other tools: a family of Hugging Face's, transformers classes of ours, or GGUF.

A family is taken where its config can describe the model exactly, if need be after a rewriting that changes no output:
an unmixed residual MLP becomes a gated one whose gate says one half of twice the MLP, a learned output scale goes into
the experts' last matrix. Tensors are read, cast and written one at a time.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from moesaic.checkpoint.quantized import require_unquantized
from moesaic.checkpoint.store import checked_file, resolve_checkpoint
from moesaic.checkpoint.stream import TensorLayout, TensorReader, TensorWriter
from moesaic.config.model import ModelConfig
from moesaic.convert.families import FAMILIES, OWN_NAME, OWN_TENSORS, Family, harmless_keys
from moesaic.convert.folder import check_is_new, check_is_outside, folder_in_progress
from moesaic.convert.gguf import require_gguf
from moesaic.convert.gguf_families import BIAS, GGUF_FAMILIES, ROUTER, SHARED_GATE, GgufFamily, beyond_gguf
from moesaic.convert.gguf_tokenizer import tokenizer_metadata
from moesaic.convert.keys import Inexpressible, write_config_keys
from moesaic.convert.parity import Certificate, TensorAccount, certify
from moesaic.convert.rewriting import Rewriting, rewritings
from moesaic.convert.runnable import Change
from moesaic.convert.source import CONFIG_NAME, INDEX_NAME, WEIGHTS_NAME
from moesaic.convert.tensors import (
    Piece,
    TensorRule,
    cast_weight,
    common_dtype,
    foreign_shape,
    foreign_tensors,
    pieces_of,
    require_finite,
)
from moesaic.data.tokenizer import Tokenizer
from moesaic.errors import ConfigError, ConversionError, InstallationError
from moesaic.kernels.allocator import tune_allocator
from moesaic.logs import OnProgress, no_progress
from moesaic.model.load import load_run_config

Format = Literal["huggingface", "gguf"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_SHARD_BYTES = 5 * 10**9
_GGUF_NAME = "model.gguf"


class _Weights:
    """A run's tensors as a rewriting has them, read a part at a time."""

    def __init__(self, reader: TensorReader, rewriting: Rewriting) -> None:
        self._reader, self._rewriting = reader, rewriting
        self._factors = {
            name: float(reader.read(factor)) if isinstance(factor, str) else factor
            for name, factor in rewriting.factors.items()
        }

    def dtype(self, name: str) -> torch.dtype:
        return torch.bfloat16 if name in self._rewriting.zeros else self._reader.layout[name].dtype

    def read_finite(self, piece: Piece) -> Tensor:
        """Raises: CheckpointError for numbers that are not finite."""
        return require_finite(piece.ours, self.read_piece(piece))

    def read_piece(self, piece: Piece) -> Tensor:
        if piece.ours in self._rewriting.zeros:
            return torch.zeros(piece.shape, dtype=torch.bfloat16)
        numbers = self._reader.read_numbers(piece.ours, piece.start, piece.stop)
        factor = self._factors.get(piece.ours)
        return piece.to_theirs(numbers if factor is None else numbers.float().mul_(factor))  # rounded once, as written


@dataclass(frozen=True)
class _Choice:
    """Where a model goes: the family's name, its config keys, and the table of tensors for a rewriting."""

    family: str
    keys: dict[str, Any]
    rewriting: Rewriting
    rules: tuple[TensorRule, ...]


def export_run(
    run: str | Path,
    output: str | Path,
    *,
    format: Format = "huggingface",
    dtype: str | None = None,
    force: bool = False,
    on_progress: OnProgress = no_progress,
) -> Certificate:
    """Write the model that RUN or RUN@step names for other tools, and return what the check found.

    "huggingface": a folder in the layout of the first family that can describe the model exactly, else of our own
    classes for transformers (moesaic.hf). "gguf": a folder with model.gguf. dtype: fp32, bf16 or fp16, None as stored.
    force: keep a result whose check failed.

    Raises: ConversionError, ConfigError, CheckpointError, InstallationError; nothing is left behind then.
    """
    tune_allocator()  # a tensor's memory is the next one's, without the page faults of fresh memory
    output = Path(output)
    info = resolve_checkpoint(run)
    for name, value, known in (("format", format, get_args(Format)), ("dtype", dtype, tuple(DTYPES))):
        if value is not None and value not in known:
            raise ConfigError(f"{name} ({value!r}) is not known; one of {', '.join(known)} is required; name it.")
    require_unquantized(info, "other tools quantise their own way", do="export", error=ConversionError)
    check_is_new(output)
    check_is_outside(output, info.run_folder)
    config = load_run_config(info.run_folder).model
    tokenizer = Tokenizer.load(info.run_folder)
    choice = _choose_gguf(config) if format == "gguf" else _choose_folder(config)
    if choice.family == OWN_NAME:
        _require_own_classes(run)
    foreign = foreign_tensors(pieces_of(choice.rewriting.config, choice.rules))
    with folder_in_progress(output) as target:
        with checked_file(info, "model") as path, TensorReader(path) as reader:
            weights = _Weights(reader, choice.rewriting)
            wanted = None if dtype is None else DTYPES[dtype]
            write = _write_gguf if format == "gguf" else _write_folder
            layout = write(target, choice, foreign, weights, tokenizer, wanted, on_progress)
        account = TensorAccount(
            source=len(reader.layout),
            used=len(reader.layout),
            result=len(layout),
            bytes=sum(each.num_bytes for each in layout.values()),
            left_out={},
        )
        cast = {
            piece.ours: layout[name].dtype
            for name, pieces in foreign.items()
            for piece in pieces
            if not _holds(layout[name].dtype, weights.dtype(piece.ours))
            or (piece.ours in choice.rewriting.scales and layout[name].dtype is not torch.float32)
        }
        certificate = certify(
            Path(info.run_at_step),
            target / _GGUF_NAME if format == "gguf" else target,
            family=choice.family, account=account, change=Change(cast, choice.rewriting.scales),
            tokenizer=tokenizer if format == "gguf" else None,  # a folder has its files as they are
            on_progress=on_progress, named=output,
        )  # fmt: skip
        certificate.require(force=force)
        certificate.write(target)
    return certificate


def _holds(target: torch.dtype, source: torch.dtype) -> bool:
    """Whether a dtype represents every number of another."""
    return target is source or target is torch.float32


def _choose_folder(config: ModelConfig) -> _Choice:
    for family in FAMILIES.values():
        for rewriting in rewritings(config):
            try:
                keys = write_config_keys(family.keys, rewriting.config, harmless_keys(family))
            except Inexpressible:
                continue
            return _Choice(family.name, _with_names(family, keys), rewriting, family.tensors)
    return _Choice(OWN_NAME, {}, Rewriting(config, {}, frozenset()), OWN_TENSORS)


def _require_own_classes(run: str | Path) -> None:
    """Raises: InstallationError without transformers, which writes and reads our classes' config."""
    try:
        import moesaic.hf  # noqa: F401
    except InstallationError as error:
        raise InstallationError(
            f"{run} can only be written for the classes of moesaic.hf, since no family of transformers' own describes "
            f"its model ({str(error).partition(';')[0]}); transformers 5.0 or later is required for them; install it "
            f"with `pip install 'moesaic[huggingface]'`."
        ) from None


def _with_names(family: Family, keys: Mapping[str, Any]) -> dict[str, Any]:
    return {"architectures": [family.architecture], "model_type": family.name, **keys}


def _choose_gguf(config: ModelConfig) -> _Choice:
    reasons: dict[str, Inexpressible] = {}
    written = [family for family in GGUF_FAMILIES if family.without is None]
    for family in written:
        for rewriting in rewritings(config):
            try:
                keys = write_config_keys(family.keys, rewriting.config, frozenset())
            except Inexpressible as error:
                reasons.setdefault(family.name, error)  # of the model itself, which comes first
                continue
            return _Choice(family.name, keys, rewriting, family.tensors)
    if beyond := beyond_gguf(config):
        raise ConversionError(
            f"--format gguf was asked for a model with {' and '.join(beyond)}; no GGUF architecture known here has "
            f"that; export it to Hugging Face's layout (--format huggingface)."
        )
    alike = [family.name for family in written if family.is_moe == bool(config.moe_layers)]
    lacks = [f"  {name.removeprefix('gguf ').removesuffix(' with experts')}: {reasons[name]}" for name in alike]
    raise ConversionError(
        "--format gguf was asked for a model that no GGUF architecture known here can hold; one that holds all of it "
        "is required; export it to Hugging Face's layout (--format huggingface). What keeps it from each of them:\n"
        + "\n".join(lacks)
    )


def _write_folder(
    target: Path,
    choice: _Choice,
    foreign: Mapping[str, list[Piece]],
    weights: _Weights,
    tokenizer: Tokenizer,
    dtype: torch.dtype | None,
    on_progress: OnProgress,
) -> dict[str, TensorLayout]:
    layout = {
        name: TensorLayout(dtype or common_dtype(weights.dtype(piece.ours) for piece in pieces), foreign_shape(pieces))
        for name, pieces in foreign.items()
    }
    shards = _shards(layout)
    total, done, places = sum(each.num_bytes for each in layout.values()), 0, dict[str, str]()
    for index, names in enumerate(shards):
        file = WEIGHTS_NAME if len(shards) == 1 else f"model-{index + 1:05}-of-{len(shards):05}.safetensors"
        places |= dict.fromkeys(names, file)
        with TensorWriter(target / file, {name: layout[name] for name in names}) as writer:
            for name in writer.order:
                for piece in foreign[name]:
                    writer.append(name, cast_weight(name, weights.read_finite(piece), layout[name].dtype))
                done += layout[name].num_bytes
                on_progress("copying", done / max(total, 1))
    if len(shards) > 1:
        text = json.dumps({"metadata": {"total_size": total}, "weight_map": places}, indent=2)
        (target / INDEX_NAME).write_text(text + "\n", encoding="utf-8")
    stored = max({each.dtype for each in layout.values()}, key=lambda each: each.itemsize)
    ids = sorted(tokenizer.stop_ids)
    if choice.family == OWN_NAME:
        from moesaic.hf import MoesaicConfig

        keys = MoesaicConfig(model=choice.rewriting.config.to_dict()).to_dict()
        keys |= {"architectures": ["MoesaicForCausalLM"]}
    else:
        # Said, because some families' classes have a padding token of their own, whose embedding then never learns.
        keys = {**choice.keys, "bos_token_id": None, "pad_token_id": None, "use_cache": True}
    keys |= {"eos_token_id": ids[0] if len(ids) == 1 else ids, "torch_dtype": str(stored).removeprefix("torch.")}
    (target / CONFIG_NAME).write_text(json.dumps(keys, indent=2) + "\n", encoding="utf-8")
    tokenizer.save(target)
    return layout


def _shards(layout: Mapping[str, TensorLayout]) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    size = 0
    for name, each in layout.items():
        if shards[-1] and size + each.num_bytes > _SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += each.num_bytes
    return shards


def _write_gguf(
    target: Path,
    choice: _Choice,
    foreign: Mapping[str, list[Piece]],
    weights: _Weights,
    tokenizer: Tokenizer,
    dtype: torch.dtype | None,
    on_progress: OnProgress,
) -> dict[str, TensorLayout]:
    gguf = require_gguf()
    family = next(each for each in GGUF_FAMILIES if each.name == choice.family and each.without is None)
    layout = {}
    for name, pieces in foreign.items():
        shape = foreign_shape(pieces)
        plain = len(shape) < 2 or name.endswith((ROUTER, SHARED_GATE, BIAS))  # llama.cpp wants them so
        stored = torch.float32 if plain else dtype or common_dtype(weights.dtype(piece.ours) for piece in pieces)
        layout[name] = TensorLayout(stored, shape)
    writer = gguf.GGUFWriter(target / _GGUF_NAME, family.architecture)
    try:
        _add_metadata(writer, gguf, family, choice.keys, layout)
        for name, value in tokenizer_metadata(tokenizer, choice.rewriting.config.vocab_size).items():
            _add(writer, name, value)
        types = {
            torch.float32: gguf.GGMLQuantizationType.F32,
            torch.float16: gguf.GGMLQuantizationType.F16,
            torch.bfloat16: gguf.GGMLQuantizationType.BF16,
        }
        for name, each in layout.items():
            in_numpy = (
                torch.float32 if each.dtype is torch.bfloat16 else each.dtype
            )  # which has no bf16; raw_dtype counts
            like = torch.empty(0, dtype=in_numpy).numpy().dtype
            writer.add_tensor_info(name, each.shape, like, each.num_bytes, raw_dtype=types[each.dtype])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        total, done = sum(each.num_bytes for each in layout.values()), 0
        for name, each in layout.items():
            parts = (cast_weight(name, weights.read_finite(piece), each.dtype) for piece in foreign[name])
            tensor = torch.cat([part.flatten() for part in parts])
            writer.write_tensor_data(tensor.view(torch.uint8).numpy())
            done += each.num_bytes
            on_progress("copying", done / max(total, 1))
    finally:
        writer.close()
    return layout


def _add_metadata(
    writer: Any, gguf: Any, family: GgufFamily, keys: Mapping[str, Any], layout: Mapping[str, TensorLayout]
) -> None:
    largest = max((each for each in layout.values() if len(each.shape) > 1), key=lambda each: each.num_bytes)
    kinds = {torch.float32: "ALL_F32", torch.float16: "MOSTLY_F16", torch.bfloat16: "MOSTLY_BF16"}
    writer.add_file_type(gguf.LlamaFileType[kinds[largest.dtype]])
    for name, value in keys.items():
        if not name.startswith("("):
            _add(writer, f"{family.architecture}.{name}", value)


def _add(writer: Any, name: str, value: Any) -> None:
    add: dict[type, Any] = {
        bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string,
        list: writer.add_array,
    }  # fmt: skip
    add[type(value)](name, value)
