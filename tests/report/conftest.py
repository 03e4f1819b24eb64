"""Records that look like training, and a run folder with them."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from moesaic.report.records import (
    METRICS_FILE,
    EvaluationRecord,
    EventRecord,
    ExpertRecord,
    Record,
    TrainRecord,
    to_line,
)

TOKENS_PER_RECORD = 4096


def fake_record(step: int, *, experts: Sequence[int] = (), broken: bool = False, seed: int = 0) -> TrainRecord:
    random = np.random.default_rng([seed, step])
    moe = None
    if experts:
        loads = [random.dirichlet(np.full(count, 20.0)) for count in experts]
        moe = ExpertRecord(
            layers=tuple(range(1, 2 * len(experts), 2)),
            load=tuple((math.nan,) * len(load) if broken else tuple(load.tolist()) for load in loads),
            drop_rate=tuple(math.nan if broken else 0.01 * place for place in range(len(experts))),
            entropy=tuple(0.5 + 0.1 / (place + 1) for place in range(len(experts))),
        )
    return TrainRecord(
        step=step,
        tokens=step * TOKENS_PER_RECORD,
        seconds=step * 0.5,
        loss=math.nan if broken else 3.0 + 5.0 / step + float(random.normal(0, 0.05)),
        balance_loss=1.01,
        z_loss=0.2,
        learning_rate=1e-3,
        gradient_norm=math.inf if broken else 0.7,
        tokens_per_second=8192.0,
        flops_per_second=4e11,
        share_of_peak=0.31,
        skipped_steps=int(broken),
        moe=moe,
    )


@pytest.fixture
def make_record() -> Callable[..., TrainRecord]:
    return fake_record


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """A function (num_records, experts=..., broken=steps) that writes a run folder."""

    def make(num_records: int, *, experts: Sequence[int] = (), broken: Sequence[int] = ()) -> Path:
        records: list[Record] = []
        for step in range(1, num_records + 1):
            records.append(fake_record(step, experts=experts, broken=step in broken))
            if step % 10 == 0:
                records.append(
                    EvaluationRecord(
                        step=step, tokens=step * TOKENS_PER_RECORD, seconds=step * 0.5, loss=3.1, sequences=8
                    )
                )
        records.append(EventRecord(step=num_records, message="saved [bold] é"))
        (tmp_path / METRICS_FILE).write_text("".join(map(to_line, records)), encoding="utf-8")
        return tmp_path

    return make
