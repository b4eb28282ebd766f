"""Operations on accounts for their owners, for other users and for admins."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import orjson
from starlette.responses import Response

from core.errors import Forbidden, TooManyRequests
from core.network.addresses import network_of
from core.rates import Rate
from repository.accounts import deletion, edits, users
from repository.engine.transaction import Transaction
from repository.generic.lists import ListRequest
from resources.accounts import profiles
from resources.accounts.credentials import User
from resources.accounts.fields import OTHER_USER_FIELDS, USER_FIELDS
from resources.accounts.profiles import (
    AccountChange,
    AccountReplacement,
    OtherUser,
    OwnAccountChange,
    OwnAccountReplacement,
)
from routes.accounts import avatar_files
from routes.accounts.access import (
    account,
    account_id,
    as_admin,
    as_editor,
    is_admin,
    knows_password,
    own_account,
    wrong_password,
)
from routes.http import queries, rendering
from routes.http.operation import AnyCall, Call, Details, Operations, members_of
from routes.http.queries import ById, ListQuery

ADDRESS_RATE = Rate(5, 24 * 60 * 60)  # how often the owner of an account may change its email address
ME = Details(signed_in=True, if_none_match=True, members=members_of(User))
EDIT = Details(signed_in=True, if_match=True, answer_headers=("ETag",))
EDIT_ANY = Details(errors=(403, 404, 409), **EDIT)
EDIT_OWN = Details(
    description="Changing `username` or `email` requires `current_password` (alias `password`); if the password is "
    "missing or wrong, the response is a 403 that names the field. Where accounts are activated by email, a new "
    "address takes effect when the token that is emailed to that address is sent to `POST /auth/activate`.",
    errors=(403, 409),
    **EDIT,
)
DELETE = Details(
    description="Ends the user's sessions, cancels the user's jobs and erases personal data. Movies and characters "
    "stay and keep their `user_id`. The last admin cannot be deleted.",
    signed_in=True,
    if_match=True,
)

operations = Operations("accounts")


# --- the caller's own account


@operations.get("/auth/me", "Get my account", {200: User}, ME)
@operations.get("/users/me", "Get my account (the same as /auth/me)", {200: User}, ME)
async def me(call: Call[None, None, None]) -> Response:
    user = await own_account(call)
    return rendering.entity(call, user["version"], orjson.dumps(rendering.selected(call, users.public(user))))


@operations.put("/users/me", "Replace my account", {200: User}, EDIT_OWN, body=OwnAccountReplacement)
@operations.patch("/users/me", "Change my account", {200: User}, EDIT_OWN, body=OwnAccountChange)
async def edit_me(call: Call[None, None, OwnAccountReplacement | OwnAccountChange]) -> Response:
    fields = profiles.dumped(call.body)
    versions = rendering.if_match(call)
    proven = await _prove(call)
    if proven is not None:
        await _count_address(call, proven, fields)

    async def work(tx: Transaction) -> dict[str, Any]:
        return await edits.edit_own(
            tx,
            call.me.user_id,
            fields,
            versions,
            proven_hash=proven["password_hash"] if proven is not None else None,
            proves_addresses=call.services.activates_by_mail,
        )

    after = await call.write(work)
    return rendering.tagged(after["version"], orjson.dumps(users.public(after)))


async def _prove(call: Call[None, None, OwnAccountReplacement | OwnAccountChange]) -> Mapping[str, Any] | None:
    """Return the caller's account if its current password was sent, or None if no password was sent.

    Raises Forbidden if the password is wrong.
    """
    name = next((name for name in profiles.PROOFS if name in call.body.model_fields_set), None)
    if name is None:
        return None
    user = await users.find(call.database, call.me.user_id)
    if not await knows_password(call, user, str(getattr(call.body, name))):
        raise Forbidden([wrong_password(name)])
    return user


async def _count_address(call: AnyCall, before: Mapping[str, Any], fields: Mapping[str, Any]) -> None:
    """Count a change of address: each change sends an email, perhaps to a stranger. Raises TooManyRequests."""
    if fields.get("email", before["email"]) != before["email"]:
        services = call.services
        network = network_of(call.address or "")
        shared = Rate(ADDRESS_RATE.amount * services.users_per_address, ADDRESS_RATE.seconds)
        for key, rate in ((f"address of {call.me.user_id}", ADDRESS_RATE), (f"addresses from {network}", shared)):
            outcome = await services.limits.hit(key, rate)
            if not outcome.is_allowed:
                raise TooManyRequests("The address was changed too often; try again later", outcome.reset_seconds)


@operations.delete("/users/me", "Delete my account", like=DELETE, errors=(409,))
@operations.delete("/users/{id}", "Delete an account (owner and admins only)", like=DELETE, errors=(403, 404, 409))
async def delete(call: Call[ById | None, None, None]) -> Response:
    user_id = account_id(call)
    editor = as_editor(call, user_id)
    versions = rendering.if_match(call)
    avatar = await call.write(lambda tx: deletion.remove(tx, editor, user_id, versions))
    await deletion.erase_rest(call.database, user_id)
    await avatar_files.discard(call.services, avatar)
    return Response(status_code=204)


# --- all accounts


@operations.listing(
    "/users",
    "List users",
    list[User | OtherUser],
    users.ORDERING,
    description="Admins see whole accounts. Other users see the id, user name and name of active accounts, and can "
    "filter, sort and search only by these fields.",
    filters=USER_FIELDS,
    signed_in=True,
    errors=(403,),
)
async def list_users(call: Call[None, ListQuery, None]) -> Response:
    request = queries.list_request(call, USER_FIELDS)
    if not is_admin(call):
        _require_fields_of_others(request)
    return rendering.page(call, await users.page_of(call.database, request, sees_everything=is_admin(call)))


def _require_fields_of_others(request: ListRequest) -> None:
    """Raise Forbidden if the request selects, filters by or sorts by a field that only admins see.

    Otherwise the result would reveal something about the field.
    """
    _require_members_of_others(request.columns)
    conditions = [condition for group in request.filter.groups for condition in group]
    asked = {condition.field.name for condition in conditions} | {name for name, _ in request.sort}
    if foreign := sorted(asked - OTHER_USER_FIELDS.keys()):
        raise Forbidden(f"Only admins can filter and sort by {', '.join(foreign)}")


def _require_members_of_others(fields: tuple[str, ...] | None) -> None:
    """Raise Forbidden if `fields` names a member that only admins see."""
    if foreign := [name for name in fields or () if name not in OtherUser.model_fields]:
        raise Forbidden(f"Only admins can see {', '.join(foreign)}")


@operations.listing(
    "/users/nonAdmin",
    "List the users who are not admins (admins only)",
    list[User],
    users.ORDERING,
    filters=USER_FIELDS,
    signed_in=True,
    errors=(403,),
)
async def list_non_admins(call: Call[None, ListQuery, None]) -> Response:
    as_admin(call)
    request = queries.list_request(call, USER_FIELDS)
    found = await users.page_of(call.database, request, sees_everything=True, has_admins=False)
    return rendering.page(call, found)


@operations.get(
    "/users/{id}",
    "Get a user",
    {200: User | OtherUser},
    description="Admins see the whole account. Other users see the id, user name and name of an active account.",
    members=members_of(User),
    signed_in=True,
    if_none_match=True,
    errors=(403, 404),
)
async def get_user(call: Call[ById, None, None]) -> Response:
    if not is_admin(call):
        _require_members_of_others(call.fields)
    user = await account(call.database, call.path.id)
    if is_admin(call):
        return rendering.entity(call, user["version"], orjson.dumps(rendering.selected(call, users.public(user))))
    if not user["is_active"]:
        raise users.not_found(call.path.id)
    # The version would reveal how often the hidden fields change, so the entity tag for other users omits it.
    return rendering.entity(call, 0, orjson.dumps(rendering.selected(call, users.in_brief(user))))


@operations.put("/users/{id}", "Replace an account (admins only)", {200: User}, EDIT_ANY, body=AccountReplacement)
@operations.patch("/users/{id}", "Change an account (admins only)", {200: User}, EDIT_ANY, body=AccountChange)
async def edit(call: Call[ById, None, AccountReplacement | AccountChange]) -> Response:
    editor = as_admin(call)
    fields = profiles.dumped(call.body)
    versions = rendering.if_match(call)
    after = await call.write(lambda tx: edits.edit_by_admin(tx, editor, call.path.id, fields, versions))
    return rendering.tagged(after["version"], orjson.dumps(users.public(after)))
