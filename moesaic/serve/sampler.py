"""From logits to tokens: one row at a time, so that a text's tokens do not depend on what else runs.

Rows are NumPy vectors on the CPU: a row costs microseconds there, and every operation on it is its own. Where a text
ends, and what a grammar allows, are decided elsewhere; this file is given the allowed tokens.
"""

import math
from collections.abc import Collection, Sequence
from copy import copy
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

from moesaic.config.serve import Sampling
from moesaic.errors import ConfigError, GenerationError, NotFiniteError
from moesaic.kernels.decode import Decoded
from moesaic.kernels.sampling import Floats, Ids, RowDraw, draw_rows, log_totals, not_finite
from moesaic.moe.seeds import mix_seeds
from moesaic.serve.outputs import GeneratedToken, TokenLogprob

Mask = npt.NDArray[np.bool_]

# As the config says of logit_bias; an added -100 alone would not forbid a token at a high temperature.
_FORBIDS = -100.0


class RequestError(GenerationError):
    """What a request asks for cannot be: the model and the engine are well, and other requests go on."""


@dataclass(frozen=True)
class Sampled:
    """A token that was chosen; logprob and top_logprobs (from the likeliest down) where the request asks for them."""

    token_id: int
    logprob: float | None = None
    top_logprobs: tuple[TokenLogprob, ...] = ()


class SamplingState:
    """What the next token of one text depends on beside the logits: its settings, its past and its random numbers.

    The number drawn for the k-th new token is a function of (seed, k), so a text that was preempted, batched otherwise
    or drafted ahead goes on with the same tokens.
    """

    def __init__(
        self,
        sampling: Sampling,
        prompt: Sequence[int],
        *,
        vocab_size: int,
        seed: int,
        stop_ids: Collection[int] = (),
    ) -> None:
        """Start a text after a prompt. stop_ids: what would end it, forbidden before min_tokens.

        Raises: ConfigError for a logit_bias or a stop token outside the vocabulary.
        """
        self.sampling, self.vocab_size, self.seed = sampling, vocab_size, seed
        self.num_tokens = 0
        ids = sorted(sampling.logit_bias)
        for name, given in (("logit_bias", ids), ("stop_token_ids", sorted({*sampling.stop_token_ids, *stop_ids}))):
            wrong = [token for token in given if not 0 <= token < vocab_size]
            if wrong:
                raise ConfigError(
                    f"{name} names token id {wrong[0]}; ids from 0 to {vocab_size - 1} are required; use the ids of "
                    f"this model's own tokenizer.",
                    key=name,
                )
        self._bias_ids = np.array(ids, dtype=np.int64)
        bias = np.array([sampling.logit_bias[token] for token in ids], dtype=np.float32)
        self._bias = np.where(bias <= _FORBIDS, np.float32(-np.inf), bias)
        self._stop_ids = np.array(sorted(set(stop_ids)), dtype=np.int64)
        self._has_penalties = sampling.presence_penalty != 0 or sampling.frequency_penalty != 0
        self._repeats = sampling.repetition_penalty != 1
        # That penalties change nothing yet, as edits_scores knows, does not hold for rows behind the next.
        self._takes_logits = sampling.logprobs is None and not (ids or self._has_penalties or self._repeats)
        self.takes_likeliest = sampling.temperature == 0 or sampling.top_k == 1
        # Distinct tokens in the order of their first appearance, and how often each was generated; those of the prompt
        # are there for the repetition penalty only.
        seen = sorted(set(prompt)) if self._repeats else []
        self._ids = np.array(seen, dtype=np.int64)
        self._counts = np.zeros(len(seen), dtype=np.float32)
        self._places = {token: place for place, token in enumerate(seen)}

    @property
    def forbidden_ids(self) -> Ids:
        """The tokens that logit_bias forbids."""
        return self._bias_ids[np.isneginf(self._bias)]

    def fork(self) -> "SamplingState":
        """Return one that is as this and goes on by itself."""
        other = copy(self)  # settings are shared, what append changes is not
        other._ids, other._counts, other._places = self._ids.copy(), self._counts.copy(), self._places.copy()
        return other

    def append(self, token_id: int) -> None:
        """Count a new token of the text."""
        self.num_tokens += 1
        if not (self._has_penalties or self._repeats):
            return
        place = self._places.get(token_id)
        if place is None:
            place = self._places[token_id] = len(self._places)
            if place == len(self._ids):
                self._ids = np.append(self._ids, np.zeros(16 + place, dtype=np.int64))
                self._counts = np.append(self._counts, np.zeros(16 + place, dtype=np.float32))
            self._ids[place] = token_id
        self._counts[place] += 1

    def uniform(self, num_before: int = 0) -> float:
        """Return the random number in [0, 1) that the next token is drawn with, or the one that so many come before."""
        return (mix_seeds(self.seed, self.num_tokens + num_before) >> 10) * 2.0**-53

    @property
    def edits_scores(self) -> bool:
        """Whether scores() differ from the logits."""
        return len(self._bias_ids) > 0 or self._repeats or (self._has_penalties and len(self._places) > 0)

    @property
    def is_plain(self) -> bool:
        """Whether nothing but a token is asked of the next row, and nothing but a grammar changes its logits."""
        return self._takes_logits and (self.num_tokens >= self.sampling.min_tokens or len(self._stop_ids) == 0)

    def draw(self, row: int, best: int, *, num_before: int = 0) -> RowDraw:
        """Return how the next token is drawn, or the one that so many come before."""
        sampling = self.sampling
        return RowDraw(
            row, best, sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p, self.uniform(num_before)
        )

    def scores(self, logits: Floats) -> Floats:
        """Return a copy of logits (V,) less the penalties, plus the bias."""
        scores, sampling, seen = logits.copy(), self.sampling, len(self._places)
        ids, counts = self._ids[:seen], self._counts[:seen]
        if self._repeats:
            old = scores[ids]
            factor = np.float32(sampling.repetition_penalty)
            scores[ids] = np.where(old > 0, old / factor, old * factor)
        if self._has_penalties:
            scores[ids] -= np.float32(sampling.frequency_penalty) * counts
            scores[ids] -= np.float32(sampling.presence_penalty) * (counts > 0)
        scores[self._bias_ids] += self._bias
        return scores

    def allowed(self, mask: Mask | None) -> Mask | None:
        """Return which tokens (V,) may come next, None for all: those of a mask, and nothing that ends too early.

        A grammar that leaves nothing but the end is obeyed before min_tokens too.
        """
        if self.num_tokens >= self.sampling.min_tokens or len(self._stop_ids) == 0:
            return mask
        going_on = np.ones(self.vocab_size, dtype=np.bool_) if mask is None else mask.copy()
        going_on[self._stop_ids] = False
        return going_on if mask is None or going_on.any() else mask


