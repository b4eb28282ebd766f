"""A peer that vanished without closing its connection is detected, even if only heartbeats are sent to it."""

from __future__ import annotations

import ctypes
import socket
import struct
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from realtime.sse.event_stream import Pace
from server import serving, unread_responses
from tests.support.backends import SQLITE_ONLY
from tests.support.raw_http import RawConnection, raw_connection
from tests.support.served_here import served_here
from tests.support.service import Service, eventually

STREAM = "GET /events HTTP/1.1\r\nHost: 127.0.0.1\r\nAccept: text/event-stream\r\n\r\n"
SO_ATTACH_FILTER = 26
DROP_EVERYTHING = struct.pack("HBBI", 0x06, 0, 0, 0)  # the BPF program `return 0`


@asynccontextmanager
async def vanishing(service: Service, text: str) -> AsyncIterator[tuple[RawConnection, Callable[[], None]]]:
    """Connect and send `text`; yield the connection, and a function that makes this side drop all packets."""
    async with raw_connection(service, text) as connection:

        def vanish() -> None:
            program = ctypes.create_string_buffer(DROP_EVERYTHING)
            filter_ = struct.pack("HL", 1, ctypes.addressof(program))
            raw: socket.socket = connection.writer.get_extra_info("socket")
            raw.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, filter_)

        yield connection, vanish


@SQLITE_ONLY
async def test_peers_that_vanished_are_noticed(
    new_service: Callable[..., Service], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "VANISHED_SECONDS", 3)
    monkeypatch.setattr(serving, "PROBE_AFTER_SECONDS", 1)
    monkeypatch.setattr(serving, "PROBE_INTERVAL_SECONDS", 1)
    service = new_service()
    async with served_here(service) as server:
        async with vanishing(service, STREAM) as (quiet, vanish), raw_connection(service, STREAM) as present:
            assert await quiet.head() == await present.head() == "HTTP/1.1 200 OK"
            await eventually(lambda: len(server.server_state.connections) == 2, "both connections are open")
            begun = time.monotonic()
            vanish()
            await eventually(lambda: len(server.server_state.connections) == 1, "the vanished peer is noticed", 20)
            assert time.monotonic() - begun < 15
            assert not present.is_alone()


def test_a_vanished_peer_is_noticed_within_two_minutes() -> None:
    assert Pace().heartbeat_seconds + serving.VANISHED_SECONDS < 115
    assert unread_responses.WRITE_SECONDS < serving.VANISHED_SECONDS, "a slow reader must not seem to have vanished"
    assert serving.PROBE_AFTER_SECONDS + serving.VANISHED_SECONDS <= 120


@SQLITE_ONLY
async def test_accepted_connections_have_the_options(new_service: Callable[..., Service]) -> None:
    service = new_service()
    async with served_here(service) as server, raw_connection(service) as connection:
        await eventually(lambda: server.server_state.connections, "the connection is accepted")
        (protocol,) = server.server_state.connections
        accepted: Any = protocol.transport.get_extra_info("socket")
        assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 1000 * serving.VANISHED_SECONDS
        assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT) == serving.UNSENT_BYTES
        assert connection
