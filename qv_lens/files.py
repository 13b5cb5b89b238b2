"""A file that is whole or absent: written under another name, synced, then renamed. One that is read
alone. The checksum of one."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qv_lens.errors import ConfigError


@contextmanager
def whole(file: Path) -> Iterator[Path]:
    """Where to write; at the end of the block it takes `file`'s place. After an exception `file` is
    as it was. A link's target is written; what is not a file (/dev/null) is written to
    as it is."""
    file = Path(os.path.realpath(file))
    if file.exists() and not file.is_file():
        yield file
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = _partial(file)
    try:
        yield partial
        _sync(partial)
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)


def begun(file: Path, content: bytes) -> bool:
    """Write a file that is not there yet, whole. False, with nothing written, where it is there,
    also where another process was first."""
    partial = _partial(file)
    try:
        partial.write_bytes(content)
        _sync(partial)
        os.link(partial, file)
    except FileExistsError:
        return False
    finally:
        partial.unlink(missing_ok=True)
    return True


def sha256(file: Path) -> str:
    """The checksum of a file's bytes, in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _partial(file: Path) -> Path:
    """Where this process writes a file before it is whole."""
    return file.with_name(f".{file.name}.{os.getpid()}.partial")


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


@contextmanager
def alone(file: Path) -> Iterator[Path]:
    """The same file in a folder that holds nothing else, for as long as the block lasts: some readers
    take what lies beside a file for its own."""
    with tempfile.TemporaryDirectory(prefix="qv_") as folder:
        place = Path(folder) / file.name
        try:
            place.symlink_to(file.resolve())
        except OSError:  # a system without links
            _same(file, place)
        yield place


def _same(file: Path, place: Path) -> None:
    try:
        os.link(file, place)
    except OSError:
        shutil.copy(file, place)
