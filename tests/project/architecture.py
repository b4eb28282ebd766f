"""Generate the parts of docs/architecture.md that repeat the code: `python -m tests.project.architecture --write`.

The tree comes from the table of layers in pyproject.toml and the first sentence of each folder's docstring; the owners
of outside packages come from pyproject.toml. The table of bounds keeps its sentences (the columns "what" and "at the
bound"); its numbers, its order and the modules of the constants come from the code. Without `--write`, the command only
reports differences.
"""

from __future__ import annotations

import ast
import importlib
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

from tests.support.documents import ROOT, bare, rows_of

DOCUMENT = ROOT / "docs" / "architecture.md"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
LAYERS: list[list[str]] = [line.split() for line in PROJECT["tool"]["marquee"]["layers"]]
# For each outside package, the only files or folders (with a trailing slash) that may import it.
OWNERS: dict[str, list[str]] = PROJECT["tool"]["marquee"]["owners"]
BESIDE_THE_LAYERS = ("clients", "bench", "tests")

BOUND_NAME = re.compile(r"^MAX_\w+$|^\w+_(BYTES|EVENTS|MESSAGES|ITEMS)$")
# Constants that are named like bounds but are not: initial values, watermarks, metrics, and sizes in algorithms.
NOT_BOUNDS = {
    "realtime.feed.redis_backend.MIN_BACKOFF_SECONDS",
    "realtime.wire.writer.LOW_WATER_BYTES",
    "realtime.wire.writer.HIGH_WATER_BYTES",
    "core.metrics.FEED_EVENTS",
    "core.metrics.HUB_BYTES",
    "core.metrics.SQLITE_LOG_BYTES",
    "core.metrics.HTTP_UNSENT_BYTES",
    "core.metrics.WEBSOCKET_UNSENT_BYTES",
    "core.setting_values.HASH_BYTES",
    "core.setting_values.MIN_SECRET_KEY_BYTES",
}
COLUMNS = ("what", "where", "bound", "at the bound")


# --- the tree


def purpose_of(path: Path) -> str:
    """Return the first sentence of the docstring of a module or of a folder's `__init__.py`, without its full stop."""
    text = ast.get_docstring(ast.parse((path / "__init__.py" if path.is_dir() else path).read_text())) or ""
    return re.split(r"[.?](?:\s|$)", text.split("\n\n")[0].replace("\n", " "))[0]


def folders_in(folder: Path) -> list[Path]:
    """Return the packages in a folder, in the order in which its docstring names them; the others follow by name."""
    text = ast.get_docstring(ast.parse((folder / "__init__.py").read_text())) or ""
    found = [path.parent for path in folder.glob("*/__init__.py")]
    return sorted(found, key=lambda path: (text.find(path.name) % (len(text) + 1), path.name))


def tree() -> str:
    rows: list[tuple[str, str]] = []
    for name in [name for layer in LAYERS for name in layer] + list(BESIDE_THE_LAYERS):
        module, folder = ROOT / f"{name}.py", ROOT / name
        if module.exists():
            rows.append((module.name, purpose_of(module)))
        elif (folder / "__init__.py").exists():
            rows.append((f"{name}/", purpose_of(folder)))
            rows += [(f"  {each.name}/", purpose_of(each)) for each in folders_in(folder)]
        else:
            rows.append((f"{name}/", purpose_of(folder / "env.py")))
    return "".join(f"{name:<17}{purpose}".rstrip() + "\n" for name, purpose in rows)


def layers() -> str:
    return " > ".join(" | ".join(layer) for layer in LAYERS) + "\n"


def owners() -> str:
    rows = (f"| `{package}` | {', '.join(f'`{owner}`' for owner in places)} |\n" for package, places in OWNERS.items())
    return "| package | imported only in |\n|---|---|\n" + "".join(rows)


# --- bounds


