"""GPTQ, AWQ and compressed-tensors: matrices of integers with scales, read as the bf16 nearest to what they stand for.

A matrix (N, K) has a scale and a zero for each row and each group of columns: its number is (integer - zero) * scale.
The layouts differ in what is packed along which side, in which order, and in how zeros are written.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from moesaic.checkpoint.stream import TensorLayout
from moesaic.convert.packing import SCALE_DTYPES, Known, Packing, ReadTensor, check_known, describe
from moesaic.errors import ConversionError

# Of a matrix, what is made fp32 at a time.
_ROWS = 1024
_WORD_BITS = 32
_GPTQ_BITS = (2, 3, 4, 8)
_AWQ_BITS = 4
# What transformers takes a config of GPTQ, AWQ or AutoRound for that does not say how many columns share a scale.
_GROUP_SIZE = 128
# AWQ's words hold eight columns, in this order from the lowest bits on.
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_ANY = None
# What says how a model was quantised, or how its maker's own kernels are to run it: the numbers are what they are. Of
# these, _grouping_of reads the sizes of groups.
_OF_MAKING: Known = dict.fromkeys(
    (
        "quant_method", "group_size", "modules_to_not_convert", "modules_in_block_to_quantize", "backend", "version",
        "meta", "dataset", "tokenizer", "damp_percent", "damp_auto_increment", "act_group_aware", "sym",
        "static_groups", "true_sequential", "mse", "model_name_or_path", "model_file_base_name", "model_seqlen",
        "block_name_to_quantize", "module_name_preceding_first_block", "batch_size", "pad_token_id", "lm_head",
        "cache_block_outputs", "max_input_length", "use_cuda_fp16", "use_exllama", "disable_exllama", "exllama_config",
        "dynamic", "offload_to_disk", "hyb_act", "v2", "zero_point", "do_fuse", "modules_to_fuse", "fuse_max_seq_len",
        "activation",
        # What AutoRound says beside these.
        "act_bits", "act_data_type", "act_dynamic", "act_group_size", "act_sym", "amp", "autoround_version",
        "data_type", "enable_minmax_tuning", "enable_norm_bias_tuning", "enable_quanted_input", "iters", "lr",
        "gradient_accumulate_steps", "low_gpu_mem_usage", "minmax_lr", "nsamples", "provider", "quant_block_list",
        "scale_dtype", "seqlen", "supported_types", "to_quant_block_names", "static_kv_granularity",
        "static_attention_granularity",
    ),
    _ANY,
) | dict.fromkeys(
    ("super_bits", "super_group_size", "static_kv_dtype", "static_attention_dtype", "rotation_configs"), (None,)
)  # fmt: skip
_LAYOUT = (None, "gptq", "gptq_v2")
_BY_ACTIVATION = (None, False, True)
_GPTQ_KEYS: Known = {
    **_OF_MAKING,
    "bits": _GPTQ_BITS,
    "desc_act": _BY_ACTIVATION,
    "checkpoint_format": _LAYOUT,
    "format": _LAYOUT,
    "method": (None, "gptq"),
    "is_marlin_format": (None, False),
    "pack_dtype": (None, "int32"),
    "rotation": (None,),
    "adapter": (None, {}),
}
# What AutoRound calls the layouts of these formats: the second version of GPTQ's in the last two.
_AUTO_ROUND_AWQ, _AUTO_ROUND_GPTQ = "auto_round:auto_awq", "auto_round:auto_gptq"
_AUTO_ROUND_KEYS: Known = {
    **_OF_MAKING,
    "packing_format": (_AUTO_ROUND_AWQ, _AUTO_ROUND_GPTQ, "auto_round:gptqmodel", "auto_round"),
    "bits": _GPTQ_BITS,
    "desc_act": _BY_ACTIVATION,
    "data_type": (None, "int"),
    "extra_config": _ANY,
}
_GEMM = (None, "gemm", "GEMM")
# Kernels that take this layout; gemv's and llm-awq's are others.
_AWQ_BACKENDS = (
    None, "autoawq", "auto", "auto_trainable", "machete", "marlin", "exllama_v1", "exllama_v2", "gemm", "gemm_triton",
    "torch_awq", "torch_fused_awq",
)  # fmt: skip
_AWQ_KEYS: Known = {
    **_OF_MAKING,
    "bits": (None, _AWQ_BITS),
    "w_bit": (None, _AWQ_BITS),
    "q_group_size": _ANY,
    "desc_act": (None, False),
    "backend": _AWQ_BACKENDS,
    "version": _GEMM,
    "format": _GEMM,
    "checkpoint_format": _GEMM,
    "method": (None, "awq"),
    "pack_dtype": (None, "int32"),
    "rotation": (None,),
    "adapter": (None, {}),
}

Parts = Mapping[str, TensorLayout]  # of one matrix, by what follows its name
ReadPart = Callable[[str], Tensor]  # of its parts


@dataclass(frozen=True)
class Grouping:
    """Which columns of a row share a scale, as a config says it.

    sizes: how many that follow each other may, None: all of a row. is_by_activation: columns of a group lie anywhere,
    and a tensor says where.
    """

    sizes: tuple[int | None, ...]
    is_by_activation: bool = False

    def size(self, columns: int, groups: int) -> int | None:
        """Return how many columns that follow each other make one of so many groups, the last of which may be smaller.

        None where no size, or more than one, makes so many, or only a tensor can say which columns do.
        """
        if self.is_by_activation and groups != 1:
            return None
        sizes = {columns if each is None else min(each, columns) for each in self.sizes}
        fitting = [size for size in sizes if size and -(-columns // size) == groups]
        return fitting[0] if len(fitting) == 1 else None

    def __str__(self) -> str:
        return " or ".join("all columns" if each is None else str(each) for each in self.sizes)


@dataclass(frozen=True)
class IntegerMatrix:
    """A matrix (N, K): values (N, K); zeros, the number or (N, G); scales (N, G).

    groups (K,): each column's; None where K / G columns that follow each other are one.
    """

    values: Tensor
    zeros: Tensor | int
    scales: Tensor
    groups: Tensor | None

    def dequantize(self) -> Tensor:
        """Return the bf16 nearest to (value - zero) * scale, (N, K), rounded from the fp32 product."""
        rows, columns = self.values.shape
        out = torch.empty(rows, columns, dtype=torch.bfloat16)
        for start in range(0, rows, _ROWS):
            part = slice(start, min(start + _ROWS, rows))
            zeros = self.zeros if isinstance(self.zeros, int) else self._by_group(self.zeros[part])
            numbers = self.values[part].float()
            if self.groups is None and self.scales.shape[1]:
                numbers = numbers.unflatten(1, (self.scales.shape[1], -1))
            out[part] = numbers.sub_(zeros).mul_(self._by_group(self.scales[part])).flatten(1)
        return out

    def _by_group(self, given: Tensor) -> Tensor:
        """Return zeros or scales (R, G) in fp32 as they meet the values: (R, G, 1), or each column's, (R, K)."""
        wide = given.float()
        return wide[..., None] if self.groups is None else wide.index_select(1, self.groups)


