"""Answers compared, words' ends, and where a subject stands: the inputs of issue 16, and others of
their kinds."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

import qv_lens as qv
from qv_lens.facts.benchmarks import parse
from qv_lens.facts.mquake import leading_to
from qv_lens.facts.prompts import begins, contains, matches, normalise
from qv_lens.facts.records import Fact, Hop
from qv_lens.facts.words import best_place, places

NAMES = st.text(
    st.characters(categories=("L", "M", "N", "P", "Zs", "Sm"), include_characters="ßİﬁéǅ中ー한"),
    min_size=1,
    max_size=12,
)


def folded(text: str) -> str:
    """Unicode's own canonical caseless form (D145), of a whole text."""
    return unicodedata.normalize("NFD", unicodedata.normalize("NFD", text).casefold())


@pytest.mark.parametrize(("text", "answer"), [
    ("中国人。", "中国"), ("日本です", "日本"), ("กรุงเทพมหานคร", "กรุงเทพ"), ("한국입니다", "한국"), ("iPhone手机", "iPhone"),
    (" Football.", "football"), ("football team", "football"), ("Japan's capital", "Japan"), ("Japan-based", "Japan"),
    ("“Japan”, he said", "Japan"), ("「日本」です", "日本"), ("**Japan**", "Japan"), (": Japan\n", "Japan"), ("¡España!", "España"),
    ("ＪＡＰＡＮ！", "Japan"), ("Sa\u0303o Paulo is", "São Paulo"), ("STRASSE 5", "Straße"), ("New\u00a0York is", "New York"),
    ("O’Brien is", "O'Brien"), (".NET 5", ".NET"), ("C++11", "C++"), ("C# is", "C#"), ("−5 degrees", "-5"), ("5 % of", "5%"),
    ("20, 30", "20"), ("20. Next", "20"), ("20年", "20"), ("20 years", "20"), ("1914-1918", "1914"), ("$5 each", "$5"), ("20,000 people", "20,000"),
    ("Washington, D.C. is", "Washington, D.C."), ("भारत में", "भारत"), ("«Japon».", "Japon"), ("Japan\u200b.", "Japan"),
])  # fmt: skip
def test_a_continuation_begins_with_its_answer(text, answer):
    assert begins(text, [answer])
    assert begins(text, ["something else", "", answer])
    assert not begins("Not " + text, [answer])


@pytest.mark.parametrize(("text", "answer"), [
    (" 20.5 million", "20"), (" 20,000 people", "20"), (" -5", "5"), ("20 000 people", "20"), ("20\u202f000", "20"), ("20万", "20"),
    ("20½", "20"), ("20:30", "20"), ("20% of", "20"), ("20 % of", "20"), ("20€", "20"), ("$5", "5"), ("<5", "5"), (".5", "5"), ("205", "20"),
    ("二十", "二"), ("20'000", "20"), ("20/3", "20"), ("5°", "5"),
    ("C++", "C"), ("C#", "C"), ("Disney+ is", "Disney"), (".NET", "NET"), ("footballers", "football"), ("भारतीय", "भारत"),
    ("人々", "人"), ("コーヒー", "コーヒ"), ("Parisien", "Paris"), ("cafe\u0301s", "café"), ("-", ""), ("", ""), ("", "?"), ("...", "?"), ("São", "Sao"),
])  # fmt: skip
def test_a_continuation_begins_with_another_answer(text, answer):
    assert not begins(text, [answer])


@pytest.mark.parametrize(("text", "answer", "held"), [
    ("I use C++ and Java.", "C", False), ("I use C, not Java.", "C", True), ("I use C++.", "C++", True), ("it is -5", "5", False),
    ("it costs $5", "5", False), ("it costs $5", "$5", True), ("scores of 3-5", "5", True), ("5 of them", "5", True), ("he won 5.", "5", True),
    ("about .5 of it", "5", False), ("in Paris, France", "Paris", True), ("in Jean-Luc", "Luc", True),
])  # fmt: skip
def test_a_continuation_holds_an_answer(text, answer, held):
    assert contains(text, [answer]) == held


