"""Hooks of one pass: a point's name and a function, in the order in which they act."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

from torch import Tensor

Hook = tuple[str, Callable[..., Any]]


class Early(Hook):
    """A hook that acts before the others at its point."""


class Late(Hook):
    """A hook that acts after the others at its point: it looks at what they leave."""


def ordered(hooks: Sequence[Hook]) -> list[Hook]:
    """Hooks as they act: in the order given, but for `Early` and `Late`."""
    return sorted(hooks, key=lambda hook: isinstance(hook, Late) - isinstance(hook, Early))


def keeper(kept: dict[Any, Tensor], name: Hashable) -> Callable[[Tensor], None]:
    """A hook that keeps what it sees under a name."""

    def hook(x: Tensor) -> None:
        kept[name] = x

    return hook


def adapted_to(function: Callable[..., Any], shape: Sequence[int]) -> Callable[..., Any]:
    """A hook of PyTorch whose function gets in their `shape` the rows that a module may have
    flattened."""

    def hook(_module: Any, _inputs: Any, output: Tensor) -> Any:
        if output.ndim > 2 or not shape:
            return function(output)
        moved = function(output.unflatten(0, tuple(shape)))
        return moved if moved is None else moved.flatten(0, 1)

    return hook
