"""Starting and ending a server: the socket, the model, the signals."""

import asyncio
import logging
import math
import signal
import socket
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import partial
from types import FrameType
from typing import Any

import h11
import torch
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from moesaic.config.serve import EngineConfig, OverloadConfig, ServeConfig, ServerConfig
from moesaic.data.chat import check_chat_template, render_chat
from moesaic.errors import ConfigError, DataError, GenerationError, InstallationError
from moesaic.folders import run_name
from moesaic.kernels import select
from moesaic.logs import logger
from moesaic.model.load import LoadedModel, Precision, load_run, resolve_run
from moesaic.model.transformer import Transformer
from moesaic.parallel.inference import share_experts
from moesaic.parallel.world import World
from moesaic.serve.async_engine import AsyncEngine, StepEngine
from moesaic.serve.engine import Engine, kv_budget_bytes
from moesaic.serve.followers import HAS_FAILED, Channel, Followers, follow
from moesaic.serve.grammar import GrammarCompiler
from moesaic.serve.overload import EngineWithStudent, split_memory
from moesaic.serve.server.app import create_app
from moesaic.serve.server.errors import error_response, refusal
from moesaic.serve.server.gate import KEYS_VARIABLE, is_local, read_keys
from moesaic.serve.server.interruptible import run_interruptibly
from moesaic.serve.server.jobs import Served, Student

# Answers that are ended at the drain's end have so long to be sent.
_FAREWELL_SECONDS = 5
# Open files beside one for each request: idle connections, the model's files, and more.
_SPARE_FILES = 4096
_REPORT_SECONDS = 10.0
_ECHO_SECONDS = 0.5  # of a signal
_TRIAL_SECONDS = 5.0  # for a conversation of one message through the chat template


def serve(
    run: str,
    config: ServeConfig,
    *,
    name: str,
    device: str,
    precision: Precision | None = None,
    ready: Callable[[str], None],
) -> None:
    """Serve the model that RUN or RUN@step names until SIGTERM or SIGINT, and then let what runs finish.

    name: what requests call it where the config does not say. precision: of the model's matrices, as load_run takes it.
    ready: called with the URL when requests are taken.

    Where torchrun has started several processes each of them calls it: the experts are spread over them, the first one
    serves, and the others return when it has ended.

    Raises: ConfigError for an address that cannot be had, for keys, and for settings that the model cannot meet; what
    load_run raises; DataError for a chat template that no conversation gets through; of several processes
    ElsewhereError where another one has raised one of these, or is gone.
    """
    world = World.join()
    try:
        with world.noticing_losses("start all again"):
            if world.is_main:
                _serve(run, config, world, name=name, device=device, precision=precision, ready=ready)
            else:
                _follow(run, config, world, device=device, precision=precision)
    finally:
        world.leave()


def _follow(run: str, config: ServeConfig, world: World, *, device: str, precision: Precision | None) -> None:
    """Compute with the first process what that serves; what runs finishes before it tells of its end."""
    logger.setLevel("ERROR")
    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, signal.SIG_IGN)
    with world.together():
        pass  # the first one's address
    loaded = _load_shared(run, config, world, device=device, precision=precision)
    with world.together():
        pass  # the first one's other models
    _memory_of_all(config.engine, loaded.model, world)
    follow(loaded.model, Channel(world))


def _load_shared(
    run: str, config: ServeConfig, world: World, *, device: str, precision: Precision | None
) -> LoadedModel:
    """Load this process's experts and all else of the checkpoint that the main process has found.

    Raises: what load_run raises; ConfigError where processes would not compute the same to the last bit.
    """
    with world.together():
        info, own = resolve_run(run, precision=precision), world.device(device)
    named = world.values(info.run_at_step)[0]
    with world.together():
        loaded = load_run(named, device=own.type, precision=precision, share=partial(share_experts, world=world))
    library = select.cpu_library()
    kernels = "none" if library is None else library.instruction_set
    machine = kernels if own.type == "cpu" else torch.cuda.get_device_name(own)
    world.require_same(
        {
            "checkpoint": loaded.info.model_sha256,
            "kernels or kind of GPU": [own.type, machine, loaded.model.is_packed],
            "settings": config.engine.to_dict(),
        }
    )
    return loaded


