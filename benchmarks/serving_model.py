"""The model that serving is measured with, as an object, and as the files that we and the peers read.

A Qwen3-MoE-like model of 1.72 B parameters, 176 M of them active, with random weights: 16 layers, hidden 1024, 16 heads
and 4 key/value heads of 64, 32 experts of 1024, top-2 renormalised, vocabulary 32,000, 4,096 positions. Fewer layers
make a smaller one to try things out with.
"""

import json
import string
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

VOCAB_SIZE, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, EXPERTS, TOP_K, MAX_POSITIONS = 32_000, 1024, 16, 4, 64, 32, 2, 4096
GROUP_SIZE = 64
SEED = 0


def tokenizer_json() -> str:
    """Return a byte-level BPE tokenizer of 32,000 tokens, of which every one is whole text.

    Made by rule, not trained: the bytes, then pairs of letters and digits, then such a pair and another character. With
    no halves of characters every token is a chunk of a stream, for every server alike.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens = sorted(pre_tokenizers.ByteLevel.alphabet())
    letters = string.ascii_letters + string.digits
    merges = [(a, b) for a in letters for b in letters]
    merges += [(a + b, c) for c in letters for a, b in merges]
    merges = merges[: VOCAB_SIZE - 1 - len(tokens)]
    tokens += [a + b for a, b in merges]
    tokenizer = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|endoftext|>", special=True)])
    assert tokenizer.get_vocab_size() == VOCAB_SIZE
    return tokenizer.to_str()


def build(num_layers: int, name: str) -> Any:
    """Return the model packed as bf16, int8 or int4; made in bf16, since its fp32 form would take 7 GB."""
    import torch

    from moesaic.config.model import ModelConfig
    from moesaic.model.transformer import Transformer

    config = ModelConfig.from_dict(
        {
            "vocab_size": VOCAB_SIZE, "hidden_size": HIDDEN, "num_layers": num_layers, "num_heads": HEADS,
            "num_kv_heads": KV_HEADS, "intermediate_size": HIDDEN, "max_positions": MAX_POSITIONS,
            "tie_embeddings": False, "qk_norm": "head",
            "moe": {"num_experts": EXPERTS, "top_k": TOP_K, "router": {"renormalize": True}},
        }
    )  # fmt: skip
    torch.set_default_dtype(torch.bfloat16)
    model = Transformer.uninitialized(config, compute_dtype=torch.bfloat16)
    torch.set_default_dtype(torch.float32)
    model.initialize(SEED)

    return pack(model, name)


def pack(model: Any, name: str) -> Any:
    """Return a model packed as bf16, int8 or int4, but its embedding and routers."""
    import torch

    from moesaic.kernels.quantized import QuantizedWeight, combine, quantize_weight
    from moesaic.model.pack import pack_transformer

    def quantize(weight: torch.Tensor) -> QuantizedWeight:
        bits, group_size = (8, None) if name == "int8" else (4, GROUP_SIZE)
        if weight.dim() == 2:
            return quantize_weight(weight.detach(), bits=bits, group_size=group_size)
        return combine([quantize(each) for each in weight], torch.stack)

    quantized = {
        key: quantize(parameter)
        for key, parameter in model.named_parameters()
        if name != "bf16" and parameter.dim() > 1 and key != "embedding" and not key.endswith("router.weight")
    }
    return pack_transformer(model, quantized)


def build_peer(num_layers: int) -> Any:
    """Return the same shape as transformers' own model, in bf16."""
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(  # type: ignore[call-arg]
        vocab_size=VOCAB_SIZE, hidden_size=HIDDEN, num_hidden_layers=num_layers, num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS, head_dim=HEAD_DIM, num_experts=EXPERTS, num_experts_per_tok=TOP_K,
        moe_intermediate_size=HIDDEN, intermediate_size=HIDDEN, norm_topk_prob=True, tie_word_embeddings=False,
        max_position_embeddings=MAX_POSITIONS,
    )  # fmt: skip
    torch.manual_seed(SEED)
    torch.set_default_dtype(torch.bfloat16)
    peer = Qwen3MoeForCausalLM(config).eval()
    torch.set_default_dtype(torch.float32)
    peer.config._experts_implementation = "grouped_mm"
    return peer


def prepare_files(folder: Path, *, num_layers: int, formats: Sequence[str], with_gguf: bool) -> None:
    """Write what is missing of: folder/hf, folder/run-bf16, -int8, -int4, folder/gguf-bf16/model.gguf."""
    from moesaic.convert.exporter import export_run
    from moesaic.convert.importer import import_model
    from moesaic.convert.quantize import quantize_run

    source, run, gguf = folder / "hf", folder / "run-bf16", folder / "gguf-bf16"
    folder.mkdir(parents=True, exist_ok=True)
    if not (source / "tokenizer.json").is_file():  # the last file
        peer = build_peer(num_layers)
        peer.generation_config.eos_token_id = VOCAB_SIZE - 1
        peer.save_pretrained(source)
        del peer
        described = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
        (source / "tokenizer_config.json").write_text(json.dumps(described))
        (source / "tokenizer.json").write_text(tokenizer_json())
    found = json.loads((source / "config.json").read_text())["num_hidden_layers"]
    if found != num_layers:
        raise SystemExit(f"{folder} holds a model of {found} layers, not {num_layers}; name another --folder.")
    if not run.is_dir():
        import_model(source, run)
    text = folder / "text.txt"  # what the report of a quantisation is about; the weights are random anyway
    text.write_text(string.ascii_letters * 20)
    for name in formats:
        output = folder / f"run-{name}"
        if not output.is_dir():
            quantize_run(
                run, output, experts=name, rest=name, calibrate="none", text=text, limit_tokens=256, force=True
            )
    if with_gguf and not gguf.is_dir():
        export_run(run, gguf, format="gguf", dtype="bf16")


def quantize_gguf(folder: Path, llama_quantize: Path, name: str) -> Path:
    """Return the model in one of llama.cpp's formats (bf16, q8_0, q4_0), made where it is missing."""
    source, target = folder / "gguf-bf16" / "model.gguf", folder / f"model-{name}.gguf"
    if name == "bf16":
        return source
    if not target.is_file():
        partial = target.with_suffix(".partial")
        subprocess.run([llama_quantize, source, partial, name.upper()], check=True, capture_output=True)
        partial.replace(target)
    return target


def export_openvino(folder: Path, python: Path, name: str) -> Path:
    """Return the model in OpenVINO's form, weights in int8 or int4 (groups of 64), made where it is missing."""
    target, partial = folder / f"openvino-{name}", folder / f"openvino-{name}.partial"
    if not target.is_dir():
        command = [
            python.with_name("optimum-cli"), "export", "openvino", "-m", folder / "hf", "--task",
            "text-generation-with-past", "--weight-format", name,
            *(["--group-size", str(GROUP_SIZE), "--ratio", "1.0"] if name == "int4" else []), partial,
        ]  # fmt: skip
        subprocess.run(command, check=True, capture_output=True)
        partial.replace(target)
    return target
