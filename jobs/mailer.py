"""The mailer: takes emails from the outbox and delivers them, a few at a time in each worker.

No email is lost while the mail server is down, and no request waits for the mail server: a failed delivery is retried
after growing pauses, for about two days. When a worker is killed during a delivery, another worker sends the email once
the lease has expired, so the email may arrive twice. On shutdown, deliveries may finish within a time limit; emails
that are not delivered by then are released to other workers.
"""

from __future__ import annotations

import asyncio
import random
import time
import uuid
from contextlib import suppress
from typing import Any

import structlog

from core import metrics
from core.errors import Unavailable
from gateways.mail import Gateway, NotDelivered, Refused
from jobs import mail_texts
from repository.accounts import outbox
from repository.accounts.outbox import ClaimedMail
from repository.engine.database import Database

CONCURRENT_MAILS = 4
POLL_SECONDS = 1.0
FIRST_PAUSE_SECONDS = 10.0  # each further pause is twice as long as the previous one
MAX_PAUSE_SECONDS = 3600.0
UNAVAILABLE_PAUSE_SECONDS = 0.5

log = structlog.get_logger("mailer")


class Mailer:
    """One per process. `run` continues until stopped or cancelled."""

    def __init__(
        self,
        database: Database,
        gateway: Gateway,
        *,
        sender: str,
        base_url: str,
        first_pause_seconds: float = FIRST_PAUSE_SECONDS,
        poll_seconds: float = POLL_SECONDS,
    ) -> None:
        """`sender` is the From address of emails; `base_url` is the prefix of the URLs in them."""
        self._owner = str(uuid.uuid4())
        self._database = database
        self._gateway = gateway
        self._sender = sender
        self._base_url = base_url
        self._first_pause_seconds = first_pause_seconds
        self._poll_seconds = poll_seconds
        self._places = asyncio.Semaphore(CONCURRENT_MAILS)
        self._wake = asyncio.Event()
        self._stopping = asyncio.Event()
        self._ended = asyncio.Event()

    def wake(self) -> None:
        """Send newly queued emails immediately. Emails queued by other workers are found by polling."""
        self._wake.set()

    def stop(self) -> None:
        """Start no new deliveries."""
        self._stopping.set()
        self._wake.set()

    async def ended(self, seconds: float) -> None:
        """Wait at most `seconds` for `run` to end after a stop."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._ended.wait()

    async def run(self) -> None:
        log.info("mailer started", gateway=self._gateway.describe())
        try:
            async with asyncio.TaskGroup() as tasks:
                while not self._stopping.is_set():
                    await self._places.acquire()
                    mail = None
                    try:
                        mail = await self._claim_due()
                    finally:
                        if mail is None:
                            self._places.release()
                    if mail is not None:
                        tasks.create_task(self._send_in_task(mail), name=f"mail-{mail.id}")
        finally:
            self._ended.set()

    async def _claim_due(self) -> ClaimedMail | None:
        """Claim and return an email that is due. If none is due, pause (unless stopping) and return None."""
        if self._stopping.is_set():
            return None
        self._wake.clear()
        try:
            mail = await outbox.claim(self._database, self._owner)
        except Unavailable:
            await asyncio.sleep(UNAVAILABLE_PAUSE_SECONDS)
            return None
        except Exception as error:
            # An error here must not end the process, which also serves clients.
            log.error("outbox poll failed", exc_info=error)
            await asyncio.sleep(POLL_SECONDS)
            return None
        if mail is None and not self._stopping.is_set():
            with suppress(TimeoutError):
                async with asyncio.timeout(self._poll_seconds):
                    await self._wake.wait()
        return mail

    async def _send_in_task(self, mail: ClaimedMail) -> None:
        try:
            await self._send(mail)
        except Unavailable:
            pass  # the delivery is retried once the email's lease has expired
        except Exception as error:
            log.error("delivery result not stored", mail=mail.id, exc_info=error)
        finally:
            self._places.release()

    async def _send(self, mail: ClaimedMail) -> None:
        leased_until = time.monotonic() + outbox.LEASE_SECONDS
        try:
            message = mail_texts.compose(mail, sender=self._sender, base_url=self._base_url)
            await self._gateway.deliver(message, str(mail.id))
        except asyncio.CancelledError:
            with suppress(Unavailable):  # if the release fails, the lease expires by itself
                await outbox.release(self._database, mail, self._owner)
            raise
        except Refused as error:
            await self._give_up(mail, str(error))
        except NotDelivered as error:
            await self._postpone(mail, str(error))
        except Exception as error:
            log.error("email delivery failed", mail=mail.id, kind=mail.kind.value, exc_info=error)
            await self._postpone(mail, "internal error")
        else:
            await self._store_sent(mail, leased_until)

    async def _store_sent(self, mail: ClaimedMail, leased_until: float) -> None:
        """Record that the email was sent, so that no other worker sends it again. Retry until the lease expires.

        Raises Unavailable.
        """
        metrics.MAILS.labels("sent").inc()
        _log_of(mail).info("email sent")
        while True:
            try:
                await outbox.sent(self._database, mail, self._owner)
                return
            except Unavailable:
                if time.monotonic() > leased_until:
                    raise
                await asyncio.sleep(UNAVAILABLE_PAUSE_SECONDS)

    async def _postpone(self, mail: ClaimedMail, reason: str) -> None:
        if mail.attempts >= outbox.MAX_ATTEMPTS:
            await self._give_up(mail, reason)
            return
        pause = pause_seconds(mail.attempts, self._first_pause_seconds)
        metrics.MAILS.labels("postponed").inc()
        _log_of(mail).warning("email postponed", reason=reason, seconds=round(pause))
        await outbox.postpone(self._database, mail, self._owner, pause)

    async def _give_up(self, mail: ClaimedMail, reason: str) -> None:
        metrics.MAILS.labels("failed").inc()
        _log_of(mail).error("email abandoned", reason=reason)
        await outbox.failed(self._database, mail, self._owner)


def _log_of(mail: ClaimedMail) -> Any:
    return log.bind(mail=mail.id, kind=mail.kind.value, attempts=mail.attempts)


def pause_seconds(attempts: int, first: float) -> float:
    """Return the pause after `attempts` attempts, jittered so that failed emails are not all retried together."""
    return min(first * 2.0 ** min(attempts - 1, 30), MAX_PAUSE_SECONDS) * random.uniform(0.8, 1.2)
