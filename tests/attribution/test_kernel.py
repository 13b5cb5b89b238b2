"""The fused kernel that a CUDA GPU runs, here in Triton's interpreter: the same sums as by
definition in float64.

The interpreter is chosen when Triton is first imported, so the comparison runs in a process of its
own."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

CHECK = """
from qv_lens.attribution import log_sums as sums, kernel
from tests.attribution.test_units import by_definition, random_problem

for spread in (0.1, 30.0):
    for full in (False, True):
        V, task = random_problem(spread=spread)
        beta, b = (task.beta, task.b) if full else (None, None)
        expected = by_definition(V, sums.Problems(task.U, task.log_p, task.of, task.alpha, beta, b))
        got = kernel.log_sums(V, task.U, task.log_p, task.of, task.alpha, beta, b)
        error = float(((got - expected).abs() / expected.abs().clamp_min(1)).max())
        assert error < 1e-5, (spread, full, error)
print("four comparisons")
"""


@pytest.mark.skipif(
    find_spec("triton") is None, reason="Triton is not installed (it exists for Linux only)"
)
def test_kernel_equals_the_definition():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", CHECK], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "four comparisons" in done.stdout
