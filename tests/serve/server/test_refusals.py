"""A malformed request gets OpenAI's error shape with what to do, and leaves the server as it was."""

import gzip
import json
import socket
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

import httpx
import openai
import pytest

from moesaic.config.serve import ServerConfig
from moesaic.data.tokenizer import Tokenizer
from moesaic.serve.async_engine import AsyncEngine
from moesaic.serve.grammar import GrammarCompiler, GrammarProcessError
from moesaic.serve.server.app import create_app

from ..fake_engine import FakeEngine
from .conftest import Live, live

COMPLETION, CHAT = "/v1/completions", "/v1/chat/completions"
USER = [{"role": "user", "content": "x"}]
VLLM_DEFAULTS = {
    "use_beam_search": False, "length_penalty": 1.0, "early_stopping": False, "skip_special_tokens": True,
    "include_stop_str_in_output": False, "prompt_logprobs": None,
}  # fmt: skip


def check_error(response: httpx.Response, status: int, param: str | None, words: str) -> None:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert list(body) == ["error"] and set(body["error"]) == {"message", "type", "param", "code"}
    error = body["error"]
    assert words in error["message"], error
    assert error["message"].count(";") >= 2 and error["message"].endswith((".", "?"))
    assert error["param"] == param, error
    assert error["type"]


