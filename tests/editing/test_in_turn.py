"""What `batch_size`, models of another type and odd facts do to editors that train, that share out a
residual behind a norm, or that wrap others."""

from __future__ import annotations

import dataclasses
import warnings

import pytest
import torch

import qv_lens as qv
from qv_lens.editing.layer_by_layer import search_ahead
from qv_lens.editing.statistics import covariance
from qv_lens.facts.records import UNKNOWN
from qv_lens.models.lens import Lens
from qv_lens.patch import Delta
from tests.editing.test_lasting import TEMPLATES, close, nse, read, tokens_of
from tests.editing.test_methods import REQUESTS, TEXTS
from tests.models import tiny_hf, tiny_lens, tiny_of, tokenizer

TRAINED = [
    qv.FT(layer=1, steps=3, lr=1e-2), qv.FTL(layer=1, steps=3, clamp=1e-2), qv.LocFT(layer=1, epochs=3, lr=1e-2, end_of_text=False),
    qv.LoRA(steps=3, dropout=0.0), qv.KNE(lr=1e-2, steps=3, steps_ig=2), qv.CTP(top=3, alone=(1e-3, 3, 0.0)), qv.KN(steps=3),
]  # fmt: skip


@pytest.mark.parametrize("editor", TRAINED, ids=lambda editor: type(editor).__name__)
def test_a_batch_of_one_is_one_edit_after_another(editor):
    """By hand: the first edit in force, then the second."""
    lens = tiny_lens("gptj")
    whole = qv.edit(lens, REQUESTS, editor, batch_size=1)
    first = qv.edit(lens, REQUESTS[0], editor)
    with lens.patched(first):
        second = qv.edit(lens, REQUESTS[1], editor)
    for key in {*first.deltas, *second.deltas}:
        parts = [p.deltas[key].dense() for p in (first, second) if key in p.deltas]
        close(whole.deltas[key].dense(), sum(parts), 1e-6)


@pytest.mark.parametrize("name", ["Gemma 2", "OLMo 2", "Llama"])
def test_pmets_lower_layers_reach_their_share_in_the_stream(name):
    """Behind norms of unequal gain: what layer 0 adds to the stream is 1 / sqrt 2 of what is missing
    there. (Hugging Face's modules, run with the delta written into the weight.)"""
    hf = tiny_of(name, torch.float64)
    for weight, parameter in hf.named_parameters():
        for layer, gain in ((0, 0.2), (1, 1.0)):
            if f"layers.{layer}.post_feedforward_layernorm" in weight:
                parameter.data.fill_(gain - ("Gemma" in name))
    lens = Lens.from_hf(hf, tokenizer())
    C0 = {layer: torch.eye(lens.d_mlp, dtype=torch.float64) for layer in range(3)}
    statistics = qv.Statistics(C0, 1, "x", lens.fingerprint, {}, 128, False)
    request = qv.Fact("{} plays the sport of", "Tim Duncan", "fencing").to("golf")
    prompt = lens.tokenize([request.target])[0]
    at = prompt.position("subject_last")

    def stream(layer):
        return lens.hf(torch.tensor([prompt.ids]), output_hidden_states=True).hidden_states[layer][
            0, at
        ]

    def edited(*layers):
        editor = qv.PMET(
            layers=layers, lam=1e-9, steps=6, lr=0.05, clamp=0.01, kl=0.0, weight_decay=0.0
        )
        return qv.edit(lens, request, editor, statistics=statistics, templates=("{}",))

    both, upper = edited(0, 1), edited(1)
    lower = dataclasses.replace(both, deltas={(0, "W_out"): both.deltas[0, "W_out"]})
    before = stream(1), stream(2)
    with lens.patched(upper):
        missing = stream(2) - before[1]
    with lens.patched(lower):
        added = stream(1) - before[0]
    assert float(added.norm() / missing.norm()) * 2**0.5 == pytest.approx(1.0, abs=0.05)


