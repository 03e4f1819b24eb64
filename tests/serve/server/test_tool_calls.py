"""Calls of tools in an answer's text, however it is cut into pieces."""

import random

import pytest

from moesaic.serve.server.tool_calls import ToolCall, ToolCallReader


def read(pieces: list[str]) -> tuple[str, list[ToolCall]]:
    reader = ToolCallReader()
    said, calls = "", []
    for number, piece in enumerate(pieces):
        text, found = reader.take(piece, is_last=number == len(pieces) - 1)
        said += text
        calls += found
    assert reader.has_found is bool(calls)
    return said, calls


ONE = '<tool_call>\n{"name": "f", "arguments": {"a": "</b>"}}\n</tool_call>'
CALL = ToolCall("f", '{"a": "</b>"}')
TAGGED = r'<tool_call>{"name": "f", "arguments": {"a": "\" </tool_call> \\", "b": "<tool_call>"}}</tool_call>'
TAGGED_CALL = ToolCall("f", r'{"a": "\" </tool_call> \\", "b": "<tool_call>"}')


@pytest.mark.parametrize(
    ("text", "said", "calls"),
    [
        ("", "", []),
        ("no call", "no call", []),
        (ONE, "", [CALL]),
        (f"a {ONE} b", "a  b", [CALL]),
        (ONE + ONE, "", [CALL, CALL]),
        (ONE.removesuffix("</tool_call>"), "", [CALL]),  # ended without closing
        ('<tool_call>{"name": "g"}</tool_call>', "", [ToolCall("g", "{}")]),
        ('<tool_call>{"name": "g", "arguments": {"a": "é"}}</tool_call>', "", [ToolCall("g", '{"a": "é"}')]),
        ("1 < 2 <tool", "1 < 2 <tool", []),
        ("<<tool_call>", "<<tool_call>", []),
        ("<tool_call>{]</tool_call> x", "<tool_call>{]</tool_call> x", []),
        ("<tool_call>[1]</tool_call>", "<tool_call>[1]</tool_call>", []),
        ('<tool_call>{"name": 1}</tool_call>', '<tool_call>{"name": 1}</tool_call>', []),
        ('<tool_call>{"name": "f", "arguments": "a"}</tool_call>', None, []),
        ('<tool_call>{"name": "f', None, []),
        ('<tool_call>{"name": "f", "arguments": {"a": NaN}}</tool_call>', None, []),
        ('<tool_call>{"name": "f", "arguments": {"a": [1e999]}}</tool_call>', None, []),
        ('<tool_call>{"name": "f", "arguments": {"a": "\\ud800"}}</tool_call>', None, []),
        ("<tool_call>" + "[" * 100_000 + "</tool_call>", None, []),
        (f"<tool_call>{{</tool_call>{ONE}", "<tool_call>{</tool_call>", [CALL]),
        (f'<tool_call>{{"</tool_call>{ONE}', '<tool_call>{"</tool_call>', [CALL]),
        (f"<tool_call>{ONE}", "<tool_call>", [CALL]),
        (f"{TAGGED} b", " b", [TAGGED_CALL]),
        (TAGGED.removesuffix("</tool_call>"), "", [TAGGED_CALL]),
        (TAGGED[:50], None, []),
        (TAGGED.replace(":", ";"), None, []),
        (r'<tool_call>{"name": "f"\\}</tool_call>', None, []),
        (ONE[:-1], None, []),
        # What takes long where every beginning is read to the text's end, or every end is tried.
        ('<tool_call>"</tool_call>"' * 1000, None, []),
        ("<tool_call>{" * 2000, None, []),
        ('<tool_call>{"name": "' + "</tool_call>" * 9000, None, []),
        ('<tool_call>{"' + '<tool_call>{\\"</tool_call>' * 1000, None, []),
    ],
)
def test_what_is_no_call_is_said_as_it_is(text: str, said: str | None, calls: list[ToolCall]) -> None:
    expected = (text if said is None else said, calls)
    assert read([text]) == expected
    assert read([*text[:2000], text[2000:]]) == expected
    rng = random.Random(0)
    for _ in range(20):
        cuts = sorted(rng.randrange(len(text) + 1) for _ in range(3))
        assert read([text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]) == expected


def test_text_is_not_held_back_longer_than_a_call_could_begin() -> None:
    reader = ToolCallReader()
    assert reader.take("a <", is_last=False) == ("a ", [])
    assert reader.take("b <tool_", is_last=False) == ("<b ", [])
    assert reader.take("x", is_last=False) == ("<tool_x", [])
