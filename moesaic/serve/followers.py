"""Several processes that serve one model: the first has the engine, the others compute its passes with it.

Before each pass the first tells the others what goes into it, tokens and blocks of keys and values, and they do what it
does with a runner of their own: each has all keys and values and some of the experts (parallel/inference.py). They know
nothing of requests, and choose no tokens.
"""

from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from enum import IntEnum

import torch
import torch.distributed as dist

from moesaic.errors import GenerationError
from moesaic.model.transformer import Transformer
from moesaic.parallel.world import World
from moesaic.serve.runner import Embedding, Part, Runner

HAS_FAILED = (
    "a pass on several processes has failed on one of them; all at the same place are required; see what each says, "
    "and start them again."
)
# Between two requests there may be years.
_PATIENCE = timedelta(days=3650)
# Numbers of a message that travel with its head, in one broadcast: a step of some texts of some thousand tokens.
_SHORT = 1022
_DTYPES = (torch.bfloat16, torch.float32, torch.int8)


class _Kind(IntEnum):
    START = 0  # blocks, tokens of one, dtype
    RUN = 1
    EMBED = 2  # tokens that a text has in all
    EMBED_PART = 3  # tokens
    END = 4


class Channel:
    """From the first process to the others. Every process makes one, at the same time."""

    def __init__(self, world: World) -> None:
        self._is_first = world.is_main
        self._group = dist.new_group(backend="gloo", timeout=_PATIENCE)

    def send(self, kind: int, numbers: Sequence[int]) -> None:
        assert self._is_first
        head = torch.zeros(2 + _SHORT, dtype=torch.int64)
        content = torch.tensor(numbers, dtype=torch.int64)
        head[0], head[1] = kind, len(content)
        is_short = len(content) <= _SHORT
        if is_short:
            head[2 : 2 + len(content)] = content
        dist.broadcast(head, src=0, group=self._group)
        if not is_short:
            dist.broadcast(content, src=0, group=self._group)

    def receive(self) -> tuple[int, list[int]]:
        head = torch.empty(2 + _SHORT, dtype=torch.int64)
        dist.broadcast(head, src=0, group=self._group)
        kind, length = head[:2].tolist()
        if length <= _SHORT:
            return kind, head[2 : 2 + length].tolist()
        content = torch.empty(length, dtype=torch.int64)
        dist.broadcast(content, src=0, group=self._group)
        return kind, content.tolist()


class Followers:
    """The other processes, as the first one's runner sees them."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self.has_failed = False  # in the midst of a pass, which the others may still be in

    def start(self, num_blocks: int, *, block_size: int, dtype: torch.dtype) -> None:
        """Have them make runners like this one's."""
        self._channel.send(_Kind.START, [num_blocks, block_size, _DTYPES.index(dtype)])

    @contextmanager
    def running(self, parts: Sequence[Part]) -> Iterator[None]:
        """Have them make a pass while this process makes it too, which alone needs logits."""
        with self._computing(_Kind.RUN, _encode(parts)):
            yield

    def embed(self, length: int) -> None:
        """Have them take a text in, of so many tokens."""
        with self._computing(_Kind.EMBED, [length]):
            pass

    @contextmanager
    def embedding(self, tokens: Sequence[int]) -> Iterator[None]:
        """Have them make a pass over some tokens of the text while this process makes it too."""
        with self._computing(_Kind.EMBED_PART, tokens):
            yield

    def end(self) -> None:
        """Have them end."""
        if not self.has_failed:
            self._channel.send(_Kind.END, [])

    @contextmanager
    def _computing(self, kind: _Kind, numbers: Sequence[int]) -> Iterator[None]:
        if self.has_failed:
            raise GenerationError(HAS_FAILED)
        try:
            self._channel.send(kind, numbers)
            yield
        except BaseException:
            self.has_failed = True
            raise


def follow(model: Transformer, channel: Channel) -> None:
    """Compute what the first process does until it ends."""
    runner: Runner | None = None
    text: Embedding | None = None
    while True:
        kind, numbers = channel.receive()
        if kind == _Kind.START:
            num_blocks, block_size, dtype = numbers
            runner = Runner(model, num_blocks, block_size=block_size, dtype=_DTYPES[dtype])
        elif kind == _Kind.END:
            return
        assert runner is not None
        if kind == _Kind.RUN:
            runner.run(_decode(numbers))
        elif kind == _Kind.EMBED:
            text = runner.start_embedding(numbers[0])
        elif kind == _Kind.EMBED_PART:
            assert text is not None
            text.add(numbers)
            text = None if text.is_complete else text


def _encode(parts: Sequence[Part]) -> "array[int]":
    numbers = array("q", [len(parts)])
    for part in parts:
        numbers.extend((len(part.tokens), part.length, len(part.blocks)))
        numbers.extend(part.tokens)
        numbers.extend(part.blocks.tolist())  # which are no 64-bit numbers
    return numbers


def _decode(numbers: list[int]) -> list[Part]:
    place, parts = 1, []
    for _ in range(numbers[0]):
        num_tokens, length, num_blocks = numbers[place : place + 3]
        tokens_end = place + 3 + num_tokens
        end = tokens_end + num_blocks
        parts.append(Part(numbers[place + 3 : tokens_end], length, array("i", numbers[tokens_end:end])))
        place = end
    return parts
