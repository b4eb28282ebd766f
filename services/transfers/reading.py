"""Reading the records of a file that arrives in pieces, with the number of each line. Pure.

Rules:
- A line ends with LF or CRLF. A record of NDJSON is one line; a record of CSV may have several, in quotes.
- A record that cannot be read is a problem of its first line, and reading continues with the next line. So one quote in
  the wrong place does not hide the lines after it.
- A record may have MAX_RECORD_BYTES. The rest of a longer line is skipped, even if it is in a later piece.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice
from typing import Any

import orjson

from services.transfers.formats import BOM, Format

MAX_RECORD_BYTES = 256 * 1024  # several times as long as a movie whose texts have their maximum lengths
TOO_LONG = f"Expected a row of at most {MAX_RECORD_BYTES} bytes"
NOT_UTF8 = "Expected UTF-8"
UNCLOSED = "Expected a closing quote"
# What the parser of CSV reports, in plain words.
_CSV_ERRORS = {
    "unexpected end of data": UNCLOSED,
    "',' expected after '\"'": "Expected a comma after the closing quote, or the quotes in the text doubled",
    "new-line character seen in unquoted field - do you need to open the file in universal-newline mode?": (
        "Expected lines that end with LF or CRLF, or quotes around the text"
    ),
}


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
    read = _csv_records if format_ is Format.CSV else _ndjson_records
    last = Record(line, line, begin)
    for last in read(lines, line, begin, is_last):
        yield last
    if len(rest) >= MAX_RECORD_BYTES and last.end == len(piece) - len(rest):
        yield Record(last.next_line, last.next_line, len(piece), problem=TOO_LONG, is_in_long_line=True)


def _split(text: bytes) -> list[bytes]:
    """Split at LF only, because a CR alone does not end a line."""
    lines = text.split(b"\n")
    last = lines.pop()
    return [each + b"\n" for each in lines] + ([last] if last else [])


def _ndjson_records(lines: Sequence[bytes], line: int, end: int, is_last: bool) -> Iterator[Record]:
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


def _csv_records(lines: Sequence[bytes], line: int, begin: int, is_last: bool) -> Iterator[Record]:
    # Bytes that are not UTF-8 become surrogates, so that they do not hide where their record ends.
    texts = [text.decode(errors="surrogateescape") for text in lines]
    ends = list(accumulate(map(len, lines), initial=begin))
    place = 0
    while place < len(texts):
        start = place
        reader = csv.reader(islice(texts, start, None), strict=True)
        try:
            for cells in reader:
                first, place = place, start + reader.line_num
                values, problem = _checked(cells, ends[place] - ends[first])
                yield Record(line + first, line + place, ends[place], values, problem)
        except csv.Error as error:
            problem = _CSV_ERRORS.get(str(error), f"Expected valid CSV: {error}")
            if problem == UNCLOSED and not is_last:
                if ends[-1] - ends[place] <= MAX_RECORD_BYTES:
                    return  # the record may continue in the next piece
                problem = f"{UNCLOSED} within {MAX_RECORD_BYTES} bytes"
            yield Record(line + place, line + place + 1, ends[place + 1], problem=problem)
            place += 1


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
