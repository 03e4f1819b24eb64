"""`moesaic prepare` passes its options on, keeps --json clean and prints a summary."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from moesaic.cli.prepare import prepare
from moesaic.data.shards import ShardSet
from moesaic.errors import DataError


def run(*arguments: str | Path) -> Result:
    app = typer.Typer()
    app.command()(prepare)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def source(tmp_path: Path) -> Path:
    file = tmp_path / "a.jsonl"
    file.write_text("\n".join(json.dumps({"body": f"document {number} " * 30}) for number in range(30)))
    return file


def test_json_is_the_manifest_and_nothing_else(source: Path, tmp_path: Path) -> None:
    options = ["--vocab-size", 300, "--validation-fraction", 0.3, "--text-field", "body", "--workers", 1, "--json"]
    result = run(source, "--output", tmp_path / "out", *map(str, options))
    assert result.exit_code == 0, result.output
    values = json.loads(result.stdout)
    manifest = ShardSet.open(tmp_path / "out", verify=True).manifest
    assert values["fingerprint"] == manifest.fingerprint
    assert values["train"]["num_documents"] + values["validation"]["num_documents"] == 30
    assert values["settings"]["vocab_size"] == 300
    assert values["settings"]["text_field"] == "body"
    assert values["settings"]["validation_fraction"] == 0.3


def test_the_summary_counts_and_says_what_is_next(source: Path, tmp_path: Path) -> None:
    assert run(source, "--output", tmp_path / "one", "--vocab-size", "300", "--text-field", "body").exit_code == 0
    arguments = ["--output", tmp_path / "two", "--tokenizer", tmp_path / "one", "--text-field", "body"]
    result = run(source, *arguments)
    assert result.exit_code == 0, result.output
    manifest = ShardSet.open(tmp_path / "two").manifest
    for expected in (
        "documents",
        "bytes per token",
        f"{manifest.train.num_tokens:,}",
        f"--data {tmp_path / 'two'} --output RUN",
    ):
        assert expected in result.stdout
    assert manifest.fingerprint == ShardSet.open(tmp_path / "one").fingerprint


def test_mistakes_come_through_as_library_errors(tmp_path: Path) -> None:
    result = run(tmp_path / "none.txt", "--output", tmp_path / "out")
    assert isinstance(result.exception, DataError)
    assert "does not exist" in str(result.exception)


def test_help_ends_in_an_example_and_needs_no_torch() -> None:
    result = run("--help")
    assert "Example: moesaic prepare" in result.stdout
    code = "import sys, moesaic.cli.prepare; print({'torch', 'numpy', 'tokenizers'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"
    code = "import sys, moesaic.data.prepare; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
