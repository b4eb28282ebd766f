"""The rules for new passwords: the response reports all broken rules together."""

from __future__ import annotations

import pytest

from core.password_rules import check_password, common_passwords

GOOD = "third man 1949"


def kinds(password: str, username: str | None = None, email: str | None = None, *, mix: bool = False) -> list[str]:
    return [each.type for each in check_password(password, username=username, email=email, needs_mix=mix)]


@pytest.mark.parametrize("password", [GOOD, "x7" * 4, "x7" * 64, "😀" * 8, "nul \0 inside", "holly martins"])
def test_valid_passwords_break_no_rule(password: str) -> None:
    assert kinds(password, "holly", "martins@example.org") == []


@pytest.mark.parametrize(
    ("password", "username", "email", "broken"),
    [
        ("x7x7x7x", None, None, ["string_too_short"]),
        ("", None, None, ["string_too_short"]),
        (" " * 8, None, None, ["password_is_blank"]),
        ("\u3000\t" * 3, None, None, ["string_too_short", "password_is_blank"]),
        ("x7" * 64 + "x", None, None, ["string_too_long"]),
        ("hollymartins", "hollymartins", None, ["password_is_name"]),
        ("HollyMartins", "hollymartins", None, ["password_is_name"]),
        ("hollymartins", " hollymartins ", None, ["password_is_name"]),
        (" hollymartins", "hollymartins", None, ["password_is_name"]),
        ("holly.martins", None, " holly.martins@example.org", ["password_is_name"]),
        ("\0" * 9, None, None, ["password_is_blank"]),
        ("\u200b" * 8, None, None, ["password_is_blank"]),
        ("\uff28ollymartins", "hollymartins", None, ["password_is_name"]),
        ("Straße 1949", "STRASSE 1949", None, ["password_is_name"]),
        ("holly.martins", None, "Holly.Martins@example.org", ["password_is_name"]),
        ("HOLLY@example.org", None, "holly@Example.org", ["password_is_name"]),
        ("holly", "holly", None, ["string_too_short", "password_is_name"]),
        ("password", None, None, ["password_is_common"]),
        ("PassWord", None, None, ["password_is_common"]),
        ("trustno1", "trustno1", None, ["password_is_name", "password_is_common"]),
    ],
)
def test_each_broken_rule_is_reported(
    password: str, username: str | None, email: str | None, broken: list[str]
) -> None:
    assert kinds(password, username, email) == broken


@pytest.mark.parametrize(
    ("password", "broken"),
    [
        ("Third Man 1949", []),
        ("Third Man!", []),
        ("ДМИтрий-1", []),
        ("third man 1949", ["password_needs_upper"]),
        ("THIRD MAN 1949", ["password_needs_lower"]),
        ("Third Man film", ["password_needs_digit_or_sign"]),
        ("1234 5678 91011", ["password_needs_lower", "password_needs_upper"]),
        ("qwertyuiop", ["password_is_common", "password_needs_upper", "password_needs_digit_or_sign"]),
        (
            "abc",
            ["string_too_short", "password_is_name", "password_needs_upper", "password_needs_digit_or_sign"],
        ),
    ],
)
def test_the_setting_requires_a_mix_of_characters(password: str, broken: list[str]) -> None:
    assert kinds(password, "abc", mix=True) == broken


def test_a_problem_is_reported_at_the_given_location() -> None:
    (problem,) = check_password("short", username=None, email=None, needs_mix=False, loc=("body", "new_password"))
    assert problem.loc == ("body", "new_password")
    assert "short" not in problem.msg


def test_the_common_passwords_are_a_thousand_valid_ones() -> None:
    found = common_passwords()
    assert len(found) == 1_000
    assert {"12345678", "football", "iloveyou"} <= found
    assert all(8 <= len(each) <= 128 and each == each.casefold().strip() for each in found)
    assert GOOD not in found
