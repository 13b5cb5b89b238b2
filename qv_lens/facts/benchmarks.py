"""Files of facts and edits -> records.

`read` takes a JSON list, JSON lines or a dataset by name (extra `data`) and recognises the format by its keys:

    mquake        MQuAKE-CF, CF-3k, v2, T and ACE's filteredQA: `requested_rewrite` is a list      -> MultiHopCase
    counterfact   ROME's CounterFact: `requested_rewrite` is one dictionary                        -> EditCase
    flat          CounterFact in EasyEdit's layout: `rephrase_prompt`, `locality_prompt`           -> EditCase
    zsre          MEND's ZsRE: `src`, `alt`, `loc`                                                 -> EditCase
    knowedit      KnowEdit (wiki_counterfact, wiki_recent, ZsRE; `text` and `labels` in old files) -> EditCase
    known         ROME's known_1000: `attribute`, `template`                                       -> Fact
    plain         {"prompt" with {}, "subject", "answer"} and, if there, "category", "relation"    -> Fact

A record that is none is refused with its number, line (of a file), field and reason: `read` raises, or with
`skip=True` reports it.
Keys of edits that nothing here reads are kept in the case's `extra`.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import pandas as pd

from qv_lens.errors import FactError, QVLensError, unknown
from qv_lens.facts.records import UNKNOWN, Case, EditCase, EditRequest, Fact, Groups, Hop, MultiHopCase, Probe

Record = Mapping[str, Any]
#: gives the line on which each record begins (none of a dataset), asked only where one is refused
Where = Callable[[], list[int]]


@dataclass(frozen=True)
class Read:
    """What a file held. `refused`: one row per record that could not be read: `source, record, line, field, reason`
    (no `line` of a dataset)."""

    format: str
    cases: tuple[Case, ...]
    facts: tuple[Fact, ...]
    refused: pd.DataFrame


def read(source: str | Path, format: str | None = None, *, skip: bool = False) -> Read:
    """Every record of a file or dataset ("name", "name:config"). `format`: a name of the list above (None: by its keys).

    Raises `FactError` for what cannot be read, or, unless `skip`, a record that is refused.
    """
    records, where = _records(source)
    return _parsed(records, where, format, source, skip)


def parse(records: list[Any], format: str | None = None, *, source: str | Path = "records", skip: bool = False) -> Read:
    """As `read`, of records already in memory."""
    return _parsed(records, list, format, source, skip)


def _parsed(records: list[Any], where: Where, format: str | None, source: str | Path, skip: bool) -> Read:
    if not records:
        raise FactError(f"{source} holds no records.")
    kind = _format(records, source) if format is None else format
    if kind not in _READERS:
        raise unknown("Format", kind, _READERS, error=FactError)
    found, refused = [], []
    for number, record in enumerate(records):
        try:
            if isinstance(record, FactError):
                raise record
            if not isinstance(record, dict):
                raise FactError(f"it is a {type(record).__name__}, not a dictionary")
            found.append(_READERS[kind](record))
        except KeyError as error:
            refused.append((number, str(error.args[0]), "missing"))
        except _RefusedError as error:
            refused.append((number, error.field, str(error)))
        except (FactError, TypeError, AttributeError, IndexError, ValueError) as error:
            refused.append((number, "", str(error)))
    lines = where() if refused else []
    rows = [(str(source), number, lines[number] if lines else None, field, reason) for number, field, reason in refused]
    table = pd.DataFrame(rows, columns=["source", "record", "line", "field", "reason"]).astype({"line": "Int64"})
    if refused and not skip:
        number, field, reason = refused[0]
        what = f"field {field!r}: {reason}" if field else reason
        line = f"line {lines[number]}, " if lines else ""
        raise FactError(
            f"{source}, {line}record {number} (of {len(records)}, read as {kind}), {what}. "
            f"{len(refused)} are refused; skip=True reads the others and lists these."
        )
    cases = tuple(item for item in found if not isinstance(item, Fact))
    return Read(kind, cases, tuple(item for item in found if isinstance(item, Fact)), table)


def plain_facts(path: str | Path) -> list[Fact]:
    """The facts of a file in the format `plain` or `known`. Raises `FactError`."""
    got = read(path)
    if got.cases:
        raise FactError(
            f'{path} holds edits ({got.format}), not facts: [{{"prompt": "{{}} plays", "subject": ..., "answer": ...}}].'
        )
    return list(got.facts)


class _RefusedError(FactError):
    def __init__(self, field: str, reason: str) -> None:
        super().__init__(reason)
        self.field = field


def _records(source: str | Path) -> tuple[list[Any], Where]:
    """The records, an error in the place of a line that is no JSON; and what tells on which line of a file each begins."""
    path = Path(source)
    if (
        not path.exists()
        and isinstance(source, str)
        and path.suffix not in (".json", ".jsonl", ".csv", ".tsv", ".txt", ".parquet")
    ):
        return list(dataset(source)), list
    try:
        text = path.read_text(encoding="utf-8-sig")  # with or without a byte order mark
        if path.suffix == ".jsonl":
            lines = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
            return [_json(line) for _, line in lines], lambda: [number for number, _ in lines]
        found = json.loads(text)
    except OSError as error:
        raise FactError(f"Cannot read facts from {path}: {error}.") from error
    except ValueError as error:
        raise FactError(f"{path} is no JSON: {error}. Facts and edits come as a JSON list, or as JSON lines (.jsonl).") from error
    if not isinstance(found, list) or not found:
        raise FactError(
            f'{path} holds no JSON list of records. Facts are [{{"prompt": "{{}} plays", "subject": ..., "answer": ...}}].'
        )
    return found, lambda: _lines(text)


def _lines(text: str) -> list[int]:
    """Where each element of a JSON list begins."""
    decoder, found, at, line = json.JSONDecoder(), [], text.index("[") + 1, 1 + text.count("\n", 0, text.index("["))
    while True:
        start = re.compile(r"[\s,]*").match(text, at).end()  # pyright: ignore[reportOptionalMemberAccess]
        if text[start] == "]":
            return found
        line += text.count("\n", at, start)
        found.append(line)
        _, at = decoder.raw_decode(text, start)
        line += text.count("\n", start, at)


def _json(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        return FactError(f"it is no JSON: {error}")


def dataset(source: str, error: type[QVLensError] = FactError, *, streaming: bool = False) -> Iterator[Record]:
    """The rows of a dataset's training split by name ("name", "name:config"); `streaming` fetches them as they are read.

    Raises `error` where `datasets` is absent or the rows cannot be fetched.
    """
    try:
        datasets = import_module("datasets")
    except ImportError as cause:
        raise error(f"{source!r} is no file; for a dataset of that name: pip install 'qv_lens[data]'.") from cause
    name, _, config = source.partition(":")
    try:
        yield from datasets.load_dataset(name, config or None, split="train", streaming=streaming)
    except Exception as cause:  # the hub's own errors are many
        raise error(f"The dataset {source!r} cannot be read: {type(cause).__name__}: {cause}.") from cause


def _format(records: list[Any], source: str | Path) -> str:
    """That of the first record that has one."""
    for record in records:
        keys = set(record) if isinstance(record, dict) else set()
        rewrite = record["requested_rewrite"] if "requested_rewrite" in keys else None
        marks = (
            ("mquake", isinstance(rewrite, list)),
            ("counterfact", isinstance(rewrite, dict)),
            ("zsre", {"src", "alt"} <= keys),
            ("flat", {"locality_prompt", "target_new"} <= keys),
            (
                "knowedit",
                bool({"portability", "locality"} & keys) or {"text", "labels"} <= keys or {"prompt", "target_new"} <= keys,
            ),
            ("known", {"attribute", "template"} <= keys),
            ("plain", {"prompt", "subject", "answer"} <= keys),
        )
        for name, fits in marks:
            if fits:
                return name
    first = f"keys {sorted(records[0])}" if isinstance(records[0], dict) else f"{records[0]!r:.80}"
    raise FactError(f"{source}, record 0 is {first}: no known format ({', '.join(_READERS)}). Name one with format=.")


# ------------------------------------------------------------------ one reader per format


def _mquake(record: Record) -> MultiHopCase:
    hops, new_hops = _hops(record, "single_hops", "triples"), _hops(record, "new_single_hops", "new_triples")
    edited = _edited(record)
    clozes, questions = _names(record, "clozes"), _texts(record, "questions")
    if not questions:
        raise _RefusedError("questions", "is empty: nothing to ask")
    edits = []
    for rewrite, hop in zip(_rewrites(record), edited, strict=True):
        fact = _fact(rewrite)
        question = str(rewrite.get("question", ""))
        if question.count(fact.subject) == 1 and "{}" not in question:
            fact = Fact(
                fact.prompt, fact.subject, fact.answer, fact.relation, paraphrases=(question.replace(fact.subject, "{}"),)
            )
        via = _names(rewrite, "via") if "via" in rewrite else _leading_to(fact, new_hops, hop)
        edits.append(fact.to(_object(rewrite, "target_new"), via))
    return MultiHopCase(
        _number(record, "case_id"), tuple(edits), questions, _text(record["answer"], "answer"), _text(record["new_answer"], "new_answer"),
        _names(record, "answer_alias"), _names(record, "new_answer_alias"), hops, new_hops, edited, clozes,
        _extra(record, "case_id", "requested_rewrite", "questions", "answer", "new_answer", "answer_alias", "new_answer_alias", "clozes"),
    )  # fmt: skip


def _leading_to(fact: Fact, hops: tuple[Hop, ...], hop: int) -> tuple[str, ...]:
    """A two-hop prompt that ends at the fact: the hop before as a noun phrase in the subject's place, where its question or
    cloze can be put so ("What is the capital of Ghana?", "Who founded Intel?"). What the case is asked is never used."""
    if not hop:
        return ()
    before = hops[hop - 1]
    forms = ((r"(?:What|Who|Which) (?:is|are|was|were) (the .+)\?", "", before.question), (r"The (.+) (?:is|are)", "the ", before.cloze),
             (r"Who ((?!is |are |was |were ).+)\?", "the one who ", before.question))  # fmt: skip
    for form, start, text in forms:
        if found := re.fullmatch(form, text):
            asked = fact.prompt.replace("{}", start + found[1]).replace(" the the ", " the ")
            return (asked[0].upper() + asked[1:],)
    return ()


def _rewrites(record: Record) -> list[Record]:
    rewrites = record["requested_rewrite"]
    if not rewrites:
        raise _RefusedError("requested_rewrite", "is empty: nothing to edit")
    return [_table(rewrite, "requested_rewrite") for rewrite in rewrites]


def _edited(record: Record) -> tuple[int, ...]:
    """Which hop of the new chain each edit belongs to: as the record says, or by its triple."""
    orig, count = _table(record.get("orig") or {}, "orig"), len(_rewrites(record))
    index, hops = orig.get("edit_triples_idx"), len(record["new_single_hops"])
    if index is None:
        triples = [list(t) for t in orig.get("new_triples") or ()]
        index = [triples.index(list(t)) for t in orig.get("edit_triples") or () if list(t) in triples]
    if not isinstance(index, list) or not all(isinstance(i, int) and 0 <= i < hops for i in index):
        raise _RefusedError("edit_triples_idx", f"is {index!r}, not a list of hops from 0 to {hops - 1}")
    if len(index) < count:  # by the edited fact's new object
        answers = [hop["answer"] for hop in record["new_single_hops"]]
        named = [_object(rewrite, "target_new") for rewrite in _rewrites(record)]
        index = [answers.index(name) for name in named if name in answers]
    if len(index) < count:
        raise _RefusedError("orig", f"says for {len(index)} of {count} edits which hop they belong to")
    return tuple(index[:count])


def _hops(record: Record, field: str, triples: str) -> tuple[Hop, ...]:
    """A chain's links, each with subject and relation where the record's triples stand for them one by one."""
    hops = [_table(hop, field) for hop in _list(record[field], field)]
    if not hops:
        raise _RefusedError(field, "is empty: a chain has hops")
    orig = _table(record.get("orig") or {}, "orig")
    ids, names = (orig.get(key) or [] for key in (triples, f"{triples}_labeled"))
    made = []
    for i, hop in enumerate(hops):
        text = _text(hop["cloze"], "cloze")
        subject = names[i][0] if len(names) == len(hops) else None
        relation = ids[i][1] if len(ids) == len(hops) else None
        answer = _text(hop["answer"], "answer")
        made.append(Hop(_text(hop["question"], "question"), text, answer, _names(hop, "answer_alias"), subject, relation))
    return tuple(made)


def _counterfact(record: Record) -> EditCase:
    rewrite = record["requested_rewrite"]
    true, new = _object(rewrite, "target_true"), _object(rewrite, "target_new")
    return EditCase(
        _fact(rewrite).to(new),
        tuple(Probe(text, new) for text in _texts(record, "paraphrase_prompts")),
        tuple(Probe(text, true) for text in _texts(record, "neighborhood_prompts")),
        generation=_names(record, "generation_prompts"),
        case_id=_number(record, "case_id"),
        extra=_extra(record, "case_id", "requested_rewrite", "paraphrase_prompts", "neighborhood_prompts", "generation_prompts"),
    )


def _flat(record: Record) -> EditCase:
    request = _filled(record["prompt"], record["subject"], record["ground_truth"]).to(_text(record["target_new"], "target_new"))
    return EditCase(
        request,
        (Probe(_text(record["rephrase_prompt"], "rephrase_prompt"), request.new),),
        (Probe(_text(record["locality_prompt"], "locality_prompt"), _text(record["locality_ground_truth"], "locality_ground_truth")),),
        case_id=_number(record, "case_id") if "case_id" in record else 0,
        extra=_extra(record, "case_id", "prompt", "subject", "ground_truth", "target_new", "rephrase_prompt", "locality_prompt", "locality_ground_truth"),
    )  # fmt: skip


def _zsre(record: Record) -> EditCase:
    answers = _flattened(record["answers"], "answers")
    if not answers:
        raise _RefusedError("answers", "is empty")
    request = _filled(record["src"], record["subject"], answers[0], tuple(answers[1:]), "src").to(_text(record["alt"], "alt"))
    return EditCase(
        request,
        (Probe(_text(record["rephrase"], "rephrase"), request.new),),
        locality=(("Neighborhood", (Probe(_text(record["loc"], "loc"), _text(record["loc_ans"], "loc_ans")),)),),
        extra=_extra(record, "subject", "src", "rephrase", "answers", "alt", "loc", "loc_ans"),
    )


def _knowedit(record: Record) -> EditCase:
    older = "prompt" not in record and "text" in record
    names = ("text", "concept", "labels") if older else ("prompt", "subject", "target_new")
    text, subject, new = (record[name] for name in names)
    answers, old = _flattened(new, names[2]), _flattened(record.get("ground_truth"), "ground_truth")
    if not answers:
        raise _RefusedError("target_new", "is empty")
    request = _filled(text, subject, old[0] if old else UNKNOWN, tuple(old[1:])).to(answers[0])
    rephrase = record.get("rephrase_prompt") or record.get("rephrase")
    return EditCase(
        request,
        tuple(Probe(t, request.new) for t in _flattened(rephrase, "rephrase")),
        portability=_groups(record, "portability"),
        locality=_groups(record, "locality"),
        generation=(str(text),),
        extra=_extra(record, "prompt", "text", "subject", "concept", "target_new", "labels", "ground_truth", "rephrase_prompt", "rephrase", "portability", "locality"),
    )  # fmt: skip


def _groups(record: Record, field: str) -> Groups:
    """KnowEdit's {name: [{prompt, ground_truth}]}; an empty or absent list is left out, a probe without answer as well."""
    found = {}
    for name, probes in _table(record.get(field) or {}, field).items():
        asked = [_table(probe, field) for probe in _list(probes or [], field)]
        told = [(_text(p["prompt"], field) if p["prompt"] else "", _flattened(p["ground_truth"], field)) for p in asked]
        made = tuple(Probe(text, answers[0], tuple(answers[1:])) for text, answers in told if text and answers)
        if made:
            found[name] = made
    return tuple(found.items())


