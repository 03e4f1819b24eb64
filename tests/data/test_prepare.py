"""prepare: the same bytes whatever the workers and however often it is killed; no document in both splits."""

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from moesaic.data import prepare as prepare_module
from moesaic.data.corpus import embedded_corpus
from moesaic.data.encode import EncoderPool
from moesaic.data.prepare import Progress, prepare
from moesaic.data.shards import Manifest, ShardSet
from moesaic.data.tokenizer import Tokenizer
from moesaic.errors import DataError, FolderInUseError
from moesaic.folders import FolderLock


def speeches(count: int) -> list[str]:
    return [file.read_text(encoding="utf-8") for file in sorted(embedded_corpus().glob("*.txt"))[:count]]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(speeches(4), vocab_size=400)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """300 documents of all sizes: empty, one word, one paragraph, a whole speech; some twice."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    texts = speeches(8)
    paragraphs = [part for text in texts[:3] for part in text.split("\n\n")]
    documents = ["", "word", texts[4], " \n ", *paragraphs[:200], texts[5] * 8, *paragraphs[:40], "", texts[6]]
    with (folder / "a.jsonl").open("w", encoding="utf-8") as stream:
        for document in documents:
            stream.write(json.dumps({"text": document}) + "\n")
    (folder / "b.txt").write_text(texts[0], encoding="utf-8")
    (folder / "c.txt.gz").write_bytes(gzip.compress(texts[1].encode()))
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def documents_of(folder: Path, split: str) -> list[str]:
    shards = ShardSet.open(folder, verify=True)
    tokenizer = shards.load_tokenizer()
    stream = getattr(shards, split)
    tokens = stream.read(0, stream.num_tokens)
    ends = np.flatnonzero(tokens == tokenizer.end_of_text_id)
    assert len(tokens) == 0 or ends[-1] == len(tokens) - 1
    starts = [0, *(ends[:-1] + 1)]
    return [tokenizer.decode(tokens[start:end]) for start, end in zip(starts, ends, strict=False)]


def read_corpus(folder: Path) -> list[str]:
    lines = (folder / "a.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    return [text for text in [*texts, *speeches(2)] if text.strip()]


def test_all_documents_come_back_once_and_in_order(corpus: Path, tmp_path: Path, tokenizer: Tokenizer) -> None:
    manifest = prepare(corpus, tmp_path / "out", tokenizer=tokenizer, validation_fraction=0.2, shard_tokens=10_007)
    train, validation = documents_of(tmp_path / "out", "train"), documents_of(tmp_path / "out", "validation")
    expected = read_corpus(corpus)
    held_out = set(validation)
    assert train == [text for text in expected if text not in held_out]
    assert validation == [text for text in expected if text in held_out]
    assert (manifest.train.num_documents, manifest.validation.num_documents) == (len(train), len(validation))
    assert manifest.train.num_bytes + manifest.validation.num_bytes == sum(len(text.encode()) for text in expected)
    assert manifest.num_empty_documents == 3
    for split in (manifest.train, manifest.validation):
        assert [shard.num_tokens for shard in split.shards[:-1]] == [10_007] * (len(split.shards) - 1)
        assert sum(shard.num_documents for shard in split.shards) == split.num_documents
    assert 0.1 < len(validation) / len(expected) < 0.3


def test_no_document_is_in_both_splits_even_when_it_occurs_twice(
    corpus: Path, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    prepare(corpus, tmp_path / "out", tokenizer=tokenizer, validation_fraction=0.5)
    train, validation = documents_of(tmp_path / "out", "train"), documents_of(tmp_path / "out", "validation")
    assert len(set(train)) < len(train)
    assert not set(train) & set(validation)


def test_the_output_does_not_depend_on_the_number_of_workers(corpus: Path, tmp_path: Path) -> None:
    for workers in (1, 3):
        prepare(corpus, tmp_path / str(workers), vocab_size=400, shard_tokens=5000, num_workers=workers)
    assert contents(tmp_path / "1") == contents(tmp_path / "3")


_KILLED_RUN = """
import os, signal, sys
from moesaic.data import prepare as module
from moesaic.data.prepare import prepare
when, count = sys.argv[3], int(sys.argv[4])
calls = 0
def die(*arguments):
    global calls
    calls += 1
    if calls == count:
        os.kill(os.getpid(), signal.SIGKILL)
