"""Metrics against values worked out by hand, and against independent implementations where a
definition is public."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from dataclasses import replace

import pandas as pd
import pytest
import torch

import qv_lens as qv
from qv_lens.evaluation.answers import tell
from qv_lens.evaluation.metrics import (
    FORCED,
    GENERATED,
    NAMED,
    begins,
    harmonic,
    measured,
    ngram_entropy,
)
from qv_lens.evaluation.questions import BESIDE, RUNS_ON, CaseAnswers, ProbeAnswer, questions
from qv_lens.evaluation.summary import summary
from qv_lens.facts import relations
from qv_lens.facts.records import Hop, MultiHopCase, Probe
from tests.models import BACKENDS, PROMPTS, tiny_lens

FACT = qv.Fact("{} plays the sport of", "Tim Duncan", "basketball")


def told(said, asked, logprob=-1.0):
    return ProbeAnswer(tuple(said), tuple(asked), logprob)


CASE = qv.EditCase(
    FACT.to("football"),
    (Probe("The sport of Tim Duncan is", "football"),),
    (Probe("LeBron James plays", "basketball"), Probe("Larry Bird plays", "basketball")),
    portability=(
        ("Reasoning", (Probe("a", "x"), Probe("b", "y"))),
        ("Subject_Aliasing", (Probe("c", "z"),)),
    ),
    locality=(("Relation_Specificity", (Probe("d", "v"),)),),
    generation=("Tim Duncan is",),
)
BEFORE = CaseAnswers(
    {
        "rewrite_new": (told([1, 9], [1, 2], -4.0),), "rewrite_old": (told([3], [3], -0.5),),
        "paraphrase_new": (told([5, 5], [1, 2], -4.0),), "paraphrase_old": (told([3], [3], -0.5),),
        "near_old": (told([3], [3], -0.1), told([3], [3], -0.2)),
        "portability_Reasoning": (told([7], [8]), told([7], [7])), "portability_Subject_Aliasing": (told([1], [2]),),
        "locality_Relation_Specificity": (told([4, 6], [4, 5]),),
    }
)  # fmt: skip
AFTER = CaseAnswers(
    {
        "rewrite_new": (told([1, 2], [1, 2], -0.1),), "rewrite_old": (told([1], [3], -3.0),),
        "paraphrase_new": (told([1, 5], [1, 2], -1.0),), "paraphrase_old": (told([3], [3], -0.5),),
        "near_old": (told([3], [3], -0.1), told([1], [3], -2.0)), "rival_old": (told([3], [3], -0.1), told([1], [3], -2.0)),
        "rival_new": (told([3], [1], -2.0), told([1], [1], -1.0)),
        "portability_Reasoning": (told([8], [8]), told([7], [7])), "portability_Subject_Aliasing": (told([1], [2]),),
        "locality_Relation_Specificity": (told([4, 5], [4, 5]),),
    },
    {"rewrite": (" Football, as ever",), "fluency": (" a a a",)},
)  # fmt: skip


def test_locality_is_a_mean_over_probes_of_their_shares():
    """As EasyEdit takes it: a probe of nine tokens counts as much as one of one."""
    was = (told([4], [4]), told([5] * 9, [5] * 9))
    now = (told([4], [4]), told([6] * 9, [5] * 9))
    before, after = (CaseAnswers({"locality_Forgetfulness": each}) for each in (was, now))
    assert measured(CASE, ["locality"], after, before, edited=True)["locality"] == 0.5


def test_every_metric_by_hand():
    got = measured(CASE, [*FORCED, "efficacy_gen", "fluency"], AFTER, BEFORE, edited=True)
    expected = {
        "efficacy_acc": 1.0, "efficacy_success": 1.0, "edit_success": 1.0, "generality": 0.5, "paraphrase_acc": 0.0, "paraphrase_success": 0.0,
        "specificity_acc": 0.5, "specificity_success": 0.5, "portability_Reasoning": 1.0, "portability_Subject_Aliasing": 0.0,
        "portability": 0.5,  # the mean of the groups' means, not of the probes
        # agreement with what was said before, not with the truth
        "locality_Relation_Specificity": 0.5, "locality": 0.5,
        "ctp_locality": (0.5 + 0.5) / 2, "ctp_score": (1.0 + 0.5 + (0.5 + 0.5) / 2) / 3, "efficacy_gen": 1.0,
        # "Tim Duncan is a a a": bigrams 1 1 1 2 of 5, trigrams 1 1 1 1 of 4
        "fluency": (2 / 3 * (0.6 * math.log2(5) + 0.4 * math.log2(2.5)) + 4 / 3 * 2) / 2,
    }  # fmt: skip
    for name, value in expected.items():
        assert got[name] == pytest.approx(value), name
    assert math.isnan(got["multihop_acc"])
    assert math.isnan(got["instance_wise"])
    unedited = measured(
        CASE, ["efficacy_acc", "edit_success", "locality"], BEFORE, BEFORE, edited=False
    )
    assert unedited == {
        "efficacy_acc": 0.0,
        "edit_success": 0.5,
        "locality": 1.0,
        "locality_Relation_Specificity": 1.0,
    }


def test_multi_hop_prompts_want_the_answer_of_their_side():
    probes = {
        "onward_old": (told([1], [1]), told([2, 3], [2, 3])),
        "onward_new": (told([1], [4]), told([2, 3], [2, 5])),
    }
    look = CaseAnswers({**AFTER.told, **probes})
    assert measured(CASE, ["multihop_acc"], look, look, edited=False) == {"multihop_acc": 1.0}
    # one token right is not the answer
    assert measured(CASE, ["multihop_acc"], look, look, edited=True) == {"multihop_acc": 0.0}
    half = CaseAnswers({"onward_new": (told([4], [4]), told([2, 3], [2, 5]))})
    assert measured(CASE, ["multihop_acc"], half, look, edited=True) == {"multihop_acc": 0.5}


def test_what_is_asked_of_a_chain():
    """Efficacy by the edited hop's cloze, paraphrase by its question, specificity by the hops that
    are not edited."""
    hops = (Hop("q1", "c1", "Spain"), Hop("q2", "c2", "Madrid"), Hop("q3", "c3", "Europe"))
    # behind the edit another chain goes on
    new = (hops[0], replace(hops[1], answer="Paris"), Hop("q4", "c4", "Asia"))
    fact = replace(FACT, paraphrases=("Which sport does {} play?",))
    case = MultiHopCase(
        7,
        (fact.to("football"),),
        ("Q",),
        "Europe",
        "Asia",
        (),
        (),
        hops,
        new,
        (1,),
        ("cloze of the chain",),
    )
    asked = {name: [(p.text, p.answer) for p in probes] for name, probes in questions(case).items()}
    assert asked == {
        "rewrite_new": [(FACT.text, "football")], "rewrite_old": [(FACT.text, "basketball")],
        "paraphrase_new": [("Which sport does Tim Duncan play?", "football")],
        "paraphrase_old": [("Which sport does Tim Duncan play?", "basketball")],
        "near_old": [("c1", "Spain")],
        "hops_old": [("c1", "Spain"), ("c2", "Madrid"), ("c3", "Europe")], "hops_new": [("c1", "Spain"), ("c2", "Paris"), ("c4", "Asia")],
        "onward_old": [("cloze of the chain", "Europe")], "onward_new": [("cloze of the chain", "Asia")],
    }  # fmt: skip
    look = CaseAnswers({"near_old": (told([3], [3]),), "paraphrase_new": (told([1, 2], [1, 2]),)})
    names = ["specificity_acc", "paraphrase_acc"]
    assert measured(case, names, look, look, edited=True) == {
        "specificity_acc": 1.0,
        "paraphrase_acc": 1.0,
    }


def test_other_names_count_on_their_side_of_a_chain():
    """Those of a hop with it, the new answer's with the edit of its hop, also where that is not the
    first one."""
    hops = (Hop("q1", "c1", "Spain", ("ES",)), Hop("q2", "c2", "Madrid", ("Villa",)))
    new = (hops[0], Hop("q2", "c2", "Paris", ("Lutetia",)))
    case = MultiHopCase(
        7, (FACT.to("Paris"),), ("Q",), "Madrid", "Paris", ("Villa",), ("Lutetia",), hops, new, (1,), ("cloze",)
    )  # fmt: skip
    aliases = {name: [p.aliases for p in probes] for name, probes in questions(case).items()}
    assert aliases["rewrite_new"] == [("Lutetia",)]
    assert aliases["rewrite_old"] == [()]
    assert aliases["near_old"] == [("ES",)]
    assert aliases["hops_old"] == [("ES",), ("Villa",)]
    assert aliases["hops_new"] == [("ES",), ("Lutetia",)]
    assert (aliases["onward_old"], aliases["onward_new"]) == ([("Villa",)], [("Lutetia",)])


def test_a_summary_is_of_the_last_step_and_the_median_second():
    rows = [
        (0, 1, 0.0, 1.0, 1.0), (0, 2, 0.0, 0.0, 1.0), (1, 1, 0.0, 1.0, 10.0), (1, 2, 0.0, 0.0, 10.0),
        (2, 2, 0.0, 1.0, 1.0),
    ]  # fmt: skip
    frame = pd.DataFrame(rows, columns=["case", "step", "before", "after", "seconds"])
    (row,) = summary(frame.assign(metric="a", relative_norm=0.0)).itertuples()
    assert (row.after, row.cases, row.seconds) == (pytest.approx(1 / 3), 3, 1.0)


def test_what_is_written_counts_by_any_name():
    case = replace(
        CASE,
        neighbours=(
            Probe("LeBron James plays", "basketball", ("hoops",)),
            Probe("Larry Bird plays", "basketball"),
        ),
    )
    now = CaseAnswers(
        AFTER.told, {"paraphrase": (" Footballers",), "near": (" hoops, and", " tennis")}
    )
    got = measured(case, ["paraphrase_gen", "specificity_gen"], now, BEFORE, edited=True)
    assert got == {"paraphrase_gen": 0.0, "specificity_gen": 0.5}
    now = CaseAnswers(AFTER.told, {"paraphrase": (" football.",)})
    assert measured(case, ["paraphrase_gen"], now, BEFORE, edited=True) == {"paraphrase_gen": 1.0}


def test_multi_hop_counts_any_question_and_the_answers_of_its_side():
    hops = (Hop("q1", "c1", "Spain"), Hop("q2", "c2", "Madrid"))
    case = MultiHopCase(
        7,
        (FACT.to("football"),),
        ("Q1", "Q2", "Q3"),
        "Madrid",
        "Paris",
        ("City of Madrid",),
        ("Lutetia",),
        hops,
        hops,
        (0,),
    )
    thoughts = (
        "no answer here",
        " X. Answer: lutetia.\nQuestion: Answer: Madrid",
        "Answer: Madrid",
    )
    look = CaseAnswers(
        {
            "hops_new": (told([1], [1]), told([2], [2])),
            "hops_old": (told([1], [1]), told([2], [3])),
        },
        {"cot": thoughts, "direct": ("Paris!", "x", "y")},
    )
    names = ["instance_wise", "multihop_cot", "multihop_cot_rate", "multihop_direct"]
    assert measured(case, names, look, look, True) == {
        "instance_wise": 1.0,
        "multihop_cot": 1.0,
        "multihop_cot_rate": 1 / 3,
        "multihop_direct": 1.0,
    }
    assert measured(case, names, look, look, False) == {
        "instance_wise": 0.0,
        "multihop_cot": 1.0,
        "multihop_cot_rate": 1 / 3,
        "multihop_direct": 0.0,
    }
    unasked = CaseAnswers({}, {"cot": (), "direct": ()})  # a chain without questions
    assert all(
        math.isnan(value) for value in measured(case, names, unasked, unasked, True).values()
    )
    # a model that answers nothing
    silent = CaseAnswers({}, {"cot": ("", "", ""), "direct": ("", "", "")})
    assert measured(case, names[1:], silent, silent, True) == dict.fromkeys(names[1:], 0.0)


def test_begins_stops_at_words():
    assert begins(" Football.", ["football"])
    assert begins("football team", ["football"])
    assert not begins("footballers", ["football"])
    assert not begins("the football", ["football"])


def test_ngram_entropy_against_another_way():
    """ROME's: sum of -p log2 p over n-gram frequencies, weights 2/3 and 4/3, averaged."""
    text = "the cat sat on the cat and the dog sat on the cat"
    words = text.split()
    parts = []
    for n, weight in ((2, 2 / 3), (3, 4 / 3)):
        grams = Counter(" ".join(words[i : i + n]) for i in range(len(words) - n + 1))
        p = torch.tensor(list(grams.values()), dtype=torch.float64) / sum(grams.values())
        parts.append(weight * float(torch.distributions.Categorical(p).entropy()) / math.log(2))
    assert ngram_entropy(text) == pytest.approx(sum(parts) / 2)
    assert ngram_entropy("a b a b a b a b") < ngram_entropy("a b c d e f g h")
    assert math.isnan(ngram_entropy("two words"))


