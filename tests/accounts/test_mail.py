"""The outbox and the mailer: every email is sent once, only to its owner, and no secret is stored."""

from __future__ import annotations

import asyncio
import stat
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import delete, select, update

import models
from core.times import utc_text
from gateways.mail import Folder, Gateway, NotDelivered, server_of
from jobs import mail_texts
from jobs.mailer import FIRST_PAUSE_SECONDS, MAX_PAUSE_SECONDS, Mailer, pause_seconds
from repository.accounts import confirmations, one_time_tokens, users
from repository.accounts import outbox as mails
from repository.accounts.one_time_tokens import DAYS_TO_ACTIVATE, Purpose
from repository.accounts.outbox import ClaimedMail, MailType
from repository.engine import migrations
from repository.engine.database import Database
from repository.engine.transaction import Transaction
from tests.conftest import Places
from tests.support.certificates import certificate_for
from tests.support.ports import free_port
from tests.support.servers.mail import MailServer, link_in, mails_in, part, token_in
from tests.support.service import eventually

BASE = "https://movies.example.org"
SENDER = "Märquee <marquee@example.org>"


@pytest.fixture(scope="module")
def database_url(new_places: Callable[[], Places]) -> str:
    """The URL of a database with all its tables, created once for these tests."""
    url = new_places().database_url

    async def migrate() -> None:
        database = Database(url)
        await migrations.migrate(database)
        await database.close()

    asyncio.run(migrate())
    return url


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    """The database, emptied of accounts and emails."""
    database = Database(database_url)

    async def work(tx: Transaction) -> None:
        for table in (models.one_time_tokens, models.mails, models.users):
            await tx.connection.execute(delete(table))

    await database.write(work)
    yield database
    await database.close()


@pytest.fixture
def server() -> Iterator[MailServer]:
    with MailServer().running() as running:
        yield running


@asynccontextmanager
async def mailing(database: Database, gateway: Gateway | MailServer) -> AsyncIterator[Mailer]:
    if isinstance(gateway, MailServer):
        gateway = server_of(gateway.url)
    mailer = Mailer(database, gateway, sender=SENDER, base_url=BASE, first_pause_seconds=0.02, poll_seconds=0.05)
    task = asyncio.create_task(mailer.run())
    try:
        yield mailer
    finally:
        mailer.stop()
        await task


async def account(database: Database, name: str = "holly", **more: Any) -> dict[str, Any]:
    """Store an account without hashing a password. With `waits`, the account awaits its activation."""
    waits = more.pop("waits", False)
    fields = {"username": name, "email": f"{name.lower()}@example.org", **more}
    return await database.write(lambda tx: users.create(tx, fields, "no hash", awaits_activation=waits))


async def put(database: Database, user: dict[str, Any], kind: MailType, recipient: str | None = None) -> bool:
    return await database.write(lambda tx: mails.put(tx, user["id"], kind, recipient or user["email"]))


async def request(database: Database, kind: MailType, address: str) -> None:
    await database.write(lambda tx: mails.request(tx, kind, address))


async def outbox(database: Database) -> list[dict[str, Any]]:
    async with database.read() as connection:
        found = await connection.execute(select(models.mails).order_by(models.mails.c.id))
        return [dict(row._mapping) for row in found]


async def change(database: Database, table: Any, **values: Any) -> None:
    """Update all rows of a table, for example to pretend that time has passed."""

    async def work(tx: Transaction) -> None:
        await tx.connection.execute(update(table).values(**values))

    await database.write(work)


async def tried(database: Database, attempts: int) -> None:
    async def is_tried() -> bool:
        return bool((await outbox(database))[0]["attempts"] >= attempts)

    await eventually(is_tried, f"{attempts} attempts")


async def settled(database: Database) -> list[dict[str, Any]]:
    """Return the outbox once no email in it is waiting."""

    async def is_settled() -> bool:
        return all(row["due_at"] is None for row in await outbox(database))

    await eventually(is_settled, "an empty outbox")
    return await outbox(database)


async def sent(database: Database, *gateways: Gateway | MailServer) -> list[dict[str, Any]]:
    """Empty the outbox with one mailer per gateway, and return the rows. Each mailer has its own connections."""
    async with AsyncExitStack() as stack:
        for gateway in gateways:
            worker = Database(database.url)
            stack.push_async_callback(worker.close)
            await stack.enter_async_context(mailing(worker, gateway))
        return await settled(database)


# --- sending


