"""Broken and hostile folders are refused: what is wrong, what is required, what to do; and nothing is left behind."""

import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from moesaic.convert.exporter import export_run
from moesaic.convert.importer import import_model
from moesaic.convert.source import CONFIG_NAME, INDEX_NAME, WEIGHTS_NAME
from moesaic.errors import MoesaicError

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
NORM, EMBEDDING = "model.norm.weight", "model.embed_tokens.weight"

Broken = Callable[[Path], None]


pytestmark = pytest.mark.usefixtures("short_check")


@pytest.fixture(scope="module")
def whole(saved: Callable[..., Path]) -> Path:
    return saved("llama")


@pytest.fixture(scope="module")
def imported(whole: Path, short_check: None) -> Path:
    import_model(whole, whole.parent / "run")
    return whole.parent / "run"


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return shutil.copytree(whole, tmp_path / "model")


@pytest.fixture
def sharded(folder: Path) -> Path:
    tensors = load_file(folder / WEIGHTS_NAME)
    names = sorted(tensors)
    places = {name: FIRST if name < names[len(names) // 2] else SECOND for name in names}
    for shard in (FIRST, SECOND):
        save_file({name: tensors[name] for name in names if places[name] == shard}, folder / shard)
    (folder / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    (folder / WEIGHTS_NAME).unlink()
    return folder


def tree(path: Path) -> dict[str, bytes | str]:
    """Everything below a folder, with what is in it."""
    return {
        str(each.relative_to(path)): each.read_bytes() if each.is_file() and not each.is_symlink() else "no file"
        for each in path.rglob("*")
    }


def refused(source: Path, message: str) -> None:
    """Assert that an import fails with three parts and leaves everything beside and above the source as it was."""
    before = tree(source.parent)
    for output in (source.parent / "run", source.parent / "deep" / "down" / "run"):
        with pytest.raises(MoesaicError, match=message) as caught:
            import_model(source, output)
        assert str(caught.value).count(";") >= 2, caught.value
        assert tree(source.parent) == before


# Whatever a text says, it goes.
NOTHING = {"type": "Replace", "pattern": {"Regex": "[\\s\\S]"}, "content": ""}


def change_tokenizer(folder: Path, **values: Any) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer | values))


def change_config(folder: Path, **values: Any) -> None:
    config = json.loads((folder / CONFIG_NAME).read_text())
    (folder / CONFIG_NAME).write_text(json.dumps(config | values))


def change_tensors(file: Path, **tensors: torch.Tensor) -> None:
    save_file({**load_file(file), **{name.replace("__", "."): tensor for name, tensor in tensors.items()}}, file)


def change_header(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Let `change` edit a safetensors file's header, or return the text to be it."""
    data = file.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    changed = change(header)
    text = (changed if isinstance(changed, str) else json.dumps(header)).encode()
    text += b" " * (-len(text) % 8)
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])


def truncate(file: Path, size: int) -> None:
    os.truncate(file, size if size >= 0 else file.stat().st_size + size)


