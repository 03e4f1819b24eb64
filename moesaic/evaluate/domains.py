"""Which experts serve which topics: routes counted by layer, domain and expert on labelled text, and how much of it is
more than chance.

What is drawn of it is report/evaluation_plots.py's business.
"""

import gzip
import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from moesaic.config.model import ModelConfig
from moesaic.data.sources import TEXT_FIELD, mend_text, text_of
from moesaic.data.tokenizer import Tokenizer
from moesaic.errors import ConfigError, DataError
from moesaic.logs import OnProgress, no_progress
from moesaic.model.transformer import Transformer

# Of one document, where the model has more positions.
_MOST_TOKENS = 512
_PERMUTATIONS = 100


@dataclass(frozen=True)
class LabelledDocument:
    """A text's token ids, the tokenizer's first one (Tokenizer.first_id) before them, and its label."""

    domain: str
    ids: tuple[int, ...]


@dataclass(frozen=True)
class LayerDomains:
    """One MoE layer: routes (domains, experts), and mutual information in bits between domain and expert.

    chance_bits: the mean of it where documents have their labels shuffled, chance_bits_high: what one in twenty of
    those exceeds. What is below is no sign of specialisation, since few documents always differ by something.
    """

    layer: int
    routes: npt.NDArray[np.int64]
    information_bits: float
    chance_bits: float
    chance_bits_high: float

    @property
    def shares(self) -> npt.NDArray[np.float64]:
        """(domains, experts): of a domain's routes, each expert's share."""
        return self.routes / np.maximum(self.routes.sum(1, keepdims=True), 1)

    @property
    def contributions(self) -> npt.NDArray[np.float64]:
        """(domains, experts): what each pair adds to the information, in bits."""
        return _contributions(self.routes)

    @property
    def is_beyond_chance(self) -> bool:
        return self.information_bits > self.chance_bits_high


@dataclass(frozen=True)
class DomainUsage:
    """num_documents and num_tokens are those of each domain, in the order of `domains`."""

    domains: tuple[str, ...]
    num_documents: tuple[int, ...]
    num_tokens: tuple[int, ...]
    layers: tuple[LayerDomains, ...]


def read_labelled(
    path: Path,
    tokenizer: Tokenizer,
    *,
    label_field: str,
    text_field: str = TEXT_FIELD,
    most_documents: int | None = None,
    most_tokens: int = _MOST_TOKENS,
) -> list[LabelledDocument]:
    """Return the documents of a .jsonl file (or .jsonl.gz), Tokenizer.first_id before each.

    most_documents: of each domain, the first ones. most_tokens: of each document, its beginning.

    Raises: DataError for what is missing, unreadable or not labelled.
    """
    if not path.is_file():
        raise DataError(
            f"{path} does not exist; a .jsonl file with a text and a label on each line is required; check the path."
        )
    documents: list[LabelledDocument] = []
    counts: dict[str, int] = {}
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                record = json.loads(line)
                place = f"{path}, line {number}"
                if not isinstance(record, dict):
                    raise DataError(
                        f"{place} is no JSON object; one with a text and a label is required on each line; mend it."
                    )
                missing = [field for field in (text_field, label_field) if field not in record]
                if missing:
                    raise DataError(
                        f"{place} has no {missing[0]!r}; its fields are {', '.join(record)}; name the "
                        f"ones that hold text and label with --text-field and --domain-field."
                    )
                label = record[label_field]
                if not isinstance(label, str | int):
                    raise DataError(
                        f"{place} has {type(label).__name__} in the field {label_field!r}; a name or a whole number is "
                        f"required; name another field with --domain-field."
                    )
                domain, text = mend_text(str(label)), text_of(record[text_field], text_field, place)
                if not text:
                    continue
                if most_documents is None or counts.get(domain, 0) < most_documents:
                    ids = (tokenizer.first_id, *tokenizer.encode(text))[:most_tokens]
                    documents.append(LabelledDocument(domain, ids))
                    counts[domain] = counts.get(domain, 0) + 1
    except (OSError, EOFError, ValueError, TypeError, RecursionError, zlib.error) as error:
        raise DataError(
            f"{path} cannot be read ({error}); one JSON object a line, in UTF-8, is required; fetch it again."
        ) from None
    if len(counts) < 2:
        raise DataError(
            f"{path} has {len(counts)} domains in {label_field!r}; at least two are required to tell apart; name "
            f"another field with --domain-field."
        )
    return documents