async def test_an_email_arrives_in_text_and_html_with_an_url(database: Database, server: MailServer) -> None:
    holly = await account(database, waits=True)
    await put(database, holly, MailType.ACTIVATE)
    [row] = await sent(database, server)
    assert row["sent_at"] is not None
    [mail] = server.mails_to("holly@example.org")
    assert (mail["From"], mail["To"]) == (SENDER, "holly@example.org")
    assert mail["Subject"] == "Activate your account"
    assert mail["Auto-Submitted"] == "auto-generated"
    assert mail["Message-ID"].endswith("@movies.example.org>")
    assert datetime.strptime(mail["Date"], "%a, %d %b %Y %H:%M:%S %z") <= datetime.now(UTC)
    assert link_in(mail) == f"{BASE}/auth/activate?token={token_in(mail)}"
    assert "Hello holly," in part(mail, "plain")
    user = await database.write(lambda tx: confirmations.confirm(tx, token_in(mail)))
    assert (user["id"], user["is_active"]) == (holly["id"], True)


async def test_the_database_does_not_hold_the_mailed_token(database: Database, server: MailServer) -> None:
    await put(database, await account(database), MailType.RESET_PASSWORD)
    rows = await sent(database, server)
    token = token_in(server.mails_to("holly@example.org")[0])
    async with database.read() as connection:
        tokens = [dict(row._mapping) for row in await connection.execute(select(models.one_time_tokens))]
    assert len(tokens) == 1
    assert token not in repr(rows) + repr(tokens)


async def test_emails_wait_while_the_mail_server_is_down_or_full(database: Database) -> None:
    server = MailServer()
    await put(database, await account(database), MailType.PASSWORD_CHANGED)
    async with mailing(database, server):
        await tried(database, 2)
        full = {"holly@example.org": 2}
        server.reply = lambda address: "452 no room" if full[address] else "250 OK"

        with server.running():
            await eventually(lambda: server.tried >= 2, "two attempts while the mailbox is full")
            assert server.mails_to("holly@example.org") == []
            full["holly@example.org"] = 0
            await server.mail_to("holly@example.org")
            [row] = await settled(database)
    # Two attempts while the server is down, two while the mailbox is full, and one that succeeds. The second attempt
    # may already find the server up, which leaves four.
    assert row["attempts"] >= 4
    assert (row["sent_at"] is not None, row["failed_at"]) == (True, None)
    assert len(server.mails_to("holly@example.org")) == 1


async def test_a_permanently_rejected_address_is_not_tried_again(database: Database, server: MailServer) -> None:
    server.reply = lambda address: "550 no such user"
    await put(database, await account(database), MailType.PASSWORD_CHANGED)
    [row] = await sent(database, server)
    assert (row["attempts"], row["sent_at"], row["failed_at"] is not None) == (1, None, True)
    assert server.tried == 1


async def test_an_email_is_abandoned_after_two_days(database: Database) -> None:
    await put(database, await account(database), MailType.PASSWORD_CHANGED)
    await change(database, models.mails, attempts=mails.MAX_ATTEMPTS - 1)
    [row] = await sent(database, server_of(f"smtp://127.0.0.1:{free_port()}"))
    assert (row["attempts"], row["failed_at"] is not None) == (mails.MAX_ATTEMPTS, True)
    pauses = [pause_seconds(attempt, FIRST_PAUSE_SECONDS) for attempt in range(1, mails.MAX_ATTEMPTS)]
    assert 8 <= pauses[0] <= 12
    assert max(pauses) <= MAX_PAUSE_SECONDS * 1.2
    assert timedelta(days=1.5) < timedelta(seconds=sum(pauses)) < timedelta(days=2.5)


async def test_an_email_whose_last_attempt_was_interrupted_is_abandoned(database: Database, server: MailServer) -> None:
    await put(database, await account(database), MailType.PASSWORD_CHANGED)
    await change(database, models.mails, attempts=mails.MAX_ATTEMPTS)
    [row] = await sent(database, server)
    assert row["failed_at"] is not None
    assert server.tried == 0


async def test_two_workers_send_each_email_once(database: Database, server: MailServer) -> None:
    holly = await account(database)
    for _ in range(12):
        await put(database, holly, MailType.PASSWORD_CHANGED)
    await sent(database, server, server)
    ids = [mail["Message-ID"] for mail in server.mails_to("holly@example.org")]
    assert len(ids) == len(set(ids)) == 12


