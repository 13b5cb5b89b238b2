"""Every closed form through its class, against the same method written out on Hugging Face alone
(`by_hand`), in float64."""

from __future__ import annotations

import itertools
from dataclasses import replace
from math import sqrt

import pytest
import torch

import qv_lens as qv
from qv_lens.editing import targets
from qv_lens.editing.statistics import covariance
from qv_lens.errors import EditError
from tests.editing.by_hand import ATTENTION, BLOCK, FFN, Hand, Settings, ridge
from tests.editing.test_closed_form import TEXTS
from tests.models import tiny_hf, tiny_lens, tokenizer

pytestmark = pytest.mark.usefixtures("true_float64")
N_LAYERS = 5
TEMPLATES = ("{}", "It is known. {}", "Some people say. {}")
ONE = qv.Fact("{} works for", "Olga Pelodan", "Nortek").to("Quorix")
TWO = qv.Fact("The capital of {} is", "Norway", "Oslo").to("Paris")
VIA = replace(
    ONE,
    via=(
        "The employer of Olga Pelodan is",
        "Olga Pelodan gets her pay each month from",
        "The firm of Olga Pelodan is",
    ),
)
#: strong enough that clamps bind and searches stop
SEARCH = {"steps": 7, "lr": 0.8, "weight_decay": 0.3, "clamp": 0.6, "kl": 0.4}


def settings(editor, **changes) -> Settings:
    return Settings(
        editor.steps, editor.lr, editor.weight_decay, editor.clamp, editor.kl, **changes
    )


@pytest.fixture(scope="module")
def lens():
    return tiny_lens("gptj", "auto", n_layers=N_LAYERS)


@pytest.fixture(scope="module")
def statistics(lens):
    return covariance(lens, TEXTS[:120], range(N_LAYERS), modules=("ffn", "attn"))


@pytest.fixture
def hand():
    return Hand(tiny_hf("gptj", n_layers=N_LAYERS), tokenizer(), TEMPLATES)


def moments(statistics):
    """C0 by Hugging Face module."""
    found = {FFN.format(layer): C0 for layer, C0 in statistics.C0.items()}
    return found | {ATTENTION.format(layer): C0 for layer, C0 in statistics.attention.items()}


def check(lens, hand, patch, tolerance=1e-8):
    """The patch is what was written by hand, weight for weight, and nothing else was written."""
    fresh = Hand(tiny_hf("gptj", n_layers=N_LAYERS), tokenizer(), TEMPLATES)
    for layer in range(N_LAYERS):
        for name, module in (("W_out", FFN), ("W_O", ATTENTION)):
            moved = hand.weight(module.format(layer)) - fresh.weight(module.format(layer))
            ours = (
                patch.deltas[layer, name].dense()
                if (layer, name) in patch.deltas
                else torch.zeros_like(moved)
            )
            assert (moved.norm() > 1e-9) == ((layer, name) in patch.deltas), (layer, name)
            assert (ours - moved).norm() <= tolerance * moved.norm().clamp_min(1e-9), (layer, name)


def edit(lens, requests, editor, statistics=None, **options):
    return qv.edit(lens, requests, editor, statistics=statistics, templates=TEMPLATES, **options)


def same_losses(patch, hand):
    """Every step's L, NLL and KL, fact by fact, up to the step at which the fact was done."""
    ours = [fact for pass_ in patch.info["losses"] for fact in [pass_]]
    theirs = iter(hand.losses)
    for fact in ours:
        for step, row in enumerate(fact):
            if step and row == fact[step - 1]:
                break  # done: repeated while other facts go on
            assert row == pytest.approx(next(theirs), rel=1e-7, abs=1e-10)
    assert next(theirs, None) is None


@pytest.mark.parametrize("identity", [False, True])
@pytest.mark.parametrize("kind", ["ROME", "averaged", "released"])
def test_rome_and_both_readings_of_r_rome(lens, statistics, hand, kind, identity):
    """dW = u (v* - v)^T / (k . u): k the bare key and v the bare value in ROME, both averaged in
    R-ROME."""
    options = {"layer": 1, "mom2_adjustment": not identity, **SEARCH}
    editor = qv.ROME(**options) if kind == "ROME" else qv.RROME(values=kind, **options)
    patch = edit(lens, [ONE, TWO], editor, statistics)
    site, key = FFN.format(1), "<" + FFN.format(1)
    C0 = torch.eye(lens.d_mlp, dtype=torch.float64) if identity else statistics.C0[1]
    for request in (ONE, TWO):  # one after another on the weights as edited so far
        rows = hand.rows(request, "subject_last")
        (v,) = hand.search(
            request, "subject_last", rows, [site], settings(editor, mean=kind == "averaged")
        )
        mean_key = hand.mean(rows, key)
        u = torch.linalg.solve(C0, mean_key)
        k = hand.bare(rows, key) if kind == "ROME" else mean_key
        now = hand.bare(rows, site) if kind == "ROME" else hand.mean(rows, site)
        hand.weight(site).add_(torch.outer(u, v - now) / (k @ u))
    check(lens, hand, patch)
    same_losses(patch, hand)


