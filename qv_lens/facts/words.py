"""Where words begin and end, and where a name stands in a text.

1. Texts are compared decomposed and case folded, cluster by cluster (a character with its marks).
   Folding changes lengths ("ß" is "ss"), so each border of the folded text remembers its place in
   the original.
2. A word ends where Unicode's letters, marks and numbers end. Scripts without blanks have no such
   borders: there a name may end anywhere, as it may in Korean, whose particles follow without a
   blank.
3. A number does not end before its own decimals, thousands, percent or currency.
4. Of several places for a name, one in its own case and not in a compound is best ("Jean-Luc",
"C++")."""

from __future__ import annotations

import re
from unicodedata import category, normalize, numeric

from qv_lens.facts.scripts import hangul, unspaced

#: blanks, and characters that are as invisible
BLANK = r"[\s\u200b\u2060\ufeff]"
#: typographic apostrophes and hyphens -> those of a keyboard
PLAIN = str.maketrans({"’": "'", "‘": "'", "ʼ": "'", "‐": "-", "‑": "-"})
Place = tuple[int, int]


def trimmed(text: str) -> str:
    """The text without blanks at its ends."""
    return blanks_around(text)[1]


def rtrimmed(text: str) -> str:
    """The text without blanks at its end."""
    return re.sub(BLANK + r"+\Z", "", text)


def blanks_around(text: str) -> tuple[str, str, str]:
    """The blanks before a text, the text, and the blanks after it."""
    rest = re.sub(r"\A" + BLANK + "+", "", text)
    bare = rtrimmed(rest)
    return text[: len(text) - len(rest)], bare, rest[len(bare) :]


def places(text: str, name: str, *, case: bool = False) -> list[Place]:
    """Where `name` stands in `text`, as (start, stop) in the text itself; composed or not, and in
    any case unless `case`."""
    folded, borders = _folded(text, case)
    wanted, _ = _folded(name, case)
    places_found = []
    at = folded.find(wanted) if wanted else -1
    while at >= 0:
        stop = at + len(wanted)
        if at in borders and stop in borders:
            places_found.append((borders[at], borders[stop]))
        at = folded.find(wanted, at + 1)
    return places_found


def _folded(text: str, case: bool) -> tuple[str, dict[int, int]]:
    """The text decomposed and (unless `case`) case folded; its borders between clusters -> those of
    the original."""
    pieces: list[str] = []
    borders = {0: 0}
    length = start = 0
    for stop in range(1, len(text) + 1):
        if stop < len(text) and _continues(text[stop]):
            continue
        cluster = normalize("NFD", text[start:stop])
        if not case:
            cluster = normalize("NFD", cluster.casefold())
        piece = " " if cluster.isspace() else cluster.translate(PLAIN)
        pieces.append(piece)
        length += len(piece)
        borders[length] = start = stop
    return "".join(pieces), borders


def _continues(char: str) -> bool:
    """Whether a character belongs to the one before: marks, and the later parts of a decomposed
    Korean syllable."""
    return category(char)[0] == "M" or 0x1160 <= ord(char) <= 0x11FF


def word_places(text: str, name: str, *, case: bool = False) -> list[Place]:
    """Those of `places` that are whole words."""
    return [
        (a, b)
        for a, b in places(text, name, case=case)
        if word_starts(text, a) and word_ends(text, b)
    ]


def best_place(text: str, name: str) -> Place | None:
    """The first place where `name` is a whole word, preferably in its own case and not part of a
    compound."""
    own_case = set(places(text, name, case=True))
    whole = word_places(text, name)
    whole.sort(key=lambda place: (place not in own_case, _in_compound(text, *place), place))
    return whole[0] if whole else None


def _in_compound(text: str, start: int, stop: int) -> bool:
    """Whether a hyphen ties the place to another word ("Jean" in "Jean-Luc"), or a sign follows
    ("C" in "C++")."""
    after = text[stop : stop + 2]
    before = text[max(0, start - 2) : start]
    goes_on = len(after) == 2 and category(after[0]) == "Pd" and _in_word(after[1])
    begun = len(before) == 2 and category(before[1]) == "Pd" and _in_word(before[0])
    return goes_on or begun or sign_follows(text, stop)


def word_around(text: str, start: int, stop: int) -> str:
    """The longer word that a place lies in."""
    while start > 0 and not word_starts(text, start):
        start -= 1
    while stop < len(text) and not word_ends(text, stop):
        stop += 1
    return text[start:stop]


def word_starts(text: str, at: int) -> bool:
    """Whether a word or number may begin at this place."""
    if at == 0 or at >= len(text):
        return True
    before, first = text[at - 1], text[at]
    if _number(first) and (_number(before) or re.search(r"\d[.,]$", text[:at])):
        return False
    if not (_in_word(before) and _in_word(first)):
        return True
    return category(first)[0] != "M" and (unspaced(before) or unspaced(first))


def word_ends(text: str, at: int) -> bool:
    """Whether the word or number before this place ends at it."""
    if at == 0 or at >= len(text):
        return True
    last, following = text[at - 1], text[at]
    if _continues(following):
        return False
    if _number(last) and not _number_ends(text, at):
        return False
    if not (_in_word(last) and _in_word(following)):
        return True
    if unspaced(last) or hangul(last):
        return category(following) != "Lm"  # the long vowel of コーヒー, the doubling of 人々
    return unspaced(following)


def sign_follows(text: str, at: int) -> bool:
    """Whether the word before this place goes on with a sign of its own: "C" in "C++" and "C#",
    "Disney" in "Disney+"."""
    sign = at > 0 and _in_word(text[at - 1]) and text[at : at + 1] in ("+", "#")
    return sign and not text[at + 1 : at + 2].isalnum()


def _number_ends(text: str, at: int) -> bool:
    """Whether a number is not followed by more of it: 20 is not 20.5, 20,000, 20 000, 20万, 20% or
    20€."""
    rest = text[at:]
    if _number(rest[0]) or category(rest[0]) == "Sc":
        return False
    if re.match(r"[.,:/٫٬'’⁄]\d|\s?[%‰‱]|[°′″]", rest):
        return False
    grouped = re.match(r"[ \u00a0\u2009\u202f]\d{3}(?!\d)", rest) and re.search(
        r"(?<!\d)\d{1,3}$", text[:at]
    )
    return not grouped


def _number(char: str) -> bool:
    """Whether a character is a digit or a numeral of another kind (½, 万)."""
    return numeric(char, None) is not None


def _in_word(char: str) -> bool:
    return char.isalnum() or char == "_" or category(char)[0] == "M"
