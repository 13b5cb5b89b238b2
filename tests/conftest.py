"""Fixtures shared by all tests."""

from __future__ import annotations

import os

import pytest
import torch

# the models are tiny: a second thread takes more than it gives; processes that tests start take
# this over
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
# no test waits for a network that may not be there
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """What is kept between calls lies in a folder of the tests, not in the user's; other processes
    take it over."""
    patch = pytest.MonkeyPatch()
    patch.setenv("QV_LENS_CACHE", str(tmp_path_factory.mktemp("cache")))
    yield
    patch.undo()


@pytest.fixture
def true_float64(monkeypatch):
    """Take away the casts to float32 inside a float64 model.

    Hugging Face computes RMSNorm, rotary angles and GPT-J's attention scores in float32 even then,
    which leaves differences of 1e-6 that would hide a bug of that size."""
    to = torch.Tensor.to

    def keep(self, *args, **kwargs):
        if self.dtype == torch.float64:
            args = tuple(torch.float64 if value is torch.float32 else value for value in args)
            kwargs = {
                k: torch.float64 if value is torch.float32 else value for k, value in kwargs.items()
            }
        return to(self, *args, **kwargs)

    single = torch.Tensor.float
    monkeypatch.setattr(torch.Tensor, "to", keep)
    monkeypatch.setattr(
        torch.Tensor, "float", lambda self: self if self.dtype == torch.float64 else single(self)
    )
    softmax = torch.nn.functional.softmax

    def same(x, dim=None, _stacklevel=3, dtype=None):
        return softmax(x, dim=dim, dtype=None if x.dtype == torch.float64 else dtype)

    monkeypatch.setattr(torch.nn.functional, "softmax", same)
