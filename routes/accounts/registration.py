"""Registration: POST /auth/register and POST /users."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from starlette.responses import Response

from core.errors import Conflict, FieldProblem
from repository.accounts import outbox, users
from repository.accounts.outbox import MailType
from repository.engine.transaction import Transaction
from resources.accounts.credentials import RegisterBody, User
from routes.http import rendering
from routes.http.limit_groups import LimitGroup
from routes.http.operation import Call, Details, Operations, Services

# A concurrent registration may take the address first. The second attempt then stores no unique key for the address, so
# it cannot conflict over the address again.
ATTEMPTS = 2

operations = Operations("accounts")


def problems(services: Services, body: Any, valid: Any) -> Sequence[FieldProblem]:
    """Return the problems that the registration model cannot find: those of the password, and a missing address."""
    found = list(password_problems(services, body, valid))
    if services.activates_by_mail and isinstance(body, dict) and "email" not in body:
        message = "Expected an email address, to which the activation URL is sent"
        found.append(FieldProblem(("body", "email"), message, "missing"))
    return found


def password_problems(services: Services, body: Any, valid: Any) -> Sequence[FieldProblem]:
    """Return the problems of a new account's password. Some rules depend on the names in the same body."""
    if not isinstance(body, dict):
        return ()
    username, email = (each if isinstance(each := body.get(name), str) else None for name in ("username", "email"))
    return [
        problem
        for field in ("password", "hashedPassword")
        if isinstance(password := body.get(field), str)
        for problem in services.passwords.problems(password, username=username, email=email, field=field)
    ]


REGISTER = Details(
    description="Where accounts are activated by email (`ACCOUNT_ACTIVATION=email`), `email` is required, and the user "
    "cannot sign in before the account is activated with the token that is sent to this address. If another account "
    "has the address, the response is the same, and the owner of that account receives a notice instead.",
    check=problems,
    errors=(409,),
    limit_group=LimitGroup.REGISTER,
)


@operations.post("/auth/register", "Register", {201: User}, REGISTER)
@operations.post("/users", "Register (the same as /auth/register)", {201: User}, REGISTER)
async def register(call: Call[None, None, RegisterBody]) -> Response:
    fields = call.body.model_dump(exclude_unset=True)
    password = fields.pop("password", None) or fields.pop("hashedPassword")
    fields.pop("hashedPassword", None)
    # Hash before the transaction: hashing takes tens of milliseconds, and only one transaction at a time can write to
    # the log.
    password_hash = await call.services.passwords.hash(password)
    awaits_activation = call.services.activates_by_mail

    async def work(tx: Transaction) -> dict[str, Any]:
        user = await users.create(tx, fields, password_hash, awaits_activation=awaits_activation)
        if awaits_activation:
            await outbox.put(tx, user["id"], MailType.ACTIVATE, user["email"])
        return user

    for attempts_left in reversed(range(ATTEMPTS)):
        try:
            user = await call.write(work)
            break
        except Conflict:
            # A concurrent registration may have taken the address. The response must not reveal this, so try again.
            if not awaits_activation or not attempts_left:
                raise
    if awaits_activation:
        call.services.outbox.wake()
    return rendering.JSONResponse(user, 201)
