"""MQuAKE's chains of facts (also MQuAKE-Remastered's) as cases."""

from __future__ import annotations

import re
from dataclasses import replace

from qv_lens.facts.fields import (
    Record,
    RefusedError,
    answer_of,
    extra_of,
    fact_of,
    list_of,
    names_of,
    number_of,
    object_of,
    table_of,
    text_of,
    texts_of,
)
from qv_lens.facts.records import Fact, Hop, MultiHopCase
from qv_lens.facts.words import word_places


def mquake(record: Record) -> MultiHopCase:
    """A chain of facts and its edits. Raises `RefusedError` for a field that cannot be used."""
    hops, new_hops = (
        _hops(record, "single_hops", "triples"),
        _hops(record, "new_single_hops", "new_triples"),
    )
    edited = _edited(record)
    clozes, questions = names_of(record, "clozes"), texts_of(record, "questions")
    if not questions:
        raise RefusedError("questions", "is empty: nothing to ask")
    edits = []
    for rewrite, hop in zip(rewrites_of(record), edited, strict=True):
        fact = fact_of(rewrite)
        fact = replace(fact, paraphrases=_question(rewrite.get("question"), fact.subject))
        via = (
            names_of(rewrite, "via")
            if rewrite.get("via") is not None
            else leading_to(fact, new_hops, hop)
        )
        edits.append(fact.to(object_of(rewrite, "target_new"), via))
    return MultiHopCase(
        number_of(record, "case_id"),
        tuple(edits),
        questions,
        answer_of(record["answer"], "answer"),
        answer_of(record["new_answer"], "new_answer"),
        names_of(record, "answer_alias"),
        names_of(record, "new_answer_alias"),
        hops,
        new_hops,
        edited,
        clozes,
        extra_of(
            record,
            "case_id",
            "requested_rewrite",
            "questions",
            "answer",
            "new_answer",
            "answer_alias",
            "new_answer_alias",
            "clozes",
        ),
    )


def _question(question: object, subject: str) -> tuple[str, ...]:
    """An edit's question as a prompt with {}, where it holds the subject once, as a word."""
    text = question if isinstance(question, str) else ""
    places = word_places(text, subject, case=True)
    if len(places) != 1 or "{}" in text:
        return ()
    start, stop = places[0]
    return (text[:start] + "{}" + text[stop:],)


def leading_to(fact: Fact, hops: tuple[Hop, ...], hop: int) -> tuple[str, ...]:
    """A two-hop prompt that ends at the fact: the subject is replaced by the hop before it as a
    noun phrase, where that hop's question or cloze can be turned into one ("What is the capital of
    Ghana?", "Who founded Intel?"). The questions of the case itself are never used."""
    if not hop:
        return ()
    before = hops[hop - 1]
    forms = (
        (r"(?:What|Who|Which) (?:is|are|was|were) (the .+)\?", "", before.question),
        (r"The (.+) (?:is|are)", "the ", before.cloze),
        (r"Who ((?!is |are |was |were ).+)\?", "the one who ", before.question),
    )
    for form, start, text in forms:
        if match := re.fullmatch(form, text):
            phrase = start + match[1]
            if re.search(r"(?:^|\s)the \{\}", fact.prompt, re.IGNORECASE):
                phrase = phrase.removeprefix("the ")
            question = fact.prompt.replace("{}", phrase)
            return (question[0].upper() + question[1:],)
    return ()


def rewrites_of(record: Record) -> list[Record]:
    """The edits of a record. Raises `RefusedError` where there are none."""
    rewrites = record["requested_rewrite"]
    if not rewrites:
        raise RefusedError("requested_rewrite", "is empty: nothing to edit")
    return [table_of(rewrite, "requested_rewrite") for rewrite in rewrites]


def _edited(record: Record) -> tuple[int, ...]:
    """Which hop of the new chain each edit belongs to: as the record says, or by its triple."""
    orig, count = _origin(record), len(rewrites_of(record))
    index, hops = orig.get("edit_triples_idx"), len(record["new_single_hops"])
    if index is None:
        triples = [list(t) for t in orig.get("new_triples") or ()]
        index = [
            triples.index(list(t)) for t in orig.get("edit_triples") or () if list(t) in triples
        ]
    if not isinstance(index, list) or not all(isinstance(i, int) and 0 <= i < hops for i in index):
        raise RefusedError(
            "edit_triples_idx", f"is {index!r}, not a list of hops from 0 to {hops - 1}"
        )
    if len(index) < count or not _name_the_edits(record, index):
        index = _by_object(record)
    if len(index) < count:
        raise RefusedError(
            "orig", f"says for {len(index)} of {count} edits which hop they belong to"
        )
    return tuple(index[:count])


def _name_the_edits(record: Record, index: list[int]) -> bool:
    """Whether the hops at these numbers are the edits', in their order."""
    answers, rewrites = _new_answers(record), rewrites_of(record)
    return all(
        answers[i] == object_of(rewrite, "target_new")
        for i, rewrite in zip(index, rewrites, strict=False)
    )


def _new_answers(record: Record) -> list[str]:
    """The answer of each hop after the edits."""
    hops = [table_of(hop, "new_single_hops") for hop in record["new_single_hops"]]
    return [answer_of(hop["answer"], "answer") for hop in hops]


def _by_object(record: Record) -> list[int]:
    """Which hop each edit belongs to, by its new object: of several hops with that answer the first
    about the edit's subject, else the first; no hop twice."""
    hops, answers = record["new_single_hops"], _new_answers(record)
    places: list[int] = []
    for rewrite in rewrites_of(record):
        name, subject = object_of(rewrite, "target_new"), str(rewrite.get("subject", ""))
        alike = [i for i, answer in enumerate(answers) if answer == name and i not in places]
        about = [i for i in alike if subject in str(hops[i].get("cloze", ""))]
        places += (about or alike)[:1]
    return places


def _origin(record: Record) -> Record:
    """The triples of a case: MQuAKE's `orig`; in MQuAKE-Remastered they are the record's own, the
    old ones as `orig_triples`."""
    if record.get("orig"):
        return table_of(record["orig"], "orig")
    return {key.removeprefix("orig_"): value for key, value in record.items() if "triples" in key}


def _hops(record: Record, field: str, triples: str) -> tuple[Hop, ...]:
    """A chain's links, each with subject and relation where the record's triples match the links
    one by one."""
    hops = [table_of(hop, field) for hop in list_of(record[field], field)]
    if not hops:
        raise RefusedError(field, "is empty: a chain has hops")
    orig = _origin(record)
    ids, names = (orig.get(key) or [] for key in (triples, f"{triples}_labeled"))
    cases = []
    for i, hop in enumerate(hops):
        text = text_of(hop["cloze"], "cloze")
        subject = names[i][0] if len(names) == len(hops) else None
        relation = ids[i][1] if len(ids) == len(hops) else None
        answer = answer_of(hop["answer"], "answer")
        cases.append(
            Hop(
                text_of(hop["question"], "question"),
                text,
                answer,
                names_of(hop, "answer_alias"),
                subject,
                relation,
            )
        )
    return tuple(cases)
