"""The chaos run: watchers and writers use several workers while workers, PostgreSQL, Redis and connections fail.

`run(chaos, …)` returns an Outcome. The seed determines everything that is random: what is written, what fails, when
(counted in writes begun) and for how long, and how each watcher behaves. The service itself has no hooks for faults.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx

from tests.chaos.faults import Chaos, Fault, Stage, schedule
from tests.chaos.judge import CATALOG, Log, Row, Wish, broken_promises, differences, read_log
from tests.chaos.views import wrong_interval, wrong_snapshot
from tests.chaos.watchers import Manner, Segment, Texts, Watcher
from tests.chaos.writers import GENRES, STATUSES, Progress, Writer, jobs_end, plan, sign_up
from tests.support.proxies import Proxies
from tests.support.servers.postgresql import PostgresServer
from tests.support.servers.redis import RedisServer
from tests.support.service import eventually

REQUEST_SECONDS = 15.0
PAGE = 1_000
CATCH_UP_SECONDS = 60.0
QUIET_SECONDS = 1.0  # wait this long after every watcher has the last event, in case a superfluous event arrives


@dataclass(frozen=True)
class Role:
    """A kind of watcher. `share` is the percentage of watchers that are of this kind."""

    share: int
    wish: Wish
    manner: Manner
    through_proxy: bool = False


PLAIN = Manner("plain")
RESUMED = Manner("resumed", leaves_after=300, stays_away=3.0)
SLOW = Manner("slow", pauses_after=150, pauses_for=8.0)
FILTERS: tuple[tuple[str, dict[str, Any], Callable[[Row], bool]], ...] = (
    ("dramas", {"genre": "Drama"}, lambda row: "Drama" in row["genres"]),
    ("fair", {"rating": {"gte": 50, "lt": 90}}, lambda row: row["rating"] is not None and 50 <= row["rating"] < 90),
    (
        "groups",
        {"status": "released", "or": [{"genre": "Noir"}, {"rating": {"gte": 80}}]},
        lambda row: row["status"] == "released" and ("Noir" in row["genres"] or (row["rating"] or 0) >= 80),
    ),
    (
        "titles",
        {"title": {"prefix": "THE FILM"}, "rating": {"ne": 1}},
        lambda row: row["title"].lower().startswith("the film") and row["rating"] != 1,
    ),
    ("coming", {"status": {"in": ["announced", "in_production"]}}, lambda row: row["status"] in STATUSES[1:]),
)


def wish(index: int, **more: Any) -> Wish:
    """Return a Wish for movies with one of FILTERS."""
    name, written, matches = FILTERS[index % len(FILTERS)]
    return Wish(("movies",), name=name, filter=written, matches=matches, **more)


EVERY_MOVIE = Wish(("movies",), name="all", snapshot=True)
ROLES = (
    Role(16, Wish(), PLAIN),
    Role(3, Wish(("movies",)), PLAIN),
    Role(2, Wish(("characters",)), PLAIN),
    Role(2, Wish(("jobs",)), PLAIN),
    Role(5, Wish(bulk="summary"), PLAIN),
    Role(18, Wish(), Manner("cut"), through_proxy=True),
    Role(14, Wish(), RESUMED),
    Role(12, Wish(), SLOW),
    *(Role(1, wish(index), PLAIN) for index in range(5)),
    *(Role(1, wish(index), Manner("cut"), through_proxy=True) for index in range(5)),
    *(Role(1, wish(index), replace(RESUMED, leaves_after=60)) for index in range(3)),
    Role(1, wish(0, bulk="summary"), PLAIN),
    Role(1, wish(1), SLOW),
    *(Role(1, wish(index, snapshot=True), Manner("snapshots", 120, 2.0, forgets=True)) for index in range(3)),
    Role(2, EVERY_MOVIE, Manner("snapshots", 400, 2.0, forgets=True)),
    Role(2, EVERY_MOVIE, Manner("cut"), through_proxy=True),
    Role(3, wish(0, latest_every_ms=200), Manner("intervals"), through_proxy=True),
    Role(3, Wish(("movies",), name="latest", latest_every_ms=500), Manner("intervals")),
)


@dataclass
class Outcome:
    """The result of a run; `problems` is empty if every check passed."""

    chaos: Chaos
    faults: list[tuple[float, float, Fault]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    kinds: dict[str, Counter[str]] = field(default_factory=dict)
    statuses: Counter[int] = field(default_factory=Counter)
    ends: Counter[str] = field(default_factory=Counter)
    sent_again: int = 0
    bus_passed: int = 0
    bus_lost: int = 0
    seconds: float = 0.0
    longest_silence: float = 0.0

    def report(self) -> str:
        lines = [
            f"seed {self.chaos.seed}: {self.chaos.writes:,} writes, {self.chaos.watchers} watchers, "
            f"{self.chaos.workers} workers, {self.seconds:.0f} s",
            f"responses {dict(sorted(self.statuses.items()))}, sent again {self.sent_again}; "
            f"bus messages lost {self.bus_lost:,} of {self.bus_lost + self.bus_passed:,}",
            f"connections ended {dict(self.ends.most_common())}",
            "",
            "  from s    to s  fault                (at write)",
        ]
        lines += [
            f"{began:8.1f}{ended:8.1f}  {fault.kind:<20} ({fault.at})" for began, ended, fault in sorted(self.faults)
        ]
        lines += ["", "watchers            how many     events  snapshots    missing   repeated  reordered    unequal"]
        for kind, counts in self.kinds.items():
            names = ("watchers", "events", "snapshots", "missing", "repeated", "reordered", "unequal")
            lines.append(f"{kind:<18}" + "".join(f"{counts[name]:>10,} " for name in names).rstrip())
        lines += ["", f"longest silence of a plain watcher: {self.longest_silence:.1f} s"]
        shown = self.problems[:10]
        lines += ["", *(shown or ["nothing missing, nothing repeated, nothing reordered"])]
        if len(self.problems) > len(shown):
            lines.append(f"and {len(self.problems) - len(shown)} more")
        return "\n".join(lines)


async def run(chaos: Chaos, postgres: PostgresServer, redis: RedisServer, folder: Path) -> Outcome:
    """Carry out a run. PostgreSQL and Redis fail during it and work again at its end. The workers log to `folder`."""
    with Proxies() as proxies:
        stage = Stage(chaos, postgres, redis, proxies, folder)
        try:
            await stage.start()
            await asyncio.to_thread(stage.services[0].add_genres, *GENRES)
            return await _play(chaos, stage)
        finally:
            for service in stage.services:
                service.kill()


async def _play(chaos: Chaos, stage: Stage) -> Outcome:
    outcome, progress, hurry = Outcome(chaos), Progress(), asyncio.Event()
    watchers = list(_crowd(chaos, stage, hurry))
    watching = [asyncio.create_task(watcher.run()) for watcher in watchers]
    tending = [asyncio.create_task(stage.supervise()), asyncio.create_task(stage.cut_at_random())]
    began = time.monotonic()
    try:
        async with httpx.AsyncClient(
            timeout=REQUEST_SECONDS, verify=False, limits=httpx.Limits(max_connections=None)
        ) as http:
            tokens = [await sign_up(index, stage.services, http) for index in range(chaos.writers)]
            pause = chaos.writers / chaos.writes_per_second
            writers = [Writer(stage.services, http, token, progress, pause) for token in tokens]
            began = time.monotonic()
            faults = [asyncio.create_task(_fault(fault, stage, progress, outcome, began)) for fault in schedule(chaos)]
            share = chaos.writes // chaos.writers
            await asyncio.gather(*(writer.run(plan(chaos.seed, index, share)) for index, writer in enumerate(writers)))
            await asyncio.gather(*faults)
            await jobs_end(http, stage.services[0], CATCH_UP_SECONDS)
            hurry.set()
            await writers[0].end()
            log = await _all_caught_up(stage, watchers)
            outcome.problems += await _compare_with_tables(http, stage, log)
        outcome.seconds = time.monotonic() - began
        for task in watching:
            if task.done():
                outcome.problems.append(f"a watcher died: {task.exception()!r}")
    finally:
        for task in (*watching, *tending):
            task.cancel()
        await asyncio.gather(*watching, *tending, return_exceptions=True)
    outcome.statuses, outcome.sent_again = progress.statuses, progress.again
    _judge(outcome, stage, log, watchers, writers)
    return outcome


def _crowd(chaos: Chaos, stage: Stage, hurry: asyncio.Event) -> Iterator[Watcher]:
    texts = Texts()
    roles = [role for role in ROLES for _ in range(role.share)]
    random.Random(f"roles {chaos.seed}").shuffle(roles)
    for index in range(chaos.watchers):
        role = roles[index % len(roles)]
        ports = [door.port for door in stage.doors] if role.through_proxy else [each.port for each in stage.services]
        urls = [f"ws://127.0.0.1:{port}/ws" for port in ports]
        yield Watcher(role.wish, role.manner, urls, random.Random(f"watcher {chaos.seed} {index}"), texts, hurry)


async def _fault(fault: Fault, stage: Stage, progress: Progress, outcome: Outcome, began: float) -> None:
    await progress.reaches(fault.at)
    since = time.monotonic() - began
    await stage.suffer(fault)
    outcome.faults.append((since, time.monotonic() - began, fault))


async def _all_caught_up(stage: Stage, watchers: Sequence[Watcher]) -> Log:
    """Return the finished log once every watcher has its last event, or after CATCH_UP_SECONDS."""
    log = await read_log(stage.url)

    def behind() -> list[Watcher]:
        ends = ((watcher, log.expected(watcher.wish)) for watcher in watchers)
        return [watcher for watcher, events in ends if events and watcher.position < events[-1][-1]["seq"]]

    with contextlib.suppress(AssertionError):
        await eventually(lambda: not behind(), "all watchers catch up", CATCH_UP_SECONDS)
    await asyncio.sleep(QUIET_SECONDS)
    return log


async def _compare_with_tables(http: httpx.AsyncClient, stage: Stage, log: Log) -> list[str]:
    """Return the differences between the rows rebuilt from the log and the rows that the service lists."""
    problems = list(log.problems)
    for topic in CATALOG:
        rows: dict[int, Any] = {}
        page = [{"id": 0}]
        while page:
            path = f"/{topic}?limit={PAGE}&after={page[-1]['id']}"
            page = (await http.get(stage.services[0].url + path)).raise_for_status().json()
            rows |= {row["id"]: row for row in page}
        replayed = log.tables[topic]
        wrong = [id_ for id_ in sorted(rows.keys() | replayed.keys()) if rows.get(id_) != replayed.get(id_)]
        if wrong:
            first = f"{topic} {wrong[0]}: listed {rows.get(wrong[0])}, in the log {replayed.get(wrong[0])}"
            problems.append(f"{len(wrong)} {topic} differ between the list and the log; the first is {first}")
    return problems


def _judge(outcome: Outcome, stage: Stage, log: Log, watchers: Sequence[Watcher], writers: Sequence[Writer]) -> None:
    for index, watcher in enumerate(watchers):
        wish, kind = watcher.wish, watcher.manner.kind
        label = f"watcher {index} ({kind}, {wish.name or ','.join(wish.topics)})"
        outcome.ends.update(watcher.ends)
        outcome.problems += [f"{label}: {problem}" for problem in watcher.problems]
        counts = outcome.kinds.setdefault(f"{kind}, filtered" if wish.filter is not None else kind, Counter())
        counts["watchers"] += 1
        if not watcher.segments:
            outcome.problems.append(f"{label}: its stream never began")
        for segment in watcher.segments:
            is_last = segment is watcher.segments[-1]
            outcome.problems += [f"{label}: {problem}" for problem in _wrong(log, wish, segment, is_last, counts)]
        if watcher.wish == Wish() and kind == "plain":
            outcome.longest_silence = max(outcome.longest_silence, watcher.longest_silence)
    for writer in writers:
        outcome.problems += broken_promises(log, writer.promised)
    outcome.problems += stage.unasked_ends
    outcome.bus_lost = sum(bus.lost for bus in stage.buses)
    outcome.bus_passed = sum(bus.passed for bus in stage.buses)


def _wrong(log: Log, wish: Wish, segment: Segment, is_last: bool, counts: Counter[str]) -> Iterator[str]:
    counts["events"] += len(segment.got)
    if segment.items is not None and segment.is_whole:
        counts["snapshots"] += 1
        problem = wrong_snapshot(log, wish, segment.start, segment.items)
        if problem is not None:
            counts["unequal"] += 1
            yield problem
    if wish.latest_every_ms:
        problem = wrong_interval(log, wish, segment.start, segment.got)
        if problem is not None:
            counts["unequal"] += 1
            yield problem
        return
    # A watcher that starts over may have been cut anywhere, so only its last stream must reach the end of the log.
    end = None if is_last else segment.got[-1]["seq"] if segment.got else segment.start
    found = differences(log, wish, segment.start, segment.got, end)
    for name in ("missing", "repeated", "reordered", "unequal"):
        counts[name] += len(getattr(found, name))
    if found:
        yield f"after {segment.start}: {found}"
