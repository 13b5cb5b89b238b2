"""ACE, Figure 5: what whole FFN and attention layers add to the answer, layer by layer. Appendix E.

    qv-lens run experiments/ace/figure_5.py
    qv-lens run experiments/ace/figure_5.py --model EleutherAI/gpt-j-6B \\
        --set facts=MQuAKE-CF-3k-v2.json

The rows are those of Table 1.
"""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go

from experiments.ace import BY_EFFECT
from experiments.ace.table_1 import GRID, MEASURES, SETTINGS, Task, rows
from experiments.decide import FAILS, HOLDS, Claim, Estimate, Verdict, averaged, decided, read_as
from qv_lens.plots import VECTORS, layer_lines

__all__ = ["CLAIMS", "GRID", "MEASURES", "RESULTS", "SETTINGS", "Task", "figure", "rows"]

RESULTS = "ace_table1"


def figure(frame: pd.DataFrame) -> go.Figure:
    """A line per kind of layer."""
    return layer_lines(frame, "What whole layers add to the answer (ACE, Figure 5)")


def attention_first(frame: pd.DataFrame) -> Verdict:
    """By the layers' whole outputs, as Figure 5 is drawn."""
    scores = frame[frame["part"].isin(VECTORS)].groupby(["part", "layer"])["score"].mean()
    scores = scores.rename({part: part.removesuffix("_vector") for part in VECTORS}, level="part")
    peaks = {part: int(scores[part].idxmax()) for part in ("attn", "ffn")}
    falls = {
        part: max(int(layer) for layer, v in scores[part].items() if v >= 0.5 * scores[part].max())
        for part in peaks
    }
    told = "; ".join(
        f"{part}'s last layer above half its peak: {falls[part]} (peak {peaks[part]})"
        for part in peaks
    )
    return told, HOLDS if falls["attn"] < falls["ffn"] else FAILS


def last_layers_low(frame: pd.DataFrame) -> Verdict:
    scores = averaged(frame, "ffn_vector")
    last, peak = scores.iloc[-1], scores.loc[scores["score"].idxmax()]
    told = (
        f"last FFN layer {last['score']:.2f} ± {last['interval']:.2f} nats, the largest (layer "
        f"{peak.name:.0f}) {peak['score']:.2f} ± {peak['interval']:.2f}"
    )
    if last.name == peak.name:  # one number, not two
        return told, decided(Estimate.around(-last["score"] / 2, last["interval"] / 2))
    half = (last["interval"] ** 2 + (peak["interval"] / 2) ** 2) ** 0.5
    return told, decided(Estimate.around(peak["score"] / 2 - last["score"], half))


CLAIMS = (
    Claim(
        source="ACE, Appendix E",
        words="attention's increase falls (layer 25) before FFN's (27)",
        statistic="last layer above half the peak",
        decide=attention_first,
    ),
    Claim(
        source="ACE, Appendix E",
        words=f"the same, {BY_EFFECT}",
        statistic="the same, the sum of a layer's effects",
        decide=read_as(
            "part", {"ffn_effect": "ffn_vector", "attn_effect": "attn_vector"}, attention_first
        ),
    ),
    Claim(
        source="ACE, Appendix E",
        words="the final layers hold little",
        statistic="FFN importance of the last layer against the peak, below half",
        decide=last_layers_low,
    ),
    Claim(
        source="ACE, Appendix E",
        words=f"the same, {BY_EFFECT}",
        statistic="the same, the sum of a layer's effects",
        decide=read_as("part", {"ffn_effect": "ffn_vector"}, last_layers_low),
    ),
)
