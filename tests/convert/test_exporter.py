"""An exported model is what transformers computes with; what came in goes out again bit for bit."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from moesaic.convert.keys import differences
from moesaic.convert.opened import open_model

Converted = Any  # conftest's
TOKENS = torch.randint(301, (2, 67), generator=torch.Generator().manual_seed(3))
# What says nothing of the mathematics, or of the gradients' either.
NOT_KEPT = {"model_type", "architectures", "dtype", "transformers_version", "use_cache", "attention_dropout"}
# What sparse layers stand for is written in one way, whichever way it was read.
ANOTHER_WAY = {"rope_parameters", "decoder_sparse_step", "mlp_only_layers", "eos_token_id"}


@torch.no_grad()
def their_logits(folder: Path) -> Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager")
    return model(TOKENS).logits


def test_what_came_in_goes_out_bit_for_bit(family: str, converted: Callable[[str], Converted]) -> None:
    each = converted(family)
    source, exported = load_file(each.source / "model.safetensors"), load_file(each.exported / "model.safetensors")
    assert source.keys() == exported.keys()
    assert all(torch.equal(tensor, exported[name]) for name, tensor in source.items())
    # The same numbers in the same code: what may differ is how a matrix lies in memory.
    with torch.no_grad():
        assert (their_logits(each.exported) - each.theirs(TOKENS).logits).abs().max() < 1e-5


def test_no_key_of_the_config_is_lost(family: str, converted: Callable[[str], Converted]) -> None:
    from transformers import AutoConfig

    each = converted(family)
    given = json.loads((each.source / "config.json").read_text())
    before, after = (AutoConfig.from_pretrained(folder).to_dict() for folder in (each.source, each.exported))
    said = [name for name, value in given.items() if name not in NOT_KEPT | ANOTHER_WAY and value is not None]
    assert [name for name in said if before[name] != after[name]] == []
    with open_model(each.source) as one, open_model(each.exported) as other:
        assert one.family == other.family == each.written.family
        assert differences(one.config, other.config) == []
        same = dict.fromkeys(("rope_scaling", "attention_scale"))  # equal but for the last bit
        assert one.config.replace(**same) == other.config.replace(**same)


def test_the_certificate_of_an_export_says_so(family: str, converted: Callable[[str], Converted]) -> None:
    written = converted(family).written
    assert written.failure is None and written.judge == "transformers" and written.dtype is None
    assert written.comparison.max_absolute < 1e-4 and written.comparison.greedy_equal == 3
    assert json.loads((converted(family).exported / "parity.json").read_text()) == written.to_json()
