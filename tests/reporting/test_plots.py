"""Figures show every group and row that they are given, on the right scale."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest

import qv_lens as qv
from qv_lens import plots
from qv_lens.errors import ConfigError
from qv_lens.evaluation.sequence import sequence
from qv_lens.plots import output, parts
from qv_lens.world import cases as world_cases
from qv_lens.world import generator

NAMES = [f"group {i}" for i in range(11)]  # more than there are colours


def table(n_rows: int, tokens: int = 10) -> pd.DataFrame:
    promoted = [[f"word{i}" for i in range(tokens)]] * n_rows
    return pd.DataFrame(
        {
            "layer": 1,
            "neuron": range(n_rows),
            "coefficient": 1.0,
            "score": 0.5,
            "promoted": promoted,
        }
    )


def test_a_missing_cell_leaves_the_scale():
    frame = pd.DataFrame({"layer": [0, 1, 0], "kind": ["ffn", "ffn", "attn"], "score": [-1, 5, 3]})
    heat = plots.layer_heatmap(frame).data[0]
    assert (heat.zmin, heat.zmax) == (-5, 5)  # so that zero is the middle, white
    assert heat.colorscale[1] == (0.5, "#ffffff")
    assert np.isnan(heat.z).sum() == 1


def test_what_was_not_measured_is_empty_and_there():
    frame = pd.DataFrame({
        "group": ["in"] * 4 + ["off"] * 2, "neurons": ["top", "top", "query", "query", "top", "top"],
        "layer": [0, 1, 0, 1, 0, 1], "drop": [0.0, 2.0, 0.0, math.nan, math.nan, math.nan],
    })  # fmt: skip
    heat = plots.sweep_heatmap(frame, ["group", "neurons"], "layer", "drop", "t", "points").data[0]
    assert list(heat.y) == ["in · top", "in · query", "off · top"]
    assert (heat.zmin, heat.zmax) == (-2, 2)
    np.testing.assert_array_equal(heat.z, [[0, 2], [0, math.nan], [math.nan, math.nan]])
    missing = pd.DataFrame({"layer": [0, 1], "kind": "ffn", "score": [math.nan, 1.0]})
    assert math.isnan(plots.layer_heatmap(missing).data[0].z[0][0])  # a mean of nothing is not zero
    assert plots.layer_heatmap(missing.assign(score=math.nan)).data[0].zmax == 1.0


def test_rows_of_zeros_stay_zero():
    rows = [("sport", "ffn", layer, 0.0) for layer in (0, 1)]
    rows += [("capital", "ffn", 0, 1.0), ("capital", "ffn", 1, 2.0)]
    frame = pd.DataFrame(rows, columns=["category", "part", "layer", "score"])
    np.testing.assert_array_equal(plots.category_heatmap(frame).data[0].z, [[0, 0], [0.5, 1]])


def test_heads_and_layers_are_whole_numbers():
    frame = pd.DataFrame(
        {"head": [0.0, 1.0, math.nan], "layer": [0.0, 3.0, 1.0], "score": [1.0, 2.0, 3.0]}
    )
    heat = plots.head_heatmap(frame).data[0]
    assert list(heat.y) == ["0", "1"]
    assert list(heat.x) == [0, 3]
    assert all(isinstance(layer, int) for layer in heat.x)


def test_cells_are_means_over_what_is_not_an_axis():
    """Nats of one prompt, however many there are; of each model apart."""
    prompts = pd.DataFrame({
        "prompt": [0, 1] * 2, "kind": ["ffn", "ffn", "attn", "attn"], "layer": 3, "score": [1.0, 2.0, -1.0, -3.0],
    })  # fmt: skip
    assert np.ravel(plots.layer_heatmap(prompts).data[0].z).tolist() == [-2.0, 1.5]
    heads = pd.DataFrame(
        {"category": ["a", "b"], "head": [0.0, 0.0], "layer": 1, "score": [1.0, 4.0]}
    )
    assert plots.head_heatmap(heads).data[0].z.tolist() == [[2.5]]
    both = pd.concat([heads.assign(model="m"), heads.assign(model="n", score=0.0)])
    heat = plots.head_heatmap(both).data[0]
    assert (list(heat.y), heat.z.tolist()) == (["m · 0", "n · 0"], [[2.5], [0.0]])
    rows = pd.DataFrame({"category": "c", "part": "ffn", "layer": [0, 1], "score": [1.0, 2.0]})
    both = pd.concat([rows.assign(model="m"), rows.assign(model="n", score=[4.0, 0.0])])
    heat = plots.category_heatmap(both).data[0]
    assert list(heat.y) == ["m · FFN, Eq. 9 · c", "n · FFN, Eq. 9 · c"]
    np.testing.assert_array_equal(heat.z, [[0.5, 1.0], [1.0, 0.0]])


def test_tokens_that_look_like_html_are_seen():
    """As Llama's BOS does; plotly reads HTML, and shows an entity as its sign."""
    frame = pd.DataFrame({
        "model": "m", "prompt": 0, "position": [0, 1], "token": ["<s>", " A&B"], "kind": "ffn", "layer": 0,
        "score": 1.0, "ffn": 1.0, "attn": 0.0, "promoted": "<b>",
    })  # fmt: skip
    names = ["0: &lt;s&gt;", "1: A&amp;B"]
    assert list(plots.token_heatmap(frame).data[0].y) == names
    bars = plots.token_bars(frame).data[0]
    assert (list(bars.x), list(bars.hovertext)) == (names, ["&lt;b&gt;", "&lt;b&gt;"])
    promoted = table(1).assign(promoted=[["<s>", "&lt;"]])
    assert plots.neuron_table(promoted).data[0].cells["values"][3] == ["'&lt;s&gt;', '&amp;lt;'"]


