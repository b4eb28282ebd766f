"""docs/architecture.md matches the code: its tree, layers, owners and bounds are generated from it."""

from __future__ import annotations

import re

import pytest

from tests.project import architecture
from tests.project.architecture import DOCUMENT, LAYERS, bounds, purpose_of, regenerated, shown
from tests.support.documents import ROOT


def test_the_document_is_what_the_code_says() -> None:
    """`make tables` updates the document."""
    text = DOCUMENT.read_text()
    after, problems = regenerated(text)
    assert problems == []
    assert text == after


def test_every_folder_says_what_it_is_for() -> None:
    packages = [ROOT / name for layer in LAYERS for name in layer if (ROOT / name / "__init__.py").exists()]
    packages += [folder.parent for package in packages for folder in package.glob("*/__init__.py")]
    assert [str(folder) for folder in packages if not purpose_of(folder)] == []


def test_a_changed_number_a_moved_and_a_missing_constant_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    text = DOCUMENT.read_text()
    wrong = re.sub(r"`schemas\.MAX_BODY_BYTES` \| \d+ KiB", "`core.MAX_BODY_BYTES` | 1 KiB", text)
    assert wrong != text
    table, problems = bounds(wrong)
    assert (table, problems) == bounds(text)
    assert table in text

    assert bounds(text.replace("routes.http.uploads.BODY_SECONDS", "routes.http.uploads.NO_SECONDS"))[1] == [
        "routes.http.uploads.NO_SECONDS is in the table, but not in the code"
    ]
    monkeypatch.setattr(architecture, "constants", lambda: iter([*real_constants, "routes.new.MAX_WORRIES"]))
    assert [problem.partition(" ")[0] for problem in bounds(text)[1]] == ["routes.new.MAX_WORRIES"]


real_constants = list(architecture.constants())


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("MAX_BYTES", 256 * 1024, "256 KiB"),
        ("MAX_BYTES", 10 * 1024 * 1024, "10 MiB"),
        ("TOKEN_BYTES", 32, "32"),
        ("STOP_SECONDS", 0.25, "0.25 s"),
        ("PAUSE_SECONDS", 3600, "3,600 s"),
        ("KEY_HOURS", 24, "24 h"),
        ("MAX_ROWS", 1_000_000, "1,000,000"),
    ],
)
def test_a_bound_is_shown_with_the_unit_of_its_name(name: str, value: float, text: str) -> None:
    assert shown(name, value) == text
