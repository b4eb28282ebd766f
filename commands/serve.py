"""The command `marquee serve`."""

from __future__ import annotations

import sys

import click

import main


@click.command()
def serve() -> None:
    """Run the service, as `python main.py` does."""
    sys.exit(main.run())
