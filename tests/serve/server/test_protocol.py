"""OpenAI's protocol, spoken by its own client, on a real engine."""

import base64
import concurrent.futures
import json
import re
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from fastapi import FastAPI

from moesaic.config.model import ModelConfig
from moesaic.config.serve import EngineConfig, SpeculationConfig
from moesaic.data.tokenizer import Tokenizer
from moesaic.model.load import load_run
from moesaic.model.transformer import Transformer
from moesaic.serve import expert_load
from moesaic.serve.engine import Engine

from ..conftest import VOCAB_SIZE
from .conftest import MODEL, Live, live

PROMPT = "The state of the Union"
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 9}


@pytest.fixture(scope="module")
def client(real: Live) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{real.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def post(real: Live, path: str, body: Any) -> Any:
    response = httpx.post(f"{real.url}{path}", json=body, timeout=30)
    assert response.status_code == 200, response.text
    return response.json()


def test_a_completion_says_what_it_is_and_what_it_took(client: openai.OpenAI, chat_tokenizer: Tokenizer) -> None:
    done = client.completions.create(model="tiny", prompt=PROMPT, **GREEDY)
    assert done.object == "text_completion" and done.model == "tiny" and done.id.startswith("cmpl-")
    (choice,) = done.choices
    assert choice.finish_reason in ("length", "stop") and choice.logprobs is None
    assert done.usage is not None
    assert done.usage.prompt_tokens == len(chat_tokenizer.encode(PROMPT))
    assert done.usage.total_tokens == done.usage.prompt_tokens + done.usage.completion_tokens
    assert done.usage.completion_tokens <= 9
    again = client.completions.create(model="tiny", prompt=PROMPT, **GREEDY)
    assert again.choices[0].text == choice.text and again.id != done.id


def test_a_student_that_helps_out_is_named(
    real_app: Callable[..., FastAPI], run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_run(run_folder, device="cpu").config.model
    experts = {"num_experts": 3, "layers": [config.num_layers - 1]}
    values = {**config.to_dict(), "moe": experts, "num_kv_heads": config.num_kv_heads}
    student = Transformer(ModelConfig.from_dict(values)).initialize(9)
    with live(real_app(student=student)) as served, openai.OpenAI(base_url=f"{served.url}/v1", api_key="x") as client:
        ask = {"model": "tiny", "extra_body": {"return_experts": True}, **GREEDY}
        alone = client.completions.create(prompt=PROMPT, **ask)
        together = client.completions.create(prompt=[PROMPT, "x"], n=2, **ask)  # no text of it is another's
        assert alone.model == together.model == "tiny"
        assert together.choices[0].text == alone.choices[0].text
        with monkeypatch.context() as patch:
            patch.setattr(Engine, "num_texts", 1)  # the model is at work
            both = client.completions.create(prompt=[PROMPT, "x"], **ask)
            streamed = list(client.completions.create(prompt=[PROMPT, "x"], stream=True, **ask))
        assert {each.model for each in [both, *streamed]} == {"student"}
        for answer, layers in ((together, {1, 2}), (both, {config.num_layers - 1})):
            for choice in answer.choices:
                assert {layer["layer"] for token in choice.experts for layer in token["layers"]} == layers
        # Who asks by an answer's name is answered as ever.
        again = client.completions.create(prompt=PROMPT, **{**ask, "model": both.model})
        assert again.model == "tiny" and again.choices[0].text == alone.choices[0].text
        assert client.models.retrieve("student").id == "tiny" == client.models.list().data[0].id
        with pytest.raises(openai.NotFoundError):
            client.completions.create(prompt=PROMPT, **{**ask, "model": "students"})
        stats, experts = (httpx.get(f"{served.url}/v1/{path}").json() for path in ("stats", "experts"))
        assert stats["is_batch_invariant"] is False  # in fp32
        assert experts["num_steps"] == stats["num_own_steps"] < stats["num_steps"]  # the layers are the model's


def test_a_prompt_is_a_text_or_ids_or_several_of_either(client: openai.OpenAI, chat_tokenizer: Tokenizer) -> None:
    texts = [PROMPT, "Whatever the experts say", "x"]
    ids = [chat_tokenizer.encode(text) for text in texts]
    single = [client.completions.create(model="tiny", prompt=text, **GREEDY).choices[0].text for text in texts]
    for prompt in (texts, ids):
        many = client.completions.create(model="tiny", prompt=prompt, **GREEDY)
        assert [choice.index for choice in many.choices] == [0, 1, 2]
        assert [choice.text for choice in many.choices] == single
    assert client.completions.create(model="tiny", prompt=ids[0], **GREEDY).choices[0].text == single[0]
    empty = client.completions.create(model="tiny", prompt="", **GREEDY)
    start = client.completions.create(model="tiny", prompt=[chat_tokenizer.end_of_text_id], **GREEDY)
    assert empty.choices[0].text == start.choices[0].text


def test_seeds_n_and_priority(client: openai.OpenAI) -> None:
    def draw(**values: Any) -> list[str]:
        done = client.completions.create(model="tiny", prompt=[PROMPT, "x"], max_tokens=12, temperature=1.5, **values)
        assert [choice.index for choice in done.choices] == list(range(len(done.choices)))
        return [choice.text for choice in done.choices]

    many = draw(seed=5, n=3)
    assert len(many) == 6 and len(set(many)) > 3
    assert many == draw(seed=5, n=3, extra_body={"priority": 3}) != draw(seed=6, n=3)
    assert draw(seed=6)[0] == many[1]  # text i has seed + i


def test_counts_may_come_with_every_event(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {
        "model": "tiny", "prompt": PROMPT, "max_tokens": 9, "seed": 1, "n": 2, "stream": True,
        "extra_body": {"stream_options": {"include_usage": True, "continuous_usage_stats": True}},
    }  # fmt: skip
    usages = [chunk.usage for chunk in client.completions.create(**asked)]
    counts = [usage.completion_tokens for usage in usages if usage is not None]
    assert len(counts) == len(usages) > 5 and counts == sorted(counts) and counts[0] < counts[-1] <= 18
    assert usages[0] is not None and usages[-1] is not None
    assert usages[0].prompt_tokens == usages[-1].prompt_tokens > 0


@pytest.mark.parametrize("echo", [False, True])
@pytest.mark.parametrize("logprobs", [None, 0, 2])
@pytest.mark.parametrize("n", [1, 2])
def test_a_stream_gives_in_pieces_what_a_whole_answer_gives(
    client: openai.OpenAI, echo: bool, logprobs: int | None, n: int
) -> None:
    asked: dict[str, Any] = {
        "model": "tiny", "prompt": [PROMPT, "Köln 東京"], "max_tokens": 14, "seed": 1, "n": n, "echo": echo,
        "logprobs": logprobs, "temperature": 0.8,
    }  # fmt: skip
    whole = client.completions.create(**asked)
    chunks = list(client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert len({chunk.id for chunk in chunks}) == 1 and len(chunks) > 5
    assert chunks[-1].usage == whole.usage and not chunks[-1].choices
    assert all(chunk.usage is None for chunk in chunks[:-1])
    for choice in whole.choices:
        pieces = [each for chunk in chunks for each in chunk.choices if each.index == choice.index]
        assert "".join(piece.text for piece in pieces) == choice.text
        assert [piece.finish_reason for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
        assert pieces[-1].finish_reason == choice.finish_reason
        assert choice.text.startswith((PROMPT, "Köln 東京")[choice.index // n]) or not echo
        if logprobs is None:
            assert choice.logprobs is None
            continue
        assert choice.logprobs is not None
        for key in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            parts = [getattr(piece.logprobs, key) for piece in pieces]
            assert [each for part in parts for each in part] == getattr(choice.logprobs, key)


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_a_stream_says_once_and_at_its_end_why_it_ends(client: openai.OpenAI, max_tokens: int) -> None:
    chunks = client.completions.create(
        model="tiny", prompt=PROMPT, max_tokens=max_tokens, echo=True, logprobs=0, n=2, stream=True
    )
    pieces = [choice for chunk in chunks for choice in chunk.choices]
    for index in range(2):
        own = [piece for piece in pieces if piece.index == index]
        assert own[0].text == PROMPT and own[0].finish_reason is None
        assert [piece.finish_reason for piece in own[1:]] == ["length"]


def test_old_logprobs_stand_where_their_tokens_do(client: openai.OpenAI, chat_tokenizer: Tokenizer) -> None:
    prompt = "Grüße aus Köln, 東京 <|endoftext|> and"
    done = client.completions.create(
        model="tiny", prompt=prompt, max_tokens=6, temperature=0, echo=True, logprobs=3,
        logit_bias={str(chat_tokenizer.end_of_text_id): -100},
    )  # fmt: skip
    (choice,) = done.choices
    found = choice.logprobs
    assert found is not None and found.tokens and found.text_offset and found.token_logprobs and found.top_logprobs
    assert choice.text.startswith(prompt)
    ids = chat_tokenizer.encode_prompt(prompt, add_special_tokens=True)
    assert len(found.tokens) == len(ids) + 6 == len(found.text_offset)
    assert found.token_logprobs[0] is None and found.top_logprobs[0] is None
    assert "bytes:" in "".join(found.tokens)  # a token that is a part of a character
    for token, offset in zip(found.tokens, found.text_offset, strict=True):
        if not token.startswith("bytes:"):
            assert choice.text[offset : offset + len(token)] == token
    for token, logprob, top in zip(found.tokens[1:], found.token_logprobs[1:], found.top_logprobs[1:], strict=True):
        assert top is not None and 1 <= len(top) <= 4 and list(top.values()) == sorted(top.values(), reverse=True)
        assert top[token] >= logprob - 1e-9 and logprob <= 0
    # What was generated greedily was the likeliest.
    for logprob, top in zip(found.token_logprobs[-6:], found.top_logprobs[-6:], strict=True):
        assert logprob == max(top.values())


def test_old_logprobs_stand_behind_half_a_character(real: Live, chat_tokenizer: Tokenizer) -> None:
    a, b, c = (chat_tokenizer.encode_prompt(letter, add_special_tokens=False)[0] for letter in "ABC")
    half, rest = (next(i for i in range(VOCAB_SIZE) if chat_tokenizer.token_bytes(i) == x) for x in (b"\xc3", b"\xa9"))

    def offsets_of(ids: list[int], **values: Any) -> tuple[str, list[int]]:
        body = {"prompt": ids, "max_tokens": 0, "echo": True, "logprobs": 0, **values}
        (choice,) = post(real, "/v1/completions", body)["choices"]
        return choice["text"], choice["logprobs"]["text_offset"]

    assert offsets_of([a, half, b, c]) == ("A\ufffdBC", [0, 1, 2, 3])
    assert offsets_of([a, half, half, b]) == ("A\ufffd\ufffdB", [0, 1, 2, 3])
    text, (*_, last) = offsets_of([a, half, rest, c])
    assert text == "AéC" and text[last] == "C"
    # Half a character at the prompt's end is the prompt's, and one before a special token stands before its name.
    forced = {"max_tokens": 2, "logit_bias": {str(b): 100}, "temperature": 0}
    assert offsets_of([a, half], **forced) == ("A\ufffdBB", [0, 1, 2, 3])
    text, offsets = offsets_of([a, half, chat_tokenizer.end_of_text_id, b])
    assert text.startswith("A\ufffd<") and offsets == [0, 1, 2, len(text) - 1]


def test_a_prompt_alone_can_be_scored(client: openai.OpenAI) -> None:
    done = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=0, echo=True, logprobs=1)
    (choice,) = done.choices
    assert choice.text == PROMPT and choice.finish_reason == "length" and done.usage is not None
    assert choice.logprobs is not None and choice.logprobs.tokens is not None
    assert len(choice.logprobs.tokens) == done.usage.prompt_tokens and done.usage.completion_tokens == 0


@pytest.mark.parametrize(
    ("values", "end"),
    [
        ({"chat_template_kwargs": {"enable_thinking": False}}, "<think></think>"),
        ({"chat_template_kwargs": {"enable_thinking": True}}, ""),
        ({"chat_template_kwargs": {}, "reasoning_effort": None}, ""),
        ({"reasoning_effort": "low", "chat_template_kwargs": {"enable_thinking": False}}, "<think></think>low"),
        ({"chat_template_kwargs": {"reasoning_effort": "any"}}, "any"),
    ],
)
def test_a_chat_sets_what_its_template_reads(client: openai.OpenAI, values: dict[str, Any], end: str) -> None:
    messages: list[Any] = [{"role": "user", "content": "one"}]
    done = client.chat.completions.create(model="tiny", messages=messages, extra_body=values, **GREEDY)
    prompt = f"[user]one<|endoftext|>[assistant]{end}"
    plain = client.completions.create(model="tiny", prompt=prompt, **GREEDY)
    assert done.choices[0].message.content == plain.choices[0].text
    assert done.usage and plain.usage and done.usage.prompt_tokens == plain.usage.prompt_tokens


def test_a_chat_is_its_template(client: openai.OpenAI, real: Live) -> None:
    messages: list[Any] = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]},
    ]
    text = "[system]Be brief.<|endoftext|>[user]one\ntwo<|endoftext|>[assistant]"
    done = client.chat.completions.create(model="tiny", messages=messages, **GREEDY)
    plain = client.completions.create(model="tiny", prompt=text, **GREEDY)
    (choice,) = done.choices
    assert done.object == "chat.completion" and choice.message.role == "assistant"
    assert choice.message.content == plain.choices[0].text and done.usage and plain.usage
    assert done.usage.prompt_tokens == plain.usage.prompt_tokens
    later: Any = {"role": "developer", "content": "Be brief."}  # which templates know as system
    renamed = client.chat.completions.create(model="tiny", messages=[later, messages[1]], **GREEDY)
    assert renamed.usage and renamed.usage.prompt_tokens == plain.usage.prompt_tokens
    assert renamed.choices[0].message.content == choice.message.content
    tools: list[Any] = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]
    with_tools = client.chat.completions.create(model="tiny", messages=messages, tools=tools, **GREEDY)
    without = client.chat.completions.create(model="tiny", messages=messages, tools=tools, tool_choice="none", **GREEDY)
    assert with_tools.usage is not None and without.usage is not None and done.usage is not None
    assert with_tools.usage.prompt_tokens > done.usage.prompt_tokens == without.usage.prompt_tokens


def test_a_chat_without_a_limit_goes_on_to_the_last_position(client: openai.OpenAI, real: Live) -> None:
    done = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "x" * 120}], extra_body={"ignore_eos": True}
    )
    assert done.usage is not None and done.usage.total_tokens == 160
    assert done.choices[0].finish_reason == "length"


