"""A packed model infers what it did before, at half the memory, and refuses to do anything else."""

import copy
import pickle
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from moesaic.checkpoint.quantized import Scheme
from moesaic.config.model import ModelConfig
from moesaic.errors import ConfigError, DeviceError, TrainingError
from moesaic.kernels import select
from moesaic.kernels.packed import PackedMlp, PackedWeight
from moesaic.kernels.quantized import QuantizedWeight, dequantize, quantize_to_mxfp4, quantize_weight
from moesaic.model.generate import generate
from moesaic.model.kv_cache import BatchCache
from moesaic.model.linear import Linear
from moesaic.model.pack import fill_packed, pack_transformer, packed_parts, packed_shell, packed_tensors
from moesaic.model.transformer import Transformer
from moesaic.moe.layer import MoELayer

KERNELS = ["reference", *select.supported_instruction_sets()]
SCHEMES = [Scheme(8, None), Scheme(4, 32), Scheme(4, 32, is_mxfp4=True)]
SIZES: dict[str, Any] = {
    "vocab_size": 61, "hidden_size": 64, "num_layers": 3, "num_heads": 4, "intermediate_size": 96, "max_positions": 48,
    "init_std": 0.1,
}  # fmt: skip
GPT: dict[str, Any] = {
    "positions": "learned", "norm": "layernorm", "attention_bias": "all", "mlp_bias": True, "activation": "gelu"
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "dense, llama-like": {"num_kv_heads": 2, "tie_embeddings": False},
    "dense, gpt-like": GPT,
    "moe, qwen-like": {
        "num_kv_heads": 2, "qk_norm": "head", "attention_bias": "qkv", "tie_embeddings": False,
        "moe": {"num_experts": 5, "top_k": 2, "router": {"renormalize": True}},
    },
    "pyramid, residual softmax": GPT | {"moe": {"num_experts": [2, 7, 3], "residual": "softmax"}},
    "residual sigmoid": {"moe": {"num_experts": 6, "top_k": 3, "residual": "sigmoid", "intermediate_size": 40}},
    "experts scaled": {
        "moe": {"num_experts": 5, "top_k": 2, "residual": "sum", "output_scale": True, "router": {"scale": 1.3}}
    },
    "residual sum": {"moe": {"num_experts": 4, "layers": [1], "residual": "sum", "residual_intermediate_size": 33}},
    "rotated heads normed": {"num_kv_heads": 2, "qk_norm": "rotated_head"},
    "moe, norms behind": {"qk_norm": "full", "norm_place": "behind", "moe": {"num_experts": 5, "top_k": 2}},
    "moe, olmoe-like": {"num_kv_heads": 2, "qk_norm": "full", "moe": {"num_experts": 5, "top_k": 2}},
    "moe, gpt-oss-like": {
        "num_kv_heads": 2, "attention_sinks": True, "sliding_window": 7, "sliding_layers": [0, 2],
        "attention_bias": "all", "mlp_bias": True, "activation": "swiglu_oai", "tie_embeddings": False,
        "moe": {"num_experts": 5, "top_k": 2, "router": {"renormalize": True, "bias": True}},
    },
    "moe, latent attention": {
        "latent_attention": {
            "query_rank": 32, "kv_rank": 32, "nope_head_dim": 12, "rope_head_dim": 4, "value_head_dim": 24,
        },
        "tie_embeddings": False, "attention_scale": 0.4,
        "moe": {"num_experts": 4, "top_k": 2, "layers": [1, 2], "residual": "sum"},
    },
}  # fmt: skip


@pytest.fixture(params=KERNELS)
def kernels(request: pytest.FixtureRequest) -> Iterator[str]:
    with select.forced(request.param):
        yield request.param


def build(family: str, **changes: Any) -> Transformer:
    config = ModelConfig.from_dict({**SIZES, **FAMILIES[family], **changes})
    model = Transformer(config, compute_dtype=torch.bfloat16).initialize(0)
    generator = torch.Generator().manual_seed(1)
    for name, tensor in model.state_dict().items():
        if name.endswith(("bias", "norm.weight", "output_scale", "sinks")):
            tensor.add_(torch.randn(tensor.shape, generator=generator), alpha=0.3)
    return model.eval()


