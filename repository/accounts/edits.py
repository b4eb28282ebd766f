"""Editing accounts and profiles, by their owners and by admins.

A profile is part of its account: one row, one version. Each edit runs inside the transaction of `Database.write`,
locks the account's row first and returns its new row. An edit that changes nothing emits no event and leaves no
entry in the audit trail.
"""

from __future__ import annotations

from typing import Any

from core.errors import Conflict, FieldProblem, Forbidden, NotFound
from core.identity import Group
from core.times import utc_now
from repository.accounts import audit, confirmations, users
from repository.accounts.audit import Editor
from repository.engine.transaction import Transaction
from repository.generic.versions import IfMatch, Row, changed_names, editable
from resources.accounts.profiles import Profile, ProfileBody


def public_profile(row: Row) -> dict[str, Any]:
    """Return the profile as its owner and admins see it."""
    account = {**users.public(row), "user_id": row["id"], "created_at": row["profile_created_at"]}
    return {name: account[name] for name in Profile.model_fields}


# --- accounts


async def edit_own(
    tx: Transaction, user_id: int, fields: Row, if_match: IfMatch, *, proven_hash: str | None, proves_addresses: bool
) -> dict[str, Any]:
    """Set fields of the caller's own account.

    `proven_hash` is the hash that the current password was checked against, or None when no password was sent; a
    change of the user name or the email requires it. With `proves_addresses`, a new address takes effect only when its
    confirmation URL is used, and sending the current address with the password cancels a pending change. Other members
    of the account must have their current values. Raises NotFound, PreconditionFailed, Forbidden without the password,
    InvalidInput or Conflict.
    """
    before = await users.lock(tx, user_id, if_match)
    (fields,) = editable(users.EDITABLE, [fields], [users.public(before)])
    values = users.as_stored(fields)
    _require_login(before, values)
    changed = [name for name in changed_names(before, values) if name in users.LOGINS]
    if changed:
        _require_proof(before, proven_hash, changed)
    if "email" in changed and proves_addresses:
        if values["email"] is None:
            message = "The email cannot be removed, because this service activates accounts by email"
            raise Conflict([FieldProblem(("body", "email"), message, "email_needed")])
        await confirmations.request_address_change(tx, before, values["email"])
        del values["email"], values["email_key"]
    elif "email" in values and proven_hash is not None:
        await confirmations.cancel_address_change(tx, before)
    after = await users.change(tx, before, values, actor_id=user_id)
    await confirmations.address_changed(tx, before, after["email"])
    return after


def _require_login(before: Row, values: Row) -> None:
    named = [name for name in users.LOGINS if name in values]
    if named and all({**before, **values}[name] is None for name in users.LOGINS):
        # This is not a 422, because the same body is valid for an account that has both a user name and an email.
        message = "The account would have no user name and no email to sign in with"
        raise Conflict([FieldProblem(("body", name), message, "login_needed") for name in named])


def _require_proof(before: Row, proven_hash: str | None, changed: list[str]) -> None:
    if proven_hash is None:
        message = f"Expected the current password, which is required to change {' and '.join(changed)}"
        raise Forbidden([FieldProblem(("body", "current_password"), message, "missing")])
    if proven_hash != before["password_hash"]:
        raise confirmations.password_changed_meanwhile()


async def edit_by_admin(
    tx: Transaction, editor: Editor, user_id: int, fields: Row, if_match: IfMatch
) -> dict[str, Any]:
    """Set fields of any account; the editor's own user name and address need `edit_own`.

    Raises Forbidden, NotFound, PreconditionFailed, InvalidInput or Conflict.
    """
    before = (await users.lock_with_admins(tx, user_id, if_match, admin_id=editor.user_id)).row
    (fields,) = editable(users.EDITABLE, [fields], [users.public(before)])
    values = users.as_stored(fields)
    if user_id == editor.user_id and any(name in users.LOGINS for name in changed_names(before, values)):
        raise Forbidden("Change your own user name and address at /users/me, with the current password")
    _require_login(before, values)
    after = await change(tx, editor, "update", before, values)
    await confirmations.address_changed(tx, before, after["email"])
    return after


async def create_by_admin(
    tx: Transaction, editor: Editor, fields: Row, password_hash: str, group: Group
) -> dict[str, Any]:
    """Store an account that is active immediately and return its `public` form. Raises Forbidden or Conflict."""
    await users.lock_with_admins(tx, editor.user_id, admin_id=editor.user_id)
    user = await users.create(tx, fields, password_hash, group, actor_id=editor.user_id)
    await audit.record(tx, "create", user["id"], editor, {"group": [None, group.value]})
    return user


# --- profiles


async def create_profile(tx: Transaction, editor: Editor, user_id: int, fields: Row) -> dict[str, Any]:
    """Add a profile to an account. Raises Forbidden, NotFound, or Conflict when it already has one."""
    before = await lock_for(tx, editor, user_id, None)
    if before["profile_created_at"] is not None:
        raise Conflict(f"User {user_id} already has a profile")
    return await change(tx, editor, "create_profile", before, {**fields, "profile_created_at": utc_now()})


async def edit_profile(tx: Transaction, editor: Editor, user_id: int, fields: Row, if_match: IfMatch) -> dict[str, Any]:
    """Set fields of a profile.

    Raises Forbidden, NotFound (also when there is no profile), PreconditionFailed, InvalidInput or Conflict.
    """
    before = await lock_for(tx, editor, user_id, if_match)
    require_profile(before)
    (fields,) = editable((*ProfileBody.model_fields, "avatar"), [fields], [public_profile(before)])
    return await change(tx, editor, "update_profile", before, fields)


def require_profile(row: Row) -> None:
    """Raise NotFound when the account has no profile."""
    if row["profile_created_at"] is None:
        raise NotFound(f"User {row['id']} has no profile yet")


# --- shared with other modules that edit accounts


async def lock_for(tx: Transaction, editor: Editor, user_id: int, if_match: IfMatch) -> dict[str, Any]:
    """Lock the account's row and return it. To edit another user's account, the editor must still be an active admin.

    Raises Forbidden, NotFound or PreconditionFailed.
    """
    if editor.is_admin or editor.user_id != user_id:
        return (await users.lock_with_admins(tx, user_id, if_match, admin_id=editor.user_id)).row
    return await users.lock(tx, user_id, if_match)


async def change(tx: Transaction, editor: Editor, action: str, before: Row, values: Row) -> dict[str, Any]:
    """Write columns of a locked row and return the new row. Changes by admins to other accounts are audited."""
    after = await users.change(tx, before, values, actor_id=editor.user_id)
    if editor.is_admin and editor.user_id != before["id"]:
        await audit.record_changes(tx, action, users.public(before), users.public(after), editor)
    return after
