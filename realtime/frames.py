"""Frames as bytes: the JSON texts of the protocol and their websocket framing. Pure."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import orjson

from repository.event_log import Event

PROTOCOL_VERSION = 1
# Up to this size a built frame is kept with its event: many resuming clients then share one.
MAX_KEPT_BYTES = 4 * 1024


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
    """The frame of a durable event."""
    built = event.built.get(rendering)
    if built is not None:
        return built
    data = event.payload
    if rendering.bulk == "summary" and event.operation.endswith("_bulk"):
        data = _summary(event)
    named = b'"subscription":' + orjson.dumps(rendering.subscription) + b"," if rendering.subscription else b""
    changed = b',"changed":' + orjson.dumps(event.changed) if event.changed else b""
    text = b'{"operation":"%s","topic":"%s",%s"seq":%d,"data":%s%s,"actor_id":%s,"ts":"%s"}' % (
        event.operation.encode(),
        event.topic.encode(),
        named,
        event.seq,
        data,
        changed,
        b"null" if event.actor_id is None else b"%d" % event.actor_id,
        event.created_at.encode(),
    )
    if len(text) <= MAX_KEPT_BYTES:
        event.built[rendering] = text
    return text


def _summary(event: Event) -> bytes:
    data = orjson.loads(event.payload)
    ids = data["ids"] if "ids" in data else [item["id"] for item in data["items"]]
    summary = {"count": data["count"], "first_id": min(ids), "last_id": max(ids), "job_id": data.get("job_id")}
    return orjson.dumps(summary)


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


def resync(*, reason: str, epoch: str, seq: int) -> bytes:
    return orjson.dumps({"operation": "resync", "topic": None, "data": {"reason": reason, "epoch": epoch, "seq": seq}})


def progress(job: Mapping[str, Any]) -> bytes:
    data = {name: job[name] for name in ("id", "state", "done", "total", "rows_per_second")}
    return orjson.dumps({"operation": "progress", "topic": "jobs", "data": data})


def reply(reply_to: int | str | None, data: Mapping[str, Any]) -> bytes:
    return orjson.dumps({"reply_to": reply_to, "ok": True, "data": data})


def error_reply(reply_to: int | str | None, code: str, detail: Any) -> bytes:
    return orjson.dumps({"reply_to": reply_to, "ok": False, "error": {"code": code, "detail": detail}})
