"""Rights: each operation responds to each role as the table in docs/rights.md states.

Other tests are about clients that lose or gain rights while the body of their request arrives.
"""

from __future__ import annotations

import asyncio
import itertools
import string
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import orjson
import pytest

from repository.engine.positions import parse_position
from routes import table
from routes.table import OPERATIONS
from tests.support.backends import SQLITE_ONLY
from tests.support.pictures import photo
from tests.support.requests import change_group, ok, sign_in
from tests.support.resources import contents
from tests.support.servers.mail import mail_in, token_in
from tests.support.service import DEADLINE_SECONDS, PASSWORD, ROOT, Person, Service, eventually

ROLES = ("anonymous", "user", "owner", "moderator", "admin", "disabled", "expired", "refresh")
BAD_TOKENS = frozenset({"disabled", "expired", "refresh"})
NO_LINK = "x" * 43
NEEDS_MAIL = frozenset({"POST /auth/activate", "POST /auth/password/reset"})
CREATES_OWN = frozenset({"POST /movies/{id}/ratings", "POST /watchlist"})  # what is created belongs to the caller
# The account is already active, the imports are dry runs, and a job is audited when it stores rows.
CHANGES_NOTHING = frozenset(
    {
        "POST /admin/users/{id}/activate",
        "POST /genres/import",
        "POST /actors/import",
        "POST /actors/generate/{number}",
    }
)
DOCUMENT: Mapping[str, Any] = orjson.loads(table.document())["paths"]
PICTURE: Mapping[str, Any] = {"content": photo(32, 32), "headers": {"Content-Type": "image/jpeg"}}
# Objects that belong to no user; for those with codes, their path and the code that the tests use.
UNOWNED: Mapping[str, tuple[str, str]] = {
    "genre": ("/genres", ""),
    "actor": ("/actors", ""),
    "country": ("/countries", "BV"),
    "free_country": ("/countries", "AQ"),
    "language": ("/languages", "vo"),
    "free_language": ("/languages", "aa"),
}
CREATES_UNOWNED = ("POST /admin", *(f"POST {path}" for path, _ in UNOWNED.values()))
FILE: Mapping[str, Any] = {
    "content": b'{"title":"M","name":"M"}\n',
    "headers": {"Content-Type": "application/x-ndjson"},
}
_numbers = itertools.count()


def name() -> str:
    return f"right{next(_numbers)}-{time.time_ns() % 10**9}"


@dataclass(frozen=True)
class Ask:
    """A valid request for an operation: only missing rights can make it fail.

    `{names}` in the path stand for objects of the owner, which are created when the path or the body needs them.
    `is_own`: the request is about the requester's account, which may be unusable afterwards. `is_final`: the owner's
    account may be unusable afterwards.
    """

    path: str
    body: Any = None  # a JSON value, or a function that makes it from the created objects
    needs: tuple[str, ...] = ()
    content: Mapping[str, Any] = field(default_factory=dict)
    is_own: bool = False
    is_final: bool = False


def new_password() -> dict[str, str]:
    return {"old_password": PASSWORD, "new_password": "the fourth man 1950"}


def asks_of_resource(
    resource: str,
    one: str,
    entity: Any,
    bulk: Any,
    change: tuple[str, str] = ("description", "x"),
    needs: tuple[str, ...] = (),
) -> dict[str, Ask]:
    """Return the requests for a resource. `needs` are objects that `entity` and `bulk` are made from."""
    row = f"/{resource}/{{{one}}}"
    changed = dict([change])
    return {
        f"GET /{resource}": Ask(f"/{resource}"),
        f"POST /{resource}": Ask(f"/{resource}", entity, needs),
        f"GET /{resource}/count": Ask(f"/{resource}/count"),
        f"GET /{resource}/names": Ask(f"/{resource}/names"),
        f"POST /{resource}/bulk": Ask(f"/{resource}/bulk", bulk, needs),
        f"PATCH /{resource}/bulk": Ask(f"/{resource}/bulk", lambda on: [{"id": on[one], **changed}], (one,)),
        f"DELETE /{resource}/bulk": Ask(f"/{resource}/bulk", lambda things: {"ids": [things[one]]}, (one,)),
        f"DELETE /{resource}/bulk/{{start_id}}/{{end_id}}": Ask(f"/{resource}/bulk/{{{one}}}/{{{one}}}"),
        f"GET /{resource}/{{id}}": Ask(row),
        f"PUT /{resource}/{{id}}": Ask(row, entity, needs),
        f"PATCH /{resource}/{{id}}": Ask(row, changed),
        f"DELETE /{resource}/{{id}}": Ask(row),
    }


