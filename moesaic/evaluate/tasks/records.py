"""The records of the tasks: read from a file or folder, and brought from each form they are passed around in to one.

A form is a function from raw records (JSON objects, of local files or of the hub) to records whose fields a task's YAML
file names. Where a field is missing, KeyError and its like become one DataError with the place.
"""

import ast
import gzip
import json
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from moesaic.errors import DataError, InstallationError
from moesaic.folders import load_json

Record = dict[str, Any]
ENDINGS = (".jsonl", ".jsonl.gz", ".json", ".parquet", ".txt")
_LETTERS = "ABCD"
_CHOICES = ("choices", "sentences", "beginnings", "answers")  # what a task's YAML file may name as doc_to_choice
_PAGE_TITLE = re.compile(r"^ = [^=].*[^=] = \s*$")


def find_file(folder: Path, names: Iterable[str]) -> Path | None:
    """Return the first of the names, a folder or a file with one of the endings, that the folder has."""
    for name in names:
        for candidate in (folder / name, *(folder / f"{name}{ending}" for ending in ENDINGS)):
            if candidate.exists():
                return candidate
    return None


def read_records(path: Path) -> Iterator[Record]:
    """Yield the raw records of a file, or of the .txt files of a folder, each of them a JSON object (RACE's own form).

    A .txt or .raw file on its own is text: its lines come as {"line": ...}.

    Raises: DataError for what cannot be read; InstallationError for parquet without its library.
    """
    try:
        if path.is_dir():
            files = sorted(path.rglob("*.txt"), key=lambda file: (len(file.name), file.name))
            if not files:
                raise DataError(
                    f"{path} holds no .txt files; one JSON object for each article is required, as RACE comes; unpack "
                    f"it again."
                )
            for file in files:
                yield _object(load_json(file), file)
        elif path.suffix == ".parquet":
            yield from _parquet(path)
        elif path.suffix == ".json":
            values = load_json(path)
            for value in values if isinstance(values, list) else [values]:
                yield _object(value, path)
        elif path.suffix in (".txt", ".raw"):
            with path.open(encoding="utf-8") as text:
                for line in text:
                    yield {"line": line}
        else:
            with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as lines:
                for row in lines:
                    if row.strip():
                        yield _object(json.loads(row), path)
    except (OSError, EOFError, ValueError, RecursionError, zlib.error) as error:
        raise DataError(
            f"{path} cannot be read ({error}); JSON objects in UTF-8, one a line in a .jsonl file, are required; "
            f"fetch it again."
        ) from None


def _object(value: Any, path: Path) -> Record:
    if not isinstance(value, dict):
        raise DataError(
            f"{path} holds {type(value).__name__} where a record should be; JSON objects are required; check the file."
        )
    return value


def _parquet(path: Path) -> Iterator[Record]:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise InstallationError(
            f"{path} is parquet, and pyarrow cannot be imported ({error}); it is required to read it; install it with "
            f"`pip install 'moesaic[evaluate]'`."
        ) from None
    for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
        yield from batch.to_pylist()


def convert_records(form: str, raw: Iterable[Record], *, place: str) -> list[Record]:
    """Return the records of a form, from raw ones that were found at a place.

    Raises: DataError where there are none, or one lacks a field or has a value of the wrong kind.
    """
    found = _Counted(raw)
    try:
        records = FORMS[form](found)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, SyntaxError) as error:
        problem = f"has no {error}" if isinstance(error, KeyError) else f"does not have the right values ({error})"
        fields = ", ".join(map(str, found.last)) or "none"
        raise DataError(
            f"{place}: record {found.count} {problem}; its fields are {fields}; records of the form {form!r} are "
            f"required, see docs/guides/evaluate.md; take another file."
        ) from None
    if not records:
        raise DataError(f"{place} holds no records; at least one is required; fetch it again.")
    for number, record in enumerate(records, start=1):
        if (fault := _fault(form, record)) is not None:
            raise DataError(
                f"{place}: of the {len(records)} records that it makes, number {number} {fault}; labelled records of "
                f"the form {form!r} are required, see docs/guides/evaluate.md; take another file or split."
            )
    return records


def _fault(form: str, record: Record) -> str | None:
    """Return what is wrong with a record of a form that has all fields; None for nothing."""
    choices = next((record[name] for name in _CHOICES if name in record and form != "triviaqa"), None)
    for name, value in record.items():
        if name in ("label", "every"):
            continue
        texts = value if isinstance(value, list) else [value]
        if not all(isinstance(text, str) for text in texts):
            return f"has {name} {value!r:.60}, which is no text"
        if value is choices and not all(texts):
            return f"has an empty text among its {name}"
    count = len(choices) if choices is not None else 2  # no and yes
    if "label" in record and not 0 <= record["label"] < count:
        return f"has the label {record['label']}, which is none of its {count} choices"
    return None


class _Counted:
    """Records, counting them, for errors that say which."""

    def __init__(self, raw: Iterable[Record]) -> None:
        self._raw = raw
        self.count = 0
        self.last: Record = {}

    def __iter__(self) -> Iterator[Record]:
        for record in self._raw:
            self.count += 1
            self.last = record
            yield record


def _lambada(raw: Iterable[Record]) -> list[Record]:
    records = []
    for record in raw:
        context, _, word = record["text"].rpartition(" ")
        records.append({"context": context, "target": f" {word}"})
    return records


