"""The one place where prompt, subject and answer become token positions.

1. A prompt is tokenised once, filled in, the way the model's own tokenizer does it by default.
2. The answer's tokens are what the tokenizer adds when the answer follows the prompt, with a blank
   between them where one belongs (`scripts.blank_between`). If that changes a token of the prompt,
   there is no position that predicts the answer, and it is an error; but in a script without
   blanks, where a prompt's end need not be a word's border, the answer then has the tokens that it
   has alone.
3. The subject's tokens are those that cover its characters (offset mapping), so a merge across its
border counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Literal, TypeAlias

import torch
from jaxtyping import Int
from torch import Tensor

from qv_lens.errors import FactError, ModelError, unknown
from qv_lens.facts.records import UNKNOWN, Fact, check_characters
from qv_lens.facts.scripts import blank_between, ends_unspaced
from qv_lens.facts.words import rtrimmed, trimmed

FactToken = Literal["subject_last", "subject_first", "last", "first_after_last"]
FACT_TOKENS: tuple[FactToken, ...] = ("subject_last", "subject_first", "last", "first_after_last")
#: one token of each prompt by name or index, or several tokens: 'all' of the prompt, or 'answer'
#: (those that predict the answer)
Positions: TypeAlias = FactToken | Literal["all", "answer"] | int


@dataclass(frozen=True)
class Prompt:
    """A tokenised prompt: `subject` are its first and last token, `answer` the tokens that follow
    the prompt.

    Both are empty for a bare text.
    """

    text: str
    """The prompt."""
    ids: tuple[int, ...]
    """Its tokens."""
    subject: tuple[int, int] | None = None
    """First and last token of the subject (None: it has none)."""
    answer: tuple[int, ...] = ()
    """The answer's tokens."""

    @property
    def last(self) -> int:
        """The position that predicts the answer's first token."""
        return len(self.ids) - 1

    def position(self, token: FactToken) -> int:
        """The position of a named token of the fact. Raises `FactError` where the prompt has
        none."""
        if token == "last":
            return self.last
        if token not in FACT_TOKENS:
            raise unknown("Fact token", token, FACT_TOKENS)
        if self.subject is None:
            raise FactError(
                f"The bare prompt {self.text!r:.200} has no subject: pass a Fact, or use the token "
                "'last'."
            )
        if token == "first_after_last":
            if self.subject[1] + 1 > self.last:
                raise FactError(
                    f"Nothing follows the subject in {self.text!r:.200}: use the token 'subject_last'."
                )
            return self.subject[1] + 1
        return self.subject[token == "subject_last"]

    def positions(self, where: Positions) -> tuple[int, ...]:
        """The positions asked for: one for a named token or an index, several for 'all' and
        'answer'.

        Raises `FactError` for an index outside the prompt, or 'answer' of a bare prompt.
        """
        if where == "all":
            return tuple(range(len(self.ids)))
        if where == "answer":
            if not self.answer:
                raise FactError(
                    f"The answer after {self.text!r:.200} is not known (a bare prompt, or a record that "
                    "gives none): pass a Fact with one, or another position."
                )
            return tuple(range(self.last, self.last + len(self.answer)))
        if isinstance(where, str):
            if where not in FACT_TOKENS:
                raise unknown("Position", where, (*FACT_TOKENS, "all", "answer", "a token's index"))
            return (self.position(where),)
        number = isinstance(where, Integral) and not isinstance(where, bool)
        if number and 0 <= (index := int(where)) < len(self.ids):
            return (index,)
        names = "" if number else "; positions is one of them, 'all', or a token's name"
        raise FactError(
            f"Position {where} does not exist in {self.text!r:.200}: it has tokens 0 to "
            f"{self.last}{names}."
        )

    def row(self, where: Positions) -> tuple[int, ...]:
        """The tokens to run: the prompt's tokens and, for 'answer', all answer tokens but the last
        (teacher forcing)."""
        return (*self.ids, *self.answer[:-1]) if where == "answer" else self.ids