@pytest.mark.parametrize("n", [1, 3])
def test_a_chat_streams_deltas_after_the_role(client: openai.OpenAI, n: int) -> None:
    asked: dict[str, Any] = {
        "model": "tiny", "messages": [{"role": "user", "content": "Köln"}], "max_completion_tokens": 15, "seed": 3,
        "n": n, "logprobs": True, "top_logprobs": 2,
    }  # fmt: skip
    whole = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True))
    assert all(chunk.object == "chat.completion.chunk" and chunk.usage is None for chunk in chunks)
    for choice in whole.choices:
        deltas = [each for chunk in chunks for each in chunk.choices if each.index == choice.index]
        assert [delta.delta.role for delta in deltas] == ["assistant"] + [None] * (len(deltas) - 1)
        assert "".join(delta.delta.content or "" for delta in deltas) == choice.message.content
        assert deltas[-1].finish_reason == choice.finish_reason
        assert choice.logprobs is not None and choice.logprobs.content
        streamed = [each for delta in deltas if delta.logprobs for each in delta.logprobs.content or ()]
        assert streamed == choice.logprobs.content
        for each in streamed:
            assert len(each.top_logprobs) == 2 and each.logprob <= each.top_logprobs[0].logprob
            assert each.bytes is not None and bytes(each.bytes).decode("utf-8", "replace") == each.token
        # The bytes of all tokens but the last, special, one are the text's.
        data = b"".join(bytes(each.bytes or ()) for each in streamed if each.token != "<|endoftext|>")
        assert data.decode("utf-8", "replace") == choice.message.content
    with client.chat.completions.stream(**asked) as stream:  # which puts the chunks together by itself
        for _ in stream:
            together = stream.current_completion_snapshot
    assert [each.logprobs for each in together.choices] == [each.logprobs for each in whole.choices]


