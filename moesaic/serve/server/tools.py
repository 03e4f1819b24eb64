"""What a request says of tools: which functions there are, and which of them may, or must, be called."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moesaic.config.serve import Grammar
from moesaic.serve.grammar_checks import allows_only_objects
from moesaic.serve.server.errors import refusal
from moesaic.serve.server.tool_calls import calls_grammar

_FUNCTION_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")  # as OpenAI's
# What a schema says of its kind: with one of them it takes no type beside it.
_WHOLE_SCHEMAS = frozenset({"type", "$ref", "anyOf", "oneOf", "allOf", "enum", "const"})


@dataclass(frozen=True)
class Tools:
    """What a request says of tools.

    shown: what the model is told of, as it was sent. functions: of these, by name, the schema of the arguments.
    required: of the functions that the answer has to call, None where it need not. is_single: whether that is one call.
    """

    shown: list[dict[str, Any]]
    functions: Mapping[str, dict[str, Any]]
    required: Mapping[str, dict[str, Any]] | None
    is_single: bool

    def forced_calls(self) -> Grammar | None:
        """Return the grammar of an answer that has to be calls."""
        return None if self.required is None else calls_grammar(self.required, is_single=self.is_single)

    def calls_or(self, schema: Mapping[str, Any]) -> Grammar:
        """Return the grammar of an answer that is calls, or matches a schema."""
        return calls_grammar(self.functions, is_single=self.is_single, otherwise=schema)


@dataclass(frozen=True)
class ToolForm:
    """How a kind of request writes functions: in an object of their own, or beside the type."""

    is_nested: bool

    def read(self, tools: list[dict[str, Any]], choice: dict[str, Any] | str | None, *, is_single: bool) -> Tools:
        """Return what tools and tool_choice say. Raises: ApiError."""
        functions = self._functions(tools)
        allowed = self._allowed(choice)
        mode = choice
        if allowed is not None:
            mode, names = allowed
            functions = _named(names, functions)
        shown = [] if mode == "none" else [tool for tool in tools if self._name_in(tool) in functions]
        if mode in (None, "none", "auto"):
            return Tools(shown, functions, None, is_single)
        if mode != "required":
            return Tools(shown, functions, _named({self._chosen(mode)}, functions), is_single=True)
        if not functions:
            raise refusal(
                "tool_choice is required and there are no tools; at least one is required; send tools.",
                param="tool_choice",
            )
        return Tools(shown, functions, functions, is_single)

    def _functions(self, tools: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """Return each tool's schema of its arguments. One that has none takes none. Raises: ApiError."""
        schemas = {}
        for place, tool in enumerate(tools):
            where = f"tools.{place}.function" if self.is_nested else f"tools.{place}"
            function = self._function_in(tool)
            name = None if function is None else function.get("name")
            if function is None or not isinstance(name, str):
                form = self._function_form('"name": ..., "parameters": ...')
                raise refusal(
                    f"tools.{place} is {json.dumps(tool)[:60]}; {form} is required; send that.",
                    param=f"tools.{place}",
                    code="invalid_value",
                )
            if not _FUNCTION_NAME.fullmatch(name):
                raise refusal(
                    f"{where}.name is {json.dumps(name)[:60]}; 1 to 64 letters, digits, _ and - are required; rename "
                    f"it.",
                    param=f"{where}.name",
                    code="invalid_value",
                )
            if name in schemas:
                raise refusal(
                    f"tools.{place} is a second tool of the name {name!r}; each needs its own, since calls give no "
                    f"more than it; rename it, or leave it out.",
                    param=f"{where}.name",
                    code="invalid_value",
                )
            schema = function.get("parameters")
            schema = {"type": "object", "properties": {}} if schema is None else schema
            if isinstance(schema, dict) and not schema.keys() & _WHOLE_SCHEMAS:
                schema = {"type": "object", **schema}
            if not isinstance(schema, dict) or not allows_only_objects(schema):
                raise refusal(
                    f"the parameters of {name!r} are {json.dumps(schema)[:60]}; the JSON schema of an object is "
                    f"required; send one, or leave them out.",
                    param=f"{where}.parameters",
                    code="invalid_value",
                )
            schemas[name] = schema
        return schemas

    def _allowed(self, choice: dict[str, Any] | str | None) -> tuple[str, set[str]] | None:
        """Return auto or required and the names where tool_choice is one of some of the tools. Raises: ApiError."""
        if not isinstance(choice, dict) or choice.get("type") != "allowed_tools":
            return None
        said = choice.get("allowed_tools") if self.is_nested else choice
        said = said if isinstance(said, dict) else {}
        tools = said.get("tools")
        names = [self._name_in(tool) for tool in tools] if isinstance(tools, list) else []
        if said.get("mode") not in ("auto", "required") or not names or None in names:
            form = '"mode": "auto" or "required", "tools": [' + self._function_form('"name": ...') + ", ...]"
            form = f'{{"type": "allowed_tools", "allowed_tools": {{{form}}}}}' if self.is_nested else form
            raise refusal(
                f"tool_choice is {json.dumps(choice)[:90]}; {form} is required; send that.", param="tool_choice"
            )
        return said["mode"], {name for name in names if name is not None}

    def _chosen(self, choice: dict[str, Any] | str | None) -> str:
        """Return the function that tool_choice is. Raises: ApiError where it is something else."""
        name = self._name_in(choice)
        if name is None:
            form = self._function_form('"name": ...')
            raise refusal(
                f"tool_choice is {json.dumps(choice)[:60]}; none, auto, required or {form} is required; send one of "
                f"them.",
                param="tool_choice",
            )
        return name

    def _function_in(self, value: Any) -> dict[str, Any] | None:
        """Return what a tool, or a choice of one, says of a function; None where it is of another form."""
        if not isinstance(value, dict) or value.get("type") != "function":
            return None
        found = value.get("function") if self.is_nested else value
        return found if isinstance(found, dict) else None

    def _name_in(self, value: Any) -> str | None:
        """Return the function that a tool, or a choice of one, names, None where it is of another form."""
        name = (self._function_in(value) or {}).get("name")
        return name if isinstance(name, str) else None

    def _function_form(self, keys: str) -> str:
        inner = f'"function": {{{keys}}}' if self.is_nested else keys
        return f'{{"type": "function", {inner}}}'


def _named(names: set[str], functions: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the functions that tool_choice names. Raises: ApiError where one is no tool."""
    for name in sorted(names - functions.keys()):
        raise refusal(
            f"tool_choice names {name[:60]!r}, which is none of the tools "
            f"({', '.join(functions)[:200] or 'there are none'}); one of them is required; send its name.",
            param="tool_choice",
        )
    return {name: functions[name] for name in functions if name in names}
