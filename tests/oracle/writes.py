"""The writes of the oracle, of every kind that REST offers. Each follows from a seed, so a printed play is short."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

from tests.oracle.filters import COUNTRIES, DATES, GENRES, KEPT_AS, LANGUAGES, NUMBERS, STATUSES, WORDS
from tests.support.service import PASSWORD

Row = dict[str, Any]

CATALOG = ("movies", "characters", "genres", "actors", "comments")
ADMIN = 2  # the admin's index; 0 and 1 are users
LONG = "a long story " * 500  # a few dozen texts of this length fill the buffers of an unread socket
AGENTS = ("harry/1.0", "Lime 2", "cafe", "")


@dataclass(frozen=True)
class Write:
    """A write whose request follows from `seed`. With `by_socket`, a watcher sends the request on its own socket."""

    kind: str
    resource: str
    size: int
    seed: int
    who: int
    worker: int
    by_socket: bool


MIXES = {
    "single": ("add", "put", "patch", "patch", "patch", "delete", "rate", "rate", "unrate", "keep", "keep", "rekeep"),
    "many": ("add_bulk", "patch_bulk", "patch_bulk", "patch", "delete_bulk", "delete_range"),
    "others": ("generate", "generate", "cancel", "patch", "register", "regroup", "shut", "sign_in", "end_session"),
}
MAX_ROWS = 40


@dataclass(frozen=True)
class Batch:
    """A sequence of writes that follow from one seed."""

    mix: str
    count: int
    seed: int

    def writes(self) -> list[Write]:
        chance = Random(repr(self))
        return [
            Write(
                chance.choice(MIXES[self.mix]),
                chance.choice(CATALOG),
                chance.choice((2, 5, 12, MAX_ROWS)),
                chance.randrange(2**16),
                chance.randint(0, ADMIN),
                chance.randrange(2),
                chance.random() < 0.3,
            )
            for _ in range(self.count)
        ]


@dataclass
class Known:
    """What the writers know so far: the owner of each row, jobs, and the accounts and sessions that may be changed."""

    owners: dict[str, dict[int, int | None]] = field(default_factory=lambda: {name: {} for name in CATALOG})
    jobs: list[str] = field(default_factory=list)
    spares: list[int] = field(default_factory=list)
    user_ids: list[int] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    sessions: list[list[str]] = field(default_factory=list)  # for each user, the sessions that may be ended
    registered: int = 0
    entries: list[list[int]] = field(default_factory=lambda: [[], [], []])  # the watchlist of each writer

    def pick(self, chance: Random, resource: str, who: int, number: int) -> list[int]:
        """Return ids, mostly of rows that this writer may change, and often of new rows that others may be reading."""
        owners = self.owners[resource]
        own = [id_ for id_, owner in owners.items() if who == ADMIN or owner == self.user_ids[who]]
        pool = own if own and chance.random() < 0.95 else list(owners)
        if chance.random() < 0.4:
            pool = sorted(pool)[-3:]
        return chance.sample(pool, min(number, len(pool)))

    def learn(self, resource: str, rows: Sequence[Row]) -> None:
        self.owners[resource] |= {row["id"]: row.get("user_id") for row in rows}

    def forget(self, resource: str, ids: Sequence[int]) -> None:
        for id_ in ids:
            self.owners[resource].pop(id_, None)


@dataclass(frozen=True)
class Call:
    method: str
    path: str
    body: Any = None
    headers: dict[str, str] = field(default_factory=dict)
    is_anonymous: bool = False


def call(write: Write, known: Known) -> Call | None:
    """Return the request for a write, or None if the write could change nothing."""
    chance = Random(repr((write.seed, write.kind)))
    path, many = f"/{write.resource}", f"/{write.resource}/bulk"
    one = known.pick(chance, write.resource, write.who, 1)
    match write.kind:
        case "add" | "add_bulk" if write.resource == "comments":
            return _comment(chance, known)
        case "patch_bulk" if write.resource == "comments":
            return Call("PATCH", f"{path}/{one[0]}", fields(chance, "comments", known)) if one else None
        case "add":
            return Call("POST", path, fields(chance, write.resource, known))
        case "put" | "patch" if one:
            body = fields(chance, write.resource, known, part=write.kind == "patch")
            return Call(write.kind.upper(), f"{path}/{one[0]}", body)
        case "delete" if one:
            return Call("DELETE", f"{path}/{_crowded(chance, write, known) or one[0]}")
        case "add_bulk":
            rows = [fields(chance, write.resource, known) for _ in range(write.size)]
            return Call("POST", f"{many}?on_error=skip", rows)
        case "patch_bulk" if one:
            ids = known.pick(chance, write.resource, write.who, write.size)
            alike = chance.random() < 0.4
            shared = fields(chance, write.resource, known, part=True)
            if chance.random() < 0.5:
                name = "biography" if write.resource == "actors" else "description"
                shared = {name: LONG + str(write.seed)}
            edits = [shared if alike else fields(chance, write.resource, known, part=True) for _ in ids]
            return Call("PATCH", many, [{"id": id_, **edit} for id_, edit in zip(ids, edits, strict=True)])
        case "delete_bulk" if one:
            return Call("DELETE", many, {"ids": known.pick(chance, write.resource, write.who, write.size)})
        case "delete_range" if one:
            return Call("DELETE", f"{many}/{one[0]}/{one[0] + write.size}")
        case "generate" if write.resource in ("movies", "characters"):
            number, batch = 20 + write.seed % 180, chance.choice((7, 30, 100, 1_000))
            rate = chance.choice(("", f"&rate={number * 4}"))
            with_ = chance.choice(("", "", "&with=characters,ratings", "&with=ratings,characters,comments"))
            parts = with_ if write.resource == "movies" else ""
            return Call("POST", f"{path}/generate/{number}?seed={write.seed}&batch_size={batch}{rate}{parts}")
        case "rate" | "unrate" | "keep" | "rekeep" if known.owners["movies"]:
            return _community_call(write, known, chance)
        case "cancel" if known.jobs:
            return Call("DELETE", f"/jobs/{chance.choice(known.jobs[-3:])}")
    return _account_call(write, known, chance)


def _comment(chance: Random, known: Known) -> Call | None:
    """Return a comment on one of the newest movies, or a reply to a comment, which may have been deleted."""
    movies, comments = sorted(known.owners["movies"])[-4:], sorted(known.owners["comments"])[-8:]
    body = fields(chance, "comments", known)
    if comments and chance.random() < 0.6:
        return Call("POST", f"/comments/{chance.choice(comments)}/replies", body)
    return Call("POST", f"/movies/{chance.choice(movies)}/comments", body) if movies else None


def _community_call(write: Write, known: Known, chance: Random) -> Call | None:
    """Return a request about a rating or a watchlist entry, mostly of the newest movies, as for characters."""
    movie, own = chance.choice(sorted(known.owners["movies"])[-8:]), known.entries[write.who]
    fields = {"status": chance.choice(KEPT_AS), "notes": chance.choice((*WORDS, None))}
    match write.kind:
        case "rate":
            return Call("POST", f"/movies/{movie}/ratings", {"score": chance.choice((1, 2, 7, 9, 10))})
        case "unrate":
            return Call("DELETE", f"/movies/{movie}/ratings/mine")
        case "keep":
            return Call("POST", "/watchlist", {"movie_id": movie, **fields})
        case "rekeep" if own:
            path = f"/watchlist/{chance.choice(own[-8:])}"
            return Call("PATCH", path, fields) if chance.random() < 0.7 else Call("DELETE", path)
    return None


def _account_call(write: Write, known: Known, chance: Random) -> Call | None:
    spare = chance.choice(known.spares[-4:]) if known.spares else None
    match write.kind:
        case "register":
            known.registered += 1
            name = f"{chance.choice(('spare', 'Spare', 'space'))}-{known.registered}"
            return Call("POST", "/auth/register", {"username": name, "password": PASSWORD}, is_anonymous=True)
        case "regroup" if spare is not None:
            return Call("POST", f"/admin/users/{spare}/change-group", {"group": chance.choice(("user", "moderator"))})
        case "shut" if spare is not None:
            return Call("POST", f"/admin/users/{spare}/{chance.choice(('activate', 'deactivate'))}")
        case "sign_in":
            body = {"username": known.names[write.who % 2], "password": PASSWORD}
            return Call("POST", "/auth/login", body, {"User-Agent": chance.choice(AGENTS)}, is_anonymous=True)
        case "end_session" if write.who != ADMIN and known.sessions[write.who]:
            return Call("DELETE", f"/auth/sessions/{known.sessions[write.who].pop()}")
    return None


def _crowded(chance: Random, write: Write, known: Known) -> int | None:
    """Return the newest movie for most of the admin's deletions: deleting it also changes its many characters."""
    if write.resource == "movies" and write.who == ADMIN and chance.random() < 0.7:
        return max(known.owners["movies"], default=None)
    return None


