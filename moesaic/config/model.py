"""The model's configuration: one Transformer, whose layers differ by data.

A Pyramid-Residual MoE is not a class here: `moe.num_experts` may name one count per MoE layer (pyramid) and
`moe.residual` adds a fixed MLP beside the experts. `ModelConfig.layers` resolves the pattern into one
`FeedForwardConfig` per layer, which is what the model, the cost formulas and the converters read.
"""

from functools import cached_property
from typing import Any, Literal

from pydantic import Field, TypeAdapter, ValidationError, model_validator

from moesaic.config.base import Config
from moesaic.errors import ConfigError

Activation = Literal["gelu", "gelu_tanh", "swiglu"]
ResidualMix = Literal["sum", "softmax", "sigmoid"]

_INTEGER = TypeAdapter(int)


class RouterConfig(Config):
    """How a layer's router chooses experts, weighs them and is kept balanced."""

    scoring: Literal["softmax", "sigmoid"] = "softmax"
    renormalize: bool = Field(
        default=False, description="divide the chosen weights by their sum (over the kept routes when tokens drop)"
    )
    scale: float = Field(default=1.0, gt=0, description="factor on all routing weights")
    num_groups: int = Field(default=1, ge=1, description="groups of experts, for group-limited choice")
    top_groups: int = Field(default=1, ge=1, description="groups a token may choose from")
    noise: Literal["none", "jitter", "rsample"] = Field(default="none", description="training only")
    jitter_epsilon: float = Field(default=1e-2, gt=0, lt=1)
    score_correction_bias: bool = Field(
        default=False, description="balance by a bias on the scores used for the choice, never on the weights"
    )
    score_correction_rate: float = Field(default=1e-3, gt=0)
    balance_loss: float = Field(default=0.01, ge=0, description="coefficient, summed over layers")
    balance_scope: Literal["batch", "global_batch"] = Field(
        default="batch", description="whether f_e counts the micro-batch or the whole step so far"
    )
    z_loss: float = Field(default=0.0, ge=0, description="coefficient, summed over layers")

    @model_validator(mode="after")
    def _check(self) -> "RouterConfig":
        if self.noise != "jitter":
            self._refuse_without_effect(
                "moe.router.jitter_epsilon", "jitter_epsilon", needs="moe.router.noise = jitter"
            )
        if not self.score_correction_bias:
            self._refuse_without_effect(
                "moe.router.score_correction_rate",
                "score_correction_rate",
                needs="moe.router.score_correction_bias = true",
            )
        if self.balance_loss == 0:
            self._refuse_without_effect(
                "moe.router.balance_scope", "balance_scope", needs="moe.router.balance_loss > 0"
            )
        if self.top_groups > self.num_groups:
            raise ConfigError(
                f"moe.router.top_groups ({self.top_groups}) is more than moe.router.num_groups ({self.num_groups}); "
                f"a token can choose from at most all groups; use top_groups <= {self.num_groups}."
            )
        return self


class CapacityConfig(Config):
    """How many tokens an expert takes in training. Evaluation and serving never drop."""

    factor: float | None = Field(default=None, gt=0, description="null: dropless")
    min_capacity: int = Field(default=4, ge=1)
    drop_policy: Literal["position", "probability", "random"] = "position"

    @model_validator(mode="after")
    def _check(self) -> "CapacityConfig":
        if self.factor is None:
            for name in ("min_capacity", "drop_policy"):
                self._refuse_without_effect(f"moe.capacity.{name}", name, needs="moe.capacity.factor (null: dropless)")
        return self


class MoEConfig(Config):
    """The pattern of the MoE layers. A value per MoE layer where a tuple is allowed; a single value is for all."""

    num_experts: int | tuple[int, ...]
    top_k: int | tuple[int, ...] = 1
    intermediate_size: int | tuple[int, ...] | None = Field(default=None, description="of an expert; null: the model's")
    every: int = Field(default=1, ge=1, description="MoE on every n-th layer, the n-th first")
    layers: tuple[int, ...] | None = Field(
        default=None, description="MoE on exactly these layers, counted from 0, instead of every n-th"
    )
    residual: ResidualMix | None = Field(default=None, description="a fixed MLP beside the experts, and how they mix")
    residual_intermediate_size: int | None = Field(default=None, ge=1, description="null: the model's")
    router: RouterConfig = RouterConfig()
    capacity: CapacityConfig = CapacityConfig()

    @model_validator(mode="after")
    def _check_pattern(self) -> "MoEConfig":
        if self.layers is not None and self.every != 1:
            raise ConfigError(
                f"moe.every ({self.every}) and moe.layers ({list(self.layers)}) are both given; one of them places the "
                f"MoE layers; set moe.every = 1 or moe.layers = null."
            )
        return self


