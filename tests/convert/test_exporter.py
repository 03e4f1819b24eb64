"""An exported model of ours is what transformers computes with, or is refused."""

import json
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from moesaic.checkpoint.store import load_tensors, resolve_checkpoint, save_checkpoint
from moesaic.convert import parity
from moesaic.convert.exporter import export_run
from moesaic.convert.importer import import_model
from moesaic.convert.parity import verify_models
from moesaic.errors import CheckpointError, ConfigError, ConversionError, InstallationError
from moesaic.model.load import load_run

MakeRun = Callable[..., Path]
TOKENS = torch.randint(301, (2, 67), generator=torch.Generator().manual_seed(3))
MODEL = {
    "vocab_size": 320, "hidden_size": 24, "num_layers": 3, "num_heads": 4, "num_kv_heads": 2, "intermediate_size": 20,
    "max_positions": 64, "init_std": 0.2,
}  # fmt: skip
MOE = {"num_experts": 5, "top_k": 2, "intermediate_size": 12}
SURE = {"renormalize": True}
AS_OSS: dict[str, Any] = {
    "attention_sinks": True, "mlp_bias": True, "activation": "swiglu_oai",
    "moe": {**MOE, "intermediate_size": 20, "router": {**SURE, "bias": True}},
}  # fmt: skip
# Name: the family that can describe the model, or our own classes, and the model.
OWN: dict[str, tuple[str, dict[str, Any]]] = {
    "dense": ("llama", MODEL),
    "dense, biases of queries, keys and values": ("qwen2", {**MODEL, "attention_bias": "qkv", "tie_embeddings": False}),
    "dense, sliding": ("mistral", {**MODEL, "sliding_window": 5}),
    "dense, sliding in all but one layer, such biases": (
        "qwen2",
        {**MODEL, "attention_bias": "qkv", "sliding_window": 5, "sliding_layers": [0, 2]},
    ),
    "dense, sliding in some layers, no biases": (
        "smollm3",
        {**MODEL, "sliding_window": 5, "sliding_layers": [0, 2]},
    ),
    "dense, norms behind, normed heads": (
        "exaone4",
        {**MODEL, "norm_place": "behind", "qk_norm": "head", "sliding_window": 5, "sliding_layers": [2],
         "rope_layers": [2]},
    ),
    "dense, norms behind": ("moesaic", {**MODEL, "norm_place": "behind"}),
    "plain, norms behind, heads normed together": (
        "flex_olmo",
        {**MODEL, "norm_place": "behind", "qk_norm": "full", "head_dim": 8, "moe": {**MOE, "intermediate_size": 20}},
    ),
    "dense, turned in some layers": ("smollm3", {**MODEL, "rope_layers": [0, 2], "mlp_bias": True}),
    "plain, turned in some layers": ("moesaic", {**MODEL, "rope_layers": [1], "moe": MOE}),
    "dense, heads normed after their rotation": ("hunyuan_v1_dense", {**MODEL, "qk_norm": "rotated_head"}),
    "residual sum, heads normed after their rotation": (
        "hunyuan_v1_moe",
        {**MODEL, "qk_norm": "rotated_head",
         "moe": {**MOE, "intermediate_size": 20, "residual": "sum", "router": SURE}},
    ),
    "plain, sliding": (
        "mixtral",
        {**MODEL, "sliding_window": 5, "sliding_layers": [0, 1, 2],
         "moe": {**MOE, "intermediate_size": 20, "router": SURE}},
    ),
    "dense, a window over all positions": ("llama", {**MODEL, "sliding_window": 64, "sliding_layers": [1]}),
    "dense, such biases, wide heads": ("seed_oss", {**MODEL, "attention_bias": "qkv", "head_dim": 10}),
    "plain": ("mixtral", {**MODEL, "moe": {**MOE, "intermediate_size": 20, "router": SURE}}),
    "plain, scaled": (
        "mixtral",
        {**MODEL, "moe": {**MOE, "intermediate_size": 20, "router": SURE, "output_scale": True}},
    ),
    "plain, normed heads, some dense": ("qwen3_moe", {**MODEL, "qk_norm": "head", "moe": {**MOE, "layers": [0, 2]}}),
    "residual sum": ("qwen2_moe", {**MODEL, "moe": {**MOE, "residual": "sum"}}),
    "residual sum, every second": (
        "qwen2_moe",
        {**MODEL, "attention_bias": "qkv",
         "moe": {**MOE, "every": 2, "residual": "sum", "residual_intermediate_size": 9}},
    ),
    "residual sum, scaled": ("qwen2_moe", {**MODEL, "moe": {**MOE, "residual": "sum", "output_scale": True}}),
    "residual sigmoid": ("qwen2_moe", {**MODEL, "moe": {**MOE, "residual": "sigmoid", "router": SURE}}),
    "latent": (
        "deepseek_v2",
        {**MODEL, "num_kv_heads": 4,
         "moe": {**MOE, "layers": [1, 2], "residual": "sum", "residual_intermediate_size": 24},
         "latent_attention": {
             "query_rank": 9, "kv_rank": 8, "nope_head_dim": 6, "rope_head_dim": 4, "value_head_dim": 7}},
    ),
    "part of a head, residual sum": (
        "glm4_moe",
        {**MODEL, "head_dim": 10, "rope_head_dim": 6, "attention_bias": "qkv",
         "moe": {**MOE, "layers": [2], "residual": "sum", "residual_intermediate_size": 24,
                 "router": {"scoring": "sigmoid", "score_correction_bias": True, "scale": 1.5}}},
    ),
    "as gpt-oss": ("gpt_oss", {**MODEL, **AS_OSS, "sliding_window": 5, "sliding_layers": [1, 2]}),
    "as gpt-oss, no window": ("gpt_oss", {**MODEL, **AS_OSS, "attention_bias": "all", "head_dim": 10}),
    "as gpt-oss, without sinks": ("moesaic", {**MODEL, **AS_OSS, "attention_sinks": False}),
    "as gpt-oss, without the router's bias": (
        "moesaic",
        {**MODEL, **AS_OSS, "moe": {**AS_OSS["moe"], "router": SURE}},
    ),
    "dense with sinks": ("moesaic", {**MODEL, "attention_sinks": True}),
    "part of a head, softmax": ("moesaic", {**MODEL, "rope_head_dim": 4, "moe": MOE}),
    "plain, not renormalised": ("moesaic", {**MODEL, "moe": MOE}),
    "plain, routers with biases": (
        "moesaic",
        {**MODEL, "activation": "swiglu_oai",
         "moe": {**MOE, "intermediate_size": 20, "router": {**SURE, "bias": True}}},
    ),
    "pyramid": ("moesaic", {**MODEL, "moe": {**MOE, "num_experts": [4, 4, 7], "residual": "sum"}}),
    "pyramid, softmax, scaled": (
        "moesaic",
        {**MODEL, "moe": {**MOE, "num_experts": [3, 8], "layers": [0, 2], "residual": "softmax", "output_scale": True}},
    ),
    "layernorm, gelu, learned": (
        "moesaic",
        {**MODEL, "norm": "layernorm", "activation": "gelu", "positions": "learned", "attention_bias": "all",
         "mlp_bias": True, "moe": {**MOE, "residual": "softmax"}},
    ),
}  # fmt: skip


