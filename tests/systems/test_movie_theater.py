"""A theater's service: accounts activated by email, profiles with pictures, user groups, and movies with casts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.conftest import Places
from tests.support.pictures import opened, photo
from tests.support.requests import assert_problem, change_group, ok
from tests.support.servers.mail import fresh_name, link_in, mail_in, token_in
from tests.support.servers.s3 import S3Server
from tests.support.service import PASSWORD, Person, Service

SECOND_PASSWORD = "the ferris wheel turns"
THIRD_PASSWORD = "cuckoo clock of Vienna"


@pytest.fixture(scope="module")
def theater(
    backend: str, new_places: Callable[[], Places], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Service]:
    """A service that emails activation URLs, to a folder. With PostgreSQL, it keeps pictures in a bucket."""
    places, folder = new_places(), tmp_path_factory.mktemp("theater")
    settings = {"ACCOUNT_ACTIVATION": "email", "MAIL_FOLDER": str(folder / "mails")}
    with ExitStack() as stack:
        if backend == "postgres":
            settings |= stack.enter_context(S3Server()).settings("theater")
        else:
            settings["STORAGE_URL"] = f"file://{folder}/files"
        service = Service(places.database_url, places.broadcast_url, folder, **settings)
        yield stack.enter_context(service.running())


@pytest.fixture
def mails(theater: Service) -> Path:
    return Path(theater.settings["MAIL_FOLDER"])


async def member(chief: Person, theater: Service, name: str) -> str:
    """Let the admin add an active account, and return its access token."""
    body = {"username": name, "email": f"{name}@example.org", "password": PASSWORD}
    await ok(chief.http.post("/admin/users", json=body), 201)
    tokens = await ok(chief.http.post("/auth/login", json=body))
    return str(tokens["access_token"])


async def test_an_account_is_activated_by_email(theater: Service, mails: Path) -> None:
    account = {"email": f"{fresh_name()}@example.org", "password": PASSWORD}
    async with theater.anyone() as holly:
        user = await ok(holly.post("/auth/register", json=account), 201)
        assert (user["email"], user["is_active"], user["awaits_activation"]) == (account["email"], False, True)
        early = await holly.post("/auth/login", json=account)
        assert early.status_code == 403
        assert "not activated" in early.json()["detail"]
        assert_problem(await holly.post("/auth/register", json=account | {"password": "short"}), 422)

        mail = await mail_in(mails, account["email"])
        page = await holly.get(link_in(mail).removeprefix(theater.url), headers={"Accept": "text/html"})
        assert (page.status_code, "<button" in page.text) == (200, True), "the page asks before it activates"
        activated = await ok(holly.post("/auth/activate", json={"token": token_in(mail)}))
        assert (activated["is_active"], activated["awaits_activation"]) == (True, False)
        assert (await holly.post("/auth/activate", json={"token": token_in(mail)})).status_code == 404

        # Another URL: the response is the same for every address, so that it reveals none.
        answers = [
            await holly.post("/auth/activate/resend", json={"email": each})
            for each in (account["email"], "nobody.at.all@example.org")
        ]
        assert [(each.status_code, each.json()) for each in answers] == [(202, answers[0].json())] * 2
        assert (await holly.post("/auth/login", json=account)).status_code == 200


async def test_a_session_is_refreshed_and_ended(theater: Service) -> None:
    async with theater.admin() as chief, theater.anyone() as holly:
        name = fresh_name()
        await member(chief, theater, name)
        login = {"email": f"{name}@example.org", "password": PASSWORD}
        first = await ok(holly.post("/auth/login", json=login))
        assert (first["token_type"], first["expires_in"]) == ("bearer", 15 * 60)
        second = await ok(holly.post("/auth/refresh", json={"refresh_token": first["refresh_token"]}))
        holly.headers["Authorization"] = f"Bearer {second['access_token']}"
        assert (await ok(holly.get("/auth/me")))["username"] == name
        # A refresh token is valid once: a second use is treated as theft, and ends the session.
        assert (await holly.post("/auth/refresh", json={"refresh_token": first["refresh_token"]})).status_code == 401
        assert (await holly.get("/auth/me")).status_code == 401

        third = await ok(holly.post("/auth/login", json=login))
        holly.headers["Authorization"] = f"Bearer {third['access_token']}"
        assert (await holly.post("/auth/logout")).status_code == 204
        assert (await holly.post("/auth/refresh", json={"refresh_token": third["refresh_token"]})).status_code == 401


async def test_a_password_is_changed_forgotten_and_reset(theater: Service, mails: Path) -> None:
    async with theater.admin() as chief, theater.anyone() as holly, theater.anyone() as phone:
        name = fresh_name()
        address = f"{name}@example.org"
        holly.headers["Authorization"] = f"Bearer {await member(chief, theater, name)}"
        tokens = await ok(phone.post("/auth/login", json={"email": address, "password": PASSWORD}))
        phone.headers["Authorization"] = f"Bearer {tokens['access_token']}"

        change = {"old_password": PASSWORD, "new_password": SECOND_PASSWORD}
        wrong = await holly.post("/auth/password/change", json=change | {"old_password": "not the password"})
        assert_problem(wrong, 403, ["body", "old_password"])
        assert (await holly.post("/auth/password/change", json=change)).status_code == 204
        assert [(await each.get("/auth/me")).status_code for each in (holly, phone)] == [200, 401]

        forgot = [
            await phone.post("/auth/password/forgot", json={"email": each}) for each in (address, "x@example.org")
        ]
        assert [(each.status_code, each.json()) for each in forgot] == [(202, forgot[0].json())] * 2
        token = token_in(await mail_in(mails, address, 2))  # the first email says that the password was changed
        reset = {"token": token, "new_password": THIRD_PASSWORD}
        assert (await phone.post("/auth/password/reset", json=reset)).status_code == 204
        assert (await phone.post("/auth/password/reset", json=reset)).status_code == 404
        assert (await holly.get("/auth/me")).status_code == 401
        for password, status in ((SECOND_PASSWORD, 401), (THIRD_PASSWORD, 200)):
            assert (
                await phone.post("/auth/login", json={"email": address, "password": password})
            ).status_code == status


async def test_a_profile_has_a_picture(theater: Service) -> None:
    async with theater.admin() as chief, theater.anyone() as holly, theater.anyone() as anna:
        holly.headers["Authorization"] = f"Bearer {await member(chief, theater, fresh_name())}"
        anna.headers["Authorization"] = f"Bearer {await member(chief, theater, fresh_name())}"
        path = f"/users/{(await ok(holly.get('/auth/me')))['id']}/profile"
        form = {"first_name": "Holly", "last_name": "Martins", "gender": "male", "date_of_birth": "1905-05-15"}
        picture = {"avatar": ("me.png", photo(kind="PNG"), "image/png")}
        not_one = {"avatar": ("me.png", b"not a picture", "image/png")}
        assert_problem(await holly.post(path, data=form, files=not_one), 422, ["body", "avatar"])
        profile = await ok(holly.post(path, data=form | {"info": "Writes westerns."}, files=picture), 201)
        assert profile == profile | form
        assert (await holly.post(path, data=form, files=picture)).status_code == 409
        shown = await anna.get(profile["avatar_url"])
        assert (shown.headers["content-type"], opened(shown.content).size) == ("image/webp", (480, 480))

        # What GET returns can be edited and sent back.
        profile = await ok(holly.get(path))
        replaced = await ok(holly.put(path, json=profile | {"info": "Wrote westerns."}))
        assert (replaced["info"], replaced["avatar_url"]) == ("Wrote westerns.", profile["avatar_url"])
        assert (await ok(holly.patch(path, json={"gender": "undisclosed"})))["first_name"] == "Holly"
        assert (await anna.get(path)).status_code == 403
        assert (await ok(chief.http.get(path)))["last_name"] == "Martins"


async def test_admins_change_groups_and_activate_accounts(theater: Service) -> None:
    async with theater.admin() as chief, theater.anyone() as holly:
        account = {"email": f"{fresh_name()}@example.org", "password": PASSWORD}
        user = await ok(holly.post("/auth/register", json=account), 201)
        assert (await ok(chief.http.post(f"/admin/users/{user['id']}/activate")))["is_active"] is True
        tokens = await ok(holly.post("/auth/login", json=account))
        holly.headers["Authorization"] = f"Bearer {tokens['access_token']}"
        path = f"/admin/users/{user['id']}/change-group"
        assert (await holly.post(path, json={"group": "admin"})).status_code == 403
        assert_problem(await chief.http.post(path, json={"group": "director"}), 422, ["body", "group"])
        assert (await holly.post("/genres", json={"name": "Heist"})).status_code == 403
        assert (await ok(chief.http.post(path, json={"group": "moderator"})))["group"] == "moderator"
        await ok(holly.post("/genres", json={"name": "Heist"}), 201)  # from the next request on


async def test_moderators_keep_movies_with_genres_actors_and_languages(theater: Service) -> None:
    async with theater.admin() as chief, theater.anyone() as mod, theater.anyone() as public:
        mod.headers["Authorization"] = f"Bearer {await member(chief, theater, fresh_name())}"
        me = await ok(mod.get("/auth/me"))
        await change_group(chief, Person(mod, me["id"], me["username"], ""), "moderator")
        welles = await ok(
            mod.post("/actors", json={"name": "Orson Welles", "birth_date": "1915-05-06", "country": "US"}), 201
        )
        movie = await ok(
            mod.post(
                "/movies",
                json={
                    "title": "The Third Man",
                    "release_date": "1949-09-01",
                    "status": "Released",
                    "budget": 1_500_000,
                    "country": "GB",
                    "languages": ["English", "de"],
                    "genres": ["Film noir"],
                    "actors": [welles["id"], "Alida Valli"],
                },
            ),
            201,
        )
        assert movie["actors"] == ["Orson Welles", "Alida Valli"], "an actor that was unknown has been added"
        lime = {"name": "Harry Lime", "movie_id": movie["id"], "actor_id": welles["id"]}
        character = await ok(mod.post("/characters", json=lime), 201)
        cast = await ok(public.get(f"/movies/{movie['id']}?include=characters"))
        assert [each["id"] for each in cast["characters"]] == [character["id"]]
        actor = await ok(public.get(f"/actors/{welles['id']}?include=characters"))
        assert (actor["movies_count"], actor["characters_count"], len(actor["characters"])) == (1, 1, 1)
        assert [each["id"] for each in await ok(public.get(f"/actors/{welles['id']}/movies"))] == [movie["id"]]
        assert [each["id"] for each in await ok(public.get("/countries/GB/movies"))] == [movie["id"]]
        second = await ok(mod.post("/movies", json={"title": "Touch of Evil", "actors": [welles["id"]]}), 201)
        similar = await ok(public.get(f"/movies/{movie['id']}/similar?fields=title"))
        assert similar == [{"title": second["title"]}]
        assert (await mod.delete(f"/actors/{welles['id']}")).status_code == 204
        assert (await ok(public.get(f"/movies/{movie['id']}")))["actors"] == ["Alida Valli"]
        # Files of the whole list, for a spreadsheet and back.
        table = await public.get("/movies/export?format=csv&fields=title,country&sort=title")
        assert table.text.splitlines() == ["title,country", "The Third Man,GB", "Touch of Evil,"]
