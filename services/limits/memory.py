"""Moving windows in memory: how often each client has come in the last so many seconds.

The first hits in a window are remembered one by one. From STEPS of them on, hits share steps of a STEPS-th of the
window, and a step leaves when its last moment does: so a client costs at most about 2 × STEPS numbers however many hits
it may make, and never gets more than it may in any window. Clients that stay away are forgotten as others come.
"""

from __future__ import annotations

import math
from collections import OrderedDict, deque

from core.rates import Rate

STEPS = 60
MAX_CLIENTS = 50_000  # of one rate; with more at once, those that came longest ago begin anew


class _Step:
    __slots__ = ("count", "moment")

    def __init__(self, moment: float) -> None:
        self.moment = moment
        self.count = 0


class _Window:
    __slots__ = ("steps", "total")

    def __init__(self) -> None:
        self.steps: deque[_Step] = deque()
        self.total = 0


class Windows:
    """The windows of all clients of one rate. `now` is in seconds, on any clock that does not go back."""

    def __init__(self, rate: Rate) -> None:
        self._rate = rate
        self._grain = rate.seconds / STEPS
        # Those who came longest ago first.
        self._clients: OrderedDict[str, _Window] = OrderedDict()

    def __len__(self) -> int:
        return len(self._clients)

    def hit(self, key: str, now: float) -> tuple[bool, int, float]:
        """Whether there was room, how much is left, and in how many seconds there will be more."""
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
        return is_allowed, rate.amount - window.total, steps[0].moment - begin

    def clear(self, key: str) -> None:
        self._clients.pop(key, None)

    def _forget(self, now: float) -> None:
        """Two for each that comes: so those whose windows are empty go faster than others come."""
        for _ in range(2):
            oldest = next(iter(self._clients.values()), None)
            if oldest is None:
                return
            if len(self._clients) < MAX_CLIENTS and oldest.steps[-1].moment > now - self._rate.seconds:
                return
            self._clients.popitem(last=False)
