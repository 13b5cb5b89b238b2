"""Gradient times activation against finite differences on Hugging Face's own modules."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

import qv_lens as qv
from qv_lens.attribution import effects
from qv_lens.models.baselines import baseline_values
from qv_lens.models.lens import Lens
from tests.models import BACKENDS, KINDS, TINY, tiny_lens, tiny_of, tokenizer

FACTS = [
    qv.Fact("{} works for", "Olga Pelodan", "Nortek Dalrin", category="company"),
    qv.Fact("The capital of {} is the city of", "Norway", "Oslo", category="capital"),
]
STEP = 1e-5
#: neurons asked, of each layer
ASKED = (0, 5, 31)


def slope_at(lens, fact, layer, neuron, at, read, token):
    """The slope of log p(token) on Hugging Face's model, read at one position, of scaling a neuron
    at another."""
    row = torch.tensor([lens.tokenize(fact)[0].row("answer")])
    module = lens.hf.get_submodule(
        lens.backend_adapter.stored_name(layer, "W_out").removesuffix(".weight")
    )
    values = []
    for factor in (1 + STEP, 1 - STEP):

        def scale(_, inputs, factor=factor):
            m = inputs[0].clone()
            m[..., at, neuron] *= factor
            return (m,)

        handle = module.register_forward_pre_hook(scale)
        try:
            values.append(float(lens.hf(row).logits[0, read].log_softmax(-1)[token]))
        finally:
            handle.remove()
    return (values[0] - values[1]) / (2 * STEP)


def slope(lens, fact, layer, neuron, at, token):
    """The same, read where it is scaled."""
    return slope_at(lens, fact, layer, neuron, at, at, token)


@pytest.mark.parametrize("positions", ["subject_last", 0, "all"])
def test_neurons_at_other_tokens(positions, true_float64):
    """Scaled at one token, the answer is read at the prompt's end."""
    lens = tiny_lens("qwen3-gqa")
    found = qv.neuron_effects(lens, FACTS, None, positions=positions).frame
    for i, fact in enumerate(FACTS):
        prompt, token = lens.tokenize(fact)[0], lens.answer_ids(fact)[0]
        for at in prompt.positions(positions):
            for neuron in ASKED:
                row = found[
                    (found["prompt"] == i) & (found["layer"] == 1) & (found["neuron"] == neuron)
                ]
                if positions == "all":
                    row = row[row["position"] == at]
                wanted = slope_at(lens, fact, 1, neuron, at, prompt.last, token)
                assert row["score"].item() == pytest.approx(wanted, abs=1e-8)


