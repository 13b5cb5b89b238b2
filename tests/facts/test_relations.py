"""Relations in words: what else is asked of a subject, and a fact from its other end."""

from __future__ import annotations

import json
from dataclasses import replace

from qv_lens.facts.records import Fact
from qv_lens.facts.relations import others, relation_of, reversed_prompt
from tests.facts.samples import sample

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
        "{}, who has the position of": "P39",
        "{} plays in the position of": "P413",
        "{} is named after": "P138",
        "{} was developed by": "P178",
        "{} is a member of": "P463",
        "The location of {} is": "P276",
    }
    for prompt, wanted in said.items():
        found = relation_of(Fact(prompt, "X", "y"))
        assert found is not None
        assert found.id == wanted
    assert relation_of(Fact("The capital of {} is", "X", "y", "P0")) is None
    for no_relation in (
        "{} was informed in", "{} is the landowner of", "{}'s venture capital firm is",
        "{} plays the role of", "{} was renamed for",
    ):  # fmt: skip
        assert relation_of(Fact(no_relation, "X", "y")) is None
    said = "It was a provincial capital, with walls. The twin city of {} is"
    assert relation_of(Fact(said, "X", "y")).id == "P190"
    assert relation_of(Fact("{}'s playing position is", "X", "y")).id == "P413"


def test_an_office_is_not_asked_for_as_a_profession():
    """A bishop's profession is bishop: the new answer may be right there."""
    asked = others(Fact("{}, who has the position of", "Decio Azzolino", "cardinal"))
    assert "Decio Azzolino was born in" in asked
    assert not any("office" in prompt or "profession" in prompt for prompt in asked)


def test_the_words_of_real_prompts_tell_their_relations():
    """known_1000 gives the ids: every one has a wording, and a relation told by its words alone has
    the subjects and answers of the true one (who developed and who made a product are asked alike)."""
    rows = json.loads(sample("rome/known_1000.json").read_text())
    told = wrong = 0
    for row in rows:
        fact = Fact(row["template"], row["subject"], row["attribute"])
        true = relation_of(replace(fact, relation=row["relation_id"]))
        found = relation_of(fact)
        assert true is not None, row["relation_id"]
        told += found is not None
        wrong += found is not None and (found.of, found.gives) != (true.of, true.gives)
    assert told > 0.9 * len(rows)
    assert wrong < 0.01 * len(rows)
