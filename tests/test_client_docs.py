"""What the documents of the clients say: their programs run, their bounds and errors are those of the code."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from clients.python.marquee_client import MarqueeError, Refused
from clients.python.marquee_client import arguments as arguments_module
from clients.python.marquee_client import session as session_module
from clients.python.marquee_client import view as view_module
from clients.python.marquee_client import watch as watch_module
from tests.node import node_command
from tests.service import Service

ROOT = Path(__file__).resolve().parent.parent


def examples(name: str, language: str) -> list[tuple[str, str]]:
    """Programs, each with what it prints."""
    text = (ROOT / "clients" / name / "README.md").read_text()
    return re.findall(rf"^```{language}\n(.*?)^```\n\n```text\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


PROGRAMS = {"python": ("python", "example.py", "marquee_client"), "javascript": ("js", "example.mjs", "marquee.js")}


@pytest.mark.parametrize("client", PROGRAMS)
async def test_the_programs_of_the_readme_print_what_it_says(client: str, service: Service, tmp_path: Path) -> None:
    language, name, library = PROGRAMS[client]
    command = (sys.executable,) if client == "python" else node_command()
    (tmp_path / library).symlink_to(ROOT / "clients" / client / library)
    found = examples(client, language)
    assert len(found) == 2
    async with service.person() as person:
        for program, printed in found:
            (tmp_path / name).write_text(program.replace("127.0.0.1:8000", f"127.0.0.1:{service.port}"))
            done = await asyncio.to_thread(
                subprocess.run, [*command, name], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False,
                env={**os.environ, "TOKEN": person.token},
            )  # fmt: skip
            assert done.returncode == 0, done.stderr
            assert done.stdout == printed
            movies = (await person.http.get(f"/users/{person.id}/movies")).json()
            for movie in movies:
                assert (await person.http.delete(f"/movies/{movie['id']}")).status_code == 204


def test_the_documents_name_the_bounds_and_errors_of_both_clients() -> None:
    document = (ROOT / "docs" / "clients.md").read_text()
    module = (ROOT / "clients" / "javascript" / "marquee.js").read_text()
    shown = {"QUEUED_EVENTS": "1,000 events", "QUEUED_CHANGES": "10,000", "MAX_REQUESTS_IN_FLIGHT": "16"}
    shown |= {"MAX_ATTEMPTS": "20", "MAX_MESSAGE_BYTES": "256 KiB", "QUEUED_CHARACTERS": "8 Mi characters"}
    python = {**vars(watch_module), **vars(view_module), **vars(session_module), **vars(arguments_module)}
    for name, text in shown.items():
        assert text in document
        value = re.search(rf"^const {name} = (.*?);", module, re.MULTILINE)
        assert value is not None
        assert eval(value[1]) == python[name]  # a product of numbers
    kinds: list[type[MarqueeError]] = [*MarqueeError.__subclasses__(), *Refused.__subclasses__()]
    for error in [kind.__name__ for kind in kinds]:
        assert f"export class {error} " in module
        assert f"| `{error}` |" in document