def puts_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer itself begins a text with its BOS."""
    bos = tokenizer.bos_token_id
    return bos is not None and list(tokenizer("a")["input_ids"][:1]) == [bos]


def encode(tokenizer: Any, text: str, bos: bool = False) -> tuple[list[int], list[tuple[int, int]]]:
    """Token ids and their character spans; `bos` puts the tokenizer's BOS in front (span (0,
    0)). Raises `FactError` for half of a character."""
    check_characters("The text", text)
    encoding = tokenizer(text, return_offsets_mapping=True)
    ids, spans = list(encoding["input_ids"]), [tuple(span) for span in encoding["offset_mapping"]]
    if bos and (not ids or ids[0] != tokenizer.bos_token_id):
        if tokenizer.bos_token_id is None:
            raise ModelError(
                "prepend_bos=True, but this tokenizer has no BOS token. Load with "
                "prepend_bos=False."
            )
        ids, spans = [tokenizer.bos_token_id, *ids], [(0, 0), *spans]
    return ids, spans


def continuation(
    tokenizer: Any, text: str, answer: str, bos: bool = False, space: bool | None = None
) -> tuple[int, ...]:
    """The tokens of `answer` after `text`, the blanks at the answer's end left out.

    `space`: whether a blank is put between them (None: by the rule). A second blank is never added.

    Raises `FactError` for an answer that is not known, not text or blank, has no tokens, or changes the
    prompt's tokens."""
    if answer == UNKNOWN:
        raise FactError(
            f"The answer after {text!r:.200} is not known: its record gives no old one. Give the fact "
            "one (dataclasses.replace(fact, answer=...)), or pass the prompt alone (fact.text), which "
            "asks about what the model says itself."
        )
    if not isinstance(answer, str) or not trimmed(answer):
        raise FactError(f"The answer {answer!r} after {text!r:.200} is blank: give it some text.")
    answer = rtrimmed(answer)
    blank = blank_between(text, answer) if space is None else space
    present = text[-1:].isspace() or answer[0].isspace()
    glue = " " if blank and not present else ""
    ids, _ = encode(tokenizer, text, bos)
    whole, _ = encode(tokenizer, text + glue + answer, bos)
    if whole[: len(ids)] != ids:
        alone = list(tokenizer(answer, add_special_tokens=False)["input_ids"])
        if (
            present
            or glue
            or not ends_unspaced(text)
            or tokenizer.decode([*ids, *alone]) != tokenizer.decode(whole)
        ):
            raise FactError(
                f"The answer {answer!r} changes how the prompt {text!r:.200} is tokenised. "
                "End the prompt at a word, without a trailing blank or an open word."
            )
        whole = [*ids, *alone]
    if len(whole) == len(ids):
        raise FactError(
            f"The answer {answer!r} after {text!r:.200} has no tokens: give it some text."
        )
    return tuple(whole[len(ids) :])


def tokenize(tokenizer: Any, fact: Fact | str, bos: bool = False) -> Prompt:
    """The prompt of a fact, or a bare text, as tokens. Raises `FactError` for an empty prompt."""
    text = fact if isinstance(fact, str) else fact.text
    if not text.strip():
        raise FactError(f"The prompt is empty: {text!r:.200}. Give it some text.")
    ids, spans = encode(tokenizer, text, bos)
    if isinstance(fact, str):
        return Prompt(text, tuple(ids))
    start = fact.prompt.index("{}")
    start, stop = start, start + len(fact.subject)
    covering = [i for i, (a, b) in enumerate(spans) if a < stop and b > start]
    if not covering:
        raise FactError(f"No token of {text!r:.200} covers the subject {fact.subject!r}.")
    answer = ()
    if fact.answer != UNKNOWN:
        answer = continuation(tokenizer, text, fact.answer, bos, fact.space)
    return Prompt(text, tuple(ids), (covering[0], covering[-1]), answer)


def pad(rows: Sequence[Sequence[int]], fill: int = 0) -> Int[Tensor, "batch seq"]:
    """Right-padded ids. No token of a row ever sees what comes after the row's end."""
    length = max(len(row) for row in rows)
    return torch.tensor([[*row, *[fill] * (length - len(row))] for row in rows])