def test_texts_that_end_it(client: openai.OpenAI) -> None:
    whole = client.completions.create(model="tiny", prompt=PROMPT, temperature=0, max_tokens=30)
    text = whole.choices[0].text
    mark = text[8:11]
    cut = client.completions.create(model="tiny", prompt=PROMPT, temperature=0, max_tokens=30, stop=[mark, "never\x00"])
    assert cut.choices[0].text == text[: text.index(mark)] and cut.choices[0].finish_reason == "stop"
    assert cut.choices[0].model_extra is not None and cut.choices[0].model_extra["stop_reason"] == mark


def test_the_experts_of_each_token(real: Live) -> None:
    asked = {"prompt": PROMPT, "max_tokens": 7, "temperature": 0, "return_experts": True}
    (choice,) = post(real, "/v1/completions", asked)["choices"]
    assert 1 <= len(choice["experts"]) <= 7
    for token in choice["experts"]:
        assert [layer["layer"] for layer in token["layers"]] == [1, 2]
        for layer, num_experts in zip(token["layers"], (4, 8), strict=True):
            assert len(set(layer["expert_ids"])) == len(layer["weights"]) == 2
            assert all(0 <= expert < num_experts for expert in layer["expert_ids"])
            assert all(0 <= weight <= 1 for weight in layer["weights"])
    assert "".join(each["token"] for each in choice["experts"]).startswith(choice["text"][:3])
    with httpx.stream("POST", f"{real.url}/v1/completions", json={**asked, "stream": True}) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert lines.pop() == "[DONE]"
    streamed = [httpx.Response(200, text=line).json()["choices"][0] for line in lines]
    assert [each for piece in streamed for each in piece["experts"]] == choice["experts"]
    assert "experts" not in post(real, "/v1/completions", {**asked, "return_experts": False})["choices"][0]


