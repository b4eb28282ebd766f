"""The command that runs a JavaScript program in the installed version of Node, with a global `WebSocket`."""

from __future__ import annotations

import functools
import shutil
import subprocess
from pathlib import Path

import pytest

PRELOAD = Path(__file__).resolve().parent.parent.parent / "clients" / "javascript" / "websocket_of_ws.cjs"


@functools.cache
def node_command() -> tuple[str, ...]:
    """Return the command, or skip the test. Node 22 has `WebSocket`, 20 needs a flag, and 18 needs the package ws."""
    if shutil.which("node") is None:
        pytest.skip("node is not installed")
    for options in ((), ("--experimental-websocket",), ("--require", str(PRELOAD))):
        check = ["node", *options, "--eval", "process.exit(typeof WebSocket === 'function' ? 0 : 1)"]
        if subprocess.run(check, capture_output=True, check=False).returncode == 0:
            return ("node", *options)
    pytest.skip("this node has no WebSocket, and the package ws (Debian: node-ws) is not installed")
