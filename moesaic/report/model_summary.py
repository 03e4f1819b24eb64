"""A model in a table: its layers, parameters, work per token and memory.

The numbers come from the caller (plan/cost computes them); what a run has done so far is in terminal.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from moesaic.config.model import FeedForwardConfig, ModelConfig
from moesaic.report.quantities import short_number
from moesaic.report.tables import plain_table

_OPTIMIZERS = {"adamw": "AdamW", "muon": "Muon"}


@dataclass(frozen=True, kw_only=True)
class ModelSummary:
    """What is known of a model without building it.

    `layer_parameters` and `layer_active_parameters` have one entry per layer; `parts` names the parameters by part.
    Activations are those of one micro-batch of `micro_batch_size` sequences of `sequence_length` tokens.
    """

    name: str
    config: ModelConfig
    parameters: int
    active_parameters: int
    parts: dict[str, int]
    layer_parameters: tuple[int, ...]
    layer_active_parameters: tuple[int, ...]
    context: int
    flops_per_token: int
    sequence_length: int
    micro_batch_size: int
    training_flops_per_token: int
    weights_bytes: int
    training_state_bytes: int
    optimizer: str
    kv_cache_bytes_per_token: int
    activation_bytes: int
    checkpointed_activation_bytes: int

    def to_json(self) -> dict[str, Any]:
        return {
            "parameters": self.parameters,
            "active_parameters": self.active_parameters,
            "parameters_by_part": dict(self.parts),
            "context": self.context,
            "flops_per_token": self.flops_per_token,
            "sequence_length": self.sequence_length,
            "micro_batch_size": self.micro_batch_size,
            "training_flops_per_token": self.training_flops_per_token,
            "memory": {
                "weights_bytes": self.weights_bytes,
                "training_state_bytes": self.training_state_bytes,
                "optimizer": self.optimizer,
                "kv_cache_bytes_per_token": self.kv_cache_bytes_per_token,
                "kv_cache_bytes": self.kv_cache_bytes_per_token * self.context,
                "activation_bytes": self.activation_bytes,
                "checkpointed_activation_bytes": self.checkpointed_activation_bytes,
            },
            "layers": [
                {
                    "index": index,
                    "kind": "moe" if layer.is_moe else "dense",
                    "intermediate_size": layer.intermediate_size,
                    "num_experts": layer.num_experts,
                    "top_k": layer.top_k,
                    "expert_intermediate_size": layer.expert_intermediate_size,
                    "residual": layer.residual,
                    "parameters": self.layer_parameters[index],
                    "active_parameters": self.layer_active_parameters[index],
                }
                for index, layer in enumerate(self.config.layers)
            ],
        }


def render_model(summary: ModelSummary) -> RenderableType:
    """Return the summary as tables for the terminal."""
    return Group(Text(_headline(summary)), Text(""), _layer_table(summary), Text(""), _cost_table(summary))


def equal_layers(config: ModelConfig) -> list[tuple[tuple[int, ...], FeedForwardConfig]]:
    """Return the distinct kinds of layer, each with the indices of its layers, in the order of first appearance."""
    kinds: dict[FeedForwardConfig, list[int]] = {}
    for index, layer in enumerate(config.layers):
        kinds.setdefault(layer, []).append(index)
    return [(tuple(indices), layer) for layer, indices in kinds.items()]


def describe_indices(indices: Sequence[int]) -> str:
    """Return ascending indices in short: `0-7`, `1, 3, ..., 19`, or the plain list of irregular ones."""
    steps = {after - before for before, after in pairwise(indices)}
    if len(indices) > 2 and steps == {1}:
        return f"{indices[0]}-{indices[-1]}"
    if len(indices) > 4 and len(steps) == 1:
        return f"{indices[0]}, {indices[1]}, ..., {indices[-1]}"
    return ", ".join(str(index) for index in indices)


def describe_layer(layer: FeedForwardConfig) -> str:
    """Return one line on a feed-forward part: `32 experts of 4096, top-1, + residual MLP of 4096 (softmax mix)`."""
    if not layer.is_moe:
        return f"dense MLP of {layer.intermediate_size}"
    experts = "1 expert" if layer.num_experts == 1 else f"{layer.num_experts} experts"
    text = f"{experts} of {layer.expert_intermediate_size}, top-{layer.top_k}"
    if layer.residual:
        mixed = "summed" if layer.residual == "sum" else f"{layer.residual} mix"
        text += f", + residual MLP of {layer.intermediate_size} ({mixed})"
    return text


def describe_flops(flops: int) -> str:
    """Return a number of FLOPs to three significant digits: `1.11 GFLOP`."""
    return _scaled(flops, 1000, ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP"))


def describe_bytes(num_bytes: int) -> str:
    """Return bytes to three significant digits in binary units: `24.5 GiB`."""
    return _scaled(num_bytes, 1024, ("B", "KiB", "MiB", "GiB", "TiB", "PiB"))


def _scaled(value: int, base: int, units: tuple[str, ...]) -> str:
    scaled, place = float(value), 0
    while scaled >= 999.5 and place < len(units) - 1:
        scaled, place = scaled / base, place + 1
    if place == 0:
        return f"{value} {units[0]}"
    return f"{scaled:.{0 if scaled >= 99.95 else 1 if scaled >= 9.995 else 2}f} {units[place]}"


def _headline(summary: ModelSummary) -> str:
    config = summary.config
    heads = f"{config.num_heads} heads of {config.head_dim}"
    if config.latent_attention is not None:
        heads += f" over latents of {config.latent_attention.kv_rank}"
    elif config.num_kv_heads != config.num_heads:
        heads += f" over {config.num_kv_heads} key/value heads"
    if config.sliding_window is not None:
        heads += f" that see {config.sliding_window:,} positions"
        if config.sliding_layers is not None:
            heads += f" in layers {describe_indices(config.sliding_layers)}"
    rotated = "" if config.rope_layers is None else f" in layers {describe_indices(config.rope_layers) or 'none'}"
    return (
        f"{summary.name}: {short_number(summary.parameters)} parameters, "
        f"{short_number(summary.active_parameters)} active per token\n"
        f"{config.num_layers} layers of width {config.hidden_size}, {heads}, vocabulary {config.vocab_size:,}, "
        f"{config.positions} positions up to {config.max_positions:,}{rotated}"
    )


def _layer_table(summary: ModelSummary) -> Table:
    table = plain_table()
    table.add_column("layers (from 0)")
    table.add_column("feed-forward", overflow="fold")
    table.add_column("parameters", justify="right", no_wrap=True)
    table.add_column("active", justify="right", no_wrap=True)
    for indices, layer in equal_layers(summary.config):
        table.add_row(
            describe_indices(indices),
            describe_layer(layer),
            short_number(sum(summary.layer_parameters[index] for index in indices)),
            short_number(sum(summary.layer_active_parameters[index] for index in indices)),
        )
    return table


def _cost_table(summary: ModelSummary) -> Table:
    batch = f"{summary.micro_batch_size} x {summary.sequence_length:,} tokens"
    table = plain_table(show_header=False)
    table.add_column()
    table.add_column(justify="right", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("parameters", short_number(summary.parameters), f"{summary.parameters:,}")
    for part, count in summary.parts.items():
        if count:
            table.add_row(f"  {part.replace('_', ' ')}", short_number(count), f"{count:,}")
    table.add_row("active parameters", short_number(summary.active_parameters), f"{summary.active_parameters:,}")
    table.add_row("per token, forward", describe_flops(summary.flops_per_token), f"at a context of {summary.context:,}")
    table.add_row(
        "per token, training",
        describe_flops(summary.training_flops_per_token),
        f"forward and backward, sequences of {summary.sequence_length:,}",
    )
    table.add_row("weights", describe_bytes(summary.weights_bytes), "bf16")
    table.add_row(
        "training state",
        describe_bytes(summary.training_state_bytes),
        f"fp32 master weights, gradients, moments of {_OPTIMIZERS[summary.optimizer]}",
    )
    table.add_row("activations", describe_bytes(summary.activation_bytes), f"of {batch}, estimated")
    table.add_row(
        "  recomputed", describe_bytes(summary.checkpointed_activation_bytes), "with activation_checkpointing: true"
    )
    cache = describe_bytes(summary.kv_cache_bytes_per_token * summary.context)
    each = describe_bytes(summary.kv_cache_bytes_per_token)
    table.add_row("KV cache", cache, f"of {summary.context:,} tokens, {each} each, bf16")
    return table
