"""The process-wide services that every websocket connection uses."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

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
    """One per process, in the lifespan state as `realtime`.

    `identify` returns the identity of an access token that was sent from an address; it raises Unauthenticated and
    Unavailable.
    """

    feed: Feed
    live: LiveSubscriptions
    snapshots: Snapshots
    registry: Registry
    places: Places
    presence: Presence
    identify: Callable[[str, str], Awaitable[Identity]]
    allowed_origins: tuple[str, ...]  # in addition to the service's own
    warn_of_origin: WarnOnce  # called with each rejected origin
    requires_auth: bool
    limits_messages: bool  # False where the operator has switched off rate limits
