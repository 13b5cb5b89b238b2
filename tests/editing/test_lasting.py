"""SimIE, NSE, UltraEdit and LocFT-BF against formulas written out here, with keys read from Hugging
Face's modules."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

import qv_lens as qv
from qv_lens.editing.nse import largest
from qv_lens.editing.statistics import covariance
from qv_lens.evaluation.protocols import total
from tests.editing.test_methods import REQUESTS, TEXTS
from tests.models import tiny_hf, tiny_lens, tokenizer

TEMPLATES = ("{}", "A city. {}")
#: answers of several tokens
LONGER = [request.fact.to(f"{request.new} Vane") for request in REQUESTS]
ROME = qv.ROME(layer=1, steps=4, mom2_adjustment=False)


def down(lens, layer):
    """Hugging Face's module of W_out."""
    block = getattr(lens.hf, "transformer", None) or lens.hf.model
    mlp = (block.h if hasattr(block, "h") else block.layers)[layer].mlp
    return mlp.fc_out if hasattr(mlp, "fc_out") else mlp.down_proj


def read(lens, layer, ids):
    """What W_out of a layer reads at every token: [k, token]."""
    kept = []
    handle = down(lens, layer).register_forward_pre_hook(lambda _, x: kept.append(x[0][0]))
    try:
        lens.hf(torch.tensor([ids]))
    finally:
        handle.remove()
    return kept[0].detach().double().T


def tokens_of(lens, request):
    (prompt,) = lens.tokenize([request.target])
    return [*prompt.ids, *prompt.answer]


def close(a, b, within):
    error = float((a - b).norm() / b.norm())
    assert error <= within


@pytest.mark.parametrize("kind", ["gptj", "qwen3-gqa"])
@pytest.mark.parametrize("lam", [1.0, 100.0])
def test_simie_is_the_ridge_regression_of_its_docstring(kind, lam):
    """The closed form over all facts, not the recursion: in one edit, and in a row of edits."""
    lens = tiny_lens(kind)
    requests = [*REQUESTS, qv.Fact("The capital of {} is", "Norway", "Oslo").to("Quorix")]
    W_0 = lens.w_out(1).double().clone()
    system = lam * torch.eye(len(W_0), dtype=torch.float64)
    right = lam * W_0
    for request in requests:
        K = read(lens, 1, tokens_of(lens, request))
        moved = qv.edit(lens, request, ROME, templates=TEMPLATES).deltas[1, "W_out"].dense()
        system, right = system + K @ K.T, right + K @ K.T @ (W_0 + moved)
    expected = torch.linalg.solve(system, right) - W_0
    editor = qv.SimIE(editor=ROME, lam=lam)
    whole = qv.edit(lens, requests, editor, templates=TEMPLATES)
    close(whole.deltas[1, "W_out"].dense(), expected, 1e-5)
    patches = []
    for request in requests:
        patches.append(qv.edit(lens, request, editor, templates=TEMPLATES))
        lens.apply(patches[-1])
    for _ in patches:
        lens.revert()
    close(sum(p.deltas[1, "W_out"].dense() for p in patches), expected, 1e-5)
    assert torch.equal(lens.w_out(1).double(), W_0)


def test_simie_on_the_edited_model():
    """`unedited=False`: every fact is edited, and its keys are read, on the weights as they are."""
    lens = tiny_lens("gptj")
    editor = qv.SimIE(editor=ROME, lam=1.0, unedited=False)
    whole = qv.edit(lens, REQUESTS, editor, templates=TEMPLATES)
    W_0 = lens.w_out(1).double().clone()
    W, A = W_0.clone(), torch.eye(len(W_0), dtype=torch.float64)
    for request in REQUESTS:
        patch = qv.Patch({(1, "W_out"): qv.patch.Delta(W - W_0)}, lens.fingerprint)
        with lens.patched(patch):
            K = read(lens, 1, tokens_of(lens, request))
            moved = qv.edit(lens, request, ROME, templates=TEMPLATES).deltas[1, "W_out"].dense()
        A = A + K @ K.T
        W = W + torch.linalg.solve(A, K @ K.T @ moved)
    close(whole.deltas[1, "W_out"].dense(), W - W_0, 1e-6)


