"""What notebooks of this field do around an edit: no_grad, numpy numbers, contexts in any order, a
BOS in front."""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

import qv_lens as qv
from qv_lens.editing.keys import STARTS, contexts
from qv_lens.editing.layer_by_layer import search_ahead
from qv_lens.editing.statistics import TOKENS, Statistics, _batches, covariance
from qv_lens.errors import ConfigError, EditError
from qv_lens.models.lens import Lens
from tests.editing.test_closed_form import REQUESTS, TEXTS
from tests.editing.test_methods import EVERY, named
from tests.models import tiny_hf, tiny_lens, tokenizer

TEMPLATES = ("{}", "It is known. {}", "I went. {}")


@pytest.fixture(scope="module")
def lens():
    return tiny_lens("gptj", dtype=torch.float32)


@pytest.fixture(scope="module")
def statistics(lens):
    return covariance(lens, TEXTS, range(3), modules=("ffn", "attn"))


@pytest.mark.parametrize("editor", EVERY, ids=named)
@pytest.mark.filterwarnings("ignore:Value layers")
def test_every_editor_works_with_gradients_switched_off(lens, statistics, editor):
    usual = qv.edit(lens, REQUESTS, editor, statistics=statistics, templates=TEMPLATES)
    with torch.no_grad():
        quiet = qv.edit(lens, REQUESTS, editor, statistics=statistics, templates=TEMPLATES)
    torch.set_grad_enabled(False)
    try:
        off = qv.edit(lens, REQUESTS, editor, statistics=statistics, templates=TEMPLATES)
    finally:
        torch.set_grad_enabled(True)
    for key, delta in usual.deltas.items():
        assert torch.equal(delta.dense(), quiet.deltas[key].dense())
        assert torch.equal(delta.dense(), off.deltas[key].dense())


def test_numbers_of_numpy_and_torch_are_numbers(lens, statistics, tmp_path):
    plain = qv.MEMIT(layers=(0, 1), lam=5.0, steps=3, lr=0.5)
    odd = qv.MEMIT(
        layers=range(np.int64(0), np.int64(2)),
        lam=np.float32(5),
        steps=np.int32(3),
        lr=torch.tensor(0.5),
    )
    wanted = qv.edit(lens, REQUESTS, plain, statistics=statistics, templates=TEMPLATES)
    patch = qv.edit(
        lens,
        REQUESTS,
        odd,
        statistics=statistics,
        templates=TEMPLATES,
        seed=np.int64(0),
        batch_size=np.int64(2),
    )
    again = qv.Patch.load(patch.save(tmp_path / "patch"))
    assert again.info == patch.info
    assert patch.info["hyperparameters"] == wanted.info["hyperparameters"]
    for key, delta in wanted.deltas.items():
        assert torch.equal(delta.dense(), again.deltas[key].dense())
    rome = qv.ROME(layer=np.int64(1), steps=2, mom2_adjustment=np.False_)
    qv.edit(lens, REQUESTS[0], rome, templates=TEMPLATES).save(tmp_path / "rome")


def test_the_bare_context_counts_wherever_it_stands(lens, statistics):
    editor = qv.ROME(layer=1, steps=4)
    first = qv.edit(lens, REQUESTS[0], editor, statistics=statistics, templates=TEMPLATES)
    last = qv.edit(
        lens, REQUESTS[0], editor, statistics=statistics, templates=[*TEMPLATES[1:], "{}"]
    )
    assert torch.equal(first.deltas[1, "W_out"].dense(), last.deltas[1, "W_out"].dense())
    for templates, says in (
        (TEMPLATES[1:], "lack the bare one"),
        ((), "lack the bare one"),
        ("{}", "several contexts"),
        (("{}", "no place"), "holds {} once"),
        (("{}", "{} {}"), "holds {} once"),
        (("{}", None), "holds {} once"),
    ):
        with pytest.raises(EditError, match=says):
            qv.edit(lens, REQUESTS[0], editor, statistics=statistics, templates=templates)
        with pytest.raises(EditError, match=says):
            search_ahead(lens, REQUESTS, editor, templates=templates)


def test_held_out_text_is_several_texts(lens):
    with pytest.raises(EditError, match="several texts"):
        qv.edit(lens, REQUESTS[0], qv.FT(layer=1), held_out="Helloworld")


def test_sampled_contexts_are_as_long_as_the_releases(lens):
    """Their lengths count the first token: MEMIT "The" and nine more, ROME the start of a text and
    four or nine more."""
    seen = []

    def asked(rows, *arguments, **options):
        if not any(rows is one for one in seen):
            seen.append(rows)  # the sampler's own lists, which grow
        return original(rows, *arguments, **options)

    original = lens.logits_at
    lens.logits_at = asked
    try:
        contexts(lens, 0, "memit")
        contexts(lens, 0, "rome")
    finally:
        del lens.logits_at
    assert [[len(row) for row in rows] for rows in seen] == [
        [10] * len(STARTS),
        [5] * 10,
        [10] * 10,
    ]


