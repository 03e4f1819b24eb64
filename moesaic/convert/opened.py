"""A foreign model opened: its config in our words, and what each of our tensors is made of. Nothing is written here."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

from moesaic.config.model import ModelConfig
from moesaic.convert.families import FAMILIES, OWN_NAME, OWN_TENSORS, harmless_keys
from moesaic.convert.gguf import GgufFile, read_gguf_config
from moesaic.convert.gguf_families import GGUF_FAMILIES
from moesaic.convert.keys import Keys, in_a_file, read_config
from moesaic.convert.source import HuggingFaceFolder, Source
from moesaic.convert.tensors import Piece, TensorRule, check_sources, foreign_tensors, pieces_of
from moesaic.errors import ConfigError, ConversionError
from moesaic.plan.cost import count_parameters

# Parameters that cost nothing to think about.
_SMALL = 1_000_000
# What a quantised module may have beside its matrix, and attention for its keys and values.
_OF_ACTIVATIONS = ("input_scale", "input_zero_point", "input_global_scale", "output_scale", "output_zero_point")
_OF_CACHE = ("k_scale", "v_scale", "k_zero_point", "v_zero_point")


@dataclass(frozen=True)
class OpenedModel:
    """A foreign model, its config in our words, and what each of our tensors is made of.

    left_out: tensors that the model does not use, with the reason.
    """

    source: Source
    family: str
    config: ModelConfig
    pieces: dict[str, list[Piece]]
    left_out: Mapping[str, str]

    def __enter__(self) -> "OpenedModel":
        return self

    def __exit__(self, *_: object) -> None:
        self.source.__exit__()


def open_model(path: str | Path) -> OpenedModel:
    """Open a folder in Hugging Face's layout or a GGUF file, and check that every tensor has its place.

    Raises: ConversionError, CheckpointError; nothing is written.
    """
    given = Path(path)
    if given.is_file() and given.suffix != ".gguf":
        raise ConversionError(
            f"{given} is a file; a folder in Hugging Face's layout (config.json, safetensors, tokenizer.json) or a "
            f".gguf file is required; give the folder."
        )
    source: Source = GgufFile(given) if given.is_file() else HuggingFaceFolder(given)
    try:
        if isinstance(source, GgufFile):
            family, config, rules, left_out = read_gguf_config(source)
        else:
            assert isinstance(source, HuggingFaceFolder)
            family, config, rules, left_out = _read_folder(source)
        _check_size(config, source)
        pieces = pieces_of(config, rules)
        foreign = foreign_tensors(pieces)
        left_out |= _tied_output(source, config, foreign) | _of_quantizers(source, foreign)
        check_sources(foreign, source.layout, str(given), left_out=frozenset(left_out))
    except BaseException:
        source.__exit__()
        raise
    return OpenedModel(source, family, config, pieces, left_out)


def _read_folder(source: HuggingFaceFolder) -> tuple[str, ModelConfig, tuple[TensorRule, ...], dict[str, str]]:
    where = str(source.path / "config.json")
    name = source.config.get("model_type")
    if name == OWN_NAME:
        try:
            return OWN_NAME, ModelConfig.from_dict(source.config.get("model"), path="model"), OWN_TENSORS, {}
        except ConfigError as error:
            raise ConversionError(f"{where} describes no model that can be: {in_a_file(error)}") from None
    family = FAMILIES.get(name) if isinstance(name, str) else None
    if family is None:
        architectures = ", ".join(dict.fromkeys(each.architecture for each in GGUF_FAMILIES))
        raise ConversionError(
            f"{where} is of model_type {name!r}; one of {', '.join([*FAMILIES, OWN_NAME])} is required, whose keys and "
            f"tensors are known; take a model of one of these, or a GGUF file of this one where its architecture is "
            f"one of {architectures}, or add the family's table to moesaic/convert/families.py."
        )
    config = read_config(family.keys, Keys(source.config, where), harmless_keys(family))
    templates = [template.partition("{later}") for template in family.left_out]
    left_out = {
        tensor: family.left_out_because
        for tensor in source.layout
        for before, later, after in templates
        if tensor.startswith(before) and (not later or _layer(tensor[len(before) :], after) >= config.num_layers)
    }
    # Frequencies are computed; old checkpoints hold them beside the weights.
    left_out |= {
        tensor: "computed from the config" for tensor in source.layout if tensor.endswith(".rotary_emb.inv_freq")
    }
    return family.name, config, family.tensors, left_out


def _check_size(config: ModelConfig, source: Source) -> None:
    """Raise ConversionError for a model that is larger than its tensors, before anything of its size is made."""
    numbers = sum(prod(each.shape) for each in source.layout.values())
    due = count_parameters(config).total
    # Where little is missing, what it is will be named.
    if due > 4 * numbers + _SMALL or config.num_layers > len(source.layout):
        raise ConversionError(
            f"{source.path} describes a model of {due} parameters in {config.num_layers} layers and holds {numbers} "
            f"numbers in {len(source.layout)} tensors; the tensors of the whole model are required; complete the "
            f"files, or mend the config."
        )


def _layer(text: str, after: str) -> int:
    number = text.partition(after)[0]
    return int(number) if number.isdecimal() else -1


def _of_quantizers(source: Source, foreign: Mapping[str, list[Piece]]) -> dict[str, str]:
    """What tools leave beside the matrices that they quantise and changes no number of them.

    Scales of activations, keys and values say how these would be quantised, which no run does; some tools give each
    matrix a bias, fine where all of it is zero.
    """
    if not isinstance(source, HuggingFaceFolder) or not source.is_quantized:
        return {}
    left_out: dict[str, str] = {}
    for name in source.layout:
        if name in foreign:
            continue
        module, _, kind = name.rpartition(".")
        is_packed = f"{module}.weight" in source.layout and source.is_packed(f"{module}.weight")
        if (is_packed and kind in _OF_ACTIVATIONS) or (kind in _OF_CACHE and ".self_attn" in module):
            left_out[name] = "of quantised activations, and these are read as bf16"
        elif is_packed and kind == "bias" and not source.read(name).any():
            left_out[name] = "zeros that came with the quantised matrix"
    return left_out


def _tied_output(source: Source, config: ModelConfig, foreign: Mapping[str, list[Piece]]) -> dict[str, str]:
    """Some tools save the output matrix of a tied model too: fine where it is the embedding, else an error."""
    embedding = next(name for name, pieces in foreign.items() if pieces[0].ours == "embedding")
    doubles = [name for name in ("lm_head.weight", "output.weight") if name in source.layout and name not in foreign]
    if not config.tie_embeddings or not doubles or embedding not in source.layout:
        return {}
    output = doubles[0]
    first, other = source.layout[embedding], source.layout[output]
    if first != other or not torch.equal(source.read(embedding), source.read(output)):
        raise ConversionError(
            f"{source.path}: {output} is not equal to {embedding}, and the config ties them; one matrix, or "
            f"tie_word_embeddings = false, is required; mend the config."
        )
    return {output: f"equal to {embedding}, to which it is tied"}
