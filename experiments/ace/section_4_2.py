"""ACE, section 4.2: without the query neurons of a peak layer, two-hop answers are lost and the
value neurons in later layers fall silent.

    qv-lens run experiments/ace/section_4_2.py
    qv-lens run experiments/ace/section_4_2.py --model EleutherAI/gpt-j-6B \\
        --set facts=MQuAKE-CF-3k-v2.json

The top query neurons of the two layers where they score highest are zeroed for every reader, or
suppressed for the value neurons alone: two-hop accuracy, and activated value neurons in the layers
after and in all others. Takeaway 2. Beside them as many neurons of the same layer by their effect
on log p (ours) are zeroed. """

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd
import plotly.graph_objects as go

from experiments.ace import BY_EFFECT, NO_CODE
from experiments.decide import (
    NOT_MEASURED,
    OPEN,
    Claim,
    Decide,
    Estimate,
    Verdict,
    decided,
    lost,
    share_lost,
    together,
)
from experiments.models import STUDIED
from experiments.prompts import asked, at_least, check_asked
from qv_lens.attribution.effects import neuron_effects
from qv_lens.evaluation.ablation import DROP, answers, drop, suppress
from qv_lens.evaluation.known_cases import knowledge
from qv_lens.facts.records import Fact
from qv_lens.models.interventions import Zero
from qv_lens.models.lens import Lens
from qv_lens.plots import counts

SETTINGS = {"prompts": 100}
GRID = {"model": STUDIED, "category": ["all", "nationality", "continent", "capital", "language"]}
RESULTS = "ace_suppression"
MEASURES = ("count", "interval", "original", "accuracy", "drop_points", "drop_relative")


@dataclass(frozen=True)
class Task:
    """Two-hop prompts of one category."""

    model: str
    """The model's name."""
    category: str = "all"
    """One of ACE's categories, or 'all'."""
    prompts: int = 100
    """How many prompts are drawn."""
    top: int = 0
    """Query neurons per layer (0: ACE's 100, scaled to d_mlp)."""
    seed: int = 0
    """Which prompts."""
    facts: str = ""
    """A file or dataset of chains (default: `prompts.usual`)."""

    def __post_init__(self) -> None:
        check_asked(self)
        at_least(self, top=0)


def rows(task: Task, lens: Lens) -> pd.DataFrame:
    """`condition, layer`: a row per layer with `count` activated value neurons per prompt
    (`interval`: half of its 95% one;
    `original`: those of them that were so before); and what was suppressed in `suppressed`, with
    clean accuracy, accuracy and their drop in points. Without the neurons by effect ('Effects')
    nothing is counted."""
    chains = asked(lens, task, 2)
    table, counted = suppress(lens, chains, task.top or None)
    table = pd.concat([table, by_effect(lens, chains, table)], ignore_index=True)
    table = table.assign(condition=table["intervention"] + " layer " + table["layer"].astype(str))
    table = table.rename(columns={"layer": "suppressed", "count": "neurons"}).drop(
        columns="intervention"
    )
    counts = counted.merge(table, on="condition", how="left")
    uncounted = table[~table["condition"].isin(counted["condition"])]
    frame = pd.concat([counts, uncounted], ignore_index=True)
    return frame.assign(**knowledge(lens, chains))


def by_effect(lens: Lens, chains: list[Fact], table: pd.DataFrame) -> pd.DataFrame:
    """Rows as those of the table, with as many neurons of each layer by their summed effect
    zeroed."""
    effects = neuron_effects(lens, chains, None, over="set")
    clean = answers(lens, chains)
    lines = []
    for layer, count in table[["layer", "count"]].drop_duplicates().itertuples(index=False):
        with lens.intervene(Zero(effects.layer(layer).top(count))):
            lines.append(("Effects", layer, count, *drop(clean, answers(lens, chains))))
    return pd.DataFrame(lines, columns=["intervention", "layer", "count", *DROP])


def figure(frame: pd.DataFrame) -> go.Figure:
    """A line per condition, over all prompts together where they were asked."""
    counted = frame.dropna(subset="count")  # without the neurons by effect nothing is counted
    together = counted[counted["category"] == "all"]
    return counts(
        together if len(together) else counted, "Activated value neurons (ACE, section 4.2)"
    )