def test_extensions_reach_the_sampler(real: Live, chat_tokenizer: Tokenizer) -> None:
    end = chat_tokenizer.end_of_text_id

    def ask(**values: Any) -> Any:
        return post(real, "/v1/completions", {"prompt": PROMPT, "max_tokens": 8, "seed": 0, **values})

    greedy = ask(temperature=0)["choices"][0]["text"]
    assert ask(top_k=1)["choices"][0]["text"] == greedy == ask(min_p=1.0)["choices"][0]["text"]
    forced = {"logit_bias": {str(end): 100}, "temperature": 0}
    assert ask(**forced)["usage"]["completion_tokens"] == 1
    assert ask(**forced, ignore_eos=True)["usage"]["completion_tokens"] == 8
    assert ask(**forced, min_tokens=5)["usage"]["completion_tokens"] >= 5
    ids = post(real, "/tokenize", {"prompt": " of"})["tokens"]
    stopped = ask(logit_bias={str(ids[0]): 100}, temperature=0, stop_token_ids=ids)
    assert stopped["choices"][0]["stop_reason"] == ids[0] and stopped["usage"]["completion_tokens"] == 1
    assert ask(repetition_penalty=100, temperature=0)["choices"][0]["text"] != greedy


@pytest.mark.parametrize("stream", [False, True])
def test_a_last_message_is_continued(client: openai.OpenAI, real: Live, stream: bool) -> None:
    messages: Any = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "The state "}]
    wanted = {"continue_final_message": True, "add_generation_prompt": False}
    asked: dict[str, Any] = {"model": "tiny", "messages": messages, "extra_body": wanted, **GREEDY}
    if stream:
        found = "".join(
            chunk.choices[0].delta.content or "" for chunk in client.chat.completions.create(**asked, stream=True)
        )
    else:
        found = client.chat.completions.create(**asked).choices[0].message.content
    prompt = "[user]x<|endoftext|>[assistant]The state "
    (choice,) = client.completions.create(model="tiny", prompt=prompt, **GREEDY).choices
    assert found == choice.text


