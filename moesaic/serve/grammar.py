"""Structured output: which tokens may come next under a JSON schema, a regular expression or a grammar, by xgrammar.

A client's grammar is tried in a process of its own before it is compiled here: grammar_trial.py says why.
"""

import json
import math
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
from moesaic.serve.grammar_trial import Vocabulary, compile_grammar
from moesaic.serve.sampler import Mask, RequestError

_CACHED = 32
_MAX_DEPTH = 64
_START_SECONDS = 120.0
# What one request's grammar may take of the engine's thread. Of a vocabulary of 200,000 tokens (GPT-4o's), 600 random
# ones by ordinary grammars took at most 1.7 ms each on average (addresses by a regular expression; a schema of 60 parts
# 1.1) and 33 ms at once, on one core of a Xeon; ambiguous grammars take 300 and more, and more with each token.
_BURST_SECONDS = 1.0
_SECONDS_PER_TOKEN = 0.004
_TRIAL = Path(__file__).with_name("grammar_trial.py")

# What xgrammar would pass over in silence, so that a text could break the schema it was promised to keep.
_UNENFORCED = frozenset(
    {"not", "if", "then", "else", "contains", "minContains", "maxContains", "multipleOf", "dependentRequired",
     "dependentSchemas", "dependencies", "unevaluatedProperties", "$dynamicRef", "$recursiveRef"}
)  # fmt: skip
# What may stand beside keywords that xgrammar takes alone.
_ANNOTATIONS = frozenset(
    {"title", "description", "default", "examples", "$defs", "definitions", "$schema", "$id", "$comment", "deprecated",
     "readOnly", "writeOnly", "discriminator"}
)  # fmt: skip
# Keywords that say nothing to xgrammar without a type, and others that give it one.
_NEED_A_TYPE = (
    (frozenset({"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}), frozenset({"integer", "number"}),
     frozenset[str]()),
    (frozenset({"minLength", "maxLength", "pattern", "format"}), frozenset({"string"}), frozenset[str]()),
    (frozenset({"patternProperties", "propertyNames", "minProperties", "maxProperties"}), frozenset({"object"}),
     frozenset({"properties", "additionalProperties"})),
    (frozenset({"minItems", "maxItems"}), frozenset({"array"}),
     frozenset({"items", "prefixItems", "unevaluatedItems"})),
)  # fmt: skip
# A pattern's own characters go into the JSON string as they are; its classes leave these two out.
# One that is not closed is refused by xgrammar; here it goes to the end, or looking for it would take for ever.
_ESCAPE_OR_CLASS = re.compile(r"(\\.)|\[(?:\\.|[^\]\\])*\]?", re.DOTALL)
_BREAKS_A_STRING = re.compile(r'"|\\\\|\\x(?:22|5c)|\\u\{?0*(?:22|5c)\}?', re.IGNORECASE)
# A character beyond ASCII, escaped or not; what else is escaped is found too, so that its second half is not.
_BEYOND_ASCII = re.compile(r"\\?([^\x00-\x7f])|\\.", re.DOTALL)
_ESCAPE = re.compile(r"\\(?:u\{([0-9a-fA-F]+)\}|u([0-9a-fA-F]{4})|.)", re.DOTALL)
_NAMED_CLASS = re.compile(
    r"\[:\^?(?:alnum|alpha|ascii|blank|cntrl|digit|graph|lower|print|punct|space|upper|word|xdigit):\]"
)
# What xgrammar 0.2.9 takes and UTF-8 has not: second bytes of a surrogate (ED), and of a character written too long.
_NO_SECOND_BYTES = {0xED: range(0xA0, 0xC0), 0xE0: range(0x80, 0xA0), 0xF0: range(0x80, 0x90)}
_MAPS_OF_SCHEMAS = frozenset({"properties", "patternProperties", "$defs", "definitions"})
_SCHEMAS = frozenset(
    {"items", "additionalItems", "prefixItems", "additionalProperties", "unevaluatedProperties", "unevaluatedItems",
     "propertyNames", "anyOf", "oneOf", "allOf"}
)  # fmt: skip


class GrammarCompiler:
    """Makes grammars of one tokenizer's tokens; the last ones are kept. May be used from several threads.

    One grammar is tried at a time; who asks for one that is kept does not wait for that.
    The first compile waits for the trying process to start (seconds: it imports torch); start() lets it begin before.
    A grammar that takes longer than its timeout is refused, and the process that is still at it is killed.
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
        """Return the compiled grammar where it is kept, at once."""
        with self._cache_lock:
            if grammar in self._cache:
                self._cache.move_to_end(grammar)
            return self._cache.get(grammar)

    def compile(self, grammar: Grammar) -> "CompiledGrammar":
        """Return the compiled grammar.

        Raises: ConfigError for one that is too large, too deep, broken, too slow, or that asks for what cannot be
        kept; GrammarProcessError where the trying process does not start.
        """
        if (kept := self.find(grammar)) is not None:
            return kept
        self._check(grammar)
        with self._trying:
            if (kept := self.find(grammar)) is not None:  # somebody else's was under way
                return kept
            ours = _with_escaped_patterns(grammar)
            error = self._begin().try_out(ours, self._timeout_seconds)
            assert self._vocabulary is not None
            if error is not None:
                if not self._trial or not self._trial.is_alive:
                    self._trial = None
                    self._begin()
                raise ConfigError(
                    f"the {_name(grammar)} {_shown(grammar.text)} cannot be used: {error}; one that xgrammar compiles "
                    f"and follows within {self._timeout_seconds:g} s is required; mend or simplify it."
                )
            inner = compile_grammar(self._vocabulary, ours.kind, ours.text)
            compiled = CompiledGrammar(inner, self._vocab_size, self._stop_ids, self._not_behind)
            with self._cache_lock:
                self._cache[grammar] = compiled
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

    def _check(self, grammar: Grammar) -> None:
        name, text = _name(grammar), grammar.text
        try:
            size = len(text.encode("utf-8"))
        except UnicodeEncodeError:
            raise ConfigError(
                f"the {name} holds half of a surrogate pair; text that UTF-8 can hold is required; mend it."
            ) from None
        if size > self._max_bytes:
            raise ConfigError(
                f"the {name} has {size} bytes; at most {self._max_bytes} are allowed; shorten it, or have "
                f"max_grammar_bytes raised."
            )
        if grammar.kind == "json_object":
            if text:
                raise ConfigError(
                    f"json_object comes with the text {_shown(text)}; it takes none; leave it out, or use json_schema."
                )
        elif not text.strip():
            raise ConfigError(f"the {name} is empty; one is required; write it, or ask for no grammar.")
        if grammar.kind in ("regex", "ebnf") and (found := _read_otherwise(text, is_regex=grammar.kind == "regex")):
            raise ConfigError(
                f"the {name} {_shown(text)} holds {found}, which would be read as something else; only what is kept as "
                f"written is taken; write it otherwise."
            )
        if grammar.kind == "json_schema":
            _check_schema(_read_schema(text, name), name)
        if grammar.kind == "tool_calls":
            try:
                functions = dict(json.loads(text)["functions"])
            except (ValueError, TypeError, KeyError, RecursionError):
                raise ConfigError(
                    f"the {name} is {_shown(text)}; what tool_calls.calls_grammar makes is required; let it make it."
                ) from None
            for function, schema in functions.items():
                of_tool = f"JSON schema of the tool {_shown(function)}"
                _check_schema(_read_schema(json.dumps(schema), of_tool), of_tool)


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


class GrammarProcessError(MoesaicError):
    """The process that tries grammars does not start: no request is to blame, and a later one starts it anew."""


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
        """Return what is wrong with a grammar, None for nothing. The process ends where it does not answer."""
        if not self._is_ready:
            if self._receive(self._begun + _START_SECONDS) is None:
                self.end()
                raise GrammarProcessError(
                    f"the process that tries grammars did not start within {_START_SECONDS:g} s; xgrammar must be "
                    f"importable there; run `{sys.executable} -c 'import xgrammar'` to see why it is not."
                )
            self._is_ready = True
            self._writer.join()
        self._send({"kind": grammar.kind, "text": grammar.text})
        answer = self._receive(time.monotonic() + timeout_seconds)
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
    return _shown(lines[0].rstrip("."), 200, quoted=False) if lines else "it is refused without a reason"


def _name(grammar: Grammar) -> str:
    names = {
        "json_schema": "JSON schema",
        "regex": "regular expression",
        "ebnf": "grammar",
        "tool_calls": "grammar of the tools' calls",
    }
    return names.get(grammar.kind, grammar.kind)


def _shown(text: str, length: int = 60, *, quoted: bool = True) -> str:
    short = text if len(text) <= length else f"{text[:length]}..."
    return repr(short) if quoted else short


def _read_schema(text: str, name: str) -> dict[str, Any]:
    try:
        schema = json.loads(text, parse_constant=_refuse_constant, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            f"the {name} {_shown(text)} cannot be read as JSON ({error}); an object with keywords is required; mend it."
        ) from None
    if not isinstance(schema, dict):
        raise ConfigError(f"the {name} is {_shown(text)}; an object with keywords is required; write one.")
    return schema


def _check_schema(schema: dict[str, Any], name: str) -> None:
    if _depth(schema) > _MAX_DEPTH:
        raise ConfigError(
            f"the {name} is nested more than {_MAX_DEPTH} deep; at most that is allowed; flatten it, or name "
            f"parts of it in $defs and use $ref."
        )
    for where, each in _subschemas(schema, ""):
        found = _unkept(each)
        if found:
            raise ConfigError(
                f"the {name} uses {_shown(', '.join(found), 200, quoted=False)} at "
                f"{_shown(where, 100, quoted=False) or 'its top'}; only what can be kept token by token is taken, and "
                f"a $ref within the schema; leave it out and check the finished text."
            )


def _unkept(schema: dict[str, Any]) -> list[str]:
    """Return what of one schema xgrammar 0.2.8 would pass over, found by trying each keyword against bad texts."""
    found = sorted(_UNENFORCED & schema.keys())
    if schema.get("uniqueItems") is True:
        found.append("uniqueItems")
    if isinstance(schema.get("allOf"), list) and len(schema["allOf"]) > 1:
        found.append("allOf of several")
    for key in ("$ref", "anyOf", "oneOf", "allOf", "enum", "const"):
        beside = sorted(schema.keys() - _ANNOTATIONS - {key} - ({"type"} if key in ("enum", "const") else set()))
        if key in schema and beside:
            found.append(f"{key} beside {', '.join(beside)}")
    reference = schema.get("$ref", "#")
    if not (isinstance(reference, str) and (reference == "#" or reference.startswith("#/"))):
        found.append(f"$ref to {_shown(str(reference))}")
    named = schema.get("type")
    types = {each for each in (named if isinstance(named, list) else [named]) if isinstance(each, str)}
    if types:
        choices = schema["enum"] if isinstance(schema.get("enum"), list) else []
        choices = [*choices, *([schema["const"]] if "const" in schema else [])]
        found += [f"{_shown(json.dumps(each))} that is no {named}" for each in choices if not _types(each) & types]
    for keys, needed, giving in _NEED_A_TYPE:
        if (used := sorted(keys & schema.keys())) and not (types & needed or (not types and giving & schema.keys())):
            found.append(f"{', '.join(used)} without type {' or '.join(sorted(needed))}")
    properties, required = schema.get("properties", {}), schema.get("required", [])
    if isinstance(properties, dict) and isinstance(required, list):
        found += [f"required {_shown(each)}, which is not in properties" if isinstance(each, str)
                  else f"required {_shown(json.dumps(each), quoted=False)}, which is no name"
                  for each in required if not isinstance(each, str) or each not in properties]  # fmt: skip
    found += _unkept_names(schema)
    patterns = [schema["pattern"]] if "pattern" in schema else []
    patterns += schema["patternProperties"] if isinstance(schema.get("patternProperties"), dict) else []
    found += filter(None, (_read_otherwise(str(pattern), is_regex=True) for pattern in patterns))
    if "pattern" in schema and schema.keys() & {"minLength", "maxLength", "format"}:
        found.append("pattern together with a length or a format")
    if any(_BREAKS_A_STRING.search(_ESCAPE_OR_CLASS.sub(r"\1", str(pattern))) for pattern in patterns):
        found.append("a pattern with a quotation mark or a backslash")
    return found


def _unkept_names(schema: dict[str, Any]) -> list[str]:
    """Return what of one schema xgrammar 0.2.9 would not hold an object's names to.

    A listed name is held to properties alone, and with names listed no other is to a pattern; one of several patterns
    is enough; names of propertyNames may be there whatever else is forbidden. A name that is not listed may come again,
    and counts each time.
    """
    found = []
    patterns, is_closed = schema.get("patternProperties"), schema.get("additionalProperties") is False
    if patterns and schema.get("properties"):
        found.append("patternProperties beside properties")
    if isinstance(patterns, dict) and len(patterns) > 1:
        found.append("patternProperties of several")
    if "propertyNames" in schema:
        found += [f"propertyNames beside {key}" for key in ("properties", "patternProperties") if schema.get(key)]
        if is_closed:
            found.append("propertyNames beside additionalProperties that are false")
    least, required = schema.get("minProperties"), schema.get("required")
    count = len({each for each in required if isinstance(each, str)}) if isinstance(required, list) else 0
    may_repeat = not is_closed or bool(patterns) or "propertyNames" in schema
    if isinstance(least, int | float) and least > max(1, count) and may_repeat:
        found.append("minProperties above 1 where names may come again")
    return found


def _read_otherwise(text: str, *, is_regex: bool) -> str | None:
    """Return what of a regular expression or a grammar xgrammar 0.2.8 reads otherwise, and without a warning."""
    for escape in _ESCAPE.finditer(text):
        code = int(escape[1] or escape[2] or "0", 16)
        if code > sys.maxunicode or 0xD800 <= code < 0xE000:
            return f"{escape[0]}, no character"
    named = _NAMED_CLASS.search(text) if is_regex else None
    return None if named is None else f"{named[0]}, a class by its name"


def _with_escaped_patterns(grammar: Grammar) -> Grammar:
    """Return a grammar that means the same, with no character beyond ASCII in the patterns of its schemas.

    xgrammar 0.2.9 lets a pattern that holds one match quotation marks, backslashes and line ends in a JSON string.
    """
    if grammar.kind not in ("json_schema", "tool_calls"):
        return grammar
    values = json.loads(grammar.text)
    is_changed = False
    for outermost in (values,) if grammar.kind == "json_schema" else values["functions"].values():
        for _, schema in _subschemas(outermost, ""):
            if isinstance(pattern := schema.get("pattern"), str) and (escaped := _escaped(pattern)) != pattern:
                schema["pattern"], is_changed = escaped, True
            if isinstance(patterns := schema.get("patternProperties"), dict):
                renamed = {_escaped(pattern): each for pattern, each in patterns.items()}
                if renamed.keys() != patterns.keys():
                    schema["patternProperties"], is_changed = renamed, True
    return grammar.replace(text=json.dumps(values)) if is_changed else grammar


def _escaped(pattern: str) -> str:
    """Return a pattern with its characters beyond ASCII as escapes."""

    def escape(found: re.Match[str]) -> str:
        character = found[1]
        is_half = character is not None and 0xD800 <= ord(character) < 0xE000
        return found[0] if character is None or is_half else f"\\u{{{ord(character):x}}}"

    return _BEYOND_ASCII.sub(escape, pattern)


def _types(value: Any) -> set[str]:
    """Return the names of JSON schema that a value's type has."""
    if isinstance(value, bool):
        return {"boolean"}
    if isinstance(value, int | float):
        return {"number", "integer"} if value == int(value) else {"number"}
    names = {type(None): "null", str: "string", list: "array", dict: "object"}
    return {names[type(value)]}


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _finite(number: str) -> float:
    if math.isinf(float(number)):
        raise ValueError(f"{_shown(number, quoted=False)} is too large a number")
    return float(number)


def _depth(value: Any) -> int:
    """Return how deep lists and objects stand in one another."""
    depth, level = 0, [value]
    while level := [each for each in level if isinstance(each, dict | list)]:
        depth += 1
        level = [inner for each in level for inner in (each.values() if isinstance(each, dict) else each)]
    return depth


def _subschemas(schema: dict[str, Any], where: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each schema within a schema and its place; a property may be called as a keyword is."""
    yield where, schema
    for key, value in schema.items():
        if key in _MAPS_OF_SCHEMAS and isinstance(value, dict):
            inner = list(value.items())
        elif key in _SCHEMAS:
            inner = list(enumerate(value)) if isinstance(value, list) else [("", value)]
        else:
            continue
        for name, each in inner:
            if isinstance(each, dict):
                yield from _subschemas(each, f"{where}/{key}" + (f"/{name}" if name != "" else ""))
