"""Grids that fit any model, and successive halving: who goes on, what is measured once, what is
held apart."""

from __future__ import annotations

import dataclasses
import json
import math
import random
import re
from types import SimpleNamespace

import pytest
import torch

import qv_lens as qv
from qv_lens.editing import closed_form, layer_by_layer
from qv_lens.editing.closed_form import ClosedForm
from qv_lens.editing.editors import editors
from qv_lens.editing.statistics import covariance
from qv_lens.evaluation.protocols import evaluate
from qv_lens.models.zoo import n_layers
from qv_lens.tuning import grids, tune
from qv_lens.tuning.grids import GRIDS, Shape, grid, subject_depth
from qv_lens.world import cases as world_cases
from qv_lens.world import generator
from tests.models import texts, tiny_lens

WORLD = generator.build(0)
CASES = world_cases.edit_cases(WORLD, 6)
TINY = Shape(n_layers=3, first=0, d_mlp=48, depth=1)


def test_grids_are_of_editors():
    assert {name.split(".")[0] for name in GRIDS} <= set(editors())


@pytest.mark.parametrize("method", GRIDS)
@pytest.mark.parametrize(
    "shape", [TINY, Shape(12, 1, 512, 4), Shape(28, 0, 16384, 6), Shape(36, 0, 12288, 10)]
)
def test_every_setting_lies_within_the_model(method, shape):
    settings = grid(method, shape)
    assert 1 <= len(settings) <= 40
    assert len(set(settings)) == len(settings)
    kind = editors()[method.split(".")[0]]
    for editor in settings:
        assert type(editor) is kind
        for name in ("layer", "layers", "deep_layers", "value_layers", "query_layers"):
            chosen = getattr(editor, name, None)
            for layer in (chosen,) if isinstance(chosen, int) else chosen or ():
                assert shape.first <= layer < shape.n_layers


def test_the_grids_of_gpt_j_written_out():
    """28 layers, 16,384 neurons each, half of the subject's part below layer 6."""
    shape = Shape(28, 0, 16384, 6)
    assert shape.ends == (4, 6, 7, 11, 15)
    assert shape.window(10) == (5, 6, 7, 8, 9, 10)
    assert Shape(28, 0, 16384, 27).ends[-1] == 26  # what the last layer writes no token reads
    memit = grid("MEMIT", shape)
    assert {editor.lam for editor in memit} == {1638.4, 16384.0}
    assert {editor.layers for editor in memit} == {shape.window(end) for end in shape.ends}
    assert {editor.clamp for editor in grid("ROME", shape)} == {4.0}
    assert {editor.lam for editor in grid("BetaEdit", shape)} == {1638.4, 16384.0}
    assert {len(editor.deep_layers) for editor in grid("IFMET", shape)} == {5}
    for editor in grid("ACE", shape):
        assert len(editor.value_layers) == 3
        assert max(editor.query_layers) < min(editor.value_layers)


def test_query_layers_are_left_below_value_layers_that_would_be_the_first():
    for shape in (TINY, Shape(6, 0, 48, 2)):
        for editor in grid("ACE", shape):
            assert editor.query_layers
            assert max(editor.query_layers) < min(editor.value_layers)


@pytest.mark.filterwarnings("ignore:Query layers")
def test_plans_of_a_real_lens_are_made_without_a_refusal():
    lens = tiny_lens("gptj", n_layers=4)
    shape = Shape(lens.n_layers, lens.backend_adapter.first_editable, lens.d_mlp, 1)
    for method in GRIDS:
        for editor in grid(method, shape):
            if isinstance(editor, ClosedForm):
                assert editor.plan(lens)


def test_the_depth_is_where_half_of_the_subjects_part_lies():
    lens = tiny_lens("qwen3-gqa")
    facts = [case.request.fact for case in CASES[:2]]
    frames = [qv.neuron_effects(lens, fact, None, positions="subject_last").frame for fact in facts]
    total = sum(frame.set_index(["layer", "neuron"])["score"].sort_index() for frame in frames)
    positive = total[total > 0].groupby("layer").sum()
    wanted = next(
        layer for layer in range(lens.n_layers) if positive.loc[:layer].sum() >= positive.sum() / 2
    )
    assert subject_depth(lens, facts) == wanted


