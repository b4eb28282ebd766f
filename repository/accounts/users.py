"""Accounts: creating, finding, locking, changing and listing them.

A write locks the account with `lock` or `lock_with_admins` and writes columns with `change`, which emits the event.
Each function that takes a transaction runs inside `Database.write`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, and_, insert, or_, select, update
from sqlalchemy.exc import IntegrityError

import models
from core.errors import Conflict, FieldProblem, Forbidden, NotFound
from core.identity import Group, audience_of_user, unique_key
from core.times import utc_now
from repository import jobs
from repository.accounts import audit, one_time_tokens, sessions
from repository.accounts.audit import Editor
from repository.engine import rights
from repository.engine.database import Database
from repository.engine.transaction import Transaction
from repository.generic import filter_sql
from repository.generic.cursors import Ordering, total_order
from repository.generic.lists import Listed, ListRequest, entities_of
from repository.generic.rows import entity, one
from repository.generic.versions import BOOKKEEPING, IfMatch, Row, changed_names, require_version

TABLE = models.users
ORDERING = Ordering(TABLE, lambda sort, after: total_order(sort))
USERS_AUDIENCE = f"group:{Group.ADMIN}"
_PRIVATE = frozenset(
    {"password_hash", "username_key", "email_key", "waiting_key", "avatar", "profile_created_at", "deleted_at"}
)
AVATAR_PIXELS = 512
THUMBNAIL_PIXELS = 128
# Both columns are unique, and a user signs in with either.
LOGINS = ("username", "email")
# The columns that the owner of an account can edit.
EDITABLE = (*LOGINS, "name", "first_name", "last_name", "phone_number")
SEARCHED = EDITABLE  # the columns that a search by an admin covers
SEARCHED_BY_OTHERS = ("username", "name")
# A sign-in by address checks the password of the owner of the address and the passwords of the newest accounts that
# wait for it. Each check takes tens of milliseconds. Two accounts cover a user who registers again with another
# password before the first account is activated.
MAX_WAITING_CHECKED = 2


def public(row: Row) -> dict[str, Any]:
    """Return the account as its owner and admins see it."""
    found = {name: value for name, value in row.items() if name not in _PRIVATE}
    avatar = row["avatar"]
    found["avatar_url"] = f"/avatars/{avatar}/{AVATAR_PIXELS}" if avatar else None
    found["avatar_thumbnail_url"] = f"/avatars/{avatar}/{THUMBNAIL_PIXELS}" if avatar else None
    found["has_profile"] = row["profile_created_at"] is not None
    return found


def in_brief(row: Row) -> dict[str, Any]:
    """Return the account as other users see it."""
    return {name: row[name] for name in ("id", "username", "name")}


def exists() -> ColumnElement[bool]:
    """Return the condition that excludes deleted accounts, whose rows keep only the id."""
    return TABLE.c.deleted_at.is_(None)


def announce(
    tx: Transaction, operation: str, user: dict[str, Any], actor_id: int | None, before: dict[str, Any] | None = None
) -> None:
    """Emit an event to admins and to the account's own sockets. `user` and `before` are in the `public` form."""
    changed = [name for name in changed_names(before or user, user) if name not in BOOKKEEPING]
    for topic, audience in (("users", USERS_AUDIENCE), ("account", audience_of_user(user["id"]))):
        tx.emit(topic, operation, user, actor_id=actor_id, before=before, changed=changed, audience=audience)


def not_found(key: int | str) -> NotFound:
    """Return the error for an account that does not exist. `key` is its id or user name."""
    return NotFound(f"There is no user {key}")


def _require(row: dict[str, Any] | None, user_id: int, if_match: IfMatch) -> dict[str, Any]:
    if row is None:
        raise not_found(user_id)
    require_version("User", row, if_match)
    return row


async def lock(tx: Transaction, user_id: int, if_match: IfMatch = None) -> dict[str, Any]:
    """Return the row of an account, locked until COMMIT. Raises NotFound or PreconditionFailed."""
    row = await one(tx.connection, select(TABLE).where(TABLE.c.id == user_id, exists()).with_for_update())
    return _require(row, user_id, if_match)


@dataclass(frozen=True, slots=True)
class LockedWithAdmins:
    """The row of an account and the ids of all active admins, all of them locked until COMMIT."""

    row: dict[str, Any]
    admins: frozenset[int]

    def require_another_admin(self) -> None:
        """Raise Conflict when this account is the only active admin."""
        if self.admins == {self.row["id"]}:
            raise Conflict("This is the last admin; add another admin first")


