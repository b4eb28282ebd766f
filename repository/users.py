"""Accounts: storing, finding and recognising people."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import ColumnElement, and_, insert, or_, select, update
from sqlalchemy.exc import IntegrityError

import models
from errors import Conflict, FieldProblem, Forbidden, NotFound, Unauthenticated
from repository import sessions
from repository.database import Database
from repository.lists import Listed, entities_of, entity
from repository.statement import statement
from repository.transaction import Transaction
from security import Group, Identity, Tokens, name_key
from times import utc_now

USERS_AUDIENCE = f"group:{Group.ADMIN}"
# Asked for with every request that has a token: of the account and of the session in one.
_STANDING = statement(
    'SELECT users."group", users.is_active, users.username FROM sessions JOIN users ON users.id = sessions.user_id'
    " WHERE sessions.id = $1 AND sessions.user_id = $2 AND sessions.ended_at IS NULL"
)
_PRIVATE = frozenset({"password_hash", "username_key", "email_key", "avatar", "profile_created_at", "deleted_at"})
AVATAR_PIXELS = 512
THUMBNAIL_PIXELS = 128
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
) -> dict[str, Any]:
    """Store an account. Raises Conflict naming the user name or address that is taken."""
    username, email = fields.get("username"), fields.get("email")
    table = models.users
    keys = {"username": login_key(username) if username else None, "email": login_key(email) if email else None}
    taken = await tx.connection.execute(
        select(table.c.username_key, table.c.email_key).where(
            or_(table.c.username_key == keys["username"], table.c.email_key == keys["email"])
        )
    )
    for row in taken:
        _refuse([name for name, key in keys.items() if key is not None and key == getattr(row, f"{name}_key")])
    now = utc_now()
    phone = fields.get("phone_number")
    values = {
        "username": username,
        "username_key": keys["username"],
        "email": email,
        "email_key": keys["email"],
        "name": fields.get("name"),
        "first_name": fields.get("first_name"),
        "last_name": fields.get("last_name"),
        "phone_number": "+" + phone.lstrip("+") if phone else None,
        "password_hash": password_hash,
        "group": group.value,
        "is_active": not awaits_activation,
        "awaits_activation": awaits_activation,
        "version": 1,
        "created_at": now,
        "updated_at": now,
    }
    try:
        stored = await tx.connection.execute(insert(table).values(values).returning(table))
    except IntegrityError as error:
        # Somebody registered the same name between our look and our insert.
        names = [name for name in keys if f"{name}_key" in str(error.orig)]
        _refuse(names)
        raise
    user = public(entity(stored.one()))
    announce(tx, "add", user, actor_id=user["id"])
    return user


def _refuse(names: list[str]) -> None:
    if names:
        raise Conflict([FieldProblem(("body", name), f"This {name} is taken", "taken") for name in names])


async def find(database: Database, user_id: int) -> dict[str, Any] | None:
    return await _find(database, models.users.c.id == user_id)


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


async def identify(database: Database, tokens: Tokens, token: str) -> Identity:
    """Whose token it is. Raises Unauthenticated; a session that ended, and an account that is gone or disabled, count
    at once, on every worker.
    """
    claims = tokens.read(token)
    return await _standing(database, claims.user_id, claims.session_id, claims.expires_at)


async def recheck(database: Database, identity: Identity) -> Identity:
    """The identity as it is now. Raises Unauthenticated when it is no good any more."""
    return await _standing(database, identity.user_id, identity.session_id, identity.expires_at)


async def _standing(database: Database, user_id: int, session_id: str, expires_at: float) -> Identity:
    found = await database.fetch(_STANDING, session_id, user_id)
    if not found or not found[0][1]:
        raise Unauthenticated("The access token is not valid or has expired")
    group, _, username = found[0]
    return Identity(user_id, Group(group), expires_at, session_id, username)


async def change_group(tx: Transaction, actor_id: int, user_id: int, group: Group) -> dict[str, Any]:
    """Put an account into another group. Raises NotFound, Conflict for the last admin, Forbidden."""
    return await _administer(tx, actor_id, user_id, {"group": group.value})


async def activate(tx: Transaction, actor_id: int, user_id: int) -> dict[str, Any]:
    """Let an account sign in again. Raises NotFound, Forbidden."""
    return await _administer(tx, actor_id, user_id, {"is_active": True, "awaits_activation": False})


async def deactivate(tx: Transaction, actor_id: int, user_id: int) -> dict[str, Any]:
    """Shut an account and end its sessions, which activating brings nobody back to.

    Raises NotFound, Conflict for the last admin, Forbidden.
    """
    user = await _administer(tx, actor_id, user_id, {"is_active": False, "awaits_activation": False})
    await sessions.end_all(tx, user_id, actor_id=actor_id)
    return user


async def _administer(tx: Transaction, actor_id: int, user_id: int, changes: Mapping[str, Any]) -> dict[str, Any]:
    table = models.users
    is_acting_admin = and_(table.c.group == Group.ADMIN.value, table.c.is_active)
    # All admins are locked with the account, in one order: of two who leave at once the second finds itself alone,
    # and whoever was demoted a moment ago does nothing more.
    found = await tx.connection.execute(
        select(table)
        .where(or_(table.c.id == user_id, is_acting_admin), exists())
        .order_by(table.c.id)
        .with_for_update(key_share=True)
    )
    by_id = {row.id: entity(row) for row in found}
    admins = {each["id"] for each in by_id.values() if each["group"] == Group.ADMIN and each["is_active"]}
    if actor_id not in admins:
        raise Forbidden("Only admins can do this")
    if user_id not in by_id:
        raise NotFound(f"There is no user {user_id}")
    before = by_id[user_id]
    changed = [name for name, value in changes.items() if before[name] != value]
    if not changed:
        return public(before)
    after = {**before, **changes}
    if admins == {user_id} and not (after["group"] == Group.ADMIN and after["is_active"]):
        raise Conflict("This is the last admin; make somebody else an admin first")
    after |= {"version": before["version"] + 1, "updated_at": utc_now()}
    written = {name: after[name] for name in (*changed, "version", "updated_at")}
    await tx.connection.execute(update(table).where(table.c.id == user_id).values(written))
    user = public(after)
    announce(tx, "update", user, actor_id=actor_id, before=public(before), changed=changed)
    return user


async def list_non_admins(database: Database, *, offset: int, limit: int) -> Listed[dict[str, Any]]:
    table = models.users
    where = (table.c.group != Group.ADMIN.value) & exists()
    return await entities_of(database, table, where, (("id", False),), public, offset=offset, limit=limit)
