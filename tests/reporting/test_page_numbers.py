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
