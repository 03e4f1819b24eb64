"""Every config is frozen, refuses what it does not know, and says why in three parts."""

import copy
import pickle

import pytest
from pydantic import ValidationError

from moesaic.config.base import OTHER_NAMES, _paths
from moesaic.config.model import CapacityConfig, FeedForwardConfig, ModelConfig, MoEConfig, RouterConfig
from moesaic.config.serve import EngineConfig, Sampling, ServerConfig
from moesaic.config.train import DataConfig, OptimizerConfig, ScheduleConfig, TrainConfig
from moesaic.errors import ConfigError

MODEL = ModelConfig(vocab_size=64, hidden_size=16, num_layers=2, num_heads=2)


def test_configs_are_frozen_hashable_and_copy_as_equals() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        MODEL.hidden_size = 32
    assert len({MODEL, copy.deepcopy(MODEL), pickle.loads(pickle.dumps(MODEL))}) == 1


def test_replace_validates_the_whole_again() -> None:
    assert MODEL.replace(num_layers=5).num_layers == 5
    assert len(MODEL.replace(num_layers=5).layers) == 5, "resolved layers must not be carried over"
    assert MODEL.num_layers == 2
    with pytest.raises(ConfigError, match="num_kv_heads"):
        MODEL.replace(num_kv_heads=3)
    with pytest.raises(ConfigError, match="did you mean num_layers"):
        MODEL.replace(num_layer=3)


def test_replace_keeps_derived_values_unless_told_to_derive_again() -> None:
    assert MODEL.replace(hidden_size=32).intermediate_size == 64
    again = MODEL.replace(hidden_size=32, intermediate_size=None, head_dim=None)
    assert (again.intermediate_size, again.head_dim) == (128, 16)


def test_unknown_keys_are_named_with_their_path_and_the_nearest_names() -> None:
    values = {"model": {**MODEL.to_dict(), "moe": {"num_expert": 8, "num_experts": 8}}, "data": {"path": "x"}}
    with pytest.raises(ConfigError) as caught:
        TrainConfig.from_dict({**values, "tokens": 10, "zzz": 1})
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("model.moe.num_expert is not a key of MoEConfig;")
    assert "did you mean num_experts" in lines[0]
    assert lines[1].startswith("zzz is not a key of TrainConfig;")
    assert "use one of" in lines[1] and "batch_size" in lines[1]


def test_keys_of_other_sections_and_of_other_tools_are_led_to_ours() -> None:
    values = {"model": {**MODEL.to_dict(), "moe": {"num_experts": 8, "num_shared_experts": 1}}, "data": {"path": "x"}}
    with pytest.raises(ConfigError) as caught:
        TrainConfig.from_dict({**values, "tokens": 10, "lr": 1e-3, "sequence_length": 64, "ffn_hidden_size": 32})
    lines = {line.partition(" ")[0]: line for line in str(caught.value).splitlines()}
    assert "did you mean model.moe.residual_intermediate_size?" in lines["model.moe.num_shared_experts"]
    assert "did you mean schedule.learning_rate?" in lines["lr"]
    assert "did you mean data.sequence_length?" in lines["sequence_length"]
    assert "did you mean model.intermediate_size or model.moe.intermediate_size?" in lines["ffn_hidden_size"]


def test_other_tools_names_lead_to_keys_that_exist() -> None:
    ours = {path.rpartition(".")[2] for path in _paths(TrainConfig)}
    assert set(OTHER_NAMES.values()) <= ours
    assert not set(OTHER_NAMES) & ours


def test_every_mistake_is_reported_at_once_and_only_the_mistakes() -> None:
    with pytest.raises(ConfigError) as caught:
        ModelConfig(vocab_size=64, hidden_size="wide", num_layers=0)
    text = str(caught.value)
    assert "num_heads is missing" in text
    assert "hidden_size ('wide'): an integer is required" in text
    assert "num_layers (0)" in text
    assert "head_dim" not in text and "num_kv_heads" not in text, "derived values are not the mistake"


def test_the_remedy_is_where_the_values_come_from() -> None:
    values = {"vocab_size": 64, "hidden_size": 16, "num_layers": 2, "num_heads": 2, "moe": {"top_k": 1}}
    with pytest.raises(ConfigError, match=r"set it in the YAML file or with --set model\.moe\.num_experts=VALUE\.$"):
        ModelConfig.from_dict(values, path="model")
    with pytest.raises(ConfigError, match=r"moe\.num_experts is missing; .*; give MoEConfig\(num_experts=VALUE\)\.$"):
        ModelConfig(**values)
    with pytest.raises(ConfigError, match=r"top_k \(-1\): .*; give FeedForwardConfig\(top_k=VALUE\)\.$"):
        FeedForwardConfig(num_experts=4, top_k=-1)


def test_a_value_of_the_wrong_kind_says_what_is_allowed() -> None:
    with pytest.raises(ConfigError, match=r"'sum', 'softmax' or 'sigmoid' or null"):
        MoEConfig(num_experts=4, residual="product")
    with pytest.raises(ConfigError, match="an integer is required or a list is required"):
        MoEConfig(num_experts="many")
    with pytest.raises(ConfigError, match="finite"):
        ScheduleConfig(learning_rate=float("inf"))
    with pytest.raises(ConfigError, match="model is 3; a mapping of keys"):
        ModelConfig.from_dict(3, path="model")


def test_true_is_no_number() -> None:
    for kind, name in ((EngineConfig, "max_sequences"), (ServerConfig, "drain_seconds"), (Sampling, "n")):
        with pytest.raises(ConfigError, match=rf"^{name} \(True\): an? (integer|number) is required"):
            kind.from_dict({name: True})
    with pytest.raises(ConfigError, match=r"^kv_cache_bytes \(False\): "):
        EngineConfig(kv_cache_bytes=False)
    for kind in (EngineConfig, ServerConfig, Sampling, ModelConfig, MoEConfig, TrainConfig, OptimizerConfig):
        for name, field in kind.model_fields.items():
            if "int" in (named := str(field.annotation)) and "bool" not in named and "tuple" not in named:
                with pytest.raises(ConfigError, match=rf"(^|\n){name} \(True\)"):
                    kind.from_dict({name: True})
    assert EngineConfig(prefix_caching=False, max_sequences=1).max_sequences == 1


def test_every_section_round_trips_through_plain_values() -> None:
    for config in (
        RouterConfig(noise="jitter", jitter_epsilon=0.1),
        CapacityConfig(factor=1.25, drop_policy="random"),
        MoEConfig(num_experts=(4, 8), top_k=(1, 2)),
        DataConfig(path="x"),
        OptimizerConfig(name="muon", momentum=0.9),
        MODEL,
    ):
        assert type(config).from_dict(config.to_dict()) == config
