"""Pictures of people: given, shown, replaced and taken away.

They are kept in a folder beside SQLite, and in a bucket of a real S3-compatible server beside PostgreSQL.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import text

from core.settings import load_settings
from gateways import storage as storage_module
from gateways.storage import open_storage
from jobs import orphans
from jobs.orphans import Orphans
from repository.accounts import avatars
from repository.engine.database import Database
from routes.http.uploads import MAX_AVATAR_BYTES
from services.pictures.pool import MAX_UPLOADS_PER_USER
from tests.conftest import Places
from tests.support.pictures import EVIL, opened, photo
from tests.support.s3_server import S3Server
from tests.support.servers import MissingServer
from tests.support.service import Person, Service, eventually

MINE = "/users/me/avatar"
# How often is not the matter here; how many at once is.
RARELY_LIMITED = "; ".join(
    f"{route}=100000/minute" for route in ("POST /auth/register", "POST /auth/login", f"PUT {MINE}")
)


@dataclass
class Gallery:
    """A service, and where it keeps its pictures: a folder that one can look into, also where it is a bucket."""

    service: Service
    folder: Path
    s3: S3Server | None

    def files(self) -> set[str]:
        base = self.folder / avatars.FOLDER
        return {path.relative_to(base).as_posix() for path in base.rglob("*") if path.is_file()}

    def files_of(self, account: dict[str, Any]) -> set[str]:
        """What must be there for an account, and for no other one of the test's."""
        name = account["avatar_url"].split("/")[2]
        return {f"{name}/{side}.webp" for side in avatars.SIDES}

    def settings(self) -> dict[str, str]:
        return {name: self.service.settings[name] for name in self.service.settings if name[:3] in ("STO", "S3_")}

    @contextmanager
    def away(self) -> Iterator[None]:
        """The storage answers nothing."""
        if self.s3 is not None:
            with self.s3.down():
                yield
            return
        base, aside = self.folder / avatars.FOLDER, self.folder / "aside"
        base.mkdir(exist_ok=True)
        base.rename(aside)
        base.write_text("no folder")
        try:
            yield
        finally:
            base.unlink()
            aside.rename(base)


@pytest.fixture(scope="module")
def gallery(
    backend: str, new_places: Callable[[], Places], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Gallery]:
    places = new_places()
    with ExitStack() as stack:
        if backend == "sqlite":
            s3, folder = None, tmp_path_factory.mktemp("storage")
            settings = {"STORAGE_URL": f"file://{folder}"}
        else:
            try:
                s3 = stack.enter_context(S3Server())
            except MissingServer as missing:
                pytest.skip(str(missing))
            settings, folder = s3.settings("pre/fix"), s3.folder / "pre" / "fix"
        service = Service(
            places.database_url,
            places.broadcast_url,
            tmp_path_factory.mktemp("gallery"),
            RATE_LIMITS=RARELY_LIMITED,
            **settings,
        )
        yield Gallery(stack.enter_context(service.running()), folder, s3)


async def give(person: Person, content: bytes, path: str = MINE, **options: Any) -> httpx.Response:
    return await person.http.put(path, files={"avatar": ("me.png", content, "image/png")}, **options)


async def given(person: Person, content: bytes | None = None) -> dict[str, Any]:
    answer = await give(person, content or photo())
    assert answer.status_code == 200, answer.text
    account: dict[str, Any] = answer.json()
    return account


def bearer(person: Person) -> dict[str, str]:
    return {"Authorization": f"Bearer {person.token}"}


async def me(person: Person) -> dict[str, Any]:
    account: dict[str, Any] = (await person.http.get("/auth/me")).json()
    return account


# --- giving and showing


