"""A model's life on the embedded corpus: prepare, train a PR-MoE, distil a student, evaluate and generate from both.

Each stage is the same call that its verb makes, so what quickstart shows is what a user gets with a corpus of his own.
The page that it ends with is report.py's business.
"""

import resource
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from moesaic.checkpoint.store import resolve_checkpoint
from moesaic.config.load import load_train_config, text_assignment
from moesaic.config.train import TrainConfig
from moesaic.data.corpus import embedded_corpus
from moesaic.data.prepare import prepare
from moesaic.distill.run import distill, student_config
from moesaic.errors import ConfigError
from moesaic.evaluate.perplexity import Perplexity, measure_perplexity, text_windows
from moesaic.logs import logger
from moesaic.model.generate import generate
from moesaic.model.load import load_run, load_run_config
from moesaic.plan.cost import count_parameters
from moesaic.quickstart.report import Stage, write_report
from moesaic.train.loop import Display, train

PRESET = "pr-moe-tiny-8-16"
PROMPTS = ("The state of the Union is", "My fellow citizens,", "The Congress should")
# What --short changes: the same stages on a few steps, for tests and for a first look at a slow machine.
_SHORT = (
    "tokens=10e3",
    "batch_size=4",
    "schedule.warmup_tokens=3e3",
    "schedule.decay_tokens=null",
    "evaluation.sequences=16",
    "evaluation.every_tokens=5e3",
    "checkpoint.every_tokens=5e3",
    "log_every_steps=5",
)
_EVALUATED_TOKENS, _EVALUATED_TOKENS_SHORT = 60_000, 4_000

Show = Callable[[TrainConfig], AbstractContextManager[Display | None]]


@dataclass(frozen=True)
class QuickstartResult:
    """Where everything is, and how it went. peak_memory_bytes: of this process."""

    data_folder: Path
    report: Path
    teacher: Stage
    student: Stage
    peak_memory_bytes: int


def quickstart(
    output: str | Path = "runs/quickstart",
    *,
    short: bool = False,
    device: str = "auto",
    say: Callable[[str], None] = logger.info,
    show: Show | None = None,
) -> QuickstartResult:
    """Run the whole life cycle into `output`; beside it lie the student, `<output>-student`, and `<output>-data`.

    say takes a line at each stage; show makes the display that training runs under.

    Raises: ConfigError where output holds another run; KeyboardInterrupt when a signal stopped it, after saving.
    """
    teacher = Path(output)
    if teacher.name in ("", ".."):
        teacher = teacher.resolve()
    if not teacher.name:
        raise ConfigError(
            f"{output} has no name, and the student and the data lie beside it under its name with more; a folder "
            f"below it is required; name one with --output."
        )
    student = teacher.with_name(f"{teacher.name}-student")
    data_folder = teacher.with_name(f"{teacher.name}-data")
    config = quickstart_config(data_folder, short=short)
    say(f"1/5 Preparing the embedded corpus into {data_folder} (byte-level BPE, {config.model.vocab_size} tokens)")
    manifest = prepare([embedded_corpus()], data_folder, vocab_size=config.model.vocab_size)
    say(
        f"    {manifest.train.num_documents} documents, {manifest.train.num_tokens:,} training tokens, "
        f"{manifest.validation.num_tokens:,} for validation"
    )
    say(f"2/5 Training {PRESET}: {_describe(config)}")
    _train(teacher, config, say=say, device=device, show=show)
    config = student_config(teacher)
    say(f"3/5 Distilling a student of it: {_describe(config)}")
    _train(student, config, say=say, device=device, show=show)
    say("4/5 Evaluating both on the text held out")
    limit = _EVALUATED_TOKENS_SHORT if short else _EVALUATED_TOKENS
    found = [_evaluate(folder, data_folder, limit_tokens=limit, device=device) for folder in (teacher, student)]
    for name, perplexity in zip(("teacher", "student"), found, strict=True):
        say(f"    {name}: perplexity {perplexity.perplexity:.1f}, {perplexity.bits_per_byte:.3f} bits per byte")
    say("5/5 Generating from both")
    stages = [
        Stage.of_run(folder, perplexity=perplexity, samples=_generate(folder, device=device))
        for folder, perplexity in zip((teacher, student), found, strict=True)
    ]
    report = write_report(teacher / "report.html", stages[0], stages[1], data_folder=data_folder)
    return QuickstartResult(data_folder, report, stages[0], stages[1], peak_memory_bytes())


def quickstart_config(data_folder: Path, *, short: bool = False) -> TrainConfig:
    """Return the config that quickstart trains the teacher with."""
    return load_train_config(PRESET, [text_assignment("data.path", data_folder), *(_SHORT if short else ())])


def _describe(config: TrainConfig) -> str:
    count = count_parameters(config.model)
    return (
        f"{config.model.num_layers} layers, {count.total / 1e6:.1f} M parameters, {count.active / 1e6:.1f} M active "
        f"per token, {config.tokens:,} tokens"
    )


def _train(
    run_folder: Path, config: TrainConfig, *, say: Callable[[str], None], device: str, show: Show | None
) -> None:
    """Train, or go on with an interrupted quickstart."""
    started = time.perf_counter()
    is_begun = (run_folder / "config.yaml").exists()
    if is_begun:
        before = load_run_config(run_folder)
        try:
            is_ours = before.replace(data=config.data, distill=config.distill) == config
        except ConfigError:  # with our data it would be no run at all
            is_ours = False
        if not is_ours:
            raise ConfigError(
                f"{run_folder} holds another run, perhaps one with or without --short; a quickstart goes on only with "
                f"its own settings; name another folder with --output, or remove that one."
            )
        logger.info("%s holds this run already; going on with it.", run_folder)
    run = train if config.distill is None else distill
    with nullcontext() if show is None else show(config) as display:
        result = run(config, run_folder, device=device, resume=is_begun, display=display)
    if result.stopped_by is not None:
        raise KeyboardInterrupt
    loss = resolve_checkpoint(run_folder).validation_loss
    assert loss is not None, run_folder
    say(
        f"    {(time.perf_counter() - started) / 60:.1f} minutes, validation loss {loss:.3f} nats per token, peak "
        f"memory {peak_memory_bytes() / 2**30:.2f} GiB"
    )


def _evaluate(run_folder: Path, text: Path, *, limit_tokens: int, device: str) -> Perplexity:
    """Measure a run's best checkpoint on the validation split of the prepared corpus."""
    loaded = load_run(run_folder, device=device, pack=False)
    windows = text_windows(loaded, text, limit_tokens=limit_tokens)
    return measure_perplexity(loaded.model, windows, device=loaded.device)


def _generate(run_folder: Path, *, device: str) -> tuple[tuple[str, str], ...]:
    """Continue each of PROMPTS with a trained model."""
    loaded = load_run(run_folder, device=device)
    samples = []
    for number, prompt in enumerate(PROMPTS):
        ids = generate(
            loaded.model,
            loaded.tokenizer.encode(prompt),
            max_new_tokens=60,
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
