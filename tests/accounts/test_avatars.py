"""Avatars: uploading, showing, replacing and deleting them, in a folder (SQLite) and in an S3 bucket (PostgreSQL)."""

from __future__ import annotations

import asyncio
import itertools
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
from tests.support.backends import SQLITE_ONLY
from tests.support.pictures import EVIL, opened, photo
from tests.support.requests import change_group, ok, over_socket
from tests.support.servers.s3 import S3Server
from tests.support.servers.server import MissingServer
from tests.support.service import Person, Service, eventually
from tests.support.sockets import signed_in

MINE = "/users/me/avatar"
# These tests are about concurrent uploads, not about rate limits.
RARELY_LIMITED = "; ".join(
    f"{route}=100000/minute" for route in ("POST /auth/register", "POST /auth/login", f"PUT {MINE}")
)


@dataclass
class Gallery:
    """A service, and the folder that holds its pictures: its storage folder, or the folder of the S3 server."""

    service: Service
    folder: Path
    s3: S3Server | None

    def files(self) -> set[str]:
        base = self.folder / avatars.FOLDER
        return {path.relative_to(base).as_posix() for path in base.rglob("*") if path.is_file()}

    def files_of(self, account: dict[str, Any]) -> set[str]:
        """Return the names of the files that must exist for this account."""
        name = account["avatar_url"].split("/")[2]
        return {f"{name}/{side}.webp" for side in avatars.SIDES}

    def settings(self) -> dict[str, str]:
        return {name: self.service.settings[name] for name in self.service.settings if name[:3] in ("STO", "S3_")}

    @contextmanager
    def away(self) -> Iterator[None]:
        """Make the storage unavailable while the block runs."""
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
        own, settings = tmp_path_factory.mktemp("gallery"), settings | {"RATE_LIMITS": RARELY_LIMITED}
        service = Service(places.database_url, places.broadcast_url, own, **settings)
        yield Gallery(stack.enter_context(service.running()), folder, s3)


async def put_avatar(person: Person, content: bytes, path: str = MINE, **options: Any) -> httpx.Response:
    return await person.http.put(path, files={"avatar": ("me.png", content, "image/png")}, **options)


async def uploaded(person: Person, content: bytes | None = None) -> dict[str, Any]:
    account: dict[str, Any] = await ok(put_avatar(person, content or photo()))
    return account


async def me(person: Person) -> dict[str, Any]:
    account: dict[str, Any] = (await person.http.get("/auth/me")).json()
    return account


# --- uploading and showing


async def test_an_avatar_is_shown_in_two_sizes(gallery: Gallery) -> None:
    async with gallery.service.person() as alice, gallery.service.anyone() as anonymous:
        before = await me(alice)
        assert (before["avatar_url"], before["avatar_thumbnail_url"]) == (None, None)
        answer = await put_avatar(alice, photo(900, 700))
        assert answer.status_code == 200
        account = answer.json()
        assert account["version"] == before["version"] + 1
        assert answer.headers["etag"].startswith(f'"{account["version"]}-')
        assert await me(alice) == account
        for name, side in (("avatar_url", 512), ("avatar_thumbnail_url", 128)):
            shown = await anonymous.get(account[name])
            assert shown.status_code == 200
            assert opened(shown.content).size == (side, side)
            assert opened(shown.content).format == "WEBP"
        assert gallery.files_of(account) <= gallery.files()


@SQLITE_ONLY
async def test_the_body_may_be_the_picture_itself(gallery: Gallery) -> None:
    async with gallery.service.person() as alice:
        # The declared media type does not have to match the contents.
        for kind, declared in itertools.product(("JPEG", "PNG", "WEBP"), ("jpeg", "png", "webp")):
            await ok(alice.http.put(MINE, content=photo(kind=kind), headers={"Content-Type": f"image/{declared}"}))


