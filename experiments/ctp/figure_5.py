"""CTP, Figure 5: the size of T+; one batch of 100 facts. The paper's 0 is the column `before`; its
* is all nodes of a layer but the one of T-: --set 'editor.top=[511]' of toy-gptj, 383 of toy-qwen3,
16383 of GPT-J-6B.

    qv-lens run experiments/ctp/figure_5.py

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

__all__ = ["CLAIMS", "GRID", "MEASURES", "MORE", "SETTINGS", "VERSION", "Task", "figure", "rows"]

SETTINGS = {"method": "CTP", **ONE_BATCH}
GRID = {
    "model": STUDIED,
    "editor.top": [1, 5, 15, 50, 150],
}
#: the * of the figure: all nodes of a layer but the one of T-
MORE = {
    "toy-gptj": {"editor.top": [511]},
    "toy-qwen3": {"editor.top": [383]},
    "smollm2-135m": {"editor.top": [1535]},
    "qwen2.5-coder-0.5b": {"editor.top": [4863]},
    "EleutherAI/gpt-j-6B": {"editor.top": [16383]},
}


def figure(frame: pd.DataFrame) -> go.Figure:
    """Bars by what was varied."""
    return bars(frame, ("model", "top"), "The size of T+ (CTP, Figure 5)")


CLAIMS = (
    Claim(
        source="CTP, Figure 5",
        words="larger T+: efficacy and generality rise",
        statistic="smallest against largest",
        decide=curve(
            "top",
            ("edit_success", None, None, True),
            ("generality", None, None, True),
            of=GRID["editor.top"],
        ),
    ),
    Claim(
        source="CTP, Figure 5",
        words="beyond 15 nodes of T+ locality declines sharply",
        statistic=(
            "15 against the largest; neighbours and KnowEdit's locality, against the unedited model"
        ),
        decide=curve("top", ("ctp_locality", 15, None, False), of=GRID["editor.top"]),
    ),
)
