"""What a Lens promises on both backends and every kind of attention, against Hugging Face alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import qv_lens as qv
from qv_lens.editing.fine_tuning import last_token_loss
from qv_lens.evaluation.answers import tell
from qv_lens.facts.records import Probe
from qv_lens.models.interventions import ffn_coefficients
from qv_lens.models.zoo import WEIGHTS
from qv_lens.patch import Delta
from tests.models import BACKENDS, KINDS, PROMPTS, hf_logits, tiny_hf, tiny_lens, tokenizer

pytestmark = pytest.mark.parametrize("backend", BACKENDS)
FACT = qv.Fact("{} works for", "Olga Pelodan", "Nortek")
exact = pytest.mark.usefixtures("true_float64")


def logits_agree(kind, backend, dtype, tolerance, exact=True):
    reference, lens = (
        tiny_hf(kind, dtype, exact=exact),
        tiny_lens(kind, backend, dtype, exact=exact),
    )
    batch = lens.next_token_logits(PROMPTS)
    for row, prompt in zip(batch, PROMPTS, strict=True):
        assert (row - hf_logits(reference, prompt)).abs().max() < tolerance
        assert (row - lens.next_token_logits(prompt)[0]).abs().max() < tolerance


@pytest.mark.parametrize("kind", KINDS)
def test_logits_equal_hugging_face_also_in_an_unequal_batch(kind, backend):
    logits_agree(kind, backend, torch.float32, 1e-4)


@pytest.mark.parametrize("kind", KINDS)
@exact
def test_logits_equal_hugging_face_in_float64(kind, backend):
    """The bridge restores Hugging Face's float32 rotary tables; all else is float64 throughout."""
    logits_agree(kind, backend, torch.float64, 1e-9, exact=backend == "hooked" or kind == "gptj")


@exact
@pytest.mark.parametrize("kind", KINDS)
def test_identities_of_the_forward_pass(kind, backend):
    lens = tiny_lens(kind, backend)
    trace = lens.trace(PROMPTS)
    adapter = lens.backend_adapter
    for layer in range(lens.n_layers):
        m, ffn = trace.m[layer], trace.ffn[layer]
        reads = trace.resid[layer] if adapter.parallel else trace.mid[layer]
        torch.testing.assert_close(ffn_coefficients(lens, layer, reads), m, atol=1e-10, rtol=1e-10)
        torch.testing.assert_close(
            m @ lens.w_out(layer) + adapter.b_out(layer), ffn, atol=1e-10, rtol=1e-10
        )
        torch.testing.assert_close(
            trace.mid[layer] + ffn, trace.resid[layer + 1], atol=1e-10, rtol=1e-10
        )
    weight, bias = adapter.unembed()
    logits = adapter.norm(None)(trace.final) @ weight + bias
    torch.testing.assert_close(logits, trace.logits, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("positions", ["last", "subject_last", "subject_first"])
def test_a_batch_traces_what_single_prompts_trace(kind, backend, positions):
    facts = [
        qv.Fact("{} works for", "Olga Pelodan", "Nortek"),
        qv.Fact("The capital of {} is the city of", "Norway", "Oslo"),
    ]
    lens = tiny_lens(kind, backend)
    batch = lens.trace(facts, positions)
    for i, fact in enumerate(facts):
        alone = lens.trace(fact, positions)
        torch.testing.assert_close(batch.m[:, i], alone.m[:, 0], atol=1e-11, rtol=1e-11)
        torch.testing.assert_close(batch.resid[:, i], alone.resid[:, 0], atol=1e-11, rtol=1e-11)


@exact
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["W_out", "W_O", "W_in"])
def test_a_write_reaches_the_hooked_and_the_wrapped_model(kind, backend, name):
    lens = tiny_lens(kind, backend)
    before = lens.next_token_logits(PROMPTS[0])[0]
    weight = lens.parameter(1, name)
    weight.add_(
        torch.randn(weight.shape, generator=torch.Generator().manual_seed(1), dtype=weight.dtype)
        * 0.1
    )
    after = lens.next_token_logits(PROMPTS[0])[0]
    assert (after - before).abs().max() > 1e-3
    assert (after - hf_logits(lens.hf, PROMPTS[0])).abs().max() < 1e-9


