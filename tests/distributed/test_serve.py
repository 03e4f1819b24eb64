"""Several processes serve one model as one does: its numbers, an engine's texts, a server and its end."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from moesaic.config.serve import EngineConfig, Sampling, ServeConfig, SpeculationConfig
from moesaic.config.train import TrainConfig
from moesaic.convert.quantize import quantize_run
from moesaic.errors import ConfigError, ElsewhereError, GenerationError, MoesaicError
from moesaic.kernels import select
from moesaic.model.kv_cache import BatchCache
from moesaic.model.load import load_run
from moesaic.model.transformer import Transformer
from moesaic.moe.layer import MoELayer
from moesaic.parallel import inference
from moesaic.parallel.inference import Addition, share_experts
from moesaic.parallel.world import World
from moesaic.serve.engine import Engine
from moesaic.serve.followers import Channel, Followers, follow
from moesaic.serve.runner import Runner
from moesaic.serve.server.run import _load_shared
from moesaic.train.loop import train

OnProcesses = Callable[..., list[Any]]

MOE: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "num_layers": 3,
    "num_heads": 2,
    "intermediate_size": 64,
    "max_positions": 64,
    "activation": "swiglu",
    "norm": "rmsnorm",
    "moe": {"num_experts": [3, 8, 5], "top_k": 2, "residual": "softmax", "intermediate_size": 64},
}
MODELS: dict[str, dict[str, Any]] = {
    "softmax": MOE,
    "sigmoid, one choice": {**MOE, "moe": {**MOE["moe"], "residual": "sigmoid", "top_k": 1}},
    "gelu, biases, dense layers": {
        **MOE,
        "activation": "gelu",
        "norm": "layernorm",
        "mlp_bias": True,
        "moe": {"num_experts": 7, "top_k": 3, "residual": None, "layers": [1]},
    },
}
# Of what a run holds, and the precision it is loaded in.
FORMS: dict[str, tuple[str, str | None]] = {
    "bf16": ("whole", "bf16"),
    "fp32": ("whole", "fp32"),
    "int8, rounded": ("whole", "int8"),
    "int4": ("int4", None),
}


@pytest.fixture(scope="module")
def runs(make_config: Callable[..., TrainConfig], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Of each model a run, and in int4."""
    folder = tmp_path_factory.mktemp("runs")
    for name, model in MODELS.items():
        config = make_config("dense", steps=3, precision="fp32")
        train(TrainConfig.from_dict({**config.to_dict(), "model": model}), folder / name / "whole", device="cpu")
        quantize_run(
            folder / name / "whole", folder / name / "int4", experts="int4", group_size=32, calibrate="none",
            limit_tokens=64, force=True,
        )  # fmt: skip
    return {name: folder / name for name in MODELS}


def load_shared(run: Path, form: str, world: World) -> Transformer:
    kind, precision = FORMS[form]
    share = partial(share_experts, world=world)
    return load_run(run / kind, device="cpu", precision=precision, share=share).model  # type: ignore[arg-type]


def infer_all(rank: int, runs: dict[str, Path]) -> list[torch.Tensor]:
    """Return the hidden states of each model in each form, each of them the same bits on every process."""
    world, tokens, found = World.join(), torch.arange(48).view(2, 24) * 6, []
    for run in runs.values():
        for form in FORMS:
            model = load_shared(run, form, world)
            assert model.runs_in_one_call == model.is_packed == (form != "fp32")
            with torch.no_grad():
                hidden = [model(tokens, cache=cache).hidden.float() for cache in (None, cache_of(model, 2))]
                # In the pass of one call a token's numbers do not depend on how many are computed.
                cache, pieces = cache_of(model, 1), []
                for start, end in ((0, 1), (1, 3), (3, 20), (20, 24)):
                    pieces.append(model(tokens[:1, start:end], cache=cache).hidden.float())
            if model.runs_in_one_call:
                assert torch.equal(torch.cat(pieces, 1), hidden[1][:1]), (run, form)
            assert len(set(world.values(hidden[1].double().sum().item()))) == 1
            found += hidden
    return found


def cache_of(model: Transformer, batch_size: int) -> BatchCache:
    return BatchCache(model.config, batch_size, 24, dtype=model.compute_dtype, device=model.device)


