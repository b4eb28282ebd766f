"""Rolling restarts under load: `run` repeatedly sends SIGHUP to the supervisor of several workers.

The watchers and the judge are those of the chaos run.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from tests.chaos.judge import Wish, broken_promises, differences, read_log
from tests.chaos.watchers import Manner, Texts, Watcher
from tests.chaos.writers import GENRES, Progress, Writer, jobs_end, plan, sign_up
from tests.support.service import Service, eventually

LONGEST_SILENCE_SECONDS = 3.0
RESTART_SECONDS = 180.0
QUIET_SECONDS = 1.0
CATCH_UP_SECONDS = 30.0
PLENTY = 5_000  # more operations per writer than it can carry out before it is stopped


@dataclass(frozen=True)
class Rolling:
    """A run of up to `times` restarts, of which only the first may begin after `seconds`."""

    seed: int
    times: int
    seconds: float
    watchers: int = 40
    writers: int = 16
    writes_per_second: float = 40.0


@dataclass
class Outcome:
    """The result: each watcher's longest pause between two events, the duration of each restart, and what was wrong."""

    problems: list[str] = field(default_factory=list)
    silences: list[float] = field(default_factory=list)
    restarts: list[float] = field(default_factory=list)
    ends: dict[str, int] = field(default_factory=dict)
    writes_per_second: float = 0.0
    events: int = 0

    def report(self) -> str:
        times = ", ".join(f"{seconds:.1f}" for seconds in self.restarts)
        return "\n".join(
            [
                f"{len(self.restarts)} rolling restarts, which took {times} s; {self.writes_per_second:.0f} writes/s",
                f"{len(self.silences)} watchers, {self.events:,} events, connections ended {self.ends}",
                f"longest silence {max(self.silences):.2f} s",
                *(self.problems[:10] or ["nothing missing, nothing repeated, nothing reordered"]),
            ]
        )


def workers_of(service: Service) -> frozenset[int]:
    """Return the pids of the supervisor's workers."""

    def is_spawned(child: str) -> bool:
        with suppress(FileNotFoundError):  # the child has already ended
            return b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()
        return False

    children = Path(f"/proc/{service.pid}/task/{service.pid}/children").read_text().split()
    # Besides the workers, `multiprocessing` starts its resource tracker as a child.
    return frozenset(int(child) for child in children if is_spawned(child))


async def run(rolling: Rolling, service: Service) -> Outcome:
    """Restart the workers of a running service under load."""
    outcome, progress, texts = Outcome(), Progress(), Texts()
    await asyncio.to_thread(service.add_genres, *GENRES)
    watchers = [
        Watcher(
            Wish() if index % 2 else Wish(("movies",)),
            Manner("plain"),
            [service.ws_url],
            random.Random(f"rolling {rolling.seed} {index}"),
            texts,
            asyncio.Event(),
        )
        for index in range(rolling.watchers)
    ]
    watching = [asyncio.create_task(watcher.run()) for watcher in watchers]
    writing: list[asyncio.Task[None]] = []
    try:
        async with httpx.AsyncClient(timeout=15.0, verify=False, limits=httpx.Limits(max_connections=None)) as http:
            tokens = [await sign_up(index, [service], http) for index in range(rolling.writers)]
            pause = rolling.writers / rolling.writes_per_second
            writers = [Writer([service], http, token, progress, pause) for token in tokens]
            await eventually(lambda: all(watcher.segments for watcher in watchers), "all watch")
            began = time.monotonic()
            enough = asyncio.Event()
            writing = [
                asyncio.create_task(writer.run(plan(rolling.seed, index, PLENTY), enough))
                for index, writer in enumerate(writers)
            ]
            while not outcome.restarts or (
                len(outcome.restarts) < rolling.times and time.monotonic() - began < rolling.seconds
            ):
                outcome.restarts.append(await _restart(service))
            outcome.silences = [watcher.longest_silence for watcher in watchers]
            outcome.writes_per_second = progress.begun / (time.monotonic() - began)
            enough.set()
            await asyncio.gather(*writing)
            await writers[0].end()
            await _judge(outcome, service, watchers, writers)
    finally:
        for task in (*watching, *writing):
            task.cancel()
        await asyncio.gather(*watching, *writing, return_exceptions=True)
    return outcome


async def _restart(service: Service) -> float:
    """Restart the workers, wait until all are new processes and ready, and return how many seconds that took."""
    before, began = workers_of(service), time.monotonic()
    os.kill(service.pid, signal.SIGHUP)

    async def done() -> bool:
        now = workers_of(service)
        return len(now) == len(before) and not now & before

    try:
        await eventually(done, "every worker is new", RESTART_SECONDS)
    except AssertionError as error:
        raise AssertionError(
            f"{error}: workers {sorted(before)} became {sorted(workers_of(service))}\n{service.log()}"
        ) from None
    async with httpx.AsyncClient(verify=False) as http:

        async def is_ready() -> bool:
            return bool((await http.get(f"{service.url}/readyz")).json()["status"] == "ready")

        await eventually(is_ready, "ready again", RESTART_SECONDS)
    return time.monotonic() - began


async def _judge(outcome: Outcome, service: Service, watchers: Sequence[Watcher], writers: Sequence[Writer]) -> None:
    async with httpx.AsyncClient(verify=False) as http:
        await jobs_end(http, service, CATCH_UP_SECONDS)
    log = await read_log(service.database_url)
    ends = [(watcher, log.expected(watcher.wish)[-1][-1]["seq"]) for watcher in watchers]
    try:
        await eventually(lambda: all(w.position >= end for w, end in ends), "all catch up", CATCH_UP_SECONDS)
    except AssertionError as error:
        outcome.problems.append(str(error))
    await asyncio.sleep(QUIET_SECONDS)
    outcome.problems += log.problems
    for index, watcher in enumerate(watchers):
        (segment,) = watcher.segments
        found = differences(log, watcher.wish, segment.start, segment.got)
        outcome.events += found.events
        outcome.problems += [f"watcher {index}: {problem}" for problem in watcher.problems]
        if found:
            outcome.problems.append(f"watcher {index}: after {segment.start}: {found}")
        for code, count in watcher.ends.items():
            outcome.ends[code] = outcome.ends.get(code, 0) + count
    for writer in writers:
        outcome.problems += broken_promises(log, writer.promised)
