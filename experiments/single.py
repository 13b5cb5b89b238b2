"""Editors on a real model: CounterFact facts that it knows, one edit at a time, by probability and
by what is generated.

    qv-lens run experiments/single.py --set data=counterfact-edit.json    # hours on 2 cores; stop and resume
    qv-lens run experiments/single.py --set data=counterfact-edit.json --set count=50 \\
        --model MODEL    # after qv-lens tune MODEL

Settings: qv-lens tune smollm2-135m, on facts of the atlas. C0: 10 tokens for each neuron of a
layer, of Python's own reference. z* is searched once for editors that share it; the seconds count
it in full. """

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go

from experiments.compare import MEASURES, VERSION, Task, rows, table
from qv_lens.plots import method_dots

__all__ = ["GRID", "MEASURES", "RESULTS", "SETTINGS", "VERSION", "Task", "figure", "rows"]

SETTINGS = {
    "protocol": "single",
    "known": True,
    "count": 100,
    "metrics": [
        "efficacy_acc",
        "efficacy_success",
        "efficacy_gen",
        "paraphrase_acc",
        "paraphrase_success",
        "paraphrase_gen",
        "specificity_acc",
        "specificity_success",
        "specificity_gen",
    ],
}
GRID = {
    "model": ["smollm2-135m"],
    "method": [
        "MEMIT",
        "RECT",
        "AlphaEdit",
        "EMMET",
        "PRUNE",
        "ENCORE",
        "ROME",
        "RROME",
        "PMET",
        "FT",
        "FTL",
        "ACE",
        "CTP",
        "KNE",
        "LoRA",
        "AdaLoRA",
        "KN",
        "IFMET",
        "ACE.official",
        "ACE.paper",
        "UltraEdit",
        "SPHERE",
        "BetaEdit",
        "NSE",
        "LocFT",
    ],
}
RESULTS = "single"
#: what the figure shows, in words: what the model says
SAID = {
    "efficacy_gen": "says the new answer",
    "paraphrase_gen": "also in other words",
    "specificity_gen": "neighbours right",
}


def figure(frame: pd.DataFrame) -> go.Figure:
    """What the model says after an edit of a fact that it knew, editor by editor."""
    frame = frame[frame["known"]]
    means = table(frame, ("method",))
    shares = means[means["metric"].isin(SAID)].replace({"metric": SAID})
    cases = frame.groupby("method")["case"].nunique().max()
    return method_dots(shares, f"What it says after an edit ({cases} facts, one at a time)")
