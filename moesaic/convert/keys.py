"""How a foreign config's keys correspond to ours: small two-way rules, of which a family of models is a list.

A rule reads its keys into the values of a ModelConfig, or writes them from one. Keys that no rule takes are an error,
not ignored, so that nothing that changes the mathematics is lost; what a family cannot say is found by reading back
what was written. The lists themselves are in families.py and gguf_families.py.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Protocol, get_args, get_origin

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from moesaic.config.base import Config, nearest
from moesaic.config.model import FeedForwardConfig, ModelConfig
from moesaic.errors import ConfigError, ConversionError

REQUIRED: Any = object()


class Inexpressible(Exception):
    """A model that a family's config cannot describe; the text says what of it, the first thing that was found."""


class Keys:
    """A foreign config's keys, each taken by one rule; `where` is the file, for the errors."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.values, self.where = dict(values), where
        self._left = dict(values)

    def take(self, *names: str, default: Any = REQUIRED) -> Any:
        """Return the value that these names of one thing have, and count all of them as understood."""
        found = {name: self._left.pop(name) for name in names if name in self._left}
        first = next(iter(found.values()), None)
        if any(value != first and value is not first for value in found.values()):  # NaN is not even itself
            said = " and ".join(f"{name} is {value!r}" for name, value in found.items())
            raise ConversionError(
                f"{self.where}: {said}; these are names of one thing, which has one value; remove one that is wrong."
            )
        if found:
            return first
        if default is REQUIRED:
            raise ConversionError(
                f"{self.where} has no {names[0]}; this family of models requires it; complete the file from where the "
                f"model came from."
            )
        return default

    def refuse(self, name: str, value: Any, required: str) -> ConversionError:
        return ConversionError(
            f"{self.where}: {name} is {value!r}; {required}; a model that computes otherwise cannot be converted."
        )

    def check(self, name: str, value: Any, ours: str) -> Any:
        """Return the value of a key if ModelConfig takes it at this path as it is: no text is read as a number.

        Raises: ConversionError.
        """
        kind, default = _kind_of(ours)
        if value is None and default is None:
            return value
        try:
            return kind.validate_python(value)
        except ValidationError as error:
            message = error.errors(include_url=False)[0]["msg"]
            raise self.refuse(name, value, message.replace("Input should be", "it has to be")) from None

    def finish(self, harmless: frozenset[str]) -> None:
        """Raise ConversionError for keys that nothing has taken."""
        unknown = sorted(self._left.keys() - harmless)
        if unknown:
            known = [name for name in self.values if name not in unknown]
            raise ConversionError(
                f"{self.where} has keys that are not understood: {', '.join(unknown[:5])}"
                f"{', ...' if len(unknown) > 5 else ''}; a key may change what the model computes, so none is ignored "
                f"({nearest(unknown[0], known)}); remove from the file what changes nothing."
            )


@cache
def _kind_of(path: str) -> tuple[TypeAdapter[Any], Any]:
    """Return what a value of ModelConfig has to be, strictly, and its default."""
    owner: Any = ModelConfig
    *sections, name = path.split(".")
    for section in sections:
        annotation = owner.model_fields[section].annotation
        candidates = (annotation, *get_args(annotation))
        owner = next(each for each in candidates if isinstance(each, type) and issubclass(each, Config))
    field = owner.model_fields[name]
    kind: Any = Annotated[(field.annotation, *field.metadata)] if field.metadata else field.annotation
    if any(get_origin(each) is tuple for each in get_args(field.annotation)):
        kind = Annotated[int, Field(ge=1)]  # one for every layer is all that a foreign key says
    return TypeAdapter(kind, config=ConfigDict(strict=True, allow_inf_nan=False)), field.default


class KeyRule(Protocol):
    """One correspondence. `ours` is what ModelConfig.from_dict takes; `config` its values by dotted path."""

    def read(self, keys: Keys, ours: dict[str, Any]) -> None: ...

    def write(self, config: Mapping[str, Any], theirs: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class Same:
    """A key with our value under another name. aliases: other names that it is read by."""

    theirs: str
    ours: str
    default: Any = REQUIRED
    aliases: tuple[str, ...] = ()

    def read(self, keys: Keys, ours: dict[str, Any]) -> None:
        value = keys.take(self.theirs, *self.aliases, default=self.default)
        put(ours, self.ours, keys.check(self.theirs, value, self.ours))

    def write(self, config: Mapping[str, Any], theirs: dict[str, Any]) -> None:
        theirs[self.theirs] = config[self.ours]


@dataclass(frozen=True)
class Inverse:
    """A key that divides by what we multiply by."""

    theirs: str
    ours: str
    default: float = 1.0

    def read(self, keys: Keys, ours: dict[str, Any]) -> None:
        value = keys.check(self.theirs, keys.take(self.theirs, default=self.default), self.ours)
        if not math.isfinite(1 / value):
            raise keys.refuse(self.theirs, value, "a number that can be divided by is required")
        put(ours, self.ours, 1 / value)

    def write(self, config: Mapping[str, Any], theirs: dict[str, Any]) -> None:
        theirs[self.theirs] = 1 / config[self.ours]


@dataclass(frozen=True)
class AttentionScale:
    """A key that says the factor on the products of queries and keys, whatever the size of a head."""

    theirs: str
    default: float

    def read(self, keys: Keys, ours: dict[str, Any]) -> None:
        value = keys.take(self.theirs, default=self.default)
        # Of the default null, another scale's kind is asked for.
        put(ours, "attention_scale", float(keys.check(self.theirs, value, "residual_scale")))

    def write(self, config: Mapping[str, Any], theirs: dict[str, Any]) -> None:
        theirs[self.theirs] = config["attention_scale"] or config["head_dim"] ** -0.5


@dataclass(frozen=True)
class OneOf:
    """A key whose values have names of their own: ours by theirs."""

    theirs: str
    ours: str
    values: Mapping[Any, Any]
    default: Any = REQUIRED

    def read(self, keys: Keys, ours: dict[str, Any]) -> None:
        value = keys.take(self.theirs, default=self.default)
        if not isinstance(value, str | bool | int | None) or value not in self.values:
            raise keys.refuse(self.theirs, value, f"{' or '.join(repr(each) for each in self.values)} is required")
        put(ours, self.ours, self.values[value])

    def write(self, config: Mapping[str, Any], theirs: dict[str, Any]) -> None:
        for name, value in self.values.items():
            if value == config[self.ours]:
                theirs[self.theirs] = name
                return
        raise Inexpressible(f"{self.ours} = {config[self.ours]}")


@dataclass(frozen=True)
class Fixed:
    """A key that may only have one value. is_written: whether the format's readers want to see it."""

    theirs: str
    value: Any
    also: tuple[Any, ...] = ()
    is_written: bool = True

    def read(self, keys: Keys, ours: dict[str, Any]) -> None:
        value = keys.take(self.theirs, default=self.value)
        if value not in (self.value, *self.also):
            raise keys.refuse(self.theirs, value, f"{self.value!r} is required")

    def write(self, config: Mapping[str, Any], theirs: dict[str, Any]) -> None:
        if self.is_written:
            theirs[self.theirs] = self.value


