"""Layers for an edit, by each score and by chance: against edits made by hand; the table and claims,
by hand."""

from __future__ import annotations

import ast

import pandas as pd
import pytest

import qv_lens as qv
from experiments import score_tables
from experiments.compare import drawn_cases, statistics_of
from experiments.decide import FAILS, HOLDS, NOT_MEASURED, OPEN
from experiments.scores import layers
from qv_lens.errors import ConfigError
from qv_lens.runs.run import Shelf

FEW = 300  # documents for C0


@pytest.fixture(scope="module")
def shelf():
    return Shelf()


def task(**fields) -> layers.Task:
    return layers.Task("toy-gptj", **{"count": 2, "others": 3, "documents": FEW, **fields})


@pytest.fixture(scope="module")
def written(shelf):
    """The layers of a task's choice."""

    def of(**fields) -> dict[str, tuple[int, ...]]:
        frame = layers.rows(task(**fields), shelf.lens("toy-gptj"), shelf.once)
        return ast.literal_eval(frame["written"].iloc[0])

    return of


def test_edits_at_the_layers_located(shelf):
    """The two first known facts, edited by hand at the best layers of the next three."""
    lens = shelf.lens("toy-gptj")
    cases = drawn_cases(lens, "facts", 5, 0, True, shelf.once).cases
    located = qv.locate(
        lens, [case.request.fact for case in cases[2:]], "subject_last", by="effects"
    )
    preset = qv.presets("toy-gptj")["MEMIT"].editor
    best = [layer for layer in located.value if 0 < layer < lens.n_layers - 1]
    chosen = tuple(sorted(best[: len(preset.layers)]))
    assert chosen != preset.layers
    frame = layers.rows(task(), lens, shelf.once)
    assert frame["written"].iloc[0] == str({"layers": chosen})
    editor = qv.MEMIT(**{**vars(preset), "layers": chosen})
    statistics = shelf.once(statistics_of, lens, "", FEW)
    for number, case in enumerate(cases[:2]):
        patch = qv.edit(lens, case.request, editor, statistics=statistics)
        with lens.patched(patch):
            likelier = lens.logprob(case.request.target) > lens.logprob(case.request.fact)
        row = frame.set_index(["case", "metric"]).loc[(number, "efficacy_success")]
        assert row["after"] == float(likelier)


def test_every_choice_writes_as_many_layers_as_the_preset(written):
    preset = qv.presets("toy-gptj")["ACE"].editor
    assert written(method="ACE", layers="preset") == {}
    counts = {"value_layers": len(preset.value_layers), "query_layers": len(preset.query_layers)}
    found = [
        written(method="ACE", layers=name)
        for name in ("effects", "paper", "two-hop", "random 0", "random 1", "random 7")
    ]
    assert all({name: len(some) for name, some in one.items()} == counts for one in found)
    assert all(max(one["query_layers"]) < max(one["value_layers"]) < 11 for one in found)
    assert len({str(one) for one in found[3:]}) > 1
    assert written(method="ACE", layers="random 0") == found[3]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"layers": "best"}, "Layers"),
        ({"layers": "random"}, "Layers"),
        ({"method": "MEMITT"}, "Method"),
        ({"method": "IFMET"}, "two groups"),
        ({"method": "KNE"}, "has no layers"),
        ({"others": 0}, "others must be at least 1"),
        ({"data": "none.json"}, "none.json"),
    ],
)
def test_what_cannot_be_asked(fields, words):
    with pytest.raises(ConfigError, match=words):
        task(**fields)


def measured(chosen: float, seeds: int = 1) -> pd.DataFrame:
    """ACE at located layers, and at twenty draws of 0.04, 0.08, ... 0.8."""
    shares = {"effects": chosen, **{f"random {i}": (i + 1) / 25 for i in range(20)}}
    return pd.DataFrame([
        {"model": "m", "data": "facts", "method": "ACE", "seed": seed, "layers": name, "case": case,
         "metric": metric, "after": share}
        for seed in range(seeds) for name, share in shares.items() for case in range(4)
        for metric in layers.METRICS
    ])  # fmt: skip


def test_claims_by_hand():
    decide = layers.better_than_chance("ACE", "effects")
    told, verdict = decide(measured(0.9))
    assert verdict == HOLDS
    assert (
        "0 of 20 draws are as good as effects, p = 0.05 (4 edits; of edits drawn from these 0.05 to 0.05)"
        in told
    )
    assert "effects 0.90, random 0.42 (0.04 to 0.80)" in told
    assert decide(measured(0.75))[1] == OPEN  # two are as good: p = 3 / 21
    assert decide(measured(0.39))[1] == FAILS
    # ahead by one edit of four: drawn again, it is often not among them
    one = measured(0.79)
    one.loc[(one["layers"] == "effects") & (one["case"] == 0), "after"] = 0.9
    told, verdict = decide(one)
    assert "0 of 20 draws are as good as effects" in told
    assert verdict == OPEN
    assert "4 of 40" in decide(measured(0.75, seeds=2))[0]
    assert layers.better_than_chance("MEMIT", "effects")(measured(1.0)) == NOT_MEASURED
    assert layers.better_than_chance("ACE", "paper")(measured(1.0)) == NOT_MEASURED
    alone = measured(1.0).query("layers == 'effects'")
    assert decide(alone) == NOT_MEASURED


def test_the_score_is_the_harmonic_mean():
    frame = measured(0.9).query("layers == 'effects'")
    parts = {"efficacy_success": 1.0, "paraphrase_success": 0.5, "specificity_success": 0.25}
    frame = frame.assign(after=frame["metric"].map(parts).fillna(0.0))
    # 3 / (1 + 2 + 4)
    assert layers.by_choice(frame)["score"].tolist() == [pytest.approx(3 / 7)]


def test_the_table_and_the_figure(tmp_path):
    frame = measured(0.75)
    frame.to_parquet(tmp_path / "scores_layers.parquet")
    text = score_tables.tables(tmp_path)
    assert "## Layers for an edit: m, atlas, 4 cases" in text
    assert "| ACE | effects at the subject's token | 75 | 75 | 75 | 0.75 | 2 of 20 | 0.14 |" in text
    assert "| ACE | chance, mean | 42 | 42 | 42 | 0.42 (0.04 to 0.80) |  |  |" in text
    assert {trace.name for trace in layers.figure(frame).data} == {"random", "effects"}
