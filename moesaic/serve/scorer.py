"""The engine as what generates for evaluation: prompts of any length at once, whose equal beginnings (the shots of a
task) are computed once."""

from collections.abc import Sequence

from moesaic.config.serve import EngineConfig, Sampling
from moesaic.data.tokenizer import Tokenizer
from moesaic.errors import GenerationError
from moesaic.evaluate.scorer import Pair, Progress, Prompt, Score, Scorer
from moesaic.model.transformer import Transformer
from moesaic.serve.engine import Engine


class EngineScorer:
    """Generates through an engine; scores through another scorer.

    Greedy tokens are those of model/generate; drawn ones are as reproducible, with other random numbers.
    """

    def __init__(
        self, model: Transformer, tokenizer: Tokenizer, scorer: Scorer, *, config: EngineConfig | None = None
    ) -> None:
        """scorer: gives likelihoods of the same model."""
        self._model, self._tokenizer, self._scorer, self._config = model, tokenizer, scorer, config

    @property
    def max_length(self) -> int:
        return self._scorer.max_length

    def score(self, pairs: Sequence[Pair], *, progress: Progress | None = None) -> list[Score]:
        """As Scorer.score."""
        return self._scorer.score(pairs, progress=progress)

    def generate(self, prompts: Sequence[Prompt], *, progress: Progress | None = None) -> list[list[int]]:
        """As Scorer.generate."""
        was_training = self._model.training
        engine = Engine(self._model, self._tokenizer, self._config)  # evaluation mode
        try:
            return self._run(engine, prompts, progress)
        finally:
            self._model.train(was_training)

    def _run(self, engine: Engine, prompts: Sequence[Prompt], progress: Progress | None) -> list[list[int]]:
        numbers: dict[str, int] = {}
        for number, prompt in enumerate(prompts):
            length = len(prompt.ids) + prompt.max_new_tokens
            if length > engine.max_length or prompt.max_new_tokens < 1:
                raise GenerationError(
                    f"a prompt of {len(prompt.ids)} tokens was given, and {prompt.max_new_tokens} new ones were asked "
                    f"for; at least one new one, and {engine.max_length} positions at most are required; cut the "
                    f"prompt or ask for fewer."
                )
            sampling = Sampling(
                max_tokens=prompt.max_new_tokens,
                temperature=prompt.temperature,
                top_k=prompt.top_k,
                top_p=1.0 if prompt.top_p is None else prompt.top_p,
                seed=prompt.seed,
                ignore_end_of_text=True,  # is_done knows
            )
            numbers[engine.add_request(prompt.ids, sampling)] = number
        texts: list[list[int]] = [[] for _ in prompts]
        num_done = 0
        while engine.has_work:
            for output in engine.step():
                number = numbers[output.request_id]
                if output.finish_reason == "abort":
                    continue
                if output.finish_reason == "error":
                    raise GenerationError(str(output.message))
                is_done = output.finish_reason is not None
                for token in output.tokens:
                    texts[number].append(token.token_id)
                    if prompts[number].is_done(texts[number]):
                        engine.abort(output.request_id)
                        is_done = True
                        break
                if is_done:
                    num_done += 1
                    if progress is not None:
                        progress(num_done / len(prompts))
        return texts