@dataclass(frozen=True)
class OnEveryLayer:
    """A list that may only have one value, on every layer."""

    theirs: str
    value: Any

    def read(self, keys: Keys, ours: dict[str, Any]) -> None:
        due = [self.value] * _count(keys, ours)
        value = keys.take(self.theirs, default=due)
        if value != due:
            raise keys.refuse(self.theirs, value, f"{self.value!r} for each of {len(due)} layers is required")

    def write(self, config: Mapping[str, Any], theirs: dict[str, Any]) -> None:
        return  # what a reader takes where it is missing


@dataclass(frozen=True)
class Always:
    """A value of ours that all models of the family have."""

    ours: str
    value: Any

    def read(self, keys: Keys, ours: dict[str, Any]) -> None:
        put(ours, self.ours, self.value)

    def write(self, config: Mapping[str, Any], theirs: dict[str, Any]) -> None:
        return  # reading back finds it


@dataclass(frozen=True)
class HeadDim:
    """head_dim where the family has the key; where it has none, a head takes hidden_size / num_heads."""

    has_key: bool

    def read(self, keys: Keys, ours: dict[str, Any]) -> None:
        value = keys.take("head_dim", default=None)
        if value is not None:
            put(ours, "head_dim", keys.check("head_dim", value, "head_dim"))

    def write(self, config: Mapping[str, Any], theirs: dict[str, Any]) -> None:
        if self.has_key:
            theirs["head_dim"] = config["head_dim"]
        elif config["head_dim"] * config["num_heads"] != config["hidden_size"]:
            raise Inexpressible(f"head_dim = {config['head_dim']}")


