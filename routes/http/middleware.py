"""Middleware for every request: path normalisation, request ids, the access log, and errors in one shape."""

from __future__ import annotations

import asyncio
import re
import time
import uuid
from dataclasses import dataclass

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, HTTPConnection, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocket

from core import metrics, scope_keys
from core.errors import Problem, TooManyRequests, UpgradeRequired
from core.network.addresses import network_of
from core.network.shares import CLIENT
from core.texts.shortened import shortened
from routes.http import limit_groups
from routes.http.rendering import error_response, problem_response

PREFIX = "/api/v1"
MAX_LOGGED_PATH_BYTES = 500  # the limit applies to the percent-encoded path
_SANE_ID = re.compile(r"^[A-Za-z0-9._-]{1,128}$")
# Browsers must use the declared media type, even if a response looks like a script or a page.
_NOSNIFF = (b"x-content-type-options", b"nosniff")
log = structlog.get_logger("http")


@dataclass(eq=False)
class _Middleware:
    """The base class of middleware around the application `app`."""

    app: ASGIApp


@dataclass(eq=False)
class OnePath(_Middleware):
    """Serves `/marquee/api/v1/movies/` as `/movies`, so that each route is declared once and no request is redirected.

    `root` is the path under which clients reach the service, or an empty string. A proxy in front of the service may
    or may not remove `root` from the path.
    """

    root: str = ""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] in ("http", "websocket"):
            # A server that has its own root path (uvicorn --root-path) puts it before the path of each request.
            path = below(below(scope["path"], scope.get("root_path", "")), self.root)
            prefix = PREFIX if path == PREFIX or path.startswith(PREFIX + "/") else ""
            rest = path[len(prefix) :]
            if len(rest) > 1 and rest.endswith("/"):
                rest = rest[:-1]
            changes = {"path": rest or "/", "root_path": "", scope_keys.ROOT: self.root}
            scope = {**scope, **changes, scope_keys.PREFIX: self.root + prefix}
            if any(name == b"range" for name, _ in scope["headers"]):
                # Ranges are not supported, and a server may ignore the header Range (RFC 9110, section 14.2).
                scope["headers"] = [each for each in scope["headers"] if each[0] != b"range"]
        await self.app(scope, receive, send)


def below(path: str, root: str) -> str:
    """Return the path without the prefix `root`, or unchanged if it does not begin with `root`."""
    return path[len(root) :] or "/" if root and (path == root or path.startswith(root + "/")) else path


@dataclass(eq=False)
class ClientShare(_Middleware):
    """Sets the client whose share the database reads of a request or a websocket use; see `core.network.shares`."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # Set the client even if it is empty, because this task may have inherited a client from another task.
        CLIENT.set(network_of(scope["client"][0]) if scope.get("client") is not None else "")
        await self.app(scope, receive, send)


class RequestLog(_Middleware):
    """Gives each request an id, returns the id in `X-Request-ID`, and logs a line with the id but no query string."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _SANE_ID.match(given) else uuid.uuid4().hex
        is_websocket = scope["type"] == "websocket"
        is_on_socket = scope_keys.SOCKET in scope  # a request sent over a websocket: its response becomes a frame
        started = time.perf_counter()
        status, is_stream = 0, False

        async def send_with_id(message: Message) -> None:
            nonlocal status, is_stream
            if message["type"] in ("http.response.start", "websocket.http.response.start", "websocket.accept"):
                status = message.get("status", 101)
                message.setdefault("headers", [])
                headers = MutableHeaders(scope=message)
                headers["X-Request-ID"] = request_id
                if not is_on_socket:
                    message["headers"] = [*message["headers"], _NOSNIFF]
                if (counted := scope.get(scope_keys.LIMIT)) is not None:
                    message["headers"] = [*message["headers"], *limit_groups.headers_of(counted)]
                is_stream = headers.get("content-type", "").startswith("text/event-stream")
                if is_websocket:  # count the request now, not when the websocket closes
                    metrics.request_answered("GET", _route_of(scope), status, None)
            await send(message)

        with structlog.contextvars.bound_contextvars(request_id=request_id):
            try:
                await self.app(scope, receive, send_with_id)
            finally:
                seconds = time.perf_counter() - started
                if not is_websocket:
                    metrics.request_answered(scope["method"], _route_of(scope), status, None if is_stream else seconds)
                log.info(
                    "request",
                    method=scope.get("method", "WEBSOCKET"),
                    path=_logged_path(scope),
                    status=status,
                    ms=round(seconds * 1000, 1),
                )


