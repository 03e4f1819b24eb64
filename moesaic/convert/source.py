"""What models are read from: a folder in Hugging Face's layout, and the protocol that a GGUF file follows too.

A source says which tensors there are and reads them one at a time; nothing is unpickled, and nothing outside the folder
is opened because an index says so.
"""

import json
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from moesaic.checkpoint.stream import DTYPES, TensorLayout, TensorReader, without_doubles
from moesaic.convert.bitsandbytes import read_bitsandbytes
from moesaic.convert.compressed import read_compressed
from moesaic.convert.fp8 import Fp8Packing, read_fp8
from moesaic.convert.integers import read_auto_round, read_awq, read_gptq
from moesaic.convert.modelopt import of_its_own_file, read_modelopt
from moesaic.convert.mxfp4 import read_mxfp4
from moesaic.convert.packing import PackedTensors, Packing
from moesaic.data.tokenizer import COMPANION_NAMES, GENERATION_NAME, TOKENIZER_NAME, Tokenizer
from moesaic.errors import ConversionError, DataError

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
ADAPTER_NAME = "adapter_config.json"
# What a tampered file could make us hold: no real config or index comes near.
_MAX_JSON_BYTES = 64 << 20
# Where a config says how its matrices are quantised: compressed-tensors once had a key of its own.
QUANTIZATION_KEYS = ("quantization_config", "compression_config")
# Older models of ModelOpt's have it in a file of its own; newer ones say it twice.
_MODELOPT_NAME = "hf_quant_config.json"
# Parts of quantised matrices, which no model has under such names.
_PARTS = (".qweight", ".weight_packed", ".weight_scale", ".weight_scale_inv", ".quant_map", ".SCB")
# What it calls the ways.
_PACKINGS: Mapping[str, Callable[[Mapping[str, Any], str], tuple[Packing, ...]]] = {
    "mxfp4": read_mxfp4,
    "fp8": read_fp8,
    "gptq": read_gptq,
    "awq": read_awq,
    "auto-round": read_auto_round,
    "compressed-tensors": read_compressed,
    "bitsandbytes": read_bitsandbytes,
    **dict.fromkeys(("modelopt", "modelopt_fp4", "modelopt_mixed", "modelopt_mxfp8"), read_modelopt),
}


class Source(Protocol):
    """A foreign model. layout: its tensors as `read` returns them. A context manager."""

    path: Path
    layout: Mapping[str, TensorLayout]

    def read(self, name: str, index: int | None = None) -> Tensor:
        """Return a tensor, or the index-th of its first dimension."""
        ...

    def tokenizer(self) -> Tokenizer:
        """Return the tokenizer that the model comes with. Raises: DataError."""
        ...

    def __enter__(self) -> "Source": ...

    def __exit__(self, *_: object) -> None: ...


