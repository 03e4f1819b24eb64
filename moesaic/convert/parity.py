"""The proof that a conversion lost nothing: the same prompts through both models, in fp32, and the tensors counted.

A certificate is written into the folder of what was made. Where a side cannot run here, it says why, and still counts.
"""

import gc
import json
import math
import platform
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import moesaic
from moesaic.checkpoint.store import resolve_checkpoint
from moesaic.checkpoint.stream import TensorReader
from moesaic.convert.opened import open_model
from moesaic.convert.runnable import Change, Choice, DoesNotRunError, is_read_by_transformers, open_runnable
from moesaic.convert.source import is_source
from moesaic.convert.weights import WeightComparison, compare_weights
from moesaic.data.tokenizer import TOKENIZER_NAME, Tokenizer
from moesaic.errors import ConversionError, DataError
from moesaic.kernels.allocator import give_back_freed_memory
from moesaic.kernels.limits import available_memory_bytes
from moesaic.logs import OnProgress, logger, no_progress
from moesaic.model.load import load_run_config
from moesaic.report.json_values import json_values

CERTIFICATE_NAME = "parity.json"

# Prose, numbers, code, dialogue, other scripts: what tokenizers and embeddings treat differently.
PROMPTS = (
    "The history of the lighthouse begins with fires that were built on hilltops to guide ships to a port.",
    "In 1867, the 13th of May fell on a Monday; 3.14159 times 2,500 is about 7,854, and 17 * 23 = 391.",
    "def gcd(a: int, b: int) -> int:\n    while b:\n        a, b = b, a % b\n    return a\n\n\nprint(gcd(1071, 462))",
    "\u201cWhere have you been?\u201d she asked. \u201cI waited until nine.\u201d He put down his hat.",
    "El agua es esencial para la vida. L'eau est essentielle à la vie. Вода даёт жизнь. 水は生命に不可欠です。",
    '{"name": "moesaic", "experts": [32, 32, 64, 128], "residual": true}  \t<|x|>  \u2603',
)
# One more prompt is all of them so often that it has this length, for positions further on.
_LONG_PROMPT = 384
_NEW_TOKENS = 16
# Each of them reads a large model once more: of one that takes more bytes than this, fewer.
_LARGE_BYTES = 4 << 30
_NEW_TOKENS_LARGE = 3
# fp32 sums in another order differ by some 1e-6 of the largest logit; a lost tensor changes it by much more.
MAX_RELATIVE = 1e-3
# Scores of experts that differ by no more of the larger than this may be chosen either way, by rounding alone; where so
# few positions would be left to compare, none is left out.
_MAX_TIE = 1e-4
_LEAST_COMPARED = 0.25


@dataclass(frozen=True)
class TensorAccount:
    """How many tensors the source has, how many of them were used, how many the result has; bytes: of the result.

    left_out: those not used, with the reason.
    """

    source: int
    used: int
    result: int
    bytes: int
    left_out: Mapping[str, str]


@dataclass(frozen=True)
class Comparison:
    """Two models on the same prompts: largest differences of fp32 logits, absolute and over the largest logit.

    num_tokens: positions that were compared. num_undecided: positions that were not, since rounding decided between two
    experts there or before. top1_agreement: share of positions with the same likeliest token. greedy_equal: prompts of
    num_prompts whose greedy continuation is the same. routing_agreement: of each MoE layer, in order, the share of
    tokens sent to the same experts; empty where there are none, or a side does not tell. made_up: tensors that
    transformers did not find in a folder, and filled with random numbers.
    """

    num_prompts: int
    num_tokens: int
    num_undecided: int
    max_absolute: float
    max_relative: float
    top1_agreement: float
    greedy_equal: int
    routing_agreement: tuple[float, ...]
    made_up: tuple[str, ...]


