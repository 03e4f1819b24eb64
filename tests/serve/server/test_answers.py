"""Where the tokens of a text begin, for tokenizers whose first token has a space that the text has not."""

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers

from moesaic.data.tokenizer import Tokenizer
from moesaic.serve.outputs import GeneratedToken
from moesaic.serve.server.answers import Choice, TokenTexts

WORDS = ["▁", "▁the", "the", "▁cat", "c", "a", "t", "s"]


@pytest.fixture(scope="module", params=[True, False])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    """As Llama 2 and Mistral have it, with and without a space before every text."""
    names = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *WORDS]
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        for end in range(1, len(word)):
            names += [piece for piece in (word[:end], word[end]) if piece not in names]
            merges.append((word[:end], word[end]))
        names += [word] if word not in names else []
    vocabulary = {name: token_id for token_id, name in enumerate(dict.fromkeys(names))}
    inner = tokenizers.Tokenizer(
        models.BPE(vocabulary, [pair for pair in merges if "".join(pair) in vocabulary], byte_fallback=True)
    )
    before = [normalizers.Prepend("▁")] if request.param else []
    inner.normalizer = normalizers.Sequence([*before, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if request.param else []
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    inner.add_special_tokens([AddedToken("</s>", special=True, normalized=False)])
    return Tokenizer(inner.to_str())


@pytest.mark.parametrize("prompt", ["the cats", " the", "  cat", "cats", "é the", "東", "s"])
@pytest.mark.parametrize("begins", [True, False])
def test_an_echoed_prompts_tokens_begin_where_they_stand_in_it(tokenizer: Tokenizer, prompt: str, begins: bool) -> None:
    token_ids = ([tokenizer.end_of_text_id] if begins else []) + tokenizer.encode(prompt)
    texts = TokenTexts(tokenizer)
    choice = Choice(index=0, kind="completion", texts=texts, moe_layers=(), has_logprobs=True, has_experts=False)
    choice.echoed = prompt
    found = choice.echo([GeneratedToken(token_id) for token_id in token_ids])["logprobs"]
    offsets = found["text_offset"]
    assert offsets[0] == 0 and offsets == sorted(offsets) and offsets[-1] <= len(prompt)
    for name, offset, end in zip(found["tokens"], offsets, [*offsets[1:], len(prompt)], strict=True):
        if not name.startswith(("bytes:", "</s>")) and offset > 0:
            assert prompt[offset:end] == name
    after = choice.take("s", [GeneratedToken(tokenizer.encode("s")[-1], logprob=-1.0)])
    assert after["logprobs"]["text_offset"] == [len(prompt)]


@pytest.mark.parametrize("chunks", ["whole", "token by token"])
def test_a_run_of_byte_tokens_that_is_no_text_is_a_character_for_each(tokenizer: Tokenizer, chunks: str) -> None:
    """As the decoder has it: of half a character each byte, and the whole character beside it too."""
    a = tokenizer.encode("a")[-1]
    east = tokenizer.encode("東")[-3:]
    assert [tokenizer.is_byte_token(each) for each in (*east, a)] == [True, True, True, False]
    token_ids = [a, *east, a, *east[:2], a, *east, east[0], a, *east, a]
    text = tokenizer.decode(token_ids)
    assert text == "a東a\ufffd\ufffda" + 4 * "\ufffd" + "a東a"
    choice = Choice(
        index=0, kind="completion", texts=TokenTexts(tokenizer), moe_layers=(), has_logprobs=True, has_experts=False
    )
    tokens = [GeneratedToken(token_id, logprob=-1.0) for token_id in token_ids]
    parts = [tokens] if chunks == "whole" else [[token] for token in tokens]
    offsets = [each for part in parts for each in choice.take("", part)["logprobs"]["text_offset"]]
    expected = [0, 1, 1, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 11, 11, 12]
    if chunks == "whole":
        assert offsets == expected
    # What a stream said of a token before the run was broken stays said; what follows is right.
    assert [each for each, token_id in zip(offsets, token_ids, strict=True) if token_id == a] == [0, 2, 5, 10, 12]
    echoed = Choice(
        index=0, kind="completion", texts=TokenTexts(tokenizer), moe_layers=(), has_logprobs=True, has_experts=False
    )
    echoed.echoed = text
    assert echoed.echo(tokens)["logprobs"]["text_offset"] == expected
