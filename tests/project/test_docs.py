"""The documents match the code: they cover all that clients and operators use, and nothing that does not exist."""

from __future__ import annotations

import ast
import importlib
import json
import re
from pathlib import Path

import pytest
from dotenv import dotenv_values
from starlette.routing import BaseRoute, Mount, Route, WebSocketRoute

from core import errors
from core.errors import CloseCode, Forbidden, Problem, Unauthenticated, Unavailable
from core.settings import Settings
from main import build_app
from resources.topics import TOPICS
from routes.table import OPERATIONS
from tests.support.documents import DOCUMENTS, ROOT, bare, rows_of, strings_in, text_of, trees

OPERATION_NAME = re.compile(r'"operation":\s*"([a-z_]+)"')


# --- REST


def served(routes: list[BaseRoute]) -> set[tuple[str, str]]:
    found: set[tuple[str, str]] = set()
    for route in routes:
        if isinstance(route, WebSocketRoute):
            found.add(("WS", route.path))
        elif isinstance(route, Mount):
            found.add(("GET", route.path))
        else:
            assert isinstance(route, Route)
            found |= {(method, route.path) for method in route.methods or () if method != "HEAD"}
    return found


def test_the_table_of_routes_is_the_routes_that_are_served(tmp_path: Path) -> None:
    app = build_app(Settings(database_url=f"sqlite:///{tmp_path}/marquee.db", _env_file=None))
    documented = [(cells[0], bare(cells[1])) for cells in rows_of(text_of("docs/api.md"), "method", "path")]
    assert len(documented) == len(set(documented)), "a route is listed twice in docs/api.md"
    assert set(documented) == served(app.routes)


def test_the_table_of_routes_says_who_must_sign_in_and_what_is_answered() -> None:
    documented = {
        (cells[0], bare(cells[1])): (cells[2], cells[3]) for cells in rows_of(text_of("docs/api.md"), "method", "path")
    }
    for operation in OPERATIONS:
        who, success = documented[operation.method, operation.path]
        assert (who != "anyone") == operation.signed_in, f"{operation.method} {operation.path}: {who}"
        answers = [str(status) for status in operation.answers if status < 400]
        assert success.split(", ") == answers, f"{operation.method} {operation.path}: {success}"


def test_every_status_of_an_error_is_documented() -> None:
    documented = {int(cells[0]) for cells in rows_of(text_of("docs/api.md"), "status", "when")}
    raised = {kind.status for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Problem)}
    of_the_framework, of_the_server = {404, 405}, {414, 431}
    assert documented == raised | of_the_framework | of_the_server


# --- settings


def test_every_setting_is_documented_with_its_default() -> None:
    documented = {bare(cells[0]): bare(cells[1]) for cells in rows_of(text_of("docs/settings.md"), "variable")}
    expected = {}
    for name, field in Settings.model_fields.items():
        default = field.default
        if isinstance(default, float):
            default = f"{default:g}"
        expected[name.upper()] = str(default) if default not in (None, ()) else "none"
    assert documented == expected


def test_the_example_of_an_environment_file_names_every_setting() -> None:
    lines = re.findall(r"^# ([A-Z0-9_]+)=(.*)$", text_of(".env.example"), re.MULTILINE)
    documented = {bare(cells[0]): bare(cells[1]) for cells in rows_of(text_of("docs/settings.md"), "variable")}
    assert {name: value or "none" for name, value in lines} == documented


def test_the_example_of_an_environment_file_works_when_uncommented(tmp_path: Path) -> None:
    text = re.sub(r"^# ([A-Z0-9_]+=.*)$", r"\1", text_of(".env.example"), flags=re.MULTILINE)
    (tmp_path / ".env").write_text(text)
    assert dotenv_values(tmp_path / ".env").keys() == {name.upper() for name in Settings.model_fields}
    assert Settings(_env_file=tmp_path / ".env") == Settings(_env_file=None)


def test_the_settings_of_the_readme_exist() -> None:
    names = [name for cells in rows_of(text_of("README.md"), "variable") for name in re.findall(r"`(\w+)`", cells[0])]
    assert {name.lower() for name in names} <= set(Settings.model_fields)


# --- the websocket


def operations_of_the_code() -> set[str]:
    """Return the operations in the code: those passed to `tx.emit` or `tx.emit_bulk`, and those of other frames."""
    found: set[str] = set()
    for tree in trees("repository", "realtime", "jobs"):
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                if node.func.attr in ("emit", "emit_bulk"):
                    found.update(strings_in(node.args[1]))
            elif isinstance(node, ast.Dict):
                for key, value in zip(node.keys, node.values, strict=True):
                    if isinstance(key, ast.Constant) and key.value == "operation" and isinstance(value, ast.Constant):
                        found.add(str(value.value))
            elif isinstance(node, ast.Constant) and isinstance(node.value, bytes):
                found.update(re.findall(r'"operation":"([a-z_]+)"', node.value.decode(errors="replace")))
    return found