@pytest.mark.parametrize(
    ("grid_of", "best", "wanted"),
    [
        ([{"lr": 1e-3}, {"lr": 3e-3}, {"lr": 1e-2}], {"lr": 1e-3}, [{"lr": 3.33e-4}]),
        ([{"lr": 1e-3}, {"lr": 3e-3}, {"lr": 1e-2}], {"lr": 1e-2}, [{"lr": 0.0333}]),
        ([{"lr": 1e-3}, {"lr": 3e-3}, {"lr": 1e-2}], {"lr": 3e-3}, []),
        ([{"lr": 1e-3}], {"lr": 1e-3}, []),
        (
            [{"lr": 1e-3, "clamp": 0.1}, {"lr": 1e-2, "clamp": 0.2}],
            {"lr": 1e-2, "clamp": 0.2},
            [{"lr": 0.1, "clamp": 0.2}, {"lr": 1e-2, "clamp": 0.4}],
        ),
    ],
)
def test_what_lies_beyond_the_grids_edge(grid_of, best, wanted):
    """One factor further, that between the two values at the edge; nothing of what lies inside."""
    tried = [qv.FT(layer=1, **settings) for settings in grid_of]
    assert grids.beyond(qv.FT(layer=1, **best), tried) == [qv.FT(layer=1, **w) for w in wanted]


def test_beyond_the_edge_a_search_of_z_stays_and_ctp_keeps_its_two_rates_alike():
    tried = [qv.MEMIT(layers=(1,), lam=lam, lr=lr) for lam in (10.0, 100.0) for lr in (0.1, 0.5)]
    assert grids.beyond(tried[0], tried) == [qv.MEMIT(layers=(1,), lam=1.0, lr=0.1)]
    tried = [qv.CTP(lr=lr, alone=(lr, 50, 0.1)) for lr in (1e-4, 1e-3)]
    assert grids.beyond(tried[0], tried) == [qv.CTP(lr=1e-5, alone=(1e-5, 50, 0.1))]
    tried = [qv.KNE(share=share) for share in (0.05, 0.5)]
    assert grids.beyond(tried[1], tried) == []  # five times the neurons that there are


@pytest.fixture(scope="module")
def lens():
    return qv.load("toy-gptj")


@pytest.fixture
def toy(lens, monkeypatch):
    """A bundled model, and three settings of FT of which the last is good for nothing."""
    settings = [qv.FT(layer=3, lr=1e-2), qv.FT(layer=2, lr=1e-2), qv.FT(layer=3, lr=1e-2, steps=1)]
    monkeypatch.setattr(tune, "grid", lambda method, shape: list(settings))
    return lens, settings


SHAPE = Shape(n_layers("toy-gptj"), 1, 512, 4)


def test_the_better_half_goes_on_and_is_tried_on_edits_held_apart(toy, tmp_path):
    lens, settings = toy
    found = tune.tune(lens, "FT", SHAPE, CASES[:4], CASES[4:], None, tmp_path, rungs=(2, 4))
    counts = found.table.groupby("rung")["editor"].nunique()
    assert counts.tolist() == [3, 2, 2]
    assert found.table.groupby("rung")["edits"].first().tolist() == [2, 4, 2]
    first = found.table[found.table["rung"] == 0].sort_values("score")
    assert first["editor"].iloc[0] == repr(settings[2])
    assert repr(settings[2]) not in set(found.table[found.table["rung"] > 0]["editor"])
    direct = evaluate(lens, CASES[4:], tune.METRICS, found.editor).groupby("metric")["after"].mean()
    for name, value in found.figures.items():
        assert value == pytest.approx(direct[name])
    parts = [
        (direct[f"{part}_acc"] + direct[f"{part}_success"]) / 2
        for part in ("efficacy", "paraphrase", "specificity")
    ]
    assert found.score == pytest.approx(3 / sum(1 / part for part in parts))
    others = found.table[found.table["rung"] == 2]
    assert found.score == others["score"].max()


