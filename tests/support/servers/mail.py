"""A private mail server that keeps the emails it receives, and access to emails written to a folder."""

from __future__ import annotations

import asyncio
import itertools
import os
import re
import ssl
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from email import message_from_bytes
from email.message import EmailMessage
from email.policy import default
from pathlib import Path
from typing import Any

from aiosmtpd.controller import Controller
from aiosmtpd.smtp import SMTP, AuthResult, Envelope, Session

from tests.support.ports import free_port
from tests.support.service import eventually

_numbers = itertools.count(1)
LINK = re.compile(r"https?://\S+")
TOKEN = re.compile(r"[?&]token=([A-Za-z0-9_-]+)")


def fresh_name() -> str:
    """Return an unused user name, which can also be the local part of an email address."""
    return f"holly{os.getpid()}m{next(_numbers)}"


def parsed(content: bytes) -> EmailMessage:
    message = message_from_bytes(content, policy=default)
    assert isinstance(message, EmailMessage)
    return message


def part(message: EmailMessage, kind: str) -> str:
    """Return the text of an email's `plain` or `html` part."""
    found = message.get_body((kind,))
    assert found is not None, f"no {kind}"
    return str(found.get_content())


def link_in(message: EmailMessage) -> str:
    """Return the only URL in an email, and assert that its HTML part links to the same URL."""
    found = set(LINK.findall(part(message, "plain")))
    assert len(found) == 1, found
    link = str(found.pop())
    assert f'href="{link.replace("&", "&amp;")}"' in part(message, "html")
    return link


def token_in(message: EmailMessage) -> str:
    found = TOKEN.search(link_in(message))
    assert found is not None
    return found[1]


class MailServer:
    """A mail server that replies to each recipient with `reply(address)`; "250 …" accepts the email."""

    def __init__(self, *, tls: ssl.SSLContext | None = None, port: int | None = None) -> None:
        self.port = port or free_port()
        self.tls = tls
        self.reply: Callable[[str], str] = lambda address: "250 OK"
        self.received: list[tuple[str, bytes]] = []  # address and content, in order of arrival
        self.passwords: list[bytes] = []
        self.encrypted: list[bool] = []
        self.tried = 0
        self.is_silent = False  # if True, RCPT TO gets no reply

    @property
    def url(self) -> str:
        return f"smtp://127.0.0.1:{self.port}"

    @contextmanager
    def running(self) -> Iterator[MailServer]:
        controller = Controller(
            self,
            hostname="127.0.0.1",
            port=self.port,
            tls_context=self.tls,
            authenticator=self._authenticate,
            auth_require_tls=False,
        )
        conversations: list[Any] = []
        make: Any = controller.factory

        def factory() -> Any:
            conversations.append(make())
            return conversations[-1]

        controller.factory = factory  # type: ignore[method-assign]
        controller.start()
        try:
            yield self
        finally:
            # `stop` closes the listener, but not the open connections.
            asyncio.run_coroutine_threadsafe(self._hang_up(conversations), controller.loop).result()
            controller.stop()

    async def _hang_up(self, conversations: Sequence[SMTP]) -> None:
        for each in conversations:
            if isinstance(each.transport, asyncio.WriteTransport):
                each.transport.abort()
        await asyncio.sleep(0)  # let the loop close the connections

    def mails_to(self, address: str) -> list[EmailMessage]:
        return [parsed(content) for to, content in list(self.received) if to == address]

    async def mail_to(self, address: str, number: int = 1) -> EmailMessage:
        """Return the `number`-th email to this address once it has arrived."""
        await eventually(lambda: len(self.mails_to(address)) >= number, f"mail {number} to {address}")
        return self.mails_to(address)[number - 1]

    # --- handlers of the SMTP protocol

    async def handle_RCPT(  # noqa: N802
        self, server: SMTP, session: Session, envelope: Envelope, address: str, options: list[str]
    ) -> str:
        self.tried += 1
        if self.is_silent:
            await asyncio.Event().wait()  # wait until the client hangs up
        answer = self.reply(address)
        if answer.startswith("250"):
            envelope.rcpt_tos.append(address)
        return answer

    async def handle_DATA(self, server: SMTP, session: Session, envelope: Envelope) -> str:  # noqa: N802
        content = envelope.content
        assert isinstance(content, bytes)
        self.encrypted.append(session.ssl is not None)
        self.received += [(address, content) for address in envelope.rcpt_tos]
        return "250 OK"

    def _authenticate(self, server: Any, session: Any, envelope: Any, mechanism: str, data: Any) -> AuthResult:
        self.passwords.append(data.password)
        return AuthResult(success=True)


# --- a folder


def mails_in(folder: Path) -> list[EmailMessage]:
    """Return the emails in a folder, in the order in which they were queued."""
    paths = sorted(folder.glob("*.eml"), key=lambda path: int(path.stem))
    return [parsed(path.read_bytes()) for path in paths]


async def mail_in(folder: Path, address: str, number: int = 1, subject: str = "") -> EmailMessage:
    """Return the `number`-th email to this address whose subject contains `subject`, once it has arrived."""

    def found() -> list[EmailMessage]:
        return [each for each in mails_in(folder) if each["To"] == address and subject in each["Subject"]]

    await eventually(lambda: len(found()) >= number, f"mail {number} to {address} in {folder}")
    return found()[number - 1]
