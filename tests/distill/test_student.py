"""A student's config from its teacher's, and its weights from the teacher's layers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moesaic.checkpoint.store import list_checkpoints, load_tensors, resolve_checkpoint
from moesaic.config.load import load_model_config
from moesaic.config.model import ModelConfig
from moesaic.config.train import TrainConfig
from moesaic.data.shards import ShardSet
from moesaic.distill.run import make_trainer, student_config
from moesaic.distill.student import (
    copy_layers,
    default_map,
    expert_loads,
    kept_layers,
    model_of_layers,
    student_model,
)
from moesaic.distill.teacher import TeacherRun
from moesaic.errors import CheckpointError, ConfigError
from moesaic.model.transformer import Transformer

Student = Callable[..., TrainConfig]
CPU = torch.device("cpu")


def model(num_layers: int, **moe: Any) -> ModelConfig:
    return ModelConfig(
        vocab_size=320, hidden_size=32, num_layers=num_layers, num_heads=2, intermediate_size=32, max_positions=32,
        moe=moe or None,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("teacher", "student"), [("pr-moe-350m-32-64", "mos-350m"), ("pr-moe-1.3b-64-128", "mos-1.3b")]
)
def test_the_papers_students_come_out(teacher: str, student: str) -> None:
    assert student_model(load_model_config(teacher)) == load_model_config(student)


@pytest.mark.parametrize(("layers", "kept"), [(2, 1), (4, 3), (7, 6), (8, 7), (12, 10), (20, 17), (24, 21), (32, 28)])
def test_an_eighth_of_the_layers_goes_and_at_least_one(layers: int, kept: int) -> None:
    assert student_model(model(layers)).num_layers == kept
    assert len(kept_layers(model(layers))) == kept


def test_the_last_layers_sizes_stay() -> None:
    teacher = model(8, num_experts=[2, 4, 8, 16], top_k=[1, 1, 2, 2], intermediate_size=[8, 16, 24, 32], every=2)
    student = student_model(teacher)
    assert student.moe is not None and student.num_layers == 7
    assert student.moe.num_experts == (4, 8, 16)
    assert student.moe.top_k == (1, 2, 2) and student.moe.intermediate_size == (16, 24, 32)


def test_a_pattern_of_named_layers_keeps_their_share() -> None:
    teacher = model(16, num_experts=8, layers=list(range(1, 16)))  # the first one dense, as in DeepSeek's models
    student = student_model(teacher)
    assert student.num_layers == 14 and student.layers[0].num_experts == 0
    assert [layer.num_experts for layer in student.layers[1:]] == [8] * 13


def test_fewer_experts_and_none() -> None:
    teacher = load_model_config("pr-moe-tiny-8-16")
    assert student_model(teacher, num_experts=4).moe.num_experts == 4  # type: ignore[union-attr]
    assert [each.num_experts for each in student_model(teacher, num_experts=[2, 4, 8]).layers] == [0, 2, 0, 4, 0, 8, 0]
    dense = student_model(teacher, num_layers=8, is_dense=True)
    assert dense.moe is None and dense.num_layers == 8


def test_a_student_without_experts_is_one_that_was_asked_for() -> None:
    named, every = model(4, num_experts=8, layers=[3]), model(4, num_experts=[4, 8], every=2)
    student = student_model(named, num_layers=2)
    assert [layer.num_experts for layer in student.layers] == [0, 8]
    assert kept_layers(named, 2) == (0, 3) and kept_layers(named, 1) == (3,)
    for refused in (student_model, kept_layers):
        with pytest.raises(ConfigError, match=r"a student of 1 layers has no MoE layer \(moe.every is 2\)"):
            refused(every, num_layers=1)
    for teacher in (named, every):
        assert student_model(teacher, num_layers=1, is_dense=True).moe is None
        assert kept_layers(teacher, 1, is_dense=True) == (0,)


def test_kept_layers_are_in_order_and_have_the_same_sizes_as_the_papers_student() -> None:
    teacher = load_model_config("pr-moe-350m-32-64")
    kept = kept_layers(teacher)
    assert list(kept) == sorted(set(kept)) and kept[0] == 0 and kept[-1] == 23
    student = model_of_layers(teacher, kept)
    sizes = sorted(layer.num_experts for layer in student.layers)
    assert sizes == sorted(layer.num_experts for layer in student_model(teacher).layers)
    assert [student.layers[i] for i in range(21)] == [teacher.layers[i] for i in kept]
    assert model_of_layers(teacher, range(24)) == teacher


@pytest.mark.parametrize("moe", [{}, {"num_experts": 4}, {"num_experts": 4, "every": 2}])
def test_layers_keep_their_windows(moe: dict[str, Any]) -> None:
    teacher = model(8, **moe).replace(sliding_window=16, sliding_layers=(0, 2, 4, 6))
    student = student_model(teacher)
    layers = default_map(teacher, student)
    assert student.num_layers == 7 and len(set(layers)) == 7
    assert [student.window_of(layer) for layer in range(7)] == [teacher.window_of(layer) for layer in layers]
    kept = kept_layers(teacher)
    own = model_of_layers(teacher, kept)
    assert [own.window_of(layer) for layer in range(7)] == [teacher.window_of(layer) for layer in kept]
    assert model_of_layers(teacher, (0, 4)).sliding_layers is None
    assert model_of_layers(teacher, (0, 4)).sliding_window == 16
    assert model_of_layers(teacher, (1, 3)).sliding_window is None
    without = student.replace(sliding_window=None, sliding_layers=None)  # it has a map all the same
    assert len(default_map(teacher, without)) == 7


@pytest.mark.parametrize("moe", [{}, {"num_experts": 4, "every": 2}])
def test_layers_stay_turned_or_not(moe: dict[str, Any]) -> None:
    teacher = model(8, **moe).replace(rope_layers=(0, 1, 2, 4, 5, 6))
    student = student_model(teacher)
    layers = default_map(teacher, student)
    assert student.num_layers == 7 and len(set(layers)) == 7
    assert [student.is_rotated(layer) for layer in range(7)] == [teacher.is_rotated(layer) for layer in layers]
    own = model_of_layers(teacher, (0, 3, 5))
    assert own.rope_layers == (0, 2)
    assert model_of_layers(teacher, (0, 4)).rope_layers is None and model_of_layers(teacher, (3, 7)).rope_layers == ()
    assert len(default_map(teacher, student.replace(rope_layers=None))) == 7  # it has a map all the same


def test_the_default_map_is_in_order_even_and_by_kind() -> None:
    teacher = model(8, num_experts=[4, 4, 8, 8], every=2)
    assert default_map(teacher, teacher) == tuple(range(8))
    assert default_map(model(9), model(3)) == (0, 4, 8)
    # Dense layers may come from any, layers with experts from those with as many or more.
    assert default_map(teacher, model(2, num_experts=8, layers=[1])) == (0, 7)
    assert default_map(teacher, model(3)) in ((0, 3, 7), (0, 4, 7))
    with pytest.raises(ConfigError, match=r"are not, in order.*distill.layer_map"):
        default_map(teacher, model(2, num_experts=8, layers=[0]).replace(num_layers=6))


def logits_of(own: Transformer, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return own.eval().logits(own(tokens).hidden)


TOKENS = torch.randint(320, (2, 16), generator=torch.Generator().manual_seed(0))


def test_a_student_of_all_its_teachers_layers_is_the_teacher(teacher: Path, student: Student, tmp_path: Path) -> None:
    config = student("distill.init=teacher", "distill.layer_map=[0, 1, 2, 3]")
    trainer = make_trainer(config, tmp_path, device="cpu", resume=False, display=None)
    for name, tensor in load_tensors(resolve_checkpoint(teacher), "model").items():
        assert torch.equal(trainer.model.state_dict()[name], tensor), name
    loaded = TeacherRun.open(teacher).load("fp32", device=CPU)
    trainer.model.compute_dtype = torch.float32
    assert torch.equal(logits_of(trainer.model, TOKENS), logits_of(loaded, TOKENS))


def test_layers_are_copied_by_the_map_and_a_resumed_student_keeps_its_own(
    teacher: Path, student: Student, tmp_path: Path
) -> None:
    config = student("distill.init=teacher", num_layers=3)
    assert config.distill is not None and config.distill.layer_map == (0, 2, 3)
    trainer = make_trainer(config, tmp_path, device="cpu", resume=False, display=None)
    theirs = load_tensors(resolve_checkpoint(teacher), "model")
    for name, tensor in trainer.model.state_dict().items():
        other = name.replace("blocks.2.", "blocks.3.").replace("blocks.1.", "blocks.2.")
        assert torch.equal(tensor, theirs[other]), name
    trainer.run()
    again = make_trainer(config, tmp_path, device="cpu", resume=True, display=None)
    assert not torch.equal(again.model.embedding, theirs["embedding"])


def test_the_most_loaded_experts_stay(teacher: Path, student: Student, tmp_path: Path) -> None:
    config = student("distill.init=teacher", num_experts=2)
    trainer = make_trainer(config, tmp_path, device="cpu", resume=False, display=None)
    theirs = load_tensors(resolve_checkpoint(teacher), "model")
    loaded = TeacherRun.open(teacher).load("fp32", device=CPU)
    loads = expert_loads(loaded, trainer.validation, device=CPU)
    record = trainer.objective.record()
    assert record is not None and config.distill is not None and config.distill.layer_map is not None
    for own, source in enumerate(config.distill.layer_map):
        copied = record["copied"][own]
        if source not in loads:
            assert copied["experts"] is None
            continue
        ids = list(copied["experts"])
        left = [expert for expert in range(len(loads[source])) if expert not in ids]
        assert len(ids) == 2 and ids == sorted(ids)
        assert loads[source][ids].min() >= loads[source][left].max()
        assert copied["load"] == pytest.approx(float(loads[source][ids].sum() / loads[source].sum()))
        for name in ("moe.router.weight", "moe.experts.gate_up_proj", "moe.experts.down_proj"):
            mine = trainer.model.state_dict()[f"blocks.{own}.feed_forward.{name}"]
            assert torch.equal(mine, theirs[f"blocks.{source}.feed_forward.{name}"][ids]), name
        name = "feed_forward.mlp.up_proj.weight"
        assert torch.equal(trainer.model.state_dict()[f"blocks.{own}.{name}"], theirs[f"blocks.{source}.{name}"])


def test_a_dense_student_takes_the_residual_mlp(teacher: Path, student: Student, tmp_path: Path) -> None:
    config = student("distill.init=teacher", is_dense=True)
    trainer = make_trainer(config, tmp_path, device="cpu", resume=False, display=None)
    theirs = load_tensors(resolve_checkpoint(teacher), "model")
    mine = trainer.model.blocks[2].feed_forward.mlp.gate_proj.weight
    assert torch.equal(mine, theirs["blocks.3.feed_forward.mlp.gate_proj.weight"])


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_a_dense_student_of_experts_alone_takes_the_most_loaded_one(
    tiny_data: Path, tmp_path: Path, activation: str
) -> None:
    from moesaic.train.loop import train

    values = model(2, num_experts=4, every=2).replace(activation=activation, mlp_bias=True).to_dict()
    config = TrainConfig.from_dict(
        {"model": values, "data": {"path": str(tiny_data), "sequence_length": 16}, "tokens": 64, "batch_size": 4}
    )
    train(config, tmp_path / "teacher")
    run = TeacherRun.open(tmp_path / "teacher")
    student = Transformer(config.model.replace(moe=None)).initialize(0)
    copied = copy_layers(student, run, (0, 1), loads={1: torch.tensor([1, 2, 9, 3])})
    assert copied[1].experts == (2,) and copied[1].load == pytest.approx(9 / 15)
    moe = Transformer(config.model)
    moe.load_state_dict(load_tensors(run.info, "model"))
    experts = moe.blocks[1].feed_forward.moe.experts.weights()
    mlp = student.blocks[1].feed_forward.mlp
    up = [mlp.gate_proj, mlp.up_proj] if activation == "swiglu" else [mlp.up_proj]
    assert torch.equal(torch.cat([layer.weight for layer in up]), experts.up[2])
    assert torch.equal(torch.cat([layer.bias for layer in up]), experts.up_bias[2])
    assert torch.equal(mlp.down_proj.weight, experts.down[2]) and torch.equal(mlp.down_proj.bias, experts.down_bias[2])


def test_of_a_teachers_equal_checkpoints_the_one_of_the_step_is_opened_again(tiny_data: Path, tmp_path: Path) -> None:
    from moesaic.train.loop import train

    values = {
        "model": model(1).to_dict(), "data": {"path": str(tiny_data), "sequence_length": 16}, "tokens": 3 * 64,
        "batch_size": 4, "checkpoint": {"every_tokens": 64, "keep_last": 3},
    }  # fmt: skip
    train(TrainConfig.from_dict(values), tmp_path / "teacher")  # the last step's learning rate is 0
    first, second, third = list_checkpoints(tmp_path / "teacher")
    assert first.model_sha256 != second.model_sha256 == third.model_sha256
    for step, opened in ((2, 2), (3, 3), (None, 2)):
        run = TeacherRun.reopen(tmp_path / "teacher", tmp_path, sha256=third.model_sha256, step=step)
        assert run.info.step == opened


def test_learned_positions_are_cut(tiny_data: Path, tmp_path: Path) -> None:
    from moesaic.train.loop import train

    config = TrainConfig.from_dict(
        {
            "model": model(1).replace(positions="learned").to_dict(),
            "data": {"path": str(tiny_data), "sequence_length": 16}, "tokens": 64, "batch_size": 4,
        }
    )  # fmt: skip
    train(config, tmp_path / "teacher")
    run = TeacherRun.open(tmp_path / "teacher")
    student = Transformer(config.model.replace(max_positions=20)).initialize(0)
    copy_layers(student, run, (0,), loads={})
    assert torch.equal(student.position_embedding, load_tensors(run.info, "model")["position_embedding"][:20])
    with pytest.raises(ConfigError, match=r"max_positions \(40\) is more than the teacher's 32 learned"):
        copy_layers(Transformer(config.model.replace(max_positions=40)), run, (0,), loads={})


def test_settings_are_the_teachers_or_those_of_a_config_of_ones_own(teacher: Path, tiny_data: Path) -> None:
    theirs = TeacherRun.open(teacher).config
    own = student_config(teacher)
    assert own.replace(model=theirs.model, distill=None, micro_batch_size=4) == theirs
    given = student_config(teacher, [f"data.path={tiny_data}", "model.vocab_size=320"], student="mos-350m")
    assert given.model == load_model_config("mos-350m").replace(vocab_size=320)
    assert given.data.sequence_length == 2048 and given.distill is not None and given.distill.teacher == str(teacher)
    again = student_config(teacher, student=teacher)
    assert again.model == theirs.model


MISTAKES: dict[str, tuple[tuple[str, ...], dict[str, Any], str]] = {
    "deeper": ((), {"num_layers": 5}, "would have 5 layers; from 1 to the teacher's 4"),
    "no MoE layer left": ((), {"num_layers": 1}, "has no MoE layer"),
    "dense with experts": ((), {"is_dense": True, "num_experts": 2}, "both asked for"),
    "own config and layers": ((), {"student": "mos-350m", "num_layers": 2}, "leave one out"),
    "no such layer": (("distill.init=teacher", "distill.layer_map=[0, 4]"), {}, "names layer 4; the"),
    "map without init": (("distill.layer_map=[0, 1]",), {}, r"distill.layer_map \(\(0, 1\)\) has no effect"),
    "two lengths": (("distill.init=teacher", "distill.layer_map=[0, 1]"), {"num_layers": 3}, "leave one out"),
    "no section": (("distill=5",), {}, "a section with keys is required"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_config_that_makes_no_student_is_refused(student: Student, name: str) -> None:
    settings, options, message = MISTAKES[name]
    with pytest.raises(ConfigError, match=message):
        student(*settings, **options)


MISFITS: dict[str, tuple[tuple[str, ...], dict[str, Any], str]] = {
    "another width": (("model.hidden_size=16",), {}, r"model.head_dim|model.hidden_size \(16, there 32\)"),
    "more experts": (("model.moe.num_experts=[8, 8]",), {}, "has 8 experts, and that one 4"),
    "another expert size": (("model.moe.intermediate_size=16",), {}, "its expert_intermediate_size is 16, there 32"),
    "no residual": (("model.moe.residual=null",), {}, "its intermediate_size is 0, there 32"),
    "another activation": (("model.activation=gelu",), {}, r"model.activation \(gelu, there swiglu\)"),
    "no bias of the router": (("model.moe.router.bias=true",), {}, "one has a router with bias and the other none"),
    "experts of a dense layer": (("model.moe.layers=[0, 1, 2, 3]", "model.moe.every=1"), {}, "and that one is dense"),
}


def test_a_cache_fixes_the_windows_unless_a_file_says_otherwise(teacher: Path, tmp_path: Path) -> None:
    own = student_config(teacher, ["distill.cache=cache"])
    assert own.data.fixed_windows
    assert student_config(teacher, ["distill.cache=cache"], student=teacher).data.fixed_windows
    file = tmp_path / "student.yaml"
    values = own.replace(distill=None).to_dict()
    del values["data"]["fixed_windows"]
    file.write_text(json.dumps(values))
    assert student_config(teacher, ["distill.cache=cache"], student=file).data.fixed_windows
    values["data"]["fixed_windows"] = False
    file.write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=r"data.fixed_windows is false and distill.cache"):
        student_config(teacher, ["distill.cache=cache"], student=file)


@pytest.mark.parametrize("name", MISFITS)
def test_what_does_not_fit_the_teachers_layers_is_refused(student: Student, tmp_path: Path, name: str) -> None:
    settings, options, message = MISFITS[name]
    own = ("distill.init=teacher", "distill.layer_map=[0, 1, 2, 3]")
    extra = ("model.moe.num_experts=4",) if name == "experts of a dense layer" else ()
    with pytest.raises(ConfigError, match=message):
        make_trainer(
            student(*own, *extra, *settings, **options), tmp_path / "run", device="cpu", resume=False, display=None
        )
    assert not (tmp_path / "run").exists()


def test_a_quantised_teacher_teaches_and_gives_no_layers(teacher: Path, student: Student, tmp_path: Path) -> None:
    from moesaic.convert.quantize import quantize_run

    shards = ShardSet.open(TeacherRun.open(teacher).config.data.path)
    quantize_run(teacher, tmp_path / "int8", experts="int8", rest="int8", text=shards.path, force=True)
    own = student(f"distill.teacher={tmp_path / 'int8'}", "distill.teacher_precision=bf16")
    trainer = make_trainer(own, tmp_path / "run", device="cpu", resume=False, display=None)
    assert "forward_kl" in trainer.train_step().losses[0].terms
    with pytest.raises(ConfigError, match=r"teacher_precision \(int8\) is asked of .* quantised"):
        make_trainer(
            student(f"distill.teacher={tmp_path / 'int8'}", "distill.teacher_precision=int8"),
            tmp_path / "b", device="cpu", resume=False, display=None,
        )  # fmt: skip
    config = student(f"distill.teacher={tmp_path / 'int8'}", "distill.teacher_precision=bf16", "distill.init=teacher")
    with pytest.raises(CheckpointError, match="copies the weights before they were rounded"):
        make_trainer(config, tmp_path / "c", device="cpu", resume=False, display=None)
