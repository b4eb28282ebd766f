"""Comments on movies, and replies to comments. They are deleted with their movie.

A comment that is deleted while it has replies keeps its place, without its text and author, until its last reply is
deleted (`repository.community.comments`).
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field, create_model

import models
from resources.movies import MOVIES
from resources.resource import Parent, Resource
from schemas import Body, Remark, examples


class CommentBody(Body):
    """A comment as clients write it."""

    model_config = examples({"text": "The zither alone is worth the ticket."})

    text: Remark


COMMENTS = Resource(
    table=models.comments,
    body=CommentBody,
    singular="comment",
    label="",
    searched=("text",),
    example_change={"text": "The zither alone is worth two tickets."},
    parents=(Parent("movie_id", MOVIES, count="comments_count", takes_children=True),),
    created_word="wrote",
    has_own_writes=True,
)


def _tree_model() -> type[BaseModel]:
    """Return the model of a comment with its first replies."""
    replies: Any = list["CommentTree"]  # type: ignore[valid-type]
    members: dict[str, Any] = {
        "replies": (replies, Field(description="The first replies, in order of id")),
        "more_replies": (str | None, Field(description="The path of the other replies; null if there are none")),
    }
    return create_model("CommentTree", __base__=COMMENTS.entity, **members)


CommentTree = _tree_model()
