"""Messages and sessions for tests of the Python client's core, which does no I/O."""

from __future__ import annotations

import json
from typing import Any

from clients.python.marquee_client.session import Session


def welcome(seq: int = 0, epoch: str = "e1", **more: Any) -> str:
    data = {"protocol": 1, "epoch": epoch, "seq": seq, "user_id": None, "heartbeat_seconds": 20, **more}
    return json.dumps({"operation": "welcome", "data": data})


def ok(message: dict[str, Any], **data: Any) -> str:
    return json.dumps({"reply_to": message["id"], "ok": True, "data": data})


def sent(session: Session) -> list[dict[str, Any]]:
    return [json.loads(message) for message in session.messages()]


def connected_session() -> Session:
    session = Session()
    connected(session)
    return session


def connected(session: Session, **hello: Any) -> list[dict[str, Any]]:
    session.connected(0.0)
    session.receive(welcome(**hello), 0.0)
    return sent(session)