async def test_avatars_are_cacheable_forever_and_never_run_as_a_page(gallery: Gallery) -> None:
    async with gallery.service.person() as alice, gallery.service.anyone() as anonymous:
        url = (await uploaded(alice))["avatar_url"]
        shown = await anonymous.get(url)
        wanted = {
            "content-type": "image/webp",
            "cache-control": "public, max-age=31536000, immutable",
            "x-content-type-options": "nosniff",
            "content-security-policy": "default-src 'none'; sandbox",
            "content-disposition": "inline",
            "cross-origin-resource-policy": "cross-origin",
        }
        assert wanted.items() <= dict(shown.headers).items()
        head = await anonymous.head(url)
        assert (head.status_code, head.content, head.headers["etag"]) == (200, b"", shown.headers["etag"])
        known = await anonymous.get(url, headers={"If-None-Match": shown.headers["etag"]})
        assert (known.status_code, known.content) == (304, b"")
        assert known.headers["cache-control"] == wanted["cache-control"]
        assert (await anonymous.get(f"/avatars/{'0' * 32}/512")).status_code == 404
        for wrong in (url.replace("512", "513"), url.upper(), "/avatars/..%2f..%2fetc/512", "/avatars/%00/512"):
            answer = await anonymous.get(wrong)
            assert answer.status_code in (404, 422), wrong
            assert answer.headers["content-type"] == "application/json"


async def test_replaced_and_deleted_avatars_are_gone(gallery: Gallery) -> None:
    async with gallery.service.person() as alice:
        first = await uploaded(alice)
        second = await uploaded(alice, photo(colour="blue"))
        assert second["avatar_url"] != first["avatar_url"]
        assert not gallery.files_of(first) & gallery.files()
        assert gallery.files_of(second) <= gallery.files()
        assert (await alice.http.get(first["avatar_url"])).status_code == 404
        for _ in range(2):  # the second request finds nothing to delete
            assert (await alice.http.delete(MINE)).status_code == 204
            assert (await me(alice))["version"] == second["version"] + 1
        assert (await me(alice))["avatar_url"] is None
        assert not gallery.files_of(second) & gallery.files()


async def test_the_files_of_a_deleted_account_are_gone(gallery: Gallery) -> None:
    async with gallery.service.person() as alice:
        account = await uploaded(alice)
        assert (await alice.http.delete("/users/me")).status_code == 204
        assert not gallery.files_of(account) & gallery.files()


async def test_a_new_avatar_reaches_only_its_owner_and_admins(gallery: Gallery) -> None:
    service = gallery.service
    async with service.person() as alice, service.admin() as chief, service.person() as bob:
        async with (
            service.watch("topics=account", **signed_in(alice)) as own,
            service.watch("topics=users", **signed_in(chief)) as office,
            service.watch("topics=account", **signed_in(bob)) as other,
        ):
            account = await uploaded(alice)
            for watcher in (own, office):
                event = await watcher.expect("update")
                assert event["data"] == account
                assert set(event["changed"]) == {"avatar_url", "avatar_thumbnail_url"}
            await uploaded(bob)
            assert (await other.expect("update"))["data"]["id"] == bob.id


# --- rights and versions


async def test_only_the_owner_and_admins_change_an_avatar(gallery: Gallery) -> None:
    service = gallery.service
    async with service.person() as alice, service.person() as bob, service.admin() as chief:
        await change_group(chief, bob, "moderator")
        path = f"/users/{alice.id}/avatar"
        files = gallery.files()
        form = {"avatar": ("me.png", photo(), "image/png")}
        assert (await bob.http.put(path, files=form)).status_code == 403
        assert (await bob.http.delete(path)).status_code == 403
        assert (await put_avatar(chief, photo(), "/users/999999999/avatar")).status_code == 404
        assert (await chief.http.delete("/users/999999999/avatar")).status_code == 404
        assert gallery.files() == files
        assert (await put_avatar(alice, photo(), path)).status_code == 200
        assert (await put_avatar(chief, photo(colour="blue"), path)).status_code == 200
        assert (await chief.http.delete(path)).status_code == 204
        entries = (await chief.http.get("/admin/audit", params={"user_id": alice.id})).json()
        done = [(each["action"], each["actor_id"], each["changes"]) for each in entries]
        # The entries contain no values, because a picture is personal data. Alice's own changes have no entries.
        assert done == [("avatar", chief.id, {"avatar_url": [], "avatar_thumbnail_url": []})] * 2


