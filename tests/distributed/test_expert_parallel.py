"""Experts spread over processes compute what one process does: values, gradients, norms and states."""

import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from moesaic.config.model import FeedForwardConfig, ModelConfig
from moesaic.data.loader import Batch
from moesaic.errors import ConfigError
from moesaic.model.pack import pack_transformer
from moesaic.model.transformer import Transformer
from moesaic.moe.layer import MoELayer
from moesaic.parallel import expert
from moesaic.parallel.dispatch import _by_expert
from moesaic.parallel.expert import ExpertParallel
from moesaic.train.loss import language_model_loss

WORLD = 4
CONFIG: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "num_layers": 4,
    "num_heads": 4,
    "num_kv_heads": 2,
    "intermediate_size": 64,
    "max_positions": 32,
    "activation": "swiglu",
    "moe": {"num_experts": [8, 6, 3], "top_k": 2, "layers": [1, 2, 3], "residual": "sum",
            "router": {"balance_loss": 0.01}},
}  # fmt: skip
GELU = {"activation": "gelu", "mlp_bias": True, "moe": {**CONFIG["moe"], "top_k": 1, "capacity": {"factor": 0.75}}}
# Changes of the config, compute dtype, what of a gradient's largest number may differ.
KINDS: dict[str, tuple[dict[str, Any], torch.dtype | None, float]] = {
    "fp32": ({}, None, 1e-5),
    # Rows are rounded to bf16 before they travel.
    "bf16": ({}, torch.bfloat16, 3e-2),
    "gelu, biases, capacity": (GELU, None, 1e-5),
    "checkpointed": ({"recompute": True}, None, 1e-5),
    "compiled": ({"compile": True}, None, 1e-5),
}
# Layers of 8, 6 and 3 experts.
DEGREES = {None: [4, 2, 1], 2: [2, 2, 1], 1: [1, 1, 1]}
# Every process compiles for itself, so that is done once.
CASES = [(kind, degree) for kind in KINDS for degree in DEGREES if kind != "compiled" or degree is None]


def build(kind: str, *, device: str = "cpu") -> Transformer:
    changes, dtype, _ = KINDS[kind]
    of_model = {key: each for key, each in changes.items() if key not in ("recompute", "compile")}
    config = ModelConfig.from_dict({**CONFIG, **of_model})
    with torch.device(device):
        model = Transformer(config, compute_dtype=dtype)
    model.activation_checkpointing = changes.get("recompute", False)
    if changes.get("compile"):
        model.compile(backend="eager")
    return model.train()


def batch(rank: int) -> Batch:
    tokens = torch.randint(0, 96, (2, 17), generator=torch.Generator().manual_seed(rank))
    return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), None)


