"""What an editor's settings may be: bounds that stand in a field's type, `lr: Positive = 0.5`, checked
before anything is searched."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, fields
from math import inf
from numbers import Integral, Real
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import numpy as np
from torch import Tensor

from qv_lens.errors import EditError, several


@dataclass(frozen=True)
class Bounds:
    """A range of numbers, and how it is said."""

    said: str
    """In words."""
    least: float = -inf
    """The smallest value."""
    most: float = inf
    """The largest value."""
    without: tuple[float, ...] = ()
    """Ends that do not belong to it."""
    whole: bool = False
    """Whether only whole numbers do."""

    def holds(self, value: object) -> bool:
        """Whether a value, a number of Python's, NumPy's or torch's, lies within."""
        if isinstance(value, Tensor):
            value = value.tolist()
        if isinstance(value, bool) or not isinstance(value, Integral if self.whole else Real):
            return False
        number = float(value)
        return self.least <= number <= self.most and number not in self.without


Count = Annotated[int, Bounds("a whole number of at least 1", least=1, whole=True)]
Natural = Annotated[int, Bounds("a whole number of at least 0", least=0, whole=True)]
Positive = Annotated[float, Bounds("a finite number above 0", least=0, without=(0, inf))]
NotNegative = Annotated[float, Bounds("a finite number of at least 0", least=0, without=(inf,))]
#: a largest size, which may be infinite
Limit = Annotated[float, Bounds("a number above 0", least=0, without=(0,))]
#: of something that must not be empty
Share = Annotated[float, Bounds("a share, above 0 and at most 1", least=0, most=1, without=(0,))]
Part = Annotated[float, Bounds("a part, from 0 to 1", least=0, most=1)]
#: what is left out of something that must not become empty
Dropped = Annotated[float, Bounds("a share, at least 0 and below 1", least=0, most=1, without=(1,))]


def check_bounds(editor: Any) -> None:
    """Raise `EditError` for the first of an editor's settings that lies out of its bounds."""
    kind = type(editor)
    try:
        hints = get_type_hints(kind, include_extras=True)
    except NameError:  # a user's editor may name types that it imports for type checkers alone
        return
    for each in fields(editor):
        _check(kind.__name__, each.name, getattr(editor, each.name), hints[each.name])


def _check(editor: str, name: str, value: Any, hint: Any) -> None:
    """A value against its type; of a type in several parts, each against its own."""
    parts = get_args(hint)
    if get_origin(hint) is Annotated:
        _, bounds = parts
        if not bounds.holds(value):
            raise EditError(f"{name} of {editor} must be {bounds.said}, got {value!r}.")
    elif get_origin(hint) is tuple and Ellipsis not in parts:
        if not isinstance(value, tuple) or len(value) != len(parts):
            raise EditError(f"{name} of {editor} must be {len(parts)} values, got {value!r}.")
        for i, (inner, part) in enumerate(zip(value, parts, strict=True)):
            _check(editor, f"{name}[{i}]", inner, part)
    elif get_origin(hint) is tuple:
        # a generator would be empty when it is read again
        if not isinstance(value, Collection) or several(value) is None:
            example = "(3, 4)" if int in parts else "('W_out',)"
            raise EditError(f"{name} of {editor} are several, as {example}; got {value!r:.80}.")
    elif hint is bool:
        if not isinstance(value, (bool, np.bool_)):
            raise EditError(f"{name} of {editor} must be True or False, got {value!r}.")
    elif value is not None:
        for part in parts:  # a number, or several, or None
            if get_origin(part) in (Annotated, tuple):
                _check(editor, name, value, part)
