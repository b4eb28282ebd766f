"""Positions in the event log as clients write them: `<epoch>:<seq>`, or a number and its epoch separately. Pure.

A number without its epoch is rejected, because after a backup has been restored the same number may belong to another
event.
"""

from __future__ import annotations

import re
from typing import Any

from repository.engine.events import Head
from schemas import MAX_EPOCH_LENGTH, MAX_ID

# The form of `Stream-Position`, of event ids and of `since`.
POSITION = rf"[!-9;-~]{{1,{MAX_EPOCH_LENGTH}}}:[0-9]{{1,19}}"
_NUMBER = re.compile(r"[0-9]{1,19}")

Written = Head | int


class Incomplete(ValueError):
    """A position without its epoch, with two epochs, or without its number. `kind` is the type of the problem."""

    def __init__(self, expected: str, kind: str) -> None:
        super().__init__(expected)
        self.kind = kind


def parse_position(text: str) -> Head | None:
    """Parse `<epoch>:<seq>`. Return None for anything else."""
    if not re.fullmatch(POSITION, text):
        return None
    epoch, _, seq = text.rpartition(":")
    return Head(epoch, int(seq))


def parse_written(value: Any) -> Written | None:
    """Parse a position, or a number whose epoch is given separately. Return None for anything else."""
    if isinstance(value, str):
        return int(value) if _NUMBER.fullmatch(value) else parse_position(value)
    is_number = isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_ID
    return value if is_number or isinstance(value, Head) else None


def position_of(written: Written | None, epoch: str | None, *, together: str, beside: str) -> Head | None:
    """Return the position, or None when none is given. Raises Incomplete.

    Error messages show two forms: `together`, with number and epoch in one value, and `beside`, with a value for each.
    """
    match written:
        case None if epoch is not None:
            raise Incomplete(f"Expected a number together with the epoch: {beside}", "missing_since")
        case None:
            return None
        case Head() if epoch is not None:
            raise Incomplete(f"Expected the epoch only once: {together} or {beside}", "repeated_epoch")
        case Head():
            return written
        case int() if epoch is not None:
            return Head(epoch, written)
    raise Incomplete(f"Expected the number together with the epoch of its log: {together} or {beside}", "missing_epoch")