async def test_a_picture_is_given_and_shown_in_two_sizes(gallery: Gallery) -> None:
    async with gallery.service.person() as alice, gallery.service.anyone() as nobody:
        before = await me(alice)
        assert (before["avatar_url"], before["avatar_thumbnail_url"]) == (None, None)
        answer = await give(alice, photo(900, 700))
        assert answer.status_code == 200
        account = answer.json()
        assert account["version"] == before["version"] + 1
        assert answer.headers["etag"].startswith(f'"{account["version"]}-')
        assert await me(alice) == account
        for name, side in (("avatar_url", 512), ("avatar_thumbnail_url", 128)):
            shown = await nobody.get(account[name])
            assert shown.status_code == 200
            assert opened(shown.content).size == (side, side)
            assert opened(shown.content).format == "WEBP"
        assert gallery.files_of(account) <= gallery.files()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
async def test_the_body_may_be_the_picture_itself(gallery: Gallery, kind: str) -> None:
    async with gallery.service.person() as alice:
        # Which of the three it is called does not matter.
        for media_type in ("image/jpeg", "image/png", "image/webp"):
            answer = await alice.http.put(MINE, content=photo(kind=kind), headers={"Content-Type": media_type})
            assert answer.status_code == 200, answer.text


async def test_caches_may_keep_a_picture_for_ever_and_nobody_takes_it_for_a_page(gallery: Gallery) -> None:
    async with gallery.service.person() as alice, gallery.service.anyone() as nobody:
        url = (await given(alice))["avatar_url"]
        shown = await nobody.get(url)
        wanted = {
            "content-type": "image/webp",
            "cache-control": "public, max-age=31536000, immutable",
            "x-content-type-options": "nosniff",
            "content-security-policy": "default-src 'none'; sandbox",
            "content-disposition": "inline",
            "cross-origin-resource-policy": "cross-origin",
        }
        assert wanted.items() <= dict(shown.headers).items()
        head = await nobody.head(url)
        assert (head.status_code, head.content, head.headers["etag"]) == (200, b"", shown.headers["etag"])
        known = await nobody.get(url, headers={"If-None-Match": shown.headers["etag"]})
        assert (known.status_code, known.content) == (304, b"")
        assert known.headers["cache-control"] == wanted["cache-control"]
        assert (await nobody.get(f"/avatars/{'0' * 32}/512")).status_code == 404
        for wrong in (url.replace("512", "513"), url.upper(), "/avatars/..%2f..%2fetc/512", "/avatars/%00/512"):
            answer = await nobody.get(wrong)
            assert answer.status_code in (404, 422), wrong
            assert answer.headers["content-type"] == "application/json"


async def test_what_was_replaced_or_taken_away_is_gone(gallery: Gallery) -> None:
    async with gallery.service.person() as alice:
        first = await given(alice)
        second = await given(alice, photo(colour="blue"))
        assert second["avatar_url"] != first["avatar_url"]
        assert not gallery.files_of(first) & gallery.files()
        assert gallery.files_of(second) <= gallery.files()
        assert (await alice.http.get(first["avatar_url"])).status_code == 404
        for _ in range(2):  # a second time there is nothing to take away
            assert (await alice.http.delete(MINE)).status_code == 204
            assert (await me(alice))["version"] == second["version"] + 1
        assert (await me(alice))["avatar_url"] is None
        assert not gallery.files_of(second) & gallery.files()


async def test_the_pictures_of_a_deleted_account_are_gone(gallery: Gallery) -> None:
    async with gallery.service.person() as alice:
        account = await given(alice)
        assert (await alice.http.delete("/users/me")).status_code == 204
        assert not gallery.files_of(account) & gallery.files()


async def test_a_change_reaches_the_own_sockets_and_admins(gallery: Gallery) -> None:
    service = gallery.service
    async with service.person() as alice, service.admin() as chief, service.person() as bob:
        async with (
            service.watch("topics=account", additional_headers=bearer(alice)) as own,
            service.watch("topics=users", additional_headers=bearer(chief)) as office,
            service.watch("topics=account", additional_headers=bearer(bob)) as other,
        ):
            account = await given(alice)
            for watcher in (own, office):
                event = await watcher.expect("update")
                assert event["data"] == account
                assert set(event["changed"]) == {"avatar_url", "avatar_thumbnail_url"}
            await given(bob)
            assert (await other.expect("update"))["data"]["id"] == bob.id


