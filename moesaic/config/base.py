"""The base of every config: frozen, keyword-only, unknown keys refused with the nearest names.

Here is what all configs share, and how pydantic's findings become three-part errors; the fields are in the other files.
"""

import difflib
from collections.abc import Callable, Iterator, Mapping
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, Self, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from moesaic.errors import ConfigError

if TYPE_CHECKING:
    from pydantic._internal._model_construction import ModelMetaclass
else:
    # The class is private to pydantic; what is public is that BaseModel has it.
    ModelMetaclass = type(BaseModel)


class _ConfigMeta(ModelMetaclass):
    """Turn pydantic's ValidationError into our ConfigError where a config is constructed.

    A metaclass and not `__init__`: pydantic calls an overridden `__init__` for inner configs too, and their errors
    would lose the path from the outermost one.
    """

    def __call__(cls: type[BaseModel], *args: Any, **values: Any) -> Any:  # type: ignore[misc]
        try:
            return ModelMetaclass.__call__(cls, *args, **values)
        except ValidationError as error:
            raise ConfigError(_explain(cls, error, "", from_file=False)) from None


class Config(BaseModel, metaclass=_ConfigMeta):
    """A validated, immutable set of values. Change one with `config.replace(name=value)`, which validates again."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False, protected_namespaces=()
    )

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_truth_as_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse true and false where a number is required, which Python takes for 1 and 0."""
        if isinstance(value, bool) and info.field_name is not None:
            allowed = set(_types_in(cls.model_fields[info.field_name].annotation))
            if allowed & {int, float} and bool not in allowed:
                raise PydanticCustomError("int_type" if float not in allowed else "float_type", "a number is required")
        return value

    @classmethod
    def from_dict(cls, values: Any, *, path: str = "") -> Self:
        """Construct from a mapping, as read from YAML or JSON; `path` is where it stood, for the errors.

        Raises: ConfigError for anything but a mapping, and for what the class refuses.
        """
        if not isinstance(values, Mapping):
            raise ConfigError(
                f"{path or cls.__name__} is {_shown(values)}; a mapping of keys to values is required; "
                f"write `key: value` lines with keys of {cls.__name__}: {', '.join(cls.model_fields)}."
            )
        try:
            return cls.model_validate(dict(values))
        except ValidationError as error:
            raise ConfigError(_explain(cls, error, path, from_file=True)) from None

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON-able values; `from_dict` makes an equal config of them."""
        return self.model_dump(mode="json")

    def replace(self, **changes: Any) -> Self:
        """Return a copy with some values changed, validated as a whole.

        Values that were derived from others stay as they are; pass None for one to derive it again.
        """
        return type(self)(**{**{name: getattr(self, name) for name in type(self).model_fields}, **changes})

    def _refuse_without_effect(self, path: str, name: str, *, needs: str) -> None:
        """Raise ConfigError if `name` is set to something other than its default; called where it would do nothing."""
        value, default = getattr(self, name), type(self).model_fields[name].default
        if value != default:
            raise ConfigError(
                f"{path} ({value}) has no effect here; it needs {needs}; set that too, or leave {path} at {default}."
            )


def _types_in(annotation: Any) -> Iterator[Any]:
    """Yield a type, or those that a union is of; what Annotated says of one left out."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        yield from _types_in(inner[0])
    elif origin in (Union, UnionType):
        for each in inner:
            yield from _types_in(each)
    else:
        yield annotation


def differing(
    given: Config,
    other: Config,
    *,
    before: str = "",
    after: str = "",
    verb: str = "there",
    ignore: Callable[[str], bool] = lambda key: False,
) -> str:
    """Return the keys that two configs differ in, "" for none: the first five with both values, and dots for more.

    before, after: what stands around each key where it is shown; verb: what stands before the other's value.
    """
    now, then = _leaves(given.to_dict()), _leaves(other.to_dict())
    keys = [key for key in sorted(now.keys() | then.keys()) if now.get(key) != then.get(key)]
    shown = [f"{before}{key}{after} ({now.get(key)}, {verb} {then.get(key)})" for key in keys if not ignore(key)]
    return ", ".join([*shown[:5], "..."] if len(shown) > 5 else shown)