def test_a_text_matches_what_it_has_to(client: openai.OpenAI, real: Live) -> None:
    pytest.importorskip("xgrammar", reason="grammars are xgrammar's (extra `structured`)")

    def chat(response_format: Any, **values: Any) -> Any:
        return client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "x"}], max_tokens=30, seed=0,
            response_format=response_format, **values,
        ).choices  # fmt: skip

    schema = {"name": "answer", "strict": True, "schema": {"enum": ["yes", "no", 7]}}
    for choice in chat({"type": "json_schema", "json_schema": schema}, n=4, temperature=2):
        assert json.loads(choice.message.content) in ("yes", "no", 7) and choice.finish_reason == "stop"
    assert chat({"type": "json_object"})[0].message.content.lstrip().startswith("{")
    of_schema = {"type": "json_schema", "json_schema": schema}
    asked = {"prompt": "x", "max_tokens": 20, "seed": 0, "temperature": 2, "response_format": of_schema}
    (choice,) = post(real, "/v1/completions", asked)["choices"]
    assert json.loads(choice["text"]) in ("yes", "no", 7) and choice["finish_reason"] == "stop"
    grammar = {"kind": "regex", "text": "(ab|cd){3}"}
    (choice,) = post(real, "/v1/completions", {"prompt": "x", "max_tokens": 20, "grammar": grammar})["choices"]
    assert re.fullmatch("(ab|cd){3}", choice["text"]) and choice["finish_reason"] == "stop"
    for bad in ({"kind": "regex", "text": "(("}, {"kind": "json_schema", "text": "{"}, {"kind": "ebnf", "text": "x"}):
        response = httpx.post(f"{real.url}/v1/completions", json={"prompt": "x", "grammar": bad}, timeout=60)
        assert response.status_code == 400 and response.json()["error"]["message"].count(";") >= 2
        assert response.json()["error"]["param"] == "grammar"
    schema = {"$ref": "#/none"}
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    for key, values in (
        ("response_format", {"response_format": {"type": "json_schema", "json_schema": {"schema": schema}}}),
        ("tools", {"tools": [tool], "tool_choice": "required"}),
    ):
        body = {"messages": [{"role": "user", "content": "x"}], **values}
        response = httpx.post(f"{real.url}/v1/chat/completions", json=body, timeout=60)
        assert response.status_code == 400 and response.json()["error"]["param"] == key, response.text


