"""Records as they are written down."""

from __future__ import annotations

import pytest

import qv_lens as qv
from qv_lens.errors import FactError
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
        ({"edits": request}, "edits are EditRequests"),
        ({"answer": None}, "answer must be"),
        ({"new_answer": ["b"]}, "new_answer must be"),
        ({"hops": ("q", "c", "d")}, "hops are Hops"),
        ({"new_hops": None}, "new_hops are Hops"),
        ({"edited": 0}, r"\[0\] for the first; got 0"),
        ({"edited": None}, "got None"),
        ({"edited": (0,)}, "0 new_hops"),
    ):
        with pytest.raises(FactError, match=said):
            qv.MultiHopCase(**{**usual, **changed})


def test_what_is_given_once_is_kept():
    """A generator was read by the check, and the record held nothing."""
    edits = (FACT.to("golf"),)
    probe, hop = Probe("Elena likes", "golf"), Hop("q", "c", "d", aliases=["e"])
    chain = MultiHopCase(
        0,
        (one for one in edits),
        (text for text in ("Where?", "In which?")),
        "a",
        "b",
        new_hops=(one for one in [hop]),
        edited=[0],
        clozes=(text for text in ["It is"]),
    )
    assert chain == MultiHopCase(
        0, edits, ("Where?", "In which?"), "a", "b", (), (), (), (hop,), (0,), ("It is",)
    )
    case = EditCase(
        FACT.to("golf"),
        paraphrases=(one for one in [probe]),
        neighbours=(one for one in [probe, FACT]),
        onward=((one for one in (probe, probe)) for _ in range(2)),
        portability=[("Reasoning", (one for one in [probe]))],
        generation=(text for text in ["Elena"]),
    )
    assert case == EditCase(
        FACT.to("golf"),
        (probe,),
        (probe, FACT),
        ((probe, probe),) * 2,
        (("Reasoning", (probe,)),),
        generation=("Elena",),
    )
    assert len({chain, chain}) == len({case, case}) == 1  # a record of lists has no hash


@pytest.mark.parametrize("onward", [None, Probe("a", "b"), [Probe("a", "b")], [("a", "b")]])
def test_onward_is_pairs_of_probes(onward):
    with pytest.raises(FactError, match="EditCase's onward"):
        EditCase(FACT.to("golf"), onward=onward)
