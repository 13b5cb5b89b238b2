"""NAS: the length of what MEMIT's search makes an FFN write, on the unedited model.

1. MEMIT's search of v*, one fact at a time, on the bare prompt alone (and the KL prompt).
2. Of each, ||v||: v is the FFN's part, v0 + delta (`targets.ffn_part`).
3. The largest twentieth is left out; mu is the mean of the others.

With `anchor=mu` every closed form scales the v of its own search to this length. Source: NAS (2025,
released code): there mu is measured over 1,000 facts of CounterFact."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from qv_lens.editing.job import check_editor
from qv_lens.editing.keys import read, rows_of, values
from qv_lens.editing.layer_by_layer import ClosedForm
from qv_lens.editing.presets import editor_of
from qv_lens.editing.statistics import check_untouched
from qv_lens.editing.targets import ffn_part, search
from qv_lens.errors import EditError
from qv_lens.facts.records import EditRequest
from qv_lens.models.lens import Lens, check_lens

#: facts searched together, and the share of the longest that is left out
TOGETHER, LONGEST = 16, 0.05


def norm_anchor(
    lens: Lens,
    requests: Sequence[EditRequest] | EditRequest,
    editor: ClosedForm | str = "MEMIT",
) -> float:
    """mu of NAS, for `anchor=` of an editor whose z* lies at the same layer.

    `editor`: whose search is run, by default the model's preset of MEMIT. The release takes 1,000
    requests of CounterFact.
    Raises `EditError` for no request, an editor that searches no z*, or a lens that is not the
    unedited model: with patches, interventions or hooks, or written to since it was wrapped.
    """
    check_lens(lens)
    wanted = [requests] if isinstance(requests, EditRequest) else list(requests)
    if not wanted:
        raise EditError("There is nothing to measure: pass at least one EditRequest.")
    check_untouched(lens, "The anchor, of the unedited model, is measured")
    chosen = editor_of(lens, editor)
    check_editor(chosen)
    if not isinstance(chosen, ClosedForm):
        raise EditError(f"The anchor is that of a search of z*; {type(chosen).__name__} has none.")
    kind = chosen.first_search(lens)
    lengths: list[Tensor] = []
    distinct, settings = list(dict.fromkeys(wanted)), replace(kind.search, anchor=0.0)
    for begin in range(0, len(distinct), TOGETHER):
        some = distinct[begin : begin + TOGETHER]
        rows = rows_of(lens, some, ("{}",), kind.token, kind.prompts)
        targets = search(lens, some, rows, kind.token, settings)
        layer = settings.z_layer
        with torch.no_grad():
            start = (layer, lens.stream(rows.heads, layer))
            site = settings.sites[0]
            init = values(rows, read(lens, rows, (site,), start, layer + 1)[site], False)
            v0 = ffn_part(lens, rows, settings, start)
        lengths.append((targets.z - init.double() + v0.double()).norm(dim=1))
    ordered = torch.cat(lengths).sort().values
    return float(ordered[: len(ordered) - int(LONGEST * len(ordered))].mean())