def test_simie_lifts_only_its_own_patches():
    """An earlier edit by another editor belongs to W_0."""
    lens = tiny_lens("gptj")
    editor = qv.SimIE(editor=ROME, lam=1.0)
    other = qv.edit(lens, REQUESTS[0], ROME, templates=TEMPLATES)
    with lens.patched(other):
        first = qv.edit(lens, REQUESTS[1], editor, templates=TEMPLATES)
        both = qv.edit(
            lens, [REQUESTS[1], REQUESTS[0].fact.to("Quorix")], editor, templates=TEMPLATES
        )
        before = lens.w_out(1).clone()
        with lens.patched(first):
            second = qv.edit(lens, REQUESTS[0].fact.to("Quorix"), editor, templates=TEMPLATES)
        assert torch.equal(lens.w_out(1), before)
    close(
        first.deltas[1, "W_out"].dense() + second.deltas[1, "W_out"].dense(),
        both.deltas[1, "W_out"].dense(),
        1e-6,
    )


def test_simie_refuses_what_it_cannot_wrap():
    lens = tiny_lens("gptj")
    with pytest.raises(qv.QVLensError, match="write weights alone"):
        qv.edit(lens, REQUESTS[0], qv.SimIE(editor=qv.FT(layer=1, steps=1)))
    with pytest.raises(qv.QVLensError, match="one fact at a time, got batch_size=2"):
        qv.edit(lens, REQUESTS, qv.SimIE(editor=ROME), batch_size=2)
    with pytest.raises(qv.QVLensError, match="lam of SimIE must be"):
        qv.edit(lens, REQUESTS[0], qv.SimIE(editor=ROME, lam=0.0))
    with pytest.raises(qv.QVLensError, match="needs C0"):
        qv.edit(lens, REQUESTS[0], qv.SimIE(editor=qv.MEMIT(layers=(1,))))
    assert qv.SimIE(editor="MEMIT").reads_statistics
    assert qv.SimIE(editor=qv.MEMIT(layers=(0, 1))).written(lens) == ((0, 1), ("ffn",))
    with pytest.raises(qv.QVLensError, match="FT reads no C0"):
        qv.SimIE(editor=qv.FT(layer=1)).written(lens)
    assert not qv.SimIE(editor=ROME).reads_statistics


def nse(**options):
    settings = {"layers": (1,), "lam": 1.0, "steps": 4, "near": 0.0, "far": 1e9, **options}
    return qv.NSE(**settings)


def residual(lens, requests, K, statistics):
    """R of MEMIT at one layer, solved for out of its own delta: (C0 + K K^T) dW = K R^T."""
    memit, C0 = qv.MEMIT(layers=(1,), lam=1.0, steps=4), statistics.C0[1].double()
    patch = qv.edit(lens, requests, memit, statistics=statistics, templates=TEMPLATES)
    return torch.linalg.lstsq(K, (C0 + K @ K.T) @ patch.deltas[1, "W_out"].dense()).solution.T


def keys(lens, requests):
    """MEMIT's keys at layer 1, from Hugging Face: half the bare prompt's, half the other's."""
    columns = []
    for request in requests:
        each = []
        for template in TEMPLATES:
            fact = request.target.with_prompt(template.replace("{}", request.fact.prompt))
            (prompt,) = lens.tokenize([fact])
            each.append(read(lens, 1, list(prompt.ids))[:, prompt.position("subject_last")])
        columns.append(sum(each) / 2)
    return torch.stack(columns, 1)


@pytest.mark.parametrize("share", [0.5, 0.9, 1.0])
def test_one_round_of_nse_writes_the_rows_of_its_largest_keys(share):
    lens = tiny_lens("gptj")
    statistics = covariance(lens, TEXTS, [1])
    C0, K = statistics.C0[1].double(), keys(lens, REQUESTS)
    R = residual(lens, REQUESTS, K, statistics)
    size = K.abs().sum(1)
    order, held, rows = sorted(range(len(size)), key=lambda j: -size[j]), 0.0, []
    for j in order:
        held += float(size[j] / size.sum())
        if held > share + 1e-9:
            break
        rows.append(j)
    part = torch.linalg.solve(C0[rows][:, rows] + K[rows] @ K[rows].T, K[rows] @ R.T)
    patch = qv.edit(
        lens, REQUESTS, nse(share=share, rounds=1), statistics=statistics, templates=TEMPLATES
    )
    delta = patch.deltas[1, "W_out"].dense()
    close(delta[rows], part, 1e-6)
    others = [j for j in range(len(size)) if j not in rows]
    assert not delta[others].any()
    assert patch.info["neurons"] == [[1, len(rows)]]
    assert (len(rows) == len(size)) == (share == 1.0)


