"""NeuronSet: set algebra, selection, and what survives the disk."""

from __future__ import annotations

import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import qv_lens as qv
from qv_lens.patch import Delta
from tests.models import tiny_lens

units = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9)), unique=True)


@settings(deadline=None)  # a busy machine is not a fault
@given(units, units, units)
def test_algebra_of_sets(a, b, c):
    A, B, C = map(qv.NeuronSet.of, (a, b, c))
    assert set(A | B) == set(a) | set(b)
    assert set(A & B) == set(a) & set(b)
    assert set(A - B) == set(a) - set(b)
    assert set((A | B) & C) == set((A & C) | (B & C))
    assert len(A | A) == len(A)
    assert sorted((layer, n) for layer, ns in A.by_layer().items() for n in ns) == sorted(a)


def frame(rows):
    return pd.DataFrame(rows, columns=["prompt", "unit", "layer", "neuron", "coefficient", "score"])


def test_top_is_per_prompt_and_union_keeps_the_best_score():
    rows = [
        (0, "ffn", 0, 1, 1.0, 0.5),
        (0, "ffn", 0, 2, 1.0, 0.9),
        (1, "ffn", 0, 1, 1.0, 0.7),
        (1, "ffn", 1, 1, 1.0, 0.1),
    ]
    neurons = qv.NeuronSet(frame(rows))
    assert neurons.top(1).frame[["prompt", "neuron"]].values.tolist() == [[0, 2], [1, 1]]
    union = neurons.union().frame
    assert union["score"].tolist() == [0.9, 0.7, 0.1]
    assert set(union["prompt"]) == {-1}


def test_disk(tmp_path):
    neurons = qv.NeuronSet(frame([(0, "ffn", 2, 5, 1.5, 0.25)]), {"norm": "frozen", "base": "mid"})
    again = qv.NeuronSet.load(neurons.save(tmp_path / "set.parquet"))
    pd.testing.assert_frame_equal(again.frame, neurons.frame)
    assert again.settings == neurons.settings


def test_frames_carry_their_settings():
    assert qv.NeuronSet.of([(0, 1)]).to_frame().attrs == {"by": "hand"}


def test_neurons_of_another_model_are_warned_of():
    lens, other = tiny_lens("qwen3-gqa"), tiny_lens("gptj")
    value = qv.value_neurons(lens, "Olga works for", 3, target="predicted")
    query = qv.query_neurons(lens, "Olga works for", value, 3)
    for neurons in (value, query):
        with (
            pytest.warns(UserWarning, match="found on tiny-qwen3"),
            other.intervene(qv.Zero(neurons)),
        ):
            pass
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with lens.intervene(qv.Zero(neurons)):
                pass


def test_a_trace_belongs_to_the_weights_in_force():
    lens = tiny_lens("gptj")
    patch = qv.Patch(
        {(1, "W_out"): Delta(torch.ones(*lens.w_out(1).shape, dtype=torch.float64))},
        lens.fingerprint,
    )
    with lens.patched(patch):
        trace = lens.trace("Olga works for")
        qv.layer_scores(lens, trace, target="predicted")
    with pytest.raises(qv.QVLensError, match="taken on other weights"):
        qv.layer_scores(lens, trace, target="predicted")
    with lens.patched(patch):  # in force again
        qv.layer_scores(lens, trace, target="predicted")


def test_mixed_or_unknown_units_are_refused():
    mixed = qv.NeuronSet(frame([(0, "ffn", 0, 0, 1.0, 1.0), (0, "head", 0, 0, 1.0, 1.0)]))
    with pytest.raises(qv.QVLensError, match="mixes units"):
        _ = mixed.unit
    with pytest.raises(qv.QVLensError, match="Unit 'x' not found"):
        qv.NeuronSet.of([(0, 0)], unit="x")


