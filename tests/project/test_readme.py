"""The commands of the README run in a shell and print what the README shows."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from core.settings import Settings
from tests.support.service import Service

ROOT = Path(__file__).resolve().parent.parent.parent
README = (ROOT / "README.md").read_text()
ADDRESS = "127.0.0.1:8000"


def blocks(kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def lines(start: str) -> list[str]:
    return [line for block in blocks("sh") for line in block.splitlines() if re.match(start, line)]


def shape(frame: Any) -> Any:
    """Return a frame with "…" in place of the times and the epoch, which differ from run to run."""
    if isinstance(frame, dict):
        return {
            name: "…" if name in ("ts", "created_at", "updated_at", "epoch") else shape(frame[name]) for name in frame
        }
    return [shape(item) for item in frame] if isinstance(frame, list) else frame


async def pasted(script: str, service: Service) -> list[dict[str, Any]]:
    """Run the lines in one shell, as if they were pasted, and return the JSON bodies that they print."""
    text = script.replace(ADDRESS, f"127.0.0.1:{service.port}").replace("curl ", "curl -sS --fail-with-body ")
    done = await asyncio.to_thread(
        subprocess.run, ["bash", "-euc", text], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    decoder, rest, found = json.JSONDecoder(), done.stdout.strip(), []
    while rest:
        body, end = decoder.raw_decode(rest)
        found.append(body)
        rest = rest[end:].strip()
    return found


async def test_the_first_events_are_those_that_the_readme_shows(new_service: Callable[..., Service]) -> None:
    shown = [json.loads(line) for line in blocks("json")[0].splitlines()]
    # A new database without a first admin, as `make run` creates it.
    service = new_service(FIRST_ADMIN_USERNAME="", FIRST_ADMIN_PASSWORD="")
    script = "\n".join(line for line in lines("curl|TOKEN") if "/generate/" not in line)
    with service.running():
        async with service.watch() as watcher:
            user, added, changed = await pasted(script, service)
            frames = [watcher.welcome, *[await watcher.next() for _ in shown[1:]]]
    assert list(map(shape, frames)) == list(map(shape, shown))
    assert user["username"] == "holly"
    assert frames[1]["data"] == added
    assert frames[2]["data"] == changed


async def test_the_line_that_generates_movies_makes_them_arrive(new_service: Callable[..., Service]) -> None:
    service = new_service()
    script = "\n".join(line for line in lines("curl|TOKEN") if re.search("register|token|generate", line))
    with service.running():
        async with service.watch() as watcher:
            _, job = await pasted(script, service)
            assert job["state"] == "queued"
            rows, operations = 0, set()
            while rows < job["total"]:
                frame = await watcher.next()
                operations.add(frame["operation"])
                if frame["operation"] == "add_bulk":  # of movies, or of the genres that they show
                    assert frame["data"]["job_id"] == job["id"]
                    rows += frame["data"]["count"] if frame["topic"] == "movies" else 0
            assert rows == 1_000
            assert {"add_bulk", "progress"} <= operations


async def test_the_wscat_lines_name_a_socket_that_answers(service: Service) -> None:
    addresses = [re.search(r"ws://([^/]+)(/ws)\??([^'\s]*)", line) for line in lines("wscat")]
    assert len(addresses) == 3
    for address in addresses:
        assert address is not None
        assert address[1] == ADDRESS
        async with service.watch(address[3]) as watcher:
            assert watcher.welcome["operation"] == "welcome"


async def test_the_message_that_wscat_sends_is_a_good_subscription(service: Service) -> None:
    [message] = [found[1] for line in lines("wscat") if (found := re.search(r"-x '([^']+)'", line))]
    async with service.watch() as watcher:
        await watcher.send(json.loads(message))
        reply = await watcher.next()
        assert reply["data"]["subscription"] == "s1"
        assert (await watcher.next())["operation"] == "snapshot"


def test_the_make_targets_and_settings_of_the_readme_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"\bmake ([a-z]+)\b", " ".join([*blocks("sh"), *re.findall("`(.*?)`", README)]))) <= targets
    for line in lines("[A-Z_]+="):
        names = re.findall(r"\b([A-Z_]+)=", line)
        assert {name.lower() for name in names} <= set(Settings.model_fields) | {"token"}


def test_the_picture_is_there_and_light() -> None:
    for target in re.findall(r"!\[[^]]*\]\(([^)]+)\)", README):
        picture = (ROOT / target).read_bytes()
        assert picture.startswith(b"\x89PNG")
        assert len(picture) < 300_000


async def test_the_lines_of_the_banner_work_when_pasted(new_service: Callable[..., Service]) -> None:
    service = new_service()
    with service.running():
        text = service.log()
        assert f"wscat -c {service.ws_url}\n" in text
        script = "\n".join(re.findall(r"^    ((?:curl|TOKEN=).*)$", text, re.MULTILINE))
        async with service.watch() as watcher:
            _, movie, job = await pasted(script, service)
            assert (await watcher.expect("add", "movies"))["data"] == movie
            assert (await watcher.expect("add", "jobs"))["data"] == job
        async with service.anyone() as client:
            for address in re.findall(rf"{service.url}/[\w.]*(?=\s)", text):
                assert (await client.get(address)).status_code in (200, 401, 405), address
