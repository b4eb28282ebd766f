"""The caller's watchlist."""

from __future__ import annotations

import orjson
from pydantic import BaseModel
from starlette.responses import Response

from repository.community import watchlist
from repository.engine.transaction import Transaction
from repository.generic.idempotency import StoredResponse
from repository.generic.lists import ordering_of
from resources.watchlist import WATCHLIST, WatchlistBody
from routes.http import queries, rendering
from routes.http.operation import Call, Details, Operations
from routes.http.queries import ById, ListQuery

ENTRY = WATCHLIST.entity
EDIT = Details(answer_headers=("ETag",), signed_in=True, if_match=True, errors=(404, 409))
WATCHED_AT = "`watched_at` is the time at which `status` became `watched`, and null in any other status."

operations = Operations("watchlist")


@operations.listing(
    "/watchlist",
    "List my watchlist",
    list[ENTRY],  # type: ignore[valid-type]
    ordering_of(WATCHLIST),
    description="`q` searches the notes and the titles of the movies.",
    filters=WATCHLIST.fields,
    signed_in=True,
)
async def list_mine(call: Call[None, ListQuery, None]) -> Response:
    request = queries.list_request(call, WATCHLIST.fields)
    return rendering.page(call, await watchlist.page_of(call.database, call.me.user_id, request))


@operations.post(
    "/watchlist",
    "Add a movie to my watchlist",
    {201: ENTRY},
    description=f"Each movie can be added once; a second time is a 409. {WATCHED_AT}",
    idempotent=True,
    signed_in=True,
    answer_headers=("Location", "ETag"),
    errors=(409,),
)
async def add(call: Call[None, None, WatchlistBody]) -> Response:
    fields = call.body.model_dump()

    async def work(tx: Transaction) -> StoredResponse:
        stored = await watchlist.add(tx, call.me, fields)
        location = f"{call.prefix}/{WATCHLIST.name}/{stored.id}"
        tag = rendering.tag(stored.version, stored.body)
        return StoredResponse(201, stored.body, {"Location": location, "ETag": tag})

    return await rendering.write_once(call, work)


@operations.get(
    "/watchlist/{id}",
    "Get an entry of my watchlist",
    {200: ENTRY},
    members=WATCHLIST.columns,
    signed_in=True,
    if_none_match=True,
    errors=(404,),
)
async def get(call: Call[ById, None, None]) -> Response:
    found = await watchlist.find(call.database, call.me.user_id, call.path.id)
    return rendering.entity(call, found["version"], orjson.dumps(rendering.selected(call, found)))


@operations.put(
    "/watchlist/{id}",
    "Replace an entry of my watchlist",
    {200: ENTRY},
    EDIT,
    body=WATCHLIST.replacement,
    description=WATCHED_AT,
)
async def replace(call: Call[ById, None, WatchlistBody]) -> Response:
    return await _edit(call, call.body.model_dump())


@operations.patch(
    "/watchlist/{id}",
    "Change an entry of my watchlist",
    {200: ENTRY},
    EDIT,
    body=WATCHLIST.patch,
    description=WATCHED_AT,
)
async def patch(call: Call[ById, None, BaseModel]) -> Response:
    return await _edit(call, call.body.model_dump(exclude_unset=True))


async def _edit(call: Call[ById, None, BaseModel], fields: dict[str, object]) -> Response:
    versions = rendering.if_match(call)
    stored = await call.write(lambda tx: watchlist.edit(tx, call.me, call.path.id, fields, versions))
    return rendering.tagged(stored.version, stored.body)


@operations.delete("/watchlist/{id}", "Delete an entry of my watchlist", signed_in=True, if_match=True, errors=(404,))
async def delete(call: Call[ById, None, None]) -> Response:
    versions = rendering.if_match(call)
    await call.write(lambda tx: watchlist.remove(tx, call.me, call.path.id, versions))
    return Response(status_code=204)
