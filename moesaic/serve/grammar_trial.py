"""Compiling grammars with xgrammar, and a program of its own that tries them: a process that may hang, grow or crash.

xgrammar can be neither interrupted nor told a limit of memory, and a grammar of a few bytes can take it hours. So
grammar.py lets this program compile each one first and use it for some tokens; what fails here, fails here only. Each
is tried in a fork, so that after one that failed the next need not wait for the imports. The program imports nothing of
moesaic, and speaks JSON, a line each way.
"""

import ast
import json
import os
import random
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from functools import cached_property, partial
from typing import Any

_MEMORY_BYTES = 2 << 30
_STACK_BYTES = 4 << 20  # less than other threads have, so what fits here fits there
_WALKS, _WALK_TOKENS = 3, 48
_CONTROL = frozenset(range(32)) - frozenset(b"\r\n")
# What xgrammar 0.2.9 takes for a character and UTF-8 does not: a surrogate, or one written too long.
_NO_CHARACTER = re.compile(rb"\xed[\xa0-\xbf]|\xe0[\x80-\x9f]|\xf0[\x80-\x8f]")
# At most so much in a row between the parts of JSON: a weak model takes all that it may have, and with 32 line ends for
# each part an answer did not come to its end.
_WHITESPACE = 1
_SHORT_ESCAPES = {'"': '"', "\\": "\\", "/": "/", "\b": "b", "\f": "f", "\n": "n", "\r": "r", "\t": "t"}
# How many texts of a schema's patterns are drawn, of each at least so many; how often one ends where it may, and how
# often its next byte is a printable one of ASCII; and which share of the time that is left it may take.
_DRAWS, _LEAST_DRAWS, _END_SHARE, _PLAIN_SHARE, _DRAWING_SHARE = 256, 8, 0.2, 0.9, 0.25


class Vocabulary:
    """xgrammar's view of a tokenizer: the bytes of each token; those with none are never allowed."""

    def __init__(self, tokens: list[bytes], vocab_size: int, stop_ids: list[int]) -> None:
        """Hold the tokens of a model with vocab_size logits."""
        self._tokens, self._vocab_size, self._stop_ids = tokens, vocab_size, stop_ids

    @cached_property
    def of_text(self) -> Any:
        """For any text."""
        return self._info(self._tokens)

    @cached_property
    def of_json(self) -> Any:
        """For JSON, without control characters but line ends: xgrammar 0.2.8 lets them into strings with a length."""
        return self._info([token if _CONTROL.isdisjoint(token) else b"" for token in self._tokens])

    def _info(self, tokens: list[bytes]) -> Any:
        import xgrammar

        tokens = [b"" if _NO_CHARACTER.search(token) else token for token in tokens]
        return xgrammar.TokenizerInfo(
            tokens, xgrammar.VocabType.RAW, vocab_size=self._vocab_size, stop_token_ids=self._stop_ids,
            add_prefix_space=False,
        )  # fmt: skip


# Of bytes, and an end.
_BYTES_SIZE = 257
_BYTES = Vocabulary([bytes([each]) for each in range(256)], _BYTES_SIZE, [256])


def compile_grammar(vocabulary: Vocabulary, kind: str, text: str) -> Any:
    """Return xgrammar's compiled grammar.

    Raises: RuntimeError as xgrammar does.
    """
    import xgrammar

    info = vocabulary.of_text if kind in ("regex", "ebnf") else vocabulary.of_json
    compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)
    if kind == "regex":
        return compiler.compile_regex(text)
    if kind == "ebnf":
        return compiler.compile_grammar(text)
    # Not its strict mode: there an object without listed properties is always empty.
    options: dict[str, Any] = {"strict_mode": False, "max_whitespace_cnt": _WHITESPACE}
    if kind == "tool_calls":
        described = json.loads(text)
        made = xgrammar.Grammar.from_structural_tag(_tool_calls(described["functions"], described["is_single"]))
        if described.get("otherwise") is not None:
            other = xgrammar.Grammar.from_json_schema(json.dumps(described["otherwise"]), **options)
            made = xgrammar.Grammar.union(other, made)
    else:
        made = xgrammar.Grammar.from_json_schema('{"type": "object"}' if kind == "json_object" else text, **options)
    written = _with_whole_escapes(_with_names_apart(_with_small_exponents(_without_surrogates(str(made)))))
    return compiler.compile_grammar(xgrammar.Grammar.from_ebnf(written))


