"""An upcycled run computes what the dense one does, its experts are the dense MLP's copies or slices, and it learns."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moesaic.checkpoint.store import load_tensors, resolve_checkpoint, save_checkpoint
from moesaic.config.load import load_train_config
from moesaic.convert import upcycle
from moesaic.convert.quantize import quantize_run
from moesaic.convert.upcycle import REPORT_NAME, upcycle_run
from moesaic.data.tokenizer import Tokenizer
from moesaic.errors import CheckpointError, ConfigError, ConversionError
from moesaic.model.kv_cache import BatchCache
from moesaic.model.load import load_run, load_run_config
from moesaic.plan.cost import count_parameters
from moesaic.train.loop import Trainer

# The fixture's dense model has biases and a GELU; this one neither.
GATED = {
    "model": {
        "vocab_size": 320, "hidden_size": 64, "num_layers": 4, "num_heads": 4, "num_kv_heads": 2,
        "intermediate_size": 96, "max_positions": 32, "init_std": 0.2,
    }
}  # fmt: skip
GELU: dict[str, Any] = {}
KINDS = {
    "gelu": GELU,
    "swiglu": GATED,
    "swiglu_oai, biases": {"model": {**GATED["model"], "activation": "swiglu_oai", "mlp_bias": True}},
}

MakeRun = Callable[..., Path]


@pytest.fixture(params=KINDS)
def dense(request: pytest.FixtureRequest, make_run: MakeRun) -> Path:
    return make_run("dense", **KINDS[request.param])


def tensors_of(run: Path) -> dict[str, Tensor]:
    return load_tensors(resolve_checkpoint(run), "model")


@torch.no_grad()
def logits(run: Path, *, pack: bool = False, length: int = 32) -> Tensor:
    model = load_run(run, device="cpu", pack=pack).model
    tokens = torch.randint(320, (2, length), generator=torch.Generator().manual_seed(5))
    return model.logits(model(tokens).hidden)


@torch.no_grad()
def cached_logits(run: Path) -> Tensor:
    """Of a prompt and of tokens after it, as generation computes them."""
    model = load_run(run, device="cpu").model
    tokens = torch.randint(320, (1, 12), generator=torch.Generator().manual_seed(6))
    cache = BatchCache(model.config, 1, 12, dtype=model.compute_dtype, device=tokens.device)
    return torch.cat([model.logits(model(part, cache=cache).hidden) for part in tokens.split([9, 1, 1, 1], 1)], 1)


def with_biases(run: Path) -> None:
    """Biases that are not zeros, and norms that are not ones."""
    generator, stored = torch.Generator().manual_seed(2), tensors_of(run)
    for name, tensor in stored.items():
        if tensor.dim() == 1:
            stored[name] = tensor + 0.3 * torch.randn(tensor.shape, generator=generator)
    save_checkpoint(run, 7, model=stored, optimizer={}, metadata={"validation_loss": 5.0})


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options",
    [
        {"experts": 4, "every": 1},
        {"experts": [2, 5], "layers": [0, 1], "top_k": 2, "granularity": 3, "noise": 0.5},
    ],
)
def test_beside_its_mlp_the_model_is_the_dense_one_bit_for_bit(
    make_run: MakeRun, tmp_path: Path, options: dict[str, Any], kind: str, precision: str
) -> None:
    run, out = make_run("dense", precision=precision, **KINDS[kind]), tmp_path / "out"
    with_biases(run)
    report = upcycle_run(run, out, residual=True, **options)
    assert report.max_logit_difference == 0.0 and report.is_same_function
    assert torch.equal(logits(out), logits(run))
    assert torch.equal(logits(out, pack=True), logits(run, pack=True))
    assert torch.equal(cached_logits(out), cached_logits(run))
    kept, source = tensors_of(out), tensors_of(run)
    assert all(torch.equal(kept[name], tensor) for name, tensor in source.items())
    assert all(kept[name] == 0 for name in kept if name.endswith("output_scale"))


def test_copies_with_weights_that_add_up_to_1_are_the_dense_model_up_to_rounding(dense: Path, tmp_path: Path) -> None:
    with_biases(dense)
    report = upcycle_run(dense, tmp_path / "out", experts=4, top_k=2)
    assert report.is_same_function and report.noise == 0.0
    model = load_run_config(tmp_path / "out").model
    assert model.moe is not None and model.moe.router.renormalize and model.moe.residual is None
    difference = (logits(tmp_path / "out") - logits(dense)).norm() / logits(dense).norm()
    assert difference < 2e-2  # bf16, whose roundings the factors move
    for run in (dense, tmp_path / "out"):
        path = run / "config.yaml"
        path.write_text(path.read_text().replace("precision: bf16", "precision: fp32"))
    torch.testing.assert_close(logits(tmp_path / "out"), logits(dense), rtol=1e-4, atol=1e-4)


def test_top_1_copies_are_scaled_by_the_routing_probability(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run("dense", precision="fp32", **GATED)
    report = upcycle_run(run, tmp_path / "out", experts=4, every=1)
    assert not report.is_same_function and report.max_logit_difference is not None
    assert report.max_logit_difference > 0
    model, plain = load_run(tmp_path / "out").model, load_run(run).model
    x = torch.randn(9, 64, generator=torch.Generator().manual_seed(0))
    layer = model.blocks[0].feed_forward
    with torch.no_grad():
        weights = layer.moe.router(x).routing_weights
        torch.testing.assert_close(layer(x)[0], weights * plain.blocks[0].feed_forward(x)[0])


def parts(run: Path, stacked: str, prefix: str) -> list[tuple[Tensor, Tensor]]:
    """An expert tensor (E, ...) of an upcycled run, cut as the dense MLP's tensors are, and those."""
    kept, names = tensors_of(run), {"up": ["up_proj"], "gate_up": ["gate_proj", "up_proj"], "down": ["down_proj"]}
    kind, _, suffix = stacked.rpartition("_")
    sources = [f"{prefix}mlp.{name}.{'weight' if suffix == 'proj' else 'bias'}" for name in names[kind]]
    return list(zip(kept[f"{prefix}moe.experts.{stacked}"].chunk(len(sources), 1), sources, strict=True))  # type: ignore[arg-type]


