"""The models of the experiments, small pretrained ones that are measured here and ACE's two, and the
data, by the names that the tables call them."""

from __future__ import annotations

import os

import pandas as pd

from qv_lens.models.fetch import real_or_toy

#: what a file runs on where no model is named
STUDIED = ("smollm2-135m",)
#: ACE's own
ACES = ("EleutherAI/gpt-j-6B", "Qwen/Qwen3-8B")
#: the ledger's columns: a model's name and what it is called
COLUMNS = {
    "smollm2-135m": "SmolLM2-135M",
    "qwen2.5-coder-0.5b": "Qwen2.5-Coder-0.5B",
    "gemma-3-270m": "Gemma 3 270M",
    "EleutherAI/gpt-j-6B": "GPT-J-6B",
    "Qwen/Qwen3-8B": "Qwen3-8B",
}
#: what rows were measured on, as people call it
DATA = {
    "facts": "atlas",
    "multihop": "chains of the atlas",
    "counterfact-edit-10k.json": "CounterFact",
    "zsre_mend_train-1k.json": "ZsRE",
    "MQuAKE-CF-3k.subset354.json": "MQuAKE-CF",
}
#: layers of ACE's models
GPTJ_LAYERS = 28
QWEN_LAYERS = 36


def is_gptj(frame: pd.DataFrame) -> bool:
    """Which of the paper's two models the rows' model is compared with: GPT-J, or any other with
    Qwen3, whose blocks are as those of SmolLM2 and Qwen2.5."""
    return "gpt" in str(frame["model"].iloc[0]).lower()


def is_of_the_paper(frame: pd.DataFrame) -> bool:
    """Whether the rows' model is one of ACE's two."""
    return str(frame["model"].iloc[0]) in ACES


def layers_there(frame: pd.DataFrame) -> int:
    """How many layers the paper's model has that the rows' model stands for."""
    return GPTJ_LAYERS if is_gptj(frame) else QWEN_LAYERS


def usual_model() -> str:
    """The model of the notebooks: `QV_MODEL`, else SmolLM2-135M, fetched where it is not there yet,
    else (saying why) a bundled toy, whose numbers say nothing about language models."""
    if named := os.environ.get("QV_MODEL"):
        return named
    name, why = real_or_toy()
    if why:
        print(why)
    return name