class _IntegerPacking(ABC):
    """Matrices of integers, each in several tensors. A Packing (packing.py).

    suffix: of the tensor that holds the integers, of dtype. others: those of what stands beside it, where it does.
    """

    dtypes: ClassVar[Mapping[str, torch.dtype]] = {}
    kind: ClassVar[str]
    suffix: ClassVar[str]
    dtype: ClassVar[torch.dtype] = torch.int32
    others: ClassVar[tuple[str, ...]]

    @property
    @abstractmethod
    def required(self) -> str:
        """What an error says must be."""

    @property
    def lacking(self) -> str:
        return f"{self.suffix[1:]} of {str(self.dtype).removeprefix('torch.')}"

    def find(self, layout: Mapping[str, TensorLayout]) -> list[str]:
        return [
            f"{name.removesuffix(self.suffix)}.weight"
            for name, each in layout.items()
            if name.endswith(self.suffix) and each.dtype is self.dtype
        ]

    def parts(self, name: str, layout: Mapping[str, TensorLayout]) -> list[str]:
        stem = name.removesuffix(".weight")
        return [stem + suffix for suffix in (self.suffix, *self.others) if stem + suffix in layout]

    def shape(self, name: str, layout: Mapping[str, TensorLayout], read: ReadTensor) -> tuple[int, int] | None:
        stem = name.removesuffix(".weight")
        return self._shape(self._parts(name, layout), lambda suffix: read(stem + suffix))

    def misfit(self, name: str, layout: Mapping[str, TensorLayout], read: ReadTensor) -> str:
        stem = name.removesuffix(".weight")
        found = self._found(self._parts(name, layout), lambda suffix: read(stem + suffix))
        return f"{stem}: {found}; {self.required}"

    def read(self, name: str, index: int | None, layout: Mapping[str, TensorLayout], read: ReadTensor) -> Tensor:
        parts, stem = self._parts(name, layout), name.removesuffix(".weight")
        stored = {suffix: read(stem + suffix) for suffix in parts}
        shape = self._shape(parts, stored.__getitem__)
        assert shape is not None  # what has none is not read
        matrix = self._matrix(stem, stored, shape).dequantize()
        return matrix if index is None else matrix[index]

    def _parts(self, name: str, layout: Mapping[str, TensorLayout]) -> Parts:
        start = len(name) - len(".weight")
        return {each[start:]: layout[each] for each in self.parts(name, layout)}

    def _found(self, parts: Parts, read: ReadPart) -> str:
        """Say what the parts of a matrix are."""
        return ", ".join(f"{suffix[1:]} {describe(each)}" for suffix, each in parts.items())

    @abstractmethod
    def _shape(self, parts: Parts, read: ReadPart) -> tuple[int, int] | None:
        """Return (N, K) of the matrix that parts make, None where they make none."""

    @abstractmethod
    def _matrix(self, name: str, stored: Mapping[str, Tensor], shape: tuple[int, int]) -> IntegerMatrix:
        """Return the matrix of a shape that stored parts make. Raises: ConversionError for numbers that none has."""


