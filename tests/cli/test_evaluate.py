import errno
import gc
import json
import re
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from moesaic.checkpoint.store import load_tensors, resolve_checkpoint, save_checkpoint
from moesaic.evaluate.perplexity import measure_perplexity, text_windows
from moesaic.model.load import load_run
from moesaic.report.evaluations import read_results


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("The License shall prevail over the Work.\n" * 20, encoding="utf-8")
    return path


def test_the_table_and_the_json_are_the_python_call(cli: Any, trained_run: Path, text: Path) -> None:
    loaded = load_run(trained_run, device="cpu")
    expected = measure_perplexity(
        loaded.model, text_windows(loaded, text, stride=4, limit_tokens=100), device=loaded.device
    )
    command = ["evaluate", trained_run, "--text", text, "--stride", 4, "--limit-tokens", 100, "--device", "cpu"]
    values = json.loads(cli(*command, "--json").out)
    assert values["loss"] == expected.loss and values["perplexity"] == expected.perplexity
    assert values["bits_per_byte"] == expected.bits_per_byte
    assert (values["tokens"], values["window"], values["stride"]) == (100, 16, 4)
    shown = cli(*command).out
    assert f"How {trained_run} predicts {text}" in shown
    assert f"{expected.perplexity:,.3f}" in shown and f"{expected.bits_per_byte:.4f}" in shown


def test_a_model_whose_weights_are_none_is_told(cli: Any, own_run: Path, text: Path) -> None:
    stored = load_tensors(resolve_checkpoint(own_run), "model")
    stored["blocks.0.attention.o_proj.weight"][0, 0] = torch.nan
    save_checkpoint(own_run, 999, model=stored, optimizer={}, metadata={})
    for flags in ((), ("--json",)):
        found = cli("evaluate", f"{own_run}@999", "--text", text, *flags)
        assert found.status == 0 and "@999 gives no finite numbers: its loss is nan" in found.err
    assert "no finite numbers" not in cli("evaluate", own_run, "--text", text).err


def test_prepared_shards_are_a_text_too(cli: Any, trained_run: Path, tiny_data: Path) -> None:
    packed = json.loads(cli("evaluate", trained_run, "--text", tiny_data, "--json").out)
    apart = json.loads(cli("evaluate", trained_run, "--text", tiny_data, "--documents", "--json").out)
    assert packed["tokens"] == apart["tokens"] and packed["bytes"] == apart["bytes"]
    assert packed["documents"] > 1 and packed["loss"] != apart["loss"]


def test_the_text_is_in_the_field_that_is_named(cli: Any, trained_run: Path, text: Path, tmp_path: Path) -> None:
    (tmp_path / "text.jsonl").write_text(json.dumps({"body": text.read_text()}), encoding="utf-8")
    expected = json.loads(cli("evaluate", trained_run, "--text", text, "--json").out)
    command = ["evaluate", trained_run, "--text", tmp_path / "text.jsonl", "--json"]
    found = json.loads(cli(*command, "--text-field", "body").out)
    assert (found["loss"], found["tokens"]) == (expected["loss"], expected["tokens"])
    assert "name the right one with --text-field: body" in cli(*command).err


RECORDS = [{"goal": f"Go {n}", "sol1": "The License.", "sol2": "No Work at all.", "label": n % 2} for n in range(5)]