def test_targets_of_nse_are_those_of_the_unedited_model():
    """The second batch: R from z* of the unedited model, current value and keys of the edited one,
    S of the first batch. In one edit, and as a patch upon a patch."""
    lens = tiny_lens("gptj")
    statistics = covariance(lens, TEXTS, [1])
    editor = nse(share=1.0, rounds=1)
    options = {"statistics": statistics, "templates": TEMPLATES}
    first = qv.edit(lens, REQUESTS[0], editor, **options)
    whole = qv.edit(lens, REQUESTS, editor, batch_size=1, **options)
    clean = lens.trace(REQUESTS[1].fact, "subject_last")
    C0 = statistics.C0[1].double()
    K_clean = keys(lens, REQUESTS[1:])
    R = residual(lens, REQUESTS[1:], K_clean, statistics)
    with lens.patched(first):
        second = qv.edit(lens, REQUESTS[1], editor, **options)
        K, seen = keys(lens, REQUESTS[1:]), keys(lens, REQUESTS[:1])
        moved = lens.trace(REQUESTS[1].fact, "subject_last")
        R = R - (stream(moved, 1) - stream(clean, 1))
    expected = torch.linalg.solve(C0 + seen @ seen.T + K @ K.T, K @ R.T)
    close(second.deltas[1, "W_out"].dense(), expected, 1e-5)
    close(
        whole.deltas[1, "W_out"].dense(),
        first.deltas[1, "W_out"].dense() + second.deltas[1, "W_out"].dense(),
        1e-6,
    )


def stream(trace, layer):
    """The stream behind a block at the trace's position: [d, 1]."""
    return trace.resid[layer + 1, 0].double()[:, None]


def test_rounds_of_nse_go_on_with_the_facts_that_are_not_there_yet():
    lens = tiny_lens("gptj")
    options = {"statistics": covariance(lens, TEXTS, [1]), "templates": TEMPLATES}
    one = qv.edit(lens, REQUESTS, nse(rounds=1), **options)
    two = qv.edit(lens, REQUESTS, nse(rounds=2), **options)
    far = [step["distance"] for step in two.info["rounds"][0]]
    assert len(one.info["rounds"][0]) == 1
    assert len(far) == 2
    assert all(b < a for a, b in zip(*far, strict=True))
    between = sum(far[0]) / 2
    some = qv.edit(lens, REQUESTS, nse(rounds=1, near=between), **options)
    (step,) = some.info["rounds"][0]
    assert step["active"] == [i for i, size in enumerate(far[0]) if size > between]
    with pytest.warns(UserWarning, match="are farther from their z"):
        qv.edit(lens, REQUESTS, nse(rounds=1, far=between), **options)
    with pytest.raises(qv.QVLensError, match="rounds of NSE must be"):
        qv.edit(lens, REQUESTS, nse(rounds=0), **options)


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_a_batch_of_which_nothing_is_written_counts_for_the_next_one(share):
    """As released: S takes in the keys of all facts. In one edit, and as a patch upon a patch."""
    lens = tiny_lens("gptj")
    statistics = covariance(lens, TEXTS, [1])
    options = {"statistics": statistics, "templates": TEMPLATES}
    with pytest.warns(UserWarning, match="1 of 1 facts lie within near"):
        nothing = qv.edit(lens, REQUESTS[0], nse(near=1e8), **options)
    assert not nothing.deltas[1, "W_out"].dense().any()
    C0, K = statistics.C0[1].double(), keys(lens, REQUESTS[1:])
    seen = keys(lens, REQUESTS[:1])
    R = residual(lens, REQUESTS[1:], K, statistics)
    with lens.patched(nothing):
        patch = qv.edit(lens, REQUESTS[1], nse(share=share, rounds=1), **options)
    rows = largest(K.abs().sum(1), share)
    system = (C0 + seen @ seen.T)[rows][:, rows] + K[rows] @ K[rows].T
    close(patch.deltas[1, "W_out"].dense()[rows], torch.linalg.solve(system, K[rows] @ R.T), 1e-5)