@dataclass(frozen=True)
class GptqPacking(_IntegerPacking):
    """Of the transposed matrix, words along K: qweight (K bits / 32, N), qzeros (G, N bits / 32), scales (G, N).

    g_idx (K,) names each column's group; without it groups are columns that follow each other. bits: of most matrices;
    what others have, qzeros tell. zero_offset: what is added to a zero as it is written, 1 in the first version of the
    format.
    """

    bits: int
    zero_offset: int
    grouping: Grouping
    kind = "gptq"
    suffix = ".qweight"
    others = (".qzeros", ".scales", ".g_idx")

    @property
    def required(self) -> str:
        otherwise = "" if self.grouping.is_by_activation else f", or groups of {self.grouping},"
        return (
            f"int32 qweight (K bits / 32, N) and qzeros (G, N bits / 32), scales (G, N) in fp32, bf16 or fp16, and "
            f"int32 g_idx (K){otherwise} are required"
        )

    def _shape(self, parts: Parts, read: ReadPart) -> tuple[int, int] | None:
        if not _are(parts, {".qweight": 2, ".qzeros": 2}, (torch.int32,)) or not _are_scales(parts, ".scales"):
            return None
        (words, rows), (groups, wide) = parts[".qweight"].shape, parts[".scales"].shape
        bits = self._bits_of(rows, parts[".qzeros"].shape[1])
        if bits not in _GPTQ_BITS:
            return None
        if ".g_idx" in parts:
            if not _are(parts, {".g_idx": 1}, (torch.int32,)):
                return None
            columns = parts[".g_idx"].shape[0]
        else:
            columns = words * _WORD_BITS // bits
        fits = (
            columns > 0
            and words == -(-columns * bits // _WORD_BITS)
            and rows == wide
            and parts[".qzeros"].shape == (groups, -(-rows * bits // _WORD_BITS))
            and (".g_idx" in parts or self.grouping.size(columns, groups) is not None)
        )
        return (rows, columns) if fits else None

    def _matrix(self, name: str, stored: Mapping[str, Tensor], shape: tuple[int, int]) -> IntegerMatrix:
        rows, columns = shape
        bits = self._bits_of(rows, stored[".qzeros"].shape[1])
        zeros = unpack(stored[".qzeros"], bits, rows)
        if self.zero_offset and bool((zeros == (1 << bits) - 1).any()):
            raise ConversionError(
                f"{name} has a zero point written as {(1 << bits) - 1}, which some programs take for 0, some for "
                f"{1 << bits}, and some add to the next one; a model whose zero points are read in one way is "
                f"required; take it in another format, or as it was before it was quantised."
            )
        return IntegerMatrix(
            unpack(stored[".qweight"].t(), bits, columns),
            zeros.t().to(torch.int16) + self.zero_offset,
            stored[".scales"].t(),
            _groups(name, stored.get(".g_idx"), columns, len(stored[".scales"]), self.grouping),
        )

    def _bits_of(self, rows: int, words: int) -> int:
        """Return the bits of a matrix whose zeros take so many words, which tell where there are 32 of them or more."""
        return self.bits if rows < _WORD_BITS else words * _WORD_BITS // rows


@dataclass(frozen=True)
class AwqPacking(_IntegerPacking):
    """Of the transposed matrix, words along N: qweight (K, N / 8), qzeros (G, N / 8), scales (G, N)."""

    grouping: Grouping
    kind = "awq"
    suffix = ".qweight"
    others = (".qzeros", ".scales")

    @property
    def required(self) -> str:
        return (
            f"int32 qweight (K, N / 8) and qzeros (G, N / 8), and scales (G, N) in fp32, bf16 or fp16, of groups of "
            f"{self.grouping}, are required"
        )

    def _shape(self, parts: Parts, read: ReadPart) -> tuple[int, int] | None:
        if not _are(parts, {".qweight": 2, ".qzeros": 2}, (torch.int32,)) or not _are_scales(parts, ".scales"):
            return None
        (columns, words), (groups, rows) = parts[".qweight"].shape, parts[".scales"].shape
        fits = (
            words * _WORD_BITS == rows * _AWQ_BITS
            and parts[".qzeros"].shape == (groups, words)
            and self.grouping.size(columns, groups) is not None
        )
        return (rows, columns) if fits else None

    def _matrix(self, name: str, stored: Mapping[str, Tensor], shape: tuple[int, int]) -> IntegerMatrix:
        values, zeros, scales = _in_order(stored[".qweight"]).t(), _in_order(stored[".qzeros"]).t(), stored[".scales"]
        return IntegerMatrix(values, zeros, scales.t(), _groups(name, None, shape[1], len(scales), self.grouping))


@dataclass(frozen=True)
class PackedPacking(_IntegerPacking):
    """compressed-tensors' `pack-quantized`: weight_packed (N, W), weight_scale (N, G), weight_shape: N and K.

    weight_zero_point (V, G) where integers are not symmetric, words along N. Words follow each other without gaps, W =
    K bits / 32, since version 0.18, and had 32 // bits numbers each before. grouping: of one size.
    """

    bits: int
    grouping: Grouping
    is_symmetric: bool
    kind = "pack-quantized"
    suffix = ".weight_packed"
    others = (".weight_scale", ".weight_zero_point", ".weight_g_idx", ".weight_shape")

    @property
    def required(self) -> str:
        words = f"K {self.bits} / 32"
        if _WORD_BITS % self.bits:
            words += f" or K / {_WORD_BITS // self.bits}, whichever is not the other's number too"
        return (
            f"weight_shape (2) of N and K, int32 weight_packed (N, {words}), weight_scale (N, G) in fp32, bf16 or "
            f"fp16, of groups of {self.grouping}, int32 weight_zero_point, whose words are as those of the weight but "
            f"along N, where zero is not in the middle, and int32 weight_g_idx (K) where groups are by activation, "
            f"are required"
        )

    def _shape(self, parts: Parts, read: ReadPart) -> tuple[int, int] | None:
        fits = (
            _are(parts, {".weight_packed": 2}, (torch.int32,))
            and _are(parts, {".weight_shape": 1}, (torch.int32, torch.int64))
            and parts[".weight_shape"].shape == (2,)
            and _are_scales(parts, ".weight_scale", rank=None)
            and (self.is_symmetric or _are(parts, {".weight_zero_point": 2}, (torch.int32,)))
            and not (self.is_symmetric and ".weight_zero_point" in parts)
        )
        if not fits:
            return None
        rows, columns = read(".weight_shape").tolist()
        stored_rows, words = parts[".weight_packed"].shape
        groups = _num_groups(parts[".weight_scale"].shape, rows)
        of_zeros = () if self.is_symmetric else parts[".weight_zero_point"].shape
        fits = (
            rows == stored_rows
            and columns >= 0
            and groups is not None
            and of_zeros[1:] in ((), (groups,))
            and _are_groups(parts.get(".weight_g_idx"), columns, groups, self.grouping)
            and self._has_gaps([(columns, words), *((rows, each) for each in of_zeros[:1])]) is not None
        )
        return (rows, columns) if fits else None

    def _found(self, parts: Parts, read: ReadPart) -> str:
        found, given = super()._found(parts, read), parts.get(".weight_shape")
        return found if given is None or given.shape != (2,) else f"{found} ({read('.weight_shape').tolist()})"

    def _matrix(self, name: str, stored: Mapping[str, Tensor], shape: tuple[int, int]) -> IntegerMatrix:
        rows, columns = shape
        words, packed = stored[".weight_packed"], stored.get(".weight_zero_point")
        has_gaps = self._has_gaps([(columns, words.shape[1]), *(() if packed is None else ((rows, len(packed)),))])
        take = _unpack_words if has_gaps else unpack
        zeros = (1 << (self.bits - 1)) if packed is None else take(packed.t(), self.bits, rows).t()
        scales = _spread(stored[".weight_scale"], rows)
        groups = _groups(name, stored.get(".weight_g_idx"), columns, scales.shape[1], self.grouping)
        return IntegerMatrix(take(words, self.bits, columns), zeros, scales, groups)

    def _has_gaps(self, counts: Sequence[tuple[int, int]]) -> bool | None:
        """Whether words that hold so many numbers have 32 // bits each. counts: of numbers, and of their words.

        None where they are of neither kind, or could be of either and mean other numbers.
        """
        in_word = _WORD_BITS // self.bits
        are_full = all(words == -(-numbers * self.bits // _WORD_BITS) for numbers, words in counts)
        have_gaps = all(words == -(-numbers // in_word) for numbers, words in counts)
        if are_full and have_gaps:
            are_same = _WORD_BITS % self.bits == 0 or all(numbers <= in_word for numbers, _ in counts)
            return False if are_same else None
        return have_gaps if are_full or have_gaps else None


@dataclass(frozen=True)
class BytesPacking(_IntegerPacking):
    """compressed-tensors' `int-quantized`: weight (N, K) in int8, weight_scale and weight_zero_point (N, G)."""

    grouping: Grouping
    is_symmetric: bool
    kind = "int-quantized"
    suffix = ".weight"
    dtype = torch.int8
    others = (".weight_scale", ".weight_zero_point", ".weight_g_idx")

    @property
    def required(self) -> str:
        return (
            f"int8 weight (N, K), weight_scale (N, G) in fp32, bf16 or fp16, of groups of {self.grouping}, int8 "
            f"weight_zero_point (N, G) where zero is not 0, and int32 weight_g_idx (K) where groups are by "
            f"activation, are required"
        )

    def _shape(self, parts: Parts, read: ReadPart) -> tuple[int, int] | None:
        if not _are(parts, {".weight": 2}, (torch.int8,)) or not _are_scales(parts, ".weight_scale", rank=None):
            return None
        rows, columns = parts[".weight"].shape
        groups = _num_groups(parts[".weight_scale"].shape, rows)
        if not groups or not _are_groups(parts.get(".weight_g_idx"), columns, groups, self.grouping):
            return None
        zeros = parts.get(".weight_zero_point")
        if self.is_symmetric:
            return None if zeros is not None else (rows, columns)
        fits = zeros is not None and zeros.dtype is torch.int8 and zeros.shape == parts[".weight_scale"].shape
        return (rows, columns) if fits else None

    def _matrix(self, name: str, stored: Mapping[str, Tensor], shape: tuple[int, int]) -> IntegerMatrix:
        values, zeros = stored[".weight"], stored.get(".weight_zero_point")
        scales = _spread(stored[".weight_scale"], len(values))
        groups = _groups(name, stored.get(".weight_g_idx"), shape[1], scales.shape[1], self.grouping)
        return IntegerMatrix(values, 0 if zeros is None else _spread(zeros, len(values)), scales, groups)


def read_gptq(given: Mapping[str, Any], where: str) -> tuple[Packing, ...]:
    """Return what a quantization_config of GPTQ says. Raises: ConversionError for what is not known."""
    check_known(given, _GPTQ_KEYS, f"{where}: quantization_config")
    named = {given[key] for key in ("checkpoint_format", "format") if given.get(key)}
    if len(named) > 1:
        raise ConversionError(
            f"{where}: quantization_config says checkpoint_format {given['checkpoint_format']} and format "
            f"{given['format']}, whose zero points differ by 1; one is required; remove what is not so."
        )
    return (GptqPacking(given["bits"], 0 if named == {"gptq_v2"} else 1, _grouping_of(given, where)),)


def read_awq(given: Mapping[str, Any], where: str) -> tuple[Packing, ...]:
    """Return what a quantization_config of AWQ says. Raises: ConversionError for what is not known."""
    check_known(given, _AWQ_KEYS, f"{where}: quantization_config")
    return (AwqPacking(_grouping_of(given, where)),)


def read_auto_round(given: Mapping[str, Any], where: str) -> tuple[Packing, ...]:
    """Return what a quantization_config of AutoRound says. Raises: ConversionError for what is not known."""
    check_known(given, _AUTO_ROUND_KEYS, f"{where}: quantization_config")
    layout, grouping = given["packing_format"], _grouping_of(given, where)
    if layout == _AUTO_ROUND_AWQ:
        return (AwqPacking(grouping),)
    return (GptqPacking(given["bits"], 1 if layout == _AUTO_ROUND_GPTQ else 0, grouping),)


def _grouping_of(given: Mapping[str, Any], where: str) -> Grouping:
    """Return how a config of GPTQ, AWQ or AutoRound groups columns. Raises: ConversionError for sizes that are none.

    What it says of single modules, in one of two ways, is what any of them may have.
    """
    own = given["group_size"] if given.get("group_size") is not None else given.get("q_group_size")
    sizes = [_GROUP_SIZE if own is None else own]
    for key in ("dynamic", "extra_config"):
        of_modules = given.get(key)
        for each in of_modules.values() if isinstance(of_modules, dict) else ():
            if isinstance(each, dict) and each.get("group_size") is not None:
                sizes.append(each["group_size"])
    for size in sizes:
        if type(size) is not int or (size < 1 and size != -1):
            raise ConversionError(
                f"{where}: quantization_config says group_size {size!r}; a number of columns that share a scale, or -1 "
                f"for a row's, is required; mend the config."
            )
    return Grouping(tuple(dict.fromkeys(None if size == -1 else size for size in sizes)), given.get("desc_act") is True)


def unpack(words: Tensor, bits: int, count: int) -> Tensor:
    """Return the first count numbers of `bits` bits of each row of int32 words (..., W), the lowest first, uint8.

    They follow each other without gaps, so that one may lie in two words.
    """
    packed = words.contiguous().view(torch.uint8)
    mask = (1 << bits) - 1
    if 8 % bits == 0:
        return torch.stack([packed >> shift & mask for shift in range(0, 8, bits)], -1).flatten(-2)[..., :count]
    # Eight numbers are as many bytes as each has bits.
    padding = -packed.shape[-1] % bits
    if padding:
        packed = torch.nn.functional.pad(packed, (0, padding))
    packed = packed.unflatten(-1, (-1, bits))
    out = torch.empty(*packed.shape[:-1], 8, dtype=torch.uint8)
    for place in range(8):
        byte, shift = divmod(place * bits, 8)
        number = packed[..., byte] >> shift
        if shift + bits > 8:
            number = number | (packed[..., byte + 1] << (8 - shift))
        out[..., place] = number & mask
    return out.flatten(-2)[..., :count]


def _unpack_words(words: Tensor, bits: int, count: int) -> Tensor:
    """Return the first count numbers of words (..., W), 32 // bits in each, the lowest bits first, uint8."""
    mask = (1 << bits) - 1
    numbers = torch.empty(*words.shape, _WORD_BITS // bits, dtype=torch.uint8)
    for place in range(numbers.shape[-1]):
        numbers[..., place] = words >> (place * bits) & mask
    return numbers.flatten(-2)[..., :count]


def _in_order(words: Tensor) -> Tensor:
    """Return AWQ's numbers of words (K, N / 8) in the order of their columns, (K, N)."""
    numbers = unpack(words, _AWQ_BITS, words.shape[-1] * len(_AWQ_ORDER)).unflatten(-1, (-1, len(_AWQ_ORDER)))
    out = torch.empty_like(numbers)
    out[..., list(_AWQ_ORDER)] = numbers
    return out.flatten(-2)


def _groups(name: str, given: Tensor | None, columns: int, num_groups: int, grouping: Grouping) -> Tensor | None:
    """Return each column's group, None where K / G columns that follow each other are one.

    given: as the file has it, if it does; all -1, as compressed-tensors writes it, says nothing. Raises:
    ConversionError for a group that has no scales, and for what says nothing where it must.
    """
    if given is None or (columns and bool((given == -1).all())):
        size = grouping.size(columns, num_groups)
        if size is None:
            raise ConversionError(
                f"{name} has {columns} columns in {num_groups} groups, and -1 for the group of each; their numbers, 0 "
                f"to {num_groups - 1}, are required; take the model as it was before it was quantised."
            )
        return None if size * num_groups == columns else torch.arange(columns) // size
    size = columns // num_groups if num_groups else 0
    if size * num_groups == columns and torch.equal(given.long(), torch.arange(columns) // max(1, size)):
        return None
    if columns and not 0 <= int(given.min()) <= int(given.max()) < num_groups:
        raise ConversionError(
            f"{name} has columns of groups {int(given.min())} to {int(given.max())}; those that have scales, 0 to "
            f"{num_groups - 1}, are required; fetch the file again."
        )
    return given.long()


def _are_groups(given: TensorLayout | None, columns: int, groups: int, grouping: Grouping) -> bool:
    """Whether compressed-tensors' weight_g_idx could be that of so many columns, or need not be there."""
    if given is None:
        return grouping.size(columns, groups) is not None
    return given.dtype in (torch.int32, torch.int64) and given.shape == (columns,)


def _num_groups(shape: tuple[int, ...], rows: int) -> int | None:
    """Return G of scales (N, G), or of one for the whole matrix; None for others."""
    if shape in ((), (1,)):
        return 1
    return shape[1] if len(shape) == 2 and shape[0] == rows else None


def _spread(scales: Tensor, rows: int) -> Tensor:
    """Return scales as (N, G), also where the matrix has one."""
    return scales if scales.dim() == 2 else scales.reshape(1, 1).expand(rows, 1)


def _are(parts: Parts, ranks: Mapping[str, int], dtypes: tuple[torch.dtype, ...]) -> bool:
    return all(
        suffix in parts and len(parts[suffix].shape) == rank and parts[suffix].dtype in dtypes
        for suffix, rank in ranks.items()
    )


def _are_scales(parts: Parts, suffix: str, *, rank: int | None = 2) -> bool:
    found = parts.get(suffix)
    return found is not None and found.dtype in SCALE_DTYPES and rank in (None, len(found.shape))
