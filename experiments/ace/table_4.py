"""ACE, Table 4: some of its layers not edited, the best-ranked first; nothing in their place. q:
query layers, v: value layers. The paper leaves out up to 3 of GPT-J's 6 query layers and 2 of its 3
value layers; so does this file.

    qv-lens run experiments/ace/table_4.py
    qv-lens run experiments/ace/table_4.py --model EleutherAI/gpt-j-6B \\
        --set data=MQuAKE-CF-3k-v2.json --set known=true \\
        --set 'metrics=[["efficacy_acc", "multihop_cot"]]' \\
        --set text=Salesforce/wikitext:wikitext-103-raw-v1 \\
        --set 'skip=["", "q", "qq", "qqq", "v", "vv"]'
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
    Decide,
    Verdict,
    beats,
    decided,
    difference,
    multihop,
    per_case,
    points,
    share,
    together,
    two_samples,
)
from experiments.models import STUDIED
from qv_lens.evaluation.intervals import DIFFERENCE

__all__ = ["CLAIMS", "GRID", "MEASURES", "SETTINGS", "VERSION", "Task", "figure", "rows"]

SETTINGS = {
    "method": "ACE",
    "count": 34,
    "metrics": ["efficacy_acc", "paraphrase_acc", "specificity_acc", "multihop_acc"],
}
GRID = {
    "model": STUDIED,
    "seed": [0, 1, 2, 3, 4],
    "skip": ["", "q", "qq", "qqq", "v", "vv"],
}
#: layers left out of ACE's that decide: three of GPT-J's six query layers and all three of
#: Qwen3-8B's, two of three and of five value layers
PUBLISHED = {"q": "qqq", "v": "vv"}
#: of a bundled model, which has fewer
LEFT_OUT = {
    "q": {"toy-gptj": "q", "toy-qwen3": "qq"},
    "v": {"toy-gptj": "v", "toy-qwen3": "v"},
}


def figure(frame: pd.DataFrame) -> go.Figure:
    """Bars by what was varied."""
    skip = (
        frame["skip"]
        .fillna("")
        .map(lambda letters: f"without {_named(letters)}" if letters else "all")
    )
    return bars(
        frame.assign(skip=skip),
        ("model", "skip"),
        "Layers of ACE that are not edited (ACE, Table 4)",
    )


def _skips(frame: pd.DataFrame) -> tuple[pd.DataFrame, str, str]:
    """One model's rows with '' where nothing is left out, and the letters of as many query and
    value layers as in Table 4."""
    model = str(frame["model"].iloc[0])
    query, value = (LEFT_OUT[letter].get(model, PUBLISHED[letter]) for letter in "qv")
    return frame.assign(skip=frame["skip"].fillna("")), query, value


def _named(letters: str) -> str:
    """'qqq' as '3 query layers'."""
    kind = "query" if letters[0] == "q" else "value"
    return f"{len(letters)} {kind} layer{'s' if len(letters) > 1 else ''}"


def skipping(letter: str) -> Decide:
    """The cost, in multi-hop accuracy and efficacy, of leaving out layers of one kind (leaving out
    as many as in Table 4 decides the claim)."""

    def decide(frame: pd.DataFrame) -> Verdict:
        frame, query, value = _skips(frame)
        decisive, hops, lines, verdicts = query if letter == "q" else value, multihop(frame), [], {}
        for metric in (hops, "efficacy_acc"):
            table = per_case(frame, metric, "skip")
            if not {"", decisive} <= set(table):
                return NOT_MEASURED
            parts = []
            for letters in (name for name in table if name and set(name) == {letter}):
                loss = difference(table[""], table[letters])
                # as Table 4 counts
                less = f", {100 * loss.mean / table[''].mean():.0f}% less" if loss.mean > 0 else ""
                parts.append(
                    f"without {_named(letters)} {share(table[letters].mean())} ({points(-loss)}{less})"
                )
                verdicts[metric, letters] = decided(loss)
            lines.append(f"{metric} {share(table[''].mean())}, {', '.join(parts)}")
        return "; ".join(lines), verdicts[hops, decisive]

    return decide


def values_matter_more(frame: pd.DataFrame) -> Verdict:
    """Without query layers more is right than without value layers: as many as in Table 4, and all
    of the bundled models'."""
    frame, query, value = _skips(frame)
    pairs = {(query, value), *([("q", "v"), ("qq", "vv")] if query != "qqq" else [])}
    frame = frame.assign(skip=frame["skip"].map(lambda letters: letters and _named(letters)))
    comparisons = [
        beats(multihop(frame), _named(a), _named(b), "skip")(frame) for a, b in sorted(pairs)
    ]
    return "; ".join(words for words, _ in comparisons), together(
        [verdict for _, verdict in comparisons]
    )


def more_sensitive(frame: pd.DataFrame) -> Verdict:
    """Over both models: when as many layers of a kind as in Table 4 are left out, the second model
    (by name: Qwen3) loses more than the first (GPT-J)."""
    lines, verdicts, lost_by = [], [], {"query": [], "value": []}
    for _, of_model in frame.groupby("model"):
        part, *left_out = _skips(of_model)
        table = per_case(part, multihop(part), "skip")
        if not {"", *left_out} <= set(table):
            return NOT_MEASURED
        for losses, letters in zip(lost_by.values(), left_out, strict=True):
            losses.append((table[""] - table[letters]).dropna())
    for kind, (gptj, qwen) in lost_by.items():
        gap = two_samples(qwen, gptj, DIFFERENCE)
        lines.append(
            f"{kind} layers: {share(gptj.mean())} and {share(qwen.mean())} lost "
            f"({100 * gap.mean:+.1f} {gap.spread(100)} points, {len(gptj)} and {len(qwen)} cases)"
        )
        verdicts.append(decided(gap))
    return "; ".join(lines), together(verdicts)


CLAIMS = (
    Claim(
        source="ACE, Table 4",
        words=(
            "leaving out the three best of six query layers costs 16.51%, all three of Qwen3's "
            "22.29%"
        ),
        statistic=(
            "multi-hop accuracy (which decides; cloze prompts of the atlas, MQuAKE's questions of a "
            "file) and efficacy without as many query layers as there"
        ),
        decide=skipping("q"),
        release=RELEASED,
    ),
    Claim(
        source="ACE, Table 4",
        words="leaving out the two best of three (five) value layers costs 26.87% / 40.45%",
        statistic=("the same, value layers: two of GPT-J's three and of Qwen3-8B's five"),
        decide=skipping("v"),
        release=RELEASED,
    ),
    Claim(
        source="ACE, Table 4",
        words="value layers matter more than query layers",
        statistic=(
            "multi-hop accuracy without query layers minus without value layers: as many as in "
            "Table 4, and one and two of each"
        ),
        decide=values_matter_more,
        release=RELEASED,
    ),
    Claim(
        source="ACE, section 6.4",
        words="Qwen3-8B is more sensitive to the number of layers edited than GPT-J (Table 4)",
        statistic=(
            "multi-hop accuracy lost without as many query layers as Table 4 leaves out, and as "
            "many value layers, Qwen3 minus GPT-J"
        ),
        decide=more_sensitive,
        release=RELEASED,
        both=True,
    ),
)
