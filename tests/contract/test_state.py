"""What is in force, what was written and what cannot be asked: nothing is passed over in silence."""

from __future__ import annotations

import copy
import pickle
import warnings
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.modules.module as everywhere
from tokenizers.processors import TemplateProcessing
from torch.nn.utils.parametrize import register_parametrization
from torch.utils.flop_counter import FlopCounterMode
from transformers import ByT5Tokenizer

import qv_lens as qv
from qv_lens.editing.statistics import covariance
from qv_lens.errors import ConfigError, ModelError, PatchError
from qv_lens.models.lens import Lens
from qv_lens.models.wrap import hooked_available
from qv_lens.patch import Delta, Patch
from tests.models import BACKENDS, PROMPTS, tiny_hf, tiny_lens, tiny_of, tokenizer

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


@pytest.mark.parametrize(
    "value",
    [float("nan"), float("inf"), "a", None, torch.zeros(3), [1.0, float("nan")], [[1.0, 2.0]] * 2],
)
def test_values_that_are_no_number_are_refused(value):
    lens = tiny_lens("gptj")
    for one in (qv.Replace(SOME, value), qv.Scale(SOME, value)):
        with pytest.raises(qv.QVLensError, match="must be a finite number"), lens.intervene(one):
            pass
    states = set()
    for factor in (0.123456789, 0.123456788):  # a tensor's repr says four digits
        with lens.intervene(qv.Scale(SOME, torch.tensor(factor, dtype=torch.float64))):
            states.add(lens.state())
    assert len(states) == 2
    for fine in (2, np.float32(2), torch.tensor(2.0)):
        with lens.intervene(qv.Replace(SOME, fine)):
            assert lens.trace(PROMPTS).m[0, :, 3].eq(2).all()


@pytest.mark.parametrize(
    "wrong", [[2.0], [[2.0]], [[[1.0], [2.0], [3.0]]], True, [True, False, True]]
)
def test_values_that_do_not_fit_the_units_are_refused(wrong):
    lens, three = tiny_lens("gptj"), qv.NeuronSet.of([(0, 1), (1, 2), (2, 3)])
    with (
        pytest.raises(qv.QVLensError, match="one for each of the 3 units"),
        lens.intervene(qv.Replace(three, wrong)),
    ):
        pass


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


class Louder(torch.nn.Module):
    def forward(self, weight):
        return weight * 1.5


@pytest.mark.parametrize("backend", BACKENDS)
def test_models_whose_passes_weights_and_hooks_do_not_say_are_refused(backend):
    """Compiled, parametrized and of another type than TransformerLens noted, whenever it came."""
    for at in (lambda model: model, lambda model: model.blocks[1].mlp):
        lens = tiny_lens("qwen3-gqa", backend, dtype=torch.float32)
        at(lens.model).compile(backend="eager")
        with pytest.raises(ModelError, match=r"compiled.*interventions would have no effect"):
            lens.logprob(FACT)
        with pytest.raises(ModelError, match="compiled"):
            qv.Lens(lens.model, tokenizer=lens.tokenizer)
    lens = tiny_lens("qwen3-gqa", backend, dtype=torch.float32)
    mlp = lens.model.blocks[1].mlp
    mlp.forward = torch.compile(mlp.forward, backend="eager")
    with pytest.raises(ModelError, match="compiled"):
        lens.logprob(FACT)
    lens = tiny_lens("qwen3-gqa", backend, dtype=torch.float32)
    lens.model.blocks[1] = torch.compile(lens.model.blocks[1], backend="eager")
    with pytest.raises(ModelError, match="compiled"):
        lens.logprob(FACT)
    with pytest.raises(ModelError, match="compiled"):
        qv.Lens.from_hf(torch.compile(tiny_hf("gptj", torch.float32)), tokenizer(), backend=backend)
    hf = tiny_hf("gptj", torch.float32)
    register_parametrization(hf.transformer.h[1].mlp.fc_out, "weight", Louder())
    with pytest.raises(ModelError, match="computed anew in every pass"):
        qv.Lens.from_hf(hf, tokenizer(), backend=backend)
    with torch.inference_mode():
        hf = tiny_hf("gptj", torch.float32)
    with pytest.raises(ModelError, match="inference_mode"):
        qv.Lens.from_hf(hf, tokenizer(), backend=backend)


@needs_hooked
def test_weights_parametrized_or_turned_into_another_type_later_are_refused():
    lens = tiny_lens("gptj", "hooked", dtype=torch.float32)
    register_parametrization(lens.model.blocks[1].mlp, "W_out", Louder())
    with pytest.raises(ModelError, match="computed anew in every pass"):
        lens.logprob(FACT)
    lens = tiny_lens("gptj", "hooked", dtype=torch.float32)
    lens.model.half()
    with pytest.raises(
        ModelError, match=r"turned into float16 since: turn it by model.to\(torch.float16\)"
    ):
        lens.logprob(FACT)


