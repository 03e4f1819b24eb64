import secrets
from collections.abc import Callable
from typing import Literal

import pytest
import torch

from moesaic.config.serve import EngineConfig, Sampling, SpeculationConfig
from moesaic.data.tokenizer import Tokenizer
from moesaic.errors import ConfigError
from moesaic.kernels import limits
from moesaic.kernels.decode import Decoded
from moesaic.model import packed_file
from moesaic.model.transformer import Transformer
from moesaic.serve.engine import Engine
from moesaic.serve.overload import EngineWithStudent, split_memory
from moesaic.serve.runner import Runner, block_bytes

Make = Callable[..., Transformer]
SAMPLING = Sampling(temperature=0.0, max_tokens=6, ignore_end_of_text=True)


def add(
    both: EngineWithStudent, prompt: list[int], *, sampling: Sampling = SAMPLING, request_id: str | None = None
) -> str:
    request_id = request_id or secrets.token_hex(8)
    both.add_requests([prompt], sampling, request_ids=[request_id])
    return request_id


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
    requests = [add(both, [1, 2, 3]) for _ in range(4)]
    gone = add(both, [1, 2, 3])
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
    assert stats.expert_hit_rate is None  # the process has read for both
    assert stats.num_generated_tokens == 24 and stats.num_finished == 5 and stats.num_running == 0

    add(both, [1, 2, 3])
    assert all(not output.is_by_student for output in both.step())


def test_requests_that_come_together_stay_together(make_model: Make, tokenizer: Tokenizer) -> None:
    model = Engine(make_model("mixtral"), tokenizer)
    student = Engine(make_model("dense", seed=1), tokenizer, EngineConfig(max_length=16))
    both = EngineWithStudent(model, student, max_texts=1)
    both.add_requests([[1], [2], [3]], SAMPLING.replace(n=2), request_ids=["a", "b", "c"])
    assert (model.num_texts, student.num_texts) == (6, 0)
    both.add_requests([[1], [2]], SAMPLING, request_ids=["d", "e"])
    assert (model.num_texts, student.num_texts) == (6, 2)
    both.add_requests([[1], [2] * 12], SAMPLING, request_ids=["f", "g"])  # one of them is too long for the student
    assert (model.num_texts, student.num_texts) == (8, 2)


