"""Pages as a browser loads them: all files come from the service itself."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import httpx
import pytest

CHROMIUM_OPTIONS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
)  # fmt: skip


def chromium(folder: str | Path) -> tuple[str, ...]:
    """Return the command of Chromium with its profile in `folder`. Skip the test if Chromium is not installed."""
    if shutil.which("chromium") is None:
        pytest.skip("chromium is not installed")
    return ("chromium", *CHROMIUM_OPTIONS, f"--user-data-dir={folder}")


def policy_of(page: httpx.Response) -> dict[str, str]:
    return dict(part.strip().split(" ", 1) for part in page.headers["content-security-policy"].split(";"))


async def assert_self_contained(client: httpx.AsyncClient, path: str) -> httpx.Response:
    """Assert that a page runs no inline scripts and refers only to files of the service, all of which exist."""
    page = await client.get(path)
    assert page.status_code == 200
    policy = policy_of(page)
    assert (policy["default-src"], policy["script-src"]) == ("'none'", "'self'")
    assert not re.search(r"<script(?![^>]*\ssrc=)", page.text)
    references = re.findall(r'(?:src|href|spec-url)="([^"#]+)"', page.text)
    own = [reference for reference in references if not reference.startswith("data:")]
    assert len(own) >= 2
    for reference in own:
        assert re.match(r"/[^/]|/$", reference)
        found = await client.get(reference)
        assert found.status_code == 200
        assert found.content
    return page
