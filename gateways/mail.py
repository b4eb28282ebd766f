"""Delivery of emails to a mail server or, without one, to a folder.

Encryption: `smtps://` uses TLS from the first byte and verifies the server's certificate. `smtp://` with a password
requires STARTTLS and a valid certificate before anything is sent. `smtp://` without a password uses STARTTLS when the
server offers it, and accepts any certificate, as mail servers do among themselves (RFC 7435). Verification would not
help, because an attacker who could impersonate the server could also suppress the offer.
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
    """The email was not delivered. Another attempt may succeed, unless the error is `Refused`.

    The message is for the log and contains no email address.
    """


class Refused(NotDelivered):
    """The server rejected this email permanently."""


class Gateway(Protocol):
    async def deliver(self, message: EmailMessage, name: str) -> None:
        """Deliver an email; `name` is the same for every attempt to deliver it. Raises NotDelivered or Refused.

        If the call is cancelled, the email may or may not have been delivered.
        """

    def describe(self) -> str:
        """Return a description of the destination, for the log."""


def gateway_for(settings: Settings) -> Gateway:
    """Return the gateway that the settings specify, without opening a connection or a file."""
    if settings.smtp_url is None:
        return Folder(Path(settings.mail_folder))
    return server_of(settings.smtp_url.get_secret_value())


# --- a server


class Server:
    """A mail server (RFC 5321). Each email is sent over its own connection."""

    def __init__(self, host: str, port: int, *, is_encrypted: bool, username: str | None, password: str | None) -> None:
        self._host = host
        self._port = port
        self._is_encrypted = is_encrypted
        self._username = username
        self._password = password
        self._is_verified = is_encrypted or username is not None
        self._tls = ssl.create_default_context()
        if not self._is_verified:
            self._tls.check_hostname = False
            self._tls.verify_mode = ssl.CERT_NONE

    def describe(self) -> str:
        return f"mail server {self._host}:{self._port}"

    async def deliver(self, message: EmailMessage, name: str) -> None:
        sender = message["From"].addresses[0]
        client = aiosmtplib.SMTP(
            hostname=self._host,
            port=self._port,
            username=self._username,
            password=self._password,
            # Without this argument, the library looks up our own host name, which blocks the event loop.
            local_hostname=sender.domain,
            timeout=CONVERSATION_SECONDS,
            use_tls=self._is_encrypted,
            # None means that STARTTLS is used if the server offers it.
            start_tls=not self._is_encrypted if self._is_verified else None,
            tls_context=self._tls,
        )
        recipients = [address.addr_spec for address in message["To"].addresses]
        try:
            async with asyncio.timeout(CONVERSATION_SECONDS):
                await client.connect()
                await client.send_message(message, sender=sender.addr_spec, recipients=recipients)
            # The server has accepted the email, so an error from QUIT does not matter.
            with suppress(Exception):
                async with asyncio.timeout(GOODBYE_SECONDS):
                    await client.quit()
        except TimeoutError as error:
            raise NotDelivered(f"the mail server took longer than {CONVERSATION_SECONDS:g} s") from error
        except SMTPRecipientsRefused as error:
            raise _refusal(error.recipients) from error
        except SMTPDataError as error:
            kind = Refused if error.code >= 500 else NotDelivered
            raise kind(f"the mail server rejected the email: {error.code}") from error
        except (SMTPException, OSError, ValueError) as error:
            raise NotDelivered(f"the mail server cannot be used: {_reason(error)}") from error
        finally:
            client.close()


def server_of(url: str) -> Server:
    """Return the mail server for a URL that the settings have validated."""
    parts = urlsplit(url)
    return Server(
        parts.hostname or "localhost",
        parts.port or DEFAULT_PORTS[parts.scheme],
        is_encrypted=parts.scheme == "smtps",
        username=unquote(parts.username) if parts.username is not None else None,
        password=unquote(parts.password) if parts.password is not None else None,
    )


def _refusal(refused: Sequence[SMTPRecipientRefused]) -> NotDelivered:
    """Return the error for rejected recipients. It contains only the codes, because replies may contain addresses."""
    codes = sorted({each.code for each in refused})
    kind = Refused if all(code >= 500 for code in codes) else NotDelivered
    return kind(f"the mail server rejected the recipient: {', '.join(map(str, codes))}")


def _reason(error: Exception) -> str:
    """Return the network error or the SMTP code. The server's text is left out, because it may contain addresses."""
    if isinstance(error, SMTPResponseException):
        return f"{type(error).__name__} {error.code}"
    cause = error.__cause__ or error
    return str(getattr(cause, "strerror", None) or getattr(cause, "verify_message", None) or type(cause).__name__)


# --- a folder


@dataclass(frozen=True, slots=True)
class Folder:
    """A folder for development: emails are written to it as files that mail programs can open."""

    path: Path

    def describe(self) -> str:
        return f"folder {self.path} (SMTP_URL is not set)"

    async def deliver(self, message: EmailMessage, name: str) -> None:
        try:
            path = await asyncio.to_thread(self._write, message.as_bytes(), name)
        except OSError as error:
            raise NotDelivered(f"the folder {self.path} cannot be used: {error.strerror}") from error
        log.info("email written", path=str(path))

    def _write(self, content: bytes, name: str) -> Path:
        """Write the file atomically, readable only by our own user, because its URLs give access to accounts."""
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
