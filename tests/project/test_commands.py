"""`--help` lists the commands without importing them, and `cli.py` can serve with several workers."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import click

from commands.cli import COMMANDS, cli
from tests.support.backends import SQLITE_ONLY
from tests.support.documents import ROOT
from tests.support.service import Service

SHOW_HELP = """
import runpy, sys
sys.argv = ["marquee", "--help"]
try:
    runpy.run_path("cli.py", run_name="__main__")
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


def test_the_index_for_searches_is_rebuilt(tmp_path: Path) -> None:
    settings = {"DATABASE_URL": f"sqlite:///{tmp_path}/marquee.db", "PATH": ""}
    command = [sys.executable, str(ROOT / "cli.py"), "search", "rebuild"]
    done = subprocess.run(command, cwd=tmp_path, env=settings, capture_output=True, text=True, check=True)
    assert "Indexed 0 movies.\n" in done.stdout
    assert "Indexed 249 countries.\n" in done.stdout


@SQLITE_ONLY
def test_several_workers_serve_through_the_command(new_service: Callable[..., Service]) -> None:
    """Workers import the program's main module again; this must not run the command line a second time."""
    service = new_service(WORKERS="2")
    service.command = (str(ROOT / "cli.py"), "serve")
    with service.running():
        assert "Marquee is running" in service.log()