def test_nse_may_search_on_the_weights_as_edited():
    """`unedited=False`: the second batch's R is MEMIT's on the edited model, its own search."""
    lens = tiny_lens("gptj")
    statistics = covariance(lens, TEXTS, [1])
    options = {"statistics": statistics, "templates": TEMPLATES}
    editor = nse(share=1.0, rounds=1, unedited=False)
    whole = qv.edit(lens, REQUESTS, editor, batch_size=1, **options)
    first = qv.edit(lens, REQUESTS[0], editor, **options)
    C0, seen = statistics.C0[1].double(), keys(lens, REQUESTS[:1])
    with lens.patched(first):
        K = keys(lens, REQUESTS[1:])
        R = residual(lens, REQUESTS[1:], K, statistics)
        second = qv.edit(lens, REQUESTS[1], editor, **options)
    expected = torch.linalg.solve(C0 + seen @ seen.T + K @ K.T, K @ R.T)
    close(second.deltas[1, "W_out"].dense(), expected, 1e-5)
    apart = first.deltas[1, "W_out"].dense() + second.deltas[1, "W_out"].dense()
    close(whole.deltas[1, "W_out"].dense(), apart, 1e-6)


@pytest.mark.parametrize("score", ["value", "effects"])
def test_nse_writes_the_rows_that_attribution_names(score):
    lens = tiny_lens("gptj")
    options = {"statistics": covariance(lens, TEXTS, [1]), "templates": TEMPLATES}
    facts = [request.fact for request in REQUESTS]
    of = qv.value_neurons if score == "value" else qv.neuron_effects
    frame = of(lens, facts, None, over="set", positions="subject_last").frame
    size = (
        frame[frame["layer"] == 1].set_index("neuron")["score"].abs().sort_values(ascending=False)
    )
    rows = set(size.index[(size.cumsum() / size.sum()) <= 0.5])
    patch = qv.edit(lens, REQUESTS, nse(score=score, share=0.5, rounds=1), **options)
    delta = patch.deltas[1, "W_out"].dense()
    assert set(delta.abs().sum(1).nonzero()[:, 0].tolist()) == rows
    before = sum(lens.logprob([r.target for r in REQUESTS]))
    with lens.patched(patch):
        assert sum(lens.logprob([r.target for r in REQUESTS])) > before


def test_a_first_neuron_above_the_share_is_taken():
    """The trap of the release: it takes none."""
    assert largest(torch.tensor([1.0, 9.0, 1.0]), 0.5).tolist() == [1]
    assert largest(torch.tensor([3.0, 4.0, 3.0]), 0.7).tolist() == [0, 1]
    assert largest(torch.tensor([1.0, 2.0, 3.0]), 1.0).tolist() == [0, 1, 2]


def test_a_mini_batch_of_one_row_is_no_trap():
    """The release divides by zero and keeps NaN for ever."""
    lens = tiny_lens("gptj")
    request = REQUESTS[0].fact.to("the")
    assert len(lens.answer_ids(request.target)) == 1
    editor = qv.UltraEdit(layers=(1,), lr=1e-3, mini_batch=1)
    patch = qv.edit(lens, [request, LONGER[1]], editor)
    assert patch.deltas[1, "W_out"].finite()
    with pytest.warns(UserWarning, match="no deviation"):
        alone = qv.edit(lens, request, editor)
    assert alone.deltas[1, "W_out"].norm() == 0
    assert (
        qv.edit(lens, request, dataclasses.replace(editor, tokens="all")).deltas[1, "W_out"].norm()
        > 0
    )


def test_a_row_may_begin_with_one_token():
    """The first turn writes nothing, and counts: the second is that of both rows' moments."""
    lens = tiny_lens("gptj")
    requests = [request.fact.to("the") for request in REQUESTS[:2]]
    editor = qv.UltraEdit(layers=(1,), lr=1e-3, mini_batch=1)
    with pytest.warns(UserWarning, match="no deviation"):
        first = qv.edit(lens, requests[0], editor)
    with lens.patched(first):
        second = qv.edit(lens, requests[1], editor)
    X, G = [], []
    for request in requests:
        ids = torch.tensor([list(lens.tokenize([request.target])[0].ids)])
        keys, given = [], []
        block = down(lens, 1)

        def keep(module, inputs, output, keys=keys, given=given):
            output.requires_grad_(True).retain_grad()
            keys.append(inputs[0][0, -1].detach().double())
            given.append(output)

        handle = block.register_forward_hook(keep)
        with torch.enable_grad():
            logits = lens.hf(ids).logits[0, -1]
            (-logits.log_softmax(-1)[lens.answer_ids(request.target)[0]]).backward()
        handle.remove()
        X.append(keys[0])
        G.append(given[0].grad[0, -1].double())
    rows = torch.cat([torch.stack(X), torch.stack(G)], 1)
    # each turn has one row: M is N D^2 / N' alone, the square of half of their gap, twice
    spread = ((rows[1] - rows[0]).square() / 2).sqrt()
    normed = (rows[1] - rows.mean(0)) / (spread + torch.finfo(torch.float32).eps)
    x, g = normed.split([len(X[0]), len(G[0])])
    wanted = torch.outer(X[1], -1e-3 * x.square().sum() * g) / (1 + X[1].square().sum())
    got = second.deltas[1, "W_out"].dense()
    assert torch.allclose(got.double(), wanted, rtol=1e-4, atol=1e-6 * float(wanted.abs().max()))


