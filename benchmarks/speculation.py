"""Do drafts pay? Tokens a second of one model alone, with a smaller model's drafts, and with the text's own n-grams.

Prompts are windows of a text; each batch of them is generated with every kind of draft in turn, greedy and sampled. The
tokens are the same (tests hold the engine to that), so only the time differs.
Run: python benchmarks/speculation.py RUN TEXT [--draft RUN] [--batches 1 8] [--tokens 128]
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

from measure import machine, print_table

PROMPT = 128


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("run")
    parser.add_argument("text", type=Path)
    parser.add_argument("--draft", help="a run of the same tokenizer")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--max-tokens", type=int, default=4, help="drafted at once, at most")
    arguments = parser.parse_args()

    from moesaic.config.serve import EngineConfig, SpeculationConfig
    from moesaic.model.load import load_run
    from moesaic.serve.engine import Engine

    loaded = load_run(arguments.run, device="cpu")
    ids = loaded.tokenizer.encode(arguments.text.read_text(encoding="utf-8")[:400_000])
    methods: dict[str, Any] = {
        "alone": None,
        "ngram": SpeculationConfig(method="ngram", max_tokens=arguments.max_tokens),
    }
    draft = None
    if arguments.draft:
        draft = load_run(arguments.draft, device="cpu").model
        methods["draft"] = SpeculationConfig(method="model", model=arguments.draft, max_tokens=arguments.max_tokens)
    print(machine())
    rows = []
    for batch in arguments.batches:
        for temperature in (0.0, 0.8):
            engines = {
                name: Engine(
                    loaded.model,
                    loaded.tokenizer,
                    EngineConfig(max_sequences=batch, speculation=speculation, prefix_caching=False),
                    draft_model=draft if name == "draft" else None,
                )
                for name, speculation in methods.items()
            }
            rates: dict[str, list[float]] = {name: [] for name in engines}
            for round_number in range(1 + arguments.rounds):
                start = round_number * batch * PROMPT
                prompts = [ids[start + i * PROMPT : start + (i + 1) * PROMPT] for i in range(batch)]
                for name, engine in engines.items():
                    rate = generate(engine, prompts, arguments.tokens, temperature)
                    if round_number:
                        rates[name].append(rate)
            for name, engine in engines.items():
                stats = engine.stats()
                rows.append(
                    {
                        "batch": batch,
                        "temperature": temperature,
                        "draft": name,
                        "tokens/s": statistics.median(rates[name]),
                        "x alone": statistics.median(a / b for a, b in zip(rates[name], rates["alone"], strict=True)),
                        "drafted": stats.num_drafted_tokens,
                        "accepted": stats.num_accepted_tokens / max(1, stats.num_drafted_tokens),
                        "of all": stats.num_accepted_tokens / stats.num_generated_tokens,
                    }
                )
    print_table(rows)


def generate(engine: Any, prompts: list[list[int]], tokens: int, temperature: float) -> float:
    """Return the tokens a second of what follows the prompts."""
    from moesaic.config.serve import Sampling

    for number, prompt in enumerate(prompts):
        engine.add_request(
            prompt, Sampling(max_tokens=tokens, temperature=temperature, seed=number, ignore_end_of_text=True)
        )
    begun: set[str] = set()
    while len(begun) < len(prompts):
        begun |= {output.request_id for output in engine.step() if output.tokens}
    started, count = time.perf_counter(), 0
    while engine.has_work:
        count += sum(len(output.tokens) for output in engine.step())
    return count / (time.perf_counter() - started)


if __name__ == "__main__":
    main()
