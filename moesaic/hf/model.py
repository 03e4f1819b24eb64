"""Our Transformer as a transformers model: forward with masks, labels and caches, and everything of GenerationMixin."""

import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.utils import can_return_tuple

from moesaic.config.model import ModelConfig
from moesaic.errors import ConfigError, GenerationError
from moesaic.hf.cache import PagedCache
from moesaic.hf.config import MoesaicConfig
from moesaic.hf.packing import Packing, take_packing
from moesaic.kernels.cross_entropy import linear_cross_entropy
from moesaic.model.attention import Attention
from moesaic.model.linear import Linear
from moesaic.model.load import load_run
from moesaic.model.norm import LayerNorm, RmsNorm
from moesaic.model.transformer import OUTPUT_LAYERS, ModelOutput, Transformer
from moesaic.moe.balance import balance_loss
from moesaic.moe.experts import Experts
from moesaic.moe.layer import MoELayer, MoEStatistics
from moesaic.moe.router import Router

# Outputs, and arguments of `generate`, call the cache so; before it was renamed, past_key_values.
_CACHE = "cache" if "cache" in {field.name for field in fields(MoeCausalLMOutputWithPast)} else "past_key_values"
_IGNORED = -100  # a label where there is nothing to predict
_TOKEN_DTYPES = (torch.int64, torch.int32)
_SPLITTING_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")  # by which transformers places modules
_NOT_KEPT = ("output_attentions", "output_router_logits")  # refused as arguments and in the config


# Arguments of from_pretrained that from_run does not take, and what to do instead.
_INSTEAD = {
    "attn_implementation": "attention is moesaic's own; leave it out",
    "device_map": 'one device holds the whole model; use device="cpu", "cuda" or "auto"',
    "torch_dtype": "it is called dtype here too",
}


