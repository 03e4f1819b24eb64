"""What runs on the device of stand_in.py, in a process of its own that `test_simulated.py` starts."""

from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moesaic.config.model import ModelConfig
from moesaic.config.serve import EngineConfig, Sampling, SpeculationConfig
from moesaic.convert.quantize import quantize_run
from moesaic.data.tokenizer import Tokenizer
from moesaic.distill.run import distill, student_config
from moesaic.evaluate.perplexity import measure_perplexity, text_windows
from moesaic.hf.config import MoesaicConfig
from moesaic.hf.model import MoesaicForCausalLM
from moesaic.kernels import select
from moesaic.kernels.quantized import quantize_to_mxfp4
from moesaic.model.generate import generate
from moesaic.model.load import load_run
from moesaic.model.pack import pack_transformer, packed_shapes
from moesaic.model.transformer import Transformer
from moesaic.report.records import read_metrics
from moesaic.serve.engine import Engine
from moesaic.train.loop import train

from ..serve.conftest import FAMILIES, SIZES, TEXT, VOCAB_SIZE, build_model
from . import stand_in


@pytest.fixture(autouse=True)
def reference() -> Iterator[None]:
    """The processor computes by PyTorch's operations too, so that numbers differ by rounding alone."""
    with select.forced(select.REFERENCE):
        yield


@pytest.fixture
def gpu() -> Iterator[torch.device]:
    with stand_in.simulated():
        yield stand_in.GPU


class TestTheStandIn:
    """It refuses what CUDA refuses, or it would find nothing."""

    def test_a_tensor_says_where_it_is(self, gpu: torch.device) -> None:
        for made in (torch.ones(3, device="cuda"), torch.ones(3).to("cuda"), torch.tensor([1.0], device=gpu)):
            assert made.device == (made + 1).device == made.clone().device == gpu and not made.is_cpu
            assert made.cpu().device.type == "cpu" and not isinstance(made.cpu(), stand_in.OnGpu)

    @pytest.mark.parametrize(
        "mixed",
        [
            lambda x: x + torch.ones(3),
            lambda x: torch.ones(3).add_(x),
            lambda x: torch.cat([x, torch.ones(3)]),
            lambda x: torch.ones(3)[x.long()],
            lambda x: x.index_select(0, torch.tensor([0])),
            lambda x: x.normal_(generator=torch.Generator()),
            lambda x: torch.ones(3).normal_(generator=torch.Generator(x.device)),
            lambda x: x.numpy(),
        ],
    )
    def test_two_devices_are_not_mixed(self, mixed: Any, gpu: torch.device) -> None:
        with pytest.raises((RuntimeError, TypeError)):
            mixed(torch.ones(3, device=gpu))

    def test_what_cuda_takes_of_the_processor(self, gpu: torch.device) -> None:
        x = torch.arange(3.0, device=gpu)
        assert (x * torch.tensor(2.0)).tolist() == [0, 2, 4] and x[torch.tensor([2, 0])].tolist() == [2, 0]
        assert x.normal_(generator=torch.Generator(gpu)).device == gpu

    def test_tensors_without_memory_stay_so_and_draw_nothing(self, gpu: torch.device) -> None:
        before = torch.get_rng_state()
        assert torch.empty(3, device="meta").normal_().is_meta and torch.nn.Linear(2, 2, device="meta").weight.is_meta
        assert torch.equal(torch.get_rng_state(), before)

    def test_gradients_are_there_too(self, gpu: torch.device) -> None:
        x = torch.arange(3.0, device=gpu, requires_grad=True)
        (x**2).sum().backward()
        assert x.grad is not None and x.grad.device == gpu and x.grad.tolist() == [0, 2, 4]


def losses(run: Path) -> Tensor:
    return torch.tensor([record.loss for record in read_metrics(run).train])


TRAININGS: dict[str, tuple[str, dict[str, Any]]] = {
    "dense, bf16": ("dense", {"precision": "bf16"}),
    "pr-moe, bf16, muon": ("pr-moe", {"precision": "bf16", "optimizer": {"name": "muon"}}),
    "pr-moe, fp32, checkpointed": (
        "pr-moe",
        {"precision": "fp32", "activation_checkpointing": True, "data": {"document_mask": True}},
    ),
}


@pytest.mark.parametrize("name", TRAININGS)
def test_training(name: str, make_config: Any, tmp_path: Path) -> None:
    """And stopping, and going on."""
    base, changes = TRAININGS[name]
    begun, whole = (make_config(base, steps=steps, **changes) for steps in (3, 5))

    def learn(folder: Path) -> Tensor:
        train(begun, folder)
        train(whole, folder, resume=True)
        return losses(folder)

    expected = learn(tmp_path / "cpu")
    with stand_in.simulated():
        torch.testing.assert_close(learn(tmp_path / "gpu"), expected, atol=2e-3, rtol=0)