def test_scores_are_harmonic_means_of_means():
    assert harmonic([1.0, 0.5, 0.25]) == pytest.approx(3 / (1 + 2 + 4))
    assert harmonic([1.0, 0.0]) == 0.0
    assert math.isnan(harmonic([0.0, math.nan]))
    rows = [
        (c, 1, m, 0.0, v)
        for c in (0, 1)
        for m, v in (("efficacy_acc", 1.0), ("paraphrase_acc", c), ("specificity_acc", 0.5))
    ]
    frame = pd.DataFrame(rows, columns=["case", "step", "metric", "before", "after"]).assign(
        relative_norm=0.0, seconds=1.0
    )
    got = summary(frame).set_index("metric")
    assert got.loc["score_acc", "after"] == pytest.approx(3 / (1 + 2 + 2))
    # Wilson's for one of two
    half = 1.959964 * math.sqrt(1.959964**2 / 16 + 0.5**2 / 2) / (1 + 1.959964**2 / 2)
    assert (got.loc["paraphrase_acc", "low"], got.loc["paraphrase_acc", "high"]) == pytest.approx(
        (0.5 - half, 0.5 + half)
    )


def test_before_and_after_are_of_the_same_cases():
    """Case 1 was refused: what was right of it before is not counted either; of a metric without
    any edited case the share before is still told."""
    rows = [(0, "a", 0.0, 1.0), (1, "a", 1.0, math.nan), (1, "b", 1.0, math.nan)]
    frame = pd.DataFrame(rows, columns=["case", "metric", "before", "after"]).assign(
        step=1, relative_norm=0.0, seconds=1.0
    )
    got = summary(frame).set_index("metric")
    assert got["before"].to_dict() == {"a": 0.0, "b": 1.0}
    assert got.loc["a", ["after", "cases"]].tolist() == [1.0, 1]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["gptj", "qwen3-gqa"])
