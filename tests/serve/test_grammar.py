"""Whatever the logits are, a text under a grammar matches it; no grammar stops or blocks who compiles it."""

import datetime
import gc
import ipaddress
import itertools
import json
import os
import re
import selectors
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moesaic.config.serve import Grammar, Sampling
from moesaic.data.tokenizer import Tokenizer
from moesaic.errors import ConfigError, GenerationError, InstallationError
from moesaic.serve import grammar as grammar_module
from moesaic.serve import grammar_trial
from moesaic.serve.grammar import Budget, CompiledGrammar, GrammarCompiler, GrammarProcessError, Matcher
from moesaic.serve.sampler import RequestError, SamplingState, sample
from moesaic.serve.server.tool_calls import ToolCall, ToolCallReader, calls_grammar

pytest.importorskip("xgrammar", reason="structured output needs the extra `structured`")

# More than the tokenizer has, as models pad their vocabulary to.
VOCAB_SIZE = 333
TEXTS = [
    '{"name": "the quick fox", "age": 12, "tags": ["a", "b"], "ok": true}',
    "yes no maybe é 日本 https://a.b/c?d=1",
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(TEXTS * 3, vocab_size=320)


@pytest.fixture(scope="module")
def compiler(tokenizer: Tokenizer) -> Iterator[GrammarCompiler]:
    compiler = GrammarCompiler(tokenizer, vocab_size=VOCAB_SIZE, timeout_seconds=20.0)
    compiler.start()
    yield compiler
    compiler.close()


def write(matcher: Matcher, tokenizer: Tokenizer, seed: int, most: int = 400) -> str:
    """A text whose tokens random logits choose, among them often the end."""
    source = np.random.default_rng(seed)
    state = SamplingState(Sampling(temperature=0.7), [], vocab_size=VOCAB_SIZE, seed=seed)
    likely_end = np.zeros(VOCAB_SIZE, dtype=np.float32)
    likely_end[tokenizer.end_of_text_id] = 4.0
    ids: list[int] = []
    for count in range(most):
        # In the end whatever closes what is open: digits and letters could go on for ever.
        logits = source.normal(size=VOCAB_SIZE).astype(np.float32) + likely_end
        if count > most // 4:
            logits[[tokenizer.encode(letter)[0] for letter in '"]}']] += 9.0
        mask = matcher.mask()
        assert mask[tokenizer.end_of_text_id] == matcher.is_complete
        assert not mask[tokenizer.vocab_size :].any()
        token = sample(logits, state, mask).token_id
        assert matcher.accept(token)
        state.append(token)
        if matcher.is_finished:
            return tokenizer.decode(ids)
        ids.append(token)
    raise AssertionError(f"no end after {tokenizer.decode(ids)!r}")


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "é", 3]}, "minItems": 1, "maxItems": 3},
        "inner": {"$ref": "#/$defs/inner"},
        "not": {"type": "boolean"},
        "code": {"type": "string", "pattern": "^[^a-z]{3}$"},
    },
    "required": ["name", "age", "tags", "not"],
    "additionalProperties": False,
    "$defs": {"inner": {"type": "object", "properties": {"x": {"type": "null"}}, "additionalProperties": False}},
}


@pytest.mark.parametrize("seed", range(12))
def test_text_under_a_schema_is_valid(compiler: GrammarCompiler, tokenizer: Tokenizer, seed: int) -> None:
    grammar = compiler.compile(Grammar(kind="json_schema", text=json.dumps(SCHEMA)))
    value = json.loads(write(grammar.matcher(), tokenizer, seed))
    assert {"name", "age", "tags", "not"} <= value.keys() <= {"name", "age", "tags", "inner", "not", "code"}
    assert isinstance(value["name"], str) and len(value["name"]) <= 12
    assert isinstance(value["age"], int) and 0 <= value["age"] <= 150
    assert 1 <= len(value["tags"]) <= 3 and all(tag in ("a", "é", 3) for tag in value["tags"])
    assert re.fullmatch("[^a-z]{3}", value.get("code", "---"))
    assert isinstance(value["not"], bool) and value.get("inner", {}) in ({}, {"x": None})


@pytest.mark.parametrize("seed", range(8))
def test_json_object_gives_an_object(compiler: GrammarCompiler, tokenizer: Tokenizer, seed: int) -> None:
    matcher = compiler.compile(Grammar(kind="json_object")).matcher()
    assert isinstance(json.loads(write(matcher, tokenizer, seed)), dict)


@pytest.mark.parametrize("seed", range(8))
def test_text_of_calls_is_calls_and_nothing_else(compiler: GrammarCompiler, tokenizer: Tokenizer, seed: int) -> None:
    """As the reader of calls finds them; a name may hold what JSON escapes."""
    functions = {'né"w': {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]},
                 "none": {"type": "object", "properties": {}}}  # fmt: skip
    for is_single in (True, False):
        text = write(compiler.compile(calls_grammar(functions, is_single=is_single)).matcher(), tokenizer, seed)
        found = ToolCallReader().take(text, is_last=True)
        calls = [each for each in found if isinstance(each, ToolCall)]
        assert calls == found and (len(calls) == 1 or not is_single)
        for call in calls:
            arguments = json.loads(call.arguments)
            assert arguments == {} if call.name == "none" else isinstance(arguments.pop("n"), int) and not arguments
            assert call.name in functions


