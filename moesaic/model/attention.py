"""Multi-head and grouped-query causal attention with optional QK-norm, rotary positions, windows and sinks."""

import torch
from torch import Tensor, nn

from moesaic.config.model import ModelConfig
from moesaic.kernels.attention import causal_attention
from moesaic.kernels.paged_attention import KVStorage, can_place_heads, paged_attention, place_heads, write_kv
from moesaic.model.kv_cache import CacheStep
from moesaic.model.linear import Linear
from moesaic.model.norm import RmsNorm
from moesaic.model.rotary import rotate


class Attention(nn.Module):
    """Shapes: q_proj (A * D, H), k_proj and v_proj (KV * D, H), o_proj (H, A * D); q_norm and k_norm (D,) for each
    head, or (A * D,) and (KV * D,) for all together; sinks (A,).

    Packed for inference, qkv_proj ((A + 2 KV) * D, H) is in the place of the first three.
    """

    qkv_proj: Linear | None

    def __init__(self, config: ModelConfig, *, layer: int = 0) -> None:
        """layer: says which positions a token sees, and whether heads are turned."""
        super().__init__()
        self.window = config.window_of(layer)  # positions, a token's own the last of them; None for all up to it
        self.is_rotated = config.is_rotated(layer)
        self.num_heads, self.num_kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.scale = config.attention_scale
        self.dropout = config.dropout
        has_bias = config.attention_bias in ("qkv", "all")
        self.q_proj = Linear(config.hidden_size, config.num_heads * config.head_dim, has_bias=has_bias)
        self.k_proj = Linear(config.hidden_size, config.num_kv_heads * config.head_dim, has_bias=has_bias)
        self.v_proj = Linear(config.hidden_size, config.num_kv_heads * config.head_dim, has_bias=has_bias)
        self.qkv_proj = None
        self.o_proj = Linear(
            config.num_heads * config.head_dim, config.hidden_size, has_bias=config.attention_bias == "all"
        )
        self.sinks = nn.Parameter(torch.zeros(config.num_heads)) if config.attention_sinks else None
        self.norms_all_heads, self.norms_rotated = config.qk_norm == "full", config.qk_norm == "rotated_head"
        self.q_norm, self.k_norm = (
            None
            if config.qk_norm == "none"
            else RmsNorm(config.head_dim * (heads if self.norms_all_heads else 1), epsilon=config.norm_epsilon)
            for heads in (config.num_heads, config.num_kv_heads)
        )

    @property
    def inputs_shared(self) -> tuple[tuple[str, ...], ...]:
        """The projections in the order in which data meets them; those of a tuple have the same inputs."""
        return ("q_proj", "k_proj", "v_proj"), ("o_proj",)

    def extra_repr(self) -> str:
        window = "" if self.window is None else f", window={self.window}"
        sinks = "" if self.sinks is None else ", sinks=True"
        rotated = "" if self.is_rotated else ", is_rotated=False"
        sizes = f"num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, head_dim={self.head_dim}"
        return f"{sizes}{window}{sinks}{rotated}"

    def forward(
        self,
        x: Tensor,
        *,
        rotary: tuple[Tensor, Tensor] | None = None,
        documents: Tensor | None = None,
        cache: CacheStep | None = None,
        layer: int = 0,
    ) -> Tensor:
        """Return (B, S, H) for x (B, S, H).

        rotary: tables (S, D/2) of these positions, None for learned ones; of no use in a layer whose heads are not
        turned. documents (B, S): attention stays inside equal numbers. cache: holds the earlier positions, and takes
        these as `layer`'s; B is 1, S all its new tokens.
        """
        batch, length, _ = x.shape
        query, key, value = self._project(x)
        if cache is not None and can_place_heads(query):
            out = self._attend_to_cache(query[0], key[0], value[0], rotary, cache, layer)
            return self.o_proj(out.view(1, length, -1))
        if not self.norms_rotated:
            query, key = self._norm(self.q_norm, query), self._norm(self.k_norm, key)
        if rotary is not None and self.is_rotated:
            query, key = rotate(query, *rotary), rotate(key, *rotary)
        if self.norms_rotated:
            query, key = self._norm(self.q_norm, query), self._norm(self.k_norm, key)
        if cache is None:
            dropout = self.dropout if self.training else 0.0
            out = causal_attention(
                query,
                key,
                value,
                documents=documents,
                dropout=dropout,
                scale=self.scale,
                window=self.window,
                sinks=self.sinks,
            )
        else:
            assert isinstance(cache.storage, KVStorage), type(cache.storage)
            blocks = cache.storage.layers[layer]
            write_kv(key[0], value[0], blocks, cache.batch)
            out = paged_attention(query[0], blocks, cache.batch, scale=self.scale, window=self.window, sinks=self.sinks)
        return self.o_proj(out.reshape(batch, length, self.num_heads * self.head_dim))

    def _attend_to_cache(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        rotary: tuple[Tensor, Tensor] | None,
        cache: CacheStep,
        layer: int,
    ) -> Tensor:
        """What forward does with (T, heads, D) of new tokens, in two kernels."""
        assert isinstance(cache.storage, KVStorage), type(cache.storage)
        norms, epsilon = None, 0.0
        if self.q_norm is not None and self.k_norm is not None:
            if self.norms_all_heads:
                query, key = self._norm(self.q_norm, query[None])[0], self._norm(self.k_norm, key[None])[0]
            else:
                norms, epsilon = (self.q_norm.scaled()[0], self.k_norm.scaled()[0]), self.q_norm.epsilon
        blocks = cache.storage.layers[layer]
        query = place_heads(
            query, key, value, blocks, cache.batch, rotary=rotary if self.is_rotated else None, norms=norms,
            epsilon=epsilon, norms_rotated=self.norms_rotated,
        )  # fmt: skip
        return paged_attention(query, blocks, cache.batch, scale=self.scale, window=self.window, sinks=self.sinks)

    def _norm(self, norm: RmsNorm | None, heads: Tensor) -> Tensor:
        if norm is None:
            return heads
        return norm(heads.flatten(2)).view(heads.shape) if self.norms_all_heads else norm(heads)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries (B, S, A, D), keys and values (B, S, KV, D)."""
        kv_heads = self.num_kv_heads
        if self.qkv_proj is not None:
            heads = self.qkv_proj(x).unflatten(2, (-1, self.head_dim))
            query, key, value = heads.split([self.num_heads, kv_heads, kv_heads], 2)
            return query, key, value
        query, key, value = (
            project(x).unflatten(2, (-1, self.head_dim)) for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        return query, key, value
