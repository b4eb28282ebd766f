"""Watch a Marquee catalog over one websocket.

    async with Client("ws://127.0.0.1:8000/ws") as client:
        async for event in client.watch("movies"):
            print(event)

Modules, from the pure to the wire: `errors`, `events` (what arrives), `retry` (when to come back), `stream` (one
subscription), `arguments` (what callers pass), `session` (one socket after another), then `feed`, `watch`, `view`,
`presence` (what the application reads) and `client` (the socket itself). All but the last four know no asyncio.
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
]
