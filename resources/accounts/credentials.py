"""Request and response models for registration, sign-in, passwords and sessions, and responses about accounts."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from email_validator import EmailNotValidError, validate_email
from pydantic import MISSING, AfterValidator, ConfigDict, Field, model_validator
from pydantic.config import JsonDict

from core.password_rules import MAX_PASSWORD_LENGTH, MIN_PASSWORD_LENGTH
from core.texts.normal import BLANK, INVISIBLE, PRIVATE_USE
from schemas import PADDING, Answer, Body, IsoDate, Moment, Name, examples, normal, trimmed

# RFC 5321, section 4.5.3.1.3, limits an address to this length, without the angle brackets.
MAX_EMAIL_LENGTH = 254
# The tokens of this service have 43 characters.
MAX_ONE_TIME_TOKEN_LENGTH = 128

# Characters whose normalised form contains @, / or a backslash.
_NORMALISED_AWAY = r"\u2100\u2101\u2105\u2106\ufe68\ufe6b\uff0f\uff20\uff3c"
_USERNAME = rf"^[{PADDING}]*[^@/\\{BLANK}{INVISIBLE}{PRIVATE_USE}{_NORMALISED_AWAY}]{{3,50}}[{PADDING}]*$"
_USERNAME_WORDS = "expected 3 to 50 printable characters, without spaces, @, / or backslash"

Username = Annotated[
    str,
    trimmed(_USERNAME, _USERNAME_WORDS),
    Field(
        description=f"{_USERNAME_WORDS.capitalize()}; leading and trailing spaces are removed",
        json_schema_extra={"minLength": 3, "pattern": _USERNAME},
    ),
    normal(50),
]
# `core.password_rules` checks the length with the other rules, so that one response names every broken rule.
NewPassword = Annotated[
    str, Field(json_schema_extra={"minLength": MIN_PASSWORD_LENGTH, "maxLength": MAX_PASSWORD_LENGTH})
]
Phone = Annotated[str, Field(pattern=r"^\+?[1-9][0-9]{6,14}$", description="E.164; the plus sign is optional")]
# The addresses that HTML's <input type=email> accepts, with at least two labels in the domain.
_ATOM = r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]+"
_LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_ADDRESS = rf"{_ATOM}(?:\.{_ATOM})*@(?:{_LABEL}\.)+[A-Za-z](?:[A-Za-z0-9-]{{0,61}}[A-Za-z0-9])"
_EMAIL = rf"^[{PADDING}]*{_ADDRESS}[{PADDING}]*$"
# Special-use domains (RFC 6761), in which no public mail server exists. Each letter is given in both cases, because
# JSON Schema patterns have no flag that ignores case.
_RESERVED = "|".join(
    "".join(f"[{letter}{letter.upper()}]" for letter in name)
    for name in ("arpa", "invalid", "local", "localhost", "onion", "test")
)
# Addresses that no mail server accepts: in a special-use domain, too long as a whole or in the local part, or with a
# label reserved by RFC 5891.
_UNDELIVERABLE: JsonDict = {
    "anyOf": [
        {"pattern": rf"@(?:[^@]*\.)?(?:{_RESERVED})[{PADDING}]*$"},
        {"pattern": rf"[^@{PADDING}]{{65}}@"},
        {"pattern": r"@(?:[^@]*\.)?(?![xX][nN])[^.@]{2}--"},
        {"pattern": rf"[^{PADDING}]{{{MAX_EMAIL_LENGTH + 1}}}"},
    ]
}


def _deliverable(address: str) -> str:
    """Return the address in the form that mail servers accept, with its domain in lowercase."""
    if len(address.strip()) > MAX_EMAIL_LENGTH:
        raise ValueError(f"expected at most {MAX_EMAIL_LENGTH} characters")
    if not re.fullmatch(_EMAIL, address):
        raise ValueError("expected an address such as holly@example.org")
    try:
        found = validate_email(address.strip(), check_deliverability=False, allow_smtputf8=False, strict=True)
    except EmailNotValidError as error:
        raise ValueError(f"expected an address that can receive email: {error}") from None
    assert found.ascii_email is not None
    return found.ascii_email


Email = Annotated[
    str,
    Field(
        description=f"At most {MAX_EMAIL_LENGTH} characters, not in a reserved domain such as .local or .test; a label "
        "that begins with xn-- must be valid IDNA; leading and trailing spaces are removed",
        json_schema_extra={"pattern": _EMAIL, "not": _UNDELIVERABLE},
    ),
    AfterValidator(_deliverable),
]

_NAMED: JsonDict = {"anyOf": [{"required": ["username"]}, {"required": ["email"]}]}
_WITH_PASSWORD: JsonDict = {"anyOf": [{"required": ["password"]}, {"required": ["hashedPassword"]}]}


def _require_needed(body: Body) -> None:
    """Raise ValueError unless at least one member of each entry of `NEEDED` was sent."""
    for names, expected in body.NEEDED:
        if not body.model_fields_set.intersection(names):
            raise ValueError(expected)


class RegisterBody(Body):
    """A new account with `username`, `email` or both. `password` takes precedence over its alias `hashedPassword`."""

    model_config = examples(
        {"username": "holly", "email": "holly@example.org", "password": "third man 1949"},
        allOf=[_NAMED, _WITH_PASSWORD],
    )
    NEEDED = (
        (("username", "email"), "expected username, email or both"),
        (("password", "hashedPassword"), "expected password"),
    )

    username: Username | MISSING = MISSING
    email: Email | MISSING = MISSING
    password: NewPassword | MISSING = MISSING
    hashedPassword: NewPassword | MISSING = MISSING  # noqa: N815
    name: Name | None = None
    first_name: Name | None = None
    last_name: Name | None = None
    phone_number: Phone | None = None

    @model_validator(mode="after")
    def _named_and_locked(self) -> RegisterBody:
        _require_needed(self)
        return self


LoginName = Annotated[str, Field(min_length=1, max_length=320)]
KnownPassword = Annotated[str, Field(min_length=1, max_length=MAX_PASSWORD_LENGTH)]
RefreshToken = Annotated[str, Field(min_length=1, max_length=4_096)]


class LoginBody(Body):
    """A sign-in with `username` or `email`, and with `password` or its alias `hashedPassword`. `username` may also be
    an email address. `username` and `password` take precedence.
    """

    model_config = examples({"username": "holly", "password": "third man 1949"}, allOf=[_NAMED, _WITH_PASSWORD])
    NEEDED = (
        (("username", "email"), "expected username or email"),
        (("password", "hashedPassword"), "expected password"),
    )

    username: LoginName | MISSING = MISSING
    email: LoginName | MISSING = MISSING
    password: KnownPassword | MISSING = MISSING
    hashedPassword: KnownPassword | MISSING = MISSING  # noqa: N815

    @model_validator(mode="after")
    def _named_and_proven(self) -> LoginBody:
        _require_needed(self)
        return self


class TokenForm(Body):
    """The grants `password` and `refresh_token` of OAuth2 (RFC 6749, sections 4.3 and 6); other fields are ignored.

    `email` and `hashedPassword` are aliases, as in `POST /auth/login`.
    """

    model_config = ConfigDict(
        extra="ignore",
        json_schema_extra={
            "anyOf": [
                {"allOf": [_NAMED, _WITH_PASSWORD], "properties": {"grant_type": {"const": "password"}}},
                {"required": ["grant_type", "refresh_token"], "properties": {"grant_type": {"const": "refresh_token"}}},
            ],
            "examples": [
                {"username": "holly", "password": "third man 1949"},
                {"grant_type": "refresh_token", "refresh_token": "eyJhbGciOiJIUzI1NiJ9.e30.c2lnbmF0dXJl"},
            ],
        },
    )

    grant_type: Literal["password", "refresh_token"] = "password"
    username: LoginName | MISSING = MISSING
    email: LoginName | MISSING = MISSING
    password: KnownPassword | MISSING = MISSING
    hashedPassword: KnownPassword | MISSING = MISSING  # noqa: N815
    refresh_token: RefreshToken | MISSING = MISSING

    @model_validator(mode="after")
    def _whole(self) -> TokenForm:
        if self.grant_type == "refresh_token" and "refresh_token" not in self.model_fields_set:
            raise ValueError("expected refresh_token")
        if self.grant_type == "password" and not (
            self.model_fields_set & {"username", "email"} and self.model_fields_set & {"password", "hashedPassword"}
        ):
            raise ValueError("expected username or email, and password")
        return self


def sign_in_of(body: LoginBody | TokenForm) -> tuple[str, str]:
    """Return the name or address, and the password, of a valid sign-in."""
    given = body.model_fields_set
    name = body.username if "username" in given else body.email
    return str(name), str(body.password if "password" in given else body.hashedPassword)


class RefreshBody(Body):
    model_config = examples({"refresh_token": "eyJhbGciOiJIUzI1NiJ9.e30.c2lnbmF0dXJl"})

    refresh_token: RefreshToken


# --- one-time tokens and passwords

OneTimeToken = Annotated[str, Field(min_length=1, max_length=MAX_ONE_TIME_TOKEN_LENGTH)]
_TOKEN = "pFkTfjOhxL2cF1pUhAu6KyMVzMcCCyTBZb7JbLRNTxA"  # noqa: S105 (an example)


class LinkBody(Body):
    """The token in an activation or confirmation URL."""

    model_config = examples({"token": _TOKEN})

    token: OneTimeToken


class PendingConfirmation(Answer):
    """The purpose of an emailed token that is not used up yet. To use the token, send it to `POST /auth/activate`."""

    purpose: Literal["activate", "email"] = Field(
        description="`activate`: activate the account. `email`: give the account this address"
    )
    username: str | None
    email: str = Field(description="The address to which the token was mailed")
    detail: str = Field(description="What to do next, in one sentence")


class AddressBody(Body):
    model_config = examples({"email": "holly@example.org"})

    email: Email


class ChangePasswordBody(Body):
    model_config = examples({"old_password": "third man 1949", "new_password": "prater wheel 1949"})

    old_password: KnownPassword
    new_password: NewPassword


class ResetPasswordBody(Body):
    model_config = examples({"token": _TOKEN, "new_password": "prater wheel 1949"})

    token: OneTimeToken
    new_password: NewPassword


class MailPromise(Answer):
    """A response that is the same whether or not the account exists."""

    detail: str


class GroupBody(Body):
    model_config = examples({"group": "moderator"})

    group: Literal["user", "moderator", "admin"]


class Session(Answer):
    """A session that has not ended."""

    id: str
    user_id: int
    user_agent: str | None = Field(description="User-Agent header of the sign-in")
    address: str | None = Field(description="IP address of the last refresh, or of the sign-in")
    created_at: Moment
    last_used_at: Moment = Field(description="Time of the last refresh, or of the sign-in")


class Token(Answer):
    access_token: str
    refresh_token: str = Field(description="Valid once, to obtain the next pair of tokens")
    token_type: Literal["bearer"]
    expires_in: int = Field(description="Lifetime of the access token in seconds")
    refresh_expires_in: int = Field(description="Lifetime of the refresh token in seconds")
    user_id: int
    session_id: str = Field(description="ID of this session in /auth/sessions")


class User(Answer):
    id: int
    username: str | None
    email: str | None
    name: str | None
    first_name: str | None
    last_name: str | None
    phone_number: str | None
    group: Literal["user", "moderator", "admin"]
    is_active: bool
    awaits_activation: bool = Field(description="The activation URL has not been used yet")
    gender: Literal["female", "male", "other", "undisclosed"] | None
    date_of_birth: IsoDate | None
    info: str | None
    avatar_url: str | None = Field(description="URL of a square picture")
    avatar_thumbnail_url: str | None
    has_profile: bool
    version: int
    created_at: Moment
    updated_at: Moment


class AuditEntry(Answer):
    """An action of staff on an account, or on rows that are not their own."""

    id: int
    actor_id: int | None = Field(
        description="The admin or moderator; null for an action on the command line or at service start"
    )
    action: str
    user_id: int | None = Field(description="The account, or the owner of the rows; null for rows without an owner")
    changes: dict[str, list[Any]] = Field(
        description="Old and new value of each changed field; an empty list for personal data and for fields of rows"
    )
    address: str | None = Field(description="IP address of the admin or moderator")
    created_at: Moment
    resource: str = Field(description="What the action was about: `users`, `jobs` or the name of a resource")
    entity_ids: list[int | str] = Field(description="The ids of the account, the job or the rows; the first 100")
    count: int = Field(description="How many rows the action was about")
