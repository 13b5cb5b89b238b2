"""Relations in words: what else is asked of a subject, and a fact from its other end."""

from __future__ import annotations

from qv_lens.facts.records import Fact
from qv_lens.facts.relations import others, relation_of, reversed_prompt

CAPITAL = Fact("The capital of {} is", "France", "Paris", "P36")


def test_an_edit_is_asked_about_from_its_new_answer():
    """Of a capital there is one country, of a continent there are many."""
    assert reversed_prompt(CAPITAL, "Rome") == "Rome is the capital of"
    assert reversed_prompt(Fact("{} is in", "France", "Europe", "P30"), "Asia") is None
    assert reversed_prompt(Fact("{} is", "France", "Paris", "P0"), "Rome") is None


def test_other_relations_have_other_answers_and_the_same_kind_of_subject():
    """Of a place: answers of other kinds than a place, and nothing that is asked of people."""
    assert others(CAPITAL) == (
        "France is on the continent of",
        "In France, the official language is",
        "The head of state of France is",
        "The head of government of France is",
    )
    assert others(Fact("{} is", "France", "Paris", "P0")) == ()


def test_a_relation_is_known_by_its_words_where_no_id_is_given():
    """The particular before the general: a mother tongue is no citizenship; an id that is not known
    is not guessed at."""
    said = {
        "The mother tongue of {} is": "P103",
        "{} was founded in": "P740",
        "{} was founded by": "P112",
        "{} is located in the country of": "P17",
        "{} is located in": "P131",
    }
    for prompt, wanted in said.items():
        found = relation_of(Fact(prompt, "X", "y"))
        assert found is not None
        assert found.id == wanted
    assert relation_of(Fact("The capital of {} is", "X", "y", "P0")) is None