async def test_another_worker_sends_an_email_once_the_lease_has_ended(database: Database, server: MailServer) -> None:
    await put(database, await account(database), MailType.PASSWORD_CHANGED)
    claimed = await mails.claim(database, "a worker that is killed")
    assert claimed is not None
    first = mail_texts.compose(claimed, sender=SENDER, base_url=BASE)
    assert await mails.claim(database, "another") is None, "the lease is still held"
    await change(database, models.mails, due_at=0.0)
    await sent(database, server)
    [second] = server.mails_to("holly@example.org")
    # A recipient of both copies can tell that they are the same email.
    assert (second["Message-ID"], second["Date"]) == (first["Message-ID"], first["Date"])
    # When the killed worker comes back, its result no longer counts.
    await mails.postpone(database, claimed, "a worker that is killed", 0)
    assert [row["due_at"] for row in await outbox(database)] == [None]


class Stuck:
    """A gateway whose deliveries never end."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def describe(self) -> str:
        return "nowhere"

    async def deliver(self, message: Any, name: str) -> None:
        self.names.append(name)
        await asyncio.Event().wait()


async def test_a_stopping_worker_sends_four_at_a_time_and_releases_unfinished_emails(
    database: Database, server: MailServer
) -> None:
    holly = await account(database)
    for _ in range(8):
        await put(database, holly, MailType.PASSWORD_CHANGED)
    stuck = Stuck()
    mailer = Mailer(database, stuck, sender=SENDER, base_url=BASE)
    task = asyncio.create_task(mailer.run())
    await eventually(lambda: len(stuck.names) == 4, "four deliveries")
    assert [row["lease_owner"] is not None for row in await outbox(database)].count(True) == 4
    mailer.stop()
    await mailer.ended(0.05)
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
    assert {(row["attempts"], row["lease_owner"]) for row in await outbox(database)} == {(0, None)}
    await sent(database, server)
    assert len(server.received) == 8


# --- recipients


async def nothing_sent(database: Database, server: MailServer) -> None:
    await sent(database, server)
    assert server.tried == 0


@pytest.mark.parametrize("kind", [MailType.ACTIVATE, MailType.RESET_PASSWORD, MailType.PASSWORD_CHANGED], ids=str)
@pytest.mark.parametrize(
    "values",
    [
        {"is_active": False, "awaits_activation": False},
        {"deleted_at": "2026-01-01T00:00:00.000000Z", "email": None, "email_key": None},
    ],
    ids=["disabled", "deleted"],
)
async def test_disabled_and_deleted_accounts_receive_no_email(
    database: Database, server: MailServer, kind: MailType, values: dict[str, Any]
) -> None:
    await put(database, await account(database, waits=kind is MailType.ACTIVATE), kind)
    await change(database, models.users, **values)
    await nothing_sent(database, server)
    assert await outbox(database) == []


async def test_an_active_account_receives_no_activation_email(database: Database, server: MailServer) -> None:
    await put(database, await account(database), MailType.ACTIVATE)
    await nothing_sent(database, server)


async def test_an_account_receives_no_activation_email_after_a_week(database: Database, server: MailServer) -> None:
    """Requesting an email every day must not reserve another person's address forever."""
    await account(database, waits=True)
    for days, mailed in ((DAYS_TO_ACTIVATE - 1, 1), (DAYS_TO_ACTIVATE + 1, 1)):
        created_at = datetime.now(UTC) - timedelta(days=days)
        await change(database, models.users, created_at=utc_text(created_at))
        await change(database, models.mails, created_at=utc_text(created_at))
        await request(database, MailType.ACTIVATE, "holly@example.org")
        await sent(database, server)
        assert len(server.received) == mailed, days


async def test_no_token_is_sent_to_a_former_address(database: Database, server: MailServer) -> None:
    await put(database, await account(database), MailType.RESET_PASSWORD, "former@example.org")
    await nothing_sent(database, server)


async def test_an_email_goes_to_the_address_as_the_account_spells_it(database: Database, server: MailServer) -> None:
    """A long s (\u017f) equals an s when addresses are compared, but an address with a long s is another mailbox."""
    await account(database, "harrys", email="harrys@example.org")
    await request(database, MailType.RESET_PASSWORD, "harry\u017f@example.org")
    await sent(database, server)
    assert [to for to, _ in server.received] == ["harrys@example.org"]


async def test_unknown_addresses_receive_no_email(database: Database, server: MailServer) -> None:
    await account(database)
    await request(database, MailType.RESET_PASSWORD, "lime@example.org")
    await request(database, MailType.ACTIVATE, "lime@example.org")
    await nothing_sent(database, server)
    assert await outbox(database) == []


