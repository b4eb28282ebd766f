"""Moving windows in memory.

A window stores its first STEPS hits one by one. Further hits are grouped into steps, each of which lasts a STEPS-th of
the window. A step is dropped once all of it is outside the window. So a client's state has at most about 2 × STEPS
entries, however high its limit is, and a client never exceeds its limit in any window. Idle clients are forgotten as
new ones arrive.
"""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from dataclasses import dataclass, field

from core.rates import Rate

STEPS = 60
MAX_CLIENTS = 50_000  # the maximum per rate; beyond it, the least recently seen client is forgotten


@dataclass(frozen=True, slots=True)
class Hit:
    """The state of a window after a hit. Only allowed hits are counted. `remaining` grows after `reset_seconds`."""

    is_allowed: bool
    remaining: int
    reset_seconds: float


@dataclass(slots=True)
class _Step:
    moment: float
    count: int = 0


@dataclass(slots=True)
class _Window:
    steps: deque[_Step] = field(default_factory=deque)
    total: int = 0


class Windows:
    """The windows of all clients for one rate. `now` is the time in seconds on any monotonic clock."""

    def __init__(self, rate: Rate) -> None:
        self._rate = rate
        self._grain = rate.seconds / STEPS
        # The least recently seen client comes first.
        self._clients: OrderedDict[str, _Window] = OrderedDict()

    def __len__(self) -> int:
        return len(self._clients)

    def hit(self, key: str, now: float) -> Hit:
        """Count a hit if the client's window has room for it."""
        clients, rate = self._clients, self._rate
        window = clients.get(key)
        if window is None:
            self._forget(now)
            window = clients[key] = _Window()
        else:
            clients.move_to_end(key)
        steps = window.steps
        begin = now - rate.seconds
        while steps and steps[0].moment <= begin:
            window.total -= steps.popleft().count
        is_allowed = window.total < rate.amount
        if is_allowed:
            moment = now if len(steps) < STEPS else math.ceil(now / self._grain) * self._grain
            if not steps or steps[-1].moment < moment:
                steps.append(_Step(moment))
            steps[-1].count += 1
            window.total += 1
        return Hit(is_allowed, rate.amount - window.total, steps[0].moment - begin)

    def clear(self, key: str) -> None:
        self._clients.pop(key, None)

    def _forget(self, now: float) -> None:
        # Remove up to two clients for each new one, so that idle clients are removed faster than new ones arrive.
        for _ in range(2):
            oldest = next(iter(self._clients.values()), None)
            if oldest is None:
                return
            if len(self._clients) < MAX_CLIENTS and oldest.steps[-1].moment > now - self._rate.seconds:
                return
            self._clients.popitem(last=False)
