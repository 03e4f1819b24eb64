"""From files, preset names and --set to validated configs. YAML in, YAML out."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from moesaic.config.base import Config, nearest
from moesaic.config.model import ModelConfig
from moesaic.config.presets import preset, preset_names
from moesaic.config.serve import ServeConfig
from moesaic.config.train import TrainConfig
from moesaic.errors import ConfigError
from moesaic.folders import foreign_model, split_run, write_whole

# Of what a file says, each alias counted as all that it stands for: no config comes near.
_MAX_VALUES = 100_000


class _Loader(yaml.SafeLoader):
    """YAML as people write configs: 3e11 is a number, which YAML 1.1 reads as text, and no key may stand twice.

    Raises: yaml.YAMLError for whatever cannot be read, RecursionError for what is nested too deeply.
    """

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        if node is not None and _count_values(node, {}) > _MAX_VALUES:
            raise yaml.constructor.ConstructorError(None, None, f"it holds more than {_MAX_VALUES} values")
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep=deep)
        except (ValueError, KeyError, AttributeError, OverflowError) as error:  # 2024-13-45, or !!bool perhaps
            kind = node.tag.rpartition(":")[2]
            reason = f"{node.value!s:.40} is no value of type {kind} ({error!s:.80})"
            raise yaml.constructor.ConstructorError(None, None, reason, node.start_mark) from None

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = key_node.value
            if not isinstance(key, str):  # a mapping or a list as a key
                raise yaml.constructor.ConstructorError(None, None, "a key is not text", key_node.start_mark)
            if key in seen and key_node.tag != "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(None, None, f"{key} stands twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?([0-9][0-9_]*(\.[0-9_]*)?|\.[0-9]+)[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
)


def _count_values(node: yaml.Node, known: dict[int, int]) -> int:
    """Return how many values a node holds. known: of nodes by their identity; 0 while one is counted."""
    found = known.get(id(node))
    if found == 0:
        raise yaml.constructor.ConstructorError(None, None, "an alias stands inside what it names", node.start_mark)
    if found is None:
        known[id(node)] = 0
        is_mapping = isinstance(node, yaml.MappingNode)
        inner = [part for pair in node.value for part in pair] if is_mapping else node.value
        parts = () if isinstance(node, yaml.ScalarNode) else inner
        found = known[id(node)] = 1 + sum(_count_values(part, known) for part in parts)
    return found


def read_values(source: str | Path) -> dict[str, Any]:
    """Return the raw values of a preset name or a YAML file. A file may start from a preset with `preset: NAME`.

    Raises: ConfigError for a file that is missing, not YAML or not a mapping, and for an unknown preset.
    """
    if isinstance(source, str) and source in preset_names():
        return preset(source)
    path = Path(source)
    if (foreign := foreign_model(path)) is not None:
        raise ConfigError(foreign)
    if not path.is_file():
        raise ConfigError(
            f"{str(source)!r} is neither a preset nor a file; a preset name, or the path of a YAML file or of a run "
            f"folder, is required; "
            f"{nearest(str(source), preset_names())}"
        )
    values = _read_mapping(path, example=f"`preset: {preset_names()[-1]}`")
    if "preset" in values:
        name = values.pop("preset")
        return merge(preset(str(name)), values)
    return values


def _read_mapping(path: Path, *, example: str) -> dict[str, Any]:
    """Return what a YAML file holds. Raises: ConfigError for what is no YAML file of keys and values."""
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}; a mapping of keys to values; mend the file.") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}; a readable file is required; check it.") from None
    if not isinstance(values, dict):
        held = "is empty" if values is None else f"holds {type(values).__name__}"
        raise ConfigError(f"{path} {held}; a mapping of keys to values is required; write for example {example}.")
    return merge(values, {})


def parse_assignment(assignment: str) -> tuple[list[str], Any]:
    """Parse one `a.b=value` of --set; the value is read as YAML (`null`, `[8, 8, 16]`, `1e9`)."""
    key, separator, text = assignment.partition("=")
    keys = key.strip().split(".")
    if not separator or not all(keys):
        raise ConfigError(f"--set {assignment!r} has no key or no '='; a.b=VALUE is required; for example tokens=1e6.")
    if not text.strip():
        raise ConfigError(
            f"--set {assignment!r} has no value; a.b=VALUE is required; write {key}=null to unset, {key}='\"\"' for an "
            f"empty text."
        )
    try:
        return keys, yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, RecursionError):
        raise ConfigError(
            f"--set {assignment!r}: {text!r} is not YAML; a number, a word, null or a [list] is required; quote or "
            f"mend it."
        ) from None


def text_assignment(key: str, text: str | Path) -> str:
    """Return the `a.b=value` that sets a key to this very text, a path for example."""
    value = yaml.safe_dump(str(text), default_style='"', width=math.inf).strip()
    return f"{key}={value}"


def with_options(assignments: Sequence[str], options: Mapping[str, tuple[str, Any]]) -> list[str]:
    """Return assignments with those that options of a command stand for: {"server.host": ("--host", value or None)}.

    Raises: ConfigError where --set says something else than such an option.
    """
    given = {key: (name, value) for key, (name, value) in options.items() if value is not None}
    for assignment in assignments:
        keys, value = parse_assignment(assignment)
        for name, wanted in (each for key, each in given.items() if key.split(".") == keys):
            same = Path(str(value)) == wanted if isinstance(wanted, Path) else value == wanted
            if not same:
                raise ConfigError(
                    f"{name} {wanted} and --set {assignment} were both given; they stand for the same key, which has "
                    f"one value; leave one of them out."
                )
    # Last: --set may have replaced the whole section.
    return [
        *assignments,
        *(
            text_assignment(key, value) if isinstance(value, str | Path) else f"{key}={json.dumps(value)}"
            for key, (_, value) in given.items()
        ),
    ]


def apply_assignments(values: Mapping[str, Any], assignments: Sequence[str]) -> dict[str, Any]:
    """Return a copy of values with every `a.b=value` set, later ones last.

    A key under something that is absent or null makes the section. Raises: ConfigError for a key under a plain value.
    """
    result = merge(values, {})
    for assignment in assignments:
        keys, value = parse_assignment(assignment)
        place = result
        for depth, key in enumerate(keys[:-1], start=1):
            inner = place.get(key)
            if inner is None:
                inner = place[key] = {}
            elif not isinstance(inner, dict):
                raise ConfigError(
                    f"--set {assignment!r}: {'.'.join(keys[:depth])} is {inner!r}, not a section; a key can be set "
                    f"only inside a section; set {'.'.join(keys[:depth])} itself."
                )
            place = inner
        place[keys[-1]] = value
    return result


def merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return base with changes laid over it, section by section; lists are replaced; neither argument is touched."""
    result = {str(key): merge(value, {}) if isinstance(value, Mapping) else value for key, value in base.items()}
    for key, value in changes.items():
        inner = result.get(str(key))
        if isinstance(value, Mapping):
            result[str(key)] = merge(inner if isinstance(inner, dict) else {}, value)
        else:
            result[str(key)] = value
    return result


