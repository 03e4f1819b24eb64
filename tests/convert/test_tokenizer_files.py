"""Tokenizer files travel both ways byte for byte, other tools read them as before, and generation ends as they say."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from moesaic.convert import parity
from moesaic.convert.exporter import export_run
from moesaic.convert.importer import import_model
from moesaic.convert.parity import PROMPTS, verify_models  # all prompts: those of short_check are set later
from moesaic.convert.weights import _compare
from moesaic.data.tokenizer import COMPANION_NAMES, TOKENIZER_NAME, Tokenizer
from moesaic.errors import ConversionError, DataError
from moesaic.model.generate import generate
from moesaic.model.load import load_run

pytestmark = pytest.mark.usefixtures("short_check")

TEMPLATE = "{%- for m in messages -%}\r\n<{{ m['role'] }}> {{ m['content'] }}\n{%- endfor -%}é{{ eos_token }}"
MESSAGES = [{"role": "user", "content": "the quick\n fox"}, {"role": "assistant", "content": " jumps"}]
TEXTS = ["the quick brown fox", "  é 日本語 \r\n\t12", "<|endoftext|> the <|user|> x", ""]


@pytest.fixture
def folder(saved: Callable[..., Path], tmp_path: Path) -> Path:
    """A model whose tokenizer files are written as nobody here would write them."""
    folder = shutil.copytree(saved("qwen2"), tmp_path / "model")
    values = json.loads((folder / TOKENIZER_NAME).read_text())
    token = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    number = len(values["model"]["vocab"])
    values["added_tokens"] += [{"id": number, "content": "<|user|>", **token}]
    values["truncation"] = {"direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0}
    (folder / TOKENIZER_NAME).write_bytes(json.dumps(values, indent=1).replace("\n", "\r\n").encode())
    config = {
        "eos_token": {"__type": "AddedToken", "content": "<|endoftext|>", **token}, "chat_template": TEMPLATE,
        "tokenizer_class": "PreTrainedTokenizerFast", "extra_special_tokens": ["<|user|>"], "model_max_length": 96,
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_bytes(json.dumps(config, indent=7).encode() + b"\n \n")
    (folder / "special_tokens_map.json").write_bytes(b'{\r\n"eos_token" :"<|endoftext|>" }')
    (folder / "added_tokens.json").write_bytes(b'{"<|user|>": %d}' % number)
    (folder / "chat_template.jinja").write_bytes(TEMPLATE.encode())
    (folder / "generation_config.json").write_bytes(b'{ "eos_token_id": [0, %d], "max_new_tokens": 7}' % number)
    return folder


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        name: (folder / name).read_bytes() for name in (TOKENIZER_NAME, *COMPANION_NAMES) if (folder / name).exists()
    }


@pytest.mark.parametrize("template", ["in its own file", "in the config", "none"])
def test_files_travel_both_ways_byte_for_byte(template: str, folder: Path, tmp_path: Path) -> None:
    import transformers

    if template != "in its own file":
        (folder / "chat_template.jinja").unlink()
    if template == "none":
        config = json.loads((folder / "tokenizer_config.json").read_text())
        del config["chat_template"]
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    given = files_of(folder)
    import_model(folder, tmp_path / "run")
    assert files_of(tmp_path / "run") == given
    export_run(tmp_path / "run", tmp_path / "out", dtype="bf16")
    assert files_of(tmp_path / "out") == given
    assert Tokenizer.load(tmp_path / "run").chat_template == (None if template == "none" else TEMPLATE)

    first, other = (transformers.AutoTokenizer.from_pretrained(each) for each in (folder, tmp_path / "out"))
    assert [first(text).input_ids for text in TEXTS] == [other(text).input_ids for text in TEXTS]
    assert first.all_special_ids == other.all_special_ids
    if template != "none":
        told = [each.apply_chat_template(MESSAGES, tokenize=False) for each in (first, other)]
        assert told[0] == told[1] and "<user> the quick\n fox" in told[0]
    ours = Tokenizer.load(tmp_path / "out")
    assert [ours.decode(ours.encode(text)) for text in TEXTS] == TEXTS  # and nothing is cut off after five tokens


def test_a_tokenizer_named_beside_takes_the_place_of_none(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer").mkdir()
    given = files_of(folder)
    for name in given:
        (folder / name).rename(tmp_path / "tokenizer" / name)
    import_model(folder, tmp_path / "run", tokenizer=tmp_path / "tokenizer")
    assert files_of(tmp_path / "run") == given


def greedy(run: Path, count: int = 12) -> list[int]:
    loaded = load_run(run, device="cpu", pack=False)
    prompt = loaded.tokenizer.encode("the quick brown")
    return generate(loaded.model, prompt, max_new_tokens=count, stop_ids=loaded.tokenizer.stop_ids)


@pytest.mark.parametrize(
    ("where", "is_list"),
    [
        ("generation_config.json", True),
        ("config.json", True),
        ("config.json", False),
        ("tokenizer_config.json", True),  # an object with its `content`
        ("tokenizer_config.json", False),
    ],
)
def test_generation_ends_where_the_models_files_say(
    where: str, is_list: bool, saved: Callable[..., Path], tmp_path: Path
) -> None:
    source = saved("llama")
    import_model(source, tmp_path / "endless")
    text = greedy(tmp_path / "endless")
    vocab_size = Tokenizer.load(source).vocab_size
    last = next(index for index in range(2, 12) if text[index] < vocab_size and text[index] not in text[:index])
    folder = shutil.copytree(source, tmp_path / "model")
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    (folder / "generation_config.json").unlink()
    value: Any = [1, text[last]] if is_list else text[last]
    config["eos_token_id"] = None
    if where == "config.json":
        config["eos_token_id"] = value
    elif where == "generation_config.json":
        (folder / where).write_text(json.dumps({"eos_token_id": value}))
    else:
        told = json.loads((folder / where).read_text())
        name = Tokenizer.load(source).token(text[last])
        (folder / where).write_text(json.dumps(told | {"eos_token": {"content": name} if is_list else name}))
    (folder / "config.json").write_text(json.dumps(config))
    import_model(folder, tmp_path / "run")
    assert greedy(tmp_path / "run") == text[:last]
    export_run(tmp_path / "run", tmp_path / "out")
    assert text[last] in json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"]
    import_model(tmp_path / "out", tmp_path / "again")
    assert greedy(tmp_path / "again") == text[:last]
    export_run(tmp_path / "run", tmp_path / "gguf", format="gguf")
    import_model(tmp_path / "gguf" / "model.gguf", tmp_path / "back")
    assert greedy(tmp_path / "back") == text[:last]


def test_defaults_of_generation_do_not_change_what_is_compared(folder: Path, tmp_path: Path) -> None:
    defaults = {"repetition_penalty": 5.0, "num_beams": 3, "do_sample": True, "temperature": 0.1, "max_length": 5}
    (folder / "generation_config.json").write_text(json.dumps(defaults))
    found = import_model(folder, tmp_path / "run").comparison
    assert found is not None and found.greedy_equal == found.num_prompts


def test_a_file_that_transformers_refuses_is_said_to_be_the_reason(folder: Path, tmp_path: Path) -> None:
    """Its own checks of what does not matter here raise exceptions of other libraries."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"attention_dropout": "24"}))
    certificate = import_model(folder, tmp_path / "run")
    assert certificate.comparison is None and certificate.failure is None
    assert "StrictDataclass" in str(certificate.not_compared)


