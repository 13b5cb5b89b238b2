"""A study of a model that knows nothing, and of a fact that nobody collected: every step runs or
says why not."""

from __future__ import annotations

import math

import pytest
import torch

import qv_lens as qv
from qv_lens.case_study import ace_and_memit, located_editor
from qv_lens.evaluation.faithfulness import lost_at
from qv_lens.material import atlas_material
from tests.models import tiny_lens

FACT = qv.Fact("{} was painted by", "The Night Watch", "Rembrandt")


@pytest.fixture(scope="module")
def lens():
    return tiny_lens("qwen3-gqa", dtype=torch.float32, n_layers=6)


@pytest.mark.filterwarnings("ignore:C0 is singular", "ignore:.*W'.*")
def test_a_model_that_knows_nothing(lens, tmp_path):
    before = [parameter.clone() for parameter in lens.model.parameters()]
    found = qv.study(lens, FACT, "Vermeer", edits=1)
    assert not found.known
    assert found.restored
    assert all(
        torch.equal(was, now) for was, now in zip(before, lens.model.parameters(), strict=True)
    )
    assert found.ablation.empty
    assert found.suppression.empty
    assert set(found.removal["whose"]) == {"this fact"}
    assert found.settings["ACE"] == found.settings["MEMIT"] == "scaled to the model, untuned"
    ace = located_editor(lens, found.layers, ace_and_memit(lens)["ACE"].editor)
    # what is located is what is edited
    assert str(list(ace.value_layers)) in found.edits["layers"].iloc[0]
    page = qv.report(found, tmp_path / "page.html").read_text()
    assert "does not know this fact" in page
    assert f"{100 * math.exp(found.logprob):.1f}%" in page
    assert "Left out: no other facts of this kind" in page
    assert "facts of other kinds" in page
    assert "0 of 0" not in page
    assert "pass others of its kind (--facts FILE)" in page
    table = lost_at(found.removal)
    assert len(table[table["ranking"] == "random"]) == 5
    assert "not what the model says to begin with" in page
    assert "not known before" in page


def test_material_of_the_atlas_around_any_fact(lens, monkeypatch):
    """What a model that answers everything is asked."""
    monkeypatch.setattr("qv_lens.material._known", lambda lens, asked: list(asked))
    fact = qv.atlas("capital")[0]
    found = atlas_material(lens, fact, "Rome")
    assert all(
        other.relation == fact.relation and other.subject != fact.subject for other in found.same
    )
    assert all(other.relation != fact.relation for other in found.other)
    assert found.cases[0].request == fact.to("Rome")
    language = next(each for each in qv.atlas("language") if each.subject == "France")
    # a neighbour whose true answer is the new one would be kept by an edit towards it
    for seed in range(12):
        case = atlas_material(lens, language, "Spanish", seed).cases[0]
        assert case.neighbours
        assert all("Spanish" not in (near.answer, *near.aliases) for near in case.neighbours)
    assert all(near in found.same for near in found.cases[0].neighbours)
    assert [case.request.fact for case in found.cases[1:]] == list(found.same)
    assert all("Rome" not in (near.answer, *near.aliases) for near in found.cases[0].neighbours)
    assert found.chains
    assert found.texts
    stranger = atlas_material(lens, FACT, "Vermeer")
    assert stranger.same == ()
    assert stranger.cases[0].neighbours
    assert stranger.chains == ()


def test_the_bundled_models_are_asked_about_their_own_world():
    toy = qv.load("toy-gptj")
    with pytest.raises(qv.QVLensError, match="does not hold"):
        qv.study(toy, FACT, "Vermeer")
