"""A foreign model into a run folder: config translated, every tensor used exactly once, tokenizer carried along.

Tensors are read, put in our order and written one at a time; the run appears when it is complete and has passed its
check (parity.py).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from moesaic.checkpoint.store import write_manifest
from moesaic.checkpoint.stream import TensorLayout, TensorWriter
from moesaic.config.load import write_config
from moesaic.config.model import ModelConfig
from moesaic.config.train import DataConfig, TrainConfig
from moesaic.convert.families import FAMILIES, harmless_keys
from moesaic.convert.folder import check_is_new, folder_in_progress
from moesaic.convert.gguf import GgufFile, read_gguf_config
from moesaic.convert.keys import Keys, read_config
from moesaic.convert.parity import Certificate, TensorAccount, certify
from moesaic.convert.source import HuggingFaceFolder, Source
from moesaic.convert.tensors import Piece, TensorRule, check_sources, foreign_tensors, pieces_of
from moesaic.data.tokenizer import Tokenizer
from moesaic.errors import ConversionError

# The length of a run's sequences until somebody trains it on others.
_SEQUENCE_LENGTH = 2048
_TOKENS = 100_000_000

OnProgress = Callable[[str, float], None]


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
            family, config, rules = read_gguf_config(source)
            left_out: dict[str, str] = {}
        else:
            assert isinstance(source, HuggingFaceFolder)
            family, config, rules, left_out = _read_folder(source)
        pieces = pieces_of(config, rules)
        foreign = foreign_tensors(pieces)
        left_out |= _tied_output(source, config, foreign)
        check_sources(foreign, source.layout, str(given), left_out=frozenset(left_out))
    except BaseException:
        source.__exit__()
        raise
    return OpenedModel(source, family, config, pieces, left_out)


def _read_folder(source: HuggingFaceFolder) -> tuple[str, ModelConfig, tuple[TensorRule, ...], dict[str, str]]:
    where = str(source.path / "config.json")
    name = source.config.get("model_type")
    family = FAMILIES.get(name) if isinstance(name, str) else None
    if family is None:
        raise ConversionError(
            f"{where} is of model_type {name!r}; one of {', '.join(FAMILIES)} is required; other families have no "
            f"table yet (convert/families.py)."
        )
    config = read_config(family.keys, Keys(source.config, where), harmless_keys(family))
    later = [template.split("{later}") for template in family.left_out]
    left_out = {
        tensor: family.left_out_because
        for tensor in source.layout
        for before, after in later
        if tensor.startswith(before) and _layer(tensor[len(before) :], after) >= config.num_layers
    }
    # Frequencies are computed; old checkpoints hold them beside the weights.
    left_out |= {
        tensor: "computed from the config" for tensor in source.layout if tensor.endswith(".rotary_emb.inv_freq")
    }
    return family.name, config, family.tensors, left_out


def _layer(text: str, after: str) -> int:
    number = text.partition(after)[0]
    return int(number) if number.isdecimal() else -1


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


def import_model(
    path: str | Path,
    output: str | Path,
    *,
    tokenizer: str | Path | None = None,
    force: bool = False,
    on_progress: OnProgress = lambda stage, share: None,
) -> Certificate:
    """Make a run folder of a foreign model (a Hugging Face folder or a GGUF file) and return what its check found.

    tokenizer: a tokenizer.json or a folder with one, where the model brings none. Tensors keep their dtypes, GGUF's
    quantised ones become fp32. force: keep a result whose check failed.

    Raises: ConversionError, CheckpointError, DataError; nothing is left behind then.
    """
    output = Path(output)
    check_is_new(output)
    with open_model(path) as opened:
        source, config = opened.source, opened.config
        own = source.tokenizer() if tokenizer is None else Tokenizer.load(tokenizer)
        if own.vocab_size > config.vocab_size:
            raise ConversionError(
                f"the tokenizer has {own.vocab_size} tokens and the model {config.vocab_size} embeddings; each token "
                f"needs one; give the model's own with --tokenizer."
            )
        training = TrainConfig(
            model=config,
            data=DataConfig(path="", sequence_length=min(_SEQUENCE_LENGTH, max(2, config.max_positions))),
            tokens=_TOKENS,
        )
        with folder_in_progress(output) as folder:
            checkpoint = folder / "checkpoints" / "step-00000000"
            checkpoint.mkdir(parents=True)
            layout = _layout(opened)
            with TensorWriter(checkpoint / "model.safetensors", layout) as writer:
                _copy(opened, layout, writer, on_progress)
            on_progress("writing to disk", 0.0)
            origin = {"path": str(source.path), "family": opened.family}
            write_manifest(checkpoint, 0, {"tokens": 0, "model": config.to_dict(), "imported": origin})
            write_config(training, folder / "config.yaml")
            own.save(folder)
            account = TensorAccount(
                source=len(source.layout),
                used=len(source.layout) - len(opened.left_out),
                result=len(layout),
                left_out=dict(opened.left_out),
                bytes=sum(each.num_bytes for each in layout.values()),
            )
            certificate = certify(
                source.path, folder, account=account, family=opened.family, is_lossless=True, on_progress=on_progress,
                named=output,
            )  # fmt: skip
            certificate.require(force=force)
            certificate.write(folder)
    return certificate


def _layout(opened: OpenedModel) -> dict[str, TensorLayout]:
    from moesaic.convert.tensors import own_tensors

    shapes = own_tensors(opened.config)
    layout = {}
    for name, pieces in opened.pieces.items():
        dtypes = {opened.source.layout[piece.theirs].dtype for piece in pieces}
        # Experts of several dtypes: what holds them all.
        dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
        layout[name] = TensorLayout(dtype, shapes[name])
    return layout


def _copy(
    opened: OpenedModel, layout: Mapping[str, TensorLayout], writer: TensorWriter, on_progress: OnProgress
) -> None:
    total, done = sum(each.num_bytes for each in layout.values()), 0
    for name in writer.order:
        for piece in opened.pieces[name]:
            tensor = opened.source.read(piece.theirs, piece.index)
            writer.append(name, piece.to_ours(tensor).to(layout[name].dtype))
            done += tensor.nbytes
            on_progress("copying", min(done / max(total, 1), 1.0))
