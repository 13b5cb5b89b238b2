"""Where scripts set blanks, and whether one belongs between a prompt and its answer.

1. No blank is added after an existing blank, or before an answer that brings its own.
2. No blank follows an opening bracket or quotation mark. For a straight quote, and for a mark that
   opens in some languages and closes in others, what stands before it decides.
3. No blank follows a sign that ties what follows to itself: "anti-", "and/", "l'", "US$", "#".
4. No blank follows Chinese, Japanese, Thai, Lao, Khmer, Burmese or Tibetan text. Korean uses
   blanks.
5. Everywhere else a blank is put.

What a rule cannot know (a plural's apostrophe and a French one look alike) is decided by the
commoner reading; `Fact(..., space=)` overrides it."""

from __future__ import annotations

import re
from types import MappingProxyType
from unicodedata import category

#: code points of scripts without blanks between words, and of the punctuation that belongs to them
UNSPACED = (
    (0x0E00, 0x0FFF),  # Thai, Lao, Tibetan
    (0x1000, 0x109F),  # Burmese
    (0x1780, 0x17FF),  # Khmer
    (0x1950, 0x19FF),  # Tai Le, New Tai Lue, Khmer symbols
    (0x1A20, 0x1AAF),  # Tai Tham
    (0x2E80, 0x312F),  # radicals, CJK punctuation, Hiragana, Katakana, Bopomofo
    # Katakana extensions, enclosed characters, Han extension A (Korean's letters lie in the gap
    # before)
    (0x3190, 0x4DBF),
    (0x4E00, 0x9FFF),  # Han
    (0xA9E0, 0xA9FF),  # Burmese extension B
    (0xAA60, 0xAADF),  # Burmese extension A, Tai Viet
    (0xF900, 0xFAFF),  # Han, compatibility
    (0xFE30, 0xFE4F),  # CJK punctuation, vertical
    (0xFF00, 0xFF9F),  # full-width letters and punctuation, half-width Katakana
    (0x1B000, 0x1B16F),  # Kana supplements
    (0x20000, 0x3FFFF),  # Han, further extensions
)
HANGUL = ((0x1100, 0x11FF), (0x3130, 0x318F), (0xA960, 0xA97F), (0xAC00, 0xD7FF), (0xFFA0, 0xFFDC))
#: closing bracket or quote -> what opens it
CLOSING = MappingProxyType(
    {")": "(", "]": "[", "}": "{", "”": "“", "’": "‘", "»": "«", "›": "‹", '"': '"', "'": "'"}
)
#: a mark that may open -> where it closes instead, the mark that opened: German „…“ and »…«
REVERSED = MappingProxyType({"“": "„", "‘": "‚", "«": "»", "‹": "›", "»": "«", "›": "‹", "”": "“"})


def unspaced(char: str) -> bool:
    """Whether a character's script sets no blanks between words."""
    return _within(char, UNSPACED)


def hangul(char: str) -> bool:
    """Whether a character is Korean, whose particles follow a word without a blank."""
    return _within(char, HANGUL)


def _within(char: str, ranges: tuple[tuple[int, int], ...]) -> bool:
    return char != "" and any(start <= ord(char) <= stop for start, stop in ranges)


def blank_between(text: str, answer: str) -> bool:
    """Whether a blank belongs between a prompt and its answer, by the rules above."""
    if not text or text[-1].isspace() or answer[:1].isspace():
        return False
    return not (opens(text) or ties(text) or ends_unspaced(text))


def opens(text: str) -> bool:
    """Whether the last character is a bracket or quotation mark that opens."""
    last, before = text[-1], text[:-1]
    if last in "¿¡":
        return True
    if last in '"`':
        return before.count(last) % 2 == 0 and _may_open(before)
    if last == "'":
        closes = unspaced(before[-1:]) and before.count("'") % 2 == 1
        return _may_open(before) and not closes
    if category(last) not in ("Ps", "Pi") and last not in "»›”":
        return False
    if last in REVERSED and before.count(REVERSED[last]) > before.count(last):
        return False
    return category(last) in ("Ps", "Pi") or _may_open(before)


def _may_open(before: str) -> bool:
    """Whether a quotation mark after this text can be an opening one: 'size 5"' cannot, 'he said "'
    can."""
    last = before[-1:]
    return (
        not last
        or last.isspace()
        or last in ":,;="
        or category(last) in ("Ps", "Pi", "Pd")
        or unspaced(last)
    )


def ties(text: str) -> bool:
    """Whether the last character ties what follows to itself.

    A hyphen, dash, slash, backslash, underscore or @ does so after a word, not after a blank
    ("Paris -" is a dash). A currency sign does so where no number stands before it, a # where no
    word does.
    """
    last = text[-1]
    before = text.rstrip(last)
    word = bool(before) and not before[-1].isspace()
    if category(last) == "Sc":
        return not before.rstrip()[-1:].isdigit()
    if last == "#":
        return not word or category(before[-1]) == "Ps"
    if last == "@":
        return True
    if last in "'’":
        return _elides(before, last)
    return word and (category(last) == "Pd" or last in "/\\_")


def _elides(before: str, mark: str) -> bool:
    """Whether an apostrophe is that of "l'" or "dell'": one that closes no quotation, after a
    letter.

    After s, x or z it is an English plural's ("the players'"), unless that letter is the whole word
    ("s'")."""
    quoted = (
        before.count("‘") > before.count("’")
        if mark == "’"
        else re.search(r"(?<!\w)'", before) is not None
    )
    word = re.search(r"[^\W\d_]*$", before)
    letters = word[0] if word else ""
    plural = len(letters) > 1 and letters[-1] in "sxzSXZ"
    return bool(letters) and not quoted and not plural


def ends_unspaced(text: str) -> bool:
    """Whether the text ends in a script without blanks. Numbers, punctuation and text in brackets
    or quotes are skipped: "北京(Beijing)" ends in one, "Beijing (北京)" does not."""
    at = len(text) - 1
    while at >= 0:
        char = text[at]
        if unspaced(char) and not char.isspace():
            return True
        if char.isspace() or char.isalpha():
            return False
        opening = text.rfind(CLOSING[char], 0, at) if char in CLOSING else -1
        at = (opening if opening > 0 else at) - 1
    return False
