"""The operations that read and write whole lists as files."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Literal

from pydantic import Field
from starlette.responses import Response

import schemas
from core.error_bodies import weights_of
from core.errors import NotAcceptable
from repository.generic.lists import ListRequest
from repository.transfers.lines import FileOptions, Format
from resources.resource import Resource
from routes.generic.exports import ExportResponse
from routes.http import queries, rendering
from routes.http.operation import Call, Operations
from services.transfers.formats import MEDIA_TYPES

Flag = Literal["true", "false"]


class ExportQuery(queries.Parameters):
    q: schemas.Search = ""
    sort: queries.Sort = None
    format: Literal["csv", "ndjson"] | None = Field(
        default=None, description="By default, the format that `Accept` prefers, or `ndjson`"
    )
    bom: Flag = Field(default="false", description="CSV: begin with a byte order mark, which some spreadsheets need")
    safe: Flag = Field(
        default="false",
        description="CSV: put an apostrophe before each text that a spreadsheet might take for a formula",
    )


def declare(made: Operations, resource: Resource) -> None:
    """Declare the operations for whole lists of a resource."""
    made.get(
        f"/{resource.name}/export",
        f"Export {resource.name}",
        {200: str},
        description="Returns all rows of the list as a file, in the order of the list. All rows show the state at the "
        "position in `Stream-Position`. If an export cannot be finished, the connection is closed before the end of "
        "the body.",
        filters=resource.fields,
        members=resource.columns,
        media_type=MEDIA_TYPES[Format.NDJSON],
        other_content={MEDIA_TYPES[Format.CSV]: {"schema": {"type": "string"}}},
        answer_headers=("Stream-Position", "Content-Disposition"),
        errors=(406, 429),
    )(partial(export, resource))


async def export(resource: Resource, call: Call[None, ExportQuery, None]) -> Response:
    if call.is_socket:
        raise NotAcceptable("A websocket carries only JSON: request the export over HTTP, or read the list in pages")
    query = call.query
    sort = queries.sorting(resource.fields, query.sort)
    request = ListRequest(filter=call.filter, text=query.q, sort=sort, columns=call.fields)
    chosen = Format(query.format) if query.format is not None else _preferred(rendering.accept_of(call.headers))
    return ExportResponse(resource, call, request, FileOptions(chosen, query.bom == "true", query.safe == "true"))


def _preferred(accept: str) -> Format:
    weights = weights_of(accept)
    csv, ndjson = (_weight(MEDIA_TYPES[each], weights) for each in (Format.CSV, Format.NDJSON))
    return Format.CSV if csv > ndjson else Format.NDJSON


def _weight(media_type: str, weights: Mapping[str, float]) -> float:
    ranges = (media_type, f"{media_type.partition('/')[0]}/*", "*/*")
    return next((weights[name] for name in ranges if name in weights), 0.0)
