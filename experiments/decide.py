"""What decides a claim: differences paired by case with their 95% interval, on the rows of one
model.

A decision is a function from rows to the statistic as text and `HOLDS`, `FAILS` or `OPEN`
(undecided), or `DESCRIBED`. A difference that should be positive holds if its interval lies above 0,
fails if it lies below; where few pairs differ, Fisher's exact test must agree. The cases of one row
of consecutive edits share one edit: there the intervals are narrower than those over edits would
be. Those of one batch decide nothing (`ledger.of_one_edit`)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from qv_lens.evaluation.intervals import (
    DIFFERENCE,
    LEVEL,
    NOT_SHARES,
    SHARE,
    UNBOUNDED,
    bounds,
    interval,
    wilson,
)

HOLDS, FAILS, OPEN = "holds", "fails", "undecided"
#: in the place of a verdict, where a number says something of a model of which nothing was claimed
DESCRIBED = ""
#: the statistic, the verdict
Verdict = tuple[str, str]
Decide = Callable[[pd.DataFrame], Verdict]
NOT_MEASURED: Verdict = ("not measured", OPEN)


@dataclass(frozen=True)
class Claim:
    """What a paper says that can be put as a number."""

    source: str
    """The paper, and where it says so."""
    words: str
    """What it says, with its number."""
    statistic: str
    """What is measured."""
    decide: Decide
    """Of the rows of one model (of both, where it compares them): the statistic and the verdict."""
    release: str = ""
    """What the official release or the paper's own set-up does to it."""
    both: bool = False
    """Whether it compares the two models."""

    @property
    def ours(self) -> bool:
        """Whether no paper says so: the row asks something of our own."""
        return self.source == "ours" or "(ours)" in self.words


def share(value: float, metric: str = "") -> str:
    """A value times 100, as the papers print it: a share in percent, the entropy that fluency is in
    bits."""
    return f"{100 * value:.1f}{'' if metric == 'fluency' else '%'}"


def rounded(value: float, digits: int) -> float:
    """The value at so many digits; 0.0 in the place of -0.0."""
    return round(value, digits) + 0.0


class Estimate(NamedTuple):
    """A mean, the ends of its 95% interval (NaN: nothing is known of it), and the number of
    cases."""

    mean: float
    low: float
    high: float
    cases: int = 0

    @classmethod
    def of(
        cls,
        values: Sequence[float] | pd.Series,
        within: tuple[float, float] = SHARE,
        level: float = LEVEL,
    ) -> Estimate:
        """Of a mean of values that lie `within` these bounds, with an interval of this level."""
        known = pd.Series(values, dtype=float).dropna()
        return cls(float(known.mean()), *interval(known, within, level), len(known))

    @classmethod
    def around(cls, mean: float, half: float, cases: int = 0) -> Estimate:
        """From half of an interval."""
        return cls(mean, mean - half, mean + half, cases)

    def __neg__(self) -> Estimate:
        return Estimate(-self.mean, -self.high, -self.low, self.cases)

    def shifted(self, by: float) -> Estimate:
        return Estimate(self.mean + by, self.low + by, self.high + by, self.cases)

    def words(self, digits: int) -> str:
        """The mean and the interval."""
        return f"{rounded(self.mean, digits):.{digits}f} {self.spread(digits=digits)}"

    def spread(self, scale: float = 1.0, digits: int = 1) -> str:
        """The interval in words: plus or minus its half-width, or its two ends where they are not
        equally far from the mean."""
        if self.low != self.low:
            return "(interval not known)"
        below, above = (
            round(scale * side, digits) for side in (self.mean - self.low, self.high - self.mean)
        )
        if below == above:
            return f"± {above:.{digits}f}"
        low, high = (rounded(scale * end, digits) for end in (self.low, self.high))
        return f"({low:.{digits}f} to {high:.{digits}f})"


#: the fewest pairs that decide anything: by chance alone, all of five pairs agree with p = 2 / 2^5
#: = 0.06
ENOUGH = 6
#: up to how many pairs that differ Fisher's exact test is asked besides: 2^13 choices of signs
FEW = 13


def differences(metric: str) -> tuple[float, float]:
    """Between which values two cases' difference in a metric lies."""
    return UNBOUNDED if metric in NOT_SHARES else DIFFERENCE


