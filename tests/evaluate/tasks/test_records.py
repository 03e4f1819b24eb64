"""The forms in which the tasks' records are passed around, each read to the same records."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from moesaic.errors import DataError
from moesaic.evaluate.tasks.records import convert_records, find_file, read_records

ARTICLE = "Ada keeps bees. In winter she feeds them sugar."
PROBLEMS: list[dict[str, Any]] = [
    {"question": "Who keeps bees?", "options": ["Ada", "Bo", "Cy", "Di"], "answer": "A"},
    {"question": "In winter they eat  _  .", "options": ["honey", "sugar", "bread", "hay"], "answer": "B"},
    {"question": "The text is about  _  .", "options": ["bees", "birds", "cats", "dogs"], "answer": "A"},
]
EXPECTED_RACE = [
    {
        "prompt": f"Article: {ARTICLE}\n\nQuestion: Who keeps bees?\nAnswer: Ada\nIn winter they eat sugar\n"
        "The text is about  _  .",
        "choices": ["bees", "birds", "cats", "dogs"],
        "label": 0,
    },
    {"prompt": "Article: Short.\n\nHow long?", "choices": ["1", "2", "3", "4"], "label": 3},
]
SHORT = {"question": "How long?", "options": ["1", "2", "3", "4"], "answer": "D"}


def race_files(folder: Path) -> Path:
    """As RACE's own archive holds them: a JSON object in each .txt, named by number."""
    folder.mkdir()
    for number, (article, problems) in enumerate(((ARTICLE, PROBLEMS), ("Short.", [SHORT])), start=9):
        whole = {
            "article": article,
            "questions": [each["question"] for each in problems],
            "options": [each["options"] for each in problems],
            "answers": [each["answer"] for each in problems],
            "id": f"high{number}.txt",
        }
        (folder / f"{number}.txt").write_text(json.dumps(whole), encoding="utf-8")
    return folder


def test_every_form_of_race_is_the_same_records(tmp_path: Path) -> None:
    own = list(read_records(race_files(tmp_path / "high")))
    articles = [(ARTICLE, PROBLEMS), ("Short.", [SHORT])]
    by_question = [{"article": article, "example_id": "x", **each} for article, given in articles for each in given]
    listed = [{"article": article, "problems": given} for article, given in articles]
    as_text = [{"article": article, "problems": str(given)} for article, given in articles]
    for raw in (own, by_question, listed, as_text):
        assert convert_records("race", raw, place="here") == EXPECTED_RACE


@pytest.mark.parametrize(
    ("form", "raw", "expected"),
    [
        ("lambada", {"text": "One two\nthree four"}, {"context": "One two\nthree", "target": " four"}),
        ("piqa", {"goal": "g", "sol1": "a", "sol2": "b", "label": "1"},
         {"goal": "g", "choices": ["a", "b"], "label": 1}),
        (
            "boolq",
            {"question": "is it?", "passage": "p", "answer": True},
            {"question": "is it", "passage": "p", "label": 1},
        ),
        ("boolq", {"question": "is it", "passage": "p", "label": 0}, {"question": "is it", "passage": "p", "label": 0}),
        ("triviaqa", {"question": "q", "answer": "a", "aliases": ["a", "b"]}, {"question": "q", "answers": ["a", "b"]}),
        ("triviaqa", {"question": "q", "answer": {"aliases": ["a"]}}, {"question": "q", "answers": ["a"]}),
        (
            "webqs",
            {"question": "q", "answers": ["New York City", "New York", "Boston"]},
            {"question": "q", "answers": ["Boston", "New York"], "every": [0, 1], "first": "Boston"},
        ),
        (
            "arc",
            {"query": "Question: q", "choices": ["a", "b", "c"], "gold": 2},
            {"question": "q", "choices": ["a", "b", "c"], "label": 2},
        ),
        (
            "arc",
            {"question": "q", "choices": {"text": ["a", "b"], "label": ["1", "2"]}, "answerKey": "2"},
            {"question": "q", "choices": ["a", "b"], "label": 1},
        ),
        (
            "hellaswag",
            {"activity_label": "Cooking", "ctx_a": "A man cooks.", "ctx_b": "he", "label": "1",
             "endings": ["eats [step] it.", "[header] stops  now."]},
            {"prompt": "Cooking: A man cooks. He", "choices": ["eats it.", " stops now."], "label": 1},
        ),
        (
            "winogrande",
            {"sentence": "Ann saw Bea so _ left early.", "option1": "Ann", "option2": "Bea", "answer": "2"},
            {"beginnings": ["Ann saw Bea so Ann", "Ann saw Bea so Bea"], "ending": "left early.", "label": 1},
        ),
    ],
)  # fmt: skip
def test_a_form_is_what_the_task_asks_for(form: str, raw: dict[str, Any], expected: dict[str, Any]) -> None:
    assert convert_records(form, [raw], place="here") == [expected]