def test_a_grammar_that_cannot_be_followed_is_the_requests_mistake(
    real: Live, chat_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("xgrammar", reason="grammars are xgrammar's (extra `structured`)")
    url, (a,) = f"{real.url}/v1/completions", chat_tokenizer.encode("a")
    body: dict[str, Any] = {"prompt": "x", "max_tokens": 20, "grammar": {"kind": "regex", "text": "a{9}"}}
    assert post(real, "/v1/completions", body)["choices"][0]["text"] == "a" * 9

    def check(message: str, **values: Any) -> None:
        response = httpx.post(url, json={**body, **values}, timeout=60)
        error = response.json()["error"]
        assert response.status_code == 400 and message in error["message"], error
        assert error["type"] == "invalid_request_error" and error["code"] == "cannot_be_met"
        streamed = httpx.post(url, json={**body, **values, "stream": True}, timeout=60)
        *_, last = streamed.text.strip().split("\n\n")
        assert streamed.status_code == 200 and json.loads(last.removeprefix("data: ")) == {"error": error}

    check(f"the grammar allows only token {a} and logit_bias forbids token {a}", logit_bias={str(a): -100})
    check("take what the text needs out of stop_token_ids", stop_token_ids=list(range(VOCAB_SIZE)))
    # Making a text's state is a call, and each token is two.
    times = iter([0.0, 0.0, *(0.3 * call for call in range(1000))])
    monkeypatch.setattr("moesaic.serve.grammar.time.thread_time", lambda: next(times))
    response = httpx.post(url, json={**body, "n": 2}, timeout=60)
    assert response.status_code == 400 and "less ambiguous" in response.json()["error"]["message"]
    monkeypatch.undo()
    assert post(real, "/v1/completions", body)["choices"][0]["text"] == "a" * 9


def test_a_grammar_that_is_known_does_not_wait_for_one_that_is_tried(real: Live) -> None:
    pytest.importorskip("xgrammar", reason="grammars are xgrammar's (extra `structured`)")
    body = {"prompt": "x", "max_tokens": 20, "grammar": {"kind": "regex", "text": "known"}}
    assert post(real, "/v1/completions", body)["choices"][0]["text"] == "known"
    may_end = threading.Event()
    blocked = real.app.state.served.grammar_thread.submit(may_end.wait, 60)
    try:
        assert post(real, "/v1/completions", body)["choices"][0]["text"] == "known"
        assert not blocked.done()
    finally:
        may_end.set()


def test_embeddings_are_of_unit_length_in_both_forms(client: openai.OpenAI, real: Live) -> None:
    texts = ["The people", "a router chooses two of them", "x"]
    found = client.embeddings.create(model="tiny", input=texts)  # base64, which the client decodes
    assert [each.index for each in found.data] == [0, 1, 2] and found.usage.prompt_tokens > 3
    floats = post(real, "/v1/embeddings", {"input": texts})["data"]
    for one, other in zip(found.data, floats, strict=True):
        assert one.embedding == pytest.approx(other["embedding"], abs=1e-6)
        assert sum(value * value for value in one.embedding) == pytest.approx(1, abs=1e-4)
    raw = post(real, "/v1/embeddings", {"input": "x", "encoding_format": "base64", "dimensions": 32})["data"][0]
    assert struct.unpack("<32f", base64.b64decode(raw["embedding"])) == pytest.approx(floats[2]["embedding"], abs=1e-6)


def test_many_texts_are_embedded_at_once_and_others_come_between(real: Live) -> None:
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        asked = pool.submit(post, real, "/v1/embeddings", {"input": [[1 + n % 199] for n in range(200)]})
        while not real.app.state.served.admission.num_inside and not asked.done():
            time.sleep(0.001)
        post(real, "/v1/completions", {"prompt": "x", "max_tokens": 1})
        is_between = not asked.done()
        found = asked.result(60)
    assert is_between
    assert [each["index"] for each in found["data"]] == list(range(200)) and found["usage"]["prompt_tokens"] == 200
    assert found["data"][0]["embedding"] == pytest.approx(found["data"][199]["embedding"], abs=1e-6)


def test_many_clients_some_of_whom_leave_or_err_lose_nothing(real: Live) -> None:
    prompts = [f"{PROMPT} {word}" for word in ("is", "free", "and", "strong", "x")]
    expected = {
        prompt: post(real, "/v1/completions", {"prompt": prompt, **GREEDY})["choices"][0]["text"] for prompt in prompts
    }
    url = f"{real.url}/v1/completions"

    def ask(number: int) -> None:
        prompt = prompts[number % len(prompts)]
        body = {"prompt": prompt, **GREEDY, "stream": number % 2 == 0}
        if number % 10 == 3:
            assert httpx.post(url, json={**body, "temperature": "hot"}, timeout=60).status_code == 400
        elif number % 10 == 6:
            with httpx.stream("POST", url, json={**body, "max_tokens": 150, "ignore_eos": True}, timeout=60) as answer:
                next(answer.iter_lines())  # and it leaves
        elif body["stream"]:
            lines = [line.removeprefix("data: ") for line in httpx.post(url, json=body, timeout=60).text.split("\n\n")]
            assert lines[-2:] == ["[DONE]", ""]
            text = "".join(json.loads(line)["choices"][0]["text"] for line in lines[:-2])
            assert text == expected[prompt]
        else:
            assert httpx.post(url, json=body, timeout=60).json()["choices"][0]["text"] == expected[prompt]

    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        list(pool.map(ask, range(80)))
    until_idle(real)
    stats = httpx.get(f"{real.url}/v1/stats").json()
    assert stats["kv_blocks_used"] == stats["num_running"] == stats["num_waiting"] == stats["num_queued"] == 0
    assert httpx.get(f"{real.url}/health").status_code == 200


def until_idle(real: Live) -> None:
    end = time.monotonic() + 30
    while real.app.state.served.admission.num_inside or httpx.get(f"{real.url}/v1/stats").json()["num_running"]:
        assert time.monotonic() < end, "a request never ended"
        time.sleep(0.01)


def test_models(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert model.id == "tiny" and model.model_extra == {"max_model_len": 160, "has_chat_template": True}
    assert client.models.retrieve("tiny") == model
    with pytest.raises(openai.NotFoundError, match="'other/one' is not served here; 'tiny' is"):
        client.models.retrieve("other/one")


def test_tokens_to_and_fro(real: Live, chat_tokenizer: Tokenizer) -> None:
    text = "Grüße <|endoftext|> 東京"
    found = post(real, "/tokenize", {"prompt": text})
    assert found["tokens"] == chat_tokenizer.encode_prompt(text, add_special_tokens=True)
    assert found["count"] == len(found["tokens"]) and chat_tokenizer.end_of_text_id in found["tokens"]
    assert post(real, "/detokenize", {"tokens": found["tokens"]}) == {"prompt": text}
    assert post(real, "/tokenize", {"prompt": ""})["tokens"] == []


def test_experts_and_stats_and_metrics_count_what_was_done(real: Live) -> None:
    def get(path: str) -> Any:
        response = httpx.get(f"{real.url}{path}")
        assert response.status_code == 200
        return response.json() if "json" in response.headers["content-type"] else response.text

    before = get("/v1/stats")
    post(real, "/v1/completions", {"prompt": [PROMPT, "x"], "max_tokens": 6, "ignore_eos": True})
    after = get("/v1/stats")
    assert after["num_generated_tokens"] - before["num_generated_tokens"] == 12
    assert after["num_finished"] - before["num_finished"] == 2 and after["model"] == "tiny"
    assert after["uptime_seconds"] > 0 and after["num_running"] == 0 and "layers" not in after
    for key in ("ttft_seconds", "time_per_output_token_seconds"):
        assert 0 < after[key]["p50"] <= after[key]["p90"] <= after[key]["p99"]
    found = get("/v1/experts")
    assert [(each["layer"], each["num_experts"], each["top_k"]) for each in found["layers"]] == [(1, 4, 2), (2, 8, 2)]
    assert found["num_steps"] == after["num_steps"]
    for layer in found["layers"]:
        assert len(layer["tokens_per_expert"]) == len(layer["recent_tokens_per_expert"]) == layer["num_experts"]
        assert 0 < layer["entropy"] <= 1
        assert layer["dead"] == [n for n, count in enumerate(layer["tokens_per_expert"]) if count == 0]
        mean = sum(layer["recent_tokens_per_expert"]) / layer["num_experts"]
        assert layer["hot"] == [n for n, count in enumerate(layer["recent_tokens_per_expert"]) if count > 2 * mean]
    get("/v1/models/tiny")
    text = get("/metrics")
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(values["moesaic_generated_tokens_total"]) == after["num_generated_tokens"]
    assert float(values['moesaic_requests_total{path="/v1/completions",status="200"}']) >= 1
    assert float(values['moesaic_requests_total{path="/v1/models/{model:path}",status="200"}']) >= 1
    assert 1 <= float(values['moesaic_expert_imbalance{layer="2"}']) <= 8
    for name in ("time_to_first_token", "time_per_output_token", "request", "queue"):
        assert float(values[f"moesaic_{name}_seconds_count"]) >= 1
    assert get("/health") == {"status": "ok"} and get("/ready") == {"status": "ready"}


@pytest.mark.parametrize("beside", ["nothing", "a draft model", "a student"])
def test_the_share_of_experts_that_were_in_memory_is_told_where_no_other_model_reads(
    real_app: Callable[..., FastAPI], monkeypatch: pytest.MonkeyPatch, beside: str
) -> None:
    disk_bytes = [1000]
    monkeypatch.setattr(expert_load, "disk_bytes_read", lambda: disk_bytes[0])
    other = None if beside == "nothing" else Transformer(ModelConfig.from_dict(MODEL)).initialize(9)
    speculation = SpeculationConfig(method="model", model="by hand") if beside == "a draft model" else None
    app = real_app(
        engine=EngineConfig(kv_cache_bytes=4 << 20, speculation=speculation),
        draft=other if beside == "a draft model" else None,
        student=other if beside == "a student" else None,
    )
    used = 16 * 2 * 2 * 3 * 48 * 32 * 4  # steps, layers, experts of a token; gate, up and down, in fp32
    with live(app) as running:
        disk_bytes[0] += used // 4  # as a mapped file that is not in memory has it
        # A draft that is right saves passes.
        asked = {"prompt": [5], "max_tokens": 60 if beside == "a draft model" else 16, "ignore_eos": True}
        post(running, "/v1/completions", asked)
        text = httpx.get(f"{running.url}/metrics").text
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    if beside == "nothing":
        assert float(values["moesaic_expert_bytes_total"]) == used
        assert float(values["moesaic_expert_hit_rate"]) == 0.75
        # Two experts of a token in each layer.
        assert float(values["moesaic_distinct_experts_total"]) == 2 * float(values["moesaic_steps_total"]) == 32
    else:
        assert float(values["moesaic_steps_total"]) >= 16
        assert "moesaic_expert_hit_rate" not in text
    assert ("moesaic_student_texts_total" in values) == (beside == "a student")


TOOLS: list[Any] = [{"type": "function", "function": {"name": "f"}}]
CALLING = r"on it\n<tool_call>\n\{\"name\": \"f\", \"arguments\": \{\"é\": \[1\]\}\}\n</tool_call>"


def test_calls_of_tools_are_told_from_the_text(client: openai.OpenAI) -> None:
    pytest.importorskip("xgrammar", reason="grammars are xgrammar's (extra `structured`)")
    asked: dict[str, Any] = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "x"}],
        "tools": TOOLS,
        "extra_body": {"grammar": {"kind": "regex", "text": CALLING}},
    }
    (choice,) = client.chat.completions.create(**asked).choices
    assert choice.finish_reason == "tool_calls" and choice.message.content == "on it"
    assert choice.message.tool_calls is not None
    (call,) = choice.message.tool_calls
    assert call.type == "function" and call.function.name == "f" and json.loads(call.function.arguments) == {"é": [1]}

    chunks = [chunk.choices[0] for chunk in client.chat.completions.create(**asked, stream=True) if chunk.choices]
    assert "".join(chunk.delta.content or "" for chunk in chunks) == "on it"
    streamed = [each for chunk in chunks for each in chunk.delta.tool_calls or ()]
    assert [each.index for each in streamed] == [0] and streamed[0].function is not None
    assert streamed[0].function.model_dump() == call.function.model_dump()
    assert streamed[0].id and streamed[0].id != call.id and chunks[-1].finish_reason == "tool_calls"

    without = client.chat.completions.create(**{**asked, "tool_choice": "none"}).choices[0]
    assert without.finish_reason == "stop" and without.message.tool_calls is None
    assert "<tool_call>" in (without.message.content or "")


