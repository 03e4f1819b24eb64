"""A transformers model of ours computes what its Transformer does, loss and gradients included, and survives files."""

import copy
import json
import sys
import warnings
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from moesaic.config.train import TrainConfig
from moesaic.data.loader import Batch
from moesaic.errors import CheckpointError, ConfigError, GenerationError
from moesaic.hf import MoesaicConfig, MoesaicForCausalLM
from moesaic.model.generate import generate
from moesaic.model.load import load_run
from moesaic.model.norm import LayerNorm, RmsNorm
from moesaic.model.transformer import Transformer
from moesaic.moe.layer import MoELayer
from moesaic.moe.router import Router
from moesaic.train.loop import Trainer
from moesaic.train.loss import language_model_loss

Make = Callable[..., MoesaicForCausalLM]
Pad = Callable[..., dict[str, Tensor]]


def tokens(batch: int, length: int) -> Tensor:
    return torch.randint(97, (batch, length), generator=torch.Generator().manual_seed(2))


def test_logits_are_the_transformers(make: Make, kind: str) -> None:
    model, ids = make(kind), tokens(3, 11)
    wanted = model.model.logits(model.model(ids).hidden)
    assert torch.equal(model(ids).logits, wanted)
    assert torch.equal(model(ids, logits_to_keep=2).logits, wanted[:, -2:])
    assert torch.equal(model(ids, logits_to_keep=torch.tensor([0, 5])).logits, wanted[:, [0, 5]])
    assert torch.equal(model(ids, return_dict=False)[-1], wanted)


@pytest.mark.parametrize("shape", [(0, 9), (2, 0)])
@pytest.mark.parametrize("use_cache", [False, True])
def test_no_tokens_give_no_logits(make: Make, kind: str, shape: tuple[int, int], use_cache: bool) -> None:
    with torch.no_grad():
        assert make(kind)(tokens(*shape), use_cache=use_cache).logits.shape == (*shape, 97)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("use_cache", [False, True])
def test_padding_changes_nothing(make: Make, kind: str, prompts: Any, pad: Pad, side: str, use_cache: bool) -> None:
    model, batch = make(kind), pad(prompts, side)
    with torch.no_grad():
        logits = model(**batch, use_cache=use_cache).logits
        for row, prompt in enumerate(prompts):
            alone = model(torch.tensor([prompt]), use_cache=False).logits[0]
            torch.testing.assert_close(logits[row][batch["attention_mask"][row] == 1], alone, atol=2e-5, rtol=2e-5)


def test_a_cache_continues_where_it_was(make: Make, kind: str, prompts: Any, pad: Pad) -> None:
    model, batch = make(kind), pad(prompts)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    with torch.no_grad():
        wanted = model(ids, mask).logits[:, -4:]
        first = model(ids[:, :-3], mask[:, :-3], use_cache=True)
        second = model(ids[:, -3:-1], mask[:, :-1], past_key_values=first.past_key_values)
        third = model(ids[:, -1:], mask, past_key_values=second.past_key_values)
    got = torch.cat([first.logits[:, -1:], second.logits, third.logits], 1)
    is_valid = mask[:, -4:].bool()
    torch.testing.assert_close(got[is_valid], wanted[is_valid], atol=2e-5, rtol=2e-5)


def test_a_mask_of_another_length_is_refused(make: Make) -> None:
    model, ids = make("dense"), tokens(1, 5)
    with torch.no_grad():
        for columns in (3, 6):
            for use_cache, words in (
                (False, r"for input_ids \(1, 5\)"),
                (True, "for 5 new tokens after 0 in the cache"),
            ):
                with pytest.raises(ConfigError, match=rf"\(1, {columns}\) was given {words}"):
                    model(ids, torch.ones(1, columns), use_cache=use_cache)
        cache = model(ids, use_cache=True).past_key_values
        with pytest.raises(ConfigError, match="8 columns are required"):
            model(ids[:, :3], torch.ones(1, 7), past_key_values=cache)
        assert model(ids[:, :3], torch.ones(1, 8), past_key_values=cache).logits.shape[1] == 3


