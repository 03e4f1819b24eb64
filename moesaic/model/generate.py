"""Naive generation, one sequence at a time: the oracle that any serving engine has to equal."""

import math
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from numbers import Integral, Real

import torch
from torch import Tensor

from moesaic.errors import GenerationError
from moesaic.kernels import select
from moesaic.kernels.sampling import RowDraw, draw_rows, not_finite
from moesaic.model.kv_cache import BatchCache
from moesaic.model.transformer import Transformer


def generate(
    model: Transformer,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    stop_ids: Collection[int] = (),
) -> list[int]:
    """Return the token ids that follow prompt, at most max_new_tokens, ending before a stop id.

    temperature 0 takes the likeliest token; otherwise one is drawn from the softmax at that temperature, among the
    top_k likeliest and among the fewest whose probabilities reach top_p.

    Raises: GenerationError for an empty prompt, ids outside the vocabulary, more positions than the model has, sampling
    values out of range; NotFiniteError for a model whose logits are no numbers.
    """
    return list(
        stream(
            model, prompt, max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed,
            stop_ids=stop_ids,
        )
    )  # fmt: skip


def stream(
    model: Transformer,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    stop_ids: Collection[int] = (),
) -> Iterator[int]:
    """As generate, yielding each token id as it comes."""
    _check(model, prompt, max_new_tokens, temperature, top_k, top_p, seed)
    return _stream(model, prompt, max_new_tokens, temperature, top_k, top_p, seed, frozenset(stop_ids))


@torch.no_grad()
def _stream(
    model: Transformer,
    prompt: Sequence[int],
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int,
    stop_ids: frozenset[int],
) -> Iterator[int]:
    if temperature != 0.0:
        select.cpu_library()  # which draws: compiled now where it is not yet, and not between two tokens
    device = model.device
    cache = BatchCache(model.config, 1, len(prompt) + max_new_tokens, dtype=model.compute_dtype, device=device)
    random = torch.Generator().manual_seed(seed)
    tokens = torch.tensor([list(prompt)], device=device)  # (1, S)
    for _ in range(max_new_tokens):
        with _evaluation_mode(model):  # for this pass: between two tokens the model is its caller's
            logits = model.logits(model(tokens, cache=cache).hidden[0, -1])
        token = choose_token(logits, temperature=temperature, top_k=top_k, top_p=top_p, random=random)
        if token in stop_ids:
            return
        yield token
        tokens = torch.tensor([[token]], device=device)


@contextmanager
def _evaluation_mode(model: Transformer) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def choose_token(
    logits: Tensor, *, temperature: float, top_k: int | None, top_p: float | None, random: torch.Generator
) -> int:
    """Return one token id for logits (V,), fp32.

    Raises: NotFiniteError where the largest logit is NaN or infinite.
    """
    row = logits.cpu().numpy()
    # The first of equals, and NaN above all; torch's takes ten times as long for 32,000 logits.
    best = int(row.argmax())
    if not math.isfinite(row.item(best)):
        raise not_finite(row.item(best))
    if temperature == 0.0:
        return best
    uniform = float(torch.rand((), dtype=torch.float64, generator=random, device="cpu"))
    given = RowDraw(0, best, temperature, top_k, 1.0 if top_p is None else top_p, 0.0, uniform)
    (token,) = draw_rows(row[None], [given])
    return token


def check_token_ids(prompt: Sequence[int], vocab_size: int) -> None:
    """Raises: GenerationError for a prompt that is not a sequence of token ids below vocab_size, at least one."""
    is_list = isinstance(prompt, Sequence) and not isinstance(prompt, str | bytes)
    is_plain = is_list and set(map(type, prompt)) <= {int}  # the others are looked at one by one
    for given in (token for token in prompt if not (is_plain or _is(token, Integral))) if is_list else (prompt,):
        shown = repr(given) if len(repr(given)) <= 60 else f"{repr(given)[:57]}..."
        raise GenerationError(
            f"the prompt {'holds' if is_list else 'is'} {shown} ({type(given).__name__}); a list of token ids is "
            f"required; encode a text by tokenizer.encode(text), and give an array or a tensor as .tolist()."
        )
    if not prompt:
        raise GenerationError(
            "the prompt is empty; generation requires one token; give a text, or the end-of-text token."
        )
    if min(prompt) < 0 or max(prompt) >= vocab_size:
        wrong = next(token for token in prompt if not 0 <= token < vocab_size)
        raise GenerationError(
            f"the prompt holds token id {wrong}; ids from 0 to {vocab_size - 1} are required; use the run's own "
            f"tokenizer."
        )


def _is(value: object, kind: type) -> bool:
    """Whether a value is a number of a kind; True and False, which are integers to Python, are none."""
    return isinstance(value, kind) and not isinstance(value, bool)


def _check(
    model: Transformer,
    prompt: Sequence[int],
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int,
) -> None:
    config = model.config
    check_token_ids(prompt, config.vocab_size)
    wholes = {"max_new_tokens": max_new_tokens, "top_k": 1 if top_k is None else top_k, "seed": seed}
    reals = {"temperature": temperature, "top_p": 1 if top_p is None else top_p}
    for values, kind, called in ((wholes, Integral, "whole number"), (reals, Real, "number")):
        for name, value in values.items():
            if not _is(value, kind):
                raise GenerationError(f"{name} is {value!r} ({type(value).__name__}); a {called} is required; use one.")
    if max_new_tokens < 1:
        raise GenerationError(f"max_new_tokens ({max_new_tokens}) must be at least 1; ask for one token or more.")
    length = len(prompt) + max_new_tokens
    if length > config.max_positions:
        raise GenerationError(
            f"the prompt's {len(prompt)} tokens and {max_new_tokens} new ones are {length} positions; the model has "
            f"{config.max_positions}; shorten the prompt or lower max_new_tokens."
        )
    if (
        not 0 <= temperature < float("inf")
        or (top_k is not None and top_k < 1)
        or (top_p is not None and not 0 < top_p <= 1)
    ):
        raise GenerationError(
            f"temperature={temperature}, top_k={top_k}, top_p={top_p}; a finite temperature >= 0, top_k >= 1 and "
            f"0 < top_p <= 1 are required; change the one that is not."
        )
    if not -(2**63) <= seed < 2**64:
        raise GenerationError(f"the seed is {seed}; -2**63 to 2**64 - 1 is required; choose another.")
