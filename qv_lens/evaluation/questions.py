"""What is asked of a model about a case, and the records of what it answers.

`questions` turns a case into named groups of probes: the edited prompt with the new and with the
old answer, the same in other words, neighbours, multi-hop prompts, hops, portability and locality.
Where they are asked for by name, also what the edit must not change or should imply: the prompt
denied, the subject alone and in other relations, neighbours with the edit in front, the fact the
other way round."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from types import MappingProxyType

from qv_lens.facts import relations
from qv_lens.facts.prompts import matches
from qv_lens.facts.records import (
    UNKNOWN,
    Asked,
    Case,
    EditCase,
    EditRequest,
    Hop,
    MultiHopCase,
    Probe,
)
from qv_lens.facts.scripts import blank_between, ends_unspaced


@dataclass(frozen=True)
class ProbeAnswer:
    """What a model made of one probe: argmax tokens and the answer's, teacher-forced; its mean
    log-probability (nats)."""

    said: tuple[int, ...]
    """The argmax at each answer token, teacher-forced."""
    asked: tuple[int, ...]
    """The answer's tokens."""
    logprob: float
    """The answer's mean log-probability (nats)."""

    @property
    def right(self) -> bool:
        """Whether every token of the answer is the argmax."""
        return self.said == self.asked

    @property
    def share(self) -> float:
        """Share of the answer's tokens that are the argmax."""
        return sum(a == b for a, b in zip(self.said, self.asked, strict=True)) / len(self.asked)


