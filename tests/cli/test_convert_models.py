import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("transformers", reason="an import or export is checked by transformers")
pytest.importorskip("gguf", reason="GGUF is written through the gguf package")


@pytest.fixture(scope="module")
def run(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a random model that is a Llama."""
    from moesaic.checkpoint.store import save_checkpoint
    from moesaic.config.load import write_config
    from moesaic.config.train import TrainConfig
    from moesaic.data.shards import ShardSet
    from moesaic.model.transformer import Transformer

    folder = tmp_path_factory.mktemp("llama") / "run"
    folder.mkdir()
    model = {"vocab_size": 320, "hidden_size": 16, "num_layers": 2, "num_heads": 2, "intermediate_size": 24,
             "max_positions": 64, "init_std": 0.2}  # fmt: skip
    config = TrainConfig.from_dict(
        {"model": model, "data": {"path": str(tiny_data), "sequence_length": 32}, "tokens": 256}
    )
    write_config(config, folder / "config.yaml")
    ShardSet.open(tiny_data).load_tokenizer().save(folder)
    state = dict(Transformer(config.model).initialize(3).state_dict())
    save_checkpoint(folder, 3, model=state, optimizer={}, metadata={"tokens": 256})
    return folder


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    from moesaic.convert import parity

    monkeypatch.setattr(parity, "PROMPTS", parity.PROMPTS[:2])
    monkeypatch.setattr(parity, "_NEW_TOKENS", 2)


@pytest.fixture(scope="module")
def folder(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from moesaic.convert.exporter import export_run

    out = tmp_path_factory.mktemp("llama") / "folder"
    export_run(run, out)
    return out


@pytest.mark.usefixtures("short")
def test_out_and_in_again_each_printing_its_certificate(cli: Any, run: Path, tmp_path: Path) -> None:
    out = cli("convert", "export", run, tmp_path / "out", "--json")
    values = json.loads(out.out)
    assert out.status == 0 and values["failure"] is None and values["family"] == "llama"
    assert values == json.loads((tmp_path / "out" / "parity.json").read_text())
    back = cli("convert", "import", tmp_path / "out", tmp_path / "back", "--json")
    values = json.loads(back.out)
    assert back.status == 0 and values["tensors"]["used"] == values["tensors"]["source"] == 20
    assert values["comparison"]["max_absolute"] < 1e-4 and values["judge"] == "transformers"
    assert values["result"] == str(tmp_path / "back")
    said = [
        json.loads(cli("generate", each, "-p", "The", "--temperature", "0", "--max-new-tokens", "9", "--json").out)
        for each in (run, tmp_path / "back")
    ]
    assert len(said[0]["token_ids"]) == 9 and said[0] == said[1]


@pytest.mark.usefixtures("short")
def test_for_people_it_says_what_was_found_and_where_it_is(cli: Any, run: Path, tmp_path: Path) -> None:
    shown = cli("convert", "export", run, tmp_path / "out", "--format", "gguf", "--dtype", "bf16")
    assert shown.status == 0 and f"Written to {tmp_path / 'out'}, as gguf llama." in shown.out
    words = " ".join(shown.out.split())
    for text in ("20 of 20 used", "logits in fp32", "by transformers", "likeliest token", "same for 3 of 3 prompts"):
        assert text in words, text
    shown = cli("convert", "import", tmp_path / "out" / "model.gguf", tmp_path / "back")
    assert shown.status == 0 and f"Next: moesaic generate {tmp_path / 'back'} --prompt" in shown.out
    assert "Traceback" not in shown.err


@pytest.mark.usefixtures("short")
def test_what_is_left_out_is_told_once_for_each_reason(cli: Any, folder: Path, tmp_path: Path) -> None:
    source = shutil.copytree(folder, tmp_path / "source")
    file = source / "model.safetensors"
    computed = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.ones(4) for layer in range(3)}
    save_file(load_file(file) | computed, file)
    out = cli("convert", "import", source, tmp_path / "run")
    assert out.status == 0
    due = "left out 3, computed from the config: model.layers.0.self_attn.rotary_emb.inv_freq, model.layers.1"
    assert due in " ".join(out.out.split()) and "layers.2" not in out.out


@pytest.mark.usefixtures("short")
def test_a_model_that_only_our_classes_describe_is_loaded_by_the_lines_that_are_printed(
    cli: Any, trained_run: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out [1]"
    shown = cli("convert", "export", trained_run, out)
    assert shown.status == 0 and f"Written to {out}, as moesaic. In Python:" in shown.out
    code = "\n".join(line.strip() for line in shown.out.splitlines()[-2:])
    assert code.startswith("from moesaic.hf import")
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["model"].config.model_type == "moesaic"


@pytest.mark.usefixtures("short")
def test_what_is_in_brackets_is_printed(cli: Any, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    shown = cli("convert", "export", run, tmp_path / "out [1]")
    assert shown.status == 0 and f"Written to {tmp_path / 'out [1]'}, as llama." in shown.out
    assert "pip install 'moesaic[huggingface]'" in " ".join(shown.out.split())


@pytest.mark.usefixtures("short")
def test_verify_says_by_its_exit_status_whether_two_are_the_same(
    cli: Any, run: Path, folder: Path, tmp_path: Path
) -> None:
    same = cli("convert", "verify", run, folder)
    assert same.status == 0 and "They compute the same." in same.out
    other = shutil.copytree(folder, tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"] += torch.linspace(0, 1, 16)
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    differs = cli("convert", "verify", run, other)
    assert differs.status == 1 and "They differ: 1 of 20 tensors differ by more than rounding" in differs.out
    assert "19 equal bit by bit" in differs.out
    values = json.loads(cli("convert", "verify", run, other, "--json").out)
    assert values["weights"]["different"] == ["final_norm.weight"] and "rounding" in values["failure"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["import", "{folder}/nothing", "{new}"], "ConversionError: {folder}/nothing has no config.json; a folder in"),
        (["import", "{folder}/config.json", "{new}"], "ConversionError: {folder}/config.json is a file; a folder in"),
        (["import", "{run}", "{new}"], "ConversionError: {run} has no config.json; a folder in Hugging Face's layout"),
        (["import", "{folder}", "{run}"], "ConfigError: {run} exists; what is converted needs a folder of its own"),
        (["import", "{folder}", "{folder}/run"], "ConfigError: {folder}/run is inside {folder}, which is only read"),
        (["import", "{folder}", "{new}", "--tokenizer", "{folder}/config.json"], "DataError: {folder}/config.json: "),
        (["import", "{broken}", "{new}"], "CheckpointError: {broken}/model.safetensors cannot be read"),
        (["export", "{folder}", "{new}"], "CheckpointError: {folder} is a model in Hugging Face's layout; a run is"),
        (["export", "{run}@9", "{new}"], "CheckpointError: {run} has no checkpoint of step 9; it has 3; name one of"),
        (["export", "{run}", "{new}", "--format", "onnx"], "ConfigError: format ('onnx') is not known; one of hugg"),
        (["export", "{run}", "{new}", "--dtype", "int8"], "ConfigError: dtype ('int8') is not known; one of fp32"),
        (["export", "{run}", "{folder}"], "ConfigError: {folder} exists; what is converted needs a folder of its own"),
        (["verify", "{run}", "{folder}/nothing"], "CheckpointError: {folder}/nothing does not exist; a run"),
        (["verify", "{broken}", "{run}"], "CheckpointError: {broken}/model.safetensors cannot be read"),
    ],
)
def test_mistakes_are_named_in_three_parts_and_leave_nothing(
    arguments: list[str], message: str, cli: Any, run: Path, folder: Path, tmp_path: Path
) -> None:
    broken = shutil.copytree(folder, tmp_path / "broken")
    (broken / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-9])
    names = {"run": run, "folder": folder, "broken": broken, "new": tmp_path / "deep" / "new"}
    before = sorted(tmp_path.rglob("*")), sorted(run.rglob("*")), sorted(folder.rglob("*"))
    for options in ([], ["--json"]):
        result = cli("convert", *(each.format(**names) for each in arguments), *options)
        assert result.status == 2 and result.out == ""
        error = result.err[result.err.index(message.format(**names).partition(":")[0]) :]
        assert error.startswith(message.format(**names)) and error.count(";") >= 2, error
        assert "Traceback" not in result.err
    assert (sorted(tmp_path.rglob("*")), sorted(run.rglob("*")), sorted(folder.rglob("*"))) == before


@pytest.mark.parametrize(
    ("verb", "needs"),
    [
        ("import", ("config.json, safetensors", ".gguf", "RUN", "--tokenizer", "--force", "--json", "parity.json",
                    "moesaic[gguf]", "moesaic[huggingface]", "moesaic convert import downloads/Qwen3-0.6B")),
        ("export", ("RUN", "PATH", "huggingface, or gguf", "fp32, bf16 or fp16", "--force", "--json", "moesaic.hf",
                    "moesaic convert export runs/first exported")),
        ("verify", ("A run, a Hugging Face folder or a .gguf", "exit status is 1", "--json", "moesaic convert verify")),
    ],
)  # fmt: skip
def test_help_says_what_is_needed(verb: str, needs: tuple[str, ...], cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERMINAL_WIDTH", "200")
    result = cli("convert", verb, "--help")
    assert result.status == 0
    shown = " ".join(result.out.replace("│", " ").split())
    assert all(need in shown for need in needs), [need for need in needs if need not in shown]
