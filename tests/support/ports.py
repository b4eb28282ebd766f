"""Ports that no other test takes, and that no outgoing connection of the machine gets."""

from __future__ import annotations

import random
import socket

FIRST, LAST = 20_000, 32_000  # below the range from which Linux chooses ports of outgoing connections

_reserved: list[socket.socket] = []


def free_port() -> int:
    """Reserve a port of 127.0.0.1 for this process and what it starts, and return it.

    The reservation is an abstract Unix socket, which ends with the process, however that ends.
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
