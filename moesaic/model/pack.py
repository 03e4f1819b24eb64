"""Pack a model for inference: every matrix in the kernels' own layout, in bf16 or quantised, in the place of its fp32
master weight.

A packed model infers as before, layer by layer or, with a cache, in one call for all layers, and can do nothing else:
it has no parameters left to train or to move to another device. What it holds can be kept as it is (packed_tensors) and
put into the packed shell of a model of the same config (fill_packed), which is how it is loaded without packing. For a
model that does not fit into memory they come one block after the other (packed_parts).
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from moesaic.checkpoint.quantized import Scheme
from moesaic.config.model import ModelConfig
from moesaic.errors import ConfigError
from moesaic.kernels.decode import LatentPart, LayerPart, ModelPart, NormPart, RotaryTable, RouterPart
from moesaic.kernels.packed import PackedMlp, PackedWeight, pack_mlp, pack_weight
from moesaic.kernels.quantized import QuantizedWeight, combine, dequantize, quantize_weight
from moesaic.model.attention import Attention
from moesaic.model.feed_forward import FeedForward, Mlp
from moesaic.model.latent_attention import LatentAttention
from moesaic.model.linear import Linear, is_plain
from moesaic.model.norm import LayerNorm, RmsNorm
from moesaic.model.rotary import model_rotary
from moesaic.model.transformer import Block, Transformer
from moesaic.moe.experts import Experts
from moesaic.moe.layer import MoELayer
from moesaic.moe.router import Router


@torch.no_grad()
def pack_transformer(
    model: Transformer,
    quantized: Mapping[str, QuantizedWeight] | None = None,
    *,
    rounds: bool = False,
    device: torch.device | None = None,
) -> Transformer:
    """Pack every matrix of the model in place and return it, in evaluation mode and computing in bf16.

    quantized: matrices that replace the model's own, by their names in model.state_dict(). rounds: the others become
    int8. device: where the model goes meanwhile, matrix by matrix; None: it stays where it is. Each original is freed
    before the next is packed. Router, norms and biases stay as they are; an embedding of its own becomes bf16.

    Raises: ConfigError for a name or a shape that the model does not have, for a layer that is not the model's own (an
    adapter, say) or has its experts on several processes, all before anything is packed, or for parts of one matrix
    that are not of one format.
    """
    _pack_matrices(model, _Weights(model, dict(quantized or {}), rounds=rounds, device=device))
    _describe(model)
    return model


@torch.no_grad()
def packed_parts(
    model: Transformer, quantized: Mapping[str, QuantizedWeight] | None = None, *, rounds: bool = False
) -> Iterator[tuple[str, Tensor]]:
    """Yield what pack_transformer and then packed_tensors would give, in the same order, with one packed block in
    memory at a time. The model is of no use afterwards.

    Raises: ConfigError as pack_transformer, a name or a shape before anything is yielded.
    """
    weights = _Weights(model, dict(quantized or {}), rounds=rounds)
    head = _pack_embeddings(model, weights)
    found = _Found()
    _visit_module("", model, found.visit)
    for name, _ in list(model.named_parameters(recurse=False)):
        delattr(model, name)
    yield from found.taken()
    for index in range(len(model.blocks)):
        _pack_block(model.blocks[index], weights, f"blocks.{index}")
        for name, module in model.blocks[index].named_modules(prefix=f"blocks.{index}"):
            _visit_module(name, module, found.visit)
        model.blocks[index] = nn.Identity()
        del module
        yield from found.taken()
    _visit_module("final_norm", model.final_norm, found.visit)
    _visit_matrix("head.packed", pack_weight(head), found.visit)
    yield from found.taken()


@torch.no_grad()
def packed_shell(config: ModelConfig, schemes: Mapping[str, Scheme]) -> Transformer:
    """Return a packed model on the meta device: shapes and formats without memory.

    schemes: how the matrices that are not in bf16 are quantised, by their names in an unpacked model's state_dict().

    Raises: ConfigError as pack_transformer.
    """
    with torch.device("meta"):
        model = Transformer(config, compute_dtype=torch.bfloat16)
        shapes = packed_shapes(model)
        quantized = {name: _empty_quantized(shapes.get(name, (0, 0)), scheme) for name, scheme in schemes.items()}
    _pack_matrices(model, _Weights(model, quantized))
    return model


def packed_tensors(model: Transformer) -> dict[str, Tensor]:
    """Return every tensor that a packed model computes with, by its place; not those that are made from them.

    Matrices are PLACE.packed.data (uint8) and, of integers, PLACE.packed.scales; on CUDA also PLACE.packed.steps.
    """
    assert model.is_packed, "this model is not packed"
    found = _Found()
    _visit(model, found.visit)
    return found


def fill_packed(shell: Transformer, tensors: Mapping[str, Tensor]) -> Transformer:
    """Put tensors, as packed_tensors names them, in the place of those of a shell, and return it; nothing is copied."""

    def take(name: str, empty: Tensor) -> Tensor:
        given = tensors[name]
        assert given.shape == empty.shape and given.dtype == empty.dtype, (name, given.shape, empty.shape, given.dtype)
        return given

    own = packed_tensors(shell).keys()
    assert tensors.keys() == own, sorted(tensors.keys() ^ own)[:3]
    _visit(shell, take)
    _describe(shell)
    return shell


def _pack_matrices(model: Transformer, weights: "_Weights") -> None:
    head = _pack_embeddings(model, weights)
    for index, block in enumerate(model.blocks):
        _pack_block(block, weights, f"blocks.{index}")
    packed_head = pack_weight(head)
    model.to(packed_head.data.device)  # what is not packed
    model.packed_head = packed_head
    model.compute_dtype = torch.bfloat16
    model.eval()


def _pack_embeddings(model: Transformer, weights: "_Weights") -> Tensor | QuantizedWeight:
    """Bring what stands outside the blocks into its form, and return the head as it is before packing."""
    is_tied = model.lm_head is None
    head = weights.take("embedding" if is_tied else "lm_head")
    model.lm_head = None
    if is_tied:
        del model.embedding
    else:
        model.embedding = nn.Parameter(model.embedding.to(torch.bfloat16), requires_grad=False)
    if model.position_embedding is not None:
        model.position_embedding = nn.Parameter(model.position_embedding.to(torch.bfloat16), requires_grad=False)
    return head


def _pack_block(block: nn.Module, weights: "_Weights", prefix: str) -> None:
    assert isinstance(block, Block)
    if isinstance(block.attention, LatentAttention):
        _pack_latent_attention(block.attention, weights, f"{prefix}.attention")
    else:
        _pack_attention(block.attention, weights, f"{prefix}.attention")
    _pack_feed_forward(block.feed_forward, weights, f"{prefix}.feed_forward")


def _describe(model: Transformer) -> None:
    """Say what the pass in one call needs to know, which there is on the CPU."""
    if model.device.type != "cpu":
        return
    layers = tuple(_describe_layer(block) for block in model.blocks if isinstance(block, Block))
    model.decode_part = _model_part(model, layers)


# Called with the place of a tensor and the tensor; returns what shall stand there.
_Visitor = Callable[[str, Tensor], Tensor]


def _visit(model: Transformer, visit: _Visitor) -> None:
    """Visit every tensor of a packed model."""
    for prefix, module in model.named_modules():
        _visit_module(prefix, module, visit)
    assert model.packed_head is not None
    model.packed_head = _visit_matrix("head.packed", model.packed_head, visit)


def _visit_module(prefix: str, module: nn.Module, visit: _Visitor) -> None:
    """Visit the tensors of a module of a packed model, without those of the modules in it."""
    place = f"{prefix}." if prefix else ""
    for name, parameter in list(module.named_parameters(recurse=False)):
        tensor = visit(place + name, parameter)
        if tensor is not parameter:
            setattr(module, name, nn.Parameter(tensor, requires_grad=False))
    for name, buffer in list(module.named_buffers(recurse=False)):
        setattr(module, name, visit(place + name, buffer))
    if isinstance(module, Linear) and module.packed is not None:
        module.packed = _visit_matrix(f"{place}packed", module.packed, visit)
    elif isinstance(module, Mlp | Experts) and module.packed is not None:
        module.packed = _visit_mlp(f"{place}packed", module.packed, visit)
    elif isinstance(module, LatentAttention) and module.up is not None:
        keys, values = module.up
        module.up = _visit_matrix(f"{place}key_up", keys, visit), _visit_matrix(f"{place}value_up", values, visit)


def _visit_matrix(place: str, weight: PackedWeight, visit: _Visitor) -> PackedWeight:
    data = visit(f"{place}.data", weight.data)
    scales, steps = (
        None if tensor is None else visit(f"{place}.{name}", tensor)
        for name, tensor in (("scales", weight.scales), ("steps", weight.steps))
    )
    return weight if data is weight.data else replace(weight, data=data, scales=scales, steps=steps)


def _visit_mlp(place: str, packed: PackedMlp, visit: _Visitor) -> PackedMlp:
    up, down = _visit_matrix(f"{place}.up", packed.up, visit), _visit_matrix(f"{place}.down", packed.down, visit)
    up_bias, down_bias = (
        None if bias is None else visit(f"{place}.{name}", bias)
        for name, bias in (("up_bias", packed.up_bias), ("down_bias", packed.down_bias))
    )
    return packed if up is packed.up else replace(packed, up=up, down=down, up_bias=up_bias, down_bias=down_bias)


class _Found(dict[str, Tensor]):
    """What a visit came by."""

    def visit(self, name: str, tensor: Tensor) -> Tensor:
        self[name] = tensor.detach()
        return tensor

    def taken(self) -> Iterator[tuple[str, Tensor]]:
        """Give all, each of which is kept no longer."""
        while self:
            name = next(iter(self))
            yield name, self.pop(name)


def _empty_quantized(shape: tuple[int, ...], scheme: Scheme) -> QuantizedWeight:
    *rows, columns = shape
    if scheme.group_size is None:
        return QuantizedWeight(torch.empty(shape, dtype=torch.int8), torch.empty(rows), scheme.bits, None)
    values = torch.empty(*rows, columns // 2, dtype=torch.uint8)
    groups = (*rows, columns // scheme.group_size)
    if scheme.is_mxfp4:
        return QuantizedWeight(values, torch.empty(groups, dtype=torch.uint8), scheme.bits, scheme.group_size)
    steps = torch.empty(groups, dtype=torch.int8)
    return QuantizedWeight(values, torch.empty(rows), scheme.bits, scheme.group_size, steps)


def _model_part(model: Transformer, layers: tuple[LayerPart, ...]) -> ModelPart:
    config = model.config
    rotary = None
    if config.positions == "rotary":
        rotary = RotaryTable(config.max_positions, partial(_rotary_rows, config))
    assert model.packed_head is not None
    return ModelPart(
        layers=layers,
        embedding=model.packed_head if config.tie_embeddings else model.embedding,
        position_embedding=model.position_embedding,
        rotary=rotary,
        final_norm=_norm_part(model.final_norm),
        head=model.packed_head,
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        max_positions=config.max_positions,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        norms_outputs=config.norm_place == "behind",
        norm_epsilon=config.norm_epsilon,
        attention_scale=config.attention_scale or config.head_dim**-0.5,
        embedding_scale=config.embedding_scale,
        residual_scale=config.residual_scale,
        window=config.sliding_window,
        add_others=next((each.add_others for each in model.modules() if isinstance(each, MoELayer)), None),
    )


def _rotary_rows(config: ModelConfig, first: int, last: int) -> tuple[Tensor, Tensor]:
    return model_rotary(config, torch.arange(first, last, device="cpu"))


def packed_shapes(model: Transformer) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the matrices that packing packs, by their names in model.state_dict()."""
    others = ["position_embedding"] if model.lm_head is None else ["position_embedding", "embedding"]
    return {
        name: tuple(parameter.shape)
        for name, parameter in model.named_parameters()
        if parameter.dim() > 1 and name not in others and not name.endswith(("router.weight", "_bias"))
    }


