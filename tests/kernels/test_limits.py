"""Limits are plausible, measured once per machine, and a damaged cache is never believed."""

import ctypes
import json
import logging
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from moesaic.errors import DeviceError
from moesaic.kernels import limits, products, select
from moesaic.kernels.limits import Limits, cache_folder, describe_cpu, measure_limits

from .instruction_sets import ALL, COMPILED

BEST = (
    "bandwidth_bytes_per_second",
    "bf16_flops_per_second",
    "fp32_flops_per_second",
    "int8_operations_per_second",
)
RATES = (*BEST, *(f"torch_{name}" for name in BEST))


def quick(folder: Path, *, reuse: bool = True) -> Limits:
    return measure_limits(seconds=0.1, folder=folder, reuse=reuse)


def measurement(rate: float | None, *, processor_share: float = 1.0) -> limits._Measurement:
    return limits._Measurement(dict.fromkeys(RATES, rate), 1 << 30, processor_share)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """For the tests that are about the measuring, not about the machine, which other tests may be using."""
    monkeypatch.setattr(limits, "_SMALLEST_BUFFER_BYTES", 16 << 20)
    monkeypatch.setattr(limits, "_last_level_cache_bytes", lambda: 0)
    monkeypatch.setattr(limits, "_CPU_SIZES", (128, 256))


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Replace the clock's work by fixed rates: one value a measurement, the last one repeated."""
    rates = [1e9]

    def measure(device: str, seconds: float) -> limits._Measurement:
        return measurement(rates.pop(0) if len(rates) > 1 else rates[0])

    monkeypatch.setattr(limits, "_measure", measure)
    return rates


@pytest.mark.parametrize("kernels", ALL)
def test_the_measured_rates_are_those_of_a_computer(kernels: str, tmp_path: Path, small: None) -> None:
    with select.forced(kernels):
        measured = quick(tmp_path)
    assert measured.device == "cpu"
    assert measured.threads == torch.get_num_threads()
    assert measured.torch_version == torch.__version__
    assert measured.kernels == kernels
    assert measured.buffer_bytes == 16 << 20
    assert 1e7 < measured.bandwidth_bytes_per_second < 1e13
    assert 1e7 < measured.bf16_flops_per_second < 1e16
    assert 1e7 < measured.fp32_flops_per_second < 1e15
    assert measured.int8_operations_per_second is not None
    assert 1e7 < measured.int8_operations_per_second < 1e16
    values = asdict(measured)
    for name in BEST:
        assert values[name] >= values[f"torch_{name}"] > 0, "the better of the two"
    if kernels == "reference":
        assert all(values[name] == values[f"torch_{name}"] for name in BEST)