class MoesaicForCausalLM(PreTrainedModel, GenerationMixin):
    """`model` is a moesaic Transformer; all parameters are its own, under its names.

    The dtype of the parameters is what matrices compute in (under autocast, the dtype of autocast); routers and norms
    stay in fp32, as in moesaic. Padding may stand anywhere: no token sees it, and no position is counted for it.
    """

    config_class = MoesaicConfig
    config: MoesaicConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True
    # In the names of the parameters that from_pretrained loads as fp32 whatever its dtype: those of _FP32.
    _keep_in_fp32_modules_strict = ["norm", "router", "output_scale"]  # noqa: RUF012
    # What FSDP makes its units of. No device_map does: from_pretrained keeps the whole model on one device.
    _no_split_modules = ["Block"]  # noqa: RUF012

    def __init__(self, config: MoesaicConfig) -> None:
        """Raises: ConfigError for a config whose attributes contradict one another, or that asks for quantisation."""
        _refuse_quantization(getattr(config, "quantization_config", None))
        super().__init__(config)
        self.model = Transformer.uninitialized(config.transformer_config())
        self.lm_head = LanguageModelHead(self.model)
        self.post_init()  # draws the weights that from_pretrained has no values for

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str] | None, *model_args: Any, **kwargs: Any
    ) -> "MoesaicForCausalLM":
        """Return the model of a folder that save_pretrained has written, in evaluation mode; arguments as ever.

        device_map: "auto" and the like take the current accelerator, or the CPU where there is none.

        Raises: ConfigError for a quantization_config, and for a device_map of several devices.
        """
        _refuse_quantization(kwargs.get("quantization_config"))
        if kwargs.get("device_map") is not None:
            kwargs["device_map"] = _one_device(kwargs["device_map"], kwargs.pop("max_memory", None))
        return super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)

    @classmethod
    def from_run(
        cls, run: str | Path, *, dtype: torch.dtype | str | None = None, device: str = "auto", **others: Any
    ) -> "MoesaicForCausalLM":
        """Return the model that RUN or RUN@step names, in evaluation mode.

        dtype: of the parameters, or its name; None or "auto" for what the run computes in. A run of bf16 precision has
        fp32 master weights; dtype=torch.float32 keeps them. others: from_pretrained's arguments, refused with what to
        do instead.

        Raises: CheckpointError for a run that is missing, corrupt or quantised; ConfigError for other arguments;
        DeviceError.
        """
        _refuse_others(others)
        named_dtype = _dtype(dtype)
        loaded = load_run(run, device=device, pack=False)
        end, stops = loaded.tokenizer.end_of_text_id, sorted(loaded.tokenizer.stop_ids)
        with torch.device("meta"):
            eos = stops if len(stops) > 1 else end
            model = cls(MoesaicConfig(loaded.config.model, eos_token_id=eos, pad_token_id=end))
        model.model.load_state_dict(loaded.model.state_dict(), assign=True)
        dtype = named_dtype or loaded.model.compute_dtype
        for module in model.modules():
            if not isinstance(module, _FP32):
                for parameter in module.parameters(recurse=False):
                    parameter.data = parameter.data.to(dtype)
        model.config.dtype = dtype
        return model.eval()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: PagedCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_hidden_states: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
        past_key_values: PagedCache | None = None,
        **kwargs: Any,
    ) -> MoeCausalLMOutputWithPast:
        """Return logits (B, S, V) fp32, and the loss if there are labels.

        attention_mask (B, S), with a cache (B, columns of the cache + S): 0 for padding, whose outputs mean nothing.
        labels (B, S): the tokens themselves, -100 where there is nothing to predict; each is predicted from the one
        before it, which must not be padding. The loss is the mean cross-entropy of all labels, however few logits are
        kept; in training, aux_loss is added, which is each MoE layer's balance and z loss times its coefficient.
        num_items_in_batch: what to divide by in place of the labels here (gradient accumulation). Without labels it
        means that the caller computes the loss, and in training a warning says that aux_loss is the caller's to add.
        use_cache: None means where no gradient is recorded. A cache holds no gradients, and logits with one have none.
        logits_to_keep: positions from the end, or which ones; 0 for all. Training needs none of them for its loss.
        past_key_values: the cache, under its earlier name.
        position_ids (B, S), a keyword, without a cache: they count from 0 in each sequence, and a row may hold several;
        no token sees another sequence, and the first of one is predicted from none. cu_seq_lens_q, seq_idx and what
        else packing collators send must say the same.

        Raises: ConfigError for arguments that this model cannot serve; GenerationError for too many positions.
        """
        cache = past_key_values if cache is None else cache
        packing = None if cache is not None else take_packing(input_ids, attention_mask, kwargs)
        tokens, columns = self._check(input_ids, attention_mask, labels, kwargs)
        self._check_cache(cache, labels, use_cache)
        if packing is not None:
            if use_cache:
                raise ConfigError(
                    "a cache was asked for with position_ids of several sequences in a row; a cache holds one sequence "
                    "a row; use use_cache=False, or give the sequences as rows with an attention_mask."
                )
            use_cache = False
        if use_cache is None:
            use_cache = cache is not None or (
                self.config.use_cache and labels is None and not torch.is_grad_enabled() and not self.training
            )
        if use_cache and cache is None:
            cache = self._new_cache()
        if output_hidden_states is None:
            output_hidden_states = bool(self.config.output_hidden_states)
        self.model.compute_dtype = self._compute_dtype()
        # Casts are the model's own, to the dtype that autocast asks for.
        with torch.autocast(tokens.device.type, enabled=False):
            if cache is None:
                places, output = self._run(tokens, columns, packing, keep_block_inputs=output_hidden_states)
            else:
                places, output = self._run_cached(tokens, columns, cache, keep_block_inputs=output_hidden_states)
            hidden = _put_back(output.hidden, places, tokens.shape)
            loss, aux_loss = self._losses(hidden, columns, packing, labels, output.moe, num_items_in_batch)
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            with torch.set_grad_enabled(cache is None and torch.is_grad_enabled()):  # all of the model, or nothing
                logits = self.lm_head(hidden[:, kept])
        hidden_states = None
        if output_hidden_states:
            hidden_states = (*(_put_back(x, places, tokens.shape) for x in output.block_inputs), hidden)
        named_cache: dict[str, Any] = {_CACHE: cache}
        return MoeCausalLMOutputWithPast(
            loss=loss, aux_loss=aux_loss, logits=logits, hidden_states=hidden_states, **named_cache
        )

    def _check(
        self, input_ids: Tensor | None, attention_mask: Tensor | None, labels: Tensor | None, others: dict[str, Any]
    ) -> tuple[Tensor, Tensor | None]:
        """Return the tokens, and the mask as bool, None if there is no padding."""
        refused = sorted(name for name, value in others.items() if value is not None and value is not False)
        if "cache_position" in refused:  # transformers 5.0 counts columns too
            refused.remove("cache_position")
        refused += [f"config.{name}" for name in _NOT_KEPT if getattr(self.config, name, False)]
        if refused or input_ids is None:
            raise ConfigError(
                f"{', '.join(refused) or 'no input_ids'} was given to MoesaicForCausalLM; it takes input_ids, "
                f"attention_mask, labels, a cache or position_ids, logits_to_keep and output_hidden_states; with a "
                f"cache positions follow from the mask, and attention weights and router logits are not kept; call it "
                f"with these alone."
            )
        if input_ids.dim() != 2 or input_ids.dtype not in _TOKEN_DTYPES:
            raise ConfigError(
                f"input_ids of shape {tuple(input_ids.shape)} and {input_ids.dtype} were given; (batch, length) of "
                f"int64 or int32 is required; for one sequence, use input_ids[None]."
            )
        if labels is not None and (labels.shape != input_ids.shape or labels.dtype not in _TOKEN_DTYPES):
            raise ConfigError(
                f"labels of shape {tuple(labels.shape)} and {labels.dtype} were given for input_ids "
                f"{tuple(input_ids.shape)}; one of int64 or int32 for each token is required; use the tokens "
                f"themselves, and -100 where there is nothing to predict."
            )
        if attention_mask is None:
            return input_ids, None
        if attention_mask.dim() != 2 or attention_mask.shape[0] != input_ids.shape[0]:
            raise ConfigError(
                f"an attention_mask of shape {tuple(attention_mask.shape)} was given for input_ids "
                f"{tuple(input_ids.shape)}; one number for each token, (batch, length), is required; use the mask that "
                f"the tokenizer returns."
            )
        columns = attention_mask.bool()
        # One of another length is the cache's tokens too, or wrong: where it is used it is known which.
        is_plain = columns.shape == input_ids.shape and bool(columns.all())
        return input_ids, None if is_plain else columns

    def _check_cache(self, cache: object, labels: Tensor | None, use_cache: bool | None) -> None:
        if cache is not None and not isinstance(cache, PagedCache):
            raise ConfigError(
                f"a cache of type {type(cache).__name__} was given; this model's keys and values lie in a "
                f"moesaic.hf.PagedCache; pass none, and take the one that the output holds."
            )
        if (cache is not None or use_cache) and (labels is not None or (self.training and torch.is_grad_enabled())):
            raise ConfigError(
                "a cache was asked for in training; it holds no gradients; use use_cache=False, or model.eval() and no "
                "labels."
            )

    def _compute_dtype(self) -> torch.dtype:
        embedding = self.model.embedding
        if torch.is_autocast_enabled(embedding.device.type):
            return torch.get_autocast_dtype(embedding.device.type)
        return embedding.dtype

    def _new_cache(self) -> PagedCache:
        return PagedCache(self.model.config, dtype=self._compute_dtype(), device=self.model.device)

    def _run(
        self, tokens: Tensor, columns: Tensor | None, packing: Packing | None, *, keep_block_inputs: bool
    ) -> tuple[Tensor | None, ModelOutput]:
        """Return the model's output for tokens moved so that padding is at the end, and where each went.

        Packed sequences: for the valid tokens of all of them end to end, and where each comes from.
        """
        seed = self._draw_seed()
        if packing is not None:
            if packing.longest > self.model.config.max_positions:
                raise GenerationError(
                    f"a sequence of {packing.longest} tokens was packed; the model has "
                    f"{self.model.config.max_positions} positions; cut it, or set max_length in the trainer."
                )
            flat = tokens.flatten() if packing.places is None else tokens.flatten()[packing.places]
            return packing.places, self.model(
                flat[None],
                documents=packing.documents[None],
                positions=packing.positions,
                seed=seed,
                keep_block_inputs=keep_block_inputs,
            )
        if tokens.shape[1] > self.model.config.max_positions:
            raise GenerationError(
                f"sequences of {tokens.shape[1]} tokens were given; the model has {self.model.config.max_positions} "
                f"positions; cut them, or set max_length in the tokenizer's call with truncation."
            )
        if columns is None:
            return None, self.model(tokens, seed=seed, keep_block_inputs=keep_block_inputs)
        if columns.shape != tokens.shape:
            raise ConfigError(
                f"an attention_mask of shape {tuple(columns.shape)} was given for input_ids {tuple(tokens.shape)} and "
                f"no cache; one number for each token is required; give the cache too, or the mask of these tokens."
            )
        order = (~columns).to(torch.int8).argsort(dim=1, stable=True)  # (B, S)
        ordered = tokens.gather(1, order)
        valid = columns.gather(1, order)
        output = self.model(ordered, valid=valid, seed=seed, keep_block_inputs=keep_block_inputs)
        first = torch.arange(0, tokens.numel(), tokens.shape[1], device=tokens.device)[:, None]
        return (order + first).flatten(), output

    @torch.no_grad()
    def _run_cached(
        self, tokens: Tensor, columns: Tensor | None, cache: PagedCache, *, keep_block_inputs: bool
    ) -> tuple[Tensor | None, ModelOutput]:
        """Return the model's output for the valid tokens end to end, and where each comes from."""
        if not tokens.numel():  # nothing that the cache could take
            return self._run(tokens, None, None, keep_block_inputs=keep_block_inputs)
        length = tokens.shape[1]
        new = torch.ones(tokens.shape, dtype=torch.bool, device="cpu")
        if columns is not None:
            mask = columns.cpu()
            seen = cache.get_seq_length()
            earlier = mask[:, : mask.shape[1] - length]
            if mask.shape[1] != length + seen or (seen and not torch.equal(earlier, cache.columns)):
                raise ConfigError(
                    f"an attention_mask of shape {tuple(mask.shape)} was given for {length} new tokens after {seen} in "
                    f"the cache; {seen + length} columns are required, of which the first {seen} are the same as when "
                    f"the cache was filled; keep the mask of the prompt and append ones."
                )
            new = mask[:, seen:]
        cache.prepare(new)
        places = None if bool(new.all()) else new.flatten().nonzero()[:, 0].to(tokens.device)
        flat = tokens.flatten() if places is None else tokens.flatten()[places]
        with _routing_as_evaluated(self.model):
            return places, self.model(flat[None], cache=cache, keep_block_inputs=keep_block_inputs)

    def _draw_seed(self) -> int:
        """Return a seed for this step's noise and dropping, from PyTorch's global generator if there is any."""
        layers = [layer for layer in self.model.config.layers if layer.is_moe]
        is_random = any(
            layer.router.noise != "none"
            or (layer.capacity.factor is not None and layer.capacity.drop_policy == "random")
            for layer in layers
        )
        return int(torch.randint(2**62, (), device="cpu")) if self.training and is_random else 0

    def _losses(
        self,
        hidden: Tensor,
        columns: Tensor | None,
        packing: Packing | None,
        labels: Tensor | None,
        moe: tuple[MoEStatistics, ...],
        num_items: Tensor | int | None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return the loss, if there are labels, and the auxiliary losses, if there are MoE layers."""
        aux_loss = _auxiliary_loss(self.model.config, moe) if moe else None
        if labels is None:
            if self.training and num_items is not None and self._has_auxiliary_loss():
                warnings.warn(
                    "a MoesaicForCausalLM was trained without labels, which Trainer keeps for itself if it has "
                    "label_smoothing_factor or compute_loss_func; the balance and z losses of its config are then only "
                    "in the output's aux_loss; add that to the loss in compute_loss_func, or train without smoothing.",
                    stacklevel=2,
                )
            return None, aux_loss
        targets = torch.full_like(labels, _IGNORED, dtype=torch.int64)
        targets[:, :-1] = labels[:, 1:]
        if columns is not None:
            targets = targets.masked_fill(~columns, _IGNORED)
        if packing is not None:  # the first token of a sequence is predicted from none
            targets[:, :-1].masked_fill_(packing.begins[:, 1:], _IGNORED)
        loss = linear_cross_entropy(hidden.flatten(0, 1), self.model.output_weight(), targets.flatten())
        if self.training and aux_loss is not None:
            loss = loss + aux_loss
        if num_items is not None:
            # As Trainer counts: with the first label of a row behind padding, which nothing predicts.
            loss = loss * ((labels[:, 1:] != _IGNORED).sum() / num_items)
        return loss, aux_loss

    def _has_auxiliary_loss(self) -> bool:
        routers = [layer.router for layer in self.model.config.layers if layer.is_moe]
        return any(router.balance_loss or router.z_loss for router in routers)

    def _prepare_cache_for_generation(  # type: ignore[override]  # its other arguments differ by version
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        if not (generation_config.cache_implementation or "dynamic").startswith("dynamic"):
            raise ConfigError(
                f"cache_implementation={generation_config.cache_implementation!r} was given; this model's keys and "
                f"values lie in a moesaic.hf.PagedCache; leave it out."
            )
        given = model_kwargs.get(_CACHE)
        if given is not None:
            self._check_cache(given, None, None)
            given._is_user_defined = True
        elif generation_config.use_cache is not False:
            model_kwargs[_CACHE] = self._new_cache()

    @property
    def gradient_checkpointing(self) -> bool:
        """What transformers switches on and off; the Transformer's own checkpointing, which keeps routing as it was."""
        return self.model.activation_checkpointing

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, value: bool) -> None:
        self.model.activation_checkpointing = value

    def enable_input_require_grads(self) -> None:
        """Do nothing: our checkpointing is not reentrant, so the input needs no gradient."""

    def disable_input_require_grads(self) -> None:
        """Do nothing, as above."""

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Return how many there are; without the embeddings of tokens and positions if they are excluded."""
        total = super().num_parameters(only_trainable)
        embeddings = (self.model.embedding, self.model.position_embedding) if exclude_embeddings else ()
        return total - sum(
            each.numel() for each in embeddings if each is not None and (each.requires_grad or not only_trainable)
        )

    def get_input_embeddings(self) -> None:  # type: ignore[override]  # accelerate and PEFT take None, and no error
        """Return None: the embedding is no module but a parameter, model.model.embedding."""

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Raises: NotImplementedError."""
        raise NotImplementedError(
            "MoesaicForCausalLM has no embedding module to replace; its embedding is the parameter "
            "model.model.embedding; write there."
        )

    def get_output_embeddings(self) -> "LanguageModelHead":
        """Return a module with the head's `weight`, which is a parameter of the Transformer, and a `bias` of None."""
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Raises: NotImplementedError."""
        raise NotImplementedError(
            "MoesaicForCausalLM has no head module to replace; its head is the parameter model.model.lm_head, or with "
            "tied embeddings model.model.embedding; write there."
        )

    @property
    def base_model(self) -> "Backbone":
        """The model without its head, as TRL calls it: transformers' arguments, and last_hidden_state."""
        return Backbone(self)

    def _last_hidden(self, input_ids: Tensor | None, attention_mask: Tensor | None, others: dict[str, Any]) -> Tensor:
        """Return (B, S, H) after the final norm, without a cache; what forward computes before its head."""
        packing = take_packing(input_ids, attention_mask, others)
        tokens, columns = self._check(input_ids, attention_mask, None, others)
        if self.training and torch.is_grad_enabled() and self._has_auxiliary_loss():
            warnings.warn(
                "a MoesaicForCausalLM is trained by its hidden states, as TRL's trainers do, whose loss lacks the "
                "balance and z losses of the model's config; where those are wanted, give SFTTrainer a "
                "compute_loss_func that adds the output's aux_loss, or use transformers' Trainer.",
                stacklevel=3,
            )
        self.model.compute_dtype = self._compute_dtype()
        with torch.autocast(tokens.device.type, enabled=False):
            places, output = self._run(tokens, columns, packing, keep_block_inputs=False)
            return _put_back(output.hidden, places, tokens.shape)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """Raises: NotImplementedError."""
        raise NotImplementedError(
            f"the vocabulary of a MoesaicForCausalLM stays as it is, {self.model.config.vocab_size}; use token ids "
            f"below that."
        )

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Draw one module's own parameters as Transformer.initialize does, but for those that are loaded."""
        std = self.model.config.init_std
        output_std = std / (2 * self.model.config.num_layers) ** 0.5
        if isinstance(module, Linear):
            init.normal_(module.weight, 0.0, output_std if module in self._writing_layers() else std)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, Router):
            init.normal_(module.weight, 0.0, std)
            for bias in (module.bias, module.score_correction_bias):
                if bias is not None:
                    init.zeros_(bias)
        elif isinstance(module, Attention) and module.sinks is not None:
            init.zeros_(module.sinks)
        elif isinstance(module, MoELayer) and module.output_scale is not None:
            init.ones_(module.output_scale)
        elif isinstance(module, Experts):
            for name, parameter in module.named_parameters(recurse=False):
                if name.endswith("_bias"):
                    init.zeros_(parameter)
                else:
                    init.normal_(parameter, 0.0, output_std if name == "down_proj" else std)
        elif isinstance(module, RmsNorm | LayerNorm):
            init.ones_(module.weight)
            if isinstance(module, LayerNorm):
                init.zeros_(module.bias)
        elif isinstance(module, Transformer):
            for parameter in module.parameters(recurse=False):
                init.normal_(parameter, 0.0, std)

    def _writing_layers(self) -> set[nn.Module]:
        """Return the layers that write into the residual stream."""
        return {module for name, module in self.model.named_modules() if name.endswith(OUTPUT_LAYERS)}


