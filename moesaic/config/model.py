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

Activation = Literal["gelu", "gelu_tanh", "swiglu", "swiglu_oai"]
QkNorm = Literal["none", "head", "rotated_head", "full"]
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
    bias: bool = Field(default=False, description="a learned bias on the router's logits")
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


class RopeScalingConfig(Config):
    """How rotary frequencies are changed so that a model reaches further than the sequences it was trained on.

    Source: linear, position interpolation (arXiv 2306.15595); yarn (arXiv 2309.00071); llama3, as Llama 3.1 does.
    """

    kind: Literal["linear", "llama3", "yarn"]
    factor: float = Field(ge=1)
    original_max_positions: int | None = Field(default=None, ge=1, description="llama3 and yarn: before the scaling")
    low_frequency_factor: float = Field(default=1.0, gt=0, description="llama3")
    high_frequency_factor: float = Field(default=4.0, gt=0, description="llama3")
    beta_fast: float = Field(default=32.0, gt=0, description="yarn")
    beta_slow: float = Field(default=1.0, gt=0, description="yarn")
    truncate: bool = Field(default=True, description="yarn: round the bounds of the ramp to whole channels")
    attention_factor: float | None = Field(
        default=None, gt=0, description="yarn: on cosines and sines; null: 0.1 ln(factor) + 1"
    )

    @model_validator(mode="after")
    def _check(self) -> "RopeScalingConfig":
        if self.kind == "linear":
            self._refuse("original_max_positions", needs="llama3 or yarn")
        elif self.original_max_positions is None:
            raise ConfigError(
                f"rope_scaling.kind ({self.kind}) needs rope_scaling.original_max_positions, the positions that the "
                f"model was trained on before the scaling; it is null; set it."
            )
        if self.kind != "llama3":
            for name in ("low_frequency_factor", "high_frequency_factor"):
                self._refuse(name, needs="llama3")
        elif self.high_frequency_factor <= self.low_frequency_factor:
            raise ConfigError(
                f"rope_scaling.high_frequency_factor ({self.high_frequency_factor}) is not more than "
                f"rope_scaling.low_frequency_factor ({self.low_frequency_factor}); frequencies between the two are "
                f"blended; swap them."
            )
        if self.kind != "yarn":
            for name in ("beta_fast", "beta_slow", "truncate", "attention_factor"):
                self._refuse(name, needs="yarn")
        elif self.beta_fast < self.beta_slow:
            raise ConfigError(
                f"rope_scaling.beta_fast ({self.beta_fast}) is less than rope_scaling.beta_slow ({self.beta_slow}); "
                f"rotations between the two are blended; swap them."
            )
        return self

    def _refuse(self, name: str, *, needs: str) -> None:
        self._refuse_without_effect(f"rope_scaling.{name}", name, needs=f"rope_scaling.kind = {needs}")


class LatentAttentionConfig(Config):
    """Multi-head latent attention: keys and values of all heads are made from one small vector per token.

    That vector and one rotary key are all that the cache holds. Source: DeepSeek-V2 (arXiv 2405.04434), section 2.1.
    """

    query_rank: int | None = Field(default=None, ge=1, description="null: queries straight from the hidden state")
    kv_rank: int = Field(ge=1, description="size of the vector that keys and values are made from")
    nope_head_dim: int = Field(ge=1, description="channels of a head's query and key without positions")
    rope_head_dim: int = Field(ge=2, description="channels of a head's query, and of the one key, that are turned")
    value_head_dim: int = Field(ge=1)
    norm_epsilon: float = Field(default=1e-6, gt=0, description="of the norms of the small vectors")

    @model_validator(mode="after")
    def _check(self) -> "LatentAttentionConfig":
        if self.rope_head_dim % 2:
            raise ConfigError(
                f"latent_attention.rope_head_dim ({self.rope_head_dim}) is odd; rotary positions turn pairs of "
                f"channels; use an even one."
            )
        return self


