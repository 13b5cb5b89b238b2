"""What decides a claim, on made-up rows of which the answer is known."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import pandas as pd
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "experiments"))
import claims  # pyright: ignore[reportMissingImports]
from deciding import FAILS, HOLDS, OPEN, ahead, beats, curve, groups  # pyright: ignore[reportMissingImports]


def edits(column: str, **metrics: dict) -> pd.DataFrame:
    """Rows of 12 cases: metric -> value of the column -> mean; cases differ from it by as much up as down."""
    rows = [
        {column: value, "metric": metric, "after": mean + 0.01 * (-1) ** case, "seed": case % 3, "case": case // 3, "step": 1}
        for metric, means in metrics.items()
        for value, mean in means.items()
        for case in range(12)
    ]
    return pd.DataFrame(rows)


def test_differences_have_their_sign():
    frame = edits("method", score={"A": 0.9, "B": 0.5, "C": 0.95, "same": 0.5})
    assert beats("score", "A", "B")(frame)[1] == HOLDS
    assert beats("score", "B", "A")(frame)[1] == FAILS
    assert beats("score", "B", "same")(frame)[1] == OPEN
    assert ahead("score", "A", ("B",))(frame)[1] == HOLDS
    told, verdict = ahead("score", "A", ("B", "C"))(frame)
    assert verdict == FAILS
    assert "A − C -5.0" in told
    assert ahead("score", "A", ("D",))(frame) == ("not measured", OPEN)


def test_curves_go_the_way_they_should():
    frame = edits("share", up={0.1: 0.2, 0.5: 0.9, 1.0: 0.6}, down={0.1: 0.9, 0.5: 0.5, 1.0: 0.1})
    assert curve("share", ("up", None, None, True), ("down", None, None, False))(frame)[1] == HOLDS
    assert curve("share", ("up", 0.5, 1.0, True))(frame)[1] == FAILS
    assert curve("share", ("up", None, None, True), ("down", None, None, True))(frame)[1] == FAILS
    assert curve("share", ("up", 0.1, 0.7, True))(frame) == ("not measured", OPEN)


def test_groups_of_modules():
    frame = edits("parameters", locality={"['W_in']": 0.9, "['W_Q']": 0.8, "['W_out']": 0.4, "['W_O']": 0.3})
    assert groups(("locality",), ("['W_in']", "['W_Q']"))(frame)[1] == HOLDS
    assert groups(("locality",), ("['W_out']",))(frame)[1] == FAILS


def layers(**best: list[int]) -> pd.DataFrame:
    """Ranks of 28 layers per category, both parts alike: the named ones first."""
    rows = []
    for category, first in best.items():
        order = [*first, *(layer for layer in range(28) if layer not in first)]
        for part, rank in itertools.product(("ffn", "attn"), range(28)):
            rows.append({"category": category, "part": part, "layer": order[rank], "rank": rank + 1, "score": 1.0 / (rank + 1)})
    return pd.DataFrame(rows)


def test_takeaway_1_counts_every_choice_of_categories():
    similar = {name: list(range(9)) for name in ("nationality", "continent", "language", "capital", "leadership")}
    apart = layers(**similar, author=list(range(9, 18)), sport=list(range(18, 27)), founder=list(range(19, 28)))
    told, verdict = claims.takeaway_1(apart)
    assert verdict == HOLDS
    assert "p = 0.02" in told  # 1 of the 56 choices of five
    alike = layers(**similar, author=list(range(9)), sport=list(range(9)), founder=list(range(9)))
    assert claims.takeaway_1(alike)[1] == OPEN
    assert claims.attention_is_general(apart)[1] == OPEN  # both parts alike
    general = apart.assign(layer=apart["layer"].where(apart["part"] == "ffn", apart["rank"] - 1))
    assert claims.attention_is_general(general)[1] == HOLDS


def test_figure_2_wants_more_than_random_and_more_than_off_category():
    def frame(top: float, off: float, drawn: float) -> pd.DataFrame:
        values = {
            ("top", "in category"): top,
            ("top", "off category"): off,
            ("random", "in category"): drawn,
            ("random", "off category"): drawn,
        }
        return pd.DataFrame([
            {"layer": "all", "category": c, "seed": s, "neurons": n, "group": g, "drop_relative": v + 0.01 * (-1) ** s}
            for (n, g), v in values.items() for c in ("sport", "capital") for s in (0, 1, 2)
        ])  # fmt: skip

    assert claims.figure_2(frame(0.9, 0.2, 0.1))[1] == HOLDS
    assert claims.figure_2(frame(0.9, 0.95, 0.1))[1] == FAILS
    assert claims.figure_2(frame(0.1, 0.0, 0.0))[1] == FAILS


@pytest.mark.parametrize(("lag", "verdict"), [(1, HOLDS), (2, HOLDS), (-2, FAILS), (0, FAILS)])
def test_figure_3_knows_which_comes_first(lag, verdict):
    bump = {5: 1.0, 6: 3.0, 7: 1.0}
    rows = [
        {"part": part, "layer": layer, "score": bump.get(layer - moved, 0.0)}
        for part, moved in (("query", 0), ("count", lag)) for layer in range(16)
    ]  # fmt: skip
    told, got = claims.figure_3(pd.DataFrame(rows))
    assert got == verdict
    assert f"at lag {lag} " in told


def test_chance_ranks_within_the_seed():
    def frame(located: list[float]) -> pd.DataFrame:
        means = [{"located": located[seed], **{f"random {i}": 0.1 * i for i in range(10)}} for seed in range(3)]
        return pd.DataFrame([
            {"layers": name, "metric": "efficacy_acc", "after": value, "seed": seed, "case": 0, "step": 1}
            for seed in range(3) for name, value in means[seed].items()
        ])  # fmt: skip

    told, verdict = claims.chance(frame([1.0, 1.0, 1.0]))
    assert verdict == HOLDS
    assert "0 of 30 draws" in told
    assert claims.chance(frame([0.35, 0.35, 0.35]))[1] == FAILS
    assert "9 of 30 draws" in claims.chance(frame([1.0, 1.0, 0.05]))[0]


def test_time_and_tokens_have_their_sign():
    rows = [
        {"method": m, "seconds": s + 0.01 * case, "seed": 0, "case": case}
        for m, s in (("KN", 3.0), ("FT", 1.0))
        for case in range(5)
    ]
    assert claims.seconds("KN", ("FT",), -1)(pd.DataFrame(rows))[1] == HOLDS
    assert claims.seconds("KN", ("FT",), 1)(pd.DataFrame(rows))[1] == FAILS
    values = {"first behind it": 1.0, "last": 0.9, "other": 0.1, "subject": 0.0}
    tokens = pd.DataFrame(
        [{"prompt": p, "place": k, "ffn": v + 0.01 * p, "attn": 0.0} for p in range(4) for k, v in values.items()]
    )
    assert claims.converging_tokens(tokens)[1] == HOLDS
    assert (
        claims.converging_tokens(tokens.assign(ffn=tokens["ffn"].where(tokens["place"] != "first behind it", -1.0)))[1] == FAILS
    )