def test_a_small_probability_in_float16_is_still_attributed():
    """P of 1e-14, whose own gradient is 0 in float16: KNE's columns and KN's rows as in float32."""
    small = qv.Fact("{} plays the sport of", "Elena Morefeld", "Oslo")
    found = {}
    for dtype in (torch.float32, torch.float16):
        lens = qv.load("toy-gptj", dtype=dtype)
        ensemble = qv.neuron_ensemble(lens, small, 0.01, together=True, steps=4).frame
        neurons = qv.integrated_gradients(lens, small, 20, steps=4).frame
        found[dtype] = [set(zip(f["layer"], f["neuron"], strict=True)) for f in (ensemble, neurons)]
    for ours, half in zip(found[torch.float32], found[torch.float16], strict=True):
        assert len(half) == len(ours)
        assert len(half & ours) >= 0.8 * len(ours)


def test_an_ensemble_is_no_larger_than_its_share():
    """The readers of a dead neuron all have an attribution of 0: a tie at the threshold."""
    hf = tiny_hf("gptj")
    for block in hf.transformer.h:
        block.mlp.fc_out.weight.data[4:] = 0.0  # most columns, as KNE counts them
    lens = Lens.from_hf(hf, tokenizer())
    found = qv.neuron_ensemble(lens, REQUESTS[0], 0.6, steps=2)
    columns = 3 * lens.d_model
    assert len(found.frame) == columns - round(0.4 * (columns - 1) + 0.499)
    for block in hf.transformer.h:
        block.mlp.fc_out.weight.data.zero_()
    with pytest.raises(qv.QVLensError, match="Every attribution is 0"):
        qv.neuron_ensemble(Lens.from_hf(hf, tokenizer()), REQUESTS[0], 0.6, steps=2)


@pytest.mark.parametrize(
    ("editor", "needs"),
    [
        (qv.KN(steps=2), True),
        (qv.NSE(layers=(1,), steps=2, near=0.0, far=1e9, score="value"), True),
        (qv.NSE(layers=(1,), steps=2, near=0.0, far=1e9, score="effects"), True),
        (qv.NSE(layers=(1,), steps=2, near=0.0, far=1e9), False),
        (qv.FT(layer=1, steps=2), False),
    ],
)
def test_editors_that_ask_about_the_old_answer_need_one(editor, needs):
    lens = tiny_lens("gptj")
    request = qv.Fact("{} plays the sport of", "Tim Duncan", UNKNOWN).to("golf")
    options = {"statistics": covariance(lens, TEXTS, (1,)), "templates": ("{}",)}
    if needs:
        with pytest.raises(qv.QVLensError, match="is not known"):
            qv.edit(lens, request, editor, **options)
    else:
        assert qv.edit(lens, request, editor, **options).deltas


def test_an_adapter_holds_two_facts_of_one_key(tmp_path):
    """Two huge factors of a small delta: what the file holds, multiplied, is the delta."""
    from safetensors.torch import load_file

    torch.manual_seed(0)
    key, value = torch.randn(2, 40, dtype=torch.float64)
    keys = torch.stack([key, key + 1e-7 * torch.randn(40, dtype=torch.float64)], 1)
    values = torch.stack([1e7 * value, -1e7 * value + torch.randn(40, dtype=torch.float64)])
    info = {"modules": {"0.W_out": "down"}}
    patch = qv.Patch({(0, "W_out"): Delta(keys, values)}, "x", info)
    patch.to_lora(tmp_path)
    file = load_file(tmp_path / "adapter_model.safetensors")
    A, B = (file[f"base_model.model.down.lora_{part}.weight"].double() for part in "AB")
    whole = keys @ values
    close((B @ A).T, whole, 1e-6)
    assert patch.deltas[0, "W_out"].norm() == pytest.approx(float(whole.norm()), rel=1e-9)


