"""A file that is whole or absent: written under another name, synced, then renamed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qv_lens.errors import ConfigError


@contextmanager
def whole(file: Path) -> Iterator[Path]:
    """Where to write; at the end of the block it takes `file`'s place. After an exception `file` is
    as it was."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
    try:
        yield partial
        _sync(partial)
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def placed(file: Path, what: str) -> Iterator[Path]:
    """`whole` for a path that a user names. Raises `ConfigError` if it cannot be written."""
    try:
        with whole(file) as partial:
            yield partial
    except OSError as error:
        raise ConfigError(
            f"Cannot write {what} to {file}: {error}. Choose another path."
        ) from error


def _sync(file: Path) -> None:
    """Bring the content to the disk before its name: otherwise the rename may get there first, and
    a crash would leave an empty file."""
    with file.open("rb+") as written:
        os.fsync(written.fileno())
