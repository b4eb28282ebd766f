"""Reading comments as trees: the comments of a page, each with its first replies, and their first replies.

A page is read by one statement (`repository.generic.lists`), whatever the number of comments. A page shows a limited
number of levels, and of replies to each comment, so neither the depth of a tree nor the number of replies affects the
cost of a read.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import sqlalchemy as sa
from sqlalchemy import ColumnElement, select

from repository import search
from repository.engine.database import Database
from repository.generic import filter_sql, lists
from repository.generic.lists import Listed, ListRequest, Shape
from resources.comments import COMMENTS

# A page of a tree shows the comments of the page, and the first replies on this many further levels.
REPLY_LEVELS = 2
MAX_SHOWN_REPLIES = 5  # of each comment of a page
MAX_TREE_COMMENTS = 1_000  # on a page, those of all levels together

TABLE = COMMENTS.table
# Searches are not ranked here: comments stay in the order of the conversation.
ORDERING = replace(lists.ordering_of(COMMENTS), ranked=None)


async def on_movie(database: Database, movie_id: int, page: ListRequest) -> Listed[dict[str, Any]]:
    """Return a page of the comments on a movie that are not replies, as trees. Raises Unavailable.

    Each comment has its first replies as `replies`, in order of id, down to REPLY_LEVELS.
    """
    return await _trees(database, (TABLE.c.movie_id == movie_id) & TABLE.c.parent_id.is_(None), page)


async def replies_to(database: Database, comment_id: int, page: ListRequest) -> Listed[dict[str, Any]]:
    """Return a page of the replies to a comment, as trees of the same form. Raises Unavailable."""
    return await _trees(database, TABLE.c.parent_id == comment_id, page)


async def _trees(database: Database, top: ColumnElement[bool], page: ListRequest) -> Listed[dict[str, Any]]:
    where = top & filter_sql.where(TABLE, page.filter, is_sqlite=database.is_sqlite)
    if page.text:
        where &= search.matches(TABLE, page.text, is_sqlite=database.is_sqlite)

    def extend(query: sa.Select[Any], shape: Shape) -> sa.Select[Any]:
        return _with_replies(query, shape, is_sqlite=database.is_sqlite)

    found = await lists.entities_of(database, ORDERING, where, dict, page, extend)
    return Listed(_nested(found.rows), found.total, found.head, found.end)


def _with_replies(query: sa.Select[Any], shape: Shape, *, is_sqlite: bool) -> sa.Select[Any]:
    """Return the query of a page with the first replies to each row, and the first replies to those, before the rows.

    Most of the query is text, like that of the page, and its columns are those of the page. The ids are selected first,
    so that the texts of at most MAX_TREE_COMMENTS replies of each level are read.
    """
    shared = ["epoch", "seq", "total"]
    measure = [lists.SIZE_SO_FAR] if shape.measure else []
    names = _listed("page", (*shared, *shape.columns, *measure))
    levels = [query.cte("level_0")]
    parts = [f'SELECT 0 AS "level", {names} FROM "level_0" AS "page"']  # noqa: S608 (names of our own tables)
    for number in range(1, REPLY_LEVELS + 1):
        ids = f'SELECT "reply"."id" FROM "level_{number - 1}" AS "above" {_first_replies(is_sqlite)}'  # noqa: S608 (as above)
        level = sa.text(f'{ids} ORDER BY "reply"."id" LIMIT {MAX_TREE_COMMENTS}')
        levels.append(level.columns(sa.column("id")).cte(f"level_{number}"))
        own = ", ".join(
            filter(None, (_listed("head", shared), _listed("reply", shape.columns), _listed("head", measure)))
        )
        parts.append(
            f'SELECT {number}, {own} FROM (SELECT * FROM "level_0" LIMIT 1) AS "head", "{TABLE.name}" AS "reply"'  # noqa: S608 (as above)
            f' WHERE "reply"."id" IN (SELECT "id" FROM "level_{number}")'
        )
    every = " UNION ALL ".join(parts)
    # Deeper levels are counted later, so a reply never fits unless the comment above it does.
    so_far = 'OVER (ORDER BY "level", "id" ROWS UNBOUNDED PRECEDING)'
    size = lists.BYTES_OF[is_sqlite].format("text")
    measured = f'count(*) {so_far} AS "place", sum(coalesce({size}, 0)) {so_far} AS "bytes"'
    fits = f'"place" <= {MAX_TREE_COMMENTS} AND "bytes" <= {lists.MAX_PAGE_BYTES}'
    order = ", ".join(f'"{name}" {"DESC" if is_down else "ASC"} NULLS LAST' for name, is_down in shape.order)
    return (
        select(sa.text(names))
        .select_from(sa.text(f'(SELECT *, {measured} FROM ({every}) AS "every") AS "page"'))  # noqa: S608 (as above)
        .where(sa.text(f'"level" = 0 OR {fits}'))
        .order_by(sa.text(f'"level" DESC, {order}'))
        .add_cte(*levels)
    )


def _listed(of: str, names: Iterable[str]) -> str:
    return ", ".join(f'"{of}"."{name}"' for name in names)


def _first_replies(is_sqlite: bool) -> str:
    """Return a join with the first replies of each row of `above`, which are found in the index of `parent_id`."""
    first = (
        f'SELECT "first"."id" FROM "{TABLE.name}" AS "first" WHERE "first"."parent_id" = "above"."id"'  # noqa: S608 (names of our own tables)
        f' ORDER BY "first"."id" LIMIT {MAX_SHOWN_REPLIES}'
    )
    if is_sqlite:  # SQLite has no LATERAL, and PostgreSQL would test every comment against the subquery of this IN
        return f'CROSS JOIN "{TABLE.name}" AS "reply" ON "reply"."id" IN ({first})'
    return f'CROSS JOIN LATERAL ({first}) AS "reply"'


def _nested(found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of the page, which come last in `found`. The other rows become the `replies` of their parents."""
    nodes = {row["id"]: {**row, "replies": []} for row in found}
    top: list[dict[str, Any]] = []
    for node in nodes.values():
        above = nodes.get(node["parent_id"])
        (top if above is None else above["replies"]).append(node)
    for node in nodes.values():
        node["replies"].sort(key=lambda reply: reply["id"])
    return top
