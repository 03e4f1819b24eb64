"""The proof that a conversion lost nothing: the same prompts through both models, in fp32, and the tensors counted.

A certificate is written into the folder of what was made. Where a side cannot run here, it says why, and still counts.
"""

import gc
import io
import json
import logging
import math
import os
import platform
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

import moesaic
from moesaic.checkpoint.store import resolve_checkpoint
from moesaic.checkpoint.stream import DTYPES, FP8_DTYPES, TensorReader
from moesaic.convert import mxfp4
from moesaic.convert.gguf import GgufFile
from moesaic.convert.opened import open_model
from moesaic.convert.source import CONFIG_NAME, HuggingFaceFolder, is_foreign_run, is_source, read_json
from moesaic.convert.weights import WeightComparison, compare_weights
from moesaic.data.tokenizer import TOKENIZER_NAME, Tokenizer
from moesaic.errors import ConversionError, DataError, NotFiniteError
from moesaic.kernels.allocator import give_back_freed_memory
from moesaic.kernels.limits import available_memory_bytes
from moesaic.logs import OnProgress, logger, no_progress
from moesaic.model.generate import generate
from moesaic.model.load import load_run, load_run_config
from moesaic.model.transformer import Transformer
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

    top1_agreement: share of positions with the same likeliest token. greedy_equal: prompts of num_prompts whose greedy
    continuation is the same. routing_agreement: of each MoE layer, in order, the share of tokens sent to the same
    experts; empty where there are none, or a side does not tell. made_up: tensors that transformers did not find in a
    folder, and filled with random numbers.
    """

    num_prompts: int
    num_tokens: int
    max_absolute: float
    max_relative: float
    top1_agreement: float
    greedy_equal: int
    routing_agreement: tuple[float, ...]
    made_up: tuple[str, ...]


@dataclass(frozen=True)
class Change:
    """What is done to a model's weights before it is compared, so that what differs is the conversion's doing.

    cast: tensors that the other side has in a dtype that holds less, by our names. scales: tensors that are multiplied
    by another, a factor that is 1 then.
    """

    cast: Mapping[str, torch.dtype] = field(default_factory=dict)
    scales: Mapping[str, str] = field(default_factory=dict)

    def apply(self, model: Transformer) -> None:
        state = model.state_dict()
        for name, scale in self.scales.items():
            state[name].mul_(state[scale])
        for scale in self.scales.values():
            state[scale].fill_(1)
        for name, dtype in self.cast.items():
            if name in state:
                state[name].copy_(state[name].to(dtype))


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


class _DoesNotRunError(Exception):
    """transformers cannot read or run a model."""


@contextmanager
def _their_errors() -> Iterator[None]:
    """Which families, and which GGUF architectures, transformers reads, depends on its version.

    Its checks raise exceptions of several libraries.
    """
    try:
        yield
    except Exception as error:
        raise _DoesNotRunError(f"{type(error).__name__}: {str(error)[:200]}") from None


class Runnable(Protocol):
    """A model that can be asked, in fp32. made_up: tensors that it has from nowhere."""

    made_up: tuple[str, ...]

    def logits(self, tokens: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return fp32 logits (S, V) of tokens (S,), and each MoE layer's expert ids (S, K)."""
        ...

    def greedy(self, tokens: Tensor, count: int) -> list[int]:
        """Return the likeliest continuation."""
        ...


class _Ours:
    made_up: tuple[str, ...] = ()

    def __init__(self, run: Path | str, change: Change) -> None:
        self._model = load_run(run, device="cpu", pack=False, precision="fp32").model
        change.apply(self._model)

    @torch.no_grad()
    def logits(self, tokens: Tensor) -> tuple[Tensor, list[Tensor]]:
        with _routes(self._model) as routes:
            return self._model.logits(self._model(tokens[None]).hidden)[0], routes

    def greedy(self, tokens: Tensor, count: int) -> list[int]:
        try:
            return generate(self._model, tokens.tolist(), max_new_tokens=count)
        except NotFiniteError:  # logits that are no numbers, which are compared themselves
            return []


class _ReadBack(_Ours):
    """A foreign model as we read it: one that transformers reads otherwise, or not, or whose weights are changed."""

    def __init__(self, path: Path, change: Change) -> None:
        with open_model(path) as opened:
            self._model = Transformer.uninitialized(opened.config).eval()
            state = self._model.state_dict()
            for name, pieces in opened.pieces.items():
                flat = state[name].view(-1)
                for piece in pieces:
                    tensor = piece.to_ours(opened.source.read(piece.theirs, piece.index))
                    flat[piece.start : piece.stop] = tensor.flatten()
        change.apply(self._model)


