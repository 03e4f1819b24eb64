"""Multi-head and grouped-query causal attention with optional QK-norm and rotary positions."""

from torch import Tensor, nn

from moesaic.config.model import ModelConfig
from moesaic.kernels.attention import cached_attention, causal_attention
from moesaic.model.kv_cache import KVCache
from moesaic.model.linear import Linear
from moesaic.model.norm import RmsNorm
from moesaic.model.rotary import rotate


class Attention(nn.Module):
    """Shapes: q_proj (A * D, H), k_proj and v_proj (KV * D, H), o_proj (H, A * D); q_norm and k_norm (D,)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.dropout = config.dropout
        has_bias = config.attention_bias in ("qkv", "all")
        self.q_proj = Linear(config.hidden_size, config.num_heads * config.head_dim, has_bias=has_bias)
        self.k_proj = Linear(config.hidden_size, config.num_kv_heads * config.head_dim, has_bias=has_bias)
        self.v_proj = Linear(config.hidden_size, config.num_kv_heads * config.head_dim, has_bias=has_bias)
        self.o_proj = Linear(
            config.num_heads * config.head_dim, config.hidden_size, has_bias=config.attention_bias == "all"
        )
        self.q_norm = RmsNorm(config.head_dim, epsilon=config.norm_epsilon) if config.qk_norm else None
        self.k_norm = RmsNorm(config.head_dim, epsilon=config.norm_epsilon) if config.qk_norm else None

    def forward(
        self,
        x: Tensor,
        *,
        rotary: tuple[Tensor, Tensor] | None = None,
        documents: Tensor | None = None,
        cache: KVCache | None = None,
        layer: int = 0,
    ) -> Tensor:
        """Return (B, S, H) for x (B, S, H).

        rotary: tables (S, D/2) of these positions, None for learned positions. documents (B, S): attention stays inside
        equal numbers. cache: holds the earlier positions, and takes these as `layer`'s.
        """
        batch, length, _ = x.shape
        query = self.q_proj(x).view(batch, length, self.num_heads, self.head_dim)
        key = self.k_proj(x).view(batch, length, self.num_kv_heads, self.head_dim)
        value = self.v_proj(x).view(batch, length, self.num_kv_heads, self.head_dim)
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        if rotary is not None:
            query, key = rotate(query, *rotary), rotate(key, *rotary)
        if cache is None:
            dropout = self.dropout if self.training else 0.0
            out = causal_attention(query, key, value, documents=documents, dropout=dropout)
        else:
            out = cached_attention(query, *cache.append(layer, key, value))
        return self.o_proj(out.reshape(batch, length, self.num_heads * self.head_dim))