@dataclass(frozen=True)
class SlidingWindow:
    """sliding_window, the positions that a token sees, and the layers in which it sees no more.

    flag: the key that turns the window on. usual: the window of a config that says none. slides: whether a layer has
    it, given max_window_layers, where layer_types says nothing; None for families in which all layers have it. bound:
    max_window_layers of a config that says none, None for families without that key. is_nullable: whether the family's
    class takes null for no window. in_unrotated: whether the layers whose heads are not turned have it, which
    RotatedLayers has read before, where layer_types says nothing.
    """

    flag: str | None = None
    usual: int | None = None
    slides: Callable[[int, int], bool] | None = None
    bound: int | None = None
    is_nullable: bool = True
    in_unrotated: bool = False

    def read(self, keys: Keys, ours: dict[str, Any]) -> None:
        given = keys.take("sliding_window", default=self.usual)
        is_on = True if self.flag is None else keys.take(self.flag, default=False)
        kinds, bound = keys.take("layer_types", default=None), keys.take("max_window_layers", default=self.bound)
        if not isinstance(is_on, bool):
            raise keys.refuse(str(self.flag), is_on, "true or false is required")
        if not isinstance(given, int | None):
            raise keys.refuse("sliding_window", given, "a number of positions, or null, is required")
        given = keys.check("sliding_window", given, "sliding_window") if is_on else None
        window = None if given is None or given >= ours["max_positions"] else given  # which has no effect
        count = _count(keys, ours)
        layers = list(range(count))
        if kinds is not None:
            layers = _sliding_layers(keys, kinds, count)
            if layers and given is None:
                raise keys.refuse("layer_types", kinds, "a sliding_window that is on is required for sliding_attention")
        elif self.in_unrotated:
            layers = [layer for layer in layers if layer not in ours.get("rope_layers", layers)]
        elif window is not None and self.slides is not None:
            bound = count if self.bound is None else bound
            if type(bound) is not int:
                raise keys.refuse("max_window_layers", bound, "a number of layers is required")
            layers = [layer for layer in layers if self.slides(layer, bound)]
        if window is not None and self._is_on_all and len(layers) < count:
            required = f"sliding_attention for all layers is required, since sliding_window is {window}"
            raise keys.refuse("layer_types", kinds, required)
        if window is not None and layers:
            put(ours, "sliding_window", window)
            if len(layers) < count:
                put(ours, "sliding_layers", layers)

    @property
    def _is_on_all(self) -> bool:
        return self.slides is None and not self.in_unrotated

    def write(self, config: Mapping[str, Any], theirs: dict[str, Any]) -> None:
        window, every = config["sliding_window"], range(config["num_layers"])
        if window is None or window >= config["max_positions"]:
            if self.flag is None and self.usual is not None:
                theirs["sliding_window"] = None if self.is_nullable else max(self.usual, config["max_positions"])
            return
        layers = list(every) if config["sliding_layers"] is None else list(config["sliding_layers"])
        theirs["sliding_window"] = window
        if self.flag is not None:
            theirs[self.flag] = True
        if self._is_on_all:
            if len(layers) < len(every):
                raise Inexpressible("a sliding window in some layers only")
            return
        theirs["layer_types"] = ["sliding_attention" if layer in layers else "full_attention" for layer in every]
        # For readers that do not know layer_types, where it can say the same.
        if self.bound is not None and self.slides is not None:
            for bound in range(len(every) + 1):
                if layers == [layer for layer in every if self.slides(layer, bound)]:
                    theirs["max_window_layers"] = bound
                    break


@dataclass(frozen=True)
class RotatedWindow:
    """EXAONE's sliding window: heads are turned in the layers that have it, or in all where the model has none.

    Where layer_types says nothing, all layers have it but every sliding_window_pattern-th. is_nullable: whether the
    family's class takes null for no window.
    """

    is_nullable: bool = True

    def read(self, keys: Keys, ours: dict[str, Any]) -> None:
        window = keys.take("sliding_window", default=4096)
        if window is not None or not self.is_nullable:
            window = keys.check("sliding_window", window, "max_positions")  # a count too
        count, step = _count(keys, ours), keys.take("sliding_window_pattern", default=4)
        has_pattern = window is not None and type(step) is int and step >= 1
        kinds = keys.take("layer_types", default=None if has_pattern else REQUIRED)
        if kinds is None and has_pattern:
            kinds = ["full_attention" if (layer + 1) % step == 0 else "sliding_attention" for layer in range(count)]
        layers = _sliding_layers(keys, kinds, count)
        if window is None:
            if layers:
                raise keys.refuse("layer_types", kinds, "a sliding_window is required for sliding_attention")
            return
        if len(layers) < count:
            put(ours, "rope_layers", layers)
        if layers and window < ours["max_positions"]:  # else it has no effect
            put(ours, "sliding_window", window)
            put(ours, "sliding_layers", layers if len(layers) < count else None)

    def write(self, config: Mapping[str, Any], theirs: dict[str, Any]) -> None:
        window, rotated, every = config["sliding_window"], config["rope_layers"], range(config["num_layers"])
        if self.is_nullable and window is None and rotated is None:
            theirs["sliding_window"] = None
            rotated = ()
        else:
            theirs["sliding_window"] = config["max_positions"] if window is None else window
            rotated = every if rotated is None else rotated
        theirs["layer_types"] = ["sliding_attention" if layer in rotated else "full_attention" for layer in every]


@dataclass(frozen=True)
class RotatedLayers:
    """no_rope_layers, which has 1 for a layer whose heads are turned, or every no_rope_layer_interval-th is not."""

    def read(self, keys: Keys, ours: dict[str, Any]) -> None:
        count = _count(keys, ours)
        step = _number(keys, "no_rope_layer_interval", default=4, least=1)
        marks = keys.take("no_rope_layers", default=None)
        if marks is None:
            marks = [int((layer + 1) % step != 0) for layer in range(count)]
        if not isinstance(marks, list) or len(marks) != count or any(mark not in (0, 1) for mark in marks):
            raise keys.refuse("no_rope_layers", marks, f"1 (turned) or 0 for each of {count} layers is required")
        if not all(marks):
            put(ours, "rope_layers", [layer for layer, mark in enumerate(marks) if mark])

    def write(self, config: Mapping[str, Any], theirs: dict[str, Any]) -> None:
        layers = config["rope_layers"]
        theirs["no_rope_layers"] = [int(layers is None or layer in layers) for layer in range(config["num_layers"])]


