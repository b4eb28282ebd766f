"""Accounts as their owners, other users and admins see and change them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import orjson
from pydantic import TypeAdapter
from starlette.responses import Response

from core.errors import FieldProblem, Forbidden, TooManyRequests
from core.identity import Group
from core.rates import Rate
from repository.accounts import deletion, edits, users
from repository.accounts.edits import Editor
from repository.engine.transaction import Transaction
from repository.generic.lists import ListRequest
from resources.accounts import credentials, profiles
from resources.accounts.fields import OTHER_USER_FIELDS, USER_FIELDS
from routes.accounts import avatar_files
from routes.http import queries, rendering
from routes.http.operation import LIST_HEADERS, Call, Operation
from services.authentication import invalid_access_token

ADDRESS_RATE = Rate(5, 24 * 60 * 60)  # of the address of one account, by its owner


def require_admin(call: Call) -> None:
    if not is_admin(call):
        raise Forbidden("Only admins can do this")


def is_admin(call: Call) -> bool:
    return call.me.group is Group.ADMIN


def editor(call: Call, user_id: int) -> Editor:
    """The caller, who has a right to the account as its owner or as an admin. Raises Forbidden.

    It does not tell whether the account exists.
    """
    if user_id != call.me.user_id and not is_admin(call):
        raise Forbidden("Only the owner of the account and admins can do this")
    return Editor(call.me.user_id, call.address, is_admin=user_id != call.me.user_id)


def edited(version: int, found: Mapping[str, Any], status: int = 200, **headers: str) -> Response:
    body = orjson.dumps(found)
    return Response(body, status, {"ETag": rendering.tag(version, body), **headers}, "application/json")


# --- one's own


async def me(call: Call) -> Response:
    user = await users.find(call.database, call.me.user_id)
    if user is None:
        raise invalid_access_token()
    return rendering.entity(call, user["version"], orjson.dumps(users.public(user)))


async def _proven(call: Call) -> Mapping[str, Any] | None:
    """The account whose current password was sent, as it was checked; None when none was. Raises Forbidden for a wrong
    one.
    """
    if "current_password" not in call.body.model_fields_set:
        return None
    await call.services.lockout.try_old_password(call.me.user_id, call.address)
    user = await users.find(call.database, call.me.user_id)
    known = user["password_hash"] if user is not None else None
    verdict = await call.services.passwords.verify(call.body.current_password, known)
    if user is None or not verdict.is_right:
        problem = FieldProblem(("body", "current_password"), "The password is wrong", "wrong_password")
        raise Forbidden([problem.as_dict()])
    await call.services.lockout.knew_old_password(call.me.user_id, call.address)
    return user


async def _count_address(call: Call, before: Mapping[str, Any], fields: Mapping[str, Any]) -> None:
    """Each new address is a mail to somebody, who may have nothing to do with it. Raises TooManyRequests."""
    if fields.get("email", before["email"]) != before["email"]:
        outcome = await call.services.limits.hit(f"address of {call.me.user_id}", ADDRESS_RATE)
        if not outcome.is_allowed:
            raise TooManyRequests("The address changed too often; try again later", outcome.reset_seconds)


async def edit_me(call: Call) -> Response:
    fields = profiles.dumped(call.body)
    versions = rendering.if_match(call)
    before = await _proven(call)
    if before is not None:
        await _count_address(call, before, fields)

    async def work(tx: Transaction) -> dict[str, Any]:
        return await edits.edit_own(
            tx,
            call.me.user_id,
            fields,
            versions,
            proven_hash=before["password_hash"] if before is not None else None,
            proves_addresses=call.services.activates_by_mail,
        )

    after = await call.database.write(work)
    return edited(after["version"], users.public(after))


async def delete_me(call: Call) -> Response:
    return await _delete(call, call.me.user_id)


async def delete(call: Call) -> Response:
    return await _delete(call, call.path.id)


async def _delete(call: Call, user_id: int) -> Response:
    who = editor(call, user_id)
    versions = rendering.if_match(call)

    async def work(tx: Transaction) -> str | None:
        return await deletion.remove(tx, who, user_id, versions)

    await avatar_files.discard(call.services, await call.database.write(work))
    return Response(status_code=204)


# --- everybody's


async def list_users(call: Call) -> Response:
    query = call.query
    page = ListRequest(
        filter=call.filter,
        text=query.q,
        sort=queries.sorting(USER_FIELDS, query.sort),
        offset=query.start,
        limit=query.limit,
        after=query.after,
    )
    if not is_admin(call):
        _require_fields_of_others(page)
    found = await users.page_of(call.database, page, sees_everything=is_admin(call))
    return rendering.page(call, found, last_id=found.rows[-1]["id"] if found.rows else None)


def _require_fields_of_others(page: ListRequest) -> None:
    """What somebody may not see, they do not find out by asking for it. Raises Forbidden naming it."""
    conditions = [*page.filter.all, *(condition for group in page.filter.any for condition in group)]
    asked = {condition.field.name for condition in conditions} | {name for name, _ in page.sort}
    if foreign := sorted(asked - OTHER_USER_FIELDS.keys()):
        raise Forbidden(f"Only admins filter and sort by {', '.join(foreign)}")


async def get_user(call: Call) -> Response:
    user = await users.find(call.database, call.path.id)
    if user is None or not (user["is_active"] or is_admin(call)):
        raise users.not_found(call.path.id)
    if is_admin(call):
        return rendering.entity(call, user["version"], orjson.dumps(users.public(user)))
    # How often somebody edits the rest is nobody else's to know: the tag of this form has no version.
    return rendering.entity(call, 0, orjson.dumps(users.in_brief(user)))


async def edit(call: Call) -> Response:
    require_admin(call)
    fields = profiles.dumped(call.body)
    if call.path.id == call.me.user_id and fields.keys() & {"username", "email"}:
        raise Forbidden("Change your own user name and address at /users/me, with the current password")
    versions = rendering.if_match(call)
    who = Editor(call.me.user_id, call.address, is_admin=True)

    async def work(tx: Transaction) -> dict[str, Any]:
        return await edits.edit_by_admin(tx, who, call.path.id, fields, versions)

    after = await call.database.write(work)
    return edited(after["version"], users.public(after))


async def list_non_admins(call: Call) -> Response:
    require_admin(call)
    found = await users.list_non_admins(call.database, offset=call.query.start, limit=call.query.limit)
    return rendering.page(call, found)


_EDIT_WORDS = (
    "`current_password` is needed, and checked, when `username` or `email` changes: else it is a 403 that names it. "
    "Where accounts are activated by mail, a new address counts when the link that is mailed to it is followed."
)
_DELETE_WORDS = (
    "Its sessions end, its jobs are cancelled, and what it says of somebody is gone. What it listed stays, with its "
    "number. The last admin stays."
)

OPERATIONS = [
    Operation(
        "GET",
        "/auth/me",
        me,
        "Who am I",
        "accounts",
        {200: credentials.User},
        signed_in=True,
        if_none_match=True,
        answer_headers=("ETag",),
    ),
    Operation(
        "GET",
        "/users/me",
        me,
        "Get my account (the same as /auth/me)",
        "accounts",
        {200: credentials.User},
        signed_in=True,
        if_none_match=True,
        answer_headers=("ETag",),
    ),
    Operation(
        "PUT",
        "/users/me",
        edit_me,
        "Replace my account",
        "accounts",
        {200: credentials.User},
        description=_EDIT_WORDS,
        body=TypeAdapter(profiles.OwnAccountBody),
        signed_in=True,
        if_match=True,
        errors=(403, 409, 412, 429),
        answer_headers=("ETag",),
    ),
    Operation(
        "PATCH",
        "/users/me",
        edit_me,
        "Change my account",
        "accounts",
        {200: credentials.User},
        description=_EDIT_WORDS,
        body=TypeAdapter(profiles.OwnAccountPatch),
        signed_in=True,
        if_match=True,
        errors=(403, 409, 412, 429),
        answer_headers=("ETag",),
    ),
    Operation(
        "DELETE",
        "/users/me",
        delete_me,
        "Delete my account",
        "accounts",
        {204: None},
        description=_DELETE_WORDS,
        signed_in=True,
        if_match=True,
        errors=(409, 412),
    ),
    Operation(
        "GET",
        "/users",
        list_users,
        "List users",
        "accounts",
        {200: list[credentials.User | profiles.OtherUser]},
        description="Admins see whole accounts. Others see the active ones, as id, user name and name, and filter, "
        "sort and search by these.",
        query_model=queries.ListQuery,
        filters=USER_FIELDS,
        signed_in=True,
        errors=(403,),
        answer_headers=LIST_HEADERS,
    ),
    Operation(
        "GET",
        "/users/nonAdmin",
        list_non_admins,
        "List the users that are not admins (admins only)",
        "accounts",
        {200: list[credentials.User]},
        query_model=queries.PageQuery,
        signed_in=True,
        errors=(403,),
        answer_headers=LIST_HEADERS,
    ),
    Operation(
        "GET",
        "/users/{id}",
        get_user,
        "Get a user",
        "accounts",
        {200: credentials.User | profiles.OtherUser},
        description="Admins see the whole account, others the id, the user name and the name of an active one.",
        path_model=queries.ById,
        signed_in=True,
        if_none_match=True,
        errors=(404,),
        answer_headers=("ETag",),
    ),
    Operation(
        "PUT",
        "/users/{id}",
        edit,
        "Replace an account (admins only)",
        "accounts",
        {200: credentials.User},
        path_model=queries.ById,
        body=TypeAdapter(profiles.AccountBody),
        signed_in=True,
        if_match=True,
        errors=(403, 404, 409, 412),
        answer_headers=("ETag",),
    ),
    Operation(
        "PATCH",
        "/users/{id}",
        edit,
        "Change an account (admins only)",
        "accounts",
        {200: credentials.User},
        path_model=queries.ById,
        body=TypeAdapter(profiles.AccountPatch),
        signed_in=True,
        if_match=True,
        errors=(403, 404, 409, 412),
        answer_headers=("ETag",),
    ),
    Operation(
        "DELETE",
        "/users/{id}",
        delete,
        "Delete an account (one's own, admins any)",
        "accounts",
        {204: None},
        description=_DELETE_WORDS,
        path_model=queries.ById,
        signed_in=True,
        if_match=True,
        errors=(403, 404, 409, 412),
    ),
]