def _without_surrogates(grammar: str) -> str:
    """Return a grammar of schemas whose strings have no escape of half a character, which many readers refuse."""
    digit = "[A-Fa-f0-9]"
    any_four = f'("u" {digit} {digit} {digit} {digit})'
    others = f'("u" [ABCEFabcef0-9] {digit} {digit} {digit}) | ("u" [Dd] [0-7] {digit} {digit})'
    pair = f'("u" [Dd] [89ABab] {digit} {digit} "\\\\u" [Dd] [CDEFcdef] {digit} {digit})'
    short = ' ::= (([\\"\\\\/bfnrt]) | '
    return grammar.replace(f"{short}{any_four})", f"{short}{others} | {pair})")


def _with_small_exponents(grammar: str) -> str:
    """Return a grammar of schemas whose numbers have two digits of exponent at most: no float holds 1e999."""
    return re.sub(r"(\(\[eE\] \w+ \w+)\{1, -1\}", r"\1{1, 2}", grammar)


def _with_whole_escapes(grammar: str) -> str:
    """Return a grammar whose escapes end where they do: xgrammar 0.2.9 writes ße as \\xdfe, and reads U+0DFE."""
    return re.sub(r"\\x([0-9a-f]{2})|\\.", lambda found: f"\\U000000{found[1]}" if found[1] else found[0], grammar)


def _with_names_apart(grammar: str) -> str:
    """Return a grammar of schemas in which names beside the listed ones are others, however they are written.

    xgrammar 0.2.9 leaves the listed ones out byte by byte, where a character of its own is meant, and reads no escapes:
    a listed "é" may come again with any value, beside "a" a "\\u0061" may, and beside one with a quotation mark what is
    no JSON. Here such a name begins as a listed one does only without escapes by number.
    """
    rules = dict(line.split(" ::= ", 1) for line in grammar.split("\n") if " ::= " in line)
    for rule, body in list(rules.items()):
        first = re.match(r'\(\("\\"" (\w+)\)\) \(=', body) if "addl_key" in rule else None
        others = re.search(r'\("\\\\" (\w+) (\w+)\)', rules[first[1]]) if first is not None else None
        if first is not None and others is not None:
            listed = _take_listed(rules, first[1])
            rules |= _other_names(listed, first[1], escape=others[1], rest=others[2])
    return "".join(f"{rule} ::= {body}\n" for rule, body in rules.items())


def _take_listed(rules: dict[str, str], first: str) -> list[str]:
    """Take xgrammar's rules for names that are not listed out of others; return the listed ones."""
    names, pending = [], [(b"", first)]
    while pending:
        begun, rule = pending.pop()
        body = rules.pop(rule)
        if '("\\"") | ' not in body:
            names.append(begun.decode("utf-8"))
        for letter, following in re.findall(r'\("(\\x..|\\.|[^"\\])" (\w+)\)', body):
            letter = "?" if letter == r"\?" else ast.literal_eval(f'"{letter}"')  # which Python writes without a stroke
            pending.append((begun + letter.encode("latin-1"), following))
    return names


def _other_names(listed: list[str], first: str, *, escape: str, rest: str) -> dict[str, str]:
    """Return rules for what follows the quotation mark of names that are not listed.

    escape, rest: xgrammar's rules for what follows a backslash, and for the rest of any name.
    """
    tree: dict[str, Any] = {}
    for name in listed:
        node = tree
        for letter in name:
            node = node.setdefault(letter, {})
        node[""] = {}  # one ends here
    rules: dict[str, str] = {}
    pending = [(first, tree)]
    while pending:
        rule, node = pending.pop()
        letters = [letter for letter in node if letter]
        excluded = "".join(map(_escaped, letters))
        choices = [f'([^\\0-\\x1f\\"\\\\{excluded}] {rest})', *([] if "" in node else ['("\\"")'])]
        for letter in letters:
            below = f"{first}_{len(rules) + len(pending)}_other"
            pending.append((below, node[letter]))
            if letter >= " " and letter not in '"\\':
                choices.append(f'("{_escaped(letter)}" {below})')
            if letter in _SHORT_ESCAPES:
                choices.append(f'("\\\\{_escaped(_SHORT_ESCAPES[letter])}" {below})')
        short = "".join(_escaped(each) for letter, each in _SHORT_ESCAPES.items() if letter not in node)
        if not letters:
            choices.append(f'("\\\\" {escape} {rest})')
        elif short:
            choices.append(f'("\\\\" [{short}] {rest})')
        rules[rule] = f"({' | '.join(choices)})"
    return rules