DIGIT = {"type": "object", "properties": {"n": {"enum": [3, 5]}}, "required": ["n"]}
NAMED_F: Any = {"type": "function", "function": {"name": "f"}}
FORCED: list[Any] = [*TOOLS, {"type": "function", "function": {"name": "g", "parameters": DIGIT}}]


@pytest.mark.parametrize(
    ("choice", "names"),
    [
        ("required", {"f", "g"}),
        ({"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [NAMED_F]}}, {"f"}),
        ({"type": "function", "function": {"name": "f"}}, {"f"}),
        ({"type": "function", "function": {"name": "g"}}, {"g"}),
    ],
)
def test_a_call_that_is_asked_for_is_made(client: openai.OpenAI, choice: Any, names: set[str]) -> None:
    pytest.importorskip("xgrammar", reason="grammars are xgrammar's (extra `structured`)")
    asked: dict[str, Any] = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "x"}],
        "tools": FORCED,
        "tool_choice": choice,
        "parallel_tool_calls": False,
    }
    for seed in range(3):
        (choice,) = client.chat.completions.create(**asked, seed=seed).choices
        assert choice.finish_reason == "tool_calls" and choice.message.content is None
        (call,) = choice.message.tool_calls or ()
        assert call.type == "function" and call.function.name in names
        assert json.loads(call.function.arguments) in ([{}] if call.function.name == "f" else [{"n": 3}, {"n": 5}])