@pytest.mark.parametrize("kind", ["gptj", "qwen3-gqa"])
def test_ultraedit_by_hand(kind):
    """Two turns in a row at two weights, every quantity in float64 from autograd and the formulas of
    the paper's text; moments over all rows with numpy's own variance where every mini-batch is a
    turn of its own."""
    lens = tiny_lens(kind)
    editor = qv.UltraEdit(layers=(1,), lr=1e-3, mini_batch=10)
    seen = []
    for request in LONGER:
        (prompt,) = lens.tokenize([request.target])
        kept = {}

        def keep(module, inputs, output, kept=kept):
            kept["x"] = inputs[0][0]
            output.requires_grad_(True).retain_grad()
            kept["y"] = output

        handle = down(lens, 1).register_forward_hook(keep)
        with torch.enable_grad():
            logits = lens.hf(torch.tensor([[*prompt.ids, *prompt.answer[:-1]]])).logits[0]
            logp = logits.double().log_softmax(-1)
            at = list(range(prompt.last, prompt.last + len(prompt.answer)))
            loss = -logp[at, list(prompt.answer)].mean()
            loss.backward()
        handle.remove()
        X, g = kept["x"][at].detach().double(), kept["y"].grad[0, at].double()
        rows = torch.cat([X, g], 1)
        seen.append(rows)
        N, mean, M = 0, torch.zeros_like(rows[0]), torch.zeros_like(rows[0])
        for part in seen:
            b = len(part)
            gap = part.mean(0) - mean
            var = part.var(0) if b > 1 else torch.zeros_like(gap)
            M = M + b * var + N * b * gap**2 / (N + b)
            mean, N = mean + b * gap / (N + b), N + b
        std = (M / (N - 1 + 2**-23)).sqrt()
        normed = (rows - mean) / (std + 2**-23)
        k = X.shape[1]
        V = -1e-3 * normed[:, :k].square().sum(1, keepdim=True) * normed[:, k:]
        expected = torch.linalg.solve(X.T @ X + torch.eye(k, dtype=X.dtype), X.T @ V)
        patch = qv.edit(lens, request, editor)
        close(patch.deltas[1, "W_out"].dense(), expected, 1e-4)
        lens.apply(patch)
    lens.revert()
    lens.revert()


@pytest.mark.parametrize("kind", ["gptj", "qwen3-gqa"])
def test_ultraedit_writes_any_weight_of_the_ffn(kind):
    lens = tiny_lens(kind)
    names = ("W_in", "W_out", *(["W_gate"] if kind != "gptj" else []))
    patch = qv.edit(lens, REQUESTS, qv.UltraEdit(layers=(0, 1), parameters=names, lr=1e-3))
    assert {name for _, name in patch.deltas} == set(names)
    before = sum(lens.logprob([r.target for r in REQUESTS]))
    with lens.patched(patch):
        assert sum(lens.logprob([r.target for r in REQUESTS])) > before
    # a bias reads nothing; Qwen3's FFN has none
    refused = "reads something" if kind == "gptj" else "no parameter 'b_out'"
    with pytest.raises(qv.QVLensError, match=refused):
        qv.edit(lens, REQUESTS, qv.UltraEdit(layers=(1,), parameters=("b_out",)))


