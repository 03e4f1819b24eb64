"""A pass of a whole packed model over new tokens in one C++ call: the plan of a model, and running it.

What is computed is defined by the model's own layers, one operation after the other (model/transformer.py); here the
same operations run inside one team of threads, so that a token's step costs the reading of its weights and little else.
A plan holds the addresses of everything that a step reads; it is made once for a model and a set of kernels.
"""

import ctypes
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moesaic.errors import GenerationError
from moesaic.kernels.addresses import RemembersAddresses
from moesaic.kernels.cpu.build import Library
from moesaic.kernels.huge_pages import HUGE_PAGE_BYTES, zeros_on_huge_pages
from moesaic.kernels.latent_attention import LatentStorage
from moesaic.kernels.packed import PackedMlp, PackedWeight
from moesaic.kernels.paged_attention import KVStorage, PagedBatch

Storage = KVStorage | LatentStorage

_SCORINGS = ("softmax", "sigmoid")
_MIXES = ("sum", "softmax", "sigmoid")
# Positions whose cosines are made together, and that every model has.
_FIRST_POSITIONS = 4096


@dataclass(frozen=True)
class NormPart:
    """weight (H,) fp32, and bias (H,) fp32 for LayerNorm, None for RMSNorm."""

    weight: Tensor
    bias: Tensor | None


@dataclass(frozen=True)
class RouterPart:
    """What moe/router.Router computes in evaluation: weight (E, H), and bias and correction_bias (E,) or None, fp32."""

    weight: Tensor
    bias: Tensor | None
    correction_bias: Tensor | None
    top_k: int
    scoring: str
    num_groups: int
    top_groups: int
    renormalize: bool
    scale: float


@dataclass(frozen=True)
class LayerPart:
    """One layer. mlp: the dense MLP, or the residual one beside the experts. latent: of latent attention.

    Shapes: qkv ((A + 2 KV) * D, H), rows of queries, keys, values, or as LatentPart says; o_proj (H, A * D), or
    (H, A * C); mix (2, H) or (1, H) where residual_mix is not "sum"; biases fp32 or None; q_norm and k_norm fp32 or
    None, both (D,) for each head, or (A * D,) and (KV * D,) for all heads together; of latent attention (Q,), or None,
    and (R,); sinks (A,) fp32. is_rotated: heads are turned, where the model has tables. norms_rotated: they are normed
    after that. has_window: its tokens see the model's window alone. first_expert: of the router's the first one that
    `experts` has, where others are on other processes.
    """

    attention_norm: NormPart
    qkv: PackedWeight
    qkv_bias: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None
    is_rotated: bool
    norms_rotated: bool
    sinks: Tensor | None
    has_window: bool
    o_proj: PackedWeight
    o_bias: Tensor | None
    feed_forward_norm: NormPart
    mlp: PackedMlp | None
    experts: PackedMlp | None
    router: RouterPart | None
    residual_mix: str
    mix: PackedWeight | None
    mix_bias: Tensor | None
    latent: "LatentPart | None" = None
    first_expert: int = 0


@dataclass(frozen=True)
class LatentPart:
    """What latent attention multiplies by.

    LayerPart.qkv has the rows of all queries (A * D), or of the vector that they are made of (Q), and behind them those
    of the latent (R) and the key that all heads share (P).

    Shapes: q_up (A * D, Q) or None; key_up (A, R, N) and value_up (A, C, R), N and C a head's channels of keys beside
    the shared one and of values.
    """

    q_up: PackedWeight | None
    key_up: PackedWeight
    value_up: PackedWeight
    rope_dim: int
    norm_epsilon: float


