"""Few-shot and chain-of-thought blocks in ACE's format (Appendix G.1), ACE's own examples, and how
an answer is read.

    Question: <multi-hop question>
    Thoughts: <one sentence per hop>
    Answer: <answer>

A prompt is some worked blocks, then the question up to "Thoughts:"; the answer is what follows the
first "Answer:" of the continuation, up to the end of its line."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from unicodedata import category, normalize

from qv_lens.facts.words import sign_follows, word_ends, word_places


def cot_block(question: str, thoughts: str, answer: str) -> str:
    """One worked example, closed by an empty line."""
    return f"Question: {question}\nThoughts: {thoughts}\nAnswer: {answer}\n\n"


#: ACE's worked chains for multi-hop questions (Appendix G.1), in its words
G1 = (
    cot_block(
        "What is the capital of the country where Plainfield Town Hall is located?",
        "Plainfield Town Hall is located in the country of the United States of America. The "
        "capital of United States is Washington, D.C.",
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
        "University. De La Salle University is located in the country of Philippines. Philippines "
        "is located in the continent if Asia.",
        "Asia",
    ),
    cot_block(
        "Who is the spouse of the US president?",
        "The US president is Joe Biden. The spouse of Joe Biden is Jill Biden",
        "Jill Biden",
    ),
    cot_block(
        "Who has ownership of the developer of the Chevrolet Corvette (C4)?",
        (
            "The developer of Chevrolet Corvette (C4) is Chevrolet. Chevrolet is owned by General "
            "Motors."
        ),
        "General Motors",
    ),
)

#: ACE's questions and answers that come before a question about what a model knows (Appendix G.2)
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
    """The text after the first "Answer:" up to the end of the line; None where there is none."""
    _, mark, rest = continuation.partition("Answer:")
    return rest.split("\n", 1)[0].strip() if mark else None


def answered(continuation: str) -> bool:
    """Whether the continuation already holds all that `parse_answer` reads."""
    return "\n" in continuation.partition("Answer:")[2]


def normalise(text: str) -> str:
    """The form in which two answers are compared: composed, case folded, outer punctuation removed,
    and the token that ends a text, which generated text does not show.

    Signs that carry meaning stay: C++, C#, .NET, -5, $5, 5%, #1. Full-width forms, typographic
    quotes and dashes and runs of blanks count as plain ones. A text that is all punctuation stays
    as it is."""
    plain = _unified(END_OF_TEXT.sub("", text) or text)
    start = 0
    while start < len(plain) and _outer(plain[start], "+") and not LEADING.match(plain, start):
        start += 1
    stop = len(plain)
    while stop > start and _outer(plain[stop - 1]) and not TRAILING.search(plain[start:stop]):
        stop -= 1
    return plain[start:stop] or plain


#: the tokens with which models end a text, as they are written in an answer
END_OF_TEXT = re.compile(r"(?:\s*(?:<\|[^<>|\s]{1,40}\|>|</s>|<eos>|<end_of_turn>))+\W*\Z")
#: signs before a word or number that belong to it
LEADING = re.compile(r"[-+<>~](?=[.$€£¥]?\d)|(?<!\.)\.(?=\w)|[#§](?=\w)")
#: signs after a word or number that belong to it
TRAILING = re.compile(r"\w#\Z|\d[%‰‱′″]\Z")
#: characters that count as another, or as none (invisible ones)
UNIFIED = str.maketrans(
    {"’": "'", "‘": "'", "ʼ": "'", "“": '"', "”": '"', "‐": "-", "‑": "-", "–": "-", "−": "-"}
    | dict.fromkeys(("\u00ad", "\u200b", "\u200e", "\u200f", "\u2060", "\ufeff"), "")
)


def _unified(text: str) -> str:
    """One spelling for what may be written in several ways. Only full- and half-width forms are
    folded by compatibility (NFKC): for other characters, folding would change the meaning ("x²"
    would become "x2")."""
    narrow = re.sub("[\uff00-\uffef]+", lambda part: normalize("NFKC", part[0]), text)
    folded = normalize("NFC", normalize("NFD", narrow.translate(UNIFIED)).casefold())
    return re.sub(r"(?<=\d) (?=[%‰‱])", "", " ".join(folded.split()))


def _outer(char: str, more: str = "") -> bool:
    """Whether a character is punctuation that may surround an answer: blanks, quotes, brackets,
    stops, markup."""
    return char.isspace() or category(char)[0] in "PC" or char in "`^~|=<>" or char in more


def matches(text: str | None, accepted: Iterable[str]) -> bool:
    """Whether `text` is one of `accepted`, both normalised. None and a text that says nothing never
    match."""
    text_said = normalise(text) if text is not None else ""
    return text_said != "" and text_said in {normalise(answer) for answer in accepted}


def begins(text: str, accepted: Iterable[str]) -> bool:
    """Whether a continuation begins with one of the answers, and the answer ends there: "C++" is
    not "C", 20.5 not 20."""
    plain = normalise(text)
    for answer in accepted:
        wanted = normalise(answer)
        end = len(wanted)
        if (
            wanted
            and plain.startswith(wanted)
            and word_ends(plain, end)
            and not sign_follows(plain, end)
        ):
            return True
    return False


def one_line(text: str) -> str:
    """Generated text with every run of blanks and line ends as one blank."""
    return " ".join(text.split())


def contains(text: str, accepted: Iterable[str]) -> bool:
    """Whether a continuation holds one of the answers somewhere, as words of its own: "C++" holds no
    "C", "it is -5" no "5"."""
    plain = normalise(text)
    wanted = [normalise(answer) for answer in accepted]
    return any(
        not sign_follows(plain, stop) and not _sign_ahead(plain, start)
        for answer in wanted
        if answer
        for start, stop in word_places(plain, answer)
    )


def _sign_ahead(text: str, start: int) -> bool:
    """Whether a minus, a currency or the like belongs to the number at a place; the dash of 3-5 does
    not."""
    if start == 0 or not text[start].isdigit():
        return False
    sign = text[start - 1]
    dash = sign in "-." and not text[max(0, start - 2) : start - 1].isalnum()
    return dash or category(sign) in ("Sc", "Sm")
