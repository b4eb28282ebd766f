"""Handing mails in: to a mail server, or to a folder where there is none.

Encryption: `smtps://` is encrypted from the first byte, and the server proves who it is. `smtp://` with a password is
encrypted by STARTTLS before the password is sent, and proven, too, or nothing is sent. `smtp://` without a password is
encrypted when the server offers it, whatever its certificate says, as mail servers do among themselves (RFC 7435):
whoever could pretend to be the server could as well keep the offer back.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import ssl
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from email.message import EmailMessage
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote, urlsplit

import aiosmtplib
import structlog
from aiosmtplib.errors import (
    SMTPDataError,
    SMTPException,
    SMTPRecipientRefused,
    SMTPRecipientsRefused,
    SMTPResponseException,
)

from core.settings import Settings

CONVERSATION_SECONDS = 30.0
GOODBYE_SECONDS = 1.0
DEFAULT_PORTS = {"smtp": 25, "smtps": 465}

log = structlog.get_logger("mail")


class NotDelivered(Exception):
    """The mail was not handed in; trying again may help. The message is for the log: it names no address."""


class Refused(NotDelivered):
    """The server does not take this mail, now or later."""


class Gateway(Protocol):
    async def deliver(self, message: EmailMessage, name: str) -> None:
        """Hand a mail in; `name` is the same for each copy of it. Raises NotDelivered, Refused. Cancelling leaves open
        whether it was taken.
        """

    def describe(self) -> str:
        """Where mails go, in a sentence for the log."""


def gateway_for(settings: Settings) -> Gateway:
    """Opens nothing yet."""
    if settings.smtp_url is None:
        return Folder(Path(settings.mail_folder))
    return server_of(settings.smtp_url.get_secret_value())


# --- a server


class Server:
    """A mail server (RFC 5321); one connection for each mail."""

    def __init__(self, host: str, port: int, *, is_encrypted: bool, username: str | None, password: str | None) -> None:
        self._host = host
        self._port = port
        self._is_encrypted = is_encrypted
        self._username = username
        self._password = password
        self._must_be_proven = is_encrypted or username is not None
        self._tls = ssl.create_default_context()
        if not self._must_be_proven:
            self._tls.check_hostname = False
            self._tls.verify_mode = ssl.CERT_NONE

    def describe(self) -> str:
        return f"mails are handed in at {self._host}:{self._port}"

    async def deliver(self, message: EmailMessage, name: str) -> None:
        sender = message["From"].addresses[0]
        client = aiosmtplib.SMTP(
            hostname=self._host,
            port=self._port,
            username=self._username,
            password=self._password,
            # Without a name the library asks the network for ours, and everything waits.
            local_hostname=sender.domain,
            timeout=CONVERSATION_SECONDS,
            use_tls=self._is_encrypted,
            # None: when the server offers it.
            start_tls=not self._is_encrypted if self._must_be_proven else None,
            tls_context=self._tls,
        )
        recipients = [address.addr_spec for address in message["To"].addresses]
        try:
            async with asyncio.timeout(CONVERSATION_SECONDS):
                await client.connect()
                await client.send_message(message, sender=sender.addr_spec, recipients=recipients)
            # The mail is the server's now, however it says goodbye.
            with suppress(Exception):
                async with asyncio.timeout(GOODBYE_SECONDS):
                    await client.quit()
        except TimeoutError as error:
            raise NotDelivered(f"the mail server took longer than {CONVERSATION_SECONDS:g} s") from error
        except SMTPRecipientsRefused as error:
            raise _refusal(error.recipients) from error
        except SMTPDataError as error:
            kind = Refused if error.code >= 500 else NotDelivered
            raise kind(f"the mail server does not take the mail: {error.code}") from error
        except (SMTPException, OSError, ValueError) as error:
            raise NotDelivered(f"the mail server cannot be used: {_reason(error)}") from error
        finally:
            client.close()


def server_of(url: str) -> Server:
    """From an address that the settings have checked."""
    parts = urlsplit(url)
    return Server(
        parts.hostname or "localhost",
        parts.port or DEFAULT_PORTS[parts.scheme],
        is_encrypted=parts.scheme == "smtps",
        username=unquote(parts.username) if parts.username is not None else None,
        password=unquote(parts.password) if parts.password is not None else None,
    )


def _refusal(refused: Sequence[SMTPRecipientRefused]) -> NotDelivered:
    """Servers repeat the address in what they say, so only the number is kept."""
    codes = sorted({each.code for each in refused})
    kind = Refused if all(code >= 500 for code in codes) else NotDelivered
    return kind(f"the mail server does not take mails for this address: {', '.join(map(str, codes))}")


def _reason(error: Exception) -> str:
    """What the network says, or the number that the server says, whose words may repeat addresses."""
    if isinstance(error, SMTPResponseException):
        return f"{type(error).__name__} {error.code}"
    cause = error.__cause__ or error
    return str(getattr(cause, "strerror", None) or getattr(cause, "verify_message", None) or type(cause).__name__)


# --- a folder


@dataclass(frozen=True, slots=True)
class Folder:
    """Mails as files that mail programs open, for development and for trying things out."""

    path: Path

    def describe(self) -> str:
        return f"SMTP_URL is not set: mails are written to the folder {self.path}"

    async def deliver(self, message: EmailMessage, name: str) -> None:
        try:
            path = await asyncio.to_thread(self._write, message.as_bytes(), name)
        except OSError as error:
            raise NotDelivered(f"the folder {self.path} cannot be used: {error.strerror}") from error
        log.info("mail written", path=str(path))

    def _write(self, content: bytes, name: str) -> Path:
        """Whole or not at all, and for our own eyes only: the links in it open accounts."""
        self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
        path = self.path / f"{name}.eml"
        draft = self.path / f".{name}.{os.getpid()}.{secrets.token_hex(4)}"
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
            draft.replace(path)
        except BaseException:
            draft.unlink(missing_ok=True)
            raise
        return path