class RotaryTable:
    """Cosines and sines of positions, made as far as texts reach: models have up to a million, and most texts do not.

    Shapes: cosines, sines (max_positions, D/2) fp32, with latent attention (max_positions, P/2), of which the first
    num_positions are there.
    """

    def __init__(self, max_positions: int, make: Callable[[int, int], tuple[Tensor, Tensor]]) -> None:
        """Hold what `make` returns of the positions from one on and before another."""
        shape = (max_positions, make(0, 1)[0].shape[1])
        with torch.inference_mode(False):  # whose tensors only it may change
            self.cosines, self.sines = (torch.empty(shape, dtype=torch.float32, device="cpu") for _ in range(2))
        self.num_positions, self._make = 0, make
        self.reach(1)

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy makes its own, and no memory for what nobody has asked for."""
        return RotaryTable, (self.cosines.shape[0], self._make)

    def reach(self, length: int) -> None:
        """Have at least so many positions, where the model has them; it may be called by several threads."""
        done = self.num_positions
        end = min(max(length, 2 * done, _FIRST_POSITIONS), self.cosines.shape[0])
        for first in range(done, end, _FIRST_POSITIONS):
            last = min(first + _FIRST_POSITIONS, end)
            self.cosines[first:last], self.sines[first:last] = self._make(first, last)
        self.num_positions = max(self.num_positions, end)


@dataclass(frozen=True)
class ModelPart:
    """A packed model. norms_outputs: its norms stand behind attention and feed-forward parts, or before them.

    Shapes: embedding (V, H) bf16, or packed where it is lm_head too; position_embedding (max_positions, H) bf16, or
    the table of rotary positions. add_others: returns for what this process's experts make of tokens, (T, H) fp32, the
    sum of that and what other processes' make of them; None where all experts are here.
    """

    layers: tuple[LayerPart, ...]
    embedding: Tensor | PackedWeight
    position_embedding: Tensor | None
    rotary: RotaryTable | None
    final_norm: NormPart
    head: PackedWeight
    hidden_size: int
    vocab_size: int
    max_positions: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_epsilon: float
    norms_outputs: bool
    attention_scale: float
    embedding_scale: float
    residual_scale: float
    window: int | None
    add_others: Callable[[Tensor], Tensor] | None = None


@dataclass(frozen=True)
class Decoded(RemembersAddresses):
    """What a step gives: hidden (T, H) after the final norm, and the routes, of one MoE layer after the other.

    Shapes: all_expert_ids, all_routing_weights (sum over MoE layers of T * K,); top_k: K of each MoE layer; logits
    (R, V) fp32 of the R tokens that were asked for. found_likeliest (R,): `likeliest`, where the kernels have found it.
    """

    hidden: Tensor
    all_expert_ids: Tensor
    all_routing_weights: Tensor
    top_k: tuple[int, ...]
    logits: Tensor
    found_likeliest: "array[int] | None" = None

    @cached_property
    def sizes(self) -> tuple[int, int]:
        """T and R."""
        return self.hidden.shape[0], self.logits.shape[0]

    @cached_property
    def addresses(self) -> tuple[int, ...]:
        """Of what the kernels write."""
        assert self.found_likeliest is not None
        tensors = (self.hidden, self.all_expert_ids, self.all_routing_weights, self.logits)
        return *(tensor.data_ptr() for tensor in tensors), self.found_likeliest.buffer_info()[0]

    @property
    def likeliest(self) -> Sequence[int]:
        """(R,): of each row of logits the first of the largest; -1 where they are not all finite."""
        return self._likeliest if self.found_likeliest is None else self.found_likeliest

    @cached_property
    def _likeliest(self) -> list[int]:
        found: list[int]
        if self.logits.is_cpu:  # NumPy's takes a tenth of the time there
            logits = self.logits_on_cpu
            found = np.where(np.isfinite(logits).all(-1), logits.argmax(-1), -1).tolist()
        else:
            found = torch.where(self.logits.isfinite().all(-1), self.logits.argmax(-1), -1).tolist()
        return found

    @cached_property
    def logits_on_cpu(self) -> NDArray[np.float32]:
        """The logits where tokens are chosen from them."""
        found: NDArray[np.float32] = self.logits.cpu().numpy()
        return found

    @cached_property
    def expert_id_bytes(self) -> memoryview:
        """Of all_expert_ids, on the CPU, where they are counted."""
        return self.all_expert_ids.cpu().contiguous().numpy().data.cast("B")

    @property
    def expert_ids(self) -> tuple[Tensor, ...]:
        """For each MoE layer, in order, the chosen experts (T, K) int64."""
        return self._by_layer(self.all_expert_ids)

    @property
    def routing_weights(self) -> tuple[Tensor, ...]:
        """For each MoE layer, in order, the weights (T, K) fp32 that the chosen experts' outputs got."""
        return self._by_layer(self.all_routing_weights)

    def _by_layer(self, routes: Tensor) -> tuple[Tensor, ...]:
        # Made when asked for: two views a layer are much of a step's Python, and most steps need none.
        count = self.sizes[0]
        parts = routes.split([count * top_k for top_k in self.top_k]) if self.top_k else ()
        return tuple(part.view(count, -1) for part in parts)


