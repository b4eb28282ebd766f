"""The event log over HTTP: pages, and server-sent events for clients without a websocket."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import orjson
from pydantic import BeforeValidator, Field
from starlette.responses import Response

from core.errors import Conflict, FieldProblem
from repository.engine.events import Head
from repository.engine.positions import POSITION, Incomplete, parse_written, position_of
from resources.topics import PUBLIC_TOPICS, TOPICS
from routes.http import rendering
from routes.http.operation import Call, Operations
from routes.http.queries import Parameters
from schemas import MAX_EPOCH_LENGTH, WRITTEN_INTEGER, Answer

MAX_EVENTS_OF_PAGE = 1_000
DEFAULT_EVENTS_OF_PAGE = 100

EVENT_STREAM = "text/event-stream"

AFTER_FORMS = {"together": "after=<epoch>:<seq>", "beside": "after=<seq>&epoch=<epoch>"}

operations = Operations("events")


def _topics(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    topics = value.split(",")
    if not set(topics) <= TOPICS.keys() or len(set(topics)) != len(topics):
        raise ValueError(f"expected one or more of {', '.join(TOPICS)}, each at most once")
    return topics


Position = Annotated[str, Field(pattern=f"^({POSITION}|[0-9]{{1,19}})$")]


class EventsQuery(Parameters):
    epoch: Annotated[str, Field(max_length=MAX_EPOCH_LENGTH)] | None = Field(
        default=None, description="The epoch of the log that `after` belongs to, if `after` is a number"
    )
    after: Position | None = Field(
        default=None,
        description="Only events after this position: `<epoch>:<seq>`, or only the number if `epoch` is given. By "
        "default, a page begins with the oldest event and a stream with the next event",
    )
    lastEventId: str | None = Field(  # noqa: N815 (the name of the parameter)
        default=None,
        description="The id to resume after, for clients that cannot send the header `Last-Event-ID`; it takes "
        "precedence over `after`",
    )
    topics: Annotated[
        frozenset[str],
        BeforeValidator(_topics),
        Field(json_schema_extra={"items": {"enum": list(TOPICS)}, "minItems": 1, "default": sorted(PUBLIC_TOPICS)}),
    ] = Field(default=PUBLIC_TOPICS, description="Topics, separated by commas; by default, all public topics")
    bulk: Literal["items", "summary"] = Field(default="items", description="Whether bulk events include their rows")
    limit: Annotated[int, Field(ge=1, le=MAX_EVENTS_OF_PAGE), WRITTEN_INTEGER] = Field(
        default=DEFAULT_EVENTS_OF_PAGE, description="The maximum number of frames in a page; ignored by event streams"
    )

    @property
    def last_event_id(self) -> str | None:
        return self.lastEventId

    @property
    def position(self) -> Head | None:
        """The position that `after` names. Raises Conflict if `after` is a number without its epoch."""
        written = parse_written(self.after) if self.after is not None else None
        if isinstance(written, Head) or written is None:
            return written
        try:
            return position_of(written, self.epoch, **AFTER_FORMS)
        except Incomplete as error:
            # The status is 409, because each parameter is valid on its own, and no schema can relate the two.
            raise Conflict([FieldProblem(("query", "after"), str(error), error.kind)]) from error


class EventsPage(Answer):
    epoch: str = Field(description="The log's identity")
    seq: int = Field(description="The number up to which the log was read; use it as `after` to read the next page")
    data: list[dict[str, Any]] = Field(description="Frames, as on the websocket; empty at the end of the log")


ABOUT_STREAM = "Server-sent events: `id` is `<epoch>:<seq>`, `data` is a frame as on the websocket"


@operations.get(
    "/events",
    "Read the event log",
    {200: EventsPage},
    description="Read a page of frames, as on the websocket. A page without a `Link` to the next page reaches the end "
    "of the log. With `Accept: text/event-stream`, the response does not end but sends each event as it happens. After "
    "a lost connection, the header `Last-Event-ID`, or `lastEventId` in the query, resumes the stream. If the service "
    "cannot resume from a position, it sends a `resync` frame.",
    headers={"Last-Event-ID": "For event streams: the id to resume after; it takes precedence over the query"},
    errors=(403, 406, 409, 429),
    answer_headers=("Stream-Position", "Link"),
    other_content={EVENT_STREAM: {"schema": {"type": "string", "description": ABOUT_STREAM}}},
)
async def events(call: Call[None, EventsQuery, None]) -> Response:
    if rendering.client_prefers(call.headers, EVENT_STREAM):
        return call.services.event_streams.stream(call.identity, call.query, call.headers.get("last-event-id"))
    head, frames, is_end = await call.services.event_pages.page(call.identity, call.query)
    body = b'{"epoch":%s,"seq":%d,"data":[%s]}' % (orjson.dumps(head.epoch), head.seq, b",".join(frames))
    headers: dict[str, str] = {"Cache-Control": "no-store", "Vary": "Accept", **rendering.position(head)}
    if not is_end:
        headers["Link"] = rendering.next_page(call, after=head.seq, epoch=head.epoch, lastEventId=None)
    return rendering.JSONResponse(body, headers=headers)
