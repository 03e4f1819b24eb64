"""Tests that use the fixture `kernels` run once for each implementation that this machine has."""

from collections.abc import Iterator

import pytest

from moesaic.kernels import select

from .instruction_sets import ALL


@pytest.fixture(params=ALL)
def kernels(request: pytest.FixtureRequest) -> Iterator[str]:
    with select.forced(request.param):
        yield request.param


@pytest.fixture
def compiled_kernels(kernels: str) -> str:
    """Only those in C++."""
    if kernels == "reference":
        pytest.skip("this is about the kernels in C++")
    return kernels
