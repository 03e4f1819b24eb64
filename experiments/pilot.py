"""The pilot study: what MoE, PR-MoE and Mixture-of-Students give at a size that one core trains in hours.

Equal tokens and data order for all: a dense model S, a dense model L of about 3.5 times its compute, MoE-32 and PR-MoE
on S, and three students of the PR-MoE: without teacher, with it throughout, and staged. Learning rates are tuned for
each on a tenth of the tokens. Interrupted, the same command goes on; each run that ends leaves
experiments/pilot/NAME.json.

Run: make pilot, or python experiments/pilot.py CORPUS [--short] [--report-only]
"""

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from moesaic.config.train import TrainConfig
from moesaic.kernels.threads import spin_briefly

spin_briefly()  # before anything loads torch

from study import Planned, Study, curve, last_loss, spread, tokens_to_reach  # noqa: E402

from moesaic.data.prepare import prepare  # noqa: E402
from moesaic.distill.run import student_config  # noqa: E402
from moesaic.report.comparison import write_comparison  # noqa: E402
from moesaic.report.drawing import empty_figure, set_title, style_axes, write_figure  # noqa: E402
from moesaic.report.quantities import short_number  # noqa: E402

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "studies" / "pilot.md"
BEGIN, END = "<!-- figures: written by experiments/pilot.py -->", "<!-- end of figures -->"

VOCABULARY = 4096
TOKENS = 5_000_000
TUNING_SHARE = 0.1
SHORT_TOKENS = 120_000

# (hidden_size, num_heads): eight layers, MLPs four times as wide.
SMALL, LARGE = (192, 3), (384, 6)
MOE = {"num_experts": 32, "top_k": 1, "every": 2, "router": {"balance_loss": 0.01}}
PR_MOE = {**MOE, "num_experts": [8, 8, 8, 16], "residual": "sum"}
MODELS: dict[str, tuple[tuple[int, int], dict[str, Any] | None]] = {
    "dense-s": (SMALL, None),
    "dense-l": (LARGE, None),
    "moe-32": (SMALL, MOE),
    "pr-moe": (SMALL, PR_MOE),
}
RATES = {
    "dense-s": (1e-3, 2e-3, 4e-3),
    "dense-l": (7e-4, 1.4e-3, 2.8e-3),
    "moe-32": (7e-4, 1.4e-3, 2.8e-3),
    "pr-moe": (7e-4, 1.4e-3, 2.8e-3),
}
SECOND_SEEDS = ("dense-s", "moe-32")
SCHEDULES = ("none", "throughout", "staged")
TITLES = {
    "dense-s": "dense S",
    "dense-l": "dense L",
    "moe-32": "MoE-32",
    "pr-moe": "PR-MoE 8/16",
    "student-none": "student, no teacher",
    "student-throughout": "student, throughout",
    "student-staged": "student, staged",
}