class RowSampler:
    """Chooses tokens from the rows of one step: `sample` of each, with what may be done for all rows together."""

    def __init__(self, decoded: Decoded, coming: Sequence[tuple[int, SamplingState, int]]) -> None:
        """coming: of texts without a grammar, which rows are to come: (row, the text's state, how many of its tokens
        come before).
        """
        self._decoded = decoded
        likeliest = decoded.likeliest
        draws = [
            state.draw(row, likeliest[row], num_before=before)
            for row, state, before in coming
            if state.is_plain and not state.takes_likeliest and likeliest[row] >= 0
        ]
        self._drawn: dict[int, int] = {}
        if len(draws) > 1:
            tokens = draw_rows(decoded.logits_on_cpu, draws)
            self._drawn = {each.row: token for each, token in zip(draws, tokens, strict=True)}

    def sample(self, row: int, state: SamplingState, mask: Mask | None = None) -> Sampled:
        best = self._decoded.likeliest[row]
        if best < 0:  # not all are finite
            return sample(self._decoded.logits_on_cpu[row], state, mask)
        if mask is None and state.is_plain:
            if state.takes_likeliest:
                return Sampled(best)
            if (drawn := self._drawn.get(row)) is not None:
                return Sampled(drawn)
        return sample(self._decoded.logits_on_cpu[row], state, mask, best=best)


def sample(logits: Floats, state: SamplingState, mask: Mask | None = None, *, best: int | None = None) -> Sampled:
    """Return a token for one row (V,) of fp32 logits. Nothing of the state changes: append the token that is kept.

    mask: the tokens that a grammar allows, (V,) bool, or None for all. best: the first of the largest logits, where it
    is known and finite.
    Log-probabilities are of what the model says after penalties and bias, whatever a grammar allows of it.

    Raises: NotFiniteError for NaN or infinite logits; RequestError where what the request asks for leaves no token.
    """
    assert logits.shape == (state.vocab_size,), (logits.shape, state.vocab_size)
    if best is None:
        best = _likeliest(logits)
    scores = logits
    if state.edits_scores:
        with np.errstate(over="ignore"):
            scores = state.scores(logits)
        best = _likeliest(scores, state)
    allowed = state.allowed(mask)
    choices = scores
    if allowed is not None:
        choices = np.where(allowed, scores, np.float32(-np.inf))
        best = _likeliest(choices, state, mask)
    sampling, token = state.sampling, best
    if sampling.temperature != 0:
        (token,) = draw_rows(choices[None], [state.draw(0, best)])
    if sampling.logprobs is None:
        return Sampled(token)
    logprob, top_logprobs = _logprobs(scores, token, sampling.logprobs)
    return Sampled(token, logprob, top_logprobs)


