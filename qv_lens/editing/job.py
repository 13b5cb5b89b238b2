"""The job of an editor: the requests, the model, what an edit may read, and what it notes.

Editors are frozen dataclasses of hyperparameters with one method, `deltas(job)`: what to add to
which weight. They may write to the live weights on the way with `job.write` (a sweep reads each
layer with all earlier writes in place). `reads_statistics`, where an editor has it, says that it
needs C0. `editing.edit` makes the job, checks what comes back and keeps it as a patch."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, is_dataclass, replace
from typing import Any, Protocol

from torch import Tensor

from qv_lens.editing.bounds import check_bounds
from qv_lens.editing.keys import contexts
from qv_lens.editing.statistics import Statistics
from qv_lens.editing.targets import PrecomputedTargets
from qv_lens.errors import EditError
from qv_lens.facts.records import EditRequest
from qv_lens.models.lens import Lens
from qv_lens.models.patch_stack import put_back
from qv_lens.patch import Delta, Patch, summed

Deltas = dict[tuple[int, str], Delta]

MISSING = (
    "needs C0: pass statistics=qv.corpus_statistics(lens) (on the command line qv-lens stats)."
)


@dataclass
class Factored:
    """What has been made of C0 (Cholesky factors, null spaces): computed once for many edits with
    the same statistics."""

    statistics: Statistics | None
    """C0."""
    made: dict[Hashable, Any] = field(default_factory=dict)
    """The derived results, by the key given to the call."""

    @classmethod
    def of(cls, statistics: Statistics | None, shared: Factored | None) -> Factored:
        """The shared one if it belongs to these statistics, else a new one."""
        if shared is not None and shared.statistics is statistics:
            return shared
        return cls(statistics)

    def once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """What `make` gives, at the first call with this key."""
        if key not in self.made:
            self.made[key] = make()
        return self.made[key]


@dataclass
class Job:
    """What an editor works on. `batches`: requests that are edited together, one batch after
    another on the weights as written so far. `losses`, `notes` and `kept` are filled in by the
    editor and end up in the patch."""

    lens: Lens
    """The model."""
    requests: list[EditRequest]
    """What is edited."""
    batch_size: int | None
    """Requests edited together (None: as the editor does)."""
    statistics: Statistics | None
    """C0."""
    templates: tuple[str, ...] | None
    """Contexts (None: sampled)."""
    seed: int
    """Seed of every draw."""
    ahead: PrecomputedTargets | None = None
    """z* from an earlier search."""
    factored: Factored = field(default_factory=lambda: Factored(None))
    """C0, factored once."""
    losses: list[Any] = field(default_factory=list)
    """Losses of the searches, by request."""
    notes: dict[str, Any] = field(default_factory=dict)
    """What else the patch records."""
    kept: Deltas = field(default_factory=dict)
    """Data of this edit that later edits by the same method read."""
    saved: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    """Weights as they were, by (layer, name)."""
    used: tuple[str, ...] = ()
    """The contexts that were used."""
    first: bool = False
    """Whether this counts as the first edit: an editor remembers none of the patches in force."""

    def batches(self, size: int | None) -> list[list[EditRequest]]:
        """The requests in batches of the size asked for in `edit`, or else the editor's own (None:
        all together)."""
        size = self.batch_size or size or len(self.requests)
        return [self.requests[i : i + size] for i in range(0, len(self.requests), size)]

    def in_turn(self, deltas_of: Callable[[Job], Deltas]) -> Deltas:
        """The sum of what `deltas_of` gives for each batch on the weights as the batches before it
        left them. What it notes of several batches is kept as a list."""
        batches = self.batches(None)
        if len(batches) == 1:
            return deltas_of(self)
        parts: list[Deltas] = []
        notes: list[dict[str, Any]] = []
        for requests in batches:
            job = replace(self, requests=requests, batch_size=None, notes={})
            parts.append(deltas_of(job))
            notes.append(job.notes)
            for key, delta in parts[-1].items():
                self.write(*key, delta)
        self.notes.update({name: [note.get(name) for note in notes] for name in notes[0]})
        return summed(parts)

    def prefixes(self, style: str = "memit") -> tuple[str, ...]:
        """Contexts with `{}`: those given to `edit`, or sampled from the model (recorded)."""
        self.used = (
            self.templates if self.templates is not None else contexts(self.lens, self.seed, style)
        )
        return self.used

    def earlier(self, editor: object) -> list[Patch]:
        """The patches in force that an editor of the same kind made and remembers, oldest first,
        moved to the lens's device (patches from a file lie elsewhere)."""
        if self.first:
            return []
        return [
            patch.to(self.lens.device)
            for patch in self.lens.patches
            if patch.info.get("method") == type(editor).__name__
        ]

    def kept_earlier(self, editor: object) -> dict[tuple[int, str], Delta]:
        """What the patches of `earlier` keep, added up by weight."""
        return summed(patch.kept for patch in self.earlier(editor))

    def required_statistics(self) -> Statistics:
        """C0. Raises `EditError` where none was given."""
        if self.statistics is None:
            raise EditError(f"This editor {MISSING}")
        return self.statistics

    def write(self, layer: int, name: str, delta: Delta) -> None:
        """Add a delta to the live weight; it is put back when the edit is done."""
        if not delta.finite():
            raise EditError(
                f"The edit of {name}[{layer}] is not finite. Lower lr or clamp, or raise "
                "lam (where the editor has one); nothing was kept."
            )
        weight = self.lens.parameter(layer, name)
        if (layer, name) not in self.saved:
            self.saved[layer, name] = weight.clone()
        delta.add_to(weight)

    def rewrite(self, layer: int, name: str, before: Tensor, delta: Delta) -> None:
        """Put a delta on the weight as it was at an earlier point of this edit. It replaces
        everything added since then."""
        self.lens.parameter(layer, name).copy_(before)
        self.write(layer, name, delta)

    def original(self, layer: int, name: str) -> Tensor:
        """The weight as it was before this edit."""
        return self.saved.get((layer, name), self.lens.parameter(layer, name))

    @contextmanager
    def before(self, editor: object) -> Iterator[None]:
        """The weights as they were before this edit and every patch in force since the first one by
        an editor of the same kind. After the block they are as they are now, bit for bit."""
        method = type(editor).__name__
        patches = [patch.info.get("method") for patch in self.lens.patches]
        known = method in patches and not self.first
        first = patches.index(method) if known else len(patches)
        earlier = {**self.saved, **self.lens.before_patches(first)}
        now = {key: self.lens.parameter(*key).clone() for key in earlier}
        try:
            put_back(earlier, self.lens.parameter)
            yield
        finally:
            put_back(now, self.lens.parameter)

    def restore(self) -> None:
        """Put every written weight back, bit for bit."""
        put_back(self.saved, self.lens.parameter)


