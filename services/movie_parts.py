"""How many characters, ratings and comments are generated with each movie. Pure.

The numbers depend only on the position of the movie in its job. So the rows of a job can be counted before any of them
is made, and the number of stored rows tells at which movie a job continues.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from itertools import accumulate

from resources.movies import MOVIES

# For each part, the numbers of its rows for a cycle of movies, which is repeated.
_COUNTS: Mapping[str, Sequence[int]] = {
    "characters": (3, 5, 2, 4, 6, 1, 3, 4, 2, 5),
    "ratings": (4, 0, 9, 2, 6, 1, 12, 3, 5, 8),
    "comments": (2, 0, 4, 1, 3, 0, 6, 0, 2, 2),
}
CYCLE = 10
PARTS = MOVIES.generated_with
assert tuple(_COUNTS) == PARTS, "expected the numbers of each part"
assert all(len(counts) == CYCLE for counts in _COUNTS.values())


class Plan:
    """The numbers of rows that are generated with the given parts, which are names from PARTS; without any, one row for
    each movie.
    """

    def __init__(self, parts: Iterable[str]) -> None:
        self.parts = tuple(name for name in PARTS if name in set(parts))

    def count(self, part: str, position: int) -> int:
        """Return the number of rows of a part that belong to the movie at `position`."""
        return _COUNTS[part][position % CYCLE] if part in self.parts else 0

    @cached_property
    def _before(self) -> Sequence[int]:
        """The numbers of rows before each movie of a cycle, and of the whole cycle."""
        sizes = (1 + sum(self.count(part, position) for part in self.parts) for position in range(CYCLE))
        return list(accumulate(sizes, initial=0))

    @property
    def most(self) -> int:
        """The highest number of rows of one movie, itself included."""
        return max(after - before for before, after in zip(self._before, self._before[1:], strict=False))

    def rows_of(self, movies: int) -> int:
        """Return the number of rows of the first `movies` movies of a job."""
        cycles, rest = divmod(movies, CYCLE)
        return cycles * self._before[-1] + self._before[rest]

    def movies_in(self, rows: int) -> int:
        """Return how many whole movies the first `rows` rows of a job are."""
        cycles, rest = divmod(rows, self._before[-1])
        return cycles * CYCLE + bisect_right(self._before, rest) - 1
