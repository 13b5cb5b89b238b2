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

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from qv_lens.errors import FactError
from qv_lens.facts.records import UNKNOWN, Case, EditCase, Fact, Groups, Hop, MultiHopCase, Probe
from qv_lens.facts.words import best_place, places, rtrimmed, trimmed, word_around, word_places

Record = Mapping[str, Any]


class RefusedError(FactError):
    """What is wrong with one field of a record."""

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(reason)
        self.field = field


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


def _mquake(record: Record) -> MultiHopCase:
    hops, new_hops = (
        _hops(record, "single_hops", "triples"),
        _hops(record, "new_single_hops", "new_triples"),
    )
    edited = _edited(record)
    clozes, questions = _names(record, "clozes"), _texts(record, "questions")
    if not questions:
        raise RefusedError("questions", "is empty: nothing to ask")
    edits = []
    for rewrite, hop in zip(_rewrites(record), edited, strict=True):
        fact = _fact(rewrite)
        fact = replace(fact, paraphrases=_question(rewrite.get("question"), fact.subject))
        via = (
            _names(rewrite, "via")
            if rewrite.get("via") is not None
            else leading_to(fact, new_hops, hop)
        )
        edits.append(fact.to(_object(rewrite, "target_new"), via))
    return MultiHopCase(
        _number(record, "case_id"),
        tuple(edits),
        questions,
        _answer(record["answer"], "answer"),
        _answer(record["new_answer"], "new_answer"),
        _names(record, "answer_alias"),
        _names(record, "new_answer_alias"),
        hops,
        new_hops,
        edited,
        clozes,
        _extra(
            record,
            "case_id",
            "requested_rewrite",
            "questions",
            "answer",
            "new_answer",
            "answer_alias",
            "new_answer_alias",
            "clozes",
        ),
    )


def _question(question: object, subject: str) -> tuple[str, ...]:
    """An edit's question as a prompt with {}, where it holds the subject once, as a word."""
    text = question if isinstance(question, str) else ""
    places = word_places(text, subject, case=True)
    if len(places) != 1 or "{}" in text:
        return ()
    start, stop = places[0]
    return (text[:start] + "{}" + text[stop:],)


def leading_to(fact: Fact, hops: tuple[Hop, ...], hop: int) -> tuple[str, ...]:
    """A two-hop prompt that ends at the fact: the subject is replaced by the hop before it as a
    noun phrase, where that hop's question or cloze can be turned into one ("What is the capital of
    Ghana?", "Who founded Intel?"). The questions of the case itself are never used."""
    if not hop:
        return ()
    before = hops[hop - 1]
    forms = (
        (r"(?:What|Who|Which) (?:is|are|was|were) (the .+)\?", "", before.question),
        (r"The (.+) (?:is|are)", "the ", before.cloze),
        (r"Who ((?!is |are |was |were ).+)\?", "the one who ", before.question),
    )
    for form, start, text in forms:
        if match := re.fullmatch(form, text):
            phrase = start + match[1]
            if re.search(r"(?:^|\s)the \{\}", fact.prompt, re.IGNORECASE):
                phrase = phrase.removeprefix("the ")
            question = fact.prompt.replace("{}", phrase)
            return (question[0].upper() + question[1:],)
    return ()


def _rewrites(record: Record) -> list[Record]:
    rewrites = record["requested_rewrite"]
    if not rewrites:
        raise RefusedError("requested_rewrite", "is empty: nothing to edit")
    return [_table(rewrite, "requested_rewrite") for rewrite in rewrites]


def _edited(record: Record) -> tuple[int, ...]:
    """Which hop of the new chain each edit belongs to: as the record says, or by its triple."""
    orig, count = _origin(record), len(_rewrites(record))
    index, hops = orig.get("edit_triples_idx"), len(record["new_single_hops"])
    if index is None:
        triples = [list(t) for t in orig.get("new_triples") or ()]
        index = [
            triples.index(list(t)) for t in orig.get("edit_triples") or () if list(t) in triples
        ]
    if not isinstance(index, list) or not all(isinstance(i, int) and 0 <= i < hops for i in index):
        raise RefusedError(
            "edit_triples_idx", f"is {index!r}, not a list of hops from 0 to {hops - 1}"
        )
    if len(index) < count or not _name_the_edits(record, index):
        index = _by_object(record)
    if len(index) < count:
        raise RefusedError(
            "orig", f"says for {len(index)} of {count} edits which hop they belong to"
        )
    return tuple(index[:count])


