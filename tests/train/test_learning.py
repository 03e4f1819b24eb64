"""A model of each family learns from real text, with either optimizer."""

import math
from pathlib import Path
from typing import Any

import pytest

from moesaic.config.train import TrainConfig
from moesaic.data.corpus import embedded_corpus
from moesaic.data.prepare import prepare
from moesaic.errors import DataError
from moesaic.report.records import read_metrics
from moesaic.train.loop import train

VOCAB_SIZE = 512
MODELS: dict[str, dict[str, Any]] = {
    "dense": {},
    "moe": {"moe": {"num_experts": 4, "top_k": 2, "router": {"renormalize": True}}},
    "pr-moe": {
        "moe": {
            "num_experts": [4, 8],
            "residual": "softmax",
            "capacity": {"factor": 1.0, "drop_policy": "random"},
        }
    },
}


@pytest.fixture(scope="module")
def speeches(tmp_path_factory: pytest.TempPathFactory) -> Path:
    try:
        sources = sorted(embedded_corpus().glob("*.txt"))[:12]
    except DataError as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("speeches")
    prepare(sources, folder, vocab_size=VOCAB_SIZE, validation_fraction=0.1, num_workers=1)
    return folder


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("name", MODELS)
def test_the_loss_falls_on_real_text(speeches: Path, tmp_path: Path, name: str, optimizer: str) -> None:
    steps, batch_size, sequence_length = 30, 8, 64
    config = TrainConfig.from_dict(
        {
            "model": {
                "vocab_size": VOCAB_SIZE,
                "hidden_size": 32,
                "num_layers": 2,
                "num_heads": 2,
                "intermediate_size": 64,
                "max_positions": 64,
                **MODELS[name],
            },
            "data": {"path": str(speeches), "sequence_length": sequence_length},
            "tokens": steps * batch_size * sequence_length,
            "batch_size": batch_size,
            "log_every_steps": 5,
            "optimizer": {"name": optimizer},
            "schedule": {"learning_rate": 1e-2, "warmup_tokens": 2 * batch_size * sequence_length},
        }
    )
    result = train(config, tmp_path)
    records = read_metrics(tmp_path).train
    assert records[0].loss == pytest.approx(math.log(VOCAB_SIZE), abs=0.2)  # knows nothing yet
    assert result.loss is not None and result.validation_loss is not None
    assert result.loss < records[0].loss - 0.8
    assert result.validation_loss < records[0].loss - 0.8
    assert result.validation_loss == read_metrics(tmp_path).evaluation[-1].loss
