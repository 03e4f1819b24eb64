"""The application: its endpoints, and what each request passes on its way to them."""

import asyncio
import base64
import gc
import re
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from pathlib import Path
from typing import Any

import pydantic_core
from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse
from fastapi.routing import APIRoute
from fastapi.staticfiles import StaticFiles
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware

from moesaic import __version__
from moesaic.config.serve import ServerConfig
from moesaic.data.tokenizer import SHORT_CHARS, Tokenizer
from moesaic.errors import MoesaicError
from moesaic.serve.async_engine import AsyncEngine
from moesaic.serve.grammar import GrammarCompiler
from moesaic.serve.server.admission import Admission
from moesaic.serve.server.answers import TokenTexts
from moesaic.serve.server.connection import while_connected
from moesaic.serve.server.errors import ApiError, answer_error, json_response, json_text, refusal
from moesaic.serve.server.gate import ApiKeys, Journal, LocalNames, WholeBody, is_local
from moesaic.serve.server.generation import answer, deadline_of, turn_of
from moesaic.serve.server.jobs import Served, Student, check_ids, encode, read_prompts
from moesaic.serve.server.log_fields import log_fields
from moesaic.serve.server.metrics import Metrics, describe_experts
from moesaic.serve.server.requests import (
    MAX_EMBEDDED_TEXTS,
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    EmbeddingBody,
    TokenizeBody,
)
from moesaic.serve.server.responses import ResponsesBody

WEB_FOLDER = Path(__file__).resolve().parents[1] / "web"
_ERRORS: dict[int | str, dict[str, Any]] = {
    "default": {
        "description": "An error: what was given, what is required, what to do.",
        "content": {
            "application/json": {
                "schema": {
                    "type": "object",
                    "required": ["error"],
                    "properties": {
                        "error": {
                            "type": "object",
                            "required": ["message", "type", "param", "code"],
                            "properties": {
                                "message": {"type": "string"},
                                "type": {"type": "string"},
                                "param": {"type": ["string", "null"]},
                                "code": {"type": ["string", "null"]},
                            },
                        }
                    },
                }
            }
        },
    }
}


# What a number has that is no whole one. Of those, too large ones would be read as infinity.
_FRACTION = re.compile(rb"[0-9](?:\.|[eE]\+?)[0-9]")


class _StrictRequest(Request):
    """A request whose body is JSON as the standard has it: no NaN, no lone surrogates, no endless nesting; and without
    numbers that a float cannot hold, which would be read as infinity."""

    async def json(self) -> Any:
        body = await self.body()
        collects = gc.isenabled()
        gc.disable()  # or it looks through a million new lists again and again: seconds, for everybody
        try:
            value = pydantic_core.from_json(body, allow_inf_nan=False)
            if _FRACTION.search(body):
                json_text(value)
            return value
        except ValueError as error:
            # json_text's own words are of Python's, for whom infinity is a number.
            why = "a number is larger than a float holds" if str(error).startswith("Out of range") else error
            raise refusal(
                f"the body is not JSON that can be read ({why}); a JSON object in UTF-8 is required; mend it.",
                code="invalid_json",
            ) from None
        finally:
            if collects:
                gc.enable()


class _StrictRoute(APIRoute):
    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_strictly(request: Request) -> Response:
            return await handle(_StrictRequest(request.scope, request.receive))

        return handle_strictly


