"""Activating accounts, confirming email addresses and replacing passwords.

Each write runs in the caller's transaction and locks the account's row. A one-time token that cannot be used raises
NotFound with the same message whatever the reason, so the response reveals nothing about accounts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from core.errors import Conflict, NotFound
from repository.accounts import one_time_tokens, outbox, sessions, users
from repository.accounts.one_time_tokens import OneTimeToken, Purpose
from repository.accounts.outbox import MailType
from repository.engine.database import Database
from repository.engine.transaction import Transaction
from repository.generic.versions import Row

BAD_TOKEN = "The URL is invalid, was already used, or has expired"  # noqa: S105 (no password)


@dataclass(frozen=True, slots=True)
class Confirmation:
    """The pending activation of `user`, or the pending change of its address to `email`. `user` is in `public` form."""

    purpose: Purpose
    email: str
    user: dict[str, Any]


async def _use(tx: Transaction, token: str, *purposes: Purpose) -> tuple[OneTimeToken, dict[str, Any]]:
    """Use up a token, lock the row of its account, and return both. Raises NotFound."""
    used = await one_time_tokens.take(tx, token, *purposes)
    try:
        return _usable(used, await users.lock(tx, used.user_id) if used is not None else None)
    except NotFound:
        raise NotFound(BAD_TOKEN) from None


async def _find(database: Database, token: str, *purposes: Purpose) -> tuple[OneTimeToken, dict[str, Any]]:
    """Return a token and its account's row without using up the token. Raises NotFound."""
    found = await one_time_tokens.find(database, token, *purposes)
    return _usable(found, await users.find(database, found.user_id) if found is not None else None)


def _usable(token: OneTimeToken | None, user: dict[str, Any] | None) -> tuple[OneTimeToken, dict[str, Any]]:
    if token is None or user is None:
        raise NotFound(BAD_TOKEN)
    match token.purpose:
        case Purpose.EMAIL:
            is_usable = user["is_active"]
        case Purpose.ACTIVATE:
            is_usable = user["awaits_activation"] and user["email"] == token.email
        case Purpose.RESET:
            is_usable = (user["is_active"] or user["awaits_activation"]) and user["email"] == token.email
    if not is_usable:
        raise NotFound(BAD_TOKEN)
    return token, user


# --- activation and confirmation


async def confirm(tx: Transaction, token: str) -> dict[str, Any]:
    """Activate the account that the token belongs to, or give the account its new address.

    Return the account in its `public` form. Raises NotFound, or Conflict when another account has the address.
    """
    used, user = await _use(tx, token, Purpose.ACTIVATE, Purpose.EMAIL)
    if used.purpose is Purpose.EMAIL:
        after = await users.change(tx, user, users.as_stored({"email": used.email}), actor_id=user["id"])
        await address_changed(tx, user, used.email)
    else:
        await one_time_tokens.void(tx, user["id"], Purpose.ACTIVATE)
        # The account now owns the address, even if another account had the address when this one was created.
        values = {**users.as_stored({"email": user["email"]}), "is_active": True, "awaits_activation": False}
        after = await users.change(tx, user, values, actor_id=user["id"])
    return users.public(after)


async def preview(database: Database, token: str) -> Confirmation:
    """Return the change that `confirm` would make, without using up the token. Raises NotFound."""
    found, user = await _find(database, token, Purpose.ACTIVATE, Purpose.EMAIL)
    return Confirmation(found.purpose, found.email, users.public(user))


# --- email addresses


async def request_address_change(tx: Transaction, user: Row, address: str) -> None:
    """Mail a confirmation URL to the new address of a locked account and a notice to the current one.

    The account keeps its address until the URL is used (`confirm`). A second request replaces the first. If another
    account has the new address, no error reveals this: the owner of that account is notified instead (`outbox`).
    """
    await cancel_address_change(tx, user)
    await outbox.put(tx, user["id"], MailType.CONFIRM_EMAIL, address)
    if user["email"] is not None:
        await outbox.put(tx, user["id"], MailType.EMAIL_CHANGE_ASKED, user["email"])


async def cancel_address_change(tx: Transaction, user: Row) -> None:
    """Cancel a pending address change, if there is one."""
    await one_time_tokens.void(tx, user["id"], Purpose.EMAIL)
    await outbox.withdraw(tx, user["id"], MailType.CONFIRM_EMAIL, MailType.EMAIL_CHANGE_ASKED)


async def address_changed(tx: Transaction, before: Row, address: str | None) -> None:
    """Revoke the account's tokens and mail a notice to the old address; call this after each write of an address.

    `before` is the row before the write. If the account awaits activation, an activation URL is mailed to the new
    address instead. The old address was never confirmed, so no notice is mailed to it.
    """
    if before["email"] == address:
        return
    await _revoke_mailed_urls(tx, before)
    if before["awaits_activation"]:
        if address is not None:
            await outbox.put(tx, before["id"], MailType.ACTIVATE, address)
    elif before["email"] is not None:
        await outbox.put(tx, before["id"], MailType.EMAIL_CHANGED, before["email"])


async def _revoke_mailed_urls(tx: Transaction, user: Row) -> None:
    await one_time_tokens.void(tx, user["id"])
    await outbox.withdraw(tx, user["id"], MailType.ACTIVATE, MailType.RESET_PASSWORD, MailType.CONFIRM_EMAIL)


# --- passwords


async def account_to_reset(database: Database, token: str) -> dict[str, Any]:
    """Return the row of the account that a password reset token belongs to. The token stays valid. Raises NotFound."""
    _, user = await _find(database, token, Purpose.RESET)
    return user


async def reset_password(tx: Transaction, token: str, password_hash: str) -> None:
    """Use up a password reset token: set the password and end all sessions.

    The account becomes active, because the token proves that the user receives emails at its address. Raises NotFound.
    """
    _, user = await _use(tx, token, Purpose.RESET)
    proven = users.as_stored({"email": user["email"]})
    values = {**proven, "password_hash": password_hash, "is_active": True, "awaits_activation": False}
    await _change_password(tx, user, values, keep_session_id=None)


async def change_password(
    tx: Transaction, user_id: int, session_id: str, checked_hash: str, password_hash: str
) -> None:
    """Set the password, end every other session and revoke the URLs that were mailed earlier.

    `checked_hash` is the hash that the old password was checked against. Raises Conflict when the password has
    changed since then.
    """
    user = await users.lock(tx, user_id)
    if user["password_hash"] != checked_hash:
        raise password_changed_meanwhile()
    await _change_password(tx, user, {"password_hash": password_hash}, keep_session_id=session_id)


def password_changed_meanwhile() -> Conflict:
    return Conflict("The password was changed by another request; try again with the new password")


async def _change_password(tx: Transaction, user: Row, values: Row, *, keep_session_id: str | None) -> None:
    # Change the password before ending sessions: see `sessions.end_others`.
    await users.change(tx, user, values, actor_id=user["id"])
    await sessions.end_others(tx, user["id"], keep_session_id, actor_id=user["id"])
    # An intruder who knew the old password may have had a URL emailed to an address of their own.
    await _revoke_mailed_urls(tx, user)
    if user["email"] is not None:
        await outbox.put(tx, user["id"], MailType.PASSWORD_CHANGED, user["email"])
