"""The models of the experiments: the bundled toys, and ACE's two models that they stand for."""

from __future__ import annotations

import pandas as pd

TOYS = ("toy-gptj", "toy-qwen3")
REAL = ("EleutherAI/gpt-j-6B", "Qwen/Qwen3-8B")
#: layers of ACE's models
GPTJ_LAYERS = 28
QWEN_LAYERS = 36


def is_gptj(frame: pd.DataFrame) -> bool:
    """Which of the paper's two models the rows' model stands for."""
    return "gpt" in str(frame["model"].iloc[0]).lower()


def layers_there(frame: pd.DataFrame) -> int:
    """How many layers the paper's model has that the rows' model stands for."""
    return GPTJ_LAYERS if is_gptj(frame) else QWEN_LAYERS
