"""All declared resources, in the order of their tables in `models.py`.

`resources/<table>.py` declares the resource of that table, under the table's name in capitals. So a new resource needs
no change here: a table and a file of the same name are enough.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Sequence
from typing import Any

from pydantic import MISSING, BaseModel, Field, create_model

import models
import resources
from resources.resource import Link, Parent, Resource

MAX_INCLUDED = 1_000


def _declared() -> tuple[Resource, ...]:
    files = {each.name for each in pkgutil.iter_modules(resources.__path__)}
    names = [name for name in models.metadata.tables if name in files]
    found = (getattr(importlib.import_module(f"resources.{name}"), name.upper(), None) for name in names)
    return tuple(each for each in found if isinstance(each, Resource))


RESOURCES: Sequence[Resource] = _declared()


def children_of(resource: Resource) -> list[tuple[Resource, Parent]]:
    """Return the resources whose rows can refer to a row of `resource`, each with its relation."""
    return [(child, parent) for child in RESOURCES for parent in child.parents if parent.resource is resource]


def links_to(resource: Resource) -> list[tuple[Resource, Link]]:
    """Return the resources whose rows can link to a row of `resource`, each with its relation."""
    return [(owner, link) for owner in RESOURCES for link in owner.links if link.resource is resource]


def included_in(resource: Resource) -> dict[str, tuple[Resource, Parent]]:
    """Return the children that `?include=` can add to a row of `resource`, by name."""
    return {child.name: (child, parent) for child, parent in children_of(resource) if child.audience == "public"}


def found_model(resource: Resource) -> type[BaseModel]:
    """Return the model of the response to GET of one entity: the entity, and the children that `?include=` adds."""
    children = [child for child, _ in included_in(resource).values()]
    if not children:
        return resource.entity
    name = f"{resource.singular.title()}With{''.join(child.name.title() for child in children)}"
    members: dict[str, Any] = {}
    for child in children:
        description = f"Only if `include` names `{child.name}`: the first {MAX_INCLUDED:,}, in order of id"
        members[child.name] = (list[child.entity] | MISSING, Field(default=MISSING, description=description))  # type: ignore[name-defined]
    return create_model(name, __base__=resource.entity, **members)
