"""Clean up after a test run, however the run ends: even after SIGKILL, when the run cannot clean up by itself.

Each test process (`pytest` itself and each of its workers) has a reaper: a separate process that waits for the end of
the test process, kills the processes that it left running, and removes its folders under /tmp. A process that was left
running is recognised by an environment variable, which every descendant inherits, or by a working directory in one of
the folders, because some servers overwrite their environment with their title.
"""

from __future__ import annotations

import os
import secrets
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

VARIABLE = "MARQUEE_TEST_PROCESSES"  # the tokens of this process and of its parent test processes
TMP = Path("/tmp")  # do not use $TMPDIR: other users must have access, and the paths of Unix sockets must be short
KILL_SECONDS = 10.0
PAUSE_SECONDS = 0.05

TOKEN = secrets.token_hex(4)


def start() -> None:
    """Start the reaper of this process; do nothing if the process already has one or the system is not Linux."""
    tokens = os.environ.get(VARIABLE, "").split()
    if TOKEN in tokens or sys.platform != "linux":
        return
    os.environ[VARIABLE] = " ".join([*tokens, TOKEN])
    # Remove the variable, because the reapers of parent processes must not kill this reaper before its work is done.
    environment = {name: value for name, value in os.environ.items() if name != VARIABLE}
    subprocess.Popen(
        [sys.executable, "-I", "-S", str(Path(__file__)), str(os.getpid()), TOKEN],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd="/",
        start_new_session=True,  # signals to the process group, such as Ctrl-C, do not reach the reaper
    ).returncode = 0  # nothing waits for the reaper, and Popen must not warn about that


def folder_prefix(label: str) -> str:
    """Return the prefix, for `tempfile.mkdtemp`, that all of this process's folders in TMP must have."""
    return f"marquee-{TOKEN}-{label}-"


def release_shared_memory(postgres_folder: Path) -> None:
    """Remove the System V segment that a killed PostgreSQL leaves behind; its pid file names the segment."""
    with suppress(OSError, IndexError):
        segment = (postgres_folder / "postmaster.pid").read_text(errors="replace").splitlines()[6].split()[1]
        if ipcrm := shutil.which("ipcrm", path=os.defpath):
            subprocess.run([ipcrm, "-m", segment], capture_output=True, check=False, timeout=KILL_SECONDS)


# --- in the reaper's process


def wait_for_end_of(pid: int) -> None:
    with suppress(ProcessLookupError):
        process = os.pidfd_open(pid)
        # If the parent ended before `pidfd_open`, its pid may already belong to another process.
        if os.getppid() == pid:
            select.select([process], [], [])


def left_by(token: str, folders: list[Path]) -> Iterator[int]:
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            variables = (entry / "environ").read_bytes().split(b"\0")
            owners = next((each for each in variables if each.startswith(f"{VARIABLE}=".encode())), b"")
            works_in = (entry / "cwd").readlink()
            if token.encode() in owners or any(works_in.is_relative_to(folder) for folder in folders):
                yield int(entry.name)


def reap(token: str) -> None:
    deadline = time.monotonic() + KILL_SECONDS
    while True:
        folders = list(TMP.glob(f"marquee-{token}-*"))
        pids = list(left_by(token, folders))
        for pid in pids:
            with suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        if not pids or time.monotonic() > deadline:
            break
        time.sleep(PAUSE_SECONDS)
    for folder in folders:
        release_shared_memory(folder / "data")
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    wait_for_end_of(int(sys.argv[1]))
    reap(sys.argv[2])
