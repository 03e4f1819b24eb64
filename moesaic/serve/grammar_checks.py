"""Clients' grammars, read: what cannot be kept, as xgrammar would pass it over or read it otherwise, and what is meant.

Pure functions of texts: nothing is compiled, and xgrammar is not needed.
"""

import copy
import itertools
import json
import math
import re
import sys
from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote

from moesaic.config.serve import Grammar
from moesaic.errors import ConfigError

_MAX_DEPTH = 64
# What xgrammar would pass over in silence, so that a text could break the schema it was promised to keep.
_UNENFORCED = frozenset(
    {"not", "if", "then", "else", "contains", "minContains", "maxContains", "multipleOf", "dependentRequired",
     "dependentSchemas", "dependencies", "unevaluatedProperties", "$dynamicRef", "$recursiveRef"}
)  # fmt: skip
# What may stand beside keywords that xgrammar takes alone.
_ANNOTATIONS = frozenset(
    {"title", "description", "default", "examples", "$defs", "definitions", "$schema", "$id", "$comment", "deprecated",
     "readOnly", "writeOnly", "discriminator"}
)  # fmt: skip
# Keywords that say nothing to xgrammar without a type, and others that give it one.
_NEED_A_TYPE = (
    (frozenset({"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}), frozenset({"integer", "number"}),
     frozenset[str]()),
    (frozenset({"minLength", "maxLength", "pattern", "format"}), frozenset({"string"}), frozenset[str]()),
    (frozenset({"patternProperties", "propertyNames", "minProperties", "maxProperties"}), frozenset({"object"}),
     frozenset({"properties", "additionalProperties"})),
    (frozenset({"minItems", "maxItems"}), frozenset({"array"}),
     frozenset({"items", "prefixItems", "unevaluatedItems"})),
)  # fmt: skip
_LENGTHS = ("minLength", "maxLength")
# A pattern's own characters go into the JSON string as they are; its classes leave these two out.
# One that is not closed is refused by xgrammar; here it goes to the end, or looking for it would take for ever.
_DOT = re.compile(r"\\.|\[(?:\\.|[^\]\\])*\]?|(\.)", re.DOTALL)
# What ends a group that may be missing, beside escapes and classes, in which it is no such thing.
_OPTIONAL_END = re.compile(r"\\.|\[(?:\\.|[^\]\\])*\]?|(\)\?\??)", re.DOTALL)
_ESCAPE_OR_CLASS = re.compile(r"(\\.)|\[(?:\\.|[^\]\\])*\]?", re.DOTALL)
_BREAKS_A_STRING = re.compile(r'"|\\\\|\\x(?:22|5c)|\\u\{?0*(?:22|5c)\}?', re.IGNORECASE)
# A character beyond ASCII, escaped or not; what else is escaped is found too, so that its second half is not.
_BEYOND_ASCII = re.compile(r"\\?([^\x00-\x7f])|\\.", re.DOTALL)
_ESCAPE = re.compile(r"\\(?:u\{([0-9a-fA-F]+)\}|u([0-9a-fA-F]{4})|.)", re.DOTALL)
# A character or class that has to be there first; behind no choice (which is looked for apart).
_BEGINS_WITH_SOMETHING = re.compile(
    r"\^?(?:[A-Za-z0-9_ @:/-]|\[(?:\\.|[^\]\\])+\]|\\[dwsDWS])(?![*?]|\{0)[^|]*\Z", re.DOTALL
)
# Letters and the like, and behind them any number of one kind of character.
_STRETCH = re.compile(r"\^([A-Za-z0-9_ @:/-]*)(\[(?:\\.|[^\]\\])+\]|\\[dwsDWS]|\.)([+*])\$?", re.DOTALL)
# Of schemas that are written for each of several names.
_MOST_NAMED_BYTES = 1 << 17
_BEGINNING = re.compile(r"\^([A-Za-z0-9_ @:/-]*)(?![*?{])")  # the last letter before a quantifier may be missing
_NAMED_CLASS = re.compile(
    r"\[:\^?(?:alnum|alpha|ascii|blank|cntrl|digit|graph|lower|print|punct|space|upper|word|xdigit):\]"
)
# Formats that xgrammar 0.2.9 keeps loosely (numbers of an address that begin with 0, the 31st of every month, a 60th
# second, labels of any length), each as a pattern that holds nothing but what has the format; not all of it: no year 0,
# no address of IPv6 that ends as one of IPv4, hosts of six labels of 40 letters at most.
_OCTET = "(25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
_YEAR = "(000[1-9]|00[1-9][0-9]|0[1-9][0-9]{2}|[1-9][0-9]{3})"
_FOURTH = "(0[48]|[2468][048]|[13579][26])"
_DAY = "(0[13578]|1[02])-(0[1-9]|[12][0-9]|3[01])|(0[469]|11)-(0[1-9]|[12][0-9]|30)|02-(0[1-9]|1[0-9]|2[0-8])"
_DATE = f"({_YEAR}-({_DAY})|([0-9]{{2}}{_FOURTH}|{_FOURTH}00)-02-29)"
_HOUR = "([01][0-9]|2[0-3])"
_TIME = rf"{_HOUR}:[0-5][0-9]:[0-5][0-9](\.[0-9]{{1,9}})?(Z|[+-]{_HOUR}:[0-5][0-9])"
_HEX, _LABEL = "[0-9a-fA-F]{1,4}", "[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?"
_FORMATS = {
    "ipv4": rf"^({_OCTET}\.){{3}}{_OCTET}$",
    "ipv6": "^("
    + "|".join(
        [f"({_HEX}:){{7}}{_HEX}", f"({_HEX}:){{1,7}}:", f":(:{_HEX}){{1,7}}", "::"]
        + [f"({_HEX}:){{1,{7 - count}}}(:{_HEX}){{1,{count}}}" for count in range(1, 7)]
    )
    + ")$",
    "date": f"^{_DATE}$",
    "time": f"^{_TIME}$",
    "date-time": f"^{_DATE}T{_TIME}$",
    "hostname": rf"^{_LABEL}(\.{_LABEL}){{0,5}}$",
}
# Of what is kept, those that nothing empty has: pydantic writes a minLength of 1 beside uri.
_NEVER_EMPTY = frozenset({*_FORMATS, "email", "uri", "uuid", "duration"})
# All that xgrammar 0.2.9 knows; what it does not know says nothing, beside a length either.
_KNOWN_FORMATS = _NEVER_EMPTY | {"uri-reference", "uri-template", "json-pointer", "relative-json-pointer"}
_MAPS_OF_SCHEMAS = frozenset({"properties", "patternProperties", "$defs", "definitions"})
_SCHEMAS = frozenset(
    {"items", "additionalItems", "prefixItems", "additionalProperties", "unevaluatedProperties", "unevaluatedItems",
     "propertyNames", "anyOf", "oneOf", "allOf"}
)  # fmt: skip
# Keys that xgrammar gets under another name, or with other values, than a reference through them was written for.
_REWRITTEN = frozenset(
    {"oneOf", "items", "additionalItems", "propertyNames", "additionalProperties", "patternProperties"}
)


def check_grammar(grammar: Grammar, *, max_bytes: int) -> None:
    """Raise ConfigError for a grammar that is too large, too deep, broken, or asks for what would not be kept."""
    name, text = name_of(grammar), grammar.text
    try:
        size = len(text.encode("utf-8"))
    except UnicodeEncodeError:
        raise ConfigError(
            f"the {name} holds half of a surrogate pair; text that UTF-8 can hold is required; mend it."
        ) from None
    if size > max_bytes:
        raise ConfigError(
            f"the {name} has {size} bytes; at most {max_bytes} are allowed; shorten it, or have "
            f"max_grammar_bytes raised."
        )
    if grammar.kind == "json_object":
        if text:
            raise ConfigError(
                f"json_object comes with the text {shown(text)}; it takes none; leave it out, or use json_schema."
            )
    elif not text.strip():
        raise ConfigError(f"the {name} is empty; one is required; write it, or ask for no grammar.")
    if grammar.kind in ("regex", "ebnf") and (found := _read_otherwise(text, is_regex=grammar.kind == "regex")):
        raise ConfigError(
            f"the {name} {shown(text)} holds {found}, which would be read as something else; only what is kept as "
            f"written is taken; write it otherwise."
        )
    if grammar.kind == "json_schema":
        _check_schema(_read_schema(text, name), name)
    if grammar.kind == "tool_calls":
        try:
            described = json.loads(text)
            functions, otherwise = dict(described["functions"]), described.get("otherwise")
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            raise ConfigError(
                f"the {name} is {shown(text)}; what tool_calls.calls_grammar makes is required; let it make it."
            ) from None
        for function, schema in functions.items():
            of_tool = f"JSON schema of the tool {shown(function)}"
            _check_schema(_read_schema(json.dumps(schema), of_tool), of_tool)
        if otherwise is not None:
            _check_schema(_read_schema(json.dumps(otherwise), "JSON schema"), "JSON schema")


def allows_only_objects(schema: dict[str, Any]) -> bool:
    """Whether a value under a schema has to be an object, as xgrammar reads it.

    What xgrammar does not take at all, keywords beside a $ref or one out of the schema say, is not for here to refuse.
    """
    pending: list[Any] = [schema]
    seen = set[int]()  # a $ref may lead back
    while pending:
        each = pending.pop()
        if id(each) in seen:
            continue
        seen.add(id(each))
        if not isinstance(each, dict):
            return False
        if "type" in each:
            if each["type"] != "object":
                return False
        elif each.keys() & {"properties", "additionalProperties"}:
            continue  # which xgrammar takes for an object's
        elif "$ref" in each:
            pending += _referenced(schema, each["$ref"])
        elif several := [each[key] for key in ("anyOf", "oneOf", "allOf") if isinstance(each.get(key), list)]:
            pending += several[0]
        elif "const" in each or isinstance(each.get("enum"), list):
            choices = [each["const"]] if "const" in each else each["enum"]
            if not all(isinstance(choice, dict) for choice in choices):
                return False
        else:
            return False
    return True


def name_of(grammar: Grammar) -> str:
    """Return what a message calls a grammar."""
    names = {
        "json_schema": "JSON schema",
        "regex": "regular expression",
        "ebnf": "grammar",
        "tool_calls": "grammar of the tools' calls",
    }
    return names.get(grammar.kind, grammar.kind)


def shown(text: str, length: int = 60, *, quoted: bool = True) -> str:
    """Return the beginning of a text, for a message."""
    short = text if len(text) <= length else f"{text[:length]}..."
    return repr(short) if quoted else short


def _read_schema(text: str, name: str) -> dict[str, Any]:
    try:
        schema = json.loads(text, parse_constant=_refuse_constant, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            f"the {name} {shown(text)} cannot be read as JSON ({error}); an object with keywords is required; mend it."
        ) from None
    if not isinstance(schema, dict):
        raise ConfigError(f"the {name} is {shown(text)}; an object with keywords is required; write one.")
    return schema


def _check_schema(schema: dict[str, Any], name: str) -> None:
    if _depth(schema) > _MAX_DEPTH:
        raise ConfigError(
            f"the {name} is nested more than {_MAX_DEPTH} deep; at most that is allowed; flatten it, or name "
            f"parts of it in $defs and use $ref."
        )
    _put_plainly(schema)
    for where, each in _subschemas(schema):
        found = _unkept(each)
        if found:
            raise ConfigError(
                f"the {name} uses {shown(', '.join(found), 200, quoted=False)} at "
                f"{shown(where, 100, quoted=False) or 'its top'}; only what can be kept token by token is taken, and "
                f"a $ref within the schema; leave it out and check the finished text."
            )


def _unkept(schema: dict[str, Any]) -> list[str]:
    """Return what of one schema xgrammar 0.2.8 would pass over, found by trying each keyword against bad texts."""
    found = sorted(_UNENFORCED & schema.keys())
    if schema.get("uniqueItems") is True:
        found.append("uniqueItems")
    if isinstance(schema.get("allOf"), list) and len(schema["allOf"]) > 1:
        found.append("allOf of several")
    for key in ("$ref", "anyOf", "oneOf", "allOf", "enum", "const"):
        beside = sorted(schema.keys() - _ANNOTATIONS - {key} - ({"type"} if key in ("enum", "const") else set()))
        beside = [each for each in beside if not each.startswith("x-")]  # OpenAPI's extensions, as Kubernetes has them
        if key in schema and beside:
            found.append(f"{key} beside {', '.join(beside)}")
    reference = schema.get("$ref", "#")
    if not (isinstance(reference, str) and (reference == "#" or reference.startswith("#/"))):
        found.append(f"$ref to {shown(str(reference))}")
    named = schema.get("type")
    types = {each for each in (named if isinstance(named, list) else [named]) if isinstance(each, str)}
    choices = schema["enum"] if isinstance(schema.get("enum"), list) else []
    choices = [*choices, *([schema["const"]] if "const" in schema else [])]
    found += [
        f"{shown(str(each), quoted=False)}, an integer of more than 64 bits" for each in _wide_integers(choices)
    ]  # it would be a float
    if types:
        found += [f"{shown(json.dumps(each))} that is no {named}" for each in choices if not _types(each) & types]
    for keys, needed, giving in _NEED_A_TYPE:
        if (used := sorted(keys & schema.keys())) and not (types & needed or (not types and giving & schema.keys())):
            found.append(f"{', '.join(used)} without type {' or '.join(sorted(needed))}")
    properties, required = schema.get("properties", {}), schema.get("required", [])
    if isinstance(properties, dict) and isinstance(required, list):
        found += [f"required {shown(each)}, which is not in properties" if isinstance(each, str)
                  else f"required {shown(json.dumps(each), quoted=False)}, which is no name"
                  for each in required if not isinstance(each, str) or each not in properties]  # fmt: skip
    found += _unkept_names(schema)
    patterns = [schema["pattern"]] if "pattern" in schema else []
    patterns += schema["patternProperties"] if isinstance(schema.get("patternProperties"), dict) else []
    found += filter(None, (_read_otherwise(str(pattern), is_regex=True) for pattern in patterns))
    if "pattern" in schema and schema.keys() & {*_LENGTHS}:
        found.append("pattern together with a length")
    elif isinstance(kept := schema.get("format"), str) and kept in _KNOWN_FORMATS and schema.keys() & {*_LENGTHS}:
        found.append(f"format {kept} together with a length")
    if any(_BREAKS_A_STRING.search(_ESCAPE_OR_CLASS.sub(r"\1", str(pattern))) for pattern in patterns):
        found.append("a pattern with a quotation mark or a backslash")
    return found


def _wide_integers(value: Any) -> list[int]:
    """Return the integers within a value that 64 bits do not hold."""
    if isinstance(value, dict | list):
        return [
            wide for each in (value.values() if isinstance(value, dict) else value) for wide in _wide_integers(each)
        ]
    return [value] if isinstance(value, int) and not -(2**63) <= value < 2**63 else []


def _unkept_names(schema: dict[str, Any]) -> list[str]:
    """Return what of one schema xgrammar 0.2.9 would not hold an object's names to.

    A listed name is held to properties alone, and with names listed no other is to a pattern; one of several patterns
    is enough, whatever others the name matches; names of propertyNames may be there whatever else is forbidden. A name
    that is not listed may come again, and counts each time.
    """
    found = []
    patterns, is_closed = schema.get("patternProperties"), schema.get("additionalProperties") is False
    if patterns and schema.get("properties"):
        found.append("patternProperties beside properties")
    if isinstance(patterns, dict) and _may_meet(patterns):
        found.append("patternProperties of several that may meet")
    if "propertyNames" in schema:
        found += [f"propertyNames beside {key}" for key in ("properties", "patternProperties") if schema.get(key)]
        if is_closed:
            found.append("propertyNames beside additionalProperties that are false")
    least, required = schema.get("minProperties"), schema.get("required")
    count = len({each for each in required if isinstance(each, str)}) if isinstance(required, list) else 0
    may_repeat = not is_closed or bool(patterns) or "propertyNames" in schema
    if isinstance(least, int | float) and least > max(1, count) and may_repeat:
        found.append("minProperties above 1 where names may come again")
    return found


def _may_meet(patterns: dict[str, Any]) -> bool:
    """Whether a name may match two patterns that ask for different values; it may where the contrary is not plain."""
    wanted = [(_beginning(pattern), json.dumps(schema, sort_keys=True)) for pattern, schema in patterns.items()]
    around: list[tuple[str, str]] = []  # whose beginnings the next one's begins with, of one schema
    for beginning, schema in sorted(wanted):
        while around and not beginning.startswith(around[-1][0]):
            around.pop()
        if around and around[-1][1] != schema:
            return True
        around.append((beginning, schema))
    return False


def _beginning(pattern: str) -> str:
    """Return letters, digits and the like with which all that matches a pattern begins; "" where none are plain."""
    depth = 0
    for letter in _ESCAPE_OR_CLASS.sub("", pattern):
        depth += (letter == "(") - (letter == ")")
        if letter == "|" and depth <= 0:
            return ""
    found = _BEGINNING.match(pattern)
    return "" if found is None else found[1]


def _read_otherwise(text: str, *, is_regex: bool) -> str | None:
    """Return what of a regular expression or a grammar xgrammar 0.2.8 reads otherwise, and without a warning."""
    for escape in _ESCAPE.finditer(text):
        code = int(escape[1] or escape[2] or "0", 16)
        if code > sys.maxunicode or 0xD800 <= code < 0xE000:
            return f"{escape[0]}, no character"
    named = _NAMED_CLASS.search(text) if is_regex else None
    return None if named is None else f"{named[0]}, a class by its name"


def _put_plainly(outermost: dict[str, Any]) -> None:
    """Write in place what libraries of schemas write, and xgrammar 0.2.9 does not take, in words that it takes.

    Of a pattern and a format the pattern (zod writes both, the pattern being the format's); no minLength of 1 beside a
    pattern that nothing empty matches, or a format that nothing empty has. Tuples as draft 7 has them (items,
    additionalItems) as prefixItems and items. Objects whose names are those of a list (zod's records) by their
    properties. One of several schemas as any of them, where they are plainly apart: xgrammar does not look behind
    references, as those of pydantic's unions are.
    References into what is put otherwise lead into $defs.
    """
    _name_rewritten(outermost)
    for _, schema in _subschemas(outermost):
        if isinstance(schema.get("items"), list) and "prefixItems" not in schema:
            schema["prefixItems"] = schema.pop("items")
            if "additionalItems" in schema:
                schema["items"] = schema.pop("additionalItems")
        if isinstance(pattern := schema.get("pattern"), str):
            if isinstance(schema.get("format"), str):
                del schema["format"]
            _put_lengths_into_pattern(schema, pattern)
        elif (
            isinstance(named := schema.get("format"), str)
            and named in _NEVER_EMPTY
            and type(least := schema.get("minLength")) is int
            and least in (0, 1)
        ):
            del schema["minLength"]
        names = schema.get("propertyNames")
        if (
            isinstance(names, dict)
            and isinstance(listed := names.get("enum"), list)
            and names.keys() - _ANNOTATIONS <= {"enum", "type"}
            and names.get("type", "string") == "string"
            and all(isinstance(name, str) for name in listed)
            and not schema.keys() & {"properties", "patternProperties"}
            and (value := schema.get("additionalProperties", {})) is not False
            and len(listed) * len(json.dumps(value)) < _MOST_NAMED_BYTES
        ):
            del schema["propertyNames"]
            schema["properties"] = {name: copy.deepcopy(value) for name in listed}
            schema["additionalProperties"] = False
        if isinstance(choices := schema.get("oneOf"), list) and _are_apart(outermost, choices):
            schema["anyOf"] = schema.pop("oneOf")


def _name_rewritten(outermost: dict[str, Any]) -> None:
    """Have references through keys that are rewritten lead to the same schemas under names in $defs."""
    named = outermost.get("$defs", {})
    if not isinstance(named, dict):
        return
    added = dict[int, str]()
    named = dict(named)
    for schema in [each for _, each in _subschemas(outermost) if "$ref" in each]:
        reference = schema["$ref"]
        found = _referenced(outermost, reference)
        if not found or _REWRITTEN.isdisjoint(unquote(reference).split("/")):
            continue
        target = found[0]
        if id(target) not in added:
            name = next(each for each in (f"_{count}" for count in itertools.count(len(added))) if each not in named)
            named[name] = target
            added[id(target)] = name
        schema["$ref"] = f"#/$defs/{added[id(target)]}"
    if added:
        outermost.pop("$defs", None)
        outermost["$defs"] = named  # last, so that messages say where a schema was written


def _put_lengths_into_pattern(schema: dict[str, Any], pattern: str) -> None:
    """Leave no lengths beside a pattern that has them, or can have: ^ab[a-z]*$ of 3 to 9 is ^ab[a-z]{1,7}$."""
    least, most = (schema.get(key) for key in _LENGTHS)
    if type(least) is int and (least == 0 or (least == 1 and _BEGINS_WITH_SOMETHING.match(pattern))):
        del schema["minLength"]
        least = None
    found, given = _STRETCH.fullmatch(pattern), [each for each in (least, most) if each is not None]
    if found is None or not given or not all(type(each) is int and each >= 0 for each in given):
        return
    low = max((least or 0) - len(found[1]), 1 if found[3] == "+" else 0)
    high = None if most is None else most - len(found[1])
    if high is None or low <= high:
        schema["pattern"] = f"^{found[1]}{found[2]}{{{low},{'' if high is None else high}}}$"
        for key in _LENGTHS:
            schema.pop(key, None)


def _are_apart(whole: dict[str, Any], choices: list[Any]) -> bool:
    """Whether no value is of two of these schemas, plainly: by their types, or by texts that they ask for."""
    named = [_resolved(whole, choice) for choice in choices]
    if not all(isinstance(each, dict) for each in named):
        return False
    types = [each["type"] for each in named if isinstance(each.get("type"), str)]
    if len(set(types)) == len(named) and not {"integer", "number"} <= set(types):
        return True
    marks = [_marks(whole, each) for each in named]
    for name in marks[0] if marks else {}:
        values = [each.get(name, set[str]()) for each in marks]
        if all(values) and len(set[str]().union(*values)) == sum(map(len, values)):
            return True
    return False


def _marks(whole: dict[str, Any], schema: dict[str, Any]) -> dict[str, set[str]]:
    """Return the texts that required properties of an object may have, of those that have a list of them."""
    properties, required = schema.get("properties"), schema.get("required")
    is_object = schema.get("type", "object") == "object"
    if not is_object or not isinstance(properties, dict) or not isinstance(required, list):
        return {}
    marks = {}
    for name in required:
        value = _resolved(whole, properties.get(name)) if isinstance(name, str) else None
        listed = value.get("enum", [value.get("const")]) if isinstance(value, dict) else None
        if isinstance(listed, list) and all(isinstance(each, str) for each in listed):
            marks[name] = set(listed)
    return marks


def _resolved(whole: dict[str, Any], schema: Any) -> Any:
    """Return what a schema names by $ref, or itself; None where that leads nowhere."""
    for _ in range(_MAX_DEPTH):
        if not (isinstance(schema, dict) and "$ref" in schema):
            return schema
        schema = next(iter(_referenced(whole, schema["$ref"])), None)
    return None


def as_meant(grammar: Grammar) -> Grammar:
    """Return a grammar that xgrammar reads as this one is meant.

    A dot is no line end in a regular expression. Schemas are put plainly; some formats are patterns of ours (_FORMATS).
    Patterns have no character beyond ASCII, with which xgrammar 0.2.9 lets them match quotation marks, backslashes and
    line ends in a JSON string; and (x)? is (x|), since it lets (ab+)? match b.
    """
    if grammar.kind == "regex":
        return grammar.replace(text=_DOT.sub(lambda found: r"[^\n\r]" if found[1] else found[0], grammar.text))
    if grammar.kind not in ("json_schema", "tool_calls"):
        return grammar
    values = json.loads(grammar.text)
    for outermost in _schemas_in(grammar.kind, values):
        _put_plainly(outermost)
        for _, schema in _subschemas(outermost):
            named = schema.get("format")
            if isinstance(named, str) and named in _FORMATS and not schema.keys() & {*_LENGTHS}:
                schema["pattern"] = _FORMATS[named]
                del schema["format"]
            if isinstance(pattern := schema.get("pattern"), str):
                schema["pattern"] = _pattern_as_meant(pattern)
            if isinstance(patterns := schema.get("patternProperties"), dict):
                renamed = {_pattern_as_meant(pattern): each for pattern, each in patterns.items()}
                if len(renamed) == len(patterns):
                    schema["patternProperties"] = renamed
    return grammar if values == json.loads(grammar.text) else grammar.replace(text=json.dumps(values))


def patterns_of(grammar: Grammar) -> list[str]:
    """Return the patterns of a grammar's schemas, each once."""
    if grammar.kind not in ("json_schema", "tool_calls"):
        return []
    found: dict[str, None] = {}
    for outermost in _schemas_in(grammar.kind, json.loads(grammar.text)):
        for _, schema in _subschemas(outermost):
            if isinstance(pattern := schema.get("pattern"), str):
                found[pattern] = None
            if isinstance(patterns := schema.get("patternProperties"), dict):
                found |= dict.fromkeys(patterns)
    return list(found)


def _schemas_in(kind: str, values: dict[str, Any]) -> list[dict[str, Any]]:
    if kind != "tool_calls":
        return [values]
    otherwise = values.get("otherwise")
    return [*values["functions"].values(), *([] if otherwise is None else [otherwise])]


def _pattern_as_meant(pattern: str) -> str:
    """Return a pattern with its characters beyond ASCII as escapes, and nothing for a choice in optional groups."""

    def escape(found: re.Match[str]) -> str:
        character = found[1]
        is_half = character is not None and 0xD800 <= ord(character) < 0xE000
        return found[0] if character is None or is_half else f"\\u{{{ord(character):x}}}"

    pattern = _OPTIONAL_END.sub(lambda found: "|)" if found[1] else found[0], pattern)
    return _BEYOND_ASCII.sub(escape, pattern)


def _types(value: Any) -> set[str]:
    """Return the names of JSON schema that a value's type has."""
    if isinstance(value, bool):
        return {"boolean"}
    if isinstance(value, int | float):
        return {"number", "integer"} if value == int(value) else {"number"}
    names = {type(None): "null", str: "string", list: "array", dict: "object"}
    return {names[type(value)]}


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _finite(number: str) -> float:
    if math.isinf(float(number)):
        raise ValueError(f"{shown(number, quoted=False)} is too large a number")
    return float(number)


def _depth(value: Any) -> int:
    """Return how deep lists and objects stand in one another."""
    depth, level = 0, [value]
    while level := [each for each in level if isinstance(each, dict | list)]:
        depth += 1
        level = [inner for each in level for inner in (each.values() if isinstance(each, dict) else each)]
    return depth


def _subschemas(outermost: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each schema within a schema and its place, those that only a $ref leads to last.

    Each may be changed once it is there; a property may be called as a keyword is.
    """
    seen = dict[int, dict[str, Any]]()  # which holds them, so that no other gets the id of one that is taken out
    pending = [("", outermost)]
    while pending:
        place, begun = pending.pop()
        if id(begun) in seen:
            continue
        for where, each in _written_in(begun, place):
            if id(each) in seen:
                continue
            seen[id(each)] = each
            yield where, each
            if "$ref" in each:
                named = _referenced(outermost, each["$ref"])
                pending += [(str(each["$ref"])[1:], found) for found in named if isinstance(found, dict)]


def _written_in(schema: dict[str, Any], where: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield a schema and those that stand within it, each with its place."""
    yield where, schema
    for key, value in schema.items():
        if key in _MAPS_OF_SCHEMAS and isinstance(value, dict):
            inner = list(value.items())
        elif key in _SCHEMAS:
            inner = list(enumerate(value)) if isinstance(value, list) else [("", value)]
        else:
            continue
        for name, each in inner:
            if isinstance(each, dict):
                yield from _written_in(each, f"{where}/{key}" + (f"/{name}" if name != "" else ""))


def _referenced(schema: dict[str, Any], reference: Any) -> list[Any]:
    """Return the part of a schema that a $ref names, none where it is not there."""
    if not isinstance(reference, str) or not (reference == "#" or reference.startswith("#/")):
        return []
    found: Any = schema
    for part in reference.split("/")[1:]:
        key = unquote(part).replace("~1", "/").replace("~0", "~")
        if isinstance(found, dict) and key in found:
            found = found[key]
        elif isinstance(found, list) and key.isdecimal() and len(key) < 9 and int(key) < len(found):
            found = found[int(key)]
        else:
            return []
    return [found]
