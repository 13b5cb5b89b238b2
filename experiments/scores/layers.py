"""Does attribution choose better layers for an edit than chance?

    qv-lens run experiments/scores/layers.py --set data=counterfact-edit.json    # two hours of one core
    qv-lens run experiments/scores/layers.py --set 'method=["MEMIT"]' --set count=50
    qv-lens run experiments/scores/layers.py --model MODEL --set preset=OTHER    # another model's settings

1. Facts that the model knows: `count` are edited, each alone; over `others` of them layers are
   located.
2. An editor with the settings of its preset, at as many layers as the preset has: those located by
   the effects of neurons at the subject's token ("effects"); by Eq. 9, query layers by Eq. 10, at
   the last token ("paper"); the same over two-hop prompts of the atlas, as in ACE's first stage
   ("two-hop"); the preset's own, which were tuned; and twenty random draws.
3. The score of a choice: the harmonic mean of efficacy, paraphrase and specificity, each the share
   of prompts whose wanted answer is the likelier one."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd
import plotly.express as px
import plotly.graph_objects as go
from scipy.stats import hmean

from experiments.compare import Choice, drawn_cases, statistics_of
from experiments.decide import NOT_MEASURED, Claim, Decide, Verdict, verdict_of
from experiments.models import STUDIED
from experiments.prompts import at_least, check_files, known_facts
from qv_lens.attribution.locate import Layers, locate
from qv_lens.editing.closed_form import ACE
from qv_lens.editing.job import Editor
from qv_lens.editing.presets import with_settings
from qv_lens.errors import ConfigError, unknown
from qv_lens.evaluation.protocols import evaluate
from qv_lens.facts.records import Fact, edited_facts
from qv_lens.models.lens import Lens
from qv_lens.plots.parts import COLOURS, laid_out
from qv_lens.runs.experiment import Once, directly

__all__ = ["CLAIMS", "GRID", "MEASURES", "SETTINGS", "Task", "figure", "rows"]

LOCATED = ("effects", "paper", "two-hop")
RANDOM = "random"
GRID = {
    "model": STUDIED,
    "method": ["MEMIT", "ACE"],
    "layers": [*LOCATED, "preset", *(f"{RANDOM} {draw}" for draw in range(20))],
}
SETTINGS = {"count": 20, "others": 50}
MEASURES = ("before", "after", "seconds")
#: the parts of the score
PARTS = ("efficacy_success", "paraphrase_success", "specificity_success")
METRICS = (*PARTS, "efficacy_acc")


@dataclass(frozen=True)
class Task:
    """An editor at one choice of layers."""

    model: str
    """The model's name."""
    method: str = "MEMIT"
    """The editor's name among the presets: ACE, or one of a single group of layers."""
    layers: str = "effects"
    """'effects', 'paper', 'two-hop', 'preset', or 'random 3', the third draw."""
    data: str = "facts"
    """'facts' (of a bundled model its world's, else the atlas's), or a file of edits."""
    count: int = 20
    """How many facts are edited."""
    others: int = 50
    """How many facts layers are located over."""
    seed: int = 0
    """Which facts."""
    preset: str = ""
    """The model whose presets are taken ('': the task's own)."""
    text: str = ""
    """Text for C0 ('': the default of the model)."""
    documents: int = 0
    """How many texts of it (0: 3,000 of the world, of another as many as C0 needs)."""

    def __post_init__(self) -> None:
        at_least(self, count=1, others=1, seed=0, documents=0)
        check_files(self, "data", "text")
        kind, *draw = self.layers.split(" ")
        drawn = kind == RANDOM and len(draw) == 1 and draw[0].isdecimal()
        if not drawn and self.layers not in (*LOCATED, "preset"):
            raise unknown("Layers", self.layers, (*LOCATED, "preset", f"{RANDOM} 0"))
        groups(self.editor)

    @property
    def editor(self) -> Editor:
        """The preset's. Raises `ConfigError` for a model or method that has none."""
        return Choice(self.method, self.preset).at(self.model)


def groups(editor: Editor) -> Mapping[str, int]:
    """How many layers an editor writes, by the setting that names them. Raises `ConfigError` for an
    editor whose layers are not chosen so."""
    settings = ("value_layers", "query_layers") if isinstance(editor, ACE) else ("layers",)
    if not hasattr(editor, settings[0]) or hasattr(editor, "deep_layers"):
        raise ConfigError(
            f"{type(editor).__name__} has no layers, or two groups that attribution does not name; "
            "method is ACE or an editor with one setting `layers`, such as MEMIT."
        )
    return {name: len(getattr(editor, name)) for name in settings}


def rows(task: Task, lens: Lens, once: Once = directly) -> pd.DataFrame:
    """`evaluate`'s rows, with the layers that were written."""
    drawn = drawn_cases(lens, task.data, task.count + task.others, task.seed, True, once)
    edited, others = drawn.cases[: task.count], drawn.cases[task.count :]
    chosen = layers_of(lens, task, tuple(edited_facts(others)), once)
    frame = evaluate(
        lens,
        edited,
        METRICS,
        with_settings(task.editor, chosen),
        seed=task.seed,
        statistics=once(statistics_of, lens, task.text, task.documents),
        batch_size=1,
        cache=once(TemporaryDirectory).name,  # choices with the same last layer share z*
    )
    return frame.assign(written=str(chosen))


