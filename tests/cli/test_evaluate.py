import json
from pathlib import Path
from typing import Any

import pytest

from moesaic.evaluate.perplexity import measure_perplexity, text_windows
from moesaic.model.load import load_run


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("The License shall prevail over the Work.\n" * 20, encoding="utf-8")
    return path


def test_the_table_and_the_json_are_the_python_call(cli: Any, trained_run: Path, text: Path) -> None:
    loaded = load_run(trained_run, device="cpu")
    expected = measure_perplexity(
        loaded.model, text_windows(loaded, text, stride=4, limit_tokens=100), device=loaded.device
    )
    command = ["evaluate", trained_run, "--text", text, "--stride", 4, "--limit-tokens", 100, "--device", "cpu"]
    values = json.loads(cli(*command, "--json").out)
    assert values["loss"] == expected.loss and values["perplexity"] == expected.perplexity
    assert values["bits_per_byte"] == expected.bits_per_byte
    assert (values["tokens"], values["window"], values["stride"]) == (100, 16, 4)
    shown = cli(*command).out
    assert f"{expected.perplexity:,.3f}" in shown and f"{expected.bits_per_byte:.4f}" in shown


def test_prepared_shards_are_a_text_too(cli: Any, trained_run: Path, tiny_data: Path) -> None:
    packed = json.loads(cli("evaluate", trained_run, "--text", tiny_data, "--json").out)
    apart = json.loads(cli("evaluate", trained_run, "--text", tiny_data, "--documents", "--json").out)
    assert packed["tokens"] == apart["tokens"] and packed["bytes"] == apart["bytes"]
    assert packed["documents"] > 1 and packed["loss"] != apart["loss"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{run}", "--text", "absent.txt"], "DataError: absent.txt does not exist"),
        (["{run}-none", "--text", "{text}"], "CheckpointError: "),
        (["{run}", "--text", "{text}", "--stride", "17"], "ConfigError: stride (17)"),
        (["{run}", "--text", "{text}", "--window", "65"], "ConfigError: window (65)"),
        (["{run}", "--text", "{text}", "--limit-tokens", "0"], "ConfigError: limit_tokens (0)"),
    ],
)
def test_a_mistake_ends_with_status_2_and_a_message_in_three_parts(
    cli: Any, trained_run: Path, text: Path, arguments: list[str], message: str
) -> None:
    result = cli("evaluate", *(argument.format(run=trained_run, text=text) for argument in arguments))
    assert result.status == 2
    assert message in result.err and "Traceback" not in result.err and result.err.count(";") >= 2
    assert result.out == ""
