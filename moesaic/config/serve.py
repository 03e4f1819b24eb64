"""How models are served: what a request may ask for, and how large an engine and a server are."""

import re
from typing import Literal

from pydantic import Field, field_validator, model_validator

from moesaic.config.base import Config
from moesaic.errors import ConfigError

GrammarKind = Literal["json_schema", "regex", "ebnf", "json_object"]


class Grammar(Config):
    """What the text has to match. json_object: any JSON object, `text` is empty then. tool_calls: see tool_calls.py."""

    kind: GrammarKind | Literal["tool_calls"]
    text: str = Field(default="", description="the JSON schema, the regular expression or the grammar")


class Sampling(Config):
    """How one request's tokens are chosen and where they end.

    A token is drawn from the softmax of (logits - penalties + bias) / temperature, among those that top_k, top_p and
    min_p all leave, each on what the one before it left. temperature 0 takes the likeliest.
    """

    max_tokens: int = Field(default=256, ge=0, description="at most so many new tokens; 0 scores the prompt only")
    min_tokens: int = Field(
        default=0,
        ge=0,
        description="before so many tokens nothing ends a text but max_tokens, or a grammar that has no more",
    )
    temperature: float = Field(default=1.0, ge=0)
    top_k: int | None = Field(default=None, ge=1, description="among so many likeliest tokens")
    top_p: float = Field(default=1.0, gt=0, le=1, description="among the fewest that reach this probability")
    min_p: float = Field(default=0.0, ge=0, le=1, description="among those with this share of the likeliest's")
    repetition_penalty: float = Field(
        default=1.0,
        ge=0.01,
        le=100,
        description="divides positive logits of tokens seen, prompt included; multiplies negative",
    )
    presence_penalty: float = Field(default=0.0, ge=-2, le=2, description="taken off tokens that have been generated")
    frequency_penalty: float = Field(default=0.0, ge=-2, le=2, description="the same, for each time")
    logit_bias: dict[int, float] = Field(default_factory=dict, description="added to the logits of these token ids")
    stop: tuple[str, ...] = Field(default=(), description="texts that end it; the text is cut before them")
    stop_token_ids: tuple[int, ...] = Field(default=(), description="tokens that end it, beside the model's own")
    ignore_end_of_text: bool = Field(default=False, description="go on after the model's own stop tokens")
    seed: int | None = Field(default=None, description="the same seed gives the same tokens; null: a new one each time")
    n: int = Field(default=1, ge=1, description="so many texts of one prompt; text i has seed + i")
    logprobs: int | None = Field(
        default=None, ge=0, description="log-probabilities of the tokens chosen and of so many likeliest ones"
    )
    prompt_logprobs: int | None = Field(default=None, ge=0, description="the same, of the prompt's tokens")
    return_experts: bool = Field(default=False, description="for each token, the experts of each layer that made it")
    grammar: Grammar | None = None

    @model_validator(mode="after")
    def _check(self) -> "Sampling":
        if self.min_tokens > self.max_tokens:
            raise ConfigError(
                f"min_tokens ({self.min_tokens}) is above max_tokens ({self.max_tokens}); it must not be; lower it.",
                key="min_tokens",
            )
        if any(not text for text in self.stop):
            raise ConfigError("a stop text is empty; it would end every text at once; leave it out.", key="stop")
        if any(not -100 <= bias <= 100 for bias in self.logit_bias.values()):
            raise ConfigError(
                f"logit_bias goes from {min(self.logit_bias.values())} to {max(self.logit_bias.values())}; -100 to "
                f"100 is allowed; -100 already forbids a token.",
                key="logit_bias",
            )
        return self


class SpeculationConfig(Config):
    """Tokens drafted cheaply and checked by the model in one pass: the same tokens, in fewer passes."""

    method: Literal["ngram", "model"] = Field(
        description="ngram: what followed the same few tokens earlier in the text; model: a smaller model"
    )
    model: str | None = Field(
        default=None, min_length=1, description="RUN or RUN@step of the same tokenizer, a student of the model say"
    )
    max_tokens: int = Field(
        default=4, ge=1, le=16, description="at most so many at once; how many, down to none, is chosen by what is "
        "measured: what they cost, and how often they are right"
    )  # fmt: skip

    @model_validator(mode="after")
    def _check(self) -> "SpeculationConfig":
        if (self.method == "model") is not (self.model is not None):
            raise ConfigError(
                f"speculation has method {self.method!r} and model {self.model!r}; a run is required with the method "
                f"'model', and none with 'ngram'; set both or neither."
            )
        return self


