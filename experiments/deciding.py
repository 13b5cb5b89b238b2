"""What decides a claim: differences paired by case with their 95% interval, on the rows of one model.

A decision is a function from rows to the statistic as text and `HOLDS`, `FAILS` or `OPEN` (undecided). A difference that
should be positive holds if its interval lies above 0, fails if it lies below. The cases of one batch, and of one row of
consecutive edits, share one edit: there the intervals are narrower than those over edits would be.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import numpy as np
import pandas as pd

HOLDS, FAILS, OPEN = "holds", "fails", "undecided"
Told = tuple[str, str]  # the statistic, the verdict
Decide = Callable[[pd.DataFrame], Told]
NOT_MEASURED: Told = ("not measured", OPEN)


def share(value: float, metric: str = "") -> str:
    """A value times 100, as the papers print it: a share in percent, the entropy that fluency is in bits."""
    return f"{100 * value:.1f}{'' if metric == 'fluency' else '%'}"


def interval(values: Sequence[float] | pd.Series) -> float:
    """Half of the 95% interval of a mean."""
    values = np.asarray(values, float)
    return float(1.96 * values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else float("nan")


def difference(a: pd.Series, b: pd.Series) -> tuple[float, float, int]:
    """Mean of paired differences, its 95% half interval, and the number of pairs."""
    paired = (a - b).dropna()
    return float(paired.mean()), interval(paired), len(paired)


def two_samples(a: pd.Series, b: pd.Series) -> tuple[float, float]:
    """Difference of the means of cases that are no pairs (other facts, other models), and its 95% half interval."""
    a, b = a.dropna(), b.dropna()
    return float(a.mean() - b.mean()), (interval(a) ** 2 + interval(b) ** 2) ** 0.5


def decided(mean: float, half: float) -> str:
    """Whether a difference that should be positive is."""
    return HOLDS if mean - half > 0 else FAILS if mean + half < 0 else OPEN


def together(verdicts: Collection[str]) -> str:
    """Of a claim in several parts: it holds if all do, and fails if one does."""
    kinds = set(verdicts)
    return kinds.pop() if len(kinds) == 1 else FAILS if FAILS in kinds else OPEN


def lost(hits: float, asked: float) -> str:
    """A share lost, with its 95% interval after Wilson, which says something where nothing was lost as well."""
    z, p = 1.96, max(0.0, hits / asked)
    middle, half = p + z**2 / (2 * asked), z * (p * (1 - p) / asked + z**2 / (4 * asked**2)) ** 0.5
    low, high = ((middle + sign * half) / (1 + z**2 / asked) for sign in (-1, 1))
    return f"{share(p)} ({100 * max(0.0, low):.1f} to {100 * high:.1f}%, {asked:.0f} prompts)"


def points(mean: float, half: float, pairs: int) -> str:
    return f"{100 * mean:+.1f} ± {100 * half:.1f} points, {pairs} cases"


def averaged(frame: pd.DataFrame, part: str) -> pd.DataFrame:
    """`score` of a part by layer, the mean over the categories, and `interval`, half of its 95% one."""
    parts = frame[frame["part"] == part].groupby("layer")
    return pd.DataFrame(
        {"score": parts["score"].mean(), "interval": parts["interval"].apply(lambda i: (i**2).sum() ** 0.5 / len(i))}
    )


def multihop(frame: pd.DataFrame) -> str:
    """Which metric of two hops and more the rows hold: behind worked examples (MQuAKE's chains), else cloze prompts."""
    return "multihop_cot" if (frame["metric"] == "multihop_cot").any() else "multihop_acc"


def per_case(frame: pd.DataFrame, metric: str, by: str) -> pd.DataFrame:
    """Values of `after` per case, one column per value of `by`; of a curve its last step."""
    case, chosen = ["data", "seed", "case"], frame[frame["metric"] == metric]
    chosen = chosen[chosen["step"] == chosen.groupby([by, *case])["step"].transform("max")]
    return chosen.pivot_table(index=case, columns=by, values="after", aggfunc="mean")


def ahead(metric: str, one: str, rivals: Sequence[str], by: str = "method") -> Decide:
    """`one` is above each of its rivals: against the best of them, on the cases that all were measured on; undecided while
    one of them is not measured."""

    def decide(frame: pd.DataFrame) -> Told:
        table = per_case(frame, metric, by)
        others = [name for name in rivals if name in table]
        if one not in table or not others:
            return NOT_MEASURED
        table = table[[one, *others]].dropna()
        means = table.mean().sort_values(ascending=False)
        rival = means.drop(one).index[0]
        mean, half, pairs = difference(table[one], table[rival])
        told = ", ".join(f"{name} {share(value, metric)}" for name, value in means.items())
        missing = [name for name in rivals if name not in others]
        told = f"{told} ({one} − {rival} {points(mean, half, pairs)})"
        return (f"{told}; not measured: {', '.join(missing)}", OPEN) if missing else (told, decided(mean, half))

    return decide


def best(metrics: Sequence[str], one: str, by: str) -> Decide:
    """`one` is above all others that were measured, by each metric."""

    def decide(frame: pd.DataFrame) -> Told:
        rivals = sorted(set(frame[by].dropna()) - {one})
        told = {metric: ahead(metric, one, rivals, by)(frame) for metric in metrics}
        if NOT_MEASURED in told.values():
            return NOT_MEASURED
        return "; ".join(f"{metric} {words}" for metric, (words, _) in told.items()), together([v for _, v in told.values()])

    return decide


def beats(metric: str, one: str | float, other: str | float, by: str = "method") -> Decide:
    """`one` is above `other`."""
    return compared((metric,), one, other, by)


def compared(
    metrics: Sequence[str], one: str | float, other: str | float, by: str = "method", within: float | None = None
) -> Decide:
    """`one` is above `other` by each metric; or (`within`) no further from it than this, fluency in shares of its own."""

    def decide(frame: pd.DataFrame) -> Told:
        lines, verdicts = [], []
        for metric in metrics:
            table = per_case(frame, metric, by)
            if not {one, other} <= set(table):
                return NOT_MEASURED
            mean, half, pairs = difference(table[one], table[other])
            both = table[[one, other]].dropna().mean()
            name = f"{metric}: " if len(metrics) > 1 else ""
            lines.append(
                f"{name}{one} {share(both[one], metric)}, {other} {share(both[other], metric)}: {points(mean, half, pairs)}"
            )
            limit = (within or 0) * (both[other] if metric == "fluency" else 1)
            verdicts.append(decided(mean if within is None else limit - abs(mean), half))
        return "; ".join(lines), together(verdicts)

    return decide


def reaches(metric: str, one: str, least: float, by: str = "method") -> Decide:
    """The mean of `one` is at least this."""

    def decide(frame: pd.DataFrame) -> Told:
        table = per_case(frame, metric, by)
        if one not in table:
            return NOT_MEASURED
        values = table[one].dropna()
        mean, half = float(values.mean()), interval(values)
        return f"{share(mean, metric)} ± {100 * half:.1f}, {len(values)} cases", decided(mean - least, half)

    return decide


def curve(column: str, *parts: tuple[str, float | None, float | None, bool]) -> Decide:
    """Along what is varied, each (metric, from, to, rises) goes up, or down; None: the first value, the last one."""

    def decide(frame: pd.DataFrame) -> Told:
        lines, verdicts = [], []
        for metric, start, end, rises in parts:
            table = per_case(frame, metric, column)
            if table.shape[1] < 2:
                return NOT_MEASURED
            a, b = table.columns[0] if start is None else start, table.columns[-1] if end is None else end
            if not {a, b} <= set(table):
                return NOT_MEASURED
            mean, half, pairs = difference(table[b], table[a])
            values = ", ".join(f"{k:g}: {share(v, metric)}" for k, v in table.mean().items())
            lines.append(f"{metric} {values} ({a:g} to {b:g}: {points(mean, half, pairs)})")
            verdicts.append(decided(mean if rises else -mean, half))
        return "; ".join(lines), together(verdicts)

    return decide


def groups(metrics: Sequence[str], inside: Collection[str], by: str = "parameters") -> Decide:
    """Values of `by` in `inside` give more than all others, by each metric."""

    def decide(frame: pd.DataFrame) -> Told:
        lines, verdicts = [], []
        for metric in metrics:
            table = per_case(frame, metric, by)
            mine = [name for name in table if name in inside]
            if not mine or len(mine) == table.shape[1]:
                return NOT_MEASURED
            mean, half, pairs = difference(table[mine].mean(axis=1), table.drop(columns=mine).mean(axis=1))
            told = ", ".join(f"{name} {share(value, metric)}" for name, value in table.mean().items())
            lines.append(f"{metric} {told} ({' and '.join(mine)} − others {points(mean, half, pairs)})")
            verdicts.append(decided(mean, half))
        return "; ".join(lines), together(verdicts)

    return decide