class _Weights:
    """The model's matrices by name, the quantised one where there is one; rounds: the others rounded to int8."""

    def __init__(
        self,
        model: Transformer,
        quantized: dict[str, QuantizedWeight],
        *,
        rounds: bool = False,
        device: torch.device | None = None,
    ) -> None:
        assert not model.is_packed, "this model is packed already"
        _check_own_layers(model)
        self._model, self._quantized, self._rounds = model, quantized, rounds
        self._device = model.device if device is None else device
        shapes = packed_shapes(model)
        for name, weight in quantized.items():
            if shapes.get(name) != tuple(weight.shape):
                raise ConfigError(
                    f"a quantised weight {name} of shape {tuple(weight.shape)} was given; the model has "
                    f"{shapes.get(name, 'no packed matrix of that name')} there, and the same is required; use weights "
                    f"that were made from this model, without its routers and embeddings."
                )

    def take(self, name: str) -> Tensor | QuantizedWeight:
        if (given := self._quantized.pop(name, None)) is not None:
            return given.map(lambda tensor: tensor.to(self._device))
        weight = self._model.get_parameter(name).detach()
        weight = weight.float() if weight.dtype is torch.float16 else weight
        if self._rounds:
            return quantize_weight(weight.to(self._device), bits=8)
        if weight.device != self._device:
            weight = weight.to(torch.bfloat16).to(self._device)
        return weight

    def stack(self, *names: str) -> Tensor | QuantizedWeight:
        """Several matrices (N, K) with one behind the other's rows."""
        parts = [self.take(name) for name in names]
        tensors = [part for part in parts if isinstance(part, Tensor)]
        if len(tensors) == len(parts):
            return _join(tensors)
        whole = [part for part in parts if isinstance(part, QuantizedWeight)]
        formats = [
            (part.bits, part.group_size, part.is_mxfp4) if isinstance(part, QuantizedWeight) else "bf16"
            for part in parts
        ]
        if len(set(formats)) > 1:
            raise ConfigError(
                f"{', '.join(names)} are computed as one matrix and come as {formats}; one format is required; "
                f"quantise all of them alike."
            )
        return combine(whole, _join)


