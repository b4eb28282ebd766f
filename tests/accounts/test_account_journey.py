"""The whole life of an account in one test, with a mail folder and local files or with a mail server and S3."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from email.message import EmailMessage
from pathlib import Path

import pytest

from tests.conftest import Places
from tests.support.pictures import photo
from tests.support.servers.mail import MailServer, fresh_name, link_in, mail_in, token_in
from tests.support.servers.s3 import S3Server
from tests.support.service import PASSWORD, Service, eventually

NEW_PASSWORD = "the ferris wheel turns"
NEWEST_PASSWORD = "cuckoo clock of Vienna"


class Letters:
    """The emails that the service sent to a mail server or wrote to a folder."""

    def __init__(self, server: MailServer | None, folder: Path) -> None:
        self.server = server
        self.folder = folder

    async def to(self, address: str, number: int) -> EmailMessage:
        """Return the `number`-th email to an address, counted from 1."""
        if self.server is not None:
            return await self.server.mail_to(address, number)
        return await mail_in(self.folder, address, number)


@pytest.fixture
def place(
    backend: str, new_places: Callable[[], Places], new_service: Callable[..., Service], tmp_path: Path
) -> Iterator[tuple[Service, Letters]]:
    settings = {"ACCOUNT_ACTIVATION": "email", "PUBLIC_URL": "https://movies.example.org"}
    with ExitStack() as stack:
        server = None
        if backend == "sqlite":
            settings |= {"MAIL_FOLDER": str(tmp_path / "mails"), "STORAGE_URL": f"file://{tmp_path}/files"}
        else:
            server = stack.enter_context(MailServer().running())
            settings |= {"SMTP_URL": server.url, **stack.enter_context(S3Server()).settings("journey")}
        yield new_service(new_places(), **settings).start(), Letters(server, tmp_path / "mails")


async def test_the_life_of_an_account(place: tuple[Service, Letters]) -> None:
    service, letters = place
    name = fresh_name()
    address = f"{name}@example.org"
    async with service.anyone() as holly, service.anyone() as stranger:

        async def sign_in(password: str) -> int:
            answer = await holly.post("/auth/login", json={"username": name, "password": password})
            if answer.status_code == 200:
                holly.headers["Authorization"] = f"Bearer {answer.json()['access_token']}"
            return answer.status_code

        registered = {"username": name, "email": address, "password": PASSWORD}
        assert (await holly.post("/auth/register", json=registered)).status_code == 201
        assert await sign_in(PASSWORD) == 403
        letter = await letters.to(address, 1)
        link = link_in(letter).removeprefix("https://movies.example.org")
        assert (await holly.get(link)).status_code == 200
        assert await sign_in(PASSWORD) == 403  # a GET must not activate the account: mail scanners follow links
        assert (await holly.post("/auth/activate", json={"token": token_in(letter)})).status_code == 200
        assert await sign_in(PASSWORD) == 200

        change = {"old_password": PASSWORD, "new_password": NEW_PASSWORD}
        assert (await holly.post("/auth/password/change", json=change)).status_code in (200, 204)
        assert (await holly.get("/auth/me")).status_code == 200
        assert (await sign_in(PASSWORD), await sign_in(NEW_PASSWORD)) == (401, 200)

        assert (await stranger.post("/auth/password/forgot", json={"email": address})).status_code == 202
        # The second email was the notice that the password was changed.
        reset = {"token": token_in(await letters.to(address, 3)), "new_password": NEWEST_PASSWORD}
        assert (await stranger.post("/auth/password/reset", json=reset)).status_code == 204
        assert (await holly.get("/auth/me")).status_code == 401
        holly.headers.pop("Authorization")
        assert (await sign_in(NEW_PASSWORD), await sign_in(NEWEST_PASSWORD)) == (401, 200)

        shown = await holly.put("/users/me/avatar", files={"avatar": ("me.png", photo(), "image/png")})
        assert shown.status_code == 200, shown.text
        avatar = shown.json()["avatar_url"]
        assert (await stranger.get(avatar)).headers["content-type"] == "image/webp"

        movie = (await holly.post("/movies", json={"title": "The Third Man"})).json()
        assert (await holly.delete("/users/me")).status_code == 204
        holly.headers.pop("Authorization")
        assert await sign_in(NEWEST_PASSWORD) == 401

        async def is_gone() -> bool:
            return (await stranger.get(avatar)).status_code == 404

        await eventually(is_gone, "the picture is gone")
        # The movies that Holly added stay, and her user name is free again.
        assert (await stranger.get(f"/movies/{movie['id']}")).json()["user_id"] == movie["user_id"]
        assert (await stranger.post("/auth/register", json=registered)).status_code == 201
