"""Errors of qv_lens: each message says what failed, where, why, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from numbers import Integral
from typing import Any


class QVLensError(Exception):
    """Base of every error raised on purpose by this package."""


class ModelError(QVLensError):
    """A model that cannot be found, loaded, wrapped or trusted."""


class FactError(QVLensError):
    """A fact, prompt or answer that does not map onto tokens, or a record that does not parse."""


class EditError(QVLensError):
    """An edit that cannot be computed or applied."""


class PatchError(QVLensError):
    """A patch that does not belong to this model, or whose files are damaged."""


class ConfigError(QVLensError):
    """An option, a path or a setting that cannot be honoured."""


def unknown(
    what: str, got: object, known: object, *, error: type[QVLensError] = ConfigError
) -> QVLensError:
    """The error for a name that is not one of `known`: '<what> X not found. Available: ...', and
    which of them it resembles."""
    names = [str(name) for name in known]  # pyright: ignore[reportGeneralTypeIssues]
    return error(f"{what} {got!r} not found.{meant(got, names)} Available: {', '.join(names)}.")


def meant(got: object, names: Iterable[str]) -> str:
    """' Did you mean X?' of the name that it resembles; '' where it resembles none."""
    spelled = {name.lower(): name for name in names}
    close = get_close_matches(str(got).lower(), spelled, n=1, cutoff=0.75)
    return f" Did you mean {spelled[close[0]]!r}?" if close else ""


def check_kind(value: object, kind: type, takes: str) -> None:
    """Raise `ConfigError`, which says what is taken, for a value of another kind."""
    if not isinstance(value, kind):
        raise ConfigError(f"{takes}; got {type(value).__name__}.")


def check_count(
    name: str, value: Any, least: int = 1, *, error: type[QVLensError] = ConfigError
) -> None:
    """Raise the error for what is not a whole number of at least so much."""
    if not isinstance(value, Integral) or isinstance(value, bool) or int(value) < least:
        raise error(f"{name} must be a whole number of at least {least}, got {value!r}.")


def check_seed(seed: Any, *, error: type[QVLensError] = ConfigError) -> int:
    """The seed as an int, since a NumPy integer would give other draws. Raises the error for
    anything but a whole number from 0 on; with None nobody could repeat the draw."""
    check_count("seed", seed, 0, error=error)
    return int(seed)


def several(values: object) -> tuple[Any, ...] | None:
    """Several values, read once: a generator gives them only then. None for a text, a mapping or
    one value."""
    if isinstance(values, (str, bytes, Mapping)) or not isinstance(values, Iterable):
        return None
    return tuple(values)


def one_or_more(values: object) -> tuple[Any, ...]:
    """`several` values, or one alone."""
    collection = several(values)
    return (values,) if collection is None else collection


def check_counts(name: str, values: Any) -> tuple[int, ...]:
    """The values, read once. Raises `ConfigError` unless they are whole numbers of at least 1."""
    counts = several(values)
    if counts is None:
        raise ConfigError(f"{name} are several whole numbers, [1, 3, 10], got {values!r:.80}.")
    for count in counts:
        check_count(f"each of {name}", count)
    return tuple(map(int, counts))