@pytest.fixture
def own_run(make_run: MakeRun, short_check: None) -> MakeRun:
    """A function (name in OWN, dtype) that returns a run in which no factor is 1 and no bias 0."""

    def make(name: str, dtype: torch.dtype = torch.float32) -> Path:
        run = make_run("moe", model=OWN[name][1])
        generator, stored = torch.Generator().manual_seed(2), load_tensors(resolve_checkpoint(run), "model")
        for tensor in stored.values():
            if tensor.dim() < 2:
                tensor.add_(0.3 * torch.randn(tensor.shape, generator=generator))
        stored = {each: tensor.to(dtype) for each, tensor in stored.items()}
        save_checkpoint(run, 8, model=stored, optimizer={}, metadata={"validation_loss": 4.0})
        return run

    return make


def test_a_corrupt_run_is_found_and_nothing_is_left(make_run: MakeRun, short_check: None, tmp_path: Path) -> None:
    run = make_run("moe")
    path = resolve_checkpoint(run).path / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1  # in the last tensor: a number that is as good as any
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="SHA-256"):
        export_run(run, tmp_path / "new" / "out")
    assert not (tmp_path / "new").exists()


@torch.no_grad()
def our_logits(run: Path, tokens: Tensor) -> Tensor:
    model = load_run(run, device="cpu", pack=False).model
    model.compute_dtype = torch.float32
    return model.logits(model(tokens).hidden)


