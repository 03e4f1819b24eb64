"""What a model costs, from its config alone: parameters, active parameters, FLOPs and memory.

Two counts live here. `paper_parameters` is the arithmetic behind the published sizes: matrices only. `count_parameters`
is the model that moesaic builds, biases and norms included. What a cost means in seconds or in devices is not here.
"""

import math
from dataclasses import dataclass

from moesaic.config.model import FeedForwardConfig, ModelConfig

_BF16_BYTES = 2
_FP32_BYTES = 4
_CACHE_PANEL = 32  # channels to which caches of keys and values are filled up


@dataclass(frozen=True, kw_only=True)
class LayerParameters:
    """The parameters of one layer by part. `dense_mlp` is a dense layer's only MLP, or a residual layer's fixed one.

    `router` counts the learned factor on the experts' output too, where there is one. `active_experts` are the
    parameters of the top_k experts that one token uses, of the `experts` there are.
    """

    index: int
    attention: int
    norms: int
    dense_mlp: int
    residual_mix: int
    router: int
    experts: int
    active_experts: int

    @property
    def total(self) -> int:
        return self._fixed + self.experts

    @property
    def active(self) -> int:
        return self._fixed + self.active_experts

    @property
    def _fixed(self) -> int:
        return self.attention + self.norms + self.dense_mlp + self.residual_mix + self.router