def config_of(model: str, data: Path, *, rate: float, tokens: int, seed: int = 0) -> TrainConfig:
    """Return a run's config. Experts get the paper's longer decay to a lower rate: to 1 % at the last token, where a
    dense model's ends at 10 % after 26/30 of them."""
    (hidden_size, num_heads), moe = MODELS[model]
    return TrainConfig.from_dict(
        {
            "model": {
                "vocab_size": VOCABULARY,
                "hidden_size": hidden_size,
                "num_layers": 8,
                "num_heads": num_heads,
                "intermediate_size": 4 * hidden_size,
                "max_positions": 1024,
                "positions": "rotary",
                "norm": "layernorm",
                "attention_bias": "none",
                "activation": "gelu",
                "tie_embeddings": True,
                "moe": moe,
            },
            "data": {"path": str(data), "sequence_length": 256},
            "tokens": tokens,
            "batch_size": 16,
            "seed": seed,
            "optimizer": {"weight_decay": 0.1},
            "schedule": {
                "kind": "cosine",
                "learning_rate": rate,
                "min_learning_rate": rate * (0.1 if moe is None else 0.01),
                "warmup_tokens": tokens // 25,
                "decay_tokens": tokens * 26 // 30 if moe is None else tokens,
            },
            "evaluation": {"every_tokens": tokens // 20, "sequences": 256},
            "checkpoint": {"every_tokens": tokens // 5, "keep_last": 1},
        }
    )


def tune(study: Study, model: str, data: Path, *, tokens: int) -> float:
    """Return the rate with the lowest loss after a tenth of the tokens, of those in RATES."""
    results = {}
    for rate in RATES[model]:
        config = config_of(model, data, rate=rate, tokens=round(tokens * TUNING_SHARE))
        results[rate] = last_loss(study.run(Planned(f"tuning-{model}-{rate:g}", config, held_out=False)))
    return min(results, key=lambda rate: results[rate])


def run_all(study: Study, data: Path, *, tokens: int) -> None:
    """Run what is not done yet: the two cheap models first, so that the first figures come early."""
    rates = {model: tune(study, model, data, tokens=tokens) for model in MODELS}
    for model in MODELS:
        study.run(Planned(model, config_of(model, data, rate=rates[model], tokens=tokens)))
    for schedule in SCHEDULES:
        config = student_config(study.work / "pr-moe", [f"distill.schedule={schedule}"])
        study.run(Planned(f"student-{schedule}", config))
    for model in SECOND_SEEDS:
        study.run(Planned(f"{model}-seed1", config_of(model, data, rate=rates[model], tokens=tokens, seed=1)))


def load_results(folder: Path) -> dict[str, dict[str, Any]]:
    """Return every result there is, by name."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}


def report(results: Mapping[str, dict[str, Any]], folder: Path) -> str:
    """Draw the figures into a folder and return the page's part that holds them, as Markdown."""
    folder.mkdir(parents=True, exist_ok=True)
    lines: list[str] = []
    models = [name for name in MODELS if name in results]
    students = [name for name in (f"student-{schedule}" for schedule in SCHEDULES) if name in results]
    if models:
        write_comparison(folder / "models.png", [curve(results[name], TITLES[name]) for name in models])
        lines += [f"![Validation loss of the models]({folder.name}/models.png)", ""]
    lines += [*_table(results, [*models, *students]), "", *_claims(results), ""]
    if students and "pr-moe" in results:
        shown = [curve(results[name], TITLES[name]) for name in ("pr-moe", *students)]
        write_comparison(folder / "students.png", shown, title="Students of the PR-MoE")
        lines += [f"![Validation loss of the students]({folder.name}/students.png)", ""]
    if len(students) == len(SCHEDULES):
        write_figure(crossing_figure(results), folder / "crossing.png")
        lines += [f"![What the teacher gives, over training]({folder.name}/crossing.png)", ""]
    lines += _tuning(results)
    return "\n".join(lines).strip()


def crossing_figure(results: Mapping[str, dict[str, Any]]) -> Figure:
    """Each student's validation loss less that of the student without a teacher: below zero, the teacher helps."""
    figure = empty_figure(9.0, 4.6)
    axes = figure.subplots()
    style_axes(axes)
    alone = {point["tokens"]: point["loss"] for point in results["student-none"]["validation"]}
    for name, colour in (("student-throughout", "#d55e00"), ("student-staged", "#0072b2")):
        points = [point for point in results[name]["validation"] if point["tokens"] in alone]
        axes.plot(
            [point["tokens"] / 1e6 for point in points],
            [point["loss"] - alone[point["tokens"]] for point in points],
            color=colour,
            marker="o",
            markersize=4.5,
            label=TITLES[name],
        )
    axes.axhline(0, color="#5f6c7b", linewidth=1.0)
    config = results["student-staged"]["config"]
    axes.axvline(config["distill"]["stop_fraction"] * config["tokens"] / 1e6, color="#5f6c7b", linestyle=":")
    axes.set_xlabel("million tokens (dotted: the staged student's teacher ends)")
    axes.set_ylabel("loss less the one without teacher (nats)")
    set_title(axes, "What the teacher gives", "below zero it helps")
    axes.legend(frameon=False)
    return figure


def _table(results: Mapping[str, dict[str, Any]], names: Sequence[str]) -> list[str]:
    lines = [
        "| run | parameters | active | rate | TFLOP | minutes | tokens/s | validation | held-out | bits/byte |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name in names:
        for each in (name, f"{name}-seed1"):
            if each not in results:
                continue
            found = results[each]
            held_out = found["held_out"]
            lines.append(
                f"| {TITLES[name]}{', second seed' if each != name else ''} | {short_number(found['parameters'])} "
                f"| {short_number(found['active_parameters'])} | {found['config']['schedule']['learning_rate']:g} "
                f"| {found['tokens'] * found['training_flops_per_token'] / 1e12:,.0f} | {found['seconds'] / 60:.1f} "
                f"| {found['tokens_per_second']:,.0f} | {last_loss(found):.4f} | {held_out['loss']:.4f} "
                f"| {held_out['bits_per_byte']:.4f} |"
            )
    return lines


def _claims(results: Mapping[str, dict[str, Any]]) -> list[str]:
    """The study's questions with their figures, each where its runs have ended."""
    lines: list[str] = []
    noises = [
        value
        for name in SECOND_SEEDS
        if f"{name}-seed1" in results and (value := spread([results[name], results[f"{name}-seed1"]])) is not None
    ]
    if noises:
        lines.append(f"- Noise: two seeds differ by at most {max(noises):.4f} nats in validation loss.")
    if {"dense-l", "moe-32"} <= results.keys():
        large = results["dense-l"]
        target = last_loss(large)
        whole = large["tokens"] * large["training_flops_per_token"]
        for name in ("moe-32", "pr-moe"):
            if name not in results:
                continue
            needed = tokens_to_reach(results[name], target)
            if needed is None:
                short = last_loss(results[name]) - target
                lines.append(
                    f"- {TITLES[name]} does not reach dense L's {target:.4f} in these tokens: it is {short:.4f} nats "
                    f"above, with {_share(results[name], large):.0%} of its compute. {_dense_at(results[name], large)}"
                )
            else:
                compute = needed * results[name]["training_flops_per_token"]
                lines.append(
                    f"- {TITLES[name]} reaches dense L's {target:.4f} after {short_number(needed)} tokens, with "
                    f"{whole / compute:.2f} times less compute than dense L took."
                )
    if {"moe-32", "pr-moe"} <= results.keys():
        moe, pyramid = results["moe-32"], results["pr-moe"]
        lines.append(
            f"- PR-MoE has {moe['parameters'] / pyramid['parameters']:.2f} times fewer parameters than MoE-32, "
            f"{_share(pyramid, moe):.2f} times its compute, and a validation loss {_signed(pyramid, moe)}."
        )
    if {"student-none", "student-throughout", "student-staged", "pr-moe"} <= results.keys():
        alone, teacher = results["student-none"], results["pr-moe"]
        lines.append(
            f"- Against the student without a teacher ({last_loss(alone):.4f}): throughout "
            f"{_signed(results['student-throughout'], alone)}, staged {_signed(results['student-staged'], alone)}; "
            f"the teacher itself {_signed(teacher, alone)}."
        )
    return lines


def _dense_at(sparse: Mapping[str, Any], dense: Mapping[str, Any]) -> str:
    """What the dense model took to the loss that the sparse one ended at."""
    needed = tokens_to_reach(dense, last_loss(sparse))
    assert needed is not None, "it ended lower"
    ratio = needed * dense["training_flops_per_token"] / (sparse["tokens"] * sparse["training_flops_per_token"])
    return (
        f"Dense L was at {last_loss(sparse):.4f} after {short_number(needed)} tokens and {ratio:.2f} times this "
        f"compute, amid its schedule: trained for just so long it would have been there sooner."
    )


def _tuning(results: Mapping[str, dict[str, Any]]) -> list[str]:
    lines = ["| tuning | " + " | ".join(("low", "middle", "high")) + " |", "|---|---:|---:|---:|"]
    for model, rates in RATES.items():
        found = [results.get(f"tuning-{model}-{rate:g}") for rate in rates]
        if all(found):
            cells = [f"{rate:g}: {last_loss(each or {}):.4f}" for rate, each in zip(rates, found, strict=True)]
            lines.append(f"| {TITLES[model]} | {' | '.join(cells)} |")
    return lines if len(lines) > 2 else []


def _share(of: Mapping[str, Any], other: Mapping[str, Any]) -> float:
    return (of["tokens"] * of["training_flops_per_token"]) / (other["tokens"] * other["training_flops_per_token"])


def _signed(of: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    difference = last_loss(of) - last_loss(other)
    return (
        f"{abs(difference):.4f} nats {'above' if difference > 0 else 'below'}" if math.isfinite(difference) else "apart"
    )


def write_page(part: str) -> None:
    """Put the figures into the page, between its marks; what is written around them stays."""
    text = PAGE.read_text(encoding="utf-8") if PAGE.is_file() else f"# Pilot study\n\n{BEGIN}\n{END}\n"
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.parent.mkdir(parents=True, exist_ok=True)
    PAGE.write_text(f"{before}{BEGIN}\n\n{part}\n\n{END}{after}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path, help="a folder with train-*.jsonl.gz and val.jsonl.gz")
    parser.add_argument("--work", type=Path, default=Path("runs/pilot"), help="where the run folders lie")
    parser.add_argument("--short", action="store_true", help="a few steps of each, into the work folder: a check")
    parser.add_argument("--report-only", action="store_true", help="only write the page of the results there are")
    options = parser.parse_args()
    if options.report_only:
        write_page(report(load_results(HERE / "pilot"), PAGE.parent / "pilot"))
        return
    held_out = options.corpus / "val.jsonl.gz"
    shards = sorted(options.corpus.glob("train-*.jsonl.gz"))
    if not shards or not held_out.is_file():
        parser.error(f"{options.corpus} has no train-*.jsonl.gz with val.jsonl.gz beside them; name such a folder.")
    data = options.work / "data"
    prepare(shards, data, vocab_size=VOCABULARY, validation_fraction=0.01)
    results = options.work / "results" if options.short else HERE / "pilot"
    study = Study(results, options.work, held_out)
    try:
        run_all(study, data, tokens=SHORT_TOKENS if options.short else TOKENS)
    except KeyboardInterrupt:
        raise SystemExit("Stopped; the same command goes on from here.") from None
    part = report(load_results(results), options.work / "figures" if options.short else PAGE.parent / "pilot")
    if options.short:
        print(part)
    else:
        write_page(part)


if __name__ == "__main__":
    main()