def _name_the_edits(record: Record, index: list[int]) -> bool:
    """Whether the hops at these numbers are the edits', in their order."""
    answers, rewrites = _new_answers(record), _rewrites(record)
    return all(
        answers[i] == _object(rewrite, "target_new")
        for i, rewrite in zip(index, rewrites, strict=False)
    )


def _new_answers(record: Record) -> list[str]:
    """The answer of each hop after the edits."""
    hops = [_table(hop, "new_single_hops") for hop in record["new_single_hops"]]
    return [_answer(hop["answer"], "answer") for hop in hops]


def _by_object(record: Record) -> list[int]:
    """Which hop each edit belongs to, by its new object: of several hops with that answer the first
    about the edit's subject, else the first; no hop twice."""
    hops, answers = record["new_single_hops"], _new_answers(record)
    places: list[int] = []
    for rewrite in _rewrites(record):
        name, subject = _object(rewrite, "target_new"), str(rewrite.get("subject", ""))
        alike = [i for i, answer in enumerate(answers) if answer == name and i not in places]
        about = [i for i in alike if subject in str(hops[i].get("cloze", ""))]
        places += (about or alike)[:1]
    return places


def _origin(record: Record) -> Record:
    """The triples of a case: MQuAKE's `orig`; in MQuAKE-Remastered they are the record's own, the
    old ones as `orig_triples`."""
    if record.get("orig"):
        return _table(record["orig"], "orig")
    return {key.removeprefix("orig_"): value for key, value in record.items() if "triples" in key}


def _hops(record: Record, field: str, triples: str) -> tuple[Hop, ...]:
    """A chain's links, each with subject and relation where the record's triples match the links
    one by one."""
    hops = [_table(hop, field) for hop in _list(record[field], field)]
    if not hops:
        raise RefusedError(field, "is empty: a chain has hops")
    orig = _origin(record)
    ids, names = (orig.get(key) or [] for key in (triples, f"{triples}_labeled"))
    cases = []
    for i, hop in enumerate(hops):
        text = _text(hop["cloze"], "cloze")
        subject = names[i][0] if len(names) == len(hops) else None
        relation = ids[i][1] if len(ids) == len(hops) else None
        answer = _answer(hop["answer"], "answer")
        cases.append(
            Hop(
                _text(hop["question"], "question"),
                text,
                answer,
                _names(hop, "answer_alias"),
                subject,
                relation,
            )
        )
    return tuple(cases)


def _counterfact(record: Record) -> EditCase:
    rewrite = record["requested_rewrite"]
    true, new = _object(rewrite, "target_true"), _object(rewrite, "target_new")
    return EditCase(
        _fact(rewrite).to(new),
        tuple(Probe(text, new) for text in _texts(record, "paraphrase_prompts")),
        tuple(Probe(text, true) for text in _texts(record, "neighborhood_prompts")),
        generation=_names(record, "generation_prompts"),
        case_id=_number(record, "case_id"),
        extra=_extra(
            record,
            "case_id",
            "requested_rewrite",
            "paraphrase_prompts",
            "neighborhood_prompts",
            "generation_prompts",
        ),
    )