def test_locft_teaches_the_end_of_the_text():
    lens = tiny_lens("gptj")
    end = lens.tokenizer.eos_token_id

    def p_end(patch):
        with lens.patched(patch):
            (prompt,) = lens.tokenize([REQUESTS[0].target])
            logits = lens.logits([(*prompt.ids, *prompt.answer)])[0, -1]
            return float(logits.softmax(-1)[end])

    options = {"layer": 1, "lr": 1e-2, "epochs": 60}
    taught = qv.edit(lens, REQUESTS, qv.LocFT(**options))
    not_taught = qv.edit(lens, REQUESTS, qv.LocFT(end_of_text=False, **options))
    assert p_end(taught) > 0.5 > p_end(not_taught)
    again = qv.edit(lens, REQUESTS, qv.LocFT(mini_batch=1, **options), seed=1)
    other = qv.edit(lens, REQUESTS, qv.LocFT(mini_batch=1, **options), seed=2)
    assert not torch.equal(again.deltas[1, "W_out"].dense(), other.deltas[1, "W_out"].dense())
    with pytest.raises(qv.QVLensError, match="at least 1"):
        qv.edit(lens, REQUESTS, dataclasses.replace(qv.LocFT(), mini_batch=0))


ROW = [
    qv.UltraEdit(layers=(1,), lr=1e-3, tokens="all"), qv.SimIE(editor=ROME, lam=1.0),
    qv.NSE(layers=(1,), lam=1.0, steps=4, near=0.0, far=1e9), qv.ENCORE(layers=(1,), lam=1.0, norm=0.1, steps=4),
    qv.BetaEdit(layers=(1,), threshold=1.0, L2=0.1, lam=1.0, renew=2, steps=4),
]  # fmt: skip


@pytest.mark.parametrize("editor", ROW, ids=lambda editor: type(editor).__name__)
def test_a_sum_of_patches_is_remembered_as_its_parts(editor):
    """`evaluate` keeps one patch in force, the sum of all edits so far."""
    lens = tiny_lens("gptj")
    options = {"statistics": covariance(lens, TEXTS, [1]), "templates": TEMPLATES}
    third = qv.Fact("The capital of {} is", "Norway", "Oslo").to("Quorix Vane")
    patches = []
    for request in LONGER:
        patches.append(qv.edit(lens, request, editor, **options))
        lens.apply(patches[-1])
    apart = qv.edit(lens, third, editor, **options)
    for _ in patches:
        lens.revert()
    whole = total(patches)
    # a long row of edits keeps K K^T, not K
    dense = {key: qv.patch.Delta(kept.dense()) for key, kept in whole.kept.items()}
    with lens.patched(dataclasses.replace(whole, kept=dense)):
        together = qv.edit(lens, third, editor, **options)
    close(together.deltas[1, "W_out"].dense(), apart.deltas[1, "W_out"].dense(), 1e-6)


def test_the_limit_of_an_update_is_a_facts():
    """Of two facts the norm over sqrt(2) counts."""
    lens = tiny_lens("gptj")
    C0 = covariance(lens, TEXTS, [1])
    options = {"threshold": 1.0, "L2": 0.1, "lam": 1.0, "steps": 4}
    edit = lambda limit: qv.edit(  # noqa: E731
        lens, REQUESTS[:2], qv.BetaEdit(layers=(1,), limit=limit, **options),
        statistics=C0, templates=TEMPLATES,
    )  # fmt: skip
    norm = float(edit(1e9).deltas[1, "W_out"].norm())
    edit(1.01 * norm / math.sqrt(2))
    with pytest.raises(qv.QVLensError, match="nothing was kept"):
        edit(0.99 * norm / math.sqrt(2))


@pytest.mark.parametrize(
    "inner",
    [
        qv.UltraEdit(layers=(1,), lr=1e-3),
        qv.PRUNE(layers=(1,), lam=1.0, steps=4),
        qv.AlphaEdit(layers=(1,), threshold=1.0, L2=0.1, steps=4),
        qv.NSE(layers=(1,), lam=1.0, steps=4, near=0.0, far=1e9),
    ],
    ids=lambda editor: type(editor).__name__,
)
@pytest.mark.parametrize("below", [True, False])
def test_what_simie_wraps_remembers_no_patch_in_force(inner, below):
    """A patch by the same kind of editor counts as weights alone, above SimIE's first patch, where it
    is lifted, and below it."""
    lens = tiny_lens("gptj")
    options = {"statistics": covariance(lens, TEXTS, [1]), "templates": TEMPLATES}
    editor = qv.SimIE(editor=inner, lam=1.0)
    third = qv.Fact("The capital of {} is", "Norway", "Oslo").to("Quorix Vane")
    makers = (inner, editor) if below else (editor, inner)
    patches = []
    for request, maker in zip(LONGER, makers, strict=True):
        patches.append(qv.edit(lens, request, maker, **options))
        lens.apply(patches[-1])
    remembered = qv.edit(lens, third, editor, **options)
    for _ in patches:
        lens.revert()
    by_hand = [
        dataclasses.replace(patch, info={**patch.info, "method": "by hand"})
        if maker is inner
        else patch
        for patch, maker in zip(patches, makers, strict=True)
    ]
    with lens.patched(*by_hand):
        forgotten = qv.edit(lens, third, editor, **options)
    close(remembered.deltas[1, "W_out"].dense(), forgotten.deltas[1, "W_out"].dense(), 1e-9)


