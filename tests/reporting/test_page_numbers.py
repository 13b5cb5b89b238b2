"""What the study's page makes of its frames, on frames of which every cell is known."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pandas as pd
import pytest

from qv_lens.reporting import page
from qv_lens.reporting.graph import drawing
from qv_lens.reporting.tables import Column, by_layer, cell, signed


def test_a_strip_is_blue_where_the_answer_is_raised():
    """As deep as FFN and attention together are large, orange below zero."""
    tokens = pd.DataFrame({
        "token": ["a", "b", "c"], "ffn": [1.0, -1.0, 0.0], "attn": [1.0, 0.0, 0.0],
        "promoted": [["x"], ["y"], ["z"]],
    })  # fmt: skip
    strip = page._strip(tokens)
    assert [token.score for token in strip] == ["2.00", "-1.00", "0.00"]
    assert strip[0].shade == "rgba(42,111,219,0.70)"
    assert strip[1].shade == "rgba(224,123,57,0.35)"
    assert strip[2].shade.endswith(",0.00)")


def test_beliefs_have_the_highest_layer_on_top_and_tokens_in_order():
    rows = [(1, 1, "d"), (0, 1, "b"), (1, 0, "c"), (0, 0, "a")]
    frame = pd.DataFrame(rows, columns=["layer", "position", "said"])
    frame["promoted"] = [[said] for said in frame["said"]]
    beliefs = page._beliefs(frame.assign(token="t", probability=0.5, answer=0.25))
    assert [(layer, [said for said, *_ in cells]) for layer, cells in beliefs] == [
        (1, ["c", "d"]), (0, ["a", "b"]),
    ]  # fmt: skip
    assert "likeliest 50.0%, the answer 25.00%" in beliefs[0][1][0][2]


def test_a_table_of_edits_has_what_is_after_and_its_interval():
    frame = pd.DataFrame({
        "variant": ["A", "B"], "metric": "efficacy_acc", "cases": 4, "before": 0.25,
        "after": [0.5, 0.75], "low": [0.1, 0.3], "high": [0.8, 0.9],
    })  # fmt: skip
    (row,) = page._metrics(frame).rows
    assert [cell.text for cell in row[1:]] == ["4", "25.0%", "50.0% (10 to 80)", "75.0% (30 to 90)"]
    (row,) = page._metrics(frame.assign(cases=1)).rows  # of one edit no interval
    assert [cell.text for cell in row[3:]] == ["50.0%", "75.0%"]
    bars = page._bars(pd.concat([frame, frame.assign(cases=1)]))
    assert bars["low"].isna().tolist() == [False, False, True, True]


def test_where_an_answer_is_lost_in_words():
    """The median of several draws that all lose it; else how many do."""
    assert page._in_words(pd.Series([1.0, 3.0, 100.0]), True) == "3"
    assert page._in_words(pd.Series([1.0, math.nan, 3.0]), True) == "2 of 3 draws"
    assert page._in_words(pd.Series([math.nan]), True) == "not lost"
    assert page._in_words(pd.Series([1.0]), False) == "not known before"


def test_the_best_heads_are_shown_with_where_they_look():
    heads = pd.DataFrame({"layer": range(10), "head": 1.0, "score": [float(i) for i in range(10)]})
    heads.loc[10] = [3, math.nan, 99.0]  # a layer's bias is no head
    look = [(layer, 1, token, layer / 10 if token == "a" else 1 - layer / 10)
            for layer in range(10) for token in "ab"]  # fmt: skip
    attention = pd.DataFrame(look, columns=["layer", "head", "token", "weight"])
    shown = page._heads(SimpleNamespace(heads=heads, attention=attention))  # pyright: ignore[reportArgumentType]
    assert [head["name"] for head in shown] == [f"a{layer}-1" for layer in range(9, 1, -1)]
    assert [share for _, _, share in shown[0]["tokens"]] == ["90.0%", "10.0%"]


def graph(weights: list[float]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """A query neuron at the first token that feeds so many value neurons at the second."""
    one = {"coefficient": 1.0, "effect": -0.5, "gradient": math.nan, "relp": 0.25, "promoted": ["x"],
           "suppressed": ["y"]}  # fmt: skip
    nodes = [{"id": "q", "role": "query", "layer": 0, "neuron": 7, "position": 0, "value_score": math.nan,
              "query_score": 0.125, **one}]  # fmt: skip
    nodes += [
        {"id": f"v{i}", "role": "value", "layer": 2, "neuron": i, "position": 1, "value_score": 1.0 - i / 100,
         "query_score": math.nan, **one}
        for i in range(len(weights))
    ]  # fmt: skip
    edges = [{"source": "q", "target": f"v{i}", "weight": w} for i, w in enumerate(weights)]
    return pd.DataFrame(nodes), pd.DataFrame(edges).assign(lost_logprob=0.0625)


def test_a_card_names_the_strongest_edges_whatever_their_sign():
    weights = [0.1, -0.9, 0.2, 0.8, -0.3, 0.4, 0.7, -0.05]
    drawn = drawing(*graph(weights), ["a", "b"])
    by_id = {node.id: node for node in drawn.nodes}
    ties = [(tie.id, tie.weight) for tie in by_id["q"].feeds]
    assert ties == [("v1", "-0.9000"), ("v3", "+0.8000"), ("v6", "+0.7000"), ("v5", "+0.4000"),
                    ("v4", "-0.3000"), ("v2", "+0.2000")]  # fmt: skip
    assert by_id["q"].fed_by == ()
    assert [(tie.id, tie.weight) for tie in by_id["v1"].fed_by] == [("q", "-0.9000")]
    assert by_id["v1"].feeds == ()
    assert by_id["q"].scores == (("Eq. 10, query", "+0.1250"), ("RelP", "+0.2500"))
    assert by_id["v0"].effect == "-0.5000"


def test_edges_show_their_sign_and_their_share_of_the_largest():
    """The weakest first, so that the strongest lies on top; higher layers stand higher."""
    drawn = drawing(*graph([0.25, -1.0, 0.5]), ["a", "b"])
    shown = [(edge.target, edge.sign, edge.share, edge.width) for edge in drawn.edges]
    assert shown == [("v0", "plus", 0.25, 1.5), ("v2", "plus", 0.5, 2.5), ("v1", "minus", 1.0, 4.5)]
    assert drawn.edges[2].told.startswith("q → v1: weight -1.0000 nats")
    assert drawn.edges[2].told.endswith("falls by +0.0625")
    by_id = {node.id: node for node in drawn.nodes}
    assert by_id["v0"].y < by_id["q"].y
    assert by_id["q"].x < by_id["v0"].x < by_id["v1"].x < by_id["v2"].x


def test_of_many_edges_the_weakest_are_left_out():
    drawn = drawing(*graph([(i + 1) / 1000 for i in range(152)]), ["a", "b"])
    assert {f"v{i}" for i in range(152)} - {edge.target for edge in drawn.edges} == {"v0", "v1"}


def test_edges_that_all_weigh_nothing_are_drawn_thin():
    drawn = drawing(*graph([0.0, 0.0]), ["a", "b"])
    assert [(edge.share, edge.width) for edge in drawn.edges] == [(0.0, 0.5)] * 2


def test_cells_of_a_layer_are_means():
    frame = pd.DataFrame({"layer": [0, 0, 1], "kind": "ffn", "score": [1.0, 4.0, -0.5]})
    ((kind, *cells),) = by_layer("layers", frame, "kind").rows
    assert (kind.text, [each.text for each in cells]) == ("ffn", ["2.500", "-0.500"])


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (0.00005, "+0.0001"),
        (0.00004, "about 0"),
        (-0.0, "+0.0000"),
        (math.nan, "–"),
        (-1.5, "-1.5000"),
    ],
)
def test_numbers_with_their_sign(value, told):
    assert signed(value) == told


def test_shares_are_percent_and_a_download_gets_the_number():
    share = Column("share", number=True, share=True)
    assert (cell(0.125, share).text, cell(0.125, share).value) == ("12.5%", "0.125")
    assert cell(-0.0001, Column("n", number=True)).text == "0.000"


def removal(**of) -> pd.DataFrame:
    """Two facts: the study's own loses its answer at 3 by Eq. 9, at 1 by the gradient, in two of five
    random draws; the other at 10, and never."""
    rows = []
    for prompt, whose in ((0, "this fact"), (1, "another")):
        lost = [{"Eq. 9": 3, "gradient": 1, page.IN_ROUNDS: 99}, {"Eq. 9": 10, "gradient": 99,
                page.IN_ROUNDS: 1}][prompt]  # fmt: skip
        draws = [(name, 0, at) for name, at in lost.items()]
        draws += [("random", seed, 10 if seed < 2 else 99) for seed in range(5)]
        rows += [
            {"ranking": name, "seed": seed, "prompt": prompt, "kept": False, "k": k, "right": k < at,
             "known": True, "clean": -0.1, "logprob": -float(k), "said": "x", "whose": whose, "text": "t"}
            for name, seed, at in draws for k in (1, 3, 10)
        ]  # fmt: skip
    return pd.DataFrame(rows).assign(**of)


def test_the_sentence_about_the_curve_is_about_this_fact():
    kept = removal(kept=True).query("ranking == 'Eq. 9'")
    without = pd.DataFrame(
        [("Eq. 9", 3, "a game of fencing"), ("gradient", 1, "golf")],
        columns=["ranking", "k", "said"],
    )
    study = SimpleNamespace(
        removal=removal(), kept=kept, without=without,
        request=SimpleNamespace(fact=SimpleNamespace(answer="fencing")),
    )  # fmt: skip
    told = page._removal(study)  # pyright: ignore[reportArgumentType]
    assert [count for count, _ in told["lost_at"]] == [
        "3 neurons", "1 neurons", "none of the numbers tried",
    ]  # fmt: skip
    assert told["lost_at_random"] == (2, 5)
    assert told["most"] == 10
    assert told["without"] == [
        ("Eq. 9", 3, "a game of fencing", True), ("gradient", 1, "golf", False),
    ]  # fmt: skip
    (row,) = told["kept"].table.rows
    assert [each.text for each in row] == ["Eq. 9", "-1.00", "-3.00", "-10.00"]
    own, other = told["removal_table"].rows
    assert [each.text for each in own[2:]] == ["3", "1", "not lost", "2 of 5 draws"]
    assert [each.text for each in other[2:]] == ["10", "not lost", "1", "2 of 5 draws"]


def test_what_zeroing_costs_is_the_mean_of_its_draws():
    rows = [("random", "same", 0.5, 0.25, 25.0, 0.5), ("random", "same", 0.5, 0.75, -25.0, -0.5),
            ("top", "same", 0.5, 0.429, 7.1, 0.142)]  # fmt: skip
    frame = pd.DataFrame(
        rows, columns=["neurons", "group", "clean", "accuracy", "drop_points", "drop_relative"]
    ).assign(count=5, logprob_change=-0.25)
    loss = page._ablation(SimpleNamespace(ablation=frame))  # pyright: ignore[reportArgumentType]
    assert loss is not None
    random, top = ([each.text for each in row] for row in loss.table.rows)
    assert random == ["random", "same", "5", "50.0%", "50.0%", "0.0", "0.0%", "-0.250"]
    assert top == ["top", "same", "5", "50.0%", "42.9%", "7.1", "14.2%", "-0.250"]
    assert (loss.lost, loss.right) == (True, True)
    gained = page._loss("x", frame[1:2], ("neurons", "group"))
    assert (gained.lost, gained.right) == (True, True)  # an answer won is no "nothing"
    still = frame[:1].assign(drop_points=0.0, drop_relative=0.0, clean=0.0, accuracy=0.25)
    assert (page._loss("x", still, ("neurons",)).lost, page._loss("x", still, ()).right) == (
        False, False,
    )  # fmt: skip


def test_verdicts_and_changed_answers_are_those_of_the_editors():
    probes = pd.DataFrame({
        "kind": ["the fact", "must stay"], "prompt": ["p", "n"], "wanted": ["golf", "chess"],
        "before": ["fencing", "chess"], "A": ["golf of course", "chess"], "B": ["fencing", "golf"],
    })  # fmt: skip
    request = SimpleNamespace(new="golf", fact=SimpleNamespace(answer="fencing"))
    verdicts = page._verdicts(SimpleNamespace(probes=probes, request=request))  # pyright: ignore[reportArgumentType]
    assert verdicts == [("A", True, "golf of course"), ("B", False, "fencing")]
    changed = [[each.changed for each in row] for row in page._probes(probes).rows]
    assert changed == [[False] * 4 + [True, False], [False] * 4 + [False, True]]


def test_a_neurons_row_holds_its_coefficient_and_its_score():
    frame = pd.DataFrame(
        {"layer": [2], "neuron": [7], "coefficient": [1.5], "score": [-0.25], "alone": [0.125]}
    ).assign(promoted=[["a", "b"]])
    (row,) = page._neurons("", "value", "Eq. 9", frame, {(2, 7): "f2-7"})[1].rows
    assert [each.text for each in row[:4]] == ["f2-7", "1.50", "-0.2500", "0.1250"]
    assert row[0].node == "f2-7"


def test_a_belief_is_as_dark_as_it_is_likely():
    frame = pd.DataFrame(
        {"layer": [0], "position": [0], "token": ["t"], "probability": [0.5], "answer": [0.01]}
    ).assign(promoted=[["x"]])
    ((_, ((_, shade, _),)),) = page._beliefs(frame)
    assert shade.endswith(",0.35)")


def test_no_head_that_lowers_the_answer_is_among_those_that_raise_it():
    heads = pd.DataFrame({"layer": [0, 1], "head": 0.0, "score": [0.5, -0.5]})
    look = [(layer, 0, "a", 1.0) for layer in (0, 1)]
    attention = pd.DataFrame(look, columns=["layer", "head", "token", "weight"])
    shown = page._heads(SimpleNamespace(heads=heads, attention=attention))  # pyright: ignore[reportArgumentType]
    assert [head["name"] for head in shown] == ["a0-0"]
