"""Operations that discover movies: the popular and the recent ones, and those similar to a movie."""

from __future__ import annotations

from starlette.responses import Response

from core import times
from core.filters import Condition, Filter, Op, Scalar, build
from repository.catalog import similar
from repository.generic import cursors, lists
from repository.generic.cursors import Order, Ordering
from repository.generic.lists import ListRequest
from resources.movies import MOVIES
from routes.http import queries, rendering
from routes.http.operation import LIST_HEADERS, Call, Details, Operations
from routes.http.queries import ById, PageQuery, SearchQuery

operations = Operations(MOVIES.name)

# Indexes hold these orders (`migrations/versions/0020_popular_and_recent_movies.py`).
POPULAR: Order = cursors.total_order((("ratings_count", True), ("average_rating", True)))
RECENT: Order = cursors.total_order((("release_date", True),))

ENTITIES = list[MOVIES.entity]  # type: ignore[name-defined]
LISTED = Details(filters=MOVIES.fields)
SIMILAR = (
    f"The most similar movies come first, at most {similar.MAX_SIMILAR_MOVIES}. A shared genre counts "
    f"{similar.GENRE_POINTS} points, a shared actor {similar.CAST_POINTS}, and a user who rated both movies with "
    f"{similar.LIKED} or more {similar.FAN_POINTS}."
)


def _ordering(order: Order) -> Ordering:
    """Return the ordering of a list whose order clients cannot choose."""
    return Ordering(MOVIES.table, lambda sort, after: order)


@operations.listing(
    "/movies/popular",
    "List popular movies",
    ENTITIES,
    _ordering(POPULAR),
    LISTED,
    description="Lists the movies that have ratings: those with the most ratings first, then by average rating.",
)
async def popular(call: Call[None, SearchQuery, None]) -> Response:
    return await _page(call, POPULAR, _only("ratings_count", Op.GT, 0))


@operations.listing(
    "/movies/recent",
    "List recent movies",
    ENTITIES,
    _ordering(RECENT),
    LISTED,
    description="Lists the movies that have been released up to today, in UTC, the newest first.",
)
async def recent(call: Call[None, SearchQuery, None]) -> Response:
    return await _page(call, RECENT, _only("release_date", Op.LTE, times.utc_now()[: len("YYYY-MM-DD")]))


def _only(field: str, op: Op, value: Scalar) -> Filter:
    return build([Condition(MOVIES.fields[field], op, value)])


async def _page(call: Call[None, SearchQuery, None], order: Order, only: Filter) -> Response:
    """Respond with a page of the movies that match `only` and the filters of the call."""
    request = ListRequest(
        filter=queries.both(call.filter, only),
        text=call.query.q,
        sort=order,
        offset=call.query.start,
        limit=call.query.limit,
        after=call.cursor.after if call.cursor is not None else None,
        cursor=call.cursor,
        columns=call.fields,
    )
    return rendering.page(call, await lists.page_of(call.database, MOVIES, request))


@operations.get(
    "/movies/{id}/similar",
    "List movies similar to a movie",
    {200: ENTITIES},
    description=SIMILAR,
    members=MOVIES.columns,
    answer_headers=LIST_HEADERS,
    errors=(404,),
)
async def similar_movies(call: Call[ById, PageQuery, None]) -> Response:
    request = ListRequest(offset=call.query.start, limit=call.query.limit)
    return rendering.page(call, await similar.page_of(call.database, call.path.id, request))
