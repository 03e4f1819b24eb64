"""An engine that repeats its prompts, can be made slow, stopped and broken: what a real one cannot be asked for."""

import threading
from collections.abc import Generator, Sequence

import torch
from torch import Tensor

from moesaic.config.serve import Sampling
from moesaic.data.tokenizer import Tokenizer
from moesaic.errors import GenerationError
from moesaic.serve.outputs import EngineStats, GeneratedToken, RequestOutput


class FakeEngine:
    """Gives one token of each text a step: the prompt's, over and over."""

    def __init__(self, tokenizer: Tokenizer | None = None, *, max_length: int = 64) -> None:
        self.max_length = max_length
        self.go = threading.Event()  # steps wait for it
        self.go.set()
        self.num_failing_steps = 0
        self.is_abort_broken = False
        self.aborted: list[str] = []
        self.threads: set[int] = set()
        self.num_steps = 0
        self.embedded: list[tuple[int, int]] = []  # of each piece: the text's length and the steps before
        self.num_closed = 0  # embeddings that were given up within a text
        self.running: dict[str, tuple[list[int], Sampling, int]] = {}
        self._tokenizer = tokenizer

    @property
    def has_work(self) -> bool:
        return bool(self.running)

    def add_request(
        self, prompt: Sequence[int], sampling: Sampling, *, request_id: str | None = None, priority: int = 0
    ) -> str:
        self.threads.add(threading.get_ident())
        if len(prompt) > self.max_length:
            raise GenerationError(f"{len(prompt)} tokens; at most {self.max_length} are taken; shorten it.")
        assert request_id is not None and request_id not in self.running
        self.running[request_id] = (list(prompt), sampling, 0)
        return request_id

    def add_requests(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, *, request_ids: Sequence[str], priority: int = 0
    ) -> None:
        added = []
        try:
            for request_id, prompt in zip(request_ids, prompts, strict=True):
                added.append(self.add_request(prompt, sampling, request_id=request_id, priority=priority))
        except GenerationError:
            for request_id in added:
                del self.running[request_id]
            raise

    def step(self) -> list[RequestOutput]:
        self.threads.add(threading.get_ident())
        self.go.wait()
        self.num_steps += 1
        if self.num_failing_steps > 0:
            self.num_failing_steps -= 1
            raise RuntimeError("the fake engine was told to fail")
        outputs = []
        for request_id, (prompt, sampling, count) in list(self.running.items()):
            token, is_last = prompt[count % len(prompt)], count + 1 >= sampling.max_tokens
            self.running[request_id] = (prompt, sampling, count + 1)
            if is_last:
                del self.running[request_id]
            text = "" if self._tokenizer is None else self._tokenizer.decode([token])
            for index in range(sampling.n):
                outputs.append(
                    RequestOutput(
                        request_id=request_id,
                        index=index,
                        text=text,
                        tokens=(GeneratedToken(token),),
                        finish_reason="length" if is_last else None,
                        stop_reason=None,
                        message=None,
                        prompt_logprobs=None,
                        prompt_tokens=len(prompt),
                        cached_tokens=0,
                        completion_tokens=count + 1,
                    )
                )
        return outputs

    def abort(self, request_id: str) -> bool:
        if self.is_abort_broken:
            raise RuntimeError("the fake engine cannot abort")
        self.aborted.append(request_id)
        return self.running.pop(request_id, None) is not None

    def embed_in_pieces(self, prompts: Sequence[Sequence[int]]) -> Generator[bool, None, Tensor]:
        """A piece for every eight tokens of a text."""
        for each in prompts:
            for start in range(0, len(each), 8):
                if start:
                    try:
                        yield False
                    except GeneratorExit:
                        self.num_closed += 1
                        raise
                self.threads.add(threading.get_ident())
                self.embedded.append((len(each), self.num_steps))
            yield True
        return torch.nn.functional.normalize(torch.tensor([[float(len(each)), 1.0] for each in prompts]), dim=-1)

    def stats(self) -> EngineStats:
        self.threads.add(threading.get_ident())
        return EngineStats(
            is_batch_invariant=True, num_running=len(self.running), num_waiting=0,
            kv_blocks_used=0, kv_blocks_cached=0, kv_blocks_total=1,
            num_steps=self.num_steps, num_own_steps=self.num_steps, num_prompt_tokens=0, num_cached_tokens=0,
            num_generated_tokens=0, num_preemptions=0, num_finished=0, num_by_student=None, num_drafted_tokens=0,
            num_accepted_tokens=0, step_seconds=0.0, step_tokens=0, distinct_experts_per_step=0.0,
            distinct_experts=0.0, expert_bytes_used=0, expert_hit_rate=None, expert_guess_share=None, layers=(),
        )  # fmt: skip
