"""Commands about accounts."""

from __future__ import annotations

import click
from pydantic import TypeAdapter

from commands.database import configured, with_database
from core.errors import InvalidInput
from core.password_rules import check_password
from repository.accounts import users
from repository.engine.database import Database
from repository.engine.transaction import Transaction
from resources.accounts import credentials
from services.passwords import hasher_for


@click.command("create-admin")
@click.option("--username", help="3 to 50 characters")
@click.option("--email")
@click.option("--password", prompt=True, hide_input=True, confirmation_prompt=True, help="8 to 128 characters")
def create_admin(username: str | None, email: str | None, password: str) -> None:
    """Create an account in the group admin."""
    given = {"username": username, "email": email, "password": password}
    body = TypeAdapter(credentials.RegisterBody).validate_python({k: v for k, v in given.items() if v is not None})
    fields = body.model_dump(exclude_unset=True, exclude={"password"})
    settings = configured()
    needs_mix = settings.needs_password_mix
    if problems := check_password(password, username=username, email=email, needs_mix=needs_mix):
        raise InvalidInput(problems)
    password_hash = hasher_for(settings).hash(password)

    async def work(database: Database) -> None:
        async def store(tx: Transaction) -> dict[str, object]:
            return await users.create_admin(tx, fields, password_hash)

        user = await database.write(store)
        click.echo(f"Created admin {user['username'] or user['email']} with id {user['id']}.")

    with_database(settings, work)