def asks_of_files(resource: str, one: str) -> dict[str, Ask]:
    """Return the requests for whole lists as files, and for the history of a row."""
    return {
        f"GET /{resource}/export": Ask(f"/{resource}/export?id=0"),
        f"POST /{resource}/import": Ask(f"/{resource}/import?dry_run=true", content=FILE),
        f"GET /{resource}/{{id}}/history": Ask(f"/{resource}/{{{one}}}/history"),
    }


def asks_of_listed_resource(resource: str, one: str, entity: dict[str, str]) -> dict[str, Ask]:
    """Return the requests for a resource whose rows belong to users and can be generated."""
    return {
        **asks_of_resource(resource, one, entity, [entity]),
        **asks_of_files(resource, one),
        f"GET /{resource}/user": Ask(f"/{resource}/user"),
        f"GET /{resource}/username/{{username}}": Ask(f"/{resource}/username/{{username}}"),
        f"GET /users/{{user_id}}/{resource}": Ask(f"/users/{{account}}/{resource}"),
        f"POST /users/{{user_id}}/{resource}": Ask(f"/users/{{account}}/{resource}", entity),
        f"POST /{resource}/generate/{{number}}": Ask(f"/{resource}/generate/1"),
    }


def asks_of_codes(resource: str, one: str) -> dict[str, Ask]:
    """Return the requests for a resource whose codes all exist from the start."""
    free = f"free_{one}"
    return asks_of_resource(
        resource,
        one,
        lambda on: {"code": on[free], "name": name()},
        lambda on: [{"code": on[free], "name": name()}],
        ("name", "x"),
        (free,),
    )


