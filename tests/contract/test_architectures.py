"""Every architecture of the table, on both hooked classes where both exist, against Hugging Face
alone.

A model's own modules are its truth: the final norm, the unembedding, the FFN's last matrix, the
norm after it."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import qv_lens as qv
from qv_lens.editing.statistics import Statistics, covariance
from qv_lens.errors import ConfigError, ModelError
from qv_lens.models.architectures import ARCHITECTURES, architecture_of
from qv_lens.models.deltas import delta_hooks
from qv_lens.models.interventions import ffn_coefficients
from qv_lens.models.lens import Lens
from qv_lens.models.wrap import hooked_available
from tests.models import PROMPTS, TINY, hf_logits, texts, tiny_of, tokenizer

FACT = qv.Fact("{} works for", "Olga Pelodan", "Nortek")
PAIRS = [
    (name, backend)
    for name, (kind, _) in TINY.items()
    for backend in ("hooked", "bridge")
    if backend == "bridge"
    or (
        hooked_available()
        and ARCHITECTURES[kind].hooked
        and name not in ("Llama 3", "Llama, biases")  # HookedTransformer is another model
    )
]
pytestmark = pytest.mark.parametrize(("name", "backend"), PAIRS, ids=lambda value: value)


def own_lens(name: str, backend: str, dtype: torch.dtype = torch.float32) -> Lens:
    """For a test that leaves it changed."""
    return Lens.from_hf(tiny_of(name, dtype), tokenizer(), backend=backend, name=name)


@cache
def lens_of(name: str, backend: str, dtype: torch.dtype = torch.float32) -> Lens:
    """For tests that leave it as it was: wrapping takes longer than most of them."""
    return own_lens(name, backend, dtype)


@cache
def state_of(name: str, backend: str) -> str:
    return own_lens(name, backend).state()


@cache
def statistics_of(name: str, backend: str) -> Statistics:
    return covariance(lens_of(name, backend), texts(60), (0, 1))


@pytest.fixture(autouse=True)
def the_shared_lens_is_left_as_it_was(name, backend):
    yield
    assert lens_of(name, backend).bare_state == state_of(name, backend)


def test_logits_are_hugging_faces(name, backend):
    lens, hf = lens_of(name, backend), tiny_of(name)
    batch = lens.next_token_logits(PROMPTS)
    for row, prompt in zip(batch, PROMPTS, strict=True):
        assert (row - hf_logits(hf, prompt)).abs().max() < 1e-4


def test_reading_leaves_the_weights_with_their_checkpoint(name, backend):
    """Also Q, K and V that a checkpoint holds as one matrix."""
    lens = own_lens(name, backend)
    if (name, backend) == ("OPT", "bridge") and hooked_available():  # 3.9's shows no pattern
        with pytest.raises(ModelError, match=r"Attention is not seen.*backend='hooked'"):
            qv.value_neurons(lens, FACT, 5, unit="attn_neuron")
        return
    value = qv.value_neurons(lens, FACT, 5, unit="attn_neuron")
    qv.query_neurons(lens, FACT, value, 5)
    assert lens.plain_model() is lens.hf


def test_the_fingerprint_is_that_of_every_parameter(name, backend):
    """The same on both backends, and another one where any parameter of the checkpoint is."""
    lens = own_lens(name, backend)
    clean = lens.fingerprint
    assert clean == lens_of(name, "bridge").fingerprint
    for parameter, weight in lens.checkpoint.state.items():
        if not isinstance(weight, torch.nn.Parameter) or ".0." in parameter or ".2." in parameter:
            continue
        kept = weight.detach().clone()
        with torch.no_grad():
            weight.view(-1)[-1] += 0.5
        del lens.fingerprint
        other = lens.fingerprint
        if other == clean:  # the hooked class holds a copy
            hf = tiny_of(name)
            hf.load_state_dict(lens.checkpoint.state)
            other = Lens.from_hf(hf, tokenizer(), backend=backend).fingerprint
        assert other != clean, parameter
        weight.data.copy_(kept)


@pytest.mark.usefixtures("true_float64")
def test_logits_are_hugging_faces_in_float64(name, backend):
    """Up to the rotary tables, which Hugging Face keeps in float32."""
    lens, hf = lens_of(name, backend, torch.float64), tiny_of(name, torch.float64)
    for row, prompt in zip(lens.next_token_logits(PROMPTS), PROMPTS, strict=True):
        assert (row - hf_logits(hf, prompt)).abs().max() < 2e-5


def test_the_stream_is_its_parts(name, backend):
    """Embedding, attention by channels and neurons, through the norms that follow them; and what
    the FFN reads."""
    lens = lens_of(name, backend)
    trace, adapter = lens.trace(PROMPTS), lens.backend_adapter
    stream = trace.resid[0]
    for layer in range(lens.n_layers):
        reads = trace.resid[layer] if adapter.parallel else trace.mid[layer]
        torch.testing.assert_close(
            ffn_coefficients(lens, layer, reads), trace.m[layer], atol=1e-4, rtol=1e-4
        )
        parts = []
        for sublayer, x in (("attn", trace.z[layer]), ("ffn", trace.m[layer])):
            scale = trace.scale_of(sublayer, layer)
            bias = adapter.b_o(layer) if sublayer == "attn" else adapter.b_out(layer)
            after = adapter.norm_after(layer, sublayer)
            gain = 1.0 if after is None else after.gain
            parts.append(
                (x @ adapter.value_vectors(layer, sublayer) + (0 if bias is None else bias * gain))
                * (1 if scale is None else scale)
            )
        torch.testing.assert_close(parts[0], trace.attn[layer], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(parts[1], trace.ffn[layer], atol=1e-4, rtol=1e-4)
        stream = stream + parts[0] + parts[1]
    torch.testing.assert_close(stream, trace.final, atol=5e-4, rtol=1e-4)
    torch.testing.assert_close(lens.read_out(trace.final), trace.logits, atol=1e-4, rtol=0)


def test_zeroing_a_neuron_is_zeroing_its_row(name, backend):
    units = [(1, 3), (1, 7), (0, 2), (2, 40)]
    lens = lens_of(name, backend)
    with lens.intervene(qv.Zero(qv.NeuronSet.of(units))):
        by_hook = lens.next_token_logits(PROMPTS)
    hf = tiny_of(name)
    record = architecture_of(hf.config, type(hf).__name__)
    for layer, neuron in units:
        weight = hf.get_submodule(record.stored_name(layer, "W_out")).weight.data
        (weight.T if record.conv1d else weight)[..., neuron] = 0
        if record.conv1d:
            weight[neuron] = 0
    for row, prompt in zip(by_hook, PROMPTS, strict=True):
        assert (row - hf_logits(hf, prompt)).abs().max() < 1e-4


def parts_of(hf, text):
    """By layer, from Hugging Face's hooks: m, what the FFN adds per neuron, and the stream after
    attention; at the last token."""
    record = architecture_of(hf.config, type(hf).__name__)
    after = {"OlmoForCausalLM": None}.get(type(hf).__name__)
    seen, handles = {}, []
    for layer in range(3):
        block = hf.get_submodule(record.layer.format(layer))
        out = hf.get_submodule(record.stored_name(layer, "W_out"))
        post = getattr(block, "post_feedforward_layernorm", after)

        def keep(key):
            def hook(_module, inputs, output):
                first = output[0] if isinstance(output, tuple) else output
                last = len(tokenizer()(text)["input_ids"]) - 1
                seen[key] = [
                    (x[0] if x.ndim == 3 else x)[last].double().clone() for x in (inputs[0], first)
                ]

            return hook

        handles += [
            out.register_forward_hook(keep(("out", layer))),
            block.register_forward_hook(keep(("block", layer))),
        ]
        if post is not None:
            handles.append(post.register_forward_hook(keep(("post", layer))))
    hf(torch.tensor([tokenizer()(text)["input_ids"]]))
    for handle in handles:
        handle.remove()
    layers = []
    for layer in range(3):
        m, raw = seen["out", layer]
        W = hf.get_submodule(record.stored_name(layer, "W_out")).weight.double()
        vectors = m[:, None] * (W if record.conv1d else W.T)
        added = raw
        if ("post", layer) in seen:
            vectors = vectors * (seen["post", layer][1] / seen["post", layer][0])
            added = seen["post", layer][1]
        layers.append((m, vectors, seen["block", layer][1] - added))
    return layers


def final_norm(hf):
    paths = (
        "transformer.ln_f",
        "gpt_neox.final_layer_norm",
        "model.decoder.final_layer_norm",
        "model.norm",
        "model.final_layernorm",
    )
    names = dict(hf.named_modules())
    return next(names[path] for path in paths if path in names)


@pytest.mark.usefixtures("true_float64")
@pytest.mark.parametrize("norm", ["full", "frozen"])
def test_eq_9_is_brute_force_on_hugging_faces_modules(name, backend, norm):
    """log p(w | x + v_k) - log p(w | x) for every neuron, through the model's own final norm,
    unembedding and cap."""
    lens, hf = lens_of(name, backend, torch.float64), tiny_of(name, torch.float64)
    value = qv.value_neurons(lens, FACT, None, norm=norm).to_frame()
    token = lens.answer_ids(FACT)[0]
    head, norm_module = hf.get_output_embeddings(), final_norm(hf)
    cap = getattr(hf.config, "final_logit_softcapping", None)
    ids = torch.tensor([tokenizer()(FACT.text)["input_ids"]])
    kept = []
    handle = norm_module.register_forward_hook(
        lambda _, inputs, output: kept.append((inputs[0], output))
    )
    hf(ids)
    handle.remove()
    final, normed = (x[0, -1] if x.ndim == 3 else x[-1] for x in kept[0])

    def logp(y):
        if norm == "full":
            out = norm_module(y[None])[0]
        else:  # affine, with the final vector's own sigma: gain * centred / sigma + bias
            zero = norm_module(torch.zeros_like(final)[None])[0]
            mean = 0 if "RMS" in type(norm_module).__name__ else 1
            centred_final = final - mean * final.mean(-1, keepdim=True)
            out = (normed - zero) / centred_final * (y - mean * y.mean(-1, keepdim=True)) + zero
        logits = head(out)
        logits = logits if cap is None else cap * torch.tanh(logits / cap)
        return logits.log_softmax(-1)[..., token]

    for layer, (m, vectors, x) in enumerate(parts_of(hf, FACT.text)):
        wanted = torch.stack([logp(x + v) for v in vectors]) - logp(x)
        got = value[value["layer"] == layer].sort_values("neuron")
        torch.testing.assert_close(
            torch.tensor(got["score"].to_numpy()), wanted, atol=2e-5, rtol=1e-4
        )
        torch.testing.assert_close(
            torch.tensor(got["coefficient"].to_numpy()), m, atol=2e-5, rtol=1e-4
        )


def test_fast_modes_agree_or_are_refused(name, backend):
    lens = lens_of(name, backend)
    exact = qv.value_neurons(lens, FACT, 10).units
    for method in ("topk", "moments"):
        if lens.backend_adapter.logit_cap is None:
            assert qv.value_neurons(lens, FACT, 10, method=method).units == exact
        else:
            with pytest.raises(ConfigError, match="caps them softly"):
                qv.value_neurons(lens, FACT, 10, method=method)


def test_every_weight_in_passing_equals_written(name, backend):
    lens = lens_of(name, backend)
    rows = [list(prompt.ids) for prompt in lens.tokenize(PROMPTS)]
    clean = lens.logits(rows)
    assert {"W_out", "W_in", "W_O"} <= set(lens.parameter_names)
    for weight in lens.parameter_names:
        W = lens.parameter(1, weight)
        delta = torch.randn(W.shape, generator=torch.Generator().manual_seed(1)) * 0.1
        passing = lens.logits(rows, delta_hooks(lens, {(1, weight): delta}))
        saved = W.clone()
        W.add_(delta)
        written = lens.logits(rows)
        hf = lens.hf(torch.tensor(rows[:1])).logits[0, -1]
        W.copy_(saved)
        for i, row in enumerate(rows):
            torch.testing.assert_close(
                passing[i, : len(row)], written[i, : len(row)], atol=2e-4, rtol=0
            )
        assert (written - clean).abs().max() > 1e-3
        torch.testing.assert_close(written[0, len(rows[0]) - 1], hf, atol=1e-4, rtol=0)
    torch.testing.assert_close(lens.logits(rows), clean)


def test_suppress_of_neurons_at_zero_changes_nothing_and_of_others_what_it_says(name, backend):
    """What the targets read without the queries' vectors, by recomputing m from the stream less
    these vectors."""
    lens = lens_of(name, backend)
    query, targets = qv.NeuronSet.of([(0, n) for n in range(12)]), qv.NeuronSet.of([(1, 3), (1, 7)])
    with lens.intervene(qv.Zero(query)):
        clean = lens.next_token_logits(PROMPTS)
        with lens.intervene(qv.Suppress(query, targets)):
            torch.testing.assert_close(lens.next_token_logits(PROMPTS), clean, atol=2e-4, rtol=0)
    trace = lens.trace(PROMPTS)
    adapter = lens.backend_adapter
    scale = trace.scale_of("ffn", 0)
    written = trace.m[0][:, :12] @ adapter.value_vectors(0)[:12] * (1 if scale is None else scale)
    reads = (trace.resid[1] if adapter.parallel else trace.mid[1]) - written
    with lens.intervene(qv.Suppress(query, targets)):
        now = lens.trace(PROMPTS)
    torch.testing.assert_close(
        now.m[1][:, [3, 7]], ffn_coefficients(lens, 1, reads)[:, [3, 7]], atol=2e-4, rtol=1e-3
    )
    assert (now.m[1][:, [3, 7]] - trace.m[1][:, [3, 7]]).abs().max() > 1e-4


def test_queries_are_the_gradient_of_what_the_targets_read(name, backend):
    """Eq. 10 by `grad`, of one target, against a small step of the stream it reads."""
    lens = lens_of(name, backend)
    every = qv.value_neurons(lens, FACT, None)
    best = int(every.frame[every.frame["layer"] == 2]["neuron"].iloc[0])
    value = every.where(lambda f: (f["layer"] == 2) & (f["neuron"] == best))
    query = qv.query_neurons(lens, FACT, value, None).to_frame()
    trace, adapter = lens.trace(FACT), lens.backend_adapter
    h = (trace.resid[2] if adapter.parallel else trace.mid[2]).double()
    I, m = value.frame["score"].iloc[0], value.frame["coefficient"].iloc[0]
    scale = trace.scale_of("ffn", 0)
    v = (trace.m[0] * (1 if scale is None else scale)).double()[0, 9] * adapter.value_vectors(0)[
        9
    ].double()
    step = 1e-3
    high, low = (ffn_coefficients(lens, 2, h + sign * step * v)[0, best] for sign in (1, -1))
    got = query[(query["layer"] == 0) & (query["neuron"] == 9)]["score"].iloc[0]
    assert got == pytest.approx(float(I / m * (high - low) / (2 * step)), rel=2e-2, abs=1e-6)


#: at the last token, which a random model's answer depends on most
SEARCH = {
    "steps": 15,
    "lr": 0.3,
    "clamp": 8.0,
    "weight_decay": 1e-3,
    "kl": 1e-3,
    "fact_token": "last",
}
EDITORS = [
    qv.ROME(layer=1, **SEARCH),
    qv.MEMIT(layers=(0, 1), lam=0.01, **SEARCH),
    qv.PMET(layers=(0, 1), lam=0.01, **SEARCH),
    qv.FT(layer=1, lr=1e-2, steps=8),
]


@pytest.mark.parametrize("editor", EDITORS, ids=lambda e: type(e).__name__)
def test_edits_raise_the_new_answer_and_come_off_bit_for_bit(name, backend, editor):
    lens = lens_of(name, backend)
    state = {key: value.clone() for key, value in lens.checkpoint.state.items()}
    before = lens.logprob(FACT, "Quorix")
    patch = qv.edit(
        lens, FACT.to("Quorix"), editor, statistics=statistics_of(name, backend), templates=("{}",)
    )
    with lens.patched(patch):
        assert lens.logprob(FACT, "Quorix") > before
    assert all(torch.equal(value, state[key]) for key, value in lens.checkpoint.state.items())


def test_a_written_value_reaches_the_stream(name, backend):
    """ROME's v*, and MEMIT's z* in one layer: what the site gives on the bare prompt afterwards,
    through the norms."""
    lens = lens_of(name, backend)
    request, templates = FACT.to("Quorix"), ("{}",)
    statistics = statistics_of(name, backend)
    for editor in (
        qv.ROME(layer=1, steps=5, mom2_adjustment=False),
        qv.MEMIT(layers=(1,), steps=5, lam=1e-7, clamp=0.01),
    ):
        adapter = lens.backend_adapter
        site = adapter.written_at(1) if isinstance(editor, qv.ROME) else adapter.resid_post(1)
        patch = qv.edit(lens, request, editor, statistics=statistics, templates=templates)
        search = editor.plan(lens)[0].search
        from qv_lens.editing.keys import rows_of
        from qv_lens.editing.targets import search as search_for

        wanted = search_for(
            lens,
            [request],
            rows_of(lens, [request], templates, "subject_last"),
            "subject_last",
            search,
        ).z[0]
        prompt = lens.tokenize(FACT)[0]
        seen = []

        def keep(x, seen=seen, prompt=prompt):
            seen.append(x[0, prompt.subject[1]].double())

        lens.logits([prompt.ids], [(site, keep)])
        with lens.patched(patch):
            lens.logits([prompt.ids], [(site, keep)])
        missing, asked = (seen[1] - wanted).norm(), (seen[0] - wanted).norm()
        assert (
            missing
            < (
                1e-3
                if isinstance(editor, qv.ROME) or adapter.norm_after(1, "ffn") is None
                else 0.15
            )
            * asked
        )


def test_only_a_hook_of_the_user_s_makes_a_checkpoint_impossible(name, backend):
    """TransformerLens 4.3 wires OPT's hook points together by hooks of its own."""
    lens = own_lens(name, backend)
    assert lens.state() == lens.state() == lens.bare_state
    assert lens.plain_model() is lens.hf
    for permanent in (False, True):
        lens.model.hook_dict["blocks.1.hook_mlp_out"].add_hook(
            lambda tensor, hook: 0 * tensor, is_permanent=permanent
        )
        assert lens.bare_state is None
        with pytest.raises(qv.QVLensError, match="hooks are in force"):
            lens.plain_model()
        lens.model.reset_hooks()


