"""Every editor by name, in one place: the package offers these, presets and `qv-lens tune` know
them, tests go through them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib import import_module
from types import MappingProxyType
from typing import TYPE_CHECKING

from qv_lens.errors import unknown

if TYPE_CHECKING:  # the same names for type checkers
    from qv_lens.editing.adapters import AdaLoRA, LoRA
    from qv_lens.editing.closed_form import (
        ACE,
        EMMET,
        ENCORE,
        IFMET,
        MEMIT,
        PMET,
        PRUNE,
        RECT,
        ROME,
        RROME,
        SPHERE,
        AlphaEdit,
        BetaEdit,
    )
    from qv_lens.editing.ctp import CTP
    from qv_lens.editing.fine_tuning import FT, FTL, KNE
    from qv_lens.editing.kn import KN
    from qv_lens.editing.locft import LocFT
    from qv_lens.editing.nse import NSE
    from qv_lens.editing.simie import SimIE
    from qv_lens.editing.ultraedit import UltraEdit

__all__ = [
    "ACE", "CTP", "EMMET", "ENCORE", "FT", "FTL", "IFMET", "KN", "KNE", "MEMIT", "NSE", "PMET", "PRUNE", "RECT", "ROME", "RROME", "SPHERE", "AdaLoRA",
    "AlphaEdit", "BetaEdit", "LoRA", "LocFT", "SimIE", "UltraEdit",
]  # fmt: skip

#: the module of each
HOMES: Mapping[str, str] = MappingProxyType({
    "ROME": "editing.closed_form", "RROME": "editing.closed_form", "EMMET": "editing.closed_form",
    "MEMIT": "editing.closed_form", "PMET": "editing.closed_form", "AlphaEdit": "editing.closed_form",
    "RECT": "editing.closed_form", "PRUNE": "editing.closed_form", "IFMET": "editing.closed_form", "ACE": "editing.closed_form",
    "SPHERE": "editing.closed_form", "BetaEdit": "editing.closed_form", "ENCORE": "editing.closed_form",
    "FT": "editing.fine_tuning", "FTL": "editing.fine_tuning", "KNE": "editing.fine_tuning", "CTP": "editing.ctp",
    "KN": "editing.kn", "LoRA": "editing.adapters", "AdaLoRA": "editing.adapters",
    "LocFT": "editing.locft", "UltraEdit": "editing.ultraedit", "SimIE": "editing.simie", "NSE": "editing.nse",
})  # fmt: skip

#: settings of ACE that have a name of their own
VARIANTS = ("ACE.paper", "ACE.official")


def editors() -> dict[str, type]:
    """Every editor's class by name."""
    return {name: getattr(import_module(f"qv_lens.{home}"), name) for name, home in HOMES.items()}


def spelled(method: str, table: Iterable[str]) -> str:
    """A method as the table spells it, whatever its capitals."""
    spellings = {name.lower(): name for name in table}
    return spellings.get(method.lower(), method)


def check_name(method: str) -> None:
    """Raise `ConfigError` for what is no editor's name, in any capitals; imports no torch."""
    names = (*HOMES, *VARIANTS)
    if spelled(method, names) not in names:
        raise unknown("Editor", method, names)
