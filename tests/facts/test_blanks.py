"""Between prompt and answer: where a blank stands, and that blanks around subjects and answers mean
nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import qv_lens as qv
from qv_lens.attribution.projection import surface_forms
from qv_lens.editing.keys import rows_of
from qv_lens.evaluation.answers import tell
from qv_lens.evaluation.questions import questions
from qv_lens.facts.benchmarks import parse
from qv_lens.facts.records import EditCase, Fact, MultiHopCase, Probe
from qv_lens.facts.scripts import blank_between
from qv_lens.facts.spans import continuation, tokenize
from tests.models import tiny_lens, tokenizer

TOKENIZER = tokenizer()
CLEAN = Fact(
    "{} plays the sport of",
    "Elena Morefeld",
    "fencing",
    aliases=("swords",),
    paraphrases=("The sport of {} is",),
)


@pytest.mark.parametrize("text", [
    "詹姆斯是哪国人", "国籍：", "答:", "首都は", "トヨタの社長は", "เขาเกิดที่", "ລາວ", "ខ្មែរ", "မြန်မာ", "他是……", "在2008", "北京(Beijing)", "京(Beijing)", "(北京)", '小说"骆驼祥子"',
    'He said "', "He said '", "He said:“", "The film (", "see [", "Film „", "le film «", "»", "称为「", '他说"', "`", "¿", "¡",
    "anti-", "1914–", "Paris—", "and/", "https://", "snake_", "user@", "write to @", "l'", "l’", "dell'", "s'", "It costs $", "US$", "number #", "plays ", "plays\n", "",
])  # fmt: skip
def test_no_blank(text):
    assert not blank_between(text, "Oslo")


@pytest.mark.parametrize("text", [
    "Elena plays", "The capital is:", "in 2008", "한국의 수도는", "Столица —это", "Beijing (北京)", "The word “中国”", 'The film "Heat"', "The film 'Heat'",
    "The film ‘Heat’", "Der Film „Heat“", "Der Film »Heat«", "Le film « Heat »", "called (Heat)", 'size 5"', "the players'", "the players’", "Marx'",
    "Paris -", "He said --", "either /", "It costs 5€", "It costs 5 €", "written in C#", "5%", "C++", "A: ok.", "iPhone 15", "在 iPhone",
])  # fmt: skip
def test_a_blank(text):
    assert blank_between(text, "Oslo")
    assert blank_between(text, "中国")
    assert not blank_between(text, " Oslo")


@pytest.mark.parametrize(("fact", "whole"), [
    (Fact("{}是哪国人", "詹姆斯", "中国"), "詹姆斯是哪国人中国"),
    (Fact("{}是哪国人", "詹姆斯", "中国", space=True), "詹姆斯是哪国人 中国"),
    (Fact("{}是哪国人", "詹姆斯", " 中国"), "詹姆斯是哪国人 中国"),
    (Fact('{} is called "', "Oslo", "Kristiania"), 'Oslo is called "Kristiania'),
    (Fact("{} is called", "Oslo", "Kristiania"), "Oslo is called Kristiania"),
    (Fact("{} is called:", "Oslo", "Kristiania", space=False), "Oslo is called:Kristiania"),
    (Fact("The price of {} is $", "tea", "5"), "The price of tea is $5"),
])  # fmt: skip
@pytest.mark.parametrize("kind", ["gptj", "qwen3-gqa"])
def test_answers_are_read_as_hugging_face_reads_the_whole_text(fact, whole, kind):
    """The text with its answer, tokenised in one piece: ids, log p, teacher-forced probes, and the
    labels of an edit."""
    lens = tiny_lens(kind)
    ids = lens.tokenizer(whole)["input_ids"]
    start = len(lens.tokenizer(fact.text)["input_ids"])
    answer = tuple(ids[start:])
    logp = lens.hf(torch.tensor([ids])).logits[0, start - 1 : -1].log_softmax(-1)
    each = logp[range(len(answer)), answer]
    assert lens.tokenize(fact)[0].answer == lens.answer_ids(fact) == answer
    assert lens.logprob(fact) == pytest.approx(float(each[0]), abs=1e-6)
    probe = Probe(fact.text, fact.answer + "\n", space=fact.space)
    assert lens.answer_ids(probe) == answer
    assert tell(lens, [probe])[0].logprob == pytest.approx(float(each.mean()), abs=1e-5)
    for request in (
        replace(fact, answer="x").to(fact.answer),
        replace(fact, answer="x").to(fact.answer, via=[fact.text]),
    ):
        prompts = "via" if request.via else "rewrite"
        rows = rows_of(lens, [request], ("{}", "I went. {}"), "last", prompts)
        assert tuple(rows.labels.tolist()) == 2 * answer


def test_two_chinese_answers_differ():
    lens = tiny_lens("gptj")
    china, america = (Fact("{}是哪国人", "詹姆斯", answer) for answer in ("中国", "美国"))
    assert lens.logprob(china) != lens.logprob(america)
    assert lens.logprob(china, answer="美国") == lens.logprob(america)
    assert len(qv.value_neurons(lens, china, 5, target=("中国", "美国"))) == 5
    spaced = replace(china, space=True)
    assert lens.answer_ids(spaced, "美国") == tuple(lens.tokenizer(" 美国")["input_ids"])


def test_a_first_token_that_is_a_part_of_a_letter_is_told_of():
    """Москва and Берлин begin with the same byte: asked whole, they are told apart."""
    lens = tiny_lens("gptj")
    asked = Fact("Столица страны {} — «", "Россия", "Москва", space=False)
    first, other = (lens.answer_ids(asked, name)[0] for name in ("Москва", "Берлин"))
    assert first == other
    for score in (
        lens.logprob, lambda fact: qv.neuron_effects(lens, fact, 3),
        lambda fact: qv.faithfulness(lens, fact, {}, (1,), seeds=1),
    ):  # fmt: skip
        with pytest.warns(
            UserWarning, match=r"begins with a token that is a part of a letter.*whole=True"
        ):
            score(asked)
    whole = [lens.logprob(asked, name, whole=True) for name in ("Москва", "Берлин")]
    assert whole[0] != whole[1]
    ids = [*lens.tokenize(asked)[0].ids, *lens.answer_ids(asked)]
    rows = lens.hf(torch.tensor([ids])).logits[0].log_softmax(-1)
    count = len(lens.answer_ids(asked))
    expected = sum(float(rows[i - 1, ids[i]]) for i in range(len(ids) - count, len(ids)))
    assert whole[0] == pytest.approx(expected, abs=1e-6)
    assert lens.logprob([asked, "A b"], "c d", whole=True)[1] == lens.logprob(
        "A b", "c d", whole=True
    )


def test_what_a_fact_says_of_the_blank_is_carried():
    fact = replace(CLEAN, space=False)
    assert fact.with_prompt("{} is").space is fact.to("golf").target.space is False
    near = (Probe("Ann plays", "golf", space=True), replace(fact, subject="Ben"))
    case = EditCase(
        fact.to("chess"), (Probe("x", "y", space=True), fact), near, onward=((near[0], near[1]),)
    )
    spaces = {name: [probe.space for probe in probes] for name, probes in questions(case).items()}
    assert spaces == {
        "rewrite_new": [False], "rewrite_old": [False], "paraphrase_new": [True, False], "paraphrase_old": [True, False],
        "near_old": [True, False], "rival_old": [True, False], "rival_new": [True, False], "onward_old": [True], "onward_new": [False],
    }  # fmt: skip
    chain = MultiHopCase(0, (fact.to("chess"),), ("q",), "a", "b")
    assert {probe.space for probes in questions(chain).values() for probe in probes} == {False}
    record = {"prompt": "{} plays", "subject": "Ann", "answer": "golf", "space": False}
    assert parse([record]).facts[0].space is False
    assert parse([{**record, "space": None}]).facts[0].space is None
    with pytest.raises(qv.QVLensError, match="field 'space'"):
        parse([{**record, "space": "no"}])


def test_an_answers_own_first_token_has_no_blank_where_its_script_has_none():
    lens = tiny_lens("gptj")
    assert surface_forms(lens, "中国") == {lens.tokenizer("中")["input_ids"][0]}


def merging_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE as GPT-2 and Qwen have it (a run of Han is one piece), which knows 国人 and,
    with less weight, 中国."""
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    china, country, person = (level.pre_tokenize_str(char)[0][0] for char in "中国人")
    merges = []
    for char in (china, country, person):
        merges += [(char[0], char[1]), (char[:2], char[2])]
    merges += [(country, person), (china, country)]
    vocabulary = {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    for left, right in merges:
        vocabulary.setdefault(left + right, len(vocabulary))
    made = Tokenizer(models.BPE(vocabulary, list(dict.fromkeys(merges))))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made)


