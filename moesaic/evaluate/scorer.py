"""What an evaluation asks of whatever computes: the likelihood of given tokens, and generated ones.

Scorer is the protocol; PlainScorer its definition, one sequence at a time; batched.py the fast one. An engine that
serves can stand in their place. Text, tasks and metrics are not known here.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from moesaic.errors import GenerationError
from moesaic.model.generate import stream
from moesaic.model.transformer import Transformer

# Called now and then with the share that is done.
Progress = Callable[[float], None]


@dataclass(frozen=True)
class Pair:
    """Tokens that are given, at least one, and tokens whose likelihood after them is asked for, at least one."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]


@dataclass(frozen=True)
class Score:
    """The sum of log-probabilities (nats) of a continuation, and whether each of its tokens was the likeliest."""

    log_likelihood: float
    is_greedy: bool


@dataclass(frozen=True)
class Prompt:
    """Tokens to go on from; `is_done` is asked after each new token, with all new ones, and ends the generation.

    temperature 0 takes the likeliest token, whatever the other three are.
    """

    ids: tuple[int, ...]
    max_new_tokens: int
    is_done: Callable[[Sequence[int]], bool]
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0


class Scorer(Protocol):
    """Dropless, without noise, in evaluation mode; the same answers every time for the same requests."""

    @property
    def max_length(self) -> int:
        """The positions of the model."""
        ...

    def score(self, pairs: Sequence[Pair], *, progress: Progress | None = None) -> list[Score]:
        """Return one score per pair, in order. A pair with more than max_length + 1 tokens loses its first ones.

        Raises: GenerationError for a pair with an empty part, a continuation of more than max_length tokens, or a
        token outside the vocabulary.
        """
        ...

    def generate(self, prompts: Sequence[Prompt], *, progress: Progress | None = None) -> list[list[int]]:
        """Return each prompt's new tokens, the one included on which it was done.

        Raises: GenerationError as model/generate does.
        """
        ...


@dataclass(frozen=True)
class Inputs:
    """What a model is given for a pair, and the last tokens of what it should predict at each input's place."""

    tokens: tuple[int, ...]
    targets: tuple[int, ...]


def make_inputs(pair: Pair, *, max_length: int, vocab_size: int) -> Inputs:
    """Return the inputs of a pair, cut from the left to max_length.

    Raises: GenerationError.
    """
    if not pair.context or not pair.continuation:
        raise GenerationError(
            f"a pair of {len(pair.context)} and {len(pair.continuation)} tokens was given; a score needs at least one "
            f"token before and one to predict; put the begin or end-of-text token in front."
        )
    if len(pair.continuation) > max_length:
        raise GenerationError(
            f"a continuation has {len(pair.continuation)} tokens; the model has {max_length} positions and sees no "
            f"more at once; shorten it, or measure it as a text (rolling)."
        )
    both = pair.context + pair.continuation
    wrong = next((token for token in both if not 0 <= token < vocab_size), None)
    if wrong is not None:
        raise GenerationError(
            f"there is a token id {wrong}; ids from 0 to {vocab_size - 1} are required; use the run's own tokenizer."
        )
    return Inputs(both[-(max_length + 1) : -1], pair.continuation)


class PlainScorer:
    """One sequence at a time, without a cache for scores and by model/generate for text: the definition."""

    def __init__(self, model: Transformer) -> None:
        self._model = model

    @property
    def max_length(self) -> int:
        return self._model.config.max_positions

    @torch.no_grad()
    def score(self, pairs: Sequence[Pair], *, progress: Progress | None = None) -> list[Score]:
        model, scores = self._model, []
        was_training = model.training
        model.eval()
        try:
            for number, pair in enumerate(pairs):
                inputs = make_inputs(pair, max_length=self.max_length, vocab_size=model.config.vocab_size)
                tokens = torch.tensor([inputs.tokens], device=model.device)
                hidden = model(tokens).hidden[0, -len(inputs.targets) :]
                logits = model.logits(hidden)  # (continuation, V)
                targets = torch.tensor(inputs.targets, device=model.device)
                values = torch.log_softmax(logits, -1).gather(1, targets[:, None])
                scores.append(Score(float(values.sum(dtype=torch.float64)), bool((logits.argmax(-1) == targets).all())))
                if progress is not None:
                    progress((number + 1) / len(pairs))
        finally:
            model.train(was_training)
        return scores

    def generate(self, prompts: Sequence[Prompt], *, progress: Progress | None = None) -> list[list[int]]:
        texts = []
        for number, prompt in enumerate(prompts):
            texts.append(generate_one(self._model, prompt))
            if progress is not None:
                progress((number + 1) / len(prompts))
        return texts


def generate_one(model: Transformer, prompt: Prompt) -> list[int]:
    """Return the new tokens of one prompt, by the naive generation."""
    new: list[int] = []
    for token in stream(
        model,
        prompt.ids,
        max_new_tokens=prompt.max_new_tokens,
        temperature=prompt.temperature,
        top_k=prompt.top_k,
        top_p=prompt.top_p,
        seed=prompt.seed,
    ):
        new.append(token)
        if prompt.is_done(new):
            break
    return new


def rolling_pairs(tokens: Sequence[int], *, first: int, max_length: int) -> Iterator[Pair]:
    """Cut a text into pairs that predict every token once: the first window after `first`, each later one full.

    A later window's context is what fills it up, so that its tokens see as much as there is room for, at least one
    token.
    """
    known = 0
    while known < len(tokens):
        count = min(len(tokens) - known, max_length)
        end = known + count
        start = end - max_length - 1
        context = (first, *tokens[:known]) if start < 0 else tuple(tokens[start:known])
        yield Pair(context, tuple(tokens[known:end]))
        known = end


def score_texts(
    scorer: Scorer, texts: Sequence[Sequence[int]], *, first: int, progress: Progress | None = None
) -> list[float]:
    """Return each text's log-likelihood (nats), every token predicted once, `first` standing before it."""
    pairs, owners = [], []
    for number, text in enumerate(texts):
        for pair in rolling_pairs(text, first=first, max_length=scorer.max_length):
            pairs.append(pair)
            owners.append(number)
    totals = [0.0] * len(texts)
    for number, score in zip(owners, scorer.score(pairs, progress=progress), strict=True):
        totals[number] += score.log_likelihood
    return totals
