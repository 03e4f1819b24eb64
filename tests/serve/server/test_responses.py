"""OpenAI's Responses API, spoken by its own client: what a chat answers, in another form."""

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, get_args

import httpx
import openai
import pydantic
import pytest
from openai.types.responses import Response, ResponseStreamEvent

from moesaic.data.tokenizer import Tokenizer
from moesaic.serve.server.responses import ResponsesBody

from ..fake_engine import FakeEngine
from .conftest import Live

USER: list[Any] = [{"role": "user", "content": "Köln"}]
GREEDY: dict[str, Any] = {"temperature": 0, "max_output_tokens": 9}
TOOLS: list[Any] = [
    {"type": "function", "name": "f", "parameters": {"type": "object", "properties": {}}, "strict": True},
    {"type": "function", "name": "g", "parameters": {"properties": {"n": {"enum": [3, 5]}}, "required": ["n"]}},
]
EVENTS: dict[str, Any] = {
    get_args(event.model_fields["type"].annotation)[0]: event for event in get_args(get_args(ResponseStreamEvent)[0])
}


@pytest.fixture(scope="module")
def client(real: Live) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{real.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def post(real: Live, body: Any) -> Any:
    response = httpx.post(f"{real.url}/v1/responses", json=body, timeout=30)
    assert response.status_code == 200, response.text
    return response.json()


def stream(real: Live, body: Any) -> list[Any]:
    """Return the events of a stream, each of which is one of the client's, and named by its type."""
    response = httpx.post(f"{real.url}/v1/responses", json={**body, "stream": True}, timeout=30)
    assert response.status_code == 200 and response.headers["content-type"].startswith("text/event-stream")
    events = []
    for text in response.text.removesuffix("\n\n").split("\n\n"):
        name, data = text.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        EVENTS[event["type"]].model_validate(event)  # strictly
        events.append(event)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    return events


def told(events: list[Any]) -> list[str]:
    """The types of events, of those that follow one another in number one."""
    types = [event["type"].removeprefix("response.") for event in events]
    return [kind for place, kind in enumerate(types) if kind != "output_text.delta" or types[place - 1] != kind]


MESSAGE = [
    "output_item.added", "content_part.added", "output_text.delta", "output_text.done", "content_part.done",
    "output_item.done",
]  # fmt: skip
CALL = ["output_item.added", "function_call_arguments.delta", "function_call_arguments.done", "output_item.done"]


def without_ids(response: Any) -> Any:
    items = [{key: item[key] for key in item if key not in ("id", "call_id")} for item in response["output"]]
    return {**response, "output": items, "id": None, "created_at": None, "completed_at": None, "usage": None}


def test_a_response_is_a_chats_answer(client: openai.OpenAI, real: Live) -> None:
    done = client.responses.create(model="tiny", input="Köln", instructions="Be brief.", metadata={"a": "b"}, **GREEDY)
    messages: list[Any] = [{"role": "system", "content": "Be brief."}, *USER]
    chat = client.chat.completions.create(model="tiny", messages=messages, temperature=0, max_tokens=9)
    assert done.output_text == chat.choices[0].message.content and done.model == "tiny"
    assert done.usage and chat.usage and done.usage.input_tokens == chat.usage.prompt_tokens
    assert done.usage.output_tokens == chat.usage.completion_tokens
    assert done.usage.total_tokens == chat.usage.total_tokens and done.usage.output_tokens_details.reasoning_tokens == 0
    assert chat.usage.prompt_tokens_details
    assert done.usage.input_tokens_details.cached_tokens <= chat.usage.prompt_tokens_details.cached_tokens
    assert (done.metadata, done.instructions, done.max_output_tokens) == ({"a": "b"}, "Be brief.", 9)
    assert done.id.startswith("resp_") and done.temperature == 0 and done.top_p == 1 and done.tool_choice == "auto"
    whole = post(real, {"input": USER, **GREEDY})
    Response.model_validate(whole)  # strictly
    assert whole["store"] is False and whole["text"] == {"format": {"type": "text"}}
    (message,) = whole["output"]
    assert message["status"] == whole["status"] and message["content"][0]["annotations"] == []


@pytest.mark.parametrize(
    ("given", "messages"),
    [
        ("x", [{"role": "user", "content": "x"}]),
        (
            [
                {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "a"}]},
                {"role": "user", "content": [{"type": "input_text", "text": "b"}, {"type": "input_text", "text": "c"}]},
                {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "x"},
                {"type": "message", "id": "msg_1", "role": "assistant", "status": "completed", "phase": None,
                 "content": [{"type": "output_text", "text": "d", "annotations": [], "logprobs": []}]},
                {"type": "function_call", "call_id": "1", "name": "f", "arguments": '{"a": 1}', "status": "completed"},
                {"type": "function_call", "call_id": "2", "name": "g", "arguments": "{}", "id": "fc_2"},
                {"type": "function_call_output", "call_id": "1", "output": "e"},
                {"type": "function_call_output", "call_id": "2", "output": [{"type": "input_text", "text": "f"}]},
                {"type": "function_call", "call_id": "3", "name": "f", "arguments": "no JSON"},
                {"type": "function_call_output", "call_id": "3", "output": ""},
            ],
            [
                {"role": "system", "content": "a"},
                {"role": "user", "content": "b\nc"},
                {"role": "assistant", "content": "d", "tool_calls": [
                    {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}},
                    {"id": "2", "type": "function", "function": {"name": "g", "arguments": {}}},
                ]},
                {"role": "tool", "tool_call_id": "1", "content": "e"},
                {"role": "tool", "tool_call_id": "2", "content": "f"},
                {"role": "assistant", "content": None, "tool_calls": [
                    {"id": "3", "type": "function", "function": {"name": "f", "arguments": "no JSON"}},
                ]},
                {"role": "tool", "tool_call_id": "3", "content": ""},
            ],
        ),
    ],
)  # fmt: skip
def test_items_are_the_messages_of_a_chat(given: Any, messages: list[Any]) -> None:
    assert ResponsesBody(input=given).template_messages() == messages
    body = ResponsesBody(input=given, instructions="first", tools=TOOLS)
    assert body.template_messages() == [{"role": "system", "content": "first"}, *messages]
    tools = body.template_tools()
    assert tools is not None and tools[0] == {
        "type": "function",
        "function": {"name": "f", "parameters": {"type": "object", "properties": {}}, "strict": True},
    }


