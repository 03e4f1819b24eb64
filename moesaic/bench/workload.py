"""What a server is asked in a benchmark: how long prompts and answers are, when they come, what prompts hold.

Lengths come from a trace of a real service, or are drawn; times are a trace's own, drawn, or left to a closed loop.
Everything is a function of the workload and its seed. Who sends the requests is serving.py.
"""

import csv
import itertools
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np

from moesaic.errors import ConfigError, DataError
from moesaic.logs import logger

# Tokens of a block of a trace that says which prompts begin alike.
BLOCK_TOKENS = 512
# No model takes so many; more is a mistake, of a file or a server.
MOST_TOKENS = 100_000_000

# Random numbers of one seed that must not depend on one another.
_LENGTHS, _ARRIVALS, _PROMPTS, _BLOCKS, _WARMUP = range(5)
_LATEST = 1e16  # milliseconds
_DEFAULT_REQUESTS = 100
_DEFAULT_VOCAB_SIZE = 1000

# ids: token ids to /v1/completions; text: words to it; chat: words as a message to /v1/chat/completions.
PromptForm = Literal["ids", "text", "chat"]
# What texts are made of: short and frequent, so that most tokenizers have one token for each.
_WORDS = (
    "able about after air all also and answer any area arm art ask away back bad bag ball bank base bed best big "
    "bird black blue board boat body book both box boy bread build burn bus buy call can car care cat cause chair "
    "change cheap city class clean clear close cold color come cook cool corn cost count cow cross cup cut dark day "
    "deal deep do dog door down draw dress drink drive dry each early earth east easy eat egg end even eye face "
    "fact fall farm fast feel few field fill find fine fire first fish five floor fly food foot form four free "
    "fresh full game girl give glass go gold good great green group grow hair half hand hard have head hear heart "
    "heavy help here high hill hold home hope horse hot house hour ice idea inch iron island job join jump keep key "
    "kind king knee know lake land large last late laugh lead learn leave left leg less let letter life light like "
    "line list little live long look love low make man many map mark may mean meat meet milk mind"
)
WORDS = tuple(_WORDS.split())


