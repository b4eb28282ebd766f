"""Where files are kept: a folder, or a bucket of an S3-compatible server. One form for both.

Rules:
- Names are made by us, never by clients: letters, digits, dashes, dots and slashes.
- A file is whole or not there; it is never changed, only replaced by one with another name.
- Every call ends within CALL_SECONDS; what goes wrong is `Unavailable`, and the log says why.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager, suppress
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
REQUEST_SECONDS = 10.0  # a picture over a slow line to a bucket
RETRIES = 2
CALL_SECONDS = 15.0  # of one call with all its attempts
MAX_FILE_BYTES = 8 * 1024 * 1024  # read into memory as a whole
FILES_OF_PAGE = 500

# What obstore raises that is not its own: the errors of Python for missing files and for what is refused.
_ERRORS = (exceptions.BaseError, OSError, TimeoutError)
_REFUSALS = (
    exceptions.PermissionDeniedError,
    exceptions.UnauthenticatedError,
    exceptions.NotFoundError,
    FileNotFoundError,  # no such bucket
)

log = structlog.get_logger("storage")


@dataclass(frozen=True, slots=True)
class StoredFile:
    name: str
    modified_at: datetime


class Storage:
    """One per process. Safe to cancel: a file that was on its way may be there or not."""

    def __init__(self, store: LocalStore | S3Store) -> None:
        self._store = store

    @property
    def is_folder(self) -> bool:
        return isinstance(self._store, LocalStore)

    async def put(self, name: str, content: bytes) -> None:
        """Raises Unavailable."""
        with _unavailable("put", name):
            async with asyncio.timeout(CALL_SECONDS):
                await self._store.put_async(name, content)

    async def get(self, name: str) -> bytes | None:
        """None when there is no such file. Raises Unavailable."""
        with _unavailable("get", name):
            async with asyncio.timeout(CALL_SECONDS):
                try:
                    found = await self._store.get_async(name)
                except (FileNotFoundError, exceptions.NotFoundError):
                    return None
                if found.meta["size"] > MAX_FILE_BYTES:
                    log.error("a file of the storage is too large to be ours", name=name, size=found.meta["size"])
                    return None
                return bytes(await found.bytes_async())

    async def delete(self, names: Sequence[str]) -> None:
        """What is not there is no error. Raises Unavailable."""
        for name in names:
            with _unavailable("delete", name):
                async with asyncio.timeout(CALL_SECONDS):
                    with suppress(FileNotFoundError, exceptions.NotFoundError):
                        await self._store.delete_async(name)

    async def pages(self, folder: str) -> AsyncIterator[Sequence[StoredFile]]:
        """All files below `folder`, at most FILES_OF_PAGE at a time. Raises Unavailable."""
        stream = aiter(self._store.list(f"{folder}/", chunk_size=FILES_OF_PAGE))
        while True:
            with _unavailable("list", folder):
                async with asyncio.timeout(CALL_SECONDS):
                    try:
                        page = await anext(stream)
                    except StopAsyncIteration:
                        return
            yield [StoredFile(each["path"], each["last_modified"]) for each in page]


@contextmanager
def _unavailable(call: str, name: str) -> Iterator[None]:
    try:
        yield
    except _ERRORS as error:
        log.warning("the storage does not answer as it should", call=call, name=name, reason=_reason(error))
        raise Unavailable("The storage of files is not available; nothing was changed") from error


def _reason(error: BaseException | None) -> str:
    """One line: what follows it in obstore's errors is the inside of its client."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def open_storage(settings: Settings) -> Storage:
    """The storage that the settings name; a folder is made. Raises SettingsError."""
    folder = settings.storage_folder
    if folder is not None:
        return Storage(_open_folder(folder))
    assert settings.storage_url is not None, "without it there is a folder"
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
                "allow_http": True,  # whoever writes http:// in the setting means it
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
    """Write a file and delete it. Raises SettingsError when that is refused; a server that is only away does not keep
    the service from starting.
    """
    name = f"checks/{secrets.token_hex(16)}"
    try:
        await storage.put(name, b"")
        await storage.delete([name])
    except Unavailable as error:
        if storage.is_folder or isinstance(error.__cause__, _REFUSALS):
            raise SettingsError(f"STORAGE_URL: the storage cannot be used: {_reason(error.__cause__)}.") from error
