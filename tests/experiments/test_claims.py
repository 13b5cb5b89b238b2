"""What decides a claim, on made-up rows of which the answer is known."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from experiments import editors, ledger, run_all, sequence
from experiments.ace import (
    bottleneck,
    figure_2,
    figure_3,
    figure_5,
    neurons_27,
    section_4_2,
    table_1,
    table_2,
    table_4,
    table_5,
    table_6_7,
)
from experiments.ctp import figure_3 as ctp_figure_3
from experiments.ctp import figure_4 as ctp_figure_4
from experiments.ctp import table_2 as ctp_table_2
from experiments.decide import (
    DESCRIBED,
    FAILS,
    HOLDS,
    NOT_MEASURED,
    OPEN,
    ahead,
    averaged,
    beats,
    best,
    compared,
    curve,
    decided,
    difference,
    groups,
    half_the_largest_less_the_last,
    lost,
    nearer,
    per_case,
    reaches,
    read_as,
    two_samples,
)
from experiments.kne import figure_b3
from experiments.kne import table_1 as kne_table_1
from qv_lens.evaluation.intervals import UNBOUNDED


def edits(column: str, **metrics: dict) -> pd.DataFrame:
    """Rows of 12 cases: metric -> value of the column -> mean; cases differ from it by as much up
    as down, and pairs of them a little: of differences that are all the same little is known."""
    rows = [
        {
            column: value,
            "data": "facts",
            "metric": metric,
            "after": mean + 0.01 * (-1) ** case + 0.0005 * math.cos(math.pi * (i + 1) * case / 6),
            "seed": case % 3,
            "case": case // 3,
            "step": 1,
        }
        for metric, means in metrics.items()
        for i, (value, mean) in enumerate(means.items())
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
    told, verdict = ahead("score", "A", ("B", "D"))(frame)
    assert verdict == OPEN
    assert told.endswith("not measured: D")


def test_the_best_of_several_rivals_is_above_by_chance():
    """Nine methods that are equally good: few of a hundred tables say that one is ahead of A."""
    rivals = tuple("BCDEFGHI")
    cases = pd.MultiIndex.from_product([("A", *rivals), range(30)], names=["method", "case"])
    frame = cases.to_frame(index=False).assign(data="facts", metric="score", seed=0, step=1)
    verdicts = []
    for seed in range(100):
        scores = np.random.default_rng(seed).uniform(size=len(frame))
        verdicts.append(ahead("score", "A", rivals)(frame.assign(after=scores))[1])
    assert verdicts.count(FAILS) <= 5  # 14 where the best is compared as if named beforehand
    assert verdicts.count(HOLDS) == 0
    better = frame.assign(after=scores + 0.5 * (frame["method"] == "A"))
    assert ahead("score", "A", rivals)(better)[1] == HOLDS
    assert ahead("score", "B", ("A", *rivals[1:]))(better)[1] == FAILS


def test_few_pairs_decide_nothing_however_alike():
    """Of five pairs that all agree, chance makes as many agree once in 16 times; of 102 right
    answers out of 102, that more than 97.75% of all are right does not follow."""
    index = pd.RangeIndex(5)
    for count in (2, 5):
        same, other = (pd.Series(value, index[:count], dtype=float) for value in (1.0, 0.0))
        assert decided(difference(same, other)) == decided(difference(other, same)) == OPEN
        nearly = same - 1e-3 * pd.Series(range(count), index[:count])
        assert decided(difference(nearly, other)) == OPEN
    ones, zeros = pd.Series([1.0] * 60), pd.Series([0.0] * 60)
    assert (decided(difference(ones, zeros)), decided(difference(zeros, ones))) == (HOLDS, FAILS)
    assert decided(difference(ones, ones)) == OPEN
    # most pairs are equal: of four that differ, all agree by chance once in eight times
    most = pd.Series([-1.0] * 4 + [0.0] * 30)
    gap = difference(most, most * 0)
    assert gap.mean == pytest.approx(-4 / 34)
    assert gap.high == 0.0
    assert decided(gap) == OPEN
    assert decided(difference(most * 0, most)) == OPEN
    six = pd.Series([-1.0] * 6 + [0.0] * 30)
    assert decided(difference(six, six * 0)) == FAILS  # once in 32 times
    divided = pd.Series([-3.0] + [0.5] * 12 + [0.0] * 400)  # one case against twelve
    assert decided(difference(divided, divided * 0, UNBOUNDED)) == OPEN
    all_right = edits("method", score={"A": 1.0}).assign(after=1.0)
    assert reaches("score", "A", 0.7)(all_right)[1] == HOLDS
    told, verdict = reaches("score", "A", 0.9775)(all_right)
    assert verdict == OPEN
    assert told == "100.0% (75.8 to 100.0), 12 cases"


def test_differences_without_pairs_are_newcombes():
    """His example (1998, Table II, a): 56 of 70 against 48 of 80, difference 0.2, method 10: 0.0524
    to 0.3339."""
    first, second = (
        pd.Series([1.0] * hits + [0.0] * (asked - hits)) for hits, asked in ((56, 70), (48, 80))
    )
    found = two_samples(first, second)
    assert (found.mean, found.low, found.high) == pytest.approx((0.2, 0.0524, 0.3339), abs=1e-4)
    assert nearer(found, 0.5) == nearer(-found, 0.5)
    assert (decided(nearer(found, 0.4)), decided(nearer(found, 0.01))) == (HOLDS, FAILS)


def test_curves_go_the_way_they_should():
    frame = edits("share", up={0.1: 0.2, 0.5: 0.9, 1.0: 0.6}, down={0.1: 0.9, 0.5: 0.5, 1.0: 0.1})
    assert curve("share", ("up", None, None, True), ("down", None, None, False))(frame)[1] == HOLDS
    assert curve("share", ("up", 0.5, 1.0, True))(frame)[1] == FAILS
    assert curve("share", ("up", None, None, True), ("down", None, None, True))(frame)[1] == FAILS
    assert curve("share", ("up", 0.1, 0.7, True))(frame) == ("not measured", OPEN)
    up = ("up", None, None, True)
    assert curve("share", up, of=(0.1, 1.0))(frame)[1] == HOLDS
    told, verdict = curve("share", up, of=(0.1, 1.0, 2.0))(frame)
    assert verdict == OPEN  # the largest is not among them
    assert told.endswith("not measured: 2.0")


def test_groups_of_modules():
    means = {"['W_in']": 0.9, "['W_Q']": 0.8, "['W_out']": 0.4, "['W_O']": 0.3}
    frame = edits("parameters", locality=means)

    def of(inside, rows=frame, every=tuple(means)):
        return groups(("locality",), inside, "parameters", every)(rows)

    assert of(("['W_in']", "['W_Q']"))[1] == HOLDS
    assert of(("['W_out']",))[1] == FAILS
    told, verdict = of(("['W_in']", "['W_Q']"), every=(*means, "['W_K']"))
    assert verdict == OPEN
    assert told.endswith("not measured: ['W_K']")
    # cases that the worst of them lacks do not make the others better
    lacks = frame["after"].where((frame["parameters"] != "['W_Q']") | (frame["seed"] > 0))
    fewer = of(("['W_in']", "['W_Q']"), frame.assign(after=lacks))
    assert "8 cases" in fewer[0]
    assert "['W_in']" in fewer[0]
    assert "+50.0" in fewer[0]


def test_cases_of_other_batches_are_no_pairs():
    """Nor are those of another number of edits: a case's number is then another fact's."""
    frame = edits("method", score={"A": 0.9, "B": 0.5})
    for name in ("batch_size", "count"):
        sized = frame.assign(**{name: 20})
        assert beats("score", "A", "B")(sized)[1] == HOLDS
        sized.loc[sized["method"] == "B", name] = 50
        told, verdict = ahead("score", "A", ("B",))(sized)
        assert verdict == OPEN
        assert told.endswith("A lacks 12 of 24 cases, B lacks 12 of 24 cases")


def test_refused_edits_do_not_leave_an_editor_better():
    scores = edits("method", ctp_score={"CTP": 0.6, "MEMIT": 0.0, "PMET": 0.0, "AlphaEdit": 0.9})
    refused = (scores["method"] == "AlphaEdit") & (scores["seed"] > 0)
    some = scores.assign(after=scores["after"].mask(refused))
    told, verdict = ctp_table_2.all_fall(some)
    assert verdict == OPEN
    assert told.endswith("(12 edits); AlphaEdit lacks 8 of 12 cases")
    told, verdict = ahead("ctp_score", "AlphaEdit", ("CTP",))(some)
    assert verdict == OPEN
    assert told.endswith("AlphaEdit lacks 8 of 12 cases")


def test_the_best_of_all_is_above_each_of_them():
    """A low mean of the others does not do: the strongest of them counts, by every metric."""
    success = {"['W_out']": 0.9, "['W_O']": 0.5, "['W_K']": 0.1}
    assert (
        best(("success",), "['W_out']", "parameters", success)(
            edits("parameters", success=success)
        )[1]
        == HOLDS
    )
    told, verdict = best(("success",), "['W_out']", "parameters", (*success, "['W_V']"))(
        edits("parameters", success=success)
    )
    assert verdict == OPEN
    assert told.endswith("not measured: ['W_V']")
    frame = edits(
        "parameters",
        success=success,
        portability={"['W_out']": 0.4, "['W_O']": 0.6, "['W_K']": 0.0},
    )
    told, verdict = best(("success", "portability"), "['W_out']", "parameters", success)(frame)
    assert verdict == FAILS
    assert "['W_out'] − ['W_O'] -20.0" in told
    of_none = best(("success",), "['W_gate']", "parameters", ())
    assert of_none(frame) == ("not measured", OPEN)


def layers(**first_ones: list[int]) -> pd.DataFrame:
    """Ranks of 28 layers per category, both parts alike: the named ones first."""
    rows = []
    for category, first in first_ones.items():
        order = [*first, *(layer for layer in range(28) if layer not in first)]
        for part, rank in itertools.product(("ffn", "attn"), range(28)):
            rows.append(
                {
                    "category": category,
                    "part": part,
                    "layer": order[rank],
                    "rank": rank + 1,
                    "score": 1.0 / (rank + 1),
                }
            )
    return pd.DataFrame(rows)


def test_takeaway_1_counts_every_choice_of_categories():
    similar = {
        name: list(range(9))
        for name in ("nationality", "continent", "language", "capital", "leadership")
    }
    apart = layers(
        **similar, author=list(range(9, 18)), sport=list(range(18, 27)), founder=list(range(19, 28))
    )
    told, verdict = table_1.takeaway_1(apart)
    assert verdict == HOLDS
    assert "p = 0.02" in told  # 1 of the 56 choices of five
    alike = layers(**similar, author=list(range(9)), sport=list(range(9)), founder=list(range(9)))
    assert table_1.takeaway_1(alike)[1] == OPEN
    assert table_1.attention_is_general(apart)[1] == OPEN  # both parts alike
    general = apart.assign(layer=apart["layer"].where(apart["part"] == "ffn", apart["rank"] - 1))
    assert table_1.attention_is_general(general)[1] == HOLDS


def test_figure_2_wants_more_than_random_and_more_than_off_category():
    def frame(top: float, off: float, drawn: float) -> pd.DataFrame:
        values = {
            ("top", "in category"): top,
            ("top", "off category"): off,
            ("random", "in category"): drawn,
            ("random", "off category"): drawn,
        }
        return pd.DataFrame([
            {"layer": "top", "category": c, "seed": s, "neurons": n, "group": g, "drop_relative": v + 0.01 * (-1) ** s + 0.001 * i * s, "clean": 1.0, "prompts_asked": 100, "held_out": True}
            for i, ((n, g), v) in enumerate(values.items()) for c in ("sport", "capital") for s in (0, 1, 2)
        ])  # fmt: skip

    assert figure_2.loses_more_than_half(frame(0.9, 0.2, 0.1))[1] == HOLDS
    assert figure_2.loses_more_than_half(frame(0.9, 0.99, 0.1))[1] == FAILS
    assert figure_2.loses_more_than_half(frame(0.1, 0.0, 0.0))[1] == FAILS
    apart = pd.concat([frame(0.1, 0.0, 0.0), frame(0.9, 0.2, 0.1).assign(held_out=False)])
    told, verdict = figure_2.loses_more_than_half(apart)
    assert verdict == FAILS  # of other prompts than rank
    ranking, others = told.split("<br>")
    assert ranking.startswith("best layer, the prompts that rank: capital 90.3%")
    assert others.startswith("best layer, other prompts than rank: capital 10.3%")
    # the whole model is told, and decides nothing: the paper zeroes neurons of the best layer
    beside = [frame(0.9, 0.2, 0.1), frame(0.1, 0.0, 0.0).assign(layer="all")]
    assert figure_2.loses_more_than_half(pd.concat(beside))[1] == HOLDS
    assert figure_2.loses_more_than_half(beside[1])[1] == OPEN
    assert told.count(", 100 prompts, 3 seeds)") == 12  # of one seed
    # what holds of one category and fails of the other does not hold
    mixed = pd.concat([frame(0.9, 0.2, 0.1).query("category == 'capital'"), frame(0.1, 0.0, 0.0).query("category == 'sport'")])  # fmt: skip
    assert figure_2.loses_more_than_half(mixed)[1] == FAILS
    # at random by 5 seeds, all else by one: 40 prompts each, and the draws differ more than they do
    one = frame(0.5, 0.0, 0.0).query("seed == 0 and neurons == 'top'").assign(prompts_asked=20)
    row = frame(0.0, 0.0, 0.0).query("seed == 0 and neurons == 'random'").assign(prompts_asked=20)
    draws = [row.assign(seed=s, drop_relative=v) for s, v in enumerate((0.0, 0.0, 0.1, 0.2, 0.95))]
    told, verdict = figure_2.loses_more_than_half(pd.concat([one, *draws]))
    assert "at random 25.0% (0.0 to 74.7%, 20 prompts, 5 seeds)" in told
    assert verdict == OPEN
    told, verdict = figure_2.loses_more_than_half(one)
    assert "at random not measured" in told
    assert verdict == OPEN
    assert figure_2.loses_more_than_half(row)[1] == OPEN
    alike = [row.assign(seed=s, drop_relative=0.1 + 0.02 * (s - 2)) for s in range(5)]
    told, verdict = figure_2.loses_more_than_half(pd.concat([one, *alike]))
    assert "at random 10.0% (2.8 to 30.1%, 20 prompts, 5 seeds)" in told  # Wilson's, 2 of 20
    assert verdict == OPEN  # 51% of 20 prompts may be less than half
    most = one.assign(drop_relative=one["drop_relative"] + 0.4)
    assert figure_2.loses_more_than_half(pd.concat([most, *alike]))[1] == HOLDS


@pytest.mark.parametrize(
    ("lag", "verdict"), [(1, HOLDS), (2, HOLDS), (-2, FAILS), (0, FAILS), (4, FAILS)]
)
def test_figure_3_knows_which_comes_first(lag, verdict):
    """By Eq. 9; Eq. 10 is told. What differs between categories is not decided."""
    bump = {5: 1.0, 6: 3.0, 7: 1.0}

    def rows(category: str, lag: int) -> list[dict]:
        moved = {"ffn": 0, "query": 3, "count": lag}
        return [
            {"part": part, "category": category, "layer": layer, "score": bump.get(layer - by, 0.0)}
            for part, by in moved.items() for layer in range(16)
        ]  # fmt: skip

    alike = pd.DataFrame([*rows("sport", lag), *rows("capital", lag)])
    told, got = figure_3.values_after_queries(alike)
    assert got == verdict
    assert f"1.00 at lag {lag} " in told
    assert f"after Eq. 10 1.00 at lag {lag - 3};" in told
    other = pd.DataFrame([*rows("sport", lag), *rows("capital", 0 if lag in (1, 2) else 1)])
    assert figure_3.values_after_queries(other)[1] == OPEN


def test_time_and_tokens_have_their_sign():
    rows = [
        {"method": m, "seconds": s + 0.01 * s * case, "seed": 0, "case": case}
        for m, s in (("KN", 3.0), ("FT", 1.0))
        for case in range(8)
    ]
    assert ctp_figure_3.seconds("KN", ("FT",), -1)(pd.DataFrame(rows))[1] == HOLDS
    assert ctp_figure_3.seconds("KN", ("FT",), 1)(pd.DataFrame(rows))[1] == FAILS
    # the prompt's first token, an attention sink, is none of the others
    values = [("other", 30.0), ("subject", 0.0), ("first behind it", 1.0), ("other", 0.1), ("last", 0.9)]  # fmt: skip
    tokens = pd.DataFrame(
        [
            {"prompt": p, "position": i, "place": k, "ffn": v + 0.01 * v * p, "attn": 0.0}
            for p in range(7)
            for i, (k, v) in enumerate(values)
        ]
    )
    told, verdict = table_5.converging_tokens(tokens)
    assert verdict == HOLDS
    # the subject's token is one of all others, and not in between
    assert told.startswith("after the subject − in between +0.93 ± 0.02 nats (− all others +0.98")
    between = tokens["ffn"].where(tokens["position"] != 3, 2.0)
    assert table_5.converging_tokens(tokens.assign(ffn=between))[1] == FAILS
    assert (
        table_5.converging_tokens(
            tokens.assign(ffn=tokens["ffn"].where(tokens["place"] != "first behind it", -1.0))
        )[1]
        == FAILS
    )


def by_layer(part: str, scores: list[float], **columns) -> pd.DataFrame:
    rows = [
        {"part": part, "layer": layer, "score": score, "interval": 0.5, **columns}
        for layer, score in enumerate(scores)
    ]
    return pd.DataFrame(rows)


def test_where_layers_end():
    ffn, attn = (
        by_layer("ffn_vector", [0, 1, 4, 9, 8, 1]),
        by_layer("attn_vector", [1, 9, 2, 0, 0, 0]),
    )
    other = ffn.assign(part="attn_vector"), attn.assign(part="ffn_vector")

    def in_categories(count: int, *parts: pd.DataFrame) -> pd.DataFrame:
        # every other category's scores lie a layer lower
        return pd.concat([
            part.assign(category=i, score=part["score"].shift(-(i % 2) * (part is parts[0]), fill_value=0))
            for i in range(count) for part in parts
        ])  # fmt: skip

    assert figure_5.attention_first(in_categories(6, ffn, attn))[1] == HOLDS
    assert figure_5.attention_first(in_categories(6, *other))[1] == FAILS
    assert figure_5.attention_first(in_categories(5, ffn, attn))[1] == OPEN, "too few categories"
    mixed = [in_categories(3, ffn, attn), in_categories(6, *other).query("category > 2")]
    assert figure_5.attention_first(pd.concat(mixed))[1] == OPEN
    rising = by_layer("ffn_vector", [0, 1, 2, 3, 4, 9])
    told, verdict = figure_5.attention_first(in_categories(6, attn, rising))
    assert "FFN's does not fall before the end in 6 of 6 categories" in told
    assert verdict == OPEN  # nothing is known of where it would
    neither = rising.assign(part="attn_vector")  # nothing falls before anything
    assert figure_5.attention_first(in_categories(6, neither, rising))[1] == OPEN
    assert figure_5.last_layers_low(ffn)[1] == HOLDS
    assert figure_5.last_layers_low(by_layer("ffn_vector", [1, 2, 9, 8]))[1] == FAILS
    # half of 9 is within the interval
    assert figure_5.last_layers_low(by_layer("ffn_vector", [1, 2, 9, 4.2]))[1] == OPEN
    assert figure_3.late_values(by_layer("count", [0, 1, 5, 9, 8, 1]))[1] == HOLDS
    assert figure_3.late_values(by_layer("count", [9, 5, 1, 1, 1, 1]))[1] == FAILS
    assert figure_3.late_values(by_layer("count", [0, 1, 5, 9, 8, 4.2]))[1] == OPEN


def test_layers_of_categories_are_the_same_or_not():
    ranks = layers(sport=[5, 6, 7], capital=[5, 6, 7]).replace({"part": {"attn": "query"}})
    other = layers(sport=[5, 6, 7], capital=[8, 9, 10]).replace({"part": {"attn": "query"}})
    assert figure_3.invariance(ranks.assign(model="EleutherAI/gpt-j-6B"))[1] == HOLDS
    assert figure_3.invariance(ranks.assign(model="Qwen/Qwen3-8B"))[1] == FAILS
    assert figure_3.invariance(other.assign(model="EleutherAI/gpt-j-6B"))[1] == FAILS
    assert figure_3.invariance(other.assign(model="Qwen/Qwen3-8B"))[1] == OPEN
    # the claim is about those two: of any other model the number stands without a verdict
    assert figure_3.invariance(ranks.assign(model="smollm2-135m"))[1] == DESCRIBED


@pytest.mark.parametrize(
    ("drop", "after", "verdicts"),
    [(0.6, 2.0, (HOLDS, HOLDS)), (0.0, 10.0, (FAILS, FAILS)), (0.32, 2.0, (OPEN, HOLDS))],
)
def test_suppression(drop, after, verdicts):
    clean = by_layer("", [10.0] * 8, condition="clean", category="all")
    zeroed = by_layer(
        "",
        [10.0] * 3 + [after] * 3 + [10.0] * 2,
        condition="Zero layer 2",
        category="all",
        suppressed=2,
        neurons=10,
        drop_relative=drop,
        clean=0.5,
        prompts_asked=100,
    )
    frame = pd.concat([clean, zeroed]).rename(columns={"score": "count"})
    frame["original"] = frame["count"] / 2
    assert (
        section_4_2.suppression_drop("Zero")(frame)[1],
        section_4_2.suppression_counts(frame)[1],
    ) == verdicts
    assert section_4_2.zeroed_drop(frame[frame["condition"] == "clean"]) == ("not measured", OPEN)
    assert "50 prompts" in section_4_2.suppression_drop("Zero")(frame)[0]  # those that were right
    assert f"30.0 ± 1.5 to {3 * after:.1f} ± 1.5" in section_4_2.suppression_counts(frame)[0]
    assert (
        f"({1.5 * after:.1f} of them the same) in the three layers after"
        in section_4_2.suppression_counts(frame)[0]
    )


def test_neurons():
    def sets(interpretable: float, important: float) -> pd.DataFrame:
        values = {
            "none": 1.0,
            "interpretable": interpretable,
            "important": important,
            "random": 1.0,
        }
        return pd.DataFrame([
            {"set": name, "sampled": value + 0.01 * value * (-1) ** i * (name != "none"), "zeroed": 27, "category": "sport", "prompt": i}
            for name, value in values.items() for i in range(6)
        ])  # fmt: skip

    assert neurons_27.interpretable_ones_matter(sets(0.03, 0.6))[1] == HOLDS
    assert neurons_27.interpretable_ones_matter(sets(0.9, 0.95))[1] == FAILS
    assert neurons_27.interpretable_ones_matter(sets(0.4, 0.1))[1] == FAILS
    # prompts without any such neuron say nothing, however many they are
    without = sets(1.0, 1.0).assign(zeroed=0, category="capital")
    told, verdict = neurons_27.interpretable_ones_matter(pd.concat([sets(0.03, 0.6), without]))
    assert told.startswith("6 of 12 prompts have any, 27.0 on average, there none 100.0%")
    assert verdict == HOLDS
    # nor do one or two where the paper zeroes 27; and seeds ask the same prompts again
    few = pd.concat([sets(0.9, 0.95).assign(zeroed=2, seed=seed) for seed in (0, 1)])
    told, verdict = neurons_27.interpretable_ones_matter(few)
    assert told.endswith("far fewer than the paper's 27")
    assert verdict == OPEN

    def beside(effects: float, random: float) -> str:
        values = {"none": 0.9, "effects": effects, "random beside effects": random}
        return neurons_27.effects_matter(pd.DataFrame([
            {"set": name, "sampled": value * (1 + 0.02 * (-1) ** i), "category": "sport", "prompt": i}
            for name, value in values.items() for i in range(6)
        ]))[1]  # fmt: skip

    assert beside(0.1, 0.8) == HOLDS
    assert beside(0.6, 0.8) == FAILS, "more than half is left"
    assert beside(0.3, 0.1) == FAILS, "as many at random do more"
    roles = pd.DataFrame([
        {"prompt": p, "role": role, "interpretable": value} for p in range(8) for role, value in (("query", p == 0), ("value", True), ("shared", False))
    ])  # fmt: skip
    assert table_6_7.readable("value")(roles)[1] == HOLDS
    assert table_6_7.readable("shared")(roles)[1] != HOLDS


def test_edits_of_chains():
    frame = edits("method", multihop_cot={"ACE": 0.8, "PMET": 0.4, "FT": 0.03})
    frame["before"] = 0.99 + 0.005 * (-1) ** frame["case"]
    frame["edits"] = 1 + frame["case"] % 2
    told, verdict = table_2.above_pmet(frame)
    assert verdict == HOLDS
    assert "1: 80.3% / 40.4%" in told
    assert table_2.above_pmet(frame.replace({"method": {"ACE": "PMET", "PMET": "ACE"}}))[1] == FAILS
    assert table_2.tuning_fails(frame)[1] == HOLDS
    assert table_2.tuning_fails(frame.assign(after=0.5))[1] == FAILS
    # two right of twelve are not known to be more than a tenth
    few = frame.assign(after=(frame["case"] == 0) & (frame["seed"] < 2)).astype({"after": float})
    assert table_2.tuning_fails(few)[1] == OPEN
    two_edits = frame.replace({"method": {"PMET": "ROME", "FT": "MEMIT"}})
    assert table_2.by_edits(two_edits) == ("not measured", OPEN)
    assert table_2.tuning_fails(frame[frame["method"] != "FT"]) == ("not measured", OPEN)


def test_chains_by_edits_and_model():
    """ROME and MEMIT lose 60 points from one edit to three, ACE 10; on the second model they are 20
    points lower."""
    few = edits("method", multihop_cot={"ACE": 0.8, "PMET": 0.6, "ROME": 0.8, "MEMIT": 0.7}).assign(
        edits=1
    )
    many = edits(
        "method", multihop_cot={"ACE": 0.7, "PMET": 0.5, "ROME": 0.2, "MEMIT": 0.1}
    ).assign(edits=3, seed=5)
    both = pd.concat([few, many])
    told, verdict = table_2.by_edits(both)
    assert verdict == HOLDS
    assert "ROME 80.0% to 20.0% (+60.0" in told
    assert told.endswith("(12 and 4 cases)")
    assert table_2.by_edits(both.replace({"method": {"ACE": "ROME", "ROME": "ACE"}}))[1] == FAILS
    assert table_2.by_edits(both[both["method"] != "ACE"]) == ("not measured", OPEN)
    alike = [frame.assign(model=model) for model, frame in (("toy-gptj", few), ("toy-qwen3", few))]
    assert (
        table_2.worse_on_qwen(pd.concat([alike[0], alike[1].assign(after=few["after"] - 0.2)]))[1]
        == HOLDS
    )
    assert (
        table_2.worse_on_qwen(pd.concat([alike[0], alike[1].assign(after=few["after"] + 0.2)]))[1]
        == FAILS
    )
    assert table_2.worse_on_qwen(pd.concat(alike))[1] == OPEN
    scores = edits("method", ctp_score={"CTP": 0.6, "MEMIT": 0.0, "PMET": 0.01, "AlphaEdit": 0.02})
    assert ctp_table_2.all_fall(scores)[1] == HOLDS
    assert (
        ctp_table_2.all_fall(scores.replace({"method": {"CTP": "PMET", "PMET": "CTP"}}))[1] == FAILS
    )


def test_layers_left_out_and_equal_numbers_of_layers():
    means = {"": 0.9, "q": 0.8, "qq": 0.2, "qqq": 0.1, "v": 0.95}
    frame = edits("skip", multihop_acc=means, efficacy_acc=means).assign(model="toy-gptj")
    assert table_4.skipping("q")(frame)[1] == HOLDS
    assert table_4.skipping("v")(frame)[1] == FAILS
    # decided by vv there
    assert table_4.skipping("v")(frame.assign(model="Qwen/Qwen3-8B")) == ("not measured", OPEN)
    assert (
        "without 1 query layer 80.0% (-10.0 ± 0.0 points, 12 cases, 11% less)"
        in table_4.skipping("q")(frame)[0]
    )
    fewer = edits("skip", multihop_acc={"": 0.9, "q": 0.8, "qq": 0.7, "v": 0.6, "vv": 0.5})
    assert table_4.values_matter_more(fewer.assign(model="toy-gptj"))[1] == HOLDS
    turned = edits("skip", multihop_acc={"": 0.9, "q": 0.8, "qq": 0.3, "v": 0.6, "vv": 0.5})
    # of one it holds, of both it does not
    assert table_4.values_matter_more(turned.assign(model="toy-gptj"))[1] == FAILS
    # qqq against vv there
    assert table_4.values_matter_more(fewer.assign(model="Qwen/Qwen3-8B")) == ("not measured", OPEN)
    few, many = (
        edits("method", multihop_acc=m)
        for m in ({"ACE": 0.9, "PMET": 0.1, "MEMIT": 0.1}, {"ACE": 0.1, "PMET": 0.9, "MEMIT": 0.1})
    )
    both = pd.concat([few.assign(edited=4), many.assign(edited=9)])
    assert bottleneck.ahead_at_its_own_number(both.assign(model="toy-gptj"))[1] == HOLDS
    assert bottleneck.ahead_at_its_own_number(both.assign(model="EleutherAI/gpt-j-6B"))[1] == FAILS
    assert bottleneck.ahead_at_its_own_number(few.assign(edited=5, model="toy-gptj")) == (
        "not measured",
        OPEN,
    )
    more = [few.assign(edited=6), many.assign(edited=9), few.assign(edited=1)]
    # PMET gains 80 points
    assert bottleneck.marginal(pd.concat(more).assign(model="EleutherAI/gpt-j-6B"))[1] == FAILS
    little = few.assign(edited=9, after=few["after"] + 0.01 * (few["case"] % 2))
    assert (
        bottleneck.marginal(pd.concat([*more[:1], little]).assign(model="EleutherAI/gpt-j-6B"))[1]
        == HOLDS
    )
    # it edits five there
    assert bottleneck.marginal(pd.concat(more[:2]).assign(model="Qwen/Qwen3-8B")) == (
        "not measured",
        OPEN,
    )
    located = edits("located", locality={10: 0.1, 25: 0.9, 100: 0.5}).assign(count=100)
    for count in (40, 200):  # 25 is not a quarter of 40, nor is 100 all of 200
        some = located.assign(count=count)
        assert figure_b3.quarter(("locality",))(some) == ("not measured", OPEN)
    told, verdict = figure_b3.quarter(("locality",))(located)
    assert verdict == HOLDS
    assert told.startswith("25 90.0%, 100 50.0%")
    assert figure_b3.quarter(("locality",), within=0.5)(located)[1] == HOLDS
    assert figure_b3.quarter(("locality",), within=0.3)(located)[1] == FAILS


def test_nothing_lost_of_a_hundred_is_up_to_four_percent():
    """Wilson's interval by its definition: at its ends the share is 1.96 standard errors of that
    end away."""
    assert lost(0, 100) == "0.0% (0.0 to 3.7%, 100 prompts)"
    assert lost(10, 100) == "10.0% (5.5 to 17.4%, 100 prompts)"
    for end in (0.055, 0.174):
        assert abs(end - 0.1) == pytest.approx(1.96 * (end * (1 - end) / 100) ** 0.5, abs=1e-3)


def test_no_further_than():
    frame = edits("lam", generality={0.0: 0.5, 0.1: 0.53}, ctp_locality={0.0: 0.8, 0.1: 0.72})
    assert compared(("generality",), 0.1, 0.0, "lam", 0.05)(frame)[1] == HOLDS
    assert compared(("generality", "ctp_locality"), 0.1, 0.0, "lam", 0.05)(frame)[1] == FAILS
    entropy = edits("lam", fluency={0.0: 3.0, 0.1: 2.9})  # within 5% of itself, not within 0.05
    assert compared(("fluency",), 0.1, 0.0, "lam", 0.05)(entropy)[1] == HOLDS
    assert compared(("fluency",), 0.1, 0.0, "lam", 0.03)(entropy)[1] == FAILS
    assert reaches("generality", 0.1, 0.5, "lam")(frame)[1] == HOLDS
    assert reaches("generality", 0.1, 0.6, "lam")(frame)[1] == FAILS


def test_layers_lie_apart_or_next_to_each_other():
    def frame(query: int, value: int) -> pd.DataFrame:
        names = ("sport", "capital", "author", "founder", "language", "continent")
        ranks = layers(**{name: [query, query + 1, query + 2] for name in names}).replace(
            {"part": {"attn": "query"}}
        )
        values = layers(
            **{name: [value + i % 2 - 1, value, value + 1] for i, name in enumerate(names)}
        )
        return pd.concat([ranks[ranks["part"] == "query"], values[values["part"] == "ffn"]])

    apart, near = frame(14, 24), frame(20, 23)
    assert figure_3.separation(apart.assign(model="EleutherAI/gpt-j-6B"))[1] == HOLDS
    assert figure_3.separation(near.assign(model="EleutherAI/gpt-j-6B"))[1] == FAILS
    assert figure_3.separation(apart.assign(model="Qwen/Qwen3-8B"))[1] == FAILS
    assert figure_3.separation(near.assign(model="Qwen/Qwen3-8B"))[1] == HOLDS


def test_fluency_is_no_percentage():
    told, _ = curve("batch_size", ("fluency", None, None, True))(
        edits("batch_size", fluency={1: 2.5, 5: 2.8})
    )
    assert told.startswith("fluency 1: 250.0, 5: 280.0 (")


def test_nodes_by_layer():
    def nodes(keys: list[float], values: list[float] | None = None, groups=6) -> pd.DataFrame:
        return pd.DataFrame([
            {"layer": layer, "kind": kind, "path": "T+", "category": f"c{group}", "seed": 0, "score": "norm",
             "importance": value * (1 + group / 100)}
            for kind, scores in (("key", keys), ("value", values or [100 * key for key in keys]))
            for layer, value in enumerate(scores) for group in range(groups)
        ])  # fmt: skip

    assert ctp_figure_4.all_layers(nodes([3, 3, 5, 5, 2, 2]))[1] == HOLDS
    assert ctp_figure_4.all_layers(nodes([3, 3, 5, 5, 2, 2], groups=5))[1] == OPEN
    assert ctp_figure_4.early_over_late(nodes([3, 3, 5, 5, 2, 2]))[1] == HOLDS
    assert ctp_figure_4.early_over_late(nodes([2, 2, 5, 5, 3, 3]))[1] == FAILS
    # keys and values are no average of one another: one of them fails, in another layer each
    for frame in (
        nodes([3, 3, 5, 5, 2, 0.1], [3, 3, 5, 5, 2, 2]),
        nodes([3, 3, 5, 5, 2, 2], [0.1, 3, 5, 5, 2, 2]),
    ):
        assert ctp_figure_4.all_layers(frame)[1] == FAILS
    # of 12: what lies between middle and late counts for neither
    scaled = ctp_figure_4.early_over_late(nodes([3, 3, *[5] * 5, *[9] * 3, 2, 2]))
    assert scaled[1] == HOLDS
    assert scaled[0].startswith("keys: early 33.3%, middle 55.6%, late 22.2%")


def test_collecting_keeps_other_models_and_drops_doubles(tmp_path, monkeypatch):
    """A file's chains belong to `multihop`, asked twice they count once; what is there of other
    models stays; a file goes by its name, wherever it lay."""
    monkeypatch.setattr(ledger, "RESULTS", tmp_path / "results")
    row = {"method": "ACE", "protocol": "single", "data": "/one/machine/chains.json", "count": 2, "seed": 0, "layers": "preset", "skip": "", "edited": 0,
           "batch_size": 32, "edits": 2, "hops": 3, "step": 1, "metric": "multihop_cot", "after": 1.0, "seconds": 1.0, "editor": "null"}  # fmt: skip

    def rows(folder) -> pd.DataFrame:
        model = "Qwen/Qwen3-8B" if "Qwen" in folder.name else "toy-gptj"
        found = pd.DataFrame(
            [
                {**row, "model": model, "task": 0, "case": case, "status": "finished"}
                for case in (0, 1)
            ]
        )
        broken = pd.DataFrame([{"model": model, "task": 1, "method": "FT", "status": "failed"}])
        of_table = "table_2" in folder.name
        frame = pd.concat(
            [found.assign(known=False) if of_table else found, broken], ignore_index=True
        )
        frame.attrs["experiment"] = (
            "mine"
            if "other" in folder.name
            else "experiments.ace.table_2"
            if of_table
            else "experiments.editors"
        )
        frame.attrs["seconds"] = {0: 90.0}
        return frame

    monkeypatch.setattr(ledger, "load_run", rows)
    for name in (
        "first/editors",
        "second/table_2-Qwen3-8B",
        "second/editors-Qwen3-8B",
        "second/other",
    ):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").write_text("{}")
    ledger.collect(tmp_path / "first")
    ledger.collect(tmp_path / "second")
    ledger.collect(tmp_path / "first")
    costs = pd.read_csv(tmp_path / "results" / "costs.csv")
    assert costs.to_numpy().tolist() == [
        ["ace/table_2.py", "table_2-Qwen3-8B", "Qwen/Qwen3-8B", 1, 90],
        ["editors.py", "editors", "toy-gptj", 1, 90],
        ["editors.py", "editors-Qwen3-8B", "Qwen/Qwen3-8B", 1, 90],
    ]
    frame = pd.read_parquet(tmp_path / "results" / "multihop.parquet")
    assert frame.groupby("model").size().to_dict() == {"toy-gptj": 2, "Qwen/Qwen3-8B": 2}
    assert frame["edits"].dtype.kind == "i"
    assert set(frame["data"]) == {"chains.json"}
    assert not (tmp_path / "results" / "single.parquet").exists()


def test_one_batch_decides_nothing():
    """Its cases share one edit; of several batches, or several seeds, the verdict stands."""
    row = {"protocol": "batch", "batch_size": 4, "seed": 0}
    one = pd.DataFrame([{**row, "case": case} for case in range(4)])
    verdict = ("ACE 90%", HOLDS)
    assert ledger.of_one_edit(one, verdict) == ("ACE 90%; of one batch", OPEN)
    assert (
        ledger.of_one_edit(pd.concat([one, one.assign(case=one["case"] + 4)]), verdict) == verdict
    )
    assert ledger.of_one_edit(pd.concat([one, one.assign(seed=1)]), verdict) == verdict
    assert ledger.of_one_edit(one.assign(protocol="single"), verdict) == verdict
    assert ledger.of_one_edit(one.drop(columns="protocol"), verdict) == verdict
    assert ledger.of_one_edit(one, ("ACE 90%", DESCRIBED)) == ("ACE 90%", DESCRIBED)


def test_a_claim_is_decided_on_each_data_set():
    """A rise in one does not hide a fall in the other."""
    one = edits("method", locality=dict.fromkeys(("FT", "FTL", "AdaLoRA", "ROME", "MEMIT"), 0.5) | {"KNE": 0.9})  # fmt: skip
    other = one.assign(data="wiki", after=1 - one["after"])
    best_locality = next(c for c in kne_table_1.CLAIMS if "locality" in c.words)
    told, verdict = ledger.decided_on(best_locality, one.assign(model="m"), "m")
    assert verdict == HOLDS
    assert told.startswith("atlas: KNE 90.0%")
    both = pd.concat([one, other]).assign(model="m")
    told, verdict = ledger.decided_on(best_locality, both, "m")
    assert verdict == FAILS
    first, second = told.split("<br>")
    assert first.startswith("atlas: KNE 90.0%")
    assert second.startswith("wiki: ")
    assert "KNE 10.0%" in second
    best_success = next(c for c in kne_table_1.CLAIMS if "edit success" in c.words)
    shares = {"FT": 0.5, "MEMIT": 0.9}
    without_it = edits("method", edit_success=shares, generality=shares)
    assert best_success.decide(without_it) == NOT_MEASURED


def test_a_claim_about_two_models_waits_for_both():
    """Rows of the second alone decide nothing, not even in its own column."""
    claim = next(claim for claim in table_2.CLAIMS if claim.both)
    first, second = ledger.ACES
    rows = edits("method", multihop_cot={"ROME": 0.5, "MEMIT": 0.5, "PMET": 0.5})
    alone = rows.assign(model=second)
    assert ledger.decided_on(claim, alone, second) == (f"`--model {second}`", "")
    both = pd.concat([alone, rows.assign(model=first, after=rows["after"] + 0.2)])
    assert ledger.decided_on(claim, both, second)[1] == HOLDS
    assert ledger.decided_on(claim, both, first) == ("against the next column", "")


def test_which_model_loses_more():
    """10 and 40 points lost without a query layer, 20 and 50 without a value layer: the second is
    the more sensitive one."""
    means = {"toy-gptj": (0.8, 0.7), "toy-qwen3": (0.5, 0.4)}
    kept = {
        model: {"": 0.9, "q": query, "qq": query, "v": value}
        for model, (query, value) in means.items()
    }
    frames = [
        edits("skip", multihop_acc=means).assign(model=model) for model, means in kept.items()
    ]
    told, verdict = table_4.more_sensitive(pd.concat(frames))
    assert verdict == HOLDS
    assert "query layers: 10.0% and 40.0% lost (+30.0 ± 0.0 points, 12 and 12 cases)" in told
    swapped = [
        frame.assign(model=model)
        for frame, model in zip(frames, ("toy-qwen3", "toy-gptj"), strict=True)
    ]
    assert table_4.more_sensitive(pd.concat(swapped))[1] == FAILS
    assert table_4.more_sensitive(pd.concat([frames[0], frames[1][frames[1]["skip"] != "qq"]])) == (
        "not measured",
        OPEN,
    )


def test_what_runs_all_gives_every_result_once():
    """One file for each of the results; those of the comparison of editors are its own."""
    by_file = {Path(module.__file__): ledger.results_of(module) for module in ledger.experiments()}
    given = [by_file[file] for file in run_all.files()]
    assert len(set(given)) == len(given)
    assert set(given) | set(editors.RESULTS.values()) == set(by_file.values()) | set(
        editors.RESULTS.values()
    )
    assert not set(given) & set(editors.RESULTS.values())
    others = {*editors.RESULTS.values(), sequence.RESULTS}
    assert {path.stem for path in ledger.RESULTS.glob("*.parquet")} <= set(given) | others


def test_a_curve_is_read_at_its_last_step():
    """Two methods that stop at different steps, each at its own last one."""
    rows = [("A", 1, 0.1), ("A", 2, 0.9), ("B", 1, 0.3)]
    frame = pd.DataFrame(rows, columns=["method", "step", "after"])
    table = per_case(frame.assign(data="d", seed=0, case=0, metric="m"), "m", "method")
    assert table.to_numpy().tolist() == [[0.9, 0.3]]


def test_the_interval_of_a_mean_over_categories():
    """Half of it is the root of the sum of squares over their number: of 3 and 4 it is 5 / 2."""
    two = [by_layer("ffn_vector", [1.0, 2.0]), by_layer("ffn_vector", [3.0, 6.0])]
    frame = pd.concat([two[0].assign(interval=3.0), two[1].assign(interval=4.0)])
    other = by_layer("attn_vector", [9.0, 9.0]).assign(interval=9.0)
    table = averaged(pd.concat([frame, other]), "ffn_vector")
    assert table["score"].tolist() == [2.0, 4.0]
    assert table["interval"].tolist() == [2.5, 2.5]


def test_half_of_the_largest_less_the_last():
    """5 - 2 with the root of (6 / 2)^2 + 4^2; a large negative score is no peak; and where the last
    is the largest, half of one number."""
    scores = pd.DataFrame({"score": [-20.0, 10.0, 2.0], "interval": [1.0, 6.0, 4.0]})
    assert half_the_largest_less_the_last(scores)[:3] == (3.0, -2.0, 8.0)
    assert half_the_largest_less_the_last(scores.iloc[:2])[:3] == (-5.0, -8.0, -2.0)


def test_a_decision_on_other_rows_sees_those_alone():
    """B's rows in the place of A's, which are left out; without any, nothing was measured."""
    frame = edits("method", score={"A": 0.9, "B": 0.1})
    assert reaches("score", "A", 0.5)(frame)[1] == HOLDS
    told, verdict = read_as("method", {"B": "A"}, reaches("score", "A", 0.5))(frame)
    assert (told.split("%")[0], verdict) == ("10.0", FAILS)
    assert read_as("method", {"C": "A"}, reaches("score", "A", 0.5))(frame)[0] == "not measured"


def test_differences_of_entropies_are_not_cut_off_as_those_of_shares():
    told, verdict = beats("fluency", "A", "B")(edits("method", fluency={"A": 6.0, "B": 3.0}))
    assert verdict == HOLDS
    assert "A 600.0, B 300.0: +300.0 ± 0.0 points" in told
