"""Settings: an invalid setting stops the start, with one sentence that names the setting."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from core.errors import SettingsError
from core.settings import Settings, load_settings, secret_key, signing_keys, warn_of_misspelt_settings
from tests.support.service import ROOT, SECRET

Load = Callable[..., Settings]


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Keep the developer's environment and `.env` away from these tests."""
    monkeypatch.chdir(tmp_path)
    for name in load_settings().__class__.model_fields:
        monkeypatch.delenv(name.upper(), raising=False)
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Load:
    """Return a function that loads the settings with these variables in the environment."""

    def load(**values: str) -> Settings:
        for name, value in values.items():
            monkeypatch.setenv(name, value)
        return load_settings()

    return load


INVALID: Mapping[str, Sequence[str]] = {
    "PORT": ("http", "65536", "-1"),
    "WORKERS": ("0", "many"),
    "DATABASE_URL": (
        "mysql://localhost/marquee", "sqlite://", "sqlite:///:memory:", "postgresql://localhost", "marquee.db",
        "postgresql://[::1/marquee", "postgresql://localhost:99999/marquee", "postgresql+psycopg2://localhost/marquee",
        "sqlite+aiosqlite:///marquee.db", "postgresql://localhost/marquee?sslmode=hunter2",
        "postgresql://localhost/marquee?hunter2", "postgresql://localhost/marquee?sslmode=require#hunter2",
    ),
    "BROADCAST_URL": (
        "kafka://localhost", "redis", "redis://localhost:port", "redis://localhost/abc", "memory://x",
        "redis://localhost/0?ssl=hunter2",
    ),
    "MAX_HTTP_CONNECTIONS": ("0", "many"),
    "MAX_HTTP_CONNECTIONS_PER_ADDRESS": ("0",),
    "SECRET_KEY": ("short", "x" * 31),
    "OLD_SECRET_KEYS": ("x" * 31, f"{'x' * 32},short"),
    "PASSWORD_MEMORY_KIB": ("7",),
    "PASSWORD_TIME_COST": ("0",),
    "DATABASE_POOLER": ("pgbouncer",),
    "PASSWORD_MIX": ("maybe",),
    "COMPRESSION": ("gzip", "1"),
    "ALGORITHM": ("none", "RS256"),
    "ACCESS_TOKEN_EXPIRE_MINUTES": ("0", "soon"),
    "FIRST_ADMIN_EMAIL": ("chief",),
    "ACCOUNT_ACTIVATION": ("phone",),
    "ROOT_PATH": (
        "marquee", "/", "/marquee/", "//marquee", "/a//b", "/a/../b", "/.", "/a?b", "/a#b", "/a b", "/a%20b", "/é",
        "/" + "a" * 100, "https://example.org/marquee",
    ),
    "PUBLIC_URL": (
        "https://example.org/a b", "https://example.org/a//b", "https://example.org/a%20b",
        "example.org", "ftp://example.org", "https://", "https://example.org/?a=b", "https://holly@example.org",
        "https://example.org/#a", "https://example.org/a b", "https://example.org:99999",
    ),
    "SMTP_URL": (
        "example.org", "http://example.org", "smtp://", "smtp://holly@example.org", "smtp://:hunter2@example.org",
        "smtp://holly:hunter2@example.org/path", "smtp://holly:hunter2@example.org?a=b",
        "smtp://holly:hunter2@[example.org", "smtp://holly:hun%0ater2@example.org", "smtp://example.org:99999",
    ),
    "MAIL_FROM": ("marquee", "a@example.org, b@example.org", "Marquee <märquee@example.org>"),
    "ALLOWED_HOSTS": ("https://example.org", "example.org:443", "exa mple.org", "*.", "a*b", "[::1"),
    "ALLOWED_ORIGINS": ("example.org", "https://example.org/path"),
    "EVENT_RETENTION_HOURS": ("0", "nan"),
    "EVENT_RETENTION_ROWS": ("1",),
    "EVENT_RETENTION_BYTES": ("1000000",),
    "READ_TIMEOUT_SECONDS": ("0", "301", "soon"),
    "GENERATED_ROWS_PER_DAY": ("0", "many"),
    "USERS_PER_ADDRESS": ("0", "many"),
    "JOB_RETENTION_HOURS": ("23", "nan"),
    "LOG_FORMAT": ("xml",),
    "LOG_LEVEL": ("loud",),
}  # fmt: skip


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in INVALID.items() for value in values])
def test_an_invalid_value_gives_one_sentence_with_its_name(load: Load, name: str, value: str) -> None:
    with pytest.raises(SettingsError) as caught:
        load(**{name: value})
    sentence = str(caught.value)
    assert sentence.startswith(f"{name}: ")
    assert sentence.endswith(".")
    assert "\n" not in sentence
    if name in ("SECRET_KEY", "OLD_SECRET_KEYS"):
        assert value not in sentence
    assert "hunter2" not in sentence


