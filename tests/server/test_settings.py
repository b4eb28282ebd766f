"""Settings: a wrong one stops the start with one sentence that names it."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from core.errors import SettingsError
from core.settings import load_settings, secret_key, signing_keys
from tests.support.service import ROOT, SECRET


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Neither the developer's environment nor a `.env` reaches these tests."""
    monkeypatch.chdir(tmp_path)
    for name in load_settings().__class__.model_fields:
        monkeypatch.delenv(name.upper(), raising=False)
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PORT", "http"),
        ("PORT", "65536"),
        ("PORT", "-1"),
        ("WORKERS", "0"),
        ("WORKERS", "many"),
        ("DATABASE_URL", "mysql://localhost/marquee"),
        ("DATABASE_URL", "sqlite://"),
        ("DATABASE_URL", "sqlite:///:memory:"),
        ("DATABASE_URL", "postgresql://localhost"),
        ("DATABASE_URL", "marquee.db"),
        ("DATABASE_URL", "postgresql://[::1/marquee"),
        ("BROADCAST_URL", "kafka://localhost"),
        ("BROADCAST_URL", "redis"),
        ("BROADCAST_URL", "redis://localhost:port"),
        ("BROADCAST_URL", "redis://localhost/abc"),
        ("BROADCAST_URL", "memory://x"),
        ("DATABASE_URL", "postgresql://localhost:99999/marquee"),
        ("SECRET_KEY", "short"),
        ("SECRET_KEY", "x" * 31),
        ("OLD_SECRET_KEYS", "x" * 31),
        ("OLD_SECRET_KEYS", f"{'x' * 32},short"),
        ("PASSWORD_MEMORY_KIB", "7"),
        ("PASSWORD_TIME_COST", "0"),
        ("PASSWORD_MIX", "maybe"),
        ("ALGORITHM", "none"),
        ("ALGORITHM", "RS256"),
        ("ACCESS_TOKEN_EXPIRE_MINUTES", "0"),
        ("ACCESS_TOKEN_EXPIRE_MINUTES", "soon"),
        ("FIRST_ADMIN_EMAIL", "nobody"),
        ("ACCOUNT_ACTIVATION", "phone"),
        ("PUBLIC_URL", "example.org"),
        ("PUBLIC_URL", "ftp://example.org"),
        ("PUBLIC_URL", "https://"),
        ("PUBLIC_URL", "https://example.org/?a=b"),
        ("PUBLIC_URL", "https://holly@example.org"),
        ("PUBLIC_URL", "https://example.org/#a"),
        ("PUBLIC_URL", "https://example.org/a b"),
        ("PUBLIC_URL", "https://example.org:99999"),
        ("SMTP_URL", "example.org"),
        ("SMTP_URL", "http://example.org"),
        ("SMTP_URL", "smtp://"),
        ("SMTP_URL", "smtp://holly@example.org"),
        ("SMTP_URL", "smtp://:hunter2@example.org"),
        ("SMTP_URL", "smtp://holly:hunter2@example.org/path"),
        ("SMTP_URL", "smtp://holly:hunter2@example.org?a=b"),
        ("SMTP_URL", "smtp://holly:hunter2@[example.org"),
        ("SMTP_URL", "smtp://holly:hun%0ater2@example.org"),
        ("SMTP_URL", "smtp://example.org:99999"),
        ("MAIL_FROM", "nobody"),
        ("MAIL_FROM", "a@example.org, b@example.org"),
        ("MAIL_FROM", "Marquee <märquee@example.org>"),
        ("ALLOWED_ORIGINS", "example.org"),
        ("ALLOWED_ORIGINS", "https://example.org/path"),
        ("EVENT_RETENTION_HOURS", "0"),
        ("EVENT_RETENTION_HOURS", "nan"),
        ("EVENT_RETENTION_ROWS", "1"),
        ("LOG_FORMAT", "xml"),
        ("LOG_LEVEL", "loud"),
    ],
)
def test_a_wrong_value_is_one_sentence_with_its_name(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError) as caught:
        load_settings()
    sentence = str(caught.value)
    assert sentence.startswith(f"{name}: ")
    assert sentence.endswith(".")
    assert "\n" not in sentence
    if name in ("SECRET_KEY", "OLD_SECRET_KEYS"):
        assert value not in sentence
    assert "hunter2" not in sentence


@pytest.mark.parametrize(
    ("given", "missing"),
    [
        ({"FIRST_ADMIN_USERNAME": "chief"}, "FIRST_ADMIN_PASSWORD is missing"),
        ({"FIRST_ADMIN_PASSWORD": "long enough it is"}, "FIRST_ADMIN_USERNAME or FIRST_ADMIN_EMAIL is missing"),
    ],
)
def test_half_an_admin_is_refused(monkeypatch: pytest.MonkeyPatch, given: dict[str, str], missing: str) -> None:
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError, match=missing) as caught:
        load_settings()
    assert "long enough" not in str(caught.value)


