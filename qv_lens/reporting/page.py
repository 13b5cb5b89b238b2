"""report(): a Study -> one HTML page.

What the page says stands in templates/study.html.j2; here are the numbers, tables and pictures that
it is given."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pandas as pd

from qv_lens import plots
from qv_lens.case_study import IN_ROUNDS, LOCATED_VARIANT, Study
from qv_lens.errors import check_kind
from qv_lens.evaluation.ablation import DROP
from qv_lens.evaluation.faithfulness import RANDOM, lost_at
from qv_lens.facts.prompts import contains, one_line
from qv_lens.reporting.document import Picture, document, picture, write
from qv_lens.reporting.graph import drawing
from qv_lens.reporting.tables import (
    Cell,
    Column,
    Table,
    by_layer,
    cell,
    fixed,
    shown_tokens,
    table,
)

#: what stands in columns of numbers, and how it is shown
HEADS: Mapping[str, Column] = MappingProxyType({
    "count": Column("neurons zeroed", "how many", number=True, digits=0),
    "n": Column("prompts", "how many were asked", number=True, digits=0),
    "clean": Column("right before", "share of the prompts", number=True, share=True),
    "accuracy": Column("right without them", "share of the prompts", number=True, share=True),
    "drop_points": Column("drop, points", "percentage points lost", number=True, digits=1),
    "drop_relative": Column("drop, of what was right", "share of the right answers lost", number=True, share=True),
    "logprob_change": Column("change of log p, nats", "of the answer, mean", number=True),
    "logprob": Column("log p, nats", "of the answer, mean", number=True),
})  # fmt: skip
#: metrics in words
METRICS: Mapping[str, str] = MappingProxyType({
    "efficacy_gen": "it says the new answer (efficacy_gen)",
    "paraphrase_gen": "it says so in other words (paraphrase_gen)",
    "specificity_gen": "it says other subjects' answers (specificity_gen)",
    "efficacy_acc": "the new answer is the likeliest (efficacy_acc)",
    "efficacy_success": "the new answer is likelier than the old (efficacy_success)",
    "paraphrase_acc": "so it is in other words (paraphrase_acc)",
    "specificity_acc": "other subjects keep their answer (specificity_acc)",
    "multihop_acc": "what follows over two hops (multihop_acc)",
    "score_gen": "harmonic mean of the three that it says (score_gen)",
    "score_acc": "harmonic mean of efficacy, paraphrase and specificity (score_acc)",
})  # fmt: skip
#: a loss of accuracy that no table is needed for: half of the last digit shown, in points
NOTHING = 0.05
#: heads whose attention is shown without asking
HEADS_SHOWN = 8


@dataclass(frozen=True)
class Token:
    """One token of the prompt's strip."""

    text: str
    """The token."""
    score: str
    """FFN's and attention's importance there, nats."""
    shade: str
    """rgba, as deep as the score is large."""
    told: str
    """Both parts, and what the model would say there."""


@dataclass(frozen=True)
class Loss:
    """Accuracy before and after something was taken away."""

    table: Table
    """Every group."""
    lost: bool
    """Whether any number of it moves."""
    right: bool
    """Whether any answer was right before."""


def report(study: Study, path: str | Path, command: str = "") -> Path:
    """Write the page. `command` is what reproduces it. Raises `ConfigError` if the path cannot be
    written."""
    check_kind(study, Study, "A page is written of a study, as qv.study gives it")
    return write(document("study.html.j2", **_view(study, command)), path)