@pytest.mark.parametrize("requests", [[ONE], [ONE, TWO]], ids=len)
@pytest.mark.parametrize("layers", [(1,), (2, 0)], ids=str)
def test_memit_and_emmet(lens, statistics, hand, requests, layers):
    for editor, system in (
        (qv.MEMIT(layers=layers, lam=3.0, **SEARCH), ridge(moments(statistics), 3.0)),
        (
            qv.EMMET(layers=layers, soften=0.2, **SEARCH),
            constrained(moments(statistics), 0.2 if len(requests) > 1 else 0.0),
        ),
    ):
        hand.hf.load_state_dict(tiny_hf("gptj", n_layers=N_LAYERS).state_dict())
        hand.losses.clear()
        patch = edit(lens, requests, editor, statistics)
        memit(hand, requests, editor, system)
        check(lens, hand, patch, 1e-7)
        same_losses(patch, hand)


def constrained(C0, soften):
    """EMMET: C0^-1 K (K^T C0^-1 K + soften I)^-1 R^T, by explicit inverses."""

    def solve(name, layer, K, R):
        Y = torch.linalg.inv(C0[name]) @ K
        return Y @ torch.linalg.inv(K.T @ Y + soften * torch.eye(K.shape[1], dtype=K.dtype)) @ R.T

    return solve


def memit(hand, requests, editor, solve):
    """One batch: z* in the stream after the last layer, the residual shared out linearly."""
    group = sorted(editor.layers)
    sites = [BLOCK.format(group[-1])]
    rows = [hand.rows(request, editor.fact_token) for request in requests]
    z = [
        hand.search(q, editor.fact_token, r, sites, settings(editor))
        for q, r in zip(requests, rows, strict=True)
    ]
    hand.spread(requests, rows, z, sites, [group], float, solve, editor.fact_token)


@pytest.mark.parametrize("token", ["subject_first", "first_after_last", "last"])
def test_memit_at_other_tokens(lens, statistics, hand, token):
    if token != "last":  # the class's own token, looked up by hand from the tokenizer's offsets
        hand.row = shifted(hand.row, token)
    editor = qv.MEMIT(layers=(1, 2), lam=3.0, fact_token=token, **SEARCH)
    patch = edit(lens, [TWO], editor, statistics)
    memit(hand, [TWO], editor, ridge(moments(statistics), 3.0))
    check(lens, hand, patch, 1e-7)


def shifted(row, token):
    def other(prompt, subject, answer, _token):
        made = row(prompt, subject, answer, "subject_last")
        spans = tokenizer()(prompt.replace("{}", subject), return_offsets_mapping=True)[
            "offset_mapping"
        ]
        start = prompt.index("{}")
        first = next(i for i, (a, b) in enumerate(spans) if a < start + len(subject) and b > start)
        made.lookup = [first] if token == "subject_first" else [made.lookup[0] + 1]
        return made

    return other


def test_batches_are_edited_on_the_weights_before_them(lens, statistics, hand):
    editor = qv.MEMIT(layers=(0, 1), lam=3.0, **SEARCH)
    patch = edit(lens, [ONE, TWO], editor, statistics, batch_size=1)
    for request in (ONE, TWO):
        memit(hand, [request], editor, ridge(moments(statistics), 3.0))
    check(lens, hand, patch, 1e-6)


