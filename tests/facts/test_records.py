"""Records as they are written down."""

from __future__ import annotations

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
