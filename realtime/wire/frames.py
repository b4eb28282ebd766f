"""Frames as bytes: the JSON texts of the protocol and their websocket framing. Pure."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import orjson

from repository.engine.events import Event

PROTOCOL_VERSION = 1
# Up to this size a built frame is kept with its event: many resuming clients then share one.
MAX_KEPT_BYTES = 4 * 1024
MAX_KEPT_FORMS = 32  # of one event: renderings and filters


@dataclass(frozen=True, slots=True)
class Rendering:
    """What the text of an event depends on besides the event."""

    bulk: Literal["items", "summary"] = "items"
    subscription: str | None = None


class Frames:
    """Texts to send together; `wire` is the same as websocket frames, joined once for however many sockets."""

    __slots__ = ("_wire", "size", "texts")

    def __init__(self, texts: Sequence[bytes]) -> None:
        self.texts = texts
        self.size = sum(map(len, texts))
        self._wire: bytes | None = None

    @property
    def wire(self) -> bytes:
        if self._wire is None:
            parts = []
            for text in self.texts:
                parts.append(wire_header(len(text)))
                parts.append(text)
            self._wire = b"".join(parts)
        return self._wire


def wire_header(length: int) -> bytes:
    """The header of an unmasked, final text frame (RFC 6455, section 5.2)."""
    if length < 126:
        return bytes((0x81, length))
    if length < 65536:
        return struct.pack("!BBH", 0x81, 126, length)
    return struct.pack("!BBQ", 0x81, 127, length)


def event_text(event: Event, rendering: Rendering) -> bytes:
    """The frame of a durable event, as it is in the log."""
    text: bytes | None = event.built.get(rendering.bulk)
    if text is None:
        data = event.payload
        if rendering.bulk == "summary" and event.operation.endswith("_bulk"):
            data = _summary(event)
        text = part_text(event, event.operation, data)
        if len(text) <= MAX_KEPT_BYTES:
            keep(event, rendering.bulk, text)
    return named(text, rendering.subscription)


def named(text: bytes, subscription: str | None) -> bytes:
    """The frame of an event as one of this subscription. Texts are kept without: many names share one."""
    if subscription is None:
        return text
    # Operations and topics are words of ours: the first of these is the member.
    place = text.index(b'"seq":')
    return b'%s"subscription":%s,%s' % (text[:place], orjson.dumps(subscription), text[place:])


def part_text(
    event: Event,
    operation: str,
    data: bytes,
    *,
    seq: int | None = None,
    changed: Sequence[str] | None = None,
    reason: str | None = None,
    more: bool = False,
) -> bytes:
    """A frame about some of what an event holds, without a name. `more`: another frame with the same number follows.

    `seq` and `changed` are the event's own when they are left out; only updates have `changed`.
    """
    changed = event.changed if changed is None else changed
    is_update = operation in ("update", "update_bulk")
    return b'{"operation":"%s","topic":"%s","seq":%d,"data":%s%s%s,"actor_id":%s,"ts":"%s"%s}' % (
        operation.encode(),
        event.topic.encode(),
        event.seq if seq is None else seq,
        data,
        b',"changed":' + orjson.dumps(changed) if changed and is_update else b"",
        b',"reason":' + orjson.dumps(reason) if reason is not None else b"",
        b"null" if event.actor_id is None else b"%d" % event.actor_id,
        event.created_at.encode(),
        b',"more":true' if more else b"",
    )


def keep(event: Event, key: Any, built: Any) -> None:
    """Remember what was built of an event while the event is in memory, within a bound."""
    if len(event.built) < MAX_KEPT_FORMS:
        event.built[key] = built


def _named(subscription: str | None) -> bytes:
    return b'"subscription":' + orjson.dumps(subscription) + b"," if subscription is not None else b""


def _summary(event: Event) -> bytes:
    data = orjson.loads(event.payload)
    ids = data["ids"] if "ids" in data else [item["id"] for item in data["items"]]
    return summary(ids, data.get("job_id"))


def summary(ids: Sequence[int | str], job_id: str | None) -> bytes:
    return orjson.dumps({"count": len(ids), "first_id": min(ids), "last_id": max(ids), "job_id": job_id})


def snapshot_page(topic: str, rendering: Rendering, seq: int, items: Sequence[bytes], *, done: bool) -> bytes:
    return b'{"operation":"snapshot","topic":"%s",%s"seq":%d,"data":{"items":[%s],"done":%s}}' % (
        topic.encode(),
        _named(rendering.subscription),
        seq,
        b",".join(items),
        b"true" if done else b"false",
    )


def job_of(event: Event) -> str | None:
    """The job that a bulk event belongs to; it is the last member of the payload."""
    marker = b'"job_id":"'
    start = event.payload.rfind(marker, max(0, len(event.payload) - 64))
    return event.payload[start + len(marker) : -2].decode() if start >= 0 else None


def welcome(*, epoch: str, seq: int, user_id: int | None, heartbeat_seconds: int) -> bytes:
    data = {
        "protocol": PROTOCOL_VERSION,
        "epoch": epoch,
        "seq": seq,
        "user_id": user_id,
        "heartbeat_seconds": heartbeat_seconds,
    }
    return orjson.dumps({"operation": "welcome", "data": data})


def resync(*, reason: str, epoch: str, seq: int, subscription: str | None = None) -> bytes:
    frame: dict[str, Any] = {"operation": "resync", "topic": None}
    if subscription is not None:
        frame["subscription"] = subscription
    return orjson.dumps({**frame, "data": {"reason": reason, "epoch": epoch, "seq": seq}})


def progress(job: Mapping[str, Any], rendering: Rendering) -> bytes:
    data = {name: job[name] for name in ("id", "state", "done", "total", "rows_per_second")}
    return b'{"operation":"progress","topic":"jobs",%s"data":%s}' % (_named(rendering.subscription), orjson.dumps(data))


def reply(reply_to: int | str | None, data: Mapping[str, Any]) -> bytes:
    return orjson.dumps({"reply_to": reply_to, "ok": True, "data": data})


def error_reply(reply_to: int | str | None, code: str, detail: Any) -> bytes:
    return orjson.dumps({"reply_to": reply_to, "ok": False, "error": {"code": code, "detail": detail}})
