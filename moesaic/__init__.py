"""moesaic: train, shrink and serve Mixture-of-Experts language models.

Importing this module is cheap: it brings in no torch. The names below are loaded when they are first used.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# Public name -> the module that holds it. A sub-package's name (train) cannot be one of them: importing the
# sub-package would replace it.
_PUBLIC = {
    "ModelConfig": "moesaic.config.model",
    "MoEConfig": "moesaic.config.model",
    "FeedForwardConfig": "moesaic.config.model",
    "RouterConfig": "moesaic.config.model",
    "CapacityConfig": "moesaic.config.model",
    "TrainConfig": "moesaic.config.train",
    "load_train_config": "moesaic.config.load",
    "prepare": "moesaic.data.prepare",
    "MoELayer": "moesaic.moe.layer",
    "balance_loss": "moesaic.moe.balance",
    "Transformer": "moesaic.model.transformer",
    "generate": "moesaic.model.generate",
    "ExpertParallel": "moesaic.parallel.expert",
    "Trainer": "moesaic.train.loop",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'moesaic' has no attribute {name!r}; it has {', '.join(__all__)}.")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return __all__