def tokens(length: int = 20, *, batch: int = 2) -> Tensor:
    return torch.randint(61, (batch, length), generator=torch.Generator().manual_seed(5))


def cached_logits(model: Transformer, inputs: Tensor, pieces: list[int]) -> Tensor:
    cache = BatchCache(model.config, inputs.shape[0], inputs.shape[1], dtype=torch.bfloat16, device=inputs.device)
    return model.logits(torch.cat([model(part, cache=cache).hidden for part in inputs.split(pieces, 1)], 1))


def close(got: Tensor, wanted: Tensor, tolerance: float) -> None:
    """For the median token: one near a tie of its router may choose another expert."""
    assert got.shape == wanted.shape
    errors = (got - wanted).norm(dim=-1) / wanted.norm(dim=-1)
    assert float(errors.median()) < tolerance, errors


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_gives_the_logits_of_the_model_that_was_packed(kernels: str, family: str) -> None:
    model, inputs = build(family), tokens()
    precise = build(family)
    precise.compute_dtype = torch.float32
    wanted = precise.logits(precise(inputs).hidden)
    valid = torch.ones_like(inputs, dtype=torch.bool)
    valid[0, 15:] = False
    unpacked = model.logits(model(inputs).hidden)
    padded = model.logits(model(inputs, valid=valid).hidden)
    packed = pack_transformer(model)
    assert packed is model
    # bf16 roundings of a few layers, 2^-9 each; the unpacked model is about as far from fp32.
    close(packed.logits(packed(inputs).hidden), wanted, 0.03)
    close(packed.logits(packed(inputs, valid=valid).hidden)[valid], padded[valid], 0.03)
    close(unpacked, wanted, 0.03)
    for pieces in ([20], [1] * 20, [7, 1, 12]):
        close(cached_logits(packed, inputs, pieces), wanted, 0.03)


@torch.no_grad()
def test_with_a_cache_it_gives_the_bits_it_gives_without(kernels: str) -> None:
    if kernels == "reference":
        pytest.skip("PyTorch's products depend on their sizes")
    model, inputs = pack_transformer(build("dense, gpt-like")), tokens()
    one = cached_logits(model, inputs, [20])
    for pieces in ([1] * 20, [7, 1, 12]):
        assert torch.equal(cached_logits(model, inputs, pieces), one)


@torch.no_grad()
def test_a_copy_and_one_from_another_process_are_the_same_model(kernels: str) -> None:
    model, inputs = pack_transformer(build(next(iter(FAMILIES)))), tokens()
    wanted = cached_logits(model, inputs, [7, 1, 12])
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(cached_logits(other, inputs, [7, 1, 12]), wanted)


