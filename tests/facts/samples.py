"""Real benchmark samples beside the checkout, which are not part of the repository."""

from __future__ import annotations

from pathlib import Path

import pytest

DATA = Path(__file__).parents[3] / "shared" / "data"


def sample(name):
    """The path of a sample; without it the test is skipped."""
    if not (DATA / name).exists():
        pytest.skip(
            f"{DATA / name} is not here (real benchmark samples are not part of the repository)"
        )
    return DATA / name