async def test_if_match_is_honoured_and_a_rejected_upload_leaves_no_file(gallery: Gallery) -> None:
    async with gallery.service.person() as alice:
        first = await uploaded(alice)
        files = gallery.files()
        for method in ("PUT", "DELETE"):
            stale = {"If-Match": f'"{first["version"] - 1}-0000000000000000"'}
            form = {"avatar": photo()} if method == "PUT" else None
            assert (await alice.http.request(method, MINE, files=form, headers=stale)).status_code == 412
        assert gallery.files() == files
        assert await me(alice) == first
        fresh = {"If-Match": f'"{first["version"]}-0000000000000000"'}
        assert (await put_avatar(alice, photo(), headers=fresh)).status_code == 200


# --- profiles


async def test_a_profile_form_may_contain_the_avatar(gallery: Gallery) -> None:
    async with gallery.service.person() as alice:
        path = f"/users/{alice.id}/profile"
        brought = {"avatar": ("../../me.svg", photo(), "text/html")}
        profile = await ok(alice.http.post(path, data={"first_name": "Alice", "info": ""}, files=brought), 201)
        assert (profile["first_name"], profile["info"]) == ("Alice", None)
        assert (await alice.http.get(profile["avatar_url"])).status_code == 200
        assert (await alice.http.post(path, data={"first_name": "Alice"}, files=brought)).status_code == 409
        assert gallery.files_of(profile) <= gallery.files()
        for method, fields in (("PATCH", {"info": "Acts."}), ("PUT", {"first_name": "Anna"})):
            answer = await alice.http.request(method, path, data=fields, files=brought)
            assert answer.status_code == 200, answer.text
            former, profile = profile, answer.json()
            assert fields.items() <= profile.items()
            assert not gallery.files_of(former) & gallery.files()
            assert gallery.files_of(profile) <= gallery.files()
        # A form without a file, or with the empty file that a browser sends when none is selected, keeps the avatar.
        for files in ({"avatar": ("", b"", "application/octet-stream")}, {"info": (None, b"Acts.")}):
            assert (await alice.http.put(path, files=files)).json()["avatar_url"] == profile["avatar_url"]
        # Rejected: a body that is only a picture (it would clear the other fields), and a selected file of 0 bytes.
        for method in ("PUT", "PATCH"):
            bare = await alice.http.request(method, path, content=photo(), headers={"Content-Type": "image/png"})
            assert bare.status_code == 415
            assert "multipart/form-data" in bare.json()["detail"]
            assert "image/png" not in bare.json()["detail"]
            empty = await alice.http.request(method, path, files={"avatar": ("me.png", b"", "image/png")})
            assert [each["loc"] for each in empty.json()["detail"]] == [["body", "avatar"]]
            assert empty.status_code == 422
        assert (await ok(alice.http.get(path)))["info"] == "Acts."
        wrong = await alice.http.patch(path, data={"gender": "x", "colour": "y"}, files=brought)
        assert {each["loc"][1] for each in wrong.json()["detail"]} == {"gender", "colour"}
        assert (await me(alice))["avatar_url"] == profile["avatar_url"]


async def test_a_repeated_profile_form_keeps_the_avatar(gallery: Gallery) -> None:
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
        assert before - gallery.files() == gallery.files_of(answers[0].json()), "the repeated request stored no file"


# --- invalid uploads


