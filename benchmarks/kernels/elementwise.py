"""What is gained beside the matrix products: routing, norms, rotary positions, activations, cross-entropy, forward KL.

Each against PyTorch's own operations as moesaic used them before (MOESAIC_KERNELS=reference), bf16, forward alone and
forward + backward, in the same process in turn. The share of bandwidth counts what must be read and written once.
Run: python benchmarks/kernels/elementwise.py [--only norm]
"""

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from measure import machine, median, paired_ratio, print_table, time_in_turn


@dataclass(frozen=True)
class Case:
    """call: the operation; leaves: what it is differentiated by; grads: of its outputs.

    forward_bytes and backward_bytes: what each must move at least; 0 where the products count and not the bytes.
    """

    name: str
    call: Callable[[], Any]
    leaves: tuple[Any, ...]
    grads: tuple[Any, ...]
    forward_bytes: int
    backward_bytes: int


def routing_cases() -> list[Case]:
    import torch

    from moesaic.config.model import RouterConfig
    from moesaic.moe.dispatch import plan_dispatch
    from moesaic.moe.router import Router

    cases = []
    num_tokens, hidden = 4096, 512
    for num_experts in (8, 32, 128):
        for top_k in (1, 2):
            router = Router(hidden, num_experts, top_k=top_k, config=RouterConfig())
            torch.nn.init.normal_(router.weight, std=0.05)
            x = torch.randn(num_tokens, hidden, dtype=torch.bfloat16, requires_grad=True)

            def call(router=router, x=x, num_experts=num_experts):
                routed = router(x)
                plan_dispatch(routed.expert_ids, num_experts)
                return routed.routing_weights, routed.mean_probabilities

            grads = (torch.randn(num_tokens, top_k), torch.randn(num_experts))
            moved = num_tokens * hidden * 2
            name = f"router + plan T={num_tokens} H={hidden} E={num_experts} top-{top_k}"
            cases.append(Case(name, call, (x, router.weight), grads, moved, 2 * moved))
    return cases