def test_a_merge_across_the_border_of_a_script_without_blanks():
    """The tokens that a model which continues the prompt would write are the answer's own."""
    tok = merging_tokenizer()
    prompt, whole = (tok(text)["input_ids"] for text in ("他来自中国", "他来自中国人"))
    assert whole[: len(prompt)] != prompt
    answer = continuation(tok, "他来自中国", "人")
    assert answer == tuple(tok("人")["input_ids"])
    assert tok.decode([*prompt, *answer]) == "他来自中国人"
    assert continuation(tok, "首都是", "中国") == tuple(tok("中国")["input_ids"])
    with pytest.raises(qv.QVLensError, match="changes how the prompt"):
        continuation(TOKENIZER, "Elena plays the s", "port", space=False)


# ------------------------------------------------------------------ blanks around subjects and
# answers


@pytest.mark.parametrize(
    "subject",
    [
        "Elena Morefeld ",
        " Elena Morefeld",
        "Elena Morefeld\n",
        "\tElena Morefeld \u3000",
        "Elena Morefeld\u200b",
        "\ufeffElena Morefeld\u00a0",
    ],
)
def test_blanks_around_a_subject_mean_nothing(subject):
    assert replace(CLEAN, subject=subject) == CLEAN
    assert Fact.from_text(CLEAN.text, subject, "fencing") == Fact.from_text(
        CLEAN.text, "Elena Morefeld", "fencing"
    )


