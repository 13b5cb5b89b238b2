"""Records: what is asked of a model, what is changed in it, and what is probed afterwards.

Frozen dataclasses in the field's words. A `Fact` is (subject, relation, object) with the prompt
that asks for it; an `EditRequest` is a fact and its new object; a `MultiHopCase` chains facts, some
of them edited (MQuAKE); an `EditCase` is one edit with its probes. Positions in tokens live in
`spans`, file formats in `formats`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from typing import TypeVar

from qv_lens.errors import ConfigError, EditError, FactError, several
from qv_lens.facts.words import blanks_around, places, rtrimmed, trimmed, word_around, word_places

_R = TypeVar("_R")


class _Record:
    """A record is written as it would be made: what has its default is left out."""

    def __repr__(self) -> str:
        parts = (
            f"{field.name}={getattr(self, field.name)!r}"
            for field in fields(self)  # pyright: ignore[reportArgumentType]
            if field.default is MISSING or getattr(self, field.name) != field.default
        )
        return f"{type(self).__name__}({', '.join(parts)})"


@dataclass(frozen=True, repr=False)
class Fact(_Record):
    """One fact as a cloze: `prompt` with one `{}` for the subject, ending right before the answer.

    Blanks around the subject move to the prompt, where the prompt has none there; blanks after the
    answer are dropped.

    Raises `FactError` if the prompt does not have exactly one `{}`, or if the subject, prompt or
    answer is empty.

    >>> import qv_lens as qv
    >>> fact = qv.Fact("The capital of {} is", subject="France", answer="Paris")
    >>> fact.text
    'The capital of France is'
    >>> fact.to("Rome").new
    'Rome'
    """

    prompt: str
    """A cloze with one `{}` for the subject, ending right before the answer."""
    subject: str
    """What `{}` stands for."""
    answer: str
    """The true answer."""
    relation: str | None = None
    """Its relation, as Wikidata names it (P36)."""
    category: str | None = None
    """One of ACE's categories."""
    aliases: tuple[str, ...] = ()
    """Other accepted answers."""
    paraphrases: tuple[str, ...] = ()
    """Other prompts with `{}` for the same fact."""
    subject_aliases: tuple[str, ...] = ()
    """Other names of the subject."""
    space: bool | None = None
    """Whether a blank stands between prompt and answer (None: by the rule of
    `scripts.blank_between`)."""

    def __post_init__(self) -> None:
        for name in ("aliases", "paraphrases", "subject_aliases"):
            object.__setattr__(self, name, _texts(f"Fact.{name}", getattr(self, name)))
        for name in ("prompt", "subject", "answer"):
            value = getattr(self, name)
            check_text(f"Fact.{name}", value)
        for template in (self.prompt, *self.paraphrases):
            check_template(template)
        check_space("Fact.space", self.space)
        self._trim()

    def _trim(self) -> None:
        """A blank at the subject's end would be its last token, at which edits read and write: the
        prompt takes it."""
        before, subject, after = blanks_around(self.subject)
        paraphrases = tuple(_with_blanks(template, before, after) for template in self.paraphrases)
        object.__setattr__(self, "prompt", _with_blanks(self.prompt, before, after))
        object.__setattr__(self, "paraphrases", paraphrases)
        object.__setattr__(self, "subject", subject)
        object.__setattr__(self, "answer", rtrimmed(self.answer))
        object.__setattr__(self, "aliases", tuple(trimmed(alias) for alias in self.aliases))
        object.__setattr__(
            self, "subject_aliases", tuple(trimmed(alias) for alias in self.subject_aliases)
        )

    @classmethod
    def from_text(cls, text: str, subject: str, answer: str, *, space: bool | None = None) -> Fact:
        """A fact from a filled-in prompt. Raises `FactError` unless the subject occurs in it
        exactly once, as a word."""
        check_text("The prompt", text)
        check_text("The subject", subject)
        name = trimmed(subject)
        whole = word_places(text, name, case=True)
        if len(whole) != 1:
            raise FactError(
                f"The subject {name!r} {_not_once(text, name, len(whole))} in the prompt {text!r:.200}. "
                "Write the prompt with {} where the subject goes."
            )
        start, stop = whole[0]
        return cls(text[:start] + "{}" + text[stop:], text[start:stop], answer, space=space)

    @property
    def text(self) -> str:
        """The prompt with the subject filled in."""
        return self.prompt.replace("{}", self.subject)

    def with_prompt(self, prompt: str) -> Fact:
        """The same fact asked with another prompt."""
        return replace(self, prompt=prompt)

    def to(self, new: str, via: tuple[str, ...] | list[str] = ()) -> EditRequest:
        """The request to change this fact's answer to `new`.

        `via` are multi-hop prompts that end at this fact (used only by editors whose passes ask for
        them)."""
        return EditRequest(self, new, via)  # pyright: ignore[reportArgumentType]


