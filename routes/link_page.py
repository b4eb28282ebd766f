"""The page for browsers that follow a link from a mail: whether it worked. It runs no script and loads one style."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

from starlette.responses import HTMLResponse

# The address of the page holds what the link carried, so nothing on it may tell the address to anybody.
HEADERS: Mapping[str, str] = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; style-src 'self'; img-src data:; base-uri 'none'; "
    "frame-ancestors 'none'; form-action 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def page(title: str, sentences: str, status: int) -> HTMLResponse:
    """Addresses in it are relative, so that it works behind a proxy that serves us under a path."""
    text = f"""<!doctype html>
<html lang="en">
<head>
  <meta charset="utf-8">
  <meta name="viewport" content="width=device-width, initial-scale=1">
  <meta name="color-scheme" content="light dark">
  <title>{escape(title)} – Marquee</title>
  <link rel="icon" href="data:,">
  <link rel="stylesheet" href="../static/account.css">
</head>
<body>
  <main>
    <p class="name">Marquee</p>
    <h1>{escape(title)}</h1>
    <p>{escape(sentences)}</p>
  </main>
</body>
</html>
"""
    return HTMLResponse(text, status, dict(HEADERS))