def _address(value: Tensor | PackedWeight | PackedMlp | None) -> int | None:
    if value is None:
        return None
    return value.data_ptr() if isinstance(value, Tensor) else ctypes.addressof(value.struct)


def _structure(name: str, **fields: Any) -> type[ctypes.Structure]:
    return type(name, (ctypes.Structure,), {"_fields_": list(fields.items())})


_P, _I, _D = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double
_Add = ctypes.CFUNCTYPE(None, _P, _I)
_Norm = _structure("NormWeights", weight=_P, bias=_P)
_Guesses = _structure("ExpertGuesses", share=_D, num_passes=_I)
_Layer = _structure(
    "DecodeLayer",
    attention_norm=_Norm, feed_forward_norm=_Norm, qkv_proj=_P, qkv_bias=_P, q_norm=_P, k_norm=_P, norms_all_heads=_I,
    is_rotated=_I, norms_rotated=_I, q_up=_P, key_up=_P, value_up=_P, sinks=_P, has_window=_I, o_proj=_P, o_bias=_P,
    mlp=_P, experts=_P, num_experts=_I, top_k=_I, first_expert=_I, own_experts=_I, router=_P, router_bias=_P,
    correction_bias=_P, scoring=_I, num_groups=_I, top_groups=_I, renormalize=_I, router_scale=_D, mix=_I,
    mix_weight=_P, mix_bias=_P,
)  # fmt: skip
_Model = _structure(
    "DecodeModel",
    num_layers=_I, hidden_size=_I, vocab_size=_I, max_positions=_I, num_heads=_I, num_kv_heads=_I, head_dim=_I,
    norms_outputs=_I, norm_epsilon=_D, attention_scale=_D, embedding_scale=_D, residual_scale=_D, window=_I, layers=_P,
    tied_embedding=_P, embedding=_P, position_embedding=_P, cosines=_P, sines=_P, final_norm=_Norm, head=_P,
    guesses=_P, kv_rank=_I, query_rank=_I, nope_dim=_I, rope_dim=_I, value_dim=_I, latent_epsilon=_D,
    add_others=_Add,
)  # fmt: skip