def test_no_message_shows_a_part_of_a_password(load: Load) -> None:
    """Brackets, a colon or an `@` in a password make a part of the password look like another part of the URL."""

    def values(*schemes: str) -> list[str]:
        return [
            f"{scheme}://user:{password}@host/name{end}"
            for scheme in schemes
            for password in ("[hunter2]x", "hunter2:99999", "x@hunter2:y", "hunter2]", "x/hunter2")
            for end in ("", "?hunter2=1", "#hunter2")
        ]

    for name in Settings.model_fields:
        takes_urls = "url" in name or "origin" in name
        for value in values("postgresql", "redis", "smtp", "https", "s3", "other") if takes_urls else values("other"):
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv(name.upper(), value)
                try:
                    load()
                except SettingsError as error:
                    assert "hunter2" not in str(error), (name, value)


def test_a_misspelt_setting_in_the_env_file_is_a_warning() -> None:
    Path(".env").write_text("DATABSE_URL=sqlite:///x.db\nPORT=8001\nPOSTGRES_PASSWORD=hunter2\nEDITOR=vi\n")
    with capture_logs() as lines:
        warn_of_misspelt_settings()
    assert [(line["name"], line["likely"]) for line in lines] == [("DATABSE_URL", "DATABASE_URL")]


@pytest.mark.parametrize(
    ("given", "missing"),
    [
        ({"FIRST_ADMIN_USERNAME": "chief"}, "FIRST_ADMIN_PASSWORD is required"),
        ({"FIRST_ADMIN_LAST_NAME": "long enough"}, "FIRST_ADMIN_USERNAME or FIRST_ADMIN_EMAIL is required"),
        ({"FIRST_ADMIN_PASSWORD": "long enough it is"}, "FIRST_ADMIN_USERNAME or FIRST_ADMIN_EMAIL is required"),
    ],
)
def test_half_a_first_admin_is_refused(load: Load, given: dict[str, str], missing: str) -> None:
    with pytest.raises(SettingsError, match=missing) as caught:
        load(**given)
    assert "long enough" not in str(caught.value)


def test_a_hash_needs_memory_for_each_parallel_lane(load: Load) -> None:
    assert load(PASSWORD_MEMORY_KIB="64", PASSWORD_PARALLELISM="8").password_parallelism == 8
    with pytest.raises(SettingsError, match=r"^PASSWORD_MEMORY_KIB: expected at least 8 times"):
        load(PASSWORD_PARALLELISM="9")


def test_old_signing_keys_follow_the_current_one(load: Load) -> None:
    now, before, long_ago = ("a" * 32, "b" * 32, "c" * 32)
    assert signing_keys(load(SECRET_KEY=now, OLD_SECRET_KEYS=f"{before}, {long_ago},")) == (now, before, long_ago)


def test_settings_have_defaults() -> None:
    settings = load_settings()
    assert (settings.host, settings.port, settings.workers) == ("127.0.0.1", 8000, 1)
    assert (settings.database_url, settings.broadcast_url) == ("sqlite:///data/marquee.db", "memory://")
    assert not settings.has_shared_bus


def test_the_environment_overrides_the_file(load: Load, tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("PORT=9001\nLOG_LEVEL=WARNING\nALLOWED_ORIGINS=https://a.org, http://b.org/\nX=1\n")
    settings = load(PORT="9002", WORKERS="")  # empty means not set
    assert (settings.port, settings.log_level, settings.workers) == (9002, "warning", 1)
    assert settings.allowed_origins == ("https://a.org", "http://b.org")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"PORT=9\xff", r"expected UTF-8, [^\n]*\.$"),
        *((b"PORT=1\n" + line, "line 2 cannot be parsed") for line in (b'SECRET_KEY="a', b"rubbish line here", b"=x")),
    ],
)
def test_an_invalid_file_is_refused(tmp_path: Path, content: bytes, problem: str) -> None:
    (tmp_path / ".env").write_bytes(content)
    with pytest.raises(SettingsError, match=rf"^\.env: {problem}"):
        load_settings()


def test_a_folder_in_place_of_the_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / ".env").mkdir()
    with pytest.raises(SettingsError, match=r"^\.env: expected a file"):
        load_settings()


@pytest.mark.parametrize(("algorithm", "least"), [("HS256", 32), ("HS384", 48), ("HS512", 64)])
def test_the_key_is_at_least_as_long_as_the_hash(load: Load, algorithm: str, least: int) -> None:
    load(ALGORITHM=algorithm, SECRET_KEY="x" * least)
    with pytest.raises(SettingsError, match=r"^SECRET_KEY: expected at least"):
        load(SECRET_KEY="x" * (least - 1))