@pytest.mark.parametrize("kernels", COMPILED)
@pytest.mark.parametrize("threads", [1, 3])
def test_the_kernels_do_as_many_operations_as_they_say(kernels: str, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with select.forced(kernels) as selection:
            assert selection.library is not None
            for name in ("bf16", "int8", "fp32"):
                count = selection.library.function(f"moesaic_limit_{name}", "i")
                once = count(1)
                assert once > 0 and once % (2 * threads) == 0, "additions as many as multiplications, threads alike"
                assert count(3) == 3 * once
            read = selection.library.function("moesaic_limit_read", "pi")
            buffer = torch.zeros((9 << 20) // 4)
            assert read(buffer.data_ptr(), buffer.nbytes) == 8 << 20, "whole blocks of 4 MiB"
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("kernels", COMPILED)
def test_products_are_tried_with_seven_tiles_and_with_four(kernels: str) -> None:
    seven, few = ctypes.c_double(-1.0), ctypes.c_double(-1.0)
    with select.forced(kernels) as selection:
        assert selection.library is not None
        try_both = selection.library.function("moesaic_limit_tile_ways", "pp")
        assert try_both(ctypes.addressof(seven), ctypes.addressof(few)) == (kernels == "amx")
    least = 32.0 if kernels == "amx" else 0.0  # ticks: four products are 64 cycles of a clock at most twice as fast
    assert seven.value >= least
    assert few.value >= least
    if kernels != "amx":
        assert seven.value == few.value == 0.0


def test_one_slow_call_does_not_decide_how_long_the_others_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call disturbed for longer than the shortest that counts must not leave calls of one round each."""
    monkeypatch.setattr(limits, "_SHORTEST_CALL_SECONDS", 1e-3)
    calls: list[int] = []

    def count(rounds: int) -> int:
        time.sleep(5e-3 if len(calls) == 1 else rounds * 1e-5)
        calls.append(rounds)
        return rounds

    class Counting:
        def function(self, name: str, signature: str) -> Callable[..., int]:
            return count if signature == "i" else lambda *arguments: 1

    limits._measure_kernels(Counting(), torch.ones(1), 0.01)  # type: ignore[arg-type]
    assert max(calls) >= 16, "a round takes at least 10 microseconds, and so do 1 ms of them about 100"


def test_the_buffer_is_written_before_it_is_read(small: None) -> None:
    """Pages that nobody wrote are one page of zeros, which every cache holds."""
    buffer = limits.streamed_buffer("cpu")
    assert buffer.nbytes == 16 << 20
    assert bool((buffer == 1).all())


def test_a_machine_without_products_of_bytes_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    values = dict.fromkeys(RATES, 1e9) | {"int8_operations_per_second": None, "torch_int8_operations_per_second": None}
    monkeypatch.setattr(limits, "_measure", lambda device, seconds: limits._Measurement(values, 1 << 30, 1.0))
    first = quick(tmp_path)
    assert first.int8_operations_per_second is None
    monkeypatch.setattr(limits, "_measure", lambda device, seconds: measurement(2e9))
    with caplog.at_level(logging.WARNING, logger="moesaic"):
        assert quick(tmp_path) == first
    assert not caplog.records, "none is a value that a measurement may have"
    assert quick(tmp_path, reuse=False).int8_operations_per_second == 2e9


def test_other_kernels_are_another_measurement(tmp_path: Path, fake: list[float]) -> None:
    fake[:] = [1e9, 2e9]
    first = quick(tmp_path)
    with select.forced("reference" if first.kernels != "reference" else "auto"):
        other = quick(tmp_path)
    if other.kernels != first.kernels:
        assert other.bf16_flops_per_second == 2e9
        assert len(list(tmp_path.iterdir())) == 2
    assert quick(tmp_path) == first


def test_a_second_call_reads_what_the_first_measured(tmp_path: Path, fake: list[float]) -> None:
    fake[:] = [1e9, 2e9]
    first = quick(tmp_path)
    assert quick(tmp_path) == first
    assert [json.loads(path.read_text()) for path in tmp_path.iterdir()] == [asdict(first)]


def test_rates_measured_in_another_way_do_not_count(
    tmp_path: Path, fake: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake[:] = [3e9, 2e9]
    with monkeypatch.context() as earlier:
        earlier.setattr(limits, "_METHOD", limits._METHOD - 1)
        assert quick(tmp_path).bf16_flops_per_second == 3e9
    assert quick(tmp_path).bf16_flops_per_second == 2e9


def test_measuring_again_keeps_the_better_rate(tmp_path: Path, fake: list[float]) -> None:
    fake[:] = [2e9, 1e9, 3e9]
    assert quick(tmp_path).bf16_flops_per_second == 2e9
    assert quick(tmp_path, reuse=False).bf16_flops_per_second == 2e9
    assert quick(tmp_path, reuse=False).bf16_flops_per_second == 3e9
    assert quick(tmp_path).bf16_flops_per_second == 3e9


def test_another_number_of_threads_is_another_measurement(tmp_path: Path, fake: list[float]) -> None:
    threads = torch.get_num_threads()
    fake[:] = [1e9, 2e9]
    quick(tmp_path)
    try:
        torch.set_num_threads(threads + 1)
        other = quick(tmp_path)
    finally:
        torch.set_num_threads(threads)
    assert (other.threads, other.bf16_flops_per_second) == (threads + 1, 2e9)
    assert quick(tmp_path).bf16_flops_per_second == 1e9


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"{",
        b"\xff\xfe\x00",
        b"[]",
        b"{}",
        b"nan",
        {"bf16_flops_per_second": 0.0},
        {"bf16_flops_per_second": -1.0},
        {"bf16_flops_per_second": math.nan},
        {"bf16_flops_per_second": math.inf},
        {"bf16_flops_per_second": "fast"},
        {"bf16_flops_per_second": True},
        {"bf16_flops_per_second": None},
        {"buffer_bytes": 0},
        {"buffer_bytes": 1e9},
        b"[" * 100_000,
        {"kernels": "another"},
        {"name": "another processor"},
        {"unknown": 1.0},
    ],
    ids=lambda damage: str(damage)[:40],
)
def test_a_damaged_cache_is_measured_anew_with_a_log_line(
    damage: bytes | dict[str, object], tmp_path: Path, fake: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    fake[:] = [1e9, 2e9]
    first = quick(tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_bytes(damage if isinstance(damage, bytes) else json.dumps({**asdict(first), **damage}).encode())
    with caplog.at_level(logging.WARNING, logger="moesaic"):
        assert quick(tmp_path).bf16_flops_per_second == 2e9
    assert str(path) in caplog.text and "measuring again" in caplog.text
    caplog.clear()
    assert quick(tmp_path).bf16_flops_per_second == 2e9
    assert not caplog.records


def test_a_folder_that_cannot_be_written_costs_the_cache_only(
    tmp_path: Path, fake: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    with caplog.at_level(logging.WARNING, logger="moesaic"):
        assert quick(blocked / "moesaic").bf16_flops_per_second == 1e9
    assert "could not be kept" in caplog.text


def test_a_disturbed_measurement_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    results = [1e9, 3e9]
    monkeypatch.setattr(limits, "_measure", lambda device, seconds: measurement(results.pop(0), processor_share=0.4))
    with caplog.at_level(logging.WARNING, logger="moesaic"):
        assert quick(tmp_path).bf16_flops_per_second == 3e9, "the better of two tries"
    assert "busy" in caplog.text and "doctor --measure" in caplog.text
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("has_products", [False, True])
def test_products_on_one_thread_are_no_sign_of_other_programs(
    has_products: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rate(share: float) -> limits._Rate:
        return limits._Rate(1e9, share)

    monkeypatch.setattr(products, "_HAS_BF16_PRODUCTS", has_products)
    monkeypatch.setattr(limits, "streamed_buffer", lambda device: torch.ones(4))
    monkeypatch.setattr(limits, "_measure_sum", lambda buffer, seconds: rate(0.9))
    monkeypatch.setattr(limits, "_measure_byte_products", lambda device, *, seconds: rate(0.4))
    monkeypatch.setattr(
        limits, "_measure_products", lambda device, dtype, *, seconds: rate(0.5 if dtype == torch.bfloat16 else 0.95)
    )
    monkeypatch.setattr(limits, "_measure_kernels", lambda library, buffer, seconds: {})
    assert limits._measure("cpu", 1.0).processor_share == (0.4 if has_products else 0.9)


@pytest.mark.parametrize("device", ["tpu", "cuda:x", "cuda:99", ""])
def test_a_device_that_is_not_here_is_refused(device: str, tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match="device"):
        measure_limits(device=device, folder=tmp_path)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_is_measured_by_the_same_function(tmp_path: Path) -> None:
    measured = measure_limits(device="cuda", seconds=1.0, folder=tmp_path)
    assert measured.name == torch.cuda.get_device_name()
    assert measured.bf16_flops_per_second > measured.fp32_flops_per_second


def test_the_cache_folder_is_the_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(limits.sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "moesaic"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "moesaic"


def test_without_a_home_the_cache_folder_has_to_be_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(limits.sys, "platform", "linux")
    monkeypatch.setattr(limits.Path, "home", no_home)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "moesaic"
    monkeypatch.delenv("XDG_CACHE_HOME")
    with pytest.raises(DeviceError, match=r"no home folder.*name it with XDG_CACHE_HOME"):
        cache_folder()


def test_without_a_home_limits_are_measured_and_not_kept(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fake: list[float]
) -> None:
    def no_folder() -> Path:
        raise DeviceError("this user has no home folder")

    fake[:] = [1e9, 2e9]
    monkeypatch.setattr(limits, "cache_folder", no_folder)
    with caplog.at_level("WARNING", "moesaic"):
        first, second = measure_limits(seconds=0.001), measure_limits(seconds=0.001)
    assert first != second and "measured every time: this user has no home folder" in caplog.text


INTEL = """processor\t: 0
model name\t: Some Xeon
physical id\t: 0
core id\t\t: 0
flags\t\t: fpu sse2 avx2 fma avx512f avx512_vnni avx512_bf16 amx_tile amx_int8 amx_bf16

processor\t: 1
model name\t: Some Xeon
physical id\t: 0
core id\t\t: 0
flags\t\t: fpu sse2 avx2 fma avx512f avx512_vnni avx512_bf16 amx_tile amx_int8 amx_bf16
"""
OLD = "processor\t: 0\nmodel name\t: Old\nflags\t\t: fpu sse2 avx\n"
ARM = "processor\t: 0\nFeatures\t: fp asimd sve sve2 i8mm bf16\n"


@pytest.mark.parametrize(
    ("cpuinfo", "model", "cores", "instruction_sets", "has_bf16"),
    [
        (
            INTEL,
            "Some Xeon",
            1,
            ("avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_int8", "amx_bf16"),
            True,
        ),
        (OLD, "Old", None, (), False),
        (ARM, None, None, ("asimd", "sve", "sve2", "bf16", "i8mm"), True),
    ],
    ids=["intel", "old", "arm"],
)
def test_the_processor_is_read_not_assumed(
    cpuinfo: str,
    model: str | None,
    cores: int | None,
    instruction_sets: tuple[str, ...],
    has_bf16: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(limits, "read_text", lambda path: cpuinfo if path == Path("/proc/cpuinfo") else "")
    cpu = describe_cpu()
    assert model is None or cpu.model == model
    assert cpu.model
    assert cpu.cores == cores
    assert cpu.instruction_sets == instruction_sets
    assert cpu.has_bf16 is has_bf16
    assert 1 <= cpu.usable_threads <= (os.cpu_count() or 1)


def test_without_proc_torch_says_what_it_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "read_text", lambda path: "")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    assert describe_cpu().instruction_sets == ("avx2", "fma", "avx512f")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    assert describe_cpu().instruction_sets == ()
