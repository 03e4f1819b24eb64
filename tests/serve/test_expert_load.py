"""Routes are counted some steps together: what that gives is what one step after the other gives. Reads of the disk."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from moesaic.checkpoint.mapped import open_mapped, write_mapped
from moesaic.kernels.decode import Decoded
from moesaic.model.transformer import Transformer
from moesaic.serve.expert_load import ExpertLoad, disk_bytes_read

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


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux counts what a process reads")
def test_what_a_mapped_file_takes_from_the_disk_is_counted(tmp_path: Path) -> None:
    import resource

    path, weights = tmp_path / "file", {"weight": torch.ones(1 << 18)}
    with path.open("wb", buffering=0) as file:
        write_mapped(file, weights, weights.items(), key="key")
        os.fdatasync(file.fileno())  # only what has been written leaves memory, and tests have no os.fsync
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    mapped = open_mapped(path, key="key")
    before, sectors = disk_bytes_read(), resource.getrusage(resource.RUSAGE_SELF).ru_inblock
    mapped.tensors["weight"].sum()
    after, sectors = disk_bytes_read(), resource.getrusage(resource.RUSAGE_SELF).ru_inblock - sectors
    if not sectors:
        pytest.skip("this folder is on no disk, or it is not counted")
    assert before is not None and after is not None
    assert after - before == pytest.approx(512 * sectors, rel=0.1)  # the two looks are not at one time