def test_of_some_allowed_tools_the_model_sees_these_alone(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], **GREEDY}
    allowed = {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [NAMED_F]}}
    some = client.chat.completions.create(**asked, tools=FORCED, tool_choice=allowed)
    alone = client.chat.completions.create(**asked, tools=[FORCED[0]])
    everything = client.chat.completions.create(**asked, tools=FORCED)
    assert some.usage and alone.usage and everything.usage
    assert some.usage.prompt_tokens == alone.usage.prompt_tokens < everything.usage.prompt_tokens
    assert some.choices[0].message == alone.choices[0].message


YES = {"type": "object", "properties": {"ok": {"type": "boolean"}, "more": {"type": "object"}}, "required": ["ok"]}
YES_FORMAT = {"type": "json_schema", "json_schema": {"name": "Yes", "schema": YES}}


def test_a_format_is_of_what_is_said_beside_calls(real: Live, client: openai.OpenAI) -> None:
    pytest.importorskip("xgrammar", reason="grammars are xgrammar's (extra `structured`)")
    asked: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "tools": FORCED}
    seen = set()
    for kind in (YES_FORMAT, {"type": "json_object"}):
        for seed in range(12):
            (choice,) = client.chat.completions.create(**asked, response_format=kind, max_tokens=60, seed=seed).choices  # type: ignore[call-overload]
            seen.add(choice.finish_reason)
            calls, said = choice.message.tool_calls, choice.message.content
            if choice.finish_reason == "tool_calls":
                assert said is None and {call.function.name for call in calls} <= {"f", "g"}
            elif choice.finish_reason == "stop":
                assert not calls and isinstance(json.loads(said), dict)
                assert kind["type"] == "json_object" or isinstance(json.loads(said)["ok"], bool)
    assert "stop" in seen
    (begin,) = post(real, "/tokenize", {"prompt": "<"})["tokens"]
    forced = {**asked, "response_format": YES_FORMAT, "tool_choice": "required", "parallel_tool_calls": False}
    called = client.chat.completions.create(**forced, seed=1).choices[0]
    assert called.finish_reason == "tool_calls"
    chosen = client.chat.completions.create(
        **asked,
        response_format=YES_FORMAT,
        parallel_tool_calls=False,
        logit_bias={str(begin): 100},
        seed=1,  # type: ignore[arg-type]
    ).choices[0]
    assert chosen.finish_reason == "tool_calls" and chosen.message.content is None


@pytest.mark.parametrize(
    "schema",
    [
        {"maxProperties": 0},
        {"description": "nothing", "additionalProperties": False},
        {"properties": {"n": {"const": 3}}},
        {"const": {"n": 3}},
        {"enum": [{"n": 3}, {}]},
        {"anyOf": [DIGIT, {"properties": {"n": {"const": 3}}}, {"additionalProperties": False}]},
        {"$ref": "#/$defs/d", "$defs": {"d": {"allOf": [DIGIT]}}},
        {"anyOf": [DIGIT, {"$ref": "#"}]},
    ],
    ids=json.dumps,
)
def test_a_schema_of_objects_may_be_written_in_many_ways(client: openai.OpenAI, schema: dict[str, Any]) -> None:
    pytest.importorskip("xgrammar", reason="grammars are xgrammar's (extra `structured`)")
    tools: list[Any] = [{"type": "function", "function": {"name": "f", "parameters": schema}}]
    (choice,) = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "x"}], tools=tools, tool_choice="required", seed=0,
        parallel_tool_calls=False,
    ).choices  # fmt: skip
    (call,) = choice.message.tool_calls or ()
    assert choice.finish_reason == "tool_calls" and call.type == "function"
    assert json.loads(call.function.arguments).get("n", 3) in (3, 5)


def test_several_calls_may_be_made_where_one_is_required(client: openai.OpenAI) -> None:
    pytest.importorskip("xgrammar", reason="grammars are xgrammar's (extra `structured`)")
    asked: dict[str, Any] = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "x"}],
        "tools": TOOLS,
        "tool_choice": "required",
    }
    lengths = {
        parallel: max(len(choice.message.tool_calls or ()) for choice in done.choices)
        for parallel in (True, False)
        for done in [client.chat.completions.create(**asked, n=8, seed=0, parallel_tool_calls=parallel)]
    }
    assert lengths[True] > 1 == lengths[False]


def test_earlier_calls_reach_the_template_as_objects(client: openai.OpenAI, chat_tokenizer: Tokenizer) -> None:
    def prompt_tokens(arguments: Any) -> int:
        calls = [{"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}]
        messages: list[Any] = [
            {"role": "user", "content": "x"},
            {"role": "assistant", "content": None, "tool_calls": calls},
            {"role": "tool", "tool_call_id": "1", "content": "y"},
        ]
        done = client.chat.completions.create(model="tiny", messages=messages, **GREEDY)
        assert done.usage is not None
        return done.usage.prompt_tokens

    def length(arguments: str) -> int:
        text = f"[user]x<|endoftext|>[assistant]None{arguments}<|endoftext|>[tool]y<|endoftext|>[assistant]"
        return len(chat_tokenizer.encode_prompt(text, add_special_tokens=False))

    assert prompt_tokens('{"a": 1}') == prompt_tokens({"a": 1}) == length('{"a": 1}')
    assert prompt_tokens("no JSON") == length('"no JSON"')
    for none in ('{"a": 1e999}', '{"a": NaN}', '{"a": "\\ud800"}'):  # as the standard has it
        assert prompt_tokens(none) == length(json.dumps(none))