ASKS: Mapping[str, Ask] = {
    **asks_of_listed_resource("movies", "movie", {"title": "M"}),
    **asks_of_listed_resource("characters", "character", {"name": "M"}),
    **asks_of_resource("genres", "genre", lambda _: {"name": name()}, lambda _: [{"name": name()}]),
    **asks_of_resource("actors", "actor", {"name": "M"}, [{"name": "M"}], ("biography", "x")),
    **asks_of_files("genres", "genre"),
    **asks_of_files("actors", "actor"),
    **asks_of_codes("countries", "country"),
    **asks_of_codes("languages", "language"),
    "POST /actors/generate/{number}": Ask("/actors/generate/1"),
    "GET /genres/{id}/movies": Ask("/genres/{genre}/movies"),
    "GET /actors/{id}/movies": Ask("/actors/{actor}/movies"),
    "GET /countries/{id}/movies": Ask("/countries/{country}/movies"),
    "GET /languages/{id}/movies": Ask("/languages/{language}/movies"),
    "GET /movies/popular": Ask("/movies/popular"),
    "GET /movies/recent": Ask("/movies/recent"),
    "GET /movies/{id}/similar": Ask("/movies/{movie}/similar"),
    # --- comments
    "GET /comments": Ask("/comments"),
    "GET /comments/count": Ask("/comments/count"),
    "GET /comments/user": Ask("/comments/user"),
    "GET /comments/username/{username}": Ask("/comments/username/{username}"),
    "GET /users/{user_id}/comments": Ask("/users/{account}/comments"),
    "GET /movies/{id}/comments": Ask("/movies/{movie}/comments"),
    "POST /movies/{id}/comments": Ask("/movies/{movie}/comments", {"text": "Fine"}),
    "GET /comments/{id}/replies": Ask("/comments/{comment}/replies"),
    "POST /comments/{id}/replies": Ask("/comments/{comment}/replies", {"text": "Fine"}),
    "GET /comments/{id}": Ask("/comments/{comment}"),
    "PUT /comments/{id}": Ask("/comments/{comment}", {"text": "Finer"}),
    "PATCH /comments/{id}": Ask("/comments/{comment}", {"text": "Finer"}),
    "DELETE /comments/{id}": Ask("/comments/{comment}"),
    "DELETE /comments/bulk": Ask("/comments/bulk", lambda things: {"ids": [things["comment"]]}, ("comment",)),
    "DELETE /comments/bulk/{start_id}/{end_id}": Ask("/comments/bulk/{comment}/{comment}"),
    "POST /movies/{id}/ratings": Ask("/movies/{movie}/ratings", {"score": 7}),
    "GET /movies/{id}/ratings": Ask("/movies/{movie}/ratings"),
    "GET /movies/{id}/ratings/average": Ask("/movies/{movie}/ratings/average"),
    "GET /movies/{id}/ratings/mine": Ask("/movies/{rated}/ratings/mine"),
    "DELETE /movies/{id}/ratings/mine": Ask("/movies/{rated}/ratings/mine"),
    "GET /ratings": Ask("/ratings"),
    "POST /ratings/generate/{number}": Ask("/ratings/generate/1"),
    "GET /ratings/{id}": Ask("/ratings/{rating}"),
    "PUT /ratings/{id}": Ask("/ratings/{rating}", {"score": 8}),
    "PATCH /ratings/{id}": Ask("/ratings/{rating}", {"score": 9}),
    "DELETE /ratings/{id}": Ask("/ratings/{rating}"),
    "GET /watchlist": Ask("/watchlist"),
    "POST /watchlist": Ask("/watchlist", lambda on: {"movie_id": on["movie"]}, ("movie",)),
    "GET /watchlist/{id}": Ask("/watchlist/{entry}"),
    "PUT /watchlist/{id}": Ask("/watchlist/{entry}", lambda on: {"movie_id": on["movie"]}, ("movie",)),
    "PATCH /watchlist/{id}": Ask("/watchlist/{entry}", {"status": "watched"}),
    "DELETE /watchlist/{id}": Ask("/watchlist/{entry}"),
    "GET /jobs": Ask("/jobs"),
    "GET /jobs/{id}": Ask("/jobs/{job}"),
    "DELETE /jobs/{id}": Ask("/jobs/{job}"),
    "GET /jobs/{id}/report": Ask("/jobs/{import}/report"),
    # --- signing in and out
    "POST /auth/register": Ask("/auth/register", lambda _: {"username": name(), "password": PASSWORD}),
    "POST /users": Ask("/users", lambda _: {"username": name(), "password": PASSWORD}),
    "POST /auth/activate": Ask("/auth/activate", {"token": NO_LINK}),
    "GET /auth/activate": Ask(f"/auth/activate?token={NO_LINK}"),
    "POST /auth/activate/resend": Ask("/auth/activate/resend", {"email": "nobody@example.org"}),
    "POST /auth/password/change": Ask("/auth/password/change", lambda _: new_password(), is_own=True),
    "POST /auth/password/forgot": Ask("/auth/password/forgot", {"email": "nobody@example.org"}),
    "POST /auth/password/reset": Ask("/auth/password/reset", {"token": NO_LINK, "new_password": PASSWORD}),
    "POST /auth/login": Ask(
        "/auth/login", lambda things: {"username": things["username"], "password": PASSWORD}, ("username",)
    ),
    "POST /token": Ask("/token", lambda things: {"username": things["username"], "password": PASSWORD}, ("username",)),
    "POST /auth/refresh": Ask(
        "/auth/refresh", lambda things: {"refresh_token": things["refresh_token"]}, ("refresh_token",)
    ),
    "POST /auth/logout": Ask("/auth/logout", is_own=True),
    "GET /auth/sessions": Ask("/auth/sessions"),
    "DELETE /auth/sessions": Ask("/auth/sessions", is_own=True),
    "DELETE /auth/sessions/{id}": Ask("/auth/sessions/{session}"),
    # --- accounts
    "GET /auth/me": Ask("/auth/me"),
    "GET /users/me": Ask("/users/me"),
    "PUT /users/me": Ask("/users/me", lambda things: {"username": things["my_name"], "name": "M"}, is_own=True),
    "PATCH /users/me": Ask("/users/me", {"name": "M"}),
    "DELETE /users/me": Ask("/users/me", is_own=True),
    "GET /users": Ask("/users"),
    "GET /users/nonAdmin": Ask("/users/nonAdmin"),
    "GET /users/{id}": Ask("/users/{account}"),
    "PUT /users/{id}": Ask("/users/{account}", lambda on: {"username": on["username"], "name": name()}, ("username",)),
    "PATCH /users/{id}": Ask("/users/{account}", {"name": "M"}),
    "DELETE /users/{id}": Ask("/users/{account}", is_final=True),
    "GET /users/me/profile": Ask("/users/me/profile"),
    "POST /users/me/profile": Ask("/users/me/profile", {"info": "x"}, is_own=True),
    "PUT /users/me/profile": Ask("/users/me/profile", {"info": "x"}),
    "PATCH /users/me/profile": Ask("/users/me/profile", {"info": "x"}),
    "GET /users/{id}/profile": Ask("/users/{account}/profile"),
    "POST /users/{id}/profile": Ask("/users/{account}/profile", {"info": "x"}, is_final=True),
    "PUT /users/{id}/profile": Ask("/users/{account}/profile", {"info": "x"}),
    "PATCH /users/{id}/profile": Ask("/users/{account}/profile", {"info": "y"}),
    "PUT /users/me/avatar": Ask("/users/me/avatar", content=PICTURE),
    "DELETE /users/me/avatar": Ask("/users/me/avatar"),
    "PUT /users/{id}/avatar": Ask("/users/{account}/avatar", content=PICTURE),
    "DELETE /users/{id}/avatar": Ask("/users/{account}/avatar"),
    "GET /avatars/{avatar}/{side}": Ask("{avatar_url}"),
    # --- administration
    "POST /admin/users": Ask("/admin/users", lambda _: {"username": name(), "password": PASSWORD}),
    "GET /admin/audit": Ask("/admin/audit"),
    "POST /admin/users/{id}/change-group": Ask(
        "/admin/users/{account}/change-group", {"group": "moderator"}, is_final=True
    ),
    "POST /admin/users/{id}/activate": Ask("/admin/users/{account}/activate"),
    "POST /admin/users/{id}/deactivate": Ask("/admin/users/{account}/deactivate", is_final=True),
    # --- the rest
    "GET /events": Ask("/events"),
    "GET /healthz": Ask("/healthz"),
    "GET /readyz": Ask("/readyz"),
    "GET /openapi.json": Ask("/openapi.json"),
}