def _sliding_layers(keys: Keys, kinds: Any, count: int) -> list[int]:
    """Return the layers that layer_types calls sliding."""
    known = ("full_attention", "sliding_attention")
    if not isinstance(kinds, list) or len(kinds) != count or any(kind not in known for kind in kinds):
        raise keys.refuse("layer_types", kinds, f"{' or '.join(known)} for each of {count} layers is required")
    return [layer for layer, kind in enumerate(kinds) if kind == "sliding_attention"]


@dataclass(frozen=True)
class Rope:
    """rope_theta and rope_scaling, or both as rope_parameters. Kinds we have: default, linear, llama3, yarn.

    is_latent: a DeepSeek model, whose mscale_all_dim also enters the softmax scale. turned: the share of a head's
    channels that is turned where none is said, in families that have partial_rotary_factor; it comes after head_dim.
    channels: the key that says how many are turned, in families that have it instead. usual: the scaling of a config
    that says none, where the family's class has one. stretches_base: Hunyuan's kind, dynamic with an alpha, which is
    another theta.
    """

    theta: float = 10_000.0
    is_latent: bool = False
    turned: float | None = None
    channels: str | None = None
    usual: Mapping[str, Any] | None = None
    stretches_base: bool = False

    def read(self, keys: Keys, ours: dict[str, Any]) -> None:
        theta = keys.take("rope_theta", default=self.theta)
        scaling = keys.take("rope_scaling", default=None)
        parameters = keys.take("rope_parameters", default=None)
        if scaling and parameters and scaling != parameters:
            raise ConversionError(
                f"{keys.where}: rope_scaling and rope_parameters are both given and say something else; these are "
                f"names of one section; remove one that is wrong."
            )
        for name, given in (("rope_scaling", scaling), ("rope_parameters", parameters)):
            if not isinstance(given, dict | None):
                raise keys.refuse(name, given, "a section with keys, or null, is required")
        if not scaling and parameters is None:
            scaling = self.usual
        found = Keys({**(scaling or {}), **(parameters or {})}, f"{keys.where}: rope_scaling")
        outer, theta = theta, found.take("rope_theta", default=theta)
        if "rope_theta" in keys.values and theta != outer:
            raise ConversionError(
                f"{keys.where}: rope_theta is {outer}, and {theta} among the rope_parameters; these are names of one "
                f"thing; remove one that is wrong."
            )
        put(ours, "rope_theta", keys.check("rope_theta", theta, "rope_theta"))
        self._read_share(keys, found, ours)
        kind = found.take("rope_type", "type", default="default")
        if kind == "default":
            found.finish(frozenset())
            return
        if kind == "dynamic" and self.stretches_base:
            self._read_alpha(found, ours)
            return
        if kind not in ("linear", "llama3", "yarn"):
            raise found.refuse("rope_type", kind, "default, linear, llama3 or yarn is required")
        section: dict[str, Any] = {"kind": kind}
        factor = found.take("factor", default=None)
        if kind in ("llama3", "yarn"):
            original = found.take("original_max_position_embeddings")
            section["original_max_positions"] = _checked(found, "original_max_position_embeddings", original)
            if factor is None:
                factor = keys.values.get("max_position_embeddings", original) / original
        section["factor"] = _checked(found, "factor", factor)
        if kind == "llama3":
            for name, own in (("low_freq_factor", "low"), ("high_freq_factor", "high")):
                section[f"{own}_frequency_factor"] = _checked(found, name, found.take(name))
        elif kind == "yarn":
            self._read_yarn(found, section, ours)
        found.finish(frozenset())
        put(ours, "rope_scaling", section)

    def _read_share(self, keys: Keys, found: Keys, ours: dict[str, Any]) -> None:
        head_dim = ours.get("head_dim") or ours["hidden_size"] // ours["num_heads"]
        given = [each.take("partial_rotary_factor", default=None) for each in (keys, found)]
        if self.channels is not None and (turned := keys.take(self.channels, default=None)) is not None:
            given.append(keys.check(self.channels, turned, "num_heads") / head_dim)  # a count too
        said = [each for each in given if each is not None] or [self.turned or 1.0]
        share = said[0]
        if self.turned is None and said != [1] * len(said):
            raise keys.refuse("partial_rotary_factor", share, "1.0 is required (all channels are turned)")
        if any(each != share for each in said):
            raise keys.refuse("partial_rotary_factor", said, "one value is required")
        if not isinstance(share, int | float) or not 0 < share <= 1:
            raise keys.refuse("partial_rotary_factor", share, "a number above 0, and up to 1, is required")
        if share != 1:
            put(ours, "rope_head_dim", int(head_dim * share))  # rounded as theirs is

    def _read_alpha(self, found: Keys, ours: dict[str, Any]) -> None:
        alpha = found.check("alpha", found.take("alpha"), "rope_theta")
        head_dim = ours.get("head_dim") or ours["hidden_size"] // ours["num_heads"]
        theta = ours["rope_theta"] * alpha ** (head_dim / (head_dim - 2))
        put(ours, "rope_theta", found.check("alpha", theta, "rope_theta"))
        found.finish(frozenset({"factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"}))  # of other kinds

    def _read_yarn(self, found: Keys, section: dict[str, Any], ours: dict[str, Any]) -> None:
        section["beta_fast"] = _checked(found, "beta_fast", found.take("beta_fast", default=None) or 32.0)
        section["beta_slow"] = _checked(found, "beta_slow", found.take("beta_slow", default=None) or 1.0)
        section["truncate"] = _checked(found, "truncate", found.take("truncate", default=True))
        attention = _checked(found, "attention_factor", found.take("attention_factor", default=None))
        mscale, for_all = found.take("mscale", default=None), found.take("mscale_all_dim", default=None)
        factor = section["factor"]
        if attention is None and mscale and for_all:
            attention = yarn_scale(factor, mscale) / yarn_scale(factor, for_all)
        section["attention_factor"] = attention
        if self.is_latent and for_all:
            channels = sum(ours["latent_attention"][name] for name in ("nope_head_dim", "rope_head_dim"))
            put(ours, "attention_scale", yarn_scale(factor, for_all) ** 2 / math.sqrt(channels))

    def write(self, config: Mapping[str, Any], theirs: dict[str, Any]) -> None:
        theirs["rope_theta"] = config["rope_theta"]
        turned = config["rope_head_dim"] or config["head_dim"]
        if self.channels is not None:
            theirs[self.channels] = turned
        elif self.turned is not None:
            theirs["partial_rotary_factor"] = turned / config["head_dim"]
        scaling = config["rope_scaling"]
        if scaling is None:
            theirs["rope_scaling"] = None if self.usual is None else {"rope_type": "default"}
            return
        kind, factor = scaling["kind"], scaling["factor"]
        written: dict[str, Any] = {"rope_type": kind, "factor": factor}
        if kind != "linear":
            written["original_max_position_embeddings"] = scaling["original_max_positions"]
        if kind == "llama3":
            written["low_freq_factor"] = scaling["low_frequency_factor"]
            written["high_freq_factor"] = scaling["high_frequency_factor"]
        elif kind == "yarn":
            written |= {name: scaling[name] for name in ("beta_fast", "beta_slow", "truncate")}
            attention, scale = scaling["attention_factor"], config["attention_scale"]
            if self.is_latent and scale is not None and factor > 1:
                own = math.sqrt(scale * math.sqrt(config["head_dim"]))
                attention = yarn_scale(factor, 1.0) if attention is None else attention
                written["mscale"] = (attention * own - 1) / (0.1 * math.log(factor))
                written["mscale_all_dim"] = (own - 1) / (0.1 * math.log(factor))
            elif attention is not None:
                written["attention_factor"] = attention
        theirs["rope_scaling"] = written


