"""Database URLs in the form that PostgreSQL hosts provide, used with servers with and without TLS."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from core.databases.postgresql_urls import IGNORED, MAX_CONNECT_SECONDS, PASSED_ON, options_of
from core.errors import SettingsError
from core.settings import load_settings
from main import prepare
from repository.engine.database import Database
from repository.engine.engines import Lane
from tests.support.backends import POSTGRES_ONLY
from tests.support.certificates import certificate_for
from tests.support.servers.postgresql import PostgresServer
from tests.support.servers.server import HOST, MissingServer
from tests.support.service import ROOT, SECRET

URL = "postgresql://marquee:hunter2@db.example.org/marquee"
TLS = "SELECT ssl, version, client_dn FROM pg_stat_ssl WHERE pid = pg_backend_pid()"


@dataclass(frozen=True)
class Server:
    """A PostgreSQL with TLS: the URL of a database on it, and the folder of its certificate and key."""

    url: str
    folder: Path


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("certificates")
    certificate_for(HOST, folder)
    (folder / "other").mkdir()
    certificate_for(HOST, folder / "other")
    try:
        postgres = PostgresServer(folder)
    except MissingServer as missing:
        pytest.skip(str(missing))
    with postgres:
        yield Server(postgres.create_database(), folder)


async def rows(url: str, statement: str) -> list[Any]:
    """Return the statement's row as seen by a write connection and by a read connection."""
    database = Database(url)
    try:
        async with database.begin() as (connection, _):
            found = [tuple((await connection.execute(text(statement))).one())]
        async with database.read(Lane.POINT) as reader:
            found.append(tuple((await reader.execute(text(statement))).one()))
        return found
    finally:
        await database.close()


async def refusal(url: str, folder: Path) -> str:
    """Return the sentence that reports why the start fails."""
    places = {"mail_folder": str(folder / "mail"), "storage_url": f"file://{folder}/storage"}
    with pytest.raises(SettingsError) as caught:
        await prepare(load_settings(database_url=url, **places))
    sentence = str(caught.value)
    assert sentence.startswith("DATABASE_URL: ")
    assert sentence.endswith(".")
    assert "\n" not in sentence
    return sentence


# --- against servers


@pytest.mark.parametrize("scheme", ["postgres", "postgresql"])
async def test_sslmode_require_encrypts_every_connection(tls: Server, scheme: str) -> None:
    url = tls.url.replace("postgresql", scheme, 1) + "?sslmode=require&channel_binding=require&gssencmode=prefer"
    assert await rows(url, TLS) == [(True, "TLSv1.3", None)] * 2
    assert await rows(tls.url + "?sslmode=disable", TLS) == [(False, None, None)] * 2
    assert (
        await rows(tls.url + "?sslmode=require&ssl_max_protocol_version=TLSv1.2", TLS) == [(True, "TLSv1.2", None)] * 2
    )


async def test_verify_full_accepts_only_the_known_certificate_for_the_host(tls: Server, tmp_path: Path) -> None:
    url = f"{tls.url}?sslmode=verify-full&sslrootcert={tls.folder}/certificate.pem"
    assert await rows(url, TLS) == [(True, "TLSv1.3", None)] * 2
    other = f"{tls.url}?sslmode=verify-full&sslrootcert={tls.folder}/other/certificate.pem"
    assert "certificate verify failed" in await refusal(other, tmp_path)
    assert "localhost" in await refusal(url.replace(f"@{HOST}", "@localhost"), tmp_path), (
        "the certificate is only for an IP address"
    )
    assert await rows(url.replace(f"@{HOST}", "@localhost").replace("full", "ca"), TLS) == [(True, "TLSv1.3", None)] * 2


async def test_a_client_certificate_is_presented(tls: Server) -> None:
    url = f"{tls.url}?sslmode=require&sslcert={tls.folder}/certificate.pem&sslkey={tls.folder}/key.pem"
    assert await rows(url, TLS) == [(True, "TLSv1.3", f"/CN={HOST}")] * 2


@pytest.mark.parametrize("name", ["sslrootcert", "sslcert", "sslkey", "sslcrl"])
async def test_a_missing_file_is_one_sentence_that_names_the_option(tmp_path: Path, name: str) -> None:
    sentence = await refusal(f"{URL}?sslmode=verify-full&{name}={tmp_path}/none.pem", tmp_path)
    assert sentence == f"DATABASE_URL: expected a readable file for the option {name}."


