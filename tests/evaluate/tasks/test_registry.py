"""Tasks by name: their files, local records, the hub's, shots, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from moesaic.errors import ConfigError, DataError
from moesaic.evaluate.tasks import registry
from moesaic.evaluate.tasks.records import FORMS
from moesaic.evaluate.tasks.registry import PAPER_TASKS, check_records, load_task, resolve_names, task_names

pytest.importorskip("lm_eval", reason="lm_eval runs the tasks (extra `evaluate`)")

SHARED = Path(__file__).resolve().parents[3].parent / "shared" / "data" / "eval"
PIQA = [{"goal": f"g{n}", "sol1": f"a{n}", "sol2": f"b{n}", "label": n % 2} for n in range(4)]


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def test_every_task_says_where_its_records_are_and_what_counts() -> None:
    assert set(PAPER_TASKS) <= set(task_names())
    folder = Path(registry.__file__).parent
    for name in task_names():
        config = yaml.safe_load((folder / f"{name}.yaml").read_text(encoding="utf-8"))
        assert config["task"] == name and config["metric_list"] and config["metadata"]["version"]
        assert config["source"]["records"] in FORMS and config["source"]["files"]


def test_names_are_resolved_once_each_and_sets_taken_apart() -> None:
    assert resolve_names("piqa, arc_easy,piqa") == ["piqa", "arc_easy"]
    assert resolve_names("blimp,paper,lambada") == ["blimp", *PAPER_TASKS]
    assert resolve_names("own/task.yaml") == ["own/task.yaml"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("lambda", r"no task 'lambda'; the nearest are lambada.*; the tasks are .*; name some"),
        ("piqa,bool", r"no task 'bool'; the nearest are boolq"),
        ("qqqq", r"no task 'qqqq'; the tasks are"),
        (" , ", r"no task is named; .*; try"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest(given: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve_names(given)


def test_records_and_shots_come_from_the_folder(tmp_path: Path) -> None:
    write_lines(tmp_path / "piqa_valid.jsonl", PIQA)
    task = load_task("piqa", data=tmp_path, shots=0, seed=0)
    assert (task.name, task.num_records) == ("piqa", 4) and task.records_from.endswith("piqa_valid.jsonl")
    assert [doc["goal"] for doc in task.harness.eval_docs] == ["g0", "g1", "g2", "g3"]
    load_task("piqa", data=tmp_path, shots=3, seed=0)
    with pytest.raises(ConfigError, match=r"4 shots .* has 3 records .*; ask for fewer, or put .*piqa_train.jsonl"):
        load_task("piqa", data=tmp_path, shots=4, seed=0)
    write_lines(tmp_path / "piqa_train.jsonl", [{**row, "goal": "train"} for row in PIQA])
    task = load_task("piqa", data=tmp_path, shots=4, seed=0)
    assert {doc["goal"] for doc in task.harness.fewshot_docs()} == {"train"}
    context = task.harness.fewshot_context(task.harness.eval_docs[0], num_fewshot=4)
    assert context.count("Question: train\nAnswer: ") == 4 and context.endswith("Question: g0\nAnswer:")


def test_the_hub_is_asked_for_the_same_records(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: list[tuple[Any, ...]] = []

    def load_dataset(path: str, name: str | None, *, split: str) -> Any:
        asked.append((path, name, split))
        text = {"article": "Bees.", "problems": str([{"question": "Who?", "options": list("abcd"), "answer": "C"}])}
        rows = {"EleutherAI/race": [text], "baber/piqa": PIQA}
        return datasets.Dataset.from_list(rows[path])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    task = load_task("race_h", data=None, shots=0, seed=0)
    assert asked == [("EleutherAI/race", "high", "test")] and task.records_from == "hub/EleutherAI/race/high"
    assert task.harness.doc_to_text(task.harness.eval_docs[0]) == "Article: Bees.\n\nWho?"
    load_task("piqa", data=None, shots=2, seed=0)
    assert asked[1:] == [("baber/piqa", None, "validation"), ("baber/piqa", None, "train")]

    def fail(*_: Any, **__: Any) -> Any:
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(DataError, match=r"piqa cannot be had .*no route.*; put piqa_valid.jsonl into a folder"):
        load_task("piqa", data=None, shots=0, seed=0)
    with pytest.raises(DataError, match=r"blimp has no place on the hub .*; name the folder"):
        load_task("blimp", data=None, shots=0, seed=0)


def test_tasks_without_records_are_named_together_with_those_that_have_some(tmp_path: Path) -> None:
    write_lines(tmp_path / "piqa_valid.jsonl", PIQA)
    write_lines(tmp_path / "webqs_test.jsonl", PIQA)
    (tmp_path / "RACE" / "test" / "high").mkdir(parents=True)
    with pytest.raises(DataError) as caught:
        check_records(resolve_names("paper,own.yaml"), tmp_path)
    assert str(caught.value) == (
        f"{tmp_path} has no records for lambada, boolq, triviaqa; lambada_openai_test or lambada_test, boolq_validation"
        f", triviaqa_wikipedia_nocontext_validation or triviaqa_validation, with one of the endings .jsonl, .jsonl.gz, "
        f".json, .parquet, .txt, are required; put them there, or run those that are there "
        f"(--tasks piqa,race_h,webqs,own.yaml), or leave "
        f"--tasks-data out to have them from the hub."
    )
    check_records(["piqa", "race_h", "own.yaml"], tmp_path)
    with pytest.raises(DataError, match=r"for blimp; .* is required; put it there\.$"):  # the hub has none either
        check_records(["blimp"], tmp_path)


def test_missing_records_and_impossible_shots_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has no records for boolq; boolq_validation, with .*; put it there, or leave"):
        load_task("boolq", data=tmp_path, shots=0, seed=0)
    with pytest.raises(DataError, match=r"absent is not a folder; .*; check the path"):
        load_task("boolq", data=tmp_path / "absent", shots=0, seed=0)
    with pytest.raises(ConfigError, match=r"2 shots were asked of blimp, .*; leave --shots out"):
        load_task("blimp", data=tmp_path, shots=2, seed=0)


def test_a_yaml_file_of_ones_own_is_a_task(tmp_path: Path) -> None:
    write_lines(tmp_path / "rows.jsonl", [{"q": "One and one?", "a": "two"}, {"q": "Two and two?", "a": "four"}])
    config = {
        "task": "sums", "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}, "cache_dir": str(tmp_path)},
        "test_split": "test", "output_type": "loglikelihood", "doc_to_text": "{{q}}", "doc_to_target": " {{a}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }  # fmt: skip
    path = tmp_path / "sums.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    task = load_task(str(path), data=None, shots=0, seed=0)
    assert (task.name, task.num_records, task.records_from) == ("sums", 2, str(path))
    path.write_text("task: sums\noutput_type: nothing\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"is not a task that lm_eval can load .*; mend it"):
        load_task(str(path), data=None, shots=0, seed=0)
    with pytest.raises(ConfigError, match=r"absent.yaml does not exist; .*; check the path"):
        load_task(str(tmp_path / "absent.yaml"), data=None, shots=0, seed=0)


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"the evaluation sets are not at {SHARED}")
@pytest.mark.parametrize("name", sorted({*task_names()} - {"race_h"}))
def test_the_shared_sets_are_read_whole(name: str) -> None:
    counts = {
        "arc_challenge": 1172, "arc_easy": 2376, "blimp": 67000, "boolq": 3270, "hellaswag": 10042, "lambada": 5153,
        "piqa": 1838, "triviaqa": 7993, "webqs": 2032, "wikitext2": 62, "winogrande": 1267,
    }  # fmt: skip
    task = load_task(name, data=SHARED, shots=0, seed=0)
    assert task.num_records == counts[name]
