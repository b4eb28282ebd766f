"""Migrates a database to the newest schema, with Alembic."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy import insert, inspect, select, text

import models
from core.errors import SettingsError
from repository.engine import engines, failures
from repository.engine.database import Database
from repository.engine.event_log import HEAD_ID, raise_head
from repository.engine.events import new_epoch

ROOT = Path(__file__).resolve().parent.parent.parent
# The advisory lock that makes workers migrate one after another when they start together. The number is arbitrary.
POSTGRESQL_LOCK = 7_243_001
MAX_ATTEMPTS = 20
RETRY_PAUSE_SECONDS = 0.1


def _config(connection: Any = None) -> Config:
    config = Config()
    config.set_main_option("script_location", str(ROOT / "migrations"))
    config.attributes["connection"] = connection
    return config


def newest_revision() -> str | None:
    return ScriptDirectory.from_config(_config()).get_current_head()


async def migrate(database: Database) -> None:
    """Apply the missing migrations, and give a new log its epoch. Safe to run in several workers at once.

    Raises SettingsError when the schema is newer than this version of the program, or when a pooler that the settings
    do not allow is in front of the database.
    """
    for _ in range(MAX_ATTEMPTS):
        try:
            return await _migrate(database)
        except failures.DATABASE_ERRORS as error:
            if (problem := failures.pooler_problem(error)) is not None:
                raise SettingsError(f"DATABASE_URL: {problem}.") from error
            # While several processes switch a new file to WAL, SQLite fails without waiting for a lock, so try again.
            if not failures.is_refused(error):
                raise
            await asyncio.sleep(RETRY_PAUSE_SECONDS)
    return await _migrate(database)


async def _migrate(database: Database) -> None:
    async with database.begin() as (connection, _):  # on SQLite, other processes that migrate wait here
        if not database.is_sqlite:
            await engines.require_utf8(connection)
            await engines.lift_limits(connection)
            await connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": POSTGRESQL_LOCK})
        await connection.run_sync(_upgrade)
        head = models.event_head.c
        if (await connection.execute(select(head.epoch).where(head.id == HEAD_ID))).one_or_none() is None:
            await connection.execute(insert(models.event_head).values(id=HEAD_ID, epoch=new_epoch(), seq=0))
        await raise_head(connection)


def _upgrade(connection: Any) -> None:
    if inspect(connection).has_table("alembic_version"):
        current = connection.execute(text("SELECT version_num FROM alembic_version")).scalar()
        if current == newest_revision():
            return
        if current not in (each.revision for each in ScriptDirectory.from_config(_config()).walk_revisions()):
            raise SettingsError(
                f"DATABASE_URL: expected a schema up to {newest_revision()}, got {current}, which a newer version of "
                "Marquee has created. Start the newer version, or restore a backup from before the upgrade."
            )
    command.upgrade(_config(connection), "head")
