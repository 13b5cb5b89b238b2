"""Where tokens begin and end: the subject's, a place past the end, a BOS that is there already."""

from __future__ import annotations

import json

import pytest

import qv_lens as qv
from qv_lens.facts.records import Fact
from qv_lens.facts.spans import continuation, tokenize
from tests.models import tiny_lens, tokenizer

TOKENIZER = tokenizer()


def test_a_token_that_ends_where_the_subject_begins_is_not_the_subjects():
    prompt = tokenize(TOKENIZER, Fact("({}) is", "Elena Morefeld", "x"))
    tokens = TOKENIZER.convert_ids_to_tokens(list(prompt.ids))
    first, last = prompt.subject
    assert first > 0
    assert "(" not in "".join(tokens[first : last + 1])
    assert ")" not in "".join(tokens[first : last + 1])


def test_with_a_bos_the_subject_is_one_further():
    fact = Fact("{} plays the sport of", "Elena Morefeld", "fencing")
    bare, with_bos = (tokenize(TOKENIZER, fact, bos=bos) for bos in (False, True))
    assert with_bos.ids == (TOKENIZER.bos_token_id, *bare.ids)
    assert bare.subject[0] == 0
    assert with_bos.subject == tuple(place + 1 for place in bare.subject)


def test_a_tokenizer_that_adds_a_bos_adds_the_only_one():
    class Adds:
        """The same, with a BOS in front by itself."""

        bos_token_id = TOKENIZER.bos_token_id

        def __call__(self, text, **options):
            told = TOKENIZER(text, **options)
            if options.get("add_special_tokens", True):
                told["input_ids"] = [self.bos_token_id, *told["input_ids"]]
                if "offset_mapping" in told:
                    told["offset_mapping"] = [(0, 0), *told["offset_mapping"]]
            return told

    prompt = tokenize(Adds(), "The capital of Norway is", bos=True)
    assert prompt.ids.count(TOKENIZER.bos_token_id) == 1


def test_the_place_after_the_last_token_does_not_exist():
    prompt = tokenize(TOKENIZER, "The capital of Norway is")
    assert prompt.positions(len(prompt.ids) - 1) == (len(prompt.ids) - 1,)
    with pytest.raises(qv.QVLensError, match="does not exist"):
        prompt.positions(len(prompt.ids))


def test_a_blank_in_front_of_an_answer_is_not_doubled():
    text = "The capital of Norway is"
    assert continuation(TOKENIZER, text, " Oslo") == continuation(TOKENIZER, text, "Oslo")
    assert continuation(TOKENIZER, text, " Oslo", space=True) == continuation(
        TOKENIZER, text, "Oslo", space=True
    )


HALF = "\ud83d"


@pytest.mark.parametrize(
    "of",
    [
        lambda lens: qv.Fact("{} plays " + HALF, "Ann", "golf"),
        lambda lens: qv.Fact("{} plays", f"Ann{HALF}", "golf"),
        lambda lens: qv.Fact("{} plays", "Ann", "golf", aliases=(HALF,)),
        lambda lens: qv.Fact("{} plays", "Ann", "golf").to(HALF),
        lambda lens: lens.logprob(qv.Fact("{} plays", "Ann", "golf"), HALF),
        lambda lens: lens.generate(f"Ann {HALF}", 1),
        lambda lens: qv.neuron_effects(lens, f"Ann {HALF}", 3),
    ],
)
def test_half_of_a_character_is_refused(of):
    """Valid JSON may hold it, and no tokenizer takes it."""
    with pytest.raises(qv.QVLensError, match=r"half of a character, '\\ud83d'"):
        of(tiny_lens("gptj"))


def test_a_record_with_half_of_a_character_is_skipped_alone(tmp_path):
    good = {"prompt": "{} plays", "subject": "Ann", "answer": "golf"}
    (tmp_path / "x.json").write_text(json.dumps([good, good | {"subject": f"Ann{HALF}"}]))
    records = qv.read(tmp_path / "x.json", skip=True)
    assert len(records.facts) == 1
    assert records.refused["record"].tolist() == [1]
    assert "half of a character" in records.refused["reason"][0]
