"""The history of one entity, from the event log."""

from __future__ import annotations

from functools import partial
from typing import Annotated

import orjson
from pydantic import Field
from starlette.responses import Response

from core.errors import NotFound
from core.identity import ANONYMOUS_AUDIENCES
from repository.transfers import history
from resources.resource import Resource
from routes.http import queries, rendering
from routes.http.operation import Call, Operations
from schemas import MAX_ID, WRITTEN_INTEGER

MAX_CHANGES_OF_PAGE = 100
DEFAULT_CHANGES_OF_PAGE = 50


class HistoryQuery(queries.Parameters):
    before: Annotated[int, Field(ge=1, le=MAX_ID), WRITTEN_INTEGER] | None = Field(
        default=None, description="Only changes with a lower `seq`"
    )
    limit: Annotated[int, Field(ge=1, le=MAX_CHANGES_OF_PAGE), WRITTEN_INTEGER] = Field(
        default=DEFAULT_CHANGES_OF_PAGE, description="The maximum number of changes in a page"
    )


def declare(made: Operations, resource: Resource) -> None:
    """Declare the operation that returns the history of an entity."""
    changes = list[resource.change]  # type: ignore[name-defined]
    made.get(
        f"/{resource.name}/{{id}}/history",
        f"Get the history of {resource.a_singular}",
        {200: changes},
        description="The changes that the event log still holds, newest first, also of a deleted entity. A page may "
        "have fewer changes than `limit`, or none; only a page without a `Link` to the next page is the last one.",
        answer_headers=("Stream-Position", "Link"),
        errors=(404,),
    )(partial(show, resource))


async def show(resource: Resource, call: Call[queries.ById, HistoryQuery, None]) -> Response:
    audiences = call.identity.audiences if call.identity is not None else ANONYMOUS_AUDIENCES
    id_, query = call.path.id, call.query
    found = await history.page_of(call.database, resource, id_, audiences, before=query.before, limit=query.limit)
    if not found.exists and not found.changes and found.next_before is None and query.before is None:
        raise NotFound(f"There is no {resource.singular} {id_}, and the event log holds no change of it")
    headers = {"Cache-Control": "no-cache", **rendering.position(found.head)}
    if found.next_before is not None:
        headers["Link"] = rendering.next_page(call, before=found.next_before)
    return rendering.JSONResponse(orjson.dumps(found.changes), headers=headers)
