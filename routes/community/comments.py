"""Operations that write comments, and read them as trees."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel
from starlette.responses import Response

import schemas
from core.errors import NotFound
from repository.community import comment_trees, comments
from repository.engine.transaction import Transaction
from repository.generic import lists
from repository.generic.idempotency import StoredResponse
from repository.generic.lists import Listed
from repository.generic.writes import Stored
from resources.comments import COMMENTS, CommentBody, CommentTree
from resources.movies import MOVIES
from resources.resource import Resource
from routes.generic.operations import BULK, CREATE, EDIT
from routes.http import queries, rendering
from routes.http.operation import AnyCall, Call, Details, Operations
from routes.http.queries import ById, ListQuery

operations = Operations(COMMENTS.name)

ADDED, CHANGED, DELETED_MANY = {201: COMMENTS.entity}, {200: COMMENTS.entity}, {200: schemas.Deleted}
LISTED_TREES: Any = list[CommentTree]  # type: ignore[valid-type]
TREES = Details(filters=COMMENTS.fields, errors=(404,))
TREE = (
    f"Each comment has its first {comment_trees.MAX_SHOWN_REPLIES} replies as `replies`, down to "
    f"{comment_trees.REPLY_LEVELS} levels, and the path of the others as `more_replies`. Filters, `q`, `sort` and the "
    "page apply to the comments of the first level."
)
DELETED_IN_PLACE = "A comment with replies keeps its place, without text and author, until its last reply is removed."


# --- reading


@operations.listing(
    "/movies/{id}/comments",
    "List the comments on a movie, with replies",
    LISTED_TREES,
    comment_trees.ORDERING,
    TREES,
    description=TREE,
)
async def list_on_movie(call: Call[ById, ListQuery, None]) -> Response:
    await _require(call, MOVIES)
    request = queries.list_request(call, COMMENTS.fields)
    return _page(call, await comment_trees.on_movie(call.database, call.path.id, request))


@operations.listing(
    "/comments/{id}/replies",
    "List the replies to a comment, with their replies",
    LISTED_TREES,
    comment_trees.ORDERING,
    TREES,
    description=TREE,
)
async def list_replies(call: Call[ById, ListQuery, None]) -> Response:
    await _require(call, COMMENTS)
    request = queries.list_request(call, COMMENTS.fields)
    return _page(call, await comment_trees.replies_to(call.database, call.path.id, request))


async def _require(call: Call[ById, ListQuery, None], resource: Resource) -> None:
    """Raise NotFound unless the resource has a row with the id of the path."""
    if await lists.find(call.database, resource, call.path.id) is None:
        raise NotFound(f"There is no {resource.singular} {call.path.id}")


def _page(call: Call[ById, ListQuery, None], found: Listed[dict[str, Any]]) -> Response:
    return rendering.page(call, Listed([_shown(call, node) for node in found.rows], found.total, found.head, found.end))


def _shown(call: AnyCall, node: Mapping[str, Any]) -> dict[str, Any]:
    """Return a comment and its replies as the client requested them, with the paths of further replies."""
    replies = node["replies"]
    more = None
    if len(replies) < node["replies_count"]:
        more = f"{call.prefix}/comments/{node['id']}/replies" + (f"?after={replies[-1]['id']}" if replies else "")
    shown = dict(rendering.selected(call, {**node, "more_replies": more}))
    if "replies" in shown:
        shown["replies"] = [_shown(call, reply) for reply in replies]
    return shown


# --- writing


def _added(call: AnyCall, stored: Stored) -> StoredResponse:
    headers = {
        "Location": f"{call.prefix}/{COMMENTS.name}/{stored.id}",
        "ETag": rendering.tag(stored.version, stored.body),
    }
    return StoredResponse(201, stored.body, headers)


@operations.post("/movies/{id}/comments", "Comment on a movie", ADDED, CREATE, errors=(404,))
async def add(call: Call[ById, None, CommentBody]) -> Response:
    async def work(tx: Transaction) -> StoredResponse:
        return _added(call, await comments.add(tx, call.me, call.path.id, call.body.text))

    return await rendering.write_once(call, work)


@operations.post(
    "/comments/{id}/replies",
    "Reply to a comment",
    ADDED,
    CREATE,
    description="A deleted comment accepts no replies.",
    errors=(404, 409),
)
async def reply(call: Call[ById, None, CommentBody]) -> Response:
    async def work(tx: Transaction) -> StoredResponse:
        return _added(call, await comments.reply(tx, call.me, call.path.id, call.body.text))

    return await rendering.write_once(call, work)


@operations.put("/comments/{id}", "Replace a comment", CHANGED, EDIT, body=COMMENTS.replacement)
@operations.patch("/comments/{id}", "Change a comment", CHANGED, EDIT, body=COMMENTS.patch)
async def edit(call: Call[ById, None, BaseModel]) -> Response:
    versions, fields = rendering.if_match(call), call.body.model_dump(exclude_unset=True)
    stored = await call.write(lambda tx: comments.edit(tx, call.me, call.path.id, fields, versions))
    return rendering.tagged(stored.version, stored.body)


@operations.delete(
    "/comments/{id}",
    "Delete a comment",
    description=DELETED_IN_PLACE,
    signed_in=True,
    if_match=True,
    errors=(403, 404, 409),
)
async def delete(call: Call[ById, None, None]) -> Response:
    versions = rendering.if_match(call)
    await call.write(lambda tx: comments.remove(tx, call.me, call.path.id, versions))
    return Response(status_code=204)


async def _delete_many(call: AnyCall, ids: Sequence[int]) -> Response:
    result = await call.write(lambda tx: comments.remove_bulk(tx, call.me, ids))
    return rendering.JSONResponse({"deleted": result.done, "not_found": result.not_found})


@operations.delete(
    "/comments/bulk", "Delete many comments", DELETED_MANY, BULK, description=DELETED_IN_PLACE, errors=(403, 409)
)
async def delete_bulk(call: Call[None, None, schemas.BulkIds]) -> Response:
    return await _delete_many(call, call.body.ids)


@operations.delete(
    "/comments/bulk/{start_id}/{end_id}",
    "Delete a range of comments",
    DELETED_MANY,
    BULK,
    description=DELETED_IN_PLACE,
    errors=(403, 409, 413),
)
async def delete_range(call: Call[queries.ByRange, None, None]) -> Response:
    return await _delete_many(call, range(call.path.start_id, call.path.end_id + 1))
