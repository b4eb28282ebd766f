"""What a new password must be. Passwords that are in use already are not held to it: nobody is locked out by a rule."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from core.errors import FieldProblem
from core.identity import name_key

MIN_PASSWORD_LENGTH = 8
MAX_PASSWORD_LENGTH = 128  # argon2 takes any length; this bounds what has to be hashed
_COMMON = Path(__file__).with_name("common_passwords.txt")


def check_password(
    password: str,
    *,
    username: str | None,
    email: str | None,
    needs_mix: bool,
    loc: tuple[str | int, ...] = ("body", "password"),
) -> list[FieldProblem]:
    """Every rule that the password breaks, at once. `needs_mix` is the setting PASSWORD_MIX."""
    found = []

    def broken(message: str, kind: str) -> None:
        found.append(FieldProblem(loc, message, kind))

    if len(password) < MIN_PASSWORD_LENGTH:
        broken(f"String should have at least {MIN_PASSWORD_LENGTH} characters", "string_too_short")
    if len(password) > MAX_PASSWORD_LENGTH:
        broken(f"String should have at most {MAX_PASSWORD_LENGTH} characters", "string_too_long")
        return found  # the rest would say nothing new of what is no password anyway
    if password and not any(character.isprintable() and not character.isspace() for character in password):
        broken("The password needs something besides blanks", "password_is_blank")
    key = name_key(password.strip())  # as names are
    if key in _names(username, email):
        broken("The password is the name or the address of the account", "password_is_name")
    if key in common_passwords():
        broken("The password is among the thousand that are tried first", "password_is_common")
    if needs_mix:
        if not any(character.islower() for character in password):
            broken("The password needs a lower case letter", "password_needs_lower")
        if not any(character.isupper() for character in password):
            broken("The password needs an upper case letter", "password_needs_upper")
        if not any(_is_digit_or_sign(character) for character in password):
            broken("The password needs a digit or a sign", "password_needs_digit_or_sign")
    return found


def _names(username: str | None, email: str | None) -> frozenset[str]:
    address = email or ""
    names = (username, address, address.partition("@")[0])
    return frozenset(name_key(name.strip()) for name in names if name)


def _is_digit_or_sign(character: str) -> bool:
    return not (character.isalpha() or character.isspace())


@cache
def common_passwords() -> frozenset[str]:
    """Read when first asked for: importing opens nothing."""
    lines = _COMMON.read_text(encoding="utf-8").splitlines()
    return frozenset(line for line in lines if not line.startswith("#"))