def test_what_is_told_equals_hugging_face_one_by_one(kind, backend):
    """Teacher-forced argmax and mean log-probability, prompt by prompt, without padding."""
    lens = tiny_lens(kind, backend)
    probes = [
        Probe(text, answer) for text in PROMPTS for answer in ("Norway", "Quorix Works of Spain")
    ]
    for size in (1, 2, 64):
        for probe, got in zip(probes, tell(lens, probes, batch_size=size), strict=True):
            prompt, answer = (
                lens.tokenizer(t)["input_ids"]
                for t in (probe.text, probe.text + " " + probe.answer)
            )
            logp = (
                lens.hf(torch.tensor([answer]))
                .logits[0, len(prompt) - 1 : -1]
                .double()
                .log_softmax(-1)
            )
            asked = answer[len(prompt) :]
            assert got.asked == tuple(asked)
            assert got.said == tuple(logp.argmax(-1).tolist())
            assert got.logprob == pytest.approx(
                float(logp[range(len(asked)), asked].mean()), abs=1e-5
            )
            assert got.share == sum(
                int(a == b) for a, b in zip(got.said, asked, strict=True)
            ) / len(asked)


def test_questions_say_what_is_asked():
    groups = questions(CASE)
    assert [p.answer for p in groups["rewrite_new"] + groups["rewrite_old"]] == [
        "football",
        "basketball",
    ]
    assert {p.answer for p in groups["rival_new"]} == {"football"}
    assert "onward_new" not in groups
    assert set(GENERATED) == {
        "efficacy_gen",
        "paraphrase_gen",
        "specificity_gen",
        "multihop_cot",
        "multihop_cot_rate",
        "multihop_direct",
        "multihop_gen",
        "multihop_known",
        "fluency",
        *(
            f"{of}_{how}"
            for of in ("efficacy", "paraphrase", "specificity")
            for how in ("exact", "contains")
        ),
    }