@pytest.mark.parametrize("values", [{"max_tokens": 10}, {}, {"max_tokens": None}])
def test_what_fits_is_made_and_a_default_is_what_fits(real: Live, values: dict[str, Any]) -> None:
    body = {"prompt": [1] * 150, "ignore_eos": True, **values}
    answer = httpx.post(f"{real.url}{COMPLETION}", json=body, timeout=60).json()
    assert answer["usage"]["completion_tokens"] == 10 and answer["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize("body", [{"prompt": [1] * 160}, {"prompt": [1] * 150, "max_tokens": 11}])
def test_what_is_too_long_is_told_in_words_that_clients_know(real: Live, body: dict[str, Any]) -> None:
    """LiteLLM tells this error, on which its users shorten what they send, from others by these words alone."""
    error = httpx.post(f"{real.url}{COMPLETION}", json=body, timeout=60).json()["error"]
    assert error["code"] == "context_length_exceeded"
    assert "this model's maximum context length is 160 tokens" in error["message"]


F = {"type": "function", "function": {"name": "f"}}


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


def test_a_grammar_process_that_does_not_start_is_the_servers_failure(
    fake: FakeEngine, chat_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("xgrammar", reason="grammars are xgrammar's (extra `structured`)")
    grammars = GrammarCompiler(chat_tokenizer, vocab_size=chat_tokenizer.vocab_size, timeout_seconds=20)

    def compile_nothing(_: Any) -> None:
        raise GrammarProcessError("it did not start; one is required; see why.")

    monkeypatch.setattr(grammars, "compile", compile_nothing)
    app = create_app(
        AsyncEngine(fake), chat_tokenizer, ServerConfig(), name="fake", max_length=fake.max_length, hidden_size=2,
        grammars=grammars,
    )  # fmt: skip
    with live(app) as running:
        for stream in (False, True):
            body = {"messages": USER, "response_format": {"type": "json_object"}, "stream": stream}
            response = httpx.post(f"{running.url}{CHAT}", json=body, timeout=60)
            check_error(response, 503, None, "did not start")
            assert response.headers["retry-after"] == "10"
            assert response.json()["error"]["type"] == "server_error"


def test_a_call_in_an_unknown_form_cannot_be_asked_for(fake: FakeEngine, chat_tokenizer: Tokenizer) -> None:
    values = json.loads(chat_tokenizer.companions["tokenizer_config.json"])
    values["chat_template"] = values["chat_template"].replace("<tool_call>", "[TOOL_CALLS]")
    other = Tokenizer(chat_tokenizer.json_text, companions={"tokenizer_config.json": json.dumps(values)})
    app = create_app(AsyncEngine(fake), other, ServerConfig(), name="fake", max_length=fake.max_length, hidden_size=2)
    with live(app) as running:
        for choice, status in (("required", 400), ("auto", 200)):
            body = {"messages": USER, "max_tokens": 2, "tools": [F], "tool_choice": choice}
            response = httpx.post(f"{running.url}{CHAT}", json=body, timeout=30)
            assert response.status_code == status, response.text
            if status == 400:
                check_error(response, 400, "tool_choice", "does not say that calls are written")


def test_tools_that_the_template_does_not_show_are_refused(fake: FakeEngine, chat_tokenizer: Tokenizer) -> None:
    values = json.loads(chat_tokenizer.companions["tokenizer_config.json"])
    values["chat_template"] = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    blind = Tokenizer(chat_tokenizer.json_text, companions={"tokenizer_config.json": json.dumps(values)})
    app = create_app(AsyncEngine(fake), blind, ServerConfig(), name="fake", max_length=fake.max_length, hidden_size=2)
    with live(app) as running:
        effort = httpx.post(f"{running.url}{CHAT}", json={"messages": USER, "reasoning_effort": "low"}, timeout=30)
        check_error(effort, 400, "reasoning_effort", "which does not read it; it reads no setting at all")
        for tools, choice, status in (([F], None, 400), ([F], "none", 200), ([], "auto", 200), (None, None, 200)):
            body = {"messages": USER, "max_tokens": 2, "tools": tools, "tool_choice": choice}
            response = httpx.post(f"{running.url}{CHAT}", json=body, timeout=30)
            assert response.status_code == status, response.text
            if status == 400:
                check_error(response, 400, "tools", "a template that has `tools` is required")


@pytest.mark.parametrize(
    ("path", "body", "param", "words"),
    [
        (COMPLETION, {}, "prompt", "prompt is missing"),
        (COMPLETION, {"prompt": None, "max_tokens": None}, "prompt", "prompt is missing"),
        ("/v1/embeddings", {"input": None}, "input", "input is missing"),
        ("/detokenize", {"tokens": [None]}, "tokens.0", "tokens.0 is null; it must be a valid integer"),
        (COMPLETION, {"prompt": "x", "temprature": 0}, "temprature", "did you mean temperature"),
        (COMPLETION, {"prompt": "x", "temperature": "hot"}, "temperature", "temperature is 'hot'"),
        (COMPLETION, {"prompt": "x", "temperature": -1}, "temperature", "greater than or equal to 0"),
        (COMPLETION, {"prompt": "x", "top_p": 0}, "top_p", "greater than 0"),
        (COMPLETION, {"prompt": "x", "max_tokens": 1.5}, "max_tokens", "valid integer"),
        (COMPLETION, {"prompt": "x", "max_tokens": True}, "max_tokens", "valid integer"),
        (COMPLETION, {"prompt": "x", "max_tokens": -1}, "max_tokens", "greater than or equal to 0"),
        (COMPLETION, {"prompt": "x", "min_tokens": 9, "max_tokens": 3}, "min_tokens", "min_tokens (9) is above"),
        (COMPLETION, {"prompt": "x", "n": 0}, "n", "greater than or equal to 1"),
        (COMPLETION, {"prompt": "x", "n": 10**9}, "n", "1000000000 texts"),
        (COMPLETION, {"prompt": ["x"] * 129}, "prompt", "129 texts"),
        (COMPLETION, {"prompt": ["x"] * 65, "n": 2}, "n", "130 texts"),
        (COMPLETION, {"prompt": "x", "seed": 2**63}, "seed", "less than"),
        (COMPLETION, {"prompt": "x", "logprobs": 21}, "logprobs", "less than or equal to 20"),
        (COMPLETION, {"prompt": "x", "best_of": 3}, "best_of", "n says how many"),
        (COMPLETION, {"prompt": "x", "suffix": "y"}, "suffix", "only continued"),
        (COMPLETION, {"prompt": "x", "response_format": {"type": "json_object"}, "grammar": {"kind": "json_object"}},
         "grammar", "response_format and grammar were both given"),
        (COMPLETION, {"prompt": "x", "response_format": {"type": "json_schema"}}, "response_format", "without a s"),
        (CHAT, {"messages": USER, "add_generation_prompt": False}, "add_generation_prompt", "set continue_final"),
        (CHAT, {"messages": USER, "add_generation_prompt": True, "continue_final_message": True},
         "continue_final_message", "are both true"),
        (CHAT, {"messages": [*USER, {"role": "assistant", "content": "x", "tool_calls": [{"id": "a", **F}]}],
                "continue_final_message": True}, "continue_final_message", "the last message calls tools"),
        (COMPLETION, {"messages": USER}, "messages", "chats go to /v1/chat/completions"),
        (COMPLETION, {"prompt": "x", "max_completion_tokens": 3}, "max_completion_tokens", "a completion's is max_tok"),
        (COMPLETION, {"prompt": "x", "top_logprobs": 3}, "top_logprobs", "logprobs is the number"),
        (COMPLETION, {"prompt": "x", "tools": [{}]}, "tools", "it is a chat's key"),
        (COMPLETION, {"prompt": "x", "stop": ["a"] * 17}, "stop", "17 texts"),
        (COMPLETION, {"prompt": "x", "stop": ""}, "stop", "stop text is empty"),
        (COMPLETION, {"prompt": "x", "stream_options": {"include_usage": True}}, "stream_options", "without stream"),
        (COMPLETION, {"prompt": "x", "stream": True, "stream_options": {"usage": 1}}, "stream_options.usage",
         "'usage' is not a key of stream_options; keys are fixed so that none is silently ignored; did you mean incl"),
        (COMPLETION, {"prompt": "x", "grammar": {"kind": "regex", "txt": "a"}}, "grammar.txt", "did you mean text"),
        (CHAT, {"messages": USER, "response_format": {"type": "json_schema", "json_schema": {"shema": {}}}},
         "response_format.json_schema.shema", "is not a key of response_format.json_schema"),
        (COMPLETION, {"prompt": "x", "logit_bias": {"a": 1}}, "logit_bias", "token ids"),
        (COMPLETION, {"prompt": "x", "logit_bias": {"1": 5, "01": -5}}, "logit_bias", "two keys for token 1"),
        (COMPLETION, {"prompt": "x", "logit_bias": {"1": 101}}, "logit_bias", "-100 to 100"),
        (COMPLETION, {"prompt": "x", "logit_bias": {"99999": 1}}, "logit_bias", "token id 99999"),
        (COMPLETION, {"prompt": "x", "logit_bias": {str(n): 1 for n in range(1025)}}, "logit_bias", "1025 entries"),
        (COMPLETION, {"prompt": "x", "stop_token_ids": [-1]}, "stop_token_ids", "token id -1"),
        (COMPLETION, {"prompt": []}, "prompt", "an empty list"),
        (COMPLETION, {"prompt": [[]]}, "prompt", "an empty list"),
        (COMPLETION, {"prompt": [1, "x"]}, "prompt", "one kind"),
        (COMPLETION, {"prompt": [None] * 10_000}, "prompt", "one kind"),
        (COMPLETION, {"prompt": [[1, "x"]]}, "prompt", "one kind"),
        (COMPLETION, {"prompt": {"a": 1}}, "prompt", "valid string or"),
        (COMPLETION, {"prompt": [320]}, "prompt", "token id 320"),
        (COMPLETION, {"prompt": [-1]}, "prompt", "token id -1"),
        (COMPLETION, {"prompt": [2**70]}, "prompt", "token id 1180591620717411303424"),
        (COMPLETION, {"prompt": [5, -1], "echo": True}, "prompt", "token id -1"),
        (COMPLETION, {"prompt": [[5], [2**40]], "echo": True}, "prompt", "token id 1099511627776"),
        (COMPLETION, {"prompt": [1] * 161}, "prompt", "at most 159"),
        (COMPLETION, {"prompt": [1] * 160}, "prompt", "at most 159"),
        (COMPLETION, {"prompt": [1] * 161, "max_tokens": 0, "echo": True}, "prompt", "at most 160"),
        (COMPLETION, {"prompt": "one two " * 900}, "prompt", "at most 159"),
        (COMPLETION, {"prompt": [1] * 150, "max_tokens": 11}, "max_tokens", "of 150 tokens at most 10 fit into"),
        (COMPLETION, {"prompt": [[1], [1] * 155], "max_tokens": 6}, "max_tokens", "of 155 tokens at most 5 fit"),
        (CHAT, {"messages": USER, "max_tokens": 160}, "max_tokens", "positions of a text here; lower it, leave it out"),
        (CHAT, {"messages": USER, "max_completion_tokens": 10**9}, "max_completion_tokens", "1000000000; behind"),
        (COMPLETION, {"prompt": [[1]] * 20_000}, "prompt", "20000 entries; at most 16384"),
        (COMPLETION, {"prompt": ["x", "y"], "n": int("9" * 4000)}, "n", "less than"),
        (COMPLETION, {"prompt": "x", "repetition_penalty": 1e-300}, "repetition_penalty", "greater than"),
        (COMPLETION, {"prompt": "x", "stop": ["a" * 4000, "b" * 97]}, "stop", "4097 characters"),
        (COMPLETION, {"prompt": "x", "grammar": {"kind": "poem"}}, "grammar.kind", "'json_schema'"),
        (COMPLETION, {"prompt": "x", "grammar": 'root ::= "a"'}, "grammar",
         'is required, with the kind regex, ebnf, json_schema or json_object; send {"kind": "ebnf", "text": "root ::='),
        (COMPLETION, {"prompt": "x", "guided_regex": "a"}, "guided_regex", '`grammar` says ({"kind": "regex", "text"'),
        (COMPLETION, {"prompt": "x", "guided_choice": ["a"]}, "guided_choice", '`grammar` says ({"kind": "regex"'),
        (CHAT, {"messages": USER, "guided_grammar": "a"}, "guided_grammar", '`grammar` says ({"kind": "ebnf"'),
        (CHAT, {"messages": USER, "guided_json": {}}, "guided_json", "in a chat or completion `response_format`"),
        (CHAT, {"messages": USER, "structured_outputs": {"regex": "a"}}, "structured_outputs", "`grammar` says"),
        (COMPLETION, [1], None, "a JSON object"),
        (COMPLETION, {"prompt": "x", "model": "gpt-x"}, "model", "'gpt-x' is not served here"),
        (CHAT, {"messages": []}, "messages", "messages is empty"),
        (CHAT, {"messages": [{"content": "x"}]}, "messages.0.role", "is missing"),
        (CHAT, {"messages": [{"role": 1}] * 10_000}, "messages.0.role", "'system', 'developer', 'user', 'assistant'"),
        (CHAT, {"messages": [*USER, {"role": "User", "content": "x"}]}, "messages.1.role", "is 'User'; it must be"),
        (CHAT, {"messages": [{"role": "", "content": "x"}]}, "messages.0.role", "or 'tool'"),
        (CHAT, {"messages": [{"role": "function", "content": "x"}]}, "messages.0.role", "or 'tool'"),
        (CHAT, {"messages": [{"role": "user"}]}, "messages.0.content", "messages.0.content is missing"),
        (CHAT, {"messages": [*USER, {"role": "user", "content": None}]}, "messages.1.content", "but an assistant's"),
        (CHAT, {"messages": [{"role": "user", "tool_calls": [{}]}]}, "messages.0.content", "is missing"),
        (CHAT, {"messages": [{"role": "assistant", "content": None}]}, "messages.0.content", "is missing"),
        (CHAT, {"messages": [{"role": "assistant", "tool_calls": []}]}, "messages.0.content", "is missing"),
        (CHAT, {"messages": [{"role": "user", "name": "nobody", "content": ""}]}, "messages", "nobody speaks); it"),
        (CHAT, {"messages": [{"role": "assistant", "tool_calls": [5]}]}, "messages", "fails on 1 messages"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content", "image_url"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "text"}]}]},
         "messages.0.content.1.text", "messages.0.content.1.text is missing"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]},
         "messages.0.content.0.text", "is no text"),
        (CHAT, {"messages": [{"role": "user", "content": 5}]}, "messages.0.content", "valid string or"),
        (CHAT, {"messages": USER, "max_tokens": 3, "max_completion_tokens": 4}, "max_completion_tokens", "differ"),
        (CHAT, {"messages": USER, "top_logprobs": 3}, "top_logprobs", "without logprobs"),
        (CHAT, {"messages": USER, "tool_choice": "required"}, "tool_choice", "there are no tools"),
        (CHAT, {"messages": USER, "tools": [F], "tool_choice": "perhaps"}, "tool_choice", "none, auto, required or"),
        (CHAT, {"messages": USER, "tools": [F], "tool_choice": {"type": "function"}}, "tool_choice", '"name": ...'),
        (CHAT, {"messages": USER, "tools": [F], "tool_choice": {"type": "function", "function": {"name": "g"}}},
         "tool_choice", "'g', which is none of the tools (f); one"),
        *((CHAT, {"messages": USER, "tools": [F], "tool_choice": {"type": "allowed_tools", "allowed_tools": allowed}},
           "tool_choice", message)
          for allowed, message in (
              ({"mode": "auto", "tools": [{"type": "function", "function": {"name": "g"}}]}, "'g', which is none of"),
              ({"mode": "perhaps", "tools": [F]}, '{"mode": "auto" or "required", "tools": [{"type": "function", "fun'),
              ({"mode": "auto", "tools": []}, "is required; send that"),
              ({"mode": "auto", "tools": [F, 5]}, "is required; send that"),
              ({"mode": "auto", "tools": 5}, "is required; send that"),
              (5, "is required; send that"),
              (None, "is required; send that"),
          )),
        (CHAT, {"messages": USER, "tools": [{"type": "function"}], "tool_choice": "required"}, "tools.0",
         '"name": ..., "parameters"'),
        (CHAT, {"messages": USER, "tools": [{"type": "function", "function": {"name": "f", "parameters": [1]}}],
                "tool_choice": "required"}, "tools.0.function.parameters", "schema of an object"),
        (CHAT, {"messages": USER, "tools": [{"type": "function"}]}, "tools.0", '"name": ..., "parameters"'),
        (CHAT, {"messages": USER, "tools": [F, {"type": "web_search"}], "tool_choice": "none"}, "tools.1", "search"),
        (CHAT, {"messages": USER, "tools": [{"type": "function", "function": {"name": "f g"}}]},
         "tools.0.function.name", "1 to 64 letters, digits, _ and -"),
        (CHAT, {"messages": USER, "tools": [{"type": "function", "function": {"name": "f" * 65}}]},
         "tools.0.function.name", "rename it"),
        (CHAT, {"messages": USER, "tools": [F, F]}, "tools.1.function.name", "a second tool of the name 'f'"),
        (CHAT, {"messages": USER, "tools": [{"type": "function", "function": {"name": "f", "parameters": 1}}]},
         "tools.0.function.parameters", "schema of an object"),
        (CHAT, {"messages": USER, "tools": [F], "tool_choice": "required", "grammar": {"kind": "regex", "text": "a"}},
         "grammar", "tool_choice and grammar were both given"),
        *((CHAT, {"messages": USER, "chat_template_kwargs": {name: 1}}, "chat_template_kwargs", "itself passes")
          for name in ("messages", "tools", "documents", "add_generation_prompt", "bos_token", "raise_exception")),
        (CHAT, {"messages": USER, "chat_template_kwargs": {"enable_thinkin": False}}, "chat_template_kwargs",
         "it reads enable_thinking, reasoning_effort, and none is silently ignored"),
        (CHAT, {"messages": USER, "chat_template_kwargs": [1]}, "chat_template_kwargs", "valid dictionary"),
        (CHAT, {"messages": USER, "chat_template_kwargs": {"enable_thinking": nested(64)}}, "chat_template_kwargs",
         "nested more than 64 deep"),
        (CHAT, {"messages": USER, "chat_template_kwargs": {"enable_thinking": [[0] * 600, [0] * 600]}},
         "chat_template_kwargs", "1203 entries"),
        (CHAT, {"messages": USER, "reasoning_effort": "extreme"}, "reasoning_effort", "'high' or 'xhigh'"),
        (CHAT, {"messages": USER, "verbosity": "low"}, "verbosity", "no such setting"),
        (CHAT, {"messages": USER, "echo": True}, "echo", "does not repeat the conversation"),
        (CHAT, {"messages": USER, "best_of": True}, "best_of", "n says how many"),
        (CHAT, {"messages": USER, "top_logprobs": 1}, "top_logprobs", "needs them"),
        (CHAT, {"messages": USER, "skip_special_tokens": False}, "skip_special_tokens", "no part of a text"),
        (COMPLETION, {"prompt": "x", "use_beam_search": True}, "use_beam_search", "search by beams"),
        (COMPLETION, {"prompt": "x", "add_special_tokens": False}, "add_special_tokens", "send token ids"),
        (COMPLETION, {"prompt": "x", "logprobs": True}, "logprobs", "valid integer"),
        (COMPLETION, {"prompt": "x", "top_k": -2}, "top_k", "greater than or equal to 1"),
        (CHAT, {"messages": USER, "reasoning_effort": "low", "chat_template_kwargs": {"reasoning_effort": "low"}},
         "reasoning_effort", "and again in chat_template_kwargs"),
        (COMPLETION, {"prompt": "x", "chat_template_kwargs": {}}, "chat_template_kwargs", "it is a chat's key"),
        (COMPLETION, {"prompt": "x", "reasoning_effort": "low"}, "reasoning_effort", "it is a chat's key"),
        (CHAT, {"messages": USER, "modalities": ["audio"]}, "modalities", "only text"),
        (CHAT, {"messages": USER, "moderation": {"model": "m"}}, "moderation", "nothing is moderated"),
        (CHAT, {"messages": USER, "response_format": {"type": "json_schema"}}, "response_format", "without a schema"),
        (CHAT, {"messages": USER, "response_format": {"type": "json_object"}, "grammar": {"kind": "json_object"}},
         "grammar", "both given"),
        (CHAT, {"messages": [{"role": "user", "content": "x " * 500}]}, "messages", "at most 159"),
        (CHAT, {"messages": USER * 20_000}, "messages", "20000 entries"),
        (CHAT, {"messages": USER, "response_format": {"type": "json_object", "json_schema": {"schema": {}}}},
         "response_format", "json_object and has a json_schema"),
        ("/v1/embeddings", {"input": "x", "dimensions": 3}, "dimensions", "have 32"),
        ("/v1/embeddings", {"input": "x", "encoding_format": "hex"}, "encoding_format", "'base64'"),
        ("/v1/embeddings", {"input": ["x"] * 2049}, "input", "2049 texts; at most 2048"),
        ("/v1/embeddings", {"input": [[1], [320]]}, "input", "token id 320"),
        ("/tokenize", {"prompt": 3}, "prompt", "valid string"),
        ("/detokenize", {"tokens": [320]}, "tokens", "token id 320"),
        ("/detokenize", {"tokens": "x"}, "tokens", "valid list"),
    ],
)  # fmt: skip
def test_a_bad_request_is_told_what_to_do(real: Live, path: str, body: Any, param: str | None, words: str) -> None:
    status = 404 if "not served here" in words else 400
    check_error(httpx.post(f"{real.url}{path}", json=body, timeout=30), status, param, words)