def norm_cases() -> list[Case]:
    import torch

    from moesaic.kernels.norm import layer_norm, rms_norm

    cases = []
    for shape in ((8192, 256), (4096, 512), (4096, 1024), (64, 2048), (1, 2048)):
        x = torch.randn(shape, dtype=torch.bfloat16, requires_grad=True)
        weight = torch.ones(shape[1], requires_grad=True)
        bias = torch.zeros(shape[1], requires_grad=True)
        grads = (torch.randn(shape, dtype=torch.bfloat16),)
        moved = 2 * 2 * shape[0] * shape[1]

        def rms(x=x, weight=weight):
            return (rms_norm(x, weight, 1e-5),)

        def layer(x=x, weight=weight, bias=bias):
            return (layer_norm(x, weight, bias, 1e-5),)

        cases.append(Case(f"RMSNorm {shape}", rms, (x, weight), grads, moved, moved * 3 // 2))
        cases.append(Case(f"LayerNorm {shape}", layer, (x, weight, bias), grads, moved, moved * 3 // 2))
    return cases


def rotary_cases() -> list[Case]:
    import torch

    from moesaic.model.rotary import rotary_table, rotate

    cases = []
    for batch, length, heads, dim in ((16, 512, 4, 64), (4, 2048, 8, 128)):
        x = torch.randn(batch, length, heads, dim, dtype=torch.bfloat16, requires_grad=True)
        table = rotary_table(length, dim, 10_000.0, x.device)

        def call(x=x, table=table):
            return (rotate(x, *table),)

        moved = 2 * 2 * x.numel()
        cases.append(Case(f"rotary {tuple(x.shape)}", call, (x,), (torch.randn_like(x),), moved, moved))
    return cases


def activation_cases() -> list[Case]:
    import torch

    from moesaic.kernels.activation import activate, activate_and_backward

    cases = []
    num_rows, size = 4096, 2048
    for activation in ("swiglu", "gelu", "gelu_tanh"):
        width = 2 * size if activation == "swiglu" else size
        pre = torch.randn(num_rows, width, dtype=torch.bfloat16)
        grad = torch.randn(num_rows, size, dtype=torch.bfloat16)

        def forward(pre=pre, activation=activation):
            return (activate(pre, activation),)

        def backward(pre=pre, grad=grad, activation=activation):
            return activate_and_backward(grad, pre, activation)

        moved = 2 * num_rows * (width + size)
        cases.append(Case(f"{activation} ({num_rows}, {size})", forward, (), (), moved, 0))
        cases.append(Case(f"{activation} backward ({num_rows}, {size})", backward, (), (), 2 * moved, 0))
    return cases


def cross_entropy_cases() -> list[Case]:
    import torch

    from moesaic.kernels.cross_entropy import linear_cross_entropy

    cases = []
    for num_tokens, hidden_size, vocab_size in ((8192, 256, 4096), (2048, 512, 32_000)):
        hidden = torch.randn(num_tokens, hidden_size, dtype=torch.bfloat16, requires_grad=True)
        weight = (torch.randn(vocab_size, hidden_size) * 0.05).bfloat16().requires_grad_()
        targets = torch.randint(0, vocab_size, (num_tokens,))

        def call(hidden=hidden, weight=weight, targets=targets):
            return (linear_cross_entropy(hidden, weight, targets),)

        name = f"cross-entropy T={num_tokens} H={hidden_size} V={vocab_size}, products included"
        cases.append(Case(name, call, (hidden, weight), (torch.ones(()),), 0, 0))
    return cases


def distillation_cases() -> list[Case]:
    """The logits are copied anew for every call, which leaves their gradient in their place."""
    import torch

    from moesaic.kernels.distillation import teach

    cases = []
    for num_tokens, vocab_size in ((1024, 4096), (128, 50_304)):
        given = torch.randn(num_tokens, vocab_size, dtype=torch.bfloat16)
        teacher, targets = torch.randn(num_tokens, vocab_size), torch.randint(0, vocab_size, (num_tokens,))
        logits = torch.empty_like(given)
        for temperature in (1.0, 2.0):

            def call(
                given=given, logits=logits, teacher=teacher, targets=targets, temperature=temperature
            ) -> tuple[Any, ...]:
                return teach(logits.copy_(given), teacher, targets, alpha=1.0, temperature=temperature)

            name = f"cross-entropy + forward KL and gradient T={num_tokens} V={vocab_size} temperature {temperature:g}"
            cases.append(Case(name, call, (), (), num_tokens * vocab_size * (2 + 4 + 2), 0))
    return cases


FAMILIES: dict[str, Callable[[], list[Case]]] = {
    "routing": routing_cases,
    "norm": norm_cases,
    "rotary": rotary_cases,
    "activation": activation_cases,
    "cross_entropy": cross_entropy_cases,
    "distillation": distillation_cases,
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--only", choices=FAMILIES, nargs="+", default=list(FAMILIES))
    arguments = parser.parse_args()

    import torch

    from moesaic.kernels import select
    from moesaic.kernels.allocator import tune_allocator
    from moesaic.kernels.limits import measure_limits

    tune_allocator()
    torch.manual_seed(0)
    bandwidth = measure_limits(device="cpu").bandwidth_bytes_per_second
    ours = os.environ.get(select.VARIABLE, "auto")
    with select.forced(ours) as selection:
        print(f"{machine()}, kernels {selection.name}, read bandwidth {bandwidth / 1e9:.0f} GB/s")
    rows = []
    for case in [case for family in arguments.only for case in FAMILIES[family]()]:
        # Calls of some microseconds are timed a hundred at a time.
        calls = 100 if 0 < case.forward_bytes < 1_000_000 else 1
        for has_backward in (False, True) if case.leaves else (False,):

            def run(kernels: str, case=case, has_backward=has_backward, calls=calls) -> Callable[[], Any]:
                def once() -> Any:
                    with select.forced(kernels), torch.set_grad_enabled(has_backward):
                        out = case.call()
                        return torch.autograd.grad(out, case.leaves, case.grads) if has_backward else out

                return lambda: [once() for _ in range(calls)]

            times = time_in_turn({"torch": run("reference"), "ours": run(ours)}, repeats=arguments.repeats)
            moved = case.forward_bytes + (case.backward_bytes if has_backward else 0)
            seconds = median(times["ours"]) / calls
            rows.append(
                {
                    "operation": case.name + (" + backward" if has_backward else ""),
                    "torch ms": median(times["torch"]) / calls * 1e3,
                    "ours ms": seconds * 1e3,
                    "torch / ours": paired_ratio(times, "torch", "ours"),
                    "share of bandwidth": moved / bandwidth / seconds if moved else "-",
                }
            )
    print_table(rows)


if __name__ == "__main__":
    main()