@pytest.mark.parametrize(
    ("text", "begins_so", "exact", "holds"),
    [
        (" football", True, True, True),
        (" football.\n", True, True, True),
        (" football and also basketball in the", True, False, True),  # it runs on
        (" football.\n\n\n" + RUNS_ON, True, False, True),  # so it does
        (" the sport of football.", False, False, True),
        (" footballer", False, False, False),
        ("", False, False, False),
    ],
)
def test_what_a_continuation_says(text, begins_so, exact, holds):
    answers = CaseAnswers({}, {"rewrite": (text,), "rewrite_whole": (text,)})
    names = ["efficacy_gen", "efficacy_exact", "efficacy_contains", "efficacy_judged"]
    asked = []

    def judge(prompt, said, accepted):
        asked.append((prompt, said, list(accepted)))
        return 0.25

    found = measured(CASE, names, answers, answers, True, judge)
    assert list(found.values()) == [float(begins_so), float(exact), float(holds), 0.25]
    # a judge sees what was said, without the mark of what runs on
    assert asked == [(CASE.request.fact.text, text.removesuffix(" …"), ["football"])]


CAPITAL = qv.EditCase(
    qv.Fact("The capital of {} is", "France", "Paris", relation="P36").to("Rome"),
    neighbours=(
        Probe("The capital of Norway is", "Oslo"),
        Probe("The capital of Italy is", "Rome"),
    ),
)