@dataclass(frozen=True, repr=False)
class EditRequest(_Record):
    """Change `fact.answer` to `new` (the papers' o -> o*)."""

    fact: Fact
    """The fact, with its old answer."""
    new: str
    """The new answer, o*."""
    via: tuple[str, ...] = ()
    """Multi-hop prompts that end at the fact (IFMET, ACE)."""

    def __post_init__(self) -> None:
        if not isinstance(self.fact, Fact):
            raise FactError(f"An edit changes a qv.Fact, got {self.fact!r:.80}.")
        object.__setattr__(self, "via", _texts("EditRequest.via", self.via))
        check_text(f"The new answer for {self.fact.text!r:.200}", self.new)
        object.__setattr__(self, "new", rtrimmed(self.new))

    @property
    def target(self) -> Fact:
        """The fact as it should be after the edit."""
        return replace(self.fact, answer=self.new, aliases=())


@dataclass(frozen=True, repr=False)
class Hop(_Record):
    """One link of a chain: asked as a question and as a cloze (both complete texts, no `{}`)."""

    question: str
    """The link as a question."""
    cloze: str
    """The link as a cloze."""
    answer: str
    """Its answer."""
    aliases: tuple[str, ...] = ()
    """Other accepted answers."""
    subject: str | None = None
    """Its subject, where the record names it."""
    relation: str | None = None
    """Its relation, where the record names it."""

    def __post_init__(self) -> None:
        check_text("Hop.answer", self.answer)
        object.__setattr__(self, "aliases", _texts("Hop.aliases", self.aliases))


#: the old answer of an edit whose file does not give one (KnowEdit's wiki_recent)
UNKNOWN = "(not known)"


@dataclass(frozen=True, repr=False)
class Probe(_Record):
    """A complete prompt with the answer that counts, and other answers that count as well; `space`
    as in a `Fact`."""

    text: str
    """The prompt."""
    answer: str
    """The answer that counts."""
    aliases: tuple[str, ...] = ()
    """Answers that do as well."""
    space: bool | None = None
    """As that of a `Fact`."""

    def __post_init__(self) -> None:
        for name in ("text", "answer"):
            check_text(f"Probe.{name}", getattr(self, name))
        check_space("Probe.space", self.space)
        aliases = _texts("Probe.aliases", self.aliases)
        object.__setattr__(self, "answer", rtrimmed(self.answer))
        object.__setattr__(self, "aliases", tuple(trimmed(alias) for alias in aliases))


#: anything with `text`, `answer`, `aliases` and `space`
Asked = Fact | Probe
#: probes by the name of what they test
Groups = tuple[tuple[str, tuple[Probe, ...]], ...]


Records = Fact | EditRequest | Sequence[Fact | EditRequest]


def asked_facts(records: Records) -> list[Fact]:
    """The facts whose answers are asked for; a request counts with its new answer. Raises
    `ConfigError` for none."""
    several_records = [records] if isinstance(records, (Fact, EditRequest)) else list(records)
    if not several_records:
        raise ConfigError("No facts were given: pass at least one Fact or EditRequest.")
    return [
        record.target if isinstance(record, EditRequest) else record for record in several_records
    ]


