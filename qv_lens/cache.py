"""The user's cache: where fetched models and computed statistics are kept between commands. It may
be deleted at any time."""

from __future__ import annotations

import os
import sys
from pathlib import Path

#: the variable that names another folder; if it is set to nothing, nothing is kept
VARIABLE = "QV_LENS_CACHE"


def cache_folder() -> Path | None:
    """Where this user's caches lie, by the platform's custom; None: nothing is to be kept."""
    chosen = os.environ.get(VARIABLE)
    if chosen is not None:
        return Path(chosen).expanduser() if chosen.strip() else None
    home = Path.home()
    if sys.platform == "darwin":
        return home / "Library" / "Caches" / "qv_lens"
    if sys.platform == "win32":
        return (
            Path(os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local") / "qv_lens" / "Cache"
        )
    named = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(named) if Path(named).is_absolute() else home / ".cache") / "qv_lens"
