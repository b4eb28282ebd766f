"""What a resource is: a kind of entity that clients create, read, change, delete and watch, declared once.

A declaration names the table, the body that clients write, and what the table cannot express. Models, filter fields,
operations, snapshots, frames and the OpenAPI and AsyncAPI documents are derived from it (`resources.derived`,
`repository/generic`, `routes/generic`). The role of a column follows from its name and from whether it is in the body:

- The service maintains `id`, `version`, `created_at` and `updated_at`; `user_id` is the user who created the row.
- Columns of the body are written by clients. In the table they come after `id` and before the others: `user_id`,
  derived columns, `version`, keys, `created_at` and `updated_at`.
- A column with `info={"key_of": name}` holds the form in which values of the column `name` are compared, ignoring
  case. If the column is unique, these values must be unique. Clients never see it.
- All other columns are derived from other tables. They start at zero, or at null where they are nullable.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from pydantic import BaseModel
from sqlalchemy import Table

from core.errors import Forbidden
from core.filters import Field, FieldType
from core.identity import PUBLIC_AUDIENCE, Group, Identity, audience_of_user
from resources import derived
from schemas import Body, Skipped

_KEPT = frozenset({"id", "user_id", "version", "created_at", "updated_at"})
_WRITERS = {"owner": "", "staff": "moderators and admins", "admins": "admins"}


@dataclass(frozen=True, eq=False)
class Parent:
    """A relation to at most one row of another resource, whose id is in `column`.

    The parent's column `count` holds the number of rows that refer to it; None if there is no such column, or if other
    code maintains it. `?include=` adds these rows to the parent, unless only their owners see them. A row outlives its
    parent, unless the parent `takes_children`: then its rows are deleted with it.
    """

    column: str
    resource: Resource
    count: str | None = None
    takes_children: bool = False


@dataclass(frozen=True, eq=False)
class Link:
    """A relation to rows of another resource, which `column` shows by the values of their column `shown`.

    `column` holds a list, and each row of `table` links two rows; or, without `table`, `column` holds one unique code
    or null. Bodies name linked rows by id (only with `table`), by `shown`, or by code if the resource has codes. With
    `adds`, users who may add rows of the resource may name new rows, which are added. The linked row's column `count`
    holds the number of rows that link to it.
    """

    column: str
    resource: Resource
    count: str
    table: Table | None = None
    shown: str = "name"
    adds: bool = False

    @cached_property
    def ids(self) -> tuple[str, str]:
        """The columns of `table` with the ids of the linked row and of the row that shows it."""
        assert self.table is not None, "a link by code has no table"
        linked, owner = self.table.primary_key.columns
        return str(linked.name), str(owner.name)

    @cached_property
    def keys(self) -> tuple[str, ...]:
        """The columns with the keys of the names that bodies may use, the most specific last."""
        sources = dict.fromkeys((self.shown, self.resource.code))
        return tuple(key for source in sources for key, of in self.resource.keys.items() if of == source)


@dataclass(frozen=True, eq=False)
class Resource:
    """A declaration. `label` is the column that `/names` lists, or empty if there is no such list; `searched` are the
    columns whose words `?q=` finds, or empty if the rows have no index of words.

    `changed_by`: with `owner`, every user may create rows, and their owners and staff (moderators and admins) may
    change them; with `staff` or `admins`, only staff or only admins may create and change rows. `filter_names` renames
    columns in filters. With `generated`, `POST /…/generate/{number}` creates rows, each with rows of the resources
    `generated_with` if the client likes. `code` is a column with unique codes
    of two letters: `GET /…/{id}` finds a row by its code, too. With `has_own_writes`, rows are written by operations
    that are declared elsewhere, because writing them differs from writing other resources; with `has_own_routes`, all
    operations are. With the audience `self`, only the owner of a row sees the row and its events. With `transferred`,
    lists can be exported to files and imported from files; with `has_history`, clients can read the changes of a row
    that the event log holds.
    """

    table: Table
    body: type[Body]
    singular: str
    label: str
    searched: tuple[str, ...]
    example_change: Mapping[str, Any]
    changed_by: Literal["owner", "staff", "admins"] = "owner"
    audience: Literal["public", "self"] = "public"
    parents: tuple[Parent, ...] = ()
    links: tuple[Link, ...] = ()
    filter_names: Mapping[str, str] = field(default_factory=dict)
    created_word: str = "added"
    generated: bool = False
    generated_with: tuple[str, ...] = ()
    code: str | None = None
    has_own_writes: bool = False
    has_own_routes: bool = False
    transferred: bool = False
    has_history: bool = False

    def __post_init__(self) -> None:
        expected = ("id", *self.written, "created_at", "updated_at")
        assert self.columns == expected, f"{self.name}: expected the columns {expected}, got {self.columns}"
        assert self.has_owner or self.writers, f"{self.name}: rows that owners may change need a user_id"
        assert self.searched or self.has_own_routes, f"{self.name}: the lists of every resource can be searched"
        # The generic writes emit public events.
        is_private = self.audience == "self"
        assert not is_private or self.has_own_routes, f"{self.name}: rows that only owners see need routes of their own"

    # --- derived

    @cached_property
    def name(self) -> str:
        """The name of the topic, of the path and of the table."""
        return str(self.table.name)

    @cached_property
    def a_singular(self) -> str:
        return f"{'an' if self.singular[0] in 'aeiou' else 'a'} {self.singular}"

    @cached_property
    def columns(self) -> tuple[str, ...]:
        """The columns that clients see, in the order of the table."""
        return derived.visible_columns(self.table)

    @cached_property
    def keys(self) -> Mapping[str, str]:
        """The columns that hold keys, each with the column that its key is made from."""
        return derived.keys_of(self.table)

    @cached_property
    def key_of_code(self) -> str:
        """The column that holds the unique keys of the codes."""
        return next(key for key, source in self.keys.items() if source == self.code)

    @cached_property
    def defaults(self) -> Mapping[str, Any]:
        """The default values of the body's columns, in the order of the table; None where a value is required."""
        fields = self.body.model_fields
        return {
            name: None if fields[name].is_required() else fields[name].get_default()
            for name in self.columns
            if name in fields
        }

    @cached_property
    def initial(self) -> Mapping[str, Any]:
        """The initial values of derived columns."""
        others = (name for name in self.columns if name not in self.defaults and name not in _KEPT)
        return {name: None if self.table.c[name].nullable else 0 for name in others}

    @cached_property
    def written(self) -> tuple[str, ...]:
        """The visible columns of a new row between `id` and the times, in the order of the table."""
        return (*self.defaults, *(("user_id",) if self.has_owner else ()), *self.initial, "version")

    @cached_property
    def fields(self) -> Mapping[str, Field]:
        """The fields that lists and subscriptions can be filtered by, under their names in filters."""
        return derived.filter_fields(self.table, self.filter_names, self.body)

    @cached_property
    def search(self) -> Field:
        """The field of the condition that a row holds the words of a query, if the rows have an index of words."""
        return Field("q", self.searched[0], FieldType.TEXT, searched=self.searched)

    @property
    def has_owner(self) -> bool:
        return "user_id" in self.columns

    @property
    def writers(self) -> str:
        """The groups whose users alone may create and change rows, in words; empty if every user may create rows."""
        return _WRITERS[self.changed_by]

    def has_all_rights(self, identity: Identity) -> bool:
        """Return whether the identity may change every row."""
        return identity.group is Group.ADMIN if self.changed_by == "admins" else identity.is_staff

    def require_may_create(self, identity: Identity) -> None:
        """Raise Forbidden unless the identity may create rows."""
        if self.writers and not self.has_all_rights(identity):
            raise Forbidden(f"Only {self.writers} may add {self.name}")

    def require_may_change(self, identity: Identity, rows: Iterable[Mapping[str, Any]]) -> None:
        """Raise Forbidden, naming the rows, unless the identity may change all of them.

        If only some groups may change the resource, Forbidden is raised for other users even if `rows` is empty.
        """
        if self.has_all_rights(identity):
            return
        rows = list(rows)
        if self.writers and not rows:
            raise Forbidden(f"Only {self.writers} may change {self.name}")
        foreign = [row["id"] for row in rows if not self.is_own(identity, row)]
        if foreign:
            owners = "the owner" if len(foreign) == 1 else "the owners"
            writers = self.writers or f"{owners}, moderators and admins"
            named = self.singular if len(foreign) == 1 else self.name
            shown = ", ".join(map(str, foreign[:10])) + (", …" if len(foreign) > 10 else "")
            raise Forbidden(f"Only {writers} may change {named} {shown}")

    def audience_of(self, row: Mapping[str, Any]) -> str:
        """Return the audience of the events about a row."""
        return audience_of_user(row["user_id"]) if self.audience == "self" else PUBLIC_AUDIENCE

    def is_own(self, identity: Identity, row: Mapping[str, Any]) -> bool:
        """Return whether the identity may change the row whatever its group."""
        return self.changed_by == "owner" and row["user_id"] == identity.user_id

    # --- models

    @cached_property
    def replacement(self) -> type[BaseModel]:
        """The body of PUT."""
        return derived.replacement_model(self.table, self.body, self.singular)

    @cached_property
    def patch(self) -> type[BaseModel]:
        return derived.patch_model(self.table, self.body, self.singular, self.example_change)

    @cached_property
    def bulk_patch(self) -> type[BaseModel]:
        return derived.bulk_patch_model(self.patch, self.singular, self.example_change)

    @cached_property
    def entity(self) -> type[BaseModel]:
        return derived.entity_model(self.table, self.singular, self.created_word, self.body)

    @cached_property
    def change(self) -> type[BaseModel]:
        return derived.change_model(self.entity, self.singular)

    @cached_property
    def added(self) -> type[BaseModel]:
        rows: Any = list[self.entity]  # type: ignore[name-defined]
        return derived.bulk_answer(f"{self.name.title()}Added", added=rows, skipped=list[Skipped])

    @cached_property
    def updated(self) -> type[BaseModel]:
        rows: Any = list[self.entity]  # type: ignore[name-defined]
        return derived.bulk_answer(f"{self.name.title()}Updated", updated=rows, not_found=list[int])

    @cached_property
    def label_model(self) -> type[BaseModel]:
        return derived.label_model(self.singular, self.label)
