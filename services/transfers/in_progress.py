"""Limits on the exports that a worker sends, and on the import files that it receives, at the same time."""

from __future__ import annotations

from repository.engine.engines import EXPORT_READERS
from services.limits.in_progress import InProgress

# One address or network may have a quarter of the exports, and of the uploads.
MAX_EXPORTS = EXPORT_READERS  # Each export has a database connection of its own.
MAX_EXPORTS_PER_USER = 1
MAX_EXPORTS_PER_ADDRESS = 1
MAX_UPLOADS = 4  # Each part of a file is a write, so more of them would delay other writes.
MAX_UPLOADS_PER_USER = 1
MAX_UPLOADS_PER_ADDRESS = 1


class Transfers:
    """The transfers of a process. If `limits_clients` is false, only the limits of the worker apply."""

    def __init__(self, *, limits_clients: bool) -> None:
        exports = (MAX_EXPORTS, MAX_EXPORTS_PER_USER, MAX_EXPORTS_PER_ADDRESS)
        self.exports = InProgress("exports in progress", *exports, limits_clients)
        uploads = (MAX_UPLOADS, MAX_UPLOADS_PER_USER, MAX_UPLOADS_PER_ADDRESS)
        self.uploads = InProgress("files of imports being received", *uploads, limits_clients)
