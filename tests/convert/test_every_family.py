"""Of every family: an imported model computes what transformers computes of its source, logits, tokens in bf16, every
gradient; and what came in goes out again bit for bit. In one file, so that one process converts every family once.
"""

import copy
import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import cross_entropy

from moesaic.checkpoint.store import load_tensors, resolve_checkpoint
from moesaic.convert.importer import import_model
from moesaic.convert.keys import differences
from moesaic.convert.opened import open_model
from moesaic.convert.runnable import choices_of
from moesaic.model.generate import generate
from moesaic.model.load import load_run
from moesaic.model.transformer import Transformer

Converted = Any  # conftest's
# One that no block of a kernel divides, within the 96 positions, and past the 24 that yarn was trained on.
TOKENS = torch.randint(301, (2, 67), generator=torch.Generator().manual_seed(3))
# Many short ones, so that few tokens stand behind one that went to another expert.
SHORT = torch.randint(301, (24, 8), generator=torch.Generator().manual_seed(4))


def our_model(run: Path, dtype: torch.dtype, *, pack: bool = False) -> Transformer:
    model = load_run(run, device="cpu", pack=pack).model
    model.compute_dtype = dtype
    return model


@torch.no_grad()
def our_logits(run: Path, dtype: torch.dtype = torch.float32, *, pack: bool = False) -> Tensor:
    model = our_model(run, dtype, pack=pack)
    return model.logits(model(TOKENS).hidden).float()


@torch.no_grad()
def their_logits(model: Any) -> Tensor:
    return model(TOKENS).logits.float()


def tensors_of(run: Path) -> dict[str, Tensor]:
    return load_tensors(resolve_checkpoint(run), "model")


def test_fp32_logits_are_transformers_own(family: str, converted: Callable[[str], Converted]) -> None:
    each = converted(family)
    theirs = their_logits(each.theirs)
    difference = (our_logits(each.run) - theirs).abs().max()
    assert difference < 1e-4 and theirs.abs().max() > 1, (difference, theirs.abs().max())


def test_the_certificate_of_an_import_says_so(family: str, converted: Callable[[str], Converted]) -> None:
    each = converted(family)
    found = each.imported.comparison
    assert each.imported.failure is None and each.imported.judge == "transformers"
    assert found.max_absolute < 1e-4 and found.max_relative < 1e-4
    assert found.top1_agreement == 1 and found.greedy_equal == found.num_prompts == 3
    config = load_run(each.run, device="cpu").config.model
    assert found.routing_agreement == (1.0,) * len(config.moe_layers)
    account = each.imported.tensors
    assert account.used == account.source == len(open_model(each.source).source.layout) and not account.left_out
    assert account.bytes == sum(tensor.nbytes for tensor in tensors_of(each.run).values())
    assert json.loads((each.run / "parity.json").read_text()) == each.imported.to_json()


# What says nothing of the mathematics, or of the gradients' either.
NOT_KEPT = {"model_type", "architectures", "dtype", "transformers_version", "use_cache", "attention_dropout"}
# What sparse and sliding layers stand for is written in one way, whichever way it was read.
ANOTHER_WAY = {
    "rope_parameters", "decoder_sparse_step", "mlp_only_layers", "max_window_layers", "eos_token_id",
    "moe_topk", "moe_intermediate_size", "num_shared_expert", "no_rope_layer_interval", "sliding_window_pattern",
}  # fmt: skip


def in_order(tensor: Tensor) -> Tensor:
    """A matrix with its rows sorted by their first number."""
    return tensor[tensor[:, 0].argsort()]


def test_what_came_in_goes_out_bit_for_bit(
    family: str, families: ModuleType, converted: Callable[[str], Converted]
) -> None:
    from transformers import AutoModelForCausalLM

    each = converted(family)
    source, exported = load_file(each.source / "model.safetensors"), load_file(each.exported / "model.safetensors")
    assert source.keys() == exported.keys()
    for name, tensor in source.items():
        if family in families.REORDERED and name.endswith(("q_proj.weight", "k_proj.weight")):
            assert torch.equal(in_order(tensor), in_order(exported[name])) and not torch.equal(tensor, exported[name])
        else:
            assert torch.equal(tensor, exported[name]), name
    # The same numbers in the same code: what may differ is how a matrix lies in memory.
    back = AutoModelForCausalLM.from_pretrained(each.exported, dtype=torch.float32, experts_implementation="eager")
    assert (their_logits(back) - their_logits(each.theirs)).abs().max() < 1e-5


def test_no_key_of_the_config_is_lost(family: str, families: ModuleType, converted: Callable[[str], Converted]) -> None:
    from transformers import AutoConfig

    each = converted(family)
    given = json.loads((each.source / "config.json").read_text())
    before, after = (AutoConfig.from_pretrained(folder).to_dict() for folder in (each.source, each.exported))
    said = [name for name, value in given.items() if name not in NOT_KEPT | ANOTHER_WAY and value is not None]
    if family in families.WRITTEN_AS:  # its class may lack keys that say nothing here
        said = [name for name in said if name in after]
    assert [name for name in said if before[name] != after[name]] == []
    with open_model(each.source) as one, open_model(each.exported) as other:
        assert other.family == each.written.family == families.WRITTEN_AS.get(family, one.family)
        assert differences(one.config, other.config) == []
        same = dict.fromkeys(("rope_scaling", "attention_scale"))  # equal but for the last bit
        assert one.config.replace(**same) == other.config.replace(**same)


def test_the_certificate_of_an_export_says_so(family: str, converted: Callable[[str], Converted]) -> None:
    written = converted(family).written
    assert written.failure is None and written.judge == "transformers" and written.dtype is None
    assert written.comparison.max_absolute < 1e-4 and written.comparison.greedy_equal == 3
    assert json.loads((converted(family).exported / "parity.json").read_text()) == written.to_json()