def _view(study: Study, command: str) -> dict[str, Any]:
    """Everything that the template asks for."""
    fact, new = study.request.fact, study.request.new
    head, _, tail = fact.prompt.partition("{}")
    value, query = _edited_layers(study)
    tokens = study.tokens["token"].tolist()
    graph = drawing(study.nodes, study.edges, tokens)
    nodes = {(node.layer, node.neuron): node.id for node in graph.nodes}
    return {
        "title": f"{fact.text} {fact.answer} → {new}",
        "model": study.settings["model"],
        "neurons": int(study.settings["neurons"]),
        "cloze": (head, fact.subject, tail),
        "answer": fact.answer,
        "new": new,
        "answered": study.answered.strip(),
        "share": f"{100 * math.exp(study.logprob):.1f}%",
        "logprob": fixed(study.logprob, 2),
        "known": study.known,
        "material": study.material.to_dict("records"),
        **_removal(study),
        "graph": graph,
        "tested": study.edges.attrs["tested"],
        "targets": study.query.settings["targets"],
        "code": _code(study),
        "strip_tokens": _strip(study.tokens),
        "lens_rows": _beliefs(study.beliefs),
        "lens_tokens": tokens,
        "neuron_tables": [
            _neurons(title, name, head, frame, nodes)
            for title, name, head, frame in (
                ("Top value neurons (Eq. 9)", "value", "direct, Eq. 9", study.value_tokens),
                ("Top query neurons (Eq. 10)", "query", "Eq. 10", study.query_tokens),
                (
                    "Neurons of the largest effect (gradient)",
                    "effect",
                    "effect, to first order",
                    study.effect_tokens,
                ),
            )
        ],
        "heads": _heads(study),
        "attention": _attention(study.attention),
        "prompts_located": study.layers.frame.attrs["prompts"],
        "value_layers": value,
        "query_layers": query,
        "profile": picture(
            "layers",
            plots.layer_profile(study.profile, "Layers, nats per fact"),
            by_layer("layers", study.profile, "kind"),
        ),
        "head_map": picture(
            "heads",
            plots.head_heatmap(study.heads, "Attention heads of this prompt"),
            by_layer("heads", study.heads, "head"),
        ),
        "ablation": _ablation(study),
        "suppression": _suppression(study),
        **_edit(study),
        "command": command,
        "settings": _settings(study),
    }


# ------------------------------------------------------------------ the removal curve


def _removal(study: Study) -> dict[str, Any]:
    """At how many neurons the answer is lost, the curves of each fact, and what few neurons bring
    back."""
    lost = lost_at(study.removal)
    own = lost[lost["prompt"] == 0]
    by_chance = own[own["ranking"] == RANDOM]["k"]
    counts = [
        (_count(own, name), label)
        for name, label in (
            ("Eq. 9", "Eq. 9 (value neurons)"),
            ("gradient", "gradient times activation"),
            (IN_ROUNDS, "the gradient asked again after every five"),
        )
    ]
    kept = study.kept.groupby(["ranking", "k"], sort=False)["logprob"].mean().unstack("k")
    columns = {"ranking": Column("ranking")} | {
        k: Column(f"{k:,} kept", "log p of the answer, nats", number=True, digits=2) for k in kept
    }
    return {
        "lost_at": counts,
        "lost_at_random": (int(by_chance.notna().sum()), len(by_chance)),
        "most": int(study.removal["k"].max()),
        "without": [
            (name, k, one_line(text), _holds(text, study.request.fact.answer))
            for name, k, text in study.without.itertuples(index=False)
        ],
        "asked": bool(study.removal.loc[study.removal["prompt"] == 0, "known"].all()),
        "curves": list(_curves(study)),
        "removal_table": _lost(study, lost),
        "kept": picture(
            "kept",
            plots.removal_curve(study.kept, "What comes back of the answer"),
            table("kept", kept.reset_index(), columns),
        ),
    }


def _holds(text: str, answer: str) -> bool:
    """Whether a text still names the answer."""
    return contains(text, [answer])


def _curves(study: Study) -> Iterable[Picture]:
    """A picture for each fact that was asked."""
    for prompt, rows in study.removal.groupby("prompt"):
        whose = rows["whose"].iloc[0]
        figure = plots.removal_curve(rows, f"<b>{whose.capitalize()}</b>")
        yield picture(f"removal-{prompt}", figure)