def constants() -> Iterator[str]:
    """Yield the constants of the product by layer, then by module name, then in source order."""
    for name in (name for layer in LAYERS for name in layer):
        for path in [ROOT / f"{name}.py"] if (ROOT / f"{name}.py").exists() else sorted((ROOT / name).rglob("*.py")):
            module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            for node in ast.parse(path.read_text()).body:
                if isinstance(node, ast.Assign | ast.AnnAssign):
                    target = node.targets[0] if isinstance(node, ast.Assign) else node.target
                    if isinstance(target, ast.Name) and target.id.isupper():
                        yield f"{module}.{target.id}"


def shown(name: str, value: float) -> str:
    """Return a number as the table shows it, with the unit that the constant's name implies."""
    if name.endswith("_BYTES"):
        for unit, size in (("MiB", 1024 * 1024), ("KiB", 1024)):
            if value and value % size == 0 and value / size < 10_000:
                return f"{value // size:,} {unit}"
    unit = next((unit for end, unit in (("_SECONDS", " s"), ("_HOURS", " h")) if name.endswith(end)), "")
    return f"{value:,}{unit}" if isinstance(value, int) else f"{value:g}{unit}"


def bounds(text: str) -> tuple[str, list[str]]:
    """Return the table of bounds generated from the code, and the problems that must be fixed by hand."""
    known = list(constants())
    rows: dict[str, tuple[str, str]] = {}
    problems = []
    for what, where, _, at_the_bound in rows_of(text, *COLUMNS):
        name = bare(where)
        if name not in known:
            # The constant has moved if exactly one other constant has the same name and no row yet.
            moved = [each for each in known if each.rpartition(".")[2] == name.rpartition(".")[2] and each not in rows]
            if len(moved) != 1:
                problems.append(f"{name} is in the table, but not in the code")
                continue
            name = moved[0]
        if name in rows:
            problems.append(f"{name} is in the table twice")
        rows[name] = (what, at_the_bound)
    for name in known:
        wants_row = BOUND_NAME.match(name.rpartition(".")[2]) and name not in NOT_BOUNDS
        if wants_row and name not in rows:
            problems.append(f"{name} is not in the table: add a row with what it bounds and what happens at the bound")
    table = f"| {' | '.join(COLUMNS)} |\n|---|---|---|---|\n"
    for name in (name for name in known if name in rows):
        module, _, constant = name.rpartition(".")
        what, at_the_bound = rows[name]
        number = shown(constant, getattr(importlib.import_module(module), constant))
        table += f"| {what} | `{name}` | {number} | {at_the_bound} |\n"
    return table, problems


# --- the document


def replaced(text: str, begin: str, end: str, part: str) -> str:
    """Return the text with everything between the first `begin` and the next `end` replaced by `part`."""
    before, found, rest = text.partition(begin)
    assert found, f"docs/architecture.md has no {begin!r}"
    _, found, after = rest.partition(end)
    assert found, f"docs/architecture.md has no {end!r} after {begin!r}"
    return before + begin + part + end + after


def regenerated(text: str) -> tuple[str, list[str]]:
    table, problems = bounds(text)
    text = replaced(text, "## The tree\n\n```\n", "```\n", tree())
    text = replaced(text, "Imports point down only:\n\n```\n", "```\n", layers())
    text = replaced(text, "Outside packages may be imported only by their owners:\n\n", "\n\n", owners()[:-1])
    return replaced(text, "frame and retry is bounded.\n\n", "\n\n", table[:-1]), problems


def main() -> None:
    before = DOCUMENT.read_text()
    after, problems = regenerated(before)
    if "--write" in sys.argv[1:]:
        if not problems:  # otherwise, a row that no longer matches the code would be lost, with its text
            DOCUMENT.write_text(after)
    elif after != before:
        problems.append("docs/architecture.md does not match the code: run `make tables`")
    sys.exit("\n".join(problems) or None)


if __name__ == "__main__":
    main()