def create_app(
    engine: AsyncEngine,
    tokenizer: Tokenizer,
    config: ServerConfig,
    *,
    name: str,
    max_length: int,
    hidden_size: int,
    moe_layers: Sequence[int] = (),
    student: Student | None = None,
    grammars: GrammarCompiler | None = None,
    keys: Sequence[str] = (),
    web_folder: Path = WEB_FOLDER,
) -> FastAPI:
    """Return the server of one model; its lifespan starts and stops the engine's thread.

    name: what requests call the model. max_length: positions of a sequence. hidden_size: of its vectors. moe_layers:
    the places of the MoE layers, for return_experts. student: who helps out, where the engine has one. grammars: the
    engine's; None refuses them. keys: empty lets everybody in.
    """
    metrics = Metrics()
    admission = Admission(max_concurrent=config.max_concurrent_requests, max_queued=config.max_queued_requests)
    served = Served(
        name=name,
        tokenizer=tokenizer,
        texts=TokenTexts(tokenizer),
        engine=engine,
        max_length=max_length,
        hidden_size=hidden_size,
        moe_layers=tuple(moe_layers),
        student=student,
        created=int(time.time()),
        config=config,
        admission=admission,
        metrics=metrics,
        grammars=grammars,
        grammar_thread=ThreadPoolExecutor(1, thread_name_prefix="moesaic-grammar"),
    )

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        engine.start()
        yield
        await engine.stop()
        served.grammar_thread.shutdown(wait=False, cancel_futures=True)

    router = APIRouter(route_class=_StrictRoute, responses=_ERRORS)
    _add_generation(router, served)
    _add_tokens(router, served)
    _add_state(router, served)
    _add_page(router, web_folder)
    paths = frozenset(route.path for route in router.routes if isinstance(route, APIRoute))
    outermost_first = [
        Middleware(Journal, metrics=metrics, known_paths=paths),
        Middleware(ApiKeys, keys=keys),
        Middleware(WholeBody, max_bytes=config.max_body_bytes, timeout_seconds=config.request_timeout_seconds),
    ]
    if not keys and is_local(config.host):
        outermost_first.insert(1, Middleware(LocalNames))
    if config.allowed_origins:  # before the keys: a browser asks whether it may ask without one
        cors = Middleware(
            CORSMiddleware,
            allow_origins=list(config.allowed_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],  # OpenAI's clients send a dozen of their own
            expose_headers=["X-Request-Id", "Retry-After"],
        )
        outermost_first.insert(1, cors)
    app = FastAPI(
        title="moesaic",
        version=__version__,
        description="OpenAI's protocol before a Mixture-of-Experts model of moesaic's.",
        docs_url=None,  # their pages load scripts from other places
        redoc_url=None,
        lifespan=lifespan,
        middleware=outermost_first,
    )
    for kind in (MoesaicError, HTTPException, RequestValidationError):
        app.add_exception_handler(kind, answer_error)
    app.include_router(router)
    if web_folder.is_dir():
        app.mount("/static", StaticFiles(directory=web_folder))
    app.state.served = served
    return app


def check_model(served: Served, model: str | None) -> None:
    """Raise ApiError 404 where a request names another model than the one that is served.

    The name of the student that helps out, which answers bear, is another name of it: who answers is chosen here.
    """
    names = (served.name,) if served.student is None else (served.name, served.student.name)
    if model is not None and model not in names:
        raise ApiError(
            404,
            f"the model {model[:60]!r} is not served here; {served.name!r} is; ask for that one.",
            param="model",
            code="model_not_found",
        )


def _add_generation(router: APIRouter, served: Served) -> None:
    @router.post("/v1/completions")
    async def completions(request: Request, body: CompletionBody) -> Response:
        """Continue one or several prompts, each a text or token ids."""
        check_model(served, body.model)
        return await answer(served, request, body)

    @router.post("/v1/chat/completions")
    async def chat_completions(request: Request, body: ChatBody) -> Response:
        """Answer a conversation, by the model's chat template."""
        check_model(served, body.model)
        return await answer(served, request, body)

    @router.post("/v1/responses")
    async def responses(request: Request, body: ResponsesBody) -> Response:
        """Answer a conversation as a chat, in the form of OpenAI's Responses API; no state is kept."""
        check_model(served, body.model)
        return await answer(served, request, body)

    @router.post("/v1/embeddings")
    async def embeddings(request: Request, body: EmbeddingBody) -> Response:
        """Return a vector of unit length for each text: the mean of the model's final hidden states."""
        check_model(served, body.model)
        return await while_connected(request, _embed(served, request, body), deadline=deadline_of(served, request))


async def _embed(served: Served, request: Request, body: EmbeddingBody) -> Response:
    if body.dimensions not in (None, served.hidden_size):
        raise refusal(
            f"dimensions is {body.dimensions}; the model's vectors have {served.hidden_size}; leave it out.",
            param="dimensions",
        )
    entries: list[str] = []
    async with turn_of(served, request):
        prompts = await read_prompts(served, body.input, param="input", limit=MAX_EMBEDDED_TEXTS)
        count = sum(len(prompt) for prompt in prompts)
        log_fields(request.scope).values["prompt_tokens"] = count
        found = await served.engine.embed(prompts)  # (n, H)
        for vector in found.numpy().astype("<f4"):
            is_short = body.encoding_format == "base64"
            value = base64.b64encode(vector.tobytes()).decode() if is_short else vector.tolist()
            entries.append(json_text({"object": "embedding", "index": len(entries), "embedding": value}))
            await asyncio.sleep(0)  # thousands of numbers took their time: others come between
    rest = json_text({"model": served.name, "usage": {"prompt_tokens": count, "total_tokens": count}})
    text = f'{{"object":"list","data":[{",".join(entries)}],{rest[1:]}'
    return Response(text, media_type="application/json")


