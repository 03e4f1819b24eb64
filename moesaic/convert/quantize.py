"""A run with matrices of 8 or 4 bits, made from a trained one, and the report that says what it cost.

Matrices are read, rounded and written one at a time, into a folder that takes its name only once the report is written
and within its limits. How numbers are rounded is rounding.py's business, on which inputs calibrate.py's.
"""

import json
import math
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from moesaic.checkpoint.quantized import (
    KEY,
    SCALES,
    STEPS,
    VALUES,
    Scheme,
    quantization_record,
    require_unquantized,
)
from moesaic.checkpoint.store import CheckpointInfo, checked_file, resolve_checkpoint
from moesaic.checkpoint.stream import TensorLayout, TensorReader, TensorWriter
from moesaic.config.train import TrainConfig
from moesaic.convert.calibrate import Quantized, calibrated_weights
from moesaic.convert.defaults import CALIBRATION_TOKENS, MAX_KL, MAX_PERPLEXITY_RATIO, REPORT_TOKENS
from moesaic.convert.folder import check_is_new, check_is_outside, finish_run, folder_in_progress, new_weights
from moesaic.convert.tensors import require_finite
from moesaic.data.loader import ValidationLoader
from moesaic.data.shards import MANIFEST_NAME, ShardSet
from moesaic.data.sources import TEXT_FIELD
from moesaic.data.tokenizer import Tokenizer
from moesaic.errors import ConfigError, ConversionError, DataError
from moesaic.evaluate.perplexity import Comparison, Perplexity, compare, record_reference, text_windows
from moesaic.evaluate.text import read_documents
from moesaic.kernels import mxfp4
from moesaic.kernels.quantized import GROUP_SIZES, MAX_COLUMNS, quantize_to_mxfp4, quantize_weight
from moesaic.logs import OnProgress, logger, no_progress
from moesaic.model.load import load_run, load_run_config
from moesaic.report.json_values import json_values

REPORT_NAME = "quantization.json"
ExpertFormat = Literal["int8", "int4", "mxfp4"]
RestFormat = Literal["int4", "int8", "bf16"]
Kind = Literal["experts", "attention", "mlp", "output", "embedding", "other"]
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True)
class KindReport:
    """All tensors of a kind: numbers, and bytes as the run stores them, as a bf16 model holds them, and quantised."""

    kind: Kind
    format: str
    parameters: int
    bytes_stored: int
    bytes_bf16: int
    bytes_quantized: int


