"""Whole models on the device of stand_in.py, by kernels in Triton in its interpreter; `test_triton.py` starts it."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moesaic.config.serve import EngineConfig, Sampling
from moesaic.data.tokenizer import Tokenizer
from moesaic.kernels import select
from moesaic.kernels.quantized import QuantizedWeight, quantize_to_mxfp4, quantize_weight
from moesaic.kernels.triton import products
from moesaic.model.generate import generate
from moesaic.model.kv_cache import BatchCache
from moesaic.model.load import load_run
from moesaic.model.pack import pack_transformer, packed_shapes
from moesaic.model.transformer import Transformer
from moesaic.serve.engine import Engine
from moesaic.serve.runner import Runner
from moesaic.train.loop import train

from ..serve.conftest import FAMILIES, TEXT, VOCAB_SIZE, build_model
from . import interpreter, stand_in

interpreter.mend()


@pytest.fixture(autouse=True)
def reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the processor PyTorch's operations compute, until a test asks for ours; wide tiles, since programs run one by
    one here."""
    monkeypatch.setenv(select.VARIABLE, select.REFERENCE)
    monkeypatch.setattr(products, "multiprocessors", lambda device: 1)


FORMS: dict[str, Callable[[Tensor], QuantizedWeight] | None] = {
    "bf16": None,
    "int8": lambda weight: quantize_weight(weight, bits=8),
    "int4": lambda weight: quantize_weight(weight, bits=4, group_size=32),
    "mxfp4": quantize_to_mxfp4,
}


def packed(model: Transformer, form: str, device: str) -> Transformer:
    model, round_to = deepcopy(model).to(device), FORMS[form]
    matrices = {} if round_to is None else packed_shapes(model)
    return pack_transformer(
        model, {name: round_to(model.get_parameter(name).detach()) for name in matrices if round_to is not None}
    )


@pytest.mark.parametrize(
    ("family", "form", "kv_precision"),
    [
        *((family, "bf16", "bf16") for family in FAMILIES),
        *(("mixtral", form, "bf16") for form in ("int4", "mxfp4")),
        ("dense", "int8", "int8"),
    ],
)
def test_serving_with_triton(family: str, form: str, kv_precision: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A packed model by our kernels: a prompt, the rest of it, and a token."""
    model = build_model(family, "bf16")
    tokens = torch.randint(0, VOCAB_SIZE, (2, 16), generator=torch.Generator().manual_seed(1))

    def computed(device: str) -> tuple[Tensor, Tensor, Tensor]:
        own = packed(model, form, device)
        dtype = torch.int8 if kv_precision == "int8" else torch.bfloat16
        cache, passes = BatchCache(own.config, 2, 40, dtype=dtype, device=own.device), []
        for part in tokens.to(device).split([9, 6, 1], 1):
            out = own.infer(part.flatten(), cache.extend(*part.shape), torch.arange(part.numel()))
            chosen = [each.cpu() for each in out.expert_ids] or [torch.zeros(part.numel(), 1, dtype=torch.int64)]
            passes.append((out.hidden.cpu(), out.logits.cpu(), torch.cat(chosen, 1)))
        hidden, logits, chosen = (torch.cat(each) for each in zip(*passes, strict=True))
        return hidden.float(), logits, chosen

    expected_hidden, expected_logits, expected_chosen = computed("cpu")
    monkeypatch.setenv(select.VARIABLE, "auto")
    with stand_in.simulated():
        assert select.uses_triton(stand_in.GPU), select.cuda_kernels(stand_in.GPU)
        hidden, logits, chosen = computed("cuda")
    # A last bit of bf16 moves a few routes that are near a tie.
    same = (chosen == expected_chosen).all(1)
    assert same.float().mean() >= 0.75, same
    for made, wanted in ((hidden[same], expected_hidden[same]), (logits[same], expected_logits[same])):
        # The C++ kernels are as far away; of 1 or more it would be another number.
        assert ((made - wanted).norm(dim=1) / wanted.norm(dim=1)).median() < 0.06


def test_an_engine_has_its_kernels_compiled_before_it_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(select.VARIABLE, "auto")
    tokenizer = Tokenizer.train([TEXT * 4], vocab_size=VOCAB_SIZE)
    passes: list[tuple[int, int]] = []
    run = Runner.run

    def note(runner: Runner, parts: Any, rows: Any = ()) -> Any:
        passes.append((len(parts[0].tokens), parts[0].length))
        return run(runner, parts, rows)

    monkeypatch.setattr(Runner, "run", note)
    with stand_in.simulated():
        model = packed(build_model("dense", "bf16"), "bf16", "cuda")
        engine = Engine(model, tokenizer, EngineConfig(max_batch_tokens=6, max_length=40))
        assert passes == [(1, 1), (2, 2), (4, 4), (1, 192)] and engine.stats().kv_blocks_used == 0
        engine.add_request([5, 6, 7], Sampling(temperature=0.0, max_tokens=2))
        while engine.has_work:
            outputs = engine.step()
        assert [token.token_id for token in outputs[-1].tokens]
        expected = generate(model, [5, 6, 7], max_new_tokens=2)
    assert outputs[-1].tokens[-1].token_id == expected[-1]


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_a_run_is_packed_for_triton(
    precision: Any, make_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And its texts are scored without a cache, and continued with one."""
    model = {"hidden_size": 64, "intermediate_size": 64}
    train(make_config("pr-moe", model=model, steps=3, precision="bf16"), tmp_path / "run", device="cpu")
    tokens = torch.arange(3, 19)[None]

    def logits(device: str) -> Tensor:
        loaded = load_run(tmp_path / "run", device=device, precision=precision)
        assert loaded.model.is_packed == (device == "cuda" or precision == "int8")
        assert len(generate(loaded.model, [1, 2, 3], max_new_tokens=2)) == 2
        with torch.no_grad():
            return loaded.model.logits(loaded.model(tokens.to(device)).hidden).cpu()[0]

    expected = logits("cpu")
    monkeypatch.setenv(select.VARIABLE, "auto")
    with stand_in.simulated():
        made = logits("cuda")
    assert ((made - expected).norm(dim=1) / expected.norm(dim=1)).median() < 0.06
