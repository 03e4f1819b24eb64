"""A few thousand tokens of real text, prepared once, and training configs of seconds on them."""

import atexit
import functools
import gc
import json
import os
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from moesaic.config.train import TrainConfig
from moesaic.kernels.threads import spin_briefly

if TYPE_CHECKING:
    from moesaic.data.tokenizer import Tokenizer
    from moesaic.kernels.limits import Limits

# Before any test loads torch: the suite has to pass beside other work on the machine.
spin_briefly()

# What `make emulate` tests in place of the machine's kernels, before other modules ask which there are.
if emulated := os.environ.get("MOESAIC_TEST_EMULATED"):
    from moesaic.kernels import select

    select.supported_instruction_sets = lambda: emulated.split(",")

ROOT = Path(__file__).resolve().parents[1]
VOCAB_SIZE = 320
# Unoptimised: it compiles four times as fast, and the tests' sizes are small.
SANITIZE = ("-O0", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")

DENSE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 16,
    "num_layers": 2,
    "num_heads": 2,
    "intermediate_size": 32,
    "max_positions": 32,
}
# Everything that draws random numbers or keeps state of its own: dropout, jitter, random dropping, a correction bias.
PR_MOE: dict[str, Any] = {
    **DENSE,
    "dropout": 0.1,
    "moe": {
        "num_experts": [4, 8],
        "top_k": 2,
        "residual": "softmax",
        "router": {"noise": "jitter", "score_correction_bias": True, "balance_scope": "global_batch", "z_loss": 1e-3},
        "capacity": {"factor": 1.0, "min_capacity": 1, "drop_policy": "random"},
    },
}
MODELS = {"dense": DENSE, "pr-moe": PR_MOE}
TOKENS_PER_STEP = 4 * 16


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--sanitize",
        action="store_true",
        help="run the C++ kernels under AddressSanitizer and UBSan, whose library `make sanitize` loads beforehand",
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--sanitize"):
        from moesaic.kernels import select
        from moesaic.kernels.cpu import build

        os.environ.pop("LD_PRELOAD", None)  # this process has it; compilers are slower with it
        # Every test gets its kernels through select, which loads each set once.
        select.load = functools.partial(select.load, extra_flags=SANITIZE)
        # A process of its own would not have the sanitizers' library; the self-test runs in this one all the same.
        build._try_elsewhere = lambda path: None


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Collect without collecting garbage: all that is made stays, and looking through it took a third of the time."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()  # nor is it looked through again while tests run
        gc.enable()
        atexit.register(gc.unfreeze)  # extension modules complain of what is never freed


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first, so that no worker begins one when the others are at their end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session", autouse=True)
def own_malloc() -> Iterator[None]:
    """Commands that run inside the tests' process leave its malloc alone: what they set could not be taken back."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moesaic.cli.main.tune_allocator", lambda: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def files_that_no_power_cut_threatens() -> Iterator[None]:
    """This process does not wait for the disk; tests of what is synchronised put in an os.fsync of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """On tensors this small a second thread only waits, ten times as long where other programs run."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def machine_limits() -> "Limits":
    """What a machine could do, of which nothing was measured."""
    from moesaic.kernels.limits import Limits

    return Limits(
        device="cpu",
        name="test",
        threads=1,
        torch_version="0",
        kernels="reference",
        buffer_bytes=1,
        bandwidth_bytes_per_second=1e10,
        bf16_flops_per_second=2e11,
        fp32_flops_per_second=1e11,
        int8_operations_per_second=None,
        torch_bandwidth_bytes_per_second=1e10,
        torch_bf16_flops_per_second=2e11,
        torch_fp32_flops_per_second=1e11,
        torch_int8_operations_per_second=None,
    )


@pytest.fixture(scope="session", autouse=True)
def training_without_what_takes_seconds(machine_limits: "Limits") -> Iterator[None]:
    """Training in this process neither measures the machine nor draws, which has tests of its own (`drawing`).

    Nor does it read all of the package's source again for each run's provenance.
    """
    from moesaic.train.provenance import code_fingerprint

    def no_plots(run_folder: Path, *, schedule: Callable[[int], float]) -> list[Path]:
        return []

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moesaic.train.loop.measure_limits", lambda **_: machine_limits)
        patch.setattr("moesaic.train.loop.tune_allocator", lambda: None)
        patch.setattr("moesaic.train.loop.write_plots", no_plots)
        patch.setattr("moesaic.train.provenance.code_fingerprint", functools.cache(code_fingerprint))
        yield


@pytest.fixture
def drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training draws its plots, as it does for users."""
    from moesaic.report.plots import write_plots

    monkeypatch.setattr("moesaic.train.loop.write_plots", write_plots)


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The paragraphs of the licence as documents, some 4,000 tokens."""
    from moesaic.data.prepare import prepare

    folder = tmp_path_factory.mktemp("tiny")
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    paragraphs = [" ".join(paragraph.split()) for paragraph in text.split("\n\n") if paragraph.strip()]
    source = folder / "text.jsonl"
    source.write_text("".join(json.dumps({"text": paragraph}) + "\n" for paragraph in paragraphs), encoding="utf-8")
    prepare([source], folder / "shards", vocab_size=VOCAB_SIZE, validation_fraction=0.2, num_workers=1)
    return folder / "shards"


@pytest.fixture(scope="session")
def beginning_tokenizer(tiny_data: Path) -> "Tokenizer":
    """The tokenizer of the tiny data with a post-processor that puts a begin token, `!`, before a text."""
    from moesaic.data.tokenizer import Tokenizer

    values = json.loads(Tokenizer.load(tiny_data).json_text)
    begin = {"id": "!", "ids": [values["model"]["vocab"]["!"]], "tokens": ["!"]}
    values["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "!", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"!": begin},
    }
    return Tokenizer(json.dumps(values), companions={"tokenizer_config.json": '{"bos_token": "!"}'})


@pytest.fixture(scope="session")
def make_config(tiny_data: Path) -> Callable[..., TrainConfig]:
    """A function (base="dense", steps=12, **changes) that returns a config with a checkpoint after every 4 steps."""

    def make(base: str = "dense", /, *, steps: int = 12, **changes: Any) -> TrainConfig:
        values: dict[str, Any] = {
            "model": MODELS[base],
            "data": {"path": str(tiny_data), "sequence_length": 16},
            "tokens": steps * TOKENS_PER_STEP,
            "batch_size": 4,
            "micro_batch_size": 2,
            "log_every_steps": 1,
            "schedule": {"learning_rate": 1e-2, "min_learning_rate": 1e-3, "warmup_tokens": 2 * TOKENS_PER_STEP},
            "evaluation": {"every_tokens": 2 * TOKENS_PER_STEP, "sequences": 4},
            "checkpoint": {"every_tokens": 4 * TOKENS_PER_STEP},
        }
        for key, value in changes.items():
            values[key] = {**values.get(key, {}), **value} if isinstance(value, dict) else value
        return TrainConfig.from_dict(values)

    return make