def score_of(found, prompt, layer, neuron):
    frame = found.frame
    row = frame[
        (frame["prompt"] == prompt) & (frame["layer"] == layer) & (frame["neuron"] == neuron)
    ]
    return float(row["score"].iloc[0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("together", [1, 16])
def test_every_score_is_the_slope_of_scaling_the_neuron(
    kind, backend, together, true_float64, monkeypatch
):
    monkeypatch.setattr(effects, "TOGETHER", together)
    lens = tiny_lens(kind, backend)
    found = qv.neuron_effects(lens, FACTS, None)
    assert len(found) == len(FACTS) * lens.n_layers * lens.d_mlp
    for i, fact in enumerate(FACTS):
        at, token = lens.tokenize(fact)[0].last, lens.answer_ids(fact)[0]
        for layer in range(lens.n_layers):
            for neuron in ASKED:
                assert score_of(found, i, layer, neuron) == pytest.approx(
                    slope(lens, fact, layer, neuron, at, token), abs=1e-8
                )


@pytest.mark.parametrize(
    "name", ["Gemma 2", "Gemma 3", "OLMo 2", "GPT-NeoX", "OPT", "Falcon", "GPT-2"]
)
def test_every_architecture(name, true_float64):
    assert name in TINY
    lens = qv.Lens.from_hf(tiny_of(name, torch.float64), tokenizer())
    found = qv.neuron_effects(lens, FACTS[1], None)
    at, token = lens.tokenize(FACTS[1])[0].last, lens.answer_ids(FACTS[1])[0]
    for layer in range(lens.n_layers):
        for neuron in ASKED:
            wanted = slope(lens, FACTS[1], layer, neuron, at, token)
            assert score_of(found, 0, layer, neuron) == pytest.approx(wanted, abs=1e-6, rel=1e-5)


def test_sets_add_up_and_contrasts_subtract():
    lens = tiny_lens("gptj")
    each, together = (
        qv.neuron_effects(lens, FACTS, None),
        qv.neuron_effects(lens, FACTS, None, over="set"),
    )
    by_category = qv.neuron_effects(lens, FACTS, None, over="category")
    assert score_of(together, -1, 1, 5) == pytest.approx(
        score_of(each, 0, 1, 5) + score_of(each, 1, 1, 5)
    )
    assert set(by_category.frame["category"]) == {"company", "capital"}
    other = [
        qv.neuron_effects(lens, FACTS[1], None, target=target)
        for target in ("answer", lens.answer_ids("x", "Paris")[0])
    ]
    contrast = qv.neuron_effects(
        lens, FACTS[1], None, target=("answer", lens.answer_ids("x", "Paris")[0])
    )
    assert score_of(contrast, 0, 2, 0) == pytest.approx(
        score_of(other[0], 0, 2, 0) - score_of(other[1], 0, 2, 0)
    )


def test_a_whole_answer_adds_up_its_tokens(true_float64):
    lens = tiny_lens("gptj")
    found = qv.neuron_effects(lens, FACTS[0], None, target="sequence")
    prompt = lens.tokenize(FACTS[0])[0]
    assert len(prompt.answer) > 1
    for layer in range(lens.n_layers):
        # y is the sum over the tokens; a neuron scaled at one of its positions changes later tokens
        # too
        for neuron in ASKED:
            total = 0.0
            for at in prompt.positions("answer"):
                for token, where in zip(prompt.answer, prompt.positions("answer"), strict=True):
                    if where >= at:
                        total += slope_at(lens, FACTS[0], layer, neuron, at, where, token)
            assert score_of(found, 0, layer, neuron) == pytest.approx(total, abs=1e-7)


def test_what_is_zero_has_no_effect_and_sets_serve_interventions():
    lens = tiny_lens("qwen3-gqa")
    best = qv.neuron_effects(lens, FACTS[0], 3)
    clean = lens.logprob(FACTS[0])
    with lens.intervene(qv.Zero(best)):
        assert lens.logprob(FACTS[0]) != clean
        again = qv.neuron_effects(lens, FACTS[0], None)
    for layer, neuron in best.units:
        assert score_of(again, 0, layer, neuron) == 0.0
    assert all(not parameter.requires_grad for parameter in lens.model.parameters())
    with torch.no_grad():
        assert qv.neuron_effects(lens, FACTS[0], 3) == best


def test_bad_requests_are_refused():
    lens = tiny_lens("gptj")
    with pytest.raises(qv.QVLensError, match="Target"):
        qv.neuron_effects(lens, FACTS[0], target="nothing")
    with pytest.raises(qv.QVLensError, match="over"):
        qv.neuron_effects(lens, FACTS[0], over="nothing")
    with pytest.raises(qv.QVLensError, match="goes with target='sequence'"):
        qv.neuron_effects(lens, FACTS, positions="answer")
    with pytest.raises(qv.QVLensError, match="top"):
        qv.neuron_effects(lens, FACTS[0], 0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("positions", ["last", "subject_last"])
def test_rounds_are_what_taking_one_out_by_hand_gives(kind, positions, true_float64):
    """The best neuron, then the best of the model whose row of W_out is zero at that place, and so
    on: by an intervention, pass by pass."""
    lens = tiny_lens(kind)
    fact = FACTS[0]
    found = qv.neuron_effects(lens, fact, 3, rounds=3, positions=positions)
    assert found.frame["round"].tolist() == [0, 1, 2]
    (at,) = lens.tokenize(fact)[0].positions(positions)
    taken, scores = [], []
    for _ in range(3):
        hooks = [
            (lens.backend_adapter.coefficient(layer), _silencing(at, neuron))
            for layer, neuron in taken
        ]
        with lens.intervene(*([_Hooks(hooks)] if hooks else [])):
            frame = qv.neuron_effects(lens, fact, None, positions=positions).frame
        frame = frame[~frame[["layer", "neuron"]].apply(tuple, axis=1).isin(taken)]
        best = frame.iloc[0]
        taken.append((int(best["layer"]), int(best["neuron"])))
        scores.append(best["score"])
    assert found.units == taken
    assert found.frame["score"].tolist() == pytest.approx(scores, rel=1e-9, abs=1e-12)


def _silencing(at, neuron):
    def hook(m):
        out = m.clone()
        out[:, at, neuron] = 0.0
        return out

    return hook


class _Hooks:
    """An intervention of given hooks."""

    def __init__(self, hooks):
        self.given = hooks

    def check(self, lens):
        pass

    def hooks(self, lens):
        return self.given


def test_rounds_of_several_and_their_order(true_float64):
    """Seven in three rounds are three, two and two; a set keeps the order of its rounds, though a
    later round may score higher."""
    lens = tiny_lens("gptj")
    found = qv.neuron_effects(lens, FACTS, 7, rounds=3)
    sizes = found.frame.groupby(["prompt", "round"]).size()
    assert sizes.tolist() == [3, 2, 2, 3, 2, 2]
    first = qv.neuron_effects(lens, FACTS, 3)
    assert found.where(lambda frame: frame["round"] == 0).units == first.units
    assert found.top(5).frame["round"].tolist() == [0, 0, 0, 1, 1] * 2
    assert found.union().frame["round"].is_monotonic_increasing
    together = qv.neuron_effects(lens, FACTS, 4, rounds=4, over="set")
    assert len(set(together.units)) == 4


@pytest.mark.parametrize(
    ("top", "rounds", "says"),
    [(None, 2, "give top="), (3, 4, "at least 4"), (3, 0, "at least 1"), (3, 1.5, "at least 1")],
)
def test_rounds_that_cannot_be(top, rounds, says):
    with pytest.raises(qv.QVLensError, match=says):
        qv.neuron_effects(tiny_lens("gptj"), FACTS, top, rounds=rounds)


METHODS = ("gradient", "relp", "integrated")


def ordered(found):
    """Scores by prompt, then layer and unit."""
    frame = found.frame.sort_values(["prompt", "layer", "neuron"])
    return torch.tensor(frame["score"].to_numpy())


@pytest.mark.parametrize("unit", ["ffn", "attn_channel", "head"])
@pytest.mark.parametrize("method", METHODS)
def test_a_batch_gives_what_single_prompts_give(method, unit, monkeypatch):
    monkeypatch.setattr(effects, "PATH_ROWS", 5)  # paths in several passes
    lens = tiny_lens("qwen3-gqa")
    options = {"method": method, "unit": unit, **({"steps": 4} if method == "integrated" else {})}
    together = ordered(qv.neuron_effects(lens, FACTS, None, **options))
    apart = [ordered(qv.neuron_effects(lens, fact, None, **options)) for fact in FACTS]
    torch.testing.assert_close(together, torch.cat(apart), atol=1e-9, rtol=1e-6)


def moved(lens, fact, layer, columns, share, values, name, at):
    """log p of the answer on Hugging Face's model, some columns of a projection's input moved by a
    share of the way to `values` at one position."""
    prompt = lens.tokenize(fact)[0]
    module = lens.hf.get_submodule(
        lens.backend_adapter.stored_name(layer, name).removesuffix(".weight")
    )

    def move(_, inputs):
        x = inputs[0].clone()
        x[..., at, columns] += share * (values - x[..., at, columns])
        return (x,)

    handle = module.register_forward_pre_hook(move)
    try:
        logits = lens.hf(torch.tensor([prompt.ids])).logits[0, prompt.last]
    finally:
        handle.remove()
    return float(logits.log_softmax(-1)[lens.answer_ids(fact)[0]])


def slope_towards(lens, fact, layer, columns, values, name="W_out"):
    """What log p loses for each share of the way."""
    at = lens.tokenize(fact)[0].last
    ends = [moved(lens, fact, layer, columns, share, values, name, at) for share in (STEP, -STEP)]
    return (ends[1] - ends[0]) / (2 * STEP)


@pytest.mark.parametrize("kind", KINDS)
def test_channels_and_heads_against_hugging_face(kind, true_float64):
    lens = tiny_lens(kind)
    size = len(lens.parameter(0, "W_O")) // lens.backend_adapter.cfg.n_heads
    channels = qv.neuron_effects(lens, FACTS[1], None, unit="attn_channel")
    heads = qv.neuron_effects(lens, FACTS[1], None, unit="head")
    assert set(heads.frame["unit"]) == {"head"}
    assert heads.frame["coefficient"].isna().all()
    for layer in range(lens.n_layers):
        for head in range(4):
            columns = list(range(head * size, (head + 1) * size))
            wanted = slope_towards(lens, FACTS[1], layer, columns, 0.0, "W_O")
            assert score_of(heads, 0, layer, head) == pytest.approx(wanted, abs=1e-8)
            wanted = slope_towards(lens, FACTS[1], layer, columns[:1], 0.0, "W_O")
            assert score_of(channels, 0, layer, columns[0]) == pytest.approx(wanted, abs=1e-8)


@pytest.mark.parametrize("baseline", ["mean", "mean over", "other prompts"])
def test_baselines_against_hugging_face(baseline, true_float64):
    lens = tiny_lens("gptj")
    others = ["Tim Duncan plays the sport of", "Norway is a country in"]
    own, there = lens.trace(FACTS), lens.trace(others)
    values = {
        "mean": own.m.mean(1, keepdim=True).expand_as(own.m),
        "mean over": there.m.mean(1, keepdim=True).expand_as(own.m),
        "other prompts": there.m,
    }[baseline]
    asked = {"mean": "mean", "mean over": qv.MeanOver(others), "other prompts": others}[baseline]
    found = qv.neuron_effects(lens, FACTS, None, baseline=asked)
    for i, fact in enumerate(FACTS):
        for layer in range(lens.n_layers):
            for neuron in ASKED:
                wanted = slope_towards(lens, fact, layer, [neuron], values[layer, i, [neuron]])
                assert score_of(found, i, layer, neuron) == pytest.approx(wanted, abs=1e-8)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("baseline", ["zero", "other prompts"])
def test_integrated_effects_add_up_to_the_loss_of_a_whole_layer(backend, baseline, true_float64):
    """Completeness: a layer's scores add up to what the answer loses when the whole layer goes to
    the baseline."""
    lens = tiny_lens("qwen3-gqa", backend)
    others = ["Tim Duncan plays the sport of", "Norway is a country in"]
    there = lens.trace(others)
    found = qv.neuron_effects(
        lens,
        FACTS,
        None,
        method="integrated",
        steps=200,
        baseline="zero" if baseline == "zero" else others,
    ).frame
    for i, fact in enumerate(FACTS):
        at, columns = lens.tokenize(fact)[0].last, list(range(lens.d_mlp))
        for layer in range(lens.n_layers):
            values = 0.0 if baseline == "zero" else there.m[layer, i]
            ends = [moved(lens, fact, layer, columns, s, values, "W_out", at) for s in (0, 1)]
            total = found[(found["prompt"] == i) & (found["layer"] == layer)]["score"].sum()
            assert total == pytest.approx(ends[0] - ends[1], abs=1e-3)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_rounds_are_the_method_again_on_what_is_left(method, backend):
    lens = tiny_lens("qwen3-gqa", backend)
    options = {"method": method, **({"steps": 3} if method == "integrated" else {})}
    found = qv.neuron_effects(lens, FACTS[0], 4, rounds=4, **options)
    taken = []
    for unit, score in zip(found.units, found.frame["score"], strict=True):
        with lens.intervene(qv.Zero(qv.NeuronSet.of(taken), "last")) if taken else nullcontext():
            frame = qv.neuron_effects(lens, FACTS[0], None, **options).frame
        left = frame[[pair not in taken for pair in zip(frame.layer, frame.neuron, strict=True)]]
        best = left.iloc[0]
        assert (int(best["layer"]), int(best["neuron"])) == unit
        assert best["score"] == pytest.approx(score, abs=1e-9)
        taken.append(unit)


def test_positions_of_a_prompt_add_up():
    lens = tiny_lens("gptj")
    apart = qv.neuron_effects(lens, FACTS, None, positions="all").frame
    summed = qv.neuron_effects(lens, FACTS, None, positions="all", over="positions")
    assert len(summed) == len(FACTS) * lens.n_layers * lens.d_mlp
    for i in range(len(FACTS)):
        wanted = apart[(apart.prompt == i) & (apart.layer == 1) & (apart.neuron == 5)]
        assert score_of(summed, i, 1, 5) == pytest.approx(wanted["score"].sum(), abs=1e-12)
    value = qv.value_neurons(lens, FACTS, None, positions="all").frame
    both = qv.value_neurons(lens, FACTS, None, positions="all", over="positions")
    wanted = value[(value.prompt == 1) & (value.layer == 2) & (value.neuron == 7)]["score"].sum()
    assert score_of(both, 1, 2, 7) == pytest.approx(wanted, abs=1e-12)


def test_heads_and_channels_feed_what_neurons_feed():
    """Found heads and channels are taken out by `Zero`, and read out by `vocabulary`."""
    lens = tiny_lens("qwen3-gqa")
    w_o = lens.parameter(1, "W_O")
    size = len(w_o) // 4
    head, channels = qv.NeuronSet.of([(1, 2)], "head"), range(2 * size, 3 * size)
    with lens.intervene(qv.Zero(head)):
        by_head = lens.logprob(FACTS)
    with lens.intervene(qv.Zero(qv.NeuronSet.of([(1, c) for c in channels], "attn_channel"))):
        by_channels = lens.logprob(FACTS)
    kept = w_o[list(channels)].clone()
    w_o[list(channels)] = 0
    by_weights = lens.logprob(FACTS)
    w_o[list(channels)] = kept
    assert by_head == pytest.approx(by_weights, abs=1e-9)
    assert by_channels == pytest.approx(by_weights, abs=1e-9)
    assert by_weights != pytest.approx(lens.logprob(FACTS), abs=1e-4)
    best = qv.neuron_effects(lens, FACTS[0], 3, unit="attn_channel")
    assert len(qv.vocabulary(lens, best)) == 3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "saliency"}, "gradient, relp, integrated"),
        ({"unit": "attn_neuron"}, "ffn, attn_channel, head"),
        ({"steps": 0, "method": "integrated"}, "at least 1"),
        ({"baseline": "median"}, "MeanOver"),
        ({"baseline": 0}, "Baseline 0 not found"),
        ({"baseline": ["one"]}, "2 facts and 1 other"),
        ({"baseline": ["one", "two words more"], "positions": "all"}, "equally many tokens"),
    ],
)
def test_options_that_mean_nothing_are_refused(options, words):
    with pytest.raises(qv.QVLensError, match=words):
        qv.neuron_effects(tiny_lens("gptj"), FACTS, **options)