@pytest.mark.parametrize("logprobs", [None, 0, 2])
@pytest.mark.parametrize("return_experts", [False, True])
def test_a_stream_tells_in_order_what_a_whole_answer_says(
    real: Live, logprobs: int | None, return_experts: bool
) -> None:
    body: dict[str, Any] = {"input": USER, "max_output_tokens": 15, "seed": 3, "return_experts": return_experts}
    if logprobs is not None:
        body |= {"include": ["message.output_text.logprobs"], "top_logprobs": logprobs}
    whole = post(real, body)
    events = stream(real, body)
    assert told(events) == ["created", "in_progress", *MESSAGE, whole["status"]]
    assert without_ids(events[-1]["response"]) == without_ids(whole)
    for event in events[:2]:
        assert event["response"]["status"] == "in_progress" and event["response"]["output"] == []
    (message,) = events[-1]["response"]["output"]
    assert {event["item_id"] for event in events[3:-2]} == {message["id"]}
    assert all(event["output_index"] == 0 for event in events[2:-1])
    deltas = [event for event in events if event["type"] == "response.output_text.delta"]
    (part,) = message["content"]
    assert "".join(delta["delta"] for delta in deltas) == part["text"]
    assert [each for delta in deltas for each in delta["logprobs"]] == part["logprobs"]
    count = whole["usage"]["output_tokens"]
    assert len(part["logprobs"]) == (0 if logprobs is None else count)
    assert all(len(each["top_logprobs"]) == logprobs for each in part["logprobs"])
    assert len(whole.get("experts", ())) == (count if return_experts else 0)


def test_what_has_no_room_left_is_incomplete(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "tiny", "input": "x", "extra_body": {"ignore_eos": True}}
    for values in ({"max_output_tokens": 4}, {}):
        done = client.responses.create(**asked, **values)
        assert done.status == "incomplete" and done.incomplete_details is not None and done.usage is not None
        assert done.incomplete_details.reason == "max_output_tokens"
        assert done.usage.output_tokens == 4 if values else done.usage.total_tokens == 160
    *_, last = client.responses.create(**asked, max_output_tokens=4, stream=True)
    assert last.type == "response.incomplete" and last.response.incomplete_details == done.incomplete_details


