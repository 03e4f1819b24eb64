"""What is asked of a server: traces are read by what they hold, lengths and times follow the workload and its seed."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moesaic.bench.workload import (
    BLOCK_TOKENS,
    WORDS,
    PlannedRequest,
    TextMeasure,
    TraceRequest,
    Workload,
    describe,
    make_prompt,
    make_text,
    parse_range,
    plan_requests,
    read_trace,
)
from moesaic.errors import ConfigError, DataError

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:47.6805900,12,0

2023-11-16 18:15:50.1805900,879,55
"""
SHAREGPT = "prompt_tokens,output_tokens,turns\r\n34,259,12\r\n0,73,2\r\n"
ARXIV = "num_prefill_tokens,num_decode_tokens,num_total_tokens,pd_ratio\n3772,54,3826,69.85\n"
MOONCAKE = """{"timestamp": 0, "input_length": 1100, "output_length": 5, "hash_ids": [0, 1, 2]}
{"timestamp": 2500, "input_length": 1024, "output_length": 3, "hash_ids": [0, 7]}
"""
TRACES = Path(__file__).resolve().parents[3] / "shared" / "data" / "traces"


@pytest.fixture
def trace(tmp_path: Path) -> Any:
    """A function that writes a trace's text and returns its path."""

    def write(text: str | bytes) -> Path:
        path = tmp_path / "trace"  # no suffix: only the content can tell
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def test_every_format_is_known_by_its_content(trace: Any) -> None:
    first, second, third = read_trace(trace(AZURE))
    assert [(each.prompt_tokens, each.output_tokens) for each in (first, second, third)] == [
        (374, 44),
        (12, 0),
        (879, 55),
    ]
    assert first.time_seconds is not None and second.time_seconds is not None and third.time_seconds is not None
    assert second.time_seconds - first.time_seconds == pytest.approx(1.0)
    assert third.time_seconds - first.time_seconds == pytest.approx(3.5)
    assert read_trace(trace(SHAREGPT)) == [
        TraceRequest(prompt_tokens=34, output_tokens=259),
        TraceRequest(prompt_tokens=0, output_tokens=73),
    ]
    assert read_trace(trace(ARXIV)) == [TraceRequest(prompt_tokens=3772, output_tokens=54)]
    assert read_trace(trace("\n\n" + MOONCAKE)) == [
        TraceRequest(prompt_tokens=1100, output_tokens=5, time_seconds=0.0, block_ids=(0, 1, 2)),
        TraceRequest(prompt_tokens=1024, output_tokens=3, time_seconds=2.5, block_ids=(0, 7)),
    ]
    assert read_trace(trace(b"\xef\xbb\xbf" + SHAREGPT.encode())) == read_trace(trace(SHAREGPT))


