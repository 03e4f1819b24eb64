"""The experts of a MoE layer in training as one torch operator of the C++ kernels: gather, MLPs, weighted combine.

Saved for the backward pass: the input, the pre-activation and the routing. The contracts, and what happens where the
kernels do not apply, are kernels/grouped_mlp and kernels/routed_mlp.
"""

import ctypes

import torch
from torch import Tensor

from moesaic.kernels import products
from moesaic.kernels.activation import ACTIVATIONS, is_gated
from moesaic.kernels.select import cpu_library

_SIZE_MULTIPLE = 32


class _Call(ctypes.Structure):
    """struct MoeTraining of source/moe_training.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("tokens", "routes", "rows", "hidden", "inner", "experts", "activation")),
        *(
            (name, ctypes.c_void_p)
            for name in (
                "tokens_per_expert",
                "token_ids",
                "slots",
                "routing_weights",
                "x",
                "up",
                "up_bias",
                "down",
                "down_bias",
                "pre",
                "out",
                "grad_out",
                "grad_x",
                "grad_routing_weights",
                "grad_up",
                "grad_up_bias",
                "grad_down",
                "grad_down_bias",
            )
        ),
    ]


def applies(x: Tensor, up: Tensor, down: Tensor) -> bool:
    """Whether the operator takes these: bf16 (or under autocast to it) on the CPU, sizes that are multiples of 32."""
    return (
        x.device.type == "cpu"
        and all(products.autocast_dtype(tensor) == torch.bfloat16 for tensor in (x, up, down))
        and x.shape[1] % _SIZE_MULTIPLE == down.shape[2] % _SIZE_MULTIPLE == 0
        and cpu_library() is not None
    )


@torch.library.custom_op("moesaic::routed_mlp", mutates_args=(), device_types="cpu")
def routed_mlp(
    x: Tensor,
    tokens_per_expert: Tensor,
    token_ids: Tensor | None,
    slots: Tensor | None,
    routing_weights: Tensor | None,
    up: Tensor,
    up_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    activation: str,
) -> tuple[Tensor, Tensor]:
    """Return (out (T, H), pre (N, F or 2F)), both bf16.

    token_ids (N,), slots (T, K) and routing_weights (T, K) fp32 are given together, or none of them: then row n of x
    is row n of the experts' runs, and of the result, without a weight.
    """
    _check_routing(x, tokens_per_expert, token_ids, slots, routing_weights)
    call, kept = _call(
        x, tokens_per_expert, token_ids, slots, routing_weights, up, up_bias, down, down_bias, activation
    )
    pre = x.new_empty(call.rows, up.shape[1])
    out = x.new_empty(x.shape)
    call.pre, call.out = pre.data_ptr(), out.data_ptr()
    _run("moesaic_moe_training_forward", call)
    del kept
    return out, pre


@routed_mlp.register_fake
def _(x, tokens_per_expert, token_ids, slots, routing_weights, up, up_bias, down, down_bias, activation):  # type: ignore[no-untyped-def]
    rows = x.shape[0] if token_ids is None else token_ids.shape[0]
    return x.new_empty(x.shape), x.new_empty(rows, up.shape[1])


@torch.library.custom_op("moesaic::routed_mlp_backward", mutates_args=(), device_types="cpu")
def routed_mlp_backward(
    grad: Tensor,
    pre: Tensor,
    x: Tensor,
    tokens_per_expert: Tensor,
    token_ids: Tensor | None,
    slots: Tensor | None,
    routing_weights: Tensor | None,
    up: Tensor,
    up_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    activation: str,
    needs_x: bool,
    needs_up: bool,
    needs_down: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, routing_weights, up, up_bias, down, down_bias.

    Empty where there is no such input, or it is not needed; a bias's is needed with its matrix's.
    """
    call, kept = _call(
        x, tokens_per_expert, token_ids, slots, routing_weights, up, up_bias, down, down_bias, activation
    )
    grad, pre = grad.contiguous(), pre.contiguous()  # a hook may have kept it in another layout
    results = _gradients(x, routing_weights, up, up_bias, down, down_bias, needs_x, needs_up, needs_down)
    grad_x, grad_routing_weights, grad_up, grad_up_bias, grad_down, grad_down_bias = results
    call.pre, call.grad_out = pre.data_ptr(), grad.data_ptr()
    call.grad_x = grad_x.data_ptr() if needs_x else None
    call.grad_routing_weights = grad_routing_weights.data_ptr()
    if needs_up:
        call.grad_up = grad_up.data_ptr()
        call.grad_up_bias = None if up_bias is None else grad_up_bias.data_ptr()
    if needs_down:
        call.grad_down = grad_down.data_ptr()
        call.grad_down_bias = None if down_bias is None else grad_down_bias.data_ptr()
    _run("moesaic_moe_training_backward", call)
    del kept
    return results


@routed_mlp_backward.register_fake
def _(grad, pre, x, tokens_per_expert, *others):  # type: ignore[no-untyped-def]
    _, _, routing_weights, up, up_bias, down, down_bias, _, *needs = others
    return _gradients(x, routing_weights, up, up_bias, down, down_bias, *needs)