def _count(own: pd.DataFrame, ranking: str) -> str:
    k = own[own["ranking"] == ranking]["k"].iloc[0]
    return f"{int(k)} neurons" if k == k else "none of the numbers tried"


def _lost(study: Study, lost: pd.DataFrame) -> Table:
    """A row for each fact, a column for each ranking: at how many neurons the answer is lost
    (`lost_at`); of random draws how many lose it."""
    rows = []
    for prompt, about in study.removal.groupby("prompt"):
        row = {"whose": about["whose"].iloc[0], "fact": about["text"].iloc[0]}
        for ranking, part in lost[lost["prompt"] == prompt].groupby("ranking", sort=False):
            row[ranking] = _in_words(part["k"], bool(about["known"].all()))
        rows.append(row)
    rankings = {name: Column(f"lost at, by {name}") for name in study.removal["ranking"].unique()}
    heads = {"whose": Column("whose"), "fact": Column("fact"), **rankings}
    return table("lost-at", pd.DataFrame(rows), heads)


def _in_words(k: pd.Series, known: bool) -> str:
    if not known:
        return "not known before"
    if k.notna().all():
        return f"{k.median():.0f}"
    return f"{k.notna().sum()} of {len(k)} draws" if len(k) > 1 else "not lost"


# ------------------------------------------------------------------ tokens, neurons, heads


def _strip(tokens: pd.DataFrame) -> list[Token]:
    """The prompt's tokens, coloured by their importance."""
    total = tokens["ffn"] + tokens["attn"]
    limit = float(total.abs().max()) or 1.0
    strip = []
    for row, value in zip(tokens.itertuples(), total, strict=True):
        promoted = ", ".join(shown_tokens(row.promoted, 5))
        hover = f"FFN {row.ffn:+.3f}, attention {row.attn:+.3f} nats; next: {promoted}"
        shade = _shade(value > 0, 0.7 * abs(value) / limit)
        strip.append(Token(str(row.token) or "·", fixed(value, 2), shade, hover))
    return strip


def _shade(more: bool, depth: float) -> str:
    """Blue for more, orange for less."""
    return f"rgba({'42,111,219' if more else '224,123,57'},{depth:.2f})"


def _beliefs(beliefs: pd.DataFrame) -> list[tuple[int, list[tuple[str, str, str]]]]:
    """Of each layer, the highest first: at each token what the model would say, its shade, and the
    whole of it in words."""
    rows = []
    for layer, part in beliefs.sort_values(["layer", "position"]).groupby("layer"):
        cells = []
        for at in part.itertuples():
            words = shown_tokens(at.promoted, 5)
            hover = (
                f"layer {layer}, at {at.token!r}: {', '.join(words)}; likeliest "
                f"{100 * at.probability:.1f}%, the answer {100 * at.answer:.2f}%"
            )
            cells.append((words[0], _shade(True, 0.7 * at.probability), hover))
        rows.append((int(layer), cells))
    return rows[::-1]


def _neurons(
    title: str,
    name: str,
    head: str,
    frame: pd.DataFrame,
    nodes: Mapping[tuple[int, int], str],
) -> tuple[str, Table]:
    """A vocabulary frame as a table, its neurons tied to the pathway's nodes."""
    m = Column("m", "the neuron's coefficient", number=True, digits=2)
    score = Column(f"{head}, nats", "of the answer's log p", number=True, digits=4)
    loss = Column("zeroed alone, nats", "change of the answer's log p", number=True, digits=4)
    columns = (
        Column("neuron"),
        m,
        score,
        *([loss] if "alone" in frame else []),
        Column("promotes"),
    )
    rows = []
    for row in frame.itertuples():
        neuron = f"f{row.layer}-{row.neuron}"
        rows.append(
            (
                Cell(
                    neuron,
                    neuron,
                    node=nodes.get((row.layer, row.neuron), ""),
                    anchor=f"{name}-{neuron}",
                ),
                cell(float(row.coefficient), m),
                cell(float(row.score), score),
                *([cell(float(row.alone), loss)] if "alone" in frame else []),
                Cell(value=" ".join(row.promoted), tokens=shown_tokens(row.promoted, 8)),
            )
        )
    return title, Table(f"{name}-neurons", columns, tuple(rows))


