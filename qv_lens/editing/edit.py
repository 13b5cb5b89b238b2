"""edit(): requests and an editor become a Patch; the lens is left as it was. Whatever happens, the
weights are put back bit for bit."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qv_lens.editing.job import (
    MISSING,
    Deltas,
    Editor,
    Factored,
    Job,
    check_editor,
    checked_templates,
    reads_statistics,
)
from qv_lens.editing.presets import editor_of
from qv_lens.editing.statistics import Statistics
from qv_lens.editing.targets import PrecomputedTargets
from qv_lens.errors import EditError, check_count, check_seed, several
from qv_lens.facts.records import (
    EditCase,
    EditRequest,
    Fact,
    MultiHopCase,
    check_requests,
)
from qv_lens.models.backend import versions
from qv_lens.models.lens import Lens, check_lens, log_probs
from qv_lens.models.norms import dtype_name
from qv_lens.patch import Delta, Patch

logger = logging.getLogger(__name__)

#: ||W'|| / ||W|| above which an edit is warned of
COLLAPSE = 5.0
#: part of a delta lost to rounding above which an edit is warned of
LOST = 0.5
#: ratio of the entropy on held-out text, after to before: outside this range an edit is warned of
ENTROPY = (0.5, 2.0)


def edit(
    lens: Lens,
    requests: Sequence[EditRequest] | EditRequest,
    editor: Editor | str,
    *,
    statistics: Statistics | None = None,
    templates: Sequence[str] | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    held_out: Sequence[str] = (),
    ahead: PrecomputedTargets | None = None,
    factored: Factored | None = None,
) -> Patch:
    """Compute an edit as a Patch; the lens is left as it was, bit for bit, also after an exception.

    `editor`: an editor with its settings, or the name of one of the model's presets.
    `statistics`: C0 of every layer written by a closed form.
    `templates`: contexts with `{}`, the bare one "{}" among them; None samples them from the model
    (`seed`).
    `batch_size`: how many requests are edited together, one batch after another (None: the editor's
    own way).
    `held_out`: texts on which the entropy of the next token is measured before and after, and
    recorded.
    `ahead`: z* that were searched for many edits of the same weights together
    (`layer_by_layer.search_ahead`).
    `factored`: a `Factored(statistics)` that several edits share, so that C0 is factored once for
    all. Patches in force count as earlier edits if the same method made them: AlphaEdit spares
    their keys, and PRUNE restrains the sum.

    Warns where weights or entropy leave their range: a model about to collapse.
    Raises `EditError` for layers, tokens or systems that cannot be edited or conflicting requests,
    `FactError` for requests that do not tokenise.

    >>> import qv_lens as qv
    >>> lens = qv.load("toy-gptj")
    >>> fact = qv.Fact("{} plays the sport of", "Elena Morefeld", "fencing")
    >>> patch = qv.edit(lens, fact.to("golf"), "FT")
    >>> with lens.patched(patch):
    ...     lens.generate(fact.text, 1)
    ' golf'
    >>> lens.generate(fact.text, 1)  # the lens is as it was
    ' fencing'
    """
    check_lens(lens)
    if isinstance(requests, (EditCase, MultiHopCase)):
        raise EditError(
            "edit takes requests, got a case: pass case.request (of a multi-hop case case.edits)."
        )
    batch = [requests] if isinstance(requests, (EditRequest, Fact)) else list(requests)
    if not batch:
        raise EditError(
            "No edit was requested: pass at least one EditRequest (fact.to('new answer'))."
        )
    for request in batch:
        if not isinstance(request, EditRequest):
            raise EditError(f"An edit is asked for by fact.to('new answer'), got {request!r:.100}.")
    editor = editor_of(lens, editor)
    check_editor(editor)
    if batch_size is not None:
        check_count("batch_size", batch_size, error=EditError)
    seed = check_seed(seed, error=EditError)
    templates = None if templates is None else checked_templates(templates)
    held_out = checked_texts(held_out)
    fingerprint = lens.fingerprint
    if not lens.patches and lens.written_to():
        warnings.warn(
            f"The weights of {lens.name} were written to since it was wrapped (by hand, or through "
            "another lens). This patch names the model as it was then, on which it is another edit: "
            "wrap the model as it now is in a new Lens.",
            stacklevel=2,
        )
    if ahead is not None:
        first_search = getattr(editor, "first_search", None)
        ahead.check(lens, first_search(lens) if first_search else None, templates)
        templates = ahead.templates
    shared = Factored.of(statistics, factored)
    job = Job(lens, batch, batch_size, statistics, templates, seed, ahead, shared)
    for together in job.batches(getattr(editor, "batch", None)):
        check_requests(together)
    start = time.perf_counter()
    with lens.turn.held():
        try:
            check_statistics(lens, editor, statistics)
            deltas = editor.deltas(job)
            check_deltas(lens, editor, deltas)
        finally:
            job.restore()
    deltas = dict(sorted(deltas.items()))
    logger.info(
        "%s: %d facts, %d matrices, %.1f s",
        type(editor).__name__,
        len(batch),
        len(deltas),
        time.perf_counter() - start,
    )
    patch = Patch(deltas, fingerprint, {**_info(job, editor), **_measured(lens, deltas)}, job.kept)
    return (
        replace(patch, info={**patch.info, "entropy": _entropies(lens, patch, held_out)})
        if held_out
        else patch
    )


def _entropies(lens: Lens, patch: Patch, texts: Sequence[str]) -> list[float]:
    """Before and after the patch; warns where their ratio is out of range."""
    before = entropy(lens, texts)
    with lens.patched(patch):
        after = entropy(lens, texts)
    if not ENTROPY[0] * before <= after <= ENTROPY[1] * before:
        warnings.warn(
            f"The entropy of the next token on held-out text went from {before:.2f} to {after:.2f} "
            "nats: the edit ruins the model. Raise lam (where the editor has one), or lower "
            "clamp, lr or steps.",
            stacklevel=3,
        )
    return [before, after]


@torch.no_grad()
def entropy(lens: Lens, texts: Sequence[str], batch_size: int = 32) -> float:
    """Mean entropy (nats) of the next-token distribution over all positions of the texts."""
    rows, total, count = [prompt.ids for prompt in lens.tokenize(list(texts))], 0.0, 0
    for i in range(0, len(rows), batch_size):
        chunk = rows[i : i + batch_size]
        logp = log_probs(lens.logits(chunk))
        each = -(logp.exp() * logp).sum(-1)
        total += sum(float(each[r, : len(row)].sum()) for r, row in enumerate(chunk))
        count += sum(map(len, chunk))
    return total / count


def _measured(lens: Lens, deltas: Deltas) -> dict[str, Any]:
    """Per weight: ||dW|| / ||W||, the part of dW lost by rounding to the weight's own dtype, and
    its Hugging Face module.

    Warns where the weights grow out of their range. Raises `EditError` for a delta that is not
    finite, or leads out of the range of the weights' type."""
    relative, lost, modules, grown = {}, {}, {}, {}
    for (layer, name), delta in deltas.items():
        if not delta.finite():
            raise EditError(
                f"The edit of {name}[{layer}] is not finite. Lower lr, or raise lam (where the "
                "editor has one)."
            )
        weight, key = lens.parameter(layer, name), f"{layer}.{name}"
        W, D = weight.double(), delta.dense().to(weight.device)
        norm, size = float(W.norm()), float(D.norm())
        relative[key] = size / norm if norm else float("inf")
        edited = W + D
        if not edited.to(weight.dtype).isfinite().all():
            raise EditError(
                f"With this edit {key} leaves the range of {dtype_name(weight.dtype)}: load the "
                "model with dtype='float32', or lower lr or clamp."
            )
        lost[key] = (
            float((edited.to(weight.dtype).double() - edited).norm()) / size if size else 0.0
        )
        modules[key] = lens.backend_adapter.stored_name(layer, name)
        ratio = float(edited.norm()) / norm if norm else 0.0
        if ratio > COLLAPSE:
            grown[key] = ratio
    rounded = max(lost, key=lost.__getitem__, default="")
    if rounded and lost[rounded] > LOST:
        wider = "load the model with dtype='float32', or " if lens.dtype.itemsize < 4 else ""
        warnings.warn(
            f"{lost[rounded]:.0%} of the edit of {rounded} is lost to rounding: the delta is smaller "
            f"than what {dtype_name(lens.dtype)} can tell apart there. To keep it, "
            f"{wider}raise the editor's lr.",
            stacklevel=3,
        )
    if grown:
        worst = max(grown, key=grown.__getitem__)
        warnings.warn(
            f"||W'|| / ||W|| of {worst} is {grown[worst]:.2f}: edits of this size usually ruin a "
            "model. Raise lam (where the editor has one), or lower clamp, lr or steps; metrics of "
            "unrelated facts show the damage.",
            stacklevel=3,
        )
    conv1d = {"conv1d": True} if lens.backend_adapter.conv1d else {}
    return {"relative_norm": relative, "rounding_error": lost, "modules": modules, **conv1d}


