"""From files, preset names and --set to validated configs. YAML in, YAML out."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from moesaic.config.base import Config
from moesaic.config.model import ModelConfig
from moesaic.config.presets import preset, preset_names
from moesaic.config.train import TrainConfig
from moesaic.errors import ConfigError


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads 3e11 as a string; people write it, so read it as the number."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def read_values(source: str | Path) -> dict[str, Any]:
    """Return the raw values of a preset name or a YAML file. A file may start from a preset with `preset: NAME`.

    Raises: ConfigError for a file that is missing, not YAML or not a mapping, and for an unknown preset.
    """
    if isinstance(source, str) and source in preset_names():
        return preset(source)
    path = Path(source)
    if not path.is_file():
        raise ConfigError(
            f"{str(source)!r} is neither a preset nor a file; a preset name or the path of a YAML file is required; "
            f"presets: {', '.join(preset_names())}."
        )
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}; mend the file.") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds {type(values).__name__}; a mapping of keys to values is required; see docs/.")
    if "preset" in values:
        name = values.pop("preset")
        return merge(preset(str(name)), values)
    return values


def parse_assignment(assignment: str) -> tuple[list[str], Any]:
    """Parse one `a.b=value` of --set; the value is read as YAML (`null`, `[8, 8, 16]`, `1e9`)."""
    key, separator, text = assignment.partition("=")
    if not separator or not key:
        raise ConfigError(f"--set {assignment!r} has no key or no '='; a.b=VALUE is required; for example tokens=1e6.")
    try:
        return key.strip().split("."), yaml.load(text, Loader=_Loader)
    except yaml.YAMLError:
        raise ConfigError(f"--set {assignment!r}: {text!r} is not a YAML value; quote it, or mend it.") from None


def apply_assignments(values: Mapping[str, Any], assignments: Sequence[str]) -> dict[str, Any]:
    """Return a copy of values with every `a.b=value` set, later ones last."""
    result = merge(dict(values), {})
    for assignment in assignments:
        keys, value = parse_assignment(assignment)
        place = result
        for key in keys[:-1]:
            inner = place.get(key)
            if not isinstance(inner, dict):
                inner = place[key] = {}
            place = inner
        place[keys[-1]] = value
    return result


def merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return base with changes laid over it, mapping by mapping; neither is touched."""
    result = {key: merge(value, {}) if isinstance(value, Mapping) else value for key, value in base.items()}
    for key, value in changes.items():
        inner = result.get(key)
        result[key] = merge(inner if isinstance(inner, dict) else {}, value) if isinstance(value, Mapping) else value
    return result


def load_train_config(source: str | Path, assignments: Sequence[str] = ()) -> TrainConfig:
    """Return the validated training config of a preset or YAML file, with `--set` assignments applied."""
    return TrainConfig(**apply_assignments(read_values(source), assignments))


def load_model_config(source: str | Path, assignments: Sequence[str] = ()) -> ModelConfig:
    """Return the model part of a preset or YAML file; the rest of a training config may be incomplete."""
    values = apply_assignments(read_values(source), assignments)
    if "model" not in values:
        raise ConfigError(f"{source} has no model section; `model:` with its sizes is required; see `moesaic inspect`.")
    return ModelConfig(**values["model"])


def write_config(config: Config, path: Path) -> None:
    """Write a config as YAML, keys in the order of its class."""
    path.write_text(yaml.safe_dump(config.to_dict(), sort_keys=False, allow_unicode=True), encoding="utf-8")
