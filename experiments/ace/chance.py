"""Does attribution choose better layers than chance? ACE at the layers that it locates, at the
value layers alone, at the query layers alone, at random layers of the same number (ten draws) and
at all layers; single edits.

    qv-lens run experiments/ace/chance.py    # about 25 minutes on 2 cores

On a real model: --model NAME --set data=FILE --set text=CORPUS (edits, and a text for C0).
"""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go

from experiments.compare import MEASURES, VERSION, Task, rows
from experiments.compare import figure as bars
from experiments.decide import NOT_MEASURED, Claim, Verdict, per_case, share, verdict_of
from experiments.models import STUDIED

__all__ = ["CLAIMS", "GRID", "MEASURES", "RESULTS", "SETTINGS", "VERSION", "Task", "figure", "rows"]

SETTINGS = {
    "method": "ACE",
    "data": "facts",
    "protocol": "single",
    "count": 34,
    "metrics": ["efficacy_acc", "paraphrase_acc", "specificity_acc", "portability", "multihop_acc"],
}
GRID = {
    "model": STUDIED,
    "seed": [0, 1, 2],
    "layers": [
        "located",
        "value",
        "query",
        "all",
        "random 0",
        "random 1",
        "random 2",
        "random 3",
        "random 4",
        "random 5",
        "random 6",
        "random 7",
        "random 8",
        "random 9",
    ],
}
RESULTS = "layers"


def figure(frame: pd.DataFrame) -> go.Figure:
    """Bars by what was varied."""
    return bars(frame, ("model", "layers"), "ACE at layers located, of one kind, all, at random")


def better_than_chance(frame: pd.DataFrame) -> Verdict:
    """Located layers among the random draws of their own seed; p over all seeds' draws together."""
    table = per_case(frame, "efficacy_acc", "layers")
    seeds = table.groupby("seed").mean()
    drawn = seeds[[name for name in seeds if str(name).startswith("random")]]
    if "located" not in seeds or drawn.empty:
        return NOT_MEASURED
    better, draws = int(drawn.ge(seeds["located"], axis=0).to_numpy().sum()), drawn.size
    p = (1 + better) / (1 + draws)
    named = ", ".join(
        f"{name} {share(table[name].mean())}"
        for name in ("located", "value", "query", "all")
        if name in table
    )
    statistic = (
        f"{named}, random {share(drawn.to_numpy().mean())} (from {share(drawn.to_numpy().min())} to "
        f"{share(drawn.to_numpy().max())})"
    )
    verdict = verdict_of(p < 0.05, p > 0.5)
    return (
        f"{statistic}; {better} of {draws} draws are as good or better, p = {p:.2f} ({len(table)} "
        "cases)",
        verdict,
    )


CLAIMS = (
    Claim(
        source="ours",
        words="attribution chooses better layers than chance",
        statistic=(
            "efficacy of ACE at located layers among random layers of the same number, ten draws "
            "per seed"
        ),
        decide=better_than_chance,
    ),
)
