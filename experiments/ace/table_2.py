"""ACE, Table 2: multi-hop accuracy (any of three questions, after worked chains of thought) by
number of edits. Base is the column `before`: old answers on the unedited model.

    qv-lens run experiments/ace/table_2.py
    qv-lens run experiments/ace/table_2.py --model EleutherAI/gpt-j-6B \\
        --set data=MQuAKE-CF-3k-v2.json --set known=true \\
        --set text=Salesforce/wikitext:wikitext-103-raw-v1
"""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go

from experiments.ace import RELEASED, RIVALS
from experiments.compare import MEASURES, VERSION, Task, rows
from experiments.compare import figure as bars
from experiments.decide import (
    NOT_MEASURED,
    Claim,
    Estimate,
    Verdict,
    ahead,
    decided,
    difference,
    mean_told,
    minus,
    per_case,
    points,
    share,
    together,
    two_samples,
)
from experiments.models import STUDIED

__all__ = ["CLAIMS", "GRID", "MEASURES", "RESULTS", "SETTINGS", "VERSION", "Task", "figure", "rows"]

SETTINGS = {
    "data": "multihop",
    "count": 34,
    "metrics": ["multihop_cot", "multihop_cot_rate", "instance_wise"],
}
GRID = {
    "model": STUDIED,
    "seed": [0, 1, 2],
    "method": ["FT", "ROME", "MEMIT", "PMET", "ACE", "ACE.paper", "ACE.official"],
}
RESULTS = "multihop"
RELEASE = f"cases of several edits share one z* and are not fully reverted there; {RELEASED}"


def figure(frame: pd.DataFrame) -> go.Figure:
    """Bars by what was varied."""
    return bars(frame, ("model", "method"), "Multi-hop accuracy of single edits (ACE, Table 2)")


def edits_of(frame: pd.DataFrame, table: pd.DataFrame) -> pd.Series:
    """How many edits each case of the table has."""
    case = table.index.names
    return frame.drop_duplicates(case).set_index(case)["edits"].reindex(table.index)


def above_pmet(frame: pd.DataFrame) -> Verdict:
    table = per_case(frame, "multihop_cot", "method")
    if not {"ACE", "PMET"} <= set(table):
        return NOT_MEASURED
    table = table.dropna(subset=["ACE", "PMET"])
    by = table.groupby(edits_of(frame, table))[["ACE", "PMET"]].mean()
    shares = ", ".join(f"{k}: {share(v['ACE'])} / {share(v['PMET'])}" for k, v in by.iterrows())
    gap = difference(table["ACE"], table["PMET"])
    return f"ACE − PMET {points(gap)}; ACE / PMET by edits {shares}", decided(gap)


def tuning_fails(frame: pd.DataFrame) -> Verdict:
    table = per_case(frame, "multihop_cot", "method")
    if "FT" not in table:
        return NOT_MEASURED
    estimate = Estimate.of(table["FT"])
    return f"FT {mean_told(estimate)}", decided((-estimate).shifted(0.1))


def by_edits(frame: pd.DataFrame) -> Verdict:
    """Multi-hop accuracy of cases of one edit, less that of three and four: above 0 for ROME and
    MEMIT, larger than ACE's."""
    table = per_case(frame, "multihop_cot", "method")
    if not {"ACE", "ROME", "MEMIT"} <= set(table):
        return NOT_MEASURED
    edits = edits_of(frame, table)
    lines, falls = [], {}
    for method in ("ROME", "MEMIT", "ACE"):
        few, many = table.loc[edits == 1, method].dropna(), table.loc[edits >= 3, method].dropna()
        if few.empty or many.empty:
            return NOT_MEASURED
        fall = falls[method] = two_samples(few, many)
        lines.append(
            f"{method} {share(few.mean())} to {share(many.mean())} ({100 * fall.mean:+.1f} "
            f"{fall.spread(100)} points)"
        )
    of_ace = falls.pop("ACE")
    verdicts = [v for fall in falls.values() for v in (decided(fall), decided(minus(fall, of_ace)))]
    return (
        f"one edit to three and four: {'; '.join(lines)} ({len(few)} and {len(many)} cases)",
        together(verdicts),
    )


def worse_on_qwen(frame: pd.DataFrame) -> Verdict:
    """Of both models: ROME, MEMIT and PMET reach less on the second (by name: Qwen3) than on the
    first (GPT-J)."""
    lines, verdicts = [], []
    tables = [per_case(rows, "multihop_cot", "method") for _, rows in frame.groupby("model")]
    for method in ("ROME", "MEMIT", "PMET"):
        if not all(method in table for table in tables):
            return NOT_MEASURED
        gptj, qwen = (table[method].dropna() for table in tables)
        gap = two_samples(qwen, gptj)
        lines.append(
            f"{method} {share(gptj.mean())} and {share(qwen.mean())} ({100 * gap.mean:+.1f} "
            f"{gap.spread(100)} points)"
        )
        verdicts.append(decided(-gap))
    return "; ".join(lines), together(verdicts)


CLAIMS = (
    Claim(
        source="ACE, Table 2",
        words="ACE beats PMET by 9.44 (GPT-J) and 37.46 (Qwen3-8B) points",
        statistic="difference per case, any of three questions",
        decide=above_pmet,
        release=RELEASE,
    ),
    Claim(
        source="ACE, Table 2",
        words="ACE is the best of all editors",
        statistic="against the best of FT, ROME, MEMIT, PMET",
        decide=ahead("multihop_cot", "ACE", RIVALS),
        release=RELEASE,
    ),
    Claim(
        source="ACE, Table 2",
        words="fine-tuning reaches 3.54 / 2.18",
        statistic="below 10%",
        decide=tuning_fails,
    ),
    Claim(
        source="ACE, Table 2",
        words="from one edit to four ROME (44.5 to 5.1) and MEMIT (64 to 8) fall, ACE stays",
        statistic="cases of one edit minus those of three and four, above 0 and above ACE's",
        decide=by_edits,
        release=RELEASE,
    ),
    Claim(
        source="ACE, section 6.2",
        words="locate-then-edit does even worse on Qwen3-8B than on GPT-J",
        statistic="multi-hop accuracy of ROME, MEMIT and PMET, each",
        decide=worse_on_qwen,
        release=RELEASE,
        both=True,
    ),
)
