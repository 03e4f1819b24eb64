"""`lm_eval --model local-completions` against the server has the answers of our own adapter in the process."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from moesaic.evaluate.scorer import PlainScorer
from moesaic.model.load import load_run

from .conftest import Live

pytest.importorskip("lm_eval", reason="lm_eval asks the server (extra `evaluate`)")
pytest.importorskip("tenacity", reason="lm_eval's client stands on it (extra `dev`)")

from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalCompletionsAPI

from moesaic.evaluate.harness import HarnessModel

LONG = "The people of the Union are free, and the experts weigh what they give. " * 5


def requests_of(kind: Any, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [
        Instance(request_type=kind, doc={}, arguments=each, idx=0, metadata=("test", number, 1))
        for number, each in enumerate(arguments)
    ]


PAIRS = requests_of(
    "loglikelihood",
    *[("The state of the", choice) for choice in (" Union", " Union is strong", " x", "?", " Köln")],
    ("", "No context at all"),
    ("A context that ends", "inside a word"),
    (LONG, " and free"),
    ("New\nlines\n", "\nhere"),
    ("東京", " and \U0001f600"),
)
GENERATIONS = requests_of(
    "generate_until",
    ("The state", {"until": ["\n", "th"], "max_gen_toks": 12, "do_sample": False}),
    ("a router", {"until": ["e"], "max_gen_toks": 20}),
    ("Whatever", {"until": ["zzz"], "max_gen_toks": 9, "temperature": 0.0}),
)


@pytest.fixture(scope="module")
def ours(run_folder: Path) -> HarnessModel:
    loaded = load_run(run_folder, device="cpu")
    return HarnessModel(PlainScorer(loaded.model), loaded.tokenizer)


@pytest.fixture(scope="module", params=["remote-1", "remote-4", "huggingface-4"])
def theirs(real: Live, run_folder: Path, request: pytest.FixtureRequest) -> Iterator[Any]:
    """lm_eval's client, with the server's tokenizer or the run's files, one request at a time or several."""
    backend, _, batch_size = request.param.partition("-")
    options: dict[str, Any] = {} if backend == "remote" else {"tokenizer": str(run_folder)}
    yield LocalCompletionsAPI(
        base_url=f"{real.url}/v1/completions",
        model="tiny",
        tokenizer_backend="auto" if backend == "remote" else "huggingface",
        batch_size=int(batch_size),
        max_length=160,
        max_retries=1,
        **options,
    )


def likeliest_pair(ours: HarnessModel) -> tuple[str, str]:
    """A context and the token that the model would choose, whose text is encoded as just that token."""
    for length in range(1, len(LONG)):
        context = LONG[:length].rstrip()
        one = {"until": ["\0"], "max_gen_toks": 1}
        (text,) = ours.generate_until(requests_of("generate_until", (context, one)))
        if text.strip() and ours.tok_encode(context + text)[:-1] == ours.tok_encode(context):
            return context, text
    raise AssertionError("the model never chooses a token of plain text")


def test_every_likelihood_is_ours(theirs: Any, ours: HarnessModel) -> None:
    assert theirs.eot_token_id == ours.eot_token_id and theirs.prefix_token_id == ours.prefix_token_id
    pairs = [*PAIRS, requests_of("loglikelihood", likeliest_pair(ours))[0]]
    expected = ours.loglikelihood(pairs)
    found = theirs.loglikelihood(pairs, disable_tqdm=True)
    assert expected[-1][1] and not all(greedy for _, greedy in expected)
    # One longer than the model is cut at another place: their client keeps a position for the token it has to ask for.
    for pair, (value, greedy), (other, other_greedy) in zip(pairs, found, expected, strict=True):
        if pair.args[0] != LONG:
            assert value == pytest.approx(other, abs=1e-3), pair.args
            assert greedy == other_greedy


def test_greedy_text_is_ours(theirs: Any, ours: HarnessModel) -> None:
    assert theirs.generate_until(GENERATIONS, disable_tqdm=True) == ours.generate_until(GENERATIONS)