@pytest.mark.parametrize(
    "schema",
    [
        {"type": ["object", "null"]},
        {"const": 5},
        {"enum": [{"a": 1}, None]},
        {"anyOf": [{"type": "object"}, {"type": "null"}]},
        {"oneOf": [{"properties": {}}, {}]},
        {"anyOf": [{"type": "object"}, {"required": []}]},
        {"allOf": [{"$ref": "#/$defs/x"}], "$defs": {"x": True}},
        {"$ref": "#/$defs/x", "$defs": {"x": {"type": "integer"}}},
        {"$ref": "#/$defs/x~1%20y/1", "$defs": {"x/ y": [{"type": "object"}, {"const": None}]}},
        {"anyOf": [{"$ref": "#"}, {"$ref": "#/$defs/x"}], "$defs": {"x": {"anyOf": [{"$ref": "#"}, {"const": 5}]}}},
    ],
    ids=json.dumps,
)
@pytest.mark.parametrize("choice", ["auto", "required"])
def test_arguments_that_may_be_no_object_are_refused(real: Live, schema: Any, choice: str) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    body = {"messages": USER, "max_tokens": 2, "tools": [tool], "tool_choice": choice}
    response = httpx.post(f"{real.url}{CHAT}", json=body, timeout=30)
    check_error(response, 400, "tools.0.function.parameters", "the JSON schema of an object is required")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "the body is missing; a JSON object"),
        (b"{", "not JSON"),
        (b"null", "a JSON object"),
        (b'"text"', "a JSON object"),
        (b"\xff\xfe", "not JSON"),
        (b'{"prompt": "x", "temperature": NaN}', "not JSON"),
        (b'{"prompt": "\\ud800"}', "not JSON"),
        (b'{"prompt": ' + b"[" * 100_000, "not JSON"),
        (b'{"prompt": "x", "seed": ' + b"9" * 10_000 + b"}", "not JSON"),
        (b'{"prompt": "x", "temperature": 1e999}', "larger than a float holds"),
        (b'{"prompt": "x", "temperature": ' + b"9" * 309 + b".5}", "larger than a float holds"),
        (json.dumps({"prompt": "x", "\ud800": 1}).encode(), "not JSON"),
    ],
)
def test_a_body_that_is_no_json_object_is_refused(real: Live, content: bytes, words: str) -> None:
    headers = {"Content-Type": "application/json"}
    response = httpx.post(f"{real.url}{COMPLETION}", content=content, headers=headers, timeout=30)
    assert response.status_code == 400 and words in response.json()["error"]["message"]


