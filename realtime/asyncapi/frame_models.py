"""The frames that the service sends besides replies, as pydantic models, which `/asyncapi.json` publishes.

`realtime.wire.frames` builds the bytes without these models, for speed; the tests validate every frame they receive
against the models. A frame must not have a member that its model lacks, so `extra` is forbidden here, although clients
must ignore members they do not know.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Annotated, Any, Generic, Literal, TypeVar, get_args

from pydantic import MISSING, BaseModel, Field

from realtime.sockets.actions import Epoch, Name, Person, Topic
from repository.engine.transaction import MAX_EVENT_ITEMS
from resources.topics import TOPIC_ENTITIES
from schemas import Answer, Moment

SubscriptionName = Annotated[Name | MISSING, Field(description="The explicit subscription that the frame belongs to")]
Seq = Annotated[int, Field(ge=0, description="The event's number in the log")]
Count = Annotated[int, Field(ge=0)]


class WelcomeData(Answer):
    protocol: Literal[1]
    epoch: Epoch = Field(description="The log's identity: keep it with your position")
    seq: Seq = Field(description="The stream begins after this number")
    user_id: int | None
    heartbeat_seconds: int = Field(description="Seconds between two pings from the service")


class Welcome(Answer):
    """The first frame: the socket's user, and where the stream begins."""

    operation: Literal["welcome"]
    data: WelcomeData


TopicName = TypeVar("TopicName")
Entity = TypeVar("Entity")
Id = TypeVar("Id")
FieldName = TypeVar("FieldName")


class TopicFrame(Answer):
    """A frame or part of a frame, parametrised by topic. The models are named after the topic, such as MoviesAdd."""

    @classmethod
    def model_parametrized_name(cls, params: tuple[Any, ...]) -> str:
        names = get_args(params[0])  # empty if the topic is not known yet, but a TypeVar of another generic model
        return f"{names[0].title() if names else ''}{cls.__name__}"


class Gone(TopicFrame, Generic[TopicName, Id]):
    id: Id


JOB_ID: Any = Field(default=MISSING, description="The job that wrote the rows")


class Items(TopicFrame, Generic[TopicName, Entity]):
    count: Count
    items: Annotated[list[Entity], Field(min_length=1, max_length=MAX_EVENT_ITEMS)]
    job_id: str | MISSING = JOB_ID


class Ids(TopicFrame, Generic[TopicName, Id]):
    count: Count
    ids: Annotated[list[Id], Field(min_length=1, max_length=MAX_EVENT_ITEMS)]
    job_id: str | MISSING = JOB_ID


class Summary(TopicFrame, Generic[TopicName, Id]):
    """The data of a bulk frame with `bulk=summary`."""

    count: Count
    first_id: Id = Field(description="The lowest id; some ids between `first_id` and `last_id` may not be included")
    last_id: Id
    job_id: str | None


class Event(TopicFrame, Generic[TopicName]):
    operation: str
    topic: TopicName
    subscription: SubscriptionName = MISSING
    seq: Seq
    data: Any
    actor_id: int | None = Field(description="The user who made the change")
    ts: Moment = Field(description="When the change was committed")
    more: Literal[True] | MISSING = Field(
        default=MISSING, description="Another frame with the same `seq` follows and continues the event"
    )


class Add(Event[TopicName], Generic[TopicName, Entity]):
    """A row was created or now matches the filter."""

    operation: Literal["add"]
    data: Entity


class Update(Event[TopicName], Generic[TopicName, Entity, FieldName]):
    """A row changed."""

    operation: Literal["update"]
    data: Entity
    changed: Annotated[list[FieldName], Field(min_length=1, json_schema_extra={"uniqueItems": True})]


class Delete(Event[TopicName], Generic[TopicName, Id]):
    """A row was deleted or, with the reason `filter`, no longer matches the filter."""

    operation: Literal["delete"]
    data: Gone[TopicName, Id]
    reason: Literal["filter"] | MISSING = MISSING


class AddBulk(Event[TopicName], Generic[TopicName, Entity, Id]):
    """Several rows were created or now match the filter."""

    operation: Literal["add_bulk"]
    data: Items[TopicName, Entity] | Summary[TopicName, Id]