class HuggingFaceFolder:
    """config.json, safetensors shards with their index, and tokenizer files. Quantised matrices come as bf16.

    Raises: ConversionError or CheckpointError for what is missing, broken, double, or leads out of the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._check_links((CONFIG_NAME, _MODELOPT_NAME, INDEX_NAME, WEIGHTS_NAME, TOKENIZER_NAME, *COMPANION_NAMES))
        if (path / ADAPTER_NAME).exists():
            is_alone = not (path / CONFIG_NAME).exists()
            found = "an adapter without its model" if is_alone else "an adapter beside a model"
            otherwise = "" if is_alone else ", or remove it"
            raise ConversionError(
                f"{path} holds {ADAPTER_NAME}: {found}; a model alone is required; merge the adapter into its model "
                f"with PEFT (merge_and_unload) and save the result{otherwise}."
            )
        self.config = read_json(path / CONFIG_NAME)
        self._kinds = _read_packings(quantization_of(path, self.config), str(path))
        for key in QUANTIZATION_KEYS:
            self.config.pop(key, None)
        self._stack = ExitStack()
        try:
            self._readers = self._open()
            stored = {name: reader.layout[name] for name, reader in self._readers.items()}
            if not self._kinds:
                _check_unquantized(stored, path)
            self._packed = PackedTensors(self._kinds, stored, self._read_stored, str(path)) if self._kinds else None
            self.layout: Mapping[str, TensorLayout] = stored if self._packed is None else self._packed.layout
            self._stored = stored
        except BaseException:
            self._stack.close()
            raise

    def read(self, name: str, index: int | None = None) -> Tensor:
        return self._read_stored(name, index) if self._packed is None else self._packed.read(name, index)

    @property
    def is_quantized(self) -> bool:
        """Whether its config says that some of its matrices are."""
        return self._packed is not None

    def is_packed(self, name: str) -> bool:
        """Whether a tensor is stored in another form than `read` returns."""
        return self._packed is not None and name in self._packed

    @property
    def has_partial_blocks(self) -> bool:
        """Whether it has matrices in FP8 that their blocks do not divide."""
        return any(isinstance(kind, Fp8Packing) and not kind.divides(self._stored) for kind in self._kinds)

    def _read_stored(self, name: str, index: int | None = None, /) -> Tensor:
        return self._readers[name].read(name, index)

    def tokenizer(self) -> Tokenizer:
        if not (self.path / TOKENIZER_NAME).is_file():
            has_other = (self.path / "tokenizer.model").is_file()  # SentencePiece's
            how = "make it of tokenizer.model with transformers (AutoTokenizer)" if has_other else "fetch it too"
            raise DataError(
                f"{self.path} holds no {TOKENIZER_NAME}; the tokenizer that the model was trained with is required; "
                f"{how}, or name it, or a folder that holds it, with --tokenizer."
            )
        tokenizer = Tokenizer.load(self.path)
        ends = self.config.get("eos_token_id")
        is_given = all(type(each) is int for each in (ends if isinstance(ends, list) else [ends]))
        if not is_given or GENERATION_NAME in tokenizer.companions:
            return tokenizer
        # Where there is no such file, transformers stops at the ends that the model's config names.
        others = {key: self.config.get(key) for key in ("bos_token_id", "pad_token_id")}
        ids = {"eos_token_id": ends, **{key: each for key, each in others.items() if type(each) is int}}
        made = {GENERATION_NAME: json.dumps(ids) + "\n"}
        return Tokenizer(tokenizer.json_text, companions={**tokenizer.companions, **made})

    def _check_links(self, names: Iterable[str]) -> None:
        """Raise ConversionError for a link that leads out of the folder: what it names would be read, and copied.

        The hub's cache is made of links to files beside the folder, which belong to the model.
        """
        folder = _target(self.path)
        allowed = [folder]
        if folder.parent.name == "snapshots":
            allowed.append(folder.parent.parent / "blobs")
        for name in names:
            file = self.path / name
            if file.is_symlink() and not any(_target(file).is_relative_to(each) for each in allowed):
                raise ConversionError(
                    f"{file} is a link to {_target(file)}, outside the folder; the model's own files are required; "
                    f"put the file itself there, if it belongs to the model."
                )

    def _open(self) -> dict[str, TensorReader]:
        places = self._shards()
        dtypes = dict(DTYPES)
        for kind in self._kinds:
            dtypes |= kind.dtypes
        readers: dict[str, TensorReader] = {}
        for shard, expected in places.items():
            reader = TensorReader(self.path / shard, is_read_once=True, dtypes=dtypes)
            self._stack.enter_context(reader)
            double = sorted(reader.layout.keys() & readers.keys())
            if double:
                raise ConversionError(
                    f"{self.path}: {double[0]} is in {readers[double[0]].path.name} and again in {shard}; a tensor "
                    f"that stands twice could be either; keep one of them."
                )
            missing = sorted((expected or set()) - reader.layout.keys())
            if missing:
                raise ConversionError(
                    f"{self.path / shard} does not hold {missing[0]}, which {INDEX_NAME} says it does; a complete "
                    f"checkpoint is required; fetch the shard and the index again."
                )
            readers |= dict.fromkeys(reader.layout, reader)
        return readers

    def _shards(self) -> dict[str, set[str] | None]:
        """Return the files to read, with the tensors that the index says are in each."""
        index = self.path / INDEX_NAME
        if not index.exists():
            if (self.path / WEIGHTS_NAME).is_file():
                return {WEIGHTS_NAME: None}
            others = sorted(
                each.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for each in self.path.glob(pattern)
            )
            found = f"it holds {others[0]}, which is a pickle and could run code" if others else "it holds none"
            raise ConversionError(
                f"{self.path} has neither {WEIGHTS_NAME} nor {INDEX_NAME}: {found}; safetensors weights are required; "
                f"load the model with transformers and save it with save_pretrained."
            )
        names = read_json(index).get("weight_map")
        if not isinstance(names, dict) or not names or not all(isinstance(each, str) for each in names.values()):
            raise ConversionError(
                f"{index} has no weight_map of tensors to files; an index as save_pretrained writes it is required; "
                f"fetch it again."
            )
        places: dict[str, set[str] | None] = {}
        for tensor, shard in names.items():
            if Path(shard).name != shard or not shard.endswith(".safetensors"):
                raise ConversionError(
                    f"{index} says that {tensor} is in {shard!r}; the name of a .safetensors file in the same folder "
                    f"is required; nothing else is opened; mend the index."
                )
            held = places.setdefault(shard, set())
            assert held is not None
            held.add(tensor)
        if (self.path / WEIGHTS_NAME).exists() and WEIGHTS_NAME not in places:
            raise ConversionError(
                f"{self.path} holds {WEIGHTS_NAME}, and {INDEX_NAME} names other files; either could be the model; "
                f"remove what is not."
            )
        self._check_links(places)
        for shard in places:
            if not (self.path / shard).is_file():
                raise ConversionError(
                    f"{self.path} has no {shard}, which holds {len(places[shard] or ())} tensors; all shards of the "
                    f"index are required; fetch it."
                )
        return places

    def __enter__(self) -> "HuggingFaceFolder":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()


def quantization_of(folder: Path, config: Mapping[str, Any]) -> Any:
    """Return what a folder, whose config is given, says of how its matrices are quantised; None where nothing is."""
    said = next(filter(None, map(config.get, QUANTIZATION_KEYS)), None)
    own = folder / _MODELOPT_NAME
    return said if said or not own.exists() else of_its_own_file(read_json(own), str(own))


def _read_packings(given: object, where: str) -> tuple[Packing, ...]:
    """Return the ways in which a config says that matrices are packed. Raises: ConversionError for others."""
    if not given:
        return ()
    name = given.get("quant_method") if isinstance(given, dict) else given
    if not isinstance(given, dict) or not isinstance(name, str) or name not in _PACKINGS:
        raise ConversionError(
            f"{where} is quantised ({name}); weights in bf16, fp16, fp32, FP8, MXFP4, or as GPTQ, AWQ, AutoRound, "
            f"compressed-tensors and ModelOpt write them, are required; take the model as it was before, or dequantise "
            f"it with the tool that made it."
        )
    return _PACKINGS[name](given, where)


def _check_unquantized(names: Iterable[str], path: Path) -> None:
    part = next((name for name in names if name.endswith(_PARTS)), None)
    if part is not None:
        raise ConversionError(
            f"{path} holds {part}, a part of a quantised matrix, and its {CONFIG_NAME} does not say how it is "
            f"quantised; a quantization_config there is required; fetch {CONFIG_NAME} again, or write there what the "
            f"tool's own file says (quantize_config.json, with the tool's name as quant_method)."
        )


def read_json(path: Path) -> dict[str, Any]:
    """Return the object of a JSON file. Raises: ConversionError when it is missing or is none."""
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise ValueError(f"{path.stat().st_size} bytes")
        if not path.is_file():  # to open a pipe would be to wait for ever
            raise OSError("no ordinary file")
        values = json.loads(
            path.read_bytes().decode("utf-8"), parse_constant=_refuse_constant, object_pairs_hook=without_doubles
        )
    except FileNotFoundError:
        raise ConversionError(
            f"{path.parent} has no {path.name}; a folder in Hugging Face's layout (config.json, safetensors, "
            f"tokenizer.json), or a .gguf file, is required; check the path."
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise ConversionError(
            f"{path} cannot be read as JSON ({error}); an object of keys and values is required; fetch it again, or "
            f"mend it."
        ) from None
    if not isinstance(values, dict):
        raise ConversionError(f"{path} holds no JSON object; keys with values are required; fetch it again.")
    return values


def _refuse_constant(name: str) -> float:
    raise ValueError(f"it holds {name}, which is no number")


def _target(path: Path) -> Path:
    """Return what links lead to. One that leads to itself is found out when it is read; resolve raises RuntimeError."""
    return Path(os.path.realpath(path))


def is_source(path: Path) -> bool:
    """Whether a path looks like a foreign model, and not like a run of ours."""
    return (path.is_file() and path.suffix == ".gguf") or (path / CONFIG_NAME).is_file()


def is_foreign_run(path: Path) -> bool:
    """Whether a path is a folder that holds a model of ours for transformers (moesaic.hf)."""
    config = path / CONFIG_NAME
    return config.is_file() and read_json(config).get("model_type") == "moesaic"
