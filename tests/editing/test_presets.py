"""Presets: the values of the papers' releases, as they stand in their files, and those that the
bundled models were measured with."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

import qv_lens as qv
from qv_lens.editing.editors import HOMES
from qv_lens.editing.presets import presets
from qv_lens.errors import ConfigError

RESULTS = Path(__file__).parents[2] / "experiments" / "results"
FIELDS = ("steps", "lr", "weight_decay", "clamp", "kl")
#: layers, then FIELDS, lambda and others: read off the releases' own settings (hparams/*.json,
#: *.yaml)
RELEASED = {
    "EleutherAI/gpt-j-6B": {
        "ROME": {"layer": 5, "search": (20, 0.5, 0.5, 4, 0.0625), "mom2_adjustment": True},
        "RROME": {"layer": 5, "search": (20, 0.5, 0.5, 4, 0.0625), "mom2_adjustment": True, "values": "averaged"},
        "MEMIT": {"layers": (3, 4, 5, 6, 7, 8), "search": (25, 0.5, 0.5, 0.75, 0.0625), "lam": 15000},
        "RECT": {"layers": (3, 4, 5, 6, 7, 8), "search": (25, 0.5, 0.5, 0.75, 0.0625), "lam": 15000, "keep": 0.4},
        "PRUNE": {"layers": (3, 4, 5, 6, 7, 8), "search": (25, 0.5, 0.5, 0.75, 0.0625), "lam": 15000},
        "PMET": {"layers": (3, 4, 5, 6, 7, 8), "search": (30, 0.2, 0.5, 0.75, 1), "lam": 6000, "attention": False},
        "AlphaEdit": {"layers": (3, 4, 5, 6, 7, 8), "search": (25, 0.5, 0.5, 0.75, 0.0625), "threshold": 2e-2, "L2": 10},
        "EMMET": {"layers": (5,), "search": (25, 0.5, 0.5, 0.75, 0.0625), "soften": 0.1},
        "ACE": {
            "value_layers": (23, 24, 25), "query_layers": (3, 4, 5, 6, 7, 8), "search": (30, 0.2, 0.5, 0.75, 1), "lam": 6000,
            "attention": False, "groups": True, "passes": "one", "order": "query first", "joint": False, "prefix": "",
        },
        "ACE.official": {
            "value_layers": (23, 24, 25), "query_layers": (3, 4, 5, 6, 7, 8), "search": (30, 0.2, 0.5, 0.75, 1), "lam": 6000,
            "attention": True, "groups": False,
        },
        "ACE.paper": {
            "value_layers": (26, 27, 28), "query_layers": (3, 4, 5, 6, 7, 8), "search": (30, 0.2, 0.5, 0.75, 1), "lam": 6000,
            "passes": "two", "order": "value first", "value_prompts": "via", "value_token": "last", "joint": True,
        },
        "IFMET": {
            "layers": (3, 4, 5, 6, 7, 8), "deep_layers": (16, 17, 18, 19, 20), "search": (30, 0.2, 0.5, 0.75, 1), "lam": 6000,
        },
        "FT": {"layer": 21, "steps": 25, "lr": 5e-4, "stop": 1e-2, "objective": "last_token", "clamp": None},
        "FTL": {"layer": 0, "steps": 25, "lr": 5e-4, "stop": 1e-2, "clamp": 5e-5},
        "KN": {"rule": "paper", "threshold": 0.1, "steps": 20, "lam_old": 1, "lam_new": 8},
        "CTP": {
            "top": 15, "bottom": 1, "epochs": 12, "every": 2, "batch_size": 2, "lr": 1e-5, "lam": 0.1, "score": "mean_abs_z",
            "adam": "shared", "train_b_out": True, "stream": False, "gate": False, "alone": (1e-4, 50, 1e-2),
        },
        "KNE": {"share": 0.01, "parameters": ("W_out",), "axis": "column", "alpha": 1, "steps": 25, "steps_ig": 20},
        "LoRA": {"rank": 8, "alpha": 32, "dropout": 0.1, "lr": 5e-3, "steps": 50, "parameters": ("W_in", "W_out")},
        "AdaLoRA": {"rank": 8, "alpha": 32, "dropout": 0.1, "lr": 5e-3, "steps": 50, "init_rank": 12, "orth": 0.5},
    },
    "Qwen/Qwen3-8B": {
        "ROME": {"layer": 5, "search": (25, 0.5, 1e-3, 4, 0.0625), "mom2_adjustment": False},
        "RROME": {"layer": 5, "search": (25, 0.5, 1e-3, 4, 0.0625), "mom2_adjustment": False},
        "MEMIT": {"layers": (4, 5, 6, 7, 8), "search": (25, 0.5, 1e-3, 4, 0.0625), "lam": 15000},
        "RECT": {"layers": (4, 5, 6, 7, 8), "search": (25, 0.5, 1e-3, 4, 0.0625), "lam": 15000},
        "PRUNE": {"layers": (4, 5, 6, 7, 8), "search": (25, 0.5, 1e-3, 4, 0.0625), "lam": 15000},
        "AlphaEdit": {"layers": (4, 5, 6, 7, 8), "search": (25, 0.5, 1e-3, 4, 0.0625), "L2": 1, "threshold": 2e-2},
        "EMMET": {"layers": (5,), "search": (25, 0.5, 1e-3, 0.75, 0.0625), "soften": 0.1},
        "PMET": {"layers": (28, 29, 30, 31, 32), "search": (30, 0.2, 0.5, 0.75, 1), "lam": 6000},
        "IFMET": {"layers": (4, 5, 6, 7, 8), "deep_layers": (22, 23, 24, 25, 26), "lam": 6000},
        "ACE": {
            "value_layers": (28, 29, 30, 31, 32), "query_layers": (25, 26, 27), "search": (30, 0.2, 0.5, 0.75, 1), "lam": 6000,
        },
        "ACE.paper": {"value_layers": (28, 29, 30, 31, 32), "query_layers": (25, 26, 27), "passes": "two"},
        "ACE.official": {"value_layers": (28, 29, 30, 31, 32), "query_layers": (25, 26, 27), "attention": True, "groups": False},
        "FT": {"layer": 27, "steps": 25, "lr": 5e-4},
        "FTL": {"layer": 0, "clamp": 5e-5},
    },
}  # fmt: skip


@pytest.mark.parametrize("model", RELEASED)
def test_released_settings(model):
    table = presets(model)
    assert set(RELEASED[model]) <= set(table)
    for name, wanted in RELEASED[model].items():
        editor = table[name].editor
        for field, value in wanted.items():
            if field == "search":
                assert tuple(getattr(editor, f) for f in FIELDS) == value, name
            else:
                assert getattr(editor, field) == value, (name, field)


@pytest.mark.parametrize("model", ["toy-gptj", "toy-qwen3"])
def test_the_bundled_models_presets_are_those_that_were_measured(model):
    """experiments/results holds each editor as it was run."""
    measured = pd.read_csv(RESULTS / f"edit_{model}.csv").drop_duplicates("method")
    names = {name: getattr(qv, name) for name in dir(qv) if name[:1].isupper()}
    table = presets(model)
    compared = 0
    for row in measured.itertuples():
        if row.method in table:
            compared += 1
            ran = eval(row.editor, {"__builtins__": {}}, names)
            if row.method == "CTP":  # whose learning rate of batches was chosen later
                assert (ran.alone, ran.top) == (table["CTP"].editor.alone, table["CTP"].editor.top)
            else:
                assert table[row.method].editor == ran, row.method
    assert compared >= 10


@pytest.mark.parametrize("model", ["EleutherAI/gpt-j-6B", "Qwen/Qwen3-8B", "toy-gptj", "toy-qwen3"])
def test_every_preset_says_where_it_comes_from(model):
    table = presets(model)
    assert set(table) <= {*HOMES, "ACE.paper", "ACE.official"}
    assert all(preset.source for preset in table.values())


def test_a_model_without_presets_is_told_what_to_do():
    with pytest.raises(ConfigError, match="no presets for the model"):
        presets("gpt2")