@pytest.mark.parametrize(("prompt", "subject", "text"), [
    ("{}plays the sport of", "Elena Morefeld ", "Elena Morefeld plays the sport of"),
    ("{}plays the sport of", "Elena Morefeld\n", "Elena Morefeld\nplays the sport of"),
    ("The player{} plays", " Elena Morefeld", "The player Elena Morefeld plays"),
    ("The sport of {}", "Elena Morefeld ", "The sport of Elena Morefeld"),
])  # fmt: skip
def test_the_prompt_takes_a_subjects_blank(prompt, subject, text):
    fact = Fact(prompt, subject, "fencing", paraphrases=(prompt,))
    assert (fact.text, fact.subject) == (text, "Elena Morefeld")
    assert fact.paraphrases == (fact.prompt,)


@given(
    st.text(" \n\t\u00a0\u3000\u200b", max_size=3),
    st.text(" \n\t\u00a0\u3000\u200b", max_size=3),
    st.sampled_from(["{} plays", "The {}, who plays", "x{}y"]),
)
@settings(max_examples=40, deadline=None)
def test_the_subjects_tokens_are_its_own(before, after, prompt):
    """By the characters of the tokens at subject_first and subject_last, whatever blanks were
    typed."""
    got = tokenize(TOKENIZER, Fact(prompt, f"{before}Elena Morefeld{after}", "golf"))
    assert got.subject is not None
    spans = TOKENIZER(got.text, return_offsets_mapping=True)["offset_mapping"]
    start, stop = spans[got.subject[0]][0], spans[got.subject[1]][1]
    assert got.text[start:stop].strip(before + after + " x").rstrip("y") == "Elena Morefeld"
    assert TOKENIZER.decode([got.ids[got.subject[1]]]).strip() != ""


def test_blanks_after_an_answer_mean_nothing():
    assert replace(CLEAN, answer="fencing \n", aliases=(" swords ",)) == CLEAN
    assert CLEAN.to("golf ") == CLEAN.to("golf")
    assert Probe("x", "golf\u200b ", (" g ",)) == Probe("x", "golf", ("g",))
    lens = tiny_lens("gptj")
    assert lens.answer_ids(CLEAN, "golf  ") == lens.answer_ids(CLEAN, "golf")
    plain = {"prompt": "{} plays", "subject": "Ann", "answer": "golf"}
    assert (
        parse([{**plain, "subject": " Ann ", "answer": "golf \r\n"}]).facts == parse([plain]).facts
    )


def test_a_trailing_blank_changes_no_edit():
    """ROME at the subject's last token, and what evaluation makes of it: the same numbers to the
    last bit."""
    lens = tiny_lens("gptj", dtype=torch.float32)
    editor = qv.ROME(layer=1, steps=4, mom2_adjustment=False)
    results = []
    for subject, new in (("Elena Morefeld", "golf"), ("Elena Morefeld ", "golf ")):
        request = replace(CLEAN, subject=subject).to(new)
        patch = qv.edit(lens, request, editor, templates=("{}",))
        with lens.patched(patch):
            results.append((lens.logprob(request.target), tell(lens, [Probe(CLEAN.text, new)])[0]))
    assert results[0] == results[1]
