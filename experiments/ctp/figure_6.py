"""CTP, Figure 6: lambda, the weight of the contrastive loss; one batch of 100 facts.

    qv-lens run experiments/ctp/figure_6.py

On a real model: --model NAME --set data=FILE --set text=CORPUS (edits, and a text for C0).
"""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go

from experiments.compare import MEASURES, VERSION, Task, rows
from experiments.compare import figure as bars
from experiments.ctp import ONE_BATCH
from experiments.decide import Claim, beats, compared, curve
from experiments.models import STUDIED

__all__ = ["CLAIMS", "GRID", "MEASURES", "SETTINGS", "VERSION", "Task", "figure", "rows"]

SETTINGS = {"method": "CTP", **ONE_BATCH}
GRID = {
    "model": STUDIED,
    "editor.lam": [0.0, 0.01, 0.1, 0.5, 1.0],
}
#: what lambda = 0 changes besides
SKIPPED = "lambda = 0 skips step B, and with it a step of momentum"


def figure(frame: pd.DataFrame) -> go.Figure:
    """Bars by what was varied."""
    return bars(frame, ("model", "lam"), "Weight of the contrastive loss (CTP, Figure 6)")


CLAIMS = (
    Claim(
        source="CTP, Figure 6",
        words="a larger lambda lowers efficacy",
        statistic="lambda 0.1 to 1",
        decide=curve("lam", ("edit_success", 0.1, 1.0, False)),
        release="Adam divides lambda's scale out of step B",
    ),
    Claim(
        source="CTP, section 4.5",
        words="contrastive rectification raises efficacy by about 4%",
        statistic="lambda 0.1 against 0, difference per case",
        decide=beats("edit_success", 0.1, 0.0, "lam"),
        release=SKIPPED,
    ),
    Claim(
        source="CTP, section 4.5",
        words="and leaves generality and locality stable",
        statistic="the same; within 5 points",
        decide=compared(("generality", "ctp_locality"), 0.1, 0.0, "lam", 0.05),
        release=SKIPPED,
    ),
)
