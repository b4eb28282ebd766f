"""The outbox and the mailer: nothing is lost, nobody gets what is not theirs, and nothing secret lies around."""

from __future__ import annotations

import asyncio
import stat
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import delete, func, select, update

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
from tests.support.mail_server import MailServer, link_in, mails_in, part, token_in
from tests.support.service import eventually, free_port

BASE = "https://movies.example.org"
SENDER = "Märquee <marquee@example.org>"


@pytest.fixture(scope="module")
def database_url(new_places: Callable[[], Places]) -> str:
    """A database with all its tables, made once for these tests."""
    url = new_places().database_url

    async def migrate() -> None:
        database = Database(url)
        await migrations.migrate(database)
        await database.close()

    asyncio.run(migrate())
    return url


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    """The database without accounts and mails."""
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
    """Stored without its password being hashed; `waits` for its link, or is active."""
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
    """All its rows, as if time had passed."""

    async def work(tx: Transaction) -> None:
        await tx.connection.execute(update(table).values(**values))

    await database.write(work)


async def settled(database: Database) -> list[dict[str, Any]]:
    """The outbox, when nothing in it waits any more."""

    async def look() -> bool:
        return all(row["due_at"] is None for row in await outbox(database))

    await eventually(look, "an outbox in which nothing waits")
    return await outbox(database)


# --- sending


async def test_a_mail_arrives_in_text_and_html_with_a_link_that_is_good_once(
    database: Database, server: MailServer
) -> None:
    holly = await account(database, waits=True)
    await put(database, holly, MailType.ACTIVATE)
    async with mailing(database, server):
        mail = await server.mail_to("holly@example.org")
        [row] = await settled(database)
    assert row["sent_at"] is not None
    assert (mail["From"], mail["To"]) == (SENDER, "holly@example.org")
    assert mail["Subject"] == "Activate your account"
    assert mail["Auto-Submitted"] == "auto-generated"
    assert mail["Message-ID"].endswith("@movies.example.org>")
    assert datetime.strptime(mail["Date"], "%a, %d %b %Y %H:%M:%S %z") <= datetime.now(UTC)
    assert link_in(mail) == f"{BASE}/auth/activate?token={token_in(mail)}"
    assert "Hello holly," in part(mail, "plain")
    user = await database.write(lambda tx: confirmations.confirm(tx, token_in(mail)))
    assert (user["id"], user["is_active"]) == (holly["id"], True)


async def test_neither_the_outbox_nor_the_tokens_hold_what_the_mail_carries(
    database: Database, server: MailServer
) -> None:
    await put(database, await account(database), MailType.RESET_PASSWORD)
    async with mailing(database, server):
        token = token_in(await server.mail_to("holly@example.org"))
        rows = await settled(database)
    async with database.read() as connection:
        tokens = [dict(row._mapping) for row in await connection.execute(select(models.one_time_tokens))]
    assert len(tokens) == 1
    assert token not in repr(rows) + repr(tokens)


async def test_a_mail_server_that_is_away_loses_nothing(database: Database) -> None:
    """Nor does one that takes connections and says nothing sensible, or that has no room just now."""
    server = MailServer()
    await put(database, await account(database), MailType.PASSWORD_CHANGED)
    async with mailing(database, server):

        async def tried_twice() -> bool:
            return bool((await outbox(database))[0]["attempts"] >= 2)

        await eventually(tried_twice, "two attempts while the server is away")
        full = {"holly@example.org": 2}
        server.reply = lambda address: "452 no room" if full[address] else "250 OK"

        with server.running():
            await eventually(lambda: server.tried >= 2, "two attempts while it has no room")
            assert server.mails_to("holly@example.org") == []
            full["holly@example.org"] = 0
            await server.mail_to("holly@example.org")
            [row] = await settled(database)
    # Two while it is away, of which the second may meet it already, two while it has no room, and the last.
    assert row["attempts"] >= 4
    assert (row["sent_at"] is not None, row["failed_at"]) == (True, None)
    assert len(server.mails_to("holly@example.org")) == 1


async def test_an_address_that_the_server_refuses_for_good_is_not_tried_again(
    database: Database, server: MailServer
) -> None:
    server.reply = lambda address: "550 no such user"
    await put(database, await account(database), MailType.PASSWORD_CHANGED)
    async with mailing(database, server):
        [row] = await settled(database)
    assert (row["attempts"], row["sent_at"]) == (1, None)
    assert row["failed_at"] is not None
    assert server.tried == 1