# --- who, and which version


async def test_only_the_owner_and_admins_change_a_picture(gallery: Gallery) -> None:
    service = gallery.service
    async with service.person() as alice, service.person() as bob, service.admin() as chief, service.anyone() as nobody:
        await chief.http.post(f"/admin/users/{bob.id}/change-group", json={"group": "moderator"})
        path = f"/users/{alice.id}/avatar"
        files = gallery.files()
        form = {"avatar": ("me.png", photo(), "image/png")}
        for who, status in ((nobody, 401), (bob.http, 403)):
            assert (await who.put(path, files=form)).status_code == status
            assert (await who.delete(path)).status_code == status
        assert (await give(chief, photo(), "/users/999999999/avatar")).status_code == 404
        assert (await chief.http.delete("/users/999999999/avatar")).status_code == 404
        assert gallery.files() == files
        assert (await give(alice, photo(), path)).status_code == 200
        assert (await give(chief, photo(colour="blue"), path)).status_code == 200
        assert (await chief.http.delete(path)).status_code == 204
        told = (await chief.http.get("/admin/audit", params={"user_id": alice.id})).json()
        done = [(each["action"], each["actor_id"], each["changes"]) for each in told]
        # Nothing of what it was: a picture is personal. And nothing of what alice did herself.
        assert done == [("avatar", chief.id, {"avatar_url": [], "avatar_thumbnail_url": []})] * 2


async def test_if_match_is_honoured_and_a_refusal_leaves_no_file(gallery: Gallery) -> None:
    async with gallery.service.person() as alice:
        first = await given(alice)
        files = gallery.files()
        for method in ("PUT", "DELETE"):
            stale = {"If-Match": f'"{first["version"] - 1}-0000000000000000"'}
            form = {"avatar": photo()} if method == "PUT" else None
            answer = await alice.http.request(method, MINE, files=form, headers=stale)
            assert answer.status_code == 412
        assert gallery.files() == files
        assert await me(alice) == first
        fresh = {"If-Match": f'"{first["version"]}-0000000000000000"'}
        assert (await give(alice, photo(), headers=fresh)).status_code == 200


# --- profiles


async def test_a_profile_may_bring_the_picture(gallery: Gallery) -> None:
    async with gallery.service.person() as alice:
        path = f"/users/{alice.id}/profile"
        brought = {"avatar": ("../../me.svg", photo(), "text/html")}
        answer = await alice.http.post(path, data={"first_name": "Alice", "info": ""}, files=brought)
        assert answer.status_code == 201, answer.text
        profile = answer.json()
        assert (profile["first_name"], profile["info"]) == ("Alice", None)
        assert (await alice.http.get(profile["avatar_url"])).status_code == 200
        again = await alice.http.post(path, data={"first_name": "Alice"}, files=brought)
        assert again.status_code == 409
        assert gallery.files_of(profile) <= gallery.files()
        for method, fields in (("PATCH", {"info": "Acts."}), ("PUT", {"first_name": "Anna"})):
            answer = await alice.http.request(method, path, data=fields, files=brought)
            assert answer.status_code == 200, answer.text
            former, profile = profile, answer.json()
            assert fields.items() <= profile.items()
            assert not gallery.files_of(former) & gallery.files()
            assert gallery.files_of(profile) <= gallery.files()
        # Without a file, or with the empty one of a browser's form, the picture stays.
        for files in ({"avatar": ("", b"", "application/octet-stream")}, {"info": (None, b"Acts.")}):
            answer = await alice.http.put(path, files=files)
            assert answer.json()["avatar_url"] == profile["avatar_url"]
        wrong = await alice.http.patch(path, data={"gender": "x", "colour": "y"}, files=brought)
        assert {each["loc"][1] for each in wrong.json()["detail"]} == {"gender", "colour"}
        assert (await me(alice))["avatar_url"] == profile["avatar_url"]