def _heads(study: Study) -> list[dict[str, Any]]:
    """The heads that raise the answer most, and where they look from the last token."""
    raising = study.heads[study.heads["head"].notna() & (study.heads["score"] > 0)]
    best = raising.nlargest(HEADS_SHOWN, "score")
    weights = study.attention.set_index(["layer", "head"])
    shown = []
    for row in best.itertuples():
        part = weights.loc[[(row.layer, int(row.head))]]
        tokens = [
            (token, _shade(True, 0.7 * weight), f"{100 * weight:.1f}%")
            for token, weight in zip(part["token"], part["weight"], strict=True)
        ]
        name = f"a{row.layer}-{int(row.head)}"
        shown.append({"name": name, "score": fixed(row.score, 3), "tokens": tokens})
    return shown


def _attention(attention: pd.DataFrame) -> dict[str, Any]:
    """Weights by layer, head and token, for the script."""
    shape = [attention[name].nunique() for name in ("layer", "head", "position")]
    weights = attention.sort_values(["layer", "head", "position"])["weight"].round(3)
    tokens = attention.drop_duplicates("position").sort_values("position")["token"]
    return {
        "weights": weights.to_numpy().reshape(shape).tolist(),
        "tokens": tokens.tolist(),
    }


def _code(study: Study) -> tuple[str, str]:
    """Python that zeroes one neuron of this study's fact: what stands before its layer and number,
    and what behind."""
    fact = study.request.fact
    space = "" if fact.space is None else f", space={fact.space}"
    before = (
        f"import qv_lens as qv\nlens = qv.load({study.settings['model']!r})\n"
        f"fact = qv.Fact({fact.prompt!r}, {fact.subject!r}, {fact.answer!r}{space})\n"
        "neuron = qv.NeuronSet.of([("
    )
    return before, ")])\nwith lens.intervene(qv.Zero(neuron)):\n    print(lens.logprob(fact))"


# ------------------------------------------------------------------ layers, ablation


def _edited_layers(study: Study) -> tuple[str, str]:
    """ACE's located layers as text: value, query."""
    label = study.edits.loc[study.edits["variant"] == LOCATED_VARIANT, "layers"].iloc[0]
    value, _, query = label.removeprefix("value ").partition(", query ")
    return value.strip("[]"), query.strip("[]") or "none"


def _ablation(study: Study) -> Loss | None:
    """Accuracy without 1% of the neurons; None where nothing was asked."""
    if study.ablation.empty:
        return None
    means = study.ablation.groupby(["neurons", "group"], sort=False)[["count", *DROP]].mean()
    return _loss("ablation", means.reset_index(), ("neurons", "group"))


def _suppression(study: Study) -> Loss | None:
    """Two-hop accuracy without query neurons; None where nothing was asked."""
    if study.suppression.empty:
        return None
    words = [name for name in study.suppression if name not in HEADS]
    return _loss("suppression", study.suppression, words)


def _loss(name: str, frame: pd.DataFrame, words: Iterable[str]) -> Loss:
    # one answer lost and another gained leave the points as they were
    moved = (frame["drop_points"].abs() > NOTHING) | (frame["drop_relative"].abs() > NOTHING / 100)
    right = frame["clean"] > 0
    return Loss(_told(name, frame, words), bool(moved.any()), bool(right.any()))


def _told(name: str, frame: pd.DataFrame, words: Iterable[str]) -> Table:
    """A frame of words and of numbers that `HEADS` describes."""
    heads = {word: Column(str(word).replace("_", " ")) for word in words}
    return table(name, frame, heads | {c: HEADS[c] for c in frame if c in HEADS})


# ------------------------------------------------------------------ the edit


