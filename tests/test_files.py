"""Files that are whole or absent."""

from __future__ import annotations

import os
from pathlib import Path

import pandas as pd

from qv_lens.cli.edits import _write
from qv_lens.files import whole


def test_a_link_is_written_through_and_what_is_no_file_stays_what_it_is(tmp_path):
    target, link = tmp_path / "rows.csv", tmp_path / "link.csv"
    target.write_text("old")
    link.symlink_to(target)
    with whole(link) as partial:
        partial.write_text("new")
    assert link.is_symlink()
    assert target.read_text() == "new"
    with whole(Path(os.devnull)) as partial:
        partial.write_text("gone")
    assert not Path(os.devnull).is_file()


def test_rows_are_packed_as_their_name_says(tmp_path, capsys):
    frame = pd.DataFrame({"x": [1, 2]})
    for name in ("rows.csv", "rows.csv.gz"):
        _write(frame, tmp_path / name)
        pd.testing.assert_frame_equal(pd.read_csv(tmp_path / name), frame)
    assert capsys.readouterr().out.count("rows.csv") == 2