async def test_a_profile_that_is_sent_again_keeps_the_picture(gallery: Gallery) -> None:
    async with gallery.service.person() as alice:
        request = alice.http.build_request(
            "POST",
            "/users/me/profile",
            data={"first_name": "Alice"},
            files={"avatar": photo()},
            headers={"Idempotency-Key": "once", "Content-Type": "multipart/form-data; boundary=same"},
        )
        answers = [await alice.http.send(request) for _ in range(2)]
        assert [answer.status_code for answer in answers] == [201, 201]
        assert answers[0].json() == answers[1].json()
        assert (await alice.http.get(answers[0].json()["avatar_url"])).status_code == 200
        before = gallery.files()
        await alice.http.delete(MINE)
        assert before - gallery.files() == gallery.files_of(answers[0].json()), "the second time left nothing"


# --- what is refused


async def test_files_that_lie_are_refused_by_name_and_nothing_is_stored(gallery: Gallery) -> None:
    async with gallery.service.person() as alice:
        account = await given(alice)
        files = gallery.files()
        for name, make in EVIL.items():
            answer = await give(alice, make())
            assert answer.status_code == 422, name
            (problem,) = answer.json()["detail"]
            assert problem["loc"] == ["body", "avatar"], name
        assert gallery.files() == files
        assert await me(alice) == account


def form(*parts: tuple[str, bytes], boundary: str = "b", end: str = "--b--\r\n") -> dict[str, Any]:
    body = b"".join(b"--b\r\n" + head.encode() + b"\r\n\r\n" + content + b"\r\n" for head, content in parts)
    headers = {"Content-Type": f"multipart/form-data; boundary={boundary}" if boundary else "multipart/form-data"}
    return {"content": body + end.encode(), "headers": headers}


FILE = 'Content-Disposition: form-data; name="avatar"; filename="me.png"'


@pytest.mark.parametrize(
    ("request_", "status", "loc"),
    [
        (form(("X: y", photo())), 422, ["body"]),
        (form((FILE, photo()), boundary=""), 422, ["body"]),
        (form((FILE, photo()), boundary="b" * 71), 422, ["body"]),
        (form((FILE, photo()), end=""), 422, ["body"]),
        (form((FILE + "\r\nX: " + "y" * 5_000, photo())), 422, ["body"]),
        (form(*[(FILE, photo())] * 21), 422, ["body"]),
        ({"content": b"", "headers": {"Content-Type": "multipart/form-data; boundary=b"}}, 422, ["body"]),
        (form((FILE, photo()), (FILE, photo())), 422, ["body", "avatar"]),
        (form(("Content-Disposition: form-data; name=picture", photo())), 422, ["body", "avatar"]),
        (form((FILE, photo()), ("Content-Disposition: form-data; name=user_id", b"1")), 422, ["body", "user_id"]),
        (form((FILE, photo()), ("Content-Disposition: form-data; name=info", b"\xff")), 422, ["body", "info"]),
        ({"json": {"avatar": "x"}}, 415, None),
        ({"content": photo(kind="GIF"), "headers": {"Content-Type": "image/gif"}}, 415, None),
        ({"content": b"<svg/>", "headers": {"Content-Type": "image/svg+xml"}}, 415, None),
        ({"content": photo()}, 415, None),
        ({"content": bytes(MAX_AVATAR_BYTES + 1), "headers": {"Content-Type": "image/png"}}, 413, None),
        (form((FILE, bytes(MAX_AVATAR_BYTES + 1))), 413, None),
        (form((FILE, bytes(MAX_AVATAR_BYTES + 65_536))), 413, None),
    ],
)
async def test_bodies_that_are_no_upload_are_refused(
    gallery: Gallery, request_: dict[str, Any], status: int, loc: list[str] | None
) -> None:
    async with gallery.service.person() as alice:
        answer = await alice.http.put(MINE, **request_)
        assert answer.status_code == status, answer.text
        if loc is not None:
            assert loc in [each["loc"] for each in answer.json()["detail"]]


