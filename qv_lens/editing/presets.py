"""Hyperparameters by method and model, each with where it comes from, in one place.

GPT-J-6B: the methods' own releases, or EasyEdit where a method has none for it. Qwen3-8B: ACE's release; for the others
what their authors or EasyEdit use for Qwen2.5-7B, untuned. The bundled models: chosen by `experiments/toys/tune.py`. Any
other model: what `qv-lens tune` found (`tuned`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from qv_lens.editing.adapters import AdaLoRA, LoRA
from qv_lens.editing.closed_form import ACE, EMMET, IFMET, MEMIT, PMET, PRUNE, RECT, ROME, RROME, AlphaEdit
from qv_lens.editing.edit import Editor
from qv_lens.editing.gradient import CTP, FT, FTL, KN, KNE
from qv_lens.editing.tuned import PACKAGE, read_tuned, tuned_files
from qv_lens.errors import ConfigError


@dataclass(frozen=True)
class Preset:
    """An editor with its source."""

    editor: Editor
    source: str


#: every editor's class by name
EDITORS: Mapping[str, type] = MappingProxyType({
    kind.__name__: kind
    for kind in (
        ROME, RROME, EMMET, MEMIT, PMET, AlphaEdit, RECT, PRUNE, IFMET, ACE, FT, FTL, KNE, CTP, LoRA, AdaLoRA, KN,
    )
})  # fmt: skip


def presets(model: str) -> dict[str, Preset]:
    """The editors for a model by name, those that were tuned for it in the place of others.

    `model`: a model's name, or a file that `qv-lens tune` wrote.
    Raises `ConfigError` for a model without presets, or a file that cannot be read.
    """
    table = _written()
    files = [Path(model)] if model.endswith(".toml") else tuned_files(model)
    found = table[model]() if model in table else {}
    for file in files:
        found |= {name: Preset(editor, source) for name, (editor, source) in read_tuned(file, EDITORS).items()}
    if not found:
        named = ", ".join((*table, *sorted(each.stem for each in PACKAGE.glob("*.toml"))))
        raise ConfigError(
            f"There are no presets for the model {model!r}, only for {named}. Let qv-lens tune {model} look for some, take one of theirs "
            "(presets('toy-gptj')['ACE'].editor; preset in a run file, --preset on the command line), or pass an editor with values "
            "of your own."
        )
    return found


def has_presets(model: str) -> bool:
    """Whether a model has presets of its own."""
    return model in _written() or bool(tuned_files(model))


def _written() -> dict[str, Callable[[], dict[str, Preset]]]:
    """The tables of this file."""
    return {"toy-gptj": _toy_gptj, "toy-qwen3": _toy_qwen3, "EleutherAI/gpt-j-6B": _gptj, "Qwen/Qwen3-8B": _qwen3}


def _gptj() -> dict[str, Preset]:
    authors = "authors' release for GPT-J-6B"
    return {
        "ROME": Preset(ROME(), authors),
        "RROME": Preset(RROME(), "ROME's values for GPT-J-6B"),
        "EMMET": Preset(EMMET(), authors),
        "MEMIT": Preset(MEMIT(), authors),
        "PMET": Preset(PMET(), authors),
        "AlphaEdit": Preset(AlphaEdit(), authors),
        "RECT": Preset(RECT(), "MEMIT's values for GPT-J-6B"),
        "PRUNE": Preset(PRUNE(), "MEMIT's values for GPT-J-6B"),
        "IFMET": Preset(IFMET(), "untuned: PMET's values; deep layers from memory of the paper"),
        "ACE": Preset(ACE(), "official release for GPT-J-6B"),
        "ACE.paper": Preset(ACE.paper(), "Appendix F for GPT-J-6B"),
        "ACE.official": Preset(ACE.official(), "official release for GPT-J-6B, as it runs"),
        "FT": Preset(FT(), "ROME's authors for GPT-J-6B"),
        "FTL": Preset(FTL(), "ROME's authors for GPT-J-6B"),
        "KNE": Preset(KNE(), "untuned: the paper gives no alpha, lr, steps or m"),
        "CTP": Preset(CTP(), "released code; one request alone: untuned"),
        "LoRA": Preset(LoRA(), "EasyEdit"),
        "AdaLoRA": Preset(AdaLoRA(), "EasyEdit, but pruned"),
        "KN": Preset(KN(), "EasyEdit for GPT-J-6B"),
    }


def _qwen3() -> dict[str, Preset]:
    shallow: dict[str, Any] = {"layers": (4, 5, 6, 7, 8), "weight_decay": 1e-3, "clamp": 4.0}
    easy, qwen = "untuned: EasyEdit's values for Qwen2.5-7B", "untuned: GPT-J's values"
    rome: dict[str, Any] = {"steps": 25, "weight_decay": 1e-3, "mom2_adjustment": False}
    ace = ACE(value_layers=(28, 29, 30, 31, 32), query_layers=(25, 26, 27))
    return {
        "ROME": Preset(ROME(**rome), easy),
        "RROME": Preset(RROME(**rome), easy),
        "EMMET": Preset(EMMET(weight_decay=1e-3), "untuned: GPT-J's values, weight decay of Qwen2.5-7B's"),
        "MEMIT": Preset(MEMIT(**shallow), easy),
        "PMET": Preset(PMET(layers=ace.value_layers), "untuned: ACE's values for Qwen3-8B"),
        "AlphaEdit": Preset(AlphaEdit(L2=1.0, **shallow), easy),
        "RECT": Preset(RECT(**shallow), "untuned: MEMIT's values"),
        "PRUNE": Preset(PRUNE(**shallow), "untuned: MEMIT's values"),
        "IFMET": Preset(IFMET(layers=shallow["layers"], deep_layers=(22, 23, 24, 25, 26)), "untuned: GPT-J's, layers scaled"),
        "ACE": Preset(ace, "official release for Qwen3-8B"),
        "ACE.paper": Preset(
            replace(ACE.paper(), value_layers=ace.value_layers, query_layers=ace.query_layers), "section 5; the release's layers"
        ),
        "ACE.official": Preset(replace(ace, attention=True, groups=False), "official release for Qwen3-8B, as it runs"),
        "FT": Preset(FT(layer=27), easy),
        "FTL": Preset(FTL(layer=0), qwen),
        "KNE": Preset(KNE(), "untuned: the paper gives no alpha, lr, steps or m"),
        "CTP": Preset(CTP(), "released code; one request alone: untuned"),
        "LoRA": Preset(LoRA(), "EasyEdit"),
        "AdaLoRA": Preset(AdaLoRA(), "EasyEdit, but pruned"),
        "KN": Preset(KN(), qwen),
    }


def _toy_gptj() -> dict[str, Preset]:
    changes: dict[str, dict[str, Any]] = {
        "ROME": {"layer": 4},
        "RROME": {"layer": 4},
        "IFMET": {"layers": (3, 4, 5), "deep_layers": (8, 9)},
        "CTP": {"alone": (3e-3, 50, 0.4)},
        "FTL": {"layer": 4, "clamp": 0.12},
    }
    return _toy(changes)


def _toy_qwen3() -> dict[str, Preset]:
    return _toy(
        {
            "EMMET": {"layers": (2,)},
            "MEMIT": {"layers": (2, 3)},
            "PMET": {"layers": (2, 3, 4, 5)},
            "LoRA": {"lr": 1e-3, "stop": 0.1},
            "AdaLoRA": {"steps": 50},
        }
    )


def _toy(changes: dict[str, dict[str, Any]]) -> dict[str, Preset]:
    """Both bundled models' settings; `changes` are one model's own."""
    search: dict[str, Any] = {"steps": 40, "lr": 1.0, "weight_decay": 0.1, "clamp": 2.0}
    wide: dict[str, Any] = {"steps": 60, "lr": 2.0, "weight_decay": 0.01, "clamp": 30.0}
    spread: dict[str, Any] = {"layers": (3, 4, 5), "lam": 5.0, **search}
    ace = ACE(value_layers=(4, 5), query_layers=(2, 3), lam=5.0, **{**search, "clamp": 4.0})
    editors: dict[str, Any] = {
        "ROME": ROME(layer=3, **wide),
        "RROME": RROME(layer=3, **wide),
        "EMMET": EMMET(layers=(3,), **search),
        "MEMIT": MEMIT(**spread),
        "PMET": PMET(**{**spread, "clamp": 4.0}),
        "AlphaEdit": AlphaEdit(layers=(3, 4, 5), threshold=0.1, L2=1e-3, **search),
        "RECT": RECT(**spread),
        "PRUNE": PRUNE(**spread),
        "IFMET": IFMET(**{**spread, "layers": (2, 3, 4), "clamp": 5.0}, deep_layers=(6, 7)),
        "ACE": ace,
        "ACE.paper": replace(ACE.paper(), value_layers=(8, 9), query_layers=(2, 3), lam=5.0, **search),
        "ACE.official": replace(ace, attention=True, groups=False),
        "FT": FT(layer=3, lr=1e-2),
        "FTL": FTL(layer=3, lr=1e-2, steps=60, clamp=0.2),
        "KNE": KNE(lr=3e-2, share=0.02, steps=50, together=True),
        "CTP": CTP(lr=3e-3, alone=(3e-3, 50, 0.1)),
        "LoRA": LoRA(layers=(2, 3, 4), steps=30, lr=5e-3, dropout=0.0, stop=0.3),
        "AdaLoRA": AdaLoRA(layers=(2, 3, 4), steps=30, lr=1e-2, dropout=0.0),
        "KN": KN(threshold=0.5),
    }
    source = "experiments/toys/tune.py: the best of its grid on 8 facts of the bundled world"
    sources = {
        "ACE.paper": "ACE's, deep layers by hand, untuned",
        "ACE.official": "ACE's, untuned",
        "CTP": f"{source}, `alone`; the learning rate of batches by hand (of 1e-3, 3e-3, 1e-2, 3e-2 the second best on 32 facts)",
        "RECT": "MEMIT's, untuned",
        "PRUNE": "MEMIT's, untuned",
    }
    return {name: Preset(replace(editor, **changes.get(name, {})), sources.get(name, source)) for name, editor in editors.items()}
