"""When to reconnect, when to repeat a message, and when to give up. Pure: waiting is left to the caller."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .errors import Unauthorized, refusal

MAX_RETRY_AFTER_SECONDS = 60.0  # the most that a Retry-After header can add to a pause
TOO_MANY_MESSAGES = 4429
TOKEN_EXPIRED = 4501
TOO_MANY_MESSAGES_SECONDS = 1.0  # After close code 4429, an immediate reconnect would exceed the limit again.
REPEAT_SECONDS = 1.0  # The pause between a temporary error reply and the next attempt.
NOT_HANDLED = frozenset(("rate_limited", "too_many_requests"))  # Error codes of messages that had no effect.


@dataclass(frozen=True, slots=True)
class Retry:
    """The limits on the pauses between attempts.

    The n-th pause in a row (counted from 0) is a random time of up to `first_seconds` * 2^n, but at most
    `longest_seconds`. It is random ("full jitter") so that clients that lost their connections together do not
    reconnect together. A connection that lasted `proven_seconds` resets the count.
    """

    first_seconds: float = 0.25
    longest_seconds: float = 15.0
    proven_seconds: float = 5.0


@dataclass(frozen=True, slots=True)
class Ending:
    """How a connection or an attempt to connect ended.

    `code`: the close code from the server, the HTTP status of a refused handshake, or None if there was neither.
    """

    code: int | None = None
    detail: Any = ""
    lasted_seconds: float = 0.0  # counted from the welcome
    retry_after_seconds: float | None = None


class Pacer:
    """Decides when one client reconnects."""

    def __init__(self, retry: Retry, can_renew: bool, chance: Callable[[], float] = random.random) -> None:
        self._retry = retry
        self._can_renew = can_renew  # whether the token comes from a callable
        self._chance = chance
        self._attempts = 0
        self._renewed = False

    def after(self, ending: Ending) -> float:
        """Return the seconds to wait before the next attempt. Raises Refused when the client must give up."""
        if ending.lasted_seconds >= self._retry.proven_seconds:
            self._attempts, self._renewed = 0, False
        code = ending.code
        if code in (401, TOKEN_EXPIRED):
            if not self._can_renew or self._renewed:
                raise Unauthorized(code, ending.detail)
            self._renewed = True
        elif code is not None and _is_final(code):
            raise refusal(code, ending.detail)
        seconds = self._chance() * min(self._retry.first_seconds * 2.0**self._attempts, self._retry.longest_seconds)
        self._attempts = min(self._attempts + 1, 16)
        if code == TOO_MANY_MESSAGES:
            seconds += TOO_MANY_MESSAGES_SECONDS
        if ending.retry_after_seconds is not None:
            seconds += min(ending.retry_after_seconds, MAX_RETRY_AFTER_SECONDS)
        return seconds


def is_temporary(code: str, is_repeatable: bool = True) -> bool:
    """Return whether a message that the server rejected with this error code should be sent again.

    `is_repeatable`: the message may be sent again even if the server has already acted on it.
    """
    return code in NOT_HANDLED or (code == "unavailable" and is_repeatable)


def _is_final(code: int) -> bool:
    if code < 1000:  # An HTTP status: 408, 425, 429 and all from 500 on are temporary.
        return 400 <= code < 500 and code not in (408, 425, 429)
    return code in (1007, 1009) or 4500 <= code < 5000
