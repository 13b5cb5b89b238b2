"""The cell that the tables comparing editors share: cases x protocol x editor -> every metric, case
by case.

1. `Cases`: what is asked. 'facts' (single edits with paraphrases, neighbours, multi-hop prompts,
   portability, locality, prompts for fluency), 'multihop' (chains of MQuAKE's kind, after worked
   examples: ACE, Appendix G.1), or a file in any format of `facts.benchmarks`. Both are of the
   bundled world for its own models (chains of 2 to 4 hops with 1 to 4 edits), and of the atlas for
   any other, of what it knows (2 hops, 1 or 2 edits). Each seed takes others.
2. `Protocol`: one of `evaluation.protocols`; "none" asks the unedited model.
3. `Choice`: the editor, at the model's preset (`editing.presets`), its layers too; with another
   number of layers (`edited`) ACE edits those located over multi-hop prompts on the cases' own
   relations.

Sources: ACE, section 6 and Tables 2 to 4; KNE, Table 1; CTP, Tables 1 and 2. Facts of one case are
edited one after another."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from tempfile import TemporaryDirectory
from typing import Any, Literal

import pandas as pd
import plotly.graph_objects as go

from experiments.models import DATA
from experiments.prompts import ATLAS, at_least, chained, check_files, usual
from qv_lens.attribution.locate import Layers, layer_counts, locate
from qv_lens.editing.closed_form import ACE
from qv_lens.editing.job import Editor, reads_statistics
from qv_lens.editing.kept_statistics import default_text, default_texts, kept_covariance
from qv_lens.editing.presets import presets, with_settings
from qv_lens.editing.statistics import Statistics
from qv_lens.errors import ConfigError, unknown
from qv_lens.evaluation.cases import DrawnCases, first_known_cases, of_seed
from qv_lens.evaluation.known_cases import answered_onward, as_said, first_known, knowledge
from qv_lens.evaluation.protocols import check_metrics, evaluate
from qv_lens.evaluation.questions import Generation
from qv_lens.evaluation.selection import PROTOCOLS, usual_count, usual_metrics
from qv_lens.evaluation.selection import Protocol as ProtocolName
from qv_lens.evaluation.summary import summary
from qv_lens.facts.atlas import atlas, chains, edit_case
from qv_lens.facts.chain_cases import chain_case
from qv_lens.facts.corpora import corpus
from qv_lens.facts.records import Fact, edited_facts
from qv_lens.models.lens import Lens
from qv_lens.plots import method_bars, seconds_bars
from qv_lens.reporting.tables import as_text
from qv_lens.runs.experiment import Once, directly
from qv_lens.world import cases as world_cases
from qv_lens.world import generator
from qv_lens.world.evaluation import OF_WORLD, cases_of, examples_of
from qv_lens.world.models import check_world

#: documents of the bundled world for C0
DOCUMENTS = 3_000
#: prompts over which layers are located
LOCATED_OVER = 100
#: what a run's figure draws, where it was measured
SHOWN = (
    "efficacy_acc", "edit_success", "paraphrase_acc", "generality", "specificity_acc", "ctp_locality", "portability", "locality",
    "multihop_acc", "multihop_cot", "ctp_score",
)  # fmt: skip
MEASURES = ("before", "after", "relative_norm", "seconds")
#: rows of an earlier version were made with other worked examples
VERSION = 2


@dataclass(frozen=True)
class Cases:
    """What is asked."""

    data: str = "facts"
    """'facts', 'multihop', or a file of edits."""
    count: int = 0
    """How many cases (0: 34, one batch, 100 consecutive)."""
    seed: int = 0
    """Which ones; also the seed of every other draw."""
    known: bool = False
    """Of a file: only chains all of whose hops, and edits whose fact, the model answers (ACE,
    Appendix B.1)."""
    blocks: str = ""
    """A file of worked examples, separated by empty lines ('': the world's for its own models, else
    ACE's five)."""
    metrics: tuple[str, ...] = ()
    """Names of metrics (none: those that fit the cases)."""

    def __post_init__(self) -> None:
        if self.count < 0:
            raise ConfigError(
                "count is how many cases are drawn, 0 for the protocol's own number; got "
                f"{self.count}."
            )
        at_least(self, seed=0)
        # --set metrics=["fluency"] is a grid of one: each of its values alone
        one_alone = isinstance(self.metrics, str)
        object.__setattr__(self, "metrics", (self.metrics,) if one_alone else tuple(self.metrics))
        check_metrics(self.metrics)
        check_files(self, "data", "blocks")


@dataclass(frozen=True)
class Protocol:
    """How the edits follow one another."""

    protocol: Literal["single", "batch", "consecutive", "none"] = "single"
    """One at a time, in batches, in a row without putting back, or no edit at all."""
    batch_size: int = 32
    """Cases edited together."""
    curve: int = 0
    """Every how many consecutive edits all are asked (0: at the end alone)."""

    def __post_init__(self) -> None:
        at_least(self, batch_size=1, curve=0)
        if self.protocol not in (*PROTOCOLS, "none"):
            raise unknown("Protocol", self.protocol, (*PROTOCOLS, "none"))

    @property
    def edits(self) -> bool:
        """Whether anything is edited."""
        return self.protocol != "none"

    @property
    def every(self) -> int | None:
        """Every how many edits `evaluate` asks."""
        return (self.curve or None) if self.protocol == "consecutive" else None

    @property
    def name(self) -> ProtocolName:
        """What `evaluate` calls it; the unedited model is asked case by case."""
        return "single" if self.protocol == "none" else self.protocol


@dataclass(frozen=True)
class Choice:
    """Which editor, at which layers, on which statistics."""

    method: str = "ACE"
    """The editor's name among the presets."""
    preset: str = ""
    """The model whose presets are taken ('': the task's own)."""
    editor: dict[str, object] | None = None
    """Changes to the preset."""
    skip: str = ""
    """Which of its best-ranked layers it does not edit, a letter each: 'q', 'v', 'qq'."""
    edited: int = 0
    """How many layers in all (0: the preset's number). With any other number, ACE edits the located
    layers. Other editors edit the layers up to the preset's highest, and layers above it where
    there are too few below."""
    text: str = ""
    """Text for C0: 'world', 'python', a file, a dataset ('': the default of the model)."""
    documents: int = 0
    """How many texts of it (0: 3,000 of the world, of another as many as C0 needs)."""

    def __post_init__(self) -> None:
        at_least(self, documents=0, edited=0)
        if set(self.skip) - {"q", "v"}:
            raise ConfigError(
                "skip is a letter for each layer left out, q of the query and v of the value "
                f"layers; got {self.skip!r}."
            )
        check_files(self, "text")

    def at(self, model: str) -> Editor:
        """The method's preset with the changes. Raises `ConfigError` for a model, method or setting
        that is not known."""
        table = presets(self.preset or model)
        if self.method not in table:
            raise unknown("Method", self.method, table)
        return with_settings(table[self.method].editor, self.editor or {})


@dataclass(frozen=True)
class Task:
    """One cell."""

    model: str
    """The model's name."""
    choice: Choice = field(default_factory=Choice)
    protocol: Protocol = field(default_factory=Protocol)
    cases: Cases = field(default_factory=Cases)

    def __post_init__(self) -> None:
        # the number that a protocol is about; written out, so that it stands in the rows
        if not self.cases.count:
            count = usual_count(self.protocol.name, self.protocol.batch_size)
            object.__setattr__(self, "cases", replace(self.cases, count=count))
        if self.protocol.edits:
            self.choice.at(self.model)


def rows(task: Task, lens: Lens, once: Once = directly) -> pd.DataFrame:
    """The rows of one cell: `evaluate`'s frame, with the layers that were written."""
    cases = task.cases
    drawn = _drawn(lens, cases, once)
    examples = once(_examples, lens, cases, once)
    editor = chosen(lens, task, once) if task.protocol.edits else None
    frame = evaluate(
        lens,
        drawn.cases,
        cases.metrics or usual_metrics(drawn.cases),
        editor,
        task.protocol.name,
        cases.seed,
        statistics=once(statistics_of, lens, task.choice.text, task.choice.documents)
        if reads_statistics(editor)
        else None,
        batch_size=task.protocol.batch_size,
        every=task.protocol.every,
        generation=Generation(blocks=examples),
        cache=once(TemporaryDirectory).name,  # what the unedited model says of a case is asked once
    )
    written = {}
    for name in ("query_layers", "value_layers", "layers"):
        if getattr(editor, name, None):
            written[name] = list(getattr(editor, name))
    skipped = frame.attrs["skipped"]
    return frame.assign(
        written=str(written),
        skipped=[skipped.get(str(case), "") for case in frame["case"]],
        refused=drawn.refused,
        unknown=drawn.unknown,
        **once(_knowledge, lens, cases, once),
    )


def _drawn(lens: Lens, cases: Cases, once: Once) -> DrawnCases:
    return drawn_cases(lens, cases.data, cases.count, cases.seed, cases.known, once)


def drawn_cases(
    lens: Lens, data: str, count: int, seed: int, known: bool, once: Once
) -> DrawnCases:
    """`count` cases of a file; 'facts' and 'multihop' are the bundled world's for its models, for
    others those of the atlas that the model knows."""
    if data in OF_WORLD and usual(lens, "") == ATLAS:
        return once(_of_atlas if data == "facts" else _chains_of_atlas, lens, count, seed)
    return once(cases_of, lens, data, count, seed, known)


def _of_atlas(lens: Lens, count: int, seed: int) -> DrawnCases:
    """Edits of facts of the atlas that the model knows, with the multi-hop prompts that it answers;
    each seed takes others."""
    facts = random.Random("editors").sample(atlas(), len(atlas()))
    known = first_known(lens, facts, (seed + 1) * count)
    chosen = of_seed(known, count, seed, f"{lens.name} knows {len(known)} facts of the atlas")
    return DrawnCases([answered_onward(lens, edit_case(fact, seed)) for fact in chosen])


def _chains_of_atlas(lens: Lens, count: int, seed: int) -> DrawnCases:
    """Two-hop chains of the atlas, one or both facts edited, of which the model answers both facts;
    each seed takes others."""
    shuffled = random.Random("editors").sample(chains(), len(chains()))
    cases = [chain_case(chain, seed, number) for number, chain in enumerate(shuffled)]
    edited = [case for case in cases if case is not None]
    known, passed = first_known_cases(lens, edited, (seed + 1) * count)
    beginning = f"{lens.name} answers both facts of {len(known)} chains of the atlas"
    return DrawnCases(of_seed(known, count, seed, beginning), 0, passed)


def _examples(lens: Lens, cases: Cases, once: Once) -> tuple[str, ...]:
    return examples_of(lens, _drawn(lens, cases, once).cases, cases.seed, cases.blocks)


def _knowledge(lens: Lens, cases: Cases, once: Once) -> dict[str, int]:
    return knowledge(lens, edited_facts(_drawn(lens, cases, once).cases))


def statistics_of(lens: Lens, text: str, documents: int) -> Statistics:
    """C0 over a text, as `Choice.text` and `Choice.documents` name it."""
    source = text or default_text(lens)
    if source == "world":
        check_world(lens)
    count = documents or (DOCUMENTS if source == "world" else 0)
    texts = list(itertools.islice(corpus(source), count)) if count else default_texts(lens, source)
    return kept_covariance(lens, texts, range(lens.n_layers), modules=("ffn", "attn"))


# ------------------------------------------------------------------ which editor, which layers


def chosen(lens: Lens, task: Task, once: Once = directly) -> Editor:
    """The preset, with the task's layers and changes."""
    choice = task.choice
    editor = choice.at(task.model)
    if not isinstance(editor, ACE):
        if choice.skip:
            raise ConfigError(
                f"skip leaves out some of ACE's layers; {choice.method} has none of query and value."
            )
        return _widened(lens, choice, editor) if choice.edited else editor
    value = editor.value_layers
    query = editor.query_layers
    own = choice.edited in (0, len(value) + len(query))
    if own and not choice.skip:
        return editor
    located = once(_located, lens, task.cases, once)
    if not own:
        value, query = _picked(lens, choice.edited, located)
    value = _without(value, located.value, choice.skip.count("v"))
    query = _without(query, located.query, choice.skip.count("q"))
    if not value and not query:
        raise ConfigError(f"skip={choice.skip!r} leaves {choice.method} no layer to edit.")
    return replace(editor, value_layers=value or query, query_layers=query if value else ())


def _without(layers: Sequence[int], ranked: Sequence[int], count: int) -> tuple[int, ...]:
    """`layers` less the `count` best-ranked of them, and nothing in their place (ACE, Table 4)."""
    best = [layer for layer in ranked if layer in layers][:count]
    return tuple(layer for layer in layers if layer not in best)


def _widened(lens: Lens, choice: Choice, editor: Editor) -> Editor:
    """An editor of one group of layers at `edited` layers: those up to its highest one, and above
    where there are too few."""
    layers = getattr(editor, "layers", None)
    if not layers or hasattr(editor, "deep_layers"):
        raise ConfigError(
            f"edited sets the number of layers of one group; {choice.method} has none, or two."
        )
    lowest = max(lens.backend_adapter.first_editable, max(layers) + 1 - choice.edited)
    if lowest + choice.edited > lens.n_layers:
        raise ConfigError(
            f"edited={choice.edited}: {lens.name} has layers {lowest} to {lens.n_layers - 1}."
        )
    wider: Any = editor
    return replace(wider, layers=tuple(range(lowest, lowest + choice.edited)))


def _located(lens: Lens, cases: Cases, once: Once) -> Layers:
    """Layers ranked over prompts that say nothing about a case's own subject: two-hop prompts of
    the bundled world, or such of the atlas as the model knows, on the cases' relations; of a file's
    cases their own prompts."""
    facts = [request.fact for case in _drawn(lens, cases, once).cases for request in case.requests]
    if cases.data not in OF_WORLD:
        return locate(lens, facts[:LOCATED_OVER])
    own = {fact.subject for fact in facts}
    relations = {fact.relation for fact in facts}
    if usual(lens, "") == ATLAS:
        return locate(lens, _known_chains(lens, relations, own))
    world = generator.build(0)
    chains = [
        chain
        for chain in world.chains(2)
        if chain.relations[0].id in relations and chain.subject not in own
    ]
    drawn = random.Random("located").sample(chains, min(LOCATED_OVER, len(chains)))
    return locate(lens, [world_cases.as_fact(world, chain) for chain in drawn])


def _known_chains(lens: Lens, relations: set[str | None], without: set[str]) -> list[Fact]:
    """Two-hop prompts of the atlas over one of the relations, about other subjects."""
    over = [
        chained(chain)
        for chain in chains()
        if {chain.first.relation, chain.second.relation} & relations
        and not {chain.first.subject, chain.second.subject} & without
    ]
    if not over:
        raise ConfigError(
            "The atlas has no two-hop prompts over the cases' relations "
            f"({', '.join(sorted(filter(None, relations)))}): ACE's layers cannot be located on them. "
            "Leave layers, skip and edited as they are, or name a file of edits (data)."
        )
    shuffled = random.Random("located").sample(over, len(over))
    return as_said(lens, first_known(lens, shuffled, LOCATED_OVER))


def _picked(lens: Lens, edited: int, located: Layers) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(value, query) layers, `edited` in all, shared out as ACE shares its own out."""
    first = lens.backend_adapter.first_editable
    values, queries = layer_counts(lens)
    queries = min(edited - 1, max(1, round(edited * queries / (values + queries))))
    values = edited - queries
    value, query = located.editable(values, queries, first)
    # too few query layers below: more value layers
    while len(value) + len(query) < edited and values < lens.n_layers:
        values += 1
        queries = max(0, queries - 1)
        value, query = located.editable(values, queries, first)
    return value, query


# ------------------------------------------------------------------ the table


def table(
    frame: pd.DataFrame, by: Sequence[str] = ("model", "data", "protocol", "method")
) -> pd.DataFrame:
    """Means with 95% intervals over all seeds' cases, one column per metric; multi-hop accuracy
    also by number of edits (`_2`) and of hops (`_2h`)."""
    frame = frame.assign(case=frame["case"].astype(str) + ":" + frame["seed"].astype(str))
    return pd.concat(
        [summary(part, list(by)) for part in (frame, *by_chain(frame))], ignore_index=True
    )


def by_chain(frame: pd.DataFrame) -> list[pd.DataFrame]:
    """The rows of multi-hop accuracy again, named by number of edits (`multihop_cot_2`), and by
    number of hops (`_2h`)."""
    chains = frame[frame["metric"] == "multihop_cot"]
    if chains.empty:
        return []
    by_edits = chains.assign(metric="multihop_cot_" + chains["edits"].astype(str))
    by_hops = chains.assign(metric="multihop_cot_" + chains["hops"].astype(str) + "h")
    return [by_edits, by_hops]


#: fields of a task that a figure tells apart, where they were varied
VARIED = ("model", "data", "protocol", "method", "skip", "edited", "batch_size")


def by_setting(frame: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """Rows of runs with the editor's changed settings as columns, in the place of `editor`, and the
    names of these columns; rows that have them already as they are."""
    if "editor" not in frame:
        return frame, []
    settings = [
        {} if value in (None, "null") or value != value else json.loads(value)
        for value in frame["editor"]
    ]
    varied = pd.json_normalize(settings).set_axis(frame.index)
    varied = varied.rename(columns=lambda name: f"editor.{name}" if name in frame else name)
    # a list of matrices as text: it has to be compared
    varied = varied.map(str) if "parameters" in varied else varied
    return pd.concat([frame.drop(columns="editor"), varied], axis=1), list(varied)


def timed(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows whose seconds are an edit's: a seed's first case samples the contexts as well."""
    return frame[frame["case"] > 0]


def figure(
    frame: pd.DataFrame, by: Sequence[str] = (), title: str = "Mean and 95% interval"
) -> go.Figure:
    """Bars by what was varied (methods, settings, ...), each set of data apart, one colour per
    metric; of edits each timed alone the seconds (CTP, Figure 3).

    `by`: the columns that were varied; those of `VARIED` and the changes to the editor where none
    are named."""
    frame, settings = by_setting(frame)
    if "data" in frame:
        frame = frame.assign(data=frame["data"].replace(DATA))
    varied = [
        name
        for name in ((*by, "data") if by else (*VARIED, *settings))
        if name in frame and as_text(frame[name]).nunique() > 1
    ]
    names = varied or list(by[-1:]) or ["method"]
    values = frame[list(names)].apply(lambda column: as_text(column).str.strip("[]'"))
    frame = frame.assign(what=values.agg(" · ".join, axis=1))
    if (frame["batch_size"] == 1).all() and (frame["protocol"] == "single").all():
        later = timed(frame)
        return seconds_bars(later if len(later) else frame, title, by="what")
    means = table(frame, ("what",))
    return method_bars(means[means["metric"].isin(SHOWN)], title, by="what")