@SQLITE_ONLY
async def test_files_that_are_no_picture_are_rejected_and_not_stored(gallery: Gallery) -> None:
    async with gallery.service.person() as alice:
        account = await uploaded(alice)
        files = gallery.files()
        for name, make in EVIL.items():
            answer = await put_avatar(alice, make())
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
        (form((FILE, b"")), 422, ["body", "avatar"]),
        ({"content": b"", "headers": {"Content-Type": "image/png"}}, 422, ["body", "avatar"]),
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
@SQLITE_ONLY
async def test_invalid_upload_bodies_are_rejected(
    gallery: Gallery, request_: dict[str, Any], status: int, loc: list[str] | None
) -> None:
    async with gallery.service.person() as alice:
        answer = await alice.http.put(MINE, **request_)
        assert answer.status_code == status, answer.text
        if loc is not None:
            assert loc in [each["loc"] for each in answer.json()["detail"]]


async def test_the_file_name_of_an_upload_is_ignored(gallery: Gallery) -> None:
    async with gallery.service.person() as alice:
        for name in ("../../../../etc/passwd", "/etc/passwd", "a\x00.png", "..\\..\\x.php", "x" * 900, "'\"; rm"):
            before = gallery.files()
            head = f'Content-Disposition: form-data; name="avatar"; filename="{name}"\r\nContent-Type: text/html'
            account = await ok(alice.http.put(MINE, **form((head, photo()))))
            assert gallery.files() - before == gallery.files_of(account)


@SQLITE_ONLY
async def test_pictures_do_not_travel_over_a_socket(gallery: Gallery) -> None:
    service = gallery.service
    async with service.person() as alice, service.watch("topics=account", **signed_in(alice)) as watcher:
        url = (await uploaded(alice))["avatar_url"]
        for method, path, body, status in (
            ("PUT", MINE, {"avatar": "x"}, 415),
            ("GET", url, None, 406),
            ("DELETE", MINE, None, 204),
        ):
            assert (await over_socket(watcher, method, path, body))["status"] == status


# --- interruptions


def uploading(service: Service, token: str, share: float) -> socket.socket:
    """Open a connection, send the given share of an upload, and return the connection."""
    request = form((FILE, photo(kind="PNG") + bytes(100_000)))
    body = request["content"]
    lines = [
        f"PUT {MINE} HTTP/1.1",
        f"Host: 127.0.0.1:{service.port}",
        f"Authorization: Bearer {token}",
        f"Content-Type: {request['headers']['Content-Type']}",
        f"Content-Length: {len(body)}",
        "Expect: 100-continue",
    ]
    connection = socket.create_connection(("127.0.0.1", service.port), timeout=30)
    connection.sendall("\r\n".join(lines).encode() + b"\r\n\r\n" + body[: int(len(body) * share)])
    return connection


@pytest.mark.parametrize("share", [0.0, 0.5, 0.999])
@SQLITE_ONLY
async def test_an_interrupted_upload_leaves_no_file(gallery: Gallery, share: float) -> None:
    async with gallery.service.person() as alice:
        account = await uploaded(alice)
        files = gallery.files()
        logged = gallery.service.log().count("client disconnected")
        connection = uploading(gallery.service, alice.token, share)
        assert connection.recv(12) == b"HTTP/1.1 100", "the service waits for the rest"
        # Make `close` reset the connection.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.close()
        await eventually(lambda: gallery.service.log().count("client disconnected") > logged, "the reset is logged")
        assert gallery.files() == files
        assert await me(alice) == account
        assert (await put_avatar(alice, photo())).status_code == 200, "the interrupted upload no longer counts"


@SQLITE_ONLY
async def test_slow_uploads_block_only_their_own_user(gallery: Gallery) -> None:
    service = gallery.service
    async with service.person() as alice, service.person() as bob:
        slow = [uploading(service, alice.token, 0.5) for _ in range(MAX_UPLOADS_PER_USER)]
        try:

            async def refused() -> httpx.Response | None:
                answer = await put_avatar(alice, photo())
                return answer if answer.status_code == 429 else None

            answer = await eventually(refused, "Alice has the maximum number of uploads")
            assert int(answer.headers["retry-after"]) >= 1
            assert (await put_avatar(bob, photo())).status_code == 200
        finally:
            for connection in slow:
                connection.close()

        async def taken() -> bool:
            return (await put_avatar(alice, photo())).status_code == 200

        await eventually(taken, "the interrupted uploads no longer count")