_SCALING = {
    "original_max_position_embeddings": "original_max_positions",
    "low_freq_factor": "low_frequency_factor",
    "high_freq_factor": "high_frequency_factor",
}


def _checked(keys: Keys, name: str, value: Any) -> Any:
    """Return the value of a key of rope_scaling, if it can be one."""
    return keys.check(name, value, f"rope_scaling.{_SCALING.get(name, name)}")


def yarn_scale(factor: float, mscale: float) -> float:
    """Return yarn's factor on attention, of a scaling of positions by `factor`."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


@dataclass(frozen=True)
class Places:
    """Where the MoE layers are, Qwen's way: every decoder_sparse_step-th layer but those of mlp_only_layers."""

    def read(self, keys: Keys, ours: dict[str, Any]) -> None:
        step = _number(keys, "decoder_sparse_step", default=1, least=1)
        without = keys.take("mlp_only_layers", default=None) or ()
        if not isinstance(without, list | tuple):
            raise keys.refuse("mlp_only_layers", without, "a list of layers is required")
        every = range(_count(keys, ours))
        _place(ours, [layer for layer in every if layer not in without and (layer + 1) % step == 0])

    def write(self, config: Mapping[str, Any], theirs: dict[str, Any]) -> None:
        theirs["decoder_sparse_step"] = 1
        theirs["mlp_only_layers"] = [
            layer for layer in range(config["num_layers"]) if layer not in config["moe_layers"]
        ]


