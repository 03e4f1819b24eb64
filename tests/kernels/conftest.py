"""Tests that use the fixture `kernels` run once for each implementation that this machine has."""

from collections.abc import Iterator

import pytest

from moesaic.kernels import select

_SUPPORTED = select.supported_instruction_sets()


@pytest.fixture(params=["reference", *_SUPPORTED, *(["amx-emulated"] if _SUPPORTED else [])])
def kernels(request: pytest.FixtureRequest) -> Iterator[str]:
    with select.forced(request.param):
        yield request.param


@pytest.fixture
def compiled_kernels(kernels: str) -> str:
    """Only those in C++."""
    if kernels == "reference":
        pytest.skip("this is about the kernels in C++")
    return kernels