def test_simie_takes_the_models_preset_of_a_name():
    hf = tiny_hf("qwen3-gqa", n_layers=8)
    lens = qv.Lens.from_hf(hf, tokenizer(), name="Qwen/Qwen3-8B")
    preset = qv.presets("Qwen/Qwen3-8B")["ROME"].editor
    assert not preset.mom2_adjustment
    named = qv.edit(lens, REQUESTS[0], qv.SimIE(editor="ROME"), templates=TEMPLATES)
    given = qv.edit(lens, REQUESTS[0], qv.SimIE(editor=preset), templates=TEMPLATES)
    assert named.deltas.keys() == given.deltas.keys()
    for key, delta in named.deltas.items():
        assert torch.equal(delta.dense(), given.deltas[key].dense())
    assert named.info["hyperparameters"]["editor"]["lr"] == preset.lr


def beta(**options):
    settings = {"layers": (1,), "threshold": 1.0, "L2": 0.1, "lam": 1.0, "steps": 4, "limit": 1e9}
    return qv.BetaEdit(**{**settings, **options})


def test_betaedit_counts_the_facts_of_every_patch_in_force():
    """Two and one, made apart on the bare model, are three: enough to renew the null space, whichever
    lies on top."""
    lens = tiny_lens("gptj")
    options = {"statistics": covariance(lens, TEXTS, [0, 1]), "templates": TEMPLATES}
    third = qv.Fact("The capital of {} is", "Norway", "Oslo").to("Quorix")
    last = qv.Fact("The capital of {} is", "Spain", "Madrid").to("Vane")
    two, one = (qv.edit(lens, some, beta(), **options) for some in (REQUESTS, [third]))
    found = []
    for patches in ((two, one), (one, two)):
        with lens.patched(*patches):
            patch = qv.edit(lens, last, beta(renew=3), **options)
            found.append(patch.deltas[1, "W_out"].dense())
            assert patch.kept[1, "renewed"].dense().item() == 3
            never = qv.edit(lens, last, beta(renew=4), **options).deltas[1, "W_out"].dense()
            assert float((never - found[-1]).norm() / never.norm()) > 1e-3
    close(found[0], found[1], 1e-6)


def test_betaedit_with_a_layer_that_was_not_written_before():
    lens = tiny_lens("gptj")
    options = {"statistics": covariance(lens, TEXTS, [0, 1]), "templates": TEMPLATES}
    for request, layers in zip(REQUESTS, ((1,), (0, 1)), strict=True):
        lens.apply(qv.edit(lens, request, beta(layers=layers, renew=1), **options))
    third = qv.Fact("The capital of {} is", "Norway", "Oslo").to("Quorix")
    patch = qv.edit(lens, third, beta(layers=(0, 1), renew=5), **options)
    assert {layer for layer, _ in patch.deltas} == {0, 1}


@pytest.mark.parametrize("attention", [True, False])
def test_a_fact_that_the_anchor_skips_is_not_written(attention):
    lens = tiny_lens("gptj")
    options = {
        "statistics": covariance(lens, TEXTS, [0, 1], modules=("ffn", "attn")),
        "templates": TEMPLATES,
    }
    editor = qv.PMET(layers=(0, 1), lam=1.0, steps=4, attention=attention, anchor=1e-3)
    with pytest.warns(UserWarning, match="2 of 2 facts are skipped"):
        patch = qv.edit(lens, REQUESTS, editor, **options)
    assert patch.deltas
    assert all(delta.norm() < 1e-12 for delta in patch.deltas.values())


@pytest.mark.parametrize("size", [None, 1])
def test_facts_that_nse_never_writes_are_told_of(size):
    lens = tiny_lens("gptj")
    options = {"statistics": covariance(lens, TEXTS, [1]), "templates": TEMPLATES}
    far = qv.edit(lens, REQUESTS, nse(), **options).info["rounds"][0][0]["distance"]
    by_distance = sorted(zip(far, REQUESTS, strict=True), key=lambda each: each[0])
    facts, editor = [request for _, request in by_distance], nse(near=sum(far) / 2, rounds=1)
    with pytest.warns(UserWarning, match="1 of 2 facts lie within near"):
        qv.edit(lens, facts, editor, batch_size=size, **options)