@pytest.mark.parametrize("name", OWN)
def test_models_of_ours_are_transformers_own(
    own_run: MakeRun, unchecked: Callable[[], AbstractContextManager[None]], tmp_path: Path, name: str
) -> None:
    from transformers import AutoModelForCausalLM

    import moesaic.hf  # noqa: F401  # registers our classes

    run, out, tokens = own_run(name), tmp_path / "out", TOKENS[:, :41]
    written = export_run(run, out)
    assert written.failure is None and written.family == OWN[name][0] and written.judge == "transformers"
    model = AutoModelForCausalLM.from_pretrained(out, experts_implementation="eager").eval()
    config = json.loads((out / "config.json").read_text())
    assert type(model).__name__ == config["architectures"][0] and config["model_type"] == written.family
    with torch.no_grad():
        logits = model(tokens).logits
    assert (logits - our_logits(run, tokens)).abs().max() < 1e-4 and logits.abs().max() > 1
    # Back again it computes the same; where the model was rewritten, by other tensors.
    with unchecked():
        import_model(out, tmp_path / "back")
    assert (our_logits(tmp_path / "back", tokens) - logits).abs().max() < 1e-4
    assert verify_models(run, out).failure is None


def test_an_unmixed_residual_mlp_is_half_of_twice_itself(own_run: MakeRun, tmp_path: Path) -> None:
    run = own_run("residual sum", torch.bfloat16)
    export_run(run, tmp_path / "out")
    ours, written = load_tensors(resolve_checkpoint(run), "model"), load_file(tmp_path / "out" / "model.safetensors")
    for layer in range(3):
        place = f"model.layers.{layer}.mlp.shared_expert"
        assert written[f"{place}_gate.weight"].shape == (1, 24) and not written[f"{place}_gate.weight"].any()
        mlp = f"blocks.{layer}.feed_forward.mlp"
        assert torch.equal(written[f"{place}.down_proj.weight"], 2 * ours[f"{mlp}.down_proj.weight"])
        assert torch.equal(written[f"{place}.up_proj.weight"], ours[f"{mlp}.up_proj.weight"])
        # Said, and there: vLLM has these biases in any case, and leaves them as memory was where a file has none.
        for part in "qkv":
            bias = written[f"model.layers.{layer}.self_attn.{part}_proj.bias"]
            assert len(bias) and not bias.any()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["qkv_bias"] is True


