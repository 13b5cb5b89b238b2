"""KNE, Figure 2: which kind of parameters the ensemble is taken from.

    qv-lens run experiments/kne/figure_2.py

On a real model: --model NAME --set data=FILE --set text=CORPUS (edits, and a text for C0).
"""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go

from experiments.compare import MEASURES, VERSION, Task, rows
from experiments.compare import figure as bars
from experiments.decide import Claim, best, groups
from experiments.kne import METRICS
from experiments.models import STUDIED

__all__ = ["CLAIMS", "GRID", "MEASURES", "MORE", "SETTINGS", "VERSION", "Task", "figure", "rows"]

SETTINGS = {
    "method": "KNE",
    "count": 34,
    "metrics": METRICS,
}
GRID = {
    "model": STUDIED,
    "seed": [0, 1, 2],
    "editor.parameters": [["W_out"], ["W_in"], ["W_O"], ["W_Q"], ["W_K"], ["W_V"]],
}
#: what a gated FFN has besides
MORE = {
    "toy-qwen3": {"editor.parameters": [["W_gate"]]},
    "smollm2-135m": {"editor.parameters": [["W_gate"]]},
    "qwen2.5-coder-0.5b": {"editor.parameters": [["W_gate"]]},
    "Qwen/Qwen3-8B": {"editor.parameters": [["W_gate"]]},
}
MAPPING = ("['W_in']", "['W_gate']", "['W_Q']")
FFN = ("['W_in']", "['W_gate']", "['W_out']")
#: what every model has
MODULES = tuple(map(str, GRID["editor.parameters"]))


def figure(frame: pd.DataFrame) -> go.Figure:
    """Bars by what was varied."""
    return bars(
        frame,
        ("model", "parameters"),
        "Which parameters the ensemble is taken from (KNE, Figure 2)",
    )


CLAIMS = (
    Claim(
        source="KNE, Figure 2",
        words="FFN parameters give better edit success and portability than attention's",
        statistic=(
            "mean over W_in, W_out and (where the FFN is gated) W_gate, minus that over W_Q, W_K, "
            "W_V, W_O"
        ),
        decide=groups(("edit_success", "portability"), FFN, "parameters", MODULES),
    ),
    Claim(
        source="KNE, section 4.3",
        words="W_out is the best of all modules",
        statistic="edit success and portability, each against the best of the others",
        decide=best(("edit_success", "portability"), "['W_out']", "parameters", MODULES),
    ),
    Claim(
        source="KNE, section 4.3",
        words="mapping layers (gate, up, queries) give better locality than the others",
        statistic=(
            "mean over W_in, W_Q and (where the FFN is gated) W_gate, minus that over W_out, W_K, "
            "W_V, W_O"
        ),
        decide=groups(("locality",), MAPPING, "parameters", MODULES),
    ),
    Claim(
        source="KNE, section 4.3",
        words="and better fluency",
        statistic="the same, n-gram entropy times 100",
        decide=groups(("fluency",), MAPPING, "parameters", MODULES),
    ),
)
