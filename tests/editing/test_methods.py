"""Every editor: its own algebra against an independent solution, what it may and may not touch, and
its guards."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import qv_lens as qv
from qv_lens.editing.job import Job
from qv_lens.editing.keys import contexts, read, rows_of
from qv_lens.editing.layer_by_layer import ClosedForm, search_ahead
from qv_lens.editing.presets import presets
from qv_lens.editing.solve import (
    eigen,
    inverse_of,
    null_space,
    null_space_metric,
    prune,
    rect,
    solve,
)
from qv_lens.editing.statistics import Statistics, covariance
from qv_lens.errors import EditError
from qv_lens.evaluation.protocols import total
from qv_lens.patch import Delta
from qv_lens.world import cases as world_cases
from qv_lens.world import generator
from tests.attribution.test_gradients import hf_name
from tests.attribution.test_value import FACTS
from tests.editing.test_closed_form import EDITORS, REQUESTS, TEXTS, same, weights
from tests.models import BACKENDS, texts, tiny_hf, tiny_lens

QUICK = {"steps": 4}
EVERY = [
    qv.ROME(layer=1, **QUICK), qv.RROME(layer=1, **QUICK), qv.EMMET(layers=(1,), **QUICK), qv.MEMIT(layers=(0, 1), lam=1.0, **QUICK),
    qv.AlphaEdit(layers=(0, 1), threshold=1.0, L2=0.1, **QUICK), qv.RECT(layers=(0, 1), lam=1.0, **QUICK), qv.PRUNE(layers=(0, 1), lam=1.0, **QUICK),
    qv.PMET(layers=(0, 1), lam=1.0, attention=True, **QUICK), qv.IFMET(layers=(0,), deep_layers=(1, 2), lam=1.0, **QUICK),
    qv.ACE(value_layers=(1,), query_layers=(0,), lam=1.0, **QUICK),
    dataclasses.replace(qv.ACE.paper(), value_layers=(1, 2, 3), query_layers=(0,), lam=1.0, steps=4),
    dataclasses.replace(qv.ACE.official(), value_layers=(1,), query_layers=(0,), lam=1.0, steps=4),
    qv.FT(layer=1, lr=1e-2, **QUICK), qv.FTL(layer=1, lr=1e-2, clamp=1e-3, **QUICK), qv.KNE(lr=1e-2, steps_ig=2, share=0.1, **QUICK),
    qv.KNE(lr=1e-2, steps_ig=2, share=0.1, axis="row", together=True, **QUICK), qv.LoRA(**QUICK), qv.AdaLoRA(lr=1e-2, steps=6),
    qv.CTP(epochs=2, top=5, lr=1e-3), qv.CTP(epochs=2, top=5, lr=1e-3, stream=True, adam="separate", paths="k_best"), qv.KN(steps=3),
    qv.SPHERE(layers=(0, 1), threshold=1.0, L2=0.1, **QUICK), qv.BetaEdit(layers=(0, 1), threshold=1.0, L2=0.1, lam=1.0, **QUICK),
    qv.ENCORE(layers=(0, 1), lam=1.0, norm=0.1, hits=2, **QUICK),
    qv.LocFT(layer=1, lr=1e-2, epochs=4), qv.UltraEdit(layers=(0, 1), lr=1e-3), qv.NSE(layers=(0, 1), lam=1.0, near=0.0, far=1e9, **QUICK),
    qv.SimIE(editor=qv.MEMIT(layers=(0, 1), lam=1.0, **QUICK), lam=1.0),
]  # fmt: skip


def named(editor):
    return f"{type(editor).__name__}-{EVERY.index(editor)}"


@pytest.mark.parametrize(("kind", "backend"), [("gptj", "hooked"), ("qwen3-gqa", "bridge")])
@pytest.mark.parametrize("editor", EVERY, ids=named)
@pytest.mark.filterwarnings("ignore:Value layers")
def test_every_editor_leaves_the_lens_alone_and_its_patch_comes_back(
    kind, backend, editor, tmp_path
):
    lens = tiny_lens(kind, backend, torch.float32)
    statistics = covariance(lens, TEXTS, range(3), modules=("ffn", "attn"))
    state = {key: value.clone() for key, value in lens.checkpoint.state.items()}
    before = lens.logprob([r.target for r in REQUESTS])
    patch = qv.edit(lens, REQUESTS, editor, statistics=statistics)
    assert all(torch.equal(value, state[key]) for key, value in lens.checkpoint.state.items())
    assert patch.deltas
    again = qv.Patch.load(patch.save(tmp_path / "patch"))
    assert again.info == patch.info
    with lens.patched(again):
        after = lens.logprob([r.target for r in REQUESTS])
    assert all(torch.equal(value, state[key]) for key, value in lens.checkpoint.state.items())
    assert after != before
    if not isinstance(editor, (qv.KN, qv.PRUNE)):
        assert sum(after) > sum(before)
    assert type(editor).__name__ in patch._repr_html_()
    assert patch.frame()["relative_norm"].notna().all()


def test_rome_is_its_own_formula():
    """dW = u (v* - vc)^T / (kc . u), u = C0^-1 kbar, kbar over all contexts: by an explicit
    inverse."""
    lens = tiny_lens("gptj")
    statistics, editor = covariance(lens, TEXTS, [1]), qv.ROME(layer=1, steps=3)
    templates = contexts(lens, 0, "rome")
    assert len(templates) == 21
    patch = qv.edit(lens, REQUESTS[0], editor, statistics=statistics, templates=templates)
    backend, keys, values = lens.backend_adapter, [], []
    for template in templates:
        fact = REQUESTS[0].fact.with_prompt(template.replace("{}", REQUESTS[0].fact.prompt))
        trace = lens.trace(fact, "subject_last")
        keys.append(trace.m[1, 0])
        values.append(trace.ffn[1, 0])
    assert backend.n_layers == 3
    u = torch.linalg.inv(statistics.C0[1]) @ torch.stack(keys).mean(0)
    delta = patch.deltas[1, "W_out"].dense()
    # v* - vc, from the delta itself
    right = (keys[0] @ u) * (delta[u.abs().argmax()] / u[u.abs().argmax()])
    torch.testing.assert_close(delta, torch.outer(u, right) / (keys[0] @ u), atol=1e-9, rtol=1e-7)
    with lens.patched(patch):
        now = lens.trace(REQUESTS[0].fact, "subject_last").ffn[1, 0]
    # the bare prompt gets exactly v*
    torch.testing.assert_close(now - values[0], right, atol=1e-9, rtol=1e-7)
    single = qv.edit(
        lens, REQUESTS[0], qv.RROME(layer=1, steps=3), statistics=statistics, templates=("{}",)
    )
    both = qv.edit(lens, REQUESTS[0], editor, statistics=statistics, templates=("{}",))
    # one context: the same
    torch.testing.assert_close(single.deltas[1, "W_out"].dense(), both.deltas[1, "W_out"].dense())


def test_alphaedit_solves_the_published_system_and_spares_what_c0_knows():
    """(P (K K^T + Kp Kp^T) + L2 I) dW = P K R^T, by LU; and dW^T k = 0 for keys outside the null
    space."""
    g = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(20, 20, generator=g, dtype=torch.float64)).Q
    known = basis[:, :8] @ torch.randn(8, 50, generator=g, dtype=torch.float64)
    C0, L2 = known @ known.T / 50, 0.7
    U0 = null_space(eigen(C0), 1e-9)
    assert U0.shape == (20, 12)
    P = U0 @ U0.T
    for earlier in (0, 4, 30):
        K, Kp, R = (
            torch.randn(*shape, generator=g, dtype=torch.float64)
            for shape in ((20, 3), (20, earlier), (6, 3))
        )
        direct = torch.linalg.solve(
            P @ (K @ K.T + Kp @ Kp.T) + L2 * torch.eye(20, dtype=torch.float64), P @ K @ R.T
        )
        for seen in (Delta(Kp, Kp.T), Delta(Kp @ Kp.T), None)[: 3 if earlier == 0 else 2]:
            ours = solve(null_space_metric(U0, seen, L2), K, R, 1.0).dense()
            torch.testing.assert_close(ours, direct, atol=1e-10, rtol=1e-8)
            assert (ours.T @ known).abs().max() < 1e-10


def test_emmet_writes_its_values_exactly():
    g = torch.Generator().manual_seed(0)
    A, K, R = (
        torch.randn(*shape, generator=g, dtype=torch.float64)
        for shape in ((20, 60), (20, 3), (6, 3))
    )
    delta = solve(inverse_of(A @ A.T), K, R, 0.0).dense()
    torch.testing.assert_close(delta.T @ K, R, atol=1e-9, rtol=1e-9)


def test_trims():
    g = torch.Generator().manual_seed(0)
    W, delta = (
        torch.randn(9, 7, generator=g, dtype=torch.float64),
        torch.randn(9, 7, generator=g, dtype=torch.float64) * 3,
    )
    kept = rect(W, delta, 0.4)
    change = (delta / (W + 1e-8)).abs()
    # the release keeps what is at least the 37th smallest (0.6 of 63), that one too
    assert (kept != 0).sum() == (change >= change.flatten().kthvalue(37).values).sum() == 27
    assert change[kept != 0].min() >= change[kept == 0].max()
    s0, limit = torch.linalg.svdvals(delta), torch.linalg.svdvals(W)[0]
    expected = torch.tensor(
        [v if v <= limit else v.log() - limit.log() + limit for v in s0], dtype=torch.float64
    )
    torch.testing.assert_close(
        torch.linalg.svdvals(prune(W, delta)), expected.sort(descending=True).values
    )


@pytest.mark.parametrize("kind", ["gptj", "qwen3-gqa"])
def test_methods_touch_only_what_they_may(kind):
    lens = tiny_lens(kind, dtype=torch.float32)
    limited = qv.edit(lens, REQUESTS[0], qv.FTL(layer=1, lr=1.0, steps=5, clamp=1e-3))
    assert all(delta.dense().abs().max() <= 1.000001e-3 for delta in limited.deltas.values())
    for located, requests in ((None, REQUESTS), (1, REQUESTS[0])):
        ensemble = qv.edit(
            lens, REQUESTS, qv.KNE(lr=1e-2, steps=3, share=0.05, steps_ig=2, located=located)
        )
        found = qv.neuron_ensemble(lens, requests, 0.05, steps=2).by_layer()
        assert {layer for layer, _ in ensemble.deltas} == set(found)
        for (layer, _), delta in ensemble.deltas.items():
            assert delta.dense().abs().sum(0).nonzero()[:, 0].tolist() == sorted(found[layer])
    with pytest.raises(EditError, match="located of KNE must be"):
        qv.edit(lens, REQUESTS, qv.KNE(located=0))
    knowledge = qv.edit(lens, REQUESTS[0], qv.KN(steps=3))
    for (layer, _), delta in knowledge.deltas.items():
        assert (
            delta.dense().abs().sum(1).nonzero()[:, 0].tolist()
            == knowledge.info["neurons"][str(layer)]
        )
    paths = qv.edit(lens, REQUESTS, qv.CTP(epochs=1, top=4, bottom=2, lr=1e-3, train_b_out=False))
    marked = qv.transmission_paths(lens, REQUESTS, 4, 2)
    for (layer, name), delta in paths.deltas.items():
        nodes = marked[(marked["layer"] == layer) & (marked["path"] != "")]
        if name == "W_out":
            rows = delta.dense().abs().sum(1).nonzero()[:, 0].tolist()
            of_kind = nodes[nodes["kind"] == "value"]
            assert (
                set(of_kind[of_kind["path"] == "T+"]["neuron"])
                <= set(rows)
                <= set(of_kind["neuron"])
            )
        if name == "W_in":
            columns = delta.dense().abs().sum(0).nonzero()[:, 0].tolist()
            of_kind = nodes[nodes["kind"] == "key"]
            assert (
                set(of_kind[of_kind["path"] == "T+"]["neuron"])
                <= set(columns)
                <= set(of_kind["neuron"])
            )
    assert {name for _, name in paths.deltas} >= {"W_in", "W_out"}


@pytest.mark.parametrize("kind", ["gptj", "qwen3-gqa"])
def test_ctp_equals_a_dense_masked_adam(kind, true_float64):
    """Two mini-batches by hand on Hugging Face's parameters: the A step on T+, the B step on T-,
    one shared torch Adam."""
    lens = tiny_lens(kind)
    editor = qv.CTP(epochs=1, top=4, bottom=2, lr=1e-3, batch_size=1, train_b_out=False)
    patch = qv.edit(lens, REQUESTS, editor)
    marked = qv.transmission_paths(lens, REQUESTS, 4, 2)
    names = {
        (layer, name): hf_name(kind, layer, name)
        for layer in range(3)
        for name in ("W_in", "W_out")
    }
    parameters = dict(lens.hf.named_parameters())
    leaves = {
        key: parameters[name].detach().clone().requires_grad_(True) for key, name in names.items()
    }
    biases = (
        {(layer, "b_in"): f"transformer.h.{layer}.mlp.fc_in.bias" for layer in range(3)}
        if kind == "gptj"
        else {}
    )
    leaves |= {
        key: parameters[name].detach().clone().requires_grad_(True) for key, name in biases.items()
    }
    names |= biases

    def mask(key, sign):
        layer, name = key
        rows = marked[
            (marked["layer"] == layer)
            & (marked["path"] == sign)
            & (marked["kind"] == ("value" if name == "W_out" else "key"))
        ]
        out = torch.zeros_like(leaves[key])  # stored: W_in [d_mlp, d_model], W_out [d_model, d_mlp]
        index = torch.tensor(rows["neuron"].to_numpy())
        if name == "W_out":
            out[:, index] = 1
        else:
            out[index] = 1
        return out

    adam = torch.optim.Adam(list(leaves.values()), lr=1e-3)
    prompts = lens.tokenize([r.target for r in REQUESTS])
    ids = [torch.tensor([[*p.ids, *p.answer[:-1]]]) for p in prompts]
    where = [slice(p.last, p.last + len(p.answer)) for p in prompts]
    said = [lens.hf(i).logits[0, w].argmax(-1) for i, w in zip(ids, where, strict=True)]
    import random

    for b in random.Random(0).sample(range(2), 2):
        for sign, labels, factor in (
            ("T+", torch.tensor(prompts[b].answer), 1.0),
            ("T-", said[b], 0.1),
        ):
            adam.zero_grad(set_to_none=False)
            logits = torch.func.functional_call(
                lens.hf, {names[k]: leaf for k, leaf in leaves.items()}, (ids[b],)
            ).logits
            (factor * torch.nn.functional.cross_entropy(logits[0, where[b]], labels)).backward()
            for key, leaf in leaves.items():
                leaf.grad.mul_(mask(key, sign))
            adam.step()
    for key, leaf in leaves.items():
        moved = leaf.detach() - parameters[names[key]]
        expected = moved.T if moved.ndim > 1 else moved
        got = patch.deltas[key].dense() if key in patch.deltas else torch.zeros_like(expected)
        torch.testing.assert_close(got, expected, atol=1e-9, rtol=1e-5)


def test_adalora_is_pefts():
    """PEFT's own adapters, forward pass, regularisation and pruning on the Hugging Face model, from
    the same start."""
    peft = pytest.importorskip("peft", reason="PEFT is not installed (extra lora)")
    lens = tiny_lens("gptj", dtype=torch.float32)
    editor = qv.AdaLoRA(
        layers=(0, 1), parameters=("W_out",), rank=2, init_rank=4, dropout=0.0, steps=8, lr=1e-2
    )
    config = peft.AdaLoraConfig(
        target_r=2, init_r=4, total_step=8, lora_alpha=32, lora_dropout=0.0, task_type="CAUSAL_LM",
        target_modules=["transformer.h.0.mlp.fc_out", "transformer.h.1.mlp.fc_out"],
    )  # fmt: skip
    model = peft.get_peft_model(tiny_hf("gptj", torch.float32), config)
    generator = torch.Generator().manual_seed(0)
    for layer in (0, 1):
        module = model.base_model.model.transformer.h[layer].mlp.fc_out
        for factor in (module.lora_A["default"], module.lora_B["default"]):
            factor.data = 0.02 * torch.randn(factor.shape, generator=generator)
    (prompt,) = lens.tokenize([REQUESTS[0].target])
    ids = torch.tensor([[*prompt.ids, *prompt.answer]])
    labels = torch.where(torch.arange(ids.shape[1]) < len(prompt.ids), -100, ids)
    adam = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(1, 9):
        adam.zero_grad()
        model(ids, labels=labels).loss.backward()
        adam.step()
        model.base_model.update_and_allocate(step)
    patch = qv.edit(lens, REQUESTS[0], editor)
    for layer in (0, 1):
        module = model.base_model.model.transformer.h[layer].mlp.fc_out
        theirs, ours = (
            module.get_delta_weight("default").T.detach().double(),
            patch.deltas[layer, "W_out"].dense(),
        )
        assert (ours - theirs).norm() <= 1e-4 * theirs.norm()
        assert 0 < patch.info["ranks"][f"{layer}.W_out"] <= 4
    assert sum(patch.info["ranks"].values()) == 4  # rank 2 on average
    with pytest.raises(qv.QVLensError, match="init_rank"):
        qv.edit(lens, REQUESTS[0], dataclasses.replace(editor, init_rank=2))
    least = qv.edit(lens, REQUESTS[0], dataclasses.replace(editor, rank=1, init_rank=2, steps=2))
    assert set(least.info["ranks"]) == {"0.W_out", "1.W_out"}
    for wrong in ({"rank": 4}, {"steps": 1}, {"stop": 0.1}):
        with pytest.raises(qv.QVLensError, match="init_rank"):
            qv.edit(lens, REQUESTS[0], dataclasses.replace(editor, **wrong))


def test_ace_reads_what_it_says():
    """Two passes, value layers first at the last token; the official form writes attention too, on
    one flat list."""
    lens = tiny_lens("gptj", dtype=torch.float32)
    statistics = covariance(lens, TEXTS, range(3), modules=("ffn", "attn"))
    official = qv.edit(
        lens,
        REQUESTS[0],
        dataclasses.replace(
            qv.ACE.official(), value_layers=(1,), query_layers=(0,), lam=1.0, steps=3
        ),
        statistics=statistics,
    )
    assert set(official.deltas) == {(layer, name) for layer in (0, 1) for name in ("W_O", "W_out")}
    with pytest.warns(UserWarning, match="do not exist"):
        paper = qv.edit(
            lens,
            REQUESTS[0],
            dataclasses.replace(
                qv.ACE.paper(), value_layers=(2, 9), query_layers=(0,), lam=1.0, steps=3
            ),
            statistics=statistics,
        )
    assert set(paper.deltas) == {(0, "W_out"), (2, "W_out")}
    assert len(paper.info["losses"]) == 2  # one search per pass
    via = FACTS[0].to(
        "Quorix", via=["The employer of Olga Pelodan is", "Olga Pelodan gets her pay from"]
    )
    other = qv.edit(
        lens,
        via,
        dataclasses.replace(qv.ACE.paper(), value_layers=(2,), query_layers=(0,), lam=1.0, steps=3),
        statistics=statistics,
    )
    assert not torch.equal(other.deltas[2, "W_out"].dense(), paper.deltas[2, "W_out"].dense())
    rows = rows_of(lens, [via], ("{}",), "last", "via")
    assert len(rows.ids) == 2
    with pytest.raises(qv.QVLensError, match="last token"):
        rows_of(lens, [via], ("{}",), "subject_last", "via")
    with pytest.raises(qv.QVLensError, match="passes='two'"):
        qv.edit(
            lens,
            via,
            qv.ACE(value_layers=(1,), query_layers=(0,), value_prompts="via"),
            statistics=statistics,
        )


def test_batches_are_edited_one_after_another():
    """Two batches of one: the second one's z* is searched on the weights that the first one
    left."""
    lens = tiny_lens("qwen3-gqa", dtype=torch.float32)
    statistics, editor, templates = (
        covariance(lens, TEXTS, range(3)),
        qv.MEMIT(layers=(0, 1), lam=1.0, steps=4),
        contexts(lens),
    )
    together = qv.edit(
        lens, REQUESTS, editor, statistics=statistics, templates=templates, batch_size=1
    )
    first = qv.edit(lens, REQUESTS[0], editor, statistics=statistics, templates=templates)
    with lens.patched(first):
        second = qv.edit(lens, REQUESTS[1], editor, statistics=statistics, templates=templates)
    for layer in (0, 1):
        sums = first.deltas[layer, "W_out"].dense() + second.deltas[layer, "W_out"].dense()
        torch.testing.assert_close(
            together.deltas[layer, "W_out"].dense(), sums, atol=1e-6, rtol=1e-4
        )
    alpha = qv.AlphaEdit(layers=(0, 1), threshold=1.0, L2=0.1, steps=4)
    apart = qv.edit(lens, REQUESTS, alpha, statistics=statistics, templates=templates, batch_size=1)
    joint = qv.edit(lens, REQUESTS, alpha, statistics=statistics, templates=templates)
    assert not torch.allclose(apart.deltas[0, "W_out"].dense(), joint.deltas[0, "W_out"].dense())


def test_r_rome_is_symmetrical():
    """With several contexts: the mean key is answered by the mean value moved by delta, and by
    nothing else."""
    lens = tiny_lens("gptj", dtype=torch.float64)
    templates = ("{}", "It is known. {}", "Some say. {}")
    rows = rows_of(lens, REQUESTS[:1], templates, "subject_last")
    key, out = (lens.backend_adapter.coefficient(1), lens.backend_adapter.mlp_out(1))
    k, v = (read(lens, rows, (site,))[site].mean(0) for site in (key, out))
    # delta = 0
    still = qv.edit(
        lens, REQUESTS[0], qv.RROME(layer=1, steps=1, mom2_adjustment=False), templates=templates
    )
    assert still.deltas[1, "W_out"].norm() < 1e-10
    patch = qv.edit(
        lens,
        REQUESTS[0],
        qv.RROME(layer=1, steps=8, clamp=0.5, mom2_adjustment=False),
        templates=templates,
    )
    moved = k @ patch.deltas[1, "W_out"].dense()
    # delta, within its clamp of the mean value's norm
    assert 1e-3 < float(moved.norm()) <= 0.5 * float(v.norm()) + 1e-9


@pytest.mark.parametrize("dense", [False, True])
def test_edits_in_a_row_know_of_those_before(tmp_path, dense):
    """AlphaEdit's keys and PRUNE's whole delta go with the patch, also through a file and as a sum:
    three edits, each applied before the next, are three batches of one; PRUNE's are MEMIT's in a
    row, restrained once against the first weight."""
    lens = tiny_lens("gptj", dtype=torch.float64)
    statistics, templates = covariance(lens, TEXTS, range(2)), ("{}",)
    requests, options = (
        [*REQUESTS, qv.Fact("{} works for", "Ada Quist", "Nortek").to("Paris")],
        {"statistics": statistics, "templates": templates},
    )
    memit = {"layers": (0, 1), "lam": 1e-4, "steps": 12, "lr": 2.0, "clamp": 60.0}
    for editor in (qv.AlphaEdit(layers=(0, 1), threshold=1.0, L2=0.1, steps=6), qv.PRUNE(**memit)):
        first, last = qv.edit(lens, requests[0], editor, **options), None
        first.save(tmp_path / type(editor).__name__)
        lens.apply(total([qv.Patch.load(tmp_path / type(editor).__name__)]))
        for request in requests[1:]:
            last = qv.edit(lens, request, editor, **options)
            if dense:  # one patch in force, as consecutive evaluation has it
                last = total([lens.revert(), last])
            lens.apply(last)
        now = {layer: lens.w_out(layer).clone() for layer in (0, 1)}
        while lens.patches:
            lens.revert()
        whole = qv.edit(lens, requests, editor, batch_size=1, **options)
        for layer, weight in now.items():
            torch.testing.assert_close(
                weight - lens.w_out(layer),
                whole.deltas[layer, "W_out"].dense(),
                atol=1e-8,
                rtol=1e-6,
            )
    sums = qv.edit(lens, requests, qv.MEMIT(**memit), batch_size=1, **options)
    for layer, weight in now.items():
        W0, D = lens.w_out(layer), sums.deltas[layer, "W_out"].dense()
        U, s, V = torch.linalg.svd(D)
        limit = torch.linalg.svdvals(W0)[0]
        assert s[0] > limit  # there is something to restrain
        s = torch.where(s > limit, (s / limit).log() + limit, s)
        torch.testing.assert_close(
            weight, W0 + U[:, : len(s)] @ torch.diag(s) @ V[: len(s)], atol=1e-8, rtol=1e-6
        )


def test_prune_after_prune_takes_no_target_that_other_weights_gave():
    """The second edit is made on the first one's whole delta: z* searched on the restrained weights
    would be others."""
    lens = tiny_lens("gptj", dtype=torch.float64)
    editor = qv.PRUNE(layers=(0, 1), lam=1e-4, steps=12, lr=2.0, clamp=60.0)
    options = {"statistics": covariance(lens, TEXTS, range(2)), "templates": ("{}",)}
    with lens.patched(qv.edit(lens, REQUESTS[0], editor, **options)):
        ahead = search_ahead(lens, REQUESTS[1:], editor, templates=("{}",))
        alone = qv.edit(lens, REQUESTS[1], editor, **options)
        served = qv.edit(lens, REQUESTS[1], editor, ahead=ahead, **options)
    for key, delta in alone.deltas.items():
        assert (served.deltas[key].dense() - delta.dense()).norm() <= 1e-8 * delta.norm()


@pytest.mark.parametrize(
    ("editor", "size"),
    [(qv.MEMIT(layers=(0,), lam=1.0, steps=3), 1), (qv.ROME(layer=0, steps=3), None)],
)
def test_two_answers_of_one_prompt_may_be_edited_one_after_the_other(editor, size):
    """As a stream of edits may ask; the sum is that of two calls."""
    lens = tiny_lens("gptj")
    options = {"statistics": covariance(lens, TEXTS, range(2)), "templates": ("{}",)}
    requests = [FACTS[0].to("Quorix"), FACTS[0].to("Dalrin")]
    together = qv.edit(lens, requests, editor, batch_size=size, **options)
    first = qv.edit(lens, requests[0], editor, **options)
    with lens.patched(first):
        second = qv.edit(lens, requests[1], editor, **options)
    for key, delta in together.deltas.items():
        parts = first.deltas[key].dense() + second.deltas[key].dense()
        torch.testing.assert_close(delta.dense(), parts, atol=1e-9, rtol=1e-6)


def test_bad_requests_and_failures_leave_the_weights(monkeypatch):
    lens = tiny_lens("gptj", dtype=torch.float32)
    statistics, before = covariance(lens, TEXTS, range(3)), weights(lens)
    editor = qv.MEMIT(layers=(0, 1), lam=1.0, steps=3)
    for requests, says in (
        ([FACTS[0].to("Nortek")], "nothing to edit"),
        ([FACTS[0].to("Quorix"), FACTS[0].to("Dalrin")], "conflict"),
        ([], "No edit was requested"),
    ):
        with pytest.raises(qv.QVLensError, match=says):
            qv.edit(lens, requests, editor, statistics=statistics)
    with pytest.raises(qv.QVLensError, match="needs C0"):
        qv.edit(lens, REQUESTS[0], editor)
    with pytest.raises(qv.QVLensError, match="attention"):
        qv.edit(
            lens,
            REQUESTS[0],
            qv.PMET(layers=(0, 1), attention=True, steps=2),
            statistics=statistics,
        )
    with pytest.raises(qv.QVLensError, match="not finite"):
        qv.edit(lens, REQUESTS[0], qv.FT(layer=1, lr=1e37, steps=3))
    nan = Statistics({0: torch.eye(lens.d_mlp), 1: torch.eye(lens.d_mlp)}, 1, "", lens.fingerprint)
    monkeypatch.setattr(
        "qv_lens.editing.layer_by_layer.solve",
        lambda *a: Delta(torch.full((lens.d_mlp, 1), float("nan")), torch.ones(1, lens.d_model)),
    )
    with pytest.raises(qv.QVLensError, match="not finite"):
        qv.edit(lens, REQUESTS[0], editor, statistics=nan)
    assert same(lens, before)


def test_partial_passes_equal_whole_ones():
    for kind in ("gptj", "qwen3-gqa"):
        for backend in BACKENDS:
            lens, rows = tiny_lens(kind, backend), [[5, 6, 7, 8, 9], [3, 4, 5]]
            stream, whole = lens.stream(rows, 1), lens.logits(rows)
            torch.testing.assert_close(
                lens.logits(rows, start=(1, stream)), whole, atol=1e-12, rtol=0
            )
            torch.testing.assert_close(
                lens.stream(rows, 3, start=(1, stream)), lens.stream(rows, 3), atol=1e-12, rtol=0
            )


def test_passes_over_the_last_tokens_alone_equal_whole_ones():
    """Keys and values kept of the tokens in front, for rows that are cut at different places."""
    for kind in ("gptj", "qwen3-gqa"):
        lens, rows = tiny_lens(kind), [[5, 6, 7, 8, 9], [3, 4, 5], [9, 8, 7, 6]]
        whole, stream, first = lens.stream(rows, 3), lens.stream(rows, 1), torch.tensor([3, 0, 2])
        past = lens.past((1, stream), first)
        if lens.backend == "bridge":
            assert past is None
            continue
        tails = [row[at:] for row, at in zip(rows, first.tolist(), strict=True)]
        start = torch.stack(
            [
                torch.nn.functional.pad(s[at : at + 3], (0, 0, 0, 3 - len(s[at : at + 3])))
                for s, at in zip(stream, first, strict=True)
            ]
        )
        seen = []
        got = lens.stream(
            tails,
            3,
            [("blocks.2.hook_mlp_out", lambda x, seen=seen: seen.append(x))],
            (1, start),
            past,
        )
        assert seen[0].shape == got.shape == (3, 3, lens.d_model)
        for row, at, tail in zip(range(3), first.tolist(), tails, strict=True):
            torch.testing.assert_close(
                got[row, : len(tail)], whole[row, at : at + len(tail)], atol=1e-12, rtol=0
            )
        with lens.intervene(qv.Zero(qv.value_neurons(lens, FACTS[0]).top(3))):
            assert lens.past((1, stream), first) is None


def test_several_facts_of_one_case_are_edited_each_for_itself():
    """One after another on the weights as written so far: the second is what it is on a model with
    the first written."""
    lens = tiny_lens("gptj", dtype=torch.float32)
    statistics, editor = covariance(lens, TEXTS, range(2)), EDITORS[2]
    same_subject = [
        FACTS[0].to("Quorix"),
        qv.Fact("{} was born in", FACTS[0].subject, "Norway").to("Paris"),
    ]
    both = qv.edit(lens, same_subject, editor, statistics=statistics, templates=("{}",))
    first = qv.edit(lens, same_subject[0], editor, statistics=statistics, templates=("{}",))
    state = weights(lens)
    with lens.patched(first):
        written = tiny_lens("gptj", dtype=torch.float32)
        for key, value in written.checkpoint.state.items():
            value.data.copy_(lens.checkpoint.state[key])
    moved = dataclasses.replace(statistics, fingerprint=written.fingerprint)
    second = qv.edit(written, same_subject[1], editor, statistics=moved, templates=("{}",))
    for key, delta in both.deltas.items():
        torch.testing.assert_close(
            delta.dense(),
            first.deltas[key].dense() + second.deltas[key].dense(),
            atol=1e-5,
            rtol=1e-3,
        )
    assert len(both.info["losses"]) == 2
    with lens.patched(both):
        assert not same(lens, state)
    assert same(lens, state)  # all facts of the case are taken back, not the last alone


@pytest.mark.parametrize(
    "editor", [editor for editor in EVERY if isinstance(editor, ClosedForm)], ids=named
)
@pytest.mark.filterwarnings("ignore:Value layers")
def test_targets_searched_ahead_are_those_of_each_edit_alone(editor):
    lens = tiny_lens("gptj")
    options = {
        "templates": ("{}", "A city. {}"),
        "statistics": covariance(lens, TEXTS, range(3), modules=("ffn", "attn")),
    }
    ahead = search_ahead(lens, REQUESTS, editor, templates=options["templates"])
    for request in REQUESTS:
        alone, served = (
            qv.edit(lens, request, editor, **options),
            qv.edit(lens, request, editor, ahead=ahead, **options),
        )
        for key, delta in alone.deltas.items():
            assert (served.deltas[key].dense() - delta.dense()).norm() <= 1e-8 * delta.norm()
    other = FACTS[1].to("Quorix")
    with pytest.raises(qv.QVLensError, match="No target was searched"):
        qv.edit(lens, other, editor, ahead=ahead, **options)
    with pytest.raises(qv.QVLensError, match="another editor"):
        qv.edit(lens, REQUESTS[0], dataclasses.replace(editor, lr=0.1), ahead=ahead, **options)
    with pytest.raises(qv.QVLensError, match="other contexts"):
        qv.edit(lens, REQUESTS[0], editor, ahead=ahead, **{**options, "templates": ("{}",)})
    with lens.patched(alone), pytest.raises(qv.QVLensError, match="other weights"):
        qv.edit(lens, REQUESTS[0], editor, ahead=ahead, **options)


def test_kept_targets_of_several_searches_serve_one_edit(tmp_path):
    """Searched one by one into a folder, each with its own early stop, then edited together."""
    lens = qv.load("toy-gptj")
    editor = presets("toy-gptj")["MEMIT"].editor
    requests = [case.request for case in world_cases.edit_cases(generator.build(0), 3, 5)]
    options = {"templates": ("{}",), "statistics": covariance(lens, texts(200), editor.layers)}
    counts = set()
    for request in requests:
        one = search_ahead(lens, [request], editor, templates=("{}",), folder=tmp_path)
        counts.add(len(one.found[request].losses))
    assert len(counts) > 1  # else the test says nothing
    ahead = search_ahead(lens, requests, editor, templates=("{}",), folder=tmp_path)
    kept, anew = (
        qv.edit(lens, requests, editor, ahead=ahead, **options),
        qv.edit(lens, requests, editor, **options),
    )
    for key, delta in anew.deltas.items():
        assert (
            kept.deltas[key].dense() - delta.dense()
        ).norm() <= 0.02 * delta.norm()  # float32, searched apart and together


def test_what_an_editor_reads_of_c0_is_what_it_writes():
    lens = tiny_lens("gptj", n_layers=4)
    assert qv.MEMIT(layers=(2, 0)).written(lens) == ((0, 2), ("ffn",))
    assert qv.ACE(value_layers=(2,), query_layers=(1,), attention=True).written(lens) == (
        (1, 2),
        ("ffn", "attn"),
    )
    assert qv.IFMET(layers=(0,), deep_layers=(2,)).written(lens) == ((0, 2), ("ffn",))


def test_requests_leave_nothing_behind_for_the_next_one():
    """Groups, caches and targets of one request do not reach another: same call, same bits."""
    lens = tiny_lens("qwen3-gqa", dtype=torch.float32)
    statistics, editor = covariance(lens, TEXTS, range(2)), EDITORS[2]
    alone = qv.edit(lens, REQUESTS[1], editor, statistics=statistics)
    qv.edit(lens, REQUESTS[0], editor, statistics=statistics)
    again = qv.edit(lens, REQUESTS[1], editor, statistics=statistics)
    assert all(
        torch.equal(alone.deltas[key].dense(), again.deltas[key].dense()) for key in alone.deltas
    )
    assert (editor.query_layers, editor.value_layers) == ((0,), (1,))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["gptj", "qwen3-gqa"])
def test_sites_hand_over_bare_tensors(kind, backend):
    """Blocks of other libraries return a tuple or a bare tensor; what is hooked here is a tensor,
    and writing it counts."""
    lens, adapter = tiny_lens(kind, backend), tiny_lens(kind, backend).backend_adapter
    clean = lens.logits([[5, 6, 7]])
    for site in (
        adapter.mlp_out(1),
        adapter.attn_out(1),
        adapter.resid_post(1),
        adapter.coefficient(1),
        adapter.z(1),
    ):
        seen = []
        moved = lens.logits(
            [[5, 6, 7]], [(site, lambda x, seen=seen: seen.append(type(x)) or 1.5 * x)]
        )
        assert seen == [torch.Tensor]
        assert not torch.allclose(moved, clean)


def test_collapse_shows_in_the_entropy_of_held_out_text():
    lens, texts = qv.load("toy-gptj"), TEXTS[:8]
    request = qv.Fact("{} works for", "Olga Pelodan", "Quorix").to("Norway")
    rows = [lens.tokenizer(text)["input_ids"] for text in texts]
    by_hand = [
        torch.distributions.Categorical(
            logits=lens.hf(torch.tensor([row])).logits[0].double()
        ).entropy()
        for row in rows
    ]
    with pytest.warns(UserWarning, match="on held-out text went from"):
        patch = qv.edit(lens, request, qv.FT(layer=2, lr=1.0, steps=5, stop=0.0), held_out=texts)
    assert patch.info["entropy"][0] == pytest.approx(float(torch.cat(by_hand).mean()), rel=1e-4)
    gentle = qv.edit(lens, request, qv.FT(layer=2, lr=1e-5, steps=1), held_out=texts)
    assert gentle.info["entropy"][1] == pytest.approx(gentle.info["entropy"][0], rel=1e-2)


def test_jobs_split_requests():
    job = Job(tiny_lens("gptj"), REQUESTS * 2, None, None, ("{}",), 0)
    assert [len(b) for b in job.batches(None)] == [4]
    assert [len(b) for b in job.batches(3)] == [3, 1]
    assert [len(b) for b in dataclasses.replace(job, batch_size=2).batches(1)] == [2, 2]