def test_a_layer_that_the_model_does_not_have_is_refused():
    found = qv.NeuronSet(qv.NeuronSet.of([(1, 2)]).frame, {"model": "small", "layers": 4})
    assert len(found.layer(1)) == 1
    assert len(found.layer(3)) == 0
    with pytest.raises(qv.QVLensError, match="no layer 4: small has 4, 0 to 3"):
        found.layer(4)
    with pytest.raises(qv.QVLensError, match="no layer -1"):
        qv.NeuronSet.of([(1, 2)]).layer(-1)


@pytest.mark.parametrize(
    "ask",
    [
        lambda lens, fact: qv.query_neurons(lens, fact, 300),
        lambda lens, fact: qv.faithfulness(lens, [fact], 300),
        lambda lens, fact: qv.NeuronSet.of([(0, 1)]) & 3,
        lambda lens, fact: qv.NeuronSet.of([(0, 1)]) - [(0, 1)],
        lambda lens, fact: qv.NeuronSet.of([(0, 1)]) | {(0, 1)},
    ],
)
def test_what_is_no_set_of_neurons_is_refused(ask):
    lens = tiny_lens("gptj", dtype=torch.float32)
    with pytest.raises(qv.QVLensError, match=r"NeuronSet|neurons by name"):
        ask(lens, qv.Fact("{} works for", "Olga Pelodan", "Nortek"))


def test_layers_and_neurons_are_whole_numbers_whatever_pandas_made_of_them():
    """A union with an empty set, a merge, pairs that can be read only once."""
    both = qv.NeuronSet.of([]) | qv.NeuronSet.of(zip([1], [2], strict=True))
    assert both.units == [(1, 2)]
    assert both.frame[["layer", "neuron"]].dtypes.tolist() == [np.int64, np.int64]
    frame = both.frame.astype({"layer": float, "neuron": "Int64"})
    assert qv.NeuronSet(frame).units == [(1, 2)]
    assert qv.NeuronSet.of(np.array([[4, 148]])).units == [(4, 148)]
    for units in ([4, 148], [(1, 2, 3)], [(1, 2.7)], [("a", 2)], [(1, None)], [(True, 1)]):
        with pytest.raises(qv.QVLensError, match=r"pairs, got|holds whole numbers, got"):
            qv.NeuronSet.of(units)


def test_what_is_kept_is_asked_for_rightly():
    best = qv.NeuronSet.of([(0, 1), (0, 2)])
    for k in (None, "3", 2.5, -1):
        with pytest.raises(qv.QVLensError, match="whole number"):
            best.top(k)
    for rows in (best.frame.index, best.frame["neuron"], (best.frame["layer"] == 0)[:1], [True]):
        with pytest.raises(qv.QVLensError, match="true or false for each of the 2 rows"):
            best.where(rows)
    some = best.where(best.frame["neuron"] == 2).about("a text", -1)
    assert some == qv.NeuronSet(some.frame.reset_index(drop=True), some.settings)


def test_rows_about_a_prompt_are_its_own_and_those_of_the_whole_set():
    frame = {"prompt": [0, 1, -1], "unit": "ffn", "layer": 0, "neuron": [5, 6, 7], "coefficient": 1.0, "score": 1.0}  # fmt: skip
    some = qv.NeuronSet(pd.DataFrame(frame))
    assert some.about("a text", 1).units == [(0, 6), (0, 7)]


def test_attention_at_another_position_is_another_unit_and_a_neuron_is_not():
    frame = {"prompt": 0, "unit": "attn_neuron", "layer": 0, "neuron": 5, "position": [2, 3], "coefficient": 1.0,
             "score": [1.0, 2.0]}  # fmt: skip
    heads = qv.NeuronSet(pd.DataFrame(frame))
    first = heads.where(heads.frame["position"] == 2)
    assert (len(heads.union()), len(heads - first), len(heads & first)) == (2, 1, 1)
    ffn = qv.NeuronSet(heads.frame.assign(unit="ffn"))
    assert ffn.union().frame["score"].tolist() == [2.0]
