"""Reading the records of a file that arrives in pieces, with the number of each line. Pure.

Rules:
- A line ends with LF or CRLF. A record of NDJSON is one line; a record of CSV may have several, in quotes.
- A record that cannot be read is a problem of its first line, and reading continues with the next line. So one quote in
  the wrong place does not hide the lines after it.
- A record may have MAX_RECORD_BYTES. The rest of a longer line is skipped, even if it is in a later piece. A longer
  record with line breaks is a problem of its first line, like one that never ends.
- The time to read a piece grows with its size, wherever it has quotes.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import orjson

from repository.transfers.lines import Format
from services.transfers.formats import BOM

MAX_RECORD_BYTES = 256 * 1024  # several times as long as a movie whose texts have their maximum lengths
TOO_LONG = f"Expected a row of at most {MAX_RECORD_BYTES} bytes"
NOT_UTF8 = "Expected UTF-8"
UNCLOSED = "Expected a closing quote"
UNCLOSED_IN_TIME = f"{UNCLOSED} within {MAX_RECORD_BYTES} bytes"
_END_OF_DATA = "unexpected end of data"
# What the parser of CSV reports, in plain words.
_CSV_ERRORS = {
    _END_OF_DATA: UNCLOSED,
    "',' expected after '\"'": "Expected a comma after the closing quote, or the quotes in the text doubled",
    "new-line character seen in unquoted field - do you need to open the file in universal-newline mode?": (
        "Expected lines that end with LF or CRLF, or quotes around the text"
    ),
}


# Only MAX_RECORD_BYTES limits a cell, because a limit of the parser would depend on where a record begins.
csv.field_size_limit(2**31 - 1)


@dataclass(frozen=True, slots=True)
class Record:
    """A record that was read: the cells of CSV or the object of NDJSON, or what is wrong with it.

    `end` is the place after the record in the piece, and `next_line` the number of the line that begins there. `values`
    is None, without a problem, for an empty line.
    """

    line: int
    next_line: int
    end: int
    values: Any = None
    problem: str | None = None
    is_in_long_line: bool = False  # whether the rest of the line follows in the next piece, to be skipped


def records(
    format_: Format, piece: bytes, line: int, *, is_last: bool, is_in_long_line: bool = False
) -> Iterator[Record]:
    """Yield the records that begin in a piece of a file, in which the first line has the number `line`.

    The piece begins with a record or, with `is_in_long_line`, in a line whose rest is skipped. Unless the piece is the
    last one, a record that may continue in the next piece is left out.
    """
    begin = 0
    if is_in_long_line:
        end = piece.find(b"\n")
        if end < 0:
            yield Record(line, line + is_last, len(piece), is_in_long_line=not is_last)
            return
        begin, line = end + 1, line + 1
        yield Record(line - 1, line, begin)
    elif piece.startswith(BOM) and line == 1:
        begin = len(BOM)
    lines = piece[begin:].splitlines(keepends=True) if b"\r" not in piece else _split(piece[begin:])
    is_cut = bool(lines) and not is_last and not lines[-1].endswith(b"\n")
    rest = lines.pop() if is_cut else b""
    last = Record(line, line, begin)
    if format_ is Format.CSV:
        read = _csv_records(lines, line, begin, None if is_last else len(rest))
    else:
        read = _ndjson_records(lines, line, begin)
    for last in read:
        yield last
    if begin == len(piece) and line == 1:
        yield Record(1, 2, begin)  # of a file with nothing but a byte order mark
    if len(rest) >= MAX_RECORD_BYTES and last.end == len(piece) - len(rest):
        yield Record(last.next_line, last.next_line, len(piece), problem=TOO_LONG, is_in_long_line=True)


def _split(text: bytes) -> list[bytes]:
    """Split at LF only, because a CR alone does not end a line."""
    lines = text.split(b"\n")
    last = lines.pop()
    return [each + b"\n" for each in lines] + ([last] if last else [])


def _ndjson_records(lines: Sequence[bytes], line: int, end: int) -> Iterator[Record]:
    for number, text in enumerate(lines, line):
        end += len(text)
        if len(text) > MAX_RECORD_BYTES:
            yield Record(number, number + 1, end, problem=TOO_LONG)
            continue
        if not text.strip():
            yield Record(number, number + 1, end)
            continue
        try:
            value = orjson.loads(text)
        except orjson.JSONDecodeError as error:
            yield Record(number, number + 1, end, problem=NOT_UTF8 if _is_invalid(text) else f"Expected JSON: {error}")
            continue
        problem = None if isinstance(value, dict) else "Expected a JSON object"
        yield Record(number, number + 1, end, value if problem is None else None, problem)


def _csv_records(lines: Sequence[bytes], line: int, begin: int, rest: int | None) -> Iterator[Record]:
    """Yield the records in these lines. `rest` is the size of the cut line that follows, None in the last piece."""
    # Bytes that are not UTF-8 become surrogates, so that they do not hide where their record ends.
    texts = [text.decode(errors="surrogateescape") for text in lines]
    ends = list(accumulate(map(len, lines), initial=begin))
    tail = _Tail(0)
    place = 0
    while place < len(texts):
        stop = len(texts)
        if place < tail.last:
            if not _is_open(texts[place]):
                stop = place + 1
                while stop < tail.last and '"' not in texts[stop]:
                    stop += 1
            elif problem := tail.problem_from(place, ends, rest):
                yield Record(line + place, line + place + 1, ends[place + 1], problem=problem)
                place += 1
                continue
            elif tail.last == len(texts):
                return  # the record may continue in the next piece
        start = place
        reader = csv.reader(map(texts.__getitem__, range(start, stop)), strict=True)
        try:
            for cells in reader:
                first, place = place, start + reader.line_num
                if place - first > 1 and ends[place] - ends[first] > MAX_RECORD_BYTES:
                    tail, place = _Tail(place - 1), first
                    break
                values, problem = _checked(cells, ends[place] - ends[first])
                yield Record(line + first, line + place, ends[place], values, problem)
        except csv.Error as error:
            problem = _CSV_ERRORS.get(str(error), f"Expected valid CSV: {error}")
            last = len(texts) if problem == UNCLOSED else start + reader.line_num - 1
            if last > place:
                tail = _Tail(last, problem)
            else:
                yield Record(line + place, line + place + 1, ends[place + 1], problem=problem)
                place += 1


@dataclass(frozen=True, slots=True)
class _Tail:
    """The end of a record with line breaks in quotes, which is known for some of the lines after it.

    A record that begins in one of these lines, and is open at the end of that line, ends in the line `last` or, if
    `last` is the number of lines, beyond the piece. `problem` is what is wrong there.
    """

    last: int
    problem: str | None = None

    def problem_from(self, first: int, ends: Sequence[int], rest: int | None) -> str | None:
        """Return what is wrong with the record that begins in the line `first`. `rest` is as in `_csv_records`."""
        is_beyond = self.last == len(ends) - 1
        # A line with a problem is not a part of the record.
        end = ends[-1] + (rest or 0) if is_beyond else ends[self.last if self.problem else self.last + 1]
        if end - ends[first] > MAX_RECORD_BYTES:
            return UNCLOSED_IN_TIME
        return None if is_beyond and rest is not None else self.problem


def _is_open(text: str) -> bool:
    """Return whether a record that begins in this line continues in the next line."""
    if '"' not in text:
        return False
    try:
        list(csv.reader([text], strict=True))
    except csv.Error as error:
        return str(error) == _END_OF_DATA
    return False


def _checked(cells: list[str], size: int) -> tuple[list[str] | None, str | None]:
    if size > MAX_RECORD_BYTES:
        return None, TOO_LONG
    if not cells:
        return None, None
    try:
        "".join(cells).encode()
    except UnicodeEncodeError:
        return None, NOT_UTF8
    return cells, None


def _is_invalid(text: bytes) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError:
        return True
    return False