@dataclass(frozen=True, repr=False)
class MultiHopCase(_Record):
    """A chain of facts with one or more of them edited, and the questions that depend on the whole
    chain (MQuAKE)."""

    case_id: int
    """Its number in the file."""
    edits: tuple[EditRequest, ...]
    """What is edited."""
    questions: tuple[str, ...]
    """Questions over the whole chain."""
    answer: str
    """Their answer before the edits."""
    new_answer: str
    """Their answer after them."""
    aliases: tuple[str, ...] = ()
    """Other names of the old answer."""
    new_aliases: tuple[str, ...] = ()
    """Other names of the new one."""
    hops: tuple[Hop, ...] = ()
    """The chain before the edits."""
    new_hops: tuple[Hop, ...] = ()
    """The chain after them."""
    edited: tuple[int, ...] = ()
    """Which links the edits belong to."""
    clozes: tuple[str, ...] = ()
    """Multi-hop prompts of the chain."""
    extra: tuple[tuple[str, object], ...] = ()
    """Keys of the source record that nothing here reads."""

    def __post_init__(self) -> None:
        edits = _records("MultiHopCase's edits", self.edits, EditRequest, "fact.to('new answer')")
        object.__setattr__(self, "edits", edits)
        for name in ("questions", "clozes", "aliases", "new_aliases"):
            object.__setattr__(self, name, _texts(f"MultiHopCase's {name}", getattr(self, name)))
        for name in ("answer", "new_answer"):
            check_text(f"MultiHopCase's {name}", getattr(self, name))
        for name in ("hops", "new_hops"):
            hops = _records(
                f"MultiHopCase's {name}", getattr(self, name), Hop, "Hop(question, cloze, answer)"
            )
            object.__setattr__(self, name, hops)
        edited = self.edited if isinstance(self.edited, (tuple, list)) else None
        links = range(len(self.new_hops))
        if edited is None or any(isinstance(i, bool) or i not in links for i in edited):
            raise FactError(
                f"MultiHopCase's edited says which of its {len(links)} new_hops each edit belongs to, "
                f"numbers from 0, [0] for the first; got {self.edited!r:.80}."
            )
        object.__setattr__(self, "edited", tuple(edited))

    @property
    def requests(self) -> tuple[EditRequest, ...]:
        """The edits, in the order of the file."""
        return self.edits


@dataclass(frozen=True, repr=False)
class EditCase(_Record):
    """One edit and what should, and should not, follow from it."""

    request: EditRequest
    """The edit."""
    paraphrases: tuple[Asked, ...] = ()
    """Ask for the new answer in other words."""
    neighbours: tuple[Asked, ...] = ()
    """Other facts, which must keep their answers."""
    onward: tuple[tuple[Asked, Asked], ...] = ()
    """Multi-hop prompts over the edited fact, each with the answer before and after."""
    portability: Groups = ()
    """Groups of probes that must follow from the edit, as KnowEdit names them."""
    locality: Groups = ()
    """Groups of probes that must not change."""
    generation: tuple[str, ...] = ()
    """Prompts to be continued (fluency)."""
    case_id: int = 0
    """Its number in the file."""
    extra: tuple[tuple[str, object], ...] = ()
    """Keys of the source record that nothing here reads."""

    def __post_init__(self) -> None:
        if not isinstance(self.request, EditRequest):
            raise FactError(
                f"A case is an edit, qv.EditCase(fact.to('new answer')), got {self.request!r:.80}."
            )
        for name in ("paraphrases", "neighbours"):
            object.__setattr__(self, name, _asked(f"EditCase's {name}", getattr(self, name)))
        object.__setattr__(self, "onward", _pairs("EditCase's onward", self.onward))
        for name in ("portability", "locality"):
            object.__setattr__(self, name, _groups(f"EditCase's {name}", getattr(self, name)))
        texts = _texts("EditCase's generation", self.generation)
        object.__setattr__(self, "generation", texts)

    @property
    def requests(self) -> tuple[EditRequest, ...]:
        """The one edit."""
        return (self.request,)


Case = EditCase | MultiHopCase


def check_text(what: str, value: object) -> None:
    """Raise `FactError` unless `value` is a text that says something."""
    if not isinstance(value, str):
        raise FactError(f"{what} must be one text, got {value!r}.")
    if not trimmed(value):
        raise FactError(f"{what} is empty: {value!r}. Give it some text.")
    check_characters(what, value)