class EngineConfig(Config):
    """How much an engine holds and does at once."""

    max_sequences: int = Field(default=64, ge=1, description="sequences that run at once; others wait")
    max_batch_tokens: int = Field(
        default=1024, ge=1, description="tokens of one step, of prompts and new ones; a longer prompt comes in chunks"
    )
    max_length: int | None = Field(
        default=None, ge=2, description="positions of a sequence, prompt included; null: as many as the model has"
    )
    kv_cache_bytes: int | Literal["auto"] = Field(
        default="auto", description="memory for keys and values, those of a draft model and of overload's student too; "
        "auto: what max_sequences can use, at most a quarter of the memory that is free"
    )  # fmt: skip
    kv_precision: Literal["auto", "bf16", "int8", "fp32"] = Field(
        default="auto", description="of keys and values; auto: as the model computes"
    )
    block_size: int = Field(default=32, ge=1, description="positions of a block of keys and values")
    prefix_caching: bool = Field(default=True, description="share the blocks of equal beginnings, and keep them")
    speculation: SpeculationConfig | None = None


class ServerConfig(Config):
    """Who may ask, and how much at once.

    Who serves others sets host and api_key_file; who sizes the machine, the limits; who runs it under an orchestrator
    or behind a proxy, the times. Keys also come from the environment variable MOESAIC_API_KEYS, comma-separated.
    """

    host: str = Field(default="127.0.0.1", min_length=1, description="the address to listen on; 0.0.0.0: every one")
    port: int = Field(default=8000, ge=0, le=65535, description="0: any that is free")
    served_model_name: str | None = Field(
        default=None, min_length=1, description="what requests call the model; null: the run's name"
    )
    api_key_file: str | None = Field(default=None, description="a file with one key per line; # first in it: a comment")
    allowed_origins: tuple[str, ...] = Field(
        default=(), description="web pages of other origins that may ask (CORS), as https://example.org"
    )
    max_body_bytes: int = Field(default=4 << 20, ge=1, description="longer requests are refused while they arrive")
    max_prompt_tokens: int | None = Field(
        default=None, ge=1, description="longer prompts are refused; null: as long as the engine takes"
    )
    max_texts_per_request: int = Field(
        default=128, ge=1, description="prompts of one request times its n; embeddings aside"
    )
    max_grammar_bytes: int = Field(default=64_000, ge=1, description="longer grammars and schemas are refused")
    grammar_timeout_seconds: float = Field(default=2.0, gt=0, description="a grammar that takes longer is refused")
    max_concurrent_requests: int = Field(default=256, ge=1, description="requests that are worked on; others wait")
    max_queued_requests: int = Field(default=1024, ge=0, description="requests that wait; others are refused (429)")
    request_timeout_seconds: float = Field(
        default=600.0, gt=0, description="from a request's first byte to its answer's last"
    )
    drain_seconds: float = Field(
        default=30.0, ge=0, description="what runs has so long to finish when the server is told to stop"
    )

    @field_validator("allowed_origins")
    @classmethod
    def _check_origins(cls, origins: tuple[str, ...]) -> tuple[str, ...]:
        for origin in origins:
            if origin != "*" and not re.fullmatch(r"https?://[^/\s]+", origin):
                raise ConfigError(
                    f"allowed_origins has {origin!r}; scheme, host and port are required, without a path; write for "
                    f"example https://example.org, or * for every page."
                )
        return origins


class OverloadConfig(Config):
    """A student that helps out: while the model has much to do, new requests are answered by it."""

    model: str = Field(min_length=1, description="RUN or RUN@step of the same tokenizer")
    max_texts: int = Field(ge=1, description="while so many of the model's texts run or wait, new ones are the other's")


class ServeConfig(Config):
    """What `moesaic serve` starts: an engine, and a server before it."""

    engine: EngineConfig = Field(default_factory=EngineConfig)
    server: ServerConfig = Field(default_factory=ServerConfig)
    overload: OverloadConfig | None = None
