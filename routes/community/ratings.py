"""Rating movies, and reading, changing and deleting ratings."""

from __future__ import annotations

from functools import partial

import orjson
from pydantic import BaseModel
from starlette.responses import Response

from repository.community import ratings
from repository.engine.transaction import Transaction
from repository.generic.idempotency import StoredResponse
from repository.generic.lists import ordering_of
from resources.jobs import Job
from resources.ratings import RATINGS, AverageRating, RatingBody, require_may_generate
from routes.generic import handlers
from routes.generic.operations import GENERATE
from routes.http import queries, rendering
from routes.http.operation import Call, Details, Operations
from routes.http.queries import ById, ByNumber, GenerateQuery, TrailQuery

LIST = Details(filters=RATINGS.fields)
ONE = Details(if_none_match=True, errors=(404,), members=RATINGS.columns)
ENTITY = RATINGS.entity
ENTITIES = list[ENTITY]  # type: ignore[valid-type]
NEEDS_WATCHED = (
    "With the setting `RATINGS_REQUIRE_WATCHED`, users can rate a movie only while their watchlist has it with the "
    "status `watched`; otherwise, the response is a 403."
)
EDIT = Details(
    answer_headers=("ETag",), signed_in=True, if_match=True, errors=(403, 404, 409), description=NEEDS_WATCHED
)

operations = Operations("ratings")


# --- ratings of any movie


@operations.listing("/ratings", "List my ratings", ENTITIES, ordering_of(RATINGS), LIST, signed_in=True)
async def list_mine(call: Call[None, TrailQuery, None]) -> Response:
    request = queries.list_request(call, RATINGS.fields)
    return rendering.page(call, await ratings.page_of_user(call.database, call.me.user_id, request))


operations.get("/ratings/{id}", "Get a rating", {200: ENTITY}, ONE)(partial(handlers.get_one, RATINGS))


@operations.put("/ratings/{id}", "Replace a rating", {200: ENTITY}, EDIT, body=RATINGS.replacement)
@operations.patch("/ratings/{id}", "Change a rating", {200: ENTITY}, EDIT, body=RATINGS.patch)
async def edit(call: Call[ById, None, BaseModel]) -> Response:
    fields, versions = call.body.model_dump(exclude_unset=True), rendering.if_match(call)
    requires_watched = call.services.ratings_require_watched
    stored = await call.write(
        lambda tx: ratings.edit(tx, call.me, call.path.id, fields, versions, requires_watched=requires_watched)
    )
    return rendering.tagged(stored.version, stored.body)


@operations.delete("/ratings/{id}", "Delete a rating", signed_in=True, if_match=True, errors=(403, 404))
async def delete(call: Call[ById, None, None]) -> Response:
    versions = rendering.if_match(call)
    await call.write(lambda tx: ratings.remove(tx, call.me, call.path.id, versions))
    return Response(status_code=204)


@operations.post(
    "/ratings/generate/{number}",
    "Generate ratings of existing movies (moderators and admins only)",
    {202: Job},
    GENERATE,
    errors=(403, 429),
)
async def generate(call: Call[ByNumber, GenerateQuery, None]) -> Response:
    require_may_generate(call.me)  # reject early; the job checks again
    return await handlers.generate(RATINGS, call)


# --- the ratings of a movie


@operations.post(
    "/movies/{id}/ratings",
    "Rate a movie",
    {201: ENTITY, 200: ENTITY},
    description="Each user has at most one rating of a movie: the first request returns 201; another one replaces "
    f"its score and returns 200. The movie's average is updated in the same transaction. {NEEDS_WATCHED}",
    idempotent=True,
    signed_in=True,
    answer_headers=("Location", "ETag"),
    errors=(403, 404),
)
async def vote(call: Call[ById, None, RatingBody]) -> Response:
    async def work(tx: Transaction) -> StoredResponse:
        requires_watched = call.services.ratings_require_watched
        voted = await ratings.vote(tx, call.me, call.path.id, call.body.score, requires_watched=requires_watched)
        stored = voted.stored
        headers = {
            "Location": f"{call.prefix}/{RATINGS.name}/{stored.id}",
            "ETag": rendering.tag(stored.version, stored.body),
        }
        return StoredResponse(201 if voted.is_new else 200, stored.body, headers)

    return await rendering.write_once(call, work)


@operations.listing(
    "/movies/{id}/ratings", "List the ratings of a movie", ENTITIES, ordering_of(RATINGS), LIST, errors=(404,)
)
async def list_of_movie(call: Call[ById, TrailQuery, None]) -> Response:
    request = queries.list_request(call, RATINGS.fields)
    return rendering.page(call, await ratings.page_of_movie(call.database, call.path.id, request))


@operations.get(
    "/movies/{id}/ratings/average",
    "Get the average and the distribution of a movie's ratings",
    {200: AverageRating},
    answer_headers=("Stream-Position",),
    errors=(404,),
)
async def average(call: Call[ById, None, None]) -> Response:
    found = await ratings.summary(call.database, call.path.id)
    histogram = {str(score): number for score, number in found.histogram.items()}
    content = {"average": found.average, "count": found.count, "histogram": histogram}
    return rendering.JSONResponse(content, headers={"Cache-Control": "no-cache", **rendering.position(found.head)})


@operations.get("/movies/{id}/ratings/mine", "Get my rating of a movie", {200: ENTITY}, ONE, signed_in=True)
async def get_mine(call: Call[ById, None, None]) -> Response:
    found = await ratings.find_own(call.database, call.me.user_id, call.path.id)
    if found is None:
        raise ratings.not_rated(call.path.id)
    return rendering.entity(call, found["version"], orjson.dumps(rendering.selected(call, found)))


@operations.delete(
    "/movies/{id}/ratings/mine", "Delete my rating of a movie", signed_in=True, if_match=True, errors=(404,)
)
async def delete_mine(call: Call[ById, None, None]) -> Response:
    versions = rendering.if_match(call)
    await call.write(lambda tx: ratings.remove_own(tx, call.me, call.path.id, versions))
    return Response(status_code=204)