def exchange_letters(values: dict[str, Any]) -> None:
    vocabulary = values["model"]["vocab"]
    vocabulary["{"], vocabulary["}"] = vocabulary["}"], vocabulary["{"]


def exchange_bytes_that_are_no_text_alone(values: dict[str, Any]) -> None:
    vocabulary = values["model"]["vocab"]
    vocabulary["Ð"], vocabulary["Ñ"] = vocabulary["Ñ"], vocabulary["Ð"]  # of Cyrillic letters in UTF-8


def lose_an_added_token(values: dict[str, Any]) -> None:
    del values["added_tokens"][-1]


@pytest.mark.parametrize(
    "change", [exchange_letters, exchange_bytes_that_are_no_text_alone, lose_an_added_token, "generation_config.json"]
)
def test_verify_compares_tokenizers(
    change: Callable[[dict[str, Any]], None] | str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parity, "PROMPTS", PROMPTS)
    run = tmp_path / "run"
    import_model(folder, run)
    assert verify_models(folder, run).failure is None
    if callable(change):
        values = json.loads((run / TOKENIZER_NAME).read_text())
        change(values)
        (run / TOKENIZER_NAME).write_text(json.dumps(values))
        difference = "the tokenizers make"
    else:
        (run / change).write_text(json.dumps({"eos_token_id": [0, 5]}))
        difference = "the tokenizers end a text at"
    for first, second in ((folder, run), (run, folder)):
        found = verify_models(first, second)
        assert found.failure is not None and difference in found.failure
        assert found.comparison is not None and found.comparison.max_relative < 1e-5


def test_verify_says_where_there_are_no_two_tokenizers_to_compare(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    import_model(folder, tmp_path / "run")
    (folder / TOKENIZER_NAME).rename(folder / "elsewhere.json")
    assert verify_models(folder, tmp_path / "run").failure is None
    assert "Tokenizers are not compared: " in caplog.text and "holds no tokenizer.json" in caplog.text
    (folder / TOKENIZER_NAME).write_text("{}")  # there, and broken
    with pytest.raises(DataError, match="has no `model`"):
        verify_models(folder, tmp_path / "run")


def test_ids_that_only_the_config_names_are_kept(saved: Callable[..., Path], short_check: None, tmp_path: Path) -> None:
    folder = shutil.copytree(saved("llama"), tmp_path / "model")
    (folder / "generation_config.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    ids = {"eos_token_id": [0, 1], "bos_token_id": 1, "pad_token_id": 2}
    (folder / "config.json").write_text(json.dumps({**config, **ids}))
    import_model(folder, tmp_path / "run")
    export_run(tmp_path / "run", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == ids


def test_numbers_that_are_not_finite_are_refused(saved: Callable[..., Path], tmp_path: Path) -> None:
    folder = shutil.copytree(saved("llama"), tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][-1, 0] = math.nan  # of a token that no text has
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConversionError, match=r"model.embed_tokens.weight holds numbers that are not finite"):
        import_model(folder, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_number_that_became_infinite_was_not_rounded() -> None:
    for value, kind in ((1 / 3, (0, "float16")), (1e6, "different"), (math.inf, "equal")):
        wide = torch.tensor([1.0, value])
        assert _compare(wide, wide.half()).kind == kind