@dataclass(frozen=True)
class PlacesAfter:
    """Where the MoE layers are, DeepSeek's way: all but the first so many.

    has_dense: whether the family's class knows layers without experts.
    """

    theirs: str = "first_k_dense_replace"
    has_dense: bool = True

    def read(self, keys: Keys, ours: dict[str, Any]) -> None:
        first = _number(keys, self.theirs, default=0, least=0)
        if first and not self.has_dense:
            raise keys.refuse(self.theirs, first, "0 is required (all layers have experts)")
        _place(ours, list(range(first, _count(keys, ours))))

    def write(self, config: Mapping[str, Any], theirs: dict[str, Any]) -> None:
        theirs[self.theirs] = config["moe_layers"][0] if config["moe_layers"] else config["num_layers"]


@dataclass(frozen=True)
class PlacesBetween:
    """Where the MoE layers are, ERNIE's way: every moe_layer_interval-th layer of those from a first to a last."""

    def read(self, keys: Keys, ours: dict[str, Any]) -> None:
        count = _count(keys, ours)
        first = _number(keys, "moe_layer_start_index", default=1, least=0)
        last = _number(keys, "moe_layer_end_index", default=-1, least=-1)
        step = _number(keys, "moe_layer_interval", default=1, least=1)
        last = count - 1 if last == -1 else last
        _place(ours, [layer for layer in range(count) if first <= layer <= last and (layer + 1) % step == 0])

    def write(self, config: Mapping[str, Any], theirs: dict[str, Any]) -> None:
        first, *others = config["moe_layers"] or (config["num_layers"],)
        theirs["moe_layer_start_index"] = first
        theirs["moe_layer_end_index"] = others[-1] if others else first
        theirs["moe_layer_interval"] = others[0] - first if others else 1


@dataclass(frozen=True)
class PlacesListed:
    """Where the MoE layers are, as mlp_layer_types lists them, or behind the first first_k_dense_replace layers."""

    def read(self, keys: Keys, ours: dict[str, Any]) -> None:
        count = _count(keys, ours)
        first = _number(keys, "first_k_dense_replace", default=1, least=0)
        kinds = keys.take("mlp_layer_types", default=None)
        if kinds is None:
            kinds = ["dense" if layer < first else "sparse" for layer in range(count)]
        if not isinstance(kinds, list) or len(kinds) != count or any(kind not in ("dense", "sparse") for kind in kinds):
            raise keys.refuse("mlp_layer_types", kinds, f"dense or sparse for each of {count} layers is required")
        _place(ours, [layer for layer, kind in enumerate(kinds) if kind == "sparse"])

    def write(self, config: Mapping[str, Any], theirs: dict[str, Any]) -> None:
        layers, count = config["moe_layers"], config["num_layers"]
        theirs["mlp_layer_types"] = ["sparse" if layer in layers else "dense" for layer in range(count)]
        if list(layers) == list(range(count - len(layers), count)):  # for readers that know no such list
            theirs["first_k_dense_replace"] = count - len(layers)


@dataclass(frozen=True)
class SharedExperts:
    """A residual MLP of so many times an expert's size, added without a gate (DeepSeek).

    is_optional: whether the family's class takes 0 for none.
    """

    theirs: str = "n_shared_experts"
    is_optional: bool = False

    def read(self, keys: Keys, ours: dict[str, Any]) -> None:
        count = keys.take(self.theirs, default=None)
        if count not in (None, 0):
            keys.check(self.theirs, count, "moe.top_k")  # a count too
            put(ours, "moe.residual", "sum")
            put(ours, "moe.residual_intermediate_size", count * ours["moe"]["intermediate_size"])

    def write(self, config: Mapping[str, Any], theirs: dict[str, Any]) -> None:
        if config["moe.residual"] is None:
            if not self.is_optional:
                raise Inexpressible("no residual MLP beside the experts")
            theirs[self.theirs] = 0
            return
        count, rest = divmod(config["moe.residual_intermediate_size"], config["moe.intermediate_size"])
        if rest:
            raise Inexpressible("a residual MLP whose size is no multiple of an expert's")
        theirs[self.theirs] = count


@dataclass(frozen=True)
class HunyuanExperts:
    """Experts of intermediate_size beside one for all tokens; a key may have a list of one value for each layer."""

    def read(self, keys: Keys, ours: dict[str, Any]) -> None:
        top_k = _of_all_layers(keys, ours, "moe_topk", "num_experts_per_tok")
        put(ours, "moe.top_k", keys.check("moe_topk", top_k, "moe.top_k"))
        put(ours, "moe.residual", "sum")
        for name, due in self._due(ours["intermediate_size"]).items():
            value = _of_all_layers(keys, ours, name, default=due)
            if value != due:
                raise keys.refuse(name, value, f"{due}, for every layer, is required")

    def write(self, config: Mapping[str, Any], theirs: dict[str, Any]) -> None:
        theirs["moe_topk"] = config["moe.top_k"]
        theirs |= self._due(config["intermediate_size"])

    def _due(self, size: int) -> dict[str, int]:
        return {"num_shared_expert": 1, "moe_intermediate_size": size}


