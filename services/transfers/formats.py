"""The two formats of files with rows, as exports write them and imports read them. Pure.

NDJSON has one JSON object in each line, in UTF-8. CSV is RFC 4180: the first record holds the names of the columns,
lines end with CRLF, lists are JSON in one cell, and null is an empty cell. So an empty text becomes null when it is
imported.

Spreadsheets run some texts as formulas. A "safe" CSV file has an apostrophe before each text that a spreadsheet might
run, and before each text that has such an apostrophe already, so that it can be removed again without loss.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import orjson

from core.filters import FieldType
from resources.resource import Resource


class Format(StrEnum):
    """The format of a file. The value is the ending of the file's name."""

    CSV = "csv"
    NDJSON = "ndjson"


MEDIA_TYPES = {Format.CSV: "text/csv", Format.NDJSON: "application/x-ndjson"}
BOM = b"\xef\xbb\xbf"
# Texts with which spreadsheets begin a formula, after any number of our own apostrophes.
_FORMULA = re.compile(r"'*[=+\-@\t\r]")
_STARTS = frozenset("'=+-@\t\r")

Encode = Callable[[Iterable[list[Any]]], bytes]


@dataclass(frozen=True, slots=True)
class FileOptions:
    """How a file is written. The options for CSV have no effect on NDJSON."""

    format: Format
    has_bom: bool = False
    is_safe: bool = False


def safe(text: str) -> str:
    """Return a text that no spreadsheet takes for a formula."""
    return f"'{text}" if text[:1] in _STARTS and _FORMULA.match(text) else text


def unsafe(text: str) -> str:
    """Return the text from which `safe` made this one."""
    return text[1:] if text[:1] == "'" and _FORMULA.match(text) else text


def kinds_of(resource: Resource) -> dict[str, FieldType]:
    """Return the type of each column that clients see."""
    return {field.column: field.kind for field in resource.fields.values()}


def head_of(columns: Sequence[str], options: FileOptions) -> bytes:
    """Return the beginning of a file, before its rows."""
    if options.format is Format.NDJSON:
        return b""
    return (BOM if options.has_bom else b"") + _csv([columns])


def encoder(resource: Resource, columns: Sequence[str], options: FileOptions) -> Encode:
    """Return the function that encodes rows, which have these columns in this order. Lists in the rows are JSON."""
    return (
        _ndjson_encoder(resource, columns)
        if options.format is Format.NDJSON
        else _csv_encoder(resource, columns, options)
    )


def _ndjson_encoder(resource: Resource, columns: Sequence[str]) -> Encode:
    kinds = kinds_of(resource)
    lists = [place for place, name in enumerate(columns) if kinds[name] is FieldType.STRINGS]

    def encode(rows: Iterable[list[Any]]) -> bytes:
        lines = []
        for row in rows:
            for place in lists:
                row[place] = orjson.Fragment(row[place])
            lines.append(orjson.dumps(dict(zip(columns, row, strict=True)), option=orjson.OPT_APPEND_NEWLINE))
        return b"".join(lines)

    return encode


def _csv_encoder(resource: Resource, columns: Sequence[str], options: FileOptions) -> Encode:
    kinds = kinds_of(resource)
    booleans = [place for place, name in enumerate(columns) if kinds[name] is FieldType.BOOLEAN]
    texts = [place for place, name in enumerate(columns) if kinds[name] is FieldType.TEXT] if options.is_safe else []

    def written(rows: Iterable[list[Any]]) -> Iterator[list[Any]]:
        for row in rows:
            for place in booleans:
                row[place] = None if row[place] is None else str(row[place]).lower()
            for place in texts:
                if row[place]:
                    row[place] = safe(row[place])
            yield row

    return lambda rows: _csv(written(rows) if booleans or texts else rows)


def _csv(records: Iterable[Iterable[Any]]) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\r\n").writerows(records)
    return text.getvalue().encode()
