"""CTP, Figure 3: seconds per edit, each fact edited and timed alone (`batch_size = 1`: no search is
shared).

    qv-lens run experiments/ctp/figure_3.py

On a real model: --model NAME --set data=FILE --set text=CORPUS (edits, and a text for C0).
"""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go

from experiments.compare import MEASURES, VERSION, Task, rows, timed
from experiments.compare import figure as bars
from experiments.decide import NOT_MEASURED, Claim, Decide, Verdict, decided, difference, together
from experiments.models import STUDIED
from qv_lens.evaluation.intervals import UNBOUNDED

__all__ = ["CLAIMS", "GRID", "MEASURES", "SETTINGS", "VERSION", "Task", "figure", "rows"]

SETTINGS = {
    "count": 34,
    "batch_size": 1,
    "metrics": ["efficacy_acc"],
}
GRID = {
    "model": STUDIED,
    "seed": [0, 1, 2],
    "method": [
        "FT",
        "FTL",
        "ROME",
        "RROME",
        "KN",
        "MEMIT",
        "PMET",
        "AlphaEdit",
        "LoRA",
        "EMMET",
        "CTP",
    ],
}
#: editors that CTP is faster than
SLOWER = ("MEMIT", "PMET", "AlphaEdit")


def figure(frame: pd.DataFrame) -> go.Figure:
    """A box per method."""
    return bars(frame, ("model", "method"), "Seconds per edit (CTP, Figure 3)")


def seconds(method: str, others: tuple[str, ...], sign: int) -> Decide:
    """`method` takes less time than each of the others (sign 1), or more (-1)."""

    def decide(frame: pd.DataFrame) -> Verdict:
        alone = timed(frame)
        each = alone.groupby(["seed", "case", "method"], sort=False)["seconds"].first().unstack()
        if not {method, *others} <= set(each):
            return NOT_MEASURED
        statistic = "medians: " + ", ".join(
            f"{name} {value:.2f} s" for name, value in each.median().items()
        )
        gaps = {other: difference(each[other], each[method], UNBOUNDED) for other in others}
        statistic += "; " + ", ".join(
            f"{other} − {method} {gap.mean:+.2f} {gap.spread(digits=2)} s"
            for other, gap in gaps.items()
        )
        return statistic, together([decided(gap if sign > 0 else -gap) for gap in gaps.values()])

    return decide


CLAIMS = (
    Claim(
        source="CTP, Figure 3",
        words="CTP needs less time per edit than MEMIT, PMET and AlphaEdit",
        statistic="seconds per fact, single edits one by one (batch_size 1), 1 CPU thread",
        decide=seconds("CTP", SLOWER, 1),
    ),
    Claim(
        source="CTP, section 4.3",
        words="FT-C takes slightly longer than CTP",
        statistic="the same",
        decide=seconds("CTP", ("FTL",), 1),
    ),
    Claim(
        source="CTP, section 4.3",
        words="KN takes longest of all",
        statistic="the same",
        decide=seconds("KN", ("FT", "FTL", "ROME", "RROME", *SLOWER, "LoRA", "EMMET", "CTP"), -1),
    ),
)
