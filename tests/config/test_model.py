"""The model's pattern of layers, and every combination of its values that is refused."""

from typing import Any

import pytest

from moesaic.config.model import CapacityConfig, FeedForwardConfig, ModelConfig, MoEConfig, RouterConfig
from moesaic.errors import ConfigError

SIZES: dict[str, Any] = {"vocab_size": 64, "hidden_size": 24, "num_layers": 6, "num_heads": 4}


def model(moe: dict[str, Any] | None = None, **values: Any) -> ModelConfig:
    return ModelConfig(**{**SIZES, **values, "moe": moe})


def test_derived_sizes() -> None:
    config = model()
    assert (config.num_kv_heads, config.head_dim, config.intermediate_size) == (4, 6, 96)
    given = model(num_kv_heads=2, head_dim=10, intermediate_size=50)
    assert (given.num_kv_heads, given.head_dim, given.intermediate_size) == (2, 10, 50)


@pytest.mark.parametrize("hidden", [1e3, "1000", 1000])
def test_derived_sizes_from_any_spelling_of_the_number(hidden: Any) -> None:
    config = model(hidden_size=hidden)
    assert (config.hidden_size, config.head_dim, config.intermediate_size) == (1000, 250, 4000)


def test_of_latent_attention_only_the_turned_channels_come_in_pairs() -> None:
    latent = {"kv_rank": 8, "nope_head_dim": 5, "rope_head_dim": 4, "value_head_dim": 3}
    assert model(None, latent_attention=latent).head_dim == 9


def test_a_dense_model_has_only_dense_layers() -> None:
    config = model()
    assert config.moe_layers == ()
    assert {(layer.intermediate_size, layer.num_experts, layer.top_k) for layer in config.layers} == {(96, 0, 0)}


def test_moe_on_every_nth_layer_the_nth_first() -> None:
    assert model({"num_experts": 4}).moe_layers == (0, 1, 2, 3, 4, 5)
    assert model({"num_experts": 4, "every": 2}).moe_layers == (1, 3, 5)
    assert model({"num_experts": 4, "every": 4}).moe_layers == (3,)


def test_moe_on_named_layers() -> None:
    config = model({"num_experts": [2, 8], "layers": [1, 4]})
    assert config.moe_layers == (1, 4)
    assert [config.layers[index].num_experts for index in (1, 4)] == [2, 8]


def test_a_pyramid_gives_each_moe_layer_its_own_values() -> None:
    config = model({"num_experts": [2, 4, 8], "top_k": [1, 1, 2], "intermediate_size": [48, 24, 12], "every": 2})
    layers = [config.layers[index] for index in config.moe_layers]
    assert [layer.num_experts for layer in layers] == [2, 4, 8]
    assert [layer.top_k for layer in layers] == [1, 1, 2]
    assert [layer.expert_intermediate_size for layer in layers] == [48, 24, 12]
    assert [layer.intermediate_size for layer in layers] == [0, 0, 0], "no dense MLP without residual"


def test_windows_of_all_layers_and_of_some() -> None:
    assert [model(None).window_of(layer) for layer in range(2)] == [None, None]
    assert [model(None, sliding_window=5).window_of(layer) for layer in range(2)] == [5, 5]
    assert [model(None, sliding_window=5, sliding_layers=[1]).window_of(layer) for layer in range(2)] == [None, 5]


def test_heads_are_turned_in_all_layers_or_in_some() -> None:
    assert [model(None).is_rotated(layer) for layer in range(3)] == [True, True, True]
    assert [model(None, rope_layers=[0, 2]).is_rotated(layer) for layer in range(3)] == [True, False, True]
    assert [model(None, rope_layers=[]).is_rotated(layer) for layer in range(3)] == [False, False, False]
    assert not model(None, positions="learned").is_rotated(0)