class Editor(Protocol):
    """A frozen dataclass of hyperparameters that knows what to write."""

    def deltas(self, job: Job) -> Deltas: ...


def checked_templates(templates: Sequence[str]) -> tuple[str, ...]:
    """Contexts with the bare one first. Raises `EditError` where it is not among them: keys and
    values are measured from it."""
    if isinstance(templates, str):
        raise EditError(
            f"templates= takes several contexts, got the one text {templates!r}: pass "
            f"({templates!r},)."
        )
    contexts = tuple(templates)
    for template in contexts:
        if not isinstance(template, str) or template.count("{}") != 1:
            raise EditError(f"A context holds {{}} once, where the prompt goes; got {template!r}.")
    if "{}" not in contexts:
        raise EditError(
            f'The contexts {contexts!r:.100} lack the bare one, "{{}}", from which keys and values are measured: put it first.'
        )
    return ("{}", *(template for template in contexts if template != "{}"))


def check_editor(editor: object) -> None:
    """Raise `EditError` for what is not an editor, or one with a setting out of its bounds."""
    if isinstance(editor, Patch):
        raise EditError(
            "A patch is an edit already made, not an editor. To measure it: with lens.patched(patch): "
            "qv.evaluate(lens, cases)."
        )
    known = is_dataclass(editor) and not isinstance(editor, type)
    if not known or not callable(getattr(editor, "deltas", None)):
        if callable(getattr(getattr(editor, "editor", None), "deltas", None)):
            raise EditError(
                f"A {type(editor).__name__} holds an editor and is none: pass its .editor."
            )
        raise EditError(
            "An editor is a frozen dataclass of hyperparameters with a method deltas(job), as "
            f"qv.MEMIT(layers=(3, 4, 5)); got {editor!r:.100}."
        )
    check_bounds(editor)


def reads_statistics(editor: object) -> bool:
    """Whether an editor reads C0: its `reads_statistics`, false where it has none."""
    return getattr(editor, "reads_statistics", False)


def style_of(editor: object) -> str:
    """The style of an editor's sampled contexts (`keys.contexts`): its `style`, MEMIT's if it has
    none."""
    return getattr(editor, "style", "memit")