class _Theirs:
    """What transformers makes of a folder or of a GGUF file."""

    def __init__(self, path: Path) -> None:
        import transformers

        if is_foreign_run(path):
            import moesaic.hf  # noqa: F401  # registers our classes
        folder, file = (path.parent, path.name) if path.is_file() else (path, None)
        packed = None if file else read_json(path / CONFIG_NAME).get("quantization_config")
        if packed:
            _check_blocks(path)
        with _quiet_transformers(), _one_by_one(), _their_errors():
            # Its other ways to run experts refuse sizes that are no multiple of 16 bytes.
            loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
                folder, gguf_file=file, dtype=torch.float32, local_files_only=True, experts_implementation="eager",
                output_loading_info=True,
                quantization_config=_dequantizing(packed["quant_method"]) if packed else None,
            )  # fmt: skip
        model, info = loaded
        self._model = model.eval()
        give_back_freed_memory()
        if packed and packed["quant_method"] != "mxfp4":  # which bf16 holds
            _round_as_read(self._model, path)
        self.made_up = tuple(sorted(info["missing_keys"]))

    @torch.no_grad()
    def logits(self, tokens: Tensor) -> tuple[Tensor, list[Tensor]]:
        with _routes(self._model) as routes, _their_errors():
            return self._model(tokens[None]).logits[0].float(), routes

    @torch.no_grad()
    def greedy(self, tokens: Tensor, count: int) -> list[int]:
        import transformers

        # What a model is to draw or to penalise, its file of defaults says, is not the likeliest continuation.
        self._model.generation_config = transformers.GenerationConfig()
        with _quiet_transformers(), _their_errors():
            out = self._model.generate(
                tokens[None], attention_mask=torch.ones_like(tokens[None]), max_new_tokens=count, do_sample=False,
                eos_token_id=-1, pad_token_id=0,
            )  # fmt: skip
        return out[0, len(tokens) :].tolist()


def _check_blocks(path: Path) -> None:
    with HuggingFaceFolder(path) as source:
        if source.has_partial_blocks:
            raise _DoesNotRunError("transformers reads FP8 otherwise where blocks do not divide a matrix")


def _dequantizing(method: str) -> object:
    """Return transformers' setting that makes plain numbers of a quantised model."""
    from transformers.utils import quantization_config as configs

    if method == "mxfp4":
        return configs.Mxfp4Config(dequantize=True)
    if method == "fp8":
        return configs.FineGrainedFP8Config(dequantize=True)
    return configs.CompressedTensorsConfig(run_compressed=False)


@torch.no_grad()
def _round_as_read(model: nn.Module, path: Path) -> None:
    """Round what transformers dequantised in fp32 to bf16, as we read it. Its own names of tensors may be others."""
    with HuggingFaceFolder(path) as source:
        wide = [name for name, each in source.layout.items() if each.dtype is torch.float32 and len(each.shape) > 1]
        kept = [source.read(name) for name in wide]
    for parameter in model.parameters():
        is_kept = any(parameter.shape == each.shape and torch.equal(parameter, each) for each in kept)
        if parameter.dim() > 1 and not is_kept:
            parameter.copy_(parameter.bfloat16())


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
        except _DoesNotRunError as error:
            reason = f"one side does not run here ({error})"
    if reason is not None:
        logger.warning("Logits are not compared: %s.", reason)
    is_judge = all(_is_read_by_transformers(path, each) for path, each in zip(paths, changes, strict=True))
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
        model = _run(each, changes[index])
        made_up |= set(model.made_up)
        found = []
        for place, prompt in enumerate(prompts):
            logits, routes = model.logits(prompt)
            count = min(new_tokens, positions - len(prompt))
            found.append((logits, routes, model.greedy(prompt, count) if count > 0 else []))
            on_progress("comparing with the source", (index + (place + 1) / len(prompts)) / 2)
        answers.append(found)
        del model
        gc.collect()
        give_back_freed_memory()
    return _compare(*answers, made_up=tuple(sorted(made_up)))


def _run(path: Path, change: Change) -> Runnable:
    if not is_source(path):
        return _Ours(path, change)
    return _Theirs(path) if _is_read_by_transformers(path, change) else _ReadBack(path, change)