async def test_an_account_receives_one_email_a_minute_and_five_a_day(database: Database, server: MailServer) -> None:
    await account(database)
    count = 0
    for _ in range(7):
        for _ in range(2):
            await request(database, MailType.RESET_PASSWORD, "holly@example.org")
        await sent(database, server)
        assert len(server.received) - count <= 1, "expected at most one email a minute"
        count = len(server.received)
        minutes_ago = datetime.now(UTC) - timedelta(minutes=2)
        await change(database, models.mails, created_at=minutes_ago.isoformat().replace("+00:00", "Z"))
    assert count == mails.MAX_REQUESTED_PER_DAY
    # A day later, emails are sent again.
    await database.write(lambda tx: tx.connection.execute(delete(models.mails)))
    await request(database, MailType.RESET_PASSWORD, "holly@example.org")
    await sent(database, server)
    assert len(server.received) == count + 1


async def test_concurrent_requests_on_two_workers_send_one_email(database: Database, server: MailServer) -> None:
    await account(database)
    for _ in range(6):
        await request(database, MailType.RESET_PASSWORD, "holly@example.org")
    await sent(database, server, server)
    assert len(server.received) == 1


async def test_the_number_of_waiting_emails_of_an_account_is_bounded(database: Database) -> None:
    holly, lime = await account(database), await account(database, "lime")
    for _ in range(mails.MAX_WAITING_PER_USER):
        assert await put(database, holly, MailType.PASSWORD_CHANGED)
    assert not await put(database, holly, MailType.PASSWORD_CHANGED)
    assert await put(database, lime, MailType.PASSWORD_CHANGED), "other accounts are not affected"
    assert len(await outbox(database)) == mails.MAX_WAITING_PER_USER + 1


# --- encryption


async def deliver(url: str, text: ClaimedMail | None = None) -> None:
    mail = mail_texts.compose(text or claimed_mail(), sender=SENDER, base_url=BASE)
    await server_of(url).deliver(mail, "1")


def claimed_mail(kind: MailType = MailType.RESET_PASSWORD, **changes: Any) -> ClaimedMail:
    values: dict[str, Any] = {
        "id": 1,
        "kind": kind,
        "recipient": "holly@example.org",
        "username": "holly",
        "created_at": "2026-11-20T14:30:08.746357Z",
        "attempts": 1,
        "token": "secret" if kind in mails.PURPOSES else None,
    }
    return ClaimedMail(**{**values, **changes})


async def test_the_password_is_sent_only_to_a_server_with_a_trusted_certificate(tmp_path: Path) -> None:
    for tls in (certificate_for("127.0.0.1", tmp_path), None):
        with MailServer(tls=tls).running() as server:
            with pytest.raises(NotDelivered):
                await deliver(f"smtp://holly:secret@127.0.0.1:{server.port}")
            assert (server.passwords, server.received) == ([], [])


async def test_the_password_is_sent_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with MailServer(tls=certificate_for("127.0.0.1", tmp_path)).running() as server:
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "certificate.pem"))
        await deliver(f"smtp://holly:p%40ss%3Aword@127.0.0.1:{server.port}")
        assert server.passwords == [b"p@ss:word"]
        assert server.encrypted == [True]


async def test_without_a_password_encryption_is_used_where_offered(tmp_path: Path, server: MailServer) -> None:
    with MailServer(tls=certificate_for("127.0.0.1", tmp_path)).running() as offering:
        await deliver(offering.url)
        assert offering.encrypted == [True]
    await deliver(server.url)
    assert server.encrypted == [False]


async def test_a_delivery_error_does_not_hold_the_address(server: MailServer) -> None:
    server.reply = lambda address: f"550 {address} is unknown"
    with pytest.raises(NotDelivered) as caught:
        await deliver(server.url)
    assert "holly" not in str(caught.value)
    assert "550" in str(caught.value)


# --- emails in a folder


async def test_without_a_server_emails_are_written_to_private_files(database: Database, tmp_path: Path) -> None:
    folder = tmp_path / "new" / "mail"
    await put(database, await account(database, "Hölly", email="holly@example.org"), MailType.RESET_PASSWORD)
    [row] = await sent(database, Folder(folder))
    path = folder / f"{row['id']}.eml"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(folder.iterdir()) == [path], "no temporary files are left"
    [mail] = mails_in(folder)
    assert "Hello Hölly," in part(mail, "plain")
    assert await one_time_tokens.find(database, token_in(mail), Purpose.RESET) is not None


async def test_emails_wait_while_the_folder_cannot_be_written(database: Database, tmp_path: Path) -> None:
    (tmp_path / "mail").write_text("in the way")
    await put(database, await account(database), MailType.PASSWORD_CHANGED)
    async with mailing(database, Folder(tmp_path / "mail")):
        await tried(database, 2)
        (tmp_path / "mail").unlink()
        await settled(database)
    assert len(mails_in(tmp_path / "mail")) == 1


