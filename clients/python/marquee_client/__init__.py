"""Watch a Marquee catalog over one websocket.

    async with Client("ws://127.0.0.1:8000/ws") as client:
        async for event in client.watch("movies"):
            print(event)

The modules, from pure code to I/O: `errors`, `events` (values), `queries` (query strings for REST lists), `retry` (when
to reconnect), `subscription` (one subscription across all connections), `arguments` (validation), `session` (the
protocol across connections). The others use asyncio: `queues`; `watch`, `view` and `presence`, which the application
reads; and `client`, which owns the socket.
"""

from .client import Client
from .errors import (
    ClientClosed,
    ConnectionLost,
    Forbidden,
    MarqueeError,
    ProtocolViolation,
    Refused,
    ServerError,
    TimedOut,
    Unauthorized,
)
from .events import Change, Event, Position, Response, Resync, Row
from .presence import Audience, Presence, PresenceChange
from .queries import query_of
from .retry import Retry
from .view import View
from .watch import Watch

__all__ = [
    "Audience",
    "Change",
    "Client",
    "ClientClosed",
    "ConnectionLost",
    "Event",
    "Forbidden",
    "MarqueeError",
    "Position",
    "Presence",
    "PresenceChange",
    "ProtocolViolation",
    "Refused",
    "Response",
    "Resync",
    "Retry",
    "Row",
    "ServerError",
    "TimedOut",
    "Unauthorized",
    "View",
    "Watch",
    "query_of",
]
