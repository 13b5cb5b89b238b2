"""ACE, Figure 6: importance of attention heads.

    qv-lens run experiments/ace/figure_6.py
    qv-lens run experiments/ace/figure_6.py --model EleutherAI/gpt-j-6B \\
        --set facts=MQuAKE-CF-3k-v2.json

The rows are those of Table 1. The paper claims nothing of them that could be put as a number.
"""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go

from experiments.ace.table_1 import GRID, MEASURES, SETTINGS, Task, rows
from qv_lens.plots import head_heatmap

__all__ = ["GRID", "MEASURES", "RESULTS", "SETTINGS", "Task", "figure", "rows"]

RESULTS = "ace_table1"


def figure(frame: pd.DataFrame) -> go.Figure:
    """Heads down, layers across."""
    return head_heatmap(
        frame[frame["part"] == "head"], "Attention heads, all categories (ACE, Figure 6)"
    )
