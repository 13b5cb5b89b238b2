"""The atlas: facts of the real world, with phrasings, two-hop chains and edits made of them.

1. The tables in `tables/` hold facts, not sentences: a row names a thing and what is known about
   it; an empty field means that there is no single sure answer. Several names of one thing are
   separated by ";". What changes is dated: `as_of` is a year in which the holder was in office from
   1 January to 31 December; headquarters are those of 2020.
2. `atlas_relations` says which column of which table answers which Wikidata relation, and in which
   words it is asked.
3. `atlas` makes a `Fact` of every filled field; its category is ACE's, by `categories`.
4. `chains` joins two facts where the answer of the first is the subject of the second.
5. `edit_case` draws a counterfactual answer from the other answers of the relation, and takes
   neighbours from the relation, multi-hop probes from the chains, and KnowEdit's groups from these
   and from what else is known of the subject.
"""

from __future__ import annotations

import csv
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from qv_lens.errors import FactError, unknown
from qv_lens.facts.atlas_relations import PAIRS, RELATIONS, Relation, Source
from qv_lens.facts.categories import CATEGORIES
from qv_lens.facts.prompts import normalise
from qv_lens.facts.records import EditCase, EditRequest, Fact, Probe

TABLES = Path(__file__).parent / "tables"
#: a thing's city and its country: one follows from the other
PLACES = frozenset({"P131", "P17"})
#: how many neighbours, and at most how many multi-hop probes, an edit gets
PROBES = 5

Row = dict[str, str]


@dataclass(frozen=True)
class Chain:
    """Two facts, the second about the answer of the first, asked as one.

    Raises `FactError` if the second fact is about something else.
    """

    first: Fact
    """The fact that names the bridge."""
    second: Fact
    """The fact about the bridge; its answer is the chain's."""
    cloze: str
    """Both as one prompt, complete, ending right before the answer."""
    question: str
    """Both as one question."""

    def __post_init__(self) -> None:
        if bare(self.first.answer) != bare(self.second.subject):
            raise FactError(
                f"These facts are not a chain: the first ends at {self.first.answer!r}, the second "
                f"is about {self.second.subject!r}. Join facts where the first's answer is the "
                "second's subject."
            )

    @property
    def probe(self) -> Probe:
        """The chain as a prompt with its answer."""
        return Probe(self.cloze, self.second.answer, self.second.aliases)


def atlas(category: str | None = None) -> tuple[Fact, ...]:
    """Facts of the real world, in the order of the tables; with `category` only those of one of
    ACE's eight.

    Facts outside ACE's categories (where a landmark stands, who makes a product) have the category
    None.

    Raises `FactError` for a category that ACE does not have.

    >>> import qv_lens as qv
    >>> qv.atlas("capital")[0].text
    'The capital of France is'
    """
    if category is None:
        return _facts()
    names = sorted(set(CATEGORIES.values()))
    if category not in names:
        raise unknown("Category", category, names, error=FactError)
    return tuple(fact for fact in _facts() if fact.category == category)


@cache  # the tables are part of the package: what is read never changes
def _facts() -> tuple[Fact, ...]:
    facts = []
    for relation in RELATIONS:
        for source in relation.sources:
            for row in table(source.table):
                if row[source.answer]:
                    facts.append(_fact(relation, source, row))
    return tuple(facts)


