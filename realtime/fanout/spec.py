"""What a subscription requests, as a value (`Spec`), and which topics an identity may watch."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

from core.errors import Forbidden
from core.filters import Filter
from core.identity import ANONYMOUS_AUDIENCES, Identity
from realtime.wire.frames import Rendering
from repository.engine.events import Event
from resources.topics import TOPICS


@dataclass(frozen=True)
class Spec:
    """Topics, filters, and how frames are rendered. Subscriptions with equal specs receive the same bytes.

    `filters` holds one filter for each topic, or is empty when nothing is filtered. `audiences` are the audiences of
    the socket's identity.
    """

    topics: frozenset[str]
    rendering: Rendering = field(default_factory=Rendering)
    audiences: frozenset[str] = ANONYMOUS_AUDIENCES
    filters: tuple[tuple[str, Filter], ...] = ()
    latest_every_ms: int | None = None

    @cached_property
    def _hash(self) -> int:
        return hash((self.topics, self.rendering, self.audiences, self.filters, self.latest_every_ms))

    def __hash__(self) -> int:
        # The hash is computed only once, because the hub looks up each affected group several times per event.
        return self._hash

    def admits(self, event: Event) -> bool:
        """Return whether the event's topic and audience are among those of the spec. Filters are not applied."""
        return event.topic in self.topics and event.audience in self.audiences


def audiences_of(identity: Identity | None) -> frozenset[str]:
    """Return the audiences whose events a client with this identity may see."""
    return identity.audiences if identity is not None else ANONYMOUS_AUDIENCES


def user_id_of(identity: Identity | None) -> int | None:
    return identity.user_id if identity is not None else None


def check_topics(topics: frozenset[str], identity: Identity | None) -> None:
    """Raise Forbidden if the identity may not watch one or more of the topics."""
    for topic in sorted(topics):
        reader = TOPICS[topic]
        if reader == "self" and identity is None:
            raise Forbidden(f"Topic {topic} requires signing in")
        if reader not in ("public", "self") and (identity is None or identity.group != reader):
            raise Forbidden(f"Topic {topic} is only for {reader}s")
