"""The engine: requests in, tokens out, one forward pass a step for all that runs.

No threads, processes, signals or globals: whoever holds an engine calls step() while it has work, from one thread.
What the next step computes is decided in scheduler, computed by runner, and turned into tokens by sampler.
"""

import secrets
import time
from collections.abc import Generator, Mapping
from collections.abc import Sequence as Sequence_
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moesaic.config.serve import EngineConfig, Sampling
from moesaic.data.tokenizer import Tokenizer
from moesaic.errors import ConfigError, GenerationError, NotFiniteError
from moesaic.kernels.decode import Decoded
from moesaic.kernels.finite import is_finite
from moesaic.kernels.limits import available_memory_bytes
from moesaic.logs import logger
from moesaic.model.generate import check_token_ids
from moesaic.model.packed_file import read_ahead_where_short
from moesaic.model.transformer import Transformer
from moesaic.serve.depth import DepthChooser
from moesaic.serve.detokenizer import Detokenizer
from moesaic.serve.drafts import Draft, ModelDraft, NgramDraft, Wanted
from moesaic.serve.expert_load import ExpertLoad, token_experts
from moesaic.serve.grammar import Budget, GrammarCompiler, Matcher
from moesaic.serve.kv_blocks import BlockPool
from moesaic.serve.outputs import EngineStats, FinishReason, GeneratedToken, PromptLogprobs, RequestOutput
from moesaic.serve.runner import Others, Part, Runner, block_bytes
from moesaic.serve.sampler import RequestError, RowSampler, SamplingState, score_prompt
from moesaic.serve.scheduler import Scheduled, Scheduler, Sequence

_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "int8": torch.int8}
# Logits of a prompt's tokens are made so many at a time.
_SCORED_ROWS = 64
# Texts embedded between two steps: each is a pass of its own, however short.
_EMBEDDED_TOGETHER = 16


@dataclass(eq=False)
class _Text:
    """One of a request's texts, from its arrival to its last output."""

    request_id: str
    index: int
    sampling: Sampling
    sequence: Sequence
    state: SamplingState
    detokenizer: Detokenizer
    matcher: Matcher | None
    stop_ids: frozenset[int]
    last_length: int
    scored: list[GeneratedToken] = field(default_factory=list)
    has_given_scores: bool = False
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    message: str | None = None
    is_refused: bool = False
    takes_drafts: bool = True
    has_drafted: bool = False

    @property
    def num_generated(self) -> int:
        return len(self.sequence.tokens) - self.sequence.num_prompt


@dataclass(eq=False)
class _Work:
    """A sequence's part of a step, and what it gives: new tokens and characters.

    first_row: of the step's tokens, its first. choosing: those whose logits choose its next tokens, none where it is
    not complete, and first_logits, the place of theirs among all logits of the step.
    """

    part: Scheduled
    text: _Text
    drafted: tuple[int, ...]
    first_row: int
    choosing: range
    first_logits: int
    tokens: list[GeneratedToken] = field(default_factory=list)
    piece: str = ""
    is_spoilt: bool = False  # by a draft whose numbers are none

    @property
    def inputs(self) -> Part:
        """What the model is given."""
        sequence = self.part.sequence
        end = sequence.num_computed + self.part.num_tokens
        tokens = (*sequence.tokens[sequence.num_computed : end], *self.drafted)
        return Part(tokens, end + len(self.drafted), sequence.blocks)

    @property
    def coming(self) -> list[tuple[int, SamplingState, int]]:
        """For RowSampler: those that no grammar has a say in."""
        if self.text.matcher is not None:
            return []
        return [(self.first_logits + number, self.text.state, number) for number in range(len(self.choosing))]


