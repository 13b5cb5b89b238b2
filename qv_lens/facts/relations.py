"""Wikidata relations in words, for the questions that an edit must not answer: other relations of
its subject, and itself the other way round.

1. A relation is known by its id, or, in files that give none, by its words in a prompt
   (`relation_of`).
2. `others` asks a subject what the edited relation does not: relations of the same kind of subject
   whose answers are of another kind, so that the new answer is wrong there.
3. `reversed_prompt` names the edited fact from its other end, where the relation has one answer in
   that direction too (a capital's country, a book's author).

The relations are those of CounterFact and of the atlas."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass

from qv_lens.facts.records import Fact


@dataclass(frozen=True)
class Wording:
    """One relation."""

    id: str
    """The Wikidata property."""
    of: str
    """Kind of its subjects."""
    gives: str
    """Kind of its answers."""
    cloze: str
    """It, asked in plain words."""
    phrases: tuple[str, ...]
    """By which a prompt is known: from the beginning of a word on; before "$" at its end."""
    back: str = ""
    """A cloze for the subject from the answer, where there is one."""


#: the first whose phrase a prompt holds is its relation: the particular before the general
WORDINGS = (
    Wording("P36", "place", "place", "The capital of {} is", ("capital of", "capital city", "capital,", "capital is", "has the capital"), "{} is the capital of"),
    Wording("P190", "place", "place", "The twin city of {} is", ("twin city", "sister city"), "{} is the twin city of"),
    Wording("P30", "place", "continent", "{} is on the continent of", ("continent",)),
    Wording("P37", "place", "language", "In {}, the official language is", ("official language", "declares the language", "language spoken is", "they understand")),
    Wording("P937", "person", "place", "{} worked in the city of", ("worked in", "found employment in", "was employed in", "took up work in", "used to work in")),
    Wording("P35", "place", "person", "The head of state of {} is", ("president of", "king of", "queen of", "emperor of"), "{} is the head of state of"),
    Wording("P6", "place", "person", "The head of government of {} is", ("prime minister of", "chancellor of", "governor of", "mayor of"), "{} is the head of government of"),
    Wording("P103", "person", "language", "The mother tongue of {} is", ("mother tongue", "native language", "native speaker")),
    Wording("P1412", "person", "language", "{} speaks the language of", ("speaks", "spoke the language", "speaker of", "writes in", "language used by")),
    Wording("P27", "person", "place", "{} is a citizen of", ("citizen", "national of", "citizenship")),
    Wording("P19", "person", "place", "{} was born in", ("was born", "native", "originally from", "originates from", "originated from")),
    Wording("P20", "person", "place", "{} died in the city of", ("died", "passed away", "lost their life", "succumbed", "expired", "life ended")),
    Wording("P39", "person", "profession", "{} holds the office of", ("has the position", "holds the position", "'s position is", "whose position is", "holds the title", "office of", "title of")),
    Wording("P413", "person", "position", "{} plays in the position of", ("position", "plays as")),
    Wording("P641", "person", "sport", "{} plays the sport of", ("sport", "professional")),
    Wording("P1303", "person", "instrument", "{} plays the instrument", ("instrument", "what does", "performs on", "performing on", "player of", "plays the$", "playing the$")),
    Wording("P106", "person", "profession", "The profession of {} is", ("profession", "occupation", "works as")),
    Wording("P101", "person", "field", "{} works in the field of", ("field", "domain", "expertise", "specializes", "area of")),
    Wording("P108", "person", "company", "{} is employed by", ("employed by", "works for", "employer", "who works for")),
    Wording("P140", "person", "religion", "{} follows the religion of", ("religion", "follower of", "faith")),
    Wording("P463", "company", "company", "{} is a member of", ("member of", "belongs to the organization", "is a part of the")),
    Wording("P169", "company", "person", "The chief executive of {} is", ("ceo of", "chief executive"), "{} is the chief executive of"),
    Wording("P112", "company", "person", "{} was founded by", ("founded by", "started by", "created by its founder"), "{} is the founder of"),
    Wording("P159", "company", "place", "{} is headquartered in", ("headquarter", "based in", "head office")),
    Wording("P495", "work", "place", "{} comes from the country of", ("created in the country", "originated in the country", "developed in", "from the country", "formulated in", "that was from")),
    Wording("P740", "company", "place", "{} was founded in", ("founded in", "formed in", "started in", "that was started", "that was formed")),
    Wording("P127", "company", "company", "{} is owned by", ("owned by", "owner$", "owner of", "from the company")),
    Wording("P50", "work", "person", "{} was written by", ("written by", "work by the writer"), "{} is the author of"),
    Wording("P449", "work", "company", "{} was first shown on", ("aired", "premiere", "debuted on", "debut on", "was released on")),
    Wording("P364", "work", "language", "The original language of {} is", ("original language",)),
    Wording("P407", "work", "language", "The language of {} is", ("language of", "written in")),
    Wording("P136", "person", "genre", "{} is known for performing", ("genre", "performs", "known for performing")),
    Wording("P264", "person", "company", "{} is signed to the label", ("label", "record", "represented by")),
    Wording("P138", "thing", "place", "{} is named after", ("named after", "named for", "called after")),
    Wording("P178", "thing", "company", "{} was developed by", ("developed by",)),
    Wording("P176", "thing", "company", "{} is made by", ("produced by", "made by", "created by", "product of", "manufactur")),
    Wording("P17", "thing", "place", "{} is located in the country of", ("country",)),
    Wording("P276", "thing", "place", "The location of {} is", ("the location of",)),
    Wording("P131", "thing", "place", "{} is located in", ("located in", "can be found in", "found in", "is in", "is within")),
)  # fmt: skip


def relation_of(fact: Fact) -> Wording | None:
    """A fact's relation, by its id or by the words of its prompt; None where it is not known."""
    for wording in WORDINGS:
        if fact.relation == wording.id:
            return wording
    prompt = _asked(fact.prompt.lower().rstrip())
    for wording in WORDINGS:
        if fact.relation is None and any(
            _begins_word(phrase, prompt) for phrase in wording.phrases
        ):
            return wording
    return None