def test_requests_come_in_the_order_of_their_times(trace: Any) -> None:
    lines = AZURE.strip().splitlines()
    assert read_trace(trace("\n".join([lines[0], *lines[:0:-1]]))) == read_trace(trace(AZURE))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("\n \n", "is empty"),
        (b"\xff\xfe\x00", "is not text"),
        ("a,b,c\n1,2,3\n", "begins with 'a,b,c'"),
        ("prompt_tokens,output_tokens\n", "no request behind its header"),
        ("prompt_tokens,output_tokens\n1,2\n3\n", "line 3 has 1 fields; 2 are required"),
        ("\n\nprompt_tokens,output_tokens\n1,2\n1,x\n", "line 5 has output_tokens 'x'"),
        ("prompt_tokens,output_tokens\n-1,2\n", "line 2 has prompt_tokens '-1'"),
        ("prompt_tokens,output_tokens\n1e3,2\n", "line 2 has prompt_tokens '1e3'"),
        (f"prompt_tokens,output_tokens\n1{'0' * 5000},2\n", "line 2 has prompt_tokens '1000"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\nyesterday,1,2\n", "line 2 has the time 'yesterday'"),
        ('{"timestamp": 0\n', "line 1 is no JSON"),
        (MOONCAKE + "[]\n", "line 3 lacks every key"),
        ('{"timestamp": 0, "input_length": 5, "output_length": 5}', "line 1 lacks hash_ids"),
        ('{"timestamp": NaN, "input_length": 5, "output_length": 5, "hash_ids": [0]}', "line 1 has the timestamp nan"),
        (f'{{"timestamp": 1{"0" * 400}, "input_length": 5, "output_length": 5, "hash_ids": [0]}}', "has the timestamp"),
        ('{"timestamp": 0, "input_length": 5.5, "output_length": 5, "hash_ids": [0]}', "has input_length '5.5'"),
        ('{"timestamp": 0, "input_length": true, "output_length": 5, "hash_ids": [0]}', "has input_length 'True'"),
        ('{"timestamp": 0, "input_length": 513, "output_length": 5, "hash_ids": [0]}', "1 hash_ids for 513 tokens"),
        ('{"timestamp": 0, "input_length": 5, "output_length": 5, "hash_ids": [-1]}', "no list of numbers"),
        ("[" * 100_000, "begins with"),
        ('{"a":' * 100_000, "line 1 is no JSON"),
    ],
)  # fmt: skip
def test_a_bad_trace_is_told(trace: Any, text: str | bytes, message: str) -> None:
    with pytest.raises(DataError, match=message.replace("[", r"\[")):
        read_trace(trace(text))


