"""Every number among an editor's settings has bounds, and is refused beyond them before anything is
searched."""

from __future__ import annotations

from dataclasses import fields, replace
from math import inf, nan

import numpy as np
import pytest

import qv_lens as qv
from qv_lens.editing.bounds import check_bounds
from qv_lens.editing.editors import editors
from qv_lens.editing.presets import presets, with_settings
from qv_lens.errors import EditError

#: what has other checks: a layer against the model
ELSEWHERE = {"layer"}
NUMBERS = [
    (name, each.name)
    for name, kind in editors().items()
    for each in fields(kind)
    if type(each.default) in (int, float) and each.name not in ELSEWHERE
]


@pytest.mark.parametrize(("method", "name"), NUMBERS)
def test_no_number_is_taken_that_means_nothing(method, name):
    editor = editors()[method]()
    check_bounds(editor)
    for value in (nan, -1.0, -1, "0.5", True):
        with pytest.raises(EditError, match=f"^{name} of {method} must be "):
            check_bounds(replace(editor, **{name: value}))


@pytest.mark.parametrize(
    ("editor", "said"),
    [
        (qv.ROME(steps=0), "steps of ROME must be a whole number of at least 1, got 0."),
        (qv.MEMIT(steps=2.5), "steps of MEMIT must be a whole number of at least 1, got 2.5."),
        (qv.MEMIT(lam=0), "lam of MEMIT must be a finite number above 0, got 0."),
        (qv.FT(lr=inf), "lr of FT must be a finite number above 0, got inf."),
        (qv.FT(clamp=0.0), "clamp of FT must be a number above 0, got 0.0."),
        (qv.KNE(share=5.0), "share of KNE must be a share, above 0 and at most 1, got 5.0."),
        (qv.KNE(located=0), "located of KNE must be a whole number of at least 1, got 0."),
        (qv.LoRA(dropout=1.0), "dropout of LoRA must be a share, at least 0 and below 1, got 1.0."),
        (qv.CTP(alone=(1e-4, 0, 0.1)), r"alone\[1\] of CTP must be a whole number of at least 1"),
        (qv.CTP(alone=(1e-4, 5)), "alone of CTP must be 3 values"),
    ],
)
def test_an_edit_is_refused_and_nothing_is_written(editor, said):
    lens = qv.load("toy-gptj")
    fact = qv.Fact("{} plays the sport of", "Elena Morefeld", "fencing")
    for call in (
        lambda: qv.edit(lens, fact.to("golf"), editor),
        lambda: qv.evaluate(lens, [qv.EditCase(fact.to("golf"))], editor=editor),
    ):
        with pytest.raises(EditError, match=said):
            call()
    assert not lens.patches


def test_what_is_at_the_bounds_is_taken():
    for editor in (
        qv.MEMIT(clamp=inf, weight_decay=0, kl=0, damp=1.0, spectrum=0.0),
        qv.CTP(lam=0.0, bottom=0),
        qv.FT(clamp=None, stop=0),
        qv.KNE(share=1.0, located=None),
        qv.NSE(far=inf),
        qv.FT(steps=np.int64(3), lr=np.float32(1e-3)),
    ):
        check_bounds(editor)


def test_a_changed_preset_is_refused_before_a_model_is_loaded():
    preset = presets("toy-gptj")["MEMIT"].editor
    with pytest.raises(EditError, match="lam of MEMIT must be a finite number above 0, got -1"):
        with_settings(preset, {"lam": -1})