def _escaped(letter: str) -> str:
    return letter if letter.isascii() and letter.isalnum() else f"\\U{ord(letter):08x}"


def _tool_calls(functions: dict[str, Any], is_single: bool) -> dict[str, Any]:
    """Return xgrammar's description of calls in the form that tool_calls.py reads."""
    tags = [
        {
            "type": "tag",
            "begin": f'<tool_call>\n{{"name": {json.dumps(name)}, "arguments": ',
            "content": {"type": "json_schema", "json_schema": schema, "max_whitespace_cnt": _WHITESPACE},
            "end": "}\n</tool_call>",
        }
        for name, schema in functions.items()
    ]
    calls = {"type": "tags_with_separator", "tags": tags, "separator": "\n", "at_least_one": True}
    return {"type": "structural_tag", "format": {**calls, "stop_after_first": is_single}}


def _walk(compiled: Any, vocab_size: int, stop_ids: list[int], seed: int) -> bool:
    """Let a grammar choose some tokens by chance; return whether it ever allowed one."""
    import numpy as np
    import xgrammar

    matcher, source = xgrammar.GrammarMatcher(compiled), random.Random(seed)
    bits = xgrammar.allocate_token_bitmask(1, vocab_size)
    for step in range(_WALK_TOKENS):
        matcher.fill_next_token_bitmask(bits)
        ids = np.flatnonzero(np.unpackbits(bits.numpy()[0].view(np.uint8), count=vocab_size, bitorder="little"))
        going_on = np.setdiff1d(ids, stop_ids, assume_unique=True)
        if len(going_on) == 0:
            return step > 0 or bool(matcher.is_completed())
        matcher.accept_token(int(source.choice(going_on)))
    return True


