"""Encoding texts in several processes, in order and with bounded memory. No files and no shards here.

The processes are plain children that run this module and speak over pipes, rather than multiprocessing's: they never
import the caller's main script (so no `if __name__ == "__main__"` is asked of it, and notebooks work), and they end by
themselves when the parent is killed, because their pipe closes.
"""

import os
import pickle
import queue
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from moesaic.data.cut import cut_text
from moesaic.data.tokenizer import Tokenizer
from moesaic.errors import DataError

# Encoding takes about 150 bytes of memory per byte of text at a time. Short pieces are faster too, since more stays in
# the cache: 6.2 MB/s per core against 5.7 for 64 Ki and clearly less for 1 Mi (2-core Xeon, tokenizers 0.23).
_PIECE_CHARS = 16 * 1024

Tokens = npt.NDArray[np.unsignedinteger]
T = TypeVar("T")


def token_dtype(vocab_size: int) -> str:
    """Return the smallest type that holds every token id."""
    return "uint16" if vocab_size <= 2**16 else "uint32"


def cut_for(tokenizer: Tokenizer, text: str, limit_chars: int) -> Iterator[str]:
    """Yield pieces of at most limit_chars to be encoded apart, or all of it where the tokens would not be the same."""
    return cut_text(text, limit_chars) if tokenizer.may_be_cut else iter([text])


def encode_text(tokenizer: Tokenizer, text: str, *, dtype: str) -> Tokens:
    """Return a text's tokens, encoded in pieces, where it may be cut, so that a long one takes no more memory."""
    pieces = [np.asarray(tokenizer.encode(piece), dtype=dtype) for piece in cut_for(tokenizer, text, _PIECE_CHARS)]
    return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


class EncoderPool:
    """Child processes that encode. Use as a context manager; leaving it ends them."""

    def __init__(self, tokenizer: Tokenizer, *, num_workers: int) -> None:
        assert num_workers >= 1, num_workers
        self._hello = (tokenizer.json_text, tokenizer.companions, token_dtype(tokenizer.vocab_size))
        self._num_workers = num_workers
        self._workers: list[subprocess.Popen[bytes]] = []
        self._idle: queue.SimpleQueue[subprocess.Popen[bytes]] = queue.SimpleQueue()
        self._greeted: set[int] = set()

    def __enter__(self) -> "EncoderPool":
        root = str(Path(__file__).resolve().parents[2])
        search_path = os.pathsep.join(part for part in (root, os.environ.get("PYTHONPATH")) if part)
        # One process per core already: the library's own threads would only get in each other's way.
        environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": search_path}
        # -P: the user's current folder must not shadow modules.
        command = [sys.executable, "-P", "-m", __name__]
        for _ in range(self._num_workers):
            worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
            self._workers.append(worker)
            self._idle.put(worker)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in self._workers:
            if error is not None:
                worker.kill()
            assert worker.stdin is not None and worker.stdout is not None
            with suppress(BrokenPipeError):  # it has ended before us, which encode() has reported
                worker.stdin.close()
            worker.wait()
            worker.stdout.close()
        self._workers.clear()

    def encode(self, batches: Iterable[tuple[list[str], T]]) -> Iterator[tuple[list[Tokens], T]]:
        """Yield each batch's tokens, text by text, with what came along, in the order of the batches.

        At most two batches per process are read ahead.

        Raises: DataError when a process ends before its time, for example for lack of memory.
        """
        pending: deque[tuple[Future[list[Tokens]], T]] = deque()
        executor = ThreadPoolExecutor(self._num_workers, thread_name_prefix="encode")
        try:
            for texts, companion in batches:
                pending.append((executor.submit(self._request, texts), companion))
                if len(pending) > 2 * self._num_workers:
                    future, companion = pending.popleft()
                    yield future.result(), companion
            while pending:
                future, companion = pending.popleft()
                yield future.result(), companion
        finally:
            executor.shutdown(wait=True, cancel_futures=True)

    def _request(self, texts: list[str]) -> list[Tokens]:
        worker = self._idle.get()
        assert worker.stdin is not None and worker.stdout is not None
        try:
            if worker.pid not in self._greeted:
                self._greeted.add(worker.pid)
                pickle.dump(self._hello, worker.stdin)
            pickle.dump(texts, worker.stdin)
            worker.stdin.flush()
            tokens: list[Tokens] = pickle.load(worker.stdout)
            return tokens
        except (EOFError, OSError, pickle.UnpicklingError):
            status = worker.wait()
            raise DataError(
                f"an encoding process ended before its time (exit status {status}); it must live until all is encoded; "
                f"if memory ran out, use fewer workers; run the same command again: it continues where it stopped."
            ) from None
        finally:
            self._idle.put(worker)


def _serve() -> None:
    """Encode what comes over standard input until it closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever prints must not end up among the replies
    requests = sys.stdin.buffer
    try:
        json_text, companions, dtype = pickle.load(requests)
        tokenizer = Tokenizer(json_text, companions=companions)
        while True:
            texts = pickle.load(requests)
            pickle.dump([encode_text(tokenizer, text, dtype=dtype) for text in texts], replies, protocol=5)
            replies.flush()
    except (EOFError, BrokenPipeError, pickle.UnpicklingError):
        return  # the parent has closed its end, or was killed in the middle of a request


if __name__ == "__main__":
    _serve()
