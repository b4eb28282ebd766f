"""Signatures of bus messages (HMAC-SHA256): a worker accepts only messages from workers that share its secret key.

A signed message consists of the id of the key, the signature, and the message. The signature covers the whole message,
including the number and the epoch of an event, so a message cannot be truncated, changed or replayed under another
number. An unchanged replay has no effect, because the feed accepts each number only once.

The first key signs and every key verifies, as for tokens (`services.tokens`), so the secret key can be replaced while
workers run.
"""

from __future__ import annotations

import hmac
from collections.abc import Sequence

KEY_ID_SIZE = 8
SIGNATURE_SIZE = 32
HASH = "sha256"
_PURPOSE = b"marquee bus"  # a key that is derived for one purpose cannot be used for another


class BadSignature(ValueError):
    """The message was not signed with a known key, or was changed after signing."""


class Signer:
    """Signs messages with the first of the secret `keys`, and verifies them with any key. Needs at least one key."""

    def __init__(self, keys: Sequence[str]) -> None:
        derived = [hmac.digest(key.encode(), _PURPOSE, HASH) for key in keys]
        self._key = derived[0]
        self._id = _id_of(self._key)
        self._keys = {_id_of(key): key for key in derived}

    def sign(self, message: bytes) -> bytes:
        return b"".join((self._id, hmac.digest(self._key, message, HASH), message))

    def verify(self, data: bytes) -> bytes:
        """Return the message without its signature. Raises BadSignature."""
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