class LanguageModelHead(nn.Module):
    """What makes logits, for those who look for a module; it has no parameters, since they are the Transformer's."""

    bias = None

    def __init__(self, transformer: Transformer) -> None:
        super().__init__()
        self._transformer = (transformer,)  # not a submodule: its names and parameters stay what they are

    @property
    def weight(self) -> Tensor:
        """(V, H), the parameter itself; the embedding if they are tied."""
        (transformer,) = self._transformer
        return transformer.embedding if transformer.lm_head is None else transformer.lm_head

    def forward(self, hidden: Tensor) -> Tensor:
        """Return fp32 logits (..., V) of hidden states (..., H)."""
        (transformer,) = self._transformer
        return transformer.logits(hidden)

    def __deepcopy__(self, memo: dict[int, Any]) -> "LanguageModelHead":
        """Be copied with the whole model. Raises: ConfigError for a copy by itself, as PEFT's modules_to_save makes."""
        (transformer,) = self._transformer
        if id(transformer) not in memo:
            raise ConfigError(
                "a copy of lm_head alone was asked for, by modules_to_save or the like; a MoesaicForCausalLM's head "
                "and embedding are parameters of its Transformer, of which a copy would train nothing; leave them out, "
                "and after get_peft_model call requires_grad_() on model.model.embedding or model.model.lm_head."
            )
        other = LanguageModelHead(memo[id(transformer)])
        return other.train(self.training)

    def extra_repr(self) -> str:
        (transformer,) = self._transformer
        return f"tied={transformer.lm_head is None}"


