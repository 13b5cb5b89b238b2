"""Few-shot and chain-of-thought blocks in ACE's format (Appendix G.1), and how an answer is read from them.

    Question: <multi-hop question>
    Thoughts: <one sentence per hop>
    Answer: <answer>

A prompt is some worked blocks, then the question up to "Thoughts:"; the answer is what follows the first
"Answer:" of the continuation, up to the end of its line.
"""

from __future__ import annotations

import string
from collections.abc import Iterable, Sequence


def cot_block(question: str, thoughts: str, answer: str) -> str:
    """One worked example, closed by an empty line."""
    return f"Question: {question}\nThoughts: {thoughts}\nAnswer: {answer}\n\n"


def cot_prompt(question: str, blocks: Sequence[str] = ()) -> str:
    """Worked blocks followed by the open question, ending at "Thoughts:"."""
    return "".join(blocks) + f"Question: {question}\nThoughts:"


def parse_answer(continuation: str) -> str | None:
    """The text behind the first "Answer:" up to the end of the line; None where there is none."""
    _, found, rest = continuation.partition("Answer:")
    return rest.split("\n", 1)[0].strip() if found else None


def answered(continuation: str) -> bool:
    """Whether all that `parse_answer` reads is there."""
    return "\n" in continuation.partition("Answer:")[2]


def normalise(text: str) -> str:
    """Case folded, trimmed, outer punctuation taken off: what two answers are compared by."""
    return text.casefold().strip().strip(string.punctuation + " ")


def matches(text: str | None, accepted: Iterable[str]) -> bool:
    """Whether `text` is one of `accepted`, both normalised. None never matches."""
    return text is not None and normalise(text) in {normalise(answer) for answer in accepted}
