"""Perplexity and bits per byte of a model on any text, and how far one model's predictions are from another's.

Dropless, without noise, every token predicted once, the same numbers every time. docs/guides/quantize.md says what they
mean for a quantised model.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from moesaic.config.train import TrainConfig
from moesaic.data.sources import TEXT_FIELD
from moesaic.errors import ConfigError
from moesaic.evaluate.text import NOTHING, Windows, read_documents
from moesaic.model.load import LoadedModel
from moesaic.model.transformer import Transformer

# fp32 logits that exist at a time: 64 MiB.
_CHUNK_ELEMENTS = 1 << 24


@dataclass(frozen=True)
class Perplexity:
    """Mean loss in nats per predicted token, over num_tokens tokens that stand for num_bytes bytes of UTF-8 text."""

    loss: float
    num_tokens: int
    num_bytes: int
    num_documents: int
    window: int
    stride: int

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss) if self.loss < 700 else self.loss * math.inf  # NaN stays NaN

    @property
    def bits_per_byte(self) -> float:
        return self.loss * self.num_tokens / math.log(2) / max(self.num_bytes, 1)


@dataclass(frozen=True)
class Reference:
    """What a model says of some windows: of each batch the hidden states (n, H) of the positions that predict, and the
    matrix (V, H) that makes logits of them, in fp32. The model itself need not stay in memory."""

    perplexity: Perplexity
    hidden: tuple[Tensor, ...]
    output_weight: Tensor


@dataclass(frozen=True)
class Comparison:
    """A model against a reference: kl is the mean over tokens of KL(reference || model) in nats, top1_agreement the
    share of tokens for which both find the same token likeliest."""

    perplexity: Perplexity
    kl: float
    top1_agreement: float


def window_length(config: TrainConfig, window: int | None) -> int:
    """Return the tokens of a window for a run; None is the sequence length of training.

    Raises: ConfigError for more than the model has positions.
    """
    length = config.data.sequence_length if window is None else window
    if length > config.model.max_positions:
        raise ConfigError(
            f"window ({length}) is more than the {config.model.max_positions} positions of the model; it has none "
            f"beyond; use {config.data.sequence_length}, which it was trained with."
        )
    return length


def text_windows(
    loaded: LoadedModel,
    text: str | Path,
    *,
    window: int | None = None,
    stride: int | None = None,
    limit_tokens: int | None = None,
    apart: bool | None = None,
    text_field: str = TEXT_FIELD,
) -> Windows:
    """Return the windows of a text for a run: a file, or a prepared folder, of which the validation split is taken.

    window None: the sequence length of training; stride None: half a window; apart None: as in training, that is, with
    data.document_mask.

    Raises: ConfigError for a window or stride out of range; DataError for a text that is missing or unreadable.
    """
    config = loaded.config
    length = window_length(config, window)
    return Windows(
        read_documents(
            text,
            loaded.tokenizer,
            limit_tokens=limit_tokens,
            text_field=text_field,
            vocab_size=config.model.vocab_size,
        ),
        length=length,
        stride=max(1, length // 2) if stride is None else stride,
        first_id=loaded.tokenizer.first_id,
        apart=config.data.document_mask if apart is None else apart,
    )


@torch.no_grad()
def measure_perplexity(model: Transformer, windows: Windows, *, device: torch.device) -> Perplexity:
    """Return the model's loss over the windows; it is in evaluation mode for it, and put back after."""
    total = 0.0
    for hidden, targets in _predictions(model, windows, device):
        for start, end in _chunks(hidden.shape[0], model.config.vocab_size):
            total += float(_losses(model.logits(hidden[start:end]), targets[start:end]).sum(dtype=torch.float64))
    return _perplexity(total, windows)


@torch.no_grad()
def record_reference(model: Transformer, windows: Windows, *, device: torch.device) -> Reference:
    """Return what the model says of the windows, to compare others with. Memory: num_tokens * H numbers."""
    weight = model.output_weight().detach().clone()
    in_fp32 = weight.float()
    total = 0.0
    kept = []
    for hidden, targets in _predictions(model, windows, device):
        for start, end in _chunks(hidden.shape[0], weight.shape[0]):
            logits = F.linear(hidden[start:end].float(), in_fp32)
            total += float(_losses(logits, targets[start:end]).sum(dtype=torch.float64))
        kept.append(hidden)
    return Reference(_perplexity(total, windows), tuple(kept), weight)


@torch.no_grad()
def compare(model: Transformer, reference: Reference, windows: Windows, *, device: torch.device) -> Comparison:
    """Return how a model predicts the windows that the reference was recorded on, and how far that is from it."""
    total = kl = agreed = 0.0
    weight = reference.output_weight.float()
    for (hidden, targets), expected in zip(_predictions(model, windows, device), reference.hidden, strict=True):
        for start, end in _chunks(hidden.shape[0], model.config.vocab_size):
            logits = model.logits(hidden[start:end])
            reference_logits = F.linear(expected[start:end].float(), weight)
            total += float(_losses(logits, targets[start:end]).sum(dtype=torch.float64))
            agreed += float((logits.argmax(-1) == reference_logits.argmax(-1)).sum())
            p, q = torch.log_softmax(reference_logits, -1), torch.log_softmax(logits, -1)
            kl += float((p.exp() * (p - q)).sum(-1).sum(dtype=torch.float64))
    count = max(windows.num_tokens, 1)
    return Comparison(_perplexity(total, windows), kl / count, agreed / count)


def _predictions(model: Transformer, windows: Windows, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (n, H) hidden states and (n,) targets of each batch's positions that predict something."""
    was_training = model.training
    model.eval()
    try:
        for batch in windows:
            targets = batch.targets.flatten()
            places = (targets != NOTHING).nonzero().squeeze(1)
            if len(places):
                hidden = model(batch.inputs.to(device)).hidden.flatten(0, 1)
                yield hidden[places.to(device)], targets[places].to(device)
    finally:
        model.train(was_training)


def _losses(logits: Tensor, targets: Tensor) -> Tensor:
    """(n,) cross-entropy of fp32 logits (n, V)."""
    return F.cross_entropy(logits, targets, reduction="none")


def _chunks(num_tokens: int, vocab_size: int) -> list[tuple[int, int]]:
    size = max(1, _CHUNK_ELEMENTS // vocab_size)
    return [(start, min(start + size, num_tokens)) for start in range(0, num_tokens, size)]


def _perplexity(total: float, windows: Windows) -> Perplexity:
    return Perplexity(
        loss=total / windows.num_tokens,
        num_tokens=windows.num_tokens,
        num_bytes=windows.num_bytes,
        num_documents=windows.num_documents,
        window=windows.length,
        stride=windows.stride,
    )
