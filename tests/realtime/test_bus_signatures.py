"""Messages over Redis are signed: a worker accepts only messages from workers that share its secret key."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import orjson
import pytest
from redis.asyncio import Redis

from core.identity import Group, Identity
from realtime.feed.bus import CHANNEL
from realtime.feed.redis_backend import _encode_event
from realtime.feed.signer import KEY_ID_SIZE, SIGNATURE_SIZE, BadSignature, Signer
from realtime.sockets.registry import Registry
from repository.engine.events import Event
from tests.support.backends import SQLITE_ONLY
from tests.support.metrics import metric, metric_becomes
from tests.support.servers.redis import RedisServer
from tests.support.service import Service, eventually
from tests.support.sockets import signed_in

KEY, OLD_KEY, FOREIGN_KEY = ("the key of today " * 2, "the key of yesterday " * 2, "a stranger's key " * 2)
OVERHEAD = KEY_ID_SIZE + SIGNATURE_SIZE
MESSAGE = b'{"epoch":"e","seq":7}\n{"id":1}'


# --- signatures


def test_a_message_is_verified_with_the_key_that_signed_it() -> None:
    worker = Signer([KEY, OLD_KEY])
    assert worker.verify(worker.sign(MESSAGE)) == MESSAGE
    assert worker.verify(Signer([OLD_KEY]).sign(MESSAGE)) == MESSAGE, "the signature with the old key is accepted"
    assert len(worker.sign(MESSAGE)) == len(MESSAGE) + OVERHEAD


def test_any_other_message_is_rejected() -> None:
    worker = Signer([KEY])
    signed = worker.sign(MESSAGE)
    changed = [signed[:at] + bytes([signed[at] ^ 1]) + signed[at + 1 :] for at in range(len(signed))]
    cut = [signed[:at] for at in range(len(signed))]
    forged = [MESSAGE, b"", Signer([FOREIGN_KEY]).sign(MESSAGE), signed + b"x", signed[:OVERHEAD] + b"{}"]
    for each in (*changed, *cut, *forged):
        with pytest.raises(BadSignature):
            worker.verify(each)


# --- with a service


@asynccontextmanager
async def heard_on(client: Redis, channel: str) -> AsyncIterator[list[bytes]]:
    """Collect the messages on a channel while the block runs."""
    heard: list[bytes] = []
    async with client.pubsub() as pubsub:
        await pubsub.subscribe(channel)

        async def listen() -> None:
            while True:
                message = await pubsub.get_message(ignore_subscribe_messages=True, timeout=1)
                if message is not None:
                    heard.append(message["data"])

        listening = asyncio.create_task(listen())
        yield heard
        listening.cancel()
        await asyncio.gather(listening, return_exceptions=True)


def promotion(account: dict[str, Any], epoch: str, seq: int) -> bytes:
    """Return the message with which one worker tells the others that a user became an admin."""
    payload = orjson.dumps({**account, "group": "admin"})
    users = "group:admin"
    return _encode_event(Event(epoch, seq, "users", "update", str(account["id"]), users, payload, None, (), None, "t"))


@SQLITE_ONLY
async def test_a_stranger_on_redis_changes_nothing(
    redis: RedisServer, new_service: Callable[..., Service], tmp_path: Path
) -> None:
    running = new_service()
    running.settings["BROADCAST_URL"] = redis.url
    client = Redis.from_url(redis.url)
    with running.running():
        async with running.person() as alice, running.watch(**signed_in(alice)) as watcher:
            async with heard_on(client, CHANNEL) as heard:
                epoch = watcher.welcome["data"]["epoch"].encode()
                await watcher.sees(await alice.add())

                def genuine() -> list[bytes]:
                    return [each for each in heard if epoch in each and b'"topic":"movies"' in each]

                message = (await eventually(genuine, "the event is on Redis"))[0]
            account = (await alice.http.get("/users/me")).json()
            seq = watcher.seqs[-1]
            event = promotion(account, epoch.decode(), seq + 1)
            forged = [
                event,
                Signer([FOREIGN_KEY]).sign(event),
                message[:OVERHEAD] + event,
                message[:-1],
                message.replace(b'"seq":%d' % seq, b'"seq":%d' % (seq + 1)),
                b'{"nudge":"presence"}',
                orjson.dumps({"worker": "w", "epoch": epoch.decode(), "seq": seq + 100}),
                b"junk",
                b"",
            ]
            rejected = await metric(running, "marquee_bus_rejected_total")
            for each in forged:
                await client.publish(CHANNEL, each)
            await metric_becomes(running, "marquee_bus_rejected_total", rejected + len(forged))
            await client.publish(CHANNEL, message)  # replay the genuine message
            reply = await watcher.ask({"id": 1, "action": "subscribe", "topics": ["users"]})
            assert reply["error"]["code"] == "forbidden"
            movie = await alice.add()
            assert (await watcher.sees(movie))["seq"] == seq + 1
    await client.aclose()
    assert running.log().count("bus messages rejected") == 1, "expected at most one line a minute"


# --- users who get a higher group


async def test_a_group_that_rises_is_confirmed_in_the_database() -> None:
    stored = Group.USER
    asked = asyncio.Event()
    answering = asyncio.Event()

    async def recheck(identity: Identity) -> Identity:
        asked.set()
        await answering.wait()
        return Identity(identity.user_id, stored, identity.expires_at, identity.session_id, identity.username)

    registry = Registry(recheck)
    changes: list[Identity | None] = []
    entry = registry.add(Identity(1, Group.USER, 0.0, "s", "holly"), changes.append)

    def event(group: Group) -> Event:
        payload = orjson.dumps({"id": 1, "group": group, "username": "holly", "is_active": True})
        return Event("e", 1, "users", "update", "1", "group:admin", payload, None, (), None, "t")

    registry.on_events([event(Group.ADMIN)])
    await asked.wait()
    answering.set()
    await eventually(lambda: not registry._confirming, "the check ends")
    assert (changes, entry.identity.group) == ([], Group.USER), "the database does not confirm the new group"

    stored = Group.ADMIN
    asked.clear()
    answering.clear()
    registry.on_events([event(Group.MODERATOR)])
    await asked.wait()
    assert changes == []
    registry.on_events([event(Group.ADMIN)])  # the first event is still being confirmed
    answering.set()
    await eventually(lambda: entry.identity.group is Group.ADMIN, "the group in the database applies")

    registry.on_events([event(Group.USER)])
    assert entry.identity.group is Group.USER, "a lower group applies immediately"
    registry.close()