class Engine:
    """Runs many requests on one model at once.

    A request's tokens do not depend on what else runs where is_batch_invariant: then they are the same alone, in a full
    batch, in chunks, preempted, or with a shared beginning. models: it, and one that drafts; kv_bytes: what keys and
    values of all may take.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        config: EngineConfig | None = None,
        *,
        draft_model: Transformer | None = None,
        grammars: GrammarCompiler | None = None,
        others: Others | None = None,
    ) -> None:
        """model, draft_model: put into evaluation mode; the second is the one that config.speculation names, loaded.
        grammars: compiles those of requests; None: they are refused. others: processes that have the model's other
        experts (followers.py).

        Raises: ConfigError for settings that these models or the memory cannot meet.
        """
        config = config or EngineConfig()
        self.config, self.model_config = config, model.config
        _check_draft(config, draft_model)
        dtype = _kv_dtype(model, config)
        if dtype is torch.float32 and model.compute_dtype is not torch.float32:
            raise ConfigError(
                "kv_precision is 'fp32' and the model computes in bf16; its keys and values have no more digits than "
                "that; set it to 'auto', 'bf16' or 'int8'."
            )
        longest = config.max_length or model.config.max_positions
        if longest > model.config.max_positions:
            raise ConfigError(
                f"max_length ({longest}) is more than the model's max_positions ({model.config.max_positions}); a text "
                f"ends where its positions do; lower engine.max_length, or leave it at null for all of them."
            )
        num_blocks = _count_blocks(model, draft_model, config, longest)
        self.max_length = min(longest, num_blocks * config.block_size)
        if self.max_length < longest:
            _tell_short_memory(config, self.max_length, longest)
        self.kv_bytes = num_blocks * bytes_of_block(model, draft_model, config)
        _tell_if_too_much(self.kv_bytes, model.device)
        self.models = (model,) if draft_model is None else (model, draft_model)
        read_ahead_where_short(self.models, self.kv_bytes)
        self.is_batch_invariant = model.runs_in_one_call
        self._tokenizer = tokenizer
        self._runner = Runner(model, num_blocks, block_size=config.block_size, dtype=dtype, others=others)
        self._runner.warm_up(config.max_batch_tokens)
        self._pool = BlockPool(num_blocks, config.block_size)
        self._scheduler = Scheduler(
            self._pool,
            max_sequences=config.max_sequences,
            max_batch_tokens=config.max_batch_tokens,
            prefix_caching=config.prefix_caching,
        )
        self._grammars = grammars
        self._load = ExpertLoad(model, is_alone=draft_model is None)
        self._draft: Draft | None = None
        self._depth: DepthChooser | None = None
        if config.speculation is not None:
            self._depth = DepthChooser(config.speculation.max_tokens)
            if config.speculation.method == "ngram":
                self._draft = NgramDraft()
            else:
                assert draft_model is not None
                self._draft = ModelDraft(
                    draft_model,
                    target=model,
                    num_blocks=num_blocks,
                    block_size=config.block_size,
                    max_length=self.max_length,
                    chunk=config.max_batch_tokens,
                )
        self._texts: dict[Sequence, _Text] = {}  # those that the scheduler has
        self._siblings: dict[Sequence, list[_Text]] = {}  # texts that wait for the first of theirs
        self._requests: dict[str, list[_Text]] = {}  # texts that are going on
        self._pending: list[RequestOutput] = []
        self._num_arrivals = 0
        self._counts = dict.fromkeys(("steps", "prompt", "cached", "generated", "finished", "drafted", "accepted"), 0)
        self._step_seconds, self._step_tokens = 0.0, 0

    @property
    def has_work(self) -> bool:
        return self._scheduler.has_work or bool(self._pending)

    @property
    def num_texts(self) -> int:
        """Texts that run or wait."""
        return sum(len(texts) for texts in self._requests.values())

    def has_request(self, request_id: str) -> bool:
        """Whether a request of that id is going on, or its end is still to be told."""
        return request_id in self._requests or any(output.request_id == request_id for output in self._pending)

    def add_request(
        self, prompt: Sequence_[int], sampling: Sampling, *, request_id: str | None = None, priority: int = 0
    ) -> str:
        """Take a prompt's token ids in, to be continued; return the request's id.

        priority: lower comes first, and may make others wait that have begun.

        Raises: ConfigError or GenerationError for what this engine could never serve; nothing is changed then.
        """
        request_id = secrets.token_hex(8) if request_id is None else request_id
        if type(priority) is not int:
            raise ConfigError(
                f"the priority is {priority!r} ({type(priority).__name__}); an int is required, the lower the sooner; "
                f"give 0 for none."
            )
        if not isinstance(sampling, Sampling):
            raise ConfigError(
                f"sampling is {sampling!r} ({type(sampling).__name__}); a moesaic.config.serve.Sampling is required; "
                f"give Sampling(max_tokens=...), say."
            )
        if self.has_request(request_id):
            raise ConfigError(f"the request id {request_id!r} is in use; every request needs its own; leave it out.")
        self._check_prompt(prompt, sampling)
        matchers = self._matchers(sampling)
        own_stops = frozenset() if sampling.ignore_end_of_text else self._tokenizer.stop_ids
        stop_ids = own_stops | frozenset(sampling.stop_token_ids)
        seed = secrets.randbits(62) if sampling.seed is None else sampling.seed
        vocab_size = self.model_config.vocab_size
        texts = []
        for index in range(sampling.n):
            state = SamplingState(sampling, prompt, vocab_size=vocab_size, seed=seed + index, stop_ids=stop_ids)
            sequence = Sequence(
                tokens=[int(token) for token in prompt],  # NumPy's are no JSON
                num_prompt=len(prompt),
                priority=priority,
                arrival=self._num_arrivals,
                may_find_prefix=sampling.prompt_logprobs is None or index > 0,
            )
            self._num_arrivals += 1
            texts.append(
                _Text(
                    request_id=request_id,
                    index=index,
                    sampling=sampling,
                    sequence=sequence,
                    state=state,
                    detokenizer=Detokenizer(
                        self._tokenizer, prompt=prompt, stop=sampling.stop, min_tokens=sampling.min_tokens
                    ),
                    matcher=matchers[index],
                    stop_ids=stop_ids,
                    last_length=min(self.max_length, len(prompt) + sampling.max_tokens),
                )
            )
        self._requests[request_id] = list(texts)
        # The first computes the prompt, the others find its blocks.
        self._submit(texts[0])
        if len(texts) > 1:
            self._siblings[texts[0].sequence] = texts[1:]
        return request_id

    def add_requests(
        self, prompts: Sequence_[Sequence_[int]], sampling: Sampling, *, request_ids: Sequence_[str], priority: int = 0
    ) -> None:
        """Take several prompts in as add_request does, all or none; raises what it does."""
        if len(request_ids) != len(prompts) or len(set(request_ids)) < len(prompts):
            raise ConfigError(
                f"{len(prompts)} prompts were given with the request ids {list(request_ids)}; every prompt needs one "
                f"of its own; give as many, all different."
            )
        finished = self._counts["finished"]
        added: set[str] = set()
        try:
            for request_id, prompt in zip(request_ids, prompts, strict=True):
                added.add(self.add_request(prompt, sampling, request_id=request_id, priority=priority))
        except BaseException:
            for request_id in added:
                self.abort(request_id)
            # They have never been here.
            self._pending = [output for output in self._pending if output.request_id not in added]
            self._counts["finished"] = finished
            raise

    def _matchers(self, sampling: Sampling) -> list[Matcher | None]:
        """One for each text; None without a grammar."""
        if sampling.grammar is None:
            return [None] * sampling.n
        if self._grammars is None:
            raise ConfigError(
                "a grammar is given and this engine compiles none; a GrammarCompiler is required; make the engine with "
                "one, or leave the grammar out."
            )
        grammar = self._grammars.compile(sampling.grammar)
        # A text that matches ends, whatever else is ignored.
        stop_ids = self._tokenizer.stop_ids | frozenset(sampling.stop_token_ids)
        budget = Budget()
        return [grammar.matcher(stop_ids=stop_ids, budget=budget) for _ in range(sampling.n)]

    def abort(self, request_id: str) -> bool:
        """End a request now; the next step tells so of its unfinished texts. False where there is none of that id."""
        if request_id not in self._requests:
            return False
        self._end_request(request_id, "abort")
        return True

    def reset_prefix_cache(self) -> None:
        """Forget the keys and values of earlier prompts: the model's weights have changed, so they are another's.

        Raises: GenerationError while requests run, whose keys and values are of the weights before.
        """
        if self.has_work:
            raise GenerationError(
                f"the prefix cache was to be reset while {self.num_texts} texts are at work; their keys and values are "
                f"of the weights before; step until has_work is False, or abort them first."
            )
        self._scheduler.pool.forget_all()
        if self._draft is not None:
            self._draft.reset()

    def end_all(self, message: str) -> list[RequestOutput]:
        """End every request now, with an error; return what a step would have. For an engine whose step has failed."""
        for request_id in list(self._requests):
            self._end_request(request_id, "error", message)
        outputs, self._pending = self._pending, []
        return outputs

    def step(self) -> list[RequestOutput]:
        """Compute the next tokens of what runs, and return what became of each text that moved; [] where none did.

        Raises: GenerationError for a model that somebody has put into training mode; its requests are kept.
        """
        if self._runner.model.training:
            raise GenerationError(
                "the engine's model is in training mode; an engine computes in evaluation mode; call model.eval(), and "
                "reset_prefix_cache() where its weights have changed."
            )
        self._compute_step()  # what it raises leaves what is pending to the next one
        outputs, self._pending = self._pending, []
        return outputs

    def _compute_step(self) -> None:
        start = time.perf_counter()
        parts = self._scheduler.schedule(self._plan_drafts())
        if not parts:
            return
        drafted = self._propose(parts)
        drafting_seconds = time.perf_counter() - start
        step = self._plan_step(parts, drafted)
        decoded = self._runner.run([work.inputs for work in step], [row for work in step for row in work.choosing])
        self._load.add(decoded)
        _find_broken(step, decoded)
        sampler = RowSampler(decoded, [coming for work in step for coming in work.coming])
        for work in step:
            self._score_prompt(work, decoded)
            self._choose_tokens(work, sampler, decoded)
            self._pending += self._advance(work)
        self._counts["steps"] += 1
        self._step_tokens, _ = decoded.sizes
        self._step_seconds = time.perf_counter() - start
        if self._depth is not None and all(part.num_tokens == 1 for part in parts):
            self._depth.record_step(self._step_tokens, self._step_seconds - drafting_seconds)

    def _plan_step(self, parts: list[Scheduled], drafted: Mapping[Sequence, tuple[int, ...]]) -> list[_Work]:
        step, first_row, first_logits = [], 0, 0
        for part in parts:
            text, own = self._texts[part.sequence], drafted.get(part.sequence, ())
            last, end = first_row + part.num_tokens - 1, first_row + part.num_tokens + len(own)
            is_chosen = part.is_last and text.sampling.max_tokens > 0
            choosing = range(last, end) if is_chosen else range(0)
            step.append(_Work(part, text, own, first_row, choosing, first_logits))
            first_row, first_logits = end, first_logits + len(choosing)
        return step

    def _plan_drafts(self) -> dict[Sequence, int]:
        """How many tokens to draft for each sequence that generates."""
        if self._depth is None:
            return {}
        generating = [
            sequence
            for sequence in self._scheduler.running
            if sequence.num_missing == 1 and self._texts[sequence].takes_drafts
        ]
        depth = self._depth.choose(len(generating))
        # Of the tokens that are left to a text, the last needs no draft.
        room = {each: self._texts[each].last_length - len(each.tokens) - 1 for each in generating}
        return {each: min(depth, left) for each, left in room.items() if min(depth, left) > 0}

    def _propose(self, parts: list[Scheduled]) -> dict[Sequence, tuple[int, ...]]:
        """Draft tokens for the parts that have room for some."""
        wanted = [
            Wanted(part.sequence, self._texts[part.sequence].state, part.num_drafted)
            for part in parts
            if part.num_drafted
        ]
        if not wanted:
            return {}
        assert self._draft is not None and self._depth is not None
        start = time.perf_counter()
        self._draft.catch_up(wanted)
        caught_up = time.perf_counter()
        proposed = self._draft.propose(wanted)
        depth = max(len(tokens) for tokens in proposed)
        self._depth.record_draft(len(wanted), depth, time.perf_counter() - caught_up, missed_seconds=caught_up - start)
        return {each.sequence: tokens for each, tokens in zip(wanted, proposed, strict=True)}

    def stats(self) -> EngineStats:
        counts = self._counts
        return EngineStats(
            is_batch_invariant=self.is_batch_invariant,
            num_running=len(self._scheduler.running),
            num_waiting=self._scheduler.num_waiting + sum(len(texts) for texts in self._siblings.values()),
            kv_blocks_used=self._pool.num_used,
            kv_blocks_cached=self._pool.num_cached,
            kv_blocks_total=self._pool.num_blocks,
            num_steps=counts["steps"],
            num_own_steps=counts["steps"],
            num_prompt_tokens=counts["prompt"],
            num_cached_tokens=counts["cached"],
            num_generated_tokens=counts["generated"],
            num_preemptions=self._scheduler.num_preemptions,
            num_finished=counts["finished"],
            num_by_student=None,
            num_drafted_tokens=counts["drafted"],
            num_accepted_tokens=counts["accepted"],
            step_seconds=self._step_seconds,
            step_tokens=self._step_tokens,
            distinct_experts_per_step=self._load.distinct_experts_per_step,
            distinct_experts=self._load.distinct_experts,
            expert_bytes_used=self._load.bytes_used,
            expert_hit_rate=self._load.hit_rate,
            expert_guess_share=self._runner.model.guessed_share,
            layers=self._load.layers(),
        )

    def embed(self, prompts: Sequence_[Sequence_[int]]) -> Tensor:
        """Return a vector of unit length for each text: (n, H) fp32, the mean of its final hidden states.

        Raises: GenerationError as add_request; NotFiniteError where the model gives no numbers.
        """
        pieces = self.embed_in_pieces(prompts)
        while True:
            try:
                next(pieces)
            except StopIteration as end:
                return end.value

    def embed_in_pieces(self, prompts: Sequence_[Sequence_[int]]) -> Generator[bool, None, Tensor]:
        """Compute what embed returns, so that steps can come between its pieces.

        It stops after max_batch_tokens computed tokens at the latest, after some texts however short they are, and at
        times while it checks, and says whether it is between two texts: else it holds keys and values, of one.

        Raises: as embed; nothing is computed before all prompts are checked.
        """
        most_tokens = self.config.max_batch_tokens
        num_checked = 0
        for prompt in prompts:
            if num_checked > most_tokens:
                yield True
                num_checked = 0
            self._check_prompt(prompt, Sampling(max_tokens=0))
            num_checked += len(prompt)
        if not prompts:
            return torch.empty(0, self.model_config.hidden_size, dtype=torch.float32, device="cpu")
        vectors: list[Tensor] = []
        num_texts = num_tokens = 0  # since it last stopped
        for prompt in prompts:
            if num_texts == _EMBEDDED_TOGETHER or (num_texts and num_tokens + len(prompt) > most_tokens):
                yield True
                num_texts = num_tokens = 0
            vectors.append((yield from self._runner.embed(prompt, chunk=most_tokens)))
            self._counts["prompt"] += len(prompt)
            num_texts, num_tokens = num_texts + 1, num_tokens + len(prompt)
        found = torch.nn.functional.normalize(torch.stack(vectors), dim=-1)
        broken = (~found.isfinite().all(dim=-1)).nonzero().flatten().tolist()
        if broken:
            raise NotFiniteError(
                f"the vector of text {broken[0]} of {len(prompts)} has NaN or infinity in it; finite numbers are "
                f"required; {NotFiniteError.REMEDY}."
            )
        return found

    def _check_prompt(self, prompt: Sequence_[int], sampling: Sampling) -> None:
        check_token_ids(prompt, self.model_config.vocab_size)
        room = self.max_length - (sampling.max_tokens > 0)
        if len(prompt) > room:
            raise GenerationError(
                f"the prompt has {len(prompt)} tokens; at most {room} fit here, with one to generate; shorten it."
            )

    def _submit(self, text: _Text) -> None:
        self._texts[text.sequence] = text
        self._scheduler.add(text.sequence)

    def _score_prompt(self, work: _Work, decoded: Decoded) -> None:
        """Score the prompt tokens that a part's rows predict, where asked for.

        A text whose scores are no numbers has an error after this.
        """
        text, sequence = work.text, work.part.sequence
        top = text.sampling.prompt_logprobs
        if top is None or text.has_given_scores or text.index != 0:
            return
        if not text.scored:
            text.scored.append(GeneratedToken(sequence.tokens[0]))
        # Position p predicts token p + 1; what was scored before a preemption is not scored again.
        begin = max(sequence.num_computed, len(text.scored) - 1)
        end = min(sequence.num_computed + work.part.num_tokens, sequence.num_prompt - 1)
        for position in range(begin, end, _SCORED_ROWS):
            until = min(position + _SCORED_ROWS, end)
            place = work.first_row + position - sequence.num_computed
            logits = self._runner.logits(decoded.hidden[place : place + until - position])
            targets = sequence.tokens[position + 1 : until + 1]
            try:
                text.scored += score_prompt(logits, targets, top=top)
            except GenerationError as error:
                text.finish_reason, text.message = "error", str(error)
                return

    def _choose_tokens(self, work: _Work, sampler: RowSampler, decoded: Decoded) -> None:
        """Choose a part's next token, and the ones after it as long as they are those drafted.

        Numbers that are none may be a draft's, whose keys and values lie behind the text's own and are multiplied by 0,
        or lay there in an earlier step.
        """
        text, drafted = work.text, work.drafted
        text.has_drafted |= bool(drafted)
        for number, row in enumerate(work.choosing):
            if text.finish_reason is not None:
                return
            try:
                mask = None if text.matcher is None else text.matcher.mask()
                sampled = sampler.sample(work.first_logits + number, text.state, mask)
                piece = self._accept(text, sampled.token_id, number + 1)
            except GenerationError as error:
                if isinstance(error, NotFiniteError):
                    if text.has_drafted:
                        work.is_spoilt = True
                        return
                    work.part.sequence.is_broken = True
                text.finish_reason, text.message = "error", str(error)
                text.is_refused = isinstance(error, RequestError)
                return
            experts = token_experts(decoded, row) if text.sampling.return_experts else None
            work.tokens.append(GeneratedToken(sampled.token_id, sampled.logprob, sampled.top_logprobs, experts))
            work.piece += piece
            if drafted[number : number + 1] != (sampled.token_id,):
                return

    def _accept(self, text: _Text, token: int, num_new: int) -> str:
        """Take a chosen token into a text, the num_new-th of this step; return the new characters.

        Raises: GenerationError where its grammar cannot be followed.
        """
        count = text.num_generated + num_new
        is_matched = False
        if text.matcher is not None:
            is_allowed = text.matcher.accept(token)
            assert is_allowed, (token, text.sampling.grammar)
            is_matched = text.matcher.is_finished
        text.state.append(token)
        if is_matched or (token in text.stop_ids and count >= text.sampling.min_tokens):
            text.finish_reason = "stop"
            text.stop_reason = None if token in self._tokenizer.stop_ids else token
            piece = ""
        else:
            piece = text.detokenizer.append(token)
            if text.sequence.num_prompt + count >= text.last_length:
                text.finish_reason = "length"
        if text.finish_reason is not None:
            piece += text.detokenizer.flush()
        if text.detokenizer.stopped_by is not None:
            text.finish_reason, text.stop_reason = "stop", text.detokenizer.stopped_by
        return piece

    def _advance(self, work: _Work) -> list[RequestOutput]:
        """Note what a step computed of a sequence, and what it gives."""
        part, text, tokens = work.part, work.text, work.tokens
        sequence = part.sequence
        # Not one that is computed again after a preemption: a token follows a whole prompt in the same step.
        is_whole_prompt = part.is_last and text.num_generated == 0 and (bool(tokens) or not work.is_spoilt)
        accepted = 0
        if tokens:
            accepted = len(tokens) - 1
            sequence.tokens.extend(token.token_id for token in tokens)
            self._counts["generated"] += len(tokens)
        if work.is_spoilt:
            self._scheduler.preempt(sequence)  # computed again without drafts, it tells whose numbers they are
            text.takes_drafts = text.has_drafted = False
        else:
            self._scheduler.computed(sequence, part.num_tokens + accepted)
        if self._draft is not None and self._depth is not None and work.drafted:
            self._draft.settle(sequence)
            if text.finish_reason is None:  # a text that ends says nothing of the tokens behind its end
                self._depth.record_check(len(work.drafted), accepted)
            self._counts["drafted"] += len(work.drafted)
            # One that ends its text is right too, and no token of the model's own comes behind it.
            right = (token.token_id == draft for token, draft in zip(tokens, work.drafted, strict=False))
            self._counts["accepted"] += sum(right)
        if is_whole_prompt:
            self._counts["prompt"] += sequence.num_prompt
            self._counts["cached"] += sequence.num_cached or 0
        if is_whole_prompt or text.finish_reason is not None:
            for sibling in self._siblings.pop(sequence, ()):
                self._submit(sibling)
        if part.is_last and not work.choosing and text.finish_reason is None:  # max_tokens is 0
            text.finish_reason = "length"
        if text.finish_reason is not None:
            self._end(text, text.finish_reason)
        elif not part.is_last or (work.is_spoilt and not tokens):
            return []
        return [self._output(text, work.piece, tuple(tokens))]

    def _end_request(self, request_id: str, reason: FinishReason, message: str | None = None) -> None:
        for text in list(self._requests[request_id]):
            self._siblings.pop(text.sequence, None)
            text.message = message
            self._end(text, reason)
            self._pending.append(self._output(text, "", ()))

    def _end(self, text: _Text, reason: FinishReason) -> None:
        """Take a text out of everything; its blocks may be found by others until they are needed."""
        text.finish_reason = reason
        self._counts["finished"] += 1
        if self._texts.pop(text.sequence, None) is not None:
            self._scheduler.remove(text.sequence)
            if self._draft is not None:
                self._draft.forget(text.sequence)
        left = self._requests[text.request_id]
        left.remove(text)
        if not left:
            del self._requests[text.request_id]

    def _output(self, text: _Text, piece: str, tokens: tuple[GeneratedToken, ...]) -> RequestOutput:
        sequence = text.sequence
        scores = None
        if len(text.scored) == sequence.num_prompt and not text.has_given_scores:
            scores, text.has_given_scores = PromptLogprobs(tuple(text.scored)), True
        return RequestOutput(
            request_id=text.request_id,
            index=text.index,
            text=piece,
            tokens=tokens,
            finish_reason=text.finish_reason,
            stop_reason=text.stop_reason,
            message=text.message,
            prompt_logprobs=scores,
            prompt_tokens=sequence.num_prompt,
            cached_tokens=min(sequence.num_cached or 0, sequence.num_prompt),
            completion_tokens=text.num_generated,
            is_refused=text.is_refused,
        )


def _check_draft(config: EngineConfig, draft_model: Transformer | None) -> None:
    method = None if config.speculation is None else config.speculation.method
    if draft_model is not None and method != "model":
        raise ConfigError(
            f"draft_model is given and speculation.method is {method!r}; a model drafts where that is 'model'; set "
            f"config.speculation, or leave draft_model out."
        )
    if draft_model is None and method == "model":
        raise ConfigError(
            "speculation.method is 'model' and draft_model is None; an engine drafts with a model that is in memory; "
            "load it and give it as draft_model."
        )


def _find_broken(step: Sequence_[_Work], decoded: Decoded) -> None:
    """Mark the sequences in which numbers are none: they may have reached positions before their own too, 0 times NaN,
    whose keys and values others would find. A single token's are looked at when the next one is chosen.
    """
    looked_at = [work for work in step if work.part.num_tokens > 1 or not work.choosing]
    if not looked_at or is_finite(decoded.hidden):
        return
    for work in looked_at:
        if not is_finite(decoded.hidden[work.first_row : work.first_row + work.part.num_tokens]):
            work.part.sequence.is_broken = True


def bytes_of_block(model: Transformer, draft_model: Transformer | None, config: EngineConfig) -> int:
    """Return the memory of a block of keys and values; a draft model's lie under the same numbers."""
    each = block_bytes(model, block_size=config.block_size, dtype=_kv_dtype(model, config))
    if draft_model is not None and config.speculation is not None:
        each += block_bytes(draft_model, block_size=config.block_size, dtype=draft_model.compute_dtype)
    return each


