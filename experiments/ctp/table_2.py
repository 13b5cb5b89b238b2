"""CTP, Table 2: facts edited one after another, all asked at the end. Full-C: FTL.

    qv-lens run experiments/ctp/table_2.py

On a real model: --model NAME --set data=FILE --set text=CORPUS (edits, and a text for C0).
"""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go

from experiments.compare import MEASURES, VERSION, Task, rows
from experiments.compare import figure as bars
from experiments.ctp import METRICS
from experiments.decide import (
    NOT_MEASURED,
    Claim,
    Estimate,
    Verdict,
    ahead,
    decided,
    lacking,
    per_case,
    share,
    together,
    unless,
)
from experiments.models import STUDIED

__all__ = ["CLAIMS", "GRID", "MEASURES", "RESULTS", "SETTINGS", "VERSION", "Task", "figure", "rows"]

RIVALS = ("FTL", "ROME", "KN", "MEMIT", "PMET", "AlphaEdit", "LoRA", "EMMET", "RROME")
SETTINGS = {
    "protocol": "consecutive",
    "count": 100,
    "metrics": METRICS,
}
GRID = {
    "model": STUDIED,
    "method": [*RIVALS, "CTP"],
}
RESULTS = "consecutive"
#: editors that consecutive edits ruin
RUINED = ("MEMIT", "PMET", "AlphaEdit")


def figure(frame: pd.DataFrame) -> go.Figure:
    """Bars by what was varied."""
    return bars(frame, ("model", "method"), "Facts edited one after another (CTP, Table 2)")


def all_fall(frame: pd.DataFrame) -> Verdict:
    """After all edits of a row MEMIT, PMET and AlphaEdit have less than a tenth of the score."""
    table = per_case(frame, "ctp_score", "method")
    if not {*RUINED, "CTP"} <= set(table):
        return NOT_MEASURED
    table = table[["CTP", *RUINED]]
    statistic = ", ".join(f"{name} {share(mean)}" for name, mean in table.mean().items())
    verdicts = [decided((-Estimate.of(table[name])).shifted(0.1)) for name in RUINED]
    return unless(f"{statistic} ({len(table)} edits)", together(verdicts), lacking(table))


CLAIMS = (
    Claim(
        source="CTP, Table 2",
        words="consecutive edits (3,000) on ZsRE: CTP has the best score (63.17, EMMET 48.12)",
        statistic="all asked after the last edit; against the best of nine",
        decide=ahead("ctp_score", "CTP", RIVALS),
        release=(
            "on CounterFact with GPT-J R-ROME (49.51) and EMMET (48.13) are ahead of it there "
            "(32.62); CTP goes over a batch 12 times and its baselines over a fact once; a fact alone "
            "has its paths found once here"
        ),
    ),
    Claim(
        source="CTP, section 4.2",
        words="consecutive edits ruin other editors, some down to 0 (MEMIT, PMET, AlphaEdit)",
        statistic="all asked after the last edit; their score below a tenth",
        decide=all_fall,
        release="3,000 edits there",
    ),
)