def difference(
    a: pd.Series,
    b: pd.Series,
    within: tuple[float, float] = DIFFERENCE,
    level: float = LEVEL,
) -> Estimate:
    """Mean of paired differences, of shares unless `within` says otherwise; of fewer than `ENOUGH`
    pairs no interval.

    Student's interval is too narrow where few pairs differ at all. It is widened to hold 0 where
    Fisher's exact test (`by_signs`) finds a mean as large by chance. What is decided at another
    bound than 0 is decided by Student's alone."""
    paired = (a - b).dropna()
    estimate = Estimate.of(paired, within, level)
    if len(paired) < ENOUGH:
        return Estimate(estimate.mean, float("nan"), float("nan"), len(paired))
    if by_signs(paired) <= 1 - level:
        return estimate
    return estimate._replace(low=min(estimate.low, 0.0), high=max(estimate.high, 0.0))


def by_signs(paired: pd.Series) -> float:
    """p of a mean as far from 0 if each difference could as well have the other sign (R. A. Fisher,
    The Design of Experiments, section 21), exactly. 1 where fewer than `ENOUGH` pairs differ, 0
    where more than `FEW` do: there Student's t decides."""
    differing = paired[paired.abs() > 1e-12].to_numpy()  # not what rounding leaves of equal means
    if len(differing) > FEW:
        return 0.0
    if len(differing) < ENOUGH:
        return 1.0
    exact = stats.permutation_test(
        (differing,), np.mean, permutation_type="samples", n_resamples=np.inf
    )
    return float(exact.pvalue)


def minus(a: Estimate, b: Estimate) -> Estimate:
    """Difference of two means that are not paired (other facts, other models). The interval is put
    together from both by their distances to the means, as Newcombe does from Wilson's for two
    shares (Statistics in Medicine 17, 1998, method 10)."""
    mean = a.mean - b.mean
    low = mean - ((a.mean - a.low) ** 2 + (b.high - b.mean) ** 2) ** 0.5
    high = mean + ((a.high - a.mean) ** 2 + (b.mean - b.low) ** 2) ** 0.5
    return Estimate(mean, low, high, min(a.cases, b.cases))


def two_samples(a: pd.Series, b: pd.Series, within: tuple[float, float] = SHARE) -> Estimate:
    """Difference of the means of cases that are not pairs."""
    return minus(Estimate.of(a, within), Estimate.of(b, within))


def verdict_of(holds: bool, fails: bool) -> str:
    """Undecided where neither is so."""
    if holds:
        return HOLDS
    return FAILS if fails else OPEN


def decided(estimate: Estimate) -> str:
    """Whether a difference that should be positive is."""
    return verdict_of(estimate.low > 0, estimate.high < 0)


def nearer(gap: Estimate, limit: float) -> Estimate:
    """How far the size of a difference, up or down, lies below `limit`."""
    return (gap if gap.mean < 0 else -gap).shifted(limit)


def together(verdicts: Collection[str]) -> str:
    """Of a claim in several parts: it holds if all do, and fails if one does."""
    kinds = set(verdicts)
    if len(kinds) == 1:
        return kinds.pop()
    return FAILS if FAILS in kinds else OPEN


def share_lost(hits: float, trials: float) -> Estimate:
    """A share lost (none, where more is right than before), with its 95% Wilson interval, which has
    a width even where nothing was lost."""
    hits = max(0.0, hits)
    return Estimate(hits / trials, *wilson(hits, trials))


def lost(hits: float, trials: float) -> str:
    """A share lost, in words."""
    return share_of(share_lost(hits, trials), f"{trials:.0f} prompts")


def share_of(estimate: Estimate, unit: str) -> str:
    """A share with the ends of its interval, and of what it is one."""
    return (
        f"{share(estimate.mean)} ({100 * estimate.low:.1f} to {100 * estimate.high:.1f}%, {unit})"
    )


def mean_told(estimate: Estimate, metric: str = "") -> str:
    """A mean of shares with its interval and the number of cases."""
    return f"{share(estimate.mean, metric)} {estimate.spread(100)}, {estimate.cases} cases"


def points(estimate: Estimate) -> str:
    return f"{rounded(100 * estimate.mean, 1):+.1f} {estimate.spread(100)} points, {estimate.cases} cases"


