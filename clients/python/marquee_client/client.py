"""The client, which opens a new socket whenever the current socket ends."""

from __future__ import annotations

import asyncio
import inspect
import json
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from types import TracebackType
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus, WebSocketException

from .arguments import options_of, since_of, token_of, topics_of
from .errors import ClientClosed, MarqueeError, ProtocolViolation, TimedOut
from .events import Position, Response
from .presence import Presence
from .retry import Ending, Pacer, Retry
from .session import Call, ServerSilent, Session
from .view import View
from .watch import Watch

OPEN_SECONDS = 10.0
CLOSE_SECONDS = 1.0
SEND_SECONDS = 40.0  # A server that reads nothing for this long is considered dead.
MAX_FRAME_BYTES = 64 * 1024 * 1024  # Events are smaller than 1 MiB, but responses to requests may be larger.

WARNED_ATTEMPTS = 3  # consecutive failures before a warning, so that a wrong URL is noticed

Token = str | Callable[[], Awaitable[str | None] | str | None] | None
log = logging.getLogger("marquee_client")


class Client:
    """A connection to a Marquee service, shared by any number of watches, views and requests.

    `url`: a URL such as `ws://127.0.0.1:8000/ws`. `token`: an access token, or a callable (async or not) that returns a
    token or None. The callable is called before every connection. It may raise `Unauthorized` to end the client; after
    any other error the client tries again later. If the token is malformed, or the server rejects it, the callable is
    called once more; if the second token is not accepted either, the client ends with `Unauthorized`. Whitespace around
    a token is removed. Without a token, or with an empty one, the client is anonymous.

    The client and its methods validate their arguments immediately and raise TypeError or ValueError.

    The client connects when it is entered with `async with` or first used, and stays connected until `close`. It
    belongs to one event loop. When it ends with an error, its watches, views, presences and requests raise that error.
    """

    def __init__(self, url: str, *, token: Token = None, retry: Retry | None = None) -> None:
        self._url = _with_small_default(url)
        self._token = token if callable(token) else token_of(token)
        self._pacer = Pacer(retry or Retry(), can_renew=callable(token))
        self._session = Session()
        self._wake = asyncio.Event()
        self._session.on_message = self._wake.set
        self._task: asyncio.Task[None] | None = None
        self._trouble: str | None = None
        self._failures = 0  # consecutive attempts without a welcome

    async def __aenter__(self) -> Client:
        self._begin()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    @property
    def is_connected(self) -> bool:
        return self._session.is_welcome

    @property
    def trouble(self) -> str | None:
        """Why the last connection or attempt failed, as text; None while connected and before the first failure."""
        return None if self.is_connected else self._trouble

    @property
    def user_id(self) -> int | None:
        """The id of the user that the last connection was authenticated as; None if anonymous."""
        return self._session.user_id

    async def close(self) -> None:
        """Close the client. Loops over watches and changes end; requests raise ClientClosed."""
        self._session.fail(ClientClosed("the client is closed"))
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    # --- the API

    def watch(
        self,
        topics: str | Sequence[str],
        *,
        filter: Mapping[str, Any] | None = None,  # noqa: A002 (the protocol's name)
        q: str | None = None,
        bulk: str | None = None,
        deliver: str | Mapping[str, Any] | None = None,
        since: Position | int | str | None = None,
        epoch: str | None = None,
    ) -> Watch:
        """Return a watch: the events of some topics, from now on or after `since`. Raises TypeError or ValueError."""
        options = options_of(topics_of(topics), filter, q, bulk=bulk, deliver=deliver)
        return Watch(self._session, self._begin, options, since_of(since, epoch))

    def view(
        self,
        topic: str,
        *,
        filter: Mapping[str, Any] | None = None,  # noqa: A002
        q: str | None = None,
        deliver: str | Mapping[str, Any] | None = None,
    ) -> View:
        """Return a view: the rows of a topic, kept up to date. Raises TypeError or ValueError."""
        if not isinstance(topic, str):
            raise TypeError(f"topic: expected one topic, such as 'movies', got {topic!r}")
        options = options_of(topics_of(topic), filter, q, snapshot=True, deliver=deliver)
        return View(self._session, self._begin, options)

    def presence(self, topics: str | Sequence[str]) -> Presence:
        """Return the presence of some topics: who watches them. Raises TypeError or ValueError."""
        return Presence(self._session, self._begin, topics_of(topics))

    async def request(
        self,
        method: str,
        path: str,
        *,
        body: Any = None,
        headers: Mapping[str, str] | None = None,
        idempotency_key: str | None = None,
        timeout_seconds: float | None = None,
    ) -> Response:
        """Send a REST request over the socket, as the socket's user, and return the response, whatever its status.

        The call waits until there is a connection and fewer than 16 requests are in flight. If the connection ends
        before the response, the request is sent again if that is safe: GET, HEAD, PUT and DELETE without `If-Match`,
        and every request with an idempotency key (a repeated DELETE may find nothing left to delete). Otherwise raises
        ConnectionLost.

        Raises ServerError if the server could not handle the message, TypeError or ValueError if the request cannot be
        written as JSON or is too large, and TimedOut after `timeout_seconds`, which include the time spent waiting to
        send. After a timeout or a cancellation, the server may still have carried out the request.
        """
        method, sent = method.upper(), dict(headers or {})
        if idempotency_key is not None:
            sent["Idempotency-Key"] = idempotency_key
        names = {name.lower() for name in sent}
        is_repeatable = "idempotency-key" in names or (
            method in ("GET", "HEAD", "PUT", "DELETE") and "if-match" not in names
        )
        message: dict[str, Any] = {"action": "request", "method": method, "path": path, "headers": sent}
        if body is not None:
            message["body"] = body
        try:
            async with asyncio.timeout(timeout_seconds):
                reply = await self._call(message, is_repeatable)
        except TimeoutError as error:
            raise TimedOut(f"no reply within {timeout_seconds} s; the server may have acted on the request") from error
        received = {str(name).lower(): str(value) for name, value in (reply.get("headers") or {}).items()}
        return Response(reply["status"], received, reply.get("body"))

    async def ping(self) -> float:
        """Return the round-trip time to the server in seconds. Raises ConnectionLost."""
        asked = time.monotonic()
        await self._call({"action": "ping"}, False)
        return time.monotonic() - asked

    async def authenticate(self, token: str) -> Mapping[str, Any]:
        """Send a new token without reconnecting. Return `{"user_id", "group"}`. Raises ServerError.

        Later connections use the new token, too, unless the client gets its tokens from a callable.
        """
        shown = token_of(token)
        if shown is None:
            raise ValueError("token: expected a token, got none")
        reply = await self._call({"action": "auth", "token": shown}, False)
        if not callable(self._token):
            self._token = shown
        data: Mapping[str, Any] = reply["data"]
        self._session.user_id = data.get("user_id")
        return data

    async def _call(self, message: dict[str, Any], is_repeatable: bool) -> Mapping[str, Any]:
        self._begin()
        answer: asyncio.Future[Mapping[str, Any]] = asyncio.get_running_loop().create_future()

        def resolve(reply: Mapping[str, Any]) -> None:
            if not answer.done():
                answer.set_result(reply)

        def reject(error: MarqueeError) -> None:
            if not answer.done():
                answer.set_exception(error)

        call = Call(message, resolve, reject, is_repeatable)
        self._session.call(call)
        try:
            return await answer
        except asyncio.CancelledError:
            self._session.forget(call)
            raise

    # --- the socket

    def _begin(self) -> None:
        if self._task is None and self._session.error is None:
            self._task = asyncio.get_running_loop().create_task(self._run(), name="marquee_client")

    async def _run(self) -> None:
        try:
            while self._session.error is None:
                ending = await self._connection()
                if self._session.error is None:
                    seconds = self._pacer.after(ending)
                    self._record(ending)
                    log.info("connection ended (%s %s), next attempt in %.2f s", ending.code, ending.detail, seconds)
                    await asyncio.sleep(seconds)
        except MarqueeError as error:
            self._session.fail(error)
        except Exception as error:
            # Any other exception is a bug in this package. Waiting callers must still receive an error.
            failure = MarqueeError(f"the client failed: {error!r}")
            failure.__cause__ = error
            self._session.fail(failure)
            raise

    def _record(self, ending: Ending) -> None:
        self._trouble = str(ending.detail) if ending.code is None else f"{ending.code}: {ending.detail}"
        self._failures = self._failures + 1 if ending.lasted_seconds == 0.0 else 0
        if self._failures == WARNED_ATTEMPTS:
            address = self._url.partition("?")[0]
            log.warning(
                "no connection to %s after %d attempts; still trying: %s", address, self._failures, self._trouble
            )

    async def _connection(self) -> Ending:
        """Open and serve one connection. Return how it ended. Raises any MarqueeError from the token callable."""
        try:
            found = self._token() if callable(self._token) else self._token
            if inspect.isawaitable(found):
                found = await found
        except MarqueeError:
            raise
        except Exception as error:  # noqa: BLE001 (the service that issues tokens may be down as well)
            log.warning("the token callable failed: %r", error)
            return Ending(detail=f"the token callable failed: {error!r}")
        try:
            token = token_of(found)
        except (TypeError, ValueError) as error:
            return Ending(401, str(error))
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        try:
            socket = await connect(
                self._url,
                additional_headers=headers,
                compression=None,
                open_timeout=OPEN_SECONDS,
                close_timeout=CLOSE_SECONDS,
                ping_interval=None,  # the session itself pings a silent server
                max_size=MAX_FRAME_BYTES,
            )
        except InvalidStatus as refused:
            return _refused(refused)
        except (OSError, EOFError, WebSocketException) as error:
            return Ending(detail=repr(error))
        self._session.connected(time.monotonic())
        try:
            await self._serve(socket)
            return self._ending(None, "the server does not respond")
        except ConnectionClosed as closed:
            if closed.rcvd is None:
                return self._ending(None, "the connection was cut")
            return self._ending(int(closed.rcvd.code), closed.rcvd.reason)
        except ProtocolViolation as violation:
            log.warning("protocol violated, reconnecting: %s", violation)
            return self._ending(None, str(violation))
        finally:
            self._session.lost()
            if self._session.error is None:
                socket.transport.abort()
            await socket.close()

    async def _serve(self, socket: ClientConnection) -> None:
        """Send and receive until the client must close the connection. Raises ConnectionClosed if it ends earlier."""
        sender = asyncio.create_task(self._send(socket), name="marquee_client sender")
        receiver = asyncio.create_task(self._receive(socket), name="marquee_client receiver")
        try:
            await asyncio.wait((sender, receiver), return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (sender, receiver):
                task.cancel()
            outcomes = await asyncio.gather(receiver, sender, return_exceptions=True)
        for outcome in outcomes:
            if isinstance(outcome, Exception):
                raise outcome

    async def _receive(self, socket: ClientConnection) -> None:
        async for text in socket:
            if isinstance(text, str):
                self._session.receive(text, time.monotonic())
            if self._session.error is not None:
                return
        await socket.recv()  # after a normal close, `recv` raises an exception with the close code

    async def _send(self, socket: ClientConnection) -> None:
        while True:
            try:
                seconds = self._session.beat(time.monotonic())
            except ServerSilent:
                return
            self._wake.clear()
            for message in self._session.messages():
                try:
                    async with asyncio.timeout(SEND_SECONDS):
                        await socket.send(message)
                except TimeoutError:
                    return
            try:
                async with asyncio.timeout(max(0.0, seconds)):
                    await self._wake.wait()
            except TimeoutError:
                pass

    def _ending(self, code: int | None, detail: str) -> Ending:
        welcomed = self._session.welcomed_at
        stood = time.monotonic() - welcomed if welcomed is not None else 0.0
        return Ending(code, detail, stood)


def _refused(refused: InvalidStatus) -> Ending:
    answer = refused.response
    try:
        detail = json.loads(answer.body or b"")["detail"]
    except (ValueError, TypeError, KeyError):
        detail = answer.reason_phrase
    after = answer.headers.get("Retry-After", "")
    seconds = float(after) if after.isascii() and after.isdigit() else None  # HTTP dates in Retry-After are ignored
    return Ending(answer.status_code, detail, retry_after_seconds=seconds)


def _with_small_default(url: str) -> str:
    """Return the URL with parameters for a small default subscription, because the client ignores that subscription.

    Raises ValueError if `url` is not a websocket URL.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("ws", "wss") or not parts.hostname:
        raise ValueError(f"expected a URL such as ws://127.0.0.1:8000/ws, got {url!r}")
    query = parse_qsl(parts.query, keep_blank_values=True)
    names = {name for name, _ in query}
    query.extend(pair for pair in (("topics", "jobs"), ("bulk", "summary")) if pair[0] not in names)
    return urlunsplit(parts._replace(query=urlencode(query), fragment=""))