def test_an_empty_answer_is_an_empty_message(real: Live, chat_tokenizer: Tokenizer) -> None:
    body = {"input": "x", "logit_bias": {str(chat_tokenizer.end_of_text_id): 100}, "temperature": 0}
    whole = post(real, body)
    assert whole["status"] == "completed" and whole["output"][0]["content"][0]["text"] == ""
    kinds = [kind for kind in MESSAGE if kind != "output_text.delta"]
    assert told(stream(real, body)) == ["created", "in_progress", *kinds, "completed"]


@pytest.mark.parametrize(
    ("values", "end"),
    [({"reasoning": {"effort": "low", "summary": "auto"}}, "low"), ({"reasoning": {}}, ""),
     ({"chat_template_kwargs": {"enable_thinking": False}}, "<think></think>")],
)  # fmt: skip
def test_a_response_sets_what_the_template_reads(real: Live, values: Any, end: str) -> None:
    done = post(real, {"input": "one", **GREEDY, **values})
    body = {"prompt": f"[user]one<|endoftext|>[assistant]{end}", "temperature": 0, "max_tokens": 9}
    plain = httpx.post(f"{real.url}/v1/completions", json=body, timeout=30).json()
    assert done["output"][0]["content"][0]["text"] == plain["choices"][0]["text"]
    assert done["usage"]["input_tokens"] == plain["usage"]["prompt_tokens"]


class Answer(pydantic.BaseModel):
    word: bool


def test_the_client_parses_what_matches_a_model(client: openai.OpenAI) -> None:
    pytest.importorskip("xgrammar", reason="grammars are xgrammar's (extra `structured`)")
    asked: dict[str, Any] = {"model": "tiny", "input": "x", "text_format": Answer, "extra_body": {"seed": 0}}
    done = client.responses.parse(**asked)
    assert isinstance(done.output_parsed, Answer)
    with client.responses.stream(**asked) as events:
        said = "".join(event.delta for event in events if event.type == "response.output_text.delta")
        final = events.get_final_response()
    assert final.output_parsed == done.output_parsed and final.output_text == said
    assert done.text is not None and done.text.format is not None and done.text.format.type == "json_schema"
    plain = client.responses.create(model="tiny", input="x", text={"format": {"type": "json_object"}}, **GREEDY)
    assert plain.output_text.lstrip().startswith("{")


def test_a_call_and_what_it_gave_go_to_and_fro(client: openai.OpenAI) -> None:
    pytest.importorskip("xgrammar", reason="grammars are xgrammar's (extra `structured`)")
    asked: dict[str, Any] = {"model": "tiny", "tools": TOOLS, "parallel_tool_calls": False}
    given: list[Any] = [*USER]
    choice: Any = {"type": "function", "name": "g"}
    done = client.responses.create(input=given, tool_choice=choice, **asked)
    (call,) = done.output
    assert call.type == "function_call" and call.name == "g" and json.loads(call.arguments) in ({"n": 3}, {"n": 5})
    assert done.status == "completed" and done.parallel_tool_calls is False and len(done.tools) == 2
    given += [*done.output, {"type": "function_call_output", "call_id": call.call_id, "output": "done"}]
    again = client.responses.create(input=given, tool_choice="none", max_output_tokens=5, **asked)
    assert again.output_text and again.usage and done.usage
    with client.responses.stream(input=given, tool_choice="required", **asked) as events:
        final = events.get_final_response()
    (call,) = final.output
    assert call.type == "function_call" and call.name in "fg"
    allowed: Any = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "g"}]}
    some = client.responses.create(input=given, tool_choice=allowed, **asked)
    assert some.output[0].type == "function_call" and some.output[0].name == "g"
    assert some.tool_choice.model_dump() == allowed and len(some.tools) == 2


