"""ACE, project page, "Knowledge bottleneck": editors at an equal number of layers. The page's 9
(GPT-J) and 8 (Qwen3-8B) are the numbers of layers that ACE edits in Table 2; SmolLM2's is 9. At
that number ACE keeps its own layers; at other numbers it takes the located layers. MEMIT and PMET
take the layers up to the preset's highest.

    qv-lens run experiments/ace/bottleneck.py
    qv-lens run experiments/ace/bottleneck.py --model EleutherAI/gpt-j-6B \\
        --set data=MQuAKE-CF-3k-v2.json --set known=true \\
        --set 'metrics=[["efficacy_acc", "multihop_cot"]]' \\
        --set text=Salesforce/wikitext:wikitext-103-raw-v1 --set 'edited=[6, 9]'
    qv-lens run experiments/ace/bottleneck.py --model Qwen/Qwen3-8B \\
        --set data=MQuAKE-CF-3k-v2.json --set known=true \\
        --set 'metrics=[["efficacy_acc", "multihop_cot"]]' \\
        --set text=Salesforce/wikitext:wikitext-103-raw-v1 --set 'edited=[5, 6, 8]'
"""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go

from experiments.ace import RELEASED
from experiments.compare import MEASURES, VERSION, Task, rows
from experiments.compare import figure as bars
from experiments.decide import (
    NOT_MEASURED,
    Claim,
    Verdict,
    ahead,
    decided,
    difference,
    multihop,
    per_case,
    points,
    share,
    together,
)
from experiments.models import STUDIED
from qv_lens.editing.presets import presets

__all__ = ["CLAIMS", "GRID", "MEASURES", "SETTINGS", "VERSION", "Task", "figure", "rows"]

SETTINGS = {
    "count": 34,
    "metrics": ["efficacy_acc", "paraphrase_acc", "specificity_acc", "multihop_acc"],
}
GRID = {
    "model": STUDIED,
    "seed": [0, 1, 2, 3, 4],
    "method": ["MEMIT", "PMET", "ACE"],
    # MEMIT's own number of layers on SmolLM2 is 5, PMET's 6, ACE's 9
    "edited": [1, 3, 5, 6, 9],
}


def figure(frame: pd.DataFrame) -> go.Figure:
    """Bars by what was varied."""
    return bars(
        frame,
        ("model", "method", "edited"),
        "Editors at an equal number of layers (ACE, project page)",
    )


def _own_layers(frame: pd.DataFrame, method: str) -> int:
    """How many layers the preset of the rows' model edits."""
    editor = presets(str(frame["model"].iloc[0]))[method].editor
    return sum(
        len(getattr(editor, name, ())) for name in ("query_layers", "value_layers", "layers")
    )


def ahead_at_its_own_number(frame: pd.DataFrame) -> Verdict:
    """ACE against the better of MEMIT and PMET at the number of layers that ACE edits in Table
    2."""
    count, metric, lines = _own_layers(frame, "ACE"), multihop(frame), []
    for edited, part in frame.groupby("edited"):
        means = per_case(part, metric, "method").mean()
        lines.append(
            f"{edited} layers: "
            + ", ".join(f"{name} {share(value)}" for name, value in means.items())
        )
    at_count = ahead(metric, "ACE", ("MEMIT", "PMET"))(frame[frame["edited"] == count])
    if at_count == NOT_MEASURED:
        return NOT_MEASURED
    statistic, verdict = at_count
    return f"at {count} layers {statistic}; {'; '.join(lines)}", verdict


def marginal(frame: pd.DataFrame) -> Verdict:
    """What MEMIT and PMET gain in multi-hop accuracy from their own number of layers to the most:
    each less than ten points."""
    metric, lines, verdicts = multihop(frame), [], []
    for method in ("MEMIT", "PMET"):
        table, own = (
            per_case(frame[frame["method"] == method], metric, "edited"),
            _own_layers(frame, method),
        )
        if own not in table or table.columns[-1] == own:
            return NOT_MEASURED
        gain = difference(table[table.columns[-1]], table[own])
        values = ", ".join(f"{k:g}: {share(v)}" for k, v in table.mean().items())
        lines.append(f"{method} {values} ({own} to {table.columns[-1]:g}: {points(gain)})")
        verdicts.append(decided((-gain).shifted(0.1)))
    return "; ".join(lines), together(verdicts)


CLAIMS = (
    Claim(
        source="ACE, project page",
        words="at an equal number of layers (9 and 8) ACE is ahead of ROME, MEMIT and PMET",
        statistic=(
            "multi-hop accuracy at as many layers as ACE edits (the presets'); ROME has one layer "
            "and is left out"
        ),
        decide=ahead_at_its_own_number,
        release=RELEASED,
    ),
    Claim(
        source="ACE, project page",
        words="editors of value layers alone gain marginally from more layers",
        statistic=(
            "MEMIT and PMET, from their own number of layers (the presets') to the most measured:"
            " less than ten points of multi-hop accuracy gained; a fall counts"
        ),
        decide=marginal,
    ),
)
