"""File storage: a folder and a bucket behave alike, and invalid settings are reported at startup."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import main
from core.errors import SettingsError, Unavailable
from core.settings import Settings, load_settings
from gateways import storage as storage_module
from gateways.storage import Storage, check, open_storage
from tests.support.requests import values_by_field
from tests.support.servers.s3 import S3Server
from tests.support.servers.server import MissingServer


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Keep the developer's environment and `.env` out of these tests."""
    monkeypatch.chdir(tmp_path)
    for name in Settings.model_fields:
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture(scope="module")
def s3() -> Iterator[S3Server]:
    try:
        server = S3Server()
    except MissingServer as missing:
        pytest.skip(str(missing))
    with server:
        yield server


def bucket(s3: S3Server, **changes: str) -> Storage:
    settings = {name.lower(): value for name, value in s3.settings("files").items()}
    return open_storage(load_settings(**{**settings, **changes}))


@pytest.fixture(params=["folder", "bucket"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "folder":
        return open_storage(load_settings(storage_url=f"file://{tmp_path}/a%20folder/files"))
    return bucket(request.getfixturevalue("s3"))


async def names(storage: Storage, folder: str = "some") -> list[str]:
    return sorted([file.name async for page in storage.pages(folder) for file in page])


async def test_files_are_stored_listed_and_deleted(storage: Storage) -> None:
    await check(storage)
    assert await names(storage) == []
    for name in ("some/a/1.webp", "some/a/2.webp", "some/b/1.webp", "other/1.webp"):
        await storage.put(name, name.encode() * 1_000)
    assert await storage.get("some/a/2.webp") == b"some/a/2.webp" * 1_000
    assert await storage.get("some/a/3.webp") is None
    assert await names(storage) == ["some/a/1.webp", "some/a/2.webp", "some/b/1.webp"]
    await storage.delete(["some/a/1.webp", "some/c/never.webp", "some/b/1.webp"])
    assert await names(storage) == ["some/a/2.webp"]
    await storage.delete(["some/a/2.webp", "other/1.webp"])
    assert await names(storage) == []


async def test_files_are_listed_in_pages(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_module, "FILES_PER_PAGE", 3)
    wanted = [f"some/{number}/1.webp" for number in range(8)]
    for name in wanted:
        await storage.put(name, b"x")
    pages = [page async for page in storage.pages("some")]
    assert [len(page) for page in pages] == [3, 3, 2]
    assert sorted(file.name for page in pages for file in page) == wanted
    assert all(abs(file.modified_at.timestamp() - time.time()) < 60 for page in pages for file in page)
    await storage.delete(wanted)


async def test_a_file_over_the_size_limit_is_not_read(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_module, "MAX_FILE_BYTES", 10)
    await storage.put("some/large", b"x" * 11)
    assert await storage.get("some/large") is None
    await storage.delete(["some/large"])


def test_by_default_files_are_kept_beside_the_database(tmp_path: Path) -> None:
    assert load_settings(database_url=f"sqlite:///{tmp_path}/x/marquee.db").storage_folder == tmp_path / "x" / "files"
    assert load_settings(database_url="postgresql://localhost/marquee").storage_folder == Path("data/files")
    assert load_settings(storage_url="file:///srv/a%20folder").storage_folder == Path("/srv/a folder")
    assert load_settings(storage_url="s3://pictures").storage_folder is None


INVALID = {
    "STORAGE_URL": [
        *("files", "file://files", "file://host/files", "file:///", "ftp://host/files", "s3://", "s3://UPPER"),
        *("s3://key:secret@bucket", "s3://bucket/../other", "s3://bucket?region=eu"),
    ],
    "S3_ENDPOINT_URL": ["localhost:9000", "https://key:secret@host", "http://host:99999", "http://"],
    "S3_ACCESS_KEY_ID": ["alone"],
    "S3_SECRET_ACCESS_KEY": ["secret"],
}


@pytest.mark.parametrize(("name", "value"), values_by_field(INVALID))
def test_an_invalid_setting_is_reported_in_one_sentence(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError) as caught:
        load_settings()
    sentence = str(caught.value)
    assert name in sentence.partition(": ")[0]
    assert sentence.endswith(".")
    assert "secret" not in sentence


async def test_a_folder_that_cannot_be_used_stops_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(SettingsError, match=r"^STORAGE_URL: the folder .* cannot be used: .*\.$"):
        open_storage(load_settings(storage_url=f"file://{tmp_path}/file/files"))


@pytest.mark.parametrize(
    "changes",
    [
        {"s3_secret_access_key": "another secret than the right one"},
        {"s3_access_key_id": "nobody"},
        {"storage_url": "s3://no-such-bucket"},
    ],
)
async def test_a_bucket_that_rejects_requests_stops_the_start(
    s3: S3Server, changes: dict[str, str], tmp_path: Path
) -> None:
    settings = {name.lower(): value for name, value in s3.settings("files").items()} | changes
    with pytest.raises(SettingsError, match=r"^STORAGE_URL: the storage cannot be used: .*\.$") as caught:
        await main.prepare(load_settings(database_url=f"sqlite:///{tmp_path}/marquee.db", **settings))
    assert settings["s3_secret_access_key"] not in str(caught.value)


async def test_an_unreachable_bucket_does_not_stop_the_start(tmp_path: Path) -> None:
    with S3Server() as own:
        storage = bucket(own)
        with own.down():
            await check(storage)
            for call in (storage.put("some/1.webp", b"x"), storage.get("some/1.webp"), names(storage)):
                with pytest.raises(Unavailable):
                    await call
        await storage.put("some/1.webp", b"x")
        assert await storage.get("some/1.webp") == b"x"


async def test_calls_to_a_hanging_bucket_time_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_module, "CALL_SECONDS", 0.3)
    with S3Server() as own:
        storage = bucket(own)
        await storage.put("some/1.webp", b"x")
        with own.frozen():
            for call in (storage.put("some/2.webp", b"x"), storage.get("some/1.webp"), names(storage)):
                started = time.monotonic()
                with pytest.raises(Unavailable):
                    await call
                assert time.monotonic() - started < 5
        assert await storage.get("some/1.webp") == b"x"