@dataclass(frozen=True, kw_only=True)
class TraceRequest:
    """One line of a trace. time_seconds: None where it has no times. block_ids: equal ids are equal prompt blocks."""

    prompt_tokens: int
    output_tokens: int
    time_seconds: float | None = None
    block_ids: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class PlannedRequest:
    """A request to be sent. due_seconds: from the begin; None: as soon as there is room in a closed loop.

    block_ids, block_tokens: where the prompt is made of blocks, these and their length.
    """

    prompt_tokens: int
    output_tokens: int
    due_seconds: float | None
    block_ids: tuple[int, ...] = ()
    block_tokens: int = 0


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What is asked for. Lengths: of a trace, or drawn uniformly from ranges (both ends included).

    num_requests: None: 100, or all of a shorter trace. rate: requests per second; concurrency: so many at all times.
    scale_lengths, max_prompt_tokens, max_output_tokens: a trace's lengths are multiplied first, then cut; none is
    shorter than 1. prompts: what they are; vocab_size: if ids, below it; None: 1000.
    """

    trace: Path | None = None
    prompt_tokens: tuple[int, int] | None = None
    output_tokens: tuple[int, int] | None = None
    num_requests: int | None = None
    rate: float | None = None
    concurrency: int | None = None
    scale_lengths: float | None = None
    max_prompt_tokens: int | None = None
    max_output_tokens: int | None = None
    prompts: PromptForm = "ids"
    vocab_size: int | None = None
    seed: int = 0

    def check(self) -> None:
        """Raises: ConfigError for a workload that contradicts itself."""
        drawn = {"--prompt-tokens": self.prompt_tokens, "--output-tokens": self.output_tokens}
        given = [name for name, value in drawn.items() if value is not None]
        if self.trace is not None and given:
            raise ConfigError(f"--trace and {given[0]} were both given; lengths come from one of them; leave one out.")
        if self.trace is None and len(given) < 2:
            have = f"only {given[0]} was" if given else "neither a trace nor lengths were"
            raise ConfigError(
                f"{have} given; a trace is required, or lengths of both prompts and answers; give --trace FILE, or "
                f"--prompt-tokens and --output-tokens."
            )
        if (self.rate is None) is (self.concurrency is None):
            have = "neither was" if self.rate is None else "both were"
            raise ConfigError(
                f"of --rate and --concurrency {have} given; requests come at a rate or as others end; give one of them."
            )
        cuts = {
            "--scale-lengths": self.scale_lengths,
            "--max-prompt-tokens": self.max_prompt_tokens,
            "--max-output-tokens": self.max_output_tokens,
        }
        given = [name for name, value in cuts.items() if value is not None]
        if self.trace is None and given:
            raise ConfigError(
                f"{given[0]} was given without --trace; it changes a trace's lengths; give the lengths that you want."
            )
        counts = {
            "num_requests": self.num_requests,
            "concurrency": self.concurrency,
            "max_prompt_tokens": self.max_prompt_tokens,
            "max_output_tokens": self.max_output_tokens,
            "vocab_size": self.vocab_size,
        }
        for name, count in counts.items():
            if count is not None and count < 1:
                raise ConfigError(f"{name} is {count}; at least 1 is required; raise it.")
        for name, number, most in (
            ("num_requests", self.num_requests, 1e7),
            ("rate", self.rate, 1e6),
            ("scale_lengths", self.scale_lengths, 1e3),
        ):
            if number is not None and not 0 < number <= most:
                raise ConfigError(f"{name} is {number}; more than 0, and at most {most:g}, is required; change it.")
        for name, ends in drawn.items():
            if ends is not None and not 1 <= ends[0] <= ends[1] <= MOST_TOKENS:
                raise ConfigError(
                    f"{name} is {ends[0]}-{ends[1]}; a number from 1, or a range from a lower to a higher one, is "
                    f"required; write 256, or 128-512."
                )
        if self.vocab_size is not None and self.prompts != "ids":
            raise ConfigError(
                f"--vocab-size was given with --prompts {self.prompts}; it says which token ids prompts hold; leave it "
                f"out, or give --prompts ids."
            )
        if self.vocab_size is not None and self.vocab_size > MOST_TOKENS:
            raise ConfigError(
                f"vocab_size is {self.vocab_size}; at most {MOST_TOKENS} is required; name the model's own."
            )
        if self.seed < 0:
            raise ConfigError(f"seed is {self.seed}; 0 or more is required; raise it.")


def parse_range(text: str, *, name: str) -> tuple[int, int]:
    """Read "256" or "128-512" as a range of both ends.

    Raises: ConfigError for anything else.
    """
    low, dash, high = text.partition("-")
    try:
        return int(low), int(high if dash else low)
    except ValueError:
        raise ConfigError(f"{name} is {text!r}; a number or a range is required; write 256, or 128-512.") from None


def plan_requests(workload: Workload) -> list[PlannedRequest]:
    """Return the requests of a workload, in the order in which they are sent.

    Raises: ConfigError for a workload that cannot be, DataError for a trace that cannot be read.
    """
    workload.check()
    requests = _scaled(_first(read_trace(workload.trace), workload), workload) if workload.trace else _drawn(workload)
    return [
        PlannedRequest(
            prompt_tokens=each.prompt_tokens,
            output_tokens=each.output_tokens,
            due_seconds=due,
            block_ids=each.block_ids,
            block_tokens=math.ceil(BLOCK_TOKENS * (workload.scale_lengths or 1.0)) if each.block_ids else 0,
        )
        for each, due in zip(requests, _arrivals(requests, workload), strict=True)
    ]


def make_prompt(workload: Workload, request: PlannedRequest, *, index: int, is_warmup: bool = False) -> list[int]:
    """Return the token ids of a request's prompt; equal blocks of a trace are equal ids, everything else is random.

    is_warmup: other ids than any of the measured requests have, so that nothing of these is known beforehand.
    """
    size = workload.vocab_size or _DEFAULT_VOCAB_SIZE
    return _numbers_below(size, workload, request, index=index, is_warmup=is_warmup)


@dataclass(frozen=True, kw_only=True)
class TextMeasure:
    """How many tokens a server makes of a text: per_word for each word, and what its template and it put around."""

    per_word: float = 1.0
    around: float = 0.0

    def words(self, tokens: int) -> int:
        """Return of how many words a prompt is that has so many tokens; at least 1."""
        return max(1, round((tokens - self.around) / self.per_word))


def make_text(
    workload: Workload, request: PlannedRequest, measure: TextMeasure, *, index: int, is_warmup: bool = False
) -> str:
    """Return the words of a request's prompt, which has about so many tokens; equal and random as in make_prompt."""
    in_words = replace(
        request,
        prompt_tokens=measure.words(request.prompt_tokens),
        block_tokens=max(1, round(request.block_tokens / measure.per_word)),
    )
    numbers = _numbers_below(len(WORDS), workload, in_words, index=index, is_warmup=is_warmup)
    return " ".join(WORDS[number] for number in numbers)