def test_the_best_is_carried_on_beyond_the_grid_while_the_score_rises(toy, tmp_path, monkeypatch):
    """Of made-up scores that are best at lr = 0.1, on a grid that ends at 1e-3: two steps beyond are
    better, the third is not, and it is not gone on."""
    lens, _ = toy
    settings = [qv.FT(layer=3, lr=1e-4), qv.FT(layer=3, lr=1e-3), qv.FT(layer=2, lr=1e-3)]
    monkeypatch.setattr(tune, "grid", lambda method, shape: list(settings))
    asked = []

    def made_up(log, lens, editor, cases):
        asked.append((editor.lr, len(cases)))
        off = abs(math.log10(editor.lr / 0.1)) + editor.layer / 10
        return dict.fromkeys(tune.METRICS, 1 / (1 + off))

    monkeypatch.setattr(tune._Log, "means", made_up)
    found = tune.tune(lens, "FT", SHAPE, CASES[:4], CASES[4:], None, tmp_path, rungs=(2, 4))
    assert found.editor == qv.FT(layer=2, lr=0.1)
    table = found.table
    chosen = table[table["rung"] == 1]["editor"].tolist()
    assert chosen == [
        repr(qv.FT(layer=layer, lr=lr))
        for layer, lr in ((2, 1e-3), (3, 1e-3), (2, 1e-2), (2, 1e-1), (2, 1.0))
    ]
    assert len(table[table["rung"] == 2]) == 2


def test_a_level_grid_is_left_on_both_sides(toy, tmp_path, monkeypatch):
    """All settings score 0 (efficacy 0); what is good lies beyond the upper edge, the better of it
    by the means of the metrics; and where all stay level the search ends."""
    lens, _ = toy
    settings = [qv.FT(layer=3, lr=lr) for lr in (1e-4, 1e-3, 1e-2)]
    monkeypatch.setattr(tune, "grid", lambda method, shape: list(settings))

    def found(good):
        def made_up(log, lens, editor, cases):
            values = dict.fromkeys(tune.METRICS, 1.0)
            return values | dict.fromkeys(("efficacy_acc", "efficacy_success"), good(editor.lr))

        monkeypatch.setattr(tune._Log, "means", made_up)
        return tune.tune(lens, "FT", SHAPE, CASES[:4], CASES[4:], None, tmp_path, rungs=(2, 4))

    assert found(lambda lr: float(lr > 0.05)).editor == qv.FT(layer=3, lr=0.1)
    level = found(lambda lr: 0.0).table
    assert sorted({float(re.search(r"lr=([^,)]+)", one).group(1)) for one in level["editor"]}) == [
        1e-5, 1e-4, 1e-3, 1e-2, 1e-1,
    ]  # fmt: skip


def test_settings_that_tie_at_the_cut_go_on(toy, tmp_path, monkeypatch):
    """All are as good on two edits; on four the last of them is the best."""
    lens, _ = toy
    settings = [qv.FT(layer=layer) for layer in range(6)]
    monkeypatch.setattr(tune, "grid", lambda method, shape: list(settings))
    monkeypatch.setattr(
        tune._Log, "means",
        lambda log, lens, editor, cases: dict.fromkeys(tune.METRICS, 1.0 if len(cases) == 2 else editor.layer / 10),
    )  # fmt: skip
    arguments = (lens, "FT", SHAPE, CASES[:4], [*CASES[4:], *CASES[4:]], None, tmp_path)
    assert tune.tune(*arguments, rungs=(2, 4)).editor == qv.FT(layer=5)


def test_trials_of_a_wrapped_preset_are_that_presets(toy, tmp_path, monkeypatch):
    lens, _ = toy
    keys = []
    for ft in (qv.FT(lr=1e-4), qv.FT(lr=1e-2)):
        monkeypatch.setattr(tune, "editor_of", lambda lens, name, ft=ft: ft)
        log = tune._Log.open(tmp_path, lens, None)
        keys.append(log._key(lens, qv.SimIE(editor="FT"), CASES[0]))
    assert keys[0] != keys[1]