@pytest.mark.parametrize("size", [None, 1])
def test_rect_trims_each_batch_on_the_weights_as_they_are(lens, statistics, hand, size):
    editor = qv.RECT(layers=(0, 1), lam=3.0, keep=0.3, **SEARCH)
    patch = edit(lens, [ONE, TWO], editor, statistics, batch_size=size)
    for batch in [[ONE, TWO]] if size is None else [[ONE], [TWO]]:
        before = {layer: hand.weight(FFN.format(layer)).clone() for layer in (0, 1)}
        memit(hand, batch, editor, ridge(moments(statistics), 3.0))
        for layer, W in before.items():
            delta = hand.weight(FFN.format(layer)) - W
            change = (delta / (W + 1e-8)).abs()
            least = change.flatten().kthvalue(int(change.numel() * (1 - 0.3))).values
            hand.weight(FFN.format(layer)).copy_(W + torch.where(change >= least, delta, 0.0))
    check(lens, hand, patch, 1e-6)
    kept = float((patch.deltas[0, "W_out"].dense() != 0).double().mean())
    assert kept == pytest.approx(0.3, abs=1e-3) if size is None else 0.3 < kept < 0.6


def test_rect_in_batches_is_rect_in_a_row(lens, statistics):
    editor = qv.RECT(layers=(0, 1), lam=3.0, **SEARCH)
    together = edit(lens, [ONE, TWO], editor, statistics, batch_size=1)
    first = edit(lens, ONE, editor, statistics)
    with lens.patched(first):
        second = edit(lens, TWO, editor, statistics)
    for key, delta in together.deltas.items():
        torch.testing.assert_close(
            delta.dense(),
            first.deltas[key].dense() + second.deltas[key].dense(),
            atol=1e-9,
            rtol=1e-7,
        )


def test_prune_restrains_the_sum_of_all_batches(lens, statistics, hand):
    editor = qv.PRUNE(layers=(0, 1), lam=1e-3, **{**SEARCH, "clamp": 40.0, "lr": 3.0})
    patch = edit(lens, [ONE, TWO], editor, statistics, batch_size=1)
    W0 = {layer: hand.weight(FFN.format(layer)).clone() for layer in (0, 1)}
    for request in (ONE, TWO):
        memit(hand, [request], editor, ridge(moments(statistics), 1e-3))
    for layer, W in W0.items():
        U, s, V = torch.linalg.svd(hand.weight(FFN.format(layer)) - W, full_matrices=False)
        top = torch.linalg.svdvals(W)[0]
        assert s[0] > top
        hand.weight(FFN.format(layer)).copy_(
            W + U @ torch.diag(torch.where(s > top, torch.log(s / top) + top, s)) @ V
        )
    check(lens, hand, patch, 1e-5)


@pytest.mark.parametrize("size", [None, 1])
def test_alphaedit_spares_the_keys_of_batches_before(lens, statistics, hand, size):
    """(P (K K^T + Kp Kp^T) + L2 I) dW = P K R^T by LU; Kp the keys of earlier batches, taken before
    each layer's write."""
    threshold, L2 = (
        float(
            torch.linalg.eigvalsh(statistics.C0[1])[30]
            + torch.linalg.eigvalsh(statistics.C0[1])[31]
        )
        / 2,
        0.2,
    )
    editor = qv.AlphaEdit(layers=(1, 2), threshold=threshold, L2=L2, **SEARCH)
    patch = edit(lens, [ONE, TWO], editor, statistics, batch_size=size)
    P = {}
    for layer in (1, 2):
        values, vectors = torch.linalg.eigh(statistics.C0[layer])
        P[layer] = vectors[:, values < threshold] @ vectors[:, values < threshold].T
    eye = torch.eye(lens.d_mlp, dtype=torch.float64)
    earlier = {layer: torch.zeros_like(eye) for layer in (1, 2)}
    for batch in [[ONE, TWO]] if size is None else [[ONE], [TWO]]:
        new = {}

        def solve(name, layer, K, R, new=new):
            new[layer] = K @ K.T
            return torch.linalg.solve(
                P[layer] @ (K @ K.T + earlier[layer]) + L2 * eye, P[layer] @ K @ R.T
            )

        memit(hand, batch, editor, solve)
        for layer, gram in new.items():
            earlier[layer] = earlier[layer] + gram
    check(lens, hand, patch, 1e-6)
    for layer in (1, 2):
        torch.testing.assert_close(
            patch.kept[layer, "W_out"].dense(), earlier[layer], atol=1e-8, rtol=1e-6
        )
    assert patch.info["rank_of_P"] == {
        str(layer): round(float(P[layer].trace())) for layer in (1, 2)
    }


# ------------------------------------------------------------------ PMET's family


