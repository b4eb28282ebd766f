"""The pages: live frames at `/`, the websocket reference at `/docs/realtime`, `/reset-password`, and `/static`."""

from __future__ import annotations

import os
from pathlib import Path

from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

STATIC = Path(__file__).resolve().parent / "static"

# The pages load only their own scripts and styles, and connect only to this service.
# "ws: wss:" stands beside 'self' because not every browser lets 'self' cover websockets.
CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self' ws: wss:; "
    "img-src 'self' data:; base-uri 'none'; frame-ancestors 'none'; form-action 'none'"
)
HEADERS = {
    # Browsers revalidate each time, so that after an upgrade no old script runs in a new page.
    "Cache-Control": "no-cache",
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


class _PageFiles(StaticFiles):
    """Static files with the headers of the pages, because the HTML files can be reached here, too."""

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


async def page(request: Request) -> Response:
    return FileResponse(STATIC / "index.html", media_type="text/html", headers=HEADERS)


async def realtime(request: Request) -> Response:
    return FileResponse(STATIC / "realtime.html", media_type="text/html", headers=HEADERS)


async def reset_password(request: Request) -> Response:
    # The URL contains the one-time token until the script removes it.
    headers = {**HEADERS, "Cache-Control": "no-store"}
    return FileResponse(STATIC / "reset-password.html", media_type="text/html", headers=headers)


ROUTES: list[BaseRoute] = [
    Route("/", page, methods=["GET"], name="dashboard"),
    Route("/reset-password", reset_password, methods=["GET"], name="reset-password"),
    Route("/docs/realtime", realtime, methods=["GET"], name="realtime"),
    Mount("/static", _PageFiles(directory=STATIC), name="static"),
]
