"""Quantising a model's matrices by what reaches them: layer by layer, on a text, with the earlier layers quantised.

One layer's weights exist at a time, beside the hidden states of the calibration tokens. How a matrix is rounded once
its inputs are known is rounding.py's business.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moesaic.checkpoint.quantized import Scheme
from moesaic.config.model import ModelConfig
from moesaic.convert.rounding import feedback_factor, round_with_feedback
from moesaic.kernels import products
from moesaic.kernels.activation import activate
from moesaic.kernels.quantized import QuantizedWeight, dequantize
from moesaic.model.feed_forward import Mlp
from moesaic.model.linear import Linear
from moesaic.model.transformer import Block, Transformer
from moesaic.moe.layer import MoELayer
from moesaic.moe.router import finish_weights

# Rows of a product of second moments at a time.
_ROWS = 8192

Quantized = Iterator[tuple[str, QuantizedWeight]]


@torch.no_grad()
def calibrated_weights(
    config: ModelConfig,
    schemes: Mapping[str, Scheme],
    read: Callable[[str], Tensor],
    batches: Sequence[Tensor],
    *,
    compute_dtype: torch.dtype,
    on_layer: Callable[[int], None] = lambda layer: None,
) -> Quantized:
    """Yield every matrix that schemes name, quantised; experts one at a time, in order, under the name of their stack.

    read returns a tensor of the model by its name. batches (B, S) int64 are the calibration tokens. on_layer hears of
    every layer that is done.
    """
    with torch.device("meta"):
        model = Transformer(config, compute_dtype=compute_dtype).eval()
    _materialize(model, [name for name in model.state_dict() if not name.startswith("blocks.")], read)
    if "embedding" in schemes:
        # Tied: it is needed first, as a table of rows, and is the output matrix too, whose inputs come last. They are
        # taken from the model as it is, in a pass of its own.
        moments = _final_moments(model, read, batches)
        quantized = _round(model.embedding, _factor(moments, schemes["embedding"]), schemes["embedding"])
        model.embedding.copy_(dequantize(quantized))
        yield "embedding", quantized
    states = [_arguments_of(model.blocks[0], model, tokens) for tokens in batches]
    for layer, block in _blocks(model, read):
        prefix = f"blocks.{layer}."
        own = {name.removeprefix(prefix): scheme for name, scheme in schemes.items() if name.startswith(prefix)}
        for name, quantized in _block(block, own, states):
            yield prefix + name, quantized
        states = [(_run(block, x, keywords), keywords) for x, keywords in states]
        on_layer(layer)
    if "lm_head" in schemes and model.lm_head is not None:
        moments = _moments(model.final_norm(x).flatten(0, 1) for x, _ in states)
        yield "lm_head", _round(model.lm_head, _factor(moments, schemes["lm_head"]), schemes["lm_head"])


def _final_moments(model: Transformer, read: Callable[[str], Tensor], batches: Sequence[Tensor]) -> Tensor:
    """Return the second moments of what reaches the output matrix of the model as it is."""
    states = [_arguments_of(model.blocks[0], model, tokens) for tokens in batches]
    for _, block in _blocks(model, read):
        states = [(_run(block, x, keywords), keywords) for x, keywords in states]
    return _moments(model.final_norm(x).flatten(0, 1) for x, _ in states)


def _blocks(model: Transformer, read: Callable[[str], Tensor]) -> Iterator[tuple[int, Block]]:
    """Yield the blocks in order, each with its weights for as long as it is worked on."""
    for layer, block in enumerate(model.blocks):
        assert isinstance(block, Block)
        prefix = f"blocks.{layer}."
        _materialize(block, list(block.state_dict()), lambda name, prefix=prefix: read(prefix + name))  # type: ignore[misc]
        yield layer, block
        block.to("meta")


def _materialize(module: nn.Module, names: Sequence[str], read: Callable[[str], Tensor]) -> None:
    # A copy: what is read may lie in a file that is mapped into memory.
    module.load_state_dict({name: read(name).clone() for name in names}, strict=False, assign=True)


class _Reached(Exception):
    """Ends a forward pass once its way has come to the module that is asked about."""


def _call_of(module: nn.Module, run: Callable[[], object]) -> tuple[Any, dict[str, Any]]:
    """Return the first argument and the keywords that the first call of module inside run gets."""
    seen: list[tuple[Any, dict[str, Any]]] = []

    def hook(_: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        seen.append((arguments[0], keywords))
        raise _Reached

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        run()
    except _Reached:
        pass
    finally:
        handle.remove()
    assert seen, f"{type(module).__name__} was not called"
    return seen[0]


def _arguments_of(block: nn.Module, model: Transformer, tokens: Tensor) -> tuple[Tensor, dict[str, Any]]:
    return _call_of(block, lambda: model(tokens))


def _run(block: Block, x: Tensor, keywords: dict[str, Any]) -> Tensor:
    # Each pass decides its routing anew: the weights before it have changed.
    recorded = type(keywords["recorded"])()
    return block(x, **{**keywords, "recorded": recorded})[0]


def _block(block: Block, schemes: Mapping[str, Scheme], states: list[tuple[Tensor, dict[str, Any]]]) -> Quantized:
    """Quantise a block's matrices in the order in which data meets them; each sees what the ones before it give."""

    def inputs_of(module: nn.Module) -> Iterator[Tensor]:
        for x, keywords in states:
            reached = _call_of(module, lambda x=x, keywords=keywords: _run(block, x, keywords))[0]  # type: ignore[misc]
            yield reached.reshape(-1, reached.shape[-1])

    attention = block.attention
    for names in attention.inputs_shared:
        inputs = inputs_of(attention.get_submodule(names[0]))
        yield from _linears(attention, names, "attention.", schemes, inputs)
    if not any(name.startswith("feed_forward.") for name in schemes):
        return
    x = torch.cat(list(inputs_of(block.feed_forward)))  # (T, H)
    if block.feed_forward.mlp is not None:
        yield from _mlp(block.feed_forward.mlp, "feed_forward.mlp.", schemes, x)
    if block.feed_forward.moe is not None:
        yield from _experts(block.feed_forward.moe, "feed_forward.moe.experts.", schemes, x)