@dataclass(frozen=True, kw_only=True)
class ParameterCount:
    """The parameters of a whole model. `output` is the lm_head's matrix; tied, it is the token embedding's own."""

    embedding: int
    output: int
    is_tied: bool
    final_norm: int
    layers: tuple[LayerParameters, ...]

    @property
    def total(self) -> int:
        return (
            self.embedding
            + (0 if self.is_tied else self.output)
            + self.final_norm
            + sum(layer.total for layer in self.layers)
        )

    @property
    def active(self) -> int:
        """What one token's forward pass multiplies: the lm_head, tied or not, but no embedding look-up."""
        return self.output + self.final_norm + sum(layer.active for layer in self.layers)

    @property
    def attention(self) -> int:
        return sum(layer.attention for layer in self.layers)

    @property
    def dense_mlp(self) -> int:
        return sum(layer.dense_mlp + layer.residual_mix for layer in self.layers)

    @property
    def experts(self) -> int:
        return sum(layer.experts for layer in self.layers)

    @property
    def router(self) -> int:
        return sum(layer.router for layer in self.layers)

    @property
    def norms(self) -> int:
        return self.final_norm + sum(layer.norms for layer in self.layers)


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Bytes, on one device that holds the whole model.

    `weights_bytes` are bf16, as served and as used in a training step; `training_state_bytes` are the fp32 master
    weights, gradients and the optimizer's moments beside them. The activations are those of one micro-batch.
    """

    weights_bytes: int
    training_state_bytes: int
    kv_cache_bytes_per_token: int
    micro_batch_size: int
    sequence_length: int
    activation_bytes: int
    checkpointed_activation_bytes: int


def paper_parameters(config: ModelConfig, *, with_embeddings: bool = True) -> int:
    """Return the size as the paper states it: matrices of attention, MLPs, experts and routers, no norms, no biases.

    For the paper's shapes that is 4 H^2 of attention per layer, 8 H^2 per MLP and per expert, E H per router, and V H
    of tokens and positions H of embeddings. The mix of a residual layer, 2 H, is not in it.

    Source: DeepSpeed-MoE (arXiv 2201.05596), tables 2 and 6; the published sizes follow to the printed digits.
    """
    total = 0
    for layer in config.layers:
        total += _attention_matrices(config) + _mlp_matrices(config, layer.intermediate_size)
        total += layer.num_experts * (_mlp_matrices(config, layer.expert_intermediate_size) + config.hidden_size)
    if with_embeddings:
        total += _embedding(config) + (0 if config.tie_embeddings else config.vocab_size * config.hidden_size)
    return total


def count_parameters(config: ModelConfig) -> ParameterCount:
    """Return the parameters of the model that the config builds, biases and norms included, buffers not."""
    return ParameterCount(
        embedding=_embedding(config),
        output=config.vocab_size * config.hidden_size,
        is_tied=config.tie_embeddings,
        final_norm=_norm(config),
        layers=tuple(_count_layer(config, index, layer) for index, layer in enumerate(config.layers)),
    )


def flops_per_token(config: ModelConfig, *, context: int) -> int:
    """Return the FLOPs of one token's forward pass when it attends to `context` positions, itself included.

    Two per multiply-add of every matrix the token passes through, lm_head included, and of queries by keys and
    probabilities by values. Norms, activations and softmax are left out, as everyone does. Latent attention is counted
    as training does it, with every head's keys and values; over its compressed cache a position takes
    2 * kv_rank + rope_head_dim multiply-adds of a head instead of head_dim + value_head_dim.
    """
    return _matrix_flops(config) + _attention_flops(config, context)


def training_flops_per_token(config: ModelConfig, sequence_length: int) -> int:
    """Return the mean FLOPs per token of a forward and a backward pass over a causal sequence.

    The backward pass is twice the forward pass; the mean context is (sequence_length + 1) / 2. Recomputation by
    activation checkpointing is not counted: it is no useful work.
    """
    return 3 * _matrix_flops(config) + 3 * _attention_flops(config, sequence_length, is_mean=True)


def memory(
    config: ModelConfig, *, micro_batch_size: int = 1, sequence_length: int | None = None, optimizer: str = "adamw"
) -> MemoryEstimate:
    """Return the memory of the model, of its training and of its KV cache; sequence_length None: max_positions.

    The activations are what the backward pass keeps, in bf16, counted by `_kept_per_token`; with activation
    checkpointing they are each layer's input and one layer's activations at a time. Logits never exist as a whole
    (kernels/cross_entropy), and neither do attention's S x S probabilities, so they are not in it; on the CPU, though,
    PyTorch does keep the latter when there is dropout.
    """
    parameters = count_parameters(config).total
    length = config.max_positions if sequence_length is None else sequence_length
    tokens = micro_batch_size * length
    kept = [_kept_per_token(config, layer) for layer in config.layers]
    # Outside the layers: the last hidden states, normed, and their gradient, which the fused loss makes in its forward.
    outside = 3 * config.hidden_size
    return MemoryEstimate(
        weights_bytes=_BF16_BYTES * parameters,
        training_state_bytes=least_training_bytes(config, optimizer=optimizer),
        kv_cache_bytes_per_token=config.num_layers * _cached_per_token(config) * _BF16_BYTES,
        micro_batch_size=micro_batch_size,
        sequence_length=length,
        activation_bytes=_BF16_BYTES * tokens * (sum(kept) + outside),
        checkpointed_activation_bytes=_BF16_BYTES
        * tokens
        * (config.num_layers * config.hidden_size + max(kept) + outside),
    )


def least_training_bytes(config: ModelConfig, *, optimizer: str, expert_degree: int = 1) -> int:
    """Return what every training step certainly holds: fp32 weights, gradients and the optimizer's moments.

    expert_degree: over so many processes each layer's experts are spread, or over their greatest common divisor; it is
    what one process holds.

    Muon keeps one moment of a matrix inside the blocks, AdamW two of everything; biases and norms, which are AdamW's
    with either, are counted as the matrices, so this is at most what there will be.
    """
    count = count_parameters(config)
    degrees = [math.gcd(layer.num_experts, expert_degree) for layer in config.layers]
    elsewhere = sum(
        of_layer.experts - of_layer.experts // degree for of_layer, degree in zip(count.layers, degrees, strict=True)
    )
    own = count.total - elsewhere
    moments = 2 * own
    if optimizer == "muon":
        moments = own + count.embedding + (0 if count.is_tied else count.output)
    return _FP32_BYTES * (2 * own + moments)


def _count_layer(config: ModelConfig, index: int, layer: FeedForwardConfig) -> LayerParameters:
    expert = _mlp(config, layer.expert_intermediate_size) if layer.is_moe else 0
    return LayerParameters(
        index=index,
        attention=_attention_matrices(config) + _attention_biases(config) + _attention_sinks(config),
        norms=2 * _norm(config) + _attention_norms(config),
        dense_mlp=_mlp(config, layer.intermediate_size) if layer.intermediate_size else 0,
        residual_mix=_residual_mix(config, layer),
        router=layer.num_experts * (config.hidden_size + int(layer.router.bias)) + int(layer.output_scale),
        experts=layer.num_experts * expert,
        active_experts=layer.top_k * expert,
    )


def _embedding(config: ModelConfig) -> int:
    positions = config.max_positions if config.positions == "learned" else 0
    return (config.vocab_size + positions) * config.hidden_size


def _norm(config: ModelConfig) -> int:
    return config.hidden_size * (2 if config.norm == "layernorm" else 1)


def _attention_matrices(config: ModelConfig) -> int:
    """q and o of all heads, k and v of the key/value heads; for latent attention, the ways down and up."""
    hidden, latent = config.hidden_size, config.latent_attention
    if latent is None:
        return 2 * hidden * config.head_dim * (config.num_heads + config.num_kv_heads)
    queries, rank = config.num_heads * config.head_dim, latent.query_rank
    return (
        (hidden * queries if rank is None else rank * (hidden + queries))
        + hidden * (latent.kv_rank + latent.rope_head_dim)
        + latent.kv_rank * config.num_heads * (latent.nope_head_dim + latent.value_head_dim)
        + config.num_heads * latent.value_head_dim * hidden
    )


def _attention_norms(config: ModelConfig) -> int:
    latent = config.latent_attention
    if latent is not None:
        return latent.kv_rank + (latent.query_rank or 0)
    heads = {"none": 0, "full": config.num_heads + config.num_kv_heads}.get(config.qk_norm, 2)
    return heads * config.head_dim


def _cached_per_token(config: ModelConfig) -> int:
    """Return the numbers that a layer's cache holds of a token, rows filled up as it stores them."""
    latent = config.latent_attention
    if latent is not None:
        return _filled(latent.kv_rank + latent.rope_head_dim)
    return 2 * config.num_kv_heads * _filled(config.head_dim)


