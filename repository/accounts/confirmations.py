"""What becomes of an account by a link in a mail or by a new password: activated, another address, another password.

All of it inside the caller's transaction, which holds the account's row. A link that is no good says so in one
sentence, whatever is wrong with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy import select
from sqlalchemy.exc import IntegrityError

import models
from core.errors import Conflict, FieldProblem, NotFound
from repository.accounts import one_time_tokens, outbox, sessions, users
from repository.accounts.one_time_tokens import Purpose, Taken
from repository.accounts.outbox import MailType
from repository.engine.database import Database
from repository.engine.transaction import Transaction

BAD_LINK = "The link is not valid, or was used or has expired"


async def _account_of(tx: Transaction, taken: Taken | None) -> dict[str, Any]:
    """The account that a token is of, locked. Raises NotFound with the one sentence."""
    if taken is None:
        raise NotFound(BAD_LINK)
    try:
        return await users.lock(tx, taken.user_id)
    except NotFound:
        raise NotFound(BAD_LINK) from None


# --- links


async def follow(tx: Transaction, token: str) -> dict[str, Any]:
    """Activate the account that the token was mailed to, or make the address that it was mailed to the account's.

    Answers the account as it is then, `public`. Raises NotFound, and Conflict when the address is somebody else's.
    """
    taken = await one_time_tokens.take(tx, token, Purpose.ACTIVATE, Purpose.EMAIL)
    user = await _account_of(tx, taken)
    assert taken is not None
    if not _may_follow(user, taken):
        raise NotFound(BAD_LINK)
    if taken.purpose is Purpose.EMAIL:
        return await _use_address(tx, user, taken.email)
    await one_time_tokens.void(tx, user["id"], Purpose.ACTIVATE)
    after = await users.change(tx, user, {"is_active": True, "awaits_activation": False}, actor_id=user["id"])
    return users.public(after)


async def look_at(database: Database, token: str) -> tuple[Purpose, str, dict[str, Any]]:
    """What following a token would do: its purpose, the address that it was mailed to and the account, `public`.

    Uses nothing up. Raises NotFound.
    """
    taken = await one_time_tokens.find(database, token, Purpose.ACTIVATE, Purpose.EMAIL)
    user = await users.find(database, taken.user_id) if taken is not None else None
    if taken is None or user is None or not _may_follow(user, taken):
        raise NotFound(BAD_LINK)
    return taken.purpose, taken.email, users.public(user)


def _may_follow(user: Mapping[str, Any], taken: Taken) -> bool:
    if taken.purpose is Purpose.EMAIL:
        return bool(user["is_active"])
    return bool(user["awaits_activation"]) and user["email"] == taken.email


async def _use_address(tx: Transaction, user: dict[str, Any], address: str) -> dict[str, Any]:
    await _require_free(tx, user, address)
    values = {"email": address, "email_key": users.login_key(address)}
    try:
        after = await users.change(tx, user, values, actor_id=user["id"])
    except IntegrityError:
        raise _taken() from None
    await address_changed(tx, user, address)
    return users.public(after)


async def _require_free(tx: Transaction, user: Mapping[str, Any], address: str) -> None:
    """Raises Conflict."""
    table = models.users
    key = users.login_key(address)
    found = await tx.connection.execute(select(table.c.id).where(table.c.email_key == key, table.c.id != user["id"]))
    if found.first() is not None:
        raise _taken()


def _taken() -> Conflict:
    return Conflict([FieldProblem(("body", "email"), "This email is taken", "taken")])


# --- addresses


async def ask_for_address(tx: Transaction, user: Mapping[str, Any], address: str) -> None:
    """Mail a link to the address that the owner of a locked account wants, and tell the one that it has. The account
    keeps that until the link is followed (`follow`); a wish replaces the one before. Raises Conflict when somebody else
    has the address.
    """
    await _require_free(tx, user, address)
    await keep_address(tx, user)
    await outbox.put(tx, user["id"], MailType.CONFIRM_EMAIL, address)
    if user["email"] is not None:
        await outbox.put(tx, user["id"], MailType.EMAIL_CHANGE_ASKED, user["email"])


async def keep_address(tx: Transaction, user: Mapping[str, Any]) -> None:
    """Take back the wish for another address, if there is one."""
    await one_time_tokens.void(tx, user["id"], Purpose.EMAIL)
    await outbox.withdraw(tx, user["id"], MailType.CONFIRM_EMAIL, MailType.EMAIL_CHANGE_ASKED)


async def address_changed(tx: Transaction, before: Mapping[str, Any], address: str | None) -> None:
    """What a new address means, to be called by whoever writes it: links that were mailed before are good no more, and
    the old address is told. `before` is the row as it was; of an account that waits to be activated the new address is
    asked, and the old one, which nobody has proven, is left alone.
    """
    if before["email"] == address:
        return
    await one_time_tokens.void(tx, before["id"])
    await outbox.withdraw(tx, before["id"], MailType.ACTIVATE, MailType.RESET_PASSWORD, MailType.CONFIRM_EMAIL)
    if before["awaits_activation"]:
        if address is not None:
            await outbox.put(tx, before["id"], MailType.ACTIVATE, address)
    elif before["email"] is not None:
        await outbox.put(tx, before["id"], MailType.EMAIL_CHANGED, before["email"])


# --- passwords


async def account_to_reset(database: Database, token: str) -> dict[str, Any]:
    """The account that a link for a new password is of, without using it up. Raises NotFound."""
    taken = await one_time_tokens.find(database, token, Purpose.RESET)
    user = await users.find(database, taken.user_id) if taken is not None else None
    if taken is None or user is None or not _may_reset(user, taken):
        raise NotFound(BAD_LINK)
    return user


def _may_reset(user: Mapping[str, Any], taken: Taken) -> bool:
    return bool(user["is_active"] or user["awaits_activation"]) and user["email"] == taken.email


async def reset_password(tx: Transaction, token: str, password_hash: str) -> None:
    """Use the token up: the password is another one, all sessions end, and the account is active, for its address is
    proven. Raises NotFound.
    """
    taken = await one_time_tokens.take(tx, token, Purpose.RESET)
    user = await _account_of(tx, taken)
    assert taken is not None
    if not _may_reset(user, taken):
        raise NotFound(BAD_LINK)
    values = {"password_hash": password_hash, "is_active": True, "awaits_activation": False}
    await users.change(tx, user, values, actor_id=user["id"])
    await sessions.end_others(tx, user["id"], None, actor_id=user["id"])
    await _password_changed(tx, user)


async def change_password(
    tx: Transaction, user_id: int, session_id: str, checked_hash: str, password_hash: str
) -> None:
    """Another password; all sessions but this one end, and links that were mailed before are good no more.

    `checked_hash` is what the old password was checked against. Raises Conflict when it was changed meanwhile.
    """
    user = await users.lock(tx, user_id)
    if user["password_hash"] != checked_hash:
        raise Conflict("The password was changed by somebody else just now")
    await users.change(tx, user, {"password_hash": password_hash}, actor_id=user_id)
    await sessions.end_others(tx, user_id, session_id, actor_id=user_id)
    await _password_changed(tx, user)


async def _password_changed(tx: Transaction, user: Mapping[str, Any]) -> None:
    """No link outlives the password: whoever knew the old one may have asked for an address of their own."""
    await one_time_tokens.void(tx, user["id"])
    await outbox.withdraw(tx, user["id"], MailType.ACTIVATE, MailType.RESET_PASSWORD, MailType.CONFIRM_EMAIL)
    if user["email"] is not None:
        await outbox.put(tx, user["id"], MailType.PASSWORD_CHANGED, user["email"])
