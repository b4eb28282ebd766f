"""The URL table: every operation of the HTTP API, and the routes built from the operations."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from functools import cache

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Match, Mount, Route, WebSocketRoute
from starlette.types import Scope

from core import scope_keys
from core.errors import Problem, SettingsError
from core.rates import parse_rate_limits
from core.settings import Settings
from routes import events, health, jobs
from routes.accounts import admin, avatars, confirmations, pages, profiles, registration, sign_in, users
from routes.catalog import discover
from routes.community import comments, ratings, watchlist
from routes.generic.operations import RESOURCE_OPERATIONS
from routes.http import documentation, limit_groups, middleware, openapi, rendering
from routes.http.disconnects import while_connected
from routes.http.operation import Operation
from routes.http.parsing import parse

OPERATIONS: Sequence[Operation] = [
    *(each for operations in RESOURCE_OPERATIONS for each in operations),
    *discover.operations,
    *comments.operations,
    *ratings.operations,
    *watchlist.operations,
    *jobs.operations,
    *registration.operations,
    *confirmations.operations,
    *sign_in.operations,
    *users.operations,
    *profiles.operations,
    *avatars.operations,
    *admin.operations,
    *events.operations,
    *health.operations,
    *documentation.operations,
]


def routes() -> list[BaseRoute]:
    """Return one route for each path, fixed paths first, so that a wrong method is rejected with a complete `Allow`."""
    by_path: dict[str, dict[str, Operation]] = {}
    for operation in OPERATIONS:
        by_path.setdefault(operation.path, {})[operation.method] = operation
    # Of two paths, the path that has a parameter in an earlier segment comes later.
    ordered = sorted(by_path, key=lambda path: [part.startswith("{") for part in path.split("/")])
    return [*(_route(path, by_path[path]) for path in ordered), *health.PAGES, *documentation.PAGES]


def _route(path: str, operations: Mapping[str, Operation]) -> Route:
    async def endpoint(request: Request) -> Response:
        operation = operations["GET" if request.method == "HEAD" else request.method]
        if operation.uncompressed:
            request.scope[scope_keys.UNCOMPRESSED] = True
        if operation.document:
            request.scope[scope_keys.DOCUMENT] = path
        try:
            if operation.is_bulk:
                async with AsyncExitStack() as turn:
                    call = await parse(request, operation, turn)
                    return rendering.with_position(await operation.handler(call), call)
            call = await parse(request, operation)
            answer = operation.handler(call)
            if operation.method == "GET":
                return await while_connected(request, answer)
            return rendering.with_position(await answer, call)
        except Problem as error:
            if operation.problem_page is None or not rendering.client_prefers(request.headers, pages.MEDIA_TYPE):
                raise
            return operation.problem_page(error)

    return _Path(path, endpoint, methods=list(operations))


class _Path(Route):
    """A route that itself rejects wrong methods. Otherwise the router would try `/movies/{id}` for PUT /movies/bulk."""

    def __init__(self, path: str, endpoint: Callable[[Request], Awaitable[Response]], methods: list[str]) -> None:
        super().__init__(path, endpoint, methods=methods)
        self._start = path.partition("{")[0]

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        if not scope["path"].startswith(self._start):  # as for most routes; the pattern would take longer
            return Match.NONE, {}
        match, found = super().matches(scope)
        return (Match.FULL if match is Match.PARTIAL else match), found


def check_root(root: str, served: Sequence[BaseRoute]) -> None:
    """Raise SettingsError if `root` begins with the first segment of a served path.

    The path of a request would then be ambiguous, because a proxy may or may not have removed the root path.
    """
    paths = [route.path for route in served if isinstance(route, Route | Mount | WebSocketRoute)]
    first = root.split("/")[1] if root else None
    if first in {path.split("/")[1] for path in (*paths, middleware.PREFIX)}:
        raise SettingsError(f"ROOT_PATH: expected a path that does not begin with /{first}, which the service uses.")


def limit_rules(settings: Settings) -> limit_groups.Rules:
    """Return the rate limit of each route. Raises SettingsError if RATE_LIMITS names an unknown route."""
    groups = {(operation.method, operation.path): operation.counts_as for operation in OPERATIONS}
    return limit_groups.rules(groups, parse_rate_limits(settings.rate_limits), settings.users_per_address)


@cache
def document(root: str = "") -> bytes:
    """Return the OpenAPI document of the service under the path `root`. Building it takes a third of a second."""
    return openapi.document(OPERATIONS, root)