async def test_a_mail_is_given_up_after_two_days(database: Database) -> None:
    await put(database, await account(database), MailType.PASSWORD_CHANGED)
    await change(database, models.mails, attempts=mails.MAX_ATTEMPTS - 1)
    async with mailing(database, server_of(f"smtp://127.0.0.1:{free_port()}")):
        [row] = await settled(database)
    assert (row["attempts"], row["failed_at"] is not None) == (mails.MAX_ATTEMPTS, True)
    pauses = [pause_seconds(attempt, FIRST_PAUSE_SECONDS) for attempt in range(1, mails.MAX_ATTEMPTS)]
    assert 8 <= pauses[0] <= 12
    assert max(pauses) <= MAX_PAUSE_SECONDS * 1.2
    assert timedelta(days=1.5) < timedelta(seconds=sum(pauses)) < timedelta(days=2.5)


async def test_a_mail_that_ends_its_senders_is_given_up_too(database: Database, server: MailServer) -> None:
    await put(database, await account(database), MailType.PASSWORD_CHANGED)
    await change(database, models.mails, attempts=mails.MAX_ATTEMPTS)
    async with mailing(database, server):
        [row] = await settled(database)
    assert row["failed_at"] is not None
    assert server.tried == 0


async def test_two_workers_send_each_mail_once(database: Database, server: MailServer) -> None:
    holly = await account(database)
    for _ in range(12):
        await put(database, holly, MailType.PASSWORD_CHANGED)
    other = Database(database.url)
    try:
        async with mailing(database, server), mailing(other, server):
            await settled(database)
    finally:
        await other.close()
    ids = [mail["Message-ID"] for mail in server.mails_to("holly@example.org")]
    assert len(ids) == len(set(ids)) == 12


async def test_what_a_dead_worker_had_in_hand_is_sent_by_another_when_the_lease_is_over(
    database: Database, server: MailServer
) -> None:
    await put(database, await account(database), MailType.PASSWORD_CHANGED)
    claimed = await mails.claim(database, "a worker that is killed")
    assert claimed is not None
    first = mail_texts.compose(claimed, sender=SENDER, base_url=BASE)
    assert await mails.claim(database, "another") is None, "the lease holds"
    await change(database, models.mails, due_at=0.0)
    async with mailing(database, server):
        second = await server.mail_to("holly@example.org")
        await settled(database)
    # Whoever got both can tell.
    assert (second["Message-ID"], second["Date"]) == (first["Message-ID"], first["Date"])
    # The dead one comes back, and has no say any more.
    await mails.postpone(database, claimed, "a worker that is killed", 0)
    assert [row["due_at"] for row in await outbox(database)] == [None]


class Stuck:
    """A gateway that never comes to an end."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def describe(self) -> str:
        return "nowhere"

    async def deliver(self, message: Any, name: str) -> None:
        self.names.append(name)
        await asyncio.Event().wait()


async def test_a_worker_that_stops_gives_back_what_it_could_not_finish(database: Database, server: MailServer) -> None:
    await put(database, await account(database), MailType.PASSWORD_CHANGED)
    stuck = Stuck()
    mailer = Mailer(database, stuck, sender=SENDER, base_url=BASE)
    task = asyncio.create_task(mailer.run())
    await eventually(lambda: stuck.names, "a conversation that is on its way")
    mailer.stop()
    await mailer.ended(0.05)
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
    [row] = await outbox(database)
    assert (row["attempts"], row["lease_owner"]) == (0, None)
    async with mailing(database, server):
        await server.mail_to("holly@example.org")


async def test_no_more_than_a_few_conversations_at_once(database: Database) -> None:
    holly = await account(database)
    for _ in range(8):
        await put(database, holly, MailType.PASSWORD_CHANGED)
    stuck = Stuck()
    mailer = Mailer(database, stuck, sender=SENDER, base_url=BASE)
    task = asyncio.create_task(mailer.run())
    try:
        await eventually(lambda: len(stuck.names) == 4, "four conversations")
        async with database.read() as connection:
            held = select(func.count()).select_from(models.mails).where(models.mails.c.lease_owner.is_not(None))
            assert (await connection.execute(held)).scalar_one() == 4
    finally:
        mailer.stop()
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


# --- who gets one


async def nobody_gets(database: Database, server: MailServer) -> None:
    async with mailing(database, server):
        await settled(database)
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
async def test_accounts_that_are_disabled_or_deleted_get_no_mail(
    database: Database, server: MailServer, kind: MailType, values: dict[str, Any]
) -> None:
    await put(database, await account(database, waits=kind is MailType.ACTIVATE), kind)
    await change(database, models.users, **values)
    await nobody_gets(database, server)
    assert await outbox(database) == []


async def test_an_account_that_is_active_needs_no_link(database: Database, server: MailServer) -> None:
    await put(database, await account(database), MailType.ACTIVATE)
    await nobody_gets(database, server)


async def test_who_has_waited_for_a_week_gets_no_more_links(database: Database, server: MailServer) -> None:
    """So that nobody keeps somebody else's address by asking every day."""
    await account(database, waits=True)
    for days, mailed in ((DAYS_TO_ACTIVATE - 1, 1), (DAYS_TO_ACTIVATE + 1, 1)):
        created_at = datetime.now(UTC) - timedelta(days=days)
        await change(database, models.users, created_at=utc_text(created_at))
        await change(database, models.mails, created_at=utc_text(created_at))
        await request(database, MailType.ACTIVATE, "holly@example.org")
        async with mailing(database, server):
            await settled(database)
        assert len(server.received) == mailed, days