@pytest.mark.parametrize("streams", [False, True])
def test_a_number_that_an_answer_would_repeat_is_one_that_json_can_write(real: Live, streams: bool) -> None:
    tool = b'{"type": "function", "name": "f", "parameters": {"type": "object", "maximum": %s}}'
    for number, status in ((b"1e999", 400), (b"-1E+400", 400), (b"1e308", 200), (b"1e-999", 200), (b'"1e999"', 200)):
        content = b'{"input": "x", "max_output_tokens": 2, "tool_choice": "none", "stream": %s, "tools": [%s]}'
        content %= (json.dumps(streams).encode(), tool % number)
        headers = {"Content-Type": "application/json"}
        response = httpx.post(f"{real.url}/v1/responses", content=content, headers=headers, timeout=30)
        assert response.status_code == status, (number, response.text)
        assert "response.incomplete" in response.text or not streams or status == 400


@pytest.mark.parametrize("headers", [{}, {"Content-Type": "text/plain"}])
def test_a_body_without_its_type_is_refused(real: Live, headers: dict[str, str]) -> None:
    response = httpx.post(f"{real.url}{COMPLETION}", content=b'{"prompt": "x"}', headers=headers)
    check_error(response, 400, None, "without the header Content-Type: application/json")


def test_an_error_does_not_send_back_all_that_was_sent(real: Live) -> None:
    many = [{"role": "user", "name": "nobody", "content": ""}] * 1000
    for body in (
        {"messages": many},
        {"messages": [{"role": "r" * 10_000, "content": ""}]},
        {"messages": USER, "stop_token_ids": [2**31 - 1] * 1000},
    ):
        response = httpx.post(f"{real.url}{CHAT}", json=body)
        assert response.status_code == 400 and len(response.text) < 4000


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/v1/nothing", 404), ("GET", COMPLETION, 405), ("POST", "/health", 405), ("GET", "/static/../a.py", 404)],
)
def test_a_wrong_path_or_method_has_the_shape_too(real: Live, method: str, path: str, status: int) -> None:
    check_error(httpx.request(method, f"{real.url}{path}"), status, None, "required")


