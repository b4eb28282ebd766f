"""Reads a topic page by page, each page with the log number at which it was read.

A page is read by one statement, so its rows and its number belong together. Later pages show later states;
`realtime.fanout.snapshot` merges the pages into one state.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Table, and_, func, select, text, true

import models
from core.filters import Filter
from repository import jobs
from repository.accounts import audit, sessions, users
from repository.engine.database import Database
from repository.engine.engines import Lane
from repository.engine.events import Head, head_of
from repository.generic import filter_sql, rows
from resources.derived import visible_columns
from resources.registry import RESOURCES


@dataclass(frozen=True, slots=True)
class Source:
    """The table of a topic's rows, and which rows of the table belong to the topic."""

    table: Table
    public: Callable[[Mapping[str, Any]], dict[str, Any]] = dict
    exists: Callable[[], ColumnElement[bool]] = true
    owner: str | None = None  # the column with the user id, if each user sees only their own rows


SOURCES: Mapping[str, Source] = {
    **{each.name: Source(each.table, owner="user_id" if each.audience == "self" else None) for each in RESOURCES},
    "jobs": Source(models.jobs, jobs.public),
    "users": Source(models.users, users.public, users.exists),
    "account": Source(models.users, users.public, users.exists, owner="id"),
    "sessions": Source(models.sessions, sessions.public, sessions.goes_on, owner="user_id"),
    "audit": Source(models.audit, audit.public),
}


@dataclass(frozen=True, slots=True)
class SnapshotPage:
    """A page of a snapshot. `rows` match the filter and are in order of id. With `is_last`, no page follows."""

    head: Head
    rows: list[dict[str, Any]]
    is_last: bool


async def read_page(
    database: Database,
    topic: str,
    wanted: Filter,
    *,
    owner_id: int | None,
    after: int | str | None,
    until: int | None,
    max_rows: int,
) -> SnapshotPage:
    """Return at most `max_rows` rows with `after < id <= until`. Raises Unavailable."""
    source = SOURCES[topic]
    table = source.table
    where = [source.exists(), filter_sql.where(table, wanted, is_sqlite=database.is_sqlite)]
    if source.owner is not None:
        where.append(table.c[source.owner] == owner_id)
    if after is not None:
        where.append(table.c.id > after)
    if until is not None:
        where.append(table.c.id <= until)
    head = models.event_head
    page = select(table).where(and_(*where)).order_by(table.c.id).limit(max_rows).subquery("page")
    # The columns are given as text, so that they come in the driver's form: converting them to objects costs more than
    # reading them. The outer join returns the head even without rows.
    columns = text(", ".join(f'"page"."{name}"' for name in visible_columns(table)))
    query = select(head.c.epoch, head.c.seq, columns).select_from(head.outerjoin(page, true()))
    lane = Lane.COSTLY if filter_sql.is_costly(wanted) else Lane.LIST
    found = await database.select(query.order_by(page.c.id), lane, patient=True)
    position = head_of(found)
    listed = [row[2:] for row in found] if found[0][2] is not None else []
    made = await rows.off_the_loop(len(listed), _entities, source, listed)
    return SnapshotPage(position, made, len(listed) < max_rows)


def _entities(source: Source, found: Sequence[Sequence[Any]]) -> list[dict[str, Any]]:
    return [source.public(row) for row in rows.from_driver(source.table, found)]


@dataclass(frozen=True, slots=True)
class Beginning:
    """The head of the log, and each topic's highest id at that moment, or None if its ids are not chronological."""

    head: Head
    highest: Mapping[str, int | None]


async def beginning(database: Database, topics: Sequence[str]) -> Beginning:
    """Return where a snapshot of these topics begins. Raises Unavailable."""
    head = models.event_head
    numbered = [topic for topic in topics if SOURCES[topic].table.c.id.type.python_type is int]
    highest = [select(func.max(SOURCES[topic].table.c.id)).scalar_subquery() for topic in numbered]
    found = await database.select(select(head.c.epoch, head.c.seq, *highest))
    position = head_of(found)
    newest = {topic: number or 0 for topic, number in zip(numbered, found[0][2:], strict=True)}
    return Beginning(position, {topic: newest.get(topic) for topic in topics})