def test_a_secret_is_not_shown(load: Load) -> None:
    settings = load(SECRET_KEY=SECRET)
    assert secret_key(settings) == SECRET
    assert SECRET not in repr(settings)


def test_a_key_is_generated_once_and_readable_by_its_owner_only(tmp_path: Path) -> None:
    settings = load_settings(database_url=f"sqlite:///{tmp_path}/deep/marquee.db")
    key = secret_key(settings)
    assert len(key.encode()) >= 32
    assert secret_key(settings) == key
    [kept] = (tmp_path / "deep").iterdir()  # no temporary file is left behind
    assert kept.read_text() == key
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    elsewhere = load_settings(database_url=f"sqlite:///{tmp_path}/other/marquee.db")
    assert secret_key(elsewhere) != key


def test_a_stored_key_that_is_too_short_is_refused(tmp_path: Path) -> None:
    (tmp_path / "secret.key").write_text("short")
    with pytest.raises(SettingsError, match=r"^SECRET_KEY: .*secret\.key is shorter"):
        secret_key(load_settings(database_url=f"sqlite:///{tmp_path}/marquee.db"))


def start(folder: Path, *arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
    """Run `python main.py`, or Python with other arguments, until it ends."""
    command = [sys.executable, *(arguments or (str(ROOT / "main.py"),))]
    environment = {name: value for name, value in os.environ.items() if name not in ("DATABASE_URL", "PORT")} | settings
    return subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("PORT", "http"), ("SECRET_KEY", "short"), ("HOST", "nowhere.invalid"), ("DATABASE_URL", "x")),
        ("RATE_LIMITS", "GET /planets=3/minute"),
    ],
)
def test_an_invalid_setting_stops_the_start(tmp_path: Path, name: str, value: str) -> None:
    done = start(tmp_path, **{name: value})
    assert done.returncode == 2
    assert done.stdout == ""
    [line] = [line for line in done.stderr.splitlines() if "secret key generated" not in line]
    assert line.startswith(f"Marquee cannot start. {name}: ")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"FIRST_ADMIN_USERNAME": "boss", "FIRST_ADMIN_PASSWORD": "boss"}, "FIRST_ADMIN_PASSWORD: string should have "),
        ({"RATE_LIMITS": "GET /planets=3/minute"}, "RATE_LIMITS: there is no route GET /planets."),
        ({"DATABASE_URL": "postgresql://u:p@127.0.0.1:1/x"}, "DATABASE_URL: the database cannot be used: "),
        ({"PORT": "http"}, "PORT: "),
    ],
)
def test_a_setting_that_does_not_work_stops_uvicorn_with_a_sentence(
    tmp_path: Path, settings: dict[str, str], problem: str
) -> None:
    """The lifespan of the application finds most of these problems, in the workers of our own server, too."""
    arguments = ("-m", "uvicorn", "main:app", "--port", "0", "--app-dir", str(ROOT))
    done = start(tmp_path, *arguments, **({"SECRET_KEY": SECRET, "PYTHONPATH": str(ROOT)} | settings))
    assert done.returncode > 0
    output = done.stdout + done.stderr
    assert output.count(f"Marquee cannot start. {problem}") == 1
    assert "Traceback" not in output


def test_a_port_in_use_stops_the_start(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        done = start(tmp_path, PORT=str(other.getsockname()[1]), SECRET_KEY=SECRET)
    assert done.returncode == 2
    assert done.stderr.startswith("Marquee cannot start. PORT: cannot listen on ")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("given", "base"),
    [
        ({"PUBLIC_URL": "https://example.org/movies/"}, "https://example.org/movies"),
        ({"PUBLIC_URL": "http://[::1]:8000"}, "http://[::1]:8000"),
        ({"HOST": "0.0.0.0", "PORT": "81"}, "http://127.0.0.1:81"),
        ({"HOST": "::", "PORT": "81"}, "http://[::1]:81"),
        ({"HOST": "movies.example.org"}, "http://movies.example.org:8000"),
    ],
)
def test_urls_begin_with_the_public_address(load: Load, given: dict[str, str], base: str) -> None:
    assert load(**given).base_url == base


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("SMTP_URL", "smtp://mail.example.org"),
        ("SMTP_URL", "smtps://holly%40example.org:p%40ss%2Fword@mail.example.org:465/"),
        ("MAIL_FROM", "marquee@example.org"),
        ("MAIL_FROM", "Märquee <marquee@example.org>"),
        ("MAIL_FROM", '"Marquee, Inc." <marquee@example.org>'),
    ],
)
def test_valid_mail_settings_are_accepted(load: Load, name: str, value: str) -> None:
    taken = getattr(load(**{name: value}), name.lower())
    assert (taken.get_secret_value() if name == "SMTP_URL" else taken) == value
