"""Few-shot and chain-of-thought blocks in ACE's format (Appendix G.1), its own examples, and how an answer is read.

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


#: ACE's worked chains for multi-hop questions (Appendix G.1), in its words
G1 = (
    cot_block(
        "What is the capital of the country where Plainfield Town Hall is located?",
        "Plainfield Town Hall is located in the country of the United States of America. The capital of United States is "
        "Washington, D.C.",
        "Washington, D.C.",
    ),
    cot_block(
        "In which country is the company that created Nissan 200SX located?",
        "Nissan 200SX was created by Nissan. Nissan is located in the country of Japan.",
        "Japan",
    ),
    cot_block(
        'Which continent is the country where the director of "My House Husband: Ikaw Na!" was educated located in?',
        'The director of "My House Husband: Ikaw Na!" is Jose Javier Reyes. Jose Javier Reyes was educated at De La Salle '
        "University. De La Salle University is located in the country of Philippines. Philippines is located in the continent if "
        "Asia.",
        "Asia",
    ),
    cot_block(
        "Who is the spouse of the US president?",
        "The US president is Joe Biden. The spouse of Joe Biden is Jill Biden",
        "Jill Biden",
    ),
    cot_block(
        "Who has ownership of the developer of the Chevrolet Corvette (C4)?",
        "The developer of Chevrolet Corvette (C4) is Chevrolet. Chevrolet is owned by General Motors.",
        "General Motors",
    ),
)

#: its questions and answers behind which a model is asked what it knows (Appendix G.2)
G2 = (
    ("What is the country of citizenship of Fernando Santos?", "Portugal"),
    ("What is the name of the current head of state in Portugal?", "Marcelo Rebelo de Sousa"),
    ("Who was Aslan created by?", "C. S. Lewis"),
    ("Which city was C. S. Lewis born in?", "Belfast"),
    ("Which city was Hari Kunzru born in?", "London"),
    ("Which continent is London located in?", "Europe"),
    ("Who was Nick Bottom created by?", "William Shakespeare"),
    ("What kind of work does William Shakespeare do?", "playwright"),
    ("Who is the head coach of Iran national football team?", "Carlos Queiroz"),
    ("Which sport is Carlos Queiroz associated with?", "association football"),
)


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
