"""`GET /ws`: from the handshake to the last frame of one websocket."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Coroutine
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import orjson
from starlette.responses import Response
from starlette.routing import BaseRoute, WebSocketRoute
from starlette.websockets import WebSocket

from core import metrics
from core.errors import (
    CLOSE_REASONS,
    NO_CLOSE_FRAME,
    CloseCode,
    FieldProblem,
    Forbidden,
    InvalidInput,
    Problem,
    Unauthenticated,
)
from realtime.fanout.spec import Spec, check_topics
from realtime.sockets.connection import Connection
from realtime.sockets.context import Surroundings
from realtime.wire import frames
from realtime.wire.frames import Frames, Rendering
from realtime.wire.writer import EXTENSION, QueuedWriter, Writer
from resources.topics import PUBLIC_TOPICS, TOPICS
from schemas import MAX_ID

HEARTBEAT_SECONDS = 20  # proxies drop sockets that are idle for 30 to 120 s
_NUMBER = re.compile(r"[0-9]{1,19}")
PARAMETERS = ("topics", "since", "epoch", "bulk")


@dataclass(frozen=True, slots=True)
class Realtime:
    """What the endpoint needs of the process; in the lifespan state as `realtime`."""

    around: Surroundings
    allowed_origins: tuple[str, ...]
    requires_auth: bool


@dataclass(frozen=True, slots=True)
class Wish:
    """The query of the handshake."""

    topics: frozenset[str]
    since: int | None
    epoch: str | None
    rendering: Rendering


def parse_wish(items: list[tuple[str, str]]) -> Wish:
    """Raises InvalidInput with everything that is wrong."""
    problems: list[FieldProblem] = []
    given: dict[str, str] = {}
    for name, value in items:
        if name not in PARAMETERS:
            expected = ", ".join(PARAMETERS)
            problems.append(FieldProblem(("query", name), f"Unknown parameter; expected one of {expected}", "unknown"))
        elif name in given:
            problems.append(FieldProblem(("query", name), "Expected once", "repeated"))
        given[name] = value
    topics = frozenset(name for name in given["topics"].split(",") if name) if "topics" in given else PUBLIC_TOPICS
    if not topics or not topics <= TOPICS.keys():
        expected = ", ".join(TOPICS)
        problems.append(FieldProblem(("query", "topics"), f"Expected one or more of {expected}", "unknown_topic"))
    since = given.get("since")
    if since is not None and not (_NUMBER.fullmatch(since) and int(since) <= MAX_ID):
        problems.append(FieldProblem(("query", "since"), "Expected the number of an event, 0 or more", "invalid_since"))
    if given.get("bulk", "items") not in ("items", "summary"):
        problems.append(FieldProblem(("query", "bulk"), "Expected items or summary", "invalid_bulk"))
    if "epoch" in given and since is None:
        problems.append(FieldProblem(("query", "epoch"), "Expected since beside epoch", "missing_since"))
    if problems:
        raise InvalidInput(problems)
    return Wish(
        topics,
        int(since) if since is not None else None,
        given.get("epoch"),
        Rendering("summary" if given.get("bulk") == "summary" else "items"),
    )


def check_origin(origin: str | None, host: str | None, allowed: tuple[str, ...]) -> None:
    """Browsers send Origin and let any page connect: only our own page and those allowed may. Raises Forbidden."""
    if origin is None or "*" in allowed or origin.rstrip("/") in allowed:
        return
    try:
        own = host is not None and urlsplit(origin).netloc.lower() == host.lower()
    except ValueError:
        own = False
    if not own:
        raise Forbidden("This origin is not allowed; the service lists it in ALLOWED_ORIGINS")


def token_of(websocket: WebSocket) -> tuple[str | None, str | None]:
    """The token and the subprotocol to accept: from the Authorization header, else `Sec-WebSocket-Protocol`.

    Raises Unauthenticated for a header that is no bearer token.
    """
    scheme, _, token = websocket.headers.get("authorization", "").partition(" ")
    offered = list(websocket.scope.get("subprotocols", []))
    chosen = "bearer" if "bearer" in offered else None
    if scheme.lower() == "bearer":
        return token.strip(), chosen
    if scheme:
        raise Unauthenticated("Expected the header Authorization: Bearer <token>")
    if chosen is not None and len(offered) > offered.index("bearer") + 1:
        return offered[offered.index("bearer") + 1], chosen
    return None, chosen


async def watch(websocket: WebSocket) -> None:
    realtime: Realtime = websocket.state.realtime
    around = realtime.around
    feed = around.sources.feed
    with ExitStack() as stack:
        try:
            check_origin(websocket.headers.get("origin"), websocket.headers.get("host"), realtime.allowed_origins)
            wish = parse_wish(websocket.query_params.multi_items())
            stack.enter_context(around.registry.place(websocket.client.host if websocket.client else ""))
            token, subprotocol = token_of(websocket)
            identity = await around.identify(token) if token is not None else None
            if identity is not None or not realtime.requires_auth:
                check_topics(wish.topics, identity)
            direct: Writer | None = websocket.scope.get("extensions", {}).get(EXTENSION)
            stream = direct if direct is not None else QueuedWriter(websocket)
            connection = Connection(websocket, stream, around)
            stack.callback(connection.close)
            if identity is not None:
                await connection.sign_in(identity)
            resync_reason = await feed.find_place(wish.since, wish.epoch)
            generation = feed.generation
        except Problem as problem:
            await _refuse(websocket, problem)
            return
        await websocket.accept(subprotocol=subprotocol)
        if wish.since is not None and generation != feed.generation:
            resync_reason = "the log was replaced"
        _welcome(realtime, connection, wish, resync_reason)
        try:
            if isinstance(stream, QueuedWriter):
                # Under our own server the protocol counts.
                metrics.websocket_opened()
                metrics.websocket_closed(await _first_of(stream.run(), _receive(websocket, connection)))
            else:
                await _receive(websocket, connection)
        finally:
            connection.close()
        await connection.finish()


async def _refuse(websocket: WebSocket, problem: Problem) -> None:
    body = orjson.dumps({"detail": problem.detail})
    response = Response(body, problem.status, dict(problem.headers), "application/json")
    await websocket.send_denial_response(response)


def _welcome(realtime: Realtime, connection: Connection, wish: Wish, resync_reason: str | None) -> None:
    """Nothing is awaited here: the number in the welcome is the place where the stream begins."""
    stream, identity = connection.stream, connection.identity
    try:
        # Who it is may have changed since the handshake began.
        if connection.is_ending:
            raise Unauthenticated("")
        if identity is not None or not realtime.requires_auth:
            check_topics(wish.topics, identity)
    except Problem:
        stream.close(CloseCode.TOKEN_EXPIRED, CLOSE_REASONS[CloseCode.TOKEN_EXPIRED])
        return
    head = realtime.around.sources.feed.head
    start = wish.since if wish.since is not None and resync_reason is None else head.seq
    first = [
        frames.welcome(
            epoch=head.epoch,
            seq=start,
            user_id=identity.user_id if identity is not None else None,
            heartbeat_seconds=HEARTBEAT_SECONDS,
        )
    ]
    if resync_reason is not None:
        first.append(frames.resync(reason=resync_reason, epoch=head.epoch, seq=head.seq))
    stream.write(Frames(first))
    spec = Spec(wish.topics, wish.rendering)
    if realtime.requires_auth and identity is None:
        connection.open_closed_doors(spec, start)
    else:
        connection.open(spec, start)


async def _first_of(*lives: Coroutine[Any, Any, int]) -> int:
    """The result of whichever ends first, and the end of the others."""
    tasks = [asyncio.create_task(life) for life in lives]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return done.pop().result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _receive(websocket: WebSocket, connection: Connection) -> int:
    """Take what the client says until the end; answers the close code."""
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
