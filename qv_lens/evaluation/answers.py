"""What a model answers: everything the metrics are computed from.

1. `look` asks the `questions` of many cases at once, teacher-forced: per probe the argmax at each
   answer token and the answer's mean log-probability. Sorted by length and batched; the numbers do
   not depend on the batch.
2. The model also continues prompts: the edited prompts, their paraphrases, neighbours, multi-hop
   questions after worked examples, prompts for fluency.
"""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Collection, Sequence
from dataclasses import replace

import torch

from qv_lens.errors import FactError
from qv_lens.evaluation.metrics import mean
from qv_lens.evaluation.questions import (
    RUNS_ON,
    WRITTEN,
    CaseAnswers,
    Generation,
    ProbeAnswer,
    questions,
)
from qv_lens.facts.prompts import answered, cot_prompt
from qv_lens.facts.records import Asked, Case, MultiHopCase
from qv_lens.facts.spans import continuation
from qv_lens.models.lens import Lens, log_probs


@torch.no_grad()
def tell(lens: Lens, probes: Sequence[Asked], batch_size: int = 64) -> list[ProbeAnswer]:
    """What the model makes of each probe, in the order given."""
    texts = [probe.text for probe in probes]
    prompts = lens.tokenize(texts) if texts else []
    prompts = [
        replace(
            p,
            answer=continuation(
                lens.tokenizer, p.text, probe.answer, lens.prepend_bos, probe.space
            ),
        )
        for p, probe in zip(prompts, probes, strict=True)
    ]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i].row("answer")))
    by_place: dict[int, ProbeAnswer] = {}
    for at in range(0, len(order), batch_size):
        chunk = order[at : at + batch_size]
        ids = torch.tensor(
            [token for i in chunk for token in prompts[i].answer], device=lens.device
        )
        logp = log_probs(lens.answer_logits([prompts[i] for i in chunk]))
        tokens, each = logp.argmax(-1).tolist(), logp.gather(1, ids[:, None])[:, 0].tolist()
        for i in chunk:
            n = len(prompts[i].answer)
            by_place[i] = ProbeAnswer(tuple(tokens[:n]), prompts[i].answer, sum(each[:n]) / n)
            tokens, each = tokens[n:], each[n:]
    return [by_place[i] for i in range(len(prompts))]


def correct(lens: Lens, probes: Sequence[Asked]) -> list[bool]:
    """Whether each answer is the argmax at every one of its tokens."""
    return [answer.right for answer in tell(lens, probes)]


def accuracy(lens: Lens, probes: Sequence[Asked]) -> float:
    """Share of probes answered right; NaN for none."""
    return mean(correct(lens, probes))


def look(
    lens: Lens,
    cases: Sequence[Case],
    generation: Generation | None = None,
    beginning: Collection[str] = ("",),
) -> list[CaseAnswers]:
    """What a model says of every case, on the weights as they now are: to the `questions` whose
    groups begin so."""
    generation = generation or Generation()
    asked_groups = [questions(case, beginning) for case in cases]
    probes_of = [probes for groups in asked_groups for probes in groups.values()]
    answers = iter(tell(lens, list(itertools.chain.from_iterable(probes_of))))
    looks = [
        {name: tuple(next(answers) for _ in probes) for name, probes in groups.items()}
        for groups in asked_groups
    ]
    texts: list[dict[str, tuple[str, ...]]] = [{} for _ in cases]
    for kind in generation.kinds:
        prompts = [prompts_of(case, kind, generation) for case in cases]
        lengths = [_length(lens, case, kind, generation) for case in cases]
        for tokens in sorted(set(lengths)):
            alike = [i for i, length in enumerate(lengths) if length == tokens]
            asked_now = [prompt for i in alike for prompt in prompts[i]]
            continuations = iter(_continued(lens, asked_now, kind, tokens, generation))
            for i in alike:
                texts[i][kind] = tuple(next(continuations) for _ in prompts[i])
    return [CaseAnswers(groups, written) for groups, written in zip(looks, texts, strict=True)]


