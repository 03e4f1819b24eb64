"""How long one MoE layer takes here, against a dense MLP of the same active FLOPs and against the machine's limit.

The layer is the one that models use: router, experts and, where asked for, the residual MLP. The dense MLP is
PyTorch's, in bf16 (fp32 where torch has no bf16 products), in the same run and in turn with it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moesaic.bench.share import Rate, Work, bound, operations_per_second
from moesaic.bench.turns import time_in_turn
from moesaic.config.model import ModelConfig, MoEConfig
from moesaic.errors import ConfigError
from moesaic.kernels import mxfp4, products
from moesaic.kernels.cpu import moe_training
from moesaic.kernels.device import select_device
from moesaic.kernels.limits import Limits, available_memory_bytes, measure_limits
from moesaic.kernels.packed import PackedMlp, pack_mlp
from moesaic.kernels.quantized import MAX_COLUMNS, QuantizedWeight, quantize_to_mxfp4, quantize_weight
from moesaic.model.feed_forward import FeedForward

Dtype = Literal["bf16", "int8", "int4", "mxfp4"]

# Weights that share a scale in 4 bits.
INT4_GROUP_SIZE = 64
_GROUP_SIZES: dict[Dtype, int] = {"int4": INT4_GROUP_SIZE, "mxfp4": mxfp4.GROUP_SIZE}
_WEIGHT_STD = 0.02


@dataclass(frozen=True, kw_only=True)
class MoELayerCase:
    """One layer and what is done with it; has_backward: forward and backward, as training does."""

    tokens: int
    num_experts: int
    top_k: int
    hidden_size: int = 512
    intermediate_size: int = 2048
    has_residual: bool = False
    has_backward: bool = False
    dtype: Dtype = "bf16"
    device: str = "cpu"

    @property
    def active_mlps(self) -> int:
        """MLPs of intermediate_size that every token passes through."""
        return self.top_k + int(self.has_residual)

    def config(self) -> ModelConfig:
        """Return the config of a model of the one layer. Raises: ConfigError for sizes that no layer has."""
        return ModelConfig(
            vocab_size=1,
            hidden_size=self.hidden_size,
            num_layers=1,
            num_heads=1,
            head_dim=2,
            intermediate_size=self.intermediate_size,
            moe=MoEConfig(
                num_experts=self.num_experts, top_k=self.top_k, residual="sum" if self.has_residual else None
            ),
        )

    def check(self) -> None:
        """Raises: ConfigError for what cannot be run."""
        self.config()
        if self.has_backward and self.dtype != "bf16":
            raise ConfigError(
                f"a backward pass was asked for with dtype {self.dtype}; quantised weights have no gradient; use "
                "--dtype bf16, or leave out --backward."
            )
        sizes = {"hidden": self.hidden_size, "intermediate": self.intermediate_size}
        group = _GROUP_SIZES.get(self.dtype, 1)
        if self.dtype in ("int8", "int4") and max(sizes.values()) > MAX_COLUMNS:
            name = max(sizes, key=lambda each: sizes[each])
            raise ConfigError(
                f"{name} ({sizes[name]}) is too large; sums of {self.dtype} take at most {MAX_COLUMNS} columns; lower "
                f"it, or use --dtype bf16 or mxfp4."
            )
        if wrong := [name for name, size in sizes.items() if size % group]:
            raise ConfigError(
                f"{wrong[0]} ({sizes[wrong[0]]}) is not a multiple of {group}; {self.dtype} weights share scales in "
                f"groups of so many; use a multiple of {group}, or --dtype int8."
            )


@dataclass(frozen=True, kw_only=True)
class MoELayerResult:
    """Medians of one layer's times, and the share of the limit.

    seconds, dense_seconds: of one call; ratio: the median of the rounds' ratios. limit: what bounds the layer, "bytes"
    or "FLOPs"; share_of_limit: max(bytes / bandwidth, FLOPs / peak) / seconds, for required_bytes and
    required_operations (touched_experts read once a pass). kernels: what computed it. dense_dtype: that of the dense
    MLP's products, fp32 where torch's of bf16 are slower.
    """

    case: MoELayerCase
    seconds: float
    dense_seconds: float
    dense_dtype: Literal["bf16", "fp32"]
    ratio: float
    share_of_limit: float
    limit: Literal["bytes", "FLOPs"]
    fastest_seconds: float
    slowest_seconds: float
    rounds: int
    touched_experts: int
    required_bytes: float
    required_operations: float
    bandwidth_bytes_per_second: float
    operations_per_second: float
    kernels: str
    threads: int


def bench_moe_layer(case: MoELayerCase, *, seconds: float = 10.0, limits: Limits | None = None) -> MoELayerResult:
    """Time one layer and its dense counterpart for about `seconds`; limits are measured first unless given.

    Raises: ConfigError, DeviceError for what cannot be run here.
    """
    case.check()
    device = select_device(case.device)
    _check_memory(case, device)
    limits = limits or measure_limits(device=str(device), reuse=False)
    peak = operations_per_second(limits, _rate(case.dtype))
    torch.manual_seed(0)
    layer = _layer(case, device)
    dense = _DenseMlp(case.hidden_size, case.intermediate_size * case.active_mlps, device)
    x = torch.randn(case.tokens, case.hidden_size, dtype=torch.bfloat16, device=device)  # (T, H)
    assert layer.moe is not None
    with torch.inference_mode():
        touched = int((layer.moe(x)[1].tokens_per_expert > 0).sum())
    candidates: dict[str, Callable[[], object]]
    if case.has_backward:
        candidates = {"moe": _training(layer, lambda x: layer(x)[0], x), "dense": _training(dense, dense, x)}
    else:
        candidates = {"moe": partial(_inference(case, layer), x), "dense": torch.inference_mode()(partial(dense, x))}
    wait = partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None
    times = time_in_turn(candidates, seconds=seconds, wait=wait)
    work = required_work(case, touched_experts=touched)
    fastest_possible = bound(work, limits)
    return MoELayerResult(
        case=case,
        seconds=times.median("moe"),
        dense_seconds=times.median("dense"),
        dense_dtype="fp32" if dense.dtype == torch.float32 else "bf16",
        ratio=times.ratio("moe", "dense"),
        share_of_limit=fastest_possible.share(times.median("moe")),
        limit=fastest_possible.limit,
        fastest_seconds=min(times.seconds["moe"]),
        slowest_seconds=max(times.seconds["moe"]),
        rounds=len(times.seconds["moe"]),
        touched_experts=touched,
        required_bytes=work.memory_bytes,
        required_operations=sum(work.operations.values()),
        bandwidth_bytes_per_second=limits.bandwidth_bytes_per_second,
        operations_per_second=peak,
        kernels=_kernels(case, layer, x, limits),
        threads=limits.threads,
    )


def required_work(case: MoELayerCase, *, touched_experts: int) -> Work:
    """Return what the layer must move and do at least.

    A forward pass reads the weights of the touched experts, the residual MLP and the router, reads the tokens and
    writes as many. A backward pass reads the weights again, writes a gradient for every weight, reads the tokens and
    their output's gradient, and writes the input's. What lies between the two products may stay in caches. The router
    works in fp32.
    """
    hidden, tokens = case.hidden_size, case.tokens
    mlp_weights = 3 * hidden * case.intermediate_size
    router_bytes = 4 * hidden * case.num_experts
    token_bytes = 2 * tokens * hidden
    residual = int(case.has_residual)
    read = (touched_experts + residual) * _mlp_bytes(case) + router_bytes
    memory_bytes = read + 2 * token_bytes
    mlp_operations = 2 * mlp_weights * tokens * case.active_mlps
    router_operations = 2 * hidden * case.num_experts * tokens
    if case.has_backward:
        gradients = (case.num_experts + residual) * _mlp_bytes(case) + router_bytes
        memory_bytes += read + gradients + 3 * token_bytes
        mlp_operations *= 3
        router_operations *= 3
    operations: dict[Rate, float] = {_rate(case.dtype): mlp_operations, "fp32": router_operations}
    return Work(memory_bytes, operations)


def _check_memory(case: MoELayerCase, device: torch.device) -> None:
    """Raise ConfigError for sizes beyond the memory that is free: what stands at once, at least.

    The weights of both in bf16, tokens and their outputs, and the dense MLP's three products of a call.
    """
    weights = 3 * case.hidden_size * case.intermediate_size * (case.num_experts + case.has_residual + case.active_mlps)
    activations = case.tokens * (2 * case.hidden_size + 3 * case.intermediate_size * case.active_mlps)
    required, available = 2 * (weights + activations), available_memory_bytes(device)
    if required > available:
        raise ConfigError(
            f"{case.tokens} tokens and {case.num_experts} experts of these sizes take {required / 1e9:,.1f} GB at "
            f"least; {available / 1e9:,.1f} GB of memory are free; lower --tokens, --experts, --hidden or "
            f"--intermediate."
        )


def _rate(dtype: Dtype) -> Rate:
    return "bf16" if dtype == "bf16" else "int8"


def _mlp_bytes(case: MoELayerCase) -> float:
    """Bytes of one expert: values, scales of a row of integers (fp32), and a byte for a group of 4 bits (in panels
    a step has two)."""
    hidden, inner = case.hidden_size, case.intermediate_size
    weights = 3 * hidden * inner
    if case.dtype == "bf16":
        return 2 * weights
    if case.dtype == "mxfp4":
        return weights / 2 + weights / mxfp4.GROUP_SIZE
    scales = 4 * (2 * inner + hidden)
    return scales + (weights if case.dtype == "int8" else weights / 2 + weights / INT4_GROUP_SIZE)


def _layer(case: MoELayerCase, device: torch.device) -> FeedForward:
    config = case.config()
    with torch.device("meta"):  # so that weights never stand in fp32
        layer = FeedForward(config, config.layers[0])
    assert layer.moe is not None
    layer.moe.experts.to(torch.bfloat16)
    if layer.mlp is not None:
        layer.mlp.to(torch.bfloat16)
    layer.to_empty(device=device)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=_WEIGHT_STD)
    for buffer in layer.buffers():
        buffer.zero_()
    return layer.train(case.has_backward)


class _DenseMlp(nn.Module):
    """A SwiGLU MLP as anybody writes it: in bf16, or fp32 on processors for which torch has no bf16 products."""

    def __init__(self, hidden_size: int, intermediate_size: int, device: torch.device) -> None:
        super().__init__()
        self.dtype = torch.float32 if products.is_widened(device, torch.bfloat16) else torch.bfloat16

        def linear(inputs: int, outputs: int) -> nn.Linear:
            return nn.Linear(inputs, outputs, bias=False, dtype=self.dtype, device=device)

        self.gate = linear(hidden_size, intermediate_size)
        self.up = linear(hidden_size, intermediate_size)
        self.down = linear(intermediate_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(self.dtype)
        return self.down(F.silu(self.gate(wide)) * self.up(wide)).to(x.dtype)


def _training(module: nn.Module, forward: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], None]:
    """Return a step: forward, and backward to every weight and to the input."""
    leaf = x.clone().requires_grad_()
    grad = torch.randn_like(x)

    def step() -> None:
        module.zero_grad(set_to_none=True)
        leaf.grad = None
        forward(leaf).backward(grad)

    return step


def _kernels(case: MoELayerCase, layer: FeedForward, x: Tensor, limits: Limits) -> str:
    """Return the name of what computes the experts: in training, not ours for every size."""
    assert layer.moe is not None
    if case.has_backward and x.device.type == "cpu":
        experts = layer.moe.experts.weights()
        return limits.kernels if moe_training.applies(x, experts.up, experts.down) else "reference"
    return limits.kernels


def _inference(case: MoELayerCase, layer: FeedForward) -> Callable[[Tensor], Tensor]:
    """Pack the layer's experts and its residual MLP, as model/pack does, and return its forward pass."""

    def pack(up: Tensor, down: Tensor) -> PackedMlp:
        return pack_mlp(_quantized(up, case.dtype), _quantized(down, case.dtype), activation="swiglu")

    assert layer.moe is not None
    experts = layer.moe.experts.weights()
    layer.moe.experts.packed = pack(experts.up, experts.down)
    if layer.mlp is not None:
        assert layer.mlp.gate_proj is not None
        gate_up = torch.cat([layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight])
        layer.mlp.packed = pack(gate_up, layer.mlp.down_proj.weight)
    return torch.inference_mode()(lambda x: layer(x)[0])


def _quantized(weight: Tensor, dtype: Dtype) -> Tensor | QuantizedWeight:
    if dtype == "bf16":
        return weight.detach()
    if dtype == "mxfp4":
        return quantize_to_mxfp4(weight)
    bits, group_size = (8, None) if dtype == "int8" else (4, INT4_GROUP_SIZE)
    return quantize_weight(weight.detach(), bits=bits, group_size=group_size)