def test_what_is_lost_to_rounding_is_told():
    lens = tiny_lens("gptj", dtype=torch.bfloat16)
    with pytest.warns(UserWarning, match=r"% of the edit of 1.W_out is lost to rounding.*bfloat16"):
        patch = qv.edit(lens, REQUESTS, qv.UltraEdit(layers=(1,), lr=1e-8))
    assert patch.info["rounding_error"]["1.W_out"] > 0.5


SINGULAR = [
    (qv.NSE(layers=(1,), lam=1.0, near=0.0, far=1e9, steps=2, share=1.0), "lower share"),
    (qv.ENCORE(layers=(1,), lam=1.0, norm=0.0, steps=2), "raise norm"),
]


@pytest.mark.parametrize(("editor", "remedy"), SINGULAR, ids=lambda one: type(one).__name__)
def test_a_singular_system_says_what_to_do(editor, remedy):
    lens = tiny_lens("gptj")
    C0 = covariance(lens, TEXTS[:1], [1], max_tokens=5)
    before = lens.w_out(1).clone()
    with pytest.raises(qv.QVLensError, match=f"singular: {remedy}.*more text"):
        qv.edit(lens, REQUESTS, editor, statistics=C0, templates=TEMPLATES)
    assert torch.equal(lens.w_out(1), before)


WRONG = {
    "L2 of AlphaEdit must be a finite number above 0": qv.AlphaEdit(layers=(1,), L2=0.0),
    "end_of_text of LocFT must be True or False, got 'no'": qv.LocFT(layer=1, end_of_text="no"),
    "unedited of SimIE must be True or False": qv.SimIE(editor=ROME, unedited="no"),
    "layers of MEMIT are several, as": qv.MEMIT(layers=1),
    "layers of LoRA are several, as": qv.LoRA(layers=1),
    "value_layers of ACE are several, as": qv.ACE(value_layers=1, query_layers=(0,)),
    "layers of EMMET are several": qv.EMMET(layers=(layer for layer in (1, 2))),
    "parameters of LoRA are several": qv.LoRA(parameters="W_out"),
    "at least one weight": qv.LoRA(parameters=()),
    "needs at least one layer": qv.LoRA(layers=()),
}


@pytest.mark.parametrize("said", WRONG)
def test_settings_of_another_kind_are_refused(said):
    lens = tiny_lens("gptj")
    with pytest.raises(qv.QVLensError, match=said):
        qv.edit(lens, REQUESTS, WRONG[said], statistics=covariance(lens, TEXTS, [1]))


def test_the_anchor_of_an_editor_out_of_its_bounds():
    lens = tiny_lens("gptj")
    with pytest.raises(qv.QVLensError, match="lr of MEMIT must be"):
        qv.norm_anchor(lens, REQUESTS, qv.MEMIT(layers=(1,), lr=-1.0))
    memit = qv.MEMIT(layers=(1,), lam=1.0, steps=2)
    assert qv.norm_anchor(lens, REQUESTS[0], memit) == qv.norm_anchor(lens, REQUESTS[:1], memit)
    lens.w_out(1).mul_(1.1)
    with pytest.raises(
        qv.QVLensError, match=r"anchor, of the unedited model.*were written to since"
    ):
        qv.norm_anchor(lens, REQUESTS, memit)


@pytest.mark.parametrize(
    "editor",
    [qv.ENCORE(layers=(1,), lam=1.0, norm=0.1, steps=4), qv.UltraEdit(layers=(1,), lr=1e-3)],
    ids=lambda editor: type(editor).__name__,
)
def test_a_loaded_patch_is_the_same_bit_for_bit(editor, tmp_path):
    lens = tiny_lens("gptj")
    requests = [
        qv.Fact("The capital of {} is", name, "Oslo").to("Quorix Vane")
        for name in ("Norway", "Spain", "France", "Italy", "Greece", "Poland")
    ]
    patch = qv.edit(
        lens, requests, editor, statistics=covariance(lens, TEXTS, [1]), templates=TEMPLATES
    )
    loaded = qv.Patch.load(patch.save(tmp_path / "patch"))
    for key, delta in patch.deltas.items():
        assert torch.equal(delta.dense(), loaded.deltas[key].dense())
