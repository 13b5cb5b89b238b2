"""Hyperparameters by method and model, each with where it comes from, in one place.

GPT-J-6B: the methods' own releases. Qwen3-8B: ACE's release; MEMIT and PMET have none for it (untuned: MEMIT takes
EasyEdit's for Qwen2.5-7B, PMET takes ACE's). The bundled models: chosen by `experiments/edit_toys.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qv_lens.editing.closed_form import ACE, MEMIT, PMET
from qv_lens.editing.edit import Editor
from qv_lens.errors import unknown


@dataclass(frozen=True)
class Preset:
    """An editor with its source."""

    editor: Editor
    source: str


def presets(model: str) -> dict[str, Preset]:
    """MEMIT, PMET and ACE for a model by name. Raises `ConfigError` for a model without presets."""
    table = {"toy-gptj": _toy_gptj, "toy-qwen3": _toy_qwen3, "EleutherAI/gpt-j-6B": _gptj, "Qwen/Qwen3-8B": _qwen3}
    if model not in table:
        raise unknown("Presets for model", model, table)
    return table[model]()


def _gptj() -> dict[str, Preset]:
    return {
        "MEMIT": Preset(MEMIT(), "authors' release for GPT-J-6B"),
        "PMET": Preset(PMET(), "authors' release for GPT-J-6B"),
        "ACE": Preset(ACE(), "official release for GPT-J-6B"),
    }


def _qwen3() -> dict[str, Preset]:
    memit = MEMIT(layers=(4, 5, 6, 7, 8), weight_decay=1e-3)
    ace = ACE(value_layers=(28, 29, 30, 31, 32), query_layers=(25, 26, 27))
    return {
        "MEMIT": Preset(memit, "untuned: EasyEdit's values for Qwen2.5-7B"),
        "PMET": Preset(PMET(layers=ace.value_layers), "untuned: ACE's values for Qwen3-8B"),
        "ACE": Preset(ace, "official release for Qwen3-8B"),
    }


def _toy_gptj() -> dict[str, Preset]:
    return _toy((3, 4, 5))


def _toy_qwen3() -> dict[str, Preset]:
    return _toy((2, 3))


def _toy(memit: tuple[int, ...]) -> dict[str, Preset]:
    common: dict[str, Any] = {"steps": 40, "lr": 1.0, "weight_decay": 0.1, "clamp": 2.0, "lam": 5.0}
    source = "experiments/edit_toys.py: the best of its grid on 16 facts of the bundled world"
    return {
        "MEMIT": Preset(MEMIT(layers=memit, **common), source),
        "PMET": Preset(PMET(layers=(3, 4, 5), **common), source),
        "ACE": Preset(ACE(value_layers=(4, 5), query_layers=(2, 3), **common), source),
    }