def _gradients(
    x: Tensor,
    routing_weights: Tensor | None,
    up: Tensor,
    up_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    needs_x: bool,
    needs_up: bool,
    needs_down: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    def like(tensor: Tensor | None) -> Tensor:
        return x.new_empty(0) if tensor is None else tensor.new_empty(tensor.shape)

    return (
        like(x if needs_x else None),
        like(routing_weights),
        like(up if needs_up else None),
        like(up_bias if needs_up else None),
        like(down if needs_down else None),
        like(down_bias if needs_down else None),
    )


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    *tensors, activation = inputs
    ctx.save_for_backward(output[1], *tensors)
    ctx.activation = activation
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, grad, _):  # type: ignore[no-untyped-def]
    pre, x, tokens_per_expert, token_ids, slots, routing_weights, up, up_bias, down, down_bias = ctx.saved_tensors
    if grad is None:
        return (None,) * 10
    needs = ctx.needs_input_grad
    needs_x, needs_up, needs_down = needs[0], needs[5] or needs[6], needs[7] or needs[8]
    grad_x, grad_routing_weights, grad_up, grad_up_bias, grad_down, grad_down_bias = routed_mlp_backward(
        grad, pre, x, tokens_per_expert, token_ids, slots, routing_weights, up, up_bias, down, down_bias,
        ctx.activation, needs_x, needs_up, needs_down,
    )  # fmt: skip
    return (
        grad_x if needs_x else None,
        None,
        None,
        None,
        None if routing_weights is None else grad_routing_weights,
        grad_up if needs[5] else None,
        grad_up_bias if needs[6] else None,
        grad_down if needs[7] else None,
        grad_down_bias if needs[8] else None,
        None,
    )


routed_mlp.register_autograd(_backward, setup_context=_setup_context)

_MATRICES = ("x", "up", "up_bias", "down", "down_bias")
_AUTOCAST = torch.library.Library("moesaic", "FRAGMENT")


def _autocast(*arguments):  # type: ignore[no-untyped-def]
    """Under autocast everything that is multiplied is bf16; the routing weights stay fp32."""
    schema = torch.ops.moesaic.routed_mlp.default._schema
    cast = [
        products.autocast(value) if argument.name in _MATRICES and value is not None else value
        for argument, value in zip(schema.arguments, arguments, strict=True)
    ]
    with torch.autocast("cpu", enabled=False):
        return torch.ops.moesaic.routed_mlp(*cast)


_AUTOCAST.impl("routed_mlp", _autocast, "AutocastCPU")


def _check_routing(
    x: Tensor,
    tokens_per_expert: Tensor,
    token_ids: Tensor | None,
    slots: Tensor | None,
    routing_weights: Tensor | None,
) -> None:
    """Every number of the table is a place in memory; autograd sees to it that it is still so in the backward pass."""
    num_tokens = x.shape[0]
    rows = num_tokens if token_ids is None else token_ids.shape[0]
    counts = tokens_per_expert.tolist()
    assert min(counts, default=0) >= 0 and sum(counts) == rows, (counts, rows)
    if token_ids is None:
        return
    assert slots is not None and routing_weights is not None
    assert slots.dim() == 2 and slots.shape == routing_weights.shape, (slots.shape, routing_weights.shape)
    assert slots.shape[0] == num_tokens and slots.shape[1] > 0, (slots.shape, num_tokens)
    for name, places, end in (("token_ids", token_ids, num_tokens), ("slots", slots, rows + 1)):
        if places.numel():
            least, most = (int(value) for value in torch.aminmax(places))
            assert least >= 0 and most < end, f"{name} ({least} to {most}) must be in [0, {end})"


def _call(
    x: Tensor,
    tokens_per_expert: Tensor,
    token_ids: Tensor | None,
    slots: Tensor | None,
    routing_weights: Tensor | None,
    up: Tensor,
    up_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    activation: str,
) -> tuple[_Call, list[Tensor]]:
    """Return the call's inputs, and the tensors that must live until it has returned."""
    num_tokens, hidden_size = x.shape
    num_experts, _, intermediate_size = down.shape
    inner = 2 * intermediate_size if is_gated(activation) else intermediate_size
    assert up.shape == (num_experts, inner, hidden_size), (up.shape, down.shape, x.shape)
    assert down.shape[1] == hidden_size and tokens_per_expert.shape == (num_experts,), (down.shape, x.shape)
    assert up_bias is None or up_bias.shape == (num_experts, inner), (up_bias.shape, up.shape)
    assert down_bias is None or down_bias.shape == (num_experts, hidden_size), (down_bias.shape, down.shape)
    rows = num_tokens if token_ids is None else token_ids.shape[0]
    kept: list[Tensor] = []

    def address(tensor: Tensor | None, dtype: torch.dtype) -> int | None:
        if tensor is None:
            return None
        assert tensor.dtype == dtype, (tensor.dtype, dtype)
        kept.append(tensor.contiguous())
        return kept[-1].data_ptr()

    call = _Call(
        tokens=num_tokens,
        routes=0 if slots is None else slots.shape[1],
        rows=rows,
        hidden=hidden_size,
        inner=intermediate_size,
        experts=num_experts,
        activation=ACTIVATIONS.index(activation),
        tokens_per_expert=address(tokens_per_expert, torch.int64),
        token_ids=address(token_ids, torch.int64),
        slots=address(slots, torch.int64),
        routing_weights=address(routing_weights, torch.float32),
        x=address(x, torch.bfloat16),
        up=address(up, torch.bfloat16),
        up_bias=address(up_bias, torch.bfloat16),
        down=address(down, torch.bfloat16),
        down_bias=address(down_bias, torch.bfloat16),
    )
    return call, kept


def _run(name: str, call: _Call) -> None:
    library = cpu_library()
    assert library is not None, "the operator is called only where applies() says so"
    library.function(name, "p")(ctypes.addressof(call))
