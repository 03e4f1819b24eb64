"""A model's config keeps our ModelConfig through transformers' files, and its attributes say the same."""

import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoConfig

from moesaic.config.model import ModelConfig
from moesaic.errors import ConfigError
from moesaic.hf import MoesaicConfig


def config_of(kind_values: dict) -> MoesaicConfig:
    return MoesaicConfig(ModelConfig(**kind_values), eos_token_id=3)


SMALL = {"vocab_size": 50, "hidden_size": 16, "num_layers": 2, "num_heads": 2, "moe": {"num_experts": [4, 8]}}


def test_survives_saving_and_loading(tmp_path: Path) -> None:
    config = config_of(SMALL)
    config.save_pretrained(tmp_path)
    for loaded in (AutoConfig.from_pretrained(tmp_path), MoesaicConfig.from_pretrained(tmp_path)):
        assert isinstance(loaded, MoesaicConfig)
        assert loaded.transformer_config() == ModelConfig(**SMALL)
        assert (loaded.vocab_size, loaded.num_hidden_layers, loaded.eos_token_id) == (50, 2, 3)
        assert (loaded.tie_word_embeddings, loaded.max_position_embeddings) == (True, 2048)
        assert loaded.get_text_config() is loaded
        assert not loaded.auto_map and "auto_map" not in loaded.to_dict()  # TRL reads it of a model given as a path


def test_takes_a_dict_and_fills_it_in() -> None:
    config = MoesaicConfig(model=SMALL)
    assert config.num_key_value_heads == config.model["num_kv_heads"] == 2
    assert MoesaicConfig(**config.to_dict()).to_dict() == config.to_dict()


def test_refuses_what_is_no_model() -> None:
    with pytest.raises(ConfigError, match="was given no `model`"):
        MoesaicConfig()
    with pytest.raises(ConfigError, match=r"model\.num_layer is not a key of ModelConfig.*did you mean num_layers"):
        MoesaicConfig(model={**SMALL, "num_layer": 3})


@pytest.mark.parametrize(("name", "value"), [("vocab_size", 51), ("tie_word_embeddings", False)])
def test_refuses_attributes_that_the_model_does_not_have(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"{name} \({value}\) is not what the model has.*set model\."):
        MoesaicConfig(SMALL, **{name: value})
    config = MoesaicConfig(SMALL)
    setattr(config, name, value)
    with pytest.raises(ConfigError, match=rf"{name} \({value}\) is not what the model has"):
        config.transformer_config()


@pytest.mark.parametrize(
    ("stub", "wanted"),
    [
        ("sys.modules['transformers'] = None", "transformers cannot be"),
        ("import types; sys.modules['transformers'] = types.SimpleNamespace(__version__='4.57.6')", "5.0 or later"),
    ],
)
def test_says_what_to_install(stub: str, wanted: str) -> None:
    code = f"""
import sys
{stub}
from moesaic.errors import InstallationError
try:
    import moesaic.hf
except InstallationError as error:
    print(error)
"""
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert wanted in printed and "pip install 'moesaic[huggingface]'" in printed
