"""CTP, the size of T-; one batch of 100 facts.

    qv-lens run experiments/ctp/t_minus.py

On a real model: --model NAME --set data=FILE --set text=CORPUS (edits, and a text for C0).
"""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go

from experiments.compare import MEASURES, VERSION, Task, rows
from experiments.compare import figure as bars
from experiments.ctp import ONE_BATCH
from experiments.decide import Claim, curve
from experiments.models import STUDIED

__all__ = ["CLAIMS", "GRID", "MEASURES", "RESULTS", "SETTINGS", "VERSION", "Task", "figure", "rows"]

SETTINGS = {"method": "CTP", **ONE_BATCH}
GRID = {
    "model": STUDIED,
    "editor.bottom": [0, 1, 5, 15],
}
RESULTS = "ctp_tminus"


def figure(frame: pd.DataFrame) -> go.Figure:
    """Bars by what was varied."""
    return bars(frame, ("model", "bottom"), "The size of T- (CTP)")


CLAIMS = (
    Claim(
        source="CTP, section 4.5",
        words="too large a T- lowers efficacy and generality",
        statistic="one node to fifteen",
        decide=curve("bottom", ("edit_success", 1, 15, False), ("generality", 1, 15, False)),
        release="one batch; measured twice, rounding alone moved a mean of toy-gptj by 19 points",
    ),
)
