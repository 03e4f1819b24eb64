"""Multi-head latent attention: keys and values of all heads are products of one small vector per token.

With a cache, which holds that vector and one rotary key, the products are moved to the other side: a query is brought
into the small vectors' space, and their weighed mean out of it, so that no head's keys and values exist. A prompt is
cheaper with them, which a packed model forgoes: in it a token's result does not depend on how its prompt is cut.
Source: DeepSeek-V2 (arXiv 2405.04434), section 2.1.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moesaic.config.model import ModelConfig
from moesaic.kernels import products
from moesaic.kernels.attention import causal_attention
from moesaic.kernels.latent_attention import LatentStorage, latent_attention, write_latents
from moesaic.kernels.packed import PackedWeight, packed_heads, unpack_stack
from moesaic.kernels.paged_attention import PagedBatch
from moesaic.model.kv_cache import CacheStep
from moesaic.model.linear import Linear, is_plain
from moesaic.model.norm import RmsNorm
from moesaic.model.rotary import rotate


class LatentAttention(nn.Module):
    """A head's query has channels [nope, rope], its key [nope], beside one rotary key for all heads.

    Shapes, with N, P and C the channels of nope, rope and value, Q and R the ranks: q_proj (A * (N + P), H), or with a
    query_rank q_down_proj (Q, H), q_down_norm (Q,) and q_up_proj (A * (N + P), Q); kv_down_proj (R + P, H), the last
    rows for the rotary key; kv_down_norm (R,); kv_up_proj (A * (N + C), R), a head's rows [key, value];
    o_proj (H, A * C).

    Packed for inference, in_proj (A * (N + P) + R + P, H) or (Q + R + P, H) has the rows of q_proj or q_down_proj and
    of kv_down_proj; up is in the place of kv_up_proj: of keys (A, R, N) and of values (A, C, R), in bf16.
    """

    in_proj: Linear
    up: tuple[PackedWeight, PackedWeight] | None

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        latent = config.latent_attention
        assert latent is not None, "ModelConfig.latent_attention is null"
        self.num_heads, self.rank = config.num_heads, latent.kv_rank
        self.nope_dim, self.rope_dim, self.value_dim = (
            latent.nope_head_dim, latent.rope_head_dim, latent.value_head_dim,
        )  # fmt: skip
        self.scale = config.attention_scale or config.head_dim**-0.5
        self.dropout = config.dropout
        hidden_size, query_size = config.hidden_size, config.num_heads * config.head_dim
        self.has_query_rank = latent.query_rank is not None
        if latent.query_rank is not None:
            self.q_down_proj = Linear(hidden_size, latent.query_rank, has_bias=False)
            self.q_down_norm = RmsNorm(latent.query_rank, epsilon=latent.norm_epsilon)
            self.q_up_proj = Linear(latent.query_rank, query_size, has_bias=False)
        else:
            self.q_proj = Linear(hidden_size, query_size, has_bias=False)
        self.kv_down_proj = Linear(hidden_size, self.rank + self.rope_dim, has_bias=False)
        self.kv_down_norm = RmsNorm(self.rank, epsilon=latent.norm_epsilon)
        self.kv_up_proj = Linear(self.rank, config.num_heads * (self.nope_dim + self.value_dim), has_bias=False)
        self.up = None
        self.o_proj = Linear(config.num_heads * self.value_dim, hidden_size, has_bias=False)

    @property
    def inputs_shared(self) -> tuple[tuple[str, ...], ...]:
        """The projections in the order in which data meets them; those of a tuple have the same inputs."""
        if self.has_query_rank:
            return ("q_down_proj", "kv_down_proj"), ("q_up_proj",), ("kv_up_proj",), ("o_proj",)
        return ("q_proj", "kv_down_proj"), ("kv_up_proj",), ("o_proj",)

    def extra_repr(self) -> str:
        return (
            f"num_heads={self.num_heads}, kv_rank={self.rank}, nope_head_dim={self.nope_dim}, "
            f"rope_head_dim={self.rope_dim}, value_head_dim={self.value_dim}"
        )

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

        rotary: tables (S, P/2) of these positions. documents (B, S): attention stays inside equal numbers. cache: holds
        the earlier positions, and takes these as `layer`'s; B is 1, S all its new tokens.
        """
        assert rotary is not None, "latent attention has rotary positions"
        if self.up is None:
            query = self.q_down_proj(x) if self.has_query_rank else self.q_proj(x)
            latent, key = self.kv_down_proj(x).split([self.rank, self.rope_dim], 2)
        else:
            query, latent, key = self.in_proj(x).tensor_split([-self.rank - self.rope_dim, -self.rope_dim], 2)
        if self.has_query_rank:
            query = self.q_up_proj(self.q_down_norm(query))
        nope, rope = query.unflatten(2, (self.num_heads, -1)).split([self.nope_dim, self.rope_dim], 3)
        latent = self.kv_down_norm(latent)  # (B, S, R)
        rope, key = rotate(rope, *rotary), rotate(key[:, :, None], *rotary)  # (B, S, A, P) and (B, S, 1, P)
        if cache is None:
            out = self._expanded(nope, rope, latent, key, documents)
        else:
            out = self._cached(nope[0], rope[0], latent[0], key[0], cache, layer)[None]
        return self.o_proj(out.flatten(2))

    def _expanded(self, nope: Tensor, rope: Tensor, latent: Tensor, key: Tensor, documents: Tensor | None) -> Tensor:
        """Attention (B, S, A, C) of whole sequences, with the keys and values of every head."""
        keys, values = self._keys_and_values(latent)
        keys = torch.cat([keys, key.expand(-1, -1, self.num_heads, -1)], 3)
        dropout = self.dropout if self.training else 0.0
        query = torch.cat([nope, rope], 3)
        return causal_attention(query, keys, values, documents=documents, dropout=dropout, scale=self.scale)

    def _cached(self, nope: Tensor, rope: Tensor, latent: Tensor, key: Tensor, cache: CacheStep, layer: int) -> Tensor:
        """Attention (T, A, C) of new tokens, end to end, to what their sequences' cache holds."""
        assert isinstance(cache.storage, LatentStorage), type(cache.storage)
        blocks, batch = cache.storage.layers[layer], cache.batch
        write_latents(torch.cat([latent, key[:, 0]], 1), blocks, batch)
        if self.up is not None:
            inwards, outwards = self.up
            queries = torch.cat([packed_heads(nope, inwards), rope], 2)
            return packed_heads(latent_attention(queries, blocks, batch, scale=self.scale), outwards)
        out = nope.new_empty(*nope.shape[:2], self.value_dim)
        starts, others = batch.starts.tolist(), []
        for sequence, length in enumerate(batch.lengths.tolist()):
            new = slice(starts[sequence], starts[sequence + 1])
            if self._is_cheaper_expanded(new.stop - new.start, length):
                parts = (nope[None, new], rope[None, new], latent[None, new], key[None, new])
                out[new] = self._expanded(*parts, None)[0]
            elif new.stop > new.start:
                others.append(sequence)
        if not others:
            return out
        rows, rest = _only(others, batch, starts)
        key_up, value_up = self.up_matrices(nope.dtype)
        # A head at a time: (A, T, N) by (A, N, R) into the latents' space, (A, T, R) by (A, R, C) out of it.
        absorbed = torch.bmm(nope[rows].transpose(0, 1), key_up).transpose(0, 1)
        means = latent_attention(torch.cat([absorbed, rope[rows]], 2), blocks, rest, scale=self.scale)
        out[rows] = torch.bmm(means.transpose(0, 1), value_up.transpose(1, 2)).transpose(0, 1)
        return out

    def _keys_and_values(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        """Every head's keys (B, S, A, N) and values (B, S, A, C) for latents (B, S, R)."""
        if self.up is None:
            heads = self.kv_up_proj(latent).unflatten(2, (self.num_heads, -1))
            keys, values = heads.split([self.nope_dim, self.value_dim], 3)
            return keys, values
        key_up, value_up = (unpack_stack(weight).to(latent.dtype) for weight in self.up)
        keys, values = (
            products.linear(latent, weight.flatten(0, 1)).unflatten(2, (self.num_heads, -1))
            for weight in (key_up.transpose(1, 2), value_up)
        )
        return keys, values

    def up_matrices(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The matrices (A, N, R) and (A, C, R) that make keys and values of a latent."""
        layer = self.kv_up_proj
        if is_plain(layer):
            weight: Tensor = layer.weight.to(dtype)
        else:  # an adapter in its place, which is known by what it makes of the unit vectors
            weight = layer(torch.eye(self.rank, dtype=dtype, device=layer.weight.device)).t()
        key_up, value_up = weight.unflatten(0, (self.num_heads, -1)).split([self.nope_dim, self.value_dim], 1)
        return key_up, value_up

    def _is_cheaper_expanded(self, new: int, length: int) -> bool:
        """Whether a sequence of only new tokens is better served by every head's own keys and values.

        They take N + P + C products for a head and pair of positions instead of 2 R + P. To make them takes R * (N + C)
        for a head and position, and so does bringing a query into the latents' space and the mean out of it.
        """
        return new == length > 0 and self.nope_dim + self.value_dim < 2 * self.rank


def _only(sequences: list[int], batch: PagedBatch, starts: list[int]) -> tuple[Tensor | slice, PagedBatch]:
    """Return the rows of some of a batch's sequences, in order, and the batch of these alone."""
    if len(sequences) == batch.lengths.shape[0]:
        return slice(None), batch
    chosen = torch.tensor(sequences, device="cpu")
    counts = batch.starts.diff()[chosen]
    rows = torch.cat([torch.arange(starts[each], starts[each + 1], device="cpu") for each in sequences])
    own = F.pad(counts.cumsum(0), (1, 0)).to(torch.int32)
    return rows, PagedBatch(own, batch.lengths[chosen], batch.block_tables[chosen])
