"""Frames as bytes: the JSON of the protocol and its websocket framing. Pure.

Every frame is built here; frequent frames are assembled from bytes, for speed. `realtime.asyncapi.frame_models`
describes the same frames.

Rules:
- The frame of an event is built once per form (`Rendering.bulk`), without a subscription's name, and kept with the
  event if the frame is small. `named` inserts the name.
- `Frames` joins the frames of one write once, however many sockets they are written to.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import orjson

from realtime.wire import data
from repository.engine.events import Event, Head

PROTOCOL_VERSION = 1
# A built frame up to this size is kept with its event, so that many resuming clients share it.
MAX_KEPT_BYTES = 4 * 1024
MAX_KEPT_FORMS = 32  # the limit per event for kept renderings and filter results together


@dataclass(frozen=True, slots=True)
class Rendering:
    """What an event's frame depends on, apart from the event itself."""

    bulk: Literal["items", "summary"] = "items"
    subscription: str | None = None


class Frames:
    """The frames of one write: `texts` holds their JSON, `wire` the websocket frames, joined once for all sockets."""

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
    """Return the header of an unmasked, final text frame (RFC 6455, section 5.2)."""
    if length < 126:
        return bytes((0x81, length))
    if length < 65536:
        return struct.pack("!BBH", 0x81, 126, length)
    return struct.pack("!BBQ", 0x81, 127, length)


# --- events


def event_text(event: Event, rendering: Rendering) -> bytes:
    """Return the frame of a whole event."""
    text: bytes | None = event.built.get(rendering.bulk)
    if text is None:
        payload = event.payload
        if rendering.bulk == "summary" and event.operation.endswith("_bulk"):
            payload = _summary_of(event)
        text = part_text(event, event.operation, payload)
        if len(text) <= MAX_KEPT_BYTES:
            keep(event, rendering.bulk, text)
    return named(text, rendering.subscription)


def named(text: bytes, subscription: str | None) -> bytes:
    """Return an event's frame with the name of a subscription inserted. `text` is the frame without a name."""
    if subscription is None:
        return text
    # Operations and topics never contain `"seq":`, so the first occurrence is the member `seq`.
    place = text.index(b'"seq":')
    return b'%s"subscription":%s,%s' % (text[:place], orjson.dumps(subscription), text[place:])


def part_text(
    event: Event,
    operation: str,
    encoded_data: bytes,
    *,
    seq: int | None = None,
    changed: Sequence[str] | None = None,
    reason: str | None = None,
    more: bool = False,
) -> bytes:
    """Return a frame, without a subscription's name, about some of the rows of an event.

    `seq` and `changed` default to those of the event; only updates carry `changed`. `more` announces another frame with
    the same number.
    """
    changed = event.changed if changed is None else changed
    is_update = operation in ("update", "update_bulk")
    return b'{"operation":"%s","topic":"%s","seq":%d,"data":%s%s%s,"actor_id":%s,"ts":"%s"%s}' % (
        operation.encode(),
        event.topic.encode(),
        event.seq if seq is None else seq,
        encoded_data,
        b',"changed":' + orjson.dumps(changed) if changed and is_update else b"",
        b',"reason":' + orjson.dumps(reason) if reason is not None else b"",
        b"null" if event.actor_id is None else b"%d" % event.actor_id,
        event.created_at.encode(),
        b',"more":true' if more else b"",
    )


def keep(event: Event, key: Any, built: Any) -> None:
    """Store `built` with the event from which it was built, unless MAX_KEPT_FORMS are stored there already."""
    if len(event.built) < MAX_KEPT_FORMS:
        event.built[key] = built


def _summary_of(event: Event) -> bytes:
    payload = orjson.loads(event.payload)
    ids = payload["ids"] if "ids" in payload else [item["id"] for item in payload["items"]]
    return data.summary(ids, payload.get("job_id"))


def job_of(event: Event) -> str | None:
    """Return the id of the job that a bulk event belongs to, or None. `job_id` is the last member of the payload."""
    marker = b'"job_id":"'
    start = event.payload.rfind(marker, max(0, len(event.payload) - 64))
    return event.payload[start + len(marker) : -2].decode() if start >= 0 else None


# --- frames of a subscription or a topic that are not events


def _name_member(subscription: str | None) -> bytes:
    return b'"subscription":' + orjson.dumps(subscription) + b"," if subscription is not None else b""


def snapshot_page(topic: str, rendering: Rendering, seq: int, items: Sequence[bytes], *, done: bool) -> bytes:
    return b'{"operation":"snapshot","topic":"%s",%s"seq":%d,"data":{"items":[%s],"done":%s}}' % (
        topic.encode(),
        _name_member(rendering.subscription),
        seq,
        b",".join(items),
        b"true" if done else b"false",
    )


def progress(job: Mapping[str, Any], rendering: Rendering) -> bytes:
    shown = {name: job[name] for name in ("id", "state", "done", "total", "rows_per_second")}
    name = _name_member(rendering.subscription)
    return b'{"operation":"progress","topic":"jobs",%s"data":%s}' % (name, orjson.dumps(shown))


def presence(topic: str, count: int, joined: Sequence[Mapping[str, Any]], left: Sequence[Mapping[str, Any]]) -> bytes:
    change = {"count": count, "joined": joined, "left": left}
    return orjson.dumps({"operation": "presence", "topic": topic, "data": change})


# --- frames of the connection


def welcome(start: Head, user_id: int | None, heartbeat_seconds: int) -> bytes:
    facts = {"protocol": PROTOCOL_VERSION, "epoch": start.epoch, "seq": start.seq, "user_id": user_id}
    return orjson.dumps({"operation": "welcome", "data": {**facts, "heartbeat_seconds": heartbeat_seconds}})


def resync(reason: str, head: Head, subscription: str | None = None) -> bytes:
    frame: dict[str, Any] = {"operation": "resync", "topic": None}
    if subscription is not None:
        frame["subscription"] = subscription
    return orjson.dumps({**frame, "data": {"reason": reason, "epoch": head.epoch, "seq": head.seq}})


def reply(reply_to: int | str | None, result: Mapping[str, Any]) -> bytes:
    return orjson.dumps({"reply_to": reply_to, "ok": True, "data": result})


def error_reply(reply_to: int | str | None, code: str, detail: Any) -> bytes:
    return orjson.dumps({"reply_to": reply_to, "ok": False, "error": {"code": code, "detail": detail}})


def rest_reply(
    reply_to: int | str | None,
    status: int,
    headers: Mapping[str, str],
    body: bytes,
    error: Mapping[str, str] | None = None,
) -> bytes:
    """Return the reply to `request`. A body that is not JSON becomes a string, and an empty body null."""
    media_type = headers.get("content-type", "").partition(";")[0].strip()
    if not body:
        encoded = b"null"
    elif media_type == "application/json" or media_type.endswith("+json"):
        encoded = body
    else:
        encoded = orjson.dumps(body.decode(errors="replace"))
    return b'{"reply_to":%s,"status":%d,"headers":%s,"body":%s%s}' % (
        orjson.dumps(reply_to),
        status,
        orjson.dumps(dict(headers)),
        encoded,
        b',"error":' + orjson.dumps(error) if error is not None else b"",
    )
