"""The patches in force on a Lens: what was written, over which weights, and how it is taken back.

1. A patch is added to the live weights on top of those before it; the tensors it replaces are kept.
2. Taking back the newest puts the kept tensors in its place, bit for bit: nothing is subtracted. An
   interrupt meanwhile is raised when that is done.
   Where something else was written over a patch meanwhile (by hand, or through another lens on the
   same model), it goes too, with a warning.
3. A block leaves its mark on the stack. What is applied inside lies above the mark, and is taken back
   with it; `pop` never reaches below. A block inside it that is still open keeps what lies above its
   own mark, which is written again.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from qv_lens.errors import PatchError
from qv_lens.models.identity import bit_sum
from qv_lens.models.norms import dtype_name
from qv_lens.patch import Patch

#: a live weight by layer and name
Weight = Callable[[int, str], Tensor]
Replaced = dict[tuple[int, str], Tensor]


@dataclass
class _Applied:
    patch: Patch
    saved: Replaced = field(default_factory=dict)
    written: dict[tuple[int, str], int] = field(default_factory=dict)
    """A sum of each weight's bits behind the patch."""


class _Mark:
    """Where a block began."""


class PatchStack:
    """The patches written into one model's weights, oldest first. `weight` gives a live weight."""

    def __init__(self) -> None:
        self._stack: list[_Applied | _Mark] = []

    def __len__(self) -> int:
        return len(self._applied())

    def _applied(self) -> list[_Applied]:
        return [entry for entry in self._stack if isinstance(entry, _Applied)]

    @property
    def patches(self) -> tuple[Patch, ...]:
        """The patches, oldest first."""
        return tuple(applied.patch for applied in self._applied())

    def replaced(self, first: int = 0) -> Replaced:
        """Every weight that the patches from the `first` on have changed, as it was before them."""
        first_saved: Replaced = {}
        for applied in self._applied()[first:]:
            for key, saved in applied.saved.items():
                first_saved.setdefault(key, saved)
        return first_saved

    def push(self, patch: Patch, weight: Weight) -> None:
        """Write a patch. Raises `PatchError` where the sum leaves the range of a weight's type;
        nothing is written then."""
        applied = _Applied(patch)
        self._stack.append(applied)
        try:
            for (layer, name), delta in patch.deltas.items():
                live = weight(layer, name)
                applied.saved[layer, name] = live.clone()
                delta.add_to(live)
                if not live.isfinite().all():
                    raise PatchError(
                        f"With this patch {name}[{layer}] leaves the range of "
                        f"{dtype_name(live.dtype)}: load the model with dtype='float32'. Nothing "
                        "was written."
                    )
                applied.written[layer, name] = int(bit_sum(live))
        except BaseException:
            self._take_back(weight)
            raise

    def pop(self, weight: Weight) -> Patch:
        """Take back the newest patch. Raises `PatchError` where there is none, or none since the
        innermost open block began."""
        if not self._stack:
            raise PatchError("No patch is applied: there is nothing to revert.")
        if isinstance(self._stack[-1], _Mark):
            raise PatchError(
                "No patch was applied inside this block: leave it (lens.patched) before you revert "
                "one that was applied in front of it."
            )
        return self._take_back(weight)

    def _take_back(self, weight: Weight) -> Patch:
        applied = self._stack[-1]
        assert isinstance(applied, _Applied)
        _warn_of_others(applied, weight)
        put_back(applied.saved, weight)
        self._stack.pop()  # at the end: an interrupt before leaves it for the next try
        return applied.patch

    def begin(self) -> object:
        """The mark of a new block."""
        self._stack.append(_Mark())
        return self._stack[-1]

    def leave(self, mark: object, weight: Weight) -> None:
        """Take back what was applied in a block, to the end: an interrupt is raised afterwards."""
        begun = next(i for i, entry in enumerate(self._stack) if entry is mark)
        above = self._stack[begun + 1 :]
        inner = next((i for i, entry in enumerate(above) if isinstance(entry, _Mark)), len(above))
        try:
            self._take_back_to(begun, weight)
        except BaseException:
            self._take_back_to(begun, weight)
            raise
        finally:
            for entry in above[inner:]:  # of blocks that are still open
                if isinstance(entry, _Mark):
                    self._stack.append(entry)
                else:
                    self.push(entry.patch, weight)

    def _take_back_to(self, begun: int, weight: Weight) -> None:
        while len(self._stack) > begun:
            if isinstance(self._stack[-1], _Mark):
                self._stack.pop()
            else:
                self._take_back(weight)


def _warn_of_others(applied: _Applied, weight: Weight) -> None:
    """Warn of weights that are others than the patch left them."""
    for (layer, name), bits in applied.written.items():
        if int(bit_sum(weight(layer, name))) != bits:
            warnings.warn(
                f"{name}[{layer}] was written to since this patch was applied (by hand, or through "
                "another lens on the same model): it is put back as it was before the patch, and "
                "what was written goes with it. Use one lens for each model.",
                stacklevel=4,
            )


def check_fits(patch: Patch, weight: Weight) -> None:
    """Raise `PatchError` for a delta of another shape than its weight, or that is not finite."""
    for (layer, name), delta in patch.deltas.items():
        shape = tuple(weight(layer, name).shape)
        if shape != delta.shape:
            raise PatchError(f"The delta of {name}[{layer}] is {delta.shape}, the weight {shape}.")
        if not delta.finite():
            raise PatchError(f"The delta of {name}[{layer}] is not finite; nothing was written.")


def put_back(saved: Replaced, weight: Weight) -> None:
    """Every kept tensor into its weight, to the end: an interrupt is raised afterwards."""
    try:
        _copy(saved, weight)
    except BaseException:
        _copy(saved, weight)
        raise


def _copy(saved: Replaced, weight: Weight) -> None:
    for (layer, name), tensor in saved.items():
        weight(layer, name).copy_(tensor)