def _add_tokens(router: APIRouter, served: Served) -> None:
    tokenizer = served.tokenizer

    @router.post("/tokenize")
    async def tokenize(request: Request, body: TokenizeBody) -> Response:
        """Return a text's token ids as a completion's prompt has them."""
        check_model(served, body.model)

        async def work() -> Response:
            text = body.prompt
            async with _place_for(served, len(text)):
                ids = (
                    await encode(tokenizer, text, add_special_tokens=body.add_special_tokens is not False)
                    if text
                    else ()
                )
            return json_response({"tokens": list(ids), "count": len(ids), "max_model_len": served.max_length})

        return await while_connected(request, work(), deadline=deadline_of(served, request))

    @router.post("/detokenize")
    async def detokenize(request: Request, body: DetokenizeBody) -> Response:
        """Return the text of token ids; special tokens appear as their names."""
        check_model(served, body.model)

        async def work() -> Response:
            async with _place_for(served, len(body.tokens)):
                is_short = len(body.tokens) < SHORT_CHARS
                text = decode(body.tokens) if is_short else await asyncio.to_thread(decode, body.tokens)
                return json_response({"prompt": text})

        return await while_connected(request, work(), deadline=deadline_of(served, request))

    def decode(tokens: list[int]) -> str:
        check_ids(tokenizer, tokens, param="tokens")
        return tokenizer.decode(tokens)

    @router.get("/tokenizer_info")
    async def tokenizer_info() -> Response:
        """Return the special tokens and the chat template, as lm_eval asks for them."""
        names = {"eos_token": tokenizer.end_of_text, "bos_token": None, "pad_token": None, **tokenizer.special_names}
        return json_response({**names, "chat_template": tokenizer.chat_template})


def _place_for(served: Served, length: int) -> AbstractAsyncContextManager[None]:
    """Long texts wait for their turn as whatever else costs time."""
    return nullcontext() if length < SHORT_CHARS else served.admission.enter()


def _add_state(router: APIRouter, served: Served) -> None:
    def describe_model() -> dict[str, Any]:
        return {
            "id": served.name,
            "object": "model",
            "created": served.created,
            "owned_by": "moesaic",
            "max_model_len": served.max_length,
            "has_chat_template": served.tokenizer.chat_template is not None,
        }

    @router.get("/v1/models")
    async def models() -> Response:
        """Return the one model that is served."""
        return json_response({"object": "list", "data": [describe_model()]})

    @router.get("/v1/models/{model:path}")
    async def model(model: str) -> Response:
        """Return a model."""
        check_model(served, model)
        return json_response(describe_model())

    @router.get("/v1/experts")
    async def experts() -> Response:
        """Return the load of every MoE layer and expert."""
        return json_response(describe_experts(await served.engine.stats()))

    @router.get("/v1/stats")
    async def stats() -> Response:
        """Return the engine's figures, and percentiles of the last requests."""
        found = await served.engine.stats()
        return json_response(served.metrics.summary(found, model=served.name, num_queued=served.admission.num_waiting))

    @router.get("/metrics")
    async def metrics() -> Response:
        """Return Prometheus metrics."""
        found = await served.engine.stats()
        text = served.metrics.exposition(found, num_queued=served.admission.num_waiting)
        return Response(text, headers={"Content-Type": CONTENT_TYPE_LATEST})

    @router.head("/health", include_in_schema=False)
    @router.get("/health")
    async def health() -> Response:
        """Say whether the engine lives; 503: it cannot go on, and the process should be replaced."""
        failure = served.engine.failure
        if failure is not None:
            raise ApiError(503, f"{failure}; a working engine is required; restart the server.", code="unhealthy")
        return json_response({"status": "ok"})

    @router.head("/ready", include_in_schema=False)
    @router.get("/ready")
    async def ready() -> Response:
        """Say whether new requests are taken."""
        if served.admission.is_draining or served.engine.failure is not None:
            raise ApiError(
                503, "the server takes no new requests; it stops, or has failed; ask another.", code="not_ready"
            )
        return json_response({"status": "ready"})


def _add_page(router: APIRouter, web_folder: Path) -> None:
    @router.head("/", include_in_schema=False)
    @router.get("/", include_in_schema=False)
    async def page() -> Response:
        index = web_folder / "index.html"
        if not index.is_file():
            raise HTTPException(404)
        return FileResponse(index, headers={"Cache-Control": "no-cache"})