@pytest.mark.parametrize("kind", KINDS)
def test_saved_checkpoint_loads_with_transformers_alone(kind, backend, tmp_path):
    lens = tiny_lens(kind, backend, torch.float32)
    lens.w_out(2).add_(
        torch.randn(lens.w_out(2).shape, generator=torch.Generator().manual_seed(1)) * 0.1
    )
    lens.save(tmp_path / "model")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert (
        hf_logits(reloaded, PROMPTS[1]) - lens.next_token_logits(PROMPTS[1])[0]
    ).abs().max() < 1e-4
    again = qv.load(tmp_path / "model", backend=backend)
    assert again.fingerprint == lens.fingerprint
    with pytest.raises(qv.QVLensError, match="already holds files"):
        lens.save(tmp_path / "model")


@pytest.mark.parametrize("kind", ["gptj", "qwen3-gqa"])
def test_a_users_own_hooks_survive_intervene(kind, backend):
    lens = tiny_lens(kind, backend)
    seen = []
    lens.model.add_hook("blocks.1.hook_mlp_out", lambda tensor, hook: seen.append(tensor.shape))
    neurons = qv.NeuronSet.of([(1, 3), (2, 5)])
    with lens.intervene(qv.Zero(neurons)):
        lens.next_token_logits(PROMPTS[0])
    with pytest.raises(RuntimeError), lens.intervene(qv.Zero(neurons)):
        raise RuntimeError
    lens.next_token_logits(PROMPTS[0])
    assert len(seen) == 2


@pytest.mark.parametrize("kind", KINDS)
def test_zeroing_by_hook_equals_zeroing_the_row(kind, backend):
    lens = tiny_lens(kind, backend)
    units = [(0, 3), (1, 7), (2, 11)]
    clean = lens.next_token_logits(PROMPTS)
    with lens.intervene(qv.Zero(qv.NeuronSet.of(units))):
        hooked = lens.next_token_logits(PROMPTS)
    for layer, neuron in units:
        lens.w_out(layer)[neuron] = 0
    assert (lens.next_token_logits(PROMPTS) - hooked).abs().max() < 1e-12
    assert (clean - hooked).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["gptj", "qwen3-gqa"])
