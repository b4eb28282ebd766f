"""Excerpts of strings that clients send, for messages and log lines, whose size clients must not decide. Pure."""

from __future__ import annotations

MAX_QUOTED_LENGTH = 100  # of a client's string in a message, such as the name of an unknown field
ELLIPSIS = "…"


def shortened(text: str, max_length: int = MAX_QUOTED_LENGTH) -> str:
    """Return the text itself, or its beginning and an ellipsis, in at most `max_length` characters."""
    return text if len(text) <= max_length else text[: max_length - len(ELLIPSIS)] + ELLIPSIS