@pytest.mark.parametrize(("text", "answer", "same"), [
    ("日本。", "日本", True), ("“Japan”", "Japan", True), ("‘Japan’", "Japan", True), ("（日本）", "日本", True), ("`Japan`", "Japan", True),
    ("São Paulo", "Sa\u0303o Paulo", True), ("ﾄﾖﾀ", "トヨタ", True), ("5 %", "5%", True), ("1914–1918", "1914-1918", True), ("?", "?", True),
    ("…Japan…", "Japan", True), ("- Japan", "Japan", True), ("'C++'", "C++", True), ("(-5)", "-5", True),
    ("C#", "C++", False), ("C++", "C", False), ("C", "C#", False), ("", "?", False), ("?", "", False), (" ", ".", False), ("!", "?", False),
    ("-5", "5", False), ("$5", "5", False), ("5%", "5", False), (".NET", "NET", False), ("#1", "1", False), ("20.5", "205", False),
    ("x²", "x2", False), ("São", "Sao", False), ("Osl", "Oslo", False),
])  # fmt: skip
def test_two_answers_are_the_same_or_not(text, answer, same):
    assert matches(text, [answer]) is same
    assert matches(answer, [text]) is same


@given(st.text(max_size=15))
def test_what_is_compared_is_stable(text):
    once = normalise(text)
    assert normalise(once) == once
    if any(c.isalnum() for c in text):
        assert matches(text, [text])
        assert matches(unicodedata.normalize("NFD", text), [unicodedata.normalize("NFC", text)])


@given(
    st.integers(0, 99_999),
    st.integers(0, 99_999),
    st.sampled_from(["{}", "{:,}", "{}.5", "{}%", "-{}", "${}"]),
)
def test_a_number_is_no_beginning_of_another(number, said, form):
    """Brute force: the continuation is right where the number that it writes is the answer."""
    text = " " + form.format(said) + " or so"
    right = said == number and (form == "{}" or (form == "{:,}" and said < 1000))
    assert begins(text, [str(number)]) is right


# ------------------------------------------------------------------ subjects

FLAT = {
    "ground_truth": "a",
    "target_new": "b",
    "rephrase_prompt": "q",
    "locality_prompt": "l",
    "locality_ground_truth": "g",
}


def subject_of(text, name) -> Fact:
    return parse([{"prompt": text, "subject": name, **FLAT}]).cases[0].requests[0].fact


@pytest.mark.parametrize(("text", "name", "prompt", "shown"), [
    ("In der Straße von Oslo plays Elena Morefeld the sport of", "elena morefeld", "In der Straße von Oslo plays {} the sport of", "Elena Morefeld"),
    ("In İzmir and İstanbul Elena Morefeld plays", "elena morefeld", "In İzmir and İstanbul {} plays", "Elena Morefeld"),
    ("The ﬁnal of Finn was", "finn", "The ﬁnal of {} was", "Finn"),
    ("STRASSE in Oslo", "Straße", "{} in Oslo", "STRASSE"),
    ("The Iranian president of Iran is", "Iran", "The Iranian president of {} is", "Iran"),
    ("The Article on Art was written by", "Art", "The Article on {} was written by", "Art"),
    ("The ART of Art", "Art", "The ART of {}", "Art"),
    ("Jean-Luc and Jean are", "Jean", "Jean-Luc and {} are", "Jean"),
    ("C++ and C are", "C", "C++ and {} are", "C"),
    ("GTK+ is", "GTK", "{}+ is", "GTK"),
    ("Apollo 11 after Apollo 1 was", "Apollo 1", "Apollo 11 after {} was", "Apollo 1"),
    ("Version 2.5 after 2 was", "2", "Version 2.5 after {} was", "2"),
    ("Version 2.5 after 15 and 5 was", "5", "Version 2.5 after 15 and {} was", "5"),
    ("Sa\u0303o Paulo lies in", "São Paulo", "{} lies in", "Sa\u0303o Paulo"),
    ("São Paulo lies in", "Sa\u0303o Paulo", "{} lies in", "São Paulo"),
    ("运动员詹姆斯是哪国人", "詹姆斯", "运动员{}是哪国人", "詹姆斯"),
    ("이순신은 어느 나라 사람", "이순신", "{}은 어느 나라 사람", "이순신"),
    ("Elena Morefeld plays", " Elena Morefeld\n", "{} plays", "Elena Morefeld"),
    ("Tim O’Brien plays", "Tim O'Brien", "{} plays", "Tim O’Brien"),
    ("The {} plays", "Elena", "The {} plays", "Elena"),
])  # fmt: skip
def test_a_subject_is_found_as_a_word_in_the_text_itself(text, name, prompt, shown):
    fact = subject_of(text, name)
    assert (fact.prompt, fact.subject) == (prompt, shown)
    assert "{}" in text or fact.text == text


