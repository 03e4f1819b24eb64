"""Models that can be asked, in fp32: ours, and foreign ones as transformers has them, or as we read them."""

import io
import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from moesaic.convert.gguf import GgufFile
from moesaic.convert.opened import open_model
from moesaic.convert.source import (
    CONFIG_NAME,
    QUANTIZATION_KEYS,
    HuggingFaceFolder,
    is_foreign_run,
    is_source,
    quantization_of,
    read_json,
)
from moesaic.environment import environment
from moesaic.errors import NotFiniteError
from moesaic.kernels.allocator import give_back_freed_memory
from moesaic.model.generate import generate
from moesaic.model.load import load_run
from moesaic.model.transformer import Transformer
from moesaic.moe.router import Router


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


class DoesNotRunError(Exception):
    """transformers cannot read or run a model."""


@contextmanager
def _their_errors() -> Iterator[None]:
    """Which families, and which GGUF architectures, transformers reads, depends on its version.

    Its checks raise exceptions of several libraries.
    """
    try:
        yield
    except Exception as error:
        raise DoesNotRunError(f"{type(error).__name__}: {str(error)[:200]}") from None


@dataclass(frozen=True)
class Choice:
    """What a MoE layer's router chose: expert_ids (S, K), by scores (S, E) where these are known."""

    expert_ids: Tensor
    scores: Tensor | None


class Runnable(Protocol):
    """A model that can be asked, in fp32. made_up: tensors that it has from nowhere."""

    made_up: tuple[str, ...]

    def logits(self, tokens: Tensor) -> tuple[Tensor, list[Choice]]:
        """Return fp32 logits (S, V) of tokens (S,), and each MoE layer's choice."""
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
    def logits(self, tokens: Tensor) -> tuple[Tensor, list[Choice]]:
        with choices_of(self._model) as choices:
            return self._model.logits(self._model(tokens[None]).hidden)[0], choices

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
        # Its threads would read all tensors of a folder ahead of what stacks them: the model twice, or more.
        one_by_one = environment("HF_DEACTIVATE_ASYNC_LOAD", "1")
        with _quiet_transformers(), one_by_one, _their_errors():
            model, made_up = _load(path)
        self._model = model.eval()
        self.made_up = tuple(sorted(made_up))
        give_back_freed_memory()

    @torch.no_grad()
    def logits(self, tokens: Tensor) -> tuple[Tensor, list[Choice]]:
        with choices_of(self._model) as choices, _their_errors():
            return self._model(tokens[None]).logits[0].float(), choices

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


def _load(path: Path) -> tuple[Any, Iterable[str]]:
    """Return transformers' model of a folder or of a GGUF file, and which tensors it has from nowhere."""
    import transformers

    if is_foreign_run(path):
        import moesaic.hf  # noqa: F401  # registers our classes
    # Its other ways to run experts refuse sizes that are no multiple of 16 bytes.
    options: dict[str, Any] = {
        "dtype": torch.float32, "experts_implementation": "eager", "output_loading_info": True,
    }  # fmt: skip
    auto: Any = transformers.AutoModelForCausalLM
    if path.is_file():
        model, info = auto.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True, **options)
        return model, info["missing_keys"]
    given = quantization_of(path, read_json(path / CONFIG_NAME)) or {}
    method = given.get("quant_method")
    if method is None or _unpacks_alike(path, given):
        how = _dequantizing(method) if method else None
        model, info = auto.from_pretrained(path, quantization_config=how, local_files_only=True, **options)
        if method == "fp8":
            _round_as_read(model, path)
        return model, info["missing_keys"]
    config = transformers.AutoConfig.from_pretrained(path, local_files_only=True)
    for key in QUANTIZATION_KEYS:
        if hasattr(config, key):
            delattr(config, key)
    own: Any = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    with HuggingFaceFolder(path) as source:
        state = {name: _Unpacked(source, name) for name in source.layout}
        model, info = own.from_pretrained(None, config=config, state_dict=state, **options)
    return model, info["missing_keys"]


class _Unpacked:
    """A tensor of a quantised folder as we unpack it, read when transformers takes it: as it takes those of files."""

    def __init__(self, source: HuggingFaceFolder, name: str) -> None:
        self._source, self._name = source, name

    def __getitem__(self, key: Any) -> Tensor:
        return self._source.read(self._name)[key]


def _unpacks_alike(path: Path, given: Mapping[str, Any]) -> bool:
    """Whether transformers makes plain numbers of a quantised model, the ones that we make, with no other library.

    Where FP8 has scales of activations, or blocks that do not divide a matrix, it reads other ones, or none.
    """
    if given["quant_method"] != "fp8":
        return given["quant_method"] == "mxfp4"
    if given["activation_scheme"] == "static":
        return False
    with HuggingFaceFolder(path) as source:
        return not source.has_partial_blocks


def _dequantizing(method: str) -> object:
    """Return transformers' setting that makes plain numbers of a quantised model."""
    from transformers.utils import quantization_config as configs

    return configs.Mxfp4Config(dequantize=True) if method == "mxfp4" else configs.FineGrainedFP8Config(dequantize=True)


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


def open_runnable(path: Path, change: Change) -> Runnable:
    """Return a run folder's, a Hugging Face folder's or a GGUF file's model, changed so.

    Raises: DoesNotRunError where transformers should run it and cannot.
    """
    if not is_source(path):
        return _Ours(path, change)
    return _Theirs(path) if is_read_by_transformers(path, change) else _ReadBack(path, change)


def is_read_by_transformers(path: Path, change: Change) -> bool:
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


@contextmanager
def choices_of(model: nn.Module) -> Iterator[list[Choice]]:
    """Collect the choices of every router of a pass, ours or transformers', in the order of the layers."""
    found: list[Choice] = []

    def collect(module: nn.Module, inputs: Any, output: Any) -> None:
        ids = getattr(output, "expert_ids", None)
        if ids is None and isinstance(output, tuple):
            integers = [each for each in output if isinstance(each, Tensor) and not each.is_floating_point()]
            ids = integers[-1] if integers else None
        if ids is not None:
            scores = _scores(module, inputs[0]) if isinstance(module, Router) else None
            found.append(Choice(ids.reshape(-1, ids.shape[-1]), scores))

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


@torch.no_grad()
def _scores(router: Router, x: Tensor) -> Tensor:
    """Return the scores (T, E) that our router's choice goes by, of x (T, H), without the limit on groups."""
    logits = x.float() @ router.weight.float().t()
    if router.bias is not None:
        logits = logits + router.bias.float()
    scores = torch.softmax(logits, -1) if router.config.scoring == "softmax" else torch.sigmoid(logits)
    return scores if router.score_correction_bias is None else scores + router.score_correction_bias


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
