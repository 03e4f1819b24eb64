"""The base of every config: frozen, keyword-only, unknown keys refused with the nearest names, errors in three parts."""

import difflib
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from moesaic.errors import ConfigError


class _ConfigMeta(type(BaseModel)):  # type: ignore[misc]
    """Turn pydantic's ValidationError into our ConfigError where a config is constructed."""

    def __call__(cls, *args: Any, **values: Any) -> Any:
        try:
            return super().__call__(*args, **values)
        except ValidationError as error:
            raise ConfigError(_explain(cls.__name__, error)) from None


class Config(BaseModel, metaclass=_ConfigMeta):
    """A validated, immutable set of values. Change one with `config.replace(name=value)`, which validates again."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _name_unknown_keys(cls, values: Any) -> Any:
        if isinstance(values, Mapping):
            for key in values:
                if key not in cls.model_fields:
                    raise ConfigError(unknown_key_message(str(key), cls.__name__, list(cls.model_fields)))
        return values

    def replace(self, **changes: Any) -> "Any":
        """Return a copy with some values changed, validated as a whole."""
        return type(self)(**{**{name: getattr(self, name) for name in type(self).model_fields}, **changes})

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON-able values; constructing from them gives an equal config."""
        return self.model_dump(mode="json")


def unknown_key_message(key: str, owner: str, known: list[str]) -> str:
    near = difflib.get_close_matches(key, known, n=3, cutoff=0.5)
    remedy = f"did you mean {' or '.join(near)}?" if near else f"use one of {', '.join(sorted(known))}."
    return f"{key} is not a key of {owner}; its keys are fixed so that no setting is silently ignored; {remedy}"


def _explain(owner: str, error: ValidationError) -> str:
    lines = []
    for item in error.errors():
        path = ".".join(str(part) for part in item["loc"]) or owner
        if item["type"] == "missing":
            lines.append(f"{path} is missing; {owner} requires it; set it in the YAML file or with --set {path}=VALUE.")
        else:
            required = item["msg"][0].lower() + item["msg"][1:]
            lines.append(f"{path} ({item['input']!r}) in {owner}: {required}; change it in the YAML file or with --set.")
    return "\n".join(lines)
