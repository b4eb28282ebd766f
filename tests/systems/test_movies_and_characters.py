"""A real-time catalog: movies with their characters, one by one, in bulk and generated, live on a websocket."""

from __future__ import annotations

from tests.support.requests import assert_problem, ok
from tests.support.servers.mail import fresh_name
from tests.support.service import PASSWORD, Service
from tests.support.sockets import subscribed


async def test_writes_arrive_on_the_websocket(service: Service) -> None:
    async with service.anyone() as holly, service.watch("topics=movies,characters") as screen:
        name = fresh_name()
        user = await ok(holly.post("/auth/register", json={"username": name, "password": PASSWORD}), 201)
        tokens = await ok(holly.post("/api/v1/auth/login/", json={"username": name, "password": PASSWORD}))
        holly.headers["Authorization"] = f"Bearer {tokens['access_token']}"
        movie = await ok(holly.post("/movies/", json={"title": "The Third Man", "rating": 93}), 201)
        added = await screen.expect("add", "movies")
        assert (added["data"], added["actor_id"]) == (movie, user["id"])

        body = {"name": "Harry Lime", "description": "Sells diluted penicillin.", "movie_id": movie["id"]}
        character = await ok(holly.post(f"/users/{user['id']}/characters", json=body), 201)
        assert (await screen.expect("add", "characters"))["data"] == character
        assert (await screen.expect("update", "movies"))["changed"] == ["characters_count"]
        whole = await ok(holly.get(f"/movies/{movie['id']}?include=characters"))
        assert (whole["characters_count"], whole["characters"]) == (1, [character])

        changed = await ok(holly.patch(f"/movies/{movie['id']}", json={"rating": 94}))
        assert (await screen.expect("update", "movies"))["data"] == changed
        answer = await holly.delete(f"/characters/{character['id']}")
        gone = await screen.expect("delete", "characters")
        assert (answer.status_code, gone["data"]) == (204, {"id": character["id"]})
        # Every answer to a write tells the position at which the stream has its last event.
        await screen.expect("update", "movies")
        assert answer.headers["stream-position"].endswith(f":{screen.seqs[-1]}")


async def test_a_client_that_was_away_gets_exactly_what_it_missed(service: Service) -> None:
    async with service.person() as holly:
        async with service.watch("topics=movies") as screen:
            await screen.sees(await holly.add(title="Seen"))
            position = f"{screen.welcome['data']['epoch']}:{screen.seqs[-1]}"
        missed = [await holly.add(title=f"Missed {number}") for number in range(3)]
        async with service.watch(f"topics=movies&since={position}") as screen:
            for movie in missed:
                await screen.sees(movie)


async def test_reads_are_public_and_by_user(service: Service) -> None:
    async with service.person() as holly, service.person() as anna, service.anyone() as public:
        movie = await holly.add(title="The Third Man", genres=["Noir"])
        await holly.add("characters", name="Harry Lime", movie_id=movie["id"])
        await holly.add("characters", name="Anna Schmidt", movie_id=movie["id"])
        mine = f"user_id={holly.id}"
        for resource, names in (("movies", ["The Third Man"]), ("characters", ["Anna Schmidt", "Harry Lime"])):
            label = "title" if resource == "movies" else "name"
            assert await ok(public.get(f"/{resource}/count?{mine}")) == {"count": len(names)}
            assert await ok(public.get(f"/{resource}/names?{mine}&sort={label}")) == names
            rows = await ok(public.get(f"/{resource}?{mine}"))
            for path in (f"/{resource}/username/{holly.name}", f"/users/{holly.id}/{resource}"):
                assert await ok(public.get(path)) == rows
            assert await ok(holly.http.get(f"/{resource}/user?skip=0&limit=10")) == rows
            assert await ok(anna.http.get(f"/{resource}/user")) == []
            assert (await public.get(f"/{resource}/{rows[0]['id']}")).json() == rows[0]


