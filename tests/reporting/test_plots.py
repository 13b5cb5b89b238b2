"""Figures show every group and row that they are given, on the right scale."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest

from qv_lens import plots

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
    assert math.isnan(plots.layer_heatmap(missing).data[0].z[0][0])  # a sum of nothing is not zero
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


@pytest.mark.parametrize(
    ("draw", "by", "before"),
    [(plots.metric_bars, "variant", 1), (plots.before_after, "state", 0), (plots.counts, "condition", 0),
     (plots.method_bars, "metric", 0)],
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
