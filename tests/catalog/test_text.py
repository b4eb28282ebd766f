"""All text is normalised, including the text that earlier versions stored. Names need a visible character."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from datetime import UTC, date, datetime
from typing import Any

import orjson
import pytest
from alembic import command
from sqlalchemy import Connection, MetaData, Table, insert, select

import models
from core.identity import unique_key
from core.texts.normal import is_visible, nfc
from core.times import utc_now
from repository.engine import migrations
from repository.engine.database import Database
from services.passwords import PasswordHasher
from tests.conftest import Places
from tests.support.backends import SQLITE_ONLY
from tests.support.requests import ok, sign_in
from tests.support.service import Person, Service
from tests.support.sockets import rows_of, subscribed

COMPOSED, SPLIT = "Amélie", "Ame\u0301lie"
JOINED = ("می\u200cخواهم", "ක්\u200dෂ", "\U0001f468\u200d\U0001f469\u200d\U0001f467")  # Persian, Sinhala, an emoji
UNSEEN = ("\u200b", "\u2800", "\u3164", "\u00ad\u2060", "\ufeff \u200d", "\ufe0f", "\u180e", "\U000e0041", "\u115f")


@pytest.mark.parametrize("text", ["a", " a ", "\u200ba", "0", "日", "́a", *JOINED])
def test_text_with_a_visible_character(text: str) -> None:
    assert is_visible(text)


@pytest.mark.parametrize("text", ["", " ", "\t\n", "\x00", *UNSEEN])
def test_text_without_a_visible_character(text: str) -> None:
    assert not is_visible(text)


def test_equivalent_spellings_become_equal() -> None:
    for text in (COMPOSED, "각", "Å", "\u0958", *JOINED):
        forms = {nfc(unicodedata.normalize(form, text)) for form in ("NFC", "NFD")}
        assert len(forms) == 1


async def test_text_is_stored_and_found_in_one_form(service: Service) -> None:
    service.add_genres(COMPOSED)
    async with service.person() as alice, service.watch() as watcher:
        fields: dict[str, Any] = {"title": SPLIT, "description": SPLIT, "status": SPLIT, "genres": [SPLIT]}
        movie = await alice.add(**fields)
        assert [movie[name] for name in fields] == [COMPOSED, COMPOSED, COMPOSED, [COMPOSED]]
        (bulk,) = await alice.add_bulk([fields])
        changed = await ok(alice.http.patch(f"/movies/{bulk['id']}", json={"genres": [SPLIT], "title": SPLIT}))
        assert (changed["title"], changed["genres"]) == (COMPOSED, [COMPOSED])
        for text in (COMPOSED, SPLIT):
            for name in ("title", "genre", "status[in]", "title[contains]", "description[prefix]", "q"):
                found = await ok(alice.http.get("/movies", params={name: text, "user_id": alice.id}))
                assert [row["id"] for row in found] == [movie["id"], bulk["id"]], (name, text)
            both = {"title": text, "user_id": alice.id}
            await subscribed(watcher, topics=["movies"], filter=both, snapshot=True)
            assert [row["id"] for row in await rows_of(watcher)] == [movie["id"], bulk["id"]]
        assert (await alice.add(genres=[COMPOSED, SPLIT]))["genres"] == [COMPOSED]


async def test_people_sign_in_with_either_spelling(service: Service) -> None:
    name = f"{SPLIT}{utc_now()[-9:-1]}".replace(":", "").replace(".", "")
    async with service.anyone() as client:
        body = {"username": name, "password": f"{SPLIT} à Paris", "first_name": SPLIT}
        user = await ok(client.post("/users", json=body), 201)
        assert (user["username"], user["first_name"]) == (nfc(name), COMPOSED)
        for form in ("NFC", "NFD", "NFKC"):
            login, password = (unicodedata.normalize(form, body[each]) for each in ("username", "password"))
            assert (await sign_in(client, login, password)).status_code == 200
        assert (await sign_in(client, name, "Amelie à Paris")).status_code == 401


def fields_with_names(admin: Person, person: Person) -> list[tuple[Person, str, str, str, Callable[[str], Any]]]:
    """Return the requests that take a name, with the name's field and a function that makes the field's value."""
    one: Callable[[str], Any] = lambda text: text  # noqa: E731
    listed: Callable[[str], Any] = lambda text: [text]  # noqa: E731
    return [
        *((person, "POST", "/movies", name, form) for name, form in (("title", one), ("status", one))),
        *((person, "POST", "/movies", name, listed) for name in ("genres", "languages")),
        (person, "POST", "/characters", "name", one),
        (admin, "POST", "/genres", "name", one),
        *((person, "PATCH", "/users/me", name, one) for name in ("username", "name", "first_name", "last_name")),
        *((person, "PATCH", "/users/me/profile", name, one) for name in ("first_name", "last_name")),
    ]


@SQLITE_ONLY
async def test_a_name_without_a_visible_character_is_refused_everywhere(service: Service) -> None:
    async with service.person() as alice, service.admin() as chief:
        for who, method, path, name, form in fields_with_names(chief, alice):
            for text in UNSEEN:
                body = {"title": "A", name: form(text)} if path == "/movies" else {name: form(text)}
                answer = await who.http.request(method, path, json=body)
                assert answer.status_code == 422, (path, name, text)
                assert [problem["loc"][1] for problem in answer.json()["detail"]] == [name]


@SQLITE_ONLY
async def test_letters_that_need_joiners_are_kept(service: Service) -> None:
    service.add_genres(*JOINED)
    async with service.person() as alice:
        for text in JOINED:
            movie = await alice.add(title=text, genres=[text], status=text)
            assert (movie["title"], movie["genres"], movie["status"]) == (text, [text], text)
            assert (await ok(alice.http.patch("/users/me", json={"name": text})))["name"] == text


# --- text that earlier versions stored


async def filled_by_the_version_before(places: Places) -> list[Any]:
    """Create a database with an earlier version's schema, and fill it as that version did: without normalising text.

    Return the events of the migration that normalises the text.
    """
    database = Database(places.database_url)
    async with database.begin() as (connection, _):
        await connection.run_sync(fill)
    async with database.read() as connection:
        events = (await connection.execute(select(models.events).order_by(models.events.c.seq))).all()
    await database.close()
    return list(events)


def fill(connection: Connection) -> None:
    command.upgrade(migrations._config(connection), "0006")
    connection.execute(insert(models.event_head).values(id=1, epoch="e" * 16, seq=0))
    old_hash = PasswordHasher(8, 1, 1)._context.hash(f"{SPLIT} à Paris")
    # Later versions add columns, so the tables are read from the database.
    users, movies, genres = (
        Table(name, MetaData(), autoload_with=connection, resolve_fks=False) for name in ("users", "movies", "genres")
    )
    now: Any = datetime.now(UTC) if connection.dialect.name == "postgresql" else utc_now()
    rest = {"version": 1, "created_at": now, "updated_at": now}
    user = {"username": SPLIT, "username_key": unique_key(SPLIT), "name": "\u200b", "first_name": SPLIT}
    more = {"password_hash": old_hash, "group": "user", "is_active": True, "awaits_activation": False}
    connection.execute(users.insert().values(**user, **more, **rest))
    empty: dict[str, Any] = {"genres": [], "languages": [], "status": None, "description": None, "release_date": None}
    alien: Any = date(1979, 5, 25) if connection.dialect.name == "postgresql" else "1979-05-25"
    rows: list[dict[str, Any]] = [
        {"title": SPLIT, "genres": [SPLIT, COMPOSED, "\u200b"], "languages": [SPLIT], "status": "\u2800"},
        # The normal form of this description is longer than the description itself.
        {"title": "\u200b", "description": "\u0958" * 3},
        {"title": "Alien", "release_date": alien},
        *({"title": f"{SPLIT} {number}"} for number in range(2_500)),
    ]
    connection.execute(movies.insert(), [{**empty, **row, "user_id": 1, "characters_count": 0, **rest} for row in rows])
    names = [{"name": name, "name_key": unique_key(name), **rest} for name in (SPLIT, "\u200b")]
    connection.execute(genres.insert(), names)
    # The next migration of the catalog empties the log.
    command.upgrade(migrations._config(connection), "0012")


async def test_stored_text_is_mended_with_its_events(
    empty_places: Callable[[], Places], new_service: Callable[..., Service]
) -> None:
    places = empty_places()
    events = await filled_by_the_version_before(places)
    service = new_service(places, PASSWORD_MEMORY_KIB="8", PASSWORD_TIME_COST="1").start()
    async with service.anyone() as client:
        first, untitled, alien, *others = await ok(client.get("/movies?limit=1000"))
        assert (first["title"], first["genres"], first["languages"]) == (COMPOSED, [COMPOSED], [COMPOSED])
        assert (first["status"], first["version"]) == (None, 1)
        assert (untitled["title"], untitled["description"]) == (f"Untitled {untitled['id']}", nfc("\u0958" * 3))
        assert (alien["title"], alien["release_date"], alien["version"]) == ("Alien", "1979-05-25", 1)
        assert all(row["title"].startswith(f"{COMPOSED} ") for row in others)
        assert [row["name"] for row in await ok(client.get("/genres"))] == [COMPOSED, "Unnamed 2"]

        # The rows in the log equal those that the lists return, except for members of later versions.
        rows: dict[int, dict[str, Any]] = {}
        changed: set[str] = set()
        for event in events:
            if event.topic == "movies":
                rows |= {row["id"]: {**row, "actors": []} for row in orjson.loads(event.payload)["items"]}
                changed |= set(orjson.loads(event.changed))
        pages = [await ok(client.get(f"/movies?limit=1000&offset={start}")) for start in (0, 1000, 2000)]
        # Later versions add members.
        listed = {row["id"]: row for found in pages for row in found}
        del listed[alien["id"]]
        assert rows == {id_: {name: row[name] for name in rows[id_]} for id_, row in listed.items()}
        assert changed == {"title", "description", "status", "genres", "languages"}

        user = await ok(sign_in(client, COMPOSED, f"{SPLIT} à Paris"))
        me = await ok(client.get("/auth/me", headers={"Authorization": f"Bearer {user['access_token']}"}))
        assert (me["username"], me["name"], me["first_name"]) == (COMPOSED, None, COMPOSED)
        # The sign-in has hashed the password again, in its normal form.
        assert (await sign_in(client, SPLIT, f"{COMPOSED} à Paris")).status_code == 200

    assert [event.seq for event in events] == list(range(1, len(events) + 1))
    mended = [event for event in events if event.topic in ("users", "account") and event.operation == "update"]
    assert [(event.topic, event.audience) for event in mended] == [("users", "group:admin"), ("account", "user:1")]
    assert [orjson.loads(event.payload) for event in mended] == [me, me]