def _memory_of_all(config: EngineConfig, model: Transformer, world: World) -> EngineConfig:
    """Return the settings with the memory of keys and values that every process has, each of which holds them all."""
    if world.size == 1 or config.kv_cache_bytes != "auto":
        return config
    own = kv_budget_bytes(model, config) // (world.local_size if model.device.type == "cpu" else 1)
    return config.replace(kv_cache_bytes=-world.highest(-own))


def _serve(
    run: str,
    config: ServeConfig,
    world: World,
    *,
    name: str,
    device: str,
    precision: Precision | None,
    ready: Callable[[str], None],
) -> None:
    with ExitStack() as stack:
        with world.together():
            keys = read_keys(config.server.api_key_file)
            name = config.server.served_model_name or name
            student_name = None if config.overload is None else _student_name(config.overload, name)
            # Before the model, which may take long to load.
            listener = stack.enter_context(listen(config.server.host, config.server.port))
            end_stalled(listener, config.server.request_timeout_seconds)
            allow_connections(config.server)
            _warn_if_open(config.server, has_keys=bool(keys))
        if world.size == 1:
            loaded = load_run(run, device=device, precision=precision, packed_file="write")
        else:
            loaded = _load_shared(run, config, world, device=device, precision=precision)
        with world.together():
            draft_model = _load_draft(config.engine, loaded, device=device)
            other = None
            if config.overload is not None:
                other = _load_beside("overload.model", config.overload.model, loaded, device=device)
        settings = _memory_of_all(config.engine, loaded.model, world)
        others = None
        if world.size > 1:
            others = Followers(Channel(world))
            stack.callback(others.end)
        _check_template(loaded)
        grammars = _grammars_of(loaded, config.server)
        if grammars is not None:
            stack.callback(grammars.close)
        helping, student = None, None
        if other is not None and student_name is not None:
            settings, rest = split_memory(settings, loaded.model, other.model, draft_model=draft_model)
            helping = Engine(other.model, other.tokenizer, rest, grammars=grammars)
            student = Student(student_name, tuple(layer.layer for layer in helping.stats().layers))
        engine = Engine(
            loaded.model, loaded.tokenizer, settings, draft_model=draft_model, grammars=grammars, others=others
        )
        driven: StepEngine = engine
        if not engine.is_batch_invariant:
            logger.info(
                "%s runs by PyTorch's operations: what runs beside a text may round it otherwise, so that its tokens "
                "can differ from run to run, with a seed too; packed weights and the C++ kernels (moesaic doctor) give "
                "the same ones.",
                name,
            )
        if helping is not None and config.overload is not None:
            driven = EngineWithStudent(engine, helping, max_texts=config.overload.max_texts)
        app = create_app(
            AsyncEngine(driven),
            loaded.tokenizer,
            config.server,
            name=name,
            max_length=engine.max_length,
            hidden_size=engine.model_config.hidden_size,
            moe_layers=[layer.layer for layer in engine.stats().layers],
            student=student,
            grammars=grammars,
            keys=keys,
        )
        # uvicorn's rare lines, of requests that are no HTTP, go where ours do.
        logging.getLogger("uvicorn").handlers = logger.handlers
        server = DrainingServer(settings_of(app), app.state.served, listener, ready=ready, others=others)
        server.run(sockets=[listener])
        if others is not None and others.has_failed:
            raise GenerationError(HAS_FAILED)


def settings_of(app: FastAPI) -> uvicorn.Config:
    """Return how uvicorn runs an application of create_app's."""
    return uvicorn.Config(
        app,
        http=_Protocol,
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        ws="none",
        lifespan="on",
        timeout_graceful_shutdown=_FAREWELL_SECONDS,
    )


