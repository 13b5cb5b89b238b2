"""SimIE: edits in a row as one least-squares problem on what the edited weights give.

For every weight that the wrapped editor writes, in TransformerLens layout [k, d]; W_0 is the weight
before the first edit by this editor in force, W the weight as it is, A = lam I + sum K K^T over the
facts edited so far. Facts are taken one at a time:

1. K [k, m]: what the weight reads at every token of prompt and new answer, on the base model: W_0
   (`unedited`) or W.
2. The editor edits the base model, and gives W_e.
3. A += K K^T, W += A^-1 K K^T (W_e - W).

After T facts this is the ridge regression W_T = (lam I + sum K K^T)^-1 (lam W_0 + sum K K^T W_e):
the weight that gives each fact's tokens what its own edit would have given them.

Source: SimIE (2025), released code; lam and the base model as released."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from qv_lens.editing.bounds import Positive
from qv_lens.editing.editors import editors
from qv_lens.editing.job import Deltas, Editor, Job, check_editor, reads_statistics, style_of
from qv_lens.editing.layer_by_layer import ClosedForm
from qv_lens.editing.presets import editor_of
from qv_lens.editing.statistics import Module
from qv_lens.errors import EditError
from qv_lens.facts.records import EditRequest
from qv_lens.models.deltas import delta_hooks, taps
from qv_lens.models.lens import Lens
from qv_lens.patch import Delta, summed
from qv_lens.progress import progress_bar

Key = tuple[int, str]


@dataclass(frozen=True, kw_only=True)
class SimIE:
    """SimIE (2025): any editor that writes weights, made to last over many facts.

    The keys are kept with the patch, for edits made while it is applied. At a weight that no earlier
    patch wrote, those patches' facts do not count. An editor with a memory of its own (AlphaEdit)
    starts from none at every fact, whatever patches are in force."""

    editor: Any = "ROME"
    """The editor for each fact, or the name of the model's preset of one."""
    lam: Positive = 1e4
    """How strongly the weight is held at W_0."""
    unedited: bool = True
    """Whether each fact is edited on the model as it was before all edits by this editor."""

    batch = 1  # requests edited together

    @property
    def reads_statistics(self) -> bool:
        """Whether the wrapped editor reads C0."""
        wrapped = self._wrapped()
        return wrapped is not None and reads_statistics(wrapped)

    @property
    def style(self) -> str:
        """The style of the wrapped editor's contexts."""
        return style_of(self._wrapped())

    def _wrapped(self) -> Editor | None:
        """The wrapped editor; for a name, its class with default settings, or None if no class has
        that name."""
        if not isinstance(self.editor, str):
            return self.editor
        kinds = {name.lower(): kind for name, kind in editors().items()}
        kind = kinds.get(self.editor.split(".")[0].lower())
        return None if kind is None or kind is SimIE else kind()

    def written(self, lens: Lens) -> tuple[tuple[int, ...], tuple[Module, ...]]:
        """The layers and modules that the wrapped editor, a closed form, writes. Raises `EditError`
        for another one."""
        editor = editor_of(lens, self.editor)
        if not isinstance(editor, ClosedForm):
            raise EditError(f"{type(editor).__name__} reads no C0.")
        return editor.written(lens)

    def deltas(self, job: Job) -> Deltas:
        if job.batch_size not in (None, 1):
            raise EditError(
                f"SimIE edits one fact at a time, got batch_size={job.batch_size}: leave it out."
            )
        editor = editor_of(job.lens, self.editor)
        check_editor(editor)
        job.notes["wrapped"] = type(editor).__name__
        earlier = job.kept_earlier(self)
        A: dict[Key, Tensor] = {}
        parts: list[Deltas] = []
        for i, request in enumerate(progress_bar(job.requests, of="SimIE", unit="fact")):
            moved, K, late = self._edited(job, editor, request, {*earlier, *A}, job.requests[:i])
            shift: Deltas = {}
            for key, target in moved.items():
                if key not in A:
                    A[key] = self._held(K[key], earlier.get(key))
                    A[key] = sum((read[key] @ read[key].T for read in late if key in read), A[key])
                A[key] = A[key] + K[key] @ K[key].T
                shift[key] = _shift(job.lens.parameter(*key), target, K[key], A[key])
                job.write(*key, shift[key])
            grams = [{key: _gram(read) for key, read in seen.items()} for seen in (*late, K)]
            job.kept.update(summed([job.kept, *grams]))
            parts.append(shift)
        return summed(parts)

    def _held(self, like: Float[Tensor, "k token"], earlier: Delta | None) -> Tensor:
        """A before this edit's facts."""
        lam = self.lam * torch.eye(len(like), dtype=like.dtype, device=like.device)
        return lam if earlier is None else lam + earlier.dense()

    def _edited(
        self,
        job: Job,
        editor: Editor,
        request: EditRequest,
        known: set[Key],
        earlier_requests: Sequence[EditRequest],
    ) -> tuple[dict[Key, Tensor], dict[Key, Tensor], list[dict[Key, Tensor]]]:
        """W_e and K of every weight that the editor writes or that was written before, and K of
        `earlier_requests` at the weights that are first written now."""
        alone = Job(
            job.lens, [request], None, job.statistics, job.templates, job.seed,
            factored=job.factored, first=True,
        )  # fmt: skip
        with job.before(self) if self.unedited else nullcontext():
            try:
                deltas = editor.deltas(alone)
            finally:
                alone.restore()
            job.used, job.losses = alone.used, [*job.losses, *alone.losses]
            moved = {}
            for key, delta in deltas.items():
                weight = job.lens.parameter(*key)
                if weight.ndim != 2:
                    raise EditError(
                        f"{type(editor).__name__} writes {key[1]}[{key[0]}], which reads nothing: "
                        "SimIE takes editors that write weights alone."
                    )
                moved[key] = weight.double() + delta.dense()
            new = [key for key in moved if key not in known]
            late = [_keys(job.lens, earlier, new) for earlier in earlier_requests] if new else []
            for key in known - moved.keys():  # it holds this fact as it is
                moved[key] = job.lens.parameter(*key).double().clone()
            return moved, _keys(job.lens, request, list(moved)), late


@torch.no_grad()
def _keys(
    lens: Lens, request: EditRequest, names: list[Key]
) -> dict[Key, Float[Tensor, "k token"]]:
    """What each weight reads at every token of prompt and new answer."""
    (prompt,) = lens.tokenize([request.target])
    tapped = taps(lens, names)
    row = (*prompt.ids, *prompt.answer)
    hooks = delta_hooks(lens, dict(tapped))
    lens.stream([row], lens.n_layers, hooks, last=[prompt.last])
    return {key: tap.read[0].double().T for key, tap in tapped.items() if tap.read is not None}


def _gram(K: Float[Tensor, "k token"]) -> Delta:
    """K K^T; as its factors where they are smaller."""
    if 2 * K.shape[1] >= K.shape[0]:
        return Delta(K @ K.T)
    return Delta(K, K.T)


def _shift(
    W: Float[Tensor, "k d"],
    target: Float[Tensor, "k d"],
    K: Float[Tensor, "k token"],
    A: Float[Tensor, "k k"],
) -> Delta:
    """A^-1 K K^T (W_e - W)."""
    left = torch.cholesky_solve(K, torch.linalg.cholesky(A))
    return Delta(left, K.T @ (target - W.double()))
