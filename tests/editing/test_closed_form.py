"""Edits: the algebra against independent solutions, exact reverts, and what an edit must and must
not touch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import qv_lens as qv
from qv_lens.editing.keys import contexts
from qv_lens.editing.solve import inverse_of, solve
from qv_lens.editing.statistics import Statistics, covariance
from qv_lens.errors import EditError
from qv_lens.patch import Delta
from tests.attribution.test_value import FACTS
from tests.models import BACKENDS, texts, tiny_lens

TEXTS = texts(300)
REQUESTS = [FACTS[0].to("Quorix"), FACTS[1].to("Paris")]
EDITORS = [
    qv.MEMIT(layers=(0, 1), steps=4, lam=1.0),
    qv.PMET(layers=(0, 1), steps=4, lam=1.0),
    qv.ACE(value_layers=(1,), query_layers=(0,), steps=4, lam=1.0),
    qv.MEMIT(layers=(1, 2), steps=4, lam=1.0, fact_token="last"),
]


@given(st.integers(1, 6), st.floats(1e-3, 1e3), st.integers(0, 10**6))
@settings(max_examples=25, deadline=None)
def test_push_through_equals_the_primal_system(n, lam, seed):
    """(lam C0 + K K^T)^-1 K R^T, solved directly by LU, against the n x n form."""
    g = torch.Generator().manual_seed(seed)
    A, K, R = (
        torch.randn(*shape, generator=g, dtype=torch.float64)
        for shape in ((20, 40), (20, n), (8, n))
    )
    C0 = A @ A.T / 40
    direct = torch.linalg.solve(lam * C0 + K @ K.T, K @ R.T)
    ours = solve(inverse_of(C0), K, R, lam).dense()
    assert (ours - direct).norm() <= 1e-8 * direct.norm()


@given(st.integers(0, 10**6))
@settings(max_examples=25, deadline=None)
def test_delta_minimises_the_objective(seed):
    """Eq. 11: no small step away from the solution lowers lam ||D||_C0^2 + ||D^T K - R||^2."""
    g = torch.Generator().manual_seed(seed)
    A, K, R = (
        torch.randn(*shape, generator=g, dtype=torch.float64)
        for shape in ((12, 30), (12, 3), (5, 3))
    )
    C0, lam = A @ A.T / 30, 2.0
    best = solve(inverse_of(C0), K, R, lam).dense()

    def loss(D):
        return lam * torch.trace(D.T @ C0 @ D) + (D.T @ K - R).square().sum()

    for _ in range(5):
        assert loss(best) <= loss(
            best + 1e-3 * torch.randn(best.shape, generator=g, dtype=torch.float64)
        )


def test_norm_of_factors_is_the_norm_of_the_product():
    delta = Delta(torch.randn(7, 3, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64))
    assert delta.norm() == pytest.approx(float(delta.dense().norm()))


def test_keys_that_cannot_be_told_apart_are_refused():
    """Two facts of one subject: equal keys, up to what float32 leaves."""
    generator = torch.Generator().manual_seed(0)
    K, R = (torch.randn(8, 2, generator=generator, dtype=torch.float64) for _ in range(2))
    assert solve(lambda x: x, K, R, 0.0).dense().abs().max() < 1e3
    K[:, 1] = K[:, 0] * (1 + 1e-8)
    with pytest.raises(EditError, match="share one key"):
        solve(lambda x: x, K, R, 0.0)
    assert solve(lambda x: x, K, R, 1.0).dense().abs().max() < 1e3


def test_singular_statistics_warn_and_hopeless_ones_are_refused():
    K = torch.randn(6, 2, dtype=torch.float64)
    C0 = 1e4 * K @ K.T
    with pytest.warns(UserWarning, match=r"singular: 1e-\d+ of its mean diagonal") as told:
        metric = inverse_of(C0)
    jitter = float(str(told[0].message).split("singular: ")[1].split()[0])
    x = torch.randn(6, 1, dtype=torch.float64)
    wanted = torch.linalg.solve(
        C0 + jitter * C0.diagonal().mean() * torch.eye(6, dtype=torch.float64), x
    )
    torch.testing.assert_close(metric(x), wanted, rtol=1e-3, atol=0)
    with pytest.raises(qv.QVLensError, match="positive definite"):
        inverse_of(-torch.eye(4))


def weights(lens):
    return [lens.w_out(layer).clone() for layer in range(lens.n_layers)]


def same(lens, before):
    return all(torch.equal(lens.w_out(layer), weight) for layer, weight in enumerate(before))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["gptj", "qwen3-gqa"])
@pytest.mark.parametrize("editor", EDITORS, ids=lambda e: f"{type(e).__name__}-{e.fact_token}")
def test_edit_leaves_the_lens_alone_and_the_patch_moves_the_answer(kind, backend, editor):
    lens = tiny_lens(kind, backend, torch.float32)
    statistics = covariance(lens, TEXTS, range(3))
    before, logp = weights(lens), lens.logprob(FACTS[0], "Quorix")
    patch = qv.edit(lens, REQUESTS, editor, statistics=statistics)
    assert same(lens, before)
    with lens.patched(patch):
        assert lens.logprob(FACTS[0], "Quorix") > logp
        assert not same(lens, before)
    assert same(lens, before)


def test_revert_is_bit_for_bit_also_after_an_exception_and_in_a_stack(tmp_path):
    lens = tiny_lens("qwen3-gqa", dtype=torch.float32)
    statistics = covariance(lens, TEXTS, range(3))
    first = qv.edit(lens, REQUESTS[0], EDITORS[0], statistics=statistics)
    second = qv.edit(lens, REQUESTS[1], EDITORS[2], statistics=statistics)
    before = weights(lens)
    with pytest.raises(ZeroDivisionError), lens.patched(first, second):
        assert lens.patches == (first, second)
        raise ZeroDivisionError
    assert same(lens, before)
    with lens.patched(first):
        lens.apply(second)  # left applied: the block takes it back too
    assert same(lens, before)
    lens.apply(first)
    middle = weights(lens)
    lens.apply(second)
    assert lens.revert() is second
    assert same(lens, middle)
    lens.revert()
    assert same(lens, before)
    with pytest.raises(qv.QVLensError, match="nothing to revert"):
        lens.revert()


def test_an_interrupt_while_weights_are_put_back_leaves_none_changed(monkeypatch):
    """Ctrl-C at every single write on the way out of a block."""
    lens = tiny_lens("qwen3-gqa", dtype=torch.float32)
    deltas = {
        (layer, "W_out"): Delta(torch.ones_like(lens.w_out(layer)))
        for layer in range(lens.n_layers)
    }
    patch, before, parameter = qv.Patch(deltas, lens.fingerprint), weights(lens), lens.parameter
    for at in range(lens.n_layers):
        asked = []

        def interrupted(layer, name, at=at, asked=asked):
            asked.append(layer)
            if len(asked) == at + 1:
                raise KeyboardInterrupt
            return parameter(layer, name)

        with pytest.raises(KeyboardInterrupt), lens.patched(patch):
            monkeypatch.setattr(lens, "parameter", interrupted)
        monkeypatch.undo()
        assert len(asked) > lens.n_layers
        assert same(lens, before)
        assert not lens.patches


def test_blocks_may_be_left_in_any_order():
    """A block that is left takes its own patches and interventions with it, and no others."""
    lens = tiny_lens("qwen3-gqa", dtype=torch.float32)
    statistics = covariance(lens, TEXTS, range(3))
    first, second, third = (
        qv.edit(lens, request, editor, statistics=statistics)
        for request, editor in zip(
            [REQUESTS[0], REQUESTS[1], REQUESTS[0]],
            [EDITORS[0], EDITORS[2], EDITORS[2]],
            strict=True,
        )
    )
    before, asked = weights(lens), FACTS[0]
    with lens.patched(second):
        alone = weights(lens)
    outer, inner = lens.patched(first), lens.patched(second)
    outer.__enter__(), inner.__enter__(), lens.apply(third)
    outer.__exit__(None, None, None)
    assert lens.patches == (second, third)
    lens.revert()
    assert same(lens, alone)
    with lens.patched(first):
        lens.revert()  # what a block wrote may be taken back inside, and nothing else
        with pytest.raises(qv.QVLensError, match="leave it"):
            lens.revert()
        lens.apply(third)
    assert lens.patches == (second,)
    assert same(lens, alone)
    inner.__exit__(None, None, None)
    assert same(lens, before)
    assert not lens.patches

    zeros = [qv.Zero(qv.NeuronSet.of([(layer, 1)])) for layer in (0, 1)]
    with lens.intervene(zeros[1]):
        wanted = lens.logprob(asked)
    blocks = [lens.intervene(zeros[0]), lens.intervene(zeros[1]), lens.intervene(zeros[0])]
    for block in blocks:
        block.__enter__()
    blocks[2].__exit__(None, None, None)
    assert lens.interventions == (zeros[0], zeros[1])
    blocks[0].__exit__(None, None, None)
    assert lens.interventions == (zeros[1],)
    assert lens.logprob(asked) == wanted
    blocks[1].__exit__(None, None, None)
    assert lens.interventions == ()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@given(seed=st.integers(0, 10**6), scale=st.floats(1e-6, 1e3))
@settings(max_examples=15, deadline=None)
def test_any_patch_reverts_exactly(dtype, seed, scale):
    lens = tiny_lens("gptj", dtype=dtype, n_layers=1)
    g = torch.Generator().manual_seed(seed)
    shape = lens.w_out(0).shape
    left, right = (
        torch.randn(*s, generator=g, dtype=torch.float64) for s in ((shape[0], 2), (2, shape[1]))
    )
    before = weights(lens)
    with lens.patched(qv.Patch({(0, "W_out"): Delta(scale * left, right)}, lens.fingerprint)):
        pass
    assert same(lens, before)


def test_a_failing_edit_leaves_the_weights(monkeypatch):
    lens = tiny_lens("gptj", dtype=torch.float32)
    statistics = covariance(lens, TEXTS, range(3))
    before, calls = weights(lens), []

    def fail_late(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return solve(*arguments)

    monkeypatch.setattr("qv_lens.editing.layer_by_layer.solve", fail_late)
    with pytest.raises(KeyboardInterrupt):
        qv.edit(lens, REQUESTS, EDITORS[0], statistics=statistics)
    assert same(lens, before)


def test_batched_targets_equal_those_searched_alone():
    """Facts of a batch do not touch each other: one Adam, clamp and stop per fact."""
    from qv_lens.editing.keys import rows_of
    from qv_lens.editing.targets import search

    lens = tiny_lens("qwen3-gqa")
    settings = qv.MEMIT(steps=6).spread(lens, (1,)).search
    templates = contexts(lens)
    both = search(
        lens, REQUESTS, rows_of(lens, REQUESTS, templates, "subject_last"), "subject_last", settings
    )
    for i, request in enumerate(REQUESTS):
        alone = search(
            lens,
            [request],
            rows_of(lens, [request], templates, "subject_last"),
            "subject_last",
            settings,
        )
        torch.testing.assert_close(both.z[i], alone.z[0], atol=1e-9, rtol=1e-9)


def test_no_gradient_at_the_last_layer_is_an_error():
    lens = tiny_lens("gptj")
    statistics = Statistics({2: torch.eye(lens.d_mlp)}, 1, "", lens.fingerprint)
    with pytest.raises(qv.QVLensError, match="No gradient reaches the site"):
        qv.edit(lens, REQUESTS[0], qv.MEMIT(layers=(2,)), statistics=statistics)


def test_layers_that_cannot_be_edited_are_dropped_and_told_of_once():
    """Where the edit is asked for, however often its layers are looked up on the way."""
    lens = tiny_lens("gptj", dtype=torch.float32)
    editor = qv.ACE(value_layers=(1, 7), query_layers=(0, 2), steps=2, lam=1.0)
    C0 = covariance(lens, TEXTS, range(3))
    with pytest.warns(UserWarning, match="are dropped") as told:
        patch = qv.edit(lens, REQUESTS[0], editor, statistics=C0, templates=("{}",))
    assert {layer for layer, _ in patch.deltas} == {0, 1}
    messages = [str(each.message) for each in told if "are dropped" in str(each.message)]
    assert [message[:16] for message in messages] == ["Value layers [7]", "Query layers [2]"]
    assert {each.filename for each in told if "are dropped" in str(each.message)} == {__file__}
    case = qv.EditCase(REQUESTS[0])
    with pytest.warns(UserWarning, match="are dropped") as told:
        qv.evaluate(lens, [case], ["efficacy_acc"], editor, statistics=C0, templates=("{}",))
    assert sum("are dropped" in str(each.message) for each in told) == 2


def test_patch_survives_the_disk(tmp_path):
    lens = tiny_lens("gptj", dtype=torch.float32)
    patch = qv.edit(lens, REQUESTS, EDITORS[0], statistics=covariance(lens, TEXTS, range(3)))
    again = qv.Patch.load(patch.save(tmp_path / "patch"))
    assert again.info == patch.info
    assert again.fingerprint == patch.fingerprint
    for key, delta in patch.deltas.items():
        assert torch.equal(again.deltas[key].left, delta.left)
        assert torch.equal(again.deltas[key].right, delta.right)
    with lens.patched(again):
        logits = lens.next_token_logits(FACTS)
    with lens.patched(patch):
        assert torch.equal(lens.next_token_logits(FACTS), logits)


def test_weights_are_back_after_every_case_of_an_evaluation(monkeypatch):
    """Looked at from inside: whenever the unedited model is probed, its weights are the original
    ones."""
    from qv_lens.evaluation import protocols

    lens = tiny_lens("qwen3-gqa", dtype=torch.float32)
    statistics = covariance(lens, TEXTS, range(3))
    before, seen, look = weights(lens), [], protocols.look

    def watched(lens, cases, *rest):
        seen.append((len(cases), same(lens, before)))
        return look(lens, cases, *rest)

    monkeypatch.setattr(protocols, "look", watched)
    cases = [qv.EditCase(request) for request in REQUESTS * 2]
    protocols.evaluate(lens, cases, editor=EDITORS[2], statistics=statistics)
    assert seen == [(4, True), *[(1, False)] * 4]
    assert same(lens, before)
