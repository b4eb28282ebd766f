"""What imports and exports know about the two formats of files with rows (see `repository.transfers.lines`). Pure."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence

from core.filters import FieldType
from repository.transfers.lines import ENDS, FileOptions, Format
from resources.resource import Resource

MEDIA_TYPES = {Format.CSV: "text/csv", Format.NDJSON: "application/x-ndjson"}
BOM = b"\xef\xbb\xbf"
# Texts with which spreadsheets begin a formula, after our own apostrophe and those that the text had before.
_SAFE = re.compile(r"'+[=+\-@\t\r]")


def unsafe(text: str) -> str:
    """Return the original of a text in a safe CSV file."""
    return text[1:] if text[:1] == "'" and _SAFE.match(text) else text


def kinds_of(resource: Resource) -> dict[str, FieldType]:
    """Return the type of each column that clients see."""
    return {field.column: field.kind for field in resource.fields.values()}


def head_of(columns: Sequence[str], options: FileOptions) -> bytes:
    """Return the beginning of a file, before its rows."""
    if options.format is Format.NDJSON:
        return b""
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator=ENDS[Format.CSV]).writerow(columns)
    return (BOM if options.has_bom else b"") + text.getvalue().encode()
