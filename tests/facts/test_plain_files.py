"""Files of facts, and what counts as another answer."""

from __future__ import annotations

import json

import pytest

import qv_lens as qv
from qv_lens.editing.preset_files import check_weights, entry_of, write_presets
from qv_lens.evaluation.cases import of_seed
from qv_lens.evaluation.questions import questions
from qv_lens.facts.benchmarks import read
from qv_lens.facts.records import EditCase


def test_a_fact_of_a_file_keeps_its_other_names(tmp_path):
    record = {
        "prompt": "{} is", "subject": "A", "answer": "b", "aliases": ["bee"], "paraphrases": ["{} equals"],
        "subject_aliases": ["Ay"],
    }  # fmt: skip
    file = tmp_path / "facts.json"
    file.write_text(json.dumps([record]))
    (fact,) = read(file).facts
    assert (fact.aliases, fact.paraphrases) == (("bee",), ("{} equals",))
    assert fact.subject_aliases == ("Ay",)
    file.write_text(json.dumps([record | {"paraphrases": ["no place"]}, record]))
    refused = read(file, skip=True).refused
    assert refused["field"].tolist() == ["prompt"]


@pytest.mark.parametrize("new", ["golf", " golf", "Golf"])
def test_a_neighbour_that_has_the_new_answer_is_no_rival(new):
    fact = qv.Fact("{} plays", "A", "fencing")
    near = (qv.Fact("{} plays", "B", "golf"), qv.Fact("{} plays", "C", "tennis"))
    groups = questions(EditCase(fact.to(new), neighbours=near))
    assert [probe.answer for probe in groups["near_old"]] == ["golf", "tennis"]
    assert [probe.text for probe in groups["rival_new"]] == ["C plays"]


def test_fewer_cases_than_asked_for_are_told():
    with pytest.warns(UserWarning, match="2 of the 10 asked for are left for seed 1"):
        assert of_seed(list(range(12)), 10, 1, "The file holds 12 edits") == [10, 11]


def test_settings_of_other_weights_are_not_added_to(tmp_path):
    file = tmp_path / "p.toml"
    check_weights(file, "a")  # there is none yet
    write_presets(file, {"model": "m", "fingerprint": "a"}, {"FT": entry_of(qv.FT(), "tuned")})
    check_weights(file, "a")
    with pytest.raises(qv.QVLensError, match=r"p.toml holds settings that were chosen for other"):
        check_weights(file, "b")
