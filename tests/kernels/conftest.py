"""Tests that use the fixture `kernels` run once for each implementation that this machine has."""

from collections.abc import Iterator

import pytest

from moesaic.kernels import select

_SUPPORTED = select.supported_instruction_sets()


@pytest.fixture(params=["reference", *_SUPPORTED, *(["amx-emulated"] if _SUPPORTED else [])])
def kernels(request: pytest.FixtureRequest) -> Iterator[str]:
    with select.forced(request.param):
        yield request.param


@pytest.fixture(params=[*_SUPPORTED, *(["amx-emulated"] if _SUPPORTED else [])])
def compiled_kernels(request: pytest.FixtureRequest) -> Iterator[str]:
    """Only those in C++; where there are none the test is skipped."""
    with select.forced(request.param):
        yield request.param
