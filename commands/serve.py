"""`marquee serve`."""

from __future__ import annotations

import sys

import click

import main


@click.command()
def serve() -> None:
    """Serve, as `python main.py` does."""
    sys.exit(main.run())
