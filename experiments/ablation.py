"""The ablation sweep: every layer x {top, random, query} neurons x fractions x seeds -> accuracy in
and off a category.

    qv-lens run experiments/ablation.py
    qv-lens run experiments/ablation.py --model EleutherAI/gpt-j-6B --set facts=known_facts.json

The cells are those of ACE's Figure 2. A file of facts is a JSON list of prompt, subject, answer and
category."""

from __future__ import annotations

from experiments.ace.figure_2 import MEASURES, Task, figure, rows

__all__ = ["GRID", "MEASURES", "SETTINGS", "Task", "figure", "rows"]

SETTINGS = {
    "category": "sport",
    "prompts": 60,
}
GRID = {
    "model": ["toy-gptj"],
    "neurons": ["top", "random", "query"],
    "fraction": [0.01, 0.1, 1.0],
    "layer": "layers",
    "seed": [0, 1, 2],
}