def test_every_frame_is_documented_and_shown() -> None:
    text = text_of("docs/protocol.md")
    documented = {bare(cells[0]) for cells in rows_of(text, "operation", "durable")}
    assert documented == operations_of_the_code()
    assert set(OPERATION_NAME.findall(text)) == documented


def codes_of_replies() -> set[str]:
    # `auth` and `subscribe` pass these errors on.
    found = {Unauthenticated.code, Unavailable.code, Forbidden.code}
    for tree in trees("realtime"):
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                position = {"BadMessage": 0, "TooMany": 0, "error_reply": 1}.get(name)
                if position is not None and isinstance(node.args[position], ast.Constant):
                    found.update(strings_in(node.args[position]))
            elif isinstance(node, ast.Dict):
                for key, value in zip(node.keys, node.values, strict=True):
                    if isinstance(key, ast.Constant) and key.value == "code" and isinstance(value, ast.Constant):
                        found.update(strings_in(value))
    return found


def test_every_error_code_of_a_reply_is_documented() -> None:
    documented = {bare(cells[0]) for cells in rows_of(text_of("docs/protocol.md"), "error code")}
    assert documented == codes_of_replies()


def test_every_close_code_is_documented_with_its_number() -> None:
    documented = {(int(cells[0]), bare(cells[1])) for cells in rows_of(text_of("docs/protocol.md"), "code", "name")}
    assert documented == {(code.value, code.name) for code in CloseCode}


def test_every_action_is_documented() -> None:
    documented = {bare(cells[0]) for cells in rows_of(text_of("docs/protocol.md"), "action", "members")}
    known: set[str] = set()
    for node in ast.walk(ast.parse(text_of("realtime/sockets/connection.py"))):
        if (
            isinstance(node, ast.AnnAssign)
            and isinstance(node.target, ast.Attribute)
            and node.target.attr == "_actions"
        ):
            assert isinstance(node.value, ast.Dict)
            known.update(str(key.value) for key in node.value.keys if isinstance(key, ast.Constant))
    assert documented == known


def test_every_query_parameter_and_topic_of_the_websocket_is_documented() -> None:
    text = text_of("docs/protocol.md")
    documented = tuple(bare(cells[0]) for cells in rows_of(text, "query parameter"))
    assert documented == importlib.import_module("realtime.sockets.endpoint").PARAMETERS
    described = next(cells[1] for cells in rows_of(text, "query parameter") if cells[0] == "`topics`")
    assert set(re.findall(r"`(\w+)`", described)) == set(TOPICS)


def test_every_reason_of_a_resync_is_documented() -> None:
    documented = {bare(cells[0]) for cells in rows_of(text_of("docs/protocol.md"), "reason", "when")}
    said = {text for tree in trees("realtime") for text in strings_in(tree)}
    assert documented <= said
    # Every string in the code that looks like a reason for a resync must be in the table.
    assert {text for text in said if re.match(r"(position is|another epoch|the log was) ?\w*", text)} <= documented


# --- make


def test_the_targets_of_make_are_explained_and_those_that_are_named_exist() -> None:
    makefile = text_of("Makefile")
    explained = set(re.findall(r"^([a-z]+):.* ## \S", makefile, re.MULTILINE))
    phony = re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    assert phony is not None
    assert set(phony[1].split()) == explained
    for path in DOCUMENTS:
        text = path.read_text()
        commands = "".join(re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
        named = [*re.findall(r"`make ([a-z]+)", text), *re.findall(r"^make ([a-z]+)", commands, re.MULTILINE)]
        assert set(named) <= explained, path


# --- all documents


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path: Path) -> None:
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if not target.startswith(("http://", "https://")):
            assert (path.parent / target.partition("#")[0]).exists(), target


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_examples_are_json(path: Path) -> None:
    for block in re.findall(r"^```json\n(.*?)^```", path.read_text(), re.MULTILINE | re.DOTALL):
        for line in block.splitlines():
            assert isinstance(json.loads(line), dict), line


def test_every_document_can_be_reached_from_the_readme() -> None:
    reached = {ROOT / "README.md"}
    waiting = [ROOT / "README.md"]
    while waiting:
        path = waiting.pop()
        for target in re.findall(r"\]\(([^)#:]+)\)", path.read_text()):
            found = (path.parent / target).resolve()
            found = found / "README.md" if found.is_dir() else found
            if found.suffix == ".md" and found not in reached:
                reached.add(found)
                waiting.append(found)
    assert set(DOCUMENTS) <= reached


def test_the_decisions_are_numbered_and_listed() -> None:
    pages = sorted(path.name for path in (ROOT / "docs" / "decisions").glob("0*.md"))
    assert [int(name[:4]) for name in pages] == list(range(1, len(pages) + 1))
    listed = re.findall(r"\]\((0[^)]+)\)", text_of("docs/decisions/README.md"))
    assert listed == pages
