"""KNE, Figure B.5: facts edited and located together, by batch size.

    qv-lens run experiments/kne/figure_b5.py

On a real model: --model NAME --set data=FILE --set text=CORPUS (edits, and a text for C0).
"""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go

from experiments.compare import MEASURES, VERSION, Task, rows
from experiments.compare import figure as bars
from experiments.decide import Claim, curve
from experiments.kne import METRICS
from experiments.models import STUDIED

__all__ = ["CLAIMS", "GRID", "MEASURES", "RESULTS", "SETTINGS", "VERSION", "Task", "figure", "rows"]

SETTINGS = {
    "method": "KNE",
    "protocol": "batch",
    "count": 100,
    "metrics": METRICS,
}
GRID = {
    "model": STUDIED,
    "batch_size": [1, 5, 20, 100],
}
RESULTS = "kne_figureB5"


def figure(frame: pd.DataFrame) -> go.Figure:
    """Bars by what was varied."""
    return bars(
        frame, ("model", "batch_size"), "Facts edited and located together (KNE, Figure B.5)"
    )


CLAIMS = (
    Claim(
        source="KNE, Figure B.5",
        words="larger batches: edit success and portability fall, locality rises at first",
        statistic="edit success and portability from batches of 1 to 100, locality from 1 to 5",
        decide=curve(
            "batch_size",
            ("edit_success", 1, 100, False),
            ("portability", 1, 100, False),
            ("locality", 1, 5, True),
        ),
    ),
    Claim(
        source="KNE, section 4.6",
        words="larger batches: fluency rises",
        statistic="batches of 1 to 100, n-gram entropy times 100",
        decide=curve("batch_size", ("fluency", 1, 100, True)),
    ),
)
