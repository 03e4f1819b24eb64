"""Forms of a model that compute the same and that families of other tools may have a place for.

An unmixed residual MLP becomes a gated one whose gate says one half of twice the MLP, with biases of zero where there
were none: the family of that gate has them, and vLLM (seen in 0.32) takes them for granted and computes with whatever
memory holds where they are missing. A learned output scale goes into the experts' last matrix.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from moesaic.config.model import ModelConfig


@dataclass(frozen=True)
class Rewriting:
    """A model that computes the same as another, and what its tensors are of that one's.

    factors: tensors that are multiplied, by a number or by another tensor (a scalar). zeros: tensors that are new.
    """

    config: ModelConfig
    factors: Mapping[str, float | str]
    zeros: frozenset[str]

    @property
    def scales(self) -> dict[str, str]:
        """Tensors that are multiplied by another tensor, which rounds where a number (a power of two) does not."""
        return {name: factor for name, factor in self.factors.items() if isinstance(factor, str)}


def rewritings(config: ModelConfig) -> Iterator[Rewriting]:
    """Yield the model itself, but for its output scales, and the forms that families may have a place for."""
    moe, factors = config.moe, dict[str, float | str]()
    if moe is None:
        yield Rewriting(config, {}, frozenset())
        return
    places = [f"blocks.{layer}.feed_forward" for layer in config.moe_layers]
    if moe.output_scale:
        for place in places:
            factors[f"{place}.moe.experts.down_proj"] = f"{place}.moe.output_scale"
            if config.mlp_bias:
                factors[f"{place}.moe.experts.down_bias"] = f"{place}.moe.output_scale"
        moe = moe.replace(output_scale=False)
    same = config.replace(moe=moe)
    yield Rewriting(same, factors, frozenset())
    if moe.residual == "sum" and not config.mlp_bias:
        gated = config.replace(moe=moe.replace(residual="sigmoid"))
        zeros = {f"{place}.mix.weight" for place in places}
        if config.attention_bias == "none" and config.latent_attention is None:
            gated = gated.replace(attention_bias="qkv")
            zeros |= {
                f"blocks.{layer}.attention.{part}_proj.bias" for layer in range(config.num_layers) for part in "qkv"
            }
        doubled = {f"{place}.mlp.down_proj.weight": 2.0 for place in places}
        yield Rewriting(gated, {**factors, **doubled}, frozenset(zeros))
