"""The formats of benchmarks: one reader per format, from a record to a case or a fact.

    mquake        MQuAKE-CF, CF-3k, v2, T, ACE's filteredQA: `requested_rewrite` is a list; so is MQuAKE-Remastered's,
                  whose objects stand in `target_new_str` and `target_true_str`                    -> MultiHopCase
    ripple        RippleEdits: `edit` and tests by axis; its subject is what their prompts share   -> EditCase
    counterfact   ROME's CounterFact: `requested_rewrite` is one dictionary                        -> EditCase
    flat          CounterFact in EasyEdit's layout: `rephrase_prompt`, `locality_prompt`           -> EditCase
    zsre          MEND's ZsRE: `src`, `alt`, `loc`                                                 -> EditCase
    knowedit      KnowEdit (wiki_counterfact, wiki_recent, ZsRE; `text` and `labels` in old files) -> EditCase
    known         ROME's known_1000: `attribute`, `template`                                       -> Fact
    plain         {"prompt" with {}, "subject", "answer"} and, if there, "category", "relation"    -> Fact

A format is recognised by its keys. Keys of edits that nothing here reads are kept in the case's
`extra`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from qv_lens.errors import FactError
from qv_lens.facts.fields import (
    Record,
    RefusedError,
    extra_of,
    fact_of,
    filled,
    flattened,
    groups_in,
    names_of,
    number_of,
    object_of,
    template_of,
    text_of,
    texts_of,
)
from qv_lens.facts.mquake import mquake
from qv_lens.facts.records import UNKNOWN, Case, EditCase, Fact, Probe
from qv_lens.facts.ripple import ripple


def recognised(records: list[Any], source: str | Path) -> str:
    """The format of the first record that has one. Raises `FactError`."""
    for record in records:
        keys = set(record) if isinstance(record, dict) else set()
        rewrite = record["requested_rewrite"] if "requested_rewrite" in keys else None
        marks = (
            ("mquake", isinstance(rewrite, list)),
            ("counterfact", isinstance(rewrite, dict)),
            ("ripple", {"edit", "Relation_Specificity"} <= keys),
            ("zsre", {"src", "alt"} <= keys),
            ("flat", {"locality_prompt", "target_new"} <= keys),
            (
                "knowedit",
                bool({"portability", "locality"} & keys)
                or {"text", "labels"} <= keys
                or {"prompt", "target_new"} <= keys,
            ),
            ("known", {"attribute", "template"} <= keys),
            ("plain", {"prompt", "subject", "answer"} <= keys),
        )
        for name, fits in marks:
            if fits:
                return name
    for number, record in enumerate(records):
        absent = (
            {"prompt", "subject", "answer"} - set(record) if isinstance(record, dict) else set()
        )
        if len(absent) == 1:
            raise FactError(
                f"{source}, record {number} has no {absent.pop()!r}: a fact has prompt "
                "(with {} for the subject), subject and answer."
            )
    if isinstance(records[0], FactError):
        raise FactError(f"{source}, record 0: {records[0]}.")
    first = f"keys {sorted(records[0])}" if isinstance(records[0], dict) else f"{records[0]!r:.80}"
    raise FactError(
        f"{source}, record 0 is {first}: no known format ({', '.join(READERS)}). Name one with "
        f"format=.{_capitals(records[0])}"
    )


def _capitals(record: Any) -> str:
    """What to do where names would be known in small letters."""
    names = [str(name) for name in record] if isinstance(record, dict) else []
    fields = {"prompt", "subject", "answer"}
    if not fields <= {name.lower() for name in names}:
        return ""
    return " Write the names of its fields small: prompt, subject, answer."


def _counterfact(record: Record) -> EditCase:
    rewrite = record["requested_rewrite"]
    true, new = object_of(rewrite, "target_true"), object_of(rewrite, "target_new")
    return EditCase(
        fact_of(rewrite).to(new),
        tuple(Probe(text, new) for text in texts_of(record, "paraphrase_prompts")),
        tuple(Probe(text, true) for text in texts_of(record, "neighborhood_prompts")),
        generation=names_of(record, "generation_prompts"),
        case_id=number_of(record, "case_id"),
        extra=extra_of(
            record,
            "case_id",
            "requested_rewrite",
            "paraphrase_prompts",
            "neighborhood_prompts",
            "generation_prompts",
        ),
    )


def _flat(record: Record) -> EditCase:
    request = filled(record["prompt"], record["subject"], record["ground_truth"]).to(
        text_of(record["target_new"], "target_new")
    )
    return EditCase(
        request,
        (Probe(text_of(record["rephrase_prompt"], "rephrase_prompt"), request.new),),
        (
            Probe(
                text_of(record["locality_prompt"], "locality_prompt"),
                text_of(record["locality_ground_truth"], "locality_ground_truth"),
            ),
        ),
        case_id=number_of(record, "case_id") if record.get("case_id") is not None else 0,
        extra=extra_of(
            record,
            "case_id",
            "prompt",
            "subject",
            "ground_truth",
            "target_new",
            "rephrase_prompt",
            "locality_prompt",
            "locality_ground_truth",
        ),
    )


def _zsre(record: Record) -> EditCase:
    answers = flattened(record["answers"], "answers")
    if not answers:
        raise RefusedError("answers", "is empty")
    request = filled(record["src"], record["subject"], answers[0], tuple(answers[1:]), "src").to(
        text_of(record["alt"], "alt")
    )
    return EditCase(
        request,
        (Probe(text_of(record["rephrase"], "rephrase"), request.new),),
        locality=(
            (
                "Neighborhood",
                (Probe(text_of(record["loc"], "loc"), text_of(record["loc_ans"], "loc_ans")),),
            ),
        ),
        extra=extra_of(record, "subject", "src", "rephrase", "answers", "alt", "loc", "loc_ans"),
    )


def _knowedit(record: Record) -> EditCase:
    older = "prompt" not in record and "text" in record
    names = ("text", "concept", "labels") if older else ("prompt", "subject", "target_new")
    text, subject, new = (record[name] for name in names)
    answers, old = flattened(new, names[2]), flattened(record.get("ground_truth"), "ground_truth")
    if not answers:
        raise RefusedError("target_new", "is empty")
    request = filled(text, subject, old[0] if old else UNKNOWN, tuple(old[1:])).to(answers[0])
    rephrase = record.get("rephrase_prompt") or record.get("rephrase")
    return EditCase(
        request,
        tuple(Probe(t, request.new) for t in flattened(rephrase, "rephrase")),
        portability=groups_in(record, "portability"),
        locality=groups_in(record, "locality"),
        generation=(request.fact.text,),
        extra=extra_of(
            record,
            "prompt",
            "text",
            "subject",
            "concept",
            "target_new",
            "labels",
            "ground_truth",
            "rephrase_prompt",
            "rephrase",
            "portability",
            "locality",
        ),
    )


def _known(record: Record) -> Fact:
    return filled(
        record["prompt"], record["subject"], record["attribute"], relation=record.get("relation_id")
    )


def _plain(record: Record) -> Fact:
    prompt, subject, answer = (text_of(record[key], key) for key in ("prompt", "subject", "answer"))
    space = record.get("space")
    if space is not None and not isinstance(space, bool):
        raise RefusedError("space", f"is {space!r}, not true, false or absent")
    return Fact(
        template_of(prompt),
        subject,
        answer,
        relation=record.get("relation"),
        category=record.get("category"),
        aliases=names_of(record, "aliases"),
        paraphrases=tuple(template_of(text) for text in names_of(record, "paraphrases")),
        subject_aliases=names_of(record, "subject_aliases"),
        space=space,
    )


READERS: Mapping[str, Callable[[Record], Case | Fact]] = {
    "mquake": mquake,
    "counterfact": _counterfact,
    "flat": _flat,
    "ripple": ripple,
    "zsre": _zsre,
    "knowedit": _knowedit,
    "known": _known,
    "plain": _plain,
}


# ------------------------------------------------------------------ fields