def read_as(column: str, names: Mapping[str, str], decide: Decide) -> Decide:
    """The same decision on other rows: those of each key stand where it looks for the value."""

    def other(frame: pd.DataFrame) -> Verdict:
        if not set(names) <= set(frame[column]):
            return NOT_MEASURED
        stays = ~frame[column].isin(list(names.values()))
        return decide(frame[stays].replace({column: dict(names)}))

    return other


def averaged(frame: pd.DataFrame, part: str) -> pd.DataFrame:
    """`score` of a part by layer, the mean over the categories, and `interval`, half of its 95%
    one."""
    parts = frame[frame["part"] == part].groupby("layer")
    return pd.DataFrame(
        {
            "score": parts["score"].mean(),
            "interval": parts["interval"].apply(lambda i: (i**2).sum() ** 0.5 / len(i)),
        }
    )


def half_the_largest_less_the_last(scores: pd.DataFrame) -> Estimate:
    """Of `averaged` scores; where the last is the largest they are one number, not two."""
    last, peak = scores.iloc[-1], scores.loc[scores["score"].idxmax()]
    if last.name == peak.name:
        return Estimate.around(-last["score"] / 2, last["interval"] / 2)
    half = (last["interval"] ** 2 + (peak["interval"] / 2) ** 2) ** 0.5
    return Estimate.around(peak["score"] / 2 - last["score"], half)


def multihop(frame: pd.DataFrame) -> str:
    """Which metric of two hops and more the rows hold: after worked examples (MQuAKE's chains),
    else cloze prompts."""
    return "multihop_cot" if (frame["metric"] == "multihop_cot").any() else "multihop_acc"


def per_case(frame: pd.DataFrame, metric: str, by: str) -> pd.DataFrame:
    """Values of `after` per case, one column per value of `by`; of a curve its last step. Cases of
    batches or of numbers of edits that differ are no pairs."""
    chosen = frame[frame["metric"] == metric]
    sizes = [name for name in ("count", "batch_size") if name in frame and name != by]
    case = ["data", *sizes, "seed", "case"]
    chosen = chosen[chosen["step"] == chosen.groupby([by, *case])["step"].transform("max")]
    return chosen.pivot_table(index=case, columns=by, values="after", aggfunc="mean")


def lacking(table: pd.DataFrame) -> str:
    """Which columns lack cases that others have (an editor refused them, or was not asked), in
    words; '' where none does."""
    table = table.dropna(how="all")
    return ", ".join(
        f"{name} lacks {len(table) - count} of {len(table)} cases"
        for name, count in table.count().items()
        if count < len(table)
    )


def unless(statistic: str, verdict: str, *reasons: str) -> Verdict:
    """The verdict; undecided where there are reasons against one, which are told."""
    reasons = tuple(reason for reason in reasons if reason)
    return ("; ".join([statistic, *reasons]), OPEN if reasons else verdict)


def not_measured(names: Iterable[object]) -> str:
    """Of what should have been measured and was not, in words; '' where there is nothing."""
    missing = ", ".join(map(str, names))
    return f"not measured: {missing}" if missing else ""


def ahead(metric: str, method: str, rivals: Sequence[str], by: str = "method") -> Decide:
    """`method` is above each of its rivals, on the cases on which all were measured; undecided while
    any rival has not been measured, on any of the cases.

    It holds if the method is above every one of them. It fails if one of k rivals is above the
    method at the level 1 - 0.05 / k (Bonferroni): the best of several is often above by chance."""

    def decide(frame: pd.DataFrame) -> Verdict:
        table = per_case(frame, metric, by)
        others = [name for name in rivals if name in table]
        if method not in table or not others:
            return NOT_MEASURED
        cases = table[[method, *others]]
        table = cases.dropna()

        def gap(rival: str, level: float = LEVEL) -> Estimate:
            return difference(table[method], table[rival], differences(metric), level)

        above_all = all(gap(rival).low > 0 for rival in others)
        strict = 1 - (1 - LEVEL) / len(others)
        below_one = any(gap(rival, strict).high < 0 for rival in others)
        means = table.mean().sort_values(ascending=False)
        first = means.drop(method).index[0]
        statistic = ", ".join(f"{name} {share(value, metric)}" for name, value in means.items())
        missing = not_measured(name for name in rivals if name not in others)
        statistic = f"{statistic} ({method} − {first} {points(gap(first))})"
        return unless(statistic, verdict_of(above_all, below_one), missing, lacking(cases))

    return decide


