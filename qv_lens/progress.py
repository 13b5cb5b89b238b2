"""Progress bars: one at a time, where somebody looks, for work that takes longer than a moment."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from tqdm.auto import tqdm

#: seconds before a bar is drawn
DELAY = 2.0


def progress_bar(
    items: Iterable[Any] | None = None,
    *,
    of: str,
    unit: str,
    total: float | None = None,
    initial: int = 0,
    scaled: bool = False,
) -> Any:
    """A bar over `items`, or one that is updated by hand; `of`: what is done, `scaled`: whether
    large counts are shown as k and M. It leaves no line behind."""
    return tqdm(
        items,
        desc=of,
        unit=unit,
        total=total,
        initial=initial,
        unit_scale=scaled,
        delay=DELAY,
        leave=False,
        disable=not seen(),
    )


def seen() -> bool:
    """Whether a bar is drawn: on a terminal or in a notebook, unless another one is there already
    or TQDM_DISABLE is set."""
    if os.environ.get("TQDM_DISABLE", "0") not in ("", "0"):
        return False
    notebook = any(base.__name__ == "tqdm_notebook" for base in tqdm.__mro__)
    others = len(getattr(tqdm, "_instances", ()))
    return not others and (notebook or sys.stderr.isatty())


@contextmanager
def transformers_bars(wanted: bool) -> Iterator[None]:
    """transformers' own bars where they are wanted, and only there."""
    from transformers.utils import logging

    was = logging.is_progress_bar_enabled()
    if was and not wanted:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if was:
            logging.enable_progress_bar()