def before(owner, name):
    original = getattr(owner, name)
    def wrapped(*arguments):
        die()
        return original(*arguments)
    setattr(owner, name, wrapped)
def after(owner, name):
    original = getattr(owner, name)
    def wrapped(*arguments):
        result = original(*arguments)
        die()
        return result
    setattr(owner, name, wrapped)
writer = module._SplitWriter
{
    "writing": lambda: before(writer, "write"),
    "closing": lambda: before(writer, "_close_shard"),
    "closed": lambda: after(writer, "_close_shard"),
    "flushed": lambda: after(writer, "flush"),
    "checkpoint": lambda: after(module, "_write_atomically"),
    "finishing": lambda: after(writer, "finish"),
}[when]()
module._BATCH_CHARS = 50_000  # more places to continue at; the output depends on the documents alone
prepare(sys.argv[1], sys.argv[2], vocab_size=400, shard_tokens=20_000, num_workers=2)
"""


def kill_run(corpus: Path, output: Path, when: str, count: int) -> None:
    command = [sys.executable, "-c", _KILLED_RUN, str(corpus), str(output), when, str(count)]
    assert subprocess.run(command).returncode == -signal.SIGKILL


@pytest.fixture
def many_speeches(tmp_path: Path) -> Path:
    folder = tmp_path / "speeches"
    folder.mkdir()
    for number, text in enumerate(speeches(48)):
        (folder / f"{number:03d}.txt").write_text(text, encoding="utf-8")
    return folder


def test_a_run_killed_again_and_again_gives_the_same_bytes(many_speeches: Path, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    prepare(many_speeches, whole, vocab_size=400, shard_tokens=20_000)
    moments = [
        ("checkpoint", 1),  # before the tokenizer is trained
        ("writing", 1),
        ("closing", 2),
        ("closed", 3),
        ("flushed", 1),
        ("checkpoint", 1),
        ("closed", 9),
        ("writing", 3),
        ("finishing", 1),
        ("finishing", 2),
    ]
    for when, count in moments:
        kill_run(many_speeches, killed, when, count)
        with pytest.raises(DataError, match=r"only half prepared.*continues where it stopped"):
            ShardSet.open(killed)
    progress = (killed / "progress.json").read_bytes()
    prepare(many_speeches, killed, vocab_size=400, shard_tokens=20_000)
    assert contents(killed) == contents(whole)
    # Killed after the manifest was written and before progress.json was removed: the folder is whole.
    (killed / "progress.json").write_bytes(progress)
    ShardSet.open(killed, verify=True)
    prepare(many_speeches, killed, vocab_size=400, shard_tokens=20_000)
    assert contents(killed) == contents(whole)


def test_a_restart_does_not_encode_again_what_is_on_disk(
    many_speeches: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    kill_run(many_speeches, output, "checkpoint", 4)
    done = json.loads((output / "progress.json").read_text())
    documents_done = done["train"]["num_documents"] + done["validation"]["num_documents"]
    assert documents_done > 0
    ended = []
    original = EncoderPool.encode

    def counting(self, batches):  # type: ignore[no-untyped-def]
        for encoded, work in original(self, batches):
            ended.append(sum(work.ends_document))
            yield encoded, work

    monkeypatch.setattr(EncoderPool, "encode", counting)
    monkeypatch.setattr(Tokenizer, "train", None)
    manifest = prepare(many_speeches, output, vocab_size=400, shard_tokens=20_000)
    assert sum(ended) == manifest.train.num_documents + manifest.validation.num_documents - documents_done


def test_killing_the_writer_ends_the_workers(many_speeches: Path, tmp_path: Path) -> None:
    psutil = pytest.importorskip("psutil", reason="psutil is not installed")
    code = (
        "import sys, time\nfrom moesaic.data.encode import EncoderPool\nfrom moesaic.data.tokenizer import Tokenizer\n"
        "with EncoderPool(Tokenizer.train(['some text'], vocab_size=300), num_workers=2) as pool:\n"
        "    list(pool.encode([(['text'], None)] * 4))\n    print('ready', flush=True)\n    time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    workers = psutil.Process(process.pid).children()
    assert len(workers) == 2
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert not psutil.wait_procs(workers, timeout=20)[1]


def test_a_worker_that_dies_is_reported_and_the_run_continues_later(
    corpus: Path, tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = EncoderPool.__enter__

    def with_a_dead_worker(self: EncoderPool) -> EncoderPool:
        pool = original(self)
        pool._workers[0].kill()
        return pool

    with monkeypatch.context() as patch:
        patch.setattr(EncoderPool, "__enter__", with_a_dead_worker)
        with pytest.raises(DataError, match=r"ended before its time \(exit status -9\).*fewer workers"):
            prepare(corpus, tmp_path / "out", tokenizer=tokenizer, num_workers=1)
    prepare(corpus, tmp_path / "out", tokenizer=tokenizer)
    prepare(corpus, tmp_path / "fresh", tokenizer=tokenizer)
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_a_finished_folder_is_returned_at_once_and_refuses_other_input(
    corpus: Path, tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    manifest = prepare(corpus, output, tokenizer=tokenizer)
    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "EncoderPool", None)
        assert prepare(corpus, output, tokenizer=tokenizer, num_workers=3) == manifest
    for changes in ({"validation_fraction": 0.1}, {"shard_tokens": 77}, {"text_field": "body"}):
        with pytest.raises(DataError, match="was prepared from other sources or settings"):
            prepare(corpus, output, tokenizer=tokenizer, **changes)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="was prepared from other sources or settings"):
        prepare(corpus, output, vocab_size=400)
    (corpus / "d.txt").write_text("one more")
    with pytest.raises(DataError, match="was prepared from other sources or settings"):
        prepare(corpus, output, tokenizer=tokenizer)


def test_an_interrupted_run_refuses_other_input(many_speeches: Path, tmp_path: Path) -> None:
    kill_run(many_speeches, tmp_path / "out", "closed", 2)
    with pytest.raises(DataError, match="was begun from other sources or settings"):
        prepare(many_speeches, tmp_path / "out", vocab_size=401, shard_tokens=20_000)


def test_a_run_whose_files_were_touched_refuses_to_continue(many_speeches: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    kill_run(many_speeches, output, "checkpoint", 4)
    original = (output / "train-00000.bin").read_bytes()
    for damage in (original[:-2], None):
        (output / "train-00000.bin").unlink()
        if damage is not None:
            (output / "train-00000.bin").write_bytes(damage)
        with pytest.raises(DataError, match=r"train-00000\.bin has .* bytes; progress\.json requires"):
            prepare(many_speeches, output, vocab_size=400, shard_tokens=20_000)
        (output / "train-00000.bin").write_bytes(original)
    tokenizer_text = (output / "tokenizer.json").read_text()
    Tokenizer.train(["other text"], vocab_size=300).save(output)
    with pytest.raises(DataError, match="is not the tokenizer this folder was begun with"):
        prepare(many_speeches, output, vocab_size=400, shard_tokens=20_000)
    (output / "tokenizer.json").write_text(tokenizer_text)
    (output / "progress.json").write_text("{")
    with pytest.raises(DataError, match=r"progress\.json is damaged"):
        prepare(many_speeches, output, vocab_size=400, shard_tokens=20_000)


def test_two_runs_at_once_into_one_folder_are_refused(corpus: Path, tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "out").mkdir()
    with FolderLock(tmp_path / "out"), pytest.raises(FolderInUseError, match="is being written by process"):
        prepare(corpus, tmp_path / "out", tokenizer=tokenizer)


def test_a_folder_with_other_files_is_left_alone(corpus: Path, tmp_path: Path, tokenizer: Tokenizer) -> None:
    tokenizer.save(tmp_path / "out")
    before = contents(tmp_path / "out")
    with pytest.raises(DataError, match=r"holds other files \(tokenizer\.json"):
        prepare(corpus, tmp_path / "out", tokenizer=tmp_path / "out")
    assert contents(tmp_path / "out") == before


def test_an_output_that_is_a_file_is_refused(corpus: Path, tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "out").write_text("x")
    with pytest.raises(DataError, match="cannot be made"):
        prepare(corpus, tmp_path / "out", tokenizer=tokenizer)


def test_a_full_disk_is_said_and_the_run_continues_later(
    many_speeches: Path, tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed = prepare_module._SplitWriter._close_shard

    def full(self: prepare_module._SplitWriter) -> None:
        if self.num_shards == 2:
            raise OSError(28, "No space left on device", str(self._partial))
        closed(self)

    with monkeypatch.context() as patch:
        patch.setattr(prepare_module._SplitWriter, "_close_shard", full)
        with pytest.raises(DataError, match=r"No space left on device.*continues where it stopped"):
            prepare(many_speeches, tmp_path / "out", tokenizer=tokenizer, shard_tokens=20_000)
    prepare(many_speeches, tmp_path / "out", tokenizer=tokenizer, shard_tokens=20_000)
    prepare(many_speeches, tmp_path / "fresh", tokenizer=tokenizer, shard_tokens=20_000)
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_a_source_that_fails_leaves_no_folder_and_its_own_message(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    with pytest.raises(DataError, match=r"a\.jsonl, line 2, is not JSON"):
        prepare(tmp_path / "a.jsonl", tmp_path / "out", tokenizer=tokenizer)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("change", ["grown", "touched", "gone"])
def test_a_source_that_changes_while_it_is_read_is_named_and_nothing_is_finished(
    corpus: Path, tmp_path: Path, tokenizer: Tokenizer, change: str
) -> None:
    file = corpus / "b.txt"

    def disturb(progress: Progress) -> None:
        if change == "gone":
            file.unlink(missing_ok=True)
        elif change == "grown":
            file.write_text("more " * 10_000)
        else:
            os.utime(file, ns=(1, 1))

    # All of it is one batch, so the files are read when the first progress is told.
    message = rf"b\.txt {'is gone' if change == 'gone' else 'has changed while it was read'} .*; .* must stay .*; "
    with pytest.raises(DataError, match=message):
        prepare(corpus, tmp_path / "out", tokenizer=tokenizer, num_workers=1, on_progress=disturb)
    assert not (tmp_path / "out" / "manifest.json").exists()


@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("fraction", [0.0001, 0.02, 0.9999])
def test_two_documents_are_enough_for_both_splits(
    tmp_path: Path, tokenizer: Tokenizer, count: int, fraction: float
) -> None:
    for number in range(count):
        (tmp_path / f"{number}.txt").write_text(f"document {number} " * (number + 1) ** 3)
    manifest = prepare(
        [tmp_path / f"{number}.txt" for number in range(count)],
        tmp_path / "out",
        tokenizer=tokenizer,
        validation_fraction=fraction,
        num_workers=1,
    )
    assert manifest.train.num_documents >= 1 and manifest.validation.num_documents >= 1
    if fraction == 0.02:  # the forced one is that whose share is nearest, not a large one
        assert manifest.validation.num_bytes < manifest.train.num_bytes


def test_a_single_document_is_cut_in_two(tmp_path: Path, tokenizer: Tokenizer) -> None:
    text = speeches(1)[0]
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    manifest = prepare(tmp_path / "a.txt", tmp_path / "out", tokenizer=tokenizer, validation_fraction=0.1)
    (first,), (second,) = documents_of(tmp_path / "out", "train"), documents_of(tmp_path / "out", "validation")
    assert first + second == text
    assert 0.02 < manifest.validation.num_bytes / len(text.encode()) < 0.4


def test_without_a_fraction_everything_is_for_training(corpus: Path, tmp_path: Path, tokenizer: Tokenizer) -> None:
    manifest = prepare(corpus, tmp_path / "out", tokenizer=tokenizer, validation_fraction=0)
    assert manifest.validation.num_tokens == 0 and manifest.validation.shards == ()
    assert documents_of(tmp_path / "out", "train") == read_corpus(corpus)


def test_one_document_many_times_leaves_validation_empty_and_says_so(
    tmp_path: Path, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "the same"}\n' * 5)
    manifest = prepare(tmp_path / "a.jsonl", tmp_path / "out", tokenizer=tokenizer)
    assert (manifest.train.num_documents, manifest.validation.num_documents) == (5, 0)
    assert "all documents are equal" in caplog.text


def test_a_large_vocabulary_is_written_as_uint32(tmp_path: Path) -> None:
    vocabulary = {chr(0x4E00 + number): number for number in range(20_000)}
    vocabulary |= {f"unused{number}": number for number in range(20_000, 70_000)}
    vocabulary |= {"z": 70_000, "<|endoftext|>": 70_001}
    text = json.dumps(
        {
            "version": "1.0",
            "added_tokens": [
                {"id": 70_001, "content": "<|endoftext|>", "special": True}
                | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
            ],
            "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
        }
    )
    (tmp_path / "tokenizer.json").write_text(text)
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": "z" * n + "一"}) for n in range(1, 40)))
    manifest = prepare(tmp_path / "a.jsonl", tmp_path / "out", tokenizer=tmp_path / "tokenizer.json", shard_tokens=11)
    assert manifest.dtype == "uint32" and manifest.vocab_size == 70_002
    shards = ShardSet.open(tmp_path / "out", verify=True)
    assert (tmp_path / "out" / "train-00000.bin").stat().st_size == 44
    tokens = shards.train.read(0, shards.train.num_tokens)
    assert set(tokens.tolist()) == {0, 70_000, 70_001}
    assert int((tokens == 70_001).sum()) == manifest.train.num_documents


def test_text_that_writes_out_the_end_of_text_does_not_end(tmp_path: Path, tokenizer: Tokenizer) -> None:
    texts = ["one <|endoftext|> still one", "two<|endoftext|>", "lone \ud800 surrogate"]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    prepare(tmp_path / "a.jsonl", tmp_path / "out", tokenizer=tokenizer, validation_fraction=0)
    assert documents_of(tmp_path / "out", "train") == [*texts[:2], "lone \ufffd surrogate"]


def test_parquet_and_datasets_and_text_mix(tmp_path: Path, tokenizer: Tokenizer) -> None:
    datasets = pytest.importorskip("datasets", reason="the datasets extra is not installed")
    data = datasets.Dataset.from_dict({"text": ["from a dataset", "and another"]})
    data.save_to_disk(str(tmp_path / "saved"))
    data.to_parquet(str(tmp_path / "a.parquet"))
    (tmp_path / "b.txt").write_text("from a text")
    mix = [tmp_path / "a.parquet", tmp_path / "b.txt", tmp_path / "saved"]
    manifest = prepare(mix, tmp_path / "out", tokenizer=tokenizer, validation_fraction=0)
    assert documents_of(tmp_path / "out", "train") == [*data["text"], "from a text", *data["text"]]
    assert [source.name for source in manifest.sources] == [str(path) for path in mix]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"validation_fraction": 1.0}, r"validation_fraction \(1.0\) must be at least 0 and less than 1"),
        ({"validation_fraction": -0.1}, "validation_fraction"),
        ({"validation_fraction": float("nan")}, "validation_fraction"),
        ({"shard_tokens": 0}, r"shard_tokens \(0\) must be positive"),
        ({"num_workers": 0}, r"num_workers \(0\) must be positive"),
        ({"vocab_size": 100}, r"vocab_size \(100\) is too small"),
        ({"sample_bytes": 0}, r"sample_bytes \(0\) must be positive"),
    ],
)
def test_settings_that_cannot_work_are_refused(
    corpus: Path, tmp_path: Path, arguments: dict[str, float], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        prepare(corpus, tmp_path / "out", **arguments)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["vocab_size", "sample_bytes"])
def test_a_tokenizer_and_how_to_train_one_exclude_each_other(
    corpus: Path, tmp_path: Path, tokenizer: Tokenizer, name: str
) -> None:
    with pytest.raises(DataError, match=f"{name} .* and a tokenizer are both given"):
        prepare(corpus, tmp_path / "out", tokenizer=tokenizer, **{name: 1000})  # type: ignore[arg-type]


def test_an_empty_corpus_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n{"text": " \\n"}\n')
    for fraction in (0, 0.02):
        with pytest.raises(DataError, match=r"the corpus is empty: .*a\.jsonl holds no text"):
            prepare(tmp_path / "a.jsonl", tmp_path / f"out{fraction}", validation_fraction=fraction)


def test_progress_rises_to_the_end(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare_module, "_PROGRESS_SECONDS", 0.0)
    seen: list[Progress] = []
    manifest = prepare(corpus, tmp_path / "out", vocab_size=400, on_progress=seen.append)
    assert list(dict.fromkeys(each.stage for each in seen)) == ["tokenizer", "encode"]
    fractions = [each.fraction for each in seen if each.stage == "encode"]
    assert None not in fractions and fractions == sorted(fractions) and fractions[-1] == 1.0
    assert seen[-1].num_tokens == manifest.train.num_tokens + manifest.validation.num_tokens


def test_the_tokenizer_sees_every_file_and_no_validation_document(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "in").mkdir()
    texts = speeches(40)
    for number, text in enumerate(texts):
        (tmp_path / "in" / f"{number:02d}.txt").write_text(text, encoding="utf-8")
    seen: list[str] = []
    original = Tokenizer.train.__func__  # type: ignore[attr-defined]

    def spy(cls: type[Tokenizer], sample: list[str], **options: int) -> Tokenizer:
        seen.extend(sample)
        return original(cls, seen, **options)

    monkeypatch.setattr(Tokenizer, "train", classmethod(spy))
    prepare(
        tmp_path / "in", tmp_path / "out", vocab_size=300, sample_bytes=50_000, validation_fraction=0.3, num_workers=1
    )
    validation = documents_of(tmp_path / "out", "validation")
    used = [number for number, text in enumerate(texts) if any(text.startswith(part) and part for part in seen)]
    assert used == [number for number, text in enumerate(texts) if text not in validation]
    assert sum(len(part.encode()) for part in seen) <= 50_000


def test_the_embedded_corpus_prepares_whole(tmp_path: Path) -> None:
    manifest = prepare("embedded", tmp_path / "out", sample_bytes=1_000_000)
    assert isinstance(manifest, Manifest)
    assert manifest.vocab_size == 4096 and manifest.dtype == "uint16"
    assert manifest.train.num_documents + manifest.validation.num_documents == 249
    assert manifest.train.num_bytes + manifest.validation.num_bytes > 12_000_000
    assert 3.5 < manifest.train.num_bytes / manifest.train.num_tokens < 5
    assert documents_of(tmp_path / "out", "validation")[0] in speeches(249)


def test_a_shut_run_leaves_no_children(corpus: Path, tmp_path: Path, tokenizer: Tokenizer) -> None:
    psutil = pytest.importorskip("psutil", reason="psutil is not installed")
    before = set(psutil.Process().children(recursive=True))

    def stop(progress: Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(corpus, tmp_path / "out", tokenizer=tokenizer, on_progress=stop)
    deadline = time.monotonic() + 10
    while set(psutil.Process().children(recursive=True)) - before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert set(psutil.Process().children(recursive=True)) <= before
