"""Imports point down, edges do not import one another, and importing a module opens no files or connections."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from resources.registry import RESOURCES
from tests.project.architecture import LAYERS, OWNERS, PROJECT
from tests.support.documents import ROOT

DEPTH = {name: depth for depth, names in enumerate(LAYERS) for name in names}
MAX_LINES = 400
MAX_MODULES_OF_A_FOLDER = 14


@dataclass(frozen=True)
class Import:
    path: str  # the importing file, relative to the root
    line: int
    module: str  # the full dotted name of what is imported
    is_nested: bool  # whether the import is in a function

    @property
    def package(self) -> str:
        """The first part of the imported name."""
        return self.module.partition(".")[0]

    def __str__(self) -> str:
        return f"{self.path}:{self.line} imports {self.package}"


def product_files(root: Path) -> Iterator[Path]:
    """Yield the files of all modules and packages that are in the table of layers."""
    for name in DEPTH:
        if (root / f"{name}.py").exists():
            yield root / f"{name}.py"
        yield from sorted((root / name).rglob("*.py"))


def imports_of(root: Path) -> Iterator[Import]:
    for path in product_files(root):
        tree = ast.parse(path.read_text())
        nested = {
            id(inner)
            for outer in ast.walk(tree)
            if isinstance(outer, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            for inner in ast.walk(outer)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.module is not None, f"{path}: a relative import"
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            else:
                continue
            for name in names:
                yield Import(path.relative_to(root).as_posix(), node.lineno, name, id(node) in nested)


def owner_of(path: str) -> str:
    return path.partition("/")[0].removesuffix(".py")


def violations(root: Path) -> list[str]:
    found = []
    for each in imports_of(root):
        importer = owner_of(each.path)
        if each.is_nested:
            found.append(f"{each} in a function")
        if each.package in DEPTH and each.package != importer and DEPTH[each.package] <= DEPTH[importer]:
            found.append(f"{each}, which is not in a lower layer")
        owners = OWNERS.get(each.package, [each.path])
        if not any(each.path == owner or (owner.endswith("/") and each.path.startswith(owner)) for owner in owners):
            found.append(f"{each}, which only {', '.join(owners)} may import")
    return found


def test_imports_point_down() -> None:
    assert violations(ROOT) == []


def test_the_root_holds_the_fixed_names_and_the_layers() -> None:
    """A new module belongs in a folder, and a new folder needs an entry in the table of layers."""
    apart = {"tests", "bench", "clients", "docs"}
    assert {path.stem for path in ROOT.glob("*.py")} == {"main", "models", "schemas", "cli"}
    packages = {path.parent.name for path in ROOT.glob("[!.]*/__init__.py")}
    assert packages | {"main", "models", "schemas", "migrations"} == DEPTH.keys() | (packages & apart)
    statements = ast.parse((ROOT / "cli.py").read_text()).body
    assert len(statements) == 2, "expected one import and one guarded call, because workers import cli.py again"


def modules_by_name(root: Path) -> dict[str, Path]:
    return {name_of(path, root): path for path in product_files(root)}


def name_of(path: Path, root: Path) -> str:
    return ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")


def circles(root: Path) -> list[list[str]]:
    """Return the import cycles: groups of modules that import one another, also indirectly or only for types."""
    known = modules_by_name(root)
    graph: dict[str, set[str]] = {name: set() for name in known}
    for each in imports_of(root):
        importer = name_of(root / each.path, root)
        # In `from package import name`, the name is a module or a definition of the package.
        imported = each.module if each.module in known else each.module.rpartition(".")[0]
        if imported in known and imported != importer:
            graph[importer].add(imported)
    reached: dict[str, set[str]] = {}
    for start in graph:
        seen: set[str] = set()
        waiting = [start]
        while waiting:
            for imported in graph[waiting.pop()] - seen:
                seen.add(imported)
                waiting.append(imported)
        reached[start] = seen
    groups = {
        tuple(sorted(other for other in reached[name] if name in reached[other]))
        for name in graph
        if name in reached[name]
    }
    return sorted(map(list, groups))


def test_every_declared_resource_is_in_the_registry() -> None:
    """A resource whose file or constant is not named after its table is silently not registered."""
    declared = {
        (path.stem, target.id)
        for path in (ROOT / "resources").glob("*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call)
        for target in node.targets
        if isinstance(target, ast.Name) and getattr(node.value.func, "id", "") == "Resource"
    }
    assert declared == {(resource.name, resource.name.upper()) for resource in RESOURCES}


def test_no_modules_import_one_another() -> None:
    assert circles(ROOT) == []


def test_no_module_is_long_and_no_folder_is_full() -> None:
    files = list(product_files(ROOT))
    assert {path: lines for path in files if (lines := path.read_text().count("\n")) > MAX_LINES} == {}
    counts = Counter(path.parent for path in files if path.name != "__init__.py" and path.parent.name != "versions")
    assert {folder: count for folder, count in counts.items() if count > MAX_MODULES_OF_A_FOLDER} == {}


def test_tests_share_only_what_is_no_test_and_bench_shares_nothing_with_them() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}: {name}"
        for folder in ("tests", "bench")
        for path in sorted((ROOT / folder).rglob("*.py"))
        for name in re.findall(r"^(?:from|import) (tests[\w.]*)", path.read_text(), re.MULTILINE)
        if folder == "bench" or ".test_" in name
    ]
    assert wrong == []


def test_every_owner_uses_what_it_owns() -> None:
    used = {(each.package, each.path) for each in imports_of(ROOT)}
    for package in OWNERS.keys() - {"aiosqlite", "asyncpg"}:  # these are drivers, selected by the database URL
        for owner in OWNERS[package]:
            assert any(name == package and path.startswith(owner) for name, path in used), f"{owner}: {package}"


def made_up(root: Path, files: Mapping[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_each_kind_of_violation_is_found(tmp_path: Path) -> None:
    root = made_up(
        tmp_path,
        {
            "models.py": "from core import errors\nimport repository.rows\n",
            "core/errors.py": "",
            "repository/rows.py": "import models\nfrom sqlalchemy.ext.asyncio import AsyncConnection\n",
            "routes/movies.py": "from repository import rows\nfrom realtime.bus import Bus\nimport routes.table\n",
            "routes/table.py": "def late():\n    from core import errors\n",
            "realtime/bus.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import main\n",
            "jobs/runner.py": "import broadcaster\n",
        },
    )
    assert sorted(violations(root)) == [
        "jobs/runner.py:1 imports broadcaster, which only realtime/feed/ may import",
        "models.py:2 imports repository, which is not in a lower layer",
        "realtime/bus.py:3 imports main, which is not in a lower layer",
        "routes/movies.py:2 imports realtime, which is not in a lower layer",
        "routes/table.py:2 imports core in a function",
    ]


def test_a_circle_is_found(tmp_path: Path) -> None:
    root = made_up(
        tmp_path,
        {
            "core/first.py": "from core.second import name\n",
            "core/second.py": "from core import third\n",
            "core/third.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from core.first import name\n",
            "core/fourth.py": "from core import first\n",
        },
    )
    assert circles(root) == [["core.first", "core.second", "core.third"]]


# --- importing opens nothing

IMPORT_ALL = """
import importlib, os, sys, threading