def _find_misread(patterns: list[str], seconds: float) -> str | None:
    """Return what is wrong where a text that xgrammar takes for a pattern's is not one by Python's reading.

    xgrammar 0.2.9 joins choices that begin alike, so that (a|a{1,2}) lets aaaa through. Texts are drawn, for so many
    seconds at most, so that one which is wrong may be missed; patterns that Python reads otherwise are passed over.
    """
    deadline = time.monotonic() + seconds
    readable = {pattern: found for pattern in patterns if (found := _in_python(pattern)) is not None}
    for pattern, expression in readable.items():
        if time.monotonic() > deadline:
            return None
        compiled = compile_grammar(_BYTES, "json_schema", json.dumps({"type": "string", "pattern": pattern}))
        for seed in range(max(_LEAST_DRAWS, _DRAWS // len(readable))):
            if time.monotonic() > deadline:
                return None
            value = _draw_string(compiled, random.Random(seed))
            if value is not None and not expression.search(value):
                return f"{value!r} would pass for a match of the pattern {pattern!r}"
    return None


def _draw_string(compiled: Any, source: random.Random) -> str | None:
    """Return a string that a grammar of strings lets through; None where it came to no end, or is no string."""
    import numpy as np
    import xgrammar

    matcher, written = xgrammar.GrammarMatcher(compiled), bytearray()
    bits = xgrammar.allocate_token_bitmask(1, _BYTES_SIZE)
    for _ in range(_WALK_TOKENS):
        matcher.fill_next_token_bitmask(bits)
        ids = np.flatnonzero(np.unpackbits(bits.numpy()[0].view(np.uint8), count=_BYTES_SIZE, bitorder="little"))
        if matcher.is_completed() or len(ids) == 0:
            break
        if ord('"') in ids and written and source.random() < _END_SHARE:
            ids = np.array([ord('"')])
        plain = ids[(ids >= 32) & (ids < 127)]
        token = int(source.choice(plain if len(plain) and source.random() < _PLAIN_SHARE else ids))
        matcher.accept_token(token)
        written.append(token)
    try:
        return json.loads(written, strict=False) if matcher.is_completed() else None
    except ValueError:
        return None


def _in_python(pattern: str) -> "re.Pattern[str] | None":
    """Return a pattern of ECMAScript as Python reads it; None where it may read it otherwise."""
    if re.search(r"\(\?(?!:)|\[\^?\]", pattern):
        return None
    parts, is_class = [], False
    for part in re.findall(r"\\u\{[0-9a-fA-F]{1,6}\}|\\.|.", pattern, re.DOTALL):
        if part.startswith("\\u{"):
            part = f"\\U{int(part[3:-1], 16):08x}"
        elif len(part) == 2 and part[1].isalnum() and part[1] not in "dDwWnrtfvxu":
            return None
        elif part == "$" and not is_class:
            part = r"\Z"
        elif part == "[":
            part, is_class = (r"\[" if is_class else part), True
        elif part == "]":
            is_class = False
        parts.append(part)
    try:
        return re.compile("".join(parts), re.ASCII | re.DOTALL)
    except (re.error, OverflowError, RecursionError):
        return None


class _Warnings:
    """What xgrammar prints beside its results: what it has read otherwise than it was written, an anchor say."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115  # for as long as the process lives
        os.dup2(self._file.fileno(), 2)

    def take(self) -> str | None:
        """Return the first one since the last call."""
        self._file.seek(0)
        lines = self._file.read(4096).decode("utf-8", "replace").splitlines()
        self._file.seek(0)
        self._file.truncate()
        first = next((line.partition("Warning: ")[2] for line in lines if "Warning: " in line), None)
        return None if first is None else first.partition("; falling back")[0]  # which nobody does here


def _limit_memory() -> None:
    try:
        import resource
        from pathlib import Path

        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + _MEMORY_BYTES, used + _MEMORY_BYTES))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_STACK, (_STACK_BYTES, resource.getrlimit(resource.RLIMIT_STACK)[1]))
    except (ImportError, OSError, ValueError):
        return  # not on this system; the deadline holds all the same


def _in_a_fork(try_out: Callable[[], str | None], seconds: float) -> str | None:
    """Return what a function says in a process of its own, which may take so many seconds."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            # It ends by itself then, whatever it computes, and whatever becomes of the process that waits for it.
            signal.setitimer(signal.ITIMER_REAL, seconds)
            os.close(0)
            os.close(1)  # whose end says that the process that waits has ended
            with os.fdopen(writing, "w") as pipe:
                json.dump(try_out(), pipe)
            os._exit(0)
        finally:
            os._exit(1)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        answer = pipe.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGALRM:
        return f"it took longer than {seconds:g} s"
    return "xgrammar crashed on it" if status else json.loads(answer)


def _answer(error: str | None) -> None:
    # At once with its end: who finds it half there after a deadline takes it for none.
    sys.stdout.write(json.dumps({"error": error}) + "\n")
    sys.stdout.flush()


def main() -> None:
    """Read a vocabulary, then grammars until the end of the input; answer each with its error, or null."""
    first = json.loads(sys.stdin.readline())
    stop_ids, vocab_size = first["stop_ids"], first["vocab_size"]
    vocabulary = Vocabulary([bytes.fromhex(each) for each in first["tokens"]], vocab_size, stop_ids)
    compile_grammar(vocabulary, "json_object", "")  # what it takes to begin is no grammar's time
    _walk(compile_grammar(vocabulary, "regex", "a"), vocab_size, stop_ids, 0)
    _limit_memory()
    warnings = _Warnings()
    _answer(None)

    def try_out(kind: str, text: str, patterns: list[str], seconds: float) -> str | None:
        warnings.take()
        begin = time.monotonic()
        try:
            compiled = compile_grammar(vocabulary, kind, text)
            if (error := warnings.take()) is None and not all(
                _walk(compiled, vocab_size, stop_ids, seed) for seed in range(_WALKS)
            ):
                return "no text of this tokenizer's tokens matches it"
            if error is None:
                error = _find_misread(patterns, _DRAWING_SHARE * (seconds - (time.monotonic() - begin)))
        except (RuntimeError, MemoryError, ValueError) as failure:
            return str(failure) or type(failure).__name__
        return error

    for line in sys.stdin:
        request = json.loads(line)
        seconds = request["seconds"]
        try_this = partial(try_out, request["kind"], request["text"], request["patterns"], seconds)
        _answer(_in_a_fork(try_this, seconds))


if __name__ == "__main__":
    main()