def test_the_loss_and_every_gradient_are_those_of_our_training(make: Make, kind: str) -> None:
    model, ids = make(kind).train(), tokens(3, 17)
    # transformers' labels are the tokens themselves; in ours the last token has its target in the data.
    targets = torch.cat([ids[:, 1:], torch.full((3, 1), -100)], 1)
    losses = language_model_loss(model.model, Batch(ids, targets, None), seed=0)
    losses.total.backward()
    wanted = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    output = model(ids, labels=ids)
    torch.testing.assert_close(output.loss, losses.total, atol=1e-6, rtol=1e-6)  # summed in another order
    output.loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name], atol=1e-7, rtol=1e-5)
    evaluated = model.eval()(ids, labels=ids)
    plain = F.cross_entropy(evaluated.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(evaluated.loss, plain)
    assert torch.equal(model(ids.int(), labels=ids.int()).loss, evaluated.loss)


def test_padded_training_equals_the_sequences_side_by_side(make: Make, prompts: Any, pad: Pad) -> None:
    model = make("paper").train()
    gradients = []
    for side in ("left", "right"):
        batch = pad(prompts, side)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        output = model(**batch, labels=labels)
        output.loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
        model.zero_grad()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], atol=1e-6, rtol=1e-5)
    losses = [
        F.cross_entropy(model(torch.tensor([prompt])).logits[0, :-1], torch.tensor(prompt[1:]), reduction="none")
        for prompt in prompts
        if len(prompt) > 1
    ]
    torch.testing.assert_close(output.loss - output.aux_loss, torch.cat(losses).mean())


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_counted_as_trainer_counts_it_has_its_own_mean(
    make: Make, prompts: Any, pad: Pad, side: Literal["left", "right"]
) -> None:
    """Trainer counts the labels but for each row's first place, where padding may stand: then a first label is one."""
    model, batch = make("dense").train(), pad(prompts, side)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    num_items = (labels[:, 1:] != -100).sum()
    loss = model(**batch, labels=labels, num_items_in_batch=num_items).loss
    torch.testing.assert_close(loss, model(**batch, labels=labels).loss)
    torch.testing.assert_close(model(**batch, labels=labels, num_items_in_batch=2 * num_items).loss, loss / 2)


def test_with_a_cache_nothing_has_a_gradient(make: Make) -> None:
    model, ids = make("dense"), tokens(2, 9)
    output = model(ids, use_cache=True)
    assert not output.logits.requires_grad and not model(ids, use_cache=True).logits.requires_grad
    assert model(ids).logits.requires_grad and model(ids, use_cache=False).logits.requires_grad