@pytest.mark.parametrize(
    "name", ["../../../../etc/passwd", "/etc/passwd", "a\x00.png", "..\\..\\x.php", "x" * 900, "'\"; rm"]
)
async def test_names_of_files_lead_nowhere(gallery: Gallery, name: str) -> None:
    async with gallery.service.person() as alice:
        before = gallery.files()
        head = f'Content-Disposition: form-data; name="avatar"; filename="{name}"\r\nContent-Type: text/html'
        answer = await alice.http.put(MINE, **form((head, photo())))
        assert answer.status_code == 200, answer.text
        assert gallery.files() - before == gallery.files_of(answer.json())


async def test_a_socket_has_no_room_for_pictures(gallery: Gallery) -> None:
    service = gallery.service
    async with service.person() as alice, service.watch("topics=account", additional_headers=bearer(alice)) as watcher:
        url = (await given(alice))["avatar_url"]
        for ask, status in (
            ({"method": "PUT", "path": MINE, "body": {"avatar": "x"}}, 415),
            ({"method": "GET", "path": url}, 406),
            ({"method": "DELETE", "path": MINE}, 204),
        ):
            await watcher.send({"action": "request", "id": status, **ask})
            reply = await watcher.next()
            while reply.get("reply_to") != status:
                reply = await watcher.next()
            assert reply["status"] == status, reply


# --- trouble on the way


def uploading(service: Service, token: str, share: float) -> socket.socket:
    """A connection that has sent a part of an upload."""
    request = form((FILE, photo(kind="PNG") + bytes(100_000)))
    body = request["content"]
    lines = [
        f"PUT {MINE} HTTP/1.1",
        f"Host: 127.0.0.1:{service.port}",
        f"Authorization: Bearer {token}",
        f"Content-Type: {request['headers']['Content-Type']}",
        f"Content-Length: {len(body)}",
    ]
    connection = socket.create_connection(("127.0.0.1", service.port), timeout=30)
    connection.sendall("\r\n".join(lines).encode() + b"\r\n\r\n" + body[: int(len(body) * share)])
    return connection


@pytest.mark.parametrize("share", [0.0, 0.5, 0.999])
async def test_an_upload_that_breaks_off_leaves_nothing(gallery: Gallery, share: float) -> None:
    async with gallery.service.person() as alice:
        account = await given(alice)
        files = gallery.files()
        logged = gallery.service.log().count("client disconnected")
        connection = uploading(gallery.service, alice.token, share)
        # Without a farewell, as when a cable is pulled.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.close()
        await eventually(lambda: gallery.service.log().count("client disconnected") > logged, "it is noticed")
        assert gallery.files() == files
        assert await me(alice) == account
        assert (await give(alice, photo())).status_code == 200, "its place is free again"


async def test_a_user_who_sends_slowly_takes_only_their_own_places(gallery: Gallery) -> None:
    service = gallery.service
    async with service.person() as alice, service.person() as bob:
        slow = [uploading(service, alice.token, 0.5) for _ in range(MAX_UPLOADS_PER_USER)]
        try:

            async def refused() -> httpx.Response | None:
                answer = await give(alice, photo())
                return answer if answer.status_code == 429 else None

            answer = await eventually(refused, "no place is left")
            assert int(answer.headers["retry-after"]) >= 1
            assert (await give(bob, photo())).status_code == 200
        finally:
            for connection in slow:
                connection.close()

        async def taken() -> bool:
            return (await give(alice, photo())).status_code == 200

        await eventually(taken, "the places are free again")


async def test_of_uploads_at_once_one_stays_and_the_files_of_the_others_go(gallery: Gallery) -> None:
    async with gallery.service.person() as alice:
        before = gallery.files()
        colours = ("red", "green", "blue")
        answers = await asyncio.gather(*(give(alice, photo(colour=colour)) for colour in colours))
        assert [answer.status_code for answer in answers] == [200] * 3
        account = await me(alice)
        assert account["avatar_url"] in [answer.json()["avatar_url"] for answer in answers]
        assert account["version"] == 4
        assert gallery.files() - before == gallery.files_of(account)