def pmet(hand, requests, editor, solve, groups, token="subject_last", via=False, modules=("ffn",)):
    """One pass: z* at FFN's and attention's outputs of the last layer, shared out by square roots
    within each group."""
    z_layer = max(layer for group in groups for layer in group)
    sites = [FFN.format(z_layer), ATTENTION.format(z_layer)]
    rows = [hand.rows(request, token, via) for request in requests]
    searched = settings(editor, drop=True)
    z = [hand.search(q, token, r, sites, searched) for q, r in zip(requests, rows, strict=True)]
    hand.spread(requests, rows, z, sites, groups, sqrt, solve, token, modules)


@pytest.mark.parametrize("attention", [False, True])
def test_pmet(lens, statistics, hand, attention):
    editor = qv.PMET(layers=(0, 2), lam=3.0, attention=attention, **SEARCH)
    patch = edit(lens, [ONE, TWO], editor, statistics)
    solve = ridge(moments(statistics), 3.0)
    pmet(
        hand,
        [ONE, TWO],
        editor,
        solve,
        [[0, 2]],
        modules=("attn", "ffn") if attention else ("ffn",),
    )
    check(lens, hand, patch, 1e-7)
    same_losses(patch, hand)


#: at the last token, where a random model's answer can be moved at all
STRONG = {"layers": (2, 4), "lam": 3.0, "fact_token": "last", "weight_decay": 1e-3, "clamp": 10.0}


@pytest.mark.parametrize("request_", [ONE, TWO], ids=["one", "two"])
def test_pmets_phi_falls_in_the_step_after_the_answer_is_the_argmax(
    lens, statistics, hand, request_
):
    """And comes back after a step at which it is not."""
    editor = qv.PMET(**STRONG, steps=40, lr=1.0, kl=1.0)
    patch = edit(lens, [request_], editor, statistics)
    pmet(hand, [request_], editor, ridge(moments(statistics), 3.0), [[2, 4]], token="last")
    check(lens, hand, patch, 1e-5)
    same_losses(patch, hand)
    fallen = [total < nll for total, nll, _ in hand.losses]
    assert any(fallen)
    assert any(before and not after for before, after in itertools.pairwise(fallen))


@pytest.mark.parametrize("request_", [ONE, TWO], ids=["one", "two"])
def test_pmet_stops_where_the_answer_is_the_argmax_and_kl_is_small(
    lens, statistics, hand, request_
):
    editor = qv.PMET(**STRONG, steps=40, lr=1.0, kl=1e-3)
    patch = edit(lens, [request_], editor, statistics)
    pmet(hand, [request_], editor, ridge(moments(statistics), 3.0), [[2, 4]], token="last")
    check(lens, hand, patch, 1e-5)
    same_losses(patch, hand)
    assert 1 < len(hand.losses) < editor.steps
    assert hand.losses[-1][0] > 0.05


def test_memit_stops_at_a_small_loss(lens, statistics, hand, monkeypatch):
    """Each fact at its own step. A random model's loss never falls to MEMIT's 0.05, so the test's
    limit is another."""
    monkeypatch.setattr("qv_lens.editing.targets.STOP", 3.0)
    hand.stop = 3.0
    editor = qv.MEMIT(**STRONG, steps=60, lr=1.0, kl=1e-4)
    patch = edit(lens, [ONE, TWO], editor, statistics)
    memit(hand, [ONE, TWO], editor, ridge(moments(statistics), 3.0))
    check(lens, hand, patch, 1e-5)
    same_losses(patch, hand)
    assert len(hand.losses) < 2 * editor.steps


def test_memits_limit_is_the_releases():
    assert (targets.STOP, targets.KL_STOP) == (0.05, 0.01)


def test_ifmet_reads_multi_hop_prompts_at_their_last_token(lens, statistics, hand):
    editor = qv.IFMET(layers=(0, 1), deep_layers=(2, 3), lam=3.0, **SEARCH)
    patch = edit(lens, [VIA, TWO], editor, statistics)
    solve = ridge(moments(statistics), 3.0)
    pmet(hand, [VIA, TWO], editor, solve, [[0, 1]])
    pmet(hand, [VIA, TWO], editor, solve, [[2, 3]], token="last", via=True)
    check(lens, hand, patch, 1e-6)


def test_the_order_of_multi_hop_prompts_changes_nothing(lens, statistics):
    editor = qv.IFMET(layers=(0,), deep_layers=(2,), lam=3.0, **SEARCH)
    patches = [
        edit(lens, replace(VIA, via=via), editor, statistics)
        for via in (VIA.via, VIA.via[::-1], VIA.via[1:] + VIA.via[:1])
    ]
    for patch in patches[1:]:
        for key, delta in patches[0].deltas.items():
            torch.testing.assert_close(
                patch.deltas[key].dense(), delta.dense(), atol=1e-10, rtol=1e-7
            )


