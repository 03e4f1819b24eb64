"""From a task's name to an lm_eval task whose records are here: the package's YAML files, and a user's own.

lm_eval and datasets are imported when a task is loaded.
"""

import difflib
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from moesaic.errors import ConfigError, DataError, InstallationError
from moesaic.evaluate.tasks.records import ENDINGS, Record, convert_records, find_file, read_records

# The paper's six, in its order.
PAPER_TASKS = ("lambada", "piqa", "boolq", "race_h", "triviaqa", "webqs")
# A word for several tasks.
SETS: Mapping[str, tuple[str, ...]] = {"paper": PAPER_TASKS}
# Of what is drawn: the shots, and text at a temperature. It is lm_eval's own default.
SEED = 1234
_PACKAGE = "moesaic.evaluate.tasks"
_OWN_SUFFIXES = (".yaml", ".yml")


@dataclass(frozen=True)
class Task:
    """A loaded task: lm_eval's object, how many records it has, and where they came from."""

    name: str
    harness: Any
    num_records: int
    records_from: str


def task_names() -> list[str]:
    """Return the names of the tasks that come with moesaic."""
    return sorted(Path(each.name).stem for each in files(_PACKAGE).iterdir() if each.name.endswith(".yaml"))


def resolve_names(given: str) -> list[str]:
    """Return the tasks that a comma-separated list names, each once, sets taken apart.

    Raises: ConfigError for a name that is none, with the nearest ones.
    """
    known = task_names()
    names: list[str] = []
    for name in filter(None, (part.strip() for part in given.split(","))):
        if name in SETS:
            names += SETS[name]
        elif name in known or Path(name).suffix in _OWN_SUFFIXES:
            names.append(name)
        else:
            near = difflib.get_close_matches(name, [*known, *SETS], n=3, cutoff=0.4)
            meant = f"; the nearest are {', '.join(near)}" if near else ""
            raise ConfigError(
                f"there is no task {name!r}{meant}; the tasks are {', '.join(known)}, the sets {', '.join(SETS)}, and "
                f"an lm_eval task of your own is named by its .yaml file; name some of them."
            )
    if not names:
        raise ConfigError(f"no task is named; at least one of {', '.join(known)} is required; try --tasks lambada.")
    return list(dict.fromkeys(names))


def check_records(names: Sequence[str], data: Path) -> None:
    """Raise DataError, with all of them, where a folder has no records for some of the package's tasks."""
    if not data.is_dir():
        raise DataError(
            f"{data} is not a folder; --tasks-data takes the folder with the tasks' records; check the path, or leave "
            f"it out to have them from the hub."
        )
    sources = {name: _read_packaged(name)["source"] for name in names if Path(name).suffix not in _OWN_SUFFIXES}
    missing = {name: source for name, source in sources.items() if find_file(data, source["files"]) is None}
    if not missing:
        return
    sought = ", ".join(" or ".join(source["files"]) for source in missing.values())
    there = ",".join(name for name in names if name not in missing)
    has_hub = all("hub" in source for source in missing.values())
    them, are = ("them", "are") if len(missing) > 1 else ("it", "is")
    raise DataError(
        f"{data} has no records for {', '.join(missing)}; {sought}, with one of the endings {', '.join(ENDINGS)}, "
        f"{are} required; put {them} there"
        + (f", or run those that are there (--tasks {there})" if there else "")
        + (f", or leave --tasks-data out to have {them} from the hub" if has_hub else "")
        + "."
    )


def _read_packaged(name: str) -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load(files(_PACKAGE).joinpath(f"{name}.yaml").read_text(encoding="utf-8"))
    return config


def load_task(name: str, *, data: Path | None, shots: int, seed: int) -> Task:
    """Load a task with its records, from a folder of data or, where data is None, from the hub.

    shots: solved examples before each question: of the training records where there are some, else other records of the
    same file. A user's own YAML file says itself where its records are.

    Raises: ConfigError, DataError, InstallationError.
    """
    if Path(name).suffix in _OWN_SUFFIXES:
        task, place = _load_own(Path(name)), name
    else:
        task, place = _load_packaged(name, data, shots)
    if shots:
        task.set_config(key="num_fewshot", value=shots)
    elif task.get_config("num_fewshot") is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=seed)
    return Task(str(task.config.task), task, len(task.eval_docs), place)


