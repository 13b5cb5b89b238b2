"""Files of presets: what is written is read, the user's go before the package's, damage is told."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

import qv_lens as qv
from qv_lens.editing import editors, preset_files
from qv_lens.editing.preset_files import entries_of, entry_of, file_name, write_presets
from qv_lens.editing.presets import preset_of, presets
from qv_lens.world import cases as world_cases
from qv_lens.world import generator

HEADER = {"model": "some/model", "fingerprint": "abc"}


@pytest.mark.parametrize("name", presets("toy-gptj"))
def test_every_editor_survives_the_file(name, tmp_path):
    editor = presets("toy-gptj")[name].editor
    file = tmp_path / "mine.toml"
    write_presets(file, HEADER, {name: entry_of(editor, 'said "so": 98%')})
    found = presets(str(file))
    assert list(found) == [name]
    assert found[name].editor == editor
    assert found[name].source == 'said "so": 98%'


@dataclasses.dataclass(frozen=True)
class Odd:
    """Settings that JSON writes otherwise than TOML."""

    far: float = math.inf
    near: float = -math.inf
    text: str = 'a "quoted" \\ \x7f \n \U0001f600'
    table: dict = dataclasses.field(default_factory=lambda: {"a b": [1, 2.5], "c": {"d": True}})
    layers: tuple = (1, 2)
    free: float | None = None


def test_what_json_writes_otherwise_than_toml(tmp_path):
    file = tmp_path / "mine.toml"
    write_presets(file, HEADER, {"Odd": entry_of(Odd(), "\U0001f600 50%")})
    editor, source = preset_files.read_presets(file, {"Odd": Odd})["Odd"]
    assert editor == Odd()
    assert source == "\U0001f600 50%"


@pytest.mark.parametrize("editor", [qv.FTL(layer=1, clamp=None), qv.SimIE(editor=qv.FT(layer=1))])
def test_what_no_file_can_hold_is_refused(editor):
    with pytest.raises(qv.QVLensError, match="A file of presets cannot hold"):
        entry_of(editor, "mine")


def test_presets_of_the_cache_go_before_those_of_the_package(tmp_path, monkeypatch):
    monkeypatch.setenv("QV_LENS_CACHE", str(tmp_path / "cache"))
    package = tmp_path / "package"
    monkeypatch.setattr(preset_files, "PACKAGE", package)
    with pytest.raises(
        qv.QVLensError, match=r"no presets for the model 'some/model'.*qv-lens tune some/model"
    ):
        presets("some/model")
    write_presets(
        package / file_name("some/model"), HEADER, {"FT": entry_of(qv.FT(layer=1), "package")}
    )
    assert presets("some/model")["FT"].source == "package"
    mine = tmp_path / "cache" / "presets" / file_name("some/model")
    write_presets(mine, HEADER, {"FT": entry_of(qv.FT(layer=2), "mine")})
    assert presets("some/model")["FT"].editor == qv.FT(layer=2)
    write_presets(mine, HEADER, {"KN": entry_of(qv.KN(), "mine")})
    assert {name: preset.source for name, preset in presets("some/model").items()} == {
        "FT": "package",
        "KN": "mine",
    }
    write_presets(
        tmp_path / "cache" / "presets" / file_name("toy-gptj"),
        HEADER,
        {"FT": entry_of(qv.FT(layer=2), "mine")},
    )
    table = presets("toy-gptj")
    assert table["FT"].source == "mine"
    assert set(table) == {"FT"}  # the package patched here holds no others


def test_files_that_cannot_be_used_are_told(tmp_path):
    file = tmp_path / "mine.toml"
    for text, words in (
        ("this is no TOML", "Cannot read the presets"),
        ('["ROMEO"]\nsource = "x"\n[ROMEO.settings]\n', "Editor in .*ROMEO"),
        ("[MEMIT]\nlam = 3\n", "MEMIT needs a source and settings"),
        (
            '[MEMIT]\nsource = "x"\n[MEMIT.settings]\nlambda = 3\n',
            r"Setting of MEMIT in .*mine\.toml: 'lambda' not found",
        ),
        (
            '[MEMIT]\nsource = "x"\n[MEMIT.settings]\nlam = -1\n',
            r"mine\.toml, MEMIT: lam of MEMIT must be",
        ),
    ):
        file.write_text(text)
        with pytest.raises(qv.QVLensError, match=words):
            presets(str(file))
    with pytest.raises(qv.QVLensError, match="Cannot read the presets"):
        presets(str(tmp_path / "absent.toml"))
    (tmp_path / "folder").write_text("")
    with pytest.raises(qv.QVLensError, match="Cannot write the presets"):
        write_presets(tmp_path / "folder" / "x.toml", HEADER, {})
    assert entries_of_empty(tmp_path) == {}


def test_a_byte_order_mark_is_no_part_of_a_file(tmp_path):
    file = tmp_path / "mine.toml"
    text = '[MEMIT]\nsource = "x"\n[MEMIT.settings]\nlam = 3\n'
    file.write_text(text, encoding="utf-8-sig")
    assert presets(str(file))["MEMIT"].editor.lam == 3


def entries_of_empty(folder):
    write_presets(folder / "empty.toml", HEADER, {})
    return entries_of(folder / "empty.toml")


def test_an_editor_by_name_is_the_models_preset():
    """In any capitals; a name without a preset is refused with those that are there."""
    lens = qv.load("toy-gptj")
    fact = world_cases.facts(generator.build(0), "P641")[0]
    new = next(answer for answer in ("golf", "judo") if answer != fact.answer)
    by_name = qv.edit(lens, fact.to(new), "ft")
    by_hand = qv.edit(lens, fact.to(new), presets("toy-gptj")["FT"].editor)
    assert list(by_name.deltas) == list(by_hand.deltas)
    assert all(
        torch.equal(by_name.deltas[key].dense(), delta.dense())
        for key, delta in by_hand.deltas.items()
    )
    with pytest.raises(qv.QVLensError, match="Preset of toy-gptj for 'FTT' not found"):
        qv.edit(lens, fact.to(new), "FTT")
    for method in ("LocFT", "locft"):  # an editor that nobody tuned for this model
        with pytest.raises(qv.QVLensError, match="toy-gptj has no preset of LocFT, only of ACE"):
            preset_of("toy-gptj", method)
    frame = qv.evaluate(lens, [qv.EditCase(fact.to(new))], ["efficacy_acc"], "FT")
    assert frame["after"].tolist() == [1.0]


def test_the_registry_is_what_the_package_offers():
    """One list: what type checkers see, what is loaded, and what has a preset."""
    assert set(editors.HOMES) == set(editors.__all__)
    assert all(getattr(qv, name) is kind for name, kind in editors.editors().items())
    models = ("toy-gptj", "toy-qwen3", "EleutherAI/gpt-j-6B", "Qwen/Qwen3-8B")
    with_preset = {name.partition(".")[0] for model in models for name in presets(model)}
    assert with_preset == set(editors.HOMES)