def _filled(channels: int) -> int:
    return -(-channels // _CACHE_PANEL) * _CACHE_PANEL


def _attention_biases(config: ModelConfig) -> int:
    qkv = config.head_dim * (config.num_heads + 2 * config.num_kv_heads)
    return {"none": 0, "qkv": qkv, "all": qkv + config.hidden_size}[config.attention_bias]


def _attention_sinks(config: ModelConfig) -> int:
    return config.num_heads if config.attention_sinks else 0


def _input_matrices(config: ModelConfig) -> int:
    """How many matrices lead into an MLP's intermediate width: gate and up, or up alone."""
    return 2 if config.is_gated else 1


def _mlp_matrices(config: ModelConfig, intermediate_size: int) -> int:
    return (_input_matrices(config) + 1) * config.hidden_size * intermediate_size


def _mlp(config: ModelConfig, intermediate_size: int) -> int:
    biases = _input_matrices(config) * intermediate_size + config.hidden_size if config.mlp_bias else 0
    return _mlp_matrices(config, intermediate_size) + biases


def _residual_mix(config: ModelConfig, layer: FeedForwardConfig) -> int:
    """A softmax over two weights has a bias, a sigmoid of one has none, a sum learns nothing."""
    if layer.residual == "softmax":
        return 2 * config.hidden_size + 2
    return config.hidden_size if layer.residual == "sigmoid" else 0


def _matrix_flops(config: ModelConfig) -> int:
    multiplied = config.vocab_size * config.hidden_size
    for layer in config.layers:
        multiplied += _attention_matrices(config) + _mlp_matrices(config, layer.intermediate_size)
        multiplied += layer.top_k * _mlp_matrices(config, layer.expert_intermediate_size)
        multiplied += layer.num_experts * config.hidden_size
        multiplied += config.hidden_size * {"softmax": 2, "sigmoid": 1}.get(layer.residual or "sum", 0)
    return 2 * multiplied


def _attention_flops(config: ModelConfig, context: int, *, is_mean: bool = False) -> int:
    """is_mean: of the tokens of a sequence that is `context` long, rather than of its last."""
    latent = config.latent_attention
    value_dim = config.head_dim if latent is None else latent.value_head_dim
    twice_seen = 0
    for layer in range(config.num_layers):
        window = min(config.window_of(layer) or context, context)
        # Of a sequence's tokens the first `window` see 1, 2, ... positions.
        twice_seen += window * (2 * context - window + 1) // context if is_mean else 2 * window
    return config.num_heads * (config.head_dim + value_dim) * twice_seen


def _kept_per_token(config: ModelConfig, layer: FeedForwardConfig) -> int:
    """Return the numbers that one layer keeps for its backward pass, per token, in units of a bf16 number."""
    hidden = config.hidden_size
    kept = 2 * hidden  # the inputs of both norms
    kept += 2 * hidden  # the norms' outputs, which the matrices' gradients need
    kept += _kept_by_attention(config)
    kept += _input_matrices(config) * layer.intermediate_size  # the pre-activation; the activation is recomputed
    if layer.is_moe:
        kept += 2 * layer.num_experts  # the router's probabilities, fp32
        # Each route's pre-activation, its place there and back (int64), and its weight; PyTorch's operations, where the
        # kernels do not apply, keep its copy of the input and its output too.
        kept += layer.top_k * (_input_matrices(config) * layer.expert_intermediate_size + 10)
    if layer.residual in ("softmax", "sigmoid"):
        kept += 2 * hidden  # both branches, for the gradient of the mix
    if config.dropout:
        kept += hidden  # the masks of both block outputs, a byte each
    return kept


def _kept_by_attention(config: ModelConfig) -> int:
    heads, kept = config.num_heads, 2 * config.num_heads  # the softmax's normaliser, fp32
    latent = config.latent_attention
    if latent is None:
        kept += config.head_dim * (2 * heads + 2 * config.num_kv_heads)  # queries, keys, values, attention output
        if config.qk_norm != "none":
            kept += config.head_dim * (heads + config.num_kv_heads)
        return kept
    # The small vectors before and after their norms; the former are one matrix with the rotary key.
    kept += 2 * latent.kv_rank + latent.rope_head_dim + 2 * (latent.query_rank or 0)
    # Queries, keys, values and output, widened to one size for the kernels, and the output as it was.
    width = -(-max(config.head_dim, latent.value_head_dim) // 16) * 16
    return kept + heads * (4 * width + latent.value_head_dim)