def test_models_compute_what_one_process_does(runs: dict[str, Path], on_processes: OnProcesses) -> None:
    """On three processes, whose shares of 3, 8, 5 and 7 experts differ."""
    found = iter(on_processes(3, infer_all, runs)[1])
    for run in runs.values():
        for form, (kind, precision) in FORMS.items():
            model = load_run(run / kind, device="cpu", precision=precision).model  # type: ignore[arg-type]
            for cache in (None, cache_of(model, 2)):
                with torch.no_grad():
                    expected = model(torch.arange(48).view(2, 24) * 6, cache=cache).hidden.float()
                # Sums of experts in another order are rounded to bf16, and a router near a tie may choose otherwise.
                tolerance = 1e-5 if form == "fp32" else 0.02
                difference = (next(found) - expected).abs().flatten(0, 1).amax(1) / expected.abs().max()
                is_other = (difference > 5 * tolerance).float().mean()
                assert difference.median() < tolerance and is_other < 0.1, (run, form, cache)


def add_up(rank: int) -> bool:
    """Whether sums are the same bits by either way, for any number of rows, and right."""
    add = Addition(World.join())
    for rows in (0, 1, 2, 3, 4, 7, 64):
        every = [torch.randn(rows, 5, generator=torch.Generator().manual_seed(each)) for each in range(3)]
        expected = every[0] + every[1] + every[2]
        for at_once in (0, 1 << 20):
            inference._GATHERED_BYTES = at_once
            total = add(every[rank])
            assert torch.equal(total, expected), (rows, at_once)
            if rows:
                assert torch.equal(add(every[rank][-1:]), expected[-1:])
    return True


def test_sums_are_the_same_bits_for_any_batch(on_processes: OnProcesses) -> None:
    assert on_processes(3, add_up) == [True] * 3


SAMPLINGS = [
    Sampling(max_tokens=12, temperature=0.0, prompt_logprobs=2),
    Sampling(max_tokens=9, temperature=0.8, seed=5, n=2, logprobs=3),
    Sampling(max_tokens=10, temperature=0.0),
]
PROMPTS = [list(range(3, 40)), [7, 8, 9], [5] * 12]
SETTINGS = EngineConfig(
    kv_cache_bytes=1 << 20, max_batch_tokens=16, block_size=32, speculation=SpeculationConfig(method="ngram")
)


def texts_of(engine: Engine) -> list[tuple[Any, ...]]:
    """Return what becomes of requests that run together, one of them aborted, and vectors of two texts."""
    tokens: dict[tuple[str, int], list[int]] = {}
    for number, (prompt, sampling) in enumerate(zip(PROMPTS, SAMPLINGS, strict=True)):
        engine.add_request(prompt, sampling, request_id=str(number))
    engine.add_request([1, 2, 3], Sampling(max_tokens=30), request_id="gone")
    step = 0
    while engine.has_work:
        for output in engine.step():
            if output.request_id != "gone":
                tokens.setdefault((output.request_id, output.index), []).extend(each.token_id for each in output.tokens)
        step += 1
        if step == 3:
            engine.abort("gone")
    vectors = engine.embed(PROMPTS[:2])
    return [(*key, *each) for key, each in sorted(tokens.items())] + [tuple(vectors.flatten().tolist())]


def serve_or_follow(rank: int, run: Path, form: str) -> list[tuple[Any, ...]]:
    world = World.join()
    model = load_shared(run, form, world)
    channel = Channel(world)
    if rank:
        follow(model, channel)
        return []
    others = Followers(channel)
    tokenizer = load_run(run / "whole", device="cpu").tokenizer
    engine = Engine(model, tokenizer, SETTINGS, others=others)
    assert engine.is_batch_invariant == model.is_packed
    found = texts_of(engine)
    others.end()
    return found


