"""The pass in one call gives what the packed layers give one by one, for every family of models."""

import ctypes
import math
import mmap
import os
import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moesaic.config.model import ModelConfig
from moesaic.errors import GenerationError
from moesaic.kernels import decode, select
from moesaic.kernels.decode import DecodePlan
from moesaic.kernels.paged_attention import PagedBatch
from moesaic.kernels.quantized import QuantizedWeight, quantize_to_mxfp4, quantize_weight
from moesaic.model.kv_cache import CacheStep, allocate_storage
from moesaic.model.pack import pack_transformer
from moesaic.model.transformer import Transformer

from .instruction_sets import COMPILED

SIZES: dict[str, Any] = {
    "vocab_size": 61, "hidden_size": 64, "num_layers": 2, "num_heads": 4, "intermediate_size": 96, "max_positions": 320,
    "init_std": 0.2,
}  # fmt: skip
GPT: dict[str, Any] = {
    "positions": "learned", "norm": "layernorm", "attention_bias": "all", "mlp_bias": True, "activation": "gelu"
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"num_kv_heads": 2, "tie_embeddings": False},
    "gpt": GPT,
    "qwen": {"num_kv_heads": 1, "qk_norm": "head", "head_dim": 8, "attention_bias": "qkv"},
    "olmoe": {
        "num_kv_heads": 2, "qk_norm": "full",
        "moe": {"num_experts": 4, "top_k": 2}, "attention_scale": 0.4,
    },
    "hunyuan": {
        "num_kv_heads": 2, "qk_norm": "rotated_head", "head_dim": 10, "attention_bias": "qkv",
        "moe": {"num_experts": 4, "top_k": 2, "residual": "sum", "router": {"renormalize": True}},
    },
    "turned in one layer, a window in the other": {
        "num_kv_heads": 1, "rope_layers": [1], "sliding_window": 33, "sliding_layers": [0],
    },
    "norms behind": {
        "num_kv_heads": 2, "qk_norm": "full", "norm_place": "behind", "residual_scale": 0.7,
        "moe": {"num_experts": 5, "top_k": 2, "layers": [1]},
    },
    "latent attention, norms behind": {
        "latent_attention": {"kv_rank": 32, "nope_head_dim": 12, "rope_head_dim": 4, "value_head_dim": 20},
        "num_heads": 3, "norm_place": "behind",
    },
    "gpt, norms behind": GPT | {"norm_place": "behind", "moe": {"num_experts": 5, "every": 2}},
    "no layer turned": {"num_kv_heads": 2, "qk_norm": "full", "rope_layers": []},
    "yarn": {
        "num_kv_heads": 2, "head_dim": 8,
        "rope_scaling": {"kind": "yarn", "factor": 4.0, "original_max_positions": 64},
    },
    "a window on every layer": {"num_kv_heads": 1, "sliding_window": 33},
    "part of a head": {"num_kv_heads": 2, "rope_head_dim": 4, "qk_norm": "head"},
    "one head, normed as all are": {"num_heads": 1, "num_kv_heads": 1, "head_dim": 10, "qk_norm": "full"},
    "odd sizes": {
        "hidden_size": 50, "head_dim": 7, "num_heads": 3, "positions": "learned", "activation": "gelu_tanh",
        "intermediate_size": 37,
    },
    "mixtral": {"num_kv_heads": 2, "moe": {"num_experts": 5, "top_k": 2, "router": {"renormalize": True}}},
    "top-1 on every second layer": GPT | {"moe": {"num_experts": 5, "every": 2}},
    "pyramid, residual softmax": GPT
    | {"moe": {"num_experts": [2, 7], "residual": "softmax", "intermediate_size": [64, 16]}},
    "five layers, one of them dense": {
        "num_layers": 5, "moe": {"num_experts": [5, 4, 3, 6], "top_k": [1, 2, 2, 1], "layers": [0, 1, 3, 4]}
    },
    "residual sum": {"moe": {"num_experts": 3, "layers": [1], "residual": "sum"}},
    "residual sigmoid": {
        "moe": {"num_experts": 6, "top_k": 2, "residual": "sigmoid", "residual_intermediate_size": 33}
    },
    "experts scaled": {
        "moe": {"num_experts": 5, "top_k": 2, "residual": "sum", "output_scale": True, "router": {"scale": 1.3}}
    },
    "gpt-oss": {
        "num_layers": 4, "num_kv_heads": 2, "attention_bias": "all", "mlp_bias": True, "activation": "swiglu_oai",
        "attention_sinks": True, "sliding_window": 50, "sliding_layers": [0, 2], "init_std": 0.4,
        "moe": {"num_experts": 9, "top_k": 4, "router": {"renormalize": True, "bias": True}},
    },
    "granite": {
        "num_kv_heads": 2, "attention_scale": 0.4, "embedding_scale": 2.5, "residual_scale": 0.3, "logits_scale": 0.6,
        "moe": {"num_experts": 5, "top_k": 2, "residual": "sum", "router": {"renormalize": True}},
    },
    "gpt, scaled": GPT | {"embedding_scale": 0.7, "residual_scale": 1.5, "logits_scale": 1.2, "tie_embeddings": False},
    "deepseek": {
        "moe": {
            "num_experts": 8, "top_k": 2, "residual": "sum",
            "router": {
                "scoring": "sigmoid", "renormalize": True, "scale": 2.5, "num_groups": 4, "top_groups": 2,
                "score_correction_bias": True,
            },
        }
    },
    # Not a multiple of 32 anywhere; what is stored of a head is wider than a split's rows of queries, or rows are many.
    "latent attention": {
        "latent_attention": {"kv_rank": 40, "nope_head_dim": 12, "rope_head_dim": 6, "value_head_dim": 20},
        "num_heads": 3, "num_layers": 3, "moe": {"num_experts": 4, "top_k": 2, "layers": [1, 2], "residual": "sum"},
    },
    "latent attention, query rank": {
        "latent_attention": {
            "query_rank": 32, "kv_rank": 64, "nope_head_dim": 32, "rope_head_dim": 32, "value_head_dim": 32,
        },
        "num_heads": 20, "attention_scale": 0.2, "moe": {"num_experts": 4, "top_k": 2},
        "rope_scaling": {"kind": "yarn", "factor": 4.0, "original_max_positions": 64},
    },
    "latent attention, odd sizes": {
        "latent_attention": {
            "query_rank": 11, "kv_rank": 5, "nope_head_dim": 7, "rope_head_dim": 2, "value_head_dim": 9,
            "norm_epsilon": 0.01,
        },
        "hidden_size": 50, "num_heads": 72, "norm": "layernorm", "activation": "gelu_tanh", "intermediate_size": 37,
    },
}  # fmt: skip
# One by one these take PyTorch's LayerNorm or its exp, which differ in the last bits of fp32, and so here and there in
# a rounding to bf16.
NOT_TO_THE_BIT = (
    "gpt", "gpt, scaled", "gpt, norms behind", "top-1 on every second layer", "pyramid, residual softmax",
    "residual sigmoid", "latent attention, odd sizes",
)  # fmt: skip
# A prompt and a chunk of one, single tokens of others, one that rests, a context of more than one split of 256; and so
# few tokens that every thread prepares them for itself.
STEPS = [[40, 3, 270, 1], [1, 0, 1, 1], [5, 1, 1, 0], [1, 1, 1, 1], [0, 0, 1, 0], [1, 0, 1, 0]]


