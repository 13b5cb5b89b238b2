"""What tells one state of the weights from another."""

from __future__ import annotations

import torch

from qv_lens.models.identity import bit_sum


def test_two_places_that_change_theirs_change_the_sum():
    """Rows, columns and single words, also those that lie below one another in the table."""
    whole = torch.randn(2044, 6, generator=torch.Generator().manual_seed(0))
    before = int(bit_sum(whole))
    for axis, first, other in ((0, 0, 1), (0, 3, 1024), (0, 0, 1021), (1, 0, 1), (1, 1, 4)):
        order = torch.arange(whole.shape[axis])
        order[[first, other]] = order[[other, first]]
        assert int(bit_sum(whole.index_select(axis, order))) != before
    line = whole.flatten()
    for first, other in ((0, 2), (0, 2 * 1021), (1, 1 + 4 * 1021), (5, 6)):
        swapped = line.clone()
        swapped[[first, other]] = swapped[[other, first]]
        assert int(bit_sum(swapped)) != before


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