def fields(chance: Random, resource: str, known: Known, *, part: bool = False) -> Row:
    """Return values for all writable fields or, with `part`, for some of them. Values that filters use are frequent."""
    row: Row
    if resource == "movies":
        row = {
            "title": _title(chance),
            "description": _prose(chance),
            "release_date": chance.choice((*DATES, None)),
            "rating": chance.choice((*range(1, 101), *NUMBERS[1:], None)),
            "duration_minutes": chance.choice((*NUMBERS[1:], None)),
            "status": chance.choice((*STATUSES, None)),
            "budget": chance.choice((*NUMBERS, 2**53 - 1, None)),
            "country": chance.choice((*COUNTRIES, None)),
            "languages": chance.sample(LANGUAGES, chance.randrange(3)),
            "genres": chance.sample(GENRES, chance.randrange(4)),
            "actors": chance.sample(_actors(known), chance.randrange(3)),
        }
    elif resource == "comments":
        return {"text": chance.choice((*(word for word in WORDS if len(word) > 1), LONG[:9_000]))}
    elif resource == "genres":
        # Genres that movies show are often renamed.
        row = {"name": chance.choice((*GENRES, _title(chance))), "description": _prose(chance)}
    elif resource == "actors":
        row = {
            "name": _title(chance),
            "birth_date": chance.choice((*DATES, None)),
            "country": chance.choice((*COUNTRIES, None)),
            "biography": _prose(chance),
        }
    else:
        # Most characters are in the newest movies.
        movies = sorted(known.owners["movies"])
        movie = chance.choice((*movies[-6:], *movies[-6:], chance.choice(movies))) if movies else None
        row = {
            "name": _title(chance),
            "description": _prose(chance),
            "movie_id": movie if chance.random() < 0.8 else None,
            "actor_id": chance.choice((*sorted(known.owners["actors"])[-4:], None)),
        }
    if part:
        names = chance.sample(sorted(row), chance.randint(1, min(3, len(row))))
        row = {name: row[name] for name in names}
    return row


def _actors(known: Known) -> Sequence[int | str]:
    """Return ids and names of actors. Some are unknown, and some names are those of several actors."""
    return [*sorted(known.owners["actors"])[-6:], *WORDS[:3]]


def _title(chance: Random) -> str:
    return " ".join(chance.sample(WORDS, chance.randint(1, 2)))


def _prose(chance: Random) -> str | None:
    return chance.choice(
        (None, None, chance.choice(WORDS), chance.choice(WORDS), LONG if chance.random() < 0.1 else "")
    )
