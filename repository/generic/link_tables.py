"""Reads and writes the tables of links, and locks the linked rows, directly through the database drivers."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import orjson

from repository.engine.statement import Statement
from repository.engine.transaction import Transaction
from repository.generic import rows
from resources.resource import Link

COPIED_LINKS = 50  # PostgreSQL stores a larger number of links faster with COPY


@dataclass(slots=True)
class Found:
    """Locked rows by id and, for each key column of the link, the ids of the rows by their keys."""

    rows: dict[int, dict[str, Any]] = field(default_factory=dict)
    keys: list[dict[str, list[int]]] = field(default_factory=list)

    def named(self, key: str) -> list[int]:
        """Return the ids of the rows that a name with this key may mean, in ascending order."""
        return next((found[key] for found in self.keys if key in found), [])

    def merge(self, other: Found) -> None:
        self.rows |= other.rows
        self.keys = [mine | theirs for mine, theirs in zip(self.keys, other.keys, strict=True)]


@cache
def _lock_statement(link: Link, has_ids: bool, has_keys: bool) -> Statement:
    resource = link.resource
    columns = ", ".join(f'"{name}"' for name in (*resource.columns, *link.keys))
    table = f'"{resource.table.name}"'
    postgresql, sqlite = [], []
    number = 0
    if has_ids:
        number = 1
        postgresql.append("id = ANY($1::bigint[])")
        sqlite.append("id IN (SELECT value FROM json_each(?))")
    for key in link.keys if has_keys else ():
        number += 1
        if resource.table.c[key].unique:
            postgresql.append(f'"{key}" = ANY(${number}::text[])')
            sqlite.append(f'"{key}" IN (SELECT value FROM json_each(?))')  # noqa: S608 (names of our own tables)
            continue
        # Very many rows may have the same name, so only the first and the last of them are read.
        ends = " UNION ALL ".join(
            f'SELECT (SELECT {end}(id) FROM {table} WHERE "{key}" = wanted.value) FROM wanted'  # noqa: S608 (names of our own tables)
            for end in ("min", "max")
        )
        form = f"(WITH wanted(value) AS ({{}}) {ends})"
        # PostgreSQL searches the index for the values of an array even if there is an OR, but not for those of a query.
        postgresql.append("id = ANY(ARRAY" + form.format(f"SELECT unnest(${number}::text[])") + ")")
        sqlite.append("id IN " + form.format("SELECT value FROM json_each(?)"))  # noqa: S608 (names of our own tables)
    query = f"SELECT {columns} FROM {table} WHERE "  # noqa: S608 (names of our own tables)
    return Statement(
        f"{query}{' OR '.join(sqlite)} ORDER BY id", f"{query}{' OR '.join(postgresql)} ORDER BY id FOR UPDATE"
    )


async def lock(tx: Transaction, link: Link, ids: Collection[int], keys: Collection[str]) -> Found:
    """Return the linked rows with these ids, or with names that have these keys, locked until COMMIT.

    Of the rows with the same name, only the first and the last are returned.
    """
    found = Found(keys=[{} for _ in link.keys])
    if not ids and not keys:
        return found
    sql = _lock_statement(link, bool(ids), bool(keys))
    values: list[list[Any]] = [sorted(ids)] if ids else []
    values += [sorted(keys)] * (len(link.keys) if keys else 0)
    driver = await tx.driver()
    if tx.is_sqlite:
        listed = await driver.execute_fetchall(sql.sqlite, [orjson.dumps(each).decode() for each in values])
    else:
        listed = await driver.fetch(sql.postgresql, *values)
    await rows.off_the_loop(len(listed), _take, found, link, listed)
    return found


def _take(found: Found, link: Link, listed: Sequence[Sequence[Any]]) -> None:
    columns = link.resource.columns
    made = rows.from_driver(link.resource.table, [row[: len(columns)] for row in listed])
    for row, raw in zip(made, listed, strict=True):
        found.rows[row["id"]] = row
        for by_key, key in zip(found.keys, raw[len(columns) :], strict=True):
            by_key.setdefault(key, []).append(row["id"])


async def linked_ids(tx: Transaction, link: Link, owner_ids: Sequence[int]) -> dict[int, list[int]]:
    """Return, by the id of each row with links, the ids of its linked rows, in the order in which it shows them."""
    assert link.table is not None
    linked, owner = link.ids
    found: dict[int, list[int]] = {}
    driver = await tx.driver()
    if not owner_ids:
        return found
    chosen = "IN (SELECT value FROM json_each(?))" if tx.is_sqlite else "= ANY($1::bigint[])"
    query = (
        f'SELECT "{owner}", "{linked}" FROM "{link.table.name}" WHERE "{owner}" {chosen}'  # noqa: S608 (names of our own tables)
        f' ORDER BY "{owner}", position'
    )
    if tx.is_sqlite:
        listed = await driver.execute_fetchall(query, (orjson.dumps(list(owner_ids)).decode(),))
    else:
        listed = await driver.fetch(query, list(owner_ids))
    for owner_id, linked_id in listed:
        found.setdefault(owner_id, []).append(linked_id)
    return found


async def delete(tx: Transaction, link: Link, ids: Sequence[int], *, of_linked: bool = False) -> None:
    """Delete the links of the rows with these ids: rows that show others or, with `of_linked`, rows that are shown."""
    if not ids:
        return
    assert link.table is not None
    column = link.table.c[link.ids[0 if of_linked else 1]]
    await tx.connection.execute(link.table.delete().where(rows.one_of(tx.is_sqlite, column, list(ids))))


async def insert(tx: Transaction, link: Link, made: Iterable[tuple[int, Sequence[int]]]) -> None:
    """Insert links, given by the id of each row and the ids of the rows that it shows."""
    assert link.table is not None
    records = [(linked, owner, place) for owner, ids in made for place, linked in enumerate(ids)]
    if records:
        await rows.insert_records(tx, link.table, (*link.ids, "position"), records, few=COPIED_LINKS)