def _linears(
    parent: nn.Module, names: Sequence[str], prefix: str, schemes: Mapping[str, Scheme], inputs: Iterable[Tensor]
) -> Quantized:
    """Quantise linear layers that have the same inputs, and one scheme."""
    layers = [(name, getattr(parent, name)) for name in names if f"{prefix}{name}.weight" in schemes]
    if not layers:
        return
    scheme = schemes[f"{prefix}{layers[0][0]}.weight"]
    factor = _factor(_moments(inputs), scheme)
    for name, layer in layers:
        assert isinstance(layer, Linear) and schemes[f"{prefix}{name}.weight"] == scheme, (prefix, name, scheme)
        quantized = _round(layer.weight, factor, scheme)
        layer.weight.copy_(dequantize(quantized))
        yield f"{prefix}{name}.weight", quantized


def _mlp(mlp: Mlp, prefix: str, schemes: Mapping[str, Scheme], x: Tensor) -> Quantized:
    yield from _linears(mlp, ("up_proj",) if mlp.gate_proj is None else ("gate_proj", "up_proj"), prefix, schemes, [x])

    def hidden() -> Iterator[Tensor]:
        for rows in x.split(_ROWS):
            up = mlp.up_proj(rows)
            pre = up if mlp.gate_proj is None else torch.cat([mlp.gate_proj(rows), up], -1)
            yield activate(pre, mlp.activation)

    yield from _linears(mlp, ("down_proj",), prefix, schemes, hidden())


def _experts(moe: MoELayer, prefix: str, schemes: Mapping[str, Scheme], x: Tensor) -> Quantized:
    experts, weights = moe.experts, moe.experts.weights()
    up_name = "gate_up_proj" if experts.is_gated else "up_proj"
    if prefix + up_name not in schemes:
        return
    routing = moe.router(x)
    routing_weights = finish_weights(routing.routing_weights, None, moe.config.router)
    for expert in range(weights.up.shape[0]):
        rows, shares = _tokens_of(expert, routing.expert_ids, routing_weights, needed=weights.up.shape[2])
        tokens, shares = x[rows], shares[:, None]
        scheme = schemes[prefix + up_name]
        up = _round(weights.up[expert], _factor(_moments([tokens * shares]), scheme), scheme)
        weights.up[expert].copy_(dequantize(up))
        yield prefix + up_name, up
        bias = None if weights.up_bias is None else weights.up_bias[expert].to(x.dtype)
        hidden = activate(products.linear(tokens, weights.up[expert].to(x.dtype), bias), weights.activation)
        scheme = schemes[f"{prefix}down_proj"]
        down = _round(weights.down[expert], _factor(_moments([hidden * shares]), scheme), scheme)
        weights.down[expert].copy_(dequantize(down))
        yield f"{prefix}down_proj", down


def _tokens_of(expert: int, expert_ids: Tensor, routing_weights: Tensor, *, needed: int) -> tuple[Tensor, Tensor]:
    """Return the calibration tokens of an expert, and what each weighs: its routing weight, relative to the mean.

    An expert that fewer tokens chose than it has input columns borrows the rest from the whole layer, evenly spaced:
    too few say too little of the inputs to come, and none say nothing.
    """
    chosen = expert_ids == expert  # (T, K)
    is_own = chosen.any(1)
    own = is_own.nonzero().squeeze(1)
    shares = (routing_weights * chosen).sum(1)[own]
    shares = shares / shares.mean().clamp_min(1e-20) if len(own) else shares
    others = (~is_own).nonzero().squeeze(1)
    count = min(max(needed - len(own), 0), len(others))
    if count == 0:
        return own, shares
    borrowed = others[torch.arange(count) * len(others) // count]
    return torch.cat([own, borrowed]), torch.cat([shares, shares.new_ones(count)])


def _moments(inputs: Iterable[Tensor]) -> Tensor:
    """Return the sum of X^T X (K, K) over inputs (T, K), in fp64."""
    total: Tensor | None = None
    for x in inputs:
        for rows in x.split(_ROWS):
            rows = rows.float()
            product = (rows.t() @ rows).double()
            total = product if total is None else total.add_(product)
    assert total is not None, "no calibration tokens"
    return total


def _factor(moments: Tensor, scheme: Scheme) -> Tensor:
    return feedback_factor(moments, is_mxfp4=scheme.is_mxfp4)


def _round(weight: Tensor, factor: Tensor, scheme: Scheme) -> QuantizedWeight:
    return round_with_feedback(weight, factor, bits=scheme.bits, group_size=scheme.group_size, is_mxfp4=scheme.is_mxfp4)
