"""The comparison of editors: method x protocol x cases x seed -> every metric, case by case.

1. `facts`: single edits with paraphrases, neighbours, multi-hop prompts, portability, locality, prompts for fluency;
   `multihop`: MQuAKE's chains of 2 to 4 hops with 1 to 4 edits, asked behind worked examples (ACE, Appendix G.1). From the
   bundled world by the task's seed, or from a file of the user's own (`data`: any format of `facts.benchmarks`; each seed
   takes others of it).
2. Settings: the model's preset (`editing.presets`), its layers too; `layers` changes ACE's: "located" (over multi-hop prompts on the
   cases' own relations), "value" and "query" (the located ones of one kind alone), "random 3" (as many, the third draw), "all".
3. One of the protocols of `evaluation.protocols`; "none" asks the unedited model.

Sources: ACE, section 6 and Tables 2 to 4; KNE, Table 1; CTP, Tables 1 and 2. Facts of one case are edited one after another.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from tempfile import TemporaryDirectory
from typing import Any, Literal

import pandas as pd
import plotly.graph_objects as go

from qv_lens.attribution.locate import Layers, locate
from qv_lens.case_study import layer_counts
from qv_lens.editing.closed_form import ACE
from qv_lens.editing.edit import Editor
from qv_lens.editing.kept import default_text, default_texts, kept_covariance
from qv_lens.editing.presets import presets
from qv_lens.editing.statistics import Statistics
from qv_lens.errors import ConfigError, unknown
from qv_lens.evaluation.metrics import FORCED
from qv_lens.evaluation.probes import Generation
from qv_lens.evaluation.protocols import PROTOCOLS, Protocol, check_metrics, evaluate, fitting, summary
from qv_lens.evaluation.subset import known, known_edits
from qv_lens.facts.benchmarks import parse, read, warn_of
from qv_lens.facts.corpora import corpus
from qv_lens.facts.prompts import G1
from qv_lens.facts.records import UNKNOWN, Case, EditCase, Fact, MultiHopCase
from qv_lens.models.lens import Lens
from qv_lens.plots import method_bars, seconds_bars
from qv_lens.sweeps.config import Recipe
from qv_lens.sweeps.engine import Context
from qv_lens.sweeps.recipes.material import at_least, check_files, knowledge
from qv_lens.world import cases as world_cases
from qv_lens.world import generator
from qv_lens.world.models import check_world, of_world

#: records of a file that are asked at once whether the model knows them
KNOWN_AT_ONCE = 256
#: documents of the bundled world for C0
DOCUMENTS = 3_000
LAYERS = ("preset", "located", "value", "query", "random", "all")
#: what a run's figure draws, where it was measured
SHOWN = (
    "efficacy_acc", "edit_success", "paraphrase_acc", "generality", "specificity_acc", "ctp_locality", "portability", "locality", "multihop_acc",
    "multihop_cot", "ctp_score",
)  # fmt: skip


@dataclass(frozen=True)
class Comparison:
    """One cell.

    `data`: 'facts', 'multihop', or a file. `count`: how many (0: 34, one batch, 100 consecutive).
    `known`: of a file's cases, only chains all of whose hops, and edits whose fact, the model answers (ACE, Appendix B.1).
    `text`: for C0: 'world', 'python', a file, a dataset ('': the default of the model). `documents`: how many texts of it (0: 3,000
    of the world, of another as many as C0 needs). `blocks`: a file of worked examples, parted by empty lines ('': the world's for
    its own models, else ACE's five of Appendix G.1). `metrics`: names, () for those that fit.
    `layers`: which ones ACE edits (see above). `skip`: which of its best-ranked ones it does not, a letter each: 'q', 'v', 'qq'.
    `edited`: how many layers in all (0: the preset's number); where that is not the preset's number, ACE's are the located
    ones; others' lie up to the preset's highest, and above it where there are too few below.
    `curve`: every how many consecutive edits all are asked. `editor`: changes to the preset.
    `preset`: the model whose presets are taken ('': the task's own).
    """

    model: str
    method: str = "ACE"
    protocol: Literal["single", "batch", "consecutive", "none"] = "single"
    data: str = "facts"
    count: int = 0
    seed: int = 0
    layers: str = "preset"
    skip: str = ""
    edited: int = 0
    batch_size: int = 32
    curve: int = 0
    metrics: tuple[str, ...] = ()
    text: str = ""
    documents: int = 0
    blocks: str = ""
    known: bool = False
    preset: str = ""
    editor: dict[str, object] | None = None

    def __post_init__(self) -> None:
        if self.count < 0:
            raise ConfigError(f"count is how many cases are drawn, 0 for the protocol's own number; got {self.count}.")
        at_least(self, batch_size=1, documents=0, edited=0, curve=0, seed=0)
        if not self.count:  # the number that a protocol is about; written out, so that it stands in the rows
            object.__setattr__(self, "count", {"batch": self.batch_size, "consecutive": 100}.get(self.protocol, 34))
        if isinstance(self.metrics, str):  # --set metrics=["fluency"] is a grid of one: each of its values alone
            object.__setattr__(self, "metrics", (self.metrics,))
        check_metrics(self.metrics)
        if self.protocol not in (*PROTOCOLS, "none"):
            raise unknown("Protocol", self.protocol, (*PROTOCOLS, "none"))
        if self.layers.split(" ")[0] not in LAYERS:
            raise unknown("Layers", self.layers, LAYERS)
        if set(self.skip) - {"q", "v"}:
            raise ConfigError(
                f"skip is a letter for each layer left out, q of the query and v of the value layers; got {self.skip!r}."
            )
        check_files(self, "data", "text", "blocks")
        if self.protocol != "none":
            self.preset_editor()

    def preset_editor(self) -> Editor:
        """The method's preset with the task's changes. Raises `ConfigError` for a model, method or setting that is not known."""
        table = presets(self.preset or self.model)
        if self.method not in table:
            raise unknown("Method", self.method, table)
        editor: Any = table[self.method].editor
        settings = {field.name for field in fields(editor)}
        for name in self.editor or ():
            if name not in settings:
                raise unknown(f"Setting of {self.method}:", name, sorted(settings))
        return replace(editor, **(self.editor or {}))


def compare(task: Comparison, context: Context) -> pd.DataFrame:
    """The rows of one cell: `evaluate`'s frame, with the layers that were written."""
    lens = context.lens(task.model)
    found = cases_of(task, context)
    protocol: Protocol = "single" if task.protocol == "none" else task.protocol
    editor = None if task.protocol == "none" else chosen(lens, task, found.cases, context)
    needs = getattr(editor, "reads_statistics", False)
    statistics = context.once(("C0", task.text, task.documents), lambda: _statistics(lens, task)) if needs else None
    kept = context.once("before", TemporaryDirectory)  # what the unedited model says of a case is asked once
    frame = evaluate(
        lens, found.cases, _metrics(task, found), editor, protocol, task.seed, statistics=statistics, batch_size=task.batch_size,
        every=task.curve or None, generation=Generation(blocks=found.blocks), cache=kept.name,
    )  # fmt: skip
    written = {
        name: list(getattr(editor, name)) for name in ("query_layers", "value_layers", "layers") if getattr(editor, name, None)
    }
    skipped = frame.attrs["skipped"]
    return frame.assign(
        written=str(written), skipped=[skipped.get(str(case), "") for case in frame["case"]], refused=found.refused, unknown=found.unknown,
        **context.once(("knowledge", task.data, task.count, task.seed, task.known), lambda: knowledge(lens, edited_facts(found.cases))),
    )  # fmt: skip


def cases_of(task: Comparison, context: Context) -> Drawn:
    """What a task is measured on, drawn once. Raises `ConfigError` for the bundled world with another model."""
    lens = context.lens(task.model)
    if task.data in ("facts", "multihop"):
        check_world(lens)
    return context.once(("cases", task.data, task.count, task.seed, task.blocks, task.known), lambda: drawn(task, lens))


def edited_facts(cases: Sequence[Case]) -> list[Fact]:
    """The facts that the cases edit, where they say what was true before."""
    facts = [request.fact for case in cases for request in case.requests]
    return [fact for fact in facts if fact.answer != UNKNOWN]


@dataclass(frozen=True)
class Drawn:
    """A task's cases and worked examples; how many records of its file could not be read, how many chains were passed over
    because the model does not know them."""

    cases: list[Case]
    blocks: tuple[str, ...]
    refused: int = 0
    unknown: int = 0


def drawn(task: Comparison, lens: Lens) -> Drawn:
    """What a task is measured on."""
    world = generator.build(0)
    if task.data in ("facts", "multihop"):
        facts, seed = task.data == "facts", 2000 + task.seed
        made = (
            world_cases.edit_cases(world, task.count, seed) if facts else parse(world_cases.mquake(world, task.count, seed)).cases
        )
        return Drawn(list(made), _examples(task, lens, made))
    got = read(task.data, skip=True)
    warn_of(got.refused)
    found, upto, passed = random.Random("editors").sample(got.cases, len(got.cases)), (task.seed + 1) * task.count, 0
    if task.known:
        waiting, found = found, []
        while waiting and len(found) < upto:
            more = _known(lens, waiting[:KNOWN_AT_ONCE])
            passed += len(waiting[:KNOWN_AT_ONCE]) - len(more)
            found, waiting = [*found, *more], waiting[KNOWN_AT_ONCE:]
    if not got.cases and got.facts:
        raise ConfigError(
            f"{task.data} holds {len(got.facts)} facts and no edits: nothing says what their new answers are. Name a file of edits (in "
            "MQuAKE's, CounterFact's, ZsRE's or KnowEdit's format), or edit one fact (qv-lens edit --new, fact.to('new answer'))."
        )
    if len(found) <= upto - task.count:
        what = f"edits of facts that {lens.name} answers, chains in all their hops," if task.known else "edits"
        raise ConfigError(
            f"{task.data} holds {len(found)} {what}, none of them for seed {task.seed}: each seed takes {task.count} others. "
            "Take a lower seed or a smaller count."
        )
    mine = found[upto - task.count : upto]
    return Drawn(mine, _examples(task, lens, mine), len(got.refused), passed)


def _known(lens: Lens, cases: Sequence[Case]) -> list[Case]:
    """The chains all of whose hops, and the edits whose fact, the model answers."""
    chains = [case for case in cases if isinstance(case, MultiHopCase)]
    edits = [case for case in cases if isinstance(case, EditCase)]
    kept = {id(case) for case in (*known(lens, chains)[0], *known_edits(lens, edits))}
    return [case for case in cases if id(case) in kept]


def _examples(task: Comparison, lens: Lens, cases: Sequence[Case]) -> tuple[str, ...]:
    """The worked examples of the task's file; else, for a model of the bundled world, of that world, about other entities
    than the cases as far as there are such; else ACE's own."""
    if task.blocks:
        return tuple(block + "\n\n" for block in _text(task.blocks).strip().split("\n\n"))
    if of_world(lens):
        rng = random.Random(f"editors:{task.seed}")
        return tuple(world_cases.cot_blocks(generator.build(0), _named(cases), rng))
    return G1


def _named(cases: Sequence[Case]) -> set[str]:
    """Every entity that a case's edits and hops name, which worked examples should not."""
    names = {text for case in cases for r in case.requests for text in (r.fact.subject, r.fact.answer, r.new)}
    hops = [hop for case in cases if isinstance(case, MultiHopCase) for hop in (*case.hops, *case.new_hops)]
    return names | {hop.answer for hop in hops}


def _text(path: str) -> str:
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"Cannot read {path}: {error}.") from error


def _metrics(task: Comparison, found: Drawn) -> list[str]:
    if task.metrics:
        return list(task.metrics)
    if isinstance(found.cases[0], MultiHopCase):
        return fitting(found.cases, (*FORCED, "multihop_direct", "multihop_cot", "multihop_cot_rate"))
    return fitting(found.cases, (*FORCED, "efficacy_gen", "paraphrase_gen", "fluency"))


def _statistics(lens: Lens, task: Comparison) -> Statistics:
    source = task.text or default_text(lens)
    if source == "world":
        check_world(lens)
    count = task.documents or (DOCUMENTS if source == "world" else 0)
    texts = list(itertools.islice(corpus(source), count)) if count else default_texts(lens, source)
    return kept_covariance(lens, texts, range(lens.n_layers), modules=("ffn", "attn"))


# ------------------------------------------------------------------ which editor, which layers


def chosen(lens: Lens, task: Comparison, cases: Sequence[Case], context: Context) -> Editor:
    """The preset, with the task's layers and changes."""
    editor = task.preset_editor()
    if not isinstance(editor, ACE):
        if task.layers != "preset" or task.skip:
            raise ConfigError(f"layers and skip choose ACE's layers; {task.method} has none of query and value.")
        return _widened(lens, task, editor) if task.edited else editor
    value, query = editor.value_layers, editor.query_layers
    own = task.layers == "preset" and task.edited in (0, len(value) + len(query))
    if own and not task.skip:
        return editor
    located = context.once(("located", task.data, task.count, task.seed, task.known), lambda: _located(lens, task, cases))
    if not own:
        value, query = _pick(lens, task, located)
    value, query = (_without(value, located.value, task.skip.count("v")), _without(query, located.query, task.skip.count("q")))
    if not value and not query:
        raise ConfigError(f"skip={task.skip!r} leaves {task.method} no layer to edit.")
    return replace(editor, value_layers=value or query, query_layers=query if value else ())


def _without(layers: Sequence[int], ranked: Sequence[int], count: int) -> tuple[int, ...]:
    """`layers` less the `count` best-ranked of them, and nothing in their place (ACE, Table 4)."""
    best = [layer for layer in ranked if layer in layers][:count]
    return tuple(layer for layer in layers if layer not in best)


def _widened(lens: Lens, task: Comparison, editor: Editor) -> Editor:
    """An editor of one group of layers at `edited` layers: those up to its highest one, and above where there are too few."""
    layers = getattr(editor, "layers", None)
    if not layers or hasattr(editor, "deep_layers"):
        raise ConfigError(f"edited sets the number of layers of one group; {task.method} has none, or two.")
    lowest = max(lens.backend_adapter.first_editable, max(layers) + 1 - task.edited)
    if lowest + task.edited > lens.n_layers:
        raise ConfigError(f"edited={task.edited}: {lens.name} has layers {lowest} to {lens.n_layers - 1}.")
    return replace(editor, layers=tuple(range(lowest, lowest + task.edited)))  # pyright: ignore[reportCallIssue, reportArgumentType]


def _located(lens: Lens, task: Comparison, cases: Sequence[Case]) -> Layers:
    """Layers ranked over prompts that say nothing about a case's own subject: two-hop prompts of the bundled world on the
    cases' relations; of a file's cases their own prompts."""
    requests = [request for case in cases for request in case.requests]
    if task.data not in ("facts", "multihop"):
        return locate(lens, [request.fact for request in requests][:100])
    world, own, relations = generator.build(0), {r.fact.subject for r in requests}, {r.fact.relation for r in requests}
    chains = [c for c in world.chains(2) if c.relations[0].id in relations and c.subject not in own]
    return locate(lens, [world_cases.as_fact(world, c) for c in random.Random("located").sample(chains, min(100, len(chains)))])


def _pick(lens: Lens, task: Comparison, located: Layers) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(value, query) layers of a task."""
    first = lens.backend_adapter.first_editable
    values, queries = layer_counts(lens)
    if task.edited:  # a fixed number in all, shared out as ACE shares it out
        queries = min(task.edited - 1, max(1, round(task.edited * queries / (values + queries))))
        values = task.edited - queries
    value, query = located.editable(values, queries, first)
    while len(value) + len(query) < task.edited and values < lens.n_layers:  # too few query layers below: more value layers
        values, queries = values + 1, max(0, queries - 1)
        value, query = located.editable(values, queries, first)
    pool = list(range(first, lens.n_layers - 1))
    if task.layers == "value":
        return value, ()
    if task.layers == "query":  # z* at the last of them
        return query, ()
    if task.layers == "all":
        return tuple(pool), ()
    if task.layers.startswith("random"):
        picked = sorted(random.Random(f"layers:{task.seed}:{task.layers}").sample(pool, len(value) + len(query)))
        return tuple(picked[len(query) :]), tuple(picked[: len(query)])
    return value, query


# ------------------------------------------------------------------ the table


def table(frame: pd.DataFrame, by: Sequence[str] = ("model", "data", "protocol", "method")) -> pd.DataFrame:
    """Means with 95% intervals over all seeds' cases, one column per metric; multi-hop accuracy also by number of edits (`_2`)
    and of hops (`_2h`)."""
    frame = frame.assign(case=frame["case"].astype(str) + ":" + frame["seed"].astype(str))
    return pd.concat([summary(part, list(by)) for part in (frame, *by_chain(frame))], ignore_index=True)


def by_chain(frame: pd.DataFrame) -> list[pd.DataFrame]:
    """The rows of multi-hop accuracy again, named by number of edits (`multihop_cot_2`), and by number of hops (`_2h`)."""
    chains = frame[frame["metric"] == "multihop_cot"]
    if chains.empty:
        return []
    return [chains.assign(metric="multihop_cot_" + chains[of].astype(str) + end) for of, end in (("edits", ""), ("hops", "h"))]


def figure(frame: pd.DataFrame) -> go.Figure:
    """Bars by what was varied (methods, layers, ...), one colour per metric; of edits each timed alone the seconds (CTP, Figure 3)."""
    fields = ("model", "data", "protocol", "method", "layers", "skip", "edited", "batch_size", "editor")
    varied = [name for name in fields if frame[name].astype(str).nunique() > 1] or ["method"]
    frame = frame.assign(what=frame[varied].astype(str).agg(" · ".join, axis=1))
    if (frame["batch_size"] == 1).all() and (frame["protocol"] == "single").all():
        return seconds_bars(frame, by="what")
    shown = table(frame, ("what",))
    return method_bars(shown[shown["metric"].isin(SHOWN)], by="what")


RECIPE = Recipe("editors", Comparison, compare, ("before", "after", "relative_norm", "seconds"), figure, version=2)