def _numbers_below(size: int, workload: Workload, request: PlannedRequest, *, index: int, is_warmup: bool) -> list[int]:
    stream = _WARMUP if is_warmup else _PROMPTS
    if not request.block_ids or is_warmup:
        return _random_numbers(size, workload, (stream, index), request.prompt_tokens)
    numbers: list[int] = []
    for block in request.block_ids:
        if len(numbers) >= request.prompt_tokens:
            break
        numbers += _random_numbers(size, workload, (_BLOCKS, block), request.block_tokens)
    return numbers[: request.prompt_tokens]


def read_trace(path: Path) -> list[TraceRequest]:
    """Read a trace, by the times of its requests where it has some; which format it is in, its content tells.

    CSV with a header: TIMESTAMP, ContextTokens, GeneratedTokens (Azure), or prompt_tokens, output_tokens, or
    num_prefill_tokens, num_decode_tokens; JSON lines: timestamp (milliseconds), input_length, output_length, hash_ids
    (Mooncake; a block of 512 tokens each). A length may be 0.

    Raises: DataError for a file that cannot be read as one of them, with the line.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            numbered = enumerate(file, start=1)
            number, first = next(((number, line) for number, line in numbered if line.strip()), (0, ""))
            if not first:
                raise DataError(f"{path} is empty; a trace of requests is required; name another file.")
            read = _read_json_lines if first.lstrip().startswith("{") else _read_csv
            requests = list(read(path, first, file, first_line=number))
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); a trace is required; name a file.") from None
    except UnicodeDecodeError:
        raise DataError(f"{path} is not text; a trace in CSV or JSON lines is required; name another file.") from None
    if not requests:
        raise DataError(f"{path} holds no request behind its header; at least one is required; name another file.")
    return sorted(requests, key=lambda each: each.time_seconds or 0.0)


@dataclass(frozen=True)
class _Columns:
    prompt: str
    output: str
    time: str | None


_CSV_FORMATS = (
    _Columns("ContextTokens", "GeneratedTokens", "TIMESTAMP"),
    _Columns("prompt_tokens", "output_tokens", None),
    _Columns("num_prefill_tokens", "num_decode_tokens", None),
)
_TRACE_FORMATS = (
    "a CSV header with TIMESTAMP,ContextTokens,GeneratedTokens, or prompt_tokens,output_tokens, or "
    "num_prefill_tokens,num_decode_tokens, or JSON lines with timestamp, input_length, output_length, hash_ids"
)


def _read_csv(path: Path, first: str, lines: Iterable[str], *, first_line: int) -> Iterator[TraceRequest]:
    try:
        header = [name.strip() for name in next(csv.reader([first]))]
        columns = next(
            (each for each in _CSV_FORMATS if {each.prompt, each.output, each.time or each.prompt} <= set(header)), None
        )
        if columns is None:
            raise DataError(
                f"{path} begins with {first.strip()[:80]!r}; {_TRACE_FORMATS} is required; bring it into one of these "
                f"forms."
            )
        rows = csv.reader(lines)
        for row in rows:
            if not any(cell.strip() for cell in row):
                continue
            where = f"{path}, line {first_line + rows.line_num}"
            if len(row) != len(header):
                raise DataError(
                    f"{where} has {len(row)} fields; {len(header)} are required, as in the header; mend the line."
                )
            values = dict(zip(header, row, strict=True))
            yield TraceRequest(
                prompt_tokens=_count(values[columns.prompt], columns.prompt, where=where),
                output_tokens=_count(values[columns.output], columns.output, where=where),
                time_seconds=None if columns.time is None else _moment(values[columns.time], where=where),
            )
    except csv.Error as error:
        raise DataError(f"{path} cannot be read as CSV ({error}); {_TRACE_FORMATS} is required; mend it.") from None


def _read_json_lines(path: Path, first: str, lines: Iterable[str], *, first_line: int) -> Iterator[TraceRequest]:
    for number, line in enumerate(itertools.chain([first], lines), start=first_line):
        where = f"{path}, line {number}"
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where} is no JSON ({error}); one object a line is required; mend the line.") from None
        names = ("timestamp", "input_length", "output_length", "hash_ids")
        if not isinstance(values, dict) or (missing := [name for name in names if name not in values]):
            lacks = missing[0] if isinstance(values, dict) else "every key"
            raise DataError(f"{where} lacks {lacks}; {_TRACE_FORMATS} is required; mend the line.")
        time, ids = values["timestamp"], values["hash_ids"]
        if type(time) not in (int, float) or not 0 <= time <= _LATEST:  # a NaN is not
            raise DataError(f"{where} has the timestamp {str(time)[:40]}; milliseconds are required; mend the line.")
        prompt_tokens = _count(values["input_length"], "input_length", where=where)
        if not isinstance(ids, list) or not all(type(each) is int and each >= 0 for each in ids):
            raise DataError(f"{where} has hash_ids that are no list of numbers from 0; mend the line.")
        if len(ids) != math.ceil(prompt_tokens / BLOCK_TOKENS):
            raise DataError(
                f"{where} has {len(ids)} hash_ids for {prompt_tokens} tokens; one for each {BLOCK_TOKENS} tokens is "
                f"required; mend the line."
            )
        yield TraceRequest(
            prompt_tokens=prompt_tokens,
            output_tokens=_count(values["output_length"], "output_length", where=where),
            time_seconds=time / 1e3,
            block_ids=tuple(ids),
        )


def _count(value: Any, name: str, *, where: str) -> int:
    try:
        count = int(value) if isinstance(value, str) else value
    except ValueError:
        count = None
    if type(count) is not int or not 0 <= count <= MOST_TOKENS:
        raise DataError(f"{where} has {name} {str(value)[:40]!r}; a number of tokens is required; mend the line.")
    return count


def _moment(text: str, *, where: str) -> float:
    try:
        moment = datetime.fromisoformat(text.strip())
    except ValueError:
        raise DataError(
            f"{where} has the time {text[:40]!r}; a date and time is required, such as 2023-11-16 18:15:46.68; mend "
            f"the line."
        ) from None
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def _first(trace: Sequence[TraceRequest], workload: Workload) -> Sequence[TraceRequest]:
    wanted = workload.num_requests or min(_DEFAULT_REQUESTS, len(trace))
    if wanted > len(trace):
        raise ConfigError(
            f"{wanted} requests were asked for and {workload.trace} holds {len(trace)}; at most so many are possible; "
            f"lower --requests."
        )
    return trace[:wanted]


def _scaled(trace: Sequence[TraceRequest], workload: Workload) -> list[TraceRequest]:
    scale = workload.scale_lengths or 1.0
    num_empty = sum(not each.prompt_tokens or not each.output_tokens for each in trace)
    if num_empty:
        logger.warning(
            "%d of the first %d requests of %s have a length of 0; each of them asks for 1 token instead, the least "
            "that there is.",
            num_empty,
            len(trace),
            workload.trace,
        )

    def length(tokens: int, most: int | None) -> int:
        scaled = max(1, round(tokens * scale))
        return scaled if most is None else min(scaled, most)

    return [
        TraceRequest(
            prompt_tokens=length(each.prompt_tokens, workload.max_prompt_tokens),
            output_tokens=length(each.output_tokens, workload.max_output_tokens),
            time_seconds=each.time_seconds,
            block_ids=each.block_ids,
        )
        for each in trace
    ]


def _drawn(workload: Workload) -> list[TraceRequest]:
    assert workload.prompt_tokens is not None and workload.output_tokens is not None, "check() has seen to it"
    count = workload.num_requests or _DEFAULT_REQUESTS
    random = _random(workload, (_LENGTHS,))
    lengths = [random.integers(low, high + 1, count) for low, high in (workload.prompt_tokens, workload.output_tokens)]
    return [
        TraceRequest(prompt_tokens=int(prompt), output_tokens=int(output))
        for prompt, output in zip(*lengths, strict=True)
    ]


def _arrivals(requests: Sequence[TraceRequest], workload: Workload) -> Sequence[float | None]:
    """Return when each request is due: the trace's times, stretched to the rate, or a Poisson process of that rate."""
    if workload.rate is None:
        return [None] * len(requests)
    times = [each.time_seconds for each in requests if each.time_seconds is not None]
    if not times:
        gaps = _random(workload, (_ARRIVALS,)).exponential(1.0 / workload.rate, len(requests) - 1)
        return [0.0, *np.cumsum(gaps).tolist()]
    span = times[-1] - times[0]
    if len(times) > 1 and span <= 0:
        raise ConfigError(
            f"the first {len(times)} requests of {workload.trace} came at the same moment; times that differ are "
            f"required for --rate; ask for more --requests, or give --concurrency."
        )
    stretch = (len(times) - 1) / workload.rate / span if len(times) > 1 else 1.0
    return [(time - times[0]) * stretch for time in times]


