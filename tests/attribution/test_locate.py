"""Layer rankings: from rows made up by hand, and against the sums of single neurons' scores."""

from __future__ import annotations

from types import SimpleNamespace

import pandas as pd
import pytest

import qv_lens as qv
from qv_lens.attribution.locate import Layers, layer_counts
from qv_lens.errors import ConfigError
from tests.attribution.test_value import FACTS
from tests.models import tiny_lens


def ranked(value: tuple[int, ...], query: tuple[int, ...], scores: dict[int, float]) -> Layers:
    """`scores`: of the query layers. Every value layer scores less than nothing, which must not
    matter."""
    rows = [{"kind": "value", "layer": layer, "score": -1.0} for layer in value]
    rows += [{"kind": "query", "layer": layer, "score": score} for layer, score in scores.items()]
    return Layers(value, query, pd.DataFrame(rows))


def test_raising_layers_have_a_positive_score():
    layers = ranked((3, 1, 2, 0), (2, 0, 1, 3), {0: 0.5, 1: 0.0, 2: 0.7, 3: -0.1})
    assert layers.raising == (2, 0)
    value_only = layers.frame.assign(kind="value")
    assert Layers(layers.value, layers.query, value_only).raising == ()


def test_editable_layers():
    layers = ranked((7, 2, 5, 4, 6, 0, 3, 1), (6, 5, 4, 0, 1, 2, 3, 7), {})
    # 7 is the last layer; 6 lies above 5; 5 and 2 are value layers
    assert layers.editable(2, 2) == ((2, 5), (0, 4))
    assert layers.editable(3, 9) == ((2, 4, 5), (0, 1, 3))
    # not layer 2 itself for values, but for queries
    assert layers.editable(2, 2, first=2) == ((4, 5), (2, 3))
    assert layers.editable(1, 1, first=5) == ((6,), (5,))
    with pytest.raises(
        qv.QVLensError, match="No value layer lies between layer 6 and the last one, 7"
    ):
        layers.editable(1, 1, first=6)


@pytest.mark.parametrize("kind", ["gptj", "qwen3-gqa"])
@pytest.mark.parametrize("quiet", [(2, 3), ()])
@pytest.mark.parametrize(
    ("position", "norm", "base", "method"),
    [
        ("subject_last", "full", "pre", "share"),
        ("last", "frozen", "mid", "grad"),
        ("last", "none", "pre", "inner_product"),
    ],
)
def test_layers_are_ranked_by_the_sums_of_their_neurons(
    kind, position, norm, base, method, quiet, true_float64
):
    """Quiet layers write next to nothing, so that the best neurons lie below them. Nothing reads
    what lies above the best neurons: it comes last as a query layer, even where the others' scores
    are negative and its own is 0."""
    lens = tiny_lens(kind, n_layers=4, seed=1)
    for layer in quiet:
        lens.w_out(layer).mul_(1e-9)
    found = qv.locate(lens, FACTS, position, norm=norm, base=base, method=method, top=25)
    value = qv.value_neurons(lens, FACTS, None, norm=norm, base=base, positions=position)
    best = value.top(25)
    reach = int(best.frame["layer"].max())
    assert (reach < 2) == bool(quiet)
    by_layer = value.frame.groupby("layer")["score"].sum()
    queries = qv.query_layers(lens, FACTS, best, method=method, positions=position)
    by_query = queries[queries["kind"] == "ffn"].groupby("layer")["score"].sum()
    scores = {name: rows.set_index("layer")["score"] for name, rows in found.frame.groupby("kind")}
    exactly = norm == "full" or base == "loo_final"
    tolerance = 1e-9 if exactly else 1e-6 * lens.d_mlp * len(FACTS)
    assert (scores["value"] - by_layer).abs().max() < tolerance
    assert (scores["query"] - by_query).abs().max() < tolerance
    assert found.frame.index.tolist() == list(range(8))
    assert found.value == tuple(sorted(by_layer.index, key=lambda layer: -by_layer[layer]))
    assert found.query == (
        *sorted(range(reach), key=lambda layer: -by_query[layer]),
        *range(reach, 4),
    )
    if quiet:
        assert (by_query[0] < 0) == (
            method == "grad" or (kind, method) == ("qwen3-gqa", "inner_product")
        )
    attributes = {"norm": norm, "base": base, "method": method, "position": position, "prompts": 2}
    assert attributes.items() <= found.frame.attrs.items()


