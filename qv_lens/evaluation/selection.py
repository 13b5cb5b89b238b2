"""Which metrics fit which cases, and what is asked for them."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Literal, TypeVar

from qv_lens.errors import ConfigError, EditError, FactError, one_or_more
from qv_lens.evaluation.answers import prompts_of
from qv_lens.evaluation.metrics import FORCED, GENERATED, JUDGED, NAMED, measured
from qv_lens.evaluation.questions import CaseAnswers, Generation, ProbeAnswer, questions
from qv_lens.facts.records import Asked, Case, EditCase, MultiHopCase
from qv_lens.facts.spans import encode
from qv_lens.models.lens import Lens

#: what is wrong with one case alone, so that the others are asked
OF_ONE_CASE = (EditError, FactError)
Protocol = Literal["single", "batch", "consecutive"]
PROTOCOLS = ("single", "batch", "consecutive")
#: measured where no metric is named: what the model says, then what it is likely to say
DEFAULT = (
    "efficacy_gen", "paraphrase_gen", "specificity_gen", "multihop_gen", "multihop_known", *FORCED,
)  # fmt: skip

_C = TypeVar("_C", bound=Case)


def checked_cases(verb: str, cases: Iterable[Case], kinds: tuple[type[_C], ...]) -> list[_C]:
    """The cases as a list. Raises `ConfigError` for an empty list, a single case, or a case of a
    kind that the verb does not take."""
    if isinstance(cases, (EditCase, MultiHopCase)):
        raise ConfigError(f"{verb} takes several cases: pass a list, [case].")
    every = one_or_more(cases)
    if not every:
        raise ConfigError(
            f"There is nothing to {verb}: pass at least one case. (A file of plain facts holds no "
            "cases: give its facts new answers, qv.EditCase(fact.to('new answer')).)"
        )
    known = [case for case in every if isinstance(case, kinds)]
    if len(known) < len(every):
        other = next(case for case in every if not isinstance(case, kinds))
        if isinstance(other, MultiHopCase):
            raise ConfigError(
                f"{verb} takes cases of one fact each (EditCase), got the chain {other!r:.100}: "
                "evaluate(..., protocol='consecutive') takes chains."
            )
        raise ConfigError(
            f"{verb} takes cases (qv.EditCase(fact.to('new answer')), or what read() gives as "
            f".cases), got {other!r:.100}."
        )
    return known


def groups_of(wanted: Sequence[str]) -> list[str]:
    """The groups of probes that the metrics read."""
    forced = {**FORCED, **NAMED}
    return sorted({group for name in wanted if name in forced for group in forced[name][0]})


def unreadable(lens: Lens, case: Case, groups: Sequence[str]) -> str | None:
    """Why a case cannot be asked: one of its probes does not tokenise. None where all do."""
    try:
        for probes in questions(case, groups).values():
            for probe in probes:
                _check_room(lens, probe)
        lens.tokenize([request.target for request in case.requests])
    except FactError as error:
        return str(error)
    return None


def _check_room(lens: Lens, probe: Asked) -> None:
    """Raise `FactError` for a prompt that does not tokenise, or leaves its answer no room."""
    answer, context = lens.answer_ids(probe), lens.backend_adapter.cfg.n_ctx
    length = len(encode(lens.tokenizer, probe.text, lens.prepend_bos)[0])
    if length + len(answer) > context:
        raise FactError(
            f"The prompt {probe.text!r:.200} has {length} tokens and its answer {len(answer)}, and the "
            f"model takes {context}: shorten it."
        )


def warn_of_skipped(place: int, reason: str) -> None:
    """Say why the first case is left out, while there is time to stop."""
    warnings.warn(
        f"Case {place} is left out: {reason} If others are, .attrs['skipped'] of the frame says why.",
        stacklevel=3,
    )


def continued(generation: Generation | None, wanted: Sequence[str], seed: int) -> Generation:
    """The settings of the continuations, and which of them the metrics read."""
    kinds = dict.fromkeys(kind for name in wanted if (kind := kind_of(name)))
    return replace(generation or Generation(), kinds=tuple(kinds), seed=seed)


def kind_of(name: str) -> str | None:
    """The continuations that a metric reads."""
    return GENERATED[name][0] if name in GENERATED else JUDGED.get(name)


def fitting(cases: Sequence[Case], names: Iterable[str]) -> list[str]:
    """Those of the named metrics that at least one of the cases holds prompts for: what would not
    be NaN."""
    metric_names = list(names)
    kinds = {GENERATED[name][0] for name in metric_names if name in GENERATED}
    groups = groups_of(metric_names)
    # whether a metric has a value depends on the questions alone, where the model knows the answers
    any_answer = ProbeAnswer((0,), (0,), 0.0)
    fits: set[str] = set()
    for case in cases:
        texts = {
            kind: tuple("a b c" for _ in prompts_of(case, kind, Generation())) for kind in kinds
        }
        if "onward" in kinds:
            texts["onward"] = tuple(old.answer for old in questions(case).get("onward_old", ()))
        anything = CaseAnswers(
            {
                group: (any_answer,) * len(probes)
                for group, probes in questions(case, groups).items()
            },
            texts,
        )
        for edited in (False, True):
            values = measured(case, metric_names, anything, anything, edited)
            fits.update(name for name in metric_names if values[name] == values[name])
    return [name for name in metric_names if name in fits]


def usual_metrics(cases: Sequence[Case]) -> list[str]:
    """What the command measures where no metric is named: the default, and what takes longer
    texts."""
    if isinstance(cases[0], MultiHopCase):
        return fitting(cases, (*DEFAULT, "multihop_direct", "multihop_cot", "multihop_cot_rate"))
    return fitting(cases, (*DEFAULT, "fluency"))


def usual_count(protocol: Protocol, batch_size: int = 32) -> int:
    """How many cases a protocol is about where no number is named."""
    return {"batch": batch_size, "consecutive": 100}.get(protocol, 34)