def test_a_trace_that_is_not_there_is_told(tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(DataError, match="cannot be read"):
            read_trace(path)


@pytest.mark.skipif(not TRACES.is_dir(), reason="the traces are not on this machine")
@pytest.mark.parametrize(
    ("name", "count", "has_times", "has_blocks"),
    [
        ("azure_llm_2023_conv.csv", 19_366, True, False),
        ("azure_llm_2023_code.csv", 8_819, True, False),
        ("sharegpt_lengths_gpt2.csv", 11_137, False, False),
        ("arxiv_summarization_lengths_llama2.csv", 28_257, False, False),
        ("mooncake_conversation_trace.jsonl", 12_031, True, True),
    ],
)
def test_the_real_traces_are_read(name: str, count: int, has_times: bool, has_blocks: bool) -> None:
    trace = read_trace(TRACES / name)
    assert len(trace) == count
    assert all((each.time_seconds is not None) is has_times for each in trace)
    assert all(bool(each.block_ids) is has_blocks for each in trace)


def test_a_traces_times_are_stretched_to_the_rate(trace: Any) -> None:
    workload = Workload(trace=trace(AZURE), rate=0.5)
    dues = [each.due_seconds for each in plan_requests(workload)]
    # Two gaps of 1 s and 2.5 s become two gaps of 2 s on average, in the same proportion.
    assert dues == pytest.approx([0.0, 4.0 * 1.0 / 3.5, 4.0])
    assert [each.due_seconds for each in plan_requests(replace(workload, num_requests=1))] == [0.0]
    assert plan_requests(replace(workload, num_requests=2))[1].due_seconds == pytest.approx(2.0)


def test_a_trace_without_times_comes_at_random_ones_of_that_rate(trace: Any) -> None:
    lines = "prompt_tokens,output_tokens\n" + "5,5\n" * 4000
    dues = [
        each.due_seconds or 0.0 for each in plan_requests(Workload(trace=trace(lines), num_requests=4000, rate=8.0))
    ]
    gaps = np.diff(dues)
    assert dues[0] == 0.0 and (gaps >= 0).all()
    # Of a Poisson process: the mean of 4,000 gaps is within 5 standard errors, and they vary as much as their mean.
    assert gaps.mean() == pytest.approx(1 / 8, rel=5 / np.sqrt(4000))
    assert gaps.std() == pytest.approx(1 / 8, rel=0.1)


def test_a_closed_loop_has_no_times(trace: Any) -> None:
    for text in (AZURE, SHAREGPT, MOONCAKE):
        assert all(each.due_seconds is None for each in plan_requests(Workload(trace=trace(text), concurrency=2)))


def test_lengths_are_scaled_and_then_cut(trace: Any) -> None:
    workload = Workload(
        trace=trace(AZURE), concurrency=1, scale_lengths=0.25, max_prompt_tokens=100, max_output_tokens=12
    )
    assert [(each.prompt_tokens, each.output_tokens) for each in plan_requests(workload)] == [
        (94, 11),
        (3, 1),
        (100, 12),
    ]


def test_lengths_of_0_become_1_and_their_number_is_told(trace: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("WARNING", logger="moesaic")
    workload = Workload(trace=trace(SHAREGPT), concurrency=1)
    assert [each.prompt_tokens for each in plan_requests(workload)] == [34, 1]
    assert "1 of the first 2 requests" in caplog.text and caplog.text.count(";") >= 1
    caplog.clear()
    plan_requests(replace(workload, num_requests=1))
    assert not caplog.records


def test_lengths_are_drawn_from_their_ranges() -> None:
    workload = Workload(prompt_tokens=(3, 5), output_tokens=(7, 7), num_requests=200, concurrency=1)
    requests = plan_requests(workload)
    assert {each.prompt_tokens for each in requests} == {3, 4, 5} and {each.output_tokens for each in requests} == {7}
    assert len(plan_requests(replace(workload, num_requests=None))) == 100


def test_a_seed_gives_the_same_requests_and_another_one_others() -> None:
    workload = Workload(prompt_tokens=(1, 50), output_tokens=(1, 50), num_requests=30, rate=3.0)
    requests = plan_requests(workload)
    assert plan_requests(workload) == requests != plan_requests(replace(workload, seed=1))
    prompts = [make_prompt(workload, each, index=index) for index, each in enumerate(requests)]
    assert prompts == [make_prompt(workload, each, index=index) for index, each in enumerate(requests)]
    assert [len(prompt) for prompt in prompts] == [each.prompt_tokens for each in requests]


def test_prompts_hold_ids_of_the_vocabulary_and_differ() -> None:
    workload = Workload(prompt_tokens=(64, 64), output_tokens=(1, 1), concurrency=1, vocab_size=7)
    request = PlannedRequest(prompt_tokens=64, output_tokens=1, due_seconds=None)
    prompts = [make_prompt(workload, request, index=index) for index in range(20)]
    prompts += [make_prompt(workload, request, index=index, is_warmup=True) for index in range(20)]
    prompts += [make_prompt(replace(workload, seed=1), request, index=index) for index in range(20)]
    assert {each for prompt in prompts for each in prompt} == set(range(7))
    assert len({tuple(prompt) for prompt in prompts}) == 60


@pytest.mark.parametrize("scale", [None, 0.25, 0.3, 1.7])
def test_equal_blocks_of_a_trace_are_equal_blocks_of_prompts(trace: Any, scale: float | None) -> None:
    workload = Workload(trace=trace(MOONCAKE), concurrency=1, scale_lengths=scale)
    requests = plan_requests(workload)
    first, second = (make_prompt(workload, each, index=index) for index, each in enumerate(requests))
    assert [len(first), len(second)] == [round(1100 * (scale or 1)), round(1024 * (scale or 1))]
    block = requests[0].block_tokens
    assert block == int(np.ceil(BLOCK_TOKENS * (scale or 1)))
    assert first[:block] == second[:block] and first[block : 2 * block] != second[block : 2 * block]
    # To warm up with them would put them into the server's cache.
    assert make_prompt(workload, requests[0], index=0, is_warmup=True)[:block] != first[:block]
    cut = Workload(trace=workload.trace, concurrency=1, scale_lengths=scale, max_prompt_tokens=100)
    assert make_prompt(cut, plan_requests(cut)[0], index=0) == first[:100]


def test_texts_are_words_of_about_the_length_and_differ() -> None:
    assert len(set(WORDS)) == len(WORDS)
    workload = Workload(prompt_tokens=(64, 64), output_tokens=(1, 1), concurrency=1, prompts="text")
    request = PlannedRequest(prompt_tokens=64, output_tokens=1, due_seconds=None)
    measure = TextMeasure(per_word=1.5, around=4.0)
    texts = [make_text(workload, request, measure, index=index) for index in range(20)]
    texts += [make_text(workload, request, measure, index=index, is_warmup=True) for index in range(20)]
    assert {len(text.split(" ")) for text in texts} == {40} and len(set(texts)) == 40
    assert {word for text in texts for word in text.split(" ")} <= set(WORDS)
    assert make_text(workload, replace(request, prompt_tokens=2), measure, index=0).count(" ") == 0


def test_equal_blocks_of_a_trace_are_equal_words(trace: Any) -> None:
    workload = Workload(trace=trace(MOONCAKE), concurrency=1, prompts="chat")
    requests = plan_requests(workload)
    measure = TextMeasure(per_word=2.0, around=10.0)
    first, second = (make_text(workload, each, measure, index=index).split() for index, each in enumerate(requests))
    assert [len(first), len(second)] == [(1100 - 10) // 2, (1024 - 10) // 2]
    block = BLOCK_TOKENS // 2
    assert first[:block] == second[:block] and first[block : 2 * block] != second[block : 2 * block]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trace": Path("t")}, "--trace and --prompt-tokens were both given"),
        ({"prompt_tokens": None, "output_tokens": None}, "neither a trace nor lengths were given"),
        ({"output_tokens": None}, "only --prompt-tokens was given"),
        ({"rate": 1.0}, "both were given"),
        ({"concurrency": None}, "neither was given"),
        ({"scale_lengths": 0.5}, "--scale-lengths was given without --trace"),
        ({"max_prompt_tokens": 5}, "--max-prompt-tokens was given without --trace"),
        ({"max_output_tokens": 5}, "--max-output-tokens was given without --trace"),
        ({"num_requests": 0}, "num_requests is 0"),
        ({"concurrency": 0}, "concurrency is 0"),
        ({"concurrency": None, "rate": 0.0}, "rate is 0"),
        ({"num_requests": 10**20}, "num_requests is 1000000"),
        ({"concurrency": None, "rate": float("nan")}, "rate is nan"),
        ({"prompt_tokens": (0, 5)}, "--prompt-tokens is 0-5"),
        ({"output_tokens": (6, 5)}, "--output-tokens is 6-5"),
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"vocab_size": 9, "prompts": "chat"}, "--vocab-size was given with --prompts chat"),
        ({"vocab_size": 2**63}, "vocab_size is 9223372036854775808; at most"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_a_workload_that_contradicts_itself_is_refused(changes: dict[str, Any], message: str) -> None:
    good = Workload(prompt_tokens=(1, 5), output_tokens=(1, 5), concurrency=1)
    good.check()
    with pytest.raises(ConfigError, match=message):
        plan_requests(replace(good, **changes))


def test_what_a_trace_cannot_give_is_refused(trace: Any) -> None:
    with pytest.raises(ConfigError, match=r"4 requests were asked for and .* holds 3"):
        plan_requests(Workload(trace=trace(AZURE), num_requests=4, concurrency=1))
    same = '{"timestamp": 5, "input_length": 5, "output_length": 5, "hash_ids": [0]}\n' * 3
    with pytest.raises(ConfigError, match="came at the same moment"):
        plan_requests(Workload(trace=trace(same), rate=1.0))


def test_ranges_are_numbers_or_pairs() -> None:
    assert parse_range("256", name="--x") == (256, 256) and parse_range("16-128", name="--x") == (16, 128)
    for text in ("", "a", "5-", "-5", "1-2-3", "1.5"):
        with pytest.raises(ConfigError, match="--x is"):
            parse_range(text, name="--x")


def test_a_description_says_what_was_asked_and_what_came_of_it(trace: Any) -> None:
    workload = Workload(trace=trace(AZURE), rate=2.0, max_prompt_tokens=100)
    described = describe(workload, plan_requests(workload))
    assert described["trace"] == "trace" and described["rate"] == 2.0 and "concurrency" not in described
    assert (described["num_requests"], described["mean_prompt_tokens"]) == (3, pytest.approx(212 / 3))
