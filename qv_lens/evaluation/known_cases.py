"""The subset that a model can be asked about (ACE, Appendix B.1): what it answers before any edit.

`known` picks cases whose single hops the model all answers; `known_edits` picks edits of facts that
it answers; `known_facts` (`qv.known`) picks facts, `first_known` the first so many; `as_said` gives
them the answers it says."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Literal

import pandas as pd

from qv_lens.errors import ConfigError, FactError, check_count, one_or_more, unknown
from qv_lens.evaluation.answers import answer_length, correct
from qv_lens.evaluation.kept_answers import looked_up
from qv_lens.facts.prompts import G2, begins, normalise
from qv_lens.facts.records import EditCase, Fact, Hop, MultiHopCase, Probe
from qv_lens.models.lens import Lens, check_lens

How = Literal["cloze", "generate", "few_shot"]

#: at least so many tokens of a continuation are shown
SHOWN = 5
#: facts continued together where only right or wrong is wanted
TOGETHER = 64
#: facts asked at once where so many known ones are looked for
ASKED = 32


def known(
    lens: Lens,
    cases: Sequence[MultiHopCase],
    how: How = "cloze",
    examples: Sequence[tuple[str, str]] = G2,
) -> tuple[list[MultiHopCase], pd.DataFrame]:
    """The cases all of whose hops the model answers, and what it said: `case, hop, prompt, answer,
    right`.

    `how`: 'cloze', the answer is the argmax at each token; 'generate', the greedy continuation of
    the cloze begins with it or an alias; 'few_shot', that of "Q: <question> A:" after `examples`
    (question, answer; ACE's of Appendix G.2)."""
    if how not in ("cloze", "generate", "few_shot"):
        raise unknown("How", how, ("cloze", "generate", "few_shot"))
    links = [(i, j, hop) for i, case in enumerate(cases) for j, hop in enumerate(case.hops)]
    shots = "".join(f"Q: {question} A: {answer}\n" for question, answer in examples)
    prompts = [
        shots + f"Q: {hop.question} A:" if how == "few_shot" else hop.cloze for _, _, hop in links
    ]
    right = _answered(lens, [hop for _, _, hop in links], prompts, how)
    rows = [
        (cases[i].case_id, j, prompt, hop.answer, hit)
        for (i, j, hop), prompt, hit in zip(links, prompts, right, strict=True)
    ]
    wrong = {i for (i, _, _), hit in zip(links, right, strict=True) if not hit}
    kept = [case for i, case in enumerate(cases) if case.hops and i not in wrong]
    frame = pd.DataFrame(rows, columns=["case", "hop", "prompt", "answer", "right"])
    frame.attrs.update({**lens.label, "how": how})
    return kept, frame


def _answered(lens: Lens, hops: Sequence[Hop], prompts: Sequence[str], how: How) -> list[bool]:
    if not hops:
        return []
    if how == "cloze":
        return correct(
            lens, [Probe(prompt, hop.answer) for prompt, hop in zip(prompts, hops, strict=True)]
        )
    names = [[hop.answer, *hop.aliases] for hop in hops]
    longest = max(answer_length(lens, *each) for each in zip(prompts, names, strict=True))
    texts = lens.generate(list(prompts), longest)
    return [begins(text, each) for text, each in zip(texts, names, strict=True)]


def known_edits(lens: Lens, cases: Sequence[EditCase]) -> list[EditCase]:
    """The cases whose fact, as it was before the edit, the model knows (`known_facts`); those that
    do not tokenise are left out."""
    readable = []
    for case in cases:
        try:
            lens.answer_ids(case.request.fact)
        except FactError:
            continue
        readable.append(case)
    right = knows(lens, [case.request.fact for case in readable])
    return [case for case, hit in zip(readable, right, strict=True) if hit]


def answered_onward(lens: Lens, case: EditCase) -> EditCase:
    """The case with only those multi-hop prompts whose answer before the edit the model gives, and
    KnowEdit's portability without the other ones."""
    right = correct(lens, [before for before, _ in case.onward])
    pairs = list(zip(case.onward, right, strict=True))
    dropped = {(after.text, after.answer) for (_, after), hit in pairs if not hit}
    groups = [
        (name, tuple(probe for probe in probes if (probe.text, probe.answer) not in dropped))
        for name, probes in case.portability
    ]
    return replace(
        case,
        onward=tuple(pair for pair, hit in pairs if hit),
        portability=tuple((name, probes) for name, probes in groups if probes),
    )


def knows(lens: Lens, facts: Sequence[Fact]) -> list[bool]:
    """Which facts the model knows, as `known_facts` tells it; only prompts whose likeliest first
    token fits an answer are continued, so that many facts are asked quickly, and once
    (`kept_answers`)."""
    return looked_up(lens, facts, partial(_asked, lens)) if facts else []


def first_known(lens: Lens, facts: Sequence[Fact], count: int) -> list[Fact]:
    """The first `count` of the facts that the model knows; all of them where there are fewer. Raises
    `ConfigError` where it knows none."""
    known: list[Fact] = []
    for i in range(0, len(facts), ASKED):
        chunk = facts[i : i + ASKED]
        known += [fact for fact, right in zip(chunk, knows(lens, chunk), strict=True) if right]
        if len(known) >= count:
            return known[:count]
    if not known:
        raise ConfigError(f"{lens.name} knows the answer of none of {len(facts)} prompts.")
    return known


def as_said(lens: Lens, facts: Sequence[Fact]) -> list[Fact]:
    """The facts, each with that of its accepted answers which the model gives, so that what is
    attributed is what the model says: of 'soccer', also called 'football', often the latter. Facts
    that it does not know stay as they are, and those of which it says a name with an article: its
    first token, " the", would tell nothing of the fact."""
    result = list(facts)
    several = [i for i, fact in enumerate(result) if fact.aliases]
    if not several:
        return result
    longest = max(answer_length(lens, result[i], _names(result[i])) for i in several)
    texts = lens.generate([result[i] for i in several], longest, TOGETHER)
    for i, text in zip(several, texts, strict=True):
        names = _names(result[i])
        telling = [name for name in names if not name.lower().startswith("the ")]
        answer = next((name for name in telling if begins(text, [name])), names[0])
        others = tuple(name for name in names if name != answer)
        result[i] = replace(result[i], answer=answer, aliases=others)
    return result


def _asked(lens: Lens, facts: Sequence[Fact]) -> list[bool]:
    first = lens.next_token_logits(list(facts)).argmax(-1).tolist()
    likely = [i for i, token in enumerate(first) if _may_begin(lens.token_label(token), facts[i])]
    needed = {i: answer_length(lens, facts[i], _names(facts[i])) for i in likely}
    likely.sort(key=lambda i: needed[i])
    known = [False] * len(facts)
    for at in range(0, len(likely), TOGETHER):  # no batch is longer than its answers need
        chunk = likely[at : at + TOGETHER]
        texts = lens.generate([facts[i] for i in chunk], needed[chunk[-1]], TOGETHER)
        for i, text in zip(chunk, texts, strict=True):
            known[i] = _right(facts[i], text)
    return known


def _right(fact: Fact, text: str) -> bool:
    return begins(text, _names(fact))


def _names(fact: Fact) -> tuple[str, ...]:
    """Every name that counts as the answer."""
    return fact.answer, *fact.aliases


def _may_begin(token: str, fact: Fact) -> bool:
    """Whether a continuation that begins with this token can begin with the answer; a sign or a
    blank tells nothing."""
    beginning = normalise(token)
    if not any(letter.isalnum() for letter in beginning):
        return True
    names = [normalise(name) for name in _names(fact)]
    return any(name.startswith(beginning) or beginning.startswith(name) for name in names)


def known_facts(
    lens: Lens, facts: Sequence[Fact], batch_size: int = 16
) -> tuple[list[Fact], pd.DataFrame]:
    """The facts that a model knows, and what it said of each: `prompt, answer, said, right,
    logprob`.

    A fact is known (`right`) if the greedy continuation of its prompt begins with the answer or an
    alias, at a word's end. `said` is that continuation, as long as the longest accepted answer
    needs; `logprob` is log p of the answer's first token (natural log). One row per fact, in their
    order. `batch_size`: prompts continued together.

    Raises `FactError` for anything but facts.

    >>> import qv_lens as qv
    >>> lens = qv.load("toy-gptj")
    >>> kept, table = qv.known(lens, [qv.Fact("{} plays the sport of", "Elena Morefeld", "fencing")])
    >>> len(kept), bool(table["right"][0])
    (1, True)
    """
    check_lens(lens)
    facts = _checked_facts(facts)
    check_count("batch_size", batch_size)
    rows = []
    longest = max([SHOWN, *(answer_length(lens, fact, _names(fact)) for fact in facts)])
    texts = lens.generate(facts, longest, batch_size) if facts else []
    logprobs = lens.logprob(facts) if facts else []
    for fact, text, logprob in zip(facts, texts, logprobs, strict=True):
        rows.append((fact.text, fact.answer, text, _right(fact, text), logprob))
    kept = [fact for fact, row in zip(facts, rows, strict=True) if row[3]]
    frame = pd.DataFrame(rows, columns=["prompt", "answer", "said", "right", "logprob"])
    frame.attrs.update(lens.label)
    return kept, frame


def _checked_facts(facts: Iterable[Fact]) -> list[Fact]:
    if isinstance(facts, Fact):
        raise FactError(
            f"qv.known asks for several facts, got the single fact {facts.text!r:.200}. Pass a list of "
            "facts."
        )
    every = list(one_or_more(facts))
    for fact in every:
        if not isinstance(fact, Fact):
            raise FactError(
                f"qv.known asks for facts, got {type(fact).__name__}. Of cases pass what they edit: "
                "read(path).edited, or [case.request.fact for case in cases]."
            )
    return every


def knowledge(lens: Lens, facts: Sequence[Fact]) -> dict[str, int]:
    """Columns of rows: of how many prompts (`prompts_asked`) the model as it is gives the answer
    (`prompts_known`). Prompts that do not tokenise are not asked."""
    readable = []
    for fact in facts:
        try:
            lens.answer_ids(fact)
        except FactError:
            continue
        readable.append(fact)
    return {"prompts_asked": len(readable), "prompts_known": sum(correct(lens, readable))}