@pytest.mark.parametrize("backend", BACKENDS)
def test_adapters_beside_the_weights_are_refused(backend):
    peft = pytest.importorskip("peft")
    hf = tiny_hf("gptj", torch.float32)
    lora = peft.LoraConfig(target_modules=["fc_out"], init_lora_weights=False, r=2)
    with pytest.raises(ModelError, match="merge them first"):
        qv.Lens.from_hf(
            peft.get_peft_model(tiny_hf("gptj", torch.float32), lora).eval(),
            tokenizer(),
            backend=backend,
        )
    hf.add_adapter(lora)
    with pytest.raises(ModelError, match="merge them first"):
        qv.Lens.from_hf(hf.eval(), tokenizer(), backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_is_refused(backend):
    lens = tiny_lens("gptj", backend, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for ask in (lens.logprob, lens.trace, lens.generate):
            with pytest.raises(ConfigError, match=r"without torch\.autocast"):
                ask(FACT)


class Replaced:
    """A module whose forward is another function, until it is taken off."""

    def __init__(self, module, forward):
        self.module, module.forward = module, forward

    def remove(self):
        for part in self.module.modules():  # a bridge hands it on to the part that it wraps
            vars(part).pop("forward", None)


@pytest.mark.parametrize("backend", BACKENDS)
def test_hooks_of_the_users_are_seen_wherever_they_sit(backend):
    """On a hook point, on a module of the model's own, of the backward pass, on the model, on all
    modules at once, or in the place of a module's forward: none of them is taken for the bare model,
    and no trace from before them is served. Where one acts after the last layer too, Eq. 9, which
    reads vectors out by the weights, would not hear it."""
    lens = tiny_lens("qwen3-gqa", backend, dtype=torch.float32)
    block = (lens.hf.model.layers if backend == "bridge" else lens.model.blocks)[1]
    point = lens.backend_adapter.points["blocks.1.hook_mlp_out"]
    leaf = next(part for part in lens.model.modules() if [*part.parameters()] and not part._modules)
    bare, trace, logp = lens.state(), lens.trace([FACT]), lens.logprob(FACT)
    lens.generate(FACT, 2)
    assert lens.bare_state == bare  # no pass leaves hooks behind
    for put, reads_out in (
        (lambda: block.mlp.register_forward_hook(lambda module, args, out: out * 0), False),
        (lambda: block.mlp.register_forward_pre_hook(lambda module, args: None), False),
        (lambda: point.register_full_backward_hook(lambda module, inside, out: None), False),
        (lambda: lens.model.register_forward_hook(lambda module, args, out: out), True),
        (lambda: everywhere.register_module_forward_hook(lambda module, args, out: out), True),
        (lambda: Replaced(leaf, lambda *args: type(leaf).forward(leaf, *args)), False),
    ):
        handle = put()
        assert lens.bare_state is None
        assert lens.state() != bare
        with pytest.raises(ConfigError, match=r"other hooks .*\(0 then, 1 now\)"):
            qv.value_neurons(lens, trace, 3)
        with pytest.raises(qv.QVLensError, match="take off the hooks"):
            covariance(lens, ["The capital of Norway is Oslo."], [1])
        with (
            pytest.raises(ConfigError, match="acts on the final norm")
            if reads_out
            else nullcontext()
        ):
            assert len(qv.value_neurons(lens, lens.trace([FACT]), 3)) == 3
        handle.remove()
    assert lens.bare_state == bare
    assert lens.logprob(FACT) == logp


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_part_of_the_model_is_no_hook(backend):
    """Forwards that were replaced before it was wrapped, and the counters of PyTorch."""
    lens = tiny_lens("qwen3-gqa", backend, dtype=torch.float32)
    leaf = next(part for part in lens.model.modules() if [*part.parameters()] and not part._modules)
    replaced = Replaced(leaf, lambda *args: type(leaf).forward(leaf, *args))
    assert not lens.bare
    assert qv.Lens(lens.model, tokenizer=lens.tokenizer).bare
    replaced.remove()
    with FlopCounterMode(display=False):
        assert lens.bare


@pytest.mark.parametrize("backend", BACKENDS)
def test_c0_keeps_no_graph_of_a_model_with_gradients(backend):
    lens = tiny_lens("gptj", backend, dtype=torch.float32)
    lens.model.requires_grad_(True)
    C0 = covariance(lens, ["The capital of Norway is Oslo."], [1]).C0[1]
    assert not C0.requires_grad


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_module_that_passes_its_hook_points_by_is_refused(backend):
    lens = tiny_lens("qwen3-gqa", backend, dtype=torch.float32)
    block = (lens.hf.model.layers if backend == "bridge" else lens.model.blocks)[1]
    replaced = Replaced(block.mlp, lambda x, *args, **kwargs: torch.zeros_like(x))
    with pytest.raises(
        ModelError, match=r"blocks\.1\.mlp\.\S+ was not reached .* load the model again"
    ):
        lens.trace([FACT])
    replaced.remove()
    lens.trace([FACT])


def test_c0_is_not_taken_of_weights_that_were_written_to():
    lens = tiny_lens("gptj")
    covariance(lens, ["The capital of Norway is Oslo."], [1])
    lens.w_out(1).mul_(2)
    with pytest.raises(qv.QVLensError, match="were written to since"):
        covariance(lens, ["The capital of Norway is Oslo."], [1])
    other = qv.Lens(lens.model, tokenizer=lens.tokenizer)
    covariance(other, ["The capital of Norway is Oslo."], [1])


def test_interventions_of_a_users_own_are_never_the_same():
    """Nobody knows what they compute: two functions, a large array, slots."""

    class Mine:
        __slots__ = ("factor",)

        def __init__(self, factor):
            self.factor = factor

        def check(self, lens):
            pass

        def hooks(self, lens):
            return [(lens.backend_adapter.mlp_out(1), lambda x: x * self.factor)]

    lens, states = tiny_lens("gptj"), set()
    for factor in (0, 0, np.ones(32), lambda x: x):
        with lens.intervene(Mine(factor)):
            states.add(lens.state())
    assert len(states) == 4


def test_an_edit_that_overflows_is_told_of_as_an_edit():
    """One of two cases leaves float16's range: the other's rows stay, and so do the weights."""

    @dataclass(frozen=True)
    class Loud:
        def deltas(self, job):
            far = 1e6 if job.requests[0].new == "Quorix" else 1e-2
            return {(1, "W_out"): Delta(torch.full(tuple(job.lens.w_out(1).shape), far))}

    lens = tiny_lens("gptj", dtype=torch.float16, exact=False)
    before = lens.w_out(1).clone()
    cases = [qv.EditCase(FACT.to(new)) for new in ("Quorix", "Oslo")]
    for protocol in ("single", "consecutive"):
        frame = qv.evaluate(lens, cases, ["efficacy_acc"], Loud(), protocol=protocol)
        assert "leaves the range of float16" in frame.attrs["skipped"]["0"]
        assert frame.set_index("case")["after"].notna().to_dict() == {0: False, 1: True}
        assert torch.equal(lens.w_out(1), before)


def test_a_patch_for_another_type_of_weights_says_which():
    half = qv.load("toy-gptj", dtype="float16")
    fact = qv.Fact("{} plays the sport of", "Elena Morefeld", "fencing")
    patch = qv.edit(half, fact.to("golf"), qv.FT(layer=1, steps=1, lr=1e-2))
    with pytest.raises(PatchError, match=r"\(toy-gptj, dtype='float16'\)"):
        qv.load("toy-gptj").apply(patch)


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


def test_two_lenses_on_one_model_do_not_undo_each_other_in_silence():
    """Patches taken back in another order than they were written leave one of them on the model."""
    lens = tiny_lens("gptj")
    other = Lens.from_hf(lens.hf, lens.tokenizer)
    lens.fingerprint, other.fingerprint  # noqa: B018
    change = torch.zeros_like(lens.w_out(1)).double()
    change[0, 0] = 1.0
    patches = [Patch({(1, "W_out"): Delta(change)}, one.fingerprint) for one in (lens, other)]
    lens.apply(patches[0])
    other.apply(patches[1])
    with pytest.warns(UserWarning, match=r"W_out\[1\] was written to since this patch was applied"):
        lens.revert()
    with pytest.warns(UserWarning, match="through another lens"):
        other.revert()
    assert lens.written_to()
    with pytest.warns(UserWarning, match="names the model as it was then"):
        qv.edit(
            lens,
            qv.Fact("The capital of {} is", "Norway", "Oslo").to("Rome"),
            qv.FT(layer=1, steps=1),
        )
    lens.w_out(1)[0, 0] -= 1.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lens.apply(patches[0])
        lens.revert()


def test_a_hugging_face_model_turned_under_a_lens_is_refused_or_read_as_it_is():
    """HookedTransformer turns with a part of it only; a bridge is the model that was turned."""
    fact = qv.Fact("The capital of {} is", "Norway", "Oslo")
    hf = tiny_hf("gptj")
    lens = Lens.from_hf(hf, tokenizer())
    hf.to(torch.bfloat16)
    if lens.backend == "hooked":
        with pytest.raises(ModelError, match=r"A part of this model was turned|were turned into"):
            lens.logprob(fact)
    else:
        assert lens.dtype == torch.bfloat16
        anew = Lens.from_hf(tiny_hf("gptj").to(torch.bfloat16), tokenizer())
        assert torch.equal(lens.next_token_logits(fact), anew.next_token_logits(fact))


def test_a_model_of_which_a_part_was_turned_is_refused():
    hf = tiny_hf("gptj")
    lens = Lens.from_hf(hf, tokenizer())
    lens.model.get_submodule("blocks.0").to(torch.bfloat16)
    with pytest.raises(ModelError, match=r"A part of this model was turned|were turned into"):
        lens.logprob(qv.Fact("The capital of {} is", "Norway", "Oslo"))