@pytest.fixture(params=COMPILED)
def kernels(request: pytest.FixtureRequest) -> Iterator[str]:
    if not select.supported_instruction_sets():
        pytest.skip("no x86 processor with AVX2")
    with select.forced(request.param):
        yield request.param


class Sequences:
    """Ragged sequences in one pool of blocks, their turns given by `counts`."""

    def __init__(self, config: ModelConfig, *, dtype: torch.dtype = torch.bfloat16) -> None:
        number, self.config = len(STEPS[0]), config
        each = 10
        self.tables = torch.randperm(number * each, generator=torch.Generator().manual_seed(3)).int().view(number, each)
        self.storage = allocate_storage(config, number * each, block_size=32, dtype=dtype, device=torch.device("cpu"))
        self.lengths = [0] * number
        self.counts = [0] * number

    def extend(self, batch_size: int, length: int) -> CacheStep:
        assert (batch_size, length) == (1, sum(self.counts))
        self.lengths = [before + new for before, new in zip(self.lengths, self.counts, strict=True)]
        starts = [0, *torch.tensor(self.counts).cumsum(0).tolist()]
        batch = PagedBatch(
            torch.tensor(starts, dtype=torch.int32), torch.tensor(self.lengths, dtype=torch.int32), self.tables
        )
        return CacheStep(self.storage, batch)

    def retract(self, length: int) -> None:
        assert length == sum(self.counts)
        self.lengths = [after - new for after, new in zip(self.lengths, self.counts, strict=True)]