def _piqa(raw: Iterable[Record]) -> list[Record]:
    return [
        {"goal": each["goal"], "choices": [each["sol1"], each["sol2"]], "label": int(each["label"])} for each in raw
    ]


def _boolq(raw: Iterable[Record]) -> list[Record]:
    return [
        {
            "passage": each["passage"],
            "question": each["question"].removesuffix("?"),
            "label": int(each["answer"] if "answer" in each else each["label"]),
        }
        for each in raw
    ]


def _race(raw: Iterable[Record]) -> list[Record]:
    """One record of each article.

    Articles come whole, as RACE's own files (questions, options, answers) or with a list of problems, written out as
    one text in a form of the hub; or as a record of each question (question, options, answer), an article's together.
    """
    articles: list[tuple[str, list[tuple[str, list[str], str]]]] = []
    for record in raw:
        article = record["article"]
        if "questions" in record:
            problems = list(zip(record["questions"], record["options"], record["answers"], strict=True))
        elif "problems" in record:
            given = record["problems"]
            listed = ast.literal_eval(given) if isinstance(given, str) else given
            problems = [(each["question"], each["options"], each["answer"]) for each in listed]
        else:
            problems = [(record["question"], record["options"], record["answer"])]
            if articles and articles[-1][0] == article:
                articles[-1][1].extend(problems)
                continue
        articles.append((article, problems))
    return [_race_record(article, problems) for article, problems in articles]


def _race_record(article: str, problems: list[tuple[str, list[str], str]]) -> Record:
    prompt = f"Article: {article}\n\n"
    for question, options, answer in problems[:-1]:
        right = options[_LETTERS.index(answer)]
        if question.endswith("  _  ."):
            prompt += f"{question[:-5]}{right}\n"
        else:
            prompt += f"Question: {question}\nAnswer: {right}\n"
    question, options, answer = problems[-1]
    if len(options) != len(_LETTERS):
        raise ValueError(f"{len(options)} options where {len(_LETTERS)} are needed")
    return {"prompt": prompt + question, "choices": list(options), "label": _LETTERS.index(answer)}


def _triviaqa(raw: Iterable[Record]) -> list[Record]:
    records = []
    for record in raw:
        answers = record["answer"]["aliases"] if isinstance(record["answer"], dict) else record["aliases"]
        if not answers:
            raise ValueError("no aliases")
        records.append({"question": record["question"], "answers": list(answers)})
    return records


def _webqs(raw: Iterable[Record]) -> list[Record]:
    records = []
    for record in raw:
        answers: list[str] = []
        for answer in sorted(record["answers"]):
            # What a model says where the shorter one is accepted begins with it in any case.
            if not answers or not answer.startswith(answers[-1]):
                answers.append(answer)
        if not answers:
            raise ValueError("no answers")
        every = list(range(len(answers)))
        records.append({"question": record["question"], "answers": answers, "every": every, "first": answers[0]})
    return records


def _arc(raw: Iterable[Record]) -> list[Record]:
    records = []
    for record in raw:
        if "query" in record:
            question, choices, label = record["query"].removeprefix("Question: "), record["choices"], record["gold"]
        else:
            question, choices = record["question"], record["choices"]["text"]
            label = record["choices"]["label"].index(record["answerKey"])
        records.append({"question": question, "choices": list(choices), "label": int(label)})
    return records


def _hellaswag(raw: Iterable[Record]) -> list[Record]:
    records = []
    for record in raw:
        prompt = f"{record['activity_label']}: {record['ctx_a']} {record['ctx_b'].capitalize()}"
        endings = [_tidy(ending) for ending in record["endings"]]
        records.append({"prompt": _tidy(prompt), "choices": endings, "label": int(record["label"])})
    return records


def _tidy(text: str) -> str:
    """Without the marks that WikiHow's pages left in it."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def _winogrande(raw: Iterable[Record]) -> list[Record]:
    records = []
    for record in raw:
        before, blank, after = record["sentence"].partition("_")
        if not blank:
            raise ValueError("no blank")
        beginnings = [before + record["option1"], before + record["option2"]]
        records.append({"beginnings": beginnings, "ending": after.strip(), "label": ("1", "2").index(record["answer"])})
    return records


def _blimp(raw: Iterable[Record]) -> list[Record]:
    seen: Counter[str] = Counter()
    placed = []
    for record in raw:
        paradigm = record["UID"]
        sentences = [record["sentence_good"], record["sentence_bad"]]
        placed.append((seen[paradigm], {"sentences": sentences, "label": 0, "paradigm": paradigm}))
        seen[paradigm] += 1
    return [record for _, record in sorted(placed, key=lambda each: each[0])]


def _wikitext(raw: Iterable[Record]) -> list[Record]:
    """Pages come whole (`page`), or as the lines of the raw file, where a line ` = Title = ` begins one."""
    pages: list[str] = []
    for record in raw:
        if "page" in record:
            pages.append(record["page"])
        elif _PAGE_TITLE.match(record["line"]) or not pages:
            pages.append(record["line"])
        else:
            pages[-1] += record["line"]
    return [{"page": page} for page in pages if page.strip()]


FORMS: dict[str, Callable[[Iterable[Record]], list[Record]]] = {
    "lambada": _lambada,
    "piqa": _piqa,
    "boolq": _boolq,
    "race": _race,
    "triviaqa": _triviaqa,
    "webqs": _webqs,
    "arc": _arc,
    "hellaswag": _hellaswag,
    "winogrande": _winogrande,
    "blimp": _blimp,
    "wikitext": _wikitext,
}
