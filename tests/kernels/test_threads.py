"""OpenMP's waiting is set before torch is loaded, and a user's own setting stands."""

import os
import subprocess
import sys

import pytest

_SCRIPT = """
import os, sys
{before}
from moesaic.kernels.threads import spin_briefly
done = spin_briefly()
assert "torch" not in sys.modules or {before!r}
print(done, os.environ.get("GOMP_SPINCOUNT"))
"""


@pytest.mark.parametrize(
    ("before", "environment", "printed"),
    [
        ("", {}, "True 1000"),
        ("", {"GOMP_SPINCOUNT": "7"}, "False 7"),
        ("", {"OMP_WAIT_POLICY": "active"}, "False None"),
        ("import torch", {}, "False None"),
    ],
)
def test_is_set_once_and_only_in_time(before: str, environment: dict[str, str], printed: str) -> None:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("GOMP_", "OMP_", "KMP_"))}
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT.format(before=before)],
        env={**inherited, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == printed