@pytest.fixture
def records(tmp_path: Path) -> Path:
    pytest.importorskip("lm_eval", reason="lm_eval runs the tasks (extra `evaluate`)")
    folder = tmp_path / "records"
    folder.mkdir()
    (folder / "piqa_valid.jsonl").write_text("".join(json.dumps(row) + "\n" for row in RECORDS), encoding="utf-8")
    return folder


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    path = tmp_path / "labelled.jsonl"
    texts = {"law": "The License shall prevail over the Work.", "number": "1 2 3 4 5 6 7 8"}
    rows = [{"topic": topic, "text": text} for topic, text in texts.items() for _ in range(4)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def own_run(trained_run: Path, tmp_path: Path) -> Path:
    """A copy, since results are kept in a run's folder."""
    return Path(shutil.copytree(trained_run, tmp_path / "own"))


def test_a_text_of_several_runs_is_a_column_and_a_line_each(
    cli: Any, trained_run: Path, own_run: Path, text: Path
) -> None:
    lines = cli("evaluate", trained_run, own_run, "--text", text, "--json").out.splitlines()
    assert [json.loads(line)["run"] for line in lines] == [str(trained_run), str(own_run)]
    shown = cli("evaluate", trained_run, trained_run, "--text", text, "--fp32").out
    assert f"How the runs predict {text}" in shown
    perplexity = next(line for line in shown.splitlines() if line.startswith("perplexity"))
    assert len(set(perplexity.split()[1:])) == 1 and len(perplexity.split()) == 3


def test_a_run_that_is_not_there_is_refused_before_any_is_measured(cli: Any, trained_run: Path, text: Path) -> None:
    refused = cli("evaluate", trained_run, f"{trained_run}-typo", "--text", text, "--json")
    assert refused.status == 2 and refused.out == ""
    assert f"{trained_run}-typo does not exist" in refused.err


def test_what_a_run_cannot_do_is_refused_before_any_is_measured(
    cli: Any, trained_run: Path, text: Path, labelled: Path, tmp_path: Path
) -> None:
    small = tmp_path / "small"
    done = cli("convert", "quantize", trained_run, small, "--experts", "int8", "--rest", "int8", "--calibrate", "none",
               "--text", text, "--force")  # fmt: skip
    assert done.status == 0, done.err
    refused = cli("evaluate", trained_run, small, "--text", text, "--fp32", "--json")
    assert refused.status == 2 and refused.out == "" and "is quantised (" in refused.err
    dense = Path(shutil.copytree(trained_run, tmp_path / "dense"))
    config = (dense / "config.yaml").read_text()
    (dense / "config.yaml").write_text(re.sub(r"\n  moe:\n(?:    .*\n)+", "\n  moe: null\n", config))
    refused = cli("evaluate", trained_run, dense, "--domains", labelled, "--domain-field", "topic", "--json")
    assert refused.status == 2 and refused.out == "" and "the model has no MoE layers" in refused.err


def test_what_was_measured_is_shown_where_a_later_run_is_broken(
    cli: Any, trained_run: Path, own_run: Path, text: Path
) -> None:
    (weights,) = (own_run / "checkpoints").glob("*/model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-100])
    result = cli("evaluate", trained_run, own_run, "--text", text)
    assert result.status == 2 and str(own_run) in result.err
    assert f"How {trained_run} predicts {text}" in result.out and "bits per byte" in result.out


def test_tasks_are_run_kept_drawn_and_told(cli: Any, own_run: Path, records: Path) -> None:
    command = ["evaluate", own_run, "--tasks", "piqa", "--tasks-data", records, "--device", "cpu"]
    shown = cli(*command, "--samples").out
    (result,) = read_results(own_run)
    assert (result.task, result.num_records, result.shots, result.precision) == ("piqa", 5, 0, "bf16")
    assert result.records_from == str(records / "piqa_valid.jsonl") and result.versions["lm_eval"]
    assert result.fingerprints["weights"] == resolve_checkpoint(own_run).files["model.safetensors"]["sha256"]
    assert f"{result.metrics['acc'].value:.4f} ±" in shown and "acc_norm" in shown
    folder = own_run / "evaluations" / f"step-{result.step:08d}"
    samples = [json.loads(line) for line in (folder / "piqa.samples.jsonl").read_text().splitlines()]
    assert [sample["doc"]["goal"] for sample in samples] == [row["goal"] for row in RECORDS]
    assert sum(sample["acc"] for sample in samples) / 5 == result.metrics["acc"].value
    assert (own_run / "plots" / "evaluations.png").is_file()
    printed = json.loads(cli(*command, "--limit", 3, "--shots", 1, "--fp32", "--json").out)
    assert (printed["limit"], printed["num_records"], printed["shots"], printed["precision"]) == (3, 3, 1, "fp32")
    assert sorted(path.name for path in folder.glob("*.json")) == ["piqa-1-shot-first-3-fp32.json", "piqa.json"]
    (own_run / "plots" / "evaluations.png").unlink()
    plot = records / "both.png"
    both = cli("evaluate", own_run, f"{own_run}@{result.step}", *command[2:], "--no-keep", "--plot", plot).out
    assert plot.is_file() and not (own_run / "plots" / "evaluations.png").exists()
    row = next(line for line in both.splitlines() if "acc_norm" in line)
    assert row.count("±") == 2 and len(read_results(own_run)) == 2


def test_a_run_has_left_memory_before_the_next_is_read(
    cli: Any, own_run: Path, records: Path, text: Path, labelled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moesaic.model import load

    models: list[weakref.ref[Any]] = []

    def load_alone(*args: Any, **kwargs: Any) -> Any:
        gc.collect()
        assert not any(model() is not None for model in models)
        loaded = load_run(*args, **kwargs)
        models.append(weakref.ref(loaded.model))
        return loaded

    monkeypatch.setattr(load, "load_run", load_alone)
    measures = ["--tasks", "piqa", "--tasks-data", records, "--text", text, "--domains", labelled]
    ended = cli("evaluate", own_run, own_run, own_run, *measures, "--domain-field", "topic", "--no-keep")
    assert ended.status == 0 and len(models) == 3, ended.err


def test_a_plot_that_cannot_be_written_costs_no_results(
    cli: Any, trained_run: Path, records: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, content: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("moesaic.report.drawing.write_whole", full)
    command = ["evaluate", trained_run, "--tasks", "piqa", "--tasks-data", records, "--no-keep", "--device", "cpu"]
    found = cli(*command, "--plot", records / "a.png")
    assert found.status == 2 and "acc_norm" in found.out
    assert f"DataError: {records / 'a.png'} cannot be written (No space left on device); " in found.err


def test_nothing_is_computed_before_every_task_is_known_to_have_records(
    cli: Any, own_run: Path, records: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = cli("evaluate", own_run, "--tasks", "piqa,lambada,boolq", "--tasks-data", records, "--device", "cpu")
    assert found.status == 2 and "has no records for lambada, boolq;" in found.err and "--tasks piqa)" in found.err
    # What is only found out when records are read stops it before the first task too.
    (records / "boolq_validation.jsonl").write_text('{"odd": 1}\n', encoding="utf-8")
    found = cli("evaluate", own_run, "--tasks", "piqa,boolq", "--tasks-data", records, "--device", "cpu")
    assert found.status == 2 and "boolq_validation.jsonl" in found.err
    assert read_results(own_run) == []


def test_nothing_is_computed_where_no_result_could_be_kept(
    cli: Any, trained_run: Path, own_run: Path, records: Path, labelled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(own_run / "evaluations", ignore_errors=True)
    (own_run / "evaluations").write_text("in the way")
    monkeypatch.setattr("moesaic.model.load.load_run", lambda *args, **kwargs: pytest.fail("a model was loaded"))
    for measure in (["--tasks", "piqa", "--tasks-data", records], ["--domains", labelled, "--domain-field", "topic"]):
        found = cli("evaluate", trained_run, own_run, *measure)
        assert found.status == 2 and f"EvaluationError: {own_run / 'evaluations'}" in found.err
        assert "cannot be written" in found.err and "--no-keep" in found.err


def test_what_was_measured_is_shown_where_it_can_no_longer_be_kept(
    cli: Any, own_run: Path, records: Path, labelled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moesaic.report import evaluations

    wrote = evaluations.write_whole

    def full(path: Path, content: str) -> None:
        if path.name in ("piqa.json", "domains.json"):
            raise OSError(errno.ENOSPC, "No space left on device")
        wrote(path, content)

    monkeypatch.setattr(evaluations, "write_whole", full)
    (records / "boolq_validation.jsonl").write_text(
        '{"passage": "The Work.", "question": "is it work", "label": 1}\n' * 2, encoding="utf-8"
    )
    command = ["evaluate", own_run, "--tasks", "boolq,piqa", "--tasks-data", records, "--device", "cpu"]
    for found in (cli(*command), cli(*command, "--json")):
        assert found.status == 2 and "piqa.json cannot be written" in found.err and "No space left" in found.err
        assert "boolq" in found.out and "piqa" in found.out and "acc_norm" in found.out
    assert [each.task for each in read_results(own_run)] == ["boolq"]
    found = cli("evaluate", own_run, "--domains", labelled, "--domain-field", "topic", "--device", "cpu")
    assert found.status == 2 and "domains.json cannot be written" in found.err and "by chance" in found.out


def test_domains_are_measured_kept_and_drawn(cli: Any, own_run: Path, labelled: Path) -> None:
    command = ["evaluate", own_run, "--domains", labelled, "--domain-field", "topic", "--domain-documents", 3]
    shown = cli(*command).out
    assert f"tells of the domain in {labelled}, 6 documents" in shown and "by chance" in shown
    (path,) = (own_run / "evaluations").glob("step-*/domains.json")
    kept = json.loads(path.read_text())
    assert kept["domains"] == ["law", "number"] and kept["documents"] == [3, 3]
    assert [len(layer["routes"][0]) for layer in kept["layers"]] == [4, 8]
    assert (own_run / "plots" / "expert_domains.png").is_file() and read_results(own_run) == []
    printed = json.loads(cli(*command, "--json").out)
    assert printed["layers"] == kept["layers"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{run}", "--text", "absent.txt"], "DataError: absent.txt does not exist"),
        (["{run}-none", "--text", "{text}"], "CheckpointError: "),
        (["{run}", "--text", "{text}", "--stride", "17"], "ConfigError: stride (17)"),
        (["{run}", "--text", "{text}", "--window", "65"], "ConfigError: window (65)"),
        (["{run}", "--text", "{text}", "--limit-tokens", "0"], "ConfigError: limit_tokens (0)"),
        (["{run}"], "ConfigError: nothing to evaluate was given"),
        (["{run}", "--text", "{text}", "--shots", "2"], "ConfigError: --shots was given without --tasks"),
        (["{run}", "--tasks", "piqa", "--window", "9"], "ConfigError: --window was given without --text"),
        (["{run}", "--tasks", "piqa", "--text-field", "body"], "ConfigError: --text-field was given without --text"),
        (["{run}", "--text", "{text}", "--domain-field", "a"], "ConfigError: --domain-field was given without --dom"),
        (["{run}", "--tasks", "piqq"], "ConfigError: there is no task 'piqq'; the nearest are piqa"),
        (["{run}", "--tasks", "piqa", "--limit", "0"], "ConfigError: limit (0)"),
        (["{run}", "--tasks", "piqa", "--shots", "-1"], "ConfigError: shots (-1)"),
        (["{run}", "--tasks", "piqa", "--samples", "--no-keep"], "ConfigError: --samples was given with --no-keep"),
        (["{run}", "--tasks", "piqa", "--tasks-data", "{run}"], "DataError: {run} has no records for piqa"),
        (["{run}", "--tasks", "piqa", "--plot", "a.xyz"], "ConfigError: a plot was asked for as a.xyz"),
        (["{run}", "--tasks", "piqa", "--plot", "/dev/null/a.png"], "ConfigError: /dev/null/a.png cannot be written"),
        (["{run}", "--domains", "absent.jsonl"], "DataError: absent.jsonl does not exist"),
    ],
)
def test_a_mistake_ends_with_status_2_and_a_message_in_three_parts(
    cli: Any, trained_run: Path, text: Path, arguments: list[str], message: str
) -> None:
    result = cli("evaluate", *(argument.format(run=trained_run, text=text) for argument in arguments))
    assert result.status == 2
    assert message.format(run=trained_run) in result.err
    assert "Traceback" not in result.err and result.err.count(";") >= 2
    assert result.out == ""
