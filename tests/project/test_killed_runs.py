"""A test run leaves no process and no folder behind, whatever ends the run."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.support.documents import ROOT
from tests.support.service import eventually

VARIABLE = "MARQUEE_KILLED_RUN"
SECONDS_TO_VANISH = 60.0  # time to clean up, including a clean stop of every server after Ctrl-C

# A pytest that was started as a background job may ignore SIGINT. The inner run must not inherit that.
PYTEST = """
import runpy, signal
signal.signal(signal.SIGINT, signal.default_int_handler)
runpy.run_module("pytest", run_name="__main__")
"""
SCENE = """
import json, os, pathlib, time
from tests.support import reaper
from tests.support.service import Service

def test_that_is_killed(own_postgres, own_redis, tmp_path):
    service = Service(own_postgres.create_database(), own_redis.url, tmp_path).start()
    pids = [os.getpid(), own_postgres.pid, own_redis.pid, service.process.pid]
    ready = pathlib.Path(os.environ["MARQUEE_KILLED_RUN_READY"])
    ready.with_suffix(".part").write_text(json.dumps({"pids": pids, "token": reaper.TOKEN}))
    ready.with_suffix(".part").rename(ready)
    while True:
        time.sleep(60)  # wait to be killed
"""


def left(mark: str, token: str, pids: list[int]) -> list[str]:
    """Return what remains of the run: its processes, its reapers, and its folders."""
    found = [str(folder) for folder in Path("/tmp").glob(f"marquee-{token}-*")]
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            environment = (entry / "environ").read_bytes()
            # A zombie has neither a command line nor an environment.
            if command and (mark.encode() in environment or token in command or int(entry.name) in pids):
                found.append(f"{entry.name}: {command}")
    return found


@pytest.mark.slow
@pytest.mark.parametrize("way", ["the run is killed", "its worker is killed", "Ctrl-C"])
async def test_nothing_is_left_of_a_run(way: str, tmp_path: Path) -> None:
    mark = f"{VARIABLE}={secrets.token_hex(8)}"
    ready = tmp_path / "ready"
    (tmp_path / "test_scene.py").write_text(SCENE)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {VARIABLE: mark.partition("=")[2], f"{VARIABLE}_READY": str(ready), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", PYTEST, "-p", "tests.conftest", "-c", str(ROOT / "pyproject.toml")]
    command += ["-p", "no:cacheprovider", "--basetemp", str(tmp_path / "base"), "-n", "1", "--max-worker-restart=0"]
    with (tmp_path / "log").open("wb") as log:
        run = subprocess.Popen(  # noqa: ASYNC220 (the process may outlive the loop)
            [*command, str(tmp_path / "test_scene.py")],
            env=environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        seen: dict[str, Any] = await eventually(
            lambda: json.loads(ready.read_text()) if ready.exists() or run.poll() is not None else None,
            "everything runs",
            60,
        )
        worker, *servers = seen["pids"]
        assert len(left(mark, seen["token"], seen["pids"])) > len(servers)
        if way == "the run is killed":
            run.kill()
        elif way == "its worker is killed":
            os.kill(worker, signal.SIGKILL)
        else:
            os.killpg(run.pid, signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            await asyncio.to_thread(run.wait, SECONDS_TO_VANISH)
        with suppress(AssertionError):
            await eventually(lambda: not left(mark, seen["token"], seen["pids"]), "nothing is left", SECONDS_TO_VANISH)
        assert left(mark, seen["token"], seen["pids"]) == []
    finally:
        with suppress(ProcessLookupError):
            os.killpg(run.pid, signal.SIGKILL)
        run.wait()
