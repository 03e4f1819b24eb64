"""Run folders of small models whose matrices are wide enough for groups of 32, with weights that matter."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch

from moesaic.checkpoint.store import save_checkpoint
from moesaic.config.load import write_config
from moesaic.config.train import TrainConfig
from moesaic.data.shards import ShardSet
from moesaic.model.transformer import Transformer

MODEL: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "num_layers": 2,
    "num_heads": 2,
    "intermediate_size": 96,
    "max_positions": 32,
    # Ten times the usual: an untrained model would predict nothing, and nothing could go wrong.
    "init_std": 0.2,
}
MODELS: dict[str, dict[str, Any]] = {
    "dense": {**MODEL, "tie_embeddings": False, "positions": "learned", "norm": "layernorm", "attention_bias": "all",
              "mlp_bias": True, "activation": "gelu"},
    "moe": {**MODEL, "activation": "swiglu", "moe": {"num_experts": 4, "top_k": 2, "every": 1}},
    "latent": {**MODEL, "moe": {"num_experts": 4, "top_k": 2, "layers": [1], "residual": "sum"},
               "latent_attention": {"query_rank": 32, "kv_rank": 32, "nope_head_dim": 20, "rope_head_dim": 12,
                                    "value_head_dim": 16}},
    "pr-moe": {**MODEL, "mlp_bias": True, "moe": {"num_experts": [4, 8], "every": 1, "residual": "softmax"}},
}  # fmt: skip

MakeRun = Callable[..., Path]


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A function (name of families.py, **values of its config) that returns such a model's folder, to be copied."""
    import importlib.util

    pytest.importorskip("transformers", reason="the families are transformers' models")
    spec = importlib.util.spec_from_file_location("families_to_save", Path(__file__).with_name("families.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def save(name: str, /, **values: Any) -> Path:
        config_class, usual = module.FAMILIES[name]
        module.FAMILIES["asked for"] = config_class, {**usual, **values}
        return module.save(module.build("asked for"), tmp_path_factory.mktemp("saved") / "model")

    return save


@pytest.fixture(scope="session")
def bounded_memory() -> Callable[[], AbstractContextManager[None]]:
    """What is entered so that this process takes no more than a gigabyte more."""
    import resource
    from contextlib import contextmanager

    statm = Path("/proc/self/statm")
    if not statm.exists():
        pytest.skip("how much memory a process has is read from /proc")

    @contextmanager
    def bounded() -> Iterator[None]:
        taken = int(statm.read_text().split()[0]) * resource.getpagesize()
        before = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (taken + (1 << 30), before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_AS, before)

    return bounded


@pytest.fixture(scope="module")
def few_prompts() -> Iterator[None]:
    """Two of a certificate's prompts and two new tokens: what is compared is not what these tests are about."""
    from moesaic.convert import parity

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parity, "PROMPTS", parity.PROMPTS[1:3])
        patch.setattr(parity, "_NEW_TOKENS", 2)
        patch.setattr(parity.gc, "collect", lambda: 0)  # over all that the tests have imported
        yield


@pytest.fixture
def make_run(tiny_data: Path, tmp_path: Path) -> MakeRun:
    """A function (model name, **changes of the config) that returns a run folder with a checkpoint of step 7."""

    def make(model: str = "pr-moe", /, **changes: Any) -> Path:
        config = TrainConfig.from_dict(
            {
                "model": MODELS[model],
                "data": {"path": str(tiny_data), "sequence_length": 32},
                "tokens": 1024,
                "batch_size": 4,
                **changes,
            }
        )
        folder = tmp_path / f"run-{model}"
        folder.mkdir()
        write_config(config, folder / "config.yaml")
        ShardSet.open(tiny_data).load_tokenizer().save(folder)
        state = dict(Transformer(config.model).initialize(3).state_dict())
        save_checkpoint(
            folder,
            7,
            model=state,
            optimizer={"moment": torch.zeros(3)},
            metadata={"tokens": 1024, "validation_loss": 5.0},
        )
        return folder

    return make