def test_a_mean_over_no_facts_is_refused():
    with pytest.raises(qv.QVLensError, match="No facts"):
        qv.MeanOver([])


def test_a_mean_over_facts_that_are_read_once():
    lens = tiny_lens("gptj")
    one, other = (
        qv.neuron_effects(lens, FACTS, 5, baseline=qv.MeanOver(facts))
        for facts in (FACTS, (fact for fact in FACTS))
    )
    assert one.frame["score"].tolist() == other.frame["score"].tolist()
    assert other.settings["baseline"] == "mean over 2 prompts"


def test_the_mean_over_one_fact_is_refused():
    with pytest.raises(qv.QVLensError, match="this is one fact"):
        qv.neuron_effects(tiny_lens("gptj"), FACTS[0], baseline="mean")


@pytest.mark.parametrize("over", ["prompt", "set"])
@pytest.mark.parametrize("together", [1, 16])
def test_candidates_are_really_taken_out(over, together, monkeypatch):
    """By hand: the best by gradient, each zeroed beside what was found before, the one kept whose
    loss is largest."""
    monkeypatch.setattr(effects, "TOGETHER", together)
    lens = tiny_lens("qwen3-gqa")
    found = qv.neuron_effects(lens, FACTS, 3, rounds=3, candidates=5, over=over)
    groups = [FACTS] if over == "set" else [[fact] for fact in FACTS]
    for i, facts in enumerate(groups):
        rows = found.frame[found.frame["prompt"] == (-1 if over == "set" else i)]
        taken = []
        units = zip(rows["layer"], rows["neuron"], strict=True)
        for unit, score in zip(units, rows["score"], strict=True):
            with without(lens, taken):
                ranking = qv.neuron_effects(lens, facts, 5 + len(taken), over="set").units
                before = sum(lens.logprob(facts))
            losses = {}
            for other in [pair for pair in ranking if pair not in taken][:5]:
                with without(lens, [*taken, other]):
                    losses[other] = before - sum(lens.logprob(facts))
            assert max(losses, key=losses.__getitem__) == unit
            assert score == pytest.approx(losses[unit], abs=1e-9)
            taken.append(unit)


