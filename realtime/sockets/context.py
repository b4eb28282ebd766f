"""What connections need of the process."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from core.identity import Identity
from realtime.fanout.subscription import Sources
from realtime.presence.presence import Presence
from realtime.sockets.registry import Registry

Identify = Callable[[str], Awaitable[Identity]]


@dataclass(frozen=True, slots=True)
class Surroundings:
    """One per process; `has_limits` is off where the operator lifts the limits of rate."""

    sources: Sources
    registry: Registry
    presence: Presence
    identify: Identify
    has_limits: bool