def _load_packaged(name: str, data: Path | None, shots: int) -> tuple[Any, str]:
    _require_lm_eval()
    import datasets
    from lm_eval.api.task import ConfigurableTask

    config = _read_packaged(name)
    source = config.pop("source")
    if shots and not config.pop("takes_shots", True):
        raise ConfigError(
            f"{shots} shots were asked of {name}, which has no questions and answers; it takes none; leave --shots out "
            f"for it."
        )
    config.pop("takes_shots", None)
    if data is None:
        splits, place = _hub_records(name, source, shots)
    else:
        splits, place = _local_records(name, source, data, shots)
    few = "few_shot" if "few_shot" in splits else "test"
    spare = len(splits[few]) - (few == "test")  # a question is no example of itself
    if shots > spare:
        files = source.get("few_shot_files")
        more = f", or put training records ({files[0]}.jsonl) into the folder" if files else ""
        raise ConfigError(
            f"{shots} shots were asked of {name}; {place} has {spare} records to take them from; ask for fewer{more}."
        )
    tables = {split: datasets.Dataset.from_list(records) for split, records in splits.items()}
    config |= {"test_split": "test", "fewshot_split": few, "custom_dataset": lambda **_: tables}
    with quiet():
        return ConfigurableTask(config=config), place


def _local_records(name: str, source: Mapping[str, Any], data: Path, shots: int) -> tuple[dict[str, list[Record]], str]:
    check_records([name], data)
    path = find_file(data, source["files"])
    assert path is not None, f"{data} has just had one of {source['files']}"
    form = source["records"]
    splits = {"test": convert_records(form, read_records(path), place=str(path))}
    few_path = find_file(data, source.get("few_shot_files", [])) if shots else None
    if few_path is not None:
        splits["few_shot"] = convert_records(form, read_records(few_path), place=str(few_path))
    return splits, str(path)


def _hub_records(name: str, source: Mapping[str, Any], shots: int) -> tuple[dict[str, list[Record]], str]:
    import datasets

    hub = source.get("hub")
    if hub is None:
        raise DataError(
            f"{name} has no place on the hub that moesaic reads; its file {source['files'][0]}.jsonl is required; name "
            f"the folder that holds it with --tasks-data."
        )
    place = "/".join(filter(None, ("hub", hub["path"], hub.get("name"))))

    def read(split: str) -> list[Record]:
        try:
            table = datasets.load_dataset(hub["path"], hub.get("name"), split=split)
        except Exception as error:  # the library raises dozens of kinds, of its own and of what it stands on
            raise DataError(
                f"{name} cannot be had from the hub ({hub['path']}: {type(error).__name__}: {error}); a network or a "
                f"local copy is required; put {source['files'][0]}.jsonl into a folder and name it with --tasks-data."
            ) from None
        return convert_records(source["records"], table, place=f"{place}/{split}")

    splits = {"test": read(hub["split"])}
    if shots and "few_shot_split" in hub:
        splits["few_shot"] = read(hub["few_shot_split"])
    return splits, place


def _load_own(path: Path) -> Any:
    _require_lm_eval()
    from lm_eval.api.task import Task as HarnessTask
    from lm_eval.tasks import TaskManager

    if not path.is_file():
        raise ConfigError(
            f"{path} does not exist; an lm_eval task in a YAML file is required there; check the path, or name one of "
            f"{', '.join(task_names())}."
        )
    try:
        tasks = TaskManager(include_defaults=False).load([str(path)])["tasks"]
    except Exception as error:  # whatever lm_eval, its templates or the data set's library find wrong with it
        raise ConfigError(
            f"{path} is not a task that lm_eval can load ({type(error).__name__}: {error}); a YAML file as its guide "
            f"describes is required; mend it."
        ) from error
    (task,) = tasks.values() if len(tasks) == 1 else (None,)
    if not isinstance(task, HarnessTask):
        raise ConfigError(f"{path} names {len(tasks)} tasks; exactly one is required; name the others' files too.")
    return task


@contextmanager
def quiet() -> Iterator[None]:
    """Keep lm_eval's bars from the screen, and its lines but for errors: they speak of its own command line."""
    import lm_eval.api.task as module

    log, bars = logging.getLogger("lm_eval"), module.tqdm
    level = log.level
    log.setLevel(logging.ERROR)
    module.tqdm = lambda records, **_: records
    try:
        yield
    finally:
        log.setLevel(level)
        module.tqdm = bars


def _require_lm_eval() -> None:
    try:
        import lm_eval.api.task  # noqa: F401
    except ImportError as error:
        raise InstallationError(
            f"tasks were asked for and lm_eval cannot be imported ({error}); it runs them; install it with "
            f"`pip install 'moesaic[evaluate]'`."
        ) from None