def build(family: str, quantize: str = "bf16") -> Transformer:
    model = Transformer(ModelConfig.from_dict({**SIZES, **FAMILIES[family]}), compute_dtype=torch.bfloat16)
    model.initialize(0)
    generator = torch.Generator().manual_seed(1)
    for name, tensor in model.state_dict().items():
        if name.endswith(("bias", "norm.weight", "output_scale", "sinks")):
            tensor.add_(torch.randn(tensor.shape, generator=generator), alpha=0.3)
    return pack_transformer(model, {} if quantize == "bf16" else quantized(model, quantize))


def quantized(model: Transformer, form: str) -> dict[str, QuantizedWeight]:
    """Every matrix that can be, of a model whose sizes are multiples of 32."""
    leave = ("router.weight", "bias", "position_embedding", "mix.weight")
    weights = {}
    for name, parameter in model.named_parameters():
        is_embedding = name == "embedding" and model.lm_head is not None
        if parameter.dim() > 1 and not name.endswith(leave) and not is_embedding:
            weight = parameter.detach()
            if form == "int8" or weight.shape[-1] % 32:
                weights[name] = quantize_weight(weight, bits=8)
            elif form == "int4":
                weights[name] = quantize_weight(weight, bits=4, group_size=32)
            else:
                weights[name] = quantize_to_mxfp4(weight)
    return weights