class _Protocol(H11Protocol):
    """HTTP as uvicorn speaks it; what is none is told so as every other error is."""

    def send_400_response(self, msg: str) -> None:
        error = refusal(
            "what was sent is no request of HTTP/1.1 (its first line, its headers or its length); one is required; "
            "check what sends it.",
            code="invalid_http",
        )
        body = bytes(error_response(error).body)
        headers = [("Content-Type", "application/json"), ("Content-Length", str(len(body))), ("Connection", "close")]
        for event in (h11.Response(status_code=400, headers=headers), h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event))
        self.transport.close()

    def _unsupported_upgrade_warning(self) -> None:
        """Say nothing, where uvicorn says what to install for web sockets: no path here has one."""


class DrainingServer(uvicorn.Server):
    """A server that on its first signal refuses newcomers (503) and ends when what runs has; on a second, at once."""

    def __init__(
        self,
        settings: uvicorn.Config,
        served: Served,
        listener: socket.socket,
        *,
        ready: Callable[[str], None],
        others: Followers | None = None,
    ) -> None:
        """ready: called with the URL when requests are taken.

        others: it ends where a pass on all processes has failed. Signals may then come twice, from a terminal and from
        torchrun.
        """
        super().__init__(settings)
        self._served, self._listener, self._ready = served, listener, ready
        self._loop: asyncio.AbstractEventLoop | None = None
        self._draining: asyncio.Task[None] | None = None
        self._others, self._told = others, (0, -math.inf)
        self._next_report = 0.0

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        self._loop = asyncio.get_running_loop()
        self._loop.set_exception_handler(self._report)
        if self.started:
            self._ready(_url(self._listener))

    async def on_tick(self, counter: int) -> bool:
        if self._others is not None and self._others.has_failed and not self.should_exit:
            logger.error("%s", HAS_FAILED)
            self.should_exit = True
        return await super().on_tick(counter)

    def _report(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Log what the event loop has to say: of connections that it cannot take, which come by thousands, one line."""
        if "socket.accept()" not in context.get("message", ""):
            loop.default_exception_handler(context)
        elif loop.time() >= self._next_report:
            self._next_report = loop.time() + _REPORT_SECONDS
            logger.warning(
                "connections cannot be taken (%s); they wait until others close; allow the process more open files "
                "(ulimit -n), or put a proxy before it that limits them.",
                context.get("exception"),
            )

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await super().shutdown(sockets=sockets)
        if self.force_exit:  # uvicorn would leave the application to be cancelled, and log that with a traceback
            await self.lifespan.shutdown()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        (earlier, when), self._told = self._told, (sig, time.monotonic())
        if self._others is not None and sig == earlier and time.monotonic() - when < _ECHO_SECONDS:
            return
        if self._loop is None or self._draining is not None or self._served.admission.is_draining:
            self.should_exit = self.force_exit = True
            return
        logger.info(
            "%s: no new requests are taken; %d go on, for %g s at most.",
            signal.Signals(sig).name,
            self._served.admission.num_inside + self._served.admission.num_waiting,
            self._served.config.drain_seconds,
        )
        self._served.admission.is_draining = True
        self._loop.call_soon_threadsafe(self._begin_drain)

    def _begin_drain(self) -> None:
        self._draining = asyncio.ensure_future(self._drain())

    async def _drain(self) -> None:
        admission = self._served.admission
        try:
            await asyncio.wait_for(admission.drained(), self._served.config.drain_seconds)
        except TimeoutError:
            if left := admission.num_inside + admission.num_waiting:
                logger.warning(
                    "%d requests had not finished after drain_seconds (%g); they are ended; raise server.drain_seconds "
                    "to give them longer.",
                    left,
                    self._served.config.drain_seconds,
                )
            await self._served.engine.stop()
        self.should_exit = True


def allow_connections(config: ServerConfig) -> None:
    """Raise the process's limit of open files, of which each connection is one, to what the config lets in."""
    try:
        import resource
    except ImportError:  # no such limit on this system
        return
    wanted = config.max_concurrent_requests + config.max_queued_requests + _SPARE_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    if allowed < wanted:
        logger.warning(
            "the process may open %d files, each connection is one, and server.max_concurrent_requests and "
            "max_queued_requests let %d in; raise the limit (ulimit -Hn), or lower them.",
            allowed,
            config.max_concurrent_requests + config.max_queued_requests,
        )


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that is bound, and not yet listening. Raises: ConfigError."""
    # With its protocol named: asyncio asks for it before it sets TCP_NODELAY. Without that, an answer on a connection
    # that was kept waits 40 ms for the client's acknowledgment.
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with ExitStack() as stack:
        try:
            listener = stack.enter_context(socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP))
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((host, port))
        except (OSError, TypeError, ValueError) as error:  # the last two of what is no name of a host at all
            why = getattr(error, "strerror", None) or error
            raise ConfigError(
                f"server.host {host!r} and port {port} cannot be listened on ({why}); an address of this machine and a "
                f"free port are required; name another host, or choose another port (0: any)."
            ) from None
        stack.pop_all()
    return listener


def end_stalled(listener: socket.socket, seconds: float) -> None:
    """Have the system end connections whose client takes nothing of what is sent to it for so long, where it can."""
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux; connections have what the listening socket has
        milliseconds = math.ceil(min(seconds * 1000, 2**31 - 1))
        with suppress(OSError):
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)


def _student_name(config: OverloadConfig, name: str) -> str:
    """Return what answers call the student; name: what they call the model. Raises: ConfigError where both are one."""
    student = run_name(config.model)
    if student == name:
        raise ConfigError(
            f"overload.model ({config.model}) would be called {student!r} in answers, as the model that is served; two "
            f"names are required, since an answer's `model` says who made it; set server.served_model_name to another."
        )
    return student


def _load_draft(config: EngineConfig, loaded: LoadedModel, *, device: str) -> Transformer | None:
    run = None if config.speculation is None else config.speculation.model
    if run is None:
        return None
    return _load_beside("engine.speculation.model", run, loaded, device=device).model


def _load_beside(key: str, run: str, loaded: LoadedModel, *, device: str) -> LoadedModel:
    """Load a second model that takes the same token ids."""
    other = load_run(run, device=device, packed_file="write")
    if other.tokenizer.fingerprint != loaded.tokenizer.fingerprint:
        raise ConfigError(
            f"{key} ({run}) has another tokenizer than the model that is served; the same is required, since token ids "
            f"go to both; choose a student of the model."
        )
    if other.config.model.vocab_size != loaded.config.model.vocab_size:
        raise ConfigError(
            f"{key} ({run}) has a vocabulary of {other.config.model.vocab_size}, and the model that is served one of "
            f"{loaded.config.model.vocab_size}; the same is required; choose a student of the model."
        )
    return other


def _check_template(loaded: LoadedModel) -> None:
    try:
        check_chat_template(loaded.tokenizer)
    except DataError as error:
        raise DataError(f"{loaded.info.run_folder}: {error}") from None
    if loaded.tokenizer.chat_template is None:
        return

    def render() -> str:
        return render_chat(loaded.tokenizer, [{"role": "user", "content": "Hello"}])

    try:
        asyncio.run(asyncio.wait_for(run_interruptibly(render), _TRIAL_SECONDS))
    except DataError as error:
        logger.warning("%s: of a conversation of one message, %s", loaded.info.run_folder, error)
    except TimeoutError:
        logger.warning(
            "%s: the chat template has not rendered a conversation of one message after %g s; chats will end with a "
            "timeout; mend %s.",
            loaded.info.run_folder,
            _TRIAL_SECONDS,
            loaded.tokenizer.chat_template_file,
        )


def _grammars_of(loaded: LoadedModel, config: ServerConfig) -> GrammarCompiler | None:
    try:
        return GrammarCompiler(
            loaded.tokenizer,
            vocab_size=loaded.config.model.vocab_size,
            max_bytes=config.max_grammar_bytes,
            timeout_seconds=config.grammar_timeout_seconds,
        )
    except InstallationError:
        logger.info(
            "xgrammar is not installed: requests with a grammar or a JSON format are refused; `pip install "
            "'moesaic[structured]'` brings it."
        )
        return None


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # no browser goes to "every address"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _warn_if_open(config: ServerConfig, *, has_keys: bool) -> None:
    if not is_local(config.host) and not has_keys:
        logger.warning(
            "the server listens on %s without API keys: whoever reaches it may use it; set server.api_key_file or %s.",
            config.host,
            KEYS_VARIABLE,
        )
