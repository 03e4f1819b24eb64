"""Named starting points: the paper's models with their training values and small ones.

A preset is a training config without `data.path`. Sources: DeepSpeed-MoE (arXiv 2201.05596), tables 2 and 6, and the
released training scripts. The inference models (2.4B, 8B, 24B, 47B) have no published training values and no published
head counts: 28, 32, 64 and 64 heads are ours and change no count, and their training values are those of the largest
published training run, 6.7B dense, with the longer decay to a lower rate that the scripts recommend for MoE.
"""

from collections.abc import Callable
from typing import Any

from moesaic.config.base import nearest
from moesaic.errors import ConfigError

_BILLION = 1_000_000_000
_WARMUP_TOKENS = 375_000_000


def _paper_model(
    num_layers: int, hidden_size: int, num_heads: int, init_std: float, moe: dict[str, Any] | None
) -> dict[str, Any]:
    return {
        "vocab_size": 50_304,
        "hidden_size": hidden_size,
        "num_layers": num_layers,
        "num_heads": num_heads,
        "max_positions": 2048,
        "positions": "learned",
        "norm": "layernorm",
        "attention_bias": "all",
        "mlp_bias": True,
        "activation": "gelu",
        "tie_embeddings": True,
        "dropout": 0.1,
        "init_std": init_std,
        "moe": moe,
    }


def _paper_moe(num_experts: int | list[int], residual: str | None = None) -> dict[str, Any]:
    return {
        "num_experts": num_experts,
        "top_k": 1,
        "every": 2,
        "residual": residual,
        "router": {"balance_loss": 0.01},
        "capacity": {"factor": 1.0, "min_capacity": 4, "drop_policy": "random"},
    }


def _paper_training(
    batch_size: int, micro_batch_size: int, learning_rate: float, min_learning_rate: float, decay_tokens: int
) -> dict[str, Any]:
    return {
        "data": {"sequence_length": 2048},
        "tokens": 300 * _BILLION,
        "batch_size": batch_size,
        "micro_batch_size": micro_batch_size,
        "activation_checkpointing": True,
        "optimizer": {"beta1": 0.9, "beta2": 0.95, "weight_decay": 0.1, "max_gradient_norm": 1.0},
        "schedule": {
            "kind": "cosine",
            "learning_rate": learning_rate,
            "min_learning_rate": min_learning_rate,
            "warmup_tokens": _WARMUP_TOKENS,
            "decay_tokens": decay_tokens,
        },
    }


def _paper(model: dict[str, Any], training: dict[str, Any]) -> dict[str, Any]:
    return {"model": model, **training}


def _inference(num_layers: int, hidden_size: int, num_heads: int) -> dict[str, Any]:
    return _paper(
        _paper_model(num_layers, hidden_size, num_heads, 0.01, _paper_moe(128)),
        _paper_training(1024, 1, 1.2e-4, 1.0e-6, 300 * _BILLION),
    )


def _tiny(moe: dict[str, Any] | None) -> dict[str, Any]:
    """Eight layers that two cores train in minutes; the vocabulary is `moesaic prepare`'s default."""
    return {
        "model": {
            "vocab_size": 4096,
            "hidden_size": 192,
            "num_layers": 8,
            "num_heads": 3,
            "intermediate_size": 768,
            "max_positions": 1024,
            "positions": "rotary",
            "norm": "layernorm",
            "attention_bias": "none",
            "activation": "gelu",
            "tie_embeddings": True,
            "moe": moe,
        },
        "data": {"sequence_length": 256},
        "tokens": 1_600_000,
        "batch_size": 8,
        "schedule": {
            "kind": "wsd",
            "learning_rate": 2e-3 if moe is None else 1.5e-3,
            "min_learning_rate": 0.0,
            "warmup_tokens": 80_000,
            "decay_tokens": 600_000,
        },
        "optimizer": {"weight_decay": 0.1},
    }


def _tiny_moe(num_experts: int | list[int], residual: str | None = None) -> dict[str, Any]:
    return {"num_experts": num_experts, "top_k": 1, "every": 2, "residual": residual, "router": {"balance_loss": 0.01}}


_PRESETS: dict[str, Callable[[], dict[str, Any]]] = {
    "dense-350m": lambda: _paper(
        _paper_model(24, 1024, 16, 0.014, None), _paper_training(256, 4, 3.0e-4, 3.0e-5, 260 * _BILLION)
    ),
    "dense-1.3b": lambda: _paper(
        _paper_model(24, 2048, 16, 0.014, None), _paper_training(512, 2, 2.0e-4, 2.0e-5, 260 * _BILLION)
    ),
    "dense-6.7b": lambda: _paper(
        _paper_model(32, 4096, 32, 0.01, None), _paper_training(1024, 4, 1.2e-4, 1.2e-5, 260 * _BILLION)
    ),
    "moe-350m-128": lambda: _paper(
        _paper_model(24, 1024, 16, 0.014, _paper_moe(128)), _paper_training(256, 4, 2.0e-4, 2.0e-6, 300 * _BILLION)
    ),
    "moe-1.3b-128": lambda: _paper(
        _paper_model(24, 2048, 16, 0.014, _paper_moe(128)), _paper_training(512, 8, 1.2e-4, 1.0e-6, 300 * _BILLION)
    ),
    "pr-moe-350m-32-64": lambda: _paper(
        _paper_model(24, 1024, 16, 0.014, _paper_moe([32] * 10 + [64] * 2, "softmax")),
        _paper_training(256, 4, 3.0e-4, 1.0e-6, 300 * _BILLION),
    ),
    "pr-moe-1.3b-64-128": lambda: _paper(
        _paper_model(24, 2048, 16, 0.014, _paper_moe([64] * 10 + [128] * 2, "softmax")),
        _paper_training(512, 8, 1.2e-4, 1.0e-6, 300 * _BILLION),
    ),
    "mos-350m": lambda: _paper(
        _paper_model(21, 1024, 16, 0.014, _paper_moe([32] * 8 + [64] * 2, "softmax")),
        _paper_training(256, 4, 3.0e-4, 1.0e-6, 300 * _BILLION),
    ),
    "mos-1.3b": lambda: _paper(
        _paper_model(21, 2048, 16, 0.014, _paper_moe([64] * 8 + [128] * 2, "softmax")),
        _paper_training(512, 4, 1.2e-4, 1.0e-6, 300 * _BILLION),
    ),
    "moe-2.4b-128": lambda: _inference(16, 3584, 28),
    "moe-8b-128": lambda: _inference(40, 4096, 32),
    "moe-24b-128": lambda: _inference(30, 8192, 64),
    "moe-47b-128": lambda: _inference(58, 8192, 64),
    "dense-tiny": lambda: _tiny(None),
    "moe-tiny-16": lambda: _tiny(_tiny_moe(16)),
    "pr-moe-tiny-8-16": lambda: _tiny(_tiny_moe([8, 8, 8, 16], "sum")),
}


def preset_names() -> list[str]:
    """Return the names of all presets."""
    return list(_PRESETS)


def preset(name: str) -> dict[str, Any]:
    """Return a fresh copy of a preset's values."""
    if name not in _PRESETS:
        raise ConfigError(f"{name!r} is not a preset; the name of one is required; {nearest(name, preset_names())}")
    return _PRESETS[name]()