@dataclass(frozen=True)
class DecodePlan:
    """A model's addresses for one library; `model` keeps alive what they point to.

    reads_ahead: its experts lie in a mapped file that does not fit into memory, so that a pass over few tokens guesses
    which experts the next layer chooses, from the hidden state before this layer's; guesses that have been right often
    enough are faulted in by threads of their own.
    """

    model: ModelPart
    library: Library
    reads_ahead: bool = False

    @cached_property
    def _routers(self) -> tuple[Tensor | None, ...]:
        """Each layer's router weight as the kernels read it."""
        pack = self.library.function("moesaic_decode_router", "iipp")
        routers = [layer.router for layer in self.model.layers]
        weights = [None if each is None else each.weight.float().contiguous() for each in routers]
        sizes = [0 if weight is None else pack(*weight.shape, weight.data_ptr(), None) for weight in weights]
        # All together on huge pages: finding dozens of small ones in the page tables took longer than reading them.
        size = 4 * sum(sizes)
        if size > HUGE_PAGE_BYTES // 4:  # of a smaller mapping, and between whole pages, there would be none
            size = -(-size // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
        memory = zeros_on_huge_pages(size, torch.device("cpu"))
        panels = memory.view(torch.float32)[: sum(sizes)].split(sizes)
        for weight, own in zip(weights, panels, strict=True):
            if weight is not None:
                pack(*weight.shape, weight.data_ptr(), own.data_ptr())
        return tuple(None if weight is None else own for weight, own in zip(weights, panels, strict=True))

    @cached_property
    def _layers(self) -> Any:
        model = self.model
        return (_Layer * len(model.layers))(
            *[
                _fill_layer(layer, panels, head_dim=model.head_dim)
                for layer, panels in zip(model.layers, self._routers, strict=True)
            ]
        )

    @cached_property
    def _struct(self) -> ctypes.Structure:
        model = self.model
        is_tied = isinstance(model.embedding, PackedWeight)
        table = model.rotary
        cosines, sines = (None, None) if table is None else (table.cosines, table.sines)
        return _Model(
            len(model.layers), model.hidden_size, model.vocab_size, self._num_positions, model.num_heads,
            model.num_kv_heads, model.head_dim, model.norms_outputs, model.norm_epsilon, model.attention_scale,
            model.embedding_scale, model.residual_scale, model.window or 0, ctypes.addressof(self._layers),
            _address(model.embedding) if is_tied else None, None if is_tied else _address(model.embedding),
            _address(model.position_embedding), _address(cosines), _address(sines), _fill_norm(model.final_norm),
            _address(model.head), ctypes.addressof(self._guesses) if self.reads_ahead else None,
            *_latent_sizes(model.layers[0].latent), self._add_others,
        )  # fmt: skip

    @cached_property
    def _add_others(self) -> Any:
        return _Add() if self.model.add_others is None else _Add(self._add)

    @cached_property
    def _failures(self) -> list[BaseException]:
        return []

    def _add(self, address: int, count: int) -> None:
        """Add to fp32 numbers (count, H) what others make; what it raises is kept, as C++ can take none."""
        if self._failures:
            return
        try:
            assert self.model.add_others is not None
            size = self.model.hidden_size
            sums = np.ctypeslib.as_array((ctypes.c_float * (count * size)).from_address(address)).reshape(count, size)
            own = torch.from_numpy(sums)
            own.copy_(self.model.add_others(own))
        except BaseException as error:
            self._failures.append(error)

    @cached_property
    def _guesses(self) -> Any:
        return _Guesses(0.0, 0)

    @property
    def guessed_share(self) -> float | None:
        """Of the experts that were chosen of late, the share that had been guessed; None where nothing is guessed."""
        return float(self._guesses.share) if self.reads_ahead else None

    @cached_property
    def _work_per_token(self) -> float:
        """A rough count of its operations: whether more than one thread is worth waking."""
        work = 0
        for layer in self.model.layers:
            work += layer.qkv.shape.numel() + layer.o_proj.shape.numel()
            if layer.latent is not None:
                others = (layer.latent.q_up, layer.latent.key_up, layer.latent.value_up)
                work += sum(weight.shape.numel() for weight in others if weight is not None)
            work += 0 if layer.mlp is None else 3 * layer.mlp.down.shape.numel()
            if layer.experts is not None and layer.router is not None:
                work += 3 * layer.router.top_k * layer.experts.down.in_size * layer.experts.down.out_size
        return 2.0 * work

    @cached_property
    def _top_k(self) -> tuple[int, ...]:
        return tuple(layer.router.top_k for layer in self.model.layers if layer.router is not None)

    def run(
        self,
        tokens: Tensor,
        storage: Storage,
        batch: PagedBatch,
        rows: Tensor | None = None,
        *,
        into: Decoded | None = None,
    ) -> Decoded:
        """Take the new tokens (T,) int64 of a batch into the storage and return their hidden states.

        rows (R,) int64, strictly rising: the tokens whose logits are wanted; None for none. into: what an earlier run
        of as many tokens and rows returned; it is overwritten and returned.

        Raises: GenerationError for a token outside the vocabulary.
        """
        model, count = self.model, tokens.shape[0]
        assert tokens.dim() == 1 and tokens.dtype == torch.int64, (tokens.shape, tokens.dtype)
        assert len(storage.layers) == len(model.layers), (len(storage.layers), len(model.layers))
        assert isinstance(storage, LatentStorage) == (model.layers[0].latent is not None), type(storage)
        assert storage.dtype in (torch.bfloat16, torch.int8), storage.dtype
        tokens = tokens.contiguous()
        num_rows = 0
        if rows is not None:
            assert rows.dtype is torch.int64 and rows.is_contiguous() and rows.is_cpu, rows
            num_rows = rows.shape[0]
        out = self._make_room(count, num_rows) if into is None else into
        assert out.sizes == (count, num_rows), (out.sizes, count, num_rows)
        function = self.library.function("moesaic_decode", "pdp" + "pppii" + "pipi" + "ppppp")
        arguments = (
            ctypes.addressof(self._struct), self._work_per_token, storage.arguments.data_ptr(), *batch.arguments,
            tokens.data_ptr(), count, None if rows is None else rows.data_ptr(), num_rows, *out.addresses,
        )  # fmt: skip
        failed = function(*arguments)
        if self._failures:
            raise self._failures.pop()
        if failed == 1 and self._reach(int(batch.lengths.max())):
            failed = function(*arguments)
        assert failed != 1, (batch, rows, storage.layers[0].num_blocks, model.max_positions)
        if failed:
            raise GenerationError(
                f"there are token ids from {int(tokens.min())} to {int(tokens.max())}; ids from 0 to "
                f"{model.vocab_size - 1} are required; use the model's own tokenizer."
            )
        return out

    @property
    def _num_positions(self) -> int:
        return self.model.max_positions if self.model.rotary is None else self.model.rotary.num_positions

    def _reach(self, length: int) -> bool:
        """Have a pass see so many positions; return whether it saw fewer, and the model has them."""
        seen = self._struct.max_positions
        if self.model.rotary is None or not seen < length <= self.model.max_positions:
            return False
        self.model.rotary.reach(length)
        self._struct.max_positions = self._num_positions
        return True

    def _make_room(self, count: int, num_rows: int) -> Decoded:
        routes = count * sum(self._top_k)
        return Decoded(
            torch.empty(count, self.model.hidden_size, dtype=torch.bfloat16, device="cpu"),
            torch.empty(routes, dtype=torch.int64, device="cpu"),
            torch.empty(routes, dtype=torch.float32, device="cpu"),
            self._top_k,
            torch.empty(num_rows, self.model.vocab_size, dtype=torch.float32, device="cpu"),
            array("q", bytes(8 * num_rows)),
        )


def _latent_sizes(latent: LatentPart | None) -> tuple[int, int, int, int, int, float]:
    if latent is None:
        return 0, 0, 0, 0, 0, 0.0
    query_rank = 0 if latent.q_up is None else latent.q_up.in_size
    key_up, value_up = latent.key_up, latent.value_up
    return key_up.out_size, query_rank, key_up.in_size, latent.rope_dim, value_up.out_size, latent.norm_epsilon


def _fill_norm(norm: NormPart) -> ctypes.Structure:
    return _Norm(_address(norm.weight), _address(norm.bias))


def _fill_layer(layer: LayerPart, panels: Tensor | None, *, head_dim: int) -> ctypes.Structure:
    router, latent = layer.router, layer.latent
    return _Layer(
        attention_norm=_fill_norm(layer.attention_norm),
        feed_forward_norm=_fill_norm(layer.feed_forward_norm),
        qkv_proj=_address(layer.qkv),
        qkv_bias=_address(layer.qkv_bias),
        q_norm=_address(layer.q_norm),
        k_norm=_address(layer.k_norm),
        norms_all_heads=layer.q_norm is not None and layer.q_norm.numel() != head_dim,
        is_rotated=layer.is_rotated,
        norms_rotated=layer.norms_rotated,
        q_up=None if latent is None else _address(latent.q_up),
        key_up=None if latent is None else _address(latent.key_up),
        value_up=None if latent is None else _address(latent.value_up),
        sinks=_address(layer.sinks),
        has_window=layer.has_window,
        o_proj=_address(layer.o_proj),
        o_bias=_address(layer.o_bias),
        mlp=_address(layer.mlp),
        experts=_address(layer.experts),
        num_experts=0 if router is None else router.weight.shape[0],
        top_k=0 if router is None else router.top_k,
        first_expert=layer.first_expert,
        own_experts=0 if layer.experts is None else layer.experts.up.num_matrices,
        router=_address(panels),
        router_bias=None if router is None else _address(router.bias),
        correction_bias=None if router is None else _address(router.correction_bias),
        scoring=0 if router is None else _SCORINGS.index(router.scoring),
        num_groups=1 if router is None else router.num_groups,
        top_groups=1 if router is None else router.top_groups,
        renormalize=router is not None and router.renormalize,
        router_scale=1.0 if router is None else router.scale,
        mix=_MIXES.index(layer.residual_mix),
        mix_weight=_address(layer.mix),
        mix_bias=_address(layer.mix_bias),
    )
