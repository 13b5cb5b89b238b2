"""How much the best layers of different categories overlap."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd

from experiments.models import GPTJ_LAYERS


def best_layers(
    frame: pd.DataFrame, part: str, number: int, of: int = GPTJ_LAYERS
) -> dict[str, set[int]]:
    """The best layers of each category: as many of the model's as `number` of the paper's model
    (GPT-J's 28)."""
    count = max(1, round(number * frame["layer"].nunique() / of))
    chosen = frame[(frame["part"] == part) & (frame["rank"] <= count)]
    return {name: set(rows["layer"]) for name, rows in chosen.groupby("category")}


def overlap(a: set[int], b: set[int]) -> float:
    return len(a & b) / len(a | b)


def mean_overlap(sets: dict[str, set[int]]) -> float:
    return float(np.mean([overlap(a, b) for a, b in itertools.combinations(sets.values(), 2)]))