def _logged_path(scope: Scope) -> str:
    """Return the path as it was sent, shortened.

    The path is not decoded, because it may contain encoded terminal control sequences.
    """
    raw: bytes = scope.get("raw_path", b"")[: MAX_LOGGED_PATH_BYTES + 1]
    return shortened(raw.partition(b"?")[0].decode("latin-1"), MAX_LOGGED_PATH_BYTES)


def _route_of(scope: Scope) -> str:
    """Return the template of the path, or "unmatched", so that clients cannot add new label values to the metrics."""
    route = scope.get("route")
    return getattr(route, "path_format", "") or "unmatched"


class NoNewSockets(_Middleware):
    """Rejects websockets on shutdown, so that the client connects to another worker instead."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket" and scope["state"]["stopping"].is_stopping:
            await WebSocket(scope, receive, send).send_denial_response(_stopping(scope))
            return
        await self.app(scope, receive, send)


def _stopping(scope: Scope) -> Response:
    return error_response(503, "The service is stopping", Headers(scope=scope), {"Retry-After": "1"})


async def on_problem(request: Request, error: Exception) -> Response:
    """Return the problem in the shape that all errors have."""
    assert isinstance(error, Problem)
    return problem_response(error, request.headers)


async def on_http_exception(request: Request, error: Exception) -> Response:
    """Return the error for a request rejected by Starlette (unknown path or method), in the shape that all errors have.

    Such requests count towards the rate limit for anonymous reads from their address.
    """
    assert isinstance(error, HTTPException)
    try:
        await _count_unmatched(request)
    except TooManyRequests as problem:
        return problem_response(problem, request.headers)
    return error_response(error.status_code, error.detail, request.headers, error.headers)


async def not_found(scope: Scope, receive: Receive, send: Send) -> None:
    """Respond to a request that matches no route. A rejected websocket also receives a response with the reason."""
    if scope["type"] == "websocket":
        websocket = WebSocket(scope, receive, send)
        answer = error_response(404, "Not Found: websockets are at /ws", websocket.headers)
        try:
            await _count_unmatched(websocket)
        except TooManyRequests as problem:
            answer = problem_response(problem, websocket.headers)
        await websocket.send_denial_response(answer)
    elif scope["path"] == "/ws":
        await _count_unmatched(Request(scope, receive))
        raise UpgradeRequired("Expected a websocket: the header Upgrade is missing")
    else:
        raise HTTPException(404)


async def _count_unmatched(request: HTTPConnection) -> None:
    """Count a request that no operation handles. Raises TooManyRequests."""
    services = request.state.services
    await limit_groups.count(request, services.limits, services.limit_rules.get(limit_groups.UNMATCHED), None)


class Unexpected(_Middleware):
    """Turns any unexpected exception into a 500 that reveals no internals, and logs it with the request id.

    The response is a 503 instead if the exception may come from a column with an unexpected type, or if the database
    cannot be reached to find out.
    """

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            try:
                await self.app(scope, receive, send)
            except asyncio.CancelledError:
                if not scope["state"]["stopping"].is_stopping:
                    raise
                # The shutdown deadline has passed and the connection is aborted.
            return
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = False

        async def send_noting(message: Message) -> None:
            nonlocal started
            started = started or message["type"] == "http.response.start"
            await send(message)

        try:
            await self.app(scope, receive, send_noting)
        except ClientDisconnect:
            log.info("client disconnected", path=_logged_path(scope))
        except asyncio.CancelledError:
            # The shutdown deadline has passed.
            if not started:
                await _stopping(scope)(scope, receive, send)
        except Exception as error:
            services = scope.get("state", {}).get("services")  # missing if the application was not started
            unavailable = await services.database.schema.explain(error) if services is not None else None
            if unavailable is None:
                log.error("unexpected error", exc_info=error)
            if started:
                raise
            asked = Headers(scope=scope)
            if unavailable is not None:
                response = problem_response(unavailable, asked)
            else:
                response = error_response(500, "Internal Server Error", asked)
            await response(scope, receive, send)