@pytest.mark.parametrize("granularity", [1, 2, 3])
def test_an_expert_is_the_mlp_or_the_slice_of_its_number(dense: Path, tmp_path: Path, granularity: int) -> None:
    with_biases(dense)
    out = tmp_path / "out"
    upcycle_run(dense, out, experts=5, layers=[1], residual=True, granularity=granularity, noise=0.0)
    source, config = tensors_of(dense), load_run_config(out).model
    prefix, width = "blocks.1.feed_forward.", 96 // granularity
    assert config.layers[1].expert_intermediate_size == width
    stacks = [name.rpartition(".")[2] for name in tensors_of(out) if ".experts." in name]
    assert len(stacks) == (4 if config.mlp_bias else 2)
    for stacked in stacks:
        for tensor, name in parts(out, stacked, prefix):
            whole = source[str(name)]
            for expert in range(5):
                part = slice(expert % granularity * width, (expert % granularity + 1) * width)
                if stacked == "down_bias":
                    torch.testing.assert_close(tensor[expert], whole / granularity)
                else:
                    assert torch.equal(tensor[expert], whole[:, part] if stacked == "down_proj" else whole[part])


def test_slices_add_up_to_the_mlp(dense: Path, tmp_path: Path) -> None:
    with_biases(dense)
    upcycle_run(dense, tmp_path / "out", experts=3, layers=[0], residual=True, granularity=3, noise=0.0)
    layer = load_run(tmp_path / "out", pack=False).model.blocks[0].feed_forward
    x = torch.randn(9, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        outputs = [
            layer.moe.experts.sorted_rows(x, torch.tensor([9 if each == expert else 0 for each in range(3)]))
            for expert in range(3)
        ]
        torch.testing.assert_close(sum(outputs), layer.mlp(x), rtol=1e-4, atol=1e-4)


def test_noise_is_each_experts_own_in_units_of_the_matrixs_deviation(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run("dense")
    with_biases(run)
    options: dict[str, Any] = {"residual": True, "noise": 0.25, "seed": 3}
    upcycle_run(run, tmp_path / "a", experts=4, every=1, **options)
    upcycle_run(run, tmp_path / "fewer", experts=2, layers=[1], **options)
    upcycle_run(run, tmp_path / "other", experts=2, layers=[1], **{**options, "seed": 4})
    source, noisy = tensors_of(run), tensors_of(tmp_path / "a")
    draws = []
    for layer in (0, 1):
        prefix = f"blocks.{layer}.feed_forward."
        for name in ("up", "down"):
            whole = source[f"{prefix}mlp.{name}_proj.weight"]
            added = noisy[f"{prefix}moe.experts.{name}_proj"] - whole
            draws += [each.flatten() / whole.std() for each in added]
            bias = noisy[f"{prefix}moe.experts.{name}_bias"]
            assert torch.equal(bias, source[f"{prefix}mlp.{name}_proj.bias"].expand_as(bias))
    stacked = torch.stack(draws)  # 2 layers, 2 matrices, 4 experts
    torch.testing.assert_close(stacked.std(1), torch.full((16,), 0.25), rtol=0.05, atol=0.0)
    products = torch.corrcoef(stacked) - torch.eye(16)
    assert products.abs().max() < 0.06  # 6,144 numbers each: five deviations
    name = "blocks.1.feed_forward.moe.experts.up_proj"
    assert torch.equal(tensors_of(tmp_path / "fewer")[name], noisy[name][:2]), "whatever else there is"
    assert not torch.equal(tensors_of(tmp_path / "other")[name], noisy[name][:2])
    routers = [noisy[f"blocks.{layer}.feed_forward.moe.router.weight"] for layer in (0, 1)]
    assert not torch.equal(*routers) and routers[0].std() == pytest.approx(0.2, rel=0.3)  # init_std


def test_the_same_options_give_the_same_bytes(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run("dense")
    for name in ("a", "b"):
        upcycle_run(run, tmp_path / name, experts=4, residual=True)
    one, other = (resolve_checkpoint(tmp_path / name) for name in ("a", "b"))
    assert one.files == other.files


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_tensors_keep_the_dtype_they_are_stored_in(dense: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    with_biases(dense)
    source = {name: tensor.to(dtype) if tensor.dim() > 1 else tensor for name, tensor in tensors_of(dense).items()}
    save_checkpoint(dense, 9, model=source, optimizer={}, metadata={})
    report = upcycle_run(f"{dense}@9", tmp_path / "out", experts=[2], layers=[1], residual=True)
    assert report.max_logit_difference == 0.0 and report.source_step == 9
    kept = tensors_of(tmp_path / "out")
    for name, tensor in kept.items():
        if name in source:
            assert torch.equal(tensor, source[name]) and tensor.dtype == source[name].dtype, name
        else:
            is_matrix = name.endswith("_proj")
            assert tensor.dtype == (dtype if is_matrix else torch.float32), name
    added = (
        kept["blocks.1.feed_forward.moe.experts.down_proj"].float()
        - source["blocks.1.feed_forward.mlp.down_proj.weight"].float()
    )
    assert added.abs().max() > 0  # a hundredth is more than a rounding


def test_the_report_the_file_and_the_folder(make_run: MakeRun, tmp_path: Path) -> None:
    run, out = make_run("dense"), tmp_path / "deep" / "out"
    (run / "chat_template.jinja").write_text("{{ messages }}")
    (run / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>", "more": 1}')
    config = load_train_config(run / "config.yaml", ["init_from=other", "seed=4"])
    (run / "config.yaml").write_text(json.dumps(config.to_dict()))
    report = upcycle_run(run, out, experts=[2, 3], every=1, residual=True)
    new = load_run_config(out)
    assert new == config.replace(model=new.model, init_from=None)
    assert [layer.num_experts for layer in new.model.layers] == [2, 3]
    assert (report.layers, report.num_experts, report.expert_intermediate_size) == ((0, 1), (2, 3), 96)
    for model, total, active in (
        (config.model, report.parameters_before, report.active_parameters_before),
        (new.model, report.parameters_after, report.active_parameters_after),
    ):
        assert (total, active) == (count_parameters(model).total, count_parameters(model).active)
    assert report.parameters_after == sum(tensor.numel() for tensor in tensors_of(out).values())
    assert report.bytes_after > report.bytes_before > 4 * report.parameters_before
    values = json.loads((out / REPORT_NAME).read_text())
    assert values == json.loads(json.dumps(report.to_json())) and values["source"] == str(run)
    assert (out / "chat_template.jinja").read_text() == "{{ messages }}"
    assert json.loads((out / "tokenizer_config.json").read_text())["more"] == 1
    assert Tokenizer.load(out).fingerprint == Tokenizer.load(run).fingerprint
    info = resolve_checkpoint(out)
    assert info.step == 0 and list(info.files) == ["model.safetensors"]
    assert info.metadata["upcycled"] == {"source": str(run), "step": 7}
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_half_of_the_layers_unless_told_otherwise(make_run: MakeRun, tmp_path: Path) -> None:
    assert upcycle_run(make_run("dense", **GATED), tmp_path / "out", experts=2).layers == (1, 3)


def test_without_the_memory_to_compare_it_says_so(
    make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upcycle, "available_memory_bytes", lambda: 1000)
    report = upcycle_run(make_run("dense"), tmp_path / "out", experts=2, residual=True)
    assert report.max_logit_difference is None


def test_a_model_that_would_differ_is_not_kept(
    make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upcycle, "_logit_difference", lambda *_: 1e-3)
    with pytest.raises(ConversionError, match=r"logits differ by 0.001 from .*; .*must not differ"):
        upcycle_run(make_run("dense"), tmp_path / "deep" / "out", experts=2, residual=True)
    assert not (tmp_path / "deep").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"experts": [2, 3, 4], "every": 1}, r"moe.num_experts has 3 values for 2 MoE layers"),
        ({"experts": 0}, r"moe.num_experts \(0\)"),
        ({"experts": 2, "top_k": 3}, r"moe.top_k \(3\) is more than num_experts \(2\)"),
        ({"experts": 2, "layers": [5]}, r"moe.layers \(\[5\]\) is not a choice of layers"),
        ({"experts": 2, "layers": [1], "every": 2}, r"layers \(1\) and every \(2\) are both given; .*; leave one out"),
        ({"experts": 2, "residual": True, "granularity": 5}, r"granularity \(5\) does not divide .*\(96\); .*divisor"),
        ({"experts": 2, "granularity": 2}, r"granularity \(2\) is given without a residual MLP; .*--residual"),
        ({"experts": 2, "noise": -1.0}, r"noise \(-1.0\) is not a size; .*; use 0 or 0.01"),
        ({"experts": 2, "noise": 1e300}, r"noise \(1e\+300\) makes weights of blocks.* not finite; .*; use 0.01, or 0"),
    ],
)
def test_options_that_cannot_work_are_refused(
    make_run: MakeRun, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        upcycle_run(make_run("dense"), tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_sources_that_cannot_be_upcycled_are_refused(make_run: MakeRun, tmp_path: Path) -> None:
    out, dense = tmp_path / "out", make_run("dense")
    with pytest.raises(ConfigError, match=r"has experts already, in layers 0, 1; .*; give a dense run"):
        upcycle_run(make_run("moe"), out, experts=4)
    quantize_run(dense, tmp_path / "int8", limit_tokens=100, force=True)
    with pytest.raises(ConfigError, match=rf"is quantised \(.*\); .*; give the run that it was made from \({dense}\)"):
        upcycle_run(tmp_path / "int8", out, experts=4)
    with pytest.raises(ConfigError, match="exists; what is converted needs a folder of its own"):
        upcycle_run(dense, dense, experts=4)
    with pytest.raises(ConfigError, match=r"is inside .*; name one outside"):
        upcycle_run(dense, dense / "checkpoints" / "step-00000030", experts=4)
    stored = tensors_of(dense)
    stored["blocks.1.feed_forward.mlp.up_proj.weight"][3, 4] = float("nan")
    save_checkpoint(dense, 8, model=stored, optimizer={}, metadata={})
    with pytest.raises(CheckpointError, match=r"blocks.1.feed_forward.mlp.up_proj.weight holds numbers .*not finite"):
        upcycle_run(f"{dense}@8", out, experts=4, residual=True)
    del stored["final_norm.weight"]
    save_checkpoint(dense, 8, model=stored, optimizer={}, metadata={})
    with pytest.raises(CheckpointError, match=r"does not fit its run's config in final_norm.weight; "):
        upcycle_run(f"{dense}@8", out, experts=4)
    assert not out.exists() and not list(tmp_path.glob(".writing*"))


def test_what_is_copied_is_what_was_checked(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run("dense")
    file = resolve_checkpoint(run).path / "model.safetensors"

    def change(stage: str, share: float) -> None:
        if stage == "upcycling":
            data = bytearray(file.read_bytes())
            data[-3] ^= 0x20
            file.write_bytes(data)

    with pytest.raises(CheckpointError, match=r"SHA-256|changed while it was read"):
        upcycle_run(run, tmp_path / "out", experts=2, on_progress=change)
    assert list(tmp_path.glob("*out*")) == []


def test_training_moves_the_factor_first_and_then_the_experts(
    make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, out = make_run("dense", precision="fp32", model={**GATED["model"], "init_std": 0.05}), tmp_path / "out"
    upcycle_run(run, out, experts=4, residual=True, layers=[1])
    settings = ["tokens=2560", "schedule.learning_rate=3e-3", "optimizer.weight_decay=0"]
    trainer = Trainer(load_train_config(out, settings), tmp_path / "new", device="cpu", resume=False, display=None)
    state = trainer.model.state_dict()
    prefix = "blocks.1.feed_forward.moe."
    experts, scale = (
        [state[f"{prefix}experts.{name}"] for name in ("gate_up_proj", "down_proj")],
        state[f"{prefix}output_scale"],
    )
    before = [each.clone() for each in experts]
    losses = [trainer.train_step().cross_entropy]
    assert scale != 0 and all(torch.equal(each, old) for each, old in zip(experts, before, strict=True))
    losses += [trainer.train_step().cross_entropy for _ in range(9)]
    assert not any(torch.equal(each, old) for each, old in zip(experts, before, strict=True))
    assert min(losses[-3:]) < losses[0] - 0.2, losses


def test_an_upcycled_run_is_quantised_with_its_factor_as_it_is(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run("dense", **GATED)
    upcycle_run(run, tmp_path / "moe", experts=4, residual=True)
    stored = tensors_of(tmp_path / "moe")
    for name, tensor in stored.items():
        if name.endswith("output_scale"):
            tensor.fill_(0.7)
    save_checkpoint(tmp_path / "moe", 1, model=stored, optimizer={}, metadata={})
    for experts, group_size in (("int8", None), ("int4", 32)):
        out = tmp_path / str(experts)
        quantize_run(f"{tmp_path / 'moe'}@1", out, experts=experts, group_size=group_size, limit_tokens=100, force=True)
        kept = tensors_of(out)["blocks.1.feed_forward.moe.output_scale"]
        assert kept.dtype == torch.float32 and kept.shape == () and kept == torch.tensor(0.7)
        error = (logits(out, pack=True) - logits(tmp_path / "moe")).norm()
        assert error < logits(tmp_path / "moe").norm()