@dataclass(frozen=True)
class SharedSize:
    """shared_intermediate_size, of a residual MLP that is added without a gate; 0 for none (Granite)."""

    def read(self, keys: Keys, ours: dict[str, Any]) -> None:
        size = keys.take("shared_intermediate_size")
        if type(size) is not int or size != 0:
            put(ours, "moe.residual", "sum")
            size = keys.check("shared_intermediate_size", size, "moe.residual_intermediate_size")
            put(ours, "moe.residual_intermediate_size", size)

    def write(self, config: Mapping[str, Any], theirs: dict[str, Any]) -> None:
        has_one = config["moe.residual"] is not None
        theirs["shared_intermediate_size"] = config["moe.residual_intermediate_size"] if has_one else 0


@dataclass(frozen=True)
class Groups:
    """Group-limited choice. method: the key and value that say so, where the family has both ways (DeepSeek-V2)."""

    method: bool = False

    def read(self, keys: Keys, ours: dict[str, Any]) -> None:
        # None, or 0: no groups.
        groups, top = (
            1 if each in (None, 0) else each
            for each in (keys.take("n_group", default=None), keys.take("topk_group", default=None))
        )
        if self.method:
            name = keys.take("topk_method", default="greedy")
            if name not in ("greedy", "group_limited_greedy"):
                raise keys.refuse("topk_method", name, "greedy or group_limited_greedy is required")
            if name == "greedy":
                return
        put(ours, "moe.router.num_groups", keys.check("n_group", groups, "moe.router.num_groups"))
        put(ours, "moe.router.top_groups", keys.check("topk_group", top, "moe.router.top_groups"))

    def write(self, config: Mapping[str, Any], theirs: dict[str, Any]) -> None:
        theirs["n_group"], theirs["topk_group"] = config["moe.router.num_groups"], config["moe.router.top_groups"]
        if self.method:
            theirs["topk_method"] = "greedy" if theirs["n_group"] == 1 else "group_limited_greedy"


@dataclass(frozen=True)
class EqualHeads:
    """The number of key heads of a family whose heads each have their own keys."""

    theirs: str = "num_key_value_heads"

    def read(self, keys: Keys, ours: dict[str, Any]) -> None:
        value = keys.take(self.theirs, default=None)
        if value not in (None, ours["num_heads"]):
            raise keys.refuse(self.theirs, value, f"{ours['num_heads']}, as there are heads, is required")

    def write(self, config: Mapping[str, Any], theirs: dict[str, Any]) -> None:
        if config["num_kv_heads"] != config["num_heads"]:
            raise Inexpressible(f"num_kv_heads = {config['num_kv_heads']}")
        theirs[self.theirs] = config["num_heads"]


@dataclass(frozen=True)
class Needed:
    """Keys that have to be there: no tensor's shape tells them, and the family's class takes one model's values."""

    names: tuple[str, ...]

    def read(self, keys: Keys, ours: dict[str, Any]) -> None:
        for name in self.names:
            if name not in keys.values:
                keys.take(name)

    def write(self, config: Mapping[str, Any], theirs: dict[str, Any]) -> None:
        return


def put(values: dict[str, Any], path: str, value: Any) -> None:
    """Set a dotted path in nested sections."""
    *sections, name = path.split(".")
    for section in sections:
        values = values.setdefault(section, {})
    values[name] = value


def _count(keys: Keys, ours: dict[str, Any]) -> int:
    count = ours.get("num_layers")
    if not isinstance(count, int) or not 0 < count < 100_000:
        raise keys.refuse("the number of layers", count, "a number from 1 is required")
    return count


def _of_all_layers(keys: Keys, ours: dict[str, Any], *names: str, default: Any = REQUIRED) -> Any:
    """Return the value of a key, or the one that a list has for every layer."""
    value = keys.take(*names, default=default)
    if not isinstance(value, list):
        return value
    count = _count(keys, ours)
    if len(value) != count or any(each != value[0] for each in value):
        raise keys.refuse(names[0], value, f"one value, {count} times, is required")
    return value[0]


def _number(keys: Keys, name: str, *, default: int, least: int) -> int:
    """Return a number of layers, or the number of a layer; null stands for the default."""
    value = keys.take(name, default=default)
    value = default if value is None else value
    if type(value) is not int or value < least:
        raise keys.refuse(name, value, f"a number from {least} is required")
    return value


def _place(ours: dict[str, Any], layers: list[int]) -> None:
    if layers:
        put(ours, "moe.layers", layers)
    else:
        ours.pop("moe", None)


