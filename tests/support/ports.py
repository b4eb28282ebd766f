"""Ports that neither another test nor an outgoing connection of the machine uses."""

from __future__ import annotations

import random
import socket

FIRST, LAST = 20_000, 32_000  # below Linux's range of ports for outgoing connections

_reserved: list[socket.socket] = []


def free_port() -> int:
    """Reserve a port of 127.0.0.1 for this process and its children, and return the port.

    The reservation is an abstract Unix socket, which vanishes with the process, however the process ends.
    """
    while True:
        port = random.randint(FIRST, LAST)
        reservation = socket.socket(socket.AF_UNIX)
        try:
            reservation.bind(f"\0marquee-test-port-{port}")
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", port))
        except OSError:
            reservation.close()
            continue
        _reserved.append(reservation)
        return port