def _edit(study: Study) -> dict[str, Any]:
    layers = study.edits.drop_duplicates("variant")[["variant", "layers"]]
    nowhere: Mapping[tuple[int, int], str] = {}
    return {
        "restored": study.restored,
        "edits": int(study.edits["cases"].max()) - 1,
        "probes": _probes(study.probes),
        "verdicts": _verdicts(study),
        "bars": picture(
            "edits", plots.metric_bars(_bars(study.edits), "Before and after the edit")
        ),
        "edit_layers": list(layers.itertuples(index=False, name=None)),
        "edit_table": _metrics(study.edits),
        "states": picture(
            "states",
            plots.before_after(
                study.states,
                f"FFN importance by layer, before and after the edit by {LOCATED_VARIANT}",
            ),
            by_layer("states", study.states, "state"),
        ),
        "strip_after": _strip(study.tokens_after),
        "value_before": _neurons(
            "",
            "value-before",
            "Eq. 9",
            study.value_tokens.head(6).drop(columns="alone", errors="ignore"),
            nowhere,
        )[1],
        "value_after": _neurons(
            "", "value-after", "Eq. 9", study.value_tokens_after.head(6), nowhere
        )[1],
    }


def _bars(edits: pd.DataFrame) -> pd.DataFrame:
    """Without intervals where there is one edit: they would span everything."""
    few = edits["cases"] < 2
    return edits.assign(low=edits["low"].mask(few), high=edits["high"].mask(few))


def _metrics(edits: pd.DataFrame) -> Table:
    """A row for each metric, a column for each editor: the share after, and its 95% interval."""
    share = Column("before", "share of the prompts, before the edit", number=True, share=True)
    variants = list(edits["variant"].unique())
    heads = [Column("metric"), Column("edits"), share]
    heads += [
        Column(name, "share of the prompts after the edit, and its 95% interval", number=True)
        for name in variants
    ]
    rows = []
    for metric, part in edits.groupby("metric", sort=False):
        first, by_variant = part.iloc[0], part.set_index("variant")
        row = [
            Cell(METRICS.get(str(metric), str(metric)), str(metric)),
            Cell(str(int(first["cases"])), str(int(first["cases"]))),
            cell(float(first["before"]), share),
        ]
        for name in variants:
            after, low, high = by_variant.loc[name, ["after", "low", "high"]]
            shown = low == low and int(first["cases"]) > 1
            around = f" ({100 * low:.0f} to {100 * high:.0f})" if shown else ""
            row.append(Cell(f"{100 * after:.1f}%{around}", repr(float(after))))
        rows.append(tuple(row))
    return Table("edits", tuple(heads), tuple(rows))


def _verdicts(study: Study) -> list[tuple[str, bool, str]]:
    """Of each editor whether the model now says the new answer to the edited prompt, and what it
    says."""
    first = study.probes.iloc[0]
    names = [str(name) for name in study.probes.columns[4:]]
    new = study.request.new
    return [(name, contains(str(first[name]), [new]), one_line(str(first[name]))) for name in names]


def _probes(probes: pd.DataFrame) -> Table:
    """What the model says before and after, changed answers marked."""
    names = [str(name) for name in probes]
    columns = {
        name: Column({"kind": "asked", "wanted": "wanted after"}.get(name, name)) for name in names
    }
    fixed_columns = ("kind", "prompt", "wanted", "before")
    rows = []
    for record in probes.to_dict("records"):
        rows.append(
            tuple(
                Cell(
                    str(text),
                    str(text),
                    changed=name not in fixed_columns and str(text) != str(record["before"]),
                )
                for name, text in record.items()
            )
        )
    return Table("said", tuple(columns.values()), tuple(rows))


def _settings(study: Study) -> list[tuple[str, str]]:
    """What reproduces the numbers."""
    hidden = ("target_tokens", "target_ids", "read_at", "target_is_argmax")
    shown = [(name, str(value)) for name, value in study.settings.items() if name not in hidden]
    return [*shown, ("editor", str(study.edits["editor"].iloc[0]))]