class MoEConfig(Config):
    """The pattern of the MoE layers. A value per MoE layer where a tuple is allowed; a single value is for all."""

    num_experts: int | tuple[int, ...]
    top_k: int | tuple[int, ...] = 1
    intermediate_size: int | tuple[int, ...] | None = Field(default=None, description="of an expert; null: the model's")
    every: int = Field(default=1, ge=1, description="MoE on every n-th layer, the n-th first")
    layers: tuple[int, ...] | None = Field(
        default=None, description="MoE on exactly these layers, rising, counted from 0, instead of every n-th"
    )
    residual: ResidualMix | None = Field(default=None, description="a fixed MLP beside the experts, and how they mix")
    residual_intermediate_size: int | None = Field(default=None, ge=1, description="null: the model's")
    output_scale: bool = Field(
        default=False, description="a learned factor on the experts' output of each layer (0 after upcycling)"
    )
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

    intermediate_size: int = Field(default=0, ge=0)
    num_experts: int = Field(default=0, ge=0)
    top_k: int = Field(default=0, ge=0)
    expert_intermediate_size: int = Field(default=0, ge=0)
    residual: ResidualMix | None = None
    output_scale: bool = False
    router: RouterConfig = RouterConfig()
    capacity: CapacityConfig = CapacityConfig()

    @model_validator(mode="after")
    def _check(self) -> "FeedForwardConfig":
        if not self.is_moe:
            self._refuse_of_experts()
            return self
        num_experts, top_k, router = self.num_experts, self.top_k, self.router
        missing = [name for name in ("top_k", "expert_intermediate_size") if getattr(self, name) < 1]
        if missing:
            shown = [
                f"{name} ({getattr(self, name)})" if name in self.model_fields_set else f"no {name}" for name in missing
            ]
            raise ConfigError(
                f"{' and '.join(shown)} was given for a layer with {num_experts} experts; at least 1 is required; "
                f"give FeedForwardConfig({', '.join(f'{name}=VALUE' for name in missing)})."
            )
        if top_k > num_experts:
            raise ConfigError(
                f"moe.top_k ({top_k}) is more than num_experts ({num_experts}); a token chooses distinct experts; use "
                f"top_k <= {num_experts}."
            )
        if top_k == 1 and router.renormalize:
            raise ConfigError(
                "moe.router.renormalize with top_k = 1 makes every routing weight 1, which cuts the router's gradient; "
                "a router needs a gradient to learn; use renormalize = false or top_k >= 2."
            )
        if router.num_groups > 1 and num_experts % router.num_groups:
            raise ConfigError(
                f"num_experts ({num_experts}) is not a multiple of moe.router.num_groups ({router.num_groups}); groups "
                f"are of equal size; use "
                f"{num_experts - num_experts % router.num_groups or router.num_groups} experts or another num_groups."
            )
        available = num_experts // router.num_groups * router.top_groups
        if top_k > available:
            raise ConfigError(
                f"moe.top_k ({top_k}) is more than the {available} experts of moe.router.top_groups "
                f"({router.top_groups}) groups; a token chooses inside its groups; raise top_groups or lower top_k."
            )
        return self

    def _refuse_of_experts(self) -> None:
        """Raise ConfigError where something is said of the experts of a layer that has none."""
        fields = type(self).model_fields
        given = [
            name
            for name in ("top_k", "expert_intermediate_size", "residual", "output_scale", "router", "capacity")
            if getattr(self, name) != fields[name].default
        ]
        if given:
            raise ConfigError(
                f"{' and '.join(given)} was given for a layer without experts; they are of its experts and have no "
                f"effect here; give FeedForwardConfig(num_experts=VALUE) too, or leave them out."
            )

    @property
    def is_moe(self) -> bool:
        return self.num_experts > 0


