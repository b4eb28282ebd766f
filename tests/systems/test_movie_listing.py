"""A service where users list movies that everyone reads, rates and comments, with replies to replies."""

from __future__ import annotations

from tests.support.requests import assert_problem, ok
from tests.support.servers.mail import fresh_name
from tests.support.service import PASSWORD, Service


async def test_a_user_registers_signs_in_and_lists_a_movie(service: Service) -> None:
    async with service.anyone() as holly:
        account = {"username": fresh_name(), "password": PASSWORD, "first_name": "Holly", "last_name": "Martins"}
        user = await ok(holly.post("/auth/register", json=account), 201)
        assert (await holly.post("/auth/register", json=account)).status_code == 409
        movie = {"title": "The Third Man", "description": "Vienna, after the war.", "release_date": "1949-09-01"}
        unsigned = await holly.post("/movies", json=movie)
        assert (unsigned.status_code, unsigned.headers["www-authenticate"]) == (401, "Bearer")

        signed_in = await ok(holly.post("/auth/login", json={"username": user["username"], "password": PASSWORD}))
        holly.headers["Authorization"] = f"Bearer {signed_in['access_token']}"
        answer = await holly.post("/movies", json=movie | {"genres": ["Noir"], "duration_minutes": 104})
        listed = answer.json()
        assert (answer.status_code, answer.headers["location"]) == (201, f"/movies/{listed['id']}")
        assert listed == listed | movie | {"genres": ["Noir"], "user_id": user["id"], "average_rating": None}
        assert_problem(
            await holly.post("/movies", json={"release_date": "1949-13-01"}),
            422,
            ["body", "title"],
            ["body", "release_date"],
        )


async def test_everyone_reads_the_movies_in_pages(service: Service) -> None:
    async with service.person() as holly, service.anyone() as public:
        for number in range(5):
            await holly.add(title=f"Number {number}", rating=10 + number)
        path = f"/movies?user_id={holly.id}"
        first = await public.get(f"{path}&skip=0&limit=2")
        assert [each["title"] for each in first.json()] == ["Number 0", "Number 1"]
        assert first.headers["x-total-count"] == "5"
        second = await ok(public.get(first.links["next"]["url"]))
        assert second == await ok(public.get(f"{path}&skip=2&limit=2"))
        assert await ok(public.get(f"{path}&rating[gte]=13&sort=-rating&fields=title")) == [
            {"title": "Number 4"},
            {"title": "Number 3"},
        ]
        assert await ok(public.get(f"/movies/{second[0]['id']}")) == second[0]
        assert await ok(public.get(f"/movies/count?user_id={holly.id}")) == {"count": 5}
        assert (await public.get("/movies/999999999")).status_code == 404
        assert_problem(await public.get("/movies?limit=5000"), 422, ["query", "limit"])


async def test_only_the_owner_and_staff_change_a_listed_movie(service: Service) -> None:
    async with service.person() as holly, service.person() as anna, service.admin() as chief:
        path = f"/movies/{(await holly.add(rating=90))['id']}"
        for answer in (
            await anna.http.put(path, json={"title": "Hers"}),
            await anna.http.patch(path, json={"title": "Hers"}),
            await anna.http.delete(path),
        ):
            assert answer.status_code == 403
        replaced = await ok(holly.http.put(path, json={"title": "The Third Man (1949)"}))
        assert (replaced["title"], replaced["rating"], replaced["version"]) == ("The Third Man (1949)", None, 2)
        assert (await ok(chief.http.patch(path, json={"rating": 91})))["title"] == "The Third Man (1949)"
        assert (await holly.http.delete(path)).status_code == 204
        assert (await anna.http.get(path)).status_code == 404


async def test_users_comment_and_reply(service: Service) -> None:
    async with service.person() as holly, service.person() as anna, service.anyone() as public:
        movie = await holly.add()
        comments = f"/movies/{movie['id']}/comments"
        assert (await public.post(comments, json={"text": "Anonymous"})).status_code == 401
        first = await ok(anna.http.post(comments, json={"text": "The zither alone is worth it."}), 201)
        reply = await ok(holly.http.post(f"/comments/{first['id']}/replies", json={"text": "And the shadows."}), 201)
        answer = await ok(anna.http.post(f"/comments/{reply['id']}/replies", json={"text": "And the cat."}), 201)
        await ok(holly.http.post(comments, json={"text": "Cuckoo clocks."}), 201)
        assert_problem(await anna.http.post(comments, json={"text": "!"}), 422, ["body", "text"])

        page = await public.get(f"{comments}?skip=0&limit=1")
        [tree] = page.json()
        assert page.headers["x-total-count"] == "2", "pages count the comments, not the replies to them"
        assert (tree["text"], tree["replies_count"]) == ("The zither alone is worth it.", 1)
        assert [each["text"] for each in tree["replies"][0]["replies"]] == ["And the cat."]
        assert [each["id"] for each in await ok(public.get(f"/comments/{first['id']}/replies"))] == [reply["id"]]
        assert (await ok(public.get(f"/movies/{movie['id']}")))["comments_count"] == 4

        assert (await anna.http.put(f"/comments/{reply['id']}", json={"text": "Not hers"})).status_code == 403
        edited = await ok(holly.http.put(f"/comments/{reply['id']}", json={"text": "And the long shadows."}))
        assert edited["edited_at"] is not None
        # A comment that has replies keeps its place, without its text and author.
        assert (await holly.http.delete(f"/comments/{reply['id']}")).status_code == 204
        gone = await ok(public.get(f"/comments/{reply['id']}"))
        assert (gone["deleted"], gone["text"], gone["user_id"]) == (True, None, None)
        assert (await anna.http.delete(f"/comments/{answer['id']}")).status_code == 204
        assert (await public.get(f"/comments/{reply['id']}")).status_code == 404, "it went with its last reply"


async def test_users_rate_movies(service: Service) -> None:
    async with service.person() as holly, service.person() as anna, service.anyone() as public:
        movie = await holly.add()
        ratings = f"/movies/{movie['id']}/ratings"
        assert (await public.post(ratings, json={"score": 10})).status_code == 401
        for score in (0, 11, 7.5):
            assert_problem(await anna.http.post(ratings, json={"score": score}), 422, ["body", "score"])
        mine = await ok(anna.http.post(ratings, json={"score": 7}), 201)
        await ok(holly.http.post(ratings, json={"score": 9}), 201)
        assert (await ok(anna.http.post(ratings, json={"score": 8})))["id"] == mine["id"], "one rating for each user"
        assert [each["score"] for each in await ok(public.get(f"{ratings}?skip=0&limit=5"))] == [8, 9]
        average = await ok(public.get(f"{ratings}/average"))
        assert (average["average"], average["count"], average["histogram"]["8"]) == (8.5, 2, 1)
        shown = await ok(public.get(f"/movies/{movie['id']}?include=comments,ratings"))
        assert (shown["average_rating"], shown["ratings_count"], len(shown["ratings"])) == (8.5, 2, 2)
        assert await ok(public.get(f"/movies/popular?user_id={holly.id}&fields=title")) == [{"title": movie["title"]}]
        assert (await anna.http.delete(f"{ratings}/mine")).status_code == 204
        assert (await ok(public.get(f"/movies/{movie['id']}")))["average_rating"] == 9
