"""File storage: a folder, or a bucket of an S3-compatible server, behind one interface.

Invariants:
- File names are chosen by the service, never by clients. They consist of letters, digits, dashes, dots and slashes.
- A file is either complete or absent. It is never modified: a new version is a file with a new name.
- Every call for one file or one page of file names ends within CALL_SECONDS. Every failure is raised as
  `Unavailable` and logged with its reason.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import structlog
from obstore import exceptions
from obstore.store import LocalStore, S3Store

from core.errors import SettingsError, Unavailable
from core.settings import Settings

if TYPE_CHECKING:
    from obstore.store import S3Config

CONNECT_SECONDS = 3.0
REQUEST_SECONDS = 10.0  # enough time to send a picture to a bucket over a slow connection
RETRIES = 2
CALL_SECONDS = 15.0  # The time limit for one call, including its retries.
MAX_FILE_BYTES = 8 * 1024 * 1024  # Each file is read into memory as a whole.
FILES_PER_PAGE = 500

# Besides its own errors, obstore raises Python's errors for missing files and denied access.
_ERRORS = (exceptions.BaseError, OSError, TimeoutError)
_MISSING = (exceptions.NotFoundError, FileNotFoundError)
# When a file is written, a not-found error means that the bucket is missing.
_REFUSALS = (exceptions.PermissionDeniedError, exceptions.UnauthenticatedError, *_MISSING)

log = structlog.get_logger("storage")


@dataclass(frozen=True, slots=True)
class StoredFile:
    name: str
    modified_at: datetime


class Storage:
    """The file storage of a process. Calls are safe to cancel: a file being written is stored whole or not at all."""

    def __init__(self, store: LocalStore | S3Store) -> None:
        self._store = store

    @property
    def is_folder(self) -> bool:
        return isinstance(self._store, LocalStore)

    async def put(self, name: str, content: bytes) -> None:
        """Store a file. Raises Unavailable."""
        async with _call("put", name):
            await self._store.put_async(name, content)

    async def get(self, name: str) -> bytes | None:
        """Return the content of a file, or None if there is no such file. Raises Unavailable."""
        async with _call("get", name):
            try:
                found = await self._store.get_async(name)
            except _MISSING:
                return None
            if found.meta["size"] > MAX_FILE_BYTES:
                log.error("stored file too large; ignored", name=name, size=found.meta["size"])
                return None
            return bytes(await found.bytes_async())

    async def delete(self, names: Sequence[str]) -> None:
        """Delete files. Names that do not exist are ignored. Raises Unavailable."""
        for name in names:
            async with _call("delete", name):
                with suppress(*_MISSING):
                    await self._store.delete_async(name)

    async def pages(self, folder: str) -> AsyncIterator[Sequence[StoredFile]]:
        """Yield all files below `folder`, at most FILES_PER_PAGE at a time. Raises Unavailable."""
        listing = aiter(self._store.list(f"{folder}/", chunk_size=FILES_PER_PAGE))
        while True:
            async with _call("list", folder):
                try:
                    page = await anext(listing)
                except StopAsyncIteration:
                    return
            yield [StoredFile(each["path"], each["last_modified"]) for each in page]


@asynccontextmanager
async def _call(call: str, name: str) -> AsyncIterator[None]:
    """Limit a call to CALL_SECONDS, and log its failure. Raises Unavailable."""
    try:
        async with asyncio.timeout(CALL_SECONDS):
            yield
    except _ERRORS as error:
        log.warning("storage call failed", call=call, name=name, reason=_reason(error))
        raise Unavailable("The file storage is unavailable; nothing was changed") from error


def _reason(error: BaseException | None) -> str:
    """Return the first line of an error. obstore adds further lines, which describe its own client."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def open_storage(settings: Settings) -> Storage:
    """Return the storage that the settings specify. If it is a folder, create it. Raises SettingsError."""
    folder = settings.storage_folder
    if folder is not None:
        return Storage(_open_folder(folder))
    assert settings.storage_url is not None, "without STORAGE_URL, the storage is a folder"
    parts = urlsplit(settings.storage_url)
    config: S3Config = {"region": settings.s3_region}
    if settings.s3_access_key_id is not None and settings.s3_secret_access_key is not None:
        config["access_key_id"] = settings.s3_access_key_id
        config["secret_access_key"] = settings.s3_secret_access_key.get_secret_value()
    if settings.s3_endpoint_url is not None:
        config["endpoint"] = settings.s3_endpoint_url
    return Storage(
        S3Store(
            parts.netloc,
            prefix=parts.path.strip("/") or None,
            config=config,
            client_options={
                "allow_http": True,  # needed for an S3_ENDPOINT_URL that begins with http://
                "connect_timeout": timedelta(seconds=CONNECT_SECONDS),
                "timeout": timedelta(seconds=REQUEST_SECONDS),
            },
            retry_config={"max_retries": RETRIES, "retry_timeout": timedelta(seconds=REQUEST_SECONDS)},
        )
    )


def _open_folder(folder: Path) -> LocalStore:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return LocalStore(folder.resolve(), automatic_cleanup=True)
    except (exceptions.BaseError, OSError) as error:
        raise SettingsError(f"STORAGE_URL: the folder {folder} cannot be used: {_reason(error)}.") from error


async def check(storage: Storage) -> None:
    """Check the storage by writing and deleting a file. Raises SettingsError when the storage denies this.

    An unreachable bucket raises no error, because the service can start without the bucket.
    """
    name = f"checks/{secrets.token_hex(16)}"
    try:
        await storage.put(name, b"")
        await storage.delete([name])
    except Unavailable as error:
        if storage.is_folder or isinstance(error.__cause__, _REFUSALS):
            raise SettingsError(f"STORAGE_URL: the storage cannot be used: {_reason(error.__cause__)}.") from error