class ModelConfig(Config):
    """A decoder. Enough for the paper's GPT-3-like models and for Llama-, Mixtral- and Qwen-like ones."""

    vocab_size: int = Field(ge=1)
    hidden_size: int = Field(ge=1)
    num_layers: int = Field(ge=1, le=10_000)  # each is an object here, long before it is a matrix
    num_heads: int = Field(ge=1)
    num_kv_heads: int = Field(default=None, ge=1, description="null: num_heads")  # type: ignore[assignment]
    head_dim: int = Field(default=None, ge=1, description="null: hidden_size / num_heads")  # type: ignore[assignment]
    intermediate_size: int = Field(default=None, ge=1, description="null: 4 * hidden_size")  # type: ignore[assignment]
    max_positions: int = Field(default=2048, ge=1, le=2**24, description="longest sequence, in tokens")
    positions: Literal["learned", "rotary"] = "rotary"
    rope_theta: float = Field(default=10_000.0, gt=0)
    rope_scaling: RopeScalingConfig | None = None
    rope_head_dim: int | None = Field(
        default=None, description="channels of a head that are turned, half of them in each half; null: all"
    )
    rope_layers: tuple[int, ...] | None = Field(
        default=None,
        description="the layers whose heads are turned, rising, counted from 0; in the others positions tell by what "
        "a token may see alone; null: all",
    )
    norm: Literal["layernorm", "rmsnorm"] = "rmsnorm"
    norm_epsilon: float = Field(default=1e-5, gt=0)
    norm_place: Literal["before", "behind"] = Field(
        default="before",
        description="of attention and feed-forward parts: on what goes in, or (OLMo 2) on what comes out and is added",
    )
    qk_norm: QkNorm = Field(
        default="none",
        description="RMSNorm of queries and keys: of each head before its rotation (Qwen3) or after it (Hunyuan), or "
        "of all together before it (OLMoE)",
    )
    attention_bias: Literal["none", "qkv", "all"] = "none"
    attention_scale: float | None = Field(
        default=None, gt=0, description="on the products of queries and keys; null: 1 / sqrt(head_dim)"
    )
    embedding_scale: float = Field(default=1.0, gt=0, description="factor on the tokens' embeddings")
    residual_scale: float = Field(
        default=1.0, gt=0, description="factor on what attention and feed-forward parts add to the residual stream"
    )
    logits_scale: float = Field(
        default=1.0, gt=0, description="factor on the logits, and so on the hidden states that they are made of"
    )
    attention_sinks: bool = Field(
        default=False, description="a learned score per head that takes its part of the softmax and has no value"
    )
    sliding_window: int | None = Field(
        default=None, ge=1, description="the positions that a token sees, its own the last of them; null: all up to it"
    )
    sliding_layers: tuple[int, ...] | None = Field(
        default=None, description="the layers with the window, rising, counted from 0; null: all"
    )
    latent_attention: LatentAttentionConfig | None = None
    mlp_bias: bool = False
    activation: Activation = Field(
        default="swiglu", description="of swiglu_oai, gpt-oss's, gate and up are clamped to 7, and up has 1 added"
    )
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
        latent = values.get("latent_attention")
        if values.get("head_dim") is None and latent is not None:
            read = latent.model_dump() if isinstance(latent, LatentAttentionConfig) else latent
            if isinstance(read, dict):
                nope, rope = _integer(read.get("nope_head_dim")), _integer(read.get("rope_head_dim"))
                values["head_dim"] = nope + rope if nope and rope else 2  # what is wrong with them is said below
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
            for name in ("rope_theta", "rope_scaling", "rope_head_dim", "rope_layers"):
                self._refuse_without_effect(name, name, needs="positions = rotary")
            if self.qk_norm == "rotated_head":
                raise ConfigError(
                    "qk_norm (rotated_head) norms heads after their rotation, and positions (learned) has none; rotary "
                    "positions are required; use positions = rotary, or qk_norm = head."
                )
        if self.positions == "rotary" and self.latent_attention is None and self.head_dim % 2:
            raise ConfigError(
                f"head_dim ({self.head_dim}) is odd; rotary positions turn pairs of channels; use an even head_dim or "
                f"positions = learned."
            )
        part = self.rope_head_dim
        if part is not None and (part % 2 or not 2 <= part <= self.head_dim):
            raise ConfigError(
                f"rope_head_dim ({part}) is not an even number from 2 to head_dim ({self.head_dim}); rotary positions "
                f"turn pairs of a head's channels; use an even number of its channels, or null for all of them."
            )
        self._check_latent_attention()
        self._check_sliding_layers()
        if self.rope_layers is not None:
            self._check_choice("rope_layers", self.rope_layers, otherwise="rope_layers = []")
        _ = self.layers  # resolves the pattern, or fails here and not at step 900
        return self

    def _check_latent_attention(self) -> None:
        latent = self.latent_attention
        if latent is None:
            return
        wanted: dict[str, tuple[Any, Any]] = {
            "head_dim": (self.head_dim, latent.nope_head_dim + latent.rope_head_dim),
            "num_kv_heads": (self.num_kv_heads, self.num_heads),
            "positions": (self.positions, "rotary"),
            "rope_head_dim": (self.rope_head_dim, None),
            "rope_layers": (self.rope_layers, None),
            "qk_norm": (self.qk_norm, "none"),
            "attention_bias": (self.attention_bias, "none"),
            "attention_sinks": (self.attention_sinks, False),
            "sliding_window": (self.sliding_window, None),
        }
        for name, (given, required) in wanted.items():
            if given != required:
                raise ConfigError(
                    f"{name} ({given}) does not go with latent_attention, whose heads have their own keys of "
                    f"nope_head_dim + rope_head_dim channels, both in its section and in all layers, no biases, no "
                    f"norms of queries and keys, no sinks and no window; it needs {required}; use that, or "
                    f"latent_attention = null."
                )

    def _check_sliding_layers(self) -> None:
        layers = self.sliding_layers
        if layers is None:
            return
        if self.sliding_window is None:
            self._refuse_without_effect("sliding_layers", "sliding_layers", needs="sliding_window (null: no window)")
        self._check_choice("sliding_layers", layers, otherwise="sliding_window = null", least=1)

    def _check_choice(self, name: str, layers: tuple[int, ...], *, otherwise: str, least: int = 0) -> None:
        """otherwise: what to do where none of the layers is one."""
        wrong = [index for index in layers if not 0 <= index < self.num_layers]
        if wrong or list(layers) != sorted(set(layers)) or len(layers) < least:
            rising = sorted({index for index in layers if index not in wrong})
            raise ConfigError(
                f"{name} ({list(layers)}) is not a choice of layers; {'at least one layer' if least else 'layers'} "
                f"from 0 to {self.num_layers - 1}, rising, none twice, {'is' if least else 'are'} required; use "
                f"{rising or otherwise}."
            )

    def is_rotated(self, layer: int) -> bool:
        """Return whether the heads of layer `layer` are turned by their positions."""
        return self.positions == "rotary" and (self.rope_layers is None or layer in self.rope_layers)

    def window_of(self, layer: int) -> int | None:
        """Return the positions that a token of layer `layer` sees, itself included; None for all up to it."""
        return self.sliding_window if self.sliding_layers is None or layer in self.sliding_layers else None

    @property
    def is_gated(self) -> bool:
        """Whether an MLP's activation multiplies two products, of a gate and of what it lets through."""
        return self.activation in ("swiglu", "swiglu_oai")

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
            layers[index] = self._moe_layer(self.moe, index, order=order, num_moe_layers=len(places))
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
        rising = sorted(moe.layers)
        if list(moe.layers) != rising:
            # Sorted silently, they would part from the values that stand beside them.
            raise ConfigError(
                f"moe.layers ({list(moe.layers)}) does not rise; num_experts, top_k and intermediate_size have their "
                f"values in the order of the layers, which must be that of the model; use {rising}, and their values "
                f"in that order."
            )
        return moe.layers

    def _moe_layer(self, moe: MoEConfig, index: int, *, order: int, num_moe_layers: int) -> FeedForwardConfig:
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
                    f"moe.{name} ({chosen}) of layer {index} is less than 1; at least 1 is required; raise it, or "
                    f"use moe = null for a dense model."
                )
            return chosen

        expert_size = self.intermediate_size if moe.intermediate_size is None else moe.intermediate_size
        residual_size = moe.residual_intermediate_size or self.intermediate_size
        if moe.residual is None and moe.residual_intermediate_size is not None:
            raise ConfigError(
                f"moe.residual_intermediate_size ({moe.residual_intermediate_size}) is given but moe.residual is null; "
                f"there is no residual MLP for it; set moe.residual, or remove it."
            )
        return FeedForwardConfig(
            intermediate_size=residual_size if moe.residual else 0,
            num_experts=pick("num_experts", moe.num_experts),
            top_k=pick("top_k", moe.top_k),
            expert_intermediate_size=pick("intermediate_size", expert_size),
            residual=moe.residual,
            output_scale=moe.output_scale,
            router=moe.router,
            capacity=moe.capacity,
        )


def _integer(value: Any) -> int | None:
    """Return what pydantic will read as an integer (1e3 and "1000" too), None for what it will refuse."""
    try:
        return _INTEGER.validate_python(value)
    except ValidationError:
        return None