@dataclass(frozen=True)
class CaseAnswers:
    """All that was asked of a model about one case: probes by group, and continuations by kind."""

    told: dict[str, tuple[ProbeAnswer, ...]]
    """Probes by group."""
    texts: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Continuations by kind."""

    def __getitem__(self, group: str) -> tuple[ProbeAnswer, ...]:
        return self.told.get(group, ())

    def plain(self) -> dict[str, object]:
        """As JSON holds it."""
        return {
            "told": {k: [asdict(t) for t in v] for k, v in self.told.items()},
            "texts": self.texts,
        }

    @classmethod
    def of(cls, plain: dict) -> CaseAnswers:
        """From what `plain` gave."""
        answers = {
            k: tuple(ProbeAnswer(tuple(t["said"]), tuple(t["asked"]), t["logprob"]) for t in v)
            for k, v in plain["told"].items()
        }
        return cls(answers, {k: tuple(v) for k, v in plain["texts"].items()})


@dataclass(frozen=True)
class Generation:
    """How prompts are continued: `blocks` are worked examples in front of multi-hop questions (ACE,
    Appendix G.1); fluency samples `fluency_tokens` more tokens from the `top_k` likeliest (ROME: up
    to 100 tokens with the prompt's). `evaluate` sets `kinds` by what the metrics need, and its own
    `seed`."""

    kinds: tuple[str, ...] = ()
    """What is continued; `evaluate` sets it by what the metrics need."""
    blocks: tuple[str, ...] = ()
    """Worked examples in front of multi-hop questions (ACE, Appendix G.1)."""
    answer_tokens: int = 12
    """Tokens of an answer, or as many as its longest name needs."""
    whole_tokens: int = 40
    """Tokens of an answer that is read to the end of text (`_exact`, `_contains`, `_judged`)."""
    thought_tokens: int = 100
    """Tokens of a chain of thought."""
    fluency_tokens: int = 100
    """Tokens for fluency (ROME: up to 100 with the prompt's)."""
    top_k: int = 5
    """Fluency samples from so many of the likeliest tokens."""
    seed: int = 0
    """Seed of the sampling; `evaluate` sets its own."""


#: continuations that are prompts of a group of probes: kind -> group
WRITTEN: Mapping[str, str] = MappingProxyType({
    "rewrite": "rewrite_new", "paraphrase": "paraphrase_new", "near": "near_old",
    "rewrite_whole": "rewrite_new", "paraphrase_whole": "paraphrase_new", "near_whole": "near_old",
    "onward": "onward_new",
})  # fmt: skip


#: put behind a continuation that was cut off before its end of text, where that is asked for
RUNS_ON = " …"

#: groups that are asked only by name: no usual metric reads them
BESIDE = ("denied_", "alone_", "unrelated_", "distracted_", "reversed_")


def questions(case: Case, beginning: Collection[str] = ("",)) -> dict[str, list[Probe]]:
    """Named groups of probes. `_new` and `_old`: the same prompts with the answer after and before
    the edit.

    `beginning`: only the groups whose names begin so; those of `BESIDE` only where one of them is
    named."""
    groups = _of_requests(case)
    groups |= _of_edit(case) if isinstance(case, EditCase) else _of_chain(case)
    beginnings = tuple(beginning)
    if any(name.startswith(BESIDE) for name in beginnings):
        groups |= _beside(case)
    return {
        name: probes for name, probes in groups.items() if probes and name.startswith(beginnings)
    }


def _of_requests(case: Case) -> dict[str, list[Probe]]:
    """The edited prompts and the same in other words, with the new answer and with the old one."""
    groups: dict[str, list[Probe]] = {
        "rewrite_new": [],
        "rewrite_old": [],
        "paraphrase_new": [],
        "paraphrase_old": [],
    }
    for request, others in zip(case.requests, _aliases(case), strict=True):
        fact = request.fact
        prompts: Sequence[Asked] = (
            case.paraphrases
            if isinstance(case, EditCase)
            else [fact.with_prompt(prompt) for prompt in fact.paraphrases]
        )
        groups["rewrite_new"].append(Probe(fact.text, request.new, others, fact.space))
        for prompt in prompts:
            groups["paraphrase_new"].append(Probe(prompt.text, request.new, others, prompt.space))
        if fact.answer == UNKNOWN:
            continue
        groups["rewrite_old"].append(Probe(fact.text, fact.answer, space=fact.space))
        for prompt in prompts:
            groups["paraphrase_old"].append(Probe(prompt.text, fact.answer, space=prompt.space))
    return groups


def _of_edit(case: EditCase) -> dict[str, list[Probe]]:
    """Neighbours, multi-hop prompts and KnowEdit's groups."""
    new, others = case.request.new, rivals(case)
    groups = {
        "near_old": [_probe(fact) for fact in case.neighbours],
        "rival_old": [_probe(fact) for fact in others],
        "rival_new": [Probe(fact.text, new, space=fact.space) for fact in others],
        "onward_old": [_probe(before) for before, _ in case.onward],
        "onward_new": [_probe(after) for _, after in case.onward],
    }
    for name, probes in case.portability:
        groups[f"portability_{name}"] = list(probes)
    for name, probes in case.locality:
        groups[f"locality_{name}"] = list(probes)
    return groups


def statement(request: EditRequest) -> str:
    """The edit as a sentence in front of a prompt; a question and its answer where it is asked as
    one."""
    prompt, answer = request.target, request.new
    blank = blank_between(prompt.text, answer) if prompt.space is None else prompt.space
    sentence = f"{prompt.text}{' ' if blank else ''}{answer}"
    return f"{sentence}。" if ends_unspaced(sentence) else f"{sentence}. "


def rivals(case: EditCase) -> list[Asked]:
    """The neighbours for which the new answer is a wrong one: where it is a neighbour's own, there
    is nothing to compare with."""
    return [fact for fact in case.neighbours if not matches(fact.answer, [case.request.new])]


def _beside(case: Case) -> dict[str, list[Probe]]:
    """What an edit should not change, or should imply beyond its own prompt."""
    groups: dict[str, list[Probe]] = {f"{name}new": [] for name in BESIDE}
    for request, names in zip(case.requests, _aliases(case), strict=True):
        fact, new = request.fact, request.new
        denial = relations.denied(fact)
        if denial is not None:
            groups["denied_new"].append(Probe(denial, new, names, fact.space))
        groups["alone_new"].append(Probe(fact.subject, new, names))
        groups["unrelated_new"] += [Probe(text, new, names) for text in relations.others(fact)]
        back = relations.reversed_prompt(fact, new)
        if back is not None:
            groups["reversed_new"].append(Probe(back, fact.subject))
    groups["distracted_old"] = []
    if isinstance(case, EditCase):
        stated = statement(case.request)
        for fact in rivals(case):
            text = f"{stated}{fact.text}"
            groups["distracted_old"].append(Probe(text, fact.answer, space=fact.space))
            groups["distracted_new"].append(Probe(text, case.request.new, space=fact.space))
    return groups


def _of_chain(case: MultiHopCase) -> dict[str, list[Probe]]:
    """Hops that no edit touches, the hops before and after, and prompts over the whole chain."""
    before = {(hop.cloze, hop.answer) for hop in case.hops}
    kept = [
        hop
        for i, hop in enumerate(case.new_hops)
        if i not in case.edited and (hop.cloze, hop.answer) in before
    ]
    return {
        "near_old": [_hop(hop) for hop in kept],
        "hops_old": [_hop(hop) for hop in case.hops],
        "hops_new": [_hop(hop) for hop in case.new_hops],
        "onward_old": [Probe(text, case.answer, case.aliases) for text in case.clozes],
        "onward_new": [Probe(text, case.new_answer, case.new_aliases) for text in case.clozes],
    }


def _aliases(case: Case) -> list[tuple[str, ...]]:
    """Other names of each edit's new answer, where a case gives them."""
    if isinstance(case, MultiHopCase) and len(case.edited) == len(case.edits) and case.new_hops:
        return [case.new_hops[i].aliases for i in case.edited]
    return [()] * len(case.requests)


def _probe(question: Asked) -> Probe:
    return Probe(question.text, question.answer, question.aliases, question.space)


def _hop(hop: Hop) -> Probe:
    return Probe(hop.cloze, hop.answer, hop.aliases)
