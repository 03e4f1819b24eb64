from collections.abc import Callable

import pytest

from moesaic.config.serve import EngineConfig, Sampling
from moesaic.data.tokenizer import Tokenizer
from moesaic.errors import ConfigError
from moesaic.model.transformer import Transformer
from moesaic.serve.engine import Engine
from moesaic.serve.overload import EngineWithStudent

Make = Callable[..., Transformer]
SAMPLING = Sampling(temperature=0.0, max_tokens=6, ignore_end_of_text=True)


def test_above_the_limit_new_requests_are_the_students_and_below_it_the_models(
    make_model: Make, tokenizer: Tokenizer
) -> None:
    model, small = make_model("mixtral"), make_model("dense", seed=1)
    alone = {}
    for name, each in (("model", model), ("student", small)):
        engine = Engine(each, tokenizer)
        engine.add_request([1, 2, 3], SAMPLING)
        tokens: list[int] = []
        while engine.has_work:
            tokens += [token.token_id for output in engine.step() for token in output.tokens]
        alone[name] = tokens
    assert alone["model"] != alone["student"]

    both = EngineWithStudent(Engine(model, tokenizer), Engine(small, tokenizer), max_texts=2)
    requests = [both.add_request([1, 2, 3], SAMPLING) for _ in range(4)]
    gone = both.add_request([1, 2, 3], SAMPLING)
    assert both.stats().num_waiting == 5
    assert both.abort(gone) and not both.abort(gone)
    got: dict[str, list[int]] = {}
    by_student: dict[str, bool] = {}
    while both.has_work:
        for output in both.step():
            got.setdefault(output.request_id, []).extend(token.token_id for token in output.tokens)
            by_student[output.request_id] = output.is_by_student
    assert [by_student[each] for each in [*requests, gone]] == [False, False, True, True, True]
    assert [got[each] for each in requests] == [alone["model"]] * 2 + [alone["student"]] * 2
    stats = both.stats()
    assert stats.num_generated_tokens == 24 and stats.num_finished == 5 and stats.num_running == 0

    both.add_request([1, 2, 3], SAMPLING)
    assert all(not output.is_by_student for output in both.step())


def test_what_the_student_cannot_hold_waits_for_the_model(make_model: Make, tokenizer: Tokenizer) -> None:
    small = Engine(make_model("dense", seed=1), tokenizer, EngineConfig(max_length=16))
    both = EngineWithStudent(Engine(make_model("mixtral"), tokenizer), small, max_texts=1)
    both.add_request([1], SAMPLING)
    long = both.add_request([1] * 12, SAMPLING)
    assert small.num_texts == 0
    short = both.add_request([1] * 10, SAMPLING)
    assert small.num_texts == 1
    ended = set()
    while both.has_work:
        ended |= {output.request_id for output in both.step() if output.finish_reason == "length"}
    assert {long, short} <= ended


def test_an_id_is_in_use_once_whoever_has_it(make_model: Make, tokenizer: Tokenizer) -> None:
    both = EngineWithStudent(
        Engine(make_model("mixtral"), tokenizer), Engine(make_model("dense", seed=1), tokenizer), max_texts=1
    )
    both.add_request([1], SAMPLING, request_id="model's")
    both.add_request([1], SAMPLING, request_id="student's")
    for name in ("model's", "student's"):
        with pytest.raises(ConfigError, match="in use"):
            both.add_request([2], SAMPLING, request_id=name)
    both.abort("model's")
    with pytest.raises(ConfigError, match="in use"):  # there is room at the model, and the id is the student's
        both.add_request([2], SAMPLING, request_id="student's")
    both.step()
    both.add_request([2], SAMPLING, request_id="model's")
