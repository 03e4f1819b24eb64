import errno
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from moesaic.checkpoint.quantized import (
    SCALES,
    STEPS,
    VALUES,
    describe_quantization,
    is_quantized,
    quantization_schemes,
    take_quantized,
)
from moesaic.checkpoint.store import load_tensors, resolve_checkpoint, save_checkpoint
from moesaic.convert.folder import folder_in_progress
from moesaic.convert.quantize import (
    REPORT_NAME,
    QuantizationReport,
    calibration_batches,
    kind_of,
    quantize_run,
    resolve_calibration,
)
from moesaic.data.shards import ShardSet
from moesaic.data.tokenizer import Tokenizer
from moesaic.errors import CheckpointError, ConfigError, ConversionError, DataError, FolderInUseError
from moesaic.evaluate.perplexity import compare, measure_perplexity, record_reference, text_windows
from moesaic.evaluate.text import read_documents
from moesaic.kernels.quantized import QuantizedWeight, dequantize, quantize_to_mxfp4, quantize_weight
from moesaic.model.generate import generate
from moesaic.model.load import copy_weights, load_run, load_run_config
from moesaic.model.transformer import Transformer

FORMATS = [("int8", "int8"), ("int4", "int8"), ("int4", "int4"), ("int8", "bf16"), ("int8", "int4"), ("mxfp4", "int8")]


def quantize(run: Path, output: Path, **options: Any) -> QuantizationReport:
    """To the nearest, unless the options say otherwise."""
    values: dict[str, Any] = {"limit_tokens": 200, "force": True, "calibrate": "none", **options}
    if "int4" in (values.get("experts"), values.get("rest")):
        values.setdefault("group_size", 32)
    return quantize_run(run, output, **values)


def stored(run: Path) -> tuple[dict[str, torch.Tensor], dict[str, QuantizedWeight]]:
    info = resolve_checkpoint(run)
    tensors = load_tensors(info, "model")
    return tensors, take_quantized(tensors, info)


@pytest.mark.parametrize(("experts", "rest"), FORMATS)
@pytest.mark.parametrize("model", ["moe", "pr-moe", "latent"])
def test_every_tensor_is_rounded_to_nearest_or_kept(
    make_run: Any, tmp_path: Path, model: str, experts: str, rest: str
) -> None:
    run, out = make_run(model), tmp_path / "out"
    quantize(run, out, experts=experts, rest=rest)
    source = load_tensors(resolve_checkpoint(run), "model")
    kept, quantized = stored(out)
    assert kept.keys() | quantized.keys() == source.keys() and not kept.keys() & quantized.keys()
    for name, tensor in source.items():
        kind = kind_of(name, is_tied=True)
        format_ = {"experts": experts, "attention": rest, "mlp": rest, "output": rest}.get(kind)
        if format_ in ("int8", "int4", "mxfp4"):
            bits = 8 if format_ == "int8" else 4
            expected = (
                quantize_to_mxfp4(tensor)
                if format_ == "mxfp4"
                else quantize_weight(tensor, bits=bits, group_size=32 if bits == 4 else None)
            )
            assert (quantized[name].bits, quantized[name].group_size) == (expected.bits, expected.group_size), name
            assert torch.equal(quantized[name].values, expected.values), name
            assert torch.equal(quantized[name].scales, expected.scales), name
            steps = quantized[name].steps
            assert (steps is None) == (expected.steps is None), name
            assert steps is None or (expected.steps is not None and torch.equal(steps, expected.steps)), name
        elif format_ == "bf16":
            assert torch.equal(kept[name], tensor.bfloat16()), name
        else:
            assert torch.equal(kept[name], tensor) and kept[name].dtype == torch.float32, name
    assert any(kind_of(name, is_tied=True) == "other" for name in kept)


