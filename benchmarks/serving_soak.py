"""The part `soak` of serve.py: a long day of our server, with clients that go away or send nonsense."""

import argparse
import asyncio
import json
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from measure import machine, write_json
from serving_model import VOCAB_SIZE
from serving_processes import Started, ours, prepare, started

# In the second half, when everything has been used once.
MOST_GROWTH_MB = 32.0


@dataclass
class Soak:
    """What became of the requests, by kind; lost: what should have been answered, or refused, and was not."""

    counts: Counter[str] = field(default_factory=Counter)
    lost: list[str] = field(default_factory=list)


def soak_part(arguments: argparse.Namespace) -> int:
    """Return 0 where nothing was lost and nothing was kept."""
    arguments.formats = arguments.formats[:1]
    prepare(arguments, with_gguf=False)
    count = arguments.requests or 10_000
    contender = ours(
        arguments.folder, arguments.formats[0], threads=str(arguments.threads),
        settings=[
            f"server.max_concurrent_requests={4 * arguments.clients}",
            # So little that requests wait for blocks, and that all of it has been touched long before the end.
            f"engine.kv_cache_bytes={arguments.soak_kv_bytes}",
        ],
    )  # fmt: skip
    with started(contender, arguments.folder / "soak.log") as server:
        report = asyncio.run(_soak(server, count=count, num_clients=arguments.clients))
    print(machine())
    print(json.dumps(report, indent=2))
    write_json(arguments.output, report)
    return 0 if report["passed"] else 1


