"""Every editor, every protocol: single facts, then chains of them (the atlas's; for a toy, those of
its world; with `data`, a file's).

    qv-lens run experiments/editors.py    # hours on 2 cores; stop and resume at will
    qv-lens run experiments/editors.py --set count=8 --set 'seed=[0]'
    qv-lens run experiments/editors.py --model EleutherAI/gpt-j-6B \\
        --set text=Salesforce/wikitext:wikitext-103-raw-v1 --set data=MQuAKE-CF-3k-v2.json

Single edits: 34 cases, times three seeds; a batch of 32, times three; 100 edits one after another,
asked every 25. """

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

from experiments.compare import MEASURES, VERSION, Task, figure, rows
from experiments.models import STUDIED

__all__ = ["GRID", "MEASURES", "RESULTS", "SETTINGS", "VERSION", "Task", "figure", "rows"]

SETTINGS = {
    "curve": 25,
}
GRID = {
    "model": STUDIED,
    "data": ["facts", "multihop"],
    "protocol": ["single", "batch", "consecutive"],
    "seed": [0, 1, 2],
    "method": [
        "FT",
        "FTL",
        "LoRA",
        "AdaLoRA",
        "KN",
        "KNE",
        "CTP",
        "ROME",
        "RROME",
        "EMMET",
        "MEMIT",
        "AlphaEdit",
        "RECT",
        "PRUNE",
        "PMET",
        "IFMET",
        "ACE",
        "ACE.paper",
        "ACE.official",
    ],
}
#: the results that its rows belong to: of single facts or of chains, by protocol
RESULTS: Mapping[tuple[str, bool], str] = {
    ("single", False): "single",
    ("batch", False): "batch",
    ("consecutive", False): "consecutive",
    ("single", True): "multihop",
    ("batch", True): "multihop_batch",
    ("consecutive", True): "multihop_consecutive",
}


def results_of(frame: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Its rows by the results that they belong to."""
    chains = frame["hops"] > 1
    return {
        name: frame[(frame["protocol"] == protocol) & (chains == of_chains)]
        for (protocol, of_chains), name in RESULTS.items()
    }
