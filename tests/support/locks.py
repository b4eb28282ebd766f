"""Locks that another program holds on a test's database."""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import asyncpg


@asynccontextmanager
async def head_locked(database_url: str) -> AsyncIterator[None]:
    """Lock the row of the log's head (on SQLite, take the write lock) in another program's transaction."""
    if database_url.startswith("sqlite"):
        file = sqlite3.connect(database_url.removeprefix("sqlite:///"), isolation_level=None)
        try:
            file.execute("BEGIN IMMEDIATE")
            yield
        finally:
            file.close()
        return
    foreign = await asyncpg.connect(database_url)
    try:
        await foreign.execute("BEGIN; UPDATE event_head SET seq = seq")
        yield
    finally:
        await foreign.close()