@dataclass(frozen=True)
class Certificate:
    """What a check found.

    dtype: what weights were cast to; a source that is cast is compared as cast. judge: who computed the foreign side,
    transformers or, of a GGUF file that it does not read and of weights that are compared as cast, moesaic itself.
    not_compared: why there is no comparison. tokenizer: what the two tokenizers, where they were compared, do
    differently.
    """

    source: str
    result: str
    family: str
    dtype: str | None
    tensors: TensorAccount | None
    weights: WeightComparison | None
    comparison: Comparison | None
    judge: str | None
    not_compared: str | None
    tokenizer: str | None = None

    @property
    def failure(self) -> str | None:
        """What is wrong, None where nothing is."""
        if self.tokenizer is not None:
            return self.tokenizer
        if self.weights is not None and self.weights.failure is not None:
            return self.weights.failure
        found = self.comparison
        if found is None:
            return None
        if found.made_up:
            return f"transformers finds no {', '.join(found.made_up[:3])}"
        if not found.max_relative <= MAX_RELATIVE:  # NaN is over it
            return (
                f"logits differ by {found.max_absolute:.3g}, {found.max_relative:.3g} of the largest; at most "
                f"{MAX_RELATIVE:g} is required"
            )
        if any(share < 1 - MAX_RELATIVE for share in found.routing_agreement):
            return f"tokens are routed to other experts ({min(found.routing_agreement):.2%} agree in one layer)"
        return None

    def require(self, *, force: bool = False) -> None:
        """Raise ConversionError when the check failed; with force, only say so."""
        if self.failure is None:
            return
        if not force:
            raise ConversionError(
                f"{self.result} does not compute what {self.source} does: {self.failure}; nothing was kept; report it, "
                f"or keep the result for a look at it with --force (force=True)."
            )
        logger.warning("%s does not compute what %s does: %s; kept, as asked.", self.result, self.source, self.failure)

    def to_json(self) -> dict[str, Any]:
        """Return the certificate as JSON has it; a number that is not finite becomes null."""
        values = {
            **asdict(self),
            "failure": self.failure,
            "versions": {
                "moesaic": moesaic.__version__,
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
        }
        return dict(json_values(values))

    def write(self, folder: Path) -> None:
        text = json.dumps(self.to_json(), indent=1, allow_nan=False, ensure_ascii=False)
        (folder / CERTIFICATE_NAME).write_text(text + "\n", encoding="utf-8")


def certify(
    source: Path,
    result: Path,
    *,
    family: str,
    change: Change | None = None,
    account: TensorAccount | None = None,
    tokenizer: Tokenizer | None = None,
    named: Path | None = None,
    on_progress: OnProgress = no_progress,
) -> Certificate:
    """Compare two models (run folders, Hugging Face folders, GGUF files).

    change: what the conversion did to the weights beside moving them. tokenizer: what the result's is held against,
    where it was written in other words. named: where the result will be.
    """
    changes = (change or Change(), Change())
    certificate = _certify(
        (source, result), changes, family=family, account=account, weights=None, named=named, on_progress=on_progress
    )
    if tokenizer is None:
        return certificate
    return replace(certificate, tokenizer=_other_tokens(tokenizer, _tokenizer(result)))


def _certify(
    paths: tuple[Path, Path],
    changes: tuple[Change, Change],
    *,
    family: str,
    account: TensorAccount | None,
    weights: WeightComparison | None,
    named: Path | None,
    on_progress: OnProgress,
) -> Certificate:
    comparison, reason = None, _obstacle(*paths)
    if reason is None:
        on_progress("comparing with the source", 0.0)
        try:
            comparison = compare_models(*paths, changes=changes, on_progress=on_progress)
        except DoesNotRunError as error:
            reason = f"one side does not run here ({error})"
    if reason is not None:
        logger.warning("Logits are not compared: %s.", reason)
    is_judge = all(is_read_by_transformers(path, each) for path, each in zip(paths, changes, strict=True))
    dtypes = {str(dtype).removeprefix("torch.") for change in changes for dtype in change.cast.values()}
    return Certificate(
        source=str(paths[0]),
        result=str(named or paths[1]),
        family=family,
        dtype=", ".join(sorted(dtypes)) or None,
        tensors=account,
        weights=weights,
        comparison=comparison,
        judge=None if comparison is None else "transformers" if is_judge else "moesaic",
        not_compared=reason,
    )


def verify_models(first: str | Path, second: str | Path, *, on_progress: OnProgress = no_progress) -> Certificate:
    """Compare two models: run folders (RUN or RUN@step), Hugging Face folders, GGUF files.

    They are the same where their tensors are, or those of one are the other's in a dtype that holds less, and the
    logits are then, of one and of the other in that dtype; and where their tokenizers, if both come with one, make the
    same tokens.

    Raises: ConversionError, CheckpointError for what is none of these.
    """
    paths = (Path(first), Path(second))
    weights = compare_weights(*paths, on_progress=on_progress)
    one, other = (
        Change({name: getattr(torch, dtype) for name, dtype in rounded.items()}, scales)
        for rounded, scales in zip(weights.rounded, weights.scaled, strict=True)
    )
    family = " and ".join(_describe(path) for path in paths)
    certificate = _certify(
        paths, (one, other), family=family, account=None, weights=weights, named=None, on_progress=on_progress
    )
    return replace(certificate, tokenizer=_compare_tokenizers(*paths))


def _describe(path: Path) -> str:
    if not is_source(path):
        return "run"
    with open_model(path) as opened:
        return opened.family


def compare_models(
    first: Path,
    second: Path,
    *,
    changes: tuple[Change, Change],
    on_progress: OnProgress = no_progress,
) -> Comparison:
    """Return how two models, changed so, differ on the prompts; only one of them is in memory at a time."""
    vocab_sizes, lengths = zip(*(_measure(path) for path in (first, second)), strict=True)
    vocab_size, positions = min(vocab_sizes), min(lengths)
    tokenizer = _tokenizer(second if is_source(first) else first)  # a run has one in any case
    new_tokens = (
        _NEW_TOKENS_LARGE if max(_bytes_needed(path) for path in (first, second)) > _LARGE_BYTES else _NEW_TOKENS
    )
    prompts = _prompts(tokenizer, vocab_size, max(1, positions - new_tokens))
    answers, made_up = [], set[str]()
    for index, each in enumerate((first, second)):
        model = open_runnable(each, changes[index])
        made_up |= set(model.made_up)
        found = []
        for place, prompt in enumerate(prompts):
            logits, choices = model.logits(prompt)
            count = min(new_tokens, positions - len(prompt))
            found.append(_Answer(logits, choices, model.greedy(prompt, count) if count > 0 else []))
            on_progress("comparing with the source", (index + (place + 1) / len(prompts)) / 2)
        answers.append(found)
        del model
        gc.collect()
        give_back_freed_memory()
    return _compare(*answers, made_up=tuple(sorted(made_up)))


@dataclass(frozen=True)
class _Answer:
    """What a model says of a prompt: logits (S, V), each MoE layer's choice, and how it goes on."""

    logits: Tensor
    choices: Sequence[Choice]
    text: list[int]


def _compare(first: Sequence[_Answer], second: Sequence[_Answer], *, made_up: tuple[str, ...]) -> Comparison:
    largest = absolute = 0.0
    tokens = agreed = 0
    routing: list[list[Tensor]] = []
    lengths = [len(each.logits) for each in first]
    decided = [_num_decided(one, other) for one, other in zip(first, second, strict=True)]
    if sum(decided) < _LEAST_COMPARED * sum(lengths):
        decided = lengths
    for one, other, end in zip(first, second, decided, strict=True):
        if not end:
            continue
        width = min(one.logits.shape[1], other.logits.shape[1])  # padded vocabularies
        logits, others = one.logits[:end, :width], other.logits[:end, :width]
        difference = float((logits - others).abs().max())
        absolute = max(absolute, difference) if math.isfinite(difference) else math.nan
        largest = max(largest, float(logits.abs().max()))
        agreed += int((logits.argmax(-1) == others.argmax(-1)).sum())
        tokens += end
        if len(one.choices) == len(other.choices):
            routing.append([same[:end] for same in _same_experts(one, other)])
    layers = [torch.cat(each).double().mean().item() for each in zip(*routing, strict=True)]
    return Comparison(
        num_prompts=len(first),
        num_tokens=tokens,
        num_undecided=sum(lengths) - tokens,
        max_absolute=absolute,
        max_relative=absolute / largest if largest > 0 else absolute,
        top1_agreement=agreed / tokens,
        greedy_equal=sum(one.text == other.text for one, other in zip(first, second, strict=True)),
        routing_agreement=tuple(layers),
        made_up=made_up,
    )


def _same_experts(one: _Answer, other: _Answer) -> list[Tensor]:
    """Return of each MoE layer whether both sent a token to the same experts, (S,) bool; all False for other shapes."""
    return [
        (a.sort(-1).values == b.sort(-1).values).all(-1)
        if a.shape == b.shape
        else torch.zeros(len(one.logits), dtype=torch.bool)
        for a, b in zip(
            (each.expert_ids for each in one.choices), (each.expert_ids for each in other.choices), strict=True
        )
    ]


def _num_decided(one: _Answer, other: _Answer) -> int:
    """Return how many positions stand before the first where two models' experts differ by rounding alone.

    All, where the first difference is of another kind. Until then a layer gets the same on both sides, up to rounding;
    behind it attention has seen what other experts made.
    """
    everything = len(one.logits)
    if not one.choices or len(one.choices) != len(other.choices):
        return everything
    differ = ~torch.stack(_same_experts(one, other))  # (layers, S)
    if not differ.any():
        return everything
    position = int(differ.any(0).int().argmax())
    layer = int(differ[:, position].int().argmax())
    pair = one.choices[layer], other.choices[layer]
    scores = next((each.scores for each in pair if each.scores is not None), None)
    chosen, others = (set(each.expert_ids[position].tolist()) for each in pair)
    if scores is None or len(chosen) != len(others):
        return everything
    mine, theirs = (scores[position][sorted(ids)].sort().values for ids in (chosen - others, others - chosen))
    is_tie = (mine - theirs).abs() <= _MAX_TIE * torch.maximum(mine.abs(), theirs.abs())
    return position if is_tie.all() else everything


def _prompts(tokenizer: Tokenizer, vocab_size: int, room: int) -> list[Tensor]:
    """Token ids of every prompt, and of a long one; those of a tokenizer too large for the model are folded into it."""
    prompts = [torch.tensor(ids) % vocab_size for ids in tokenizer.encode_batch(list(PROMPTS)) if ids]
    if not prompts:
        raise DataError(
            "the tokenizer makes no token of any text; one that encodes text is required; give the model's own with "
            "--tokenizer."
        )
    everything = torch.cat(prompts)
    long = everything.repeat(-(-_LONG_PROMPT // len(everything)))[:_LONG_PROMPT]
    return [each[:room] for each in (*prompts, long)]


def _measure(path: Path) -> tuple[int, int]:
    """Return the vocabulary and the positions of a model."""
    if is_source(path):
        with open_model(path) as opened:
            return opened.config.vocab_size, opened.config.max_positions
    config = load_run_config(resolve_checkpoint(path).run_folder).model
    return config.vocab_size, config.max_positions


def _tokenizer(path: Path) -> Tokenizer:
    if is_source(path):
        with open_model(path) as opened:
            return opened.source.tokenizer()
    return Tokenizer.load(resolve_checkpoint(path).run_folder)


def _compare_tokenizers(first: Path, second: Path) -> str | None:
    """Return what two models' tokenizers do differently; a folder may hold none, and a GGUF file one of another kind.

    Raises: DataError for one that is there and broken.
    """
    pair = []
    for path in (first, second):
        try:
            pair.append(_tokenizer(path))
        except DataError as error:
            if (path / TOKENIZER_NAME).is_file():
                raise
            logger.warning("Tokenizers are not compared: %s", error)
            return None
    return _other_tokens(*pair)


def _other_tokens(first: Tokenizer, second: Tokenizer) -> str | None:
    """Return what two tokenizers do differently, None where they do the same."""
    pair = (first, second)
    added = sorted(first.added_names | second.added_names)
    for text in (*PROMPTS, *added, "a".join(added)):
        for marks in (False, True):
            one, other = (each.encode_prompt(text, add_special_tokens=marks) for each in pair)
            if one != other:
                return (
                    f"of {text[:20]!r}... the tokenizers make {len(one)} tokens ({str(one[:3])[1:-1]}, ...) and "
                    f"{len(other)} ({str(other[:3])[1:-1]}, ...)"
                )
    if first.stop_ids != second.stop_ids:
        return f"the tokenizers end a text at {sorted(first.stop_ids)} and {sorted(second.stop_ids)}"
    if first.first_id != second.first_id:
        return f"the tokenizers begin a text with {first.first_id} and {second.first_id}"
    return None


def _obstacle(*paths: Path) -> str | None:
    """Return why two models cannot both run here, None when they can."""
    if any(is_source(path) for path in paths):
        try:
            import transformers  # noqa: F401
        except ImportError:
            return "transformers is not installed (pip install 'moesaic[huggingface]')"
    needed, available = max(_bytes_needed(path) for path in paths), available_memory_bytes()
    if needed > available:
        return f"it needs {needed / 1e9:.1f} GB of memory in fp32 and {available / 1e9:.1f} GB are free"
    return None


def _bytes_needed(path: Path) -> int:
    """What a model takes in fp32, beside what is stored of it while it is read, or both models' logits, and some room.

    While it is read, transformers has a layer's matrices singly and stacked.
    """
    vocab_size, _ = _measure(path)
    tokens = _LONG_PROMPT + sum(len(prompt.encode()) for prompt in PROMPTS)  # at most
    logits, room = 2 * 4 * tokens * vocab_size, 1 << 29
    if is_source(path):
        files = sorted(path.glob("*.safetensors"))
        with open_model(path) as opened:
            layout = opened.source.layout
    else:
        files = [resolve_checkpoint(path).path / "model.safetensors"]
        with TensorReader(files[0]) as reader:
            layout = reader.layout
    counts = {name: math.prod(each.shape) for name, each in layout.items()}
    parameters = sum(counts.values())
    if path.is_file():
        return 2 * 4 * parameters + logits + room  # transformers has them in fp32 before its model does
    stored, in_layers = sum(each.stat().st_size for each in files), Counter[str]()
    for name, count in counts.items():
        if is_source(path) and (layer := re.search(r"\.\d+\.", name)):
            in_layers[name[: layer.end()]] += count
    return 4 * parameters + max(stored + 4 * max(in_layers.values(), default=0), logits) + room
