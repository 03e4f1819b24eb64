"""lm_eval (the language model evaluation harness) on a Scorer: the adapter class, and the call that runs tasks.

Which tasks there are is in tasks/; what is kept of their results, and shown, in report/evaluations.py.
"""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from moesaic.data.chat import render_chat
from moesaic.data.tokenizer import Tokenizer
from moesaic.errors import ConfigError, InstallationError
from moesaic.evaluate.scorer import Pair, Progress, Prompt, Scorer, score_texts
from moesaic.evaluate.tasks.registry import SEED, Task, quiet
from moesaic.logs import OnProgress, no_progress
from moesaic.report.evaluations import MetricResult

try:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
except ImportError as error:
    raise InstallationError(
        f"the harness was asked for and lm_eval cannot be imported ({error}); it runs the tasks; install it with "
        f"`pip install 'moesaic[evaluate]'`."
    ) from None

# What lm_eval's other back ends take where a task says nothing.
_MAX_NEW_TOKENS = 256
_COUNT_KEYS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_GENERATION_KEYS = (*_COUNT_KEYS, "until", "do_sample", "temperature", "top_k", "top_p", "seed")


class HarnessModel(TemplateLM):
    """A Scorer and a tokenizer as a model of lm_eval's, with the conventions of its Hugging Face back end.

    Text is encoded as the tokenizer's files say (a begin token in front, where they put one); a context and its
    continuation are encoded as one text, and the continuation is what stands behind the context's own tokens; what has
    no context stands behind the begin token, or where there is none, behind the end-of-text token.
    """

    def __init__(self, scorer: Scorer, tokenizer: Tokenizer, *, progress: OnProgress = no_progress):
        super().__init__()
        self.scorer, self._tokenizer, self._progress = scorer, tokenizer, progress
        # The choices of a question have one context, which is encoded for each.
        self._encode = lru_cache(maxsize=4096)(self._encode_now)

    @property
    def eot_token_id(self) -> int:
        return self._tokenizer.end_of_text_id

    @property
    def prefix_token_id(self) -> int:
        begin = self._tokenizer.begin_of_text_id
        return self._tokenizer.end_of_text_id if begin is None else begin

    @property
    def max_length(self) -> int:
        return self.scorer.max_length

    @property
    def tokenizer_name(self) -> str:
        """What tells tokenizers and their templates apart."""
        return f"moesaic-{self._tokenizer.fingerprint[:16]}"

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return (self._tokenizer.chat_template or "") if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return render_chat(self._tokenizer, chat_history, add_generation_prompt=add_generation_prompt)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        return list(self._encode(string, add_special_tokens))

    def _encode_now(self, text: str, add_special_tokens: bool | None) -> tuple[int, ...]:
        if add_special_tokens is None:
            # A template may have put the begin token there already.
            add_special_tokens = not text.startswith(self._tokenizer.token(self.prefix_token_id))
        return tuple(self._tokenizer.encode_prompt(text, add_special_tokens=add_special_tokens))

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        pairs = [Pair(tuple(context), tuple(continuation)) for _, context, continuation in requests]
        scores = self.scorer.score(pairs, progress=self._stage("scoring"))
        answers = [(score.log_likelihood, score.is_greedy) for score in scores]
        for (texts, _, _), answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        texts = [self._encode_now(request.args[0], None) for request in requests]
        totals = score_texts(self.scorer, texts, first=self.prefix_token_id, progress=self._stage("scoring texts"))
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return texts, each cut before the first of its stop strings.

        Raises: ConfigError for generation settings that cannot be met.
        """
        stops = [_stop_strings(request.args[1]) for request in requests]
        prompts = [
            self._prompt(request.args[0], request.args[1], stop) for request, stop in zip(requests, stops, strict=True)
        ]
        news = self.scorer.generate(prompts, progress=self._stage("generating"))
        texts = []
        for request, stop, new in zip(requests, stops, news, strict=True):
            text = self._text(new)
            for each in stop:
                text = text.partition(each)[0]
            texts.append(text)
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts

    def _prompt(self, context: str, settings: dict[str, Any], stop: list[str]) -> Prompt:
        unknown = sorted(key for key in settings if key not in _GENERATION_KEYS)
        if unknown:
            raise ConfigError(
                f"a task asks to generate with {', '.join(unknown)}; {', '.join(_GENERATION_KEYS)} are what can be "
                f"met; take them out of the task's generation_kwargs."
            )
        count = int(next((settings[key] for key in _COUNT_KEYS if settings.get(key) is not None), _MAX_NEW_TOKENS))
        room = self.max_length - count
        if room < 1:
            raise ConfigError(
                f"a task generates up to {count} tokens; the model has {self.max_length} positions, of which at least "
                f"one is the prompt's; set max_gen_toks in the task's generation_kwargs."
            )
        temperature = float(settings.get("temperature") or 0.0)
        do_sample = settings.get("do_sample")
        if do_sample and not temperature:
            temperature = 1.0
        ids = self._encode(context, None)[-room:] or (self.prefix_token_id,)
        stop_ids = self._tokenizer.stop_ids

        def is_done(new: Sequence[int]) -> bool:
            if new[-1] in stop_ids:
                return True
            text = self._text(new)
            return any(each in text for each in stop)

        return Prompt(
            ids,
            max_new_tokens=count,
            is_done=is_done,
            temperature=0.0 if do_sample is False else temperature,
            top_k=settings.get("top_k"),
            top_p=settings.get("top_p"),
            seed=int(settings.get("seed", SEED)),
        )

    def _text(self, new: Sequence[int]) -> str:
        ids = new[:-1] if new and new[-1] in self._tokenizer.stop_ids else new
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def _stage(self, name: str) -> Progress:
        return lambda share: self._progress(name, share)


def _stop_strings(settings: dict[str, Any]) -> list[str]:
    until = settings.get("until") or []
    return [each for each in ([until] if isinstance(until, str) else until) if each]


@dataclass(frozen=True)
class TaskScores:
    """A task's metrics by name, and what became of each of its records, in order (lm_eval's samples)."""

    task: str
    version: str
    metrics: dict[str, MetricResult]
    num_records: int
    samples: tuple[dict[str, Any], ...]
    seconds: float


def run_task(model: HarnessModel, task: Task, *, limit: int | None = None, use_chat: bool = False) -> TaskScores:
    """Run one task on a model, on its first `limit` records only if that is given.

    use_chat: every example becomes a message, by the tokenizer's chat template.

    Raises: ConfigError, DataError, GenerationError.
    """
    from lm_eval.evaluator import evaluate

    if use_chat:
        model.apply_chat_template([{"role": "user", "content": "?"}])  # a template that is missing is missed here
    start = time.perf_counter()
    with quiet():
        found = evaluate(
            model,
            {"tasks": {task.name: task.harness}},
            limit=limit,
            bootstrap_iters=0,  # means have their standard error below; of the rest there is none worth its name
            apply_chat_template=use_chat,
            fewshot_as_multiturn=use_chat,
        )
    assert found is not None
    higher, aggregations = found["higher_is_better"].get(task.name, {}), task.harness.aggregation()
    samples = sorted(found["samples"][task.name], key=lambda sample: sample["doc_id"])
    # As the task's own file lists them: the first is the one that counts.
    listed = [str(each["metric"]) for each in task.harness.config.metric_list or []]
    values_by_key = found["results"][task.name]
    metrics: dict[str, MetricResult] = {}
    for key in sorted(values_by_key, key=lambda key: _place(key.partition(",")[0], listed)):
        name, _, name_of_filter = key.partition(",")
        if not name_of_filter or name.endswith("_stderr"):
            continue
        shown = name if name not in metrics else f"{name}.{name_of_filter}"
        is_mean = getattr(aggregations.get(name), "__name__", "") == "mean"
        values = [float(each[name]) for each in samples if each["filter"] == name_of_filter] if is_mean else []
        error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
        metrics[shown] = MetricResult(
            value=float(values_by_key[key]), standard_error=error, higher_is_better=higher.get(name)
        )
    return TaskScores(
        task=task.name,
        version=str(found["versions"].get(task.name)),
        metrics=metrics,
        num_records=len({sample["doc_id"] for sample in samples}),
        samples=tuple(samples),
        seconds=time.perf_counter() - start,
    )


def _place(name: str, listed: Sequence[str]) -> int:
    return listed.index(name) if name in listed else len(listed)
