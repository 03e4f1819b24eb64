"""How much memory and time does `prepare` take for a large text?

Builds a text file of the asked size from real text (paragraphs of the embedded corpus, or of --source, shuffled anew
each time round), prepares it in a process of its own, and reports the peak resident memory of that process and its
children together, and the speed; the yardstick is one process of `tokenizers` alone, encode_batch on the same text and
the same tokenizer, which is what anybody would write first.

    python benchmarks/prepare_memory.py --gigabytes 2
"""

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from moesaic.data.corpus import embedded_corpus

_PREPARE = """
import json, sys, time
from moesaic.data.prepare import prepare
arguments = json.loads(sys.argv[1])
began = time.perf_counter()
stage_begins = {}
def show(progress):
    stage_begins.setdefault(progress.stage, time.perf_counter() - began)
manifest = prepare(arguments["source"], arguments["output"], num_workers=arguments["workers"], on_progress=show)
print(json.dumps({
    "seconds": time.perf_counter() - began,
    "tokenizer_seconds": stage_begins["encode"],
    "tokens": manifest.train.num_tokens + manifest.validation.num_tokens,
    "bytes": manifest.train.num_bytes + manifest.validation.num_bytes,
    "documents": manifest.train.num_documents + manifest.validation.num_documents,
}))
"""

_YARDSTICK = """
import json, sys, time
from pathlib import Path
from tokenizers import Tokenizer
arguments = json.loads(sys.argv[1])
tokenizer = Tokenizer.from_file(arguments["tokenizer"])
with open(arguments["source"], encoding="utf-8") as stream:
    text = stream.read(arguments["bytes"])
paragraphs = text.split("\\n\\n")
seconds = []
for _ in range(3):
    began = time.perf_counter()
    for start in range(0, len(paragraphs), 256):
        [encoding.ids for encoding in tokenizer.encode_batch(paragraphs[start : start + 256])]
    seconds.append(time.perf_counter() - began)
print(json.dumps({"seconds": seconds, "megabytes": len(text.encode()) / 1e6}))
"""


def write_text(path: Path, size_bytes: int, source: Path) -> None:
    """Write about `size_bytes` of the paragraphs of all text files in `source`, reshuffled each time round."""
    files = sorted(source.rglob("*.txt")) if source.is_dir() else [source]
    paragraphs = [part for file in files for part in file.read_text(encoding="utf-8").split("\n\n") if part.strip()]
    shuffle = random.Random(0).shuffle
    written = 0
    with path.open("wb") as stream:
        while written < size_bytes:
            shuffle(paragraphs)
            data = ("\n\n".join(paragraphs) + "\n\n").encode()[: size_bytes - written]
            stream.write(data.decode("utf-8", "ignore").encode())
            written += len(data)


def run_watched(code: str, arguments: dict[str, object]) -> tuple[dict[str, float], int, int]:
    """Run code in a process; return what it prints, the peak summed resident memory of its tree, and of its root."""
    command = [sys.executable, "-c", code, json.dumps(arguments)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    root = psutil.Process(process.pid)
    peak = peak_root = 0
    while process.poll() is None:
        try:
            sizes = [each.memory_info().rss for each in (root, *root.children(recursive=True))]
        except psutil.NoSuchProcess:
            continue
        peak, peak_root = max(peak, sum(sizes)), max(peak_root, sizes[0])
        time.sleep(0.05)
    assert process.stdout is not None
    printed = process.stdout.read()
    if process.returncode:
        sys.exit(f"the measured process ended with status {process.returncode}")
    return json.loads(printed), peak, peak_root


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0, help="size of the text (10^9 bytes)")
    parser.add_argument("--workers", type=int, default=None, help="encoding processes; default: prepare's own choice")
    parser.add_argument("--source", type=Path, default=None, help="text file or folder; default: the embedded corpus")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "text.txt"
        write_text(text, int(options.gigabytes * 1e9), options.source or embedded_corpus())
        output = Path(folder) / "shards"
        result, peak, peak_root = run_watched(
            _PREPARE, {"source": str(text), "output": str(output), "workers": options.workers}
        )
        sample = {"source": str(text), "tokenizer": str(output / "tokenizer.json"), "bytes": 20_000_000}
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        yardstick, _, _ = run_watched(_YARDSTICK, sample)
    encode_seconds = result["seconds"] - result["tokenizer_seconds"]
    alone = yardstick["megabytes"] / sorted(yardstick["seconds"])[1]  # type: ignore[index, call-overload]
    megabytes = result["bytes"] / 1e6
    print(f"hardware: {platform.processor() or platform.machine()}, {os.cpu_count()} cores")
    print(f"text: {megabytes:,.0f} MB, {result['documents']:,} documents, {result['tokens']:,} tokens")
    print(f"peak resident memory, all processes: {peak / 1e6:,.0f} MB (the writing one: {peak_root / 1e6:,.0f} MB)")
    print(f"tokenizer: {result['tokenizer_seconds']:.1f} s; encoding and writing: {encode_seconds:.1f} s")
    print(f"encoding: {megabytes / encode_seconds:.2f} MB/s, {result['tokens'] / encode_seconds:,.0f} tokens/s")
    print(f"yardstick, one process of encode_batch: {alone:.2f} MB/s ({1 / alone:.3f} s per MB)")
    print(f"against the yardstick: {megabytes / encode_seconds / alone:.2f}x")


if __name__ == "__main__":
    main()
