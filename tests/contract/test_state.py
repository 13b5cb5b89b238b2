"""What is in force, what was written and what cannot be asked: nothing is passed over in silence."""

from __future__ import annotations

import copy
import pickle
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import ByT5Tokenizer

import qv_lens as qv
from qv_lens.errors import ModelError, PatchError
from qv_lens.models.wrap import hooked_available
from qv_lens.patch import Delta
from tests.models import PROMPTS, tiny_hf, tiny_lens, tiny_of, tokenizer

FACT = qv.Fact("{} works for", "Olga Pelodan", "Nortek")
SOME = qv.NeuronSet.of([(0, 3), (1, 5)])
needs_hooked = pytest.mark.skipif(
    not hooked_available(), reason="TransformerLens 4.x has no HookedTransformer"
)


@needs_hooked
@pytest.mark.parametrize("kind", ["gptj", "qwen3-gqa"])
def test_generation_sees_a_write_to_any_parameter(kind):
    """Also to those that TransformerLens made for itself, and to one put in the place of another."""
    lens = tiny_lens(kind, "hooked")

    def said() -> str:
        ids = list(lens.tokenize(PROMPTS[0])[0].ids)
        for _ in range(3):
            ids.append(int(lens.model(torch.tensor([ids]))[0, -1].argmax()))
        return lens.tokenizer.decode(ids[-3:])

    before = lens.generate(PROMPTS[0], 3)
    assert before.strip() == said().strip()
    assert lens.plain_model() is lens.hf
    lens.model.unembed.b_U.data[7] += 100.0
    assert lens.generate(PROMPTS[0], 3).strip() == said().strip() != before.strip()
    if kind == "qwen3-gqa":  # no checkpoint of it has such a bias
        with pytest.raises(ModelError, match="hold different weights"):
            lens.plain_model()
    lens = tiny_lens(kind, "hooked")
    lens.model.embed.W_E = torch.nn.Parameter(lens.model.embed.W_E.flip(0))
    assert lens.generate(PROMPTS[0], 3).strip() == said().strip()
    with pytest.raises(ModelError, match="hold different weights"):
        lens.save("nowhere")


def test_a_checkpoint_holds_no_interventions(tmp_path):
    lens = tiny_lens("gptj")
    with lens.intervene(qv.Zero(SOME)), pytest.raises(qv.QVLensError, match="in force"):
        lens.save(tmp_path / "model")
    assert not (tmp_path / "model").exists()
    assert lens.save(tmp_path / "model").exists()


def test_a_patch_says_what_was_in_force():
    lens = qv.load("toy-gptj")
    fact = qv.Fact("{} plays the sport of", "Elena Morefeld", "fencing")
    bare = qv.edit(lens, fact.to("golf"), "FT")
    with lens.intervene(qv.Zero(SOME)), lens.patched(bare):
        edited = qv.edit(lens, fact.to("golf"), "FT")
    assert (bare.info["on"], bare.info["under"]) == ([], [])
    assert (edited.info["on"], edited.info["under"]) == (["FT"], ["Zero"])
    with pytest.raises(qv.QVLensError, match=r"A patch is an edit already made.*lens\.patched"):
        qv.edit(lens, fact.to("golf"), bare)


def test_a_lens_is_not_copied():
    lens = tiny_lens("gptj")
    for way in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(ModelError, match="neither copied nor pickled"):
            way(lens)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "a", None, torch.zeros(3)])
def test_values_that_are_no_number_are_refused(value):
    lens = tiny_lens("gptj")
    for one in (qv.Replace(SOME, value), qv.Scale(SOME, value)):
        with pytest.raises(qv.QVLensError, match="must be a finite number"), lens.intervene(one):
            pass
    for fine in (2, np.float32(2), torch.tensor(2.0)):
        with lens.intervene(qv.Replace(SOME, fine)):
            assert lens.trace(PROMPTS).m[0, :, 3].eq(2).all()