def _is_read_by_transformers(path: Path, change: Change) -> bool:
    """Whether transformers can be the judge of a side: of changed weights, and some GGUF files, it is not.

    Its reader of GGUF knows no experts in `llama`, nor their size in `qwen3moe`, takes head_dim to be hidden_size /
    num_heads, and reads one file, of whatever model it is a part.
    """
    if not is_source(path):
        return True
    if change.cast or change.scales:
        return False
    if path.is_dir():
        return True
    with open_model(path) as opened:
        config, source = opened.config, opened.source
        if isinstance(source, GgufFile) and source.num_parts > 1:
            return False
        has_usual_heads = config.head_dim * config.num_heads == config.hidden_size
        return opened.family in ("gguf llama", "gguf qwen2") and has_usual_heads and config.rope_scaling is None


def _compare(first: Sequence[Any], second: Sequence[Any], *, made_up: tuple[str, ...]) -> Comparison:
    largest = absolute = 0.0
    tokens = agreed = greedy = 0
    routing: list[list[Tensor]] = []
    for (logits, routes, text), (other, other_routes, other_text) in zip(first, second, strict=True):
        width = min(logits.shape[1], other.shape[1])  # padded vocabularies
        difference = float((logits[:, :width] - other[:, :width]).abs().max())
        absolute = max(absolute, difference) if math.isfinite(difference) else math.nan
        largest = max(largest, float(logits[:, :width].abs().max()))
        agreed += int((logits[:, :width].argmax(-1) == other[:, :width].argmax(-1)).sum())
        tokens += len(logits)
        greedy += text == other_text
        if len(routes) == len(other_routes):
            same = [
                (a.sort(-1).values == b.sort(-1).values).all(-1)
                if a.shape == b.shape
                else torch.zeros(1, dtype=torch.bool)
                for a, b in zip(routes, other_routes, strict=True)
            ]
            routing.append(same)
    layers = [torch.cat(each).double().mean().item() for each in zip(*routing, strict=True)]
    relative = absolute / largest if largest > 0 else absolute
    return Comparison(len(first), tokens, absolute, relative, agreed / tokens, greedy, tuple(layers), made_up)


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
    if path.is_file():
        with open_model(path) as opened:
            numbers = sum(math.prod(each.shape) for each in opened.source.layout.values())
        return 2 * 4 * numbers + logits + room  # transformers has them in fp32 before its model does
    if is_source(path):
        files = sorted(path.glob("*.safetensors"))
    else:
        files = [resolve_checkpoint(path).path / "model.safetensors"]
    stored = sum(each.stat().st_size for each in files)
    parameters, in_layers = 0, Counter[str]()
    for each in files:
        with TensorReader(each, dtypes={**DTYPES, **FP8_DTYPES}) as reader:
            for name, layout in reader.layout.items():
                count = math.prod(layout.shape) * (2 if name.endswith(mxfp4.BLOCKS) else 1)
                parameters += count
                if is_source(path) and (layer := re.search(r"\.\d+\.", name)):
                    in_layers[name[: layer.end()]] += count
    return 4 * parameters + max(stored + 4 * max(in_layers.values(), default=0), logits) + room


@contextmanager
def _routes(model: nn.Module) -> Iterator[list[Tensor]]:
    """Collect the expert ids (S, K) of every router of a pass, ours or transformers', in the order of the layers."""
    found: list[Tensor] = []

    def collect(module: nn.Module, inputs: Any, output: Any) -> None:
        ids = getattr(output, "expert_ids", None)
        if ids is None and isinstance(output, tuple):
            integers = [each for each in output if isinstance(each, Tensor) and not each.is_floating_point()]
            ids = integers[-1] if integers else None
        if ids is not None:
            found.append(ids.reshape(-1, ids.shape[-1]))

    handles = [
        module.register_forward_hook(collect)
        for module in model.modules()
        if type(module).__name__.lower().endswith(("router", "gate"))  # Hunyuan's is a gate
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _one_by_one() -> Iterator[None]:
    """Without its threads, which read all tensors of a folder ahead of what stacks them: the model twice, or more."""
    name = "HF_DEACTIVATE_ASYNC_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Without its bars and warnings, which would stand among ours; its GGUF reader has a bar that no setting stops."""
    from transformers.utils import logging as theirs

    level, has_bar = theirs.get_verbosity(), theirs.is_progress_bar_enabled()
    theirs.set_verbosity(logging.CRITICAL)
    theirs.disable_progress_bar()
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        theirs.set_verbosity(level)
        if has_bar:
            theirs.enable_progress_bar()
