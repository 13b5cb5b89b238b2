"""Whose turn it is: hooks, interventions and weights in change belong to one thread of a Lens at a
time.

1. Passes of several threads wait for each other (`one_pass`).
2. While a block of one thread has interventions, patches or an edit in force (`held`), passes of
   other threads are refused: they would silently run under what that thread has put in force.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from qv_lens.errors import ConfigError


class Turn:
    """One Lens's lock and the thread that holds it over several passes."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._holder: int | None = None
        self._depth = 0

    @contextmanager
    def one_pass(self) -> Iterator[None]:
        """One pass, or one write of weights. Raises `ConfigError` while another thread holds the
        Lens."""
        with self._lock:
            self._check()
            yield

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep the Lens over several passes. Raises `ConfigError` while another thread holds it."""
        with self._lock:
            self._check()
            self._holder = threading.get_ident()
            self._depth += 1
        try:
            yield
        finally:
            with self._lock:
                self._depth -= 1
                if not self._depth:
                    self._holder = None

    def _check(self) -> None:
        if self._holder not in (None, threading.get_ident()):
            raise ConfigError(
                "Another thread has interventions, patches or an edit in force on this Lens, and "
                "they would act here too. Give each thread a Lens of its own (qv.load), or wait "
                "until that block is left."
            )