class Backbone(nn.Module):
    """A MoesaicForCausalLM without its head; made anew each time, so that its parameters are named once."""

    def __init__(self, causal: MoesaicForCausalLM) -> None:
        super().__init__()
        self.transformer = causal.model
        self._causal = (causal,)
        self.training = causal.training

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> MoeModelOutputWithPast:
        """Return last_hidden_state (B, S, H), after the final norm; padding and position_ids as in the whole model.

        Raises: ConfigError for a cache and for other arguments that the model cannot serve.
        """
        (causal,) = self._causal
        asked = {"use_cache": True} if use_cache else {}
        return MoeModelOutputWithPast(
            last_hidden_state=causal._last_hidden(input_ids, attention_mask, {**kwargs, **asked})
        )


# What computes in fp32 whatever flows through, and keeps its own parameters so.
_FP32 = (RmsNorm, LayerNorm, Router, MoELayer)


@contextmanager
def _routing_as_evaluated(model: Transformer) -> Iterator[None]:
    """Have no token dropped and no noise in routers: `generate` is often called on a model in training mode."""
    layers = [module for module in model.modules() if isinstance(module, MoELayer | Router) and module.training]
    for layer in layers:
        layer.training = False  # not eval(), which also reaches the adapters that may stand in them
    try:
        yield
    finally:
        for layer in layers:
            layer.training = True