def checked_texts(texts: Sequence[str]) -> list[str]:
    """Texts to measure on. Raises `EditError` for a single string, which would be read letter by
    letter."""
    values = several(texts)
    if values is None:
        raise EditError(f"held_out= takes several texts, got {texts!r:.60}: pass a list.")
    return list(values)


def check_statistics(lens: Lens, editor: Any, statistics: object) -> None:
    """Raise `EditError`, before anything is searched, for statistics that are not `Statistics`, or
    that are absent although the editor reads them."""
    if statistics is not None and not isinstance(statistics, Statistics):
        raise EditError(
            "statistics= takes what covariance() gives or Statistics.load(folder), got "
            f"{statistics!r:.100}."
        )
    if statistics is not None and statistics.fingerprint != lens.fingerprint:
        statistics.of(lens, 0)
    if statistics is None and reads_statistics(editor):
        raise EditError(f"{type(editor).__name__} {MISSING}")


def check_deltas(lens: Lens, editor: object, deltas: object) -> None:
    """Raise `EditError` unless an editor gave deltas by weight, each in the shape of its weight."""
    name = type(editor).__name__
    if not isinstance(deltas, dict):
        raise EditError(
            f"{name}.deltas(job) must give {{(layer, 'W_out'): Delta}}, got {deltas!r:.100}."
        )
    for key, delta in deltas.items():
        if not isinstance(delta, Delta):
            raise EditError(
                f"{name}.deltas(job) must give qv_lens.patch.Delta, got {type(delta).__name__} for "
                f"{key}."
            )
        shape = tuple(lens.parameter(*key).shape)
        if tuple(delta.shape) != shape:
            raise EditError(
                f"{name}.deltas(job) gives {tuple(delta.shape)} for {key}; the weight is {shape}."
            )


