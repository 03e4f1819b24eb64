import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models

from moesaic.data.tokenizer import Tokenizer
from moesaic.model.generate import generate
from moesaic.model.load import load_run


def test_the_text_and_its_json_are_the_python_calls(cli: Any, trained_run: Path) -> None:
    loaded = load_run(trained_run, device="cpu")
    for options, keywords in (
        (["--temperature", "0"], {"temperature": 0.0}),
        (
            ["--temperature", "1.5", "--seed", "7", "--top-k", "20", "--top-p", "0.8"],
            {"temperature": 1.5, "seed": 7, "top_k": 20, "top_p": 0.8},
        ),
    ):
        ids = generate(
            loaded.model,
            loaded.tokenizer.encode("The License"),
            max_new_tokens=20,
            stop_ids=[loaded.tokenizer.end_of_text_id],
            **keywords,  # type: ignore[arg-type]
        )
        command = ["generate", trained_run, "--prompt", "The License", "--max-new-tokens", "20", *options]
        values = json.loads(cli(*command, "--json").out)
        assert values == {"prompt": "The License", "text": loaded.tokenizer.decode(ids), "token_ids": ids}
        assert cli(*command).out == f"The License{values['text']}\n"


@pytest.mark.parametrize("given", ["The License — Work\n", "The License — Work\r\n", "The License — Work"])
def test_without_a_prompt_standard_input_is_one(
    cli: Any, trained_run: Path, monkeypatch: pytest.MonkeyPatch, given: str
) -> None:
    command = ["generate", trained_run, "--max-new-tokens", 4, "--temperature", 0, "--json"]
    # Of a latin-1 locale: what is piped is UTF-8 all the same.
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(given.encode()), encoding="latin-1"))
    piped = json.loads(cli(*command).out)
    assert piped["prompt"] == "The License — Work"
    assert piped == json.loads(cli(*command, "--prompt", "The License — Work").out)


@pytest.mark.parametrize("state", ["a terminal", "empty", "closed"])
def test_no_prompt_at_all_is_refused_before_the_run_is_read(
    cli: Any, monkeypatch: pytest.MonkeyPatch, state: str
) -> None:
    stdin = io.TextIOWrapper(io.BytesIO())
    monkeypatch.setattr(stdin, "isatty", lambda: state == "a terminal")
    monkeypatch.setattr("sys.stdin", None if state == "closed" else stdin)
    found = cli("generate", "nowhere")
    assert found.status == 2
    assert f"ConfigError: no --prompt was given, and standard input is {state}; a text to continue" in found.err


@pytest.mark.parametrize("cut", [0, 1])
def test_a_character_of_several_tokens_is_printed_once_it_is_whole(
    cli: Any, trained_run: Path, monkeypatch: pytest.MonkeyPatch, cut: int
) -> None:
    """And what is left of one at the end is not swallowed."""
    tokenizer = load_run(trained_run, device="cpu").tokenizer
    ids = tokenizer.encode("a — é 🙂")
    assert len(ids) > 10  # bytes, since the licence has none of these
    monkeypatch.setattr("moesaic.model.generate.stream", lambda *_, **__: iter(ids[: len(ids) - cut]))
    result = cli("generate", trained_run, "--prompt", "x")
    expected = tokenizer.decode(ids[: len(ids) - cut])
    assert result.out == f"x{expected}\n"
    assert expected.endswith("\ufffd") == bool(cut)


def like_llama() -> Tokenizer:
    """Spaces are `▁`, a text's first one is stripped, and what has no token is bytes."""
    names = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁the", "▁state", "▁of", "s"]
    chain = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    vocabulary = {name: place for place, name in enumerate(names)}
    inner = tokenizers.Tokenizer(models.BPE(vocabulary, [], byte_fallback=True, unk_token="<unk>"))
    inner.decoder = decoders.Sequence(chain)
    inner.add_special_tokens([AddedToken("</s>", special=True)])
    return Tokenizer(inner.to_str())