def rights() -> dict[str, dict[str, str]]:
    """Return the documented status of each operation for each role."""
    found = {}
    for line in (ROOT / "docs" / "rights.md").read_text().splitlines():
        cells = [cell.strip().strip("`") for cell in line.strip("|").split("|")]
        if len(cells) == len(ROLES) + 2 and cells[1].startswith("/"):
            found[f"{cells[0]} {cells[1]}"] = dict(zip(ROLES, cells[2:], strict=True))
    return found


def test_the_table_and_the_requests_cover_every_operation() -> None:
    served = {f"{operation.method} {operation.path}" for operation in OPERATIONS}
    assert rights().keys() == served, "docs/rights.md has a row for each operation"
    assert ASKS.keys() == served, "there is a request for each operation"


@dataclass
class Account:
    """A signed-in user with a refresh token."""

    person: Person
    refresh_token: str


class Cast:
    """The users of a service in their roles."""

    def __init__(self, service: Service, stack: AsyncExitStack, admin: Person, anonymous: httpx.AsyncClient) -> None:
        self.anonymous = anonymous
        self._service = service
        self._stack = stack
        self._admin = admin
        self._accounts: dict[str, Account] = {}

    async def account(self, role: str) -> Account:
        """Return the shared account with this role. Requests that may make their account unusable use a new one."""
        if role not in self._accounts:
            self._accounts[role] = await self.new(role)
        return self._accounts[role]

    async def new(self, role: str) -> Account:
        person = await self._stack.enter_async_context(self._service.person(name()))
        tokens = await ok(sign_in(person.http, person.name))
        if role in ("moderator", "admin"):
            await change_group(self._admin, person, role)
        if role == "disabled":
            await ok(self._admin.http.post(f"/admin/users/{person.id}/deactivate"))
        return Account(person, tokens["refresh_token"])

    async def unowned(self, kind: str) -> int | str:
        """Return the id of a row that belongs to no user, or a code that no row has."""
        if kind in ("genre", "actor"):
            return int((await ok(self._admin.http.post(f"/{kind}s", json={"name": name()}), 201))["id"])
        path, code = UNOWNED[kind]
        found = await self._admin.http.get(f"{path}/{code}")
        if kind.startswith("free_"):
            if found.is_success:
                await self._admin.http.delete(f"{path}/{found.json()['id']}")
            return code
        if found.is_success:
            return int(found.json()["id"])
        return int((await ok(self._admin.http.post(path, json={"code": code, "name": name()}), 201))["id"])

    async def token(self, role: str, owner: Account, asker: Account | None) -> str | None:
        if role == "expired":
            return owner.person.forged(iat=int(time.time()) - 7_200, exp=int(time.time()) - 3_600)
        if role == "refresh":
            return owner.refresh_token
        return asker.person.token if asker is not None else None


