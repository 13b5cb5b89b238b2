"""report(): a Study -> one HTML file that needs nothing else (plotly.js is written into it once).
run_page(): a run folder."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path
from types import MappingProxyType

import pandas as pd
import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from qv_lens import plots
from qv_lens.case_study import IN_ROUNDS, LOCATED_VARIANT, Study
from qv_lens.errors import ConfigError
from qv_lens.evaluation.ablation import DROP
from qv_lens.evaluation.faithfulness import RANDOM, lost_at
from qv_lens.reporting import graph

STYLE = """
body{font:16px/1.55 system-ui,-apple-system,Segoe UI,sans-serif;color:#1d2733;background:#f6f8fa;margin:0}
main{max-width:1000px;margin:0 auto;padding:32px 24px 80px}
h1{font-size:30px;line-height:1.25;margin:8px 0 4px} h2{font-size:21px;margin:40px 0 6px}
.fact{font-size:19px;background:#fff;border:1px solid #dde3ea;border-radius:12px;padding:18px 22px;margin:18px 0}
.fact b{color:#2a6fdb} .fact s{color:#9aa5b1} .card{background:#fff;border:1px solid #dde3ea;border-radius:12px;padding:10px 16px;margin:12px 0;overflow-x:auto}
table{border-collapse:collapse;font-size:14px;width:100%} th,td{padding:5px 10px;text-align:left;border-bottom:1px solid #edf0f3}
th{vertical-align:bottom;color:#5b6775;font-weight:600} .n{text-align:right;font-variant-numeric:tabular-nums} .note{color:#5b6775;font-size:14px}
.strip{display:flex;flex-wrap:wrap;gap:3px;font-size:19px} .strip span{padding:5px 4px;border-radius:5px;text-align:center}
.strip small{display:block;font-size:11px;font-variant-numeric:tabular-nums}
.two{display:grid;grid-template-columns:minmax(0,1fr) minmax(0,1fr);gap:12px} @media(max-width:800px){.two{display:block}}
svg text{font:12px system-ui;fill:#5b6775} svg circle{stroke:#fff;stroke-width:1.5;cursor:pointer} svg a:focus circle,svg a:hover circle{stroke:#1d2733}
.neuron{display:none} .neuron:target{display:block;border-color:#8e5ea2} .neuron:target~.hint{display:none}
.tok{background:#eaf1fd;border-radius:5px;padding:1px 6px;margin-right:4px;white-space:nowrap} code,pre{font:13px ui-monospace,Menlo,monospace}
pre{background:#1d2733;color:#e8edf2;border-radius:10px;padding:14px 18px;overflow-x:auto}
"""


#: headings of columns that do not say what they count; columns in nats
NAMES: Mapping[str, str] = MappingProxyType({
    "count": "neurons zeroed", "drop_points": "drop, points", "drop_relative": "drop, of what was right", "low": "from (95%)", "high": "to (95%)",
    "logprob_change": "change of log p, nats", "logprob": "log p, nats",
})  # fmt: skip
NATS = ("logprob_change", "logprob")


def report(study: Study, path: str | Path, command: str = "") -> Path:
    """Write the page. `command` is what reproduces it. Raises `ConfigError` if the path cannot be
    written."""
    target = Path(path)
    page = _page(study, command)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(page, encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"Cannot write the report to {target}: {error}. Choose another path."
        ) from error
    return target


def run_page(name: str, frame: pd.DataFrame, figure: go.Figure | None, most: int = 400) -> str:
    """A run (`runs.store.load_run`) as a page: its figure, its rows averaged over everything that
    is not a field (at most `most` of them), its settings."""
    measures, done = (
        [m for m in frame.attrs["measures"] if m in frame],
        frame[frame["status"] == "finished"],
    )
    shown = ("experiment", "settings", "grid", "models", "versions", "machine", "command")
    config = escape(json.dumps({key: frame.attrs.get(key) for key in shown}, indent=1))
    single = (
        "task",
        "status",
        "case",
        "subject",
        "text",
        "prompt",
        "written",
        "skipped",
        "promoted",
        "prompts_known",
    )
    varied = [
        c for c in done if c not in (*measures, *single) and 1 < done[c].astype(str).nunique() <= 40
    ]
    table = (
        done.groupby(varied, sort=False)[measures].mean(numeric_only=True).reset_index()
        if varied
        else done
    )
    parts = [
        f"<h1>{escape(name)}</h1><p>{frame['task'].nunique()} tasks, "
        f"{int((frame['status'] == 'failed').sum())} failed, {len(done)} "
        f"rows{'' if frame.attrs['complete'] else '; unfinished'}.</p>",
        _figure(figure) if figure is not None else "",
        _failures(frame),
        f"<h2>Rows</h2><p class=note>Means; {min(len(table), most)} of {len(table)} "
        "combinations.</p>" + _card(_numbers(table.head(most))),
        f"<h2>Settings</h2><pre>{config}</pre>",
    ]
    return _document(name, parts)


def _failures(frame: pd.DataFrame) -> str:
    """Which tasks failed, by what was varied, and each one's last line."""
    failed = frame[frame["status"] == "failed"]
    if failed.empty:
        return ""
    names = [name for name in frame.attrs["grid"] if name in failed]
    table = failed[names].assign(
        error=[str(error).strip().splitlines()[-1] for error in failed["error"]]
    )
    return "<h2>Failed</h2>" + _card(table.to_html(index=False, border=0))


def _numbers(frame: pd.DataFrame) -> str:
    return frame.to_html(index=False, border=0, float_format="{:.3f}".format, na_rep="–")


def _page(study: Study, command: str) -> str:
    fact, new = study.request.fact, study.request.new
    parts = [
        f"<h1>Where {escape(str(study.settings['model']))} keeps a fact</h1>",
        f"<div class=fact>{escape(fact.prompt).replace('{}', f'<b>{escape(fact.subject)}</b>')} "
        f"<s>{escape(fact.answer)}</s> &rarr; <b>{escape(new)}</b><div "
        f"class=note>{_known(study)}</div></div>",
        *_curve(study), *_attribution(study), *_layers(study), *_causes(study), *_edit(study),
        "<h2>6. Do it again</h2>", f"<pre>{escape(command)}</pre>" if command else "",
        f"<div class=card>{_settings(study)}</div>",
    ]  # fmt: skip
    return _document(f"{fact.text} {fact.answer} → {new}", parts)


def _known(study: Study) -> str:
    answer = study.request.fact.answer
    chip = f"<span class=tok>{escape(study.answered.strip())}</span>"
    share = 100 * math.exp(study.logprob)
    told = (
        f"The model answers {chip}; it gives the first token of {escape(answer)} {share:.1f}% (log "
        f"p {_fixed(study.logprob, 2)})."
    )
    asked = ", ".join(
        f"{row.known} of {row.asked} {row.kind}" for row in study.material.itertuples()
    )
    beside = (
        f"Beside this fact others are asked; before anything is done the model answers {asked}."
    )
    if not study.known:
        told += (
            " It does not know this fact: what follows is about an answer that it does not give."
        )
    return f"{told} {beside}"


def _document(title: str, parts: Iterable[str]) -> str:
    return (
        "<!doctype html><html lang=en><head><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>{escape(title)}</title><style>{STYLE}</style>"
        f"<script>{get_plotlyjs()}</script></head><body><main>{''.join(parts)}</main></body></html>"
    )


def _curve(study: Study) -> Iterable[str]:
    fact = study.request.fact
    table = lost_at(study.removal)
    yield "<h2>1. Take its neurons away</h2>"
    own = table[table["prompt"] == 0]
    random = own[own["ranking"] == RANDOM]["k"]
    total = int(study.settings["neurons"])
    parts = [
        f"<b>{_count(own, name)}</b> by {told}"
        for name, told in (
            ("Eq. 9", "Eq. 9 (value neurons)"),
            ("gradient", "gradient times activation"),
            (IN_ROUNDS, "the gradient asked again after every five"),
        )
    ]
    most = int(study.removal["k"].max())
    lost = f"{random.notna().sum()} of {len(random)} random draws of up to {most} lose it"
    answer = f"<b>{escape(fact.answer)}</b>"
    outcome = f"The answer {answer} is lost after {', '.join(parts[:-1])} and {parts[-1]}; {lost}."
    if not study.removal.loc[study.removal["prompt"] == 0, "known"].all():
        outcome = (
            f"The answer {answer} is not what the model says to begin with: the curves show its "
            "log-probability alone."
        )
    yield (
        f"<p>Of the model's {total:,} FFN neurons those that rank best are set to zero at the "
        f"prompt's last token. {outcome} The same neurons are then taken from another fact of its "
        "kind and from one of another kind: what falls there too does not belong to this fact "
        "alone.</p>"
    )
    told = _removal_table(study, table)
    yield _figure(plots.removal_curve(study.removal, "What is left of the answer"), told)
    yield _card(told)
    yield (
        f"<p>The other way round: only the best neurons are kept, all others of the {total:,} are "
        "zero at the last token. A score that finds what the model uses brings the answer back "
        "with few.</p>"
    )
    kept = study.kept.groupby(["ranking", "k"], sort=False)["logprob"].mean().unstack("k")
    kept.columns = [f"{count:,} kept" for count in kept.columns]
    told = _table(kept.round(2).reset_index())
    yield _figure(plots.removal_curve(study.kept, "What comes back of the answer"), told)


def _count(own: pd.DataFrame, ranking: str) -> str:
    k = own[own["ranking"] == ranking]["k"].iloc[0]
    return f"{int(k)} neurons" if k == k else "none of the numbers tried"


def _removal_table(study: Study, table: pd.DataFrame) -> str:
    """At how many neurons each fact's answer is lost (`lost_at`); of random draws how many lose
    it."""
    texts = study.removal.drop_duplicates("prompt").set_index("prompt")
    rows = []
    for (prompt, ranking), part in table.groupby(["prompt", "ranking"], sort=False):
        k = part["k"]
        if not texts.loc[prompt, "known"]:
            rows.append(
                {**_whose(texts, prompt), "ranking": ranking, "answer lost at": "not known before"}
            )
            continue
        lost = (
            f"{int(k.median())}"
            if k.notna().all()
            else f"{int(k.notna().sum())} of {len(k)} draws"
            if len(k) > 1
            else "not lost"
        )
        rows.append({**_whose(texts, prompt), "ranking": ranking, "answer lost at": lost})
    return _table(pd.DataFrame(rows))


def _whose(texts: pd.DataFrame, prompt: int) -> dict[str, str]:
    return {"whose": str(texts.loc[prompt, "whose"]), "fact": str(texts.loc[prompt, "text"])}


def _attribution(study: Study) -> Iterable[str]:
    yield "<h2>2. Value and query neurons</h2>"
    yield (
        "<p>A <b>value neuron</b> raises the log-probability of the answer by its score where it is "
        "written (Eq. 9, nats). A <b>query neuron</b> raises the coefficients of value neurons in "
        "higher layers (Eq. 10). The <b>effect</b> of a neuron is what the answer loses without it, "
        "to first order, whatever later layers make of it (gradient times activation, nats).</p>"
    )
    yield _card(_strip(study.tokens)) + (
        "<p class=note>Every token's colour: how much FFN and attention raise the answer at that "
        "position, each by the layer whose whole output adds most (Eq. 9; ACE, Table 5); below it "
        "the sum, nats. Hover for both and for what the model would say there.</p>"
    )
    for title, table in (
        ("Top value neurons of this prompt", study.value_tokens),
        ("Top query neurons of this prompt", study.query_tokens),
        ("Neurons of the largest effect on this prompt", study.effect_tokens),
    ):
        yield f"<p class=note>{title}</p>" + _card(_neurons(table))
    yield "<h3>The pathway</h3><p class=note>Query neurons (orange) and the value neurons (blue) they feed; violet: both. "
    yield f"{study.edges.attrs['tested']}</p>"
    yield _card(graph.svg(study.nodes, study.edges)) + graph.cards(study.nodes, _code(study))


def _layers(study: Study) -> Iterable[str]:
    value, query = _edited_layers(study)
    yield "<h2>3. Layers</h2>"
    yield (
        f"<p>Means over {study.layers.frame.attrs['prompts']} facts of this kind. Near the end the "
        "last token's neurons write the answer down; an edit must be written where the subject is "
        "read. So the layers to edit are ranked by the effect of the neurons <i>at the subject's "
        f"last token</i> on the answer: value layers <b>{value}</b>, and the query layers that feed "
        f"them most (Eq. 10) <b>{query}</b>. These are the layers that ACE edits below.</p>"
    )
    yield _figure(
        plots.layer_profile(study.profile, "Layers, nats per fact"),
        _by_layer(study.profile, "kind"),
    )
    yield _figure(
        plots.head_heatmap(study.heads, "Attention heads of this prompt"),
        _by_layer(study.heads, "head"),
    )


def _edited_layers(study: Study) -> tuple[str, str]:
    """ACE's located layers as text: value, query."""
    label = study.edits.loc[study.edits["variant"] == LOCATED_VARIANT, "layers"].iloc[0]
    value, _, query = label.removeprefix("value ").partition(", query ")
    return value.strip("[]"), query.strip("[]") or "none"


def _causes(study: Study) -> Iterable[str]:
    yield "<h2>4. Take 1% of the neurons away, silence the query neurons</h2>"
    if study.ablation.empty:
        yield "<p class=note>Left out: no other facts of this kind were given, or the model answers none.</p>"
    else:
        table = study.ablation.groupby(["neurons", "group"], sort=False)
        yield (
            "<p>Neurons are ranked on one half of the facts of this kind (Eq. 9, summed) and zeroed "
            "at all positions; accuracy is measured on the other half and on other kinds of fact. "
            "Random: mean of five seeds.</p>"
            + _card(_table(table[["count", *DROP]].mean().reset_index()))
        )
    if study.suppression.empty:
        yield "<p class=note>Query neurons are not silenced: no multi-hop prompts were given, or the model answers none.</p>"
    else:
        yield (
            "<p><b>Zero</b> removes query neurons for every reader; <b>Suppress</b> removes only "
            "what they write into the value neurons. Two-hop prompts over this relation, one layer "
            "at a time; the layers are those where the query neurons of these prompts' last tokens "
            "score highest, and not the edited ones, which are ranked at the subject.</p>"
            + _card(_table(study.suppression))
        )


def _edit(study: Study) -> Iterable[str]:
    yield "<h2>5. Edit</h2>"
    yield (
        f"<p>This fact and {int(study.edits['cases'].max()) - 1} of its kind, one at a time, "
        "weights put back in between. <i>before</i> counts old answers of multi-hop prompts, "
        "<i>after</i> the new ones. What the model says, in its own words:</p>"
    )
    yield _card(_table(study.probes))
    if study.restored:
        yield "<p class=note>At the end every weight was what it had been, bit for bit.</p>"
    yield _figure(plots.metric_bars(study.edits, "Before and after the edit"))
    yield _card(
        _table(
            study.edits[["variant", "layers", "metric", "before", "after", "low", "high", "cases"]]
        )
    )
    yield _figure(plots.before_after(study.states), _by_layer(study.states, "state"))
    fact, new = study.request.fact, study.request.new
    sides = (
        (fact.answer, study.tokens, study.value_tokens),
        (new, study.tokens_after, study.value_tokens_after),
    )
    yield (
        "<div class=two>"
        + "".join(
            f"<div><p class=note>{when}: importance of each token for <b>{escape(answer)}</b>, and "
            "its value "
            f"neurons</p>{_card(_strip(tokens))}{_card(_neurons(neurons.head(6), 4))}</div>"
            for when, (answer, tokens, neurons) in zip(("Before", "After"), sides, strict=True)
        )
        + "</div>"
    )


def _strip(tokens: pd.DataFrame) -> str:
    """The prompt's tokens, coloured by their importance."""
    total = tokens["ffn"] + tokens["attn"]
    limit = float(total.abs().max()) or 1.0
    spans = []
    for row, value in zip(tokens.itertuples(), total, strict=True):
        colour = "42,111,219" if value > 0 else "224,123,57"
        told = (
            f"FFN {row.ffn:+.3f}, attention {row.attn:+.3f} nats; next: "
            f"{', '.join(t.strip() for t in row.promoted)}"
        )
        shade = f"background:rgba({colour},{0.75 * abs(value) / limit:.2f})"
        spans.append(
            f'<span style="{shade}" title="{escape(told, quote=True)}">{escape(str(row.token)) or "·"}<small>{_fixed(value, 2)}</small></span>'
        )
    return f"<div class=strip>{''.join(spans)}</div>"


def _code(study: Study) -> str:
    """Python that zeroes one neuron of this study's fact; `{layer}` and `{neuron}` are filled in
    per card."""
    fact = study.request.fact
    space = "" if fact.space is None else f", space={fact.space}"
    literal = f"qv.Fact({fact.prompt!r}, {fact.subject!r}, {fact.answer!r}{space})".replace(
        "{", "{{"
    ).replace("}", "}}")
    return (
        f"import qv_lens as qv\nlens = qv.load({study.settings['model']!r})\nfact = {literal}\n"
        "neuron = qv.NeuronSet.of([({layer}, {neuron})])\nwith lens.intervene(qv.Zero(neuron)):\n    print(lens.logprob(fact))"
    )


def _neurons(frame: pd.DataFrame, tokens_shown: int = 8) -> str:
    rows = []
    for layer, neuron, m, score, promoted in zip(
        frame["layer"],
        frame["neuron"],
        frame["coefficient"],
        frame["score"],
        frame["promoted"],
        strict=True,
    ):
        tokens = "".join(
            f"<span class=tok>{escape(token.strip() or repr(token))}</span>"
            for token in promoted[:tokens_shown]
        )
        rows.append(
            f"<tr><td><code>f{layer}-{neuron}</code></td><td class=n>{_fixed(m, 2)}</td><td "
            f"class=n>{_fixed(score, 4)}</td><td>{tokens}</td></tr>"
        )
    return (
        "<table><tr><th>neuron</th><th class=n>coefficient m</th><th class=n>score, "
        f"nats</th><th>promotes</th></tr>{''.join(rows)}</table>"
    )


def _fixed(value: float, digits: int) -> str:
    """With so many decimals, and no minus in front of zeros."""
    text = f"{value:.{digits}f}"
    return text if float(text) else text.removeprefix("-")


def _table(frame: pd.DataFrame) -> str:
    head = "".join(
        f"<th{' class=n' if pd.api.types.is_float_dtype(frame[c]) else ''}>{escape(NAMES.get(str(c), str(c))).replace('_', ' ')}</th>"
        for c in frame.columns
    )
    body = "".join(
        "<tr>" + "".join(_cell(c, v) for c, v in zip(frame.columns, row, strict=True)) + "</tr>"
        for row in frame.itertuples(index=False)
    )
    return f"<table><tr>{head}</tr>{body}</table>"


def _cell(column: str, value: object) -> str:
    if isinstance(value, float):
        if value != value:
            return "<td class=n>–</td>"
        shares = ("clean", "accuracy", "drop_relative", "before", "after", "low", "high")
        text = (
            f"{_fixed(100 * value, 1)}%"
            if column in shares
            else _fixed(value, 3 if column in NATS else 0)
        )
        return f"<td class=n>{text}</td>"
    return f"<td>{escape(str(value))}</td>"


def _settings(study: Study) -> str:
    hidden = ("targets", "target_is_argmax")
    rows = "".join(
        f"<tr><td>{escape(k)}</td><td><code>{escape(str(v))}</code></td></tr>"
        for k, v in study.settings.items()
        if k not in hidden
    )
    editor = f"<tr><td>editor</td><td><code>{escape(str(study.edits['editor'].iloc[0]))}</code></td></tr>"
    return f"<table>{rows}{editor}</table>"


def _card(html: str) -> str:
    return f"<div class=card>{html}</div>"


def _figure(figure: go.Figure, table: str = "") -> str:
    """A picture, and its numbers where there is no JavaScript to draw it."""
    drawn = figure.to_html(
        full_html=False,
        include_plotlyjs=False,
        config={"displayModeBar": False, "responsive": True},
    )
    return _card(f"{drawn}<noscript>{table}</noscript>" if table else drawn)


def _by_layer(frame: pd.DataFrame, rows: str, value: str = "score") -> str:
    return _numbers(
        frame.pivot_table(
            index=rows, columns="layer", values=value, aggfunc="sum", sort=False
        ).reset_index()
    )