class UpdateBulk(Event[TopicName], Generic[TopicName, Entity, Id, FieldName]):
    """Several rows changed. `changed` names each field that changed in at least one of these rows."""

    operation: Literal["update_bulk"]
    data: Items[TopicName, Entity] | Summary[TopicName, Id]
    changed: Annotated[list[FieldName], Field(min_length=1, json_schema_extra={"uniqueItems": True})]


class DeleteBulk(Event[TopicName], Generic[TopicName, Id]):
    """Several rows were deleted or, with the reason `filter`, no longer match the filter."""

    operation: Literal["delete_bulk"]
    data: Ids[TopicName, Id] | Summary[TopicName, Id]
    reason: Literal["filter"] | MISSING = MISSING


class Page(TopicFrame, Generic[TopicName, Entity]):
    items: Annotated[list[Entity], Field(max_length=MAX_EVENT_ITEMS)]
    done: bool = Field(description="Whether this is the last page of the topic")


class Snapshot(TopicFrame, Generic[TopicName, Entity]):
    """A page of rows as of `seq`. The first page replaces all of the client's rows of the topic."""

    operation: Literal["snapshot"]
    topic: TopicName
    subscription: Name
    seq: Seq
    data: Page[TopicName, Entity]


class JobProgress(Answer):
    id: str
    state: Literal["queued", "running", "done", "cancelled", "failed"]
    done: Count = Field(
        description="How many rows are stored, or how many lines of an imported file are done; the frames of the rows "
        "were sent before this frame"
    )
    total: Count
    rows_per_second: Count


class Progress(Answer):
    """The progress of a job, at most five times a second. Ephemeral: not sent again after a reconnect."""

    operation: Literal["progress"]
    topic: Literal["jobs"]
    subscription: SubscriptionName = MISSING
    data: JobProgress


class PresenceData(Answer):
    count: Count = Field(description="How many sockets watch the topic, including anonymous ones")
    joined: list[Person] = Field(description="Empty for a socket that is not signed in")
    left: list[Person]


class PresenceChange(Answer):
    """The set of watchers of a topic changed. Ephemeral; sent only after the action `presence`."""

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
    seq: Seq = Field(description="The stream continues after this number")


class Resync(Answer):
    """The client's state is invalid: discard it and load everything again."""

    operation: Literal["resync"]
    topic: None
    subscription: SubscriptionName = MISSING
    data: ResyncData


# --- for each topic

# `changed` names none of these fields: `id` and `created_at` never change, and every edit changes the other two.
_NEVER_NAMED = frozenset({"id", "created_at", "version", "updated_at"})
# mypy accepts only constants in the brackets of `Literal`.
_LITERAL: Any = Literal


def _parametrised(model: Any, *parameters: Any) -> type[BaseModel]:
    found: type[BaseModel] = model[parameters]
    return found


def of_topic(topic: str) -> dict[str, type[BaseModel]]:
    """Return the models of a topic's frames, by operation."""
    entity = TOPIC_ENTITIES[topic]
    name = _LITERAL[topic]
    id_ = entity.model_fields["id"].annotation
    field = _LITERAL[tuple(each for each in entity.model_fields if each not in _NEVER_NAMED)]
    return {
        "add": _parametrised(Add, name, entity),
        "update": _parametrised(Update, name, entity, field),
        "delete": _parametrised(Delete, name, id_),
        "add_bulk": _parametrised(AddBulk, name, entity, id_),
        "update_bulk": _parametrised(UpdateBulk, name, entity, id_, field),
        "delete_bulk": _parametrised(DeleteBulk, name, id_),
        "snapshot": _parametrised(Snapshot, name, entity),
    }


@cache
def frames() -> Mapping[str, Sequence[type[BaseModel]]]:
    """Return the models by operation: one for each topic if the frame depends on the topic, or else a single model.

    The first call builds the models, so that the start of the service does not wait for them.
    """
    of_topics = [of_topic(topic) for topic in TOPIC_ENTITIES]
    return {
        "welcome": [Welcome],
        **{operation: [models[operation] for models in of_topics] for operation in of_topics[0]},
        "progress": [Progress],
        "presence": [PresenceChange],
        "resync": [Resync],
    }