@pytest.mark.parametrize(
    ("new", "text"),
    [
        (["▁state", "▁of"], " state of"),
        (["s", "<0x41>", "<0xFF>", "▁the"], "s\ufffd\ufffd the"),  # bytes are a text together or not at all
        (["▁of", "<0x41>", "<0xE6>"], " of\ufffd\ufffd"),
        (["<0xE6>", "<0x97>", "<0xA5>", "s"], "日s"),
        (["▁the", "<0xE6>", "</s>", "▁state"], " the\ufffd</s> state"),
    ],
)
def test_a_text_goes_on_from_its_prompt_whatever_the_tokenizer(
    cli: Any, trained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, new: list[str], text: str
) -> None:
    """A decoder that sees the new tokens alone takes their first space for a text's; what is printed is not taken back.

    Special tokens are shown: whoever looks at what a model says wants to see them.
    """
    tokenizer = like_llama()
    run = shutil.copytree(trained_run, tmp_path / "run")
    (run / "tokenizer_config.json").unlink()
    tokenizer.save(run)
    ids = {tokenizer.token(token): token for token in range(tokenizer.vocab_size)}
    monkeypatch.setattr("moesaic.model.generate.stream", lambda *_, **__: iter([ids[name] for name in new]))
    assert cli("generate", run, "--prompt", "s").out == f"s{text}\n"
    assert json.loads(cli("generate", run, "--prompt", "s", "--json").out)["text"] == text


@pytest.mark.parametrize("prompt", ["The License", "", "Work<|endoftext|>License"])
def test_a_prompt_is_encoded_as_the_server_does(
    cli: Any, trained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, beginning_tokenizer: Tokenizer,
    prompt: str,
) -> None:  # fmt: skip
    """Behind the begin token, where the tokenizer puts one; special tokens written out in it are themselves."""
    run = shutil.copytree(trained_run, tmp_path / "run")
    (run / "tokenizer_config.json").unlink()
    beginning_tokenizer.save(run)
    given: list[list[int]] = []
    monkeypatch.setattr("moesaic.model.generate.stream", lambda _, ids, **__: iter(given.append(ids) or ()))
    assert cli("generate", run, "--prompt", prompt).status == 0
    assert given == [beginning_tokenizer.encode_prompt(prompt, add_special_tokens=True)]
    assert given[0][0] == beginning_tokenizer.first_id


def test_a_prompt_that_is_not_utf8_is_mended(cli: Any, trained_run: Path) -> None:
    """As Python hands over the byte 0xff of a command line."""
    result = cli("generate", trained_run, "--prompt", "The \udcff", "--max-new-tokens", "1", "--json")
    assert result.status == 0 and json.loads(result.out)["prompt"] == "The \ufffd"


def test_an_empty_prompt_starts_a_document(cli: Any, trained_run: Path) -> None:
    result = cli("generate", trained_run, "--prompt", "", "--max-new-tokens", "3", "--json")
    assert result.status == 0 and len(json.loads(result.out)["token_ids"]) <= 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{run}", "--prompt", "a", "--max-new-tokens", "64"], "GenerationError: the prompt's"),
        (
            ["{run}", "--prompt", "a", "--max-new-tokens", "5", "--temperature", "-1"],
            "GenerationError: temperature=-1.0",
        ),
        (["{run}", "--prompt", "a", "--max-new-tokens", "5", "--seed", str(2**64)], "GenerationError: the seed is 18"),
        (
            ["{run}", "--prompt", "a", "--max-new-tokens", "5", "--seed", str(-(2**63) - 1)],
            "GenerationError: the seed is",
        ),
        (["{run}@77", "--prompt", "a"], "CheckpointError: "),
        (["{run}@", "--prompt", "a"], "@: '' is not a step; RUN@step takes a number"),
        (["{run}-none", "--prompt", "a"], "CheckpointError: "),
        (["{run}", "--prompt", "a", "--device", "tpu"], "DeviceError: "),
    ],
)
def test_a_mistake_ends_with_status_2_and_a_message_in_three_parts(
    cli: Any, trained_run: Path, arguments: list[str], message: str
) -> None:
    result = cli("generate", *(argument.format(run=trained_run) for argument in arguments))
    assert result.status == 2
    assert message in result.err and "Traceback" not in result.err and result.err.count(";") >= 2
    assert result.out == ""