# ------------------------------------------------------------------ statistics


def with_bos(**options) -> Lens:
    return Lens.from_hf(tiny_hf("gptj", torch.float32), tokenizer(), prepend_bos=True, **options)


def test_statistics_are_of_the_lenss_own_tokens(lens):
    """With a BOS in front of each text where edits read one: by a loop on Hugging Face alone."""
    bos = with_bos()
    got = covariance(bos, TEXTS[:30], [1])
    keys = []
    handle = bos.hf.transformer.h[1].mlp.fc_out.register_forward_pre_hook(
        lambda _, args: keys.append(args[0][0].double())
    )
    for text in TEXTS[:30]:
        bos.hf(torch.tensor([[bos.tokenizer.bos_token_id, *bos.tokenizer(text)["input_ids"]]]))
    handle.remove()
    k = torch.cat(keys)
    assert got.tokens == len(k)
    torch.testing.assert_close(got.C0[1], k.T @ k / len(k), atol=1e-6, rtol=1e-5)
    assert not torch.allclose(got.C0[1], covariance(lens, TEXTS[:30], [1]).C0[1], rtol=1e-2)


def test_statistics_know_whether_a_bos_was_there(lens, tmp_path):
    bos = with_bos()
    kept = covariance(bos, TEXTS[:30], [1], folder=tmp_path / "bos")
    again = Statistics.load(tmp_path / "bos")
    assert again.prepend_bos
    assert torch.equal(again.of(bos, 1), kept.C0[1])
    with pytest.raises(EditError, match="prepend_bos=True"):
        again.of(lens, 1)
    with pytest.raises(EditError, match="prepend_bos"):
        qv.edit(lens, REQUESTS[0], qv.MEMIT(layers=(1,), steps=2), statistics=again)
    with pytest.raises(EditError, match="prepend_bos"):
        covariance(lens, TEXTS[:30], [1], folder=tmp_path / "bos")


def test_texts_are_read_up_to_the_context_or_as_asked(lens):
    long = " ".join(TEXTS)
    context = lens.backend_adapter.cfg.n_ctx
    assert covariance(lens, [long], [1]).tokens == context
    assert covariance(lens, [long], [1]).max_tokens == context
    assert covariance(lens, [long], [1], max_tokens=7).tokens == 7
    with pytest.raises(EditError, match="max_tokens must be a whole number of at least 1"):
        covariance(lens, [long], [1], max_tokens=0)


def test_batches_hold_every_row_once_and_fit(lens):
    texts = [text for text in TEXTS[:40] if text]
    for size, longest in ((3, 100), (1000, 5)):
        batches = list(_batches(lens, texts, size, longest))
        rows = sorted(row for batch in batches for row in batch)
        assert rows == sorted(lens.tokenizer(text)["input_ids"][:longest] for text in texts)
        assert all(len(batch) <= size for batch in batches)
    many = ["Norway " * 100] * (TOKENS // 100)
    assert all(
        len(batch) * max(map(len, batch)) <= TOKENS for batch in _batches(lens, many, 10**6, 100)
    )


def test_an_edit_keeps_its_lens_to_itself(lens, statistics):
    """A pass of another thread during an edit would read half-written weights."""
    editor = dataclasses.replace(next(each for each in EVERY if type(each).__name__ == "MEMIT"))
    said = []

    @dataclasses.dataclass(frozen=True)
    class Watched(qv.MEMIT):
        def solver(self, job):
            with ThreadPoolExecutor(1) as pool:
                said.append(pool.submit(job.lens.next_token_logits, "Olga Pelodan").exception())
            return super().solver(job)

    qv.edit(lens, REQUESTS, Watched(layers=editor.layers, steps=2), statistics=statistics)
    assert isinstance(said[0], ConfigError)
    assert ThreadPoolExecutor(1).submit(lens.next_token_logits, "Olga Pelodan").result() is not None


def test_the_same_request_twice(lens):
    """KN would move its rows twice; UltraEdit has no deviation, and says that it writes nothing."""
    once, twice = (qv.edit(lens, REQUESTS[:1] * times, qv.KN(steps=3)) for times in (1, 2))
    assert once.deltas.keys() == twice.deltas.keys()
    for key, delta in once.deltas.items():
        torch.testing.assert_close(delta.dense(), twice.deltas[key].dense())
    for times in (1, 2):
        with pytest.warns(UserWarning, match="has no deviation"):
            patch = qv.edit(lens, REQUESTS[:1] * times, qv.UltraEdit(layers=(1,)))
        assert patch.deltas[1, "W_out"].norm() == 0
