"""What results say beside their scores: coefficients, heads, positions, order, settings; and the
values taken by default."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import qv_lens as qv
from qv_lens.attribution.setting import setting
from qv_lens.evaluation.ablation import ablate, answers, suppress
from qv_lens.evaluation.faithfulness import areas
from qv_lens.evaluation.known_cases import known
from qv_lens.facts.records import Hop
from tests.attribution.test_value import FACTS
from tests.models import KINDS, tiny_lens

LONG = qv.Fact("{} works for", "Olga Pelodan", "Nortek Dalrin")


def columns(frame, *names):
    """Columns of a frame as an index into a tensor."""
    return tuple(torch.tensor(frame[name].tolist()) for name in names)


@pytest.mark.parametrize("kind", KINDS)
def test_coefficients_are_those_of_the_pass(kind):
    lens = tiny_lens(kind)
    trace = lens.trace(FACTS, attention=True)
    heads, kv = KINDS[kind]
    channels = trace.z.shape[2] // heads
    for unit, kept in (("ffn", trace.m), ("attn_channel", trace.z)):
        frame = qv.value_neurons(lens, trace, None, unit=unit).frame
        assert np.array_equal(
            frame["coefficient"], kept[columns(frame, "layer", "prompt", "neuron")]
        )
        whole = qv.value_neurons(lens, trace, None, unit=unit, over="set").frame
        assert len(whole) * 2 == len(frame)
        mean = kept.mean(1)[columns(whole, "layer", "neuron")]
        assert np.allclose(whole["coefficient"], mean, rtol=1e-12, atol=0)
    frame = qv.value_neurons(lens, trace, None, unit="attn_neuron").frame
    assert (frame["head"] == frame["neuron"] // channels).all()
    layer, prompt, head, key, neuron = columns(
        frame, "layer", "prompt", "head", "position", "neuron"
    )
    read = head // (heads // kv) * channels + neuron % channels
    expected = trace.pattern[layer, prompt, head, key] * trace.v[layer, prompt, read, key]
    assert np.allclose(frame["coefficient"], expected, rtol=1e-12, atol=0)
    frame = qv.value_neurons(lens, trace, None, unit="head_position").frame
    weights = trace.pattern[columns(frame, "layer", "prompt", "neuron", "position")]
    assert np.array_equal(frame["coefficient"], weights)
    assert (frame["unit"] == "head").all()
    for heads_frame in (frame, qv.value_neurons(lens, trace, None, unit="head").frame):
        assert (heads_frame["head"] == heads_frame["neuron"]).all()
    assert heads_frame["coefficient"].isna().all()
    assert len(heads_frame) == 2 * lens.n_layers * heads
    assert "head" not in qv.value_neurons(lens, trace, 5).frame


@pytest.mark.parametrize("method", ["exact", "topk", "moments"])
def test_the_top_are_the_first_of_all(method):
    lens = tiny_lens("gptj", dtype=torch.float32)
    every = qv.value_neurons(lens, FACTS, None)
    count = lens.n_layers * lens.d_mlp
    assert every.frame.groupby("prompt").size().tolist() == [count, count]
    for _, rows in every.frame.groupby("prompt"):
        assert rows["score"].is_monotonic_decreasing
    for top in (1, 7):
        some = qv.value_neurons(lens, FACTS, top, method=method)
        first = every.frame.groupby("prompt").head(top)
        assert (
            some.frame[["prompt", "layer", "neuron"]].to_numpy().tolist()
            == first[["prompt", "layer", "neuron"]].to_numpy().tolist()
        )
        assert np.allclose(some.frame["score"], first["score"], atol=2e-6)
    assert len(qv.value_neurons(lens, FACTS, 10**6, method=method)) == 2 * count
    with pytest.raises(qv.QVLensError, match="at least 1"):
        qv.value_neurons(lens, FACTS, 0, method=method)


@pytest.mark.parametrize("kind", ["gptj", "qwen3-gqa"])
def test_settings_say_how_scores_came_about(kind):
    lens = tiny_lens(kind)
    with torch.no_grad():
        predicted = [
            lens.hf(torch.tensor([prompt.ids])).logits[0, -1].argmax().item()
            for prompt in lens.tokenize(FACTS)
        ]
    # of a bare prompt, its own prediction
    facts = [FACTS[0], lens.tokenizer.decode(lens.tokenize(FACTS[1])[0].ids)]
    settings = qv.value_neurons(lens, facts, 5, norm="none", base="pre", over="set").settings
    first = lens.answer_ids(FACTS[0])[0]
    expected = {
        "norm": "none", "base": "pre", "unit": "ffn", "over": "set", "method": "topk", "dtype": "float64",
        "fingerprint": lens.fingerprint, "texts": [facts[0].text, facts[1]],
        "target_tokens": [lens.token_label(first), lens.token_label(predicted[1])],
        "positions": [len(lens.str_tokens(fact)) - 1 for fact in facts],
        "target_is_argmax": [first == predicted[0], True],
    }  # fmt: skip
    assert expected.items() <= settings.items()
    assert "against" not in settings
    predicted_labels = [lens.token_label(token) for token in predicted]
    assert (
        qv.value_neurons(lens, FACTS, 5, target="predicted").settings["target_tokens"]
        == predicted_labels
    )
    pair = qv.value_neurons(lens, FACTS, 5, target=(7, 9)).settings
    assert (pair["target_tokens"], pair["against"]) == (
        [lens.token_label(7)] * 2,
        [lens.token_label(9)] * 2,
    )
    frame = qv.layer_scores(lens, FACTS, "attn", norm="full", base="pre", over="set")
    assert {
        "norm": "full",
        "base": "pre",
        "how": "neuron_sum",
        "kind": "attn",
        "over": "set",
    }.items() <= frame.attrs.items()
    value = qv.value_neurons(lens, FACTS, 40, norm="full", base="pre")
    read = {
        "norm": "full",
        "base": "pre",
        "method": "share",
        "targets": 9,
        "fingerprint": lens.fingerprint,
    }
    query = qv.query_neurons(
        lens, FACTS, value, 5, method="share", targets=9, unit="head", over="set"
    )
    assert {**read, "unit": "head", "over": "set"}.items() <= query.settings.items()
    assert (
        read.items() <= qv.query_layers(lens, FACTS, value, method="share", targets=9).attrs.items()
    )
    drawn = qv.query_neurons(lens, FACTS, value, 5, method="share", targets=9)
    for part in qv.qv_graph(lens, FACTS, value, drawn, method="share", targets=9):
        assert read.items() <= part.attrs.items()


def test_every_vocabulary_row_can_be_asked_for_and_no_other():
    lens = tiny_lens("gptj")
    for token in (0, lens.d_vocab - 1):
        assert len(qv.value_neurons(lens, FACTS, 3, target=token)) == 6
    for token in (-1, lens.d_vocab):
        with pytest.raises(
            qv.QVLensError, match=f"Token id {token} is outside the vocabulary of {lens.d_vocab}"
        ):
            qv.value_neurons(lens, FACTS, 3, target=token)


@pytest.mark.parametrize("method", ["topk", "exact", "moments", "first_order", None])
def test_scores_that_are_not_numbers_are_refused(method):
    lens = tiny_lens("gptj")
    lens.w_out(2)[4, 5] = float("nan")
    with pytest.raises(qv.QVLensError, match="not a number"):
        qv.value_neurons(lens, FACTS, 3, method=method)


def test_values_taken_by_default():
    """300 neurons, 30 targets, 20 steps, the best hundredth; CTP's 15 and 1 in batches of 2; ten
    tokens."""
    lens = tiny_lens("gptj", dtype=torch.float32)
    value = qv.value_neurons(lens, FACTS)
    assert value == qv.value_neurons(lens, FACTS, 300)
    assert len(value) == 600
    query = qv.query_neurons(lens, FACTS, value)
    assert query == qv.query_neurons(lens, FACTS, value, 300, targets=30)
    assert len(query) == 600
    assert (
        query.frame["score"]
        .ne(qv.query_neurons(lens, FACTS, value, targets=31).frame["score"])
        .any()
    )
    layers = qv.query_layers(lens, FACTS, value)
    assert layers.equals(qv.query_layers(lens, FACTS, value, targets=30))
    assert not layers.equals(qv.query_layers(lens, FACTS, value, targets=31))
    edges = qv.qv_graph(lens, FACTS, value, query.top(9)).edges
    assert edges.equals(qv.qv_graph(lens, FACTS, value, query.top(9), targets=30).edges)
    assert qv.layer_scores(lens, FACTS, how="count").groupby("prompt")["score"].sum().tolist() == [
        300,
        300,
    ]
    assert qv.locate(lens, FACTS).frame.equals(qv.locate(lens, FACTS, top=300).frame)
    gradients = qv.integrated_gradients(lens, FACTS)
    assert gradients == qv.integrated_gradients(lens, FACTS, 300, steps=20)
    assert len(gradients) == 600
    ensemble = qv.neuron_ensemble(lens, FACTS)
    plain = {"parameters": ("W_out",), "axis": "column", "reduce": "sum", "together": False}
    assert ensemble == qv.neuron_ensemble(lens, FACTS, 0.01, steps=20, **plain)
    assert len(qv.neuron_ensemble(lens, FACTS, steps=1)) == len(ensemble)
    assert len(qv.integrated_gradients(lens, FACTS, 7, steps=1)) == 14
    paths = qv.transmission_paths(lens, [*FACTS, LONG])
    assert paths.equals(
        qv.transmission_paths(lens, [*FACTS, LONG], 15, 1, batch_size=2, gate=False)
    )
    assert not paths.equals(qv.transmission_paths(lens, [*FACTS, LONG], 15, 1, batch_size=3))
    assert (
        paths.groupby(["layer", "kind"])["path"]
        .apply(lambda marks: (marks == "T+").sum())
        .eq(15)
        .all()
    )
    assert qv.vocabulary(lens, value.top(2)).equals(
        qv.vocabulary(lens, value.top(2), 10, bias=False)
    )
    assert not qv.vocabulary(lens, value.top(2)).equals(
        qv.vocabulary(lens, value.top(2), bias=True)
    )
    assert (qv.query_neurons(lens, FACTS, value, 9, targets=1).frame["score"] != 0).any()
    for column in ("promoted", "suppressed"):
        assert qv.vocabulary(lens, value.top(2))[column].map(len).eq(10).all()


def test_little_memory_changes_no_score(true_float64):
    """Room for three rows of logits at a time; for less than one, a refusal: whatever is scored."""
    lens = tiny_lens("gptj")
    row = 2 * lens.d_vocab * 8
    trace = lens.trace(FACTS, attention=True)
    for unit in ("ffn", "head", "head_position", "attn_neuron", "attn_channel"):
        whole = qv.value_neurons(lens, trace, None, unit=unit).frame
        tiled = qv.value_neurons(lens, trace, None, unit=unit, memory_budget=3 * row).frame
        keys = [name for name in ("prompt", "layer", "neuron", "position") if name in whole]
        difference = whole.set_index(keys)["score"] - tiled.set_index(keys)["score"]
        assert difference.abs().max() < 1e-12
        assert len(difference) == len(whole)
        with pytest.raises(qv.QVLensError, match="memory_budget"):
            qv.value_neurons(lens, trace, None, unit=unit, memory_budget=row - 1)
    assert (
        len(qv.value_neurons(lens, trace, None, memory_budget=row))
        == 2 * lens.n_layers * lens.d_mlp
    )
    with pytest.raises(qv.QVLensError, match="memory_budget"):
        qv.layer_scores(lens, trace, memory_budget=row - 1)


def test_a_trace_fits_only_what_it_holds():
    lens = tiny_lens("gptj")
    with pytest.raises(qv.QVLensError, match="not 'subject_last'"):
        qv.value_neurons(lens, lens.trace(FACTS), 5, positions="subject_last")
    at = lens.trace(FACTS, "subject_last")
    assert (
        qv.value_neurons(lens, at, 5, positions="subject_last").settings["positions"]
        == at.positions.tolist()
    )
    answer = lens.trace(LONG, "answer")
    with pytest.raises(qv.QVLensError, match="goes with target='sequence'"):
        qv.value_neurons(lens, answer, 5, positions="answer")
    with pytest.raises(qv.QVLensError, match="trace with positions='answer'"):
        qv.value_neurons(lens, lens.trace(LONG), 5, target="sequence")
    assert len(qv.value_neurons(lens, answer, 5, target="sequence")) == 5
    # it would bring its own norm, silently
    with pytest.raises(qv.QVLensError, match="got Setting"):
        qv.value_neurons(lens, setting(lens, FACTS, norm="full"), 5, norm="none")
    with pytest.raises(qv.QVLensError, match="attention=True"):
        qv.value_neurons(lens, lens.trace(FACTS), 5, unit="attn_neuron")
    with pytest.raises(qv.QVLensError, match="needs a category of every fact"):
        qv.value_neurons(
            lens, [replace(FACTS[0], category="A"), "The capital of Norway is"], 5, over="category"
        )


@pytest.mark.parametrize("kind", ["gptj", "qwen3-gqa"])
@pytest.mark.parametrize(("dtype", "size"), [(torch.bfloat16, 1), (torch.float16, 400)])
def test_every_verb_takes_a_model_in_half_precision(kind, dtype, size):
    """Scores in float32 or better, and near those of the same weights in float64: what is wrong by
    more than rounding shows. A stream above 256, as SmolLM2 has it, has no square in float16."""
    half = tiny_lens(kind, dtype=dtype)
    half.backend_adapter.embedding().mul_(size)
    exact = tiny_lens(kind, dtype=torch.float64)
    for weight, rounded in zip(exact.hf.parameters(), half.hf.parameters(), strict=True):
        weight.copy_(rounded)
    facts = [FACTS[0], LONG]
    kept = {}
    for lens in (half, exact):
        value = qv.value_neurons(lens, facts, 20)
        value = kept.setdefault("targets", value)  # the same targets for both
        attention = kept.setdefault(
            "attention", qv.value_neurons(lens, facts, 20, unit="attn_neuron")
        )
        value = qv.NeuronSet(value.frame)
        attention = qv.NeuronSet(attention.frame)
        frames = {
            f"value {unit} {norm}": qv.value_neurons(lens, facts, None, unit=unit, norm=norm).frame
            for unit in ("ffn", "attn_channel", "attn_neuron", "head", "head_position") for norm in ("frozen", "full")
        }  # fmt: skip
        frames |= {
            f"query {method}": qv.query_neurons(lens, facts, value, None, method=method).frame
            for method in ("grad", "share", "inner_product")
        }
        frames["query attention"] = qv.query_neurons(lens, facts, attention, None).frame
        frames["layers"] = qv.query_layers(lens, facts, value)
        frames["whole"] = qv.layer_scores(lens, facts, "attn", "layer_vector")
        frames["bias"] = qv.layer_scores(lens, facts).assign(score=lambda frame: frame["whole"])
        frames["edges"] = qv.qv_graph(lens, facts, value, value).edges.assign(
            score=lambda frame: frame["weight"]
        )
        for method in ("gradient", "relp"):
            frames[f"effects {method}"] = qv.neuron_effects(lens, facts, None, method=method).frame
        frames["gradients"] = qv.integrated_gradients(lens, facts, None, steps=4).frame
        frames["ensemble"] = qv.neuron_ensemble(lens, facts, 1.0, steps=4, together=True).frame
        frames["paths"] = qv.transmission_paths(lens, facts)
        kept[lens] = frames
    for name, frame in kept[half].items():
        keys = [
            key
            for key in ("prompt", "kind", "layer", "neuron", "position", "source", "target")
            if key in frame
        ]
        first, second = (kept[lens][name].set_index(keys)["score"] for lens in (half, exact))
        assert first.dtype in (np.float32, np.float64)
        assert len(first) == len(second)
        assert first.corr(second.reindex(first.index)) > 0.97, name
    assert qv.vocabulary(half, kept["targets"])["promoted"].map(len).eq(10).all()
    assert sorted(qv.locate(half, facts).value) == [0, 1, 2]
    assert qv.ace_official(half, facts).counts["score"].sum() == 2 * min(
        300, half.n_layers * half.d_mlp
    )


def test_every_frame_names_its_model():
    """What is known, what is lost, areas under curves: a frame written to a file says of what it is."""
    lens = tiny_lens("gptj")
    value = qv.value_neurons(lens, FACTS, 5)
    hop = Hop("What?", FACTS[0].text, FACTS[0].answer)
    case = qv.MultiHopCase(0, (), ("Q",), "Ann", "Bob", hops=(hop,))
    clean = {"all": answers(lens, FACTS)}
    frames = [
        qv.known(lens, FACTS)[1],
        qv.known(lens, [])[1],
        known(lens, [case])[1],
        areas(qv.faithfulness(lens, FACTS, {"value": value}, [1, 2])),
        ablate(lens, value, {"all": FACTS}, clean),
        *suppress(lens, FACTS, 2),
    ]
    for frame in frames:
        assert {**frame.attrs, **lens.label, "seed": 0} == {**frame.attrs, "seed": 0}