def test_a_residual_layer_has_both() -> None:
    layer = model({"num_experts": 4, "residual": "sum"}).layers[0]
    assert (layer.intermediate_size, layer.expert_intermediate_size) == (96, 96)
    layer = model({"num_experts": 4, "residual": "sigmoid", "residual_intermediate_size": 7}).layers[0]
    assert (layer.intermediate_size, layer.expert_intermediate_size) == (7, 96)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "heads do not divide the width": ({"num_heads": 5}, "hidden_size (24)"),
    "kv heads do not divide the heads": ({"num_kv_heads": 3}, "num_heads (4)"),
    "odd head with rotary": ({"head_dim": 5}, "head_dim (5)"),
    "rope_theta without rotary": ({"positions": "learned", "rope_theta": 5.0}, "rope_theta (5.0)"),
    "part of a head, odd": ({"rope_head_dim": 3}, "rope_head_dim (3)"),
    "more than a head": ({"rope_head_dim": 8}, "rope_head_dim (8)"),
    "part of a head without rotary": ({"positions": "learned", "rope_head_dim": 4}, "rope_head_dim (4)"),
    "heads normed after a rotation that is not": (
        {"positions": "learned", "qk_norm": "rotated_head"},
        "qk_norm (rotated_head)",
    ),
    "turned layers out of range": ({"rope_layers": [1, 6]}, "rope_layers ([1, 6])"),
    "turned layers that do not rise": ({"rope_layers": [2, 1]}, "rope_layers ([2, 1])"),
    "a turned layer that is none": ({"rope_layers": [-1]}, "0 to 5, rising, none twice, are required; use rope_layers"),
    "turned layers without rotary": ({"positions": "learned", "rope_layers": [1]}, "rope_layers ((1,))"),
    "latents turned in some layers": (
        {
            "rope_layers": [1],
            "latent_attention": {"kv_rank": 4, "nope_head_dim": 4, "rope_head_dim": 2, "value_head_dim": 4},
        },
        "rope_layers ((1,))",
    ),
    "sliding layers without a window": ({"sliding_layers": [0]}, "sliding_layers ((0,))"),
    "sliding layers out of range": ({"sliding_window": 4, "sliding_layers": [1, 6]}, "sliding_layers ([1, 6])"),
    "sliding layers that do not rise": ({"sliding_window": 4, "sliding_layers": [2, 1]}, "sliding_layers ([2, 1])"),
    "no sliding layers": ({"sliding_window": 4, "sliding_layers": []}, "sliding_layers ([])"),
    "a window on latents": (
        {
            "sliding_window": 4,
            "num_kv_heads": 4,
            "latent_attention": {"kv_rank": 4, "nope_head_dim": 4, "rope_head_dim": 2, "value_head_dim": 4},
        },
        "sliding_window (4)",
    ),
    "no layer to place": ({"moe": {"num_experts": 4, "every": 7}}, "moe.every (7)"),
    "two placements": ({"moe": {"num_experts": 4, "every": 2, "layers": [1]}}, "moe.every (2)"),
    "layer out of range": ({"moe": {"num_experts": 4, "layers": [1, 6]}}, "moe.layers ([1, 6])"),
    "layer below zero": ({"moe": {"num_experts": 4, "layers": [-1]}}, "moe.layers ([-1])"),
    "layer twice": ({"moe": {"num_experts": 4, "layers": [1, 1]}}, "moe.layers ([1, 1])"),
    "layers that do not rise": (
        {"moe": {"num_experts": [2, 8], "layers": [4, 1]}},
        "moe.layers ([4, 1]) does not rise",
    ),
    "no layers": ({"moe": {"num_experts": 4, "layers": []}}, "moe.layers ([])"),
    "counts for other layers": ({"moe": {"num_experts": [4, 4], "every": 2}}, "moe.num_experts has 2 values"),
    "no counts": ({"moe": {"num_experts": []}}, "moe.num_experts has 0 values"),
    "no experts": ({"moe": {"num_experts": 0}}, "moe.num_experts (0)"),
    "negative experts in a pyramid": (
        {"moe": {"num_experts": [4, -4], "every": 3}},
        "moe.num_experts (-4) of layer 5 ",
    ),
    "top_k beyond the experts": ({"moe": {"num_experts": 4, "top_k": 5}}, "moe.top_k (5)"),
    "top_k of zero": ({"moe": {"num_experts": 4, "top_k": 0}}, "moe.top_k (0)"),
    "renormalised top-1": ({"moe": {"num_experts": 4, "router": {"renormalize": True}}}, "moe.router.renormalize"),
    "uneven groups": (
        {"moe": {"num_experts": 6, "top_k": 2, "router": {"num_groups": 4, "top_groups": 2}}},
        "num_experts (6)",
    ),
    "more groups than experts": ({"moe": {"num_experts": 2, "router": {"num_groups": 4}}}, "num_experts (2)"),
    "groups too small for top_k": (
        {"moe": {"num_experts": 8, "top_k": 3, "router": {"num_groups": 4, "top_groups": 1}}},
        "moe.top_k (3)",
    ),
    "more groups chosen than there are": (
        {"moe": {"num_experts": 8, "router": {"num_groups": 2, "top_groups": 3}}},
        "moe.router.top_groups (3)",
    ),
    "a residual size without residual": (
        {"moe": {"num_experts": 4, "residual_intermediate_size": 8}},
        "moe.residual_intermediate_size (8)",
    ),
    "jitter size without jitter": (
        {"moe": {"num_experts": 4, "router": {"jitter_epsilon": 0.5}}},
        "moe.router.jitter_epsilon (0.5)",
    ),
    "bias rate without bias": (
        {"moe": {"num_experts": 4, "router": {"score_correction_rate": 0.5}}},
        "moe.router.score_correction_rate (0.5)",
    ),
    "scope of no loss": (
        {"moe": {"num_experts": 4, "router": {"balance_loss": 0, "balance_scope": "global_batch"}}},
        "moe.router.balance_scope (global_batch)",
    ),
    "drop policy of a dropless layer": (
        {"moe": {"num_experts": 4, "capacity": {"drop_policy": "random"}}},
        "moe.capacity.drop_policy (random)",
    ),
    "minimum capacity of a dropless layer": (
        {"moe": {"num_experts": 4, "capacity": {"min_capacity": 9}}},
        "moe.capacity.min_capacity (9)",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_the_value_the_requirement_and_the_remedy(case: str) -> None:
    values, given = REFUSED[case]
    with pytest.raises(ConfigError) as caught:
        ModelConfig(**{**SIZES, **values})
    message = str(caught.value)
    assert given in message
    assert message.count(";") >= 2 and message.endswith("."), message
    assert "use 0 " not in message, "a remedy must be possible"


def test_the_same_settings_are_accepted_where_they_have_an_effect() -> None:
    RouterConfig(noise="jitter", jitter_epsilon=0.5)
    RouterConfig(score_correction_bias=True, score_correction_rate=0.5)
    RouterConfig(balance_scope="global_batch")
    CapacityConfig(factor=1.0, drop_policy="random", min_capacity=1)
    model(positions="learned", head_dim=5)
    MoEConfig(num_experts=4, layers=(1,))
    model({"num_experts": 8, "top_k": 2, "router": {"renormalize": True, "num_groups": 4, "top_groups": 1}})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"top_k": 0}, r"^top_k \(0\) was given for a layer with 4 experts; at least 1 .*; give .*\(top_k=VALUE\)"),
        ({"expert_intermediate_size": 0}, r"expert_intermediate_size \(0\) was given for a layer with 4 experts"),
        ({"top_k": 5}, r"top_k \(5\) is more than num_experts \(4\); .*; use top_k <= 4"),
        ({"top_k": 1, "router": RouterConfig(renormalize=True)}, "makes every routing weight 1"),
        ({"router": RouterConfig(num_groups=3)}, r"num_experts \(4\) is not a multiple of moe.router.num_groups \(3\)"),
        ({"router": RouterConfig(num_groups=4)}, r"more than the 1 experts of moe.router.top_groups \(1\) groups"),
    ],
)
def test_a_layer_of_ones_own_is_checked_too(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FeedForwardConfig(**{"num_experts": 4, "top_k": 2, "expert_intermediate_size": 8, **values})


def test_what_a_layers_experts_need_is_named_at_once() -> None:
    needed = r"^no top_k and no expert_intermediate_size was given for a layer with 4 experts; .*; give Feed\w+\(top_k="
    with pytest.raises(ConfigError, match=needed):
        FeedForwardConfig(num_experts=4)


@pytest.mark.parametrize(
    "values",
    [{"top_k": 2}, {"expert_intermediate_size": 8}, {"residual": "sum"}, {"router": RouterConfig(renormalize=True)},
     {"capacity": CapacityConfig(factor=1.0)}, {"output_scale": True}],
)  # fmt: skip
def test_what_is_said_of_experts_needs_experts(values: dict[str, Any]) -> None:
    (name,) = values
    with pytest.raises(ConfigError, match=rf"^{name} was given for a layer without experts; .*num_experts=VALUE"):
        FeedForwardConfig(intermediate_size=8, **values)
