"""Optimistic locking: versions, `If-Match`, read-only members and the difference between two states of a row."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from core.errors import MAX_PROBLEMS, Conflict, FieldProblem, InvalidInput, PreconditionFailed
from repository.engine.transaction import former_values

Row = Mapping[str, Any]  # the values of a row by column

# The versions that If-Match allows; None allows any.
IfMatch = frozenset[int] | None

# Columns that change with every edit; a change to only these does not count as an edit.
BOOKKEEPING = frozenset({"version", "updated_at"})


def require_version(name: str, row: Mapping[str, Any], if_match: IfMatch) -> None:
    """Raise PreconditionFailed unless `if_match` allows the row's version. `name` is the kind of the row."""
    if if_match is not None and row["version"] not in if_match:
        raise PreconditionFailed(f"{name} {row['id']} is at version {row['version']} now")


def changed_names(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Return the names in `after` whose values differ from those in `before`, in the order of `after`."""
    return [name for name, value in after.items() if before[name] != value]


def editable(
    names: Collection[str], bodies: Sequence[Row], stored: Sequence[Row | None], *, bulk: bool = False
) -> list[Row]:
    """Return the members of bodies that are in `names`, which clients may edit. The other members must have their
    current values, so that clients can send back what GET returned.

    `stored` holds the row that each body edits, or None if there is no such row. Raises Conflict for another `version`,
    and InvalidInput for another value of another member.
    """
    outdated: list[FieldProblem] = []
    wrong: list[FieldProblem] = []
    made: list[Row] = []
    for index, (body, row) in enumerate(zip(bodies, stored, strict=True)):
        maintained = body.keys() - names
        made.append({name: value for name, value in body.items() if name not in maintained} if maintained else body)
        if not maintained or row is None:
            continue
        for name in body:
            if name not in maintained or body[name] == row[name] or len(outdated) + len(wrong) >= MAX_PROBLEMS:
                continue
            place = ("body", index, name) if bulk else ("body", name)
            current = orjson.dumps(row[name]).decode()
            if name == "version":
                outdated.append(FieldProblem(place, f"Expected the current version, {current}", "outdated"))
            else:
                message = f"Expected the current value, {current}, because clients cannot change it"
                wrong.append(FieldProblem(place, message, "read_only"))
    if outdated:
        raise Conflict(outdated)
    if wrong:
        raise InvalidInput(wrong)
    return made


def edited(row: dict[str, Any], fields: Row, relinked: Collection[str], now: str) -> tuple[dict[str, Any], list[str]]:
    """Return the edited row and the changed columns. Columns with other links than before (`relinked`) count as
    changed even if they show the same names.
    """
    changed = list(dict.fromkeys((*changed_names(row, fields), *relinked)))
    if not changed:
        return row, []
    return {**row, **fields, "version": row["version"] + 1, "updated_at": now}, changed


@dataclass(frozen=True, slots=True)
class EditedRows:
    """The rows that a bulk edit changes, before and after. `encoded_before` holds their former values.

    `encoded` also holds the rows that stay the same, in the order of the request.
    """

    before: list[dict[str, Any]]
    after: list[dict[str, Any]]
    encoded_before: list[bytes]
    encoded_after: list[bytes]
    changed: list[str]
    encoded: list[bytes]


def edit_all(
    found: Mapping[int, dict[str, Any]], edits: Mapping[int, Row], relinked: Mapping[int, Collection[str]], now: str
) -> EditedRows:
    """Return what edits, given by the ids of the rows, change. Pure, because it may run in a thread."""
    pairs = [edited(row, edits[entity_id], relinked[entity_id], now) for entity_id, row in found.items()]
    encoded = {row["id"]: orjson.dumps(row) for row, _ in pairs}
    after = [row for row, changed in pairs if changed]
    before = [found[row["id"]] for row in after]
    return EditedRows(
        before,
        after,
        [orjson.dumps(former_values(old, new)) for old, new in zip(before, after, strict=True)],
        [encoded[row["id"]] for row in after],
        list(dict.fromkeys(name for _, changed in pairs for name in changed)),
        [encoded[entity_id] for entity_id in edits if entity_id in encoded],
    )
