"""KNE, Figure B.3: 100 facts edited together, the ensemble located on some of them or on all (the
paper: 200 of about 800).

    qv-lens run experiments/kne/figure_b3.py
    qv-lens run experiments/kne/figure_b3.py --model EleutherAI/gpt-j-6B \\
        --set data=MQuAKE-CF-3k-v2.json --set count=800 --set batch_size=800 \\
        --set 'editor.located=[200, 800]'

MQuAKE-CF-3k-v2.json is the release's file.
"""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
import plotly.graph_objects as go

from experiments.compare import MEASURES, VERSION, Task, rows
from experiments.compare import figure as bars
from experiments.decide import Claim, Decide, Verdict, compared
from experiments.kne import METRICS
from experiments.models import STUDIED

__all__ = ["CLAIMS", "GRID", "MEASURES", "RESULTS", "SETTINGS", "VERSION", "Task", "figure", "rows"]

SETTINGS = {
    "method": "KNE",
    "protocol": "batch",
    "count": 100,
    "batch_size": 100,
    "metrics": METRICS,
}
GRID = {
    "model": STUDIED,
    "editor.located": [10, 25, 50, 100],
}
RESULTS = "kne_figureB3"


def figure(frame: pd.DataFrame) -> go.Figure:
    """Bars by what was varied."""
    return bars(
        frame, ("model", "located"), "Facts that the ensemble is located on (KNE, Figure B.3)"
    )


def quarter(metrics: Sequence[str], within: float | None = None) -> Decide:
    """An ensemble located on a quarter of the facts against one located on all: better by each
    metric, or no further from it than `within`."""

    def decide(frame: pd.DataFrame) -> Verdict:
        every = frame["count"].max()
        rows = frame[frame["count"] == every]
        return compared(metrics, round(every / 4), every, "located", within)(rows)

    return decide


CLAIMS = (
    Claim(
        source="KNE, Figure B.3",
        words="located on a quarter of the facts: better locality than located on all",
        statistic="all facts in one batch, located on a quarter of them against all",
        decide=quarter(("locality",)),
    ),
    Claim(
        source="KNE, section 4.4",
        words="edit success, portability and fluency then differ little",
        statistic="the same; within 5 points (fluency: within 5% of itself)",
        decide=quarter(("edit_success", "portability", "fluency"), 0.05),
    ),
    Claim(
        source="KNE, section 4.4",
        words=(
            "located on 200 to 300 of 800 facts edit success and portability are superior to 700 to "
            "800"
        ),
        statistic="located on a quarter of the facts against all",
        decide=quarter(("edit_success", "portability")),
    ),
)
