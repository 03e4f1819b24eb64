"""A foreign model into a run folder: config translated, every tensor used exactly once, tokenizer carried along.

Tensors are read, put in our order and written one at a time; the run appears when it is complete and has passed its
check (parity.py).
"""

from collections.abc import Mapping
from pathlib import Path

from moesaic.checkpoint.stream import TensorLayout, TensorWriter
from moesaic.config.train import DataConfig, ScheduleConfig, TrainConfig
from moesaic.convert.folder import check_is_new, check_is_outside, finish_run, folder_in_progress, new_weights
from moesaic.convert.opened import OpenedModel, open_model
from moesaic.convert.parity import Certificate, TensorAccount, certify
from moesaic.convert.tensors import common_dtype, is_finite_weight, own_tensors
from moesaic.data.tokenizer import Tokenizer
from moesaic.errors import ConversionError
from moesaic.kernels.allocator import tune_allocator
from moesaic.logs import OnProgress, no_progress

# How an imported model is trained on unless --set says otherwise: what fits beside it in most memories, and a rate that
# a trained model bears.
_SEQUENCE_LENGTH = 1024
_BATCH_SIZE, _MICRO_BATCH_SIZE = 32, 2
_LEARNING_RATE = 1e-4
_TOKENS = 100_000_000


def import_model(
    path: str | Path,
    output: str | Path,
    *,
    tokenizer: str | Path | None = None,
    force: bool = False,
    on_progress: OnProgress = no_progress,
) -> Certificate:
    """Make a run folder of a foreign model (a Hugging Face folder or a GGUF file) and return what its check found.

    tokenizer: a tokenizer.json or a folder with one, where the model brings none. Tensors keep their dtypes, GGUF's
    quantised ones become fp32. force: keep a result whose check failed.

    Raises: ConversionError, CheckpointError, DataError; nothing is left behind then.
    """
    tune_allocator()  # a tensor's memory is the next one's, without the page faults of fresh memory
    output = Path(output)
    check_is_new(output)
    check_is_outside(output, Path(path))
    with open_model(path) as opened:
        source, config = opened.source, opened.config
        own = source.tokenizer() if tokenizer is None else Tokenizer.load(tokenizer)
        if own.vocab_size > config.vocab_size:
            raise ConversionError(
                f"the tokenizer has {own.vocab_size} tokens and the model {config.vocab_size} embeddings; each token "
                f"needs one; give the model's own with --tokenizer."
            )
        if config.max_positions < 2:
            raise ConversionError(
                f"the model at {source.path} takes texts of {config.max_positions} token; at least 2 are required, one "
                f"to follow another; give a model for longer texts."
            )
        training = TrainConfig(
            model=config,
            data=DataConfig(path="", sequence_length=min(_SEQUENCE_LENGTH, max(2, config.max_positions))),
            tokens=_TOKENS,
            batch_size=_BATCH_SIZE,
            micro_batch_size=_MICRO_BATCH_SIZE,
            schedule=ScheduleConfig(learning_rate=_LEARNING_RATE),
        )
        with folder_in_progress(output) as folder:
            layout = _layout(opened)
            weights = new_weights(folder, 0)
            with TensorWriter(weights, layout, is_hashed=True) as writer:
                _copy(opened, layout, writer, on_progress)
            on_progress("writing to disk", 0.0)
            origin = {"path": str(source.path), "family": opened.family}
            metadata = {"tokens": 0, "model": config.to_dict(), "imported": origin}
            hashes = {weights.name: writer.sha256}
            finish_run(weights, 0, config=training, tokenizer=own, metadata=metadata, sha256=hashes)
            account = TensorAccount(
                source=len(source.layout),
                used=len(source.layout) - len(opened.left_out),
                result=len(layout),
                left_out=dict(opened.left_out),
                bytes=sum(each.num_bytes for each in layout.values()),
            )
            certificate = certify(
                source.path, folder, account=account, family=opened.family, on_progress=on_progress, named=output
            )  # fmt: skip
            certificate.require(force=force)
            certificate.write(folder)
    return certificate


def _layout(opened: OpenedModel) -> dict[str, TensorLayout]:
    shapes = own_tensors(opened.config)
    layout = {}
    for name, pieces in opened.pieces.items():
        dtype = common_dtype(opened.source.layout[piece.theirs].dtype for piece in pieces)
        layout[name] = TensorLayout(dtype, shapes[name])
    return layout


def _copy(
    opened: OpenedModel, layout: Mapping[str, TensorLayout], writer: TensorWriter, on_progress: OnProgress
) -> None:
    total, done = sum(each.num_bytes for each in layout.values()), 0
    for name in writer.order:
        for piece in opened.pieces[name]:
            tensor = opened.source.read(piece.theirs, piece.index)
            if not is_finite_weight(tensor):
                raise ConversionError(
                    f"{piece.theirs} holds numbers that are not finite; finite weights are required; fetch the file "
                    f"again, or mend it."
                )
            writer.append(name, piece.to_ours(tensor).to(layout[name].dtype))
            done += tensor.nbytes
            on_progress("copying", min(done / max(total, 1), 1.0))
