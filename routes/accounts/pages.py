"""The pages for browsers that follow a link from a mail: a button to do it, and whether it worked.

Following is a button and not a visit, because programs that look for dangerous mails visit links as browsers do. No
script runs, and one style is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

from starlette.responses import HTMLResponse

MEDIA_TYPE = "text/html"
# The address of the page holds what the link carried, so nothing on it may tell the address to anybody.
HEADERS: Mapping[str, str] = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; style-src 'self'; img-src data:; base-uri 'none'; "
    "frame-ancestors 'none'; form-action 'self'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def question(title: str, sentences: str, token: str, button: str) -> HTMLResponse:
    """Whether to follow the link: the button sends the token to `POST /auth/activate`, which answers with a page."""
    form = f"""
    <form method="post" action="activate">
      <input type="hidden" name="token" value="{escape(token)}">
      <button type="submit">{escape(button)}</button>
    </form>"""
    return page(title, sentences, 200, form=form)


def page(
    title: str, sentences: str, status: int, headers: Mapping[str, str] | None = None, form: str = ""
) -> HTMLResponse:
    """Addresses in it are relative, so that it works behind a proxy that serves us under a path."""
    text = f"""<!doctype html>
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
    <p>{escape(sentences)}</p>{form}
  </main>
</body>
</html>
"""
    return HTMLResponse(text, status, {**(headers or {}), **HEADERS, "Vary": "Accept"})
