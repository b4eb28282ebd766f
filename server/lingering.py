"""Keeps the connection of a rejected websocket handshake open until its client can have received the response."""

from __future__ import annotations

from collections.abc import Callable

from server import http_budgets
from server.http_budgets import DiscardBudget
from server.http_connections import HttpConnections


class Lingering:
    """Decides for how long input is discarded after the response, with the same limits as after other HTTP responses.

    The connection counts as an HTTP connection until `end` is called.
    """

    def __init__(self, connections: HttpConnections, address: str, close_after: Callable[[float], None]) -> None:
        """`close_after` takes the seconds after which to close the connection, and replaces the time set before."""
        self._connections = connections
        self._address = address
        self._close_after = close_after
        self._budget = DiscardBudget(http_budgets.LINGER_SECONDS)
        self._is_counted = connections.enter(address) is None
        self.discard(0)

    def discard(self, size: int) -> None:
        """Note that `size` bytes have arrived and were discarded."""
        seconds = self._budget.spend(size)
        self._close_after(seconds if self._is_counted and seconds > 0 else 0.0)

    def end(self) -> None:
        """Stop counting the connection, because it is closed. Idempotent."""
        if self._is_counted:
            self._is_counted = False
            self._connections.leave(self._address)
