"""Signatures of bus messages (HMAC-SHA256), so that a worker believes only what a worker with its secret key has sent.

A signed message is the id of the key, the signature, and the message. The signature covers the whole message, number
and epoch of an event included, so a message cannot be cut, changed or sent again under another number. Sent again
unchanged, it is without effect: the feed takes each number once.

The first key signs and every key verifies, as for tokens (`services.tokens`), so a secret key can be replaced while
workers run.
"""

from __future__ import annotations

import hmac
from collections.abc import Sequence

KEY_ID_SIZE = 8
SIGNATURE_SIZE = 32
HASH = "sha256"
_PURPOSE = b"marquee bus"  # keys derived from a secret key for one purpose are of no use for another


class BadSignature(ValueError):
    """The message was not signed with a known key, or has changed since."""


class Signer:
    """`keys` are secret keys, at least one."""

    def __init__(self, keys: Sequence[str]) -> None:
        derived = [hmac.digest(key.encode(), _PURPOSE, HASH) for key in keys]
        self._key = derived[0]
        self._id = _id_of(self._key)
        self._keys = {_id_of(key): key for key in derived}

    def sign(self, message: bytes) -> bytes:
        return b"".join((self._id, hmac.digest(self._key, message, HASH), message))

    def verify(self, data: bytes) -> bytes:
        """Return the message. Raises BadSignature."""
        key = self._keys.get(data[:KEY_ID_SIZE])
        if key is None:
            raise BadSignature("not signed with a known key")
        start = KEY_ID_SIZE + SIGNATURE_SIZE
        message = data[start:]
        if not hmac.compare_digest(data[KEY_ID_SIZE:start], hmac.digest(key, message, HASH)):
            raise BadSignature("the signature does not match")
        return message


def _id_of(key: bytes) -> bytes:
    return hmac.digest(key, b"id", HASH)[:KEY_ID_SIZE]
