import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from moesaic.config.model import ModelConfig
from moesaic.data.shards import ShardSet
from moesaic.data.tokenizer import Tokenizer
from moesaic.errors import ConfigError, DataError
from moesaic.evaluate.perplexity import compare, measure_perplexity, record_reference, text_windows
from moesaic.evaluate.text import NOTHING, TokenDocument, Windows, read_documents
from moesaic.model.load import LoadedModel
from moesaic.model.transformer import Transformer

CPU = torch.device("cpu")
END = 49
MODEL = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_layers": 2,
    "num_heads": 2,
    "intermediate_size": 32,
    "max_positions": 64,
}
NOISY_MOE = {
    "num_experts": 4,
    "top_k": 2,
    "router": {"noise": "jitter", "jitter_epsilon": 0.5},
    "capacity": {"factor": 0.1, "min_capacity": 1, "drop_policy": "random"},
}


def make_model(seed: int = 0, **changes: object) -> Transformer:
    model = Transformer(ModelConfig.from_dict({**MODEL, **changes})).initialize(seed)
    with torch.no_grad():
        for parameter in model.parameters():  # far from uniform, so that a wrong context shows
            parameter.mul_(10.0 if parameter.dim() > 1 else 1.0)
    return model


def make_documents(*lengths: int) -> list[TokenDocument]:
    rng = np.random.default_rng(0)
    return [TokenDocument(rng.integers(0, END, count).astype(np.int32), 3 * count) for count in lengths]