def _put_back(values: Tensor, places: Tensor | None, shape: torch.Size) -> Tensor:
    """Return (B, S, H) of values (..., H) whose rows belong at these places, 0 elsewhere; None: they stand in order."""
    rows = values.reshape(-1, values.shape[-1])
    if places is not None:
        rows = rows.new_zeros(shape.numel(), rows.shape[1]).index_copy(0, places, rows)
    return rows.view(*shape, rows.shape[1])


def _refuse_others(others: dict[str, Any]) -> None:
    """Raise ConfigError for arguments that from_run does not take."""
    given = sorted(name for name, value in others.items() if value is not None)
    if given:
        known = [_INSTEAD[name] for name in given if name in _INSTEAD]
        raise ConfigError(
            f"{', '.join(given)} was given to from_run, which takes run, dtype and device; "
            f"{'; '.join(known) or 'leave it out, or use save_pretrained and then from_pretrained'}."
        )


def _one_device(device_map: object, max_memory: object) -> object:
    """Return a device_map that splits nothing. Raises: ConfigError for one that does."""
    is_split = isinstance(device_map, Mapping) and len(set(device_map.values())) > 1
    if is_split or max_memory is not None:
        raise ConfigError(
            f"{'a device_map of several devices' if is_split else 'max_memory'} was given; one device holds the whole "
            f'of a MoesaicForCausalLM, whose blocks hand nothing from one to another; use device_map="cuda", '
            f'"auto" or "cpu" alone.'
        )
    if not isinstance(device_map, str) or device_map not in _SPLITTING_MAPS:
        return device_map
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return {"": "cpu"}
    return {"": f"{accelerator.type}:{torch.accelerator.current_device_index()}"}