def test_frames_of_the_verbs_are_drawn_as_they_are(tmp_path):
    """With a label where they have none: the editor's name, the model's, the prompt's text."""
    lens = qv.load("toy-gptj")
    fact = qv.Fact("{} plays the sport of", "Elena Morefeld", "fencing")
    cases = [qv.EditCase(fact.to("golf"))]
    frame = qv.evaluate(lens, cases, ["efficacy_acc"], "FT")
    table = qv.summary(frame)
    for draw in (plots.method_bars, plots.method_dots, plots.metric_bars, plots.seconds_bars):
        drawn = draw(frame if draw is plots.seconds_bars else table)
        assert "FT" in {
            *map(str, drawn.data[-1].x or ()),
            *map(str, drawn.data[-1].y),
            drawn.data[-1].name,
        }
    row = sequence(lens, cases, "FT", tmp_path / "row", metrics=["efficacy_acc"])
    assert plots.lasting(row, "efficacy_acc").data[0].name == "FT"
    layers = qv.layer_scores(lens, fact, kind="ffn")
    assert list(plots.layer_heatmap(layers).data[0].y) == [fact.text]
    assert plots.before_after(layers).data[0].name == "as it is"
    whole = qv.layer_scores(lens, fact, how="layer_vector")
    assert [
        line.name for line in plots.layer_lines(whole).data if line.x is not None and len(line.x)
    ] == ["toy-gptj ffn"]
    assert (
        fact.text
        in plots.removal_curve(qv.faithfulness(lens, fact, {}, (1,), seeds=1)).layout.title.text
    )
    cells = (
        plots.vocabulary_table(qv.vocabulary(lens, qv.value_neurons(lens, fact, 3))).data[0].cells
    )
    assert [len(column) for column in cells["values"]] == [3] * 4


def test_prompts_keep_their_order_and_names_of_their_own():
    rows = {"prompt": [0, 1, 2], "kind": "ffn", "layer": 0, "score": 1.0}
    frame = pd.DataFrame(rows)
    frame.attrs["texts"] = ["Zoe is", "Anna is", "Mia <s> is"]
    assert list(plots.layer_heatmap(frame).data[0].y) == ["Zoe is", "Anna is", "Mia &lt;s&gt; is"]
    named = frame.assign(prompt=["c", "a", "b"])
    assert list(plots.layer_heatmap(named).data[0].y) == ["a", "b", "c"]
    half = frame.assign(prompt=[0.0, 1.0, 2.0])
    assert len(plots.layer_heatmap(half).data[0].y) == 3