@pytest.mark.parametrize("schedule", ["staged", "automatic"])
def test_distillation_and_what_measures_it(schedule: str, make_config: Any, tmp_path: Path) -> None:
    train(make_config("pr-moe", steps=4), tmp_path / "teacher", device="cpu")
    config = student_config(
        tmp_path / "teacher", ["tokens=256", "log_every_steps=1", f"distill.schedule={schedule}"], num_layers=1
    )
    with stand_in.simulated():
        distill(config, tmp_path / "student")
        loaded = load_run(tmp_path / "student")
        assert loaded.device.type == loaded.model.device.type == "cuda"
        measured = measure_perplexity(loaded.model, text_windows(loaded, config.data.path), device=loaded.device)
        text = generate(loaded.model, [1, 2, 3], max_new_tokens=5, temperature=1.0, seed=1)
    here = load_run(tmp_path / "student", device="cpu", pack=False)
    alone = measure_perplexity(here.model, text_windows(here, config.data.path), device=here.device)
    assert measured.loss == pytest.approx(alone.loss, abs=1e-3) and len(text) == 5


SAMPLINGS = [
    Sampling(temperature=0.0, max_tokens=6, logprobs=2, prompt_logprobs=1, return_experts=True),
    Sampling(temperature=1.1, top_k=30, top_p=0.9, min_p=0.001, max_tokens=6, seed=3, repetition_penalty=1.2),
    Sampling(temperature=0.0, max_tokens=6, frequency_penalty=1.0, presence_penalty=0.5, logit_bias={5: 3.0}),
]


def on_device(model: Transformer, form: str, device: str) -> Transformer:
    """A copy of a model there, packed there."""
    model = deepcopy(model).to(device)
    if form != "packed-mxfp4":
        return model
    return pack_transformer(
        model, {name: quantize_to_mxfp4(model.get_parameter(name).detach()) for name in packed_shapes(model)}
    )


def served(engine: Engine) -> list[list[int]]:
    names = [engine.add_request(list(range(3, 6 + 11 * i)), SAMPLINGS[i % len(SAMPLINGS)]) for i in range(4)]
    tokens: dict[str, list[int]] = {name: [] for name in names}
    while engine.has_work:
        for output in engine.step():
            tokens[output.request_id] += [token.token_id for token in output.tokens]
    stats = engine.stats()
    assert stats.kv_blocks_used == 0
    return list(tokens.values())


@pytest.mark.parametrize(
    ("family", "form", "settings"),
    [
        *((family, "fp32", {}) for family in FAMILIES),
        ("mixtral", "packed-mxfp4", {}),
        ("mixtral", "bf16", {"kv_precision": "int8"}),
        ("mixtral", "fp32", {"speculation": SpeculationConfig(method="ngram")}),
        ("pr-moe", "fp32", {"speculation": SpeculationConfig(method="model", model="by hand", max_tokens=3)}),
    ],
)
def test_serving(family: str, form: str, settings: dict[str, Any]) -> None:
    tokenizer = Tokenizer.train([TEXT * 4], vocab_size=VOCAB_SIZE)
    model = build_model(family, "fp32" if form == "fp32" else "bf16")
    speculation = settings.get("speculation")
    draft = build_model("dense", "fp32", seed=1) if speculation and speculation.method == "model" else None

    def engine(device: str) -> Engine:
        there = None if draft is None else on_device(draft, "fp32", device)
        config = EngineConfig(max_batch_tokens=24, **settings)
        return Engine(on_device(model, form, device), tokenizer, config, draft_model=there)

    expected = served(engine("cpu"))
    vectors = engine("cpu").embed([[1, 2, 3]])
    with stand_in.simulated():
        on_gpu = engine("cuda")
        assert served(on_gpu) == expected
        assert on_gpu.embed([[1, 2, 3]]).cpu().allclose(vectors, atol=1e-2)


@pytest.mark.parametrize("experts", ["int8", "int4"])
def test_a_quantised_run(experts: Any, make_config: Any, tmp_path: Path) -> None:
    model = {"hidden_size": 64, "intermediate_size": 64}
    train(make_config("pr-moe", model=model, steps=3), tmp_path / "run", device="cpu")
    quantize_run(tmp_path / "run", tmp_path / "out", experts=experts, calibrate="none", force=True)
    expected = generate(load_run(tmp_path / "out", device="cpu").model, [1, 2, 3], max_new_tokens=8)
    with stand_in.simulated():
        loaded = load_run(tmp_path / "out")
        assert loaded.device.type == "cuda"
        assert generate(loaded.model, [1, 2, 3], max_new_tokens=8) == expected


def test_as_a_model_of_transformers() -> None:
    torch.manual_seed(0)
    model = MoesaicForCausalLM(MoesaicConfig(ModelConfig(**{**SIZES, **FAMILIES["pr-moe"]}))).eval()
    ids = torch.arange(20).view(2, 10)
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
    loss = model(input_ids=ids, labels=ids).loss
    with stand_in.simulated():
        there = deepcopy(model).to("cuda")
        on_gpu = ids.to("cuda")
        made = there.generate(on_gpu, attention_mask=torch.ones_like(on_gpu), max_new_tokens=8, do_sample=False)
        assert made.tolist() == expected.tolist()
        assert there(input_ids=on_gpu, labels=on_gpu).loss.item() == pytest.approx(loss.item(), abs=1e-4)
