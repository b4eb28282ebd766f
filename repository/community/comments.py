"""Writing comments and replies.

Rules:
- Every write that adds or deletes comments first locks the movie, then comments in order of id. So writes that change
  the counts of one movie take turns, and no two of them can deadlock. A comment never moves to another movie or parent.
- A comment that has replies is not removed when it is deleted: it keeps its place without its text and author. It is
  removed together with its last reply. So below every deleted comment, there is a reply that is not deleted.
- Counts include the deleted comments that keep their place, as lists do.
- MAX_DEPTH bounds how many comments are removed along with a last reply. Reads do not depend on it (`comment_trees`).
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import orjson
import sqlalchemy as sa
from sqlalchemy import select

from core.errors import Conflict, NotFound
from core.identity import Identity
from core.times import utc_now
from repository import search
from repository.accounts import audit
from repository.engine.transaction import MAX_EVENT_ITEMS, Transaction
from repository.generic import relations, rows
from repository.generic.versions import BOOKKEEPING, IfMatch, Row, changed_names, editable, require_version
from repository.generic.writes import BulkResult, Stored
from resources.comments import COMMENTS
from resources.movies import MOVIES
from resources.resource import Parent

# Deleting the last reply of a deleted comment removes that comment, too, and so on up to the top.
MAX_DEPTH = 100
MAX_ABOVE = 10_000  # the comments above those that one transaction deletes, as far as they may change

TABLE = COMMENTS.table
_REPLIES = Parent("parent_id", COMMENTS, count="replies_count")
(_MOVIE,) = COMMENTS.parents
Rows = Sequence[dict[str, Any]]
_WRITTEN = ("text", "user_id", "deleted", "replies_count", *sorted(BOOKKEEPING))


# --- adding and editing


async def add(tx: Transaction, identity: Identity, movie_id: int, text: str) -> Stored:
    """Store a comment on a movie and return it. Raises NotFound or Forbidden."""
    COMMENTS.require_may_create(identity)
    if not await _lock_movies(tx, [movie_id]):
        raise NotFound(f"There is no movie {movie_id}")
    return await _insert(tx, identity, text, movie_id, None)


async def reply(tx: Transaction, identity: Identity, comment_id: int, text: str) -> Stored:
    """Store a reply to a comment and return the reply. Raises NotFound, Forbidden or Conflict."""
    COMMENTS.require_may_create(identity)
    parent = _only(await _lock(tx, [comment_id]), comment_id)
    if parent["depth"] >= MAX_DEPTH:
        raise Conflict(f"Comment {comment_id} has {MAX_DEPTH} comments above it; expected fewer, to reply to it")
    return await _insert(tx, identity, text, parent["movie_id"], parent)


async def _insert(tx: Transaction, identity: Identity, text: str, movie_id: int, parent: Row | None) -> Stored:
    row = {
        "text": text,
        "user_id": identity.user_id,
        "movie_id": movie_id,
        "parent_id": parent["id"] if parent is not None else None,
        "depth": parent["depth"] + 1 if parent is not None else 0,
        "deleted": False,
        "edited_at": None,
        "replies_count": 0,
        "version": 1,
    }
    now = utc_now()
    ids = await rows.reserve_ids(tx, TABLE, 1)
    values = rows.driver_values(TABLE, tuple(row), [row.values()], is_sqlite=tx.is_sqlite)
    await rows.insert(tx, TABLE, tuple(row), ids, values, now)
    await search.insert(tx, COMMENTS, ids, search.index_rows(COMMENTS, [row]))
    added = {"id": ids[0], **row, "created_at": now, "updated_at": now}
    payload = tx.emit(COMMENTS.name, "add", added, actor_id=identity.user_id)
    if parent is not None:
        await relations.add_to_parents(tx, _REPLIES, Counter({parent["id"]: 1}), identity.user_id)
    await relations.add_to_parents(tx, _MOVIE, Counter({movie_id: 1}), identity.user_id)
    return Stored(ids[0], 1, payload)


async def edit(tx: Transaction, identity: Identity, comment_id: int, fields: Row, if_match: IfMatch) -> Stored:
    """Set the text and return the whole comment. An edit that changes nothing emits no event.

    Raises NotFound, Forbidden, PreconditionFailed, or Conflict for a deleted comment.
    """
    before = _only(await rows.fetch_locked(tx, TABLE, [comment_id]), comment_id)
    COMMENTS.require_may_change(identity, [before])
    require_version("Comment", before, if_match)
    (fields,) = editable(COMMENTS.defaults, [fields], [before])
    if not changed_names(before, fields):
        return Stored(comment_id, before["version"], orjson.dumps(before))
    now = utc_now()
    after = {**before, **fields, "edited_at": now, "version": before["version"] + 1, "updated_at": now}
    await rows.write_back(tx, TABLE, [after], ("text", "edited_at", *BOOKKEEPING))
    await search.update(tx, COMMENTS, [before], [after])
    changed = ["text", "edited_at"]
    payload = tx.emit(COMMENTS.name, "update", after, actor_id=identity.user_id, before=before, changed=changed)
    await _audit(tx, "update", identity, [before], ["text"])
    return Stored(comment_id, after["version"], payload)


# --- deleting


async def remove(tx: Transaction, identity: Identity, comment_id: int, if_match: IfMatch) -> None:
    """Delete a comment. Raises NotFound, Forbidden, PreconditionFailed, or Conflict for a deleted comment."""
    row = _only(await _lock(tx, [comment_id]), comment_id)
    COMMENTS.require_may_change(identity, [row])
    require_version("Comment", row, if_match)
    await _remove(tx, [row], identity.user_id)
    await _audit(tx, "delete", identity, [row])


async def remove_bulk(tx: Transaction, identity: Identity, ids: Sequence[int]) -> BulkResult[int]:
    """Delete comments; those that are already deleted count as not found. Raises Forbidden or Conflict."""
    wanted = list(dict.fromkeys(ids))
    found = {row["id"]: row for row in await _lock(tx, wanted) if not row["deleted"]}
    COMMENTS.require_may_change(identity, found.values())
    if found:
        await _remove(tx, list(found.values()), identity.user_id)
        await _audit(tx, "delete", identity, found.values())
    return BulkResult([each for each in wanted if each in found], [each for each in wanted if each not in found])


async def remove_newest(tx: Transaction, movie_id: int, size: int, actor_id: int | None) -> int:
    """Delete at most `size` of the newest comments on a movie that the caller has locked. Return how many.

    Since replies are newer than the comments that they reply to, no comment needs to keep its place.
    """
    newest = select(TABLE.c.id).where(TABLE.c.movie_id == movie_id).order_by(TABLE.c.id.desc())
    ids = list((await tx.connection.execute(newest.limit(min(size, MAX_ABOVE // MAX_DEPTH)))).scalars())
    if ids:
        await _remove(tx, await rows.fetch_locked(tx, TABLE, ids), actor_id)
    return len(ids)


async def _remove(tx: Transaction, chosen: Rows, actor_id: int | None) -> None:
    """Delete comments. The caller has locked them and their movies."""
    before = {row["id"]: row for row in chosen}
    above = await _ids_above(tx, chosen)
    before |= {row["id"]: row for row in await rows.fetch_locked(tx, TABLE, sorted(above - before.keys()))}
    removed, after = await rows.off_the_loop(len(before), _without, before, [row["id"] for row in chosen], utc_now())
    if removed:
        gone = [before[id_] for id_ in sorted(removed)]
        await tx.connection.execute(sa.delete(TABLE).where(rows.one_of(tx.is_sqlite, TABLE.c.id, sorted(removed))))
        await search.remove(tx, COMMENTS, sorted(removed))
        await relations.emit_deletes(tx, COMMENTS, gone, actor_id)
    if after:
        await rows.write_back(tx, TABLE, after, _WRITTEN)
        await search.update(tx, COMMENTS, [before[row["id"]] for row in after], after)
    for start in range(0, len(after), MAX_EVENT_ITEMS):
        part = after[start : start + MAX_EVENT_ITEMS]
        former = [before[row["id"]] for row in part]
        names = {name for old, new in zip(former, part, strict=True) for name in changed_names(old, new)}
        changed = [name for name in COMMENTS.columns if name in names - BOOKKEEPING]
        await relations.emit_updates(tx, COMMENTS, former, part, changed, actor_id)
        await asyncio.sleep(0)  # let other tasks run while many comments are deleted
    fewer = Counter({movie: -count for movie, count in Counter(before[id_]["movie_id"] for id_ in removed).items()})
    await relations.add_to_parents(tx, _MOVIE, fewer, actor_id)


def _without(
    before: dict[int, dict[str, Any]], chosen: Iterable[int], now: str
) -> tuple[set[int], list[dict[str, Any]]]:
    """Return the ids of the comments to remove when the `chosen` ones are deleted, and the other comments that change.

    `before` holds the chosen comments, the comments that they reply to and, above those, every comment that may have to
    be removed, too. Pure.
    """
    rows_now = {id_: dict(row) for id_, row in before.items()}
    removed: set[int] = set()
    for id_ in sorted(chosen, reverse=True):  # replies have higher ids than the comments that they reply to
        if id_ in removed:
            continue
        row = rows_now[id_]
        row |= {"text": None, "user_id": None, "deleted": True, "version": row["version"] + 1, "updated_at": now}
        while row["deleted"] and not row["replies_count"]:
            removed.add(row["id"])
            if row["parent_id"] is None:
                break
            row = rows_now[row["parent_id"]]
            row["replies_count"] -= 1
    after = [row for id_, row in sorted(rows_now.items()) if id_ not in removed and row != before[id_]]
    return removed, after


async def _ids_above(tx: Transaction, chosen: Sequence[Row]) -> set[int]:
    """Return the ids of the comments that the chosen ones reply to and, above deleted comments, those further up.

    Raises Conflict if there are too many.
    """
    parents = sorted({row["parent_id"] for row in chosen if row["parent_id"] is not None})
    if not parents:
        return set()
    first = select(TABLE.c.id, TABLE.c.parent_id, TABLE.c.deleted)
    above = first.where(rows.one_of(tx.is_sqlite, TABLE.c.id, parents)).cte("above", recursive=True)
    further = first.join(above, TABLE.c.id == above.c.parent_id).where(above.c.deleted)
    query = select(above.union(further).c.id).limit(MAX_ABOVE + 1)
    found = set((await tx.connection.execute(query)).scalars())
    if len(found) > MAX_ABOVE:
        raise Conflict(
            f"These comments reply to more than {MAX_ABOVE} comments that may change: delete fewer at a time"
        )
    return found


# --- locks and rights


async def _lock_movies(tx: Transaction, ids: Iterable[int]) -> set[int]:
    """Lock the movies, and return the ids of those that exist."""
    table = MOVIES.table
    found = select(table.c.id).where(rows.one_of(tx.is_sqlite, table.c.id, sorted(ids))).order_by(table.c.id)
    return set((await tx.connection.execute(found.with_for_update())).scalars())


async def _lock(tx: Transaction, ids: Sequence[int]) -> list[dict[str, Any]]:
    """Lock the movies of the comments, then the comments, and return the comments that exist."""
    movies = select(TABLE.c.movie_id).distinct().where(rows.one_of(tx.is_sqlite, TABLE.c.id, ids))
    await _lock_movies(tx, (await tx.connection.execute(movies)).scalars().all())
    return await rows.fetch_locked(tx, TABLE, ids)


def _only(found: Sequence[dict[str, Any]], comment_id: int) -> dict[str, Any]:
    """Return the only row. Raises NotFound if there is none, or Conflict if the comment has been deleted."""
    if not found:
        raise NotFound(f"There is no comment {comment_id}")
    if found[0]["deleted"]:
        raise Conflict(f"Comment {comment_id} has been deleted")
    return found[0]


async def _audit(
    tx: Transaction, action: str, identity: Identity, written: Iterable[Row], changed: Sequence[str] = ()
) -> None:
    foreign = [row for row in written if not COMMENTS.is_own(identity, row)]
    await audit.record_for_rows(tx, action, COMMENTS.name, identity, foreign, changed)
