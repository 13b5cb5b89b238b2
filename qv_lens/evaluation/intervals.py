"""Intervals of means and shares, of 95% unless said: the one place where they are computed.

values that are 0 or 1     Wilson's score interval (scipy.stats.binomtest): it says something where all cases are alike
any other values           Student's t, cut off at the bounds of the values
values that are all equal  t would give no width. A value that n of n cases share is shared by at least Wilson's lower
                           bound of all cases; what the others have is only known to lie between the
                           bounds
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf, isinf, nan
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

LEVEL = 0.95
SHARE = (0.0, 1.0)
#: differences of two shares
DIFFERENCE = (-1.0, 1.0)
UNBOUNDED = (-inf, inf)
#: metrics that are not shares: entropies in bits, and perplexity
NOT_SHARES = ("fluency", "perplexity")


class Interval(NamedTuple):
    """The ends of an interval; NaN where the values say nothing."""

    low: float
    high: float


UNKNOWN = Interval(nan, nan)


def bounds(metric: str) -> tuple[float, float]:
    """Between which values a metric lies."""
    return (0.0, inf) if metric in NOT_SHARES else SHARE


def wilson(hits: float, trials: float, level: float = LEVEL) -> Interval:
    """Of a share: `hits` of `trials`, both rounded to whole numbers. With `trials` 0, nothing is
    known."""
    count = round(trials)
    if count < 1:
        return UNKNOWN
    ends = stats.binomtest(min(round(hits), count), count).proportion_ci(level, method="wilson")
    return Interval(float(ends.low), float(ends.high))


def interval(
    values: Sequence[float] | np.ndarray | pd.Series,
    within: tuple[float, float] = SHARE,
    level: float = LEVEL,
) -> Interval:
    """Of the mean of `values` (NaN is left out), each of which lies `within` these bounds."""
    known = np.asarray(values, float)
    known = known[~np.isnan(known)]
    if not len(known):
        return UNKNOWN
    if within == SHARE and np.isin(known, SHARE).all():
        return wilson(known.sum(), len(known), level)
    if np.ptp(known) < 1e-12:
        return _alike(float(known[0]), len(known), within, level)
    mean = float(known.mean())
    half = float(student(known.std(ddof=1) / len(known) ** 0.5, len(known), level))
    return Interval(max(within[0], mean - half), min(within[1], mean + half))


def _alike(value: float, count: int, within: tuple[float, float], level: float) -> Interval:
    """Of `count` cases that all have this value."""
    if isinf(within[0]) or isinf(within[1]):
        return UNKNOWN
    others = 1 - wilson(count, count, level).low
    return Interval(value - others * (value - within[0]), value + others * (within[1] - value))


def student(error: Any, count: Any, level: float = LEVEL) -> Any:
    """Half an interval from a standard error and the number of cases, of arrays too; NaN where the
    cases are all alike, or only one."""
    error = np.asarray(error, float)
    count = np.asarray(count, float)
    known = (count > 1) & (error > 0)
    factor = stats.t.ppf((1 + level) / 2, np.where(known, count - 1, 1))
    return np.where(known, factor * error, nan)