def test_summaries_that_no_column_tells_apart_are_refused():
    one = pd.DataFrame({"metric": ["a", "b"], "before": 0.0, "after": 1.0})
    for draw in (plots.method_bars, plots.method_dots, plots.metric_bars):
        draw(one)
        with pytest.raises(qv.QVLensError, match=r"has no (method|variant)\."):
            draw(pd.concat([one, one]))
        with pytest.raises(qv.QVLensError, match=r"has no metod\."):
            draw(pd.concat([one.assign(method="x"), one.assign(method="y")]), by="metod")


@pytest.mark.parametrize(
    ("draw", "lacks"),
    [
        (plots.counts, "condition, count"), (plots.category_heatmap, "part, category"), (plots.lasting, "step, group, metric, after"),
        (plots.token_bars, "position, token, ffn, attn, promoted"), (plots.set_bars, "model, set, sampled, probability"), (plots.method_bars, "metric, after"), (plots.seconds_bars, "seconds"),
        (plots.token_heatmap, "position, token"), (plots.removal_curve, "ranking, k, logprob, clean"), (plots.node_lines, "path, model, importance"),
    ],
)  # fmt: skip
def test_a_figure_says_what_it_is_drawn_from(draw, lacks):
    frame = pd.DataFrame({"prompt": [0], "kind": ["ffn"], "layer": [0], "score": [1.0]})
    with pytest.raises(
        qv.QVLensError, match=rf"drawn of what .* gives, .*has no {lacks}\. It has prompt"
    ):
        draw(frame)


def test_colours_of_tokens_are_not_those_of_the_one_that_is_far_off():
    scores = np.linspace(-1, 1, 100)
    frame = pd.DataFrame({
        "prompt": 0, "position": np.repeat(range(10), 10), "token": "a", "kind": "ffn", "layer": list(range(10)) * 10,
        "score": np.where(np.arange(100) == 50, 30.0, scores),
    })  # fmt: skip
    assert plots.token_heatmap(frame).data[0].zmax == pytest.approx(1, abs=0.05)
    assert plots.layer_heatmap(frame.assign(prompt=frame["position"])).data[0].zmax == 30


@pytest.mark.parametrize("draw", [plots.removal_curve, plots.lasting])
def test_nothing_is_drawn_of_nothing(draw):
    columns = ["text", "prompt", "ranking", "k", "group", "metric", "step", "method", "after"]
    assert not draw(pd.DataFrame(columns=columns)).data


def test_a_figure_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "figure.html").mkdir()
    with pytest.raises(qv.QVLensError, match=r"Cannot write the figure to .*figure\.html"):
        plots.save(
            plots.layer_heatmap(pd.DataFrame({"kind": ["ffn"], "layer": 0, "score": 1.0})),
            tmp_path / "figure.html",
        )


def test_a_pathway_is_of_one_prompt_and_its_nodes_stand_at_their_tokens():
    """Of four prompts the first; of many nodes in a cell none reaches the next token."""
    lens = qv.load("toy-gptj")
    facts = world_cases.facts(generator.build(0), "P641")[:3]
    value = qv.value_neurons(lens, facts, 10)
    graph = qv.qv_graph(lens, facts, value, qv.query_neurons(lens, facts, value, 10))
    one = qv.value_neurons(lens, facts[0], 10)
    alone = qv.qv_graph(lens, facts[0], one, qv.query_neurons(lens, facts[0], one, 10))
    drawn, wanted = plots.pathway(*graph), plots.pathway(*alone)
    assert [len(trace.x) for trace in drawn.data] == [len(trace.x) for trace in wanted.data]
    bare = graph.edges[graph.edges["prompt"] > 0]  # the first prompt has nodes and no edges
    assert not any(trace.mode == "lines" for trace in plots.pathway(graph.nodes, bare).data)
    query = qv.query_neurons(lens, facts[0], one, 150, through="attention")
    nodes, edges = qv.qv_graph(lens, facts[0], one, query)
    figure = plots.pathway(nodes, edges)
    at = {
        name: x
        for trace in figure.data if trace.customdata is not None
        for name, x in zip(trace.customdata, trace.x, strict=True)
    }  # fmt: skip
    assert nodes.groupby(["position", "layer"]).size().max() > 10
    assert all(0 <= at[row.id] - row.position < 0.81 for row in nodes.itertuples())


