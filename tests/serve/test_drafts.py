"""What n-grams of a text propose is what stands behind the longest of its last tokens that stood there before."""

import random

import pytest

from moesaic.serve.drafts import NgramDraft, Wanted
from moesaic.serve.sampler import Sampling, SamplingState
from moesaic.serve.scheduler import Sequence

STATE = SamplingState(Sampling(), [0], vocab_size=1, seed=0)  # a text's own tokens do not depend on it


def defined(tokens: list[int], count: int) -> tuple[int, ...]:
    """The last place of the text's last four tokens before its end, else of the last three, else of two."""
    for length in (4, 3, 2):
        for place in range(len(tokens) - 1, length - 1, -1):
            if len(tokens) >= length and tokens[place - length : place] == tokens[-length:]:
                return tuple(tokens[place : place + count])
    return ()


@pytest.mark.parametrize("vocabulary", [1, 2, 3, 8])
def test_proposals_are_those_defined_however_a_text_grows(vocabulary: int) -> None:
    generator, draft = random.Random(vocabulary), NgramDraft()
    text = [generator.randrange(vocabulary) for _ in range(generator.randrange(1, 4))]
    sequence = Sequence(tokens=text, num_prompt=1, priority=0, arrival=0)
    num_proposed = 0
    while len(text) < 150:
        wanted = Wanted(sequence, STATE, count=3)
        draft.catch_up([wanted])
        proposed = draft.propose([wanted])[0]
        assert proposed == defined(text, 3), text
        num_proposed += bool(proposed)
        text += [generator.randrange(vocabulary) for _ in range(generator.randrange(1, 4))]
    assert num_proposed > 10
    draft.forget(sequence)


def test_a_pair_that_is_everywhere_is_looked_at_so_often_and_no_more() -> None:
    """Of 100,000 places of "0 1", none of which agrees further, the last ones decide."""
    text = [token for number in range(100_000) for token in (2 + number, 0, 1)]
    sequence = Sequence(tokens=[*text, -1, 0, 1], num_prompt=1, priority=0, arrival=0)
    draft, wanted = NgramDraft(), Wanted(sequence, STATE, count=2)
    draft.catch_up([wanted])
    looked_at: list[int] = []

    class Counted(list[int]):
        def __getitem__(self, index):  # type: ignore[no-untyped-def]
            looked_at.append(1)
            return super().__getitem__(index)

    sequence.tokens = Counted(sequence.tokens)
    assert draft.propose([wanted]) == [(-1, 0)]
    assert len(looked_at) < 1000