@pytest.mark.parametrize(("text", "name", "reason"), [
    ("The Iranian president is", "Iran", "only inside 'Iranian', the subject 'Iran': write {}"),
    ("Das Straßenfest in Oslo", "fest", "only inside 'Straßenfest'"),
    ("The ﬁnal is", "f", "does not hold the subject 'f'"),
    ("São Paulo lies in", "Sao", "does not hold"),
    ("Apollo 11 was", "Apollo 1", "only inside 'Apollo 11'"),
    ("{} and Elena play", "Elena", "holds {}"),
])  # fmt: skip
def test_a_subject_that_is_no_word_of_the_prompt_is_refused(text, name, reason):
    with pytest.raises(qv.QVLensError) as caught:
        subject_of(text, name)
    assert reason in str(caught.value)


def test_every_reader_of_filled_prompts_finds_the_word():
    text, place = "The Iranian president of Iran is", "The Iranian president of {} is"
    records = [
        {
            "src": text,
            "subject": "Iran",
            "answers": ["a"],
            "alt": "b",
            "rephrase": "q",
            "loc": "l",
            "loc_ans": "g",
        },
        {"prompt": text, "subject": "Iran", "target_new": "b", "portability": {}},
        {"prompt": text, "subject": "Iran", "attribute": "a", "template": "t"},
    ]
    for record in records:
        got = parse([record])
        fact = got.facts[0] if got.facts else got.cases[0].requests[0].fact
        assert fact.prompt == place
    assert Fact.from_text(text, "Iran", "a").prompt == place
    with pytest.raises(qv.QVLensError, match="occurs only inside 'Iranian'"):
        Fact.from_text("The Iranian president is", "Iran", "a")


@pytest.mark.parametrize(("question", "paraphrases"), [
    ("Who is the president of Iran?", ("Who is the president of {}?",)),
    ("Who is the Iranian president of Iran?", ("Who is the Iranian president of {}?",)),
    ("Who is the Iranian president?", ()),
    ("Is Iran in Iran?", ()),
    ("Is {} Iran?", ()),
    (None, ()),
])  # fmt: skip
def test_a_chains_question_holds_its_subject_as_a_word(question, paraphrases):
    rewrite = {
        "prompt": "The president of {} is",
        "relation_id": "P35",
        "subject": "Iran",
        "question": question,
        "target_true": {"str": "a"},
        "target_new": {"str": "b"},
    }
    hop = {"question": "q", "cloze": "c", "answer": "b"}
    case = parse([{
        "case_id": 1, "questions": ["q"], "answer": "a", "new_answer": "b", "requested_rewrite": [rewrite], "single_hops": [hop], "new_single_hops": [hop],
    }]).cases[0]  # fmt: skip
    assert case.requests[0].fact.paraphrases == paraphrases


def test_a_chain_leads_to_its_fact_with_one_article():
    """The article is doubled where the prompt has its own, and only there."""
    hops = (Hop("Who founded Intel?", "c", "x"), Hop("q", "c", "y"))
    assert leading_to(Fact("The {} is a citizen of", "founder", "a"), hops, 1) == (
        "The one who founded Intel is a citizen of",
    )
    assert leading_to(Fact("In the {} one speaks", "land", "a"), hops, 1) == (
        "In the one who founded Intel one speaks",
    )
    band = (Hop("What is the home of the the Band?", "c", "x"), hops[1])
    assert leading_to(Fact("People of {} speak", "Oslo", "a"), band, 1) == (
        "People of the home of the the Band speak",
    )


@given(st.text(max_size=8), NAMES.filter(str.strip), st.text(max_size=8))
def test_a_place_is_the_name_whatever_stands_around_it(before, name, after):
    """Folding never moves a place: what stands there is the name by Unicode's own caseless
    comparison."""
    text = f"{before} {name} {after}"
    plain = str.maketrans("’‘ʼ‐‑", "'''--")
    found = places(text, name)
    for start, stop in found:
        assert (
            folded(text[start:stop]).translate(plain).split()
            == folded(name).translate(plain).split()
        )
    assert best_place(text, name) in [*found, None]
    # the later parts of a decomposed Korean syllable are letters that belong to the one before
    is_later_part = 0x1160 <= ord(name[0]) <= 0x11FF
    if unicodedata.category(name[0])[0] in "LN" and not is_later_part:
        assert len(before) + 1 in [start for start, _ in found]