@pytest.mark.parametrize("name", ["plain, scaled", "residual sum, scaled"])
@pytest.mark.parametrize(
    ("stored", "dtype"), [("float32", None), ("float32", "bf16"), ("bfloat16", None), ("bfloat16", "fp32")]
)
def test_a_factor_is_in_the_experts_and_rounded_once(
    own_run: MakeRun, tmp_path: Path, name: str, stored: str, dtype: str | None
) -> None:
    """The check takes the source with the rounded product, so even 16 bits leave it nothing to forgive."""
    run, out = own_run(name, getattr(torch, stored)), tmp_path / "out"
    written = export_run(run, out, dtype=dtype)
    assert written.comparison is not None and written.comparison.max_relative < 1e-5
    found = verify_models(run, out)
    assert found.failure is None and found.comparison is not None and found.comparison.max_relative < 1e-5
    ours, theirs = load_tensors(resolve_checkpoint(run), "model"), load_file(out / "model.safetensors")
    for layer in range(3):
        moe = f"blocks.{layer}.feed_forward.moe"
        product = ours[f"{moe}.experts.down_proj"].float() * ours[f"{moe}.output_scale"].float()
        names = [each for each in theirs if f"layers.{layer}." in each and ".experts." in each]
        down = [theirs[each] for each in sorted(names) if each.endswith(("w2.weight", "down_proj.weight"))]
        assert torch.equal(torch.stack(down), product.to(down[0].dtype))


def test_what_only_our_classes_describe_needs_transformers(
    own_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "moesaic.hf", raising=False)
    run = own_run("pyramid")
    with pytest.raises(InstallationError, match="no family of transformers' own describes") as caught:
        export_run(run, tmp_path / "out")
    assert str(caught.value).startswith(f"{run} can only be written for the classes of moesaic.hf")
    assert "pip install 'moesaic[huggingface]'" in str(caught.value) and str(caught.value).count(";") == 2
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("format", "force"), [("huggingface", False), ("huggingface", True), ("gguf", True)])
def test_weights_that_are_not_finite_are_refused_by_name(
    own_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: Any, force: bool
) -> None:
    """Where logits are not compared too, and whether or not a failed check is borne."""
    pytest.importorskip("gguf", reason="GGUF files are written with the package gguf")
    monkeypatch.setattr(parity, "available_memory_bytes", lambda: 0)
    run = own_run("dense")
    stored = load_tensors(resolve_checkpoint(run), "model")
    stored["blocks.1.attention.o_proj.weight"][0, 0] = torch.nan
    save_checkpoint(run, 9, model=stored, optimizer={}, metadata={"validation_loss": 3.0})
    with pytest.raises(CheckpointError, match=r"blocks.1.attention.o_proj.weight holds numbers that are not finite; "):
        export_run(f"{run}@9", tmp_path / "out", format=format, force=force)
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_written_is_refused_and_leaves_nothing(own_run: MakeRun, tmp_path: Path) -> None:
    run, out = own_run("pyramid"), tmp_path / "out"
    with pytest.raises(ConfigError, match=r"format \('pickle'\) is not known; one of huggingface, gguf is required"):
        export_run(run, out, format="pickle")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"dtype \('int3'\) is not known; one of fp32, bf16, fp16"):
        export_run(run, out, dtype="int3")
    with pytest.raises(
        ConversionError, match=r"another num_experts from layer to layer \(4, 7\); no GGUF architecture .*layout"
    ):
        export_run(run, out, format="gguf")
    with pytest.raises(ConfigError, match=r"exists; what is converted needs a folder of its own"):
        export_run(run, run)
    # fp16 ends at 65,504.
    stored = load_tensors(resolve_checkpoint(run), "model")
    stored["blocks.1.attention.o_proj.weight"][0, 0] = 1e6
    save_checkpoint(run, 9, model=stored, optimizer={}, metadata={"validation_loss": 3.0})
    with pytest.raises(ConversionError, match=r"o_proj.weight holds numbers beyond 65504, the largest of fp16"):
        export_run(run, out, dtype="fp16")
    stored["blocks.1.attention.o_proj.weight"][0, 0] = 3.4e38
    save_checkpoint(run, 10, model=stored, optimizer={}, metadata={"validation_loss": 2.0})
    with pytest.raises(ConversionError, match=r"beyond 3.38953e\+38, the largest of bf16, which .*; use fp32"):
        export_run(run, out, dtype="bf16")
    assert sorted(path.name for path in tmp_path.iterdir()) == [run.name]
