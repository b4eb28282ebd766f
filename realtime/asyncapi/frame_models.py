"""What the service says of its own accord, as pydantic models: the truth that `/asyncapi.json` shows.

`frames.py` writes the bytes, by hand, because it must be fast; the tests hold every frame that they receive against
these models. No frame may have a member that its model does not: `extra` is forbidden here, though clients must ignore
what they do not know.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Annotated, Any, Generic, Literal, TypeVar, get_args

from pydantic import MISSING, BaseModel, Field

from realtime.sockets.messages import Epoch, Name, Person, Topic
from repository.engine.transaction import MAX_EVENT_ITEMS
from resources.topics import TOPIC_ENTITIES
from schemas import Answer, Moment

SubscriptionName = Annotated[Name | MISSING, Field(description="Of the explicit subscription it belongs to")]
Seq = Annotated[int, Field(ge=0, description="The event's number in the log")]
Count = Annotated[int, Field(ge=0)]


class WelcomeData(Answer):
    protocol: Literal[1]
    epoch: Epoch = Field(description="The log's identity: keep it beside your position")
    seq: Seq = Field(description="The stream begins after it")
    user_id: int | None
    heartbeat_seconds: int = Field(description="The service pings so often")


class Welcome(Answer):
    """The first frame: who you are and where the stream begins."""

    operation: Literal["welcome"]
    data: WelcomeData


TopicName = TypeVar("TopicName")
Entity = TypeVar("Entity")
Id = TypeVar("Id")
FieldName = TypeVar("FieldName")


class TopicFrame(Answer):
    """A frame of one topic, or a part of one. What is made of it for a topic is named after it: MoviesAdd."""

    @classmethod
    def model_parametrized_name(cls, params: tuple[Any, ...]) -> str:
        names = get_args(params[0])  # none while another generic model is being defined
        return f"{names[0].title() if names else ''}{cls.__name__}"


class Gone(TopicFrame, Generic[TopicName, Id]):
    id: Id


class Items(TopicFrame, Generic[TopicName, Entity]):
    count: Count
    items: Annotated[list[Entity], Field(min_length=1, max_length=MAX_EVENT_ITEMS)]
    job_id: str | MISSING = Field(default=MISSING, description="The job that made them")


class Ids(TopicFrame, Generic[TopicName, Id]):
    count: Count
    ids: Annotated[list[Id], Field(min_length=1, max_length=MAX_EVENT_ITEMS)]


class Summary(TopicFrame, Generic[TopicName, Id]):
    """With `bulk=summary`."""

    count: Count
    first_id: Id = Field(description="The lowest; not every id up to the last need be part of it")
    last_id: Id
    job_id: str | None


class Event(TopicFrame, Generic[TopicName]):
    operation: str
    topic: TopicName
    subscription: SubscriptionName = MISSING
    seq: Seq
    data: Any
    actor_id: int | None = Field(description="The user who did it")
    ts: Moment = Field(description="When")
    more: Literal[True] | MISSING = Field(
        default=MISSING, description="Another frame with the same number follows: this one alone is not all of it"
    )


class Add(Event[TopicName], Generic[TopicName, Entity]):
    """Something is new, or matches the filter from now on."""

    operation: Literal["add"]
    data: Entity


class Update(Event[TopicName], Generic[TopicName, Entity, FieldName]):
    """Something changed."""

    operation: Literal["update"]
    data: Entity
    changed: Annotated[list[FieldName], Field(min_length=1, json_schema_extra={"uniqueItems": True})]


class Delete(Event[TopicName], Generic[TopicName, Id]):
    """Something is gone or, for the reason `filter`, matches the filter no more."""

    operation: Literal["delete"]
    data: Gone[TopicName, Id]
    reason: Literal["filter"] | MISSING = MISSING


class AddBulk(Event[TopicName], Generic[TopicName, Entity, Id]):
    """Many at once are new, or match the filter from now on."""

    operation: Literal["add_bulk"]
    data: Items[TopicName, Entity] | Summary[TopicName, Id]


class UpdateBulk(Event[TopicName], Generic[TopicName, Entity, Id, FieldName]):
    """Many at once changed; `changed` names what did in any of them."""

    operation: Literal["update_bulk"]
    data: Items[TopicName, Entity] | Summary[TopicName, Id]
    changed: Annotated[list[FieldName], Field(min_length=1, json_schema_extra={"uniqueItems": True})]


class DeleteBulk(Event[TopicName], Generic[TopicName, Id]):
    """Many at once are gone or, for the reason `filter`, match the filter no more."""

    operation: Literal["delete_bulk"]
    data: Ids[TopicName, Id] | Summary[TopicName, Id]
    reason: Literal["filter"] | MISSING = MISSING


class Page(TopicFrame, Generic[TopicName, Entity]):
    items: Annotated[list[Entity], Field(max_length=MAX_EVENT_ITEMS)]
    done: bool = Field(description="The last page of this topic")


class Snapshot(TopicFrame, Generic[TopicName, Entity]):
    """Rows as of `seq`. What was kept of the topic before the first page is of no use any more."""

    operation: Literal["snapshot"]
    topic: TopicName
    subscription: Name
    seq: Seq
    data: Page[TopicName, Entity]


class JobProgress(Answer):
    id: str
    state: Literal["queued", "running", "done", "cancelled", "failed"]
    done: Count = Field(description="Stored rows; their frames came before this one")
    total: Count
    rows_per_second: Count


class Progress(Answer):
    """How far a job is, at most five times a second. Ephemeral: sent to whoever is live, never repeated."""

    operation: Literal["progress"]
    topic: Literal["jobs"]
    subscription: SubscriptionName = MISSING
    data: JobProgress


class PresenceData(Answer):
    count: Count = Field(description="Sockets that watch the topic, with those of nobody signed in")
    joined: list[Person] = Field(description="Empty for a socket that has not signed in")
    left: list[Person]


class PresenceChange(Answer):
    """Who watches a topic has changed. Ephemeral; only after the action `presence`."""

    operation: Literal["presence"]
    topic: Topic
    data: PresenceData


class ResyncData(Answer):
    reason: Literal[
        "another epoch",
        "position is older than the log",
        "position is newer than the log",
        "the log was replaced",
        "the snapshot could not be finished",
    ]
    epoch: Epoch
    seq: Seq = Field(description="The stream goes on after it")


class Resync(Answer):
    """What the client has built is no good any more: throw it away and take everything anew."""

    operation: Literal["resync"]
    topic: None
    subscription: SubscriptionName = MISSING
    data: ResyncData


# --- for each topic

# The first two stay for good, and each edit raises the others: no frame names them.
_NEVER_NAMED = frozenset({"id", "created_at", "version", "updated_at"})
# Parametrised with what is only known here, which mypy does not take in brackets.
_LITERAL: Any = Literal


def _made(model: Any, *parameters: Any) -> type[BaseModel]:
    made: type[BaseModel] = model[parameters]
    return made


def of_topic(topic: str) -> dict[str, type[BaseModel]]:
    """The models of a topic's frames, by operation."""
    entity = TOPIC_ENTITIES[topic]
    name = _LITERAL[topic]
    id_ = entity.model_fields["id"].annotation
    field = _LITERAL[tuple(each for each in entity.model_fields if each not in _NEVER_NAMED)]
    return {
        "add": _made(Add, name, entity),
        "update": _made(Update, name, entity, field),
        "delete": _made(Delete, name, id_),
        "add_bulk": _made(AddBulk, name, entity, id_),
        "update_bulk": _made(UpdateBulk, name, entity, id_, field),
        "delete_bulk": _made(DeleteBulk, name, id_),
        "snapshot": _made(Snapshot, name, entity),
    }


@cache
def frames() -> Mapping[str, Sequence[type[BaseModel]]]:
    """The models by operation; those of a topic each have their own.

    Made when the document is: nothing else needs them, and a start need not wait for them.
    """
    of_topics = [of_topic(topic) for topic in TOPIC_ENTITIES]
    return {
        "welcome": [Welcome],
        **{operation: [models[operation] for models in of_topics] for operation in of_topics[0]},
        "progress": [Progress],
        "presence": [PresenceChange],
        "resync": [Resync],
    }
