"""The one Transformer: a pre-norm decoder whose layers are described by ModelConfig.layers."""

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moesaic.config.model import FeedForwardConfig, ModelConfig
from moesaic.model.attention import Attention
from moesaic.model.feed_forward import FeedForward
from moesaic.model.kv_cache import KVCache
from moesaic.model.linear import Linear
from moesaic.model.norm import LayerNorm, RmsNorm, make_norm
from moesaic.model.rotary import rotary_table
from moesaic.moe.experts import Experts
from moesaic.moe.layer import MoEStatistics, RoutingDecision
from moesaic.moe.router import Router
from moesaic.moe.seeds import mix_seeds


@dataclass(frozen=True)
class ModelOutput:
    """hidden (B, S, H), after the final norm; moe: the statistics of each MoE layer, in order."""

    hidden: Tensor
    moe: tuple[MoEStatistics, ...]


class _Recorded:
    """Holds a layer's routing decision between a checkpointed forward pass and its recomputation."""

    def __init__(self) -> None:
        self.decision: RoutingDecision | None = None


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, config: ModelConfig, layer: FeedForwardConfig) -> None:
        super().__init__()
        self.attention_norm = make_norm(config.norm, config.hidden_size, config.norm_epsilon)
        self.attention = Attention(config)
        self.feed_forward_norm = make_norm(config.norm, config.hidden_size, config.norm_epsilon)
        self.feed_forward = FeedForward(config, layer)
        self.dropout = config.dropout

    def forward(
        self,
        x: Tensor,
        *,
        rotary: tuple[Tensor, Tensor] | None,
        documents: Tensor | None,
        valid: Tensor | None,
        cache: KVCache | None,
        layer: int,
        seed: int,
        recorded: _Recorded,
    ) -> tuple[Tensor, MoEStatistics | None]:
        attended = self.attention(self.attention_norm(x), rotary=rotary, documents=documents, cache=cache, layer=layer)
        x = x + self._drop(attended)
        flat = self.feed_forward_norm(x).view(-1, x.shape[-1])  # (T, H)
        out, statistics = self.feed_forward(flat, valid=valid, seed=seed, replay=recorded.decision)
        if statistics is not None:
            recorded.decision = statistics.decision
        return x + self._drop(out.view_as(x)), statistics

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout) if self.dropout and self.training else x


class Transformer(nn.Module):
    """Parameters are fp32 (the master weights); matrix work runs in `compute_dtype`."""

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
        self.blocks = nn.ModuleList(Block(config, layer) for layer in config.layers)
        self.final_norm = make_norm(config.norm, config.hidden_size, config.norm_epsilon)
        self.lm_head = None if config.tie_embeddings else nn.Parameter(torch.empty_like(self.embedding))

    @torch.no_grad()
    def initialize(self, seed: int) -> "Transformer":
        """Draw every weight; each expert, and the residual MLP beside them, gets its own draw. Returns self.

        Normal with init_std; matrices that write into the residual stream are scaled by 1/sqrt(2 * num_layers), as in
        GPT-2. Biases start at 0, norms at 1.
        """
        generator = torch.Generator(device=self.embedding.device).manual_seed(seed)
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
                draw(module.weight, output_std if name.endswith(("o_proj", "down_proj")) else std)
                if module.bias is not None:
                    module.bias.zero_()
            elif isinstance(module, Router):
                draw(module.weight, std)
                if module.score_correction_bias is not None:
                    module.score_correction_bias.zero_()
            elif isinstance(module, Experts):
                weights = module.weights()
                draw(weights.up, std)
                draw(weights.down, output_std)
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
        valid: Tensor | None = None,
        cache: KVCache | None = None,
        seed: int = 0,
        replay: tuple[RoutingDecision, ...] | None = None,
    ) -> ModelOutput:
        """Return the hidden states of tokens (B, S) int64.

        documents (B, S): keep attention inside equal numbers. valid (B, S) bool: False for padding, which stands at the
        end of a sequence. cache: holds earlier positions and takes these. seed: of this step's noise and dropping.
        replay: the decisions of every MoE layer of an earlier pass over the same tokens, taken again.
        """
        assert tokens.dim() == 2, tokens.shape
        assert cache is None or documents is None, "a cache holds one document per sequence"
        start = 0 if cache is None else cache.length
        end = start + tokens.shape[1]
        assert end <= self.config.max_positions, (end, self.config.max_positions)
        x = F.embedding(tokens, self.embedding).to(self.compute_dtype)
        rotary = None
        if self.position_embedding is not None:
            x = x + self.position_embedding[start:end].to(self.compute_dtype)
        else:
            config = self.config
            table = rotary_table(end, config.head_dim, config.rope_theta, tokens.device)
            rotary = (table[0][start:], table[1][start:])
        if self.config.dropout and self.training:
            x = F.dropout(x, self.config.dropout)
        flat_valid = None if valid is None else valid.reshape(-1)
        statistics: list[MoEStatistics] = []
        for layer, block in enumerate(self.blocks):
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
        return ModelOutput(self.final_norm(x), tuple(statistics))

    def output_weight(self) -> Tensor:
        """The (V, H) matrix of the language model head, in the compute dtype."""
        weight = self.embedding if self.lm_head is None else self.lm_head
        return weight.to(self.compute_dtype)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return fp32 logits (..., V) of hidden states (..., H)."""
        return F.linear(hidden, self.output_weight()).float()