def on_a_rank(rank: int, port: int, folder: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    expert._BUCKET_BYTES = 4096  # several of each thing's pieces
    dist.init_process_group("gloo", rank=rank, world_size=WORLD)
    found: dict[str, Any] = {}
    try:
        for kind, degree in CASES:
            # Spread before there are any weights, or after.
            model = build(kind, device="cpu" if degree == 2 else "meta")
            if degree == 2:
                model.initialize(3)
            parallel = ExpertParallel(model, degree=degree)
            if degree != 2:
                model.to_empty(device="cpu").initialize(3)
            loss = language_model_loss(model, batch(rank), seed=0).total
            loss.backward()
            parallel.average_gradients()
            norm = parallel.clip_gradients(1e-3)
            state = copied(parallel.full_state())
            whole = build(kind).initialize(5).state_dict()
            own = {name: each.clone() for name, each in model.state_dict().items()}
            model.load_state_dict(parallel.own_state(whole))
            loaded = parallel.full_state()
            assert loaded is None or all(torch.equal(loaded[name], each) for name, each in whole.items())
            model.load_state_dict(own)
            # What comes from others is no more at a time than said.
            for name, piece in parallel.gather(own).pieces:
                is_others = piece.data_ptr() != own[name].data_ptr()
                assert rank == 0 and (not is_others or piece.nbytes <= max(4096, piece[0].nbytes))
            # Their gradients are gathered as a state is.
            with torch.no_grad():
                for parameter in model.parameters():
                    assert parameter.grad is not None
                    parameter.copy_(parameter.grad)
            gradients = copied(parallel.full_state())
            losses = [torch.zeros(()) for _ in range(WORLD)]
            dist.all_gather(losses, loss.detach())
            sizes = [sum(each.numel() for each in layer.parameters()) for layer in moe_layers(model)]
            if rank == 0:
                found[f"{kind}, {degree}"] = {
                    "losses": torch.stack(losses), "norm": norm, "state": state, "gradients": gradients,
                    "degrees": list(parallel.degrees.values()), "sizes": sizes,
                }  # fmt: skip
            else:
                assert state is None and gradients is None
        found["tokens on some ranks alone"] = few_tokens(rank)
        found["an update that one rank lacks"] = an_update_that_one_rank_lacks(rank)
        found["a layer drawn anew"] = a_layer_drawn_anew()
        if rank == 0:
            torch.save(found, Path(folder) / "rank0.pt")
    finally:
        dist.destroy_process_group()


def copied(state: dict[str, Tensor] | None) -> dict[str, Tensor] | None:
    return None if state is None else {name: each.clone() for name, each in state.items()}


def moe_layers(model: torch.nn.Module) -> list[MoELayer]:
    return [each for each in model.modules() if isinstance(each, MoELayer)]


def layer_of(num_experts: int) -> MoELayer:
    torch.manual_seed(0)
    config = FeedForwardConfig(num_experts=num_experts, top_k=2, expert_intermediate_size=48)
    return MoELayer(32, config, activation="swiglu", has_bias=False)


def rows_of(rank: int) -> Tensor:
    """5, 0, 1 and 0 tokens."""
    count = (5, 0, 1, 0)[rank]
    return torch.randn(count, 32, generator=torch.Generator().manual_seed(rank))


def few_tokens(rank: int) -> dict[str, Tensor]:
    layer = layer_of(8)
    ExpertParallel(layer)
    x = rows_of(rank).requires_grad_()
    out, _ = layer(x)
    out.square().sum().backward()
    assert x.grad is not None
    padded = [torch.zeros(2, 5, 32) for _ in range(WORLD)]
    own = torch.zeros(2, 5, 32)
    own[0, : len(x)], own[1, : len(x)] = out.detach(), x.grad
    dist.all_gather(padded, own)
    return {"out": torch.stack([each[0] for each in padded]), "grad": torch.stack([each[1] for each in padded])}


def an_update_that_one_rank_lacks(rank: int) -> dict[str, Any]:
    """A parameter that only rank 1's loss uses, one that none does, and two dtypes in one model."""
    module = torch.nn.Module()
    module.moe = layer_of(4)
    module.used = torch.nn.Parameter(torch.ones(3))
    module.unused = torch.nn.Parameter(torch.ones(3))
    module.in_bf16 = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    parallel = ExpertParallel(module)
    loss = module.moe(rows_of(0))[0].sum() + module.in_bf16.sum()  # type: ignore[operator]
    if rank == 1:
        loss = loss + 8 * module.used.sum()  # type: ignore[operator]
    loss.backward()
    parallel.average_gradients()
    before = [each.grad.clone() for each in module.parameters() if each.grad is not None]
    norm = parallel.clip_gradients(1e-3)
    assert abs(float(parallel.gradient_norm()) - 1e-3) < 1e-5 < float(norm)
    with torch.no_grad():
        for each, old in zip([each for each in module.parameters() if each.grad is not None], before, strict=True):
            each.grad.copy_(old)  # type: ignore[union-attr]
    # Of the experts of one rank alone; every rank leaves its gradients as they are.
    if rank == 2:
        next(module.moe.experts.parameters()).grad.fill_(torch.inf)  # type: ignore[union-attr]
    before = [each.grad.clone() for each in module.parameters() if each.grad is not None]
    assert not parallel.clip_gradients(1e-3).isfinite()
    after = [each.grad for each in module.parameters() if each.grad is not None]
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))
    return {"used": module.used.grad, "unused": module.unused.grad is None, "in_bf16": module.in_bf16.grad}


def a_layer_drawn_anew() -> dict[str, Tensor] | None:
    """Spread on the meta device, as it would be to hold no more than its share."""
    with torch.device("meta"):
        layer = layer_of(8)
    parallel = ExpertParallel(layer)
    layer.to_empty(device="cpu")
    torch.manual_seed(7)
    layer.reset_parameters()
    return copied(parallel.full_state())


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    if not dist.is_gloo_available():
        pytest.skip("this PyTorch has no gloo")
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(on_a_rank, args=(port, str(folder)), nprocs=WORLD)
    return torch.load(folder / "rank0.pt", weights_only=True)  # type: ignore[no-any-return]


@pytest.mark.parametrize(("kind", "degree"), CASES)
def test_gradients_are_those_of_one_process(found: dict[str, Any], kind: str, degree: int | None) -> None:
    model = build(kind).initialize(3)
    initial = {name: each.clone() for name, each in model.state_dict().items()}
    for rank in range(WORLD):
        loss = language_model_loss(model, batch(rank), seed=0).total
        tolerance = 5e-3 if kind == "bf16" else 1e-6
        assert abs(loss.item() - float(found[f"{kind}, {degree}"]["losses"][rank])) < tolerance
        (loss / WORLD).backward()
    ours = found[f"{kind}, {degree}"]
    assert ours["degrees"] == DEGREES[degree]
    assert ours["state"].keys() == initial.keys()
    assert all(torch.equal(ours["state"][name], each) for name, each in initial.items())
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    assert abs(float(ours["norm"]) - float(norm)) < float(norm) * (1e-2 if kind == "bf16" else 1e-5)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        largest = parameter.grad.abs().max()
        assert largest > 0, name
        assert torch.allclose(ours["gradients"][name], parameter.grad, rtol=0, atol=float(largest) * KINDS[kind][2]), (
            name
        )


