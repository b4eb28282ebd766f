"""How many messages a client may send: a token bucket. Pure but for the clock it is given."""

from __future__ import annotations

from dataclasses import dataclass

MAX_BURST_MESSAGES = 1_000
MESSAGES_PER_SECOND = 500.0  # requests among them: more than one socket can have answered
MAX_REFUSED_MESSAGES = 1_000  # whoever does not listen to errors is cut off


@dataclass(slots=True)
class Bucket:
    """Full at first. `refused` counts since it was half full."""

    updated_at: float
    tokens: float = float(MAX_BURST_MESSAGES)
    refused: int = 0

    def take(self, now: float) -> bool:
        self.tokens = min(MAX_BURST_MESSAGES, self.tokens + (now - self.updated_at) * MESSAGES_PER_SECOND)
        self.updated_at = now
        if self.tokens >= MAX_BURST_MESSAGES / 2:
            self.refused = 0
        if self.tokens < 1:
            self.refused += 1
            return False
        self.tokens -= 1
        return True