def test_hidden_states_of_threads_that_share_a_model_are_their_own(make: Make) -> None:
    model, batches = make(), [tokens(1, length) for length in range(4, 12)]

    def states_of(ids: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad():
            states = model(ids, output_hidden_states=True).hidden_states
        assert isinstance(states, tuple)
        return states

    wanted, interval = [states_of(ids) for ids in batches], sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(4) as threads:
            found = list(threads.map(states_of, batches * 8))
    finally:
        sys.setswitchinterval(interval)
    for mine, theirs in zip(found, wanted * 8, strict=True):
        assert len(mine) == len(theirs) == model.config.num_hidden_layers + 1
        assert all(torch.equal(one, other) for one, other in zip(mine, theirs, strict=True))


def test_hidden_states_are_kept_only_where_they_are_asked_for(make: Make) -> None:
    model, ids = make("dense", num_layers=6), tokens(1, 9)
    alive: list[int] = []
    last = model.model.blocks[-1]
    inputs: list[weakref.ref[Tensor]] = []

    def note(block: torch.nn.Module, given: tuple[Tensor, ...]) -> None:
        inputs.append(weakref.ref(given[0]))

    hooks = [block.register_forward_pre_hook(note) for block in model.model.blocks]
    hooks.append(last.register_forward_hook(lambda *_: alive.append(sum(each() is not None for each in inputs))))
    with torch.no_grad():
        for asked in (False, True):
            inputs.clear()
            model(ids, output_hidden_states=asked)
    for hook in hooks:
        hook.remove()
    assert alive[1] == model.config.num_hidden_layers == 6 > 2 >= alive[0]  # the first one and the last


def test_micro_batches_add_up(make: Make) -> None:
    model, ids = make("dense").train(), tokens(4, 9)
    whole = model(ids, labels=ids).loss
    parts = [model(part, labels=part, num_items_in_batch=torch.tensor(32)).loss for part in ids.split([1, 3])]
    torch.testing.assert_close(sum(parts), whole)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_checkpointing_gives_the_same_gradients(make: Make) -> None:
    model, ids = make("shared expert").train(), tokens(2, 9)
    gradients = []
    for enable in (False, True):
        model.gradient_checkpointing = False
        if enable:
            model.gradient_checkpointing_enable()
        assert model.model.activation_checkpointing == model.is_gradient_checkpointing == enable
        model(ids, labels=ids).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
        model.zero_grad()
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))
    model.gradient_checkpointing_disable()
    assert not model.model.activation_checkpointing


def test_hidden_states_are_every_blocks_input_and_the_output(make: Make, prompts: Any, pad: Pad) -> None:
    model, batch = make(), pad(prompts)
    is_valid = batch["attention_mask"].bool()
    with torch.no_grad():
        states = [model(**batch, output_hidden_states=True, use_cache=cached).hidden_states for cached in (False, True)]
    assert len(states[0]) == model.config.num_hidden_layers + 1
    assert torch.equal(states[0][0][is_valid], model.model.embedding[batch["input_ids"][is_valid]])
    assert torch.equal(model.model.logits(states[0][-1]), model(**batch).logits)
    for plain, cached in zip(*states, strict=True):
        torch.testing.assert_close(plain[is_valid], cached[is_valid], atol=2e-5, rtol=2e-5)
    assert model(**batch).hidden_states is None


def test_the_dtype_of_parameters_and_autocast_decide_what_is_computed_in(make: Make, kind: str, tmp_path: Path) -> None:
    model, ids = make(kind), tokens(2, 9)
    ours = Transformer(model.model.config, compute_dtype=torch.bfloat16).eval()
    ours.load_state_dict(model.model.state_dict())
    wanted = ours.logits(ours(ids).hidden)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(ids).logits, wanted)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert torch.equal(loaded(ids).logits, wanted)
    assert loaded.dtype == torch.bfloat16
    for module in loaded.modules():
        is_fp32 = isinstance(module, RmsNorm | LayerNorm | Router | MoELayer)
        for parameter in module.parameters(recurse=False):
            assert parameter.dtype == (torch.float32 if is_fp32 else torch.bfloat16)


def test_saving_and_loading_keeps_every_bit(make: Make, kind: str, tmp_path: Path) -> None:
    model = make(kind)
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            buffer.uniform_()
            assert "score_correction_bias" in name
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors"
    }  # fmt: skip
    for loader in (AutoModelForCausalLM, MoesaicForCausalLM):
        loaded = loader.from_pretrained(tmp_path)
        assert isinstance(loaded, MoesaicForCausalLM) and not loaded.training
        own, other = model.state_dict(), loaded.state_dict()
        assert list(own) == list(other) and all(torch.equal(own[name], other[name]) for name in own)
        assert (loaded.model.lm_head is None) == model.config.tie_word_embeddings


def test_draws_weights_as_our_own_initialisation_does(make: Make, kind: str) -> None:
    model = make(kind, hidden_size=64, intermediate_size=512)
    ours = Transformer(model.model.config).initialize(0)
    for (name, drawn), wanted in zip(model.model.named_parameters(), ours.parameters(), strict=True):
        if wanted.min() == wanted.max():
            assert torch.equal(drawn, wanted), name
        elif drawn.numel() > 2000:
            assert float(drawn.detach().std() / wanted.detach().std()) == pytest.approx(1, abs=0.1), name