def test_what_cannot_be_tuned_is_told(toy, tmp_path):
    lens, _ = toy
    for part in ("paraphrases", "neighbours"):
        bare = [*CASES[:3], dataclasses.replace(CASES[3], **{part: ()})]
        with pytest.raises(qv.QVLensError, match="has no paraphrases, or no neighbours"):
            tune.tune(lens, "FT", SHAPE, bare, CASES[4:], None, tmp_path, rungs=(2, 4))
    new = CASES[3].request.new
    near = tuple(dataclasses.replace(each, answer=new) for each in CASES[3].neighbours)
    alike = [*CASES[:3], dataclasses.replace(CASES[3], neighbours=near)]
    with pytest.raises(qv.QVLensError, match="no neighbours with another answer than the new one"):
        tune.tune(lens, "FT", SHAPE, alike, CASES[4:], None, tmp_path, rungs=(2, 4))
    for layers in (1, 2):
        small = SimpleNamespace(n_layers=layers, name="small", backend_adapter=lens.backend_adapter)
        with pytest.raises(qv.QVLensError, match=rf"has {layers} layers.*takes at least 3"):
            grids.shape_of(small, [CASES[0].request.fact])


def test_a_fact_given_twice_is_one_edit(toy, monkeypatch):
    lens, _ = toy
    facts = [fact for fact in tune.atlas() if fact.relation == "P36"][:8]
    monkeypatch.setattr(tune, "knows", lambda lens, facts: [True] * len(facts))
    monkeypatch.setattr(tune, "correct", lambda lens, asked: [True] * len(asked))
    with pytest.raises(qv.QVLensError, match="knows 8 of the atlas's facts"):
        tune.known_cases(lens, 16, facts=[*facts, *facts])


def test_edits_keep_what_the_model_knows_of_them_and_follow_the_seed(toy, monkeypatch):
    """Of eight facts six are known, of each one's other phrasings every second."""
    lens, _ = toy
    facts = [fact for fact in tune.atlas() if fact.relation == "P36"][:8]
    known = {fact.text for fact in facts[:6]}
    monkeypatch.setattr(tune, "knows", lambda lens, facts: [fact.text in known for fact in facts])
    monkeypatch.setattr(
        tune, "correct", lambda lens, asked: [i % 2 == 1 for i in range(len(asked))]
    )
    drawn = {seed: tune.known_cases(lens, 6, seed, facts) for seed in (0, 1)}
    orders = []
    for cases in drawn.values():
        assert {case.request.fact.text for case in cases} == known
        for case in cases:
            fact = case.request.fact
            assert [asked.prompt for asked in case.paraphrases] == list(fact.paraphrases[1::2])
            assert case.neighbours
            assert {near.text for near in case.neighbours} <= known - {fact.text}
        orders.append([case.request.fact.text for case in cases])
    assert orders[0] != orders[1]


def test_what_was_measured_is_not_measured_again(toy, tmp_path, monkeypatch):
    lens, _ = toy
    asked = []
    monkeypatch.setattr(
        tune,
        "evaluate",
        lambda lens, cases, *a, **k: asked.append(len(cases)) or evaluate(lens, cases, *a, **k),
    )
    arguments = (lens, "FT", SHAPE, CASES[:4], CASES[4:], None, tmp_path)
    first = tune.tune(*arguments, rungs=(2, 4))
    assert sum(asked) == 3 * 2 + 2 * 2 + 2 * 2
    lines = (tmp_path / tune.TRIALS).read_text().splitlines()
    whole = [line for line in lines if line]
    # killed while it wrote
    (tmp_path / tune.TRIALS).write_text("\n".join([*whole[:-3], whole[-3][:20]]))
    asked.clear()
    again = tune.tune(*arguments, rungs=(2, 4))
    assert sum(asked) == 3
    asked.clear()  # what was written behind the cut line is read
    tune.tune(*arguments, rungs=(2, 4))
    assert not asked
    assert again.editor == first.editor
    assert again.figures == first.figures
    assert json.loads(whole[0])["state"] == lens.state()


