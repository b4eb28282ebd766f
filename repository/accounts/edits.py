"""Editing accounts and profiles, by their owners and by admins.

A profile is a part of its account: one row, one version. Every function takes the transaction of `Database.write` and
answers the account's row as it is then. Whoever edits holds the row, and an edit that changes nothing is no edit: no
event, and nothing in the audit trail.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from core.errors import Conflict, FieldProblem, Forbidden, NotFound, PreconditionFailed
from core.identity import Group
from core.times import utc_now
from repository.accounts import audit, confirmations, users
from repository.engine.transaction import Transaction
from repository.generic.versions import IfMatch

PROFILE = ("first_name", "last_name", "gender", "date_of_birth", "info")
_SIGNS_IN_WITH = ("username", "email")


@dataclass(frozen=True, slots=True)
class Editor:
    """Who edits, and from where. As an admin only where that is what gives the right to."""

    user_id: int
    address: str | None
    is_admin: bool


def public_profile(row: Mapping[str, Any]) -> dict[str, Any]:
    account = users.public(row)
    shown = (*PROFILE, "avatar_url", "avatar_thumbnail_url", "version")
    return {
        "user_id": row["id"],
        **{name: account[name] for name in shown},
        "created_at": row["profile_created_at"],
        "updated_at": row["updated_at"],
    }


# --- accounts


async def edit_own(
    tx: Transaction,
    user_id: int,
    fields: Mapping[str, Any],
    if_match: IfMatch,
    *,
    proven_hash: str | None,
    proves_addresses: bool,
) -> dict[str, Any]:
    """Set fields of one's own account.

    `proven_hash` is what the current password was checked against, None when none was sent; it is needed for what one
    signs in with. With `proves_addresses` a new address is mailed a link, and counts when that is followed; the address
    that the account has takes such a wish back, if the password comes with it. Raises NotFound, PreconditionFailed,
    Forbidden without the password, and Conflict.
    """
    before = await _locked(tx, user_id, if_match)
    values = users.as_stored(fields)
    _require_login(before, values)
    changed = [name for name in _SIGNS_IN_WITH if name in values and values[name] != before[name]]
    if changed:
        _require_proof(before, proven_hash, changed)
    if "email" in changed and proves_addresses:
        if values["email"] is None:
            message = "An address stays, for accounts are activated by mail here"
            raise Conflict([FieldProblem(("body", "email"), message, "email_needed")])
        await confirmations.ask_for_address(tx, before, values["email"])
        del values["email"], values["email_key"]
    elif "email" in values and proven_hash is not None:
        await confirmations.keep_address(tx, before)
    return await _write(tx, before, values, user_id)


def _require_login(before: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    named = [name for name in _SIGNS_IN_WITH if name in values]
    if named and all({**before, **values}[name] is None for name in _SIGNS_IN_WITH):
        # The body is a good one for an account that has the other: so not a 422.
        message = "The account has nothing else to sign in with"
        raise Conflict([FieldProblem(("body", name), message, "login_needed") for name in named])


def _require_proof(before: Mapping[str, Any], proven_hash: str | None, changed: list[str]) -> None:
    if proven_hash is None:
        message = f"Expected the current password, for {' and '.join(changed)} to change"
        raise Forbidden([FieldProblem(("body", "current_password"), message, "missing").as_dict()])
    if proven_hash != before["password_hash"]:
        raise Conflict("The password was changed by somebody else just now")


async def edit_by_admin(
    tx: Transaction, editor: Editor, user_id: int, fields: Mapping[str, Any], if_match: IfMatch
) -> dict[str, Any]:
    """Set fields of any account. Raises Forbidden, NotFound, PreconditionFailed and Conflict."""
    before, admins = await users.lock_among_admins(tx, user_id)
    users.require_admin(editor.user_id, admins)
    if before is None:
        raise NotFound(f"There is no user {user_id}")
    _require_version(before, if_match)
    values = users.as_stored(fields)
    _require_login(before, values)
    after = await _write(tx, before, values, editor.user_id)
    await record(tx, "update", before, after, editor)
    return after


async def create_by_admin(
    tx: Transaction, editor: Editor, fields: Mapping[str, Any], password_hash: str, group: Group
) -> dict[str, Any]:
    """Store an account that is active at once; answers it `public`. Raises Forbidden and Conflict."""
    _, admins = await users.lock_among_admins(tx, editor.user_id)
    users.require_admin(editor.user_id, admins)
    user = await users.create(tx, fields, password_hash, group, actor_id=editor.user_id)
    changes = {"group": [None, group.value]}
    await audit.record(tx, "create", user["id"], actor_id=editor.user_id, address=editor.address, changes=changes)
    return user


# --- profiles


async def create_profile(tx: Transaction, editor: Editor, user_id: int, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Raises Forbidden, NotFound, and Conflict when there is one already."""
    before = await locked_for(tx, editor, user_id, None)
    if before["profile_created_at"] is not None:
        raise Conflict(f"User {user_id} has a profile")
    after = await users.change(tx, before, {**fields, "profile_created_at": utc_now()}, actor_id=editor.user_id)
    await record(tx, "create_profile", before, after, editor)
    return after


async def edit_profile(
    tx: Transaction, editor: Editor, user_id: int, fields: Mapping[str, Any], if_match: IfMatch
) -> dict[str, Any]:
    """Raises Forbidden, NotFound also when there is no profile yet, and PreconditionFailed."""
    before = await locked_for(tx, editor, user_id, if_match)
    require_profile(before)
    after = await users.change(tx, before, fields, actor_id=editor.user_id)
    await record(tx, "update_profile", before, after, editor)
    return after


def require_profile(row: Mapping[str, Any]) -> None:
    """Raises NotFound."""
    if row["profile_created_at"] is None:
        raise NotFound(f"User {row['id']} has no profile yet")


# --- what they share


async def locked_for(tx: Transaction, editor: Editor, user_id: int, if_match: IfMatch) -> dict[str, Any]:
    """The row, locked; of somebody else's only while the editor is an admin.

    Raises Forbidden, NotFound and PreconditionFailed.
    """
    if not editor.is_admin:
        return await _locked(tx, user_id, if_match)
    before, admins = await users.lock_among_admins(tx, user_id)
    users.require_admin(editor.user_id, admins)
    if before is None:
        raise NotFound(f"There is no user {user_id}")
    _require_version(before, if_match)
    return before


async def _locked(tx: Transaction, user_id: int, if_match: IfMatch) -> dict[str, Any]:
    before = await users.lock(tx, user_id)
    _require_version(before, if_match)
    return before


def _require_version(before: Mapping[str, Any], if_match: IfMatch) -> None:
    if if_match is not None and before["version"] not in if_match:
        raise PreconditionFailed(f"User {before['id']} is at version {before['version']} now")


async def _write(
    tx: Transaction, before: Mapping[str, Any], values: Mapping[str, Any], actor_id: int
) -> dict[str, Any]:
    """Write what one may sign in with, too. Raises Conflict naming what is taken."""
    await users.require_free(tx, values, before["id"])
    with users.naming_what_is_taken():
        after = await users.change(tx, before, values, actor_id=actor_id)
    await confirmations.address_changed(tx, before, after["email"])
    return after


async def record(
    tx: Transaction, action: str, before: Mapping[str, Any], after: Mapping[str, Any], editor: Editor
) -> None:
    """Keep in the audit trail what an admin did; what people do to their own accounts is not kept."""
    if editor.is_admin:
        shown = users.public(before), users.public(after)
        await audit.record_changes(tx, action, *shown, actor_id=editor.user_id, address=editor.address)