def layers_of(
    lens: Lens, task: Task, facts: tuple[Fact, ...], once: Once
) -> Mapping[str, tuple[int, ...]]:
    """The layers of a task's choice, by the editor's setting; none for the preset's own."""
    if task.layers == "preset":
        return {}
    counts = groups(task.editor)
    queries = counts.get("query_layers", 0)
    values = sum(counts.values()) - queries
    first = lens.backend_adapter.first_editable
    if task.layers in LOCATED:
        located = once(_located, lens, task.layers, facts, task.seed)
        value, query = located.editable(values, queries, first)
    else:
        draw = task.layers.removeprefix(f"{RANDOM} ")
        rng = random.Random(f"layers:{task.method}:{draw}")
        # nothing reads the subject's token after the last layer's attention
        picked = sorted(rng.sample(range(first, lens.n_layers - 1), values + queries))
        value, query = tuple(picked[queries:]), tuple(picked[:queries])
    if "query_layers" in counts:
        return {"value_layers": value, "query_layers": query}
    return {"layers": value}


def _located(lens: Lens, by: str, facts: tuple[Fact, ...], seed: int) -> Layers:
    if by == "effects":
        return locate(lens, facts, "subject_last", by="effects")
    if by == "two-hop":
        return locate(lens, known_facts(lens, "multihop", len(facts), seed))
    return locate(lens, facts)


# ------------------------------------------------------------------ what it says


def by_choice(frame: pd.DataFrame) -> pd.DataFrame:
    """A line for each method, seed and choice of layers: its parts (shares), and their harmonic mean
    as `score`."""
    keys = ["method", "seed", "layers"]
    means = frame.pivot_table(index=keys, columns="metric", values="after", sort=False)
    score = hmean(means[list(PARTS)].clip(lower=1e-9), axis=1)
    return means.assign(score=score).reset_index()


def is_random(choices: pd.DataFrame) -> pd.Series:
    """Which choices are random draws."""
    return choices["layers"].str.startswith(RANDOM)


def draws_as_good(choices: pd.DataFrame, layers: str) -> tuple[int, int]:
    """Of one method: how many random draws are as good as a choice, or better, each compared with
    the choice on the same seed's facts; and how many there are."""
    own = choices[choices["layers"] == layers].set_index("seed")["score"]
    drawn = choices[is_random(choices) & choices["seed"].isin(own.index)]
    better = drawn["score"] >= drawn["seed"].map(own)
    return int(better.sum()), len(drawn)


def chance(better: int, draws: int) -> float:
    """The p of a permutation test: how likely a choice among them is as good as this one."""
    return (1 + better) / (1 + draws)


def chance_of_other_facts(frame: pd.DataFrame, layers: str) -> tuple[float, float]:
    """Between which values p lies in 95 of 100 draws of as many of the edits, with replacement."""
    edits = frame[["seed", "case"]].drop_duplicates().reset_index(drop=True)
    rng, found = np.random.default_rng(0), []
    for _ in range(RESAMPLED):
        drawn = edits.iloc[rng.integers(len(edits), size=len(edits))]
        choices = by_choice(frame.merge(drawn, on=["seed", "case"]))
        found.append(chance(*draws_as_good(choices, layers)))
    low, high = np.quantile(found, [0.025, 0.975])
    return float(low), float(high)


def better_than_chance(method: str, layers: str) -> Decide:
    """Layers chosen so are better for an editor than random ones: of these edits, and of others."""

    def decide(frame: pd.DataFrame) -> Verdict:
        frame = frame[frame["method"] == method]
        if not {layers} < set(frame["layers"]):
            return NOT_MEASURED
        choices = by_choice(frame)
        better, draws = draws_as_good(choices, layers)
        if not draws:
            return NOT_MEASURED
        p = chance(better, draws)
        low, high = chance_of_other_facts(frame, layers)
        means = choices.groupby("layers", sort=False)["score"].mean()
        drawn = choices[is_random(choices)]["score"]
        named = ", ".join(f"{name} {means[name]:.2f}" for name in means.index if name in NAMED)
        facts = len(frame.drop_duplicates(["seed", "case"]))
        return (
            f"{named}, random {drawn.mean():.2f} ({drawn.min():.2f} to {drawn.max():.2f}); {better} "
            f"of {draws} draws are as good as {layers}, p = {p:.2f} ({facts} edits; of edits drawn from "
            f"these {low:.2f} to {high:.2f})",
            verdict_of(high < 0.05, low > 0.5),
        )

    return decide


#: how often edits are drawn
RESAMPLED = 200
#: the choices that are told beside the random ones
NAMED = (*LOCATED, "preset")


def figure(frame: pd.DataFrame) -> go.Figure:
    """The score of every choice, random draws grey."""
    choices = by_choice(frame)
    choices["chosen"] = choices["layers"].where(~is_random(choices), RANDOM)
    points = px.strip(
        choices,
        x="method",
        y="score",
        color="chosen",
        stripmode="overlay",
        hover_data=["layers", *PARTS],
        color_discrete_map={RANDOM: "#b8bec8", **dict(zip(NAMED, COLOURS, strict=False))},
        category_orders={"chosen": [RANDOM, *NAMED]},
        labels={"score": "efficacy, paraphrase and specificity", "method": "", "chosen": "layers"},
    )
    points.update_traces(marker={"size": 9})
    return laid_out(points, "Are layers that attribution chooses better than random ones?")


STATISTIC = (
    "harmonic mean of efficacy, paraphrase and specificity by likelihood, among random draws of as "
    "many layers"
)
CLAIMS = (
    Claim(
        source="ours",
        words="layers located by effects at the subject's token are better for MEMIT than random ones",
        statistic=STATISTIC,
        decide=better_than_chance("MEMIT", "effects"),
    ),
    Claim(
        source="ours",
        words="layers located by effects at the subject's token are better for ACE than random ones",
        statistic="the same",
        decide=better_than_chance("ACE", "effects"),
    ),
    Claim(
        source="ours",
        words="layers located by Eq. 9 and 10, over two-hop prompts, are better for ACE than random ones",
        statistic="the same",
        decide=better_than_chance("ACE", "two-hop"),
    ),
)