@pytest.mark.parametrize("form", ["fp32", "int8, rounded"])
def test_an_engine_gives_what_it_gives_alone(runs: dict[str, Path], on_processes: OnProcesses, form: str) -> None:
    kind, precision = FORMS[form]
    loaded = load_run(runs["softmax"] / kind, device="cpu", precision=precision)  # type: ignore[arg-type]
    expected = texts_of(Engine(loaded.model, loaded.tokenizer, SETTINGS))
    assert len(expected) == 5 and all(len(each) > 10 for each in expected)
    first, *others = on_processes(3, serve_or_follow, runs["softmax"], form)
    assert others == [[], []]
    if form == "fp32":
        assert [tuple(each) for each in first[:-1]] == expected[:-1]
    assert [each[:2] for each in first[:-1]] == [each[:2] for each in expected[:-1]]
    assert first[-1] == pytest.approx(expected[-1], abs=1e-5 if form == "fp32" else 1e-2)


def fail_in_a_pass(rank: int, run: Path) -> str:
    """The first process's second pass fails; return what each is told then."""
    world = World.join()
    model = load_shared(run, "fp32", world)
    channel = Channel(world)
    if rank:
        with pytest.raises(ElsewhereError) as gone, world.noticing_losses():
            follow(model, channel)
        return str(gone.value)
    others = Followers(channel)
    engine = Engine(model, load_run(run / "whole", device="cpu").tokenizer, SETTINGS, others=others)
    engine.add_request([1, 2, 3], Sampling(max_tokens=5))
    engine.step()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Runner, "_run", lambda *_: 1 / 0)  # while the others are in it
        with pytest.raises(ZeroDivisionError):
            engine.step()
    with pytest.raises(GenerationError):
        engine.embed([[1, 2, 3]])
    with pytest.raises(GenerationError) as broken:
        engine.step()
    others.end()  # says nothing: they are in the midst of a pass
    return str(broken.value)


def test_a_pass_that_fails_on_one_process_alone_is_the_last(runs: dict[str, Path], on_processes: OnProcesses) -> None:
    first, other = on_processes(2, fail_in_a_pass, runs["softmax"])
    assert first.startswith("a pass on several processes has failed") and first.endswith("and start them again.")
    assert other.startswith("another process of this run is gone")


def lose_the_others(rank: int, run: Path) -> str:
    """The second process ends in the midst of a pass; return what the first's pass raises."""
    world = World.join()
    model = load_shared(run, "bf16", world)
    calls = iter(range(100))
    layers = [each for each in model.modules() if isinstance(each, MoELayer)]
    assert model.decode_part is not None and model.decode_part.add_others is layers[0].add_others
    if rank:

        def end(x: torch.Tensor) -> torch.Tensor:
            if next(calls) == 1:
                os._exit(0)
            return layers[0].add_others(x)  # type: ignore[misc]

        model.decode_part = replace(model.decode_part, add_others=end)
    with pytest.raises(RuntimeError) as lost, torch.no_grad():
        model(torch.arange(8)[None], cache=BatchCache(model.config, 1, 8, dtype=torch.bfloat16, device=model.device))
    return type(lost.value).__name__


def test_a_process_that_ends_in_a_pass_is_told_of(runs: dict[str, Path], on_processes: OnProcesses) -> None:
    first, other = on_processes(2, lose_the_others, runs["softmax"])
    assert other is None and first in ("RuntimeError", "DistBackendError", "DistNetworkError")


def load_as_served(rank: int, runs: list[Path]) -> list[Any]:
    """Each process is told of another checkpoint, then has other kernels; return what comes of it."""
    world, config = World.join(), ServeConfig()
    loaded = _load_shared(str(runs[rank]), config, world, device="cpu", precision=None)
    told: list[Any] = [str(loaded.info.run_at_step)]
    with pytest.MonkeyPatch.context() as patch:
        if rank:
            patch.setenv(select.VARIABLE, select.REFERENCE)
        with pytest.raises(MoesaicError) as caught:
            _load_shared(str(runs[0]), config, world, device="cpu", precision="bf16")
    return [*told, str(caught.value)]


def test_all_processes_serve_one_checkpoint_alike(runs: dict[str, Path], on_processes: OnProcesses) -> None:
    if not select.supported_instruction_sets():
        pytest.skip("there are no kernels here to differ in")
    both = [each / "whole" for each in runs.values()][:2]
    first, other = on_processes(2, load_as_served, both)
    assert first[0] == other[0] and first[0].startswith(str(both[0]))
    assert first[1].startswith("the processes of this run differ in kernels or kind of GPU; the same is required")
    assert other[1].startswith("process 0 of this run has failed")