def test_what_means_nothing_is_accepted(real: Live) -> None:
    extra = {
        "user": "u", "metadata": {"a": "b"}, "store": False, "service_tier": "auto", "parallel_tool_calls": True,
        "modalities": ["text"], "functions": None, "reasoning_effort": None, "seed": None, "stop": None, "tools": [],
        "response_format": {"type": "text"}, "tool_choice": "auto", "stream": False, "n": None,
        "add_generation_prompt": True, "continue_final_message": False, "guided_json": None, "documents": None,
        "nobody_knows": None, "top_k": -1, "logprobs": False, "top_logprobs": 0, "verbosity": "medium", "echo": False,
        "best_of": 1, "add_special_tokens": False, "prompt_cache_options": {"mode": "implicit"},
        **VLLM_DEFAULTS,
    }  # fmt: skip
    response = httpx.post(f"{real.url}{CHAT}", json={"messages": USER, "max_tokens": 2, **extra})
    assert response.status_code == 200, response.text
    body = {"prompt": "x", "max_tokens": 2, "best_of": 1, "suffix": "", "stream_options": None,
            "response_format": {"type": "text"}, "tools": [], "tool_choice": "auto", "top_k": 0, "logprobs": False,
            "truncate_prompt_tokens": None, "add_special_tokens": True, **VLLM_DEFAULTS}  # fmt: skip
    assert httpx.post(f"{real.url}{COMPLETION}", json=body).status_code == 200
    nulls: list[tuple[str, dict[str, Any]]] = [
        (CHAT, {"messages": USER, "max_tokens": 1, "stream": True, "stream_options": {"include_usage": None}}),
        ("/v1/embeddings", {"input": "x", "encoding_format": None}),
        ("/tokenize", {"prompt": "x", "add_special_tokens": None}),
    ]
    for path, each in nulls:
        response = httpx.post(f"{real.url}{path}", json=each)
        assert response.status_code == 200 and "usage" not in response.text.replace('"usage":{', ""), response.text