async def test_a_link_is_not_mailed_to_an_address_that_was_given_up(database: Database, server: MailServer) -> None:
    await put(database, await account(database), MailType.RESET_PASSWORD, "former@example.org")
    await nobody_gets(database, server)


async def test_a_wish_is_sent_to_the_address_as_the_account_spells_it(database: Database, server: MailServer) -> None:
    """The long s is an s when addresses are compared, but another mailbox."""
    await account(database, "harrys", email="harrys@example.org")
    await request(database, MailType.RESET_PASSWORD, "harry\u017f@example.org")
    async with mailing(database, server):
        await server.mail_to("harrys@example.org")
    assert [to for to, _ in server.received] == ["harrys@example.org"]


async def test_a_wish_of_a_stranger_goes_nowhere(database: Database, server: MailServer) -> None:
    await account(database)
    await request(database, MailType.RESET_PASSWORD, "lime@example.org")
    await request(database, MailType.ACTIVATE, "lime@example.org")
    await nobody_gets(database, server)
    assert await outbox(database) == []


async def test_one_mail_a_minute_and_five_a_day(database: Database, server: MailServer) -> None:
    await account(database)
    gateway = server_of(server.url)
    sent = 0
    for _ in range(7):
        for _ in range(2):
            await request(database, MailType.RESET_PASSWORD, "holly@example.org")
        async with mailing(database, gateway):
            await settled(database)
        assert len(server.received) - sent <= 1, "two within a minute"
        sent = len(server.received)
        minutes_ago = datetime.now(UTC) - timedelta(minutes=2)
        await change(database, models.mails, created_at=minutes_ago.isoformat().replace("+00:00", "Z"))
    assert sent == mails.MAX_REQUESTED_PER_DAY
    # The next day.
    await database.write(lambda tx: tx.connection.execute(delete(models.mails)))
    await request(database, MailType.RESET_PASSWORD, "holly@example.org")
    async with mailing(database, gateway):
        await server.mail_to("holly@example.org", sent + 1)


async def test_wishes_at_once_on_two_workers_are_one_mail(database: Database, server: MailServer) -> None:
    await account(database)
    for _ in range(6):
        await request(database, MailType.RESET_PASSWORD, "holly@example.org")
    other = Database(database.url)
    try:
        async with mailing(database, server), mailing(other, server):
            await settled(database)
    finally:
        await other.close()
    assert len(server.received) == 1


async def test_so_many_mails_of_one_account_wait_and_no_more(database: Database) -> None:
    holly, lime = await account(database), await account(database, "lime")
    for _ in range(mails.MAX_WAITING_PER_USER):
        assert await put(database, holly, MailType.PASSWORD_CHANGED)
    assert not await put(database, holly, MailType.PASSWORD_CHANGED)
    assert await put(database, lime, MailType.PASSWORD_CHANGED), "others are not concerned"
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


async def test_a_password_is_only_told_to_a_server_that_proves_who_it_is(tmp_path: Path) -> None:
    with MailServer(tls=certificate_for("127.0.0.1", tmp_path)).running() as server:
        with pytest.raises(NotDelivered):
            await deliver(f"smtp://holly:secret@127.0.0.1:{server.port}")
        assert not server.passwords
        assert not server.received
    with MailServer().running() as plain:
        with pytest.raises(NotDelivered):
            await deliver(f"smtp://holly:secret@127.0.0.1:{plain.port}")
        assert not plain.passwords
        assert not plain.received


async def test_with_a_proven_server_the_password_is_told_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with MailServer(tls=certificate_for("127.0.0.1", tmp_path)).running() as server:
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "certificate.pem"))
        await deliver(f"smtp://holly:p%40ss%3Aword@127.0.0.1:{server.port}")
        assert server.passwords == [b"p@ss:word"]
        assert server.encrypted == [True]


async def test_without_a_password_encryption_is_taken_where_it_is_offered(tmp_path: Path, server: MailServer) -> None:
    with MailServer(tls=certificate_for("127.0.0.1", tmp_path)).running() as offering:
        await deliver(offering.url)
        assert offering.encrypted == [True]
    await deliver(server.url)
    assert server.encrypted == [False]