def test_strings_of_calls_have_no_half_of_a_character(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    """Which the reader of calls would take for no call."""
    function = {"type": "object", "properties": {"x": {"type": "string"}}}
    grammar = compiler.compile(calls_grammar({"f": function}, is_single=True))
    for escapes, is_whole in ((r"\ud83d", False), (r"\ud83d\ude00", True)):
        text = f'<tool_call>\n{{"name": "f", "arguments": {{"x":"{escapes}"}}}}\n</tool_call>'
        assert can_be(grammar, tokenizer, text) == is_whole
        assert isinstance(ToolCallReader().take(text, is_last=True)[0], ToolCall) == is_whole


def test_numbers_of_calls_are_finite(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    """Others the reader of calls would take for no call."""
    function = {"type": "object", "properties": {"x": {"type": "number"}, "y": {}}}
    grammar = compiler.compile(calls_grammar({"f": function}, is_single=True))
    for number, is_finite in (("1e999", False), ("-2.5e-99", True)):
        for name in "xy":
            text = f'<tool_call>\n{{"name": "f", "arguments": {{"{name}":{number}}}}}\n</tool_call>'
            assert can_be(grammar, tokenizer, text) == is_finite
            assert isinstance(ToolCallReader().take(text, is_last=True)[0], ToolCall) == is_finite


@pytest.mark.parametrize("seed", range(6))
def test_text_of_calls_or_of_something_else_is_one_of_both(
    compiler: GrammarCompiler, tokenizer: Tokenizer, seed: int
) -> None:
    functions = {"f": {"type": "object", "properties": {}}}
    schema = {"type": "object", "properties": {"a": {"type": "string", "pattern": "^é{2}$"}, "b": {"type": "object"}},
              "required": ["a"], "additionalProperties": False}  # fmt: skip
    grammar = compiler.compile(calls_grammar(functions, is_single=True, otherwise=schema))
    text = write(grammar.matcher(), tokenizer, seed)
    if text.startswith("{"):
        value = json.loads(text)
        assert value["a"] == "éé" and isinstance(value.get("b", {}), dict) and value.keys() <= {"a", "b"}
    else:
        assert ToolCallReader().take(text, is_last=True) == [ToolCall("f", "{}")]
    for begin in ("{", "<tool_call>"):
        matcher = grammar.matcher()
        for token_id in tokenizer.encode(begin):
            matcher.mask()
            matcher.accept(token_id)
    with pytest.raises(ConfigError, match="the JSON schema uses uniqueItems at its top"):
        compiler.compile(calls_grammar(functions, is_single=True, otherwise={"type": "array", "uniqueItems": True}))


@pytest.mark.parametrize("pattern", [r"(yes|no) ?é{1,3}", r"[a-c]{2,5}@[0-9]+\.com", r"日本", r"[^a-z]{3}"])
@pytest.mark.parametrize("seed", range(4))
def test_text_under_a_regular_expression_matches(
    compiler: GrammarCompiler, tokenizer: Tokenizer, pattern: str, seed: int
) -> None:
    matcher = compiler.compile(Grammar(kind="regex", text=pattern)).matcher()
    assert re.fullmatch(pattern, write(matcher, tokenizer, seed))


def can_be(grammar: CompiledGrammar, tokenizer: Tokenizer, text: str) -> bool:
    matcher = grammar.matcher()
    return all(map(matcher.accept, tokenizer.encode(text))) and matcher.is_complete


@pytest.mark.parametrize("pattern", [".{3}", "a.b", r"\..", r"[.\n].", "(x|.){2}", r"\[.\]"])
def test_a_dot_is_no_line_end(compiler: GrammarCompiler, tokenizer: Tokenizer, pattern: str) -> None:
    grammar = compiler.compile(Grammar(kind="regex", text=pattern))
    for seed in range(40):
        text = write(grammar.matcher(), tokenizer, seed)
        assert re.fullmatch(pattern, text) and "\r" not in text[-1:], repr(text)
    for text in ("ab\n", "a\nb", ".\r", ".\n", "x\n", "[\r]", "[\n]"):
        assert not can_be(grammar, tokenizer, text), repr(text)


HOSTNAME = re.compile(r"(?!.{254})[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?(\.[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?)*")
# Of a format: what reads it, texts that have it, texts that have not.
FORMATS: dict[str, tuple[Callable[[str], Any], list[str], list[str]]] = {
    "ipv4": (
        ipaddress.IPv4Address, ["0.0.0.0", "255.249.199.10", "1.20.99.100"],
        ["00.0.0.0", "1.2.3", "256.1.1.1", "1.2.3.04", "1.2.3.4."],
    ),
    "ipv6": (
        ipaddress.IPv6Address, ["::", "::1", "1::", "1:2:3:4:5:6:7:8", "1::8", "fE80::12ab:3", "1:2:3:4:5:6:7::"],
        ["1:2:3:4:5:6:7", "1:2:3:4:5:6:7:8:9", "1::2::3", ":::", "12345::", "::00.26.27.69"],
    ),
    "date": (
        datetime.date.fromisoformat, ["2024-02-29", "2000-02-29", "0001-01-31", "1999-12-31", "2023-04-30"],
        ["2023-02-29", "1900-02-29", "2023-04-31", "0000-12-31", "2023-13-01", "2023-1-1", "3324-11-31"],
    ),
    "time": (
        datetime.time.fromisoformat, ["00:00:00Z", "23:59:59.123456+05:30"],
        ["24:00:00Z", "23:59:60Z", "23:59:59", "23:59:59.Z"],
    ),
    "date-time": (
        datetime.datetime.fromisoformat, ["2024-02-29T12:30:00Z", "1999-12-31T23:59:59.5-11:00"],
        ["2023-02-29T12:30:00Z", "2024-02-29 12:30:00Z", "2024-02-29T12:30:00", "2024-02-29T12:30:60Z"],
    ),
    "hostname": (
        HOSTNAME.fullmatch, ["a", "a-b.example.com", "x" * 40 + ".y", "1.2"],
        ["-a", "a-", "a..b", "a.", "x" * 64, "a_b"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
def test_text_under_a_format_has_it(compiler: GrammarCompiler, tokenizer: Tokenizer, name: str) -> None:
    reads, good, bad = FORMATS[name]
    grammar = compiler.compile(Grammar(kind="json_schema", text=json.dumps({"type": "string", "format": name})))
    for text in good:
        assert reads(text) and can_be(grammar, tokenizer, f'"{text}"'), text
    for text in bad:
        assert not can_be(grammar, tokenizer, f'"{text}"'), text
    for seed in range(40):
        text = json.loads(write(grammar.matcher(), tokenizer, seed))
        assert reads(text), text


@pytest.mark.parametrize("seed", range(6))
def test_text_under_a_grammar_matches(compiler: GrammarCompiler, tokenizer: Tokenizer, seed: int) -> None:
    grammar = Grammar(kind="ebnf", text='root ::= "a" root "]" | "yes" | "é"')
    assert re.fullmatch(r"(a*)(yes|é)(\]*)", text := write(compiler.compile(grammar).matcher(), tokenizer, seed))
    assert text.count("a") == text.count("]")


STRING = {"type": "string"}
A = {"properties": {"a": {"type": "integer"}}}
APART = {"^a-[a-z]$": {"type": "integer"}, "^b-(b|c)$": STRING}
# As pydantic writes a union with a discriminator, one choice of which holds the same again.
KIND = {"type": "object", "additionalProperties": False}
PET = {
    "oneOf": [{"$ref": "#/$defs/Cat"}, {"$ref": "#/$defs/Dog"}, {"$ref": "#/$defs/Pack"}],
    "discriminator": {"propertyName": "kind", "mapping": {"cat": "#/$defs/Cat", "dog": "#/$defs/Dog"}},
}
UNION = {
    "type": "object",
    "properties": {"pets": {"type": "array", "items": PET}},
    "required": ["pets"],
    "$defs": {
        "Cat": {
            **KIND, "properties": {"kind": {**STRING, "const": "cat"}, "lives": {"type": "integer"}},
            "required": ["kind", "lives"],
        },
        "Dog": {
            **KIND, "properties": {"kind": {**STRING, "const": "dog"}, "name": STRING}, "required": ["kind", "name"],
        },
        "Pack": {
            **KIND, "properties": {"kind": {**STRING, "const": "pack"}, "pets": {"type": "array", "items": PET}},
            "required": ["kind", "pets"],
        },
    },
}  # fmt: skip
# A schema, a text that keeps it, one that does not: what is taken is kept.
KEPT = [
    ({"type": "integer", "exclusiveMinimum": 3}, "4", "3"),
    ({"type": "number", "minimum": 1.5}, "1.6", "1.4"),
    ({"type": "number", "maximum": 10}, "9.5", "10.5"),
    ({**STRING, "minLength": 3}, '"abc"', '"ab"'),
    ({**STRING, "maxLength": 5}, '"A"', '"\n"'),
    ({**STRING, "maxLength": 5}, '"A"', '"\t"'),
    ({**STRING, "format": "date"}, '"2020-01-02"', '"x"'),
    ({**STRING, "pattern": "^a+$"}, '"aa"', '"b"'),
    ({**STRING, "pattern": '^[^"a]{1,3}$'}, '"A"', '"""'),
    ({**STRING, "pattern": "^.{1,3}$"}, '"A"', '"""'),
    ({**STRING, "pattern": "^[ -~]$"}, '" "', '"\\"'),
    # With a character beyond ASCII, by which xgrammar's own would let the string end.
    ({**STRING, "pattern": ".|ü"}, '"ü"', '"""'),
    ({**STRING, "pattern": "[^ü日]"}, '"A"', '"\n"'),
    ({**STRING, "pattern": "[^ü日]"}, '"ä"', '"日"'),
    ({**STRING, "pattern": "[!-😀]+"}, '"A日😀"', '"\\"'),
    ({**STRING, "pattern": r"^\ü\.|[^\ü]$"}, '"ü."', '"""'),
    ({"type": "object", "propertyNames": {**STRING, "pattern": ".|ü"}}, '{"ü":1}', '{""":1}'),
    ({"type": "object", "patternProperties": {"[^ü]": {}}, "additionalProperties": False}, '{"a":1}', '{"\n":1}'),
    # xgrammar's own would let the last part of a group through without its first.
    ({**STRING, "pattern": r"^1(\.[0-9]+)?$"}, '"1.25"', '"125"'),
    ({**STRING, "pattern": r"^(?:(a[)?]b*)?c)?$"}, '"a?bc"', '"bc"'),
    ({**STRING, "pattern": r"^\(a+\)?$"}, '"(aa"', '"("'),
    ({"type": "object", "propertyNames": {**STRING, "pattern": "^x(a.*)?$"}}, '{"xab":1}', '{"xb":1}'),
    ({"type": "object"}, '{"a":1}', "1"),
    ({"type": "object", "minProperties": 1}, '{"a":1}', "{}"),
    ({"type": "object", "maxProperties": 1}, '{"a":1}', '{"a":1,"b":2}'),
    ({"type": "object", **A, "required": ["a"]}, '{"a":1,"b":3}', '{"b":2}'),
    ({"type": "object", **A, "additionalProperties": False}, '{"a":1}', '{"a":1,"b":2}'),
    ({**A}, '{"a":1}', '{"a":"x"}'),
    ({"type": "object", "propertyNames": {**STRING, "pattern": "^a$"}}, '{"a":1}', '{"b":1}'),
    ({"type": "object", "patternProperties": {"^a$": {"type": "integer"}}}, '{"a":1}', '{"a":"x"}'),
    ({"type": "object", "patternProperties": APART}, '{"b-c":"x","a-b":1}', '{"a-b":"x"}'),
    ({"type": "object", "patternProperties": APART, "additionalProperties": False}, '{"b-b":"x"}', '{"b-b":1}'),
    ({"type": "object", "patternProperties": {"a": STRING, "b": STRING}}, '{"a":"x","b":"y"}', '{"b":1}'),
    ({"type": "object", "additionalProperties": {"type": "integer"}}, '{"a":1}', '{"a":"x"}'),
    (
        {"type": "object", "patternProperties": {"^a$": {"type": "integer"}}, "additionalProperties": False},
        '{"a":1}',
        '{"b":1}',
    ),
    (
        {"type": "object", "propertyNames": {"enum": ["a", "b"]}, "additionalProperties": {"type": "integer"}},
        '{"b":1}',
        '{"b":"x"}',
    ),
    ({"type": "object", "propertyNames": {"const": "a"}, "properties": {}}, '{"a":1}', '{"b":1}'),
    (
        {
            "type": "object",
            "properties": {"a": {}, "b": {}},
            "additionalProperties": False,
            "minProperties": 2,
        },
        '{"a":1,"b":1}',
        '{"a":1,"a":1}',
    ),
    (
        {"type": "object", "properties": {"a": {}, "b": {}}, "required": ["a", "b"], "minProperties": 2},
        '{"a":1,"b":1}',
        '{"a":1,"c":1}',
    ),
    ({**A, "maxProperties": 1}, '{"a":1}', '{"a":1,"b":2}'),
    ({"type": ["object", "null"], "patternProperties": {"^a$": {"type": "integer"}}}, '{"a":1}', '{"a":"x"}'),
    ({"items": {}, "maxItems": 1}, "[1]", "[1, 2]"),
    ({"type": "array", "prefixItems": [{"type": "integer"}]}, '[1,"a"]', '["a"]'),
    ({"type": "array", "items": {"type": "integer"}, "minItems": 2}, "[1, 2]", "[1]"),
    ({"const": 5, "type": "integer"}, "5", "6"),
    ({"enum": ["a", None]}, "null", "1"),
    ({"const": 2**63 - 1}, "9223372036854775807", "9223372036854775808"),
    ({"const": -(2**63)}, "-9223372036854775808", "-9223372036854775807"),
    ({"type": ["integer", "null"]}, "null", '"a"'),
    ({"oneOf": [{"type": "integer"}, STRING], "title": "x"}, "1", "null"),
    # References into what xgrammar gets in other words; the schema of propertyNames becomes names, and false the rest.
    ({**A, "properties": {"a": {"oneOf": [{"type": "integer"}, STRING]}, "b": {"$ref": "#/properties/a/oneOf/1"}}},
     '{"a":1,"b":"x"}', '{"a":1,"b":2}'),
    ({"oneOf": [{"type": "array", "items": {"$ref": "#/oneOf/0"}}, {"type": "null"}]}, "[[]]", "[null]"),
    ({"properties": {"a": {"type": "array", "items": [STRING], "additionalItems": {"type": "integer"}},
                     "b": {"$ref": "#/properties/a/items/0"}, "c": {"$ref": "#/properties/a/additionalItems"}}},
     '{"a":["x",1],"b":"x","c":1}', '{"b":"x","c":"x"}'),
    ({"properties": {"a": {"type": "object", "propertyNames": {"enum": ["x"]}, "additionalProperties": STRING},
                     "b": {"$ref": "#/properties/a/additionalProperties"}}}, '{"a":{"x":"y"},"b":"x"}', '{"b":1}'),
    ({"properties": {"a": {"type": "object", "patternProperties": {"^(é)?$": STRING}},
                     "b": {"$ref": "#/properties/a/patternProperties/^(é)%3F$"}}}, '{"b":"x"}', '{"b":1}'),
    ({"$defs": {"_0": {"type": "null"}}, "properties": {
        "a": {"oneOf": [STRING, {"$ref": "#/$defs/_0"}]}, "b": {"$ref": "#/properties/a/oneOf/0"}}},
     '{"a":null,"b":"x"}', '{"b":null}'),
    ({"allOf": [{"type": "integer"}]}, "1", '"a"'),
    ({"$ref": "#/$defs/x", "$defs": {"x": {"type": "integer"}}}, "3", '"a"'),
    # Other names than the listed ones are others, however they are written.
    ({**A}, '{"a":1,"\\nx":2,"ab\\u0061":3}', '{"\\u0061":"x"}'),
    ({**A, "required": ["a"], "additionalProperties": STRING}, '{"a":1,"b":"x"}', '{"a":1,"\\u0061":"x"}'),
    ({"properties": {"日é": {"type": "integer"}, "日": {}}}, '{"日é":1,"日本":"x"}', '{"日é":"x"}'),
    ({"properties": {"😀": {"type": "integer"}}, "required": ["😀"]}, '{"😀":1,"😀a":2}', '{"😀":1,"😀":"x"}'),
    ({"properties": {'a"': {"type": "integer"}}}, '{"a\\"":1,"a\\"b":"x","a\\n":2}', '{"a\\"":"x"}'),
    ({"properties": {'a"': {"type": "integer"}}}, '{"a":1}', '{"a"b":1}'),
    ({"properties": {"a\n": {"type": "integer"}}, "maxProperties": 2}, '{"a\\n":1,"a\\nb":"x"}', '{"a\\n":"x"}'),
    ({"properties": {"a\\/": {"type": "integer"}}}, '{"a\\\\/":1,"a\\\\":2}', '{"a\\\\\\/":"x"}'),
    ({"properties": {"a?b": {"type": "integer"}}}, '{"a?b":1,"a?c":"x"}', '{"a?b":"x"}'),
    ({"properties": {"": {"type": "integer"}, "]^-": {}}}, '{"":1,"]^":2}', '{"":"x"}'),
    # No half of a character, by escapes.
    (STRING, '"\\uD83D\\uDe00\\ud7ff\\ue000\\n"', '"\\ud83d"'),
    (STRING, '"\\u0041"', '"\\udc00\\ud83d"'),
    ({"type": "object"}, '{"a\\u00e9":["\\ud83d\\ude00"]}', '{"a":["\\ud83d\\u0041"]}'),
    ({**A}, '{"ab\\ud83d\\ude00":1}', '{"ab\\ud83d":1}'),
    # No number that no float holds.
    ({"type": "number"}, "-1.5e+99", "1e999"),
    ({"type": "object"}, '{"a":[1E-10,1e05]}', '{"a":[1e100]}'),
    # What a $ref leads to is meant as any other schema is, wherever it stands.
    (
        {"properties": {"a": {"$ref": "#/parts/address"}}, "parts": {"address": {**STRING, "format": "ipv4"}}},
        '{"a":"1.2.3.4"}',
        '{"a":"00.2.3.4"}',
    ),
    # As zod writes them: of a format and its pattern the pattern, which nothing empty matches; records; tuples.
    ({**STRING, "format": "email", "pattern": "^[a-z]+@x$"}, '"a@x"', '"a@b.c"'),
    ({**STRING, "format": "ulid", "pattern": "^[0-9A-Z]{2}$", "minLength": 1}, '"0A"', '""'),
    ({**STRING, "pattern": r"^\d*$", "minLength": 0}, '""', '"a"'),
    ({**STRING, "pattern": "^[A-Z]+$", "maxLength": 3}, '"ABC"', '"ABCD"'),
    ({**STRING, "pattern": "^[A-Z]+$", "maxLength": 3}, '"A"', '""'),
    ({**STRING, "pattern": "^ab.*", "minLength": 3, "maxLength": 4}, '"abxy"', '"ab"'),
    ({**STRING, "pattern": r"^\d*$", "minLength": 2, "maxLength": 2}, '"12"', '"123"'),
    (
        {"type": "object", "propertyNames": {**STRING, "enum": ["a", "b"]}, "additionalProperties": {"type": "integer"},
         "required": ["a", "b"]},
        '{"a":1,"b":2}',
        '{"a":1}',
    ),
    ({"type": "array", "items": [{"type": "integer"}, STRING], "additionalItems": False}, '[1, "a"]', '[1, "a", 2]'),
    ({"type": "array", "items": [{"type": "integer"}], "additionalItems": STRING}, '[1, "a"]', "[1, 2]"),
    ({"type": "array", "items": [{"type": "integer"}]}, '[1, "a"]', '["a"]'),
    ({**STRING, "format": "uri", "minLength": 1}, '"a://b"', '""'),
    ({**STRING, "format": "date", "minLength": 1}, '"2026-12-03"', '""'),
    ({"anyOf": [{"type": "integer"}, STRING], "x-kubernetes-int-or-string": True}, "80", "null"),
    # Letters of Latin-1 before what may be a digit of an escape.
    ({"properties": {"Größe": {"type": "integer"}}, "required": ["Größe"], "additionalProperties": False},
     '{"Größe":1}', '{"Grö\u0dfe":1}'),
    ({"properties": {"école": {"enum": ["éa", "ÿ1", "\\xe9"]}}}, '{"école":"éa"}', '{"école":"\u0e9a"}'),
    ({"enum": ["\\xe9a", "ü", "é", "ée"]}, '"ée"', '"\u0e9e"'),
    ({"const": "\\xe9a"}, '"\\\\xe9a"', '"\\\\éa"'),
    (UNION, '{"pets":[{"kind":"cat","lives":9},{"kind":"dog","name":"x"}]}', '{"pets":[{"kind":"cat","name":"x"}]}'),
    (UNION, '{"pets":[{"kind":"pack","pets":[{"kind":"cat","lives":1}]}]}', '{"pets":[{"kind":"pack","pets":[1]}]}'),
]  # fmt: skip


@pytest.mark.parametrize(("schema", "good", "bad"), KEPT, ids=lambda each: json.dumps(each))
def test_what_a_schema_says_is_kept(
    compiler: GrammarCompiler, tokenizer: Tokenizer, schema: dict[str, Any], good: str, bad: str
) -> None:
    grammar = compiler.compile(Grammar(kind="json_schema", text=json.dumps(schema)))
    for text, is_kept in ((good, True), (bad, False)):
        matcher = grammar.matcher()
        assert (all(map(matcher.accept, tokenizer.encode(text))) and matcher.is_complete) == is_kept


@pytest.mark.parametrize(
    "schema",
    [
        {**STRING, "pattern": "^(a|a{1,2})$"},
        {"type": "object", "properties": {"x": {"type": "array", "items": {**STRING, "pattern": "^(a|a(a|))$"}}}},
        {"type": "object", "patternProperties": {"^(a{1,2}|a)$": {"type": "integer"}}},
    ],
)
def test_a_pattern_that_would_be_read_otherwise_is_refused(compiler: GrammarCompiler, schema: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"'aaa+' would pass for a match of the pattern '.*'; one that xgrammar"):
        compiler.compile(Grammar(kind="json_schema", text=json.dumps(schema)))
    functions = {"f": {"type": "object", "properties": {"x": schema}}}
    with pytest.raises(ConfigError, match="would pass for a match"):
        compiler.compile(calls_grammar(functions, is_single=True))


@pytest.mark.parametrize(
    "pattern",
    [
        r"^[A-Z]{2}\d{4}$",
        r"^[\w.+-]+@[\w-]+\.[\w.-]+$", r"^v?\d+\.\d+\.\d+(-[a-z0-9.]+)?$", r"^(foo|foobar)$", r"^\S+$",
        r"^(Mo|Tu|We)(,(Mo|Tu|We))*$", r"^(https?|ftp)://[a-z]+(:[0-9]+)?(/[a-z]*)*$", "^[a-zé日]+$", r"^\u{1F600}+$",
        "^.{1,20}$", r"^[^\n]{1,80}$", r"^[\[\]&|~-]+$", r"^\x41\t?$", "a|b$", "^(yes|no|)$", r"^[\s\S]{2}$", r"^\$1$",
        r"^(?<year>\d{4})$",
    ],
)  # fmt: skip
def test_patterns_that_are_read_as_written_are_taken(compiler: GrammarCompiler, pattern: str) -> None:
    compiler.compile(Grammar(kind="json_schema", text=json.dumps({"type": "string", "pattern": pattern})))


def test_values_are_no_patterns(compiler: GrammarCompiler) -> None:
    values = [{"pattern": each} for each in ("{date}-{name}.txt", "a^b", "*.txt", "^(a|a{1,2})$")]
    schema = {
        "type": "object",
        "properties": {"pattern": {"enum": values}, "a": {**STRING, "default": values[0], "examples": values}},
    }
    compiler.compile(Grammar(kind="json_schema", text=json.dumps(schema)))
    compiler.compile(calls_grammar({"f": schema}, is_single=True))


def test_texts_are_drawn_for_as_long_as_there_is_time() -> None:
    patterns = ["^a+$", "^(a|a{1,2})$"]
    found = grammar_trial._find_misread(patterns, 600.0)
    assert found is not None and found.endswith("would pass for a match of the pattern '^(a|a{1,2})$'")
    assert grammar_trial._find_misread(patterns[:1], 600.0) is None is grammar_trial._find_misread(patterns, 0.0)


def test_tokens_taken_back_leave_no_trace(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    grammar = compiler.compile(Grammar(kind="json_object"))
    matcher, ids = grammar.matcher(), tokenizer.encode('{"a": [1, 2]}')
    masks = []
    for token in [*ids, tokenizer.end_of_text_id]:
        masks.append(matcher.mask().copy())
        assert matcher.accept(token)
    assert matcher.is_finished and matcher.is_complete
    assert not matcher.accept(ids[0])
    with pytest.raises(GenerationError, match="has ended"):
        matcher.mask()
    matcher.rollback(0)
    assert matcher.is_finished
    place = len(masks)
    for count in (1, 3, len(ids) - 3):
        matcher.rollback(count)
        place -= count
        np.testing.assert_array_equal(matcher.mask(), masks[place])
    assert place == 0
    with pytest.raises(AssertionError):
        matcher.rollback(100)


def test_what_is_not_allowed_is_not_accepted_and_changes_nothing(
    compiler: GrammarCompiler, tokenizer: Tokenizer
) -> None:
    matcher = compiler.compile(Grammar(kind="regex", text="yes")).matcher()
    (no,) = tokenizer.encode("n")
    for asked_first in (False, True):
        if asked_first:
            matcher.mask()
        assert not any(map(matcher.accept, [no, tokenizer.end_of_text_id, tokenizer.vocab_size, VOCAB_SIZE, -1]))
    assert all(map(matcher.accept, tokenizer.encode("yes")))
    assert matcher.is_complete and not matcher.is_finished
    assert np.flatnonzero(matcher.mask()).tolist() == [tokenizer.end_of_text_id]


@pytest.mark.parametrize(
    ("kind", "text", "before"),
    [
        ("json_object", "", '{"'),
        ("json_schema", '{"type": "string", "maxLength": 1}', '"'),
        ("json_schema", '{"type": "string", "pattern": "^[^a]$"}', '"'),
        ("regex", "[^a]", ""),
    ],
)
def test_no_token_goes_on_with_half_a_character_to_what_utf_8_has_not(
    compiler: GrammarCompiler, tokenizer: Tokenizer, kind: str, text: str, before: str
) -> None:
    ids = {tokenizer.token_bytes(token_id): token_id for token_id in range(tokenizer.vocab_size)}
    grammar = compiler.compile(Grammar(kind=kind, text=text))
    for first, seconds in ((0xED, range(0x80, 0xA0)), (0xE0, range(0xA0, 0xC0)), (0xF0, range(0x90, 0xC0))):
        matcher = grammar.matcher()
        assert all(map(matcher.accept, tokenizer.encode(before)))
        for second in range(256):
            assert matcher.accept(ids[bytes([first])])
            assert matcher.accept(ids[bytes([second])]) == (second in seconds), (first, second)
            matcher.rollback(2 if second in seconds else 1)
        assert matcher.accept(ids[bytes([first])])
        allowed = {tokenizer.token_bytes(int(each)) for each in np.flatnonzero(matcher.mask())}
        assert {bytes([each]) for each in seconds} <= allowed and {each[0] for each in allowed} == set(seconds)
        matcher.rollback(1)
        assert matcher.mask()[tokenizer.encode("A")[0]]


def test_other_tokens_may_end_it(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    (end,) = tokenizer.encode("\n")
    matcher = compiler.compile(Grammar(kind="regex", text="yes")).matcher(stop_ids=[end])
    assert all(map(matcher.accept, tokenizer.encode("yes")))
    assert np.flatnonzero(matcher.mask()).tolist() == [end]
    assert matcher.accept(end) and matcher.is_finished


def test_a_token_that_ends_a_text_is_none_of_it(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    y, no = (tokenizer.encode(letter)[0] for letter in "yn")
    grammar = compiler.compile(Grammar(kind="regex", text="(y|n)y*"))
    for asks_first in (False, True):
        matcher = grammar.matcher(stop_ids=[y, VOCAB_SIZE])
        if asks_first:
            assert np.flatnonzero(matcher.mask()).tolist() == [no]
        assert not matcher.accept(y) and not matcher.is_finished
        assert matcher.accept(no) and not matcher.is_finished
        assert np.flatnonzero(matcher.mask()).tolist() == [y]
        assert matcher.accept(y) and matcher.is_finished


def test_texts_of_one_grammar_are_apart_and_it_is_compiled_once(
    compiler: GrammarCompiler, tokenizer: Tokenizer
) -> None:
    grammar = Grammar(kind="regex", text="(yes|no)")
    assert compiler.compile(grammar) is compiler.compile(Grammar(kind="regex", text="(yes|no)"))
    one, two = compiler.compile(grammar).matcher(), compiler.compile(grammar).matcher()
    assert one.accept(tokenizer.encode("y")[0])
    assert two.mask()[tokenizer.encode("n")[0]] and not one.mask()[tokenizer.encode("n")[0]]


def nested(depth: int) -> str:
    return '{"items": ' * depth + "{}" + "}" * depth


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        ("json_schema", "", "the JSON schema is empty; one is required; write it"),
        ("json_schema", '{"type', "cannot be read as JSON"),
        ("json_schema", '{"maximum": NaN}', "NaN is no JSON number"),
        ("json_schema", "[1]", "an object with keywords is required"),
        ("json_schema", '{"type": "foo"}', 'Unsupported type "foo"'),
        ("json_schema", nested(64), "nested more than 64 deep"),
        ("json_schema", nested(5000), "nested more than 64 deep|cannot be read as JSON"),
        ("json_schema", '{"type": "integer", "enum": [1e999]}', "1e999 is too large a number"),
        ("json_schema", '{"required": [{}]}', r"required {}, which is no name at its top"),
        (
            "json_schema",
            '{"items": {"required": [["a"]], "properties": {}}}',
            r'required \["a"\], which is no name at /it',
        ),
        ("json_schema", '{"properties": {"%s": {"not": {}}}}' % ("a" * 9000), "uses not at /properties/aaaaa"),
        ("json_schema", '{"$ref": "http://a/b"}', r"\$ref to 'http://a/b' at its top"),
        ("json_schema", '{"properties": {"not": {"not": {}}}}', "uses not at /properties/not"),
        (
            "json_schema",
            '{"items": {"$ref": "#/parts/a"}, "parts": {"a": {"items": {"$ref": "#/parts/b"}}, "b": {"not": {}}}}',
            "uses not at /parts/b",
        ),
        (
            "json_schema",
            '{"items": {"$ref": "#/part"}, "part": {"type": "string", "pattern": "^(a|a{1,2})$"}}',
            "'aaa+' would pass for a match of the pattern",
        ),
        ("json_schema", '{"anyOf": [{"uniqueItems": true}]}', "uses uniqueItems at /anyOf/0"),
        (
            "json_schema",
            '{"enum": [1, [{"a": 9223372036854775808}]]}',
            "uses 9223372036854775808, an integer of more than 64 bits at its top",
        ),
        ("json_schema", '{"allOf": [{}, {}]}', "allOf of several"),
        (
            "json_schema",
            '{"properties": {"at": {"type": "string", "format": "uri", "minLength": 1, "maxLength": 2083}}}',
            "uses format uri together with a length at /properties/at",
        ),
        ("json_schema", '{"type": "string", "pattern": "a", "maxLength": 2}', "pattern together with a length"),
        ("json_schema", '{"type": "string", "pattern": "^ab[c]*$", "maxLength": 1}', "pattern together with a length"),
        ("json_schema", '{"type": "string", "pattern": "^a*$", "minLength": "1"}', "pattern together with a length"),
        ("json_schema", '{"$ref": "#/$defs/a", "minimum": 1, "$defs": {"a": {}}}', r"\$ref beside minimum"),
        ("json_schema", '{"type": "object", "anyOf": [{}]}', "anyOf beside type"),
        ("json_schema", '{"enum": [1, "a"], "type": ["string", "null"]}', "1' that is no"),
        ("json_schema", '{"const": 1.5, "type": "integer"}', "1.5' that is no integer"),
        ("json_schema", '{"items": {"minimum": 5}}', "minimum without type integer or number at /items"),
        ("json_schema", '{"patternProperties": {"^a$": {}}}', "patternProperties without type object"),
        ("json_schema", '{"propertyNames": {"const": "a"}}', "propertyNames without type object"),
        (
            "json_schema",
            '{"anyOf": [{"maxProperties": 2, "minProperties": 1}]}',
            "maxProperties, minProperties without type object at /anyOf/0",
        ),
        ("json_schema", '{"maxItems": 2}', "maxItems without type array"),
        ("json_schema", '{"type": "object", "required": ["a"]}', "required 'a', which is not in properties"),
        ("json_schema", '{"properties": {"a": {}}, "unevaluatedProperties": false}', "uses unevaluatedProperties at"),
        (
            "json_schema",
            '{"items": {"properties": {"a": {}}, "patternProperties": {"^x": {"type": "null"}}}}',
            "uses patternProperties beside properties at /items",
        ),
        (
            "json_schema",
            '{"patternProperties": {"^a$": {}, "^[ab]$": {"type": "null"}}}',
            "patternProperties of several",
        ),
        (
            "json_schema",
            '{"propertyNames": {"const": "a"}, "properties": {"b": {}}}',
            "propertyNames beside properties",
        ),
        (
            "json_schema",
            '{"propertyNames": {"const": "a"}, "patternProperties": {"^b$": {}}}',
            "propertyNames beside patternProperties at its top",
        ),
        (
            "json_schema",
            '{"propertyNames": {"const": "a"}, "additionalProperties": false}',
            "propertyNames beside additionalProperties that are false",
        ),
        ("json_schema", '{"type": "object", "minProperties": 2}', "minProperties above 1 where names may come again"),
        (
            "json_schema",
            '{"minProperties": 3, "properties": {"a": {}, "b": {}}, "required": ["a", "b", "a"]}',
            "minProperties above 1",
        ),
        (
            "json_schema",
            '{"minProperties": 2, "patternProperties": {"^a$": {}}, "additionalProperties": false}',
            "above 1",
        ),
        ("json_schema", r'{"type": "object", "patternProperties": {"a\"b": {}}}', "a quotation mark or a backslash"),
        ("json_schema", r'{"type": "string", "pattern": "a\\\\b"}', "a quotation mark or a backslash"),
        ("json_schema", r'{"type": "string", "pattern": "a\\x22b"}', "a quotation mark or a backslash"),
        ("json_schema", r'{"type": "string", "pattern": "\\[\"]"}', "a quotation mark or a backslash"),
        ("json_schema", '{"type": "string", "pattern": "%s"}' % ("[" * 60_000), "one that xgrammar compiles"),
        ("json_schema", r'{"type": "string", "pattern": "a[\"b"}', "one that xgrammar compiles"),
        ("json_object", "{}", "it takes none"),
        ("tool_calls", "[1]", "what tool_calls.calls_grammar makes is required"),
        (
            "tool_calls",
            '{"functions": {"f": {"properties": {"n": {"multipleOf": 2}}}}, "is_single": true}',
            "the JSON schema of the tool 'f' uses multipleOf at /properties/n",
        ),
        (
            "tool_calls",
            '{"functions": {"f": {"properties": {"n": {"const": 1e999}}}}, "is_single": true}',
            "the JSON schema of the tool 'f' .*Infinity is no JSON number",
        ),
        (
            "tool_calls",
            '{"functions": {"f": {"properties": {"n": {"type": "number", "minimum": 1e999}}}}, "is_single": true}',
            "the JSON schema of the tool 'f' .*Infinity is no JSON number",
        ),
        ("tool_calls", '{"functions": {"f": 5}, "is_single": true}', "the tool 'f' is '5'; an object with keywords"),
        ("regex", " ", "the regular expression is empty"),
        ("regex", "(a", "parenthesis is not closed; one that xgrammar compiles"),
        ("regex", "(?=a)b", "Lookahead is not supported"),
        ("regex", "a\0b", "null characters"),
        ("regex", r"\Aabc\Z", "'.A' is not recognized"),
        ("regex", "a^b", "found in the middle"),
        ("regex", "a$b", "found in the middle"),
        ("regex", "[[:alpha:]]+", r"holds \[:alpha:\], a class by its name"),
        ("regex", r"\u{110000}", r"holds .u\{110000\}, no character"),
        ("regex", r"a\ud83d", "holds .ud83d, no character"),
        ("ebnf", r'root ::= "\ud800"', "holds .ud800, no character"),
        ("json_schema", r'{"type": "string", "pattern": "\\Aab\\Z"}', "cannot be used: Escape sequence"),
        ("json_schema", r'{"type": "string", "pattern": "[[:digit:]]"}', r"uses \[:digit:\], a class by its name"),
        ("json_schema", r'{"type": "object", "patternProperties": {"\\udfff": {}}}', "uses .udfff, no character"),
        ("regex", "\ud800", "surrogate"),
        ("regex", "a" * 64_001, "has 64001 bytes; at most 64000 are allowed"),
        ("ebnf", 'root = "a"', "root rule"),
        ("ebnf", "root ::= foo", 'Rule "foo" is not defined'),
        ("ebnf", 'root ::= root "a"', "no text of this tokenizer's tokens matches it"),
        ("ebnf", "root ::= " + "(" * 9000 + '"a"' + ")" * 9000, "Nest layer|too long|crashed|longer"),
    ],
)
def test_a_bad_grammar_is_refused_with_its_reason(
    compiler: GrammarCompiler, kind: str, text: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        compiler.compile(Grammar(kind=kind, text=text))
    assert str(caught.value).count(";") >= 2 and len(str(caught.value)) < 500


# Each rule triples what may be empty.
BOMB = "root ::= r0\n" + "\n".join(f"r{i} ::= r{i + 1} r{i + 1} r{i + 1}" for i in range(40)) + '\nr40 ::= "a"?'


class Clock:
    """A thread's time that goes on by so many seconds with each call of a grammar."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
        self.seconds = seconds
        self._now, self._is_end = 0.0, itertools.cycle([False, True])
        monkeypatch.setattr("moesaic.serve.grammar.time.thread_time", self._read)

    def _read(self) -> float:
        self._now += self.seconds * next(self._is_end)
        return self._now


def test_a_grammar_too_slow_to_follow_ends_its_text(
    compiler: GrammarCompiler, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    (a,) = tokenizer.encode("a")
    grammar = compiler.compile(Grammar(kind="regex", text="a*"))
    message = r"took {} s for {} tokens; at most 1 s at once, and 4 ms a token, .*; make it less ambiguous"
    clock = Clock(monkeypatch, 0.0)
    # One call that is longer than the budget.
    matcher = grammar.matcher()
    clock.seconds = 2.5
    with pytest.raises(RequestError, match=message.format(r"2\.50", 0)):
        matcher.mask()
    # Many short ones: a mask and a token each take 0.1 s and give 4 ms back.
    clock.seconds = 0.0
    matcher = grammar.matcher()
    clock.seconds = 0.05
    with pytest.raises(RequestError, match=message.format(r"1\.05", 10)):
        for _ in range(30):
            matcher.mask()
            matcher.accept(a)
    # As fast as it has to be, for ever.
    clock.seconds = 0.0
    matcher = grammar.matcher()
    clock.seconds = 0.0019
    for _ in range(2000):
        matcher.mask()
        assert matcher.accept(a)
    # What was saved in 2000 tokens is not there to be spent at once.
    clock.seconds = 1.01
    with pytest.raises(RequestError, match="less ambiguous"):
        matcher.mask()


def test_texts_of_a_request_share_a_budget_and_others_do_not(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    grammar = compiler.compile(Grammar(kind="regex", text="a*"))
    clock = Clock(monkeypatch, 0.0)
    shared = Budget()
    one, two, other = grammar.matcher(budget=shared), grammar.matcher(budget=shared), grammar.matcher()
    clock.seconds = 0.6
    one.mask()
    with pytest.raises(RequestError, match=r"took 1\.20 s"):
        two.mask()
    # Who comes after that does not begin: the time stays as it is.
    with pytest.raises(RequestError, match=r"took 1\.20 s"):
        grammar.matcher(budget=shared)
    assert other.mask().any()


def test_what_is_kept_is_found_during_a_trial_and_what_is_new_is_tried_once(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, new = Grammar(kind="regex", text="kept"), Grammar(kind="regex", text="new")
    compiled = compiler.compile(kept)
    is_begun, may_end, tried = threading.Event(), threading.Event(), []
    try_out = grammar_module._Trial.try_out

    def wait(self: Any, grammar: Grammar, timeout_seconds: float) -> str | None:
        tried.append(grammar)
        is_begun.set()
        assert may_end.wait(60)
        return try_out(self, grammar, timeout_seconds)

    monkeypatch.setattr(grammar_module._Trial, "try_out", wait)
    found: list[Any] = []
    threads = [threading.Thread(target=lambda: found.append(compiler.compile(new))) for _ in range(3)]
    for thread in threads:
        thread.start()
    assert is_begun.wait(60)
    finder = threading.Thread(target=lambda: found.append(compiler.compile(kept)))
    finder.start()
    finder.join(60)
    assert found == [compiled] and compiler.find(kept) is compiled and compiler.find(new) is None
    may_end.set()
    for thread in threads:
        thread.join(60)
    assert tried == [new] and found[1:] == [compiler.find(new)] * 3


def test_what_somebody_has_is_found_however_many_come_after_it(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammar_module, "_CACHED", 1)
    first = Grammar(kind="regex", text="held")
    compiled = compiler.compile(first)
    for text in ("one more", "another one"):
        compiler.compile(Grammar(kind="regex", text=text))
    assert compiler.compile(first) is compiler.find(first) is compiled
    del compiled
    gc.collect()
    assert compiler.find(first) is None


def test_only_a_start_that_takes_too_long_is_one(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = GrammarCompiler(tokenizer, vocab_size=VOCAB_SIZE, timeout_seconds=20.0)
    grammar = Grammar(kind="regex", text="yes")
    monkeypatch.setattr(grammar_module, "_START_SECONDS", 0.0)
    try:
        with pytest.raises(GrammarProcessError, match="did not start within 0 s"):
            compiler.compile(grammar)
        compiler.start()
        trial = compiler._trial
        assert trial is not None and trial._process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(trial._process.stdout, selectors.EVENT_READ)
            assert selector.select(60)
        # It has been ready for some time when the first grammar comes.
        assert compiler.compile(grammar).matcher().mask().any() and compiler._trial is trial
    finally:
        compiler.close()


def test_without_xgrammar_the_error_says_how_to_install_it(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "xgrammar", None)
    with pytest.raises(InstallationError, match=r"pip install 'moesaic\[structured\]'"):
        GrammarCompiler(tokenizer, vocab_size=VOCAB_SIZE)


def test_a_compiler_imports_xgrammar_with_its_first_grammar_and_says_where_that_fails(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "xgrammar", raising=False)
    compiler = GrammarCompiler(tokenizer, vocab_size=VOCAB_SIZE)
    assert "xgrammar" not in sys.modules  # a server's start would wait for it
    monkeypatch.setitem(sys.modules, "xgrammar", None)
    try:
        with pytest.raises(InstallationError, match="cannot be imported"):
            compiler.compile(Grammar(kind="regex", text="yes|no"))
    finally:
        compiler.close()


def processes_of(parent: int) -> list[int]:
    """Return the ids of a process's children, as Linux tells them."""
    found = []
    for file in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended
            name, _, fields = file.read_text().rpartition(")")
            if int(fields.split()[1]) == parent:
                found.append(int(name.split()[0]))
    return found


def test_a_grammar_that_takes_for_ever_or_crashes_is_refused_and_others_go_on(
    compiler: GrammarCompiler, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiler, "_timeout_seconds", 1.0)
    fine, bomb = Grammar(kind="regex", text="yes|no"), Grammar(kind="ebnf", text=BOMB)
    compiler.compile(fine)
    trial = compiler._trial
    with pytest.raises(ConfigError, match=r"it took longer than 1 s; .*simplify"):
        compiler.compile(bomb)
    # Neither what is known nor what is new waits for another process to start.
    assert compiler.compile(fine).matcher().mask().any()
    monkeypatch.setattr(compiler, "_timeout_seconds", 20.0)
    assert write(compiler.compile(Grammar(kind="regex", text="é+")).matcher(), tokenizer, 0).strip("é") == ""
    assert trial is not None and trial.is_alive and compiler._trial is trial
    process = trial._process

    def crash_fork() -> None:
        while not (forks := processes_of(process.pid)):
            time.sleep(0.01)
        os.kill(forks[0], signal.SIGSEGV)

    if Path("/proc/self/stat").exists():
        crash = threading.Thread(target=crash_fork)
        crash.start()
        with pytest.raises(ConfigError, match="xgrammar crashed on it"):
            compiler.compile(bomb)
        crash.join()
        assert trial.is_alive and compiler._trial is trial
    timer = threading.Timer(0.2, process.kill)
    timer.start()
    with pytest.raises(ConfigError, match="xgrammar crashed on it"):
        compiler.compile(bomb)
    timer.join()
    assert not trial.is_alive and compiler._trial is not trial