def test_counts_that_are_none_are_refused():
    lens = tiny_lens("gptj")
    for ask in (
        lambda: lens.trace(PROMPTS, batch_size=-1),
        lambda: lens.next_token_logits(PROMPTS, batch_size=0),
        lambda: lens.generate(PROMPTS, 2, batch_size=-1),
        lambda: lens.generate(PROMPTS, 2.5),
        lambda: lens.generate(PROMPTS, 2, top_k=1.5),
    ):
        with pytest.raises(qv.QVLensError, match="must be a whole number"):
            ask()
    assert lens.generate(PROMPTS[0], 2, top_k=10**6)


def test_a_patch_that_overflows_is_not_written():
    lens = tiny_lens("gptj", dtype=torch.float16, exact=False)
    before = lens.w_out(1).clone()
    delta = Delta(torch.full(tuple(before.shape), 1e6))
    with pytest.raises(PatchError, match=r"leaves the range of float16.*Nothing was written"):
        lens.apply(
            qv.Patch(
                {(0, "W_out"): Delta(delta.left * 1e-9), (1, "W_out"): delta}, lens.fingerprint
            )
        )
    assert lens.patches == ()
    assert torch.equal(lens.w_out(1), before)


def test_a_bridge_in_training_mode_is_refused():
    lens = tiny_lens("gptj", "bridge")
    lens.model.original_model.train()
    with pytest.raises(ModelError, match="training mode"):
        qv.Lens(lens.model, tokenizer=lens.tokenizer)


def test_a_bias_that_a_users_bridge_lacks_cannot_be_patched():
    lens = qv.Lens(qv.Lens.from_hf(tiny_of("Falcon"), tokenizer()).model, tokenizer=tokenizer())
    assert "b_out" not in lens.parameter_names


@needs_hooked
def test_a_users_model_keeps_the_bos_of_its_own_tokenizer(tmp_path):
    """Llama 3 and Gemma put it there by their post-processor."""
    from transformer_lens import HookedTransformer

    own = tokenizer()
    start = own.bos_token or own.eos_token
    own.bos_token = start
    own.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{start} $A", special_tokens=[(start, own.convert_tokens_to_ids(start))]
    )
    hf = tiny_hf("gptj")
    hf.save_pretrained(tmp_path)
    own.save_pretrained(tmp_path)
    loaded = qv.load(tmp_path, backend="hooked")
    model = HookedTransformer(loaded.model.cfg, tokenizer=loaded.tokenizer)
    assert loaded.tokenize(PROMPTS[0])[0].ids[0] == own.bos_token_id
    assert qv.Lens(model).tokenize(PROMPTS) == loaded.tokenize(PROMPTS)


def test_tokenizers_with_which_no_prompt_can_be_read_are_refused():
    own = tokenizer()
    end = own.eos_token
    own.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"$A {end}", special_tokens=[(end, own.convert_tokens_to_ids(end))]
    )
    with pytest.raises(ModelError, match="behind every prompt"):
        qv.Lens.from_hf(tiny_hf("gptj"), own)
    with pytest.raises(ModelError, match="is a slow tokenizer"):
        qv.Lens.from_hf(tiny_hf("gptj"), ByT5Tokenizer())


def test_deltas_that_share_a_tensor_are_saved(tmp_path):
    lens = tiny_lens("gptj")
    delta = Delta(torch.ones_like(lens.w_out(0)))
    patch = qv.Patch({(0, "W_out"): delta, (1, "W_out"): delta}, lens.fingerprint)
    kept = qv.Patch.load(patch.save(tmp_path / "patch"))
    assert all(torch.equal(kept.deltas[key].left, delta.left) for key in patch.deltas)


def test_interventions_of_a_users_own_are_told_apart_by_what_lies_inside():
    @dataclass
    class Mine:
        inside: dict

        def check(self, lens):
            pass

        def hooks(self, lens):
            return []

    lens, states = tiny_lens("gptj"), set()
    for at in (0, 2500):
        weight = torch.zeros(5000)
        weight[at] = 1.0
        for held in ({"x": weight}, {"x": [weight]}):
            with lens.intervene(Mine(held)):
                states.add(lens.state())
    assert len(states) == 4
