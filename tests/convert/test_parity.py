"""The certificate: whatever a conversion could get wrong fails it, and rounding to a smaller dtype does not."""

import dataclasses
import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moesaic.convert import exporter, opened, parity
from moesaic.convert.exporter import export_run
from moesaic.convert.importer import import_model
from moesaic.convert.parity import verify_models
from moesaic.convert.runnable import Choice
from moesaic.convert.tensors import Piece
from moesaic.errors import ConversionError

Converted = Any  # conftest's
Pieces = dict[str, list[Piece]]
NAME = "qwen3-moe"  # layers 0 and 2 with 5 experts, layer 1 dense
pytestmark = pytest.mark.usefixtures("short_check")


@pytest.fixture
def model(converted: Callable[[str], Converted]) -> Converted:
    return converted(NAME)


@pytest.fixture
def edited(model: Converted, tmp_path: Path) -> Callable[..., Path]:
    """A function (change of the tensors, **keys of the config) that returns a copy of the exported folder."""

    def edit(change: Callable[[dict[str, Tensor]], None] = lambda tensors: None, **keys: Any) -> Path:
        folder = tmp_path / "edited"
        shutil.copytree(model.exported, folder)
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **keys}))
        return folder

    return edit


def exchange(tensors: dict[str, Tensor], one: str, other: str) -> None:
    """Exchange all tensors whose names begin with the one prefix for those of the other."""
    for name in [name for name in tensors if name.startswith(one)]:
        twin = other + name.removeprefix(one)
        tensors[name], tensors[twin] = tensors[twin], tensors[name]


def swap_experts(tensors: dict[str, Tensor]) -> None:
    exchange(tensors, "model.layers.2.mlp.experts.0.", "model.layers.2.mlp.experts.4.")


def swap_layers(tensors: dict[str, Tensor]) -> None:
    exchange(tensors, "model.layers.0.", "model.layers.2.")


def exchange_router_rows(tensors: dict[str, Tensor]) -> None:
    router = tensors["model.layers.0.mlp.gate.weight"]
    tensors["model.layers.0.mlp.gate.weight"] = router[[1, 0, 2, 3, 4]].clone()


def disturb_a_norm(tensors: dict[str, Tensor]) -> None:
    tensors["model.norm.weight"][7] *= 1.0001


def lose_a_bit(tensors: dict[str, Tensor]) -> None:
    matrix = tensors["model.layers.1.self_attn.o_proj.weight"]
    matrix[3, 5] = torch.nextafter(matrix[3, 5], torch.tensor(9.0))


@pytest.mark.parametrize(
    ("change", "changed"),
    [(swap_experts, 2), (swap_layers, 22), (exchange_router_rows, 1), (disturb_a_norm, 1), (lose_a_bit, 1)],
)
def test_verify_forgives_no_change_however_small(
    model: Converted, edited: Callable[..., Path], change: Callable[[dict[str, Tensor]], None], changed: int
) -> None:
    folder = edited(change)
    for first, second in ((model.run, folder), (folder, model.source)):
        found = verify_models(first, second)
        assert found.failure is not None and "differ by more than rounding" in found.failure
        assert found.weights is not None and found.comparison is not None
        different, equal = found.weights.different, found.weights.equal
        assert (len(different) + equal, found.weights.max_absolute > 0) == (len(model.imported_names), True)
        assert len(different) == changed
        small = change in (disturb_a_norm, lose_a_bit)
        assert (found.comparison.max_relative < parity.MAX_RELATIVE) == small
        if change is exchange_router_rows:
            assert found.comparison.routing_agreement[0] < 1


def test_verify_says_what_is_the_same(model: Converted) -> None:
    for first, second in ((model.source, model.run), (model.run, model.exported), (model.source, model.exported)):
        found = verify_models(first, second)
        assert found.failure is None and found.weights is not None and found.comparison is not None
        assert found.weights.equal == len(model.imported_names) and not found.weights.alone
        assert found.weights.different == () and found.weights.max_absolute == 0 and found.judge == "transformers"
        assert found.comparison.routing_agreement == (1.0, 1.0)


@pytest.mark.parametrize(
    ("keys", "named"),
    [({"rms_norm_eps": 1.01e-6}, "norm_epsilon"), ({"norm_topk_prob": True}, "renormalize"),
     ({"max_position_embeddings": 40}, "max_positions"), ({"rope_theta": 10001.0}, "rope_theta")],
)  # fmt: skip
def test_configs_that_differ_are_named(
    model: Converted, edited: Callable[..., Path], keys: dict[str, Any], named: str
) -> None:
    folder = edited(**keys)
    for first, second in ((model.run, folder), (folder, model.run)):
        failure = verify_models(first, second).failure
        assert failure is not None and failure.startswith("the configs differ in ") and named in failure