def test_noise_in_training_follows_the_global_seed(make: Make) -> None:
    moe = {"num_experts": 4, "top_k": 2, "router": {"noise": "jitter", "jitter_epsilon": 0.3}}
    model, ids = make("dense", moe=moe).train(), tokens(2, 9)

    def loss(seed: int) -> float:
        torch.manual_seed(seed)
        return float(model(ids, labels=ids).loss.detach())

    assert loss(1) == loss(1) != loss(2)


def test_a_run_gives_the_model_and_the_tokenizer(make_config: Callable[..., TrainConfig], tmp_path: Path) -> None:
    run = tmp_path / "run"
    Trainer(make_config("pr-moe", precision="bf16"), run, device="cpu", resume=False, display=None).run()
    loaded = load_run(run, pack=False)
    model = MoesaicForCausalLM.from_run(run, device="cpu")
    assert model.dtype == torch.bfloat16 and not model.training
    ids = loaded.tokenizer.encode("Licensed under")
    with torch.no_grad():
        wanted = loaded.model.logits(loaded.model(torch.tensor([ids])).hidden)
        # Without a cache, as the other.
        assert torch.equal(model(torch.tensor([ids]), use_cache=False).logits, wanted)
    assert MoesaicForCausalLM.from_run(run, dtype="auto", device="cpu").dtype == torch.bfloat16
    masters = MoesaicForCausalLM.from_run(run, dtype="float32", device="cpu")
    own, other = loaded.model.state_dict(), masters.model.state_dict()
    assert all(torch.equal(own[name], other[name]) for name in own)
    masters.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").model.state_dict()
    assert all(torch.equal(own[name], again[name]) for name in own)

    tokenizer = AutoTokenizer.from_pretrained(run)
    tokenizer.save_pretrained(tmp_path / "saved")
    for each in (tokenizer, AutoTokenizer.from_pretrained(tmp_path / "saved")):
        assert each("Licensed under").input_ids == ids
        assert each.decode(ids) == "Licensed under"
        assert each.eos_token_id == model.config.eos_token_id == loaded.tokenizer.end_of_text_id
    new = model.generate(**tokenizer("Licensed under", return_tensors="pt"), max_new_tokens=8, do_sample=False)
    end = loaded.tokenizer.end_of_text_id
    wanted_ids = generate(loaded.model, ids, max_new_tokens=8, stop_ids=[end])
    assert new[0, len(ids) :].tolist()[: len(wanted_ids)] == wanted_ids
    with pytest.raises(CheckpointError):
        MoesaicForCausalLM.from_run(tmp_path / "nowhere")

    settings = run / "generation_config.json"  # as an import writes the ends of a chat model
    settings.write_text(json.dumps({"eos_token_id": [end, 7]}))
    chat = MoesaicForCausalLM.from_run(run, device="cpu")
    assert chat.config.eos_token_id == chat.generation_config.eos_token_id == sorted([end, 7])
    assert chat.config.pad_token_id == end


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"device_map": "auto"}, r'^device_map was given to from_run, which takes .*; one device .*; use device="cpu"'),
        ({"torch_dtype": torch.float32}, "^torch_dtype was given .*; it is called dtype here too"),
        ({"attn_implementation": "sdpa"}, "^attn_implementation was given .*; leave it out"),
        ({"trust_remote_code": True, "revision": None}, "^trust_remote_code was given .*; leave it out, or use save_"),
        ({"dtype": "bf16"}, r"dtype \('bf16'\) is none of floating point; .*; use \"bfloat16\""),
        ({"dtype": torch.int8}, r"dtype \(torch.int8\) is none of floating point"),
    ],
)
def test_what_a_run_is_not_read_with_says_what_to_do(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MoesaicForCausalLM.from_run("nowhere", **arguments)


def test_refuses_what_it_cannot_serve(make: Make) -> None:
    model, ids = make(), tokens(2, 9)
    with pytest.raises(ConfigError, match="output_attentions was given to MoesaicForCausalLM"):
        model(ids, output_attentions=True)
    for name in ("output_attentions", "output_router_logits"):
        setattr(model.config, name, True)
        with pytest.raises(ConfigError, match=f"config.{name} was given to MoesaicForCausalLM"):
            model(ids)
        setattr(model.config, name, False)
    with pytest.raises(ConfigError, match=r"input_ids of shape \(9,\) and torch.int64 .* use input_ids\[None\]"):
        model(ids[0])
    with pytest.raises(ConfigError, match=r"input_ids of shape .* and torch.float32 were given"):
        model(ids.float())
    with pytest.raises(ConfigError, match=r"labels of shape \(2, 5\) .* for input_ids \(2, 9\); one of int64"):
        model(ids, labels=ids[:, :5])
    with pytest.raises(ConfigError, match=r"labels of shape .* and torch.float32 were given"):
        model(ids, labels=ids.float())
    with pytest.raises(ConfigError, match="no input_ids was given"):
        model()
    with pytest.raises(ConfigError, match=r"of shape \(2, 1, 9, 9\).*the mask that the tokenizer returns"):
        model(ids, torch.ones(2, 1, 9, 9))
    with pytest.raises(ConfigError, match=r"of shape \(2, 12\) was given for input_ids \(2, 9\) and no cache"):
        model(ids, torch.tensor([[0] + [1] * 11] * 2))
    with pytest.raises(ConfigError, match="a cache of type DynamicCache was given"):
        model(ids, past_key_values=DynamicCache())
    with pytest.raises(ConfigError, match="a cache was asked for in training"):
        model.train()(ids, use_cache=True)
    with pytest.raises(GenerationError, match="sequences of 129 tokens were given; the model has 128"):
        model(tokens(1, 129))
    with torch.no_grad():
        cache = model.eval()(ids, torch.tensor([[0] + [1] * 8] * 2), use_cache=True).past_key_values
        with pytest.raises(ConfigError, match="10 columns are required, of which the first 9 are the same"):
            model(ids[:, :1], torch.tensor([[1, 0] + [1] * 8] * 2), past_key_values=cache)
    other = torch.nn.Embedding(97, 32)
    for call in (model.set_input_embeddings, model.set_output_embeddings, model.resize_token_embeddings):
        with pytest.raises(NotImplementedError, match="MoesaicForCausalLM"):
            call(other)


@pytest.mark.filterwarnings("ignore:a MoesaicForCausalLM is trained by its hidden states")
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_base_model_and_the_head_give_the_loss_and_its_gradients(
    make: Make, kind: str, prompts: Any, pad: Pad, side: str
) -> None:
    """As TRL's trainers compute their losses, in place of the whole model's forward."""
    model, batch = make(kind).train(), pad(prompts, side)
    names = list(model.state_dict())
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    whole = model(**batch, labels=labels)
    (whole.loss - whole.aux_loss if whole.aux_loss is not None else whole.loss).backward()
    wanted = {name: each.grad for name, each in model.named_parameters()}
    model.zero_grad()
    hidden = model.base_model(**batch, use_cache=False).last_hidden_state[:, :-1]
    head = model.get_output_embeddings()
    own = model.model.lm_head if "model.lm_head" in names else model.model.embedding
    assert head.weight is own and head.bias is None
    targets = labels[:, 1:].masked_fill(batch["attention_mask"][:, :-1] == 0, -100)
    loss = F.cross_entropy((hidden @ head.weight.t()).flatten(0, 1), targets.flatten())
    torch.testing.assert_close(loss, whole.loss - (0 if whole.aux_loss is None else whole.aux_loss))
    loss.backward()
    for name, each in model.named_parameters():
        if wanted[name] is not None:
            torch.testing.assert_close(each.grad, wanted[name], atol=1e-6, rtol=1e-4)  # summed in another order
    assert list(model.state_dict()) == names and not any("lm_head.weight" in name for name in names)
    with pytest.raises(ConfigError, match="use_cache was given"):
        model.base_model(**batch, use_cache=True)


def test_training_by_hidden_states_says_what_its_loss_lacks(make: Make) -> None:
    ids = tokens(2, 9)
    with pytest.warns(UserWarning, match="lacks the balance and z losses .* compute_loss_func that adds the output's"):
        make().train().base_model(ids)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make("dense").train().base_model(ids)
        make().base_model(ids)
        with torch.no_grad():
            make().train().base_model(ids)


def test_parameters_are_counted_without_embeddings(make: Make, kind: str) -> None:
    model = make(kind)
    own = {name: each.numel() for name, each in model.named_parameters()}
    embeddings = sum(own.get(f"model.{name}", 0) for name in ("embedding", "position_embedding"))
    assert embeddings >= 97 * 32 and model.num_parameters() == sum(own.values())
    assert model.num_parameters(exclude_embeddings=True) == sum(own.values()) - embeddings
    model.model.embedding.requires_grad_(False)
    trainable = sum(each.numel() for name, each in model.named_parameters() if "embedding" not in name)
    assert model.num_parameters(only_trainable=True, exclude_embeddings=True) == trainable


def test_a_copy_has_a_head_of_its_own_and_no_head_is_copied_alone(make: Make, kind: str) -> None:
    model, ids = make(kind), tokens(2, 9)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.lm_head.weight.zero_()
        assert bool(model(ids).logits.any()) and not bool(other(ids).logits.any())
    with pytest.raises(ConfigError, match=r"a copy of lm_head alone .* call requires_grad_\(\) on model\.model\."):
        copy.deepcopy(model.lm_head)


def test_fsdp_finds_the_blocks_and_no_embedding_module(make: Make) -> None:
    model = make()
    units = [module for module in model.modules() if type(module).__name__ in (model._no_split_modules or ())]
    assert units == list(model.model.blocks)
    assert model.get_input_embeddings() is None  # accelerate and PEFT's save_pretrained ask, and take no error


@pytest.mark.parametrize("device_map", ["auto", "sequential", "cpu", {"": "cpu"}, {"model": "cpu", "lm_head": "cpu"}])
def test_one_device_holds_the_whole_model(make: Make, device_map: Any, tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="device_map stands on accelerate, which is not installed")
    model = make()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=device_map)
    assert len({each.device for each in loaded.parameters()}) == 1
    assert torch.equal(loaded.cpu().model.embedding, model.model.embedding)
    for given, message in (
        ({"device_map": {"model": "cpu", "lm_head": "disk"}}, "^a device_map of several devices was given; one device"),
        ({"device_map": "auto", "max_memory": {0: "1GB"}}, "^max_memory was given; one device holds"),
    ):
        with pytest.raises(ConfigError, match=message):
            AutoModelForCausalLM.from_pretrained(tmp_path, **given)


def test_refuses_to_be_quantised_by_others(make: Make, tmp_path: Path) -> None:
    """transformers would leave every layer as it is and call the model quantised."""
    make().save_pretrained(tmp_path)
    given = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    message = r"a quantization_config of type \w+ was given; .*`moesaic convert quantize`"
    for loader in (AutoModelForCausalLM, MoesaicForCausalLM):
        with pytest.raises(ConfigError, match=message):
            loader.from_pretrained(tmp_path, quantization_config=given)
    config = make().config
    config.quantization_config = given
    with pytest.raises(ConfigError, match=message):
        MoesaicForCausalLM(config)


def test_refuses_a_config_that_contradicts_itself(make: Make) -> None:
    config = make().config
    config.vocab_size = 12
    with pytest.raises(ConfigError, match="vocab_size"):
        MoesaicForCausalLM(config)
    assert isinstance(config, MoesaicConfig)
