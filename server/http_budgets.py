"""How much input of a connection is read although no request needs it."""

from __future__ import annotations

import asyncio

# Some clients send their whole body before they read the response. This allows for a picture over a slow connection.
LINGER_SECONDS = 30.0
LINGER_BYTES = 64 * 1024 * 1024
LINGER_QUIET_SECONDS = 5.0  # After this long without a byte, no more input is expected.
SHORT_LINGER_SECONDS = 1.0  # Replaces LINGER_SECONDS for a connection beyond the limits, and when the service stops.


class DiscardBudget:
    """The bytes and the time that are left for input that is discarded: LINGER_BYTES, and `seconds` from now."""

    def __init__(self, seconds: float) -> None:
        self._until = asyncio.get_running_loop().time() + seconds
        self._bytes = LINGER_BYTES

    def spend(self, size: int) -> float:
        """Count `size` bytes. Return for how many seconds to wait for more input, at most 0 if the budget is spent."""
        self._bytes -= size
        if self._bytes < 0:
            return 0.0
        return min(self._until - asyncio.get_running_loop().time(), LINGER_QUIET_SECONDS)
