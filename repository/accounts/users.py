"""Accounts: storing, finding and recognising people."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from sqlalchemy import ColumnElement, and_, insert, or_, select, update
from sqlalchemy.exc import IntegrityError

import models
from core.errors import Conflict, FieldProblem, Forbidden, NotFound
from core.identity import Group, name_key
from core.times import utc_now
from repository.accounts import audit, one_time_tokens, sessions
from repository.engine.database import Database
from repository.engine.transaction import Transaction
from repository.generic import filter_sql
from repository.generic.lists import Listed, ListRequest, entities_of, entity, total_order

USERS_AUDIENCE = f"group:{Group.ADMIN}"
_PRIVATE = frozenset({"password_hash", "username_key", "email_key", "avatar", "profile_created_at", "deleted_at"})
AVATAR_PIXELS = 512
THUMBNAIL_PIXELS = 128
# What the owner of an account writes.
EDITABLE = ("username", "email", "name", "first_name", "last_name", "phone_number")
SEARCHED = ("username", "email", "name", "first_name", "last_name", "phone_number")
SEARCHED_BY_OTHERS = ("username", "name")
MAX_KEY_LENGTH = 200  # of the narrower key column


def login_key(name: str) -> str:
    """What two spellings of one name are stored and looked for as.

    One character may become eighteen when it is normalised, and a name that somebody tries at the door may hold
    anything: what the column cannot hold goes by its digest.
    """
    key = name_key(name)
    if len(key) <= MAX_KEY_LENGTH and "\x00" not in key:
        return key
    return hashlib.blake2b(key.encode(), digest_size=32).hexdigest()


def public(row: Mapping[str, Any]) -> dict[str, Any]:
    """The account as its owner and admins see it."""
    found = {name: value for name, value in row.items() if name not in _PRIVATE}
    avatar = row["avatar"]
    found["avatar_url"] = f"/avatars/{avatar}/{AVATAR_PIXELS}" if avatar else None
    found["avatar_thumbnail_url"] = f"/avatars/{avatar}/{THUMBNAIL_PIXELS}" if avatar else None
    found["has_profile"] = row["profile_created_at"] is not None
    return found


def in_brief(row: Mapping[str, Any]) -> dict[str, Any]:
    """The account as other users see it."""
    return {name: row[name] for name in ("id", "username", "name")}


def exists() -> ColumnElement[bool]:
    """What is left of a deleted account is only a number."""
    return models.users.c.deleted_at.is_(None)


def announce(
    tx: Transaction,
    operation: str,
    user: dict[str, Any],
    *,
    actor_id: int | None,
    before: dict[str, Any] | None = None,
    changed: Sequence[str] = (),
) -> None:
    """The one event of an account, for admins and for the account's own sockets. `user` and `before` are `public`."""
    for topic, audience in (("users", USERS_AUDIENCE), ("account", f"user:{user['id']}")):
        tx.emit(topic, operation, user, actor_id=actor_id, before=before, changed=changed, audience=audience)


async def lock(tx: Transaction, user_id: int) -> dict[str, Any]:
    """The row of an account, nobody else's to change until COMMIT. Raises NotFound."""
    found = await tx.connection.execute(
        select(models.users).where(models.users.c.id == user_id, exists()).with_for_update()
    )
    row = found.one_or_none()
    if row is None:
        raise NotFound(f"There is no user {user_id}")
    return entity(row)


async def change(
    tx: Transaction, before: Mapping[str, Any], values: Mapping[str, Any], *, actor_id: int | None
) -> dict[str, Any]:
    """Write columns of a row that is locked, with the event of what shows of it, and answer the row as it is then.

    What nobody sees, such as a password, is written without an event and without a new version.
    """
    values = {name: value for name, value in values.items() if before[name] != value}
    if not values:
        return dict(before)
    shown = public(before)
    after = {**before, **values}
    changed = changes_between(shown, public(after))
    if changed:
        stamp = {"version": before["version"] + 1, "updated_at": utc_now()}
        values |= stamp
        after |= stamp
    await tx.connection.execute(update(models.users).where(models.users.c.id == before["id"]).values(values))
    if changed:
        announce(tx, "update", public(after), actor_id=actor_id, before=shown, changed=changed)
    return after


