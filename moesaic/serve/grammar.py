"""Structured output: which tokens may come next under a JSON schema, a regular expression or a grammar, by xgrammar.

What of a client's grammar cannot be kept is refused first (grammar_checks.py). Then it is tried in a process of its own
before it is compiled here: grammar_trial.py says why.
"""

import json
import os
import re
import selectors
import subprocess
import sys
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from moesaic.config.serve import Grammar
from moesaic.data.tokenizer import Tokenizer
from moesaic.errors import ConfigError, GenerationError, InstallationError, MoesaicError
from moesaic.serve.grammar_checks import as_meant, check_grammar, name_of, patterns_of, shown
from moesaic.serve.grammar_trial import Vocabulary, compile_grammar
from moesaic.serve.sampler import Mask, RequestError

_CACHED = 32
_START_SECONDS = 120.0
_ANSWER_SECONDS = 10.0  # the trying process keeps a grammar's own timeout; without a word for so much more, it hangs
# What one request's grammar may take of the engine's thread. Of a vocabulary of 200,000 tokens (GPT-4o's), 600 random
# ones by ordinary grammars took at most 1.7 ms each on average (addresses by a regular expression; a schema of 60 parts
# 1.1) and 33 ms at once, on one core of a Xeon; ambiguous grammars take 300 and more, and more with each token.
_BURST_SECONDS = 1.0
_SECONDS_PER_TOKEN = 0.004
_TRIAL = Path(__file__).with_name("grammar_trial.py")

# What xgrammar 0.2.9 takes and UTF-8 has not: second bytes of a surrogate (ED), and of a character written too long.
_NO_SECOND_BYTES = {0xED: range(0xA0, 0xC0), 0xE0: range(0x80, 0xA0), 0xF0: range(0x80, 0x90)}


class GrammarProcessError(MoesaicError):
    """The process that tries grammars does not start: no request is to blame, and a later one starts it anew."""