async def _soak(server: Started, *, count: int, num_clients: int) -> dict[str, Any]:
    import httpx

    soak, waiting = Soak(), iter(range(count))
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(base_url=server.url, trust_env=False, timeout=600.0, limits=limits) as http:
        known = {"prompt": list(range(1, 40)), "max_tokens": 24, "temperature": 0, "ignore_eos": True}
        first = (await http.post("/v1/completions", json=known)).json()["choices"][0]["text"]
        before, memory = await _idle_stats(http), []
        begun = time.perf_counter()

        async def client() -> None:
            for number in waiting:
                if number % max(1, count // 10) == 0:
                    memory.append(server.memory_bytes() / 1e6)
                await _soak_request(http, soak, number)

        async with asyncio.TaskGroup() as group:
            for _ in range(num_clients):
                group.create_task(client())
        seconds = time.perf_counter() - begun
        after = await _idle_stats(http)
        last = (await http.post("/v1/completions", json=known)).json()["choices"][0]["text"]
        health = (await http.get("/health")).status_code
    memory.append(server.memory_bytes() / 1e6)
    kept = after["kv_blocks_used"] - before["kv_blocks_used"]
    growth = memory[-1] - memory[len(memory) // 2]
    is_idle = after["num_running"] == after["num_waiting"] == 0
    return {
        "passed": not soak.lost and kept == 0 and is_idle and first == last and health == 200
        and growth <= MOST_GROWTH_MB,
        "requests": count,
        "clients": num_clients,
        "seconds": round(seconds, 1),
        "outcomes": dict(sorted(soak.counts.items())),
        "lost": len(soak.lost),
        "lost_examples": soak.lost[:5],
        "kv_blocks_used": [before["kv_blocks_used"], after["kv_blocks_used"]],
        "kv_blocks_cached": [before["kv_blocks_cached"], after["kv_blocks_cached"]],
        "preemptions": after["num_preemptions"] - before["num_preemptions"],
        "memory_mb_by_tenths": [round(each) for each in memory],
        "memory_growth_mb_of_second_half": round(growth, 1),
        "same_answer_at_the_end": first == last,
        "health": health,
    }  # fmt: skip


async def _idle_stats(http: Any) -> dict[str, Any]:
    """Return the engine's figures when nothing runs; what was cancelled may take a step to end."""
    for _ in range(200):
        stats: dict[str, Any] = (await http.get("/v1/stats")).json()
        if not stats["num_running"] and not stats["num_waiting"]:
            break
        await asyncio.sleep(0.05)
    return stats


MALFORMED: tuple[Any, ...] = (
    b"{",
    b"\xff\xfe",
    b"[" * 5000,
    [],
    {},
    {"prompt": []},
    {"prompt": [VOCAB_SIZE + 5], "max_tokens": 4},
    {"prompt": [-1], "max_tokens": 4},
    {"prompt": [1] * 100_000, "max_tokens": 4},
    {"prompt": [1, "a"], "max_tokens": 4},
    {"prompt": "a", "max_tokens": -1},
    {"prompt": "a", "max_tokens": 4, "temperature": -3},
    {"prompt": "a", "max_tokens": 4, "temperatur": 1},
    {"prompt": "a", "max_tokens": 4, "n": 100_000},
    {"prompt": "a", "max_tokens": 4, "stop": [""]},
    {"prompt": "a", "max_tokens": 4, "logit_bias": {"x": 1}},
)


async def _soak_request(http: Any, soak: Soak, number: int) -> None:
    """Send one request of a kind that its number decides, and note what came of it."""
    import httpx

    draw = random.Random(number)
    kind = draw.random()
    try:
        if kind < 0.05:
            await _malformed(http, soak, draw)
        elif kind < 0.10:
            await _cancelled(http, soak, draw)
        else:
            await _whole(http, soak, draw, streams=kind < 0.55)
    except (httpx.HTTPError, ValueError, KeyError, IndexError, TypeError) as error:
        soak.lost.append(f"request {number}: {type(error).__name__}: {error}")


def _short_request(draw: random.Random, *, max_tokens: int) -> dict[str, Any]:
    prompt = [draw.randrange(VOCAB_SIZE - 1) for _ in range(draw.randint(1, 48))]
    if draw.random() < 0.3:  # a beginning that many share
        prompt = [*range(64), *prompt]
    return {
        "prompt": prompt, "max_tokens": max_tokens, "temperature": draw.choice((0, 1)), "ignore_eos": True,
        "seed": draw.randrange(1000),
    }  # fmt: skip


async def _whole(http: Any, soak: Soak, draw: random.Random, *, streams: bool) -> None:
    body = _short_request(draw, max_tokens=draw.randint(1, 16))
    if not streams:
        response = await http.post("/v1/completions", json=body)
        usage = response.json().get("usage", {}) if response.status_code == 200 else {}
        status = response.status_code
    else:
        usage, is_done = {}, False
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        async with http.stream("POST", "/v1/completions", json=body) as response:
            status = response.status_code
            async for line in response.aiter_lines():
                is_done = is_done or line == "data: [DONE]"
                if line.startswith("data: {"):
                    usage = json.loads(line[6:]).get("usage") or usage
        usage = usage if is_done else {}
    counts = (usage.get("prompt_tokens"), usage.get("completion_tokens"))
    if status == 200 and counts == (len(body["prompt"]), body["max_tokens"]):
        soak.counts["streamed" if streams else "whole"] += 1
    else:
        soak.lost.append(f"a request for {body['max_tokens']} tokens: status {status}, counted {counts}")


async def _cancelled(http: Any, soak: Soak, draw: random.Random) -> None:
    """Go away after some chunks of a longer answer, or, without a stream, after a moment."""
    body = _short_request(draw, max_tokens=512)
    patience = draw.randint(0, 5)
    if draw.random() < 0.5:
        body["stream"] = True
        async with http.stream("POST", "/v1/completions", json=body) as response:
            async for _ in response.aiter_lines():
                patience -= 1
                if patience < 0:
                    break
    else:
        try:
            async with asyncio.timeout(0.02 * (1 + patience)):
                await http.post("/v1/completions", json=body)
        except TimeoutError:
            pass
    soak.counts["cancelled"] += 1


async def _malformed(http: Any, soak: Soak, draw: random.Random) -> None:
    wrong = draw.choice(MALFORMED)
    content = wrong if isinstance(wrong, bytes) else json.dumps(wrong).encode()
    response = await http.post("/v1/completions", content=content, headers={"Content-Type": "application/json"})
    if 400 <= response.status_code < 500 and response.json()["error"]["message"]:
        soak.counts["malformed"] += 1
    else:
        soak.lost.append(f"malformed {content[:60]!r}: status {response.status_code}, {response.text[:100]}")