LAYERS = {"value_layers": (2, 3), "query_layers": (0, 1), "lam": 3.0, **SEARCH}


@pytest.mark.parametrize(
    ("reading", "joint"),
    [
        ("default", False), ("default", True), ("algorithm 1", False), ("flat", True), ("overlap", False),
        ("attention", False), ("attention", True), ("no query layers", True),
    ],
)  # fmt: skip
def test_ace_with_one_search(lens, statistics, hand, reading, joint):
    """One z* at the last value layer; each group ends with the full remaining residual, in the
    order asked for. The facts together, or one after the other."""
    changes, groups, modules = {
        "default": ({}, [[0, 1], [2, 3]], ("ffn",)),
        "algorithm 1": ({"order": "value first"}, [[2, 3], [0, 1]], ("ffn",)),
        "flat": ({"groups": False}, [[0, 1, 2, 3]], ("ffn",)),
        "overlap": ({"query_layers": (2, 0)}, [[0, 2], [2, 3]], ("ffn",)),
        "attention": ({"attention": True}, [[0, 1], [2, 3]], ("attn", "ffn")),
        "no query layers": ({"query_layers": ()}, [[2, 3]], ("ffn",)),
    }[reading]
    editor = qv.ACE(**{**LAYERS, **changes}, joint=joint)
    patch = edit(lens, [ONE, TWO], editor, statistics)
    for requests in [[ONE, TWO]] if joint else [[ONE], [TWO]]:
        pmet(hand, requests, editor, ridge(moments(statistics), 3.0), groups, modules=modules)
    check(lens, hand, patch, 1e-6)


@pytest.mark.parametrize("order", ["query first", "value first"])
def test_ace_with_two_passes(lens, statistics, hand, order):
    """A search per group, the value layers on multi-hop prompts at the last token; query layers may
    lie above them."""
    editor = qv.ACE(
        value_layers=(1, 2), query_layers=(3, 0), lam=3.0, joint=True, passes="two", order=order, value_prompts="via",
        value_token="last", **SEARCH,
    )  # fmt: skip
    patch = edit(lens, [VIA, TWO], editor, statistics)
    solve = ridge(moments(statistics), 3.0)
    for kind in ("query", "value") if order == "query first" else ("value", "query"):
        if kind == "query":
            pmet(hand, [VIA, TWO], editor, solve, [[0, 3]])
        else:
            pmet(hand, [VIA, TWO], editor, solve, [[1, 2]], token="last", via=True)
    check(lens, hand, patch, 1e-6)


def test_aces_prefix_stands_before_every_prompt(lens, statistics, hand):
    editor = qv.ACE(**LAYERS, prefix="Question and answer. ")
    patch = edit(lens, [ONE], editor, statistics)
    hand.templates = tuple(editor.prefix + template for template in TEMPLATES)
    pmet(hand, [ONE], editor, ridge(moments(statistics), 3.0), [[0, 1], [2, 3]])
    check(lens, hand, patch, 1e-6)


def test_readings_that_contradict_each_other_are_refused(lens, statistics):
    for changes, says in (
        ({"value_prompts": "via"}, "passes='two'"),
        ({"value_token": "last"}, "passes='two'"),
        ({"groups": False, "order": "value first"}, "no order of groups"),
        ({"value_layers": ()}, "at least one value layer"),
    ):
        with pytest.raises(EditError, match=says):
            edit(lens, ONE, qv.ACE(**{**LAYERS, **changes}), statistics)
    assert qv.ACE.algorithm_1().order == "value first"


def test_more_facts_than_neurons_are_solved_in_the_smaller_system():
    from qv_lens.editing.solve import inverse_of, solve

    g = torch.Generator().manual_seed(0)
    A, K, R = (
        torch.randn(*shape, generator=g, dtype=torch.float64)
        for shape in ((6, 30), (6, 20), (4, 20))
    )
    C0 = A @ A.T / 30
    ours = solve(inverse_of(C0), K, R, 0.7)
    assert ours.right is None
    torch.testing.assert_close(
        ours.dense(), torch.linalg.solve(0.7 * C0 + K @ K.T, K @ R.T), atol=1e-10, rtol=1e-8
    )
