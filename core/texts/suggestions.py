"""Suggestions for misspelt names: the known name that a client probably meant. No I/O."""

from __future__ import annotations

from collections.abc import Collection
from difflib import get_close_matches
from typing import NamedTuple

# The time of a comparison grows with the lengths of both names. No known name is half as long.
MAX_COMPARED_LENGTH = 50
MIN_SIMILARITY = 0.7  # `titel` and `title` have 0.8, `user` and `user_id` 0.73, `mood` and `movie_id` 0.5


class Unknown(NamedTuple):
    """An unknown name, and the names of which one was expected."""

    name: str
    known: Collection[str]

    def nearest(self) -> str | None:
        """Return the known name that is most similar, or None if no name is similar."""
        found = get_close_matches(self.name[:MAX_COMPARED_LENGTH].lower(), self.known, 1, MIN_SIMILARITY)
        return found[0] if found and found[0] != self.name else None