async def created(wanted: str, owner: Account) -> Any:
    """Create an object that belongs to the owner, and return its id, name or token."""
    person = owner.person
    if wanted in ("movie", "character"):
        return (await person.add(f"{wanted}s"))["id"]
    if wanted == "comment":
        movie = await person.add()
        return (await ok(person.http.post(f"/movies/{movie['id']}/comments", json={"text": "Fine"}), 201))["id"]
    if wanted in ("rating", "rated"):
        movie = (await person.add())["id"]
        rating = await ok(person.http.post(f"/movies/{movie}/ratings", json={"score": 7}), 201)
        return rating["id"] if wanted == "rating" else movie
    if wanted == "entry":
        movie = (await person.add())["id"]
        return (await ok(person.http.post("/watchlist", json={"movie_id": movie}), 201))["id"]
    if wanted == "job":
        return (await person.generate("movies", 1_000, "?rate=1"))["id"]
    if wanted == "import":
        return (await ok(person.http.post("/movies/import?dry_run=true", **FILE), 202))["id"]
    if wanted in ("session", "refresh_token"):
        return (await ok(sign_in(person.http, person.name)))["session_id" if wanted == "session" else wanted]
    if wanted == "avatar_url":
        return (await person.http.put("/users/me/avatar", **PICTURE)).json()["avatar_url"]
    assert wanted in ("username", "account"), wanted
    return person.name if wanted == "username" else person.id


async def response_to(cast: Cast, operation: str, role: str) -> httpx.Response:
    ask = ASKS[operation]
    uses_up = role not in BAD_TOKENS
    owner = await (cast.new("owner") if (ask.is_final or ask.is_own) and uses_up else cast.account("owner"))
    asker: Account | None = owner
    if role == "anonymous":
        asker = None
    elif role != "owner":
        asker = await (cast.new(role) if ask.is_own and uses_up else cast.account(role))
    token = await cast.token(role, owner, asker)
    wanted, things = await request_of(cast, operation, owner, asker or owner, token)
    response = await cast.anonymous.send(wanted)
    if "job" in things:  # a user may have only a few unfinished jobs
        await owner.person.http.delete(f"/jobs/{things['job']}")
    return response


async def request_of(
    cast: Cast, operation: str, owner: Account, asker: Account, token: str | None
) -> tuple[httpx.Request, dict[str, Any]]:
    """Return a request for the operation, and the objects of the owner that were created for it, by kind."""
    ask = ASKS[operation]
    needed = {each for _, each, _, _ in string.Formatter().parse(ask.path) if each} | set(ask.needs)
    things = {each: await (cast.unowned(each) if each in UNOWNED else created(each, owner)) for each in needed}
    body = ask.body({**things, "my_name": asker.person.name}) if callable(ask.body) else ask.body
    headers = {"Authorization": f"Bearer {token}"} if token is not None else {}
    content = {**ask.content, "headers": {**ask.content.get("headers", {}), **headers}}
    if body is not None:
        content["json"] = body
    method = operation.partition(" ")[0]
    return cast.anonymous.build_request(method, ask.path.format_map(things), **content), things


