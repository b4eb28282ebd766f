"""What filters cost, and how much one turn of the event loop may spend on them. Pure.

The unit is a condition test: one condition on one row, about 0.1 µs. A filter that exceeds what is left of a turn's
budget is not evaluated in that turn: its subscriptions fall behind the hub, and the filter is evaluated in slices
(`realtime.fanout.evaluation`).
"""

from __future__ import annotations

from dataclasses import dataclass

from core.filters import Filter
from repository.engine.events import Event

MAX_TESTS_PER_TURN = 100_000  # about 10 ms, during which all other clients may have to wait
BYTES_SEARCHED_PER_TEST = 500
BYTES_SPLIT_PER_TEST = 1  # Splitting strings into words is slow, but all filters on a row share the words.
BYTES_SENT_PER_TEST = 500  # Sending an event copies its bytes into a frame.
BYTES_DECODED_PER_TEST = 25  # The cost of decoding includes encoding the same bytes again.
TYPICAL_ROW_SIZE = 250  # The size of a small encoded movie, used to estimate the number of rows in an event.


@dataclass(slots=True)
class Budget:
    """A filter budget: `left` is the number of condition tests that may still be made."""

    left: int

    def take(self, tests: int) -> bool:
        """Take `tests` from the budget and return True. If fewer are left, take none and return False."""
        if tests > self.left:
            return False
        self.left -= tests
        return True


@dataclass(frozen=True, slots=True)
class Load:
    """The work that one or more filters cause for each changed row."""

    filters: int = 0
    conditions: int = 0
    searches: int = 0  # conditions that search a string: the longer the string, the higher the cost
    splits: int = 0  # filters that need the words of the row

    def __add__(self, other: Load) -> Load:
        return Load(
            self.filters + other.filters,
            self.conditions + other.conditions,
            self.searches + other.searches,
            self.splits + other.splits,
        )

    def __sub__(self, other: Load) -> Load:
        return self + Load(-other.filters, -other.conditions, -other.searches, -other.splits)

    def cost(self, rows: int, size: int) -> int:
        """Return the cost, in condition tests, of `rows` changed rows. `size` counts the bytes before and after."""
        searched, sent = self.searches * size // BYTES_SEARCHED_PER_TEST, self.filters * size // BYTES_SENT_PER_TEST
        split = size // BYTES_SPLIT_PER_TEST if self.splits else 0
        return rows * self.conditions + searched + sent + split


NO_LOAD = Load()


def load_of(wanted: Filter) -> Load:
    return Load(1, wanted.size, wanted.searches, int(wanted.splits))


def cost_of_event(wanted: Filter | None, event: Event) -> int:
    """Return the estimated cost, in condition tests, of decoding an event and evaluating a filter on it."""
    size = len(event.payload) + len(event.before or b"")
    load = load_of(wanted) if wanted is not None else Load(1)
    return load.cost(size // TYPICAL_ROW_SIZE + 1, size) + size // BYTES_DECODED_PER_TEST
