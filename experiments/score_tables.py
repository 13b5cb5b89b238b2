"""What the scores say of what a model loses, as text: a table for each experiment, model and data
that have rows."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from experiments.comparison import by_columns, head, line
from experiments.decide import Estimate
from experiments.models import COLUMNS, DATA
from experiments.scores import edges, layers, sets, single
from qv_lens.evaluation.faithfulness import areas
from qv_lens.evaluation.intervals import UNBOUNDED

PREFACE = (
    "# Which score says what a model loses",
    "",
    "Written by `python -m experiments.ledger` from `experiments/results/` (runs of "
    "`experiments/scores/`). Facts are those that the model knows; neurons are those of the FFNs, "
    "zeroed at the last token. Losses are of log p of the answer's first token, in nats. Cells are "
    "means over the facts, with 95% intervals (Student's t) where they have one.",
)
OF_ONE = (
    "Every neuron of three layers, and 1,000 others, zeroed alone: how each score agrees with what "
    "is really lost (`experiments/scores/single.py`). Overlap: how many of the hundred that cost "
    "most are among the score's own hundred."
)
OF_SETS = (
    "The best so many of each ranking zeroed together: what is lost (`experiments/scores/sets.py`). "
    "Gone: of the answers that were the likeliest, the share that no longer is. Area: the change of "
    "log p averaged over log k, of rankings that go as far as the largest k. Seconds: the median, of "
    "the ranking alone."
)
OF_THE_KEPT = (
    "All neurons zeroed but the best so many: what is lost. CPR and CMD: areas under and above the "
    "share of log p that is kept (MIB), 1 and 0 at best."
)
OF_EDGES = (
    "Edges of the Q-V graph of 30 value and 30 query neurons, each taken out alone: Spearman's ρ of "
    "the predicted and the real loss of the value neuron's coefficient, and of the edge's weight "
    "and the real loss of log p (`experiments/scores/edges.py`)."
)
OF_LAYERS = (
    "Editors at as many layers as their presets have, chosen by each score and by chance "
    "(`experiments/scores/layers.py`). Percent by likelihood; the score is the harmonic mean of the "
    "three, between 0 and 1. As good: random draws that reach the score; p of a permutation test."
)
#: how choices of layers are chosen
CHOICES = {
    "effects": "effects at the subject's token",
    "paper": "Eq. 9 and 10 at the last token",
    "two-hop": "the same, over two-hop prompts",
    "preset": "the preset's, tuned",
}
#: the size that orders the rankings
ORDERED_BY = 30
#: the sizes of which a column says how many answers are gone
GONE_AT = (3, 10)


def tables(results: Path) -> str:
    """Every table that has rows in the folder of results, as text."""
    lines = [*PREFACE]
    kinds = (
        ("scores_single", "One neuron at a time", OF_ONE, of_one),
        ("scores_sets", "The best together", OF_SETS, of_sets),
        ("scores_sets", "The best alone", OF_THE_KEPT, of_the_kept),
        ("scores_edges", "Edges", OF_EDGES, of_edges),
        ("scores_layers", "Layers for an edit", OF_LAYERS, of_layers),
    )
    for name, title, words, table_of in kinds:
        for (model, data), frame in by_columns(results / f"{name}.parquet", ["model", "data"]):
            table = table_of(frame)
            if not table:
                continue
            number = "case" if "case" in frame else "fact"
            facts = f"{len(frame.drop_duplicates(['seed', number]))} {number}s"
            heading = f"## {title}: {COLUMNS.get(model, model)}, {DATA.get(data, data)}, {facts}"
            lines += ["", heading, "", words, "", *table]
    return "\n".join([*lines, ""])


def of_one(frame: pd.DataFrame) -> list[str]:
    """A line for each score, the best first."""
    lines = head("score", "Spearman", "Pearson", "overlap")
    means = {measure: single.by_fact(frame, measure) for measure in single.MEASURES}
    order = means["spearman"].mean().sort_values(ascending=False).index
    for score in order:
        cells = [_mean(values[score], 3) for values in means.values()]
        lines.append(line(score, *cells))
    return lines


def of_sets(frame: pd.DataFrame) -> list[str]:
    """A line for each ranking, by what its thirty best cost."""
    frame = frame[~frame["keep"]]
    if frame.empty:
        return []
    sizes = sorted(frame["k"].unique())
    lines = head(
        "ranking", *(f"k = {k}" for k in sizes), *(f"gone at {k}" for k in GONE_AT), "area", "s"
    )
    lost = {k: sets.losses(frame, k) for k in sizes}
    area = areas(_curves(frame)).set_index("ranking")
    for ranking in lost[ORDERED_BY].mean().sort_values(ascending=False).index:
        rows = frame[frame["ranking"] == ranking]
        cells = [_mean(lost[k][ranking]) if ranking in lost[k] else "" for k in sizes]
        gone = [_gone(rows[rows["k"] == k]) for k in GONE_AT]
        seconds = f"{rows['seconds'].median():.1f}"
        whole = sizes[-1] in set(rows["k"])
        under = _area(area.loc[ranking]) if whole else ""
        lines.append(line(ranking, *cells, *gone, under, seconds))
    return lines


def of_the_kept(frame: pd.DataFrame) -> list[str]:
    """A line for each ranking, by its CPR."""
    frame = frame[frame["keep"]]
    if frame.empty:
        return []
    sizes = sorted(frame["k"].unique())
    lines = head("ranking", *(f"k = {k:,}" for k in sizes), "CPR", "CMD")
    lost = {k: sets.losses(frame, k) for k in sizes}
    under = areas(_curves(frame)).set_index("ranking").sort_values("cpr", ascending=False)
    for ranking, row in under.iterrows():
        cells = [_mean(lost[k][ranking]) for k in sizes]
        lines.append(line(ranking, *cells, f"{row['cpr']:.2f}", f"{row['cmd']:.2f}"))
    return lines


def of_edges(frame: pd.DataFrame) -> list[str]:
    """A line for each kind of graph."""
    lines = head("value neurons by", "query neurons", "coefficient", "log p")
    where = {"stream": "at the last token", "attention": "at any token, through attention"}
    for (by, through), rows in frame.groupby(["by", "through"], sort=False):
        cells = [_mean(rows[measure], 3) for measure in edges.MEASURES if "spearman" in measure]
        lines.append(line(by, where[str(through)], *cells))
    return lines


def of_layers(frame: pd.DataFrame) -> list[str]:
    """A line for each editor and choice, and one for the mean of the random draws."""
    parts = (*layers.PARTS, "score")
    lines = head("editor", "layers by", *(part.split("_")[0] for part in parts), "as good", "p")
    for method, choices in layers.by_choice(frame).groupby("method", sort=False):
        means = choices.groupby("layers")[list(parts)].mean()
        for layers_by, words in CHOICES.items():
            if layers_by in means.index:
                better, draws = layers.draws_as_good(choices, layers_by)
                p = f"{layers.chance(better, draws):.2f}" if draws else ""
                cells = _shares(means.loc[layers_by])
                lines.append(line(method, words, *cells, f"{better} of {draws}", p))
        drawn = choices[layers.is_random(choices)]
        if len(drawn):
            between = f" ({drawn['score'].min():.2f} to {drawn['score'].max():.2f})"
            *cells, score = _shares(drawn[list(parts)].mean())
            lines.append(line(method, "chance, mean", *cells, score + between, "", ""))
    return lines


def _shares(means: pd.Series) -> list[str]:
    """The three parts in percent, and the score."""
    *parts, score = means
    return [*(f"{100 * part:.0f}" for part in parts), f"{score:.2f}"]


def _curves(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows as `qv.faithfulness` gives them."""
    prompt = frame.groupby(["seed", "fact"]).ngroup()
    own = frame.drop(columns="seed").rename(columns={"keep": "kept", "order": "seed"})
    own = own.assign(prompt=prompt)
    own.attrs["units"] = int(frame["units"].iloc[0])
    return own


def _mean(values: pd.Series, digits: int = 1) -> str:
    return Estimate.of(values, UNBOUNDED).words(digits)


def _area(row: pd.Series) -> str:
    return Estimate(row["area"], row["low"], row["high"]).words(1)


def _gone(rows: pd.DataFrame) -> str:
    """Of the answers that were the likeliest, the share that the model no longer gives first."""
    known = rows[rows["known"]]
    if known.empty:
        return ""
    return f"{100 * (~known['right']).mean():.0f}%"