class GrammarCompiler:
    """Makes grammars of one tokenizer's tokens; the last ones are kept. May be used from several threads.

    One grammar is tried at a time; who asks for one that is kept does not wait for that.
    The first compile waits for the trying process to start (seconds: it imports torch); start() lets it begin before.
    A grammar whose trial takes longer than its timeout is refused.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, vocab_size: int, max_bytes: int = 64_000, timeout_seconds: float = 2.0
    ) -> None:
        """Make one for a model of vocab_size logits.

        Raises: InstallationError without xgrammar.
        """
        if find_spec("xgrammar") is None:  # its import brings transformers in, which a start would wait for
            raise InstallationError(
                "a grammar was asked for and xgrammar is not installed; structured output stands on it; install it "
                "with `pip install 'moesaic[structured]'`."
            )
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._max_bytes, self._timeout_seconds = max_bytes, timeout_seconds
        self._stop_ids = sorted(token_id for token_id in tokenizer.stop_ids if token_id < vocab_size)
        self._trying = threading.Lock()  # held through a trial, for all below but the cache
        self._cache_lock = threading.Lock()
        self._cache: OrderedDict[Grammar, CompiledGrammar] = OrderedDict()
        self._held: weakref.WeakValueDictionary[Grammar, CompiledGrammar] = weakref.WeakValueDictionary()
        self._tokens: list[bytes] = []
        self._not_behind: dict[int, Mask] = {}  # by a token that ends within a character, what cannot go on with it
        self._vocabulary: Vocabulary | None = None
        self._trial: _Trial | None = None

    def start(self) -> None:
        """Start the trying process without waiting for it."""
        with self._trying:
            self._begin()

    def close(self) -> None:
        """End the trying process; a later compile starts another."""
        with self._trying:
            if self._trial is not None:
                self._trial.end()
                self._trial = None

    def find(self, grammar: Grammar) -> "CompiledGrammar | None":
        """Return the compiled grammar, at once, where it is one of the last or somebody still has it."""
        with self._cache_lock:
            if grammar in self._cache:
                self._cache.move_to_end(grammar)
            return self._held.get(grammar)

    def compile(self, grammar: Grammar) -> "CompiledGrammar":
        """Return the compiled grammar.

        Raises: ConfigError for one that is too large, too deep, broken, too slow, or that asks for what cannot be
        kept; GrammarProcessError where the trying process does not start.
        """
        if (kept := self.find(grammar)) is not None:
            return kept
        check_grammar(grammar, max_bytes=self._max_bytes)
        with self._trying:
            if (kept := self.find(grammar)) is not None:  # somebody else's was under way
                return kept
            ours = as_meant(grammar)
            error = self._begin().try_out(ours, self._timeout_seconds)
            assert self._vocabulary is not None
            if error is not None:
                if not self._trial or not self._trial.is_alive:
                    self._trial = None
                    self._begin()
                raise ConfigError(
                    f"the {name_of(grammar)} {shown(grammar.text)} cannot be used: {error}; one that xgrammar compiles "
                    f"and follows within {self._timeout_seconds:g} s is required; mend or simplify it."
                )
            inner = compile_grammar(self._vocabulary, ours.kind, ours.text)
            compiled = CompiledGrammar(inner, self._vocab_size, self._stop_ids, self._not_behind)
            with self._cache_lock:
                self._cache[grammar] = self._held[grammar] = compiled
                while len(self._cache) > _CACHED:
                    self._cache.popitem(last=False)
            return compiled

    def _begin(self) -> "_Trial":
        if self._vocabulary is None:
            count = min(self._tokenizer.vocab_size, self._vocab_size)
            self._tokens = [self._tokenizer.token_bytes(token_id) for token_id in range(count)]
            self._not_behind = _not_behind(self._tokens, self._vocab_size)
            self._vocabulary = Vocabulary(self._tokens, self._vocab_size, self._stop_ids)
        if self._trial is None or not self._trial.is_alive:
            self._trial = _Trial(self._tokens, self._vocab_size, self._stop_ids)
            try:
                import xgrammar  # noqa: F401  # while that process does the same
            except ImportError as error:
                raise InstallationError(
                    f"xgrammar is installed and cannot be imported ({error}); structured output stands on it; install "
                    f"it anew with `pip install --force-reinstall 'moesaic[structured]'`."
                ) from None
        return self._trial


class CompiledGrammar:
    """A grammar that texts can be made to match, any number of them."""

    def __init__(
        self, compiled: Any, vocab_size: int, stop_ids: Collection[int], not_behind: Mapping[int, Mask]
    ) -> None:
        """Hold what xgrammar compiled.

        stop_ids: what ends a text where nothing else is said. not_behind: tokens that no text has behind a token.
        """
        self._compiled, self._vocab_size, self._stop_ids = compiled, vocab_size, stop_ids
        self._not_behind = not_behind

    def matcher(self, *, stop_ids: Collection[int] | None = None, budget: "Budget | None" = None) -> "Matcher":
        """Return the state of a new text.

        stop_ids: what may end it, None for the tokenizer's own. budget: what it shares with its request's other texts,
        None for one of its own.

        Raises: RequestError where the budget is spent.
        """
        import xgrammar

        budget = budget or Budget()
        own = self._stop_ids if stop_ids is None else stop_ids
        stop_ids = sorted(token_id for token_id in own if token_id < self._vocab_size)
        with budget.spend():
            inner = xgrammar.GrammarMatcher(self._compiled, override_stop_tokens=stop_ids or None)
        return Matcher(inner, self._vocab_size, stop_ids, budget, self._not_behind)


class Budget:
    """How long a grammar may keep the thread that follows it, for all texts of a prompt together.

    It begins with a second, and every token gives some milliseconds back, never to more than that second. So much is
    what others lose; a single call cannot be cut short, and only ends the request once it is over.
    """

    def __init__(self) -> None:
        """Begin with all of it."""
        self._left, self._spent, self._num_tokens = _BURST_SECONDS, 0.0, 0

    @contextmanager
    def spend(self) -> Iterator[None]:
        """Count the time of a block, that of the thread itself: what others take of the processor is not its fault.

        Raises: RequestError before and after it, where the budget is spent.
        """
        self._check()
        begun = time.thread_time()
        yield
        seconds = time.thread_time() - begun
        self._left -= seconds
        self._spent += seconds
        self._check()

    def add_token(self) -> None:
        """Give back what a token may take."""
        self._left = min(_BURST_SECONDS, self._left + _SECONDS_PER_TOKEN)
        self._num_tokens += 1

    def _check(self) -> None:
        if self._left < 0:
            raise RequestError(
                f"the grammar took {self._spent:.2f} s for {self._num_tokens} tokens; at most {_BURST_SECONDS:g} s at "
                f"once, and {_SECONDS_PER_TOKEN * 1000:g} ms a token, are allowed for all texts of a prompt; make it "
                f"less ambiguous: repetitions within repetitions, and rules that may be empty, cost most."
            )


class Matcher:
    """How far one text has come in its grammar."""

    def __init__(
        self, inner: Any, vocab_size: int, stop_ids: list[int], budget: Budget, not_behind: Mapping[int, Mask]
    ) -> None:
        """Begin a text; CompiledGrammar.matcher does."""
        import xgrammar

        self._inner, self._vocab_size, self._budget = inner, vocab_size, budget
        self._not_behind = not_behind
        self._stop_ids = np.array(stop_ids, dtype=np.int64)
        self._bits = xgrammar.allocate_token_bitmask(1, vocab_size)
        self._mask: Mask | None = None
        self._ids: list[int] = []

    @property
    def is_complete(self) -> bool:
        """Whether the text may end here."""
        return bool(self._inner.is_completed())

    @property
    def is_finished(self) -> bool:
        """Whether a stop token has ended the text."""
        return bool(self._inner.is_terminated())

    def mask(self) -> Mask:
        """Return which tokens may come next, (V,) bool, not to be changed: stop tokens only where the text is complete.

        Raises: GenerationError after the end; RequestError where the grammar takes too long.
        """
        if self.is_finished:
            raise GenerationError("the text of this grammar has ended; no token may follow; begin another matcher.")
        if self._mask is None:
            with self._budget.spend():
                self._inner.fill_next_token_bitmask(self._bits)
            bits = np.unpackbits(self._bits.numpy()[0].view(np.uint8), count=self._vocab_size, bitorder="little")
            if not self.is_complete:  # xgrammar 0.2.9 allows those that the text could go on with, and then ends it
                bits[self._stop_ids] = 0
            if (excluded := self._excluded) is not None:
                bits[excluded] = 0
            self._mask = bits.view(np.bool_)
        return self._mask

    def accept(self, token_id: int) -> bool:
        """Go on by a token; return whether the grammar allows it, False leaves all as it was.

        Raises: RequestError where the grammar takes too long.
        """
        if not 0 <= token_id < self._vocab_size or self.is_finished:
            return False
        if self._mask is not None and not self._mask[token_id]:
            return False
        if token_id in self._stop_ids and not self.is_complete:
            return False
        if (excluded := self._excluded) is not None and excluded[token_id]:
            return False
        with self._budget.spend():
            is_accepted = bool(self._inner.accept_token(token_id))
            if is_accepted:
                self._mask = None
                self._ids.append(token_id)
                self._budget.add_token()
        return is_accepted

    def rollback(self, count: int) -> None:
        """Take the last count accepted tokens back."""
        assert 0 <= count <= len(self._ids), (count, len(self._ids))
        if count:
            self._inner.rollback(count)
            self._mask = None
            del self._ids[-count:]

    @property
    def _excluded(self) -> Mask | None:
        return self._not_behind.get(self._ids[-1]) if self._ids else None


class _Trial:
    """The process that tries grammars."""

    def __init__(self, tokens: list[bytes], vocab_size: int, stop_ids: list[int]) -> None:
        # -P: this folder's files must not stand for other packages' modules of the same name.
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(_TRIAL)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        self.end = weakref.finalize(self, _end, self._process)
        self._begun, self._is_ready, self._answer = time.monotonic(), False, b""
        first = {"tokens": [token.hex() for token in tokens], "vocab_size": vocab_size, "stop_ids": stop_ids}
        # The process reads only when it has begun, and a pipe holds less than a vocabulary.
        self._writer = threading.Thread(target=self._send, args=(first,), daemon=True)
        self._writer.start()

    @property
    def is_alive(self) -> bool:
        return bool(self.end.alive) and self._process.poll() is None

    def try_out(self, grammar: Grammar, timeout_seconds: float) -> str | None:
        """Return what is wrong with a grammar, None for nothing.

        A grammar that takes too long, or crashes, ends a fork of the process; the process itself where it does not
        answer.
        """
        if not self._is_ready:
            if self._receive(self._begun + _START_SECONDS) is None:
                self.end()
                raise GrammarProcessError(
                    f"the process that tries grammars did not start within {_START_SECONDS:g} s; xgrammar must be "
                    f"importable there; run `{sys.executable} -c 'import xgrammar'` to see why it is not."
                )
            self._is_ready = True
            self._writer.join()
        request = {"kind": grammar.kind, "text": grammar.text, "patterns": patterns_of(grammar)}
        self._send({**request, "seconds": timeout_seconds})
        answer = self._receive(time.monotonic() + timeout_seconds + _ANSWER_SECONDS)
        if answer is None:
            crashed = self._process.poll() is not None
            self.end()
            return "xgrammar crashed on it" if crashed else f"it took longer than {timeout_seconds:g} s"
        error = answer["error"]
        return None if error is None else _plain(error)

    def _send(self, message: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(message).encode("ascii") + b"\n")
            self._process.stdin.flush()
        except (BrokenPipeError, ValueError):
            return  # it has ended: no answer will come, which is seen there

    def _receive(self, deadline: float) -> dict[str, Any] | None:
        """Return the next answer, None where none has come by the deadline: one that has is there after it too."""
        assert self._process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._answer:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    return None
                part = os.read(self._process.stdout.fileno(), 1 << 16)
                if not part:
                    self._process.wait()
                    return None
                self._answer += part
        line, _, self._answer = self._answer.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer


def _end(process: "subprocess.Popen[bytes]") -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            try:
                pipe.close()
            except OSError:
                continue  # what was still to be written to a process that is no more


def _not_behind(tokens: list[bytes], vocab_size: int) -> dict[int, Mask]:
    """Return, for each token that ends in a character's first byte, those that would make none of it, (V,) bool."""
    masks = {first: np.zeros(vocab_size, dtype=np.bool_) for first in _NO_SECOND_BYTES}
    for first, seconds in _NO_SECOND_BYTES.items():
        masks[first][[token_id for token_id, token in enumerate(tokens) if token and token[0] in seconds]] = True
    return {token_id: masks[token[-1]] for token_id, token in enumerate(tokens) if token and token[-1] in masks}


def _plain(error: str) -> str:
    """Return xgrammar's message without the time and the place in its source."""
    lines = re.sub(r"^\[[\d:]+\] \S+:\d+: ", "", error).strip().splitlines()
    return shown(lines[0].rstrip("."), 200, quoted=False) if lines else "it is refused without a reason"