def changes_between(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """The names of what is different."""
    return [name for name in after if before[name] != after[name]]


async def create(
    tx: Transaction,
    fields: Mapping[str, Any],
    password_hash: str,
    group: Group = Group.USER,
    *,
    awaits_activation: bool = False,
    actor_id: int | None = None,
) -> dict[str, Any]:
    """Store an account, for itself when there is no other actor. Raises Conflict naming what is taken."""
    given = as_stored({name: fields.get(name) for name in EDITABLE})
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
    table = models.users
    with naming_what_is_taken():
        stored = await tx.connection.execute(insert(table).values(values).returning(table))
    user = public(entity(stored.one()))
    announce(tx, "add", user, actor_id=actor_id if actor_id is not None else user["id"])
    return user


async def create_admin(tx: Transaction, fields: Mapping[str, Any], password_hash: str) -> dict[str, Any]:
    """As whoever runs the service does, from outside of it. Raises Conflict naming what is taken."""
    user = await create(tx, fields, password_hash, Group.ADMIN)
    changes = {"group": [None, Group.ADMIN.value]}
    await audit.record(tx, "create", user["id"], actor_id=None, address=None, changes=changes)
    return user


def as_stored(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The columns that fields of an account are written to."""
    values = dict(fields)
    for name in ("username", "email"):
        if name in values:
            values[f"{name}_key"] = login_key(values[name]) if values[name] else None
    phone = values.get("phone_number")
    if phone:
        values["phone_number"] = "+" + phone.lstrip("+")
    return values


async def require_free(tx: Transaction, values: Mapping[str, Any], user_id: int | None = None) -> None:
    """Raises Conflict naming the user name and the address among `values` that another account than this one has."""
    table = models.users
    keys = {name: values[f"{name}_key"] for name in ("username", "email") if values.get(f"{name}_key")}
    if not keys:
        return
    same = [table.c[f"{name}_key"] == key for name, key in keys.items()]
    found = await tx.connection.execute(
        select(table.c.username_key, table.c.email_key).where(or_(*same), table.c.id.is_distinct_from(user_id))
    )
    rows = found.all()
    names = [name for name, key in keys.items() if any(getattr(row, f"{name}_key") == key for row in rows)]
    _refuse(names)


@contextmanager
def naming_what_is_taken() -> Iterator[None]:
    """Raises Conflict for what somebody else took between our look and our write."""
    try:
        yield
    except IntegrityError as error:
        _refuse([name for name in ("username", "email") if f"{name}_key" in str(error.orig)])
        raise


def _refuse(names: list[str]) -> None:
    if names:
        raise Conflict([FieldProblem(("body", name), f"This {name} is taken", "taken") for name in names])


async def find(database: Database, user_id: int) -> dict[str, Any] | None:
    return await _find(database, models.users.c.id == user_id)


async def has_admin(database: Database) -> bool:
    table = models.users
    async with database.read() as connection:
        found = await connection.execute(select(table.c.id).where(table.c.group == Group.ADMIN.value).limit(1))
        return found.first() is not None


async def find_by_username(database: Database, username: str) -> dict[str, Any] | None:
    return await _find(database, models.users.c.username_key == login_key(username))


async def find_by_login(database: Database, login: str) -> dict[str, Any] | None:
    """By user name or e-mail address; a user name holds no @, so the two never meet."""
    column = models.users.c.email_key if "@" in login else models.users.c.username_key
    return await _find(database, column == login_key(login))


async def _find(database: Database, where: Any) -> dict[str, Any] | None:
    async with database.read() as connection:
        row = (await connection.execute(select(models.users).where(where, exists()))).one_or_none()
        return entity(row) if row is not None else None


async def change_group(
    tx: Transaction, actor_id: int, user_id: int, group: Group, *, address: str | None = None
) -> dict[str, Any]:
    """Put an account into another group. Raises NotFound, Conflict for the last admin, Forbidden."""
    return await _administer(tx, "change_group", actor_id, user_id, {"group": group.value}, address)


async def activate(tx: Transaction, actor_id: int, user_id: int, *, address: str | None = None) -> dict[str, Any]:
    """Let an account sign in again. Raises NotFound, Forbidden."""
    values = {"is_active": True, "awaits_activation": False}
    return await _administer(tx, "activate", actor_id, user_id, values, address)


async def deactivate(tx: Transaction, actor_id: int, user_id: int, *, address: str | None = None) -> dict[str, Any]:
    """Shut an account, end its sessions, which activating brings nobody back to, and take back what was mailed to it.

    Raises NotFound, Conflict for the last admin, Forbidden.
    """
    values = {"is_active": False, "awaits_activation": False}
    user = await _administer(tx, "deactivate", actor_id, user_id, values, address)
    await one_time_tokens.void(tx, user_id)
    await sessions.end_all(tx, user_id, actor_id=actor_id)
    return user


async def _administer(
    tx: Transaction, action: str, actor_id: int, user_id: int, values: Mapping[str, Any], address: str | None
) -> dict[str, Any]:
    before, admins = await lock_among_admins(tx, user_id)
    require_admin(actor_id, admins)
    if before is None:
        raise NotFound(f"There is no user {user_id}")
    after = {**before, **values}
    if not (after["group"] == Group.ADMIN and after["is_active"]):
        require_another_admin(user_id, admins)
    user = public(await change(tx, before, values, actor_id=actor_id))
    await audit.record_changes(tx, action, public(before), user, actor_id=actor_id, address=address)
    return user


async def lock_among_admins(tx: Transaction, user_id: int) -> tuple[dict[str, Any] | None, frozenset[int]]:
    """The account, None when there is none, and the ids of all admins that can act, everything locked until COMMIT.

    They are locked in one order: of two admins who leave at once the second finds itself alone, and whoever was demoted
    a moment ago does nothing more.
    """
    table = models.users
    is_acting_admin = and_(table.c.group == Group.ADMIN.value, table.c.is_active)
    found = await tx.connection.execute(
        select(table)
        .where(or_(table.c.id == user_id, is_acting_admin), exists())
        .order_by(table.c.id)
        .with_for_update()
    )
    by_id = {row.id: entity(row) for row in found}
    admins = frozenset(each["id"] for each in by_id.values() if each["group"] == Group.ADMIN and each["is_active"])
    return by_id.get(user_id), admins


def require_admin(actor_id: int, admins: frozenset[int]) -> None:
    """Raises Forbidden."""
    if actor_id not in admins:
        raise Forbidden("Only admins can do this")


def require_another_admin(user_id: int, admins: frozenset[int]) -> None:
    """Raises Conflict when there would be no admin without this one."""
    if admins == {user_id}:
        raise Conflict("This is the last admin; make somebody else an admin first")


# --- lists


async def page_of(database: Database, page: ListRequest, *, sees_everything: bool) -> Listed[dict[str, Any]]:
    """A page of the accounts: all of them for admins, for others the active ones, as `in_brief`."""
    table = models.users
    where = [exists(), filter_sql.where(table, page.filter, is_sqlite=database.is_sqlite)]
    if not sees_everything:
        where.append(table.c.is_active)
    if page.text:
        searched = SEARCHED if sees_everything else SEARCHED_BY_OTHERS
        where.append(filter_sql.search(table, searched, page.text, is_sqlite=database.is_sqlite))
    return await entities_of(
        database,
        table,
        and_(*where),
        total_order(page.sort),
        public if sees_everything else in_brief,
        offset=page.offset,
        limit=page.limit,
        after=page.after,
    )


async def list_non_admins(database: Database, *, offset: int, limit: int) -> Listed[dict[str, Any]]:
    table = models.users
    where = (table.c.group != Group.ADMIN.value) & exists()
    return await entities_of(database, table, where, (("id", False),), public, offset=offset, limit=limit)