# --- the texts of emails


@pytest.mark.parametrize("kind", list(MailType), ids=str)
def test_every_email_says_the_same_in_text_and_html(kind: MailType) -> None:
    mail = mail_texts.compose(claimed_mail(kind), sender=SENDER, base_url=BASE)
    assert set(mails.MailType) == set(mail_texts.WORDINGS)
    text, html = part(mail, "plain"), part(mail, "html")
    assert all(len(line) <= 80 for line in text.splitlines())
    for paragraph in mail_texts.WORDINGS[kind].paragraphs:
        assert paragraph in " ".join(text.split())
        assert paragraph in html
    assert ("token=secret" in text) == ("token=secret" in html) == (kind in mails.PURPOSES)
    assert "src=" not in html, "the email loads nothing from the network"


def test_names_are_escaped_in_html() -> None:
    mail = mail_texts.compose(claimed_mail(username='<b>&"x'), sender=SENDER, base_url=BASE)
    assert "<b>" not in part(mail, "html")
    assert part(mail, "plain").startswith("Hello,")


@pytest.mark.parametrize("username", ["holly", "Märtins_49", "ホリー", "holly-2"])
def test_emails_greet_the_user_by_name(username: str) -> None:
    mail = mail_texts.compose(claimed_mail(username=username), sender=SENDER, base_url=BASE)
    assert part(mail, "plain").startswith(f"Hello {username},")


URLS = ["www.evil.example", "evil\u3002example", "evil\u2024example", "http:evil", "+18005551234", "18005551234"]


@pytest.mark.parametrize("username", [None, "\u202e", "\u200b\u2028", *URLS])
def test_invisible_names_and_names_that_look_like_urls_are_left_out(username: str | None) -> None:
    mail = mail_texts.compose(claimed_mail(username=username), sender=SENDER, base_url=BASE)
    assert part(mail, "plain").startswith("Hello,")
    assert username is None or username not in part(mail, "html")


@pytest.mark.parametrize("recipient", ["holly@example.org\r\nBcc: lime@example.org", "holly@example.org\nX: y"])
def test_an_address_cannot_add_headers(recipient: str) -> None:
    with pytest.raises(ValueError, match="Header values may not contain linefeed"):
        mail_texts.compose(claimed_mail(recipient=recipient), sender=SENDER, base_url=BASE)


def test_urls_are_not_wrapped_in_the_source_of_an_email() -> None:
    mail = mail_texts.compose(claimed_mail(token="t" * 43), sender=SENDER, base_url="https://" + "long." * 20 + "org")
    assert b"token=" + b"t" * 43 in mail.as_bytes()


# --- clean-up


async def test_old_emails_are_deleted(database: Database) -> None:
    now = datetime.now(UTC)
    holly = await account(database)
    for _ in range(4):
        await put(database, holly, MailType.PASSWORD_CHANGED)
    first = (await outbox(database))[0]["id"]

    async def settle(number: int, **values: Any) -> None:
        where = models.mails.c.id == first + number
        await database.write(
            lambda tx: tx.connection.execute(update(models.mails).where(where).values(due_at=None, **values))
        )

    def ago(**units: float) -> str:
        return (now - timedelta(**units)).isoformat().replace("+00:00", "Z")

    await settle(0, sent_at=ago(hours=25))
    await settle(1, sent_at=ago(hours=23))
    await settle(2, failed_at=ago(days=6))
    assert await mails.forget(database, now) == 1
    assert [row["id"] for row in await outbox(database)] == [first + 1, first + 2, first + 3]
    assert await mails.forget(database, now + timedelta(days=2)) == 2
    assert [row["due_at"] is not None for row in await outbox(database)] == [True], "a waiting email is not deleted"


async def test_tokens_expire_after_a_day(database: Database) -> None:
    holly = await account(database)
    token = await database.write(lambda tx: one_time_tokens.mint(tx, Purpose.RESET, holly["id"], holly["email"]))
    now = datetime.now(UTC)
    assert await one_time_tokens.forget(database, now + timedelta(hours=23)) == 0
    assert await one_time_tokens.find(database, token, Purpose.RESET) is not None
    expired = (now - timedelta(seconds=1)).isoformat().replace("+00:00", "Z")
    await change(database, models.one_time_tokens, expires_at=expired)
    assert await one_time_tokens.find(database, token, Purpose.RESET) is None
    assert await database.write(lambda tx: one_time_tokens.take(tx, token, Purpose.RESET)) is None
    assert await one_time_tokens.forget(database, datetime.now(UTC)) == 1
