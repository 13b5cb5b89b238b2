"""Intervals against their own definitions, and where they must say nothing."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from scipy import special

from qv_lens.evaluation.intervals import DIFFERENCE, UNBOUNDED, interval, student, wilson
from qv_lens.evaluation.protocols import COLUMNS
from qv_lens.evaluation.summary import summary

Z = 1.959963984540054


@pytest.mark.parametrize(("hits", "asked"), [(0, 3), (3, 3), (1, 3), (7, 40), (100, 102)])
def test_wilsons_ends_are_where_the_share_lies_just_within(hits, asked):
    """By its definition: each end is a share from which the one seen is 1.96 of the end's own
    standard errors away."""
    share = hits / asked
    for end in interval([1.0] * hits + [0.0] * (asked - hits)):
        assert 0 <= end <= 1
        if end not in (0.0, 1.0):
            assert abs(share - end) == pytest.approx(
                Z * math.sqrt(end * (1 - end) / asked), rel=1e-6
            )
    assert interval([True] * hits + [False] * (asked - hits)) == wilson(hits, asked)


def test_three_of_three_is_not_certain():
    low, high = interval([1, 1, 1])
    assert low == pytest.approx(0.4385, abs=1e-4)  # n / (n + z^2)
    assert high == 1.0
    assert interval([0, 0, 0]) == pytest.approx((0.0, 1 - 0.4385), abs=1e-4)


def test_other_values_by_students_t():
    values = np.random.default_rng(0).normal(0.5, 0.1, 12)
    low, high = interval(values)
    half = values.std(ddof=1) / math.sqrt(12) * 2.200985  # a table's t for 11 degrees of freedom
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), rel=1e-5)
    assert special.stdtr(11, 2.200985) == pytest.approx(0.975, abs=1e-6)
    assert interval([*values, math.nan]) == (low, high)


@pytest.mark.parametrize("values", [[0.9, 1.0], [0.5, 1.0, 1.0], [0.0, 0.1]])
def test_shares_stay_shares(values):
    low, high = interval(values)
    assert 0 <= low <= np.mean(values) <= high <= 1


def test_values_that_are_all_alike():
    """No width would be wrong: what the unseen ones have is known to lie between the bounds, and
    nothing else."""
    assert interval([0.5]) == pytest.approx((0.5 - 0.5 * 0.79346, 0.5 + 0.5 * 0.79346), abs=1e-4)
    low, high = interval([1.0, 1.0], DIFFERENCE)
    assert low < 0 < high == 1.0
    assert all(
        math.isnan(end)
        for end in (*interval([2.0, 2.0], UNBOUNDED), *interval([]), *interval([math.nan]))
    )
    assert np.isnan(student([0.0, 1.0], [5, 1])).all()


def test_a_summary_has_no_certainty_from_three_cases():
    rows = [(i, "s", 1, 1, 1, "efficacy_acc", 0.0, 1.0, 0.1, 1.0) for i in range(3)]
    rows += [(i, "s", 1, 1, 1, "fluency", 3.0, 3.0 + i, 0.1, 1.0) for i in range(3)]
    got = summary(pd.DataFrame(rows, columns=COLUMNS)).set_index("metric")
    assert (got.loc["efficacy_acc", "low"], got.loc["efficacy_acc", "high"]) == pytest.approx(
        (0.4385, 1.0), abs=1e-4
    )
    # not cut off at 1
    assert got.loc["fluency", "high"] == pytest.approx(4 + 4.302653 / math.sqrt(3), rel=1e-5)
    named = pd.DataFrame(rows, columns=COLUMNS).assign(preset=None)
    assert len(summary(named, ["preset"])) == 2  # a column that says nothing loses no rows