@pytest.mark.parametrize(
    ("draw", "by", "before"),
    [(plots.metric_bars, "variant", 1), (plots.before_after, "state", 0), (plots.counts, "condition", 0),
     (plots.method_bars, "metric", 0), (plots.method_dots, "metric", 0)],
)  # fmt: skip
def test_no_group_is_left_out(draw, by, before):
    frame = pd.DataFrame(
        {
            by: NAMES,
            "layer": 0,
            "score": 1.0,
            "count": 1.0,
            "interval": 0.1,
            "before": 0.0,
            "after": 0.5,
        }
    )
    for name, value in (("metric", "efficacy_acc"), ("method", "MEMIT")):
        frame[name] = frame.get(name, value)
    figure = draw(frame)
    assert [trace.name for trace in figure.data][before:] == NAMES
    colours = [trace.marker.color or trace.line.color for trace in figure.data]
    assert len(set(colours)) >= 8


def test_no_model_is_left_out():
    frame = pd.DataFrame({"model": [*NAMES, *NAMES], "prompt": 0, "position": [0] * 11 + [1] * 11, "token": "a", "ffn": 1.0,
                          "attn": 2.0, "promoted": "b"})  # fmt: skip
    figure = plots.token_bars(frame)
    assert [trace.name for trace in figure.data] == [
        f"{name} {kind}" for name in NAMES for kind in ("ffn", "attn")
    ]
    assert all(len(trace.x) == 2 for trace in figure.data)
    timed = pd.DataFrame(
        {"model": ["a", "b"], "method": "FT", "seed": 0, "case": 0, "seconds": [1.0, 3.0]}
    )
    assert list(plots.seconds_bars(timed).data[0].y) == [1.0, 3.0]


def test_metrics_of_one_variant_alone_have_their_bar():
    frame = pd.DataFrame(
        {
            "variant": ["a", "b"],
            "metric": ["efficacy_acc", "fluency"],
            "before": [0.1, 0.2],
            "after": 0.5,
        }
    )
    assert list(plots.metric_bars(frame).data[0].y) == [0.1, 0.2]


def test_error_bars_lie_where_the_interval_lies_and_never_outside():
    frame = pd.DataFrame(
        {"method": ["a", "b"], "metric": "m", "variant": "v", "before": 0.0, "after": [1.0, 0.2]}
    )
    for draw in (plots.method_bars, plots.metric_bars):
        error = draw(frame.assign(low=[0.44, 0.1], high=[1.0, 0.5])).data[-1].error_y
        assert list(error.arrayminus) == pytest.approx([0.56, 0.1])
        assert list(error.array) == pytest.approx([0.0, 0.3])
        cut = draw(frame.assign(interval=0.3)).data[-1].error_y
        assert list(cut.array) == pytest.approx([0.0, 0.3])
        assert list(cut.arrayminus) == pytest.approx([0.3, 0.2])
    neurons = pd.DataFrame({"condition": "clean", "layer": [0], "count": [12.0], "interval": [2.0]})
    assert list(plots.counts(neurons).data[0].error_y.array) == [2.0]  # no share: not cut off at 1


def test_tables_are_as_high_as_their_rows():
    """Each row takes at least its lines at 13 px, and a table with rows of more lines is higher."""
    short, long = (plots.neuron_table(table(10, tokens)).layout.height for tokens in (2, 60))
    assert short >= 110 + 28 + 10 * 24  # margins, header, rows of one line
    # 60 quoted words of 9 letters are at least 9 lines of 400 px
    assert long >= short + 10 * 8 * 16
    rows = table(6).assign(
        model="EleutherAI/gpt-j-6B",
        role="query",
        promoted=", ".join(f"'word{i}'" for i in range(40)),
    )
    assert plots.vocabulary_table(rows).layout.height >= 138 + 6 * 5 * 16