def score_prompt(logits: Tensor, target_ids: Sequence[int], *, top: int) -> list[GeneratedToken]:
    """Return each target token with its log-probability and the top likeliest ones of its row.

    Shapes: logits (S, V) fp32: row i is what predicts target i.
    Raises: NotFiniteError for NaN or infinite logits.
    """
    assert len(logits) == len(target_ids), (logits.shape, len(target_ids))
    rows = logits.detach().cpu().numpy()
    totals, likeliest = log_totals(rows, min(top, logits.shape[1]))
    scored = []
    for row, target, total, largest in zip(rows, target_ids, totals, likeliest, strict=True):
        if not math.isfinite(total):
            raise not_finite(row.max())
        scored.append(GeneratedToken(target, row.item(target) - total, _with_logprobs(row, largest, total)))
    return scored


def _likeliest(scores: Floats, state: SamplingState | None = None, mask: Mask | None = None) -> int:
    """Return the first of the largest; NumPy's argmax finds NaN above all.

    state, mask: what made the scores of logits whose largest is finite.
    """
    best = int(scores.argmax())
    if math.isfinite(scores.item(best)):
        return best
    if state is not None and np.isneginf(scores[best]):
        raise _nothing_left(state, mask)
    if state is not None:
        raise RequestError(
            f"the largest logit is {scores[best]} after the penalties; a finite one is required; one of them is out of "
            f"all proportion: weaken it."
        )
    raise not_finite(scores[best])


def _nothing_left(state: SamplingState, mask: Mask | None) -> GenerationError:
    """Return the error of a row where no token can come: it says what of the request contradicts what."""
    stop_token_ids = state.sampling.stop_token_ids
    if mask is not None and not mask.any():
        remedy = "mend the grammar: no token of this model goes on as it wants"
        if stop_token_ids:
            remedy = f"take what the text needs out of stop_token_ids ({_shown(stop_token_ids)}), which only end it"
        return RequestError(f"the grammar allows no token here; one is required; {remedy}.")
    allowed = state.allowed(mask)
    ids = np.arange(state.vocab_size) if allowed is None else np.flatnonzero(allowed)
    if not np.isin(ids, state.forbidden_ids).all():
        return NotFiniteError(
            "none of the tokens that may come next has a finite score; one is required; " + NotFiniteError.REMEDY + "."
        )
    wishes = [] if mask is None else [f"the grammar allows only {_shown(np.flatnonzero(mask))}"]
    if allowed is not mask:
        wishes.append(f"min_tokens ({state.sampling.min_tokens}) forbids what ends the text")
    if len(state.forbidden_ids):
        wishes.append(f"logit_bias forbids {_shown(state.forbidden_ids)}")
    return RequestError(
        f"{' and '.join(wishes)}, which leaves no token here; one is required; take one of these wishes back."
    )


def _shown(ids: Sequence[int] | Ids) -> str:
    few = ", ".join(str(token) for token in ids[:5])
    return f"token {few}" if len(ids) == 1 else f"tokens {few}" + (f" and {len(ids) - 5} more" if len(ids) > 5 else "")


def _logprobs(scores: Floats, token: int, top: int) -> tuple[float, tuple[TokenLogprob, ...]]:
    """Return the log-probability of a token, and of the top likeliest that have any."""
    (total,), (likeliest,) = log_totals(scores[None], min(top, len(scores)))
    return float(scores[token]) - total, _with_logprobs(scores, likeliest, total)


def _with_logprobs(scores: Floats, tokens: Ids, total: float) -> tuple[TokenLogprob, ...]:
    """Return the tokens that have any probability with its log."""
    ids, found = tokens.tolist(), scores[tokens].tolist()
    return tuple(TokenLogprob(token, score - total) for token, score in zip(ids, found, strict=True) if score > -np.inf)
