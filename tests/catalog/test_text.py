"""All text is normalised, including the text that earlier versions stored. Names need a visible character."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from typing import Any

import orjson
import pytest
from alembic import command
from sqlalchemy import insert, select, update

import models
from core.identity import unique_key
from core.texts.normal import is_visible, nfc
from core.times import utc_now
from repository.engine import migrations
from repository.engine.database import Database
from repository.engine.transaction import Transaction
from repository.generic import writes
from resources.genres import GENRES
from resources.movies import MOVIES
from services.passwords import PasswordHasher
from tests.conftest import Places
from tests.support.backends import SQLITE_ONLY
from tests.support.event_logs import without_spans
from tests.support.requests import assert_problem, ok, sign_in
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
    async with service.person() as alice, service.watch() as watcher:
        fields: dict[str, Any] = {"title": SPLIT, "description": SPLIT, "status": SPLIT, "genres": [SPLIT]}
        movie = await alice.add(**fields)
        assert [movie[name] for name in fields] == [COMPOSED, COMPOSED, COMPOSED, [COMPOSED]]
        (bulk,) = await alice.add_bulk([fields])
        changed = await ok(alice.http.patch(f"/movies/{bulk['id']}", json={"languages": [SPLIT], "title": SPLIT}))
        assert (changed["title"], changed["languages"]) == (COMPOSED, [COMPOSED])
        for text in (COMPOSED, SPLIT):
            for name in ("title", "genre", "status[in]", "title[contains]", "description[prefix]", "q"):
                found = await ok(alice.http.get("/movies", params={name: text, "user_id": alice.id}))
                assert [row["id"] for row in found] == [movie["id"], bulk["id"]], (name, text)
            both = {"title": text, "user_id": alice.id}
            await subscribed(watcher, topics=["movies"], filter=both, snapshot=True)
            assert [row["id"] for row in await rows_of(watcher)] == [movie["id"], bulk["id"]]
        assert_problem(
            await alice.http.post("/movies", json={"title": "A", "genres": [COMPOSED, SPLIT]}), 422, ["body", "genres"]
        )


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
    async with service.person() as alice:
        for text in JOINED:
            movie = await alice.add(title=text, genres=[text], status=text)
            assert (movie["title"], movie["genres"], movie["status"]) == (text, [text], text)
            assert (await ok(alice.http.patch("/users/me", json={"name": text})))["name"] == text


# --- text that earlier versions stored


async def filled_by_the_version_before(places: Places) -> None:
    """Create a database with an earlier version's schema, and fill it as that version did: without normalising text."""
    database = Database(places.database_url)
    async with database.begin() as (connection, _):
        await connection.run_sync(lambda sync: command.upgrade(migrations._config(sync), "0006"))
        await connection.execute(insert(models.event_head).values(id=1, epoch="e" * 16, seq=0))
    old_hash = PasswordHasher(8, 1, 1)._context.hash(f"{SPLIT} à Paris")

    async def write(tx: Transaction) -> None:
        # Later versions add columns, so only the columns of that version are written and returned.
        names = {"username": SPLIT, "username_key": unique_key(SPLIT), "name": "\u200b", "first_name": SPLIT}
        rest = {"password_hash": old_hash, "group": "user", "is_active": True, "awaits_activation": False, "version": 1}
        times = dict.fromkeys(("created_at", "updated_at"), utc_now())
        added = insert(models.users).values(names | rest | times).returning(models.users.c.id)
        user_id = (await tx.connection.execute(added)).scalar_one()
        rows: list[dict[str, Any]] = [
            {"title": SPLIT, "genres": [SPLIT, COMPOSED, "\u200b"], "languages": [SPLIT], "status": "\u2800"},
            {"title": "\u200b", "description": SPLIT},
            {"title": "Alien", "release_date": "1979-05-25"},
            *({"title": f"{SPLIT} {number}"} for number in range(2_500)),
        ]
        await writes.store(tx, MOVIES, rows, user_id)
        await writes.store(tx, GENRES, [{"name": SPLIT}, {"name": "\u200b"}], None)

    with without_spans():
        await database.write(write)
    # The normal form of this description is longer than the description itself.
    async with database.begin() as (connection, _):
        await connection.execute(update(models.movies).where(models.movies.c.id == 2).values(description="\u0958" * 3))
    await database.close()


async def test_stored_text_is_mended_with_its_events(
    new_places: Callable[[], Places], new_service: Callable[..., Service]
) -> None:
    places = new_places()
    await filled_by_the_version_before(places)
    service = new_service(places, PASSWORD_MEMORY_KIB="8", PASSWORD_TIME_COST="1").start()
    async with service.anyone() as client:
        first, untitled, alien, *others = await ok(client.get("/movies?limit=1000"))
        assert (first["title"], first["genres"], first["languages"]) == (COMPOSED, [COMPOSED], [COMPOSED])
        assert (first["status"], first["version"]) == (None, 1)
        assert (untitled["title"], untitled["description"]) == (f"Untitled {untitled['id']}", nfc("\u0958" * 3))
        assert (alien["title"], alien["release_date"], alien["version"]) == ("Alien", "1979-05-25", 1)
        assert all(row["title"].startswith(f"{COMPOSED} ") for row in others)
        assert [row["name"] for row in await ok(client.get("/genres"))] == [COMPOSED, "Unnamed 2"]

        # The rows in the log equal those that the lists return.
        rows: dict[int, dict[str, Any]] = {}
        changed: set[str] = set()
        page: dict[str, Any] = await ok(client.get("/events?limit=10&topics=movies"))
        while page["data"]:
            for frame in page["data"]:
                rows |= {row["id"]: row for row in frame["data"]["items"]}
                changed |= set(frame.get("changed", ()))
            after = f"{page['epoch']}:{page['seq']}"
            page = await ok(client.get(f"/events?after={after}&limit=10&topics=movies"))
        pages = [await ok(client.get(f"/movies?limit=1000&offset={start}")) for start in (0, 1000, 2000)]
        assert rows == {row["id"]: row for found in pages for row in found}
        assert changed == {"title", "description", "status", "genres", "languages"}

        user = await ok(sign_in(client, COMPOSED, f"{SPLIT} à Paris"))
        me = await ok(client.get("/auth/me", headers={"Authorization": f"Bearer {user['access_token']}"}))
        assert (me["username"], me["name"], me["first_name"]) == (COMPOSED, None, COMPOSED)
        # The sign-in has hashed the password again, in its normal form.
        assert (await sign_in(client, SPLIT, f"{COMPOSED} à Paris")).status_code == 200

    database = Database(places.database_url)
    async with database.read() as connection:
        events = (await connection.execute(select(models.events).order_by(models.events.c.seq))).all()
    await database.close()
    assert [event.seq for event in events] == list(range(1, len(events) + 1))
    mended = [event for event in events if event.topic in ("users", "account") and event.operation == "update"]
    assert [(event.topic, event.audience) for event in mended] == [("users", "group:admin"), ("account", "user:1")]
    assert [orjson.loads(event.payload) for event in mended] == [me, me]