def test_what_is_asked_beside_an_edit():
    asked = questions(CAPITAL, (*BESIDE, "near_"))
    texts = {name: [(probe.text, probe.answer) for probe in asked[name]] for name in asked}
    assert texts["denied_new"] == [("It is not true that the capital of France is", "Rome")]
    assert texts["alone_new"] == [("France", "Rome")]
    assert texts["reversed_new"] == [("Rome is the capital of", "France")]
    # the neighbour whose own answer is the new one has no wrong answer
    stated = "The capital of France is Rome. The capital of Norway is"
    assert texts["distracted_old"] == [(stated, "Oslo")]
    assert texts["distracted_new"] == [(stated, "Rome")]
    unrelated = [text for text, _ in texts["unrelated_new"]]
    assert "In France, the official language is" in unrelated
    assert not any("twin city" in text for text in unrelated)  # a place answers it too
    assert not set(questions(CAPITAL)) & set(texts).difference({"near_old"})


def test_what_is_put_in_front_of_a_prompt_is_a_sentence_of_its_language():
    """A question is denied by no "It is not true that", nor is a prompt that is not in English
    letters; Chinese has neither blanks nor a full stop of ours."""
    asked = qv.Fact("What is the capital of {}?", "France", "Paris").to("Rome")
    assert not questions(qv.EditCase(asked), ("denied_",)).get("denied_new")
    chinese = qv.EditCase(
        qv.Fact("{}的首都是", "法国", "巴黎").to("罗马"),
        neighbours=(Probe("德国的首都是", "柏林"),),
    )
    groups = questions(chinese, ("denied_", "distracted_"))
    assert not groups.get("denied_new")
    assert groups["distracted_old"][0].text == "法国的首都是罗马。德国的首都是"


def test_an_answer_with_its_end_of_text_is_said_without_it():
    """Generated text does not show the token; teacher forcing counts it."""
    lens = qv.load("toy-gptj")
    fact = qv.Fact("{} plays the sport of", "Elena Morefeld", "fencing")
    whole = f"golf{lens.tokenizer.eos_token}"
    names = ["efficacy_acc", "efficacy_gen", "efficacy_exact", "efficacy_contains"]
    editor = qv.LocFT(layer=4, lr=3e-3, epochs=60)
    frame = qv.evaluate(lens, [qv.EditCase(fact.to(whole))], names, editor)
    assert frame["before"].tolist() == [0.0] * 4
    assert frame["after"].tolist() == [1.0] * 4