def test_generation_agrees_with_hugging_face_and_with_itself_under_hooks(kind, backend):
    lens = tiny_lens(kind, backend)
    texts = list(PROMPTS)
    fast = lens.generate(texts, max_new_tokens=6)
    for text, said in zip(texts, fast, strict=True):
        ids = list(tokenizer()(text)["input_ids"])
        for _ in range(6):  # greedy, the whole text read again for every token
            ids.append(int(lens.hf(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == lens.tokenizer.eos_token_id:
                break
        prompt = len(tokenizer()(text)["input_ids"])
        assert said == lens.tokenizer.decode(ids[prompt:], skip_special_tokens=True)
    assert fast == [lens.generate(text, max_new_tokens=6) for text in texts]
    with lens.intervene(qv.Scale(qv.NeuronSet.of([(0, 0)]), 1.0)):
        assert lens.generate(texts, max_new_tokens=6) == fast


def test_generation_stops_where_a_text_says_enough(backend, monkeypatch):
    """Each row is its own shortest continuation that is enough, found by asking for 1, 2, ...
    tokens of it alone."""
    lens = tiny_lens("gptj", backend)
    grown = {text: [lens.generate(text, k) for k in range(1, 7)] for text in PROMPTS}
    # after two tokens, after three, ...
    wanted = [grown[text][1 + i] for i, text in enumerate(PROMPTS)]

    def enough(text):
        return text in wanted

    expected = [next((t for t in grown[text] if enough(t)), grown[text][-1]) for text in PROMPTS]
    assert len(set(map(len, expected))) > 1
    assert lens.generate(list(PROMPTS), 6, enough=enough) == expected
    with lens.intervene(qv.Scale(qv.NeuronSet.of([(0, 0)]), 1.0)):  # without the cache
        assert lens.generate(list(PROMPTS), 6, enough=enough) == expected
    monkeypatch.setattr(type(lens), "ends_of_text", frozenset())  # rows go on behind their ends
    assert lens.generate(list(PROMPTS), 6, enough=enough) == expected


def test_generation_tells_what_was_cut_off_before_its_end_of_text(backend, monkeypatch):
    lens, cut = tiny_lens("gptj", backend), " and so on"
    greedy = []
    for text in PROMPTS:
        ids, new = list(tokenizer()(text)["input_ids"]), []
        for _ in range(6):
            new.append(int(lens.hf(torch.tensor([[*ids, *new]])).logits[0, -1].argmax()))
        greedy.append(new)
    said = [set(new) for new in greedy]
    ends = frozenset(set.union(*said) - set.intersection(*said))  # not all come to an end
    monkeypatch.setattr(type(lens), "ends_of_text", ends)
    wanted = []
    for new in greedy:
        stop = next((i for i, token in enumerate(new) if token in ends), 6)
        text = lens.tokenizer.decode(new[:stop], skip_special_tokens=True)
        wanted.append(text + (cut if stop == 6 else ""))
    assert len({text.endswith(cut) for text in wanted}) == 2
    assert lens.generate(list(PROMPTS), 6, runs_on=cut) == wanted
    with lens.intervene(qv.Scale(qv.NeuronSet.of([(0, 0)]), 1.0)):  # without the cache
        assert lens.generate(list(PROMPTS), 6, runs_on=cut) == wanted


def test_both_backends_share_one_fingerprint(backend):
    assert tiny_lens("gptj", backend).fingerprint == tiny_lens("gptj", BACKENDS[0]).fingerprint
    assert (
        tiny_lens("qwen3-gqa", backend).fingerprint
        == tiny_lens("qwen3-gqa", BACKENDS[0]).fingerprint
    )


@pytest.mark.parametrize("kind", ["gptj", "qwen3-gqa"])
def test_a_tokenizer_that_pads_left_changes_nothing(kind, backend):
    lens, left = tiny_lens(kind, backend), tiny_lens(kind, backend)
    left.model.tokenizer.padding_side = "left"
    left.model.tokenizer.pad_token_id = lens.tokenize(PROMPTS[0])[0].ids[0]
    assert (left.next_token_logits(PROMPTS) - lens.next_token_logits(PROMPTS)).abs().max() < 1e-12


def test_a_users_own_model_is_tokenised_without_a_bos(backend):
    """TransformerLens gives its tokenizer a BOS of its own; the papers' code uses none."""
    loaded = qv.load("toy-gptj", backend=backend)
    loaded.model.tokenizer = AutoTokenizer.from_pretrained(WEIGHTS / "toy-gptj", add_bos_token=True)
    own = qv.Lens(loaded.model)
    assert own.tokenize(PROMPTS) == loaded.tokenize(PROMPTS)
    assert own.model.tokenizer(PROMPTS[0])["input_ids"] != list(own.tokenize(PROMPTS[0])[0].ids)
    assert own.name == loaded.name
    assert (
        qv.load("toy-gptj", backend=backend, prepend_bos=True).tokenize(PROMPTS[0])[0].ids[0]
        == own.tokenizer.bos_token_id
    )
    with pytest.raises(qv.QVLensError, match="no Hugging Face model"):
        own.save("nowhere")


def test_a_users_own_layout_is_written_too(backend):
    """A HookedTransformer whose W_Q, W_K and W_V lie contiguously, as its own constructors leave
    them: what `parameter` hands out is live all the same."""
    if backend != "hooked":
        pytest.skip("a bridge wraps Hugging Face's own modules")
    for name in ("W_Q", "W_K", "W_V"):
        lens = tiny_lens("qwen3-gqa", backend, torch.float32)
        attn = lens.model.blocks[1].attn
        stored = getattr(attn, f"_{name}", None)
        stored = getattr(attn, name) if stored is None else stored
        stored.data = stored.data.clone(memory_format=torch.contiguous_format)
        before = lens.logits([[1, 2, 3, 4]])
        weight = lens.parameter(1, name)
        assert torch.equal(lens.logits([[1, 2, 3, 4]]), before)
        weight.mul_(-2.0)
        assert not torch.allclose(lens.logits([[1, 2, 3, 4]]), before)


@pytest.mark.parametrize("kind", ["gptj", "qwen3-gqa"])
def test_the_state_tells_interventions_apart(kind, backend):
    lens = tiny_lens(kind, backend, torch.float32)
    sets = [qv.NeuronSet.of(units) for units in ([(0, 5)], [(1, 7)], [(0, 5), (1, 7)])]
    before = lens.state()
    lens.logits([[1, 2]])  # a bridge installs hooks of its own at its first pass
    states = [before, lens.state()]
    for neurons in sets:
        with lens.intervene(qv.Zero(neurons)):
            states.append(lens.state())
    with lens.intervene(qv.Scale(sets[0], 2.0)):
        states.append(lens.state())
    assert len(set(states)) == 5  # the bare one twice
    # what it does, nobody can tell
    with lens.backend_adapter.hooks([(lens.backend_adapter.resid_pre(1), lambda x: x + 1)]):
        assert lens.state() != lens.state()


@exact
@pytest.mark.parametrize("kind", ["gptj", "qwen3-gqa"])
def test_last_is_the_prompts_last_token_also_behind_an_answer(kind, backend):
    """An answer of several tokens, teacher forced, against the prompt alone; and while a text is
    continued."""
    lens, fact = tiny_lens(kind, backend), qv.Fact("{} works for", "Olga Pelodan", "Nortek Dalrin")
    answer = lens.answer_ids(fact)
    assert len(answer) > 1
    zero = qv.Zero(
        qv.NeuronSet.of([(layer, n) for layer in range(3) for n in range(30)]), positions="last"
    )
    clean = lens.logprob(fact)
    with lens.intervene(zero):
        alone, trace = lens.logprob(fact), lens.trace([fact], "answer")
        forced = trace.logits.log_softmax(-1)[range(len(answer)), list(answer)].mean().item()
        assert tell(lens, [Probe(fact.text, fact.answer)])[0].logprob == pytest.approx(
            forced, abs=1e-9
        )
        first = trace.logits[0].log_softmax(-1)[answer[0]].item()
        said = lens.generate(fact, 3)
    assert abs(alone - clean) > 1e-3
    assert first == pytest.approx(alone, abs=1e-9)
    assert (trace.m[:, 0, :30] == 0).all()
    assert (trace.m[:, 1, :30] != 0).any()
    texts = [fact.text]
    for _ in range(3):  # the intervention stays where the prompt ends while the text grows
        ids = lens.tokenizer(texts[-1])["input_ids"]
        with lens.intervene(zero):
            token = lens.logits([ids], last=[len(lens.tokenize(fact)[0].ids) - 1])[0, -1].argmax()
        texts.append(lens.tokenizer.decode([*ids, int(token)]))
    assert texts[-1] == fact.text + said


@pytest.mark.parametrize("kind", ["gptj", "qwen3-gqa"])
def test_a_trace_of_another_state_is_refused(kind, backend):
    lens = tiny_lens(kind, backend, torch.float32)
    trace, neurons = lens.trace(FACT), qv.NeuronSet.of([(1, 3)])
    with lens.intervene(qv.Zero(neurons)):
        with pytest.raises(qv.QVLensError, match="under no intervention"):
            qv.value_neurons(lens, trace)
        other = lens.trace(FACT)
        assert "Zero" in qv.value_neurons(lens, other).settings["interventions"]
    with pytest.raises(qv.QVLensError, match="under"):
        qv.value_neurons(lens, other)
    with lens.intervene(qv.Zero(neurons)):
        assert len(qv.value_neurons(lens, other, 5)) == 5  # an equal one, not the same
    row = lens.w_out(1)[3].clone()
    lens.w_out(1)[3] *= 2
    with pytest.raises(qv.QVLensError, match="W_out written to"):
        qv.value_neurons(lens, trace)
    lens.w_out(1)[3] = row
    lens.w_out(1)[[3, 4]] = lens.w_out(1)[[4, 3]]
    with pytest.raises(qv.QVLensError, match="W_out written to"):
        qv.value_neurons(lens, trace)
    lens.w_out(1)[[3, 4]] = lens.w_out(1)[[4, 3]]
    assert len(qv.value_neurons(lens, trace, 5)) == 5


def test_the_fingerprint_covers_every_weight(backend):
    names = ("W_out", "W_in", "W_O", "W_Q", "W_K", "W_V", "b_in", "b_out")
    found = set()
    for name in names:
        lens = tiny_lens("gptj", backend, torch.float32)
        lens.parameter(1, name)[..., 0] += 0.5
        found.add(lens.fingerprint)
    assert len(found | {tiny_lens("gptj", backend, torch.float32).fingerprint}) == len(names) + 1


def test_parameters_put_in_the_place_of_others_are_noticed(backend, tmp_path):
    """`model.blocks[i].mlp.W_out = Parameter(...)` works on a HookedTransformer, and Hugging Face's
    model does not see it."""
    if backend == "bridge":
        pytest.skip("a bridge hands out views of Hugging Face's own parameters")
    lens = tiny_lens("gptj", backend, torch.float32)
    for block in lens.model.blocks:
        block.mlp.W_out = torch.nn.Parameter(-3 * block.mlp.W_out)
    ids = lens.tokenizer(PROMPTS[0])["input_ids"]
    said = lens.tokenizer.decode([int(lens.logits([ids])[0, -1].argmax())])
    assert lens.generate(PROMPTS[0], 1) == said
    with pytest.raises(qv.QVLensError, match="was replaced"):
        lens.save(tmp_path / "model")
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("how", ["parameters", "hook", "dropout"])
def test_what_is_generated_is_what_the_lens_computes(how, backend):
    """Whatever was done to the Hugging Face model behind a HookedTransformer."""
    if backend == "bridge":
        pytest.skip("a bridge runs the Hugging Face model itself")
    lens = tiny_lens("gptj", backend, torch.float32)
    said = lens.generate(list(PROMPTS), 6)
    if how == "parameters":
        other = {name: -w for name, w in lens.hf.state_dict().items()}
        lens.hf.load_state_dict(other, assign=True)
        with pytest.raises(qv.QVLensError, match="was replaced"):
            lens.plain_model()
    elif how == "hook":
        block = lens.hf.transformer.h[1]
        block.mlp.register_forward_hook(lambda _module, _inputs, out: -3 * out)
    else:
        for block in lens.hf.transformer.h:
            block.mlp.dropout.p = 0.9
        lens.hf.train()
    assert lens.generate(list(PROMPTS), 6) == said


def test_a_model_in_training_mode_is_told_so(backend):
    lens = tiny_lens("gptj", backend)
    with pytest.raises(qv.QVLensError, match=r"training mode.*model\.eval\(\)"):
        qv.Lens.from_hf(tiny_hf("gptj").train(), tokenizer(), backend=backend)
    if backend == "bridge":
        lens.hf.train()
        with pytest.raises(qv.QVLensError, match="training mode"):
            lens.logprob(FACT)


@pytest.mark.parametrize("kind", ["gptj", "qwen3-gqa"])
def test_a_hook_that_counts_tokens_is_in_every_pass(kind, backend, monkeypatch):
    """No pass over the prompt's end alone, in which the first token would be another."""
    lens = tiny_lens(kind, backend)
    site = lens.model.hook_dict[lens.backend_adapter.resid_pre(1)]
    site.register_forward_hook(lambda _module, _inputs, x: torch.cat([-x[:, :1], x[:, 1:]], 1))
    value = qv.neuron_effects(lens, FACT, 6)
    query = qv.query_neurons(lens, FACT, value, 6)
    editor = qv.ROME(layer=1, steps=3, mom2_adjustment=False)
    request = FACT.to("golf")

    def measured():
        curve = qv.faithfulness(lens, FACT, {"best": value}, (1, 3), seeds=1)
        edges = qv.edge_effects(lens, FACT, qv.qv_graph(lens, FACT, value, query)).edges
        patch = qv.edit(lens, [request], editor, templates=("{}",))
        deltas = [delta.dense().flatten() for delta in patch.deltas.values()]
        return curve, [*curve["logprob"], *edges["lost_logprob"]], torch.cat(deltas)

    curve, numbers, deltas = measured()
    assert curve["clean"].tolist() == pytest.approx([lens.logprob(FACT)] * len(curve))
    monkeypatch.setattr(type(lens), "past", lambda *_: None)
    _, wanted, whole = measured()
    assert numbers == pytest.approx(wanted, abs=1e-9)
    assert (deltas - whole).norm() < 1e-6 * whole.norm()


def test_folded_weights_are_refused(backend):
    lens = tiny_lens("gptj", backend, torch.float32)
    lens.model.cfg.normalization_type = "LNPre"
    with pytest.raises(qv.QVLensError, match="no_processing"):
        qv.Lens(lens.model, tokenizer=lens.tokenizer)


@pytest.mark.parametrize(
    "name", ["embed.W_E", "blocks.1.attn.W_O", "ln_final.w", "unembed.W_U", "blocks.2.mlp.W_in"]
)
def test_a_trace_is_stale_after_any_weight_was_written_by_hand(name, backend):
    if backend == "bridge":
        pytest.skip("parameters of a bridge have other names; the sums are taken over all of them")
    lens = tiny_lens("gptj", backend, torch.float32)
    trace = lens.trace(FACT)
    weight = dict(lens.model.named_parameters())[name]
    place = (0,) * weight.ndim
    weight.data[place] += 0.01
    with pytest.raises(qv.QVLensError, match="other weights"):
        qv.value_neurons(lens, trace, 5)
    weight.data[place] -= 0.01
    qv.value_neurons(lens, lens.trace(FACT), 5)
    for axis in range(weight.ndim):  # two places that change theirs
        trace = lens.trace(FACT)
        order = torch.arange(weight.shape[axis])
        order[[0, 3]] = order[[3, 0]]
        weight.data.copy_(weight.data.index_select(axis, order))
        if weight.ndim > 1:
            with pytest.raises(qv.QVLensError, match="other weights"):
                qv.value_neurons(lens, trace, 5)


@pytest.mark.parametrize("kind", KINDS)
def test_logits_at_chosen_places_are_the_models_own(kind, backend):
    """Also where something acts after the last layer: a hook of the pass, of the user, or an
    intervention."""
    lens = tiny_lens(kind, backend, torch.float32)
    rows = [list(prompt.ids) for prompt in lens.tokenize(PROMPTS)]
    where = [(0, len(rows[0]) - 1), (1, 1), (0, 0)]
    at = (torch.tensor([0, 1, 0]), torch.tensor([len(rows[0]) - 1, 1, 0]))
    site = "ln_final.hook_normalized" if backend == "hooked" else "unembed.hook_in"

    class Mute:
        def check(self, lens):
            pass

        def hooks(self, lens):
            return [(site, torch.zeros_like)]

    torch.testing.assert_close(
        lens.logits_at(rows, where), lens.logits(rows)[at], atol=1e-5, rtol=0
    )
    muted = lens.logits_at(rows, where, [(site, torch.zeros_like)])
    assert (muted - lens.logits_at(rows, where)).abs().max() > 1e-2
    torch.testing.assert_close(muted, lens.logits(rows, [(site, torch.zeros_like)])[at])
    with lens.intervene(Mute()):
        torch.testing.assert_close(lens.logits_at(rows, where), muted)
    handle = lens.model.hook_dict[site].register_forward_hook(lambda m, i, x: torch.zeros_like(x))
    torch.testing.assert_close(lens.logits_at(rows, where), muted)
    handle.remove()


def test_the_unembedding_runs_where_it_is_read_and_nowhere_else(backend, monkeypatch):
    """Next tokens, teacher-forced answers and the losses of gradient editors read a few places of
    each row."""
    if backend == "bridge":
        pytest.skip("a bridge runs in full")
    lens = tiny_lens("gptj", backend, torch.float32)
    prompts = lens.tokenize([FACT])
    kind, seen = type(lens.model.unembed), []
    wrapped = kind.forward
    # of the class: one of the module alone is a change of the user's, which every pass goes through
    monkeypatch.setattr(kind, "forward", lambda own, x: seen.append(x.shape) or wrapped(own, x))
    lens.next_token_logits(PROMPTS)
    tell(lens, [Probe(FACT.text, FACT.answer)])
    lens.answer_logprobs(prompts)
    last_token_loss(lens, prompts, [])
    assert not seen
    lens.logits([prompts[0].ids])
    assert seen


@pytest.mark.parametrize("kind", ["gptj", "qwen3-gqa"])
def test_scaled_and_replaced_neurons_are_so_at_the_last_token_or_at_all(kind, backend):
    lens, some = tiny_lens(kind, backend), qv.NeuronSet.of([(0, 3), (0, 5)])
    clean = lens.trace(FACT, "all").m[0][:, [3, 5]]
    for where, rows in (("all", slice(None)), ("last", slice(-1, None))):
        for change, wanted in (
            (qv.Scale(some, 3.0, where), 3 * clean[rows]),
            (qv.Replace(some, 2.0, where), torch.full_like(clean[rows], 2.0)),
            (qv.Zero(some, where), torch.zeros_like(clean[rows])),
        ):
            with lens.intervene(change):
                m = lens.trace(FACT, "all").m[0]
            torch.testing.assert_close(m[rows][:, [3, 5]], wanted)
            if where == "last":
                torch.testing.assert_close(m[:-1][:, [3, 5]], clean[:-1])


def test_whole_answers_under_an_intervention_at_the_last_token(backend):
    """The prompt's last token, not the answer's; one text at a time and several give the same."""
    lens = tiny_lens("gptj", backend)
    facts = [FACT, qv.Fact("The famous {} works for", "Olga Pelodan", "Oslo Nortek")]
    some = qv.NeuronSet.of([(1, n) for n in range(20)])
    assert len(lens.answer_ids(facts[1])) > 1
    last = lens.rows(facts[1]).positions
    with lens.intervene(qv.Replace(some, 5.0, last)):
        wanted = lens.logprob(facts[1], whole=True)
    assert wanted != pytest.approx(lens.logprob(facts[1], whole=True), abs=1e-3)
    with lens.intervene(qv.Replace(some, 5.0, "last")):
        assert lens.logprob(facts, whole=True)[1] == pytest.approx(wanted, abs=1e-9)
        assert lens.logprob(facts[1], whole=True) == pytest.approx(wanted, abs=1e-9)


def test_an_intervention_acts_at_the_positions_named_alone(backend):
    """Prompts of unequal length side by side: an index beyond the shorter one's end is nowhere in
    it."""
    lens = tiny_lens("qwen3-gqa", backend)
    some, longer = qv.NeuronSet.of([(0, 3), (0, 5)]), f"The famous {FACT.text}"
    clean = [lens.trace(asked, "all").m[0] for asked in (FACT, longer)]
    last = len(clean[1]) - 1
    for where in (0, 2, (1, 3), (np.int64(2), last)):
        at = [where] if isinstance(where, int) else [int(one) for one in where]
        with lens.intervene(qv.Zero(some, where)):
            found = lens.trace([FACT, longer], "all").m[0].split([len(m) for m in clean])
        for m, before in zip(found, clean, strict=True):
            for position in range(len(before)):
                wanted = before[position].clone()
                if position in at:
                    wanted[[3, 5]] = 0
                torch.testing.assert_close(m[position], wanted)
    for several in ([1, 3], np.array([1, 3]), torch.tensor([1, 3])):
        assert qv.Zero(some, several) == qv.Zero(some, (1, 3))
    at = lens.rows(FACT, "subject_last").positions
    with lens.intervene(qv.Zero(some, at)):
        assert lens.trace(FACT, "subject_last").m[0, 0, [3, 5]].eq(0).all()
    for wrong in (-1, True, "subject_last", (), (1, -2), 1.0, [[1]]):
        with (
            pytest.raises(qv.QVLensError, match="positions must be 'all', 'last', an index"),
            lens.intervene(qv.Zero(some, wrong)),
        ):
            pass


@pytest.mark.parametrize("unit", ["ffn", "attn_channel", "head"])
def test_units_are_set_each_to_its_own_value(backend, unit):
    """As means, or what they are on another prompt: of heads every channel."""
    lens = tiny_lens("qwen3-gqa", backend)
    neurons = qv.NeuronSet.of([(2, 1), (0, 3), (2, 0)], unit)
    other = lens.trace("The capital of Norway is")
    channels = 8 if unit == "head" else 1

    def of(trace, row=0):
        values = trace.m if unit == "ffn" else trace.z
        return [values[layer, row, n * channels : (n + 1) * channels] for layer, n in neurons.units]

    there = of(other)
    ways = [torch.stack(there), [each.tolist() for each in there], torch.stack(there).numpy()]
    if unit != "head":
        ways.append([float(each) for each in there])
    for value in ways:
        with lens.intervene(qv.Replace(neurons, value, "last")):
            trace = lens.trace([FACT, "Olga plays"])
        for row in (0, 1):
            for found, wanted in zip(of(trace, row), there, strict=True):
                torch.testing.assert_close(found, wanted)
    assert qv.Replace(neurons, ways[0]) == qv.Replace(neurons, ways[1])
    with lens.intervene(qv.Replace(neurons, [1.0, 2.0, 3.0])):
        for found, wanted in zip(of(lens.trace(FACT)), (1.0, 2.0, 3.0), strict=True):
            assert found.eq(wanted).all()


def test_a_pass_from_a_layer_on_has_what_interventions_do_below_it(backend):
    """The stream that was kept is that of the clean model: it is not gone on from, nor are keys and
    values kept, while anything is in force."""
    lens = tiny_lens("gptj", backend)
    rows = [list(lens.tokenize(FACT)[0].ids)]
    start = (1, lens.stream(rows, 1))
    clean = lens.logits(rows)
    torch.testing.assert_close(lens.logits(rows, start=start), clean)
    first = torch.tensor([1])
    assert (lens.past(start, first) is None) == (backend == "bridge")
    with lens.intervene(qv.Zero(qv.NeuronSet.of([(0, n) for n in range(20)]))):
        wanted = lens.logits(rows)
        torch.testing.assert_close(lens.logits(rows, start=start), wanted)
        assert lens.past(start, first) is None
    assert (wanted - clean).abs().max() > 1e-3


def test_weights_before_patches_are_those_before_the_first_of_them(backend):
    lens = tiny_lens("gptj", backend)
    W = lens.parameter(1, "W_out")
    one, other = (
        qv.Patch({(1, "W_out"): Delta(torch.full(W.shape, by).double())}, lens.fingerprint)
        for by in (1.0, 10.0)
    )
    was = W.clone()
    with lens.patched(one, other):
        torch.testing.assert_close(lens.before_patches()[1, "W_out"], was)
        torch.testing.assert_close(lens.before_patches(1)[1, "W_out"], was + 1)
        assert lens.before_patches(2) == {}
