"""Calls of tools in an answer's text, however it is cut into pieces."""

import random

import pytest

from moesaic.data.tokenizer import Tokenizer
from moesaic.serve.server.answers import Choice, TokenTexts
from moesaic.serve.server.tool_calls import ToolCall, ToolCallReader


def read(pieces: list[str]) -> tuple[str, list[ToolCall]]:
    reader = ToolCallReader()
    said, calls = "", []
    for number, piece in enumerate(pieces):
        for each in reader.take(piece, is_last=number == len(pieces) - 1):
            if isinstance(each, ToolCall):
                calls.append(each)
            else:
                said += each
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
        (f"a {ONE} b", "a b", [CALL]),
        (ONE + ONE, "", [CALL, CALL]),
        (f"\n {ONE}\n\n{ONE} \n", "", [CALL, CALL]),
        (f" a\n{ONE}\n{ONE}\nb\n", " a\nb", [CALL, CALL]),
        (f"{ONE} \n<tool b", " \n<tool b", [CALL]),
        (f"a \n<tool_call> {ONE}", "a \n<tool_call>", [CALL]),
        (" a \n<tool_call> \n", None, []),
        (" \n", None, []),
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


def test_text_and_calls_come_in_their_order() -> None:
    whole = ToolCallReader().take(f"a {ONE}\nb{ONE}{ONE} ", is_last=True)
    assert whole == ["a", CALL, "\nb", CALL, CALL]


def test_text_is_not_held_back_longer_than_a_call_could_begin() -> None:
    reader = ToolCallReader()
    assert reader.take("a <", is_last=False) == ["a"]
    assert reader.take("b <tool_", is_last=False) == [" <b"]
    assert reader.take("x \n", is_last=False) == [" <tool_x"]
    assert reader.take(" ", is_last=False) == []
    assert reader.take("y", is_last=False) == [" \n y"]


def test_an_answer_is_the_same_streamed_and_whole_however_it_is_cut(chat_tokenizer: Tokenizer) -> None:
    rng = random.Random(0)
    parts = [
        ONE,
        '<tool_call>{"name": "g"}</tool_call>',
        "Hello",
        "\n",
        "\n\n",
        " ",
        "<tool_call>",
        "<tool",
        '{"name":',
        ".",
    ]
    for _ in range(2000):
        text = "".join(rng.choices(parts, k=rng.randrange(1, 6)))
        answers = []
        for num_cuts in (0, 1, 3, 8, len(text)):
            cuts = sorted(rng.randrange(len(text) + 1) for _ in range(num_cuts))
            choice = Choice(
                index=0, kind="chat", texts=TokenTexts(chat_tokenizer), moe_layers=(), has_logprobs=False,
                has_experts=False, tool_calls=ToolCallReader(),
            )  # fmt: skip
            pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
            taken = [choice.take(piece, ()) for piece in pieces[:-1]]
            taken.append(choice.take(pieces[-1], (), finish_reason="stop"))
            chunks = [choice.chunk(part) for part in taken]
            streamed = "".join(chunk["delta"].get("content", "") for chunk in chunks)
            message = choice.whole(taken)["message"]
            calls = [call["function"] for call in message.get("tool_calls", ())]
            assert calls == [call["function"] for chunk in chunks for call in chunk["delta"].get("tool_calls", ())]
            assert message["content"] == (streamed or None if calls else text) and (calls or streamed == text)
            answers.append((streamed, calls, chunks[-1]["finish_reason"]))
        assert all(answer == answers[0] for answer in answers), text