def without(lens, units):
    if not units:
        return nullcontext()
    return lens.intervene(qv.Zero(qv.NeuronSet.of(list(units)), "last"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"candidates": 3}, "at least as many"),
        ({"top": None, "candidates": 3}, "at least as many"),
        ({"top": 2, "candidates": 3, "positions": "all"}, "over='positions'"),
    ],
)
def test_candidates_that_mean_nothing_are_refused(options, words):
    with pytest.raises(qv.QVLensError, match=words):
        qv.neuron_effects(tiny_lens("gptj"), FACTS, **options)


def replaced(lens, units, values):
    """Coefficients held at values, each at the prompt's last token."""
    return lens.intervene(
        *(qv.Replace(qv.NeuronSet.of([unit]), float(values[unit]), "last") for unit in units)
    )


@pytest.mark.parametrize("candidates", [None, 4])
def test_rounds_against_a_baseline_take_out_to_the_baseline(candidates, true_float64):
    """What was found before stands at the mean, and not at zero; so does a candidate that is really
    taken out."""
    lens = tiny_lens("gptj")
    mean = lens.trace(FACTS).m.mean(1)
    found = qv.neuron_effects(
        lens, FACTS, 3, rounds=3, baseline="mean",
        **({} if candidates is None else {"candidates": candidates}),
    )  # fmt: skip
    for i, fact in enumerate(FACTS):
        mine, taken = found.where(lambda frame, i=i: frame["prompt"] == i), []
        for unit, score in zip(mine.units, mine.frame["score"], strict=True):
            with replaced(lens, taken, mean):
                now = qv.neuron_effects(lens, fact, None).frame.set_index(["layer", "neuron"])
                before = lens.logprob(fact)
            layers, neurons = (torch.tensor(now.index.get_level_values(n)) for n in (0, 1))
            # gradient times m, against the mean: gradient times (m - mean)
            share = 1 - mean[layers, neurons].double().numpy() / now["coefficient"]
            slope = (now["score"] * share).drop(taken).sort_values(ascending=False)
            if candidates is None:
                assert (slope.index[0], slope.iloc[0]) == (unit, pytest.approx(score, abs=1e-8))
            else:
                losses = {}
                for other in slope.index[:candidates]:
                    with replaced(lens, [*taken, other], mean):
                        losses[other] = before - lens.logprob(fact)
                assert max(losses, key=losses.__getitem__) == unit
                assert losses[unit] == pytest.approx(score, abs=1e-9)
            taken.append(unit)


