"""The process-wide services that every websocket connection uses."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from core.errors import Unavailable
from core.identity import Identity
from core.logs import WarnOnce
from realtime.fanout.snapshot import Snapshots
from realtime.fanout.subscription import LiveSubscriptions
from realtime.feed.feed import Feed
from realtime.presence.presence import Presence
from realtime.sockets.places import Places
from realtime.sockets.registry import Registry


@dataclass(frozen=True, slots=True)
class SocketContext:
    """One per process, stored in the lifespan state as `realtime`.

    `identify` takes an access token and the address that sent it, and returns the identity. It raises Unauthenticated
    or Unavailable. `explain` takes an unexpected exception and returns the error for the client, or None if the
    exception is a bug.
    """

    feed: Feed
    live: LiveSubscriptions
    snapshots: Snapshots
    registry: Registry
    places: Places
    presence: Presence
    identify: Callable[[str, str], Awaitable[Identity]]
    explain: Callable[[Exception], Awaitable[Unavailable | None]]
    allowed_origins: tuple[str, ...]  # The service's own origin is always allowed as well.
    warn_of_origin: WarnOnce  # `warn_of_origin` is called with each rejected origin.
    requires_auth: bool
    limits_messages: bool  # False if the operator has switched off rate limits
