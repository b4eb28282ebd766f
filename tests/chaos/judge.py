"""What every watcher must have received, derived from the log alone, without any code of the service.

The catalog starts empty, so replaying the log gives every row before and after every event; the log's own column
`before` is not used. Each filter is a Python function, written by hand beside the filter's JSON.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC
from typing import Any

import asyncpg
import orjson

PUBLIC_TOPICS = ("movies", "characters", "jobs")
CATALOG = ("movies", "characters")

Frame = dict[str, Any]
Row = dict[str, Any]


@dataclass(frozen=True)
class Wish:
    """What a watcher subscribes to. `matches` is `filter` as a Python function.

    With a filter, a snapshot or intervals, this is an explicit subscription, which has a name and one topic of CATALOG.
    """

    topics: tuple[str, ...] = PUBLIC_TOPICS
    bulk: str = "items"
    name: str | None = None
    filter: Mapping[str, Any] | None = None
    matches: Callable[[Row], bool] = field(default=lambda row: True, compare=False)
    snapshot: bool = False
    latest_every_ms: int = 0

    @property
    def key(self) -> str:
        return json.dumps([self.topics, self.bulk, self.name, self.filter], sort_keys=True)


def mark_of(row: Row) -> int:
    """Return a digest to keep instead of a row: the rows of all snapshots and intervals would not fit into memory."""
    encoded = orjson.dumps(row, option=orjson.OPT_SORT_KEYS)
    return int.from_bytes(hashlib.blake2b(encoded, digest_size=8).digest())


@dataclass(frozen=True)
class Entry:
    """An event of the log. `before` and `after` map ids to the rows that the event touches."""

    frame: Frame
    before: Mapping[int, Row]
    after: Mapping[int, Row]

    @property
    def seq(self) -> int:
        return int(self.frame["seq"])


class Log:
    """All public events of a log, and the catalog that results from them."""

    def __init__(self, epoch: str, head: int, entries: list[Entry], tables: dict[str, dict[int, Row]]) -> None:
        self.epoch = epoch
        self.head = head
        self.entries = entries
        self.tables = tables
        self.problems: list[str] = []
        self._expected: dict[str, list[list[Frame]]] = {}
        self._equal: set[tuple[int, int]] = set()
        self._marks: dict[int, int] = {}

    def mark_of(self, row: Row) -> int:
        """Return `mark_of(row)` for a row of this log, cached by `id(row)`, because the log keeps its rows alive."""
        mark = self._marks.get(id(row))
        if mark is None:
            mark = self._marks[id(row)] = mark_of(row)
        return mark

    def expected(self, wish: Wish) -> list[list[Frame]]:
        """Return the events that a watcher with this subscription sees, in order, each as the list of its frames."""
        found = self._expected.get(wish.key)
        if found is None:
            wanted = (entry for entry in self.entries if entry.frame["topic"] in wish.topics)
            found = self._expected[wish.key] = [frames for entry in wanted if (frames := frames_of(entry, wish))]
        return found

    def are_equal(self, wanted: Frame, got: Frame) -> bool:
        """Return whether two frames are equal. Equal pairs are cached by `id()`, because all frames are kept alive."""
        pair = (id(wanted), id(got))
        if pair not in self._equal and wanted == got:
            self._equal.add(pair)
        return pair in self._equal


async def read_log(url: str) -> Log:
    """Return the whole log. If the sequence numbers are not 1, 2, 3, …, its `problems` report this."""
    connection = await asyncpg.connect(url)
    try:
        async with connection.transaction(isolation="repeatable_read", readonly=True):
            epoch, head = await connection.fetchrow("SELECT epoch, seq FROM event_head")
            rows = await connection.fetch("SELECT * FROM events ORDER BY seq")
    finally:
        await connection.close()
    tables: dict[str, dict[int, Row]] = {topic: {} for topic in CATALOG}
    public = [row for row in rows if row["audience"] == "public" and row["topic"] in PUBLIC_TOPICS]
    entries = [_entry(row, tables) for row in public]
    log = Log(epoch, head, entries, tables)
    numbers = [row["seq"] for row in rows]
    if numbers != list(range(1, head + 1)):
        holes = sorted(set(range(1, head + 1)) ^ set(numbers))
        log.problems.append(f"the log has gaps or repeats: head {head}, {len(numbers)} events, wrong {holes[:10]}")
    return log


def _entry(row: Any, tables: dict[str, dict[int, Row]]) -> Entry:
    data = json.loads(row["payload"])
    frame = {"operation": row["operation"], "topic": row["topic"], "seq": row["seq"], "data": data}
    if row["changed"]:
        frame["changed"] = json.loads(row["changed"])
    frame["actor_id"] = row["actor_id"]
    frame["ts"] = row["created_at"].astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    if row["topic"] not in CATALOG:
        return Entry(frame, {}, {})
    table = tables[row["topic"]]
    after: dict[int, Row] = {}
    if row["operation"] == "delete":
        ids = [data["id"]]
    elif row["operation"] == "delete_bulk":
        ids = data["ids"]
    else:
        after = {item["id"]: item for item in data.get("items", [data])}
        ids = list(after)
    before = {id_: table[id_] for id_ in ids if id_ in table}
    for id_ in ids:
        if id_ in after:
            table[id_] = after[id_]
        else:
            table.pop(id_, None)
    return Entry(frame, before, after)


def frames_of(entry: Entry, wish: Wish) -> list[Frame]:
    """Return the frames that a watcher with this subscription receives for an event of one of its topics."""
    frame = entry.frame
    if wish.filter is not None:
        return _filtered(entry, wish)
    if wish.name is not None:
        frame = frame | {"subscription": wish.name}
    if wish.bulk == "summary" and frame["operation"].endswith("_bulk"):
        data = frame["data"]
        ids = data["ids"] if "ids" in data else [item["id"] for item in data["items"]]
        frame = frame | {"data": _summary(ids, data.get("job_id"))}
    return [frame]


def _summary(ids: Sequence[int], job_id: str | None) -> Row:
    return {"count": len(ids), "first_id": min(ids), "last_id": max(ids), "job_id": job_id}


def _filtered(entry: Entry, wish: Wish) -> list[Frame]:
    was = [id_ for id_, row in entry.before.items() if wish.matches(row)]
    is_ = [id_ for id_, row in entry.after.items() if wish.matches(row)]
    entered, stayed, left = (
        [id_ for id_ in is_ if id_ not in was],
        [id_ for id_ in is_ if id_ in was],
        [id_ for id_ in was if id_ not in is_],
    )
    rest = {name: entry.frame[name] for name in ("topic", "seq", "actor_id", "ts")} | {"subscription": wish.name}
    by_filter = {"reason": "filter"} if entry.after else {}
    changed = {"changed": entry.frame["changed"]} if "changed" in entry.frame else {}
    found: list[Frame] = []
    if not entry.frame["operation"].endswith("_bulk"):
        if entered:
            found.append({"operation": "add", "data": entry.after[entered[0]], **rest})
        elif stayed:
            found.append({"operation": "update", "data": entry.after[stayed[0]], **changed, **rest})
        elif left:
            found.append({"operation": "delete", "data": {"id": left[0]}, **by_filter, **rest})
        return found
    job = {"job_id": entry.frame["data"]["job_id"]} if "job_id" in entry.frame["data"] else {}
    parts: tuple[tuple[str, list[int], Row], ...] = (
        ("add_bulk", entered, {}),
        ("update_bulk", stayed, changed),
        ("delete_bulk", left, by_filter),
    )
    for operation, ids, more in parts:
        if not ids:
            continue
        if wish.bulk == "summary":
            data = _summary(ids, job.get("job_id"))
        elif operation == "delete_bulk":
            data = {"count": len(ids), "ids": ids}
        else:
            data = {"count": len(ids), "items": [entry.after[id_] for id_ in ids], **job}
        found.append({"operation": operation, "data": data, **more, **rest})
    for frame in found[:-1]:
        frame["more"] = True
    return found


def differences(log: Log, wish: Wish, start: int, got: Sequence[Frame], end: int | None = None) -> Differences:
    """Compare the received frames with those expected for the events after `start`, up to `end` or the head."""
    events = log.expected(wish)
    frames = [
        frame for event in events for frame in event if start < frame["seq"] <= (log.head if end is None else end)
    ]
    wanted, numbers = [frame["seq"] for frame in frames], [frame["seq"] for frame in got]
    found = Differences(len(got))
    if wanted != numbers:
        due, seen = Counter(wanted), Counter(numbers)
        found.missing = sorted((due - seen).elements())
        found.repeated = sorted((seen - due).elements())
        found.reordered = [late for early, late in itertools.pairwise(numbers) if late < early]
        return found
    found.unequal = [pair for pair in zip(frames, got, strict=True) if not log.are_equal(*pair)]
    return found


@dataclass
class Differences:
    """The differences between received and expected frames, as sequence numbers or pairs of frames. `repeated` includes
    events that the watcher did not subscribe to."""

    events: int
    missing: list[int] = field(default_factory=list)
    repeated: list[int] = field(default_factory=list)
    reordered: list[int] = field(default_factory=list)
    unequal: list[tuple[Frame, Frame]] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.missing or self.repeated or self.reordered or self.unequal)

    def __str__(self) -> str:
        parts = [
            f"{len(numbers)} {name} ({', '.join(map(str, numbers[:8]))})"
            for name, numbers in (("missing", self.missing), ("repeated", self.repeated), ("reordered", self.reordered))
            if numbers
        ]
        if self.unequal:
            wanted, got = (str(frame)[:600] for frame in self.unequal[0])
            parts.append(f"{len(self.unequal)} unequal, first\n    expected {wanted}\n    got      {got}")
        return "; ".join(parts) or "none"


def broken_promises(log: Log, promised: Sequence[tuple[str, Row]]) -> list[str]:
    """Return a message for each acknowledged row that the log does not contain unchanged and exactly once."""
    added: dict[tuple[str, int], list[Row]] = {}
    names: dict[tuple[str, str], int] = {}
    for entry in log.entries:
        if entry.frame["topic"] in CATALOG and entry.frame["operation"] in ("add", "add_bulk"):
            for id_, row in entry.after.items():
                added.setdefault((entry.frame["topic"], id_), []).append(row)
                label = "title" if entry.frame["topic"] == "movies" else "name"
                if "job_id" not in entry.frame["data"]:
                    name = (entry.frame["topic"], row[label])
                    names[name] = names.get(name, 0) + 1
    problems = []
    for topic, row in promised:
        found = added.get((topic, row["id"]), [])
        if found != [row]:
            problems.append(f"{topic} {row['id']} was acknowledged as {row} and is in the log as {found}")
    problems += [f"{topic}: {name} was added {count} times" for (topic, name), count in names.items() if count > 1]
    return problems
