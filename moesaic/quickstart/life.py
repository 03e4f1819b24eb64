"""The life of a model on the embedded corpus: prepare, train a small PR-MoE, generate from it.

Each stage is the same call that its verb makes, so what quickstart shows is what a user gets with a corpus of his own.
"""

import json
import resource
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from moesaic.checkpoint.store import resolve_checkpoint
from moesaic.config.load import load_train_config
from moesaic.config.train import TrainConfig
from moesaic.data.corpus import embedded_corpus
from moesaic.data.prepare import prepare
from moesaic.errors import ConfigError
from moesaic.logs import logger
from moesaic.model.generate import generate
from moesaic.model.load import load_run, load_run_config
from moesaic.plan.cost import count_parameters
from moesaic.train.loop import Display, train

PRESET = "pr-moe-tiny-8-16"
PROMPTS = ("The state of the Union is", "My fellow citizens,", "The Congress should")
# What --short changes: the same stages on a few steps, for tests and for a first look at a slow machine.
_SHORT = (
    "tokens=60e3",
    "schedule.warmup_tokens=10e3",
    "schedule.decay_tokens=null",
    "evaluation.sequences=16",
    "evaluation.every_tokens=30e3",
    "checkpoint.every_tokens=30e3",
    "log_every_steps=5",
)


@dataclass(frozen=True)
class QuickstartResult:
    """Where everything is, and how it went. samples: (prompt, continuation) pairs; train_seconds: of this call."""

    run_folder: Path
    data_folder: Path
    validation_loss: float
    samples: tuple[tuple[str, str], ...]
    train_seconds: float
    peak_memory_bytes: int


def quickstart(
    output: str | Path = "runs/quickstart",
    *,
    short: bool = False,
    device: str = "auto",
    say: Callable[[str], None] = logger.info,
    show: Callable[[TrainConfig], AbstractContextManager[Display | None]] | None = None,
) -> QuickstartResult:
    """Run the whole life cycle into `output`; the token shards lie beside it, in `<output>-data`.

    say takes a line at each stage; show makes the display that training runs under.

    Raises: ConfigError where output holds another run; KeyboardInterrupt when a signal stopped it, after saving.
    """
    run_folder = Path(output)
    data_folder = run_folder.with_name(f"{run_folder.name}-data")
    config = quickstart_config(data_folder, short=short)
    count = count_parameters(config.model)
    say(f"1/3 Preparing the embedded corpus into {data_folder} (byte-level BPE, {config.model.vocab_size} tokens)")
    manifest = prepare([embedded_corpus()], data_folder, vocab_size=config.model.vocab_size)
    say(
        f"    {manifest.train.num_documents} documents, {manifest.train.num_tokens:,} training tokens, "
        f"{manifest.validation.num_tokens:,} for validation"
    )
    say(
        f"2/3 Training {PRESET}: {config.model.num_layers} layers, {count.total / 1e6:.1f} M parameters, "
        f"{count.active / 1e6:.1f} M active per token, {config.tokens:,} tokens"
    )
    seconds = _train(run_folder, config, device=device, show=show)
    loss = resolve_checkpoint(run_folder).validation_loss
    assert loss is not None, run_folder
    peak = peak_memory_bytes()
    say(
        f"    {seconds / 60:.1f} minutes, validation loss {loss:.3f} nats per token, peak memory {peak / 2**30:.2f} GiB"
    )
    say("3/3 Generating")
    return QuickstartResult(run_folder, data_folder, loss, _generate(run_folder, device=device), seconds, peak)


def quickstart_config(data_folder: Path, *, short: bool = False) -> TrainConfig:
    """Return the training config that quickstart uses."""
    return load_train_config(PRESET, [f"data.path={json.dumps(str(data_folder))}", *(_SHORT if short else ())])


def _train(
    run_folder: Path,
    config: TrainConfig,
    *,
    device: str,
    show: Callable[[TrainConfig], AbstractContextManager[Display | None]] | None,
) -> float:
    """Train, or go on with an interrupted quickstart; return the seconds it took now."""
    started = time.perf_counter()
    is_begun = (run_folder / "config.yaml").exists()
    if is_begun:
        if load_run_config(run_folder).replace(data=config.data) != config:
            raise ConfigError(
                f"{run_folder} holds another run, perhaps one with or without --short; a quickstart goes on only with "
                f"its own settings; name another folder with --output, or remove that one."
            )
        logger.info("%s holds this run already; going on with it.", run_folder)
    with nullcontext() if show is None else show(config) as display:
        result = train(config, run_folder, device=device, resume=is_begun, display=display)
    if result.stopped_by is not None:
        raise KeyboardInterrupt
    return time.perf_counter() - started


def _generate(run_folder: Path, *, device: str, max_new_tokens: int = 60) -> tuple[tuple[str, str], ...]:
    """Continue each of PROMPTS with the trained model."""
    loaded = load_run(run_folder, device=device)
    samples = []
    for number, prompt in enumerate(PROMPTS):
        ids = generate(
            loaded.model,
            loaded.tokenizer.encode(prompt),
            max_new_tokens=max_new_tokens,
            temperature=0.7,
            top_p=0.9,
            seed=number,
            stop_ids=(loaded.tokenizer.end_of_text_id,),
        )
        samples.append((prompt, loaded.tokenizer.decode(ids)))
    return tuple(samples)


def peak_memory_bytes() -> int:
    """Return the largest resident memory this process has had (Linux counts KiB, macOS bytes)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
