"""The one Transformer: a decoder whose layers are described by ModelConfig.layers."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moesaic.config.model import ModelConfig
from moesaic.errors import ConfigError, DeviceError, TrainingError
from moesaic.kernels import products, select
from moesaic.kernels.decode import Decoded, DecodePlan, ModelPart
from moesaic.kernels.packed import PackedWeight, packed_linear, packed_rows, unpack_weight
from moesaic.kernels.quantized import QuantizedWeight, dequantize
from moesaic.kernels.tracing import untraced
from moesaic.model.attention import Attention
from moesaic.model.feed_forward import FeedForward
from moesaic.model.kv_cache import CacheStep, KVCache
from moesaic.model.latent_attention import LatentAttention
from moesaic.model.linear import Linear
from moesaic.model.norm import LayerNorm, RmsNorm, make_norm
from moesaic.model.rotary import model_rotary
from moesaic.moe.experts import Experts
from moesaic.moe.layer import MoELayer, MoEStatistics, Routes, RoutingDecision
from moesaic.moe.router import Router
from moesaic.moe.seeds import mix_seeds
from moesaic.moe.tensor_tree import tensor_tree

# What writes into the residual stream; latent attention's q_down_proj and kv_down_proj do not.
OUTPUT_LAYERS = (".o_proj", ".down_proj")


@tensor_tree
@dataclass(frozen=True)
class ModelOutput:
    """hidden (B, S, H), after the final norm and its scale; moe: the statistics of each MoE layer, in order.

    A packed model's pass with a cache in one call makes no statistics: moe is empty. block_inputs: what entered each
    block, hidden states of the same tokens, where they were asked for.
    """

    hidden: Tensor
    moe: tuple[MoEStatistics, ...]
    block_inputs: tuple[Tensor, ...] = ()


class _Recorded:
    """Holds a layer's routing decision between a checkpointed forward pass and its recomputation."""

    def __init__(self) -> None:
        self.decision: RoutingDecision | None = None


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)), what is added times residual_scale.

    With norms behind the parts, x + norm(attention(x)), then x + norm(feed_forward(x)).
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = make_norm(config.norm, config.hidden_size, config.norm_epsilon)
        self.attention = Attention(config, layer=layer) if config.latent_attention is None else LatentAttention(config)
        self.feed_forward_norm = make_norm(config.norm, config.hidden_size, config.norm_epsilon)
        self.feed_forward = FeedForward(config, config.layers[layer])
        self.dropout, self.residual_scale = config.dropout, config.residual_scale
        self.norms_outputs = config.norm_place == "behind"

    def extra_repr(self) -> str:
        return "norms_outputs=True" if self.norms_outputs else ""

    def forward(
        self,
        x: Tensor,
        *,
        rotary: tuple[Tensor, Tensor] | None,
        documents: Tensor | None,
        valid: Tensor | None,
        cache: CacheStep | None,
        layer: int,
        seed: int,
        recorded: _Recorded,
    ) -> tuple[Tensor, MoEStatistics | None]:
        x = self._attend(x, rotary=rotary, documents=documents, cache=cache, layer=layer)
        out, statistics = self.feed_forward(self._flat(x), valid=valid, seed=seed, replay=recorded.decision)
        if statistics is not None:
            recorded.decision = statistics.decision
        return self._add_feed_forward(x, out), statistics

    def infer(
        self, x: Tensor, *, rotary: tuple[Tensor, Tensor] | None, cache: CacheStep, layer: int
    ) -> tuple[Tensor, Routes | None]:
        """The same of new tokens for a cache: their routes in the place of statistics."""
        x = self._attend(x, rotary=rotary, documents=None, cache=cache, layer=layer)
        out, routes = self.feed_forward.infer(self._flat(x))
        return self._add_feed_forward(x, out), routes

    def _attend(self, x: Tensor, **where: Any) -> Tensor:
        attended = self.attention(x if self.norms_outputs else self.attention_norm(x), **where)
        return self._add(x, self.attention_norm(attended) if self.norms_outputs else attended)

    def _flat(self, x: Tensor) -> Tensor:
        """What the feed-forward part takes: (T, H)."""
        return (x if self.norms_outputs else self.feed_forward_norm(x)).reshape(-1, x.shape[-1])

    def _add_feed_forward(self, x: Tensor, out: Tensor) -> Tensor:
        return self._add(x, (self.feed_forward_norm(out) if self.norms_outputs else out).view_as(x))

    def _add(self, x: Tensor, out: Tensor) -> Tensor:
        if self.residual_scale == 1.0:
            return x + self._drop(out)
        # Rounded once. torch.add's alpha is itself rounded to x's dtype first: 0.22 would be 0.2197 in bf16.
        return (x.float() + self._drop(out).float() * self.residual_scale).to(x.dtype)

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout) if self.dropout and self.training else x


