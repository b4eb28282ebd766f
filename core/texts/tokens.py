"""Search tokens: the words of texts, by which lists and subscriptions compare rows with a search. No I/O.

- A text is converted to normal form KC, case-folded, and split into words. A word consists of letters, digits and
  marks, and has at least one letter or digit. Joiners, soft hyphens and other invisible characters are left out.
- Each word has two forms: the exact one, and the folded one without accents (`é` becomes `e`). Words are found by the
  folded form; the exact form only decides the rank.
- Some scripts are written without spaces between words: Han, Kana, Bopomofo, Thai, Lao, Khmer and Burmese. Their words
  become overlapping pairs of characters, so that every part of a text can be found. The last character of such a word
  is a token, too, so that a single character is always the prefix of a token.
- A row matches a query if each token of the query is a prefix of one of the row's tokens.

Tokens contain no ASCII characters other than lowercase letters and digits, and so no character that has a meaning in
the query language of a database.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

MAX_TOKEN_LENGTH = 64  # of longer words, only the beginning is compared
MAX_KEPT_CHARACTERS = 20_000
MAX_KEPT_QUERIES = 256

Row = Mapping[str, Any]

_ASCII = bytes(ord(chr(code).lower() if chr(code).isalnum() else " ") for code in range(128)).ljust(256)
_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\u312f\u31a0-\u31bf\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff"
    "\ua9e0-\ua9ff\uaa60-\uaa7f\uf900-\ufaff\U0001aff0-\U0001b16f\U00020000-\U0003ffff"
)
_RUNS = re.compile(f"([{_UNSPACED}]+)")
_TATWEEL = "\u0640"  # lengthens an Arabic word without changing it
# Letters that differ from others by a stroke or a missing dot, and ligatures. Unicode does not decompose them.
_PLAIN = {"ø": "o", "ł": "l", "đ": "d", "ħ": "h", "ŧ": "t", "ı": "i", "æ": "ae", "œ": "oe"}


class _Kept(dict[int, str]):
    """Maps characters, given by their code points, to strings. The first MAX_KEPT_CHARACTERS results are cached."""

    def __missing__(self, code: int) -> str:
        found = self.made(chr(code))
        if len(self) < MAX_KEPT_CHARACTERS:
            self[code] = found
        return found

    def made(self, character: str) -> str:
        raise NotImplementedError


class _Split(_Kept):
    """Keeps the characters of words, drops invisible characters, and turns all others into spaces."""

    def made(self, character: str) -> str:
        category = unicodedata.category(character)
        if category == "Cf" or character == _TATWEEL or "\ufe00" <= character <= "\ufe0f" or character == "\u034f":
            return ""
        return character if category[0] in "LMN" else " "


class _Folded(_Kept):
    """Removes accents. The marks of scripts in which they distinguish letters, such as Devanagari and Thai, stay."""

    def made(self, character: str) -> str:
        if character in _PLAIN:
            return _PLAIN[character]
        kept = [part for part in unicodedata.normalize("NFD", character) if not _is_accent(part)]
        return unicodedata.normalize("NFC", "".join(kept))


def _is_accent(character: str) -> bool:
    # Combining classes of the points of Hebrew, Arabic and Syriac, and of marks above, below or attached to letters.
    combining = unicodedata.combining(character)
    return 10 <= combining <= 36 or combining >= 200


_SPLIT, _FOLDED = _Split(), _Folded()


def folded(text: str) -> str:
    """Return the folded form of exact tokens. If a token is a prefix of another one, so are their folded forms."""
    return text if text.isascii() else text.translate(_FOLDED)


def exact_tokens(text: str) -> list[str]:
    """Return the exact tokens of a text, in order. This blocks the event loop, so its length must be limited."""
    if text.isascii():
        # Bytes are translated several times as fast as a string.
        tokens = text.encode().translate(_ASCII).decode().split()
        # Most texts have no word that is too long, so check each word only if the text is long enough to have one.
        if len(text) > MAX_TOKEN_LENGTH and max(map(len, tokens), default=0) > MAX_TOKEN_LENGTH:
            return [token[:MAX_TOKEN_LENGTH] for token in tokens]
        return tokens
    return [token for run in _runs(text) for token in _tokens_of(run)]


def _runs(text: str) -> list[tuple[str, bool]]:
    """Return the words of a text, each with a flag that tells whether it becomes pairs of characters.

    A word that mixes scripts with and without spaces is split.
    """
    normal = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold()).translate(_SPLIT)
    if _RUNS.search(normal) is None:
        return [(word, False) for word in normal.split() if _is_word(word)]
    found = []
    for word in normal.split():
        found += [(run, is_paired) for run, is_paired in _split(word) if _is_word(run)]
    return found


def _is_word(run: str) -> bool:
    return run[0].isalnum() or any(character.isalnum() for character in run)


def _split(word: str) -> Iterator[tuple[str, bool]]:
    """Split a word where scripts with and without spaces meet. Each part has the flag that `_runs` describes."""
    for place, run in enumerate(_RUNS.split(word)):
        if run:
            yield run, place % 2 == 1


def _tokens_of(run: tuple[str, bool]) -> Sequence[str]:
    word, is_paired = run
    return [word[place : place + 2] for place in range(len(word))] if is_paired else (word[:MAX_TOKEN_LENGTH],)


def joined(tokens: Iterable[str]) -> str:
    """Return the tokens as one string, with a space before each token, or an empty string if there are none."""
    text = " ".join(tokens)
    return f" {text}" if text else ""


@dataclass(frozen=True, slots=True)
class Words:
    """The tokens of a query, in one of the two forms. `whole` and `start` are joined tokens.

    A row that matches has all of `tokens`. A text equals the query if its joined tokens are `whole`, and begins with
    the query if they begin with `start`.
    """

    tokens: tuple[str, ...]
    whole: str
    start: str

    def are_in(self, text: str) -> bool:
        """Return whether each token is a prefix of one of the joined tokens in `text`."""
        return all(f" {token}" in text for token in self.tokens)


@dataclass(frozen=True, slots=True)
class Query:
    """A query in both forms. Queries with equal words in the same order are equal."""

    exact: Words
    folded: Words

    def __bool__(self) -> bool:
        """Return whether the query has words. A query without words matches every row."""
        return bool(self.folded.tokens)


@lru_cache(maxsize=MAX_KEPT_QUERIES)
def query_of(text: str) -> Query:
    """Parse the text that a client searches for."""
    runs = _runs(text)
    whole = [token for run in runs for token in _tokens_of(run)]
    # In rows, the last character of a paired word is a token, too. A query must not require this token, because in the
    # row, the word may continue.
    needed = [
        token for run in runs for token in (_tokens_of(run)[:-1] or _tokens_of(run) if run[1] else _tokens_of(run))
    ]
    is_open = bool(runs) and runs[-1][1] and len(runs[-1][0]) > 1
    start = whole[:-1] if is_open else whole

    def words(form: object) -> Words:
        make = folded if form else str
        tokens = tuple(dict.fromkeys(make(token) for token in needed))
        return Words(tokens, make(joined(whole)), make(joined(start)))

    return Query(words(False), words(True))


def size_of(text: str) -> int:
    """Return the number of different tokens in a query."""
    return len(query_of(text).folded.tokens)


def sources_of(row: Row, columns: Sequence[str]) -> list[str]:
    """Return the joined exact tokens of each column; a column holds a string, a list of strings or null.

    The tokens of the first column, the label, keep their order and repetitions. In the others, each token occurs once.
    Rows in events from before a migration lack newer columns, which count as empty.
    """
    label, *others = (exact_tokens(_text(row.get(name))) for name in columns)
    return [joined(label), *(joined(dict.fromkeys(each)) for each in others)]


def _text(value: str | Sequence[str] | None) -> str:
    return value if isinstance(value, str) else " ".join(value or ())


def finder(text: str, columns: tuple[str, ...]) -> Callable[[Row, dict[str, str | None]], bool]:
    """Return a predicate that tells whether a row has the words of a query in these columns.

    The predicate caches the tokens of the row in its second argument, so that several predicates can share them.
    """
    needed = query_of(text).folded
    key = f"tokens of {columns}"  # no column has such a name

    def finds(row: Row, kept: dict[str, str | None]) -> bool:
        found = kept.get(key)
        if found is None:
            found = kept[key] = folded("".join(sources_of(row, columns)))
        return needed.are_in(found)

    return finds


EXACT, FOLDED = 0, 1


def rank(query: Query, sources: Sequence[tuple[str, str]]) -> int:
    """Return the rank of a row that matches the query; lower ranks come first.

    `sources` holds the joined tokens of the row, exact and folded, from the most to the least important source. The
    first source is the row's label. The order is: rows whose label equals the query; whose label begins with it; whose
    label has all words; whose first two sources together have all words; and so on. Within each of these groups, rows
    with the same accents as the query come first.
    """
    forms = (query.exact, query.folded)
    for form in (EXACT, FOLDED):
        if sources[0][form] == forms[form].whole:
            return form
    for form in (EXACT, FOLDED):
        if sources[0][form].startswith(forms[form].start):
            return 2 + form
    for number in range(1, len(sources) + 1):
        for form in (EXACT, FOLDED):
            if forms[form].are_in("".join(source[form] for source in sources[:number])):
                return 2 + 2 * number + form
    raise AssertionError("expected a row that matches the query")