@dataclass(frozen=True)
class QuantizationReport:
    """What a conversion gave. kl is the mean over tokens of KL(run || quantised) in nats."""

    source: str
    source_step: int
    experts: str | None
    rest: str
    group_size: int | None
    calibration: str | None
    calibration_tokens: int
    text: str
    reference: Perplexity
    quantized: Perplexity
    kl: float
    top1_agreement: float
    kinds: tuple[KindReport, ...]

    @property
    def perplexity_ratio(self) -> float:
        return self.quantized.perplexity / self.reference.perplexity

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON has it; a number that is not finite becomes null."""

        def measured(each: Perplexity) -> dict[str, Any]:
            return {**asdict(each), "perplexity": each.perplexity, "bits_per_byte": each.bits_per_byte}

        values = {
            **asdict(self),
            "reference": measured(self.reference),
            "quantized": measured(self.quantized),
            "perplexity_ratio": self.perplexity_ratio,
            "kinds": {each.kind: asdict(each) for each in self.kinds},
        }
        return dict(json_values(values))


def quantize_run(
    run: str | Path,
    output: str | Path,
    *,
    experts: ExpertFormat | None = None,
    rest: RestFormat = "int8",
    group_size: int | None = None,
    calibrate: str | Path | None = None,
    calibration_tokens: int | None = None,
    text: str | Path | None = None,
    text_field: str | None = None,
    limit_tokens: int = REPORT_TOKENS,
    max_perplexity_ratio: float = MAX_PERPLEXITY_RATIO,
    max_kl: float = MAX_KL,
    force: bool = False,
    on_progress: OnProgress = no_progress,
) -> QuantizationReport:
    """Write the run that RUN or RUN@step names to a new folder, quantised, and return what that cost.

    experts None: int8 where there are experts. group_size None: 64 where something becomes int4. calibrate: text or
    prepared shards (their training split) to calibrate on; "none" rounds to nearest; None: the run's own shards where
    something takes 4 bits and they are there, else "none". text None: the validation split of the run's own shards.
    text_field None: `text`, of what has fields. on_progress hears of stages and of the share of each that is done.

    Raises: ConversionError when perplexity ratio or KL exceed their limits and force is not given; ConfigError,
    CheckpointError, DataError. In every case nothing is left behind, but for the packed weights of a run larger than
    memory, beside it.
    """
    _check_limit("max_perplexity_ratio", max_perplexity_ratio)
    _check_limit("max_kl", max_kl)
    info = resolve_checkpoint(run)
    config = load_run_config(info.run_folder)
    output = Path(output)
    check_is_new(output)
    check_is_outside(output, info.run_folder)
    with ExitStack() as source:
        path = source.enter_context(checked_file(info, "model"))
        plan = _plan(path, info, config, experts=experts, rest=rest, group_size=group_size)
        text = _own_shards(config, "--text") if text is None else text
        calibrate = resolve_calibration(
            calibrate, config, has_4_bits=any(each.bits == 4 for each in plan.schemes.values())
        )
        if text_field is not None and all(each is None or _is_shards(each) for each in (text, calibrate)):
            raise ConfigError(
                f"text_field ({text_field}) is given and no text to read it from; shards have no fields; name a text "
                f"with --text or --calibrate, or leave it out."
            )
        field = text_field or TEXT_FIELD
        tokenizer = Tokenizer.load(info.run_folder)
        batches: list[Tensor] = []
        if calibrate is not None:
            num_tokens = CALIBRATION_TOKENS if calibration_tokens is None else calibration_tokens
            batches = calibration_batches(calibrate, tokenizer, config, num_tokens=num_tokens, text_field=field)
        elif calibration_tokens is not None:
            raise ConfigError(
                f"calibration_tokens ({calibration_tokens}) is given without a calibration text; there is nothing to "
                f"take them from; name a text, or leave it out."
            )

        with folder_in_progress(output) as folder:  # first, since what takes long should not end with a path of no use
            on_progress("measuring the run as it is", 0.0)
            loaded = load_run(info.run_at_step, device="cpu")
            windows = text_windows(loaded, text, limit_tokens=limit_tokens, text_field=field)
            reference = record_reference(loaded.model, windows, device=loaded.device)
            del loaded  # from here on one layer at a time

            on_progress("quantising", 0.0)
            weights = new_weights(folder, info.step)
            _write_tensors(path, weights, plan, config, batches, on_progress)
            source.close()  # whose weights are known from here on to be those that were measured and read
            calibration = None if calibrate is None else str(calibrate)
            metadata = {
                **{key: value for key, value in info.metadata.items() if key in ("tokens", "model")},
                KEY: {
                    **quantization_record(plan.schemes, experts=plan.experts, rest=plan.rest),
                    "source": str(info.run_folder),
                    "calibration": calibration,
                },
            }
            finish_run(weights, info.step, config=config, tokenizer=tokenizer, metadata=metadata)

            on_progress("measuring the quantised run", 0.0)
            quantized = load_run(folder, device="cpu")
            result = compare(quantized.model, reference, windows, device=quantized.device)
            report = QuantizationReport(
                source=str(info.run_folder),
                source_step=info.step,
                experts=plan.experts,
                rest=plan.rest,
                group_size=plan.group_size,
                calibration=calibration,
                calibration_tokens=sum(batch.numel() for batch in batches),
                text=str(text),
                reference=reference.perplexity,
                quantized=result.perplexity,
                kl=result.kl,
                top1_agreement=result.top1_agreement,
                kinds=plan.reports(),
            )
            _check_limits(report, result, max_perplexity_ratio=max_perplexity_ratio, max_kl=max_kl, force=force)
            (folder / REPORT_NAME).write_text(json.dumps(report.to_json(), indent=1, allow_nan=False), encoding="utf-8")
    return report


def resolve_calibration(given: str | Path | None, config: TrainConfig, *, has_4_bits: bool) -> str | Path | None:
    """Return the calibration text that is meant: the one given, None for "none", and where none is given the run's own
    shards if something takes 4 bits and they are there."""
    if given is not None:
        return None if given == "none" else given
    if not has_4_bits:
        return None
    path = config.data.path
    if _has_own_shards(config):
        logger.info("Calibrating on %s, which the run was trained on; --calibrate names another text.", path)
        return path
    logger.info("Rounding to nearest: %s, and --calibrate names no text.", _absence(config))
    return None


def calibration_batches(
    source: str | Path, tokenizer: Tokenizer, config: TrainConfig, *, num_tokens: int, text_field: str = TEXT_FIELD
) -> list[Tensor]:
    """Return (B, S) int64 batches of at most num_tokens tokens, in sequences spaced evenly over the source.

    source is a text as `moesaic prepare` reads it, or a folder that it wrote, of which the training split is taken.

    Raises: ConfigError for fewer tokens than one sequence has; DataError for a source that is missing or too short.
    """
    length = config.data.sequence_length
    if num_tokens < length:
        raise ConfigError(
            f"calibration_tokens ({num_tokens}) is less than a sequence of {length}; calibration takes whole "
            f"sequences; use {CALIBRATION_TOKENS}."
        )
    if _is_shards(source):
        shards = ShardSet.open(source)
        shards.check_tokenizer(tokenizer)
        loader = ValidationLoader(
            shards.train, sequence_length=length, batch_size=max(1, 4096 // length), sequences=num_tokens // length
        )
        return [batch.inputs for batch in loader]
    border = np.array([tokenizer.first_id], dtype=np.int32)
    documents = read_documents(source, tokenizer, text_field=text_field, vocab_size=config.model.vocab_size)
    tokens = np.concatenate([part for document in documents for part in (border, document.ids)])
    available = len(tokens) // length
    if available == 0:
        raise DataError(
            f"{source} holds {len(tokens)} tokens; calibration needs a sequence of {length}; name a longer text."
        )
    count = min(num_tokens // length, available)
    starts = np.arange(count) * available // count * length
    sequences = np.stack([tokens[start : start + length] for start in starts.tolist()]).astype(np.int64)
    return list(torch.from_numpy(sequences).split(max(1, 4096 // length)))


@dataclass(frozen=True)
class _Plan:
    """What becomes of every tensor of a checkpoint, by name: as it is stored, its kind, the schemes of those quantised.

    kept_dtypes: what the others are stored in.
    """

    stored: Mapping[str, TensorLayout]
    kinds: Mapping[str, Kind]
    schemes: dict[str, Scheme]
    kept_dtypes: Mapping[str, torch.dtype]
    experts: str | None
    rest: str
    group_size: int | None

    def layout(self) -> dict[str, TensorLayout]:
        layout = {}
        for name, stored in self.stored.items():
            scheme, shape = self.schemes.get(name), stored.shape
            if scheme is None:
                layout[name] = TensorLayout(self.kept_dtypes[name], shape)
                continue
            *rows, columns = shape
            layout[name + SCALES] = TensorLayout(torch.float32, tuple(rows))
            if scheme.group_size is None:
                layout[name + VALUES] = TensorLayout(torch.int8, shape)
                continue
            layout[name + VALUES] = TensorLayout(torch.uint8, (*rows, columns // 2))
            groups = (*rows, columns // scheme.group_size)
            if scheme.is_mxfp4:
                layout[name + SCALES] = TensorLayout(torch.uint8, groups)
            else:
                layout[name + STEPS] = TensorLayout(torch.int8, groups)
        return layout

    def reports(self) -> tuple[KindReport, ...]:
        layout = self.layout()
        reports = []
        for kind in KINDS:
            names = [name for name in self.stored if self.kinds[name] == kind]
            if not names:
                continue
            parameters = {name: math.prod(self.stored[name].shape) for name in names}
            is_fp32 = {name: name not in self.schemes and self.kept_dtypes[name] == torch.float32 for name in names}
            scheme = self.schemes.get(names[0])
            kept = str(self.kept_dtypes[names[0]]).removeprefix("torch.").replace("bfloat16", "bf16")
            reports.append(
                KindReport(
                    kind=kind,
                    format=kept.replace("float32", "fp32") if scheme is None else scheme.name,
                    parameters=sum(parameters.values()),
                    bytes_stored=sum(self.stored[name].num_bytes for name in names),
                    bytes_bf16=sum(parameters[name] * (4 if is_fp32[name] else 2) for name in names),
                    bytes_quantized=sum(
                        layout[part].num_bytes
                        for name in names
                        for part in (name, name + VALUES, name + STEPS, name + SCALES)
                        if part in layout
                    ),
                )
            )
        return tuple(reports)


def kind_of(name: str, *, is_tied: bool) -> Kind:
    """Return the kind of a tensor of the model by its name; a tied embedding is the output matrix."""
    if ".moe.experts." in name and name.endswith("_proj"):
        return "experts"
    if ".attention." in name and name.endswith("_proj.weight"):
        return "attention"
    if ".mlp." in name and name.endswith("_proj.weight"):
        return "mlp"
    if name == "lm_head" or (name == "embedding" and is_tied):
        return "output"
    return "embedding" if name in ("embedding", "position_embedding") else "other"


def _plan(
    path: Path,
    info: CheckpointInfo,
    training: TrainConfig,
    *,
    experts: ExpertFormat | None,
    rest: RestFormat,
    group_size: int | None,
) -> _Plan:
    config = training.model
    require_unquantized(info, "quantising requires the weights as they were trained", error=ConfigError)
    for name, value, known in (("experts", experts, get_args(ExpertFormat)), ("rest", rest, get_args(RestFormat))):
        if value is not None and value not in known:
            raise ConfigError(f"{name} ({value!r}) is not known; one of {', '.join(known)} is required; use int8.")
    if experts is not None and not config.moe_layers:
        raise ConfigError(
            f"experts ({experts}) is given for a dense model; it has no experts to quantise; leave it out: rest covers "
            f"all of it."
        )
    chosen_experts = (experts or "int8") if config.moe_layers else None
    if chosen_experts is None and rest == "bf16":
        raise ConfigError("rest (bf16) of a dense model quantises nothing; use int8 or int4.")
    is_int4 = "int4" in (chosen_experts, rest)
    if group_size is not None and not is_int4:
        raise ConfigError(
            f"group_size ({group_size}) is given and nothing becomes int4; int8 has one scale a row and mxfp4 one for "
            f"{mxfp4.GROUP_SIZE} columns; leave it out, or ask for int4."
        )
    if is_int4 and group_size is None:
        group_size = 64
    if group_size is not None and group_size not in GROUP_SIZES:
        raise ConfigError(f"group_size ({group_size}) is not one of 32, 64 and 128; kernels exist for these; use 64.")
    with TensorReader(path) as reader:
        stored = dict(sorted(reader.layout.items()))
    kinds = {name: kind_of(name, is_tied=config.tie_embeddings) for name in stored}
    formats = {"experts": chosen_experts, "attention": rest, "mlp": rest, "output": rest}
    schemes = {}
    for name, kind in kinds.items():
        format_ = formats.get(kind)
        if format_ in (None, "bf16"):
            continue
        columns = stored[name].shape[-1]
        if format_ == "mxfp4":
            if columns % mxfp4.GROUP_SIZE:
                raise ConfigError(
                    f"{name} has {columns} columns; mxfp4 takes a multiple of {mxfp4.GROUP_SIZE}; use int8."
                )
            schemes[name] = Scheme(4, mxfp4.GROUP_SIZE, is_mxfp4=True)
            continue
        if columns > MAX_COLUMNS:
            remedy = "mxfp4" if kind == "experts" else "bf16"
            raise ConfigError(
                f"{name} has {columns} columns; sums of {format_} take at most {MAX_COLUMNS}; use {remedy}."
            )
        if format_ == "int4":
            assert group_size is not None
            if columns % group_size:
                fitting = [str(size) for size in GROUP_SIZES if columns % size == 0]
                remedy = f"use group_size {' or '.join(fitting)}, or int8" if fitting else "use int8"
                raise ConfigError(
                    f"group_size ({group_size}) does not divide the {columns} columns of {name}; int4 takes whole "
                    f"groups; {remedy}."
                )
            schemes[name] = Scheme(4, group_size)
        else:
            schemes[name] = Scheme(8, None)
    # A bf16 model casts its embeddings to bf16 before every use, so nothing is lost; the router, norms and mix compute
    # in fp32.
    cast = {kind for kind, format_ in formats.items() if format_ == "bf16"}
    if training.precision == "bf16":
        cast.add("embedding")
    kept = {name: torch.bfloat16 if kind in cast else stored[name].dtype for name, kind in kinds.items()}
    return _Plan(stored, kinds, schemes, kept, chosen_experts, rest, group_size)


def _write_tensors(
    source: Path,
    target: Path,
    plan: _Plan,
    config: TrainConfig,
    batches: list[Tensor],
    on_progress: OnProgress,
) -> None:
    with TensorReader(source) as reader, TensorWriter(target, plan.layout()) as writer:
        if batches:
            dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
            matrices = calibrated_weights(
                config.model,
                plan.schemes,
                lambda name: require_finite(name, reader.read(name)),
                batches,
                compute_dtype=dtype,
                on_layer=lambda layer: on_progress("quantising", (layer + 1) / config.model.num_layers),
            )
        else:
            matrices = _rounded(reader, plan, on_progress)
        for name, quantized in matrices:
            writer.append(name + VALUES, quantized.values)
            writer.append(name + SCALES, quantized.scales)
            if quantized.steps is not None:
                writer.append(name + STEPS, quantized.steps)
        for name in plan.stored.keys() - plan.schemes.keys():
            writer.append(name, require_finite(name, reader.read(name)).to(plan.kept_dtypes[name]))


def _rounded(reader: TensorReader, plan: _Plan, on_progress: OnProgress) -> Quantized:
    """Round to nearest, one matrix at a time, and one expert at a time of a stack."""
    for done, (name, scheme) in enumerate(plan.schemes.items(), 1):
        shape = plan.stored[name].shape
        for index in range(shape[0]) if len(shape) == 3 else [None]:
            matrix = require_finite(name, reader.read(name, index))
            if scheme.is_mxfp4:
                yield name, quantize_to_mxfp4(matrix)
            else:
                yield name, quantize_weight(matrix, bits=scheme.bits, group_size=scheme.group_size)
        on_progress("quantising", done / len(plan.schemes))


def _check_limit(name: str, limit: float) -> None:
    if not limit >= 0:  # so written, NaN is refused too
        raise ConfigError(f"{name} is {limit:g}, which no run keeps; 0 or more is required; raise it, or leave it out.")


def _check_limits(
    report: QuantizationReport, result: Comparison, *, max_perplexity_ratio: float, max_kl: float, force: bool
) -> None:
    ratio = report.perplexity_ratio
    # Written so that NaN is over the limit.
    if ratio <= max_perplexity_ratio and result.kl <= max_kl:
        return
    message = (
        f"the quantised model's perplexity is {ratio:.4f} times the run's ({report.quantized.perplexity:.3f} against "
        f"{report.reference.perplexity:.3f}) and its KL {result.kl:.4f} nats; at most {max_perplexity_ratio:g} and "
        f"{max_kl:g} are required"
    )
    if not force:
        raise ConversionError(
            f"{message}; use more bits, a smaller group size or a calibration text, or --force (force=True) to have it "
            f"all the same."
        )
    logger.warning("%s; it is written all the same, as asked.", message)


def _own_shards(config: TrainConfig, option: str) -> str:
    if not _has_own_shards(config):
        raise DataError(
            f"no text is given and {_absence(config)}; the report measures the perplexity of a text; name one with "
            f"{option}."
        )
    return config.data.path


def _has_own_shards(config: TrainConfig) -> bool:
    # An imported run has no data; an empty path would be the current folder.
    return config.data.path != "" and _is_shards(config.data.path)


def _is_shards(source: str | Path) -> bool:
    return bool(str(source).strip()) and (Path(source) / MANIFEST_NAME).is_file()


def _absence(config: TrainConfig) -> str:
    path = config.data.path
    return f"the run's own data ({path}) is not there" if path else "the run has no data of its own"