def as_class(status: int) -> str:
    return "2xx" if 200 <= status < 300 else str(status)


@asynccontextmanager
async def with_profiles(service: Service) -> AsyncIterator[Cast]:
    """Yield users in all roles, each with a profile."""
    async with AsyncExitStack() as stack, service.admin() as chief, service.anyone() as anonymous:
        cast = Cast(service, stack, chief, anonymous)
        for role in ("user", "owner", "moderator", "admin"):
            account = await cast.account(role)
            await ok(account.person.http.post("/users/me/profile", json={"info": "has one"}), 201)
        yield cast


@SQLITE_ONLY
async def test_each_role_may_do_what_the_table_says(service: Service) -> None:
    wrong: list[str] = []
    async with with_profiles(service) as cast:
        for operation, expected in rights().items():
            for role in ROLES:
                found = as_class((await response_to(cast, operation, role)).status_code)
                if found != expected[role]:
                    wrong.append(f"{operation} by {role}: {found}, where docs/rights.md says {expected[role]}")
    assert wrong == []


@SQLITE_ONLY
async def test_every_action_of_an_admin_on_what_is_not_theirs_is_audited(service: Service) -> None:
    without: list[str] = []
    async with with_profiles(service) as cast:
        admin = (await cast.account("admin")).person
        trail = f"/admin/audit?actor_id={admin.id}&limit=0"
        for operation, expected in rights().items():
            names = {name for _, name, _, _ in string.Formatter().parse(ASKS[operation].path) if name}
            is_foreign = names or ASKS[operation].needs or operation.startswith(CREATES_UNOWNED)
            is_for_everyone = expected["user"] == "2xx"  # such as a comment on a movie of another user
            needs_rights = (expected["anonymous"], expected["admin"]) == ("401", "2xx") and not is_for_everyone
            if operation.startswith("GET ") or not needs_rights or not is_foreign or operation in CHANGES_NOTHING:
                continue
            if operation in CREATES_OWN:
                continue
            before = (await admin.http.get(trail)).headers["x-total-count"]
            assert (await response_to(cast, operation, "admin")).is_success, operation
            if int((await admin.http.get(trail)).headers["x-total-count"]) != int(before) + 1:
                without.append(operation)
    assert not without, without


# --- the position of a write in the log


async def test_every_response_to_a_write_tells_its_position(service: Service) -> None:
    writes = {f"{method.upper()} {path}" for path, item in DOCUMENT.items() for method in item.keys() - {"get"}}
    without: list[str] = []
    async with with_profiles(service) as cast:
        for operation in writes - NEEDS_MAIL:
            role = next(role for role in ("owner", "anonymous", "admin") if rights()[operation][role] == "2xx")
            response = await response_to(cast, operation, role)
            assert response.is_success, f"{operation}: {response.text}"
            if parse_position(response.headers.get("stream-position", "")) is None:
                without.append(operation)
    assert without == []


async def test_responses_to_mailed_tokens_tell_their_position(new_service: Callable[..., Service]) -> None:
    service = new_service(ACCOUNT_ACTIVATION="email").start()
    address = f"{name()}@example.org"
    async with service.anyone() as client:

        async def send(path: str, status: int, **body: str) -> None:
            response = await client.post(path, json=body)
            assert response.status_code == status, response.text
            assert parse_position(response.headers["stream-position"]) is not None

        async def token(subject: str) -> str:
            return token_in(await mail_in(service.folder / "mail", address, subject=subject))

        await send("/auth/register", 201, username=name(), email=address, password=PASSWORD)
        await send("/auth/activate", 200, token=await token("Activate"))
        await send("/auth/password/forgot", 202, email=address)
        await send("/auth/password/reset", 204, token=await token("Reset"), new_password="the fourth man 1950")


def test_the_document_promises_the_position_of_every_write() -> None:
    for path, operations in DOCUMENT.items():
        for method in operations.keys() - {"get"}:
            for status, response in operations[method]["responses"].items():
                assert ("Stream-Position" in response["headers"]) == status.startswith("2"), f"{method} {path} {status}"


