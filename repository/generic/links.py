"""Links between rows: finds the linked rows that bodies name, stores the links, and counts them.

Rules:
- A row shows its linked rows in a column (see `resources.resource.Link`), so that reading it needs no other table. The
  links and the shown values are written in the same transaction.
- All linked rows that a request adds, keeps or removes are locked until COMMIT: table by table in the order of their
  declaration, and within a table in the order of their ids. So their names and counts cannot change meanwhile. The rows
  that show them are locked first.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from pydantic import ValidationError

from core.errors import MAX_PROBLEMS, ContentTooLarge, InvalidInput
from core.identity import unique_key
from core.texts.shortened import shortened
from repository.engine.transaction import Transaction
from repository.generic import link_tables, relations, rows
from repository.generic.conflicts import Edited, Items, Refusal, lock_table
from repository.generic.link_tables import Found
from repository.generic.versions import Row
from resources.resource import Link, Resource

# All of these rows are read, locked and counted in one transaction.
MAX_LINKED_PER_REQUEST = 10_000
# Storing them takes about half a second. Generated rows are few in each transaction, and their links are not counted.
MAX_LINKS_PER_REQUEST = 50_000

# Adds rows of a resource that bodies name but that do not exist.
Add = Callable[[Resource, Sequence[Row]], Awaitable[None]]
Named = Mapping[int, Sequence[int | str]]


@dataclass(frozen=True, slots=True)
class Resolved:
    """Items whose link columns hold the values to show. `refused` tells, by position, why items cannot be stored."""

    items: Sequence[Row]
    refused: Mapping[int, Sequence[Refusal]]
    plans: Sequence[_Plan] = ()

    def relinked(self, position: int) -> list[str]:
        """Return the columns whose links the item changes."""
        return [plan.link.column for plan in self.plans if position in plan.ids]

    def linked(self, position: int, column: str) -> Sequence[int]:
        """Return the ids of the rows that a new row links to in this column."""
        return next((plan.ids.get(position, ()) for plan in self.plans if plan.link.column == column), ())


async def resolve(
    tx: Transaction,
    owner: Resource,
    items: Items,
    *,
    edits: Edited = (),
    add: Add | None = None,
    skips: bool = False,
    codes: Mapping[str, str] | None = None,
) -> Resolved:
    """Find and lock the linked rows that items name. If `add` is given, add those that do not exist.

    `edits` is empty if the items are new rows; otherwise, it holds the stored row that each item edits, or None. If
    several items edit the same column of a row, only the last one counts.

    An item with unknown names is refused. Nothing is added for a refused item nor, unless the caller `skips` refused
    items, for any other item. `codes` maps names to codes: with it, a row that is not found by its name is found by its
    code, and unknown names are left out instead of refused. Raises ContentTooLarge.
    """
    made = ((link, _named(link, items, edits)) for link in owner.links)
    plans = [_Plan(link, named, edits, codes or {}) for link, named in made if named]
    if codes is None:
        _require_few(owner, chain.from_iterable(plan.named.values() for plan in plans if plan.link.table is not None))
    refused: dict[int, list[Refusal]] = {}
    for plan in plans:
        await plan.find(tx)
        if codes is None:
            may_add = plan.link.adds and add is not None
            for position, found in (await rows.off_the_loop(len(items), plan.refusals, may_add)).items():
                refused.setdefault(position, []).extend(found)
    if not plans or (refused and not skips):
        return Resolved(items, refused)
    for plan in plans:
        if plan.link.adds and add is not None:
            await plan.add(tx, add, refused)
    return await rows.off_the_loop(len(items), _resolved, items, plans, refused)


def _require_few(owner: Resource, shown: Iterable[Sequence[Any]]) -> None:
    """Raise ContentTooLarge if rows of `owner` show too many rows together."""
    if sum(map(len, shown)) > MAX_LINKS_PER_REQUEST:
        names = ", ".join(link.column for link in owner.links if link.table is not None)
        raise ContentTooLarge(
            f"Expected {owner.name} with at most {MAX_LINKS_PER_REQUEST:,} {names} together: send fewer {owner.name}"
        )


def _resolved(items: Items, plans: Sequence[_Plan], refused: Mapping[int, Sequence[Refusal]]) -> Resolved:
    shown = list(items)
    for plan in plans:
        column = plan.link.column
        for position in plan.named:
            if position not in refused and (value := plan.resolve(position)) != shown[position][column]:
                shown[position] = {**shown[position], column: value}
    return Resolved(shown, refused, plans)


def raise_for(refused: Mapping[int, Sequence[Refusal]], *, bulk: bool) -> None:
    """Raise InvalidInput when any item is refused, with at most about MAX_PROBLEMS problems."""
    problems = []
    for position in sorted(refused):
        problems += [each.problem(position if bulk else None) for each in refused[position]]
        if len(problems) >= MAX_PROBLEMS:
            break
    if problems:
        raise InvalidInput(problems)


def _named(link: Link, items: Items, edits: Edited) -> Named:
    """Return what items name in the column of the link, by position; only where the links may change."""
    named: dict[int, Sequence[int | str]] = {}
    last: dict[int, int] = {}
    for position, item in enumerate(items):
        if link.column not in item:
            continue
        value = item[link.column]
        if edits:
            row = edits[position]
            if row is None:
                continue
            named.pop(last.get(row["id"], -1), None)
            if value == row[link.column]:  # unchanged names mean the rows that they meant before
                continue
            last[row["id"]] = position
        elif not value:
            continue
        named[position] = value if link.table is not None else [value] if value is not None else []
    return named


class _Plan:
    """How one link column of the items changes. `ids` holds, by position, the linked ids of items that change it."""

    def __init__(self, link: Link, named: Named, edits: Edited, codes: Mapping[str, str]) -> None:
        self.link = link
        self.named = named
        self.ids: dict[int, list[int]] = {}
        self.found = Found()
        self._rows = {position: edits[position] or {} for position in named} if edits else {}
        self._old: Mapping[int, Sequence[int]] = {}
        self._codes = codes
        self._resolved: dict[tuple[int | str, ...], tuple[list[int], Any]] = {}
        self._keys: dict[str, str] = {}

    async def find(self, tx: Transaction) -> None:
        """Find and lock the linked rows, new and old."""
        link = self.link
        given = set(chain.from_iterable(self.named.values()))
        if len(given) > MAX_LINKED_PER_REQUEST:
            name = link.resource.name
            raise ContentTooLarge(f"Expected a request that names at most {MAX_LINKED_PER_REQUEST:,} different {name}")
        self._keys = {name: unique_key(name.strip()) for name in given if isinstance(name, str)}
        ids = {value for value in given if isinstance(value, int)}
        codes_of = {name: unique_key(self._codes[name]) for name in self._keys if name in self._codes}
        keys = {*self._keys.values(), *codes_of.values()}
        showing = {row["id"]: row[link.column] for row in self._rows.values() if row[link.column]}
        if link.table is not None:
            self._old = await link_tables.linked_ids(tx, link, list(showing))
            ids.update(chain.from_iterable(self._old.values()))
            self.found = await link_tables.lock(tx, link, ids, keys)
        else:
            codes = {row_id: unique_key(code) for row_id, code in showing.items()}
            self.found = await link_tables.lock(tx, link, ids, keys | set(codes.values()))
            self._old = {row_id: self.found.named(code) for row_id, code in codes.items()}
        self._keys |= {name: code for name, code in codes_of.items() if not self.found.named(self._keys[name])}

    def _candidates(self, position: int) -> list[list[int]]:
        """Return, for each name of an item, the ids of the rows that it may mean.

        A name that the edited row already shows means the row that it shows, although others may have the same name.
        """
        row = self._rows.get(position)
        own: dict[str, list[int]] = {}
        if row is not None and self.link.table is not None:
            for name, id_ in zip(row[self.link.column], self._old.get(row["id"], ()), strict=False):
                own.setdefault(unique_key(name), []).append(id_)
        candidates = []
        for value in self.named[position]:
            if isinstance(value, int):
                candidates.append([value] if value in self.found.rows else [])
            elif shown := own.get(self._keys[value]):
                candidates.append([shown.pop(0) if len(shown) > 1 else shown[0]])
            else:
                candidates.append(self.found.named(self._keys[value]))
        return candidates

    def refusals(self, may_add: bool) -> dict[int, list[Refusal]]:
        """Return why items cannot be stored, by position."""
        refused: dict[int, list[Refusal]] = {}
        accepted: set[tuple[int | str, ...]] = set()
        for position, values in self.named.items():
            names = tuple(values)
            if names in accepted:
                continue
            for place, (value, ids) in enumerate(zip(values, self._candidates(position), strict=True)):
                if len(ids) == 1:
                    continue
                message: str | None
                if len(ids) > 1:
                    message, kind = self._ambiguous(value, ids), "ambiguous"
                elif may_add and isinstance(value, str):
                    message, kind = self._unfit(value), "invalid_name"
                else:
                    message, kind = self._unknown(value), f"unknown_{self.link.resource.singular}"
                if message:
                    at = place if self.link.table is not None else None
                    refused.setdefault(position, []).append(Refusal(self.link.column, message, kind, at))
            if position not in refused and position not in self._rows:
                accepted.add(names)
        return refused

    def _ambiguous(self, value: int | str, ids: Sequence[int]) -> str:
        some = " or ".join(map(str, ids))
        return f'Several {self.link.resource.name} are named "{shortened(str(value))}"; expected an id, such as {some}'

    def _unknown(self, value: int | str) -> str:
        resource = self.link.resource
        shown = f'"{shortened(value)}"' if isinstance(value, str) and self.link.table is not None else value
        only = f"; only {resource.writers} may add new {resource.name}" if self.link.adds else ""
        return f"There is no {resource.singular} {shown}{only if isinstance(value, str) else ''}"

    def _unfit(self, name: str) -> str | None:
        """Return why no row can be added with this name, or None."""
        try:
            self._body(name)
        except ValidationError as error:
            message = str(error.errors()[0].get("ctx", {}).get("error", error.errors()[0]["msg"]))
            return f"There is no {self.link.resource.singular} with this name, and it cannot be added: {message}"
        return None

    def _body(self, name: str) -> dict[str, Any]:
        return self.link.resource.body.model_validate({self.link.shown: name}).model_dump()

    async def add(self, tx: Transaction, add: Add, refused: Mapping[int, Any]) -> None:
        """Add rows for the unknown names of items that are not refused."""
        accepted = (values for position, values in self.named.items() if position not in refused)
        named = {name for name in chain.from_iterable(accepted) if isinstance(name, str)}
        missing = {key: name for name in sorted(named) if not self.found.named(key := self._keys[name])}
        if not missing:
            return
        # Two transactions must not both add the same name, so look again under a lock on the table.
        await lock_table(tx, self.link.resource.table)
        self.found.merge(await link_tables.lock(tx, self.link, (), missing))
        names = [name for key, name in missing.items() if not self.found.named(key)]
        if names:
            bodies = await rows.off_the_loop(len(names), lambda: [self._body(name) for name in names])
            await add(self.link.resource, bodies)
            self.found.merge(await link_tables.lock(tx, self.link, (), missing))

    def resolve(self, position: int) -> Any:
        """Return the value that the column shows, and remember the ids if they change."""
        # Many new rows have the same names, which mean the same rows. The meaning of the names of an edited row depends
        # on the names that it shows already.
        names = tuple(self.named[position]) if position not in self._rows else (position,)
        if (known := self._resolved.get(names)) is None:
            known = self._resolved[names] = self._resolve(position)
        ids, value = known
        if ids != list(self._former(position)):
            self.ids[position] = ids
        return value

    def _resolve(self, position: int) -> tuple[list[int], Any]:
        ids = list(dict.fromkeys(found[0] for found in self._candidates(position) if len(found) == 1))
        shown = [self.found.rows[id_][self.link.shown] for id_ in ids]
        if self.link.table is not None:
            return ids, shown
        return ids, shown[0] if shown else None

    def _former(self, position: int) -> Sequence[int]:
        row = self._rows.get(position)
        return self._old.get(row["id"], ()) if row is not None else ()

    async def store(self, tx: Transaction, owner_ids: Mapping[int, int], actor_id: int | None) -> None:
        """Write the links of rows, whose ids are given by the positions of the items, and update the counts."""
        changed = {position: ids for position, ids in self.ids.items() if position in owner_ids}
        if self.link.table is not None:
            await link_tables.delete(tx, self.link, [owner_ids[each] for each in changed if self._former(each)])
            made = ((owner_ids[position], ids) for position, ids in changed.items())
            await link_tables.insert(tx, self.link, made)
        changes = Counter(chain.from_iterable(changed.values()))
        changes.subtract(chain.from_iterable(map(self._former, changed)))
        await relations.add_to_counts(tx, self.link.resource, self.link.count, self.found.rows, changes, actor_id)


async def store(tx: Transaction, resolved: Resolved, owner_ids: Mapping[int, int], actor_id: int | None) -> None:
    """Write the links of stored rows, whose ids are given by the positions of their items, and update the counts."""
    for plan in resolved.plans:
        await plan.store(tx, owner_ids, actor_id)


async def remove(tx: Transaction, owner: Resource, gone: Iterable[Row], actor_id: int | None) -> None:
    """Delete the links of rows that are about to be deleted, and update the counts, with their events.

    Raises ContentTooLarge.
    """
    gone = list(gone)
    _require_few(owner, (row[link.column] for link in owner.links if link.table is not None for row in gone))
    for link in owner.links:
        showing = {row["id"]: row[link.column] for row in gone if row[link.column]}
        if not showing:
            continue
        if link.table is not None:
            old = await link_tables.linked_ids(tx, link, list(showing))
            changes = Counter(chain.from_iterable(old.values()))
            found = await link_tables.lock(tx, link, changes, ())
            await link_tables.delete(tx, link, list(old))
        else:
            codes = Counter(map(unique_key, showing.values()))
            found = await link_tables.lock(tx, link, (), codes)
            changes = Counter({id_: number for code, number in codes.items() for id_ in found.named(code)})
        less = Counter({id_: -number for id_, number in changes.items()})
        await relations.add_to_counts(tx, link.resource, link.count, found.rows, less, actor_id)