@pytest.mark.parametrize("kind", ["gptj", "qwen3-gqa"])
def test_layers_by_effects_are_ranked_by_what_the_answer_loses(kind):
    """The positive effects of the best neurons, with so many of them that some are negative."""
    lens = tiny_lens(kind)
    most = lens.n_layers * lens.d_mlp
    found = qv.locate(lens, FACTS, "subject_last", by="effects", top=most)
    frame = qv.neuron_effects(lens, FACTS, None, positions="subject_last").frame
    wanted = frame[frame["score"] > 0].groupby("layer")["score"].sum()
    scores = found.frame[found.frame["kind"] == "value"].set_index("layer")["score"]
    wanted = wanted.reindex(range(lens.n_layers), fill_value=0.0)  # nothing reads the last one
    assert scores.tolist() == pytest.approx(wanted.tolist(), rel=1e-5)
    assert found.value == tuple(wanted.sort_values(ascending=False, kind="stable").index)


@pytest.mark.parametrize("kind", ["gptj", "qwen3-gqa"])
def test_layers_by_a_set_of_neurons_are_ranked_by_its_scores(kind):
    """Any scores of the same prompts: those of the gradient are by='effects', RelP's are others."""
    lens = tiny_lens(kind)
    at = {"position": "subject_last"}
    effects = qv.neuron_effects(lens, FACTS, 25, positions="subject_last")
    named, given = (qv.locate(lens, FACTS, **at, by=by, top=25) for by in ("effects", effects))
    pd.testing.assert_frame_equal(named.frame, given.frame)
    assert given.frame.attrs["by"] == "neurons"
    relp = qv.neuron_effects(lens, FACTS, 25, positions="subject_last", method="relp")
    found = qv.locate(lens, FACTS, **at, by=relp)
    wanted = relp.frame[relp.frame["score"] > 0].groupby("layer")["score"].sum()
    scores = found.frame[found.frame["kind"] == "value"].set_index("layer")["score"]
    assert scores[scores > 0].to_dict() == pytest.approx(wanted.to_dict())
    assert found.frame.attrs["method"] != "relp"  # that is how the queries were scored
    assert found.frame.attrs["scored_by"] == "relp"
    with pytest.raises(ConfigError, match="give both the same facts"):
        qv.locate(lens, FACTS[:1], **at, by=relp)
    union = relp.union()  # one set everywhere, whatever it was scored on
    found = qv.locate(lens, FACTS[:1], **at, by=union)
    wanted = union.frame[union.frame["score"] > 0].groupby("layer")["score"].sum()
    scores = found.frame[found.frame["kind"] == "value"].set_index("layer")["score"]
    assert scores[scores > 0].to_dict() == pytest.approx(wanted.to_dict())
    heads = qv.neuron_effects(lens, FACTS, 3, unit="head")
    for strange in (heads, qv.NeuronSet.of([(0, 1)])):
        with pytest.raises(ConfigError, match="FFN neurons with scores"):
            qv.locate(lens, FACTS, by=strange)


@pytest.mark.parametrize(
    ("kind", "counts"),
    # ACE's 3 value and 6 query layers of GPT-J's 28, 5 and 3 of Qwen3-8B's 36
    [
        ("gptj", {3: (1, 1), 12: (1, 3), 28: (3, 6)}),
        ("qwen3-gqa", {3: (1, 1), 12: (2, 1), 36: (5, 3)}),
    ],
)
def test_so_many_layers_are_edited(kind, counts):
    backend = tiny_lens(kind).backend_adapter
    for n_layers, wanted in counts.items():
        assert layer_counts(SimpleNamespace(n_layers=n_layers, backend_adapter=backend)) == wanted