def test_paradigms_take_turns_so_that_a_limit_sees_all() -> None:
    raw = [{"UID": uid, "sentence_good": f"{uid} {n}", "sentence_bad": "no"} for uid in "abc" for n in range(2)]
    found = [each["sentences"][0] for each in convert_records("blimp", raw, place="here")]
    assert found == ["a 0", "b 0", "c 0", "a 1", "b 1", "c 1"]


def test_raw_lines_become_the_pages_that_they_are(tmp_path: Path) -> None:
    text = " \n = First = \n \n Some text . \n = = Part = = \n \n More . \n \n = Second one = \n Text . \n"
    (tmp_path / "wiki.test.raw").write_text(text, encoding="utf-8")
    path = find_file(tmp_path, ["wikitext2_raw_test", "wiki.test.raw"])
    assert path is not None
    pages = [each["page"] for each in convert_records("wikitext", read_records(path), place=str(path))]
    assert "".join([" \n", *pages]) == text and len(pages) == 2
    assert pages[0].startswith(" = First =") and pages[1].startswith(" = Second one =")
    assert convert_records("wikitext", [{"page": "whole"}], place="hub") == [{"page": "whole"}]


def test_every_kind_of_file_gives_the_same_records(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [{"text": "a b", "number": 1}, {"text": "ç d", "number": 2}]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (tmp_path / "one.jsonl").write_text(lines + "\n", encoding="utf-8")
    (tmp_path / "two.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "three.json").write_text(json.dumps(rows), encoding="utf-8")
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "four.parquet"))
    for name in ("one", "two", "three", "four"):
        path = find_file(tmp_path, ["absent", name])
        assert path is not None and list(read_records(path)) == rows
    assert find_file(tmp_path, ["absent"]) is None


@pytest.mark.parametrize(
    ("form", "raw", "message"),
    [
        ("piqa", [{"goal": "g", "sol1": "a"}], r"here: record 1 has no 'sol2'; its fields are goal, sol1; .*; take"),
        ("lambada", [{"text": "a b"}, {"txt": "c"}], r"record 2 has no 'text'"),
        ("race", [{"article": "a", **SHORT, "answer": "E"}], r"record 1 does not have the right values"),
        ("race", [{"article": "a", "problems": "__import__('os')"}], r"does not have the right values"),
        ("race", [{"article": "a", **SHORT, "options": ["1"], "answer": "A"}], r"1 options where 4"),
        ("triviaqa", [{"question": "q", "answer": "a", "aliases": []}], r"no aliases"),
        ("winogrande", [{"sentence": "none", "option1": "", "option2": "", "answer": "1"}], r"no blank"),
        ("piqa", [], r"here holds no records; .*; fetch it again"),
        (
            "piqa",
            [{"goal": "g", "sol1": "a", "sol2": "b", "label": 1}, {"goal": "g", "sol1": "a", "sol2": "b", "label": -1}],
            r"here: of the 2 records .* number 2 has the label -1, which is none of its 2 choices; .*split",
        ),
        ("piqa", [{"goal": "g", "sol1": "a", "sol2": 3, "label": 1}], r"has choices \['a', 3\], which is no text"),
        ("boolq", [{"passage": "p", "question": "q", "answer": 7}], r"has the label 7"),
        ("arc", [{"query": "q", "choices": ["a", "b"], "gold": 2}], r"has the label 2"),
        (
            "hellaswag",
            [{"activity_label": "a", "ctx_a": "b", "ctx_b": "c", "endings": ["", "x"], "label": "1"}],
            r"has an empty text among its choices",
        ),
        (
            "hellaswag",
            [{"activity_label": "a", "ctx_a": "b", "ctx_b": "c", "endings": [], "label": "1"}],
            r"its 0 choices",
        ),
        ("webqs", [{"question": "q", "answers": ["", ""]}], r"has an empty text among its answers"),
        ("blimp", [{"sentence_good": "a b", "sentence_bad": "", "UID": "u"}], r"has an empty text among its sentences"),
        (
            "triviaqa",
            [{"question": "q", "answer": "x", "aliases": [1, "b"]}],
            r"has answers \[1, 'b'\], which is no text",
        ),
    ],
)
def test_records_of_another_form_are_refused_with_their_place(form: str, raw: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        convert_records(form, raw, place="here")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"x": 1}\n{"x": \n', r"a.jsonl cannot be read .*; fetch it again"),
        ("a.jsonl", b"[1, 2]\n", r"holds list where a record should be"),
        ("a.jsonl", b"\xff\xfe\n", r"cannot be read"),
        ("a.jsonl.gz", b"no gzip", r"cannot be read"),
        ("a.json", b"[1]", r"holds int where"),
        ("a.jsonl", b"[" * 100_000, r"cannot be read .*; fetch it again"),
    ],
)
def test_files_that_hold_no_records_are_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        list(read_records(tmp_path / name))


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no \.txt files; .*; unpack"):
        list(read_records(tmp_path))
