"""CTP, Table 1: one batch of facts; efficacy (edit_success), generality, locality and their
mean (ctp_score). Full-C: FTL.

    qv-lens run experiments/ctp/table_1.py

On a real model: --model NAME --set data=FILE --set text=CORPUS (edits, and a text for C0).
"""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go

from experiments.compare import MEASURES, VERSION, Task, rows
from experiments.compare import figure as bars
from experiments.ctp import ONE_BATCH
from experiments.decide import Claim, ahead
from experiments.models import STUDIED

__all__ = ["CLAIMS", "GRID", "MEASURES", "SETTINGS", "VERSION", "Task", "figure", "rows"]

RIVALS = ("FTL", "ROME", "MEMIT", "PRUNE", "RECT", "AlphaEdit")
SETTINGS = ONE_BATCH
GRID = {
    "model": STUDIED,
    "method": [*RIVALS, "CTP"],
}


def figure(frame: pd.DataFrame) -> go.Figure:
    """Bars by what was varied."""
    return bars(frame, ("model", "method"), "One batch of facts (CTP, Table 1)")


CLAIMS = (
    Claim(
        source="CTP, Table 1",
        words="batches of 100 on ZsRE: CTP has the best score (85.66, AlphaEdit 74.69)",
        statistic="mean of efficacy, generality, locality; against the best of six",
        decide=ahead("ctp_score", "CTP", RIVALS),
        release=(
            "on CounterFact it is the lowest there (43.00, "
            "AlphaEdit 90.54); baselines are from AlphaEdit's paper, with other metrics"
        ),
    ),
)
