"""Routes are counted some steps together: what that gives is what one step after the other gives."""

from collections.abc import Callable

import numpy as np
import torch

from moesaic.kernels.decode import Decoded
from moesaic.model.transformer import Transformer
from moesaic.serve.expert_load import ExpertLoad

Make = Callable[..., Transformer]


def test_steps_together_give_what_one_by_one_gives(make_model: Make) -> None:
    model = make_model("pr-moe")
    together, one_by_one = ExpertLoad(model), ExpertLoad(model)
    layers = together.layers()
    generator = torch.Generator().manual_seed(0)
    total = [np.zeros(layer.num_experts) for layer in layers]
    recent = [np.zeros(layer.num_experts) for layer in layers]
    for num_tokens in (70, 1, 1, 3, 900, 1, 2):
        distinct, ids = 0, []
        for layer, all_counts, recent_counts in zip(layers, total, recent, strict=True):
            chosen = torch.randint(layer.num_experts, (num_tokens * layer.top_k,), generator=generator)
            counts = np.bincount(chosen, minlength=layer.num_experts)
            all_counts += counts
            recent_counts *= 0.5 ** (num_tokens / 2048)
            recent_counts += counts
            distinct += np.count_nonzero(counts)
            ids.append(chosen)
        step = Decoded(
            torch.empty(num_tokens, 4), torch.cat(ids), torch.empty(0), tuple(layer.top_k for layer in layers),
            torch.empty(0, 7),
        )  # fmt: skip
        together.add(step)
        one_by_one.add(step)
        assert one_by_one.distinct_experts_per_step == distinct / len(layers)
    assert together.distinct_experts_per_step == one_by_one.distinct_experts_per_step
    assert together.bytes_used == one_by_one.bytes_used > 0
    for load in (together, one_by_one):
        for layer, all_counts, recent_counts in zip(load.layers(), total, recent, strict=True):
            assert list(layer.tokens_per_expert) == all_counts.tolist()
            np.testing.assert_allclose(layer.recent_tokens_per_expert, recent_counts, rtol=1e-12)
