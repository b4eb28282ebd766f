"""Determine which account a call is about, and whether the caller may see or change it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from core.errors import FieldProblem, Forbidden, TooManyRequests
from core.identity import Group
from repository.accounts import users
from repository.accounts.audit import Editor
from repository.engine.database import Database
from routes.http.operation import AnyCall, Call
from routes.http.queries import ById
from services.authentication import invalid_access_token


def is_admin(call: AnyCall) -> bool:
    return call.me.group is Group.ADMIN


def as_admin(call: AnyCall) -> Editor:
    """Return the caller as an editor with admin rights. Raises Forbidden if the caller is not an admin."""
    if not is_admin(call):
        raise Forbidden("Only admins can do this")
    return Editor(call.me.user_id, call.address, is_admin=True)


def account_id(call: Call[ById | None, object, object]) -> int:
    """Return the id in the path, or the caller's own id if the path has none (`/users/me/…`)."""
    return call.path.id if call.path is not None else call.me.user_id


def as_editor(call: AnyCall, user_id: int) -> Editor:
    """Return the caller as an editor of the account: its owner or an admin. Raises Forbidden.

    The account is not looked up, so the error does not reveal whether the account exists.
    """
    if user_id != call.me.user_id and not is_admin(call):
        raise Forbidden("Only the owner of the account and admins can do this")
    return Editor(call.me.user_id, call.address, is_admin=user_id != call.me.user_id)


async def own_account(call: AnyCall) -> dict[str, Any]:
    """Return the caller's account. Raises Unauthenticated if the account has been deleted meanwhile."""
    user = await users.find(call.database, call.me.user_id)
    if user is None:
        raise invalid_access_token()
    return user


async def knows_password(call: AnyCall, user: Mapping[str, Any] | None, password: str) -> bool:
    """Return whether `password` is the caller's current password, and count the attempt. Raises TooManyRequests."""
    lockout, me = call.services.lockout, call.me
    login = user["username"] or user["email"] if user is not None else me.username
    await lockout.try_old_password(me.user_id, login, call.address)
    try:
        verdict = await call.services.passwords.verify(password, user["password_hash"] if user is not None else None)
    except TooManyRequests as error:
        lockout.refused_old_password(me.user_id, login, call.address, str(error.detail))
        raise
    if user is not None and verdict.is_right:
        await lockout.knew_old_password(me.user_id, call.address)
    else:
        lockout.failed_old_password(me.user_id, login, call.address)
    return user is not None and verdict.is_right


def wrong_password(field: str) -> FieldProblem:
    """Return the problem to report in a Forbidden error when the current password is wrong.

    The status is 403 rather than 422, because the body is valid but does not prove the right to make the change.
    """
    return FieldProblem(("body", field), "The current password is wrong", "wrong_password")


async def account(database: Database, user_id: int) -> dict[str, Any]:
    """Return the account. Raises NotFound."""
    return _found(await users.find(database, user_id), user_id)


async def listed_account(database: Database, key: int | str) -> dict[str, Any]:
    """Return the account with this id or user name.

    Raises NotFound, also for accounts that await their activation, because `GET /users` shows them only to admins.
    """
    user = await (users.find(database, key) if isinstance(key, int) else users.find_by_username(database, key))
    return _found(user if user is not None and not user["awaits_activation"] else None, key)


def _found(user: dict[str, Any] | None, key: int | str) -> dict[str, Any]:
    if user is None:
        raise users.not_found(key)
    return user