HOVERED = {
    "before_after": (
        {"state": "before", "layer": [0, 1], "score": 1.0}, "before, layer %{x}: %{y:.3f} nats"),
    "layer_profile": (
        {"kind": "ffn", "layer": [0, 1], "score": 1.0}, "ffn, layer %{x}: %{y:.3f} nats per fact"),
    "counts": (
        {"condition": "clean", "layer": [0, 1], "count": 1.0}, "clean, layer %{x}: %{y:.1f} neurons per prompt"),
    "head_heatmap": (
        {"head": [0, 1], "layer": [0, 1], "score": 1.0}, "layer %{x}, head %{y}: %{z:.4f} nats"),
    "method_bars": (
        {"metric": "efficacy", "method": ["A", "B"], "after": 0.5}, "efficacy, %{x}: %{y:.1%}"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOVERED)
def test_hovering_says_what_and_in_which_unit(name):
    columns, told = HOVERED[name]
    figure = getattr(plots, name)(pd.DataFrame(columns))
    assert figure.data[-1].hovertemplate == f"{told}<extra></extra>"


def test_layers_end_where_the_model_ends():
    frame = pd.DataFrame({"kind": "ffn", "layer": range(30), "score": 1.0})
    assert plots.layer_profile(frame).layout.xaxis.range == (-0.5, 29.5)
    assert plots.layer_profile(frame).layout.xaxis.dtick == 1
    many = pd.DataFrame({"kind": "ffn", "layer": range(80), "score": 1.0})
    assert plots.layer_profile(many).layout.xaxis.dtick == 5


def test_names_that_look_like_numbers_are_categories():
    frame = pd.DataFrame({"metric": "efficacy", "method": ["10", "2"], "after": 0.5})
    assert plots.method_bars(frame).layout.xaxis.type == "category"


def test_dots_of_editors_best_on_top_beside_the_unedited_model():
    rows = [("10", "says it", 0.0, 0.9), ("10", "neighbours", 0.4, 0.1), ("MEMIT", "says it", 0.0, 0.8),
            ("MEMIT", "neighbours", 0.4, 0.3), ("new", "says it", 0.0, math.nan), ("new", "neighbours", 0.4, 0.4)]  # fmt: skip
    frame = pd.DataFrame(rows, columns=["method", "metric", "before", "after"])
    figure = plots.method_dots(frame.assign(low=frame["after"] - 0.05, high=1.0))
    # upwards: nothing known of "new", harmonic means of 0.18 and 0.44
    assert list(figure.layout.yaxis.categoryarray) == ["new", "10", "MEMIT"]
    assert figure.layout.yaxis.type == "category"
    said, neighbours = figure.data
    assert said.hovertemplate == "%{y}, says it: %{x:.1%}<extra></extra>"
    assert list(neighbours.x) == [0.1, 0.3, 0.4]
    assert list(neighbours.error_x.array) == pytest.approx([0.9, 0.7, 0.6])
    (line,) = figure.layout.shapes  # of the neighbours alone: unedited, nothing says the new answer
    assert line.x0 == pytest.approx(0.4)
    assert line.line.color == neighbours.marker.color


def test_a_random_curve_says_what_most_of_its_draws_say():
    rows = {"ranking": "random", "seed": range(5), "prompt": 0, "k": 3, "logprob": -3.0, "clean": -0.5,
            "right": [True, *[False] * 4], "said": ["fencing", *["<s>"] * 4], "text": "a", "kept": False}  # fmt: skip
    line = plots.removal_curve(pd.DataFrame(rows)).data[-1]
    assert list(line.marker.symbol) == ["circle-open"]
    assert "says '&lt;s&gt;'" in line.hovertext[0]
    own = pd.DataFrame(rows).assign(text="<s>a", ranking="<i>mine</i>", seed=0).head(1)
    figure = plots.removal_curve(own)
    assert "&lt;s&gt;a" in figure.layout.title.text
    assert figure.data[0].name == "&lt;i&gt;mine&lt;/i&gt;"


def test_the_curve_names_the_neurons_that_went():
    rows = {"ranking": "Eq. 9", "seed": 0, "prompt": 0, "k": [1, 3], "logprob": [-1.0, -2.0],
            "clean": -0.5, "right": True, "said": " Paris", "text": "a", "kept": False}  # fmt: skip
    frame = pd.DataFrame(rows).assign(went=["f1-2", "f3-4, f5-6"])
    told = plots.removal_curve(frame).data[0].hovertext
    assert told[1].endswith("went: f3-4, f5-6")
    assert "went" not in plots.removal_curve(frame.drop(columns="went")).data[0].hovertext[0]


def test_a_figure_for_print_leaves_the_figure_as_it_is():
    figure = plots.layer_profile(pd.DataFrame({"kind": "ffn", "layer": [0, 1], "score": 1.0}))
    before = figure.to_json()
    printed = plots.paper(figure, columns=2)
    assert figure.to_json() == before
    assert printed.layout.width == 2 * output.COLUMN
    assert printed.layout.title.text is None
    assert printed.layout.xaxis.title.text == "layer"
    assert list(printed.data[0].y) == [1.0, 1.0]


def test_figures_are_written_by_the_end_of_their_name(tmp_path, monkeypatch):
    figure = plots.layer_profile(pd.DataFrame({"kind": "ffn", "layer": [0, 1], "score": 1.0}))
    page = plots.save(figure, tmp_path / "new" / "a.HTML")
    assert "plotly" in page.read_text()
    with pytest.raises(ConfigError, match=r"\.html, \.png, \.svg, \.pdf; a\.jpeg ends otherwise"):
        plots.save(figure, tmp_path / "a.jpeg")

    def nothing(*_, **__):
        raise ValueError("Image export requires kaleido.\nMore lines.")

    monkeypatch.setattr(type(figure), "to_image", nothing)
    with pytest.raises(
        ConfigError, match=r"cannot be drawn here\. It needs kaleido .*\(Image export"
    ):
        plots.save(figure, tmp_path / "a.svg")
    assert [file.name for file in tmp_path.iterdir()] == ["new"]
    monkeypatch.setattr(type(figure), "to_image", lambda *_, **told: str(told).encode())
    assert plots.save(figure, tmp_path / "a.svg").read_text() == "{'format': 'svg', 'scale': 2.0}"


def test_edits_in_a_row_are_drawn_by_group():
    rows = [
        {"method": method, "step": step, "group": group, "metric": metric, "after": step / 10}
        for method in ("A", "B") for step in (0, 1, 10)
        for group, metric in (("newest", "efficacy_gen"), ("first", "efficacy_gen"), ("model", "perplexity"))
    ]  # fmt: skip
    figure = plots.lasting(pd.DataFrame(rows))
    assert [trace.name for trace in figure.data] == ["A", "B"] * 3
    assert [trace.showlegend for trace in figure.data] == [True, True, *[False] * 4]
    assert list(figure.data[2].x) == [1, 10]
    assert list(figure.data[2].y) == [0.1, 1.0]
    assert figure.layout.xaxis3.title.text == "edits"


def test_no_line_joins_two_models_or_two_seeds():
    steps = pd.DataFrame({"method": "A", "step": [1, 10], "group": "first", "metric": "efficacy_gen", "after": [1, 0.5]})  # fmt: skip
    layers = pd.DataFrame({"condition": "clean", "layer": [0, 1], "count": [1.0, 2.0]})
    for draw, frame, name in ((plots.lasting, steps, "A"), (plots.counts, layers, "clean")):
        (alone,) = draw(frame.assign(model="m", seed=0)).data
        assert alone.name == name
        two = draw(pd.concat([frame.assign(model="m", seed=s) for s in (0, 1)])).data
        assert [line.name for line in two] == [f"{name} · 0", f"{name} · 1"]
        two = draw(pd.concat([frame.assign(model=m, seed=0) for m in "mn"])).data
        assert [line.name for line in two] == [f"{name} · m", f"{name} · n"]
        assert {len(line.x) for line in two} == {2}


def test_lines_of_whole_layers_lie_where_the_outputs_lie():
    """Attention at its layer, FFN half a layer on; the mean over the categories."""
    frame = pd.DataFrame({
        "model": "m", "part": ["attn_vector", "ffn_vector"] * 2 + ["ffn"], "layer": 3,
        "category": ["a", "a", "b", "b", "a"], "score": [1.0, 2.0, 3.0, 6.0, 99.0],
    })  # fmt: skip
    drawn = {trace.name: (list(trace.x), list(trace.y)) for trace in plots.layer_lines(frame).data}
    assert drawn == {"m attn": ([3.0], [2.0]), "m ffn": ([3.5], [4.0])}


def test_nodes_are_shares_of_their_own_largest_layer():
    """Of T+ alone, each model, score and kind by itself; of layers means of 1 and 4, which is 1 / 4."""
    rows = [("m", "key", "T+", 0, 0.5), ("m", "key", "T+", 0, 1.5), ("m", "key", "T+", 1, 4.0),
            ("m", "key", "T-", 1, 400.0), ("m", "value", "T+", 0, 100.0), ("m", "value", "T+", 1, 50.0)]  # fmt: skip
    frame = pd.DataFrame(rows, columns=["model", "kind", "path", "layer", "importance"])
    key, value = plots.node_lines(frame.assign(score="s")).data
    assert (key.name, list(key.y)) == ("m key, s", [0.25, 1.0])
    assert (value.name, list(value.y)) == ("m value, s", [1.0, 0.5])


def test_sets_are_drawn_by_their_means():
    frame = pd.DataFrame({
        "model": "m", "set": ["none", "none", "best"], "sampled": [1.0, 0.5, 0.0], "probability": [0.2, 0.4, 0.1],
    })  # fmt: skip
    sampled, probability = plots.set_bars(frame).data
    assert list(sampled.x) == ["m · none", "m · best"]
    assert list(sampled.y) == [0.75, 0.0]
    assert list(probability.y) == pytest.approx([0.3, 0.1])


def test_edges_of_a_pathway_show_their_sign_and_the_strongest_are_drawn():
    """Blue raises, orange lowers; of 130 edges the ten smallest in size are left out."""
    at = dict.fromkeys(("prompt", "position"), 0) | {"coefficient": 1.0, "query_score": 0.0}
    nodes = pd.DataFrame([
        {"id": "a", "role": "query", "layer": 0, "neuron": 0, "value_score": 1.0, **at},
        {"id": "b", "role": "value", "layer": 1, "neuron": 0, "value_score": 1.0, **at},
    ])  # fmt: skip
    weights = [
        *(0.001 * i for i in range(1, 11)),
        *(-1.0 - i for i in range(60)),
        *(1.5 + i for i in range(60)),
    ]
    edges = pd.DataFrame({"source": "a", "target": "b", "weight": weights, "prompt": 0})
    assert len(plots.pathway(nodes, edges.assign(weight=0.0)).data)  # none stands out
    traces = plots.pathway(nodes, edges).data
    lines = [t for t in traces if t.mode == "lines" and list(t.x) == [0, 1]]
    assert [line.line.color for line in lines].count(parts.ORANGE) == 60
    assert [line.line.color for line in lines].count(parts.BLUE) == 60
    assert lines[-1].line.color == parts.BLUE  # the largest, 60.5, last
    assert lines[-1].line.width == pytest.approx(4.3)


def test_a_curve_is_hollow_where_the_model_says_something_else():
    """Of several random orders by most of them; log p is their mean between the lowest and the
    highest, and each panel has the dotted line of its own clean prompt."""
    rows = [("random", 0, 1, -1.0, True), ("random", 1, 1, -3.0, True), ("random", 2, 1, -2.0, False),
            ("random", 0, 9, -6.0, True), ("random", 1, 9, -8.0, False), ("random", 2, 9, -10.0, False)]  # fmt: skip
    frame = pd.DataFrame(rows, columns=["ranking", "seed", "k", "logprob", "right"])
    frame = frame.assign(prompt=0, clean=-0.5, said="x", text="a", kept=False)
    figure = plots.removal_curve(pd.concat([frame, frame.assign(text="b", clean=-0.25)]))
    area, line = figure.data[:2]
    assert list(area.y) == [-1.0, -6.0, -10.0, -3.0]
    assert list(line.y) == [-2.0, -8.0]
    assert list(line.marker.symbol) == ["circle", "circle-open"]
    assert [shape.y0 for shape in figure.layout.shapes] == [-0.5, -0.25]


def test_seconds_of_an_edit_count_once_whatever_was_asked_of_it():
    frame = pd.DataFrame({
        "method": "FT", "seed": 0, "case": [0, 0, 1], "metric": ["a", "b", "a"], "seconds": [1.0, 1.0, 3.0],
    })  # fmt: skip
    assert list(plots.seconds_bars(frame).data[0].y) == [1.0, 3.0]