# --- rights that change while a body arrives


@dataclass
class SlowRequest:
    """A request whose client the service has identified and whose body is still incomplete."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    rest: bytes

    async def finish(self) -> int:
        """Send the rest of the body, and return the status of the response."""
        self.writer.write(self.rest)
        async with asyncio.timeout(DEADLINE_SECONDS):
            return int((await self.reader.readuntil(b"\r\n")).split()[1])


async def begin_slowly(stack: AsyncExitStack, cast: Cast, operation: str, asker: Account, token: str) -> SlowRequest:
    """Send the head of a request and three bytes of its body."""
    wanted, _ = await request_of(cast, operation, await cast.account("owner"), asker, token)
    reader, writer = await asyncio.open_connection(wanted.url.host, wanted.url.port)
    stack.callback(writer.close)
    lines = [f"{name}: {value}" for name, value in wanted.headers.items()]
    # The service sends `100 Continue` once it has checked the head and waits for the body.
    head = [f"{wanted.method} {wanted.url.raw_path.decode()} HTTP/1.1", *lines, "Expect: 100-continue"]
    writer.write("\r\n".join([*head, "", ""]).encode() + wanted.content[:3])
    async with asyncio.timeout(DEADLINE_SECONDS):
        assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n", operation
    return SlowRequest(reader, writer, wanted.content[3:])


async def demoted(chief: Person, person: Person) -> None:
    await change_group(chief, person, "user")


async def logged_out(chief: Person, person: Person) -> None:
    assert (await person.http.post("/auth/logout")).status_code == 204


async def deactivated(chief: Person, person: Person) -> None:
    await ok(chief.http.post(f"/admin/users/{person.id}/deactivate"))


async def deleted(chief: Person, person: Person) -> None:
    assert (await chief.http.delete(f"/users/{person.id}")).status_code == 204


async def expired(chief: Person, person: Person) -> None:
    async def is_refused() -> bool:
        return (await person.http.get("/users/me")).status_code == 401

    await eventually(is_refused, "the token expires")


def operations_that_wait() -> list[str]:
    """Return the operations that identify the client and then read a body."""
    read_body = [each for each in OPERATIONS if (each.body or each.form) and not each.ignores_credentials]
    return [f"{each.method} {each.path}" for each in read_body]


@SQLITE_ONLY
@pytest.mark.parametrize("loss", [demoted, logged_out, deactivated, deleted, expired])
async def test_rights_that_are_lost_while_the_body_arrives_are_lost_for_every_operation(
    service: Service, loss: Callable[[Person, Person], Awaitable[None]]
) -> None:
    wrong: list[str] = []
    async with AsyncExitStack() as stack, service.admin() as chief, service.anyone() as anonymous:
        cast = Cast(service, stack, chief, anonymous)
        asker = await cast.new("admin")
        token = asker.person.token
        if loss is expired:
            token = asker.person.forged(exp=int(time.time()) - 3)  # valid for 2 more seconds, because the leeway is 5 s
            asker.person.http.headers["Authorization"] = f"Bearer {token}"
        slow: dict[str, SlowRequest] = {}
        for operation in operations_that_wait():
            needs_group = (rights()[operation]["admin"], rights()[operation]["user"]) == ("2xx", "403")
            if loss is not demoted or needs_group:
                slow[operation] = await begin_slowly(stack, cast, operation, asker, token)
        await loss(chief, asker.person)
        before = await contents(service)
        for operation, request in slow.items():
            status = await request.finish()
            if status != (403 if loss is demoted else 401):
                wrong.append(f"{operation}: {status}")
        assert wrong == []
        assert await contents(service) == before, "nothing was written"


@SQLITE_ONLY
async def test_rights_that_are_gained_while_the_body_arrives_count(service: Service) -> None:
    async with AsyncExitStack() as stack, service.admin() as chief, service.anyone() as anonymous:
        cast = Cast(service, stack, chief, anonymous)
        asker = await cast.new("user")
        request = await begin_slowly(stack, cast, "PATCH /movies/{id}", asker, asker.person.token)
        await change_group(chief, asker.person, "moderator")
        assert await request.finish() == 200
