"""Rows of an imported file: from cells and objects to valid fields, or to what is wrong with them. Pure.

A row without an id is added, and has the fields of the resource's body. A row with an id changes only the fields that
the file names. Fields that the service maintains may be in the file, so that an exported file can be imported; they are
ignored.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import orjson
from pydantic import BaseModel, ValidationError

from core.errors import MAX_MEMBERS, MAX_SUGGESTIONS, FieldProblem, words_of
from core.filters import FieldType
from core.texts.shortened import shortened
from core.texts.suggestions import Unknown
from repository.transfers.lines import Format
from resources.resource import Resource
from schemas import MAX_ID
from services.transfers.formats import kinds_of, unsafe
from services.transfers.reading import Record

MAX_PROBLEMS_OF_ROW = 10
MAX_REASON_LENGTH = 300
_INTEGER = re.compile(r"-?[0-9]{1,19}")


class RowProblem(NamedTuple):
    """What is wrong with a row: the number of its first line, the field, or an empty string, and the reason."""

    line: int
    field: str
    reason: str


@dataclass(frozen=True, slots=True)
class Row:
    """A valid row. `id` is that of the entity to change, or None for a new one."""

    line: int
    id: int | None
    fields: dict[str, Any]


def columns_of(resource: Resource, header: Sequence[str]) -> list[FieldProblem]:
    """Return what is wrong with the header of a CSV file."""
    known = resource.columns
    if len(header) > MAX_MEMBERS:
        return [FieldProblem(("body",), f"Expected at most {MAX_MEMBERS} columns, got {len(header):,}", "too_long")]
    problems = [
        FieldProblem(
            ("body", name), f"Expected columns from {', '.join(known)}", "unknown_column", Unknown(name, known)
        )
        for name in dict.fromkeys(header)
        if name not in known
    ]
    problems += [
        FieldProblem(("body", name), "Expected each column at most once", "repeated")
        for name in dict.fromkeys(header)
        if header.count(name) > 1
    ]
    if not problems and not set(header) & resource.defaults.keys():
        expected = f"Expected at least one of the columns {', '.join(resource.defaults)}"
        problems.append(FieldProblem(("body",), expected, "no_columns"))
    return problems


class Checker:
    """Checks the records of one file. `columns` is the header of a CSV file."""

    def __init__(self, resource: Resource, format_: Format, columns: Sequence[str], *, is_safe: bool) -> None:
        self._resource = resource
        self._columns = columns
        self._is_csv = format_ is Format.CSV
        self._kinds = kinds_of(resource)
        self._is_safe = is_safe
        self._suggested: dict[str, str | None] = {}  # for the first unknown names of the file
        self._maintained = frozenset(resource.columns) - resource.defaults.keys() - {"id"}

    def check(self, record: Record) -> Row | list[RowProblem] | None:
        """Return the row of a record, its problems, or None for an empty line."""
        line = record.line
        if record.problem is not None:
            return [RowProblem(line, "", record.problem)]
        if record.values is None:
            return None
        if self._is_csv:
            if len(record.values) != len(self._columns):
                reason = f"Expected {len(self._columns)} cells, got {len(record.values)}"
                return [RowProblem(line, "", reason)]
            values = self._from_cells(record.values)
        else:
            values = {name: value for name, value in record.values.items() if name not in self._maintained}
        id_ = values.pop("id", None)
        if id_ is None:
            return self._valid(line, None, self._resource.body, values)
        if isinstance(id_, bool) or not isinstance(id_, int) or not 1 <= id_ <= MAX_ID:
            return [RowProblem(line, "id", "Expected a positive integer")]
        return self._valid(line, id_, self._resource.patch, values)

    def _from_cells(self, cells: Sequence[str]) -> dict[str, Any]:
        """Return the values of cells that clients may write, and the id."""
        values: dict[str, Any] = {}
        for name, cell in zip(self._columns, cells, strict=True):
            if name in self._maintained:
                continue
            kind = self._kinds[name]
            if not cell:
                values[name] = self._resource.defaults.get(name)
            elif kind is FieldType.TEXT:
                values[name] = unsafe(cell) if self._is_safe else cell
            elif kind is FieldType.INTEGER:
                values[name] = int(cell) if _INTEGER.fullmatch(cell) else cell
            elif kind in _CELLS:
                values[name] = _CELLS[kind](cell)
            else:
                values[name] = cell
        return values

    def _valid(
        self, line: int, id_: int | None, model: type[BaseModel], values: Mapping[str, Any]
    ) -> Row | list[RowProblem]:
        if MAX_PROBLEMS_OF_ROW < len(values) <= MAX_MEMBERS and not self._is_csv:
            # Pydantic would find all unknown fields, however many of them are reported.
            unknown = [name for name in values if name not in model.model_fields]
            if len(unknown) > MAX_PROBLEMS_OF_ROW:
                return [self._unknown(line, name) for name in unknown[:MAX_PROBLEMS_OF_ROW]]
        try:
            checked = model.model_validate(values)
        except ValidationError as error:
            found = error.errors(include_url=False, include_context=False, include_input=False)
            return [self._problem(line, each) for each in found[:MAX_PROBLEMS_OF_ROW]]
        # Bodies hold only plain values and lists, so `model_dump` would take time and change nothing.
        fields = checked.__dict__
        return Row(line, id_, {**fields} if id_ is None else {name: fields[name] for name in checked.model_fields_set})

    def _problem(self, line: int, error: Any) -> RowProblem:
        if error["type"] == "extra_forbidden":
            return self._unknown(line, str(error["loc"][0]))
        field, reason = shortened(".".join(map(str, error["loc"]))), words_of(error)
        return RowProblem(line, field, shortened(reason[:1].upper() + reason[1:], MAX_REASON_LENGTH))

    def _unknown(self, line: int, name: str) -> RowProblem:
        if name not in self._suggested and len(self._suggested) < MAX_SUGGESTIONS:
            self._suggested[name] = Unknown(name, self._resource.columns).nearest()
        nearest = self._suggested.get(name)
        reason = "Unknown field" if nearest is None else f"Unknown field; did you mean {nearest}?"
        return RowProblem(line, shortened(name), reason)


def _list(cell: str) -> Any:
    try:
        return orjson.loads(cell)
    except orjson.JSONDecodeError:
        return cell  # which the model rejects


def _boolean(cell: str) -> Any:
    return {"true": True, "false": False}.get(cell, cell)


_CELLS: Mapping[FieldType, Callable[[str], Any]] = {FieldType.STRINGS: _list, FieldType.BOOLEAN: _boolean}