def wait_for_a_message(rank: int) -> bool:
    dist.init_process_group("gloo", timeout=timedelta(seconds=1))
    world = World.join()
    channel = Channel(world)
    if rank:
        return channel.receive() == (1, [7])
    time.sleep(3)  # as an idle server, longer than torch.distributed waits
    channel.send(1, [7])
    return True


def test_between_requests_others_wait_for_ever(on_processes: OnProcesses) -> None:
    assert on_processes(2, wait_for_a_message) == [True, True]


def test_a_model_without_enough_experts_is_refused(
    runs: dict[str, Path], make_config: Callable[..., TrainConfig]
) -> None:
    def refuse(config: TrainConfig, size: int) -> str:
        with torch.device("meta"):
            model = Transformer(config.model)
        with pytest.raises(ConfigError) as caught:
            share_experts(model, World(size=size))
        return str(caught.value)

    config = make_config("dense")
    assert refuse(config, 2).endswith("a model with no experts; each has to have some of every layer's; start one, "
                                      "without torchrun.")  # fmt: skip
    said = refuse(config.replace(model=MOE), 4)
    assert said.startswith("4 processes were started for a model with 3 experts in a layer;")
    assert said.endswith("start at most 3.")


def ask(url: str, **body: Any) -> dict[str, Any]:
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return dict(json.load(answer))


def test_torchrun_serves(runs: dict[str, Path], tmp_path: Path) -> None:
    """Until it is stopped, when what runs finishes; then a mistake, said once."""
    if not dist.is_gloo_available():
        pytest.skip("this PyTorch has no gloo")
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "moesaic",
        "serve", str(runs["softmax"] / "whole"), "--device", "cpu", "--port", "0",
        "--set", "engine.kv_cache_bytes=1048576",
    ]  # fmt: skip
    log = tmp_path / "log"
    with log.open("w") as file, subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, text=True) as process:
        try:
            deadline = time.monotonic() + 200
            while (found := re.search(r"Serving .* at (http://\S+)", log.read_text())) is None:
                assert process.poll() is None and time.monotonic() < deadline, log.read_text()
                time.sleep(0.1)
            first = ask(found[1], prompt="the", max_tokens=20, temperature=0)
            assert ask(found[1], prompt="the", max_tokens=20, temperature=0)["choices"] == first["choices"]
            # To all, as Ctrl-C in a terminal does; torchrun passes it on as well.
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            for each in (*map(int, children), process.pid):
                os.kill(each, signal.SIGINT)
            assert process.wait(timeout=60) is not None
        finally:
            process.kill()
    assert log.read_text().count('"SIGINT: no new requests are taken') == 1
    assert "another process of this run" not in log.read_text()
    command[command.index("serve") + 1] = str(tmp_path / "missing")
    again = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert again.returncode != 0 and again.stderr.count("missing") == 1, again.stderr


def test_a_server_that_has_lost_a_process_ends(runs: dict[str, Path], tmp_path: Path) -> None:
    """Started by hand: nobody looks after the processes."""
    if not dist.is_gloo_available():
        pytest.skip("this PyTorch has no gloo")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    command = [
        sys.executable,
        "-m",
        "moesaic",
        "serve",
        str(runs["softmax"] / "whole"),
        "--device",
        "cpu",
        "--port",
        "0",
    ]
    log = tmp_path / "log"
    with log.open("w") as file, ExitStack() as stack:
        processes = []
        for rank in range(2):
            environment = {**os.environ, **place, "RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"}
            processes.append(subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment))
            stack.callback(processes[-1].kill)
        deadline = time.monotonic() + 200
        while (found := re.search(r"Serving .* at (http://\S+)", log.read_text())) is None:
            assert processes[0].poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        assert ask(found[1], prompt="the", max_tokens=4, temperature=0)["choices"][0]["text"] is not None
        processes[1].kill()
        with pytest.raises(urllib.error.HTTPError, match="500"):
            ask(found[1], prompt="the", max_tokens=4)
        assert processes[0].wait(timeout=60) == 2
    assert "a pass on several processes has failed" in log.read_text()
