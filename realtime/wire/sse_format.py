"""Server-sent events as bytes (WHATWG HTML, section 9.2): frames in blocks whose id is the position. Pure."""

from __future__ import annotations

from repository.engine.events import Head


def position_text(position: Head) -> str:
    """Return `<epoch>:<seq>`, the form of `Stream-Position` and of event ids."""
    return f"{position.epoch}:{position.seq}"


def frame_block(epoch: str, seq: int, frame: bytes) -> bytes:
    # Encoded JSON has no line breaks, so one `data` line is enough.
    return b"id: %s:%d\ndata: %s\n\n" % (epoch.encode(), seq, frame)


def heartbeat(position: Head) -> bytes:
    """Return a comment and an `id` with the position, so that a resuming client skips events it may not see."""
    return b": heartbeat\nid: %s\n\n" % position_text(position).encode()


def retry(milliseconds: int) -> bytes:
    """Return the line that tells a browser how long to wait before it reconnects."""
    return b"retry: %d\n" % milliseconds
