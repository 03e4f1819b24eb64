"""Live servers on free ports: of a small random PR-MoE, and of an engine that can be made slow and broken."""

import importlib.util
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from fastapi import FastAPI

from moesaic.checkpoint.store import save_checkpoint
from moesaic.config.load import write_config
from moesaic.config.serve import EngineConfig, ServerConfig
from moesaic.config.train import TrainConfig
from moesaic.data.tokenizer import Tokenizer
from moesaic.model.load import load_run
from moesaic.model.transformer import Transformer
from moesaic.serve.async_engine import AsyncEngine, StepEngine
from moesaic.serve.engine import Engine
from moesaic.serve.grammar import GrammarCompiler
from moesaic.serve.overload import EngineWithStudent
from moesaic.serve.server.app import create_app
from moesaic.serve.server.jobs import Student
from moesaic.serve.server.run import DrainingServer, listen, settings_of

from ..conftest import TEXT, VOCAB_SIZE
from ..fake_engine import FakeEngine

pytest.importorskip("fastapi", reason="the server is FastAPI's (extra `serve`)")

MODEL: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "num_layers": 3,
    "num_heads": 2,
    "intermediate_size": 48,
    "max_positions": 160,
    "init_std": 0.3,  # far from uniform
    "moe": {"num_experts": [4, 8], "layers": [1, 2], "top_k": 2, "residual": "sum"},
}
TEMPLATE = (
    "{% if tools %}[tools]{{ tools | map(attribute='function.name') | join }}<tool_call>\n{% endif %}"
    "{% for m in messages %}{% if m.name == 'nobody' %}{{ raise_exception('nobody speaks') }}{% endif %}"
    "[{{ m.role }}]{{ m.content }}{% for c in m.tool_calls %}{{ c.function.arguments | tojson }}{% endfor %}"
    "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}{{ reasoning_effort }}"
)


@dataclass(frozen=True)
class Live:
    """A server that runs."""

    url: str
    app: FastAPI
    server: DrainingServer


@contextmanager
def live(app: FastAPI) -> Iterator[Live]:
    """Run an application on a free port, in a thread; its clients are waited for as at a SIGTERM."""
    listener = listen("127.0.0.1", 0)
    is_ready = threading.Event()
    urls: list[str] = []

    def ready(url: str) -> None:
        urls.append(url)
        is_ready.set()

    server = DrainingServer(settings_of(app), app.state.served, listener, ready=ready)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    assert is_ready.wait(30)
    try:
        yield Live(urls[0], app, server)
    finally:
        server.should_exit = True
        thread.join(30)
        listener.close()
        assert not thread.is_alive()


@pytest.fixture(scope="session")
def chat_tokenizer() -> Tokenizer:
    plain = Tokenizer.train([TEXT * 4], vocab_size=VOCAB_SIZE)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>", "chat_template": TEMPLATE}
    return Tokenizer(plain.json_text, companions={"tokenizer_config.json": json.dumps(config)})


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory, chat_tokenizer: Tokenizer) -> Path:
    """A run of a small PR-MoE with random weights, in fp32."""
    run = tmp_path_factory.mktemp("served") / "tiny-pr-moe"
    run.mkdir()
    config = TrainConfig.from_dict(
        {
            "model": MODEL,
            "data": {"path": "none", "sequence_length": 16},
            "tokens": 1024,
            "batch_size": 4,
            "precision": "fp32",
        }
    )
    write_config(config, run / "config.yaml")
    chat_tokenizer.save(run)
    state = dict(Transformer(config.model).initialize(3).state_dict())
    save_checkpoint(run, 7, model=state, optimizer={"x": torch.zeros(1)}, metadata={})
    return run


@pytest.fixture(scope="session")
def real_app(run_folder: Path) -> Iterator[Callable[..., FastAPI]]:
    """A function (keys=(), engine=EngineConfig(), draft=None, student=None, **ServerConfig values) that makes an
    application.

    draft: a model that drafts, as `engine` says. student: one that answers while another text runs or waits.
    """
    loaded = load_run(run_folder, device="cpu")
    grammars = None
    if importlib.util.find_spec("xgrammar") is not None:
        grammars = GrammarCompiler(loaded.tokenizer, vocab_size=VOCAB_SIZE, timeout_seconds=20)

    def make(
        *,
        keys: Sequence[str] = (),
        engine: EngineConfig | None = None,
        draft: Transformer | None = None,
        student: Transformer | None = None,
        **values: Any,
    ) -> FastAPI:
        config = engine or EngineConfig(kv_cache_bytes=4 << 20)
        made = Engine(loaded.model, loaded.tokenizer, config, grammars=grammars, draft_model=draft)
        driven: StepEngine = made
        helps: Student | None = None
        if student is not None:
            helping = Engine(student, loaded.tokenizer, config)
            driven = EngineWithStudent(made, helping, max_texts=1)
            helps = Student("student", tuple(layer.layer for layer in helping.stats().layers))
        return create_app(
            AsyncEngine(driven),
            loaded.tokenizer,
            ServerConfig(**values),
            name="tiny",
            max_length=made.max_length,
            hidden_size=made.model_config.hidden_size,
            moe_layers=[layer.layer for layer in made.stats().layers],
            student=helps,
            grammars=grammars,
            keys=keys,
        )

    yield make
    if grammars is not None:
        grammars.close()


@pytest.fixture(scope="session")
def real(real_app: Callable[..., FastAPI]) -> Iterator[Live]:
    """The server of the run, with what is usual."""
    with live(real_app()) as running:
        yield running


@pytest.fixture
def fake(chat_tokenizer: Tokenizer) -> FakeEngine:
    return FakeEngine(chat_tokenizer, max_length=64)


@pytest.fixture
def serve_fake(chat_tokenizer: Tokenizer, fake: FakeEngine) -> Callable[..., AbstractContextManager[Live]]:
    """A function (keys=(), web_folder=None, **ServerConfig values) that runs a server of the fake engine."""

    @contextmanager
    def serve(*, keys: Sequence[str] = (), web_folder: Path | None = None, **values: Any) -> Iterator[Live]:
        app = create_app(
            AsyncEngine(fake),
            chat_tokenizer,
            ServerConfig(**values),
            name="fake",
            hidden_size=2,
            max_length=2 * 10**9,  # a text may go on for as long as a test lasts
            keys=keys,
            **({} if web_folder is None else {"web_folder": web_folder}),
        )
        try:
            with live(app) as running:
                yield running
        finally:
            fake.go.set()

    return serve
