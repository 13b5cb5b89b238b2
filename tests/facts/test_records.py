"""Records as they are written down."""

from __future__ import annotations

import pytest

import qv_lens as qv
from qv_lens.facts.records import EditCase, EditRequest, Fact, Hop, MultiHopCase, Probe

FACT = qv.Fact("{} plays the sport of", "Elena Morefeld", "fencing")
NAMES = {kind.__name__: kind for kind in (Fact, EditRequest, Probe, Hop, EditCase, MultiHopCase)}


def test_a_record_is_written_as_it_would_be_made():
    case = EditCase(FACT.to("golf"), neighbours=(Probe("Ann plays", "chess", space=True),))
    chain = MultiHopCase(3, (FACT.to("golf"),), ("Where?",), "a", "b", hops=(Hop("q", "c", "d"),))
    for record in (FACT, case.request, case, chain):
        assert eval(repr(record), NAMES) == record
    assert repr(FACT) == (
        "Fact(prompt='{} plays the sport of', subject='Elena Morefeld', answer='fencing')"
    )
    assert repr(Fact("{} is", "A", "b")) != repr(Fact("{} is", "A", "b", space=False))


@pytest.mark.parametrize(
    "probes", [{"paraphrases": ("What?",)}, {"neighbours": "text"}, {"generation": "Elena plays"}, {"neighbours": 3}]
)  # fmt: skip
def test_probes_of_a_case_are_facts_and_texts(probes):
    request = qv.Fact("{} plays", "Elena", "fencing").to("golf")
    with pytest.raises(qv.QVLensError, match=f"EditCase's {next(iter(probes))} must be"):
        qv.EditCase(request, **probes)


def test_a_chain_has_requests_and_questions():
    request = qv.Fact("{} plays", "Elena", "fencing").to("golf")
    usual = {
        "case_id": 0,
        "edits": (request,),
        "questions": ("Who?",),
        "answer": "a",
        "new_answer": "b",
    }
    assert qv.MultiHopCase(**usual).requests == (request,)
    for changed, said in (
        ({"questions": "Who?"}, "questions must be"),
        ({"edits": request}, "edits are requests"),
    ):
        with pytest.raises(qv.QVLensError, match=said):
            qv.MultiHopCase(**{**usual, **changed})
