"""Create and delete accounts without a running service."""

from __future__ import annotations

from typing import Any

from core.errors import Problem
from core.identity import Group
from repository.accounts import deletion, users
from repository.accounts.audit import Editor
from repository.engine.database import Database
from repository.engine.transaction import Transaction


async def account(database: Database, name: str, group: Group = Group.USER) -> int:
    async def work(tx: Transaction) -> int:
        user = await users.create(tx, {"username": name, "email": f"{name}@example.org"}, "no hash", group)
        return int(user["id"])

    return await database.write(work)


def oneself(user_id: int) -> Editor:
    return Editor(user_id, None, is_admin=False)


def an_admin(user_id: int, address: str | None = None) -> Editor:
    return Editor(user_id, address, is_admin=True)


async def delete(database: Database, user_id: int, by: int | None = None) -> Any:
    editor = an_admin(by) if by is not None else oneself(user_id)
    return await database.write(lambda tx: deletion.remove(tx, editor, user_id, None))


async def outcome(work: Any) -> Any:
    try:
        return await work
    except Problem as problem:
        return type(problem)
