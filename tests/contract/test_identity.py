"""What tells one state of the weights from another."""

from __future__ import annotations

import torch

from qv_lens.models.identity import bit_sum


def test_the_sum_of_bits_sees_every_write_wherever_the_tensor_lies():
    """Also of a part of a larger tensor that begins between two words of eight bytes."""
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        whole = torch.randn(31, generator=torch.Generator().manual_seed(0)).to(dtype)
        for first in range(4):
            part = whole[first:]
            before = int(bit_sum(part))
            assert before == int(bit_sum(part.clone()))
            for place in range(len(part)):
                kept = part[place].clone()
                part[place] += 1
                assert int(bit_sum(part)) != before
                part[place] = kept
            assert int(bit_sum(part)) == before