async def test_many_rows_are_written_at_once(service: Service) -> None:
    async with service.person() as holly, service.person() as anna, service.watch("topics=movies") as screen:
        rows = [{"title": f"Number {number}"} for number in range(5)]
        added = (await ok(holly.http.post("/movies/bulk", json=rows), 201))["added"]
        event = await screen.expect("add_bulk", "movies")
        assert (event["data"]["count"], event["data"]["items"]) == (5, added)
        bad = [*rows, {"title": ""}]
        assert_problem(await holly.http.post("/movies/bulk", json=bad), 422, ["body", 5, "title"])
        partly = await ok(holly.http.post("/movies/bulk?on_error=skip", json=bad), 201)
        assert (len(partly["added"]), [each["index"] for each in partly["skipped"]]) == (5, [5])

        ids = [row["id"] for row in added]
        edits = [{"id": ids[0], "rating": 50}, {"id": 10**9, "rating": 50}]
        assert (await anna.http.patch("/movies/bulk", json=edits)).status_code == 403
        edited = await ok(holly.http.patch("/movies/bulk", json=edits))
        assert ([each["rating"] for each in edited["updated"]], edited["not_found"]) == ([50], [10**9])
        deleted = await ok(holly.http.request("DELETE", "/movies/bulk", json={"ids": [ids[0], 10**9]}))
        assert deleted == {"deleted": [ids[0]], "not_found": [10**9]}
        rest = await ok(holly.http.delete(f"/movies/bulk/{ids[1]}/{ids[-1]}"))
        assert (rest["deleted"], rest["not_found"]) == (ids[1:], [])
        assert_problem(await holly.http.delete(f"/movies/bulk/{ids[-1]}/{ids[0]}"), 422, ["path", "end_id"])


async def test_generated_rows_stream_to_watchers(service: Service) -> None:
    async with service.person() as holly, service.watch("topics=movies,jobs") as screen:
        answer = await holly.http.post("/movies/generate/60?seed=7&batch_size=20")
        job = answer.json()
        assert (answer.status_code, answer.headers["location"]) == (202, f"/jobs/{job['id']}")
        assert (job["kind"], job["total"], job["seed"]) == ("generate_movies", 60, 7)
        rows = 0
        while rows < 60:
            frame = await screen.next()
            if frame["operation"] == "add_bulk" and frame["data"]["job_id"] == job["id"]:
                rows += frame["data"]["count"]
        ended = await holly.job_ended(job["id"])
        assert (ended["state"], ended["done"], rows) == ("done", 60, 60)
        again = await holly.generated("characters", 20, "?seed=7")
        assert again["kind"] == "generate_characters"
        slow = await holly.generate("movies", 1_000, "?rate=10&batch_size=1")
        assert (await ok(holly.http.delete(f"/jobs/{slow['id']}")))["state"] == "cancelled"


async def test_the_whole_api_is_on_the_socket(service: Service) -> None:
    async with service.person() as holly, service.watch("topics=jobs") as screen:
        assert (await screen.ask({"id": 1, "action": "auth", "token": holly.token}))["ok"]
        request = {"action": "request", "method": "POST", "path": "/movies", "body": {"title": "The Third Man"}}
        await screen.send({"id": 2, **request})
        reply = await screen.until(lambda frame: frame.get("reply_to") == 2)
        movie = reply["body"]
        assert (reply["status"], movie["user_id"]) == (201, holly.id)
        # A list and its changes in one subscription.
        await subscribed(screen, topics=["movies"], filter={"user_id": holly.id}, snapshot=True)
        snapshot = await screen.until(lambda frame: frame.get("operation") == "snapshot")
        assert snapshot["data"]["items"] == [movie]
        await holly.http.delete(f"/movies/{movie['id']}")
        gone = await screen.until(lambda frame: frame.get("operation") == "delete")
        assert gone["data"] == {"id": movie["id"]}