async def test_only_one_of_several_concurrent_uploads_stays(gallery: Gallery) -> None:
    async with gallery.service.person() as alice:
        before = gallery.files()
        colours = ("red", "blue")  # as many pictures as one user may have waiting to be converted
        answers = await asyncio.gather(*(put_avatar(alice, photo(colour=colour)) for colour in colours))
        assert [answer.status_code for answer in answers] == [200] * 2
        account = await me(alice)
        assert account["avatar_url"] in [answer.json()["avatar_url"] for answer in answers]
        assert account["version"] == 3
        assert gallery.files() - before == gallery.files_of(account)


async def test_an_unavailable_storage_is_a_503_and_changes_nothing(gallery: Gallery) -> None:
    async with gallery.service.person() as alice:
        account = await uploaded(alice)
        with gallery.away():
            for answer in (await put_avatar(alice, photo(colour="blue")), await alice.http.get(account["avatar_url"])):
                assert answer.status_code == 503
                assert answer.headers["retry-after"] == "1"
            assert await me(alice) == account
            # A deletion needs only the database; the clean-up removes the files later.
            assert (await alice.http.delete(MINE)).status_code == 204
        assert (await me(alice))["avatar_url"] is None
        assert gallery.files_of(account) <= gallery.files()
        assert (await put_avatar(alice, photo())).status_code == 200


# --- orphaned files


async def test_orphaned_files_are_deleted_when_they_are_old(gallery: Gallery, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_module, "FILES_PER_PAGE", 3)
    for name in list(os.environ):
        if name.startswith(("STORAGE_", "S3_")):
            monkeypatch.delenv(name)
    names = {name.lower(): value for name, value in gallery.settings().items()}
    storage = open_storage(load_settings(**names))
    database = Database(gallery.service.database_url)
    try:
        async with gallery.service.person() as alice:
            kept = gallery.files_of(await uploaded(alice))
            orphaned = {f"{number:032x}/{side}.webp" for number in range(1, 9) for side in avatars.SIDES}
            foreign = {"notes.txt", "0/512.webp"}
            for name in orphaned | foreign:
                await storage.put(f"{avatars.FOLDER}/{name}", b"x")
            assert await orphans.remove(database, storage) == 0
            assert orphaned <= gallery.files(), "young files are kept"
            later = datetime.now(UTC) + timedelta(hours=2)
            assert await orphans.remove(database, storage, later) >= len(orphaned)
            left = gallery.files()
            assert kept | foreign <= left
            assert not orphaned & left
            # Every remaining file belongs to an account.
            async with database.read() as connection:
                found = await connection.execute(text("SELECT avatar FROM users WHERE avatar IS NOT NULL"))
                assert {name.partition("/")[0] for name in left - foreign} <= set(found.scalars())
    finally:
        await database.close()
        for name in foreign:
            (gallery.folder / avatars.FOLDER / name).unlink()
        shutil.rmtree(gallery.folder / avatars.FOLDER / "0", ignore_errors=True)


@SQLITE_ONLY
async def test_the_orphan_scan_is_repeated_after_a_failure(
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

        async def has_scanned() -> bool:
            async with database.read() as connection:
                found = await connection.execute(text("SELECT COUNT(*) FROM leases WHERE name = 'orphans'"))
                return bool(found.scalar_one())

        await eventually(has_scanned, "a scan has started without the folder")
        folder.unlink()
        (tmp_path / "away").rename(folder)
        await eventually(lambda: not file.exists(), "the next scan deletes the file")
        assert not any(life.done() for life in lives)
    finally:
        for life in lives:
            life.cancel()
        await asyncio.gather(*lives, return_exceptions=True)
