"""Read the project's documents and code as text, for the tests that compare them."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent

DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


def text_of(name: str) -> str:
    return (ROOT / name).read_text()


def rows_of(text: str, *first_columns: str) -> list[list[str]]:
    """Return the rows of all tables whose header begins with these columns; each row is a list of cells."""
    found: list[list[str]] = []
    inside = False
    for line in text.splitlines():
        if not line.startswith("|"):
            inside = False
            continue
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if tuple(cells[: len(first_columns)]) == first_columns:
            inside = True
        elif inside and not set(line) <= set("|- "):
            found.append(cells)
    assert found, f"no table with the columns {first_columns}"
    return found


def bare(cell: str) -> str:
    return cell.strip("`")


def trees(*folders: str) -> Iterator[ast.Module]:
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield ast.parse(path.read_text())


def strings_in(node: ast.AST) -> Iterator[str]:
    for each in ast.walk(node):
        if isinstance(each, ast.Constant) and isinstance(each.value, str):
            yield each.value
