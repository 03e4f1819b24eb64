"""MXFP4 is read as the bf16 numbers that it stands for, every one, and what is no such checkpoint is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moesaic.checkpoint.quantized import describe_quantization, take_quantized
from moesaic.checkpoint.store import load_tensors, resolve_checkpoint
from moesaic.convert.exporter import export_run
from moesaic.convert.importer import import_model
from moesaic.convert.opened import open_model
from moesaic.convert.parity import verify_models
from moesaic.convert.quantize import quantize_run
from moesaic.convert.source import CONFIG_NAME, INDEX_NAME, WEIGHTS_NAME
from moesaic.errors import ConversionError
from moesaic.kernels.mxfp4 import dequantize
from moesaic.kernels.quantized import dequantize as dequantize_weight
from moesaic.model.generate import generate
from moesaic.model.load import load_run
from moesaic.model.transformer import Transformer

pytestmark = pytest.mark.usefixtures("short_check")

PUBLISHED = {
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
    "quant_method": "mxfp4",
}
STACK = "model.layers.1.mlp.experts.down_proj"
BLOCKS, SCALES = f"{STACK}_blocks", f"{STACK}_scales"


@pytest.fixture(scope="module")
def published(saved: Callable[..., Path], short_check: None) -> Path:
    """A small gpt-oss as OpenAI publishes them, with random bits, in two files, a pair of them apart."""
    folder = saved("gpt-oss", hidden_size=64, intermediate_size=32)
    generator, packed = torch.Generator().manual_seed(9), dict[str, Tensor]()
    for name, tensor in load_file(folder / WEIGHTS_NAME).items():
        if not name.endswith(("gate_up_proj", "down_proj")):
            packed[name] = tensor.bfloat16()
            continue
        count, inner, outer = tensor.shape
        shape = (count, outer, inner // 32)
        packed[f"{name}_blocks"] = torch.randint(256, (*shape, 16), dtype=torch.uint8, generator=generator)
        packed[f"{name}_scales"] = torch.randint(122, 127, shape, dtype=torch.uint8, generator=generator)
    first = {name: tensor for name, tensor in packed.items() if name != SCALES}
    save_file(first, folder / "model-00001-of-00002.safetensors")
    save_file({SCALES: packed[SCALES]}, folder / "model-00002-of-00002.safetensors")
    places = {name: f"model-0000{1 if name in first else 2}-of-00002.safetensors" for name in packed}
    (folder / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    (folder / WEIGHTS_NAME).unlink()
    config = json.loads((folder / CONFIG_NAME).read_text())
    (folder / CONFIG_NAME).write_text(json.dumps({**config, "quantization_config": PUBLISHED}))
    return folder


def packed_tensors(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.fixture
def theirs() -> Callable[[Tensor, Tensor], Tensor]:
    """transformers' own conversion: (blocks, scales) to (E, 32 G, N)."""
    module = pytest.importorskip("transformers.integrations.mxfp4")
    return module.convert_moe_packed_tensors  # type: ignore[no-any-return]


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.int16)


def test_every_number_with_every_scale_is_transformers_own(theirs: Callable[[Tensor, Tensor], Tensor]) -> None:
    """To the sign of zero, and below bf16's smallest ordinary number."""
    scales = torch.arange(253, dtype=torch.uint8)[None, :, None].expand(1, 253, 16).contiguous()
    blocks = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 253, 16, 16).contiguous()
    ours = dequantize(blocks, scales)
    assert ours.shape == (1, 253, 512) and ours.dtype is torch.bfloat16
    assert torch.equal(bits(ours.mT), bits(theirs(blocks, scales)))
    assert ours[0, 127, :4].tolist() == [0.0, 0.0, 0.5, 0.0]  # bytes 0x00 and 0x01: the low bits come first
    assert ours[0, 0, 2] == 2.0**-128 and ours.isfinite().all()