def test_a_tensor_that_is_dropped_is_named(model: Converted, edited: Callable[..., Path]) -> None:
    folder = edited(lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(ConversionError, match=r"missing 1: model.layers.1.mlp.up_proj.weight; every tensor has to be"):
        verify_models(model.run, folder)


def test_where_nothing_can_run_the_tensors_still_count(
    model: Converted, edited: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parity, "available_memory_bytes", lambda: 1)
    same, other = verify_models(model.run, model.exported), verify_models(model.run, edited(disturb_a_norm))
    assert same.failure is None and same.comparison is None and "of memory in fp32" in str(same.not_compared)
    assert other.failure is not None and "final_norm.weight" in other.failure


def test_transformers_reads_one_tensor_after_the_other(model: Converted, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its threads would have the whole model in memory beside what is stacked of it."""
    loading = pytest.importorskip("transformers.core_model_loading")
    monkeypatch.setattr(loading, "ThreadPoolExecutor", lambda **_: pytest.fail("tensors are read ahead"))
    for before in (None, "0"):
        if before is not None:
            monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", before)
        found = verify_models(model.source, model.exported)
        assert found.failure is None and found.judge == "transformers"
        assert os.environ.get("HF_DEACTIVATE_ASYNC_LOAD") == before


def test_what_a_check_takes_counts_logits_and_a_layer_that_is_stacked(saved: Callable[..., Path]) -> None:
    def needed(**values: int) -> int:
        return parity._bytes_needed(saved(NAME, **values))

    hidden, wider = 24, needed(vocab_size=301 + 1000) - needed()
    # Two matrices in fp32, and two models' logits of a long prompt at least.
    assert wider > 1000 * (2 * 4 * hidden + 2 * 4 * parity._LONG_PROMPT)
    more = 300 * 3 * 60 * hidden  # numbers of 300 more experts, in each of two layers
    stacked = needed(num_experts=305, moe_intermediate_size=60) - needed(num_experts=5, moe_intermediate_size=60)
    # All in fp32 and as they are stored, which is fp32 here, and one layer's once more.
    assert 17 * more < stacked < 22 * more


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_rounding_is_forgiven_and_nothing_beside_it(model: Converted, tmp_path: Path, dtype: str) -> None:
    out = tmp_path / "out"
    written = export_run(model.run, out, dtype=dtype)
    name = {"bf16": "bfloat16", "fp16": "float16"}[dtype]
    # The source was cast before, so what differs is no rounding.
    assert written.dtype == name and written.comparison is not None and written.comparison.max_relative < 1e-5
    pairs = ((model.run, out), (out, model.run), (model.source, out))
    for first, second in pairs if dtype == "bf16" else pairs[:1]:
        found = verify_models(first, second)
        assert found.failure is None and found.weights is not None and found.comparison is not None
        wide, narrow = found.weights.rounded if first is not out else found.weights.rounded[::-1]
        assert set(wide.values()) == {name} and not narrow
        assert len(wide) + found.weights.equal == len(model.imported_names) and found.weights.max_absolute > 0
        assert found.comparison.max_relative < 1e-5
    tensors = load_file(out / "model.safetensors")
    tensors["model.norm.weight"][3] *= 1.01  # one or two steps of the smaller dtype
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    found = verify_models(model.run, out)
    assert found.weights is not None and found.weights.different == ("final_norm.weight",)
    assert found.failure is not None and "final_norm.weight" in found.failure


def change_piece(pieces: Pieces, name: str, place: int, **changes: Any) -> None:
    pieces[name][place] = dataclasses.replace(pieces[name][place], **changes)


def read_experts_swapped(pieces: Pieces) -> None:
    experts = pieces["blocks.0.feed_forward.moe.experts.down_proj"]
    first, second = experts[0].theirs, experts[1].theirs
    for place, theirs in enumerate((second, first)):
        change_piece(pieces, experts[0].ours, place, theirs=theirs)


def read_gate_for_up(pieces: Pieces) -> None:
    name = "blocks.0.feed_forward.moe.experts.gate_up_proj"
    gate, up = pieces[name][0].theirs, pieces[name][1].theirs
    change_piece(pieces, name, 0, theirs=up)
    change_piece(pieces, name, 1, theirs=gate)


def read_norms_swapped(pieces: Pieces) -> None:
    names = [f"blocks.1.{part}_norm.weight" for part in ("attention", "feed_forward")]
    first, second = (pieces[name][0].theirs for name in names)
    change_piece(pieces, names[0], 0, theirs=second)
    change_piece(pieces, names[1], 0, theirs=first)


def read_router_rows_in_another_order(pieces: Pieces) -> None:
    change_piece(pieces, "blocks.2.feed_forward.moe.router.weight", 0, order=torch.tensor([0, 2, 1, 3, 4]))


@pytest.mark.parametrize(
    "mistake", [read_experts_swapped, read_gate_for_up, read_norms_swapped, read_router_rows_in_another_order]
)
def test_a_mistake_in_our_reading_fails_the_import(
    model: Converted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mistake: Callable[[Pieces], None]
) -> None:
    real = opened.pieces_of

    def wrong(*arguments: Any) -> Pieces:
        pieces = real(*arguments)
        mistake(pieces)
        return pieces

    monkeypatch.setattr(opened, "pieces_of", wrong)
    with pytest.raises(ConversionError, match=r"run does not compute what .* does: .*; nothing was kept; .*--force"):
        import_model(model.source, tmp_path / "run")
    assert not list(tmp_path.iterdir())
    kept = import_model(model.source, tmp_path / "run", force=True)
    assert kept.failure is not None
    assert json.loads((tmp_path / "run" / "parity.json").read_text())["failure"] == kept.failure


def test_a_tensor_that_transformers_does_not_find_fails_the_export(
    model: Converted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would make one up, and of an expert that no prompt is sent to the logits would not tell."""
    family = exporter.FAMILIES["qwen3_moe"]
    rules = tuple(
        dataclasses.replace(rule, theirs=("model.last_norm.weight",)) if rule.ours == "final_norm.weight" else rule
        for rule in family.tensors
    )
    for module in (exporter, opened):
        tables = {**exporter.FAMILIES, "qwen3_moe": dataclasses.replace(family, tensors=rules)}
        monkeypatch.setattr(module, "FAMILIES", tables)
    with pytest.raises(ConversionError, match=r"transformers finds no model.norm.weight; nothing was kept"):
        export_run(model.run, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_numbers_that_are_not_finite_fail(model: Converted, edited: Callable[..., Path], tmp_path: Path) -> None:
    def break_it(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.0.input_layernorm.weight"][2] = float("nan")

    folder = edited(break_it)
    with pytest.raises(ConversionError, match=r"input_layernorm.weight holds numbers that are not finite"):
        import_model(folder, tmp_path / "run")
    found = verify_models(folder, folder)
    assert found.failure is not None
    assert '"max_absolute": null' in json.dumps(found.to_json())


def answer(ids: list[int], scores: list[list[float]] | None = None, *, ends_in: float = 0.0) -> parity._Answer:
    """Three tokens, one MoE layer with top-1 of three experts; logits of 1 but for the last two positions."""
    logits = torch.ones(3, 4)
    logits[1:] += ends_in
    choice = Choice(torch.tensor(ids)[:, None], None if scores is None else torch.tensor(scores))
    return parity._Answer(logits, [choice], [1])


@pytest.mark.parametrize("known", ["first", "second"])
@pytest.mark.parametrize(("score", "is_tie"), [(0.5 - 1e-7, True), (0.5 - 1e-3, False), (math.nan, False)])
def test_where_rounding_decides_between_experts_nothing_is_compared_from_there(
    score: float, is_tie: bool, known: str
) -> None:
    scores = [[0.2, 0.7, 0.1], [0.5, score, 0.0], [0.1, 0.2, 0.7]]
    one = answer([1, 0, 2], scores if known == "first" else None)
    other = answer([1, 1, 2], scores if known == "second" else None, ends_in=2.0)
    found = parity._compare([one], [other], made_up=())
    assert (found.num_tokens, found.num_undecided) == ((1, 2) if is_tie else (3, 0))
    assert found.max_relative == (0.0 if is_tie else 2.0)
    assert found.routing_agreement == pytest.approx((1.0 if is_tie else 2 / 3,))


def test_with_too_little_left_everything_is_compared() -> None:
    scores = [[0.5, 0.5, 0.0], [0.2, 0.7, 0.1], [0.1, 0.2, 0.7]]
    undecided = answer([0, 1, 2], scores), answer([1, 1, 2], scores, ends_in=2.0)
    found = parity._compare(undecided[:1], undecided[1:], made_up=())
    assert (found.num_tokens, found.num_undecided, found.max_relative) == (3, 0, 2.0)
    same = answer([1, 1, 2], scores)
    found = parity._compare([undecided[0], same], [undecided[1], same], made_up=())
    assert (found.num_tokens, found.num_undecided, found.max_relative) == (3, 3, 0.0)


def test_a_difference_before_a_tie_is_no_rounding() -> None:
    scores = [[0.2, 0.7, 0.1], [0.5, 0.5, 0.0], [0.1, 0.2, 0.7]]
    found = parity._compare([answer([1, 0, 2], scores)], [answer([0, 1, 2], scores)], made_up=())
    assert found.num_undecided == 0 and found.routing_agreement == pytest.approx((1 / 3,))


def test_experts_whose_scores_only_sum_up_to_the_same_are_no_tie() -> None:
    scores = torch.tensor([[0.4, 0.1, 0.3, 0.2]])
    one, other = (
        parity._Answer(torch.ones(1, 4), [Choice(torch.tensor([ids]), scores)], []) for ids in ([0, 1], [2, 3])
    )
    assert parity._num_decided(one, other) == 1