def claim(name: str, **values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda header: header[name].update(values)


def twice(header: dict[str, Any]) -> str:
    """The same tensor again under its own name, with other dimensions of the same size."""
    text = json.dumps(header)
    again = json.dumps({EMBEDDING: {**header[EMBEDDING], "shape": header[EMBEDDING]["shape"][::-1]}})
    return text[:-1] + ", " + again[1:]


class Attack:
    def __reduce__(self) -> Any:
        return os.mkdir, ("attacked",)


def as_pickle(folder: Path, name: str) -> None:
    (folder / WEIGHTS_NAME).unlink()
    (folder / name).write_bytes(pickle.dumps(Attack()))


WEIGHTS: dict[str, tuple[Broken, str]] = {
    "header cut": (lambda at: truncate(at / WEIGHTS_NAME, 700), "whole safetensors file is required"),
    "length cut": (lambda at: truncate(at / WEIGHTS_NAME, 5), "whole safetensors file is required"),
    "data cut": (lambda at: truncate(at / WEIGHTS_NAME, -1), "whole safetensors file is required"),
    "empty": (lambda at: truncate(at / WEIGHTS_NAME, 0), "whole safetensors file is required"),
    "too long": (lambda at: (at / WEIGHTS_NAME).write_bytes((at / WEIGHTS_NAME).read_bytes() + b"x"), "whole"),
    "none": (lambda at: (at / WEIGHTS_NAME).unlink(), f"has neither {WEIGHTS_NAME} nor {INDEX_NAME}: it holds none"),
    "a folder": (lambda at: ((at / WEIGHTS_NAME).unlink(), (at / WEIGHTS_NAME).mkdir()), "has neither"),
    "a pipe": (lambda at: ((at / WEIGHTS_NAME).unlink(), os.mkfifo(at / WEIGHTS_NAME)), "has neither"),
    "a pickle": (lambda at: as_pickle(at, "pytorch_model.bin"), "pytorch_model.bin, which is a pickle"),
    "a pickle in disguise": (lambda at: as_pickle(at, WEIGHTS_NAME), "a pickle could run code"),
    "a tensor less": (lambda at: change_header(at / WEIGHTS_NAME, lambda each: each.update(x=each.pop(NORM))),
                      "missing 1: model.norm.weight; not used by any part 1: x"),
    "a tensor more": (lambda at: change_tensors(at / WEIGHTS_NAME, extra=torch.ones(3)), "not used by any part 1: ext"),
    "another shape": (lambda at: change_tensors(at / WEIGHTS_NAME, model__norm__weight=torch.ones(25)),
                      r"of another shape 1: model.norm.weight is \[25\], \[24\] is required"),
    "integers": (lambda at: change_tensors(at / WEIGHTS_NAME, model__norm__weight=torch.ones(24, dtype=torch.int64)),
                 "no floating-point numbers 1: model.norm.weight is int64"),
    "eight bits": (lambda at: change_tensors(at / WEIGHTS_NAME,
                                             model__norm__weight=torch.ones(24).to(torch.float8_e4m3fn)),
                   "of dtype F8_E4M3"),
    "huge shape": (lambda at: change_header(at / WEIGHTS_NAME, claim(NORM, shape=[2**40, 2**40])), "safetensors file"),
    "huge offsets": (lambda at: change_header(at / WEIGHTS_NAME, claim(NORM, data_offsets=[0, 2**62])), "whole"),
    "offsets over another": (lambda at: change_header(at / WEIGHTS_NAME, claim(NORM, data_offsets=[0, 96])), "whole"),
    "offsets below zero": (lambda at: change_header(at / WEIGHTS_NAME, claim(NORM, data_offsets=[-96, 0])), "whole"),
    "a huge header": (lambda at: (at / WEIGHTS_NAME).write_bytes(struct.pack("<Q", 2**60) + bytes(99)), "whole"),
    "a tensor twice": (lambda at: change_header(at / WEIGHTS_NAME, twice), f"'{EMBEDDING}' stands twice"),
    "no JSON": (lambda at: change_header(at / WEIGHTS_NAME, lambda _: "{{"), "whole safetensors file is required"),
    "more than fp32 holds": (
        lambda at: change_tensors(at / WEIGHTS_NAME, model__norm__weight=torch.full((24,), 1e300, dtype=torch.float64)),
        "norm.weight holds numbers that are not finite"),
    "NaN": (lambda at: change_tensors(at / WEIGHTS_NAME, model__norm__weight=torch.full((24,), torch.nan)),
            "norm.weight holds numbers that are not finite"),
}  # fmt: skip


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_that_cannot_be(name: str, folder: Path) -> None:
    broken, message = WEIGHTS[name]
    broken(folder)
    refused(folder, message)
    assert not Path("attacked").exists()


def change_index(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    values = json.loads((folder / INDEX_NAME).read_text())
    changed = change(values["weight_map"])
    (folder / INDEX_NAME).write_text(changed if isinstance(changed, str) else json.dumps(values))


def outside(folder: Path, name: str = SECOND) -> Path:
    """Put the second shard beside the folder and return where it is."""
    return (folder / SECOND).rename(folder.parent / f"moved-{name}")


def link_outside(folder: Path, name: str) -> None:
    (folder / name).rename(folder.parent / f"moved-{name}")
    (folder / name).symlink_to(folder.parent / f"moved-{name}")


INDICES: dict[str, tuple[Broken, str]] = {
    "a shard missing": (lambda at: (at / SECOND).unlink(), f"has no {SECOND}, which holds .* tensors"),
    "a shard cut": (lambda at: truncate(at / SECOND, -3), f"{SECOND} cannot be read"),
    "above": (lambda at: change_index(at, lambda each: each.update({NORM: f"../{outside(at).name}"})),
              "is in '../moved-.*'; the name of a .safetensors file in the same folder is required"),
    "absolute": (lambda at: change_index(at, lambda each: each.update({NORM: str(outside(at))})), "in the same folder"),
    "below": (lambda at: change_index(at, lambda each: each.update({NORM: f"x/{SECOND}"})), "in the same folder"),
    "another kind of file": (lambda at: change_index(at, lambda each: each.update({NORM: "a.bin"})), "same folder"),
    "the folder above": (lambda at: change_index(at, lambda each: each.update({NORM: ".."})), "same folder"),
    "no name": (lambda at: change_index(at, lambda each: each.update({NORM: ""})), "same folder"),
    "no text": (lambda at: change_index(at, lambda each: each.update({NORM: 3})), "has no weight_map"),
    "a link outside": (lambda at: link_outside(at, SECOND), f"{SECOND} is a link to .*, outside the folder"),
    "a tensor elsewhere": (lambda at: change_index(at, lambda each: each.update({NORM: FIRST})),
                           f"{FIRST} does not hold {NORM}"),
    "a tensor in both": (lambda at: change_tensors(at / FIRST, model__norm__weight=torch.ones(24)),
                         f"{NORM} is in {FIRST} and again in {SECOND}"),
    "a tensor listed twice": (
        lambda at: change_index(at, lambda each: json.dumps({"weight_map": each})[:-2] + f', "{NORM}": "{FIRST}"}}}}'),
        f"'{NORM}' stands twice"),
    "no map": (lambda at: (at / INDEX_NAME).write_text("{}"), "has no weight_map"),
    "an empty map": (lambda at: (at / INDEX_NAME).write_text('{"weight_map": {}}'), "has no weight_map"),
    "a list": (lambda at: (at / INDEX_NAME).write_text("[]"), "holds no JSON object"),
    "no JSON": (lambda at: (at / INDEX_NAME).write_text("{"), "cannot be read as JSON"),
    "a whole model too": (lambda at: (at / WEIGHTS_NAME).write_bytes((at / FIRST).read_bytes()), "either could be"),
}  # fmt: skip


@pytest.mark.parametrize("name", INDICES)
def test_indices_that_mislead(name: str, sharded: Path) -> None:
    broken, message = INDICES[name]
    broken(sharded)
    refused(sharded, message)


FILES: dict[str, tuple[Broken, str]] = {
    "no config": (lambda at: (at / CONFIG_NAME).unlink(), "has no config.json"),
    "config no JSON": (lambda at: (at / CONFIG_NAME).write_text("{'a': 1}"), "cannot be read as JSON"),
    "config a list": (lambda at: (at / CONFIG_NAME).write_text("[1]"), "holds no JSON object"),
    "config a text": (lambda at: (at / CONFIG_NAME).write_text('"llama"'), "holds no JSON object"),
    "config deep": (lambda at: (at / CONFIG_NAME).write_text("[" * 200_000), "cannot be read as JSON"),
    "config bytes": (lambda at: (at / CONFIG_NAME).write_bytes(b"\xff\xfe{}"), "cannot be read as JSON"),
    "config a pipe": (lambda at: ((at / CONFIG_NAME).unlink(), os.mkfifo(at / CONFIG_NAME)), "no ordinary file"),
    "config elsewhere": (lambda at: link_outside(at, CONFIG_NAME), "config.json is a link to .*, outside"),
    "a key twice": (lambda at: (at / CONFIG_NAME).write_text('{"hidden_size": 24, "hidden_size": 48}'),
                    "'hidden_size' stands twice"),
    "NaN": (lambda at: change_config(at, rms_norm_eps=float("nan")), "it holds NaN, which is no number"),
    "infinity": (lambda at: change_config(at, unknown=float("-inf")), "it holds -Infinity, which is no number"),
    "an adapter": (lambda at: (at / "adapter_config.json").write_text("{}"), "an adapter beside a model"),
    "an adapter alone": (lambda at: (at / CONFIG_NAME).rename(at / "adapter_config.json"),
                         "an adapter without its model; .*merge_and_unload.* save the result\\.$"),
    "no tokenizer": (lambda at: (at / "tokenizer.json").unlink(), "holds no tokenizer.json; .* with --tokenizer"),
    "SentencePiece's alone": (lambda at: (at / "tokenizer.json").rename(at / "tokenizer.model"),
                              "holds no tokenizer.json; .* make it of tokenizer.model"),
    "tokenizer no JSON": (lambda at: (at / "tokenizer.json").write_text("{"), "tokenizer file is not JSON"),
    "tokenizer of more tokens": (lambda at: change_config(at, vocab_size=200), "tokens|another shape"),
    "template elsewhere": (lambda at: link_outside(at, "chat_template.jinja"), "chat_template.jinja is a link"),
    "template bytes": (lambda at: (at / "chat_template.jinja").write_bytes(b"\xff"), "template.jinja is not UTF-8"),
    "tokenizer of nothing": (lambda at: change_tokenizer(at, normalizer=NOTHING), "makes no token of any text"),
    "tokenizer_config a list": (lambda at: (at / "tokenizer_config.json").write_text("[]"), "is not a JSON object"),
    "generation_config no JSON": (lambda at: (at / "generation_config.json").write_text("{"), "is not a JSON object"),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_files_that_are_no_model(name: str, folder: Path) -> None:
    broken, message = FILES[name]
    broken(folder)
    refused(folder, message)


def test_paths_that_are_no_source(tmp_path: Path, folder: Path) -> None:
    refused(tmp_path / "nothing", "has no config.json")
    refused(tmp_path / "nothing.gguf", "no config.json")
    refused(folder / CONFIG_NAME, "config.json is a file; a folder")
    (tmp_path / "empty.gguf").touch()
    refused(tmp_path / "empty.gguf", "cannot be read as GGUF")


def test_the_links_of_the_hubs_cache_are_followed(folder: Path, tmp_path: Path) -> None:
    cache = tmp_path / "models--a--b"
    (cache / "blobs").mkdir(parents=True)
    (cache / "snapshots" / "f00").mkdir(parents=True)
    for index, file in enumerate(sorted(folder.iterdir())):
        file.rename(cache / "blobs" / str(index))
        (cache / "snapshots" / "f00" / file.name).symlink_to(Path("..", "..", "blobs", str(index)))
    assert import_model(cache / "snapshots" / "f00", tmp_path / "run").failure is None


def test_shards_are_read_by_their_index_and_a_link_inside_the_folder_is_one_of_them(
    sharded: Path, whole: Path, tmp_path: Path
) -> None:
    (sharded / SECOND).rename(sharded / "kept")
    (sharded / SECOND).symlink_to(sharded / "kept")
    import_model(sharded, tmp_path / "run")
    import_model(whole, tmp_path / "same")
    first, other = (load_file(next((tmp_path / name).rglob("*.safetensors"))) for name in ("run", "same"))
    assert first.keys() == other.keys() and all(torch.equal(first[name], other[name]) for name in first)


def refused_output(call: Callable[[Path], Any], output: Path, message: str) -> None:
    before = tree(output.parent)
    with pytest.raises(MoesaicError, match=message) as caught:
        call(output)
    assert str(caught.value).count(";") >= 2, caught.value
    assert tree(output.parent) == before


@pytest.mark.parametrize("direction", ["import", "export"])
def test_what_exists_or_is_the_source_is_never_written_to(direction: str, folder: Path, tmp_path: Path) -> None:
    source = folder
    if direction == "export":
        source = tmp_path / "run"
        import_model(folder, source)

    def call(output: Path) -> None:
        import_model(source, output) if direction == "import" else export_run(source, output)

    for name in ("full", "empty"):
        (tmp_path / name).mkdir()
    (tmp_path / "full" / "precious").write_text("kept")
    (tmp_path / "file").write_text("kept")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for name in ("full", "empty", "file", "dangling", source.name):
        refused_output(call, tmp_path / name, f"{name} exists; .*; name another")
    refused_output(call, source / "inside", "is inside .*; .*; name one outside")
    (tmp_path / "link").symlink_to(source)
    refused_output(call, tmp_path / "link" / "inside", "is inside")
    refused_output(call, tmp_path / ("x" * 300), "cannot be a folder")
    refused_output(call, tmp_path / "file" / "below", "could not be written|cannot be a folder")


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), MemoryError()])
@pytest.mark.parametrize("after", [0, 5])
@pytest.mark.parametrize("direction", ["import", "export", "gguf"])
def test_a_full_disk_or_an_interrupt_leaves_nothing(
    direction: str,
    after: int,
    error: BaseException,
    folder: Path,
    imported: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if direction != "import":
        shutil.copytree(imported, tmp_path / "run")
    before, seen = tree(tmp_path), 0

    def fails(self: Any, *arguments: Any) -> None:
        nonlocal seen
        seen += 1
        if seen > after:
            raise error

    if direction == "gguf":
        monkeypatch.setattr("gguf.GGUFWriter.write_tensor_data", fails)
    else:
        monkeypatch.setattr("moesaic.checkpoint.stream.TensorWriter.append", fails)
    expected = MoesaicError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected) as caught:
        if direction == "import":
            import_model(folder, tmp_path / "new" / "out")
        else:
            format_: Any = "gguf" if direction == "gguf" else "huggingface"
            export_run(tmp_path / "run", tmp_path / "new" / "out", format=format_)
    assert seen == after + 1
    assert tree(tmp_path) == before
    if isinstance(error, OSError):
        assert "No space left" in str(caught.value) and str(caught.value).count(";") >= 2


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors", ""])
def test_a_link_that_leads_to_itself_is_refused(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "source"
    if name:
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(folder / name)
    with pytest.raises(MoesaicError):
        import_model(folder, tmp_path / "run")
