"""A service that manages users and their movies: registering, signing in with a form, admins, small rate limits."""

from __future__ import annotations

from collections.abc import Callable

from tests.support.backends import SQLITE_ONLY
from tests.support.requests import assert_problem, ok
from tests.support.servers.mail import fresh_name
from tests.support.service import PASSWORD, Service


async def test_a_user_registers_and_signs_in_with_a_form(service: Service) -> None:
    name = fresh_name()
    async with service.anyone() as client:
        body = {"username": name, "email": f"{name}@example.org", "hashedPassword": PASSWORD, "name": "Holly Martins"}
        user = await ok(client.post("/users", json=body | {"phone_number": "436641234567"}), 201)
        assert (user["username"], user["group"], user["phone_number"]) == (name, "user", "+436641234567")
        assert "password" not in str(user).lower()
        assert_problem(await client.post("/users", json=body), 409, ["body", "username"], ["body", "email"])
        weak = body | {"username": f"{name}-2", "email": f"{name}-2@example.org", "hashedPassword": "short"}
        assert_problem(await client.post("/users", json=weak), 422, ["body", "hashedPassword"])

        # `username` may also be the email address; the token is that of OAuth2's password grant.
        for login in (name, f"{name}@example.org"):
            token = await ok(client.post("/token", data={"username": login, "password": PASSWORD}))
            assert (token["token_type"], token["user_id"]) == ("bearer", user["id"])
        wrong = await client.post("/token", data={"username": name, "password": "not the password"})
        assert (wrong.status_code, wrong.headers["www-authenticate"]) == (401, "Bearer")
        client.headers["Authorization"] = f"Bearer {token['access_token']}"
        assert await ok(client.get("/users/me")) == user


async def test_a_user_lists_movies_under_the_own_id_and_name(service: Service) -> None:
    async with service.person() as holly, service.person() as anna, service.anyone() as public:
        mine = f"/users/{holly.id}/movies"
        movie = await ok(holly.http.post(mine, json={"title": "The Third Man", "rating": 93}), 201)
        await ok(holly.http.post("/movies", json={"title": "The Fallen Idol"}), 201)
        assert (movie["user_id"], movie["rating"]) == (holly.id, 93)
        assert (await anna.http.post(mine, json={"title": "Not hers"})).status_code == 403
        for path in (mine, f"/movies/username/{holly.name}"):
            titles = [each["title"] for each in await ok(public.get(f"{path}?sort=title"))]
            assert titles == ["The Fallen Idol", "The Third Man"]
        assert await ok(holly.http.get("/movies/user?skip=0&limit=1")) == [movie]
        assert (await public.get("/movies/user")).status_code == 401
        assert (await public.get("/movies/username/nobody.at.all")).status_code == 404


async def test_admins_manage_the_users(service: Service) -> None:
    async with service.admin() as chief, service.person() as holly, service.person() as anna:
        # Users see one another's names; admins see whole accounts.
        assert await ok(anna.http.get(f"/users/{holly.id}")) == {"id": holly.id, "username": holly.name, "name": None}
        found = await ok(chief.http.get(f"/users?q={holly.name}&skip=0&limit=10"))
        assert [(each["id"], each["is_active"]) for each in found] == [(holly.id, True)]
        everyone = await ok(chief.http.get(f"/users/nonAdmin?id[in]={chief.id},{holly.id},{anna.id}"))
        assert [each["id"] for each in everyone] == [holly.id, anna.id]
        assert (await anna.http.get("/users/nonAdmin")).status_code == 403

        account = await ok(chief.http.get(f"/users/{holly.id}"))
        changed = await ok(chief.http.put(f"/users/{holly.id}", json=account | {"name": "Holly M."}))
        assert (changed["name"], changed["version"]) == ("Holly M.", account["version"] + 1)
        assert (await anna.http.put(f"/users/{holly.id}", json={"username": "taken-over"})).status_code == 403
        assert (await anna.http.delete(f"/users/{holly.id}")).status_code == 403
        assert (await chief.http.delete(f"/users/{holly.id}")).status_code == 204
        assert (await chief.http.get(f"/users/{holly.id}")).status_code == 404
        assert (await holly.http.get("/users/me")).status_code == 401
        # A user may delete the own account, and change the own name with the password.
        renamed = {"username": f"{anna.name}-s", "password": PASSWORD}
        assert (await ok(anna.http.put("/users/me", json=renamed)))["username"] == renamed["username"]
        assert (await anna.http.delete(f"/users/{anna.id}")).status_code == 204


@SQLITE_ONLY
async def test_small_rate_limits_are_a_setting(new_service: Callable[..., Service]) -> None:
    service = new_service(RATE_LIMITS="POST /users=3/minute; GET /users=10/minute").start()
    async with service.admin() as chief:
        for number in range(4):
            answer = await chief.http.post("/users", json={"username": f"holly{number}", "password": PASSWORD})
            assert answer.status_code == (201 if number < 3 else 429)
        assert 0 < int(answer.headers["retry-after"]) <= 60
        for number in range(11):
            answer = await chief.http.get("/users")
            assert answer.status_code == (200 if number < 10 else 429)
        assert answer.headers["ratelimit-policy"].startswith('"GET /users";q=10;w=60')
        assert (await chief.http.get("/users/me")).status_code == 200, "other routes keep their own limits"
