"""What a chat template of a stranger can do: make text, refuse, and nothing else."""

import json

import pytest
import tokenizers

from moesaic.data.chat import check_chat_template, render_chat, template_settings
from moesaic.data.tokenizer import Tokenizer
from moesaic.errors import DataError

pytest.importorskip("jinja2", reason="chat templates are Jinja (extra `evaluate`)")

USER = {"role": "user", "content": "Hello"}


def with_template(template: str) -> Tokenizer:
    tokenizer = Tokenizer.train(["Hello there, who is it?"], vocab_size=257)
    config = {"eos_token": "<|endoftext|>", "chat_template": template}
    return Tokenizer(tokenizer.json_text, companions={"tokenizer_config.json": json.dumps(config)})


def test_a_template_has_messages_special_tokens_and_whether_to_prompt() -> None:
    tokenizer = with_template(
        "{% for m in messages %}\n{{ m.role }}: {{ m.content }}{{ eos_token }}\n    {% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    assert render_chat(tokenizer, [USER]) == "user: Hello<|endoftext|>\nassistant:"
    answer = {"role": "assistant", "content": "Who"}
    assert render_chat(tokenizer, [USER, answer], add_generation_prompt=False) == (
        "user: Hello<|endoftext|>\nassistant: Who"
    )
    assert answer["content"] == "Who"


@pytest.mark.parametrize("change", ["[:3]", " | upper", " | replace('He', '')"])
def test_a_last_message_that_the_template_changes_is_not_continued(change: str) -> None:
    with pytest.raises(DataError, match=r"leaves out what the last message says.*; end with another one"):
        render_chat(with_template(f"{{{{ messages[-1].content{change} }}}}"), [USER], add_generation_prompt=False)


def test_a_last_message_that_is_shown_twice_or_trimmed_is_continued() -> None:
    twice = with_template("({{ messages[-1].content | trim }}) {{ messages[-1].content | trim }}")
    said = {"role": "assistant", "content": " Hello, "}
    assert render_chat(twice, [said], add_generation_prompt=False) == "(Hello, ) Hello, "


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].content + 1 }}",
        "{{ 1 / 0 }}",
        "{{ messages | tojson(a=1) }}",
    ],
)
def test_a_template_that_reaches_out_or_fails_is_an_error(template: str) -> None:
    tokenizer = with_template(template)
    check_chat_template(tokenizer)
    with pytest.raises(DataError, match=r"fails on 1 messages with the roles user \(\w+: .*; .*tokenizer_config\.json"):
        render_chat(tokenizer, [USER])


def test_a_template_that_refuses_says_why() -> None:
    tokenizer = with_template("{{ raise_exception('roles take turns') }}")
    with pytest.raises(DataError, match=r"refuses 1 messages with the roles user \(roles take turns\); .*; leave out"):
        render_chat(tokenizer, [USER])


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("a\n{% for %}", "line 2: Expected an expression"),
        ("{% for m in messages %}", "line 1: Unexpected end of template"),
        ("{{ messages | nope }}", "line 1: No filter named 'nope'"),
        (" \n", "it is empty"),
    ],
)
def test_a_broken_template_is_known_before_a_conversation(template: str, reason: str) -> None:
    tokenizer = with_template(template)
    other = Tokenizer(tokenizer.json_text, companions={"chat_template.jinja": template})
    for each, name in ((tokenizer, "tokenizer_config.json"), (other, "chat_template.jinja")):
        for call in (lambda each=each: check_chat_template(each), lambda each=each: render_chat(each, [USER])):
            with pytest.raises(DataError, match=rf"in {name} cannot be used \({reason}.*\); .*; mend it"):
                call()
    check_chat_template(Tokenizer(tokenizer.json_text))


def test_a_template_has_the_tools_and_all_of_a_message() -> None:
    tokenizer = with_template(
        "{% if tools %}{{ tools | map(attribute='name') | join(',') }}|{% endif %}"
        "{% for m in messages %}{{ m.role }}{{ m.tool_calls | tojson if m.tool_calls }}{% endfor %}"
    )
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "look", "arguments": {"at": None}}]}
    messages = [USER, call]
    assert render_chat(tokenizer, messages) == 'userassistant[{"name": "look", "arguments": {"at": null}}]'
    assert render_chat(tokenizer, [USER], tools=[{"name": "look"}, {"name": "go"}]) == "look,go|user"


def test_a_template_has_settings_of_its_own_and_they_never_replace_what_is_passed() -> None:
    tokenizer = with_template(
        "{% set effort = effort | default('high') %}{% macro think() %}{{ effort }}{{ enable_thinking }}{% endmacro %}"
        "{{ bos_token }}{% for m in messages %}{{ m.role }}{{ loop.index }}{% endfor %}{{ think() }}"
        "{% if tools or documents or not add_generation_prompt %}{{ raise_exception(strftime_now('%Y')) }}{% endif %}"
    )
    assert template_settings(tokenizer) == {"effort", "enable_thinking"}
    assert render_chat(tokenizer, [USER]) == "user1high"
    assert render_chat(tokenizer, [USER], settings={"effort": "low", "enable_thinking": False}) == "user1lowFalse"
    assert render_chat(tokenizer, [USER], settings={"messages": [], "tools": [1], "unread": 1}) == "user1high"


def test_templates_render_as_in_transformers() -> None:
    """What templates of real models use: JSON as it is, in its order, marks for training, loops that are left early."""
    transformers = pytest.importorskip("transformers", reason="transformers is the oracle")
    template = (
        "{% for tool in tools %}{{ tool | tojson }}\n{{ tool.function.parameters | tojson(indent=2) }}\n{% endfor %}"
        "{% for m in messages %}{% if m.role == 'tool' %}{% continue %}{% endif %}"
        "<{{ m.role }}>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
        "{% for call in m.tool_calls %}{{ call.function | tojson(separators=(',', ':')) }}{% break %}{% endfor %}"
        "{% else %}{{ m.content }}{% endif %}\n{% endfor %}"
        "{{ strftime_now('%Y') }}{% if add_generation_prompt %}{{ bos_token }}<assistant>{% endif %}"
    )
    parameters = {
        "type": "object",
        "properties": {"where": {"type": "string", "description": "it's <b>caf\u00e9</b> & so"}},
    }
    tools = [{"type": "function", "function": {"name": "look", "description": "z", "parameters": parameters}}]
    call = {"function": {"name": "look", "arguments": {"where": "l'\u00e9t\u00e9", "at": [1, None]}}}
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "  What's <up>?\n"},
        {"role": "assistant", "content": "", "tool_calls": [call, call]},
        {"role": "tool", "content": "nothing"},
    ]
    ours = with_template(template)
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(ours.json_text), chat_template=template
    )
    theirs.bos_token = "<|endoftext|>"
    named = json.dumps({"bos_token": "<|endoftext|>", "chat_template": template})
    ours = Tokenizer(ours.json_text, companions={"tokenizer_config.json": named})
    expected = theirs.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=True)
    assert render_chat(ours, messages, tools=tools) == expected
