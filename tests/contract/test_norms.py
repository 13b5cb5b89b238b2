"""Norms as numbers: against a calculator, and their gradient against autograd."""

from __future__ import annotations

import pytest
import torch

from qv_lens.models.norms import Norm, capped


def test_eps_stands_under_the_root_and_the_gain_outside():
    """RMSNorm of (3, 4) divides by the root of 12.5 + 1; LayerNorm of it by that of 0.25 + 1."""
    x, gain, bias = torch.tensor([[3.0, 4.0]]), torch.tensor([2.0, 1.0]), torch.tensor([0.0, 1.0])
    rms, layer = Norm(gain, None, 1.0, rms=True), Norm(gain, bias, 1.0, rms=False)
    assert rms.scale(x).item() == pytest.approx(13.5**0.5)
    assert rms(x)[0].tolist() == pytest.approx([6 / 13.5**0.5, 4 / 13.5**0.5])
    assert layer.scale(x).item() == pytest.approx(1.25**0.5)
    assert layer(x)[0].tolist() == pytest.approx([-1 / 1.25**0.5, 0.5 / 1.25**0.5 + 1])
    assert rms(x, torch.tensor([[2.0]]))[0].tolist() == [3.0, 2.0]
    none = Norm(gain, None, 1.0, rms=True, none=True)
    assert none.scale(x).item() == 1.0
    large = torch.tensor([[300.0, 400.0]], dtype=torch.float16)  # its square is infinite
    assert rms(large)[0].tolist() == pytest.approx([1.697, 1.131], abs=2e-3)


@pytest.mark.parametrize("rms", [True, False])
def test_the_gradient_is_that_of_the_norm(rms):
    generator = torch.Generator().manual_seed(0)
    h, key = (torch.randn(3, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    gain = torch.randn(5, generator=generator, dtype=torch.float64)
    norm = Norm(gain, gain + 1, 0.5, rms)
    h.requires_grad_()
    (wanted,) = torch.autograd.grad((key * norm(h)).sum(), h)
    torch.testing.assert_close(norm.gradient(h.detach(), key), wanted)


def test_a_cap_is_met_far_out_and_leaves_small_logits():
    x = torch.tensor([0.001, 1000.0, -1000.0])
    assert capped(x, 30.0).tolist() == pytest.approx([0.001, 30.0, -30.0], rel=1e-4)
    assert capped(x, None) is x
