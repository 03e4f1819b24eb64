"""Models of a few thousand weights, a tokenizer for them, and a browser."""

import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from moesaic.config.model import ModelConfig
from moesaic.data.tokenizer import Tokenizer
from moesaic.kernels.quantized import QuantizedWeight, quantize_to_mxfp4, quantize_weight
from moesaic.model.pack import pack_transformer, packed_shapes
from moesaic.model.transformer import Transformer

TEXT = (
    "The state of the Union is strong, and the people of the Union are free. Whatever the experts say, a router "
    "chooses two of them; what they give is weighed and added. Grüße aus Köln, naïve café, 東京 and \U0001f600."
)
VOCAB_SIZE = 320
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE, "hidden_size": 64, "num_layers": 3, "num_heads": 4, "num_kv_heads": 2,
    "intermediate_size": 96, "max_positions": 192, "init_std": 0.2, "tie_embeddings": False,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "dense": {},
    "mixtral": {"moe": {"num_experts": 5, "top_k": 2, "router": {"renormalize": True}}},
    "pr-moe": {"moe": {"num_experts": [2, 7, 3], "residual": "softmax"}, "norm": "layernorm", "positions": "learned"},
    "latent": {
        "num_kv_heads": 4,
        "latent_attention": {
            "query_rank": 32, "kv_rank": 32, "nope_head_dim": 12, "rope_head_dim": 4, "value_head_dim": 24,
        },
        "moe": {"num_experts": 4, "top_k": 2, "layers": [1, 2], "residual": "sum"},
    },
}  # fmt: skip


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([TEXT * 4], vocab_size=VOCAB_SIZE)


def build_model(family: str, form: str = "fp32", *, seed: int = 0) -> Transformer:
    """form: fp32, bf16 (both as they are), or packed-bf16, packed-int8, packed-int4, packed-mxfp4."""
    config = ModelConfig.from_dict({**SIZES, **FAMILIES[family]})
    dtype = torch.float32 if form == "fp32" else torch.bfloat16
    model = Transformer(config, compute_dtype=dtype).initialize(seed)
    if form in ("fp32", "bf16"):
        return model.eval()
    if form == "packed-bf16":
        return pack_transformer(model)
    names = packed_shapes(model)
    bits = 8 if form == "packed-int8" else 4
    group = None if bits == 8 else 32

    def quantize(weight: torch.Tensor) -> QuantizedWeight:
        if form == "packed-mxfp4":
            return quantize_to_mxfp4(weight)
        return quantize_weight(weight, bits=bits, group_size=group)

    return pack_transformer(model, {name: quantize(model.get_parameter(name).detach()) for name in names})


@pytest.fixture(scope="session")
def make_model() -> Callable[..., Transformer]:
    """Models, made once each."""
    made: dict[tuple[Any, ...], Transformer] = {}

    def make(family: str = "mixtral", form: str = "fp32", *, seed: int = 0) -> Transformer:
        key = (family, form, seed)
        if key not in made:
            made[key] = build_model(family, form, seed=seed)
        return made[key]

    return make


# Chromium's own lines about the refusals that tests arrange, and about tests that look at pixels.
ARRANGED = (
    *(f"the server responded with a status of {status}" for status in (400, 401, 429)),
    "Canvas2D: Multiple readback operations",
)


# Of a module: while Playwright runs, its event loop would forbid other tests of this thread one of their own.
@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium of the system's, or a skip that says what is missing."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is missing: pip install playwright")
    path = shutil.which("chromium") or shutil.which("chromium-browser")
    if path is None:
        pytest.skip("Chromium is missing: apt-get install chromium")
    with playwright.sync_playwright() as started:
        # --no-sandbox: tests may run as root, where the sandbox refuses to.
        launched = started.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture
def expect(browser: Any) -> Callable[..., Any]:
    """Playwright's `expect`, which waits."""
    from playwright.sync_api import expect as expect_

    expect_.set_options(timeout=8000)
    return expect_


@pytest.fixture
def open_address(browser: Any) -> Iterator[Callable[..., Any]]:
    """A function that opens a page; at the end none has complained: no error, no breach of its policy."""
    problems: list[str] = []
    contexts = []

    def open_(address: str, *, width: int = 1200, height: int = 900, scheme: str = "light") -> Any:
        context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
        contexts.append(context)
        context.set_default_timeout(8000)
        page = context.new_page()
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("dialog", lambda dialog: (problems.append(dialog.message), dialog.dismiss()))
        page.on("console", lambda line: line.type in ("error", "warning") and problems.append(line.text))
        page.goto(address)
        return page

    yield open_
    for context in contexts:
        context.close()
    assert [problem for problem in problems if not any(known in problem for known in ARRANGED)] == []