def test_the_client_raises_its_own_errors(real: Live) -> None:
    with openai.OpenAI(base_url=f"{real.url}/v1", api_key="none", max_retries=0) as client:
        with pytest.raises(openai.BadRequestError) as caught:
            client.completions.create(model="tiny", prompt="x", temperature=-1)
        assert caught.value.param == "temperature" and caught.value.code == "invalid_value"
        with pytest.raises(openai.NotFoundError) as missing:
            client.completions.create(model="other", prompt="x")
        assert missing.value.code == "model_not_found" and missing.value.param == "model"


def test_the_answers_of_a_refused_request_say_nothing_of_what_python_is(real: Live) -> None:
    text = httpx.post(f"{real.url}{COMPLETION}", json={"prompt": {"a": 1}, "temperature": [], "x": 1}).text
    assert "Traceback" not in text and "pydantic" not in text


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01\x02\x00",  # the first bytes of TLS
        b"nonsense\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: five\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"GET /health HTTP/1.1\r\nno colon\r\n\r\n",
        b"GET /health HTTP/1.1\r\n\r\n",  # without a host
    ],
)
def test_what_is_no_http_is_told_as_every_error_is(real: Live, sent: bytes) -> None:
    address = urlsplit(real.url)
    with socket.create_connection((address.hostname, address.port), timeout=20) as connection:
        connection.sendall(sent)
        with suppress(ConnectionResetError):  # of what it does not read
            answer = connection.recv(65536)
            while more := connection.recv(65536):
                answer += more
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ") and b"Content-Type: application/json" in head
    error = json.loads(body)["error"]
    assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_http")
    assert error["message"].count(";") == 2
    assert httpx.get(f"{real.url}/health").status_code == 200


def test_who_would_have_another_protocol_is_answered_in_this_one(real: Live, caplog: pytest.LogCaptureFixture) -> None:
    headers = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Key": "x", "Sec-WebSocket-Version": "13"}
    assert httpx.get(f"{real.url}/health", headers=headers).status_code == 200
    answer = httpx.get(f"{real.url}/ws", headers=headers)
    assert answer.status_code == 404 and "ends in /v1" in answer.json()["error"]["message"]
    assert "upgrade" not in caplog.text.lower() and "websocket" not in caplog.text.lower()


def test_a_body_that_is_compressed_is_told_so(real: Live) -> None:
    body = gzip.compress(json.dumps({"prompt": "x", "max_tokens": 1}).encode())
    headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    check_error(httpx.post(f"{real.url}{COMPLETION}", content=body, headers=headers), 415, None, "send it uncompressed")
    plain = {"Content-Type": "application/json", "Content-Encoding": "identity"}
    answer = httpx.post(f"{real.url}{COMPLETION}", content=gzip.decompress(body), headers=plain)
    assert answer.status_code == 200