def _refuse_quantization(given: object) -> None:
    """Raise ConfigError for any: its layers would stay as they are, and be said to be quantised.

    bitsandbytes and torchao look for modules whose type is exactly nn.Linear, and experts are no such layers at all.
    """
    if given is not None:
        raise ConfigError(
            f"a quantization_config of type {type(given).__name__} was given; the matrices of a MoesaicForCausalLM are "
            f"none that bitsandbytes or torchao know, and stay as they are; leave it out, or quantise the run with "
            f"`moesaic convert quantize`, which runs in moesaic itself."
        )


def _dtype(given: torch.dtype | str | None) -> torch.dtype | None:
    """Return a dtype by its name; None for what the run computes in."""
    dtype = getattr(torch, given, None) if isinstance(given, str) else given
    if given in (None, "auto") or (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        return None if given == "auto" else dtype
    raise ConfigError(
        f'dtype ({given!r}) is none of floating point; a dtype of torch or its name is required; use "bfloat16" or '
        f'"float32", or "auto" for what the run computes in.'
    )


def _auxiliary_loss(config: ModelConfig, moe: tuple[MoEStatistics, ...]) -> Tensor:
    """Return the sum of the balance and z losses times their coefficients, of this batch whatever balance_scope is."""
    total = torch.zeros((), device=moe[0].z.device)
    routers = [layer.router for layer in config.layers if layer.is_moe]
    for router, statistics in zip(routers, moe, strict=True):
        if router.balance_loss:
            balance = balance_loss(statistics.mean_probabilities, statistics.tokens_per_expert)
            total = total + router.balance_loss * balance
        if router.z_loss:
            total = total + router.z_loss * statistics.z
    return total
