"""C0 in the user's cache: computed once, whole or absent, never another model's, text's or
setting's."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

import qv_lens as qv
from qv_lens.cache import cache_folder
from qv_lens.editing import kept_statistics as kept
from qv_lens.editing.kept_statistics import kept_covariance
from qv_lens.editing.statistics import Statistics, covariance
from tests.models import tiny_lens

TEXTS = ["Olga Pelodan works for Nortek.", "Oslo is the capital of Norway.", "Tim plays golf."]


@pytest.fixture
def lens():
    return tiny_lens("gptj", dtype=torch.float32)


@pytest.fixture
def computed(tmp_path, monkeypatch):
    """An empty cache, and the layers of every computation."""
    monkeypatch.setenv("QV_LENS_CACHE", str(tmp_path / "cache"))
    calls = []

    def counted(lens, texts, layers, **options):
        calls.append(sorted(layers))
        return covariance(lens, texts, layers, **options)

    monkeypatch.setattr(kept, "covariance", counted)
    return calls


def same(a: Statistics, b: Statistics) -> bool:
    pairs = [(a.C0, b.C0), (a.attention, b.attention)]
    tensors = all(set(x) == set(y) and all(torch.equal(x[k], y[k]) for k in x) for x, y in pairs)
    return tensors and (a.tokens, a.corpus, a.fingerprint, a.max_tokens) == (
        b.tokens,
        b.corpus,
        b.fingerprint,
        b.max_tokens,
    )


def test_each_layer_is_computed_once(lens, computed):
    first = kept_covariance(lens, TEXTS, [1, 2])
    assert same(first, covariance(lens, TEXTS, [1, 2]))
    assert same(kept_covariance(lens, TEXTS, [2, 1]), first)
    both = kept_covariance(lens, TEXTS, range(3), modules=("ffn", "attn"))
    assert same(both, covariance(lens, TEXTS, range(3), modules=("ffn", "attn")))
    assert same(kept_covariance(lens, TEXTS, [2]), covariance(lens, TEXTS, [2]))
    assert computed == [[1, 2], [0, 1, 2]]


def test_another_text_model_or_setting_is_computed_again(lens, computed):
    kept_covariance(lens, TEXTS, [1])
    kept_covariance(lens, TEXTS[:2], [1])
    kept_covariance(lens, [" ".join(TEXTS)], [1])
    kept_covariance(lens, TEXTS, [1], max_tokens=4)
    kept_covariance(qv.Lens(lens.model, tokenizer=lens.tokenizer, prepend_bos=True), TEXTS, [1])
    lens.w_out(0)[0, 0] += 1.0
    lens = qv.Lens(lens.model, tokenizer=lens.tokenizer)
    kept_covariance(lens, TEXTS, [1])
    assert computed == [[1]] * 6
    handle = lens.model.blocks[0].hook_resid_pre.register_forward_hook(lambda *_: None)
    with pytest.raises(qv.QVLensError, match="take off the hooks"):
        kept_covariance(lens, TEXTS, [1])  # what a hook of the user's own does, nobody knows
    handle.remove()
    with (
        pytest.raises(qv.QVLensError, match="bare model"),
        lens.intervene(qv.Zero(qv.NeuronSet.of([(0, 0)]))),
    ):
        kept_covariance(lens, TEXTS, [1])


def test_what_is_damaged_is_computed_again(lens, computed, tmp_path):
    whole = kept_covariance(lens, TEXTS, [1])
    for file in (tmp_path / "cache").rglob("statistics.safetensors"):
        file.write_bytes(file.read_bytes()[:40])
    assert same(kept_covariance(lens, TEXTS, [1]), whole)
    assert same(kept_covariance(lens, TEXTS, [1]), whole)
    assert computed == [[1], [1]]


def test_a_kill_leaves_nothing_that_counts(lens, computed, tmp_path, monkeypatch):
    with monkeypatch.context() as broken:
        broken.setattr(kept.os, "rename", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            kept_covariance(lens, TEXTS, [1])
    (left,) = (tmp_path / "cache" / "statistics").iterdir()
    assert list(left.iterdir()) == []
    (left / ".partial-x").mkdir()
    os.utime(left / ".partial-x", (0, 0))
    kept_covariance(lens, TEXTS, [1])
    assert [path.name for path in left.iterdir()] == ["1.ffn"]


@pytest.mark.skipif(sys.platform != "linux", reason="an unwritable path is taken from /proc")
def test_what_cannot_be_kept_is_used_all_the_same(lens, computed, monkeypatch, tmp_path):
    monkeypatch.setenv("QV_LENS_CACHE", "/proc/cache")
    with pytest.warns(UserWarning, match="cannot be kept in /proc/cache"):
        found = kept_covariance(lens, TEXTS, [1])
    assert same(found, covariance(lens, TEXTS, [1]))
    monkeypatch.setenv("QV_LENS_CACHE", str(tmp_path / "full"))
    monkeypatch.setattr(kept.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10_000}))
    with pytest.warns(UserWarning, match="0.0 GB are free"):
        kept_covariance(lens, TEXTS, [1])
    assert not list((tmp_path / "full").rglob("statistics.json"))


def test_where_it_lies(monkeypatch, tmp_path):
    monkeypatch.setenv("QV_LENS_CACHE", "")
    assert cache_folder() is None
    monkeypatch.delenv("QV_LENS_CACHE")
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_folder() == Path("/somewhere/qv_lens")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # the specification: not absolute, not used
    assert cache_folder() == tmp_path / ".cache/qv_lens"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert cache_folder() == tmp_path / "Library/Caches/qv_lens"
