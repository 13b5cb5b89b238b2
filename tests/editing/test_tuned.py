"""Files of tuned presets: what is written is read, the user's go before the package's, damage is told."""

from __future__ import annotations

import pytest

import qv_lens as qv
from qv_lens.editing import tuned
from qv_lens.editing.presets import EDITORS, presets
from qv_lens.editing.tuned import entries_of, entry_of, file_name, write_tuned

HEADER = {"model": "some/model", "fingerprint": "abc"}


@pytest.mark.parametrize("name", presets("toy-gptj"))
def test_every_editor_survives_the_file(name, tmp_path):
    editor = presets("toy-gptj")[name].editor
    file = tmp_path / "mine.toml"
    write_tuned(file, HEADER, {name: entry_of(editor, 'said "so": 98%')})
    found = presets(str(file))
    assert list(found) == [name]
    assert found[name].editor == editor
    assert found[name].source == 'said "so": 98%'


def test_presets_of_the_cache_go_before_those_of_the_package(tmp_path, monkeypatch):
    monkeypatch.setenv("QV_LENS_CACHE", str(tmp_path / "cache"))
    package = tmp_path / "package"
    monkeypatch.setattr(tuned, "PACKAGE", package)
    with pytest.raises(qv.QVLensError, match=r"no presets for the model 'some/model'.*qv-lens tune some/model"):
        presets("some/model")
    write_tuned(package / file_name("some/model"), HEADER, {"FT": entry_of(qv.FT(layer=1), "package")})
    assert presets("some/model")["FT"].source == "package"
    mine = tmp_path / "cache" / "presets" / file_name("some/model")
    write_tuned(mine, HEADER, {"FT": entry_of(qv.FT(layer=2), "mine")})
    assert presets("some/model")["FT"].editor == qv.FT(layer=2)
    write_tuned(mine, HEADER, {"KN": entry_of(qv.KN(), "mine")})
    assert {name: preset.source for name, preset in presets("some/model").items()} == {"FT": "package", "KN": "mine"}
    write_tuned(tmp_path / "cache" / "presets" / file_name("toy-gptj"), HEADER, {"FT": entry_of(qv.FT(layer=2), "mine")})
    table = presets("toy-gptj")
    assert table["FT"].source == "mine"
    assert set(table) >= set(EDITORS)  # the others stay


def test_files_that_cannot_be_used_are_told(tmp_path):
    file = tmp_path / "mine.toml"
    for text, words in (
        ("this is no TOML", "Cannot read the presets"),
        ('["ROMEO"]\nsource = "x"\n[ROMEO.settings]\n', "Editor in .*ROMEO"),
        ("[MEMIT]\nlam = 3\n", "MEMIT needs a source and settings"),
        ('[MEMIT]\nsource = "x"\n[MEMIT.settings]\nlambda = 3\n', "a setting that it does not know"),
    ):
        file.write_text(text)
        with pytest.raises(qv.QVLensError, match=words):
            presets(str(file))
    with pytest.raises(qv.QVLensError, match="Cannot read the presets"):
        presets(str(tmp_path / "absent.toml"))
    (tmp_path / "folder").write_text("")
    with pytest.raises(qv.QVLensError, match="Cannot write the presets"):
        write_tuned(tmp_path / "folder" / "x.toml", HEADER, {})
    assert entries_of_empty(tmp_path) == {}


def entries_of_empty(folder):
    write_tuned(folder / "empty.toml", HEADER, {})
    return entries_of(folder / "empty.toml")
