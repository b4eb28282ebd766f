"""The scenarios, as read from scenarios.json, and the comparison of reports."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FILE = Path(__file__).parent / "scenarios.json"

Step = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Scenario:
    """A scenario with a scripted server.

    `connections`: the server's steps for each connection, in order. `otherwise`: its steps for later connections.
    """

    name: str
    about: str
    start: Sequence[Step]
    connections: Sequence[Sequence[Step]]
    expect: Mapping[str, Any]
    otherwise: Sequence[Step] | None = None
    client: Mapping[str, Any] | None = None
    tokens: Sequence[str] | None = None
    needs: str | None = None


@dataclass(frozen=True, slots=True)
class Live:
    """A scenario of random writes to the real service while connections are cut."""

    name: str
    about: str
    start: Sequence[Step]
    writes: int
    cut_after_bytes: tuple[int, int]
    requests: int = 0


def load(path: Path = FILE) -> tuple[list[Scenario], list[Live]]:
    """Read the scenarios and the live scenarios. Raises ValueError if a member is unknown or missing."""
    document = json.loads(path.read_text())
    try:
        return [Scenario(**each) for each in document["scenarios"]], [Live(**each) for each in document["live"]]
    except TypeError as error:
        raise ValueError(f"{path}: {error}") from error


def difference(expected: Any, actual: Any, path: str = "report") -> str | None:
    """Return the path and a description of the first difference between `expected` and `actual`, or None.

    Objects may have additional members; arrays must have the same length; an expected `null` may be absent.
    """
    if isinstance(expected, Mapping):
        if not isinstance(actual, Mapping):
            return f"{path}: expected an object, got {_short(actual)}"
        found = (difference(value, actual.get(name), f"{path}.{name}") for name, value in expected.items())
        return next((each for each in found if each is not None), None)
    if isinstance(expected, list):
        if not isinstance(actual, list):
            return f"{path}: expected an array, got {_short(actual)}"
        for index, (want, have) in enumerate(zip(expected, actual, strict=False)):
            if (found_here := difference(want, have, f"{path}[{index}]")) is not None:
                return found_here
        if len(expected) != len(actual):
            return f"{path}: expected {len(expected)} items, got {len(actual)}: {_short(actual)}"
        return None
    if type(expected) is not type(actual) or expected != actual:
        return f"{path}: expected {_short(expected)}, got {_short(actual)}"
    return None


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 300 else text[:300] + "…"
