"""A ModelConfig in the clothes of transformers' configuration."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

from transformers import PreTrainedConfig

from moesaic.config.model import ModelConfig
from moesaic.errors import ConfigError


class MoesaicConfig(PreTrainedConfig):
    """`model` is a ModelConfig as a dict; vocab_size, hidden_size and the like are derived from it, for transformers.

    Change a model by its `model`: a derived attribute that says something else is refused.
    """

    model_type = "moesaic"
    keys_to_ignore_at_inference = ["cache", "past_key_values", "aux_loss"]  # noqa: RUF012
    has_no_defaults_at_init = True
    # Of code on a hub there is none; TRL reads the attribute of any config whose class is not transformers' own.
    auto_map: ClassVar[Mapping[str, str]] = MappingProxyType({})

    def __init__(
        self,
        model: ModelConfig | Mapping[str, Any] | None = None,
        *,
        bos_token_id: int | None = None,
        eos_token_id: int | list[int] | None = None,
        pad_token_id: int | None = None,
        use_cache: bool = True,
        **kwargs: Any,
    ) -> None:
        """Raises: ConfigError for a `model` that ModelConfig refuses, or derived attributes that differ from it."""
        if model is None:
            raise ConfigError(
                "MoesaicConfig was given no `model`; the keys of a ModelConfig are required there; use "
                "MoesaicConfig(model=ModelConfig(...)), or a folder that save_pretrained has written."
            )
        config = model if isinstance(model, ModelConfig) else ModelConfig.from_dict(model, path="model")
        derived = _derived(config)
        given = {name: kwargs.pop(name) for name in derived if name in kwargs}
        super().__init__(**kwargs)
        self.model = config.to_dict()
        for name, value in {**derived, **given}.items():
            setattr(self, name, value)
        self.bos_token_id, self.eos_token_id, self.pad_token_id = bos_token_id, eos_token_id, pad_token_id
        self.use_cache = use_cache
        self.transformer_config()

    def transformer_config(self) -> ModelConfig:
        """Return `model` as a ModelConfig, checked once more: any attribute of a config may have been set.

        Raises: ConfigError.
        """
        config = ModelConfig.from_dict(self.model, path="model")
        for name, (key, value) in _derived_from(config).items():
            given = getattr(self, name)
            if given != value:
                raise ConfigError(
                    f"{name} ({given}) is not what the model has, {key} ({value}); transformers' attributes follow "
                    f"`model`; set model.{key} instead."
                )
        return config


def _derived(config: ModelConfig) -> dict[str, Any]:
    return {name: value for name, (_, value) in _derived_from(config).items()}


def _derived_from(config: ModelConfig) -> dict[str, tuple[str, Any]]:
    """Return transformers' name -> our key and its value."""
    names = {
        "vocab_size": "vocab_size",
        "hidden_size": "hidden_size",
        "intermediate_size": "intermediate_size",
        "num_hidden_layers": "num_layers",
        "num_attention_heads": "num_heads",
        "num_key_value_heads": "num_kv_heads",
        "head_dim": "head_dim",
        "max_position_embeddings": "max_positions",
        "initializer_range": "init_std",
        "tie_word_embeddings": "tie_embeddings",
    }
    return {name: (key, getattr(config, key)) for name, key in names.items()}
