"""Registering."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import TypeAdapter
from starlette.responses import Response

from core.errors import FieldProblem
from repository.accounts import outbox, users
from repository.accounts.outbox import MailType
from repository.engine.transaction import Transaction
from resources.accounts import credentials
from routes.http import rendering
from routes.http.limit_groups import LimitGroup
from routes.http.operation import Call, Operation, Services


async def register(call: Call) -> Response:
    fields = call.body.model_dump(exclude_unset=True)
    password = fields.pop("password", None) or fields.pop("hashedPassword")
    fields.pop("hashedPassword", None)
    # Before the transaction: hashing takes tens of milliseconds, and the log has one writer at a time.
    password_hash = await call.services.passwords.hash(password)

    awaits_activation = call.services.activates_by_mail

    async def work(tx: Transaction) -> dict[str, Any]:
        user = await users.create(tx, fields, password_hash, awaits_activation=awaits_activation)
        if awaits_activation:
            await outbox.put(tx, user["id"], MailType.ACTIVATE, user["email"])
        return user

    user = await call.database.write(work)
    if awaits_activation:
        call.services.outbox.wake()
    return rendering.JSONResponse(user, 201)


def problems(services: Services, body: Any, valid: Any) -> Sequence[FieldProblem]:
    """What is wrong with a registration beyond the form of its fields."""
    found = list(password_problems(services, body, valid))
    if services.activates_by_mail and isinstance(body, dict) and "email" not in body:
        message = "Expected an address: the link that activates the account is mailed to it"
        found.append(FieldProblem(("body", "email"), message, "missing"))
    return found


def password_problems(services: Services, body: Any, valid: Any) -> Sequence[FieldProblem]:
    """Every rule that the password in the body of a registration breaks; the names are in the body, too."""
    if not isinstance(body, dict):
        return ()
    username, email = (each if isinstance(each := body.get(name), str) else None for name in ("username", "email"))
    return [
        problem
        for field in ("password", "hashedPassword")
        if isinstance(password := body.get(field), str)
        for problem in services.passwords.problems(password, username=username, email=email, field=field)
    ]


ABOUT_ACTIVATION = (
    "Where accounts are activated by mail (`ACCOUNT_ACTIVATION=email`) the address is needed, and nobody signs in"
    " before the link that is mailed to it was followed."
)

OPERATIONS = [
    Operation(
        "POST",
        "/auth/register",
        register,
        "Register",
        "accounts",
        {201: credentials.User},
        description=ABOUT_ACTIVATION,
        body=TypeAdapter(credentials.RegisterBody),
        check=problems,
        errors=(409, 429),
        limit_group=LimitGroup.REGISTER,
    ),
    Operation(
        "POST",
        "/users",
        register,
        "Register (the same as /auth/register)",
        "accounts",
        {201: credentials.User},
        description=ABOUT_ACTIVATION,
        body=TypeAdapter(credentials.RegisterBody),
        check=problems,
        errors=(409, 429),
        limit_group=LimitGroup.REGISTER,
    ),
]
