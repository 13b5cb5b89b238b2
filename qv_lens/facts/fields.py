"""The fields of a record, read one by one: of the right type, or refused with the field's name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qv_lens.errors import FactError
from qv_lens.facts.records import Fact, Groups, Probe
from qv_lens.facts.words import best_place, places, rtrimmed, trimmed, word_around

Record = Mapping[str, Any]


class RefusedError(FactError):
    """What is wrong with one field of a record."""

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(reason)
        self.field = field


def groups_in(record: Record, field: str) -> Groups:
    """KnowEdit's {name: [{prompt, ground_truth}]}; an empty or absent list is left out, and so is a
    probe without an answer."""
    groups = {}
    for name, probes in table_of(record.get(field) or {}, field).items():
        probes_read = [table_of(probe, field) for probe in list_of(probes or [], field)]
        pairs = [
            (
                text_of(p["prompt"], field) if p["prompt"] else "",
                flattened(p["ground_truth"], field),
            )
            for p in probes_read
        ]
        made = tuple(
            Probe(text, answers[0], tuple(answers[1:]))
            for text, answers in pairs
            if text and answers
        )
        if made:
            groups[name] = made
    return tuple(groups.items())


def text_of(value: Any, field: str) -> str:
    """A text that says something. Raises `RefusedError`."""
    if not isinstance(value, str) or not trimmed(value):
        raise RefusedError(field, f"is {value!r}, not a text")
    return value


def answer_of(value: Any, field: str) -> str:
    """A text without blanks at its end, so that equal answers compare equal."""
    return rtrimmed(text_of(value, field))


def table_of(value: Any, field: str) -> Record:
    """A dictionary. Raises `RefusedError`."""
    if not isinstance(value, dict):
        raise RefusedError(field, f"holds {value!r}, not a dictionary")
    return value


def list_of(values: Any, field: str) -> list[Any]:
    """A list. Raises `RefusedError`."""
    if not isinstance(values, list):
        raise RefusedError(field, f"is {values!r}, not a list")
    return values


def texts_of(record: Record, field: str) -> tuple[str, ...]:
    """A list of texts that has to be there. Raises `RefusedError`."""
    return tuple(text_of(value, field) for value in list_of(record[field], field))


def names_of(record: Record, field: str) -> tuple[str, ...]:
    """A list of texts that may be absent; empty texts are left out."""
    values = [] if record.get(field) is None else list_of(record[field], field)
    # an empty text says that there is no name
    return tuple(text_of(value, field) for value in values if value != "")


def number_of(record: Record, field: str) -> int:
    """A whole number, also as a text or a float. Raises `RefusedError`."""
    value = record[field]
    if isinstance(value, float) and value.is_integer():  # a data frame's column with gaps
        value = int(value)
    if not isinstance(value, (int, str)) or not str(value).lstrip("-").isdigit():
        raise RefusedError(field, f"is {value!r}, not a number")
    return int(value)


def object_of(rewrite: Record, field: str) -> str:
    """MQuAKE's and CounterFact's {"str": "football"}; MQuAKE-Remastered's `target_new_str`."""
    value = rewrite[field] if field in rewrite else rewrite.get(f"{field}_str")
    if value is None:
        remastered = any(name.startswith("target_") and name.endswith("_str") for name in rewrite)
        raise KeyError(f"{field}_str" if remastered else field)
    return answer_of(value.get("str") if isinstance(value, dict) else value, field)


def template_of(prompt: str) -> str:
    """A prompt with one place for the subject. Raises `RefusedError`."""
    if prompt.count("{}") != 1:
        raise RefusedError(
            "prompt",
            f"{prompt!r:.200} holds {{}} {prompt.count('{}')} times; once, for the subject",
        )
    return prompt


def fact_of(rewrite: Record) -> Fact:
    """The fact of a `requested_rewrite`."""
    prompt, subject = text_of(rewrite["prompt"], "prompt"), text_of(rewrite["subject"], "subject")
    return Fact(
        template_of(prompt), subject, object_of(rewrite, "target_true"), rewrite.get("relation_id")
    )


def filled(
    text: str,
    subject: str,
    answer: str,
    aliases: tuple[str, ...] = (),
    field: str = "prompt",
    relation: str | None = None,
) -> Fact:
    """A fact from a prompt with its subject filled in: the first place where the subject stands as
    a word becomes `{}`. A prompt that already has its `{}` is taken as it is."""
    text, subject = text_of(text, field), text_of(subject, "subject")
    name = trimmed(subject)
    place = best_place(text, name)
    if "{}" in text:
        if place is not None or text.count("{}") > 1:
            raise RefusedError(
                field,
                (
                    f"{text!r:.200} holds {{}}, which stands for the subject, and the subject itself or "
                    "{} again"
                ),
            )
        return Fact(text, name, text_of(answer, "answer"), relation, aliases=aliases)
    if place is None:
        inside = places(text, name)
        fault = (
            "does not hold the subject"
            if not inside
            else f"holds, only inside {word_around(text, *inside[0])!r}, the subject"
        )
        raise RefusedError(
            field, f"{text!r:.200} {fault} {name!r}: write {{}} where the subject goes"
        )
    start, stop = place
    return Fact(
        text[:start] + "{}" + text[stop:],
        text[start:stop],
        text_of(answer, "answer"),
        relation,
        aliases=aliases,
    )


def flattened(value: Any, field: str) -> list[str]:
    """The texts of a text or of nested lists of texts."""
    if value is None:
        return []
    if isinstance(value, str):
        return [value] if value.strip() else []
    if not isinstance(value, list):
        raise RefusedError(field, f"holds {value!r}, neither a text nor a list of texts")
    return [text for part in value for text in flattened(part, field)]


def extra_of(record: Record, *taken: str) -> tuple[tuple[str, object], ...]:
    """The fields that nothing here reads, kept as they are."""
    return tuple((key, value) for key, value in record.items() if key not in taken)