@torch.no_grad()
def run(model: Transformer, *, layer_by_layer: bool, cache_dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    sequences = Sequences(model.config, dtype=cache_dtype)
    generator = torch.Generator().manual_seed(2)
    hidden = []
    for counts in STEPS:
        sequences.counts = counts
        tokens = torch.randint(61, (1, sum(counts)), generator=generator)
        # Padding is what the call of one piece leaves to the layers; here there is none.
        valid = torch.ones_like(tokens, dtype=torch.bool) if layer_by_layer else None
        out = model(tokens, cache=sequences, valid=valid)
        assert bool(out.moe) == (layer_by_layer and bool(model.config.moe_layers))
        hidden.append(out.hidden)
    return hidden


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_layers_one_by_one(kernels: str, family: str) -> None:
    model = build(family)
    for whole, pieces in zip(run(model, layer_by_layer=False), run(model, layer_by_layer=True), strict=True):
        if family in NOT_TO_THE_BIT:
            errors = (whole - pieces).float().norm(dim=-1) / pieces.float().norm(dim=-1)
            assert float(errors.median()) < 2**-8 and float(errors.max()) < 0.5, errors
        else:
            assert torch.equal(whole, pieces)


@pytest.mark.parametrize("family", ["llama", "latent attention, norms behind"])
def test_positions_are_turned_as_far_as_texts_reach(kernels: str, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = run(build(family), layer_by_layer=False)
    monkeypatch.setattr(decode, "_FIRST_POSITIONS", 8)
    with torch.inference_mode():  # in which the table is made, and without which it grows
        model = build(family)
    plan = model.find_plan()
    assert plan is not None
    table = plan.model.rotary
    assert table is not None and table.num_positions == 8
    for got, wanted in zip(run(model, layer_by_layer=False), expected, strict=True):
        assert torch.equal(got, wanted)
    assert 8 < table.num_positions <= SIZES["max_positions"]


@pytest.mark.parametrize("form", ["int8", "int4", "mxfp4"])
@pytest.mark.parametrize(
    ("family", "cache_dtype"), [("mixtral", torch.bfloat16), ("mixtral", torch.int8), ("gpt-oss", torch.bfloat16)]
)
def test_quantised_equals_the_layers_one_by_one(kernels: str, family: str, form: str, cache_dtype: torch.dtype) -> None:
    model = build(family, form)
    whole, pieces = (run(model, layer_by_layer=each, cache_dtype=cache_dtype) for each in (False, True))
    assert all(torch.equal(one, other) for one, other in zip(whole, pieces, strict=True))


@pytest.mark.parametrize("form", ["bf16", "int8", "int4", "mxfp4"])
@pytest.mark.parametrize("family", ["latent attention", "latent attention, query rank"])
def test_quantised_latent_attention_equals_the_layers_one_by_one(kernels: str, family: str, form: str) -> None:
    model = build(family, form)
    whole, pieces = (run(model, layer_by_layer=each) for each in (False, True))
    assert all(torch.equal(one, other) for one, other in zip(whole, pieces, strict=True))


@torch.no_grad()
@pytest.mark.parametrize("family", ["mixtral", "latent attention", "latent attention, query rank"])
def test_a_sequence_gives_the_same_bits_alone_in_chunks_and_with_any_threads(kernels: str, family: str) -> None:
    model = build(family)
    tokens = torch.randint(61, (60,), generator=torch.Generator().manual_seed(4))
    expected: Tensor | None = None
    before = torch.get_num_threads()
    try:
        for threads, cuts in ((1, [0, 60]), (3, [0, 33, 34, 40, 60]), (2, [0, 1, 2, 59, 60]), (11, [0, 31, 60])):
            torch.set_num_threads(threads)
            sequences, parts = Sequences(model.config), []
            for first, last in pairwise(cuts):
                sequences.counts = [0, last - first, 2, 0]  # beside somebody else's
                both = torch.cat([tokens[first:last], torch.tensor([threads, last])])
                parts.append(model(both[None], cache=sequences).hidden[0, : last - first])
            got = torch.cat(parts)
            expected = got if expected is None else expected
            assert torch.equal(got, expected)
    finally:
        torch.set_num_threads(before)


@torch.no_grad()
@pytest.mark.parametrize("form", ["bf16", "int4"])
def test_logits_are_the_heads_of_the_wanted_tokens(kernels: str, form: str) -> None:
    model = build("mixtral", form)
    for counts, rows in (
        ([9, 1, 3, 1], [8, 9, 12, 13]),
        ([1, 1, 1, 1], [0, 1, 2, 3]),
        ([1, 0, 1, 0], [1]),
        ([0, 1, 0, 0], [0]),
    ):
        sequences = Sequences(model.config)
        sequences.counts = counts
        tokens = torch.arange(sum(counts)) + 7
        step = sequences.extend(1, sum(counts))
        decoded = model.infer(tokens, step, torch.tensor(rows))
        assert torch.equal(decoded.logits, model.logits(decoded.hidden[rows]))
        assert model.infer(tokens, step).logits.shape == (0, 61)


@torch.no_grad()
def test_layers_one_by_one_give_the_same_logits_or_none() -> None:
    model = build("mixtral", "int8")
    sequences = Sequences(model.config)
    sequences.counts = [0, 5, 0, 2]
    tokens = torch.arange(7)
    step = sequences.extend(1, 7)
    with select.forced("reference"):
        decoded = model.infer(tokens, step, torch.tensor([4, 6]))
        assert torch.equal(decoded.logits, model.logits(decoded.hidden[[4, 6]]))
        assert model.infer(tokens, step).logits.shape == (0, 61)


def large_vocabulary(logits_of: dict[int, float], *, size: int = 2 * 4096 + 37) -> Transformer:
    """A model whose logits for every token are those given, and below them elsewhere."""
    config = ModelConfig.from_dict({**SIZES, "vocab_size": size, "tie_embeddings": False, "norm": "layernorm"})
    model = Transformer(config, compute_dtype=torch.bfloat16)
    model.initialize(0)
    assert model.lm_head is not None
    with torch.no_grad():
        # All final hidden states are (1, 0, 0, ...), so that logits are the first column of the head.
        model.final_norm.weight.zero_()
        model.final_norm.bias.zero_()[0] = 1.0  # type: ignore[union-attr, operator]
        model.lm_head[:, 0] = torch.linspace(-3.0, -2.0, size)
        for token, logit in logits_of.items():
            model.lm_head[token, 0] = logit
    return pack_transformer(model, {})


@torch.no_grad()
@pytest.mark.parametrize(
    ("logits_of", "wanted"),
    [
        ({}, None),
        ({0: 1.0}, 0),
        ({8228: 0.5}, 8228),
        ({4095: 1.5, 4096: 1.5, 8200: 1.5}, 4095),  # in the first and second piece, and in the last, a short one
        ({4096: 1.5, 8200: 1.5, 17: 1.25}, 4096),
        ({8228: -0.0, 5003: 0.0}, 5003),
        ({8227: -0.0, 8228: 0.0}, 8227),
        ({3000: math.nan, 3001: 7.0}, -1),
        ({8228: math.nan}, -1),
        ({5: math.inf}, -1),
        ({7: -math.inf, 9: 2.0}, -1),
    ],
)
@pytest.mark.parametrize("num_tokens", [1, 3])
def test_finds_the_likeliest_token_of_each_row(
    kernels: str, logits_of: dict[int, float], wanted: int | None, num_tokens: int
) -> None:
    model = large_vocabulary(logits_of)
    sequences = Sequences(model.config)
    sequences.counts = [num_tokens, 0, 0, 0]
    step, tokens = sequences.extend(1, num_tokens), torch.arange(num_tokens)
    decoded = model.infer(tokens, step, torch.arange(num_tokens))
    assert decoded.found_likeliest is not None
    expected = int(decoded.logits[0].argmax()) if wanted is None else wanted
    assert list(decoded.likeliest) == [expected] * num_tokens
    with select.forced("reference"):
        by_layers = model.infer(tokens, step, torch.arange(num_tokens))
    assert by_layers.found_likeliest is None and by_layers.likeliest == [expected] * num_tokens


@torch.no_grad()
def test_a_run_into_an_earlier_one_gives_the_same(kernels: str) -> None:
    model = build("mixtral")
    plan = model.find_plan()
    assert plan is not None
    sequences = Sequences(model.config)
    sequences.counts = [1, 0, 1, 0]
    rows, decoded = torch.arange(2), None
    for token in (3, 5):
        step, tokens = sequences.extend(1, 2), torch.tensor([token, token + 20])
        fresh = plan.run(tokens, step.storage, step.batch, rows)
        again = plan.run(tokens, step.storage, step.batch, rows, into=decoded)
        assert decoded is None or again is decoded
        decoded = again
        for name in ("hidden", "all_expert_ids", "all_routing_weights", "logits"):
            assert torch.equal(getattr(again, name), getattr(fresh, name)), name
        assert list(again.likeliest) == fresh.logits.argmax(-1).tolist()
    with pytest.raises(AssertionError):
        plan.run(tokens[:1], step.storage, step.batch, rows[:1], into=decoded)


def test_tells_which_experts_each_layer_chose(kernels: str) -> None:
    model = build("deepseek")
    assert model.decode_part is not None
    library = select.cpu_library()
    assert library is not None
    sequences = Sequences(model.config)
    sequences.counts = [3, 0, 2, 0]
    step = sequences.extend(1, 5)
    decoded = DecodePlan(model.decode_part, library).run(torch.arange(5), step.storage, step.batch)
    assert len(decoded.expert_ids) == len(decoded.routing_weights) == 2
    for ids, weights in zip(decoded.expert_ids, decoded.routing_weights, strict=True):
        assert ids.shape == weights.shape == (5, 2)
        assert bool(((ids >= 0) & (ids < 8)).all()) and bool((ids[:, 0] != ids[:, 1]).all())
        torch.testing.assert_close(weights.sum(1), torch.full((5,), 2.5))  # renormalised, then scaled


@pytest.mark.parametrize("family", [name for name, changes in FAMILIES.items() if "moe" in changes])
def test_guessing_experts_changes_nothing(kernels: str, family: str) -> None:
    expected, model = run(build(family), layer_by_layer=False), build(family)
    model.reads_ahead = True
    plan = model.find_plan()
    assert plan is not None and plan.guessed_share == 0.0
    can_guess = any(layer > 0 for layer in model.config.moe_layers)
    # In a pass of few tokens that is a trial (the first step is the 16th pass), and in every one.
    for share, num_passes in ((0.47, 15), (1.0, 1)):
        plan._guesses.share, plan._guesses.num_passes = share, num_passes
        assert all(torch.equal(*pair) for pair in zip(run(model, layer_by_layer=False), expected, strict=True))
        assert plan._guesses.num_passes == num_passes + len(STEPS)
        assert (plan.guessed_share != share) is can_guess


@torch.no_grad()
@pytest.mark.parametrize(("has_bias", "every"), [(False, 1), (True, 1), (False, 2)])
def test_guesses_are_right_where_layers_change_nothing(kernels: str, has_bias: bool, every: int) -> None:
    shares = []
    for is_still in (True, False):
        moe = {**FAMILIES["mixtral"]["moe"], "router": {"renormalize": True, "bias": has_bias}, "every": every}
        changes = {**SIZES, **FAMILIES["mixtral"], "num_layers": 4, "moe": moe}
        model = Transformer(ModelConfig.from_dict(changes), compute_dtype=torch.bfloat16)
        model.initialize(0)
        for name, parameter in model.named_parameters():
            if is_still and name.endswith(("o_proj.weight", "down_proj", "down_proj.weight")):
                parameter.zero_()
            if name.endswith("router.weight") and is_still:
                parameter.copy_(model.state_dict()[f"blocks.{every - 1}.feed_forward.moe.router.weight"])
            if name.endswith("router.bias") and is_still:
                parameter.copy_(torch.linspace(3, 0, len(parameter)))  # without it other experts would be guessed
        pack_transformer(model)
        model.reads_ahead = True
        sequences = Sequences(model.config)
        for token in range(48):
            sequences.counts = [1, 0, 1, 0]
            model(torch.tensor([[token, 60 - token]]), cache=sequences)
        plan = model.find_plan()
        assert plan is not None and plan.guessed_share is not None
        shares.append(plan.guessed_share)
    guesses = 3 * sum(layer > 0 for layer in model.config.moe_layers)  # in each of three passes
    assert shares[0] == pytest.approx(1 - 0.95**guesses), shares
    assert 0 < shares[1] < 0.8 * shares[0], shares


def test_pages_that_are_wanted_come_from_the_file(kernels: str, tmp_path: Path) -> None:
    library = select.cpu_library()
    assert library is not None
    if sys.platform != "linux":
        pytest.skip("which pages are in memory is asked of Linux")
    size, page = 5 << 20, mmap.PAGESIZE
    path = tmp_path / "weights"
    path.write_bytes(bytes(range(256)) * (size // 256))
    with path.open("rb") as file:
        os.fdatasync(file.fileno())  # what is not on the disk yet is not let go of
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        pages = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY)
    data = torch.frombuffer(pages, dtype=torch.uint8)
    ctypes.CDLL(None).madvise(ctypes.c_void_p(data.data_ptr()), ctypes.c_size_t(size), 1)  # MADV_RANDOM

    libc = ctypes.CDLL(None, use_errno=True)
    if libc.madvise(ctypes.c_void_p(data.data_ptr() + size - page), ctypes.c_size_t(page), 22):
        pytest.skip("Linux has MADV_POPULATE_READ since 5.14")

    def in_memory(first: int, last: int) -> int:
        found = (ctypes.c_ubyte * (size // page))()
        assert not libc.mincore(ctypes.c_void_p(data.data_ptr()), ctypes.c_size_t(size), found)
        return sum(each & 1 for each in found[first:last])

    half = size // 2 // page
    if in_memory(0, half) == half:
        pytest.skip("this file system keeps what it is told to drop")
    for _ in range(1000):
        library.function("moesaic_want_pages", "pi")(data.data_ptr() + 100, size // 2)  # a word that may be lost
        time.sleep(0.01)
        if in_memory(0, half) == half:
            break
    assert in_memory(0, half) == half and in_memory(half + 1, size // page - 1) < half - 2


@torch.no_grad()
def test_wrong_tokens_and_positions_are_refused(kernels: str) -> None:
    model = build("gpt")
    sequences = Sequences(model.config)
    sequences.counts = [2, 0, 0, 0]
    with pytest.raises(GenerationError, match="token ids from 3 to 61; ids from 0 to 60 are required"):
        model(torch.tensor([[3, 61]]), cache=sequences)
    assert sequences.lengths == [0] * 4
    sequences.lengths = [320, 0, 0, 0]
    with pytest.raises(AssertionError):
        model(torch.tensor([[3, 6]]), cache=sequences)
