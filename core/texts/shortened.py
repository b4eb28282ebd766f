"""Excerpts of strings from clients, so that messages and log lines do not grow too long. No I/O."""

from __future__ import annotations

MAX_QUOTED_LENGTH = 100  # the limit for a client's string in a message, such as the name of an unknown field
ELLIPSIS = "…"


def shortened(text: str, max_length: int = MAX_QUOTED_LENGTH) -> str:
    """Return the text, cut to `max_length` characters if it is longer. A cut text ends with an ellipsis."""
    return text if len(text) <= max_length else text[: max_length - len(ELLIPSIS)] + ELLIPSIS
