"""A model and its student behind one engine's face: under overload, new requests are the student's."""

from collections.abc import Generator, Sequence
from dataclasses import replace

from torch import Tensor

from moesaic.config.serve import EngineConfig, Sampling
from moesaic.errors import ConfigError
from moesaic.logs import logger
from moesaic.model.packed_file import read_ahead_where_short
from moesaic.model.transformer import Transformer
from moesaic.serve.engine import Engine, bytes_of_block, kv_budget_bytes
from moesaic.serve.outputs import EngineStats, RequestOutput


def split_memory(
    config: EngineConfig, model: Transformer, student: Transformer, *, draft_model: Transformer | None = None
) -> tuple[EngineConfig, EngineConfig]:
    """Return the configs of a model's engine and of its student's, which keeps to the same memory and drafts nothing.

    Each has as many blocks as the other, and those of both fit into kv_cache_bytes.

    Raises: ConfigError where there is no room for one block of each.
    """
    longest = config.max_length and min(config.max_length, student.config.max_positions)
    others = config.replace(speculation=None, max_length=longest)  # what is too long for it waits for the model
    sizes = bytes_of_block(model, draft_model, config), bytes_of_block(student, None, others)
    budget = kv_budget_bytes(model, config)
    count = budget // sum(sizes)
    if not count:
        raise ConfigError(
            f"kv_cache_bytes ({budget}) is less than what one block of {config.block_size} positions of the model "
            f"takes ({sizes[0]}) and one of the student that helps out ({sizes[1]}); both need room; raise it."
        )
    return config.replace(kv_cache_bytes=count * sizes[0]), others.replace(kv_cache_bytes=count * sizes[1])


class EngineWithStudent:
    """An engine that hands requests to another one while it has much to do.

    Requests that come together stay together, with the engine that they were given to; both step in turn, in the
    caller's thread.
    """

    def __init__(self, engine: Engine, student: Engine, *, max_texts: int) -> None:
        """max_texts: while so many texts of the engine run or wait, new requests are the student's."""
        assert max_texts >= 1, max_texts
        self._engine, self._student, self._max_texts = engine, student, max_texts
        read_ahead_where_short((*engine.models, *student.models), engine.kv_bytes + student.kv_bytes)

    @property
    def has_work(self) -> bool:
        return self._engine.has_work or self._student.has_work

    def add_requests(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, *, request_ids: Sequence[str], priority: int = 0
    ) -> None:
        """As Engine.add_requests, to one engine: not to the student where a prompt is too long for it."""
        is_much = self._engine.num_texts >= self._max_texts
        fits = all(len(prompt) + sampling.max_tokens <= self._student.max_length for prompt in prompts)
        engine, other = (self._student, self._engine) if is_much and fits else (self._engine, self._student)
        if any(other.has_request(each) for each in request_ids):
            engine = other  # which refuses it
        engine.add_requests(prompts, sampling, request_ids=request_ids, priority=priority)

    def abort(self, request_id: str) -> bool:
        """As Engine.abort."""
        return self._engine.abort(request_id) or self._student.abort(request_id)

    def step(self) -> list[RequestOutput]:
        """Step each engine that has work; the student's outputs say so.

        A student whose step fails ends its own requests with an error; the model's go on.
        """
        outputs = self._engine.step() if self._engine.has_work else []
        if self._student.has_work:
            outputs = outputs + [replace(output, is_by_student=True) for output in self._step_student()]
        return outputs

    def _step_student(self) -> list[RequestOutput]:
        try:
            return self._student.step()
        except Exception as error:  # whatever it is, what the model has done is to be told
            logger.exception("a step of the student failed; the %d texts in it are ended.", self._student.num_texts)
            return self._student.end_all(
                f"a step of the student that helps out failed ({type(error).__name__}); it is in the server's log; try "
                f"again"
            )

    def stats(self) -> EngineStats:
        """Return the figures of both together; the last step and the layers are the model's (EngineStats)."""
        own, other = self._engine.stats(), self._student.stats()
        counted = (
            "num_running", "num_waiting", "kv_blocks_used", "kv_blocks_cached", "kv_blocks_total", "num_steps",
            "num_prompt_tokens", "num_cached_tokens", "num_generated_tokens", "num_preemptions", "num_finished",
            "distinct_experts", "expert_bytes_used",
        )  # fmt: skip
        both = {name: getattr(own, name) + getattr(other, name) for name in counted}
        is_invariant = own.is_batch_invariant and other.is_batch_invariant
        return replace(
            own, **both, is_batch_invariant=is_invariant, num_by_student=other.num_finished, expert_hit_rate=None
        )

    def embed_in_pieces(self, prompts: Sequence[Sequence[int]]) -> Generator[bool, None, Tensor]:
        """As Engine.embed_in_pieces, always by the model itself."""
        return self._engine.embed_in_pieces(prompts)