@pytest.mark.parametrize("share", [0.5, 0.1])
def test_damp_is_an_option_of_nse_too(share):
    """Half of the part along the principal directions of the weight's normalised columns is taken
    out."""
    lens = tiny_lens("gptj")
    options = {"statistics": covariance(lens, TEXTS, [1]), "templates": TEMPLATES}
    one = {"rounds": 1, "share": 1.0}
    free = qv.edit(lens, REQUESTS, nse(**one), **options).deltas[1, "W_out"].dense()
    editor = nse(damp=0.5, spectrum=share, **one)
    damped = qv.edit(lens, REQUESTS, editor, **options).deltas[1, "W_out"].dense()
    W = lens.w_out(1).double()
    columns = W / W.norm(dim=0)
    spectrum, vectors = torch.linalg.eigh(columns @ columns.T)
    spectrum, vectors = spectrum.flip(0), vectors.flip(1)
    count = int((spectrum.cumsum(0) <= share * spectrum.sum()).sum()) + 1
    top = vectors[:, :count]
    close(damped, free - 0.5 * top @ top.T @ free, 1e-6)


def test_damp_takes_from_each_batch_what_is_its_own():
    lens, editor = tiny_lens("gptj"), nse(damp=0.5, rounds=2, share=1.0)
    options = {"statistics": covariance(lens, TEXTS, [1]), "templates": TEMPLATES}
    whole = qv.edit(lens, REQUESTS[:2], editor, batch_size=1, **options)
    first = qv.edit(lens, REQUESTS[0], editor, **options)
    with lens.patched(first):
        second = qv.edit(lens, REQUESTS[1], editor, **options)
    apart = first.deltas[1, "W_out"].dense() + second.deltas[1, "W_out"].dense()
    close(whole.deltas[1, "W_out"].dense(), apart, 1e-9)


def test_targets_searched_ahead_are_not_those_of_an_earlier_nse():
    lens, editor = tiny_lens("gptj"), nse(rounds=1, share=1.0)
    options = {"statistics": covariance(lens, TEXTS, [1]), "templates": TEMPLATES}
    first = qv.edit(lens, REQUESTS[0], editor, **options)
    with lens.patched(first):
        ahead = search_ahead(lens, REQUESTS[1:], editor, templates=TEMPLATES)
        searched = qv.edit(lens, REQUESTS[1], editor, **options)
        with pytest.warns(UserWarning, match="With unedited=False yours are taken"):
            given = qv.edit(lens, REQUESTS[1], editor, ahead=ahead, **options)
        now = dataclasses.replace(editor, unedited=False)
        taken = qv.edit(lens, REQUESTS[1], now, ahead=ahead, **options)
        again = qv.edit(lens, REQUESTS[1], now, **options)
    close(taken.deltas[1, "W_out"].dense(), again.deltas[1, "W_out"].dense(), 1e-6)
    close(given.deltas[1, "W_out"].dense(), searched.deltas[1, "W_out"].dense(), 1e-12)


def test_simie_holds_every_fact_at_every_weight():
    """KNE picks its weights anew for each fact; A of each weight counts both facts: (lam I + sum K
    K^T)^-1 (lam W_0 + sum K K^T W_e), W_e = W_0 where a fact wrote nothing."""
    lens = tiny_lens("qwen3-gqa")
    kne = qv.KNE(share=0.02, steps=5, lr=0.05)
    facts = [
        qv.Fact("The capital of {} is", "Norway", "Oslo").to("Tim Duncan"),
        qv.Fact("{} plays the sport of", "Tim Duncan, a player of fame", "fencing").to("golf"),
    ]
    lam = 1.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the weights grow
        for requests in (facts, facts[::-1]):
            whole = qv.edit(lens, requests, qv.SimIE(editor=kne, lam=lam))
            alone = [qv.edit(lens, request, kne).deltas for request in requests]
            assert set(alone[0]) != set(alone[1])
            for key in {*alone[0], *alone[1]}:
                W_0 = lens.w_out(key[0]).double()
                system = lam * torch.eye(len(W_0), dtype=torch.float64)
                right = lam * W_0
                for request, deltas in zip(requests, alone, strict=True):
                    K = read(lens, key[0], tokens_of(lens, request))
                    W_e = W_0 + (deltas[key].dense() if key in deltas else 0.0)
                    system, right = system + K @ K.T, right + K @ K.T @ W_e
                want = torch.linalg.solve(system, right) - W_0
                close(whole.deltas[key].dense(), want, 1e-6)
