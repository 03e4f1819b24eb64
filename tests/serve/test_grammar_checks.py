"""Every schema is taken, or refused with a reason: nothing that a client sends is an error of ours."""

import random

import pytest

from moesaic.config.serve import Grammar
from moesaic.errors import ConfigError
from moesaic.serve import grammar_checks

# Every keyword of JSON schema, and every value that JSON has, with those that Python's types trip over.
KEYWORDS = (
    *sorted(grammar_checks._UNENFORCED | grammar_checks._ANNOTATIONS | grammar_checks._SCHEMAS),
    *sorted(grammar_checks._MAPS_OF_SCHEMAS), "type", "enum", "const", "$ref", "required", "minimum", "maxLength",
    "pattern", "format", "uniqueItems", "minItems", "maxProperties",
)  # fmt: skip
VALUES = ("null", "true", "0", "-7.5", "1e999", "-1e999", "1e308", "9" * 400, "9" * 5000, '""', '"a"', '"object"',
          '"integer"', '"\\ud800"', '"#/$defs/a"', "[]", "{}", "NaN")  # fmt: skip


def hostile(source: random.Random, depth: int) -> str:
    if depth == 0 or source.random() < 0.3:
        return source.choice(VALUES)
    if source.random() < 0.4:
        return f"[{', '.join(hostile(source, depth - 1) for _ in range(source.randrange(3)))}]"
    keys = [source.choice([*KEYWORDS, "a", "\\ud800"]) for _ in range(source.randrange(1, 4))]
    return "{" + ", ".join(f'"{key}": {hostile(source, depth - 1)}' for key in keys) + "}"


def test_whatever_stands_in_a_keywords_place_is_taken_or_refused_with_a_reason() -> None:
    source = random.Random(0)
    texts = [f'{{"{key}": {value}}}' for key in KEYWORDS for value in VALUES]
    texts += [f'{{"type": "integer", "properties": {{}}, "{key}": [{value}]}}' for key in KEYWORDS for value in VALUES]
    texts += [hostile(source, 4) for _ in range(500)]
    num_taken = 0
    for text in texts:
        try:
            grammar_checks.check_grammar(Grammar(kind="json_schema", text=text), max_bytes=64_000)
            num_taken += 1
        except ConfigError as error:
            assert str(error).count(";") >= 2 and len(str(error)) < 600, text
    assert 100 < num_taken < len(texts) - 100


@pytest.mark.parametrize(
    ("patterns", "may_meet"),
    [
        (("^a", "^b"), False),
        (("^x-", "^/"), False),
        (("^ab", "^ac", "^b(c|d)"), False),
        (("^a+b", "^b"), False),
        (("^a", "^ab"), True),
        (("^a", "^ab", "^ac"), True),
        (("a", "b"), True),
        (("^a", "b"), True),
        (("^a?b", "^b"), True),
        (("^a*", "^b"), True),
        (("^a{0,1}b", "^b"), True),
        (("^a|c", "^b"), True),
        (("^a)|c(", "^b"), True),
        (("^[ab]", "^c"), True),  # they do not, which is not plain
        ((r"^\x61", "^b"), True),
    ],
)
def test_patterns_of_names_are_taken_where_they_plainly_do_not_meet(patterns: tuple[str, ...], may_meet: bool) -> None:
    different = {pattern: {"const": index} for index, pattern in enumerate(patterns)}
    assert grammar_checks._may_meet(different) == may_meet
    assert grammar_checks._may_meet(dict(reversed(different.items()))) == may_meet
    assert not grammar_checks._may_meet({pattern: {"type": "integer"} for pattern in patterns})


def test_patterns_within_patterns_of_one_schema_are_compared_with_all_of_them() -> None:
    assert grammar_checks._may_meet({"^a": {}, "^ab": {}, "^ac": {"const": 1}})
    assert not grammar_checks._may_meet({"^a": {}, "^ab": {}, "^b": {"const": 1}})
    assert grammar_checks._may_meet({"^a": {"const": 1}, "^ab": {"const": True}})
