"""Rules for new passwords. Existing passwords are not checked, so a new rule does not lock anyone out."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from core.errors import FieldProblem, Loc
from core.identity import name_key
from core.texts.normal import nfkc

MIN_PASSWORD_LENGTH = 8
MAX_PASSWORD_LENGTH = 128  # the limit keeps hashing cheap, because argon2 itself accepts any length
_COMMON = Path(__file__).with_name("common_passwords.txt")


def check_password(
    password: str, *, username: str | None, email: str | None, needs_mix: bool, loc: Loc = ("body", "password")
) -> list[FieldProblem]:
    """Return one problem for each rule that the password breaks. `needs_mix` is the setting PASSWORD_MIX."""
    found = []

    def broken(message: str, kind: str) -> None:
        found.append(FieldProblem(loc, message, kind))

    if len(password) > MAX_PASSWORD_LENGTH:
        broken(f"String should have at most {MAX_PASSWORD_LENGTH} characters", "string_too_long")
        return found  # On a long string, the other checks would take time and add nothing useful.
    password = nfkc(password)  # Passwords are hashed in normal form KC.
    if len(password) < MIN_PASSWORD_LENGTH:
        broken(f"String should have at least {MIN_PASSWORD_LENGTH} characters", "string_too_short")
    if password and not any(character.isprintable() and not character.isspace() for character in password):
        broken("The password needs at least one visible character", "password_is_blank")
    key = name_key(password.strip())  # the password is compared with names in their normal form
    if key in _names(username, email):
        broken("The password must differ from the user name and the email", "password_is_name")
    if key in common_passwords():
        broken("The password is too common", "password_is_common")
    if needs_mix:
        if not any(character.islower() for character in password):
            broken("The password needs a lowercase letter", "password_needs_lower")
        if not any(character.isupper() for character in password):
            broken("The password needs an uppercase letter", "password_needs_upper")
        if not any(_is_digit_or_sign(character) for character in password):
            broken("The password needs a digit or a symbol", "password_needs_digit_or_sign")
    return found


def _names(username: str | None, email: str | None) -> frozenset[str]:
    address = email or ""
    names = (username, address, address.partition("@")[0])
    return frozenset(name_key(name.strip()) for name in names if name)


def _is_digit_or_sign(character: str) -> bool:
    return not (character.isalpha() or character.isspace())


@cache
def common_passwords() -> frozenset[str]:
    """Return the common passwords, in lowercase. The file is read by the first call, not at import."""
    lines = _COMMON.read_text(encoding="utf-8").splitlines()
    return frozenset(line for line in lines if not line.startswith("#"))
