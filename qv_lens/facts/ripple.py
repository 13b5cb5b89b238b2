"""RippleEdits' records as cases: what follows from an edit, and what stays."""

from __future__ import annotations

from qv_lens.facts.fields import Record, RefusedError, extra_of, filled, list_of, table_of, text_of
from qv_lens.facts.records import UNKNOWN, EditCase, Probe

#: axes of RippleEdits: what must follow from the edit, and what must not change
FOLLOWS = (
    "Logical_Generalization",
    "Subject_Aliasing",
    "Compositionality_I",
    "Compositionality_II",
)

STAYS = ("Relation_Specificity", "Forgetfulness")


def ripple(record: Record) -> EditCase:
    """RippleEdits names its subject by a Wikidata id alone: it is the longest run of words that the
    edit's prompt shares with the prompts of `Relation_Specificity`, which are about the same
    subject."""
    edit = table_of(record["edit"], "edit")
    new_text = _sentence(edit)
    original = edit.get("original_fact")  # recent facts have none
    old_text = _sentence(table_of(original, "original_fact")) if original else ""
    follows = {axis: _ripple_probes(record, axis) for axis in FOLLOWS}
    stays = {axis: _ripple_probes(record, axis) for axis in STAYS}
    prompt, new, old = _two_answers(new_text, old_text)
    subject = shared_subject(prompt, [probe.text for probe in stays["Relation_Specificity"]])
    request = filled(prompt, subject, old).to(new)
    return EditCase(
        request,
        portability=tuple((axis, probes) for axis, probes in follows.items() if probes),
        locality=tuple((axis, probes) for axis, probes in stays.items() if probes),
        extra=extra_of(record, "edit", *FOLLOWS, *STAYS),
    )


def _ripple_probes(record: Record, axis: str) -> tuple[Probe, ...]:
    """The test queries of an axis that have an answer."""
    probes = []
    for test in list_of(record.get(axis) or [], axis):
        for query in list_of(table_of(test, axis)["test_queries"], "test_queries"):
            answers = [table_of(a, "answers") for a in list_of(query["answers"], "answers")]
            names = [n for a in answers for n in (a["value"], *(a.get("aliases") or ())) if n]
            if names:
                probes.append(Probe(text_of(query["prompt"], "prompt"), names[0], tuple(names[1:])))
    return tuple(probes)


def _sentence(fact: Record) -> str:
    """A fact's sentence without its full stop; that of an abbreviation stays ("... is U.S..")."""
    return text_of(fact["prompt"], "prompt").rstrip().removesuffix(".")


def _two_answers(new_text: str, old_text: str) -> tuple[str, str, str]:
    """The prompt, the new and the old answer: the sentences are alike up to the verb in front of the
    answers, which may begin alike themselves (United States, United Kingdom). Without an old
    sentence the answer is what follows the last " is "."""
    if not old_text:
        prompt, verb, new = new_text.rpartition(" is ")
        return (prompt + verb).rstrip(), new, UNKNOWN
    new_words, old_words = new_text.split(" "), old_text.split(" ")
    alike = 0
    while alike < min(len(new_words), len(old_words)) - 1 and new_words[alike] == old_words[alike]:
        alike += 1
    verbs = [i for i in range(alike) if new_words[i] in ("is", "are")]
    alike = verbs[-1] + 1 if verbs else alike
    return " ".join(new_words[:alike]), " ".join(new_words[alike:]), " ".join(old_words[alike:])


def shared_subject(prompt: str, others: list[str]) -> str:
    """The longest run of words of the prompt that stands in every one of the others; its first and
    its last word are not written small, and it is more than an article."""
    words = prompt.split(" ")
    runs = [words[i:j] for i in range(len(words)) for j in range(i + 1, len(words) + 1)]
    names = [" ".join(run) for run in runs if not run[0].islower() and not run[-1].islower()]
    shared = [
        name for name in names
        if others and name not in ("The", "In") and all(name in text for text in others)
    ]  # fmt: skip
    if not shared:
        raise RefusedError(
            "Relation_Specificity",
            f"shares no name with {prompt!r:.200}: RippleEdits' subject stands nowhere else",
        )
    return max(shared, key=len).removesuffix("'s")
