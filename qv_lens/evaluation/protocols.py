"""evaluate(): what a model answers before and after each edit, one at a time, weights put back in between.

Per case: edit, probe, revert. The metrics are those of `editing.md` section 7:
`efficacy` the edited prompt, `paraphrase` the same fact in other words, `specificity` other facts, `multihop` prompts
over the edited fact, answered directly.
"""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
from tqdm import tqdm

from qv_lens.editing.edit import Editor, edit
from qv_lens.editing.statistics import Statistics
from qv_lens.evaluation.metrics import correct, mean_logprob
from qv_lens.facts.records import EditCase
from qv_lens.models.lens import Lens

METRICS = ("efficacy_acc", "efficacy_success", "paraphrase_acc", "specificity_acc", "multihop_acc")


def evaluate(
    lens: Lens, cases: Sequence[EditCase], editor: Editor, *, statistics: Statistics | None = None, seed: int = 0
) -> pd.DataFrame:
    """One row per case and metric: `case, subject, metric, before, after`, shares from 0 to 1 (NaN: nothing to ask), and
    `relative_norm`, the largest ||dW|| / ||W|| of the weights that the case's edit wrote.

    For `multihop_acc`, `before` counts the old answers on the unedited model, `after` the new ones on the edited.
    """
    rows = []
    for number, case in enumerate(tqdm(cases, desc=f"evaluate {type(editor).__name__}", unit="case", delay=2, leave=False)):
        before = probe(lens, case, edited=False)
        patch = edit(lens, case.request, editor, statistics=statistics, seed=seed)
        with lens.patched(patch):
            after = probe(lens, case, edited=True)
        largest = max(patch.info["relative_norm"].values(), default=0.0)
        rows += [(number, case.request.fact.subject, metric, before[metric], after[metric], largest) for metric in METRICS]
    frame = pd.DataFrame(rows, columns=["case", "subject", "metric", "before", "after", "relative_norm"])
    frame.attrs.update({"model": lens.name, "backend": lens.backend, "editor": repr(editor), "protocol": "single", "seed": seed})
    return frame


def probe(lens: Lens, case: EditCase, edited: bool) -> dict[str, float]:
    """Every metric of one case on the model as it now is; `edited` says which chain answers count."""
    fact, target = case.request.fact, case.request.target
    onward = [pair[edited] for pair in case.onward]
    groups = [[target], list(case.paraphrases), list(case.neighbours), onward]
    hits = correct(lens, [asked for group in groups for asked in group])
    shares = []
    for group in groups:
        taken, hits = hits[: len(group)], hits[len(group) :]
        shares.append(sum(taken) / len(taken) if taken else float("nan"))
    new, old = mean_logprob(lens, [target, fact])
    return dict(zip(METRICS, (shares[0], float(new > old), *shares[1:]), strict=True))


def summary(frame: pd.DataFrame) -> pd.DataFrame:
    """Means over the cases with 95% intervals (1.96 standard errors): `metric, before, after, interval, cases`, and the largest `relative_norm`."""
    by = frame.groupby("metric", sort=False)
    out = by[["before", "after"]].mean()
    out["interval"] = 1.96 * by["after"].std(ddof=1) / by["after"].count() ** 0.5
    out["cases"] = by["after"].count()
    out["relative_norm"] = by["relative_norm"].max()
    return out.reset_index()
