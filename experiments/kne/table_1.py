"""KNE, Tables 1 and 2: edit success, portability, locality and fluency by method and model.

    qv-lens run experiments/kne/table_1.py

On a real model: --model NAME --set data=FILE --set text=CORPUS (edits, and a text for C0).
"""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go

from experiments.compare import MEASURES, VERSION, Task, rows
from experiments.compare import figure as bars
from experiments.decide import (
    NOT_MEASURED,
    Claim,
    Decide,
    Verdict,
    ahead,
    per_case,
    reaches,
    share,
)
from experiments.kne import METRICS
from experiments.models import STUDIED

__all__ = ["CLAIMS", "GRID", "MEASURES", "RESULTS", "SETTINGS", "VERSION", "Task", "figure", "rows"]

SETTINGS = {
    "data": "facts",
    "count": 34,
    "metrics": METRICS,
}
GRID = {
    "model": STUDIED,
    "seed": [0, 1, 2],
    "method": ["FT", "FTL", "AdaLoRA", "ROME", "MEMIT", "KNE"],
}
RESULTS = "single"
#: the editors that KNE is compared with
RIVALS = ("FT", "FTL", "AdaLoRA", "ROME", "MEMIT")


def figure(frame: pd.DataFrame) -> go.Figure:
    """Bars by what was varied."""
    return bars(frame, ("model", "method"), "Single edits (KNE, Tables 1 and 2)")


#: whose edit success the numbers are
EASYEDIT = (
    "its text counts paraphrases as edit success too (Appendix A.4); EasyEdit's code, from which its "
    "numbers come, does not"
)


def as_written(decide: Decide, *editors: str) -> Decide:
    """The decision, and beside it the mean of the fact and its paraphrases with these editors."""

    def both(frame: pd.DataFrame) -> Verdict:
        statistic, verdict = decide(frame)
        if (statistic, verdict) == NOT_MEASURED:
            return NOT_MEASURED
        parts = [per_case(frame, name, "method") for name in ("edit_success", "generality")]
        means = ((parts[0] + parts[1]) / 2).mean().dropna()
        named = ", ".join(f"{name} {share(means[name])}" for name in editors if name in means)
        return (f"{statistic}; with paraphrases: {named}" if named else statistic), verdict

    return both


CLAIMS = (
    Claim(
        source="KNE, Table 1",
        words="KNE has the best edit success (99.02 on wiki counterfact)",
        statistic="against the best of FT, FT-L, AdaLoRA, ROME, MEMIT",
        decide=as_written(ahead("edit_success", "KNE", RIVALS), "KNE", *RIVALS),
        release=EASYEDIT,
    ),
    Claim(
        source="KNE, Table 1",
        words="KNE's portability is above ROME's and MEMIT's",
        statistic="against the better of them",
        decide=ahead("portability", "KNE", ("ROME", "MEMIT")),
    ),
    Claim(
        source="KNE, Table 1",
        words="KNE has the best locality on ZsRE (76.85)",
        statistic="against the best of the five",
        decide=ahead("locality", "KNE", RIVALS),
        release="third on wiki counterfact, fifth on wiki recent",
    ),
    Claim(
        source="KNE, Table 1",
        words="KNE has the best fluency",
        statistic="n-gram entropy times 100, against the best of the five",
        decide=ahead("fluency", "KNE", RIVALS),
    ),
    Claim(
        source="KNE, Table 2",
        words="edit success is 97.75 to 99.90 on every model and dataset",
        statistic="mean of single edits, at least 97%",
        decide=as_written(reaches("edit_success", "KNE", 0.97), "KNE"),
        release=EASYEDIT,
    ),
)
