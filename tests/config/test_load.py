"""Presets, YAML files and --set give the same configs; what cannot be read is refused."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from moesaic.config.load import (
    apply_assignments,
    load_model_config,
    load_serve_config,
    load_train_config,
    merge,
    parse_assignment,
    read_values,
    text_assignment,
    with_options,
    write_config,
)
from moesaic.config.presets import preset, preset_names
from moesaic.config.serve import ServeConfig
from moesaic.errors import ConfigError

DATA = "data.path=corpus"
PAPER = [
    "dense-350m",
    "dense-1.3b",
    "dense-6.7b",
    "moe-350m-128",
    "moe-1.3b-128",
    "pr-moe-350m-32-64",
    "pr-moe-1.3b-64-128",
    "mos-350m",
    "mos-1.3b",
    "moe-2.4b-128",
    "moe-8b-128",
    "moe-24b-128",
    "moe-47b-128",
]


def test_the_papers_models_are_all_there() -> None:
    assert set(PAPER) < set(preset_names())


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_is_a_training_config_once_the_data_is_named(name: str) -> None:
    config = load_train_config(name, [DATA])
    assert config.model == load_model_config(name)
    assert config.data.sequence_length <= config.model.max_positions


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_round_trips_through_yaml(name: str, tmp_path: Path) -> None:
    config = load_train_config(name, [DATA])
    write_config(config, tmp_path / "config.yaml")
    assert load_train_config(tmp_path / "config.yaml") == config
    assert yaml.safe_load((tmp_path / "config.yaml").read_text()) == config.to_dict(), "any YAML reader reads it alike"


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_training_values(name: str) -> None:
    config = load_train_config(name, [DATA])
    assert config.tokens == 300_000_000_000
    assert config.tokens_per_step == 2048 * config.batch_size
    assert config.schedule.warmup_tokens == 375_000_000
    assert config.model.dropout == 0.1 and config.model.vocab_size == 50_304
    if config.model.moe is not None:
        assert config.model.moe_layers == tuple(range(1, config.model.num_layers, 2))
        assert config.schedule.decay_tokens == 300_000_000_000


def test_presets_are_fresh_copies() -> None:
    preset("moe-tiny-16")["model"]["moe"]["num_experts"] = 3
    assert preset("moe-tiny-16")["model"]["moe"]["num_experts"] == 16


def test_a_misspelt_preset_is_told_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean moe-tiny-16"):
        load_model_config("moe-tiny-61")
    with pytest.raises(ConfigError, match="did you mean moe-tiny-16"):
        preset("moe-tiny-61")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e9", 1e9),
        ("3e11", 3e11),
        ("1.5e-3", 1.5e-3),
        ("-1E+2", -100.0),
        (".5e1", 5.0),
        ("1_000_000", 1_000_000),
        ("0.25", 0.25),
        ("null", None),
        ("~", None),
        ("true", True),
        ("[8, 8, 8, 16]", [8, 8, 8, 16]),
        ("[8,16]", [8, 16]),
        ("{num_experts: 4}", {"num_experts": 4}),
        ("softmax", "softmax"),
        ("a=b", "a=b"),
        ("runs/data-1e9", "runs/data-1e9"),
        ("'1e9'", "1e9"),
        ('""', ""),
    ],
)
def test_set_values_are_yaml(text: str, value: Any) -> None:
    keys, parsed = parse_assignment(f"a.b={text}")
    assert keys == ["a", "b"]
    assert parsed == value and type(parsed) is type(value)


@pytest.mark.parametrize(
    "assignment", ["tokens", "=3", "a..b=1", ".a=1", "a.=1", "a=", "a=  ", "a=[1", "a={b", "a=b: c: d"]
)
def test_set_without_key_or_value_is_refused(assignment: str) -> None:
    with pytest.raises(ConfigError, match="--set") as caught:
        parse_assignment(assignment)
    assert str(caught.value).count(";") >= 2


def test_set_overrides_in_order_and_touches_nothing_else() -> None:
    values = preset("pr-moe-tiny-8-16")
    changed = apply_assignments(values, ["tokens=1", "tokens=2", "model.moe.top_k=2"])
    assert changed["tokens"] == 2 and changed["model"]["moe"]["top_k"] == 2
    assert values == preset("pr-moe-tiny-8-16")


def test_set_under_null_or_nothing_makes_the_section() -> None:
    assert load_model_config("dense-tiny", ["model.moe.num_experts=4"]).moe_layers == tuple(range(8))
    assert load_model_config("moe-tiny-16", ["model.moe=null", "model.moe.num_experts=4"]).layers[0].num_experts == 4
    assert load_train_config("dense-tiny", [DATA, "evaluation.sequences=3"]).evaluation.sequences == 3


def test_set_under_a_plain_value_is_refused() -> None:
    with pytest.raises(ConfigError, match="tokens is 1600000, not a section"):
        load_train_config("dense-tiny", ["tokens.max=3"])
    with pytest.raises(ConfigError, match=r"num_experts is \[8, 8, 8, 16\], not a section"):
        load_train_config("pr-moe-tiny-8-16", ["model.moe.num_experts.last=3"])


def test_a_moe_preset_can_be_made_dense_or_another_pyramid() -> None:
    assert load_model_config("pr-moe-tiny-8-16", ["model.moe=null"]) == load_model_config("dense-tiny")
    pyramid = load_model_config("moe-tiny-16", ["model.moe.num_experts=[8,8,8,16]", "model.moe.residual=sum"])
    assert pyramid == load_model_config("pr-moe-tiny-8-16")
    with pytest.raises(ConfigError, match="4 values for 8 MoE layers"):
        load_model_config("pr-moe-tiny-8-16", ["model.moe.every=1"])


def test_sizes_set_on_a_preset_derive_the_others_again() -> None:
    config = load_model_config("dense-350m", ["model.hidden_size=2e3", "model.num_heads=20"])
    assert (config.head_dim, config.intermediate_size, config.num_kv_heads) == (100, 8000, 20)


def test_a_file_may_start_from_a_preset(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("preset: pr-moe-tiny-8-16\ntokens: 2e6\nmodel: {moe: {residual: softmax}}\ndata: {path: corpus}\n")
    config = load_train_config(path, ["schedule.warmup_tokens=0"])
    assert config.tokens == 2_000_000 and config.schedule.warmup_tokens == 0
    assert [config.model.layers[index].num_experts for index in config.model.moe_layers] == [8, 8, 8, 16]
    assert {config.model.layers[index].residual for index in config.model.moe_layers} == {"softmax"}


def doubled(value: str) -> str:
    """Forty keys, each with twice what the one before has: a terabyte in two kilobytes."""
    lines = [f"k{each}: &k{each} {value.format(f'k{each - 1}')}\n" for each in range(1, 41)]
    return "".join(["k0: &k0 {x: 1}\n", *lines])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("# only a comment\n", "is empty"),
        ("- a\n- b\n", "holds list"),
        ("a: [1\n", "is not valid YAML"),
        ("[" * 5000, "is not valid YAML"),
        ("tokens: 1\ntokens: 2\n", "tokens stands twice"),
        ("model: {hidden_size: 1, hidden_size: 2}\n", "hidden_size stands twice"),
        ("preset: nothing\n", "'nothing' is not a preset"),
        ("1: 2\n", "1 is not a key of TrainConfig"),
        ("model: 3\ndata: {path: x}\ntokens: 1\n", "a section with keys is required"),
        ("a: !!python/object:os.system {}\n", "is not valid YAML"),
        ("[a]: 1\n", "is not valid YAML"),
        ("tokens: 2024-13-45\n", "2024-13-45 is no value of type timestamp (month must be in 1..12)"),
        ("tokens: 0x_\n", "0x_ is no value of type int"),
        ("tokens: " + "9" * 5000, "no value of type int"),
        ("tokens: 9" + ":59" * 200 + ".5", "no value of type float"),
        ("tokens: !!bool 7\n", "7 is no value of type bool"),
        ("tokens: !!timestamp 7\n", "7 is no value of type timestamp"),
        ("model: &a {b: *a}\n", "an alias stands inside what it names"),
        ("model: &a [*a]\n", "an alias stands inside what it names"),
        (doubled("{{x: *{0}, y: *{0}}}"), "it holds more than 100000 values"),
        (doubled("[*{0}, *{0}]"), "it holds more than 100000 values"),
    ],
)
def test_a_file_that_is_no_config_is_refused(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_train_config(path)
    assert message in str(caught.value)


def test_aliases_and_merged_keys_are_read(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\nc: *a\n")
    assert read_values(path) == {"a": {"x": 1, "y": 2}, "b": {"x": 1, "y": 3}, "c": {"x": 1, "y": 2}}


@pytest.mark.parametrize("value", ["2024-13-45", "0x_", "&a [*a]", "[" * 5000])
def test_an_assignment_of_what_no_value_can_be_is_refused(value: str) -> None:
    with pytest.raises(ConfigError, match=r"is not YAML; a number, a word, null or a \[list\] is required"):
        parse_assignment(f"tokens={value}")


def test_a_file_without_a_model_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("tokens: 5\n")
    with pytest.raises(ConfigError, match="no model section"):
        load_model_config(path)


def test_a_file_that_is_not_text_or_not_there_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="is not valid YAML"):
        read_values(path)
    for missing in (tmp_path, tmp_path / "none.yaml"):
        with pytest.raises(ConfigError, match="neither a preset nor a file"):
            read_values(missing)


def test_yaml_anchors_work(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("a: &x {p: 1, q: 2}\nb: {<<: *x, p: 3}\n")
    assert read_values(path) == {"a": {"p": 1, "q": 2}, "b": {"p": 3, "q": 2}}


def test_merge_lays_sections_over_each_other_and_replaces_the_rest() -> None:
    base = {"a": {"b": 1, "c": [1, 2]}, "d": 1}
    assert merge(base, {"a": {"c": [3]}, "e": {"f": 1}}) == {"a": {"b": 1, "c": [3]}, "d": 1, "e": {"f": 1}}
    assert merge(base, {"a": None}) == {"a": None, "d": 1}
    assert merge({"a": None}, {"a": {"b": 1}}) == {"a": {"b": 1}}
    assert base == {"a": {"b": 1, "c": [1, 2]}, "d": 1}


def test_a_runs_micro_batch_follows_its_batch_when_it_was_derived(tmp_path: Path) -> None:
    values = ["data.path=x", "batch_size=12"]
    write_config(load_train_config("dense-tiny", values), tmp_path / "config.yaml")
    assert load_train_config(tmp_path, ["batch_size=8"]).micro_batch_size == 8
    write_config(load_train_config("dense-tiny", [*values, "micro_batch_size=4"]), tmp_path / "config.yaml")
    assert load_train_config(tmp_path, ["batch_size=8"]).micro_batch_size == 4


def test_a_serve_config_is_a_file_and_assignments(tmp_path: Path) -> None:
    assert load_serve_config() == ServeConfig()
    file = tmp_path / "serve.yaml"
    file.write_text("engine:\n  max_sequences: 3\nserver:\n  port: 0\n  allowed_origins: ['https://example.org']\n")
    config = load_serve_config(file, ["server.port=81", "engine.block_size=16"])
    assert (config.engine.max_sequences, config.engine.block_size, config.server.port) == (3, 16, 81)
    assert config.server.allowed_origins == ("https://example.org",)
    assert ServeConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        ("server.prot=1", "did you mean port"),
        ("server.port=65536", "less than or equal to 65535"),
        ("server.allowed_origins=[https://example.org/path]", "without a path"),
        ("server.max_body_bytes=0", "greater than or equal to 1"),
        ("sever.port=1", "did you mean server"),
    ],
)
def test_a_serve_config_that_cannot_work_is_refused(assignment: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_serve_config(assignments=[assignment])


@pytest.mark.parametrize(
    "text",
    [
        "a",
        "null",
        "1e9",
        " a  b ",
        "a: #b",
        "\"'\\",
        "d\u00e9",
        "\U0001f600",
        "\x7f\x85\u2028",
        "a\nb",
        "\udc80",
        "x " * 99,
    ],
)
def test_an_assignment_of_a_text_sets_this_very_text(text: str) -> None:
    assert parse_assignment(text_assignment("a.b", text)) == (["a", "b"], text)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "sever: {port: 1}\n",
            "has the keys sever; a file for serving has the sections engine, server, overload; did y",
        ),
        ("preset: dense-tiny\n", "has the keys preset; .*; this is a training's: a run brings its own"),
        ("model: {}\ndata: {}\ntokens: 1\nseed: 3\n", "has the keys model, data, tokens, seed; a file for serving"),
        ("[1]\n", "holds list; .*`server: {port: 8080}`"),
        ("", "is empty; "),
        (None, "serve.yaml is no file; a YAML file with the sections of a server .engine, server, overload.*; check"),
    ],
)
def test_a_file_that_is_none_for_serving_is_told_what_one_is(text: str | None, words: str, tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigError, match=words) as caught:
        load_serve_config(file)
    message = str(caught.value)
    assert message.count(";") == 2 and "\n" not in message and "dense" not in message


def test_options_that_stand_for_a_key_may_repeat_a_set_and_not_contradict_it() -> None:
    host = {"server.host": ("--host", "127.0.0.1"), "server.port": ("--port", None)}
    assert with_options(["engine.block_size=16"], host) == ["engine.block_size=16", 'server.host="127.0.0.1"']
    assert load_serve_config(assignments=with_options(["server.host=127.0.0.1"], host)).server.host == "127.0.0.1"
    # A section that --set replaces does not take the option with it.
    config = load_serve_config(assignments=with_options(["server={port: 81}"], host))
    assert (config.server.host, config.server.port) == ("127.0.0.1", 81)
    with pytest.raises(
        ConfigError, match=r"^--host 127.0.0.1 and --set server.host=0.0.0.0 were both given; .*; leave"
    ):
        with_options(["server.port=1", "server.host=0.0.0.0"], host)
    data = {"data.path": ("--data", Path("shards"))}
    assert with_options(["data.path=shards/"], data)[-1] == 'data.path="shards"'
    with pytest.raises(ConfigError, match=r"--data shards and --set data.path=others were both given"):
        with_options(["data.path=others"], data)
