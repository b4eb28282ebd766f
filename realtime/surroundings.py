"""What connections need of the process."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from realtime.presence import Presence
from realtime.registry import Registry
from realtime.subscription import Sources
from security import Identity

Identify = Callable[[str], Awaitable[Identity]]


@dataclass(frozen=True, slots=True)
class Surroundings:
    """One per process; `has_limits` is off where the operator lifts the limits of rate."""

    sources: Sources
    registry: Registry
    presence: Presence
    identify: Identify
    has_limits: bool
