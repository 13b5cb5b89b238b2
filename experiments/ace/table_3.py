"""ACE, Table 3: efficacy, paraphrase and specificity of single edits; both readings (_acc,
_success) and generation.

    qv-lens run experiments/ace/table_3.py

On a real model: --model NAME --set data=FILE --set text=CORPUS (edits, and a text for C0).
"""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go

from experiments.ace import RELEASED, RIVALS
from experiments.compare import MEASURES, VERSION, Task, rows
from experiments.compare import figure as bars
from experiments.decide import Claim, ahead, beats
from experiments.models import STUDIED

__all__ = ["CLAIMS", "GRID", "MEASURES", "RESULTS", "SETTINGS", "VERSION", "Task", "figure", "rows"]

SETTINGS = {
    "data": "facts",
    "count": 34,
    "metrics": [
        "efficacy_acc",
        "efficacy_success",
        "efficacy_gen",
        "paraphrase_acc",
        "paraphrase_success",
        "specificity_acc",
        "specificity_success",
    ],
}
GRID = {
    "model": STUDIED,
    "seed": [0, 1, 2],
    "method": ["FT", "ROME", "MEMIT", "PMET", "ACE"],
}
RESULTS = "single"
RELEASE = f"its prompts are not released; {RELEASED}"


def figure(frame: pd.DataFrame) -> go.Figure:
    """Bars by what was varied."""
    return bars(frame, ("model", "method"), "Single edits (ACE, Table 3)")


CLAIMS = (
    Claim(
        source="ACE, Table 3",
        words="efficacy: ACE 99.8 / 99.4, PMET 81.6 / 75.6",
        statistic="against the best of FT, ROME, MEMIT, PMET, argmax at each token",
        decide=ahead("efficacy_acc", "ACE", RIVALS),
        release=RELEASE,
    ),
    Claim(
        source="ACE, Table 3",
        words="paraphrase: ACE 91.2 / 94.2, PMET 65.8 / 68.9",
        statistic="the same",
        decide=ahead("paraphrase_acc", "ACE", RIVALS),
        release=RELEASE,
    ),
    Claim(
        source="ACE, Table 3",
        words="specificity: ACE 79.2 / 81.8, PMET 74.6 / 64.4",
        statistic="difference per case",
        decide=beats("specificity_acc", "ACE", "PMET"),
        release=f"{RELEASE}; FT (83.8, GPT-J) is ahead of both there",
    ),
)