def _random(workload: Workload, place: Sequence[int]) -> np.random.Generator:
    return np.random.default_rng([workload.seed, *place])


def _random_numbers(size: int, workload: Workload, place: Sequence[int], count: int) -> list[int]:
    numbers: list[int] = _random(workload, place).integers(0, size, count).tolist()
    return numbers


def describe(workload: Workload, requests: Sequence[PlannedRequest]) -> dict[str, Any]:
    """Return a workload's settings as JSON-able values, what is None left out, and how long its requests are."""
    values: dict[str, Any] = {
        "trace": None if workload.trace is None else workload.trace.name,
        "prompt_tokens": None if workload.prompt_tokens is None else list(workload.prompt_tokens),
        "output_tokens": None if workload.output_tokens is None else list(workload.output_tokens),
        "rate": workload.rate,
        "concurrency": workload.concurrency,
        "scale_lengths": workload.scale_lengths,
        "max_prompt_tokens": workload.max_prompt_tokens,
        "max_output_tokens": workload.max_output_tokens,
        "prompts": workload.prompts,
        "vocab_size": (workload.vocab_size or _DEFAULT_VOCAB_SIZE) if workload.prompts == "ids" else None,
        "seed": workload.seed,
    }
    return {
        **{key: value for key, value in values.items() if value is not None},
        "num_requests": len(requests),
        "mean_prompt_tokens": float(np.mean([each.prompt_tokens for each in requests])),
        "mean_output_tokens": float(np.mean([each.output_tokens for each in requests])),
    }