def test_text_and_calls_are_items_in_their_order(real: Live) -> None:
    pytest.importorskip("xgrammar", reason="grammars are xgrammar's (extra `structured`)")
    call = r"<tool_call>\{\"name\":\"f\"\}</tool_call>"
    body = {"input": "x", "tools": TOOLS, "grammar": {"kind": "regex", "text": f"on it\\n{call}{call}\\nbye"}}
    whole = post(real, body)
    Response.model_validate(whole)
    assert [item["type"] for item in whole["output"]] == ["message", "function_call", "function_call", "message"]
    first, call_1, call_2, last = whole["output"]
    assert first["content"][0]["text"] == "on it" and last["content"][0]["text"] == "\nbye"
    assert call_1["arguments"] == "{}" and call_1["call_id"] != call_2["call_id"]
    events = stream(real, body)
    assert told(events) == ["created", "in_progress", *MESSAGE, *CALL, *CALL, *MESSAGE, "completed"]
    assert without_ids(events[-1]["response"]) == without_ids(whole)
    ended = [event for event in events if event["type"] == "response.output_item.done"]
    assert [event["output_index"] for event in ended] == [0, 1, 2, 3]
    assert [event["item"] for event in ended] == events[-1]["response"]["output"]


def test_what_clients_send_without_a_wish_is_accepted(real: Live) -> None:
    body = {
        "input": [{"role": "user", "content": "x", "type": None}], "model": None, "store": False, "background": False,
        "truncation": "disabled", "previous_response_id": None, "conversation": None, "user": "u", "top_logprobs": 0,
        "include": ["reasoning.encrypted_content"], "service_tier": "auto", "prompt_cache_key": "k", "tools": [],
        "tool_choice": "auto", "parallel_tool_calls": True, "text": {"format": {"type": "text"}}, "metadata": {},
        "stream_options": None, "max_output_tokens": 2,
    }  # fmt: skip
    assert post(real, body)["usage"]["output_tokens"] <= 2