def load_train_config(source: str | Path, assignments: Sequence[str] = ()) -> TrainConfig:
    """Return the validated training config of a preset, a YAML file or a run, with `--set` assignments applied.

    A run folder or RUN@step gives that run's config, with init_from set to it: training starts from its weights.
    """
    folder = run_folder_of(source)
    if folder is None:
        values = read_values(source)
    else:
        # A student trained on is no student: its teacher has said what it had to.
        values = {**read_values(folder / "config.yaml"), "init_from": str(Path(source)), "distill": None}
        if values.get("micro_batch_size") == values.get("batch_size"):
            values["micro_batch_size"] = None  # it was derived, and is again when --set changes the batch
    return TrainConfig.from_dict(apply_assignments(values, assignments))


def run_folder_of(source: str | Path) -> Path | None:
    """Return the folder of the run that RUN or RUN@step names, None where that is no folder with a config.yaml."""
    if isinstance(source, str) and source in preset_names():
        return None
    folder, _ = split_run(source)
    return folder if (folder / "config.yaml").is_file() else None


def load_model_config(source: str | Path, assignments: Sequence[str] = ()) -> ModelConfig:
    """Return the model part of a preset or YAML file; the rest of a training config may be incomplete."""
    values = apply_assignments(read_values(source), assignments)
    if "model" not in values:
        raise ConfigError(
            f"{source} has no model section; `model:` with the model's sizes is required; add it, or start from a "
            f"preset with `preset: {preset_names()[-1]}`."
        )
    return ModelConfig.from_dict(values["model"], path="model")


def load_serve_config(source: str | Path | None = None, assignments: Sequence[str] = ()) -> ServeConfig:
    """Return the validated settings of an engine and a server: a YAML file's, or the defaults, then the assignments."""
    values = {} if source is None else _read_serving(Path(source))
    return ServeConfig.from_dict(apply_assignments(values, assignments))


def _read_serving(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ConfigError(
            f"{path} is no file; a YAML file with the sections of a server ({', '.join(ServeConfig.model_fields)}) is "
            f"required; check the path, or leave it out for the defaults."
        )
    values = _read_mapping(path, example="`server: {port: 8080}`")
    unknown = [key for key in values if key not in ServeConfig.model_fields]
    if unknown:
        is_training = {"model", "preset"} & set(unknown)
        raise ConfigError(
            f"{path} has the keys {', '.join(unknown)}; a file for serving has the sections "
            f"{', '.join(ServeConfig.model_fields)}; "
            + (
                "this is a training's: a run brings its own, so leave --config out, or name a file of these sections."
                if is_training
                else nearest(unknown[0], list(ServeConfig.model_fields))
            )
        )
    return values


def write_config(config: Config, path: Path) -> None:
    """Write a config as YAML, whole or not at all, keys in the order of its class."""
    write_whole(path, yaml.safe_dump(config.to_dict(), sort_keys=False, allow_unicode=True))