async def lock_with_admins(
    tx: Transaction, user_id: int, if_match: IfMatch = None, *, admin_id: int | None
) -> LockedWithAdmins:
    """Lock an account together with every active admin.

    Rows are locked in order of id, so that one of two concurrent calls waits and sees the result of the other. If the
    last two admins leave at the same time, the second is therefore rejected, and so is a request by an admin who has
    just been demoted. Raises Forbidden when `admin_id` is given and is not an active admin, then NotFound or
    PreconditionFailed.
    """
    is_active_admin = and_(TABLE.c.group == Group.ADMIN.value, TABLE.c.is_active)
    wanted = select(TABLE).where(or_(TABLE.c.id == user_id, is_active_admin), exists()).order_by(TABLE.c.id)
    by_id = {row.id: entity(row) for row in await tx.connection.execute(wanted.with_for_update())}
    admins = frozenset(each["id"] for each in by_id.values() if each["group"] == Group.ADMIN and each["is_active"])
    if admin_id is not None and admin_id not in admins:
        raise Forbidden("Only admins can do this")
    return LockedWithAdmins(_require(by_id.get(user_id), user_id, if_match), admins)


async def change(tx: Transaction, before: Row, values: Row, *, actor_id: int | None) -> dict[str, Any]:
    """Write columns of a locked row, emit the event, and return the new row.

    A change that `public` does not show, such as a new password, emits no event and keeps the version. Raises Conflict
    naming the user name or the email that another account has.
    """
    values = {name: values[name] for name in changed_names(before, values)}
    if not values:
        return dict(before)
    if before["waiting_key"] is not None:
        if values.get("is_active"):
            values["waiting_key"] = None
        elif "email" in values:
            values["waiting_key"] = unique_key(values["email"]) if values["email"] is not None else None
    await require_free(tx, values, before["id"])
    if tx.writer is not None and tx.writer.user_id == before["id"] and values.keys() & {"group", "is_active"}:
        await rights.spend(tx)
    shown = public(before)
    after = {**before, **values}
    changed = changed_names(shown, public(after))
    if changed:
        stamp = {"version": before["version"] + 1, "updated_at": utc_now()}
        values |= stamp
        after |= stamp
    with _conflict_when_taken():
        await tx.connection.execute(update(TABLE).where(TABLE.c.id == before["id"]).values(values))
    if changed:
        announce(tx, "update", public(after), actor_id, before=shown)
    return after


async def create(
    tx: Transaction,
    fields: Row,
    password_hash: str,
    group: Group = Group.USER,
    *,
    awaits_activation: bool = False,
    actor_id: int | None = None,
) -> dict[str, Any]:
    """Store an account and return its `public` form. Without `actor_id` the account itself is the actor.

    Raises Conflict naming the user name or the email that another account has. With `awaits_activation`, a taken email
    raises nothing: the owner of the address receives a notice (`outbox`).
    """
    given = as_stored({name: fields.get(name) for name in EDITABLE})
    if awaits_activation:
        given["waiting_key"] = given["email_key"]
        given["email_key"] = await _key_unless_taken(tx, given["email_key"])
    await require_free(tx, given)
    now = utc_now()
    values = {
        **given,
        "password_hash": password_hash,
        "group": group.value,
        "is_active": not awaits_activation,
        "awaits_activation": awaits_activation,
        "version": 1,
        "created_at": now,
        "updated_at": now,
    }
    with _conflict_when_taken():
        stored = await tx.connection.execute(insert(TABLE).values(values).returning(TABLE))
    user = public(entity(stored.one()))
    announce(tx, "add", user, actor_id if actor_id is not None else user["id"])
    return user


async def create_admin(tx: Transaction, fields: Row, password_hash: str) -> dict[str, Any]:
    """Store an admin account on behalf of the operator, who has no account. Raises Conflict as `create` does."""
    user = await create(tx, fields, password_hash, Group.ADMIN)
    await audit.record(tx, "create", user["id"], None, {"group": [None, Group.ADMIN.value]})
    return user


def as_stored(fields: Row) -> dict[str, Any]:
    """Return the columns and values that store these fields."""
    values = dict(fields)
    for name in LOGINS:
        if name in values:
            values[f"{name}_key"] = unique_key(values[name]) if values[name] else None
    phone = values.get("phone_number")
    if phone:
        values["phone_number"] = "+" + phone.lstrip("+")
    return values


async def _key_unless_taken(tx: Transaction, key: str | None) -> str | None:
    """Return the `email_key` of a new account that awaits activation: `key`, or None if another account has it.

    Without the key, the new account gets no activation URL. It is stored all the same, so that a registration has the
    same visible effects as with a free address: the user name is taken, and a sign-in with the password returns 403.
    """
    if key is None:
        return None
    taken = await tx.connection.execute(select(TABLE.c.id).where(TABLE.c.email_key == key))
    return None if taken.first() is not None else key


async def require_free(tx: Transaction, values: Row, user_id: int | None = None) -> None:
    """Raise Conflict naming the user name or the email among `values` that an account other than `user_id` has."""
    keys = {name: values[f"{name}_key"] for name in LOGINS if values.get(f"{name}_key")}
    if not keys:
        return
    same = [TABLE.c[f"{name}_key"] == key for name, key in keys.items()]
    others = select(TABLE.c.username_key, TABLE.c.email_key).where(or_(*same), TABLE.c.id.is_distinct_from(user_id))
    rows = (await tx.connection.execute(others)).all()
    names = [name for name, key in keys.items() if any(getattr(row, f"{name}_key") == key for row in rows)]
    _raise_taken(names)