def zeroed_drop(frame: pd.DataFrame) -> Verdict:
    """Zeroed for every reader, which decides; and suppressed for the value neurons alone."""
    zeroed = suppression_drop("Zero")(frame)
    if zeroed == NOT_MEASURED:
        return NOT_MEASURED
    statistic, verdict = zeroed
    alone, _ = suppression_drop("Suppress")(frame)
    return f"zeroed: {statistic}<br>suppressed for the value neurons alone: {alone}", verdict


def suppression_drop(condition: str) -> Decide:
    """More than three answers in ten are lost in each of the layers."""

    def decide(frame: pd.DataFrame) -> Verdict:
        chosen = (frame["category"] == "all") & frame["condition"].str.startswith(condition)
        return answers_lost(frame[chosen].drop_duplicates("condition"))

    return decide


def answers_lost(rows: pd.DataFrame) -> Verdict:
    right = rows["clean"] * rows["prompts_asked"]
    statistic = "; ".join(
        f"layer {row.suppressed:.0f} ({row.neurons:.0f} neurons): {lost(row.drop_relative * n, n)}"
        for row, n in zip(rows.itertuples(), right, strict=True)
    )
    if rows.empty:
        return NOT_MEASURED
    if rows["drop_relative"].isna().any():
        return statistic, OPEN
    shares = map(share_lost, rows["drop_relative"] * right, right)
    return statistic, together([decided(each.shifted(-0.3)) for each in shares])


def suppression_counts(frame: pd.DataFrame) -> Verdict:
    """More than three in ten fall silent in the three layers after, and three times as large a share
    as in all others."""
    here = frame[frame["category"] == "all"]
    clean = here[here["condition"] == "clean"].set_index("layer")
    lines, verdicts = [], []
    for condition, rows in here[here["condition"].str.startswith("Zero")].groupby("condition"):
        now, layer = rows.set_index("layer"), int(rows["suppressed"].iloc[0])
        near = (clean.index > layer) & (clean.index <= layer + 3)
        sentences, fallen = [], []
        for where in (clean.index[near], clean.index[~near]):
            was, left = _counted(clean, where), _counted(now, where)
            sentences.append(
                f"{was.words(1)} to {left.words(1)} ({now['original'][where].sum():.1f} of them the "
                "same)"
            )
            fallen.append(
                Estimate(
                    1 - left.mean / max(1e-9, was.mean),
                    1 - left.high / max(1e-9, was.low),
                    1 - left.low / max(1e-9, was.high),
                )
            )
        lines.append(
            f"{condition}: {sentences[0]} in the three layers after, {sentences[1]} in all others"
        )
        least = max(0.3, 3 * abs(fallen[1].mean))
        verdicts.append(decided(fallen[0].shifted(-least)))
    if not verdicts:
        return NOT_MEASURED
    return "; ".join(lines), together(verdicts)


def _counted(frame: pd.DataFrame, layers: pd.Index) -> Estimate:
    """Value neurons in these layers together, per prompt. The rows have each layer's interval, not
    each prompt's sum: the sum of their half-widths is the widest that the sum's can be."""
    return Estimate.around(frame["count"][layers].sum(), frame["interval"][layers].sum())


CLAIMS = (
    Claim(
        source="ACE, section 4.2",
        words="zeroing the top 100 query neurons of a peak layer costs 46.2% and 61.9%",
        statistic=(
            "share of right two-hop answers lost (100 of GPT-J's 16,384 neurons a layer, as large "
            "a share of other models', at least ten): above 30% in each"
        ),
        decide=zeroed_drop,
        release=NO_CODE,
    ),
    Claim(
        source="ACE, section 4.2",
        words=f"the same of as many neurons of the same layers {BY_EFFECT}",
        statistic="the same",
        decide=suppression_drop("Effects"),
    ),
    Claim(
        source="ACE, section 4.2",
        words=(
            "activated value neurons in the layers after fall from (28, 16, 33) to (6, 4, 7), "
            "others by 12 in all"
        ),
        statistic=(
            "share of activated value neurons lost in the three layers after: above 0.3, and three "
            "times that of all others; intervals at their widest"
        ),
        decide=suppression_counts,
        release=NO_CODE,
    ),
)