def test_a_rank_holds_its_share_of_the_experts(found: dict[str, Any]) -> None:
    whole = [sum(each.numel() for each in layer.experts.parameters()) for layer in moe_layers(build("fp32"))]
    routers = [sum(each.numel() for each in layer.router.parameters()) for layer in moe_layers(build("fp32"))]
    for degree, degrees in DEGREES.items():
        due = [size // part + router for size, part, router in zip(whole, degrees, routers, strict=True)]
        assert found[f"fp32, {degree}"]["sizes"] == due


def test_ranks_may_have_few_tokens_or_none(found: dict[str, Any]) -> None:
    layer = layer_of(8)
    for rank in range(WORLD):
        x = rows_of(rank).requires_grad_()
        out, _ = layer(x)
        out.square().sum().backward()
        got = found["tokens on some ranks alone"]
        torch.testing.assert_close(got["out"][rank, : len(x)], out)
        torch.testing.assert_close(got["grad"][rank, : len(x)], x.grad)


def test_experts_drawn_anew_are_those_of_one_process(found: dict[str, Any]) -> None:
    layer = layer_of(8)
    torch.manual_seed(7)
    layer.reset_parameters()
    state = layer.state_dict()
    assert found["a layer drawn anew"].keys() == state.keys()
    assert all(torch.equal(found["a layer drawn anew"][name], each) for name, each in state.items())
    experts = layer.experts.down_proj
    assert len({tuple(each[0].tolist()) for each in experts}) == 8


def test_what_some_ranks_lack_counts_as_zero(found: dict[str, Any]) -> None:
    got = found["an update that one rank lacks"]
    assert got["used"].tolist() == [2.0] * 3 and got["unused"] is True
    assert got["in_bf16"].dtype is torch.bfloat16 and got["in_bf16"].tolist() == [1.0] * 3


def test_rows_of_ranks_are_sorted_by_expert_and_go_back() -> None:
    counts = torch.tensor([[2, 0, 1], [0, 0, 0], [1, 3, 0]])
    order, place = _by_expert(counts)
    assert order.tolist() == [0, 1, 3, 4, 5, 6, 2]
    assert order[place[:, 0]].tolist() == list(range(7))
    assert [each.numel() for each in _by_expert(torch.zeros(2, 3, dtype=torch.int64))] == [0, 0]


@pytest.fixture
def alone() -> Any:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("alone")
def test_one_process_keeps_all(tmp_path: Path) -> None:
    model = build("fp32").initialize(3)
    before = {name: each.clone() for name, each in model.state_dict().items()}
    parallel = ExpertParallel(model)
    assert set(parallel.degrees.values()) == {1} and all(each.dispatcher is None for each in moe_layers(model))
    language_model_loss(model, batch(0), seed=0).total.backward()
    expected = {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}
    parallel.average_gradients()
    assert all(torch.equal(each.grad, expected[name]) for name, each in model.named_parameters())  # type: ignore[arg-type]
    state = parallel.full_state()
    assert state is not None and all(torch.equal(state[name], each) for name, each in before.items())
    assert all(torch.equal(parallel.own_state(state)[name], each) for name, each in before.items())


def test_what_cannot_be_spread_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"before torch.distributed was initialised; a process group .*; call"):
        ExpertParallel(build("fp32"))
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda group=None: 4)
    monkeypatch.setattr(dist, "get_rank", lambda group=None: 0)
    for degree in (0, 3, 8, -4, 2.0, True, "2"):
        with pytest.raises(ConfigError, match=rf"degree \({degree!r}\) is not a divisor of the 4 processes; .*; give"):
            ExpertParallel(build("fp32"), degree=degree)  # type: ignore[arg-type]
    packed = pack_transformer(build("fp32").initialize(3).eval())
    spread = build("fp32").initialize(3).eval()
    moe_layers(spread)[1].dispatcher = object()  # type: ignore[assignment]
    with pytest.raises(ConfigError, match=r"experts of blocks.2.feed_forward.moe are spread over .*; load what Expert"):
        pack_transformer(spread)
    assert not spread.is_packed
    with pytest.raises(ConfigError, match="are packed for inference; whole ones are required; make the model anew"):
        ExpertParallel(packed)