class Meeting:
    """Threads in the place of processes: each has some of every layer's experts."""

    def __init__(self, size: int) -> None:
        self.parts: list[Tensor] = [torch.empty(0)] * size
        self._barrier = threading.Barrier(size, timeout=60)

    def model(self, rank: int, family: str) -> Transformer:
        model = build(family)
        for layer in model.modules():
            if isinstance(layer, MoELayer):
                count = layer.config.num_experts
                layer.experts.keep(count * rank // len(self.parts), count * (rank + 1) // len(self.parts))
                layer.add_others = partial(self.add, rank)
        return pack_transformer(model)

    def add(self, rank: int, x: Tensor) -> Tensor:
        self.parts[rank] = x.clone()
        self._barrier.wait()
        total = sum(self.parts[1:], self.parts[0])
        self._barrier.wait()
        return total

    def run(self, work: Callable[[int], Tensor]) -> list[Tensor]:
        with ThreadPoolExecutor(len(self.parts)) as threads:
            return list(threads.map(torch.no_grad()(work), range(len(self.parts))))  # a setting of each thread's own


@pytest.mark.parametrize("family", [name for name, changes in FAMILIES.items() if "moe" in changes])
@torch.no_grad()
def test_experts_in_two_places_make_what_they_make_in_one(kernels: str, family: str) -> None:
    inputs, meeting = tokens(20, batch=3), Meeting(2)
    models = [meeting.model(rank, family) for rank in range(2)]
    assert all(model.runs_in_one_call == (kernels != "reference") for model in models)
    whole = pack_transformer(build(family))
    for pieces in ([20], [1, 1, 2, 3, 13]):
        first, other = meeting.run(lambda rank, pieces=pieces: cached_logits(models[rank], inputs, pieces))  # type: ignore[misc]
        assert torch.equal(first, other)
        close(first, cached_logits(whole, inputs, pieces), 0.1)
    if kernels != "reference":  # the same bits, however many tokens a pass has
        assert torch.equal(first, meeting.run(lambda rank: cached_logits(models[rank], inputs, [20]))[0])
    plain = meeting.run(lambda rank: models[rank].logits(models[rank](inputs).hidden))
    close(plain[0], whole.logits(whole(inputs).hidden), 0.1)


@torch.no_grad()
def test_what_fails_between_its_layers_ends_a_pass() -> None:
    model = build("moe, qwen-like")
    for layer in model.modules():
        if isinstance(layer, MoELayer):
            layer.add_others = lambda _: 1 / 0  # type: ignore[assignment, return-value]
    pack_transformer(model)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            cached_logits(model, tokens(3), [3])


def matrices(model: Transformer) -> dict[str, Tensor]:
    skip = ("router.weight", "_bias", "position_embedding")
    found = {n: p.detach() for n, p in model.named_parameters() if p.dim() > 1 and not n.endswith(skip)}
    if model.lm_head is not None:
        del found["embedding"]
    return found


def quantize(weight: Tensor, scheme: Scheme) -> QuantizedWeight:
    if scheme.is_mxfp4:
        return quantize_to_mxfp4(weight)
    return quantize_weight(weight, bits=scheme.bits, group_size=scheme.group_size)


@torch.no_grad()
@pytest.mark.parametrize(
    "family", ["dense, llama-like", "moe, qwen-like", "pyramid, residual softmax", "moe, latent attention"]
)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_quantised_weights_take_the_place_of_those_they_are_named_after(
    kernels: str, family: str, scheme: Scheme
) -> None:
    model, inputs = build(family), tokens()
    quantized = {
        name: quantize(weight, scheme) for name, weight in matrices(model).items() if not name.endswith("mix.weight")
    }
    twin = build(family)
    twin.compute_dtype = torch.float32
    for name, weight in quantized.items():
        twin.get_parameter(name).copy_(dequantize(weight))
    wanted = twin.logits(twin(inputs).hidden)
    packed = pack_transformer(model, quantized)
    # 8-bit activations: about 0.5 % of noise at each product.
    close(packed.logits(packed(inputs).hidden), wanted, 0.06)
    close(cached_logits(packed, inputs, [9] + [1] * 11), wanted, 0.06)


@pytest.mark.parametrize("family", FAMILIES)
def test_generates_by_stepping_as_by_recomputing(kernels: str, family: str) -> None:
    model = pack_transformer(build(family, init_std=0.3))
    prompt = tokens()[0, :7].tolist()
    greedy = generate(model, prompt, max_new_tokens=12)
    with torch.no_grad():
        for place, token in enumerate(greedy):
            logits = model.logits(model(torch.tensor([prompt + greedy[:place]])).hidden[0, -1])
            assert logits[token] >= logits.max() - 0.05 * logits.abs().max()


def all_tensors(value: Any, seen: set[int]) -> Iterator[Tensor]:
    """Every tensor that an object holds, however deep."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from all_tensors(each, seen)
    elif isinstance(value, list | tuple | set):
        for each in value:
            yield from all_tensors(each, seen)
    elif isinstance(value, torch.nn.Module | PackedWeight | PackedMlp) or hasattr(value, "__dataclass_fields__"):
        yield from all_tensors(vars(value), seen)


def held_bytes(model: Transformer) -> int:
    storages = {}
    for tensor in all_tensors(model, set()):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(storages.values())


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_the_originals_are_gone(family: str) -> None:
    # Sizes that no panel pads, so that bytes can be counted.
    sizes: dict[str, Any] = {"vocab_size": 512, "intermediate_size": 128}
    if "moe" in FAMILIES[family]:
        moe = {**FAMILIES[family]["moe"], "intermediate_size": 128}
        if "residual" in moe:
            moe["residual_intermediate_size"] = 128
        sizes["moe"] = moe
    if "latent_attention" in FAMILIES[family]:
        sizes["latent_attention"] = dict.fromkeys(
            ("query_rank", "kv_rank", "nope_head_dim", "rope_head_dim", "value_head_dim"), 32
        )
    model = build(family, **sizes)
    packed_numbers = sum(weight.numel() for name, weight in matrices(model).items() if "mix" not in name)
    own_embeddings = [] if model.lm_head is None else [model.embedding]
    if model.position_embedding is not None:
        own_embeddings.append(model.position_embedding)
    total = sum(parameter.numel() for parameter in model.parameters())
    small = total - packed_numbers - sum(each.numel() for each in own_embeddings)
    before = held_bytes(model)
    assert before >= 4 * total
    pack_transformer(model)
    generate(model, [1, 2], max_new_tokens=2)  # what is made on first use counts too
    large = 2 * packed_numbers + 2 * sum(each.numel() for each in own_embeddings)
    # Beside them: norms, biases, routers in fp32, perhaps twice; routers in panels of 16 experts, mix in panels of 32,
    # rotary tables.
    assert large <= held_bytes(model) <= large + 8 * small + 3 * (16 * 64 * 4 + 32 * 64 * 2) + 2 * 48 * 8 * 4


def test_tied_embeddings_are_kept_once() -> None:
    model = pack_transformer(build("dense, gpt-like"))
    assert model.decode_part is not None and model.decode_part.embedding is model.packed_head
    assert not any(parameter.shape[0] == 61 for parameter in model.parameters())
    untied = pack_transformer(build("dense, llama-like"))
    assert untied.embedding.dtype is torch.bfloat16 and untied.lm_head is None


@torch.no_grad()
@pytest.mark.parametrize("shape", [(2, 0), (0, 5)])
@pytest.mark.parametrize("family", ["dense, gpt-like", "dense, llama-like"])
def test_no_tokens_have_no_vectors(family: str, shape: tuple[int, int]) -> None:
    model = pack_transformer(build(family))
    hidden = model(torch.zeros(shape, dtype=torch.int64)).hidden
    assert hidden.shape == (*shape, model.config.hidden_size)
    assert model.logits(hidden).shape == (*shape, model.config.vocab_size)


@torch.no_grad()
@pytest.mark.parametrize("family", ["dense, gpt-like", "dense, llama-like"])
def test_the_head_can_be_had_as_a_matrix(family: str) -> None:
    model = build(family)
    before = model.output_weight()
    assert torch.equal(pack_transformer(model).output_weight(), before)


def test_every_packed_model_has_a_pass_in_one_call() -> None:
    for family in FAMILIES:
        model = build(family)
        assert not model.is_packed and model.decode_part is None
        pack_transformer(model)
        assert model.is_packed and model.decode_part is not None


@pytest.mark.parametrize("family", ["moe, qwen-like", "moe, latent attention"])
def test_it_cannot_train(family: str) -> None:
    model = pack_transformer(build(family))
    with pytest.raises(TrainingError, match=r"packed for inference .*; training requires the originals; .*pack=False"):
        model.train()
    assert not any(module.training for module in model.modules())
    model.eval()


@pytest.mark.parametrize("family", ["moe, qwen-like", "moe, latent attention"])
def test_it_cannot_move(family: str) -> None:
    model = pack_transformer(build(family))
    with pytest.raises(DeviceError, match=r"packed on cpu, .*; another device requires .*; load the run there"):
        model.to("meta")
    assert model.device.type == "cpu" and model.to("cpu").float() is model


def test_quantised_weights_that_do_not_fit_are_refused_before_anything_is_packed() -> None:
    def quantised(*shape: int, bits: int = 8) -> QuantizedWeight:
        return quantize_weight(torch.randn(shape), bits=bits, group_size=32 if bits == 4 else None)

    model = build("moe, qwen-like")
    wrong = {
        "blocks.0.attention.q_proj.weight": (quantised(3, 64), r"\(64, 64\) there"),
        "blocks.0.feed_forward.moe.router.weight": (quantised(5, 64), "no packed matrix of that name there"),
        "embedding": (quantised(61, 64), "no packed matrix"),
        "nobody": (quantised(2, 64), "no packed matrix"),
    }
    for name, (weight, message) in wrong.items():
        with pytest.raises(ConfigError, match=message):
            pack_transformer(model, {name: weight})
        assert not model.is_packed and model.get_parameter("lm_head").shape == (61, 64)
    with pytest.raises(
        ConfigError, match=r"computed as one matrix and come as .* one format is required; quantise all"
    ):
        pack_transformer(model, {"blocks.0.attention.q_proj.weight": quantised(64, 64)})


def test_layers_that_are_not_the_models_own_are_refused_before_anything_is_packed() -> None:
    class Doubled(Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    model = build("moe, qwen-like")
    attention, down = model.blocks[0].attention, model.blocks[1].attention.o_proj
    own, attention.v_proj = attention.v_proj, Doubled(64, 32, has_bias=False)
    with pytest.raises(ConfigError, match=r"blocks.0.attention.v_proj is .*Doubled; only the model's own layers"):
        pack_transformer(model)
    attention.v_proj = own
    hook = down.register_forward_hook(lambda layer, inputs, out: 2 * out)
    with pytest.raises(ConfigError, match=r"blocks.1.attention.o_proj is .* with hooks;"):
        pack_transformer(model)
    hook.remove()
    assert not model.is_packed and pack_transformer(model).is_packed


def test_packing_twice_is_a_mistake() -> None:
    for family in ("dense, gpt-like", "moe, latent attention"):
        with pytest.raises(AssertionError, match="packed already"):
            pack_transformer(pack_transformer(build(family)))


@torch.no_grad()
@pytest.mark.parametrize("bits", [16, 8])
@pytest.mark.parametrize("family", FAMILIES)
def test_part_by_part_it_is_the_same_with_one_block_at_a_time(family: str, bits: int) -> None:
    model = build(family)
    quantized = {name: quantize_weight(each.detach(), bits=8) for name, each in matrices(model).items()}
    expected = packed_tensors(pack_transformer(build(family), quantized if bits == 8 else None))
    blocks = [weakref.ref(block) for block in model.blocks]
    names = iter(expected)
    for name, tensor in packed_parts(model, rounds=bits == 8):
        assert name == next(names) and torch.equal(tensor, expected[name]), name
        kept = [index for index, block in enumerate(blocks) if block() is not None]
        now = int(name.split(".")[1]) if name.startswith("blocks.") else 0 if "embedding" in name else len(blocks)
        assert kept == list(range(now + name.startswith("blocks."), len(blocks))), name
    assert next(names, None) is None


@torch.no_grad()
@pytest.mark.parametrize("scheme", [None, *SCHEMES])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_it_holds_put_into_a_shell_is_the_same_model(kernels: str, family: str, scheme: Scheme | None) -> None:
    model = build(family)
    schemes = {
        name: scheme
        for name, matrix in matrices(model).items()
        if scheme is not None and matrix.shape[-1] % (scheme.group_size or 1) == 0
    }
    quantized = {name: quantize(model.get_parameter(name).detach(), each) for name, each in schemes.items()}
    packed = pack_transformer(model, quantized)
    shell = packed_shell(model.config, schemes)
    assert shell.is_packed and all(tensor.is_meta for tensor in packed_tensors(shell).values())
    again = fill_packed(shell, {name: tensor.clone() for name, tensor in packed_tensors(packed).items()})
    inputs = tokens()
    assert torch.equal(again.logits(again(inputs).hidden), packed.logits(packed(inputs).hidden))
    assert torch.equal(cached_logits(again, inputs, [9, 1, 10]), cached_logits(packed, inputs, [9, 1, 10]))
    assert torch.equal(again.output_weight(), packed.output_weight())
    assert (again.decode_part is None) == (packed.decode_part is None) and not again.training
    assert not any(tensor.is_meta for tensor in all_tensors(again, set()))


@pytest.mark.parametrize("family", FAMILIES)
def test_what_it_holds_is_all_there_is(family: str) -> None:
    model = pack_transformer(build(family))
    kept = {tensor.data_ptr() for tensor in packed_tensors(model).values()}
    beside = {each.data_ptr(): each.nbytes for each in all_tensors(model, set()) if each.data_ptr() not in kept}
    assert sum(beside.values()) <= 2 * 48 * 8 * 4  # rotary tables, made of the config


def test_a_shell_takes_what_fits_and_nothing_else() -> None:
    model = pack_transformer(build("moe, qwen-like"))
    held = packed_tensors(model)
    short = dict(list(held.items())[1:])
    with pytest.raises(AssertionError, match=next(iter(held))):
        fill_packed(packed_shell(model.config, {}), short)
    with pytest.raises(AssertionError, match=r"head.packed.data"):
        fill_packed(packed_shell(model.config, {}), {**held, "head.packed.data": held["head.packed.data"][1:]})


def check_one_graph(packed: Transformer, shapes: list[tuple[int, int]]) -> None:
    """Compiled, batches of these sizes have the bits of what is not compiled, and each is one graph."""

    def logits(inputs: Tensor) -> Tensor:
        return packed.logits(packed(inputs).hidden)

    compiled = torch.compile(logits, backend="aot_eager", fullgraph=True)
    for batch, length in shapes:
        inputs = tokens(length, batch=batch)
        assert torch.equal(compiled(inputs), logits(inputs))
    torch.compiler.reset()


@torch.no_grad()
@pytest.mark.parametrize("scheme", [None, *SCHEMES[:2]])
def test_compiles_into_one_graph(scheme: Scheme | None) -> None:
    moe = {"num_experts": 4, "layers": [1], "residual": "softmax"}
    model = build("dense, llama-like", num_layers=2, moe=moe, tie_embeddings=True)
    quantized = {} if scheme is None else {name: quantize(weight, scheme) for name, weight in matrices(model).items()}
    check_one_graph(pack_transformer(model, quantized), [(2, 20)])


@torch.no_grad()
def test_compiles_into_one_graph_of_any_size() -> None:
    moe = {"num_experts": 4, "top_k": 2, "residual": "sigmoid"}
    model = pack_transformer(build("dense, gpt-like", num_layers=1, moe=moe))
    check_one_graph(model, [(2, 20), (3, 7), (1, 1)])


@torch.no_grad()
def test_latent_attention_compiles_into_one_graph() -> None:
    check_one_graph(pack_transformer(build("moe, latent attention", num_layers=1, moe=None)), [(2, 20)])


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "is_packed"), [("moe, qwen-like", True), ("moe, qwen-like", False), ("moe, latent attention", False)]
)
def test_a_pass_with_a_cache_is_not_compiled(family: str, is_packed: bool) -> None:
    model, inputs = build(family, num_layers=1, moe=None), tokens()
    if is_packed:
        pack_transformer(model)
    compiled = torch.compile(model, backend="aot_eager")
    wanted = cached_logits(model, inputs, [7, 1, 1, 11])
    assert torch.equal(cached_logits(compiled, inputs, [7, 1, 1, 11]), wanted)  # type: ignore[arg-type]

    def infer() -> Tensor:
        cache = BatchCache(model.config, 2, 20, dtype=torch.bfloat16, device=torch.device("cpu"))
        return model.infer(inputs.flatten(), cache.extend(2, 20), torch.tensor([19, 39])).logits

    assert torch.equal(torch.compile(infer, backend="aot_eager")(), infer())
    torch.compiler.reset()


def test_loading_brings_in_no_compiler() -> None:
    """torch's compiler, sympy and triton are a second of every start."""
    script = """
import sys, torch
import moesaic.model.load
from moesaic.model.pack import packed_shell
from moesaic.config.model import ModelConfig
for values in CONFIGS:
    packed_shell(ModelConfig.from_dict(values), {})
print([name for name in ("torch._dynamo", "sympy", "triton", "torch._inductor") if name in sys.modules])
"""
    script = script.replace("CONFIGS", repr([{**SIZES, **family} for family in FAMILIES.values()]))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
