"""Is the packed linear layer ever slower than PyTorch's, at any number of rows?

bf16: packed_linear against F.linear and against oneDNN's own prepacked product (mkldnn._linear_pointwise), which
torch.compile uses; beside them our int8 and int4 weights. All in one process, in turn; calls rotate over as many
matrices as no cache holds. Share: max(bytes of the weight / bandwidth, FLOPs / peak) / time, the bandwidth measured
between the calls. Where torch has no bf16 products worth the name (no bf16 instructions) oneDNN's is fp32's, and
F.linear in fp32 stands beside F.linear in bf16. A candidate that takes 20 times ours is not timed further ("-").
Run: python benchmarks/kernels/linear.py [--rows 1 4 16 64 256 1024 4096] [--shapes 2048x2048 512x2048] [--seconds 1]
"""

import argparse
import sys
import time
from collections.abc import Callable
from itertools import cycle
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from measure import machine, median, paired_ratio, print_table

# K x N: attention projections, MLPs and a vocabulary.
SHAPES = ("512x2048", "2048x512", "2048x2048", "1024x4096", "1024x32000")
# Of all matrices of a shape together; twice the last-level cache where that is more.
LEAST_BYTES = 192 << 20
INT4_GROUP_SIZE = 64
FEWEST_CALLS, MOST_CALLS = 5, 200
HOPELESS_RATIO = 20


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096])
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), metavar="KxN")
    parser.add_argument("--seconds", type=float, default=1.0, help="of timing per row of the table")
    arguments = parser.parse_args()

    from moesaic.kernels.threads import spin_briefly

    spin_briefly()
    import torch
    import torch.nn.functional as F
    from torch import Tensor

    from moesaic.kernels import products
    from moesaic.kernels.allocator import tune_allocator
    from moesaic.kernels.limits import measure_limits, streamed_buffer
    from moesaic.kernels.packed import pack_weight, packed_linear
    from moesaic.kernels.quantized import quantize_weight
    from moesaic.kernels.select import cpu_kernels

    tune_allocator()
    torch.set_grad_enabled(False)
    limits, selection = measure_limits(device="cpu"), cpu_kernels()
    buffer = streamed_buffer("cpu")
    print(f"{machine()}, kernels {selection.name}, bf16 peak {limits.bf16_flops_per_second / 1e12:.2f} TFLOP/s")

    def read() -> None:
        if selection.library is None:
            buffer.sum()
        else:
            selection.library.function("moesaic_limit_read", "pi")(buffer.data_ptr(), buffer.nbytes)

    def rotating(x: Tensor, call: Callable[[Tensor, object], Tensor], weights: list[object]) -> Callable[[], Tensor]:
        stream = cycle(weights)
        return lambda: call(x, next(stream))

    def once(call: Callable[[], object]) -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    is_widened = products.is_widened(torch.device("cpu"), torch.bfloat16)
    rows = []
    for shape in arguments.shapes:
        depth, columns = (int(size) for size in shape.split("x"))
        count = max(2, -(-LEAST_BYTES // (2 * depth * columns)))
        weights = [torch.empty(columns, depth, dtype=torch.bfloat16).normal_(std=0.02) for _ in range(count)]
        packed = [pack_weight(weight) for weight in weights]
        wide = [weight.float() for weight in weights] if is_widened else weights
        int8 = [pack_weight(quantize_weight(weight, bits=8)) for weight in weights]
        int4 = [pack_weight(quantize_weight(weight, bits=4, group_size=INT4_GROUP_SIZE)) for weight in weights]
        for num_rows in arguments.rows:
            x = torch.randn(num_rows, depth).bfloat16()
            wide_x = x.to(wide[0].dtype)
            prepacked = [torch.ops.mkldnn._reorder_linear_weight(weight, num_rows) for weight in wide]
            candidates = {
                "moesaic": rotating(x, packed_linear, packed),
                "F.linear": rotating(x, F.linear, weights),
                "oneDNN": rotating(
                    wide_x,
                    lambda x, weight: torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], ""),
                    prepacked,
                ),
                "int8": rotating(x, packed_linear, int8),
                "int4": rotating(x, packed_linear, int4),
            }
            if is_widened:
                candidates["F.linear fp32"] = rotating(wide_x, F.linear, wide)
            first = {name: once(call) for name, call in candidates.items()}
            candidates = {
                name: call for name, call in candidates.items() if first[name] < HOPELESS_RATIO * first["moesaic"]
            }
            times: dict[str, list[float]] = {name: [] for name in (*candidates, "read")}
            end = time.perf_counter() + arguments.seconds
            calls = 0
            while calls < FEWEST_CALLS or (time.perf_counter() < end and calls < MOST_CALLS):
                for name, call in candidates.items():
                    times[name].append(once(call))
                if calls % 10 == 0:
                    times["read"].append(once(read))
                calls += 1
            bandwidth = buffer.nbytes / median(times.pop("read"))
            operations = 2 * num_rows * depth * columns
            moved = 2 * (depth * columns + num_rows * (depth + columns))
            least = max(moved / bandwidth, operations / limits.bf16_flops_per_second)
            seconds = median(times["moesaic"])
            peers = ("F.linear", "F.linear fp32", "oneDNN") if is_widened else ("F.linear", "oneDNN")
            ratios = {name: paired_ratio(times, "moesaic", name) for name in peers if name in times}
            rows.append(
                {
                    "K x N": shape,
                    "rows": num_rows,
                    "us": seconds * 1e6,
                    **{f"of {name}": ratios.get(name, "-") for name in peers},
                    "GB/s": moved / seconds / 1e9,
                    "read GB/s": bandwidth / 1e9,
                    "TFLOP/s": operations / seconds / 1e12,
                    "share": least / seconds,
                    "int8 us": median(times["int8"]) * 1e6,
                    "int4 us": median(times["int4"]) * 1e6,
                    "slower": "slower" if max(ratios.values(), default=0.0) > 1.02 else "",
                }
            )
    print_table(rows)


if __name__ == "__main__":
    main()