class FeedForwardConfig(Config):
    """One layer's feed-forward part, resolved: a dense MLP, experts, or both (residual).

    `intermediate_size` is the dense MLP's (0 where there is none); `num_experts` is 0 for a dense layer.
    """

    intermediate_size: int = Field(ge=0)
    num_experts: int = Field(default=0, ge=0)
    top_k: int = Field(default=0, ge=0)
    expert_intermediate_size: int = Field(default=0, ge=0)
    residual: ResidualMix | None = None
    router: RouterConfig = RouterConfig()
    capacity: CapacityConfig = CapacityConfig()

    @property
    def is_moe(self) -> bool:
        return self.num_experts > 0


class ModelConfig(Config):
    """A pre-norm decoder. Enough for the paper's GPT-3-like models and for Llama-, Mixtral- and Qwen-like ones."""

    vocab_size: int = Field(ge=1)
    hidden_size: int = Field(ge=1)
    num_layers: int = Field(ge=1)
    num_heads: int = Field(ge=1)
    num_kv_heads: int = Field(default=None, ge=1, description="null: num_heads")  # type: ignore[assignment]
    head_dim: int = Field(default=None, ge=1, description="null: hidden_size / num_heads")  # type: ignore[assignment]
    intermediate_size: int = Field(default=None, ge=1, description="null: 4 * hidden_size")  # type: ignore[assignment]
    max_positions: int = Field(default=2048, ge=1, description="longest sequence, in tokens")
    positions: Literal["learned", "rotary"] = "rotary"
    rope_theta: float = Field(default=10_000.0, gt=0)
    norm: Literal["layernorm", "rmsnorm"] = "rmsnorm"
    norm_epsilon: float = Field(default=1e-5, gt=0)
    qk_norm: bool = Field(default=False, description="normalise queries and keys per head")
    attention_bias: Literal["none", "qkv", "all"] = "none"
    mlp_bias: bool = False
    activation: Activation = "swiglu"
    tie_embeddings: bool = True
    dropout: float = Field(default=0.0, ge=0, lt=1, description="on attention weights and block outputs, training only")
    init_std: float = Field(default=0.02, gt=0)
    moe: MoEConfig | None = None

    @model_validator(mode="before")
    @classmethod
    def _fill_derived(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        values = dict(values)
        hidden, heads = _integer(values.get("hidden_size")), _integer(values.get("num_heads"))
        if values.get("num_kv_heads") is None:
            values["num_kv_heads"] = heads
        if values.get("head_dim") is None and hidden and heads and hidden > 0 and heads > 0:
            if hidden % heads:
                raise ConfigError(
                    f"hidden_size ({hidden}) is not a multiple of num_heads ({heads}); without head_dim each head "
                    f"takes hidden_size / num_heads; use hidden_size = {hidden - hidden % heads or heads} or give "
                    f"head_dim."
                )
            values["head_dim"] = hidden // heads
        if values.get("intermediate_size") is None and hidden:
            values["intermediate_size"] = 4 * hidden
        return values

    @model_validator(mode="after")
    def _check(self) -> "ModelConfig":
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"num_heads ({self.num_heads}) is not a multiple of num_kv_heads ({self.num_kv_heads}); each key/value "
                f"head serves the same number of query heads; use num_kv_heads that divides {self.num_heads}."
            )
        if self.positions == "learned":
            self._refuse_without_effect("rope_theta", "rope_theta", needs="positions = rotary")
        if self.positions == "rotary" and self.head_dim % 2:
            raise ConfigError(
                f"head_dim ({self.head_dim}) is odd; rotary positions turn pairs of channels; use an even head_dim or "
                f"positions = learned."
            )
        _ = self.layers  # resolves the pattern, or fails here and not at step 900
        return self

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Indices of the MoE layers, counted from 0."""
        return tuple(index for index, layer in enumerate(self.layers) if layer.is_moe)

    @cached_property
    def layers(self) -> tuple[FeedForwardConfig, ...]:
        """One resolved feed-forward config per layer."""
        dense = FeedForwardConfig(intermediate_size=self.intermediate_size)
        if self.moe is None:
            return (dense,) * self.num_layers
        places = self._moe_places(self.moe)
        layers = [dense] * self.num_layers
        for order, index in enumerate(places):
            layers[index] = self._moe_layer(self.moe, order, len(places))
        return tuple(layers)

    def _moe_places(self, moe: MoEConfig) -> tuple[int, ...]:
        if moe.layers is None:
            places = tuple(range(moe.every - 1, self.num_layers, moe.every))
            if not places:
                raise ConfigError(
                    f"moe.every ({moe.every}) is more than num_layers ({self.num_layers}); there would be no MoE "
                    f"layer; use moe.every <= {self.num_layers}, or moe = null for a dense model."
                )
            return places
        wrong = [index for index in moe.layers if not 0 <= index < self.num_layers]
        if wrong or len(set(moe.layers)) != len(moe.layers) or not moe.layers:
            remedy = f"remove {wrong or 'the repeated ones'}" if moe.layers else "use moe = null for a dense model"
            raise ConfigError(
                f"moe.layers ({list(moe.layers)}) is not a choice of layers; at least one layer from 0 to "
                f"{self.num_layers - 1}, none twice, is required; {remedy}."
            )
        return tuple(sorted(moe.layers))

    def _moe_layer(self, moe: MoEConfig, order: int, num_moe_layers: int) -> FeedForwardConfig:
        def pick(name: str, value: int | tuple[int, ...]) -> int:
            if isinstance(value, int):
                chosen = value
            elif len(value) != num_moe_layers:
                raise ConfigError(
                    f"moe.{name} has {len(value)} values for {num_moe_layers} MoE layers; one value for all, or one "
                    f"for each MoE layer, is required; give {num_moe_layers}, or a single number."
                )
            else:
                chosen = value[order]
            if chosen < 1:
                raise ConfigError(
                    f"moe.{name} ({chosen}) of MoE layer {order} is less than 1; at least 1 is required; raise it, or "
                    f"use moe = null for a dense model."
                )
            return chosen

        num_experts, top_k = pick("num_experts", moe.num_experts), pick("top_k", moe.top_k)
        router = moe.router
        if top_k > num_experts:
            raise ConfigError(
                f"moe.top_k ({top_k}) is more than num_experts ({num_experts}) of MoE layer {order}; a token chooses "
                f"distinct experts; use top_k <= {num_experts}."
            )
        if top_k == 1 and router.renormalize:
            raise ConfigError(
                "moe.router.renormalize with top_k = 1 makes every routing weight 1, which cuts the router's gradient; "
                "a router needs a gradient to learn; use renormalize = false or top_k >= 2."
            )
        if router.num_groups > 1 and num_experts % router.num_groups:
            raise ConfigError(
                f"num_experts ({num_experts}) of MoE layer {order} is not a multiple of moe.router.num_groups "
                f"({router.num_groups}); groups are of equal size; use "
                f"{num_experts - num_experts % router.num_groups or router.num_groups} experts or another num_groups."
            )
        available = num_experts // router.num_groups * router.top_groups
        if top_k > available:
            raise ConfigError(
                f"moe.top_k ({top_k}) is more than the {available} experts of moe.router.top_groups "
                f"({router.top_groups}) groups; a token chooses inside its groups; raise top_groups or lower top_k."
            )
        expert_size = self.intermediate_size if moe.intermediate_size is None else moe.intermediate_size
        residual_size = moe.residual_intermediate_size or self.intermediate_size
        if moe.residual is None and moe.residual_intermediate_size is not None:
            raise ConfigError(
                f"moe.residual_intermediate_size ({moe.residual_intermediate_size}) is given but moe.residual is null; "
                f"there is no residual MLP for it; set moe.residual, or remove it."
            )
        return FeedForwardConfig(
            intermediate_size=residual_size if moe.residual else 0,
            num_experts=num_experts,
            top_k=top_k,
            expert_intermediate_size=pick("intermediate_size", expert_size),
            residual=moe.residual,
            router=router,
            capacity=moe.capacity,
        )


def _integer(value: Any) -> int | None:
    """Return what pydantic will read as an integer (1e3 and "1000" too), None for what it will refuse."""
    try:
        return _INTEGER.validate_python(value)
    except ValidationError:
        return None