def _asked(prompt: str) -> str:
    """The prompt without the sentences in front of the one that names the subject."""
    before = prompt.rfind(". ", 0, max(prompt.find("{}"), 0))
    return prompt[before + 2 :] if len(prompt[: max(before, 0)].split()) > 4 else prompt


def _begins_word(phrase: str, text: str) -> bool:
    """Whether a phrase stands in a text from the beginning of a word on: "performed in" holds no
    "formed in"."""
    words, end = re.escape(phrase.removesuffix("$")), "$" if phrase.endswith("$") else ""
    return re.search(rf"(?<!\w){words}{end}", text) is not None


def others(fact: Fact) -> tuple[str, ...]:
    """Prompts about the fact's subject to which an answer of its relation is wrong: other relations
    of the same kind of subject, answers of another kind."""
    own = relation_of(fact)
    if own is None:
        return ()
    return tuple(
        each.cloze.format(fact.subject)
        for each in WORDINGS
        if each.of == own.of and each.gives != own.gives
    )


def reversed_prompt(fact: Fact, answer: str) -> str | None:
    """The prompt that asks for the fact's subject from an answer; None where the relation has more
    than one answer in that direction."""
    own = relation_of(fact)
    return own.back.format(answer) if own is not None and own.back else None


def denied(fact: Fact) -> str | None:
    """A prompt behind "It is not true that"; an article or preposition at its beginning is written
    small. None for a question, and for a prompt in another script than Latin."""
    if "?" in fact.text or not any(map(_latin, fact.prompt)):
        return None
    first, blank, rest = fact.text.partition(" ")
    small = first.lower() if first in ("The", "In", "On", "Of") else first
    return f"It is not true that {small}{blank}{rest}"


def _latin(char: str) -> bool:
    return unicodedata.name(char, "").startswith("LATIN")