def test_candidates_of_a_contrast_lose_the_difference(true_float64):
    """The second answer is another one for each prompt."""
    lens = tiny_lens("gptj")
    found = qv.neuron_effects(lens, FACTS, 1, target=("Paris", "answer"), candidates=3, rounds=1)
    for i, fact in enumerate(FACTS):
        tokens = lens.answer_ids(fact.to("Paris").target)[0], lens.answer_ids(fact)[0]

        def difference(fact=fact, tokens=tokens):
            logits = lens.logits([list(lens.tokenize(fact)[0].ids)])[0, -1]
            return float(logits[tokens[0]] - logits[tokens[1]])

        (row,) = found.frame[found.frame["prompt"] == i].itertuples()
        with without(lens, [(row.layer, row.neuron)]):
            taken_out = difference()
        assert row.score == pytest.approx(difference() - taken_out, abs=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_rounds_of_heads_take_one_head_out(kind, true_float64):
    lens = tiny_lens(kind)
    found = qv.neuron_effects(lens, FACTS[0], 3, rounds=3, unit="head")
    taken = []
    for unit, score in zip(found.units, found.frame["score"], strict=True):
        chosen = found.where(
            lambda frame: frame[["layer", "head"]].apply(tuple, axis=1).isin(taken)
        )
        with lens.intervene(qv.Zero(chosen, "last")) if taken else nullcontext():
            frame = qv.neuron_effects(lens, FACTS[0], None, unit="head").frame
        pairs = list(zip(frame["layer"], frame["head"], strict=True))
        left = frame[[pair not in taken for pair in pairs]]
        best = left.iloc[0]
        assert (int(best["layer"]), int(best["head"])) == unit
        assert best["score"] == pytest.approx(score, abs=1e-9)
        taken.append(unit)


@pytest.mark.parametrize("over", ["set", "category"])
def test_the_coefficient_of_prompts_added_up_is_their_mean(over):
    lens = tiny_lens("gptj")
    facts = [FACTS[0], qv.Fact("{} works for", "Norway", "Oslo", category="company")]
    frame = qv.neuron_effects(lens, facts, None, over=over).frame
    m = lens.trace(facts).m.mean(1)
    for row in frame.iloc[::37].itertuples():
        assert row.coefficient == pytest.approx(float(m[row.layer, row.neuron]), rel=1e-5)


def test_another_prompt_is_followed_by_the_answer_that_is_asked():
    """Patched at the tokens of an answer: whatever answer the other fact has itself."""
    lens = tiny_lens("gptj")
    fact = qv.Fact("{} works for", "Olga Pelodan", "Nortek Dalrin")
    other = qv.Fact("{} lives in", "Olga Pelodan", "Dalrin Nortek")
    rows = lens.rows([fact], "answer")
    found = baseline_values(lens, rows, [other], "answer")
    wanted = lens.trace([qv.Fact("{} lives in", "Olga Pelodan", "Nortek Dalrin")], "answer").m
    torch.testing.assert_close(found, wanted)
    assert (wanted[:, 1] - lens.trace([other], "answer").m[:, 1]).abs().max() > 1e-3


def test_integrated_effects_behind_a_norm_are_told_of():
    lens = Lens.from_hf(tiny_of("Gemma 3", torch.float64), tokenizer())
    fact = qv.Fact("The capital of {} is", "Norway", "Oslo")
    gradient = qv.neuron_effects(lens, fact, 20)
    for steps in (4, 8):
        with pytest.warns(UserWarning, match="A norm stands behind these units"):
            shares = qv.neuron_effects(lens, fact, 20, method="integrated", steps=steps)
        # the mean of 1 / alpha over the midpoints
        times = sum(steps / (i + 0.5) for i in range(steps)) / steps
        assert shares.units == gradient.units
        wanted = gradient.frame["score"] * times
        assert shares.frame["score"].tolist() == pytest.approx(wanted.tolist(), rel=1e-2)