def reason_of_failed_start(url: str, folder: Path) -> str:
    """Start the service, and return the reason that it gives in one sentence for not starting."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "main.py")],
        env={"DATABASE_URL": url, "SECRET_KEY": SECRET, "PORT": "0"},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1), done.stderr
    assert "hunter2" not in done.stderr
    before, _, reason = done.stderr.strip().partition("the database cannot be used: ")
    assert before == "Marquee cannot start. DATABASE_URL: "
    return reason


@POSTGRES_ONLY
async def test_sslmode_require_without_tls_is_one_sentence_at_the_start(database: Database, tmp_path: Path) -> None:
    url = database.url.replace("postgres@", "postgres:hunter2@")
    assert "rejected SSL upgrade" in reason_of_failed_start(f"{url}?sslmode=require", tmp_path)


def test_a_server_that_is_not_postgresql_is_one_sentence_at_the_start(tmp_path: Path) -> None:
    with socket.create_server((HOST, 0)) as silent:
        url = f"postgresql://u:hunter2@{HOST}:{silent.getsockname()[1]}/x?connect_timeout=1"
        assert reason_of_failed_start(url, tmp_path) == "the server sent no valid response in time."


@POSTGRES_ONLY
async def test_settings_of_the_session_reach_the_server_and_keep_ours(database: Database) -> None:
    names = ("application_name", "geqo", "jit", "statement_timeout")
    statement = "SELECT " + ", ".join(f"current_setting('{name}')" for name in names)
    options = "options=-c%20geqo%3Doff%20-c%20statement_timeout%3D0&application_name=film+club&connect_timeout=9"
    url = f"{database.url}?{options}"
    [writer, reader] = await rows(url, statement)
    assert writer == ("film+club", "off", "off", "15s")
    assert reader[:3] == ("film+club", "off", "off")
    assert reader[3] != "0"
    assert (await rows(database.url, statement))[0] == ("marquee", "on", "off", "15s")


@POSTGRES_ONLY
async def test_the_driver_looks_for_a_server_of_the_wanted_kind(database: Database, tmp_path: Path) -> None:
    assert await rows(f"{database.url}?target_session_attrs=read-write", "SELECT 1") == [(1,)] * 2
    await refusal(f"{database.url}?target_session_attrs=standby&connect_timeout=1", tmp_path)


@POSTGRES_ONLY
async def test_the_host_may_be_an_option(database: Database) -> None:
    address, _, name = database.url.removeprefix("postgresql://postgres@").partition("/")
    host, _, port = address.partition(":")
    assert await rows(f"postgresql:///{name}?host={host}&port={port}&user=postgres", "SELECT 1") == [(1,)] * 2


# --- without a server


def test_options_are_divided_between_the_driver_and_the_server() -> None:
    options = options_of(f"{URL}?ssl=require&options=endpoint%3Dep-x&sslrootcert=/a+b.pem&connect_timeout=7&sslcert=")
    assert options.passed_on == {"sslmode": "require", "sslrootcert": "/a+b.pem"}
    assert options.server_settings == {"options": "endpoint=ep-x"}
    assert options.connect_seconds == 7
    assert options_of(URL).dsn is None


@pytest.mark.parametrize("name", IGNORED)
def test_harmless_options_are_ignored(name: str) -> None:
    assert options_of(f"{URL}?{name}=1") == options_of(URL)


@pytest.mark.parametrize(
    ("query", "named"),
    [
        ("pgbouncer=true", "pgbouncer"),
        ("sslmod=require", "sslmod"),
        ("sslmode=hunter2", "sslmode"),
        ("sslmode=verify_full", "sslmode"),
        ("sslnegotiation=hunter2", "sslnegotiation"),
        ("ssl_min_protocol_version=TLSv1", "ssl_min_protocol_version"),
        ("target_session_attrs=hunter2", "target_session_attrs"),
        ("gssencmode=require", "gssencmode"),
        *((f"connect_timeout={value}", "connect_timeout") for value in ("0", "-1", "x", str(MAX_CONNECT_SECONDS + 1))),
        ("host=hunter2", "host"),
        ("port=hunter2", "port"),
        ("application_name=%00hunter2", "application_name"),
    ],
)
def test_an_unknown_option_or_value_is_one_sentence_that_names_it(query: str, named: str) -> None:
    with pytest.raises(SettingsError) as caught:
        load_settings(database_url=f"{URL}?{query}")
    sentence = str(caught.value)
    assert sentence.startswith("DATABASE_URL: ")
    assert f"option {named}" in sentence
    assert "hunter2" not in sentence
    assert "\n" not in sentence


@pytest.mark.parametrize("url", ["postgresql://user:12/x?hunter=1@host/name", "postgresql://host/x?hunter2=1"])
def test_what_may_belong_to_a_password_is_not_named(url: str) -> None:
    with pytest.raises(SettingsError, match=r"^DATABASE_URL: unknown option; expected") as caught:
        load_settings(database_url=url)
    assert "hunter" not in str(caught.value)


@pytest.mark.parametrize("scheme", ["postgresql+psycopg2", "postgres+asyncpg", "sqlite+aiosqlite"])
def test_a_driver_is_one_sentence_that_names_it(scheme: str) -> None:
    with pytest.raises(SettingsError) as caught:
        load_settings(database_url=URL.replace("postgresql", scheme, 1))
    kind = scheme.partition("+")[0]
    assert str(caught.value) == f"DATABASE_URL: expected {kind}:// without a driver, got '{scheme}'."


def test_every_option_is_documented() -> None:
    text = (ROOT / "docs/settings.md").read_text()
    assert [name for name in (*PASSED_ON, *IGNORED) if f"`{name}`" not in text] == []
