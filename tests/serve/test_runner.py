"""What a runner gives for steps of single tokens, in memory that it uses again, is what a pass of their own gives."""

from array import array
from collections.abc import Callable, Sequence

import pytest
import torch

from moesaic.kernels.decode import Decoded
from moesaic.model.transformer import Transformer
from moesaic.serve import runner as runner_module
from moesaic.serve.runner import Part, Runner

BLOCK = 32


@pytest.mark.parametrize("form", ["packed-bf16", "packed-int4"])
def test_steps_of_any_sizes_in_any_order(
    make_model: Callable[..., Transformer], form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sequences that grow past what tables have room for, come and go, and want the logits of all, some or none."""
    monkeypatch.setattr(runner_module, "_SPARE_BLOCKS", 2)
    model = make_model("mixtral", form)
    source = torch.Generator().manual_seed(0)

    def tokens(count: int) -> list[int]:
        found: list[int] = torch.randint(model.config.vocab_size, (count,), generator=source).tolist()
        return found

    # So many that logits are kept, and more; blocks of every sequence in an order of its own.
    num_sequences, blocks_each = 18, 6
    order = torch.randperm(num_sequences * blocks_each, generator=source).tolist()
    tables = [array("i", order[each * blocks_each : (each + 1) * blocks_each]) for each in range(num_sequences)]
    lengths = [5 + 7 * each for each in range(num_sequences)]
    lengths[1], lengths[4] = 90, 100

    def parts_of(which: list[int], new: dict[int, list[int]]) -> list[Part]:
        return [
            Part(new[each], lengths[each] + 1, tables[each][: lengths[each] // BLOCK + 1])
            for each in which
        ]  # fmt: skip

    runners = [
        Runner(model, num_sequences * blocks_each, block_size=BLOCK, dtype=model.compute_dtype) for _ in range(2)
    ]
    prompts = {each: tokens(lengths[each]) for each in range(num_sequences)}
    for runner in runners:
        runner.run([
            Part(prompts[each], lengths[each], tables[each][: (lengths[each] - 1) // BLOCK + 1])
            for each in range(num_sequences)
        ])  # fmt: skip
    everyone = list(range(num_sequences))
    steps = [[3], [3], [3, 5], [5, 3], [17, 2, 9], everyone, [3], everyone, *[[1, 4]] * 40]
    for number, which in enumerate(steps):
        parts = parts_of(which, {each: tokens(1) for each in which})
        for rows in ([*range(len(which))], [len(which) - 1], []):  # the same tokens again give the same
            got = runners[0].run(parts, rows)
            # The other runner forgets what it keeps, and makes all of it anew.
            runners[1]._singles = None
            fresh = runners[1].run(parts, rows)
            for name in ("hidden", "all_expert_ids", "all_routing_weights", "logits"):
                assert torch.equal(getattr(got, name), getattr(fresh, name)), (number, rows, name)
            assert list(got.likeliest) == got.logits.argmax(-1).tolist(), (number, rows)
        for each in which:
            lengths[each] += 1


@pytest.mark.parametrize("form", ["fp32", "packed-bf16"])
def test_what_the_first_pass_loads_is_loaded_before(
    make_model: Callable[..., Transformer], form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, passes = make_model("mixtral", form), []
    run = Runner.run

    def counted(self: Runner, parts: Sequence[Part], rows: Sequence[int] = ()) -> Decoded:
        passes.append([part.length for part in parts])
        return run(self, parts, rows)

    monkeypatch.setattr(Runner, "run", counted)
    runner = Runner(model, 4, block_size=BLOCK, dtype=model.compute_dtype)
    runner.warm_up(16)
    assert passes == ([] if model.runs_in_one_call else [[1]])
