"""Records: what is asked of a model, what is changed in it, and what is probed afterwards.

Frozen dataclasses in the field's words. A `Fact` is (subject, relation, object) with the prompt that asks for it;
an `EditRequest` is a fact and its new object; a `MultiHopCase` chains facts, some of them edited (MQuAKE); an `EditCase` is one edit with its probes.
Positions in tokens live in `spans`, file formats in `benchmarks`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from qv_lens.errors import FactError


@dataclass(frozen=True)
class Fact:
    """One fact as a cloze: `prompt` with one `{}` for the subject, ending right before the answer.

    `aliases` are other accepted answers, `paraphrases` other prompts with `{}` for the same fact,
    `subject_aliases` other names of the subject.

    Raises `FactError` if the prompt has not exactly one `{}`, or subject, prompt or answer is empty.
    """

    prompt: str
    subject: str
    answer: str
    relation: str | None = None
    category: str | None = None
    aliases: tuple[str, ...] = ()
    paraphrases: tuple[str, ...] = ()
    subject_aliases: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("aliases", "paraphrases", "subject_aliases"):
            value = getattr(self, name)
            if isinstance(value, str):
                raise FactError(f"Fact.{name} must be a sequence of strings, got the single string {value!r}.")
            object.__setattr__(self, name, tuple(value))
        for name in ("prompt", "subject", "answer"):
            value = getattr(self, name)
            check_text(f"Fact.{name}", value)
        for template in (self.prompt, *self.paraphrases):
            check_template(template)

    @classmethod
    def from_text(cls, text: str, subject: str, answer: str) -> Fact:
        """A fact from a filled-in prompt. Raises `FactError` unless the subject occurs in it exactly once."""
        count = text.count(subject) if subject else 0
        if count != 1:
            found = "does not occur" if count == 0 else f"occurs {count} times"
            raise FactError(
                f"The subject {subject!r} {found} in the prompt {text!r}. Write the prompt with {{}} where the subject goes."
            )
        return cls(text.replace(subject, "{}"), subject, answer)

    @property
    def text(self) -> str:
        """The prompt with the subject filled in."""
        return self.prompt.replace("{}", self.subject)

    def with_prompt(self, prompt: str) -> Fact:
        """The same fact asked with another prompt."""
        return replace(self, prompt=prompt)

    def to(self, new: str, via: tuple[str, ...] | list[str] = ()) -> EditRequest:
        """The request to change this fact's answer to `new`.

        `via` are multi-hop prompts that end at this fact (used only by editors whose passes ask for them).
        """
        return EditRequest(self, new, via)  # pyright: ignore[reportArgumentType]


@dataclass(frozen=True)
class EditRequest:
    """Change `fact.answer` to `new` (the papers' o -> o*)."""

    fact: Fact
    new: str
    via: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.via, str):
            raise FactError(f"EditRequest.via must be a sequence of prompts, got the single string {self.via!r}.")
        object.__setattr__(self, "via", tuple(self.via))
        check_text(f"The new answer for {self.fact.text!r}", self.new)

    @property
    def target(self) -> Fact:
        """The fact as it should be after the edit."""
        return replace(self.fact, answer=self.new, aliases=())


@dataclass(frozen=True)
class Hop:
    """One link of a chain: asked as a question and as a cloze (both complete texts, no `{}`)."""

    question: str
    cloze: str
    answer: str
    aliases: tuple[str, ...] = ()
    subject: str | None = None
    relation: str | None = None


#: the old answer of an edit whose file does not give one (KnowEdit's wiki_recent)
UNKNOWN = "?"


@dataclass(frozen=True)
class Probe:
    """A complete prompt with the answer that counts, and others that do as well."""

    text: str
    answer: str
    aliases: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("text", "answer"):
            check_text(f"Probe.{name}", getattr(self, name))


#: anything with `text`, `answer` and `aliases`
Asked = Fact | Probe
#: probes by the name of what they test
Groups = tuple[tuple[str, tuple[Probe, ...]], ...]


@dataclass(frozen=True)
class MultiHopCase:
    """A chain of facts with one or more of them edited, and the questions that depend on the whole chain (MQuAKE).

    `hops` holds the chain before, `new_hops` after the edits, `edited` which of them the edits belong to; `clozes` are
    multi-hop prompts of the chain; `extra` keeps keys of the source record that nothing here reads.
    """

    case_id: int
    edits: tuple[EditRequest, ...]
    questions: tuple[str, ...]
    answer: str
    new_answer: str
    aliases: tuple[str, ...] = ()
    new_aliases: tuple[str, ...] = ()
    hops: tuple[Hop, ...] = ()
    new_hops: tuple[Hop, ...] = ()
    edited: tuple[int, ...] = ()
    clozes: tuple[str, ...] = ()
    extra: tuple[tuple[str, object], ...] = ()

    @property
    def requests(self) -> tuple[EditRequest, ...]:
        """The edits, in the order of the chain."""
        return self.edits


@dataclass(frozen=True)
class EditCase:
    """One edit and what should, and should not, follow from it.

    `paraphrases` ask for the new answer in other words; `neighbours` are other facts, which must keep their answers;
    `onward` are multi-hop prompts over the edited fact, each with the answer before and after. `portability` and
    `locality` are groups of probes as KnowEdit names them, `generation` prompts to be continued (fluency).
    """

    request: EditRequest
    paraphrases: tuple[Asked, ...] = ()
    neighbours: tuple[Asked, ...] = ()
    onward: tuple[tuple[Asked, Asked], ...] = ()
    portability: Groups = ()
    locality: Groups = ()
    generation: tuple[str, ...] = ()
    case_id: int = 0
    extra: tuple[tuple[str, object], ...] = ()

    @property
    def requests(self) -> tuple[EditRequest, ...]:
        """The one edit."""
        return (self.request,)


Case = EditCase | MultiHopCase


def check_text(what: str, value: object) -> None:
    """Raise `FactError` unless `value` is a text that says something."""
    if not isinstance(value, str):
        raise FactError(f"{what} must be one text, got {value!r}.")
    if not value.strip():
        raise FactError(f"{what} is empty: {value!r}. Give it some text.")


def check_template(template: str) -> None:
    """Raise `FactError` unless `template` is a prompt with exactly one `{}`."""
    count = template.count("{}")
    if count == 0:
        raise FactError(f"The prompt {template!r} has no {{}}: put {{}} where the subject goes.")
    if count > 1:
        raise FactError(f"The prompt {template!r} has {count} times {{}}: keep the one where the subject goes.")
