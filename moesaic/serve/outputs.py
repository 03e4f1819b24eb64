"""What an engine gives its caller: tokens and texts as they come, and figures of its state."""

from dataclasses import dataclass
from typing import Literal

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True)
class TokenLogprob:
    """A token and its natural log-probability under the model: after penalties and bias, before temperature."""

    token_id: int
    logprob: float


@dataclass(frozen=True)
class TokenExperts:
    """For each MoE layer, in order: the experts chosen (K ids) at the position that predicted a token, and weights."""

    expert_ids: tuple[tuple[int, ...], ...]
    routing_weights: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class GeneratedToken:
    """A new token. logprob, top_logprobs, experts: where asked for; top_logprobs from the likeliest down."""

    token_id: int
    logprob: float | None = None
    top_logprobs: tuple[TokenLogprob, ...] = ()
    experts: TokenExperts | None = None


@dataclass(frozen=True)
class PromptLogprobs:
    """Of every prompt token, in order: the first has no logprob (nothing predicts it) and no top_logprobs."""

    tokens: tuple[GeneratedToken, ...]


@dataclass(frozen=True)
class RequestOutput:
    """What one step added to one text of a request.

    index: which of its n texts. text: the characters that are certain now, to be appended to those before; what could
    be the beginning of a stop text, or half of a character, is held back. tokens: the new tokens; they may be ahead of
    the text. finish_reason: None while it goes on. stop_reason: the stop text or token id that ended it, None for the
    model's own. message: of finish_reason "error", what happened. prompt_logprobs: once, with the first output, where
    asked for. prompt_tokens, cached_tokens, completion_tokens: counts so far, for usage. is_by_student: it is not the
    model's but its student's, which helps out (overload.py). is_refused: of finish_reason "error", the request asks for
    what cannot be, and nothing else has failed.
    """

    request_id: str
    index: int
    text: str
    tokens: tuple[GeneratedToken, ...]
    finish_reason: FinishReason | None
    stop_reason: str | int | None
    message: str | None
    prompt_logprobs: PromptLogprobs | None
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    is_by_student: bool = False
    is_refused: bool = False


@dataclass(frozen=True)
class LayerLoad:
    """What the experts of one MoE layer have done. layer: its place among all layers of the model.

    tokens_per_expert: routes since the engine began; recent_tokens_per_expert: of the last steps (some thousands of
    tokens, fading out exponentially).
    """

    layer: int
    num_experts: int
    top_k: int
    tokens_per_expert: tuple[int, ...]
    recent_tokens_per_expert: tuple[float, ...]


@dataclass(frozen=True)
class EngineStats:
    """An engine at one moment; counts are since it began.

    is_batch_invariant: whether a text's tokens depend on nothing that runs beside it (Engine). num_by_student: of the
    finished texts, those of a student that helps out; None without one. distinct_experts_per_step: of the last step,
    the mean over MoE layers of how many experts had a token; 0 for a dense model. distinct_experts: the same, summed
    over steps. expert_bytes_used: of the experts that had a token, summed over steps. expert_hit_rate: of those of
    late, the share of bytes that did not have to be read from the disk; None where it is not known, as where a draft
    model or a student reads too. expert_guess_share: where experts are read ahead from a mapped file, of those of late,
    the share that had been guessed; None elsewhere. step_seconds: of the last step. num_own_steps: with a student that
    helps out (overload.py), whose steps, texts, tokens, blocks and bytes count with the model's, the model's alone; its
    are the last step and layers.
    """

    is_batch_invariant: bool
    num_running: int
    num_waiting: int
    kv_blocks_used: int
    kv_blocks_cached: int
    kv_blocks_total: int
    num_steps: int
    num_own_steps: int
    num_prompt_tokens: int
    num_cached_tokens: int
    num_generated_tokens: int
    num_preemptions: int
    num_finished: int
    num_by_student: int | None
    num_drafted_tokens: int
    num_accepted_tokens: int
    step_seconds: float
    step_tokens: int
    distinct_experts_per_step: float
    distinct_experts: float
    expert_bytes_used: int
    expert_hit_rate: float | None
    expert_guess_share: float | None
    layers: tuple[LayerLoad, ...]
