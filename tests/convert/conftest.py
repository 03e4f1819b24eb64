"""Small models to convert: run folders of ours, and every family of transformers' imported and exported once."""

import importlib.util
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moesaic.checkpoint.store import resolve_checkpoint, save_checkpoint
from moesaic.checkpoint.stream import TensorReader
from moesaic.config.load import write_config
from moesaic.config.train import TrainConfig
from moesaic.convert import parity
from moesaic.convert.exporter import export_run
from moesaic.convert.importer import import_model
from moesaic.convert.parity import Certificate, verify_models
from moesaic.convert.source import CONFIG_NAME, WEIGHTS_NAME
from moesaic.data.shards import ShardSet
from moesaic.errors import ConversionError
from moesaic.model.transformer import Transformer

# Wide enough for groups of 32.
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


class LargestFp32(TorchDispatchMode):
    """While it is entered: the numbers of the largest fp32 tensor that operations return."""

    numbers = 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for each in tree_leaves(out):
            if isinstance(each, Tensor) and each.dtype is torch.float32:
                self.numbers = max(self.numbers, each.untyped_storage().nbytes() // 4)
        return out


MakeRun = Callable[..., Path]
Make = Callable[[Tensor], tuple[dict[str, Tensor], Tensor]]
Publish = Callable[[Path, Mapping[str, Any], Make], dict[str, Tensor]]


@pytest.fixture
def largest_fp32() -> LargestFp32:
    return LargestFp32()


@pytest.fixture(scope="session")
def saved(families: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A function (name of families.py, **values of its config) that returns such a model's folder, to be copied."""

    def save(name: str, /, **values: Any) -> Path:
        config_class, usual = families.FAMILIES[name]
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(families.FAMILIES, "asked for", (config_class, {**usual, **values}))
            return families.save(families.build("asked for"), tmp_path_factory.mktemp("saved") / "model")  # type: ignore[no-any-return]

    return save


@pytest.fixture(scope="session")
def bounded_memory() -> Callable[[], AbstractContextManager[None]]:
    """What is entered so that this process takes no more than a gigabyte more."""
    import resource

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


@pytest.fixture
def publish() -> Publish:
    """A function (folder, config, make) that quantises a saved model but for what never is; returns what it stands for.

    make: a matrix's parts, by what follows its module's name, and the matrix that they stand for.
    """

    def apply(folder: Path, config: Mapping[str, Any], make: Make) -> dict[str, Tensor]:
        stored, plain = dict[str, Tensor](), dict[str, Tensor]()
        for name, tensor in load_file(folder / WEIGHTS_NAME).items():
            is_packed = tensor.dim() == 2 and not any(part in name for part in ("embed", "lm_head", "gate.weight"))
            if not is_packed:
                stored[name] = plain[name] = tensor if "gate." in name else tensor.bfloat16()
                continue
            parts, plain[name] = make(tensor)
            stored |= {name.removesuffix(".weight") + suffix: part for suffix, part in parts.items()}
        save_file(stored, folder / WEIGHTS_NAME)
        values = json.loads((folder / CONFIG_NAME).read_text())
        (folder / CONFIG_NAME).write_text(json.dumps({**values, "quantization_config": config}))
        return plain

    return apply


@pytest.fixture
def comes_in_as(tmp_path: Path) -> Callable[[Path, Mapping[str, Tensor]], None]:
    """A function that imports a quantised folder to `run`, with transformers as the judge, and exports it to `out`:
    these tensors and no others, bit by bit."""

    def check(folder: Path, plain: Mapping[str, Tensor]) -> None:
        run, out = tmp_path / "run", tmp_path / "out"
        imported = import_model(folder, run)
        assert imported.failure is None and imported.judge == "transformers" and imported.not_compared is None
        assert imported.tensors is not None and imported.tensors.used == imported.tensors.source == len(plain)
        export_run(run, out)
        exported = load_file(out / WEIGHTS_NAME)
        assert exported.keys() == plain.keys()
        assert all(torch.equal(exported[name], tensor) for name, tensor in plain.items())
        assert "quantization_config" not in json.loads((out / CONFIG_NAME).read_text())
        for other in (run, out):
            found = verify_models(folder, other)
            assert found.failure is None and found.weights is not None and not found.weights.different

    return check


@pytest.fixture
def refuses(tmp_path: Path) -> Callable[[Path, Callable[[dict[str, Tensor]], object], str], None]:
    """A function that changes the tensors of a folder, the only one here, which is then refused and leaves nothing."""

    def check(folder: Path, change: Callable[[dict[str, Tensor]], object], message: str) -> None:
        tensors = load_file(folder / WEIGHTS_NAME)
        change(tensors)
        save_file(tensors, folder / WEIGHTS_NAME)
        with pytest.raises(ConversionError, match=message) as caught:
            import_model(folder, tmp_path / "deep" / "run")
        assert str(caught.value).count(";") >= 2, caught.value
        assert [path.name for path in tmp_path.iterdir()] == [folder.name]

    return check


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


@dataclass(frozen=True)
class Converted:
    """A model of transformers', the folder it was saved in, the run it became, and what the run was exported to."""

    theirs: Any
    source: Path
    run: Path
    exported: Path
    imported: Certificate
    written: Certificate

    @property
    def imported_names(self) -> list[str]:
        """Of the run's tensors."""
        with TensorReader(resolve_checkpoint(self.run).path / "model.safetensors") as reader:
            return list(reader.layout)


def shorten_check(patch: pytest.MonkeyPatch) -> None:
    """Of the prompts of a certificate two and the long one, and two new tokens: enough for what tests compare."""
    patch.setattr(parity, "PROMPTS", parity.PROMPTS[:2])
    patch.setattr(parity, "_NEW_TOKENS", 2)
    # A collection over all that the tests have imported takes longer than these models do.
    patch.setattr(parity, "gc", SimpleNamespace(collect=lambda: 0))


@pytest.fixture(scope="module")
def short_check() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        shorten_check(patch)
        yield


@pytest.fixture(scope="session")
def unchecked() -> Callable[[], AbstractContextManager[None]]:
    """What is entered for conversions that a test only begins with: they do not compare the two models."""

    @contextmanager
    def enter() -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(parity, "available_memory_bytes", lambda: 0)
            yield

    return enter


def _load_families() -> ModuleType:
    """Return the module families.py, beside this one; it imports transformers when it builds a model."""
    name = "convert_families"
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name("families.py"))
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


FAMILIES = _load_families()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that takes `family` is for the model of every family, unless it says which."""
    said = any("family" in mark.args[0] for mark in metafunc.definition.iter_markers("parametrize"))
    if "family" in metafunc.fixturenames and not said:
        metafunc.parametrize("family", FAMILIES.FAMILIES)


@pytest.fixture(scope="session")
def families() -> ModuleType:
    """families.py: small random models in transformers' words."""
    pytest.importorskip("transformers", reason="the families are transformers' models")
    return FAMILIES


@pytest.fixture(scope="session")
def converted(families: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Converted]]:
    """A function that imports a family's model, and exports it again, once for all tests."""
    from moesaic.convert.exporter import export_run
    from moesaic.convert.importer import import_model

    @cache
    def convert(name: str) -> Converted:
        folder = tmp_path_factory.mktemp("family")
        model = families.build(name)
        source = families.save(model, folder / "source")
        imported = import_model(source, folder / "run")
        written = export_run(folder / "run", folder / "exported")
        return Converted(model, source, folder / "run", folder / "exported", imported, written)

    with pytest.MonkeyPatch.context() as patch:
        shorten_check(patch)
        yield convert
