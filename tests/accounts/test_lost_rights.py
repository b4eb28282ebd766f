"""A write is rejected in its transaction if its client has lost rights since the request was authenticated."""

from __future__ import annotations

import ast
import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest
from sqlalchemy import insert

import models
from core.errors import Forbidden, Unauthenticated
from core.identity import Group, Identity
from core.times import utc_now
from repository.accounts import confirmations, sessions, users
from repository.engine import event_log
from repository.engine.append import append
from repository.engine.database import Database
from repository.engine.transaction import Transaction
from repository.generic import writes
from resources.movies import MOVIES
from tests.support import accounts
from tests.support.documents import trees
from tests.support.service import eventually


@dataclass
class Writer:
    """A moderator with a session, and the admin who takes away the moderator's rights."""

    database: Database
    identity: Identity
    admin_id: int

    async def add_movie(self, tx: Transaction) -> None:
        fields = {"title": "The Third Man", "languages": [], "genres": []}
        await writes.add(tx, MOVIES, self.identity, {**MOVIES.defaults, **fields})

    async def write(self) -> Any:
        return await accounts.outcome(self.database.write(self.add_movie, self.identity))

    async def lose(self, tx: Transaction, how: str) -> None:
        admin = accounts.an_admin(self.admin_id)
        user_id = self.identity.user_id
        if how == "session":
            await sessions.leave(tx, user_id, self.identity.session_id)
        elif how == "group":
            await users.change_group(tx, admin, user_id, Group.USER)
        else:
            await users.deactivate(tx, admin, user_id)


@pytest.fixture
async def writer(database: Database) -> Writer:
    admin_id = await accounts.account(database, "chief", Group.ADMIN)
    user_id = await accounts.account(database, "holly", Group.MODERATOR)
    session_id = "0b5f7f1e-8f53-4a0e-9e1f-1f6a3c0d2b4c"
    now = utc_now()

    async def work(tx: Transaction) -> None:
        values = {"id": session_id, "user_id": user_id, "created_at": now, "expires_at": now, "last_used_at": now}
        await tx.connection.execute(insert(models.sessions).values(values))

    await database.write(work)
    return Writer(database, Identity(user_id, Group.MODERATOR, time.time() + 60, session_id, "holly"), admin_id)


LOSSES = pytest.mark.parametrize(
    ("how", "error"), [("session", Unauthenticated), ("group", Forbidden), ("active", Unauthenticated)]
)


@LOSSES
async def test_a_write_that_begins_after_the_loss_is_refused(writer: Writer, how: str, error: type) -> None:
    await writer.database.write(lambda tx: writer.lose(tx, how))
    before = await event_log.head(writer.database)
    assert await writer.write() is error
    assert await event_log.head(writer.database) == before


@asynccontextmanager
async def uncommitted(writer: Writer, how: str) -> AsyncIterator[None]:
    """Take away the writer's rights in a transaction that commits at the end of the block."""
    async with writer.database.begin() as (connection, transaction):
        tx = Transaction(connection)
        await writer.lose(tx, how)
        await append(tx)
        yield
        await transaction.commit()


@LOSSES
async def test_a_write_that_waits_for_the_loss_to_commit_is_refused(writer: Writer, how: str, error: type) -> None:
    async def is_waiting() -> bool:
        if writer.database.is_sqlite:
            return True  # SQLite has one connection for writes, and it is in use
        async with writer.database.read() as connection:
            waiting = await connection.exec_driver_sql("SELECT count(*) FROM pg_locks WHERE NOT granted")
            return bool(waiting.scalar_one())

    async with uncommitted(writer, how):
        writing = asyncio.create_task(writer.write())
        await eventually(is_waiting, "the write waits for the head of the log")
    assert await writing is error


async def test_a_write_with_all_its_rights_or_more_is_done(writer: Writer) -> None:
    assert await writer.write() is None
    async with uncommitted(writer, "group"):
        pass
    writer.identity = replace(writer.identity, group=Group.USER)
    assert await writer.write() is None
    admin = accounts.an_admin(writer.admin_id)
    await writer.database.write(lambda tx: users.change_group(tx, admin, writer.identity.user_id, Group.ADMIN))
    assert await writer.write() is None, "a client that has gained rights may write"


async def test_a_write_with_a_token_that_has_expired_meanwhile_is_refused(writer: Writer) -> None:
    writer.identity = replace(writer.identity, expires_at=time.time() - 6)
    assert await writer.write() is Unauthenticated


async def test_a_write_without_an_event_is_refused_too(writer: Writer) -> None:
    user_id, session_id = writer.identity.user_id, writer.identity.session_id
    await writer.database.write(lambda tx: writer.lose(tx, "session"))

    async def change(tx: Transaction) -> None:
        await confirmations.change_password(tx, user_id, session_id, "no hash", "another hash")

    assert await accounts.outcome(writer.database.write(change, writer.identity)) is Unauthenticated
    user = await users.find(writer.database, user_id)
    assert user is not None
    assert user["password_hash"] == "no hash"


async def test_a_transaction_may_take_its_own_writers_rights_away_once(writer: Writer) -> None:
    user_id, session_id = writer.identity.user_id, writer.identity.session_id

    async def leave(tx: Transaction) -> None:
        await sessions.leave(tx, user_id, session_id)

    await writer.database.write(leave, writer.identity)
    assert await accounts.outcome(writer.database.write(leave, writer.identity)) is Unauthenticated


def test_every_write_of_a_route_names_its_caller() -> None:
    calls = [node.func for tree in trees("routes") for node in ast.walk(tree) if isinstance(node, ast.Call)]
    writes = {ast.unparse(called) for called in calls if isinstance(called, ast.Attribute) and called.attr == "write"}
    assert writes == {"call.write", "self.database.write"}, (
        "`self.database.write` is called only by `Call.write`, which passes the identity"
    )
