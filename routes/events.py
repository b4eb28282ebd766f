"""The event log over HTTP: pages for programs, server-sent events for browsers and whoever has no websocket."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import orjson
from pydantic import BeforeValidator, Field
from starlette.responses import Response

from resources.topics import PUBLIC_TOPICS, TOPICS
from routes.http import rendering
from routes.http.negotiation import client_prefers
from routes.http.operation import Call, Operation
from routes.http.queries import Offset, Query
from schemas import WRITTEN_INTEGER, Answer

MAX_EVENTS_OF_PAGE = 1_000
DEFAULT_EVENTS_OF_PAGE = 100
MAX_EPOCH_LENGTH = 64

EVENT_STREAM = "text/event-stream"


def _topics(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    topics = value.split(",")
    if not set(topics) <= TOPICS.keys() or len(set(topics)) != len(topics):
        raise ValueError(f"expected one or more of {', '.join(TOPICS)}, each once")
    return topics


class EventsQuery(Query):
    after: Offset | None = Field(
        default=None, description="Only what follows this number; left out, a page begins with the oldest, a stream now"
    )
    epoch: Annotated[str, Field(max_length=MAX_EPOCH_LENGTH)] | None = Field(
        default=None, description="The log that the number is of"
    )
    topics: Annotated[
        frozenset[str],
        BeforeValidator(_topics),
        Field(
            json_schema_extra={
                "items": {"enum": list(TOPICS)},
                "minItems": 1,
                "default": sorted(PUBLIC_TOPICS),
            }
        ),
    ] = Field(default=PUBLIC_TOPICS, description="Comma separated; the public ones by default")
    bulk: Literal["items", "summary"] = Field(default="items", description="Whether bulk events carry their rows")
    limit: Annotated[int, Field(ge=1, le=MAX_EVENTS_OF_PAGE), WRITTEN_INTEGER] = Field(
        default=DEFAULT_EVENTS_OF_PAGE,
        description="How many frames a page has at most; a stream has no end, and passes over it",
    )


class EventsPage(Answer):
    epoch: str = Field(description="The log's identity")
    seq: int = Field(description="The number up to which was looked: the next `after`")
    data: list[dict[str, Any]] = Field(description="Frames, as on the websocket; empty at the end of the log")


async def events(call: Call) -> Response:
    if client_prefers(call.headers, EVENT_STREAM):
        return call.services.event_streams.stream(call.identity, call.query, call.headers.get("last-event-id"))
    head, frames, is_end = await call.services.event_pages.page(call.identity, call.query)
    body = b'{"epoch":%s,"seq":%d,"data":[%s]}' % (orjson.dumps(head.epoch), head.seq, b",".join(frames))
    headers: dict[str, str] = {"Cache-Control": "no-store", "Vary": "Accept", **rendering.position(head)}
    if not is_end:
        headers["Link"] = rendering.link(call, "next", after=head.seq, epoch=head.epoch)
    return rendering.JSONResponse(body, headers=headers)


_STREAM: Mapping[str, Any] = {
    "schema": {
        "type": "string",
        "description": "Server-sent events: `id` is `<epoch>:<seq>`, `data` a frame as on the websocket",
    }
}

OPERATIONS = [
    Operation(
        "GET",
        "/events",
        events,
        "Read the event log",
        "events",
        {200: EventsPage},
        description="A page of frames, as on the websocket; without a `Link` to the next one it reaches the end of the "
        "log. With `Accept: text/event-stream` it does not end: each event as it happens, and `Last-Event-ID` takes up "
        "where a connection was cut. A position that cannot be gone on from is answered with one `resync` frame.",
        query_model=EventsQuery,
        headers={"Last-Event-ID": "With an event stream: the id after which to go on; it counts more than `after`"},
        errors=(403, 406, 429),
        answer_headers=("Stream-Position", "Link"),
        other_content={EVENT_STREAM: _STREAM},
    ),
]
