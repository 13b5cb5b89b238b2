"""What is counted: pure functions of what a model told before and after an edit. Shares from 0 to
1, NaN: nothing to ask.

    efficacy       the edited prompt gives the new answer         `_acc`      the answer is the argmax at each of its tokens
    paraphrase     so it does in other words                      `_success`  the right answer is likelier than the other one
    specificity    neighbours keep their own answer                           (mean log-probability of their tokens)
    multihop       prompts over the edited fact                   `_gen`      the greedy continuation begins with the answer
                                                                  `_exact`    the whole of it (to the end of text, or 40
                                                                              tokens) is the answer and nothing more
                                                                  `_contains` it holds the answer somewhere
                                                                  `_judged`   what `judge` says of it

    edit_success   share of the new answer's tokens that are the argmax; `generality`: the same in other words (ZsRE, KnowEdit)
    portability    mean over its groups of that share; locality: share of tokens whose argmax is what it was (KnowEdit)
    instance_wise  all hops of the new chain are right (MQuAKE); its edit-wise accuracy is efficacy_acc
    multihop_gen   of the multi-hop prompts that the unedited model continued with the old answer, the share that is now
                   continued with the new one; `multihop_known`: of all of them, the share that was
    multihop_cot   any of a case's questions is answered right after worked examples; `_cot_rate`: share of the questions
    fluency        mean of 2/3 H2 and 4/3 H3, entropies in bits of word n-grams of the prompt and 100 more tokens (ROME:
                   100 tokens with the prompt; longer texts have more entropy; papers print it times
                   100)
    denied_acc     behind "It is not true that" the new answer is not given
    reversal_acc   asked from the new answer, the subject is given ("Rome is the capital of"), where the relation allows it
    overfit_*      probability of the new answer where it does not belong: after the subject `alone`, after other relations of
                   the subject (`relation`), after neighbours with the edit in front (`neighbour`)
    distracted_acc neighbours keep their answer with the edit in front; `_success`: it is likelier than the new one (CounterFact+)
    ctp_score      mean of edit_success, generality and `ctp_locality`: that of neighbours and the groups of locality (CTP, EasyEdit)

Aliases count in continuations (`_gen`, `_cot`, `multihop_direct`), not under teacher forcing, which
asks for one answer's tokens. `evaluate(held_out=)` adds the perplexity of ordinary text. Teacher
forcing flatters: an answer counted by `_acc` need not be what
the model would write; `_gen` tells."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from math import exp, log2, nan
from numbers import Real
from types import MappingProxyType

import numpy as np
from scipy.stats import hmean

from qv_lens.errors import ConfigError, unknown
from qv_lens.evaluation.questions import RUNS_ON, WRITTEN, CaseAnswers, ProbeAnswer, questions
from qv_lens.facts.prompts import begins, contains, matches, parse_answer
from qv_lens.facts.records import Case, MultiHopCase, Probe

#: (case, the model's answers, its answers before the edit, whether it is edited) -> value
Metric = Callable[[Case, CaseAnswers, CaseAnswers, bool], float]


def mean(values: Sequence[float | bool]) -> float:
    """The mean; NaN of nothing."""
    return sum(values) / len(values) if values else nan


def harmonic(values: Sequence[float]) -> float:
    """The harmonic mean; 0 if any value is (CounterFact's score), NaN if any is not there."""
    return float(hmean(values)) if len(values) else nan


def ngram_entropy(text: str) -> float:
    """Mean of 2/3 H2 and 4/3 H3: entropies in bits of the text's word bigrams and trigrams; NaN for
    under three words."""
    words = re.findall(r"\w+|[^\w\s]", text)
    if len(words) < 3:
        return nan
    return (2 / 3 * _entropy(words, 2) + 4 / 3 * _entropy(words, 3)) / 2


def _entropy(words: Sequence[str], n: int) -> float:
    counts = Counter(zip(*(words[i:] for i in range(n)), strict=False))
    total = sum(counts.values())
    return -sum(c / total * log2(c / total) for c in counts.values())


def _mean_share(answers: Sequence[ProbeAnswer]) -> float:
    return mean([answer.share for answer in answers])


def _share(group: str) -> Metric:
    return lambda case, now, before, edited: _mean_share(now[group])


def _right(group: str) -> Metric:
    return lambda case, now, before, edited: mean([answer.right for answer in now[group]])


def _not_right(group: str) -> Metric:
    return lambda case, now, before, edited: mean([not answer.right for answer in now[group]])


def _probability(group: str) -> Metric:
    """The answers' probabilities: products over their tokens."""
    return lambda case, now, before, edited: mean(
        [exp(answer.logprob * len(answer.asked)) for answer in now[group]]
    )


def _likelier(group: str, other: str) -> Metric:
    def metric(case: Case, now: CaseAnswers, before: CaseAnswers, edited: bool) -> float:
        if len(now[group]) != len(now[other]):
            return nan
        return mean([a.logprob > b.logprob for a, b in zip(now[group], now[other], strict=True)])

    return metric


def _of_chain(case: Case, now: CaseAnswers, before: CaseAnswers, edited: bool) -> float:
    return mean([answer.right for answer in now["onward_new" if edited else "onward_old"]])


def _instance(case: Case, now: CaseAnswers, before: CaseAnswers, edited: bool) -> float:
    answers = now["hops_new" if edited else "hops_old"]
    return float(all(t.right for t in answers)) if answers else nan


def _locality(names: Callable[[CaseAnswers], list[str]]) -> Metric:
    return lambda case, now, before, edited: mean(
        [_same(now[name], before[name]) for name in names(now) if now[name]]
    )


def _same(now: Sequence[ProbeAnswer], before: Sequence[ProbeAnswer]) -> float:
    """Share of tokens whose argmax is what it was, the mean over the probes."""
    return mean(
        [
            mean([a == b for a, b in zip(answer.said, was.said, strict=True)])
            for answer, was in zip(now, before, strict=True)
        ]
    )


def _groups(prefix: str) -> Callable[[CaseAnswers], list[str]]:
    return lambda look: [name for name in look.told if name.startswith(prefix)]


def _portability(case: Case, now: CaseAnswers, before: CaseAnswers, edited: bool) -> float:
    return mean([_mean_share(now[name]) for name in _groups("portability_")(now)])


def _continuations(kind: str, says: Callable[[str, Sequence[str]], bool]) -> Metric:
    """Of the continuations of a kind: the share of which `says` so."""

    def metric(case: Case, now: CaseAnswers, before: CaseAnswers, edited: bool) -> float:
        return mean(
            [says(text, [probe.answer, *probe.aliases]) for text, probe in _said(case, now, kind)]
        )

    return metric


def _exactly(text: str, accepted: Sequence[str]) -> bool:
    """Whether a continuation is one of the answers and ends there: blanks and full stops that run on
    are no end of text."""
    return not text.endswith(RUNS_ON) and matches(text, accepted)


def _said(case: Case, now: CaseAnswers, kind: str) -> list[tuple[str, Probe]]:
    """The continuations of a kind, each with what was asked."""
    probes = questions(case).get(WRITTEN[kind], ())
    return list(zip(now.texts.get(kind, ()), probes, strict=False))


def _accepted(case: MultiHopCase, edited: bool) -> list[str]:
    return [case.new_answer, *case.new_aliases] if edited else [case.answer, *case.aliases]


def _thoughts(any_of: bool) -> Metric:
    def metric(case: Case, now: CaseAnswers, before: CaseAnswers, edited: bool) -> float:
        if not isinstance(case, MultiHopCase) or not now.texts.get("cot"):
            return nan
        hits = [matches(parse_answer(text), _accepted(case, edited)) for text in now.texts["cot"]]
        return float(any(hits)) if any_of else mean(hits)

    return metric


def _directly(case: Case, now: CaseAnswers, before: CaseAnswers, edited: bool) -> float:
    if not isinstance(case, MultiHopCase) or not now.texts.get("direct"):
        return nan
    return float(any(begins(text, _accepted(case, edited)) for text in now.texts["direct"]))


def _onward(case: Case, before: CaseAnswers) -> list[int]:
    """Which multi-hop prompts the unedited model continued with the old answer."""
    probes = questions(case).get("onward_old", ())
    answered = zip(before.texts.get("onward", ()), probes, strict=False)
    return [i for i, (text, old) in enumerate(answered) if begins(text, [old.answer, *old.aliases])]


def _hopped(case: Case, now: CaseAnswers, before: CaseAnswers, edited: bool) -> float:
    probes = questions(case).get("onward_new" if edited else "onward_old", ())
    texts = now.texts.get("onward", ())
    known = [i for i in _onward(case, before) if i < len(texts)]
    return mean([begins(texts[i], [probes[i].answer, *probes[i].aliases]) for i in known])


def _hops_known(case: Case, now: CaseAnswers, before: CaseAnswers, edited: bool) -> float:
    probes = before.texts.get("onward", ())
    return len(_onward(case, before)) / len(probes) if probes else nan


def _fluency(case: Case, now: CaseAnswers, before: CaseAnswers, edited: bool) -> float:
    entropies = [
        ngram_entropy(prompt + text)
        for prompt, text in zip(_prompts_of(case), now.texts.get("fluency", ()), strict=False)
    ]
    return mean([value for value in entropies if value == value])


def _prompts_of(case: Case) -> tuple[str, ...]:
    return () if isinstance(case, MultiHopCase) else case.generation


def _kept(case: Case, now: CaseAnswers, before: CaseAnswers, edited: bool) -> float:
    near = [name for name in ("near_old", *_groups("locality_")(now)) if now[name]]
    return mean([_same(now[name], before[name]) for name in near])


def _ctp(case: Case, now: CaseAnswers, before: CaseAnswers, edited: bool) -> float:
    efficacy = _mean_share(now["rewrite_new"])
    generality = _mean_share(now["paraphrase_new"])
    return mean([efficacy, generality, _kept(case, now, before, edited)])


#: teacher-forced metrics: the groups of probes that each reads (beginnings of their names), and the
#: metric
FORCED: Mapping[str, tuple[tuple[str, ...], Metric]] = MappingProxyType({
    "efficacy_acc": (("rewrite_new",), _right("rewrite_new")),
    "efficacy_success": (("rewrite_",), _likelier("rewrite_new", "rewrite_old")),
    "edit_success": (("rewrite_new",), _share("rewrite_new")),
    "generality": (("paraphrase_new",), _share("paraphrase_new")),
    "paraphrase_acc": (("paraphrase_new",), _right("paraphrase_new")),
    "paraphrase_success": (("paraphrase_",), _likelier("paraphrase_new", "paraphrase_old")),
    "specificity_acc": (("near_old",), _right("near_old")),
    "specificity_success": (("rival_",), _likelier("rival_old", "rival_new")),
    "multihop_acc": (("onward_",), _of_chain),
    "instance_wise": (("hops_",), _instance),
    "portability": (("portability_",), _portability),
    "locality": (("locality_",), _locality(_groups("locality_"))),
    "ctp_locality": (("near_old", "locality_"), _kept),
    "ctp_score": (("rewrite_new", "paraphrase_new", "near_old", "locality_"), _ctp),
})  # fmt: skip
#: teacher-forced metrics that are measured only where they are named
NAMED: Mapping[str, tuple[tuple[str, ...], Metric]] = MappingProxyType({
    "denied_acc": (("denied_new",), _not_right("denied_new")),
    "reversal_acc": (("reversed_new",), _right("reversed_new")),
    "overfit_alone": (("alone_new",), _probability("alone_new")),
    "overfit_relation": (("unrelated_new",), _probability("unrelated_new")),
    "overfit_neighbour": (("distracted_new",), _probability("distracted_new")),
    "distracted_acc": (("distracted_old",), _right("distracted_old")),
    "distracted_success": (("distracted_",), _likelier("distracted_old", "distracted_new")),
})  # fmt: skip
#: metrics that read continuations, and which kind
GENERATED: Mapping[str, tuple[str, Metric]] = MappingProxyType({
    "efficacy_gen": ("rewrite", _continuations("rewrite", begins)), "paraphrase_gen": ("paraphrase", _continuations("paraphrase", begins)),
    "specificity_gen": ("near", _continuations("near", begins)), "multihop_cot": ("cot", _thoughts(True)), "multihop_cot_rate": ("cot", _thoughts(False)),
    "multihop_direct": ("direct", _directly), "multihop_gen": ("onward", _hopped), "multihop_known": ("onward", _hops_known), "fluency": ("fluency", _fluency),
    "efficacy_exact": ("rewrite_whole", _continuations("rewrite_whole", _exactly)),
    "paraphrase_exact": ("paraphrase_whole", _continuations("paraphrase_whole", _exactly)),
    "specificity_exact": ("near_whole", _continuations("near_whole", _exactly)),
    "efficacy_contains": ("rewrite_whole", _continuations("rewrite_whole", contains)),
    "paraphrase_contains": ("paraphrase_whole", _continuations("paraphrase_whole", contains)),
    "specificity_contains": ("near_whole", _continuations("near_whole", contains)),
})  # fmt: skip
#: what a model or a person says of a continuation: (prompt, continuation, accepted answers) -> a
#: value from 0 to 1
Judge = Callable[[str, str, Sequence[str]], float]
#: metrics of a judge, and which continuations it is shown
JUDGED: Mapping[str, str] = MappingProxyType({
    "efficacy_judged": "rewrite_whole", "paraphrase_judged": "paraphrase_whole", "specificity_judged": "near_whole",
})  # fmt: skip


def _judgement(case: Case, now: CaseAnswers, kind: str, judge: Judge | None) -> float:
    if judge is None:
        return nan
    return mean(
        [
            _judged(judge, probe, text.removesuffix(RUNS_ON))
            for text, probe in _said(case, now, kind)
        ]
    )


def _judged(judge: Judge, probe: Probe, text: str) -> float:
    """What a judge says of one continuation. Raises `ConfigError` for what is not a number from 0 to
    1."""
    value = judge(probe.text, text, [probe.answer, *probe.aliases])
    if not isinstance(value, (Real, np.bool_)) or not 0 <= float(value) <= 1:
        raise ConfigError(
            f"judge gives a number from 0 to 1 (or True, False); of {text!r:.200} after "
            f"{probe.text!r:.200} it gave {value!r:.80}."
        )
    return float(value)


def measured(
    case: Case,
    names: Sequence[str],
    now: CaseAnswers,
    before: CaseAnswers,
    edited: bool,
    judge: Judge | None = None,
) -> dict[str, float]:
    """The named metrics, and portability and locality by group."""
    table = {
        name: metric for name, (_, metric) in (*FORCED.items(), *NAMED.items(), *GENERATED.items())
    }
    values = {
        name: table[name](case, now, before, edited)
        if name in table
        else _judgement(case, now, JUDGED[name], judge)
        for name in names
    }
    if "portability" in names:
        values.update({name: _mean_share(now[name]) for name in _groups("portability_")(now)})
    if "locality" in names:
        values.update({name: _same(now[name], before[name]) for name in _groups("locality_")(now)})
    return values


def check_metrics(metrics: Sequence[str] | None, judge: Judge | None = None) -> None:
    """Raise `ConfigError` for what is not a list of metrics' names, or a judged one without a
    judge."""
    if metrics is not None and (isinstance(metrics, str) or not isinstance(metrics, Sequence)):
        raise ConfigError(
            f"metrics must be a list of names, got {metrics!r}. An editor is passed as editor=."
        )
    for name in metrics or ():
        if not any(name in table for table in (FORCED, NAMED, GENERATED, JUDGED)):
            raise unknown("Metric", name, [*FORCED, *NAMED, *GENERATED, *JUDGED])
        if name in JUDGED and not callable(judge):
            raise ConfigError(
                f"{name} needs judge= (of evaluate), a function of prompt, continuation and accepted "
                f"answers; got {judge!r:.80}."
            )
