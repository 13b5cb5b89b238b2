"""KNE, Figure B.4: how many parameters are trained.

    qv-lens run experiments/kne/figure_b4.py

On a real model: --model NAME --set data=FILE --set text=CORPUS (edits, and a text for C0).
"""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go

from experiments.compare import MEASURES, VERSION, Task, by_setting, rows
from experiments.compare import figure as bars
from experiments.decide import Claim, curve
from experiments.kne import METRICS
from experiments.models import STUDIED

__all__ = ["CLAIMS", "GRID", "MEASURES", "RESULTS", "SETTINGS", "VERSION", "Task", "figure", "rows"]

SETTINGS = {
    "method": "KNE",
    "count": 34,
    "metrics": METRICS,
}
GRID = {
    "model": STUDIED,
    "seed": [0, 1, 2],
    "editor.share": [0.001, 0.005, 0.02, 0.1, 0.5],
}
RESULTS = "kne_figureB4"


def figure(frame: pd.DataFrame) -> go.Figure:
    """Bars by what was varied."""
    by_share, _ = by_setting(frame)
    by_share = by_share.sort_values("share", kind="stable")
    return bars(by_share, ("model", "share"), "How many parameters are trained (KNE, Figure B.4)")


CLAIMS = (
    Claim(
        source="KNE, Figure B.4",
        words="more parameters: better edit success and portability, worse locality",
        statistic="smallest against largest share",
        decide=curve(
            "share",
            ("edit_success", None, None, True),
            ("portability", None, None, True),
            ("locality", None, None, False),
            of=GRID["editor.share"],
        ),
    ),
)