def test_a_published_model_becomes_the_bf16_one(
    published: Path, theirs: Callable[[Tensor, Tensor], Tensor], tmp_path: Path
) -> None:
    """Whole, expert by expert, and out again; transformers, with its own conversion, is the judge of all of it."""
    imported = import_model(published, tmp_path / "run")
    assert imported.failure is None and imported.judge == "transformers" and imported.not_compared is None
    assert imported.comparison is not None and imported.comparison.max_relative < 1e-4
    assert imported.comparison.routing_agreement == (1.0,) * 3
    assert imported.tensors is not None and imported.tensors.used == imported.tensors.source
    packed = packed_tensors(published)
    plain = {name: tensor for name, tensor in packed.items() if not name.endswith(("_blocks", "_scales"))}
    for name in packed:
        if name.endswith("_blocks"):
            stack = name.removesuffix("_blocks")
            plain[stack] = theirs(packed[name], packed[f"{stack}_scales"])
    run = load_tensors(resolve_checkpoint(tmp_path / "run"), "model")
    gate_up = plain["model.layers.1.mlp.experts.gate_up_proj"].mT
    ours = run["blocks.1.feed_forward.moe.experts.gate_up_proj"]
    assert torch.equal(bits(ours), bits(torch.cat([gate_up[:, ::2], gate_up[:, 1::2]], 1)))
    assert {tensor.dtype for tensor in run.values()} == {torch.bfloat16}
    with open_model(published) as opened:
        assert torch.equal(opened.source.read(STACK), plain[STACK])
        assert all(torch.equal(opened.source.read(STACK, expert), plain[STACK][expert]) for expert in range(5))

    written = export_run(tmp_path / "run", tmp_path / "out")
    assert written.failure is None and written.family == "gpt_oss"
    exported = load_file(tmp_path / "out" / WEIGHTS_NAME)
    assert exported.keys() == plain.keys()
    assert all(torch.equal(bits(exported[name]), bits(tensor)) for name, tensor in plain.items())
    config = json.loads((tmp_path / "out" / CONFIG_NAME).read_text())
    assert "quantization_config" not in config and config["torch_dtype"] == "bfloat16"
    for other in (tmp_path / "run", tmp_path / "out"):
        found = verify_models(published, other)
        assert found.failure is None and found.weights is not None and found.weights.equal == len(plain)


def test_ends_and_chat_template_come_along(published: Path, tmp_path: Path) -> None:
    """gpt-oss ends a text in three ways, which generation_config.json lists and config.json does not."""
    folder = shutil.copytree(published, tmp_path / "model")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 3, 5], "pad_token_id": 7}))
    import_model(folder, tmp_path / "run")
    export_run(tmp_path / "run", tmp_path / "out")
    assert json.loads((tmp_path / "out" / CONFIG_NAME).read_text())["eos_token_id"] == [0, 3, 5, 7]
    for name in ("generation_config.json", "chat_template.jinja", "tokenizer.json"):
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()


