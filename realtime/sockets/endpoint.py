"""`GET /ws`: one websocket, from the handshake to the last frame.

Origin, query, limits, token and topics are checked before the socket is accepted, so that an invalid handshake
is refused with an HTTP response.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from starlette.responses import Response
from starlette.routing import BaseRoute, WebSocketRoute
from starlette.websockets import WebSocket

from core import error_bodies, metrics, scope_keys
from core.errors import (
    NO_CLOSE_FRAME,
    BadRequest,
    CloseCode,
    FieldProblem,
    Forbidden,
    InvalidInput,
    Problem,
    Unauthenticated,
)
from core.network.hosts import origin_refusal
from core.texts.suggestions import Unknown
from realtime.fanout.spec import Spec, check_topics, user_id_of
from realtime.feed.positions import LOG_REPLACED, find_start
from realtime.sockets.connection import Connection
from realtime.sockets.context import SocketContext
from realtime.wire import frames
from realtime.wire.frames import Frames, Rendering
from realtime.wire.writer import EXTENSION, QueuedWriter, Writer
from repository.engine.events import Head
from repository.engine.positions import Incomplete, parse_written, position_of
from resources.topics import PUBLIC_TOPICS, TOPICS
from schemas import MAX_EPOCH_LENGTH

HEARTBEAT_SECONDS = 20  # proxies drop sockets that are idle for 30 to 120 s
PARAMETERS = ("topics", "since", "epoch", "bulk")
SINCE_FORMS = {"together": "since=<epoch>:<seq>", "beside": "since=<seq>&epoch=<epoch>"}


@dataclass(frozen=True, slots=True)
class HandshakeQuery:
    topics: frozenset[str]
    since: Head | None
    rendering: Rendering


@dataclass(frozen=True, slots=True)
class Credentials:
    """The credentials of a handshake. `subprotocol` must be accepted, because browsers close a socket if the server
    accepts none of the subprotocols that they offered.
    """

    token: str | None
    subprotocol: str | None


def check_handshake(websocket: WebSocket) -> None:
    """Raise BadRequest if the handshake is invalid. Other ASGI servers reject such a handshake themselves."""
    problem = websocket.scope.get(scope_keys.HANDSHAKE_ERROR)
    if problem is not None:
        raise BadRequest(problem, {"Sec-WebSocket-Version": "13"})


def parse_query(items: list[tuple[str, str]]) -> HandshakeQuery:
    """Parse the query of the handshake. Raises InvalidInput with every problem."""
    problems: list[FieldProblem] = []
    given: dict[str, str] = {}

    def refuse(name: str, expected: str, kind: str, unknown: Unknown | None = None) -> None:
        problems.append(FieldProblem(("query", name), expected, kind, unknown))

    for name, value in items:
        if name not in PARAMETERS:
            expected = f"Unknown parameter; expected one of {', '.join(PARAMETERS)}"
            refuse(name, expected, "unknown", Unknown(name, PARAMETERS))
        elif name in given:
            refuse(name, "Expected at most once", "repeated")
        given[name] = value
    topics = frozenset(name for name in given["topics"].split(",") if name) if "topics" in given else PUBLIC_TOPICS
    if not topics or not topics <= TOPICS.keys():
        refuse("topics", f"Expected one or more of {', '.join(TOPICS)}", "unknown_topic")
    if given.get("bulk", "items") not in ("items", "summary"):
        refuse("bulk", "Expected items or summary", "invalid_bulk")
    since = None
    written = parse_written(given["since"]) if "since" in given else None
    if len(given.get("epoch", "")) > MAX_EPOCH_LENGTH:
        refuse("epoch", f"Expected at most {MAX_EPOCH_LENGTH} characters", "invalid_epoch")
    elif "since" in given and written is None:
        refuse("since", f"Expected a position: {SINCE_FORMS['together']} or {SINCE_FORMS['beside']}", "invalid_since")
    else:
        try:
            since = position_of(written, given.get("epoch"), **SINCE_FORMS)
        except Incomplete as error:
            refuse("since", str(error), error.kind)
    if problems:
        raise InvalidInput(problems)
    return HandshakeQuery(
        topics,
        since,
        Rendering("summary" if given.get("bulk") == "summary" else "items"),
    )


def check_origin(origin: str | None, host: str | None, context: SocketContext) -> None:
    """Raise Forbidden unless the origin is the service's own or an allowed one.

    Browsers let any page connect, but they send the page's origin.
    """
    allowed = context.allowed_origins
    if origin is None or "*" in allowed or origin.rstrip("/") in allowed:
        return
    try:
        is_own = host is not None and urlsplit(origin).netloc.lower() == host.lower()
    except ValueError:
        is_own = False
    if not is_own:
        hint = origin_refusal(origin, host)
        context.warn_of_origin(origin, hint=hint)
        raise Forbidden(hint)


def credentials_of(websocket: WebSocket) -> Credentials:
    """Return the token of the Authorization header, or else the one in `Sec-WebSocket-Protocol: bearer, <token>`.

    Raises Unauthenticated when the Authorization header holds no bearer token.
    """
    scheme, _, token = websocket.headers.get("authorization", "").partition(" ")
    offered = list(websocket.scope.get("subprotocols", []))
    chosen = "bearer" if "bearer" in offered else None
    if scheme.lower() == "bearer":
        return Credentials(token.strip(), chosen)
    if scheme:
        raise Unauthenticated("Expected the header Authorization: Bearer <token>")
    if chosen is not None and len(offered) > offered.index("bearer") + 1:
        return Credentials(offered[offered.index("bearer") + 1], chosen)
    return Credentials(None, chosen)


async def watch(websocket: WebSocket) -> None:
    context: SocketContext = websocket.state.realtime
    feed = context.feed
    with ExitStack() as stack:
        try:
            check_handshake(websocket)
            check_origin(websocket.headers.get("origin"), websocket.headers.get("host"), context)
            query = parse_query(websocket.query_params.multi_items())
            place = stack.enter_context(context.places.take(websocket.client.host if websocket.client else ""))
            credentials = credentials_of(websocket)
            token = credentials.token
            identity = await context.identify(token, place.address) if token is not None else None
            if identity is not None or not context.requires_auth:
                check_topics(query.topics, identity)
            direct: Writer | None = websocket.scope.get("extensions", {}).get(EXTENSION)
            writer = direct if direct is not None else QueuedWriter(websocket)
            connection = Connection(websocket, writer, context, place)
            stack.callback(connection.close)
            if identity is not None:
                await connection.sign_in(identity)
            resync_reason = await find_start(feed, query.since)
            generation = feed.generation
        except Exception as error:
            problem = error if isinstance(error, Problem) else await context.explain(error)
            if problem is None:
                raise
            await _refuse(websocket, problem)
            return
        await websocket.accept(subprotocol=credentials.subprotocol)
        if query.since is not None and generation != feed.generation:
            resync_reason = LOG_REPLACED
        _welcome(context, connection, query, resync_reason)
        try:
            if isinstance(writer, QueuedWriter):
                # With DirectWriter, the websocket protocol of our own server counts the connections instead.
                metrics.websocket_opened()
                metrics.websocket_closed(await _first_of(writer.run(), _receive(websocket, connection)))
            else:
                await _receive(websocket, connection)
        finally:
            connection.close()
        await connection.finish()


async def _refuse(websocket: WebSocket, problem: Problem) -> None:
    body, media_type = error_bodies.encoded(
        problem.status, problem.detail, ",".join(websocket.headers.getlist("accept"))
    )
    response = Response(body, problem.status, problem.headers, media_type)
    response.headers.add_vary_header(error_bodies.VARY)
    await websocket.send_denial_response(response)


def _welcome(context: SocketContext, connection: Connection, query: HandshakeQuery, resync_reason: str | None) -> None:
    """Send the first frames and subscribe. Nothing is awaited, so the events begin after the number in `welcome`."""
    writer, identity = connection.writer, connection.identity
    try:
        # The identity may have changed since the handshake began.
        if connection.is_ending:
            raise Unauthenticated("")
        if identity is not None or not context.requires_auth:
            check_topics(query.topics, identity)
    except Problem:
        writer.close(CloseCode.TOKEN_EXPIRED)
        return
    head = context.feed.head
    start = query.since.seq if query.since is not None and resync_reason is None else head.seq
    first = [frames.welcome(Head(head.epoch, start), user_id_of(identity), HEARTBEAT_SECONDS)]
    if resync_reason is not None:
        first.append(frames.resync(resync_reason, head))
    writer.write(Frames(first))
    spec = Spec(query.topics, query.rendering)
    if context.requires_auth and identity is None:
        connection.open_after_auth(spec, start)
    else:
        connection.open(spec, start)


async def _first_of(*coroutines: Coroutine[Any, Any, int]) -> int:
    """Return the result of the coroutine that ends first, and cancel the others."""
    tasks = [asyncio.create_task(each) for each in coroutines]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return done.pop().result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _receive(websocket: WebSocket, connection: Connection) -> int:
    """Pass the client's messages to the connection until the socket is closed. Return the close code."""
    while True:
        message: Any = await websocket.receive()
        if message["type"] == "websocket.disconnect":
            return int(message.get("code") or NO_CLOSE_FRAME)
        text = message.get("text")
        if text is not None:
            await connection.receive_text(text)
        else:
            connection.receive_bytes()


ROUTES: list[BaseRoute] = [WebSocketRoute("/ws", watch)]
