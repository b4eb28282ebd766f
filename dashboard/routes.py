"""The routes of the web pages: `/`, `/docs/realtime` and `/reset-password`, with their static files at `/static`."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

from core import scope_keys

STATIC = Path(__file__).resolve().parent / "static"

# The pages load only their own scripts and styles, and connect only to this service.
# "ws: wss:" is listed next to 'self' because not every browser lets 'self' cover websockets.
CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self' ws: wss:; "
    "img-src 'self' data:; base-uri 'none'; frame-ancestors 'none'; form-action 'none'"
)
HEADERS = {
    "Accept-Ranges": "none",
    # Browsers must revalidate each time, so that no old script runs in a new page after an upgrade.
    "Cache-Control": "no-cache",
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "Referrer-Policy": "no-referrer",
}


class _PageFiles(StaticFiles):
    """Serves static files with the same headers as the pages, because the HTML files can be requested here, too."""

    def file_response(
        self,
        full_path: str | os.PathLike[str],
        stat_result: os.stat_result,
        scope: Scope,
        status_code: int = 200,
    ) -> Response:
        response = super().file_response(full_path, stat_result, scope, status_code)
        response.headers.update(HEADERS)
        return response


@cache
def _html(file: str, root: str) -> str:
    """Return a page whose links begin with `root`, the path under which clients reach the service."""
    return (STATIC / file).read_text(encoding="utf-8").replace('="/', f'="{root}/')


def _page(path: str, file: str, name: str, headers: dict[str, str] = HEADERS) -> Route:
    async def page(request: Request) -> Response:
        return HTMLResponse(_html(file, request.scope[scope_keys.ROOT]), headers=headers)

    return Route(path, page, methods=["GET"], name=name)


ROUTES: list[BaseRoute] = [
    _page("/", "live.html", "dashboard"),
    # The URL contains the one-time token until the script removes it, so the page must not be stored.
    _page("/reset-password", "reset-password.html", "reset-password", HEADERS | {"Cache-Control": "no-store"}),
    _page("/docs/realtime", "websocket-reference.html", "realtime"),
    Mount("/static", _PageFiles(directory=STATIC), name="static"),
]
