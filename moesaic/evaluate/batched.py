"""The fast Scorer: sequences end to end without padding, a prefix that several share computed once, few logits.

A group of sequences with the same beginning (the choices of a question) takes two passes with one key-value cache: the
beginning, then what differs, each behind the same blocks. Logits exist for the positions that predict something, and
for a bounded number of those at a time. Its definition is scorer.PlainScorer.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moesaic.errors import GenerationError
from moesaic.evaluate.scorer import Inputs, Pair, Progress, Prompt, Score, generate_one, make_inputs
from moesaic.kernels.paged_attention import PagedBatch
from moesaic.model.kv_cache import CacheStep, allocate_storage, copy_blocks
from moesaic.model.transformer import Transformer

# Tokens of one batch: enough for matrices to be multiplied at full rate, and their keys and values still small.
BATCH_TOKENS = 2048
# A second pass costs more than computing fewer tokens than this twice.
_LEAST_SHARED = 8
_BLOCK = 32
# fp32 logits that exist at a time: 64 MiB.
_CHUNK_ELEMENTS = 1 << 24


class BatchedScorer:
    """batch_tokens bounds the tokens of a pass, and of the cache; a longer sequence is a batch of its own."""

    def __init__(self, model: Transformer, *, batch_tokens: int = BATCH_TOKENS) -> None:
        assert batch_tokens > 0, batch_tokens
        self._model, self._batch_tokens = model, batch_tokens

    @property
    def max_length(self) -> int:
        return self._model.config.max_positions

    @torch.no_grad()
    def score(self, pairs: Sequence[Pair], *, progress: Progress | None = None) -> list[Score]:
        vocab_size = self._model.config.vocab_size
        inputs = [make_inputs(pair, max_length=self.max_length, vocab_size=vocab_size) for pair in pairs]
        askers: dict[tuple[int, ...], list[int]] = {}
        for number, each in enumerate(inputs):
            askers.setdefault(each.tokens, []).append(number)
        groups = group_by_prefix(list(askers), most_tokens=self._batch_tokens)
        scores: dict[int, Score] = {}
        was_training = self._model.training
        self._model.eval()
        try:
            for batch in _batches(groups, self._batch_tokens):
                hidden, rows = self._hidden(batch)
                asked = [(number, rows[tokens]) for tokens in rows for number in askers[tokens]]
                scores |= self._scores(hidden, asked, inputs)
                if progress is not None:
                    progress(len(scores) / len(pairs))
        finally:
            self._model.train(was_training)
        return [scores[number] for number in range(len(pairs))]

    def _hidden(self, groups: "Sequence[Group]") -> tuple[Tensor, dict[tuple[int, ...], Tensor]]:
        """Return the hidden states (T, H) of all tokens of the groups, and which rows are each sequence's."""
        model = self._model
        plan = plan_blocks(groups)
        storage = allocate_storage(
            model.config, plan.num_blocks, block_size=_BLOCK, dtype=model.compute_dtype, device=model.device
        )
        prefixes = [group.prefix for group in groups]
        hidden = [self._pass(CacheStep(storage, plan.prefixes), prefixes)]
        copy_blocks(storage, plan.copy_from, storage, plan.copy_to)
        rests = [rest for group in groups for rest in group.rests if rest]
        if rests:
            hidden.append(self._pass(CacheStep(storage, plan.rests), rests))
        rows: dict[tuple[int, ...], Tensor] = {}
        at, behind = 0, sum(len(prefix) for prefix in prefixes)
        for group in groups:
            shared = torch.arange(at, at + len(group.prefix), device="cpu")
            at += len(group.prefix)
            for rest in group.rests:
                rows[group.prefix + rest] = torch.cat([shared, torch.arange(behind, behind + len(rest), device="cpu")])
                behind += len(rest)
        return torch.cat(hidden), rows

    def _pass(self, step: CacheStep, parts: Sequence[tuple[int, ...]]) -> Tensor:
        tokens = torch.tensor([[token for part in parts for token in part]], device=self._model.device)
        return self._model(tokens, cache=_Given(step)).hidden[0]

    def _scores(
        self, hidden: Tensor, asked: Sequence[tuple[int, Tensor]], inputs: Sequence[Inputs]
    ) -> dict[int, Score]:
        """Return the scores of the requests whose sequences have these rows of hidden."""
        model = self._model
        places = torch.cat([rows[-len(inputs[number].targets) :] for number, rows in asked])
        targets = torch.tensor([target for number, _ in asked for target in inputs[number].targets], device="cpu")
        # Continuations of one token after the same context ask for the same logits.
        needed, which = places.unique(return_inverse=True)
        values = torch.empty(len(places), dtype=torch.float64, device="cpu")
        likeliest = torch.empty(len(places), dtype=torch.bool, device="cpu")
        size = max(1, _CHUNK_ELEMENTS // model.config.vocab_size)
        for start in range(0, len(needed), size):
            logits = model.logits(hidden[needed[start : start + size].to(hidden.device)])  # (n, V) fp32
            normal, best = torch.logsumexp(logits, -1).cpu(), logits.argmax(-1).cpu()
            here = ((which >= start) & (which < start + size)).nonzero()[:, 0]
            row, target = which[here] - start, targets[here]
            found = logits[row.to(logits.device), target.to(logits.device)].cpu()
            values[here] = (found - normal[row]).double()
            likeliest[here] = best[row] == target
        scores, at = {}, 0
        for number, _ in asked:
            end = at + len(inputs[number].targets)
            scores[number] = Score(float(values[at:end].sum()), bool(likeliest[at:end].all()))
            at = end
        return scores

    @torch.no_grad()
    def generate(self, prompts: Sequence[Prompt], *, progress: Progress | None = None) -> list[list[int]]:
        """As the protocol says; drawn text is made one prompt after the other, each from its own seed."""
        texts: dict[int, list[int]] = {}

        def report() -> None:
            if progress is not None:
                progress(len(texts) / len(prompts))

        for number, prompt in enumerate(prompts):
            if prompt.temperature != 0.0:
                texts[number] = generate_one(self._model, prompt)
                report()
        greedy = [number for number in range(len(prompts)) if number not in texts]
        for number in greedy:
            self._check(prompts[number])
        was_training = self._model.training
        self._model.eval()
        try:
            for batch in self._generation_batches(greedy, prompts):
                news = self._generate_batch([prompts[number] for number in batch])
                texts |= dict(zip(batch, news, strict=True))
                report()
        finally:
            self._model.train(was_training)
        return [texts[number] for number in range(len(prompts))]

    def _check(self, prompt: Prompt) -> None:
        length, vocab_size = len(prompt.ids) + prompt.max_new_tokens, self._model.config.vocab_size
        if not prompt.ids or prompt.max_new_tokens < 1 or length > self.max_length:
            raise GenerationError(
                f"a prompt of {len(prompt.ids)} tokens was given, and {prompt.max_new_tokens} new ones were asked "
                f"for; at least one of each and {self.max_length} positions at most are required; cut the prompt or "
                f"ask for fewer."
            )
        wrong = next((token for token in prompt.ids if not 0 <= token < vocab_size), None)
        if wrong is not None:
            raise GenerationError(
                f"a prompt holds token id {wrong}; ids from 0 to {vocab_size - 1} are required; use the run's own "
                f"tokenizer."
            )

    def _generation_batches(self, numbers: Sequence[int], prompts: Sequence[Prompt]) -> Iterator[list[int]]:
        """Prompts of like length together, so that they end at about the same time."""
        batch: list[int] = []
        used = 0
        for number in sorted(numbers, key=lambda number: -len(prompts[number].ids)):
            size = len(prompts[number].ids) + prompts[number].max_new_tokens
            if batch and used + size > self._batch_tokens * 2:
                yield batch
                batch, used = [], 0
            batch.append(number)
            used += size
        if batch:
            yield batch

    def _generate_batch(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        model = self._model
        ends = [len(prompt.ids) + prompt.max_new_tokens for prompt in prompts]
        counts = [-(-end // _BLOCK) for end in ends]
        firsts = [sum(counts[:number]) for number in range(len(counts))]
        storage = allocate_storage(
            model.config, sum(counts), block_size=_BLOCK, dtype=model.compute_dtype, device=model.device
        )
        tables = [list(range(first, first + count)) for first, count in zip(firsts, counts, strict=True)]
        news: list[list[int]] = [[] for _ in prompts]
        lengths = [len(prompt.ids) for prompt in prompts]
        active = list(range(len(prompts)))
        parts = [prompt.ids for prompt in prompts]
        while active:
            batch = _paged_batch(
                [len(part) for part in parts],
                [lengths[number] for number in active],
                [tables[number] for number in active],
            )
            hidden = self._pass(CacheStep(storage, batch), parts)
            last = batch.starts[1:].long() - 1
            tokens = model.logits(hidden[last.to(hidden.device)]).argmax(-1).tolist()
            going = []
            for number, token in zip(active, tokens, strict=True):
                news[number].append(token)
                lengths[number] += 1
                prompt = prompts[number]
                if len(news[number]) < prompt.max_new_tokens and not prompt.is_done(news[number]):
                    going.append(number)
            active = going
            parts = [(news[number][-1],) for number in active]
        return news


class _Given:
    """A cache for one pass, whose places are decided already."""

    def __init__(self, step: CacheStep) -> None:
        self._step = step

    def extend(self, batch_size: int, length: int) -> CacheStep:
        assert (batch_size, length) == (1, self._step.batch.num_tokens), (batch_size, length)
        return self._step

    def retract(self, length: int) -> None:
        """Nothing: no pass comes after this one."""


@dataclass(frozen=True)
class Group:
    """Sequences with the same beginning: sequence i is prefix + rests[i]; at most one rest is empty."""

    prefix: tuple[int, ...]
    rests: tuple[tuple[int, ...], ...]

    @property
    def num_tokens(self) -> int:
        """Those that are computed."""
        return len(self.prefix) + sum(len(rest) for rest in self.rests)


def group_by_prefix(sequences: Sequence[tuple[int, ...]], *, most_tokens: int) -> list[Group]:
    """Put different sequences into groups, each sequence into one, so that few tokens are computed.

    In lexicographic order those with a common beginning are neighbours; a group takes its next neighbour where that
    saves tokens. Groups come longest first. A group has at most most_tokens tokens, or a single sequence.
    """
    ordered = sorted(sequences)
    groups: list[Group] = []
    members: list[tuple[int, ...]] = []
    shared = 0

    def finish() -> None:
        if members:
            groups.append(Group(members[0][:shared], tuple(each[shared:] for each in members)))

    for sequence in ordered:
        common = _common_length(members[0][:shared], sequence) if members else 0
        total = common + sum(len(each) - common for each in [*members, sequence])
        # What sharing saves: with one more member, and without it.
        saves = common >= _LEAST_SHARED and len(members) * common >= (len(members) - 1) * shared
        if saves and total <= most_tokens:
            members.append(sequence)
            shared = common
        else:
            finish()
            members, shared = [sequence], len(sequence)
    finish()
    return sorted(groups, key=lambda group: (-group.num_tokens, group.prefix))


def _common_length(first: tuple[int, ...], second: tuple[int, ...]) -> int:
    for place, (one, other) in enumerate(zip(first, second, strict=False)):
        if one != other:
            return place
    return min(len(first), len(second))


def _batches(groups: Sequence[Group], most_tokens: int) -> Iterator[list[Group]]:
    batch: list[Group] = []
    used = 0
    for group in groups:
        if batch and used + group.num_tokens > most_tokens:
            yield batch
            batch, used = [], 0
        batch.append(group)
        used += group.num_tokens
    if batch:
        yield batch


@dataclass(frozen=True)
class BlockPlan:
    """Where the prefixes, and the rests that are not empty, of some groups lie; copy_from and copy_to are blocks that
    are copied between the two passes."""

    num_blocks: int
    prefixes: PagedBatch
    rests: PagedBatch
    copy_from: tuple[int, ...]
    copy_to: tuple[int, ...]


def plan_blocks(groups: Sequence[Group]) -> BlockPlan:
    """A prefix's full blocks serve all its rests; of a last one that is not full each rest gets a copy to go on in."""
    used = 0
    prefix_tables: list[list[int]] = []
    rest_tables: list[list[int]] = []
    copies: list[tuple[int, int]] = []
    for group in groups:
        full, over = divmod(len(group.prefix), _BLOCK)
        table = list(range(used, used + full + bool(over)))
        used += len(table)
        prefix_tables.append(table)
        for rest in filter(None, group.rests):
            own = list(range(used, used + -(-(over + len(rest)) // _BLOCK)))
            used += len(own)
            rest_tables.append(table[:full] + own)
            if over:
                copies.append((table[-1], own[0]))
    prefix_lengths = [len(group.prefix) for group in groups]
    rests = [(len(rest), len(group.prefix) + len(rest)) for group in groups for rest in group.rests if rest]
    return BlockPlan(
        num_blocks=used,
        prefixes=_paged_batch(prefix_lengths, prefix_lengths, prefix_tables),
        rests=_paged_batch([new for new, _ in rests], [end for _, end in rests], rest_tables),
        copy_from=tuple(source for source, _ in copies),
        copy_to=tuple(target for _, target in copies),
    )


def _paged_batch(new: Sequence[int], lengths: Sequence[int], tables: Sequence[Sequence[int]]) -> PagedBatch:
    starts = torch.zeros(len(new) + 1, dtype=torch.int32, device="cpu")
    starts[1:] = torch.tensor(new, device="cpu").cumsum(0)
    width = max([1, *(len(table) for table in tables)])
    padded = [[*table, *[0] * (width - len(table))] for table in tables]
    return PagedBatch(
        starts,
        torch.tensor(lengths, dtype=torch.int32, device="cpu"),
        torch.tensor(padded, dtype=torch.int32, device="cpu").view(-1, width),
    )