def test_trials_with_another_C0_are_other_trials_of_the_same_folder(toy, tmp_path):
    lens, settings = toy
    C0, cut = (covariance(lens, texts(3), [1], max_tokens=most) for most in (None, 4))
    known = []
    for statistics in (None, C0, cut, None):
        log = tune._Log.open(tmp_path, lens, statistics)
        known.append(len(log.known))
        log.means(lens, settings[0], CASES[:1])
    assert known == [0, 1, 2, 3]
    assert len(tune._Log.open(tmp_path, lens, None).known) == 3


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("inverse_of", [qv.MEMIT(layers=(1,), steps=2, lam=lam) for lam in (1.0, 2.0)]),
        ("eigen", [qv.AlphaEdit(layers=(1,), steps=2, threshold=t) for t in (1e-2, 1e-3)]),
    ],
)
def test_settings_share_what_is_made_of_C0(toy, tmp_path, monkeypatch, name, settings):
    lens, _ = toy
    home = layer_by_layer if name == "inverse_of" else closed_form
    made, make = [], getattr(home, name)
    monkeypatch.setattr(home, name, lambda C0: made.append(C0) or make(C0))
    log = tune._Log.open(tmp_path, lens, covariance(lens, texts(300), [1]))
    for editor in settings:
        assert log.means(lens, editor, CASES[:1])
    assert len(made) == 1


def test_an_edit_with_other_neighbours_is_another_edit():
    other = [dataclasses.replace(case, neighbours=case.neighbours[1:]) for case in CASES]
    assert {tune._name(case) for case in CASES}.isdisjoint(map(tune._name, other))
    assert [tune._name(case) for case in CASES] == [
        tune._name(case) for case in world_cases.edit_cases(WORLD, 6)
    ]


def test_a_setting_that_is_refused_loses(toy, tmp_path, monkeypatch):
    lens, settings = toy
    broken = dataclasses.replace(settings[0], objective="nothing")
    monkeypatch.setattr(tune, "grid", lambda method, shape: [broken, settings[1]])
    found = tune.tune(lens, "FT", SHAPE, CASES[:2], CASES[4:], None, tmp_path, rungs=(1, 2))
    assert found.editor == settings[1]
    monkeypatch.setattr(tune, "grid", lambda method, shape: [broken])
    with pytest.raises(qv.QVLensError, match=r"No setting of FT could be applied .*Objective"):
        tune.tune(lens, "FT", SHAPE, CASES[:2], CASES[4:], None, tmp_path / "b", rungs=(1, 2))


def test_folders_and_cases_that_do_not_fit_are_refused(toy, tmp_path):
    lens, _ = toy
    with pytest.raises(qv.QVLensError, match="Tuning takes 4 edits"):
        tune.tune(lens, "FT", SHAPE, CASES[:2], CASES[4:], None, tmp_path, rungs=(2, 4))
    tune._Log.open(tmp_path, lens, None)
    other = tiny_lens("gptj", dtype=torch.float32)
    with pytest.raises(qv.QVLensError, match="another model or version"):
        tune._Log.open(tmp_path, other, covariance(other, texts(3), [1]))
    patch = qv.edit(lens, CASES[0].request, qv.FT(layer=1, steps=1), statistics=None)
    with lens.patched(patch), pytest.raises(qv.QVLensError, match="another model or version"):
        tune._Log.open(tmp_path, lens, None)
    (tmp_path / "file").write_text("")
    with pytest.raises(qv.QVLensError, match="Cannot keep the trials"):
        tune._Log.open(tmp_path / "file", lens, None)
    with pytest.raises(qv.QVLensError, match="Editor to tune"):
        grids.grid("ROMEO", SHAPE)


def test_facts_take_turns_by_relation():
    facts = [qv.Fact("{} a", str(i), "x", relation="A") for i in range(3)] + [
        qv.Fact("{} b", "9", "x", relation="B")
    ]
    random.Random(0).shuffle(facts)
    relations = [fact.relation for fact in tune._in_turns(facts)]
    assert set(relations[:2]) == {"A", "B"}
    assert relations[2:] == ["A", "A"]
