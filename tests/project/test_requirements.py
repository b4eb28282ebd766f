"""Pins are exact, within the declared ranges, all needed, and without URLs; package and code state the same version."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from core.version import VERSION

ROOT = Path(__file__).resolve().parent.parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PIN = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]*==[A-Za-z0-9.!+]+$")
# A pin that only another Python version needs also counts as needed.
PYTHONS = ("3.11", "3.12", "3.13")
INCLUDED = "-r requirements.txt"


def lines_of(name: str) -> list[str]:
    lines = [line.strip() for line in (ROOT / name).read_text().splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def pins_of(name: str) -> dict[str, str]:
    pins = [Requirement(line) for line in lines_of(name) if line != INCLUDED]
    return {canonicalize_name(pin.name): str(pin.specifier).removeprefix("==") for pin in pins}


def ranges(*extras: str) -> list[Requirement]:
    optional = PROJECT["optional-dependencies"]
    return [Requirement(line) for line in [*PROJECT["dependencies"], *(r for extra in extras for r in optional[extra])]]


def applies(requirement: Requirement, extra: str, python: str) -> bool:
    if requirement.marker is None:
        return True
    full = f"{python}.0" if not sys.version.startswith(python) else sys.version.split()[0]
    return requirement.marker.evaluate({"extra": extra, "python_version": python, "python_full_version": full})


def needed_by(roots: Iterable[Requirement], pythons: Iterable[str]) -> set[str]:
    """Return the names of the roots and of everything that they need, according to the installed packages."""
    found: set[str] = set()
    seen: set[tuple[str, str]] = set()
    waiting = [(canonicalize_name(root.name), extra) for root in roots for extra in ("", *root.extras)]
    while waiting:
        name, extra = waiting.pop()
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        found.add(name)
        try:
            lines = requires(name) or []
        except PackageNotFoundError:
            continue  # not installed here: only another Python version needs it
        for requirement in map(Requirement, lines):
            if any(applies(requirement, extra, python) for python in pythons):
                waiting.extend((canonicalize_name(requirement.name), each) for each in ("", *requirement.extras))
    return found


@pytest.mark.parametrize("name", ["requirements.txt", "requirements-dev.txt"])
def test_everything_is_pinned_exactly_and_no_address_is_given(name: str) -> None:
    for line in lines_of(name):
        assert PIN.match(line) or line == INCLUDED, line
    assert "://" not in (ROOT / name).read_text()


def test_no_package_is_pinned_twice() -> None:
    names = [canonicalize_name(line.partition("==")[0]) for line in lines_of("requirements.txt")]
    names += [canonicalize_name(line.partition("==")[0]) for line in lines_of("requirements-dev.txt")]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(("extras", "files"), [((), ("requirements.txt",)), (("dev",), ("requirements-dev.txt",))])
def test_every_range_holds_its_pin(extras: tuple[str, ...], files: tuple[str, ...]) -> None:
    pins = {name: version for file in ("requirements.txt", *files) for name, version in pins_of(file).items()}
    for requirement in ranges(*extras):
        version = pins.get(canonicalize_name(requirement.name))
        assert version is not None, f"{requirement.name} has no pin in {files}"
        assert requirement.specifier.contains(version), f"expected a version within {requirement}, got {version}"


def test_what_runs_needs_every_pin_and_nothing_else() -> None:
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    pins = set(pins_of("requirements.txt"))
    assert pins - needed_by(ranges(), [*PYTHONS, here]) == set(), "pinned, but not needed"
    assert needed_by(ranges(), [here]) - pins == set(), "needed, but not pinned"


def test_the_tests_need_every_pin_and_nothing_else() -> None:
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    pins = set(pins_of("requirements.txt")) | set(pins_of("requirements-dev.txt"))
    assert pins - needed_by(ranges("dev"), [*PYTHONS, here]) == set(), "pinned, but not needed"
    assert needed_by(ranges("dev"), [here]) - pins == set(), "needed, but not pinned"


def test_what_is_asked_for_by_name_is_there() -> None:
    asked = "starlette uvicorn websockets sqlalchemy aiosqlite asyncpg python-jose passlib broadcaster redis"
    assert set(asked.split()) <= {canonicalize_name(requirement.name) for requirement in ranges()}
    assert {"pytest", "pytest-asyncio"} <= {canonicalize_name(requirement.name) for requirement in ranges("dev")}


def test_no_part_of_a_package_that_its_decision_rules_out_is_loaded() -> None:
    """Decision 20 trusts python-jose, passlib and broadcaster because certain parts of them are not loaded."""
    program = """
import sys
from broadcaster import Broadcast
import realtime.feed.bus
from services.passwords import PasswordHasher
from services.tokens import Tokens
Broadcast("memory://")
tokens = Tokens(["k" * 32], "HS256", access_seconds=60, refresh_seconds=60)
tokens.read(tokens.issue(1, "01234567-89ab-4def-8123-456789abcdef"))
PasswordHasher(64, 1, 1).verify("a", None)
from passlib.hash import argon2
assert argon2.get_backend() == "argon2_cffi", argon2.get_backend()
unwanted = "ecdsa", "rsa", "bcrypt", "argon2pure", "jose.jwe", "passlib.handlers.bcrypt", "aiokafka"
unwanted += tuple(f"broadcaster._backends.{name}" for name in ("redis", "postgres", "kafka"))
print(*(name for name in unwanted if name in sys.modules))
"""
    ran = subprocess.run([sys.executable, "-W", "ignore", "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert (ran.returncode, ran.stdout.strip()) == (0, ""), ran.stdout + ran.stderr


def test_the_version_is_that_of_the_package() -> None:
    assert PROJECT["version"] == VERSION
