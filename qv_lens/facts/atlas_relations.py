"""The relations of the atlas: which column of which table answers each, and in which words it is
asked.

Among several phrasings, those were chosen after which SmolLM2-135M says the answer most often;
plain words were preferred where they did nearly as well. Subjects with an article are written as
their table writes them: countries ("the Netherlands") inside a sentence, landmarks, products and
organisations ("The Louvre") at its beginning. `<office>` and `<year>` come from the row of a dated
fact.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class Source:
    """Where the facts of a relation stand."""

    table: str
    """The table's name, without ".tsv"."""
    subject: str
    """The column of the subjects."""
    answer: str
    """The column of the answers; an empty field is not a fact."""
    article: bool = False
    """Whether subjects also go without their article (a book's title does not)."""


@dataclass(frozen=True)
class Relation:
    """One relation: its sources and its wording, always with one {} for the subject."""

    id: str
    """The Wikidata property."""
    sources: tuple[Source, ...]
    """Where its facts stand."""
    phrasings: tuple[str, str, str]
    """Clozes that end right before the answer."""
    question: str
    """The question for the answer."""
    noun: str = ""
    """The answer as a noun phrase, for the first fact of a chain; "" where it is never the first."""
    after: str = ""
    """The cloze about a noun phrase, for the second fact of a chain; "": the first phrasing."""
    lower: bool = False
    """Whether a subject's "The" is written small inside a sentence."""

    @property
    def chained(self) -> str:
        """The cloze about a noun phrase."""
        return self.after or self.phrasings[0]


_OFFICE = (
    "In <year>, the <office> of {} was",
    "The <office> of {} in <year> was",
    "Throughout <year>, the <office> of {} was",
)
_OFFICE_QUESTION = "Who was the <office> of {} in <year>?"

RELATIONS: tuple[Relation, ...] = (
    Relation(
        "P36",
        (Source("countries", "country", "capital", article=True),),
        (
            "The capital of {} is",
            "The capital city of {} is",
            "Every year many people visit {} and its capital,",
        ),
        "What is the capital of {}?",
    ),
    Relation(
        "P30",
        (Source("countries", "country", "continent", article=True),),
        (
            "On a map of the world, {} is on the continent of",
            "If you travel to {}, you are on the continent of",
            "Geographically, {} lies in the continent of",
        ),
        "On which continent is {}?",
        after="{} is on the continent of",
    ),
    Relation(
        "P37",
        (Source("countries", "country", "language", article=True),),
        (
            "In {}, the official language is",
            "The official language spoken in {} is",
            "The official language of {} is",
        ),
        "What is the official language of {}?",
        after="The official language of {} is",
    ),
    Relation(
        "P27",
        (
            Source("athletes", "person", "country"),
            Source("authors", "person", "country"),
            Source("people", "person", "country"),
        ),
        ("{} is a national of", "{} holds the citizenship of", "{} is a citizen of"),
        "Of which country is {} a citizen?",
        noun="the country of citizenship of {}",
        after="{} is a citizen of",
    ),
    Relation(
        "P641",
        (Source("athletes", "person", "sport"),),
        (
            "As an athlete, {} competed in the sport of",
            "{} is one of the greatest athletes in the sport of",
            "{} plays the sport of",
        ),
        "What sport is {} known for?",
    ),
    Relation(
        "P50",
        (Source("books", "book", "author"),),
        ("The book {} was written by", "{} was written by", "{} is a famous work by the writer"),
        "Who wrote {}?",
        noun="the author of {}",
    ),
    Relation(
        "P112",
        (Source("companies", "company", "founder", article=True),),
        ("{} was founded by", "{} was started by", "{} was created by its founder,"),
        "Who founded {}?",
        noun="the founder of {}",
        lower=True,
    ),
    Relation(
        "P35",
        (Source("heads_of_state", "subject", "holder", article=True),),
        _OFFICE,
        _OFFICE_QUESTION,
    ),
    Relation(
        "P6",
        (Source("heads_of_government", "subject", "holder", article=True),),
        _OFFICE,
        _OFFICE_QUESTION,
    ),
    Relation("P169", (Source("chief_executives", "subject", "holder"),), _OFFICE, _OFFICE_QUESTION),
    Relation(
        "P159",
        (Source("companies", "company", "city", article=True),),
        ("{} is based in the city of", "{} is headquartered in", "{} has its headquarters in"),
        "In which city is {} headquartered?",
        noun="the city where {} is headquartered",
        lower=True,
    ),
    Relation(
        "P176",
        (Source("products", "product", "company", article=True),),
        ("{} is made by", "{} was developed by", "{} was created by"),
        "Which company makes {}?",
        noun="the company that makes {}",
        lower=True,
    ),
    Relation(
        "P131",
        (Source("landmarks", "landmark", "city", article=True),),
        ("{} is located in the city of", "{} is in the city of", "{} can be found in the city of"),
        "In which city is {} located?",
        noun="the city where {} is located",
        lower=True,
    ),
    Relation(
        "P17",
        (
            Source("landmarks", "landmark", "country", article=True),
            Source("cities", "city", "country"),
        ),
        (
            "{} is located in the country of",
            "{} is in the country of",
            "{} can be found in the country of",
        ),
        "In which country is {} located?",
        noun="the country where {} is located",
        lower=True,
    ),
)

_OF_A_COUNTRY = ("P36", "P30", "P37", "P35", "P6")

#: relation of a chain's first fact -> relations that its second fact may have
PAIRS: Mapping[str, tuple[str, ...]] = MappingProxyType({
    "P27": _OF_A_COUNTRY,
    "P17": _OF_A_COUNTRY,
    "P50": ("P27",),
    "P112": ("P27",),
    "P176": ("P112", "P159", "P169"),
    "P159": ("P17",),
    "P131": ("P17",),
})  # fmt: skip