def _info(job: Job, editor: Any) -> dict[str, Any]:
    statistics = job.statistics
    return plain(
        {
            "model": job.lens.name,
            "dtype": dtype_name(job.lens.dtype),
            "backend": job.lens.backend,
            "method": type(editor).__name__,
            "hyperparameters": asdict(editor),
            "facts": [
                {
                    "prompt": r.fact.prompt,
                    "subject": r.fact.subject,
                    "old": r.fact.answer,
                    "new": r.new,
                }
                for r in job.requests
            ],
            "contexts": list(job.used),
            "seed": job.seed,
            "batch_size": job.batch_size,
            # what was in force: the edit was made for the model as it then was
            "on": [patch.info.get("method") for patch in job.lens.patches],
            "under": [type(intervention).__name__ for intervention in job.lens.interventions],
            "statistics": None
            if statistics is None
            else {"corpus": statistics.corpus, "tokens": statistics.tokens},
            "versions": versions(),
            "losses": job.losses,
            **job.notes,
        }
    )


def plain(value: Any) -> Any:
    """As JSON gives it back: sequences as lists, numbers of numpy and torch as Python's."""
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, (np.ndarray, np.generic, Tensor)):
        return plain(value.tolist())
    if isinstance(value, (tuple, list, range, set, frozenset)):
        return [plain(inner) for inner in value]
    return value
