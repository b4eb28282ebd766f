"""What GET returned can be sent back: read-only members are accepted if they have their current values."""

from __future__ import annotations

from typing import Any

from repository.accounts.users import EDITABLE
from resources.accounts.profiles import ProfileBody
from resources.registry import RESOURCES
from tests.support.requests import assert_problem, ok, over_socket
from tests.support.resources import nothing_written
from tests.support.service import PASSWORD, Service


async def test_an_entity_can_be_sent_back(service: Service) -> None:
    async with service.admin() as chief, service.watch(additional_headers=chief.bearer) as watcher:
        movie = await chief.add(
            country="GB", languages=["English"], genres=["Noir"], actors=[f"An actor {service.port}"]
        )
        character = await chief.add("characters", movie_id=movie["id"])
        comment = await ok(chief.http.post(f"/movies/{movie['id']}/comments", json={"text": "Zither!"}), 201)
        rating = await ok(chief.http.post(f"/movies/{movie['id']}/ratings", json={"score": 9}), 201)
        entry = await ok(chief.http.post("/watchlist", json={"movie_id": movie["id"], "status": "watched"}), 201)
        ids = {"movies": movie["id"], "characters": character["id"], "comments": comment["id"]}
        ids |= {"ratings": rating["id"], "watchlist": entry["id"], "countries": "GB", "languages": "en"}
        for name in ("genres", "actors"):
            ids[name] = (await ok(chief.http.get(f"/{name}?sort=-id&limit=1")))[0]["id"]
        assert set(ids) == {each.name for each in RESOURCES}, "every resource is tested"
        for resource in RESOURCES:
            row = await ok(chief.http.get(f"/{resource.name}/{ids[resource.name]}"))
            path = f"/{resource.name}/{row['id']}"
            read_only = [name for name in row if name not in resource.defaults and row[name] is not None]
            async with nothing_written(service):
                for method in ("PUT", "PATCH"):
                    assert await ok(chief.http.request(method, path, json=row)) == row
                reply = await over_socket(watcher, "PUT", path, row)
                assert (reply["status"], reply["body"]) == (200, row)
                for name in read_only:
                    assert_other_is_rejected(await chief.http.patch(path, json={name: other(row[name])}), name)
                wrong = {name: other(row[name]) for name in read_only if name != "version"}
                answer = await chief.http.put(path, json=row | wrong)
                assert_problem(answer, 422, *(["body", name] for name in wrong))
                assert_problem(await chief.http.put(path, json=row | {"stars": 5}), 422, ["body", "stars"])
                if not (resource.has_own_writes or resource.has_own_routes):
                    bulk = await ok(chief.http.patch(f"/{resource.name}/bulk", json=[row, {**row, "id": 10**9}]))
                    assert bulk == {"updated": [row], "not_found": [10**9]}
                    rows = [row, row | {"created_at": "x"}, row | {"version": 7}]
                    answer = await chief.http.patch(f"/{resource.name}/bulk", json=rows)
                    assert_problem(answer, 409, ["body", 2, "version"])
                    answer = await chief.http.patch(f"/{resource.name}/bulk", json=rows[:2])
                    assert_problem(answer, 422, ["body", 1, "created_at"])
        # A change beside them is made, and a derived member may have the form in which a client encodes a whole number.
        await ok(chief.http.patch(f"/ratings/{rating['id']}", json={"score": 10, "user_id": chief.id}))
        row = await ok(chief.http.get(f"/movies/{movie['id']}"))
        changed = await ok(chief.http.put(f"/movies/{movie['id']}", json=row | {"average_rating": 10, "title": "M"}))
        assert changed == row | {"title": "M", "version": 2, "updated_at": changed["updated_at"]}
        # A body from before another edit is outdated as a whole, as its version shows.
        assert_problem(await chief.http.put(f"/movies/{movie['id']}", json=row), 409, ["body", "version"])


async def test_an_account_and_a_profile_can_be_sent_back(service: Service) -> None:
    async with service.admin() as chief, service.person() as alice:
        await ok(alice.http.post("/users/me/profile", json={"first_name": "Alice", "gender": "female"}), 201)
        for person, path, edited, changed in (
            (alice, "/users/me", EDITABLE, {"name": "Al"}),
            (alice, f"/users/{alice.id}/profile", ProfileBody.model_fields, {"info": "Curious."}),
            (chief, f"/users/{alice.id}", EDITABLE, {"name": "Alice"}),
            (chief, f"/users/{chief.id}", EDITABLE, {}),
        ):
            row = await ok(person.http.get(path))
            read_only = [name for name in row if name not in edited and row[name] is not None]
            assert {"version", "created_at", "updated_at"} <= set(read_only)
            async with nothing_written(service):
                for method in ("PUT", "PATCH"):
                    assert await ok(person.http.request(method, path, json=row)) == row
                for name in read_only:
                    assert_other_is_rejected(await person.http.patch(path, json={name: other(row[name])}), name)
                for method in ("PUT", "PATCH"):
                    answer = await person.http.request(method, path, json=row | changed | {"version": 999})
                    assert_problem(answer, 409, ["body", "version"])
            if changed:
                answer = await ok(person.http.put(path, json=row | changed))
                assert answer == row | changed | {"version": row["version"] + 1, "updated_at": answer["updated_at"]}
                assert_problem(await person.http.put(path, json=row | changed), 409, ["body", "version"])
    # A new account has no such members.
    async with service.anyone() as client:
        body = {"username": f"{alice.name}-new", "password": PASSWORD, "version": 1}
        assert_problem(await client.post("/users", json=body), 422, ["body", "version"])


def assert_other_is_rejected(answer: Any, name: str) -> None:
    assert_problem(answer, 409 if name == "version" else 422, ["body", name])
    assert "Expected the current v" in answer.json()["detail"][0]["msg"]


def other(value: Any) -> Any:
    """Return another value of the same type."""
    if isinstance(value, bool):
        return not value
    return value + 1 if isinstance(value, int | float) else f"{value}x"