async def test_what_is_said_of_a_failure_names_no_address(server: MailServer) -> None:
    server.reply = lambda address: f"550 {address} is unknown"
    with pytest.raises(NotDelivered) as caught:
        await deliver(server.url)
    assert "holly" not in str(caught.value)
    assert "550" in str(caught.value)


# --- the folder


async def test_without_a_server_mails_land_in_a_folder_for_our_eyes_only(database: Database, tmp_path: Path) -> None:
    folder = tmp_path / "new" / "mail"
    await put(database, await account(database, "Hölly", email="holly@example.org"), MailType.RESET_PASSWORD)
    async with mailing(database, Folder(folder)):
        [row] = await settled(database)
    path = folder / f"{row['id']}.eml"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(folder.iterdir()) == [path], "no drafts are left"
    [mail] = mails_in(folder)
    assert "Hello Hölly," in part(mail, "plain")
    assert await one_time_tokens.find(database, token_in(mail), Purpose.RESET) is not None


async def test_a_folder_that_cannot_be_written_loses_nothing(database: Database, tmp_path: Path) -> None:
    (tmp_path / "mail").write_text("in the way")
    await put(database, await account(database), MailType.PASSWORD_CHANGED)
    async with mailing(database, Folder(tmp_path / "mail")):

        async def tried() -> bool:
            return bool((await outbox(database))[0]["attempts"] >= 2)

        await eventually(tried, "two attempts")
        (tmp_path / "mail").unlink()
        await settled(database)
    assert len(mails_in(tmp_path / "mail")) == 1


# --- texts


@pytest.mark.parametrize("kind", list(MailType), ids=str)
def test_every_kind_of_mail_says_the_same_in_text_and_html(kind: MailType) -> None:
    mail = mail_texts.compose(claimed_mail(kind), sender=SENDER, base_url=BASE)
    assert set(mails.MailType) == set(mail_texts.WORDINGS)
    text, html = part(mail, "plain"), part(mail, "html")
    assert all(len(line) <= 80 for line in text.splitlines())
    for paragraph in mail_texts.WORDINGS[kind].paragraphs:
        assert paragraph in " ".join(text.split())
        assert paragraph in html
    assert ("token=secret" in text) == ("token=secret" in html) == (kind in mails.PURPOSES)
    assert "src=" not in html, "nothing is loaded"


def test_names_cannot_become_markup() -> None:
    mail = mail_texts.compose(claimed_mail(username='<b>&"x'), sender=SENDER, base_url=BASE)
    assert "<b>" not in part(mail, "html")
    assert part(mail, "plain").startswith("Hello,")


@pytest.mark.parametrize("username", ["holly", "Märtins_49", "ホリー", "holly-2"])
def test_plain_names_are_greeted(username: str) -> None:
    mail = mail_texts.compose(claimed_mail(username=username), sender=SENDER, base_url=BASE)
    assert part(mail, "plain").startswith(f"Hello {username},")


@pytest.mark.parametrize("username", [None, "\u202e", "\u200b\u2028"])
def test_names_that_cannot_be_seen_are_left_out(username: str | None) -> None:
    mail = mail_texts.compose(claimed_mail(username=username), sender=SENDER, base_url=BASE)
    assert part(mail, "plain").startswith("Hello,")


LINKS = ["www.evil.example", "evil\u3002example", "evil\u2024example", "http:evil", "+18005551234", "18005551234"]


@pytest.mark.parametrize("username", LINKS)
def test_names_that_look_like_links_are_left_out(username: str) -> None:
    mail = mail_texts.compose(claimed_mail(username=username), sender=SENDER, base_url=BASE)
    assert part(mail, "plain").startswith("Hello,")
    assert username not in part(mail, "html")


@pytest.mark.parametrize("recipient", ["holly@example.org\r\nBcc: lime@example.org", "holly@example.org\nX: y"])
def test_an_address_cannot_add_headers(recipient: str) -> None:
    with pytest.raises(ValueError, match="Header values may not contain linefeed"):
        mail_texts.compose(claimed_mail(recipient=recipient), sender=SENDER, base_url=BASE)


def test_links_are_whole_in_the_source_of_a_mail() -> None:
    mail = mail_texts.compose(claimed_mail(token="t" * 43), sender=SENDER, base_url="https://" + "long." * 20 + "org")
    assert b"token=" + b"t" * 43 in mail.as_bytes()


# --- clean-up


async def test_what_is_past_is_forgotten(database: Database) -> None:
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
    assert [row["due_at"] is not None for row in await outbox(database)] == [True], "what waits is not forgotten"


async def test_links_are_good_for_a_day(database: Database) -> None:
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
