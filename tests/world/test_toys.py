"""The bundled models: what they know, what is attributed in them, and how they take an edit."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import cache, partial

import pytest
import torch

import qv_lens as qv
from qv_lens.case_study import alone, without_the_best
from qv_lens.editing.presets import presets
from qv_lens.editing.statistics import covariance
from qv_lens.evaluation.ablation import suppress
from qv_lens.evaluation.answers import accuracy, first_sentences
from qv_lens.evaluation.metrics import FORCED
from qv_lens.evaluation.protocols import evaluate
from qv_lens.facts.records import Probe
from qv_lens.material import file_material
from qv_lens.models.interventions import ffn_coefficients
from qv_lens.models.zoo import BUNDLED, WEIGHTS
from qv_lens.reporting.page import report
from qv_lens.world import cases as world_cases
from qv_lens.world import generator
from qv_lens.world.material import world_material
from tests.models import tiny_lens

WORLD = generator.build(0)


@pytest.fixture(scope="module", params=BUNDLED)
def lens(request):
    return qv.load(request.param)


@pytest.fixture(scope="module")
def in_dtype(lens):
    return cache(partial(qv.load, lens.name))


@pytest.fixture(scope="module")
def gptj():
    """One of the two is enough for a whole study; the demo of toy-qwen3 is run by hand."""
    return qv.load("toy-gptj")


def test_size_and_shape(lens):
    assert lens.n_layers >= 12
    assert sum(file.stat().st_size for file in (WEIGHTS / lens.name).iterdir()) < 16e6
    assert (WEIGHTS / lens.name / "card.json").exists()


def test_it_knows_its_facts(lens):
    rng = random.Random(0)
    facts = [world_cases.as_fact(WORLD, chain) for chain in rng.sample(WORLD.facts(), 200)]
    unseen = [(f, i) for f in WORLD.facts() if (i := WORLD.unseen_phrasing(f)) is not None]
    two = [c for c in WORLD.chains(2) if not WORLD.seen(c)]
    assert accuracy(lens, facts) >= 0.99
    assert accuracy(lens, [world_cases.as_fact(WORLD, f, i) for f, i in unseen]) >= 0.9
    assert accuracy(lens, [world_cases.as_fact(WORLD, c) for c in rng.sample(two, 120)]) >= 0.9


def test_query_scores_agree_with_exact_removal(lens):
    """The 100 best query neurons, summed over 24 two-hop prompts: `grad` against m_j recomputed
    without each neuron."""
    chains = random.Random(3).sample([c for c in WORLD.chains(2) if not WORLD.seen(c)], 24)
    trace = lens.trace([world_cases.as_fact(WORLD, c) for c in chains])
    value = qv.value_neurons(lens, trace, 30)
    got = qv.query_neurons(lens, trace, value, 100, over="set")
    exact = torch.zeros(lens.n_layers, lens.d_mlp)
    for row in value.frame.itertuples():
        j = torch.tensor([row.neuron])
        h = (trace.resid if lens.backend_adapter.parallel else trace.mid)[row.layer, row.prompt]
        for layer in range(row.layer):
            without = h - trace.m[layer, row.prompt][:, None] * lens.w_out(layer)
            exact[layer] += row.score * (
                1 - ffn_coefficients(lens, row.layer, without, j)[:, 0] / row.coefficient
            )
    best = {(i // lens.d_mlp, i % lens.d_mlp) for i in exact.flatten().topk(100).indices.tolist()}
    assert len(best & set(got)) >= 90


def test_chain_of_thought(lens):
    rng = random.Random(1)
    chains = rng.sample([c for c in WORLD.chains(2) if not WORLD.seen(c)], 12)
    blocks = "".join(
        world_cases.cot_blocks(WORLD, {name for c in chains for name in c.entities}, rng, 3)
    )
    said = lens.generate([f"{blocks}Question: {c.questions()[0]}\nThoughts:" for c in chains], 100)
    assert sum(f"Answer: {c.answer}\n" in text for c, text in zip(chains, said, strict=True)) >= 11


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-10), ("float32", 1e-5)])
@pytest.mark.parametrize("norm", ["frozen", "full"])
@pytest.mark.parametrize("base", ["mid", "pre"])
def test_every_neuron_equals_brute_force(in_dtype, dtype, tolerance, norm, base):
    """6,144 neurons, each added to the stream and read out in float64 with Hugging Face's
    weights."""
    model = in_dtype(dtype=dtype)
    fact = world_cases.facts(WORLD, "P641")[0]
    trace = model.trace(fact)
    got = qv.value_neurons(model, trace, top=None, norm=norm, base=base).frame.set_index(
        ["layer", "neuron"]
    )["score"]
    state = {key: value.double() for key, value in model.hf.state_dict().items()}
    gptj = "transformer.ln_f.weight" in state
    gain = state["transformer.ln_f.weight" if gptj else "model.norm.weight"]
    shift = state["transformer.ln_f.bias"] if gptj else 0.0
    eps = 1e-5 if gptj else model.hf.config.rms_norm_eps
    column = (
        "transformer.h.{}.mlp.fc_out.weight" if gptj else "model.layers.{}.mlp.down_proj.weight"
    )

    def sigma(y):
        y = y - y.mean(-1, keepdim=True) if gptj else y
        return (y.pow(2).mean(-1, keepdim=True) + eps).sqrt()

    def read(y):
        frozen = sigma(trace.final.double())
        centred = y - y.mean(-1, keepdim=True) if gptj else y
        hidden = centred / (frozen if norm == "frozen" else sigma(y)) * gain + shift
        logits = hidden @ state["lm_head.weight"].T + state.get("lm_head.bias", 0.0)
        return logits.log_softmax(-1)[..., trace.prompts[0].answer[0]]

    for layer in range(model.n_layers):
        x = trace.resid[layer, 0].double() + (trace.attn[layer, 0].double() if base == "mid" else 0)
        v = trace.m[layer, 0].double()[:, None] * state[column.format(layer)].T
        expected = read(x + v) - read(x)
        error = (
            torch.tensor(got[layer].sort_index().to_numpy()) - expected
        ).abs() / expected.abs().clamp_min(1)
        assert error.max() <= tolerance


def test_memit_edits_at_the_subject(lens):
    statistics = covariance(lens, world_material(lens, *_request()).texts[:800], range(1, 6))
    before = [lens.w_out(layer).clone() for layer in range(lens.n_layers)]
    cases = world_cases.edit_cases(WORLD, 5, seed=77)
    frame = evaluate(lens, cases, editor=presets(lens.name)["MEMIT"].editor, statistics=statistics)
    after = frame.groupby("metric")["after"].mean()
    assert after["efficacy_acc"] >= 0.8
    assert after["specificity_acc"] >= 0.9
    # these cases have no chain of hops
    assert set(FORCED) - set(frame["metric"]) == {"instance_wise"}
    assert all(torch.equal(lens.w_out(layer), weight) for layer, weight in enumerate(before))


def _request():
    chain = next(c for c in WORLD.facts() if c.relations[0].id == "P641")
    fact = world_cases.as_fact(WORLD, chain)
    return fact, next(
        o for o in world_cases.objects(WORLD, chain.relations[0]) if o != chain.answer
    )


def test_interventions_of_the_study(lens):
    """Few prompts: shapes and counts; accuracy and log-probability with rows of W_out zeroed by
    hand, and intervals of counts from the counts themselves."""
    fact, new = _request()
    material = world_material(lens, fact, new)
    # every other fact ranks, the others are asked
    halves = zip(material.same[:6], material.same[6:12], strict=True)
    few = replace(
        material, same=tuple(fact for pair in halves for fact in pair), other=material.other[:6]
    )
    frame = without_the_best(lens, few)
    assert len(frame) == (1 + 5) * 2
    count = round(0.01 * lens.n_layers * lens.d_mlp)
    assert set(frame["count"]) == {count}
    ranked = qv.value_neurons(lens, material.same[:6], None, over="set").top(count)
    asked = {"same kind": material.same[6:12], "other kinds": material.other[:6]}
    before = {name: lens.logprob(facts) for name, facts in asked.items()}
    kept = [lens.w_out(layer).clone() for layer in range(lens.n_layers)]
    for layer, neuron in ranked:
        lens.w_out(layer)[neuron] = 0.0
    for name, facts in asked.items():
        row = frame[(frame["neurons"] == "top 1%") & (frame["group"] == name)].iloc[0]
        best = lens.next_token_logits(facts).argmax(-1).tolist()
        right = [token == lens.answer_ids(fact)[0] for token, fact in zip(best, facts, strict=True)]
        assert row["accuracy"] == pytest.approx(sum(right) / 6)
        change = sum(lens.logprob(facts)) / 6 - sum(before[name]) / 6
        assert row["logprob_change"] == pytest.approx(change, abs=1e-5)
    for layer, weight in enumerate(kept):
        lens.w_out(layer).copy_(weight)
    layers = qv.locate(lens, material.chains[:6])
    drops, counts = suppress(lens, material.chains[:6])
    clean = counts[counts["condition"] == "clean"]
    assert clean["count"].sum() == pytest.approx(300)
    assert drops["intervention"].tolist() == ["Zero", "Suppress"] * 2
    each = qv.layer_scores(lens, material.chains[:6], how="count")
    error = each.groupby("layer")["score"].std().to_numpy() / 6**0.5
    spread = error > 0  # a layer whose counts are all alike has no interval of this kind
    assert spread.any()
    assert (clean["interval"].to_numpy()[spread] / error[spread]).tolist() == pytest.approx(
        [2.5706] * spread.sum(), rel=1e-3
    )
    raising = qv.query_layers(
        lens, material.chains[:6], qv.value_neurons(lens, material.chains[:6])
    )
    summed = raising[raising["kind"] == "ffn"].groupby("layer")["score"].sum()
    assert list(layers.raising) == summed[summed > 0].sort_values(ascending=False).index.tolist()


def test_study_and_its_page(gptj, tmp_path):
    """The whole walk on a small material, and the page that it writes."""
    fact, new = _request()
    material = world_material(gptj, fact, new)
    small = replace(
        material,
        same=material.same[:8],
        other=material.other[:8],
        chains=material.chains[:6],
        texts=material.texts[:600],
    )
    found = qv.study(gptj, fact, new, material=small, edits=1)
    assert found.answered.strip() == fact.answer
    assert found.settings["seed"] == 0
    assert all(found.settings["versions"].values())
    assert set(found.edits["variant"]) == {"ACE, located layers", "MEMIT", "ACE, random layers"}
    assert found.restored
    assert found.probes["MEMIT"].iloc[0].startswith(new)
    assert found.probes["before"].iloc[0].startswith(fact.answer)
    assert found.states["state"].unique().tolist() == [f"before ({fact.answer})", f"after ({new})"]
    assert found.known
    assert found.removal["whose"].unique().tolist() == [
        "this fact",
        "another of its kind",
        "one of another kind",
    ]
    assert found.probes.loc[found.probes["kind"] == "in other words", "wanted"].eq(new).all()
    page = report(found, tmp_path / "page.html", "qv-lens demo").read_text()
    for text in (fact.subject, new, "qv-lens demo", "Plotly.newPlot", "Eq. 10"):
        assert text in page
    assert "<script src=" not in page


def test_what_a_neuron_does_alone_is_what_is_won_or_lost_without_it(gptj):
    """Of an answer that the model does not give, whose log p moves."""
    fact = replace(_request()[0], answer="golf")
    best = qv.vocabulary(gptj, qv.value_neurons(gptj, fact, 5))
    clean, told = gptj.logprob(fact), alone(gptj, fact, best)
    for row in told.itertuples():
        with gptj.intervene(qv.Zero(qv.NeuronSet.of([(row.layer, row.neuron)]))):
            assert row.alone == pytest.approx(gptj.logprob(fact) - clean, abs=1e-4)
    assert told["alone"].abs().max() > 0.05


def test_what_is_said_goes_to_the_end_of_its_sentence(monkeypatch):
    """A full stop in a name, or in a number, ends none; the text is long enough for every name."""
    lens, asked = tiny_lens("gptj", dtype=torch.float32), []
    texts = [" J. R. R. Tolkien. He wrote", " 3.5 m\nmore", " golf. Tim plays"]
    monkeypatch.setattr(lens, "generate", lambda texts_, tokens: asked.append(tokens) or texts)
    names = ("J. R. R. Tolkien", "C. S. Lewis of Oxford and Cambridge")
    probes = [Probe(f"{text} is", name) for text, name in zip("abc", (*names, "golf"), strict=True)]
    assert first_sentences(lens, probes, names[0]) == ["J. R. R. Tolkien", "3.5 m", "golf"]
    assert asked == [max(len(lens.answer_ids(probe)) for probe in probes) + 1]
    assert asked[0] > 8


def test_facts_outside_the_world_are_refused(lens):
    with pytest.raises(qv.QVLensError, match="does not hold"):
        world_material(
            lens, qv.Fact("{} plays the sport of", "Tim Duncan", "basketball"), "football"
        )
    fact = _request()[0]
    with pytest.raises(qv.QVLensError, match=f"says '{fact.answer}'"):
        world_material(
            lens, replace(fact, answer="judo" if fact.answer != "judo" else "golf"), "golf"
        )
    with pytest.raises(qv.QVLensError, match="nothing to edit"):
        world_material(lens, fact, fact.answer)
    with pytest.raises(qv.QVLensError, match="is not an object"):
        world_material(lens, _request()[0], "Oslo")


def test_vocabulary_is_sign_aware(lens):
    fact, _ = _request()
    value = qv.value_neurons(lens, fact, top=5)
    frame = qv.vocabulary(lens, value, top=4)
    flipped = value.frame.assign(coefficient=-value.frame["coefficient"])
    other = qv.vocabulary(lens, qv.NeuronSet(flipped), top=4)
    assert frame["promoted"].tolist() == other["suppressed"].tolist()
    assert frame["suppressed"].tolist() == other["promoted"].tolist()
    assert all(len(set(tokens)) == 4 for tokens in frame["promoted"])


def test_a_study_of_the_users_own_facts(gptj, tmp_path):
    """Facts and text from files; steps without material are left out and the page says so."""
    import json

    fact, new = _request()
    others = [*world_cases.facts(WORLD, "P641")[1:7], *world_cases.facts(WORLD, "P36")[:4]]
    facts, text = tmp_path / "facts.json", tmp_path / "text.txt"
    facts.write_text(
        json.dumps([{"prompt": f.prompt, "subject": f.subject, "answer": f.answer} for f in others])
    )
    text.write_text("\n".join(world_material(gptj, fact, new).texts[:700]))
    found = qv.study(gptj, fact, new, material=file_material(fact, new, facts, text))
    assert len(found.ablation) == 12
    assert found.suppression.empty
    assert found.edits[found.edits["metric"] == "specificity_acc"]["cases"].tolist() == [1, 1, 1]
    (case,) = file_material(fact, others[0].answer, facts, text).cases
    assert others[0] not in case.neighbours  # nothing could be seen to change there
    assert len(case.neighbours) == sum(f.answer != others[0].answer for f in others[:6])
    assert "Query neurons are not silenced" in report(found, tmp_path / "page.html").read_text()


def test_the_phrasing_that_is_studied_is_the_one_that_is_edited():
    world = generator.build(0)
    chain = next(c for c in world.facts() if c.relations[0].id == "P641")
    asked = [world_cases.as_fact(world, chain, phrasing) for phrasing in (0, 2)]
    for fact, other in zip(asked, reversed(asked), strict=True):
        case = world_material(qv.load("toy-gptj"), fact, "golf").cases[0]
        assert case.request.fact.text == fact.text
        told = [each.text for each in case.paraphrases]
        assert other.text in told
        assert fact.text not in told