def table(name: str) -> list[Row]:
    """The rows of one table, by column."""
    with (TABLES / f"{name}.tsv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))


def _fact(relation: Relation, source: Source, row: Row) -> Fact:
    prompts = [_dated(phrasing, row) for phrasing in relation.phrasings]
    answer = row[source.answer]
    aliases = _names(row, source.answer)
    if source.answer == "country":
        aliases += _country_names().get(answer, ())
    return Fact(
        prompt=prompts[0],
        subject=row[source.subject],
        answer=answer,
        relation=relation.id,
        category=CATEGORIES.get(relation.id),
        aliases=tuple(dict.fromkeys(aliases)),
        paraphrases=tuple(prompts[1:]),
        subject_aliases=_subject_names(source, row),
    )


def _names(row: Row, column: str) -> tuple[str, ...]:
    """The other names that a row gives for its entry in a column."""
    names = row.get(f"{column}_aliases") or ""
    return tuple(name for name in names.split(";") if name)


def _subject_names(source: Source, row: Row) -> tuple[str, ...]:
    subject = row[source.subject]
    names = _names(row, source.subject)
    if source.article and bare(subject) != subject:
        names = (bare(subject), *names)
    return names


@cache
def _country_names() -> dict[str, tuple[str, ...]]:
    """Country, without its article -> its other names, with its article first where it has one."""
    names = {}
    for row in table("countries"):
        country = row["country"]
        article = (country,) if bare(country) != country else ()
        names[bare(country)] = article + _names(row, "country")
    return names


def _dated(template: str, row: Row) -> str:
    """A template with the office and the year of its row filled in."""
    return template.replace("<office>", row.get("office") or "").replace(
        "<year>", row.get("as_of") or ""
    )


def bare(name: str) -> str:
    """A name without its article: "the Netherlands" -> "Netherlands"."""
    return name[4:] if name[:4].lower() == "the " else name


@cache
def _relations() -> dict[str, Relation]:
    return {relation.id: relation for relation in RELATIONS}


def relation_of(fact: Fact) -> Relation:
    """The relation of a fact of the atlas. Raises `FactError` for a fact whose
    relation is not one of the atlas."""
    relation = _relations().get(fact.relation or "")
    if relation is None:
        raise unknown("Relation", fact.relation, list(_relations()), error=FactError)
    return relation


def question(fact: Fact) -> str:
    """The question that asks for a fact of the atlas."""
    return _question(fact, _inside(fact))


def _question(fact: Fact, about: str) -> str:
    """A fact's question about a thing named in other words."""
    row = _dates(fact)
    return _dated(relation_of(fact).question, row).replace("{}", about)


def _inside(fact: Fact) -> str:
    """A subject as it stands inside a sentence: "The Louvre" -> "the Louvre"; titles of books stay
    as they are."""
    subject = fact.subject
    return (
        f"the {bare(subject)}"
        if relation_of(fact).lower and subject.startswith("The ")
        else subject
    )


def _in_front(subject: str) -> str:
    """A subject as it begins a sentence: "the Netherlands" -> "The Netherlands"; eBay stays."""
    return f"The{subject[3:]}" if subject.startswith("the ") else subject


@cache
def _rows() -> dict[tuple[str, str], Row]:
    """(Relation id, subject) -> its row."""
    rows = {}
    for relation in RELATIONS:
        for source in relation.sources:
            for row in table(source.table):
                rows[relation.id, row[source.subject]] = row
    return rows


def _dates(fact: Fact) -> Row:
    return _rows().get((fact.relation or "", fact.subject), {})


def _composed(first: Fact, second: Fact) -> Chain:
    noun = relation_of(first).noun.replace("{}", _inside(first))
    relation = relation_of(second)
    cloze = _dated(relation.chained, _dates(second)).replace("{}", noun)
    return Chain(first, second, cloze[0].upper() + cloze[1:], _question(second, noun))


@cache
def chains() -> tuple[Chain, ...]:
    """The two-hop chains of the atlas: every pair of facts that `PAIRS` joins, except those that
    come back to the start."""
    onward = _onward()
    rows = []
    for first in _facts():
        for relation in PAIRS.get(first.relation or "", ()):
            second = onward.get((relation, bare(first.answer)))
            if second is not None and bare(second.answer) != bare(first.subject):
                rows.append(_composed(first, second))
    return tuple(rows)


@cache
def _onward() -> dict[tuple[str, str], Fact]:
    """(Relation id, subject without its article) -> the fact."""
    return {(fact.relation or "", bare(fact.subject)): fact for fact in _facts()}


def edit_case(fact: Fact, seed: int = 0) -> EditCase:
    """An edit of a fact of the atlas to a false answer of the same kind, drawn by `seed`, with its
    probes.

    The new answer is an answer of another subject of the relation, never one that is accepted for
    this one. Neighbours are other subjects of the relation whose answer is not the new one.
    `onward` asks chains over the fact, before and after. KnowEdit's groups: portability "Reasoning"
    asks the same chains after the edit, locality "Relation_Specificity" other facts about the
    subject.

    Raises `FactError` for a fact that is not in the atlas.
    """
    if fact not in _facts():
        raise FactError(
            f"The fact {fact.text!r:.200} is not in the atlas: take one from qv.atlas(), unchanged."
        )
    rng = random.Random(f"{seed} {fact.relation} {fact.subject}")
    others = [other for other in _facts() if other.relation == fact.relation and other != fact]
    new = rng.choice(false_answers(fact))
    request = fact.to(new)
    near = neighbours(request, others, rng)
    probes = onward(fact, new)
    chosen = tuple(rng.sample(probes, min(PROBES, len(probes))))
    reasoning = tuple(after for _, after in chosen)
    besides = tuple(
        Probe(other.text, other.answer, other.aliases) for other in about(fact)[:PROBES]
    )
    return EditCase(
        request=request,
        paraphrases=tuple(fact.with_prompt(prompt) for prompt in fact.paraphrases),
        neighbours=near,
        onward=chosen,
        portability=(("Reasoning", reasoning),) if reasoning else (),
        locality=(("Relation_Specificity", besides),) if besides else (),
        generation=(fact.text, f"{_in_front(fact.subject)} is"),
        case_id=_facts().index(fact),
    )


def false_answers(fact: Fact) -> list[str]:
    """The answers of other subjects of the relation that are not accepted for this one, sorted."""
    true = {normalise(name) for name in (fact.answer, *fact.aliases)}
    answers = _answers(fact.relation)
    return [answer for answer, normal in answers.items() if normal not in true]


@cache
def _answers(relation: str | None) -> dict[str, str]:
    """Every answer of a relation, sorted, and what it is compared by."""
    answers = {fact.answer for fact in _facts() if fact.relation == relation}
    return {answer: normalise(answer) for answer in sorted(answers)}


def second_about(second: Fact, bridge: str) -> Fact | None:
    """The fact of the same relation about another bridge; None where there is none, or it is asked
    in other words: a kingdom has no president to ask about."""
    fact = _onward().get((second.relation or "", bare(bridge)))
    return fact if fact is not None and fact.prompt == second.prompt else None


def names_of(answer: str) -> tuple[str, ...]:
    """Other names of an answer that is a country."""
    return _country_names().get(answer, ())


def about(fact: Fact) -> tuple[Fact, ...]:
    """What else the atlas knows of the fact's subject, and stays whatever the fact's answer is: not
    the country of what is said to stand in another city, nor its city in another country."""
    moved = PLACES if fact.relation in PLACES else {fact.relation}
    return tuple(
        other
        for other in _facts()
        if bare(other.subject) == bare(fact.subject) and other.relation not in moved
    )


def neighbours(request: EditRequest, facts: Sequence[Fact], rng: random.Random) -> tuple[Fact, ...]:
    """Some of the facts that must keep their answers through an edit: facts about other subjects
    whose answer is not the new one."""
    near = []
    for fact in facts:
        if fact.subject != request.fact.subject and request.new not in (fact.answer, *fact.aliases):
            near.append(fact)
    return tuple(rng.sample(near, min(PROBES, len(near))))


def onward(fact: Fact, new: str) -> list[tuple[Probe, Probe]]:
    """Every chain over the fact whose answer the edit changes, as (before, after) the edit."""
    names = names_of(new)
    pairs = []
    for chain in chains():
        after = None
        if chain.first == fact:
            second = second_about(chain.second, new)
            if second is not None:
                after = replace(chain.probe, answer=second.answer, aliases=second.aliases)
        elif chain.second == fact:
            after = replace(chain.probe, answer=new, aliases=names)
        if after is None or chain.second.answer in after.aliases:
            continue  # by another of its names the new answer is the old one
        if after.answer not in (chain.second.answer, *chain.second.aliases):
            pairs.append((chain.probe, after))
    return pairs