sys.dont_write_bytecode = True
root = sys.argv[1]
sys.path.insert(0, root)
opened = []

def watch(event, arguments):
    if event.startswith(("socket.", "sqlite3.connect", "subprocess.", "os.mkdir", "os.remove", "os.rename", "os.link")):
        # Creating a socket object connects to nothing; some libraries create one to find out whether IPv6 is available.
        if event not in ("socket.__new__", "socket.gethostname", "sqlite3.connect/handle"):
            opened.append(f"{event} {arguments}")
    elif event == "open":
        path, mode, flags = arguments
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) or str(path).endswith((".env", ".db", "secret.key")):
            opened.append(f"open {path}")

sys.addaudithook(watch)
for name in sys.argv[2:]:
    importlib.import_module(name)
assert threading.active_count() == 1, threading.enumerate()
print(*opened, sep="\\n", end="")
"""


def opened_by_importing(root: Path, modules: Sequence[str], folder: Path) -> list[str]:
    """Import the modules of `root`, with `folder` as the working directory, and return what the imports opened."""
    folder.mkdir()
    (folder / ".env").write_text("PORT=not a number\n")
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL, str(root), *modules],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert [path.name for path in folder.iterdir()] == [".env"]
    return done.stdout.splitlines()


def modules_of(root: Path) -> list[str]:
    names = []
    for path in product_files(root):
        parts = path.relative_to(root).with_suffix("").parts
        if parts[0] != "migrations":  # the migrations are scripts that Alembic runs
            names.append(".".join(parts).removesuffix(".__init__"))
    return names


def test_importing_opens_nothing_and_reads_no_settings(tmp_path: Path) -> None:
    modules = modules_of(ROOT)
    assert {"main", "commands.cli", "realtime.feed.bus", "repository.engine.database"} <= set(modules)
    assert opened_by_importing(ROOT, modules, tmp_path / "empty") == []


def test_a_module_that_opens_something_is_found(tmp_path: Path) -> None:
    root = made_up(
        tmp_path / "tree",
        {
            "models.py": "import sqlite3\nconnection = sqlite3.connect(':memory:')\n",
            "core/settings.py": "text = open('.env').read()\n",
        },
    )
    found = opened_by_importing(root, modules_of(root), tmp_path / "empty")
    assert found == ["sqlite3.connect (':memory:',)", "open .env"]


def test_the_wheel_holds_every_module() -> None:
    included = set(PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["only-include"])
    assert included == {f"{name}.py" if (ROOT / f"{name}.py").exists() else name for name in DEPTH}