async def test_a_storage_that_is_away_is_a_503_and_changes_nothing(gallery: Gallery) -> None:
    async with gallery.service.person() as alice:
        account = await given(alice)
        with gallery.away():
            for answer in (await give(alice, photo(colour="blue")), await alice.http.get(account["avatar_url"])):
                assert answer.status_code == 503
                assert answer.headers["retry-after"] == "1"
            assert await me(alice) == account
            # What only the database must do is done, and the files are left for the clean-up.
            assert (await alice.http.delete(MINE)).status_code == 204
        assert (await me(alice))["avatar_url"] is None
        assert gallery.files_of(account) <= gallery.files()
        assert (await give(alice, photo())).status_code == 200


# --- files that no account names


async def test_files_that_no_account_names_are_deleted_when_they_are_old(
    gallery: Gallery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage_module, "FILES_PER_PAGE", 3)
    for name in list(os.environ):
        if name.startswith(("STORAGE_", "S3_")):
            monkeypatch.delenv(name)
    names = {name.lower(): value for name, value in gallery.settings().items()}
    storage = open_storage(load_settings(**names))
    database = Database(gallery.service.database_url)
    try:
        async with gallery.service.person() as alice:
            kept = gallery.files_of(await given(alice))
            orphaned = {f"{number:032x}/{side}.webp" for number in range(1, 9) for side in avatars.SIDES}
            foreign = {"notes.txt", "0/512.webp"}
            for name in orphaned | foreign:
                await storage.put(f"{avatars.FOLDER}/{name}", b"x")
            assert await orphans.remove(database, storage) == 0
            assert orphaned <= gallery.files(), "they are too young"
            later = datetime.now(UTC) + timedelta(hours=2)
            assert await orphans.remove(database, storage, later) >= len(orphaned)
            left = gallery.files()
            assert kept | foreign <= left
            assert not orphaned & left
            # What is left are the pictures of accounts.
            async with database.read() as connection:
                found = await connection.execute(text("SELECT avatar FROM users WHERE avatar IS NOT NULL"))
                assert {name.partition("/")[0] for name in left - foreign} <= set(found.scalars())
    finally:
        await database.close()
        for name in foreign:
            (gallery.folder / avatars.FOLDER / name).unlink()
        shutil.rmtree(gallery.folder / avatars.FOLDER / "0", ignore_errors=True)


async def test_they_are_looked_for_now_and_then_whatever_went_wrong_the_last_time(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(orphans, "CHECK_SECONDS", 0.02)
    monkeypatch.setattr(orphans, "PERIOD_SECONDS", 0.1)
    folder = tmp_path / "storage"
    file = folder / avatars.FOLDER / f"{1:032x}" / "512.webp"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"x")
    hours_ago = time.time() - 2 * 3600
    os.utime(file, (hours_ago, hours_ago))
    storage = open_storage(load_settings(storage_url=f"file://{folder}"))
    folder.rename(tmp_path / "away")
    folder.write_bytes(b"in its place")
    lives = [asyncio.create_task(Orphans(database, storage, f"worker {number}").run()) for number in range(2)]
    try:

        async def has_looked() -> bool:
            async with database.read() as connection:
                found = await connection.execute(text("SELECT COUNT(*) FROM leases WHERE name = 'orphans'"))
                return bool(found.scalar_one())

        await eventually(has_looked, "somebody has looked, and found no folder")
        folder.unlink()
        (tmp_path / "away").rename(folder)
        await eventually(lambda: not file.exists(), "the next look deletes the file")
        assert not any(life.done() for life in lives)
    finally:
        for life in lives:
            life.cancel()
        await asyncio.gather(*lives, return_exceptions=True)
