"""A real pretrained model: what it says, that it is transformers' own, and that its neurons and
edits do what is claimed."""

from __future__ import annotations

import random
import warnings

import pandas as pd
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import qv_lens as qv
from qv_lens.evaluation.faithfulness import lost_at
from qv_lens.models.fetch import folder_of

PARIS = qv.Fact("The capital of {} is", "France", "Paris")
FACTS = (
    PARIS,
    qv.Fact("The capital of {} is", "Japan", "Tokyo"),
    qv.Fact("{} is located in the continent of", "Kenya", "Africa"),
)
TEXT = (
    "The Eiffel Tower is a wrought-iron lattice tower in Paris. It is named after the engineer "
    "Gustave Eiffel, whose company designed and built the tower from 1887 to 1889. Water boils at "
    "one hundred degrees at sea level, and a week has seven days."
)


def test_its_logits_are_transformers(lens):
    hf = AutoModelForCausalLM.from_pretrained(folder_of("smollm2-135m"), dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder_of("smollm2-135m"))
    for text in (*(fact.text for fact in FACTS), TEXT):
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        torch.testing.assert_close(
            lens.next_token_logits(text)[0], hf(ids).logits[0, -1], atol=2e-3, rtol=0
        )


def test_it_knows_what_it_should(lens):
    assert lens.backend in ("hooked", "bridge")
    assert torch.tensor(lens.logprob(PARIS)).exp() == pytest.approx(0.77, abs=0.02)
    assert lens.generate(PARIS.text, 2).strip().startswith("Paris")


def test_topk_is_exact_on_one_layer(lens):
    """The certificate holds with a real vocabulary: the best of one layer, each scored by brute
    force."""
    best = qv.value_neurons(lens, PARIS, 300, method="topk", norm="full").to_frame()
    layer = int(best["layer"].mode()[0])
    trace = lens.trace(PARIS)
    x, m = trace.mid[layer][0].double(), trace.m[layer][0].double()
    norm, (U, b) = lens.backend_adapter.norm(None), lens.backend_adapter.unembed()
    token = lens.answer_ids(PARIS)[0]

    def logp(y):
        scale = (y.square().mean(-1, keepdim=True) + norm.eps).sqrt()
        logits = (y / scale * norm.gain.double()) @ U.double() + b.double()
        return logits.log_softmax(-1)[..., token]

    vectors = m[:, None] * lens.w_out(layer).double()
    exact = torch.cat([logp(x + part) for part in vectors.split(256)]) - logp(x)
    found = best[best["layer"] == layer]
    wanted = exact.sort(descending=True)
    assert set(found["neuron"]) == set(wanted.indices[: len(found)].tolist())
    got = torch.tensor(
        found.sort_values("score", ascending=False)["score"].to_numpy(), dtype=torch.float64
    )
    torch.testing.assert_close(got, wanted.values[: len(found)], atol=1e-4, rtol=1e-3)


def test_ten_neurons_carry_paris_and_ten_others_do_not(lens):
    clean = lens.logprob(PARIS)
    best = qv.value_neurons(lens, PARIS, 10, method="topk")
    with lens.intervene(qv.Zero(best, positions="last")):
        without = lens.logprob(PARIS)
    units = [(layer, neuron) for layer in range(lens.n_layers) for neuron in range(lens.d_mlp)]
    others = qv.NeuronSet.of(random.Random(0).sample(units, 10))
    with lens.intervene(qv.Zero(others, positions="last")):
        random_ten = lens.logprob(PARIS)
    assert without < clean - 1.5
    assert abs(random_ten - clean) < 0.1


def test_what_the_answer_loses_most_without_is_lost_first(lens):
    """Removal curves on a real fact: the gradient's neurons before Eq. 9's, a hundred random ones
    never."""
    rankings = {
        "Eq. 9": qv.value_neurons(lens, PARIS, 30, method="topk"),
        "gradient": qv.neuron_effects(lens, PARIS, 30),
    }
    frame = qv.faithfulness(lens, PARIS, rankings, (1, 2, 5, 10, 30, 100), seeds=3)
    left = frame.pivot_table(index="k", columns="ranking", values="logprob")
    assert left.loc[10, "gradient"] < left.loc[10, "Eq. 9"] - 1.0
    assert left.loc[30, "gradient"] < -8.0
    assert (
        frame.loc[frame["ranking"] == "random", "logprob"] - frame["clean"].iloc[0]
    ).abs().max() < 0.1
    lost = lost_at(frame).set_index("ranking")["k"]
    assert lost["gradient"] <= 5
    assert lost["random"].isna().all()


def test_the_gradient_predicts_what_single_neurons_cost(lens):
    """Each of 40 neurons zeroed alone in a real pass, against its score: the best 20 and 20
    others."""
    ranked = qv.neuron_effects(lens, PARIS, None).frame
    some = ranked.iloc[[*range(20), *random.Random(1).sample(range(20, 4000), 20)]]
    clean = lens.logprob(PARIS)
    lost = []
    for layer, neuron in zip(some["layer"], some["neuron"], strict=True):
        with lens.intervene(
            qv.Zero(qv.NeuronSet.of([(int(layer), int(neuron))]), positions="last")
        ):
            lost.append(clean - lens.logprob(PARIS))
    assert some["score"].reset_index(drop=True).corr(pd.Series(lost), method="spearman") > 0.9


EDITORS = {
    "closed form": qv.ROME(
        layer=5, steps=8, lr=0.5, clamp=4.0, weight_decay=1e-3, mom2_adjustment=False
    ),
    "trained": qv.FT(layer=6, lr=5e-3, steps=6),
    "knowledge neurons": qv.KN(rule="easyedit", steps=2),
}


@pytest.mark.parametrize("family", EDITORS)
def test_an_edit_per_family_moves_the_answer_and_comes_off_bit_for_bit(lens, family):
    editor = EDITORS[family]
    state = {
        name: weight.clone() for name, weight in lens.checkpoint.state.items() if ".mlp." in name
    }
    before = lens.logprob(PARIS, "London")
    patch = qv.edit(lens, PARIS.to("London"), editor, templates=("{}",))
    with lens.patched(patch):
        after = lens.logprob(PARIS, "London")
    # a rule that follows no gradient: it moves the answer, not always up
    if family == "knowledge neurons":
        assert abs(after - before) > 1.0
    else:
        assert after > before + 2.0
    assert all(torch.equal(weight, lens.checkpoint.state[name]) for name, weight in state.items())


def test_an_edited_model_is_saved_and_loads_with_transformers_alone(lens, tmp_path):
    patch = qv.edit(lens, PARIS.to("London"), EDITORS["trained"])
    with lens.patched(patch):
        wanted = lens.next_token_logits(PARIS)[0]
        folder = lens.save(tmp_path / "edited")
    hf, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder).eval(),
        AutoTokenizer.from_pretrained(folder),
    )
    ids = torch.tensor([tokenizer(PARIS.text)["input_ids"]])
    torch.testing.assert_close(hf(ids).logits[0, -1], wanted, atol=2e-3, rtol=0)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_rounding_and_no_other_model(lens, dtype):
    """Loaded without a warning; of ordinary text nearly every next token is the same."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        half = qv.load("smollm2-135m", dtype=dtype)
    text = "The capital of France is Paris, and the capital of Italy is Rome. The sun rises in the"
    ids = list(half.tokenize(text)[0].ids)
    exact = lens.logits([ids])[0].argmax(-1)
    assert half.backend == lens.backend
    assert (half.logits([ids])[0].argmax(-1) == exact).float().mean() > 0.85