def best(metrics: Sequence[str], method: str, by: str, of: Collection[str]) -> Decide:
    """`method` is above all others `of` these, and all that were measured besides, by each metric."""

    def decide(frame: pd.DataFrame) -> Verdict:
        rivals = sorted({*of, *frame[by].dropna()} - {method})
        verdicts = {metric: ahead(metric, method, rivals, by)(frame) for metric in metrics}
        if NOT_MEASURED in verdicts.values():
            return NOT_MEASURED
        return "; ".join(f"{metric} {words}" for metric, (words, _) in verdicts.items()), together(
            [v for _, v in verdicts.values()]
        )

    return decide


def beats(metric: str, first: str | float, second: str | float, by: str = "method") -> Decide:
    """`first` is above `second`."""
    return compared((metric,), first, second, by)


def compared(
    metrics: Sequence[str],
    first: str | float,
    second: str | float,
    by: str = "method",
    within: float | None = None,
) -> Decide:
    """`first` is above `second` by each metric; or (`within`) no further from it than this, fluency in
    shares of its own."""

    def decide(frame: pd.DataFrame) -> Verdict:
        lines, verdicts = [], []
        for metric in metrics:
            table = per_case(frame, metric, by)
            if not {first, second} <= set(table):
                return NOT_MEASURED
            gap = difference(table[first], table[second], differences(metric))
            both = table[[first, second]].dropna().mean()
            name = f"{metric}: " if len(metrics) > 1 else ""
            lines.append(
                f"{name}{first} {share(both[first], metric)}, {second} {share(both[second], metric)}: "
                f"{points(gap)}"
            )
            limit = (within or 0) * (both[second] if metric == "fluency" else 1)
            verdicts.append(decided(gap if within is None else nearer(gap, limit)))
        return "; ".join(lines), together(verdicts)

    return decide


def reaches(metric: str, method: str, least: float, by: str = "method") -> Decide:
    """The mean of `method` is at least this."""

    def decide(frame: pd.DataFrame) -> Verdict:
        table = per_case(frame, metric, by)
        if method not in table:
            return NOT_MEASURED
        estimate = Estimate.of(table[method], bounds(metric))
        return mean_told(estimate, metric), decided(estimate.shifted(-least))

    return decide


def curve(
    column: str,
    *parts: tuple[str, float | None, float | None, bool],
    of: Collection[float] = (),
) -> Decide:
    """Along what is varied, each (metric, from, to, rises) goes up, or down; None: the first value,
    the last one, of a sweep of at least the values in `of`."""

    def decide(frame: pd.DataFrame) -> Verdict:
        lines, verdicts = [], []
        for metric, start, end, rises in parts:
            table = per_case(frame, metric, column)
            if table.shape[1] < 2:
                return NOT_MEASURED
            a, b = (
                table.columns[0] if start is None else start,
                table.columns[-1] if end is None else end,
            )
            if not {a, b} <= set(table):
                return NOT_MEASURED
            gap = difference(table[b], table[a], differences(metric))
            values = ", ".join(f"{k:g}: {share(v, metric)}" for k, v in table.mean().items())
            lines.append(f"{metric} {values} ({a:g} to {b:g}: {points(gap)})")
            verdicts.append(decided(gap if rises else -gap))
        missing = not_measured(sorted(set(of) - set(frame[column])))
        return unless("; ".join(lines), together(verdicts), missing)

    return decide


def groups(metrics: Sequence[str], inside: Collection[str], by: str, of: Collection[str]) -> Decide:
    """Values of `by` in `inside` give more than all others, by each metric, on the cases on which
    all were measured; undecided while any `of` these has not been measured."""

    def decide(frame: pd.DataFrame) -> Verdict:
        lines, verdicts = [], []
        for metric in metrics:
            table = per_case(frame, metric, by).dropna()
            members = [name for name in table if name in inside]
            if not members or len(members) == table.shape[1]:
                return NOT_MEASURED
            gap = difference(
                table[members].mean(axis=1),
                table.drop(columns=members).mean(axis=1),
                differences(metric),
            )
            statistic = ", ".join(
                f"{name} {share(value, metric)}" for name, value in table.mean().items()
            )
            lines.append(f"{metric} {statistic} ({' and '.join(members)} − others {points(gap)})")
            verdicts.append(decided(gap))
        missing = not_measured(sorted(set(of) - set(frame[by])))
        return unless("; ".join(lines), together(verdicts), missing)

    return decide
