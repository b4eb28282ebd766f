"""Registering."""

from __future__ import annotations

from pydantic import TypeAdapter
from starlette.responses import Response

import account_schemas
from repository import users
from repository.transaction import Transaction
from routes import rendering
from routes.operation import Call, Operation


async def register(call: Call) -> Response:
    fields = call.body.model_dump(exclude_unset=True)
    password = fields.pop("password", None) or fields.pop("hashedPassword")
    fields.pop("hashedPassword", None)
    # Before the transaction: hashing takes tens of milliseconds, and the log has one writer at a time.
    password_hash = await call.services.passwords.hash(password)

    async def work(tx: Transaction) -> dict[str, object]:
        return await users.create(tx, fields, password_hash)

    return rendering.JSONResponse(await call.database.write(work), 201)


OPERATIONS = [
    Operation(
        "POST",
        "/auth/register",
        register,
        "Register",
        "accounts",
        {201: account_schemas.User},
        body=TypeAdapter(account_schemas.RegisterBody),
        errors=(409, 429),
    ),
    Operation(
        "POST",
        "/users",
        register,
        "Register (the same as /auth/register)",
        "accounts",
        {201: account_schemas.User},
        body=TypeAdapter(account_schemas.RegisterBody),
        errors=(409, 429),
    ),
]