_OWN_LAYERS = (
    nn.ModuleList, Block, Attention, LatentAttention, FeedForward, Mlp, MoELayer, Experts, Router, RmsNorm, LayerNorm,
    Linear,
)  # fmt: skip


def _check_own_layers(model: Transformer) -> None:
    """Of a layer that something else stands in, only its weights would be packed, and not what it does."""
    for name, module in model.blocks.named_modules(prefix="blocks"):
        if type(module) not in _OWN_LAYERS or (isinstance(module, Linear) and not is_plain(module)):
            kind = f"{type(module).__module__}.{type(module).__qualname__}"
            raise ConfigError(
                f"{name} is {kind}{' with hooks' if type(module) is Linear else ''}; only the model's own layers can "
                f"be packed, as they were made; merge adapters (PEFT: merge_and_unload()) and remove hooks and "
                f"parametrizations first."
            )
        if isinstance(module, MoELayer) and module.dispatcher is not None:
            raise ConfigError(
                f"the experts of {name} are spread over processes; a model with all its experts is required; load what "
                f"ExpertParallel's full_state() returns into a new one, and pack that."
            )


def _stack_biases(*layers: Linear) -> nn.Parameter | None:
    biases: list[Tensor] = [layer.bias for layer in layers if layer.bias is not None]
    return nn.Parameter(_join(biases), requires_grad=False) if biases else None