def test_a_step_of_the_student_that_fails_ends_its_requests_and_none_of_the_models(
    make_model: Make, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    student = Engine(make_model("latent", seed=1), tokenizer)
    both = EngineWithStudent(Engine(make_model("mixtral"), tokenizer), student, max_texts=1)
    own = add(both, [1, 2, 3])
    ended = add(both, [1], sampling=SAMPLING.replace(max_tokens=1))
    both.step()
    others = [add(both, [1, 2, 3], sampling=SAMPLING.replace(n=2)) for _ in range(2)]
    gone = add(both, [4])
    both.step()  # one of a request's texts waits no longer for the other's prompt
    both.abort(gone)

    def fail(self: Runner, *_: object) -> Decoded:
        if self.model is student._runner.model:
            raise MemoryError("of the student")
        return run(self, *_)  # type: ignore[arg-type]

    run = Runner.run
    with monkeypatch.context() as patch, caplog.at_level("ERROR"):
        patch.setattr(Runner, "run", fail)
        outputs = both.step()
    assert "a step of the student failed; the 4 texts" in caplog.text and "MemoryError: of the student" in caplog.text
    assert [(output.request_id, len(output.tokens), output.finish_reason) for output in outputs] == [
        (own, 1, None), (gone, 0, "abort"), *((each, 0, "error") for each in others for _ in range(2)),
    ]  # fmt: skip
    assert all("step of the student that helps out failed (MemoryError)" in str(each.message) for each in outputs[2:])
    assert all(each.is_by_student for each in outputs[1:]) and student.stats().kv_blocks_used == 0
    # The student is asked again.
    name = add(both, [1, 2, 3])
    tokens: dict[str, int] = {}
    while both.has_work:
        for output in both.step():
            tokens[output.request_id] = tokens.get(output.request_id, 0) + len(output.tokens)
    assert tokens == {own: 3, name: 6} and ended not in tokens


def test_what_the_student_cannot_hold_waits_for_the_model(make_model: Make, tokenizer: Tokenizer) -> None:
    small = Engine(make_model("dense", seed=1), tokenizer, EngineConfig(max_length=16))
    both = EngineWithStudent(Engine(make_model("mixtral"), tokenizer), small, max_texts=1)
    add(both, [1])
    long = add(both, [1] * 12)
    assert small.num_texts == 0
    short = add(both, [1] * 10)
    assert small.num_texts == 1
    ended = set()
    while both.has_work:
        ended |= {output.request_id for output in both.step() if output.finish_reason == "length"}
    assert {long, short} <= ended


def test_what_both_did_is_summed_and_the_layers_and_the_last_step_are_the_models(
    make_model: Make, tokenizer: Tokenizer
) -> None:
    model, student = Engine(make_model("mixtral"), tokenizer), Engine(make_model("latent", seed=1), tokenizer)
    both = EngineWithStudent(model, student, max_texts=1)
    add(both, [1, 2, 3])
    add(both, [1] * 40, sampling=SAMPLING.replace(max_tokens=50))
    both.step()
    own, other, stats = model.stats(), student.stats(), both.stats()
    assert own.kv_blocks_used and other.kv_blocks_used
    for name in ("kv_blocks_used", "kv_blocks_total", "num_steps", "num_prompt_tokens"):
        assert getattr(stats, name) == getattr(own, name) + getattr(other, name)
    while both.has_work:
        both.step()
    own, other, stats = model.stats(), student.stats(), both.stats()
    assert other.expert_bytes_used > 0 < other.kv_blocks_cached
    for name in (
        "kv_blocks_cached",
        "num_steps",
        "num_generated_tokens",
        "num_finished",
        "expert_bytes_used",
        "distinct_experts",
    ):
        assert getattr(stats, name) == getattr(own, name) + getattr(other, name)
    for name in ("step_tokens", "step_seconds", "distinct_experts_per_step", "layers"):
        assert getattr(stats, name) == getattr(own, name)
    assert (own.num_by_student, stats.num_by_student, stats.num_finished) == (None, 1, 2)
    assert stats.num_own_steps == own.num_steps == 6 and stats.num_steps == 56


@pytest.mark.parametrize("budget", [1_000_000, 123_457, "auto"])
@pytest.mark.parametrize("precision", ["auto", "int8"])
@pytest.mark.parametrize("drafts", [False, True])
def test_the_keys_of_both_fit_into_the_memory_of_one(
    budget: int | Literal["auto"],
    precision: Literal["auto", "int8"],
    drafts: bool,
    make_model: Make,
    tokenizer: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(limits, "read_text", lambda path: "MemAvailable: 2000 kB")
    model, small = make_model("mixtral"), make_model("dense" if precision == "int8" else "latent", seed=1)
    draft_model = make_model("dense") if drafts else None
    speculation = SpeculationConfig(method="model", model="by hand") if drafts else None
    config = EngineConfig(kv_cache_bytes=budget, kv_precision=precision, speculation=speculation, max_sequences=999)
    own, others = split_memory(config, model, small, draft_model=draft_model)
    engines = Engine(model, tokenizer, own, draft_model=draft_model), Engine(small, tokenizer, others)
    dtype = torch.int8 if precision == "int8" else torch.float32
    each = [block_bytes(one, block_size=32, dtype=dtype) for one in (model, small)]
    each += [block_bytes(draft_model, block_size=32, dtype=torch.float32)] if draft_model is not None else []
    total, counts = 2000 * 1024 // 4 if budget == "auto" else budget, {e.stats().kv_blocks_total for e in engines}
    (count,) = counts
    assert count * sum(each) <= total < (count + 1) * sum(each)
    assert others.speculation is None


@pytest.mark.parametrize("is_short", [False, True])
@pytest.mark.parametrize("beside", ["nothing", "draft", "student"])
def test_experts_are_read_ahead_where_models_keys_and_values_do_not_fit_together(
    make_model: Make, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, beside: str, is_short: bool
) -> None:
    models = [make_model("mixtral", "packed-int8"), make_model("pr-moe", "packed-int8", seed=1)]
    if not models[0].runs_in_one_call:
        pytest.skip("nothing is read ahead without our kernels")
    for model in models:
        monkeypatch.setattr(model, "mapped_bytes", 1 << 20)
        monkeypatch.setattr(model, "reads_ahead", False)
    config, draft_model = EngineConfig(kv_cache_bytes=1 << 20), None
    if beside == "draft":
        config = config.replace(speculation=SpeculationConfig(method="model", model="by hand"))
        draft_model = models[1]
    engine = Engine(models[0], tokenizer, config, draft_model=draft_model)
    expected, total = engine_tokens(engine), engine.kv_bytes + (1 << 20)
    student = Engine(models[1], tokenizer) if beside == "student" else None
    total += 0 if student is None else student.kv_bytes
    total += 0 if beside == "nothing" else 1 << 20
    monkeypatch.setattr(packed_file, "available_memory_bytes", lambda: total - is_short)
    if student is None:
        engine = Engine(models[0], tokenizer, config, draft_model=draft_model)
    else:  # decided when both have their plans already
        EngineWithStudent(engine, student, max_texts=1)
    assert [model.reads_ahead for model in models] == [is_short, is_short and beside != "nothing"]
    assert engine_tokens(engine) == expected
    assert (engine.stats().expert_guess_share is not None) is is_short
    plan = models[0].find_plan()
    assert plan is not None and (plan._guesses.num_passes > 0) is is_short  # that which the engine goes by


def engine_tokens(engine: Engine) -> list[int]:
    engine.add_request([1, 2, 3], SAMPLING.replace(max_tokens=20))
    tokens: list[int] = []
    while engine.has_work:
        tokens += [token.token_id for output in engine.step() for token in output.tokens]
    return tokens


def test_without_room_for_a_block_of_each_it_is_refused(make_model: Make) -> None:
    models = make_model("mixtral"), make_model("dense", seed=1)
    need = sum(block_bytes(each, block_size=32, dtype=torch.float32) for each in models)
    split_memory(EngineConfig(kv_cache_bytes=need), *models)
    with pytest.raises(ConfigError, match=rf"kv_cache_bytes \({need - 1}\) .* student"):
        split_memory(EngineConfig(kv_cache_bytes=need - 1), *models)


def test_an_id_is_in_use_once_whoever_has_it(make_model: Make, tokenizer: Tokenizer) -> None:
    both = EngineWithStudent(
        Engine(make_model("mixtral"), tokenizer), Engine(make_model("dense", seed=1), tokenizer), max_texts=1
    )
    add(both, [1], request_id="model's")
    add(both, [1], request_id="student's")
    for name in ("model's", "student's"):
        with pytest.raises(ConfigError, match="in use"):
            add(both, [2], request_id=name)
    both.abort("model's")
    with pytest.raises(ConfigError, match="in use"):  # there is room at the model, and the id is the student's
        add(both, [2], request_id="student's")
    both.step()
    add(both, [2], request_id="model's")
