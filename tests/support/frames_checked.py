"""Check every frame that a test receives against the schemas of `/asyncapi.json`.

A frame with missing or additional members fails the test that received it. Every frame is checked: a bulk frame of
1,000 movies takes some milliseconds (`test_asyncapi` asserts a bound), other frames take a few microseconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import jsonschema_rs

from realtime.asyncapi import document as asyncapi


class FrameMismatch(AssertionError):
    """A frame does not fit its schema; the message contains the frame and its first problem."""


class Checker:
    """Checks frames against one AsyncAPI document, and compiles each schema once."""

    def __init__(self, document: Mapping[str, Any]) -> None:
        self._components = document["components"]
        self._validators: dict[str, jsonschema_rs.Draft7Validator] = {}
        # Schema names by operation and topic. The topic is None if frames have no topic or the schema allows several.
        self._frames: dict[tuple[str, str | None], str] = {}
        self._replies: dict[str, str] = {}
        for key, message in self._components["messages"].items():
            payload = message["payload"]
            names = [each["$ref"].rpartition("/")[2] for each in payload.get("oneOf", [payload])]
            if key.endswith("_frame"):
                for name in names:
                    topic = self._components["schemas"][name]["properties"].get("topic", {}).get("const")
                    self._frames[message["name"], topic] = name
            elif key.endswith("_reply"):
                self._replies[key.removesuffix("_reply")] = names[0]
        self._error = self._components["messages"]["error"]["payload"]["$ref"].rpartition("/")[2]

    def check(self, frame: Any, asked: Any = None) -> None:
        """Raise FrameMismatch unless a frame fits its schema. `asked` is the action that a reply answers, if known."""
        names = self._schemas_of(frame, asked)
        if not names:
            raise FrameMismatch(f"no schema for {_shown(frame)}")
        problems = [self._problem(name, frame) for name in names]
        if None not in problems:
            raise FrameMismatch(f"{_shown(frame)} is not a valid {' or '.join(names)}: {problems[0]}")

    def _schemas_of(self, frame: Any, asked: Any) -> list[str]:
        if not isinstance(frame, dict):
            return []
        if "operation" in frame:
            operation, topic = frame["operation"], frame.get("topic")
            name = self._frames.get((operation, topic)) or self._frames.get((operation, None))
            return [name] if name is not None else []
        if frame.get("ok") is False:
            return [self._error]
        if asked is not None:
            return [self._replies[asked]] if isinstance(asked, str) and asked in self._replies else []
        if "status" in frame:
            return [self._replies["request"]]
        return [name for action, name in self._replies.items() if action != "request"]

    def _problem(self, name: str, frame: Any) -> str | None:
        validator = self._validators.get(name)
        if validator is None:
            schema = {"$ref": f"#/components/schemas/{name}", "components": {"schemas": self._components["schemas"]}}
            validator = jsonschema_rs.Draft7Validator(schema, validate_formats=True)
            self._validators[name] = validator
        if validator.is_valid(frame):
            return None
        error = _deepest(next(validator.iter_errors(frame)))
        place = ".".join(map(str, error.instance_path)) or "the frame"
        return f"{place}: {error.message[:500]}"


def _deepest(error: jsonschema_rs.ValidationError) -> jsonschema_rs.ValidationError:
    """Return the error of the `anyOf` branch that matched furthest, because that error explains the mismatch best."""
    branches = getattr(error.kind, "context", None)
    if not branches:
        return error
    inner = [_deepest(branch[0]) for branch in branches if branch]
    return max(inner, key=lambda each: len(each.instance_path), default=error)


def _shown(frame: Any) -> str:
    text = str(frame)
    return text if len(text) <= 1_000 else f"{text[:1_000]}…"


@cache
def checker() -> Checker:
    return Checker(asyncapi.document())


def check_frame(frame: Any, asked: Any = None) -> None:
    """Raise FrameMismatch unless the frame fits its schema in `/asyncapi.json`."""
    checker().check(frame, asked)