def test_each_lane_of_a_hash_needs_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PASSWORD_MEMORY_KIB", "64")
    monkeypatch.setenv("PASSWORD_PARALLELISM", "8")
    assert load_settings().password_parallelism == 8
    monkeypatch.setenv("PASSWORD_PARALLELISM", "9")
    with pytest.raises(SettingsError, match=r"^PASSWORD_MEMORY_KIB: expected at least 8 for each"):
        load_settings()


def test_keys_that_signed_before_come_after_the_one_that_signs(monkeypatch: pytest.MonkeyPatch) -> None:
    now, before, long_ago = ("a" * 32, "b" * 32, "c" * 32)
    monkeypatch.setenv("SECRET_KEY", now)
    monkeypatch.setenv("OLD_SECRET_KEYS", f"{before}, {long_ago},")
    assert signing_keys(load_settings()) == (now, before, long_ago)


def test_without_settings_there_are_defaults() -> None:
    settings = load_settings()
    assert (settings.host, settings.port, settings.workers) == ("127.0.0.1", 8000, 1)
    assert (settings.database_url, settings.broadcast_url) == ("sqlite:///data/marquee.db", "memory://")
    assert not settings.has_shared_bus


def test_the_environment_comes_before_the_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("PORT=9001\nLOG_LEVEL=WARNING\nALLOWED_ORIGINS=https://a.org, http://b.org/\nX=1\n")
    monkeypatch.setenv("PORT", "9002")
    monkeypatch.setenv("WORKERS", "")  # empty is as good as not there
    settings = load_settings()
    assert (settings.port, settings.log_level, settings.workers) == (9002, "warning", 1)
    assert settings.allowed_origins == ("https://a.org", "http://b.org")


def test_a_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    (tmp_path / ".env").write_bytes(b"PORT=9\xff")
    with pytest.raises(SettingsError, match=r"^\.env: expected UTF-8, [^\n]*\.$"):
        load_settings()


@pytest.mark.parametrize("line", ['SECRET_KEY="abc', "rubbish line here", "=x"])
def test_a_line_of_the_file_that_cannot_be_read_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / ".env").write_text(f"PORT=8001\n{line}\n")
    with pytest.raises(SettingsError, match=r"^\.env: line 2 cannot be parsed"):
        load_settings()


def test_a_folder_in_place_of_the_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / ".env").mkdir()
    with pytest.raises(SettingsError, match=r"^\.env: expected a file"):
        load_settings()


@pytest.mark.parametrize(("algorithm", "least"), [("HS256", 32), ("HS384", 48), ("HS512", 64)])
def test_the_key_is_as_long_as_the_hash(monkeypatch: pytest.MonkeyPatch, algorithm: str, least: int) -> None:
    monkeypatch.setenv("ALGORITHM", algorithm)
    monkeypatch.setenv("SECRET_KEY", "x" * least)
    load_settings()
    monkeypatch.setenv("SECRET_KEY", "x" * (least - 1))
    with pytest.raises(SettingsError, match=r"^SECRET_KEY: expected at least"):
        load_settings()


def test_a_secret_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_KEY", SECRET)
    settings = load_settings()
    assert secret_key(settings) == SECRET
    assert SECRET not in repr(settings)


def test_a_key_is_generated_once_and_kept_for_its_owner_only(tmp_path: Path) -> None:
    settings = load_settings(database_url=f"sqlite:///{tmp_path}/deep/marquee.db")
    key = secret_key(settings)
    assert len(key.encode()) >= 32
    assert secret_key(settings) == key
    [kept] = (tmp_path / "deep").iterdir()  # no draft is left behind
    assert kept.read_text() == key
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    elsewhere = load_settings(database_url=f"sqlite:///{tmp_path}/other/marquee.db")
    assert secret_key(elsewhere) != key


def test_a_kept_key_that_is_too_short_is_refused(tmp_path: Path) -> None:
    (tmp_path / "secret.key").write_text("short")
    with pytest.raises(SettingsError, match=r"^SECRET_KEY: .*secret\.key is shorter"):
        secret_key(load_settings(database_url=f"sqlite:///{tmp_path}/marquee.db"))


def start(folder: Path, **settings: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name not in ("DATABASE_URL", "PORT")}
    return subprocess.run(
        [sys.executable, str(ROOT / "main.py")],
        env=environment | settings,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize(
    ("name", "value"), [("PORT", "http"), ("SECRET_KEY", "short"), ("HOST", "nowhere.invalid"), ("DATABASE_URL", "x")]
)
def test_a_wrong_setting_stops_the_start(tmp_path: Path, name: str, value: str) -> None:
    done = start(tmp_path, **{name: value})
    assert done.returncode == 2
    assert done.stdout == ""
    [line] = [line for line in done.stderr.splitlines() if "secret key generated" not in line]
    assert line.startswith(f"Marquee cannot start. {name}: ")
    assert "Traceback" not in done.stderr


def test_a_port_that_is_taken_stops_the_start(tmp_path: Path) -> None:
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
def test_links_begin_with_the_public_address(monkeypatch: pytest.MonkeyPatch, given: dict[str, str], base: str) -> None:
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert load_settings().base_url == base


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
def test_mail_settings_are_taken(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    taken = getattr(load_settings(), name.lower())
    assert (taken.get_secret_value() if name == "SMTP_URL" else taken) == value
