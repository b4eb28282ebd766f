"""Run a program to its end."""

from __future__ import annotations

import asyncio
import subprocess
from pathlib import Path
from typing import Any


async def output_of(*command: str | Path, seconds: float = 60.0, **options: Any) -> str:
    """Run a program and return its output. Assert that it ends in time and with status 0."""
    process = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)
    try:
        async with asyncio.timeout(seconds):
            output, errors = (part.decode() for part in await process.communicate())
    finally:
        if process.returncode is None:
            process.kill()
    assert process.returncode == 0, output[-20_000:] + errors[-4_000:]
    return output