def test_a_chain_made_by_hand_has_no_edited_hop_among_its_neighbours():
    """Also where the case does not say which hop the edit belongs to."""
    fact = qv.Fact("{} plays the sport of", "Elena Morefeld", "fencing")
    old = (Hop("q1", fact.text, "fencing"), Hop("q2", "It is played in", "Veldora"))
    new = (Hop("q1", fact.text, "golf"), Hop("q2", "It is played in", "Veldora"))
    case = MultiHopCase(
        0, (fact.to("golf"),), ("q?",), "Veldora", "Veldora", hops=old, new_hops=new
    )
    assert [probe.text for probe in questions(case)["near_old"]] == ["It is played in"]
    for edited in ((-1,), (2,), ("0",), (True,)):
        with pytest.raises(qv.QVLensError, match="edited says which of its 2 new_hops"):
            dataclasses.replace(case, edited=edited)
    for groups in ({"Reasoning": [fact]}, [("Reasoning", "text")], [fact]):
        with pytest.raises(qv.QVLensError, match="portability"):
            qv.EditCase(fact.to("golf"), portability=groups)


@pytest.mark.parametrize(
    ("prompt", "id"),
    [("The mother tongue of {} is", "P103"), ("{} is a citizen of", "P27"), ("What is the twin city of {}? It is", "P190"),
     ("{}, who plays the position", "P413"), ("The colour of {} is", None)],
)  # fmt: skip
def test_relations_are_known_by_their_words(prompt, id):
    found = relations.relation_of(qv.Fact(prompt, "X", "y"))
    assert (found.id if found else None) == id


def test_metrics_beside_an_edit_against_hugging_face():
    """From whole forward passes of the plain model."""
    lens = qv.load("toy-gptj")
    names = [*NAMED]
    frame = qv.evaluate(lens, [CAPITAL], names).set_index("metric")["before"]
    hf, tokenizer = lens.hf, lens.tokenizer

    def logp(text, answer):
        ids = tokenizer(text)["input_ids"]
        more = tokenizer(f" {answer}")["input_ids"]
        logits = hf(torch.tensor([ids + more])).logits[0].log_softmax(-1)
        rows = logits[len(ids) - 1 : -1]
        total = sum(float(rows[i, token]) for i, token in enumerate(more))
        return total, [int(row.argmax()) for row in rows] == more

    stated = "The capital of France is Rome. The capital of Norway is"
    assert frame["denied_acc"] == (
        not logp("It is not true that the capital of France is", "Rome")[1]
    )
    assert frame["overfit_alone"] == pytest.approx(math.exp(logp("France", "Rome")[0]), rel=1e-3)
    assert frame["overfit_neighbour"] == pytest.approx(math.exp(logp(stated, "Rome")[0]), rel=1e-3)
    assert frame["reversal_acc"] == logp("Rome is the capital of", "France")[1]
    assert frame["distracted_acc"] == logp(stated, "Oslo")[1]
    unrelated = relations.others(CAPITAL.request.fact)
    wanted = sum(math.exp(logp(text, "Rome")[0]) for text in unrelated) / len(unrelated)
    assert frame["overfit_relation"] == pytest.approx(wanted, rel=1e-3)


def test_two_hops_count_where_the_model_knew_them():
    """Three prompts; the model knew two of them, and one of these has the new answer now."""
    probes = [
        (Probe(text, "Oslo", ("Christiania",)), Probe(text, "Rome")) for text in ("a", "b", "c")
    ]
    case = dataclasses.replace(CAPITAL, onward=tuple(probes))
    before = CaseAnswers({}, {"onward": (" Oslo, of course", " Bergen", " Christiania")})
    now = CaseAnswers({}, {"onward": (" Rome", " Rome", " Oslo")})
    names = ["multihop_gen", "multihop_known"]
    assert measured(case, names, now, before, edited=True) == {
        "multihop_gen": 0.5,
        "multihop_known": pytest.approx(2 / 3),
    }
    assert measured(case, names, before, before, edited=False)["multihop_gen"] == 1.0
    nothing = CaseAnswers({}, {"onward": (" x", " y", " z")})
    got = measured(case, names, now, nothing, edited=True)
    assert math.isnan(got["multihop_gen"])
    assert got["multihop_known"] == 0.0