def read_config(rules: Sequence[KeyRule], keys: Keys, harmless: frozenset[str]) -> ModelConfig:
    """Return the model that a foreign config describes.

    Raises: ConversionError for a key that is missing, not understood, or has a value that we do not implement.
    """
    ours: dict[str, Any] = {}
    for rule in rules:
        try:
            rule.read(keys, ours)
        except (TypeError, ValueError, ArithmeticError, LookupError) as error:  # arithmetic on what is no number
            raise ConversionError(
                f"{keys.where} has a value of an impossible kind ({error!r}); numbers, names and lists as the family's "
                f"models have them are required; mend the file."
            ) from None
    keys.finish(harmless)
    try:
        return ModelConfig.from_dict(ours)
    except ConfigError as error:
        raise ConversionError(
            f"{keys.where} describes no model that can be: {in_a_file(error)} (These are our names of its keys.)"
        ) from None


def in_a_file(error: ConfigError) -> str:
    """Return an error of ours about values that were not read from YAML, with what to do about it there."""
    remedy = r"(change|set) it in the YAML file or with --set \S+=VALUE|give \w+\(\w+=VALUE\)"
    return re.sub(remedy, "mend the file", str(error))


def write_config_keys(rules: Sequence[KeyRule], config: ModelConfig, harmless: frozenset[str]) -> dict[str, Any]:
    """Return the keys that describe a model.

    Raises: Inexpressible when the family cannot describe it.
    """
    values, theirs = values_by_path(config), dict[str, Any]()
    for rule in rules:
        try:
            rule.write(values, theirs)
        except KeyError as error:
            raise Inexpressible(f"no {error.args[0]}") from None
    try:
        back = read_config(rules, Keys(theirs, "the config written"), harmless)
    except ConversionError as error:
        raise Inexpressible(str(error).partition("; ")[0]) from None  # what it is, without what to do
    different = differences(config, back)
    if different:
        first: dict[str, str] = {}  # of what differs in several layers
        for each in different:
            first.setdefault(each.partition(" of layer ")[0].partition(" = ")[0], each)
        raise Inexpressible(", ".join(list(first.values())[:3]) + (", ..." if len(first) > 3 else ""))
    return theirs


def values_by_path(config: ModelConfig) -> dict[str, Any]:
    """Return a model's values by dotted path; those of its MoE layers are the first one's."""
    values: dict[str, Any] = {}

    def walk(section: Mapping[str, Any], prefix: str) -> None:
        for name, value in section.items():
            values[prefix + name] = value
            if isinstance(value, dict):
                walk(value, f"{prefix}{name}.")

    walk({name: value for name, value in config.to_dict().items() if name != "moe"}, "")
    values["moe_layers"] = config.moe_layers
    if config.moe_layers:
        first = config.layers[config.moe_layers[0]]
        walk(first.to_dict(), "moe.")
        values["moe.intermediate_size"] = first.expert_intermediate_size
        values["moe.residual_intermediate_size"] = first.intermediate_size
    return values


# What only training sees.
_TRAINING = frozenset({"dropout", "init_std"})
# What is compared layer by layer.
_BY_LAYER = frozenset({"moe", "intermediate_size", "sliding_window", "sliding_layers", "rope_layers"})
_ROUTER = ("scoring", "renormalize", "scale", "num_groups", "top_groups", "score_correction_bias", "bias")


def differences(first: ModelConfig, second: ModelConfig) -> list[str]:
    """Return what two configs compute differently, as `key = value, not other`; values for training do not count."""
    one, other = _function(first), _function(second)
    return [
        f"{name} = {one.get(name)} (not {other.get(name)})"
        for name in dict.fromkeys([*one, *other])
        if not _is_equal(one.get(name), other.get(name))
    ]


def _function(config: ModelConfig) -> dict[str, Any]:
    values = {name: value for name, value in config.to_dict().items() if name not in _TRAINING | _BY_LAYER}
    values["rope_head_dim"] = config.rope_head_dim or config.head_dim
    values["attention_scale"] = config.attention_scale or 1 / math.sqrt(config.head_dim)
    for index, layer in enumerate(config.layers):
        window = config.window_of(index)
        has_effect = window is not None and window < config.max_positions
        values[f"sliding_window of layer {index}"] = window if has_effect else None
        values[f"rotation of layer {index}"] = config.is_rotated(index)
        values |= {f"{name} of layer {index}": value for name, value in _layer_function(layer).items()}
    return values


def _layer_function(layer: FeedForwardConfig) -> dict[str, Any]:
    if not layer.is_moe:
        return {"intermediate_size": layer.intermediate_size}
    router = layer.router
    is_limited = router.top_groups < router.num_groups
    return {
        "num_experts": layer.num_experts,
        "top_k": layer.top_k,
        "expert_intermediate_size": layer.expert_intermediate_size,
        "residual": layer.residual,
        "intermediate_size": layer.intermediate_size,
        "output_scale": layer.output_scale,
        **{name: getattr(router, name) for name in _ROUTER},
        **({} if is_limited else {"num_groups": 1, "top_groups": 1}),
    }


def _is_equal(one: Any, other: Any) -> bool:
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_is_equal(one[name], other[name]) for name in one)
    if isinstance(one, float) and isinstance(other, float | int):
        return math.isclose(one, other, rel_tol=1e-9)
    return bool(one == other)