def require_experts(config: ModelConfig) -> None:
    """Raise ConfigError for a model without MoE layers."""
    if not config.moe_layers:
        raise ConfigError(
            "the model has no MoE layers; domains are told apart by their experts; name a run of a model with experts."
        )


@torch.no_grad()
def measure_domains(
    model: Transformer,
    documents: Sequence[LabelledDocument],
    *,
    progress: OnProgress = no_progress,
) -> DomainUsage:
    """Count where each domain's tokens are routed, and compare it with shuffled labels.

    Every domain counts alike, however much text it has.

    Raises: ConfigError for a model without MoE layers.
    """
    require_experts(model.config)
    counts = _routes_by_document(model, documents, progress)
    domains = tuple(sorted({document.domain for document in documents}))
    labels = np.array([domains.index(document.domain) for document in documents])
    rng = np.random.default_rng(0)
    shuffles = [rng.permutation(labels) for _ in range(_PERMUTATIONS)]
    layers = []
    for layer, routes in counts:  # (documents, E)
        own = _by_domain(routes, labels, len(domains))
        chance = [information_bits(_by_domain(routes, each, len(domains))) for each in shuffles]
        layers.append(
            LayerDomains(layer, own, information_bits(own), float(np.mean(chance)), float(np.quantile(chance, 0.95)))
        )
    lengths = np.array([min(len(document.ids), model.config.max_positions) for document in documents])
    return DomainUsage(
        domains=domains,
        num_documents=tuple(int(count) for count in np.bincount(labels, minlength=len(domains))),
        num_tokens=tuple(int(count) for count in np.bincount(labels, lengths, minlength=len(domains))),
        layers=tuple(layers),
    )


def information_bits(routes: npt.NDArray[np.int64]) -> float:
    """Return the mutual information of domain and expert, for routes (domains, experts), every domain alike likely."""
    return float(_contributions(routes).sum())


def _contributions(routes: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    totals = routes.sum(1, keepdims=True)
    given = routes / np.maximum(totals, 1)  # p(expert | domain)
    count = np.count_nonzero(totals)  # a domain without routes says nothing
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(given > 0, given * np.log2(given * count / given.sum(0)), 0.0) / max(count, 1)


def _by_domain(routes: npt.NDArray[np.int64], labels: npt.NDArray[np.int64], num_domains: int) -> npt.NDArray[np.int64]:
    sums = np.zeros((num_domains, routes.shape[1]), dtype=np.int64)
    np.add.at(sums, labels, routes)
    return sums


def _routes_by_document(
    model: Transformer, documents: Sequence[LabelledDocument], progress: OnProgress
) -> list[tuple[int, npt.NDArray[np.int64]]]:
    """Return each MoE layer's number and its routes (documents, experts).

    A pass for each document: a packed model counts the routes of a pass and does not say whose they are.
    """
    layers = [number for number, layer in enumerate(model.config.layers) if layer.is_moe]
    counts = [np.zeros((len(documents), model.config.layers[layer].num_experts), dtype=np.int64) for layer in layers]
    was_training = model.training
    model.eval()
    try:
        for number, document in enumerate(documents):
            tokens = torch.tensor([document.ids[: model.config.max_positions]], device=model.device)
            for place, statistics in enumerate(model(tokens).moe):
                counts[place][number] = statistics.tokens_per_expert.cpu().numpy()
            progress("routing", (number + 1) / len(documents))
    finally:
        model.train(was_training)
    return list(zip(layers, counts, strict=True))


def domains_to_json(usage: DomainUsage) -> dict[str, Any]:
    """Return JSON-able values."""
    return {
        "kind": "domains",
        "domains": list(usage.domains),
        "documents": list(usage.num_documents),
        "tokens": list(usage.num_tokens),
        "layers": [
            {
                "layer": each.layer,
                "information_bits": each.information_bits,
                "chance_bits": each.chance_bits,
                "chance_bits_95": each.chance_bits_high,
                "routes": each.routes.tolist(),
            }
            for each in usage.layers
        ],
    }
