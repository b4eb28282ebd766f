"""A subscription as a value: topics, filters and how its frames are written."""

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
    """Equal specs share one group in the hub, and every byte that is sent.

    `filters` holds one for each topic, or nothing when everything is wanted.
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
        # Once: the hub looks each concerned group up several times with every event.
        return self._hash

    def admits(self, event: Event) -> bool:
        return event.topic in self.topics and event.audience in self.audiences


def check_topics(topics: frozenset[str], identity: Identity | None) -> None:
    """Raises Forbidden when one of them is not for this identity."""
    for topic in sorted(topics):
        reader = TOPICS[topic]
        if reader == "self" and identity is None:
            raise Forbidden(f"Topic {topic} is for those who sign in")
        if reader not in ("public", "self") and (identity is None or identity.group != reader):
            raise Forbidden(f"Topic {topic} is for {reader}s")