def _join(parts: list[Tensor]) -> Tensor:
    """torch.cat, which on the meta device is Python that loads torch's compiler first: a second of every start."""
    if parts[0].is_meta:
        rows = sum(part.shape[0] for part in parts)
        return torch.empty(rows, *parts[0].shape[1:], dtype=parts[0].dtype, device="meta")
    return torch.cat(parts)


def _pack_attention(attention: Attention, weights: _Weights, prefix: str) -> None:
    parts = ("q_proj", "k_proj", "v_proj")
    layers = (attention.q_proj, attention.k_proj, attention.v_proj)
    joined = Linear(0, 0, has_bias=False)
    joined.bias = _stack_biases(*layers)
    joined.pack(weights.stack(*(f"{prefix}.{name}.weight" for name in parts)))
    attention.qkv_proj = joined
    for name in parts:
        delattr(attention, name)
    attention.o_proj.pack(weights.take(f"{prefix}.o_proj.weight"))


def _pack_latent_attention(attention: LatentAttention, weights: _Weights, prefix: str) -> None:
    up = weights.take(f"{prefix}.kv_up_proj.weight")
    attention.kv_up_proj.weight = nn.Parameter(
        dequantize(up) if isinstance(up, QuantizedWeight) else up, requires_grad=False
    )
    keys, values = attention.up_matrices(torch.bfloat16)
    attention.up = pack_weight(keys.transpose(1, 2)), pack_weight(values)
    del attention.kv_up_proj
    downwards = ("q_down_proj" if attention.has_query_rank else "q_proj", "kv_down_proj")
    attention.in_proj = Linear(0, 0, has_bias=False)
    attention.in_proj.pack(weights.stack(*(f"{prefix}.{name}.weight" for name in downwards)))
    for name in downwards:
        delattr(attention, name)
    if attention.has_query_rank:
        attention.q_up_proj.pack(weights.take(f"{prefix}.q_up_proj.weight"))
    attention.o_proj.pack(weights.take(f"{prefix}.o_proj.weight"))


def _pack_feed_forward(feed_forward: FeedForward, weights: _Weights, prefix: str) -> None:
    if feed_forward.mlp is not None:
        feed_forward.mlp.packed = _pack_mlp(feed_forward.mlp, weights, f"{prefix}.mlp")
    if feed_forward.moe is not None:
        feed_forward.moe.experts.packed = _pack_experts(feed_forward.moe.experts, weights, f"{prefix}.moe.experts")
    if feed_forward.mix is not None:
        feed_forward.mix.pack(weights.take(f"{prefix}.mix.weight"))


