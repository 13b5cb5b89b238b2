"""ACE, Figure 3, on two-hop prompts: query layers, and how many value neurons lie in each layer.
Sections 4.2 and 6.4.

    qv-lens run experiments/ace/figure_3.py
    qv-lens run experiments/ace/figure_3.py --model EleutherAI/gpt-j-6B \\
        --set facts=MQuAKE-CF-3k-v2.json

The rows are those of Table 1, over prompts of two hops; value neurons also by their effect on
log p (ours).
"""

from __future__ import annotations

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from experiments.ace import BY_EFFECT
from experiments.ace.overlap import best_layers, mean_overlap
from experiments.ace.table_1 import MEASURES, Task, rows
from experiments.decide import (
    DESCRIBED,
    FAILS,
    HOLDS,
    OPEN,
    Claim,
    Estimate,
    Verdict,
    averaged,
    decided,
    half_the_largest_less_the_last,
    nearer,
    read_as,
    share,
    together,
    verdict_of,
)
from experiments.models import STUDIED, is_gptj, is_of_the_paper, layers_there
from experiments.prompts import APART
from qv_lens.evaluation.intervals import DIFFERENCE
from qv_lens.plots import category_heatmap

__all__ = ["CLAIMS", "GRID", "MEASURES", "SETTINGS", "Task", "figure", "rows"]

SETTINGS = {"hops": 2, "prompts": 100}
GRID = {"model": STUDIED, "category": APART}


def figure(frame: pd.DataFrame) -> go.Figure:
    """Layers across, categories down."""
    return category_heatmap(frame, "Two-hop prompts (ACE, Figure 3)")


def values_after_queries(frame: pd.DataFrame) -> Verdict:
    """By Eq. 9 of the layers, as the figure's caption has it, and by Eq. 10. It decides what is so
    without each of the categories as well."""
    lag, best = largest_lag(frame, "ffn")
    of_query, best_query = largest_lag(frame, "query")
    query = frame[frame["part"] == "query"].groupby("layer")["score"].mean()
    statistic = (
        f"largest correlation {best:.2f} at lag {lag} (value counts after the layers' Eq. 9); after "
        f"Eq. 10 {best_query:.2f} at lag {of_query}; Eq. 10 is positive in {(query > 0).sum()} of "
        f"{len(query)} layers"
    )
    parts = [frame[frame["category"] != name] for name in frame["category"].unique()]
    found = [(lag, best), *(largest_lag(part, "ffn") for part in parts if len(part))]
    clear = all(r > 0.5 for _, r in found)
    after = [lag in (1, 2) for lag, _ in found]
    return statistic, verdict_of(clear and all(after), clear and not any(after))


def largest_lag(frame: pd.DataFrame, part: str) -> tuple[int, float]:
    """By how many layers value counts lie after a part's scores where Pearson's r is largest, over
    the layers that both have, and r; up to a third of the depth."""
    means = frame.groupby(["part", "layer"])["score"].mean()
    score, count = means[part].to_numpy(), means["count"].to_numpy()
    n = len(score)
    by_lag = {
        lag: float(
            np.corrcoef(
                score[max(0, -lag) : n - max(0, lag)], count[max(0, lag) : n - max(0, -lag)]
            )[0, 1]
        )
        for lag in range(-(n // 3), n // 3 + 1)
    }
    return max(by_lag.items(), key=lambda item: item[1])


def late_values(frame: pd.DataFrame) -> Verdict:
    count = averaged(frame, "count")
    peak, most, last = (
        int(count["score"].idxmax()),
        count.loc[count["score"].idxmax()],
        count.iloc[-1],
    )
    statistic = (
        f"most of the 300 best value neurons in layer {peak} of {len(count)}: {most['score']:.1f} ± "
        f"{most['interval']:.1f}; in the last {last['score']:.1f} ± {last['interval']:.1f}"
    )
    deep = HOLDS if peak >= len(count) / 3 else FAILS
    return statistic, together([deep, decided(half_the_largest_less_the_last(count))])


def separation(frame: pd.DataFrame) -> Verdict:
    """Mean distance of the best value layers from the best query layers (3 of 28 each), as a share
    of the model's depth: far apart (GPT-J: f_q16 to 18, f_v28 to 30), or next to each other and
    overlapping (Qwen3-8B: 27 to 29, 30 to 32)."""
    value, query = (best_layers(frame, part, 3, layers_there(frame)) for part in ("ffn", "query"))
    depth = frame["layer"].nunique()
    gaps = [(np.mean(list(value[name])) - np.mean(list(query[name]))) / depth for name in value]
    estimate = Estimate.of(gaps, DIFFERENCE)
    statistic = (
        f"value layers lie {share(estimate.mean)} {estimate.spread(100)} of the depth above the query "
        f"layers ({len(gaps)} categories)"
    )
    if not is_of_the_paper(frame):
        return statistic, DESCRIBED
    return statistic, decided(estimate.shifted(-0.2) if is_gptj(frame) else nearer(estimate, 0.2))


def invariance(frame: pd.DataFrame) -> Verdict:
    parts = (("query", "query"), ("value", "ffn"))
    overlaps = {
        name: mean_overlap(best_layers(frame, part, 3, layers_there(frame))) for name, part in parts
    }
    fixed = min(overlaps.values()) > 0.8
    # where the layers shift, chance could have moved them as well: that decides nothing
    same = HOLDS if fixed else FAILS
    shifting = FAILS if fixed else OPEN
    verdict = same if is_gptj(frame) else shifting
    statistic = ", ".join(f"best {k} layers overlap {v:.2f}" for k, v in overlaps.items())
    return statistic, verdict if is_of_the_paper(frame) else DESCRIBED


CLAIMS = (
    Claim(
        source="ACE, Figure 3",
        words="value neurons accumulate one or two layers after peaks of the query layers",
        statistic=(
            "lag of the largest correlation (above 0.5) between the layers' Eq. 9, which decides, or "
            "Eq. 10, and value-neuron counts, two-hop prompts; also without each category"
        ),
        decide=values_after_queries,
    ),
    Claim(
        source="ACE, Figure 3",
        words=f"the same, {BY_EFFECT}",
        statistic="the same, the 300 neurons of the largest effects",
        decide=read_as("part", {"effect_count": "count"}, values_after_queries),
    ),
    Claim(
        source="ACE, Figure 3",
        words="value neurons lie in middle to deep layers and grow few at the end",
        statistic="layer with most of the 300 best, and the last layer against it",
        decide=late_values,
    ),
    Claim(
        source="ACE, Figure 3",
        words=f"the same, {BY_EFFECT}",
        statistic="the same, the 300 neurons of the largest effects",
        decide=read_as("part", {"effect_count": "count"}, late_values),
    ),
    Claim(
        source="ACE, section 6.4",
        words="GPT-J's query and value layers are the same for all domains, Qwen3's shift",
        statistic=(
            "mean overlap of the best layers (3 of 28, of Qwen3-8B's 36) between categories; above "
            "0.8: the same"
        ),
        decide=invariance,
    ),
    Claim(
        source="ACE, section 6.4",
        words="GPT-J's value layers lie far above its query layers, Qwen3's next to them",
        statistic=(
            "distance of the means of the best (3 of 28, of 36) layers in shares of the depth, by"
            " category: above 0.2 (GPT-J), below (Qwen3)"
        ),
        decide=separation,
    ),
)