def _leaves(values: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """Return nested sections as one level of dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _leaves(value, f"{path}{key}.")
        else:
            flat[f"{path}{key}"] = value
    return flat


def nearest(name: str, known: list[str]) -> str:
    """Return "did you mean ..." with the closest of the known names, or all of them."""
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(near)}?" if near else f"use one of {', '.join(sorted(known))}."


# What other tools call keys of ours.
OTHER_NAMES = {
    "d_model": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "global_batch_size": "batch_size",
    "lr": "learning_rate",
    "max_position_embeddings": "max_positions",
    "moe_router_topk": "top_k",
    "n_routed_experts": "num_experts",
    "n_shared_experts": "residual_intermediate_size",
    "num_attention_heads": "num_heads",
    "num_experts_per_tok": "top_k",
    "num_hidden_layers": "num_layers",
    "num_key_value_heads": "num_kv_heads",
    "num_local_experts": "num_experts",
    "num_query_groups": "num_kv_heads",
    "num_shared_experts": "residual_intermediate_size",
    "rms_norm_eps": "norm_epsilon",
    "seq_len": "sequence_length",
    "seq_length": "sequence_length",
    "shared_experts": "residual_intermediate_size",
    "tie_word_embeddings": "tie_embeddings",
    "train_batch_size": "batch_size",
    "train_micro_batch_size_per_gpu": "micro_batch_size",
}


def _meant(root: type[BaseModel], name: str, prefix: str) -> str:
    """Return "did you mean ..." with the keys, in any section, that have this name, or are called so elsewhere."""
    wanted = OTHER_NAMES.get(name, name)
    places = [f"{prefix}.{path}" if prefix else path for path in _paths(root) if path.rpartition(".")[2] == wanted]
    return f"did you mean {' or '.join(places)}?" if places else ""


def _paths(root: type[BaseModel]) -> Iterator[str]:
    for name in root.model_fields:
        yield name
        section = _inner(root, name)
        if section is not None:
            yield from (f"{name}.{path}" for path in _paths(section))


def _explain(root: type[BaseModel], error: ValidationError, prefix: str, *, from_file: bool) -> str:
    """One line per mistaken key: what it is, what is required, what to do.

    from_file: the values were read, and not passed to the class as arguments.
    """
    items = error.errors(include_url=False)
    # A derived value (default None on a key that must not be null) is missing only because its source is wrong.
    named = [item for item in items if not _is_underived(root, item)] or items
    groups: dict[tuple[str, ...], list[Any]] = {}
    for item in named:
        groups.setdefault(_fields_on(root, item["loc"]), []).append(item)
    return "\n".join(_explain_key(root, fields, group, prefix, from_file) for fields, group in groups.items())


def _explain_key(root: type[BaseModel], fields: tuple[str, ...], items: list[Any], prefix: str, from_file: bool) -> str:
    owner = _owner(root, fields)
    path = ".".join([prefix, *fields] if prefix else fields) or root.__name__
    first = items[0]
    place = f"it in the YAML file or with --set {path}=VALUE" if from_file else f"{owner.__name__}({fields[-1]}=VALUE)"
    if first["type"] == "missing":
        described = owner.model_fields[fields[-1]].description
        meaning = f": {described}" if described else ""
        return f"{path} is missing; {owner.__name__} requires it{meaning}; {'set' if from_file else 'give'} {place}."
    if first["type"] == "extra_forbidden":
        return (
            f"{path} is not a key of {owner.__name__}; its keys are fixed so that no setting is silently ignored; "
            f"{_meant(root, fields[-1], prefix) or nearest(fields[-1], list(owner.model_fields))}"
        )
    # A value of several allowed types (a number or a list) gives one message for each.
    required = " or ".join(dict.fromkeys(_required(item) for item in items))
    field = owner.model_fields.get(fields[-1]) if fields else None
    if field is not None and type(None) in get_args(field.annotation):
        required += " or null"
    return f"{path} ({_shown(first['input'])}): {required}; {'change' if from_file else 'give'} {place}."


def _required(item: Any) -> str:
    """Return pydantic's message in the words of YAML."""
    number, integer = "a number is required", "an integer is required"
    plain = {
        "int_type": integer,
        "int_parsing": integer,
        "int_from_float": integer,
        "float_type": number,
        "float_parsing": number,
        "string_type": "text is required",
        "tuple_type": "a list is required",
        "model_type": "a section with keys is required",
    }
    message: str = item["msg"]
    return plain.get(item["type"], message.replace("Input should be", "it must be"))


def _fields_on(root: type[BaseModel], location: tuple[int | str, ...]) -> tuple[str, ...]:
    """Return the part of an error's location that is keys; after it come list positions and names of types."""
    fields: list[str] = []
    owner: type[BaseModel] | None = root
    for part in location:
        if owner is None:
            break
        fields.append(str(part))
        owner = _inner(owner, str(part))
    return tuple(fields)


def _owner(root: type[BaseModel], fields: tuple[str, ...]) -> type[BaseModel]:
    for name in fields[:-1]:
        root = _inner(root, name) or root
    return root


def _inner(owner: type[BaseModel], name: str) -> type[BaseModel] | None:
    """Return the config class of a section, None for a plain value."""
    field = owner.model_fields.get(name)
    if field is None:
        return None
    for candidate in (field.annotation, *get_args(field.annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def _is_underived(root: type[BaseModel], item: Any) -> bool:
    fields = _fields_on(root, item["loc"])
    field = _owner(root, fields).model_fields.get(fields[-1]) if fields else None
    return field is not None and item["input"] is None and field.default is None


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