def _pack_mlp(mlp: Mlp, weights: _Weights, prefix: str) -> PackedMlp:
    names = ["up_proj"] if mlp.gate_proj is None else ["gate_proj", "up_proj"]
    packed = pack_mlp(
        weights.stack(*(f"{prefix}.{name}.weight" for name in names)),
        weights.take(f"{prefix}.down_proj.weight"),
        up_bias=_stack_biases(*(mlp.get_submodule(name) for name in names)),  # type: ignore[arg-type]
        down_bias=mlp.down_proj.bias,
        activation=mlp.activation,
    )
    for name in ("gate_proj", "up_proj", "down_proj"):
        delattr(mlp, name)
    return packed


def _pack_experts(experts: Experts, weights: _Weights, prefix: str) -> PackedMlp:
    own = experts.weights()
    name = "gate_up_proj" if experts.is_gated else "up_proj"
    packed = pack_mlp(
        weights.take(f"{prefix}.{name}"),
        weights.take(f"{prefix}.down_proj"),
        up_bias=own.up_bias,
        down_bias=own.down_bias,
        activation=experts.activation,
    )
    for name in [name for name, _ in experts.named_parameters()]:
        delattr(experts, name)
    return packed


def _norm_part(norm: RmsNorm | LayerNorm) -> NormPart:
    weight, bias = norm.scaled()
    return NormPart(_fp32(weight), None if bias is None else _fp32(bias))


def _fp32(x: Tensor) -> Tensor:
    return x.detach().float().contiguous()


def _describe_layer(block: Block) -> LayerPart:
    """What the pass in one call needs to know of a layer that is packed."""
    attention, feed_forward = block.attention, block.feed_forward

    def packed(layer: Linear | None) -> tuple[PackedWeight | None, Tensor | None]:
        if layer is None:
            return None, None
        return layer.packed, None if layer.bias is None else _fp32(layer.bias)

    joined: Linear | None
    q_norm: RmsNorm | None
    k_norm: RmsNorm | None
    latent: LatentPart | None = None
    sinks: Tensor | None = None
    is_rotated, norms_rotated, has_window = True, False, False
    if isinstance(attention, LatentAttention):
        joined, latent = attention.in_proj, _latent_part(attention)
        q_norm, k_norm = attention.q_down_norm if attention.has_query_rank else None, attention.kv_down_norm
    else:
        joined, q_norm, k_norm = attention.qkv_proj, attention.q_norm, attention.k_norm
        is_rotated, norms_rotated = attention.is_rotated, attention.norms_rotated
        sinks, has_window = attention.sinks, attention.window is not None
    (qkv, qkv_bias), (o_proj, o_bias), (mix, mix_bias) = (
        packed(layer) for layer in (joined, attention.o_proj, feed_forward.mix)
    )
    assert qkv is not None and o_proj is not None
    return LayerPart(
        attention_norm=_norm_part(block.attention_norm),
        qkv=qkv,
        qkv_bias=qkv_bias,
        q_norm=None if q_norm is None else _fp32(q_norm.weight),
        k_norm=None if k_norm is None else _fp32(k_norm.weight),
        is_rotated=is_rotated,
        norms_rotated=norms_rotated,
        sinks=None if sinks is None else _fp32(sinks),
        has_window=has_window,
        o_proj=o_proj,
        o_bias=o_bias,
        feed_forward_norm=_norm_part(block.feed_forward_norm),
        mlp=None if feed_forward.mlp is None else feed_forward.mlp.packed,
        experts=None if feed_forward.moe is None else feed_forward.moe.experts.packed,
        router=None if feed_forward.moe is None else _router_part(feed_forward.moe),
        residual_mix=feed_forward.residual or "sum",
        mix=mix,
        mix_bias=mix_bias,
        latent=latent,
        first_expert=0 if feed_forward.moe is None else feed_forward.moe.experts.first,
    )


def _latent_part(attention: LatentAttention) -> LatentPart:
    assert attention.up is not None
    q_up = attention.q_up_proj.packed if attention.has_query_rank else None
    return LatentPart(q_up, *attention.up, attention.rope_dim, attention.kv_down_norm.epsilon)


def _router_part(moe: MoELayer) -> RouterPart:
    router = moe.router
    config, correction = router.config, router.score_correction_bias
    # Multiplied in fp32, as finish_weights does.
    scale = config.scale if moe.output_scale is None else float(moe.output_scale * config.scale)
    return RouterPart(
        weight=_fp32(router.weight),
        bias=None if router.bias is None else _fp32(router.bias),
        correction_bias=None if correction is None else _fp32(correction),
        top_k=router.top_k,
        scoring=config.scoring,
        num_groups=config.num_groups,
        top_groups=config.top_groups,
        renormalize=config.renormalize,
        scale=scale,
    )