def test_an_experts_matrix_is_read_by_itself(published: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Neither way is a stack of experts in memory."""
    from moesaic.checkpoint.stream import TensorReader

    largest, real = [0], TensorReader._read

    def read(self: TensorReader, *arguments: Any) -> Tensor:
        tensor = real(self, *arguments)
        if self.path.parent != published or tensor.dtype is torch.uint8:
            largest[0] = max(largest[0], tensor.numel())
        return tensor

    monkeypatch.setattr(TensorReader, "_read", read)
    monkeypatch.setattr("moesaic.convert.parity.available_memory_bytes", lambda: 0)
    import_model(published, tmp_path / "run")
    assert largest[0] == 64 * 64 // 2  # bytes of an expert's gate_up_proj
    export_run(tmp_path / "run", tmp_path / "out")
    assert largest[0] == 301 * 64  # the embedding


@pytest.mark.parametrize("is_calibrated", [False, True])
def test_quantised_to_it_the_experts_are_what_was_published(
    published: Path, tmp_path: Path, is_calibrated: bool
) -> None:
    """And the model computes with them: as the run in bf16 does, but for activations of 8 or 9 bits."""
    run, out, text = tmp_path / "run", tmp_path / "out", tmp_path / "text.txt"
    import_model(published, run)
    text.write_text("The quick brown fox jumps over the lazy dog, and back again. " * 20)
    report = quantize_run(
        run, out, experts="mxfp4", rest="bf16", text=text, calibrate=text if is_calibrated else "none",
        calibration_tokens=256 if is_calibrated else None, limit_tokens=200, force=True,
    )  # fmt: skip
    assert report.experts == "mxfp4" and {kind.format for kind in report.kinds} >= {"mxfp4", "bf16"}
    info = resolve_checkpoint(out)
    assert describe_quantization(info) == "experts mxfp4, rest bf16"
    source, tensors = load_tensors(resolve_checkpoint(run), "model"), load_tensors(info, "model")
    quantized = take_quantized(tensors, info)
    assert len(quantized) == 6
    for name, weight in quantized.items():
        assert weight.is_mxfp4 and torch.equal(dequantize_weight(weight), source[name].float()), name
    loaded = load_run(out, device="cpu")
    plain = Transformer(loaded.config.model)
    plain.load_state_dict({name: tensor.float() for name, tensor in source.items()})
    tokens = torch.randint(loaded.config.model.vocab_size, (2, 24), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = plain.eval().logits(plain(tokens).hidden)
        found = loaded.model.logits(loaded.model(tokens).hidden)
        in_bf16 = load_run(run, device="cpu").model
        rounded = in_bf16.logits(in_bf16(tokens).hidden)
    error, of_bf16 = ((each - expected).norm() / expected.norm() for each in (found, rounded))
    assert error < 2 * of_bf16 + 0.01, (error, of_bf16)
    assert report.kl < 1e-2 and abs(report.perplexity_ratio - 1) < 2e-2
    text_ids = generate(loaded.model, [5, 6, 7], max_new_tokens=8)
    with torch.no_grad():
        logits = loaded.model.logits(loaded.model(torch.tensor([[5, 6, 7, *text_ids]])).hidden)[0, 2:-1]
    # The likeliest ones. With a cache attention rounds otherwise, so that of two that are as likely as each other, to
    # bf16, either may come first: which does depends on the machine.
    behind = logits.amax(-1) - logits[torch.arange(len(text_ids)), text_ids]
    assert len(text_ids) == 8 and behind.max() < of_bf16 * expected.std(), (behind, of_bf16, expected.std())


def drop_scales(tensors: dict[str, Tensor]) -> None:
    del tensors[SCALES]


def drop_blocks(tensors: dict[str, Tensor]) -> None:
    del tensors[BLOCKS]


def drop_both(tensors: dict[str, Tensor]) -> None:
    drop_scales(tensors)
    drop_blocks(tensors)


def shorten_scales(tensors: dict[str, Tensor]) -> None:
    tensors[SCALES] = tensors[SCALES][:, :-1].contiguous()


def make_floats_of_scales(tensors: dict[str, Tensor]) -> None:
    tensors[SCALES] = tensors[SCALES].float()


def halve_blocks(tensors: dict[str, Tensor]) -> None:
    tensors[BLOCKS] = tensors[BLOCKS][..., :8].contiguous()


def flatten_blocks(tensors: dict[str, Tensor]) -> None:
    tensors[BLOCKS], tensors[SCALES] = tensors[BLOCKS].flatten(0, 1), tensors[SCALES].flatten(0, 1)


def add_what_they_stand_for(tensors: dict[str, Tensor]) -> None:
    tensors[STACK] = torch.zeros(5, 32, 64, dtype=torch.bfloat16)


def drop_a_block(tensors: dict[str, Tensor]) -> None:
    tensors[BLOCKS], tensors[SCALES] = tensors[BLOCKS][:, :-1].contiguous(), tensors[SCALES][:, :-1].contiguous()


def name_no_number(tensors: dict[str, Tensor]) -> None:
    tensors[SCALES][3, 5, 0] = 255


def name_a_number_too_large(tensors: dict[str, Tensor]) -> None:
    tensors[SCALES][0, 0, 0] = 253


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop_scales, r"down_proj_scales is missing, .*; uint8 blocks \(E, N, G, 16\) and scales .* are required"),
        (drop_blocks, r"missing 1: model.layers.1.mlp.experts.down_proj; not used .* 1: .*down_proj_scales"),
        (drop_both, r"missing 1: model.layers.1.mlp.experts.down_proj;"),
        (shorten_scales, r"down_proj_blocks is uint8 \[5, 64, 1, 16\], .*down_proj_scales is uint8 \[5, 63, 1\]"),
        (make_floats_of_scales, r"down_proj_scales is float32"),
        (halve_blocks, r"down_proj_blocks is uint8 \[5, 64, 1, 8\]"),
        (flatten_blocks, r"down_proj_blocks is uint8 \[320, 1, 16\]"),
        (add_what_they_stand_for, r"down_proj is bfloat16 \[5, 32, 64\]; uint8 blocks .* nothing beside them"),
        (drop_a_block, r"down_proj is \[5, 32, 63\], \[5, 32, 64\] is required"),
        (name_no_number, r"down_proj holds a scale of 255; at most 252 is required"),
        (name_a_number_too_large, r"down_proj holds a scale of 253"),
    ],
)
def test_what_is_no_such_checkpoint_is_refused(
    published: Path, tmp_path: Path, refuses: Callable[..., None], change: Callable[[dict[str, Tensor]], None],
    message: str,
) -> None:  # fmt: skip
    folder, tensors = shutil.copytree(published, tmp_path / "model"), packed_tensors(published)
    for file in (*folder.glob("*.safetensors"), folder / INDEX_NAME):
        file.unlink()
    save_file(tensors, folder / WEIGHTS_NAME)
    refuses(folder, change, message)


def test_blocks_that_the_config_does_not_speak_of_are_refused(published: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(published, tmp_path / "model")
    config = json.loads((folder / CONFIG_NAME).read_text())
    del config["quantization_config"]
    (folder / CONFIG_NAME).write_text(json.dumps(config))
    with pytest.raises(ConversionError, match=r"not used by any part 12: .*_blocks"):
        open_model(folder)


def test_another_familys_matrices_are_not_said_to_be_in_it(families: ModuleType, saved: Callable[..., Path]) -> None:
    folder = saved("llama")
    config = json.loads((folder / CONFIG_NAME).read_text())
    (folder / CONFIG_NAME).write_text(json.dumps({**config, "quantization_config": PUBLISHED}))
    with pytest.raises(ConversionError, match=r"is said to be quantised \(mxfp4\) and holds no tensor blocks; both or"):
        open_model(folder)
