"""Strings that people write: their normal form, and which characters are visible. No I/O.

Equivalent spellings (`é` as one character, or as `e` followed by an accent) look the same and must compare equal.
Therefore strings are converted to Unicode's normal form C (NFC) where they enter: in bodies, filters and searches.
Passwords are hashed in normal form KC (NFKC).
"""

from __future__ import annotations

import re
import unicodedata

# White space is listed explicitly, because `\s` differs between Python, Rust (used by pydantic) and ECMAScript (used by
# JSON Schema).
BLANK = r"\x00-\x20\x7f\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000\ufeff"
# Characters that are invisible or change the direction of the text after them: controls, direction and format marks,
# joiners and fillers.
INVISIBLE = (
    r"\x80-\x9f\u00ad\u034f\u0600-\u0605\u061c\u06dd\u070f\u0890\u0891\u08e2\u115f\u1160\u17b4\u17b5\u180b-\u180f"
    r"\u200b-\u200f\u202a-\u202e\u2060-\u206f\u2800\u3164\ufe00-\ufe0f\uffa0\ufff0-\uffff"
    # These are literal characters, because JSON Schema patterns have no portable escapes above U+FFFF.
    "\U000110bd\U000110cd\U00013430-\U0001345f\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff"
)
# These ranges are not part of INVISIBLE, because schema-driven tools walk through wide ranges character by character.
PRIVATE_USE = "\\ue000-\\uf8ff\U000e1000-\U0010ffff"
_VISIBLE = re.compile(rf"[^{BLANK}{INVISIBLE}]")


def nfc(text: str) -> str:
    """Return the string in normal form C. This blocks the event loop, so the length of the string must be limited."""
    return text if text.isascii() else unicodedata.normalize("NFC", text)


def without_case(text: str) -> str:
    """Return the form in which `contains`, `prefix` and search compare text.

    Python lowercases a capital sigma to ς at the end of a word, but to σ elsewhere, so each ς is replaced by σ.
    """
    return text.lower().replace("ς", "σ")


def nfkc(text: str) -> str:
    """Return the string in normal form KC, which also replaces full-width letters and ligatures with plain letters."""
    return text if text.isascii() else unicodedata.normalize("NFKC", text)


def is_visible(text: str) -> bool:
    """Return whether the text has a visible character. It may also have joiners, because some scripts need them."""
    return _VISIBLE.search(text) is not None