def check_characters(what: str, text: str) -> None:
    """Raise `FactError` for a text that no tokenizer takes: with half of a character in it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = text[error.start]
        raise FactError(
            f"{what} holds half of a character, {half!r}: {text!r:.200}. Remove it, or read the file in "
            "the encoding that it was written in."
        ) from error


def check_template(template: str) -> None:
    """Raise `FactError` unless `template` is a prompt with exactly one `{}`."""
    count = template.count("{}")
    if count == 0:
        raise FactError(f"The prompt {template!r} has no {{}}: put {{}} where the subject goes.")
    if count > 1:
        raise FactError(
            f"The prompt {template!r} has {count} times {{}}: keep the one where the subject goes."
        )


def check_space(what: str, value: object) -> None:
    """Raise `FactError` unless `value` says whether a blank stands before an answer, or leaves it
    to the rule."""
    if value is not None and not isinstance(value, bool):
        raise FactError(
            f"{what} must be True (a blank before the answer), False (none) or None (by the rule), "
            f"got {value!r}."
        )


def _records(what: str, values: object, kind: type[_R], example: str) -> tuple[_R, ...]:
    """The values, read once. Raises `FactError` for anything but a sequence of records of a
    kind."""
    records = several(values)
    if records is None or not all(isinstance(value, kind) for value in records):
        raise FactError(f"{what} are {kind.__name__}s, [{example}, ...], got {values!r:.80}.")
    return records


def _asked(what: str, values: object) -> tuple[Asked, ...]:
    """The values, read once. Raises `FactError` unless they are a sequence of prompts with
    answers."""
    items = several(values)
    if items is None:
        raise FactError(f"{what} must be a sequence of facts or probes, got {values!r:.80}.")
    for value in items:
        if not hasattr(value, "answer") or not hasattr(value, "text"):
            raise FactError(
                f"{what} must be facts, qv.Fact(prompt, subject, answer), got {value!r:.80}."
            )
    return items


def _pairs(what: str, pairs: object) -> tuple[tuple[Asked, Asked], ...]:
    """The pairs, read once. Raises `FactError` unless each is a prompt with its answer before and
    one with its answer after."""
    items = several(pairs)
    split = [several(pair) or () for pair in items] if items is not None else [()]
    if any(len(pair) != 2 for pair in split):
        raise FactError(
            f"{what} are pairs of probes, one with the answer before the edit and one with that "
            f"after it, [(probe, probe), ...], got {pairs!r:.80}."
        )
    return tuple(_asked(what, pair) for pair in split)  # pyright: ignore[reportReturnType]


def _groups(what: str, groups: object) -> Groups:
    """The groups, read once. Raises `FactError` for anything but pairs of a name and what is
    asked."""
    pairs, checked = several(groups), []
    for pair in (groups,) if pairs is None else pairs:
        if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not isinstance(pair[0], str):
            raise FactError(
                f"{what} are pairs of a name and probes, [('Reasoning', [probe, ...])], got "
                f"{pair!r:.80}."
            )
        checked.append((pair[0], _asked(f"{what}, {pair[0]},", pair[1])))
    return tuple(checked)


def _texts(what: str, values: object) -> tuple[str, ...]:
    """The values, read once. Raises `FactError` for anything but a sequence of strings."""
    if isinstance(values, str):
        raise FactError(f"{what} must be a sequence of strings, got the single string {values!r}.")
    texts = several(values)
    if texts is None:
        raise FactError(f"{what} must be a sequence of strings, got {values!r:.80}.")
    for text in texts:
        if not isinstance(text, str):
            raise FactError(f"{what} must be a sequence of strings; one of them is {text!r:.80}.")
        check_characters(what, text)
    return texts


def _with_blanks(template: str, before: str, after: str) -> str:
    """The template with a subject's outer blanks around its {}, where the template has none there;
    at the template's ends blanks mean nothing."""
    left, _, right = template.partition("{}")
    left += before if left and not left[-1].isspace() else ""
    right = after + right if right and not right[0].isspace() else right
    return left + "{}" + right


def _not_once(text: str, subject: str, count: int) -> str:
    """How often a subject stands in a text, where that is not once."""
    if count:
        return f"occurs {count} times"
    inside = places(text, subject, case=True)
    return f"occurs only inside {word_around(text, *inside[0])!r}" if inside else "does not occur"


def check_requests(batch: Sequence[EditRequest]) -> None:
    """Raise `EditError` for two requests that ask different things of one prompt, or one that asks
    for the old answer."""
    answers: dict[str, str] = {}
    for request in batch:
        text = request.fact.text
        if request.new.strip() == request.fact.answer.strip():
            raise EditError(
                f"The new answer of {text!r:.200} is the old one, {request.new!r}: there is nothing to "
                "edit."
            )
        if answers.setdefault(text, request.new.strip()) != request.new.strip():
            raise EditError(
                f"Two requests of one batch conflict: {text!r:.200} is asked to become both {answers[text]!r} and "
                f"{request.new!r}. Ask for one of them, or edit them one after the other "
                "(batch_size=1)."
            )


def edited_facts(cases: Iterable[Case]) -> list[Fact]:
    """The facts that the cases edit, where they say what was true before."""
    facts = [request.fact for case in cases for request in case.requests]
    return [fact for fact in facts if fact.answer != UNKNOWN]
