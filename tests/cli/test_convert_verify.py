"""`moesaic convert import`, `export` and `verify`: what they print, and the exit status that a pipeline relies on."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

pytest.importorskip("transformers", reason="logits are compared with transformers'")


@pytest.fixture(autouse=True)
def short_check(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two prompts and the long one, and two new tokens."""
    from moesaic.convert import parity

    monkeypatch.setattr(parity, "PROMPTS", parity.PROMPTS[:2])
    monkeypatch.setattr(parity, "_NEW_TOKENS", 2)
    monkeypatch.setattr(parity, "gc", SimpleNamespace(collect=lambda: 0))


def shown(result: Any) -> str:
    """What was printed, however the table broke its lines."""
    return " ".join(result.out.split())


@pytest.fixture
def exported(cli: Any, trained_run: Path, tmp_path: Path) -> Path:
    result = cli("convert", "export", trained_run, tmp_path / "out")
    assert result.status == 0, result.err
    assert "as moesaic." in shown(result) and "26 of 26 used" in shown(result) and "by transformers" in shown(result)
    return tmp_path / "out"


def test_what_was_exported_verifies_and_comes_back(cli: Any, trained_run: Path, exported: Path, tmp_path: Path) -> None:
    result = cli("convert", "verify", trained_run, exported)
    assert result.status == 0, result.err
    for text in ("0 different", "They compute the same.", "the same for 100", "likeliest token", "greedy text"):
        assert text in shown(result), text
    assert cli("convert", "import", exported, tmp_path / "back").status == 0
    values = json.loads(cli("convert", "verify", tmp_path / "back", trained_run, "--json").out)
    assert values["failure"] is None and values["comparison"]["max_relative"] < 1e-5
    assert values["weights"]["different"] == values["weights"]["alone"] == []
    assert values["comparison"]["routing_agreement"] == [1.0, 1.0]


def test_a_cast_is_forgiven_and_said(cli: Any, trained_run: Path, tmp_path: Path) -> None:
    assert cli("convert", "export", trained_run, tmp_path / "half", "--dtype", "bf16").status == 0
    result = cli("convert", "verify", tmp_path / "half", trained_run)
    assert result.status == 0 and "but for the dtype's rounding, 0 different" in shown(result)
    assert "They compute the same." in shown(result)


def test_whatever_differs_is_named_with_exit_status_1(
    cli: Any, trained_run: Path, exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = load_file(exported / "model.safetensors")
    name = "model.blocks.1.feed_forward_norm.weight"
    tensors[name][3] *= 1.00001
    save_file(tensors, exported / "model.safetensors", {"format": "pt"})
    for first, second in ((trained_run, exported), (exported, trained_run)):
        result = cli("convert", "verify", first, second)
        assert result.status == 1 and "1 different" in shown(result)
        assert "They differ: 1 of 26 tensors differ by more than rounding (blocks.1.feed_forward_norm.weight)" in shown(
            result
        )
    values = json.loads(cli("convert", "verify", trained_run, exported, "--json").out)
    assert values["failure"].startswith("1 of 26 tensors differ by more than rounding")
    # Also where there is no memory to run them.
    monkeypatch.setattr("moesaic.convert.parity.available_memory_bytes", lambda: 0)
    result = cli("convert", "verify", trained_run, exported)
    assert result.status == 1 and "not compared: it needs" in shown(result) and "They differ: " in shown(result)
    assert cli("convert", "verify", trained_run, trained_run).status == 0


def test_an_export_whose_check_fails_leaves_nothing_unless_forced(
    cli: Any, trained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moesaic.convert.parity.MAX_RELATIVE", -1.0)
    result = cli("convert", "export", trained_run, tmp_path / "out")
    assert result.status != 0 and "does not compute what" in result.err and "nothing was kept" in result.err
    assert not list(tmp_path.iterdir())
    result = cli("convert", "export", trained_run, tmp_path / "out", "--force")
    assert result.status == 0 and "kept, as asked" in result.err
    assert json.loads((tmp_path / "out" / "parity.json").read_text())["failure"].startswith("logits differ by")


def test_configs_that_differ_are_in_the_table(cli: Any, trained_run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(trained_run, other)
    text = (other / "config.yaml").read_text()
    assert "norm_epsilon: 1.0e-05" in text
    (other / "config.yaml").write_text(text.replace("norm_epsilon: 1.0e-05", "norm_epsilon: 1.0e-06"))
    result = cli("convert", "verify", trained_run, other)
    assert result.status == 1 and "norm_epsilon = 1e-05 (not 1e-06)" in shown(result)
