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
from experiments.decide import (
    OPEN,
    Claim,
    Verdict,
    averaged,
    decided,
    difference,
    half_the_largest_less_the_last,
    read_as,
)
from qv_lens.evaluation.intervals import UNBOUNDED
from qv_lens.plots import layer_lines
from qv_lens.plots.attribution import VECTORS

__all__ = ["CLAIMS", "GRID", "MEASURES", "RESULTS", "SETTINGS", "Task", "figure", "rows"]

RESULTS = "ace_table1"


def figure(frame: pd.DataFrame) -> go.Figure:
    """A line per kind of layer."""
    return layer_lines(frame, "What whole layers add to the answer (ACE, Figure 5)")


def attention_first(frame: pd.DataFrame) -> Verdict:
    """By the layers' whole outputs, as Figure 5 is drawn: how many layers attention's last one above
    half its peak lies below FFN's, over the categories in which one of them falls at all. Where FFN's
    does not, the model's last layer is a lower bound of where it would."""
    wholes = frame[frame["part"].isin(VECTORS)]
    scores = wholes.groupby(["part", "layer"])["score"].mean()
    statistic = "; ".join(
        f"{part.removesuffix('_vector')}'s last layer above half its peak: {_falls(scores[part])} "
        f"(peak {scores[part].idxmax():.0f})"
        for part in VECTORS
    )
    each = wholes.groupby(["category", "part"])[["layer", "score"]].apply(
        lambda rows: _falls(rows.set_index("layer")["score"])
    )
    by_part = each.unstack("part")
    last = wholes["layer"].max()
    falling = by_part[(by_part < last).any(axis=1)]
    stays = int((by_part["ffn_vector"] == last).sum())
    falls = stays <= len(by_part) / 2  # else nothing is known of where it falls
    statistic += f"; FFN's does not fall before the end in {stays} of {len(by_part)} categories"
    if falling.empty:
        return statistic, OPEN
    gap = difference(falling["ffn_vector"], falling["attn_vector"], UNBOUNDED)
    return (
        f"{statistic}; by category FFN's lies {gap.mean:.1f} {gap.spread()} layers after attention's "
        f"({gap.cases} categories)",
        decided(gap) if falls else OPEN,
    )


def _falls(scores: pd.Series) -> int:
    """The last layer above half of the largest."""
    return int(scores.index[scores >= 0.5 * scores.max()].max())


def last_layers_low(frame: pd.DataFrame) -> Verdict:
    scores = averaged(frame, "ffn_vector")
    last, peak = scores.iloc[-1], scores.loc[scores["score"].idxmax()]
    statistic = (
        f"last FFN layer {last['score']:.2f} ± {last['interval']:.2f} nats, the largest (layer "
        f"{peak.name:.0f}) {peak['score']:.2f} ± {peak['interval']:.2f}"
    )
    return statistic, decided(half_the_largest_less_the_last(scores))


CLAIMS = (
    Claim(
        source="ACE, Appendix E",
        words="attention's increase falls (layer 25) before FFN's (27)",
        statistic=(
            "last layer above half the peak, over categories in which one of them falls; where FFN's "
            "does not, the model's last layer is a lower bound; undecided where it does not in most"
        ),
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
