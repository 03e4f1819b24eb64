"""LoRA of PEFT on our layers and on stacked experts: it learns, it is really applied, and it merges."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moesaic.errors import ConfigError
from moesaic.hf import MoesaicForCausalLM
from moesaic.model.pack import pack_transformer

peft = pytest.importorskip("peft", reason="peft is not installed")

Make = Callable[..., MoesaicForCausalLM]
LINEAR = {"target_modules": ["q_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]}
EXPERTS = {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
BOTH = {"target_modules": ["o_proj", "mix"], "target_parameters": ["experts.down_proj"]}
ALL = {"target_modules": "all-linear", "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
LATENT = {"target_modules": ["q_proj", "kv_down_proj", "kv_up_proj"]}
RESIDUAL = {"moe": {"num_experts": [4, 8], "top_k": 2, "every": 2, "residual": "softmax"}, "init_std": 0.1}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("kind", "targets"),
    [("pyramid", LINEAR), ("pyramid", EXPERTS), ("pyramid", BOTH), ("pyramid", ALL), ("latent", LATENT)],
    ids=["linear", "experts", "both", "all", "latent"],
)
def test_lora_learns_and_merges(
    make: Make, kind: str, targets: dict[str, Any], checkpointing: bool, tmp_path: Path
) -> None:
    model = make(kind, **RESIDUAL)
    ids = torch.randint(97, (4, 24), generator=torch.Generator().manual_seed(4))
    before = model(ids).logits.detach()
    frozen = {name: parameter.clone() for name, parameter in model.named_parameters()}
    config = peft.LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **targets)
    adapted = peft.get_peft_model(model, config)
    with pytest.raises(ConfigError, match=r"is peft\..*; merge adapters"):
        pack_transformer(model.model)
    torch.testing.assert_close(adapted(ids).logits, before, atol=1e-5, rtol=1e-5)
    if checkpointing:
        adapted.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW([each for each in adapted.parameters() if each.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = adapted.train()(input_ids=ids, labels=ids).loss
        loss.backward()
        if not losses:
            # B starts at 0, so that A has a gradient of 0 now; every adapter is reached.
            assert all(
                each.grad is not None and (bool(each.grad.any()) or ".lora_A." in name)
                for name, each in adapted.named_parameters()
                if each.requires_grad
            )
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.1
    trained = adapted.eval()(ids).logits.detach()
    assert not torch.allclose(trained, before, atol=1e-2)
    with adapted.disable_adapter():
        torch.testing.assert_close(adapted(ids).logits, before, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        cache = adapted(ids[:, :-1], use_cache=True).past_key_values
        last = adapted(ids[:, -1:], past_key_values=cache).logits[:, 0]
    torch.testing.assert_close(last, trained[:, -1], atol=1e-4, rtol=1e-4)
    written = adapted.generate(input_ids=ids[:2], max_new_tokens=6, do_sample=False)
    adapted.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(make(kind, **RESIDUAL), tmp_path)
    assert torch.equal(again(ids).logits, trained)
    merged = adapted.merge_and_unload()
    assert isinstance(merged, MoesaicForCausalLM) and set(frozen) == {name for name, _ in merged.named_parameters()}
    torch.testing.assert_close(merged(ids).logits, trained, atol=1e-5, rtol=1e-5)
    assert torch.equal(merged.generate(ids[:2], max_new_tokens=6, do_sample=False), written)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("parameters", [[], ["experts.gate_up_proj"], ["router.weight"]])
def test_all_linear_leaves_experts_and_routers_to_target_parameters(make: Make, parameters: list[str]) -> None:
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", target_parameters=parameters)
    adapted = peft.get_peft_model(make("pyramid", **RESIDUAL), config)
    names = {name.split(".lora_")[0] for name, each in adapted.named_parameters() if each.requires_grad}
    layers = {name.rsplit(".", 1)[1] for name in names}
    linear = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "mix"}
    assert layers == linear | {parameter.split(".")[0] for parameter in parameters}


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_embedding_and_head_train_beside_adapters_and_by_no_copy(make: Make, tmp_path: Path) -> None:
    def config(**changes: Any) -> Any:
        return peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], **changes)

    ids = torch.randint(97, (4, 24), generator=torch.Generator().manual_seed(4))
    with pytest.raises(ConfigError, match=r"^a copy of lm_head alone"):
        peft.get_peft_model(make("shared expert"), config(modules_to_save=["embed_tokens", "lm_head"]))
    model = make("shared expert")
    adapted = peft.get_peft_model(model, config())
    before = [each.detach().clone() for each in (model.model.embedding, model.lm_head.weight)]
    model.model.embedding.requires_grad_()
    model.lm_head.weight.requires_grad_()
    optimizer = torch.optim.AdamW([each for each in adapted.parameters() if each.requires_grad], lr=1e-2)
    adapted.train()(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    after = model.model.embedding, model.lm_head.weight
    assert not any(torch.equal(*pair) for pair in zip(before, after, strict=True))
    trained = adapted.eval()(ids).logits
    adapted.merge_and_unload().save_pretrained(tmp_path)
    torch.testing.assert_close(MoesaicForCausalLM.from_pretrained(tmp_path)(ids).logits, trained, atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_an_adapter_is_saved_whatever_it_is_asked_to_target(make: Make, tmp_path: Path) -> None:
    """PEFT then asks for the embedding module, after hours of training."""
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "embed_tokens"])
    peft.get_peft_model(make("shared expert"), config).save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").stat().st_size > 0
