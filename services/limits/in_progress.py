"""Limits for what is in progress at the same time, such as uploads: per user, per network and per worker."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from core.errors import TooManyRequests
from core.network.addresses import network_of

RETRY_SECONDS = 2


@dataclass(frozen=True, slots=True)
class Uploader:
    """The client that uploads a picture or a large body, or downloads an export.

    `user_id` is None if the client is not signed in, `address` is None if the address is not known.
    """

    user_id: int | None
    address: str | None


@dataclass(slots=True)
class InProgress:
    """A bounded set of things in progress. `what` is the plural noun for them in error messages.

    If `limits_clients` is false, there are no limits per user and per address.
    """

    what: str
    max_total: int
    max_per_user: int
    max_per_address: int
    limits_clients: bool
    _counted: Counter[int | str] = field(default_factory=Counter)  # the number in progress, by user id and by network
    total: int = 0  # the number in progress

    @contextmanager
    def take(self, by: Uploader) -> Iterator[None]:
        """Count one until the context ends. Raises TooManyRequests."""
        network = network_of(by.address or "")
        if self.limits_clients:
            if by.user_id is not None and self._counted[by.user_id] >= self.max_per_user:
                raise self._refusal(f"Expected at most {self.max_per_user} {self.what} per user")
            if self._counted[network] >= self.max_per_address:
                raise self._refusal(f"Expected at most {self.max_per_address} {self.what} from {network}")
        if self.total >= self.max_total:
            raise self._refusal(f"Expected at most {self.max_total} {self.what}")
        self.total += 1
        counted: list[int | str] = [network] if by.user_id is None else [by.user_id, network]
        self._counted.update(counted)
        try:
            yield
        finally:
            self.total -= 1
            self._counted.subtract(counted)
            self._counted = +self._counted

    def _refusal(self, message: str) -> TooManyRequests:
        return TooManyRequests(f"{message}; try again in a moment", RETRY_SECONDS)