F = TOOLS[0]
CALLED: dict[str, Any] = {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"}


@pytest.mark.parametrize(
    ("values", "param", "words"),
    [
        ({"input": None}, "input", "input is missing"),
        ({"input": []}, "input", "input has no message"),
        ({"input": 5}, "input", "valid list"),
        ({"input": USER * 20_000}, "input", "20000 entries"),
        ({"input": "x " * 500}, "input", "input has"),
        ({"input": [{"content": "x"}]}, "input.0.role", "of type message needs one"),
        ({"input": [{"role": "user"}]}, "input.0.content", "is missing"),
        ({"input": [{"role": "tool", "content": "x"}]}, "input.0.role", "'developer', 'user' or 'assistant'"),
        ({"input": [*USER, {"type": "web_search_call"}]}, "input.1.type", "'function_call_output'"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input.0", "no answers are kept here"),
        ({"input": [{"role": "user", "content": "x", "colour": "red"}]}, "input.colour", "is not a key of input"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input.0.content", '"input_text"'),
        ({"input": [{"role": "user", "content": [{"type": "input_text"}]}]}, "input.0.content.0.text", "is missing"),
        ({"input": [{key: CALLED[key] for key in CALLED if key != "name"}]}, "input.0.name", "function_call needs"),
        ({"input": [CALLED, {"type": "function_call_output", "call_id": "1"}]}, "input.1.output", "is missing"),
        ({"input": [CALLED, {"type": "function_call_output", "call_id": "2", "output": "x"}]}, "input.1.call_id",
         "no function_call before it has that"),
        ({"store": True}, "store", "no answers are kept here; leave it out"),
        ({"previous_response_id": "resp_1"}, "previous_response_id", "`input` holds all of a conversation"),
        ({"conversation": "conv_1"}, "conversation", "no answers are kept"),
        ({"background": True}, "background", "or streams"),
        ({"truncation": "auto"}, "truncation", "nothing is dropped"),
        ({"prompt": {"id": "p"}}, "prompt", "no prompts are kept"),
        ({"messages": USER}, "messages", "a response has `input`"),
        ({"max_tokens": 3}, "max_tokens", "`max_output_tokens`"),
        ({"n": 2}, "n", "one text"),
        ({"max_output_tokens": -1}, "max_output_tokens", "max_output_tokens is -1"),
        ({"max_output_tokens": 10**6}, "max_output_tokens", "max_output_tokens is 1000000; behind"),
        ({"response_format": {"type": "json_object"}}, "response_format", "`text.format`"),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format", "text.format.schema is required"),
        ({"text": {"format": {"type": "text", "schema": {}}}}, "text.format", "is text and has a schema"),
        ({"text": {"format": {"type": "json_schema", "shema": {}}}}, "text.format.shema", "did you mean schema"),
        ({"text": {"format": {"type": "json_object"}}, "grammar": {"kind": "json_object"}}, "grammar",
         "text.format and grammar were both given"),
        ({"text": {"verbosity": "low"}}, "verbosity", "no such setting"),
        ({"reasoning": {"effort": "extreme"}}, "reasoning.effort", "'high' or 'xhigh'"),
        ({"reasoning": {"effort": "low"}, "chat_template_kwargs": {"reasoning_effort": "low"}}, "reasoning.effort",
         "and again in chat_template_kwargs"),
        ({"reasoning_effort": "low"}, "reasoning_effort", "`reasoning.effort`"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools.0",
         '{"type": "function", "name": ..., "parameters": ...} is required'),
        ({"tools": [{"type": "web_search"}]}, "tools.0", "is required"),
        ({"moderation": {"model": "m"}}, "moderation", "nothing is moderated"),
        ({"tools": [{"type": "function", "name": "f g"}]}, "tools.0.name", "rename it"),
        ({"tools": [F, F]}, "tools.1.name", "a second tool"),
        ({"tools": [{**F, "parameters": {"type": "integer"}}]}, "tools.0.parameters", "schema of an object"),
        ({"tools": [F], "tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice",
         '{"type": "function", "name": ...} is required'),
        ({"tools": [F], "tool_choice": {"type": "function", "name": "h"}}, "tool_choice", "none of the tools (f)"),
        ({"tools": [F], "tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [F]}}},
         "tool_choice", '"mode": "auto" or "required", "tools": [{"type": "function", "name": ...}, ...] is required'),
        ({"top_logprobs": 2}, "top_logprobs", "it needs them"),
        ({"include": ["everything"]}, "include.0", "'message.output_text.logprobs'"),
        ({"include": ["message.output_text.logprobs"], "tools": [F]}, "include", "a call's tokens"),
        ({"metadata": {"a": 1}}, "metadata.a", "valid string"),
        ({"inputs": "x"}, "inputs", "did you mean input"),
    ],
)  # fmt: skip
def test_a_bad_request_is_told_what_to_do(real: Live, values: Any, param: str, words: str) -> None:
    response = httpx.post(f"{real.url}/v1/responses", json={"input": "x", **values}, timeout=30)
    error = response.json()["error"]
    assert response.status_code == 400 and error["param"] == param and words in error["message"], response.text
    assert error["message"].count(";") >= 2 and error["message"].endswith((".", "?"))


def test_a_wish_that_cannot_be_met_is_the_requests_mistake(real: Live, chat_tokenizer: Tokenizer) -> None:
    pytest.importorskip("xgrammar", reason="grammars are xgrammar's (extra `structured`)")
    (a,) = chat_tokenizer.encode("a")
    body = {"input": "x", "grammar": {"kind": "regex", "text": "a{9}"}, "logit_bias": {str(a): -100}}
    refused = httpx.post(f"{real.url}/v1/responses", json=body, timeout=60)
    assert refused.status_code == 400 and refused.json()["error"]["code"] == "cannot_be_met"
    last = stream(real, body)[-1]["response"]
    assert last["status"] == "failed" and last["error"]["code"] == "invalid_prompt"
    assert last["error"]["message"] == refused.json()["error"]["message"]


@pytest.mark.parametrize(("end", "words"), [("failure", "a step of the engine failed"), ("time", "took longer")])
def test_a_stream_that_cannot_go_on_says_so_in_its_last_event(
    serve_fake: Callable[..., AbstractContextManager[Live]], fake: FakeEngine, end: str, words: str
) -> None:
    values = {"request_timeout_seconds": 2.0} if end == "time" else {}
    with serve_fake(**values) as running:
        fake.num_failing_steps = int(end == "failure")
        events = stream(running, {"input": "x", "max_output_tokens": 10**9})
        last = events[-1]["response"]
        assert told(events)[:2] == ["created", "in_progress"] and told(events)[-1] == "failed"
        assert last["status"] == "failed" and words in last["error"]["message"]
        assert last["error"]["code"] == "server_error"
        text = httpx.get(f"{running.url}/metrics").text
        assert 'moesaic_requests_total{path="/v1/responses"' in text
        assert post(running, {"input": "x", "max_output_tokens": 1})["status"] == "incomplete"