def kv_budget_bytes(model: Transformer, config: EngineConfig) -> int:
    """Return the memory that keys and values may take."""
    return available_memory_bytes(model.device) // 4 if config.kv_cache_bytes == "auto" else config.kv_cache_bytes


def _kv_dtype(model: Transformer, config: EngineConfig) -> torch.dtype:
    return model.compute_dtype if config.kv_precision == "auto" else _DTYPES[config.kv_precision]


def _tell_short_memory(config: EngineConfig, max_length: int, longest: int) -> None:
    """A text as long as asked does not fit in the memory of keys and values: refused if asked, else said."""
    if config.max_length is not None:
        raise ConfigError(
            f"max_length ({longest}) is more than the {max_length} positions that the memory of keys and values "
            f"(kv_cache_bytes: {config.kv_cache_bytes}) has room for; one text has to fit; lower engine.max_length, or "
            f"raise engine.kv_cache_bytes."
        )
    logger.warning(
        "A text may have %d tokens, of the model's %d: engine.kv_cache_bytes has room for no more; raise it for longer "
        "ones.", max_length, longest,
    )  # fmt: skip


def _tell_if_too_much(kv_bytes: int, device: torch.device) -> None:
    """Memory is taken where it is first used: what there is not is missed only then, and ends the process."""
    if kv_bytes > (room := available_memory_bytes(device)):
        logger.warning(
            "Keys and values may take %.1f GB, and %.1f GB are free: once they do, the system may end the process; "
            "lower engine.kv_cache_bytes, or make room.", kv_bytes / 1e9, room / 1e9,
        )  # fmt: skip


def _count_blocks(model: Transformer, draft_model: Transformer | None, config: EngineConfig, longest: int) -> int:
    each, budget = bytes_of_block(model, draft_model, config), kv_budget_bytes(model, config)
    useful = config.max_sequences * -(-longest // config.block_size)
    if config.kv_cache_bytes == "auto":
        return max(1, min(useful, budget // each))
    if budget < each:
        raise ConfigError(
            f"kv_cache_bytes ({config.kv_cache_bytes}) is less than what one block of {config.block_size} positions of "
            f"this model takes ({each}); room for one is required; raise it."
        )
    return min(useful, budget // each)