def test_saved_it_loads_with_transformers_alone(name, backend, tmp_path):
    lens = own_lens(name, backend)
    patch = qv.edit(lens, FACT.to("Quorix"), qv.FT(layer=1, lr=1e-2, steps=3))
    lens.apply(patch)
    edited = lens.next_token_logits(PROMPTS)
    folder = lens.save(tmp_path / "edited")
    hf, tok = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    for row, prompt in zip(edited, PROMPTS, strict=True):
        ids = torch.tensor([tok(prompt)["input_ids"]])
        torch.testing.assert_close(hf.eval()(ids).logits[0, -1], row, atol=1e-4, rtol=0)
    again = qv.load(folder, backend=backend)
    torch.testing.assert_close(again.next_token_logits(PROMPTS), edited, atol=1e-4, rtol=0)


def test_generation_is_greedy(name, backend):
    """Prompts of unequal lengths together, each as Hugging Face gives it alone."""
    lens = lens_of(name, backend)
    rows = [list(prompt.ids) for prompt in lens.tokenize(PROMPTS)]
    assert len({len(row) for row in rows}) > 1
    expected = []
    for ids in rows:
        start = len(ids)
        for _ in range(5):
            ids.append(int(hf_logits_of(lens, ids).argmax()))
        expected.append(lens.tokenizer.decode(ids[start:], skip_special_tokens=True))
    assert lens.generate(PROMPTS, 5) == expected


def hf_logits_of(lens, ids):
    return lens.hf(torch.tensor([ids])).logits[0, -1]


def test_all_weights_in_passing_at_once_equal_all_written(name, backend):
    """What one weight adds is there before the next one reads the stream."""
    lens = own_lens(name, backend)
    rows = [list(lens.tokenize(PROMPTS)[0].ids)]
    generator = torch.Generator().manual_seed(1)
    deltas = {
        (layer, weight): torch.randn(lens.parameter(layer, weight).shape, generator=generator)
        * 0.05
        for layer in (0, 1)
        for weight in sorted(lens.parameter_names)
    }
    passing = lens.logits(rows, delta_hooks(lens, deltas))
    for (layer, weight), delta in deltas.items():
        lens.parameter(layer, weight).add_(delta)
    torch.testing.assert_close(passing, lens.logits(rows), atol=5e-4, rtol=0)
