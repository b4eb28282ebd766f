"""HTML pages for activation and confirmation URLs that are opened in a browser: a button, then the result.

The first page changes nothing, because mail scanners open URLs the way browsers do and must not activate an account.
The pages run no script and load one style sheet.
"""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

from starlette.responses import HTMLResponse

MEDIA_TYPE = "text/html"
# The URL of the page contains the token, so the page must not leak its URL.
HEADERS: Mapping[str, str] = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; style-src 'self'; img-src data:; base-uri 'none'; "
    "frame-ancestors 'none'; form-action 'self'",
    "Referrer-Policy": "no-referrer",
}


def question(title: str, text: str, token: str, button: str) -> HTMLResponse:
    """Return a page whose button sends the token to `POST /auth/activate`, which responds with a page."""
    form = f"""
    <form method="post" action="activate">
      <input type="hidden" name="token" value="{escape(token)}">
      <button type="submit">{escape(button)}</button>
    </form>"""
    return page(title, text, 200, form=form)


def page(title: str, text: str, status: int, headers: Mapping[str, str] | None = None, form: str = "") -> HTMLResponse:
    """Return a page. Its URLs are relative, so that it works behind a proxy that serves Marquee under a path."""
    html = f"""<!doctype html>
<html lang="en">
<head>
  <meta charset="utf-8">
  <meta name="viewport" content="width=device-width, initial-scale=1">
  <meta name="color-scheme" content="light dark">
  <meta name="robots" content="noindex">
  <title>{escape(title)} – Marquee</title>
  <link rel="icon" href="data:,">
  <link rel="stylesheet" href="../static/account.css">
</head>
<body>
  <main>
    <p class="name">Marquee</p>
    <h1>{escape(title)}</h1>
    <p>{escape(text)}</p>{form}
  </main>
</body>
</html>
"""
    return HTMLResponse(html, status, {**(headers or {}), **HEADERS, "Vary": "Accept"})
