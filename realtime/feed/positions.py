"""Why a reader cannot continue after a position: the reasons that `resync` frames carry."""

from __future__ import annotations

from typing import Final

ANOTHER_EPOCH: Final = "another epoch"
TOO_OLD: Final = "position is older than the log"
TOO_NEW: Final = "position is newer than the log"
LOG_REPLACED: Final = "the log was replaced"


class PositionTooOld(Exception):
    """The log no longer holds the event after this position."""
