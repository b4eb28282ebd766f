"""The command `marquee`: its subcommands, and how it reports errors.

The subcommands are in the other files of this folder. Each file is imported only when its subcommand runs, so that
`marquee --help` does not load the whole product.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass

import click
from pydantic import ValidationError

from core.errors import InvalidInput, MarqueeError, Problem, words_of


@dataclass(frozen=True)
class Place:
    """The function of a command, and a summary that repeats the first line of the function's docstring."""

    module: str
    name: str
    summary: str


COMMANDS: Mapping[str, Place] = {
    "serve": Place("commands.serve", "serve", "Run the service, as `python main.py` does."),
    "migrate": Place("commands.database", "migrate", "Migrate the database to the newest schema."),
    "create-admin": Place("commands.accounts", "create_admin", "Create an admin account."),
    "seed": Place("commands.seed", "seed", "Add a small catalog of real films."),
    "search": Place("commands.search", "search", "Maintain the index for searches."),
    "new-epoch": Place("commands.database", "new_epoch", "Give the event log a new identity."),
}


class Commands(click.Group):
    """Imports the module of a command only when the command runs. Listing the commands imports no module."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if (place := COMMANDS.get(cmd_name)) is None:
            return None
        command: click.Command = getattr(importlib.import_module(place.module), place.name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, place.summary) for name, place in COMMANDS.items()])


@click.command(cls=Commands)
def cli() -> None:
    """Marquee: a real-time, websocket-first catalog service."""


def run() -> None:
    """Run the command line. Exit with 2 for invalid arguments or settings, 130 after Ctrl-C, and 1 for other errors."""
    try:
        cli(standalone_mode=False)
    except click.exceptions.Abort:
        sys.exit(130)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except ValidationError as error:
        for each in error.errors(include_url=False, include_input=False):
            where = ".".join(str(part) for part in each["loc"])
            click.echo(f"Error: {where + ': ' if where else ''}{words_of(each)}", err=True)
        sys.exit(2)
    except Problem as error:
        detail = error.detail if isinstance(error.detail, str) else "; ".join(each["msg"] for each in error.detail)
        click.echo(f"Error: {detail}", err=True)
        sys.exit(2 if isinstance(error, InvalidInput) else 1)
    except MarqueeError as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(2)