def make_windows(*lengths: int, length: int = 8, stride: int = 3, apart: bool = False) -> Windows:
    return Windows(make_documents(*lengths), length=length, stride=stride, first_id=END, apart=apart)


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("length", [1, 2, 7, 8, 30, 100])
@pytest.mark.parametrize("lengths", [(1,), (20,), (5, 1, 13), (8, 8), (9,), (16, 3)])
def test_every_token_is_predicted_once_from_what_stands_before_it(
    lengths: tuple[int, ...], length: int, apart: bool
) -> None:
    documents = make_documents(*lengths)
    for stride in sorted({1, length // 2 or 1, length}):
        windows = Windows(documents, length=length, stride=stride, first_id=END, apart=apart)
        predicted: dict[tuple[int, ...], int] = {}
        texts = [[END, *document.ids.tolist()] for document in documents]
        if not apart:
            texts = [[token for text in texts for token in text]]
        for batch in windows:
            for inputs, targets in zip(batch.inputs.tolist(), batch.targets.tolist(), strict=True):
                for place, target in enumerate(targets):
                    if target == NOTHING:
                        continue
                    context = tuple(inputs[: place + 1])
                    ends = [
                        (number, end)
                        for number, text in enumerate(texts)
                        for end in range(1, len(text))
                        if text[end] == target and tuple(text[max(0, end - len(context)) : end]) == context
                    ]
                    assert ends, (context, target)
                    # The shortest contexts may occur twice; then each is found once.
                    found = next(each for each in ends if each not in predicted)
                    predicted[found] = place + 1
        assert len(predicted) == sum(lengths) == windows.num_tokens
        assert windows.num_bytes == 3 * sum(lengths) and windows.num_documents == len(lengths)
        for (_, end), seen in predicted.items():
            assert seen >= min(end, length - stride + 1)


@pytest.mark.parametrize("moe", [None, NOISY_MOE], ids=["dense", "moe"])
@pytest.mark.parametrize("apart", [False, True])
def test_it_is_the_loss_of_each_token_in_its_window(moe: object, apart: bool) -> None:
    model = make_model(moe=moe, dropout=0.5).train()
    documents = make_documents(23, 5, 9)
    windows = Windows(documents, length=10, stride=4, first_id=END, apart=apart)
    result = measure_perplexity(model, windows, device=CPU)
    assert model.training
    model.eval()
    losses = []
    texts = [np.concatenate([[END], document.ids]) for document in documents]
    for text in texts if apart else [np.concatenate(texts)]:
        tokens = torch.from_numpy(text.astype(np.int64))
        for target in range(1, len(tokens)):
            if tokens[target] == END:
                continue
            # The first window that holds the target: it starts at the smallest multiple of the stride that reaches it.
            start = max(0, -(-(target - 10) // 4) * 4)
            with torch.no_grad():
                logits = model.logits(model(tokens[None, start:target]).hidden[0, -1:])
            losses.append(F.cross_entropy(logits, tokens[target : target + 1]).item())
    assert result.num_tokens == len(losses) == 37
    assert result.loss == pytest.approx(sum(losses) / 37, rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(result.loss))
    assert result.bits_per_byte == pytest.approx(result.loss / math.log(2) / 3)


def test_it_is_the_same_every_time_and_draws_nothing() -> None:
    model, windows = make_model(moe=NOISY_MOE, dropout=0.5).train(), make_windows(50, 20)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = measure_perplexity(model, windows, device=CPU)
    assert torch.equal(torch.get_rng_state(), before)
    assert measure_perplexity(model, windows, device=CPU) == first
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_model_compared_with_itself_agrees_wholly() -> None:
    model, windows = make_model(), make_windows(60)
    reference = record_reference(model, windows, device=CPU)
    assert reference.perplexity == measure_perplexity(model, windows, device=CPU)
    result = compare(model, reference, windows, device=CPU)
    assert result.perplexity == reference.perplexity
    assert result.kl == pytest.approx(0.0, abs=1e-6) and result.top1_agreement == 1.0


def test_two_models_are_as_far_apart_as_their_distributions() -> None:
    first, second = make_model(0), make_model(1)
    windows = make_windows(40, length=64, stride=64)  # one window
    result = compare(second, record_reference(first, windows, device=CPU), windows, device=CPU)
    (batch,) = windows
    with torch.no_grad():
        p, q = (torch.log_softmax(model.logits(model(batch.inputs).hidden[0]), -1) for model in (first, second))
    assert result.kl == pytest.approx(F.kl_div(q, p, reduction="batchmean", log_target=True).item(), rel=1e-4)
    assert result.top1_agreement == pytest.approx((p.argmax(-1) == q.argmax(-1)).double().mean().item())
    assert result.perplexity == measure_perplexity(second, windows, device=CPU)


@pytest.mark.parametrize(
    ("length", "stride", "message"),
    [
        (0, 1, r"window \(0\) is less than 1; .*; use the sequence length"),
        (8, 0, r"stride \(0\) is not from 1 to the window \(8\); .*; use 4"),
        (8, 9, r"stride \(9\) is not from 1"),
    ],
)
def test_windows_that_would_stand_still_or_leave_tokens_out_are_refused(length: int, stride: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_windows(5, length=length, stride=stride)


def test_text_and_the_shards_made_of_it_are_the_same_documents(tiny_data: Path) -> None:
    shards = ShardSet.open(tiny_data)
    tokenizer = shards.load_tokenizer()
    train = read_documents(tiny_data, tokenizer, split="train")
    validation = read_documents(tiny_data, tokenizer)
    assert len(validation) == shards.manifest.validation.num_documents
    assert sum(document.num_bytes for document in train) == shards.manifest.train.num_bytes
    texts = [json.loads(line)["text"] for line in (tiny_data.parent / "text.jsonl").read_text().splitlines()]
    from_text = read_documents(tiny_data.parent / "text.jsonl", tokenizer)
    assert [tokenizer.decode(document.ids.tolist()) for document in from_text] == texts
    assert [document.num_bytes for document in from_text] == [len(text.encode()) for text in texts]
    both = [document.ids.tolist() for document in train + validation]
    assert sorted(both) == sorted(document.ids.tolist() for document in from_text)


@pytest.mark.parametrize("apart", [False, True])
def test_each_text_stands_behind_the_begin_token_where_the_tokenizer_puts_one(
    make_config: Any, tmp_path: Path, beginning_tokenizer: Tokenizer, apart: bool
) -> None:
    config = make_config()
    model = Transformer(config.model).initialize(0)
    loaded = LoadedModel(model, beginning_tokenizer, config, None, CPU)  # type: ignore[arg-type]
    texts = ["The License", "the Work"]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    windows = text_windows(loaded, tmp_path / "text.jsonl", window=32, stride=32, apart=apart)
    encoded = [beginning_tokenizer.encode_prompt(text, add_special_tokens=True) for text in texts]
    (batch,) = windows
    found = batch.inputs.tolist()
    if apart:
        assert sorted(row[: len(ids) - 1] for row, ids in zip(found, encoded, strict=True)) == sorted(
            ids[:-1] for ids in encoded
        )
    else:
        assert found == [[*encoded[0], *encoded[1][:-1]]]
    predicted = [token for ids in encoded for token in ids[1:]]
    assert sorted(batch.targets[batch.targets != NOTHING].tolist()) == sorted(predicted)


def test_a_long_text_file_is_one_document(tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moesaic.data.sources.MAX_DOCUMENT_CHARS", 100)
    tokenizer = ShardSet.open(tiny_data).load_tokenizer()
    text = "One sentence — with a dash.\n\n" * 30
    (tmp_path / "long.txt").write_text(text, encoding="utf-8")
    (document,) = read_documents(tmp_path / "long.txt", tokenizer)
    assert tokenizer.decode(document.ids.tolist()) == text and document.num_bytes == len(text.encode())


def test_a_lone_surrogate_is_measured_as_prepare_mends_it(tiny_data: Path, tmp_path: Path) -> None:
    tokenizer = ShardSet.open(tiny_data).load_tokenizer()
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": "hello \ud83d world"}))
    (document,) = read_documents(tmp_path / "text.jsonl", tokenizer)
    assert tokenizer.decode(document.ids.tolist()) == "hello \ufffd world"
    assert document.num_bytes == len("hello \ufffd world".encode())


def test_a_limit_cuts_tokens_and_bytes(tiny_data: Path) -> None:
    tokenizer = ShardSet.open(tiny_data).load_tokenizer()
    whole = read_documents(tiny_data, tokenizer)
    count = len(whole[0].ids) + 2
    first, second = read_documents(tiny_data, tokenizer, limit_tokens=count)
    assert first.num_bytes == whole[0].num_bytes and len(second.ids) == 2
    assert second.num_bytes == len(tokenizer.decode(whole[1].ids[:2].tolist()).encode())
    with pytest.raises(ConfigError, match=r"limit_tokens \(0\)"):
        read_documents(tiny_data, tokenizer, limit_tokens=0)


def test_text_that_cannot_be_measured_is_an_error(tiny_data: Path, tmp_path: Path) -> None:
    tokenizer = ShardSet.open(tiny_data).load_tokenizer()
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(DataError, match=r"holds no text; .*; name another"):
        read_documents(tmp_path / "empty.txt", tokenizer)
    with pytest.raises(DataError, match="does not exist"):
        read_documents(tmp_path / "absent.txt", tokenizer)
    other = type(tokenizer).train(["a b c d e f g h i j"], vocab_size=258)
    with pytest.raises(DataError, match="did not write the shards"):
        read_documents(tiny_data, other)


def test_a_run_is_measured_as_it_was_trained_unless_told_otherwise(make_config: Any, tiny_data: Path) -> None:
    config = make_config(data={"document_mask": True})
    tokenizer = ShardSet.open(tiny_data).load_tokenizer()
    loaded = LoadedModel(Transformer(config.model).initialize(0), tokenizer, config, None, CPU)  # type: ignore[arg-type]
    windows = text_windows(loaded, tiny_data)
    assert (windows.length, windows.stride) == (16, 8)
    packed = text_windows(loaded, tiny_data, window=32, stride=32, apart=False)
    assert (packed.length, packed.stride, packed.num_tokens) == (32, 32, windows.num_tokens)

    def borders(each: Windows) -> int:
        """End-of-text tokens amid what a window predicts."""
        is_end = [batch.inputs[:, 1:] == tokenizer.end_of_text_id for batch in each]
        followed = [batch.targets[:, 1:] != NOTHING for batch in each]
        return sum(int((a & b).sum()) for a, b in zip(is_end, followed, strict=True))

    assert borders(windows) == 0 < borders(packed)
    with pytest.raises(ConfigError, match=r"window \(33\) is more than the 32 positions .*; use 16"):
        text_windows(loaded, tiny_data, window=33)