def _flat(record: Record) -> EditCase:
    request = _filled(record["prompt"], record["subject"], record["ground_truth"]).to(
        _text(record["target_new"], "target_new")
    )
    return EditCase(
        request,
        (Probe(_text(record["rephrase_prompt"], "rephrase_prompt"), request.new),),
        (
            Probe(
                _text(record["locality_prompt"], "locality_prompt"),
                _text(record["locality_ground_truth"], "locality_ground_truth"),
            ),
        ),
        case_id=_number(record, "case_id") if record.get("case_id") is not None else 0,
        extra=_extra(
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
    answers = _flattened(record["answers"], "answers")
    if not answers:
        raise RefusedError("answers", "is empty")
    request = _filled(record["src"], record["subject"], answers[0], tuple(answers[1:]), "src").to(
        _text(record["alt"], "alt")
    )
    return EditCase(
        request,
        (Probe(_text(record["rephrase"], "rephrase"), request.new),),
        locality=(
            (
                "Neighborhood",
                (Probe(_text(record["loc"], "loc"), _text(record["loc_ans"], "loc_ans")),),
            ),
        ),
        extra=_extra(record, "subject", "src", "rephrase", "answers", "alt", "loc", "loc_ans"),
    )


def _knowedit(record: Record) -> EditCase:
    older = "prompt" not in record and "text" in record
    names = ("text", "concept", "labels") if older else ("prompt", "subject", "target_new")
    text, subject, new = (record[name] for name in names)
    answers, old = _flattened(new, names[2]), _flattened(record.get("ground_truth"), "ground_truth")
    if not answers:
        raise RefusedError("target_new", "is empty")
    request = _filled(text, subject, old[0] if old else UNKNOWN, tuple(old[1:])).to(answers[0])
    rephrase = record.get("rephrase_prompt") or record.get("rephrase")
    return EditCase(
        request,
        tuple(Probe(t, request.new) for t in _flattened(rephrase, "rephrase")),
        portability=_groups(record, "portability"),
        locality=_groups(record, "locality"),
        generation=(request.fact.text,),
        extra=_extra(
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


#: axes of RippleEdits: what must follow from the edit, and what must not change
FOLLOWS = (
    "Logical_Generalization",
    "Subject_Aliasing",
    "Compositionality_I",
    "Compositionality_II",
)
STAYS = ("Relation_Specificity", "Forgetfulness")


def _ripple(record: Record) -> EditCase:
    """RippleEdits names its subject by a Wikidata id alone: it is the longest run of words that the
    edit's prompt shares with the prompts of `Relation_Specificity`, which are about the same
    subject."""
    edit = _table(record["edit"], "edit")
    new_text = _sentence(edit)
    original = edit.get("original_fact")  # recent facts have none
    old_text = _sentence(_table(original, "original_fact")) if original else ""
    follows = {axis: _ripple_probes(record, axis) for axis in FOLLOWS}
    stays = {axis: _ripple_probes(record, axis) for axis in STAYS}
    prompt, new, old = _two_answers(new_text, old_text)
    subject = _shared(prompt, [probe.text for probe in stays["Relation_Specificity"]])
    request = _filled(prompt, subject, old).to(new)
    return EditCase(
        request,
        portability=tuple((axis, probes) for axis, probes in follows.items() if probes),
        locality=tuple((axis, probes) for axis, probes in stays.items() if probes),
        extra=_extra(record, "edit", *FOLLOWS, *STAYS),
    )


def _ripple_probes(record: Record, axis: str) -> tuple[Probe, ...]:
    """The test queries of an axis that have an answer."""
    probes = []
    for test in _list(record.get(axis) or [], axis):
        for query in _list(_table(test, axis)["test_queries"], "test_queries"):
            answers = [_table(a, "answers") for a in _list(query["answers"], "answers")]
            names = [n for a in answers for n in (a["value"], *(a.get("aliases") or ())) if n]
            if names:
                probes.append(Probe(_text(query["prompt"], "prompt"), names[0], tuple(names[1:])))
    return tuple(probes)


def _sentence(fact: Record) -> str:
    """A fact's sentence without its full stop; that of an abbreviation stays ("... is U.S..")."""
    return _text(fact["prompt"], "prompt").rstrip().removesuffix(".")


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


def _shared(prompt: str, others: list[str]) -> str:
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


def _groups(record: Record, field: str) -> Groups:
    """KnowEdit's {name: [{prompt, ground_truth}]}; an empty or absent list is left out, and so is a
    probe without an answer."""
    groups = {}
    for name, probes in _table(record.get(field) or {}, field).items():
        probes_read = [_table(probe, field) for probe in _list(probes or [], field)]
        pairs = [
            (_text(p["prompt"], field) if p["prompt"] else "", _flattened(p["ground_truth"], field))
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


def _known(record: Record) -> Fact:
    return _filled(
        record["prompt"], record["subject"], record["attribute"], relation=record.get("relation_id")
    )


def _plain(record: Record) -> Fact:
    prompt, subject, answer = (_text(record[key], key) for key in ("prompt", "subject", "answer"))
    space = record.get("space")
    if space is not None and not isinstance(space, bool):
        raise RefusedError("space", f"is {space!r}, not true, false or absent")
    return Fact(
        _template(prompt),
        subject,
        answer,
        relation=record.get("relation"),
        category=record.get("category"),
        aliases=_names(record, "aliases"),
        paraphrases=tuple(_template(text) for text in _names(record, "paraphrases")),
        subject_aliases=_names(record, "subject_aliases"),
        space=space,
    )


READERS: Mapping[str, Callable[[Record], Case | Fact]] = {
    "mquake": _mquake,
    "counterfact": _counterfact,
    "flat": _flat,
    "ripple": _ripple,
    "zsre": _zsre,
    "knowedit": _knowedit,
    "known": _known,
    "plain": _plain,
}


# ------------------------------------------------------------------ fields


def _text(value: Any, field: str) -> str:
    if not isinstance(value, str) or not trimmed(value):
        raise RefusedError(field, f"is {value!r}, not a text")
    return value


def _answer(value: Any, field: str) -> str:
    """A text without blanks at its end, so that equal answers compare equal."""
    return rtrimmed(_text(value, field))


def _table(value: Any, field: str) -> Record:
    if not isinstance(value, dict):
        raise RefusedError(field, f"holds {value!r}, not a dictionary")
    return value


def _list(values: Any, field: str) -> list[Any]:
    if not isinstance(values, list):
        raise RefusedError(field, f"is {values!r}, not a list")
    return values


def _texts(record: Record, field: str) -> tuple[str, ...]:
    return tuple(_text(value, field) for value in _list(record[field], field))


def _names(record: Record, field: str) -> tuple[str, ...]:
    """A list of texts that may be absent; empty texts are left out."""
    values = [] if record.get(field) is None else _list(record[field], field)
    # an empty text says that there is no name
    return tuple(_text(value, field) for value in values if value != "")


def _number(record: Record, field: str) -> int:
    value = record[field]
    if isinstance(value, float) and value.is_integer():  # a data frame's column with gaps
        value = int(value)
    if not isinstance(value, (int, str)) or not str(value).lstrip("-").isdigit():
        raise RefusedError(field, f"is {value!r}, not a number")
    return int(value)


def _object(rewrite: Record, field: str) -> str:
    """MQuAKE's and CounterFact's {"str": "football"}; MQuAKE-Remastered's `target_new_str`."""
    value = rewrite[field] if field in rewrite else rewrite.get(f"{field}_str")
    if value is None:
        raise KeyError(field)
    return _answer(value.get("str") if isinstance(value, dict) else value, field)


def _template(prompt: str) -> str:
    if prompt.count("{}") != 1:
        raise RefusedError(
            "prompt",
            f"{prompt!r:.200} holds {{}} {prompt.count('{}')} times; once, for the subject",
        )
    return prompt


def _fact(rewrite: Record) -> Fact:
    """The fact of a `requested_rewrite`."""
    prompt, subject = _text(rewrite["prompt"], "prompt"), _text(rewrite["subject"], "subject")
    return Fact(
        _template(prompt), subject, _object(rewrite, "target_true"), rewrite.get("relation_id")
    )


def _filled(
    text: str,
    subject: str,
    answer: str,
    aliases: tuple[str, ...] = (),
    field: str = "prompt",
    relation: str | None = None,
) -> Fact:
    """A fact from a prompt with its subject filled in: the first place where the subject stands as
    a word becomes `{}`. A prompt that already has its `{}` is taken as it is."""
    text, subject = _text(text, field), _text(subject, "subject")
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
        return Fact(text, name, _text(answer, "answer"), relation, aliases=aliases)
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
        _text(answer, "answer"),
        relation,
        aliases=aliases,
    )


def _flattened(value: Any, field: str) -> list[str]:
    """The texts of a text or of nested lists of texts."""
    if value is None:
        return []
    if isinstance(value, str):
        return [value] if value.strip() else []
    if not isinstance(value, list):
        raise RefusedError(field, f"holds {value!r}, neither a text nor a list of texts")
    return [text for part in value for text in _flattened(part, field)]


def _extra(record: Record, *taken: str) -> tuple[tuple[str, object], ...]:
    return tuple((key, value) for key, value in record.items() if key not in taken)