def _known(record: Record) -> Fact:
    return _filled(record["prompt"], record["subject"], record["attribute"], relation=record.get("relation_id"))


def _plain(record: Record) -> Fact:
    prompt, subject, answer = (_text(record[key], key) for key in ("prompt", "subject", "answer"))
    return Fact(_template(prompt), subject, answer, relation=record.get("relation"), category=record.get("category"))


_READERS: Mapping[str, Callable[[Record], Case | Fact]] = {
    "mquake": _mquake, "counterfact": _counterfact, "flat": _flat, "zsre": _zsre, "knowedit": _knowedit, "known": _known, "plain": _plain,
}  # fmt: skip


# ------------------------------------------------------------------ fields


def _text(value: Any, field: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise _RefusedError(field, f"is {value!r}, not a text")
    return value


def _table(value: Any, field: str) -> Record:
    if not isinstance(value, dict):
        raise _RefusedError(field, f"holds {value!r}, not a dictionary")
    return value


def _list(values: Any, field: str) -> list[Any]:
    if not isinstance(values, list):
        raise _RefusedError(field, f"is {values!r}, not a list")
    return values


def _texts(record: Record, field: str) -> tuple[str, ...]:
    return tuple(_text(value, field) for value in _list(record[field], field))


def _names(record: Record, field: str) -> tuple[str, ...]:
    """A list of texts that need not be there; empty ones are left out."""
    values = [] if record.get(field) is None else _list(record[field], field)
    return tuple(_text(value, field) for value in values if value != "")


def _number(record: Record, field: str) -> int:
    value = record[field]
    if not isinstance(value, (int, str)) or not str(value).lstrip("-").isdigit():
        raise _RefusedError(field, f"is {value!r}, not a number")
    return int(value)


def _object(rewrite: Record, field: str) -> str:
    """MQuAKE's and CounterFact's {"str": "football"}."""
    value = rewrite[field]
    return _text(value.get("str") if isinstance(value, dict) else value, field)


def _template(prompt: str) -> str:
    if prompt.count("{}") != 1:
        raise _RefusedError("prompt", f"{prompt!r} holds {{}} {prompt.count('{}')} times; once, for the subject")
    return prompt


def _fact(rewrite: Record) -> Fact:
    """That of a `requested_rewrite`."""
    prompt, subject = _text(rewrite["prompt"], "prompt"), _text(rewrite["subject"], "subject")
    return Fact(_template(prompt), subject, _object(rewrite, "target_true"), rewrite.get("relation_id"))


def _filled(
    text: str, subject: str, answer: str, aliases: tuple[str, ...] = (), field: str = "prompt", relation: str | None = None
) -> Fact:
    """A fact from a prompt with its subject filled in: the first place where it stands becomes `{}`."""
    text, subject = _text(text, field), _text(subject, "subject")
    at = text.find(subject)
    if at < 0:
        at = text.casefold().find(subject.casefold())
    if at < 0 or "{}" in text:
        raise _RefusedError(field, f"{text!r} does not hold the subject {subject!r}" if at < 0 else f"{text!r} holds {{}}")
    shown = text[at : at + len(subject)]
    return Fact(text[:at] + "{}" + text[at + len(subject) :], shown, _text(answer, "answer"), relation, aliases=aliases)


def _flattened(value: Any, field: str) -> list[str]:
    """The texts of a text or of nested lists of texts."""
    if value is None:
        return []
    if isinstance(value, str):
        return [value] if value.strip() else []
    if not isinstance(value, list):
        raise _RefusedError(field, f"holds {value!r}, neither a text nor a list of texts")
    return [text for part in value for text in _flattened(part, field)]


def _extra(record: Record, *taken: str) -> tuple[tuple[str, object], ...]:
    return tuple((key, value) for key, value in record.items() if key not in taken)


def named(cases: Iterable[Case], category: Callable[[EditRequest], str | None]) -> dict[str, list[Case]]:
    """Cases by the category of their first edit (`categories.of_relation`, or a labeller of your own); those of no category
    are listed as "unknown"."""
    found: dict[str, list[Case]] = {}
    for case in cases:
        found.setdefault(category(case.requests[0]) or "unknown", []).append(case)
    return found


def warn_of(refused: pd.DataFrame) -> None:
    """Say how many records of a file were left out, and the first reason."""
    if len(refused):
        row = refused.iloc[0]
        warnings.warn(
            f"{row['source']}: {len(refused)} records are left out, the first one record {row['record']}"
            f"{', field ' + repr(row['field']) if row['field'] else ''}: {row['reason']}.",
            stacklevel=3,
        )