def test_the_folder_is_a_run(make_run: Any, tmp_path: Path) -> None:
    run, out = make_run("pr-moe"), tmp_path / "deep" / "out"
    quantize(run, out, experts="int4", rest="int8")
    assert sorted(path.name for path in out.iterdir()) == sorted(
        ["checkpoints", "config.yaml", REPORT_NAME, "tokenizer.json", "tokenizer_config.json"]
    )
    assert load_run_config(out) == load_run_config(run)
    assert Tokenizer.load(out).fingerprint == Tokenizer.load(run).fingerprint
    info = resolve_checkpoint(out)
    assert info.step == 7 and list(info.files) == ["model.safetensors"]
    assert is_quantized(info) and not is_quantized(resolve_checkpoint(run))
    assert describe_quantization(info) == "experts int4, rest int8"
    assert [path.name for path in out.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("model", ["dense", "moe", "pr-moe", "latent"])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_the_model_computes_with_the_rounded_weights(make_run: Any, tmp_path: Path, model: str, precision: str) -> None:
    run, out = make_run(model, precision=precision), tmp_path / "out"
    quantize(
        run, out, rest="int8", experts=None if model == "dense" else "int4", group_size=None if model == "dense" else 32
    )
    loaded = load_run(out, device="cpu")
    kept, quantized = stored(out)
    plain = Transformer(loaded.config.model)
    plain.load_state_dict({**kept, **{name: dequantize(each) for name, each in quantized.items()}})
    # Tokens whose experts are not nearly level: the noise of 8 bits would choose others.
    tokens = torch.randint(300, (2, 24), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = plain.eval().logits(plain(tokens).hidden)
        found = loaded.model.logits(loaded.model(tokens).hidden)
        original = load_run(run, device="cpu").model
        before = original.logits(original(tokens).hidden)
    error = (found - expected).norm() / expected.norm()
    assert error < 0.05
    if model != "dense":  # int4 changes more than activations of 8 bits and bf16 do
        assert error < 0.7 * (found - before).norm() / before.norm()
    assert len(generate(loaded.model, [5, 6, 7], max_new_tokens=8)) == 8


def test_the_report_is_what_one_measures(make_run: Any, tmp_path: Path) -> None:
    run, out = make_run("pr-moe"), tmp_path / "out"
    report = quantize(run, out, experts="int4", rest="int8")
    before, after = load_run(run, device="cpu"), load_run(out, device="cpu")
    windows = text_windows(before, before.config.data.path, limit_tokens=200)
    reference = record_reference(before.model, windows, device=before.device)
    result = compare(after.model, reference, windows, device=after.device)
    assert report.reference == reference.perplexity
    assert report.quantized == result.perplexity == measure_perplexity(after.model, windows, device=after.device)
    assert (report.kl, report.top1_agreement) == (result.kl, result.top1_agreement)
    assert report.kl > 0 and report.quantized.num_tokens == 200
    assert json.loads((out / REPORT_NAME).read_text()) == json.loads(json.dumps(report.to_json()))
    values = report.to_json()
    assert values["perplexity_ratio"] == pytest.approx(report.quantized.perplexity / report.reference.perplexity)
    assert values["kinds"]["experts"]["format"] == "int4 by 32"


@pytest.mark.parametrize("model", ["dense", "pr-moe"])
def test_bytes_are_those_of_the_tensors(make_run: Any, tmp_path: Path, model: str) -> None:
    run, out = make_run(model), tmp_path / "out"
    report = quantize(run, out, rest="int4")
    source = load_file(resolve_checkpoint(run).path / "model.safetensors")
    now = load_file(resolve_checkpoint(out).path / "model.safetensors")
    assert sum(each.bytes_quantized for each in report.kinds) == sum(tensor.nbytes for tensor in now.values())
    assert sum(each.bytes_stored for each in report.kinds) == sum(tensor.nbytes for tensor in source.values())
    assert sum(each.parameters for each in report.kinds) == sum(tensor.numel() for tensor in source.values())
    by_kind = {each.kind: each for each in report.kinds}
    assert by_kind["attention"].bytes_bf16 == 2 * by_kind["attention"].parameters
    rows = sum(len(tensor) for name, tensor in source.items() if kind_of(name, is_tied=True) == "attention")
    assert by_kind["attention"].bytes_quantized == by_kind["attention"].parameters * (0.5 + 1 / 32) + 4 * rows
    assert by_kind["other"].bytes_quantized == by_kind["other"].bytes_bf16 == 4 * by_kind["other"].parameters
    if model == "dense":
        assert by_kind["embedding"].bytes_quantized == 2 * by_kind["embedding"].parameters


def test_calibration_loses_less_than_rounding_to_nearest(make_run: Any, tmp_path: Path, tiny_data: Path) -> None:
    run = make_run("pr-moe")
    nearest = quantize(run, tmp_path / "nearest", experts="int4", rest="int4")
    calibrated = quantize(
        run, tmp_path / "calibrated", experts="int4", rest="int4", calibrate=tiny_data, calibration_tokens=3000
    )
    assert calibrated.kl < 0.9 * nearest.kl
    assert calibrated.calibration == str(tiny_data) and 2000 < calibrated.calibration_tokens <= 3000
    assert calibrated.reference == nearest.reference and nearest.calibration is None


def test_it_is_the_same_every_time(make_run: Any, tmp_path: Path, tiny_data: Path) -> None:
    run = make_run("moe")
    reports = [
        quantize(run, tmp_path / name, experts="int4", rest="int4", calibrate=tiny_data, calibration_tokens=500)
        for name in ("a", "b")
    ]
    assert reports[0] == reports[1]
    files = [resolve_checkpoint(tmp_path / name).files for name in ("a", "b")]
    assert files[0] == files[1]


@pytest.mark.parametrize("limits", [{"max_kl": 1e-9}, {"max_perplexity_ratio": 0.5}])
def test_beyond_the_limits_it_is_refused_and_leaves_nothing(
    make_run: Any, tmp_path: Path, limits: dict[str, float]
) -> None:
    run, out = make_run("pr-moe"), tmp_path / "deep" / "out"
    with pytest.raises(ConversionError, match=r"times the run's \(.*; at most .* required; use more bits"):
        quantize(run, out, experts="int4", force=False, **limits)
    assert not out.parent.exists()
    report = quantize(run, out, experts="int4", force=True, **limits)
    assert out.is_dir() and report.kl > 0
    quantize(run, tmp_path / "allowed", experts="int4", force=False, max_kl=report.kl, max_perplexity_ratio=10)


@pytest.mark.parametrize("limits", [{"max_kl": float("nan")}, {"max_kl": -0.1}, {"max_perplexity_ratio": -1.0}])
def test_limits_that_no_run_keeps_are_refused_before_anything_is_done(
    make_run: Any, tmp_path: Path, limits: dict[str, float]
) -> None:
    stages: list[str] = []
    with pytest.raises(ConfigError, match=f"{next(iter(limits))} is .*0 or more is required"):
        quantize(make_run("moe"), tmp_path / "out", on_progress=lambda stage, _: stages.append(stage), **limits)
    assert not stages


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("no space left")])
@pytest.mark.parametrize("stage", ["quantising", "measuring the quantised run"])
def test_whatever_goes_wrong_leaves_nothing(make_run: Any, tmp_path: Path, error: Any, stage: str) -> None:
    run, out = make_run("moe"), tmp_path / "deep" / "out"

    def progress(name: str, share: float) -> None:
        if name == stage and (share or stage != "quantising"):
            raise error

    with pytest.raises(KeyboardInterrupt if error is KeyboardInterrupt else ConversionError):
        quantize(run, out, on_progress=progress)
    assert not out.parent.exists()


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("moe", {"experts": "int2"}, r"experts \('int2'\) is not known; one of int8, int4, mxfp4 is required"),
        ("moe", {"rest": "fp8"}, r"rest \('fp8'\) is not known; one of int4, int8, bf16"),
        ("dense", {"experts": "int8"}, r"experts \(int8\) is given for a dense model; .*; leave it out"),
        ("dense", {"rest": "bf16"}, r"rest \(bf16\) of a dense model quantises nothing"),
        ("moe", {"group_size": 64}, r"group_size \(64\) is given and nothing becomes int4; .*; leave it out"),
        ("moe", {"experts": "mxfp4", "group_size": 32}, r"nothing becomes int4; .* mxfp4 one for 32 columns; leave"),
        ("moe", {"rest": "mxfp4"}, r"rest \('mxfp4'\) is not known; one of int4, int8, bf16"),
        ("moe", {"experts": "int4", "group_size": 16}, r"group_size \(16\) is not one of 32, 64 and 128; .*; use 64"),
        ("moe", {"experts": "int4", "group_size": 64}, r"does not divide the 96 columns of .*; .*size 32, or int8"),
        ("moe", {"calibration_tokens": 100}, r"calibration_tokens \(100\) is given without a calibration text"),
    ],
)  # fmt: skip
def test_a_request_that_cannot_be_met_is_refused(
    make_run: Any, tmp_path: Path, model: str, options: dict[str, Any], message: str
) -> None:
    run = make_run(model)
    with pytest.raises(ConfigError, match=message):
        quantize(run, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_columns_that_no_group_divides_can_only_be_int8(make_run: Any, tmp_path: Path) -> None:
    run = make_run("dense", model={**yaml.safe_load((make_run("moe") / "config.yaml").read_text())["model"],
                                   "moe": None, "intermediate_size": 40})  # fmt: skip
    with pytest.raises(ConfigError, match=r"does not divide the 40 columns .*; use int8\."):
        quantize(run, tmp_path / "out", rest="int4")
    quantize(run, tmp_path / "out", rest="int8")


def test_folders_and_runs_that_cannot_be_used_are_refused(make_run: Any, tmp_path: Path) -> None:
    run, out = make_run("moe"), tmp_path / "out"
    quantize(run, out)
    with pytest.raises(ConfigError, match=r"out exists; .*; name another"):
        quantize(run, out)
    with pytest.raises(ConfigError, match=r"is inside .*; name one outside"):
        quantize(run, run / "checkpoints" / "step-00000030")
    with pytest.raises(ConfigError, match=r"is quantised \(.*\); .*; give the run .*run-moe"):
        quantize(out, tmp_path / "twice")
    with pytest.raises(CheckpointError, match=r"quantised .* unpacked; .*; load the run .*run-moe"):
        load_run(out, pack=False)
    with pytest.raises(CheckpointError, match="does not exist"):
        quantize(tmp_path / "absent", tmp_path / "never")


def test_a_text_must_be_there(make_run: Any, tmp_path: Path, tiny_data: Path) -> None:
    run = make_run("moe", data={"path": "moved-away", "sequence_length": 32})
    with pytest.raises(DataError, match=r"moved-away\) is not there; .*; name one with --text"):
        quantize(run, tmp_path / "out")
    (tmp_path / "text.txt").write_text("The Licensor shall not be liable. " * 30)
    report = quantize(run, tmp_path / "out", text=tmp_path / "text.txt")
    assert report.text.endswith("text.txt")
    assert resolve_calibration(None, load_run_config(run), has_4_bits=True) is None


def test_a_run_without_data_has_no_text_of_its_own(
    make_run: Any, tmp_path: Path, tiny_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is a manifest.json of the current folder one."""
    run = make_run("moe", data={"path": "", "sequence_length": 32})
    monkeypatch.chdir(tiny_data)
    assert resolve_calibration(None, load_run_config(run), has_4_bits=True) is None
    with pytest.raises(DataError, match=r"no text is given and the run has no data of its own; .*; name one with --t"):
        quantize(run, tmp_path / "out")


def test_the_checkpoint_that_is_quantised_is_the_one_that_is_measured(
    make_run: Any, tmp_path: Path, tiny_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, measured = make_run("moe"), []

    def load(path: Any, **options: Any) -> Any:
        measured.append(str(path))
        return load_run(path, **options)

    monkeypatch.setattr("moesaic.convert.quantize.load_run", load)
    quantize_run(run, tmp_path / "out", limit_tokens=100, force=True)
    assert measured[0] == f"{run}@{resolve_checkpoint(run).step}"


def test_no_calibration_tokens_are_not_the_usual_number_of_them(make_run: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"calibration_tokens \(0\) is less than a sequence"):
        quantize_run(make_run("moe"), tmp_path / "out", experts="int4", group_size=32, calibration_tokens=0)


def test_which_text_calibrates(make_run: Any, tiny_data: Path) -> None:
    run = make_run("moe")
    assert resolve_calibration(None, load_run_config(run), has_4_bits=True) == str(tiny_data)
    assert resolve_calibration(None, load_run_config(run), has_4_bits=False) is None
    assert resolve_calibration("none", load_run_config(run), has_4_bits=True) is None
    assert resolve_calibration("a.txt", load_run_config(run), has_4_bits=False) == "a.txt"


def test_the_function_calibrates_as_the_command_does(make_run: Any, tmp_path: Path, tiny_data: Path) -> None:
    run, options = make_run("moe"), {"limit_tokens": 100, "force": True}
    report = quantize_run(run, tmp_path / "int4", experts="int4", group_size=32, calibration_tokens=320, **options)
    assert (report.calibration, report.calibration_tokens) == (str(tiny_data), 320)
    assert quantize_run(run, tmp_path / "int8", **options).calibration is None
    nearest = quantize_run(run, tmp_path / "nearest", experts="int4", group_size=32, calibrate="none", **options)
    assert (nearest.calibration, nearest.calibration_tokens) == (None, 0)


def test_calibration_is_spread_over_the_whole_text(make_run: Any, tmp_path: Path, tiny_data: Path) -> None:
    config = load_run_config(make_run("moe"))
    tokenizer = ShardSet.open(tiny_data).load_tokenizer()
    shards = torch.cat(calibration_batches(tiny_data, tokenizer, config, num_tokens=1000))
    assert shards.shape == (31, 32) and len(set(map(tuple, shards.tolist()))) == 31
    (tmp_path / "text.txt").write_text((tiny_data.parent / "text.jsonl").read_text(), encoding="utf-8")
    (document,) = read_documents(tmp_path / "text.txt", tokenizer)
    text = torch.cat(calibration_batches(tmp_path / "text.txt", tokenizer, config, num_tokens=320))
    ids = [tokenizer.end_of_text_id, *document.ids.tolist()]
    every = [ids[start : start + 32] for start in range(0, len(ids) - 31, 32)]
    places = [every.index(row) for row in text.tolist()]
    assert len(places) == 10 and places[0] == 0 and places[-1] >= 0.85 * len(every) and places == sorted(places)
    with pytest.raises(ConfigError, match=r"calibration_tokens \(31\) is less than a sequence of 32"):
        calibration_batches(tiny_data, tokenizer, config, num_tokens=31)
    (tmp_path / "short.txt").write_text("Too short.")
    with pytest.raises(DataError, match=r"holds \d+ tokens; .*; name a longer text"):
        calibration_batches(tmp_path / "short.txt", tokenizer, config, num_tokens=320)


def test_texts_are_in_the_field_that_is_named(make_run: Any, tmp_path: Path, tiny_data: Path) -> None:
    run, text = make_run("moe"), "The Licensor shall not be liable. " * 30
    (tmp_path / "text.txt").write_text(text)
    (tmp_path / "text.jsonl").write_text(json.dumps({"body": text}))
    options = {"experts": "int4", "rest": "int4", "calibration_tokens": 128}
    plain, named = tmp_path / "text.txt", tmp_path / "text.jsonl"
    expected = quantize(run, tmp_path / "a", text=plain, calibrate=plain, **options)
    found = quantize(run, tmp_path / "b", text=named, calibrate=named, text_field="body", **options)
    assert (found.reference, found.quantized, found.kl) == (expected.reference, expected.quantized, expected.kl)
    with pytest.raises(ConfigError, match=r"text_field \(body\) is given and no text .*; shards .*; name a text"):
        quantize(run, tmp_path / "c", calibrate=tiny_data, text_field="body", experts="int4")


def test_calibration_text_stands_behind_the_begin_token_where_the_tokenizer_puts_one(
    make_run: Any, tmp_path: Path, beginning_tokenizer: Tokenizer
) -> None:
    (tmp_path / "text.txt").write_text("The Licensor shall not be liable. " * 30)
    (first, *_) = calibration_batches(
        tmp_path / "text.txt", beginning_tokenizer, load_run_config(make_run("moe")), num_tokens=32
    )
    expected = beginning_tokenizer.encode_prompt((tmp_path / "text.txt").read_text(), add_special_tokens=True)
    assert first.tolist() == [expected[:32]]


@pytest.mark.parametrize("experts", ["int8", "int4", "mxfp4"])
def test_weights_stored_in_fp64_are_calibrated_as_the_same_numbers_in_fp32(
    make_run: Any, tmp_path: Path, tiny_data: Path, experts: str
) -> None:
    run = make_run("moe")
    state = load_tensors(resolve_checkpoint(run), "model")
    save_checkpoint(run, 8, model={name: tensor.double() for name, tensor in state.items()}, optimizer={}, metadata={})
    results = []
    for step in (7, 8):
        named, out = f"{run}@{step}", tmp_path / f"out-{step}"
        quantize(named, out, experts=experts, rest="int4", calibrate=tiny_data, calibration_tokens=320)  # type: ignore[arg-type]
        results.append(load_file(resolve_checkpoint(out).path / "model.safetensors"))
    for name in quantization_schemes(resolve_checkpoint(tmp_path / "out-7")):
        for part in (VALUES, SCALES):
            assert torch.equal(results[0][name + part], results[1][name + part]), name + part


@pytest.mark.parametrize("calibrate", [True, False])
def test_weights_that_are_not_finite_are_refused(
    make_run: Any, tmp_path: Path, tiny_data: Path, calibrate: bool
) -> None:
    run, out = make_run("moe"), tmp_path / "deep" / "out"
    info = resolve_checkpoint(run)
    state = load_tensors(info, "model")
    state["blocks.1.feed_forward.moe.experts.down_proj"][2, 3, 4] = float("inf")
    save_checkpoint(run, 8, model=state, optimizer={}, metadata={})
    with pytest.raises(CheckpointError, match=r"experts.down_proj holds numbers that are not finite; .*; use another"):
        quantize(f"{run}@8", out, experts="int4", calibrate=tiny_data if calibrate else "none")  # type: ignore[arg-type]
    assert not out.parent.exists()


def test_a_corrupt_source_or_result_is_found(make_run: Any, tmp_path: Path) -> None:
    run, out = make_run("moe"), tmp_path / "out"
    quantize(run, out)
    for folder, load in ((out, load_run), (run, lambda run: quantize(run, tmp_path / "never"))):
        path = resolve_checkpoint(folder).path / "model.safetensors"
        data = bytearray(path.read_bytes())
        data[-5] ^= 1
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match="SHA-256"):
            load(folder)
    assert not (tmp_path / "never").exists()


def test_what_is_rounded_is_what_was_checked(make_run: Any, tmp_path: Path) -> None:
    run, out = make_run("moe"), tmp_path / "out"
    file = resolve_checkpoint(run).path / "model.safetensors"

    def change(stage: str, share: float) -> None:
        if (stage, share) == ("quantising", 0.0):  # the run has been measured by then
            data = bytearray(file.read_bytes())
            data[-3] ^= 0x20
            file.write_bytes(data)

    with pytest.raises(CheckpointError, match=r"SHA-256|changed while it was read"):
        quantize(run, out, on_progress=change)
    assert list(tmp_path.glob("*out*")) == []


def test_a_manifest_that_names_what_is_not_there_is_found(make_run: Any, tmp_path: Path) -> None:
    run, out = make_run("moe"), tmp_path / "out"
    quantize(run, out)
    path = resolve_checkpoint(out).path / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["metadata"]["quantization"]["matrices"]["nothing"] = {"bits": 8, "group_size": None}
    path.write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"does not hold nothing as its manifest says .*; quantise the run again"):
        load_run(out)


@pytest.mark.parametrize("damage", [{"group_size": 0}, {"group_size": "64"}])
def test_a_manifest_with_groups_of_no_size_is_found(make_run: Any, tmp_path: Path, damage: dict[str, Any]) -> None:
    run, out = make_run("moe"), tmp_path / "out"
    quantize(run, out, experts="int4")
    path = resolve_checkpoint(out).path / "manifest.json"
    manifest = json.loads(path.read_text())
    for matrix in manifest["metadata"]["quantization"]["matrices"].values():
        matrix.update(damage)
    path.write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"does not say how its matrices are quantised \(.*group_size"):
        load_run(out)


@pytest.mark.parametrize("record", [None, "int8", {}])
def test_a_manifest_that_does_not_say_what_is_quantised_is_found(make_run: Any, tmp_path: Path, record: Any) -> None:
    run, out = make_run("moe"), tmp_path / "out"
    quantize(run, out)
    path = resolve_checkpoint(out).path / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["metadata"]["quantization"] = record
    path.write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="does not say how its matrices are quantised"):
        quantize(out, tmp_path / "again")


def test_what_cannot_be_written_is_found_before_anything_is_measured(make_run: Any, tmp_path: Path) -> None:
    run, stages = make_run("moe"), []
    with pytest.raises(ConversionError, match="could not be written"):
        quantize(run, Path("/proc/out"), on_progress=lambda stage, share: stages.append(stage))
    with (
        folder_in_progress(tmp_path / "out"),
        pytest.raises(FolderInUseError, match=rf"{re.escape(str(tmp_path / 'out'))} is being written by"),
    ):
        quantize(run, tmp_path / "out", on_progress=lambda stage, share: stages.append(stage))
    assert "measuring the run as it is" not in stages


def test_a_text_that_cannot_be_read_is_not_called_a_full_disk(
    make_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run("moe")

    def refuse(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("moesaic.convert.quantize.text_windows", refuse)
    error = OSError(errno.EACCES, "Permission denied", str(tmp_path / "text.txt"))
    with pytest.raises(ConversionError, match=r"what it is made of could not be read .*text.txt"):
        quantize(run, tmp_path / "out")
    error = OSError(errno.ENOMEM, "Cannot allocate memory")
    with pytest.raises(OSError, match="Cannot allocate memory"):
        quantize(run, tmp_path / "out")
    error = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(ConversionError, match="could not be written"):
        quantize(run, tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))


def test_ids_that_the_model_does_not_have_are_found(
    make_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run("moe")
    text = tmp_path / "text.txt"
    text.write_text("some text of a tokenizer that is larger than the model")
    monkeypatch.setattr("moesaic.evaluate.text.encode_text", lambda *_, **__: np.full(20, 10**6))
    with pytest.raises(DataError, match=r"has token id 1000000 by the run's tokenizer; ids from 0 to \d+ are required"):
        quantize(run, tmp_path / "out", text=text)
    with pytest.raises(DataError, match="an empty name is given for a text"):
        quantize(run, tmp_path / "out", text="")


@pytest.mark.parametrize("dtype", [torch.int32, torch.float8_e4m3fn, torch.float8_e8m0fnu])
def test_a_checkpoint_in_a_dtype_of_no_weights_is_found(make_run: Any, tmp_path: Path, dtype: torch.dtype) -> None:
    run = make_run("moe")
    info = resolve_checkpoint(run)
    odd = {name: tensor.to(dtype) for name, tensor in load_tensors(info, "model").items()}
    save_checkpoint(run, info.step + 1, model=odd, optimizer={}, metadata={})
    named = f"{run}@{info.step + 1}"
    with pytest.raises(CheckpointError, match="in a dtype that is none of weights"):
        load_run(named)
    model = Transformer(load_run_config(run).model)
    with pytest.raises(CheckpointError, match="in a dtype that is none of weights"):
        copy_weights(model, resolve_checkpoint(named))


def test_int4_without_its_steps_is_found(make_run: Any, tmp_path: Path) -> None:
    run, out = make_run("moe"), tmp_path / "out"
    quantize(run, out, experts="int4")
    info = resolve_checkpoint(out)
    tensors = load_tensors(info, "model")
    steps = sorted(name for name in tensors if name.endswith(STEPS))
    assert [name.removesuffix(STEPS) for name in steps] == sorted(
        name for name, scheme in quantization_schemes(info).items() if scheme.has_steps
    )
    changed = {name: tensor for name, tensor in tensors.items() if name != steps[0]}
    with pytest.raises(CheckpointError, match=rf"does not hold {steps[0].removesuffix(STEPS)} .*{steps[0]}"):
        take_quantized(changed, info)
    changed = tensors | {steps[0]: tensors[steps[0]].to(torch.int16)}
    with pytest.raises(CheckpointError, match=rf"does not hold {steps[0].removesuffix(STEPS)} "):
        take_quantized(changed, info)
    changed = tensors | {steps[0]: tensors[steps[0]].clone()}
    changed[steps[0]].view(-1)[-1] = -16
    with pytest.raises(CheckpointError, match=r"steps of -16 to 15"):
        take_quantized(changed, info)


@pytest.mark.parametrize("experts", ["int8", "int4", "mxfp4"])
def test_scales_that_no_matrix_has_are_refused(make_run: Any, tmp_path: Path, experts: str) -> None:
    run, out = make_run("moe"), tmp_path / "out"
    quantize(run, out, experts=experts)
    info = resolve_checkpoint(out)
    tensors = load_tensors(info, "model")
    take_quantized(dict(tensors), info)
    name = next(name for name in sorted(tensors) if name.endswith(SCALES) and "experts" in name)
    for bad in [253, 255] if experts == "mxfp4" else [math.nan, math.inf, -math.inf, -1e-3]:
        changed = tensors | {name: tensors[name].clone()}
        changed[name].view(-1)[-1] = bad
        with pytest.raises(CheckpointError, match=rf"{re.escape(name)} holds .*{bad:g}.* required; quantise the run"):
            take_quantized(changed, info)


@pytest.mark.parametrize("experts", ["int8", "int4", "mxfp4"])
@pytest.mark.parametrize("rest", ["int8", "int4", "bf16"])
def test_more_columns_than_integers_can_sum_are_refused(
    make_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, experts: str, rest: str
) -> None:
    monkeypatch.setattr("moesaic.convert.quantize.MAX_COLUMNS", 16)
    if (experts, rest) == ("mxfp4", "bf16"):
        return
    found = rf"sums of {rest} take at most 16; use bf16|sums of {experts} take at most 16; use mxfp4"
    with pytest.raises(ConfigError, match=found):
        quantize(make_run("moe"), tmp_path / "out", experts=experts, rest=rest)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("found", [None, 1, 2, 4])
def test_integers_of_another_format_are_refused(make_run: Any, tmp_path: Path, found: int | None) -> None:
    run, out = make_run("moe"), tmp_path / "out"
    quantize(run, out)
    path = resolve_checkpoint(out).path / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["metadata"]["quantization"]["format"]
    if found is not None:
        manifest["metadata"]["quantization"]["format"] = found
    path.write_text(json.dumps(manifest))
    message = rf"integers of format {found or 1}, .*; format 3 is required; quantise {run}"
    with pytest.raises(CheckpointError, match=message):
        load_run(out)


def test_a_matrix_beside_its_integers_is_found(make_run: Any, tmp_path: Path) -> None:
    run, out = make_run("moe"), tmp_path / "out"
    quantize(run, out)
    info = resolve_checkpoint(out)
    name = "blocks.0.attention.q_proj.weight"
    both = {**load_tensors(info, "model"), name: load_tensors(resolve_checkpoint(run), "model")[name]}
    save_checkpoint(out, info.step + 1, model=both, optimizer={}, metadata=dict(info.metadata))
    with pytest.raises(CheckpointError, match=rf"does not hold {name} as its manifest says .*{name} beside its integ"):
        load_run(f"{out}@{info.step + 1}")