@contextmanager
def _conflict_when_taken() -> Iterator[None]:
    """Raise Conflict for a user name or an email that another transaction stored after `require_free` checked it."""
    try:
        yield
    except IntegrityError as error:
        _raise_taken([name for name in LOGINS if f"{name}_key" in str(error.orig)])
        raise


def _raise_taken(names: list[str]) -> None:
    if names:
        raise Conflict([FieldProblem(("body", name), f"This {name} is taken", "taken") for name in names])


async def find(database: Database, user_id: int) -> dict[str, Any] | None:
    """Return the row of an account, or None when there is none."""
    return await _find(database, TABLE.c.id == user_id)


async def has_admin(database: Database) -> bool:
    return bool(await database.select(select(TABLE.c.id).where(TABLE.c.group == Group.ADMIN.value).limit(1)))


async def find_by_username(database: Database, username: str) -> dict[str, Any] | None:
    return await _find(database, TABLE.c.username_key == unique_key(username))


@dataclass(frozen=True, slots=True)
class Candidates:
    """The accounts that a login may identify.

    `owner` is the account that has the user name or the address. `waiting` holds the newest accounts that were
    registered with the address and have not been activated, whether or not the address has an owner.
    """

    owner: dict[str, Any] | None
    waiting: Sequence[dict[str, Any]] = ()


async def find_by_login(database: Database, login: str) -> Candidates:
    """Return the accounts that a user name or an email address may identify. A login with an @ is an address.

    The newest waiting accounts are returned, so that a client that has just registered finds its own account, whatever
    other accounts there are.
    """
    key = unique_key(login)
    if "@" not in login:
        return Candidates(await _find(database, TABLE.c.username_key == key))
    waits = TABLE.c.waiting_key == key
    newest = select(TABLE).where(waits).order_by(TABLE.c.id.desc()).limit(MAX_WAITING_CHECKED)
    # An account that is activated between the two reads must not be missed, so the owner is read last.
    waiting = [entity(row) for row in await database.select(newest)]
    owner = await _find(database, and_(TABLE.c.email_key == key, TABLE.c.waiting_key.is_(None)))
    return Candidates(owner, waiting)


async def _find(database: Database, where: Any) -> dict[str, Any] | None:
    found = await database.select(select(TABLE).where(where, exists()))
    return entity(found[0]) if found else None


async def change_group(tx: Transaction, editor: Editor, user_id: int, group: Group) -> dict[str, Any]:
    """Move an account to another group. Raises Forbidden, NotFound, or Conflict for the last admin."""
    return await _administer(tx, "change_group", editor, user_id, {"group": group.value})


async def activate(tx: Transaction, editor: Editor, user_id: int) -> dict[str, Any]:
    """Enable an account, including one that is awaiting activation.

    Raises Forbidden, NotFound, or Conflict when another account has the email.
    """
    return await _administer(tx, "activate", editor, user_id, {"is_active": True, "awaits_activation": False})


async def deactivate(tx: Transaction, editor: Editor, user_id: int) -> dict[str, Any]:
    """Disable an account, cancel its jobs, end its sessions and revoke its one-time tokens; enabling it again restores
    none of them.

    Raises Forbidden, NotFound, or Conflict for the last admin.
    """
    values = {"is_active": False, "awaits_activation": False}
    user = await _administer(tx, "deactivate", editor, user_id, values)
    await jobs.cancel_all(tx, user_id)
    await one_time_tokens.void(tx, user_id)
    await sessions.end_all(tx, user_id, actor_id=editor.user_id)
    return user


async def _administer(tx: Transaction, action: str, editor: Editor, user_id: int, values: Row) -> dict[str, Any]:
    locked = await lock_with_admins(tx, user_id, admin_id=editor.user_id)
    before = locked.row
    after = {**before, **values}
    if after["is_active"] and before["email"] is not None:
        # If the account waits for an address that another account has, the unique key makes the write fail.
        values = {**values, "email_key": unique_key(before["email"])}
    if not (after["group"] == Group.ADMIN and after["is_active"]):
        locked.require_another_admin()
    user = public(await change(tx, before, values, actor_id=editor.user_id))
    await audit.record_changes(tx, action, public(before), user, editor)
    return user


# --- lists


async def page_of(
    database: Database, page: ListRequest, *, sees_everything: bool, has_admins: bool = True
) -> Listed[dict[str, Any]]:
    """Return a page of accounts: all of them with `sees_everything`, otherwise only active ones, `in_brief`.

    Without `has_admins`, accounts in the group admin are left out.
    """
    where = [exists(), filter_sql.where(TABLE, page.filter, is_sqlite=database.is_sqlite)]
    if not sees_everything:
        where.append(TABLE.c.is_active)
    if not has_admins:
        where.append(TABLE.c.group != Group.ADMIN.value)
    if page.text:
        searched = SEARCHED if sees_everything else SEARCHED_BY_OTHERS
        where.append(filter_sql.search(TABLE, searched, page.text, is_sqlite=database.is_sqlite))
    shown = public if sees_everything else in_brief
    return await entities_of(database, ORDERING, and_(*where), shown, page)
