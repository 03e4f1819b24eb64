"""What does `moesaic serve` gain or lose where several processes serve one model on one machine's cores?

The run is any with experts, serving_model's of 1.72 B parameters, say (python benchmarks/serve.py prepare --folder DIR
makes DIR/run-bf16). Contenders in turn, each started, driven by `moesaic bench serve` and stopped: `one`, a process
with all threads, and `spread`, torchrun with the experts spread over the processes. Tokens/s and the median time of an
answer's token, for each number of requests at once; the largest process's memory in the end: megabytes of its own, and
of mapped files, where one process has its packed weights, and several what the system keeps of the checkpoint.
Run: python benchmarks/serve_processes.py DIR/run-bf16 [--processes 2] [--concurrency 1 8] [--rounds 3]
"""

import argparse
import json
import re
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from measure import machine, print_table, write_json

CONTENDERS = ("one", "spread")


def processes_below(parent: int) -> list[int]:
    """Return a process's descendants, and itself."""
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return [parent, *(each for child in children for each in processes_below(int(child)))]


def memory_bytes(process: int) -> tuple[int, int]:
    """Return the memory that a process has of its own, and of files."""
    status = Path(f"/proc/{process}/status").read_text()
    own, mapped = (re.search(rf"^{name}:\s*(\d+) kB", status, re.MULTILINE) for name in ("RssAnon", "RssFile"))
    return (int(own[1]) << 10, int(mapped[1]) << 10) if own and mapped else (0, 0)


def drive(url: str, concurrency: int, arguments: argparse.Namespace) -> dict[str, float]:
    """Return tokens/s and the median seconds of an answer's token."""
    command = [
        sys.executable, "-m", "moesaic", "bench", "serve", url, "--json",
        "--prompt-tokens", str(arguments.prompt_tokens), "--output-tokens", str(arguments.output_tokens),
        "--concurrency", str(concurrency), "--requests", str(arguments.requests * concurrency),
    ]  # fmt: skip
    report = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)["summary"]
    return {"rate": report["output_tokens_per_second"], "token": report["tpot"]["p50"], "first": report["ttft"]["p50"]}


def serve_once(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Start a server, drive it, and stop it."""
    start = ["-m", "moesaic"]
    if name != "one":
        start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(arguments.processes), *start]
    settings = ["--set", f"engine.kv_cache_bytes={arguments.kv_cache_bytes}"]
    command = [sys.executable, *start, "serve", str(arguments.run), "--port", "0", *settings]
    with TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with log.open("w") as file, subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT) as server:
            try:
                while (found := re.search(r"Serving .* at (http://\S+)", log.read_text())) is None:
                    if server.poll() is not None:
                        raise SystemExit(log.read_text())
                    time.sleep(0.2)
                loads = {each: drive(found[1], each, arguments) for each in arguments.concurrency}
                memory = max(map(memory_bytes, processes_below(server.pid)))
            finally:
                server.send_signal(signal.SIGTERM)
                server.wait(60)
    return {"loads": loads, "memory": memory}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--requests", type=int, default=3, help="of each load, times its concurrency")
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--kv-cache-bytes", type=int, default=1 << 29)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    print(machine())
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in CONTENDERS}
    for _ in range(arguments.rounds):
        for name in CONTENDERS:
            found[name].append(serve_once(name, arguments))
            print(name, json.dumps(found[name][-1]), flush=True)
    rows = []
    for concurrency in arguments.concurrency:
        for name in CONTENDERS:
            loads, of_one = ([each["loads"][concurrency] for each in found[which]] for which in (name, "one"))
            rows.append(
                {
                    "requests at once": concurrency,
                    "": name,
                    "tokens/s": statistics.median(each["rate"] for each in loads),
                    "ms a token": 1000 * statistics.median(each["token"] for each in loads),
                    "s to the first": statistics.median(each["first"] for each in loads),
                    "ms over one": statistics.median(
                        a["token"] / b["token"] for a, b in zip(loads, of_one, strict=True)
                    ),
                    "own MB": found[name][0]["memory"][0] / 1e6,
                    "mapped MB": found[name][0]["memory"][1] / 1e6,
                }
            )
    print_table(rows)
    write_json(arguments.json, rows)


if __name__ == "__main__":
    main()
