"""The patches in force on a Lens: what was written, over which weights, and how it is taken back.

1. A patch is added to the live weights on top of those before it; the tensors it replaces are kept.
2. Taking back the newest puts the kept tensors in its place, bit for bit: nothing is subtracted.
3. A block takes back what is newer than its beginning: its own patches, and what was applied inside
   and left. A block inside it that is still open keeps its patches, which are written again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from qv_lens.errors import PatchError
from qv_lens.patch import Patch

#: a live weight by layer and name
Weight = Callable[[int, str], Tensor]
Replaced = dict[tuple[int, str], Tensor]


@dataclass
class _Applied:
    patch: Patch
    block: object | None
    saved: Replaced = field(default_factory=dict)


class PatchStack:
    """The patches written into one model's weights, oldest first. `weight` gives a live weight."""

    def __init__(self) -> None:
        self._stack: list[_Applied] = []

    def __len__(self) -> int:
        return len(self._stack)

    @property
    def patches(self) -> tuple[Patch, ...]:
        """The patches, oldest first."""
        return tuple(applied.patch for applied in self._stack)

    def replaced(self, first: int = 0) -> Replaced:
        """Every weight that the patches from the `first` on have changed, as it was before them."""
        found: Replaced = {}
        for applied in self._stack[first:]:
            for key, saved in applied.saved.items():
                found.setdefault(key, saved)
        return found

    def push(self, patch: Patch, weight: Weight, block: object | None = None) -> None:
        """Write a patch, for the time of a block where one is named. Raises `PatchError` where the
        sum leaves the range of a weight's type; nothing is written then."""
        applied = _Applied(patch, block)
        self._stack.append(applied)
        try:
            for (layer, name), delta in patch.deltas.items():
                live = weight(layer, name)
                applied.saved[layer, name] = live.clone()
                delta.add_to(live)
                if not live.isfinite().all():
                    raise PatchError(
                        f"With this patch {name}[{layer}] leaves the range of "
                        f"{str(live.dtype).removeprefix('torch.')}: load the model with "
                        "dtype='float32'. Nothing was written."
                    )
        except BaseException:
            self.pop(weight)
            raise

    def pop(self, weight: Weight) -> Patch:
        """Take back the newest patch. Raises `PatchError` where there is none."""
        if not self._stack:
            raise PatchError("No patch is applied: there is nothing to revert.")
        applied = self._stack.pop()
        for (layer, name), saved in applied.saved.items():
            weight(layer, name).copy_(saved)
        return applied.patch

    def leave(self, block: object, begun: int, weight: Weight) -> None:
        """Take back what a block has written, and what was written since without a block; `begun`:
        how many patches there were when it began."""
        own = (i for i, applied in enumerate(self._stack) if applied.block is block)
        begun = next(own, begun)
        others = [one for one in self._stack[begun:] if one.block not in (None, block)]
        while len(self) > begun:
            self.pop(weight)
        for one in others:
            self.push(one.patch, weight, one.block)
