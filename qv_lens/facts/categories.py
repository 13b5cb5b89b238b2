"""The knowledge categories that ACE analyses, by relation id, and an optional labeller.

ACE names eight (section 4.1): Nationality, Continent, Language, Capital, Leadership, Author, Sports
Team (here: sport, as the bundled world says), Company Founder (founder), labelled there by GPT-4o.
Here a relation's Wikidata id decides: this needs no model and gives the same label every time. To
get labels from a model, pass `labelled` a callable; nothing here calls a model by itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from qv_lens.errors import FactError
from qv_lens.facts.records import EditRequest, Fact

CATEGORIES: Mapping[str, str] = MappingProxyType({
    "P27": "nationality", "P30": "continent", "P37": "language", "P103": "language", "P364": "language", "P1412": "language",
    "P36": "capital", "P6": "leadership", "P35": "leadership", "P169": "leadership", "P488": "leadership", "P1308": "leadership",
    "P50": "author", "P54": "sport", "P641": "sport", "P112": "founder",
})  # fmt: skip

#: ACE's categories of similar semantics (section 4.1); author, sport and founder are dissimilar, to
#: these and to each other
RELATED = frozenset({"nationality", "continent", "language", "capital", "leadership"})


def of_relation(item: Fact | EditRequest) -> str | None:
    """ACE's category of a fact or an edit, by its relation id; None for any other relation."""
    fact = item.fact if isinstance(item, EditRequest) else item
    return CATEGORIES.get(fact.relation or "")


def labelled(questions: Sequence[str], ask: Callable[[str], str]) -> list[tuple[str, str]]:
    """(Main category, Subcategory) of each question from a model: `ask` takes the prompt of ACE's
    Appendix G.3.

    Raises `FactError` for a reply that is not "Main|Sub".
    """
    labels = []
    for question in questions:
        prompt = (
            "Please analyze the type of the following question and return two categories strictly "
            "in the following format, "
            f"separated by '|':\n\n[Main category]|[Subcategory]\n\nQuestion: {question}\n\nCategory:"
        )
        main, bar, sub = ask(prompt).strip().partition("|")
        if not bar or not main.strip() or not sub.strip():
            raise FactError(f"The labeller's reply to {question!r} is not 'Main|Sub'.")
        labels.append((main.strip(), sub.strip()))
    return labels