SLIDING = {
    "mistral, sliding": 7, "qwen2, sliding from layer 1 on": 8, "qwen3, sliding in one layer": 2, "mixtral, sliding": 5,
    "qwen2-moe, sliding": 6, "qwen3-moe, sliding": 9, "dots1, sliding from layer 2 on": 4,
    "smollm3, sliding in one layer": 6, "exaone-moe": 7, "exaone4": 7,
    "gpt-oss": 8, "gpt-oss, sliding in one layer, no biases of attention, tied, plain rope": 5,
}  # fmt: skip


@pytest.mark.parametrize("name", SLIDING)
def test_text_that_leaves_the_window_is_continued_as_transformers_does(
    name: str, converted: Callable[[str], Converted]
) -> None:
    """Its cache drops what is behind the window; ours keeps it and does not look."""
    each, prompt = converted(name), TOKENS[0, :3]
    model = our_model(each.run, torch.float32)
    assert model.config.sliding_window == SLIDING[name]
    theirs = each.theirs.generate(prompt[None], max_new_tokens=40, do_sample=False, eos_token_id=-1, pad_token_id=0)
    assert generate(model, prompt.tolist(), max_new_tokens=40) == theirs[0, 3:].tolist()
    # And the window is seen: without it the same weights say something else.
    wide = Transformer(model.config.replace(sliding_window=None, sliding_layers=None))
    wide.load_state_dict(model.state_dict())
    with torch.no_grad():
        apart = (wide.logits(wide(TOKENS).hidden) - model.logits(model(TOKENS).hidden)).abs().amax((0, 2)) > 1e-3
    assert not apart[: SLIDING[name]].any() and apart[SLIDING[name] :].all()


def in_bf16(model: Any, run: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
    """Return logits (B, S, V), and the experts of every MoE layer (B, S, layers * K)."""
    with torch.no_grad(), choices_of(model) as choices:
        logits = run().float()
    shape = (*SHORT.shape, -1)
    return logits, torch.cat(
        [SHORT.new_zeros(shape[:2])[..., None], *(c.expert_ids.view(shape).sort(-1)[0] for c in choices)], -1
    )


def test_both_name_the_same_tokens_in_bf16(
    family: str, families: ModuleType, unchecked: Callable[[], AbstractContextManager[None]], tmp_path: Path
) -> None:
    """Wherever rounding cannot change them.

    What bf16 costs is measured on transformers itself: the root mean square of the difference of its bf16 logits from
    its fp32 ones of the same weights. Where the likeliest token of these leads by eight times that, ours names it, and
    ours rounds no more than one and a half times as much, packed or not. A router that is almost undecided may choose
    another expert for a rounded input, so tokens count up to the first that any of the models sends elsewhere.
    """
    from transformers import AutoModelForCausalLM

    source, run = tmp_path / "source", tmp_path / "run"
    families.save(families.build(family), source, dtype=torch.bfloat16)
    with unchecked():
        import_model(source, run)
    (rounded, theirs), (exact, exactly) = (
        in_bf16(model, lambda model=model: model(SHORT).logits)
        for model in (
            AutoModelForCausalLM.from_pretrained(source, dtype=dtype, experts_implementation="eager")
            for dtype in (torch.bfloat16, torch.float32)
        )
    )
    best = exact.topk(2, -1)
    for pack in (False, True):
        model = load_run(run, device="cpu", pack=pack).model
        assert model.compute_dtype is torch.bfloat16
        logits, ours = in_bf16(model, lambda model=model: model.logits(model(SHORT).hidden))
        is_steady = ((ours == theirs) & (theirs == exactly)).all(-1).cumprod(1).bool()
        cost = (rounded - exact)[is_steady].square().mean().sqrt()
        is_sure = is_steady & (best.values[..., 0] - best.values[..., 1] > 8 * cost)
        assert is_sure.double().mean() > 0.2, "the law would say nothing"
        assert (logits.argmax(-1) == best.indices[..., 0])[is_sure].all()
        assert (logits - exact)[is_steady].square().mean().sqrt() < 1.5 * cost


@pytest.mark.parametrize(
    "name",
    [
        "llama, mlp biases, wide heads",
        "qwen2, tied",
        "qwen2-moe",
        "deepseek-v2",
        "glm4-moe, as GLM-4.5",
        "gpt-oss",
        "minimax-m2",
        "granite-moe-shared",
        "hunyuan-moe",
        "exaone-moe",
        "flex-olmo",
    ],
)
def test_every_gradient_is_transformers_own(name: str, converted: Callable[[str], Converted], tmp_path: Path) -> None:
    """transformers' gradients are saved as if they were weights, and read by the same key map."""
    each = converted(name)
    theirs = copy.deepcopy(each.theirs)
    cross_entropy(theirs(TOKENS).logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten()).backward()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.zeros(()) if parameter.grad is None else parameter.grad)
    theirs.save_pretrained(tmp_path)
    model = our_model(each.run, torch.float32)
    logits = model.logits(model(TOKENS).hidden)
    cross_entropy(logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten()).backward()
    with open_model(tmp_path) as gradients:
        assert gradients.pieces.keys() == model.state_dict().keys()
        for tensor_name, parameter in model.named_parameters():
            parts = [
                piece.to_ours(gradients.source.read(piece.theirs, piece.index))
                for piece in gradients.pieces[tensor_name]
            ]
            wanted = torch.cat([part.flatten() for part in parts])
            assert wanted.any(), tensor_name
            torch.testing.assert_close(
                parameter.grad.flatten(), wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()),
                msg=lambda text, tensor_name=tensor_name: f"{tensor_name}: {text}",
            )  # fmt: skip
