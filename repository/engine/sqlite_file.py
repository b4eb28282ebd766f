"""The file of a SQLite database, its log and its disk. Detects when the file has been moved or replaced.

A process keeps writing to an open file after the file was moved, removed or replaced. A write would succeed, but after
a restart its rows would be missing. So each write checks the file just before COMMIT, and no connection is opened to
another file than the first one.
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import quote
from weakref import WeakSet

import aiosqlite
from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncEngine

from core.errors import SettingsError
from repository.engine import failures

CLOSE_SECONDS = 2.0
CLOSE_PAUSE_SECONDS = 0.002
MIN_FREE_BYTES = 16 * 1024 * 1024  # SQLite's log needs this much free disk space between two checkpoints.


def path_of(url: str) -> Path:
    """Return the absolute path of SQLite's file, as the driver understands it."""
    # As SQLAlchemy does, resolve ".." without following symbolic links.
    return Path(os.path.abspath(url.removeprefix("sqlite:///")))  # noqa: PTH100 (see above)


class SqliteConnection(sqlite3.Connection):
    """A connection that never creates the file, and that rolls its transaction back when it is closed."""

    def __init__(self, database: str, **options: Any) -> None:
        # If the file was moved a moment ago, SQLite would create an empty one and delete the log of the moved file, and
        # with it the newest rows.
        super().__init__(f"file://{quote(os.fsencode(database))}?mode=rw", **(options | {"uri": True}))

    def close(self) -> None:
        # After a cancelled write, a cursor may hold an unfinished statement until it is garbage-collected. Until then,
        # SQLite would keep the transaction of the closed connection open, and with it the lock that every write takes.
        with suppress(sqlite3.Error):
            self.rollback()
        super().close()


class SqliteFile:
    """The file that exists when the object is created, and the write-ahead log that its connections have open.

    Creates the file and its folder if they are missing. Raises OSError if the folder cannot be created, and
    SettingsError if the file is missing or empty although its log exists.
    """

    def __init__(self, url: str) -> None:
        self._path = path_of(url)
        # SQLite keeps its log beside the file itself, even if the path is a symbolic link.
        self._log_path = Path(os.path.realpath(self._path) + "-wal")
        self._create()
        self._id = _id(_found(self._path))
        self._log_id: tuple[int, int] | None = None
        self._connections = 0
        self._threads: WeakSet[Thread] = WeakSet()  # each connection runs its statements in a thread of its own

    def _create(self) -> None:
        self._require_more_than_a_log()
        self._path.parent.mkdir(parents=True, exist_ok=True)
        # With this mode, other users of the machine cannot read the file. SQLite gives its other files the same mode.
        # Errors are ignored, because opening the database reports them better.
        with suppress(OSError):
            self._path.touch(mode=0o600)
        self._require_more_than_a_log()  # the file may have been moved in the meantime

    def _require_more_than_a_log(self) -> None:
        # A worker may start before a moved file is moved back. SQLite would take an empty file for a new database and
        # delete the log of the moved file, and with it the newest rows. The log is looked at first, because another
        # worker that is creating the database writes to the file before it writes to the log.
        if self.log_bytes() == 0:
            return
        found = _found(self._path)
        if found is None or found.st_size == 0:
            raise SettingsError(
                f"DATABASE_URL: the database file {self._path} is missing or empty, although its write-ahead log "
                f"{self._log_path} exists. Move the file back, or remove the log to start with an empty database."
            )

    def follow(self, engine: AsyncEngine, *, is_writer: bool) -> None:
        """Watch the engine's connections, and refuse to open a connection to another file.

        Call this after all other listeners for new connections have been added, because one of them opens the log.
        """

        def before_connect(*_: Any) -> None:
            if self._is_replaced(_found(self._path)):
                raise failures.FileLost(failures.MOVED_FILE)

        def on_connect(*_: Any) -> None:
            self._connections += 1
            if is_writer:
                self._note_log()

        def on_close(*_: Any) -> None:
            self._connections -= 1
            if self._connections == 0:
                self._log_id = None

        event.listen(engine.sync_engine, "do_connect", before_connect)
        event.listen(engine.sync_engine, "connect", on_connect)
        event.listen(engine.sync_engine, "close", on_close)

    def connect(self, *args: Any, **options: Any) -> aiosqlite.Connection:
        """Return a connection that is going to be opened, in place of `aiosqlite.connect`."""
        connection = aiosqlite.connect(*args, **options)
        connection._thread.daemon = True  # as SQLAlchemy does
        self._threads.add(connection._thread)
        stop = connection.stop

        def stop_once() -> asyncio.Future[Any] | None:
            # A connection may be stopped while it closes in the background. Its thread ends at the first stop, so the
            # future of a second one would never be done, and the event loop would wait for it when it ends.
            return stop() if connection._running else None

        connection.stop = stop_once  # type: ignore[method-assign]
        return connection

    async def closed(self) -> None:
        """Wait until the threads of all closed connections have ended, for up to CLOSE_SECONDS.

        After a cancelled statement, a connection is closed in the background. If the event loop ended before the
        thread, the thread would fail.
        """
        with suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_SECONDS):
                while any(thread.is_alive() for thread in self._threads):  # noqa: ASYNC110 (a thread sets no event)
                    await asyncio.sleep(CLOSE_PAUSE_SECONDS)

    def require_intact(self) -> None:
        """Raise FileLost if the file or its log was moved, removed, replaced or emptied.

        Must be called in a transaction of the writer.
        """
        self._note_log()
        if (problem := self._loss()) is not None:
            raise failures.FileLost(problem)

    def problem(self) -> str | None:
        """Return what is wrong with the file or its disk, or None."""
        if (problem := self._loss()) is not None:
            return problem
        try:
            disk = os.statvfs(self._path.parent)
        except OSError:
            return failures.FAILING_DISK
        return "the disk is full" if disk.f_bavail * disk.f_frsize < MIN_FREE_BYTES else None

    def log_bytes(self) -> int:
        """Return the size of the write-ahead log in bytes."""
        found = _found(self._log_path)
        return found.st_size if found is not None else 0

    def _note_log(self) -> None:
        """Remember which file is the log. The writer opens the log when it connects or, if the database is new, in its
        first transaction. SQLite keeps the log until the last connection is closed.
        """
        if self._log_id is None:
            self._log_id = _id(_found(self._log_path))

    def _loss(self) -> str | None:
        found = _found(self._path)
        if self._is_replaced(found):
            return failures.MOVED_FILE
        # The file is never empty while it has a log.
        if self._log_id is not None and found is not None and found.st_size == 0:
            return failures.DAMAGED_FILE
        if self._log_id is not None and _id(_found(self._log_path)) != self._log_id:
            return failures.MOVED_FILE
        return None

    def _is_replaced(self, found: os.stat_result | None) -> bool:
        return self._id is not None and _id(found) != self._id


def _found(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except OSError:
        return None


def _id(found: os.stat_result | None) -> tuple[int, int] | None:
    """Return the device and inode of a file, or None if there is no file."""
    return (found.st_dev, found.st_ino) if found is not None else None
