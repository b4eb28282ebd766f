"""The clients' documentation: its programs run, and its limits and errors match the code."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from clients.python.marquee_client import MarqueeError, Refused
from clients.python.marquee_client import arguments as arguments_module
from clients.python.marquee_client import session as session_module
from clients.python.marquee_client import view as view_module
from clients.python.marquee_client import watch as watch_module
from tests.support.backends import SQLITE_ONLY
from tests.support.node import node_command
from tests.support.programs import output_of
from tests.support.service import PASSWORD, Service

ROOT = Path(__file__).resolve().parent.parent.parent


def examples(name: str, language: str) -> list[tuple[str, str]]:
    """Return the programs in a client's README, each with its documented output."""
    text = (ROOT / "clients" / name / "README.md").read_text()
    return re.findall(rf"^```{language}\n(.*?)^```\n\n```text\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


PROGRAMS = {"python": ("python", "example.py", "marquee_client"), "javascript": ("js", "example.mjs", "marquee.js")}


async def output_in(client: str, program: str, service: Service, folder: Path, **environment: str) -> str:
    """Run a documented program in a folder that also holds the client library, and return its output."""
    _, name, library = PROGRAMS[client]
    if not (folder / library).exists():
        (folder / library).symlink_to(ROOT / "clients" / client / library)
    (folder / name).write_text(program.replace("127.0.0.1:8000", f"127.0.0.1:{service.port}"))
    command = [*((sys.executable,) if client == "python" else node_command()), name]
    return await output_of(*command, cwd=folder, env=os.environ | environment)


@pytest.mark.parametrize("client", PROGRAMS)
@SQLITE_ONLY
async def test_the_programs_of_a_readme_print_its_output(client: str, service: Service, tmp_path: Path) -> None:
    found = examples(client, PROGRAMS[client][0])
    assert len(found) == 2
    async with service.person() as person:
        for program, printed in found:
            assert await output_in(client, program, service, tmp_path, TOKEN=person.token) == printed
            movies = (await person.http.get(f"/users/{person.id}/movies")).json()
            for movie in movies:
                assert (await person.http.delete(f"/movies/{movie['id']}")).status_code == 204


def test_the_document_names_the_bounds_and_errors_of_both_clients() -> None:
    document = (ROOT / "docs" / "clients.md").read_text()
    module = (ROOT / "clients" / "javascript" / "marquee.js").read_text()
    shown = {"QUEUED_EVENTS": "1,000 events", "QUEUED_CHANGES": "10,000", "MAX_REQUESTS_IN_FLIGHT": "16"}
    shown |= {"MAX_ATTEMPTS": "20", "MAX_MESSAGE_BYTES": "256 KiB", "QUEUED_CHARACTERS": "8 Mi characters"}
    python = {**vars(watch_module), **vars(view_module), **vars(session_module), **vars(arguments_module)}
    for name, text in shown.items():
        assert text in document
        value = re.search(rf"^const {name} = (.*?);", module, re.MULTILINE)
        assert value is not None
        assert eval(value[1]) == python[name]  # a product such as 1024 * 1024
    kinds: list[type[MarqueeError]] = [*MarqueeError.__subclasses__(), *Refused.__subclasses__()]
    for error in [kind.__name__ for kind in kinds]:
        assert f"export class {error} " in module
        assert f"| `{error}` |" in document


# --- refreshing sessions

SIGNED_IN_FROM_PYTHON = """
import asyncio, os, time, httpx
from marquee_client import Client, Unauthorized

{recipe}
async def main():
    async with httpx.AsyncClient(base_url="http://127.0.0.1:8000") as http:
        login = {{"username": os.environ["NAME"], "password": os.environ["PASSWORD"]}}
        session = Session(http, (await http.post("/auth/login", json=login)).json())
        tokens = await asyncio.gather(*(session.access_token() for _ in range(3)))
        for _ in range(2):
            async with Client("ws://127.0.0.1:8000/ws", token=session.access_token) as client:
                print((await client.request("GET", "/auth/me")).status)
        print(len({{*tokens, await session.access_token()}}), "tokens")
        async with Client("ws://127.0.0.1:8000/ws", token=session.access_token) as client:
            await client.request("POST", "/auth/logout")
        try:
            async with Client("ws://127.0.0.1:8000/ws", token=session.access_token) as client:
                await client.request("GET", "/auth/me")
        except Unauthorized as error:
            print(error)

asyncio.run(main())
"""
SIGNED_IN_FROM_JAVASCRIPT = """
import {{ Client, Unauthorized }} from "./marquee.js";

const body = JSON.stringify({{ username: process.env.NAME, password: process.env.PASSWORD }});
const headers = {{ "Content-Type": "application/json" }};
let tokens = await (await fetch("http://127.0.0.1:8000/auth/login", {{ method: "POST", headers, body }})).json();

{recipe}
const token = session("http://127.0.0.1:8000", tokens);
const found = await Promise.all([token(), token(), token()]);
for (let time = 0; time < 2; time++) {{
  const one = new Client("ws://127.0.0.1:8000/ws", {{ token }});
  console.log((await one.request("GET", "/auth/me")).status);
  one.close();
}}
console.log(new Set([...found, await token()]).size, "tokens");
const last = new Client("ws://127.0.0.1:8000/ws", {{ token }});
await last.request("POST", "/auth/logout");
last.close();
try {{
  await new Client("ws://127.0.0.1:8000/ws", {{ token }}).request("GET", "/auth/me");
}} catch (error) {{
  if (!(error instanceof Unauthorized)) throw error;
  console.log(error.message);
}}
client.close();
"""
SESSIONS = {"python": SIGNED_IN_FROM_PYTHON, "javascript": SIGNED_IN_FROM_JAVASCRIPT}


@pytest.mark.parametrize("client", PROGRAMS)
@SQLITE_ONLY
async def test_the_recipe_of_the_document_refreshes_sessions(
    client: str, new_service: Callable[..., Service], tmp_path: Path
) -> None:
    """Tokens last a minute, and the recipe refreshes a token a minute before it expires: it must do so immediately."""
    service = new_service(ACCESS_TOKEN_EXPIRE_MINUTES="1").start()
    document = (ROOT / "docs" / "clients.md").read_text()
    programs = re.findall(rf"^```{PROGRAMS[client][0]}\n(.*?)^```", document, re.MULTILINE | re.DOTALL)
    [recipe] = [program for program in programs if "refresh_token" in program]
    program = SESSIONS[client].format(recipe=recipe)
    async with service.person() as person:
        output = await output_in(client, program, service, tmp_path, NAME=person.name, PASSWORD=PASSWORD)
    *printed, end = output.splitlines()
    assert printed[:2] == ["200", "200"]
    assert int(printed[2].removesuffix(" tokens")) >= 2, "tokens are refreshed"
    assert "the session is over: sign in again" in end
