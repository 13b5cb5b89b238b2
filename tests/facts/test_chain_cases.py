"""Chains of the atlas with edits: every one of them, followed by hand through the atlas's facts."""

from __future__ import annotations

import pytest

import qv_lens as qv
from qv_lens.facts.atlas import bare, chains
from qv_lens.facts.chain_cases import chain_case

FACTS = {(fact.relation, bare(fact.subject)): fact for fact in qv.atlas()}


def folded(*names: str) -> set[str]:
    return {bare(name).casefold() for name in names}


@pytest.mark.parametrize("seed", [0, 1])
def test_edits_lead_to_the_new_answer_and_nothing_else_is_edited(seed):
    kinds = set()
    for number, chain in enumerate(chains()):
        case = chain_case(chain, seed, number)
        assert case is not None
        kinds.add(case.edited)
        assert (case.case_id, case.questions, case.clozes) == (
            number,
            (chain.question,),
            (chain.cloze,),
        )
        told = {(r.fact.relation, bare(r.fact.subject)): r.new for r in case.edits}
        assert len(told) == len(case.edits) == len(case.edited)
        for request in case.edits:  # facts of the atlas, to what is false of them
            assert FACTS[request.fact.relation, bare(request.fact.subject)] == request.fact
            true = folded(request.fact.answer, *request.fact.aliases)
            assert bare(request.new).casefold() not in true
        # from the chain's subject along its relations, before and after
        start, relations = (
            bare(chain.first.subject),
            (chain.first.relation, chain.second.relation),
        )
        for edits, hops, answer in (
            ({}, case.hops, case.answer),
            (told, case.new_hops, case.new_answer),
        ):
            at = start
            for relation, hop in zip(relations, hops, strict=True):
                fact = FACTS[relation, at]
                said = edits.get((relation, at), fact.answer)
                assert (hop.cloze, hop.subject, hop.answer) == (fact.text, fact.subject, said)
                at = bare(said)
            assert hops[-1].answer == answer
        assert set(told) <= {(hop.relation, bare(hop.subject)) for hop in case.new_hops}
        assert not folded(case.answer, *case.aliases) & folded(case.new_answer, *case.new_aliases)
    assert kinds == {(0,), (1,), (0, 1)}


def test_cases_follow_the_seed():
    chain = chains()[7]
    assert chain_case(chain, 3) == chain_case(chain, 3)
    assert len({chain_case(chain, seed).new_answer for seed in range(20)}) > 1