def answer_length(lens: Lens, question: Asked | str, names: Sequence[str]) -> int:
    """Tokens of a continuation that tell whether one of the names is there: the longest's, and one
    more to see where its last word ends. A name that cannot follow the prompt has none."""
    longest = 0
    for name in names:
        with contextlib.suppress(FactError):
            longest = max(longest, len(lens.answer_ids(question, name)))
    return longest + 1


def _length(lens: Lens, case: Case, kind: str, generation: Generation) -> int:
    """Tokens to which the prompts of a case are continued."""
    if kind == "fluency":
        return generation.fluency_tokens
    if kind == "cot":
        return generation.thought_tokens
    if kind.endswith("_whole"):
        return generation.whole_tokens
    lengths = [answer_length(lens, question, names) for question, names in _wanted(case, kind)]
    return max([generation.answer_tokens, *lengths])


def _wanted(case: Case, kind: str) -> list[tuple[Asked | str, tuple[str, ...]]]:
    """What is looked for in continuations of a kind: the names that count, before or after the
    edit, of each prompt."""
    if kind == "direct":
        if not isinstance(case, MultiHopCase):
            return []
        names = (case.answer, *case.aliases, case.new_answer, *case.new_aliases)
        return [(question, names) for question in case.questions]
    groups = ("onward_old", "onward_new") if kind == "onward" else (WRITTEN[kind],)
    probes = questions(case)
    return [
        (probe, (probe.answer, *probe.aliases)) for name in groups for probe in probes.get(name, ())
    ]


def prompts_of(case: Case, kind: str, generation: Generation) -> list[str]:
    """The prompts of one kind of continuation: those of `WRITTEN`, 'cot', 'direct' or 'fluency'."""
    if kind in WRITTEN:
        return [probe.text for probe in questions(case).get(WRITTEN[kind], ())]
    if isinstance(case, MultiHopCase):
        if kind == "cot":
            return [cot_prompt(question, generation.blocks) for question in case.questions]
        return list(case.questions) if kind == "direct" else []
    return list(case.generation) if kind == "fluency" else []


def _continued(
    lens: Lens, prompts: Sequence[str], kind: str, tokens: int, generation: Generation
) -> list[str]:
    if not prompts:
        return []
    if kind == "fluency":
        return lens.generate(list(prompts), tokens, top_k=generation.top_k, seed=generation.seed)
    if kind.endswith("_whole"):
        return lens.generate(list(prompts), tokens, runs_on=RUNS_ON)
    return lens.generate(list(prompts), tokens, enough=answered if kind == "cot" else None)


def greedy_answers(lens: Lens, prompts: Sequence[Asked], *others: str, least: int = 8) -> list[str]:
    """The greedy continuations of prompts, long enough for each one's answer and any of `others`;
    at least so many tokens."""
    lengths = [answer_length(lens, each, (*_own_names(each), *others)) for each in prompts]
    return lens.generate([each.text for each in prompts], max([least, *lengths]))


def _own_names(question: Asked) -> tuple[str, ...]:
    return question.answer, *question.aliases


def first_sentences(lens: Lens, probes: Sequence[Asked], *others: str) -> list[str]:
    """`greedy_answers` up to their first full stop or line; a full stop within an answer, or any of
    `others`, ends no sentence."""
    texts = greedy_answers(lens, probes, *others)
    return [
        _first_sentence(text, (*_own_names(probe), *others))
        for probe, text in zip(probes, texts, strict=True)
    ]


def _first_sentence(text: str, names: Sequence[str]) -> str:
    line = text.strip().split("\n")[0]
    within = {
        place
        for name in names
        for match in re.finditer(re.escape(name), line)
        for place in range(*match.span())
    }
    stops = (match.start() for match in re.finditer(r"\.(?!\w)", line))
    return line[: next((at for at in stops if at not in within), len(line))].strip()