class Transformer(nn.Module):
    """Parameters are fp32 (the master weights); matrix work runs in `compute_dtype`.

    It begins with weights drawn from torch's global generator; `initialize(seed)` draws them again, repeatably.

    model/pack.py makes it one that can only infer: `packed_head` is the language model head, and the embedding too if
    they are tied; `decode_part` says what a pass in one call needs to know of it; `mapped_bytes` of it lie in a mapped
    file, and `reads_ahead` is set where these do not fit into memory, or not with all else (kernels/decode.py).
    """

    embedding: Tensor
    packed_head: PackedWeight | None
    decode_part: ModelPart | None

    def __init__(self, config: ModelConfig, *, compute_dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config = config
        self.compute_dtype = compute_dtype
        self.activation_checkpointing = False
        self.embedding = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))
        self.position_embedding = (
            nn.Parameter(torch.empty(config.max_positions, config.hidden_size))
            if config.positions == "learned"
            else None
        )
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        # Here and not in the logits: every way to make these takes the same hidden states.
        self.final_norm = make_norm(config.norm, config.hidden_size, config.norm_epsilon, scale=config.logits_scale)
        self.lm_head = (
            None if config.tie_embeddings else nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))
        )
        self.packed_head = self.decode_part = None
        self.mapped_bytes, self.reads_ahead = 0, False
        self._plan: DecodePlan | None = None
        if (
            not self.embedding.is_meta
        ):  # where normal_ draws nothing, and loads torch's compiler: seconds of every start
            self.initialize()

    @classmethod
    def uninitialized(cls, config: ModelConfig, *, compute_dtype: torch.dtype = torch.float32) -> "Transformer":
        """Return a model whose weights mean nothing yet, for a caller that fills every one of them.

        Drawing them first would take a large model longer than reading them.
        """
        device = torch.get_default_device()
        with torch.device("meta"):
            model = cls(config, compute_dtype=compute_dtype)
        return model if device.type == "meta" else model.to_empty(device=device)

    def to_empty(self, *, device: torch.device | str | int | None, recurse: bool = True) -> Self:
        """Do as nn.Module's, whose empty_like loads sympy for a tensor of the meta device: half a second of a start."""
        self._apply(lambda weight: torch.empty(weight.shape, dtype=weight.dtype, device=device), recurse)
        return self

    def extra_repr(self) -> str:
        """What no module below says: the embeddings, and the head where it is a matrix of its own."""
        config = self.config
        packed = "" if self.packed_head is None else f", packed={self.packed_head.format}"
        return (
            f"vocab_size={config.vocab_size}, hidden_size={config.hidden_size}, positions={config.positions}, "
            f"max_positions={config.max_positions}, tie_embeddings={config.tie_embeddings}, "
            f"compute_dtype={self.compute_dtype}{packed}"
        )

    @property
    def device(self) -> torch.device:
        return self.final_norm.weight.device

    @property
    def is_packed(self) -> bool:
        return self.packed_head is not None

    def train(self, mode: bool = True) -> "Transformer":
        """Raises: TrainingError to train a packed model."""
        if mode and self.is_packed:
            raise TrainingError(
                "this model's weights are packed for inference and their fp32 originals are gone; training requires "
                "the originals; load the run again with load_run(run, pack=False)."
            )
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Transformer":
        """What moves or converts a module. Raises: DeviceError to move a packed model."""
        if self.is_packed and fn(torch.empty(0, device=self.device)).device != self.device:
            raise DeviceError(
                f"this model is packed on {self.device}, and its weights stay there; another device requires them as "
                f"they were; load the run there, with load_run(run, device=...), or move the model before it is packed."
            )
        return super()._apply(fn, recurse)

    @torch.no_grad()
    def initialize(self, seed: int | None = None) -> "Transformer":
        """Draw every weight; each expert, and the residual MLP beside them, gets its own draw. Returns self.

        Where experts are spread over processes each gets what it would have among all.

        seed None: from torch's global generator. Normal with init_std; matrices that write into the residual stream are
        scaled by 1/sqrt(2 * num_layers), as in GPT-2. Biases start at 0, norms and the experts' output factors at 1.
        """
        generator = None if seed is None else torch.Generator(device=self.embedding.device).manual_seed(seed)
        std = self.config.init_std
        output_std = std / (2 * self.config.num_layers) ** 0.5

        def draw(weight: Tensor, deviation: float) -> None:
            weight.normal_(0.0, deviation, generator=generator)

        draw(self.embedding, std)
        for embedding in (self.position_embedding, self.lm_head):
            if embedding is not None:
                draw(embedding, std)
        for name, module in self.blocks.named_modules():
            if isinstance(module, Linear):
                draw(module.weight, output_std if name.endswith(OUTPUT_LAYERS) else std)
                if module.bias is not None:
                    module.bias.zero_()
            elif isinstance(module, Router):
                draw(module.weight, std)
                for bias in (module.bias, module.score_correction_bias):
                    if bias is not None:
                        bias.zero_()
            elif isinstance(module, Attention) and module.sinks is not None:
                module.sinks.zero_()
            elif isinstance(module, MoELayer) and module.output_scale is not None:
                module.output_scale.fill_(1.0)
            elif isinstance(module, Experts):
                weights = module.weights()
                module.draw(weights.up, partial(draw, deviation=std))
                module.draw(weights.down, partial(draw, deviation=output_std))
                if weights.up_bias is not None and weights.down_bias is not None:
                    weights.up_bias.zero_()
                    weights.down_bias.zero_()
        for module in self.modules():  # the final norm too
            if isinstance(module, RmsNorm | LayerNorm):
                module.weight.fill_(1.0)
                if isinstance(module, LayerNorm):
                    module.bias.zero_()
        return self

    def forward(
        self,
        tokens: Tensor,
        *,
        documents: Tensor | None = None,
        positions: Tensor | None = None,
        valid: Tensor | None = None,
        cache: KVCache | None = None,
        seed: int = 0,
        replay: tuple[RoutingDecision, ...] | None = None,
        keep_block_inputs: bool = False,
    ) -> ModelOutput:
        """Return the hidden states of tokens (B, S) int64.

        documents (B, S): keep attention inside equal numbers. positions (S,) int64: of the tokens of every sequence,
        None for 0 to S - 1; with documents they may count from 0 in each. valid (B, S) bool: False for padding, which
        stands at the end of a sequence. cache: holds earlier positions and takes these. seed: of this step's noise and
        dropping. replay: the decisions of every MoE layer of an earlier pass over the same tokens, taken again.
        keep_block_inputs: have them in the output.

        Raises: ConfigError for tensors of other shapes, and for positions that the model does not have.
        """
        assert cache is None or documents is positions is None, "a cache holds one document per sequence"
        self._check_shapes(tokens, documents, valid)
        if cache is not None:
            return self._forward_cached(tokens, cache, valid, seed, keep_block_inputs)
        end = tokens.shape[1] if positions is None else self._end_of(positions, tokens)
        if end > self.config.max_positions:
            raise ConfigError(
                f"sequences of {end} {'tokens' if positions is None else 'positions'} were given; the model has "
                f"{self.config.max_positions} positions (max_positions); cut them, or make the model with more."
            )
        x, rotary = self._embed(tokens, positions, end)
        return self._run_blocks(x, rotary, documents, valid, None, seed, replay, keep_block_inputs)

    def _end_of(self, positions: Tensor, tokens: Tensor) -> int:
        """Return the position behind the last one."""
        if positions.shape != tokens.shape[1:] or (positions.numel() and int(positions.min()) < 0):
            raise ConfigError(
                f"positions of shape {tuple(positions.shape)} were given with tokens {tuple(tokens.shape)}; one for "
                f"each column, (S,) and none below 0, is required; lay sequences that differ end to end."
            )
        return int(positions.max()) + 1 if positions.numel() else 0

    def _check_shapes(self, tokens: Tensor, documents: Tensor | None, valid: Tensor | None) -> None:
        if tokens.dim() != 2:
            raise ConfigError(
                f"tokens of shape {tuple(tokens.shape)} were given; (batch, length) is required; of one sequence, give "
                f"tokens[None]."
            )
        for name, given in (("documents", documents), ("valid", valid)):
            if given is not None and given.shape != tokens.shape:
                raise ConfigError(
                    f"{name} of shape {tuple(given.shape)} were given with tokens {tuple(tokens.shape)}; one value for "
                    f"each token is required; give the same shape."
                )

    @untraced
    def _forward_cached(
        self, tokens: Tensor, cache: KVCache, valid: Tensor | None, seed: int, keep_block_inputs: bool
    ) -> ModelOutput:
        """All new tokens end to end, whatever sequences they belong to."""
        step = cache.extend(*tokens.shape)
        try:
            return self._run_cached(tokens, step, valid, seed, keep_block_inputs)
        except BaseException:  # the next pass would read what this one has not written
            cache.retract(tokens.shape[1])
            raise

    def _run_cached(
        self, tokens: Tensor, step: CacheStep, valid: Tensor | None, seed: int, keep_block_inputs: bool
    ) -> ModelOutput:
        plan = self.find_plan() if valid is None and not keep_block_inputs else None
        if plan is not None:
            hidden = plan.run(tokens.flatten(), step.storage, step.batch).hidden
            return ModelOutput(hidden.view(*tokens.shape, hidden.shape[-1]), ())
        positions = step.batch.positions.to(tokens.device, non_blocking=True)
        x, rotary = self._embed(tokens.reshape(1, -1), positions, int(step.batch.lengths.max()))
        out = self._run_blocks(x, rotary, None, valid, step, seed, None, keep_block_inputs)
        hidden, *inputs = (each.view(*tokens.shape, each.shape[-1]) for each in (out.hidden, *out.block_inputs))
        return ModelOutput(hidden, out.moe, tuple(inputs))

    @property
    def runs_in_one_call(self) -> bool:
        """Whether a pass with a cache is one call of the C++ kernels, in which no token's result depends on others."""
        return self.find_plan() is not None

    def __getstate__(self) -> dict[str, Any]:
        """A copy makes a plan of its own tensors."""
        return {**self.__dict__, "_plan": None}

    def find_plan(self) -> DecodePlan | None:
        """Return what computes a pass with a cache in one call; None where the layers do, one after the other."""
        # Asked for at every step, so in few operations.
        if self.decode_part is None or not self.final_norm.weight.is_cpu:
            return None
        library = select.cpu_library()
        if library is None:
            return None
        if self._plan is None or self._plan.library is not library or self._plan.reads_ahead != self.reads_ahead:
            self._plan = DecodePlan(self.decode_part, library, self.reads_ahead)
        return self._plan

    @property
    def guessed_share(self) -> float | None:
        """As DecodePlan says it; None too before the first pass."""
        return None if self._plan is None else self._plan.guessed_share

    @untraced
    def infer(self, tokens: Tensor, step: CacheStep, rows: Tensor | None = None) -> Decoded:
        """Take new tokens (T,) int64 of a batch of sequences into a cache: their hidden states, and where they went.

        As forward with a cache, for a caller that keeps the cache itself. The model must be in evaluation mode.
        rows (R,) int64 on the CPU, strictly rising: the tokens whose logits are wanted too; None for none.
        """
        assert not self.training
        plan = self.find_plan()
        if plan is not None:
            return plan.run(tokens, step.storage, step.batch, rows)
        with torch.no_grad():
            return self._infer_by_layers(tokens, step, rows)

    def _infer_by_layers(self, tokens: Tensor, step: CacheStep, rows: Tensor | None) -> Decoded:
        positions = step.batch.positions.to(tokens.device, non_blocking=True)
        x, rotary = self._embed(tokens[None], positions, int(step.batch.lengths.max()))
        routes: list[Routes] = []
        for layer, block in enumerate(self.blocks):
            assert isinstance(block, Block)
            x, own = block.infer(x, rotary=rotary, cache=step, layer=layer)
            routes += [] if own is None else [own]
        hidden = self.final_norm(x)[0]
        ids = [each.expert_ids.flatten() for each in routes]
        weights = [each.routing_weights.flatten() for each in routes]
        logits = hidden.new_empty(0, self.config.vocab_size, dtype=torch.float32)
        if rows is not None:
            logits = self.logits(hidden[rows.to(hidden.device, non_blocking=True)])
        return Decoded(
            hidden,
            torch.cat(ids) if ids else tokens.new_empty(0),
            torch.cat(weights) if weights else torch.empty(0, dtype=torch.float32, device=tokens.device),
            tuple(each.expert_ids.shape[1] for each in routes),
            logits,
        )

    def _run_blocks(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor] | None,
        documents: Tensor | None,
        valid: Tensor | None,
        cache: CacheStep | None,
        seed: int,
        replay: tuple[RoutingDecision, ...] | None,
        keep_block_inputs: bool,
    ) -> ModelOutput:
        if self.config.dropout and self.training:
            x = F.dropout(x, self.config.dropout)
        flat_valid = None if valid is None else valid.reshape(-1)
        statistics: list[MoEStatistics] = []
        inputs: list[Tensor] = []
        for layer, block in enumerate(self.blocks):
            if keep_block_inputs:
                inputs.append(x)
            recorded = _Recorded()
            if replay is not None and self.config.layers[layer].is_moe:
                recorded.decision = replay[len(statistics)]
            run = partial(
                block,
                rotary=rotary,
                documents=documents,
                valid=flat_valid,
                cache=cache,
                layer=layer,
                seed=mix_seeds(seed, layer),
                recorded=recorded,
            )
            if self.activation_checkpointing and self.training and torch.is_grad_enabled():
                # The recomputation finds the decision in `recorded`: a router near a tie cannot choose anew.
                x, layer_statistics = checkpoint(run, x, use_reentrant=False)
            else:
                x, layer_statistics = run(x)
            if layer_statistics is not None:
                statistics.append(layer_statistics)
        return ModelOutput(self.final_norm(x), tuple(statistics), tuple(inputs))

    def _embed(self, tokens: Tensor, positions: Tensor | None, end: int) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """Return the tokens' vectors (B, S, H), and the rotary tables (S, D/2) of their positions, all below end.

        positions (S,): None where they are all those from 0.
        """
        config = self.config
        assert end <= config.max_positions, (end, config.max_positions)
        if config.tie_embeddings and self.packed_head is not None:
            rows = packed_rows(self.packed_head, tokens.flatten())
            x = rows.view(*tokens.shape, config.hidden_size).to(self.compute_dtype)
        else:
            x = F.embedding(tokens, self.embedding).to(self.compute_dtype)
        if config.embedding_scale != 1.0:
            x = x * config.embedding_scale
        if self.position_embedding is not None:
            own = self.position_embedding[:end] if positions is None else self.position_embedding[positions]
            return x + own.to(self.compute_dtype), None
        return x, model_rotary(config, torch.arange(end, device=x.device) if positions is None else positions)

    def output_weight(self) -> Tensor:
        """The (V, H) matrix of the language model head, in the compute dtype."""
        if self.packed_head is not None:
            unpacked = unpack_weight(self.packed_head)
            weight = dequantize(unpacked) if isinstance(unpacked, QuantizedWeight) else unpacked
        else:
            weight = self.embedding if self.lm_head is None else self.lm_head
        return weight.to(self.compute_dtype)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return fp32 logits (..., V) of hidden states (..., H)."""
        if self.packed_head is not None:
            flat = hidden.reshape(-1, hidden.shape[-1])
            logits = packed_linear(flat, self.packed_head, out_dtype=torch.float32)
            return logits.view(*hidden.shape[:-1], self.config.vocab_size)
        return products.linear(hidden, self.output_weight()).float()
