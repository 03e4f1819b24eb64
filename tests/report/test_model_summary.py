"""A model's table merges equal layers and writes numbers in three digits."""

from dataclasses import replace

import pytest
from rich.console import Console

from moesaic.config.model import FeedForwardConfig, ModelConfig
from moesaic.report.model_summary import (
    ModelSummary,
    describe_bytes,
    describe_flops,
    describe_indices,
    describe_layer,
    equal_layers,
    render_model,
)

CONFIG = ModelConfig(
    vocab_size=64,
    hidden_size=16,
    num_layers=6,
    num_heads=4,
    num_kv_heads=2,
    moe={"num_experts": [4, 4, 8], "every": 2, "residual": "softmax"},
)
SUMMARY = ModelSummary(
    name="mine",
    config=CONFIG,
    parameters=4_116_793_368,
    active_parameters=455_030_808,
    parts={"experts": 3_760_390_144, "output": 0},
    layer_parameters=(1_000, 2_000, 1_000, 2_000, 1_000, 3_000),
    layer_active_parameters=(1_000, 1_100, 1_000, 1_100, 1_000, 1_200),
    context=512,
    flops_per_token=1_110_000_000,
    sequence_length=256,
    micro_batch_size=4,
    training_flops_per_token=3_030_000_000,
    weights_bytes=3 * 2**30,
    training_state_bytes=24 * 2**30,
    optimizer="adamw",
    kv_cache_bytes_per_token=1024,
    activation_bytes=5 * 2**20,
    checkpointed_activation_bytes=2**20,
)


def rendered(summary: ModelSummary, width: int = 100) -> str:
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    console.print(render_model(summary))
    return console.export_text()


def test_equal_layers_are_one_row_each_with_the_sum_of_its_layers() -> None:
    lines = [line.split() for line in rendered(SUMMARY).splitlines()]
    assert ["0,", "2,", "4", "dense", "MLP", "of", "64", "3K", "3K"] in lines
    assert any(line[:4] == ["1,", "3", "4", "experts"] and line[-2:] == ["4K", "2.2K"] for line in lines)
    assert any(line[:3] == ["5", "8", "experts"] and line[-2:] == ["3K", "1.2K"] for line in lines)


def test_every_layer_is_in_exactly_one_row() -> None:
    groups = equal_layers(CONFIG)
    assert sorted(index for indices, _ in groups for index in indices) == list(range(6))
    assert all(CONFIG.layers[index] == layer for indices, layer in groups for index in indices)


def test_the_table_says_at_what_context_and_batch() -> None:
    text = rendered(SUMMARY)
    for part in (
        "4.12B",
        "455M",
        "1.11 GFLOP",
        "context of 512",
        "4 x 256 tokens",
        "4 heads of 4 over 2 key/value heads",
    ):
        assert part in text, part
    assert "512 KiB  of 512 tokens, 1.00 KiB each" in text
    assert "output" not in text, "a part that is not there has no row"


def test_latent_attention_says_what_its_cache_is_made_of() -> None:
    latent = {"kv_rank": 5, "nope_head_dim": 2, "rope_head_dim": 2, "value_head_dim": 3}
    config = CONFIG.replace(latent_attention=latent, num_kv_heads=CONFIG.num_heads)
    assert "4 heads of 4 over latents of 5" in rendered(replace(SUMMARY, config=config))


def test_a_window_is_said() -> None:
    config = CONFIG.replace(sliding_window=64)
    assert "4 heads of 4 over 2 key/value heads that see 64 positions, voc" in rendered(replace(SUMMARY, config=config))
    config = config.replace(sliding_layers=(0,))
    assert "that see 64 positions in layers 0, voc" in rendered(replace(SUMMARY, config=config), 200)


def test_the_layers_whose_heads_are_turned_are_said() -> None:
    for layers, said in (((0, 1, 2, 4), "0, 1, 2, 4"), ((0, 1, 2), "0-2"), ((), "none")):
        text = rendered(replace(SUMMARY, config=CONFIG.replace(rope_layers=layers)), 200)
        assert f"rotary positions up to {CONFIG.max_positions:,} in layers {said}\n" in text


@pytest.mark.parametrize("width", [60, 80, 200])
def test_no_number_is_cut_off_in_a_narrow_terminal(width: int) -> None:
    text = rendered(SUMMARY, width)
    assert "4,116,793,368" in text and "…" not in text


def test_json_holds_the_exact_numbers_and_every_layer() -> None:
    values = SUMMARY.to_json()
    assert values["parameters"] == 4_116_793_368 and values["active_parameters"] == 455_030_808
    assert values["memory"]["kv_cache_bytes"] == 512 * 1024
    assert [layer["kind"] for layer in values["layers"]] == ["dense", "moe"] * 3
    assert [layer["num_experts"] for layer in values["layers"]] == [0, 4, 0, 4, 0, 8]
    assert [layer["active_parameters"] for layer in values["layers"]] == list(SUMMARY.layer_active_parameters)


def test_a_dense_model_has_one_row() -> None:
    dense = replace(SUMMARY, config=CONFIG.replace(moe=None))
    assert "0-5" in rendered(dense)


@pytest.mark.parametrize(
    ("indices", "text"),
    [
        ((3,), "3"),
        ((0, 1), "0, 1"),
        ((0, 1, 2), "0-2"),
        ((1, 3, 5), "1, 3, 5"),
        ((1, 3, 5, 7, 9), "1, 3, ..., 9"),
        ((0, 1, 3, 4), "0, 1, 3, 4"),
    ],
)
def test_indices_in_short(indices: tuple[int, ...], text: str) -> None:
    assert describe_indices(indices) == text


def test_layers_in_words() -> None:
    assert describe_layer(FeedForwardConfig(intermediate_size=64)) == "dense MLP of 64"
    moe = FeedForwardConfig(intermediate_size=0, num_experts=1, top_k=1, expert_intermediate_size=8)
    assert describe_layer(moe) == "1 expert of 8, top-1"
    residual = moe.replace(num_experts=8, top_k=2, intermediate_size=64, residual="sum")
    assert describe_layer(residual) == "8 experts of 8, top-2, + residual MLP of 64 (summed)"


def test_quantities_keep_three_digits_and_never_a_thousand() -> None:
    assert describe_bytes(0) == "0 B"
    assert describe_bytes(999) == "999 B"
    assert describe_bytes(1024) == "1.00 KiB"
    assert describe_bytes(1023 * 1024) == "1.00 MiB"
    assert describe_bytes(24 * 2**30 + 2**29) == "24.5 GiB"
    assert describe_bytes(5000 * 2**50) == "5000 PiB"
    assert describe_flops(12) == "12 FLOP"
    assert describe_flops(999_499) == "999 kFLOP"
    assert describe_flops(999_500) == "1.00 MFLOP"
