"""Creation of the first admin account from the settings FIRST_ADMIN_*."""

from __future__ import annotations

import asyncio

import structlog
from pydantic import ValidationError

from core.errors import Conflict, SettingsError, words_of
from core.password_rules import check_password
from core.settings import Settings
from repository.accounts import users
from repository.engine.database import Database
from resources.accounts import credentials
from services.passwords import hasher_for

log = structlog.get_logger("first-admin")


async def create_first_admin(database: Database, settings: Settings) -> None:
    """Create the first admin if no admin exists. Raises SettingsError.

    The last admin cannot be removed, so this function never replaces an admin who was deleted on purpose.
    """
    if settings.first_admin_password is None:
        return
    password = settings.first_admin_password.get_secret_value()
    logins = {"username": settings.first_admin_username, "email": settings.first_admin_email}
    names = {"first_name": settings.first_admin_first_name, "last_name": settings.first_admin_last_name}
    given = {name: value for name, value in (logins | names).items() if value}
    try:
        body = credentials.RegisterBody.model_validate({**given, "password": password})
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        name = f"FIRST_ADMIN_{first['loc'][0]}".upper() if first["loc"] else "FIRST_ADMIN_USERNAME"
        words = words_of(first)
        raise SettingsError(f"{name}: {words[:1].lower()}{words[1:]}.") from None
    fields = body.model_dump(exclude_unset=True, exclude={"password"})
    shown = {name: value for name, value in fields.items() if name in logins}
    if await users.has_admin(database):
        return
    needs_mix = settings.needs_password_mix
    for problem in check_password(password, username=logins["username"], email=logins["email"], needs_mix=needs_mix):
        raise SettingsError(f"FIRST_ADMIN_PASSWORD: {problem.msg[:1].lower()}{problem.msg[1:]}.")
    password_hash = await asyncio.to_thread(hasher_for(settings).hash, password)
    try:
        await database.write(lambda tx: users.create_admin(tx, fields, password_hash))
        log.info("first admin created", **shown)
    except Conflict:
        # Another worker has created the admin, or another account has the user name or the email.
        if not await users.has_admin(database):
            log.warning("first admin not created; user name or email taken", **shown)
