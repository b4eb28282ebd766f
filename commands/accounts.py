"""Commands for accounts."""

from __future__ import annotations

import click
from pydantic import TypeAdapter

from commands.database import configured, with_database
from core.errors import InvalidInput
from core.password_rules import check_password
from repository.accounts import users
from resources.accounts import credentials
from services.passwords import hasher_for


@click.command("create-admin")
@click.option("--username", help="3 to 50 characters")
@click.option("--email")
@click.option("--password", prompt=True, hide_input=True, confirmation_prompt=True, help="8 to 128 characters")
@click.option("--first-name", help="at most 100 characters")
@click.option("--last-name", help="at most 100 characters")
def create_admin(
    username: str | None, email: str | None, password: str, first_name: str | None, last_name: str | None
) -> None:
    """Create an admin account."""
    names = {"first_name": first_name, "last_name": last_name}
    given = {"username": username, "email": email, "password": password, **names}
    body = TypeAdapter(credentials.RegisterBody).validate_python({k: v for k, v in given.items() if v is not None})
    fields = body.model_dump(exclude_unset=True, exclude={"password"})
    settings = configured()
    if problems := check_password(password, username=username, email=email, needs_mix=settings.needs_password_mix):
        raise InvalidInput(problems)
    password_hash = hasher_for(settings).hash(password)
    user = with_database(
        settings, lambda database: database.write(lambda tx: users.create_admin(tx, fields, password_hash))
    )
    click.echo(f"Created admin {user['username'] or user['email']} with id {user['id']}.")
