"""Our adapter against lm_eval's own Hugging Face back end on the exported model: requests of every type, and tasks."""

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from moesaic.checkpoint.store import save_checkpoint
from moesaic.config.load import write_config
from moesaic.config.train import TrainConfig
from moesaic.convert.exporter import export_run
from moesaic.data.shards import ShardSet
from moesaic.data.tokenizer import Tokenizer
from moesaic.errors import ConfigError, DataError
from moesaic.evaluate.batched import BatchedScorer
from moesaic.evaluate.scorer import PlainScorer
from moesaic.evaluate.tasks.registry import load_task
from moesaic.model.load import load_run
from moesaic.model.transformer import Transformer

pytest.importorskip("lm_eval", reason="lm_eval runs the tasks (extra `evaluate`)")

from lm_eval.api.instance import Instance

from moesaic.evaluate.harness import HarnessModel, run_task

MODEL: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 32,
    "num_layers": 2,
    "num_heads": 2,
    "intermediate_size": 48,
    "max_positions": 96,
    "init_std": 0.3,  # far from uniform, so that a wrong context shows
}
MODELS = {"dense": MODEL, "moe": {**MODEL, "moe": {"num_experts": 4, "top_k": 2, "every": 1}}}
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{{ bos_token if loop.first else '' }}[{{ m['role'] }}]\n{{ m['content'] }}<|endoftext|>\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]\n{% endif %}"
)


def with_begin_token(tokenizer: Tokenizer) -> Tokenizer:
    """The same tokenizer with a begin token, which its post-processor puts before each text, and a chat template."""
    values = json.loads(tokenizer.json_text)
    begin = values["model"]["vocab"]["ĉ"]  # a byte that no text here has, as no token may be added to the model's
    values["added_tokens"].append(
        {"id": begin, "content": "ĉ", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
         "special": True}
    )  # fmt: skip
    one = {"Sequence": {"id": "A", "type_id": 0}}
    values["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "ĉ", "type_id": 0}}, one],
        "pair": [one, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"ĉ": {"id": "ĉ", "ids": [begin], "tokens": ["ĉ"]}},
    }
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "ĉ", "eos_token": "<|endoftext|>",
        "chat_template": TEMPLATE,
    }  # fmt: skip
    return Tokenizer(json.dumps(values), companions={"tokenizer_config.json": json.dumps(config)})


@pytest.fixture(scope="module")
def make_pair(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Path]]:
    """A function (model, has_begin_token) that returns a run folder and the folder it was exported to."""
    made: dict[tuple[str, bool], tuple[Path, Path]] = {}

    def make(model: str, has_begin_token: bool) -> tuple[Path, Path]:
        if (model, has_begin_token) not in made:
            folder = tmp_path_factory.mktemp("pair")
            config = TrainConfig.from_dict(
                {
                    "model": MODELS[model],
                    "data": {"path": str(tiny_data), "sequence_length": 32},
                    "tokens": 1024,
                    "batch_size": 4,
                    "precision": "fp32",
                }
            )
            run = folder / "run"
            run.mkdir()
            write_config(config, run / "config.yaml")
            tokenizer = ShardSet.open(tiny_data).load_tokenizer()
            (with_begin_token(tokenizer) if has_begin_token else tokenizer).save(run)
            state = dict(Transformer(config.model).initialize(3).state_dict())
            save_checkpoint(run, 7, model=state, optimizer={"x": torch.zeros(1)}, metadata={})
            export_run(str(run), folder / "exported", dtype="fp32")
            made[model, has_begin_token] = (run, folder / "exported")
        return made[model, has_begin_token]

    return make


def make_peer(folder: Path, batch_size: int) -> Any:
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=batch_size)


def make_ours(run: Path, batch_tokens: int) -> HarnessModel:
    loaded = load_run(run, device="cpu")
    scorer = BatchedScorer(loaded.model, batch_tokens=batch_tokens) if batch_tokens else PlainScorer(loaded.model)
    return HarnessModel(scorer, loaded.tokenizer)


