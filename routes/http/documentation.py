"""The OpenAPI document, and Swagger UI and ReDoc for reading it and trying the API, served without a CDN."""

from __future__ import annotations

import asyncio
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, Response
from starlette.routing import BaseRoute, Route

from core import scope_keys
from routes.http import rendering
from routes.http.limit_groups import LimitGroup
from routes.http.operation import Call, Operations

# Swagger UI and ReDoc set styles from scripts and use data: images. Scripts are loaded from this server only.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
    "font-src 'self' data:; "
    "connect-src 'self'; worker-src 'self' blob:; base-uri 'none'; frame-ancestors 'none'; form-action 'self'"
)
FILES = {
    "swagger.js": ("swagger_bundle.js", "text/javascript"),
    "swagger.css": ("swagger_style.css", "text/css"),
    "redoc.js": ("redoc.js", "text/javascript"),
}
# By default, ReDoc loads its logo from the vendor's server. An empty image replaces that logo, so that pages need no
# other server.
FOREIGN_LOGO = (
    b"https://cdn.redoc.ly/redoc/logo-mini-full.svg",
    b"data:image/gif;base64,R0lGODlhAQABAAAAACwAAAAAAQABAAA=",
)
OWN = Path(__file__).parent / "documentation_files"

operations = Operations("documentation")


def _folder() -> Path:
    # Find the package without importing it, because only its files are needed.
    spec = find_spec("offapi")
    assert spec is not None, "expected the package offapi to be installed"
    assert spec.origin is not None
    return Path(spec.origin).parent


def _page(title: str, body: str) -> HTMLResponse:
    page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><link rel="icon" href="data:,">{body}</html>
"""
    return HTMLResponse(page, headers={"Content-Security-Policy": POLICY})


async def swagger(request: Request) -> Response:
    files = f"{request.scope[scope_keys.ROOT]}/docs/files"
    return _page(
        "Marquee API",
        f'<link rel="stylesheet" href="{files}/swagger.css"></head><body><div id="swagger-ui"></div>'
        f'<script src="{files}/swagger.js"></script><script src="{files}/start.js"></script></body>',
    )


async def redoc(request: Request) -> Response:
    root = request.scope[scope_keys.ROOT]
    return _page(
        "Marquee API reference",
        f'</head><body><redoc spec-url="{root}/openapi.json" disable-telemetry="true"></redoc>'
        f'<script type="module" src="{root}/docs/files/redoc.js"></script></body>',
    )


@cache
def _content(name: str) -> bytes:
    return (_folder() / FILES[name][0]).read_bytes().replace(*FOREIGN_LOGO)


async def file(request: Request) -> Response:
    name = request.path_params["name"]
    if name == "start.js":
        return FileResponse(OWN / "start.js", media_type="text/javascript", headers={"Accept-Ranges": "none"})
    if name not in FILES:
        raise HTTPException(404)
    request.scope[scope_keys.DOCUMENT] = name
    content = await asyncio.to_thread(_content, name)
    headers = {"Cache-Control": "max-age=86400", "Accept-Ranges": "none"}
    return Response(content, headers=headers, media_type=FILES[name][1])


@operations.get(
    "/openapi.json", "Get this document", {200: dict[str, object]}, limit_group=LimitGroup.UNLIMITED, document=True
)
async def openapi(call: Call[None, None, None]) -> Response:
    return rendering.JSONResponse(await asyncio.to_thread(call.services.openapi), headers={"Cache-Control": "no-cache"})


PAGES: list[BaseRoute] = [Route("/docs", swagger), Route("/redoc", redoc), Route("/docs/files/{name}", file)]
