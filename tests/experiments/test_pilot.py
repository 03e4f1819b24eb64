"""The pilot study's plan, and the page that it makes of results."""

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from moesaic.plan.cost import count_parameters, training_flops_per_token

EXPERIMENTS = Path(__file__).parents[2] / "experiments"


@pytest.fixture(scope="module")
def pilot() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXPERIMENTS))
        yield importlib.import_module("pilot")
        for name in ("pilot", "study"):
            sys.modules.pop(name, None)


def result(pilot: ModuleType, model: str, losses: list[float], *, seed: int = 0) -> dict[str, Any]:
    """What a run of the study would leave, with these losses at equal steps."""
    config = pilot.config_of(model, Path("data"), rate=1e-3, tokens=8_000_000, seed=seed)
    count = count_parameters(config.model)
    tokens = [round(8_000_000 * (1 + place) / len(losses)) for place in range(len(losses))]
    return {
        "config": json.loads(json.dumps(config.to_dict())),
        "parameters": count.total,
        "active_parameters": count.active,
        "training_flops_per_token": training_flops_per_token(config.model, 256),
        "tokens": tokens[-1],
        "seconds": 600.0,
        "tokens_per_second": 13_000.0,
        "validation": [
            {"tokens": at, "seconds": at / 13e3, "loss": loss} for at, loss in zip(tokens, losses, strict=True)
        ],
        "held_out": {"loss": losses[-1] + 0.1, "bits_per_byte": 1.5},
    }


def test_all_models_see_the_same_tokens_and_differ_as_the_study_says(pilot: ModuleType) -> None:
    configs = {name: pilot.config_of(name, Path("data"), rate=1e-3, tokens=10**6) for name in pilot.MODELS}
    assert len({(each.tokens, each.batch_size, each.seed, each.data) for each in configs.values()}) == 1
    flops = {name: training_flops_per_token(each.model, 256) for name, each in configs.items()}
    sizes = {name: count_parameters(each.model).total for name, each in configs.items()}
    assert 3.2 < flops["dense-l"] / flops["dense-s"] < 3.8
    assert flops["moe-32"] < 1.02 * flops["dense-s"]
    assert sizes["moe-32"] > 2 * sizes["pr-moe"] > 2 * sizes["dense-s"]


def test_the_tokens_that_a_loss_takes_lie_between_evaluations(pilot: ModuleType) -> None:
    found = result(pilot, "dense-s", [5.0, 4.0, 3.0, 3.5])
    assert pilot.tokens_to_reach(found, 3.5) == 5_000_000
    assert pilot.tokens_to_reach(found, 6.0) == 2_000_000
    assert pilot.tokens_to_reach(found, 2.9) is None


def test_the_page_says_what_the_results_say(pilot: ModuleType, tmp_path: Path) -> None:
    results = {
        "dense-s": result(pilot, "dense-s", [5.0, 4.2, 4.0]),
        "dense-s-seed1": result(pilot, "dense-s", [5.0, 4.2, 4.01], seed=1),
        "dense-l": result(pilot, "dense-l", [4.9, 4.0, 3.8]),
        "moe-32": result(pilot, "moe-32", [4.9, 3.9, 3.7]),
        "pr-moe": result(pilot, "pr-moe", [4.9, 4.0, 3.9]),
    }
    for schedule, last in (("none", 4.0), ("throughout", 3.95), ("staged", 3.93)):
        results[f"student-{schedule}"] = result(pilot, "pr-moe", [5.0, 4.1, last])
    results["student-staged"]["config"]["distill"] = {"stop_fraction": 0.7}
    page = pilot.report(results, tmp_path / "pilot")
    assert {path.name for path in (tmp_path / "pilot").iterdir()} == {"models.png", "students.png", "crossing.png"}
    assert "two seeds differ by at most 0.0100 nats" in page
    assert "MoE-32 reaches dense L's 3.8000 after 6.67M tokens" in page
    assert "PR-MoE 8/16 does not reach dense L's 3.8000 in these tokens: it is 0.1000 nats above" in page
    assert "0.1000 nats above, with" in page and "Dense L was at 3.9000 after 6.67M tokens and 2." in page
    assert "throughout 0.0500 nats below, staged 0.0700 nats below; the teacher itself 0.1000 nats below." in page
    assert page.count("| dense S") == 2

    # What a study that has only begun can say, without the rest.
    begun = pilot.report({"dense-s": results["dense-s"]}, tmp_path / "begun")
    assert "dense S" in begun and "MoE-32" not in begun


def test_a_page_keeps_what_was_written_around_the_figures(
    pilot: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "studies" / "pilot.md"
    monkeypatch.setattr(pilot, "PAGE", page)
    pilot.write_page("first")
    page.write_text(page.read_text() + "\nWhat it means.\n")
    pilot.write_page("second")
    text = page.read_text()
    assert "second" in text and "first" not in text and text.endswith("\nWhat it means.\n")
