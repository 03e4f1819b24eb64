"""How much memory and time does importing and exporting a 7B-class checkpoint take, against copying its files?

A random Mixtral-like checkpoint in bf16 and in shards of 2 GB, as large as asked, is written to DIR, imported and
exported, each in a process of its own. Floor: a copy of the same folder in the same run, then a sync. All begin with
what they read out of the page cache, and end with what they write on the disk. CPU: seconds of processors, which other
programs disturb less than the clock. Peak memory is the process's largest resident size; logits are not compared where
the model in fp32 does not fit in memory.
Run: python benchmarks/import_memory.py DIR [--gigabytes 14]
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

from measure import machine, print_table

HIDDEN, EXPERT, EXPERTS, VOCABULARY = 4096, 3584, 8, 32_000
HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128


def make(folder: Path, gigabytes: float) -> None:
    """Write the checkpoint shard by shard; the numbers of every matrix are random."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    pool = torch.randn(1 << 26, generator=torch.Generator().manual_seed(0)).mul_(0.02).to(torch.bfloat16)
    place = 0

    def matrix(*shape: int) -> torch.Tensor:
        nonlocal place
        place = (place + 12_345_679) % (pool.numel() // 2)
        count = torch.Size(shape).numel()
        return (
            pool[place : place + count].reshape(shape).clone()
            if count <= pool.numel() // 2
            else torch.cat([pool[: min(pool.numel(), count - start)] for start in range(0, count, pool.numel())]).view(
                shape
            )
        )

    layer_bytes = 2 * (EXPERTS * 3 * EXPERT * HIDDEN + 2 * HEADS * HEAD_DIM * HIDDEN + 2 * KV_HEADS * HEAD_DIM * HIDDEN)
    layers = max(1, round((gigabytes * 1e9 - 4 * VOCABULARY * HIDDEN) / layer_bytes))
    shard: dict[str, torch.Tensor] = {}
    places: dict[str, str] = {}

    def flush() -> None:
        name = f"model-{len(set(places.values())) + 1:05}.safetensors"
        save_file(shard, folder / name, metadata={"format": "pt"})
        places.update(dict.fromkeys(shard, name))
        shard.clear()

    def add(name: str, tensor: torch.Tensor) -> None:
        shard[name] = tensor
        if sum(each.nbytes for each in shard.values()) > 2e9:
            flush()

    add("model.embed_tokens.weight", matrix(VOCABULARY, HIDDEN))
    for layer in range(layers):
        name = f"model.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            add(f"{name}.{norm}.weight", torch.ones(HIDDEN, dtype=torch.bfloat16))
        for each, heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
            add(f"{name}.self_attn.{each}_proj.weight", matrix(heads * HEAD_DIM, HIDDEN))
        add(f"{name}.self_attn.o_proj.weight", matrix(HIDDEN, HEADS * HEAD_DIM))
        add(f"{name}.block_sparse_moe.gate.weight", matrix(EXPERTS, HIDDEN))
        for expert in range(EXPERTS):
            moe = f"{name}.block_sparse_moe.experts.{expert}"
            add(f"{moe}.w1.weight", matrix(EXPERT, HIDDEN))
            add(f"{moe}.w3.weight", matrix(EXPERT, HIDDEN))
            add(f"{moe}.w2.weight", matrix(HIDDEN, EXPERT))
    add("model.norm.weight", torch.ones(HIDDEN, dtype=torch.bfloat16))
    add("lm_head.weight", matrix(VOCABULARY, HIDDEN))
    flush()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    config = {
        "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN, "intermediate_size": EXPERT, "num_hidden_layers": layers, "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM, "num_local_experts": EXPERTS, "num_experts_per_tok": 2,
        "max_position_embeddings": 4096, "hidden_act": "silu", "torch_dtype": "bfloat16",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    from moesaic.data.tokenizer import Tokenizer

    Tokenizer.train(["some text to have a tokenizer of bytes"], vocab_size=300).save(folder)


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def evict(folder: Path) -> None:
    """Take a folder's files out of the page cache."""
    for each in folder.rglob("*"):
        if each.is_file():
            with each.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def convert(kind: str, source: str, target: str) -> None:
    start, cpu = time.perf_counter(), cpu_seconds()
    if kind == "import":
        from moesaic.convert.importer import import_model

        certificate = import_model(source, target)
    else:
        from moesaic.convert.exporter import export_run

        certificate = export_run(source, target)
    os.sync()
    print(
        json.dumps(
            {
                "seconds": time.perf_counter() - start,
                "cpu": cpu_seconds() - cpu,
                "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
                "compared": certificate.not_compared or str(certificate.comparison),
            }
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gigabytes", type=float, default=14.0)
    options = parser.parse_args()
    source, run, out, copy = (options.folder / name for name in ("source", "run", "exported", "copy"))
    # In a process of its own: a child's largest resident size starts at its parent's.
    subprocess.run([sys.executable, __file__, "--make", str(source), str(options.gigabytes)], check=True)
    size = sum(each.stat().st_size for each in source.iterdir())
    os.sync()
    print(machine())
    rows = []
    evict(source)
    start, cpu = time.perf_counter(), cpu_seconds()
    shutil.copytree(source, copy)
    os.sync()
    floor, cpu = time.perf_counter() - start, cpu_seconds() - cpu
    shutil.rmtree(copy)
    rows.append(
        {
            "": "copy, sync", "seconds": floor, "GB/s": size / floor / 1e9, "of the copy": 1.0, "CPU": cpu,
            "peak GB": "",
        }
    )  # fmt: skip
    for kind, given, target in (("import", source, run), ("export", run, out)):
        evict(given)
        command = [sys.executable, __file__, "--convert", kind, str(given), str(target)]
        done = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
        seconds = done["seconds"]
        rows.append(
            {
                "": kind, "seconds": seconds, "GB/s": size / seconds / 1e9, "of the copy": floor / seconds,
                "CPU": done["cpu"], "peak GB": done["peak_gb"],
            }
        )  # fmt: skip
        print(f"{kind}: {done['compared']}")
    print(f"{size / 1e9:.1f} GB in {len(list(source.glob('*.safetensors')))} shards")
    print_table(rows)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--make"]:
        make(Path(sys.argv[2]), float(sys.argv[3]))
    elif sys.argv[1:2] == ["--convert"]:
        convert(*sys.argv[2:])
    else:
        main()
