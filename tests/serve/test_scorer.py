from collections.abc import Callable, Sequence

import pytest

from moesaic.config.serve import EngineConfig
from moesaic.data.tokenizer import Tokenizer
from moesaic.errors import GenerationError
from moesaic.evaluate.batched import BatchedScorer
from moesaic.evaluate.scorer import Pair, PlainScorer, Prompt
from moesaic.model.transformer import Transformer
from moesaic.serve.scorer import EngineScorer

Make = Callable[..., Transformer]
SHOTS = tuple(range(70))


def until(length: int, *, end: int | None = None) -> Callable[[Sequence[int]], bool]:
    return lambda new: len(new) >= length or new[-1] == end


@pytest.mark.parametrize("form", ["fp32", "packed-bf16"])
def test_greedy_text_is_that_of_the_definition(form: str, make_model: Make, tokenizer: Tokenizer) -> None:
    model = make_model("mixtral", form)
    prompts = [
        *(Prompt((*SHOTS, last), max_new_tokens=20, is_done=until(count)) for last, count in ((1, 1), (2, 7), (3, 99))),
        Prompt((5,), max_new_tokens=12, is_done=until(99)),
    ]
    shares: list[float] = []
    scorer = EngineScorer(model, tokenizer, BatchedScorer(model), config=EngineConfig(max_sequences=2))
    assert scorer.generate(prompts, progress=shares.append) == PlainScorer(model).generate(prompts)
    assert shares == sorted(shares) and shares[-1] == 1.0 and len(shares) == len(prompts)
    assert scorer.generate([]) == []


def test_drawn_text_repeats_whatever_else_is_asked(make_model: Make, tokenizer: Tokenizer) -> None:
    model = make_model("mixtral", "packed-bf16")
    scorer = EngineScorer(model, tokenizer, BatchedScorer(model))
    drawn = [Prompt((1, 2, 3), 10, until(99), temperature=1.3, top_p=0.9, seed=seed) for seed in (1, 2)]
    both = scorer.generate(drawn)
    assert both[0] != both[1] and scorer.generate(drawn[1:]) == both[1:]


def test_likelihoods_are_the_other_scorers(make_model: Make, tokenizer: Tokenizer) -> None:
    model = make_model("mixtral", "fp32")
    scorer = EngineScorer(model, tokenizer, BatchedScorer(model))
    pairs = [Pair((1, 2), (3,)), Pair((4,), (5, 6))]
    assert scorer.score(pairs) == BatchedScorer(model).score(pairs)
    assert scorer.max_length == model.config.max_positions


def test_what_does_not_fit_is_refused(make_model: Make, tokenizer: Tokenizer) -> None:
    model = make_model("mixtral", "fp32")
    scorer = EngineScorer(model, tokenizer, BatchedScorer(model))
    for prompt in (Prompt((1,) * 190, 10, until(1)), Prompt((1,), 0, until(1)), Prompt((), 4, until(1))):
        with pytest.raises(GenerationError):
            scorer.generate([prompt])
