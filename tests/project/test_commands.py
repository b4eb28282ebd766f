"""The list of commands, which is shown without importing any."""

from __future__ import annotations

import subprocess
import sys

import click

from commands.main import COMMANDS, cli
from tests.support.documents import ROOT

SHOW_HELP = """
import sys
sys.argv = ["marquee", "--help"]
try:
    import cli
finally:
    print(*sys.modules, file=sys.stderr)
"""


def test_the_list_says_of_each_command_what_its_docstring_says() -> None:
    for name, place in COMMANDS.items():
        command = cli.get_command(click.Context(cli), name)
        assert command is not None
        assert command.name == name
        assert (command.help or "").splitlines()[0] == place.summary


def test_the_list_of_commands_does_not_import_the_product() -> None:
    done = subprocess.run([sys.executable, "-c", SHOW_HELP], cwd=ROOT, capture_output=True, text=True, check=True)
    assert all(f"  {name} " in done.stdout for name in COMMANDS)
    assert not {"main", "starlette", "sqlalchemy"} & set(done.stderr.split())
