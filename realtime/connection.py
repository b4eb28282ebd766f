"""One websocket: what it subscribes to, who it is, and what it asks.

Each message gets one reply. The next message is read only when the socket has taken the last reply, so a client that
asks and does not read fills nothing but its own buffer.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import orjson

from errors import CLOSE_REASONS, CloseCode, Forbidden, Problem
from realtime import frames
from realtime.frames import Frames
from realtime.stream import Stream
from realtime.subscription import Subscription, check_topics
from security import Identity

MAX_TOKEN_LENGTH = 4096

Identify = Callable[[str], Awaitable[Identity]]


@dataclass(frozen=True, slots=True)
class Request:
    """A message of the client."""

    id: int | str | None
    action: str
    arguments: Mapping[str, Any]


class BadMessage(Exception):
    """Answered with an error reply and, with `close`, the end of the connection."""

    def __init__(
        self, code: str, detail: Any, reply_to: int | str | None = None, close: CloseCode | None = None
    ) -> None:
        super().__init__(detail)
        self.code = code
        self.detail = detail
        self.reply_to = reply_to
        self.close = close


def parse_message(text: str) -> Request:
    """Raises BadMessage."""
    try:
        message = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise BadMessage("invalid_json", f"Expected a JSON object: {error}") from error
    if not isinstance(message, dict):
        raise BadMessage("invalid_message", 'Expected a JSON object such as {"id": 1, "action": "ping"}')
    reply_to = message.pop("id", None)
    if isinstance(reply_to, bool) or not isinstance(reply_to, int | str | None):
        raise BadMessage("invalid_message", "id: expected an integer or a text")
    if isinstance(reply_to, str) and len(reply_to) > 255:
        raise BadMessage("invalid_message", "id: expected at most 255 characters")
    action = message.pop("action", None)
    if not isinstance(action, str):
        raise BadMessage("invalid_message", "action: expected a text such as ping", reply_to)
    return Request(reply_to, action, message)


class Connection:
    """Between `open` and `stop` the socket is subscribed."""

    def __init__(
        self, stream: Stream, subscription: Subscription, identity: Identity | None, identify: Identify
    ) -> None:
        self.stream = stream
        self.subscription = subscription
        self.identity = identity
        self._identify = identify
        self._expiry: asyncio.TimerHandle | None = None
        self._actions: Mapping[str, Callable[[Request], Awaitable[Mapping[str, Any]]]] = {
            "ping": self._ping,
            "auth": self._auth,
        }

    def open(self, position: int) -> None:
        self._watch_expiry()
        self.subscription.start(position)

    def stop(self) -> None:
        self.subscription.stop()
        if self._expiry is not None:
            self._expiry.cancel()

    def _watch_expiry(self) -> None:
        if self._expiry is not None:
            self._expiry.cancel()
        if self.identity is not None:
            seconds = max(0.0, self.identity.expires_at - time.time())
            self._expiry = asyncio.get_running_loop().call_later(seconds, self._close, CloseCode.TOKEN_EXPIRED)

    def _close(self, code: CloseCode) -> None:
        self.stream.close(code, CLOSE_REASONS[code])

    async def receive_text(self, text: str) -> None:
        """Answer one text frame."""
        close = None
        try:
            request = parse_message(text)
            action = self._actions.get(request.action)
            if action is None:
                expected = ", ".join(sorted(self._actions))
                raise BadMessage("unknown_action", f"action: expected one of {expected}", request.id)
            answer = frames.reply(request.id, await action(request))
        except BadMessage as error:
            answer = frames.error_reply(error.reply_to, error.code, error.detail)
            close = error.close
        self.stream.write(Frames([answer]))
        if close is not None:
            self._close(close)
        await self.stream.drained()

    def receive_bytes(self) -> None:
        """The protocol has no binary frames: whoever sends one does not speak it."""
        detail = "Expected JSON objects in text frames, got a binary frame"
        self.stream.write(Frames([frames.error_reply(None, "binary_frame", detail)]))
        self._close(CloseCode.PROTOCOL_ERROR)

    async def _ping(self, request: Request) -> Mapping[str, Any]:
        _only(request, ())
        return {}

    async def _auth(self, request: Request) -> Mapping[str, Any]:
        _only(request, ("token",))
        token = request.arguments.get("token")
        if not isinstance(token, str) or not 1 <= len(token) <= MAX_TOKEN_LENGTH:
            raise BadMessage("invalid_message", "token: expected a text", request.id)
        try:
            self.identity = await self._identify(token)
        except Problem as error:
            close = CloseCode.TOKEN_EXPIRED if error.status == 401 else None
            raise BadMessage(error.code, error.detail, request.id, close) from error
        try:
            check_topics(self.subscription.spec.topics, self.identity)
        except Forbidden as error:
            raise BadMessage(error.code, error.detail, request.id, CloseCode.FORBIDDEN) from error
        self._watch_expiry()
        self.subscription.respec(replace(self.subscription.spec, audiences=self.identity.audiences))
        return {"user_id": self.identity.user_id, "group": self.identity.group}


def _only(request: Request, known: tuple[str, ...]) -> None:
    unknown = sorted(set(request.arguments) - set(known))
    if unknown:
        raise BadMessage("invalid_message", f"{unknown[0]}: unknown field of {request.action}", request.id)
