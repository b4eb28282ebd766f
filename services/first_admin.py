"""The account that an installation begins with, as the settings name it."""

from __future__ import annotations

import asyncio

import structlog
from pydantic import ValidationError

from core.errors import Conflict, SettingsError, words_of
from core.password_rules import check_password
from core.settings import Settings
from repository.accounts import users
from repository.engine.database import Database
from repository.engine.transaction import Transaction
from resources.accounts import credentials
from services.passwords import hasher_for

log = structlog.get_logger("first-admin")


async def create_first_admin(database: Database, settings: Settings) -> None:
    """Only while there is no admin: the last one cannot be removed, so an installation that had one has one, whatever
    became of the first. Raises SettingsError.
    """
    if settings.first_admin_password is None:
        return
    password = settings.first_admin_password.get_secret_value()
    fields = {"username": settings.first_admin_username, "email": settings.first_admin_email}
    given = {name: value for name, value in fields.items() if value}
    try:
        body = credentials.RegisterBody.model_validate({**given, "password": password})
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        name = f"FIRST_ADMIN_{first['loc'][0]}".upper() if first["loc"] else "FIRST_ADMIN_USERNAME"
        words = words_of(first)
        raise SettingsError(f"{name}: {words[:1].lower()}{words[1:]}.") from None
    named = body.model_dump(exclude_unset=True, exclude={"password"})
    if await users.has_admin(database):
        return
    problems = check_password(
        password,
        username=settings.first_admin_username,
        email=settings.first_admin_email,
        needs_mix=settings.needs_password_mix,
    )
    for problem in problems:
        raise SettingsError(f"FIRST_ADMIN_PASSWORD: {problem.msg[:1].lower()}{problem.msg[1:]}.")
    password_hash = await asyncio.to_thread(hasher_for(settings).hash, password)

    async def work(tx: Transaction) -> None:
        await users.create_admin(tx, named, password_hash)

    try:
        await database.write(work)
        log.info("first admin created", **named)
    except Conflict:
        # Another worker was first, or somebody else has the name.
        if not await users.has_admin(database):
            log.warning("there is no admin: the name or the address of the first one is somebody else's", **named)
