"""How long does it take to choose the tokens of a step from its logits, and to score a prompt's?

A step's rows as the engine draws them (serve/sampler.py), beside the definition in NumPy, row by row, and beside what
generate() of transformers does for the same settings: its logits processors for temperature, top_k, top_p and min_p,
softmax, torch.multinomial, on all rows at once. Scores: the log-probabilities of a token and the five likeliest of 64
rows, beside PyTorch's log_softmax and topk. Logits are random (normal, standard deviation 4).
Run: python benchmarks/kernels/sampling.py
"""

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from measure import machine, median, paired_ratio, print_table, time_in_turn

VOCABULARIES = (32_000, 151_936)
ROWS = (1, 8, 64)
SETTINGS: tuple[dict[str, Any], ...] = (
    {"temperature": 1.0},
    {"temperature": 0.6, "top_k": 20, "top_p": 0.95},
    {"temperature": 0.7, "top_p": 0.9},
    {"temperature": 1.0, "min_p": 0.05},
)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=15)
    arguments = parser.parse_args()

    import torch
    from transformers.generation import logits_process

    from moesaic.config.serve import Sampling
    from moesaic.kernels import select
    from moesaic.kernels.allocator import tune_allocator
    from moesaic.kernels.decode import Decoded
    from moesaic.serve.sampler import RowSampler, SamplingState, score_prompt

    tune_allocator()
    kernels = select.cpu_kernels().name
    print(f"{machine()}, kernels {kernels}")
    torch.manual_seed(0)
    drawn: list[dict[str, Any]] = []
    for size in VOCABULARIES:
        for count in ROWS:
            logits = 4.0 * torch.randn(count, size)
            nothing = torch.empty(0)
            decoded = Decoded(nothing, nothing, nothing, (), logits, logits.argmax(-1).tolist())  # type: ignore[arg-type]
            for settings in SETTINGS:
                states = [
                    SamplingState(Sampling(**settings), [], vocab_size=size, seed=seed, stop_ids=())
                    for seed in range(count)
                ]
                warpers = [logits_process.TemperatureLogitsWarper(settings["temperature"])]
                if "top_k" in settings:
                    warpers.append(logits_process.TopKLogitsWarper(settings["top_k"]))
                if "top_p" in settings:
                    warpers.append(logits_process.TopPLogitsWarper(settings["top_p"]))
                if "min_p" in settings:
                    warpers.append(logits_process.MinPLogitsWarper(settings["min_p"]))

                def ours(decoded: Any = decoded, states: Any = states) -> list[int]:
                    sampler = RowSampler(decoded, [(row, state, 0) for row, state in enumerate(states)])
                    return [sampler.sample(row, state).token_id for row, state in enumerate(states)]

                def theirs(logits: Any = logits, warpers: Any = warpers) -> Any:
                    scores = logits
                    for warper in warpers:
                        scores = warper(None, scores)
                    return torch.multinomial(scores.softmax(-1), 1)

                def defined(ours: Any = ours) -> list[int]:
                    with select.forced("reference"):
                        return ours()  # type: ignore[no-any-return]

                same = sum(one == other for one, other in zip(ours(), defined(), strict=True))
                times = time_in_turn(
                    {kernels: ours, "NumPy": defined, "transformers": theirs}, repeats=arguments.repeats
                )
                drawn.append({
                    "vocabulary": size, "rows": count, "settings": ", ".join(f"{k} {v}" for k, v in settings.items()),
                    "us": median(times[kernels]) * 1e6, "us a row": median(times[kernels]) / count * 1e6,
                    "NumPy / ours": paired_ratio(times, "NumPy", kernels),
                    "transformers / ours": paired_ratio(times, "transformers", kernels),
                    "same as NumPy": f"{same} of {count}",
                })  # fmt: skip
    print_table(drawn)
    scored: list[dict[str, Any]] = []
    for size in VOCABULARIES:
        logits, targets = 4.0 * torch.randn(64, size), list(range(64))

        def score(logits: Any = logits, targets: Any = targets) -> Any:
            return score_prompt(logits, targets, top=5)

        def score_by_torch(logits: Any = logits, targets: Any = targets) -> Any:
            found = torch.log_softmax(logits, -1)
            top = found.topk(5)
            return found[torch.arange(64), torch.tensor(targets)].tolist(), top.values.tolist(), top.indices.tolist()

        def score_by_definition(score: Any = score) -> Any:
            with select.forced("reference"):
                return score()

        got, (wanted, _, likeliest) = score(), score_by_torch()
        torch.testing.assert_close([each.logprob for each in got], wanted, atol=1e-4, rtol=1e-5)
        assert [[top.token_id for top in each.top_logprobs] for each in got] == likeliest
        times = time_in_turn(
            {kernels: score, "NumPy": score_by_definition, "PyTorch": score_by_torch}, repeats=arguments.repeats
        )
        scored.append({
            "vocabulary": size, "rows": 64, "us a row": median(times[kernels]) / 64 * 1e6,
            "NumPy / ours": paired_ratio(times, "NumPy", kernels),
            "PyTorch / ours": paired_ratio(times, "PyTorch", kernels),
        })  # fmt: skip
    print()
    print_table(scored)


if __name__ == "__main__":
    main()