def requests_of(kind: Any, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [
        Instance(request_type=kind, doc={}, arguments=each, idx=0, metadata=("test", number, 1))
        for number, each in enumerate(arguments)
    ]


LONG = "The Licensor offers the Work under the terms of this Licence, and no other terms apply to it. " * 6
PAIRS = requests_of(
    "loglikelihood",
    *[("The License shall", choice) for choice in (" prevail", " prevail over the Work", " not", " n", "?")],
    ("Trailing spaces  ", "and then"),
    ("", "No context at all"),
    ("", "T"),
    ("A context that ends", "inside a word"),
    (LONG, " which is cut from the left"),
    (LONG, " in vain"),
    ("New\nlines\n", "\nhere"),
    ("A — dash", " and ünïcode"),
    ("<|endoftext|>", "begins"),
)
TEXTS = requests_of("loglikelihood_rolling", ("Short.",), (LONG,), ("A — dash",), ("x",), (LONG[:300],))
GENERATIONS = requests_of(
    "generate_until",
    ("The License", {"until": ["\n", "the"], "max_gen_toks": 12, "do_sample": False}),
    ("Any Work", {"until": "e", "max_gen_toks": 12}),
    (LONG, {"until": ["ss"], "max_new_tokens": 20, "temperature": 0.0}),
    ("Derivative", {"until": [], "max_gen_toks": 7}),
    ("You may", {"until": ["\n", "the"], "max_gen_toks": 12, "do_sample": False}),
)


@pytest.mark.parametrize("has_begin_token", [False, True], ids=["no begin", "begin"])
@pytest.mark.parametrize("model", ["dense", "moe"])
def test_every_request_has_the_answer_of_the_hugging_face_back_end(
    make_pair: Any, model: str, has_begin_token: bool
) -> None:
    run, exported = make_pair(model, has_begin_token)
    for batch_size, batch_tokens in ((1, 0), (4, 1), (4, 2048)):
        peer, ours = make_peer(exported, batch_size), make_ours(run, batch_tokens)
        assert ours.max_length == peer.max_length and ours.eot_token_id == peer.eot_token_id
        assert ours.prefix_token_id == peer.prefix_token_id
        expected = peer.loglikelihood(PAIRS, disable_tqdm=True)
        for (value, greedy), (other, other_greedy) in zip(ours.loglikelihood(PAIRS), expected, strict=True):
            assert value == pytest.approx(other, abs=1e-3) and greedy == other_greedy
        totals = peer.loglikelihood_rolling(TEXTS, disable_tqdm=True)
        assert ours.loglikelihood_rolling(TEXTS) == pytest.approx(totals, rel=1e-5, abs=1e-3)
        assert ours.generate_until(GENERATIONS) == peer.generate_until(GENERATIONS, disable_tqdm=True)


def test_a_begin_token_stands_where_the_tokenizer_puts_it_and_once(make_pair: Any) -> None:
    run, _ = make_pair("dense", True)
    ours = make_ours(run, 0)
    plain = ours.tok_encode("Work", add_special_tokens=False)
    assert ours.tok_encode("Work") == [ours.prefix_token_id, *plain] == ours.tok_encode("ĉWork")


@pytest.fixture
def records(tmp_path: Path) -> Path:
    folder = tmp_path / "records"
    folder.mkdir()
    words = [
        "work",
        "license",
        "right",
        "grant",
        "notice",
        "file",
        "term",
        "source",
        "form",
        "object",
        "party",
        "claim",
    ]
    piqa = [
        {"goal": f"How to {word} a thing?", "sol1": f"Take the {word}.", "sol2": f"Leave it, {other}.", "label": n % 2}
        for n, (word, other) in enumerate(pairwise(words))
    ]
    trivia = [
        {"question": f"Who has the {word}?", "aliases": [word, f"the {word}"], "question_id": word, "answer": word}
        for word in words
    ]
    sentences = [
        {"sentence": f"The {word} beats the {other} as the _ is {word}.", "option1": word, "option2": other,
         "answer": "1"}
        for word, other in pairwise(words)
    ]  # fmt: skip
    for name, rows in (("piqa_valid", piqa), ("triviaqa_validation", trivia), ("winogrande_validation", sentences)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    webqs = [{"question": f"what is {word}?", "answers": [word, f"a {word}", other]} for word, other in pairwise(words)]
    (folder / "webqs_test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in webqs), encoding="utf-8")
    race = folder / "RACE" / "test" / "high"
    race.mkdir(parents=True)
    for number in range(8):
        article = {
            "article": f"The {words[number]} is here.",
            "questions": ["What is here?", "It is  _  ."],
            "options": [words[number : number + 4], ["new", "old", "lost", "near"]],
            "answers": ["A", "ABCD"[number % 4]],
        }
        (race / f"{number}.txt").write_text(json.dumps(article), encoding="utf-8")
    return folder


@pytest.mark.parametrize("name", ["piqa", "triviaqa", "winogrande", "webqs", "race_h"])
@pytest.mark.parametrize("shots", [0, 2])
def test_a_task_comes_out_the_same_example_by_example(make_pair: Any, records: Path, name: str, shots: int) -> None:
    run, exported = make_pair("dense", False)
    found = []
    for model in (make_ours(run, 2048), make_peer(exported, 4)):
        task = load_task(name, data=records, shots=shots, seed=1)
        found.append(run_task(model, task, limit=6))
    ours, peers = found
    assert ours.num_records == len(ours.samples) == 6
    assert ours.metrics.keys() == peers.metrics.keys()
    for metric, value in ours.metrics.items():
        assert value == peers.metrics[metric]
    assert ours.metrics and all(metric.standard_error is not None for metric in ours.metrics.values())
    for own, other in zip(ours.samples, peers.samples, strict=True):
        assert own["doc"] == other["doc"] and own["arguments"] == other["arguments"]
        question = own["arguments"][0][0]
        marks = {"winogrande": ("Question:", 0), "race_h": ("Article:", shots + 1)}
        mark, count = marks.get(name, ("Question:", shots + 1))
        assert question.count(mark) == count
        if name == "triviaqa":
            assert own["resps"] == other["resps"]
        else:
            for (value, greedy), (expected, expected_greedy) in zip(
                (each[0] for each in own["resps"]), (each[0] for each in other["resps"]), strict=True
            ):
                assert value == pytest.approx(expected, abs=1e-3) and greedy == expected_greedy


def test_shots_are_the_same_every_time_and_never_the_question_itself(make_pair: Any, records: Path) -> None:
    run, _ = make_pair("dense", False)
    ours = make_ours(run, 2048)
    first, again, other = (
        [sample["arguments"] for sample in run_task(ours, load_task("piqa", data=records, shots=3, seed=seed)).samples]
        for seed in (1, 1, 2)
    )
    assert first == again != other
    for arguments in first:
        goals = [line for line in arguments[0][0].splitlines() if line.startswith("Question:")]
        assert len(goals) == len(set(goals)) == 4


def test_a_chat_is_the_tokenizers_template_as_transformers_renders_it(make_pair: Any, records: Path) -> None:
    from transformers import AutoTokenizer

    run, exported = make_pair("dense", True)
    ours = make_ours(run, 2048)
    peer = AutoTokenizer.from_pretrained(exported)
    chat = [
        {"role": "user", "content": "Who?"},
        {"role": "assistant", "content": " Me"},
        {"role": "user", "content": "What is it \n"},
    ]
    for messages, prompt in ((chat, True), (chat[:2], False), (chat[:1], True)):
        expected = peer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=prompt, continue_final_message=not prompt
        )
        assert ours.apply_chat_template(messages, add_generation_prompt=prompt) == expected
    scores = run_task(ours, load_task("piqa", data=records, shots=1, seed=1), limit=2, use_chat=True)
    context = scores.samples[0]["arguments"][0][0]
    assert context.startswith("ĉ[user]\nQuestion:") and context.endswith("<|endoftext|>\n[assistant]\n")
    assert context.count("[assistant]") == 2
    ids = ours.tok_encode(context)
    assert ids.count(ours.prefix_token_id) == 1 and ids.count(ours.eot_token_id) == 3
    with pytest.raises(DataError, match=r"refuses 1 messages with the roles system \(no system\); .*;"):
        ours.apply_chat_template([{"role": "system", "content": "Be brief."}])
    run_without, _ = make_pair("dense", False)
    with pytest.raises(DataError, match=r"no chat template; .*; put"):
        run_task(make_ours(run_without, 0), load_task("piqa", data=records, shots=0, seed=1), use_chat=True)


def test_drawn_text_is_the_same_for_a_seed(make_pair: Any) -> None:
    run, _ = make_pair("dense", False)

    def draw(seed: int) -> list[str]:
        settings = {"until": [], "max_gen_toks": 12, "do_sample": True, "temperature": 1.5, "top_k": 50, "seed": seed}
        return make_ours(run, 2048).generate_until(requests_of("generate_until", ("The", settings), ("Any", settings)))

    assert draw(1) == draw(1) != draw(2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"until": [], "num_beams": 4, "penalty": 1}, r"with num_beams, penalty; .*; take them out"),
        ({"until": []}, r"up to 256 tokens; the model has 96 positions.*; set max_gen_toks"),
    ],
)
def test_generation_that_cannot_be_done_is_refused(make_pair: Any, settings: Any, message: str) -> None:
    run, _ = make_pair("dense", False)
    with pytest.raises(ConfigError, match=message):
        make_ours(run, 0).generate_until(requests_of("generate_until", ("The", settings)))


def test_answers_reach_the_cache_hook(make_pair: Any) -> None:
    run, _ = make_pair("dense", False)
    ours = make_ours(run, 2048)
    kept: list[Any] = []

    class Hook:
        def add_partial(self, kind: str, arguments: Any, answer: Any) -> None:
            kept.append((kind, arguments, answer))

    ours.set_cache_hook(Hook())  # type: ignore[arg-type]
    answers = [
        ours.loglikelihood(PAIRS[:2]),
        ours.loglikelihood_rolling(TEXTS[:1]),
        ours.generate_until(GENERATIONS[:1]),
    ]
    assert [answer for _, _, answer in kept] == [each for answer in answers for each in answer]
    assert [arguments for _, arguments, _ in kept] == [each.args for each in (*PAIRS[:2], TEXTS[0], GENERATIONS[0])]
