"""Watchlists. The entries of a user, and the events about them, are visible to that user only.

For everyone else, staff included, an entry does not exist.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import orjson
from sqlalchemy import and_, delete, func, select

import models
from core.errors import Conflict, FieldProblem, NotFound
from core.identity import Identity
from core.times import utc_now
from repository.engine.database import Database
from repository.engine.transaction import Transaction
from repository.generic import filter_sql, lists, rows
from repository.generic.lists import Listed, ListRequest
from repository.generic.versions import BOOKKEEPING, IfMatch, Row, changed_names, editable, require_version
from repository.generic.writes import Stored
from resources.watchlist import WATCHED, WATCHLIST

TABLE = models.watchlist
# Deleting an account deletes the whole watchlist in one transaction.
MAX_ENTRIES = 10_000


async def add(tx: Transaction, identity: Identity, fields: Row) -> Stored:
    """Add a movie to the user's watchlist and return the entry. Raises Conflict."""
    await _require_free(tx, identity.user_id, fields["movie_id"])
    mine = select(func.count()).select_from(TABLE).where(TABLE.c.user_id == identity.user_id)
    if (await tx.connection.execute(mine)).scalar_one() >= MAX_ENTRIES:
        raise Conflict(f"Your watchlist has {MAX_ENTRIES:,} entries, the maximum; delete one first")
    now = utc_now()
    written = {**WATCHLIST.defaults, **fields, "user_id": identity.user_id, **WATCHLIST.initial, "version": 1}
    written["watched_at"] = now if written["status"] == WATCHED else None
    values = rows.driver_values(TABLE, WATCHLIST.written, [written.values()], is_sqlite=tx.is_sqlite)
    ids = await rows.reserve_ids(tx, TABLE, 1)
    await rows.insert(tx, TABLE, WATCHLIST.written, ids, values, now)
    return _emitted(tx, "add", {"id": ids[0], **written, "created_at": now, "updated_at": now})


async def edit(tx: Transaction, identity: Identity, entry_id: int, fields: Row, if_match: IfMatch) -> Stored:
    """Set `fields` and return the whole entry. An edit that changes nothing emits no event.

    Raises NotFound, PreconditionFailed or Conflict.
    """
    before = await _own(tx, identity, entry_id, if_match)
    (fields,) = editable(WATCHLIST.defaults, [fields], [before])
    if fields.get("movie_id", before["movie_id"]) != before["movie_id"]:
        await _require_free(tx, identity.user_id, fields["movie_id"])
    now = utc_now()
    after = {**before, **fields}
    if after["status"] != WATCHED:
        after["watched_at"] = None
    elif before["status"] != WATCHED:
        after["watched_at"] = now
    changed = changed_names(before, after)
    if not changed:
        return Stored(entry_id, before["version"], orjson.dumps(before))
    after |= {"version": before["version"] + 1, "updated_at": now}
    await rows.write_back(tx, TABLE, [after], (*changed, *BOOKKEEPING))
    return _emitted(tx, "update", after, before, changed)


async def remove(tx: Transaction, identity: Identity, entry_id: int, if_match: IfMatch) -> None:
    """Delete an entry. Raises NotFound or PreconditionFailed."""
    before = await _own(tx, identity, entry_id, if_match)
    await tx.connection.execute(delete(TABLE).where(TABLE.c.id == entry_id))
    _emitted(tx, "delete", before, before)


def _emitted(
    tx: Transaction, operation: str, entry: dict[str, Any], before: Row | None = None, changed: list[str] | None = None
) -> Stored:
    """Emit an event to the sockets of the entry's owner, and return the entry."""
    audience, former = WATCHLIST.audience_of(entry), dict(before) if before is not None else None
    payload = tx.emit(
        WATCHLIST.name,
        operation,
        entry,
        actor_id=entry["user_id"],
        before=former,
        changed=changed or (),
        audience=audience,
    )
    return Stored(entry["id"], entry["version"], payload)


async def _own(tx: Transaction, identity: Identity, entry_id: int, if_match: IfMatch) -> dict[str, Any]:
    """Return an entry of the user, locked until COMMIT. Raises NotFound or PreconditionFailed."""
    found = await rows.fetch_locked(tx, TABLE, [entry_id])
    if not found or found[0]["user_id"] != identity.user_id:
        raise not_found(entry_id)
    require_version("Watchlist entry", found[0], if_match)
    return found[0]


async def _require_free(tx: Transaction, user_id: int, movie_id: int) -> None:
    """Raise Conflict unless the movie exists and the user's watchlist lacks it. Both remain true until COMMIT."""
    users, movies = models.users.c, models.movies.c
    # Lock the user, so that two requests cannot add the same movie, or two movies where there is room for one.
    await tx.connection.execute(select(users.id).where(users.id == user_id).with_for_update())
    movie = select(movies.id).where(movies.id == movie_id).with_for_update(read=True, key_share=True)
    if (await tx.connection.execute(movie)).first() is None:
        raise _conflict(f"There is no movie {movie_id}", "unknown_movie")
    listed = select(TABLE.c.id).where(TABLE.c.user_id == user_id, TABLE.c.movie_id == movie_id)
    if (await tx.connection.execute(listed)).first() is not None:
        raise _conflict(f"Your watchlist already has movie {movie_id}", "taken")


def _conflict(message: str, kind: str) -> Conflict:
    return Conflict([FieldProblem(("body", "movie_id"), message, kind)])


def not_found(entry_id: int) -> NotFound:
    return NotFound(f"Your watchlist has no entry {entry_id}")


# --- reading


async def find(database: Database, user_id: int, entry_id: int) -> Mapping[str, Any]:
    """Return an entry of the user. Raises NotFound or Unavailable."""
    found = await database.select(select(TABLE).where(TABLE.c.id == entry_id, TABLE.c.user_id == user_id))
    if not found:
        raise not_found(entry_id)
    return rows.entity(found[0])


async def page_of(database: Database, user_id: int, page: ListRequest) -> Listed[dict[str, Any]]:
    """Return a page of the user's watchlist. A search covers the notes and the titles of the movies.

    Raises Unavailable.
    """
    where = [TABLE.c.user_id == user_id, filter_sql.where(TABLE, page.filter, is_sqlite=database.is_sqlite)]
    if page.text:
        movies = models.movies.c
        title = select(movies.title).where(movies.id == TABLE.c.movie_id).correlate(TABLE).scalar_subquery()
        where.append(filter_sql.search_in([TABLE.c.notes, title], page.text, is_sqlite=database.is_sqlite))
    return await lists.entities_of(database, lists.ordering_of(WATCHLIST), and_(*where), dict, page)
