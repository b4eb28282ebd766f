"""The lines of a file of rows, as SQL, so that the database encodes them. Python would take several times as long, and
all other requests of the worker would wait meanwhile.

NDJSON has one JSON object on each line, in UTF-8. CSV is RFC 4180: the first record holds the names of the columns,
lines end with CRLF, lists are JSON in one cell, and null is an empty cell. So an empty text becomes null when it is
imported.

Spreadsheets run some texts as formulas. A "safe" CSV file has an apostrophe before each text that a spreadsheet might
run, and before each text that has such an apostrophe already, so that the added ones can be removed without loss.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from sqlalchemy import JSON, Boolean, Column, Float, Integer, Table

from core.databases.columns import IsoDate, UtcTime


class Format(StrEnum):
    """The format of a file. The value is the ending of the file's name."""

    CSV = "csv"
    NDJSON = "ndjson"


@dataclass(frozen=True, slots=True)
class FileOptions:
    """How a file is written. The options for CSV have no effect on NDJSON."""

    format: Format
    has_bom: bool = False
    is_safe: bool = False


ENDS = {Format.CSV: "\r\n", Format.NDJSON: "\n"}
# The columns that are not texts, as the texts that clients see. Numbers, times and dates need no quotes in CSV.
_SQLITE: Mapping[type, str] = {
    Integer: "{}",
    Float: "{}",
    UtcTime: "{}",
    IsoDate: "{}",
    Boolean: "CASE {} WHEN 1 THEN 'true' WHEN 0 THEN 'false' END",
}
_POSTGRESQL: Mapping[type, str] = {
    Integer: "{}::text",
    # As SQLite and JSON write it: with a fraction.
    Float: "CASE WHEN {0} = trunc({0}) THEN {0}::bigint || '.0' ELSE {0}::text END",
    UtcTime: """to_char({} AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"')""",
    IsoDate: "to_char({}, 'YYYY-MM-DD')",
    Boolean: "{}::text",
}
_QUOTED = (UtcTime, IsoDate)  # strings in JSON that hold no character with a meaning


def line_of(table: Table, columns: Sequence[str], options: FileOptions, *, is_sqlite: bool) -> str:
    """Return the SQL expression of a row's line, without its end."""
    found = [table.c[name] for name in columns]
    line = _object if options.format is Format.NDJSON else _record
    return line(found, is_safe=options.is_safe, is_sqlite=is_sqlite)


def _object(columns: Sequence[Column[object]], *, is_safe: bool, is_sqlite: bool) -> str:
    if is_sqlite:
        return f"json_object({', '.join(map(_sqlite_member, columns))})"
    members = ",".join(f'"{column.name}":%s' for column in columns)
    return f"format('{{{members}}}', {', '.join(map(_postgresql_value, columns))})"


def _sqlite_member(column: Column[object]) -> str:
    is_json = isinstance(column.type, JSON | Boolean)
    value = _form(column, is_sqlite=True) or f'"{column.name}"'
    return f"'{column.name}', " + (f"json({value})" if is_json else value)


def _postgresql_value(column: Column[object]) -> str:
    """Return the SQL of a value as the text of its JSON."""
    name = f'"{column.name}"'
    if isinstance(column.type, JSON):
        value = f"{name}::text"
    elif form := _form(column, is_sqlite=False):
        value = f"""'"' || {form} || '"'""" if isinstance(column.type, _QUOTED) else form
    else:
        value = f"to_json({name})::text"
    return f"coalesce({value}, 'null')"


def _form(column: Column[object], is_sqlite: bool) -> str | None:
    forms = _SQLITE if is_sqlite else _POSTGRESQL
    form = next((form for kind, form in forms.items() if isinstance(column.type, kind)), None)
    return form.format(f'"{column.name}"') if form is not None else None


def _record(columns: Sequence[Column[object]], *, is_safe: bool, is_sqlite: bool) -> str:
    cells = ", ".join(_cell(column, is_safe, is_sqlite) for column in columns)
    if is_sqlite:
        line = f"printf('{','.join(['%s'] * len(columns))}', {cells})"
    else:
        line = f"array_to_string(ARRAY[{cells}], ',', '')"
    # A record with a single empty cell would look like an empty line.
    return line if len(columns) > 1 else f"""coalesce(nullif({line}, ''), '""')"""


def _cell(column: Column[object], is_safe: bool, is_sqlite: bool) -> str:
    """Return the SQL of a value as a cell of CSV, null for an empty cell."""
    if form := _form(column, is_sqlite):
        return form
    text, prefix = f'"{column.name}"', ""
    if isinstance(column.type, JSON):
        text = text if is_sqlite else f"{text}::text"
    elif is_safe:
        starts = "'=', '+', '-', '@', " + ", ".join(f"{'char' if is_sqlite else 'chr'}({code})" for code in (9, 13))
        prefix = f"CASE WHEN substr(ltrim({text}, ''''), 1, 1) IN ({starts}) THEN '''' ELSE '' END || "
    if is_sqlite:
        special = " OR ".join(f"instr({text}, {each})" for each in ("'\"'", "','", "char(10)", "char(13)"))
    else:
        special = rf"""{text} ~ '[",\r\n]'"""
    return f"""CASE WHEN {special} THEN '"' || {prefix}replace({text}, '"', '""') || '"' ELSE {prefix}{text} END"""
